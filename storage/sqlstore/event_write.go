package sqlstore

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"encoding/xml"
	"fmt"

	"github.com/klauspost/compress/s2"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

const (
	// eventRows bounds the events of a batch, eventBytes the bytes of the
	// payloads that are stored with it, and of the parameters of the events'
	// URLs.
	eventRows  = 256
	eventBytes = 64 << 10
	// maxInlinePayload is the largest payload, in bytes, that is stored with
	// its batch: a read of one event reads the whole batch.
	maxInlinePayload = 16 << 10
	// maxOtherPayload is the largest payload, in bytes, that events keep of
	// reports that are no results of commands. Operators bound the number of
	// results, since they queue the commands; a device may send any number of
	// other reports.
	maxOtherPayload = 4 << 10
)

// facts are the fields of events that an operation knows.
type facts struct {
	// repeated: an equal report came before, with its events.
	repeated bool
	// result: the report is stored as the result of a command.
	result bool
	topic  string // APNs topic, as far as it was read or is in the message
	tally  int    // TokenUpdate
	// requestType of a command that was queued for the enrollment.
	requestType string
}

// eventSize estimates how many bytes an event takes.
func eventSize(e *storage.Event) int { return 512 + len(e.Raw) }

// outgoing returns the events of the operations that were carried out.
func outgoing(batch []*opRun) []storage.Event {
	var events []storage.Event
	for _, p := range batch {
		if p.err != nil || p.settled || p.facts.repeated {
			continue
		}
		r, isReport := p.op.(*storage.Report)
		for _, e := range p.src.Events {
			if isReport && !p.facts.result && e.Topic == storage.TopicConnect && len(e.Raw) > maxOtherPayload {
				e.Raw = reportSummary(&e, r)
			}
			e.Enroll, e.APNsTopic, e.RequestType, e.Tally = p.src.Enroll, p.facts.topic, p.facts.requestType, p.facts.tally
			events = append(events, e)
		}
	}
	return events
}

// reportSummary returns a property list with the keys that identify a report,
// in place of a payload that is not kept.
func reportSummary(e *storage.Event, r *storage.Report) []byte {
	var b bytes.Buffer
	b.WriteString(xml.Header)
	fmt.Fprintf(&b, "<!-- A report of %d bytes that is no result of a queued command. -->\n<plist version=\"1.0\"><dict>", len(e.Raw))
	for _, field := range [...]struct{ key, value string }{
		{"CommandUUID", r.CommandUUID}, {"EnrollmentID", e.EnrollmentID}, {"Status", string(r.Status)}, {"UDID", e.UDID},
	} {
		if field.value == "" {
			continue
		}
		b.WriteString("<key>" + field.key + "</key><string>")
		_ = xml.EscapeText(&b, []byte(clip(field.value))) // a buffer does not fail
		b.WriteString("</string>")
	}
	b.WriteString("</dict></plist>\n")
	return b.Bytes()
}

// insertEvents inserts events of devices into the outbox. An event without an
// APNs topic gets that of its enrollment.
func insertEvents(ctx context.Context, t *tx, events []storage.Event) error {
	if len(events) == 0 {
		return nil
	}
	var ids []string
	for i := range events {
		if e := &events[i]; e.APNsTopic == "" {
			ids = append(ids, e.Enroll.ID)
		}
	}
	if len(ids) > 0 {
		enrollments, err := eventEnrollments(ctx, t, ids)
		if err != nil {
			return fmt.Errorf("reading enrollments: %w", err)
		}
		for i := range events {
			e := &events[i]
			if enrollment := enrollments[e.Enroll.ID]; enrollment != nil {
				e.APNsTopic = cmp.Or(e.APNsTopic, enrollment.topic)
			}
		}
	}
	return putEvents(ctx, t, events)
}

// eventRow is an event in the JSON of its batch: storage.Event with the id of
// its enrollment and its time, which are stored in another form.
type eventRow struct {
	storage.Event
	Enrollment string         `json:"enrollment"`
	Type       mdm.EnrollType `json:"type"`
	Parent     string         `json:"parent,omitempty"`
	Created    int64          `json:"created_at"`
}

// encodeEvents returns the compressed JSON of a batch's events.
func encodeEvents(events []storage.Event) ([]byte, error) {
	rows := make([]eventRow, len(events))
	for i := range events {
		e := &events[i]
		rows[i] = eventRow{Event: *e, Enrollment: e.Enroll.ID, Type: e.Enroll.Type, Parent: e.Enroll.ParentID, Created: micros(e.CreatedAt)}
	}
	text, err := json.Marshal(rows)
	if err != nil {
		return nil, err
	}
	return compress(text), nil
}

// decodeEvents reads the events of a batch, without payloads and numbers.
func decodeEvents(value []byte) ([]storage.Event, error) {
	text, err := decompress(value, maxBatchSize)
	if err != nil {
		return nil, err
	}
	var rows []eventRow
	if err := json.Unmarshal(text, &rows); err != nil {
		return nil, err
	}
	events := make([]storage.Event, len(rows))
	for i := range rows {
		row := &rows[i]
		events[i] = row.Event
		events[i].Enroll = mdm.EnrollID{Type: row.Type, ID: row.Enrollment, ParentID: row.Parent}
		events[i].CreatedAt = fromMicros(row.Created)
	}
	return events, nil
}

