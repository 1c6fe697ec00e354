package httpapi

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/cryptoutil"
	"github.com/nanomdm/nanomdm/http/requestlog"
	"github.com/nanomdm/nanomdm/push"
	"github.com/nanomdm/nanomdm/storage"
)

// Pusher wakes devices. push.Service implements it.
type Pusher interface {
	Push(ctx context.Context, r push.Request) (map[string]push.Result, error)
	// CertificateChanged is called after the push certificate of a topic has
	// been stored or deleted.
	CertificateChanged(topic string)
}

// push wakes enrollments and adds each outcome to the result. With owed the
// store holds the push already, so that a failure here is no error.
func (a *API) push(ctx context.Context, res *result, ids []string, owed, async bool) error {
	results, err := a.pusher.Push(ctx, push.Request{Scope: callerOf(ctx).scope, IDs: ids, Owed: owed, Async: async})
	if err != nil {
		if !owed {
			return err
		}
		a.cfg.Logger.WarnContext(ctx, "pushes are left to the sweep", "request_id", requestlog.ID(ctx), "pushes", len(ids), "error", err)
	}
	var dead []string
	for _, id := range ids {
		r, s := results[id], res.Status[id]
		text := pushErrorText(r.Err)
		if errors.Is(r.Err, storage.ErrTokenDead) {
			dead = append(dead, id)
		}
		internal := r.Err != nil && text == "" || errors.Is(r.Err, push.ErrClosed)
		switch {
		case err != nil, r.Owed, owed && internal:
			s.PushOwed = true
		case r.Err == nil:
			s.PushResult = r.APNsID
		case text == "":
			return r.Err
		default:
			s.PushError, s.PushResult = text, refusedID(r.Err)
		}
		res.Status[id] = s
	}
	a.sayDisabled(ctx, res)
	return a.addRefusedIDs(ctx, res, dead)
}

// pushErrorText is the text of an error for the caller; empty for errors that
// stay in the log.
func pushErrorText(err error) string {
	var refused *push.Refused
	if errors.As(err, &refused) {
		return refused.Error()
	}
	for _, known := range []error{storage.ErrNotEnrolled, storage.ErrTokenDead, push.ErrStopped, push.ErrClosed} {
		if errors.Is(err, known) {
			return known.Error()
		}
	}
	return ""
}

// refusedID is the id of a push that APNs refused; empty for other errors.
func refusedID(err error) string {
	if refused := (*push.Refused)(nil); errors.As(err, &refused) && refused.Outcome.Status != 0 {
		return refused.Outcome.APNsID
	}
	return ""
}

// addRefusedIDs adds the ids of the pushes by which APNs declared tokens dead:
// the store knows them, and there was no other push.
func (a *API) addRefusedIDs(ctx context.Context, res *result, dead []string) error {
	for ids := range slices.Chunk(dead, maxPageItems) {
		list, err := a.store.Enrollments(ctx, callerOf(ctx).scope, ids)
		if err != nil {
			return err
		}
		for i := range list {
			s := res.Status[list[i].ID]
			s.PushResult = list[i].Push.LastAPNsID
			res.Status[list[i].ID] = s
		}
	}
	return nil
}

// wake carries out a call that only pushes.
func (a *API) wake(ctx context.Context, ids []string, async bool) (int, any, error) {
	res := newResult(ids)
	err := a.push(ctx, res, ids, false, async)
	a.audit(ctx, actPush, onlyOne(ids), pushDetail(ids, async), err)
	if err != nil {
		return 0, nil, err
	}
	return res.httpStatus(), res, nil
}

func pushDetail(ids []string, async bool) string {
	detail := fmt.Sprintf("%d enrollments: %s", len(ids), someOf(ids))
	if async {
		detail += "; not waited for"
	}
	return detail
}

// onlyOne is the target of an audit record: the id if there is one alone.
func onlyOne(ids []string) string {
	if len(ids) == 1 {
		return ids[0]
	}
	return ""
}

// pushIDs is NanoMDM's push.
func (a *API) pushIDs(ctx context.Context, r *http.Request) (int, any, error) {
	ids, err := pathIDs(r)
	if err != nil {
		return 0, nil, err
	}
	q := a.queryOf(r)
	async := q.async()
	if q.err != nil {
		return 0, nil, q.err
	}
	return a.wake(ctx, ids, async)
}

