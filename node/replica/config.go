package replica

import (
	"context"
	"log/slog"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	"rollcall/fsm"
	"rollcall/node/fault"
	"rollcall/node/replica/internal/disk"
	"rollcall/node/seal"
	commandv1 "rollcall/proto/command/v1"
)

// Dir is the locked data directory of one replica: node id (UUID), incarnation (boot counter), log and snapshots.
type Dir = disk.Dir

// Disk is a place for log, votes and snapshots that stands in for the files of a Dir.
type Disk = disk.Backing

// OpenDir opens or makes the directory, takes its lock and counts the boot. It comes before everything else that is
// wired: gossip announces the node id. Errors: fault.Conflict when another process has it,
// fault.Denied when it belongs to another user, fault.Corrupt when it is damaged.
func OpenDir(path string) (*Dir, error) { return disk.OpenDir(path) }

// PeerStatus is what discovery believes of a peer. It is a hint: nothing is decided by it alone.
type PeerStatus uint8

// The states of a peer in gossip.
const (
	PeerAlive PeerStatus = iota
	PeerSuspect
	PeerDead
	PeerLeft
)

// String returns the word shown in Members.
func (s PeerStatus) String() string {
	switch s {
	case PeerAlive:
		return "alive"
	case PeerSuspect:
		return "suspect"
	case PeerDead:
		return "dead"
	case PeerLeft:
		return "left"
	default:
		return "unknown"
	}
}

// Peer is another node as discovery sees it. A peer that is known by address only (retry_join, no gossip) has an empty
// NodeID; it is asked for its facts.
type Peer struct {
	NodeID  string
	Name    string
	Address string // of its cluster port
	Status  PeerStatus
}

// Discovery finds peers. It is satisfied by an adapter over node/gossip, or by a list of addresses. Both methods are
// called from several goroutines and must be quick.
type Discovery interface {
	// Peers returns everybody known but this node.
	Peers() []Peer
	// Changed returns a channel that is closed at the next change. Take it before Peers.
	Changed() <-chan struct{}
}

// SelfFacts is what others may know of this node before they have talked to it: what gossip announces.
type SelfFacts struct {
	ClusterID string
	HasState  bool
}

// Config of a Replica. Every field without a default is required.
type Config struct {
	// Dir is the opened data directory. Stop closes it.
	Dir *Dir
	// Name of the node, unique in the cluster and certified by its certificate.
	Name string
	// ClusterAddress and APIAddress are what peers and clients reach this node by ("host:port").
	ClusterAddress string
	APIAddress     string
	// BuildVersion goes into the node table. May be empty.
	BuildVersion string
	// ClusterName is given to a cluster that this node founds. May be empty.
	ClusterName string
	// NonVoter keeps this node from ever becoming a voter. It then neither founds a cluster nor counts for one.
	NonVoter bool
	// Voters is how many voters the cluster aims for: 3 or 5 (default 5). The rest are non-voters.
	Voters int
	// BootstrapExpect is how many fresh nodes must have found each other before they found a cluster; 0 means that
	// this node only joins. Every founding node must have the same value.
	BootstrapExpect uint32

	// FSM is the replicated state. The replica is its only writer.
	FSM *fsm.FSM
	// Stream carries Raft between nodes. The replica closes it.
	Stream raft.StreamLayer
	// Dial returns a pooled connection to a peer's gRPC; the replica never closes it. Errors of its calls must be
	// *fault.Error, Unavailable only when the call certainly did not run: transport.Transport.Client. name is the node
	// name that must answer; it may be empty when it is not known.
	Dial func(address, name string) (*grpc.ClientConn, error)
	// PeerName returns the node name that the peer's certificate proves, from the context of an incoming call.
	PeerName func(ctx context.Context) (string, error)
	// Discovery finds peers. Nil means that there are none.
	Discovery Discovery
	// Announce is called when SelfFacts change, from the replica's goroutines; it must be quick. May be nil.
	Announce func(SelfFacts)
	// NewCluster makes the first entry of a cluster that this node founds: it adds the root token's hash. Nil founds a
	// cluster without a root token. It may be called more than once; only an entry that was applied counts.
	NewCluster func(clusterID string) (*commandv1.InitCluster, error)
	// Converged says whether every mount on this node is at its wanted generation or closed. A node that was without a
	// serving lease gets none before it is true. Nil means always.
	Converged func() bool
	// CanExpire says whether anything in the state can expire, so that Tick entries must flow. Nil means never.
	CanExpire func(*fsm.View) bool
	// OnFatal is told, at most once, what makes it impossible to go on: a corrupt log, a removed node, a directory
	// restored from an old backup. The process should stop with the error. It must be quick. Nil only logs.
	OnFatal func(error)

	// Lease is how long a serving lease lasts (default 5 s). It must outlast a fail-over.
	Lease time.Duration
	// Drift is the clock rate error between two nodes that leases allow for (default 0.05).
	Drift float64
	// Heartbeat is Raft's heartbeat and election timeout (default 500 ms); a fail-over takes about twice as long.
	Heartbeat time.Duration
	// Multiplier stretches Heartbeat and the RPC timeouts for slow networks: 1 (default) to 10.
	Multiplier int
	// DiskLimit is how long a write may take before this node gives up leading; default max(2 s, 2 x heartbeat).
	DiskLimit time.Duration
	// SnapshotThreshold entries (default 8192) make a snapshot, looked at every SnapshotInterval (default 120 s);
	// TrailingLogs (default 10240) stay in the log for members that were away briefly.
	SnapshotThreshold uint64
	SnapshotInterval  time.Duration
	TrailingLogs      uint64
	// PromoteAfter is how long a non-voter must have been healthy before it replaces a voter (default 10 s). The first
	// three voters do not wait.
	PromoteAfter time.Duration
	// RemoveDeadAfter is how long a server must have been silent, and dead for discovery, before it is removed
	// (default 24 h: removal is for replacement, not for reboots).
	RemoveDeadAfter time.Duration
	// LeaderWait bounds how long Propose and ReadIndex wait while there is no leader (default 10 s).
	LeaderWait time.Duration
	// MaxCommandBytes bounds one command (default 12 MiB), MaxInFlightBytes all that are under way (default 64 MiB).
	MaxCommandBytes  int
	MaxInFlightBytes int64
	// Disk keeps log, votes and snapshots in place of files in Dir, for simulations. Stop closes it.
	Disk Disk
	// NoSync leaves out fdatasync: for tests and `dev` only.
	NoSync bool
	// Keys lock the data keys that seal this node's disk, and its backups. Nil: nothing is sealed.
	Keys *seal.Keys

	// Now is the clock of serving leases: it must not stop while the machine sleeps. Default CLOCK_BOOTTIME.
	Now func() time.Duration
	// Logger and Metrics are required; add the component at the wiring.
	Logger  *slog.Logger
	Metrics prometheus.Registerer

	// wrapLog is put beneath the log's checks: tests slow or break the disk with it.
	wrapLog func(raft.LogStore) raft.LogStore
}

