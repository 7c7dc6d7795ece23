package router

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"rollcall/node/fault"
)

// invalidations is a mount's bounded queue of changed storage keys, and what its instance has been told of. Adding never
// blocks: it happens on the goroutine that applies the log.
type invalidations struct {
	max int

	mu      sync.Mutex
	items   []change
	keys    int
	over    bool
	follows bool
	waiters []waiter

	wake chan struct{}
	// seen is the index of the newest change or snapshot, told the one up to which the instance knows.
	seen, told atomic.Uint64
}

type change struct {
	keys  []string
	index uint64
}

// waiter wants to know when the instance has been told of index.
type waiter struct {
	index uint64
	done  chan struct{}
}

func newInvalidations(max int) *invalidations {
	return &invalidations{max: max, wake: make(chan struct{}, 1)}
}

// add takes note of changed keys. A queue that would overflow is emptied and marked: the instance must be set up again.
func (q *invalidations) add(keys []string, index uint64) (overflow bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	raise(&q.seen, index)
	if !q.follows {
		// The leader's instance wrote this itself.
		q.tell(index)
		return false
	}
	if q.over {
		return false
	}
	if q.keys+len(keys) > q.max {
		q.spill()
		return true
	}
	q.items = append(q.items, change{keys, index})
	q.keys += len(keys)
	q.signal()
	return false
}

// spill forgets what is queued; only setting the instance up again makes it whole. Called with mu held.
func (q *invalidations) spill() {
	q.items, q.keys, q.over = nil, 0, true
	q.signal()
}

func (q *invalidations) signal() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// lose marks everything that the instance knows as unknown: the state was replaced.
func (q *invalidations) lose(index uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	raise(&q.seen, index)
	if q.follows {
		q.spill()
	}
}

// follow begins to queue for an instance that is about to be set up on the state now: whatever it will read there is at
// least as new as what the queue held. Not following, nothing is queued.
func (q *invalidations) follow(follows bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.follows, q.items, q.keys, q.over = follows, nil, 0, false
	if !follows {
		q.tell(q.seen.Load())
	}
}

// front answers the oldest change; ok is false when there is none. over says that the queue has overflowed since follow.
func (q *invalidations) front() (c change, ok, over bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.items) == 0 {
		return change{}, false, q.over
	}
	return q.items[0], true, q.over
}

// done says that the instance has been told of c: it leaves the queue, if it is still the oldest.
func (q *invalidations) done(c change) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.items) > 0 && q.items[0].index == c.index {
		q.keys -= len(q.items[0].keys)
		q.items[0] = change{}
		q.items = q.items[1:]
	}
	q.tell(c.index)
}

// tell says that the instance knows everything up to index. Called with mu held.
func (q *invalidations) tell(index uint64) {
	raise(&q.told, index)
	told := q.told.Load()
	kept := q.waiters[:0]
	for _, w := range q.waiters {
		if w.index <= told {
			close(w.done)
		} else {
			kept = append(kept, w)
		}
	}
	clear(q.waiters[len(kept):])
	q.waiters = kept
}

// knows says that the instance has been told of everything up to index.
func (q *invalidations) knows(index uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.tell(index)
}

// wait returns when the instance has been told of index, or false when ctx or the limit ends first.
func (q *invalidations) wait(ctx context.Context, index uint64, limit time.Duration) bool {
	if q.told.Load() >= index {
		return true
	}
	q.mu.Lock()
	if q.told.Load() >= index {
		q.mu.Unlock()
		return true
	}
	w := waiter{index: index, done: make(chan struct{})}
	q.waiters = append(q.waiters, w)
	q.mu.Unlock()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-w.done:
		return true
	case <-timer.C:
	case <-ctx.Done():
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	for i := range q.waiters {
		if q.waiters[i].done == w.done {
			q.waiters = append(q.waiters[:i], q.waiters[i+1:]...)
			break
		}
	}
	return q.told.Load() >= index
}

// StorageChanged implements fsm.Observer: it queues, and never blocks.
func (r *Router) StorageChanged(mountUUID string, keys []string, index uint64) {
	rt := r.lookup(mountUUID)
	if rt == nil {
		return
	}
	if rt.inval.add(keys, index) {
		r.metrics.overflows.Inc()
	}
}

// Restored implements fsm.Observer: the whole state was replaced, so every follower's instance is set up again.
func (r *Router) Restored(index uint64) {
	r.routes.Range(func(_, v any) bool {
		v.(*route).inval.lose(index)
		return true
	})
}

// repair is work that the router does on its own account.
type repair struct {
	in   *instance
	what int
	try  int
}

const (
	// resetup: the instance lost track of its storage, or its epoch: set it up again.
	resetup = iota
	// restamp: the instance serves a new generation: enter a TakeOver for it.
	restamp
)

// repair asks the worker for a repair. One that waits already makes the second needless.
func (rt *route) repair(p repair) {
	select {
	case rt.repairs <- p:
	default:
	}
}