// pushAsync is the value of the query parameter push with which the answer does
// not wait for APNs.
const pushAsync = "async"

// async reports whether the answer does not wait for APNs.
func (q *query) async() bool { return q.word("push", pushAsync) != "" }

func (a *API) pushMany(ctx context.Context, r *http.Request) (int, any, error) {
	q := a.queryOf(r)
	async := q.async()
	if err := q.done(); err != nil {
		return 0, nil, err
	}
	var targets targetSet
	if err := readJSON(r, &targets); err != nil {
		return 0, nil, err
	}
	if err := targets.check(); err != nil {
		return 0, nil, err
	}
	ids, refusal, err := a.resolve(ctx, &targets)
	switch {
	case err != nil:
		return 0, nil, err
	case refusal != nil:
		return http.StatusConflict, refusal, nil
	}
	return a.wake(ctx, ids, async)
}

// pushCertAnswer is NanoMDM's answer about one push certificate.
type pushCertAnswer struct {
	Topic    string    `json:"topic"`
	NotAfter time.Time `json:"not_after"`
	Warning  string    `json:"warning,omitempty"`
}

func (a *API) storePushCert(ctx context.Context, r *http.Request) (int, any, error) {
	body, err := readBody(r)
	if err != nil {
		return 0, nil, err
	}
	pair, err := cryptoutil.ParsePushPair(body, a.cfg.Now())
	if err != nil {
		err = badRequest("push certificate: %v", err)
		a.audit(ctx, actPushCert, "", "", err)
		return 0, nil, err
	}
	answer := pushCertAnswer{Topic: pair.Topic, NotAfter: pair.Certificate.NotAfter.UTC()}
	if !covers(callerOf(ctx).scope, pair.Topic) {
		err := &problem{http.StatusForbidden, "this API key is not bound to the certificate's topic, " + pair.Topic}
		a.audit(ctx, actPushCert, pair.Topic, "", err)
		return 0, nil, err
	}
	cert := &storage.PushCert{Topic: pair.Topic, CertPEM: pair.CertPEM, KeyPEM: pair.KeyPEM, NotAfter: answer.NotAfter}
	err = a.store.StorePushCert(ctx, cert)
	a.audit(ctx, actPushCert, pair.Topic, "expires "+answer.NotAfter.Format(time.RFC3339), err)
	if err != nil {
		return 0, nil, err
	}
	a.pusher.CertificateChanged(pair.Topic)
	if answer.Warning, err = a.strandedWarning(ctx, pair.Topic); err != nil {
		// The certificate is stored; the warning is an extra.
		a.cfg.Logger.WarnContext(ctx, "cannot count who uses a push certificate", "topic", pair.Topic, "error", err)
	}
	if answer.Warning != "" {
		a.cfg.Logger.WarnContext(ctx, "a push certificate was stored whose topic no enrollment uses", "topic", pair.Topic, "warning", answer.Warning)
	}
	return http.StatusOK, answer, nil
}

func covers(scope storage.Scope, topic string) bool {
	return len(scope.Topics) == 0 || slices.Contains(scope.Topics, topic)
}

// strandedWarning warns of a topic that no enrollment uses while others are in
// use: the certificate was probably made anew instead of renewed.
func (a *API) strandedWarning(ctx context.Context, topic string) (string, error) {
	infos, stranded, err := a.pushTopics(ctx)
	if err != nil {
		return "", err
	}
	var others, without int64
	for _, info := range infos {
		if info.Topic == topic && info.Enrollments > 0 {
			return "", nil
		}
		others += info.Enrollments
	}
	for _, n := range stranded {
		without += n
	}
	if others+without == 0 {
		return "", nil
	}
	text := fmt.Sprintf("no enrollment uses the topic %s, while %d use others", topic, others+without)
	if without > 0 {
		text += fmt.Sprintf(", of which %d are stranded: there is no push certificate for %s", without, andList(slices.Sorted(maps.Keys(stranded))))
	}
	return text + ". A certificate that is renewed keeps its topic; a new one has another, and devices must enroll again to use it.", nil
}

