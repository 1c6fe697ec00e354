package mdm

import (
	"encoding/base64"
	"encoding/xml"
	"errors"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/groob/plist"
	"github.com/stretchr/testify/require"
)

// topKeys are all keys wanted in the top dict.
var topKeys = []string{
	"MessageType", "Status", "UDID", "EnrollmentID", "UserID", "EnrollmentUserID", "UserShortName", "UserLongName",
	"Topic", "PushMagic", "Token", "UnlockToken", "NotOnConsole", "AwaitingConfiguration", "Model", "ModelName",
	"DeviceName", "OSVersion", "BuildVersion", "ProductName", "SerialNumber", "IMEI", "MEID", "BootstrapToken",
	"DigestResponse", "Endpoint", "Data", "TokenServiceType", "TokenParameters", "CommandUUID", "Command", "ErrorChain",
	"QueryResponses", "SecurityInfo", "InstalledApplicationList",
}

// lexicalError reports whether groob/plist refused only the text of a scalar.
func lexicalError(err error) bool {
	var number *strconv.NumError
	var data base64.CorruptInputError
	var date *time.ParseError
	return errors.As(err, &number) || errors.As(err, &data) || errors.As(err, &date)
}

// requireSame compares a value the scanner found with the one of groob/plist.
func requireSame(t *testing.T, d *document, key string, v value, want map[string]any) {
	t.Helper()
	w, ok := want[key]
	require.Equal(t, ok, v.kind != kindAbsent, key)
	switch w := w.(type) {
	case nil:
	case string:
		require.Equal(t, kindString, v.kind, key)
		require.Equal(t, w, d.str(v), key)
	case bool:
		require.Equal(t, w, v.kind == kindTrue, key)
		require.Equal(t, !w, v.kind == kindFalse, key)
	case []byte:
		require.Equal(t, kindData, v.kind, key)
		got, err := d.data(v)
		require.NoError(t, err, key)
		require.Equal(t, string(w), string(got), key)
	case uint64, int64:
		require.Equal(t, kindInteger, v.kind, key)
		if u, ok := w.(uint64); !ok || u < 1<<63 {
			i, ok := w.(int64)
			if !ok {
				i = int64(u)
			}
			require.Equal(t, i, d.number(v), key)
		}
	case float64:
		require.Equal(t, kindReal, v.kind, key)
	case time.Time:
		require.Equal(t, kindDate, v.kind, key)
	case []any:
		require.Equal(t, kindArray, v.kind, key)
	case map[string]any:
		require.Equal(t, kindDict, v.kind, key)
	default:
		require.FailNow(t, "unexpected type", "%s: %T", key, w)
	}
}

// requireSameDocument compares all the scanner found with groob/plist's tree.
func requireSameDocument(t *testing.T, d *document, want map[string]any) {
	t.Helper()
	for _, key := range topKeys {
		requireSame(t, d, key, *d.topSlot([]byte(key)), want)
	}
	params, _ := want["TokenParameters"].(map[string]any)
	requireSame(t, d, "SecurityToken", d.params.SecurityToken, params)
	requireSame(t, d, "PhoneUDID", d.params.PhoneUDID, params)
	requireSame(t, d, "WatchUDID", d.params.WatchUDID, params)
	command, _ := want["Command"].(map[string]any)
	requireSame(t, d, "RequestType", d.requestType, command)

	chain, _ := want["ErrorChain"].([]any)
	n := 0
	for _, w := range chain {
		item, ok := w.(map[string]any)
		if !ok || n == maxErrorChain {
			continue
		}
		require.Less(t, n, len(d.chain))
		requireSame(t, d, "ErrorCode", d.chain[n].ErrorCode, item)
		requireSame(t, d, "ErrorDomain", d.chain[n].ErrorDomain, item)
		requireSame(t, d, "LocalizedDescription", d.chain[n].LocalizedDescription, item)
		requireSame(t, d, "USEnglishDescription", d.chain[n].USEnglishDescription, item)
		n++
	}
	require.Len(t, d.chain, n)
}

