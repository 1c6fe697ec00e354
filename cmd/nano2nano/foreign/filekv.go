package foreign

import (
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

// fileKV reads NanoMDM's filekv store, and NanoHUB's file store, which has one
// in its directory mdm. A value is a file; its name is the key and it lies in
// two levels of directories named by the first bytes of the key.
type fileKV struct {
	cfg   Config
	dir   string
	left  []Left
	users map[string][]string // user channels by device

	listed string   // the directory of names
	names  []string // sorted
}

func openFileKV(cfg Config) (Source, error) {
	s := &fileKV{cfg: cfg, dir: cfg.DSN}
	if hub := filepath.Join(cfg.DSN, "mdm"); isDir(hub) && !isDir(filepath.Join(cfg.DSN, "devices")) {
		s.dir = hub
		for sub, what := range map[string]string{"dm": "files of declarations (KMFDDM)", "cmd": "files of workflows (NanoCMD)",
			"subsys-fvkey": "files of FileVault recovery keys (export them)", "subsys-inventory": "files of inventory",
			"subsys-profile": "files of profiles", "subsys-cmdplan": "files of command plans"} {
			if n := countFiles(filepath.Join(cfg.DSN, sub)); n > 0 {
				s.left = append(s.left, Left{what, n})
			}
		}
		slices.SortFunc(s.left, func(a, b Left) int { return strings.Compare(a.What, b.What) })
	}
	if !isDir(filepath.Join(s.dir, "devices")) || !isDir(filepath.Join(s.dir, "enrollments")) {
		return nil, fmt.Errorf("opening the source: %w: %s has no directories devices and enrollments", errForeign, s.dir)
	}
	return s, nil
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

func countFiles(dir string) (n int64) {
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			n++
		}
		return nil
	})
	return n
}

func (s *fileKV) String() string { return "NanoMDM's filekv store in " + s.dir }

func (s *fileKV) Close() error { return nil }

func (s *fileKV) Left(context.Context) ([]Left, error) { return s.left, nil }

// path is where a key lies. Directories of push certificates are those of the
// topic without its usual beginning.
func (s *fileKV) path(bucket, key string) string {
	short := key
	if bucket == "push_cert" {
		short = strings.TrimPrefix(key, "com.apple.mgmt.External.")
	}
	for len(short) < 4 {
		short = "0" + short
	}
	return filepath.Join(s.dir, bucket, short[:2], short[2:4], key)
}

// value reads a file; there is none if it does not exist.
func (s *fileKV) value(bucket, key string) (value []byte, at time.Time, ok bool) {
	path := s.path(bucket, key)
	info, err := os.Stat(path)
	if err != nil || !info.Mode().IsRegular() {
		return nil, time.Time{}, false
	}
	value, err = os.ReadFile(path)
	if err != nil {
		s.cfg.problem("file", bucket+"/"+key, "%v", withoutPath(err))
		return nil, time.Time{}, false
	}
	return value, info.ModTime().UTC(), true
}

func withoutPath(err error) error {
	var path *fs.PathError
	if errors.As(err, &path) {
		return path.Err
	}
	return err
}

func (s *fileKV) text(bucket, key string) string {
	value, _, _ := s.value(bucket, key)
	return strings.TrimSpace(string(value))
}

// micros reads a time.
func (s *fileKV) micros(bucket, key string) time.Time {
	n, err := strconv.ParseInt(s.text(bucket, key), 10, 64)
	if err != nil || n <= 0 {
		return time.Time{}
	}
	return time.UnixMicro(n).UTC()
}

