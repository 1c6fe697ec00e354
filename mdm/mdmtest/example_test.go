package mdmtest_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/mdm/mdmtest"
)

// A simulated device enrolls at a server and asks it for commands.
func ExampleNewDevice() {
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		if message, err := mdm.Decode(body); err == nil {
			fmt.Println(message.Kind(), message.Identity().UDID)
		}
	}))
	defer server.Close()

	ca, err := mdmtest.NewCA()
	if err != nil {
		fmt.Println(err)
		return
	}
	identity, err := ca.Issue("Mac 1")
	if err != nil {
		fmt.Println(err)
		return
	}
	device, err := mdmtest.NewDevice(server.URL+"/mdm", identity, mdmtest.Config{UDID: "MAC1"})
	if err != nil {
		fmt.Println(err)
		return
	}
	ctx := context.Background()
	if err := device.Enroll(ctx); err != nil {
		fmt.Println(err)
		return
	}
	if _, err := device.Poll(ctx); err != nil {
		fmt.Println(err)
	}
	// Output:
	// Authenticate MAC1
	// TokenUpdate MAC1
	// Report MAC1
}
