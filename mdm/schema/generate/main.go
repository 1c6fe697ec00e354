// Command generate makes commands.json of Apple's schemas of MDM commands.
//
// Usage: generate -schemas FOLDER -out FOLDER
//
// The folder with the schemas is the mdm folder of a checkout of
// github.com/apple/device-management, or any other that has commands/*.yaml
// and LICENSE.txt. The licence is copied, since Apple asks for that.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/nanomdm/nanomdm/mdm/schema"
)

func main() {
	schemas := flag.String("schemas", "", "`folder` with commands/*.yaml and LICENSE.txt")
	out := flag.String("out", ".", "`folder` that commands.json and LICENSE-APPLE.txt are written to")
	flag.Parse()
	if err := run(*schemas, *out); err != nil {
		fmt.Fprintln(os.Stderr, "generate:", err)
		os.Exit(1)
	}
}

func run(schemas, out string) error {
	if schemas == "" {
		return errors.New("-schemas is missing")
	}
	licence, err := os.ReadFile(filepath.Join(schemas, "LICENSE.txt"))
	if err != nil {
		return err
	}
	files, err := filepath.Glob(filepath.Join(schemas, "commands", "*.yaml"))
	if err != nil {
		return err
	}
	if len(files) == 0 {
		return fmt.Errorf("%s has no commands/*.yaml", schemas)
	}
	var commands []schema.Command
	for _, file := range files {
		c, err := readCommand(file)
		if err != nil {
			return fmt.Errorf("%s: %w", filepath.Base(file), err)
		}
		commands = append(commands, *c)
	}
	slices.SortFunc(commands, func(a, b schema.Command) int { return strings.Compare(a.RequestType, b.RequestType) })
	data, err := encode(commands)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(out, "commands.json"), data, 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(out, "LICENSE-APPLE.txt"), licence, 0o644)
}

// encode puts each command on a line of its own, so that changes can be read.
func encode(commands []schema.Command) ([]byte, error) {
	var b bytes.Buffer
	b.WriteString("[\n")
	for i := range commands {
		line, err := json.Marshal(&commands[i])
		if err != nil {
			return nil, err
		}
		b.Write(line)
		if i < len(commands)-1 {
			b.WriteByte(',')
		}
		b.WriteByte('\n')
	}
	b.WriteString("]\n")
	return b.Bytes(), nil
}

// The parts of Apple's files that are used.

type file struct {
	Payload struct {
		RequestType string               `yaml:"requesttype"`
		SupportedOS map[string]supported `yaml:"supportedOS"`
	} `yaml:"payload"`
	PayloadKeys []key `yaml:"payloadkeys"`
}

type supported struct {
	Introduced     string `yaml:"introduced"`
	Removed        string `yaml:"removed"`
	DeviceChannel  *bool  `yaml:"devicechannel"`
	UserChannel    *bool  `yaml:"userchannel"`
	UserEnrollment struct {
		Mode string `yaml:"mode"`
	} `yaml:"userenrollment"`
	SharedIPad struct {
		UserChannel *bool `yaml:"userchannel"`
	} `yaml:"sharedipad"`
}

type key struct {
	Key       string `yaml:"key"`
	Type      string `yaml:"type"`
	Presence  string `yaml:"presence"`
	RangeList []any  `yaml:"rangelist"`
	SubKeys   []key  `yaml:"subkeys"`
}

func readCommand(name string) (*schema.Command, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	var f file
	if err := yaml.Unmarshal(text, &f); err != nil {
		return nil, err
	}
	if f.Payload.RequestType == "" {
		return nil, errors.New("payload.requesttype is missing")
	}
	c := &schema.Command{RequestType: f.Payload.RequestType, Platforms: make(map[string]schema.Support)}
	for platform, s := range f.Payload.SupportedOS {
		c.Platforms[platform] = support(&s)
	}
	c.Keys, err = keys(f.PayloadKeys)
	return c, err
}

// notAvailable is how Apple writes that a platform does not have something.
const notAvailable = "n/a"

func support(s *supported) schema.Support {
	if s.Introduced == notAvailable {
		return schema.Support{Never: true}
	}
	isFalse := func(b *bool) bool { return b != nil && !*b }
	return schema.Support{
		Introduced: s.Introduced, Removed: s.Removed,
		NoDeviceChannel:  isFalse(s.DeviceChannel),
		NoUserChannel:    isFalse(s.UserChannel) || isFalse(s.SharedIPad.UserChannel),
		NoUserEnrollment: s.UserEnrollment.Mode == "forbidden",
	}
}

func keys(list []key) ([]schema.Key, error) {
	var out []schema.Key
	for _, k := range list {
		converted, err := convert(&k)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", k.Key, err)
		}
		out = append(out, *converted)
	}
	return out, nil
}

func convert(k *key) (*schema.Key, error) {
	kind := schema.Kind(strings.Trim(k.Type, "<>"))
	if !slices.Contains(schema.Kinds(), kind) {
		return nil, fmt.Errorf("the type %q is not known", k.Type)
	}
	out := &schema.Key{Name: k.Key, Kind: kind, Required: k.Presence == "required"}
	for _, value := range k.RangeList {
		out.Values = append(out.Values, fmt.Sprint(value))
	}
	// The subkeys of a string are the texts that it may be.
	if kind == schema.String {
		for _, sub := range k.SubKeys {
			out.Values = append(out.Values, sub.Key)
		}
		return out, nil
	}
	var err error
	out.Keys, err = keys(k.SubKeys)
	return out, err
}
