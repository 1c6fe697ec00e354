package httpapi

// AccusedForTest is how many addresses are remembered for wrong keys.
func (a *API) AccusedForTest() int {
	a.throttle.mu.Lock()
	defer a.throttle.mu.Unlock()
	return len(a.throttle.accused)
}
