package router

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// route is a mount's way to its instance on this node. It exists from the first request or the first switch on, whichever
// comes first: a request that comes before the instance waits at the gate.
type route struct {
	r    *Router
	uuid string
	gate *gate
	// busy holds a token while a switch, a role change or a repair is under way: one at a time.
	busy  chan struct{}
	meter *meter
	inval *invalidations

	// run is the instance that was last put behind the gate, also while the gate is closed.
	run   atomic.Pointer[instance]
	paths atomic.Pointer[specialPaths]
	// leaderOnly is set once a follower's read has made a secret.
	leaderOnly atomic.Bool
	// floor is the generation below which this node has promised to release nothing more.
	floor atomic.Uint64
	// owed is the index of the newest entry that a client of this node may know of, from an answer of the leader's, before
	// this node's instance was told of it.
	owed atomic.Uint64
	// behind is when this node's instance was last waited for in vain.
	behind atomic.Pointer[time.Time]
	// forwards counts the requests that this node has given to the leader; replaced at every switch, so that those
	// before it can be waited for.
	forwards atomic.Pointer[refs]

	working sync.Once
	// repairs asks the worker to set the instance up again, or to enter its new generation; it holds at most one.
	repairs chan repair
	stop    context.CancelCauseFunc
	ctx     context.Context
}

// route returns the mount's route, and makes it when there is none.
func (r *Router) route(uuid string) *route {
	if v, ok := r.routes.Load(uuid); ok {
		return v.(*route)
	}
	rt := &route{
		r: r, uuid: uuid, gate: newGate(r.cfg.MaxWaiting), busy: make(chan struct{}, 1), meter: newMeter(time.Now),
		inval: newInvalidations(r.cfg.QueueKeys), repairs: make(chan repair, 1),
	}
	rt.ctx, rt.stop = context.WithCancelCause(r.ctx)
	rt.forwards.Store(new(newRefs()))
	v, raced := r.routes.LoadOrStore(uuid, rt)
	if raced {
		rt.stop(nil)
	} else if r.ctx.Err() != nil {
		rt.gate.set(gone, nil, nil, nil)
	}
	return v.(*route)
}

// lookup returns the mount's route, or nil.
func (r *Router) lookup(uuid string) *route {
	if v, ok := r.routes.Load(uuid); ok {
		return v.(*route)
	}
	return nil
}

// lock takes the route for a change.
func (rt *route) lock(ctx context.Context) error {
	if rt.ctx.Err() != nil {
		return fault.Text(fault.Unavailable, "the mount is being removed from this node")
	}
	select {
	case rt.busy <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fault.Wrap(context.Cause(ctx), "wait for another change of mount", rt.uuid)
	case <-rt.ctx.Done():
		return fault.Text(fault.Unavailable, "the mount is being removed from this node")
	}
}

// busyless takes the route for a change if nobody else has it.
func (rt *route) busyless() bool {
	select {
	case rt.busy <- struct{}{}:
		return true
	default:
		return false
	}
}

func (rt *route) unlock() { <-rt.busy }

// work starts the route's worker.
func (rt *route) work() {
	rt.working.Do(func() { rt.r.group.Go(rt.worker) })
}

// specials waits, bounded, until the paths of an instance are known.
func (rt *route) specials(ctx context.Context) (*specialPaths, error) {
	if p := rt.paths.Load(); p != nil {
		return p, nil
	}
	timer := time.NewTimer(rt.r.cfg.GateWait)
	defer timer.Stop()
	for {
		m, changed, why := rt.gate.state()
		if p := rt.paths.Load(); p != nil {
			return p, nil
		}
		switch m {
		case failing:
			return nil, fault.As(fault.Unavailable, why, "", "")
		case gone:
			return nil, fault.Text(fault.Unavailable, "the mount is being removed from this node")
		default: // it may still come
		}
		select {
		case <-changed:
		case <-timer.C:
			return nil, fault.Text(fault.Unavailable, "the mount's plugin is not ready on this node; try again")
		case <-ctx.Done():
			return nil, fault.Wrap(context.Cause(ctx), "wait for", "the mount's plugin")
		}
	}
}

