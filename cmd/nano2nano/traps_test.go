package main

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/md5"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

// createFleet makes what Fleet has besides.
func (x *sqlFixture) createFleet() {
	x.create()
	x.exec("DROP TABLE nano_push_certs")
	x.exec("ALTER TABLE nano_commands ADD COLUMN subtype ENUM('None','ProfileWithSecrets') NOT NULL DEFAULT 'None'")
	x.exec("ALTER TABLE nano_cert_auth_associations ADD COLUMN cert_not_valid_after TIMESTAMP NULL, ADD COLUMN renew_command_uuid VARCHAR(127) NULL")
	x.exec("CREATE TABLE mdm_config_assets (id INT AUTO_INCREMENT PRIMARY KEY, name VARCHAR(256) NOT NULL, value LONGBLOB NOT NULL, deletion_uuid VARCHAR(127) NOT NULL DEFAULT '', md5_checksum BINARY(16) NOT NULL)")
	x.exec("CREATE TABLE mdm_apple_declarations (declaration_uuid VARCHAR(37) PRIMARY KEY)")
	x.exec("CREATE TABLE nano_push_certs (topic VARCHAR(255) PRIMARY KEY, cert_pem TEXT, key_pem TEXT, stale_token INT)")
}

const fleetKey = "0123456789abcdef0123456789abcdef and more"

// asset writes a part of Fleet's configuration under AES-GCM.
func (x *sqlFixture) asset(name string, plain []byte) {
	block, err := aes.NewCipher([]byte(fleetKey[:32]))
	require.NoError(x.t, err)
	gcm, err := cipher.NewGCM(block)
	require.NoError(x.t, err)
	nonce := []byte("nonce of 12!")
	sum := md5.Sum(plain)
	x.exec("INSERT INTO mdm_config_assets (name, value, md5_checksum) VALUES (?, ?, ?)", name, gcm.Seal(nonce, nonce, plain, nil), sum[:])
}

func (x *sqlFixture) writeFleet(f *fleet) {
	x.write(f)
	x.exec("DELETE FROM nano_push_certs")
	x.asset("apns_cert", f.cert.CertPEM)
	x.asset("apns_key", f.cert.KeyPEM)
}

func keyFile(t *testing.T, key string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "key")
	require.NoError(t, os.WriteFile(path, []byte(key+"\n"), 0o600))
	return path
}

func TestMovesFleet(t *testing.T) {
	fixture, dsn := sqlSource(t, "mysql", "nano_")
	f := newFleet(t, *enrollments)
	fixture.createFleet()
	fixture.writeFleet(f)
	fixture.exec("INSERT INTO mdm_apple_declarations VALUES ('d1')")
	intoEach(t, "fleet", dsn, []string{"-fleet-key-file", keyFile(t, fleetKey)}, func(x *trial) {
		require.Zero(x.t, x.run(), "%s", x.out)
		x.holds(f, exactly)
		require.Contains(x.t, x.out, "Left at the source: 1 declarations.")
	})
}

// A wrong key costs the push certificate and nothing else.
func TestFleetKey(t *testing.T) {
	for name, key := range map[string]string{"none": "", "wrong": strings.Repeat("x", 32)} {
		t.Run(name, func(t *testing.T) {
			fixture, dsn := sqlSource(t, "mysql", "nano_")
			f := newFleet(t, 1)
			fixture.createFleet()
			fixture.writeFleet(f)
			x := newTrial(t, "fleet", dsn)
			if key != "" {
				x.flags = append(x.flags, "-fleet-key-file", keyFile(t, key))
			}
			require.Equal(t, exitPartial, x.run(), "%s", x.out)
			require.Contains(t, x.out, "left out: push certificate apns_cert: it ")
			require.NotContains(t, x.out, strings.Repeat("x", 32))
			x.device(f.devices[0].Channel.ID)
		})
	}
}

