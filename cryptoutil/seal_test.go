package cryptoutil_test

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/cryptoutil"
)

// sealKeyLine is a line of a key file.
func sealKeyLine(b byte) string {
	return base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{b}, cryptoutil.SealKeySize)) + "\n"
}

func TestSealKeys(t *testing.T) {
	old, err := cryptoutil.ParseSealKeys([]byte(sealKeyLine(1)))
	require.NoError(t, err)
	both, err := cryptoutil.ParseSealKeys([]byte("# the new one\n" + sealKeyLine(2) + "\r\n  " + sealKeyLine(1)))
	require.NoError(t, err)
	require.Equal(t, []string{both.KeyIDs()[0], old.KeyIDs()[0]}, both.KeyIDs())
	require.Len(t, both.KeyIDs()[0], 16)

	plain := []byte("a secret that is long enough to be found")
	sealed := old.Seal("place", plain)
	require.NotContains(t, string(sealed), "secret")
	require.NotEqual(t, sealed, old.Seal("place", plain), "a nonce is used once")
	opened, err := both.Open(old.KeyIDs()[0], "place", sealed)
	require.NoError(t, err)
	require.Equal(t, plain, opened)

	_, err = both.Open(both.KeyIDs()[0], "place", sealed)
	require.ErrorIs(t, err, cryptoutil.ErrSealed, "another key")
	_, err = old.Open(both.KeyIDs()[0], "place", both.Seal("place", plain))
	require.ErrorIs(t, err, cryptoutil.ErrSealKey)
	_, err = old.Open(old.KeyIDs()[0], "elsewhere", sealed)
	require.ErrorIs(t, err, cryptoutil.ErrSealed, "moved")
	for i := range sealed {
		broken := bytes.Clone(sealed)
		broken[i] ^= 1
		_, err = old.Open(old.KeyIDs()[0], "place", broken)
		require.ErrorIs(t, err, cryptoutil.ErrSealed, "byte %d changed", i)
		_, err = old.Open(old.KeyIDs()[0], "place", sealed[:i])
		require.ErrorIs(t, err, cryptoutil.ErrSealed, "cut to %d", i)
	}
	empty, err := old.Open(old.KeyIDs()[0], "place", old.Seal("place", nil))
	require.NoError(t, err)
	require.Empty(t, empty)
}

func TestParseSealKeysRefuses(t *testing.T) {
	const secret = "c2VjcmV0IHRoYXQgbXVzdCBub3Qgc2hvdw=="
	for name, file := range map[string]string{
		"empty":         "",
		"comments":      "# nothing\n\n",
		"too short":     sealKeyLine(1) + secret,
		"too long":      strings.TrimSpace(sealKeyLine(1)) + secret,
		"not base64":    "secret that must not show",
		"two in a line": strings.TrimSpace(sealKeyLine(1)) + " " + sealKeyLine(2),
		"repeated":      sealKeyLine(1) + sealKeyLine(2) + sealKeyLine(1),
		"endless line":  strings.Repeat("A", 1<<20),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := cryptoutil.ParseSealKeys([]byte(file))
			require.Error(t, err)
			require.NotContains(t, err.Error(), "secret")
			require.NotContains(t, err.Error(), secret[:8])
			require.Less(t, len(err.Error()), 200)
		})
	}
}

func FuzzParseSealKeys(f *testing.F) {
	for _, seed := range []string{"", "# x\n" + sealKeyLine(1), sealKeyLine(1) + sealKeyLine(2), "AAAA"} {
		f.Add([]byte(seed), []byte("sealed"))
	}
	f.Fuzz(func(t *testing.T, file, sealed []byte) {
		keys, err := cryptoutil.ParseSealKeys(file)
		if err != nil {
			return
		}
		ids := keys.KeyIDs()
		if len(ids) == 0 {
			t.Fatal("keys without one")
		}
		for _, id := range ids {
			if plain, err := keys.Open(id, "place", sealed); err == nil {
				t.Fatalf("opened what was never sealed: %x", plain)
			}
		}
		opened, err := keys.Open(ids[0], "place", keys.Seal("place", sealed))
		if err != nil || !bytes.Equal(opened, sealed) {
			t.Fatal(fmt.Sprint("did not come back: ", err))
		}
	})
}
