package httpmdm_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/groob/plist"
	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/certverify"
	"github.com/nanomdm/nanomdm/http/httpmdm"
	"github.com/nanomdm/nanomdm/http/requestlog"
	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/service"
	"github.com/nanomdm/nanomdm/service/certauth"
	"github.com/nanomdm/nanomdm/service/core"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
)

// site is a device side over a real store, with a CA whose devices it knows.
type site struct {
	t     *testing.T
	ca    *mdmtest.CA
	store *sqlstore.Store
	url   string

	handler *httpmdm.Handler
}

type siteConfig struct {
	core     core.Config
	http     httpmdm.Config
	auth     certauth.Config
	identity func(v httpmdm.Verifier) *httpmdm.Identity
	start    func(*httptest.Server)
}

func newSite(t *testing.T, cfg siteConfig) *site {
	t.Helper()
	ca, err := mdmtest.NewCA()
	require.NoError(t, err)
	verifier, err := certverify.New(ca.PEM(), nil, certverify.Config{})
	require.NoError(t, err)
	store, err := sqlstore.Open(t.Context(), sqlstore.Config{Driver: "sqlite", DSN: filepath.Join(t.TempDir(), "mdm.db")})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })

	if cfg.identity == nil {
		cfg.identity = httpmdm.SignatureIdentity
	}
	cfg.http.Pins, cfg.http.Refusals = store, store
	h := httpmdm.New(service.Chain(core.New(store, cfg.core), certauth.New(cfg.auth)), cfg.identity(verifier), cfg.http)
	mux := http.NewServeMux()
	mux.Handle("/mdm", h.MDM(httpmdm.Any))
	mux.Handle("/checkin", h.MDM(httpmdm.Checkins))
	mux.Handle("/reports", h.MDM(httpmdm.Reports))
	mux.Handle("/migration", h.Migration(core.New(store, cfg.core)))
	srv := httptest.NewUnstartedServer(requestlog.Middleware(slog.New(slog.DiscardHandler), requestlog.Config{}, mux))
	if cfg.start != nil {
		cfg.start(srv)
	} else {
		srv.Start()
	}
	t.Cleanup(srv.Close)
	return &site{t: t, ca: ca, store: store, url: srv.URL, handler: h}
}

func (s *site) identity(name string) *mdmtest.Identity {
	s.t.Helper()
	id, err := s.ca.Issue(name)
	require.NoError(s.t, err)
	return id
}

func (s *site) device(name string, cfg mdmtest.Config) *mdmtest.Device {
	s.t.Helper()
	if cfg.UDID == "" {
		cfg.UDID = name
	}
	d, err := mdmtest.NewDevice(s.url+"/mdm", s.identity(name), cfg)
	require.NoError(s.t, err)
	return d
}

func (s *site) enrolled(name string, cfg mdmtest.Config) *mdmtest.Device {
	s.t.Helper()
	d := s.device(name, cfg)
	require.NoError(s.t, d.Enroll(s.t.Context()))
	return d
}

func (s *site) enqueue(uuid, requestType string, ids ...string) {
	s.t.Helper()
	cmd, err := mdm.DecodeCommand(mdmtest.NewCommand(uuid, requestType, nil))
	require.NoError(s.t, err)
	failed, err := s.store.Enqueue(s.t.Context(), storage.Scope{}, &storage.Enqueue{Command: cmd, IDs: ids})
	require.NoError(s.t, err)
	require.Empty(s.t, failed)
}

func message(kind, udid, more string) []byte {
	return []byte(fmt.Sprintf(`<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<plist version="1.0"><dict><key>MessageType</key><string>%s</string><key>UDID</key><string>%s</string>%s</dict></plist>`, kind, udid, more))
}

func report(udid, status, uuid, more string) []byte {
	if uuid != "" {
		more += "<key>CommandUUID</key><string>" + uuid + "</string>"
	}
	return []byte(fmt.Sprintf(`<?xml version="1.0" encoding="UTF-8"?>
<plist version="1.0"><dict><key>Status</key><string>%s</string><key>UDID</key><string>%s</string>%s</dict></plist>`, status, udid, more))
}

const (
	checkinType = "application/x-apple-aspen-mdm-checkin"
	reportType  = "application/x-apple-aspen-mdm"
)

func TestEnrollPollReport(t *testing.T) {
	for _, kind := range []mdmtest.Kind{mdmtest.Mac, mdmtest.IPhone, mdmtest.IPad, mdmtest.SharedIPad, mdmtest.UserEnrollment} {
		t.Run(fmt.Sprint(kind), func(t *testing.T) {
			s := newSite(t, siteConfig{})
			d := s.enrolled("00008020-000915083C80012E", mdmtest.Config{Kind: kind})
			channels := []*mdmtest.Channel{d.Channel}
			if kind != mdmtest.IPhone && kind != mdmtest.IPad {
				u := d.User("alice")
				require.NoError(t, u.TokenUpdate(t.Context()))
				channels = append(channels, u)
			}
			for i, c := range channels {
				first, second := fmt.Sprintf("0001_DeviceLock_%d", i), fmt.Sprintf("second-%d", i)
				s.enqueue(first, "ProfileList", c.EnrollmentID())
				s.enqueue(second, "DeviceInformation", c.EnrollmentID())
				visit, err := c.Poll(t.Context())
				require.NoError(t, err)
				require.Len(t, visit.Exchanges, 2)
				require.Equal(t, first, visit.Exchanges[0].Command.UUID)
				require.Equal(t, second, visit.Exchanges[1].Command.UUID)
				visit, err = c.Poll(t.Context())
				require.NoError(t, err)
				require.Empty(t, visit.Exchanges)
			}
		})
	}
}

