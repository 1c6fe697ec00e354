package storagetest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
)

func backupTests() []subtest {
	return []subtest{
		{"a backup restored on each engine is the same store", backupEverywhere},
		{"a backup is of one moment, while devices report", backupConsistent},
		{"a backup of plain secrets is refused, or sealed, or asked for", backupSecrets},
		{"a backup keeps what is sealed as it is", backupSealed},
		{"a backup that is damaged or cut is refused, and nothing is written", backupDamaged},
		{"a restore needs an empty database, and goes on when it was interrupted", backupInterrupted},
		{"many rows under one key are paged", backupPages},
		{"a backup under load has what was acknowledged before it began, on each engine", backupUnderLoad},
		{"a snapshot is of one moment, and gives what changed since a time", snapshotOfOneMoment},
	}
}

// backup backs the harness's database up.
func (h *Harness) backup(t *testing.T, o sqlstore.BackupOptions, keys ...string) ([]byte, error) {
	t.Helper()
	h.shared(t)
	cfg := h.cfg
	cfg.Now = h.Clock.Now
	if len(keys) > 0 {
		cfg.Sealer = seals(keys)
	}
	var file bytes.Buffer
	_, err := sqlstore.Backup(t.Context(), cfg, &file, o)
	return file.Bytes(), err
}

var plainSecrets = sqlstore.BackupOptions{PlainSecrets: true}

// restore restores a backup into an empty database of some engine.
func restore(t *testing.T, e *Engine, file []byte) sqlstore.Config {
	t.Helper()
	cfg := e.Config(t)
	_, rows, err := sqlstore.Restore(t.Context(), cfg, bytes.NewReader(file), nil)
	require.NoError(t, err)
	require.Positive(t, rows)
	return cfg
}

// populate fills every table of a store.
func populate(t *testing.T, h *Harness, store *sqlstore.Store) {
	t.Helper()
	plantSecrets(t, h, store)
	h.imports(t, store, importedDevice("IMPORTED"))
	require.NoError(t, store.StorePushCert(t.Context(), &storage.PushCert{Topic: topicA, CertPEM: []byte("certificate"), KeyPEM: []byte("key-secret"), NotAfter: past(9000)}))
	require.NoError(t, store.AppendAudit(t.Context(), &storage.AuditRecord{Who: "who", Action: "action", Detail: "détail", Outcome: storage.AuditDone}))
	d := h.device("D").on(store)
	_, err := store.ChangeTags(t.Context(), everything, storage.TagChange{IDs: []string{"D"}, Add: []string{"lab"}, Record: func([]string) *storage.AuditRecord { return auditRecord("tags") }})
	require.NoError(t, err)
	h.asksApplications(t, "APPS", "", "D")
	_, err = d.apply(t, &storage.Report{Src: d.source(), Status: mdm.StatusAcknowledged, CommandUUID: "APPS", Inventory: &mdm.Inventory{Applications: &someApplications}})
	require.NoError(t, err)
	_, err = d.apply(t, &storage.Report{Src: d.withEvents(event("report", storage.TopicConnect)).source(), Status: mdm.StatusAcknowledged, CommandUUID: "C", Raw: nil})
	require.NoError(t, err)
	require.NoError(t, store.Flush(t.Context()))
}

// Contents returns the number of rows of each table and the contents of a backup
// of the database: the same bytes for the same rows on every engine.
func Contents(t *testing.T, cfg sqlstore.Config) (rows map[string]int64, all string) {
	t.Helper()
	var file bytes.Buffer
	_, err := sqlstore.Backup(t.Context(), cfg, &file, plainSecrets)
	require.NoError(t, err)
	_, rows, err = sqlstore.CheckBackup(bytes.NewReader(file.Bytes()))
	require.NoError(t, err)
	return rows, unpacked(t, file.Bytes())
}

// unpacked returns a backup without its head, which differs, and its checksum.
func unpacked(t *testing.T, file []byte) string {
	t.Helper()
	_, packed, ok := bytes.Cut(file, []byte("\n"))
	require.True(t, ok)
	zip, err := zstd.NewReader(nil)
	require.NoError(t, err)
	defer zip.Close()
	all, err := zip.DecodeAll(packed, nil)
	require.NoError(t, err)
	head, n := binary.Uvarint(all)
	require.Positive(t, n)
	return string(all[n+int(head) : len(all)-sha256.Size])
}

