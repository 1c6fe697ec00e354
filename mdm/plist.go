package mdm

import (
	"fmt"

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
// map[string]any. Nesting is bounded. Errors wrap [ErrMalformed].
func DecodePlist(raw []byte) (map[string]any, error) {
	if err := scan(new(document), raw, false); err != nil {
		return nil, err
	}
	var v map[string]any
	if err := plist.Unmarshal(raw, &v); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return v, nil
}
