package replica

import (
	"context"
	"sync"
	"time"

	"rollcall/fsm"
	"rollcall/node/failpoint"
	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
	peerv1 "rollcall/proto/peer/v1"
)

var errFenced = fault.New(fault.Fenced, "", "",
	"this node has lost touch with the leader and does not answer plugin requests until it has it again")

// Serving returns nil while this node holds a serving lease, else fault.Fenced. The router asks before it admits a
// request and again before it releases the answer.
func (r *Replica) Serving() error {
	if int64(r.cfg.Now()) < r.lease.Load() {
		return nil
	}
	return errFenced
}

// dropLease gives the lease up for good: nothing is served after Stop or Leave has begun.
func (r *Replica) dropLease() { r.lease.Store(leaseGivenUp) }

const leaseGivenUp = -1

// leaseSpan is how long the leader must wait after a grant before it is provably over, whatever the two clocks do.
func (c *Config) leaseSpan() time.Duration {
	return c.Lease + time.Duration(float64(c.Lease)*c.Drift)
}

// led is the soft state of one leadership: it dies with it. A new leader waits one full span before it calls any lease
// over, so it needs to know nothing of its predecessor's grants.
type led struct {
	term  uint64
	since time.Duration

	mu      sync.Mutex
	granted map[grantee]time.Duration
	fencing map[string]int
}

type grantee struct {
	node        string
	incarnation uint64
}

func newLed(term uint64, now time.Duration) *led {
	return &led{term: term, since: now, granted: map[grantee]time.Duration{}, fencing: map[string]int{}}
}

// grant records a lease. view is taken inside the lock: a fence whose end we see here is applied in it, and one that
// begins after us sees the grant.
func (l *led) grant(g grantee, now func() time.Duration, view func() *fsm.View, span time.Duration) (minIndex uint64, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fencing[g.node] > 0 {
		return 0, fault.New(fault.Unavailable, "grant lease", g.node, "the node is being fenced")
	}
	v := view()
	if err := mayServe(v, g); err != nil {
		return 0, err
	}
	t := now()
	for old, at := range l.granted {
		if t-at > 2*span {
			delete(l.granted, old)
		}
	}
	l.granted[g] = t
	return v.Index(), nil
}

// mayServe says whether the state lets this incarnation of the node serve.
func mayServe(v *fsm.View, g grantee) error {
	n := v.Node(g.node)
	switch {
	case n == nil || n.GetIncarnation() < g.incarnation:
		return fault.New(fault.Unavailable, "grant lease", g.node, "its Hello is not applied yet")
	case n.GetIncarnation() > g.incarnation || n.GetLeft():
		return fault.New(fault.Stale, "grant lease", g.node, "incarnation %d has left or was followed by %d", g.incarnation, n.GetIncarnation())
	}
	for _, reload := range v.RunningReloads() {
		if reload.GetPhase() != commandv1.Phase_PHASE_PREPARING {
			continue // once it is committed, the index of the grant holds the commit, and the node must have converged
		}
		for _, p := range reload.GetParticipants() {
			if p.GetNodeId() == g.node && p.GetIncarnation() == g.incarnation && p.GetSafe() == commandv1.Safe_SAFE_EXCLUDED {
				return fault.New(fault.Unavailable, "grant lease", g.node,
					"it is excluded from reload %s, which may commit without it at any moment", reload.GetId())
			}
		}
	}
	return nil
}

func (l *led) over(g grantee, now, span time.Duration) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now-l.since < span {
		return false
	}
	at, ok := l.granted[g]
	return !ok || now-at >= span
}

// LeaseOver reports, on the leader, that this incarnation of the node provably holds no serving lease: it can admit no
// request and release no answer until it is granted one. False on any other node. Use it between BeginFence and the
// proposal, or a grant can slip in between.
func (r *Replica) LeaseOver(nodeID string, incarnation uint64) bool {
	l := r.led.Load()
	return l != nil && l.over(grantee{nodeID, incarnation}, r.cfg.Now(), r.cfg.leaseSpan())
}

// BeginFence stops this leader from granting leases to the node. Call it before LeaseOver, and end it after the
// proposal of the FenceNode or ExcludeNode entry has returned, however it ended: grants go on only when everything that
// was proposed before end is decided. end may be called more than once and from any goroutine.
func (r *Replica) BeginFence(nodeID string) (end func()) {
	l := r.led.Load()
	if l == nil {
		return func() {}
	}
	l.mu.Lock()
	l.fencing[nodeID]++
	l.mu.Unlock()
	var once sync.Once
	return func() {
		once.Do(func() {
			if !r.inflight.begin() {
				return // stopping: this leadership grants nothing any more
			}
			go func() {
				defer r.inflight.done()
				r.settleFence(l, nodeID)
			}()
		})
	}
}

