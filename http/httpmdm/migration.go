package httpmdm

import (
	"errors"
	"fmt"
	"net/http"

	"github.com/nanomdm/nanomdm/http/requestlog"
	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/service"
)

// Migration returns the handler of /migration: check-ins without a
// certificate, from an exporter of another server. The caller wraps it in the
// check of the API key. It takes any method and content type, as NanoMDM does.
// The exporter is no device: refusals say why, and a UserAuthenticate that was
// stored is 200 whatever a device would be answered.
func (h *Handler) Migration(next service.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, release, err := h.readBody(w, r, nil, nil)
		defer release()
		if err != nil {
			h.refuseMigration(w, r, "", err)
			return
		}
		done, err := h.memory.work(r.Context(), body)
		if err != nil {
			h.refuseMigration(w, r, "", err)
			return
		}
		defer done()
		req, err := decodeMigration(r, body)
		if err != nil {
			h.refuseMigration(w, r, "", err)
			return
		}
		if _, err := next.Handle(r.Context(), req); err != nil {
			h.refuseMigration(w, r, req.Enroll.ID, err)
			return
		}
		w.WriteHeader(http.StatusOK)
	})
}

func decodeMigration(r *http.Request, body []byte) (*service.Request, error) {
	msg, err := mdm.DecodeMigration(body)
	if err != nil {
		return nil, badRequest(fmt.Errorf("decoding message: %w", err))
	}
	switch msg.(type) {
	case *mdm.Authenticate, *mdm.TokenUpdate, *mdm.SetBootstrapToken, *mdm.CheckOut, *mdm.UserAuthenticate:
	default:
		return nil, badRequest(fmt.Errorf("%w: %s is not for migration", errRole, msg.Kind()))
	}
	enroll, err := msg.Identity().Resolve()
	if err != nil {
		return nil, badRequest(err)
	}
	return &service.Request{
		ID: requestlog.ID(r.Context()), TraceParent: requestlog.TraceParent(r.Context()), Message: msg, Enroll: enroll, Copy: true,
	}, nil
}

// refuseMigration answers an exporter. The texts of internal errors stay in
// the log.
func (h *Handler) refuseMigration(w http.ResponseWriter, r *http.Request, enrollID string, err error) {
	status := h.note(w, r, speaker{enrollment: enrollID}, err)
	text := err.Error()
	if se := (*service.StatusError)(nil); errors.As(err, &se) && se.Err != nil {
		text = se.Err.Error()
	}
	switch {
	case status == http.StatusServiceUnavailable:
		text = "the server is busy; try again"
	case status >= http.StatusInternalServerError:
		text = "internal error; see the log for request " + requestlog.ID(r.Context())
	}
	http.Error(w, text, status)
}
