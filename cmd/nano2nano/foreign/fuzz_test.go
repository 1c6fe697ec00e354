package foreign

import (
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protowire"
)

// Whatever a file holds, a message is read or refused, and what is read
// encodes to a message that reads the same.
func FuzzParseMessage(f *testing.F) {
	f.Add([]byte{})
	f.Add(protowire.AppendVarint(protowire.AppendTag(nil, 13, protowire.VarintType), 1))
	f.Add(protowire.AppendBytes(protowire.AppendTag(nil, 2, protowire.BytesType), []byte("udid")))
	f.Add(protowire.AppendFixed64(protowire.AppendTag(nil, 28, protowire.Fixed64Type), 1))
	f.Add([]byte{0xff, 0xff})
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := parseMessage(data)
		if err != nil {
			return
		}
		var again []byte
		for n, fields := range m {
			require.Positive(t, n)
			again = protowire.AppendBytes(protowire.AppendTag(again, n, protowire.BytesType), fields[len(fields)-1].bytes)
		}
		same, err := parseMessage(again)
		require.NoError(t, err)
		for n := range m {
			require.Equal(t, string(m.bytes(n)), string(same.bytes(n)))
		}
		m.time(28)
	})
}