func TestReplies(t *testing.T) {
	s := newSite(t, siteConfig{})
	d := s.enrolled("D1", mdmtest.Config{})
	raw := mdmtest.NewCommand("C1", "TopSecretNewCommand", func(p *mdmtest.Plist) {})
	cmd, err := mdm.DecodeCommand(raw)
	require.NoError(t, err)

	resp, err := d.Do(t.Context(), "/mdm", reportType, report("D1", "Idle", "", ""))
	require.NoError(t, err)
	require.Equal(t, 200, resp.Status)
	require.Empty(t, resp.Body, "an empty queue is zero bytes, not an empty property list")

	_, err = s.store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: cmd, IDs: []string{"D1"}})
	require.NoError(t, err)
	resp, err = d.Do(t.Context(), "/mdm", reportType, report("D1", "Idle", "", ""))
	require.NoError(t, err)
	require.Equal(t, raw, resp.Body, "the operator's bytes, unchanged")
	require.Equal(t, "application/xml; charset=UTF-8", resp.Header.Get("Content-Type"))
}

func TestContentTypes(t *testing.T) {
	s := newSite(t, siteConfig{})
	d := s.enrolled("D1", mdmtest.Config{})
	idle := report("D1", "Idle", "", "")
	get := message("GetBootstrapToken", "D1", "")
	for _, c := range []struct {
		name, path, contentType string
		body                    []byte
		want                    int
	}{
		{"parameters and case", "/mdm", "Application/X-Apple-Aspen-MDM; charset=UTF-8", idle, 200},
		{"check-in with parameters", "/mdm", "application/x-apple-aspen-mdm-checkin;x=y", get, 200},
		{"missing, report", "/mdm", "", idle, 200},
		{"missing, check-in", "/mdm", "", get, 200},
		{"report sent as check-in", "/mdm", checkinType, idle, 400},
		{"check-in sent as report", "/mdm", reportType, get, 400},
		{"check-in on the report path", "/reports", checkinType, get, 400},
		{"report on the check-in path", "/checkin", reportType, idle, 400},
		{"check-in on its path", "/checkin", checkinType, get, 200},
		{"report on its path", "/reports", reportType, idle, 200},
	} {
		t.Run(c.name, func(t *testing.T) {
			resp, err := d.Do(t.Context(), c.path, c.contentType, c.body)
			require.NoError(t, err)
			require.Equal(t, c.want, resp.Status)
		})
	}
}

// TestMethods: NanoMDM does not look at the method. Here, too, a message counts
// whatever the method, but not from a web page: a browser may hold the device's
// certificate. A request that cannot hold a message is told what can.
func TestMethods(t *testing.T) {
	s := newSite(t, siteConfig{})
	d := s.enrolled("D1", mdmtest.Config{})
	idle, checkin := report("D1", "Idle", "", ""), message("GetBootstrapToken", "D1", "")
	for _, c := range []struct {
		method, path string
		body         []byte
		header       string // Name: value
		unsigned     bool
		want         int
	}{
		{method: "PUT", path: "/mdm", body: idle, want: 200},
		{method: "POST", path: "/mdm", body: idle, want: 200},
		{method: "PATCH", path: "/mdm", body: idle, want: 200},
		{method: "DELETE", path: "/mdm", body: idle, want: 200},
		{method: "GET", path: "/mdm", body: idle, want: 200},
		{method: "POST", path: "/mdm", body: checkin, want: 200},
		{method: "POST", path: "/checkin", body: checkin, want: 200},
		{method: "GET", path: "/checkin", body: checkin, want: 200},
		{method: "POST", path: "/checkin", body: idle, want: 400},
		{method: "POST", path: "/mdm", body: idle, unsigned: true, want: 400},
		{method: "GET", path: "/mdm", body: idle, unsigned: true, want: 400},
		{method: "PUT", path: "/mdm", unsigned: true, want: 400},
		{method: "POST", path: "/mdm", unsigned: true, want: 400},
		{method: "GET", path: "/mdm", unsigned: true, want: 405},
		{method: "HEAD", path: "/mdm", unsigned: true, want: 405},
		{method: "OPTIONS", path: "/mdm", unsigned: true, want: 405},
		{method: "DELETE", path: "/checkin", unsigned: true, want: 405},
		{method: "POST", path: "/mdm", body: idle, header: "Sec-Fetch-Site: same-origin", want: 200},
		{method: "POST", path: "/mdm", body: idle, header: "Sec-Fetch-Site: cross-site", want: 403},
		{method: "PUT", path: "/mdm", body: idle, header: "Sec-Fetch-Site: cross-site", want: 403},
		{method: "GET", path: "/mdm", body: idle, header: "Sec-Fetch-Site: cross-site", want: 403},
		{method: "POST", path: "/checkin", body: checkin, header: "Origin: https://evil.example", want: 403},
	} {
		t.Run(fmt.Sprintf("%s %s %d bytes %s unsigned=%v", c.method, c.path, len(c.body), c.header, c.unsigned), func(t *testing.T) {
			req, err := http.NewRequest(c.method, s.url+c.path, bytes.NewReader(c.body))
			require.NoError(t, err)
			if !c.unsigned {
				signature, err := mdmtest.Sign(d.Identity(), c.body, mdmtest.SignOptions{})
				require.NoError(t, err)
				req.Header.Set("Mdm-Signature", signature)
			}
			if name, value, ok := strings.Cut(c.header, ": "); ok {
				req.Header.Set(name, value)
			}
			resp, err := http.DefaultClient.Do(req)
			require.NoError(t, err)
			require.NoError(t, resp.Body.Close())
			require.Equal(t, c.want, resp.StatusCode)
			allow := ""
			if c.want == 405 {
				allow = "PUT, POST"
			}
			require.Equal(t, allow, resp.Header.Get("Allow"))
		})
	}
}

