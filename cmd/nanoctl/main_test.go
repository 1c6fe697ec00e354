package main

import (
	"bytes"
	"context"
	"encoding/pem"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/smallstep/pkcs7"
	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/mdm/schema"
	"github.com/nanomdm/nanomdm/release"
)

// ran is one run of nanoctl.
type ran struct {
	code     int
	out, err string
}

// operator runs nanoctl in the test's process.
type operator struct {
	width int // of the terminal
	t     *testing.T
	vars  map[string]string
	dir   string
	// pauses are those that were to be made.
	pauses []time.Duration
}

func newOperator(t *testing.T) *operator {
	return &operator{t: t, vars: make(map[string]string), dir: t.TempDir()}
}

func (o *operator) run(stdin string, args ...string) ran {
	return o.runContext(o.t.Context(), stdin, args...)
}

func (o *operator) runContext(ctx context.Context, stdin string, args ...string) ran {
	o.t.Helper()
	var out, err bytes.Buffer
	e := &env{
		in: strings.NewReader(stdin), out: &out, err: &err,
		getenv: func(name string) string { return o.vars[name] }, home: func() (string, error) { return o.dir, nil },
		width: o.width,
		pause: func(_ context.Context, d time.Duration) error {
			o.pauses = append(o.pauses, d)
			return nil
		},
	}
	code := run(ctx, e, args)
	return ran{code, out.String(), err.String()}
}

// server is a stand-in for the daemon, for what only nanoctl does.
func (o *operator) server(handler http.HandlerFunc) {
	s := httptest.NewServer(handler)
	o.t.Cleanup(s.Close)
	o.vars["NANOMDM_URL"], o.vars["NANOMDM_API"] = s.URL, "key"
}

func TestMistakesOnTheCommandLine(t *testing.T) {
	o := newOperator(t)
	o.vars["NANOMDM_URL"], o.vars["NANOMDM_API"] = "http://127.0.0.1:1", "key"
	empty := filepath.Join(o.dir, "empty")
	require.NoError(t, os.WriteFile(empty, nil, 0o600))
	for _, c := range []struct {
		args string
		want string
	}{
		{"", "no command given"},
		{"frobnicate", `no command "frobnicate"`},
		{"enrollments frobnicate", `no command "enrollments frobnicate"`},
		{"show", "the argument ID|SERIAL is missing"},
		{"show a b", `unexpected argument "b"`},
		{"show -frobnicate", "nanoctl show -help"},
		{"show a -o yaml", "the formats are table, wide and json"},
		{"enrollments ls x", `unexpected argument "x"`},
		{"enrollments ls -stale soon", "no length of time such as 7d"},
		{"enrollments ls -stale -7d", "no length of time such as 7d"},
		{"enrollments ls -last-seen-before whenever", "no time such as"},
		{"send", "give a request type"},
		{"send ProfileList", "name an enrollment"},
		{"send ProfileList A -all", "not both"},
		{"send ProfileList A -model X", "not both"},
		{"send ProfileList A -set x", "want Key=text or Key:=JSON"},
		{"send ProfileList A -set x:=nope", "no JSON"},
		{"send ProfileList A -set x=true", "write x:=true"},
		{"send ProfileList A -keys [1]", "a JSON object"},
		{"send ProfileList A -set x:=null", "null has no place"},
		{"send ProfileList A -data x=/nowhere", "no such file"},
		{"send ProfileList A -uuid a\x01b", "XML does not have"},
		{"send ProfileList A -set x=\xff", "XML does not have"},
		{"send ProfileList A -not-before noon", "no time such as"},
		{"send DeviceLock A -set PIN=12345", "six characters"},
		{"send DeviceLock A -set PIN:=123456", "six characters of text"},
		{"send -file " + empty + " A", "the command in"},
		{"send -file /nowhere A", "no such file"},
		{"send -file x -uuid y A", "-file is a whole command"},
		{"send ProfileList -from " + empty, "names no enrollment"},
		{"install-profile", "the argument FILE is missing"},
		{"install-profile /nowhere A", "no such file"},
		{"remove-profile", "the argument IDENTIFIER is missing"},
		{"status", "the argument COMMAND_UUID is missing"},
		{"result x", "the argument ID|SERIAL is missing"},
		{"cancel", "the argument COMMAND_UUID is missing"},
		{"requeue x", "the argument ID|SERIAL is missing: nanoctl requeue COMMAND_UUID ID|SERIAL..."},
		{"pushcert put", "the argument FILE is missing"},
		{"pushcert put a b c", `unexpected argument "c"`},
		{"pushcert put /nowhere", "no such file"},
		{"keys create", "the argument NAME is missing"},
		{"keys create x", "-role is missing"},
		{"redeliver a", "give -dead, or a range"},
		{"redeliver a -dead -after 3", "give -dead, or a range"},
		{"sinks put", "the argument NAME is missing"},
		{"escrow-unlock", "-escrow-key-file is missing"},
		{"completion", "the argument bash|zsh|fish is missing"},
		{"completion tcsh", "none of bash, zsh and fish"},
		{"command", "give one request type, or -random"},
		{"command ProfileList -r", "give one request type, or -random"},
		{"command ProfileList x", "nothing is wanted after it"},
		{"command RemoveProfile", "the profile's identifier is wanted"},
		{"command DeviceLock 1", "six characters"},
		{"command ScheduleOSUpdate", "the install action"},
		{"command ProfileList -deferrals 3", "ScheduleOSUpdate's"},
		{"command ProfileList -allowbst", "one of Settings"},
	} {
		r := o.run("", strings.Fields(c.args)...)
		require.Equal(t, exitUsage, r.code, "%s: %s", c.args, r.err)
		require.Contains(t, r.err, c.want, c.args)
		require.Empty(t, r.out, c.args)
	}
}

