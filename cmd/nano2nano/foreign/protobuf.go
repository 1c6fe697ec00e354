package foreign

import (
	"errors"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

// message holds the fields of a protocol buffer by number. Repeated fields are
// in their order.
type message map[protowire.Number][]field

// field is a value: number for the kinds of fixed and variable length, bytes
// for the others.
type field struct {
	number uint64
	bytes  []byte
}

var errProtobuf = errors.New("it is not a protocol buffer")

// parseMessage reads the fields of a message; those of unknown numbers, too.
func parseMessage(data []byte) (message, error) {
	m := make(message)
	for len(data) > 0 {
		num, typ, n := protowire.ConsumeTag(data)
		if n < 0 {
			return nil, errProtobuf
		}
		data = data[n:]
		var f field
		switch typ {
		case protowire.VarintType:
			f.number, n = protowire.ConsumeVarint(data)
		case protowire.BytesType:
			f.bytes, n = protowire.ConsumeBytes(data)
		default:
			n = protowire.ConsumeFieldValue(num, typ, data)
		}
		if n < 0 {
			return nil, errProtobuf
		}
		data = data[n:]
		m[num] = append(m[num], f)
	}
	return m, nil
}

// last is the value of a field, of which the last one counts.
func (m message) last(n protowire.Number) field {
	if list := m[n]; len(list) > 0 {
		return list[len(list)-1]
	}
	return field{}
}

func (m message) text(n protowire.Number) string  { return string(m.last(n).bytes) }
func (m message) bytes(n protowire.Number) []byte { return m.last(n).bytes }
func (m message) truth(n protowire.Number) bool   { return m.last(n).number != 0 }

// goZeroTime is the zero time in nanoseconds, as it overflows.
const goZeroTime = -6795364578871345152

// time reads a time in nanoseconds; two values mean none.
func (m message) time(n protowire.Number) time.Time {
	ns := int64(m.last(n).number)
	if ns == 0 || ns == goZeroTime {
		return time.Time{}
	}
	return time.Unix(0, ns).UTC()
}
