// Package node is one rollcall node as a value: New checks and opens, Start runs, Stop unwinds in reverse, Run is those
// three. main, dev, demo and every test start the same thing.
package node

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"rollcall/fsm"
	"rollcall/node/audit"
	"rollcall/node/fault"
	"rollcall/node/gossip"
	"rollcall/node/httpd"
	"rollcall/node/lease"
	"rollcall/node/reload"
	"rollcall/node/replica"
	"rollcall/node/router"
	"rollcall/node/seal"
	"rollcall/node/telemetry"
	"rollcall/transport"
)

// Options are what a node is given as live values, besides its Config. Only Logger is required; the rest replaces what
// Config names by file, for clusters in one process.
type Options struct {
	// Logger takes everything; each room adds its component.
	Logger *slog.Logger
	// Registry takes the metrics. Default: one of its own.
	Registry *prometheus.Registry
	// Network is where the bytes of the cluster port and of the API's port come from. Default TCP.
	Network transport.Network
	// Credentials stand in for cluster.ca_file, cert_file and key_file.
	Credentials *transport.Credentials
	// GossipKey stands in for gossip.key_file: 32 bytes.
	GossipKey []byte
	// BootstrapToken stands in for bootstrap_token_file.
	BootstrapToken string
	// Discovery replaces gossip altogether: then no gossip port is opened.
	Discovery replica.Discovery
	// Launcher owns the plugin processes and their bytes in place of node/supervisor, for simulations. It is made with
	// the node and closed with it.
	Launcher func(Surroundings) (Launcher, error)
	// Disk keeps log, votes and snapshots in place of files in the data directory, for simulations. Stop closes it.
	Disk replica.Disk
	// Clock is the clock of serving leases. Default: the machine's, which goes on while it sleeps.
	Clock func() time.Duration
	// SealKeys stand in for the block seal.
	SealKeys *seal.Keys
	// NoSync leaves out fdatasync: for dev, demo and tests. Power loss then loses acknowledged writes.
	NoSync bool
	// Heartbeat overrides Raft's timers (default 500 ms times the multiplier), for tests.
	Heartbeat time.Duration
	// Hangup has the audit file opened anew at each value: SIGHUP, where a process is told of a rotated log. nil: never.
	Hangup <-chan os.Signal
	// SnapshotInterval overrides how often the log is looked at for a snapshot (default: the configuration), for tests.
	SnapshotInterval time.Duration
	// Witness, for tests, is asked by New for what shall see every command that this incarnation of the node applies. It
	// may be nil, and may answer nil.
	Witness func(nodeID string, incarnation uint64) fsm.Witness
}

// Node is one member. Its methods may be called from any goroutine; Start and Stop once each.
type Node struct {
	cfg   Config
	opt   Options
	log   *slog.Logger
	life  lifecycle
	reg   *prometheus.Registry
	since time.Time

	dir       *replica.Dir
	keys      *seal.Keys // nil where nothing is sealed
	creds     *transport.Credentials
	discovery replica.Discovery
	state     *fsm.FSM
	replica   *replica.Replica
	transport *transport.Transport
	launcher  Launcher
	router    *router.Router
	leases    *lease.Keeper
	reloads   *reload.Reloads
	gossip    *gossip.Gossip
	audit     *audit.Device // nil without audit.file
	door      *httpd.Server
	http      *http.Server
	listener  net.Listener

	ready atomic.Bool
	fatal chan error
	rotor rotor
	hangs hangups
}

// New opens the data directory, binds the ports and wires the rooms together. Nothing is started; on an error
// everything that was opened is closed again.
func New(cfg Config, opt Options) (*Node, error) {
	n := &Node{cfg: cfg, opt: opt, log: opt.Logger, reg: opt.Registry, since: time.Now(), fatal: make(chan error, 1)}
	if n.log == nil {
		return nil, fault.New(fault.Invalid, "configure", "node", "Options.Logger is not set")
	}
	n.life.log = n.log
	if n.opt.Network == nil {
		n.opt.Network = transport.TCP()
	}
	if n.opt.Launcher == nil {
		n.opt.Launcher = n.newSupervisor
	}
	if n.reg == nil {
		n.reg = telemetry.NewRegistry(Version)
	}
	if err := n.open(); err != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		return nil, errors.Join(err, n.life.unwind(ctx))
	}
	return n, nil
}

// component is the logger of one room.
func (n *Node) component(name string) *slog.Logger { return telemetry.Component(n.log, name) }

// open builds every room, from the ground floor up.
func (n *Node) open() error {
	for _, build := range []struct {
		name string
		run  func() error
	}{
		{"http port", n.bindHTTP},
		{"data directory", n.openReplicaDir},
		{"seal", n.openSeal},
		{"supervisor", n.openLauncher},
		{"leases", n.openLeases},
		{"router", n.openRouter},
		{"cluster port", n.openTransport},
		{"gossip", n.openGossip},
		{"replica", n.openReplica},
		{"reloads", n.openReloads},
		{"audit device", n.openAudit},
		{"http", n.openHTTP},
	} {
		if err := build.run(); err != nil {
			return fault.Wrap(err, "open", build.name)
		}
	}
	return nil
}

