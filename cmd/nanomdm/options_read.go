package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/nanomdm/nanomdm/http/httpmdm"
	"github.com/nanomdm/nanomdm/storage/sqldb"
	"github.com/nanomdm/nanomdm/textinput"
)

// mistakes is a bad configuration. Each element says what to change.
type mistakes []string

func (m mistakes) Error() string {
	if len(m) == 1 {
		return "configuration: " + m[0]
	}
	return fmt.Sprintf("configuration: %d mistakes:\n  %s", len(m), strings.Join(m, "\n  "))
}

// given is an option's value and where it came from.
type given struct {
	text   string
	label  string // -listen or NANOMDM_LISTEN
	onLine bool   // on the command line
}

// configuration is one reading of the command line and the environment.
type configuration struct {
	stat     func(string) (fs.FileInfo, error)
	flags    map[string][]string
	environ  map[string]string
	mistakes mistakes
	warnings []string
}

// parseOptions reads the configuration from the command line and the
// environment ("NAME=value" strings) and looks files up with stat. The warnings
// are for the log. The error is flag.ErrHelp when help was asked for, else one
// that names all mistakes; it never shows a secret. When -version was given
// nothing is checked.
func parseOptions(args, environ []string, stat func(string) (fs.FileInfo, error)) (options, []string, error) {
	var o options
	table := o.table()
	c := &configuration{stat: stat}
	c.readFlags(table, args)
	for _, op := range table {
		if op.flagOnly {
			c.resolve(&op)
		}
	}
	switch {
	case o.help:
		return o, nil, flag.ErrHelp
	case o.version:
		return o, nil, nil
	}
	c.readEnviron(table, environ)
	for _, op := range table {
		if !op.flagOnly {
			c.resolve(&op)
		}
	}
	c.checkListening(&o)
	c.checkStorage(&o)
	c.checkDSN(&o)
	c.checkRoles(&o)
	if len(c.mistakes) > 0 {
		return o, c.warnings, c.mistakes
	}
	return o, c.warnings, nil
}

func (c *configuration) mistake(format string, args ...any) {
	c.mistakes = append(c.mistakes, fmt.Sprintf(format, args...))
}

func (c *configuration) warn(format string, args ...any) {
	c.warnings = append(c.warnings, fmt.Sprintf(format, args...))
}

// rawFlag collects a flag's values unparsed, so that a bad one does not keep
// the flag package from reading on.
type rawFlag struct {
	values   *[]string
	isSwitch bool
}

func (f rawFlag) String() string     { return "" }
func (f rawFlag) IsBoolFlag() bool   { return f.isSwitch }
func (f rawFlag) Set(v string) error { *f.values = append(*f.values, v); return nil }

func (c *configuration) readFlags(table []option, args []string) {
	set := flag.NewFlagSet("nanomdm", flag.ContinueOnError)
	set.SetOutput(io.Discard)
	raw := make(map[string]*[]string)
	for _, op := range table {
		for _, name := range op.names() {
			raw[name] = new([]string)
			set.Var(rawFlag{values: raw[name], isSwitch: op.isSwitch()}, name, "")
		}
	}
	known := names(table, func(name string) string { return name })
	for {
		before := args
		err := set.Parse(args)
		args = set.Args()
		switch {
		case errors.Is(err, flag.ErrHelp): // -h; -help is in the table
			*raw["help"] = append(*raw["help"], "true")
			continue
		case err == nil && len(args) == 0:
			c.flags = make(map[string][]string, len(raw))
			for name, values := range raw {
				c.flags[name] = *values
			}
			return
		case err == nil:
			c.mistake("%q is not an option: remove it", args[0])
			args = args[1:]
			continue
		case len(args) > 0 && malformed(args[0]): // Parse stops before it
			c.mistake("%q is not an option: remove it", args[0])
			args = args[1:]
			continue
		}
		bad := before[len(before)-len(args)-1]
		name, _, hasValue := strings.Cut(strings.TrimLeft(bad, "-"), "=")
		if raw[name] != nil {
			c.mistake("-%s: give it a value", name)
			continue
		}
		c.mistake("-%s is not an option: did you mean -%s? (-help lists all)", name, nearest(name, known))
		if !hasValue && len(args) > 0 && !strings.HasPrefix(args[0], "-") {
			args = args[1:] // most likely its value
		}
	}
}

