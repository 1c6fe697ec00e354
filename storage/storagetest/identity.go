package storagetest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"fmt"
	"math/big"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

// These subtests show who may take an enrollment over. The subtests of
// enrolling show the rules that need no policy.
func identityTests() []subtest {
	return []subtest{
		{"Authenticate takes over as the policy has it", reenrollPolicies},
		{"an expired certificate is never pinned", expiredCertificates},
		{"other messages take over as the policy has it", renewalPolicies},
		{"a renewal keeps everything", renewalKeeps},
		{"a retired certificate comes back in a renewal window alone", renewalGoesBack},
		{"a renewal window lets nobody in twice", renewalOfOthers},
		{"of certificates that renew at once one lives", renewalRace},
		{"a certificate to be confirmed changes nothing", confirmNothing},
		{"a certificate is confirmed once", confirmOnce},
		{"one of two confirmed certificates that begin at once lives", confirmRace},
	}
}

// The device of these subtests, with the serial number of authenticate.
const (
	namedUDID   = "00008020-000915083C80012E"
	namedSerial = "S-" + namedUDID
)

// shown is a real certificate with a subject and alternative names, and the
// policies it meets.
type shown struct {
	subject string
	names   []string
}

// showing is the channel with a new certificate.
func (c *channel) showing(t *testing.T, s shown) *channel {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: s.subject}, DNSNames: s.names,
		NotAfter: c.h.Clock.Now().Add(365 * 24 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	sum := sha256.Sum256(der)
	w := *c
	w.pin = &storage.Pin{Hash: hex.EncodeToString(sum[:]), Certificate: der, NotAfter: template.NotAfter}
	return &w
}

// under is the channel with other policies.
func (c *channel) under(change func(*storage.Pin)) *channel {
	w, pin := *c, *c.pin
	change(&pin)
	w.pin = &pin
	return &w
}

// opens opens the renewal window of a device for an hour.
func (h *Harness) opens(t *testing.T, id string) {
	t.Helper()
	require.EqualValues(t, 1, h.Exec(t, "UPDATE nano_enrollments SET renewal_until = ? WHERE id = ?", h.Clock.Now().Add(time.Hour).UnixMicro(), id))
}

// generic is the subject that a profile gives to each device.
const generic = "MDM Identity"

// Of the enrollment's pinned certificate and another one.
var takeovers = []struct {
	name     string
	was, is  shown
	sameName bool // what same-subject lets in
}{
	{"a stranger's", shown{subject: "Mallory"}, shown{subject: "Eve"}, false},
	{"one subject for all", shown{subject: generic}, shown{subject: generic}, false},
	{"one subject for all, and another's name", shown{subject: generic}, shown{generic, []string{"00008020-000915083C80012F.example.org"}}, false},
	{"the same subject with the UDID", shown{subject: namedUDID}, shown{subject: namedUDID}, true},
	{"the same subject, the serial number beside it", shown{subject: generic}, shown{generic, []string{namedSerial + ".example.org"}}, true},
	{"another subject with the UDID", shown{subject: generic}, shown{subject: namedUDID}, false},
}

// expiredCertificates: a certificate that has expired acts for the device that
// it is pinned to, and is never pinned itself, whatever the policies are.
func expiredCertificates(t *testing.T, h *Harness) {
	everything := func(p *storage.Pin) {
		p.Retro, p.Reenroll, p.Renewal = true, storage.ReenrollAllow, storage.RenewalSameSubject
	}
	expired := func(p *storage.Pin) { everything(p); p.NotAfter = h.Clock.Now().Add(-time.Second) }
	d := h.device(namedUDID).showing(t, shown{subject: namedUDID}).under(everything)
	d.enrolls(t)
	other := h.device(namedUDID).showing(t, shown{subject: namedUDID})
	stranger := h.device("NEW").showing(t, shown{subject: "NEW"})
	h.device("IMPORTED-1").enrolls(t)
	imported := h.device("IMPORTED-1").showing(t, shown{subject: "IMPORTED-1"})
	h.opens(t, namedUDID)
	for _, c := range []*channel{other, stranger, imported} {
		require.ErrorIs(t, c.under(expired).authenticate(t), storage.ErrIdentity)
		require.ErrorIs(t, c.under(expired).seen(t), storage.ErrIdentity)
	}
	require.NoError(t, d.under(expired).seen(t))
	require.NoError(t, d.under(expired).authenticate(t))
	_, err := d.under(expired).tokenUpdate(t)
	require.NoError(t, err)
	require.NoError(t, imported.under(everything).seen(t), "one that has not expired is pinned as ever")
}

