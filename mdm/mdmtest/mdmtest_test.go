package mdmtest

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/smallstep/pkcs7"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// server is the least that a device needs: it verifies signatures with a
// library of others, keeps a queue for each enrollment and remembers what it
// was told.
type server struct {
	*httptest.Server
	t    *testing.T
	pool *x509.CertPool

	mu       sync.Mutex
	queues   map[string][][]byte // by enrollment ID
	messages []message
	replies  map[string][]byte // to check-in messages, by type
	refuse   map[string]int    // status code for a message type or status
}

type message struct {
	MessageType      string
	UDID             string
	UserID           string
	UserShortName    string
	UserLongName     string
	EnrollmentID     string
	EnrollmentUserID string
	AuthToken        string
	SerialNumber     string
	Topic            string
	PushMagic        string
	Token            []byte
	UnlockToken      []byte
	BootstrapToken   []byte
	Endpoint         string
	Data             []byte
	TokenServiceType string
	DigestResponse   string
	Status           string
	CommandUUID      string
	ErrorChain       []struct {
		ErrorCode   int64
		ErrorDomain string
	}
	QueryResponses           map[string]any
	ProfileList              []struct{ PayloadIdentifier string }
	InstalledApplicationList []struct{ Name string }
	Settings                 []struct{ Item, Status string }

	body   []byte
	header http.Header
	path   string
	signer *x509.Certificate
}

func newServer(t *testing.T, ca *CA) *server {
	s := &server{
		t: t, pool: ca.Pool(), queues: make(map[string][][]byte),
		replies: make(map[string][]byte), refuse: make(map[string]int),
	}
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.Close)
	return s
}

func (s *server) device(ca *CA, cfg Config) *Device {
	s.t.Helper()
	id, err := ca.Issue("device")
	require.NoError(s.t, err)
	if cfg.Client == nil {
		cfg.Client = s.Client()
	}
	device, err := NewDevice(s.URL+"/mdm", id, cfg)
	require.NoError(s.t, err)
	return device
}

func (s *server) enqueue(c *Channel, commands ...[]byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.queues[c.EnrollmentID()] = append(s.queues[c.EnrollmentID()], commands...)
}

// setRefuse makes the server answer code to that kind; 0 ends it.
func (s *server) setRefuse(kind string, code int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refuse[kind] = code
}

// take returns the messages since the last call.
func (s *server) take() []message {
	s.mu.Lock()
	defer s.mu.Unlock()
	messages := s.messages
	s.messages = nil
	return messages
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	m := message{body: body, header: r.Header.Clone(), path: r.URL.Path}
	if m.signer, err = s.signer(r, body); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if err := decodeXML(body, &m); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.messages = append(s.messages, m)
	if code := s.refuse[m.MessageType+m.Status]; code != 0 {
		http.Error(w, "told to refuse", code)
		return
	}
	wantType := "application/x-apple-aspen-mdm; charset=UTF-8"
	if m.MessageType != "" {
		wantType = "application/x-apple-aspen-mdm-checkin"
	}
	if r.Method != http.MethodPut || r.Header.Get("Content-Type") != wantType {
		http.Error(w, "method or type", http.StatusUnsupportedMediaType)
		return
	}
	if m.MessageType != "" {
		w.Write(s.replies[m.MessageType])
		return
	}
	w.Write(s.next(&m))
}

func (s *server) signer(r *http.Request, body []byte) (*x509.Certificate, error) {
	if r.TLS != nil {
		if len(r.TLS.PeerCertificates) == 0 {
			return nil, errors.New("no certificate")
		}
		return r.TLS.PeerCertificates[0], nil
	}
	if header := r.Header.Get("Client-Cert"); header != "" {
		raw, err := base64.StdEncoding.DecodeString(strings.Trim(header, ":"))
		if err != nil {
			return nil, err
		}
		return x509.ParseCertificate(raw)
	}
	return verify(r.Header.Get("Mdm-Signature"), body, s.pool)
}

