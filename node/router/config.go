package router

import (
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// Config is what a Router needs. Fields without a default are required.
type Config struct {
	// NodeID is this node's raft id, NodeName what people call it: it stands in X-Rollcall-Node.
	NodeID, NodeName string
	State            State
	Replica          Replica
	Peers            Peers
	// Leases may be nil: then secrets are released as the plugin made them, without a lease.
	Leases Leases
	// Admit is asked right before a plugin is called, on the node that calls it: a request may have waited since it was
	// authorised. Its error is the answer, and nothing has run. It must be quick. May be nil.
	Admit func(req *Request) error
	// LeaderOnly is told, from a goroutine of its own and at most once a mount and process, that a follower's read made
	// a secret: the mount's reads belong on the leader, and its config should say so. May be nil.
	LeaderOnly func(m *commandv1.Mount)
	// Databases starts database plugins for a moment, so that a connection is tried before it is stored. May be nil: then
	// there are no database mounts.
	Databases Databases
	// Broken is told, from a goroutine of its own, that an instance could not be set up again after it lost track of its
	// storage: only a new process helps. May be nil; the router tries again by itself, with pauses.
	Broken func(mountUUID string, err error)

	// Hold is how long the gate may hold requests while those in flight finish, where the mount does not say. Default
	// 300 ms (DESIGN section 6).
	Hold time.Duration
	// Inside bounds Setup, Initialize and TakeOver behind the closed gate. Default 2 s.
	Inside time.Duration
	// GateWait is how long one request waits for an instance before it is answered 503. Default 10 s.
	GateWait time.Duration
	// MaxWaiting bounds the requests that wait at one mount's gate; one more is answered 503 at once. Default 4096.
	MaxWaiting int
	// RequestTimeout is the deadline of a request that brought none nearer. Default 90 s (CONTRACT 6.6).
	RequestTimeout time.Duration
	// ForwardWait is how long a request that must run on the leader waits for one to be known. Default 10 s.
	ForwardWait time.Duration
	// ToldWait is how long the answer of a forwarded write waits for this node's instance to be told of it. Default 2 s;
	// then it is released all the same, for it did happen, and this node's reads of the mount go to the leader until then.
	ToldWait time.Duration
	// MaxBody bounds a request's or an answer's body on its way between nodes. Default 32 MiB.
	MaxBody int
	// QueueKeys bounds the storage keys that wait to be invalidated in one instance; beyond it the instance is set up
	// again. Default 4096.
	QueueKeys int
	// InvalidateTimeout bounds one InvalidateKey call. Default 5 s.
	InvalidateTimeout time.Duration
	// DefaultLeaseTTL and MaxLeaseTTL are told to plugins whose mount is not tuned. Default 768 h each, as in Vault.
	DefaultLeaseTTL, MaxLeaseTTL time.Duration
	Logger                       *slog.Logger
	Registerer                   prometheus.Registerer

	// noGate lets requests pass a switch without being held, and without waiting for those in flight. It exists so that
	// a test can show that the gate is what keeps updates.
	noGate bool
}

// Validate fills in the defaults and reports what is missing.
func (c *Config) Validate() error {
	for name, missing := range map[string]bool{
		"NodeID": c.NodeID == "", "State": c.State == nil, "Replica": c.Replica == nil, "Peers": c.Peers == nil,
		"Logger": c.Logger == nil, "Registerer": c.Registerer == nil,
	} {
		if missing {
			return fault.New(fault.Invalid, "configure", "node/router", "%s is not set", name)
		}
	}
	for _, d := range []struct {
		field *time.Duration
		value time.Duration
	}{
		{&c.Hold, 300 * time.Millisecond},
		{&c.Inside, 2 * time.Second},
		{&c.GateWait, 10 * time.Second},
		{&c.RequestTimeout, 90 * time.Second},
		{&c.ForwardWait, 10 * time.Second},
		{&c.ToldWait, 2 * time.Second},
		{&c.InvalidateTimeout, 5 * time.Second},
		{&c.DefaultLeaseTTL, 768 * time.Hour},
		{&c.MaxLeaseTTL, 768 * time.Hour},
	} {
		if *d.field < 0 {
			return fault.New(fault.Invalid, "configure", "node/router", "a duration is negative")
		}
		if *d.field == 0 {
			*d.field = d.value
		}
	}
	for _, n := range []struct {
		field *int
		value int
	}{{&c.MaxWaiting, 4096}, {&c.MaxBody, 32 << 20}, {&c.QueueKeys, 4096}} {
		if *n.field < 0 {
			return fault.New(fault.Invalid, "configure", "node/router", "a limit is negative")
		}
		if *n.field == 0 {
			*n.field = n.value
		}
	}
	if c.NodeName == "" {
		c.NodeName = c.NodeID
	}
	return nil
}
