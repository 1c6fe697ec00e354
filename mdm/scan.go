package mdm

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// The scanner reads an XML property list in one pass and remembers where the
// values are that this package wants, instead of building a tree: a report
// may have megabytes of which four strings matter. It is stricter than
// groob/plist, and accepts nothing that groob/plist refuses, with one
// exception: unless asked, it does not judge the text of integers, reals,
// dates and data that nobody reads. A device repeats a report until it is
// accepted, so that an odd date must not cost its command queue.

// maxDepth is how deep dicts and arrays may nest. Apple's own are below ten.
const maxDepth = 64

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

func malformed(offset int, what string) error {
	return fmt.Errorf("%w: %s at offset %d", ErrMalformed, what, offset)
}

// scanner is a position in a body.
type scanner struct {
	body []byte
	pos  int
	// strict asks for a check of all scalars.
	strict bool
	// key is where marked keys are unescaped.
	key []byte
}

func (s *scanner) errorf(format string, args ...any) error {
	return malformed(s.pos, fmt.Sprintf(format, args...))
}

// truncated is the error for a body that ends too early.
func (s *scanner) truncated() error {
	return malformed(len(s.body), "unexpected end")
}

// scan fills d from body.
func scan(d *document, body []byte, strict bool) error {
	d.body = body
	s := scanner{body: body, strict: strict}
	if err := s.encoding(); err != nil {
		return err
	}
	if err := s.prolog(); err != nil {
		return err
	}
	if err := s.root(d); err != nil {
		return err
	}
	if err := s.misc(); err != nil {
		return err
	}
	if s.pos < len(s.body) {
		return s.errorf("trailing garbage")
	}
	return nil
}

// encoding refuses what is not UTF-8 text and skips a byte order mark.
func (s *scanner) encoding() error {
	b := s.body
	switch {
	case bytes.HasPrefix(b, []byte("bplist")):
		return s.errorf("binary property list")
	case bytes.HasPrefix(b, []byte("\x1f\x8b")):
		return s.errorf("gzip data")
	case bytes.HasPrefix(b, []byte("\xff\xfe")), bytes.HasPrefix(b, []byte("\xfe\xff")),
		bytes.HasPrefix(b, []byte("<\x00")), bytes.HasPrefix(b, []byte("\x00<")):
		return s.errorf("UTF-16")
	case bytes.HasPrefix(b, []byte("\xef\xbb\xbf")):
		s.pos = 3
	}
	if !utf8.Valid(b) {
		for i := 0; ; {
			r, n := utf8.DecodeRune(b[i:])
			if r == utf8.RuneError && n <= 1 {
				return malformed(i, "invalid UTF-8")
			}
			i += n
		}
	}
	return nil
}

// prolog reads the XML declaration and the document type up to the root.
func (s *scanner) prolog() error {
	s.space()
	if bytes.HasPrefix(s.body[s.pos:], []byte("<?xml")) {
		if err := s.declaration(); err != nil {
			return err
		}
	}
	if err := s.misc(); err != nil {
		return err
	}
	if bytes.HasPrefix(s.body[s.pos:], []byte("<!DOCTYPE")) {
		if err := s.doctype(); err != nil {
			return err
		}
		return s.misc()
	}
	return nil
}

// declaration reads <?xml version="1.0" encoding="UTF-8"?>.
func (s *scanner) declaration() error {
	s.pos += len("<?xml")
	for {
		s.space()
		if bytes.HasPrefix(s.body[s.pos:], []byte("?>")) {
			s.pos += len("?>")
			return nil
		}
		at := s.pos
		name, val, err := s.attribute()
		if err != nil {
			return err
		}
		var ok bool
		switch string(name) {
		case "version":
			ok = string(val) == "1.0"
		case "encoding":
			ok = bytes.EqualFold(val, []byte("utf-8"))
		case "standalone":
			ok = string(val) == "yes" || string(val) == "no"
		}
		if !ok {
			return malformed(at, "unsupported XML declaration")
		}
	}
}

