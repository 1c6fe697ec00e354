package httpapi

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/http/requestlog"
	"github.com/nanomdm/nanomdm/storage"
)

// User is the Basic authentication user of the main API key.
const User = "nanomdm"

// role is the set of actions that a caller may do; each includes those below.
type role int

const (
	roleNone    role = iota
	roleRead         // read everything but secrets
	rolePush         // and wake devices
	roleEnqueue      // and queue, cancel and requeue commands
	roleAdmin        // everything
)

// roleNames are the names of the roles in requests, answers and the store.
var roleNames = [...]string{roleNone: "none", roleRead: "read", rolePush: "push", roleEnqueue: "enqueue", roleAdmin: "admin"}

func (r role) String() string { return roleNames[r] }

// parseRole returns roleNone for a word that names no role.
func parseRole(word string) role {
	for r := roleRead; r <= roleAdmin; r++ {
		if roleNames[r] == word {
			return r
		}
	}
	return roleNone
}

// caller is the owner of the API key of a request.
type caller struct {
	// name is for the audit table. id is the key's own: a key that is made anew
	// with the name of another has another id.
	name, id string
	role     role
	// scope restricts the caller to some APNs topics.
	scope storage.Scope
}

type callerKey struct{}

// callerOf returns the caller of the request of ctx: one without a role unless
// the request went through require.
func callerOf(ctx context.Context) caller {
	c, _ := ctx.Value(callerKey{}).(caller)
	return c
}

// require wraps next so that only callers with the role reach it. next has to
// keep to callerOf's scope.
func (a *API) require(need role, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := a.authenticate(r)
		if err != nil {
			a.refuse(w, r, err)
			return
		}
		if c.role < need {
			a.cfg.Refused(refusedForbidden)
			writeError(w, r, http.StatusForbidden, fmt.Sprintf("the API key %s has the role %s; this needs %s", c.name, c.role, need))
			return
		}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), callerKey{}, c)))
	})
}

// requireUnbound, behind require, refuses keys that are bound to APNs topics.
func (a *API) requireUnbound(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if len(callerOf(r.Context()).scope.Topics) > 0 {
			a.cfg.Refused(refusedForbidden)
			writeError(w, r, http.StatusForbidden, "this API key is bound to APNs topics, and this endpoint concerns all of them")
			return
		}
		next.ServeHTTP(w, r)
	})
}

var (
	errNoKey    = errors.New("no API key")
	errWrongKey = errors.New("wrong API user or key")
)

// errSlowDown is for an address with too many wrong keys.
type errSlowDown struct{ wait time.Duration }

func (errSlowDown) Error() string { return "too many wrong API keys from this address" }

// The arguments of Config.Refused.
const (
	refusedNoKey       = "no_key"
	refusedWrongKey    = "wrong_key"
	refusedSlowed      = "slowed"
	refusedForbidden   = "forbidden"
	refusedCrossOrigin = "cross_origin"
)

// refuse answers a request that was not authenticated.
func (a *API) refuse(w http.ResponseWriter, r *http.Request, err error) {
	var slow errSlowDown
	switch {
	case errors.As(err, &slow):
		a.cfg.Refused(refusedSlowed)
		w.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(slow.wait.Seconds()))))
		writeError(w, r, http.StatusTooManyRequests, slow.Error())
	case errors.Is(err, errNoKey), errors.Is(err, errWrongKey):
		if errors.Is(err, errWrongKey) {
			a.cfg.Refused(refusedWrongKey)
		} else {
			a.cfg.Refused(refusedNoKey)
		}
		if !fromBrowser(r) {
			w.Header().Set("WWW-Authenticate", `Basic realm="nanomdm"`)
		}
		writeUnauthorized(w, r, "API user or key is missing or wrong")
	default:
		a.fail(w, r, err)
	}
}

// authenticate finds out who calls. It looks every key up: a right key is never
// refused, however many wrong ones came from its address. Wrong keys of an
// address that sent too many get 429.
func (a *API) authenticate(r *http.Request) (caller, error) {
	user, key, ok := credentials(r)
	if !ok {
		return caller{}, errNoKey
	}
	hash := storage.HashKey(key)
	c, err := a.identify(r.Context(), user, key, hash)
	if !errors.Is(err, errWrongKey) {
		return c, err
	}
	if wait := a.throttle.failed(network(requestlog.Client(r.Context()))); wait > 0 {
		return caller{}, errSlowDown{wait}
	}
	// The user stays out of the log: keys are pasted there by mistake.
	a.cfg.Logger.WarnContext(r.Context(), "wrong API user or key",
		"request_id", requestlog.ID(r.Context()), "client", requestlog.Client(r.Context()))
	return caller{}, err
}

// anyUser stands for the missing user of Bearer authentication.
const anyUser = ""

// credentials reads Basic (the user is the key's name) or Bearer
// authentication.
func credentials(r *http.Request) (user, key string, ok bool) {
	if user, key, ok := r.BasicAuth(); ok {
		return user, key, user != anyUser && key != ""
	}
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	token = strings.TrimSpace(token)
	return anyUser, token, strings.EqualFold(scheme, "Bearer") && token != ""
}

// identify compares digests, in constant time, so that neither a key's bytes
// nor its length show in the time that it takes.
func (a *API) identify(ctx context.Context, user, key string, hash storage.KeyHash) (caller, error) {
	if subtle.ConstantTimeCompare(hash[:], a.key[:]) == 1 && (user == anyUser || user == User) {
		return caller{name: User, id: User, role: roleAdmin}, nil
	}
	if user == User || !strings.HasPrefix(key, keyPrefix) || len(key) != keyLen {
		return caller{}, errWrongKey
	}
	k, err := a.keys.find(ctx, hash)
	switch {
	case errors.Is(err, storage.ErrNotFound):
		return caller{}, errWrongKey
	case err != nil:
		return caller{}, err
	case user != anyUser && user != k.Name:
		return caller{}, errWrongKey
	}
	return caller{name: k.Name, id: keyID(k.Hash), role: parseRole(k.Role), scope: k.Scope}, nil
}
