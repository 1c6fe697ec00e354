package foreign

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/nanomdm/nanomdm/cryptoutil"
	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

// microMDM reads the bolt file of MicroMDM. It keeps no check-in messages and
// no types of enrollments: both are made from what it does keep.
type microMDM struct {
	cfg   Config
	db    *bbolt.DB
	tx    *bbolt.Tx
	at    time.Time           // when the file was last written
	certs map[string][]byte   // keys of scep_certificates by hash
	users map[string][]mmUser // by UDID
	topic string              // of the push certificate: it serves one
	// owner is the device whose user channel has a UserID. The source finds
	// user channels by that alone.
	owner map[string]string
}

// mmUser is a record of mdm.Users.
type mmUser struct{ udid, id, short, long string }

// Buckets of the file.
const (
	mmDevices   = "mdm.Devices"
	mmDeviceIdx = "mdm.DeviceIdx"
	mmPins      = "mdm.UDIDCertAuth"
	mmPush      = "mdm.PushInfo"
	mmUsers     = "mdm.Users"
	mmUserIdx   = "mdm.UserIdx"
	mmCommands  = "mdm.DeviceCommands"
	mmConfig    = "mdm.ServerConfig"
	mmRemove    = "mdm.RemoveDevice"
	mmSCEP      = "scep_certificates"
)

// boltWait is how long a MicroMDM that runs, and holds the file, is waited for.
const boltWait = 2 * time.Second

func openMicroMDM(cfg Config) (Source, error) {
	info, err := os.Stat(cfg.DSN)
	if err != nil {
		return nil, fmt.Errorf("opening the source: %w", err)
	}
	db, err := bbolt.Open(cfg.DSN, 0o600, &bbolt.Options{ReadOnly: true, Timeout: boltWait})
	if errors.Is(err, berrors.ErrTimeout) {
		return nil, errors.New("opening the source: MicroMDM is running and holds the file: stop it, or read a copy that GET /boltbackup gave")
	}
	if err != nil {
		return nil, fmt.Errorf("opening the source: %w", err)
	}
	s := &microMDM{cfg: cfg, db: db, at: info.ModTime().UTC()}
	if s.tx, err = db.Begin(false); err != nil {
		return nil, errors.Join(fmt.Errorf("opening the source: %w", err), db.Close())
	}
	if s.tx.Bucket([]byte(mmDevices)) == nil && s.tx.Bucket([]byte(mmPush)) == nil {
		return nil, errors.Join(fmt.Errorf("opening the source: %w: it has no bucket %s", errForeign, mmDevices), s.Close())
	}
	return s, nil
}

func (s *microMDM) String() string { return "MicroMDM's file " + s.cfg.DSN }

func (s *microMDM) Close() error { return errors.Join(s.tx.Rollback(), s.db.Close()) }

func (s *microMDM) get(bucket, key string) []byte {
	b := s.tx.Bucket([]byte(bucket))
	if b == nil {
		return nil
	}
	return b.Get([]byte(key))
}

// each gives the records of a bucket behind a key. One that is no message is
// reported.
func (s *microMDM) each(ctx context.Context, bucket, after, kind string, yield func(key string, m message) error) error {
	b := s.tx.Bucket([]byte(bucket))
	if b == nil {
		return nil
	}
	c := b.Cursor()
	k, v := c.Seek([]byte(after))
	if after != "" && string(k) == after {
		k, v = c.Next()
	}
	for ; k != nil; k, v = c.Next() {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		m, err := parseMessage(v)
		if err != nil {
			s.cfg.problem(kind, string(k), "%v", err)
			continue
		}
		if err := yield(string(k), m); err != nil {
			return err
		}
	}
	return nil
}

func (s *microMDM) Count(ctx context.Context) (c Counts, err error) {
	for bucket, n := range map[string]*int64{mmDevices: &c.Devices, mmCommands: &c.Commands} {
		if b := s.tx.Bucket([]byte(bucket)); b != nil {
			*n = int64(b.Stats().KeyN)
		}
	}
	return c, nil
}