// settleFence lifts the ban once a barrier is applied behind the proposal. Without that (leadership lost) the ban stays
// and dies with the leadership.
func (r *Replica) settleFence(l *led, nodeID string) {
	for r.led.Load() == l && r.ctx.Err() == nil {
		ctx, cancel := context.WithTimeout(r.ctx, r.cfg.rpcTimeout())
		err := r.await(ctx, r.raft.Load().Barrier(r.cfg.rpcTimeout()))
		cancel()
		if err == nil {
			l.mu.Lock()
			if l.fencing[nodeID]--; l.fencing[nodeID] <= 0 {
				delete(l.fencing, nodeID)
			}
			l.mu.Unlock()
			return
		}
		pause(r.ctx, r.cfg.heartbeat()/10)
	}
}

// grantLease answers one request for a lease on the leader. The round of verification begins after the request has
// arrived, so the grant ends before any later leader may count on its end.
func (r *Replica) grantLease(ctx context.Context, req *peerv1.LeaseRequest) (*peerv1.LeaseResponse, error) {
	l := r.led.Load()
	if l == nil {
		return nil, fault.New(fault.NotLeader, "grant lease", req.GetNodeId(), "node %s does not lead", r.cfg.Name)
	}
	b, err := r.joinRead(ctx)
	if err != nil {
		return nil, fault.As(fault.Unavailable, err, "grant lease", req.GetNodeId())
	}
	if b.err != nil || b.term != l.term {
		return nil, fault.New(fault.NotLeader, "grant lease", req.GetNodeId(), "leadership of term %d is not confirmed", l.term)
	}
	if err := failpoint.Hit(failpoint.LeaseGrant, r.NodeID()); err != nil {
		return nil, err
	}
	g := grantee{req.GetNodeId(), req.GetIncarnation()}
	index, err := l.grant(g, r.cfg.Now, r.fsm.View, r.cfg.leaseSpan())
	if err != nil {
		return nil, err
	}
	return &peerv1.LeaseResponse{TtlNs: uint64(r.cfg.Lease), MinIndex: index, Term: l.term}, nil
}

// keepLease renews this node's serving lease every quarter of its length.
func (r *Replica) keepLease() {
	select {
	case <-r.ready:
	case <-r.ctx.Done():
		return
	}
	retry := max(r.cfg.Lease/50, 10*time.Millisecond)
	fenced := false
	for r.ctx.Err() == nil {
		changed := r.RoleChanged()
		sent := r.cfg.Now()
		err := r.renewLease(sent)
		next := r.cfg.Lease/4 - (r.cfg.Now() - sent)
		if err != nil {
			next = retry
			r.log.Debug("no serving lease granted", "error", err)
		}
		if now := r.Serving() != nil; now != fenced {
			fenced = now
			if fenced {
				r.m.fences.Inc()
				r.log.Warn("fenced: plugin requests are refused until the leader is heard again", "error", err)
			} else {
				r.log.Info("serving again")
			}
		}
		t := time.NewTimer(max(next, retry))
		if err == nil {
			changed = nil
		}
		select {
		case <-r.ctx.Done():
		case <-changed:
		case <-t.C:
		}
		t.Stop()
	}
}

// renewLease asks for a lease and takes it: counted from before the request was sent, and only when this node has
// applied everything that the leader had when it granted, so a node whose log is stuck is fenced too. A node that was
// without a lease may have been counted out meanwhile: it must have converged first.
func (r *Replica) renewLease(sent time.Duration) error {
	ctx, cancel := context.WithTimeout(r.ctx, min(r.cfg.Lease/2, r.cfg.rpcTimeout()))
	defer cancel()
	resp, err := r.askLease(ctx)
	if err != nil {
		return err
	}
	end := sent + min(time.Duration(resp.GetTtlNs()), r.cfg.Lease)
	caughtUp, cancelWait := context.WithTimeout(r.ctx, max(end-r.cfg.Now(), 0))
	defer cancelWait()
	if err := r.fsm.WaitIndex(caughtUp, resp.GetMinIndex()); err != nil {
		return fault.As(fault.Unavailable, err, "catch up with the lease", "")
	}
	held := r.lease.Load()
	if held == leaseGivenUp {
		return fault.New(fault.Fenced, "", "", "this node is leaving")
	}
	if int64(r.cfg.Now()) >= held && !r.cfg.Converged() {
		return fault.New(fault.Unavailable, "take lease", "", "the mounts on this node are not at their wanted generations yet")
	}
	if int64(end) > held {
		r.lease.CompareAndSwap(held, int64(end)) // fails only against dropLease
	}
	return nil
}

func (r *Replica) askLease(ctx context.Context) (*peerv1.LeaseResponse, error) {
	req := &peerv1.LeaseRequest{NodeId: r.NodeID(), Incarnation: r.Incarnation(), AppliedIndex: r.fsm.Index()}
	if r.led.Load() != nil {
		return r.grantLease(ctx, req)
	}
	client, role, err := r.leader(ctx)
	if err != nil {
		return nil, err
	}
	resp, err := client.Lease(ctx, req)
	if err != nil {
		return nil, fault.Wrap(err, "ask for a lease", role.LeaderID)
	}
	return resp, nil
}