// A report that the server cannot use is answered 200 with the next command:
// anything else is repeated for ever.
func TestReportsThatDevicesWouldRepeat(t *testing.T) {
	s := newSite(t, siteConfig{})
	d := s.enrolled("D1", mdmtest.Config{})
	s.enqueue("done", "ProfileList", "D1")
	_, err := d.Report(t.Context(), "Acknowledged", "done", nil)
	require.NoError(t, err)
	s.enqueue("next", "ProfileList", "D1")
	for name, body := range map[string][]byte{
		"repeated":                report("D1", "Acknowledged", "done", ""),
		"late NotNow":             report("D1", "NotNow", "done", ""),
		"unknown uuid":            report("D1", "Acknowledged", "never-heard-of", ""),
		"no uuid":                 report("D1", "Acknowledged", "", ""),
		"over-long uuid":          report("D1", "Acknowledged", strings.Repeat("x", 5000), ""),
		"uuid is an integer":      report("D1", "Error", "", "<key>CommandUUID</key><integer>7</integer>"),
		"unknown status":          report("D1", "Pondering", "never-heard-of", ""),
		"real error code":         report("D1", "Error", "never-heard-of", "<key>ErrorChain</key><array><dict><key>ErrorCode</key><real>1.5</real></dict></array>"),
		"error chain is a string": report("D1", "Error", "never-heard-of", "<key>ErrorChain</key><string>oops</string>"),
		"extra keys":              report("D1", "Idle", "", "<key>NeedSyncResponse</key><true/><key>UserConfiguration</key><true/>"),
	} {
		t.Run(name, func(t *testing.T) {
			resp, err := d.Do(t.Context(), "/mdm", reportType, body)
			require.NoError(t, err)
			require.Equal(t, 200, resp.Status)
			cmd, err := mdmtest.ParseCommand(resp.Body)
			require.NoError(t, err)
			require.Equal(t, "next", cmd.UUID)
		})
	}
}

// A report that cannot be read fails the command that the device was offered, so
// that the next one reaches it.
func TestUnreadableReports(t *testing.T) {
	s := newSite(t, siteConfig{})
	d := s.enrolled("D1", mdmtest.Config{})
	u := d.User("alice")
	require.NoError(t, u.TokenUpdate(t.Context()))
	bodies := map[string][]byte{
		"garbage":          []byte("\xff\x00{}"),
		"empty":            {},
		"binary":           []byte("bplist00\xd1"),
		"cut":              report("D1", "Acknowledged", "", "")[:120],
		"no Status":        []byte("<plist><dict><key>UDID</key><string>D1</string></dict></plist>"),
		"no identity":      []byte("<plist><dict><key>Status</key><string>Acknowledged</string></dict></plist>"),
		"another's UDID":   []byte("<plist><dict><key>UDID</key><string>D2</string><oops>"),
		"identity is odd":  report("D\x01", "Acknowledged", "", ""),
		"wrong nesting":    report("D1", "Acknowledged", "", "<key>a</key><array></dict>"),
		"a user's channel": []byte("<plist><dict><key>UDID</key><string>D1</string><key>UserID</key><string>" + strings.TrimPrefix(u.EnrollmentID(), "D1:") + "</string><oops>"),
	}
	var ids []string
	for name := range bodies {
		ids = append(ids, name)
	}
	for i, name := range ids {
		t.Run(name, func(t *testing.T) {
			id := d.EnrollmentID()
			c := d.Channel
			if name == "a user's channel" {
				id, c = u.EnrollmentID(), u
			}
			first, second := fmt.Sprintf("first-%d", i), fmt.Sprintf("second-%d", i)
			s.enqueue(first, "ProfileList", id)
			s.enqueue(second, "ProfileList", id)
			cmd, err := c.Report(t.Context(), "Idle", "", nil)
			require.NoError(t, err)
			require.Equal(t, first, cmd.UUID)
			resp, err := d.Do(t.Context(), "/mdm", reportType, bodies[name])
			require.NoError(t, err)
			require.Equal(t, 200, resp.Status)
			cmd, err = mdmtest.ParseCommand(resp.Body)
			require.NoError(t, err)
			require.Equal(t, second, cmd.UUID)
			result, err := s.store.CommandResult(t.Context(), storage.Scope{}, id, first)
			require.NoError(t, err)
			require.Equal(t, "Unreadable", result.Status)
			require.Equal(t, string(bodies[name]), string(result.Raw))
			_, err = c.Report(t.Context(), "Acknowledged", second, nil)
			require.NoError(t, err)
		})
	}

	stranger := s.device("D9", mdmtest.Config{})
	resp, err := stranger.Do(t.Context(), "/mdm", reportType, []byte("\xff"))
	require.NoError(t, err)
	require.Equal(t, 400, resp.Status, "the certificate is pinned to nothing")
	resp, err = d.Do(t.Context(), "/mdm", reportType, report("D1:alice", "Idle", "", ""))
	require.NoError(t, err)
	require.Equal(t, 400, resp.Status, "an identity that is there and wrong")
	for name, path := range map[string]string{"check-in path": "/checkin", "check-in type": "/mdm"} {
		resp, err = d.Do(t.Context(), path, checkinType, []byte("\xff"))
		require.NoError(t, err)
		require.Equal(t, 400, resp.Status, name)
	}
}

