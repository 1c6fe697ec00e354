package httpmdm_test

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/certverify"
	"github.com/nanomdm/nanomdm/http/httpmdm"
	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/service"
	"github.com/nanomdm/nanomdm/service/certauth"
	"github.com/nanomdm/nanomdm/service/core"
	"github.com/nanomdm/nanomdm/service/webhook"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/storagetest"
)

// TestMemoryOfBodies counts the bytes that are allocated for one large report,
// from its arrival to its answer, with an event: that is what -max-in-flight
// counts for it, whatever of it is garbage already.
func TestMemoryOfBodies(t *testing.T) {
	for _, engine := range storagetest.Engines(t) {
		t.Run(engine.Name, func(t *testing.T) {
			h := storagetest.NewHarness(t, engine)
			ca, err := mdmtest.NewCA()
			require.NoError(t, err)
			verifier, err := certverify.New(ca.PEM(), nil, certverify.Config{})
			require.NoError(t, err)
			log := slog.New(slog.DiscardHandler)
			k := webhook.Sink{Name: "all", URL: "http://127.0.0.1:1", Tokens: true, Filter: storage.EventFilter{Idle: true}}
			sink, err := k.Check()
			require.NoError(t, err)
			sinks, err := webhook.OpenSinks(t.Context(), h.Store, []storage.EventSink{sink}, log)
			require.NoError(t, err)
			handler := httpmdm.New(service.Chain(core.New(h.Store, core.Config{}), webhook.Middleware(sinks, nil, time.Now, nil), certauth.New(certauth.Config{})),
				httpmdm.SignatureIdentity(verifier), httpmdm.Config{Pins: h.Store}).MDM(httpmdm.Any)
			server := httptest.NewServer(handler)
			defer server.Close()
			id, err := ca.Issue("D1")
			require.NoError(t, err)
			d, err := mdmtest.NewDevice(server.URL, id, mdmtest.Config{UDID: "D1"})
			require.NoError(t, err)
			require.NoError(t, d.Enroll(t.Context()))
			cmd, err := mdm.DecodeCommand(mdmtest.NewCommand("C1", "ProfileList", nil))
			require.NoError(t, err)
			_, err = h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: cmd, IDs: []string{"D1"}})
			require.NoError(t, err)

			noise := make([]byte, 6<<20) // it cannot be compressed
			_, err = rand.Read(noise)
			require.NoError(t, err)
			body := report("D1", "Acknowledged", "C1", "<key>Noise</key><string>"+base64.StdEncoding.EncodeToString(noise)+"</string>")
			signature, err := mdmtest.Sign(id, body, mdmtest.SignOptions{})
			require.NoError(t, err)
			r := httptest.NewRequest("PUT", "/mdm", bytes.NewReader(body))
			r.Header.Set("Content-Type", reportType)
			r.Header.Set("Mdm-Signature", signature)
			w := httptest.NewRecorder()
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			handler.ServeHTTP(w, r)
			runtime.ReadMemStats(&after)
			require.Equal(t, http.StatusOK, w.Code)
			events := h.Int(t, "SELECT COUNT(*) FROM nano_event_payloads")
			require.Positive(t, events)
			times := float64(after.TotalAlloc-before.TotalAlloc) / float64(len(body))
			t.Logf("%s: %.2f bytes for each byte of the body", engine.Name, times)
			require.Greater(t, times, 1.0, "the body itself")
			require.LessOrEqual(t, times, float64(httpmdm.BodyCopies))
		})
	}
}
