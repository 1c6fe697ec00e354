package httpapi

import (
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/storage"
)

// ThrottledForTest is the number of addresses remembered for wrong keys.
func (a *API) ThrottledForTest() int {
	a.throttle.mu.Lock()
	defer a.throttle.mu.Unlock()
	return len(a.throttle.buckets)
}

// RouteForTest is what of a route is documented.
type RouteForTest struct {
	Method, Path, Role string
	Unbound            bool
}

// RoutesForTest is the table of routes.
func (a *API) RoutesForTest() (routes []RouteForTest) {
	for _, r := range a.routes() {
		methods := []string{r.method}
		if r.method == "" { // the methods that are documented
			methods = []string{"GET", "PUT", "POST"}
		}
		for _, method := range methods {
			routes = append(routes, RouteForTest{method, strings.ReplaceAll(r.path, "...}", "}"), r.role.String(), r.unbound})
		}
	}
	return routes
}

// DiagnosisForTest is what a diagnosis is made of.
type DiagnosisForTest struct {
	Now       time.Time
	E, Device *storage.Enrollment
	Head      *storage.QueueItem
	Cert      *storage.PushCertInfo
	Refusals  []storage.EnrollmentRefusal
}

// Sentences is the diagnosis.
func (d DiagnosisForTest) Sentences() []string {
	return (&diagnosis{now: d.Now, e: d.E, device: d.Device, head: d.Head, cert: d.Cert, refusals: d.Refusals}).sentences()
}
