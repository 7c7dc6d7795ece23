package node

import (
	"context"
	"os"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/structpb"

	"rollcall/node/fault"
	"rollcall/node/reload"
	"rollcall/node/router"
	"rollcall/node/supervisor"
	commandv1 "rollcall/proto/command/v1"
)

// A database mount has no plugin of its own: what answers for it is part of this node. Its connections are mounts that run
// database plugins. To node/reload both are processes with a backend, like any other.

// isBuiltIn reports whether a spec names what is part of the node itself.
func isBuiltIn(s *commandv1.Spec) bool {
	return s.GetType() == supervisor.TypeDatabase && s.GetName() == supervisor.TypeDatabase && s.GetSha256() == ""
}

// withBuiltIn adds what is built in to what a Launcher starts.
type withBuiltIn struct {
	Launcher
	router *router.Router
}

func (w withBuiltIn) Ensure(ctx context.Context, s *commandv1.Spec) error {
	if isBuiltIn(s) {
		return nil
	}
	return w.Launcher.Ensure(ctx, s)
}

func (w withBuiltIn) Start(ctx context.Context, mountUUID string, s *commandv1.Spec) (reload.Process, error) {
	if isBuiltIn(s) {
		return newBuiltIn(w.router, mountUUID), nil
	}
	return w.Launcher.Start(ctx, mountUUID, s)
}

// builtIn stands for this very process: it runs until it is closed, and then nothing has ended but the mount.
type builtIn struct {
	router *router.Router
	mount  string
	once   sync.Once
	done   chan struct{}
}

func newBuiltIn(r *router.Router, mountUUID string) *builtIn {
	return &builtIn{router: r, mount: mountUUID, done: make(chan struct{})}
}

func (b *builtIn) Backend(context.Context) (reload.Backend, error) {
	return b.router.DatabaseMount(b.mount), nil
}

func (b *builtIn) Multiplexes() bool        { return true }
func (b *builtIn) PID() int                 { return os.Getpid() }
func (b *builtIn) Steps() []*commandv1.Step { return nil }
func (b *builtIn) RSS() uint64              { return 0 }
func (b *builtIn) Done() <-chan struct{}    { return b.done }

func (b *builtIn) Err() error {
	select {
	case <-b.done:
		return fault.New(fault.Unavailable, "serve", "a database mount", "it was closed")
	default:
		return nil
	}
}

func (b *builtIn) Close(context.Context) error {
	b.once.Do(func() { close(b.done) })
	return nil
}

// databaseProcess lends a process of a database plugin to node/reload.
type databaseProcess struct{ process }

func (p databaseProcess) Backend(ctx context.Context) (reload.Backend, error) {
	d, err := p.Database(ctx)
	if err != nil {
		return nil, err
	}
	return router.NewConnection(d), nil
}

// databases starts database plugins for a moment, for node/router.
type databases struct{ n *Node }

// tryTimeout bounds the trial of a connection: the plugin may ask a database that does not answer.
const tryTimeout = 30 * time.Second

// Try starts a process beside whatever runs, opens a connection in it, and ends it.
func (d databases) Try(ctx context.Context, s *commandv1.Spec, details *structpb.Struct, verify bool) (*structpb.Struct, error) {
	ctx, cancel := context.WithTimeout(ctx, tryTimeout)
	defer cancel()
	refused := func(err error) error { return fault.As(fault.Refused, err, "", "") }
	if err := d.n.launcher.Ensure(ctx, s); err != nil {
		return nil, refused(err)
	}
	proc, err := d.n.launcher.Start(ctx, "", s)
	if err != nil {
		return nil, refused(err)
	}
	defer func() {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
		defer cancel()
		_ = proc.Close(end) // its own watchdog kills it
	}()
	b, err := proc.Backend(ctx)
	if err != nil {
		return nil, refused(err)
	}
	opener, ok := b.(router.Opener)
	if !ok {
		return nil, fault.Text(fault.Internal, "a process of a database plugin has a backend that opens no connections")
	}
	stored, err := opener.Open(ctx, details, verify)
	if err != nil && ctx.Err() != nil {
		return nil, fault.Text(fault.Invalid, "the plugin did not answer within %v: %w", tryTimeout, err)
	}
	if fault.Is(err, fault.Unavailable) || fault.Is(err, fault.OutcomeUnknown) {
		// The trial's own process: that it ended is the plugin's fault, and asking again would not help.
		return nil, fault.As(fault.Internal, err, "", "")
	}
	return stored, err
}
