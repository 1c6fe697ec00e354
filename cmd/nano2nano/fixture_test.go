package main

import (
	"cmp"
	"crypto/sha256"
	"database/sql"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"flag"
	"fmt"
	"strings"
	"testing"
	"time"

	_ "github.com/go-sql-driver/mysql"
	_ "github.com/jackc/pgx/v5/stdlib"
	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/storage"
)

// enrollments is how many a source of the tests has.
var enrollments = flag.Int("enrollments", 120, "enrollments of each source in the tests")

const fleetTopic = "com.apple.mgmt.External.11111111-2222-3333-4444-555555555555"

// begun is when the fleet of the tests enrolled, in whole seconds as the
// sources keep them.
var begun = time.Date(2025, 11, 3, 8, 0, 0, 0, time.UTC)

// fleet is what a source holds.
type fleet struct {
	devices  []*storage.DeviceRecord
	commands []storage.CommandRecord
	cert     storage.PushCert
}

// fleetCommands is how many commands a device has.
const fleetCommands = 6

// commandsFor says which commands the devices of a group have in common.
func commandUUID(group, n int) string {
	return fmt.Sprintf("%08X-0000-4000-8000-%012X", group, n)
}

func checkin(kind string, keys func(p *mdmtest.Plist)) []byte {
	var p mdmtest.Plist
	p.String("MessageType", kind)
	keys(&p)
	return p.Document()
}

// newFleet makes n enrollments of mixed types in mixed states.
func newFleet(t testing.TB, n int) *fleet {
	t.Helper()
	ca, err := mdmtest.NewCA()
	require.NoError(t, err)
	f := new(fleet)
	pair, err := ca.Issue("push", mdmtest.WithPushTopic(fleetTopic))
	require.NoError(t, err)
	text, err := pair.PEM()
	require.NoError(t, err)
	block, rest := pem.Decode(text)
	f.cert = storage.PushCert{Topic: fleetTopic, CertPEM: pem.EncodeToMemory(block), KeyPEM: rest}
	channels := 0
	for i := 0; channels < n; i++ {
		d := newDevice(t, ca, i, deviceID(i))
		f.devices = append(f.devices, d)
		channels += 1 + len(d.Users)
		if i%50 == 0 {
			for c := range fleetCommands {
				uuid := commandUUID(i/50, c)
				f.commands = append(f.commands, storage.CommandRecord{UUID: uuid, RequestType: "ProfileList",
					Raw: mdmtest.NewCommand(uuid, "ProfileList", func(*mdmtest.Plist) {}), CreatedAt: begun.Add(time.Hour)})
			}
		}
	}
	return f
}

// deviceID is the UDID or EnrollmentID of a device.
func deviceID(i int) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "device %d", i))
	return strings.ToUpper(fmt.Sprintf("%x-%x-%x-%x-%x", sum[:4], sum[4:6], sum[6:8], sum[8:10], sum[10:16]))
}

