package main

import (
	"bytes"
	"database/sql"
	"fmt"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/go-sql-driver/mysql"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
	"github.com/nanomdm/nanomdm/storage/storagetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// trial is a run of the program and what it said.
type trial struct {
	t      *testing.T
	flags  []string
	target sqlstore.Config
	out    string
	now    time.Time
}

// newTrial prepares a move of a source into SQLite.
func newTrial(t *testing.T, kind, dsn string, flags ...string) *trial {
	t.Helper()
	dir := t.TempDir()
	x := &trial{t: t, target: sqlstore.Config{Driver: "sqlite", DSN: filepath.Join(dir, "nanomdm.db")}, now: begun.Add(48 * time.Hour)}
	x.flags = append([]string{"-storage", kind, "-storage-dsn", dsn, "-state", filepath.Join(dir, "state")}, flags...)
	return x
}

// intoEach moves a source into each engine.
func intoEach(t *testing.T, kind, dsn string, flags []string, test func(x *trial)) {
	t.Helper()
	for _, target := range storagetest.Engines(t) {
		t.Run("to "+target.Name, func(t *testing.T) {
			x := newTrial(t, kind, dsn, flags...)
			x.target = target.Config(t)
			test(x)
		})
	}
}

// run runs the program with more flags and returns its exit code.
func (x *trial) run(flags ...string) int {
	x.t.Helper()
	var out bytes.Buffer
	args := slices.Concat(x.flags, flags)
	if !slices.Contains(args, "-url") {
		args = append(args, "-to", x.target.Driver, "-to-dsn", x.target.DSN)
	}
	code := run(x.t.Context(), &env{out: &out, err: &out, now: func() time.Time { return x.now }}, args)
	x.out = out.String()
	return code
}

// store opens the target.
func (x *trial) store() *sqlstore.Store {
	x.t.Helper()
	cfg := x.target
	cfg.RecordActivityEvery = -1
	store, err := sqlstore.Open(x.t.Context(), cfg)
	require.NoError(x.t, err)
	x.t.Cleanup(func() { require.NoError(x.t, store.Close()) })
	return store
}

// device reads one from the target.
func (x *trial) device(id string) *storage.DeviceRecord {
	x.t.Helper()
	list, err := x.store().ExportDevices(x.t.Context(), []string{id})
	require.NoError(x.t, err)
	require.Len(x.t, list, 1, id)
	return list[0]
}

// holds checks that the target has the fleet.
func (x *trial) holds(f *fleet, same func(want, got *storage.DeviceRecord) string) {
	x.t.Helper()
	store := x.store()
	for i := 0; i < len(f.devices); i += 100 {
		want := make(map[string]*storage.DeviceRecord)
		var ids []string
		for _, d := range f.devices[i:min(i+100, len(f.devices))] {
			want[d.Channel.ID] = d
			ids = append(ids, d.Channel.ID)
		}
		list, err := store.ExportDevices(x.t.Context(), ids)
		require.NoError(x.t, err)
		require.Len(x.t, list, len(ids))
		for _, got := range list {
			require.Empty(x.t, same(want[got.Channel.ID], got), got.Channel.ID)
		}
	}
	certs, err := store.ExportPushCerts(x.t.Context())
	require.NoError(x.t, err)
	require.Len(x.t, certs, 1)
	require.Equal(x.t, fleetTopic, certs[0].Topic)
}

// exactly is what every source that keeps all of it must bring.
func exactly(want, got *storage.DeviceRecord) string {
	if what := deviceDiffers(want, got); what != "" {
		return what
	}
	w, g := allChannels(want), allChannels(got)
	for i := range w {
		if !w[i].TokenAt.Equal(g[i].TokenAt) {
			return fmt.Sprintf("token time %v, want %v", g[i].TokenAt, w[i].TokenAt)
		}
		if !w[i].LastSeenAt.Equal(g[i].LastSeenAt) {
			return fmt.Sprintf("last seen %v, want %v", g[i].LastSeenAt, w[i].LastSeenAt)
		}
		if what := queueExactly(w[i].Queue, g[i].Queue); what != "" {
			return what
		}
	}
	if !want.Authenticate.At.Equal(got.Authenticate.At) {
		return fmt.Sprintf("authenticated %v, want %v", got.Authenticate.At, want.Authenticate.At)
	}
	return ""
}

func allChannels(d *storage.DeviceRecord) []*storage.ChannelRecord {
	list := []*storage.ChannelRecord{&d.Channel}
	for i := range d.Users {
		list = append(list, &d.Users[i].Channel)
	}
	return list
}

func queueExactly(want, got []storage.ItemRecord) string {
	if len(want) != len(got) {
		return fmt.Sprintf("%d queue rows, want %d", len(got), len(want))
	}
	for i := range want {
		w, g := want[i], got[i]
		if w.CommandUUID != g.CommandUUID || w.State != g.State || w.NotNowCount != g.NotNowCount || !w.NotNowAt.Equal(g.NotNowAt) || !w.CreatedAt.Equal(g.CreatedAt) {
			return fmt.Sprintf("queue row %d is %+v, want %+v", i, g, w)
		}
		if (w.Result == nil) != (g.Result == nil) || w.Result != nil && !bytes.Equal(w.Result.Raw, g.Result.Raw) {
			return "result of " + w.CommandUUID
		}
	}
	return ""
}

// engine is a server of the tests by its name.
func engine(t *testing.T, name string) *storagetest.Engine {
	t.Helper()
	for _, e := range storagetest.Engines(t) {
		if e.Name == name {
			return e
		}
	}
	return nil
}

// sqlSource makes an empty database for a source and returns its DSN.
func sqlSource(t *testing.T, engineName, prefix string) (*sqlFixture, string) {
	t.Helper()
	cfg := engine(t, engineName).Unmigrated(t)
	x := &sqlFixture{t: t, prefix: prefix, pgsql: cfg.Driver == "pgsql"}
	driver, dsn := "pgx", cfg.DSN
	if !x.pgsql {
		mc, err := mysql.ParseDSN(cfg.DSN)
		require.NoError(t, err)
		mc.Params = map[string]string{"time_zone": "'+00:00'"}
		driver, dsn = "mysql", mc.FormatDSN()
	}
	db, err := sql.Open(driver, dsn)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, db.Close()) })
	x.db = db
	return x, cfg.DSN
}

func TestMovesNanoMDM(t *testing.T) {
	for _, source := range []struct{ engine, kind string }{{"mysql", "mysql"}, {"mariadb", "mysql"}, {"pgsql", "pgsql"}} {
		t.Run(source.engine, func(t *testing.T) {
			fixture, dsn := sqlSource(t, source.engine, "")
			f := newFleet(t, *enrollments)
			fixture.create()
			fixture.write(f)
			intoEach(t, source.kind, dsn, nil, func(x *trial) {
				require.Zero(x.t, x.run(), "%s", x.out)
				x.holds(f, exactly)
			})
		})
	}
}