func backupEverywhere(t *testing.T, h *Harness) {
	populate(t, h, h.Store)
	file, err := h.backup(t, plainSecrets)
	require.NoError(t, err)
	rows, want := Contents(t, h.cfg)
	require.Positive(t, rows["nano_events"])
	require.Positive(t, rows["nano_device_tags"])
	require.Positive(t, rows["nano_device_inventory"])
	for _, e := range Engines(t) {
		if e.variable != "" && e.dsn == "" {
			continue
		}
		cfg := restore(t, e, file)
		_, got := Contents(t, cfg)
		require.True(t, want == got, e.Name)
		cfg.RecordActivityEvery, cfg.Now = -1, h.Clock.Now
		store, err := sqlstore.Open(t.Context(), cfg)
		require.NoError(t, err)
		inv, err := store.DeviceInventory(t.Context(), everything, "D")
		require.NoError(t, err)
		require.Equal(t, &someApplications, inv.Applications)
		d := h.device("IMPORTED").with(importedHash(2)).on(store)
		require.Equal(t, "later", d.polls(t), "%s: it goes on", e.Name)
		require.NoError(t, store.Close())
	}
}

// Each device reports for two commands in one transaction after the other; a
// backup that has the second result has the first.
func backupConsistent(t *testing.T, h *Harness) {
	h.shared(t)
	var ids []string
	for n := range 20 {
		ids = append(ids, fmt.Sprintf("D%02d", n))
	}
	h.Enroll(t, ids...)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stopped := make(chan error, 1)
	wrote := make(chan struct{}, 1)
	go func() {
		defer close(wrote)
		for n := 0; ctx.Err() == nil; n++ {
			// Every enrollment has the command or none: one transaction queues it.
			c := command(fmt.Sprintf("C-%06d", n))
			if failed, err := h.Store.Enqueue(ctx, storage.Scope{}, &storage.Enqueue{Command: c, IDs: ids[:4]}); err != nil || len(failed) > 0 {
				if ctx.Err() == nil {
					stopped <- fmt.Errorf("%v %w", failed, err)
				}
				return
			}
			select {
			case wrote <- struct{}{}:
			default:
			}
		}
	}()
	for range 5 {
		select {
		case <-wrote:
		case err := <-stopped:
			require.NoError(t, err)
		}
		rows, _ := Contents(t, h.cfg)
		require.Equal(t, 4*rows["nano_commands"], rows["nano_enrollment_queue"])
	}
	cancel()
	for range wrote { // until the writer has ended
	}
}

func backupSecrets(t *testing.T, h *Harness) {
	populate(t, h, h.Store)
	_, err := h.backup(t, sqlstore.BackupOptions{})
	require.ErrorIs(t, err, sqlstore.ErrPlainSecrets)
	file, err := h.backup(t, sqlstore.BackupOptions{}, "key")
	require.NoError(t, err)
	all := unpacked(t, file)
	for _, secret := range []string{"unlock", "bootstrap", "token-update", "user-token-update", "user-authenticate", "authenticate", "key", "sink"} {
		require.NotContains(t, all, secret+"-secret")
	}
	cfg := restore(t, h.Engine, file)
	_, err = sqlstore.Open(t.Context(), cfg)
	require.ErrorIs(t, err, storage.ErrNotSealing)
	cfg.Sealer, cfg.Now, cfg.RecordActivityEvery = seals{"key"}, h.Clock.Now, -1
	store, err := sqlstore.Open(t.Context(), cfg)
	require.NoError(t, err)
	defer store.Close()
	token, err := h.device("D").on(store).bootstrapToken(t)
	require.NoError(t, err)
	require.Equal(t, "bootstrap-secret", token)
}

