package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/cryptoutil"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
)

// database holds the flags of commands that work on a database itself. They
// have the names of the daemon's.
type database struct {
	driver, dsn, dsnFile, sealKeyFile string
}

func (d *database) flags(flags *flag.FlagSet) {
	flags.StringVar(&d.driver, "storage", "sqlite", "sqlite, pgsql or mysql, as the daemon's -storage: `engine`")
	flags.StringVar(&d.dsn, "storage-dsn", "", "the database, as the daemon's -storage-dsn: `dsn`")
	flags.StringVar(&d.dsnFile, "storage-dsn-file", "", "`file` with the data source name")
}

func (d *database) config() (sqlstore.Config, error) {
	cfg := sqlstore.Config{Driver: d.driver, DSN: d.dsn}
	if d.dsnFile != "" {
		text, err := os.ReadFile(d.dsnFile)
		if err != nil {
			return cfg, usage("-storage-dsn-file: %v", err)
		}
		cfg.DSN = strings.TrimSpace(string(text))
	}
	if cfg.DSN == "" {
		return cfg, usage("-storage-dsn or -storage-dsn-file names the database")
	}
	if d.sealKeyFile == "" {
		return cfg, nil
	}
	text, err := os.ReadFile(d.sealKeyFile)
	if err != nil {
		return cfg, usage("-seal-key-file: %v", err)
	}
	keys, err := cryptoutil.ParseSealKeys(text)
	if err != nil {
		return cfg, usage("-seal-key-file: %v", err)
	}
	cfg.Sealer = keys
	return cfg, nil
}

func backupCommand() command {
	return command{
		name: "backup", args: "FILE", offline: true,
		short: "Write a whole database to a file",
		long: "The command reads the database itself, not the API; the daemon may run meanwhile. The file is compressed, has a checksum, and can be restored on every engine. " +
			"Sealed secrets stay sealed. Secrets that are not are sealed with -seal-key-file; without keys the command refuses them unless -plain-secrets is given.",
		example: "nanoctl backup -storage-dsn nanomdm.db -seal-key-file seal.keys nanomdm.backup\nnanoctl backup -storage pgsql -storage-dsn-file dsn.txt nanomdm.backup",
		prepare: func(flags *flag.FlagSet) runner {
			d := new(database)
			d.flags(flags)
			flags.StringVar(&d.sealKeyFile, "seal-key-file", "", "seal secrets that are not sealed with the first key in this `file`")
			plain := flags.Bool("plain-secrets", false, "write secrets that are not sealed as they are")
			return func(ctx context.Context, e *env, args []string) error {
				cfg, err := d.config()
				if err != nil {
					return err
				}
				started := time.Now()
				rows := int64(0)
				err = writeWhole(args[0], func(w io.Writer) error {
					rows, err = sqlstore.Backup(ctx, cfg, w, sqlstore.BackupOptions{PlainSecrets: *plain})
					return err
				})
				if errors.Is(err, sqlstore.ErrPlainSecrets) {
					return usage("%v: give -seal-key-file, or -plain-secrets if the file is kept as the database is", sqlstore.ErrPlainSecrets)
				}
				if err != nil {
					return err
				}
				return e.pairs([][2]string{{"file", args[0]}, {"rows", fmt.Sprint(rows)}, {"took", time.Since(started).Round(time.Millisecond).String()}})
			}
		},
	}
}

// writeWhole writes a file that is there in full or not at all, and that its
// owner alone can read.
func writeWhole(path string, write func(io.Writer) error) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".nanoctl-*") // with mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if err := write(f); err != nil {
		return errors.Join(err, f.Close())
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

func restoreCommand() command {
	return command{
		name: "restore", args: "FILE", offline: true,
		short: "Read a backup into an empty database, or check it",
		long: "The file is checked from end to end first. The database is made and migrated; it must be empty, and no daemon may run on it. " +
			"A restore that was interrupted goes on when the command is repeated. Sealed values stay sealed: start the daemon with the keys that the command names.",
		example: "nanoctl restore -storage pgsql -storage-dsn-file dsn.txt nanomdm.backup\nnanoctl restore -check nanomdm.backup",
		prepare: func(flags *flag.FlagSet) runner {
			d := new(database)
			d.flags(flags)
			check := flags.Bool("check", false, "check the file and count its rows; write nothing")
			return func(ctx context.Context, e *env, args []string) error {
				file, err := os.Open(args[0])
				if err != nil {
					return usage("%v", err)
				}
				defer file.Close()
				var head sqlstore.BackupHead
				rows := int64(0)
				if *check {
					var counts map[string]int64
					if head, counts, err = sqlstore.CheckBackup(file); err != nil {
						return err
					}
					for _, n := range counts {
						rows += n
					}
				} else {
					cfg, err := d.config()
					if err != nil {
						return err
					}
					if head, rows, err = sqlstore.Restore(ctx, cfg, file, nil); err != nil {
						return err
					}
				}
				keys := "none"
				if len(head.SealKeys) > 0 {
					keys = strings.Join(head.SealKeys, ", ")
				}
				return e.pairs([][2]string{{"backup of", head.CreatedAt.Format(time.RFC3339)}, {"engine", head.Engine}, {"rows", fmt.Sprint(rows)}, {"seal keys", keys}})
			}
		},
	}
}
