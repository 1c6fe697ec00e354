package mdm

import (
	"bytes"
	"unicode/utf8"
)

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