func TestBootstrapToken(t *testing.T) {
	s := newSite(t, siteConfig{})
	d := s.enrolled("D1", mdmtest.Config{})
	check := func(want string) {
		t.Helper()
		resp, err := d.Do(t.Context(), "/mdm", checkinType, message("GetBootstrapToken", "D1", ""))
		require.NoError(t, err)
		require.Equal(t, 200, resp.Status)
		var got struct{ BootstrapToken []byte }
		require.NoError(t, plist.Unmarshal(resp.Body, &got), "a dict is due, even without a token")
		require.Equal(t, want, string(got.BootstrapToken))
	}
	check("")
	require.NoError(t, d.SetBootstrapToken(t.Context(), []byte("secret")))
	check("secret")
	require.NoError(t, d.SetBootstrapToken(t.Context(), nil))
	check("")
	require.NoError(t, d.SetBootstrapToken(t.Context(), []byte("again")))
	require.NoError(t, d.Enroll(t.Context()))
	check("")
}

func TestUserAuthenticate(t *testing.T) {
	first := message("UserAuthenticate", "D1", "<key>UserID</key><string>U1</string><key>UserShortName</key><string>u</string>")
	second := message("UserAuthenticate", "D1", "<key>UserID</key><string>U1</string><key>UserShortName</key><string>u</string><key>DigestResponse</key><string>x</string>")
	t.Run("declined by default", func(t *testing.T) {
		s := newSite(t, siteConfig{})
		d := s.enrolled("D1", mdmtest.Config{})
		resp, err := d.Do(t.Context(), "/mdm", checkinType, first)
		require.NoError(t, err)
		require.Equal(t, 410, resp.Status)
		_, err = d.Poll(t.Context())
		require.NoError(t, err, "the device itself stays enrolled")
	})
	t.Run("empty digest challenge", func(t *testing.T) {
		s := newSite(t, siteConfig{core: core.Config{EmptyDigestChallenge: true}})
		d := s.enrolled("D1", mdmtest.Config{})
		resp, err := d.Do(t.Context(), "/mdm", checkinType, first)
		require.NoError(t, err)
		require.Equal(t, 200, resp.Status)
		var got map[string]any
		require.NoError(t, plist.Unmarshal(resp.Body, &got))
		require.Equal(t, map[string]any{"DigestChallenge": ""}, got)
		resp, err = d.Do(t.Context(), "/mdm", checkinType, second)
		require.NoError(t, err)
		require.Equal(t, 200, resp.Status)
		got = nil
		require.NoError(t, plist.Unmarshal(resp.Body, &got))
		require.Equal(t, map[string]any{"AuthToken": ""}, got)
	})
}

func TestGetToken(t *testing.T) {
	s := newSite(t, siteConfig{core: core.Config{Tokens: map[string]service.Handler{
		"com.apple.maid": service.HandlerFunc(func(_ context.Context, r *service.Request) (*service.Response, error) {
			return &service.Response{Body: []byte("token of " + r.Enroll.ID)}, nil
		}),
	}}})
	d := s.enrolled("D1", mdmtest.Config{})
	resp, err := d.Do(t.Context(), "/mdm", checkinType, message("GetToken", "D1", "<key>TokenServiceType</key><string>com.apple.maid</string>"))
	require.NoError(t, err)
	require.Equal(t, "token of D1", string(resp.Body))
	resp, err = d.Do(t.Context(), "/mdm", checkinType, message("GetToken", "D1", "<key>TokenServiceType</key><string>com.example.other</string>"))
	require.NoError(t, err)
	require.Equal(t, 400, resp.Status)
}

