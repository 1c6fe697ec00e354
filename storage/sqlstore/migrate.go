package sqlstore

import (
	"context"
	"crypto/rand"
	"embed"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/lease"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

//go:embed migrations/*.sql
var migrationFiles embed.FS

// migrationChecksums freeze the files of migrations, in their order. A new file
// gets its line here (a test says which); the line of a released one never
// changes.
var migrationChecksums = []string{
	"ab26bc4dec40ac96ede4486f8cea377cae8e03f13952d8c0ea0186ac81ee8bb5", // 0001_first.sql
	"3d55f3cefc66128e10a80f4c243a9a9cda71a830f99db509d09863396bdabcf5", // 0002_topic_moves.sql
	"342b6a9b27e8759be5e2a3f5d1140c2bf56e7574872ae57b2788fc30ae545284", // 0003_refusals.sql
	"ad7231668a9888f97508c8a0f2b99a4f274970a89131d2e60584f932b5f67deb", // 0004_replicas.sql
	"cef0a11c34a2e32b20d37e42ad1615ff0f588db63f63423e2fd3fe51117af264", // 0005_tags.sql
	"dd1f95ef880127e7a9d916e36bfb49e35492558c291c2654d3ebd1ff3ac6370a", // 0006_inventory.sql
	"c1afb522c2b58a5bcb6e1617332f1d95c700f96b5d171ea6dd62203209be69b6", // 0007_event_bytes.sql
	"a6d0dd31e0aa812dd9c73734abda893f4dbef1e6550f1ee6e835653d573b2bf6", // 0008_sink_health.sql
}

// migrationTTL is how long the next replica waits after one has died while
// migrating.
const migrationTTL = 10 * time.Second

// leaseTable is made before the migrations, which hold a lease.
const leaseTable = `CREATE TABLE IF NOT EXISTS nano_leases (
	name   {id} NOT NULL PRIMARY KEY,
	holder {id} NOT NULL,
	fence  BIGINT NOT NULL,
	beat   BIGINT NOT NULL
) {table}`

// foreignTables identify a database of NanoMDM (the first ones) or of Fleet's
// fork, if it has no table of our migrations.
var foreignTables = [...]string{
	"enrollments", "enrollment_queue", "cert_auth_associations",
	"nano_enrollments", "nano_devices", "nano_users", "nano_commands",
	"nano_command_results", "nano_enrollment_queue", "nano_push_certs",
	"nano_cert_auth_associations",
}

// migrations are the migrations of this program. Only Store.migrate needs Hold.
func migrations() *sqldb.Migrations {
	files, err := fs.Sub(migrationFiles, "migrations")
	if err != nil {
		panic(err) // the folder is embedded
	}
	return &sqldb.Migrations{Files: files, Checksums: migrationChecksums, Bootstrap: []string{leaseTable}, Refuse: refuseForeign}
}

// refuseForeign refuses a database of NanoMDM or of Fleet.
func refuseForeign(tables []string) error {
	for _, name := range foreignTables {
		if slices.Contains(tables, name) {
			return fmt.Errorf("it holds the table %s of NanoMDM or Fleet and no record of this program; "+
				"start with an empty database and bring the enrollments over with nano2nano (docs/upgrading.md)", name)
		}
	}
	return nil
}

// migrate brings the schema up to date, under a lease: one of several starting
// replicas migrates and the others wait.
func (s *Store) migrate(ctx context.Context) error {
	m := migrations()
	m.Hold = func(ctx context.Context, work func(context.Context, func(context.Context, *sqldb.Tx) error) error) error {
		return lease.Hold(ctx, s, "schema", rand.Text(), migrationTTL, s.log,
			func(workCtx context.Context, current func() storage.Lease) error {
				return work(workCtx, func(ctx context.Context, t *sqldb.Tx) error {
					return (&tx{Tx: t}).checkLease(ctx, current())
				})
			})
	}
	if err := s.db.Migrate(ctx, m); err != nil {
		return storageError(err)
	}
	return s.Ping(ctx)
}
