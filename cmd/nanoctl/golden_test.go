package main

import (
	"bytes"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/backoff"
)

// inProcess carries requests to a handler without a network, so that the
// clock of a test may be its own.
type inProcess struct{ handler http.Handler }

func (p inProcess) RoundTrip(r *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	p.handler.ServeHTTP(w, r)
	return w.Result(), nil
}

// at is a time relative to the beginning of the test's clock.
func at(d time.Duration) string {
	return time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC).Add(d).Format(time.RFC3339)
}

const (
	goldenUUID  = "5F0C3A3E-4C5B-4B0E-9E6C-0C4C2F1D7B11"
	goldenTopic = "com.apple.mgmt.External.4b1c9e2a-7f3d-4c52-9b1e-2f6c7a8d9e01"
)

// goldenEnrollment is a device in an answer of the server.
func goldenEnrollment(i int, more string) string {
	return fmt.Sprintf(`{"id":"0000810%d-001A2B3C4D5E6F7%d","type":"Device","device_id":"0000810%d-001A2B3C4D5E6F7%d","enabled":true,"serial_number":"C02XK0AAJG5%d",
"device_name":"Marketing MacBook Pro of Ann-Sophie %d","model":"MacBookPro18,3","model_name":"MacBook Pro","os_version":"15.1.1","build_version":"24B91","topic":%q,
"supervised":true,"filevault":false,"token_update_tally":2,"tags":["lab","berlin-3rd-floor"],"enrolled_at":%q,"last_seen_at":%q%s}`, i, i, i, i, i, i, goldenTopic, at(-90*24*time.Hour), at(-4*time.Hour), more)
}