// pushTopics reads the certificates of the caller's topics, and counts the
// enrollments without one by topic.
func (a *API) pushTopics(ctx context.Context) (infos []storage.PushCertInfo, stranded map[string]int64, err error) {
	scope := callerOf(ctx).scope
	if infos, err = a.store.PushCertInfos(ctx, scope); err != nil {
		return nil, nil, err
	}
	if stranded, err = a.store.StrandedEnrollments(ctx); err != nil {
		return nil, nil, err
	}
	maps.DeleteFunc(stranded, func(topic string, _ int64) bool { return !covers(scope, topic) })
	return infos, stranded, nil
}

func (a *API) showPushCert(ctx context.Context, r *http.Request) (int, any, error) {
	topic := r.URL.Query().Get("topic")
	if topic == "" {
		return 0, nil, badRequest("topic: it is missing")
	}
	scope := callerOf(ctx).scope
	if !covers(scope, topic) {
		return 0, nil, noPushCert(topic)
	}
	info, err := a.store.PushCertState(ctx, topic)
	if errors.Is(err, storage.ErrNotFound) {
		return 0, nil, noPushCert(topic)
	}
	if err != nil {
		return 0, nil, err
	}
	return http.StatusOK, pushCertAnswer{Topic: info.Topic, NotAfter: info.NotAfter}, nil
}

// pushCertInfo is a push certificate in the list.
type pushCertInfo struct {
	Topic       string    `json:"topic"`
	NotAfter    time.Time `json:"not_after"`
	Version     int64     `json:"version"`
	UpdatedAt   time.Time `json:"updated_at"`
	Enrollments int64     `json:"enrollments"`
	LastClass   string    `json:"last_class,omitempty"`
	LastAt      time.Time `json:"last_at,omitzero"`
}

type strandedInfo struct {
	Topic       string `json:"topic"`
	Enrollments int64  `json:"enrollments"`
}

func (a *API) listPushCerts(ctx context.Context, _ *http.Request) (int, any, error) {
	infos, stranded, err := a.pushTopics(ctx)
	if err != nil {
		return 0, nil, err
	}
	list := struct {
		PushCerts []pushCertInfo `json:"pushcerts"`
		Stranded  []strandedInfo `json:"stranded"`
	}{[]pushCertInfo{}, []strandedInfo{}}
	for _, i := range infos {
		list.PushCerts = append(list.PushCerts, pushCertInfo(i))
	}
	for _, topic := range slices.SortedFunc(maps.Keys(stranded), strings.Compare) {
		list.Stranded = append(list.Stranded, strandedInfo{topic, stranded[topic]})
	}
	return http.StatusOK, list, nil
}

// errNoPushCert is the answer about a topic that has none, or that the caller's
// key is not bound to.
var errNoPushCert = &problem{http.StatusNotFound, "there is no push certificate for that topic"}

// deletePushCert removes a topic's push certificate. While enrollments use the
// topic, it has to be forced.
func (a *API) deletePushCert(ctx context.Context, r *http.Request) (int, any, error) {
	topic := r.PathValue("topic")
	q := a.queryOf(r)
	force := q.flag("force")
	if err := q.done(); err != nil {
		return 0, nil, err
	}
	if !covers(callerOf(ctx).scope, topic) {
		return 0, nil, errNoPushCert
	}
	infos, err := a.store.PushCertInfos(ctx, storage.Scope{Topics: []string{topic}})
	switch {
	case err != nil:
		return 0, nil, err
	case len(infos) == 0:
		return a.gone(ctx, actDeleteCert, topic, errNoPushCert)
	}
	used := infos[0].Enrollments
	if used > 0 && (force == nil || !*force) {
		err := &problem{http.StatusConflict, fmt.Sprintf("%d enrollments use that topic, and nothing wakes them without its certificate; force=true deletes it all the same", used)}
		a.audit(ctx, actDeleteCert, topic, "", err)
		return 0, nil, err
	}
	if err := a.store.DeletePushCert(ctx, topic); errors.Is(err, storage.ErrNotFound) {
		return a.gone(ctx, actDeleteCert, topic, errNoPushCert)
	} else if err != nil {
		return 0, nil, err
	}
	a.pusher.CertificateChanged(topic)
	a.audit(ctx, actDeleteCert, topic, fmt.Sprintf("%d enrollments used it", used), nil)
	return http.StatusOK, struct {
		Topic       string `json:"topic"`
		Enrollments int64  `json:"enrollments"`
	}{topic, used}, nil
}
