package supervisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-plugin/runner"

	"rollcall/node/failpoint"
	"rollcall/node/supervisor/internal/proc"
)

// run is one operating system process as go-plugin sees it. go-plugin is given the first line of stdout and nothing
// else of the output: its own readers have no bound, and wait for children that hold a pipe.
type run struct {
	s      *Supervisor
	cmd    *exec.Cmd
	tmpDir string
	owner  string // the ownerVariable of this process
	cgroup *proc.Cgroup
	stdout *output
	stderr *output
	first  *firstLine

	mu       sync.Mutex
	pid      int
	started  time.Time
	ended    bool
	endedAt  time.Time
	killedBy string // what we did to end it: "" , "SIGTERM", "SIGKILL"
	refusal  string // an address that was refused
	aborted  bool   // kill it as soon as it is there
	closing  bool   // Process.Close is at it
	waitErr  error

	spawnErr error
	exited   chan struct{} // the process has ended
	reaped   chan struct{} // waitErr is set, and nothing of it is left
}

var _ runner.Runner = (*run)(nil)

// Start is called by go-plugin, once.
func (r *run) Start(context.Context) error {
	err := r.spawn()
	if err != nil {
		r.spawnErr = err
		r.endCgroup()
	}
	return err
}

func (r *run) spawn() error {
	if err := failpoint.Hit(failpoint.ProcessExec, r.s.cfg.NodeName); err != nil {
		return err
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		return err
	}
	errR, errW, err := os.Pipe()
	if err != nil {
		_, _ = outR.Close(), outW.Close()
		return err
	}
	if r.cgroup != nil {
		r.cgroup.Attach(r.cmd)
	}
	r.cmd.Stdin, r.cmd.Stdout, r.cmd.Stderr = nil, outW, errW // a nil Stdin is /dev/null
	err = r.s.spawner.Start(r.cmd)
	_, _ = outW.Close(), errW.Close()
	if err != nil {
		_, _ = outR.Close(), errR.Close()
		return err
	}
	r.mu.Lock()
	r.pid, r.started = r.cmd.Process.Pid, time.Now()
	aborted := r.aborted
	r.mu.Unlock()
	proc.Harden(r.pid)
	if aborted {
		r.kill()
	}
	r.s.work.Go(func() { r.watch(outR, errR) })
	return failpoint.Hit(failpoint.ProcessStarted, r.s.cfg.NodeName)
}

// watch lives as long as the process and its output.
func (r *run) watch(outR, errR *os.File) {
	var pumps sync.WaitGroup
	pumps.Go(func() { _, _ = io.Copy(stdoutSplit{r.first, r.stdout}, outR) })
	pumps.Go(func() { _, _ = io.Copy(r.stderr, errR) })
	err := proc.Wait(r.cmd, func() {
		r.mu.Lock()
		r.ended, r.endedAt = true, time.Now()
		r.mu.Unlock()
		close(r.exited)
	})
	r.endCgroup()
	if n := proc.KillMarked(r.owner, r.s.cfg.PipeTimeout); n > 0 {
		r.s.metrics.orphans.Add(float64(n))
		r.stderr.log.Warn("killed processes that the plugin had left behind", "count", n)
	}
	// What was written before the end is still in the pipes; a child elsewhere may hold them open for ever.
	limit := time.Now().Add(r.s.cfg.PipeTimeout)
	_, _ = outR.SetReadDeadline(limit), errR.SetReadDeadline(limit)
	pumps.Wait()
	_, _ = outR.Close(), errR.Close()
	r.stdout.end()
	r.stderr.end()
	r.mu.Lock()
	r.waitErr = err
	r.mu.Unlock()
	close(r.reaped)
	r.first.end()
}

func (r *run) endCgroup() {
	if r.cgroup != nil {
		r.cgroup.End()
	}
}

// signal does f to the process unless it has ended: its pid is not anybody else's then.
func (r *run) signal(name string, f func(pid int)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.pid != 0 && !r.ended {
		r.killedBy = name
		f(r.pid)
	}
}

func (r *run) kill() { r.signal("SIGKILL", proc.KillGroup) }

// abort is kill for a process that may not have been started yet.
func (r *run) abort() {
	r.mu.Lock()
	r.aborted = true
	r.mu.Unlock()
	r.kill()
}

func (r *run) term() { r.signal("SIGTERM", proc.TermGroup) }

// Kill is called by go-plugin when a start fails and at the end of its Client.Kill. Process.Close owns the order of
// an end, so that a plugin gets the time that was configured.
func (r *run) Kill(context.Context) error {
	r.mu.Lock()
	closing := r.closing
	r.mu.Unlock()
	if !closing {
		r.kill()
	}
	return nil
}

