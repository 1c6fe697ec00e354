package metrics

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

var metricName = regexp.MustCompile(`\bnanomdm_[a-z_]+`)

// expectMetrics fails if an expression names a metric that does not exist.
func expectMetrics(t *testing.T, expression string) (names []string) {
	t.Helper()
	known := make(map[string]bool)
	for _, m := range Table() {
		known[m.Name] = true
		if m.Kind == Histogram {
			known[m.Name+"_bucket"], known[m.Name+"_sum"], known[m.Name+"_count"] = true, true, true
		}
	}
	names = metricName.FindAllString(expression, -1)
	for _, name := range names {
		require.True(t, known[name], "no metric %s, in %s", name, expression)
	}
	require.Equal(t, strings.Count(expression, "("), strings.Count(expression, ")"), expression)
	return names
}

// expectLabels fails if an expression selects or groups by a label that its
// metrics do not have.
func expectLabels(t *testing.T, expression string) {
	t.Helper()
	labels := []string{"job", "instance", "le"}
	for _, name := range metricName.FindAllString(expression, -1) {
		for _, m := range Table() {
			if m.Name == strings.TrimSuffix(name, "_bucket") {
				labels = append(labels, m.Labels...)
			}
		}
	}
	for _, found := range regexp.MustCompile(`(?:by|on) \(([^)]*)\)|([a-z_]+)(?:=~|!=|=)"`).FindAllStringSubmatch(expression, -1) {
		for label := range strings.SplitSeq(found[1]+found[2], ",") {
			require.Contains(t, labels, strings.TrimSpace(label), expression)
		}
	}
}

func TestDashboard(t *testing.T) {
	data, err := os.ReadFile("../../docs/grafana-dashboard.json")
	require.NoError(t, err)
	var dashboard struct {
		Title  string
		Panels []struct {
			ID      int
			Title   string
			Type    string
			Targets []struct{ Expr, LegendFormat string }
		}
	}
	require.NoError(t, json.Unmarshal(data, &dashboard))
	require.NotEmpty(t, dashboard.Title)
	shown := make(map[string]bool)
	var ids []int
	for _, panel := range dashboard.Panels {
		require.NotEmpty(t, panel.Targets, panel.Title)
		require.NotContains(t, ids, panel.ID)
		ids = append(ids, panel.ID)
		for _, target := range panel.Targets {
			expectLabels(t, target.Expr)
			for _, name := range expectMetrics(t, target.Expr) {
				shown[name] = true
			}
		}
	}
	require.Greater(t, len(shown), 20)
}

func TestAlertRules(t *testing.T) {
	data, err := os.ReadFile("../../docs/prometheus-alerts.yaml")
	require.NoError(t, err)
	require.YAMLEq(t, string(data), string(data), "it is YAML")
	text := string(data)
	expressions := regexp.MustCompile(`(?m)^        expr: (.*)$`).FindAllStringSubmatch(text, -1)
	require.Greater(t, len(expressions), 10)
	require.Len(t, expressions, strings.Count(text, "- alert: "))
	require.Len(t, expressions, strings.Count(text, "severity: "))
	require.Len(t, expressions, strings.Count(text, "summary: "))
	for _, expression := range expressions {
		names := expectMetrics(t, expression[1])
		require.True(t, len(names) > 0 || strings.HasPrefix(expression[1], "up{"), expression[1])
		expectLabels(t, expression[1])
	}
}

// Prometheus itself reads the rules, and the dashboard's expressions as rules.
func TestPromtoolReadsThem(t *testing.T) {
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("promtool is not installed: in CI the rules are read by Prometheus")
		}
		t.Skip("no promtool: install Debian's prometheus, or run storage/engines/with-engines.sh go test ./...")
	}
	data, err := os.ReadFile("../../docs/grafana-dashboard.json")
	require.NoError(t, err)
	var dashboard struct {
		Panels []struct{ Targets []struct{ Expr string } }
	}
	require.NoError(t, json.Unmarshal(data, &dashboard))
	var rules strings.Builder
	rules.WriteString("groups:\n- name: dashboard\n  rules:\n")
	n := 0
	for _, panel := range dashboard.Panels {
		for _, target := range panel.Targets {
			n++
			expression := strings.NewReplacer("$job", "nanomdm", "$__rate_interval", "5m").Replace(target.Expr)
			fmt.Fprintf(&rules, "  - {record: \"panel:%d\", expr: %q}\n", n, expression)
		}
	}
	file := filepath.Join(t.TempDir(), "dashboard.yaml")
	require.NoError(t, os.WriteFile(file, []byte(rules.String()), 0o600))
	for _, rules := range []string{"../../docs/prometheus-alerts.yaml", file} {
		out, err := exec.Command(promtool, "check", "rules", rules).CombinedOutput()
		require.NoError(t, err, "%s", out)
		require.Contains(t, string(out), "SUCCESS")
	}
}

func TestProxyExamplesAreYAML(t *testing.T) {
	for _, name := range []string{"envoy.yaml", "traefik.yaml"} {
		data, err := os.ReadFile("../../docs/proxies/" + name)
		require.NoError(t, err)
		require.YAMLEq(t, string(data), string(data))
	}
}

// Names in prose do not drift either.
func TestPagesNameMetricsThatExist(t *testing.T) {
	pages, err := os.ReadDir("../../docs")
	require.NoError(t, err)
	checked := 0
	for _, page := range pages {
		if !slices.Contains([]string{"security.md", "metrics.md", "operations-guide.md"}, page.Name()) {
			continue
		}
		data, err := os.ReadFile("../../docs/" + page.Name())
		require.NoError(t, err)
		for _, name := range regexp.MustCompile("`(nanomdm_[a-z_]+)`").FindAllStringSubmatch(string(data), -1) {
			expectMetrics(t, name[1])
			checked++
		}
	}
	require.Positive(t, checked)
}
