//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/nanomdm/nanomdm/backoff"
)

// process is a child in a process group of its own, so that a signal reaches
// everything it started.
type process struct {
	name   string
	log    string
	cmd    *exec.Cmd
	exited chan struct{}
}

// start runs a program as the named user (empty: as ourselves) and appends
// what it prints to NAME.log in dir. The kernel kills it should we die.
func start(dir, name, as string, env []string, program string, args ...string) (*process, error) {
	p := &process{name: name, log: filepath.Join(dir, name+".log"), exited: make(chan struct{})}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p.cmd = exec.Command(program, args...)
	p.cmd.Env = append(cleanEnviron(), env...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if as != "" {
		if p.cmd.SysProcAttr.Credential, err = credential(as); err != nil {
			return nil, err
		}
		p.cmd.Dir = "/"
	}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	go func() {
		_ = p.cmd.Wait() // the faults end it; the log says how
		close(p.exited)
	}()
	return p, nil
}

// cleanEnviron is our environment without the daemon's variables.
func cleanEnviron() []string {
	var env []string
	for _, pair := range os.Environ() {
		if !strings.HasPrefix(pair, "NANOMDM_") {
			env = append(env, pair)
		}
	}
	return env
}

func credential(name string) (*syscall.Credential, error) {
	u, err := user.Lookup(name)
	if err != nil {
		return nil, err
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return nil, err
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
}

// signal reaches the process, its group and all its descendants: PostgreSQL's
// processes have groups of their own. A process that has ended takes none.
func (p *process) signal(s syscall.Signal) {
	children := descendants(p.cmd.Process.Pid)
	_ = syscall.Kill(-p.cmd.Process.Pid, s)
	for _, pid := range children {
		_ = syscall.Kill(pid, s)
	}
}

// descendants lists the children of a process, their children and so on.
func descendants(pid int) (all []int) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		panic(err) // the pattern is constant
	}
	children := make(map[int][]int)
	for _, path := range stats {
		content, err := os.ReadFile(path)
		if err != nil {
			continue // it ended meanwhile
		}
		if child, parent, ok := parentOf(string(content)); ok {
			children[parent] = append(children[parent], child)
		}
	}
	for next := children[pid]; len(next) > 0; next = next[1:] {
		all = append(all, next[0])
		next = append(next, children[next[0]]...)
	}
	return all
}

// parentOf reads a process and its parent from the content of /proc/PID/stat:
// the number, the name in brackets, the state and the parent.
func parentOf(stat string) (pid, parent int, ok bool) {
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(fields) < 2 {
		return 0, 0, false
	}
	number, _, _ := strings.Cut(stat, " ")
	pid, err := strconv.Atoi(number)
	if err == nil {
		parent, err = strconv.Atoi(fields[1])
	}
	return pid, parent, err == nil
}

func (p *process) running() bool {
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// kill ends the group at once.
func (p *process) kill() {
	p.signal(syscall.SIGKILL)
	<-p.exited
}

// stop asks the process to end, and kills it after ten seconds.
func (p *process) stop(s syscall.Signal) {
	if p == nil {
		return
	}
	_ = p.cmd.Process.Signal(s)
	select {
	case <-p.exited:
	case <-time.After(10 * time.Second):
		p.kill()
	}
}

// tail is the end of the log.
func (p *process) tail() string {
	content, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	return string(content[max(0, len(content)-2000):])
}

// command runs a program to its end.
func command(ctx context.Context, dir, name, as string, env []string, program string, args ...string) error {
	p, err := start(dir, name, as, env, program, args...)
	if err != nil {
		return err
	}
	select {
	case <-p.exited:
	case <-ctx.Done():
		p.kill()
		return ctx.Err()
	}
	if code := p.cmd.ProcessState.ExitCode(); code != 0 {
		return fmt.Errorf("%s ended with code %d: %s", name, code, p.tail())
	}
	return nil
}

// freePort finds a port that nobody listens on, below the range that outgoing
// connections use.
func freePort() (int, error) {
	for range 200 {
		port := 20000 + int(time.Now().UnixNano()/1000)%12000
		listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			return port, listener.Close()
		}
	}
	return 0, errors.New("no free port between 20000 and 32000")
}

// await calls ready until it returns nil.
func await(ctx context.Context, limit time.Duration, what string, ready func() error) error {
	deadline := time.Now().Add(limit)
	for {
		err := ready()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("waiting %v for %s: %w", limit, what, err)
		}
		if err := backoff.Sleep(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
}
