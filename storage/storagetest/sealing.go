package storagetest

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
)

func sealingTests() []subtest {
	return []subtest{
		{"nothing that is sealed can be read behind the store's back", sealedSecrets},
		{"commands are sealed on request", sealedCommands},
		{"sealing can be turned on later", sealedLater},
		{"a store without the key does not open", sealedWrongKey},
		{"keys are rotated", sealedRotation},
		{"a value that was moved does not open", sealedMoved},
		{"one value that is lost does not hold up others", sealedLost},
		{"a value that looks sealed is taken as it is", sealedLookalike},
		{"a run of resealing goes on where it stood", sealedSteps},
	}
}

// seals is a Sealer of AES-GCM, with keys made of words. It is for tests: its
// nonces repeat.
type seals []string

func (s seals) KeyIDs() []string {
	ids := make([]string, len(s))
	for i, word := range s {
		sum := sha256.Sum256([]byte(word))
		ids[i] = hex.EncodeToString(sum[:8])
	}
	return ids
}

func (s seals) aead(i int) cipher.AEAD {
	key := sha256.Sum256([]byte("key " + s[i]))
	block, err := aes.NewCipher(key[:])
	if err != nil {
		panic(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic(err)
	}
	return aead
}

func (s seals) Seal(place string, plain []byte) []byte {
	aead := s.aead(0)
	return aead.Seal(nil, make([]byte, aead.NonceSize()), plain, []byte(place))
}

func (s seals) Open(keyID, place string, sealed []byte) ([]byte, error) {
	for i, id := range s.KeyIDs() {
		if id == keyID {
			aead := s.aead(i)
			return aead.Open(nil, make([]byte, aead.NonceSize()), sealed, []byte(place))
		}
	}
	return nil, errors.New("no such key")
}

// sealing opens another store with keys.
func (h *Harness) sealing(t *testing.T, commands bool, keys ...string) *sqlstore.Store {
	t.Helper()
	return h.Open(t, func(cfg *sqlstore.Config) { cfg.Sealer, cfg.SealCommands = seals(keys), commands })
}

// refused is the error of opening a store with keys; none are no Sealer.
func (h *Harness) refused(t *testing.T, keys ...string) error {
	t.Helper()
	h.shared(t)
	cfg := h.cfg
	if len(keys) > 0 {
		cfg.Sealer = seals(keys)
	}
	store, err := sqlstore.Open(t.Context(), cfg)
	if err == nil {
		require.NoError(t, store.Close())
	}
	return err
}

// plantSecrets stores a secret in each place that is to be sealed, through store.
func plantSecrets(t *testing.T, h *Harness, store *sqlstore.Store) {
	t.Helper()
	d := h.device("D").on(store)
	u := d.user("U")
	raw := func(what string) []byte { return []byte("<plist>" + what + "-secret</plist>") }
	sourceOf := func(topic string) storage.Source {
		src := d.source()
		e := event("event-"+topic, topic)
		e.Raw = raw("event-" + topic)
		src.Events = []storage.Event{e}
		return src
	}
	for _, op := range []storage.Op{
		&storage.Authenticate{Src: sourceOf(storage.TopicAuthenticate), Message: &mdm.Authenticate{Enrollment: d.identity(), Topic: topicA, Raw: raw("authenticate")}},
		&storage.TokenUpdate{Src: sourceOf(storage.TopicTokenUpdate), Message: &mdm.TokenUpdate{
			Enrollment: d.identity(), Topic: topicA, PushMagic: "magic", Token: []byte("token"), UnlockToken: []byte("unlock-secret"), Raw: raw("token-update"),
		}},
		&storage.TokenUpdate{Src: u.source(), Message: &mdm.TokenUpdate{Enrollment: u.identity(), Topic: topicA, PushMagic: "magic", Token: []byte("token"), Raw: raw("user-token-update")}},
		&storage.UserAuthenticate{Src: u.source(), Message: &mdm.UserAuthenticate{Enrollment: u.identity(), Raw: raw("user-authenticate")}},
		&storage.SetBootstrapToken{Src: sourceOf(storage.TopicSetBootstrapToken), Token: []byte("bootstrap-secret")},
	} {
		_, err := d.apply(t, op)
		require.NoError(t, err)
	}
	require.NoError(t, store.PutEventSink(t.Context(), storage.EventSink{Name: "S", URL: "https://sink", Keys: []string{"sink-secret"}, Enabled: true}))
	_, err := store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: secretCommand(), IDs: []string{"D"}})
	require.NoError(t, err)
}

