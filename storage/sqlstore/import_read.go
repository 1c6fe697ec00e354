package sqlstore

import (
	"context"
	"database/sql"
	"fmt"
	"slices"
	"strings"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

var _ storage.Exporter = (*Store)(nil)

// exporting reads records of one page of devices.
type exporting struct {
	t        *tx
	devices  map[string]*storage.DeviceRecord
	channels map[string]*storage.ChannelRecord
	users    map[string]*storage.UserRecord
}

func (e *exporting) scan(ctx context.Context, action, text string, args []any, read func(row sqldb.Row) error) error {
	if err := e.t.Query(ctx, text, args...).Each(read); err != nil {
		return fmt.Errorf("%s: %w", action, err)
	}
	return nil
}

// ExportPushCerts implements storage.Exporter.
func (s *Store) ExportPushCerts(ctx context.Context) (certs []storage.PushCert, err error) {
	err = s.read(ctx, func(ctx context.Context, t *tx) error {
		certs, err = t.exportPushCerts(ctx)
		return err
	})
	return certs, err
}

// ExportCommands implements storage.Exporter.
func (s *Store) ExportCommands(ctx context.Context, after string, limit int) (list []storage.CommandRecord, err error) {
	err = s.read(ctx, func(ctx context.Context, t *tx) error {
		list, err = t.exportCommands(ctx, after, limit, func(_ string, err error) error { return err })
		return err
	})
	return list, err
}

// ExportDeviceIDs implements storage.Exporter.
func (s *Store) ExportDeviceIDs(ctx context.Context, after string, limit int) (ids []string, err error) {
	err = s.read(ctx, func(ctx context.Context, t *tx) error {
		ids, err = t.exportDeviceIDs(ctx, after, limit)
		return err
	})
	return ids, err
}

// ExportDevices implements storage.Exporter.
func (s *Store) ExportDevices(ctx context.Context, ids []string) (list []*storage.DeviceRecord, err error) {
	err = s.read(ctx, func(ctx context.Context, t *tx) error {
		list, err = t.exportDevices(ctx, ids)
		return err
	})
	return list, err
}

func (t *tx) exportPushCerts(ctx context.Context) ([]storage.PushCert, error) {
	certs, err := sqldb.Collect(t.Query(ctx, "SELECT topic, cert_pem, key_pem, not_after, version FROM nano_push_certs ORDER BY topic"),
		func(row sqldb.Row, c *storage.PushCert) error {
			var notAfter int64
			if err := row.Scan(&c.Topic, &c.CertPEM, &c.KeyPEM, &notAfter, &c.Version); err != nil {
				return err
			}
			c.NotAfter = fromMicros(notAfter)
			var err error
			c.KeyPEM, err = t.opened(pushKeyColumn, c.Topic, c.KeyPEM)
			return err
		})
	if err != nil {
		return nil, fmt.Errorf("reading push certificates: %w", err)
	}
	return certs, nil
}

// exportCommands asks unreadable about a command whose bytes cannot be opened.
// If it returns no error, the command stands in the list without them.
func (t *tx) exportCommands(ctx context.Context, after string, limit int, unreadable func(uuid string, err error) error) ([]storage.CommandRecord, error) {
	list, err := sqldb.Collect(t.Query(ctx, "SELECT command_uuid, request_type, command, created_at FROM nano_commands WHERE command_uuid > ? ORDER BY command_uuid LIMIT ?", after, limit),
		func(row sqldb.Row, c *storage.CommandRecord) error {
			var raw []byte
			var at int64
			if err := row.Scan(&c.UUID, &c.RequestType, &raw, &at); err != nil {
				return err
			}
			c.CreatedAt = fromMicros(at)
			var err error
			if c.Raw, err = t.opened(commandColumn, c.UUID, raw); err != nil {
				return unreadable(c.UUID, err)
			}
			return nil
		})
	if err != nil {
		return nil, fmt.Errorf("reading commands: %w", err)
	}
	return list, nil
}

func (t *tx) exportDeviceIDs(ctx context.Context, after string, limit int) ([]string, error) {
	ids, err := sqldb.Column[string](t.Query(ctx, "SELECT id FROM nano_devices WHERE id > ? ORDER BY id LIMIT ?", after, limit))
	if err != nil {
		return nil, fmt.Errorf("listing devices: %w", err)
	}
	return ids, nil
}

func (t *tx) exportDevices(ctx context.Context, ids []string) ([]*storage.DeviceRecord, error) {
	if len(ids) == 0 {
		return nil, nil
	}
	e := &exporting{t: t, devices: make(map[string]*storage.DeviceRecord), channels: make(map[string]*storage.ChannelRecord), users: make(map[string]*storage.UserRecord)}
	for _, read := range []func(context.Context, []string) error{e.readDevices, e.readTags, e.readUsers, e.readEnrollments, e.readPins} {
		if err := read(ctx, ids); err != nil {
			return nil, err
		}
	}
	for chunk := range slices.Chunk(e.channelIDs(), importRows) {
		if err := e.readQueues(ctx, chunk); err != nil {
			return nil, err
		}
	}
	return e.list(), nil
}

func (e *exporting) channelIDs() []string {
	ids := make([]string, 0, len(e.channels))
	for id := range e.channels {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

// list adds the users to their devices.
func (e *exporting) list() (list []*storage.DeviceRecord) {
	for _, id := range e.channelIDs() {
		if d := e.devices[id]; d != nil {
			list = append(list, d)
		}
		if u := e.users[id]; u != nil {
			device, _, _ := strings.Cut(id, ":")
			if d := e.devices[device]; d != nil {
				d.Users = append(d.Users, *u)
			}
		}
	}
	return list
}

func (e *exporting) readDevices(ctx context.Context, ids []string) error {
	is, args := e.t.Among(ids)
	return e.scan(ctx, "reading devices", `SELECT id, serial_number, model, model_name, device_name, os_version, build_version, product_name, imei, meid,
authenticate, authenticate_at, token_update, token_update_at, unlock_token, unlock_token_at, bootstrap_token, bootstrap_token_at FROM nano_devices WHERE id `+is, args,
		func(row sqldb.Row) error {
			d := new(storage.DeviceRecord)
			var authenticatedAt int64
			var updatedAt, unlockAt, bootstrapAt sql.Null[int64]
			if err := row.Scan(&d.Channel.ID, &d.SerialNumber, &d.Model, &d.ModelName, &d.DeviceName, &d.OSVersion, &d.BuildVersion, &d.ProductName, &d.IMEI, &d.MEID,
				&d.Authenticate.Raw, &authenticatedAt, &d.TokenUpdate.Raw, &updatedAt, &d.UnlockToken.Value, &unlockAt, &d.BootstrapToken.Value, &bootstrapAt); err != nil {
				return err
			}
			d.Authenticate.At, d.TokenUpdate.At = fromMicros(authenticatedAt), fromMicros(updatedAt.V)
			d.UnlockToken.At, d.BootstrapToken.At = fromMicros(unlockAt.V), fromMicros(bootstrapAt.V)
			id := d.Channel.ID
			e.devices[id], e.channels[id] = d, &d.Channel
			return e.open(id, map[string]*[]byte{authenticateColumn: &d.Authenticate.Raw, tokenUpdateColumn: &d.TokenUpdate.Raw,
				unlockTokenColumn: &d.UnlockToken.Value, bootstrapTokenColumn: &d.BootstrapToken.Value})
		})
}

func (e *exporting) readTags(ctx context.Context, ids []string) error {
	is, args := e.t.Among(ids)
	return e.scan(ctx, "reading tags", "SELECT g.id, g.tag, CASE WHEN "+movedSince+" THEN 1 ELSE 0 END FROM nano_device_tags g WHERE g.id "+is+" ORDER BY g.id, g.tag", args,
		func(row sqldb.Row) error {
			var id, tag string
			var former bool
			if err := row.Scan(&id, &tag, &former); err != nil {
				return err
			}
			switch d := e.devices[id]; {
			case d == nil:
			case former:
				d.FormerTags = append(d.FormerTags, tag)
			default:
				d.Tags = append(d.Tags, tag)
			}
			return nil
		})
}

// open unseals columns of a row.
func (e *exporting) open(key string, columns map[string]*[]byte) error {
	for column, value := range columns {
		plain, err := e.t.opened(column, key, *value)
		if err != nil {
			return err
		}
		*value = plain
	}
	return nil
}

func (e *exporting) readUsers(ctx context.Context, ids []string) error {
	is, args := e.t.Among(ids)
	return e.scan(ctx, "reading users", `SELECT id, user_id, user_short_name, user_long_name, token_update, token_update_at, user_authenticate, user_authenticate_at
FROM nano_users WHERE device_id `+is, args, func(row sqldb.Row) error {
		u := new(storage.UserRecord)
		var updatedAt, authenticatedAt sql.Null[int64]
		if err := row.Scan(&u.Channel.ID, &u.UserID, &u.UserShortName, &u.UserLongName, &u.TokenUpdate.Raw, &updatedAt, &u.UserAuthenticate.Raw, &authenticatedAt); err != nil {
			return err
		}
		u.TokenUpdate.At, u.UserAuthenticate.At = fromMicros(updatedAt.V), fromMicros(authenticatedAt.V)
		id := u.Channel.ID
		e.users[id], e.channels[id] = u, &u.Channel
		return e.open(id, map[string]*[]byte{userTokenUpdateColumn: &u.TokenUpdate.Raw, userAuthenticateColumn: &u.UserAuthenticate.Raw})
	})
}

func (e *exporting) readEnrollments(ctx context.Context, ids []string) error {
	is, args := e.t.Among(ids)
	return e.scan(ctx, "reading enrollments", `SELECT e.id, e.type, e.topic, e.push_magic, e.token, e.token_at, e.enabled, e.operator_disabled, e.token_update_tally,
e.awaiting_configuration, e.renewal_until, e.enrolled_at, a.last_seen_at, v.moved_at FROM nano_enrollments e
LEFT JOIN nano_enrollment_activity a ON a.id = e.id LEFT JOIN nano_topic_moves v ON v.id = e.id WHERE e.device_id `+is, args,
		func(row sqldb.Row) error {
			var c storage.ChannelRecord
			var typ string
			var tokenAt, renewal, enrolledAt, seenAt, movedAt sql.Null[int64]
			if err := row.Scan(&c.ID, &typ, &c.Topic, &c.PushMagic, &c.Token, &tokenAt, &c.Enabled, &c.OperatorDisabled, &c.Tally,
				&c.AwaitingConfiguration, &renewal, &enrolledAt, &seenAt, &movedAt); err != nil {
				return err
			}
			c.Type = mdm.EnrollType(typ)
			c.TokenAt, c.RenewalUntil, c.EnrolledAt, c.LastSeenAt = fromMicros(tokenAt.V), fromMicros(renewal.V), fromMicros(enrolledAt.V), fromMicros(seenAt.V)
			c.MovedAt = fromMicros(movedAt.V)
			if into := e.channels[c.ID]; into != nil {
				*into = c
			}
			return nil
		})
}

func (e *exporting) readPins(ctx context.Context, ids []string) error {
	is, args := e.t.Among(ids)
	return e.scan(ctx, "reading certificate associations", "SELECT id, sha256, certificate, not_after, created_at, retired_at FROM nano_cert_auth_associations WHERE id "+is+" ORDER BY created_at, sha256", args,
		func(row sqldb.Row) error {
			var id string
			var p storage.PinRecord
			var createdAt int64
			var notAfter, retired sql.Null[int64]
			if err := row.Scan(&id, &p.SHA256, &p.Certificate, &notAfter, &createdAt, &retired); err != nil {
				return err
			}
			p.NotAfter, p.CreatedAt, p.RetiredAt = fromMicros(notAfter.V), fromMicros(createdAt), fromMicros(retired.V)
			if d := e.devices[id]; d != nil {
				d.Pins = append(d.Pins, p)
			}
			return nil
		})
}

// readQueues reads all queue rows of channels, state by state, in the order of
// the index.
func (e *exporting) readQueues(ctx context.Context, ids []string) error {
	is, args := e.t.Among(ids)
	states, stateArgs := sqldb.InList(storage.States())
	type numbered struct {
		storage.ItemRecord
		id  string
		seq int64
	}
	var items []numbered
	err := e.scan(ctx, "reading queues", `SELECT q.id, q.command_uuid, q.seq, q.priority, q.state, q.supersede_key, q.created_at, q.not_before, q.expires_at, q.finished_at, q.notnow_count, q.notnow_at
FROM nano_enrollment_queue q`+e.t.Dialect.Index("nano_enrollment_queue_next")+" WHERE q.state IN "+states+" AND q.id "+is, append(stateArgs, args...),
		func(row sqldb.Row) error {
			var n numbered
			var key sql.NullString
			var createdAt int64
			var notBefore, expiresAt, finishedAt, notNowAt sql.Null[int64]
			if err := row.Scan(&n.id, &n.CommandUUID, &n.seq, &n.Priority, &n.State, &key, &createdAt, &notBefore, &expiresAt, &finishedAt, &n.NotNowCount, &notNowAt); err != nil {
				return err
			}
			n.SupersedeKey, n.CreatedAt, n.NotBefore = key.String, fromMicros(createdAt), fromMicros(notBefore.V)
			n.ExpiresAt, n.FinishedAt, n.NotNowAt = fromMicros(expiresAt.V), fromMicros(finishedAt.V), fromMicros(notNowAt.V)
			items = append(items, n)
			return nil
		})
	if err != nil {
		return err
	}
	results, err := e.readResults(ctx, ids)
	if err != nil {
		return err
	}
	slices.SortFunc(items, func(a, b numbered) int {
		if a.Priority != b.Priority {
			return b.Priority - a.Priority
		}
		return int(a.seq - b.seq)
	})
	for _, item := range items {
		c := e.channels[item.id]
		item.Result = results[keyPair{ID: item.id, Item: item.CommandUUID}]
		c.Queue = append(c.Queue, item.ItemRecord)
	}
	return nil
}

func (e *exporting) readResults(ctx context.Context, ids []string) (map[keyPair]*storage.CommandResult, error) {
	is, args := e.t.Among(ids)
	results := make(map[keyPair]*storage.CommandResult)
	err := e.scan(ctx, "reading results", "SELECT id, command_uuid, status, result, late, created_at FROM nano_command_results WHERE id "+is, args,
		func(row sqldb.Row) error {
			var key keyPair
			var r storage.CommandResult
			var at int64
			if err := row.Scan(&key.ID, &key.Item, &r.Status, &r.Raw, &r.Late, &at); err != nil {
				return err
			}
			r.CreatedAt = fromMicros(at)
			results[key] = &r
			return nil
		})
	return results, err
}