// goldenServer answers what the golden file shows.
func goldenServer() http.Handler {
	answers := map[string]string{
		"/version": `{"version":"1.2.3"}`,
		"/v1/enrollments": `{"enrollments":[` + strings.Join([]string{
			goldenEnrollment(1, `,"push":{"last_class":"accepted","last_at":"`+at(-3*time.Second)+`"},"queue":{"queued":3}`),
			goldenEnrollment(2, `,"push":{"last_class":"accepted","last_at":"`+at(-5*time.Hour)+`"},"queue":{}`),
			goldenEnrollment(3, `,"operator_disabled":true,"push":{"owed":true},"queue":{"notnow":12}`),
			goldenEnrollment(4, `,"push":{"last_class":"our_fault","last_reason":"BadDeviceToken","last_at":"`+at(-time.Minute)+`"},"queue":{}`),
		}, ",") + `]}`,
		"/v1/commands": `{"commands":[{"command_uuid":"` + goldenUUID + `","request_type":"InstalledApplicationList","created_at":"` + at(-2*time.Hour) + `","states":{"acknowledged":249,"queued":240,"notnow":11}},
{"command_uuid":"0E1F3A3E-4C5B-4B0E-9E6C-0C4C2F1D7B12","request_type":"ManagedApplicationConfiguration","created_at":"` + at(-50*time.Hour) + `","states":{"acknowledged":400,"error":99,"expired":1}}]}`,
		"/v1/audit": `{"audit":[{"at":"` + at(-time.Hour) + `","who":"helpdesk","action":"command.enqueue","target":"` + goldenUUID + `","detail":"ProfileList for 160 enrollments: a, b, c; selected by {}","outcome":"done"},
{"at":"` + at(-2*time.Hour) + `","who":"nanomdm","action":"enrollment.bootstrap_token.read","target":"00008101-001A2B3C4D5E6F71","outcome":"the device has not escrowed one"}]}`,
		"/v1/tags":  `{"tags":[{"tag":"berlin-3rd-floor","devices":160},{"tag":"lab","devices":12}]}`,
		"/v1/keys":  `{"keys":[{"name":"helpdesk","role":"push","topics":["` + goldenTopic + `"],"created_at":"` + at(-time.Hour) + `","created_by":"nanomdm"}]}`,
		"/v1/sinks": `{"sinks":[{"name":"siem","url":"https://siem.example.org/hooks/mdm/production/events","filter":{"topics":["mdm.Connect","mdm.CheckOut"]},"backlog":{"behind":3,"waiting":2,"again":1,"dead":4,"oldest_at":"` + at(-2*time.Minute) + `"}},{"name":"siem2","url":"https://siem2.example.org/","down_since":"` + at(-3*time.Hour) + `","down_error":"dial tcp 10.0.0.9:443: connect: connection refused","backlog":{"behind":0,"waiting":120,"again":0,"dead":0}},{"name":"log","filter":{}}]}`,
		"/v1/pushcerts": `{"pushcerts":[{"topic":"` + goldenTopic + `","not_after":"` + at(20*24*time.Hour) + `","updated_at":"` + at(-340*24*time.Hour) + `","version":1,"enrollments":160,"last_class":"accepted","last_at":"` + at(-3*time.Second) + `"}],
"stranded":[{"topic":"com.apple.mgmt.External.other","enrollments":2}]}`,
		"/v1/stats": `{"version":"1.2.3","enrollments":{"by_type":{"Device":160,"User":12},"enabled":170,"disabled":1,"not_enrolled":1},
"queue":{"by_state":{"queued":12,"notnow":3,"acknowledged":4000,"error":7},"limit":100000,"oldest_waiting_at":"` + at(-3*time.Hour) + `"},
"push":{"owed":4,"unanswered":2,"topics":[{"topic":"` + goldenTopic + `","not_after":"` + at(20*24*time.Hour) + `","enrollments":172,"last_class":"accepted","last_at":"` + at(-3*time.Second) + `"}]},
"replicas":[{"name":"mdm-1","version":"1.2.3","listen":"[::]:9000","started_at":"` + at(-72*time.Hour) + `","seen_at":"` + at(-4*time.Second) + `","up":true},{"name":"mdm-2","version":"1.2.2","listen":"[::]:9000","started_at":"` + at(-72*time.Hour) + `","seen_at":"` + at(-10*time.Minute) + `","up":false}],
"events":{"waiting":6,"dead":4,"sinks":[{"name":"siem","waiting":6,"dead":4,"oldest_waiting_at":"` + at(-2*time.Minute) + `"}]}}`,
		"/v1/commands/" + goldenUUID: `{"command_uuid":"` + goldenUUID + `","request_type":"InstalledApplicationList","created_at":"` + at(-2*time.Hour) + `","states":{"acknowledged":1,"notnow":1},"enrollments":[
{"enrollment_id":"00008101-001A2B3C4D5E6F71","serial_number":"C02XK0AAJG51","device_name":"Marketing MacBook Pro of Ann-Sophie 1","state":"acknowledged","finished_at":"` + at(-time.Hour) + `"},
{"enrollment_id":"00008102-001A2B3C4D5E6F72","serial_number":"C02XK0AAJG52","device_name":"Marketing MacBook Pro of Ann-Sophie 2","state":"notnow","notnow_count":3}]}`,
		"/v1/replicas": `{"replicas":[{"name":"mdm-1.example.org","version":"1.2.3","listen":"[::]:9000","started_at":"` + at(-72*time.Hour) + `","seen_at":"` + at(-4*time.Second) + `","up":true}]}`,
		"/v1/events":   `{"events":[{"topic":"mdm.Connect","serial_number":"C02XK0AAJG51","request_type":"InstalledApplicationList","created_at":"` + at(-time.Minute) + `","acknowledge_event":{"ids":{"id":"00008101-001A2B3C4D5E6F71"},"status":"Acknowledged","command_uuid":"` + goldenUUID + `"},"cursor":"7"}],"next":""}`,
	}
	answers["/v1/enrollments/C02XK0AAJG51"] = goldenEnrollment(1, `,"certificate":{"sha256":"9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08","subject":"CN=00008101-001A2B3C4D5E6F71","not_after":"`+at(200*24*time.Hour)+`"},
"push":{"last_class":"accepted","last_at":"`+at(-3*time.Second)+`"},"inventory":{"information":{"host_name":"marketing-macbook-pro-of-ann-sophie.local","capacity_gb":494.38,"available_gb":311.25,"battery_level":0.87,"supervised":true,
"apple_silicon":true,"activation_lock":false},"information_at":"`+at(-26*time.Hour)+`","security":{"filevault":true,"filevault_personal_key":true,"firewall":true,"system_integrity_protection":true,
"passcode_present":true,"secure_boot":"full","enrolled_via_dep":true,"user_approved_enrollment":true},"security_at":"`+at(-2*time.Hour)+`","applications_count":212,"applications_at":"`+at(-26*time.Hour)+`"},
"queue":{"queued":3,"head":{"command_uuid":"`+goldenUUID+`","request_type":"ProfileList","state":"queued"}},"diagnosis":[]`)
	answers["/v1/enrollments/C02XK0AAJG51/applications"] = `{"id":"x","count":212,"applications_at":"` + at(-26*time.Hour) + `","applications":[{"name":"Safari","identifier":"com.apple.Safari","version":"18.1","build":"20619.2.8.11.10"},
{"name":"A \u001b[31mtool with a name that no column of a terminal has room for","identifier":"com.example.department.of.very.long.names.tool","build":"1"}]}`
	answers["/v1/enrollments/C02XK0AAJG52/applications"] = `{"id":"y","count":0,"applications":[]}`
	id := "/v1/enrollments/00008101-001A2B3C4D5E6F71/queue"
	answers[id] = `{"queue":[{"command_uuid":"` + goldenUUID + `","request_type":"InstalledApplicationList","state":"notnow","notnow_count":12,"created_at":"` + at(-time.Hour) + `","expires_at":"` + at(24*time.Hour) + `"}]}`
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer, known := answers[r.URL.Path]
		if r.URL.Query().Get("state") == "scheduled" || r.URL.Query().Get("serial") == "none" {
			answer = `{}`
		}
		if change, ok := goldenChanges()[r.Method+" "+r.URL.Path]; ok {
			answer, known = change, true
		}
		if !known {
			w.WriteHeader(http.StatusNotFound)
			answer = `{"error":"not found"}`
		}
		_, _ = w.Write([]byte(answer))
	})
}