func secretCommand() *mdm.Command {
	return &mdm.Command{CommandUUID: "C", RequestType: "InstallProfile", Raw: []byte("<plist>command-secret</plist>")}
}

// readsPlanted checks that a store gives back what was planted.
func readsPlanted(t *testing.T, h *Harness, store *sqlstore.Store) {
	t.Helper()
	d := h.device("D").on(store)
	token, err := d.bootstrapToken(t)
	require.NoError(t, err)
	require.Equal(t, "bootstrap-secret", token)
	out, err := d.apply(t, &storage.Report{Src: d.source(), Status: mdm.StatusIdle})
	require.NoError(t, err)
	require.Equal(t, secretCommand(), out.Command)
	sinks, err := store.EventSinks(t.Context())
	require.NoError(t, err)
	require.Equal(t, []string{"sink-secret"}, sinks[0].Keys)
	// The same command again is no conflict, other bytes are.
	_, err = store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: secretCommand(), IDs: []string{"D"}})
	require.NoError(t, err)
	other := secretCommand()
	other.Raw = []byte("<plist>other</plist>")
	_, err = store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: other, IDs: []string{"D"}})
	require.ErrorIs(t, err, storage.ErrConflict)
}

// planted returns each sealed column's value behind the store's back.
func planted(t *testing.T, h *Harness) map[string]string {
	t.Helper()
	values := make(map[string]string)
	for column, query := range map[string]string{
		"authenticate": "FROM nano_devices", "token_update": "FROM nano_devices", "unlock_token": "FROM nano_devices",
		"bootstrap_token": "FROM nano_devices", "user_authenticate": "FROM nano_users", "config": "FROM nano_event_sinks",
		"command": "FROM nano_commands",
	} {
		rows := h.Strings(t, "SELECT "+column+" "+query)
		require.Len(t, rows, 1, column)
		values[column] = rows[0]
	}
	values["user token_update"] = h.Strings(t, "SELECT token_update FROM nano_users")[0]
	for _, topic := range []string{storage.TopicTokenUpdate, storage.TopicSetBootstrapToken} {
		values[topic] = h.Strings(t, "SELECT payload FROM nano_event_payloads WHERE topic = ?", topic)[0]
	}
	for _, payloads := range h.Strings(t, "SELECT payloads FROM nano_events WHERE payloads IS NOT NULL") {
		values[storage.TopicAuthenticate] += decompressed(t, payloads)
	}
	return values
}

// openly are the planted values that hold no token, and are only sealed as
// commands, if at all.
func openly(what string) bool { return what == "command" || what == storage.TopicAuthenticate }

func sealedSecrets(t *testing.T, h *Harness) {
	store := h.sealing(t, false, "one")
	plantSecrets(t, h, store)
	for what, value := range planted(t, h) {
		if openly(what) {
			require.Contains(t, value, "secret", what)
			continue
		}
		require.NotContains(t, value, "secret", what)
		require.True(t, strings.HasPrefix(value, "\xffNS1"+seals{"one"}.KeyIDs()[0]), "%s: %.24q", what, value)
	}
	readsPlanted(t, h, store)
	lease := h.holdEvents(t, store)
	_, last, err := store.NumberEvents(t.Context(), lease, 100)
	require.NoError(t, err)
	page, err := store.SinkPage(t.Context(), 0, 100)
	require.NoError(t, err)
	require.Len(t, page, int(last))
	for _, e := range page {
		want := "<plist>event-" + e.Topic + "-secret</plist>"
		require.Equal(t, want, string(e.Raw))
		payload, err := store.EventPayload(t.Context(), e.Seq)
		require.NoError(t, err)
		require.Equal(t, want, string(payload))
	}
	require.NotEmpty(t, page)
	// A bootstrap token that is deleted is gone, not sealed.
	require.NoError(t, h.device("D").on(store).setBootstrapToken(t, ""))
	require.EqualValues(t, 1, h.Int(t, "SELECT COUNT(*) FROM nano_devices WHERE bootstrap_token IS NULL"))
}

