package apnstest

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"time"
)

const (
	devicePath = "/3/device/"
	maxPayload = 4096
)

var lowerUUID = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)

// handle serves one request on a connection whose certificate is for topic.
func (s *Server) handle(w http.ResponseWriter, r *http.Request, topic string) {
	id := r.Header.Get("Apns-Id")
	if !lowerUUID.MatchString(id) {
		id = newUUID()
	}
	w.Header().Set("Apns-Id", id)

	p, refusal := check(r, topic)

	s.mu.Lock()
	s.counts.Requests++
	m := s.moods
	stall := false
	if refusal == nil {
		s.stalled += m.stall
		if stall = s.stalled >= 1; stall {
			s.stalled--
		}
	}
	s.mu.Unlock()

	answer := Answer{}
	switch {
	case refusal != nil:
		answer = *refusal
	case stall:
		answer.Stall = true
	case m.answer != nil:
		answer = m.answer(p)
	}
	if answer.Stall {
		s.count(func(c *Counts) { c.Stalled++ })
		<-r.Context().Done() // reset by the client, or the connection is gone
		return
	}
	if m.latency > 0 {
		timer := time.NewTimer(m.latency)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-r.Context().Done():
			return
		}
	}
	if answer.Reset {
		panic(http.ErrAbortHandler)
	}
	if answer.Status != 0 && answer.Status != http.StatusOK {
		refuse(w, answer)
		return
	}
	s.mu.Lock()
	s.counts.Accepted++
	s.tokens[string(p.Token)]++
	s.mu.Unlock()
	if m.onPush != nil {
		m.onPush(p)
	}
}

func (s *Server) count(f func(*Counts)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.counts)
}

// refuse writes an answer other than 200.
func refuse(w http.ResponseWriter, a Answer) {
	if a.RetryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(a.RetryAfter/time.Second)))
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(a.Status)
	body := struct {
		Reason    string `json:"reason"`
		Timestamp int64  `json:"timestamp,omitempty"`
	}{Reason: a.Reason}
	if !a.Timestamp.IsZero() {
		body.Timestamp = a.Timestamp.UnixMilli()
	}
	// A client that is gone does not want it.
	_ = json.NewEncoder(w).Encode(body)
}

// check does what APNs does before it looks the token up. Source: Apple,
// "Sending notification requests to APNs" and "Handling notification
// responses from APNs".
func check(r *http.Request, topic string) (Push, *Answer) {
	bad := func(reason string) (Push, *Answer) {
		return Push{}, &Answer{Status: http.StatusBadRequest, Reason: reason}
	}
	if r.Method != http.MethodPost {
		return Push{}, &Answer{Status: http.StatusMethodNotAllowed, Reason: "MethodNotAllowed"}
	}
	hexToken, ok := strings.CutPrefix(r.URL.Path, devicePath)
	if !ok || strings.Contains(hexToken, "/") {
		return Push{}, &Answer{Status: http.StatusNotFound, Reason: "BadPath"}
	}
	for name, values := range r.Header {
		if strings.HasPrefix(name, "Apns-") && len(values) > 1 {
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
	h := r.Header
	switch h.Get("Apns-Topic") {
	case topic:
	case "":
		return bad("MissingTopic")
	default:
		return bad("TopicDisallowed")
	}
	if t := h.Get("Apns-Push-Type"); t != "" && t != "mdm" {
		return bad("InvalidPushType")
	}
	switch h.Get("Apns-Priority") {
	case "", "1", "5", "10":
	default:
		return bad("BadPriority")
	}
	if e := h.Get("Apns-Expiration"); e != "" {
		if _, err := strconv.ParseUint(e, 10, 63); err != nil {
			return bad("BadExpirationDate")
		}
	}
	if id := h.Get("Apns-Id"); id != "" && !lowerUUID.MatchString(id) {
		return bad("BadMessageId")
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, maxPayload+1))
	if err != nil {
		return bad("PayloadEmpty")
	}
	if len(body) > maxPayload {
		return Push{}, &Answer{Status: http.StatusRequestEntityTooLarge, Reason: "PayloadTooLarge"}
	}
	// An MDM wake-up has this one key; APNs names no reason of its own for a
	// body that says nothing.
	var payload map[string]string
	if json.Unmarshal(body, &payload) != nil || len(payload) != 1 || payload["mdm"] == "" {
		return bad("PayloadEmpty")
	}
	return Push{Token: token, Magic: payload["mdm"], Topic: topic}, nil
}

func newUUID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