func TestCredentials(t *testing.T) {
	var asked string
	o := newOperator(t)
	o.server(func(w http.ResponseWriter, r *http.Request) {
		asked = r.Header.Get("Authorization")
		_, _ = io.WriteString(w, `{"stats":"1"}`)
	})
	address := o.vars["NANOMDM_URL"]
	write := func(name, content string, mode os.FileMode) string {
		path := filepath.Join(o.dir, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o700))
		require.NoError(t, os.WriteFile(path, []byte(content), mode))
		require.NoError(t, os.Chmod(path, mode))
		return path
	}
	require.Zero(t, o.run("", "stats").code)
	require.Equal(t, "Bearer key", asked)

	require.Zero(t, o.run("", "stats", "--key-file", write("other", "other\n", 0o600)).code)
	require.Equal(t, "Bearer other", asked)

	clear(o.vars)
	r := o.run("", "stats")
	require.Equal(t, exitUsage, r.code)
	require.Contains(t, r.err, "the server's address is missing: set NANOCTL_URL and NANOCTL_API")

	config := write("nanoctl/config", "# mine\nurl = "+address+"\nkey = from = file\n", 0o600)
	require.Zero(t, o.run("", "stats").code)
	require.Equal(t, "Bearer from = file", asked)
	o.vars["NANOMDM_API"] = "variable"
	require.Zero(t, o.run("", "stats").code)
	require.Equal(t, "Bearer variable", asked, "the environment goes before the file")
	o.vars["NANOCTL_API"] = "own"
	require.Zero(t, o.run("", "stats").code)
	require.Equal(t, "Bearer own", asked, "nanoctl's variable goes before the server's")
	clear(o.vars)
	r = o.run("", "stats", "-url", "http://127.0.0.1:1")
	require.Equal(t, exitUsage, r.code)
	require.Contains(t, r.err, "the API key is missing", "a kept key goes to its own server alone")
	clear(o.vars)

	for _, mode := range []os.FileMode{0o640, 0o604, 0o620} {
		require.NoError(t, os.Chmod(config, mode))
		r := o.run("", "stats")
		require.Equal(t, exitUsage, r.code)
		require.Contains(t, r.err, "chmod 600")
		require.NotContains(t, r.err, "from = file")
	}
	write("nanoctl/config", "password = x\n", 0o600)
	r = o.run("", "stats")
	require.Equal(t, exitUsage, r.code)
	require.Contains(t, r.err, "line 1")
	for _, bad := range []string{"ftp://x", "mdm.example.org", "http://"} {
		r := o.run("", "stats", "-url", bad, "-key-file", write("k", "k", 0o600))
		require.Equal(t, exitUsage, r.code, bad)
		require.Contains(t, r.err, "no http or https URL")
	}
}

// Contexts keep several servers; one is in use, and -context names another.
func TestContexts(t *testing.T) {
	o := newOperator(t)
	var asked []string
	server := func(name string) (address, keyFile string) {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			asked = append(asked, name+" "+r.Header.Get("Authorization"))
			_, _ = io.WriteString(w, `{}`)
		}))
		t.Cleanup(s.Close)
		keyFile = filepath.Join(o.dir, name+".key")
		require.NoError(t, os.WriteFile(keyFile, []byte("key-of-"+name+"\n"), 0o600))
		return s.URL, keyFile
	}
	prodURL, prodKey := server("prod")
	labURL, labKey := server("lab")
	require.Contains(t, o.run("", "context", "ls").err, "no contexts")
	r := o.run("", "context", "add", "prod", "-url", prodURL, "-key-file", prodKey)
	require.Zero(t, r.code, r.err)
	require.Contains(t, r.out, "context prod is in use")
	require.Zero(t, o.run("key-of-lab", "context", "add", "lab", "-url", labURL, "-key-file", "-").code)
	require.NoError(t, os.Remove(labKey))

	require.Zero(t, o.run("", "stats").code)
	require.Zero(t, o.run("", "stats", "-context", "lab").code)
	require.Zero(t, o.run("", "context", "use", "lab").code)
	require.Zero(t, o.run("", "stats").code)
	o.vars["NANOMDM_URL"], o.vars["NANOMDM_API"] = prodURL, "variable"
	require.Zero(t, o.run("", "stats").code)
	require.Zero(t, o.run("", "stats", "-context", "prod").code)
	clear(o.vars)
	require.Equal(t, []string{
		"prod Bearer key-of-prod", "lab Bearer key-of-lab", "lab Bearer key-of-lab", "prod Bearer variable", "prod Bearer key-of-prod",
	}, asked)

	r = o.run("", "context", "ls")
	require.Regexp(t, `lab +yes +`+labURL, r.out)
	require.Regexp(t, `prod +- +`+prodURL, r.out)
	require.NotContains(t, o.run("", "context", "ls", "-o", "json").out, "key-of")
	require.Equal(t, "lab\nprod\n", o.run("", completing, "context", "use", "").out)
	r = o.run("", "stats", "-context", "prd")
	require.Equal(t, exitNotFound, r.code)
	require.Contains(t, r.err, `no context "prd"; did you mean prod?`)
	require.Zero(t, o.run("", "context", "rm", "lab").code)
	require.Equal(t, exitUsage, o.run("", "stats").code, "none is in use")
	for args, want := range map[string]string{
		"add ../x -url http://x -key-file " + prodKey: "letters, digits", "add x -key-file " + prodKey: "-url: ", "add x -url http://x": "-key-file is missing",
		"add x -url http://x -key-file " + prodKey + " -ca-file " + prodKey: "holds no certificate",
		"use nothing": "no context", "rm nothing": "no context",
	} {
		r := o.run("", append([]string{"context"}, strings.Fields(args)...)...)
		require.NotZero(t, r.code, args)
		require.Contains(t, r.err, want, args)
	}
	info, err := os.Stat(filepath.Join(o.dir, "nanoctl", "contexts", "prod"))
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode().Perm())
}

// A CA of one's own is given by a flag, by the environment or by the context;
// errors of certificates say so.
func TestCAs(t *testing.T) {
	o := newOperator(t)
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, `{}`) }))
	defer s.Close()
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	ca := filepath.Join(o.dir, "ca.pem")
	require.NoError(t, os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o644))
	key := filepath.Join(o.dir, "ca.key")
	require.NoError(t, os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: []byte("x")}), 0o600))
	o.vars["NANOCTL_URL"], o.vars["NANOCTL_API"] = s.URL, "key"

	r := o.run("", "stats")
	require.Equal(t, exitFailure, r.code)
	require.Contains(t, r.err, "if the certificate is of your own CA, give -ca-file FILE")
	require.Zero(t, o.run("", "stats", "-ca-file", ca).code)
	o.vars["NANOCTL_CA_FILE"] = ca
	require.Zero(t, o.run("", "stats").code)
	_, port, err := net.SplitHostPort(strings.TrimPrefix(s.URL, "https://"))
	require.NoError(t, err)
	r = o.run("", "stats", "-url", "https://localhost:"+port)
	require.Contains(t, r.err, "the certificate is for example.com, *.example.com: use that name in the URL")
	r = o.run("", "stats", "-url", "http://127.0.0.1:"+port)
	require.Contains(t, r.err, "the server speaks https there")
	r = o.run("", "stats", "-ca-file", key)
	require.Equal(t, exitUsage, r.code)
	require.Contains(t, r.err, "holds no certificate: it is a file of EC PRIVATE KEY")
	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()
	r = o.run("", "stats", "-url", strings.Replace(plain.URL, "http", "https", 1))
	require.Contains(t, r.err, "the server speaks http there")
	r = o.run("", "context", "add", "own", "-url", s.URL, "-key-file", key, "-ca-file", ca)
	require.Equal(t, exitUsage, r.code)
	require.Contains(t, r.err, "holds more than an API key")
	require.Zero(t, o.run("the-key\n", "context", "add", "own", "-url", s.URL, "-key-file", "-", "-ca-file", ca).code)
	clear(o.vars)
	require.Zero(t, o.run("", "stats").code)
}

