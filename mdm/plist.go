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