func reenrollPolicies(t *testing.T, h *Harness) {
	for _, c := range takeovers {
		for policy, want := range map[storage.Reenroll]bool{
			storage.ReenrollAllow: true, storage.ReenrollSameSubject: c.sameName, storage.ReenrollDeny: false,
		} {
			for _, window := range []bool{false, true} {
				name := fmt.Sprint(c.name, ", policy ", policy, ", window ", window)
				was := h.device(namedUDID).showing(t, c.was).under(func(p *storage.Pin) { p.Reenroll = policy })
				// Each round begins with a certificate that was let in.
				h.closes(t)
				require.NoError(t, was.under(func(p *storage.Pin) { p.Reenroll = storage.ReenrollAllow }).authenticate(t))
				_, err := was.tokenUpdate(t)
				require.NoError(t, err)
				require.NoError(t, was.setBootstrapToken(t, "b"))
				require.NoError(t, was.authenticate(t), "%s: with its own it may always begin anew", name)
				_, err = was.tokenUpdate(t)
				require.NoError(t, err)
				if window {
					h.opens(t, namedUDID)
				}
				is := h.device(namedUDID).showing(t, c.is).under(func(p *storage.Pin) { p.Reenroll = policy })
				err = is.authenticate(t)
				if want || window {
					require.NoError(t, err, name)
					require.ErrorIs(t, was.seen(t), storage.ErrIdentity, name)
					require.NoError(t, is.seen(t), name)
					continue
				}
				require.ErrorIs(t, err, storage.ErrIdentity, name)
				require.NoError(t, was.seen(t), name)
				require.ErrorIs(t, is.seen(t), storage.ErrIdentity, name)
			}
		}
	}
	// Of a device that was imported without one the name alone counts, and
	// with deny nothing does.
	h.device("IMPORTED-1").enrolls(t)
	stranger := h.device("IMPORTED-1").showing(t, shown{subject: generic})
	named := h.device("IMPORTED-1").showing(t, shown{subject: "x", names: []string{"imported-1"}})
	same := func(p *storage.Pin) { p.Reenroll = storage.ReenrollSameSubject }
	require.ErrorIs(t, stranger.under(same).authenticate(t), storage.ErrIdentity)
	require.ErrorIs(t, named.under(func(p *storage.Pin) { p.Reenroll = storage.ReenrollDeny }).authenticate(t), storage.ErrIdentity)
	require.NoError(t, named.under(same).authenticate(t))
	// No policy keeps a new device out, and none lets another's in.
	h.closes(t)
	h.opens(t, namedUDID)
	for policy := storage.ReenrollAllow; policy <= storage.ReenrollDeny; policy++ {
		set := func(p *storage.Pin) { p.Reenroll = policy }
		fresh := h.device(fmt.Sprint("NEW-", policy)).showing(t, shown{subject: generic}).under(set)
		require.NoError(t, fresh.authenticate(t))
		other := *fresh
		other.enroll = mdm.EnrollID{Type: mdm.Device, ID: namedUDID}
		require.ErrorIs(t, other.authenticate(t), storage.ErrIdentity)
	}
}

// closes closes all renewal windows.
func (h *Harness) closes(t *testing.T) {
	t.Helper()
	h.Exec(t, "UPDATE nano_enrollments SET renewal_until = NULL")
}

// first is a message other than Authenticate that a renewed certificate may
// come with first.
type first struct {
	name string
	send func(c *channel, t *testing.T) error
}

var firsts = []first{
	{"TokenUpdate", func(c *channel, t *testing.T) error { _, err := c.tokenUpdate(t); return err }},
	{"Idle", func(c *channel, t *testing.T) error { _, err := c.report(t, mdm.StatusIdle, ""); return err }},
	{"Acknowledged", func(c *channel, t *testing.T) error { _, err := c.report(t, mdm.StatusAcknowledged, "C"); return err }},
	{"NotNow", func(c *channel, t *testing.T) error { _, err := c.report(t, mdm.StatusNotNow, "C"); return err }},
	{"GetBootstrapToken", func(c *channel, t *testing.T) error { _, err := c.bootstrapToken(t); return err }},
	{"SetBootstrapToken", func(c *channel, t *testing.T) error { return c.setBootstrapToken(t, "b") }},
	{"DeclarativeManagement", func(c *channel, t *testing.T) error { return c.seen(t) }},
	{"a user's Idle", func(c *channel, t *testing.T) error { _, err := c.user("U").report(t, mdm.StatusIdle, ""); return err }},
	{"a user's TokenUpdate", func(c *channel, t *testing.T) error { _, err := c.user("U").tokenUpdate(t); return err }},
	{"UserAuthenticate", func(c *channel, t *testing.T) error { return c.user("U").userAuthenticate(t) }},
	{"CheckOut", func(c *channel, t *testing.T) error { return c.checkOut(t) }},
}

