package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// enrollment is the answer of the server for one.
type enrollment struct {
	ID                    string     `json:"id"`
	Type                  string     `json:"type"`
	DeviceID              string     `json:"device_id"`
	ParentID              string     `json:"parent_id"`
	Enabled               bool       `json:"enabled"`
	OperatorDisabled      bool       `json:"operator_disabled"`
	Topic                 string     `json:"topic"`
	UDID                  string     `json:"udid"`
	Serial                string     `json:"serial_number"`
	DeviceName            string     `json:"device_name"`
	Model                 string     `json:"model"`
	ModelName             string     `json:"model_name"`
	ProductName           string     `json:"product_name"`
	OSVersion             string     `json:"os_version"`
	BuildVersion          string     `json:"build_version"`
	Supervised            *bool      `json:"supervised"`
	FileVault             *bool      `json:"filevault"`
	IMEI                  string     `json:"imei"`
	MEID                  string     `json:"meid"`
	User                  *userInfo  `json:"user"`
	Tags                  []string   `json:"tags"`
	Tally                 int        `json:"token_update_tally"`
	AwaitingConfiguration bool       `json:"awaiting_configuration"`
	EnrolledAt            *time.Time `json:"enrolled_at"`
	CreatedAt             *time.Time `json:"created_at"`
	LastSeenAt            *time.Time `json:"last_seen_at"`
	RenewalUntil          *time.Time `json:"renewal_until"`
	HasBootstrapToken     bool       `json:"has_bootstrap_token"`
	HasUnlockToken        bool       `json:"has_unlock_token"`
	Certificate           *struct {
		SHA256   string     `json:"sha256"`
		Subject  string     `json:"subject"`
		NotAfter *time.Time `json:"not_after"`
		PinnedAt *time.Time `json:"pinned_at"`
	} `json:"certificate"`
	Push *struct {
		Owed        bool       `json:"owed"`
		Attempts    int        `json:"attempts"`
		LastAt      *time.Time `json:"last_at"`
		LastClass   string     `json:"last_class"`
		LastStatus  int        `json:"last_status"`
		LastReason  string     `json:"last_reason"`
		NextAt      *time.Time `json:"next_at"`
		TokenDeadAt *time.Time `json:"token_dead_at"`
	} `json:"push"`
	Queue *struct {
		Scheduled int        `json:"scheduled"`
		Queued    int        `json:"queued"`
		NotNow    int        `json:"notnow"`
		Head      *queueItem `json:"head"`
	} `json:"queue"`
	Inventory *inventory `json:"inventory"`
	Channels  []string   `json:"channels"`
	Diagnosis []string   `json:"diagnosis"`
}

type userInfo struct {
	ID        string `json:"user_id"`
	ShortName string `json:"short_name"`
	LongName  string `json:"long_name"`
}

// queueItem is a command in the queue of one enrollment.
type queueItem struct {
	EnrollmentID string     `json:"enrollment_id"`
	Serial       string     `json:"serial_number"`
	DeviceName   string     `json:"device_name"`
	CommandUUID  string     `json:"command_uuid"`
	RequestType  string     `json:"request_type"`
	State        string     `json:"state"`
	Priority     int        `json:"priority"`
	CreatedAt    *time.Time `json:"created_at"`
	NotBefore    *time.Time `json:"not_before"`
	ExpiresAt    *time.Time `json:"expires_at"`
	FinishedAt   *time.Time `json:"finished_at"`
	NotNowCount  int        `json:"notnow_count"`
	NotNowAt     *time.Time `json:"notnow_at"`
	SupersedeKey string     `json:"supersede_key"`
}

// label is how people know the device.
func (x *enrollment) label() string {
	var parts []string
	for _, part := range []string{x.DeviceName, x.Serial} {
		if part != "" {
			parts = append(parts, part)
		}
	}
	if x.User != nil && x.User.ShortName != "" {
		parts = append(parts, "user "+x.User.ShortName)
	}
	if len(parts) == 0 {
		return x.ID
	}
	return x.ID + " (" + strings.Join(parts, ", ") + ")"
}