// A profile with secrets is stored with placeholders, and must not reach a
// device so. What asks for answers that only Fleet reads is left, too.
func TestFleetCommandsThatMustNotGo(t *testing.T) {
	fixture, dsn := sqlSource(t, "mysql", "nano_")
	f := newFleet(t, 1)
	d := f.devices[0]
	fixture.createFleet()
	fixture.writeFleet(f)
	for uuid, subtype := range map[string]string{"SECRET": "ProfileWithSecrets", "REFETCH-DEVICE-1": "None", "PLAIN": "None"} {
		raw := strings.ReplaceAll(string(f.commands[0].Raw), f.commands[0].UUID, uuid)
		fixture.exec("INSERT INTO nano_commands (command_uuid, request_type, command, subtype, created_at) VALUES (?, 'InstallProfile', ?, ?, NOW())", uuid, raw, subtype)
		fixture.exec("INSERT INTO nano_enrollment_queue (id, command_uuid, active, created_at) VALUES (?, ?, 1, NOW())", d.Channel.ID, uuid)
	}
	x := newTrial(t, "fleet", dsn, "-fleet-key-file", keyFile(t, fleetKey), "-history", "none")
	require.Equal(t, exitPartial, x.run(), "%s", x.out)
	require.Contains(t, x.out, "left out: queue "+d.Channel.ID+" SECRET: Fleet puts secrets into this profile")
	require.Contains(t, x.out, "left out: queue "+d.Channel.ID+" REFETCH-DEVICE-1: ")
	var got []string
	for _, item := range x.device(d.Channel.ID).Channel.Queue {
		got = append(got, item.CommandUUID)
	}
	require.Contains(t, got, "PLAIN")
	require.NotContains(t, got, "SECRET")
	require.NotContains(t, got, "REFETCH-DEVICE-1")
	commands, err := x.store().ExportCommands(t.Context(), "", 100)
	require.NoError(t, err)
	for _, c := range commands {
		require.NotEqual(t, "SECRET", c.UUID)
	}
}

// Fleet compares ids without case. A device is recognized by its own spelling.
func TestFleetIDsOfAnotherCase(t *testing.T) {
	fixture, dsn := sqlSource(t, "mysql", "nano_")
	f := newFleet(t, 20)
	fixture.createFleet()
	fixture.writeFleet(f)
	fixture.exec("UPDATE nano_devices SET id = LOWER(id)")
	fixture.exec("UPDATE nano_enrollment_queue SET id = LOWER(id)")
	fixture.exec("UPDATE nano_cert_auth_associations SET id = LOWER(id)")
	x := newTrial(t, "fleet", dsn, "-fleet-key-file", keyFile(t, fleetKey))
	require.Zero(t, x.run(), "%s", x.out)
	x.holds(f, exactly)
	require.Contains(t, x.out, "the device spells its id")
}

// A renewal that was under way stays possible.
func TestFleetRenewalUnderWay(t *testing.T) {
	fixture, dsn := sqlSource(t, "mysql", "nano_")
	f := newFleet(t, 1)
	fixture.createFleet()
	fixture.writeFleet(f)
	d := f.devices[0]
	fixture.exec("UPDATE nano_cert_auth_associations SET renew_command_uuid = ? WHERE sha256 = ?", d.Channel.Queue[5].CommandUUID, d.Pins[len(d.Pins)-1].SHA256)
	x := newTrial(t, "fleet", dsn, "-fleet-key-file", keyFile(t, fleetKey))
	require.Zero(t, x.run(), "%s", x.out)
	require.True(t, x.device(d.Channel.ID).Channel.RenewalUntil.After(x.now))
}

// PostgreSQL's times have no zone: they are in that of the server's sessions.
func TestTimesWithoutZone(t *testing.T) {
	berlin, err := time.LoadLocation("Europe/Berlin")
	require.NoError(t, err)
	for _, told := range []bool{false, true} {
		fixture, dsn := sqlSource(t, "pgsql", "")
		fixture.zone = berlin
		f := newFleet(t, 10)
		fixture.create()
		fixture.write(f)
		x := newTrial(t, "pgsql", dsn)
		if told {
			x.flags = append(x.flags, "-source-zone", "Europe/Berlin")
		} else {
			name := ""
			require.NoError(t, fixture.db.QueryRowContext(t.Context(), "SELECT current_database()").Scan(&name))
			fixture.exec("ALTER DATABASE " + name + " SET timezone TO 'Europe/Berlin'")
		}
		require.Zero(t, x.run(), "%s", x.out)
		x.holds(&fleet{devices: f.devices}, exactly)
		require.Contains(t, x.out, "times in zone Europe/Berlin")
	}
}

