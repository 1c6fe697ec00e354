package sqlstore

import (
	"strings"
	"time"
	"unicode/utf8"

	"github.com/nanomdm/nanomdm/mdm"
)

// micros returns a time as every column stores it. The zero time is 0, which
// columns that may be empty store as NULL (see null).
func micros(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMicro()
}

// fromMicros is the inverse of micros.
func fromMicros(us int64) time.Time {
	if us == 0 {
		return time.Time{}
	}
	return time.UnixMicro(us).UTC()
}

// null turns 0 into NULL, for columns where it means never.
func null(us int64) any {
	if us == 0 {
		return nil
	}
	return us
}

// storable says whether a name can be a key. No row has another name, and some
// engines refuse to look for one.
func storable(name string) bool {
	return name != "" && len(name) <= mdm.MaxIDLen && utf8.ValidString(name) && strings.IndexByte(name, 0) < 0
}

// maxText is the width of the columns for short texts, in characters.
const maxText = 255

// legible replaces what some engine does not store in a text.
func legible(s string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "")
}

// clip cuts a device's text to the width of its column. Such texts are for
// people; the message is stored whole beside them.
func clip(s string) string {
	s = legible(s)
	if len(s) <= maxText || utf8.RuneCountInString(s) <= maxText {
		return s
	}
	return string([]rune(s)[:maxText])
}

// notNil keeps an empty value from becoming NULL.
func notNil(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}
