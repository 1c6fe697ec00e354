package main

import (
	"crypto/rand"
	"encoding/hex"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.etcd.io/bbolt"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

// proto is a protocol buffer.
type proto []byte

func (p *proto) text(n protowire.Number, v string) *proto { return p.bytes(n, []byte(v)) }

func (p *proto) bytes(n protowire.Number, v []byte) *proto {
	if len(v) > 0 {
		*p = protowire.AppendBytes(protowire.AppendTag(*p, n, protowire.BytesType), v)
	}
	return p
}

func (p *proto) number(n protowire.Number, v int64) *proto {
	if v != 0 {
		*p = protowire.AppendVarint(protowire.AppendTag(*p, n, protowire.VarintType), uint64(v))
	}
	return p
}

func (p *proto) truth(n protowire.Number, v bool) *proto {
	if v {
		return p.number(n, 1)
	}
	return p
}

// bolt is a MicroMDM file that a test writes.
type bolt struct {
	t    *testing.T
	path string
	tx   *bbolt.Tx
}

func writeBolt(t *testing.T, write func(b *bolt)) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "micromdm.db")
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{NoSync: true})
	require.NoError(t, err)
	require.NoError(t, db.Update(func(tx *bbolt.Tx) error {
		write(&bolt{t, path, tx})
		return nil
	}))
	require.NoError(t, db.Close())
	return path
}

func (b *bolt) put(bucket, key string, value []byte) {
	b.t.Helper()
	into, err := b.tx.CreateBucketIfNotExists([]byte(bucket))
	require.NoError(b.t, err)
	require.NoError(b.t, into.Put([]byte(key), value))
}

// goZero is how MicroMDM writes a time that is not set.
const goZero = -6795364578871345152

func (b *bolt) push(key string, c *storage.ChannelRecord) {
	var p proto
	p.text(1, key).text(2, hex.EncodeToString(c.Token)).text(3, c.PushMagic).text(4, c.Topic)
	b.put("mdm.PushInfo", key, p)
}

func (b *bolt) queue(key string, c *storage.ChannelRecord, raw map[string][]byte) {
	lists := map[storage.State]protowire.Number{storage.Queued: 2, storage.Acknowledged: 3, storage.Failed: 4, storage.NotNow: 5}
	var p proto
	p.text(1, key)
	for _, item := range c.Queue {
		if n, ok := lists[item.State]; ok {
			var command proto
			command.text(1, item.CommandUUID).bytes(2, raw[item.CommandUUID]).number(3, goZero)
			p.bytes(n, command)
		}
	}
	b.put("mdm.DeviceCommands", key, p)
}

// device writes a record of mdm.Devices and what points to it.
func (b *bolt) device(uuid string, d *storage.DeviceRecord) {
	c := &d.Channel
	var p proto
	p.text(1, uuid).text(2, c.ID).text(3, d.SerialNumber).text(4, d.OSVersion).text(6, d.ProductName).text(15, d.DeviceName).text(16, d.Model)
	p.text(12, hex.EncodeToString(d.UnlockToken.Value)).truth(13, c.Enabled).number(24, goZero).number(28, c.LastSeenAt.UnixNano()).bytes(30, d.BootstrapToken.Value)
	b.put("mdm.Devices", uuid, p)
	b.put("mdm.DeviceIdx", c.ID, []byte(uuid))
	b.put("mdm.DeviceIdx", d.SerialNumber, []byte(uuid))
	for _, pin := range d.Pins {
		if pin.RetiredAt.IsZero() {
			sum, err := hex.DecodeString(pin.SHA256)
			require.NoError(b.t, err)
			b.put("mdm.UDIDCertAuth", c.ID, sum)
		}
		if pin.Certificate != nil {
			b.put("scep_certificates", "MicroMDM Identity (Mac. of J.)."+hex.EncodeToString([]byte(uuid[:2])), pin.Certificate)
		}
	}
	if c.Token != nil {
		b.push(c.ID, c)
	}
}

func (b *bolt) user(uuid, udid, id, short string) {
	var p proto
	p.text(1, uuid).text(2, udid).text(3, id).text(4, short).text(5, "Jane Doe")
	b.put("mdm.Users", uuid, p)
	if udid != "" {
		b.put("mdm.UserIdx", udid, []byte(uuid))
		b.put("mdm.UserIdx", id, []byte(uuid))
	}
}

// write writes a fleet. Shared iPads have no user channels that can be told
// apart.
func (b *bolt) write(f *fleet) {
	var config proto
	config.bytes(1, f.cert.CertPEM).bytes(2, f.cert.KeyPEM)
	b.put("mdm.ServerConfig", "config", config)
	raw := make(map[string][]byte)
	for _, c := range f.commands {
		raw[c.UUID] = c.Raw
	}
	for _, d := range f.devices {
		c := &d.Channel
		if c.Type == mdm.UserEnrollmentDevice {
			if c.Token != nil {
				b.push(c.ID, c)
			}
		} else {
			b.device(strings.ToLower(rand.Text()), d)
		}
		b.queue(c.ID, c, raw)
		for i := range d.Users {
			u := &d.Users[i]
			if u.Channel.Type == mdm.User {
				b.user(rand.Text(), c.ID, u.UserID, u.UserShortName)
				b.push(u.UserID, &u.Channel)
				b.queue(u.UserID, &u.Channel, raw)
			}
		}
	}
}

