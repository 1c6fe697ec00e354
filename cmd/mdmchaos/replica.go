//go:build linux

package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const apiKey = "chaos-1f6d2a9be05c4873"

// replica is one process of the daemon, always at the same address.
type replica struct {
	dir, name, program string
	port               int
	args, env          []string

	mu      sync.Mutex
	process *process
}

func newReplica(dir, program string, i int, storage, dsn string, args ...string) (*replica, error) {
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	return &replica{
		dir: dir, name: "replica-" + strconv.Itoa(i), program: program, port: port,
		args: append([]string{"-listen", "127.0.0.1:" + strconv.Itoa(port), "-storage", storage}, args...),
		env:  []string{"NANOMDM_API=" + apiKey, "NANOMDM_STORAGE_DSN=" + dsn},
	}, nil
}

func (r *replica) url() string { return "http://127.0.0.1:" + strconv.Itoa(r.port) }

// start starts the process unless it runs.
func (r *replica) start() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.process != nil && r.process.running() {
		return nil
	}
	p, err := start(r.dir, r.name, "", r.env, r.program, r.args...)
	if err != nil {
		return err // the process that ended stays, for stop
	}
	r.process = p
	return nil
}

func (r *replica) current() *process {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.process
}

func (r *replica) kill()   { r.current().kill() }
func (r *replica) pause()  { r.current().signal(syscall.SIGSTOP) }
func (r *replica) resume() { r.current().signal(syscall.SIGCONT) }

// stop ends the process as an operator does. A daemon that does not end by
// itself is killed.
func (r *replica) stop() {
	r.resume()
	r.current().stop(syscall.SIGTERM)
}

// ready waits until the replica says that it serves.
func (r *replica) ready(ctx context.Context, limit time.Duration) error {
	return await(ctx, limit, r.name, func() error {
		if p := r.current(); !p.running() {
			return fmt.Errorf("it ended: %s", p.tail())
		}
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, r.url()+"/readyz", nil)
		if err != nil {
			return err
		}
		client := http.Client{Timeout: 5 * time.Second}
		reply, err := client.Do(request)
		if err != nil {
			return err
		}
		_ = reply.Body.Close()
		if reply.StatusCode != http.StatusOK {
			return fmt.Errorf("/readyz answers %s", reply.Status)
		}
		return nil
	})
}

// balancer is HAProxy before all replicas.
type balancer struct {
	port    int
	process *process
}

func startBalancer(ctx context.Context, dir string, replicas []*replica) (*balancer, error) {
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	var servers strings.Builder
	for _, r := range replicas {
		fmt.Fprintf(&servers, "    server %s 127.0.0.1:%d check inter 500ms fall 2 rise 1\n", r.name, r.port)
	}
	path := filepath.Join(dir, "haproxy.cfg")
	config := fmt.Sprintf(`global
    maxconn 2000
defaults
    mode http
    timeout connect 2s
    timeout client 60s
    timeout server 40s
    timeout check 2s
    option redispatch
    retries 2
frontend mdm
    bind 127.0.0.1:%d
    default_backend nanomdm
backend nanomdm
    balance random
    option httpchk GET /readyz
%s`, port, servers.String())
	if err := os.WriteFile(path, []byte(config), 0o644); err != nil {
		return nil, err
	}
	process, err := start(dir, "haproxy", "", nil, "haproxy", "-db", "-f", path)
	if err != nil {
		return nil, fmt.Errorf("%w; `make chaos` installs HAProxy", err)
	}
	b := &balancer{port: port, process: process}
	return b, await(ctx, 20*time.Second, "HAProxy", func() error {
		if !process.running() {
			return fmt.Errorf("it ended: %s", process.tail())
		}
		reply, err := http.Get(b.url() + "/version")
		if err != nil {
			return err
		}
		return reply.Body.Close()
	})
}

func (b *balancer) url() string { return "http://127.0.0.1:" + strconv.Itoa(b.port) }
