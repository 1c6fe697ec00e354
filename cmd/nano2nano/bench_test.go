package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/cmd/nano2nano/foreign"
	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
	"github.com/nanomdm/nanomdm/storage/storagetest"
)

// generated is a source of any number of devices, which holds none of them.
type generated struct {
	b  *testing.B
	n  int
	ca *mdmtest.CA
}

func (s *generated) String() string                               { return "generated" }
func (s *generated) Close() error                                 { return nil }
func (s *generated) Left(context.Context) ([]foreign.Left, error) { return nil, nil }

func (s *generated) Count(context.Context) (foreign.Counts, error) {
	return foreign.Counts{Devices: int64(s.n)}, nil
}

func (s *generated) PushCerts(context.Context, func(storage.PushCert) error) error { return nil }

func (s *generated) Commands(_ context.Context, _ string, yield func(storage.CommandRecord) error) error {
	for group := range (s.n + 49) / 50 {
		for c := range fleetCommands {
			uuid := commandUUID(group, c)
			if err := yield(storage.CommandRecord{UUID: uuid, RequestType: "ProfileList", Raw: mdmtest.NewCommand(uuid, "ProfileList", func(*mdmtest.Plist) {}), CreatedAt: begun}); err != nil {
				return err
			}
		}
	}
	return nil
}

// Devices gives devices whose certificates are not known, since to make some
// costs more than all the rest.
func (s *generated) Devices(_ context.Context, _ string, yield func(*storage.DeviceRecord) error) error {
	for i := range s.n {
		id := fmt.Sprintf("%08X-0000-1000-8000-000000000000", i) // in key order, as sources give them
		if err := yield(newDevice(s.b, s.ca, i-i%10+1, id)); err != nil {
			return err
		}
	}
	return nil
}

// BenchmarkImport moves -enrollments devices, with six commands each, and says
// how much memory the process has had.
func BenchmarkImport(b *testing.B) {
	for _, name := range []string{"sqlite", "pgsql"} {
		b.Run(name, func(b *testing.B) {
			cfg := benchDatabase(b, name)
			for b.Loop() {
				o := &options{compare: false, state: b.TempDir() + "/state"}
				store, err := sqlstore.Open(b.Context(), cfg)
				require.NoError(b, err)
				m := &mover{o: o, e: &env{out: io.Discard, err: os.Stderr, now: time.Now}, problems: os.Stderr, src: &generated{b: b, n: *enrollments}, to: store, store: store}
				m.tally.left, m.tally.noted = make(map[string]int), make(map[string]int)
				m.state, err = loadState(o, time.Now())
				require.NoError(b, err)
				started := time.Now()
				require.NoError(b, m.run(b.Context()))
				b.ReportMetric(float64(*enrollments)/time.Since(started).Seconds(), "devices/s")
				b.ReportMetric(peakMiB(b), "MiB-peak")
				require.NoError(b, store.Close())
			}
		})
	}
}

func benchDatabase(b *testing.B, name string) sqlstore.Config {
	b.Helper()
	for _, e := range storagetest.Engines(b) {
		if e.Name == name {
			return e.Unmigrated(b)
		}
	}
	return sqlstore.Config{}
}

// peakMiB is the most memory that the process had, where the system tells.
func peakMiB(b *testing.B) float64 {
	b.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0
	}
	found := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindStringSubmatch(strings.TrimSpace(string(status)))
	if found == nil {
		return 0
	}
	var kib float64
	_, err = fmt.Sscan(found[1], &kib)
	require.NoError(b, err)
	return kib / 1024
}
