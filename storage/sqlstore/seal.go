package sqlstore

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

// The columns with sealed values. A value is bound to its column and to the key
// of its row: someone who can write to the database cannot copy another
// device's token to a device of his own and have the server open it.
const (
	authenticateColumn     = "nano_devices.authenticate"
	tokenUpdateColumn      = "nano_devices.token_update"
	unlockTokenColumn      = "nano_devices.unlock_token"
	bootstrapTokenColumn   = "nano_devices.bootstrap_token"
	userTokenUpdateColumn  = "nano_users.token_update"
	userAuthenticateColumn = "nano_users.user_authenticate"
	commandColumn          = "nano_commands.command"
	pushKeyColumn          = "nano_push_certs.key_pem"
	eventColumn            = "nano_event_payloads.payload"
	sinkColumn             = "nano_event_sinks.config"
)

// A column holds a plain value, or sealMark, the id of a key, and the Sealer's
// output. A plain value that begins with the mark, which a device could send,
// is stored after the mark and noKey.
const (
	sealMark  = "\xffNS1"
	keyIDLen  = 16
	noKey     = "----------------"
	prefixLen = len(sealMark) + keyIDLen
)

// sealing seals and opens the values of these columns. Without keys it leaves
// them plain.
type sealing struct {
	keys     storage.Sealer // may be nil
	prefix   []byte         // of what the first key sealed
	commands bool
}

func newSealing(cfg Config) *sealing {
	s := &sealing{keys: cfg.Sealer, commands: cfg.SealCommands}
	if s.keys != nil {
		s.prefix = []byte(sealMark + s.keys.KeyIDs()[0])
	}
	return s
}

func sealPlace(column, key string) string { return column + "\x00" + key }

// close seals a value. An empty one stays empty, since it means that there is
// none.
func (s *sealing) close(column, key string, plain []byte) []byte {
	switch {
	case len(plain) == 0:
		return plain
	case s.keys != nil:
		return slices.Concat(s.prefix, s.keys.Seal(sealPlace(column, key), plain))
	}
	return unsealed(plain)
}

// unsealed returns a plain value as it is stored.
func unsealed(plain []byte) []byte {
	if bytes.HasPrefix(plain, []byte(sealMark)) {
		return slices.Concat([]byte(sealMark+noKey), plain)
	}
	return plain
}

// ErrUnreadable: a stored value is damaged, or sealed with a key that is not
// here. The rest of the database is as good as before.
var ErrUnreadable = errors.New("a stored value cannot be read")

func unreadable(err error) error { return &translated{err, ErrUnreadable} }

// open reverses close, and unsealed. Its errors are ErrUnreadable.
func (s *sealing) open(column, key string, value []byte) ([]byte, error) {
	if !bytes.HasPrefix(value, []byte(sealMark)) {
		return value, nil
	}
	if len(value) < prefixLen {
		return nil, unreadable(fmt.Errorf("a value of %s is cut", column))
	}
	id, rest := string(value[len(sealMark):prefixLen]), value[prefixLen:]
	switch {
	case id == noKey:
		return rest, nil
	case s.keys == nil:
		return nil, unreadable(fmt.Errorf("a value of %s is sealed with key %.16q: %w", column, id, storage.ErrNotSealing))
	}
	plain, err := s.keys.Open(id, sealPlace(column, key), rest)
	if err != nil {
		return nil, unreadable(fmt.Errorf("a value of %s that key %.16q sealed: %w", column, id, err))
	}
	return plain, nil
}

// sealed returns a value as it is stored; key is the key of its row.
func (t *tx) sealed(column, key string, plain []byte) []byte { return t.seal.close(column, key, plain) }

// sealedCommand is sealed for a command, if Config.SealCommands is set.
func (t *tx) sealedCommand(uuid string, raw []byte) []byte {
	if t.seal.commands {
		return t.sealed(commandColumn, uuid, raw)
	}
	return unsealed(raw)
}

// sealedEvent is sealed for the payload of an event, if it holds tokens.
func (t *tx) sealedEvent(topic, id string, raw []byte) []byte {
	if storage.BearsTokens(topic) {
		return t.sealed(eventColumn, id, raw)
	}
	return unsealed(raw)
}

// opened returns the plain value of a stored one.
func (t *tx) opened(column, key string, value []byte) ([]byte, error) {
	return t.seal.open(column, key, value)
}