func newDevice(t testing.TB, ca *mdmtest.CA, i int, id string) *storage.DeviceRecord {
	t.Helper()
	sum := sha256.Sum256([]byte(id))
	userEnrollment := i%10 == 7
	idKey := "UDID"
	if userEnrollment {
		idKey = "EnrollmentID"
	}
	d := &storage.DeviceRecord{SerialNumber: fmt.Sprintf("SN%08d", i), Model: "MODEL", OSVersion: "26.1", ProductName: "Mac16,1", DeviceName: "Mäc & Co"}
	if userEnrollment {
		d.SerialNumber = ""
	}
	at := begun.Add(time.Duration(i%3600) * time.Second)
	d.Authenticate = storage.Checkin{At: at, Raw: checkin("Authenticate", func(p *mdmtest.Plist) {
		p.String(idKey, id).String("Topic", fleetTopic).OptionalString("SerialNumber", d.SerialNumber).String("Model", d.Model)
		p.String("OSVersion", d.OSVersion).String("ProductName", d.ProductName).String("DeviceName", d.DeviceName)
	})}
	c := &d.Channel
	*c = storage.ChannelRecord{ID: id, Type: mdm.Device, Topic: fleetTopic, LastSeenAt: at.Add(2 * time.Hour)}
	if userEnrollment {
		c.Type = mdm.UserEnrollmentDevice
	}
	d.Pins = []storage.PinRecord{{SHA256: hashText("current "+id, i), CreatedAt: at}}
	if i%10 == 0 {
		identity, err := ca.Issue(id)
		require.NoError(t, err)
		der := identity.TLS().Certificate[0]
		hash := sha256.Sum256(der)
		d.Pins[0] = storage.PinRecord{SHA256: hex.EncodeToString(hash[:]), CreatedAt: at, Certificate: der}
	}
	if i%5 == 0 {
		d.Pins = append([]storage.PinRecord{{SHA256: hashText("old "+id, i), CreatedAt: at.Add(-time.Hour), RetiredAt: at}}, d.Pins...)
	}
	if i%17 == 16 { // no TokenUpdate yet
		c.LastSeenAt = at
		return d
	}
	enable(c, fmt.Sprintf("magic %d", i), i, at.Add(time.Minute))
	if i%3 == 0 {
		d.UnlockToken = storage.Token{Value: sum[:], At: c.TokenAt}
	}
	d.TokenUpdate = storage.Checkin{At: c.TokenAt, Raw: checkin("TokenUpdate", func(p *mdmtest.Plist) {
		p.String(idKey, id).String("Topic", c.Topic).String("PushMagic", c.PushMagic).Data("Token", c.Token)
		if d.UnlockToken.Value != nil {
			p.Data("UnlockToken", d.UnlockToken.Value)
		}
	})}
	if i%4 == 0 {
		d.BootstrapToken = storage.Token{Value: sum[8:24], At: c.TokenAt.Add(time.Minute)}
	}
	if i%13 == 12 { // checked out
		c.Enabled, c.Tally, c.EnrolledAt = false, 0, time.Time{}
		return d
	}
	fillQueue(c, i)
	switch i % 10 {
	case 8:
		for u := range 1 + i%2 + i/10%2 {
			d.Users = append(d.Users, newUser(d, mdm.User, fmt.Sprintf("USER-%d-%d", u, i), "jane", i))
		}
	case 9:
		d.Users = append(d.Users, newUser(d, mdm.SharediPad, "jane.doe@example.org", "jane.doe@example.org", i))
	}
	return d
}

func hashText(what string, i int) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s %d", what, i))
	return hex.EncodeToString(sum[:])
}

func enable(c *storage.ChannelRecord, magic string, i int, at time.Time) {
	sum := sha256.Sum256([]byte(magic))
	c.PushMagic, c.Token, c.TokenAt = magic, sum[:], at
	c.Enabled, c.Tally, c.EnrolledAt = true, 1+i%3, at
}

// fillQueue leaves a queue half done. Two of its commands came in one second.
func fillQueue(c *storage.ChannelRecord, i int) {
	at := begun.Add(24 * time.Hour)
	report := func(uuid, status string, after time.Duration) *storage.CommandResult {
		var p mdmtest.Plist
		p.String("UDID", c.ID).String("CommandUUID", uuid).String("Status", status)
		return &storage.CommandResult{Status: status, CreatedAt: at.Add(after), Raw: p.Document()}
	}
	uuid := func(n int) string { return commandUUID(i/50, n) }
	c.Queue = []storage.ItemRecord{
		{CommandUUID: uuid(0), State: storage.Acknowledged, CreatedAt: at, FinishedAt: at.Add(time.Minute), Result: report(uuid(0), "Acknowledged", time.Minute)},
		{CommandUUID: uuid(1), State: storage.Failed, CreatedAt: at.Add(time.Second), FinishedAt: at.Add(time.Minute), Result: report(uuid(1), "Error", time.Minute)},
		{CommandUUID: uuid(5), State: storage.Cancelled, CreatedAt: at.Add(2 * time.Second), FinishedAt: at.Add(time.Minute)},
		{CommandUUID: uuid(4), State: storage.NotNow, CreatedAt: at.Add(3 * time.Second), NotNowCount: 2, NotNowAt: at.Add(time.Hour)},
		{CommandUUID: uuid(2), State: storage.Queued, CreatedAt: at.Add(4 * time.Second)},
		{CommandUUID: uuid(3), State: storage.Queued, CreatedAt: at.Add(4 * time.Second)},
	}
}

