package foreign

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

// fileSource reads NanoMDM's file store: a directory for each enrollment, with
// its queue in four directories.
type fileSource struct {
	cfg   Config
	root  *os.Root
	dir   string
	hosts []string                 // directories of devices, sorted
	users map[string][]string      // directories of user channels by device
	pins  map[string][]string      // hashes by device, in order, from CertAuth.txt
	seen  map[string]commandSource // commands by CommandUUID
}

type commandSource struct {
	path string
	at   time.Time
}

// The directories of a queue.
var queueDirs = []string{"QueueDone", "QueueInactive", "Queue", "QueueNotNow"}

func openFile(cfg Config) (Source, error) {
	root, err := os.OpenRoot(cfg.DSN)
	if err != nil {
		return nil, fmt.Errorf("opening the source: %w", err)
	}
	s := &fileSource{cfg: cfg, root: root, dir: cfg.DSN, users: make(map[string][]string), pins: make(map[string][]string), seen: make(map[string]commandSource)}
	if err := s.list(); err != nil {
		return nil, errors.Join(fmt.Errorf("opening the source: %w", err), root.Close())
	}
	return s, nil
}

func (s *fileSource) String() string { return "NanoMDM's file store in " + s.dir }

func (s *fileSource) Close() error { return s.root.Close() }

func (s *fileSource) Left(context.Context) ([]Left, error) { return nil, nil }

// list finds the enrollments. A directory without an Authenticate message is
// that of a user channel, whose name begins with its device's.
func (s *fileSource) list() error {
	entries, err := fs.ReadDir(s.root.FS(), ".")
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if !entry.IsDir() {
			continue
		}
		name := entry.Name()
		if s.exists(name, "Authenticate.plist") {
			s.hosts = append(s.hosts, name)
			continue
		}
		device, _, ok := strings.Cut(name, ":")
		if !ok {
			s.cfg.problem("directory", name, "it is neither that of a device nor that of a user channel")
			continue
		}
		s.users[device] = append(s.users[device], name)
	}
	if len(s.hosts) == 0 && len(entries) > 0 && !s.exists("CertAuth.txt") {
		return fmt.Errorf("%w: no directory has an Authenticate.plist", errForeign)
	}
	return s.readPins()
}

func (s *fileSource) exists(parts ...string) bool {
	info, err := s.root.Stat(filepath.Join(parts...))
	return err == nil && info.Mode().IsRegular()
}

// readPins reads which certificates were ever associated.
func (s *fileSource) readPins() error {
	f, err := s.root.Open("CertAuth.txt")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for n := 1; lines.Scan(); n++ {
		at := strings.LastIndexByte(lines.Text(), ',')
		if at < 0 {
			continue
		}
		id, hash := lines.Text()[:at], checkHash(lines.Text()[at+1:])
		if hash == "" {
			s.cfg.problem("pin", fmt.Sprintf("CertAuth.txt line %d", n), "it is not the hash of a certificate")
			continue
		}
		s.pins[id] = append(s.pins[id], hash)
	}
	return lines.Err()
}

func (s *fileSource) value(parts ...string) ([]byte, time.Time, bool) {
	name := filepath.Join(parts...)
	info, err := s.root.Stat(name)
	if err != nil {
		return nil, time.Time{}, false
	}
	value, err := s.root.ReadFile(name)
	if err != nil {
		s.cfg.problem("file", name, "%v", withoutPath(err))
		return nil, time.Time{}, false
	}
	return value, info.ModTime().UTC(), true
}

func (s *fileSource) checkin(parts ...string) storage.Checkin {
	raw, at, _ := s.value(parts...)
	return storage.Checkin{Raw: raw, At: at}
}

func (s *fileSource) token(parts ...string) storage.Token {
	value, at, _ := s.value(parts...)
	return storage.Token{Value: value, At: at}
}

func (s *fileSource) Count(context.Context) (c Counts, err error) {
	c.Devices = int64(len(s.hosts))
	return c, nil
}

func (s *fileSource) PushCerts(_ context.Context, yield func(storage.PushCert) error) error {
	names, err := fs.Glob(s.root.FS(), "*.pem")
	if err != nil {
		return err
	}
	for _, name := range names {
		topic := strings.TrimSuffix(name, ".pem")
		cert, _, _ := s.value(name)
		key, _, _ := s.value(topic + ".key")
		if c, ok := s.cfg.pushCert(topic, cert, key); ok {
			if err := yield(c); err != nil {
				return err
			}
		}
	}
	return nil
}

