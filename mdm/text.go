package mdm

import (
	"bytes"
	"unicode/utf16"
	"unicode/utf8"
)

// text reads the contents of a scalar or key, setting where they are, and
// its end tag.
func (s *scanner) text(v *value) error {
	v.start = s.pos
	v.marked = s.notUTF8
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
		case s.literal():
			v.marked = true
			s.pos++
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
				if s.manner != tolerant && s.illegalAt(s.pos) {
					return s.errorf("illegal character")
				}
			}
			s.pos += len(cdataEnd)
		default:
			return s.errorf("element in %s", v.kind)
		}
	}
}

// literal reports whether the "<" that is next was meant as text: it begins
// nothing that a property list has.
func (s *scanner) literal() bool {
	if s.manner != tolerant {
		return false
	}
	rest := s.body[s.pos+1:]
	if bytes.HasPrefix(rest, []byte("!--")) || bytes.HasPrefix(rest, []byte(cdataStart[1:])) {
		return false
	}
	rest = bytes.TrimPrefix(rest, []byte("/"))
	n := 0
	for n < len(rest) && 'a' <= rest[n] && rest[n] <= 'z' {
		n++
	}
	return elementKind(rest[:n]) == kindAbsent
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
// is known to be UTF-8, or text that is not has been noticed.
func (s *scanner) illegalAt(i int) bool {
	return class[s.body[i]]&illegal != 0 ||
		s.body[i] == 0xef && i+2 < len(s.body) && s.body[i+1] == 0xbf && s.body[i+2] >= 0xbe
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
			if s.manner != tolerant {
				return false, s.errorf("illegal character")
			}
			marked = true
		}
		switch b {
		case '\r':
			marked = true
		case ']':
			if s.manner != tolerant && bytes.HasPrefix(s.body[s.pos:end], []byte(cdataEnd)) {
				return false, s.errorf("]]> in text")
			}
		case '&':
			r, n := reference(s.body[s.pos:end])
			if s.manner != tolerant && (n == 0 || !legal(r)) {
				return false, s.errorf("unknown reference")
			}
			marked = true
			s.pos += max(n, 1) - 1
		}
	}
	return marked, nil
}

// reference decodes the reference that b starts with; n is its length, 0 if it
// is none, or none of the five names that XML has without declarations. The
// character may be one that XML forbids.
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
		r = min(r*base+digit, utf8.MaxRune+1)
	}
	return 0, 0
}

// legal reports whether XML has the character.
func legal(r rune) bool {
	switch {
	case r < 0x20:
		return r == '\t' || r == '\n' || r == '\r'
	case r == 0xfffe || r == 0xffff:
		return false
	}
	return utf8.ValidRune(r)
}

// unescape appends to dst what the text of a scanned element stands for. It
// replaces what XML forbids, which only a tolerant scanner lets through.
func unescape(dst, text []byte) []byte {
	for len(text) > 0 {
		n := 1
		switch {
		case text[0] == '&':
			var r rune
			if r, n = referred(text); n == 0 {
				r, n = '&', 1
			}
			dst = utf8.AppendRune(dst, r)
		case bytes.HasPrefix(text, []byte(cdataStart)):
			content, _, _ := bytes.Cut(text[len(cdataStart):], []byte(cdataEnd))
			dst = appendText(dst, content)
			n = len(cdataStart) + len(content) + len(cdataEnd)
		case bytes.HasPrefix(text, []byte("<!--")):
			n, _ = commentEnd(text, tolerant) // the same for a sound comment
		case text[0] == '<':
			dst = append(dst, '<')
		default:
			if n = bytes.IndexAny(text, "&<"); n < 0 {
				n = len(text)
			}
			dst = appendText(dst, text[:n])
		}
		text = text[n:]
	}
	return dst
}

// referred decodes the reference that text starts with, or the two of them that
// make one character, as programs write them that count in UTF-16.
func referred(text []byte) (r rune, n int) {
	r, n = reference(text)
	if utf16.IsSurrogate(r) {
		low, m := reference(text[n:])
		if pair := utf16.DecodeRune(r, low); m > 0 && pair != utf8.RuneError {
			return pair, n + m
		}
	}
	if !legal(r) {
		r = utf8.RuneError
	}
	return r, n
}

// appendText appends text with its line ends made newlines, as XML demands, and
// with U+FFFD for each character that XML forbids and each byte that is none.
func appendText(dst, text []byte) []byte {
	for i := 0; i < len(text); {
		r, n := utf8.DecodeRune(text[i:])
		switch {
		case r == '\r':
			dst = append(dst, '\n')
		case r == '\n' && i > 0 && text[i-1] == '\r':
		case !legal(r):
			dst = utf8.AppendRune(dst, utf8.RuneError)
		default:
			dst = utf8.AppendRune(dst, r)
		}
		i += n
	}
	return dst
}
