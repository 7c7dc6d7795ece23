package router

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/structpb"

	"rollcall/node/supervisor"
	commandv1 "rollcall/proto/command/v1"
	pluginpb "rollcall/proto/plugin"
)

// View is one state of the cluster, as this package reads it. *fsm.View satisfies it. Records are shared and never
// mutated.
type View interface {
	Index() uint64
	ClusterID() string
	ClusterName() string
	Mount(uuid string) *commandv1.Mount
	// MountFor answers the mount with the longest path that is a prefix of path, and the rest of path behind it. A path
	// that begins with "auth/" is looked up in the table of auth methods.
	MountFor(namespace, path string) (m *commandv1.Mount, rest string)
	// ActiveReload is the reload that moves the mount now; nil when none does.
	ActiveReload(mountUUID string) *commandv1.Reload
	StorageGet(mountUUID, key string) *commandv1.StorageEntry
	// StorageList answers the direct children of prefix ("" or ending in "/"), sorted; folders end in "/".
	StorageList(mountUUID, prefix string) []string
	// Connection finds a connection of a database mount by its name, Connections are all of them.
	Connection(mountUUID, name string) *commandv1.Mount
	Connections(mountUUID string) []*commandv1.Mount
	// ResolveConnection answers what a new connection of a database plugin would run, ResolveReload what a reload would.
	ResolveConnection(plugin, version string) (*commandv1.Spec, error)
	ResolveReload(m *commandv1.Mount, version string) (*commandv1.Spec, error)
	Reload(id string) *commandv1.Reload
}

// State is this node's copy of the replicated state. StateOf makes one of an *fsm.FSM.
type State interface {
	View() View
	// Changed is closed at the next applied entry: take it, then View, then wait.
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

// Role is what this node is to the mounts' storage: the leader of a term, which writes, or a follower (the zero value).
type Role struct {
	Leader bool
	// Term is the leader's; 0 for a follower, whose instances do not change with the term.
	Term uint64
}

// Replica is this node's place in the cluster (node/replica). Every method may be called from any goroutine.
type Replica interface {
	// Role must be quick: it is asked for every request. Leader is true only once the term's barrier is applied here.
	Role() Role
	// RoleChanged is closed at the next change of Role, or of who leads: take it, then Role, then wait.
	RoleChanged() <-chan struct{}
	// Serving is nil while this node holds a serving lease. It must be quick: it is asked twice for every request.
	Serving() error
	// ProposeAsLeader enters c and returns once it is applied here. fault.NotLeader, fault.Stale and the other kinds of
	// a recorded rejection mean that it took no effect; fault.OutcomeUnknown and fault.Deadline that it may have.
	ProposeAsLeader(ctx context.Context, term uint64, c *commandv1.Command) (*commandv1.Result, error)
}

// Peers reaches the leader (transport).
type Peers interface {
	// Leader returns a shared connection to the node that leads, and its id. fault.Unavailable while none is known, or
	// when it is this node.
	Leader(ctx context.Context) (grpc.ClientConnInterface, string, error)
}

// Leases keeps what plugins lend out (node/lease). It is optional.
type Leases interface {
	// Grant registers the secret of an answer before it is released, and fills in its lease id and times. It is called
	// on the node that ran the request; when that is not the leader, the lease travels to it through the log.
	Grant(ctx context.Context, m *commandv1.Mount, req *Request, resp *Response) error
}

// Databases starts database plugins for a moment (node/supervisor).
type Databases interface {
	// Try starts a process of spec, opens a connection with details, and ends both. With verify the plugin asks the database.
	// It returns the details that the plugin wants to have stored. A failed start is fault.Refused; everything else is the
	// plugin's own word.
	Try(ctx context.Context, spec *commandv1.Spec, details *structpb.Struct, verify bool) (*structpb.Struct, error)
}

// Opener is the Backend of a connection: it opens one for a trial, without storage. See NewConnection.
type Opener interface {
	Open(ctx context.Context, details *structpb.Struct, verify bool) (*structpb.Struct, error)
}

// Backend is one plugin backend inside a process, as requests and switches use it. *supervisor.Backend is one. Errors of
// the plugin's own code are faults with its text; fault.Unavailable says that the process cannot be reached and nothing
// ran, fault.OutcomeUnknown that it ended under the call.
type Backend interface {
	// Setup may be called again when the node's role has changed; then no request is in flight.
	Setup(ctx context.Context, s supervisor.Setup) error
	Initialize(ctx context.Context) error
	// Type is "secret" or "auth".
	Type(ctx context.Context) (string, error)
	SpecialPaths(ctx context.Context) (*pluginpb.Paths, error)
	HandleRequest(ctx context.Context, req *pluginpb.Request) (*pluginpb.Response, error)
	HandleExistenceCheck(ctx context.Context, req *pluginpb.Request) (found, checkFound bool, err error)
	InvalidateKey(ctx context.Context, key string) error
	Cleanup(ctx context.Context) error
}

var _ Backend = (*supervisor.Backend)(nil)