func TestReturnToService(t *testing.T) {
	for _, c := range []struct {
		name   string
		config map[string]any
		want   map[string]any
	}{
		{"off", nil, map[string]any{"Enabled": false}},
		{"own bootstrap token", map[string]any{"Enabled": true}, map[string]any{"Enabled": true, "BootstrapToken": []byte("bt")}},
		{"configured token wins", map[string]any{"Enabled": true, "BootstrapToken": []byte("cfg")}, map[string]any{"Enabled": true, "BootstrapToken": []byte("cfg")}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSite(t, siteConfig{core: core.Config{ReturnToService: c.config}})
			d := s.enrolled("D1", mdmtest.Config{Kind: mdmtest.IPad})
			require.NoError(t, d.SetBootstrapToken(t.Context(), []byte("bt")))
			resp, err := d.Do(t.Context(), "/mdm", checkinType, message("ReturnToService", "D1", ""))
			require.NoError(t, err)
			require.Equal(t, 200, resp.Status)
			var got map[string]map[string]any
			require.NoError(t, plist.Unmarshal(resp.Body, &got))
			require.Equal(t, c.want, got["ReturnToService"])
		})
	}
}

func TestIdentifiersThatWouldCollide(t *testing.T) {
	s := newSite(t, siteConfig{})
	d := s.enrolled("D1", mdmtest.Config{Kind: mdmtest.SharedIPad})
	allF := "<key>UserID</key><string>FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF</string>"
	token := "<key>Topic</key><string>t</string><key>PushMagic</key><string>m</string><key>Token</key><data>AAAA</data>"
	resp, err := d.Do(t.Context(), "/mdm", checkinType, message("TokenUpdate", "D1", allF+token))
	require.NoError(t, err)
	require.Equal(t, 400, resp.Status, "a Shared iPad user without a short name")
	for _, name := range []string{"alice", "bob"} {
		resp, err := d.Do(t.Context(), "/mdm", checkinType, message("TokenUpdate", "D1", allF+token+"<key>UserShortName</key><string>"+name+"</string>"))
		require.NoError(t, err)
		require.Equal(t, 200, resp.Status)
	}
	s.enqueue("for-alice", "ProfileList", "D1:alice")
	visit, err := d.User("bob").Poll(t.Context())
	require.NoError(t, err)
	require.Empty(t, visit.Exchanges)

	// A UDID with a colon would be another device's user.
	other := s.device("other", mdmtest.Config{})
	resp, err = other.Do(t.Context(), "/mdm", checkinType, message("Authenticate", "D1:alice", "<key>Topic</key><string>t</string>"))
	require.NoError(t, err)
	require.Equal(t, 400, resp.Status)
}

func TestPinning(t *testing.T) {
	ctx := t.Context()
	s := newSite(t, siteConfig{})
	a := s.enrolled("A", mdmtest.Config{})
	b := s.enrolled("B", mdmtest.Config{})
	require.NoError(t, a.User("u").TokenUpdate(ctx))

	token := "<key>Topic</key><string>t</string><key>PushMagic</key><string>m</string><key>Token</key><data>AAAA</data>"
	for _, kind := range []string{"Authenticate", "TokenUpdate", "CheckOut", "SetBootstrapToken", "GetBootstrapToken", "DeclarativeManagement", "GetToken", "ReturnToService"} {
		more := map[string]string{
			"Authenticate": token, "TokenUpdate": token, "CheckOut": "<key>Topic</key><string>t</string>",
			"DeclarativeManagement": "<key>Endpoint</key><string>tokens</string>",
			"GetToken":              "<key>TokenServiceType</key><string>com.apple.maid</string>",
		}[kind]
		resp, err := b.Do(ctx, "/mdm", checkinType, message(kind, "A", more))
		require.NoError(t, err)
		require.Equal(t, 400, resp.Status, "%s for A with B's certificate", kind)
	}
	for _, user := range []string{"", "<key>UserID</key><string>U</string>"} {
		resp, err := b.Do(ctx, "/mdm", reportType, report("A", "Idle", "", user))
		require.NoError(t, err)
		require.Equal(t, 400, resp.Status)
	}
	resp, err := b.Do(ctx, "/mdm", checkinType, message("UserAuthenticate", "A", "<key>UserID</key><string>U</string>"))
	require.NoError(t, err)
	require.Equal(t, 400, resp.Status)
	_, err = a.Poll(ctx)
	require.NoError(t, err, "A is untouched")

	// Re-enrollment with a new certificate: the old one is dead.
	again, err := mdmtest.NewDevice(s.url+"/mdm", s.identity("A again"), mdmtest.Config{UDID: "A"})
	require.NoError(t, err)
	require.NoError(t, again.Enroll(ctx))
	resp, err = a.Do(ctx, "/mdm", reportType, report("A", "Idle", "", ""))
	require.NoError(t, err)
	require.Equal(t, 400, resp.Status)
	_, err = again.Poll(ctx)
	require.NoError(t, err)
}