func (x *enrollment) status() string {
	switch {
	case x.OperatorDisabled:
		return "disabled"
	case x.Enabled:
		return "enabled"
	}
	return "not enrolled"
}

func (x *enrollment) waiting() int {
	if x.Queue == nil {
		return 0
	}
	return x.Queue.Queued + x.Queue.NotNow + x.Queue.Scheduled
}

func enrollmentPath(id string, rest ...string) string {
	return "/v1/enrollments/" + strings.Join(append([]string{url.PathEscape(id)}, rest...), "/")
}

// enrollment looks one up by id or serial number.
func (e *env) enrollment(ctx context.Context, name string) (*enrollment, error) {
	x := new(enrollment)
	return x, naming(name, e.api.get(ctx, enrollmentPath(name), nil, x))
}

// naming puts the argument that was not found before the error.
func naming(argument string, err error) error {
	if exit := (*exitError)(nil); errors.As(err, &exit) && exit.code == exitNotFound {
		return &exitError{exitNotFound, fmt.Errorf("%s: %w", printable(argument), err)}
	}
	return err
}

// filter selects enrollments; the names are the server's.
type filter struct {
	enabled, waiting, fileVault, supervised    string
	kind, topic, serial, user, tag, model      string
	osVersion, osBelow, osFrom                 string
	pushStatus                                 string
	stale, certExpires                         age
	seenBefore, seenAfter, certificatesExpires moment
}

func (f *filter) flags(flags *flag.FlagSet) {
	flags.StringVar(&f.kind, "type", "", "enrollment `type`: Device, User, \"User Enrollment (Device)\", \"User Enrollment\" or \"Shared iPad\"")
	flags.StringVar(&f.enabled, "enabled", "", "`true or false`")
	flags.StringVar(&f.topic, "topic", "", "APNs `topic`")
	flags.StringVar(&f.serial, "serial", "", "serial `number`")
	flags.StringVar(&f.user, "user", "", "a user's short `name`")
	flags.StringVar(&f.tag, "tag", "", "a device's `tag`")
	flags.StringVar(&f.model, "model", "", "`model`, such as MacBookPro18,3")
	flags.StringVar(&f.osVersion, "os-version", "", "OS `version`, such as 15.1")
	flags.StringVar(&f.osBelow, "os-version-below", "", "OS older than this `version`")
	flags.StringVar(&f.osFrom, "os-version-from", "", "OS of this `version` or newer")
	flags.StringVar(&f.fileVault, "filevault", "", "`true or false`: whether FileVault is on, by the last answer to SecurityInfo")
	flags.StringVar(&f.supervised, "supervised", "", "`true or false`, by the last answer to DeviceInformation")
	flags.Var(&f.stale, "stale", "not seen for so long, such as `7d`")
	flags.Var(&f.seenBefore, "last-seen-before", "last seen before this `time`")
	flags.Var(&f.seenAfter, "last-seen-after", "last seen at this `time` or later")
	flags.StringVar(&f.waiting, "waiting", "", "`true or false`: whether commands wait")
	flags.StringVar(&f.pushStatus, "push-status", "", "what became of the last push: `owed`, unanswered, refused, token_dead, do_not_retry, our_fault, certificate_fault or retry_later")
	flags.Var(&f.certExpires, "certificate-expires-in", "device certificate expires within this time, such as `30d`")
	flags.Var(&f.certificatesExpires, "certificate-expires-before", "device certificate expires before this `time`")
}

// query is the filter as the server takes it; empty if nothing was asked for.
func (f *filter) query() url.Values {
	q := url.Values{}
	for name, value := range map[string]string{
		"type": f.kind, "enabled": f.enabled, "topic": f.topic, "serial": f.serial, "user": f.user, "tag": f.tag, "model": f.model,
		"os_version_below": f.osBelow, "os_version_from": f.osFrom, "filevault": f.fileVault, "supervised": f.supervised,
		"os_version": f.osVersion, "waiting": f.waiting, "push_status": f.pushStatus,
	} {
		if value != "" {
			q.Set(name, value)
		}
	}
	before, expires := f.seenBefore, f.certificatesExpires
	if f.stale > 0 {
		before.Time = time.Now().Add(-time.Duration(f.stale))
	}
	if f.certExpires > 0 {
		expires.Time = time.Now().Add(time.Duration(f.certExpires))
	}
	before.set(q, "last_seen_before")
	f.seenAfter.set(q, "last_seen_after")
	expires.set(q, "certificate_expires_before")
	return q
}

