package mdm

import (
	"encoding/base64"
	"errors"
	"math"
	"strconv"
	"strings"
	"time"
)

// maxErrorChain is how many items of an ErrorChain are read.
const maxErrorChain = 32

// valueKind is the element of a value.
type valueKind uint8

const (
	kindAbsent valueKind = iota
	kindDict
	kindArray
	kindString
	kindData
	kindDate
	kindReal
	kindInteger
	kindTrue
	kindFalse
	// The elements that are no values.
	kindKey
	kindPlist
)

var kindNames = [...]string{"nothing", "dict", "array", "string", "data", "date", "real", "integer", "true", "false", "key", "plist"}

func (k valueKind) String() string { return kindNames[k] }

func elementKind(name []byte) valueKind {
	switch string(name) {
	case "dict":
		return kindDict
	case "array":
		return kindArray
	case "string":
		return kindString
	case "data":
		return kindData
	case "date":
		return kindDate
	case "real":
		return kindReal
	case "integer":
		return kindInteger
	case "true":
		return kindTrue
	case "false":
		return kindFalse
	case "key":
		return kindKey
	case "plist":
		return kindPlist
	}
	return kindAbsent
}

// value is where a value was found: the bytes between its tags.
type value struct {
	kind valueKind
	// marked says that the bytes hold references, carriage returns,
	// comments or CDATA, and must be unescaped to be read.
	marked     bool
	start, end int
}

// scope is what a container is to us, which decides the keys wanted in it.
type scope uint8

const (
	scopeNone scope = iota
	scopeTop
	scopeTokenParameters
	scopeCommand
	scopeErrorChain
	scopeErrorChainItem
)

// document holds the wanted values of one body. As in groob/plist, the last
// of several equal keys counts.
type document struct {
	body []byte
	// damage is why the body had to be read tolerantly, nil if it is sound.
	damage error

	MessageType, Status                 value
	UDID, EnrollmentID                  value
	UserID, EnrollmentUserID            value
	UserShortName, UserLongName         value
	Topic, PushMagic                    value
	Token, UnlockToken                  value
	NotOnConsole, AwaitingConfiguration value
	Model, ModelName, DeviceName        value
	OSVersion, BuildVersion             value
	ProductName, SerialNumber           value
	IMEI, MEID                          value
	BootstrapToken, DigestResponse      value
	Endpoint, Data                      value
	TokenServiceType, TokenParameters   value
	CommandUUID, Command, ErrorChain    value
	QueryResponses, SecurityInfo        value
	InstalledApplicationList            value

	params struct{ SecurityToken, PhoneUDID, WatchUDID value }
	// requestType is Command's.
	requestType value
	chain       []chainItem
}

type chainItem struct {
	ErrorCode, ErrorDomain, LocalizedDescription, USEnglishDescription value
}

// slot returns where the value of key goes, nil if nobody wants it.
func (d *document) slot(in scope, key []byte) *value {
	switch in {
	case scopeTop:
		return d.topSlot(key)
	case scopeTokenParameters:
		switch string(key) {
		case "SecurityToken":
			return &d.params.SecurityToken
		case "PhoneUDID":
			return &d.params.PhoneUDID
		case "WatchUDID":
			return &d.params.WatchUDID
		}
	case scopeCommand:
		if string(key) == "RequestType" {
			return &d.requestType
		}
	case scopeErrorChainItem:
		item := &d.chain[len(d.chain)-1]
		switch string(key) {
		case "ErrorCode":
			return &item.ErrorCode
		case "ErrorDomain":
			return &item.ErrorDomain
		case "LocalizedDescription":
			return &item.LocalizedDescription
		case "USEnglishDescription":
			return &item.USEnglishDescription
		}
	}
	return nil
}