// doctype reads a document type without an internal subset: entities could
// only be declared there.
func (s *scanner) doctype() error {
	start := s.pos
	s.pos += len("<!DOCTYPE")
	var quote byte
	for ; s.pos < len(s.body); s.pos++ {
		b := s.body[s.pos]
		switch {
		case b < 0x20 && !isSpace(b) || b >= 0x7f:
			return s.errorf("invalid character in document type")
		case quote != 0:
			if b == quote {
				quote = 0
			}
		case b == '"' || b == '\'':
			quote = b
		case b == '[' || b == '<':
			return s.errorf("document type with declarations")
		case b == '>':
			s.pos++
			return nil
		}
	}
	return malformed(start, "document type without end")
}

// misc skips white space and comments.
func (s *scanner) misc() error {
	for {
		s.space()
		if s.peek(1) != '!' || !bytes.HasPrefix(s.body[s.pos:], []byte("<!--")) {
			return nil
		}
		if err := s.comment(); err != nil {
			return err
		}
	}
}

func (s *scanner) comment() error {
	end, ok := commentEnd(s.body[s.pos:])
	if !ok {
		return s.errorf("malformed comment")
	}
	for ; end > 0; end-- {
		if class[s.body[s.pos]]&illegal != 0 {
			return s.errorf("control character in comment")
		}
		s.pos++
	}
	return nil
}

// commentEnd returns the length of the comment that b starts with.
func commentEnd(b []byte) (int, bool) {
	i := bytes.Index(b[len("<!--"):], []byte("--"))
	if i < 0 {
		return 0, false
	}
	i += len("<!--") + len("--")
	if i == len(b) || b[i] != '>' {
		return 0, false
	}
	return i + 1, true
}

func (s *scanner) space() {
	for s.pos < len(s.body) && isSpace(s.body[s.pos]) {
		s.pos++
	}
}

func isSpace(b byte) bool {
	return b == ' ' || b == '\t' || b == '\n' || b == '\r'
}

// attribute reads name="value". Values have no references, and names no
// prefixes: property lists need neither.
func (s *scanner) attribute() (name, val []byte, err error) {
	start := s.pos
	for s.pos < len(s.body) && isNameByte(s.body[s.pos]) {
		s.pos++
	}
	name = s.body[start:s.pos]
	if len(name) == 0 || !isLetter(name[0]) {
		if s.pos == len(s.body) {
			return nil, nil, s.truncated()
		}
		return nil, nil, malformed(start, "malformed tag")
	}
	s.space()
	if !s.take('=') {
		return nil, nil, s.errorf("attribute without value")
	}
	s.space()
	if s.pos == len(s.body) {
		return nil, nil, s.truncated()
	}
	quote := s.body[s.pos]
	if quote != '"' && quote != '\'' {
		return nil, nil, s.errorf("attribute without quotes")
	}
	s.pos++
	start = s.pos
	for ; s.pos < len(s.body); s.pos++ {
		switch b := s.body[s.pos]; {
		case b == quote:
			s.pos++
			return name, s.body[start : s.pos-1], nil
		case b < 0x20 || b >= 0x7f || b == '<' || b == '&':
			return nil, nil, s.errorf("invalid character in attribute")
		}
	}
	return nil, nil, s.truncated()
}

func isLetter(b byte) bool {
	return 'a' <= b && b <= 'z' || 'A' <= b && b <= 'Z' || b == '_'
}

func isNameByte(b byte) bool {
	return isLetter(b) || '0' <= b && b <= '9' || b == '.' || b == '-'
}

// peek returns the byte at n after the next, 0 behind the end.
func (s *scanner) peek(n int) byte {
	if s.pos+n < len(s.body) {
		return s.body[s.pos+n]
	}
	return 0
}

