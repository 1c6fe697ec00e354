package foreign

import (
	"context"
	"database/sql"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/go-sql-driver/mysql"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

// page is how many devices are read at once.
const page = 200

// sqlSource reads the tables of NanoMDM, or those of Fleet, which have the
// prefix nano_. One transaction sees one state of the database. Columns that
// this level of the schema does not have are read as NULL.
type sqlSource struct {
	cfg    Config
	db     *sql.DB
	conn   *sql.Conn
	pgsql  bool
	prefix string
	has    map[string]bool // table and table.column
	zone   *time.Location
	name   string
	fleet  *fleet

	// users is PostgreSQL's cursor over user channels; see usersOf.
	users *userCursor
}

// errForeign says that a database is not one of the kind.
var errForeign = errors.New("it does not hold the tables of the source")

// errOwn says that a database is one of this server.
var errOwn = errors.New("it is a database of this server")

func openSQL(ctx context.Context, cfg Config) (Source, error) {
	s := &sqlSource{cfg: cfg, pgsql: cfg.Kind == "pgsql", zone: time.UTC}
	if cfg.Kind == "fleet" {
		s.prefix = "nano_"
	}
	if err := s.connect(); err != nil {
		return nil, err
	}
	err := s.begin(ctx)
	switch {
	case err == nil:
		return s, nil
	case errors.Is(err, errOwn) && cfg.Kind != "fleet":
		if err := s.Close(); err != nil {
			return nil, fmt.Errorf("looking at the source: %w", err)
		}
		return openOwn(ctx, cfg)
	}
	return nil, errors.Join(fmt.Errorf("opening the source: %w", err), s.Close())
}

func (s *sqlSource) connect() error {
	if s.pgsql {
		pc, err := pgx.ParseConfig(s.cfg.DSN)
		if err != nil { // its text repeats the password
			return errors.New("the source's data source name is not a PostgreSQL URL or keyword string")
		}
		s.db = stdlib.OpenDB(*pc)
		return nil
	}
	mc, err := mysql.ParseDSN(s.cfg.DSN)
	if err != nil {
		return errors.New("the source's data source name is not user:password@tcp(host:port)/name?param=value, as go-sql-driver/mysql has it")
	}
	mc.ParseTime, mc.Loc, mc.InterpolateParams = true, time.UTC, true
	mc.Collation = ""
	if err := mc.Apply(mysql.Charset("utf8mb4", "")); err != nil {
		return err
	}
	if mc.Params == nil {
		mc.Params = make(map[string]string)
	}
	// TIMESTAMP is kept in UTC and shown in the session's zone.
	mc.Params["time_zone"] = "'+00:00'"
	connector, err := mysql.NewConnector(mc)
	if err != nil {
		return err
	}
	s.db = sql.OpenDB(connector)
	return nil
}

// begin begins the transaction that everything is read in.
func (s *sqlSource) begin(ctx context.Context) error {
	conn, err := s.db.Conn(ctx)
	if err != nil {
		return err
	}
	s.conn = conn
	texts := []string{"SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ", "START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY"}
	schema := "DATABASE()"
	if s.pgsql {
		texts = []string{"BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY"}
		schema = "current_schema()"
	}
	for _, text := range texts {
		if _, err := conn.ExecContext(ctx, text); err != nil {
			return err
		}
	}
	if err := s.readColumns(ctx, schema); err != nil {
		return err
	}
	if s.has["nano_schema"] {
		return errOwn
	}
	for _, table := range []string{"devices", "users", "enrollments", "commands", "command_results", "enrollment_queue", "cert_auth_associations"} {
		if !s.has[s.prefix+table] {
			return fmt.Errorf("%w: there is no table %s", errForeign, s.prefix+table)
		}
	}
	if s.cfg.Kind == "fleet" {
		if s.fleet, err = openFleet(ctx, s); err != nil {
			return err
		}
	}
	return s.identify(ctx)
}

func (s *sqlSource) readColumns(ctx context.Context, schema string) error {
	s.has = make(map[string]bool)
	return s.each(ctx, func(rows *sql.Rows) error {
		var table, column string
		if err := rows.Scan(&table, &column); err != nil {
			return err
		}
		s.has[table], s.has[table+"."+column] = true, true
		return nil
	}, "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = "+schema)
}

// identify says what the source is, and finds the zone of PostgreSQL's times.
func (s *sqlSource) identify(ctx context.Context) error {
	var version string
	if err := s.conn.QueryRowContext(ctx, "SELECT version()").Scan(&version); err != nil {
		return err
	}
	product := "NanoMDM"
	if s.fleet != nil {
		product = "Fleet"
	}
	if s.pgsql {
		var zone string
		if err := s.conn.QueryRowContext(ctx, "SHOW timezone").Scan(&zone); err != nil {
			return err
		}
		s.zone = s.cfg.Zone
		if s.zone == nil {
			var err error
			if s.zone, err = time.LoadLocation(zone); err != nil {
				return fmt.Errorf("the session's time zone %q is not known here: give -source-zone", zone)
			}
		}
		s.name = fmt.Sprintf("%s in %.40s, times in zone %s", product, version, s.zone)
		return nil
	}
	var missing []string
	for level, column := range []string{"devices.bootstrap_token_b64", "users.user_authenticate", "enrollments.token_update_tally",
		"command_results.not_now_tally", "push_certs.created_at", "enrollments.last_seen_at"} {
		if !s.has[s.prefix+column] {
			missing = append(missing, []string{"1", "2", "3", "4", "7", "8"}[level])
		}
	}
	s.name = fmt.Sprintf("%s in MySQL or MariaDB %s", product, version)
	if len(missing) > 0 {
		s.name += ", without schema changes " + strings.Join(missing, ", ")
	}
	return nil
}

func (s *sqlSource) String() string { return s.name }

func (s *sqlSource) Close() error {
	var err error
	if s.conn != nil {
		_, err = s.conn.ExecContext(context.Background(), "ROLLBACK")
		err = errors.Join(err, s.conn.Close())
	}
	return errors.Join(err, s.db.Close())
}

// each runs a query and reads its rows.
func (s *sqlSource) each(ctx context.Context, read func(*sql.Rows) error, query string, args ...any) error {
	rows, err := s.conn.QueryContext(ctx, s.bind(query), args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := read(rows); err != nil {
			return err
		}
	}
	return rows.Err()
}

// bind numbers the placeholders where the engine wants that.
func (s *sqlSource) bind(query string) string {
	if !s.pgsql {
		return query
	}
	parts := strings.Split(query, "?")
	var b strings.Builder
	b.WriteString(parts[0])
	for i, part := range parts[1:] {
		fmt.Fprintf(&b, "$%d%s", i+1, part)
	}
	return b.String()
}

// columns lists columns of a table for SELECT, under an alias.
func (s *sqlSource) columns(table, alias string, names ...string) string {
	list := make([]string, len(names))
	for i, name := range names {
		list[i] = "NULL"
		if s.has[s.prefix+table+"."+name] {
			list[i] = alias + "." + name
		}
	}
	return strings.Join(list, ", ")
}

func (s *sqlSource) table(name string) string { return s.prefix + name }

// when is a time of the source.
func (s *sqlSource) when(t sql.NullTime) time.Time {
	if !t.Valid {
		return time.Time{}
	}
	u := t.Time
	if s.pgsql && s.zone != time.UTC { // the wall clock of the zone
		u = time.Date(u.Year(), u.Month(), u.Day(), u.Hour(), u.Minute(), u.Second(), u.Nanosecond(), s.zone)
	}
	return u.UTC()
}

func places(n int) string { return "(?" + strings.Repeat(", ?", n-1) + ")" }

func (s *sqlSource) Count(ctx context.Context) (c Counts, err error) {
	for table, into := range map[string]*int64{"devices": &c.Devices, "commands": &c.Commands} {
		if err := s.conn.QueryRowContext(ctx, "SELECT COUNT(*) FROM "+s.table(table)).Scan(into); err != nil {
			return c, fmt.Errorf("counting %s: %w", table, err)
		}
	}
	return c, nil
}

func (s *sqlSource) PushCerts(ctx context.Context, yield func(storage.PushCert) error) error {
	if s.fleet != nil {
		return s.fleet.pushCerts(ctx, yield)
	}
	if !s.has[s.table("push_certs")] {
		return nil
	}
	return s.each(ctx, func(rows *sql.Rows) error {
		var topic string
		var cert, key []byte
		if err := rows.Scan(&topic, &cert, &key); err != nil {
			return err
		}
		if c, ok := s.cfg.pushCert(topic, cert, key); ok {
			return yield(c)
		}
		return nil
	}, "SELECT topic, cert_pem, key_pem FROM "+s.table("push_certs")+" ORDER BY topic")
}

func (s *sqlSource) Commands(ctx context.Context, after string, yield func(storage.CommandRecord) error) error {
	for {
		n, next := 0, ""
		err := s.each(ctx, func(rows *sql.Rows) error {
			var uuid string
			var subtype sql.NullString
			var raw []byte
			var at, used sql.NullTime
			if err := rows.Scan(&uuid, &subtype, &raw, &at, &used); err != nil {
				return err
			}
			n, next = n+1, uuid
			if s.fleet.withheld(uuid, subtype.String) != "" {
				return nil
			}
			if c, ok := s.cfg.readCommand(uuid, raw, s.when(at)); ok {
				return yield(c)
			}
			return nil
		}, "SELECT c.command_uuid, "+s.columns("commands", "c", "subtype")+", c.command, c.created_at, NULL FROM "+s.table("commands")+
			" c WHERE c.command_uuid > ? AND "+s.wanted()+" ORDER BY c.command_uuid LIMIT ?", append(s.wantedArgs(after), page)...)
		if err != nil {
			return fmt.Errorf("reading commands: %w", err)
		}
		if n < page {
			return nil
		}
		after = next
	}
}

// wanted chooses commands: without history those that wait for somebody, in a
// second pass those that were made or used since.
func (s *sqlSource) wanted() string {
	queue := "EXISTS (SELECT 1 FROM " + s.table("enrollment_queue") + " q LEFT JOIN " + s.table("command_results") +
		" r ON r.id = q.id AND r.command_uuid = q.command_uuid WHERE q.command_uuid = c.command_uuid"
	if s.cfg.History == 0 {
		queue += " AND q.active = " + s.truth() + " AND (r.status IS NULL OR r.status = 'NotNow')"
	}
	if s.cfg.History > 0 {
		queue += " AND (r.status IS NULL OR r.status = 'NotNow' OR r.updated_at >= ?)"
	}
	return queue + ")"
}

func (s *sqlSource) wantedArgs(after string) []any {
	args := []any{after}
	if s.cfg.History > 0 {
		args = append(args, s.wall(s.cfg.Now().Add(-s.cfg.History)))
	}
	return args
}

// wall is a time as the database writes it.
func (s *sqlSource) wall(t time.Time) time.Time {
	if !s.pgsql {
		return t.UTC()
	}
	t = t.In(s.zone)
	return time.Date(t.Year(), t.Month(), t.Day(), t.Hour(), t.Minute(), t.Second(), t.Nanosecond(), time.UTC)
}

func (s *sqlSource) truth() string {
	if s.pgsql {
		return "TRUE"
	}
	return "1"
}

func (s *sqlSource) Devices(ctx context.Context, after string, yield func(*storage.DeviceRecord) error) error {
	if s.pgsql {
		cursor, err := s.openUsers(ctx, after)
		if err != nil {
			return fmt.Errorf("reading user channels: %w", err)
		}
		s.users = cursor
		defer s.closeUsers(ctx)
	}
	for {
		list, err := s.devices(ctx, after)
		if err != nil {
			return fmt.Errorf("reading devices: %w", err)
		}
		if len(list.all) == 0 {
			return nil
		}
		after = list.all[len(list.all)-1].stored
		for _, read := range []func(context.Context, *devicePage) error{s.readEnrollments, s.readUsers, s.readPins, s.readQueues} {
			if err := read(ctx, list); err != nil {
				return err
			}
		}
		for _, d := range list.all {
			if record := s.finish(d); record != nil {
				if err := yield(record); err != nil {
					return err
				}
			}
		}
		if len(list.all) < page {
			return nil
		}
	}
}

// sqlDevice is a device while it is read.
type sqlDevice struct {
	storage.DeviceRecord
	stored   string // the id as the source spells it
	identity []byte
	enrolled bool
	users    map[string]*sqlUser // by the stored id
	order    []string
	bad      string
}

type sqlUser struct {
	storage.UserRecord
	stored   string
	enrolled bool
}

// devicePage finds devices and channels by ids as other tables spell them.
type devicePage struct {
	all      []*sqlDevice
	byID     map[string]*sqlDevice
	byFold   map[string]*sqlDevice
	channels map[string]*storage.ChannelRecord
}

// fold is how the usual collations of MySQL compare ids: without case, and
// some without spaces at the end.
func fold(id string) string { return strings.ToLower(strings.TrimRight(id, " ")) }

func (p *devicePage) device(id string) *sqlDevice {
	if d := p.byID[id]; d != nil {
		return d
	}
	return p.byFold[fold(id)]
}

func (p *devicePage) channel(id string) *storage.ChannelRecord {
	if c := p.channels[id]; c != nil {
		return c
	}
	return p.channels[fold(id)]
}

func (p *devicePage) addChannel(id string, c *storage.ChannelRecord) {
	p.channels[id] = c
	if p.channels[fold(id)] == nil {
		p.channels[fold(id)] = c
	}
}

func (p *devicePage) ids() []any {
	ids := make([]any, len(p.all))
	for i, d := range p.all {
		ids[i] = d.stored
	}
	return ids
}

func (s *sqlSource) devices(ctx context.Context, after string) (*devicePage, error) {
	p := &devicePage{byID: make(map[string]*sqlDevice), byFold: make(map[string]*sqlDevice), channels: make(map[string]*storage.ChannelRecord)}
	query := "SELECT d.id, " + s.columns("devices", "d", "serial_number", "identity_cert", "authenticate", "authenticate_at", "token_update", "token_update_at",
		"unlock_token", "unlock_token_at", "bootstrap_token_b64", "bootstrap_token_at", "updated_at") +
		" FROM " + s.table("devices") + " d WHERE d.id > ?"
	args := []any{after}
	if !s.cfg.Since.IsZero() {
		changed, since := s.changedSince()
		query += " AND " + changed
		args = append(args, since...)
	}
	err := s.each(ctx, func(rows *sql.Rows) error {
		d := &sqlDevice{users: make(map[string]*sqlUser)}
		var serial, bootstrap sql.NullString
		var authenticateAt, tokenUpdateAt, unlockAt, bootstrapAt, updated sql.NullTime
		if err := rows.Scan(&d.stored, &serial, &d.identity, &d.Authenticate.Raw, &authenticateAt, &d.TokenUpdate.Raw, &tokenUpdateAt,
			&d.UnlockToken.Value, &unlockAt, &bootstrap, &bootstrapAt, &updated); err != nil {
			return err
		}
		d.SerialNumber = serial.String
		d.Authenticate.At, d.TokenUpdate.At = s.when(authenticateAt), s.when(tokenUpdateAt)
		d.UnlockToken.At, d.BootstrapToken.At = s.when(unlockAt), s.when(bootstrapAt)
		if bootstrap.String != "" {
			token, err := base64.StdEncoding.DecodeString(strings.Map(dropSpace, bootstrap.String))
			if err != nil {
				s.cfg.note("device", d.stored, "its bootstrap token is not base64 and is left out")
			}
			d.BootstrapToken.Value = token
		}
		d.Channel.ID = d.stored
		if !s.pgsql {
			d.Channel.ID = deviceSpelling(d.stored, d.Authenticate.Raw, d.TokenUpdate.Raw)
		}
		if d.Channel.ID != d.stored {
			s.cfg.note("device", d.stored, "the device spells its id %s, which is used", d.Channel.ID)
		}
		d.bad = checkID(d.Channel.ID, "")
		d.Channel.LastSeenAt = s.when(updated)
		p.all = append(p.all, d)
		p.byID[d.stored], p.byFold[fold(d.stored)] = d, d
		p.addChannel(d.stored, &d.Channel)
		return nil
	}, query+" ORDER BY d.id LIMIT ?", append(args, page)...)
	return p, err
}

func dropSpace(r rune) rune {
	if r == ' ' || r == '\n' || r == '\r' || r == '\t' {
		return -1
	}
	return r
}

// changedSince chooses devices that have a row that changed.
func (s *sqlSource) changedSince() (condition string, args []any) {
	since := s.wall(s.cfg.Since.Add(-time.Second))
	of := func(table, key string) string {
		return "d.id IN (SELECT " + key + " FROM " + s.table(table) + " x WHERE x.updated_at >= ?)"
	}
	byChannel := func(table string) string {
		return "d.id IN (SELECT e.device_id FROM " + s.table(table) + " x JOIN " + s.table("enrollments") + " e ON e.id = x.id WHERE x.updated_at >= ?)"
	}
	parts := []string{"d.updated_at >= ?", of("users", "x.device_id"), of("enrollments", "x.device_id"),
		of("cert_auth_associations", "x.id"), byChannel("command_results"), byChannel("enrollment_queue")}
	for range parts {
		args = append(args, since)
	}
	return "(" + strings.Join(parts, " OR ") + ")", args
}

func (s *sqlSource) enrollmentColumns() string {
	return s.columns("enrollments", "e", "id", "type", "topic", "push_magic", "token_hex", "enabled", "token_update_tally", "last_seen_at", "updated_at")
}

// sqlEnrollment is a row of enrollments; all is NULL for a channel without one.
type sqlEnrollment struct {
	id, typ, topic, magic, token sql.NullString
	enabled                      sql.NullBool
	tally                        sql.NullInt64
	seen, updated                sql.NullTime
}

func (e *sqlEnrollment) into() []any {
	return []any{&e.id, &e.typ, &e.topic, &e.magic, &e.token, &e.enabled, &e.tally, &e.seen, &e.updated}
}

// fill copies the row into a channel. Keys that are wrong are reported.
func (s *sqlSource) fill(c *storage.ChannelRecord, e *sqlEnrollment, kind string, tokenAt time.Time) {
	c.Type, c.Topic, c.PushMagic = mdm.EnrollType(e.typ.String), e.topic.String, e.magic.String
	token, err := hex.DecodeString(e.token.String)
	if err != nil {
		s.cfg.note(kind, e.id.String, "its push token is not hexadecimal and is left out: it cannot be pushed before its next TokenUpdate")
	}
	c.Token, c.TokenAt = token, tokenAt
	c.Enabled = e.enabled.Bool
	c.Tally = int(e.tally.Int64)
	if !e.tally.Valid && c.Enabled {
		c.Tally = 1
	}
	c.LastSeenAt = s.when(e.updated)
	if e.seen.Valid {
		c.LastSeenAt = s.when(e.seen)
	}
}

func (s *sqlSource) readEnrollments(ctx context.Context, p *devicePage) error {
	where := "e.device_id"
	if s.pgsql { // it has no index of device_id
		where = "e.id"
	}
	err := s.each(ctx, func(rows *sql.Rows) error {
		var e sqlEnrollment
		var device string
		var user sql.NullString
		if err := rows.Scan(append([]any{&device, &user}, e.into()...)...); err != nil {
			return err
		}
		d := p.device(device)
		if d == nil {
			s.cfg.problem("enrollment", e.id.String, "its device %s is not there", device)
			return nil
		}
		if !user.Valid {
			d.enrolled = true
			s.fill(&d.Channel, &e, "device", d.TokenUpdate.At)
			return nil
		}
		u := d.user(e.id.String)
		u.enrolled = true
		s.fill(&u.Channel, &e, "user", time.Time{})
		return nil
	}, "SELECT e.device_id, e.user_id, "+s.enrollmentColumns()+" FROM "+s.table("enrollments")+" e WHERE "+where+" IN "+places(len(p.all)), p.ids()...)
	if err != nil {
		return fmt.Errorf("reading enrollments: %w", err)
	}
	return nil
}

// user returns the user channel of a stored id, new if it is not known.
func (d *sqlDevice) user(stored string) *sqlUser {
	for _, key := range []string{stored, fold(stored)} {
		if u := d.users[key]; u != nil {
			return u
		}
	}
	u := &sqlUser{stored: stored}
	d.users[stored] = u
	if d.users[fold(stored)] == nil {
		d.users[fold(stored)] = u
	}
	d.order = append(d.order, stored)
	return u
}

const userSelect = "u.id, u.device_id"

func (s *sqlSource) userColumns() string {
	return s.columns("users", "u", "user_short_name", "user_long_name", "token_update", "token_update_at",
		"user_authenticate", "user_authenticate_at", "user_authenticate_digest", "user_authenticate_digest_at")
}

// sqlUserRow is a row of users.
type sqlUserRow struct {
	id, device                         string
	short, long                        sql.NullString
	tokenUpdate, authenticate, digest  []byte
	tokenAt, authenticateAt, digestsAt sql.NullTime
}

func (r *sqlUserRow) into() []any {
	return []any{&r.id, &r.device, &r.short, &r.long, &r.tokenUpdate, &r.tokenAt, &r.authenticate, &r.authenticateAt, &r.digest, &r.digestsAt}
}

// addUser copies a row of users into a device.
func (s *sqlSource) addUser(d *sqlDevice, r *sqlUserRow) *sqlUser {
	u := d.user(r.id)
	u.UserShortName, u.UserLongName = r.short.String, r.long.String
	u.TokenUpdate = storage.Checkin{Raw: r.tokenUpdate, At: s.when(r.tokenAt)}
	u.Channel.TokenAt = u.TokenUpdate.At
	u.UserAuthenticate = storage.Checkin{Raw: r.authenticate, At: s.when(r.authenticateAt)}
	if len(r.digest) > 0 {
		u.UserAuthenticateDiscarded = len(r.authenticate) > 0
		u.UserAuthenticate = storage.Checkin{Raw: r.digest, At: s.when(r.digestsAt)}
	}
	return u
}

func (s *sqlSource) readUsers(ctx context.Context, p *devicePage) error {
	if s.pgsql {
		if err := s.usersOf(ctx, p); err != nil {
			return fmt.Errorf("reading user channels: %w", err)
		}
	} else {
		err := s.each(ctx, func(rows *sql.Rows) error {
			var r sqlUserRow
			if err := rows.Scan(r.into()...); err != nil {
				return err
			}
			if d := p.device(r.device); d != nil {
				s.addUser(d, &r)
			}
			return nil
		}, "SELECT "+userSelect+", "+s.userColumns()+" FROM "+s.table("users")+" u WHERE u.device_id IN "+places(len(p.all)), p.ids()...)
		if err != nil {
			return fmt.Errorf("reading users: %w", err)
		}
	}
	for _, d := range p.all {
		slices.Sort(d.order)
		for _, stored := range d.order {
			u := d.users[stored]
			if s.nameUser(d, u) {
				p.addChannel(stored, &u.Channel)
			}
		}
	}
	return nil
}

// nameUser splits a user channel's id and gives it its spelling.
func (s *sqlSource) nameUser(d *sqlDevice, u *sqlUser) bool {
	id := u.stored
	if said, _, ok := resolved(u.TokenUpdate.Raw); ok && said.ID != id && strings.EqualFold(said.ID, id) {
		s.cfg.note("user", id, "the device spells it %s, which is used", said.ID)
		id = said.ID
	}
	user := ""
	if n := len(d.Channel.ID); len(id) > n+1 && id[n] == ':' && strings.EqualFold(id[:n], d.Channel.ID) {
		user = id[n+1:]
		id = d.Channel.ID + ":" + user
	}
	why := checkID(d.Channel.ID, user)
	switch {
	case user == "":
		why = "it does not begin with the device's id and a colon"
	case why == "" && u.enrolled && !knownType(u.Channel.Type, true):
		why = fmt.Sprintf("the type %q is none of a user channel", u.Channel.Type)
	}
	if why != "" {
		s.cfg.problem("user", u.stored, "%s", why)
		u.stored = ""
		return false
	}
	u.Channel.ID, u.UserID = id, user
	for _, raw := range [][]byte{u.TokenUpdate.Raw, u.UserAuthenticate.Raw} {
		if _, m, ok := resolved(raw); ok {
			who := m.Identity()
			u.UserID = who.UserID + who.EnrollmentUserID
			break
		}
	}
	return true
}

func (s *sqlSource) readPins(ctx context.Context, p *devicePage) error {
	err := s.each(ctx, func(rows *sql.Rows) error {
		var id, hash string
		var created, updated, notAfter sql.NullTime
		if err := rows.Scan(&id, &hash, &created, &updated, &notAfter); err != nil {
			return err
		}
		d := p.device(id)
		if d == nil {
			return nil
		}
		sha := checkHash(hash)
		if sha == "" {
			s.cfg.problem("pin", id+" "+hash, "it is not the hash of a certificate")
			return nil
		}
		at := s.when(created)
		if updated.Valid && !created.Valid {
			at = s.when(updated)
		}
		d.Pins = append(d.Pins, storage.PinRecord{SHA256: sha, CreatedAt: at, NotAfter: s.when(notAfter)})
		return nil
	}, "SELECT a.id, a.sha256, "+s.columns("cert_auth_associations", "a", "created_at", "updated_at", "cert_not_valid_after")+
		" FROM "+s.table("cert_auth_associations")+" a WHERE a.id IN "+places(len(p.all)), p.ids()...)
	if err != nil {
		return fmt.Errorf("reading certificate associations: %w", err)
	}
	return s.fleet.readRenewals(ctx, p)
}

// readQueues reads what waits and what has ended. Rows of one second keep the
// order of the source, which is that of its keys.
func (s *sqlSource) readQueues(ctx context.Context, p *devicePage) error {
	var ids []any
	for id := range p.channels {
		ids = append(ids, id)
	}
	q, r, c := s.table("enrollment_queue"), s.table("command_results"), s.table("commands")
	query := "SELECT q.id, q.command_uuid, q.active, q.priority, q.created_at, q.updated_at, r.status, r.result, r.updated_at, " +
		s.columns("command_results", "r", "not_now_at", "not_now_tally") + ", " + s.columns("commands", "c", "subtype") +
		" FROM " + q + " q LEFT JOIN " + r + " r ON r.id = q.id AND r.command_uuid = q.command_uuid LEFT JOIN " + c + " c ON c.command_uuid = q.command_uuid WHERE q.id IN " + places(len(ids))
	if s.cfg.History == 0 {
		query += " AND q.active = " + s.truth() + " AND (r.status IS NULL OR r.status = 'NotNow')"
	}
	err := s.each(ctx, func(rows *sql.Rows) error {
		var row sqlQueueRow
		if err := rows.Scan(&row.id, &row.uuid, &row.active, &row.priority, &row.created, &row.updated, &row.status, &row.result, &row.resultAt,
			&row.notNowAt, &row.notNowTally, &row.subtype); err != nil {
			return err
		}
		s.addItem(p.channel(row.id), &row)
		return nil
	}, query+" ORDER BY q.priority DESC, q.created_at, q.command_uuid", ids...)
	if err != nil {
		return fmt.Errorf("reading queues: %w", err)
	}
	return nil
}

type sqlQueueRow struct {
	id, uuid                   string
	active                     sql.NullBool
	priority                   sql.NullInt64
	created, updated, resultAt sql.NullTime
	status, subtype            sql.NullString
	result                     []byte
	notNowAt                   sql.NullTime
	notNowTally                sql.NullInt64
}

func (s *sqlSource) addItem(c *storage.ChannelRecord, row *sqlQueueRow) {
	if c == nil {
		return
	}
	if why := s.fleet.withheld(row.uuid, row.subtype.String); why != "" {
		if row.active.Bool && (!row.status.Valid || row.status.String == string(mdm.StatusNotNow)) {
			s.cfg.problem("queue", row.id+" "+row.uuid, "%s", why)
		}
		return
	}
	item := storage.ItemRecord{CommandUUID: row.uuid, State: storage.Queued, Priority: int(row.priority.Int64), CreatedAt: s.when(row.created),
		NotNowAt: s.when(row.notNowAt), NotNowCount: int(row.notNowTally.Int64)}
	status := mdm.Status(row.status.String)
	switch {
	case row.status.Valid && status != mdm.StatusNotNow:
		var known bool
		if item.State, known = stateOf(row.status.String); !known {
			s.cfg.note("queue", row.id+" "+row.uuid, "the status %q is kept as an error", row.status.String)
		}
		item.FinishedAt = s.when(row.resultAt)
		item.Result = &storage.CommandResult{Status: row.status.String, CreatedAt: item.FinishedAt, Raw: row.result}
	case !row.active.Bool:
		item.State, item.FinishedAt = storage.Cancelled, s.when(row.updated)
	case status == mdm.StatusNotNow:
		item.State = storage.NotNow
		if item.NotNowCount == 0 {
			item.NotNowCount = 1
		}
		if item.NotNowAt.IsZero() {
			item.NotNowAt = s.when(row.resultAt)
		}
	}
	if item.State.Terminal() && !s.cfg.keeps(item.FinishedAt) {
		return
	}
	c.Queue = append(c.Queue, item)
}

// finish makes a record of what was read, or reports why it is none.
func (s *sqlSource) finish(d *sqlDevice) *storage.DeviceRecord {
	if d.bad == "" && d.enrolled && !knownType(d.Channel.Type, false) {
		d.bad = fmt.Sprintf("the type %q is none of a device", d.Channel.Type)
	}
	if d.bad != "" {
		s.cfg.problem("device", d.stored, "%s", d.bad)
		return nil
	}
	record := &d.DeviceRecord
	if !describe(record) {
		s.cfg.note("device", d.stored, "its Authenticate message cannot be read; it is kept as it is")
	}
	if !d.enrolled {
		record.Channel.Type = channelType(d.Authenticate.Raw, false, false)
	}
	if record.Channel.Enabled {
		record.Channel.EnrolledAt = record.Authenticate.At
	}
	if !parsedAll(d.identity) {
		s.cfg.note("device", d.stored, "its identity certificate cannot be read")
	}
	record.Pins = settlePins(record.Pins, parsePEM(d.identity), record.Authenticate.At)
	for _, stored := range d.order {
		u := d.users[stored]
		if u.stored == "" {
			continue
		}
		if !u.enrolled {
			u.Channel.Type = channelType(u.UserAuthenticate.Raw, true, record.Channel.Type == mdm.UserEnrollmentDevice)
		}
		if u.Channel.Enabled {
			u.Channel.EnrolledAt = u.TokenUpdate.At
		}
		record.Users = append(record.Users, u.UserRecord)
	}
	slices.SortFunc(record.Users, func(a, b storage.UserRecord) int { return strings.Compare(a.Channel.ID, b.Channel.ID) })
	return record
}

func parsedAll(text []byte) bool { return len(text) == 0 || parsePEM(text) != nil }

// Left counts the tables of other parts of the source.
func (s *sqlSource) Left(ctx context.Context) ([]Left, error) {
	parts := []struct{ table, what string }{
		{"declarations", "declarations (KMFDDM)"}, {"set_declarations", "members of declaration sets (KMFDDM)"},
		{"enrollment_sets", "enrollments of declaration sets (KMFDDM)"}, {"dep_names", "ADE servers (NanoDEP)"},
	}
	if s.fleet != nil {
		parts = fleetParts
	}
	var left []Left
	for _, part := range parts {
		if !s.has[part.table] {
			continue
		}
		var n int64
		if err := s.conn.QueryRowContext(ctx, "SELECT COUNT(*) FROM "+part.table).Scan(&n); err != nil {
			return nil, fmt.Errorf("counting %s: %w", part.table, err)
		}
		if n > 0 {
			left = append(left, Left{part.what, n})
		}
	}
	return left, nil
}