// handle is what people name the device by.
func (x *enrollment) handle() string {
	if x.Serial != "" {
		return x.Serial
	}
	return x.ID
}

// name is the device's, or the user's of a user channel.
func (x *enrollment) name() string {
	if x.User != nil && x.User.ShortName != "" {
		return x.User.ShortName
	}
	return x.DeviceName
}

var enrollmentColumns = []column[enrollment]{
	{heading: "SERIAL", cell: (*enrollment).handle, clip: true},
	{heading: "NAME", cell: (*enrollment).name, clip: true},
	{heading: "STATUS", cell: (*enrollment).status, tone: toneOf},
	{heading: "OS", cell: func(x *enrollment) string { return x.OSVersion }},
	{heading: "LAST SEEN", cell: func(x *enrollment) string { return ago(x.LastSeenAt) }},
	{heading: "WAITING", cell: func(x *enrollment) string { return strconv.Itoa(x.waiting()) }},
	{heading: "PUSH", cell: (*enrollment).pushed, clip: true, tone: toneOf},
	{heading: "MODEL", cell: func(x *enrollment) string { return x.Model }, wide: true},
	{heading: "FILEVAULT", cell: func(x *enrollment) string { return is(x.FileVault, "on", "off") }, wide: true},
	{heading: "TAGS", cell: func(x *enrollment) string { return strings.Join(x.Tags, ",") }, wide: true},
	{heading: "TYPE", cell: func(x *enrollment) string { return x.Type }, wide: true},
	{heading: "ID", cell: func(x *enrollment) string { return x.ID }, wide: true},
}

func enrollmentsLsCommand() command {
	return command{
		name:    "enrollments ls",
		short:   "List enrollments, all of them or those that filters select",
		example: "nanoctl enrollments ls -stale 7d\nnanoctl enrollments ls -waiting true -push-status token_dead -o json",
		prepare: func(flags *flag.FlagSet) runner {
			var f filter
			f.flags(flags)
			limit := flags.Int("limit", 0, "list no more than this many; 0 is all")
			return func(ctx context.Context, e *env, args []string) error {
				return showList(ctx, e, "/v1/enrollments", "enrollments", f.query(), *limit, enrollmentColumns)
			}
		},
	}
}

func showCommand() command {
	return command{
		name: "show", args: "ID|SERIAL",
		short:   "Show all about one enrollment, and why it is stuck if it is",
		example: "nanoctl show C02XK0AAJG5H",
		prepare: func(*flag.FlagSet) runner {
			return func(ctx context.Context, e *env, args []string) error {
				a, err := e.api.do(ctx, http.MethodGet, enrollmentPath(args[0]), nil, nil)
				err = naming(args[0], err)
				var x enrollment
				return e.printAnswer(a, err, &x, func() error { return e.showEnrollment(&x) })
			}
		},
	}
}