// take skips b if it is next.
func (s *scanner) take(b byte) bool {
	if s.pos < len(s.body) && s.body[s.pos] == b {
		s.pos++
		return true
	}
	return false
}

// root reads the plist element, or a dict without one, which Apple's parsers
// and groob/plist take too.
func (s *scanner) root(d *document) error {
	at := s.pos
	k, empty, err := s.startTag()
	if err != nil {
		return err
	}
	wrapped := k == kindPlist
	if wrapped {
		if empty {
			return malformed(at, "empty plist")
		}
		if err := s.misc(); err != nil {
			return err
		}
		at = s.pos
		if k, empty, err = s.startTag(); err != nil {
			return err
		}
	}
	if k != kindDict {
		return malformed(at, k.String()+" where a dict is wanted")
	}
	if !empty {
		if err := s.tree(d); err != nil {
			return err
		}
	}
	if !wrapped {
		return nil
	}
	if err := s.misc(); err != nil {
		return err
	}
	return s.endTag(kindPlist)
}

// startTag reads a start tag; empty says that the element ends with it.
func (s *scanner) startTag() (k valueKind, empty bool, err error) {
	if !s.take('<') {
		if s.pos == len(s.body) {
			return 0, false, s.truncated()
		}
		return 0, false, s.errorf("text where a tag is wanted")
	}
	start := s.pos
	for 'a' <= s.peek(0) && s.peek(0) <= 'z' {
		s.pos++
	}
	if k = elementKind(s.body[start:s.pos]); k == kindAbsent {
		if s.pos == len(s.body) {
			return 0, false, s.truncated()
		}
		return 0, false, malformed(start-1, "no property list element")
	}
	for {
		if s.take('>') {
			return k, false, nil
		}
		if s.take('/') {
			if !s.take('>') {
				return 0, false, s.errorf("malformed tag")
			}
			return k, true, nil
		}
		if s.pos == len(s.body) {
			return 0, false, s.truncated()
		}
		if !isSpace(s.body[s.pos]) {
			return 0, false, s.errorf("malformed tag")
		}
		s.space()
		if s.pos < len(s.body) && isLetter(s.body[s.pos]) {
			if _, _, err := s.attribute(); err != nil {
				return 0, false, err
			}
		}
	}
}

// endTag reads the end tag of k.
func (s *scanner) endTag(k valueKind) error {
	at := s.pos
	if s.take('<') && s.take('/') {
		if name := kindNames[k]; len(s.body)-s.pos >= len(name) && string(s.body[s.pos:s.pos+len(name)]) == name {
			s.pos += len(name)
			s.space()
			if s.take('>') {
				return nil
			}
		}
	}
	if s.pos == len(s.body) {
		return s.truncated()
	}
	return malformed(at, "</"+kindNames[k]+"> wanted")
}

// frame is an open container.
type frame struct {
	array bool
	scope scope
}

// tree reads the contents of the top dict, whose start tag was read, and its
// end tag.
func (s *scanner) tree(d *document) error {
	var stack [maxDepth]frame
	stack[0] = frame{scope: scopeTop}
	depth := 1
	for depth > 0 {
		if err := s.misc(); err != nil {
			return err
		}
		top := stack[depth-1]
		if s.peek(0) == '<' && s.peek(1) == '/' {
			k := kindDict
			if top.array {
				k = kindArray
			}
			if err := s.endTag(k); err != nil {
				return err
			}
			depth--
			continue
		}
		var slot *value
		if !top.array {
			var err error
			if slot, err = s.dictKey(d, top.scope); err != nil {
				return err
			}
			if err := s.misc(); err != nil {
				return err
			}
		}
		at := s.pos
		k, empty, err := s.startTag()
		if err != nil {
			return err
		}
		v := value{kind: k, start: s.pos, end: s.pos}
		switch k {
		case kindKey, kindPlist:
			return malformed(at, k.String()+" where a value is wanted")
		case kindDict, kindArray:
		default:
			if err := s.scalar(d, &v, empty); err != nil {
				return err
			}
		}
		in := scopeNone
		switch {
		case slot != nil:
			in = d.put(slot, v)
		case top.scope == scopeErrorChain && k == kindDict && len(d.chain) < maxErrorChain:
			d.chain = append(d.chain, chainItem{})
			in = scopeErrorChainItem
		}
		if k != kindDict && k != kindArray || empty {
			continue
		}
		if depth == maxDepth {
			return malformed(at, fmt.Sprintf("more than %d levels", maxDepth))
		}
		stack[depth] = frame{array: k == kindArray, scope: in}
		depth++
	}
	return nil
}