func TestRetro(t *testing.T) {
	ctx := t.Context()
	for _, retro := range []bool{false, true} {
		t.Run(fmt.Sprint(retro), func(t *testing.T) {
			s := newSite(t, siteConfig{auth: certauth.Config{Retro: retro}})
			// Brought in by migration, without a certificate.
			token := "<key>Topic</key><string>t</string><key>PushMagic</key><string>m</string><key>Token</key><data>AAAA</data>"
			for _, kind := range []string{"Authenticate", "TokenUpdate"} {
				req, err := http.NewRequestWithContext(ctx, "PUT", s.url+"/migration", bytes.NewReader(message(kind, "D1", token)))
				require.NoError(t, err)
				req.Header.Set("Content-Type", checkinType)
				resp, err := http.DefaultClient.Do(req)
				require.NoError(t, err)
				require.NoError(t, resp.Body.Close())
				require.Equal(t, 200, resp.StatusCode)
			}
			d := s.device("D1", mdmtest.Config{})
			resp, err := d.Do(ctx, "/mdm", reportType, report("D1", "Idle", "", ""))
			require.NoError(t, err)
			if !retro {
				require.Equal(t, 400, resp.Status)
				return
			}
			require.Equal(t, 200, resp.Status)
			thief := s.device("thief", mdmtest.Config{})
			resp, err = thief.Do(ctx, "/mdm", reportType, report("D1", "Idle", "", ""))
			require.NoError(t, err)
			require.Equal(t, 400, resp.Status, "retro pins the first certificate only")
		})
	}
}

// The exporter is no device: it is told why a message is refused, and what
// another server kept need not be complete.
func TestMigration(t *testing.T) {
	s := newSite(t, siteConfig{})
	const topic = "<key>Topic</key><string>t</string>"
	for _, c := range []struct {
		name string
		body []byte
		want int
		text string
	}{
		{"Authenticate", message("Authenticate", "D1", topic), 200, ""},
		{"Authenticate without Topic", message("Authenticate", "D2", ""), 200, ""},
		{"bootstrap token", message("SetBootstrapToken", "D1", "<key>BootstrapToken</key><data>AAAA</data>"), 200, ""},
		{"user", message("UserAuthenticate", "D1", "<key>UserID</key><string>U</string>"), 200, ""},
		{"check-out", message("CheckOut", "D1", topic), 200, ""},
		{"token of a stranger", message("TokenUpdate", "D3", topic+"<key>PushMagic</key><string>m</string><key>Token</key><data>AAAA</data>"), 400, "not enrolled"},
		{"another check-in", message("GetBootstrapToken", "D1", ""), 400, "GetBootstrapToken is not for migration"},
		{"report", report("D1", "Idle", "", ""), 400, "missing key: MessageType"},
	} {
		t.Run(c.name, func(t *testing.T) {
			req, err := http.NewRequest("POST", s.url+"/migration", bytes.NewReader(c.body))
			require.NoError(t, err)
			resp, err := http.DefaultClient.Do(req)
			require.NoError(t, err)
			text, err := io.ReadAll(resp.Body)
			require.NoError(t, err)
			require.NoError(t, resp.Body.Close())
			require.Equal(t, c.want, resp.StatusCode, "%s", text)
			require.Contains(t, string(text), c.text)
		})
	}
}

func TestIdentityFailuresAreNever401(t *testing.T) {
	s := newSite(t, siteConfig{})
	foreign, err := mdmtest.NewCA()
	require.NoError(t, err)
	foreignID, err := foreign.Issue("D1")
	require.NoError(t, err)
	expiredID, err := s.ca.Issue("D1", mdmtest.WithValidity(time.Now().Add(-48*time.Hour), time.Now().Add(-24*time.Hour)))
	require.NoError(t, err)
	good := s.identity("D1")
	body := message("Authenticate", "D1", "<key>Topic</key><string>t</string>")
	sign := func(id *mdmtest.Identity, b []byte) string {
		sig, err := mdmtest.Sign(id, b, mdmtest.SignOptions{})
		require.NoError(t, err)
		return sig
	}
	for name, headers := range map[string][]string{
		"none":         nil,
		"empty":        {""},
		"not base64":   {"%%%"},
		"not CMS":      {base64.StdEncoding.EncodeToString([]byte("hello"))},
		"foreign CA":   {sign(foreignID, body)},
		"expired":      {sign(expiredID, body)},
		"other body":   {sign(good, append([]byte(" "), body...))},
		"repeated":     {sign(good, body), sign(good, body)},
		"nested bombs": {base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{0x30, 0x80}, 5000))},
	} {
		t.Run(name, func(t *testing.T) {
			req, err := http.NewRequest("PUT", s.url+"/mdm", bytes.NewReader(body))
			require.NoError(t, err)
			for _, h := range headers {
				req.Header.Add("Mdm-Signature", h)
			}
			resp, err := http.DefaultClient.Do(req)
			require.NoError(t, err)
			require.NoError(t, resp.Body.Close())
			require.Equal(t, 400, resp.StatusCode)
		})
	}
}

