// Package reload drives reloads on one node and, where the node leads, the timers, batches and gates of the cluster's
// reloads. It decides nothing: what is wanted stands in the state machine, and this package makes what runs equal to it
// and says what happened. DESIGN.md beside this file tells the life of one reload on a node.
package reload

import (
	"context"
	"log/slog"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	"rollcall/node/failpoint"
	commandv1 "rollcall/proto/command/v1"
)

// MountStatus is what this node runs for one mount.
type MountStatus struct {
	MountUUID  string
	Generation uint64
	Spec       *commandv1.Spec
	PID        int
	// Started is when the process was started, by this node's wall clock.
	Started time.Time
	Role    Role
	State   RunState
	// LastError is why the last attempt at the wanted generation did not work; empty once it has.
	LastError string
	// Restarts counts crashes since the running generation came up.
	Restarts uint32
	// Prepared is the id of the reload that a second process stands ready for.
	Prepared string
}

// RunState is a word for what a mount's reconciler is at.
type RunState string

// The run states, as peerv1.RunningMount spells them.
const (
	StateReady      RunState = "ready"
	StateStarting   RunState = "starting"
	StatePreparing  RunState = "preparing"
	StateSwitching  RunState = "switching"
	StateBackingOff RunState = "backing off"
	StateStopped    RunState = "stopped"
)

// Reloads is this node's part in every reload. Its methods may be called from any goroutine.
type Reloads struct {
	cfg     Config
	log     *slog.Logger
	metrics *metrics
	self    string

	ctx    context.Context
	cancel context.CancelCauseFunc
	group  sync.WaitGroup

	boot   semaphore
	starts semaphore
	trials semaphore

	outbox   *outbox
	restored atomic.Uint64

	mu    sync.Mutex
	loops map[string]*mountLoop
	lead  *leader
	ready bool
}

// New makes a Reloads that does nothing before Start.
func New(cfg Config) (*Reloads, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	m, err := newMetrics(cfg.Metrics)
	if err != nil {
		return nil, err
	}
	r := &Reloads{
		cfg: cfg, log: cfg.Logger, metrics: m, self: cfg.Replica.NodeID(),
		boot: make(semaphore, cfg.BootParallelism), starts: make(semaphore, cfg.StartParallelism),
		trials: make(semaphore, 2),
		loops:  map[string]*mountLoop{},
	}
	r.outbox = newOutbox(r)
	return r, nil
}

// Start begins to make this node run what the state wants. It returns at once; nothing is started before the state
// shows this incarnation's own Hello, so that history which is being replayed starts no process.
func (r *Reloads) Start(ctx context.Context) error {
	r.ctx, r.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	r.group.Go(r.watch)
	r.group.Go(func() { r.outbox.run(r.ctx) })
	r.group.Go(r.keep)
	return nil
}

// Stop ends every plugin process of this node and waits for that, at most as long as ctx lasts. The node must have
// stopped to answer before.
func (r *Reloads) Stop(ctx context.Context) error {
	if r.cancel == nil {
		return nil
	}
	r.cancel(errStopping)
	ended := make(chan struct{})
	go func() { r.group.Wait(); close(ended) }()
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Restored tells that the state was replaced by a snapshot: after it, and only then, a mount may go to a lower
// generation than the one it runs. The state machine calls it on its Apply goroutine.
func (r *Reloads) Restored(uint64) {
	r.restored.Add(1)
}

// watch looks at the state after each entry, at most every few milliseconds, and wakes the reconcilers that it concerns.
func (r *Reloads) watch() {
	seen := map[string]concern{}
	running := map[string]*commandv1.Reload{}
	ticker := time.NewTicker(r.cfg.Resync)
	defer ticker.Stop()
	for {
		changed, roles := r.cfg.State.Changed(), r.cfg.Replica.LeadershipChanged()
		from, v := time.Now(), r.cfg.State.View()
		if r.isReady(v) {
			r.look(v, seen)
			r.observe(v, running)
			r.outbox.wakeUp()
		}
		// Under a write load entries come by the thousand: one look for all that came within the quantum. With many mounts
		// a look takes longer, and there are fewer of them: at most a tenth of a core goes into looking.
		pause := min(max(quantum, 10*time.Since(from)), 50*time.Millisecond)
		select {
		case <-r.ctx.Done():
			return
		case <-changed:
			if !sleep(r.ctx, pause) {
				return
			}
		case <-roles:
			r.wakeAll()
		case <-ticker.C:
			r.wakeAll()
		}
	}
}

// concern is what a mount's reconciler acts on: when both records are the same as last time, there is nothing new.
type concern struct {
	mount          *commandv1.Mount
	active, wanted *commandv1.Reload
}

// isReady reports whether the state is the present and not a stretch of history: it shows this incarnation's Hello.
func (r *Reloads) isReady(v View) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.ready {
		n := v.Node(r.self)
		r.ready = n != nil && n.GetIncarnation() == r.cfg.Replica.Incarnation() && !n.GetLeft()
	}
	return r.ready
}

// acts reports whether going from old to c is something that every node must act on, rather than a report's progress.
func (c concern) acts(old concern) bool {
	return c.mount != old.mount || c.active.GetId() != old.active.GetId() || c.active.GetPhase() != old.active.GetPhase() ||
		c.active.GetWave() != old.active.GetWave()
}