// dictKey reads a key element and returns where its value goes.
func (s *scanner) dictKey(d *document, in scope) (*value, error) {
	at := s.pos
	k, empty, err := s.startTag()
	if err != nil {
		return nil, err
	}
	if k != kindKey {
		return nil, malformed(at, k.String()+" where a key is wanted")
	}
	if empty {
		return nil, nil
	}
	v := value{kind: k}
	if err := s.text(&v); err != nil {
		return nil, err
	}
	if in == scopeNone {
		return nil, nil
	}
	name := s.body[v.start:v.end]
	if v.marked {
		s.key = unescape(s.key[:0], name)
		name = s.key
	}
	return d.slot(in, name), nil
}

// scalar reads the contents and the end tag of v.
func (s *scanner) scalar(d *document, v *value, empty bool) error {
	if !empty {
		if err := s.text(v); err != nil {
			return err
		}
	}
	if v.kind == kindTrue || v.kind == kindFalse {
		if len(bytes.TrimSpace(s.body[v.start:v.end])) > 0 {
			return malformed(v.start, "text in "+v.kind.String())
		}
		return nil
	}
	if s.strict {
		return d.lexical(*v)
	}
	return nil
}

// text reads the contents of a scalar or key, setting where they are, and
// its end tag.
func (s *scanner) text(v *value) error {
	v.start = s.pos
	for {
		n := bytes.IndexByte(s.body[s.pos:], '<')
		if n < 0 {
			return s.truncated()
		}
		marked, err := s.characters(s.pos + n)
		if err != nil {
			return err
		}
		v.marked = v.marked || marked
		rest := s.body[s.pos:]
		switch {
		case s.peek(1) == '/':
			v.end = s.pos
			return s.endTag(v.kind)
		case bytes.HasPrefix(rest, []byte("<!--")):
			v.marked = true
			if err := s.comment(); err != nil {
				return err
			}
		case bytes.HasPrefix(rest, []byte(cdataStart)):
			v.marked = true
			end := bytes.Index(rest[len(cdataStart):], []byte(cdataEnd))
			if end < 0 {
				return s.truncated()
			}
			end += s.pos + len(cdataStart)
			for s.pos += len(cdataStart); s.pos < end; s.pos++ {
				if s.illegalAt(s.pos) {
					return s.errorf("illegal character")
				}
			}
			s.pos += len(cdataEnd)
		default:
			return s.errorf("element in %s", v.kind)
		}
	}
}

const (
	cdataStart = "<![CDATA["
	cdataEnd   = "]]>"
)

// The classes of bytes that need a look in text.
const (
	// illegal: control characters that XML forbids.
	illegal = 1 << iota
	// special: a reference, a carriage return, or the start of U+FFFE,
	// U+FFFF or of a misplaced CDATA end.
	special
)

var class = func() (c [256]byte) {
	for b := range 0x20 {
		if !isSpace(byte(b)) {
			c[b] = illegal
		}
	}
	c['&'], c['\r'], c[']'], c[0xef] = special, special, special, special
	return c
}()

// illegalAt reports whether the character at i is one XML forbids. The body
// is known to be UTF-8.
func (s *scanner) illegalAt(i int) bool {
	return class[s.body[i]]&illegal != 0 ||
		s.body[i] == 0xef && s.body[i+1] == 0xbf && s.body[i+2] >= 0xbe
}