func (e *env) showEnrollment(x *enrollment) error {
	verdict, color := x.verdict()
	if _, err := fmt.Fprintf(e.out, "%s: %s\n\n", printable(x.handle()), e.paint(color, printable(verdict))); err != nil {
		return err
	}
	rows := [][2]string{
		{"id", x.ID}, {"type", x.Type}, {"device", unlessEqual(x.DeviceID, x.ID)}, {"status", x.status()}, {"serial number", x.Serial},
		{"name", x.DeviceName}, {"model", joined(x.Model, x.ModelName, x.ProductName)}, {"OS", joined(x.OSVersion, x.BuildVersion)},
		{"IMEI", x.IMEI}, {"MEID", x.MEID}, {"tags", joined(x.Tags...)}, {"topic", x.Topic},
	}
	if x.User != nil {
		rows = append(rows, [2]string{"user", joined(x.User.ShortName, x.User.LongName)})
	}
	rows = append(rows,
		[2]string{"enrolled", stamp(x.EnrolledAt)}, [2]string{"last seen", stamp(x.LastSeenAt)},
		[2]string{"token updates", strconv.Itoa(x.Tally)}, [2]string{"renewal window until", stamp(x.RenewalUntil)})
	if x.AwaitingConfiguration {
		rows = append(rows, [2]string{"awaiting configuration", "yes"})
	}
	rows = append(rows, x.Inventory.rows()...)
	if c := x.Certificate; c != nil {
		rows = append(rows, [2]string{"certificate", joined(c.Subject, "SHA-256 "+c.SHA256)}, [2]string{"certificate expires", stamp(c.NotAfter)})
	}
	rows = append(rows, [2]string{"tokens kept", joined(wordIf(x.HasBootstrapToken, "bootstrap"), wordIf(x.HasUnlockToken, "unlock"))})
	if p := x.Push; p != nil {
		rows = append(rows, [2]string{"last push", joined(stamp(p.LastAt), x.pushed())},
			[2]string{"push owed", wordIf(p.Owed, "yes")}, [2]string{"next push", stamp(p.NextAt)}, [2]string{"push token dead since", stamp(p.TokenDeadAt)})
	}
	if q := x.Queue; q != nil {
		rows = append(rows, [2]string{"queue", fmt.Sprintf("%d queued, %d answered NotNow, %d scheduled", q.Queued, q.NotNow, q.Scheduled)})
		if h := q.Head; h != nil {
			head := joined(h.RequestType+" "+h.CommandUUID, h.State)
			if h.NotNowCount > 0 {
				head += fmt.Sprintf(", answered NotNow %d times", h.NotNowCount)
			}
			rows = append(rows, [2]string{"head of the queue", head})
		}
	}
	rows = append(rows, [2]string{"user channels", joined(x.Channels...)})
	if err := e.pairs(rows); err != nil {
		return err
	}
	for i, sentence := range x.Diagnosis {
		if i == 0 {
			fmt.Fprintln(e.out)
		}
		for _, line := range e.wrap(printable(sentence), 0) {
			fmt.Fprintln(e.out, line)
		}
	}
	return nil
}

// other is a if it says something that b does not.
func unlessEqual(a, b string) string {
	if a == b {
		return ""
	}
	return a
}

func wordIf(is bool, word string) string {
	if is {
		return word
	}
	return ""
}

// joined is what there is of the parts, each once.
func joined(parts ...string) string {
	var there []string
	for _, part := range parts {
		if part != "" && !slices.Contains(there, part) {
			there = append(there, part)
		}
	}
	return strings.Join(there, ", ")
}

// stateText is the state, with how often the device put the command off.
func (q *queueItem) stateText() string {
	if q.State == "notnow" && q.NotNowCount > 1 {
		return fmt.Sprintf("notnow (%d times)", q.NotNowCount)
	}
	return q.State
}

var queueColumns = []column[queueItem]{
	{heading: "REQUEST TYPE", cell: func(q *queueItem) string { return q.RequestType }, clip: true},
	{heading: "STATE", cell: (*queueItem).stateText, tone: toneOf},
	{heading: "QUEUED", cell: func(q *queueItem) string { return ago(q.CreatedAt) }},
	{heading: "COMMAND", cell: func(q *queueItem) string { return q.CommandUUID }},
	{heading: "EXPIRES", cell: func(q *queueItem) string { return agoOrEmpty(q.ExpiresAt) }, wide: true},
}

func agoOrEmpty(t *time.Time) string {
	if t == nil {
		return ""
	}
	return ago(t)
}

