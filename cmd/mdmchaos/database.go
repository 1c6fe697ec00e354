//go:build linux

package main

import (
	"context"
	"database/sql"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"time"
)

// database is a cluster that replicas work on.
type database interface {
	// start brings all nodes up with an empty database.
	start(ctx context.Context) error
	// source is what a replica is given as -storage and -storage-dsn.
	source(replica int) (storage, dsn string)
	// heal ends every fault: all nodes run and are in the cluster.
	heal(ctx context.Context) error
	stop()
}

const (
	databaseUser     = "fleet"
	databasePassword = "insecure"
	databaseName     = "nanomdm"
	nodeReady        = 90 * time.Second
)

// folder makes a folder below dir that belongs to the user.
func folder(dir, name, owner string) (string, error) {
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(path, 0o700); err != nil {
		return "", err
	}
	u, err := user.Lookup(owner)
	if err != nil {
		return "", fmt.Errorf("%w; `make chaos` installs what is missing", err)
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		return "", err
	}
	gid, err := strconv.Atoi(u.Gid)
	if err != nil {
		return "", err
	}
	return path, os.Chown(path, uid, gid)
}

// execute runs one statement on a server.
func execute(ctx context.Context, driver, dsn, statement string) error {
	db, err := sql.Open(driver, dsn)
	if err != nil {
		return err
	}
	defer db.Close()
	_, err = db.ExecContext(ctx, statement)
	return err
}

// number reads one number from a server.
func number(ctx context.Context, driver, dsn, query string) (n int64, err error) {
	db, err := sql.Open(driver, dsn)
	if err != nil {
		return 0, err
	}
	defer db.Close()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return n, db.QueryRowContext(ctx, query).Scan(&n)
}