// sealCheck is the value with which keys are tested.
const (
	sealCheck       = "nanomdm"
	sealCheckColumn = "nano_seal.value"
)

// checkSeal tests the keys against the record of keys that were in use, and
// records the one that seals from now on.
func (s *Store) checkSeal(ctx context.Context) error {
	return s.write(ctx, func(ctx context.Context, t *tx) error {
		checks, err := t.tryKeys(ctx, s.cfg.Sealer)
		if err != nil {
			return err
		}
		if s.cfg.Sealer == nil {
			return nil
		}
		id := s.cfg.Sealer.KeyIDs()[0]
		if _, known := checks[id]; known {
			return nil
		}
		_, err = t.Exec(ctx, t.Dialect.Upsert("nano_seal", []string{"id", "value", "created_at"}, []string{"id"}, nil),
			id, t.sealed(sealCheckColumn, id, []byte(sealCheck)), t.Now)
		if err != nil {
			return fmt.Errorf("noting the seal key in use: %w", err)
		}
		return nil
	})
}

// tryKeys tries the keys on the rows of nano_seal and returns those rows.
func (t *tx) tryKeys(ctx context.Context, sealer storage.Sealer) (map[string][]byte, error) {
	checks, err := sealChecks(ctx, t)
	if err != nil {
		return nil, fmt.Errorf("reading the seal keys in use: %w", err)
	}
	for id, value := range checks {
		if sealer == nil {
			return nil, fmt.Errorf("the database holds values that are sealed with key %s: %w", id, storage.ErrNotSealing)
		}
		if !slices.Contains(sealer.KeyIDs(), id) {
			return nil, fmt.Errorf("the database holds values that are sealed with key %s, which is not among the seal keys", id)
		}
		plain, err := t.opened(sealCheckColumn, id, value)
		if err != nil || string(plain) != sealCheck {
			return nil, errors.Join(fmt.Errorf("seal key %s does not open what was sealed with it", id), err)
		}
	}
	return checks, nil
}

func sealChecks(ctx context.Context, t *tx) (map[string][]byte, error) {
	checks := make(map[string][]byte)
	err := t.Query(ctx, "SELECT id, value FROM nano_seal ORDER BY id").Each(func(row sqldb.Row) error {
		var id string
		var value []byte
		if err := row.Scan(&id, &value); err != nil {
			return err
		}
		checks[id] = value
		return nil
	})
	return checks, err
}

var _ storage.Resealer = (*Store)(nil)

// sealedTable is a table that Reseal reads.
type sealedTable struct {
	name, key string
	columns   []string // by their constants
	// plain: values that are not sealed may stay so.
	plain bool
	// where chooses the rows with values to seal; empty is all.
	where string
	args  []any
}

func sealedTables(commands bool) []sealedTable {
	events := sealedTable{name: "nano_event_payloads", key: "event_id", columns: []string{eventColumn}}
	for _, topic := range storage.EventTopics() {
		if storage.BearsTokens(topic) {
			events.args = append(events.args, topic)
		}
	}
	events.where = "topic IN " + sqldb.In(len(events.args))
	return []sealedTable{
		{name: "nano_devices", key: "id", columns: []string{authenticateColumn, tokenUpdateColumn, unlockTokenColumn, bootstrapTokenColumn}},
		{name: "nano_users", key: "id", columns: []string{userTokenUpdateColumn, userAuthenticateColumn}},
		{name: "nano_push_certs", key: "topic", columns: []string{pushKeyColumn}},
		{name: "nano_event_sinks", key: "name", columns: []string{sinkColumn}},
		events,
		{name: "nano_commands", key: "command_uuid", columns: []string{commandColumn}, plain: !commands},
	}
}

// resealCursor is the progress of a run.
type resealCursor struct {
	KeyID      string // that seals; with another one a run starts again
	Table      string
	After      string // key of the last row
	Unreadable bool   // there were values that no key opens
}