// FuzzDecode holds the scanner against groob/plist: whatever the scanner
// accepts, groob/plist accepts and reads the same in it. Scalars that nobody
// reads may be odd. groob/plist sees no more than maxDepth levels, since deep
// nesting overflows its stack.
func FuzzDecode(f *testing.F) {
	for _, m := range messages {
		f.Add(m.body)
	}
	addOddBodies(f)
	f.Fuzz(func(t *testing.T, body []byte) {
		m, decodeErr := Decode(body)
		if decodeErr == nil {
			require.NotNil(t, m)
			require.Equal(t, body, m.RawBytes())
			if id, err := m.Identity().Resolve(); err == nil {
				require.LessOrEqual(t, len(id.ID), MaxIDLen)
				require.NotContains(t, id.DeviceID(), ":")
			}
		}

		var d document
		if err := scan(&d, body, usual); err != nil {
			require.ErrorIs(t, err, ErrMalformed)
			if decodeErr != nil && scan(new(document), body, tolerant) != nil {
				require.Equal(t, err, decodeErr)
			}
			return
		}
		var want map[string]any
		if err := plist.Unmarshal(body, &want); err != nil {
			require.True(t, lexicalError(err), "groob/plist refuses: %v", err)
			return
		}
		requireSameDocument(t, &d, want)
	})
}

// addOddBodies adds the bodies that only a tolerant scanner takes, and those that
// none takes.
func addOddBodies(f *testing.F) {
	for _, h := range hostile {
		if len(h.body) < 1000 {
			f.Add([]byte(h.body))
		}
	}
	for _, d := range damaged {
		f.Add([]byte(d.body))
	}
	for _, o := range oddTexts {
		f.Add(wrap(str("MessageType", "Authenticate") + str("DeviceName", o.text) + str(o.text, "x") + udidKey))
		f.Add(wrap(str("Status", "Error") + "<key>ErrorChain</key><array><dict>" + str("ErrorDomain", o.text) + "</dict></array>" + udidKey))
	}
}

// mend makes an XML document of what a tolerant scanner accepts, in another way
// than the scanner: character by character, before anything is parsed.
func mend(body []byte) []byte {
	var out strings.Builder
	rest := strings.TrimPrefix(string(body), "\ufeff")
	element := regexp.MustCompile(`^</?(dict|array|string|data|date|real|integer|true|false|key|plist)(\s[^>]*|/)?>`)
	ref := regexp.MustCompile(`^&(amp|lt|gt|quot|apos|#[0-9]+|#x[0-9a-fA-F]+);`)
	number := func(s string) rune {
		s, base := strings.TrimSuffix(strings.TrimPrefix(s, "&#"), ";"), 10
		if strings.HasPrefix(s, "x") {
			s, base = s[1:], 16
		}
		n, err := strconv.ParseInt(s, base, 32)
		if err != nil {
			return utf8.MaxRune + 1
		}
		return rune(n)
	}
	character := func(r rune) {
		switch {
		case r < 0x20 && !strings.ContainsRune("\t\n\r", r), r == 0xfffe, r == 0xffff, !utf8.ValidRune(r):
			r = utf8.RuneError
		}
		_ = xml.EscapeText(&out, []byte(string(r)))
	}
	for rest != "" {
		if tag := element.FindString(rest); tag != "" {
			out.WriteString(tag)
			rest = rest[len(tag):]
			continue
		}
		if after, ok := strings.CutPrefix(rest, "<![CDATA["); ok {
			content, after, found := strings.Cut(after, "]]>")
			if !found {
				return nil
			}
			for _, r := range strings.ReplaceAll(strings.ReplaceAll(content, "\r\n", "\n"), "\r", "\n") {
				character(r)
			}
			rest = after
			continue
		}
		if after, ok := strings.CutPrefix(rest, "<!--"); ok {
			_, after, found := strings.Cut(after, "-->")
			if !found {
				return nil
			}
			out.WriteString("<!---->")
			rest = after
			continue
		}
		if text := ref.FindString(rest); strings.HasPrefix(text, "&#") {
			rest = rest[len(text):]
			r := number(text)
			if low := ref.FindString(rest); utf16.IsSurrogate(r) && strings.HasPrefix(low, "&#") {
				if pair := utf16.DecodeRune(r, number(low)); pair != utf8.RuneError {
					r, rest = pair, rest[len(low):]
				}
			}
			character(r)
			continue
		} else if text != "" {
			out.WriteString(text)
			rest = rest[len(text):]
			continue
		}
		r, n := utf8.DecodeRuneInString(rest)
		if r == '\r' { // XML reads it as a newline
			out.WriteByte('\r')
		} else {
			character(r)
		}
		rest = rest[n:]
	}
	return []byte(out.String())
}

