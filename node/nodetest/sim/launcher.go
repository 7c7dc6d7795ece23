package sim

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"rollcall/node"
	"rollcall/node/fault"
	"rollcall/node/reload"
	commandv1 "rollcall/proto/command/v1"
)

// hashOf is the sha256 of the file that a command names: every node has every file, and its content is its name.
func hashOf(command string) string {
	sum := sha256.Sum256([]byte(command))
	return hex.EncodeToString(sum[:])
}

// launcher stands in for node/supervisor: its processes are values in memory, which live until they are closed, crash, or
// their node is killed. What goes wrong, and how long things take, is the temper's to say.
type launcher struct {
	log    *slog.Logger
	node   string
	temper *temper
	pid    func() int
	// handled is told that plugin code begins to handle a write.
	handled func(mount, key, input string)

	mu     sync.Mutex
	closed bool
	procs  map[int]*process
	most   int
}

var _ node.Launcher = (*launcher)(nil)

func (l *launcher) Hash(_ context.Context, command string) (string, error) {
	return hashOf(command), nil
}

func (l *launcher) OpenContent(sha string) (io.ReadCloser, int64, error) {
	return nil, 0, fault.New(fault.NotFound, "open plugin", sha, "not kept")
}

func (l *launcher) Keep([]string) {}

// Ensure looks at the bytes: they can be missing, or other ones.
func (l *launcher) Ensure(ctx context.Context, spec *commandv1.Spec) error {
	if err := wait(ctx, l.temper.between(time.Millisecond, 8*time.Millisecond)); err != nil {
		return err
	}
	if spec.GetSha256() != hashOf(spec.GetCommand()) {
		return fault.New(fault.Refused, "verify", spec.GetCommand(), "sha256 %s, registered is %s", hashOf(spec.GetCommand()), spec.GetSha256())
	}
	switch l.temper.strikes("verify") {
	case refuse:
		return fault.New(fault.Refused, "verify", spec.GetCommand(), "no such file")
	case hang:
		<-ctx.Done()
		return fault.Wrap(context.Cause(ctx), "verify", spec.GetCommand())
	case fine:
	}
	return nil
}

// startLimit is node/supervisor's default StartTimeout.
const startLimit = 10 * time.Second

func (l *launcher) Start(ctx context.Context, _ string, spec *commandv1.Spec) (reload.Process, error) {
	began := time.Now()
	switch l.temper.strikes("start") {
	case refuse:
		_ = wait(ctx, 5*time.Millisecond)
		return nil, fault.New(fault.Refused, "start", spec.GetName(), "the plugin exited with 1 before the handshake")
	case hang:
		if err := wait(ctx, startLimit); err != nil {
			return nil, err
		}
		return nil, fault.New(fault.Refused, "start", spec.GetName(), "hangs before the handshake")
	case fine:
	}
	if err := wait(ctx, l.temper.between(15*time.Millisecond, 80*time.Millisecond)); err != nil {
		return nil, err
	}
	p := &process{l: l, spec: spec, pid: l.pid(), began: began, took: time.Since(began), multiplexes: l.temper.chance(0.7), done: make(chan struct{})}
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil, fault.New(fault.Unavailable, "start", spec.GetName(), "the node is stopping")
	}
	l.procs[p.pid] = p
	l.most = max(l.most, len(l.procs))
	l.mu.Unlock()
	l.log.Info("plugin started", "plugin", spec.GetType()+"/"+spec.GetName()+" "+spec.GetVersion(), "sha256", spec.GetSha256(), "pid", p.pid)
	if d, dies := l.temper.dies(); dies {
		go func() {
			select {
			case <-time.After(d):
				p.end("crash", "signal: segmentation fault")
			case <-p.done:
			}
		}()
	}
	return p, nil
}

func (l *launcher) Kill(ctx context.Context, pid int) error {
	l.mu.Lock()
	p := l.procs[pid]
	l.mu.Unlock()
	if p == nil {
		return nil
	}
	return p.Close(ctx)
}

func (l *launcher) Close(context.Context) error {
	l.killAll("stopped")
	return nil
}

// killAll ends every process at once, and no other starts: the kernel does so when the node is killed (Pdeathsig).
func (l *launcher) killAll(why string) {
	l.mu.Lock()
	l.closed = true
	all := make([]*process, 0, len(l.procs))
	for _, p := range l.procs {
		all = append(all, p)
	}
	l.mu.Unlock()
	for _, p := range all {
		p.end("", why)
	}
}

// crash ends one process, the n-th of those that run.
func (l *launcher) crash(n int) bool {
	l.mu.Lock()
	var p *process
	pids := make([]int, 0, len(l.procs))
	for pid := range l.procs {
		pids = append(pids, pid)
	}
	if len(pids) > 0 {
		p = l.procs[nth(pids, n)]
	}
	l.mu.Unlock()
	if p == nil {
		return false
	}
	p.end("crash", "signal: killed")
	return true
}

// process is one plugin process.
type process struct {
	l           *launcher
	spec        *commandv1.Spec
	pid         int
	began       time.Time
	took        time.Duration
	multiplexes bool
	done        chan struct{}

	mu       sync.Mutex
	how      string
	backends int
}

var _ reload.Process = (*process)(nil)

func (p *process) Multiplexes() bool     { return p.multiplexes }
func (p *process) PID() int              { return p.pid }
func (p *process) RSS() uint64           { return 6 << 20 }
func (p *process) Done() <-chan struct{} { return p.done }

func (p *process) Steps() []*commandv1.Step {
	return []*commandv1.Step{{Name: "start", AtUs: p.began.UnixMicro(), TookUs: p.took.Microseconds()}}
}

func (p *process) Backend(context.Context) (reload.Backend, error) {
	if p.l.temper.strikes("handshake") != fine {
		return nil, fault.New(fault.Refused, "handshake", p.spec.GetName(), "the plugin closed its socket")
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.backends++; p.backends > 1 && !p.multiplexes {
		return nil, fault.New(fault.Refused, "handshake", p.spec.GetName(), "it does not multiplex")
	}
	return newBackend(p), nil
}

func (p *process) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.how == "" {
		return nil
	}
	return fault.New(fault.Unavailable, "run plugin", p.spec.GetName(), "%s", p.how)
}

// Close ends the process; one that ignores it is killed after a while.
func (p *process) Close(ctx context.Context) error {
	if p.l.temper.strikes("close") != fine {
		t := time.NewTimer(p.l.temper.between(time.Second, 6*time.Second))
		defer t.Stop()
		select {
		case <-t.C:
		case <-p.done:
		case <-ctx.Done():
		}
	}
	p.end("", "closed")
	return nil
}

// end is the process's end. A cause says that it ended by itself.
func (p *process) end(cause, how string) {
	p.mu.Lock()
	if p.how != "" {
		p.mu.Unlock()
		return
	}
	p.how = how
	close(p.done)
	p.mu.Unlock()
	p.l.mu.Lock()
	delete(p.l.procs, p.pid)
	p.l.mu.Unlock()
	if cause != "" {
		p.l.log.Warn("plugin process ended by itself", "pid", p.pid, "exit", how)
		return
	}
	p.l.log.Info("plugin process ended", "pid", p.pid, "how", how)
}

// wait sleeps, or returns what has ended ctx.
func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("given up: %w", context.Cause(ctx))
	}
}