func renewalPolicies(t *testing.T, h *Harness) {
	for i, c := range takeovers {
		for policy, wants := range map[storage.Renewal]struct{ inside, outside bool }{
			storage.RenewalDeny: {false, false}, storage.RenewalWindow: {true, false}, storage.RenewalSameSubject: {true, c.sameName},
		} {
			for _, window := range []bool{false, true} {
				want := wants.outside
				if window {
					want = wants.inside
				}
				h.closes(t)
				was := h.device(namedUDID).showing(t, c.was).enrolls(t)
				if window {
					h.opens(t, namedUDID)
				}
				for j, first := range firsts {
					if j%len(takeovers) != i && c.name != takeovers[3].name {
						continue // each message with some, and all with one
					}
					name := fmt.Sprint(c.name, ", policy ", policy, ", window ", window, ", ", first.name)
					is := h.device(namedUDID).showing(t, c.is).under(func(p *storage.Pin) { p.Renewal = policy })
					err := first.send(is, t)
					if !want {
						require.ErrorIs(t, err, storage.ErrIdentity, name)
						require.NoError(t, was.seen(t), name)
						continue
					}
					require.NoError(t, err, name)
					require.ErrorIs(t, was.seen(t), storage.ErrIdentity, name)
					require.NoError(t, is.seen(t), name)
					was = is.under(func(p *storage.Pin) { p.Renewal = storage.RenewalDeny })
				}
			}
		}
	}
}

func renewInWindow(p *storage.Pin) { p.Renewal = storage.RenewalWindow }
func renewSame(p *storage.Pin)     { p.Renewal = storage.RenewalSameSubject }

// renewalKeeps: a device that renews its certificate keeps its state and its
// users', in every way of renewal.
func renewalKeeps(t *testing.T, h *Harness) {
	for i, way := range []struct {
		name   string
		window bool
		policy func(*storage.Pin)
	}{{"in a window", true, renewInWindow}, {"by its subject", false, renewSame}} {
		id := fmt.Sprint(namedUDID, "-", i)
		old := h.device(id).showing(t, shown{subject: id}).enrolls(t)
		_, err := old.apply(t, &storage.TokenUpdate{Src: old.source(), Message: &mdm.TokenUpdate{
			Enrollment: old.identity(), Topic: topicA, PushMagic: "magic", Token: []byte("token"), UnlockToken: []byte("unlock"), Raw: []byte("raw"),
		}})
		require.NoError(t, err)
		user := old.user("U").enrolls(t)
		require.NoError(t, old.setBootstrapToken(t, "bootstrap"))
		h.enqueue(t, []string{id, user.enroll.ID}, "1", "2")
		require.Equal(t, "1", old.polls(t))
		if way.window {
			h.opens(t, id)
		}

		renewed := h.device(id).showing(t, shown{subject: id}).under(way.policy)
		require.Equal(t, "2", renewed.reports(t, mdm.StatusAcknowledged, "1"), way.name)
		require.Equal(t, "1", renewed.user("U").polls(t), way.name)
		token, err := renewed.bootstrapToken(t)
		require.NoError(t, err)
		require.Equal(t, "bootstrap", token)
		require.Equal(t, []string{"unlock"}, h.Strings(t, "SELECT unlock_token FROM nano_devices WHERE id = ?", id))
		tally, err := renewed.tokenUpdate(t)
		require.NoError(t, err)
		require.Equal(t, 3, tally, "it goes on, as it does not enroll anew")
		require.EqualValues(t, 2, h.Int(t, "SELECT COUNT(*) FROM nano_cert_auth_associations WHERE id = ?", id))
		require.EqualValues(t, 1, h.Int(t, "SELECT COUNT(*) FROM nano_cert_auth_associations WHERE id = ? AND retired_at IS NULL", id))
		_, err = old.report(t, mdm.StatusIdle, "")
		require.ErrorIs(t, err, storage.ErrIdentity)
		require.ErrorIs(t, old.under(way.policy).checkOut(t), map[bool]error{false: storage.ErrIdentity}[way.window])
	}
}