// keys gives the keys of a bucket that end in a suffix, without it, sorted
// directory by directory.
func (s *fileKV) keys(bucket, suffix, after string, yield func(id string) error) error {
	root := filepath.Join(s.dir, bucket)
	if !isDir(root) {
		return nil
	}
	skipping := after != ""
	var afterDir string
	if skipping {
		afterDir = filepath.Dir(s.path(bucket, after+suffix))
	}
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			s.cfg.problem("directory", path, "%v", withoutPath(err))
			return nil
		}
		if d.IsDir() {
			return nil
		}
		if skipping {
			if c := strings.Compare(filepath.Dir(path), afterDir); c < 0 || c == 0 && d.Name() <= after+suffix {
				return nil
			}
			skipping = false
		}
		if id, ok := strings.CutSuffix(d.Name(), suffix); ok && s.path(bucket, d.Name()) == path {
			return yield(id)
		}
		return nil
	})
}

func (s *fileKV) Count(context.Context) (c Counts, err error) {
	err = errors.Join(
		s.keys("devices", ".auth", "", func(string) error { c.Devices++; return nil }),
		s.keys("queue", ".raw", "", func(string) error { c.Commands++; return nil }))
	return c, err
}

func (s *fileKV) PushCerts(_ context.Context, yield func(storage.PushCert) error) error {
	return s.keys("push_cert", ".pem", "", func(topic string) error {
		cert, _, _ := s.value("push_cert", topic+".pem")
		key, _, _ := s.value("push_cert", topic+".key")
		if c, ok := s.cfg.pushCert(topic, cert, key); ok {
			return yield(c)
		}
		return nil
	})
}

func (s *fileKV) Commands(ctx context.Context, after string, yield func(storage.CommandRecord) error) error {
	return s.keys("queue", ".raw", after, func(uuid string) error {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		raw, at, ok := s.value("queue", uuid+".raw")
		if !ok {
			return nil
		}
		if c, ok := s.cfg.readCommand(uuid, raw, at); ok {
			return yield(c)
		}
		return nil
	})
}

// findUsers reads which user channels each device has. The names of these keys
// hold two ids, of which the second begins with the first.
func (s *fileKV) findUsers() error {
	s.users = make(map[string][]string)
	err := s.keys("users", ".device_ch", "", func(uid string) error {
		s.users[s.text("users", uid+".device_ch")] = append(s.users[s.text("users", uid+".device_ch")], uid)
		return nil
	})
	for _, list := range s.users {
		slices.Sort(list)
	}
	return err
}

func (s *fileKV) Devices(ctx context.Context, after string, yield func(*storage.DeviceRecord) error) error {
	if err := s.findUsers(); err != nil {
		return fmt.Errorf("reading user channels: %w", err)
	}
	return s.keys("devices", ".auth", after, func(id string) error {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if why := checkID(id, ""); why != "" {
			s.cfg.problem("device", id, "%s", why)
			return nil
		}
		d := s.device(id)
		if d == nil {
			return nil
		}
		for _, uid := range s.users[id] {
			if u := s.user(d, uid); u != nil {
				d.Users = append(d.Users, *u)
			}
		}
		return yield(d)
	})
}

func (s *fileKV) device(id string) *storage.DeviceRecord {
	d := new(storage.DeviceRecord)
	d.Authenticate.Raw, d.Authenticate.At, _ = s.value("devices", id+".auth")
	d.TokenUpdate.Raw, d.TokenUpdate.At, _ = s.value("devices", id+".tok_upd")
	d.SerialNumber = s.text("devices", id+".serial")
	d.BootstrapToken.Value, d.BootstrapToken.At, _ = s.value("devices", id+".bstoken")
	d.UnlockToken.Value, d.UnlockToken.At, _ = s.value("enrollments", id+".unl_tok")
	d.Channel.ID = id
	if !describe(d) {
		s.cfg.note("device", id, "its Authenticate message cannot be read; it is kept as it is")
	}
	if !s.channel(&d.Channel, d.TokenUpdate, false) {
		return nil
	}
	if d.Channel.Type == "" {
		d.Channel.Type = channelType(d.Authenticate.Raw, false, false)
	}
	cert, certAt, _ := s.value("devices", id+".cert")
	if len(cert) > 0 {
		d.Pins = append(d.Pins, certPin(cert, certAt))
	}
	if hash := checkHash(s.text("cert_auth", id+".cert_hash")); hash != "" {
		_, at, _ := s.value("cert_auth", id+".cert_hash")
		d.Pins = currentPin(d.Pins, hash, at)
	}
	return d
}