// putEvents inserts events, in batches that are numbered later. Call it after
// locking the rows that the events are about.
func putEvents(ctx context.Context, t *tx, events []storage.Event) error {
	for len(events) > 0 {
		n, err := putBatch(ctx, t, events)
		if err != nil {
			return fmt.Errorf("storing events: %w", err)
		}
		events = events[n:]
	}
	return nil
}

// bounded returns an event as it is stored: with the size and the place of its
// payload, and its texts no longer than columns are.
func bounded(e storage.Event) storage.Event {
	for _, text := range []*string{&e.UDID, &e.EnrollmentID, &e.APNsTopic, &e.RequestType, &e.Status, &e.CommandUUID, &e.TraceParent} {
		*text = clip(*text)
	}
	e.RawSize = int64(len(e.Raw))
	if e.Raw == nil {
		e.RawSize = -1
	}
	e.RawApart = len(e.Raw) > maxInlinePayload || len(e.Raw) > 0 && storage.BearsTokens(e.Topic)
	return e
}

// putBatch inserts the first n events as a batch.
func putBatch(ctx context.Context, t *tx, events []storage.Event) (n int, err error) {
	var batch []storage.Event
	var payloads []byte
	var apart []any
	params := 0
	for n < len(events) && n < eventRows {
		e := bounded(events[n])
		for k, v := range e.Params {
			params += len(k) + len(v)
		}
		if n > 0 && (params > eventBytes || !e.RawApart && len(payloads)+len(e.Raw) > eventBytes) {
			break
		}
		if e.RawApart {
			value := t.sealedEvent(e.Topic, e.ID, e.Raw)
			e.RawSize = int64(len(value))
			apart = append(apart, e.ID, e.Topic, value)
		} else {
			payloads = append(payloads, e.Raw...)
		}
		batch = append(batch, e)
		n++
	}
	return n, storeBatch(ctx, t, batch, payloads, apart)
}

// storeBatch inserts a batch. Its stamp is larger than the stamps of all
// committed batches without numbers, whatever the clocks of replicas say, so
// that batches are numbered in an order in which they could have been committed
// one after the other.
func storeBatch(ctx context.Context, t *tx, batch []storage.Event, payloads []byte, apart []any) error {
	details, err := encodeEvents(batch)
	if err != nil {
		return err
	}
	var newest int64
	for i := range batch {
		newest = max(newest, micros(batch[i].CreatedAt))
	}
	if len(apart) > 0 {
		// The rows may exist: events without a change are stored again if the
		// outcome of the commit is unknown.
		if err := t.Upsert(ctx, "nano_event_payloads", []string{"event_id", "topic", "payload"}, []string{"event_id"}, nil, apart); err != nil {
			return err
		}
	}
	id := eventID(t.Now)
	payloads = compress(payloads)
	if err := t.ExecDeferred(ctx, "INSERT INTO nano_events (batch_id, details, payloads) VALUES (?, ?, ?)", id, details, payloads); err != nil {
		return err
	}
	return t.ExecDeferred(ctx, `INSERT INTO nano_event_batches (batch_id, stamp, size, newest, stored_bytes)
SELECT ?, `+t.Dialect.Greatest()+`(`+t.Dialect.IntPlaceholder()+`, COALESCE(MAX(stamp) + 1, 0)), `+t.Dialect.IntPlaceholder()+`, `+t.Dialect.IntPlaceholder()+`, `+t.Dialect.IntPlaceholder()+` FROM nano_event_batches WHERE seq = 0`,
		id, t.Now, len(batch), newest, storedBytes(details, payloads, apart))
}

// batchOverhead estimates the bytes of a batch beside its columns of bytes, with
// its rows in indexes.
const batchOverhead = 256

// storedBytes returns about how many bytes a batch takes in the database. apart
// has the values of nano_event_payloads.
func storedBytes(details, payloads []byte, apart []any) int64 {
	n := int64(batchOverhead + len(details) + len(payloads))
	for _, value := range apart {
		if payload, ok := value.([]byte); ok {
			n += int64(len(payload))
		}
	}
	return n
}

// maxBatchSize bounds the memory for the decompressed events of a batch, in
// bytes. The JSON of eventRows events with full columns, and the longest
// parameters that fit into a request, takes less than half of it.
const maxBatchSize = 16 << 20

// compress compresses the JSON or the payloads of a batch, as a block of S2.
// They repeat themselves a lot, and bytes cost a database, its log and its disk
// more than S2 costs. DEFLATE makes them a tenth to a quarter smaller in seven
// to fourteen times the time, which reports wait for.
func compress(value []byte) []byte {
	if len(value) == 0 {
		return nil
	}
	return s2.Encode(nil, value)
}

// decompress reverses compress. It refuses a value that claims to be larger
// than most.
func decompress(value []byte, most int) ([]byte, error) {
	if len(value) == 0 {
		return nil, nil
	}
	size, err := s2.DecodedLen(value)
	if err != nil {
		return nil, err
	}
	if size > most {
		return nil, fmt.Errorf("%d bytes, more than a batch of events has", size)
	}
	return s2.Decode(nil, value)
}