func backupSealed(t *testing.T, h *Harness) {
	store := h.sealing(t, true, "key")
	populate(t, h, store)
	file, err := h.backup(t, sqlstore.BackupOptions{})
	require.NoError(t, err, "nothing in it is plain")
	_, want := Contents(t, h.cfg)
	cfg := restore(t, h.Engine, file)
	_, got := Contents(t, cfg)
	require.True(t, want == got)
	cfg.Sealer, cfg.SealCommands, cfg.Now, cfg.RecordActivityEvery = seals{"key"}, true, h.Clock.Now, -1
	again, err := sqlstore.Open(t.Context(), cfg)
	require.NoError(t, err)
	defer again.Close()
	require.Equal(t, "later", h.device("IMPORTED").with(importedHash(2)).on(again).polls(t))
}

func backupDamaged(t *testing.T, h *Harness) {
	populate(t, h, h.Store)
	file, err := h.backup(t, plainSecrets)
	require.NoError(t, err)
	cfg := h.Engine.Config(t)
	bad := map[string][]byte{"empty": nil, "text": []byte("not a backup"), "cut": file[:len(file)-20], "cut in half": file[:len(file)/2]}
	for _, at := range []int{20, len(file) / 2, len(file) - 10} {
		flipped := bytes.Clone(file)
		flipped[at] ^= 0x40
		bad[fmt.Sprintf("byte %d", at)] = flipped
	}
	for name, data := range bad {
		_, _, err := sqlstore.Restore(t.Context(), cfg, bytes.NewReader(data), nil)
		require.ErrorIs(t, err, sqlstore.ErrBackup, name)
	}
	_, _, err = sqlstore.Restore(t.Context(), cfg, bytes.NewReader(file), nil)
	require.NoError(t, err, "nothing was written")
}

func backupInterrupted(t *testing.T, h *Harness) {
	populate(t, h, h.Store)
	file, err := h.backup(t, plainSecrets)
	require.NoError(t, err)
	_, want := Contents(t, h.cfg)
	_, _, err = sqlstore.Restore(t.Context(), h.cfg, bytes.NewReader(file), nil)
	require.ErrorIs(t, err, sqlstore.ErrNotEmpty)

	cfg := h.Engine.Config(t)
	ctx, cancel := context.WithCancel(t.Context())
	_, _, err = sqlstore.Restore(ctx, cfg, bytes.NewReader(file), func(table string, _ int64) {
		if table == "nano_enrollments" {
			cancel()
		}
	})
	require.Error(t, err)
	_, err = sqlstore.Open(t.Context(), cfg)
	require.ErrorIs(t, err, sqlstore.ErrRestoring)
	h.Clock.Advance(time.Second)
	other, err := h.backup(t, plainSecrets)
	require.NoError(t, err)
	_, _, err = sqlstore.Restore(t.Context(), cfg, bytes.NewReader(other), nil)
	require.ErrorIs(t, err, sqlstore.ErrRestoring)
	_, _, err = sqlstore.Restore(t.Context(), cfg, bytes.NewReader(file), nil)
	require.NoError(t, err)
	_, got := Contents(t, cfg)
	require.True(t, want == got)
}

func backupPages(t *testing.T, h *Harness) {
	var ids []string
	for n := range 2500 {
		ids = append(ids, fmt.Sprintf("D%04d", n))
	}
	h.Enroll(t, ids...)
	h.enqueue(t, ids, "B")
	h.enqueue(t, ids[:1000], "A")
	h.enqueue(t, ids[:1], "C")
	h.shared(t)
	rows, want := Contents(t, h.cfg)
	require.EqualValues(t, 3501, rows["nano_enrollment_queue"])
	file, err := h.backup(t, plainSecrets)
	require.NoError(t, err)
	_, got := Contents(t, restore(t, h.Engine, file))
	require.True(t, want == got)
}

// acknowledgements are the commands whose reports the store took, by device.
type acknowledgements struct {
	mu     sync.Mutex
	byID   map[string][]string
	n      int
	enough chan struct{} // is closed at the 100th
}

func (a *acknowledgements) add(id, uuid string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.byID[id] = append(a.byID[id], uuid)
	if a.n++; a.n == 100 {
		close(a.enough)
	}
}

func (a *acknowledgements) soFar() map[string][]string {
	a.mu.Lock()
	defer a.mu.Unlock()
	was := make(map[string][]string, len(a.byID))
	for id, uuids := range a.byID {
		was[id] = slices.Clone(uuids)
	}
	return was
}