// goldenChanges are the answers to requests that change something.
func goldenChanges() map[string]string {
	const id = "00008101-001A2B3C4D5E6F71"
	queued := `{"command_uuid":"` + goldenUUID + `","request_type":"DeviceInformation","count":1,"status":{"` + id + `":{"push_result":"8e3c7c52-2b1b-4f0e-a9a4-2f3f5b7b5c11"}}}`
	enrollment := `{"id":"` + id + `","ids":["` + id + `"],"cancelled":3,"until":"` + at(24*time.Hour) + `"}`
	device := "/v1/enrollments/" + id
	return map[string]string{
		"POST /v1/tags": `{"changed":1}`, "POST /v1/push": queued, "POST /v1/enqueue": queued,
		"DELETE " + device: enrollment, "DELETE " + device + "/queue": enrollment,
		"POST " + device + "/disable": enrollment, "POST " + device + "/enable": enrollment,
		"PUT /v1/renewals": `{"opened":1}`, "DELETE " + device + "/renewal": enrollment,
		"POST " + device + "/bootstrap_token":                                 `{"bootstrap_token":"c2VjcmV0"}`,
		"POST " + device + "/unlock_token":                                    `{"unlock_token":"c2VjcmV0"}`,
		"DELETE /v1/commands/" + goldenUUID:                                   `{"cancelled":1,"finished":1}`,
		"GET /v1/commands/" + goldenUUID + "/results/" + id:                   `{"state":"acknowledged","result":"PHBsaXN0Lz4="}`,
		"POST /v1/commands/" + goldenUUID + "/enrollments/" + id + "/requeue": `{"state":"queued"}`,
		"PUT /v1/pushcert":                                                    `{"topic":"` + goldenTopic + `","not_after":"` + at(365*24*time.Hour) + `"}`, "DELETE /v1/pushcerts/" + goldenTopic: `{"topic":"` + goldenTopic + `"}`,
		"POST /v1/reseal": `{}`, "POST /v1/escrowkeyunlock": `{"code":"200"}`,
		"PUT /v1/sinks/siem": `{"name":"siem","url":"https://siem.example.org/"}`, "DELETE /v1/sinks/siem": `{"name":"siem"}`,
		"POST /v1/events/redeliver": `{"redelivering":4}`,
		"POST /v1/keys":             `{"name":"helpdesk","role":"push","key":"nmk_0000000000000000000000000000000000000000000"}`, "DELETE /v1/keys/helpdesk": `{"name":"helpdesk"}`,
	}
}

