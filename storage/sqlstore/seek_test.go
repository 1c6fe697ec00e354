package sqlstore_test

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/storage/storagetest"
)

// TestDeviceStatementsAreSeeks asks the engines how they would run what polls
// and reports need: by key, whatever the history, and without sorting what
// waits.
func TestDeviceStatementsAreSeeks(t *testing.T) {
	for _, engine := range storagetest.Engines(t) {
		t.Run(engine.Name, func(t *testing.T) {
			h := storagetest.NewHarness(t, engine)
			plantFleet(t, h, 3000)
			var ids []string
			for i := range 30 {
				ids = append(ids, fmt.Sprintf("D%06d", 7*i))
			}
			for name, s := range h.Store.DeviceStatementsForTest(ids, "C1") {
				plan, err := h.Store.ExplainForTest(t.Context(), s.Text, s.Args...)
				require.NoError(t, err, name)
				require.NotRegexp(t, `Seq Scan|SCAN nano_|SCAN [apq]\b|"access_type": "(ALL|index)",\s*"(rows|possible_keys|key)"[^}]*nano_`, plan, name)
				require.NotRegexp(t, `"table_name": "[aepq]",\s*"access_type": "(ALL|index)"`, plan, name)
				if s.Index != "" {
					require.Regexp(t, `\b`+s.Index+`\b`, plan, name)
				}
				if s.Unsorted {
					require.NotRegexp(t, `Sort|TEMP B-TREE|"using_filesort": true|"filesort"`, plan, name)
				}
			}
		})
	}
}
