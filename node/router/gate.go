package router

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"rollcall/node/fault"
)

// mode is what a gate does with a request that finds no open lane.
type mode uint8

const (
	// held: requests wait, bounded in number and in time.
	held mode = iota
	// away: reads go to the leader; what must run here waits as with held.
	away
	// failing: requests fail at once with the gate's cause.
	failing
	// gone: the mount's route has ended for good.
	gone
	// open: at least the lane for reads is set.
	open
)

// Lanes of a gate. Reads may run on any ready instance, writes only on the one that took the mount over as leader.
const (
	readLane = iota
	writeLane
	lanes
)

// gate stands before a mount's instance. The way through an open gate takes no lock: load the lane, count a reference,
// look at the lane again. Closing empties the lanes and then waits for the references, so whoever saw the lane twice is
// waited for, and whoever saw it once turns back (PLUGINHOST section 4, "refcount + gate").
type gate struct {
	lane [lanes]atomic.Pointer[instance]

	maxWaiting int

	mu      sync.Mutex
	mode    mode
	why     error
	changed chan struct{}
	waiting int
}

func newGate(maxWaiting int) *gate {
	return &gate{maxWaiting: maxWaiting, changed: make(chan struct{})}
}

// set moves the gate to a mode; the lanes hold reads and writes, nil for none. Every waiter looks again.
func (g *gate) set(to mode, why error, reads, writes *instance) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.mode == gone {
		return
	}
	g.mode, g.why = to, why
	g.lane[readLane].Store(reads)
	g.lane[writeLane].Store(writes)
	close(g.changed)
	g.changed = make(chan struct{})
}

// state answers the mode, a channel that is closed when it or its cause changes, and the cause.
func (g *gate) state() (mode, <-chan struct{}, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.mode, g.changed, g.why
}

// try takes a reference on the lane's instance, or returns nil when the lane is empty.
func (g *gate) try(lane int) *instance {
	p := &g.lane[lane]
	for {
		in := p.Load()
		if in == nil {
			return nil
		}
		in.refs.Add(1)
		if p.Load() == in {
			return in
		}
		in.release()
	}
}

// errElsewhere says that a request need not wait here: the leader serves it.
var errElsewhere = fault.Text(fault.NotLeader, "the mount is served by the leader for now")

// wish is what a request wants of a gate.
type wish struct {
	lane int
	// limit is how long it will wait.
	limit time.Duration
	// not is an instance that it does not want: the one that died under it.
	not *instance
	// elsewhere lets it give up, with errElsewhere, for a better place. Looked at whenever the gate or roles change.
	elsewhere func(mode) bool
	roles     func() <-chan struct{}
}

// enter takes a reference on the lane's instance, waiting at a closed gate. waited is how long; 0 when it did not.
func (g *gate) enter(ctx context.Context, w wish) (in *instance, waited time.Duration, err error) {
	if in = g.try(w.lane); in != nil && in != w.not {
		return in, 0, nil
	}
	if in != nil {
		in.release()
	}
	return g.wait(ctx, w)
}

func (g *gate) wait(ctx context.Context, w wish) (*instance, time.Duration, error) {
	from := time.Now()
	timer := time.NewTimer(w.limit)
	defer timer.Stop()
	counted := false
	var waited time.Duration
	defer func() {
		if counted {
			g.mu.Lock()
			g.waiting--
			g.mu.Unlock()
		}
	}()
	for {
		var roles <-chan struct{}
		if w.roles != nil {
			roles = w.roles()
		}
		g.mu.Lock()
		m, why, changed := g.mode, g.why, g.changed
		in := g.try(w.lane)
		full := !counted && in == nil && g.waiting >= g.maxWaiting
		if in == nil && !counted && !full {
			g.waiting++
			counted = true
		}
		g.mu.Unlock()
		if in != nil && in != w.not {
			return in, waited, nil
		}
		if in != nil {
			in.release()
		}
		switch {
		case m == gone:
			return nil, waited, fault.Text(fault.Unavailable, "the mount is being removed from this node")
		case w.elsewhere != nil && w.elsewhere(m):
			return nil, waited, errElsewhere
		case m == failing:
			return nil, waited, fault.As(fault.Unavailable, why, "", "")
		case full:
			return nil, 0, fault.Text(fault.Unavailable, "%d requests already wait for this mount; try again", g.maxWaiting)
		}
		select {
		case <-changed:
			waited = time.Since(from)
		case <-roles:
			waited = time.Since(from)
		case <-timer.C:
			waited = time.Since(from)
			if why != nil {
				return nil, waited, fault.New(fault.Unavailable, "", "", "the mount's plugin is not back yet: %w", why)
			}
			return nil, waited, fault.Text(fault.Unavailable, "the mount's plugin is not ready on this node; try again")
		case <-ctx.Done():
			waited = time.Since(from)
			// Nothing has run: only a client that has gone away is told otherwise.
			kind := fault.Unavailable
			if fault.KindOf(ctx.Err()) == fault.Canceled {
				kind = fault.Canceled
			}
			return nil, waited, fault.As(kind, ctx.Err(), "wait for", "the mount's plugin")
		}
	}
}

// refs counts who uses an instance, and tells the one that waits for nobody.
type refs struct {
	n atomic.Int64
	// draining is set while somebody waits in drain; idle wakes it.
	draining atomic.Bool
	idle     chan struct{}
}

func newRefs() refs { return refs{idle: make(chan struct{}, 1)} }

// Add counts references; the last one to go wakes a drain.
func (r *refs) Add(d int64) {
	if r.n.Add(d) == 0 && d < 0 && r.draining.Load() {
		select {
		case r.idle <- struct{}{}:
		default:
		}
	}
}

// drain waits until nobody holds a reference. The lanes that lead to the instance must be empty before. One caller at a
// time. It answers whether it came to that within limit; ctx's end counts as not.
func (r *refs) drain(ctx context.Context, limit time.Duration) bool {
	r.draining.Store(true)
	defer r.draining.Store(false)
	if r.n.Load() == 0 {
		return true
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for {
		select {
		case <-r.idle:
		case <-timer.C:
			return r.n.Load() == 0
		case <-ctx.Done():
			return r.n.Load() == 0
		}
		if r.n.Load() == 0 {
			return true
		}
	}
}
