package mdm

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// typedKeys are the keys of commands that Apple's schemas type as data, by
// RequestType; [] stands for the items of an array. JSON has no such type, so
// that their values come as text. The schemas have no key of type date in a
// command.
//
// Source: Apple, github.com/apple/device-management, mdm/commands, for the
// releases of 2024; ReturnToService.BootstrapToken is from those of 2025.
var typedKeys = map[string]map[string]valueKind{
	"AccountConfiguration":         {"AutoSetupAdminAccounts.[].passwordHash": kindData},
	"ClearPasscode":                {"UnlockToken": kindData},
	"DeclarativeManagement":        {"Data": kindData},
	"DeviceInformation":            {"DeviceAttestationNonce": kindData},
	"EraseDevice":                  {"ReturnToService.BootstrapToken": kindData, "ReturnToService.MDMProfileData": kindData, "ReturnToService.WiFiProfileData": kindData},
	"InstallEnterpriseApplication": {"ManifestURLPinningCerts.[]": kindData},
	"InstallProfile":               {"Payload": kindData},
	"InstallProvisioningProfile":   {"ProvisioningProfile": kindData},
	"RotateFileVaultKey":           {"FileVaultUnlock.PrivateKeyExport": kindData, "NewCertificate": kindData, "ReplyEncryptionCertificate": kindData},
	"SetAutoAdminPassword":         {"passwordHash": kindData},
	"Settings":                     {"Settings.[].Image": kindData},
}

// The explicit forms of data and dates, for keys that typedKeys does not have:
// an object with one of these as its only key.
const (
	explicitData = "$data"
	explicitDate = "$date"
)

// EncodeCommand makes a command's property list from JSON values, as
// encoding/json decodes them with UseNumber. keys are those of Command beside
// RequestType. A key that Apple's schemas type as data has base64 as its
// value; {"$data": base64} and {"$date": RFC 3339 time} do for any key. Keys
// are written in order, so that equal values make equal bytes. An error names
// the key that is wrong; it wraps [ErrMalformed] or [ErrMissingKey].
func EncodeCommand(uuid, requestType string, keys map[string]any) (*Command, error) {
	e := &encoder{typed: typedKeys[requestType]}
	e.buf.WriteString(xml.Header)
	e.buf.WriteString(`<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">` + "\n")
	e.buf.WriteString(`<plist version="1.0">` + "\n<dict>\n")
	if _, has := keys["RequestType"]; has {
		return nil, fmt.Errorf("%w: RequestType is given twice", ErrMalformed)
	}
	command := maps.Clone(keys)
	if command == nil {
		command = make(map[string]any)
	}
	command["RequestType"] = requestType
	if err := errors.Join(e.text("key", "Command"), e.dict(command, "", 0), e.text("key", "CommandUUID")); err != nil {
		return nil, err
	}
	if err := e.text("string", uuid); err != nil {
		return nil, encodeErr("CommandUUID", "%v", err)
	}
	e.buf.WriteString("</dict>\n</plist>\n")
	return DecodeCommand(e.buf.Bytes())
}

// encoder writes a property list.
type encoder struct {
	buf   bytes.Buffer
	typed map[string]valueKind
}

func encodeErr(path, format string, args ...any) error {
	return fmt.Errorf("%w: %s: %s", ErrMalformed, path, fmt.Sprintf(format, args...))
}

// value writes a value that stands at a path.
func (e *encoder) value(v any, path string, depth int) error {
	if depth > maxDepth {
		return encodeErr(path, "it nests too deep")
	}
	if kind, ok := e.typed[path]; ok {
		if text, ok := v.(string); ok {
			return e.typedText(kind, text, path)
		}
	}
	switch v := v.(type) {
	case map[string]any:
		if kind, text, ok := explicit(v); ok {
			return e.typedText(kind, text, path)
		}
		return e.dict(v, path, depth)
	case []any:
		e.buf.WriteString("<array>\n")
		for _, item := range v {
			if err := e.value(item, join(path, "[]"), depth+1); err != nil {
				return err
			}
		}
		e.buf.WriteString("</array>\n")
	case string:
		if err := e.text("string", v); err != nil {
			return encodeErr(path, "%v", err)
		}
	case json.Number:
		return e.number(v, path)
	case bool:
		if v {
			e.buf.WriteString("<true/>\n")
		} else {
			e.buf.WriteString("<false/>\n")
		}
	case nil:
		return encodeErr(path, "null has no place in a property list; leave the key out")
	default:
		return encodeErr(path, "%T is not a JSON value", v)
	}
	return nil
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

func (e *encoder) dict(dict map[string]any, path string, depth int) error {
	e.buf.WriteString("<dict>\n")
	for _, key := range slices.Sorted(maps.Keys(dict)) {
		at := join(path, key)
		if err := e.text("key", key); err != nil {
			return encodeErr(strconv.QuoteToASCII(at), "%v", err)
		}
		if err := e.value(dict[key], at, depth+1); err != nil {
			return err
		}
	}
	e.buf.WriteString("</dict>\n")
	return nil
}

// explicit recognizes the explicit forms.
func explicit(dict map[string]any) (kind valueKind, text string, ok bool) {
	if len(dict) != 1 {
		return kindAbsent, "", false
	}
	if text, ok := dict[explicitData].(string); ok {
		return kindData, text, true
	}
	if text, ok := dict[explicitDate].(string); ok {
		return kindDate, text, true
	}
	return kindAbsent, "", false
}

// typedText writes data or a date that came as text.
func (e *encoder) typedText(kind valueKind, text, path string) error {
	if kind == kindDate {
		at, err := time.Parse(time.RFC3339, text)
		if err != nil || at.UTC().Year() < 0 || at.UTC().Year() > 9999 {
			return encodeErr(path, "a date such as 2026-03-01T12:00:00Z is wanted")
		}
		return e.text("date", at.UTC().Format("2006-01-02T15:04:05Z"))
	}
	text = strings.Map(func(r rune) rune {
		if strings.ContainsRune(" \t\r\n", r) {
			return -1
		}
		return r
	}, text)
	data, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(text, "="))
	if err != nil {
		return encodeErr(path, "base64 is wanted")
	}
	return e.text("data", base64.StdEncoding.EncodeToString(data))
}

// number writes a whole number as integer, and any other as real.
func (e *encoder) number(n json.Number, path string) error {
	if !strings.ContainsAny(n.String(), ".eE") {
		_, err := n.Int64()
		if _, uerr := strconv.ParseUint(n.String(), 10, 64); err != nil && uerr != nil {
			return encodeErr(path, "%s is out of the range of an integer", n)
		}
		return e.text("integer", n.String())
	}
	f, err := n.Float64()
	if err != nil || math.IsInf(f, 0) || math.IsNaN(f) {
		return encodeErr(path, "%s is out of the range of a real", n)
	}
	return e.text("real", strconv.FormatFloat(f, 'f', -1, 64))
}

var errNoXML = errors.New("it has a character that XML does not have")

// text writes an element. XML has no place for some characters.
func (e *encoder) text(element, text string) error {
	for _, r := range text {
		if r < ' ' && r != '\t' && r != '\n' && r != '\r' || r == 0xFFFE || r == 0xFFFF {
			return errNoXML
		}
	}
	if !utf8.ValidString(text) {
		return errNoXML
	}
	e.buf.WriteString("<" + element + ">")
	if err := xml.EscapeText(&e.buf, []byte(text)); err != nil {
		return err
	}
	e.buf.WriteString("</" + element + ">\n")
	return nil
}