// certPin is the pin of a certificate. Its bytes are kept if they are one.
func certPin(der []byte, at time.Time) storage.PinRecord {
	pin := storage.PinRecord{SHA256: hashOf(der), CreatedAt: at}
	if cert := parseDER(der); cert != nil {
		pin.Certificate, pin.NotAfter = der, cert.NotAfter
	}
	return pin
}

// currentPin makes the certificate of a hash the one that counts, and retires
// the others.
func currentPin(pins []storage.PinRecord, hash string, at time.Time) []storage.PinRecord {
	if len(pins) == 0 || pins[0].SHA256 != hash {
		for i := range pins {
			pins[i].RetiredAt = at
		}
		pins = append(pins, storage.PinRecord{SHA256: hash, CreatedAt: at})
	}
	return pins
}

// channel reads what devices and user channels have in common.
func (s *fileKV) channel(c *storage.ChannelRecord, update storage.Checkin, user bool) bool {
	id := c.ID
	c.Type = mdm.EnrollType(s.text("enrollments", id+".type"))
	if c.Type != "" && !knownType(c.Type, user) {
		s.cfg.problem("enrollment", id, "the type %q is none of this channel", c.Type)
		return false
	}
	_, _ = ofTokenUpdate(c, update.Raw)
	c.Topic = cmp.Or(s.text("enrollments", id+".topic"), c.Topic)
	c.PushMagic = cmp.Or(s.text("enrollments", id+".push_magic"), c.PushMagic)
	token, tokenAt, ok := s.value("enrollments", id+".token")
	if ok {
		c.Token, c.TokenAt = token, tokenAt
	}
	_, disabledAt, disabled := s.value("enrollments", id+".disabled")
	c.Enabled = ok && !disabled
	c.Tally, _ = strconv.Atoi(s.text("enrollments", id+".tok_tal"))
	c.EnrolledAt = s.micros("enrollments", id+".enrolled_at")
	c.LastSeenAt = cmp.Or(s.micros("enrollments", id+".last_seen_at"), latest(update.At, disabledAt))
	s.queue(c)
	return true
}

func (s *fileKV) user(d *storage.DeviceRecord, uid string) *storage.UserRecord {
	u := new(storage.UserRecord)
	name, ok := strings.CutPrefix(uid, d.Channel.ID+":")
	if !ok || checkID(d.Channel.ID, name) != "" {
		s.cfg.problem("user", uid, "the id is none of a user channel")
		return nil
	}
	u.Channel.ID, u.UserID = uid, name
	u.TokenUpdate.Raw, u.TokenUpdate.At, _ = s.value("users", uid+".tok_upd")
	u.UserAuthenticate.Raw, u.UserAuthenticate.At, _ = s.value("users", uid+".user_auth")
	if digest, at, ok := s.value("users", uid+".user_auth_digest"); ok {
		u.UserAuthenticateDiscarded = len(u.UserAuthenticate.Raw) > 0
		u.UserAuthenticate = storage.Checkin{Raw: digest, At: at}
	}
	if !s.channel(&u.Channel, u.TokenUpdate, true) {
		return nil
	}
	if u.Channel.Type == "" {
		u.Channel.Type = channelType(u.TokenUpdate.Raw, true, d.Channel.Type == mdm.UserEnrollmentDevice)
	}
	// Disabling a device did not reliably disable its users.
	u.Channel.Enabled = u.Channel.Enabled && d.Channel.Enabled
	nameOf(u)
	return u
}

