package httpapi

import (
	"context"
	"net/http"
)

// errorForm is the form in which an endpoint's clients expect errors. Clients
// of NanoMDM's endpoints look for its keys and statuses.
type errorForm int

const (
	formOwn     errorForm = iota // {"error"}
	formNanoMDM                  // {"error"}, 401 as text
	formCommand                  // NanoMDM's enqueue: 500, {"command_error"}
	formPush                     // NanoMDM's push: 500, {"push_error"}
	formText                     // NanoMDM's migration: text
)

type formKey struct{}

// withForm sets the form of the errors of a handler.
func withForm(form errorForm, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), formKey{}, form)))
	})
}

func formOf(r *http.Request) errorForm {
	form, _ := r.Context().Value(formKey{}).(errorForm)
	return form
}

// writeError answers with an error in the endpoint's form.
func writeError(w http.ResponseWriter, r *http.Request, status int, text string) {
	switch formOf(r) {
	case formCommand:
		writeJSON(w, status, &result{CommandError: text, Error: text})
	case formPush:
		writeJSON(w, status, &result{PushError: text, Error: text})
	case formText:
		http.Error(w, text, status)
	default:
		writeJSON(w, status, struct {
			Error string `json:"error"`
		}{text})
	}
}

// writeFailure answers with the error of a handler. NanoMDM's enqueue and push
// have one status for those.
func writeFailure(w http.ResponseWriter, r *http.Request, status int, text string) {
	if form := formOf(r); form == formCommand || form == formPush {
		status = http.StatusInternalServerError
	}
	writeError(w, r, status, text)
}

// writeUnauthorized answers 401. Clients of NanoMDM's endpoints do not expect
// JSON there.
func writeUnauthorized(w http.ResponseWriter, r *http.Request, text string) {
	if formOf(r) == formOwn {
		writeError(w, r, http.StatusUnauthorized, text)
		return
	}
	http.Error(w, http.StatusText(http.StatusUnauthorized), http.StatusUnauthorized)
}
