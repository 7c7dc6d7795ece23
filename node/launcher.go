package node

import (
	"context"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"rollcall/node/fault"
	"rollcall/node/reload"
	"rollcall/node/supervisor"
	commandv1 "rollcall/proto/command/v1"
)

// Launcher owns a node's plugin processes and plugin bytes: node/supervisor, or what Options give in its place. The
// backends of its processes are router.Backends.
type Launcher interface {
	reload.Plugins
	contentStore
	// Kill ends the process with this id and waits for that; an unknown id is nothing to do.
	Kill(ctx context.Context, pid int) error
	// Close ends every process, the last thing that a node does with its Launcher.
	Close(ctx context.Context) error
}

// Surroundings are what a Launcher is made with.
type Surroundings struct {
	NodeName string
	// Fetch gets bytes from another node. It works once the node has started.
	Fetch      supervisor.Fetcher
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// plugins makes a Launcher of the supervisor.
type plugins struct{ *supervisor.Supervisor }

var _ Launcher = plugins{}

func specOf(s *commandv1.Spec) supervisor.Spec {
	return supervisor.Spec{
		Type: s.GetType(), Name: s.GetName(), Version: s.GetVersion(), Command: s.GetCommand(),
		Args: s.GetArgs(), Env: s.GetEnv(), SHA256: s.GetSha256(),
	}
}

func (p plugins) Ensure(ctx context.Context, s *commandv1.Spec) error {
	return p.Supervisor.Ensure(ctx, specOf(s))
}

func (p plugins) Start(ctx context.Context, _ string, s *commandv1.Spec) (reload.Process, error) {
	began := time.Now()
	proc, err := p.Supervisor.Start(ctx, specOf(s))
	if err != nil {
		return nil, err
	}
	if s.GetType() == supervisor.TypeDatabase {
		return databaseProcess{process{proc, began}}, nil
	}
	return process{proc, began}, nil
}

func (p plugins) Keep(sha256s []string) {
	set := make(map[string]bool, len(sha256s))
	for _, s := range sha256s {
		set[s] = true
	}
	p.Supervisor.Keep(set)
}

// process lends a supervised process to node/reload.
type process struct {
	*supervisor.Process
	began time.Time
}

func (p process) Backend(ctx context.Context) (reload.Backend, error) {
	b, err := p.Process.Backend(ctx)
	if err != nil {
		return nil, err
	}
	return b, nil
}

func (p process) Multiplexes() bool { return p.Multiplexed() }
func (p process) PID() int          { return p.Pid() }

func (p process) Err() error {
	select {
	case <-p.Done():
		return fault.New(fault.Unavailable, "run plugin", p.Spec().String(), "%s", p.Exit())
	default:
		return nil
	}
}

// Steps lays the supervisor's durations out one after the other from when the start was asked for.
func (p process) Steps() []*commandv1.Step {
	t := p.Timings()
	at := p.began
	var out []*commandv1.Step
	for _, s := range []struct {
		name string
		took time.Duration
	}{{"verify", t.Verify}, {"start", t.Start}, {"handshake", t.Handshake}} {
		out = append(out, &commandv1.Step{Name: s.name, AtUs: at.UnixMicro(), TookUs: s.took.Microseconds()})
		at = at.Add(s.took)
	}
	return out
}

// Kill ends the process with this id, if it is one of ours.
func (p plugins) Kill(ctx context.Context, pid int) error {
	for _, proc := range p.Processes() {
		if proc.Pid() == pid {
			return proc.Close(ctx) // its own watchdog kills it
		}
	}
	return nil
}