// holdEvents takes a lease for writes to the outbox.
func (h *Harness) holdEvents(t *testing.T, store *sqlstore.Store) storage.Lease {
	t.Helper()
	seen, err := store.PeekLease(t.Context(), "events")
	require.NoError(t, err)
	lease, err := store.TakeLease(t.Context(), seen, "test")
	require.NoError(t, err)
	return lease
}

func sealedCommands(t *testing.T, h *Harness) {
	store := h.sealing(t, true, "one")
	plantSecrets(t, h, store)
	require.NotContains(t, planted(t, h)["command"], "secret")
	readsPlanted(t, h, store)
	readsPlanted(t, h, h.sealing(t, false, "one"))
}

func sealedLater(t *testing.T, h *Harness) {
	plantSecrets(t, h, h.Store)
	for what, value := range planted(t, h) {
		require.Contains(t, value, "secret", what)
	}
	store := h.sealing(t, false, "one")
	readsPlanted(t, h, store)
	require.Equal(t, 9, resealAll(t, store, 100))
	for what, value := range planted(t, h) {
		require.Equal(t, openly(what), strings.Contains(value, "secret"), what)
	}
	readsPlanted(t, h, store)
	require.Zero(t, resealAll(t, store, 100), "a second run finds nothing to do")

	require.Equal(t, 1, resealAll(t, h.sealing(t, true, "one"), 100), "the command")
	require.NotContains(t, planted(t, h)["command"], "secret")
	require.Zero(t, resealAll(t, store, 100), "what is sealed with the key in use stays so")
	_, err := h.Store.Reseal(t.Context(), "", 100)
	require.ErrorIs(t, err, storage.ErrNotSealing)
}

// resealAll runs to the end and returns how many values were rewritten.
func resealAll(t *testing.T, store *sqlstore.Store, limit int) (rewritten int) {
	t.Helper()
	after := ""
	for range 1000 {
		done, err := store.Reseal(t.Context(), after, limit)
		require.NoError(t, err)
		require.LessOrEqual(t, done.Looked, limit)
		rewritten += done.Rewritten
		if after = done.Next; after == "" {
			return rewritten
		}
	}
	require.Fail(t, "resealing does not end")
	return 0
}

func sealedWrongKey(t *testing.T, h *Harness) {
	require.NoError(t, h.sealing(t, false, "one").Close())
	require.ErrorIs(t, h.refused(t), storage.ErrNotSealing)
	require.ErrorContains(t, h.refused(t, "two"), "key "+seals{"one"}.KeyIDs()[0])
	require.NoError(t, h.refused(t, "one"))
	require.NoError(t, h.refused(t, "two", "one"))
	require.Error(t, h.refused(t, "one"), "two may have sealed by now")
	h.Exec(t, "UPDATE nano_seal SET value = ? WHERE id = ?", []byte("\xffNS1"+seals{"one"}.KeyIDs()[0]+"broken"), seals{"one"}.KeyIDs()[0])
	require.ErrorContains(t, h.refused(t, "two", "one"), "does not open")
}

func sealedRotation(t *testing.T, h *Harness) {
	old := h.sealing(t, true, "old")
	plantSecrets(t, h, old)
	both := h.sealing(t, true, "new", "old")
	readsPlanted(t, h, both)
	require.ErrorContains(t, h.refused(t, "new"), "not among")
	// Values that are written meanwhile are sealed with the new key.
	require.NoError(t, h.device("D").on(both).setBootstrapToken(t, "bootstrap-secret"))
	require.Positive(t, resealAll(t, both, 1))
	for what, value := range planted(t, h) {
		if what != storage.TopicAuthenticate {
			require.True(t, strings.HasPrefix(value, "\xffNS1"+seals{"new"}.KeyIDs()[0]), what)
		}
	}
	require.NoError(t, h.refused(t, "new"), "the old key may go")
	readsPlanted(t, h, h.sealing(t, true, "new"))
}

