//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib" // the driver pgx

	"github.com/nanomdm/nanomdm/backoff"
)

// pgCluster is PostgreSQL: a primary, and perhaps a synchronous standby or
// PgBouncer. Replicas reach the primary through a relay, as they would through
// a virtual address.
type pgCluster struct {
	dir         string
	synchronous bool
	pooled      bool  // PgBouncer in transaction mode stands before it
	diskSize    int64 // bytes; the data lies on a disk of its own of that size

	bin     string
	nodes   []*pgNode
	primary int
	relay   *relay
	bouncer *process
	mounted string
}

type pgNode struct {
	name, data string
	port       int
	process    *process
}

func (n *pgNode) address() string { return fmt.Sprintf("127.0.0.1:%d", n.port) }

func pgURL(address, database string) string {
	return "postgres://" + databaseUser + ":" + databasePassword + "@" + address + "/" + database + "?sslmode=disable"
}

func (c *pgCluster) start(ctx context.Context) error {
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if err != nil || len(found) == 0 {
		return errors.New("PostgreSQL is not installed; `make chaos` installs it")
	}
	c.bin = filepath.Dir(slices.Max(found))
	first, err := c.add(0)
	if err != nil {
		return err
	}
	if err := command(ctx, c.dir, "initdb", "postgres", nil, filepath.Join(c.bin, "initdb"),
		"-D", first.data, "-U", databaseUser, "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C.UTF-8"); err != nil {
		return err
	}
	if err := c.run(ctx, first); err != nil {
		return err
	}
	if c.synchronous {
		if _, err := c.add(1); err != nil {
			return err
		}
		if err := c.follow(ctx, 1); err != nil {
			return err
		}
		if err := c.awaitStandby(ctx); err != nil {
			return err
		}
	}
	if err := execute(ctx, "pgx", pgURL(first.address(), "postgres"), "CREATE DATABASE "+databaseName); err != nil {
		return err
	}
	if c.relay, err = newRelay(first.address()); err != nil {
		return err
	}
	if c.pooled {
		return c.startBouncer(ctx)
	}
	return nil
}

func (c *pgCluster) add(i int) (*pgNode, error) {
	name := "pgsql-" + strconv.Itoa(i)
	dir := c.dir
	if c.diskSize > 0 {
		c.mounted = filepath.Join(c.dir, "disk")
		if err := os.MkdirAll(c.mounted, 0o755); err != nil {
			return nil, err
		}
		if err := syscall.Mount("tmpfs", c.mounted, "tmpfs", 0, "size="+strconv.FormatInt(c.diskSize, 10)); err != nil {
			return nil, fmt.Errorf("mounting a small disk: %w", err)
		}
		dir = c.mounted
	}
	data, err := folder(dir, name, "postgres")
	if err != nil {
		return nil, err
	}
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	node := &pgNode{name: name, data: data, port: port}
	c.nodes = append(c.nodes, node)
	return node, nil
}

// run starts a node and waits until it answers. Every node of a synchronous
// cluster waits for its standby in each commit, also right after it was
// promoted: nothing that a primary acknowledged alone may be lost with it. The
// standby's receiver counts, a base backup's does not.
func (c *pgCluster) run(ctx context.Context, n *pgNode) (err error) {
	standbys := ""
	if c.synchronous {
		standbys = "walreceiver"
	}
	n.process, err = start(c.dir, n.name, "postgres", nil, filepath.Join(c.bin, "postgres"), "-D", n.data,
		"-p", strconv.Itoa(n.port), "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=",
		"-c", "max_connections=200", "-c", "synchronous_standby_names="+standbys, "-c", "max_wal_size=96MB",
		"-c", "wal_keep_size=256MB", "-c", "wal_receiver_timeout=5s", "-c", "wal_sender_timeout=5s")
	if err != nil {
		return err
	}
	return await(ctx, nodeReady, n.name, func() error {
		if !n.process.running() {
			return fmt.Errorf("it ended: %s", n.process.tail())
		}
		_, err := number(ctx, "pgx", pgURL(n.address(), "postgres"), "SELECT 1")
		return err
	})
}

// follow makes a node a fresh standby of the primary.
func (c *pgCluster) follow(ctx context.Context, i int) error {
	n := c.nodes[i]
	if err := os.RemoveAll(n.data); err != nil {
		return err
	}
	if _, err := folder(filepath.Dir(n.data), filepath.Base(n.data), "postgres"); err != nil {
		return err
	}
	if err := command(ctx, c.dir, n.name+"-copy", "postgres", nil, filepath.Join(c.bin, "pg_basebackup"),
		"-D", n.data, "-R", "-X", "stream", "--no-sync", "-c", "fast", "-h", "127.0.0.1",
		"-p", strconv.Itoa(c.nodes[c.primary].port), "-U", databaseUser); err != nil {
		return err
	}
	return c.run(ctx, n)
}

