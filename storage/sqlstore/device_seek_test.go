package sqlstore_test

import (
	"fmt"
	"strconv"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/storagetest"
)

// TestDeviceStatementsAreSeeks checks the plans of the statements of polls and
// reports: they read by key, whatever the history, and sort no waiting rows,
// also if no row waited when the engine last made its statistics.
func TestDeviceStatementsAreSeeks(t *testing.T) {
	for _, engine := range storagetest.Engines(t) {
		t.Run(engine.Name, func(t *testing.T) {
			h := storagetest.NewHarness(t, engine)
			plantFleet(t, h, 3000)
			var ids []string
			for i := range 30 {
				ids = append(ids, fmt.Sprintf("D%06d", 7*i))
			}
			checkSeeks(t, h, ids)
			h.Exec(t, "UPDATE nano_enrollment_queue SET state = 10, finished_at = 1 WHERE state < 10")
			analyze(t, h)
			checkSeeks(t, h, ids)
		})
	}
}

func checkSeeks(t *testing.T, h *storagetest.Harness, ids []string) {
	t.Helper()
	for name, s := range h.Store.DeviceStatementsForTest(ids, "C1") {
		plan, err := h.Store.ExplainForTest(t.Context(), s.Text, s.Args...)
		if !assert.NoError(t, err, name) {
			continue
		}
		assert.NotRegexp(t, `Seq Scan|SCAN nano_|SCAN [apq]\b|"access_type": "(ALL|index)",\s*"(rows|possible_keys|key)"[^}]*nano_`, plan, name)
		assert.NotRegexp(t, `"table_name": "[aepq]",\s*"access_type": "(ALL|index)"`, plan, name)
		// They begin with the state: a lookup in them reads all that waits.
		assert.NotRegexp(t, "nano_enrollment_queue_(command_uuid|finished_at)", plan, name)
		if s.Index != "" {
			assert.Regexp(t, `\b`+s.Index+`\b`, plan, name)
		}
		if s.Unsorted {
			assert.NotRegexp(t, `Sort|TEMP B-TREE|"using_filesort": true|"filesort"`, plan, name)
		}
	}
}

// TestPollsArePlannedOnce: PostgreSQL keeps the plan of a poll's statement for
// small batches, too.
func TestPollsArePlannedOnce(t *testing.T) {
	for _, engine := range storagetest.Engines(t) {
		if engine.Name != "pgsql" {
			continue
		}
		h := storagetest.NewHarness(t, engine)
		version, err := h.Store.SettingForTest(t.Context(), "SHOW server_version_num")
		require.NoError(t, err)
		if len(version) == 6 && version < "140000" {
			t.Skip("PostgreSQL says how often it plans since version 14")
		}
		const polls = 20
		for range polls {
			_, err := h.Store.Apply(t.Context(), &storage.Seen{Src: storage.Source{Enroll: mdm.EnrollID{Type: mdm.Device, ID: "D"}}})
			require.NoError(t, err)
		}
		planned, err := h.Store.SettingForTest(t.Context(), "SELECT MAX(custom_plans)::text FROM pg_prepared_statements WHERE generic_plans > 0")
		require.NoError(t, err)
		times, err := strconv.Atoi(planned)
		require.NoError(t, err)
		require.Less(t, times, polls/2, "a statement is planned for most of its runs")
	}
}

// TestEmptyTablesAreReadByKey: engines keep using plans that were made while
// tables were empty.
func TestEmptyTablesAreReadByKey(t *testing.T) {
	for _, engine := range storagetest.Engines(t) {
		t.Run(engine.Name, func(t *testing.T) {
			h := storagetest.NewHarness(t, engine)
			statements := h.Store.DeviceStatementsForTest([]string{"D1", "D2", "D3"}, "C1")
			for _, name := range []string{"certificates", "locking", "rows", "events", "ending", "offered", "numbering", "eligible"} {
				plan, err := h.Store.ExplainForTest(t.Context(), statements[name].Text, statements[name].Args...)
				require.NoError(t, err, name)
				assert.NotRegexp(t, `Seq Scan|SCAN nano_|(using|INDEX|"key":) "?nano_(cert_auth_associations_not_after|enrollment_queue_(command_uuid|finished_at))`, plan, name)
			}
		})
	}
}
