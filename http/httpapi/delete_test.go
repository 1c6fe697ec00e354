package httpapi_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A caller that lost the answer repeats the call, and learns that it is done. A
// name that was never deleted, or by somebody else, stays an error.
func TestDeletionsCanBeRepeated(t *testing.T) {
	o := newOperators(t)
	o.enrollFully("mac", "S1", "topic-a")
	o.asks(o.admin(), 200, "PUT", "/v1/sinks/log", `{}`)
	o.makeKey("bob", "read")
	o.asks(o.admin(), 200, "PUT", "/v1/enqueue/mac?nopush=1", command("C1"))
	ann := call{key: o.makeKey("ann", "admin")}
	for _, path := range []string{
		"/v1/commands/C1/enrollments/mac", "/v1/enrollments/S1?confirm=mac", "/v1/sinks/log", "/v1/keys/bob",
	} {
		t.Run(path, func(t *testing.T) {
			o.asks(o.admin(), 200, "DELETE", path, "")
			status, answer, _ := o.do(o.admin(), "DELETE", path, "")
			require.Equal(t, 204, status, answer)
			require.Empty(t, answer)
		})
	}
	for _, path := range []string{"/v1/enrollments/mac?confirm=mac", "/v1/sinks/log", "/v1/keys/bob"} {
		status, _, _ := o.do(ann, "DELETE", path, "")
		require.Equal(t, 404, status, "%s by somebody else", path)
	}
	for _, path := range []string{"/v1/enrollments/mack?confirm=mack", "/v1/sinks/log2", "/v1/keys/bobby"} {
		status, _, _ := o.do(o.admin(), "DELETE", path, "")
		require.Equal(t, 404, status, "%s never was", path)
	}
	o.advance(25 * time.Hour)
	status, _, _ := o.do(o.admin(), "DELETE", "/v1/keys/bob", "")
	require.Equal(t, 404, status, "a day later it is no repetition")
}
