package mdm

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Errors that decoding wraps. All of them are the sender's fault. Their
// texts name keys and offsets but repeat no values.
var (
	// ErrMalformed: not an XML property list holding a dict, or a key with
	// a value that is not of its type.
	ErrMalformed = errors.New("malformed property list")
	// ErrUnknownMessageType: a MessageType that is none of the kinds.
	ErrUnknownMessageType = errors.New("unknown MessageType")
	// ErrMissingKey: a key that the message cannot do without is missing
	// or empty.
	ErrMissingKey = errors.New("missing key")
)

// Decode decodes a body whose media type does not tell what it is: a check-in
// if it has a MessageType, else a report if it has a Status. It fails as
// [DecodeCheckin] and [DecodeReport] do.
func Decode(body []byte) (Message, error) {
	var r reader
	if err := r.read(body); err != nil {
		return nil, err
	}
	switch {
	case r.MessageType.kind != kindAbsent:
		return r.checkin()
	case r.Status.kind != kindAbsent:
		// Not returned directly: a nil *Report is no nil Message.
		m, err := r.report()
		if err != nil {
			return nil, err
		}
		return m, nil
	}
	return nil, fmt.Errorf("%w: neither MessageType nor Status", ErrMissingKey)
}

// DecodeCheckin decodes the body of a check-in. The message keeps body as its
// Raw. The identity is not resolved. Errors wrap [ErrMalformed],
// [ErrUnknownMessageType] or [ErrMissingKey].
func DecodeCheckin(body []byte) (Message, error) {
	var r reader
	if err := r.read(body); err != nil {
		return nil, err
	}
	return r.checkin()
}

// DecodeMigration is [DecodeCheckin] for messages that another server kept or
// made up: an Authenticate may lack its Topic, which the TokenUpdate brings.
func DecodeMigration(body []byte) (Message, error) {
	r := reader{topicOptional: true}
	if err := r.read(body); err != nil {
		return nil, err
	}
	return r.checkin()
}

// DecodeReport decodes the body of a command report. The report keeps body as
// its Raw. The identity is not resolved. Errors wrap [ErrMalformed] or
// [ErrMissingKey].
func DecodeReport(body []byte) (*Report, error) {
	var r reader
	if err := r.read(body); err != nil {
		return nil, err
	}
	return r.report()
}

// Unreadable returns a report with [StatusUnreadable] for a body in which
// [DecodeReport] finds none. It has the identity keys and the CommandUUID that
// the body seems to have. They must not be trusted: a body that is no property
// list does not tell which of its keys are at the top.
func Unreadable(body []byte) *Report {
	return &Report{
		Enrollment: Enrollment{
			UDID:             seems(body, "UDID"),
			UserID:           seems(body, "UserID"),
			UserShortName:    seems(body, "UserShortName"),
			EnrollmentID:     seems(body, "EnrollmentID"),
			EnrollmentUserID: seems(body, "EnrollmentUserID"),
		},
		Status:      StatusUnreadable,
		CommandUUID: seems(body, "CommandUUID"),
		Raw:         body,
	}
}

// seems returns the string behind the last key of that name, wherever it is.
func seems(body []byte, name string) string {
	key := []byte("<key>" + name + "</key>")
	at := bytes.LastIndex(body, key)
	if at < 0 {
		return ""
	}
	text, found := bytes.CutPrefix(bytes.TrimLeft(body[at+len(key):], " \t\r\n"), []byte("<string>"))
	end := bytes.IndexAny(text, "<&")
	if !found || end < 0 || text[end] != '<' || badID(string(text[:end])) != "" {
		return ""
	}
	return string(text[:end])
}

// reader reads typed values from a document and keeps the first error.
type reader struct {
	document
	err error
	// topicOptional lets an Authenticate lack its Topic.
	topicOptional bool
}

// read scans body, tolerantly if it is not sound.
func (r *reader) read(body []byte) error {
	err := scan(&r.document, body, usual)
	if err == nil {
		return nil
	}
	r.document = document{damage: err}
	if scan(&r.document, body, tolerant) != nil {
		return err
	}
	return nil
}