// nameOf copies a user's names from what it sent.
func nameOf(u *storage.UserRecord) {
	for _, raw := range [][]byte{u.TokenUpdate.Raw, u.UserAuthenticate.Raw} {
		if _, m, ok := resolved(raw); ok {
			who := m.Identity()
			u.UserID = cmp.Or(who.UserID, who.EnrollmentUserID, u.UserID)
			u.UserShortName, u.UserLongName = who.UserShortName, who.UserLongName
			return
		}
	}
}

// queue walks the list of waiting commands and finds those that have ended.
// The list may be broken: links are lost when two were queued at once.
func (s *fileKV) queue(c *storage.ChannelRecord) {
	reached := make(map[string]bool)
	for uuid := s.text("queue", c.ID+".queuekey.queue.first"); uuid != "" && !reached[uuid]; {
		reached[uuid] = true
		if item, ok := s.item(c, uuid); ok {
			c.Queue = append(c.Queue, item)
		}
		uuid = s.text("queue", c.ID+"."+uuid+".queueitem.next")
	}
	found := make(map[string]bool)
	var ended []storage.ItemRecord
	for _, rest := range s.withPrefix(filepath.Dir(s.path("queue", c.ID+".")), c.ID+".") {
		uuid, _, ok := strings.Cut(rest, ".queueitem.")
		if !ok || found[uuid] || reached[uuid] {
			continue
		}
		found[uuid] = true
		if _, _, ok := s.value("queue", uuid+".raw"); !ok {
			continue // or the key is one of another id with a dot
		}
		item, ok := s.item(c, uuid)
		switch {
		case !ok:
		case !item.State.Terminal():
			s.cfg.problem("queue", c.ID+" "+uuid, "it has lost its place in the queue: queue it again if it is still wanted")
		case s.cfg.keeps(item.FinishedAt):
			ended = append(ended, item)
		}
	}
	slices.SortFunc(ended, func(a, b storage.ItemRecord) int {
		return cmp.Or(a.FinishedAt.Compare(b.FinishedAt), strings.Compare(a.CommandUUID, b.CommandUUID))
	})
	c.Queue = append(ended, c.Queue...)
}

// withPrefix lists the files of a directory whose names have a prefix, without
// it. Channels of one directory follow each other, so it is read once.
func (s *fileKV) withPrefix(dir, prefix string) (rest []string) {
	if s.listed != dir {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			s.cfg.problem("directory", dir, "%v", withoutPath(err))
		}
		s.listed, s.names = dir, nil
		for _, entry := range entries {
			s.names = append(s.names, entry.Name())
		}
	}
	at, _ := slices.BinarySearch(s.names, prefix)
	for _, name := range s.names[at:] {
		after, ok := strings.CutPrefix(name, prefix)
		if !ok {
			break
		}
		rest = append(rest, after)
	}
	return rest
}

func (s *fileKV) item(c *storage.ChannelRecord, uuid string) (storage.ItemRecord, bool) {
	_, at, ok := s.value("queue", uuid+".raw")
	item := storage.ItemRecord{CommandUUID: uuid, State: storage.Queued, CreatedAt: at}
	status, statusAt, _ := s.value("queue", c.ID+"."+uuid+".queueitem.status")
	switch word := strings.TrimSpace(string(status)); {
	case word == "":
	case mdm.Status(word) == mdm.StatusNotNow:
		item.State, item.NotNowCount, item.NotNowAt = storage.NotNow, 1, statusAt
	default:
		item.State, _ = stateOf(word)
		report, reportAt, _ := s.value("queue", c.ID+"."+uuid+".queueitem.report")
		item.FinishedAt = latest(statusAt, reportAt)
		item.Result = &storage.CommandResult{Status: word, CreatedAt: item.FinishedAt, Raw: report}
	}
	if !ok && !item.State.Terminal() {
		s.cfg.problem("queue", c.ID+" "+uuid, "its command is not there")
		return item, false
	}
	return item, true
}