// characters checks text up to end, and reports whether it must be unescaped
// to be read.
func (s *scanner) characters(end int) (marked bool, err error) {
	for ; s.pos < end; s.pos++ {
		for i, b := range s.body[s.pos:end] {
			if class[b] != 0 {
				s.pos += i
				break
			}
			if s.pos+i+1 == end {
				s.pos = end
				return marked, nil
			}
		}
		b := s.body[s.pos]
		if s.illegalAt(s.pos) {
			return false, s.errorf("illegal character")
		}
		switch b {
		case '\r':
			marked = true
		case ']':
			if bytes.HasPrefix(s.body[s.pos:end], []byte(cdataEnd)) {
				return false, s.errorf("]]> in text")
			}
		case '&':
			_, n := reference(s.body[s.pos:end])
			if n == 0 {
				return false, s.errorf("unknown reference")
			}
			marked = true
			s.pos += n - 1
		}
	}
	return marked, nil
}

// reference decodes the reference that b starts with; n is its length, 0 if
// it is none, is not one of the five names XML has without declarations, or
// stands for a character XML forbids.
func reference(b []byte) (r rune, n int) {
	for _, e := range [...]struct {
		text string
		r    rune
	}{{"&amp;", '&'}, {"&lt;", '<'}, {"&gt;", '>'}, {"&quot;", '"'}, {"&apos;", '\''}} {
		if len(b) >= len(e.text) && string(b[:len(e.text)]) == e.text {
			return e.r, len(e.text)
		}
	}
	i, base := len("&#"), rune(10)
	if len(b) < i || b[1] != '#' {
		return 0, 0
	}
	if len(b) > i && b[i] == 'x' {
		i, base = i+1, 16
	}
	for first := i; i < len(b); i++ {
		digit := rune(16)
		switch c := b[i]; {
		case c == ';' && i > first:
			if r < 0x20 && r != '\t' && r != '\n' && r != '\r' || r >= 0xd800 && r < 0xe000 || r == 0xfffe || r == 0xffff {
				return 0, 0
			}
			return r, i + 1
		case '0' <= c && c <= '9':
			digit = rune(c - '0')
		case 'a' <= c && c <= 'f':
			digit = rune(c-'a') + 10
		case 'A' <= c && c <= 'F':
			digit = rune(c-'A') + 10
		}
		if digit >= base {
			return 0, 0
		}
		if r = r*base + digit; r > utf8.MaxRune {
			return 0, 0
		}
	}
	return 0, 0
}

// unescape appends to dst what the text of a scanned element stands for.
func unescape(dst, text []byte) []byte {
	for len(text) > 0 {
		switch {
		case text[0] == '&':
			r, n := reference(text)
			dst = utf8.AppendRune(dst, r)
			text = text[n:]
		case bytes.HasPrefix(text, []byte(cdataStart)):
			text = text[len(cdataStart):]
			end := bytes.Index(text, []byte(cdataEnd))
			dst = appendLines(dst, text[:end])
			text = text[end+len(cdataEnd):]
		case text[0] == '<':
			n, _ := commentEnd(text)
			text = text[n:]
		default:
			end := bytes.IndexAny(text, "&<")
			if end < 0 {
				end = len(text)
			}
			dst = appendLines(dst, text[:end])
			text = text[end:]
		}
	}
	return dst
}

// appendLines appends text with its line ends made newlines, as XML demands.
func appendLines(dst, text []byte) []byte {
	for i, b := range text {
		switch {
		case b == '\r':
			dst = append(dst, '\n')
		case b == '\n' && i > 0 && text[i-1] == '\r':
		default:
			dst = append(dst, b)
		}
	}
	return dst
}

// number reads a number of an ErrorChain: any number, to the nearest int64.
func (d *document) number(v value) int64 {
	if v.kind != kindInteger && v.kind != kindReal {
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
