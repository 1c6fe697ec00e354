package httpapi_test

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/http/httpapi"
	"github.com/nanomdm/nanomdm/storage"
)

// send makes a request as a client of NanoMDM's does: Basic credentials, a
// body without a content type.
func send(t *testing.T, method, url, body string) (int, []byte) {
	t.Helper()
	var reader io.Reader
	if body != "" {
		reader = bytes.NewBufferString(body)
	}
	r, err := http.NewRequestWithContext(t.Context(), method, url, reader)
	require.NoError(t, err)
	r.SetBasicAuth(httpapi.User, mainKey)
	resp, err := http.DefaultClient.Do(r)
	require.NoError(t, err)
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return resp.StatusCode, answer
}

func (o *operators) served() string {
	server := httptest.NewServer(o.wholeServer(httpapi.Config{}))
	o.t.Cleanup(server.Close)
	o.t.Cleanup(http.DefaultClient.CloseIdleConnections)
	return server.URL
}

// micro2nano's cmdapi enqueues by GET with a body, and takes any answer for
// success.
func TestClientThatEnqueuesByGet(t *testing.T) {
	o := newOperators(t)
	o.enroll("A", "com.apple.mgmt.a")
	status, _ := send(t, "GET", o.served()+"/v1/enqueue/A", command("C1"))
	require.Equal(t, 200, status)
	require.Equal(t, "C1", o.next("A"))
}

// nanocmd sends one command to up to 30 ids in one URL, and pushes by GET.
func TestClientWithManyIDs(t *testing.T) {
	o := newOperators(t)
	ids := ""
	for i := range 30 {
		id := string(rune('a'+i%26)) + string(rune('a'+i/26))
		o.enroll(id, "com.apple.mgmt.a")
		ids += "," + id
	}
	url := o.served()
	status, _ := send(t, "PUT", url+"/v1/enqueue/"+ids[1:], command("C1"))
	require.Equal(t, 200, status)
	require.Equal(t, "C1", o.next("aa"))
	require.Equal(t, "C1", o.next("db"))
	status, answer := send(t, "GET", url+"/v1/push/"+ids[1:], "")
	require.Equal(t, 200, status)
	var result struct {
		Status map[string]struct {
			PushResult string `json:"push_result"`
		}
	}
	require.NoError(t, json.Unmarshal(answer, &result))
	require.Len(t, result.Status, 30)
	require.NotEmpty(t, result.Status["db"].PushResult)
}

// A client of NanoMDM's looks for command_error in a 500, and reads a 401 as
// text.
func TestClientThatReadsErrors(t *testing.T) {
	o := newOperators(t)
	url := o.served()
	status, answer := send(t, "PUT", url+"/v1/enqueue/A", "no command")
	require.Equal(t, 500, status)
	var result struct {
		CommandError string `json:"command_error"`
		Error        string
	}
	require.NoError(t, json.Unmarshal(answer, &result))
	require.NotEmpty(t, result.CommandError)
	require.Equal(t, result.CommandError, result.Error)

	resp, err := http.Get(url + "/v1/push/A")
	require.NoError(t, err)
	answer, err = io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	require.Equal(t, 401, resp.StatusCode)
	require.Equal(t, "Unauthorized\n", string(answer))
}

// nano2nano sends all Authenticates and TokenUpdates with a status that must be
// 200, bootstrap tokens after them, and user channels after their devices.
func TestClientThatMigrates(t *testing.T) {
	o := newOperators(t)
	o.certify("com.apple.mgmt.a")
	url := o.served()
	for _, body := range []string{
		checkin("Authenticate", "M", topicKey),
		checkin("TokenUpdate", "M", tokenKeys),
		checkin("TokenUpdate", "M", tokenKeys+userKeys),
		checkin("SetBootstrapToken", "M", `<key>BootstrapToken</key><data>AAAA</data>`),
	} {
		status, answer := send(t, "PUT", url+"/migration", body)
		require.Equal(t, 200, status, "%s", answer)
	}
	token, err := o.store.BootstrapToken(t.Context(), storage.Scope{}, "M", &storage.AuditRecord{Action: "x"})
	require.NoError(t, err)
	require.Equal(t, []byte{0, 0, 0}, token)
	status, _ := send(t, "PUT", url+"/v1/enqueue/M,M:U", command("C1"))
	require.Equal(t, 200, status)
	require.Equal(t, "C1", o.next("M"))
}
