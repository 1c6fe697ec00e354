package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

// attributed returns op with the CommandUUID of the offered command, if it is a
// report that cannot be read and names none. It returns other operations as
// they are.
func (s *Store) attributed(ctx context.Context, op storage.Op) (storage.Op, error) {
	r, ok := op.(*storage.Report)
	if !ok || r.Status != mdm.StatusUnreadable || r.CommandUUID != "" {
		return op, nil
	}
	uuid, err := s.offeredTo(ctx, r.Src.Enroll.ID)
	if err != nil || uuid == "" {
		return op, err
	}
	named := *r
	named.CommandUUID = uuid
	named.Src.Events = slices.Clone(r.Src.Events)
	for i := range named.Src.Events {
		named.Src.Events[i].CommandUUID = uuid
	}
	return &named, nil
}

// offeredTo returns the command that an enrollment was offered and has not
// answered, empty if there is none. Commands that were never offered do not
// count, so that an unreadable Idle ends no command that the device has not
// seen. This replica has its own offers in memory; offers of others are written
// after some seconds, until when the device repeats its report.
func (s *Store) offeredTo(ctx context.Context, id string) (string, error) {
	if uuid := s.act.offeredTo(id); uuid != "" {
		return uuid, nil
	}
	var uuid string
	err := s.read(ctx, func(ctx context.Context, t *tx) error {
		return t.QueryRow(ctx, `SELECT command_uuid FROM nano_enrollment_queue`+t.Dialect.Index("nano_enrollment_queue_next")+`
WHERE state = ? AND id = ? AND attempts > 0 ORDER BY state, id, priority DESC, seq LIMIT 1`, int(storage.Queued), id).Scan(&uuid)
	})
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return "", fmt.Errorf("looking for the command that was offered: %w", err)
	}
	return uuid, nil
}

// offeredTo returns the command of the offers that are not written yet.
func (a *activityLog) offeredTo(id string) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.pending[id].offered
}
