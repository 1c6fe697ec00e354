package mdm

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/groob/plist"
)

// EncodePlist encodes v, a struct or a map with string keys, as an XML
// property list for a reply to a device. A []byte becomes data; fields are
// named and omitted by tags such as `plist:"TokenData,omitempty"`. A nil
// pointer or interface that is not omitted panics.
func EncodePlist(v any) ([]byte, error) {
	b, err := plist.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encoding property list: %w", err)
	}
	return b, nil
}

// DecodePlist decodes an XML property list with a dict, whatever is in it:
// strings, bool, int64, uint64, float64, []byte for data, time.Time, []any and
// map[string]any. It is as tolerant as the decoding of messages; a scalar whose
// text is not of its type becomes a string. Nesting is bounded. Errors wrap
// [ErrMalformed].
func DecodePlist(raw []byte) (map[string]any, error) {
	m := usual
	if err := scan(new(document), raw, usual); err != nil {
		if m = tolerant; scan(new(document), raw, tolerant) != nil {
			return nil, err
		}
	}
	b := builder{scanner: scanner{body: raw, manner: m}, document: document{body: raw}}
	if err := b.encoding(); err != nil {
		return nil, err
	}
	if err := b.prolog(); err != nil {
		return nil, err
	}
	k, empty, err := b.startTag()
	if err == nil && k == kindPlist {
		k, empty, err = b.next()
	}
	if err != nil {
		return nil, err
	}
	v, err := b.value(k, empty)
	if err != nil {
		return nil, err
	}
	dict, _ := v.(map[string]any)
	return dict, nil
}

// builder makes a tree of a body that scan has accepted, which bounds its depth.
type builder struct {
	scanner
	document document
}

// next reads the start tag that comes next.
func (b *builder) next() (valueKind, bool, error) {
	if err := b.misc(); err != nil {
		return 0, false, err
	}
	return b.startTag()
}

// value reads the element whose start tag was read.
func (b *builder) value(k valueKind, empty bool) (any, error) {
	switch k {
	case kindDict:
		return b.dict(empty)
	case kindArray:
		return b.array(empty)
	}
	v := value{kind: k, start: b.pos, end: b.pos}
	if err := b.scalar(&b.document, &v, empty); err != nil {
		return nil, err
	}
	return b.document.scalar(v), nil
}

// ended reports whether the end tag of k comes next, and reads it.
func (b *builder) ended(k valueKind) (bool, error) {
	if err := b.misc(); err != nil {
		return false, err
	}
	if b.peek(0) != '<' || b.peek(1) != '/' {
		return false, nil
	}
	return true, b.endTag(k)
}

func (b *builder) dict(empty bool) (map[string]any, error) {
	dict := make(map[string]any)
	for !empty {
		if end, err := b.ended(kindDict); end || err != nil {
			return dict, err
		}
		k, emptyKey, err := b.next()
		if err != nil {
			return nil, err
		}
		name := value{kind: k, start: b.pos, end: b.pos}
		if !emptyKey {
			if err := b.text(&name); err != nil {
				return nil, err
			}
		}
		k, emptyValue, err := b.next()
		if err != nil {
			return nil, err
		}
		if dict[b.document.str(name)], err = b.value(k, emptyValue); err != nil {
			return nil, err
		}
	}
	return dict, nil
}

func (b *builder) array(empty bool) ([]any, error) {
	array := []any{}
	for !empty {
		if end, err := b.ended(kindArray); end || err != nil {
			return array, err
		}
		k, emptyValue, err := b.next()
		if err != nil {
			return nil, err
		}
		v, err := b.value(k, emptyValue)
		if err != nil {
			return nil, err
		}
		array = append(array, v)
	}
	return array, nil
}

// scalar returns the value of a scalar, its text if that is not of its kind.
func (d *document) scalar(v value) any {
	text := d.str(v)
	trimmed := strings.TrimSpace(text)
	switch v.kind {
	case kindTrue, kindFalse:
		return v.kind == kindTrue
	case kindInteger:
		if n, err := strconv.ParseInt(trimmed, 10, 64); err == nil {
			return n
		}
		if n, err := strconv.ParseUint(trimmed, 10, 64); err == nil {
			return n
		}
	case kindReal:
		if trimmed == "" {
			return 0.0
		}
		if n, err := strconv.ParseFloat(trimmed, 64); err == nil {
			return n
		}
	case kindData:
		if b, err := d.data(v); err == nil {
			return b
		}
	case kindDate:
		if t, err := time.Parse(time.RFC3339, trimmed); err == nil {
			return t
		}
	}
	return text
}