func queueCommand() command {
	return command{
		name: "queue", args: "ID|SERIAL",
		short:   "List what waits for an enrollment, in delivery order",
		example: "nanoctl queue C02XK0AAJG5H\nnanoctl queue C02XK0AAJG5H -state error",
		prepare: func(flags *flag.FlagSet) runner {
			state := flags.String("state", "", "list commands in this `state` instead, such as acknowledged, error or cancelled")
			limit := flags.Int("limit", 0, "list no more than this many; 0 is all")
			return func(ctx context.Context, e *env, args []string) error {
				x, err := e.enrollment(ctx, args[0])
				if err != nil {
					return err
				}
				states := []string{*state}
				if *state == "" {
					states = append(states, "scheduled") // which waits, too, and comes later
				}
				t := &table[queueItem]{e: e, field: "queue", columns: queueColumns}
				for _, state := range states {
					q := url.Values{}
					if state != "" {
						q.Set("state", state)
					}
					if *limit > 0 && t.printed == *limit {
						break
					}
					if err := e.pages(ctx, enrollmentPath(x.ID, "queue"), "queue", q, max(0, *limit-t.printed), t.add); err != nil {
						return err
					}
				}
				return t.end()
			}
		},
	}
}

func clearCommand() command {
	return command{
		name: "clear", args: "ID|SERIAL",
		short:   "Cancel all that waits for an enrollment",
		example: "nanoctl clear C02XK0AAJG5H",
		prepare: func(*flag.FlagSet) runner {
			return func(ctx context.Context, e *env, args []string) error {
				x, err := e.enrollment(ctx, args[0])
				if err != nil {
					return err
				}
				if err := e.confirm("This cancels the %d commands that wait for %s.", x.waiting(), printable(x.label())); err != nil {
					return err
				}
				a, err := e.api.do(ctx, http.MethodDelete, enrollmentPath(x.ID, "queue"), nil, nil)
				var done struct{ Cancelled int }
				return e.printSentence(a, err, &done, func() string { return fmt.Sprintf("cancelled %d commands", done.Cancelled) })
			}
		},
	}
}

// printAnswer prints an answer, which came with an error or not: as it is for
// programs, and otherwise as print does it once it is decoded into into, if
// that is not nil.
func (e *env) printAnswer(a *answer, err error, into any, print func() error) error {
	if err != nil {
		return err
	}
	if e.format == "json" {
		return e.json(a.body)
	}
	if into != nil {
		if err := a.decode(into); err != nil {
			return err
		}
	}
	return print()
}

// printSentence is printAnswer with a sentence.
func (e *env) printSentence(a *answer, err error, into any, sentence func() string) error {
	return e.printAnswer(a, err, into, func() error {
		_, err := fmt.Fprintln(e.out, printable(sentence()))
		return err
	})
}

func disableCommand() command {
	return switchCommand("disable", "Keep commands and pushes from an enrollment until enable", "is disabled")
}

func enableCommand() command {
	return switchCommand("enable", "Undo disable", "is enabled")
}

// switchCommand is disable or enable.
func switchCommand(name, short, done string) command {
	return command{
		name: name, args: "ID|SERIAL", short: short, example: "nanoctl " + name + " C02XK0AAJG5H",
		prepare: func(*flag.FlagSet) runner {
			return func(ctx context.Context, e *env, args []string) error {
				x, err := e.enrollment(ctx, args[0])
				if err != nil {
					return err
				}
				a, err := e.api.do(ctx, http.MethodPost, enrollmentPath(x.ID, name), nil, nil)
				return e.printSentence(a, err, nil, func() string { return x.label() + " " + done })
			}
		},
	}
}

func deleteCommand() command {
	return command{
		name: "delete", args: "[ID|SERIAL...]",
		short: "Delete enrollments with all that the server has of them",
		long: `A device stays enrolled on its side; the server no longer knows it. The serial number has to be
typed, or for several devices the word delete and their number; -confirm gives that in a script.`,
		example: "nanoctl delete C02XK0AAJG5H\nnanoctl delete -enabled false -stale 365d",
		prepare: func(flags *flag.FlagSet) runner {
			var to targets
			to.flags(flags)
			return func(ctx context.Context, e *env, args []string) error {
				chosen, err := to.resolve(ctx, e, args)
				if err != nil {
					return err
				}
				if err := e.confirmTyped("delete", "All that is known is deleted of", chosen); err != nil {
					return err
				}
				return e.changeEach(ctx, chosen, "deleted", func(ctx context.Context, x *enrollment) error {
					_, err := e.api.do(ctx, http.MethodDelete, enrollmentPath(x.ID), url.Values{"confirm": {x.ID}}, nil)
					return err
				})
			}
		},
	}
}

