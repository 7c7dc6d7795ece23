package httpd

import (
	"context"
	"io"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	commandv1 "rollcall/proto/command/v1"

	"rollcall/fsm"
	"rollcall/node/api"
	"rollcall/node/fault"
	"rollcall/node/policy"
)

// State is this node's copy of the replicated state.
type State interface {
	View() *fsm.View
	// Changed is closed at the next applied entry.
	Changed() <-chan struct{}
}

// Replica carries what the door wants of consensus. Every method may be called from any goroutine.
type Replica interface {
	// Propose enters a command through whichever node leads, and returns once this node has applied it. The error's
	// kind says whether anything ran.
	Propose(ctx context.Context, cmd *commandv1.Command) (*commandv1.Result, error)
	// Consistent returns a view that holds everything acknowledged before the call, anywhere.
	Consistent(ctx context.Context) (*fsm.View, error)
	// Serving is nil while this node holds a serving lease.
	Serving() error
}

// Plugins tells what this node runs, and tries what it is asked to run.
type Plugins interface {
	// TryMount starts the spec beside everything else and ends it again: nil when a mount of it would work here.
	TryMount(ctx context.Context, m *commandv1.Mount, spec *commandv1.Spec) error
	// Plan tries targets on every node of the cluster without switching anything.
	Plan(ctx context.Context, targets []*commandv1.Target, trial string) ([]api.PlanNode, error)
	// Running tells what this node runs, by mount uuid.
	Running() map[string]api.RunningMount
	// RunningEverywhere asks every node; a node that does not answer is in the result with its error.
	RunningEverywhere(ctx context.Context) []api.NodeRunning
	// Hash is the sha256 of a command's file in this node's plugin directory.
	Hash(ctx context.Context, command string) (string, error)
}

// Cluster tells and changes who is a member.
type Cluster interface {
	Status() api.ClusterStatus
	// Seal tells how this node's disk is sealed; nil where it is not.
	Seal() *api.KeyStatus
	Members(ctx context.Context) ([]api.Member, error)
	RemoveMember(ctx context.Context, id string) error
	StepDown(ctx context.Context) error
	Leave(ctx context.Context) error
	// Autopilot tells how the servers of the Raft configuration are.
	Autopilot(ctx context.Context) (*api.AutopilotState, error)
	// AutopilotConfig is what this node's configuration says of it.
	AutopilotConfig() api.AutopilotConfig
	// Settle returns when every member has applied the index, or provably answers nothing before it has.
	Settle(ctx context.Context, index uint64) error
	// Backup writes the whole state, consistently.
	Backup(ctx context.Context, w io.Writer) error
	// Restore replaces the state of the cluster by a backup, and returns the index of the entry that says so.
	Restore(ctx context.Context, backup io.Reader, why string) (uint64, error)
}

// Config is everything the door needs. All of it is required unless its line says otherwise.
type Config struct {
	NodeID, NodeName string
	// Version of this build, a strict semantic version without "v".
	Version string
	// Started is when this process began to serve.
	Started time.Time
	State   State
	Replica Replica
	Router  Router
	Plugins Plugins
	Cluster Cluster
	Leases  Leases
	// Policies decides what a token may do.
	Policies *policy.Engine
	// Audit takes a record of each request and of each answer. nil: none are written.
	Audit Auditor
	// Names are those that browsers may call this node by, besides addresses. nil: any.
	Names []string
	// Gatherer feeds sys/metrics. nil: sys/metrics says that it is not enabled.
	Gatherer   prometheus.Gatherer
	Registerer prometheus.Registerer
	Logger     *slog.Logger
}

func (c *Config) validate() error {
	for name, missing := range map[string]bool{
		"State": c.State == nil, "Replica": c.Replica == nil, "Router": c.Router == nil, "Plugins": c.Plugins == nil,
		"Cluster": c.Cluster == nil, "Leases": c.Leases == nil, "Policies": c.Policies == nil,
		"Registerer": c.Registerer == nil, "Logger": c.Logger == nil,
	} {
		if missing {
			return fault.New(fault.Invalid, "configure", "node/httpd", "%s is not set", name)
		}
	}
	return nil
}