func newUser(d *storage.DeviceRecord, typ mdm.EnrollType, user, short string, i int) storage.UserRecord {
	userID := user
	if typ == mdm.SharediPad {
		userID = mdm.SharediPadUserID
	}
	u := storage.UserRecord{UserID: userID, UserShortName: short, UserLongName: "Jane Doe"}
	c := &u.Channel
	*c = storage.ChannelRecord{ID: d.Channel.ID + ":" + user, Type: typ, Topic: fleetTopic, LastSeenAt: d.Channel.LastSeenAt}
	enable(c, "user magic "+user, i, d.Channel.TokenAt.Add(time.Minute))
	u.TokenUpdate = storage.Checkin{At: c.TokenAt, Raw: checkin("TokenUpdate", func(p *mdmtest.Plist) {
		p.String("UDID", d.Channel.ID).String("UserID", userID).String("UserShortName", short).String("UserLongName", u.UserLongName)
		p.String("Topic", c.Topic).String("PushMagic", c.PushMagic).Data("Token", c.Token)
	})}
	if typ == mdm.User {
		u.UserAuthenticate = storage.Checkin{At: c.TokenAt.Add(-time.Second), Raw: checkin("UserAuthenticate", func(p *mdmtest.Plist) {
			p.String("UDID", d.Channel.ID).String("UserID", userID).String("UserShortName", short)
		})}
	}
	fillQueue(c, i)
	return u
}

// channels calls do for every channel.
func (f *fleet) channels(do func(d *storage.DeviceRecord, u *storage.UserRecord, c *storage.ChannelRecord)) {
	for _, d := range f.devices {
		do(d, nil, &d.Channel)
		for i := range d.Users {
			do(d, &d.Users[i], &d.Users[i].Channel)
		}
	}
}

// sqlFixture writes a fleet into the tables of NanoMDM or of Fleet.
type sqlFixture struct {
	t      testing.TB
	db     *sql.DB
	pgsql  bool
	prefix string
	zone   *time.Location
}

func (x *sqlFixture) exec(query string, args ...any) {
	x.t.Helper()
	if x.pgsql {
		for n := 1; strings.Contains(query, "?"); n++ {
			query = strings.Replace(query, "?", fmt.Sprintf("$%d", n), 1)
		}
	}
	_, err := x.db.ExecContext(x.t.Context(), query, args...)
	require.NoError(x.t, err, query)
}

// at is a time as the source writes it.
func (x *sqlFixture) at(t time.Time) any {
	if t.IsZero() {
		return nil
	}
	if x.zone != nil {
		t = t.In(x.zone)
		return time.Date(t.Year(), t.Month(), t.Day(), t.Hour(), t.Minute(), t.Second(), t.Nanosecond(), time.UTC)
	}
	return t
}

