package sqlstore_test

import (
	"bytes"
	"net"
	"net/url"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-sql-driver/mysql"
	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
	"github.com/nanomdm/nanomdm/storage/storagetest"
)

// TestCutDuringCommit loses the connection while COMMIT, and on PostgreSQL
// what goes with it, is on its way there or its answer on its way back. Nobody
// can know which, so the device is told that it failed, and reports again.
func TestCutDuringCommit(t *testing.T) {
	const result = "a result that is cut"
	servers(t, func(t *testing.T, h *storagetest.Harness) {
		h.Enroll(t, "D")
		for _, there := range []bool{false, true} {
			c := newCutter(t, h.Engine.Name, there)
			store := h.Open(t, func(cfg *sqlstore.Config) { cfg.DSN = c.through(cfg.DSN) })
			uuid := "C" + strconv.FormatBool(there)
			failed, err := h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{
				Command: &mdm.Command{CommandUUID: uuid, RequestType: "ProfileList", Raw: []byte("command")}, IDs: []string{"D"},
			})
			require.NoError(t, err)
			require.Empty(t, failed)
			report := func(raw string) error {
				_, err := store.Apply(t.Context(), &storage.Report{
					Src: storage.Source{
						Enroll: mdm.EnrollID{Type: mdm.Device, ID: "D"},
						Events: []storage.Event{{ID: "E" + uuid, Topic: storage.TopicConnect, Status: "Acknowledged", CommandUUID: uuid, CreatedAt: time.Unix(1, 0)}},
					},
					Status: mdm.StatusAcknowledged, CommandUUID: uuid, Raw: []byte(raw),
				})
				return err
			}
			batches := h.Int(t, "SELECT COUNT(*) FROM nano_events")
			done := func() []int64 {
				return []int64{
					h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_queue WHERE state = 10 AND command_uuid = ?", uuid),
					h.Int(t, "SELECT COUNT(*) FROM nano_command_results WHERE command_uuid = ?", uuid),
					h.Int(t, "SELECT COUNT(*) FROM nano_events") - batches,
					h.Int(t, "SELECT COUNT(*) FROM nano_event_batches WHERE batch_id IN (SELECT batch_id FROM nano_events)") - batches,
				}
			}
			c.cutAt([]byte(result))
			require.ErrorIs(t, report(result), storage.ErrUnavailable)
			require.True(t, c.wasCut())
			if there {
				require.Equal(t, []int64{1, 1, 1, 1}, done())
			} else {
				require.Equal(t, []int64{0, 0, 0, 0}, done())
			}
			require.NoError(t, report(result), "the store goes on")
			require.Equal(t, []int64{1, 1, 1, 1}, done())
		}
	})
}

// cutter is a proxy before a database server that loses the connection by
// which a transaction with certain bytes is committed.
type cutter struct {
	t      *testing.T
	engine string
	there  bool // the server gets COMMIT, and only its answer is lost

	listener net.Listener
	target   string
	running  sync.WaitGroup

	mu     sync.Mutex
	marker []byte // nil once cut
	cut    bool
	open   map[net.Conn]bool
}

func newCutter(t *testing.T, engine string, there bool) *cutter {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	c := &cutter{t: t, engine: engine, there: there, listener: listener, open: make(map[net.Conn]bool)}
	t.Cleanup(func() {
		listener.Close()
		c.mu.Lock()
		for conn := range c.open {
			conn.Close()
		}
		c.mu.Unlock()
		c.running.Wait()
	})
	return c
}

// through starts the proxy, and returns the DSN by way of it.
func (c *cutter) through(dsn string) string {
	defer c.running.Go(func() {
		for {
			conn, err := c.listener.Accept()
			if err != nil {
				return
			}
			c.running.Go(func() { c.forward(conn) })
		}
	})
	addr := c.listener.Addr().(*net.TCPAddr)
	if c.engine != "pgsql" {
		mc, err := mysql.ParseDSN(dsn)
		require.NoError(c.t, err)
		c.target, mc.Addr = mc.Addr, addr.String()
		return mc.FormatDSN()
	}
	pc, err := pgx.ParseConfig(dsn)
	require.NoError(c.t, err)
	c.target = net.JoinHostPort(pc.Host, strconv.Itoa(int(pc.Port)))
	u, err := url.Parse(dsn)
	if err != nil || u.Scheme == "" {
		return dsn + " host=127.0.0.1 sslmode=disable port=" + strconv.Itoa(addr.Port)
	}
	u.Host = addr.String()
	return u.String()
}

func (c *cutter) cutAt(marker []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.marker = marker
}

func (c *cutter) wasCut() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cut
}

func (c *cutter) forward(client net.Conn) {
	defer client.Close()
	server, err := net.Dial("tcp", c.target)
	if err != nil {
		return
	}
	defer server.Close()
	c.mu.Lock()
	c.open[client], c.open[server] = true, true
	c.mu.Unlock()
	var committing atomic.Bool
	var back sync.WaitGroup
	back.Go(func() {
		defer client.Close()
		pump(client, server, func(b []byte) (on bool) {
			return !committing.Load() || c.engine == "pgsql" && !bytes.Contains(b, []byte("COMMIT\x00"))
		})
	})
	marked := false // PostgreSQL gets COMMIT with the marked bytes, the others after them
	pump(server, client, func(b []byte) (on bool) {
		c.mu.Lock()
		defer c.mu.Unlock()
		commits := c.engine == "pgsql" || marked && bytes.Contains(b, []byte("COMMIT"))
		marked = marked || c.marker != nil && bytes.Contains(b, c.marker)
		if !marked || !commits {
			return true
		}
		c.marker, c.cut = nil, true
		committing.Store(true)
		return c.there
	})
	client.Close()
	server.Close()
	back.Wait()
}

// pump copies what comes while on says so.
func pump(to, from net.Conn, on func(b []byte) bool) {
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 && !on(buf[:n]) {
			return
		}
		if _, werr := to.Write(buf[:n]); err != nil || werr != nil {
			return
		}
	}
}