// reached tells tests that this node sees a reload's next phase, and has not acted on it yet.
func (r *Reloads) reached(c, old concern) {
	if !failpoint.Enabled {
		return
	}
	moved := c.active.GetId() != old.active.GetId() || c.active.GetPhase() != old.active.GetPhase() ||
		c.active.GetWave() != old.active.GetWave()
	if moved && c.active.GetPhase() == commandv1.Phase_PHASE_PREPARING {
		_ = failpoint.Hit(failpoint.ReloadPreparingApplied, r.self)
	}
	if moved && c.active.GetPhase() == commandv1.Phase_PHASE_COMMITTED {
		_ = failpoint.Hit(failpoint.ReloadSwitchApplied, r.self)
	}
}

// look starts a reconciler for each new mount and wakes those whose records changed. On the leader it nudges the others
// when there is something for all to act on: followers learn of a commit tens of milliseconds late otherwise.
func (r *Reloads) look(v View, seen map[string]concern) {
	mounts, nudge := v.Mounts(), false
	for _, m := range mounts {
		c := concern{mount: m, active: v.ActiveReload(m.GetUuid())}
		if w := v.Wanted(m, r.self); w != nil {
			c.wanted = v.Reload(w.GetReloadId())
		}
		old, known := seen[m.GetUuid()]
		if !known || old != c {
			r.reached(c, old)
			r.begin(m) // also one that a restored snapshot brought back while its reconciler was ending
			nudge = nudge || c.acts(old)
			seen[m.GetUuid()] = c
			r.wake(m.GetUuid())
		}
	}
	if len(seen) > len(mounts) {
		for uuid := range seen {
			if v.Mount(uuid) == nil {
				delete(seen, uuid)
				r.wake(uuid)
				nudge = true
			}
		}
	}
	if nudge && r.cfg.Replica.Leadership().Leader {
		r.cfg.Replica.Nudge()
	}
}

func (r *Reloads) begin(m *commandv1.Mount) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.loops[m.GetUuid()] != nil {
		return
	}
	l := newMountLoop(r, m)
	r.loops[m.GetUuid()] = l
	r.group.Go(l.loop)
}

// forget drops a reconciler that has ended because its mount is gone.
func (r *Reloads) forget(uuid string) {
	r.mu.Lock()
	delete(r.loops, uuid)
	r.mu.Unlock()
	if m := r.cfg.State.View().Mount(uuid); m != nil && r.ctx.Err() == nil {
		r.begin(m) // a restored snapshot has brought it back meanwhile
	}
}

func (r *Reloads) wake(uuid string) {
	r.mu.Lock()
	l := r.loops[uuid]
	r.mu.Unlock()
	if l != nil {
		l.wakeUp()
	}
}

func (r *Reloads) wakeAll() {
	r.mu.Lock()
	loops := make([]*mountLoop, 0, len(r.loops))
	for _, l := range r.loops {
		loops = append(loops, l)
	}
	r.mu.Unlock()
	for _, l := range loops {
		l.wakeUp()
	}
	r.outbox.wakeUp()
}

// observe counts reloads that ended since it was called last.
func (r *Reloads) observe(v View, running map[string]*commandv1.Reload) {
	now := map[string]bool{}
	for _, rl := range v.RunningReloads() {
		now[rl.GetId()] = true
		running[rl.GetId()] = rl
	}
	for id := range running {
		rl := v.Reload(id)
		if now[id] || rl != nil && !terminal(rl.GetPhase()) { // it may be rolling back
			continue
		}
		delete(running, id)
		if rl == nil {
			continue
		}
		_ = failpoint.Hit(failpoint.ReloadDone, r.self)
		r.metrics.ended(rl)
		r.log.Info("reload ended", "reload_id", id, "phase", rl.GetPhase().String(), "outcome", rl.GetOutcome(),
			"generation", rl.GetGeneration(), "why", rl.GetWhy())
	}
}

// Converged reports whether every mount here runs the generation that the state wants of it, or answers nothing at
// all. A node that was fenced gets a serving lease only when this holds. Mounts with fencing "none" do not count: they
// answer without a lease.
func (r *Reloads) Converged() bool {
	v := r.cfg.State.View()
	if !r.isReady(v) {
		return false
	}
	for _, m := range v.Mounts() {
		if m.GetConfig().GetFencing() == "none" {
			continue
		}
		r.mu.Lock()
		l := r.loops[m.GetUuid()]
		r.mu.Unlock()
		if w := v.Wanted(m, r.self); l != nil && w != nil && !l.converged(w) {
			return false
		}
	}
	return true
}

// Running says what this node runs, sorted by mount uuid.
func (r *Reloads) Running() []MountStatus {
	r.mu.Lock()
	loops := make([]*mountLoop, 0, len(r.loops))
	for _, l := range r.loops {
		loops = append(loops, l)
	}
	r.mu.Unlock()
	out := make([]MountStatus, 0, len(loops))
	for _, l := range loops {
		out = append(out, l.status())
	}
	sort.Slice(out, func(i, j int) bool { return out[i].MountUUID < out[j].MountUUID })
	return out
}
