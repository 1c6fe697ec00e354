// Package textinput reads text that people and their tools wrote: files,
// variables, PEM data, configuration. Editors add byte order marks, echo adds a
// newline, Windows writes UTF-16 and carriage returns, cat joins files without
// a newline. All of these have one meaning, and this package is the one place
// that knows them.
package textinput

import (
	"bytes"
	"encoding/binary"
	"os"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

var (
	markUTF8    = []byte{0xef, 0xbb, 0xbf}
	markUTF16LE = []byte{0xff, 0xfe}
	markUTF16BE = []byte{0xfe, 0xff}
)

// Text returns data as UTF-8 without a byte order mark, and with \n at the end
// of each line. Data that begins with a UTF-16 mark is converted. Other bytes
// stay as they are.
func Text(data []byte) []byte {
	switch {
	case bytes.HasPrefix(data, markUTF8):
		data = data[len(markUTF8):]
	case bytes.HasPrefix(data, markUTF16LE):
		data = fromUTF16(data[len(markUTF16LE):], binary.LittleEndian)
	case bytes.HasPrefix(data, markUTF16BE):
		data = fromUTF16(data[len(markUTF16BE):], binary.BigEndian)
	}
	return bytes.ReplaceAll(data, []byte("\r\n"), []byte("\n"))
}

func fromUTF16(data []byte, order binary.ByteOrder) []byte {
	units := make([]uint16, len(data)/2)
	for i := range units {
		units[i] = order.Uint16(data[2*i:])
	}
	var out []byte
	for _, r := range utf16.Decode(units) {
		out = utf8.AppendRune(out, r)
	}
	return out
}

// Value returns the text of a setting: Text without the newlines at its end.
// Other white space may belong to the value; see [Suspicious].
func Value(data []byte) string {
	return strings.TrimRight(string(Text(data)), "\r\n")
}

// Suspicious returns why a secret looks like more than the secret, in words that
// follow its name ("begins with a blank"), or "".
func Suspicious(value string) string {
	if value == "" {
		return ""
	}
	first, _ := utf8.DecodeRuneInString(value)
	last, _ := utf8.DecodeLastRuneInString(value)
	switch {
	case unicode.IsSpace(first):
		return "begins with white space"
	case unicode.IsSpace(last):
		return "ends with white space"
	case isQuote(first):
		return "begins with a quotation mark"
	case isQuote(last):
		return "ends with a quotation mark"
	}
	return ""
}

func isQuote(r rune) bool { return strings.ContainsRune("\"'`\u2018\u2019\u201c\u201d", r) }

// PEM returns PEM data in the form that encoding/pem reads: Text, with each
// armour line on a line of its own. In base64 there is no dash, so that the
// place of a missing newline is certain.
func PEM(data []byte) []byte {
	return bytes.ReplaceAll(Text(data), []byte("----------BEGIN "), []byte("-----\n-----BEGIN "))
}

// ReadFile reads a file as Text. Errors name the file.
func ReadFile(name string) ([]byte, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	return Text(data), nil
}

// ReadPEM reads a file as PEM. Errors name the file.
func ReadPEM(name string) ([]byte, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	return PEM(data), nil
}
