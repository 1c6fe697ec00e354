package main

import (
	"context"
	"flag"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// inventory is what a device answered last.
type inventory struct {
	Information *struct {
		OSExtra      string   `json:"supplemental_os_version_extra"`
		HostName     string   `json:"host_name"`
		Capacity     *float64 `json:"capacity_gb"`
		Available    *float64 `json:"available_gb"`
		Battery      *float64 `json:"battery_level"`
		Lock         *bool    `json:"activation_lock"`
		LostMode     *bool    `json:"lost_mode"`
		AppleSilicon *bool    `json:"apple_silicon"`
		Supervised   *bool    `json:"supervised"`
	} `json:"information"`
	InformationAt *time.Time `json:"information_at"`
	Security      *struct {
		FileVault    *bool  `json:"filevault"`
		PersonalKey  *bool  `json:"filevault_personal_key"`
		Passcode     *bool  `json:"passcode_present"`
		Firewall     *bool  `json:"firewall"`
		SIP          *bool  `json:"system_integrity_protection"`
		RecoveryLock *bool  `json:"recovery_lock"`
		SecureBoot   string `json:"secure_boot"`
		UserApproved *bool  `json:"user_approved_enrollment"`
		DEP          *bool  `json:"enrolled_via_dep"`
	} `json:"security"`
	SecurityAt        *time.Time `json:"security_at"`
	ApplicationsCount *int       `json:"applications_count"`
	ApplicationsAt    *time.Time `json:"applications_at"`
}

// is is a named truth value in words; empty if it is not known.
func is(b *bool, yes, no string) string {
	switch {
	case b == nil:
		return ""
	case *b:
		return yes
	}
	return no
}

// rows are the inventory for show.
func (inv *inventory) rows() (rows [][2]string) {
	if inv == nil {
		return nil
	}
	if i := inv.Information; i != nil {
		rows = append(rows,
			[2]string{"host name", i.HostName},
			[2]string{"storage", storageText(i.Available, i.Capacity)},
			[2]string{"management", joined(is(i.Supervised, "supervised", "not supervised"), wordIf(i.AppleSilicon != nil && *i.AppleSilicon, "Apple silicon"),
				is(i.Lock, "Activation Lock on", "Activation Lock off"), wordIf(i.LostMode != nil && *i.LostMode, "in Lost Mode"), batteryText(i.Battery))},
			[2]string{"device as of", stamp(inv.InformationAt)})
	}
	if s := inv.Security; s != nil {
		rows = append(rows,
			[2]string{"FileVault", joined(is(s.FileVault, "on", "off"), is(s.PersonalKey, "with a personal key", ""))},
			[2]string{"security", joined(is(s.Passcode, "passcode set", "no passcode"), is(s.Firewall, "firewall on", "firewall off"), is(s.SIP, "SIP on", "SIP off"),
				is(s.RecoveryLock, "recovery lock on", ""), wordIf(s.SecureBoot != "", "secure boot "+s.SecureBoot),
				is(s.DEP, "enrolled by DEP", ""), is(s.UserApproved, "enrollment approved by its user", ""))},
			[2]string{"security as of", stamp(inv.SecurityAt)})
	}
	if n := inv.ApplicationsCount; n != nil {
		rows = append(rows, [2]string{"applications", fmt.Sprintf("%d, %s", *n, stamp(inv.ApplicationsAt))})
	}
	return rows
}

func storageText(available, capacity *float64) string {
	switch {
	case available != nil && capacity != nil:
		return fmt.Sprintf("%.0f of %.0f GB free", *available, *capacity)
	case capacity != nil:
		return fmt.Sprintf("%.0f GB", *capacity)
	case available != nil:
		return fmt.Sprintf("%.0f GB free", *available)
	}
	return ""
}

func batteryText(level *float64) string {
	if level == nil || *level < 0 { // what devices without a battery answer
		return ""
	}
	return "battery " + strconv.Itoa(int(*level*100+0.5)) + "%"
}

// application is one in the list of a device.
type application struct {
	Identifier string `json:"identifier"`
	Name       string `json:"name"`
	Version    string `json:"version"`
	Build      string `json:"build"`
}

var applicationColumns = []column[application]{
	{heading: "NAME", cell: func(a *application) string { return a.Name }, clip: true},
	{heading: "VERSION", cell: func(a *application) string {
		if a.Version == "" {
			return a.Build
		}
		return a.Version
	}, clip: true},
	{heading: "IDENTIFIER", cell: func(a *application) string { return a.Identifier }, clip: true},
	{heading: "BUILD", cell: func(a *application) string { return a.Build }, wide: true},
}

func applicationsCommand() command {
	return command{
		name: "apps", args: "ID|SERIAL",
		short: "List the applications of a device, as it answered last",
		long: `The list is of the last answer to an InstalledApplicationList that asked for all applications:
nanoctl send InstalledApplicationList C02XK0AAJG5H -wait asks for a new one.`,
		example: "nanoctl apps C02XK0AAJG5H",
		prepare: func(*flag.FlagSet) runner {
			return func(ctx context.Context, e *env, args []string) error {
				a, err := e.api.do(ctx, http.MethodGet, enrollmentPath(args[0], "applications"), nil, nil)
				var said struct {
					At           *time.Time    `json:"applications_at"`
					Count        int           `json:"count"`
					Applications []application `json:"applications"`
				}
				return e.printAnswer(a, naming(args[0], err), &said, func() error {
					if said.At == nil {
						_, err := fmt.Fprintln(e.err, "the device has not said yet: nanoctl send InstalledApplicationList "+printable(args[0])+" -wait")
						return err
					}
					if err := showItems(e, a, "applications", applicationColumns); err != nil {
						return err
					}
					left := ""
					if n := said.Count - len(said.Applications); n > 0 {
						left = fmt.Sprintf(", %d of them not kept", n)
					}
					_, err := fmt.Fprintf(e.err, "%d applications%s, as of %s\n", said.Count, left, strings.TrimSpace(stamp(said.At)))
					return err
				})
			}
		},
	}
}