func renewalGoesBack(t *testing.T, h *Harness) {
	old := h.device(namedUDID).showing(t, shown{subject: namedUDID}).enrolls(t)
	h.opens(t, namedUDID)
	next := h.device(namedUDID).showing(t, shown{subject: namedUDID}).under(renewInWindow)
	require.NoError(t, next.seen(t))
	require.ErrorIs(t, old.seen(t), storage.ErrIdentity, "the policy is the certificate's that comes")

	// The renewal failed half-way: the device has the old one still.
	require.NoError(t, old.under(renewInWindow).seen(t))
	require.ErrorIs(t, next.under(func(p *storage.Pin) { p.Renewal = storage.RenewalDeny }).seen(t), storage.ErrIdentity)
	require.NoError(t, next.under(renewSame).authenticate(t), "and Authenticate likewise")
	require.EqualValues(t, 2, h.Int(t, "SELECT COUNT(*) FROM nano_cert_auth_associations"))
	require.EqualValues(t, 1, h.Int(t, "SELECT COUNT(*) FROM nano_cert_auth_associations WHERE retired_at IS NULL"))

	// Outside nothing brings it back, whatever it is called.
	h.Clock.Advance(time.Hour)
	for name, policy := range map[string]func(*storage.Pin){
		"window": renewInWindow, "same subject": renewSame,
		"retro": func(p *storage.Pin) { p.Retro = true },
		"all": func(p *storage.Pin) {
			p.Retro, p.Renewal, p.Reenroll = true, storage.RenewalSameSubject, storage.ReenrollAllow
		},
		"reenroll": func(p *storage.Pin) { p.Reenroll = storage.ReenrollSameSubject },
	} {
		back := old.under(policy)
		refused(t, back, storage.ErrIdentity)
		require.ErrorIs(t, back.authenticate(t), storage.ErrIdentity, name)
		require.ErrorIs(t, back.checkOut(t), storage.ErrIdentity, name)
	}
	// Not even if the device has no other, as after an operator took that away.
	h.Exec(t, "UPDATE nano_cert_auth_associations SET retired_at = ? WHERE retired_at IS NULL", h.Clock.Now().UnixMicro())
	refused(t, old.under(func(p *storage.Pin) { p.Retro = true }), storage.ErrIdentity)
	refused(t, old.under(renewSame), storage.ErrIdentity)
}

func renewalOfOthers(t *testing.T, h *Harness) {
	a := h.device("AAAAAAAAAA").showing(t, shown{subject: generic}).enrolls(t)
	old := h.device("BBBBBBBBBB").showing(t, shown{subject: generic}).enrolls(t)
	b := h.device("BBBBBBBBBB").showing(t, shown{subject: generic}).enrolls(t)
	h.opens(t, "AAAAAAAAAA")
	for _, hash := range []*channel{b, old} { // live and retired ones of another device
		thief := h.device("AAAAAAAAAA").with(hash.pin.Hash).under(func(p *storage.Pin) {
			p.Certificate, p.Renewal, p.Retro = hash.pin.Certificate, storage.RenewalWindow, true
		})
		refused(t, thief, storage.ErrIdentity)
		require.ErrorIs(t, thief.authenticate(t), storage.ErrIdentity)
		require.ErrorIs(t, thief.checkOut(t), storage.ErrIdentity)
	}
	refused(t, h.device("BBBBBBBBBB").showing(t, shown{subject: generic}).under(renewInWindow), storage.ErrIdentity)
	require.NoError(t, a.seen(t))
	require.NoError(t, b.seen(t))
}