// Commands of one second are ordered by their key, as MySQL orders them.
func TestQueueOrderInsideOneSecond(t *testing.T) {
	for _, source := range []struct{ engine, kind string }{{"mysql", "mysql"}, {"pgsql", "pgsql"}} {
		t.Run(source.engine, func(t *testing.T) {
			fixture, dsn := sqlSource(t, source.engine, "")
			f := newFleet(t, 1)
			d := f.devices[0]
			fixture.create()
			fixture.write(f)
			fixture.exec("DELETE FROM enrollment_queue")
			at := fixture.at(begun)
			for i, uuid := range []string{f.commands[3].UUID, f.commands[1].UUID, f.commands[4].UUID, f.commands[0].UUID} {
				fixture.exec("INSERT INTO enrollment_queue (id, command_uuid, active, priority, created_at) VALUES (?, ?, ?, ?, ?)", d.Channel.ID, uuid, true, i/3, at)
			}
			fixture.exec("DELETE FROM command_results")
			x := newTrial(t, source.kind, dsn)
			require.Zero(t, x.run(), "%s", x.out)
			var got []string
			for _, item := range x.device(d.Channel.ID).Channel.Queue {
				got = append(got, item.CommandUUID)
			}
			require.Equal(t, []string{f.commands[0].UUID, f.commands[1].UUID, f.commands[3].UUID, f.commands[4].UUID}, got, "the urgent one first")
		})
	}
}

// Of several pins the certificate of Authenticate counts, unless there is one
// that came after it.
func TestSeveralPins(t *testing.T) {
	fixture, dsn := sqlSource(t, "mysql", "")
	f := newFleet(t, 1)
	d := f.devices[0]
	own := d.Pins[len(d.Pins)-1].SHA256
	require.NotNil(t, d.Pins[len(d.Pins)-1].Certificate)
	fixture.create()
	fixture.write(f)
	older, newer := hashText("older", 0), hashText("newer", 0)
	pin := func(id, hash string, after time.Duration) {
		fixture.exec("INSERT INTO cert_auth_associations (id, sha256, created_at, updated_at) VALUES (?, ?, ?, ?)", id, hash, d.Authenticate.At.Add(after), d.Authenticate.At.Add(after))
	}
	live := func(x *trial) (hashes []string) {
		for _, p := range x.device(d.Channel.ID).Pins {
			if p.RetiredAt.IsZero() {
				hashes = append(hashes, p.SHA256)
			}
		}
		return hashes
	}
	pin(d.Channel.ID, older, -time.Hour)
	x := newTrial(t, "mysql", dsn)
	require.Zero(t, x.run(), "%s", x.out)
	require.Equal(t, []string{own}, live(x))
	require.Len(t, x.device(d.Channel.ID).Pins, 3)

	pin(d.Channel.ID, newer, time.Hour)
	require.Zero(t, x.run("-full"), "%s", x.out)
	require.Equal(t, []string{newer}, live(x))
}

// A certificate that two devices have goes to one; the other one is reported.
func TestOnePinOfTwoDevices(t *testing.T) {
	fixture, dsn := sqlSource(t, "mysql", "")
	f := newFleet(t, 2)
	fixture.create()
	fixture.write(f)
	hash := hashText("shared", 0)
	fixture.exec("DELETE FROM cert_auth_associations")
	fixture.exec("UPDATE devices SET identity_cert = NULL")
	for _, d := range f.devices {
		fixture.exec("INSERT INTO cert_auth_associations (id, sha256, created_at) VALUES (?, ?, ?)", d.Channel.ID, hash, begun)
	}
	x := newTrial(t, "mysql", dsn)
	require.Equal(t, exitPartial, x.run(), "%s", x.out)
	require.Equal(t, 1, strings.Count(x.out, "the certificate is pinned to"))
}

