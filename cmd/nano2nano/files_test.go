package main

import (
	"encoding/pem"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/storage"
)

// files writes a directory. A file's time is when what it says happened.
type files struct {
	t    testing.TB
	root string
}

func (f files) put(path string, value []byte, at time.Time) {
	f.t.Helper()
	path = filepath.Join(f.root, path)
	require.NoError(f.t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(f.t, os.WriteFile(path, value, 0o600))
	if !at.IsZero() {
		require.NoError(f.t, os.Chtimes(path, at, at))
	}
}

// kv writes a key of the filekv layout.
func (f files) kv(bucket, key string, value []byte, at time.Time) {
	f.t.Helper()
	short := key
	if bucket == "push_cert" {
		short = strings.TrimPrefix(key, "com.apple.mgmt.External.")
	}
	for len(short) < 4 {
		short = "0" + short
	}
	f.put(filepath.Join(bucket, short[:2], short[2:4], key), value, at)
}

// writeFileKV writes the fleet as NanoMDM's filekv store has it.
func (f files) writeFileKV(fl *fleet) {
	for _, dir := range []string{"users", "cert_auth", "queue", "push_cert", "devices", "enrollments"} {
		require.NoError(f.t, os.MkdirAll(filepath.Join(f.root, dir), 0o755))
	}
	f.kv("push_cert", fl.cert.Topic+".pem", fl.cert.CertPEM, begun)
	f.kv("push_cert", fl.cert.Topic+".key", fl.cert.KeyPEM, begun)
	for _, c := range fl.commands {
		f.kv("queue", c.UUID+".raw", c.Raw, c.CreatedAt)
		f.kv("queue", c.UUID+".req_type", []byte(c.RequestType), c.CreatedAt)
	}
	fl.channels(func(d *storage.DeviceRecord, u *storage.UserRecord, c *storage.ChannelRecord) {
		id := c.ID
		if u == nil {
			f.kv("devices", id+".auth", d.Authenticate.Raw, d.Authenticate.At)
			f.kv("devices", id+".serial", []byte(d.SerialNumber), d.Authenticate.At)
			if len(d.TokenUpdate.Raw) > 0 {
				f.kv("devices", id+".tok_upd", d.TokenUpdate.Raw, d.TokenUpdate.At)
			}
			if len(d.BootstrapToken.Value) > 0 {
				f.kv("devices", id+".bstoken", d.BootstrapToken.Value, d.BootstrapToken.At)
			}
			if len(d.UnlockToken.Value) > 0 {
				f.kv("enrollments", id+".unl_tok", d.UnlockToken.Value, d.UnlockToken.At)
			}
			for _, p := range d.Pins {
				f.kv("cert_auth", p.SHA256+".hash_cert", []byte(id), p.CreatedAt)
				if p.RetiredAt.IsZero() {
					f.kv("cert_auth", id+".cert_hash", []byte(p.SHA256), p.CreatedAt)
				}
				if p.Certificate != nil {
					f.kv("devices", id+".cert", p.Certificate, p.CreatedAt)
				}
			}
		} else {
			f.kv("users", id+".device_ch", []byte(d.Channel.ID), u.TokenUpdate.At)
			f.kv("users", id+".tok_upd", u.TokenUpdate.Raw, u.TokenUpdate.At)
			if len(u.UserAuthenticate.Raw) > 0 {
				f.kv("users", id+".user_auth", u.UserAuthenticate.Raw, u.UserAuthenticate.At)
			}
			f.kv("enrollments", d.Channel.ID+".user_ch."+id, []byte("1"), u.TokenUpdate.At)
		}
		if c.Token != nil {
			f.kv("enrollments", id+".type", []byte(c.Type), c.TokenAt)
			f.kv("enrollments", id+".topic", []byte(c.Topic), c.TokenAt)
			f.kv("enrollments", id+".push_magic", []byte(c.PushMagic), c.TokenAt)
			f.kv("enrollments", id+".token", c.Token, c.TokenAt)
			f.kv("enrollments", id+".tok_tal", []byte(strconv.Itoa(c.Tally)), c.TokenAt)
			if c.Enabled {
				f.kv("enrollments", id+".enrolled_at", []byte(strconv.FormatInt(c.EnrolledAt.UnixMicro(), 10)), c.TokenAt)
			} else {
				f.kv("enrollments", id+".disabled", []byte("1"), c.TokenAt)
			}
		}
		f.kv("enrollments", id+".last_seen_at", []byte(strconv.FormatInt(c.LastSeenAt.UnixMicro(), 10)), c.LastSeenAt)
		f.kvQueue(c)
	})
}

// kvQueue writes a queue: a list of what waits, and what has ended.
func (f files) kvQueue(c *storage.ChannelRecord) {
	var waiting []storage.ItemRecord
	for _, item := range c.Queue {
		key := c.ID + "." + item.CommandUUID + ".queueitem."
		switch {
		case item.State == storage.Cancelled: // cleared: nothing is left of it
		case item.Result != nil:
			f.kv("queue", key+"status", []byte(item.Result.Status), item.FinishedAt)
			f.kv("queue", key+"report", item.Result.Raw, item.FinishedAt)
		default:
			waiting = append(waiting, item)
			if item.State == storage.NotNow {
				f.kv("queue", key+"status", []byte("NotNow"), item.NotNowAt)
			}
		}
	}
	for i, item := range waiting {
		key := c.ID + "." + item.CommandUUID + ".queueitem."
		if i == 0 {
			f.kv("queue", c.ID+".queuekey.queue.first", []byte(item.CommandUUID), item.CreatedAt)
		} else {
			f.kv("queue", key+"prev", []byte(waiting[i-1].CommandUUID), item.CreatedAt)
		}
		if i == len(waiting)-1 {
			f.kv("queue", c.ID+".queuekey.queue.last", []byte(item.CommandUUID), item.CreatedAt)
		} else {
			f.kv("queue", key+"next", []byte(waiting[i+1].CommandUUID), item.CreatedAt)
		}
	}
}

// writeFile writes the fleet as NanoMDM's file store has it.
func (f files) writeFile(fl *fleet) {
	f.put(fl.cert.Topic+".pem", fl.cert.CertPEM, begun)
	f.put(fl.cert.Topic+".key", fl.cert.KeyPEM, begun)
	raw := make(map[string][]byte)
	for _, c := range fl.commands {
		raw[c.UUID] = c.Raw
	}
	var pins strings.Builder
	fl.channels(func(d *storage.DeviceRecord, u *storage.UserRecord, c *storage.ChannelRecord) {
		dir := c.ID + "/"
		if u == nil {
			f.put(dir+"Authenticate.plist", d.Authenticate.Raw, d.Authenticate.At)
			f.put(dir+"SerialNumber.txt", []byte(d.SerialNumber), d.Authenticate.At)
			for _, p := range d.Pins {
				pins.WriteString(c.ID + "," + p.SHA256 + "\n")
				if p.RetiredAt.IsZero() {
					f.put(dir+"CertAuth.sha256.txt", []byte(strings.ToUpper(p.SHA256)), p.CreatedAt)
				}
				if p.Certificate != nil {
					f.put(dir+"Identity.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.Certificate}), p.CreatedAt)
				}
			}
			for name, token := range map[string]storage.Token{"UnlockToken.dat": d.UnlockToken, "BootstrapToken.dat": d.BootstrapToken} {
				if len(token.Value) > 0 {
					f.put(dir+name, token.Value, token.At)
				}
			}
		} else {
			f.put(d.Channel.ID+"/SubEnrollments/"+c.ID, nil, u.TokenUpdate.At)
		}
		update := &d.TokenUpdate
		if u != nil {
			update = &u.TokenUpdate
			if len(u.UserAuthenticate.Raw) > 0 {
				f.put(dir+"UserAuthenticate.plist", u.UserAuthenticate.Raw, u.UserAuthenticate.At)
			}
		}
		if len(update.Raw) > 0 {
			f.put(dir+"TokenUpdate.plist", update.Raw, update.At)
			f.put(dir+"TokenUpdate.tally.txt", []byte(strconv.Itoa(c.Tally)), update.At)
			if !c.Enabled {
				f.put(dir+"Disabled", nil, update.At)
			}
		}
		for _, item := range c.Queue {
			sub := dir + map[storage.State]string{storage.Queued: "Queue", storage.NotNow: "QueueNotNow", storage.Cancelled: "QueueInactive"}[item.State]
			if item.Result != nil {
				sub = dir + "QueueDone"
				f.put(sub+"/"+item.CommandUUID+".result.plist", item.Result.Raw, item.FinishedAt)
			}
			if item.State == storage.NotNow {
				f.put(sub+"/"+item.CommandUUID+".result.plist", []byte("<plist/>"), item.NotNowAt)
			}
			f.put(sub+"/"+item.CommandUUID+".plist", raw[item.CommandUUID], item.CreatedAt)
		}
	})
	f.put("CertAuth.txt", []byte(pins.String()), begun)
}

// asFileKVKeeps is what the filekv store keeps of a device: one pin, and
// nothing of commands that were cleared.
func asFileKVKeeps(d *storage.DeviceRecord) *storage.DeviceRecord {
	kept := *d
	kept.Pins = nil
	for _, p := range d.Pins {
		if p.RetiredAt.IsZero() {
			kept.Pins = append(kept.Pins, p)
		}
	}
	kept.Users = append([]storage.UserRecord(nil), d.Users...)
	for _, c := range allChannels(&kept) {
		var queue []storage.ItemRecord
		for _, item := range c.Queue {
			if item.State == storage.Cancelled {
				continue
			}
			item.CreatedAt = begun.Add(time.Hour) // that of the command
			if item.State == storage.NotNow {
				item.NotNowCount = 1
			}
			queue = append(queue, item)
		}
		c.Queue = queue
	}
	return &kept
}

func TestMovesFileKV(t *testing.T) {
	f := newFleet(t, *enrollments)
	for _, hub := range []bool{false, true} {
		t.Run(map[bool]string{false: "NanoMDM", true: "NanoHUB"}[hub], func(t *testing.T) {
			dir := t.TempDir()
			root := dir
			if hub {
				root = filepath.Join(dir, "mdm")
				files{t, dir}.put("dm/declarations/dcl.x.payload", []byte("{}"), begun)
				files{t, dir}.put("subsys-fvkey/aa/key", []byte("key"), begun)
			}
			files{t, root}.writeFileKV(f)
			intoEach(t, "filekv", dir, nil, func(x *trial) {
				require.Zero(x.t, x.run(), "%s", x.out)
				x.holds(f, func(want, got *storage.DeviceRecord) string { return exactly(asFileKVKeeps(want), got) })
				if hub {
					require.Contains(x.t, x.out, "Left at the source: 1 files of declarations (KMFDDM).")
					require.Contains(x.t, x.out, "Left at the source: 1 files of FileVault recovery keys")
				}
			})
		})
	}
}

func TestMovesFile(t *testing.T) {
	f := newFleet(t, *enrollments)
	dir := t.TempDir()
	files{t, dir}.writeFile(f)
	asFileKeeps := func(want, got *storage.DeviceRecord) string {
		kept := *want
		kept.Users = append([]storage.UserRecord(nil), want.Users...)
		for i, c := range allChannels(&kept) {
			// Nothing keeps when a device was last seen, and how often a command was put off.
			c.LastSeenAt = allChannels(got)[i].LastSeenAt
			c.Queue = append([]storage.ItemRecord(nil), c.Queue...)
			for n := range c.Queue {
				if c.Queue[n].State == storage.NotNow {
					c.Queue[n].NotNowCount = 1
				}
			}
		}
		return exactly(&kept, got)
	}
	intoEach(t, "file", dir, nil, func(x *trial) {
		require.Zero(x.t, x.run(), "%s", x.out)
		x.holds(f, asFileKeeps)
	})
}
