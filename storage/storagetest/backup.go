package storagetest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/stretchr/testify/require"

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

// contents returns the contents of a backup of the database: the same bytes for
// the same rows on every engine.
func contents(t *testing.T, cfg sqlstore.Config) (rows map[string]int64, all string) {
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
	rows, want := contents(t, h.cfg)
	require.Positive(t, rows["nano_events"])
	require.Positive(t, rows["nano_device_tags"])
	require.Positive(t, rows["nano_device_inventory"])
	for _, e := range Engines(t) {
		if e.variable != "" && e.dsn == "" {
			continue
		}
		cfg := restore(t, e, file)
		_, got := contents(t, cfg)
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
		rows, _ := contents(t, h.cfg)
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
	_, want := contents(t, h.cfg)
	cfg := restore(t, h.Engine, file)
	_, got := contents(t, cfg)
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
	_, want := contents(t, h.cfg)
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
	_, got := contents(t, cfg)
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
	rows, want := contents(t, h.cfg)
	require.EqualValues(t, 3501, rows["nano_enrollment_queue"])
	file, err := h.backup(t, plainSecrets)
	require.NoError(t, err)
	_, got := contents(t, restore(t, h.Engine, file))
	require.True(t, want == got)
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
