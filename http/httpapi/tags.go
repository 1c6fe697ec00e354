package httpapi

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/nanomdm/nanomdm/storage"
)

// tagPlace is a tag as a cursor.
type tagPlace struct {
	Tag string `json:"t"`
}

func (q *query) tagPlace() string {
	var p tagPlace
	if !q.cursor(&p) {
		return ""
	}
	if storage.TagFault(p.Tag) != "" {
		q.failCursor()
	}
	return p.Tag
}

// tagInfo is a tag with the number of its devices as JSON.
type tagInfo struct {
	Tag     string `json:"tag"`
	Devices int64  `json:"devices"`
}

func (a *API) listTags(ctx context.Context, r *http.Request) (int, any, error) {
	q := a.queryOf(r)
	after, limit := q.tagPlace(), q.limit()
	if err := q.done(); err != nil {
		return 0, nil, err
	}
	list, err := a.store.TagCounts(ctx, callerOf(ctx).scope, after, limit+1)
	if err != nil {
		return 0, nil, err
	}
	page := struct {
		Tags []tagInfo `json:"tags"`
		Next string    `json:"next,omitempty"`
	}{Tags: []tagInfo{}}
	if len(list) > limit {
		list = list[:limit]
		page.Next = a.cursors.seal(r, tagPlace{list[limit-1].Tag})
	}
	for _, c := range list {
		page.Tags = append(page.Tags, tagInfo(c))
	}
	return http.StatusOK, page, nil
}

// tagChange makes the store's change of tags, with the record of each chunk.
func tagChange(ctx context.Context, ids, add, remove []string) storage.TagChange {
	var said []string
	for _, part := range []struct {
		verb string
		tags []string
	}{{"gave", add}, {"took", remove}} {
		if len(part.tags) > 0 {
			said = append(said, part.verb+" "+strings.Join(part.tags, ", "))
		}
	}
	return storage.TagChange{IDs: ids, Add: add, Remove: remove, Record: func(changed []string) *storage.AuditRecord {
		detail := strings.Join(said, "; ")
		if len(changed) > 1 {
			detail += fmt.Sprintf("; %d devices: %s", len(changed), someOf(changed))
		}
		return auditRecord(ctx, actTags, onlyOne(changed), detail)
	}}
}

// tagsOf checks tags and returns each once.
func tagsOf(name string, tags []string) ([]string, error) {
	for _, tag := range tags {
		if why := storage.TagFault(tag); why != "" {
			return nil, badRequest("%s: %.80q is no tag: %s", name, tag, why)
		}
	}
	tags = slices.Compact(slices.Sorted(slices.Values(tags)))
	if len(tags) > storage.MaxTags {
		return nil, badRequest("%s: a device cannot have more than %d tags", name, storage.MaxTags)
	}
	return tags, nil
}

func (a *API) addTag(ctx context.Context, r *http.Request) (int, any, error) {
	return a.changeTag(ctx, r, func(tags []string) storage.TagChange { return storage.TagChange{Add: tags} })
}

func (a *API) removeTag(ctx context.Context, r *http.Request) (int, any, error) {
	return a.changeTag(ctx, r, func(tags []string) storage.TagChange { return storage.TagChange{Remove: tags} })
}

// changeTag changes the tag in a path for the device in it.
func (a *API) changeTag(ctx context.Context, r *http.Request, changeOf func([]string) storage.TagChange) (int, any, error) {
	tags, err := tagsOf("tag", []string{r.PathValue("tag")})
	if err != nil {
		return 0, nil, err
	}
	id, err := a.enrollmentID(ctx, r.PathValue("id"))
	if err != nil {
		return 0, nil, a.auditRefusal(ctx, actTags, r.PathValue("id"), err)
	}
	c := changeOf(tags)
	done, err := a.store.ChangeTags(ctx, callerOf(ctx).scope, tagChange(ctx, []string{id}, c.Add, c.Remove))
	switch {
	case err != nil:
	case len(done.Full) > 0:
		err = &problem{http.StatusConflict, fmt.Sprintf("%s has %d tags already", id, storage.MaxTags)}
	case len(done.Found) == 0:
		err = badRequest("%s is a user channel: its tags are those of its device", id)
	}
	if err != nil {
		return 0, nil, a.auditRefusal(ctx, actTags, id, err)
	}
	list, err := a.store.Enrollments(ctx, callerOf(ctx).scope, []string{id})
	if err != nil {
		return 0, nil, err
	}
	answer := struct {
		ID   string   `json:"id"`
		Tags []string `json:"tags"`
	}{id, []string{}}
	if len(list) == 1 {
		answer.Tags = append(answer.Tags, list[0].Tags...)
	}
	return http.StatusOK, answer, nil
}

// changeTags changes the tags of many devices.
func (a *API) changeTags(ctx context.Context, r *http.Request) (int, any, error) {
	var body struct {
		targetSet
		Add    []string `json:"add,omitempty"`
		Remove []string `json:"remove,omitempty"`
	}
	if err := readJSON(r, &body); err != nil {
		return 0, nil, err
	}
	add, err := tagsOf("add", body.Add)
	if err != nil {
		return 0, nil, err
	}
	remove, err := tagsOf("remove", body.Remove)
	switch {
	case err != nil:
		return 0, nil, err
	case len(add)+len(remove) == 0:
		return 0, nil, badRequest("add, remove: give a tag")
	case slices.ContainsFunc(add, func(tag string) bool { return slices.Contains(remove, tag) }):
		return 0, nil, badRequest("add, remove: a tag is in both")
	}
	if err := body.check(); err != nil {
		return 0, nil, err
	}
	ids, refusal, err := a.resolve(ctx, &body.targetSet)
	if err != nil {
		return 0, nil, err
	}
	if refusal != nil {
		return http.StatusConflict, refusal, nil
	}
	done, err := a.store.ChangeTags(ctx, callerOf(ctx).scope, tagChange(ctx, ids, add, remove))
	if err != nil {
		return 0, nil, a.auditRefusal(ctx, actTags, onlyOne(ids), err)
	}
	answer := struct {
		Changed int `json:"changed"`
		// Full are devices that have as many tags as they can.
		Full []string `json:"full,omitempty"`
		// Missing are ids that name no device.
		Missing []string `json:"missing,omitempty"`
	}{Changed: len(done.Changed), Full: done.Full}
	if body.Selector == nil { // a selector chooses user channels, too, which have no tags of their own
		answer.Missing = without(ids, done.Found)
	}
	return http.StatusOK, answer, nil
}
