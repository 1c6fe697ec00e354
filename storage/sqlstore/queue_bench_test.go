package sqlstore_test

import (
	"context"
	"database/sql"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
	"github.com/nanomdm/nanomdm/storage/storagetest"
)

const (
	benchCallers = 8
	benchIDs     = 500
	benchFleet   = 2000
)

// BenchmarkEnqueueCallers is 8 callers that queue commands for 500 of 2,000
// enrollments each, and beside it the statements by which NanoMDM does so, on
// the same server:
//
//	storage/engines/with-engines.sh go test ./storage/sqlstore -run '^$' -bench EnqueueCallers
func BenchmarkEnqueueCallers(b *testing.B) {
	for _, e := range storagetest.Engines(b) {
		b.Run(e.Name+"/here", func(b *testing.B) {
			store, err := sqlstore.Open(b.Context(), e.Unmigrated(b))
			require.NoError(b, err)
			defer store.Close()
			ids := enrollBench(b, store)
			enqueueBench(b, ids, func(ctx context.Context, uuid string, ids []string) error {
				failed, err := store.Enqueue(ctx, storage.Scope{}, &storage.Enqueue{
					Command: &mdm.Command{CommandUUID: uuid, RequestType: "ProfileList", Raw: []byte(benchCommand)}, IDs: ids,
				})
				if err == nil && len(failed) > 0 {
					err = fmt.Errorf("%d enrollments failed", len(failed))
				}
				return err
			})
		})
		b.Run(e.Name+"/peer", func(b *testing.B) {
			p := newPeer(b, e.Unmigrated(b))
			enqueueBench(b, p.ids, p.enqueue)
		})
	}
}

// benchCommand has the size of a small command.
var benchCommand = "<?xml version=\"1.0\"?>" + strings.Repeat("x", 400)

func enrollBench(b *testing.B, store *sqlstore.Store) (ids []string) {
	var all sync.WaitGroup
	for i := range benchFleet {
		id := fmt.Sprintf("DEVICE-%05d", i)
		ids = append(ids, id)
		all.Go(func() {
			src := storage.Source{Enroll: mdm.EnrollID{Type: mdm.Device, ID: id}}
			_, err := store.Apply(b.Context(), &storage.Authenticate{Src: src, Message: &mdm.Authenticate{Topic: "topic", Raw: []byte("raw")}})
			if err == nil {
				_, err = store.Apply(b.Context(), &storage.TokenUpdate{Src: src, Message: &mdm.TokenUpdate{
					Topic: "topic", PushMagic: "magic", Token: []byte("token"), Raw: []byte("raw"),
				}})
			}
			if err != nil {
				b.Error(err)
			}
		})
	}
	all.Wait()
	return ids
}

// enqueueBench has callers queue commands, and reports rows a second.
func enqueueBench(b *testing.B, ids []string, enqueue func(ctx context.Context, uuid string, ids []string) error) {
	var calls atomic.Int64
	b.ResetTimer()
	began := time.Now()
	var callers sync.WaitGroup
	for caller := range benchCallers {
		callers.Go(func() {
			for {
				n := calls.Add(1)
				if n > int64(b.N) {
					return
				}
				begin := (caller * 250) % (len(ids) - benchIDs + 1) // neighbours share half of theirs
				if err := enqueue(b.Context(), "C"+strconv.FormatInt(n, 10), ids[begin:begin+benchIDs]); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	callers.Wait()
	b.ReportMetric(float64(b.N*benchIDs)/time.Since(began).Seconds(), "rows/s")
}

// peer is NanoMDM's queue, as far as an enqueue touches it: a row for the
// command and one for each enrollment, in one transaction of two statements.
type peer struct {
	db      *sql.DB
	ids     []string
	numbers bool // placeholders are $1, $2, ...
}

func newPeer(b *testing.B, cfg sqlstore.Config) *peer {
	p := &peer{numbers: cfg.Driver == "pgsql"}
	driver := map[string]string{"pgsql": "pgx", "mysql": "mysql", "sqlite": "sqlite"}[cfg.Driver]
	var err error
	p.db, err = sql.Open(driver, cfg.DSN)
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, p.db.Close()) })
	if cfg.Driver == "sqlite" {
		p.db.SetMaxOpenConns(1)
		_, err = p.db.Exec("PRAGMA journal_mode = WAL")
		require.NoError(b, err)
	}
	now := "TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP"
	statements := []string{
		"CREATE TABLE enrollments (id VARCHAR(255) NOT NULL PRIMARY KEY)",
		"CREATE TABLE commands (command_uuid VARCHAR(127) NOT NULL PRIMARY KEY, request_type VARCHAR(63) NOT NULL, command TEXT NOT NULL, created_at " + now + ", updated_at " + now + ")",
		"CREATE TABLE enrollment_queue (id VARCHAR(255) NOT NULL, command_uuid VARCHAR(127) NOT NULL, active SMALLINT NOT NULL DEFAULT 1, priority SMALLINT NOT NULL DEFAULT 0, " +
			"created_at " + now + ", updated_at " + now + ", PRIMARY KEY (id, command_uuid), FOREIGN KEY (id) REFERENCES enrollments (id), FOREIGN KEY (command_uuid) REFERENCES commands (command_uuid))",
	}
	if cfg.Driver == "mysql" { // these two are in its schema for MySQL alone
		statements = append(statements,
			"CREATE INDEX queue_order ON enrollment_queue (priority DESC, created_at)",
			"CREATE INDEX idx_queue_lookup ON enrollment_queue (id, active, priority DESC, created_at)")
	}
	for _, statement := range statements {
		_, err := p.db.Exec(statement)
		require.NoError(b, err)
	}
	for i := range benchFleet {
		p.ids = append(p.ids, fmt.Sprintf("DEVICE-%05d", i))
		_, err := p.db.Exec("INSERT INTO enrollments VALUES ('" + p.ids[i] + "')")
		require.NoError(b, err)
	}
	return p
}

func (p *peer) place(i int) string {
	if p.numbers {
		return "$" + strconv.Itoa(i)
	}
	return "?"
}

func (p *peer) enqueue(ctx context.Context, uuid string, ids []string) error {
	tx, err := p.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback() //nolint:errcheck // after a commit it does nothing
	q := fmt.Sprintf("INSERT INTO commands (command_uuid, request_type, command) VALUES (%s, %s, %s)", p.place(1), p.place(2), p.place(3))
	if _, err := tx.ExecContext(ctx, q, uuid, "ProfileList", benchCommand); err != nil {
		return err
	}
	var rows strings.Builder
	var args []any
	for i, id := range ids {
		if i > 0 {
			rows.WriteString(", ")
		}
		fmt.Fprintf(&rows, "(%s, %s)", p.place(2*i+1), p.place(2*i+2))
		args = append(args, id, uuid)
	}
	if _, err := tx.ExecContext(ctx, "INSERT INTO enrollment_queue (id, command_uuid) VALUES "+rows.String(), args...); err != nil {
		return err
	}
	return tx.Commit()
}