// The version needs no server, and help for what is not there is a mistake.
func TestVersionAndSuggestions(t *testing.T) {
	o := newOperator(t)
	require.Equal(t, release.String()+"\n", o.run("", "--version").out)
	r := o.run("", "version")
	require.Zero(t, r.code)
	require.NotContains(t, r.out, "server")
	r = o.run("", "version", "-url", "http://127.0.0.1:1")
	require.Zero(t, r.code)
	require.Contains(t, r.out, "reaching http://127.0.0.1:1")
	for args, want := range map[string]string{
		"shwo": "did you mean show?", "enrollments sl": "; there is ls", "pushcert ptu": "did you mean put?", "enrollments": "enrollments: which one? ls", "keys": "which one? ls, create, rm",
		"keys make": "; there is ls, create, rm", "help nosuch": `there is no command "nosuch"`, "frobnicate": "nanoctl help lists them",
	} {
		r := o.run("", strings.Fields(args)...)
		require.Equal(t, exitUsage, r.code, args)
		require.Contains(t, r.err, want, args)
	}
}

// Completion asks the server, knows what does not need it, and is silent where
// it cannot help.
func TestCompletionAsks(t *testing.T) {
	o := newOperator(t)
	require.Empty(t, o.run("", completing, "show", ""), "there is no server")
	o.server(func(w http.ResponseWriter, r *http.Request) {
		answers := map[string]string{
			"/v1/enrollments": `{"enrollments":[{"id":"A","serial_number":"C01"},{"id":"B"},{"id":"x","serial_number":"a b"},{"id":"x","serial_number":"\u001b[2J"}]}`,
			"/v1/commands":    `{"commands":[{"command_uuid":"5F0C"}]}`, "/v1/keys": `{"keys":[{"name":"helpdesk"}]}`, "/v1/sinks": `{"sinks":[{"name":"siem"}]}`,
		}
		_, _ = io.WriteString(w, answers[r.URL.Path])
	})
	for args, want := range map[string]string{
		"show ": "C01 B", "show C": "C01", "status ": "5F0C", "cancel 5F0C ": "C01 B", "keys rm ": "helpdesk", "sinks rm ": "siem", "redeliver ": "siem",
		"send DeviceI": "DeviceInformation", "send -no-push DeviceI": "DeviceInformation", "send ProfileList ": "C01 B", "queue -state not": "notnow",
		"keys create x -role e": "enqueue", "enrollments ls -push-status token": "token_dead", "show -o j": "json", "nothing ": "", "show": "", "show -frob ": "",
	} {
		words := strings.Split(args, " ")
		require.Equal(t, strings.Fields(want), strings.Fields(o.run("", append([]string{completing}, words...)...).out), args)
	}
}

// A key does not follow a redirect to another host, and a POST does not become
// a GET.
func TestRedirectsAreNotFollowed(t *testing.T) {
	o := newOperator(t)
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("followed") }))
	defer other.Close()
	o.server(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, other.URL, http.StatusMovedPermanently)
	})
	r := o.run("", "stats")
	require.Equal(t, exitFailure, r.code)
	require.Contains(t, r.err, "redirects to "+other.URL)
}

func TestWhatServersSay(t *testing.T) {
	for _, c := range []struct {
		name, body string
		status     int
		code       int
		want       string
	}{
		{"refused key", `{"error":"API user or key is missing or wrong"}`, 401, exitAccess, "does not accept the API key"},
		{"role", `{"error":"no role"}`, 403, exitAccess, "no role"},
		{"slowed", `{"error":"too many wrong keys"}`, 429, exitAccess, "try again in 7 seconds"},
		{"bad request", `{"error":"serial: bad"}`, 400, exitUsage, "serial: bad"},
		{"missing", `{"error":"not found"}`, 404, exitNotFound, "not found"},
		{"conflict", `{"error":"exists"}`, 409, exitFailure, "exists"},
		{"another server's 404", `<html>`, 404, exitFailure, "there is no API at that address"},
		{"a proxy's error", `<html>`, 502, exitFailure, "the server answers 502 Bad Gateway"},
		{"no JSON", `<html>`, 200, exitFailure, "not what this version of nanoctl expects"},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := newOperator(t)
			o.server(func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Retry-After", "7")
				w.WriteHeader(c.status)
				_, _ = io.WriteString(w, c.body)
			})
			r := o.run("", "show", "x")
			require.Equal(t, c.code, r.code)
			require.Contains(t, r.err, c.want)
			require.Empty(t, r.out)
		})
	}
	o := newOperator(t)
	o.vars["NANOMDM_URL"], o.vars["NANOMDM_API"] = "http://127.0.0.1:1", "key"
	r := o.run("", "stats")
	require.Equal(t, exitFailure, r.code)
	require.Contains(t, r.err, "reaching http://127.0.0.1:1")
}

// Apple's answer is handed on, and is not taken for the server's own.
func TestEscrowUnlock(t *testing.T) {
	for _, c := range []struct {
		status   int
		body     string
		code     int
		out, err string
	}{
		{200, `{"code":200}`, 0, `{"code":200}`, ""},
		{403, `<html>no`, exitFailure, `<html>no`, "Apple answers with status 403"},
		{404, `{"error":"there is no push certificate"}`, exitNotFound, "", "there is no push certificate"},
		{400, `{"error":"guid: it is missing"}`, exitUsage, "", "guid: it is missing"},
	} {
		o := newOperator(t)
		o.server(func(w http.ResponseWriter, r *http.Request) {
			if r.FormValue("escrowKey") != "A-B" || r.FormValue("orgName") != "Org & Co" || r.Form.Has("meid") {
				t.Errorf("%s %v", r.URL, r.Form)
			}
			w.WriteHeader(c.status)
			_, _ = io.WriteString(w, c.body)
		})
		r := o.run("A-B\n", "escrow-unlock", "-escrow-key-file", "-", "-org-name", "Org & Co")
		require.Equal(t, c.code, r.code)
		require.Equal(t, c.out, r.out)
		require.Contains(t, r.err, c.err)
	}
}

