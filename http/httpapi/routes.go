package httpapi

import (
	"net/http"
	"slices"
	"strings"
)

// route is one endpoint. A test compares the routes with docs/openapi.yaml.
type route struct {
	// method is empty for an endpoint that takes any method, as NanoMDM's do.
	method, path string
	// role is the least role that reaches the handler.
	role role
	// unbound routes concern all APNs topics and refuse keys that are bound to
	// some. The handlers of other routes keep to callerOf's scope.
	unbound bool
	// form is the form of errors.
	form    errorForm
	handler http.Handler
}

// changes reports whether requests have an effect. Of NanoMDM's endpoints GET
// has one, too.
func (r route) changes() bool { return r.method != http.MethodGet || r.role > roleRead }

// pattern is the route's pattern for http.ServeMux.
func (r route) pattern() string { return strings.TrimSpace(r.method + " " + r.path) }

// routes lists the endpoints behind an API key. NanoMDM's own endpoints ignore
// unknown query parameters, as NanoMDM does; the others refuse them.
func (a *API) routes() []route {
	return []route{
		// Enrollments.
		{method: "GET", path: "/v1/enrollments", role: roleRead, handler: a.endpoint(a.listEnrollments)},
		{method: "GET", path: "/v1/enrollments/{id}", role: roleRead, handler: a.endpoint(noQuery(a.showEnrollment))},
		{method: "DELETE", path: "/v1/enrollments/{id}", role: roleAdmin, handler: slow(a.endpoint(a.deleteEnrollment))},
		{method: "GET", path: "/v1/enrollments/{id}/queue", role: roleRead, handler: a.endpoint(a.listQueue)},
		{method: "DELETE", path: "/v1/enrollments/{id}/queue", role: roleEnqueue, handler: slow(a.endpoint(noQuery(a.clearQueue)))},
		{method: "POST", path: "/v1/enrollments/{id}/disable", role: roleAdmin, handler: a.endpoint(noQuery(a.disable))},
		{method: "POST", path: "/v1/enrollments/{id}/enable", role: roleAdmin, handler: a.endpoint(noQuery(a.enable))},
		{method: "PUT", path: "/v1/enrollments/{id}/renewal", role: roleAdmin, handler: a.endpoint(noQuery(a.openRenewal))},
		{method: "DELETE", path: "/v1/enrollments/{id}/renewal", role: roleAdmin, handler: a.endpoint(noQuery(a.closeRenewal))},
		{method: "GET", path: "/v1/enrollments/{id}/applications", role: roleRead, handler: a.endpoint(noQuery(a.listApplications))},
		{method: "PUT", path: "/v1/enrollments/{id}/tags/{tag}", role: roleEnqueue, handler: a.endpoint(noQuery(a.addTag))},
		{method: "DELETE", path: "/v1/enrollments/{id}/tags/{tag}", role: roleEnqueue, handler: a.endpoint(noQuery(a.removeTag))},
		{method: "GET", path: "/v1/tags", role: roleRead, handler: a.endpoint(a.listTags)},
		{method: "POST", path: "/v1/tags", role: roleEnqueue, handler: slow(a.endpoint(noQuery(a.changeTags)))},
		{method: "PUT", path: "/v1/renewals", role: roleAdmin, handler: slow(a.endpoint(noQuery(a.openRenewals)))},
		{method: "POST", path: "/v1/enrollments/{id}/bootstrap_token", role: roleAdmin, handler: a.endpoint(noQuery(a.readBootstrapToken))},
		{method: "POST", path: "/v1/enrollments/{id}/unlock_token", role: roleAdmin, handler: a.endpoint(noQuery(a.readUnlockToken))},
		{method: "GET", path: "/v1/stats", role: roleRead, handler: a.endpoint(noQuery(a.stats))},
		{method: "GET", path: "/v1/replicas", role: roleRead, unbound: true, handler: a.endpoint(noQuery(a.listReplicas))},

		// The form that upstream NanoMDM announced. Commands hold secrets.
		{method: "POST", path: "/v1/enrollments/query", role: roleRead, form: formNanoMDM, handler: slow(a.endpoint(a.queryEnrollments))},
		{method: "GET", path: "/v1/queue/{ids...}", role: roleAdmin, form: formNanoMDM, handler: a.endpoint(a.readQueue)},
		{method: "DELETE", path: "/v1/queue/{ids...}", role: roleEnqueue, form: formNanoMDM, handler: slow(a.endpoint(a.clearQueues))},

		// Commands.
		{path: "/v1/enqueue/{ids...}", role: roleEnqueue, form: formCommand, handler: slow(a.endpoint(a.enqueueIDs))},
		{method: "POST", path: "/v1/enqueue", role: roleEnqueue, handler: slow(a.endpoint(a.enqueue))},
		{method: "POST", path: "/v1/commands", role: roleEnqueue, handler: slow(a.endpoint(a.enqueueJSON))},

		{method: "GET", path: "/v1/commands", role: roleRead, handler: a.endpoint(a.listCommands)},
		{method: "GET", path: "/v1/commands/{uuid}", role: roleRead, handler: slow(a.endpoint(a.showCommand))},
		{method: "DELETE", path: "/v1/commands/{uuid}", role: roleEnqueue, handler: slow(a.endpoint(noQuery(a.cancelCommand)))},
		{method: "GET", path: "/v1/commands/{uuid}/results/{id}", role: roleRead, handler: a.endpoint(a.showResult)},
		{method: "DELETE", path: "/v1/commands/{uuid}/enrollments/{id}", role: roleEnqueue, handler: a.endpoint(noQuery(a.cancelItem))},
		{method: "POST", path: "/v1/commands/{uuid}/enrollments/{id}/requeue", role: roleEnqueue, handler: a.endpoint(noQuery(a.requeue))},

		// Push.
		{path: "/v1/push/{ids...}", role: rolePush, form: formPush, handler: slow(a.endpoint(a.pushIDs))},
		{method: "POST", path: "/v1/push", role: rolePush, handler: slow(a.endpoint(a.pushMany))},
		{method: "PUT", path: "/v1/pushcert", role: roleAdmin, form: formNanoMDM, handler: a.endpoint(a.storePushCert)},
		{method: "GET", path: "/v1/pushcert", role: roleRead, form: formNanoMDM, handler: a.endpoint(a.showPushCert)},
		{path: "/v1/escrowkeyunlock", role: roleAdmin, form: formNanoMDM, handler: http.HandlerFunc(a.escrowKeyUnlock)},
		{method: "GET", path: "/v1/pushcerts", role: roleRead, handler: a.endpoint(noQuery(a.listPushCerts))},
		{method: "DELETE", path: "/v1/pushcerts/{topic}", role: roleAdmin, handler: a.endpoint(a.deletePushCert)},

		// Events.
		{method: "GET", path: "/v1/events", role: roleRead, handler: slow(a.endpoint(a.listEvents))},
		{method: "POST", path: "/v1/events/redeliver", role: roleAdmin, unbound: true, handler: slow(a.endpoint(noQuery(a.redeliver)))},
		{method: "GET", path: "/v1/sinks", role: roleAdmin, unbound: true, handler: a.endpoint(noQuery(a.listSinks))},
		{method: "GET", path: "/v1/sinks/{name}", role: roleAdmin, unbound: true, handler: a.endpoint(noQuery(a.showSink))},
		{method: "PUT", path: "/v1/sinks/{name}", role: roleAdmin, unbound: true, handler: a.endpoint(noQuery(a.storeSink))},
		{method: "DELETE", path: "/v1/sinks/{name}", role: roleAdmin, unbound: true, handler: a.endpoint(noQuery(a.deleteSink))},

		// The API itself.
		{method: "GET", path: "/v1/keys", role: roleAdmin, unbound: true, handler: a.endpoint(noQuery(a.listKeys))},
		{method: "POST", path: "/v1/keys", role: roleAdmin, unbound: true, handler: a.endpoint(noQuery(a.createKey))},
		{method: "DELETE", path: "/v1/keys/{name}", role: roleAdmin, unbound: true, handler: a.endpoint(noQuery(a.deleteKey))},
		{method: "GET", path: "/v1/audit", role: roleAdmin, unbound: true, handler: a.endpoint(a.listAudit)},
		{method: "POST", path: "/v1/reseal", role: roleAdmin, unbound: true, handler: a.endpoint(a.reseal)},
	}
}

