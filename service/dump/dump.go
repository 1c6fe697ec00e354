// Package dump writes raw device messages and the replies to them, for
// debugging. The output contains secrets: tokens, profiles, results.
package dump

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync"

	"github.com/nanomdm/nanomdm/service"
)

// New returns a middleware that writes each request's body, and the reply if
// it has one, to w. Writes of one message are kept together. Errors of w are
// ignored: a full disk must not cost a device its reply.
func New(w io.Writer) service.Middleware {
	var mu sync.Mutex
	return func(next service.Handler) service.Handler {
		return service.HandlerFunc(func(ctx context.Context, r *service.Request) (*service.Response, error) {
			resp, err := next.Handle(ctx, r)
			var b bytes.Buffer
			fmt.Fprintf(&b, "--- %s %s %s\n%s\n", r.ID, r.Message.Kind(), r.Enroll.ID, r.Message.RawBytes())
			if err == nil && len(resp.Body) > 0 {
				fmt.Fprintf(&b, "--- %s reply\n%s\n", r.ID, resp.Body)
			}
			mu.Lock()
			defer mu.Unlock()
			_, _ = w.Write(b.Bytes())
			return resp, err
		})
	}
}