// Following begins now, goes on where it was when the server was away, and
// asks it less and less often.
func TestFollowing(t *testing.T) {
	o := newOperator(t)
	var asked []string
	answers := []string{
		`{"events":[],"next":"7"}`, "503", "502", `{"events":[{"topic":"mdm.CheckOut","checkin_event":{"ids":{"id":"A"}},"cursor":"9"}],"next":"9"}`,
		"503", `{"events":[{"topic":"mdm.CheckOut","checkin_event":{"ids":{"id":"B"}},"cursor":"10"}],"next":"10"}`, "403",
	}
	o.server(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.FormValue("newest")+" "+r.FormValue("after")+" "+r.FormValue("wait"))
		answer := answers[0]
		answers = answers[1:]
		if status, err := strconv.Atoi(answer); err == nil {
			w.WriteHeader(status)
			return
		}
		_, _ = io.WriteString(w, answer)
	})
	r := o.run("", "events", "-f")
	require.Equal(t, exitAccess, r.code, "that does not pass")
	require.Equal(t, []string{"20  ", " 7 30s", " 7 30s", " 7 30s", " 9 30s", " 9 30s", " 10 30s"}, asked)
	require.Len(t, o.pauses, 3)
	require.Greater(t, o.pauses[1], o.pauses[0], "longer and longer")
	require.Less(t, o.pauses[2], o.pauses[1], "until the server was there")
	require.Regexp(t, `^mdm.CheckOut +A\nmdm.CheckOut +B\n$`, r.out)
}

// Texts of devices do not control the terminal.
// Texts of devices, of the server and of its errors do not steer the terminal,
// in any form of output: control characters, C1 ones included, and those that
// change the direction of writing.
func TestTerminalIsNotSteered(t *testing.T) {
	o := newOperator(t)
	o.width = 80
	const evil = `\u001b[2J\u202egnp.exe\u0007` + "\u009b2J\u2066\U000e0041"
	item := `{"id":"E","enrollment_id":"E","device_name":"E","serial_number":"E","name":"E","tag":"E","who":"E","action":"E","target":"E","detail":"E","role":"E",
"command_uuid":"E","request_type":"E","state":"E","status":"E","topic":"E","url":"E","version":"E","listen":"E","error":"E","identifier":"E","short_version":"E",
"diagnosis":["E"],"tags":["E"],"channels":["E"],"result":{"E":"E"},"checkin_event":{"ids":{"id":"E"},"udid":"E"},"last_error":"E","type":"E","model":"E","os_version":"E"}`
	lists := ""
	for _, name := range []string{"enrollments", "commands", "keys", "records", "sinks", "pushcerts", "replicas", "applications", "events", "queue"} {
		lists += `,"` + name + `":[` + item + `]`
	}
	answer := strings.ReplaceAll(item[:len(item)-1]+lists+`,"items":[`+item+`]}`, `E"`, evil+`"`)
	failing := false
	o.server(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case failing:
			w.WriteHeader(http.StatusBadRequest)
			_, _ = io.WriteString(w, `{"error":"`+evil+`"}`)
		case r.URL.Query().Get("raw") != "":
			_, _ = io.WriteString(w, "<string>gnp.exe\x1b[2J\u202e\u009b</string>\n")
		default:
			_, _ = io.WriteString(w, answer)
		}
	})
	steering := regexp.MustCompile(`[\x00-\x08\x0b-\x1f\x7f\x{80}-\x{9f}\x{202a}-\x{202e}\x{2066}-\x{2069}\x{e0000}-\x{e007f}]`)
	shown := 0
	for _, command := range []string{"enrollments ls", "show a", "queue a", "apps a", "tags ls", "commands ls", "status u", "result u a", "result u a -raw", "keys ls", "audit",
		"sinks ls", "pushcert ls", "events", "replicas", "stats", "version", "push a", "clear a -yes", "escrow-unlock -serial S -product-type P -org O -guid G -escrow-key K -topic t"} {
		for _, format := range []string{"table", "wide", "json"} {
			for _, failing = range []bool{false, true} {
				r := o.run("", append(strings.Fields(command), "-o", format)...)
				require.NotRegexp(t, steering, r.out, "%s -o %s", command, format)
				require.NotRegexp(t, steering, r.err, "%s -o %s", command, format)
				if strings.Contains(r.out+r.err, "gnp.exe") {
					shown++
				}
			}
		}
	}
	require.Greater(t, shown, 60, "the texts are shown at all")
}

func TestFlagsMayStandAnywhere(t *testing.T) {
	o := newOperator(t)
	want := o.run("", "command", "-uuid", "u", "DeviceInformation", "-query", "OSVersion").out
	require.Contains(t, want, "<string>OSVersion</string>")
	for _, args := range [][]string{
		{"command", "DeviceInformation", "--query", "OSVersion", "--uuid", "u"},
		{"command", "DeviceInformation", "-query=OSVersion", "-u", "u"},
		{"command", "-u=u", "--", "DeviceInformation", "OSVersion"},
	} {
		require.Equal(t, want, o.run("", args...).out, args)
	}
}