func sealedMoved(t *testing.T, h *Harness) {
	store := h.sealing(t, false, "one")
	victim, thief := h.device("victim").on(store), h.device("thief").on(store)
	for _, d := range []*channel{victim, thief} {
		require.NoError(t, d.authenticate(t))
		require.NoError(t, d.setBootstrapToken(t, "token of "+d.enroll.ID))
	}
	stolen := h.Strings(t, "SELECT bootstrap_token FROM nano_devices WHERE id = 'victim'")[0]
	h.Exec(t, "UPDATE nano_devices SET bootstrap_token = ? WHERE id = 'thief'", []byte(stolen))
	_, err := thief.bootstrapToken(t)
	require.ErrorContains(t, err, "sealed")
	token, err := victim.bootstrapToken(t)
	require.NoError(t, err)
	require.Equal(t, "token of victim", token)
}

func sealedLost(t *testing.T, h *Harness) {
	store := h.sealing(t, false, "old")
	for _, id := range []string{"A", "B", "C"} {
		require.NoError(t, h.device(id).on(store).authenticate(t))
		require.NoError(t, h.device(id).on(store).setBootstrapToken(t, "token of "+id))
	}
	h.Exec(t, "UPDATE nano_devices SET bootstrap_token = ? WHERE id = 'B'", []byte("\xffNS1short"))
	both := h.sealing(t, false, "new", "old")
	_, err := h.device("B").on(both).bootstrapToken(t)
	require.Error(t, err)
	lost, after := 0, ""
	for {
		done, err := both.Reseal(t.Context(), after, 1)
		require.NoError(t, err)
		lost += done.Unreadable
		if after = done.Next; after == "" {
			break
		}
	}
	require.Equal(t, 1, lost)
	require.Error(t, h.refused(t, "new"), "a value that may need it is left")
	for _, id := range []string{"A", "C"} {
		token, err := h.device(id).on(both).bootstrapToken(t)
		require.NoError(t, err)
		require.Equal(t, "token of "+id, token)
	}
}

// A device chooses its tokens. One that looks like a sealed value must come
// back, and must not keep the store from opening others.
func sealedLookalike(t *testing.T, h *Harness) {
	lookalike := "\xffNS1" + seals{"one"}.KeyIDs()[0] + "and so on"
	d := h.device("D")
	require.NoError(t, d.authenticate(t))
	for _, token := range []string{lookalike, "\xffNS1", "\xffNS1----------------x"} {
		require.NoError(t, d.setBootstrapToken(t, token))
		got, err := d.bootstrapToken(t)
		require.NoError(t, err)
		require.Equal(t, token, got)
	}
	require.NoError(t, d.setBootstrapToken(t, lookalike))
	store := h.sealing(t, false, "one")
	got, err := d.on(store).bootstrapToken(t)
	require.NoError(t, err)
	require.Equal(t, lookalike, got)
	require.Equal(t, 2, resealAll(t, store, 10), "Authenticate and the token")
	got, err = d.on(store).bootstrapToken(t)
	require.NoError(t, err)
	require.Equal(t, lookalike, got)
	require.NoError(t, d.on(store).setBootstrapToken(t, lookalike))
	got, err = d.on(store).bootstrapToken(t)
	require.NoError(t, err)
	require.Equal(t, lookalike, got)
}

func sealedSteps(t *testing.T, h *Harness) {
	for i := range 7 {
		require.NoError(t, h.device(fmt.Sprint("D", i)).authenticate(t))
	}
	store := h.sealing(t, false, "one")
	first, err := store.Reseal(t.Context(), "", 3)
	require.NoError(t, err)
	require.Equal(t, storage.Resealed{Table: "nano_devices", Looked: 3, Rewritten: 3, Next: first.Next}, first)
	second, err := h.sealing(t, false, "one").Reseal(t.Context(), first.Next, 3)
	require.NoError(t, err)
	require.Equal(t, storage.Resealed{Table: "nano_devices", Looked: 3, Rewritten: 3, Next: second.Next}, second)
	_, err = store.Reseal(t.Context(), "nonsense", 3)
	require.ErrorIs(t, err, storage.ErrNotFound)
	// A run ignores the place of another key's run.
	anew, err := h.sealing(t, false, "two", "one").Reseal(t.Context(), second.Next, 3)
	require.NoError(t, err)
	require.Equal(t, 3, anew.Rewritten)
}
