// Package replica is one replica of the cluster's state: the Raft log on this node's disk, its place among the members,
// proposals and consistent reads through whoever leads, leadership as a context, and the serving leases that make "no
// request is answered by an older generation" true. See DESIGN.md beside this file.
package replica

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"

	"rollcall/fsm"
	"rollcall/node/fault"
	"rollcall/node/replica/internal/disk"
	"rollcall/node/telemetry"
	peerv1 "rollcall/proto/peer/v1"
)

// Replica is one Raft replica. New opens its disk, Start joins in, Stop hands over and leaves nothing behind. Every other
// method may be called from any goroutine, also before Start and after Stop, where it answers fault.Unavailable.
type Replica struct {
	cfg    Config
	log    *slog.Logger
	fsm    *fsm.FSM
	stores *disk.Stores
	stream *gatedStream
	guard  *guard
	m      *metrics

	raft    atomic.Pointer[raft.Raft] // nil before Start
	ctx     context.Context           // ends with Stop
	cancel  context.CancelCauseFunc
	started atomic.Bool
	stopped chan struct{}
	stopErr error
	stop    sync.Once
	wg      sync.WaitGroup // the loops

	inflight calls // futures of Raft and calls that wait for them; shut by Stop

	roles    roles
	runs     []func(context.Context, uint64)
	led      atomic.Pointer[led] // this leadership's soft state; nil when not leading
	health   healthBox
	stamps   stamper
	bytes    *semaphore.Weighted
	reads    readers
	nudge    chan struct{}
	nudged   atomic.Uint64
	peers    atomic.Pointer[knownPeers]
	lease    atomic.Int64 // end of our serving lease on cfg.Now's clock
	ready    chan struct{}
	entrance entrance
	changing chan struct{} // one membership change at a time
	fatal    sync.Once
	failed   atomic.Bool
}

// New opens and verifies the stores and prepares the transport; nothing runs before Start. On an error everything that
// was opened is closed again, but for cfg.Dir. Errors: fault.Invalid for the configuration, fault.Corrupt for a damaged
// disk.
func New(cfg Config) (*Replica, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	stores, err := cfg.Dir.Open(disk.Options{
		Limit: cfg.DiskLimit, NoSync: cfg.NoSync, Retain: 2, Logger: telemetry.HCLog(cfg.Logger), Wrap: cfg.wrapLog, Keys: cfg.Keys, Backing: cfg.Disk,
	})
	if err != nil {
		return nil, err
	}
	r := &Replica{
		cfg: cfg, log: cfg.Logger, fsm: cfg.FSM, stores: stores,
		stopped: make(chan struct{}), ready: make(chan struct{}), nudge: make(chan struct{}, 1),
		changing: make(chan struct{}, 1), bytes: semaphore.NewWeighted(cfg.MaxInFlightBytes),
	}
	r.roles.init()
	r.ctx, r.cancel = context.WithCancelCause(context.Background())
	if err := r.entrance.load(cfg.Dir, stores.HasState); err != nil {
		return nil, errors.Join(err, stores.Close())
	}
	if r.m, err = newMetrics(cfg.Metrics, r); err != nil {
		return nil, errors.Join(err, stores.Close())
	}
	stores.Log.OnCorrupt(func(err error) {
		r.fail(err)
		if r.raft.Load() != nil {
			select {} // Raft would panic on the entry; the process is about to stop with the reason
		}
	})
	return r, nil
}

// Start starts Raft and everything around it, and returns; Ready says when this node has entered. ctx bounds the start
// only. It is called once.
func (r *Replica) Start(ctx context.Context) error {
	if !r.started.CompareAndSwap(false, true) {
		return fault.New(fault.Conflict, "start replica", r.cfg.Name, "is started already")
	}
	if err := ctx.Err(); err != nil {
		return fault.Wrap(err, "start replica", r.cfg.Name)
	}
	if err := r.startRaft(); err != nil {
		return err
	}
	r.cfg.Announce(SelfFacts{ClusterID: r.clusterID(), HasState: r.hasState()})
	r.wg.Go(func() { r.stores.Log.Watch().Run(r.ctx, r.diskSlow, r.diskWell) })
	r.wg.Go(r.watchRole)
	r.wg.Go(r.nudgeLoop)
	r.wg.Go(r.keepKeys)
	r.wg.Go(r.enter)
	r.wg.Go(r.keepLease)
	return nil
}