// Everything that cmdr.py makes.
func TestCommandPlists(t *testing.T) {
	o := newOperator(t)
	profile := filepath.Join(o.dir, "p.mobileconfig")
	require.NoError(t, os.WriteFile(profile, mdmtest.NewProfile("org.example.p", "P"), 0o600))
	for _, c := range []struct {
		args string
		want []string
	}{
		{"DeviceInformation", nil},
		{"DeviceInformation OSVersion Model", []string{"<key>Queries</key><array><string>OSVersion</string><string>Model</string></array>"}},
		{"InstallProfile " + profile, []string{"<key>Payload</key><data>PD94bWwg"}},
		{"RemoveProfile org.example.p", []string{"<key>Identifier</key><string>org.example.p</string>"}},
		{"EraseDevice 123456", []string{"<key>PIN</key><string>123456</string>"}},
		{"DeviceLock 123456 -set Message=<Lost&found>", []string{"<key>PIN</key><string>123456</string>", "&lt;Lost&amp;found&gt;"}},
		{"DeviceLock", nil},
		{"ScheduleOSUpdate InstallASAP -version 15.1 -key K -deferrals 3 -priority High", []string{
			"<key>Updates</key><array><dict>", "<key>InstallAction</key><string>InstallASAP</string>", "<key>ProductVersion</key><string>15.1</string>",
			"<key>ProductKey</key><string>K</string>", "<key>MaxUserDeferrals</key><integer>3</integer>", "<key>Priority</key><string>High</string>",
		}},
		{"Settings -allowbst", []string{"<key>Item</key><string>MDMOptions</string>", "<key>BootstrapTokenAllowed</key><true/>"}},
		{"AccountConfiguration -set SkipPrimarySetupAccountCreation:=true", []string{"<key>SkipPrimarySetupAccountCreation</key><true/>"}},
		{"SomethingNew -keys {\"N\":1,\"R\":1.5,\"L\":[\"a\",{\"b\":false}],\"Big\":9007199254740993}", []string{
			"<key>N</key><integer>1</integer>", "<key>R</key><real>1.5</real>", "<array><string>a</string><dict><key>b</key><false/></dict></array>",
			"<integer>9007199254740993</integer>",
		}},
		{"SomethingNew -data Blob=" + profile, []string{"<key>Blob</key><data>PD94bWwg"}},
	} {
		r := o.run("", append([]string{"command"}, strings.Fields(c.args)...)...)
		require.Zero(t, r.code, "%s: %s", c.args, r.err)
		cmd, err := mdm.DecodeCommand([]byte(r.out))
		require.NoError(t, err, c.args)
		require.Equal(t, strings.Fields(c.args)[0], cmd.RequestType)
		require.Len(t, cmd.CommandUUID, 36)
		for _, want := range c.want {
			require.Contains(t, strings.ReplaceAll(r.out, "\n", ""), want, c.args)
		}
	}
	for _, requestType := range simpleCommands {
		r := o.run("", "command", requestType, "-u", "mine")
		require.Zero(t, r.code, r.err)
		cmd, err := mdm.DecodeCommand([]byte(r.out))
		require.NoError(t, err)
		require.Equal(t, requestType, cmd.RequestType)
		require.Equal(t, "mine", cmd.CommandUUID)
	}
	for range 20 {
		cmd, err := mdm.DecodeCommand([]byte(o.run("", "command", "-r").out))
		require.NoError(t, err)
		require.Contains(t, harmlessCommands, cmd.RequestType)
	}
}

func TestAges(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"7d": 7 * 24 * time.Hour, "1d12h": 36 * time.Hour, "2w": 14 * 24 * time.Hour, "1w1d1h": 193 * time.Hour, "90m": 90 * time.Minute, "0": 0, "0d": 0,
	} {
		got, err := parseAge(text)
		require.NoError(t, err, text)
		require.Equal(t, want, got, text)
	}
	for _, text := range []string{"", "7", "d", "-7d", "7d-1h", "1h7d", "7 d", "1.5d", "999999999d"} {
		_, err := parseAge(text)
		require.Error(t, err, text)
	}
}

// commandServer answers for some devices and keeps what is queued.
func (o *operator) commandServer(devices int) (queued *[]string) {
	queued = new([]string)
	o.server(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Method == "GET" && r.URL.Path == "/v1/enrollments":
			list := []string{}
			if r.URL.Query().Get("type") == "Device" {
				for i := range devices {
					list = append(list, fmt.Sprintf(`{"id":"U%d","serial_number":"C%d","product_name":"MacBookPro18,3","os_version":"15.1"}`, i, i))
				}
			}
			_, _ = io.WriteString(w, `{"enrollments":[`+strings.Join(list, ",")+`]}`)
		case r.Method == "GET":
			_, _ = io.WriteString(w, `{"id":"U1","device_name":"Mac of Ann","serial_number":"C02X","product_name":"MacBookPro18,3","os_version":"15.1"}`)
		default:
			body, _ := io.ReadAll(r.Body)
			*queued = append(*queued, r.Method+" "+r.URL.Path+" "+string(body))
			_, _ = io.WriteString(w, `{"status":{"U1":{}}}`)
		}
	})
	return queued
}

// dangerousCommands are sound commands whose effect cannot be undone.
var dangerousCommands = map[string]string{
	"send EraseDevice": "erase", "send DeviceLock -set PIN=123456": "lock", "remove-profile org.example.x": "remove",
	"send ClearPasscode -keys {\"UnlockToken\":\"eA==\"} -force": "clear", "send EnableLostMode -set Message=m -force": "lock",
	"send ClearRestrictionsPassword -force": "clear", "delete": "delete",
}

// Commands that cannot be undone have to be confirmed by typing: neither yes nor -yes is enough.
func TestDangerHasToBeTyped(t *testing.T) {
	o := newOperator(t)
	queued := o.commandServer(160)
	for command, word := range dangerousCommands {
		args := append(strings.Fields(command), "C02X")
		for _, answer := range []string{"", "n\n", "y\n", "yes\n", "C02\n", "U1\n", word + " 1\n"} {
			r := o.run(answer, append(args, "-yes")...)
			require.Equal(t, exitDeclined, r.code, "%s %q: %s", command, answer, r.err)
			require.Contains(t, r.err, "U1 (Mac of Ann, C02X). This cannot be undone.\nType C02X to go on:")
			require.Empty(t, *queued)
		}
		require.Zero(t, o.run("C02X\n", args...).code)
		require.Zero(t, o.run("", append(args, "-confirm", "C02X")...).code)
		require.Len(t, *queued, 2)
		*queued = nil

		all := append(strings.Fields(command), "-all")
		for _, answer := range []string{"", "y\n", word + "\n", word + " 159\n", "160\n", "C02X\n"} {
			r := o.run(answer, append(all, "-yes")...)
			require.Equal(t, exitDeclined, r.code, "%s %q: %s", command, answer, r.err)
			require.Contains(t, r.err, "160 enrollments. This cannot be undone.\nType "+word+" 160 to go on:")
			require.Empty(t, *queued)
		}
		r := o.run("", append(all, "-confirm", word+" 161")...)
		require.Equal(t, exitDeclined, r.code)
		require.Contains(t, r.err, fmt.Sprintf(`"%s 161" was given where "%s 160" is needed`, word, word))
		require.Empty(t, *queued)
		require.Zero(t, o.run(word+" 160\n", all...).code)
		require.NotEmpty(t, *queued)
		*queued = nil
	}
	require.Contains(t, o.run("", "send", "EraseDevice", "C02X").err, `in a script give -confirm "C02X"`)
}

// Commands that interrupt people ask first; harmless ones do not, unless it
// goes to many.
func TestConfirmation(t *testing.T) {
	o := newOperator(t)
	queued := o.commandServer(101)
	for _, answer := range []string{"", "n\n", "\n", "yess\n", "U1\n"} {
		r := o.run(answer, "send", "RestartDevice", "C02X")
		require.Equal(t, exitDeclined, r.code)
		require.Contains(t, r.err, "RestartDevice goes to U1 (Mac of Ann, C02X). Go on? [y/N]")
	}
	require.Empty(t, *queued)
	require.Zero(t, o.run("y\n", "send", "RestartDevice", "C02X").code)
	require.Zero(t, o.run("", "send", "RestartDevice", "C02X", "-yes").code)
	require.Zero(t, o.run("", "send", "ProfileList", "C02X").code)
	require.Len(t, *queued, 3)
	require.Equal(t, exitDeclined, o.run("", "send", "ProfileList", "-all").code)
	require.Len(t, *queued, 3)
}