func renewalOpenCommand() command {
	return command{
		name: "renewal open", args: "[ID|SERIAL...]",
		short:   "Let an identity be renewed without losing queue and tokens",
		long:    "While it is open an Authenticate keeps the queue, the bootstrap token and the user channels.",
		example: "nanoctl renewal open -for 24h C02XK0AAJG5H\nnanoctl renewal open -for 7d -certificate-expires-in 30d",
		prepare: func(flags *flag.FlagSet) runner {
			var to targets
			to.flags(flags)
			long := age(24 * time.Hour)
			flags.Var(&long, "for", "how `long` it stays open")
			return func(ctx context.Context, e *env, args []string) error {
				chosen, err := to.resolve(ctx, e, args)
				if err != nil {
					return err
				}
				if err := e.confirmMany(len(chosen), "A renewal window is opened for"); err != nil {
					return err
				}
				until := time.Now().Add(time.Duration(long)).UTC().Truncate(time.Second)
				return e.eachChunk(ctx, "opening", chosen, func(ctx context.Context, ids []string) error {
					_, err := e.api.do(ctx, http.MethodPut, "/v1/renewals", nil, map[string]any{"ids": ids, "until": until})
					return err
				}, func(n int) error {
					if e.format == "json" {
						return e.json(map[string]any{"opened": n, "until": until})
					}
					_, err := fmt.Fprintf(e.out, "%d renewal windows are open until %s\n", n, until.Local().Format(time.DateTime))
					return err
				})
			}
		},
	}
}

func renewalCloseCommand() command {
	return command{
		name: "renewal close", args: "ID|SERIAL",
		short: "Close a renewal window", example: "nanoctl renewal close C02XK0AAJG5H",
		prepare: func(*flag.FlagSet) runner {
			return func(ctx context.Context, e *env, args []string) error {
				x, err := e.enrollment(ctx, args[0])
				if err != nil {
					return err
				}
				a, err := e.api.do(ctx, http.MethodDelete, enrollmentPath(x.ID, "renewal"), nil, nil)
				return e.printSentence(a, err, nil, func() string { return "the renewal window of " + x.label() + " is closed" })
			}
		},
	}
}

func bootstrapTokenCommand() command {
	return tokenCommand("bootstrap-token", "bootstrap_token", "Print the bootstrap token that a Mac escrowed",
		"It authorises software updates, erasing and more on that Mac: a secret.")
}

func unlockTokenCommand() command {
	return tokenCommand("unlock-token", "unlock_token", "Print the unlock token of an iPhone or iPad",
		"ClearPasscode needs it: nanoctl send ClearPasscode -data UnlockToken=FILE. A secret.")
}

// tokenCommand prints a secret of an enrollment.
func tokenCommand(name, endpoint, short, long string) command {
	return command{
		name: name, args: "ID|SERIAL", short: short, long: long + " The server writes down who asked.",
		example: "nanoctl " + name + " C02XK0AAJG5H",
		prepare: func(flags *flag.FlagSet) runner {
			raw := flags.Bool("raw", false, "the bytes themselves instead of base64")
			return func(ctx context.Context, e *env, args []string) error {
				x, err := e.enrollment(ctx, args[0])
				if err != nil {
					return err
				}
				a, err := e.api.do(ctx, http.MethodPost, enrollmentPath(x.ID, endpoint), nil, nil)
				var tokens map[string]json.RawMessage
				return e.printAnswer(a, err, &tokens, func() error {
					var token []byte
					if err := json.Unmarshal(tokens[endpoint], &token); err != nil {
						return fmt.Errorf("the server's answer has no token: %w", err)
					}
					if *raw {
						return e.bytes(token)
					}
					_, err := fmt.Fprintln(e.out, base64.StdEncoding.EncodeToString(token))
					return err
				})
			}
		},
	}
}
