package sqlstore_test

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
	"github.com/nanomdm/nanomdm/storage/storagetest"
)

const (
	benchCallers = 8
	benchIDs     = 500
	benchFleet   = 2000
)

// BenchmarkEnqueueCallers is 8 callers that queue commands for 500 of 2,000
// enrollments each. cmd/mdmbench compares that with NanoMDM's statements.
//
//	storage/engines/with-engines.sh go test ./storage/sqlstore -run '^$' -bench EnqueueCallers
func BenchmarkEnqueueCallers(b *testing.B) {
	for _, e := range storagetest.Engines(b) {
		b.Run(e.Name, func(b *testing.B) {
			store, err := sqlstore.Open(b.Context(), e.Unmigrated(b))
			require.NoError(b, err)
			defer store.Close()
			ids := enrollBench(b, store)
			enqueueBench(b, ids, func(ctx context.Context, uuid string, ids []string) error {
				failed, err := store.Enqueue(ctx, storage.Scope{}, &storage.Enqueue{
					Command: &mdm.Command{CommandUUID: uuid, RequestType: "ProfileList", Raw: []byte(benchCommand)}, IDs: ids,
				})
				if err == nil && len(failed) > 0 {
					err = fmt.Errorf("%d enrollments failed", len(failed))
				}
				return err
			})
		})
	}
}

// benchCommand has the size of a small command.
var benchCommand = "<?xml version=\"1.0\"?>" + strings.Repeat("x", 400)

func enrollBench(b *testing.B, store *sqlstore.Store) (ids []string) {
	var all sync.WaitGroup
	for i := range benchFleet {
		id := fmt.Sprintf("DEVICE-%05d", i)
		ids = append(ids, id)
		all.Go(func() {
			src := storage.Source{Enroll: mdm.EnrollID{Type: mdm.Device, ID: id}}
			_, err := store.Apply(b.Context(), &storage.Authenticate{Src: src, Message: &mdm.Authenticate{Topic: "topic", Raw: []byte("raw")}})
			if err == nil {
				_, err = store.Apply(b.Context(), &storage.TokenUpdate{Src: src, Message: &mdm.TokenUpdate{
					Topic: "topic", PushMagic: "magic", Token: []byte("token"), Raw: []byte("raw"),
				}})
			}
			if err != nil {
				b.Error(err)
			}
		})
	}
	all.Wait()
	return ids
}

// enqueueBench has callers queue commands, and reports rows a second.
func enqueueBench(b *testing.B, ids []string, enqueue func(ctx context.Context, uuid string, ids []string) error) {
	var calls atomic.Int64
	b.ResetTimer()
	began := time.Now()
	var callers sync.WaitGroup
	for caller := range benchCallers {
		callers.Go(func() {
			for {
				n := calls.Add(1)
				if n > int64(b.N) {
					return
				}
				begin := (caller * 250) % (len(ids) - benchIDs + 1) // neighbours share half of theirs
				if err := enqueue(b.Context(), "C"+strconv.FormatInt(n, 10), ids[begin:begin+benchIDs]); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	callers.Wait()
	b.ReportMetric(float64(b.N*benchIDs)/time.Since(began).Seconds(), "rows/s")
}
