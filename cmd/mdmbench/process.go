package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const apiKey = "mdmbench"

// tick is the unit of CPU time in /proc, the same on every Linux that Go runs
// on (USER_HZ).
const tick = 10 * time.Millisecond

// process is a server under measurement.
type process struct {
	cmd  *exec.Cmd
	addr string
	log  string
}

// startReference starts this program again, as the reference.
func startReference(caFile string) (*process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, referenceCommand, caFile)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &process{cmd: cmd}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		p.stop()
		return nil, fmt.Errorf("the reference did not start: %w", err)
	}
	p.addr = strings.TrimSpace(line)
	return p, nil
}

// startDaemon starts the daemon and waits until it answers.
func startDaemon(ctx context.Context, program, dir, caFile, storage, dsn string) (*process, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	addr := listener.Addr().String()
	listener.Close()
	log, err := os.Create(filepath.Join(dir, "daemon.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(program, "-listen", addr, "-ca", caFile, "-storage", storage)
	for _, pair := range os.Environ() {
		if !strings.HasPrefix(pair, "NANOMDM_") {
			cmd.Env = append(cmd.Env, pair)
		}
	}
	cmd.Env = append(cmd.Env, "NANOMDM_API="+apiKey, "NANOMDM_STORAGE_DSN="+dsn, "NANOMDM_WEBHOOK_NETWORKS=127.0.0.1")
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &process{cmd: cmd, addr: addr, log: log.Name()}
	deadline := time.Now().Add(time.Minute)
	for {
		_, err := p.call(ctx, http.MethodGet, "/readyz", nil)
		if err == nil {
			return p, nil
		}
		if ctx.Err() != nil || time.Now().After(deadline) || p.cmd.Process.Signal(syscall.Signal(0)) != nil {
			p.stop()
			return nil, fmt.Errorf("the daemon does not answer, see %s: %w", p.log, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// stop asks the process to end and waits for it.
func (p *process) stop() {
	// Whatever fails here, Wait tells the end.
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	timer := time.AfterFunc(time.Minute, func() { _ = p.cmd.Process.Kill() })
	defer timer.Stop()
	_ = p.cmd.Wait()
}

// call makes one request of an operator.
func (p *process) call(ctx context.Context, method, path string, body []byte) ([]byte, error) {
	request, err := http.NewRequestWithContext(ctx, method, "http://"+p.addr+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	request.SetBasicAuth("nanomdm", apiKey)
	request.Header.Set("Content-Type", "application/json") // sinks want it, enqueue takes it
	reply, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, err
	}
	defer reply.Body.Close()
	content, err := io.ReadAll(reply.Body)
	if err != nil {
		return nil, err
	}
	if reply.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %.200s", reply.Status, content)
	}
	return content, nil
}

// metrics reads the daemon's counters that have no labels.
func (p *process) metrics(ctx context.Context) (map[string]float64, error) {
	text, err := p.call(ctx, http.MethodGet, "/metrics", nil)
	if err != nil {
		return nil, fmt.Errorf("reading the daemon's metrics: %w", err)
	}
	values := make(map[string]float64)
	for line := range strings.Lines(string(text)) {
		name, value, found := strings.Cut(strings.TrimSpace(line), " ")
		if !found || strings.HasPrefix(line, "#") {
			continue
		}
		if v, err := strconv.ParseFloat(value, 64); err == nil {
			values[name] = v
		}
	}
	return values, nil
}

// cpu is the processor time that the process has used so far.
func (p *process) cpu() (time.Duration, error) {
	stat, err := readStat(p.cmd.Process.Pid)
	return stat.cpu, err
}

// resident is the memory of the process at its highest, in bytes.
func (p *process) resident() (int64, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kB, err := strconv.ParseInt(strings.Fields(value)[0], 10, 64)
			return kB << 10, err
		}
	}
	return 0, errors.New("/proc tells no VmHWM")
}

// stat is what /proc/PID/stat says.
type stat struct {
	parent      int
	cpu         time.Duration // its own
	cpuChildren time.Duration // of children that have ended
}

func readStat(pid int) (stat, error) {
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return stat{}, err
	}
	// The name, in parentheses, may hold anything.
	fields := strings.Fields(string(line[bytes.LastIndexByte(line, ')')+1:]))
	if len(fields) < 15 {
		return stat{}, fmt.Errorf("/proc/%d/stat is short", pid)
	}
	var n [15]int64
	for i := range n {
		if i == 0 {
			continue // the state, a letter
		}
		if n[i], err = strconv.ParseInt(fields[i], 10, 64); err != nil {
			return stat{}, err
		}
	}
	return stat{
		parent:      int(n[1]),
		cpu:         time.Duration(n[11]+n[12]) * tick,
		cpuChildren: time.Duration(n[13]+n[14]) * tick,
	}, nil
}

// treeCPU is the processor time of a process and of all below it.
func treeCPU(root int) (time.Duration, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0, err
	}
	stats := make(map[int]stat)
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		if s, err := readStat(pid); err == nil { // or it has just ended
			stats[pid] = s
		}
	}
	var total time.Duration
	for pid, s := range stats {
		for at := pid; at > 1; at = stats[at].parent {
			if at == root {
				total += s.cpu + s.cpuChildren
				break
			}
		}
	}
	return total, nil
}

// listenerPID finds the process that listens on a TCP port of this machine, 0
// if there is none that we may see.
func listenerPID(port int) int {
	inode := ""
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		text, err := os.ReadFile(table)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(text)) {
			fields := strings.Fields(line)
			if len(fields) > 9 && fields[3] == "0A" && strings.HasSuffix(fields[1], fmt.Sprintf(":%04X", port)) {
				inode = fields[9]
			}
		}
	}
	if inode == "" {
		return 0
	}
	links, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		return 0
	}
	lowest := 0 // children may hold the same socket
	for _, link := range links {
		if target, err := os.Readlink(link); err != nil || target != "socket:["+inode+"]" {
			continue
		}
		if pid, err := strconv.Atoi(strings.Split(link, "/")[2]); err == nil && (lowest == 0 || pid < lowest) {
			lowest = pid
		}
	}
	return lowest
}