// worker tells the instance of changed keys, and repairs it. It ends with the route.
func (rt *route) worker() {
	for {
		_, changed, _ := rt.gate.state()
		if rt.invalidate() {
			// Nothing to tell, or nobody to tell it: whatever comes next wakes us.
			select {
			case <-rt.ctx.Done():
				return
			case p := <-rt.repairs:
				rt.mend(p)
			case <-rt.inval.wake:
			case <-changed:
			}
		}
		if rt.ctx.Err() != nil {
			return
		}
	}
}

// invalidate tells the instance behind the gate of the oldest change. idle says that there was nothing to do.
func (rt *route) invalidate() (idle bool) {
	c, ok, over := rt.inval.front()
	if over {
		in := rt.run.Load()
		if in == nil || in.leader || in.life.dead() || len(rt.repairs) > 0 {
			return true
		}
		rt.mend(repair{in: in, what: resetup})
		_, _, over = rt.inval.front()
		return over
	}
	if !ok {
		return true
	}
	in := rt.gate.try(readLane)
	if in == nil {
		return true
	}
	err := rt.tell(rt.ctx, in, c)
	in.release()
	if err != nil && rt.ctx.Err() == nil && !in.life.dead() {
		rt.r.log.Warn("invalidate storage keys in plugin", "mount_uuid", rt.uuid, "keys", len(c.keys), "index", c.index,
			"cause", err)
		rt.mend(repair{in: in, what: resetup})
	}
	return err != nil && in.life.dead()
}

// catchUp tells an instance that is not yet behind the gate of everything that changed since it was set up.
func (rt *route) catchUp(ctx context.Context, in *instance) error {
	for {
		c, ok, over := rt.inval.front()
		switch {
		case over:
			return fault.Text(fault.Exhausted, "more than %d storage keys changed while the plugin was set up", rt.inval.max)
		case !ok:
			rt.inval.knows(in.base)
			return nil
		}
		if err := rt.tell(ctx, in, c); err != nil {
			return err
		}
	}
}

// tell calls InvalidateKey for every key, unless the instance was set up on a state that has them.
func (rt *route) tell(ctx context.Context, in *instance, c change) error {
	if !in.leader && c.index > in.base {
		for _, k := range c.keys {
			bounded, cancel := context.WithTimeout(ctx, rt.r.cfg.InvalidateTimeout)
			err := in.backend.InvalidateKey(bounded, k)
			cancel()
			if err != nil {
				return fault.Wrap(err, "invalidate", k)
			}
		}
		rt.r.metrics.invalidated.Add(float64(len(c.keys)))
	}
	rt.inval.done(c)
	return nil
}

// mend repairs, with growing pauses, until it works, the instance is no longer the one, or the route ends.
func (rt *route) mend(p repair) {
	err := rt.mendOnce(p)
	if err == nil || rt.ctx.Err() != nil {
		return
	}
	rt.r.log.Warn("repair plugin instance", "mount_uuid", rt.uuid, "generation", p.in.generation(), "try", p.try+1, "cause", err)
	if p.what == resetup && p.try == 0 && rt.r.cfg.Broken != nil && !transient(err) {
		rt.r.group.Go(func() { rt.r.cfg.Broken(rt.uuid, err) })
	}
	pause := time.NewTimer(min(50*time.Millisecond<<min(p.try, 8), 5*time.Second))
	defer pause.Stop()
	select {
	case <-rt.ctx.Done():
	case <-pause.C:
		p.try++
		if cur := rt.run.Load(); cur != nil && cur.life == p.in.life && !cur.life.dead() {
			p.in = cur
			rt.repair(p)
		}
	}
}

func (rt *route) mendOnce(p repair) error {
	ctx, cancel := context.WithTimeout(rt.ctx, rt.r.cfg.Hold+rt.r.cfg.Inside+time.Second)
	defer cancel()
	if err := rt.lock(ctx); err != nil {
		return err
	}
	defer rt.unlock()
	cur := rt.run.Load()
	if cur != nil && cur.life == p.in.life && p.what == restamp {
		// Set up again in the same process meanwhile: perhaps before it had its new generation.
		p.in = cur
	}
	if cur != p.in || p.in.life.dead() || rt.r.role() != p.in.role() {
		// Somebody else's now: a switch's, a restart's, or a role change's.
		return nil
	}
	m := rt.r.cfg.State.View().Mount(rt.uuid)
	if m == nil {
		return nil
	}
	rt.r.metrics.repairs.Inc()
	if p.what == restamp {
		if !p.in.leader || m.GetEpochGeneration() == p.in.generation() && rt.unbroken(m, p.in) {
			return nil
		}
		if !p.in.store.owns() {
			return rt.renew(ctx, m, p.in, p.in.role())
		}
		return rt.restamp(ctx, m, p.in, p.in.role())
	}
	return rt.renew(ctx, m, p.in, p.in.role())
}