// Validate fills in defaults and says what is wrong. New calls it.
func (c *Config) Validate() error {
	c.fill()
	bad := func(field, format string, args ...any) error {
		return fault.New(fault.Invalid, "configure replica", field, format, args...)
	}
	switch {
	case c.Dir == nil:
		return bad("Dir", "is required")
	case c.Name == "" || len(c.Name) > 128:
		return bad("Name", "must have 1 to 128 bytes")
	case c.ClusterAddress == "":
		return bad("ClusterAddress", "is required")
	case c.FSM == nil || c.Stream == nil || c.Dial == nil || c.PeerName == nil || c.Logger == nil || c.Metrics == nil:
		return bad("FSM, Stream, Dial, PeerName, Logger, Metrics", "are required")
	case c.Voters != 3 && c.Voters != 5:
		return bad("Voters", "must be 3 or 5, not %d", c.Voters)
	case c.BootstrapExpect > 7:
		return bad("BootstrapExpect", "must be at most 7; more nodes join as non-voters")
	case c.NonVoter && c.BootstrapExpect > 0:
		return bad("NonVoter", "a non-voter cannot found a cluster; leave out bootstrap_expect")
	case c.Multiplier < 1 || c.Multiplier > 10:
		return bad("Multiplier", "must be 1 to 10, not %d", c.Multiplier)
	case c.Heartbeat < 20*time.Millisecond:
		return bad("Heartbeat", "must be at least 20ms")
	case c.Lease < 2*c.heartbeat():
		return bad("Lease", "must be at least twice the heartbeat (%v), or every fail-over fences the cluster", c.heartbeat())
	case c.Drift <= 0 || c.Drift > 0.5:
		return bad("Drift", "must be above 0 and at most 0.5")
	case c.MaxInFlightBytes < int64(c.MaxCommandBytes):
		return bad("MaxInFlightBytes", "must hold at least one command of %d bytes", c.MaxCommandBytes)
	}
	return nil
}

func (c *Config) fill() {
	def(&c.Voters, 5)
	def(&c.Lease, 5*time.Second)
	def(&c.Drift, 0.05)
	def(&c.Heartbeat, 500*time.Millisecond)
	def(&c.Multiplier, 1)
	def(&c.DiskLimit, max(2*time.Second, 2*c.heartbeat()))
	def(&c.SnapshotThreshold, 8192)
	def(&c.SnapshotInterval, 120*time.Second)
	def(&c.TrailingLogs, 10240)
	def(&c.PromoteAfter, 10*time.Second)
	def(&c.RemoveDeadAfter, 24*time.Hour)
	def(&c.LeaderWait, 10*time.Second)
	def(&c.MaxCommandBytes, 12<<20)
	def(&c.MaxInFlightBytes, 64<<20)
	if c.Discovery == nil {
		c.Discovery = nobody{}
	}
	if c.Announce == nil {
		c.Announce = func(SelfFacts) {}
	}
	if c.Converged == nil {
		c.Converged = func() bool { return true }
	}
	if c.CanExpire == nil {
		c.CanExpire = func(*fsm.View) bool { return false }
	}
	if c.NewCluster == nil {
		c.NewCluster = func(id string) (*commandv1.InitCluster, error) {
			return &commandv1.InitCluster{ClusterId: id, ClusterName: c.ClusterName}, nil
		}
	}
	if c.Now == nil {
		c.Now = Boottime
	}
}

func (c *Config) heartbeat() time.Duration { return c.Heartbeat * time.Duration(max(c.Multiplier, 1)) }

// rpcTimeout bounds one Raft RPC and one small peer call: 2 s by default, less where the heartbeat is shorter.
func (c *Config) rpcTimeout() time.Duration {
	return min(4*c.heartbeat(), 3*time.Second*time.Duration(c.Multiplier))
}

func def[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// nobody is a Discovery that finds nobody.
type nobody struct{}

func (nobody) Peers() []Peer            { return nil }
func (nobody) Changed() <-chan struct{} { return nil }