// Every request type that Apple's schemas have was looked at: what erases,
// locks, removes management or clears is dangerous.
func TestRisks(t *testing.T) {
	for _, requestType := range schema.RequestTypes() {
		r, word := riskOf(requestType)
		require.Equal(t, r == dangerous, word != "", requestType)
		for _, part := range []string{"Erase", "Lock", "Clear", "Remove", "Delete", "ShutDown", "Restart", "Set", "Rotate"} {
			if strings.HasPrefix(requestType, part) || strings.HasSuffix(requestType, part) {
				switch requestType {
				case "Settings", "ClearActivationLockBypassCode", "VerifyRecoveryLock":
					require.Equal(t, harmless, r, requestType)
				default:
					require.NotEqual(t, harmless, r, requestType)
				}
			}
		}
	}
}

// Cancelling for many is asked about.
func TestCancellingForManyIsAskedAbout(t *testing.T) {
	o := newOperator(t)
	waiting, cancelled := 120, 0
	o.server(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == "DELETE" {
			cancelled++
		}
		_, _ = fmt.Fprintf(w, `{"request_type":"ProfileList","states":{"queued":%d,"acknowledged":500},"cancelled":%d}`, waiting, waiting)
	})
	r := o.run("n\n", "cancel", "x")
	require.Equal(t, exitDeclined, r.code)
	require.Contains(t, r.err, "ProfileList x is cancelled for 120 enrollments. Go on?")
	require.Zero(t, cancelled)
	require.Zero(t, o.run("", "cancel", "x", "-yes").code)
	require.Equal(t, 1, cancelled)
	waiting = 100
	require.Zero(t, o.run("", "cancel", "x").code)
	require.Equal(t, 2, cancelled)
}

// A command that its devices would refuse is not queued.
func TestCommandsAreLookedAt(t *testing.T) {
	o := newOperator(t)
	queued := o.commandServer(3)
	write := func(name string, content []byte) string {
		path := filepath.Join(o.dir, name)
		require.NoError(t, os.WriteFile(path, content, 0o600))
		return path
	}
	profile := mdmtest.NewProfile("org.example.p", "P")
	signed, err := pkcs7.NewSignedData(profile)
	require.NoError(t, err)
	envelope, err := signed.Finish()
	require.NoError(t, err)
	wrongSigned, err := pkcs7.NewSignedData([]byte("text"))
	require.NoError(t, err)
	wrongEnvelope, err := wrongSigned.Finish()
	require.NoError(t, err)
	other := []byte(`<plist version="1.0"><dict><key>A</key><string>b</string></dict></plist>`)
	for _, c := range []struct{ args, want string }{
		{"send DeviceInfo C02X", "did you mean DeviceInformation?"},
		{"send InstallProfile C02X", "Payload: this required key is missing"},
		{"send InstallProfile C02X -set Payload:=1", "Payload: the type is integer, and data is expected"},
		{"send DeviceLock C02X -set Pin=123456", "Pin: there is no such key; did you mean PIN?"},
		{"send DeviceInformation C02X -query OsVerson", "did you mean OSVersion?"},
		{"send PlayLostModeSound C02X", "PlayLostModeSound: macOS does not have it: U1 (Mac of Ann, C02X)"},
		{"send PlayLostModeSound -all", "macOS does not have it: 3 enrollments, such as U0 (C0)"},
		{"install-profile " + write("empty", nil) + " C02X", "the profile is empty"},
		{"install-profile " + write("text", []byte("hello")) + " C02X", "neither a property list nor signed (CMS)"},
		{"install-profile " + write("other", other) + " C02X", "has no PayloadContent"},
		{"install-profile " + write("der", []byte{0x30, 3, 2, 1, 1}) + " C02X", "neither a property list nor signed (CMS)"},
		{"install-profile " + write("wrong.p7", wrongEnvelope) + " C02X", "neither a property list nor signed (CMS)"},
		{"install-profile " + write("binary", []byte("bplist00x")) + " C02X", "plutil -convert xml1"},
		{"install-profile " + write("pem", []byte("-----BEGIN PKCS7-----\n")) + " C02X", "openssl pkcs7 -outform DER"},
		{"send InstallProfile -data Payload=" + write("other2", other) + " C02X", "has no PayloadContent"},
	} {
		r := o.run("", strings.Fields(c.args)...)
		require.Equal(t, exitUsage, r.code, "%s: %s", c.args, r.err)
		require.Contains(t, r.err, c.want, c.args)
		require.Contains(t, r.err, "Nothing was queued. -force queues it all the same.")
		require.Empty(t, *queued, c.args)
		r = o.run("", append(strings.Fields(c.args), "-force", "-yes")...)
		if !strings.Contains(c.args, "DeviceLock") {
			require.Zero(t, r.code, "%s: %s", c.args, r.err)
			require.Len(t, *queued, 1)
		}
		*queued = nil
	}
	for _, args := range []string{
		"send DeviceInformation C02X", "install-profile " + write("good", profile) + " C02X", "install-profile " + write("signed", envelope) + " C02X",
	} {
		r := o.run("", strings.Fields(args)...)
		require.Zero(t, r.code, "%s: %s", args, r.err)
	}
	require.Len(t, *queued, 3)
}

// An interruption ends a fan-out between two calls and says what was queued.
func TestInterruption(t *testing.T) {
	o := newOperator(t)
	ctx, interrupt := context.WithCancel(t.Context())
	calls := 0
	o.server(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == "GET" {
			if r.URL.Query().Get("type") != "Device" {
				_, _ = io.WriteString(w, `{"enrollments":[]}`)
				return
			}
			var list []string
			for range 500 {
				list = append(list, `{"id":"`+uuid.NewString()+`"}`)
			}
			_, _ = io.WriteString(w, `{"enrollments":[`+strings.Join(list, ",")+`]}`)
			return
		}
		if calls++; calls == 1 {
			interrupt()
		}
		_, _ = io.WriteString(w, `{"status":{"U1":{}}}`)
	})
	r := o.runContext(ctx, "", "send", "ProfileList", "-all", "-yes")
	require.Equal(t, exitInterrupted, r.code, r.err)
	require.Equal(t, 1, calls, "the call under way ends, and no other begins")
	require.Contains(t, r.out, "queued for 250\n")
	require.Contains(t, r.err, "250 of 500 enrollments were not reached")
}

