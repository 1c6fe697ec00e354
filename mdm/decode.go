package mdm

import (
	"errors"
	"fmt"
)

// What the decoding errors wrap. All of them are the sender's fault. Their
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
	if err := scan(&r.document, body, false); err != nil {
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
	if err := scan(&r.document, body, false); err != nil {
		return nil, err
	}
	return r.checkin()
}

// DecodeReport decodes the body of a command report. The report keeps body as
// its Raw. The identity is not resolved. Errors wrap [ErrMalformed] or
// [ErrMissingKey].
func DecodeReport(body []byte) (*Report, error) {
	var r reader
	if err := scan(&r.document, body, false); err != nil {
		return nil, err
	}
	return r.report()
}

// reader reads typed values from a document and keeps the first error.
type reader struct {
	document
	err error
}

func (r *reader) fail(err error) {
	if r.err == nil {
		r.err = err
	}
}

func (r *reader) wrongType(key, want string, v value) {
	r.fail(malformed(v.start, fmt.Sprintf("%s is %s, not %s", key, v.kind, want)))
}

// text returns an optional string.
func (r *reader) text(key string, v value) string {
	switch v.kind {
	case kindAbsent:
		return ""
	case kindString:
		return r.str(v)
	}
	r.wrongType(key, "string", v)
	return ""
}

// need returns a string that must not be empty.
func (r *reader) need(key string, v value) string {
	s := r.text(key, v)
	if s == "" {
		r.fail(fmt.Errorf("%w: %s", ErrMissingKey, key))
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

// boolean returns an optional boolean, false when missing.
func (r *reader) boolean(key string, v value) bool {
	switch v.kind {
	case kindAbsent, kindFalse:
		return false
	case kindTrue:
		return true
	}
	r.wrongType(key, "boolean", v)
	return false
}

func (r *reader) enrollment() Enrollment {
	return Enrollment{
		UDID:             r.text("UDID", r.UDID),
		UserID:           r.text("UserID", r.UserID),
		UserShortName:    r.text("UserShortName", r.UserShortName),
		UserLongName:     r.text("UserLongName", r.UserLongName),
		EnrollmentID:     r.text("EnrollmentID", r.EnrollmentID),
		EnrollmentUserID: r.text("EnrollmentUserID", r.EnrollmentUserID),
	}
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
			Topic:      r.text("Topic", r.Topic),
			Raw:        r.body,
		}
	case KindSetBootstrapToken:
		return &SetBootstrapToken{
			Enrollment:            r.enrollment(),
			BootstrapToken:        r.bytes("BootstrapToken", r.BootstrapToken),
			AwaitingConfiguration: r.boolean("AwaitingConfiguration", r.AwaitingConfiguration),
			Raw:                   r.body,
		}
	case KindGetBootstrapToken:
		return &GetBootstrapToken{
			Enrollment:            r.enrollment(),
			AwaitingConfiguration: r.boolean("AwaitingConfiguration", r.AwaitingConfiguration),
			Raw:                   r.body,
		}
	case KindUserAuthenticate:
		return &UserAuthenticate{
			Enrollment:        r.enrollment(),
			DigestResponse:    r.text("DigestResponse", r.DigestResponse),
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
	return &Authenticate{
		Enrollment:   r.enrollment(),
		Topic:        r.need("Topic", r.Topic),
		Model:        r.text("Model", r.Model),
		ModelName:    r.text("ModelName", r.ModelName),
		DeviceName:   r.text("DeviceName", r.DeviceName),
		OSVersion:    r.text("OSVersion", r.OSVersion),
		BuildVersion: r.text("BuildVersion", r.BuildVersion),
		ProductName:  r.text("ProductName", r.ProductName),
		SerialNumber: r.text("SerialNumber", r.SerialNumber),
		IMEI:         r.text("IMEI", r.IMEI),
		MEID:         r.text("MEID", r.MEID),
		Raw:          r.body,
	}
}

func (r *reader) tokenUpdate() *TokenUpdate {
	m := &TokenUpdate{
		Enrollment:            r.enrollment(),
		Topic:                 r.need("Topic", r.Topic),
		PushMagic:             r.need("PushMagic", r.PushMagic),
		Token:                 r.bytes("Token", r.Token),
		UnlockToken:           r.bytes("UnlockToken", r.UnlockToken),
		AwaitingConfiguration: r.boolean("AwaitingConfiguration", r.AwaitingConfiguration),
		NotOnConsole:          r.boolean("NotOnConsole", r.NotOnConsole),
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
	switch r.TokenParameters.kind {
	case kindAbsent:
	case kindDict:
		m.TokenParameters = TokenParameters{
			SecurityToken: r.text("SecurityToken", r.params.SecurityToken),
			PhoneUDID:     r.text("PhoneUDID", r.params.PhoneUDID),
			WatchUDID:     r.text("WatchUDID", r.params.WatchUDID),
		}
	default:
		r.wrongType("TokenParameters", "dict", r.TokenParameters)
	}
	return m
}

func (r *reader) report() (*Report, error) {
	m := &Report{
		Enrollment: r.enrollment(),
		Status:     Status(r.need("Status", r.Status)),
		Raw:        r.body,
	}
	if r.err != nil {
		return nil, r.err
	}
	switch r.CommandUUID.kind {
	case kindAbsent:
	case kindString:
		if m.CommandUUID = r.str(r.CommandUUID); badID(m.CommandUUID) != "" {
			m.CommandUUID, m.BadCommandUUID = "", true
		}
	default:
		m.BadCommandUUID = true
	}
	for _, item := range r.chain {
		m.ErrorChain = append(m.ErrorChain, ErrorChainItem{
			ErrorCode:            r.number(item.ErrorCode),
			ErrorDomain:          r.textOrNone(item.ErrorDomain),
			LocalizedDescription: r.textOrNone(item.LocalizedDescription),
			USEnglishDescription: r.textOrNone(item.USEnglishDescription),
		})
	}
	return m, nil
}

// textOrNone returns a string whose type nobody insists on.
func (d *document) textOrNone(v value) string {
	if v.kind != kindString {
		return ""
	}
	return d.str(v)
}