func (d *document) topSlot(key []byte) *value {
	switch string(key) {
	case "MessageType":
		return &d.MessageType
	case "Status":
		return &d.Status
	case "UDID":
		return &d.UDID
	case "EnrollmentID":
		return &d.EnrollmentID
	case "UserID":
		return &d.UserID
	case "EnrollmentUserID":
		return &d.EnrollmentUserID
	case "UserShortName":
		return &d.UserShortName
	case "UserLongName":
		return &d.UserLongName
	case "Topic":
		return &d.Topic
	case "PushMagic":
		return &d.PushMagic
	case "Token":
		return &d.Token
	case "UnlockToken":
		return &d.UnlockToken
	case "NotOnConsole":
		return &d.NotOnConsole
	case "AwaitingConfiguration":
		return &d.AwaitingConfiguration
	case "Model":
		return &d.Model
	case "ModelName":
		return &d.ModelName
	case "DeviceName":
		return &d.DeviceName
	case "OSVersion":
		return &d.OSVersion
	case "BuildVersion":
		return &d.BuildVersion
	case "ProductName":
		return &d.ProductName
	case "SerialNumber":
		return &d.SerialNumber
	case "IMEI":
		return &d.IMEI
	case "MEID":
		return &d.MEID
	case "BootstrapToken":
		return &d.BootstrapToken
	case "DigestResponse":
		return &d.DigestResponse
	case "Endpoint":
		return &d.Endpoint
	case "Data":
		return &d.Data
	case "TokenServiceType":
		return &d.TokenServiceType
	case "TokenParameters":
		return &d.TokenParameters
	case "CommandUUID":
		return &d.CommandUUID
	case "Command":
		return &d.Command
	case "ErrorChain":
		return &d.ErrorChain
	case "QueryResponses":
		return &d.QueryResponses
	case "SecurityInfo":
		return &d.SecurityInfo
	case "InstalledApplicationList":
		return &d.InstalledApplicationList
	}
	return nil
}

// put stores v in slot, forgetting what an earlier equal key held, and
// returns the scope of v should it be a container.
func (d *document) put(slot *value, v value) scope {
	*slot = v
	switch slot {
	case &d.TokenParameters:
		d.params.SecurityToken, d.params.PhoneUDID, d.params.WatchUDID = value{}, value{}, value{}
		if v.kind == kindDict {
			return scopeTokenParameters
		}
	case &d.Command:
		d.requestType = value{}
		if v.kind == kindDict {
			return scopeCommand
		}
	case &d.ErrorChain:
		d.chain = d.chain[:0]
		if v.kind == kindArray {
			return scopeErrorChain
		}
	}
	return scopeNone
}

// str returns the text of a scalar.
func (d *document) str(v value) string {
	if !v.marked {
		return string(d.body[v.start:v.end])
	}
	return string(unescape(nil, d.body[v.start:v.end]))
}

// data returns the bytes of a data value, nil if there are none.
func (d *document) data(v value) ([]byte, error) {
	text := d.body[v.start:v.end]
	if v.marked {
		text = unescape(nil, text)
	}
	packed := make([]byte, 0, len(text))
	for _, b := range text {
		if !isSpace(b) {
			packed = append(packed, b)
		}
	}
	if len(packed) == 0 {
		return nil, nil
	}
	out := make([]byte, base64.StdEncoding.DecodedLen(len(packed)))
	n, err := base64.StdEncoding.Decode(out, packed)
	if err != nil {
		return nil, malformed(v.start, "invalid base64")
	}
	return out[:n], nil
}

// lexical checks the text of a scalar as groob/plist would.
func (d *document) lexical(v value) error {
	var err error
	switch v.kind {
	case kindData:
		_, err = d.data(v)
		return err
	case kindInteger:
		s := strings.TrimSpace(d.str(v))
		if strings.HasPrefix(s, "-") {
			_, err = strconv.ParseInt(s, 10, 64)
		} else {
			_, err = strconv.ParseUint(s, 10, 64)
		}
	case kindReal:
		if s := d.str(v); s != "" {
			_, err = strconv.ParseFloat(strings.TrimSpace(s), 64)
		}
	case kindDate:
		var t time.Time
		err = t.UnmarshalText([]byte(d.str(v)))
	}
	if err != nil {
		return malformed(v.start, "invalid "+v.kind.String())
	}
	return nil
}

// number reads a number of an ErrorChain: any number, also one in a string, to
// the nearest int64; 0 if there is none.
func (d *document) number(v value) int64 {
	if v.kind != kindInteger && v.kind != kindReal && v.kind != kindString {
		return 0
	}
	s := strings.TrimSpace(d.str(v))
	// On a range error ParseInt returns the nearest int64.
	if i, err := strconv.ParseInt(s, 10, 64); err == nil || errors.Is(err, strconv.ErrRange) {
		return i
	}
	f, err := strconv.ParseFloat(s, 64)
	if err != nil && !errors.Is(err, strconv.ErrRange) {
		return 0
	}
	return nearest(f)
}

// nearest returns the int64 nearest to f, towards zero; 0 for NaN.
func nearest(f float64) int64 {
	switch {
	case math.IsNaN(f):
		return 0
	case f >= math.MaxInt64:
		return math.MaxInt64
	case f <= math.MinInt64:
		return math.MinInt64
	}
	return int64(f)
}
