//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"

	_ "github.com/go-sql-driver/mysql" // the driver mysql
)

// galeraCluster is three nodes of MariaDB with Galera. With one writer all
// replicas reach the first node; with several, each has a node of its own.
type galeraCluster struct {
	dir     string
	writers int

	nodes  []*galeraNode
	relays []*relay
}

type galeraNode struct {
	name, data            string
	port, group, ist, sst int
	process               *process
}

func (n *galeraNode) address() string { return fmt.Sprintf("127.0.0.1:%d", n.port) }

func mysqlDSN(address, database string) string {
	return databaseUser + ":" + databasePassword + "@tcp(" + address + ")/" + database
}

const (
	galeraNodes    = 3
	galeraProvider = "/usr/lib/galera/libgalera_smm.so"
)

func (c *galeraCluster) start(ctx context.Context) error {
	if _, err := os.Stat(galeraProvider); err != nil {
		return errors.New("no Galera here; `make chaos` installs it")
	}
	for i := range galeraNodes {
		n := &galeraNode{name: "galera-" + strconv.Itoa(i)}
		var err error
		if n.data, err = folder(c.dir, n.name, "mysql"); err != nil {
			return err
		}
		for _, port := range []*int{&n.port, &n.group, &n.ist, &n.sst} {
			if *port, err = freePort(); err != nil {
				return err
			}
		}
		c.nodes = append(c.nodes, n)
	}
	if err := c.install(ctx, c.nodes[0]); err != nil {
		return err
	}
	for i, n := range c.nodes {
		if err := c.join(ctx, n, i == 0); err != nil {
			return err
		}
	}
	if err := execute(ctx, "mysql", mysqlDSN(c.nodes[0].address(), "mysql"), "CREATE DATABASE "+databaseName); err != nil {
		return err
	}
	for _, n := range c.nodes[:c.writers] {
		r, err := newRelay(n.address())
		if err != nil {
			return err
		}
		c.relays = append(c.relays, r)
	}
	return nil
}

// install makes the data of the first node, with our account; the others copy
// it when they join.
func (c *galeraCluster) install(ctx context.Context, n *galeraNode) error {
	if err := command(ctx, c.dir, "install", "mysql", nil, "mariadb-install-db", "--no-defaults", "--datadir="+n.data,
		"--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve"); err != nil {
		return err
	}
	accounts := fmt.Sprintf("FLUSH PRIVILEGES;\nCREATE USER '%s'@'%%' IDENTIFIED BY '%s';\nGRANT ALL ON *.* TO '%[1]s'@'%%' WITH GRANT OPTION;\n",
		databaseUser, databasePassword)
	bootstrap := exec.CommandContext(ctx, "/usr/sbin/mariadbd", "--no-defaults", "--bootstrap", "--datadir="+n.data)
	bootstrap.Stdin = strings.NewReader(accounts)
	bootstrap.Dir = "/"
	as, err := credential("mysql")
	if err != nil {
		return err
	}
	bootstrap.SysProcAttr = &syscall.SysProcAttr{Credential: as, Pdeathsig: syscall.SIGKILL}
	if output, err := bootstrap.CombinedOutput(); err != nil {
		return fmt.Errorf("making the accounts: %w: %s", err, output)
	}
	return nil
}

func (c *galeraCluster) settings(n *galeraNode) []string {
	var members []string
	for _, m := range c.nodes {
		members = append(members, fmt.Sprintf("127.0.0.1:%d", m.group))
	}
	return []string{
		"--no-defaults", "--datadir=" + n.data, "--bind-address=127.0.0.1", "--port=" + strconv.Itoa(n.port),
		"--skip-name-resolve", "--socket=" + filepath.Join(n.data, "socket"), "--pid-file=" + filepath.Join(n.data, "pid"),
		"--max-connections=300", "--character-set-server=utf8mb4", "--innodb-flush-log-at-trx-commit=2",
		"--binlog-format=ROW", "--innodb-autoinc-lock-mode=2", "--wsrep-on=ON", "--wsrep-provider=" + galeraProvider,
		"--wsrep-cluster-name=chaos", "--wsrep-cluster-address=gcomm://" + strings.Join(members, ","),
		"--wsrep-node-name=" + n.name, "--wsrep-node-address=127.0.0.1", "--wsrep-slave-threads=2",
		"--wsrep-sst-method=rsync", fmt.Sprintf("--wsrep-sst-receive-address=127.0.0.1:%d", n.sst),
		fmt.Sprintf("--wsrep-provider-options=gmcast.listen_addr=tcp://127.0.0.1:%d;ist.recv_addr=127.0.0.1:%d;gcache.size=128M", n.group, n.ist),
	}
}

