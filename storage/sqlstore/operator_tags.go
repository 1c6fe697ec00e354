package sqlstore

import (
	"context"
	"fmt"
	"slices"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

var _ storage.Tags = (*Store)(nil)

// deviceTags is the table of tags.
var deviceTags = sqldb.PairTable{Name: "nano_device_tags", ID: "id", Item: "tag"}

// movedSince is a condition on tags g: tags from before the device came to its
// APNs topic belong to another tenant.
const movedSince = "EXISTS (SELECT 1 FROM nano_topic_moves v WHERE v.id = g.id AND v.moved_at >= g.created_at)"

// tagInSight is a condition on tags g; empty if the scope sees all.
func tagInSight(scope storage.Scope) string {
	if len(scope.Topics) == 0 {
		return ""
	}
	return " AND NOT " + movedSince
}

// ChangeTags implements storage.Tags.
func (s *Store) ChangeTags(ctx context.Context, scope storage.Scope, c storage.TagChange) (done storage.TagsChanged, err error) {
	for chunk := range slices.Chunk(storableAmong(c.IDs, make(map[string]error)), enqueueRows) {
		var some storage.TagsChanged
		err := s.write(ctx, func(ctx context.Context, t *tx) (err error) {
			some, err = changeTags(ctx, t, scope, c, chunk)
			return err
		})
		if err != nil {
			return done, fmt.Errorf("changing tags: %w", err)
		}
		done.Found = append(done.Found, some.Found...)
		done.Changed = append(done.Changed, some.Changed...)
		done.Full = append(done.Full, some.Full...)
	}
	return done, nil
}

// changeTags changes the tags of some devices, which it locks.
func changeTags(ctx context.Context, t *tx, scope storage.Scope, c storage.TagChange, ids []string) (done storage.TagsChanged, err error) {
	condition, topics := scoped(scope)
	place, args := sqldb.InList(ids)
	done.Found, err = sqldb.Column[string](t.Query(ctx, "SELECT e.id FROM nano_enrollments e WHERE e.id IN "+place+" AND e.device_id = e.id"+condition+
		" ORDER BY e.id"+t.Dialect.ForUpdate(), append(args, topics...)...))
	if err != nil {
		return done, fmt.Errorf("locking devices: %w", err)
	}
	visible, err := readTags(ctx, t, scope, done.Found)
	if err != nil {
		return done, err
	}
	var added []any
	var removed []keyPair
	for _, id := range done.Found {
		add := without(c.Add, visible[id])
		kept := without(visible[id], c.Remove)
		switch n := len(kept) + len(add); { // how many are hidden would show otherwise
		case len(add) > 0 && n > storage.MaxTags:
			done.Full = append(done.Full, id)
			continue
		case len(add) == 0 && len(kept) == len(visible[id]):
			continue
		}
		done.Changed = append(done.Changed, id)
		for _, tag := range add {
			added = append(added, id, tag, t.Now)
		}
		for _, tag := range without(visible[id], kept) {
			removed = append(removed, keyPair{ID: id, Item: tag})
		}
	}
	if len(done.Changed) == 0 {
		return done, nil
	}
	for chunk := range slices.Chunk(removed, enqueueRows) {
		where, args := deviceTags.Among(t.Tx, chunk)
		if _, err := t.Exec(ctx, "DELETE FROM nano_device_tags WHERE "+where, args...); err != nil {
			return done, fmt.Errorf("removing tags: %w", err)
		}
	}
	// A hidden tag that is given again becomes a visible one.
	err = t.upsertChunks(ctx, deviceTags.Name, []string{"id", "tag", "created_at"}, []string{"id", "tag"}, []string{"created_at"}, added)
	if err != nil {
		return done, fmt.Errorf("storing tags: %w", err)
	}
	return done, audit(ctx, t, c.Record(done.Changed))
}

// without returns the texts that are not among others.
func without(texts, others []string) []string {
	return slices.DeleteFunc(slices.Clone(texts), func(text string) bool { return slices.Contains(others, text) })
}

// readTags reads the tags of devices that the scope sees, sorted.
func readTags(ctx context.Context, t *tx, scope storage.Scope, devices []string) (map[string][]string, error) {
	tags := make(map[string][]string)
	if len(devices) == 0 {
		return tags, nil
	}
	place, args := sqldb.InList(devices)
	err := t.Query(ctx, "SELECT g.id, g.tag FROM nano_device_tags g WHERE g.id IN "+place+tagInSight(scope)+" ORDER BY g.id, g.tag", args...).Each(func(row sqldb.Row) error {
		var id, tag string
		if err := row.Scan(&id, &tag); err != nil {
			return err
		}
		tags[id] = append(tags[id], tag)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("reading tags: %w", err)
	}
	return tags, nil
}

// TagCounts implements storage.Tags.
func (s *Store) TagCounts(ctx context.Context, scope storage.Scope, after string, limit int) (list []storage.TagCount, err error) {
	q, args := "SELECT g.tag, COUNT(*) FROM nano_device_tags g WHERE g.tag > ?", []any{after}
	if len(scope.Topics) > 0 {
		condition, topics := scoped(scope)
		q = "SELECT g.tag, COUNT(*) FROM nano_device_tags g JOIN nano_enrollments e ON e.id = g.id WHERE g.tag > ?" + tagInSight(scope) + condition
		args = append(args, topics...)
	}
	err = s.read(ctx, func(ctx context.Context, t *tx) error {
		list, err = sqldb.Collect(t.Query(ctx, q+" GROUP BY g.tag ORDER BY g.tag LIMIT ?", append(slices.Clone(args), limit)...), func(row sqldb.Row, c *storage.TagCount) error {
			return row.Scan(&c.Tag, &c.Devices)
		})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("counting tags: %w", err)
	}
	return list, nil
}