// reopen lets requests back to an instance that a change has left as it was.
func (rt *route) reopen(in *instance) {
	if in == nil {
		rt.gate.set(held, nil, nil, nil)
		return
	}
	if in.life.dead() {
		rt.gate.set(away, in.life.why, nil, nil)
		return
	}
	if in.store.owns() {
		rt.gate.set(open, nil, in, in)
		return
	}
	rt.gate.set(open, nil, in, nil)
}

// forwarding counts a request that goes to the leader.
func (rt *route) forwarding() *refs {
	for {
		f := rt.forwards.Load()
		f.Add(1)
		if rt.forwards.Load() == f {
			return f
		}
		f.Add(-1)
	}
}

// Running answers the generation of the instance behind the mount's gate, or of the last one, and whether the gate lets
// requests through to it. Any goroutine.
func (r *Router) Running(mountUUID string) (generation uint64, ready bool) {
	rt := r.lookup(mountUUID)
	if rt == nil {
		return 0, false
	}
	in := rt.run.Load()
	if in == nil {
		return 0, false
	}
	return in.generation(), rt.gate.lane[readLane].Load() == in
}

// Suspend says that the process behind the mount's gate has ended. Requests wait, bounded, for the next one, and a
// follower's reads go to the leader. Writes that were inside fail with fault.OutcomeUnknown, reads are tried once more.
func (r *Router) Suspend(mountUUID string, why error) {
	r.suspend(mountUUID, why, away)
}

// Fail says that the instance behind the mount's gate must not answer any more, though its process lives. Requests fail
// at once with fault.Unavailable until the next Switch.
func (r *Router) Fail(mountUUID string, why error) {
	r.suspend(mountUUID, why, failing)
}

func (r *Router) suspend(mountUUID string, why error, to mode) {
	rt := r.lookup(mountUUID)
	if rt == nil {
		return
	}
	in := rt.run.Load()
	if in == nil {
		return
	}
	rt.gate.set(to, why, nil, nil)
	if to == away {
		rt.meter.cur.Load().crashes.Add(1)
		r.metrics.crashes.Inc()
	}
	in.life.end(why)
	in.store.retire()
}

// Relabel makes the running instance serve a new generation. On the leader a TakeOver entry follows, so that followers
// learn that this generation writes.
func (r *Router) Relabel(mountUUID string, w *commandv1.Wanted) {
	rt := r.lookup(mountUUID)
	if rt == nil {
		return
	}
	in := rt.run.Load()
	if in == nil {
		return
	}
	in.wanted.Store(w)
	if rt.busyless() {
		// A switch that was given up may have left reads to the leader.
		if m, _, _ := rt.gate.state(); m == away && !in.life.dead() {
			rt.reopen(in)
		}
		rt.unlock()
	}
	rt.meter.relabel(w.GetGeneration())
	if in.leader {
		rt.repair(repair{in: in, what: restamp})
	}
}

// Drop ends the mount's route for good: new requests fail, those in flight are waited for until ctx ends and then canceled.
// It returns the backend that was behind the gate, which nobody uses any more; nil when there was none.
func (r *Router) Drop(ctx context.Context, mountUUID string) (Backend, error) {
	rt := r.lookup(mountUUID)
	if rt == nil {
		return nil, nil
	}
	rt.gate.set(gone, nil, nil, nil)
	rt.stop(errDropped)
	// A mount that comes back under the same uuid gets a route of its own, whatever becomes of this one.
	r.routes.CompareAndDelete(mountUUID, rt)
	select {
	case rt.busy <- struct{}{}:
		defer rt.unlock()
		return rt.over(ctx), nil
	case <-ctx.Done():
		// Whoever changes the route now gives it back: its caller's time ends too. Then the rest is done.
		r.group.Go(func() {
			rt.busy <- struct{}{}
			defer rt.unlock()
			rt.over(ctx)
		})
		return nil, fault.Wrap(context.Cause(ctx), "drop mount", mountUUID)
	}
}

// over ends the instance of a route that has been dropped. Called with the route locked.
func (rt *route) over(ctx context.Context) Backend {
	in := rt.run.Swap(nil)
	if in == nil {
		return nil
	}
	if !in.refs.drain(ctx, rt.r.cfg.RequestTimeout) {
		in.cancelAll(errDropped)
		in.refs.drain(context.WithoutCancel(ctx), cancelGrace)
	}
	in.store.retire()
	in.life.end(errDropped)
	return in.backend
}

var errDropped = fault.Text(fault.Unavailable, "the mount is gone")
