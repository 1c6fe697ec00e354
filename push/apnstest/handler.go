package apnstest

import (
	"encoding/hex"
	"encoding/json"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/net/http2/hpack"
)

const (
	devicePath = "/3/device/"
	maxPayload = 4096
)

// arrived counts a request and returns the behaviour for it, and whether it
// stalls. Only valid requests stall.
func (s *Server) arrived(valid bool) (m behaviour, stall bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts.Requests++
	if valid {
		s.stalled += s.behaviour.stall
		if stall = s.stalled >= 1; stall {
			s.stalled--
			s.counts.Stalled++
		}
	}
	return s.behaviour, stall
}

// answerTo returns the answer to a request. refusal is the result of check.
func (s *Server) answerTo(m behaviour, p Push, refusal *Answer) Answer {
	a := Answer{}
	switch {
	case refusal != nil:
		a = *refusal
	case m.answer != nil:
		a = m.answer(p)
	}
	if a.Status == 0 {
		a.Status = http.StatusOK
	}
	switch {
	case a.Stall:
		s.count(func(c *Counts) { c.Stalled++ })
	case !a.Reset && a.Status == http.StatusOK:
		s.mu.Lock()
		s.counts.Accepted++
		s.tokens[string(p.Token)]++
		s.mu.Unlock()
		if m.onPush != nil {
			m.onPush(p)
		}
	}
	return a
}

func (s *Server) count(f func(*Counts)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.counts)
}

// check checks a request as APNs does before it looks the token up. Source: Apple,
// "Sending notification requests to APNs" and "Handling notification
// responses from APNs".
func check(r *stream, topic string) (Push, *Answer) {
	bad := func(reason string) (Push, *Answer) {
		return Push{}, &Answer{Status: http.StatusBadRequest, Reason: reason}
	}
	if r.headers.PseudoValue("method") != http.MethodPost {
		return Push{}, &Answer{Status: http.StatusMethodNotAllowed, Reason: "MethodNotAllowed"}
	}
	hexToken, ok := strings.CutPrefix(r.headers.PseudoValue("path"), devicePath)
	if !ok || strings.Contains(hexToken, "/") {
		return Push{}, &Answer{Status: http.StatusNotFound, Reason: "BadPath"}
	}
	fields := r.headers.RegularFields()
	for i, f := range fields {
		if strings.HasPrefix(f.Name, "apns-") && slices.ContainsFunc(fields[:i], func(other hpack.HeaderField) bool { return other.Name == f.Name }) {
			return bad("DuplicateHeaders")
		}
	}
	token, err := hex.DecodeString(hexToken)
	switch {
	case hexToken == "":
		return bad("MissingDeviceToken")
	case err != nil:
		return bad("BadDeviceToken")
	}
	switch r.header("apns-topic") {
	case topic:
	case "":
		return bad("MissingTopic")
	default:
		return bad("TopicDisallowed")
	}
	if t := r.header("apns-push-type"); t != "" && t != "mdm" {
		return bad("InvalidPushType")
	}
	switch r.header("apns-priority") {
	case "", "1", "5", "10":
	default:
		return bad("BadPriority")
	}
	if e := r.header("apns-expiration"); e != "" {
		if _, err := strconv.ParseUint(e, 10, 63); err != nil {
			return bad("BadExpirationDate")
		}
	}
	if id := r.header("apns-id"); id != "" && !isLowerUUID(id) {
		return bad("BadMessageId")
	}
	if len(r.body) > maxPayload {
		return Push{}, &Answer{Status: http.StatusRequestEntityTooLarge, Reason: "PayloadTooLarge"}
	}
	// An MDM wake-up has this one key; APNs has no reason of its own for a body
	// without it.
	var payload map[string]string
	if json.Unmarshal(r.body, &payload) != nil || len(payload) != 1 || payload["mdm"] == "" {
		return bad("PayloadEmpty")
	}
	return Push{Token: token, Magic: payload["mdm"], Topic: topic}, nil
}

// header returns the value of a header, "" if there is none.
func (st *stream) header(name string) string {
	for _, f := range st.headers.RegularFields() {
		if f.Name == name {
			return f.Value
		}
	}
	return ""
}

func isLowerUUID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i := range len(s) {
		switch c := s[i]; {
		case i == 8 || i == 13 || i == 18 || i == 23:
			if c != '-' {
				return false
			}
		case (c < '0' || c > '9') && (c < 'a' || c > 'f'):
			return false
		}
	}
	return true
}