// Commands gives each command once; the store has a copy for each enrollment.
func (s *fileSource) Commands(ctx context.Context, after string, yield func(storage.CommandRecord) error) error {
	if len(s.seen) == 0 {
		if err := s.findCommands(ctx); err != nil {
			return err
		}
	}
	uuids := make([]string, 0, len(s.seen))
	for uuid := range s.seen {
		if uuid > after {
			uuids = append(uuids, uuid)
		}
	}
	slices.Sort(uuids)
	for _, uuid := range uuids {
		raw, _, ok := s.value(s.seen[uuid].path)
		if !ok {
			continue
		}
		if c, ok := s.cfg.readCommand(uuid, raw, s.seen[uuid].at); ok {
			if err := yield(c); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *fileSource) findCommands(ctx context.Context) error {
	for _, host := range s.hosts {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		for _, dir := range append([]string{host}, s.users[host]...) {
			for _, sub := range queueDirs {
				for _, f := range s.queueFiles(dir, sub) {
					if was, ok := s.seen[f.uuid]; !ok || f.at.Before(was.at) {
						s.seen[f.uuid] = commandSource{filepath.Join(dir, sub, f.uuid+".plist"), f.at}
					}
				}
			}
		}
	}
	return nil
}

type queueFile struct {
	uuid string
	at   time.Time
}

// queueFiles lists the commands of a directory by the time when they were
// queued, which moving a file does not change.
func (s *fileSource) queueFiles(dir, sub string) (files []queueFile) {
	entries, err := fs.ReadDir(s.root.FS(), filepath.ToSlash(filepath.Join(dir, sub)))
	if err != nil {
		return nil
	}
	for _, entry := range entries {
		uuid, ok := strings.CutSuffix(entry.Name(), ".plist")
		if !ok || strings.HasSuffix(uuid, ".result") {
			continue
		}
		info, err := entry.Info()
		if err != nil {
			s.cfg.problem("queue", filepath.Join(dir, sub, entry.Name()), "%v", withoutPath(err))
			continue
		}
		files = append(files, queueFile{uuid, info.ModTime().UTC()})
	}
	slices.SortFunc(files, func(a, b queueFile) int { return cmp.Or(a.at.Compare(b.at), strings.Compare(a.uuid, b.uuid)) })
	return files
}

func (s *fileSource) queue(c *storage.ChannelRecord, dir string) {
	var waiting []storage.ItemRecord
	for _, sub := range queueDirs {
		for _, f := range s.queueFiles(dir, sub) {
			item := storage.ItemRecord{CommandUUID: f.uuid, CreatedAt: f.at}
			report, at, _ := s.value(dir, sub, f.uuid+".result.plist")
			switch sub {
			case "QueueNotNow":
				item.State, item.NotNowCount, item.NotNowAt = storage.NotNow, 1, at
			case "Queue":
				item.State = storage.Queued
			case "QueueInactive":
				item.State, item.FinishedAt = storage.Cancelled, f.at
			default:
				s.ended(&item, dir, report, at)
			}
			switch {
			case !item.State.Terminal():
				waiting = append(waiting, item)
			case s.cfg.keeps(item.FinishedAt):
				c.Queue = append(c.Queue, item)
			}
		}
	}
	slices.SortStableFunc(waiting, func(a, b storage.ItemRecord) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), strings.Compare(a.CommandUUID, b.CommandUUID))
	})
	c.Queue = append(c.Queue, waiting...)
}

// ended reads the report of a command in QueueDone.
func (s *fileSource) ended(item *storage.ItemRecord, dir string, raw []byte, at time.Time) {
	status := string(mdm.StatusAcknowledged)
	if report, err := mdm.DecodeReport(raw); err == nil {
		status = string(report.Status)
	} else {
		s.cfg.note("queue", dir+" "+item.CommandUUID, "its report cannot be read; it counts as acknowledged")
	}
	item.State, _ = stateOf(status)
	item.FinishedAt = latest(at, item.CreatedAt)
	item.Result = &storage.CommandResult{Status: status, CreatedAt: item.FinishedAt, Raw: raw}
}

