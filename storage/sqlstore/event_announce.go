package sqlstore

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

// announcement is an event about a finding of the server.
type announcement struct {
	topic       string // begins with nanomdm.
	enrollment  string // empty without an enrollment
	apnsTopic   string // set without an enrollment
	requestType string
	commandUUID string
	detail      map[string]string // further facts
}

// announced says whether a sink names the topic, so that it makes sense to look
// for such events.
func announced(ctx context.Context, t *tx, topic string) (bool, error) {
	sinks, err := readSinks(ctx, t)
	if err != nil {
		return false, fmt.Errorf("reading event sinks: %w", err)
	}
	return wanted(sinks, topic), nil
}

func wanted(sinks []storage.EventSink, topic string) bool {
	return slices.ContainsFunc(sinks, func(k storage.EventSink) bool {
		return k.Enabled && slices.Contains(k.Filter.Topics, topic)
	})
}

// announce inserts events into the outbox in the caller's transaction, except
// those of topics that no sink names. Call it after locking the rows that the
// events are about, and before deleting their enrollment.
func announce(ctx context.Context, t *tx, list []announcement) error {
	if len(list) == 0 {
		return nil
	}
	sinks, err := readSinks(ctx, t)
	if err != nil {
		return fmt.Errorf("reading event sinks: %w", err)
	}
	list = slices.DeleteFunc(slices.Clone(list), func(a announcement) bool { return !wanted(sinks, a.topic) })
	for chunk := range slices.Chunk(list, eventRows) {
		if err := announceSome(ctx, t, chunk); err != nil {
			return fmt.Errorf("announcing events: %w", err)
		}
	}
	return nil
}

func announceSome(ctx context.Context, t *tx, list []announcement) error {
	var ids []string
	for _, a := range list {
		ids = append(ids, a.enrollment)
	}
	to, err := eventEnrollments(ctx, t, ids)
	if err != nil {
		return err
	}
	events := make([]storage.Event, len(list))
	for i, a := range list {
		e := storage.Event{
			ID: eventID(t.Now), Topic: a.topic, CreatedAt: fromMicros(t.Now), CommandUUID: a.commandUUID, Params: a.detail,
			Enroll: mdm.EnrollID{ID: a.enrollment}, APNsTopic: a.apnsTopic, RequestType: a.requestType,
		}
		if of := to[a.enrollment]; of != nil {
			e.APNsTopic, e.Enroll.Type = of.topic, of.typ
			if a.enrollment != of.deviceID {
				e.Enroll.ParentID = of.deviceID
			}
			switch of.typ {
			case mdm.UserEnrollment, mdm.UserEnrollmentDevice:
				e.EnrollmentID = of.deviceID
			default:
				e.UDID = of.deviceID
			}
		}
		events[i] = e
	}
	return putEvents(ctx, t, events)
}

// eventEnrollment are the fields of an event that its enrollment has.
type eventEnrollment struct {
	typ      mdm.EnrollType
	deviceID string
	topic    string
}

// eventEnrollments reads enrollments. Unknown ones are missing.
func eventEnrollments(ctx context.Context, t *tx, ids []string) (map[string]*eventEnrollment, error) {
	is, args := t.Among(ids)
	to := make(map[string]*eventEnrollment, len(ids))
	err := t.Query(ctx, `SELECT id, type, device_id, topic FROM nano_enrollments WHERE id `+is, args...).Each(func(row sqldb.Row) error {
		var id string
		a := new(eventEnrollment)
		if err := row.Scan(&id, &a.typ, &a.deviceID, &a.topic); err != nil {
			return err
		}
		to[id] = a
		return nil
	})
	return to, err
}

// eventID makes a UUID of version 7 (RFC 9562) from the transaction's time, so
// that events lie in the index in the order in which they came.
func eventID(now int64) string {
	id := uuid.New()
	var ms [8]byte
	binary.BigEndian.PutUint64(ms[:], uint64(now/1000))
	copy(id[:6], ms[2:])
	id[6] = id[6]&0x0f | 0x70
	return id.String()
}

// expiring is a certificate that expires soon.
type expiring struct {
	notice   string // key of nano_event_notices
	notAfter int64
	a        announcement
}

// NoteExpiring implements storage.EventUpkeep.
func (s *Store) NoteExpiring(ctx context.Context, l storage.Lease, before time.Time, limit int) (int, error) {
	var n int
	err := s.write(ctx, func(ctx context.Context, t *tx) error {
		n = 0
		if err := t.checkLease(ctx, l); err != nil {
			return err
		}
		var all []expiring
		for _, kind := range [...]struct {
			topic, query string
			args         []any
		}{
			// These are few: all are read.
			{storage.TopicPushCertExpiring, `SELECT c.topic, c.topic, c.not_after FROM nano_push_certs c
				WHERE c.not_after < ? ORDER BY c.not_after, c.topic`, []any{micros(before)}},
			{storage.TopicIdentityExpiring, `SELECT a.sha256, a.id, a.not_after FROM nano_cert_auth_associations a
				LEFT JOIN nano_event_notices n ON n.name = a.sha256
				WHERE a.not_after < ? AND a.retired_at IS NULL AND n.name IS NULL ORDER BY a.not_after, a.sha256 LIMIT ?`, []any{micros(before), limit}},
		} {
			want, err := announced(ctx, t, kind.topic)
			if err != nil {
				return err
			}
			if !want {
				continue
			}
			found, err := expiringSoon(ctx, t, kind.topic, kind.query, kind.args...)
			if err != nil {
				return err
			}
			all = append(all, found...)
		}
		var list []announcement
		for _, x := range all {
			fresh, err := notice(ctx, t, x.notice)
			if err != nil {
				return err
			}
			if fresh {
				list = append(list, x.a)
			}
		}
		n = len(list)
		return announce(ctx, t, list)
	})
	if err != nil {
		return 0, fmt.Errorf("noting certificates that end: %w", err)
	}
	return n, nil
}

func expiringSoon(ctx context.Context, t *tx, topic, query string, args ...any) ([]expiring, error) {
	var found []expiring
	err := t.Query(ctx, query, args...).Each(func(row sqldb.Row) error {
		var key, of string
		x := expiring{a: announcement{topic: topic}}
		if err := row.Scan(&key, &of, &x.notAfter); err != nil {
			return err
		}
		end := fromMicros(x.notAfter).Format(time.RFC3339)
		x.notice, x.a.detail = key, map[string]string{"not_after": end}
		if topic == storage.TopicPushCertExpiring {
			// A certificate that replaces it expires at another time.
			x.notice, x.a.apnsTopic = key+" "+end, of
		} else {
			x.a.enrollment = of
			x.a.detail["certificate_sha256"] = key
		}
		found = append(found, x)
		return nil
	})
	return found, err
}

// notice records a name, and says whether it was new.
func notice(ctx context.Context, t *tx, name string) (fresh bool, err error) {
	name = clip(name)
	var n int64
	if err := t.QueryRow(ctx, `SELECT COUNT(*) FROM nano_event_notices WHERE name = ?`, name).Scan(&n); err != nil || n > 0 {
		return false, err
	}
	_, err = t.Exec(ctx, `INSERT INTO nano_event_notices (name, created_at) VALUES (?, ?)`, name, t.Now)
	return err == nil, err
}