// Register adds the API's routes to mux, with a JSON answer for every other
// request under /v1/.
func (a *API) Register(mux *http.ServeMux) {
	for _, r := range a.routes() {
		mux.Handle(r.pattern(), a.guard(r))
	}
	// The mux would redirect the paths of these routes without their slash.
	for _, path := range []string{anyOther, "/v1/enqueue", "/v1/push", "/v1/queue"} {
		mux.Handle(path, closed(noRoute(mux, path)))
	}
}

// guard puts a route's handler behind the checks of its requests.
func (a *API) guard(r route) http.Handler {
	h := r.handler
	if r.unbound {
		h = a.requireUnbound(h)
	}
	h = a.require(r.role, h)
	if r.changes() {
		if r.form == formOwn {
			h = jsonOnly(h)
		}
		h = a.sameOrigin(h)
	}
	return closed(withForm(r.form, h))
}

// Migration puts the handler of /migration, which another package serves,
// behind the role admin.
func (a *API) Migration(next http.Handler) http.Handler {
	return a.guard(route{role: roleAdmin, unbound: true, form: formText, handler: next})
}

// Reader lets callers with the role read, for all topics, read from a handler
// of another package.
func (a *API) Reader(next http.Handler) http.Handler {
	return a.guard(route{method: http.MethodGet, role: roleRead, unbound: true, handler: next})
}

const anyOther = "/v1/"

// noRoute answers requests that no route of mux takes, behind a pattern: 405 where
// a route takes another method, else 404.
func noRoute(mux *http.ServeMux, own string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var allowed []string
		for _, method := range []string{"GET", "PUT", "POST", "DELETE"} {
			other := r.Clone(r.Context())
			other.Method = method
			if _, pattern := mux.Handler(other); pattern != own {
				allowed = append(allowed, method)
			}
		}
		if len(allowed) == 0 {
			writeError(w, r, http.StatusNotFound, "there is no such endpoint")
			return
		}
		if slices.Contains(allowed, "GET") {
			allowed = append(allowed, "HEAD")
		}
		w.Header().Set("Allow", strings.Join(allowed, ", "))
		writeError(w, r, http.StatusMethodNotAllowed, r.Method+" is not for this endpoint; there is "+andList(allowed))
	})
}