func TestHeaderIdentity(t *testing.T) {
	trust := func(prefix string) func(httpmdm.Verifier) *httpmdm.Identity {
		return func(v httpmdm.Verifier) *httpmdm.Identity {
			var nets []netip.Prefix
			if prefix != "" {
				nets = append(nets, netip.MustParsePrefix(prefix))
			}
			return httpmdm.HeaderIdentity(v, "Client-Cert", nets)
		}
	}
	for _, c := range []struct {
		name, trusted string
		want          int
	}{
		{"everyone is believed", "", 200},
		{"the proxy is believed", "127.0.0.0/8", 200},
		{"others are not", "192.0.2.0/24", 400},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSite(t, siteConfig{identity: trust(c.trusted)})
			d := s.device("D1", mdmtest.Config{Auth: mdmtest.AuthHeader})
			resp, err := d.Do(t.Context(), "/mdm", checkinType, message("Authenticate", "D1", "<key>Topic</key><string>t</string>"))
			require.NoError(t, err)
			require.Equal(t, c.want, resp.Status)
		})
	}
	t.Run("a bad or missing header is not made good by a signature", func(t *testing.T) {
		s := newSite(t, siteConfig{identity: trust("")})
		id := s.identity("D1")
		body := message("Authenticate", "D1", "<key>Topic</key><string>t</string>")
		sig, err := mdmtest.Sign(id, body, mdmtest.SignOptions{})
		require.NoError(t, err)
		good := ":" + base64.StdEncoding.EncodeToString(id.Cert.Raw) + ":"
		for _, headers := range [][]string{nil, {""}, {":broken:"}, {good, good}} {
			req, err := http.NewRequest("PUT", s.url+"/mdm", bytes.NewReader(body))
			require.NoError(t, err)
			req.Header.Set("Mdm-Signature", sig)
			for _, h := range headers {
				req.Header.Add("Client-Cert", h)
			}
			resp, err := http.DefaultClient.Do(req)
			require.NoError(t, err)
			require.NoError(t, resp.Body.Close())
			require.Equal(t, 400, resp.StatusCode)
		}
	})
	t.Run("the header is nothing in signature mode", func(t *testing.T) {
		s := newSite(t, siteConfig{})
		d := s.device("D1", mdmtest.Config{Auth: mdmtest.AuthHeader})
		resp, err := d.Do(t.Context(), "/mdm", checkinType, message("Authenticate", "D1", "<key>Topic</key><string>t</string>"))
		require.NoError(t, err)
		require.Equal(t, 400, resp.Status)
	})
}

func TestHostileBodies(t *testing.T) {
	s := newSite(t, siteConfig{http: httpmdm.Config{MaxBody: 16 << 20}})
	d := s.enrolled("D1", mdmtest.Config{})
	before := heap()
	for name, c := range map[string]struct {
		body []byte
		want int
	}{
		"20 MB":               {bytes.Repeat([]byte("x"), 20<<20), 413},
		"8 MB nested arrays":  {append([]byte(`<?xml version="1.0"?><plist version="1.0">`), bytes.Repeat([]byte("<array>"), 8<<20/7)...), 400},
		"cyclic binary plist": {[]byte("bplist00\xa1\x00\x08\x00\x00\x00\x00\x00\x00\x01\x01\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x0a"), 400},
		"entity bomb":         {[]byte(`<?xml version="1.0"?><!DOCTYPE plist [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><plist version="1.0"><dict><key>Status</key><string>&b;</string></dict></plist>`), 400},
		"truncated":           {report("D1", "Idle", "", "")[:80], 400},
		"NULs":                {bytes.Repeat([]byte{0}, 4096), 400},
		"NUL in a string":     {report("D\x001", "Idle", "", ""), 400},
		"gzip":                {[]byte("\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"), 400},
		"empty":               {nil, 400},
		"no identity":         {[]byte(`<plist version="1.0"><dict><key>Status</key><string>Idle</string></dict></plist>`), 200},
		"unknown message":     {message("Levitate", "D1", ""), 400},
		"5 MB report":         {report("D1", "Acknowledged", "x", "<key>Big</key><string>"+strings.Repeat("y", 5<<20)+"</string>"), 200},
	} {
		t.Run(name, func(t *testing.T) {
			resp, err := d.Do(t.Context(), "/mdm", "", c.body)
			require.NoError(t, err)
			require.Equal(t, c.want, resp.Status)
		})
	}
	_, err := d.Poll(t.Context())
	require.NoError(t, err, "the server is alive")
	require.Less(t, heap()-before, int64(64<<20), "memory stays flat")
}

func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// Bytes announced but not sent take nothing from the budget of others.
func TestHalfSentBodiesCostNothing(t *testing.T) {
	s := newSite(t, siteConfig{http: httpmdm.Config{MaxBody: 1 << 20, MaxInFlight: 2 << 20}})
	d := s.enrolled("D1", mdmtest.Config{})
	sig, err := mdmtest.Sign(s.identity("slow"), []byte("x"), mdmtest.SignOptions{})
	require.NoError(t, err)
	target, err := url.Parse(s.url)
	require.NoError(t, err)
	for range 50 {
		conn := dial(t, target.Host)
		_, err := fmt.Fprintf(conn, "PUT /mdm HTTP/1.1\r\nHost: x\r\nMdm-Signature: %s\r\nContent-Length: 1000000\r\n\r\nhalf", strings.ReplaceAll(sig, "\n", ""))
		require.NoError(t, err)
	}
	_, err = d.Poll(t.Context())
	require.NoError(t, err)
}

