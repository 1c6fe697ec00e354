package httpapi

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"net/http"

	"github.com/nanomdm/nanomdm/storage"
)

// User is the Basic authentication user of the main API key.
const User = "nanomdm"

// role is what a caller may do; each role includes those below it.
type role int

const (
	roleNone    role = iota
	roleRead         // look at everything but secrets
	rolePush         // and wake devices
	roleEnqueue      // and queue, cancel and requeue commands
	roleAdmin        // everything
)

// caller is who is behind a request.
type caller struct {
	// name goes into the audit table.
	name string
	role role
	// scope restricts the caller to the APNs topics of a tenant.
	scope storage.Scope
}

type callerKey struct{}

// callerOf returns who is behind the request of ctx: nobody, without a role,
// unless the request went through require.
func callerOf(ctx context.Context) caller {
	c, _ := ctx.Value(callerKey{}).(caller)
	return c
}

// require wraps next so that it is reached only by callers with the role.
func (a *API) require(need role, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, ok := a.authenticate(r)
		if !ok {
			w.Header().Set("WWW-Authenticate", `Basic realm="nanomdm"`)
			writeJSON(w, http.StatusUnauthorized, errorBody{"API user or key is missing or wrong"})
			return
		}
		if c.role < need {
			writeJSON(w, http.StatusForbidden, errorBody{"this API key's role does not allow that"})
			return
		}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), callerKey{}, c)))
	})
}

// Admin wraps a handler of another package so that it is reached with the
// role admin only.
func (a *API) Admin(next http.Handler) http.Handler { return a.require(roleAdmin, next) }

// Reader is Admin for the role read.
func (a *API) Reader(next http.Handler) http.Handler { return a.require(roleRead, next) }

// authenticate compares digests, in constant time, so that neither the key's
// bytes nor its length show in the time that it takes.
func (a *API) authenticate(r *http.Request) (caller, bool) {
	user, key, _ := r.BasicAuth()
	sum := sha256.Sum256([]byte(key))
	keyOK := subtle.ConstantTimeCompare(sum[:], a.key[:])
	userOK := subtle.ConstantTimeCompare([]byte(user), []byte(User))
	return caller{name: User, role: roleAdmin}, keyOK&userOK == 1
}
