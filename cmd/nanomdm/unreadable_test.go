package main

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/mdm/mdmtest"
)

// TestUnreadableReportIsSeen: a device that sends what cannot be read gets its
// next command, and the operator is told, on each engine.
func TestUnreadableReportIsSeen(t *testing.T) {
	for engine, storage := range map[string]string{"sqlite": "sqlite", "pgsql": "pgsql", "mysql": "mysql", "mariadb": "mysql"} {
		t.Run(engine, func(t *testing.T) {
			t.Parallel()
			dsn := filepath.Join(t.TempDir(), "mdm.db")
			if engine != "sqlite" {
				var c *cable
				dsn, c = behind(t, engine)
				c.mend()
			}
			d := start(t, "http", "-storage", storage, "-storage-dsn", dsn)
			d.eventually("/readyz", 200)
			dev := d.device("D1", mdmtest.Config{})
			require.NoError(t, dev.Enroll(t.Context()))
			for _, uuid := range []string{"first", "second"} {
				status, text, _ := d.api("PUT", "/v1/enqueue/D1?nopush=1", "nanomdm", testKey, mdmtest.NewCommand(uuid, "ProfileList", nil))
				require.Equal(t, 200, status, text)
			}
			cmd, err := dev.Report(t.Context(), "Idle", "", nil)
			require.NoError(t, err)
			require.Equal(t, "first", cmd.UUID)
			resp, err := dev.Do(t.Context(), "", mdm.ContentTypeCommand, []byte("\xff\x00 no property list"))
			require.NoError(t, err)
			require.Equal(t, 200, resp.Status)
			cmd, err = mdmtest.ParseCommand(resp.Body)
			require.NoError(t, err)
			require.Equal(t, "second", cmd.UUID)
			require.Eventually(t, func() bool {
				_, text, _ := d.api("GET", "/v1/enrollments/D1", "nanomdm", testKey, nil)
				return strings.Contains(text, "It sent reports that cannot be read")
			}, 40*time.Second, 50*time.Millisecond, "the diagnosis never says so")
		})
	}
}