// enqueueAndReport queues commands for a device and reports them until the
// context ends.
func (h *Harness) enqueueAndReport(ctx context.Context, id string, acks *acknowledgements) error {
	d := h.device(id)
	for n := 0; ; n++ {
		uuid := fmt.Sprintf("%s-%05d", id, n)
		failed, err := h.Store.Enqueue(ctx, storage.Scope{}, &storage.Enqueue{Command: command(uuid), IDs: []string{id}})
		if err == nil && len(failed) == 0 {
			_, err = d.store.Apply(ctx, &storage.Report{Src: d.withEvents(event("of "+uuid, storage.TopicConnect)).source(), Status: mdm.StatusAcknowledged, CommandUUID: uuid, Raw: []byte("result of " + uuid)})
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return err
		case len(failed) > 0:
			return failed[id]
		}
		acks.add(id, uuid)
	}
}

func backupUnderLoad(t *testing.T, h *Harness) {
	h.shared(t)
	var ids []string
	for n := range 10 {
		ids = append(ids, fmt.Sprintf("D%02d", n))
	}
	h.Enroll(t, ids...)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	acks := &acknowledgements{byID: make(map[string][]string), enough: make(chan struct{})}
	for _, id := range ids {
		g.Go(func() error { return h.enqueueAndReport(ctx, id, acks) })
	}
	select {
	case <-acks.enough:
	case <-ctx.Done():
	}
	before := acks.soFar()
	file, err := h.backup(t, plainSecrets)
	require.NoError(t, err)
	cancel()
	require.NoError(t, g.Wait())
	for _, e := range Engines(t) {
		if e.variable != "" && e.dsn == "" {
			continue
		}
		store, err := sqlstore.Open(t.Context(), restore(t, e, file))
		require.NoError(t, err)
		h.hasReports(t, store, before, e.Name)
		require.NoError(t, store.Close())
	}
}

// hasReports checks that a store has the results of commands, and that a command has ended if, and only if, its result is there.
func (h *Harness) hasReports(t *testing.T, store *sqlstore.Store, want map[string][]string, where string) {
	t.Helper()
	for id, uuids := range want {
		list, err := store.ExportDevices(t.Context(), []string{id})
		require.NoError(t, err)
		require.Len(t, list, 1, "%s: %s", where, id)
		results := make(map[string]string)
		for _, item := range list[0].Channel.Queue {
			require.Equal(t, item.State == storage.Acknowledged, item.Result != nil, "%s: %s", where, item.CommandUUID)
			if item.Result != nil {
				results[item.CommandUUID] = string(item.Result.Raw)
			}
		}
		for _, uuid := range uuids {
			require.Equal(t, "result of "+uuid, results[uuid], where)
		}
	}
}

func snapshotOfOneMoment(t *testing.T, h *Harness) {
	h.shared(t)
	h.imports(t, h.Store, importedDevice("A"), importedDevice2("B"))
	want := h.exports(t, "A", "B")
	h.Clock.Advance(time.Hour)
	since := h.Clock.Now()
	h.Clock.Advance(time.Minute)
	h.Enroll(t, "C")
	h.Enroll(t, "D")
	require.NoError(t, h.Store.Flush(t.Context()))
	cfg := h.cfg
	cfg.Now = h.Clock.Now
	snap, err := sqlstore.OpenSnapshot(t.Context(), cfg)
	require.NoError(t, err)
	defer func() { require.NoError(t, snap.Close()) }()

	h.Enroll(t, "E")
	h.enqueue(t, []string{"B"}, "LATER")
	ids, err := snap.ExportDeviceIDs(t.Context(), "", 100)
	require.NoError(t, err)
	require.Equal(t, []string{"A", "B", "C", "D"}, ids)
	got, err := snap.ExportDevices(t.Context(), []string{"A", "B"})
	require.NoError(t, err)
	require.Equal(t, want, got)
	changed, err := snap.ChangedDevices(t.Context(), ids, since)
	require.NoError(t, err)
	require.Equal(t, []string{"C", "D"}, changed)
	n, err := snap.Count(t.Context(), sqlstore.CountDevices)
	require.NoError(t, err)
	require.EqualValues(t, 4, n)
}