func renewalRace(t *testing.T, h *Harness) {
	const n = 8
	for round := range 3 {
		id := fmt.Sprint(namedUDID, "-", round)
		h.device(id).showing(t, shown{subject: id}).enrolls(t)
		h.enqueue(t, []string{id}, "C")
		h.opens(t, id)
		var rivals []*channel
		for range n {
			rivals = append(rivals, h.device(id).showing(t, shown{subject: id}).under(renewInWindow))
		}
		for _, err := range together(n, func(i int) error { return firsts[(i+round)%4].send(rivals[i], t) }) {
			require.NoError(t, err)
		}
		live := h.Strings(t, "SELECT sha256 FROM nano_cert_auth_associations WHERE id = ? AND retired_at IS NULL", id)
		require.Len(t, live, 1)
		require.EqualValues(t, n+1, h.Int(t, "SELECT COUNT(*) FROM nano_cert_auth_associations WHERE id = ?", id))
		// And all at once with the same one, which is pinned once.
		same := h.device(id).showing(t, shown{subject: id}).under(renewInWindow)
		for _, err := range together(n, func(i int) error { return firsts[i%6].send(same, t) }) {
			require.NoError(t, err)
		}
		require.Equal(t, []string{same.pin.Hash}, h.Strings(t, "SELECT sha256 FROM nano_cert_auth_associations WHERE id = ? AND retired_at IS NULL", id))
		require.EqualValues(t, n+2, h.Int(t, "SELECT COUNT(*) FROM nano_cert_auth_associations WHERE id = ?", id))
	}
}

func unconfirmed(p *storage.Pin) { p.Unconfirmed = true }

func confirmNothing(t *testing.T, h *Harness) {
	fresh := h.device(namedUDID).showing(t, shown{subject: namedUDID})
	require.ErrorIs(t, fresh.under(unconfirmed).authenticate(t), storage.ErrUnconfirmed)
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_devices"))
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_cert_auth_associations"))

	fresh.enrolls(t)
	h.enqueue(t, []string{namedUDID}, "C")
	require.NoError(t, fresh.setBootstrapToken(t, "b"))
	next := h.device(namedUDID).showing(t, shown{subject: namedUDID}).under(renewSame).under(unconfirmed).withEvents(event("e", "mdm.Connect"))
	require.ErrorIs(t, next.authenticate(t), storage.ErrUnconfirmed)
	for _, first := range firsts {
		require.ErrorIs(t, first.send(next, t), storage.ErrUnconfirmed, first.name)
	}
	h.device("IMPORTED-1").enrolls(t)
	retro := h.device("IMPORTED-1").retro("r").under(unconfirmed)
	for _, first := range firsts {
		require.ErrorIs(t, first.send(retro, t), storage.ErrUnconfirmed, first.name)
	}
	require.Equal(t, "C queued", queueStates(t, h, namedUDID))
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_events"))
	require.EqualValues(t, 1, h.Int(t, "SELECT COUNT(*) FROM nano_cert_auth_associations"))
	require.Equal(t, "C", fresh.polls(t))

	// A certificate that no policy allows is refused at once, without a
	// confirmation.
	stranger := h.device(namedUDID).showing(t, shown{subject: "Eve"}).under(unconfirmed)
	refused(t, stranger, storage.ErrIdentity)
	require.ErrorIs(t, stranger.under(func(p *storage.Pin) { p.Reenroll = storage.ReenrollDeny }).authenticate(t), storage.ErrIdentity)
}

func confirmOnce(t *testing.T, h *Harness) {
	d := h.device(namedUDID).showing(t, shown{subject: namedUDID})
	require.ErrorIs(t, d.under(unconfirmed).authenticate(t), storage.ErrUnconfirmed)
	require.NoError(t, d.authenticate(t))
	// Pinned, it is not asked about again.
	again := d.under(unconfirmed)
	require.NoError(t, again.authenticate(t))
	_, err := again.tokenUpdate(t)
	require.NoError(t, err)
	for _, first := range firsts {
		if first.name != "CheckOut" {
			require.NoError(t, first.send(again, t), first.name)
		}
	}
	require.NoError(t, again.checkOut(t))
}

func confirmRace(t *testing.T, h *Harness) {
	const n = 6
	shared := h.device("x").showing(t, shown{subject: generic})
	rivals := make([]*channel, n)
	for i := range rivals {
		rivals[i] = h.device(fmt.Sprint("RIVAL-", i)).with(shared.pin.Hash)
	}
	for _, err := range together(n, func(i int) error { return rivals[i].under(unconfirmed).authenticate(t) }) {
		require.ErrorIs(t, err, storage.ErrUnconfirmed)
	}
	accepted := 0
	for _, err := range together(n, func(i int) error { return rivals[i].authenticate(t) }) {
		if err == nil {
			accepted++
		} else {
			require.ErrorIs(t, err, storage.ErrIdentity)
		}
	}
	require.Equal(t, 1, accepted)
}