// Past the budget of bytes in flight a device is asked to come again.
func TestBudget(t *testing.T) {
	entered, leave := make(chan struct{}), make(chan struct{})
	blocking := service.HandlerFunc(func(context.Context, *service.Request) (*service.Response, error) {
		entered <- struct{}{}
		<-leave
		return &service.Response{}, nil
	})
	ca, err := mdmtest.NewCA()
	require.NoError(t, err)
	verifier, err := certverify.New(ca.PEM(), nil, certverify.Config{})
	require.NoError(t, err)
	h := httpmdm.New(blocking, httpmdm.SignatureIdentity(verifier), httpmdm.Config{MaxBody: 64 << 10, MaxInFlight: 64 << 10})
	srv := httptest.NewServer(h.MDM(httpmdm.Any))
	defer srv.Close()
	id, err := ca.Issue("D1")
	require.NoError(t, err)
	d, err := mdmtest.NewDevice(srv.URL, id, mdmtest.Config{UDID: "D1"})
	require.NoError(t, err)
	big := report("D1", "Idle", "", "<key>Pad</key><string></string>")
	big = report("D1", "Idle", "", "<key>Pad</key><string>"+strings.Repeat("p", 64<<10-1-len(big))+"</string>")
	var wg sync.WaitGroup
	wg.Go(func() {
		resp, err := d.Do(t.Context(), "", reportType, big)
		if err != nil || resp.Status != 200 {
			t.Errorf("first: %v %v", resp, err)
		}
	})
	<-entered
	resp, err := d.Do(t.Context(), "", reportType, big)
	require.NoError(t, err)
	require.Equal(t, 503, resp.Status)
	require.NotEmpty(t, resp.Header.Get("Retry-After"))
	// A poll is not crowded out by who sends much.
	wg.Go(func() {
		resp, err := d.Do(t.Context(), "", reportType, report("D1", "Idle", "", ""))
		if err != nil || resp.Status != 200 {
			t.Errorf("poll: %v %v", resp, err)
		}
	})
	<-entered
	close(leave)
	wg.Wait()
}

// A store whose queue is full, or that is away, makes devices come again, and
// says why it refused.
func TestBusyStoreIs503(t *testing.T) {
	for reason, cause := range map[string]error{
		httpmdm.ReasonUnavailable: fmt.Errorf("applying a device's message: %w", storage.ErrBusy),
		httpmdm.ReasonError:       errors.New("broken"),
	} {
		t.Run(reason, func(t *testing.T) {
			ca, err := mdmtest.NewCA()
			require.NoError(t, err)
			verifier, err := certverify.New(ca.PEM(), nil, certverify.Config{})
			require.NoError(t, err)
			var refused []string
			h := httpmdm.New(service.HandlerFunc(func(context.Context, *service.Request) (*service.Response, error) { return nil, cause }),
				httpmdm.SignatureIdentity(verifier), httpmdm.Config{Refused: func(reason string) { refused = append(refused, reason) }})
			srv := httptest.NewServer(h.MDM(httpmdm.Any))
			defer srv.Close()
			id, err := ca.Issue("D1")
			require.NoError(t, err)
			d, err := mdmtest.NewDevice(srv.URL, id, mdmtest.Config{UDID: "D1"})
			require.NoError(t, err)
			resp, err := d.Do(t.Context(), "", reportType, report("D1", "Idle", "", ""))
			require.NoError(t, err)
			require.Empty(t, resp.Body)
			require.Equal(t, []string{reason}, refused)
			if errors.Is(cause, storage.ErrBusy) {
				require.Equal(t, 503, resp.Status)
				require.Equal(t, "5", resp.Header.Get("Retry-After"))
			} else {
				require.Equal(t, 500, resp.Status)
				require.Empty(t, resp.Header.Get("Retry-After"))
			}
		})
	}
}

// TestStalledProcessDropsCheckins: what a process held while it stood still is
// not carried out, but for reports, which say what was done.
func TestStalledProcessDropsCheckins(t *testing.T) {
	var stalled atomic.Bool
	s := newSite(t, siteConfig{http: httpmdm.Config{Stalled: func(arrived time.Time) bool {
		require.WithinDuration(t, time.Now(), arrived, time.Minute)
		return stalled.Load()
	}}})
	d := s.enrolled("D1", mdmtest.Config{})
	s.enqueue("C1", "ProfileList", "D1")
	stalled.Store(true)
	resp, err := d.Do(t.Context(), "", checkinType, message("CheckOut", "D1", ""))
	require.NoError(t, err)
	require.Equal(t, 503, resp.Status)
	require.Equal(t, "5", resp.Header.Get("Retry-After"))
	resp, err = d.Do(t.Context(), "", reportType, report("D1", "Idle", "", ""))
	require.NoError(t, err)
	require.Equal(t, 200, resp.Status)
	require.Contains(t, string(resp.Body), "C1", "still enrolled")
	stalled.Store(false)
	resp, err = d.Do(t.Context(), "", checkinType, message("CheckOut", "D1", ""))
	require.NoError(t, err)
	require.Equal(t, 200, resp.Status)
}

func TestPanicIs500AndSurvived(t *testing.T) {
	var log bytes.Buffer
	h := requestlog.Middleware(slog.New(slog.NewTextHandler(&log, nil)), requestlog.Config{}, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("boom") }))
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest("PUT", "/mdm", nil))
	require.Equal(t, 500, w.Code)
	require.Contains(t, log.String(), "boom")
}

var _ httpmdm.Verifier = (*certverify.Verifier)(nil)

func dial(t *testing.T, addr string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}