func (s *fileSource) Devices(ctx context.Context, after string, yield func(*storage.DeviceRecord) error) error {
	for _, id := range s.hosts {
		if id <= after {
			continue
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if why := checkID(id, ""); why != "" {
			s.cfg.problem("device", id, "%s", why)
			continue
		}
		d := s.device(id)
		for _, uid := range s.users[id] {
			if u := s.user(d, uid); u != nil {
				d.Users = append(d.Users, *u)
			}
		}
		if err := yield(d); err != nil {
			return err
		}
	}
	return nil
}

func (s *fileSource) device(id string) *storage.DeviceRecord {
	d := &storage.DeviceRecord{Authenticate: s.checkin(id, "Authenticate.plist"), TokenUpdate: s.checkin(id, "TokenUpdate.plist"),
		UnlockToken: s.token(id, "UnlockToken.dat"), BootstrapToken: s.token(id, "BootstrapToken.dat")}
	serial, _, _ := s.value(id, "SerialNumber.txt")
	d.SerialNumber = string(bytes.TrimSpace(serial))
	d.Channel.ID = id
	if !describe(d) {
		s.cfg.note("device", id, "its Authenticate message cannot be read; it is kept as it is")
	}
	d.Channel.Type = channelType(d.Authenticate.Raw, false, false)
	s.channel(&d.Channel, id, d.TokenUpdate)
	s.pinsOf(d)
	return d
}

// pinsOf makes the certificate of CertAuth.sha256.txt the current one. Of the
// others only the order is known.
func (s *fileSource) pinsOf(d *storage.DeviceRecord) {
	id := d.Channel.ID
	text, at, _ := s.value(id, "CertAuth.sha256.txt")
	current := checkHash(string(text))
	pem, certAt, _ := s.value(id, "Identity.pem")
	identity := parsePEM(pem)
	if identity != nil && current == "" {
		current, at = hashOf(identity.Raw), certAt
	}
	if current == "" && len(s.pins[id]) > 0 {
		current, at = s.pins[id][len(s.pins[id])-1], d.Authenticate.At
	}
	if current == "" {
		return
	}
	known := map[string]bool{current: true}
	for _, old := range s.pins[id] {
		if !known[old] {
			known[old] = true
			d.Pins = append(d.Pins, storage.PinRecord{SHA256: old, CreatedAt: at, RetiredAt: at})
		}
	}
	if identity != nil && !known[hashOf(identity.Raw)] {
		d.Pins = append(d.Pins, storage.PinRecord{SHA256: hashOf(identity.Raw), CreatedAt: certAt, RetiredAt: at})
	}
	d.Pins = append(d.Pins, storage.PinRecord{SHA256: current, CreatedAt: at})
	for i := range d.Pins {
		if identity != nil && d.Pins[i].SHA256 == hashOf(identity.Raw) {
			d.Pins[i].Certificate, d.Pins[i].NotAfter = identity.Raw, identity.NotAfter
		}
	}
}

func (s *fileSource) channel(c *storage.ChannelRecord, dir string, update storage.Checkin) {
	_, ok := ofTokenUpdate(c, update.Raw)
	c.TokenAt = update.At
	tally, _, _ := s.value(dir, "TokenUpdate.tally.txt")
	c.Tally, _ = strconv.Atoi(string(bytes.TrimSpace(tally)))
	disabled := s.exists(dir, "Disabled")
	c.Enabled = ok && !disabled
	if c.Enabled && c.Tally == 0 {
		c.Tally = 1
	}
	c.LastSeenAt = s.newest(dir)
	if c.Enabled {
		c.EnrolledAt = update.At
	}
	s.queue(c, dir)
}

// newest is when something of an enrollment last changed.
func (s *fileSource) newest(dir string) (t time.Time) {
	entries, err := fs.ReadDir(s.root.FS(), dir)
	if err != nil {
		return t
	}
	for _, entry := range entries {
		if info, err := entry.Info(); err == nil {
			t = latest(t, info.ModTime().UTC())
		}
	}
	return t
}

func (s *fileSource) user(d *storage.DeviceRecord, uid string) *storage.UserRecord {
	name := strings.TrimPrefix(uid, d.Channel.ID+":")
	if why := checkID(d.Channel.ID, name); why != "" {
		s.cfg.problem("user", uid, "%s", why)
		return nil
	}
	u := &storage.UserRecord{UserID: name, TokenUpdate: s.checkin(uid, "TokenUpdate.plist"), UserAuthenticate: s.checkin(uid, "UserAuthenticate.plist")}
	if digest := s.checkin(uid, "UserAuthenticate.Digest.plist"); len(digest.Raw) > 0 {
		u.UserAuthenticateDiscarded = len(u.UserAuthenticate.Raw) > 0
		u.UserAuthenticate = digest
	}
	u.Channel.ID = uid
	u.Channel.Type = channelType(first(u.TokenUpdate.Raw, u.UserAuthenticate.Raw), true, d.Channel.Type == mdm.UserEnrollmentDevice)
	s.channel(&u.Channel, uid, u.TokenUpdate)
	u.Channel.Enabled = u.Channel.Enabled && d.Channel.Enabled
	nameOf(u)
	return u
}
