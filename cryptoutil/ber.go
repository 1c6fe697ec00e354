package cryptoutil

import "errors"

// maxNesting bounds the depth of the ASN.1 that any recursive parser gets to
// see. A CMS signature with an X.509 certificate needs about a dozen levels.
const maxNesting = 64

var (
	errBERTruncated = errors.New("ASN.1 element runs past its container")
	errBERNesting   = errors.New("ASN.1 nested too deeply")
	errBERTag       = errors.New("ASN.1 tag form not used by CMS")
	errBERLength    = errors.New("ASN.1 length not valid")
	errBERTrailing  = errors.New("data after the signature")
)

// normalizeBER checks that data is one well-formed BER element (each child
// inside its parent, nesting bounded) and returns it with every length in DER's
// definite, minimal form. DER input is returned as it is, without a copy.
//
// The check is more than tidiness: a BER parser that lets children outgrow
// their parents reads the same bytes over and over, in exponential time.
// Zero bytes after the element are tolerated; some encoders write surplus
// end-of-contents marks.
func normalizeBER(data []byte) ([]byte, error) {
	n, minimal, err := scanBER(data, 0)
	if err != nil {
		return nil, err
	}
	for _, b := range data[n:] {
		if b != 0 {
			return nil, errBERTrailing
		}
	}
	if minimal {
		return data[:n], nil
	}
	// Minimal lengths are never longer than what they replace, and an indefinite
	// length with its end mark takes three bytes, which hold any length below
	// 64 KiB: the result fits.
	out, _ := appendDER(make([]byte, 0, n+4), data)
	return out, nil
}

// berHeader is the tag and length of one element.
type berHeader struct {
	constructed, indefinite, minimal bool
	size                             int // of the header
	length                           int // of the contents, unless indefinite
}

func readBERHeader(data []byte) (h berHeader, err error) {
	if len(data) < 2 {
		return h, errBERTruncated
	}
	if data[0] == 0 || data[0]&0x1f == 0x1f {
		return h, errBERTag
	}
	h = berHeader{constructed: data[0]&0x20 != 0, minimal: true, size: 2}
	first := data[1]
	switch {
	case first < 0x80:
		h.length = int(first)
	case first == 0x80:
		if !h.constructed {
			return h, errBERLength
		}
		h.indefinite, h.minimal = true, false
	case first > 0x83: // more than any header can hold
		return h, errBERLength
	default:
		h.size += int(first & 0x7f)
		if len(data) < h.size {
			return h, errBERTruncated
		}
		if data[2] == 0 {
			return h, errBERLength
		}
		for _, b := range data[2:h.size] {
			h.length = h.length<<8 | int(b)
		}
		h.minimal = h.length >= 0x80
	}
	if h.length > len(data)-h.size {
		return h, errBERTruncated
	}
	return h, nil
}

// scanBER returns the size of the first element of data, and whether all its
// lengths are minimal and definite.
func scanBER(data []byte, depth int) (size int, minimal bool, err error) {
	if depth > maxNesting {
		return 0, false, errBERNesting
	}
	h, err := readBERHeader(data)
	if err != nil {
		return 0, false, err
	}
	end := h.size + h.length
	if !h.constructed {
		return end, h.minimal, nil
	}
	minimal = h.minimal
	if h.indefinite {
		end = len(data)
	}
	at := h.size
	for at < end {
		if h.indefinite && end-at >= 2 && data[at] == 0 && data[at+1] == 0 {
			if at == h.size {
				return 0, false, errBERLength // an empty one has no place in CMS
			}
			return at + 2, false, nil
		}
		n, m, err := scanBER(data[at:end], depth+1)
		if err != nil {
			return 0, false, err
		}
		minimal = minimal && m
		at += n
	}
	if h.indefinite {
		return 0, false, errBERTruncated
	}
	return end, minimal, nil
}

// appendDER appends the first element of data, which scanBER has accepted, to
// dst and returns what follows it.
func appendDER(dst, data []byte) (out, rest []byte) {
	h, _ := readBERHeader(data)
	contents, rest := data[h.size:], []byte(nil)
	if !h.indefinite {
		contents, rest = contents[:h.length], contents[h.length:]
	}
	dst = append(dst, data[0])
	if !h.constructed {
		return append(appendLength(dst, h.length), contents...), rest
	}
	start := len(dst)
	for len(contents) > 0 && contents[0] != 0 { // a zero tag can only be the end mark here
		dst, contents = appendDER(dst, contents)
	}
	if h.indefinite {
		rest = contents[2:]
	}
	length := len(dst) - start
	var buf [4]byte
	prefix := appendLength(buf[:0], length)
	dst = append(dst, prefix...)
	copy(dst[start+len(prefix):], dst[start:start+length])
	copy(dst[start:], prefix)
	return dst, rest
}

func appendLength(dst []byte, n int) []byte {
	switch {
	case n < 0x80:
		return append(dst, byte(n))
	case n <= 0xff:
		return append(dst, 0x81, byte(n))
	case n <= 0xffff:
		return append(dst, 0x82, byte(n>>8), byte(n))
	default:
		return append(dst, 0x83, byte(n>>16), byte(n>>8), byte(n))
	}
}
