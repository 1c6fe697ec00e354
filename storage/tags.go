package storage

import "context"

const (
	// MaxTags is the number of tags that a device may have.
	MaxTags = 50
	// MaxTagLen is the length of a tag, in bytes.
	MaxTagLen = 64
)

// TagFault explains why a text is not a tag; empty if it is one. A tag is of
// ASCII letters, digits and . _ : @ + - and begins with a letter or a digit, so
// that it looks the same everywhere.
func TagFault(text string) string {
	switch {
	case text == "":
		return "it is empty"
	case len(text) > MaxTagLen:
		return "it is longer than 64 characters"
	case !letterOrDigit(text[0]):
		return "it does not begin with a letter or a digit"
	}
	for i := range len(text) {
		switch c := text[i]; {
		case letterOrDigit(c), c == '.', c == '_', c == ':', c == '@', c == '+', c == '-':
		default:
			return "it has other characters than letters, digits and . _ : @ + -"
		}
	}
	return ""
}

func letterOrDigit(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
}

// TagChange gives devices tags and takes tags from them.
type TagChange struct {
	IDs         []string
	Add, Remove []string // tags (TagFault), none in both
	// Record makes the audit record of one transaction, which changes the
	// devices in changed. It may be called again if the transaction repeats.
	Record func(changed []string) *AuditRecord
}

// TagsChanged is the outcome of a TagChange, by the ids of devices.
type TagsChanged struct {
	// Found are the devices that exist; user channels are not devices.
	Found []string
	// Changed are the devices with other tags than before.
	Changed []string
	// Full are the devices that would have more than MaxTags. They are not
	// changed.
	Full []string
}

// TagCount is a tag with the number of its devices.
type TagCount struct {
	Tag     string
	Devices int64
}

// Tags keeps the tags of devices. A device keeps them when it enrolls anew, and
// loses them when it is deleted. Its user channels share them. Callers with a
// scope neither see nor remove tags from before the device came to its topic.
type Tags interface {
	// ChangeTags changes devices in chunks of one transaction each, with one
	// audit record for each chunk that changes some. With an error, the devices
	// in the result are done. Repeating a call is safe.
	ChangeTags(ctx context.Context, scope Scope, c TagChange) (TagsChanged, error)
	// TagCounts lists up to limit tags that come after one, sorted by byte.
	TagCounts(ctx context.Context, scope Scope, after string, limit int) ([]TagCount, error)
}