// Start begins to serve. It returns when the ports answer, before the node has found its cluster; Ready tells that.
func (n *Node) Start(ctx context.Context) error {
	for _, s := range []struct {
		name  string
		start func() error
		stop  func(context.Context) error
	}{
		{"cluster port", func() error { n.transport.Start(); return nil }, nil},
		{"certificates", n.startCertificates, n.stopCertificates},
		{"gossip", n.startGossip, n.stopGossip},
		{"reloads", func() error { return n.reloads.Start(ctx) }, n.reloads.Stop},
		{"replica", func() error { return n.replica.Start(ctx) }, n.replica.Stop},
		{"hangups", n.startHangups, n.stopHangups},
		{"http", n.startHTTP, n.stopHTTP},
	} {
		if err := s.start(); err != nil {
			// ctx may be what ended the start, and must not cut the unwinding short.
			stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
			defer cancel()
			return errors.Join(fault.Wrap(err, "start", s.name), n.Stop(stop))
		}
		if s.stop != nil {
			n.life.did(s.name, s.stop)
		}
	}
	n.log.Info("node is up", "node", n.cfg.Name, "id", n.ID(), "api", n.APIAddress(), "cluster", n.transport.Addr(), "version", Version)
	return nil
}

// Stop stops answering, hands leadership over, ends every plugin process and closes what New opened. The deadline of
// ctx holds for all of it; errors are joined.
func (n *Node) Stop(ctx context.Context) error {
	n.ready.Store(false)
	return n.life.unwind(ctx)
}

// stopTimeout bounds a graceful stop: longer than the longest drain and kill of one plugin, shorter than what service
// managers allow by default (90 s).
const stopTimeout = 45 * time.Second

// Run is New, Start, and Stop when ctx ends or the node cannot go on.
func Run(ctx context.Context, cfg Config, opt Options) error {
	n, err := New(cfg, opt)
	if err != nil {
		return err
	}
	if err := n.Start(ctx); err != nil {
		return err
	}
	var cause error
	select {
	case <-ctx.Done():
		n.log.Info("stopping", "because", context.Cause(ctx))
	case cause = <-n.fatal:
		if errors.Is(cause, errLeft) {
			n.log.Info("stopping", "because", cause)
			break
		}
		n.log.Error("cannot go on", "error", cause)
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	return errors.Join(cause, n.Stop(stop))
}

// fail makes Run stop with err; only the first one counts.
func (n *Node) fail(err error) {
	select {
	case n.fatal <- err:
	default:
	}
}

// Failed tells, once, why the node cannot go on: Run then stops it. Whoever started it without Run should do the same.
func (n *Node) Failed() <-chan error { return n.fatal }

// Left reports whether what Failed told is that the node has left its cluster, as it was asked to.
func Left(err error) bool { return errors.Is(err, errLeft) }

// ID is the node's id: the UUID of its data directory.
func (n *Node) ID() string { return n.dir.NodeID }

// Name is the node's configured name.
func (n *Node) Name() string { return n.cfg.Name }

// APIAddress is the URL of the node's HTTP API.
func (n *Node) APIAddress() string {
	if n.cfg.HTTP.Advertise != "" {
		return n.cfg.HTTP.Advertise
	}
	scheme := "http"
	if n.cfg.HTTP.TLSCertFile != "" {
		scheme = "https"
	}
	return scheme + "://" + n.listener.Addr().String()
}

// GossipAddress is where other nodes find this one; empty without gossip.
func (n *Node) GossipAddress() string {
	if n.gossip == nil {
		return ""
	}
	return n.gossip.Addr()
}

// State is this node's copy of the replicated state, for tests and the demo: read only.
func (n *Node) State() *fsm.FSM { return n.state }

// Replica is this node's replica, for tests.
func (n *Node) Replica() *replica.Replica { return n.replica }

// Reloads is this node's part in reloads, for tests.
func (n *Node) Reloads() *reload.Reloads { return n.reloads }

// Handler is the HTTP API, for tests that need no socket.
func (n *Node) Handler() http.Handler { return n.door.Handler() }

// Wait returns when the node has entered its cluster, every mount here runs what is wanted, and plugin requests are
// served; or with ctx's error and what is missing.
func (n *Node) Wait(ctx context.Context) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		missing := n.missing()
		if missing == "" {
			n.ready.Store(true)
			return nil
		}
		select {
		case <-ctx.Done():
			return fault.As(fault.Deadline, context.Cause(ctx), "wait for node "+n.cfg.Name, missing)
		case <-tick.C:
		}
	}
}

func (n *Node) missing() string {
	select {
	case <-n.replica.Ready():
	default:
		return "it has not entered the cluster"
	}
	if n.replica.Role().LeaderID == "" {
		return "no leader is known"
	}
	if !n.reloads.Converged() {
		return "some mount does not run what is wanted"
	}
	if err := n.replica.Serving(); err != nil {
		return "it has no serving lease"
	}
	return ""
}

func readSecret(path string) (string, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return "", fault.As(fault.Invalid, err, "read", path)
	}
	return strings.TrimSpace(string(raw)), nil
}
