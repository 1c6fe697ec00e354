package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/groob/plist"
	"github.com/nanomdm/nanomdm/mdm/mdmtest"
)

const demoTimeout = 30 * time.Second

func runDemo(ctx context.Context, s streams, args []string) error {
	flags := newFlags(s, "demo", "-nanomdm PATH", `
Starts a server of its own on a free port, with an SQLite file and a CA made for
the occasion in a temporary directory, enrolls a Mac with a user, an iPhone and
an iPad, queues commands through the HTTP API, lets the devices fetch and answer
them, shows the outcome, stops the server and removes everything.`)
	program := flags.String("nanomdm", "./bin/nanomdm", "`path` of the server program")
	if err := parse(s, flags, args); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, demoTimeout)
	defer cancel()
	dir, err := os.MkdirTemp("", "mdmsim-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	return demonstrate(ctx, s.out, *program, dir)
}

// demonstrate runs the demonstration in dir and checks each step of it.
func demonstrate(ctx context.Context, out io.Writer, program, dir string) (err error) {
	ca, err := mdmtest.NewCA()
	if err != nil {
		return err
	}
	if err := ca.Save(dir); err != nil {
		return err
	}
	address, err := freeAddress()
	if err != nil {
		return err
	}
	client := newClient(4, 10*time.Second, nil)
	defer client.CloseIdleConnections()
	server := &api{client: client, base: "http://" + address, key: mdmtest.NewUUID()}

	process, err := startDaemon(program, dir, server.key,
		"-ca", filepath.Join(dir, "ca.pem"), "-listen", address,
		"-storage", "sqlite", "-storage-dsn", filepath.Join(dir, "demo.db"))
	if err != nil {
		return err
	}
	defer func() {
		if stopErr := process.stop(); stopErr != nil {
			err = errors.Join(err, stopErr)
		}
		if err != nil {
			fmt.Fprintf(out, "\nThe server's log ends with:\n%s\n", process.log.tail(40))
		}
	}()
	version, err := process.ready(ctx, server)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "Server %s answers on http://%s with an empty SQLite database.\n\n", version, address)

	d := &demo{out: out, ca: ca, api: server}
	if err := d.play(ctx); err != nil {
		return err
	}
	if err := process.stop(); err != nil {
		return err
	}
	fmt.Fprintln(out, "The server has stopped cleanly. All as expected.")
	return nil
}

type demo struct {
	out    io.Writer
	ca     *mdmtest.CA
	api    *api
	actors []*actor
}

// actor is one channel of the play with what it is to receive.
type actor struct {
	name     string
	channel  *mdmtest.Channel
	expected []expectation
}

type expectation struct {
	uuid    string
	command []byte
	status  mdmtest.Status
}

func (d *demo) play(ctx context.Context) error {
	if err := d.enroll(ctx); err != nil {
		return err
	}
	if err := d.enqueue(ctx); err != nil {
		return err
	}
	return d.poll(ctx)
}

// enroll brings three devices in. The user on the Mac is busy: she answers
// her first command with NotNow.
func (d *demo) enroll(ctx context.Context) error {
	fmt.Fprintln(d.out, "Enrolled:")
	table := tabwriter.NewWriter(d.out, 0, 0, 3, ' ', 0)
	defer table.Flush()
	for _, kind := range []mdmtest.Kind{mdmtest.Mac, mdmtest.IPhone, mdmtest.IPad} {
		id, err := d.ca.Issue("demo " + kind.String())
		if err != nil {
			return err
		}
		device, err := mdmtest.NewDevice(d.api.base+"/mdm", id, mdmtest.Config{Kind: kind, Client: d.api.client, Behaviour: busyUser()})
		if err != nil {
			return err
		}
		if err := device.Enroll(ctx); err != nil {
			return fmt.Errorf("enrolling the %v: %w", kind, err)
		}
		d.add(table, kind.String(), device.Channel)
		if kind != mdmtest.Mac {
			continue
		}
		user := device.User("ada")
		if err := user.TokenUpdate(ctx); err != nil {
			return fmt.Errorf("enrolling the user of the %v: %w", kind, err)
		}
		d.add(table, "Mac, user ada", user)
	}
	return nil
}

func (d *demo) add(table io.Writer, name string, channel *mdmtest.Channel) {
	d.actors = append(d.actors, &actor{name: name, channel: channel})
	fmt.Fprintf(table, "  %s\t%s\n", name, channel.EnrollmentID())
}

// delayed is the profile that a busy user puts off once.
const delayed = "com.example.user-settings"

func busyUser() mdmtest.Behaviour {
	refused := false
	return func(command *mdmtest.Command) mdmtest.Answer {
		if command.RequestType == "InstallProfile" && command.UUID == delayed && !refused {
			refused = true
			return mdmtest.Answer{Status: mdmtest.StatusNotNow}
		}
		return mdmtest.Answer{}
	}
}