// The output of each command at 80 columns is in the golden file, and no line
// of a table is longer than that; the terminal wraps sentences.
func TestEightyColumns(t *testing.T) {
	local := time.Local
	time.Local = time.UTC
	defer func() { time.Local = local }()
	synctest.Test(t, func(t *testing.T) {
		var screen bytes.Buffer
		dir := t.TempDir()
		pem := filepath.Join(dir, "push.pem")
		require.NoError(t, os.WriteFile(pem, []byte("a certificate and its key"), 0o600))
		key := filepath.Join(dir, "lab.key")
		require.NoError(t, os.WriteFile(key, []byte("secret\n"), 0o600))
		profile := filepath.Join(dir, "wifi.mobileconfig")
		require.NoError(t, os.WriteFile(profile, []byte(`<plist version="1.0"><dict><key>PayloadContent</key><array/><key>PayloadIdentifier</key><string>org.example</string><key>PayloadType</key><string>Configuration</string><key>PayloadUUID</key><string>8F1E5C7A-0C1B-4E0E-8C8B-0A6A3D1F9A11</string><key>PayloadVersion</key><integer>1</integer></dict></plist>`), 0o600))
		uncovered := make(map[string]bool)
		for _, c := range commands() {
			uncovered[c.name] = true
		}
		sentences := false // from here on: the terminal wraps them
		for _, line := range []string{
			"help", "enrollments ls", "enrollments ls -serial none", "enrollments ls -o wide", "show C02XK0AAJG51", "apps C02XK0AAJG51", "apps C02XK0AAJG52", "queue C02XK0AAJG51", "tags ls", "tag C02XK0AAJG51 lab", "tag C02XK0AAJG51", "commands ls",
			"status " + goldenUUID, "audit", "keys ls", "sinks ls", "pushcert ls", "stats", "replicas", "top -count 1", "context ls", "events", "shwo", "",
			"push C02XK0AAJG51", "untag C02XK0AAJG51 lab", "clear C02XK0AAJG51 -yes", "disable C02XK0AAJG51", "enable C02XK0AAJG51", "delete C02XK0AAJG51", "delete C02XK0AAJG51 -confirm C02XK0AAJG51",
			"send DeviceInformation C02XK0AAJG51 -uuid " + goldenUUID, "send DeviceInfo C02XK0AAJG51", "send EraseDevice C02XK0AAJG51",
			"install-profile " + profile + " C02XK0AAJG51 -uuid " + goldenUUID, "remove-profile org.example C02XK0AAJG51", "command ProfileList -uuid " + goldenUUID,
			"result " + goldenUUID + " C02XK0AAJG51", "cancel " + goldenUUID + " -yes", "requeue " + goldenUUID + " C02XK0AAJG51",
			"pushcert put " + pem, "pushcert rm " + goldenTopic, "pushcert rm " + goldenTopic + " -yes", "renewal open C02XK0AAJG51", "renewal close C02XK0AAJG51",
			"bootstrap-token C02XK0AAJG51", "unlock-token C02XK0AAJG51", "escrow-unlock -escrow-key-file " + pem, "reseal",
			"sinks put siem -to https://siem.example.org/", "sinks rm siem -yes", "redeliver siem -dead", "backup", "restore", "keys create helpdesk -role push", "keys rm helpdesk",
			"context use lab", "context add lab -url https://mdm.example.org -key-file " + key, "context use lab", "context ls", "context use other", "context rm lab", "version", "completion",
		} {
			if line == "" {
				sentences = true
				continue
			}
			var out, errs bytes.Buffer
			e := &env{
				in: strings.NewReader(""), out: &out, err: &errs, width: 80, transport: inProcess{goldenServer()},
				getenv: func(name string) string {
					return map[string]string{"NANOMDM_URL": "http://mdm", "NANOMDM_API": "key"}[name]
				},
				home: func() (string, error) { return dir, nil },
			}
			run(t.Context(), e, strings.Fields(line))
			if c, _ := find(commands(), strings.Fields(line)); c != nil {
				delete(uncovered, c.name)
			}
			fmt.Fprintf(&screen, "$ nanoctl %s\n%s%s\n", strings.ReplaceAll(line, dir+"/", ""), out.String(), strings.ReplaceAll(errs.String(), dir+"/", ""))
			if strings.Contains(line, "wide") || sentences {
				continue
			}
			for printed := range strings.SplitSeq(out.String(), "\n") {
				require.LessOrEqual(t, utf8.RuneCountInString(printed), 80, printed)
			}
		}
		require.Empty(t, uncovered, "each command has its output here")
		file := filepath.Join("testdata", "columns80.golden")
		if *update {
			require.NoError(t, os.WriteFile(file, screen.Bytes(), 0o644))
		}
		want, err := os.ReadFile(file)
		require.NoError(t, err)
		require.Equal(t, string(want), screen.String(), "run: go test ./cmd/nanoctl -run TestEightyColumns -update")
	})
}