// malformed says whether package flag takes an argument for a flag without a
// name.
func malformed(arg string) bool {
	name, isFlag := strings.CutPrefix(arg, "-")
	name = strings.TrimPrefix(name, "-")
	return isFlag && name != "" && (name[0] == '-' || name[0] == '=')
}

// notOurs are names under our prefix that others set: the tests' servers, what
// Kubernetes adds for a service called nanomdm, and NanoMDM's -version, which
// it does not read from the environment either.
var notOurs = regexp.MustCompile(`^NANOMDM_(\w*STORAGE_TEST_DSN|SERVICE_(HOST|PORT)\w*|PORT(_\d+_\w+)?|VERSION)$`)

func (c *configuration) readEnviron(table []option, environ []string) {
	c.environ = make(map[string]string)
	known := names(slices.DeleteFunc(slices.Clone(table), func(op option) bool { return op.flagOnly }), envName)
	for _, pair := range environ {
		name, value, _ := strings.Cut(pair, "=")
		switch {
		case !strings.HasPrefix(name, envPrefix), notOurs.MatchString(name):
		case slices.Contains(known, name):
			c.environ[name] = value
		default:
			c.warn("%s in the environment is not an option and is ignored: did you mean %s?", name, nearest(name, known))
		}
	}
	slices.Sort(c.warnings)
}

// given returns the value of a flag name. An empty variable counts as not
// given: compose files and unit files leave an option out that way.
func (c *configuration) given(name string) (given, bool) {
	if values := c.flags[name]; len(values) > 0 {
		return given{textinput.Value([]byte(values[len(values)-1])), "-" + name, true}, true
	}
	if value := textinput.Value([]byte(c.environ[envName(name)])); value != "" {
		return given{value, envName(name), false}, true
	}
	return given{}, false
}

// isGiven says whether a flag name has a value that is not empty.
func (c *configuration) isGiven(name string) bool {
	g, _ := c.given(name)
	return g.text != ""
}

// resolve finds an option's value and sets it.
func (c *configuration) resolve(op *option) {
	g, ok := c.given(op.name)
	if op.secret {
		if g, ok = c.resolveSecret(op, g, ok); ok {
			if why := textinput.Suspicious(g.text); why != "" {
				c.warn("the value of %s %s: is that meant?", g.label, why)
			}
		}
	}
	if !ok {
		if op.def == "" {
			return
		}
		g = given{text: op.def, label: "-" + op.name}
	}
	if op.file && g.text != "" {
		if info, err := c.stat(g.text); err != nil || info.IsDir() {
			c.mistake("%s: no such file: %s", g.label, g.text)
			return
		}
		if op.private {
			c.checkPrivate(g)
		}
	}
	if err := op.set(g.text); err != nil {
		c.mistake("%s: %v", g.label, err)
	}
}

func (c *configuration) resolveSecret(op *option, inline given, ok bool) (given, bool) {
	if op.oldName != "" { // its file form belongs to the new name
		return inline, ok
	}
	file, inFile := c.given(op.fileFlag())
	switch {
	case ok && inFile:
		c.mistake("%s and %s are both given: keep one", inline.label, file.label)
		return given{}, false
	case !inFile:
		if ok && inline.onLine && op.name != "storage-dsn" {
			c.warnOnLine(op, inline)
		}
		return inline, ok
	}
	text, err := os.ReadFile(file.text)
	if err != nil {
		c.mistake("%s: %v", file.label, err)
		return given{}, false
	}
	c.checkPrivate(file)
	value := textinput.Value(text)
	if value == "" {
		c.mistake("%s: %s is empty: write the value into it", file.label, file.text)
		return given{}, false
	}
	return given{text: value, label: file.label}, true
}