func (r *reader) fail(err error) {
	if r.err == nil {
		r.err = err
	}
}

func (r *reader) wrongType(key, want string, v value) {
	r.fail(malformed(v.start, fmt.Sprintf("%s is %s, not %s", key, v.kind, want)))
}

// text returns an optional string, also one that is sent as a number; empty if
// it is something else.
func (r *reader) text(v value) string {
	switch v.kind {
	case kindString:
		return r.str(v)
	case kindInteger, kindReal:
		return strings.TrimSpace(r.str(v))
	}
	return ""
}

// exact returns an optional string that tells one thing from another: neither
// another type nor replaced characters are taken for it.
func (r *reader) exact(key string, v value) string {
	s := r.text(v)
	switch v.kind {
	case kindAbsent, kindString, kindInteger, kindReal:
	default:
		r.wrongType(key, "string", v)
	}
	if r.damage != nil && strings.ContainsRune(s, utf8.RuneError) {
		r.fail(malformed(v.start, "illegal character in "+key))
		return ""
	}
	return s
}

// need returns a string that must not be empty.
func (r *reader) need(key string, v value) string {
	s := r.exact(key, v)
	if s == "" {
		r.fail(fmt.Errorf("%w: %s", ErrMissingKey, key))
	}
	return s
}

// whole refuses a string that the store could only keep in part: a push with
// half a magic wakes nobody.
func (r *reader) whole(key, s string) string {
	if len(s) > MaxIDLen {
		r.fail(fmt.Errorf("%w: more than %d bytes in %s", ErrMalformed, MaxIDLen, key))
		return ""
	}
	return s
}

// bytes returns optional data.
func (r *reader) bytes(key string, v value) []byte {
	switch v.kind {
	case kindAbsent:
		return nil
	case kindData:
		b, err := r.data(v)
		if err != nil {
			r.fail(fmt.Errorf("%s: %w", key, err))
		}
		return b
	}
	r.wrongType(key, "data", v)
	return nil
}

// bytesOrNone returns data that the message can do without, none if it cannot
// be read.
func (r *reader) bytesOrNone(v value) []byte {
	if v.kind != kindData {
		return nil
	}
	b, _ := r.data(v)
	return b
}

// boolean returns an optional boolean, also one that is sent as a number or a
// word; false if it is something else.
func (r *reader) boolean(v value) bool {
	if v.kind == kindTrue || v.kind == kindFalse {
		return v.kind == kindTrue
	}
	b, _ := strconv.ParseBool(strings.ToLower(r.text(v)))
	return b
}

func (r *reader) enrollment() Enrollment {
	e := Enrollment{
		UDID:             r.exact("UDID", r.UDID),
		UserID:           r.exact("UserID", r.UserID),
		UserShortName:    r.text(r.UserShortName),
		UserLongName:     r.text(r.UserLongName),
		EnrollmentID:     r.exact("EnrollmentID", r.EnrollmentID),
		EnrollmentUserID: r.exact("EnrollmentUserID", r.EnrollmentUserID),
	}
	if e.UserID == SharediPadUserID { // it tells one user from another
		e.UserShortName = r.exact("UserShortName", r.UserShortName)
	}
	return e
}

func (r *reader) checkin() (Message, error) {
	kind := r.need("MessageType", r.MessageType)
	if r.err != nil {
		return nil, r.err
	}
	m := r.message(Kind(kind))
	if m == nil {
		return nil, ErrUnknownMessageType
	}
	if r.err != nil {
		return nil, r.err
	}
	return m, nil
}