func (s *microMDM) PushCerts(_ context.Context, yield func(storage.PushCert) error) error {
	value := s.get(mmConfig, "config")
	if value == nil {
		return nil
	}
	m, err := parseMessage(value)
	if err != nil {
		s.cfg.problem("push certificate", "config", "%v", err)
		return nil
	}
	if len(m.bytes(1)) == 0 {
		return nil
	}
	if c, ok := s.cfg.pushCert("", m.bytes(1), m.bytes(2)); ok {
		return yield(c)
	}
	return nil
}

// Lists of a DeviceCommand.
const (
	mmWaiting   protowire.Number = 2
	mmCompleted protowire.Number = 3
	mmFailed    protowire.Number = 4
	mmNotNow    protowire.Number = 5
)

// Commands gives all of them whatever after says: they are kept by device.
func (s *microMDM) Commands(ctx context.Context, _ string, yield func(storage.CommandRecord) error) error {
	return s.each(ctx, mmCommands, "", "queue", func(key string, m message) error {
		for _, list := range []protowire.Number{mmWaiting, mmNotNow, mmCompleted, mmFailed} {
			for _, f := range m[list] {
				c, err := parseMessage(f.bytes)
				if err != nil {
					s.cfg.problem("command", key, "%v", err)
					continue
				}
				if (list == mmCompleted || list == mmFailed) && !s.cfg.keeps(cmp.Or(c.time(5), s.at)) {
					continue
				}
				if record, ok := s.cfg.readCommand(c.text(1), c.bytes(2), s.at); ok {
					if err := yield(record); err != nil {
						return err
					}
				}
			}
		}
		return nil
	})
}

// queue gives the queue of a channel in the order of the source. The source
// moves a command to the end when it sends it, so that one that was sent and
// not answered is really the first; nothing says whether there is one.
func (s *microMDM) queue(c *storage.ChannelRecord, key string) {
	value := s.get(mmCommands, key)
	if value == nil {
		return
	}
	m, err := parseMessage(value)
	if err != nil {
		return // Commands reported it
	}
	add := func(list protowire.Number, state storage.State) {
		for _, f := range m[list] {
			command, err := parseMessage(f.bytes)
			if err != nil {
				continue
			}
			item := storage.ItemRecord{CommandUUID: command.text(1), State: state, CreatedAt: s.at}
			if _, err := mdm.DecodeCommand(command.bytes(2)); err != nil {
				continue // Commands reported it
			}
			if state == storage.NotNow {
				item.NotNowCount, item.NotNowAt = 1, s.at
			}
			if state.Terminal() {
				if item.FinishedAt = cmp.Or(command.time(5), s.at); !s.cfg.keeps(item.FinishedAt) {
					continue
				}
			}
			c.Queue = append(c.Queue, item)
		}
	}
	add(mmCompleted, storage.Acknowledged)
	add(mmFailed, storage.Failed)
	add(mmWaiting, storage.Queued)
	add(mmNotNow, storage.NotNow)
}