// startRaft is the part that can fail. NewRaft panics on some damage; it becomes an error here.
func (r *Replica) startRaft() error {
	hlog := telemetry.HCLog(r.log)
	logs, err := raft.NewLogCache(512, r.stores.Log)
	if err != nil {
		return fault.Wrap(err, "start raft", r.cfg.Name)
	}
	r.stream = newGatedStream(r.cfg.Stream)
	trans := raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream: r.stream, ServerAddressProvider: addresses{r}, Logger: hlog,
		MaxPool: 3, MaxRPCsInFlight: 1, Timeout: r.cfg.rpcTimeout(), MsgpackUseNewTimeFormat: true,
	})
	r.guard = newGuard(trans, logs, r.stores.Snapshots, &r.entrance, r.fail)

	conf := raft.DefaultConfig()
	conf.LocalID = raft.ServerID(r.cfg.Dir.NodeID)
	conf.HeartbeatTimeout, conf.ElectionTimeout = r.cfg.heartbeat(), r.cfg.heartbeat()
	conf.LeaderLeaseTimeout = r.cfg.heartbeat() / 2
	conf.CommitTimeout = min(50*time.Millisecond, r.cfg.heartbeat()/2)
	conf.MaxAppendEntries = 64
	conf.BatchApplyCh = true
	conf.ShutdownOnRemove = false
	conf.TrailingLogs = r.cfg.TrailingLogs
	conf.SnapshotThreshold = r.cfg.SnapshotThreshold
	conf.SnapshotInterval = r.cfg.SnapshotInterval
	conf.NoLegacyTelemetry = true
	conf.Logger = hlog

	var node *raft.Raft
	err = disk.Guarded("start raft", r.cfg.Dir.Path, func() (err error) {
		node, err = raft.NewRaft(conf, r.fsm, logs, r.stores.Stable, r.stores.Snapshots, r.guard)
		return err
	})
	if err != nil {
		return errors.Join(fault.Wrap(err, "start raft", r.cfg.Dir.Path), r.guard.Close())
	}
	r.raft.Store(node)
	r.guard.start(node)
	return nil
}

// Stop hands leadership over, ends every loop and every LeaderContext, closes Raft, the stores and the directory, and
// returns when no goroutine is left or ctx has ended. It may be called more than once and without Start.
func (r *Replica) Stop(ctx context.Context) error {
	r.stop.Do(func() { go func() { r.stopErr = r.shutdown(ctx); close(r.stopped) }() })
	select {
	case <-r.stopped:
		return r.stopErr
	case <-ctx.Done():
		return fault.Wrap(ctx.Err(), "stop replica", r.cfg.Name)
	}
}

func (r *Replica) shutdown(ctx context.Context) error {
	r.dropLease()
	node := r.raft.Load()
	if node != nil && node.State() == raft.Leader {
		handover, cancel := context.WithTimeout(ctx, 2*r.cfg.heartbeat())
		if err := r.transferHere(handover); err != nil {
			r.log.Info("leadership is not handed over", "error", err)
		}
		cancel()
	}
	r.inflight.shut()
	r.cancel(fault.New(fault.Unavailable, "", "", "node %s is stopping", r.cfg.Name))
	r.wg.Wait()

	// While Raft runs, every future is answered (a follower refuses what a leader would have done), sooner or later where the
	// disk is slow, unless it hangs. Afterwards none would be: Raft forgets those in its queues.
	waitFor(r.inflight.wait, 10*r.cfg.heartbeat())
	r.stores.Release()
	var errs []error
	if node != nil {
		down := make(chan error, 1)
		waitFor(func() { down <- node.Shutdown().Error() }, r.shutdownTime(ctx)) // closes guard and stream too
		select {
		case err := <-down:
			errs = append(errs, fault.Wrap(err, "shut down raft", r.cfg.Name))
		default: // it reads or writes a disk that does not answer; closing the log under it would wait as well
			r.m.unregister()
			return errors.Join(fault.New(fault.Deadline, "shut down raft", r.cfg.Name, "the disk does not answer"), r.cfg.Dir.Close())
		}
	}
	r.m.unregister()
	return errors.Join(append(errs, r.stores.Close(), r.cfg.Dir.Close())...)
}

// shutdownTime is how long Raft may take to end: as long as the caller gives, but not when it can never end.
func (r *Replica) shutdownTime(ctx context.Context) time.Duration {
	if r.failed.Load() || r.stream.isShut() {
		return 2 * time.Second
	}
	if deadline, ok := ctx.Deadline(); ok {
		return max(time.Until(deadline), time.Second)
	}
	return time.Minute
}

// waitFor waits for f, at most d.
func waitFor(f func(), d time.Duration) {
	done := make(chan struct{})
	go func() { f(); close(done) }()
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-done:
	case <-t.C:
	}
}