// next is the oldest command that the report did not finish. NotNow sets the
// whole queue aside until the next Idle.
func (s *server) next(m *message) []byte {
	id := m.UDID + m.EnrollmentID
	switch {
	case m.EnrollmentUserID != "":
		id += ":" + m.EnrollmentUserID
	case strings.HasPrefix(m.UserID, "FFFFFFFF"):
		id += ":" + m.UserShortName
	case m.UserID != "":
		id += ":" + m.UserID
	}
	if m.Status == "NotNow" {
		return nil
	}
	queue := s.queues[id]
	for i, raw := range queue {
		if m.CommandUUID != "" && strings.Contains(string(raw), ">"+m.CommandUUID+"<") {
			queue = append(queue[:i:i], queue[i+1:]...)
			break
		}
	}
	s.queues[id] = queue
	if len(queue) == 0 {
		return nil
	}
	return queue[0]
}

func verify(header string, body []byte, pool *x509.CertPool) (*x509.Certificate, error) {
	raw, err := base64.StdEncoding.DecodeString(header)
	if err != nil {
		return nil, err
	}
	p7, err := pkcs7.Parse(raw)
	if err != nil {
		return nil, err
	}
	p7.Content = body
	if err := p7.Verify(); err != nil {
		return nil, err
	}
	signer := p7.GetOnlySigner()
	if signer == nil {
		return nil, errors.New("not one signer")
	}
	intermediates := x509.NewCertPool()
	for _, cert := range p7.Certificates {
		intermediates.AddCert(cert)
	}
	_, err = signer.Verify(x509.VerifyOptions{
		Roots: pool, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	return signer, err
}

func newTestCA(t *testing.T) *CA {
	t.Helper()
	ca, err := NewCA()
	require.NoError(t, err)
	return ca
}

func TestSignVerifies(t *testing.T) {
	ca := newTestCA(t)
	inter, err := ca.Intermediate()
	require.NoError(t, err)
	ecdsaID, err := ca.Issue("ecdsa")
	require.NoError(t, err)
	rsaID, err := ca.Issue("rsa", WithRSA())
	require.NoError(t, err)
	chained, err := inter.Issue("chained")
	require.NoError(t, err)
	body := []byte("a body of bytes \x00 with any content")

	for _, id := range []*Identity{ecdsaID, rsaID, chained} {
		for _, hash := range []crypto.Hash{0, crypto.SHA1, crypto.SHA256} {
			for _, attributes := range []bool{false, true} {
				for _, indefinite := range []bool{false, true} {
					options := SignOptions{
						Hash: hash, SignedAttributes: attributes, Indefinite: indefinite, WithChain: true,
					}
					t.Run(fmt.Sprintf("%s/%v/attributes=%v/indefinite=%v", id.Cert.Subject.CommonName, hash, attributes, indefinite), func(t *testing.T) {
						header, err := Sign(id, body, options)
						require.NoError(t, err)
						signer, err := verify(header, body, ca.Pool())
						require.NoError(t, err)
						require.Equal(t, id.Cert.Raw, signer.Raw)
						_, err = verify(header, append([]byte("x"), body...), ca.Pool())
						require.Error(t, err, "another body")
						_, err = verify(header, body, newTestCA(t).Pool())
						require.Error(t, err, "another CA")
					})
				}
			}
		}
	}
}

func TestSignForms(t *testing.T) {
	ca := newTestCA(t)
	id, err := ca.Issue("device")
	require.NoError(t, err)
	other, err := ca.Issue("other")
	require.NoError(t, err)
	body := []byte("body")

	raw := func(options SignOptions) []byte {
		header, err := Sign(id, body, options)
		require.NoError(t, err)
		b, err := base64.StdEncoding.DecodeString(header)
		require.NoError(t, err)
		return b
	}
	apple := raw(AppleSign())
	require.Equal(t, []byte{0x30, 0x80}, apple[:2])
	require.Equal(t, make([]byte, 6), apple[len(apple)-6:], "three ends of contents")
	require.NotEqual(t, byte(0x80), raw(SignOptions{})[1])

	p7, err := pkcs7.Parse(raw(SignOptions{CoSigner: other}))
	require.NoError(t, err)
	require.Len(t, p7.Signers, 2)
	p7.Content = body
	require.NoError(t, p7.Verify())

	// smallstep/pkcs7 refuses a signing time outside the certificate's life.
	header, err := Sign(id, body, SignOptions{SignedAttributes: true, SigningTime: time.Now().AddDate(-3, 0, 0)})
	require.NoError(t, err)
	_, err = verify(header, body, ca.Pool())
	var outside *pkcs7.SigningTimeNotValidError
	require.ErrorAs(t, err, &outside)

	_, err = Sign(id, body, SignOptions{Hash: crypto.MD5})
	require.Error(t, err)
}

func TestCA(t *testing.T) {
	dir := t.TempDir() + "/new"
	_, err := LoadCA(dir)
	require.ErrorIs(t, err, fs.ErrNotExist)
	ca := newTestCA(t)
	require.NoError(t, ca.Save(dir))
	loaded, err := LoadCA(dir)
	require.NoError(t, err)
	require.Equal(t, ca.PEM(), loaded.PEM())

	now := time.Now()
	expired, err := loaded.Issue("expired", WithValidity(now.Add(-2*time.Hour), now.Add(-time.Hour)))
	require.NoError(t, err)
	_, err = expired.Cert.Verify(x509.VerifyOptions{Roots: ca.Pool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	var invalid x509.CertificateInvalidError
	require.ErrorAs(t, err, &invalid)
	require.Equal(t, x509.Expired, invalid.Reason)

	host, err := loaded.Issue("host", WithHosts("127.0.0.1", "mdm.example"), WithExtKeyUsage(x509.ExtKeyUsageServerAuth))
	require.NoError(t, err)
	_, err = host.Cert.Verify(x509.VerifyOptions{Roots: ca.Pool(), DNSName: "mdm.example"})
	require.NoError(t, err)
	_, err = host.Cert.Verify(x509.VerifyOptions{Roots: ca.Pool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	require.Error(t, err)

	push, err := loaded.Issue("APSP:1", WithPushTopic("com.apple.mgmt.External.x"))
	require.NoError(t, err)
	names := push.Cert.Subject.Names
	require.Equal(t, "0.9.2342.19200300.100.1.1", names[len(names)-1].Type.String())
	require.Equal(t, "com.apple.mgmt.External.x", names[len(names)-1].Value)
	both, err := push.PEM()
	require.NoError(t, err)
	_, err = tls.X509KeyPair(both, both)
	require.NoError(t, err)
	more, err := expired.PEM()
	require.NoError(t, err)
	parsed, err := ParseIdentities(append(both, more...))
	require.NoError(t, err)
	require.Len(t, parsed, 2)
	require.Equal(t, push.Cert.Raw, parsed[0].Cert.Raw)
	require.Equal(t, expired.Key.Public(), parsed[1].Key.Public())
	_, err = ParseIdentities(both[:len(both)-50])
	require.Error(t, err, "a torn file")

	inter, err := loaded.Intermediate()
	require.NoError(t, err)
	require.Error(t, inter.Save(t.TempDir()))
}

func TestEnroll(t *testing.T) {
	ca := newTestCA(t)
	for _, kind := range []Kind{Mac, IPhone, IPad, SharedIPad, UserEnrollment} {
		t.Run(kind.String(), func(t *testing.T) {
			s := newServer(t, ca)
			d := s.device(ca, Config{Kind: kind, CheckinURL: s.URL + "/checkin"})
			require.NoError(t, d.Enroll(t.Context()))
			got := s.take()
			require.Len(t, got, 2)
			require.Equal(t, "Authenticate", got[0].MessageType)
			require.Equal(t, "TokenUpdate", got[1].MessageType)
			for _, m := range got {
				require.Equal(t, "/checkin", m.path)
				require.Equal(t, d.EnrollmentID(), m.UDID+m.EnrollmentID)
				require.Equal(t, kind == UserEnrollment, m.UDID == "")
				require.Equal(t, DefaultTopic, m.Topic)
				require.Equal(t, d.Identity().Cert.Raw, m.signer.Raw)
			}
			require.Equal(t, kind == UserEnrollment, got[0].SerialNumber == "")
			require.Equal(t, d.PushToken(), got[1].Token)
			require.Equal(t, d.PushMagic(), got[1].PushMagic)
			require.Equal(t, kind == IPhone || kind == IPad, got[1].UnlockToken != nil)

			u := d.User("a&b")
			require.Same(t, u, d.User("a&b"))
			require.NoError(t, u.TokenUpdate(t.Context()))
			m := s.take()[0]
			require.Equal(t, "a&b", m.UserShortName)
			require.Equal(t, kind == SharedIPad, m.UserLongName == "")
			switch kind {
			case SharedIPad:
				require.Equal(t, "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF", m.UserID)
				require.Equal(t, d.UDID()+":a&b", u.EnrollmentID())
			case UserEnrollment:
				require.Equal(t, m.EnrollmentID+":"+m.EnrollmentUserID, u.EnrollmentID())
			default:
				require.Equal(t, m.UDID+":"+m.UserID, u.EnrollmentID())
			}
			require.NotEqual(t, d.PushToken(), u.PushToken())
			require.NoError(t, d.CheckOut(t.Context()))
			require.Equal(t, "CheckOut", s.take()[0].MessageType)
		})
	}
}

func TestCheckins(t *testing.T) {
	ca := newTestCA(t)
	s := newServer(t, ca)
	d := s.device(ca, Config{})
	ctx := t.Context()

	token, err := d.GetBootstrapToken(ctx)
	require.NoError(t, err)
	require.Empty(t, token, "zero-byte reply")
	s.replies["GetBootstrapToken"] = new(Plist).Data("BootstrapToken", []byte("secret")).Document()
	token, err = d.GetBootstrapToken(ctx)
	require.NoError(t, err)
	require.Equal(t, "secret", string(token))
	s.take()

	require.NoError(t, d.SetBootstrapToken(ctx, []byte("mine")))
	require.NoError(t, d.SetBootstrapToken(ctx, nil))
	got := s.take()
	require.Equal(t, "mine", string(got[0].BootstrapToken))
	require.NotContains(t, string(got[1].body), "BootstrapToken</key>")

	s.replies["DeclarativeManagement"] = []byte(`{"a":1}`)
	reply, err := d.DeclarativeManagement(ctx, "status", []byte("{}"))
	require.NoError(t, err)
	require.JSONEq(t, `{"a":1}`, string(reply))
	m := s.take()[0]
	require.Equal(t, "status", m.Endpoint)
	require.Equal(t, "{}", string(m.Data))

	s.replies["GetToken"] = new(Plist).Data("TokenData", []byte("jwt")).Document()
	reply, err = d.GetToken(ctx, "com.apple.maid")
	require.NoError(t, err)
	require.Equal(t, "jwt", string(reply))
	require.Equal(t, "com.apple.maid", s.take()[0].TokenServiceType)

	s.replies["ReturnToService"] = new(Plist).Bool("x", true).Document()
	reply, err = d.ReturnToService(ctx)
	require.NoError(t, err)
	require.Equal(t, s.replies["ReturnToService"], reply)
	s.take()

	u := d.User("net")
	s.replies["UserAuthenticate"] = new(Plist).String("DigestChallenge", "c").Document()
	auth, err := u.UserAuthenticate(ctx, "")
	require.NoError(t, err)
	require.Equal(t, UserAuth{DigestChallenge: "c"}, auth)
	s.replies["UserAuthenticate"] = new(Plist).String("AuthToken", "tok").Document()
	_, err = u.UserAuthenticate(ctx, "digest")
	require.NoError(t, err)
	_, err = u.Idle(ctx)
	require.NoError(t, err)
	got = s.take()
	require.Equal(t, "digest", got[1].DigestResponse)
	require.Equal(t, "tok", got[2].AuthToken)

	s.setRefuse("UserAuthenticate", http.StatusGone)
	_, err = u.UserAuthenticate(ctx, "")
	var refused *RefusedError
	require.ErrorAs(t, err, &refused)
	require.Equal(t, http.StatusGone, refused.Response.Status)
	require.Equal(t, "UserAuthenticate", refused.Kind)

	s.replies["GetToken"] = []byte("bplist00")
	_, err = d.GetToken(ctx, "x")
	require.Error(t, err)
}

func TestPollAnswersPlausibly(t *testing.T) {
	ca := newTestCA(t)
	s := newServer(t, ca)
	d := s.device(ca, Config{Kind: IPhone, Apps: 3})
	one := NewProfile("com.example.one", "One & only")
	s.enqueue(d.Channel,
		NewCommand("1", "InstallProfile", func(p *Plist) { p.Data("Payload", one) }),
		NewCommand("2", "InstallProfile", func(p *Plist) { p.Data("Payload", []byte("0\x82signed"+string(one)+"trailer")) }),
		NewCommand("3", "InstallProfile", func(p *Plist) { p.Data("Payload", NewProfile("two", "")) }),
		NewCommand("4", "ProfileList", nil),
		NewCommand("5", "RemoveProfile", func(p *Plist) { p.String("Identifier", "two") }),
		NewCommand("6", "RemoveProfile", func(p *Plist) { p.String("Identifier", "two") }),
		NewCommand("7", "InstallProfile", func(p *Plist) { p.Data("Payload", []byte("no profile")) }),
		NewCommand("8", "DeviceInformation", func(p *Plist) {
			p.Array("Queries", func(p *Plist) { p.StringItem("UDID").StringItem("BatteryLevel").StringItem("Unknown") })
		}),
		NewCommand("9", "InstalledApplicationList", nil),
		NewCommand("10", "Settings", func(p *Plist) {
			p.Array("Settings", func(p *Plist) { p.DictItem(func(p *Plist) { p.String("Item", "DeviceName") }) })
		}),
		NewCommand("11", "DeviceInformation", func(p *Plist) { p.Int("Queries", 1) }),
		NewCommand("12", "OfTheFuture", nil),
	)
	visit, err := d.Poll(t.Context())
	require.NoError(t, err)
	require.Len(t, visit.Exchanges, 12)
	require.Equal(t, []string{"com.example.one"}, d.Profiles())
	got := s.take()
	require.Equal(t, "Idle", got[0].Status)
	require.Empty(t, got[0].CommandUUID)
	byUUID := make(map[string]message)
	for i, m := range got[1:] {
		require.Equal(t, fmt.Sprint(i+1), m.CommandUUID)
		require.Equal(t, string(visit.Exchanges[i].Status), m.Status)
		byUUID[m.CommandUUID] = m
	}
	for uuid, want := range map[string]string{
		"1": "Acknowledged", "5": "Acknowledged", "6": "Error", "7": "Error", "11": "CommandFormatError", "12": "Acknowledged",
	} {
		require.Equal(t, want, byUUID[uuid].Status, uuid)
	}
	require.Len(t, byUUID["4"].ProfileList, 2)
	require.Equal(t, "com.example.one", byUUID["4"].ProfileList[0].PayloadIdentifier)
	require.Equal(t, int64(89), byUUID["6"].ErrorChain[0].ErrorCode)
	require.Equal(t, map[string]any{"UDID": d.UDID(), "BatteryLevel": 0.87}, byUUID["8"].QueryResponses)
	require.Len(t, byUUID["9"].InstalledApplicationList, 3)
	require.Equal(t, "App & Tool 0", byUUID["9"].InstalledApplicationList[0].Name)
	require.Equal(t, "DeviceName", byUUID["10"].Settings[0].Item)
}

func TestEachRequestTypeGivesAPropertyList(t *testing.T) {
	ca := newTestCA(t)
	s := newServer(t, ca)
	types := []string{
		"CertificateList", "SecurityInfo", "DeviceLock", "UserList", "ProvisioningProfileList", "AvailableOSUpdates",
		"OSUpdateStatus", "ManagedApplicationList", "Restrictions", "RestartDevice", "DeclarativeManagement",
	}
	keys := map[string]string{"DeviceLock": "MessageResult", "UserList": "Users", "Restrictions": "GlobalRestrictions"}
	for _, kind := range []Kind{Mac, IPhone} {
		d := s.device(ca, Config{Kind: kind})
		d.User("alice")
		for _, requestType := range types {
			s.enqueue(d.Channel, NewCommand("", requestType, nil))
		}
		visit, err := d.Poll(t.Context())
		require.NoError(t, err)
		require.Len(t, visit.Exchanges, len(types))
		for i, m := range s.take()[1:] {
			require.Equal(t, "Acknowledged", m.Status)
			var all map[string]any
			require.NoError(t, decodeXML(m.body, &all))
			key := types[i]
			if keys[key] != "" {
				key = keys[key]
			}
			if key != "RestartDevice" && key != "DeclarativeManagement" {
				require.Contains(t, all, key)
			}
		}
	}
}

func TestBehaviour(t *testing.T) {
	ca := newTestCA(t)
	s := newServer(t, ca)
	var payload Plist
	payload.String("Custom", "yes")
	answers := map[string]Answer{
		"1": {Status: StatusError, ErrorChain: []ErrorItem{{Code: -5, Domain: "D<", Description: "no"}}},
		"2": {Status: StatusCommandFormatError},
		"3": {Payload: payload.Content()},
		"4": {Status: StatusNotNow},
	}
	d := s.device(ca, Config{Behaviour: func(c *Command) Answer { return answers[c.UUID] }})
	for _, uuid := range []string{"1", "2", "3", "4", "5"} {
		s.enqueue(d.Channel, NewCommand(uuid, "ProfileList", nil))
	}
	visit, err := d.Poll(t.Context())
	require.NoError(t, err)
	require.Len(t, visit.Exchanges, 4, "this server stops at NotNow")
	got := s.take()[1:]
	require.Equal(t, "Error", got[0].Status)
	require.Equal(t, int64(-5), got[0].ErrorChain[0].ErrorCode)
	require.Equal(t, "D<", got[0].ErrorChain[0].ErrorDomain)
	require.Equal(t, "CommandFormatError", got[1].Status)
	require.Contains(t, string(got[2].body), "<key>Custom</key>\n<string>yes</string>")
	require.Equal(t, "NotNow", got[3].Status)
}

func TestRandom(t *testing.T) {
	count := func(rates Rates) map[Status]int {
		behave := Random(7, rates)
		got := make(map[Status]int)
		for range 1000 {
			got[behave(&Command{}).Status]++
		}
		return got
	}
	require.Equal(t, map[Status]int{"": 1000}, count(Rates{}))
	require.Equal(t, map[Status]int{StatusError: 1000}, count(Rates{Error: 1}))
	mixed := count(Rates{NotNow: .2, Error: .2, CommandFormatError: .2})
	require.Equal(t, mixed, count(Rates{NotNow: .2, Error: .2, CommandFormatError: .2}), "the same seed")
	for _, status := range []Status{"", StatusNotNow, StatusError, StatusCommandFormatError} {
		require.Greater(t, mixed[status], 100, status)
	}
}

func TestResultsAreResentUntilTaken(t *testing.T) {
	ca := newTestCA(t)
	s := newServer(t, ca)
	d := s.device(ca, Config{})
	s.enqueue(d.Channel, NewCommand("1", "ProfileList", nil), NewCommand("2", "ProfileList", nil))

	s.setRefuse("Acknowledged", http.StatusInternalServerError)
	for range 2 {
		_, err := d.Poll(t.Context())
		var refused *RefusedError
		require.ErrorAs(t, err, &refused)
	}
	got := s.take()
	require.Len(t, got, 3, "Idle, result, the same result")
	require.Equal(t, got[1].body, got[2].body)

	s.setRefuse("Acknowledged", 0)
	visit, err := d.Poll(t.Context())
	require.NoError(t, err)
	require.Len(t, visit.Resent, 1)
	require.Equal(t, "1", visit.Resent[0].Command.UUID)
	require.Len(t, visit.Exchanges, 1)
	got2 := s.take()
	require.Equal(t, got[1].body, got2[0].body, "the kept result comes instead of Idle")
	require.Equal(t, "2", got2[1].CommandUUID)

	// Nothing is kept any more.
	visit, err = d.Poll(t.Context())
	require.NoError(t, err)
	require.Empty(t, visit.Resent)
	require.Equal(t, "Idle", s.take()[0].Status)
}

func TestNotNowIsNotKept(t *testing.T) {
	ca := newTestCA(t)
	s := newServer(t, ca)
	d := s.device(ca, Config{Behaviour: Random(1, Rates{NotNow: 1})})
	s.enqueue(d.Channel, NewCommand("1", "ProfileList", nil))
	s.setRefuse("NotNow", http.StatusBadGateway)
	_, err := d.Poll(t.Context())
	require.Error(t, err)
	s.setRefuse("NotNow", 0)
	visit, err := d.Poll(t.Context())
	require.NoError(t, err)
	require.Empty(t, visit.Resent)
	got := s.take()
	require.Equal(t, []string{"Idle", "NotNow", "Idle", "NotNow"},
		[]string{got[0].Status, got[1].Status, got[2].Status, got[3].Status})
}

func TestAuthenticateForgets(t *testing.T) {
	ca := newTestCA(t)
	s := newServer(t, ca)
	d := s.device(ca, Config{})
	for _, c := range []*Channel{d.Channel, d.User("alice")} {
		s.enqueue(c,
			NewCommand("1", "InstallProfile", func(p *Plist) { p.Data("Payload", NewProfile("one", "")) }),
			NewCommand("2", "ProfileList", nil))
		_, err := c.Poll(t.Context())
		require.NoError(t, err)
		s.enqueue(c, NewCommand("3", "ProfileList", nil))
		s.setRefuse("Acknowledged", 500)
		_, err = c.Poll(t.Context())
		require.Error(t, err)
		s.setRefuse("Acknowledged", 0)
		require.Equal(t, []string{"one"}, c.Profiles())
	}
	require.NoError(t, d.Authenticate(t.Context()))
	s.queues = make(map[string][][]byte)
	for _, c := range []*Channel{d.Channel, d.User("alice")} {
		require.Empty(t, c.Profiles())
		visit, err := c.Poll(t.Context())
		require.NoError(t, err)
		require.Empty(t, visit.Resent)
	}
}

func TestAuthModes(t *testing.T) {
	ca := newTestCA(t)
	t.Run("header", func(t *testing.T) {
		s := newServer(t, ca)
		d := s.device(ca, Config{Auth: AuthHeader, Header: http.Header{"X-Extra": {"1"}}})
		require.NoError(t, d.Enroll(t.Context()))
		m := s.take()[0]
		require.Equal(t, d.Identity().Cert.Raw, m.signer.Raw)
		require.Empty(t, m.header.Get("Mdm-Signature"))
		require.Equal(t, "1", m.header.Get("X-Extra"))
	})
	t.Run("TLS", func(t *testing.T) {
		s := newServer(t, ca)
		host, err := ca.Issue("host", WithHosts("127.0.0.1"), WithExtKeyUsage(x509.ExtKeyUsageServerAuth))
		require.NoError(t, err)
		secure := httptest.NewUnstartedServer(s)
		secure.TLS = &tls.Config{
			Certificates: []tls.Certificate{host.TLS()}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: ca.Pool(),
		}
		secure.StartTLS()
		defer secure.Close()
		id, err := ca.Issue("device")
		require.NoError(t, err)
		client := TLSClient(id, ca.Pool())
		defer client.CloseIdleConnections()
		d, err := NewDevice(secure.URL+"/mdm", id, Config{Auth: AuthTLS, Client: client})
		require.NoError(t, err)
		require.NoError(t, d.Enroll(t.Context()))
		m := s.take()[0]
		require.Equal(t, id.Cert.Raw, m.signer.Raw)
		require.Empty(t, m.header.Get("Mdm-Signature"))
	})
}

func TestDo(t *testing.T) {
	ca := newTestCA(t)
	s := newServer(t, ca)
	d := s.device(ca, Config{})
	response, err := d.Do(t.Context(), "/other", "text/plain", new(Plist).String("UDID", "x").Document())
	require.NoError(t, err)
	require.Equal(t, http.StatusUnsupportedMediaType, response.Status)
	require.Equal(t, "/other", s.take()[0].path)
	response, err = d.Do(t.Context(), "", "", []byte("garbage"))
	require.NoError(t, err)
	require.Equal(t, http.StatusBadRequest, response.Status)
}

func TestPollEndsAtABadServer(t *testing.T) {
	reply := NewCommand("1", "ProfileList", nil)
	endless := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.Write(reply) }))
	defer endless.Close()
	id, err := newTestCA(t).Issue("device")
	require.NoError(t, err)
	d, err := NewDevice(endless.URL, id, Config{Client: endless.Client(), MaxCommands: 5})
	require.NoError(t, err)
	visit, err := d.Poll(t.Context())
	require.ErrorIs(t, err, ErrEndless)
	require.Len(t, visit.Exchanges, 5)

	reply = []byte("<plist><dict></dict></plist>")
	_, err = d.Poll(t.Context())
	require.ErrorIs(t, err, errReply)

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = d.Poll(ctx)
	require.ErrorIs(t, err, context.Canceled)
}

func TestNewDeviceRefuses(t *testing.T) {
	_, err := NewDevice("http://localhost", nil, Config{})
	require.ErrorContains(t, err, "identity")
	id, err := newTestCA(t).Issue("device")
	require.NoError(t, err)
	_, err = NewDevice("/mdm", id, Config{})
	require.ErrorContains(t, err, "URL")
}

func TestManyAtOnce(t *testing.T) {
	ca := newTestCA(t)
	s := newServer(t, ca)
	var mu sync.Mutex
	seen := make(map[string]int)
	cfg := Config{Client: s.Client(), Observe: func(kind string, _ time.Duration, err error) {
		mu.Lock()
		defer mu.Unlock()
		if err == nil {
			seen[kind]++
		}
	}}
	const devices = 50
	var group sync.WaitGroup
	for i := range devices {
		d := s.device(ca, cfg)
		s.enqueue(d.Channel, NewCommand(fmt.Sprint(i), "DeviceInformation", nil))
		group.Go(func() {
			if err := d.Enroll(t.Context()); err != nil {
				t.Error(err)
			}
			if _, err := d.Poll(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	require.Equal(t, map[string]int{
		"Authenticate": devices, "TokenUpdate": devices, "Idle": devices, "Acknowledged": devices,
	}, seen)
}

func FuzzParseCommand(f *testing.F) {
	f.Add(NewCommand("1", "ProfileList", nil))
	f.Add([]byte("bplist00"))
	f.Add([]byte("<plist><dict><key>CommandUUID</key></dict></plist>"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		command, err := ParseCommand(raw)
		if err == nil && (command.UUID == "" || command.RequestType == "") {
			t.Fatal("half a command")
		}
	})
}

func BenchmarkSign(b *testing.B) {
	ca, err := NewCA()
	require.NoError(b, err)
	id, err := ca.Issue("device")
	require.NoError(b, err)
	body := NewCommand("", "ProfileList", nil)
	for name, options := range map[string]SignOptions{"plain": {}, "attributes": {SignedAttributes: true}, "apple": AppleSign()} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Sign(id, body, options); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
