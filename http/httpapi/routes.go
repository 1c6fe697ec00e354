package httpapi

import (
	"net/http"
	"slices"
	"strings"
)

// route is one endpoint. docs/openapi.yaml says the same, and a test compares.
type route struct {
	method, path string
	// role is the least that reaches the handler. One that is of all topics is
	// unbound: it refuses keys that are bound to some. Any other keeps to
	// callerOf's scope.
	role    role
	unbound bool
	handler http.Handler
}

// routes is every endpoint behind an API key. Those that NanoMDM has take any
// query parameter, as it does; the others refuse what they do not know.
func (a *API) routes() []route {
	return []route{
		// Enrollments.
		{"GET", "/v1/enrollments", roleRead, false, a.endpoint(a.listEnrollments)},
		{"GET", "/v1/enrollments/{id}", roleRead, false, a.endpoint(noQuery(a.showEnrollment))},
		{"DELETE", "/v1/enrollments/{id}", roleAdmin, false, slow(a.endpoint(a.deleteEnrollment))},
		{"GET", "/v1/enrollments/{id}/queue", roleRead, false, a.endpoint(a.listQueue)},
		{"DELETE", "/v1/enrollments/{id}/queue", roleEnqueue, false, slow(a.endpoint(noQuery(a.clearQueue)))},
		{"POST", "/v1/enrollments/{id}/disable", roleAdmin, false, a.endpoint(noQuery(a.disable))},
		{"POST", "/v1/enrollments/{id}/enable", roleAdmin, false, a.endpoint(noQuery(a.enable))},
		{"PUT", "/v1/enrollments/{id}/renewal", roleAdmin, false, a.endpoint(noQuery(a.openRenewal))},
		{"DELETE", "/v1/enrollments/{id}/renewal", roleAdmin, false, a.endpoint(noQuery(a.closeRenewal))},
		{"PUT", "/v1/renewals", roleAdmin, false, slow(a.endpoint(noQuery(a.openRenewals)))},
		{"POST", "/v1/enrollments/{id}/bootstrap_token", roleAdmin, false, a.endpoint(noQuery(a.readBootstrapToken))},
		{"POST", "/v1/enrollments/{id}/unlock_token", roleAdmin, false, a.endpoint(noQuery(a.readUnlockToken))},
		{"GET", "/v1/stats", roleRead, false, a.endpoint(noQuery(a.stats))},

		// Commands.
		{"PUT", "/v1/enqueue/{ids}", roleEnqueue, false, a.endpoint(a.enqueueIDs)},
		{"POST", "/v1/enqueue/{ids}", roleEnqueue, false, a.endpoint(a.enqueueIDs)},
		{"POST", "/v1/enqueue", roleEnqueue, false, slow(a.endpoint(a.enqueue))},
		{"POST", "/v1/commands", roleEnqueue, false, slow(a.endpoint(a.enqueueJSON))},

		{"GET", "/v1/commands", roleRead, false, a.endpoint(a.listCommands)},
		{"GET", "/v1/commands/{uuid}", roleRead, false, slow(a.endpoint(a.showCommand))},
		{"DELETE", "/v1/commands/{uuid}", roleEnqueue, false, slow(a.endpoint(noQuery(a.cancelCommand)))},
		{"GET", "/v1/commands/{uuid}/results/{id}", roleRead, false, a.endpoint(a.showResult)},
		{"DELETE", "/v1/commands/{uuid}/enrollments/{id}", roleEnqueue, false, a.endpoint(noQuery(a.cancelItem))},
		{"POST", "/v1/commands/{uuid}/enrollments/{id}/requeue", roleEnqueue, false, a.endpoint(noQuery(a.requeue))},

		// Push.
		{"GET", "/v1/push/{ids}", rolePush, false, a.endpoint(a.pushIDs)},
		{"PUT", "/v1/push/{ids}", rolePush, false, a.endpoint(a.pushIDs)},
		{"POST", "/v1/push/{ids}", rolePush, false, a.endpoint(a.pushIDs)},
		{"POST", "/v1/push", rolePush, false, slow(a.endpoint(a.pushMany))},
		{"PUT", "/v1/pushcert", roleAdmin, false, a.endpoint(a.storePushCert)},
		{"GET", "/v1/pushcert", roleRead, false, a.endpoint(a.showPushCert)},
		{"POST", "/v1/escrowkeyunlock", roleAdmin, false, http.HandlerFunc(a.escrowKeyUnlock)},
		{"GET", "/v1/pushcerts", roleRead, false, a.endpoint(noQuery(a.listPushCerts))},

		// Events.
		{"GET", "/v1/events", roleRead, false, slow(a.endpoint(a.listEvents))},
		{"POST", "/v1/events/redeliver", roleAdmin, true, slow(a.endpoint(noQuery(a.redeliver)))},
		{"GET", "/v1/sinks", roleAdmin, true, a.endpoint(noQuery(a.listSinks))},
		{"GET", "/v1/sinks/{name}", roleAdmin, true, a.endpoint(noQuery(a.showSink))},
		{"PUT", "/v1/sinks/{name}", roleAdmin, true, a.endpoint(noQuery(a.storeSink))},
		{"DELETE", "/v1/sinks/{name}", roleAdmin, true, a.endpoint(noQuery(a.deleteSink))},

		// The API itself.
		{"GET", "/v1/keys", roleAdmin, true, a.endpoint(noQuery(a.listKeys))},
		{"POST", "/v1/keys", roleAdmin, true, a.endpoint(noQuery(a.createKey))},
		{"DELETE", "/v1/keys/{name}", roleAdmin, true, a.endpoint(noQuery(a.deleteKey))},
		{"GET", "/v1/audit", roleAdmin, true, a.endpoint(a.listAudit)},
		{"POST", "/v1/reseal", roleAdmin, true, a.endpoint(a.reseal)},
	}
}

// Register adds the API's routes to mux, and answers everything else under
// /v1/ in the API's own words.
func (a *API) Register(mux *http.ServeMux) {
	for _, r := range a.routes() {
		require := a.require
		if r.unbound {
			require = a.requireUnbound
		}
		mux.Handle(r.method+" "+r.path, require(r.role, r.handler))
	}
	mux.Handle(everythingElse, nowhere(mux))
}

const everythingElse = "/v1/"

// nowhere answers what no route of mux does: 405 where another method would
// do, else 404.
func nowhere(mux *http.ServeMux) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var allowed []string
		for _, method := range []string{"GET", "PUT", "POST", "DELETE"} {
			other := r.Clone(r.Context())
			other.Method = method
			if _, pattern := mux.Handler(other); pattern != everythingElse {
				allowed = append(allowed, method)
			}
		}
		if len(allowed) == 0 {
			writeJSON(w, http.StatusNotFound, errorBody{"there is no such endpoint"})
			return
		}
		if slices.Contains(allowed, "GET") {
			allowed = append(allowed, "HEAD")
		}
		w.Header().Set("Allow", strings.Join(allowed, ", "))
		writeJSON(w, http.StatusMethodNotAllowed, errorBody{r.Method + " is not for this endpoint; there is " + andList(allowed)})
	})
}
