// Package foreign reads the stores of MDM servers: NanoMDM and NanoHUB (MySQL,
// MariaDB, PostgreSQL, directories), Fleet (MySQL), MicroMDM (a bolt file), and
// the databases of this server. It gives their contents as records of package
// storage.
//
// A source is only read, in one read-only transaction where it has some. A
// row that cannot be read is reported by its key and left out, and the rest
// goes on. Nothing is held in memory but a page of devices.
package foreign

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nanomdm/nanomdm/storage"
)

// Source is a store of another server. The methods are called one at a time.
// The order of keys is the source's own; after is a key that the source gave,
// or empty to begin with the first one.
type Source interface {
	// String names the store and what was found about it.
	String() string
	// Count counts, for the progress. It may be slow.
	Count(ctx context.Context) (Counts, error)
	PushCerts(ctx context.Context, yield func(storage.PushCert) error) error
	// Commands gives the commands that Devices refers to.
	Commands(ctx context.Context, after string, yield func(storage.CommandRecord) error) error
	// Devices gives devices with all that is theirs. With Config.Since it
	// gives those of which something changed.
	Devices(ctx context.Context, after string, yield func(*storage.DeviceRecord) error) error
	// Left counts what the source holds and no record here has a place for.
	Left(ctx context.Context) ([]Left, error)
	Close() error
}

// Counts is how much a source holds.
type Counts struct {
	Devices, Commands, PushCerts int64
}

// Left is a part of the source that is not moved.
type Left struct {
	What  string
	Count int64
}

// Problem is a row that is not moved, or not as it stands.
type Problem struct {
	Kind   string // "device", "user", "pin", "command", "queue", "push certificate"
	Key    string
	Reason string
	// Note marks a row that is moved all the same.
	Note bool
}

// Config says how to read a source.
type Config struct {
	// Kind is one of Kinds.
	Kind string
	// DSN is a data source name, a directory or a file.
	DSN string
	// Since leaves out devices and commands that did not change since then.
	// Sources that keep no times give all of them.
	Since time.Time
	// History says which finished commands are moved: none if zero, all if
	// negative, and else those that ended within this time.
	History time.Duration
	// Zone is the time zone of a PostgreSQL source's times, which have none.
	// It is that of the database session if nil.
	Zone *time.Location
	// FleetKey decrypts Fleet's configuration (FLEET_SERVER_PRIVATE_KEY).
	FleetKey []byte
	// DropRefetch leaves out Fleet's waiting REFETCH- commands, whose answers
	// nobody but Fleet reads.
	DropRefetch bool
	// Sealer opens the sealed values of a database of this server. It may be nil.
	Sealer storage.Sealer
	// Now is the clock; time.Now if nil.
	Now func() time.Time
	// Report takes problems; they are dropped if nil.
	Report func(Problem)
}

// ErrKind says that a kind of source is unknown.
var ErrKind = errors.New("unknown kind of source")

// Kinds lists the kinds of sources.
func Kinds() []string {
	return []string{"mysql", "pgsql", "filekv", "file", "fleet", "micromdm", "sqlite"}
}

// Open opens a source and looks whether it is one of its kind.
func Open(ctx context.Context, cfg Config) (Source, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Report == nil {
		cfg.Report = func(Problem) {}
	}
	switch cfg.Kind {
	case "mysql", "pgsql", "fleet":
		return openSQL(ctx, cfg)
	case "sqlite":
		return openOwn(ctx, cfg)
	case "filekv":
		return openFileKV(cfg)
	case "file":
		return openFile(cfg)
	case "micromdm":
		return openMicroMDM(cfg)
	}
	return nil, fmt.Errorf("%w: %q", ErrKind, cfg.Kind)
}

// keeps says whether a command that ended at that time is history to move.
func (c *Config) keeps(ended time.Time) bool {
	return c.History < 0 || c.History > 0 && ended.After(c.Now().Add(-c.History))
}

func (c *Config) problem(kind, key, format string, args ...any) {
	c.Report(Problem{Kind: kind, Key: key, Reason: fmt.Sprintf(format, args...)})
}

func (c *Config) note(kind, key, format string, args ...any) {
	c.Report(Problem{Kind: kind, Key: key, Reason: fmt.Sprintf(format, args...), Note: true})
}