// Waiting draws at once and at least each second, with numbers, rate and what
// is left; in a pipe it is a line in ten seconds.
func TestWaiting(t *testing.T) {
	for _, c := range []struct {
		name     string
		terminal bool
		least    int
	}{{"terminal", true, 24}, {"pipe", false, 2}} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					wait, _ := time.ParseDuration(r.URL.Query().Get("wait"))
					time.Sleep(min(wait, time.Until(began.Add(25*time.Second))))
					n := int(time.Since(began) / time.Second)
					_, _ = fmt.Fprintf(w, `{"request_type":"ProfileList","states":{"acknowledged":%d,"queued":%d,"notnow":%d},"done":%t}`, n, max(0, 24-n), min(1, 25-n), n == 25)
				})
				var out, err, screen bytes.Buffer
				e := &env{
					out: &out, err: &err, transport: inProcess{handler},
					getenv: func(name string) string {
						return map[string]string{"NANOMDM_URL": "http://mdm", "NANOMDM_API": "key"}[name]
					},
				}
				if c.terminal {
					e.progressOn = &screen
				}
				require.Zero(t, run(t.Context(), e, []string{"status", goldenUUID, "-wait", "-timeout", "1m"}), err.String())
				require.Equal(t, 25*time.Second, time.Since(began))
				shown := strings.Split(strings.TrimSpace(screen.String()), "\r")
				if !c.terminal {
					require.Empty(t, screen.String())
					shown = strings.Split(strings.TrimSpace(err.String()), "\n")
					require.Len(t, shown, c.least)
					require.Equal(t, "nanoctl: 0 of 25 answered, 25 left (1 NotNow), 10s", shown[0], "the server was asked to wait for 30 s")
					return
				}
				require.GreaterOrEqual(t, len(shown), c.least)
				require.Equal(t, "waiting for answers", strings.TrimSpace(shown[0]))
				require.Contains(t, screen.String(), "10 of 25, 15 left (1 NotNow), 1.0/s, about 15s more, 10s")
				require.Contains(t, screen.String(), "25 of 25, 0 left, 1.0/s, 25s")
			})
		})
	}
}