func TestInterruptionOfAnythingElse(t *testing.T) {
	o := newOperator(t)
	ctx, interrupt := context.WithCancel(t.Context())
	o.server(func(_ http.ResponseWriter, r *http.Request) {
		interrupt()
		<-r.Context().Done()
	})
	r := o.runContext(ctx, "", "keys", "rm", "x")
	require.Equal(t, exitInterrupted, r.code)
	require.Equal(t, "nanoctl: interrupted; what was asked of the server last it may have done\n", r.err)
}

// More enrollments than were confirmed are never reached.
func TestSelectionIsWhatWasConfirmed(t *testing.T) {
	o := newOperator(t)
	var types []string
	o.server(func(w http.ResponseWriter, r *http.Request) {
		require.Equal(t, "GET", r.Method, "nothing was confirmed")
		require.Equal(t, "true", r.URL.Query().Get("enabled"))
		types = append(types, r.URL.Query().Get("type"))
		list := strings.Repeat(`{"id":"x"},`, askAbove/2)
		_, _ = io.WriteString(w, `{"enrollments":[`+list+`{"id":"x"}]}`)
	})
	r := o.run("n\n", "send", "ProfileList", "-all")
	require.Equal(t, exitDeclined, r.code)
	require.Contains(t, r.err, "ProfileList goes to 102 enrollments. Go on?")
	require.Equal(t, deviceTypes, types)
}

func TestBashCompletes(t *testing.T) {
	script := newOperator(t).run("", "completion", "bash").out
	complete := func(words ...string) []string {
		cmd := exec.Command("bash", "-c", script+`
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _nanoctl; printf '%s\n' "${COMPREPLY[@]}"`, "bash", "nanoctl")
		cmd.Args = append(cmd.Args, words...)
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, string(out))
		return strings.Fields(string(out))
	}
	require.Equal(t, []string{"enrollments", "enable"}, complete("en"))
	require.Equal(t, []string{"put", "ls", "rm"}, complete("pushcert", ""))
	require.Equal(t, []string{"-stale"}, complete("enrollments", "ls", "-st"))
	require.Equal(t, []string{"--stale"}, complete("enrollments", "ls", "--st"))
	require.Contains(t, complete("send", "X", "-"), "-wait")
}

// The scripts of all shells know each command, and are sound where the shell
// is there to say so.
func TestCompletionScripts(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		script := newOperator(t).run("", "completion", shell).out
		for _, c := range commands() {
			for word := range strings.SplitSeq(c.name, " ") {
				require.Regexp(t, `\b`+regexp.QuoteMeta(word)+`\b`, script, shell)
			}
		}
		if _, err := exec.LookPath(shell); err != nil {
			continue
		}
		file := filepath.Join(t.TempDir(), "script")
		require.NoError(t, os.WriteFile(file, []byte(script), 0o600))
		out, err := exec.Command(shell, "-n", file).CombinedOutput()
		require.NoError(t, err, string(out))
	}
}

var update = flag.Bool("update", false, "write docs/nanoctl.md")

func TestManual(t *testing.T) {
	const file = "../../docs/nanoctl.md"
	page := manual(commands())
	if *update {
		require.NoError(t, os.WriteFile(file, []byte(page), 0o644))
	}
	committed, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, page, string(committed), "run: go test ./cmd/nanoctl -run TestManual -update")
}

// Each command has help with an example that begins with its own name.
func TestHelp(t *testing.T) {
	o := newOperator(t)
	all := o.run("", "help")
	require.Zero(t, all.code)
	for _, c := range commands() {
		require.Contains(t, all.out, "  "+c.name+" ")
		help := o.run("", append(strings.Fields(c.name), "-help")...)
		require.Zero(t, help.code, c.name)
		require.Contains(t, help.out, "Example:\n  ")
		require.True(t, strings.Contains(c.example, "nanoctl "+c.name), c.name)
		require.Equal(t, help.out, o.run("", append([]string{"help"}, strings.Fields(c.name)...)...).out)
	}
}

// The examples, here and in the documentation, are commands and flags that
// exist.
func TestExamples(t *testing.T) {
	for _, c := range commands() {
		require.Positive(t, requireCommands(t, c.example), c.name)
	}
	pages, err := filepath.Glob("../../docs/*.md")
	require.NoError(t, err)
	seen := 0
	fenced := regexp.MustCompile("(?s)```.*?```|`nanoctl [^`]*`")
	for _, page := range append(pages, "../../README.md") {
		text, err := os.ReadFile(page)
		require.NoError(t, err)
		if filepath.Base(page) == "nanoctl.md" {
			continue // made of the above
		}
		for _, code := range fenced.FindAllString(string(text), -1) {
			seen += requireCommands(t, strings.Trim(code, "`"))
		}
	}
	require.Greater(t, seen, 20, "the search looked at the wrong place")
}

// requireCommands checks the commands of nanoctl in shell lines and returns
// how many there are.
func requireCommands(t *testing.T, lines string) int {
	t.Helper()
	n := 0
	for line := range strings.SplitSeq(lines, "\n") {
		for _, part := range regexp.MustCompile(`[|>]|<\(`).Split(line, -1) {
			words := strings.Fields(strings.TrimSuffix(strings.TrimSpace(part), ")"))
			if len(words) < 2 || words[0] != "nanoctl" && words[0] != "./bin/nanoctl" {
				continue
			}
			n++
			c, rest := find(commands(), words[1:])
			require.NotNil(t, c, line)
			positional, err := parseAnywhere(flagsOf(c, new(env)), rest)
			require.NoError(t, err, line)
			if len(positional) > 0 { // a name in a sentence has none
				require.NoError(t, c.checkArity(positional), line)
			}
		}
	}
	return n
}

// manual renders docs/nanoctl.md.
func manual(table []command) string {
	var b strings.Builder
	b.WriteString(manualHead)
	b.WriteString("\n## All commands\n\n| command | |\n|---|---|\n")
	for _, c := range table {
		fmt.Fprintf(&b, "| [`nanoctl %s`](#%s) | %s |\n", c.name, strings.ReplaceAll("nanoctl "+c.name, " ", "-"), c.short)
	}
	common := flag.NewFlagSet("", flag.ContinueOnError)
	new(env).globalFlags(common)
	b.WriteString("\nFlags that every command has:\n\n")
	manualFlags(&b, common, nil)
	for i := range table {
		c := &table[i]
		fmt.Fprintf(&b, "\n## nanoctl %s\n\n%s.\n", c.name, c.short)
		if c.long != "" {
			fmt.Fprintf(&b, "\n%s\n", c.long)
		}
		fmt.Fprintf(&b, "\n```\n%s\n```\n\n`%s`\n", c.example, strings.TrimSpace("nanoctl "+c.name+" [FLAGS] "+c.args))
		manualFlags(&b, flagsOf(c, new(env)), common)
	}
	return b.String()
}