// checkPrivate warns of a file with keys that every user of the machine can
// read. It is no mistake: Kubernetes mounts secrets so unless told otherwise.
func (c *configuration) checkPrivate(file given) {
	if info, err := c.stat(file.text); err == nil && info.Mode().Perm()&0o004 != 0 {
		c.warn("%s: every user can read %s: chmod it to 600, or in Kubernetes set the volume's defaultMode to 0400", file.label, file.text)
	}
}

func (c *configuration) warnOnLine(op *option, g given) {
	c.warn("%s on the command line shows in the list of processes: use -%s or %s",
		g.label, op.fileFlag(), envName(op.fileFlag()))
}

func (c *configuration) checkListening(o *options) {
	cert, key := c.isGiven("tls-cert"), c.isGiven("tls-key")
	switch {
	case cert && !key:
		c.mistake("-tls-cert needs the key too: give -tls-key")
	case key && !cert:
		c.mistake("-tls-key needs the certificate too: give -tls-cert")
	}
	if o.tlsClientAuth && !cert {
		c.mistake("-tls-client-auth needs TLS: give -tls-cert and -tls-key")
	}
	if o.tlsClientAuth && o.certHeader != "" {
		c.mistake("-tls-client-auth and -cert-header are two ways to identify a device: keep one")
	}
	if o.maxBody > 0 && o.maxInFlight > 0 && o.maxInFlight < httpmdm.LeastInFlight*o.maxBody {
		c.mistake("-max-in-flight is smaller than %d times -max-body: it counts the copies of a body, too", httpmdm.LeastInFlight)
	}
}

func (c *configuration) checkRoles(o *options) {
	for _, topic := range slices.Sorted(maps.Keys(o.topicCAs)) {
		if info, err := c.stat(o.topicCAs[topic]); err != nil || info.IsDir() {
			c.mistake("-topic-ca: no such file: %s", o.topicCAs[topic])
		}
	}
	if o.disableMDM && len(o.topicCAs) > 0 {
		c.warn("-topic-ca does nothing with -disable-mdm")
	}
	if why := weakness(string(o.api)); why != "" {
		c.warn("the key of -api can be guessed, %s: make one with openssl rand -base64 32", why)
	}
	apiGiven := c.isGiven("api-file") || o.api != ""
	if !o.disableMDM && !c.isGiven("ca") {
		c.mistake("-ca: name the PEM file of the CAs that issue device identities (or give -disable-mdm)")
	}
	if o.disableMDM && !apiGiven {
		c.mistake("-disable-mdm without -api leaves nothing to do: give -api, or remove -disable-mdm")
	}
	if o.apiListen != "" && !apiGiven {
		c.mistake("-api-listen needs the API: give -api")
	}
	if o.migration && !apiGiven {
		c.mistake("-migration needs the API: give -api")
	}
	if !c.isGiven("dm") && (o.dmSendHMACKey != "" || o.dmRecvHMACKey != "") {
		c.warn("-dm-send-hmac-key and -dm-recv-hmac-key do nothing without -dm")
	}
	if o.authenticateKey != "" && !c.isGiven("authenticate-url") {
		c.warn("-authenticate-key does nothing without -authenticate-url")
	}
	if o.mirrorKey != "" && !c.isGiven("mirror-url") {
		c.warn("-mirror-key does nothing without -mirror-url")
	}
	if o.webhookHMACKey != "" && !c.isGiven("webhook-url") {
		c.warn("-webhook-hmac-key does nothing without -webhook-url")
	}
	if c.isGiven("webhook-old-key") && !c.isGiven("webhook-hmac-key") && !c.isGiven("webhook-hmac-key-file") {
		c.mistake("-webhook-old-key is a second key: give -webhook-hmac-key, too")
	}
	if o.retainEvents > 0 && o.retainEvents < o.webhookMaxAge {
		c.mistake("-retain-events is shorter than -webhook-max-age: make it at least as long")
	}
}