var recovered = regexp.MustCompile(`Recovered position:? ([0-9a-f-]+:-?\d+)`)

// join starts a node and waits until it is synced. A node that crashed first
// finds out how far it was, so that it needs no copy of everything.
func (c *galeraCluster) join(ctx context.Context, n *galeraNode, first bool) error {
	args := c.settings(n)
	if first {
		args = append(args, "--wsrep-new-cluster")
	} else if _, err := os.Stat(filepath.Join(n.data, "ibdata1")); err == nil {
		recovery := n.name + "-recovery"
		_ = os.Remove(filepath.Join(c.dir, recovery+".log"))
		if err := command(ctx, c.dir, recovery, "mysql", nil, "/usr/sbin/mariadbd", append(args, "--wsrep-recover")...); err != nil {
			return err
		}
		output, err := os.ReadFile(filepath.Join(c.dir, recovery+".log"))
		if err != nil {
			return err
		}
		if m := recovered.FindSubmatch(output); m != nil {
			args = append(args, "--wsrep-start-position="+string(m[1]))
		}
	}
	process, err := start(c.dir, n.name, "mysql", []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, "/usr/sbin/mariadbd", args...)
	if err != nil {
		return err
	}
	n.process = process
	return await(ctx, nodeReady, n.name, func() error {
		if !n.process.running() {
			return fmt.Errorf("it ended: %s", n.process.tail())
		}
		return c.synced(ctx, n)
	})
}

func (c *galeraCluster) synced(ctx context.Context, n *galeraNode) error {
	state, err := number(ctx, "mysql", mysqlDSN(n.address(), "mysql"),
		"SELECT CAST(VARIABLE_VALUE AS INT) FROM information_schema.GLOBAL_STATUS WHERE VARIABLE_NAME = 'WSREP_LOCAL_STATE'")
	if err == nil && state != 4 {
		err = fmt.Errorf("its state is %d", state)
	}
	return err
}

func (c *galeraCluster) source(replica int) (storage, dsn string) {
	return "mysql", mysqlDSN(c.relays[replica%len(c.relays)].address(), databaseName)
}

// lose kills a node, waits and lets it come back.
func (c *galeraCluster) lose(ctx context.Context, i int, wait func(context.Context) error) error {
	c.nodes[i].process.kill()
	if err := wait(ctx); err != nil {
		return err
	}
	return c.join(ctx, c.nodes[i], false)
}

func (c *galeraCluster) heal(ctx context.Context) error {
	for _, n := range c.nodes {
		if n.process.running() {
			n.process.signal(syscall.SIGCONT)
		} else if err := c.join(ctx, n, false); err != nil {
			return err
		}
	}
	for _, n := range c.nodes {
		if err := await(ctx, nodeReady, n.name, func() error { return c.synced(ctx, n) }); err != nil {
			return err
		}
	}
	return nil
}

func (c *galeraCluster) stop() {
	for _, n := range c.nodes {
		if n.process != nil {
			n.process.signal(syscall.SIGCONT)
			n.process.stop(syscall.SIGTERM)
		}
	}
	for _, r := range c.relays {
		r.close()
	}
}

// cutAddress is net.SplitHostPort for addresses that we made.
func cutAddress(address string) (host, port string, err error) { return net.SplitHostPort(address) }