// create makes the tables, with the columns of all levels but those left out.
func (x *sqlFixture) create(without ...string) {
	x.t.Helper()
	blob, stamp, truth := "MEDIUMBLOB", "TIMESTAMP(6)", "BOOLEAN"
	medium, id := "MEDIUMTEXT", "VARCHAR(255)"
	if x.prefix == "" {
		stamp = "TIMESTAMP"
	}
	if x.pgsql {
		blob, stamp, medium = "BYTEA", "TIMESTAMP", "TEXT"
	}
	times := "created_at " + stamp + " NULL, updated_at " + stamp + " NULL"
	tables := []struct{ name, columns string }{
		{"devices", "id " + id + " PRIMARY KEY, identity_cert TEXT NULL, serial_number VARCHAR(127) NULL, unlock_token " + blob + " NULL, unlock_token_at " + stamp + " NULL, " +
			"authenticate TEXT NOT NULL, authenticate_at " + stamp + " NULL, token_update TEXT NULL, token_update_at " + stamp + " NULL, " +
			"bootstrap_token_b64 TEXT NULL, bootstrap_token_at " + stamp + " NULL, " + times},
		{"users", "id " + id + " NOT NULL, device_id " + id + " NOT NULL, user_short_name " + id + " NULL, user_long_name " + id + " NULL, " +
			"token_update TEXT NULL, token_update_at " + stamp + " NULL, user_authenticate TEXT NULL, user_authenticate_at " + stamp + " NULL, " +
			"user_authenticate_digest TEXT NULL, user_authenticate_digest_at " + stamp + " NULL, " + times + ", PRIMARY KEY (id, device_id)"},
		{"enrollments", "id " + id + " PRIMARY KEY, device_id " + id + " NOT NULL, user_id " + id + " NULL, type VARCHAR(31) NOT NULL, topic " + id + " NOT NULL, " +
			"push_magic VARCHAR(127) NOT NULL, token_hex " + id + " NOT NULL, enabled " + truth + " NOT NULL, token_update_tally INTEGER NOT NULL DEFAULT 1, " +
			"last_seen_at " + stamp + " NULL, " + times},
		{"commands", "command_uuid VARCHAR(127) PRIMARY KEY, request_type VARCHAR(63) NOT NULL, command " + medium + " NOT NULL, " + times},
		{"command_results", "id " + id + " NOT NULL, command_uuid VARCHAR(127) NOT NULL, status VARCHAR(31) NOT NULL, result " + medium + " NOT NULL, " +
			"not_now_at " + stamp + " NULL, not_now_tally INTEGER NOT NULL DEFAULT 0, " + times + ", PRIMARY KEY (id, command_uuid)"},
		{"enrollment_queue", "id " + id + " NOT NULL, command_uuid VARCHAR(127) NOT NULL, active " + truth + " NOT NULL, priority SMALLINT NOT NULL DEFAULT 0, " + times + ", PRIMARY KEY (id, command_uuid)"},
		{"push_certs", "topic " + id + " PRIMARY KEY, cert_pem TEXT NOT NULL, key_pem TEXT NOT NULL, stale_token INTEGER NOT NULL, " + times},
		{"cert_auth_associations", "id " + id + " NOT NULL, sha256 CHAR(64) NOT NULL, " + times + ", PRIMARY KEY (id, sha256)"},
	}
	for _, table := range tables {
		end := ""
		if !x.pgsql {
			end = " DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_unicode_ci"
		}
		x.exec("CREATE TABLE " + x.prefix + table.name + " (" + table.columns + ")" + end)
	}
	for _, column := range without {
		table, name, _ := strings.Cut(column, ".")
		x.exec("ALTER TABLE " + x.prefix + table + " DROP COLUMN " + name)
	}
}

// rows inserts many rows at once.
func (x *sqlFixture) rows(table, columns string, rows [][]any) {
	x.t.Helper()
	const most = 200
	for len(rows) > 0 {
		n := min(most, len(rows))
		width := len(rows[0])
		one := "(?" + strings.Repeat(", ?", width-1) + ")"
		var args []any
		for _, row := range rows[:n] {
			args = append(args, row...)
		}
		query := "INSERT INTO " + x.prefix + table + " (" + columns + ") VALUES " + one + strings.Repeat(", "+one, n-1)
		if x.pgsql {
			var b strings.Builder
			k := 0
			for _, r := range query {
				if r == '?' {
					k++
					fmt.Fprintf(&b, "$%d", k)
					continue
				}
				b.WriteRune(r)
			}
			query = b.String()
		}
		_, err := x.db.ExecContext(x.t.Context(), query, args...)
		require.NoError(x.t, err, table)
		rows = rows[n:]
	}
}

func orNil(s string) any {
	if s == "" {
		return nil
	}
	return s
}