// FuzzTolerant holds the tolerant scanner against the usual one: it reads the same
// in what that accepts, and in the rest the same as that reads in the mended body.
func FuzzTolerant(f *testing.F) {
	for _, m := range messages {
		f.Add(m.body)
	}
	addOddBodies(f)
	f.Fuzz(func(t *testing.T, body []byte) {
		var sound, odd document
		soundErr, oddErr := scan(&sound, body, usual), scan(&odd, body, tolerant)
		if soundErr != nil {
			// The scanner alone skips text before and between the elements.
			mended := mend(body)
			if oddErr != nil || scan(&sound, mended, usual) != nil {
				return
			}
		}
		require.NoError(t, oddErr)
		for _, key := range topKeys {
			requireSameValue(t, key, &sound, *sound.topSlot([]byte(key)), &odd, *odd.topSlot([]byte(key)))
		}
		require.Len(t, odd.chain, len(sound.chain))
		for i := range sound.chain {
			requireSameValue(t, "ErrorDomain", &sound, sound.chain[i].ErrorDomain, &odd, odd.chain[i].ErrorDomain)
		}
		if len(body) < 1<<16 {
			_, err := DecodePlist(body)
			require.NoError(t, err)
		}
	})
}

func requireSameValue(t *testing.T, key string, want *document, w value, got *document, g value) {
	t.Helper()
	require.Equal(t, w.kind, g.kind, key)
	require.Equal(t, want.scalar(w), got.scalar(g), key)
}

// FuzzDecodeCommand holds operators' commands to all groob/plist asks.
func FuzzDecodeCommand(f *testing.F) {
	for _, c := range commands {
		f.Add([]byte(c.raw))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		var d document
		if err := scan(&d, raw, strict); err == nil {
			var want map[string]any
			require.NoError(t, plist.Unmarshal(raw, &want))
			requireSameDocument(t, &d, want)
		}
		c, err := DecodeCommand(raw)
		if err != nil {
			require.True(t, errors.Is(err, ErrMalformed) || errors.Is(err, ErrMissingKey), "%v", err)
			return
		}
		require.Equal(t, raw, c.Raw)
		require.Empty(t, badID(c.CommandUUID))
		require.NotEmpty(t, c.CommandUUID)
		require.NotEmpty(t, c.RequestType)
	})
}

// FuzzParseDMEndpoint checks that an endpoint stays below its base URL and
// comes back from it.
func FuzzParseDMEndpoint(f *testing.F) {
	for _, s := range []string{"tokens", "declaration-items", "status", "declaration/activation/a", "declaration/asset/a/b?c#d%2e",
		"declaration/management/..", "declaration/configuration/../../x", "declaration/other/x", "", "/tokens", "declaration/asset/\u202e \\"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		e, err := ParseDMEndpoint(s)
		if err != nil {
			require.ErrorIs(t, err, ErrDMEndpoint)
			return
		}
		u, err := url.Parse("https://example.com/dm/" + e.Path())
		require.NoError(t, err)
		require.Equal(t, "example.com", u.Host)
		require.Empty(t, u.RawQuery)
		require.Empty(t, u.Fragment)
		require.Equal(t, "/dm/"+s, u.Path)
		segments := 1
		if e.Name == DMDeclaration {
			segments = 3
		}
		require.Len(t, strings.Split(e.Path(), "/"), segments)

		base, err := url.Parse("https://example.com/dm/")
		require.NoError(t, err)
		require.Equal(t, u.String(), base.JoinPath(e.Path()).String())
	})
}
