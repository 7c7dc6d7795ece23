package supervisor

import (
	"context"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	goplugin "github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"

	"rollcall/node/failpoint"
	"rollcall/node/fault"
	"rollcall/node/supervisor/internal/proc"
	pluginpb "rollcall/proto/plugin"
)

// killWait bounds the wait for a process after SIGKILL. Only a process that hangs in the kernel takes longer.
const killWait = 10 * time.Second

// Timings are the phases of a start.
type Timings struct {
	// Verify is finding, hashing and sealing the bytes; next to nothing when they are in memory.
	Verify time.Duration
	// Start is until the process runs.
	Start time.Duration
	// Handshake is from there until instances can be made in it.
	Handshake time.Duration
}

// Process is one plugin process that has answered the handshake. All methods may be called from any goroutine.
type Process struct {
	s           *Supervisor
	spec        Spec
	run         *run
	client      *goplugin.Client
	conn        *grpc.ClientConn
	broker      *goplugin.GRPCBroker
	log         *slog.Logger
	pid         int
	started     time.Time
	multiplexed bool
	timings     Timings

	mu        sync.Mutex
	instances map[instance]struct{}
	handed    int // instances ever made
	closing   bool
	ended     bool           // track takes no more
	served    sync.WaitGroup // what this side does for instances

	closed   sync.Once
	released chan struct{} // the process has ended and everything of it on this side is given back
}

// instance is what a process holds: a *Backend or a *Database.
type instance interface {
	// close tells the plugin that the instance is no longer needed.
	close(ctx context.Context) error
	// drop gives back what the host holds for it; the plugin is not asked.
	drop()
}

// Pid is the process id on this host.
func (p *Process) Pid() int { return p.pid }

// Spec is what runs.
func (p *Process) Spec() Spec { return p.spec }

// StartedAt is when the process was started, by this host's clock: for showing.
func (p *Process) StartedAt() time.Time { return p.started }

// Multiplexed reports whether Backend or Database may be called more than once.
func (p *Process) Multiplexed() bool { return p.multiplexed }

// Done is closed as soon as the process has ended, for whatever reason.
func (p *Process) Done() <-chan struct{} { return p.run.exited }

// Exit says in words why the process ended, with its last lines when nobody asked for it; "" while it runs.
func (p *Process) Exit() string {
	select {
	case <-p.run.exited:
		waitAWhile(p.run.reaped)
	default:
		return ""
	}
	p.mu.Lock()
	closing := p.closing
	p.mu.Unlock()
	words := p.run.describe()
	if !closing {
		words += lastLine(p.run.stderr.last())
	}
	return words
}

// Err is nil while the process runs, and then a fault.Unavailable with Exit's words.
func (p *Process) Err() error {
	words := p.Exit()
	if words == "" {
		return nil
	}
	return fault.New(fault.Unavailable, "run plugin", p.spec.String(), "%s", "the process "+words)
}

// Timings are how long its start took.
func (p *Process) Timings() Timings { return p.timings }

// RSS is its resident memory in bytes, 0 when it cannot be told.
func (p *Process) RSS() uint64 { return proc.RSS(p.pid) }

// Stderr returns the last lines, at most 20, that it wrote there.
func (p *Process) Stderr() []string { return p.run.stderr.last() }

// Backend makes one more instance in the process, which is to be set up before anything else. A plugin that does not
// multiplex has one in its life: then the second call is fault.Conflict. fault.Unavailable: the process has ended.
// fault.Invalid: it is a database plugin.
func (p *Process) Backend(context.Context) (*Backend, error) {
	if p.spec.Type == TypeDatabase {
		return nil, fault.New(fault.Invalid, "make backend", p.spec.String(), "it is a database plugin")
	}
	b := &Backend{
		process: p, id: p.instanceID(), client: pluginpb.NewBackendClient(p.conn), version: pluginpb.NewPluginVersionClient(p.conn),
	}
	if err := p.add(b, "make backend"); err != nil {
		return nil, err
	}
	return b, nil
}

// Database makes one more connection in the process, as Backend does.
func (p *Process) Database(context.Context) (*Database, error) {
	if p.spec.Type != TypeDatabase {
		return nil, fault.New(fault.Invalid, "make database", p.spec.String(), "it is not a database plugin")
	}
	d := &Database{process: p, id: p.instanceID(), client: pluginpb.NewDatabaseClient(p.conn)}
	if err := p.add(d, "make database"); err != nil {
		return nil, err
	}
	return d, nil
}

func (p *Process) add(i instance, op string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.run.exited:
		return fault.New(fault.Unavailable, op, p.spec.String(), "the process has ended")
	default:
	}
	switch {
	case p.closing:
		return fault.New(fault.Unavailable, op, p.spec.String(), "the process is being ended")
	case p.handed > 0 && !p.multiplexed:
		return fault.New(fault.Conflict, op, p.spec.String(), "the plugin does not multiplex, and its one instance was taken; start another process")
	}
	p.handed++
	p.instances[i] = struct{}{}
	return nil
}

