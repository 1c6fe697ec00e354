package schema

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/mdm"
)

// maxFindings bounds the findings of one command.
const maxFindings = 20

// Check returns what is wrong with a command according to Apple's schemas, a
// sentence each; nothing is found in a command that cannot be decoded.
func Check(cmd *mdm.Command) []string {
	found := &findings{}
	c := Find(cmd.RequestType)
	if c == nil {
		found.unknownType(cmd.RequestType)
		return found.list
	}
	plist, err := mdm.DecodePlist(cmd.Raw)
	if err != nil {
		return nil
	}
	keys, _ := plist["Command"].(map[string]any)
	keys = maps.Clone(keys)
	// The keys of every command.
	delete(keys, "RequestType")
	delete(keys, "RequestRequiresNetworkTether")
	found.dict("", keys, c.Keys)
	return found.list
}

// findings gathers sentences.
type findings struct {
	list []string
}

// add says what is wrong with the value at a path.
func (f *findings) add(path, format string, args ...any) {
	switch {
	case len(f.list) < maxFindings:
		f.list = append(f.list, clip(path)+": "+fmt.Sprintf(format, args...))
	case len(f.list) == maxFindings:
		f.list = append(f.list, "there are more findings, which are left out")
	}
}

func (f *findings) unknownType(requestType string) {
	if slices.Contains(newer(), requestType) {
		return
	}
	if meant := Closest(requestType, RequestTypes()); meant != "" {
		f.add(requestType, "this request type is not known; did you mean %s?", meant)
		return
	}
	f.add(requestType, "this request type is not known")
}

// clip keeps a name of any length readable.
func clip(name string) string {
	const most = 100
	if len(name) <= most {
		return name
	}
	return strings.ToValidUTF8(name[:most], "") + "..."
}

// dict checks the keys of a dictionary. A key ANY stands for all names.
func (f *findings) dict(path string, dict map[string]any, keys []Key) {
	names := make([]string, 0, len(keys))
	for i := range keys {
		k := &keys[i]
		if k.Name == "ANY" {
			return
		}
		names = append(names, k.Name)
		value, given := dict[k.Name]
		switch {
		case given:
			f.value(join(path, k.Name), value, k)
		case k.Required:
			f.add(join(path, k.Name), "this required key is missing")
		}
	}
	for _, name := range slices.Sorted(maps.Keys(dict)) {
		if len(f.list) > maxFindings {
			return
		}
		if slices.Contains(names, name) || slices.Contains(newerKeys(), join(path, name)) {
			continue
		}
		if meant := Closest(name, names); meant != "" {
			f.add(join(path, name), "there is no such key; did you mean %s?", meant)
		} else {
			f.add(join(path, name), "there is no such key")
		}
	}
}

// newerKeys are keys that Apple added after the release that the data is of.
//
// Source: Apple, github.com/apple/device-management, the releases of 2025.
func newerKeys() []string { return []string{"ReturnToService.BootstrapToken"} }

// value checks one value.
func (f *findings) value(path string, value any, k *Key) {
	kind := kindOf(value)
	if !fits(kind, k.Kind) {
		f.add(path, "the type is %s, and %s is expected", kind, k.Kind)
		return
	}
	switch value := value.(type) {
	case map[string]any:
		if len(k.Keys) > 0 {
			f.dict(path, value, k.Keys)
		}
	case []any:
		f.items(path, value, k.Keys)
	default:
		f.oneOf(path, fmt.Sprint(value), k.Values)
	}
}

// oneOf checks a value that has to be one of some.
func (f *findings) oneOf(path, value string, values []string) {
	if len(values) == 0 || slices.Contains(values, value) {
		return
	}
	if meant := Closest(value, values); meant != "" {
		f.add(path, "the value %q is not known; did you mean %s?", clip(value), meant)
		return
	}
	if len(values) <= 10 {
		f.add(path, "the value %q is not one of %s", clip(value), strings.Join(values, ", "))
		return
	}
	f.add(path, "the value %q is not known", clip(value))
}

// items checks the items of an array.
func (f *findings) items(path string, items []any, forms []Key) {
	for i, item := range items {
		at := fmt.Sprintf("%s[%d]", path, i)
		if len(f.list) > maxFindings {
			return
		}
		switch len(forms) {
		case 0:
			return
		case 1:
			f.value(at, item, &forms[0])
		default:
			f.alternative(at, item, forms)
		}
	}
}

// alternative checks an item whose key Item names its form.
func (f *findings) alternative(path string, item any, forms []Key) {
	dict, ok := item.(map[string]any)
	if !ok {
		f.add(path, "the type is %s, and dictionary is expected", kindOf(item))
		return
	}
	name, ok := dict["Item"].(string)
	if !ok {
		f.add(join(path, "Item"), "this required key is missing")
		return
	}
	names := make([]string, len(forms))
	for i := range forms {
		if names[i] = forms[i].itemName(); names[i] == name {
			f.dict(path, dict, forms[i].Keys)
			return
		}
	}
	f.oneOf(join(path, "Item"), name, names)
}

// itemName is the value of Item that chooses this form.
func (k *Key) itemName() string {
	for i := range k.Keys {
		if k.Keys[i].Name == "Item" && len(k.Keys[i].Values) == 1 {
			return k.Keys[i].Values[0]
		}
	}
	return k.Name
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// kindOf is the kind of a decoded value.
func kindOf(value any) Kind {
	switch value.(type) {
	case string:
		return String
	case bool:
		return Boolean
	case int64, uint64:
		return Integer
	case float64:
		return Real
	case []byte:
		return Data
	case time.Time:
		return Date
	case []any:
		return Array
	case map[string]any:
		return Dictionary
	}
	return Any
}

// fits says whether a value of one kind may stand where another is expected.
func fits(is, expected Kind) bool {
	return is == expected || expected == Any || is == Any || is == Integer && expected == Real
}