// Nothing that a device, the server or a file says steers the terminal,
// whichever command prints it and in whichever form.
func TestTerminalWriter(t *testing.T) {
	var out bytes.Buffer
	w := &terminalWriter{&out}
	n, err := w.Write([]byte("a\x1b[2J\u009b31m\u202e\u2066\u00ad\u2028\x9b\x07\r\tb\n\u200d"))
	require.NoError(t, err)
	require.Equal(t, 30, n)
	require.Equal(t, "a?[2J?31m???????\tb\n\u200d", out.String())

	out.Reset()
	e := &env{out: w, colour: true}
	_, err = w.Write([]byte(e.paint(bad, "down") + printable(string(rune(bad))+"x")))
	require.NoError(t, err)
	require.Equal(t, "\x1b[31mdown\x1b[0m?x", out.String(), "colours are nanoctl's own")
	e.colour = false
	require.Equal(t, "down", e.paint(bad, "down"))
}

func TestVerdicts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, c := range []struct{ json, verdict, pushed string }{
			{`{"enabled":true,"last_seen_at":"` + at(-4*time.Hour) + `","queue":{}}`, "well: nothing waits; last answered 4h ago", ""},
			{`{"enabled":true,"last_seen_at":"` + at(-4*time.Hour) + `","push":{"last_class":"accepted","last_at":"` + at(-3*time.Second) + `"}}`,
				"woken 3s ago, no answer yet; last answered 4h ago", "accepted"},
			{`{"enabled":true,"last_seen_at":"` + at(-4*time.Hour) + `","push":{"last_class":"accepted","last_at":"` + at(-3*time.Hour) + `"},"queue":{"queued":1}}`,
				"silent: woken 3h ago, no answer; 1 command waits; last answered 4h ago", "accepted"},
			{`{"enabled":true,"last_seen_at":"` + at(-time.Hour) + `","push":{"last_class":"accepted","last_at":"` + at(-3*time.Hour) + `"},"queue":{"queued":2,"notnow":1}}`,
				"3 commands wait, 1 put off (NotNow); last answered 60m ago", "answered"},
			{`{"enabled":true,"operator_disabled":true}`, "disabled by an operator: no commands, no pushes", ""},
			{`{"enabled":false}`, "not enrolled; last answered never", ""},
			{`{"enabled":true,"push":{"token_dead_at":"` + at(-time.Hour) + `"}}`, "cannot be woken: its push token is dead; last answered never", "token dead"},
			{`{"enabled":true,"push":{"last_class":"our_fault","last_reason":"BadTopic"}}`, "cannot be woken: our_fault: BadTopic; last answered never", "our_fault: BadTopic"},
			{`{"enabled":true,"push":{"owed":true},"queue":{"queued":1}}`, "1 command waits; last answered never", "owed"},
			{`{"enabled":true,"diagnosis":["x"]}`, "nothing waits; see below; last answered never", ""},
		} {
			var x enrollment
			require.NoError(t, (&answer{body: []byte(c.json)}).decode(&x))
			verdict, _ := x.verdict()
			require.Equal(t, c.verdict, verdict, c.json)
			require.Equal(t, c.pushed, x.pushed(), c.json)
		}
	})
}

// The screen is drawn in place and has rates; a server that is away does not
// end it.
func TestTop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calls := 0
		handler := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			if calls++; calls == 2 {
				w.WriteHeader(http.StatusServiceUnavailable)
				_, _ = w.Write([]byte(`{"error":"the database does not answer"}`))
				return
			}
			_, _ = fmt.Fprintf(w, `{"queue":{"by_state":{"acknowledged":%d,"queued":%d}},"push":{"owed":%d}}`, 10*calls, 100-10*calls, calls)
		})
		var out, errs bytes.Buffer
		e := &env{
			out: &terminalWriter{&out}, err: &errs, width: 80, transport: inProcess{handler}, pause: backoff.Sleep,
			getenv: func(name string) string {
				return map[string]string{"NANOMDM_URL": "http://mdm", "NANOMDM_API": "key"}[name]
			},
		}
		require.Zero(t, run(t.Context(), e, []string{"top", "-count", "3", "-every", "10s"}), errs.String())
		require.Equal(t, 3, strings.Count(out.String(), "\x1b[H"))
		require.Contains(t, out.String(), "nanoctl: the database does not answer")
		require.Contains(t, out.String(), "answers +1.0/s, waiting -1.0/s, pushes owed +0.1/s")
	})
}
