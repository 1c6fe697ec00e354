package httpapi

import (
	"time"

	"github.com/nanomdm/nanomdm/storage"
)

// AccusedForTest is how many addresses are remembered for wrong keys.
func (a *API) AccusedForTest() int {
	a.throttle.mu.Lock()
	defer a.throttle.mu.Unlock()
	return len(a.throttle.accused)
}

// RouteForTest is what of a route is documented.
type RouteForTest struct {
	Method, Path, Role string
	Unbound            bool
}

// RoutesForTest is the table of routes.
func (a *API) RoutesForTest() (routes []RouteForTest) {
	for _, r := range a.routes() {
		routes = append(routes, RouteForTest{r.method, r.path, r.role.String(), r.unbound})
	}
	return routes
}

// DiagnosisForTest is what a diagnosis is made of.
type DiagnosisForTest struct {
	Now       time.Time
	E, Device *storage.Enrollment
	Head      *storage.QueueItem
	Cert      *storage.PushCertInfo
}

// Sentences is the diagnosis.
func (d DiagnosisForTest) Sentences() []string {
	return (&diagnosis{now: d.Now, e: d.E, device: d.Device, head: d.Head, cert: d.Cert}).sentences()
}