func manualFlags(b *strings.Builder, flags, without *flag.FlagSet) {
	first := true
	flags.VisitAll(func(f *flag.Flag) {
		if without != nil && without.Lookup(f.Name) != nil {
			return
		}
		if first && without != nil {
			b.WriteString("\n| flag | default | meaning |\n|---|---|---|\n")
		} else if first {
			b.WriteString("| flag | default | meaning |\n|---|---|---|\n")
		}
		first = false
		arg, what := flag.UnquoteUsage(f)
		def := ""
		if f.DefValue != "" && f.DefValue != "false" && f.DefValue != "0" {
			def = "`" + f.DefValue + "`"
		}
		fmt.Fprintf(b, "| `%s` | %s | %s |\n", strings.TrimSpace("-"+f.Name+" "+arg), def, strings.ReplaceAll(what, "|", `\|`))
	})
}

const manualHead = `# nanoctl

<!-- Generated from the table in cmd/nanoctl/commands.go:
     go test ./cmd/nanoctl -run TestManual -update -->

The operator's command line: everything that the HTTP API does, for people and for
scripts. It is one static binary and needs nothing on the machine.

## Where the server is, and the key

From the environment (` + "`NANOMDM_URL` and `NANOMDM_API`" + ` do, too; nanoctl's own go first):

` + "```" + `
export NANOCTL_URL=https://mdm.example.org
export NANOCTL_API=the-key
` + "```" + `

or from a context, of which there may be one for each server:

` + "```" + `
nanoctl context add prod -url https://mdm.example.org -key-file prod.key
nanoctl context add lab -url https://lab.example.org -key-file lab.key -ca-file lab-ca.pem
nanoctl context use prod
nanoctl stats -context lab
` + "```" + `

or from the file ` + "`nanoctl/config`" + ` in your configuration folder (` + "`~/.config`" + ` on Linux,
` + "`~/Library/Application Support`" + ` on a Mac), which nobody but you may read (mode 0600, else it
is refused):

` + "```" + `
url = https://mdm.example.org
key = the-key
` + "```" + `

Flags go before the environment, which goes before the context in use, which goes before the file.
` + "`-ca-file`" + ` is for a server whose certificate is of your own CA. The key is the
server's ` + "`-api`" + `, or better a named key with a role: ` + "`nanoctl keys create`" + `.

## How it speaks

- Enrollments are named by id or by serial number, or selected with ` + "`-all`" + ` and filters. A
  selection is of enabled devices unless ` + "`-enabled` or `-type`" + ` says otherwise.
- Flags may stand before, between and after arguments, with one dash or two.
- Tables are for people: they fit the terminal, and in a pipe they have all columns; ` + "`-o wide`" + ` has all
  columns on a terminal, too. ` + "`-o json`" + ` is for programs and is what the server said.
- Times are ` + "`2026-03-01`, `2026-03-01T12:00:00Z`" + `, or how long ago: ` + "`7d`, `12h`, `1d12h`" + `.
- Before commands that erase, lock, remove or clear, and before deleting, the device's serial number
  has to be typed, or for several a word and their number, such as ` + "`erase 160`" + `. ` + "`-confirm 'erase 160'`" + `
  answers in a script.
- It asks before commands that interrupt people, and before anything that reaches more than 100
  enrollments. ` + "`-yes`" + ` goes on without asking; without a terminal and without ` + "`-yes`" + ` nothing is
  done. Exactly those enrollments are reached that the question counted.
- A command is compared with Apple's schemas before it is queued, and a profile is looked at. One that
  its devices would refuse is refused here, with the reason; ` + "`-force`" + ` queues it all the same.
- On a terminal, work on many enrollments shows a progress bar. Ctrl-C lets the request that is
  under way end, says how many were reached, and leaves with 130; a second one leaves at once.

## Exit codes

| code | meaning |
|---|---|
| 0 | done |
| 1 | the server or the network failed, or refused |
| 2 | the command line, the configuration or what it asks for is wrong |
| 3 | no such enrollment, command, certificate or name |
| 4 | some enrollments failed, others did not |
| 5 | a question was answered with no, or there was nobody to ask |
| 6 | ` + "`-wait`" + `: a device reported an error, or the command ended another way |
| 7 | the API key is not accepted, or may not do that |
| 8 | ` + "`-wait`" + `: not all devices have answered in time |
| 130 | interrupted |

## In place of cmdr.py

` + "`nanoctl command`" + ` prints the plist of a command, with the arguments of NanoMDM's cmdr.py:

` + "```" + `
nanoctl command -r | curl -T - -u nanomdm:KEY https://mdm.example.org/v1/enqueue/UDID
` + "```" + `

Keys are given with ` + "`-set Key=text`, `-set Key:=JSON` for numbers, truth values, lists and objects,\n`-data Key=FILE` for data, and `-keys '{...}'`" + ` for all at once.
`

func TestProgressIsForTerminals(t *testing.T) {
	var out bytes.Buffer
	p := (&env{err: &out}).progress()
	p.bar("queueing", 1, 2, "")
	p.end()
	require.Empty(t, out.String())

	p.w = &out
	p.bar("queueing", 250, 500, "")
	p.bar("queueing", 251, 500, "") // too soon
	p.bar("queueing", 500, 500, "1/s")
	p.end()
	require.Equal(t, "\rqueueing [##########..........] 250 of 500\rqueueing [####################] 500 of 500, 1/s\n", out.String())
}

func TestValuesForPeople(t *testing.T) {
	o := newOperator(t)
	o.server(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, `{"enrollment_id":"A","status":"Acknowledged","result":{"n":12000000,"big":9007199254740993,"real":0.87,"no":[],"none":{},"list":["a",["b"],{"x":1,"y":{"z":true}},{}],"evil":"\u001b["}}`)
	})
	require.Equal(t, `A: Acknowledged
  big: 9007199254740993
  evil: ?[
  list:
    - a
    - - b
    - x: 1
      y:
        z: true
  n: 12000000
  no: none
  none: none
  real: 0.87
`, o.run("", "result", "x", "A").out)
}

func TestPushCertificateExpiry(t *testing.T) {
	for after, want := range map[time.Duration]string{
		-50 * time.Hour: "EXPIRED 2d ago", 10*24*time.Hour + time.Hour: "renew it, ends in 10d", 200*24*time.Hour + time.Hour: "in 200d",
	} {
		at := time.Now().Add(after)
		require.Equal(t, want, (&pushCert{NotAfter: &at}).expiry())
	}
}
