package foreign

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/md5"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/storage"
)

// fleet is what Fleet's database has besides the tables of NanoMDM. A nil
// fleet is NanoMDM's own database, which has none of it.
type fleet struct {
	s *sqlSource
}

// refetch begins the CommandUUIDs of queries whose answers only Fleet reads.
const refetch = "REFETCH-"

// renewalWindow is how long a device may take to renew its certificate when a
// renewal was under way at the source.
const renewalWindow = 7 * 24 * time.Hour

// fleetParts are tables of other parts of Fleet.
var fleetParts = []struct{ table, what string }{
	{"mdm_apple_declarations", "declarations"},
	{"mdm_apple_configuration_profiles", "configuration profiles"},
	{"identity_certificates", "issued identity certificates"},
	{"scep_certificates", "issued identity certificates"},
	{"abm_tokens", "ADE tokens"},
	{"nano_dep_names", "ADE servers"},
	{"host_dep_assignments", "ADE assignments"},
	{"host_disk_encryption_keys", "FileVault recovery keys (export them: they are lost with Fleet's database)"},
	{"host_recovery_key_passwords", "recovery passwords (export them: they are lost with Fleet's database)"},
	{"mdm_config_assets", "configuration assets; of these the push certificate is moved"},
}

func openFleet(ctx context.Context, s *sqlSource) (*fleet, error) {
	if n := len(s.cfg.FleetKey); n != 0 && n < 32 {
		return nil, errors.New("the private key of Fleet has at least 32 characters")
	}
	return &fleet{s}, nil
}

// withheld says why a command of Fleet is not moved, or "".
func (f *fleet) withheld(uuid, subtype string) string {
	switch {
	case f == nil:
		return ""
	case subtype == "ProfileWithSecrets":
		return "Fleet puts secrets into this profile when it is sent, so the stored one must not reach a device: send the profile anew"
	case f.s.cfg.DropRefetch && strings.HasPrefix(uuid, refetch):
		return "only Fleet reads the answer"
	}
	return ""
}

// asset reads a part of the configuration, which is sealed with AES-GCM. It is
// nil if there is none.
func (f *fleet) asset(ctx context.Context, name string) ([]byte, error) {
	var value, sum []byte
	err := f.s.conn.QueryRowContext(ctx, "SELECT value, md5_checksum FROM mdm_config_assets WHERE name = ? AND deletion_uuid = ''", name).Scan(&value, &sum)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	plain, err := openAsset(f.s.cfg.FleetKey, value)
	if err != nil {
		return nil, err
	}
	if want := md5.Sum(plain); len(sum) > 0 && string(sum) != string(want[:]) {
		return nil, errors.New("its checksum is another one")
	}
	return plain, nil
}

// openAsset decrypts a nonce and what follows it.
func openAsset(key, value []byte) ([]byte, error) {
	const keyLen = 32
	if len(key) < keyLen {
		return nil, errors.New("it is sealed: give -fleet-key-file")
	}
	block, err := aes.NewCipher(key[:keyLen])
	if err != nil {
		return nil, err
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	if len(value) < gcm.NonceSize() {
		return nil, errors.New("it is too short")
	}
	plain, err := gcm.Open(nil, value[:gcm.NonceSize()], value[gcm.NonceSize():], nil)
	if err != nil {
		return nil, errors.New("it does not open with this key")
	}
	return plain, nil
}

func (f *fleet) pushCerts(ctx context.Context, yield func(storage.PushCert) error) error {
	if !f.s.has["mdm_config_assets"] {
		f.s.cfg.problem("push certificate", "apns_cert", "this release keeps it in files: upload it with nanoctl pushcert put")
		return nil
	}
	var pair [2][]byte
	for i, name := range []string{"apns_cert", "apns_key"} {
		var err error
		if pair[i], err = f.asset(ctx, name); err != nil {
			f.s.cfg.problem("push certificate", name, "%v", err)
			return nil
		}
	}
	if pair[0] == nil {
		return nil
	}
	if c, ok := f.s.cfg.pushCert("", pair[0], pair[1]); ok {
		return yield(c)
	}
	return nil
}

// readRenewals opens the renewal window of devices whose certificate was about
// to be renewed.
func (f *fleet) readRenewals(ctx context.Context, p *devicePage) error {
	if f == nil || !f.s.has["nano_cert_auth_associations.renew_command_uuid"] {
		return nil
	}
	err := f.s.each(ctx, func(rows *sql.Rows) error {
		var id string
		if err := rows.Scan(&id); err != nil {
			return err
		}
		if d := p.device(id); d != nil {
			d.Channel.RenewalUntil = f.s.cfg.Now().Add(renewalWindow).Truncate(time.Hour)
		}
		return nil
	}, `SELECT a.id FROM nano_cert_auth_associations a JOIN nano_enrollment_queue q ON q.id = a.id AND q.command_uuid = a.renew_command_uuid
WHERE q.active = 1 AND a.id IN `+places(len(p.all)), p.ids()...)
	if err != nil {
		return fmt.Errorf("reading renewals: %w", err)
	}
	return nil
}