// A database of an early release has fewer columns.
func TestOldSchema(t *testing.T) {
	fixture, dsn := sqlSource(t, "mysql", "")
	f := newFleet(t, 40)
	fixture.create()
	fixture.write(f)
	for _, column := range []string{"devices.bootstrap_token_b64", "devices.bootstrap_token_at", "users.user_authenticate", "users.user_authenticate_at",
		"users.user_authenticate_digest", "users.user_authenticate_digest_at", "enrollments.token_update_tally", "command_results.not_now_at",
		"command_results.not_now_tally", "enrollments.last_seen_at"} {
		table, name, _ := strings.Cut(column, ".")
		fixture.exec("ALTER TABLE " + table + " DROP COLUMN " + name)
	}
	x := newTrial(t, "mysql", dsn)
	require.Zero(t, x.run(), "%s", x.out)
	require.Contains(t, x.out, "without schema changes 1, 2, 3, 4, 8")
	x.holds(f, func(want, got *storage.DeviceRecord) string {
		kept := *want
		kept.BootstrapToken = storage.Token{}
		kept.Users = append([]storage.UserRecord(nil), want.Users...)
		for _, c := range allChannels(&kept) {
			if c.Tally = 0; c.Enabled {
				c.Tally = 1
			}
		}
		return deviceDiffers(&kept, got)
	})
}

// Rows that are broken are reported by their keys, and the rest goes on.
func TestBrokenRows(t *testing.T) {
	fixture, dsn := sqlSource(t, "mysql", "")
	f := newFleet(t, 12)
	fixture.create()
	fixture.write(f)
	ids := make([]string, len(f.devices))
	for i, d := range f.devices {
		ids[i] = d.Channel.ID
	}
	fixture.exec("UPDATE enrollments SET token_hex = 'no hex' WHERE id = ?", ids[0])
	fixture.exec("UPDATE enrollments SET type = 'Toaster' WHERE id = ?", ids[1])
	fixture.exec("UPDATE cert_auth_associations SET sha256 = 'x' WHERE id = ?", ids[2])
	fixture.exec("UPDATE devices SET authenticate = 'no property list' WHERE id = ?", ids[3])
	fixture.exec("UPDATE commands SET command = '<?xml' WHERE command_uuid = ?", f.commands[3].UUID)
	x := newTrial(t, "mysql", dsn)
	require.Equal(t, exitPartial, x.run(), "%s", x.out)
	for _, line := range []string{
		"note: device " + ids[0] + ": its push token is not hexadecimal",
		"left out: device " + ids[1] + `: the type "Toaster" is none of a device`,
		"left out: pin " + ids[2] + " x: it is not the hash of a certificate",
		"note: device " + ids[3] + ": its Authenticate message cannot be read",
		"left out: command " + f.commands[3].UUID + ": ",
		"left out: queue " + ids[0] + " " + f.commands[3].UUID + ": its command was not imported",
	} {
		require.Contains(t, x.out, line)
	}
	require.NotContains(t, x.out, "note: device "+ids[4])
	require.Equal(t, mdm.Device, x.device(ids[3]).Channel.Type)
	_, err := hex.DecodeString(x.device(ids[5]).Pins[0].SHA256)
	require.NoError(t, err)
}

// A broken list of commands is reported and not guessed at.
func TestFileKVBrokenQueue(t *testing.T) {
	f := newFleet(t, 1)
	d := f.devices[0]
	d.Users = nil
	dir := t.TempDir()
	w := files{t, dir}
	w.writeFileKV(f)
	id, first, second, third := d.Channel.ID, d.Channel.Queue[3].CommandUUID, d.Channel.Queue[4].CommandUUID, d.Channel.Queue[5].CommandUUID
	next := func(uuid, to string) { w.kv("queue", id+"."+uuid+".queueitem.next", []byte(to), begun) }
	next(first, second)
	next(second, first) // a cycle, and the third one is lost
	x := newTrial(t, "filekv", dir)
	require.Equal(t, exitPartial, x.run(), "%s", x.out)
	require.Contains(t, x.out, "left out: queue "+id+" "+third+": it has lost its place in the queue")
	var waiting []string
	for _, item := range x.device(id).Channel.Queue {
		if !item.State.Terminal() {
			waiting = append(waiting, item.CommandUUID)
		}
	}
	require.Equal(t, []string{first, second}, waiting)
}