// track runs f for an instance on a goroutine that the process waits for; false when it has ended.
func (p *Process) track(f func()) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		return false
	}
	p.served.Go(f)
	return true
}

func (p *Process) forget(i instance) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.instances, i)
}

func (p *Process) list() []instance {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := make([]instance, 0, len(p.instances))
	for i := range p.instances {
		all = append(all, i)
	}
	return all
}

// watch lives as long as the process, and gives back what the host holds for it.
func (p *Process) watch() {
	defer close(p.released)
	<-p.run.exited
	p.s.mu.Lock()
	delete(p.s.processes, p)
	p.s.mu.Unlock()
	// Calls in flight end here at the latest, even where a child of the plugin holds the socket open.
	_ = p.conn.Close()
	for _, i := range p.list() {
		i.drop()
		p.forget(i)
	}
	<-p.run.reaped
	p.mu.Lock()
	p.ended = true
	p.mu.Unlock()
	p.client.Kill() // nothing is left to kill: it gives back go-plugin's goroutines and files
	p.served.Wait()
	p.removeSockets()
	p.report()
}

func (p *Process) report() {
	p.mu.Lock()
	closing := p.closing
	p.mu.Unlock()
	p.run.mu.Lock()
	by := p.run.killedBy
	p.run.mu.Unlock()
	how := "asked"
	switch {
	case by == "SIGTERM":
		how = "term"
	case by == "SIGKILL":
		how = "kill"
	case !closing:
		how = "crash"
	}
	p.s.metrics.exits.WithLabelValues(how).Inc()
	if how == "crash" {
		p.log.Error("plugin process ended by itself", "exit", p.Exit())
		return
	}
	p.log.Info("plugin process ended", "exit", p.Exit(), "how", how)
}

// Close ends the process: Cleanup of the instances that are left, the request to shut down, SIGTERM, SIGKILL to the
// process group, each with its limit, and waits until it is reaped and nothing of it is left on this host. When ctx
// ends first, the process is killed at once. It is idempotent; further calls wait for the first. The error is
// fault.Internal, when the process did not end even so.
func (p *Process) Close(ctx context.Context) error {
	p.closed.Do(func() {
		p.mu.Lock()
		p.closing = true
		p.mu.Unlock()
		p.run.mu.Lock()
		p.run.closing = true
		p.run.mu.Unlock()
		p.end(ctx)
	})
	limit := time.NewTimer(killWait)
	defer limit.Stop()
	select {
	case <-p.released:
		return nil
	case <-limit.C:
		return fault.New(fault.Internal, "end plugin process", p.spec.String(), "pid %d is still there %s after SIGKILL", p.pid, killWait)
	}
}

// end takes the process from asking to killing. It returns when the process has ended or has been sent SIGKILL.
func (p *Process) end(ctx context.Context) {
	_ = failpoint.Hit(failpoint.ProcessKill, p.s.cfg.NodeName)
	p.cleanUp(ctx)
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		p.client.Kill() // the RPC "shut down" has no deadline of its own: it ends at the latest with the process
	}()
	if !p.waitEnd(ctx, p.s.cfg.ShutdownTimeout) {
		p.log.Warn("plugin did not end when asked to; sending SIGTERM", "after", p.s.cfg.ShutdownTimeout)
		p.run.term()
		if !p.waitEnd(ctx, p.s.cfg.TermTimeout) {
			p.log.Warn("plugin ignored SIGTERM; sending SIGKILL", "after", p.s.cfg.TermTimeout)
			p.run.kill()
		}
	}
	select {
	case <-asked:
	case <-time.After(killWait):
	}
}

func (p *Process) cleanUp(ctx context.Context) {
	limit, cancel := context.WithTimeout(ctx, p.s.cfg.CleanupTimeout)
	defer cancel()
	var wg sync.WaitGroup
	for _, i := range p.list() {
		wg.Go(func() { _ = i.close(limit) })
	}
	wg.Wait()
}

func (p *Process) waitEnd(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-p.run.exited:
		return true
	case <-t.C:
		return false
	case <-ctx.Done():
		return false
	}
}

// removeSockets removes the process's socket directory; a killed plugin leaves its socket there.
func (p *Process) removeSockets() { _ = os.RemoveAll(p.run.tmpDir) }

// waitAWhile gives what is about to happen the time to happen.
func waitAWhile(c <-chan struct{}) {
	t := time.NewTimer(100 * time.Millisecond)
	defer t.Stop()
	select {
	case <-c:
	case <-t.C:
	}
}

func trimmed(s string) string { return strings.TrimSpace(printable(s)) }