// Register adds the peer service to the cluster port's gRPC server. It may be called before Start.
func (r *Replica) Register(s grpc.ServiceRegistrar) { peerv1.RegisterReplicaServer(s, &service{r: r}) }

// Ready is closed once this node's Hello is applied here: the state then knows this incarnation.
func (r *Replica) Ready() <-chan struct{} { return r.ready }

// NodeID returns the UUID of the data directory; it is the Raft ServerID.
func (r *Replica) NodeID() string { return r.cfg.Dir.NodeID }

// Incarnation returns the boot counter that this process's Hello enters.
func (r *Replica) Incarnation() uint64 { return r.cfg.Dir.Incarnation }

// DiskStalled returns how long the oldest write to the log has been under way; 0 when none is. For health checks.
func (r *Replica) DiskStalled() time.Duration { return r.stores.Log.Watch().Oldest() }

// node returns Raft, or why there is none.
func (r *Replica) node() (*raft.Raft, error) {
	if n := r.raft.Load(); n != nil && r.ctx.Err() == nil {
		return n, nil
	}
	return nil, fault.New(fault.Unavailable, "", "", "node %s is not running", r.cfg.Name)
}

// await waits for a future of Raft and for ctx, whichever is first. The wait for the future goes on in the background
// and is waited for by Stop.
func (r *Replica) await(ctx context.Context, f raft.Future) error {
	if !r.inflight.begin() {
		return fault.New(fault.Unavailable, "", "", "node %s is stopping", r.cfg.Name)
	}
	done := make(chan error, 1)
	go func() {
		defer r.inflight.done()
		done <- f.Error()
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// fail reports what makes it impossible to go on.
func (r *Replica) fail(err error) {
	r.fatal.Do(func() {
		r.failed.Store(true)
		r.log.Error("this node cannot go on", "error", err)
		if r.cfg.OnFatal != nil {
			r.cfg.OnFatal(err)
		}
	})
}

func (r *Replica) diskSlow(d time.Duration) {
	r.log.Error("the disk does not answer: giving up leadership and leaving the cluster until it does",
		"write_under_way_for", d, "limit", r.cfg.DiskLimit)
	r.m.diskStalls.Inc()
	r.stream.setShut(true)
	if n, ok := r.guard.network.(interface{ CloseStreams() }); ok {
		n.CloseStreams()
	}
	r.roles.poke()
}

func (r *Replica) diskWell() {
	r.log.Warn("the disk answers again")
	r.stream.setShut(false)
	r.roles.poke()
}

func (r *Replica) hasState() bool {
	if n := r.raft.Load(); n != nil && n.LastIndex() > 0 {
		return true
	}
	return r.stores.HasState
}

// clusterID is the state's, or, before the state is known after a restart, what the directory remembers.
func (r *Replica) clusterID() string {
	if id := r.fsm.View().ClusterID(); id != "" {
		return id
	}
	return r.entrance.clusterID()
}

// addresses tells the transport where a server is now. Gossip knows a moved node before the configuration does.
type addresses struct{ r *Replica }

var _ raft.ServerAddressProvider = addresses{}

// ServerAddr is raft.ServerAddressProvider's. An error makes the transport use the configuration's address.
func (a addresses) ServerAddr(id raft.ServerID) (raft.ServerAddress, error) {
	var configured raft.ServerAddress
	if n := a.r.raft.Load(); n != nil {
		for _, s := range n.GetConfiguration().Configuration().Servers {
			if s.ID == id {
				configured = s.Address
			}
		}
	}
	for _, p := range a.r.known() {
		switch {
		case p.NodeID == string(id) && p.Status != PeerLeft && p.Address != "":
			return raft.ServerAddress(p.Address), nil
		case p.NodeID != "" && p.NodeID != string(id) && p.Status == PeerAlive && p.Address == string(configured):
			// Somebody else lives there now (a replaced disk). Its answers must not count as the old one's.
			configured = ""
		}
	}
	if configured == "" {
		return raft.ServerAddress("nowhere.invalid:0"), nil
	}
	return configured, nil
}

// known returns Discovery's peers, at most a little old: the transport asks before every message.
func (r *Replica) known() []Peer {
	if k := r.peers.Load(); k != nil && time.Since(k.at) < 100*time.Millisecond {
		return k.peers
	}
	k := &knownPeers{at: time.Now(), peers: r.cfg.Discovery.Peers()}
	r.peers.Store(k)
	return k.peers
}

type knownPeers struct {
	at    time.Time
	peers []Peer
}

// String names the replica in logs.
func (r *Replica) String() string { return fmt.Sprintf("%s (%s)", r.cfg.Name, r.cfg.Dir.NodeID) }