// Wait is called by go-plugin, once.
func (r *run) Wait(context.Context) error {
	<-r.reaped
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.waitErr
}

// Stdout gives go-plugin the handshake line.
func (r *run) Stdout() io.ReadCloser { return r.first }

// Stderr gives go-plugin nothing.
func (r *run) Stderr() io.ReadCloser { return io.NopCloser(strings.NewReader("")) }

// Name is the plugin's file.
func (r *run) Name() string { return r.cmd.Args[0] }

// ID is the pid, and "" before the start.
func (r *run) ID() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.pid == 0 {
		return ""
	}
	return strconv.Itoa(r.pid)
}

// Diagnose adds nothing: explain has more to say.
func (r *run) Diagnose(context.Context) string { return "" }

// PluginToHost allows sockets in the process's own directory and nothing else: a plugin could name any address.
func (r *run) PluginToHost(network, address string) (string, string, error) {
	if network != "unix" || filepath.Dir(filepath.Clean(address)) != r.tmpDir {
		r.mu.Lock()
		r.refusal = printable(network + " " + address)
		r.mu.Unlock()
		return "", "", fmt.Errorf("address %s %s is refused", network, address)
	}
	return network, address, nil
}

// HostToPlugin changes nothing: both see the same file system.
func (r *run) HostToPlugin(network, address string) (string, string, error) {
	return network, address, nil
}

// describe tells in words how the process ended; "" while it runs.
func (r *run) describe() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.ended {
		return ""
	}
	up := r.endedAt.Sub(r.started).Round(time.Millisecond)
	how := "ended"
	if exit, ok := errors.AsType[*exec.ExitError](r.waitErr); ok {
		how = exitWords(exit)
	} else if r.waitErr == nil && r.isReaped() {
		how = "exited with status 0"
	}
	if r.killedBy != "" {
		return fmt.Sprintf("was ended with %s after %s", r.killedBy, up)
	}
	return fmt.Sprintf("%s after %s", how, up)
}

// diedAlone is describe for a process that nobody ended; "" for others.
func (r *run) diedAlone() string {
	r.mu.Lock()
	by := r.killedBy
	r.mu.Unlock()
	if by != "" {
		return ""
	}
	return r.describe()
}

func (r *run) isReaped() bool {
	select {
	case <-r.reaped:
		return true
	default:
		return false
	}
}

func exitWords(exit *exec.ExitError) string {
	ws, ok := exit.Sys().(syscall.WaitStatus)
	if ok && ws.Signaled() {
		words := fmt.Sprintf("was killed by signal %d (%s)", int(ws.Signal()), ws.Signal())
		if ws.Signal() == syscall.SIGKILL {
			words += ", which may be the kernel's out-of-memory killer"
		}
		return words
	}
	return fmt.Sprintf("exited with status %d", exit.ExitCode())
}

// maxFirstLine is several times what a handshake with a certificate needs, and fits go-plugin's buffer.
const maxFirstLine = 4000

// firstLine passes the first line of a stream on to a reader, keeps what it was, and ends the reader when the
// stream ends.
type firstLine struct {
	mu    sync.Mutex
	cond  *sync.Cond
	buf   []byte
	have  bool // a whole line
	over  bool // no line will come
	given bool
}

func newFirstLine() *firstLine {
	f := &firstLine{}
	f.cond = sync.NewCond(&f.mu)
	return f
}

// take returns how many bytes of p belong to the first line.
func (f *firstLine) take(p []byte) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.have || f.over {
		return 0
	}
	line, _, whole := bytes.Cut(p, []byte("\n"))
	room := maxFirstLine - len(f.buf)
	f.buf = append(f.buf, line[:min(len(line), room)]...)
	f.have = whole && len(line) <= room
	f.over = len(line) > room
	f.cond.Broadcast()
	if f.have {
		return len(line) + 1
	}
	return len(line)
}

// stdoutSplit gives the first line to go-plugin and the rest to the log.
type stdoutSplit struct {
	first *firstLine
	rest  *output
}

func (s stdoutSplit) Write(p []byte) (int, error) {
	if rest := p[s.first.take(p):]; len(rest) > 0 {
		_, _ = s.rest.Write(rest)
	}
	return len(p), nil
}

func (f *firstLine) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.over = true
	f.cond.Broadcast()
}

// Read gives the line, then waits for the end of the process.
func (f *firstLine) Read(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for {
		switch {
		case f.have && !f.given && len(p) > len(f.buf):
			f.given = true
			return copy(p, append(f.buf, '\n')), nil
		case f.over:
			return 0, io.EOF
		}
		f.cond.Wait()
	}
}

// Close ends the reader.
func (f *firstLine) Close() error {
	f.end()
	return nil
}

// text is what was read of the first line.
func (f *firstLine) text() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return string(f.buf)
}
