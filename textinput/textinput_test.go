package textinput_test

import (
	"bytes"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/textinput"
)

func TestText(t *testing.T) {
	for name, in := range map[string]string{
		"plain":         "a\nb\n",
		"UTF-8 mark":    "\xef\xbb\xbfa\nb\n",
		"Windows":       "a\r\nb\r\n",
		"both":          "\xef\xbb\xbfa\r\nb\r\n",
		"UTF-16LE mark": "\xff\xfea\x00\r\x00\n\x00b\x00\n\x00",
		"UTF-16BE mark": "\xfe\xff\x00a\x00\n\x00b\x00\n",
	} {
		t.Run(name, func(t *testing.T) { require.Equal(t, "a\nb\n", string(textinput.Text([]byte(in)))) })
	}
	require.Equal(t, "a\xff\rb", string(textinput.Text([]byte("a\xff\rb"))), "other bytes stay")
	require.Equal(t, "\U0001f600", string(textinput.Text([]byte("\xff\xfe\x3d\xd8\x00\xde"))))
}

func TestValue(t *testing.T) {
	for _, in := range []string{"key", "key\n", "key\r\n", "key\n\n", "key\r\n\r\n", "\xef\xbb\xbfkey", "\xff\xfek\x00e\x00y\x00\n\x00"} {
		require.Equal(t, "key", textinput.Value([]byte(in)), "%q", in)
	}
	require.Equal(t, " key ", textinput.Value([]byte(" key \n")), "blanks may belong to the value")
	require.Equal(t, "", textinput.Value([]byte("\xef\xbb\xbf\r\n")))
}

func TestSuspicious(t *testing.T) {
	for value, want := range map[string]string{
		"":         "",
		"key":      "",
		"k e'y":    "",
		" key":     "begins with white space",
		"key\t":    "ends with white space",
		"\u00a0k":  "begins with white space",
		`"key"`:    "begins with a quotation mark",
		"key'":     "ends with a quotation mark",
		"“key”":    "begins with a quotation mark",
		"key\nkey": "",
	} {
		require.Equal(t, want, textinput.Suspicious(value), "%q", value)
	}
}

func TestPEM(t *testing.T) {
	block := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: bytes.Repeat([]byte{1}, 100)}))
	for name, data := range map[string]string{
		"two":             block + block,
		"glued":           strings.TrimSpace(block) + block,
		"mark":            "\xef\xbb\xbf" + block + block,
		"Windows":         strings.ReplaceAll(block+block, "\n", "\r\n"),
		"glued with text": "subject=A\n" + strings.TrimSpace(block) + block,
	} {
		t.Run(name, func(t *testing.T) {
			rest, n := textinput.PEM([]byte(data)), 0
			for block, more := pem.Decode(rest); block != nil; block, more = pem.Decode(more) {
				n++
			}
			require.Equal(t, 2, n)
		})
	}
}

func TestReadFile(t *testing.T) {
	name := filepath.Join(t.TempDir(), "text")
	_, err := textinput.ReadFile(name)
	require.ErrorContains(t, err, name)
	_, err = textinput.ReadPEM(name)
	require.ErrorContains(t, err, name)
	require.NoError(t, os.WriteFile(name, []byte("\xef\xbb\xbf-----END A----------BEGIN B-----"), 0o600))
	data, err := textinput.ReadPEM(name)
	require.NoError(t, err)
	require.Equal(t, "-----END A-----\n-----BEGIN B-----", string(data))
	data, err = textinput.ReadFile(name)
	require.NoError(t, err)
	require.Equal(t, "-----END A----------BEGIN B-----", string(data))
}

func FuzzText(f *testing.F) {
	f.Add([]byte("\xff\xfea"))
	f.Add([]byte("\xef\xbb\xbf-----END A----------BEGIN B-----\r\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		text := textinput.PEM(data)
		require.LessOrEqual(t, len(text), 2*len(data)+16)
		value := textinput.Value(data)
		require.False(t, strings.HasSuffix(value, "\n"))
		_ = textinput.Suspicious(value)
	})
}
