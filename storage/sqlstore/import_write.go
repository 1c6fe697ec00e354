package sqlstore

import (
	"bytes"
	"cmp"
	"context"
	"database/sql"
	"fmt"
	"hash/fnv"
	"slices"
	"strconv"
	"time"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

var _ storage.Importer = (*Store)(nil)

const (
	// importRows and importBytes bound a statement of an import.
	importRows  = 250
	importBytes = 1 << 20
	// importSpread is the time over which the pushes of imported enrollments
	// are spread.
	importSpread = 10 * time.Minute
)

// upsertChunks upserts rows in statements of a bounded size.
func (t *tx) upsertChunks(ctx context.Context, table string, cols, key, set []string, args []any) error {
	begin, size := 0, 0
	for i := 0; i < len(args); i += len(cols) {
		row := 0
		for _, arg := range args[i : i+len(cols)] {
			switch v := arg.(type) {
			case []byte:
				row += len(v)
			case string:
				row += len(v)
			}
		}
		if i > begin && ((i-begin)/len(cols) >= importRows || size+row > importBytes) {
			if err := t.Upsert(ctx, table, cols, key, set, args[begin:i]); err != nil {
				return err
			}
			begin, size = i, 0
		}
		size += row
	}
	if begin == len(args) {
		return nil
	}
	return t.Upsert(ctx, table, cols, key, set, args[begin:])
}

// ImportPushCerts implements storage.Importer.
func (s *Store) ImportPushCerts(ctx context.Context, certs []storage.PushCert) (done storage.Imported, err error) {
	for i := range certs {
		c := certs[i]
		was, err := s.PushCert(ctx, c.Topic)
		if err == nil && (was.NotAfter.After(c.NotAfter) || bytes.Equal(was.CertPEM, c.CertPEM)) {
			done.Kept++
			continue
		}
		if err := s.StorePushCert(ctx, &c); err != nil {
			return done, err
		}
		done.Written++
	}
	return done, nil
}

// ImportCommands implements storage.Importer.
func (s *Store) ImportCommands(ctx context.Context, commands []storage.CommandRecord) (done storage.Imported, err error) {
	sorted := slices.Clone(commands)
	slices.SortFunc(sorted, func(a, b storage.CommandRecord) int { return cmp.Compare(a.UUID, b.UUID) })
	sorted = slices.CompactFunc(sorted, func(a, b storage.CommandRecord) bool { return a.UUID == b.UUID && bytes.Equal(a.Raw, b.Raw) })
	if len(sorted) == 0 {
		return done, nil
	}
	err = s.write(ctx, func(ctx context.Context, t *tx) error {
		done = storage.Imported{}
		uuids := make([]string, len(sorted))
		for i, c := range sorted {
			uuids[i] = c.UUID
		}
		there, err := t.commandsByUUID(ctx, uuids)
		if err != nil {
			return err
		}
		var args []any
		for _, c := range sorted {
			was, ok := there[c.UUID]
			switch {
			case ok && !bytes.Equal(was, c.Raw):
				done.Refused = append(done.Refused, storage.Refusal{Kind: "command", Key: c.UUID, Reason: "another command has this CommandUUID"})
			case ok:
				done.Kept++
			default:
				there[c.UUID] = c.Raw
				args = append(args, c.UUID, clip(c.RequestType), t.sealedCommand(c.UUID, notNil(c.Raw)), micros(c.CreatedAt))
				done.Written++
			}
		}
		return t.upsertChunks(ctx, "nano_commands", []string{"command_uuid", "request_type", "command", "created_at"}, []string{"command_uuid"}, nil, args)
	})
	if err != nil {
		return storage.Imported{}, fmt.Errorf("importing commands: %w", err)
	}
	return done, nil
}

// commandsByUUID reads the bytes of commands.
func (t *tx) commandsByUUID(ctx context.Context, uuids []string) (map[string][]byte, error) {
	is, args := t.Among(uuids)
	there := make(map[string][]byte)
	err := t.QueryBatch(ctx, sqldb.BatchQuery{Action: "reading commands", Text: "SELECT command_uuid, command FROM nano_commands WHERE command_uuid " + is, Args: args,
		Read: func(row sqldb.Row) error {
			var uuid string
			var raw []byte
			if err := row.Scan(&uuid, &raw); err != nil {
				return err
			}
			plain, err := t.opened(commandColumn, uuid, raw)
			there[uuid] = bytes.Clone(plain)
			return err
		}})
	return there, err
}

// ImportDevices implements storage.Importer.
func (s *Store) ImportDevices(ctx context.Context, devices []*storage.DeviceRecord) (done storage.Imported, err error) {
	if len(devices) == 0 {
		return done, nil
	}
	sorted := slices.SortedFunc(slices.Values(devices), func(a, b *storage.DeviceRecord) int { return cmp.Compare(a.Channel.ID, b.Channel.ID) })
	err = s.write(ctx, func(ctx context.Context, t *tx) error {
		imp := &importing{t: t}
		for _, d := range sorted {
			if n := len(imp.devices); n > 0 && imp.devices[n-1].Channel.ID == d.Channel.ID {
				imp.refuse("device", d.Channel.ID, "another device has this id")
				continue
			}
			own := *d
			imp.devices = append(imp.devices, &own)
		}
		for _, step := range []func(context.Context) error{imp.readDevices, imp.readChannels, imp.readCommands,
			imp.writeDevices, imp.writeMoves, imp.writeTags, imp.writeUsers, imp.writeEnrollments, imp.writeActivity, imp.writePins, imp.writeQueues} {
			if err := step(ctx); err != nil {
				return err
			}
		}
		done = imp.done
		return nil
	})
	if err != nil {
		return storage.Imported{}, fmt.Errorf("importing devices: %w", err)
	}
	return done, nil
}

// importing is one transaction of ImportDevices.
type importing struct {
	t       *tx
	devices []*storage.DeviceRecord
	done    storage.Imported

	known    map[string]knownDevice
	users    map[string]int64 // token_update_at by id
	stamps   map[string]int64 // when enrollments were imported first, by id
	topics   map[string]string
	push     map[string]knownPush
	commands map[string]bool
}

type knownDevice struct{ spokeAt, bootstrapAt int64 }

type knownPush struct {
	last, owed, paid int64
	pushAt           sql.Null[int64]
}

// importedChannel is a channel and the id of its device.
type importedChannel struct {
	*storage.ChannelRecord
	device string
}

func (i *importing) refuse(kind, key, reason string) {
	i.done.Refused = append(i.done.Refused, storage.Refusal{Kind: kind, Key: key, Reason: reason})
}

// whole refuses a text of an enrollment that is longer than its column: a push
// with half a magic wakes no device.
func (i *importing) whole(id, name, text string) string {
	if len(text) > mdm.MaxIDLen || legible(text) != text {
		i.refuse("enrollment", id, fmt.Sprintf("its %s is longer than %d bytes or no text", name, mdm.MaxIDLen))
		return ""
	}
	return text
}

// channels returns the imported channels, sorted by id.
func (i *importing) channels() (all []importedChannel) {
	for _, d := range i.devices {
		all = append(all, importedChannel{&d.Channel, d.Channel.ID})
		for n := range d.Users {
			all = append(all, importedChannel{&d.Users[n].Channel, d.Channel.ID})
		}
	}
	slices.SortFunc(all, func(a, b importedChannel) int { return cmp.Compare(a.ID, b.ID) })
	return all
}

func (i *importing) ids() []string {
	ids := make([]string, 0, len(i.devices))
	for _, d := range i.devices {
		ids = append(ids, d.Channel.ID)
	}
	return ids
}

// scan reads the rows of a query.
func (i *importing) scan(ctx context.Context, action, text string, args []any, read func(row sqldb.Row) error) error {
	return i.t.QueryBatch(ctx, sqldb.BatchQuery{Action: action, Text: text, Args: args, Read: read})
}

// readDevices locks the devices and leaves out those that have sent a later
// check-in to this server than the record has.
func (i *importing) readDevices(ctx context.Context) error {
	i.known = make(map[string]knownDevice)
	text, args := i.t.LockText("id, authenticate_at, token_update_at, bootstrap_token_at", "nano_devices", i.ids())
	err := i.scan(ctx, "locking devices", text, args, func(row sqldb.Row) error {
		var id string
		var authenticated int64
		var updated, bootstrap sql.Null[int64]
		if err := row.Scan(&id, &authenticated, &updated, &bootstrap); err != nil {
			return err
		}
		i.known[id] = knownDevice{max(authenticated, updated.V), bootstrap.V}
		return nil
	})
	if err != nil {
		return err
	}
	i.devices = slices.DeleteFunc(i.devices, func(d *storage.DeviceRecord) bool {
		newer := i.known[d.Channel.ID].spokeAt > max(micros(d.Authenticate.At), micros(d.TokenUpdate.At))
		if newer {
			i.done.Kept++
		}
		return newer
	})
	i.done.Written = len(i.devices)
	return nil
}

// readChannels locks the existing channels. It leaves out user channels that
// have sent a later check-in to this server.
func (i *importing) readChannels(ctx context.Context) error {
	i.users, i.stamps, i.push = make(map[string]int64), make(map[string]int64), make(map[string]knownPush)
	i.topics = make(map[string]string)
	var ids []string
	for _, c := range i.channels() {
		ids = append(ids, c.ID)
	}
	if len(ids) == 0 {
		return nil
	}
	text, args := i.t.LockText("id, created_at, topic", "nano_enrollments", ids)
	err := i.scan(ctx, "locking enrollments", text, args, func(row sqldb.Row) error {
		var id, topic string
		var at int64
		err := row.Scan(&id, &at, &topic)
		i.stamps[id], i.topics[id] = at, topic
		return err
	})
	if err != nil || len(i.stamps) == 0 {
		return err
	}
	text, args = i.t.LockText("id, token_update_at", "nano_users", ids)
	err = i.scan(ctx, "locking users", text, args, func(row sqldb.Row) error {
		var id string
		var at sql.Null[int64]
		err := row.Scan(&id, &at)
		i.users[id] = at.V
		return err
	})
	if err != nil {
		return err
	}
	text, args = i.t.LockText("id, last_seq, owed_seq, paid_seq, push_at", "nano_enrollment_push", ids)
	err = i.scan(ctx, "locking push rows", text, args, func(row sqldb.Row) error {
		var id string
		var p knownPush
		err := row.Scan(&id, &p.last, &p.owed, &p.paid, &p.pushAt)
		i.push[id] = p
		return err
	})
	if err != nil {
		return err
	}
	for _, d := range i.devices {
		d.Users = slices.DeleteFunc(slices.Clone(d.Users), func(u storage.UserRecord) bool {
			newer := i.users[u.Channel.ID] > micros(u.TokenUpdate.At)
			if newer {
				i.done.Kept++
			}
			return newer
		})
	}
	return nil
}

// readCommands finds the commands that waiting rows need. A row without one is
// refused: it could never be sent, and the rows after it would wait.
func (i *importing) readCommands(ctx context.Context) error {
	i.commands = make(map[string]bool)
	var uuids []string
	for _, c := range i.channels() {
		for _, item := range c.Queue {
			uuids = append(uuids, item.CommandUUID)
		}
	}
	slices.Sort(uuids)
	for chunk := range slices.Chunk(slices.Compact(uuids), importRows) {
		is, args := i.t.Among(chunk)
		err := i.scan(ctx, "looking for commands", "SELECT command_uuid FROM nano_commands WHERE command_uuid "+is, args, func(row sqldb.Row) error {
			var uuid string
			err := row.Scan(&uuid)
			i.commands[uuid] = true
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

var importedDevice = []string{"serial_number", "model", "model_name", "device_name", "os_version", "build_version", "product_name", "imei", "meid",
	"authenticate", "authenticate_at", "token_update", "token_update_at", "unlock_token", "unlock_token_at", "updated_at"}

func (i *importing) writeDevices(ctx context.Context) error {
	cols := slices.Concat([]string{"id", "created_at"}, importedDevice, []string{"bootstrap_token", "bootstrap_token_at"})
	var args, kept []any
	for _, d := range i.devices {
		id := d.Channel.ID
		row := []any{id, i.t.Now, clip(d.SerialNumber), clip(d.Model), clip(d.ModelName), clip(d.DeviceName), clip(d.OSVersion), clip(d.BuildVersion),
			clip(d.ProductName), clip(d.IMEI), clip(d.MEID), i.t.sealed(authenticateColumn, id, notNil(d.Authenticate.Raw)), micros(d.Authenticate.At),
			i.value(tokenUpdateColumn, id, d.TokenUpdate.Raw), null(micros(d.TokenUpdate.At)), i.value(unlockTokenColumn, id, d.UnlockToken.Value),
			null(micros(d.UnlockToken.At)), i.t.Now, i.value(bootstrapTokenColumn, id, d.BootstrapToken.Value), i.tokenAt(d.BootstrapToken)}
		if i.known[id].bootstrapAt > micros(d.BootstrapToken.At) { // the device escrowed one here
			kept = append(kept, row...)
			continue
		}
		args = append(args, row...)
	}
	err := i.t.upsertChunks(ctx, "nano_devices", cols, []string{"id"}, append(slices.Clone(importedDevice), "bootstrap_token", "bootstrap_token_at"), args)
	if err == nil {
		err = i.t.upsertChunks(ctx, "nano_devices", cols, []string{"id"}, importedDevice, kept)
	}
	if err != nil {
		return fmt.Errorf("storing devices: %w", err)
	}
	return nil
}

// value returns bytes as they are stored, where empty is NULL.
func (i *importing) value(column, key string, plain []byte) any {
	if len(plain) == 0 {
		return nil
	}
	return i.t.sealed(column, key, plain)
}

func (i *importing) tokenAt(token storage.Token) any {
	if len(token.Value) == 0 {
		return nil
	}
	return null(micros(token.At))
}

// movedAt returns when a channel came to its topic, 0 if it has had no other.
func (i *importing) movedAt(c *storage.ChannelRecord, authenticatedAt time.Time) int64 {
	was := i.topics[c.ID]
	switch {
	case !c.MovedAt.IsZero():
		return micros(c.MovedAt)
	case was == "" || was == c.Topic:
		return 0
	case authenticatedAt.IsZero():
		return i.t.Now
	}
	return micros(authenticatedAt)
}

// writeMoves notes moves between topics: bound callers see no rows from before.
func (i *importing) writeMoves(ctx context.Context) error {
	var args []any
	var moved []string
	for _, d := range i.devices {
		channels := []*storage.ChannelRecord{&d.Channel}
		for n := range d.Users {
			channels = append(channels, &d.Users[n].Channel)
		}
		for _, c := range channels {
			if at := i.movedAt(c, d.Authenticate.At); at > 0 {
				args = append(args, c.ID, at)
			}
			if was := i.topics[c.ID]; was != "" && was != c.Topic {
				moved = append(moved, c.ID)
			}
		}
	}
	set := []string{"moved_at = " + i.t.Dialect.Greatest() + "(nano_topic_moves.moved_at, new.moved_at)"}
	if err := i.t.upsertChunks(ctx, "nano_topic_moves", []string{"id", "moved_at"}, []string{"id"}, set, args); err != nil {
		return fmt.Errorf("noting moves between topics: %w", err)
	}
	return forgetRefusals(ctx, i.t, moved)
}

// writeTags adds tags, up to the greatest number of a device. Those of a former
// tenant stay older than the move.
func (i *importing) writeTags(ctx context.Context) error {
	var args []any
	if !slices.ContainsFunc(i.devices, func(d *storage.DeviceRecord) bool { return len(d.Tags)+len(d.FormerTags) > 0 }) {
		return nil
	}
	there, err := readTags(ctx, i.t, storage.Scope{}, i.ids())
	if err != nil {
		return err
	}
	for _, d := range i.devices {
		id := d.Channel.ID
		former := slices.Sorted(slices.Values(d.FormerTags))
		add := without(slices.Compact(slices.Sorted(slices.Values(slices.Concat(d.Tags, former)))), there[id])
		for n, tag := range add {
			at := i.t.Now
			if slices.Contains(former, tag) {
				at = micros(d.Channel.MovedAt)
			}
			if why := storage.TagFault(tag); why != "" {
				i.refuse("tag", id, fmt.Sprintf("%.80q: %s", tag, why))
			} else if len(there[id])+n >= storage.MaxTags {
				i.refuse("tag", id, fmt.Sprintf("%s: a device cannot have more than %d", tag, storage.MaxTags))
			} else {
				args = append(args, id, tag, at)
			}
		}
	}
	return i.t.upsertChunks(ctx, deviceTags.Name, []string{"id", "tag", "created_at"}, []string{"id", "tag"}, nil, args)
}

func (i *importing) writeUsers(ctx context.Context) error {
	set := []string{"device_id", "user_id", "user_short_name", "user_long_name", "token_update", "token_update_at", "user_authenticate", "user_authenticate_at", "updated_at"}
	var args []any
	for _, d := range i.devices {
		for _, u := range d.Users {
			id := u.Channel.ID
			args = append(args, id, i.t.Now, d.Channel.ID, clip(u.UserID), clip(u.UserShortName), clip(u.UserLongName),
				i.value(userTokenUpdateColumn, id, u.TokenUpdate.Raw), null(micros(u.TokenUpdate.At)),
				i.value(userAuthenticateColumn, id, u.UserAuthenticate.Raw), null(micros(u.UserAuthenticate.At)), i.t.Now)
		}
	}
	if err := i.t.upsertChunks(ctx, "nano_users", slices.Concat([]string{"id", "created_at"}, set), []string{"id"}, set, args); err != nil {
		return fmt.Errorf("storing users: %w", err)
	}
	return nil
}

func (i *importing) writeEnrollments(ctx context.Context) error {
	set := []string{"device_id", "type", "topic", "push_magic", "token", "token_at", "enabled", "operator_disabled", "token_update_tally",
		"awaiting_configuration", "renewal_until", "enrolled_at", "updated_at"}
	var args []any
	for _, c := range i.channels() {
		args = append(args, c.ID, i.t.Now, c.device, string(c.Type), i.whole(c.ID, "topic", c.Topic), i.whole(c.ID, "push magic", c.PushMagic), nilIfEmpty(c.Token), null(micros(c.TokenAt)),
			c.Enabled, c.OperatorDisabled, c.Tally, c.AwaitingConfiguration, null(micros(c.RenewalUntil)), null(micros(c.EnrolledAt)), i.t.Now)
	}
	if err := i.t.upsertChunks(ctx, "nano_enrollments", slices.Concat([]string{"id", "created_at"}, set), []string{"id"}, set, args); err != nil {
		return fmt.Errorf("storing enrollments: %w", err)
	}
	return nil
}

func (i *importing) writeActivity(ctx context.Context) error {
	var args []any
	for _, c := range i.channels() {
		if !c.LastSeenAt.IsZero() {
			args = append(args, c.ID, micros(c.LastSeenAt))
		}
	}
	err := i.t.upsertChunks(ctx, "nano_enrollment_activity", []string{"id", "last_seen_at"}, []string{"id"},
		[]string{"last_seen_at = " + i.t.Dialect.Greatest() + "(nano_enrollment_activity.last_seen_at, new.last_seen_at)"}, args)
	if err != nil {
		return fmt.Errorf("storing last-seen times: %w", err)
	}
	return nil
}

type knownPin struct {
	device  string
	retired sql.Null[int64]
}

// writePins stores certificates. One that is pinned to another device stays so,
// a retired one stays retired, and a device that renewed its certificate at
// this server keeps it.
func (i *importing) writePins(ctx context.Context) error {
	byHash, renewed, err := i.readPins(ctx)
	if err != nil {
		return err
	}
	cols := []string{"sha256", "id", "certificate", "not_after", "created_at", "retired_at"}
	var args []any
	for _, d := range i.devices {
		id := d.Channel.ID
		if renewed[id] {
			continue
		}
		for _, p := range d.Pins {
			was, ok := byHash[p.SHA256]
			if ok && was.device != id {
				i.refuse("pin", id+" "+p.SHA256, "the certificate is pinned to "+was.device)
				continue
			}
			retired := null(micros(p.RetiredAt))
			if ok && was.retired.Valid {
				retired = was.retired.V
			}
			byHash[p.SHA256] = knownPin{device: id}
			args = append(args, p.SHA256, id, nilIfEmpty(p.Certificate), null(micros(p.NotAfter)), micros(p.CreatedAt), retired)
		}
	}
	if err := i.t.upsertChunks(ctx, "nano_cert_auth_associations", cols, []string{"sha256"}, []string{"certificate", "not_after", "retired_at"}, args); err != nil {
		return fmt.Errorf("storing certificate associations: %w", err)
	}
	return nil
}

func nilIfEmpty(b []byte) any {
	if len(b) == 0 {
		return nil
	}
	return b
}

// readPins reads the devices of the certificates, and the devices with a live
// certificate that their record does not have.
func (i *importing) readPins(ctx context.Context) (byHash map[string]knownPin, renewed map[string]bool, err error) {
	byHash, renewed = make(map[string]knownPin), make(map[string]bool)
	named := make(map[string]bool)
	var hashes, ids []string
	for _, d := range i.devices {
		if _, known := i.known[d.Channel.ID]; known {
			ids = append(ids, d.Channel.ID)
		}
		for _, p := range d.Pins {
			named[p.SHA256] = true
			hashes = append(hashes, p.SHA256)
		}
	}
	read := func(row sqldb.Row) error {
		var hash string
		var p knownPin
		err := row.Scan(&hash, &p.device, &p.retired)
		byHash[hash] = p
		if !p.retired.Valid && !named[hash] {
			renewed[p.device] = true
		}
		return err
	}
	for chunk := range slices.Chunk(hashes, importRows) {
		is, args := i.t.Among(chunk)
		if err := i.scan(ctx, "reading certificate associations", "SELECT sha256, id, retired_at FROM nano_cert_auth_associations WHERE sha256 "+is, args, read); err != nil {
			return nil, nil, err
		}
	}
	for chunk := range slices.Chunk(ids, importRows) {
		is, args := i.t.Among(chunk)
		if err := i.scan(ctx, "reading certificate associations", "SELECT sha256, id, retired_at FROM nano_cert_auth_associations WHERE id "+is, args, read); err != nil {
			return nil, nil, err
		}
	}
	return byHash, renewed, nil
}

// knownItem is an existing queue row.
type knownItem struct {
	state     storage.State
	createdAt int64
}

// readItems reads queue rows of existing channels: the waiting ones, and those
// that the records name.
func (i *importing) readItems(ctx context.Context) (map[keyPair]knownItem, error) {
	items := make(map[keyPair]knownItem)
	var ids []string
	var keys []keyPair
	for _, c := range i.channels() {
		if _, known := i.stamps[c.ID]; !known {
			continue
		}
		ids = append(ids, c.ID)
		for _, item := range c.Queue {
			keys = append(keys, keyPair{ID: c.ID, Item: item.CommandUUID})
		}
	}
	read := func(row sqldb.Row) error {
		var key keyPair
		var item knownItem
		err := row.Scan(&key.ID, &key.Item, &item.state, &item.createdAt)
		items[key] = item
		return err
	}
	for chunk := range slices.Chunk(ids, importRows) {
		is, args := i.t.Among(chunk)
		text := fmt.Sprintf("SELECT id, command_uuid, state, created_at FROM nano_enrollment_queue%s WHERE state IN (%d, %d, %d) AND id ",
			i.t.Dialect.Index("nano_enrollment_queue_next"), storage.Scheduled, storage.Queued, storage.NotNow) + is
		if err := i.scan(ctx, "reading queues", text, args, read); err != nil {
			return nil, err
		}
	}
	slices.SortFunc(keys, keyPair.Compare)
	for chunk := range slices.Chunk(keys, importRows) {
		text, args := queueRows.LockText(i.t.Tx, "q.id, q.command_uuid, q.state, q.created_at", chunk, "")
		if err := i.scan(ctx, "locking queue rows", text, args, read); err != nil {
			return nil, err
		}
	}
	return items, nil
}

var importedItem = []string{"seq", "priority", "state", "supersede_key", "created_at", "not_before", "expires_at", "finished_at", "notnow_count", "notnow_at"}

// writeQueues stores queue rows and results. An enrollment with a new row that
// waits is owed a push.
func (i *importing) writeQueues(ctx context.Context) error {
	known, err := i.readItems(ctx)
	if err != nil {
		return err
	}
	waiting := make(map[string][]keyPair) // rows of an earlier import
	for key, item := range known {
		if !item.state.Terminal() && item.createdAt < i.stamps[key.ID] {
			waiting[key.ID] = append(waiting[key.ID], key)
		}
	}
	w := queueWrites{i: i, known: known}
	for _, c := range i.channels() {
		w.add(c, waiting[c.ID])
	}
	if err := i.t.upsertChunks(ctx, "nano_enrollment_queue", slices.Concat([]string{"id", "command_uuid"}, importedItem), []string{"command_uuid", "id"}, importedItem, w.rows); err != nil {
		return fmt.Errorf("storing queue rows: %w", err)
	}
	set := []string{"status", "result", "late", "created_at"}
	if err := i.t.upsertChunks(ctx, "nano_command_results", slices.Concat([]string{"id", "command_uuid"}, set), []string{"id", "command_uuid"}, set, w.results); err != nil {
		return fmt.Errorf("storing results: %w", err)
	}
	set = []string{"last_seq", "owed_seq", "push_at"}
	if err := i.t.upsertChunks(ctx, "nano_enrollment_push", slices.Concat([]string{"id"}, set), []string{"id"}, set, w.pushes); err != nil {
		return fmt.Errorf("storing push rows: %w", err)
	}
	return i.cancel(ctx, w.stale)
}

// queueWrites are the rows that an import writes for the queues of channels.
type queueWrites struct {
	i                     *importing
	known                 map[keyPair]knownItem
	rows, results, pushes []any
	stale                 []keyPair // rows that the source no longer has
}

// add adds the rows of a channel. waiting are its rows that came with an earlier
// import and have not ended.
func (w *queueWrites) add(c importedChannel, waiting []keyPair) {
	named := make(map[string]bool, len(c.Queue))
	seq, owed := int64(0), false
	for _, item := range c.Queue {
		seq++
		key := keyPair{ID: c.ID, Item: item.CommandUUID}
		if named[item.CommandUUID] {
			continue
		}
		named[item.CommandUUID] = true
		if !item.State.Terminal() && !w.i.commands[item.CommandUUID] {
			w.i.refuse("queue", c.ID+" "+item.CommandUUID, "its command was not imported")
			continue
		}
		was, exists := w.known[key]
		if exists && was.state.Terminal() {
			continue
		}
		owed = owed || !item.State.Terminal() && !exists
		w.addItem(c, item, seq)
	}
	for _, key := range waiting {
		if !named[key.Item] {
			w.stale = append(w.stale, key)
		}
	}
	w.pushes = append(w.pushes, w.i.pushRow(c, seq, owed && c.Enabled)...)
}

// addItem adds the queue row of a command, and its result if it has one.
func (w *queueWrites) addItem(c importedChannel, item storage.ItemRecord, seq int64) {
	w.rows = append(w.rows, c.ID, item.CommandUUID, seq, item.Priority, int(item.State), nilIfBlank(item.SupersedeKey), micros(item.CreatedAt),
		null(micros(item.NotBefore)), null(micros(item.ExpiresAt)), null(w.i.finishedAt(item)), item.NotNowCount, null(micros(item.NotNowAt)))
	if r := item.Result; r != nil {
		w.results = append(w.results, c.ID, item.CommandUUID, clip(r.Status), notNil(r.Raw), r.Late, micros(cmp.Or(r.CreatedAt, item.FinishedAt)))
	}
}

// finishedAt returns when a row ended. It is never 0 for one that has, since
// retention needs it.
func (i *importing) finishedAt(item storage.ItemRecord) int64 {
	if !item.State.Terminal() {
		return 0
	}
	return cmp.Or(micros(item.FinishedAt), micros(item.CreatedAt), i.t.Now)
}

func nilIfBlank(s string) any {
	if s == "" {
		return nil
	}
	return s
}

// pushRow returns a channel's row of nano_enrollment_push.
func (i *importing) pushRow(c importedChannel, seq int64, owed bool) []any {
	p := i.push[c.ID]
	p.last = max(p.last, seq)
	at := any(nil)
	if p.pushAt.Valid {
		at = p.pushAt.V
	}
	if owed {
		p.owed = p.last
		h := fnv.New32a()
		h.Write([]byte(c.ID))
		at = i.t.Now + firstPush.Microseconds() + int64(h.Sum32())%importSpread.Microseconds()
	}
	return []any{c.ID, p.last, p.owed, at}
}

// cancel cancels waiting rows that the source no longer has.
func (i *importing) cancel(ctx context.Context, stale []keyPair) error {
	slices.SortFunc(stale, keyPair.Compare)
	for chunk := range slices.Chunk(stale, importRows) {
		text, args := queueRows.UpdateLockedText(i.t.Tx, "state = "+strconv.Itoa(int(storage.Cancelled))+", finished_at = ?, not_before = NULL", chunk)
		if _, err := i.t.Exec(ctx, text, append([]any{i.t.Now}, args...)...); err != nil {
			return fmt.Errorf("cancelling commands: %w", err)
		}
	}
	return nil
}
