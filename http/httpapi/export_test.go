package httpapi

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