func (d *demo) enqueue(ctx context.Context) error {
	mac, user, phone, pad := d.actors[0], d.actors[1], d.actors[2], d.actors[3]
	profile := func(identifier, name string) func(*mdmtest.Plist) {
		return func(p *mdmtest.Plist) { p.Data("Payload", mdmtest.NewProfile(identifier, name)) }
	}
	queries := func(p *mdmtest.Plist) {
		p.Array("Queries", func(p *mdmtest.Plist) {
			p.StringItem("DeviceName").StringItem("OSVersion").StringItem("SerialNumber")
		})
	}
	queue := []struct {
		actors      []*actor
		uuid        string
		requestType string
		content     func(*mdmtest.Plist)
		statuses    []mdmtest.Status // in the order of the offers
	}{
		{[]*actor{mac, phone, pad}, "", "DeviceInformation", queries, []mdmtest.Status{mdmtest.StatusAcknowledged}},
		{[]*actor{mac, phone, pad}, "", "InstallProfile", profile("com.example.wifi", "Office Wi-Fi"), []mdmtest.Status{mdmtest.StatusAcknowledged}},
		{[]*actor{mac}, "", "SecurityInfo", nil, []mdmtest.Status{mdmtest.StatusAcknowledged}},
		{[]*actor{user}, delayed, "InstallProfile", profile(delayed, "Settings of Ada"), []mdmtest.Status{mdmtest.StatusNotNow, mdmtest.StatusAcknowledged}},
		{[]*actor{phone}, "", "InstalledApplicationList", nil, []mdmtest.Status{mdmtest.StatusAcknowledged}},
		{[]*actor{pad}, "", "RemoveProfile", func(p *mdmtest.Plist) { p.String("Identifier", "com.example.absent") }, []mdmtest.Status{mdmtest.StatusError}},
		{[]*actor{user, phone, pad}, "", "ProfileList", nil, []mdmtest.Status{mdmtest.StatusAcknowledged}},
		{[]*actor{mac}, "", "RestartDevice", nil, []mdmtest.Status{mdmtest.StatusAcknowledged}},
	}
	later := make(map[*actor][]expectation)
	for _, item := range queue {
		uuid := item.uuid
		if uuid == "" {
			uuid = mdmtest.NewUUID()
		}
		command := mdmtest.NewCommand(uuid, item.requestType, item.content)
		var ids []string
		for _, a := range item.actors {
			ids = append(ids, a.channel.EnrollmentID())
			a.expected = append(a.expected, expectation{uuid, command, item.statuses[0]})
			for _, status := range item.statuses[1:] {
				later[a] = append(later[a], expectation{uuid, command, status})
			}
		}
		if err := d.api.enqueue(ctx, ids, command, false); err != nil {
			return err
		}
	}
	for a, expected := range later {
		a.expected = append(a.expected, expected...)
	}
	fmt.Fprintf(d.out, "\nQueued %d commands through PUT /v1/enqueue. The commands and reports of each device:\n\n", len(queue))
	return nil
}

// poll lets each channel come twice: the second time there is only what was
// put off. A third time there must be nothing.
func (d *demo) poll(ctx context.Context) error {
	table := tabwriter.NewWriter(d.out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(table, "DEVICE\tCOMMAND\tANSWER\tREPORTED")
	var problems []error
	for _, a := range d.actors {
		var exchanges []mdmtest.Exchange
		for range 2 {
			visit, err := a.channel.Poll(ctx)
			if err != nil {
				table.Flush()
				return fmt.Errorf("%s: %w", a.name, err)
			}
			exchanges = append(exchanges, visit.Exchanges...)
		}
		for _, exchange := range exchanges {
			fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", a.name, exchange.Command.RequestType, exchange.Status, reported(exchange))
		}
		problems = append(problems, a.compare(exchanges)...)
		if command, err := a.channel.Idle(ctx); err != nil || command != nil {
			problems = append(problems, fmt.Errorf("%s: the queue is not empty in the end (%v)", a.name, err))
		}
	}
	table.Flush()
	fmt.Fprintln(d.out)
	return errors.Join(problems...)
}

// compare says how what was received differs from what was queued.
func (a *actor) compare(exchanges []mdmtest.Exchange) []error {
	if len(exchanges) != len(a.expected) {
		return []error{fmt.Errorf("%s: %d commands came, %d were expected", a.name, len(exchanges), len(a.expected))}
	}
	var problems []error
	for i, got := range exchanges {
		want := a.expected[i]
		switch {
		case got.Command.UUID != want.uuid:
			problems = append(problems, fmt.Errorf("%s: command %d is %s, %s was expected", a.name, i+1, got.Command.UUID, want.uuid))
		case !bytes.Equal(got.Command.Raw, want.command):
			problems = append(problems, fmt.Errorf("%s: the %s was changed on its way", a.name, got.Command.RequestType))
		case got.Status != want.status:
			problems = append(problems, fmt.Errorf("%s: the %s was answered %s, %s was expected", a.name, got.Command.RequestType, got.Status, want.status))
		}
	}
	return problems
}

// reported is a report in a few words.
func reported(exchange mdmtest.Exchange) string {
	if exchange.Status == mdmtest.StatusNotNow {
		return "later, please"
	}
	var r struct {
		QueryResponses           struct{ DeviceName, OSVersion, SerialNumber string }
		InstalledApplicationList []struct{ Name string }
		ProfileList              []struct{ PayloadDisplayName string }
		SecurityInfo             struct {
			FileVault bool `plist:"FDE_Enabled"`
		}
	}
	var p mdmtest.Plist
	if err := plist.Unmarshal(p.Raw(exchange.Extra).Document(), &r); err != nil {
		return err.Error()
	}
	switch {
	case exchange.Status == mdmtest.StatusError:
		return "the profile is not there"
	case r.QueryResponses.DeviceName != "":
		q := r.QueryResponses
		return fmt.Sprintf("%s, OS %s, serial number %s", q.DeviceName, q.OSVersion, q.SerialNumber)
	case r.InstalledApplicationList != nil:
		return fmt.Sprintf("%d applications", len(r.InstalledApplicationList))
	case r.ProfileList != nil:
		var names []string
		for _, profile := range r.ProfileList {
			names = append(names, profile.PayloadDisplayName)
		}
		return fmt.Sprintf("%d profiles: %s", len(names), strings.Join(names, ", "))
	case r.SecurityInfo.FileVault:
		return "FileVault is on"
	}
	return "done"
}
