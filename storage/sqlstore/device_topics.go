package sqlstore

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/nanomdm/nanomdm/storage"
)

// The APNs topic decides which tenant sees an enrollment. Authenticate sets it,
// and a TokenUpdate confirms it.

// topicAuditPause and topicAudits bound the audit records of refused topics: one
// of a device in this time, and some of all devices, since a certificate that is
// pinned to nothing may name any device.
const (
	topicAuditPause = time.Hour
	topicAudits     = 100
)

// actionRefuseTopic is the action of the audit record.
const actionRefuseTopic = "enrollment.topic.refuse"

// topicOf returns the APNs topic of an operation's enrollment: its device's
// topic if that is known.
func (r *opRound) topicOf(p *opRun, said string) string {
	if own := r.rows.byID[p.device]; own != nil && own.topic != "" {
		return own.topic
	}
	return said
}

// refuseTopics refuses TokenUpdates of devices with another topic than that of
// their Authenticate, or that sets a topic of another CA's devices, and appends
// audit records.
func refuseTopics(ctx context.Context, t *tx, batch []*opRun, r *opRound) error {
	for _, p := range ofKind(batch, &tokenUpdateKind) {
		said := clip(p.kind.topic(p.op))
		is := r.topicOf(p, "")
		detail := ""
		switch {
		case p.settled || p.src.Enroll.IsUserChannel():
			continue
		case is == "" && p.src.Pin != nil && p.src.Pin.EnrollsTo != nil && !p.src.Pin.EnrollsTo(said):
			p.err = storage.ErrTopicCA
			detail = "another CA issued its certificate than enrolls devices to " + said
		case is != "" && is != said:
			p.err = storage.ErrTopic
			detail = fmt.Sprintf("its TokenUpdate has the topic %s; it enrolled with %s", said, is)
		default:
			continue
		}
		if err := auditTopic(ctx, t, p, p.err, detail); err != nil {
			return err
		}
	}
	return nil
}

// auditTopic appends an audit record of a refused topic, unless there are recent
// ones.
func auditTopic(ctx context.Context, t *tx, p *opRun, refused error, detail string) error {
	var ofDevice, ofAll int
	since := t.Now - topicAuditPause.Microseconds()
	err := t.QueryRow(ctx, "SELECT COUNT(*) FROM nano_audit"+t.Dialect.Index("nano_audit_target")+" WHERE target = ? AND action = ? AND created_at > ?",
		clip(p.id()), actionRefuseTopic, since).Scan(&ofDevice)
	if err == nil && ofDevice == 0 {
		err = t.QueryRow(ctx, "SELECT COUNT(*) FROM nano_audit"+t.Dialect.Index("nano_audit_action")+" WHERE action = ? AND created_at > ?",
			actionRefuseTopic, since).Scan(&ofAll)
	}
	if err != nil {
		return fmt.Errorf("looking for audit records: %w", err)
	}
	if ofDevice > 0 || ofAll >= topicAudits {
		return nil
	}
	if err := audit(ctx, t, &storage.AuditRecord{Who: "device", Action: actionRefuseTopic, Target: clip(p.id()), Detail: detail, Outcome: refused.Error()}); err != nil {
		return fmt.Errorf("keeping a record: %w", err)
	}
	return nil
}

// moveTopics finds the devices whose Authenticate has another topic than
// before. A renewal window does not count for them, and the queue rows and
// results of all their channels stay with the former topic.
func moveTopics(ctx context.Context, t *tx, batch []*opRun, r *opRound) error {
	var devices, channels []string
	for _, p := range ofKind(batch, &authenticateKind) {
		own, said := r.rows.byID[p.id()], clip(p.op.(*storage.Authenticate).Message.Topic)
		if p.settled || own == nil || said == "" || own.topic == said {
			continue
		}
		was := own.topic
		own.topic = said
		if _, err := t.Exec(ctx, "UPDATE nano_enrollments SET topic = ?, updated_at = ? WHERE id = ?", said, t.Now, own.id); err != nil {
			return fmt.Errorf("setting a topic: %w", err)
		}
		if was == "" { // a copy without a topic, or a user channel's device
			continue
		}
		own.renewing = false
		devices = append(devices, own.id)
		for _, e := range r.rows.byDevice[p.device] {
			channels = append(channels, e.id)
		}
	}
	if len(devices) == 0 {
		return nil
	}
	is, args := t.Among(devices)
	_, err := t.Exec(ctx, "UPDATE nano_devices SET unlock_token = NULL, unlock_token_at = NULL WHERE id "+is, args...)
	if err != nil {
		return fmt.Errorf("clearing unlock tokens: %w", err)
	}
	_, err = t.Exec(ctx, "UPDATE nano_enrollments SET topic = '' WHERE id <> device_id AND device_id "+is, args...)
	if err != nil {
		return fmt.Errorf("clearing the topics of user channels: %w", err)
	}
	moves := make([]any, 0, 2*len(channels))
	for _, id := range channels {
		moves = append(moves, id, t.Now)
	}
	if err := t.Upsert(ctx, "nano_topic_moves", []string{"id", "moved_at"}, []string{"id"}, []string{"moved_at"}, moves); err != nil {
		return fmt.Errorf("noting moves between topics: %w", err)
	}
	return forgetRefusals(ctx, t, channels)
}

// forgetRefusals removes the refusals of enrollments that moved to another topic:
// its tenant is not to see how often the former one's were refused, and why.
func forgetRefusals(ctx context.Context, t *tx, ids []string) error {
	for chunk := range slices.Chunk(slices.Sorted(slices.Values(ids)), enqueueRows) {
		is, args := t.Among(chunk)
		if _, err := t.Exec(ctx, "DELETE FROM nano_enrollment_refusals WHERE id "+is, args...); err != nil {
			return fmt.Errorf("forgetting refusals: %w", err)
		}
	}
	return nil
}