// index reads what is needed for every device: users, and certificates by hash.
func (s *microMDM) index(ctx context.Context) error {
	s.users, s.owner, s.certs = make(map[string][]mmUser), make(map[string]string), make(map[string][]byte)
	if m, err := parseMessage(s.get(mmConfig, "config")); err == nil {
		if cert := parsePEM(m.bytes(1)); cert != nil {
			s.topic, _ = cryptoutil.PushTopic(cert) // PushCerts reports one without
		}
	}
	byUUID := make(map[string]mmUser)
	err := s.each(ctx, mmUsers, "", "user", func(key string, m message) error {
		u := mmUser{m.text(2), m.text(3), m.text(4), m.text(5)}
		if u.udid != "" && u.id != "" { // others were made through the API
			byUUID[key] = u
			s.users[u.udid] = append(s.users[u.udid], u)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, u := range byUUID {
		if of, ok := byUUID[string(s.get(mmUserIdx, u.id))]; ok {
			s.owner[u.id] = of.udid
		}
	}
	for _, list := range s.users {
		slices.SortFunc(list, func(a, b mmUser) int { return strings.Compare(a.id, b.id) })
	}
	if b := s.tx.Bucket([]byte(mmSCEP)); b != nil {
		return b.ForEach(func(k, v []byte) error {
			if parseDER(v) != nil && string(k) != "ca_certificate" {
				s.certs[hashOf(v)] = bytes.Clone(k)
			}
			return nil
		})
	}
	return nil
}

// Devices gives devices by MicroMDM's own key, and behind them user
// enrollments, which it knows by their push tokens only.
func (s *microMDM) Devices(ctx context.Context, after string, yield func(*storage.DeviceRecord) error) error {
	if err := s.index(ctx); err != nil {
		return fmt.Errorf("reading users: %w", err)
	}
	from := string(s.get(mmDeviceIdx, after))
	if after == "" || from != "" {
		err := s.each(ctx, mmDevices, from, "device", func(key string, m message) error {
			if m.text(2) == "" {
				return nil // of the ADE inventory
			}
			if current := s.get(mmDeviceIdx, m.text(2)); current != nil && string(current) != key {
				s.cfg.note("device", key, "there is a newer record of the device %s, which counts", m.text(2))
				return nil
			}
			if d := s.device(m); d != nil {
				return yield(d)
			}
			return nil
		})
		if err != nil {
			return err
		}
		after = ""
	}
	return s.each(ctx, mmPush, after, "push token", func(key string, m message) error {
		switch {
		case key == mdm.SharediPadUserID:
			s.cfg.problem("push token", key, "the users of all Shared iPads share it: each is known again after its next TokenUpdate")
		case s.get(mmDeviceIdx, key) != nil, s.get(mmUserIdx, key) != nil:
		default:
			if d := s.userEnrollment(key, m); d != nil {
				return yield(d)
			}
		}
		return nil
	})
}

func (s *microMDM) device(m message) *storage.DeviceRecord {
	udid := m.text(2)
	if why := checkID(udid, ""); why != "" {
		s.cfg.problem("device", udid, "%s", why)
		return nil
	}
	d := &storage.DeviceRecord{SerialNumber: m.text(3), OSVersion: m.text(4), BuildVersion: m.text(5), ProductName: m.text(6), IMEI: m.text(7), MEID: m.text(8),
		DeviceName: m.text(15), Model: m.text(16), ModelName: m.text(17)}
	c := &d.Channel
	c.ID, c.Type, c.Topic, c.LastSeenAt = udid, mdm.Device, s.topic, m.time(28)
	c.AwaitingConfiguration = m.truth(14)
	c.OperatorDisabled = s.get(mmRemove, udid) != nil
	if c.OperatorDisabled {
		s.cfg.note("device", udid, "it is blocked there and disabled here: nanoctl enable lets it in again")
	}
	pushable := s.push(c, "device", udid, s.get(mmPush, udid))
	c.Enabled = m.truth(13) && pushable
	if m.truth(13) && !pushable {
		s.cfg.note("device", udid, "it is enrolled and has no push token: it is disabled until its next TokenUpdate")
	}
	at := cmp.Or(c.LastSeenAt, s.at)
	s.enable(c, at)
	if unlock, err := hex.DecodeString(m.text(12)); err != nil {
		s.cfg.note("device", udid, "its unlock token is not hexadecimal and is left out")
	} else if len(unlock) > 0 {
		d.UnlockToken = storage.Token{Value: unlock, At: at}
	}
	if token := m.bytes(30); len(token) > 0 {
		d.BootstrapToken = storage.Token{Value: s.bootstrap(udid, token), At: at}
	}
	s.synthesize(d, at)
	s.pin(d)
	s.queue(c, udid)
	for _, u := range s.users[udid] {
		if record := s.user(d, u); record != nil {
			d.Users = append(d.Users, *record)
		}
	}
	return d
}

// enable says when a channel that is active was enrolled, as far as is known.
func (s *microMDM) enable(c *storage.ChannelRecord, at time.Time) {
	if c.Enabled {
		c.Tally, c.TokenAt, c.EnrolledAt = 1, at, at
	}
}

// push reads how a channel is pushed to.
func (s *microMDM) push(c *storage.ChannelRecord, kind, key string, value []byte) bool {
	if value == nil {
		return false
	}
	m, err := parseMessage(value)
	if err != nil {
		s.cfg.problem(kind, key, "its push token: %v", err)
		return false
	}
	token, err := hex.DecodeString(m.text(2))
	if err != nil || len(token) == 0 {
		s.cfg.problem(kind, key, "its push token is not hexadecimal")
		return false
	}
	c.Token, c.PushMagic, c.Topic = token, m.text(3), m.text(4)
	return true
}

// bootstrap reads a token, which older releases kept in base64.
func (s *microMDM) bootstrap(udid string, token []byte) []byte {
	const shortest = 40
	if len(token) < shortest {
		return token
	}
	decoded, err := base64.StdEncoding.DecodeString(string(token))
	if err != nil {
		return token
	}
	s.cfg.note("device", udid, "its bootstrap token looks like base64 and is decoded")
	return decoded
}

func (s *microMDM) pin(d *storage.DeviceRecord) {
	sum := s.get(mmPins, d.Channel.ID)
	if sum == nil {
		return
	}
	hash := checkHash(hex.EncodeToString(sum))
	if hash == "" {
		s.cfg.problem("pin", d.Channel.ID, "it is not the hash of a certificate")
		return
	}
	pin := storage.PinRecord{SHA256: hash, CreatedAt: cmp.Or(d.Channel.LastSeenAt, s.at)}
	if key, ok := s.certs[hash]; ok {
		pin.Certificate = bytes.Clone(s.get(mmSCEP, string(key)))
		pin.NotAfter = parseDER(pin.Certificate).NotAfter
	}
	d.Pins = append(d.Pins, pin)
}

func (s *microMDM) user(d *storage.DeviceRecord, u mmUser) *storage.UserRecord {
	key := u.udid + ":" + u.id
	switch why := checkID(u.udid, u.id); {
	case u.id == mdm.SharediPadUserID:
		s.cfg.problem("user", key, "the users of all Shared iPads share one record: each is known again after its next TokenUpdate")
		return nil
	case why != "":
		s.cfg.problem("user", key, "%s", why)
		return nil
	case s.owner[u.id] != "" && s.owner[u.id] != u.udid:
		s.cfg.problem("user", key, "the record of its push token is that of a user of %s: it is known again after its next TokenUpdate", s.owner[u.id])
		return nil
	}
	record := &storage.UserRecord{UserID: u.id, UserShortName: u.short, UserLongName: u.long}
	c := &record.Channel
	c.ID, c.Type = key, mdm.User
	if !s.push(c, "user", key, s.get(mmPush, u.id)) {
		return nil
	}
	c.Enabled = d.Channel.Enabled
	c.LastSeenAt = d.Channel.LastSeenAt
	s.enable(c, cmp.Or(c.LastSeenAt, s.at))
	record.TokenUpdate = storage.Checkin{Raw: synthesized("TokenUpdate", tokenUpdateOf(c, map[string]any{"UDID": u.udid, "UserID": u.id, "UserShortName": u.short, "UserLongName": u.long})), At: c.TokenAt}
	s.queue(c, u.id)
	return record
}

// userEnrollment is a device that is known by its EnrollmentID.
func (s *microMDM) userEnrollment(id string, m message) *storage.DeviceRecord {
	if why := checkID(id, ""); why != "" {
		s.cfg.problem("device", id, "%s", why)
		return nil
	}
	d := new(storage.DeviceRecord)
	c := &d.Channel
	c.ID, c.Type, c.LastSeenAt = id, mdm.UserEnrollmentDevice, s.at
	c.Enabled = s.push(c, "device", id, s.get(mmPush, id))
	s.enable(c, s.at)
	s.synthesize(d, s.at)
	s.pin(d)
	s.queue(c, id)
	return d
}

// Left counts the parts of the file that are not moved.
func (s *microMDM) Left(context.Context) (left []Left, err error) {
	for _, part := range []struct{ bucket, what string }{
		{"mdm.DEPToken", "entries of ADE tokens"}, {"mdm.DEPAutoAssign", "ADE assignments"}, {"mdm.Profile", "profiles"},
		{"mdm.Blueprint", "blueprints"}, {mmSCEP, "entries of the SCEP CA"}, {"scep_challenges", "unused SCEP challenges"},
	} {
		if b := s.tx.Bucket([]byte(part.bucket)); b != nil {
			if n := b.Stats().KeyN; n > 0 {
				left = append(left, Left{part.what, int64(n)})
			}
		}
	}
	return left, nil
}
