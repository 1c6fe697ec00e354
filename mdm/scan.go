package mdm

import (
	"bytes"
	"fmt"
	"unicode/utf8"
)

// The scanner reads an XML property list in one pass and remembers where the
// values are that this package wants, instead of building a tree: a report
// may have megabytes of which four strings matter.
//
// It has three manners. Usual refuses all that groob/plist refuses, except for
// the text of integers, reals, dates and data, which it does not check. Strict
// checks that too. Tolerant takes whatever leaves no doubt about the elements:
// characters that XML forbids, references to nothing, markup characters that
// were not escaped, text between elements. Depth, declarations and attributes
// are limited in all of them. A device repeats a report until it is accepted,
// so that an odd byte in an app's name must not block its command queue.
type manner uint8

const (
	usual manner = iota
	strict
	tolerant
)

// maxDepth is how deep dicts and arrays may nest. Apple's own are below ten.
const maxDepth = 64

func malformed(offset int, what string) error {
	return fmt.Errorf("%w: %s at offset %d", ErrMalformed, what, offset)
}

// scanner is a position in a body.
type scanner struct {
	body []byte
	pos  int
	manner
	// notUTF8 says that the body has bytes that are no UTF-8: every text must
	// be unescaped to be read.
	notUTF8 bool
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

// scan fills d from body. If it fails, d has what came before the fault.
func scan(d *document, body []byte, m manner) error {
	d.body = body
	s := scanner{body: body, manner: m}
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
		if s.manner == tolerant {
			s.notUTF8 = true
			return nil
		}
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
	s.between()
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
	if s.manner == tolerant {
		n := bytes.Index(s.body[s.pos:], []byte("?>"))
		if n < 0 {
			return s.truncated()
		}
		s.pos += n + len("?>")
		return nil
	}
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
		s.between()
		if s.peek(1) != '!' || !bytes.HasPrefix(s.body[s.pos:], []byte("<!--")) {
			return nil
		}
		if err := s.comment(); err != nil {
			return err
		}
	}
}

func (s *scanner) comment() error {
	end, ok := commentEnd(s.body[s.pos:], s.manner)
	if !ok {
		return s.errorf("malformed comment")
	}
	if s.manner == tolerant {
		s.pos += end
		return nil
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
func commentEnd(b []byte, m manner) (int, bool) {
	if m == tolerant {
		i := bytes.Index(b[len("<!--"):], []byte("-->"))
		return len("<!--") + i + len("-->"), i >= 0
	}
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

// between skips what may stand between elements: white space, and any text if
// the scanner is tolerant.
func (s *scanner) between() {
	if s.manner != tolerant {
		s.space()
		return
	}
	n := bytes.IndexByte(s.body[s.pos:], '<')
	if n < 0 {
		n = len(s.body) - s.pos
	}
	s.pos += n
}

func (s *scanner) space() {
	for i, b := range s.body[s.pos:] {
		if !isSpace(b) {
			s.pos += i
			return
		}
	}
	s.pos = len(s.body)
}

func isSpace(b byte) bool {
	return b <= ' ' && (b == ' ' || b == '\t' || b == '\n' || b == '\r')
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
		case b == '<' || (b < 0x20 || b >= 0x7f || b == '&') && s.manner != tolerant:
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

// startTag reads a start tag; empty says that the element ends with it. The
// only attribute is the version of plist.
func (s *scanner) startTag() (k valueKind, empty bool, err error) {
	if !s.take('<') {
		if s.pos == len(s.body) {
			return 0, false, s.truncated()
		}
		return 0, false, s.errorf("text where a tag is wanted")
	}
	rest, n := s.body[s.pos:], 0
	for n < len(rest) && 'a' <= rest[n] && rest[n] <= 'z' {
		n++
	}
	if k = elementKind(rest[:n]); k == kindAbsent {
		if n == len(rest) {
			return 0, false, s.truncated()
		}
		return 0, false, malformed(s.pos-1, "no property list element")
	}
	s.pos += n
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
			at := s.pos
			name, _, err := s.attribute()
			if err != nil {
				return 0, false, err
			}
			if k != kindPlist || string(name) != "version" {
				return 0, false, malformed(at, "attribute that a property list does not have")
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
		v, empty, err := s.element(d)
		if err != nil {
			return err
		}
		in := scopeNone
		switch {
		case slot != nil:
			in = d.put(slot, v)
		case top.scope == scopeErrorChain && v.kind == kindDict && len(d.chain) < maxErrorChain:
			d.chain = append(d.chain, chainItem{})
			in = scopeErrorChainItem
		}
		if v.kind != kindDict && v.kind != kindArray || empty {
			continue
		}
		if depth == maxDepth {
			return malformed(at, fmt.Sprintf("more than %d levels", maxDepth))
		}
		stack[depth] = frame{array: v.kind == kindArray, scope: in}
		depth++
	}
	return nil
}

// element reads a value, of a container only its start tag; empty says that the
// element ends with that.
func (s *scanner) element(d *document) (v value, empty bool, err error) {
	at := s.pos
	kind, empty, err := s.startTag()
	if err != nil {
		return value{}, false, err
	}
	v = value{kind: kind, start: s.pos, end: s.pos}
	switch kind {
	case kindKey, kindPlist:
		return value{}, false, malformed(at, kind.String()+" where a value is wanted")
	case kindDict, kindArray:
		return v, empty, nil
	}
	err = s.scalar(d, &v, empty)
	return v, empty, err
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
		if s.manner != tolerant && len(bytes.TrimSpace(s.body[v.start:v.end])) > 0 {
			return malformed(v.start, "text in "+v.kind.String())
		}
		return nil
	}
	if s.manner == strict {
		return d.lexical(*v)
	}
	return nil
}