// message returns the check-in of the given kind, nil if there is no such.
func (r *reader) message(kind Kind) Message {
	switch kind {
	case KindAuthenticate:
		return r.authenticate()
	case KindTokenUpdate:
		return r.tokenUpdate()
	case KindCheckOut:
		return &CheckOut{
			Enrollment: r.enrollment(),
			Topic:      r.text(r.Topic),
			Raw:        r.body,
		}
	case KindSetBootstrapToken:
		return &SetBootstrapToken{
			Enrollment:            r.enrollment(),
			BootstrapToken:        r.bytes("BootstrapToken", r.BootstrapToken),
			AwaitingConfiguration: r.boolean(r.AwaitingConfiguration),
			Raw:                   r.body,
		}
	case KindGetBootstrapToken:
		return &GetBootstrapToken{
			Enrollment:            r.enrollment(),
			AwaitingConfiguration: r.boolean(r.AwaitingConfiguration),
			Raw:                   r.body,
		}
	case KindUserAuthenticate:
		return &UserAuthenticate{
			Enrollment:        r.enrollment(),
			DigestResponse:    r.text(r.DigestResponse),
			HasDigestResponse: r.DigestResponse.kind != kindAbsent,
			Raw:               r.body,
		}
	case KindDeclarativeManagement:
		return &DeclarativeManagement{
			Enrollment: r.enrollment(),
			Endpoint:   r.need("Endpoint", r.Endpoint),
			Data:       r.bytes("Data", r.Data),
			Raw:        r.body,
		}
	case KindGetToken:
		return r.getToken()
	case KindReturnToService:
		return &ReturnToService{Enrollment: r.enrollment(), Raw: r.body}
	}
	return nil
}

func (r *reader) authenticate() *Authenticate {
	topic := r.need
	if r.topicOptional {
		topic = r.exact
	}
	return &Authenticate{
		Enrollment:   r.enrollment(),
		Topic:        r.whole("Topic", topic("Topic", r.Topic)),
		Model:        r.text(r.Model),
		ModelName:    r.text(r.ModelName),
		DeviceName:   r.text(r.DeviceName),
		OSVersion:    r.text(r.OSVersion),
		BuildVersion: r.text(r.BuildVersion),
		ProductName:  r.text(r.ProductName),
		SerialNumber: r.whole("SerialNumber", r.text(r.SerialNumber)),
		IMEI:         r.text(r.IMEI),
		MEID:         r.text(r.MEID),
		Raw:          r.body,
	}
}

func (r *reader) tokenUpdate() *TokenUpdate {
	m := &TokenUpdate{
		Enrollment:            r.enrollment(),
		Topic:                 r.whole("Topic", r.need("Topic", r.Topic)),
		PushMagic:             r.whole("PushMagic", r.need("PushMagic", r.PushMagic)),
		Token:                 r.bytes("Token", r.Token),
		UnlockToken:           r.bytesOrNone(r.UnlockToken),
		AwaitingConfiguration: r.boolean(r.AwaitingConfiguration),
		NotOnConsole:          r.boolean(r.NotOnConsole),
		Raw:                   r.body,
	}
	if len(m.Token) == 0 {
		r.fail(fmt.Errorf("%w: Token", ErrMissingKey))
	}
	return m
}

func (r *reader) getToken() *GetToken {
	m := &GetToken{
		Enrollment:       r.enrollment(),
		TokenServiceType: r.need("TokenServiceType", r.TokenServiceType),
		Raw:              r.body,
	}
	if r.TokenParameters.kind == kindDict {
		m.TokenParameters = TokenParameters{
			SecurityToken: r.text(r.params.SecurityToken),
			PhoneUDID:     r.text(r.params.PhoneUDID),
			WatchUDID:     r.text(r.params.WatchUDID),
		}
	}
	return m
}

func (r *reader) report() (*Report, error) {
	m := &Report{
		Enrollment: r.enrollment(),
		Status:     Status(strings.TrimSpace(r.need("Status", r.Status))),
		Raw:        r.body,
	}
	if r.err != nil {
		return nil, r.err
	}
	m.CommandUUID = r.exact("CommandUUID", r.CommandUUID)
	if r.err != nil || badID(m.CommandUUID) != "" {
		m.CommandUUID, m.BadCommandUUID = "", true
	}
	m.inventory = r.inventory()
	for _, item := range r.chain {
		m.ErrorChain = append(m.ErrorChain, ErrorChainItem{
			ErrorCode:            r.number(item.ErrorCode),
			ErrorDomain:          r.text(item.ErrorDomain),
			LocalizedDescription: r.text(item.LocalizedDescription),
			USEnglishDescription: r.text(item.USEnglishDescription),
		})
	}
	return m, nil
}