func (c *configuration) checkStorage(o *options) {
	if o.sealCommands && o.sealKeyFile == "" {
		c.mistake("-seal-commands needs keys: give -seal-key-file")
	}
	for _, name := range []string{"storage", "storage-dsn", "dsn", "storage-options"} {
		if len(c.flags[name]) > 1 {
			c.mistake("-%s is given %d times: this daemon writes to one store, keep one", name, len(c.flags[name]))
		}
	}
	dsn, byNewName := c.given("storage-dsn")
	byFile := c.isGiven("storage-dsn-file")
	old, byOldName := c.given("dsn")
	if byOldName && (byNewName || byFile) {
		c.mistake("-dsn is the old name of -storage-dsn, and both are given: keep -storage-dsn")
	}
	if !c.isGiven("storage") && !byNewName && !byOldName && !byFile {
		c.checkLeftBehind()
	}
	switch o.storage {
	case "sqlite":
		if o.storageDSN == "" && !byFile {
			o.storageDSN = sqliteFile
		}
		if o.storageCA != "" {
			c.warn("-storage-ca does nothing with -storage sqlite")
		}
	case "pgsql", "mysql":
		if o.storageDSN == "" && !byFile {
			c.mistake("-storage %s needs to know the database: give -storage-dsn or -storage-dsn-file", o.storage)
		}
		for _, g := range []given{dsn, old} {
			if g.onLine {
				c.warnOnLine(&option{name: "storage-dsn"}, g)
			}
		}
	}
}

// checkDSN finds names that no database can be opened with, so that the daemon
// does not wait for a server.
func (c *configuration) checkDSN(o *options) {
	if o.storage == "" || o.storageDSN == "" {
		return
	}
	if err := sqldb.CheckDSN(o.storage, string(o.storageDSN)); err != nil {
		c.mistake("-storage-dsn: %v", err)
		return
	}
	if o.storage != "sqlite" {
		return
	}
	name := sqldb.SQLiteFile(string(o.storageDSN))
	if name == "" {
		return // in memory
	}
	if info, err := c.stat(name); err == nil && info.IsDir() {
		c.mistake("-storage-dsn: %s is a directory: name a file in it, such as %s", name, filepath.Join(name, sqliteFile))
	}
	dir := filepath.Dir(name)
	if info, err := c.stat(dir); errors.Is(err, fs.ErrNotExist) || err == nil && !info.IsDir() {
		c.mistake("-storage-dsn: the folder %s does not exist: make it first, for the user that the daemon runs as", dir)
	}
}

const sqliteFile = "nanomdm.db"

// checkLeftBehind keeps a first start in a directory of NanoMDM's, where the
// file store was the default, from coming up with an empty database.
func (c *configuration) checkLeftBehind() {
	if _, err := c.stat(sqliteFile); err == nil {
		return
	}
	for _, dir := range []string{"dbkv", "db"} {
		if info, err := c.stat(dir); err == nil && info.IsDir() {
			c.mistake("the directory %s looks like NanoMDM's file store, which this daemon does not read: "+
				"give -storage sqlite (or pgsql, mysql) to start with a database, and %s", dir, howToMove)
		}
	}
}

const howToMove = "bring the enrollments with nano2nano (docs/upgrading.md)"

func names(table []option, form func(string) string) []string {
	var list []string
	for i := range table {
		for _, name := range table[i].names() {
			list = append(list, form(name))
		}
	}
	return list
}

// nearest returns the candidate with the smallest edit distance to name.
func nearest(name string, candidates []string) string {
	best, least := "", math.MaxInt
	for _, candidate := range candidates {
		if d := distance(name, candidate); d < least {
			best, least = candidate, d
		}
	}
	return best
}

// distance is the number of bytes to insert, remove or change to get from a to b.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