// write writes the fleet.
func (x *sqlFixture) write(f *fleet) {
	x.t.Helper()
	var devices, users, enrollments, pins, queue, results [][]any
	f.channels(func(d *storage.DeviceRecord, u *storage.UserRecord, c *storage.ChannelRecord) {
		if u == nil {
			var cert any
			for _, p := range d.Pins {
				if p.Certificate != nil {
					cert = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.Certificate}))
				}
				pins = append(pins, []any{c.ID, p.SHA256, x.at(p.CreatedAt), x.at(p.CreatedAt)})
			}
			var unlock any
			if len(d.UnlockToken.Value) > 0 {
				unlock = d.UnlockToken.Value
			}
			devices = append(devices, []any{c.ID, cert, orNil(d.SerialNumber), unlock, x.at(d.UnlockToken.At), string(d.Authenticate.Raw), x.at(d.Authenticate.At),
				orNil(string(d.TokenUpdate.Raw)), x.at(d.TokenUpdate.At), orNil(base64.StdEncoding.EncodeToString(d.BootstrapToken.Value)), x.at(d.BootstrapToken.At),
				x.at(d.Authenticate.At), x.at(c.LastSeenAt)})
		} else {
			users = append(users, []any{c.ID, d.Channel.ID, u.UserShortName, u.UserLongName, string(u.TokenUpdate.Raw), x.at(u.TokenUpdate.At),
				orNil(string(u.UserAuthenticate.Raw)), x.at(u.UserAuthenticate.At), x.at(u.TokenUpdate.At), x.at(u.TokenUpdate.At)})
		}
		if c.Token != nil {
			var user any
			if u != nil {
				user = c.ID
			}
			enrollments = append(enrollments, []any{c.ID, d.Channel.ID, user, string(c.Type), c.Topic, c.PushMagic, hex.EncodeToString(c.Token), c.Enabled, c.Tally,
				x.at(c.LastSeenAt), x.at(c.TokenAt), x.at(c.LastSeenAt)})
		}
		for _, item := range c.Queue {
			queue = append(queue, []any{c.ID, item.CommandUUID, item.State != storage.Cancelled, 0, x.at(item.CreatedAt), x.at(cmp.Or(item.FinishedAt, item.CreatedAt))})
			switch {
			case item.State == storage.NotNow:
				results = append(results, []any{c.ID, item.CommandUUID, "NotNow", "<?xml?>", x.at(item.NotNowAt), item.NotNowCount, x.at(item.NotNowAt), x.at(item.NotNowAt)})
			case item.Result != nil:
				results = append(results, []any{c.ID, item.CommandUUID, item.Result.Status, string(item.Result.Raw), nil, 0, x.at(item.FinishedAt), x.at(item.FinishedAt)})
			}
		}
	})
	var commands [][]any
	for _, c := range f.commands {
		commands = append(commands, []any{c.UUID, c.RequestType, string(c.Raw), x.at(c.CreatedAt), x.at(c.CreatedAt)})
	}
	times := "created_at, updated_at"
	x.rows("devices", "id, identity_cert, serial_number, unlock_token, unlock_token_at, authenticate, authenticate_at, token_update, token_update_at, bootstrap_token_b64, bootstrap_token_at, "+times, devices)
	x.rows("users", "id, device_id, user_short_name, user_long_name, token_update, token_update_at, user_authenticate, user_authenticate_at, "+times, users)
	x.rows("enrollments", "id, device_id, user_id, type, topic, push_magic, token_hex, enabled, token_update_tally, last_seen_at, "+times, enrollments)
	x.rows("commands", "command_uuid, request_type, command, "+times, commands)
	x.rows("enrollment_queue", "id, command_uuid, active, priority, "+times, queue)
	x.rows("command_results", "id, command_uuid, status, result, not_now_at, not_now_tally, "+times, results)
	x.rows("cert_auth_associations", "id, sha256, "+times, pins)
	x.rows("push_certs", "topic, cert_pem, key_pem, stale_token", [][]any{{f.cert.Topic, string(f.cert.CertPEM), string(f.cert.KeyPEM), 0}})
}