// asMicroMDMKeeps compares what MicroMDM keeps.
func asMicroMDMKeeps(want, got *storage.DeviceRecord) string {
	kept := *want
	kept.Users = nil
	for _, u := range want.Users {
		if u.Channel.Type == mdm.User {
			u.UserAuthenticate = storage.Checkin{}
			u.TokenUpdate = storage.Checkin{}
			kept.Users = append(kept.Users, u)
		}
	}
	userEnrollment := want.Channel.Type == mdm.UserEnrollmentDevice
	kept.Pins = nil
	for _, p := range want.Pins {
		if p.RetiredAt.IsZero() && !userEnrollment {
			kept.Pins = append(kept.Pins, p)
		}
	}
	if userEnrollment {
		kept.UnlockToken, kept.BootstrapToken, kept.SerialNumber = storage.Token{}, storage.Token{}, ""
		kept.Channel.Enabled = true
	}
	kept.Authenticate.Raw, kept.TokenUpdate.Raw = got.Authenticate.Raw, got.TokenUpdate.Raw
	for i, c := range allChannels(&kept) {
		if i < len(got.Users)+1 {
			c.LastSeenAt = allChannels(got)[i].LastSeenAt
		}
		if i > 0 && i <= len(got.Users) {
			kept.Users[i-1].TokenUpdate.Raw = got.Users[i-1].TokenUpdate.Raw
		}
		if c.Tally = 0; c.Enabled {
			c.Tally = 1
		}
		var waits, refused []storage.ItemRecord
		for _, item := range c.Queue {
			switch item.State {
			case storage.NotNow:
				refused = append(refused, item)
			case storage.Queued:
				waits = append(waits, item)
			}
		}
		c.Queue = append(waits, refused...)
	}
	return deviceDiffers(&kept, got)
}

func TestMovesMicroMDM(t *testing.T) {
	f := newFleet(t, *enrollments)
	path := writeBolt(t, func(b *bolt) { b.write(f) })
	here := &fleet{}
	for _, d := range f.devices {
		if d.Channel.Type != mdm.UserEnrollmentDevice || d.Channel.Token != nil {
			here.devices = append(here.devices, d)
		}
	}
	intoEach(t, "micromdm", path, []string{"-history", "none"}, func(x *trial) {
		require.Zero(x.t, x.run(), "%s", x.out)
		x.holds(here, asMicroMDMKeeps)
		require.Zero(x.t, x.run(), "again: %s", x.out)
		x.holds(here, asMicroMDMKeeps)
	})
}

// aDevice is a device for tests of MicroMDM.
func aDevice(id string) *storage.DeviceRecord {
	d := &storage.DeviceRecord{SerialNumber: "SERIAL-" + id, OSVersion: "15.1", DeviceName: "Name"}
	d.Channel = storage.ChannelRecord{ID: id, Type: mdm.Device, Topic: fleetTopic, LastSeenAt: begun}
	enable(&d.Channel, "magic of "+id, 0, begun)
	return d
}

// Its check-ins are made up, marked, and can be read as what they are.
func TestMicroMDMCheckinsAreSynthesized(t *testing.T) {
	d := aDevice("UDID-1")
	d.UnlockToken.Value = []byte("unlock")
	enrollment := aDevice("ENROLLMENT-1")
	path := writeBolt(t, func(b *bolt) {
		b.device("uuid-1", d)
		b.push("ENROLLMENT-1", &enrollment.Channel)
	})
	x := newTrial(t, "micromdm", path)
	require.Zero(t, x.run(), "%s", x.out)
	got := x.device("UDID-1")
	for raw, want := range map[string]mdm.Message{
		string(got.Authenticate.Raw): &mdm.Authenticate{Enrollment: mdm.Enrollment{UDID: "UDID-1"}, Topic: fleetTopic, SerialNumber: "SERIAL-UDID-1", OSVersion: "15.1",
			DeviceName: "Name", Raw: got.Authenticate.Raw},
		string(got.TokenUpdate.Raw): &mdm.TokenUpdate{Enrollment: mdm.Enrollment{UDID: "UDID-1"}, Topic: fleetTopic, PushMagic: d.Channel.PushMagic, Token: d.Channel.Token,
			UnlockToken: []byte("unlock"), Raw: got.TokenUpdate.Raw},
	} {
		m, err := mdm.DecodeCheckin([]byte(raw))
		require.NoError(t, err)
		require.Equal(t, want, m)
		keys, err := mdm.DecodePlist([]byte(raw))
		require.NoError(t, err)
		require.Equal(t, true, keys["NanoMDMSynthesized"])
	}
	require.Equal(t, mdm.UserEnrollmentDevice, x.device("ENROLLMENT-1").Channel.Type)
}

