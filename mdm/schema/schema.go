// Package schema checks commands against Apple's schemas: keys that are
// required, keys that do not exist, types of values, and the platforms and
// channels that can take a command.
//
// Apple's schemas have been wrong, and releases of the operating systems are
// ahead of them. A finding is a warning: nothing in this package refuses a
// command.
//
// The data is made from Apple's files by the program in generate: set
// APPLE_SCHEMAS to the folder that has commands/*.yaml and LICENSE.txt, and run
// go generate. Source: github.com/apple/device-management, the releases of
// autumn 2024 (iOS 18.1, macOS 15.1), under the licence in LICENSE-APPLE.txt.
package schema

import (
	_ "embed"
	"encoding/json"
	"slices"
	"strings"
	"sync"
)

//go:generate go run ./generate -schemas $APPLE_SCHEMAS -out .

// Licence is the permission notice of Apple's schemas. It has to come with the
// data.
//
//go:embed LICENSE-APPLE.txt
var Licence string

//go:embed commands.json
var commandsJSON []byte

// Kind is the type of a value in a property list.
type Kind string

// The kinds.
const (
	String     Kind = "string"
	Boolean    Kind = "boolean"
	Integer    Kind = "integer"
	Real       Kind = "real"
	Data       Kind = "data"
	Date       Kind = "date"
	Array      Kind = "array"
	Dictionary Kind = "dictionary"
	Any        Kind = "any"
)

// Kinds lists all kinds.
func Kinds() []Kind {
	return []Kind{String, Boolean, Integer, Real, Data, Date, Array, Dictionary, Any}
}

// Command is the schema of one request type.
type Command struct {
	RequestType string `json:"t"`
	// Platforms holds the support by platform; a platform that is missing is
	// not described.
	Platforms map[string]Support `json:"os"`
	Keys      []Key              `json:"k,omitempty"`
}

// Support says how far a platform supports a command.
type Support struct {
	Never            bool   `json:"never,omitempty"`
	Introduced       string `json:"from,omitempty"`
	Removed          string `json:"until,omitempty"`
	NoDeviceChannel  bool   `json:"nodev,omitempty"`
	NoUserChannel    bool   `json:"nouser,omitempty"`
	NoUserEnrollment bool   `json:"noue,omitempty"`
}

// Key is the schema of a key. An array with one subkey has items of that
// subkey's form; one with several, such as Settings, has items whose key Item
// names the subkey.
type Key struct {
	Name     string   `json:"n"`
	Kind     Kind     `json:"t"`
	Required bool     `json:"r,omitempty"`
	Values   []string `json:"v,omitempty"`
	Keys     []Key    `json:"k,omitempty"`
}

// newer are request types that Apple added after the release that the data is
// of; their keys are not known here.
//
// Source: Apple, github.com/apple/device-management, the release of 2026.
func newer() []string {
	return []string{"CancelEnhancedLogCollection", "TriggerEnhancedLogCollection"}
}

var commands = sync.OnceValue(func() map[string]*Command {
	var list []Command
	if err := json.Unmarshal(commandsJSON, &list); err != nil {
		panic("schema: the embedded data cannot be read: " + err.Error()) // a test reads it
	}
	byType := make(map[string]*Command, len(list))
	for i := range list {
		byType[list[i].RequestType] = &list[i]
	}
	return byType
})

// Find returns the schema of a request type, or nil.
func Find(requestType string) *Command { return commands()[requestType] }

// RequestTypes lists the known request types in order.
func RequestTypes() []string {
	types := newer()
	for requestType := range commands() {
		types = append(types, requestType)
	}
	slices.Sort(types)
	return types
}

// Closest returns the word that somebody who wrote given most likely meant,
// and nothing if none is near.
func Closest(given string, words []string) string {
	if len(given) > 100 {
		return ""
	}
	low := strings.ToLower(given)
	best, distance := "", 1+len(given)/3
	for _, word := range words {
		switch d := edits(low, strings.ToLower(word)); {
		case d < distance:
			best, distance = word, d
		case len(low) >= 3 && best == "" && strings.HasPrefix(strings.ToLower(word), low):
			best = word
		}
	}
	return best
}

// edits is the number of letters to insert, delete, replace or swap that make
// b of a.
func edits(a, b string) int {
	before, last, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := range len(a) {
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			row[j+1] = min(last[j+1]+1, row[j]+1, last[j]+cost)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				row[j+1] = min(row[j+1], before[j-1]+1)
			}
		}
		before, last, row = last, row, before
	}
	return last[len(b)]
}
