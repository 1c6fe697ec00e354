package schema

import (
	"maps"
	"slices"
	"strings"
)

// AppleNames writes the keys of a command as Apple does where they come in
// lower case, with underscores or without: MicroMDM has manifest_url for
// ManifestURL. Keys that Apple does not have stay as they are. keys hold JSON
// values and are not changed.
func AppleNames(requestType string, keys map[string]any) map[string]any {
	c := Find(requestType)
	if c == nil {
		return keys
	}
	return appleDict(keys, c.Keys)
}

func appleDict(dict map[string]any, keys []Key) map[string]any {
	out := make(map[string]any, len(dict))
	for _, name := range slices.Sorted(maps.Keys(dict)) {
		k := keyFor(name, dict, keys)
		if k == nil {
			out[name] = dict[name]
			continue
		}
		out[k.Name] = appleValue(dict[name], k)
	}
	return out
}

// keyFor is the key that a name in a dictionary stands for, or nil. A key that
// is there under its own name has no other one.
func keyFor(name string, dict map[string]any, keys []Key) *Key {
	lower := strings.ToLower(strings.ReplaceAll(name, "_", ""))
	for i := range keys {
		k := &keys[i]
		if k.Name == name {
			return k
		}
		if _, given := dict[k.Name]; !given && name == strings.ToLower(name) && strings.ToLower(k.Name) == lower {
			return k
		}
	}
	return nil
}

func appleValue(value any, k *Key) any {
	switch value := value.(type) {
	case map[string]any:
		if k.Kind == Dictionary {
			return appleDict(value, k.Keys)
		}
	case []any:
		out := make([]any, len(value))
		for i, item := range value {
			out[i] = appleItem(item, k.Keys)
		}
		return out
	}
	return value
}

// appleItem is appleValue for an item of an array.
func appleItem(item any, forms []Key) any {
	if len(forms) == 1 {
		return appleValue(item, &forms[0])
	}
	dict, ok := item.(map[string]any)
	if !ok {
		return item
	}
	name, ok := dict["Item"].(string)
	if !ok {
		name, _ = dict["item"].(string)
	}
	for i := range forms {
		if forms[i].itemName() == name {
			return appleDict(dict, forms[i].Keys)
		}
	}
	return item
}