func TestMicroMDMBlockedDeviceStaysOut(t *testing.T) {
	path := writeBolt(t, func(b *bolt) {
		b.device("uuid-1", aDevice("UDID-1"))
		var p proto
		p.text(1, "UDID-1")
		b.put("mdm.RemoveDevice", "UDID-1", p)
	})
	x := newTrial(t, "micromdm", path)
	require.Zero(t, x.run(), "%s", x.out)
	require.True(t, x.device("UDID-1").Channel.OperatorDisabled)
	require.Contains(t, x.out, "note: device UDID-1: it is blocked there")
}

// A user channel is known by its user id alone: of two devices with the same
// user only one has a push token there.
func TestMicroMDMUserOfTwoDevices(t *testing.T) {
	user := aDevice("U").Channel
	path := writeBolt(t, func(b *bolt) {
		b.device("uuid-1", aDevice("UDID-1"))
		b.device("uuid-2", aDevice("UDID-2"))
		b.user("user-1", "UDID-1", "USER", "jane")
		b.user("user-2", "UDID-2", "USER", "jane")
		b.user("user-3", "", "", "made through the API")
		b.push("USER", &user)
	})
	x := newTrial(t, "micromdm", path)
	require.Equal(t, exitPartial, x.run(), "%s", x.out)
	require.Contains(t, x.out, "left out: user UDID-1:USER: the record of its push token is that of a user of UDID-2")
	require.Empty(t, x.device("UDID-1").Users)
	users := x.device("UDID-2").Users
	require.Len(t, users, 1)
	require.Equal(t, "UDID-2:USER", users[0].Channel.ID)
	require.Equal(t, user.Token, users[0].Channel.Token)
}

func TestMicroMDMSharedIPadUsersCannotBeToldApart(t *testing.T) {
	user := aDevice("U").Channel
	path := writeBolt(t, func(b *bolt) {
		b.device("uuid-1", aDevice("UDID-1"))
		b.user("user-1", "UDID-1", mdm.SharediPadUserID, "jane@example.org")
		b.push(mdm.SharediPadUserID, &user)
	})
	x := newTrial(t, "micromdm", path)
	require.Equal(t, exitPartial, x.run(), "%s", x.out)
	require.Empty(t, x.device("UDID-1").Users)
	require.Contains(t, x.out, "the users of all Shared iPads share")
}

// MicroMDM moves a command to the end when it sends it, and says so nowhere:
// the order of the file is kept.
func TestMicroMDMQueueKeepsItsRotation(t *testing.T) {
	f := newFleet(t, 1)
	d := f.devices[0]
	waiting := d.Channel.Queue[4:]
	d.Channel.Queue = []storage.ItemRecord{waiting[1], d.Channel.Queue[3], waiting[0]} // the first one is in flight
	d.Users = nil
	path := writeBolt(t, func(b *bolt) { b.write(f) })
	x := newTrial(t, "micromdm", path)
	require.Zero(t, x.run(), "%s", x.out)
	var got []string
	for _, item := range x.device(d.Channel.ID).Channel.Queue {
		got = append(got, item.CommandUUID+" "+item.State.String())
	}
	require.Equal(t, []string{waiting[1].CommandUUID + " queued", waiting[0].CommandUUID + " queued", d.Channel.Queue[1].CommandUUID + " notnow"}, got)
}

// Rows that are broken are reported, each by its key, and the rest goes on.
func TestMicroMDMBrokenRows(t *testing.T) {
	path := writeBolt(t, func(b *bolt) {
		bad := aDevice("UDID-2")
		b.device("uuid-1", aDevice("UDID-1"))
		b.put("mdm.Devices", "broken", []byte{0xff, 0xff})
		b.device("uuid-2", bad)
		var p proto
		p.text(1, "UDID-2").text(2, "no hex").text(3, "magic").text(4, fleetTopic)
		b.put("mdm.PushInfo", "UDID-2", p)
		b.device("uuid-3", aDevice("with:colon"))
		var command, queue proto
		command.text(1, "C-1").bytes(2, []byte("no property list"))
		queue.text(1, "UDID-1").bytes(2, command)
		b.put("mdm.DeviceCommands", "UDID-1", queue)
		b.put("mdm.UDIDCertAuth", "UDID-1", []byte("short"))
	})
	x := newTrial(t, "micromdm", path)
	require.Equal(t, exitPartial, x.run(), "%s", x.out)
	for _, line := range []string{"left out: device broken: it is not a protocol buffer", "left out: device UDID-2: its push token is not hexadecimal",
		"left out: device with:colon: ", "left out: command C-1: ", "left out: pin UDID-1: "} {
		require.Contains(t, x.out, line)
	}
	require.True(t, x.device("UDID-1").Channel.Enabled)
	require.False(t, x.device("UDID-2").Channel.Enabled)
}

// A running MicroMDM holds its file.
func TestMicroMDMHoldsItsFile(t *testing.T) {
	path := writeBolt(t, func(b *bolt) { b.device("uuid-1", aDevice("UDID-1")) })
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: time.Second})
	require.NoError(t, err)
	defer db.Close()
	x := newTrial(t, "micromdm", path)
	require.Equal(t, exitFailure, x.run())
	require.Contains(t, x.out, "MicroMDM is running")
}
