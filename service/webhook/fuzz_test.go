package webhook

import (
	"encoding/json"
	"net/url"
	"testing"

	"github.com/stretchr/testify/require"
)

// FuzzSink: a sink that is accepted can be sent to, and reads the same when
// it is written again.
func FuzzSink(f *testing.F) {
	for _, seed := range []string{
		`{"url": "https://example.org/hook", "keys": ["k"], "tokens": true}`, `{"url": "http://u:p@[::1]:80/?a=b"}`, `{}`,
		`{"url": "https://"}`, `{"keys": ["whsec_!"]}`, `{"filter": {"topics": ["mdm.Connect"], "enrollment_types": ["Device"]}}`,
		`{"filter": {"topics": ["x"]}}`, `{"disabled": true} {}`, `{"unknown": 1}`, `{"keys": ["a","b","c","d","e"]}`, `null`, `{"url": "https://h:99999/"}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		k, err := ParseSink(text)
		if err != nil {
			return
		}
		k.Name = "name"
		sink, err := k.Check()
		if err != nil {
			return
		}
		require.LessOrEqual(t, len(sink.Keys), maxKeys)
		if sink.URL != "" {
			u, err := url.Parse(sink.URL)
			require.NoError(t, err)
			require.NotEmpty(t, u.Hostname())
		}
		written, err := json.Marshal(k)
		require.NoError(t, err)
		again, err := ParseSink(written)
		require.NoError(t, err)
		twice, err := json.Marshal(again)
		require.NoError(t, err)
		third, err := ParseSink(twice)
		require.NoError(t, err)
		require.Equal(t, again, third)
		same, err := again.Check()
		require.NoError(t, err)
		require.Equal(t, []any{sink.URL, sink.Tokens, sink.Enabled, sink.Filter.Idle}, []any{same.URL, same.Tokens, same.Enabled, same.Filter.Idle})
		require.ElementsMatch(t, sink.Keys, same.Keys)
		require.ElementsMatch(t, sink.Filter.Topics, same.Filter.Topics)
	})
}

// FuzzSinkConfig: the file of sinks, where names are given, and only once.
func FuzzSinkConfig(f *testing.F) {
	f.Add([]byte(`{"sinks": [{"name": "a", "url": "https://h/"}, {"name": "b", "disabled": true}]}`))
	f.Add([]byte(`{"sinks": [{"name": "a"}, {"name": "a"}]}`))
	f.Add([]byte(`{"sinks": [{"name": "../a"}]}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		sinks, err := ParseConfig(text)
		if err != nil {
			require.Empty(t, sinks)
			return
		}
		names := make(map[string]bool)
		for _, sink := range sinks {
			require.Regexp(t, sinkName, sink.Name)
			require.False(t, names[sink.Name])
			require.True(t, sink.Enabled)
			names[sink.Name] = true
		}
	})
}