// Reseal implements storage.Resealer.
func (s *Store) Reseal(ctx context.Context, after string, limit int) (storage.Resealed, error) {
	var done storage.Resealed
	if s.cfg.Sealer == nil {
		return done, storage.ErrNotSealing
	}
	tables := sealedTables(s.cfg.SealCommands)
	c := resealCursor{KeyID: s.cfg.Sealer.KeyIDs()[0], Table: tables[0].name}
	if after != "" {
		var was resealCursor
		text, err := base64.RawURLEncoding.DecodeString(after)
		if err == nil {
			err = json.Unmarshal(text, &was)
		}
		if err != nil || !slices.ContainsFunc(tables, func(t sealedTable) bool { return t.name == was.Table }) {
			return done, fmt.Errorf("%w: that is not where a run of resealing stood", storage.ErrNotFound)
		}
		if was.KeyID == c.KeyID {
			c = was
		}
	}
	at := slices.IndexFunc(tables, func(t sealedTable) bool { return t.name == c.Table })
	var next resealCursor
	err := s.write(ctx, func(ctx context.Context, t *tx) error {
		next = c
		var err error
		if done, next.After, err = reseal(ctx, t, tables[at], c.After, max(1, limit)); err != nil {
			return err
		}
		next.Unreadable = c.Unreadable || done.Unreadable > 0
		if next.After != "" {
			return nil
		}
		if at+1 < len(tables) {
			next.Table = tables[at+1].name
			return nil
		}
		next.Table = ""
		if next.Unreadable {
			return nil
		}
		_, err = t.Exec(ctx, "DELETE FROM nano_seal WHERE id <> ?", c.KeyID)
		return err
	})
	if err != nil {
		return storage.Resealed{}, fmt.Errorf("resealing %s: %w", tables[at].name, err)
	}
	if next.Table != "" {
		text, err := json.Marshal(next)
		if err != nil {
			return storage.Resealed{}, fmt.Errorf("resealing: %w", err)
		}
		done.Next = base64.RawURLEncoding.EncodeToString(text)
	}
	return done, nil
}

// reseal reads the next rows of a table and rewrites values that the current
// key has not sealed. The query leaves out the other values. It does not
// rewrite a value that changes meanwhile, since that is sealed with the current
// key.
func reseal(ctx context.Context, t *tx, table sealedTable, after string, limit int) (done storage.Resealed, next string, err error) {
	done.Table = table.name
	rows, err := staleRows(ctx, t, table, after, limit)
	if err != nil {
		return done, "", err
	}
	done.Looked = len(rows)
	for _, row := range rows {
		for i, column := range table.columns {
			value := row.values[i]
			if len(value) == 0 {
				continue
			}
			plain, err := t.opened(column, row.key, value)
			if err != nil {
				done.Unreadable++
				continue
			}
			if table.plain && bytes.HasPrefix(value, []byte(sealMark+noKey)) {
				continue
			}
			name := strings.TrimPrefix(column, table.name+".")
			n, err := t.Exec(ctx, "UPDATE "+table.name+" SET "+name+" = ? WHERE "+table.key+" = ? AND "+name+" = ?",
				t.sealed(column, row.key, plain), row.key, value)
			if err != nil {
				return done, "", err
			}
			done.Rewritten += int(n)
		}
	}
	if len(rows) == limit {
		next = rows[len(rows)-1].key
	}
	return done, next, nil
}

type staleRow struct {
	key    string
	values [][]byte // NULL for values that need no change
}

func staleRows(ctx context.Context, t *tx, table sealedTable, after string, limit int) ([]staleRow, error) {
	var q strings.Builder
	var args []any
	q.WriteString("SELECT " + table.key)
	for _, column := range table.columns {
		fmt.Fprintf(&q, ", CASE WHEN SUBSTR(%s, 1, %d) = ?", column, prefixLen)
		args = append(args, t.seal.prefix)
		if table.plain {
			fmt.Fprintf(&q, " OR SUBSTR(%s, 1, %d) <> ?", column, len(sealMark))
			args = append(args, []byte(sealMark))
		}
		if table.where != "" {
			q.WriteString(" OR NOT (" + table.where + ")")
			args = append(args, table.args...)
		}
		q.WriteString(" THEN NULL ELSE " + column + " END")
	}
	q.WriteString(" FROM " + table.name + " WHERE " + table.key + " > ? ORDER BY " + table.key + " LIMIT ?")
	return sqldb.Collect(t.Query(ctx, q.String(), append(args, after, limit)...), func(row sqldb.Row, stale *staleRow) error {
		stale.values = make([][]byte, len(table.columns))
		into := []any{&stale.key}
		for i := range stale.values {
			into = append(into, &stale.values[i])
		}
		return row.Scan(into...)
	})
}
