package reload

import (
	"context"
	"time"

	"google.golang.org/grpc"

	commandv1 "rollcall/proto/command/v1"
	peerv1 "rollcall/proto/peer/v1"
)

// View is one state of the cluster, as this package reads it. *fsm.View satisfies it. Records in it are shared and never
// mutated: a record that changed is another pointer.
type View interface {
	Index() uint64
	ClockNS() uint64
	Node(id string) *commandv1.Node
	Plugins() []*commandv1.Plugin
	Mount(uuid string) *commandv1.Mount
	Mounts() []*commandv1.Mount
	Wanted(m *commandv1.Mount, nodeID string) *commandv1.Wanted
	Reload(id string) *commandv1.Reload
	Reloads() []*commandv1.Reload
	ActiveReload(mountUUID string) *commandv1.Reload
	RunningReloads() []*commandv1.Reload
}

// State is the replicated truth. StateOf makes one of an *fsm.FSM.
type State interface {
	// View returns the state after the last applied entry.
	View() View
	// Changed returns a channel that is closed at the next applied entry: take it, then View, then wait.
	Changed() <-chan struct{}
}

// StateOf adapts a state machine: StateOf(f.View, f.Changed).
func StateOf[V View](view func() V, changed func() <-chan struct{}) State {
	return stateOf[V]{view, changed}
}

type stateOf[V View] struct {
	view    func() V
	changed func() <-chan struct{}
}

func (s stateOf[V]) View() View               { return s.view() }
func (s stateOf[V]) Changed() <-chan struct{} { return s.changed() }

// Backend is one plugin backend inside a process, as far as this package handles it: it is passed on to Routes, and
// cleaned up when it has left the route.
type Backend interface {
	// Cleanup tells the backend that it is no longer needed. It honours ctx's deadline.
	Cleanup(ctx context.Context) error
}

// Process is one running plugin process.
type Process interface {
	// Backend makes a backend in the process that nobody has set up yet. A process that does not multiplex has one
	// in its life: the second call fails.
	Backend(ctx context.Context) (Backend, error)
	// Multiplexes reports whether Backend may be called again.
	Multiplexes() bool
	// PID is the process id on this host.
	PID() int
	// Steps is the timeline of the start: "verify", "start", "handshake".
	Steps() []*commandv1.Step
	// RSS is the resident memory in bytes, 0 when it cannot be told.
	RSS() uint64
	// Done is closed when the process has ended, by itself or by Close.
	Done() <-chan struct{}
	// Err says why the process ended; nil while it runs.
	Err() error
	// Close ends the process and waits for that; it does not outlast ctx by more than its own kill watchdog. Further
	// calls do nothing.
	Close(ctx context.Context) error
}

// Plugins starts processes and keeps plugin bytes (node/supervisor).
type Plugins interface {
	// Ensure has the spec's bytes in this node's store, verified, from wherever they are. Its errors are
	// fault.Refused or fault.Unavailable with a cause that can be shown.
	Ensure(ctx context.Context, spec *commandv1.Spec) error
	// Start starts the spec from the store and returns after its handshake. The process outlives ctx.
	Start(ctx context.Context, mountUUID string, spec *commandv1.Spec) (Process, error)
	// Keep names every sha256 whose bytes must stay in the store; all others may go.
	Keep(sha256s []string)
}

// Role is what this node is to the cluster's writes. node/router knows the same words.
type Role struct {
	Leader bool
	Term   uint64
}

// SwitchPlan is what Routes.Switch is to do.
type SwitchPlan struct {
	// Wanted is the generation and spec that Backend serves.
	Wanted  *commandv1.Wanted
	Backend Backend
	Role    Role
	// Hold bounds how long requests wait at the gate while those in flight finish.
	Hold time.Duration
	// Force is "" (give up after Hold with fault.Deadline), "cancel" or "fence".
	Force string
	// KeepOld lets the old instance go on when the new one fails inside the gate (best effort); otherwise requests
	// fail fast until a later switch works.
	KeepOld bool
	// AwaitTakeOver makes a follower forward reads until the leader's TakeOver of Wanted.generation is applied. It is
	// false when the leader is not meant to come to this generation now: a local override, or a wave before its own.
	AwaitTakeOver bool
}

// Switched is what a switch did.
type Switched struct {
	// HoldFor is how long the gate was closed.
	HoldFor time.Duration
	Steps   []*commandv1.Step
	Traffic *commandv1.Traffic
}

// Routes moves requests to instances (node/router). The reconciler of a mount is the only caller of the methods that
// change the mount's route, and never calls two of them at once for one mount.
type Routes interface {
	// Trial sets b up on a discarded overlay of the mount's storage, as deep as depth says, and checks its type.
	// The op of a refusal's fault names the phase that refused: "setup", "type" or "initialize".
	Trial(ctx context.Context, m *commandv1.Mount, spec *commandv1.Spec, b Backend, depth string) ([]*commandv1.Step, error)
	// Switch puts a backend behind the mount's gate, and returns when the one before has no references left. A hold
	// that was too short for the requests in flight is fault.Deadline: the old instance goes on.
	Switch(ctx context.Context, m *commandv1.Mount, plan SwitchPlan) (*Switched, error)
	// Assume tells the instance behind the gate its new role.
	Assume(ctx context.Context, mountUUID string, role Role) error
	// Suspend says that the process behind the gate has ended.
	Suspend(mountUUID string, why error)
	// Fail says that the instance behind the gate must not answer any more, though its process lives: requests fail at
	// once until the next Switch.
	Fail(mountUUID string, why error)
	// Drop ends the route for good and returns when no request is left on it.
	Drop(ctx context.Context, mountUUID string) error
	// Relabel makes the same instance serve a new generation.
	Relabel(mountUUID string, w *commandv1.Wanted)
	// Running answers the generation behind the gate, and whether the gate lets requests through to it.
	Running(mountUUID string) (generation uint64, ready bool)
	// LastSwitch is what was measured around the mount's last switch, with what came after it until now; nil for none.
	LastSwitch(mountUUID string) *commandv1.Traffic
	// Traffic is what was measured since the running generation was ready; nil when nothing runs.
	Traffic(mountUUID string) *peerv1.MountTraffic
}

// Leadership is what Replica.Role answers.
type Leadership struct {
	Leader   bool
	Term     uint64
	LeaderID string
}

// Replica is this node's place in the cluster (node/replica).
type Replica interface {
	NodeID() string
	Incarnation() uint64
	Leadership() Leadership
	// LeadershipChanged is closed at the next change of Leadership: take it, then Leadership, then wait.
	LeadershipChanged() <-chan struct{}
	// ProposeAsLeader is for Lead alone; fault.NotLeader ends the leadership's work.
	ProposeAsLeader(ctx context.Context, term uint64, c *commandv1.Command) (*commandv1.Result, error)
	// LeaseOver reports that the node's incarnation provably has no serving lease.
	LeaseOver(nodeID string, incarnation uint64) bool
	// BeginFence stops grants to the node until end is called.
	BeginFence(nodeID string) (end func())
	// Nudge makes followers apply what is committed at once.
	Nudge()
	// Voters are the ids of the voting members.
	Voters() []string
}

// Peers reaches other nodes (transport).
type Peers interface {
	// Dial returns a connection to a node of the state's node table. It is shared: the caller does not close it.
	Dial(ctx context.Context, node *commandv1.Node) (grpc.ClientConnInterface, error)
}