// awaitStandby waits until commits of the primary wait for the standby and for
// nothing else.
func (c *pgCluster) awaitStandby(ctx context.Context) error {
	dsn := pgURL(c.nodes[c.primary].address(), "postgres")
	return await(ctx, nodeReady, "the standby", func() error {
		n, err := number(ctx, "pgx", dsn, "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'")
		if err == nil && n == 0 {
			err = errors.New("no standby is synchronous")
		}
		return err
	})
}

func (c *pgCluster) source(int) (storage, dsn string) {
	address := c.relay.address()
	if c.bouncer != nil {
		address = "127.0.0.1:" + strconv.Itoa(c.bouncerPort())
	}
	return "pgsql", pgURL(address, databaseName)
}

// failOver kills the primary, promotes the standby and sends everybody there.
// The old primary becomes the new standby.
func (c *pgCluster) failOver(ctx context.Context) error {
	old, next := c.nodes[c.primary], c.nodes[1-c.primary]
	old.process.kill()
	c.relay.cutAll()
	next.process.signal(syscall.SIGCONT)
	if err := command(ctx, c.dir, "promote", "postgres", nil, filepath.Join(c.bin, "pg_ctl"), "promote", "-w", "-D", next.data); err != nil {
		return err
	}
	c.primary = 1 - c.primary
	c.relay.move(next.address())
	if err := c.follow(ctx, 1-c.primary); err != nil {
		return err
	}
	return c.awaitStandby(ctx)
}

// lag stops the standby, so that commits hang, for d; then the primary dies.
func (c *pgCluster) lag(ctx context.Context, d time.Duration) error {
	c.nodes[1-c.primary].process.signal(syscall.SIGSTOP)
	if err := backoff.Sleep(ctx, d); err != nil {
		return err
	}
	return c.failOver(ctx)
}

// hang stops the primary: it keeps its connections and answers none.
func (c *pgCluster) hang() { c.nodes[c.primary].process.signal(syscall.SIGSTOP) }

func (c *pgCluster) heal(ctx context.Context) error {
	c.relay.refuse(false)
	for i, n := range c.nodes {
		if n.process != nil && n.process.running() {
			n.process.signal(syscall.SIGCONT)
			continue
		}
		if i == c.primary {
			if err := c.run(ctx, n); err != nil {
				return err
			}
		}
	}
	return os.RemoveAll(filepath.Join(c.dir, "disk", "filler"))
}

func (c *pgCluster) stop() {
	c.bouncer.stop(syscall.SIGINT)
	for _, n := range c.nodes {
		if n.process != nil {
			n.process.signal(syscall.SIGCONT)
			n.process.stop(syscall.SIGINT)
		}
	}
	if c.relay != nil {
		c.relay.close()
	}
	if c.mounted != "" {
		_ = syscall.Unmount(c.mounted, 0) // the folder is removed afterwards, which tells
	}
}

// fillDisk leaves no byte free on the data's disk.
func (c *pgCluster) fillDisk() error {
	var s syscall.Statfs_t
	if err := syscall.Statfs(c.mounted, &s); err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(c.mounted, "filler"))
	if err != nil {
		return err
	}
	defer f.Close()
	// Writes of the server take a part meanwhile, so the rest is taken in ever
	// smaller pieces.
	end := int64(0)
	for size := int64(s.Bavail) * s.Bsize; size >= s.Bsize; {
		if err := syscall.Fallocate(int(f.Fd()), 0, end, size); err == nil {
			end += size
		} else {
			size /= 2
		}
	}
	return nil
}

func (c *pgCluster) bouncerPort() int {
	port, err := strconv.Atoi(filepath.Ext(c.bouncer.name)[1:])
	if err != nil {
		panic(err) // startBouncer gave the name
	}
	return port
}

func (c *pgCluster) startBouncer(ctx context.Context) error {
	port, err := freePort()
	if err != nil {
		return err
	}
	dir, err := folder(c.dir, "pgbouncer", "postgres")
	if err != nil {
		return err
	}
	host, target, _ := cutAddress(c.relay.address())
	config := fmt.Sprintf(`[databases]
%s = host=%s port=%s user=%s
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = %d
unix_socket_dir =
auth_type = any
pool_mode = transaction
max_client_conn = 500
default_pool_size = 20
ignore_startup_parameters = extra_float_digits
server_login_retry = 1
`, databaseName, host, target, databaseUser, port)
	path := filepath.Join(dir, "pgbouncer.ini")
	if err := os.WriteFile(path, []byte(config), 0o644); err != nil {
		return err
	}
	if c.bouncer, err = start(c.dir, "pgbouncer."+strconv.Itoa(port), "postgres", nil, "/usr/sbin/pgbouncer", path); err != nil {
		return err
	}
	return await(ctx, nodeReady, "PgBouncer", func() error {
		// Its own console answers without the server; the pool needs it.
		_, err := number(ctx, "pgx", pgURL("127.0.0.1:"+strconv.Itoa(port), databaseName)+"&default_query_exec_mode=simple_protocol", "SELECT 1")
		return err
	})
}
