package replica

import (
	"context"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"rollcall/node/fault"
)

// Role is what this node is in the cluster at one moment.
type Role struct {
	// Leader is true once this node leads and has applied everything that earlier leaders committed.
	Leader bool
	// Term is the current term; with Leader, the term of this leadership.
	Term uint64
	// LeaderID and LeaderAddress name the leader as far as it is known here; empty when it is not.
	LeaderID      string
	LeaderAddress string
	// Since is when this node took its office, by its own wall clock: for people. Zero without Leader.
	Since time.Time
}

// roles holds the current Role and tells of changes.
type roles struct {
	mu      sync.Mutex
	current Role
	changed chan struct{}
	wake    chan struct{}
}

func (s *roles) init() {
	s.changed = make(chan struct{})
	s.wake = make(chan struct{}, 1)
}

func (s *roles) get() (Role, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.current, s.changed
}

func (s *roles) set(role Role) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if role.Leader {
		if role.Since = time.Now(); s.current.Leader && s.current.Term == role.Term {
			role.Since = s.current.Since
		}
	}
	if role == s.current {
		return
	}
	s.current = role
	close(s.changed)
	s.changed = make(chan struct{})
}

// poke makes watchRole look again.
func (s *roles) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Role returns what this node is now.
func (r *Replica) Role() Role {
	role, _ := r.roles.get()
	return role
}

// RoleChanged returns a channel that is closed at the next change of Role. Take it before Role.
func (r *Replica) RoleChanged() <-chan struct{} {
	_, changed := r.roles.get()
	return changed
}

// LeaderContext registers work for the leader: run is started on a goroutine of its own each time this node leads, after
// the term's barrier. Its ctx ends with the leadership, with a fault.NotLeader cause. A run is never started again
// before the last one has returned, and Stop waits for it. Call it before Start.
func (r *Replica) LeaderContext(run func(ctx context.Context, term uint64)) {
	if r.started.Load() {
		panic("replica: LeaderContext after Start") // a defect of the wiring: it would never run
	}
	r.runs = append(r.runs, run)
}

// leads reports whether Raft leads here now, and in which term. A leader leaves that state before its term changes, so
// equal terms around the state are the term of that leadership.
func (r *Replica) leads() (uint64, bool) {
	n := r.raft.Load()
	if n == nil || r.stream.isShut() {
		return 0, false
	}
	for {
		before := n.CurrentTerm()
		state := n.State()
		if n.CurrentTerm() == before {
			return before, state == raft.Leader
		}
	}
}

// watchRole follows Raft's state and runs each leadership. It looks at the level, so a missed event costs nothing.
func (r *Replica) watchRole() {
	n := r.raft.Load()
	events := make(chan raft.Observation, 1)
	observer := raft.NewObserver(events, false, func(o *raft.Observation) bool {
		switch o.Data.(type) {
		case raft.RaftState, raft.LeaderObservation:
			return true
		default:
			return false
		}
	})
	n.RegisterObserver(observer)
	defer n.DeregisterObserver(observer)
	tick := time.NewTicker(r.cfg.heartbeat())
	defer tick.Stop()

	var current *leadership
	var previous <-chan struct{} // closed when the last leadership's work has ended
	for {
		term, leading := r.leads()
		if current != nil && (!leading || term != current.term) {
			previous = current.end()
			current = nil
			r.led.Store(nil)
		}
		if leading && current == nil && r.ctx.Err() == nil {
			current = r.newLeadership(term, previous)
		}
		r.publishRole(current, term)
		select {
		case <-r.ctx.Done():
			if current != nil {
				previous = current.end()
			}
			r.led.Store(nil)
			r.roles.set(Role{Term: term})
			if previous != nil {
				<-previous
			}
			return
		case <-events:
		case <-r.roles.wake:
		case <-tick.C:
		}
	}
}

func (r *Replica) publishRole(current *leadership, term uint64) {
	role := Role{Term: term}
	address, id := r.raft.Load().LeaderWithID()
	role.LeaderID, role.LeaderAddress = string(id), string(address)
	if role.Term == 0 {
		role.Term = r.raft.Load().CurrentTerm()
	}
	if current != nil && current.isReady() {
		role.Leader, role.LeaderID, role.LeaderAddress = true, r.NodeID(), r.cfg.ClusterAddress
	} else if role.LeaderID == r.NodeID() {
		role.LeaderID, role.LeaderAddress = "", "" // not yet ready, or stuck: not a leader to go to
	}
	r.roles.set(role)
	if role.Leader {
		current.publish.Do(func() { close(current.published) })
	}
}

// leadership is one term in which this node leads.
type leadership struct {
	term    uint64
	cancel  context.CancelCauseFunc
	publish sync.Once
	// ready: the barrier is applied. published: Role says so. done: all work has returned.
	ready, published, done chan struct{}
}

func (l *leadership) isReady() bool {
	select {
	case <-l.ready:
		return true
	default:
		return false
	}
}

// end ends the leadership's context and returns a channel that is closed when its work has returned.
func (l *leadership) end() <-chan struct{} {
	l.cancel(fault.New(fault.NotLeader, "", "", "the leadership of term %d is over", l.term))
	return l.done
}

func (r *Replica) newLeadership(term uint64, previous <-chan struct{}) *leadership {
	ctx, cancel := context.WithCancelCause(r.ctx)
	l := &leadership{term: term, cancel: cancel, ready: make(chan struct{}), published: make(chan struct{}), done: make(chan struct{})}
	r.log.Info("leading", "term", term)
	go func() { // waited for through done
		defer close(l.done)
		defer cancel(nil)
		if previous != nil { // last to run, first to be waited for: done means that all earlier work has ended too
			defer func() { <-previous }()
		}
		if !r.catchUp(ctx, term) {
			return
		}
		mine := newLed(term, r.cfg.Now())
		r.led.Store(mine)
		if ctx.Err() != nil { // ended meanwhile, and watchRole may have cleared led before we set it
			r.led.CompareAndSwap(mine, nil)
			return
		}
		close(l.ready)
		r.roles.poke()
		select {
		case <-l.published:
		case <-ctx.Done():
			return
		}
		if previous != nil {
			<-previous
		}
		var wg sync.WaitGroup
		for _, run := range append([]func(context.Context, uint64){r.leadMembers, r.leadClock, r.leadRestored}, r.runs...) {
			wg.Go(func() { run(ctx, term) })
		}
		wg.Wait()
		<-ctx.Done()
	}()
	return l
}

// catchUp applies a barrier in the term: afterwards this node's state holds everything that was ever acknowledged.
func (r *Replica) catchUp(ctx context.Context, term uint64) bool {
	for ctx.Err() == nil {
		err := r.await(ctx, r.raft.Load().Barrier(r.cfg.rpcTimeout()))
		if now, leading := r.leads(); !leading || now != term {
			return false
		}
		if err == nil {
			return true
		}
		r.log.Debug("the term's barrier is not applied yet", "term", term, "error", err)
		pause(ctx, r.cfg.heartbeat()/10)
	}
	return false
}

// leadClock lets the log's clock tick while something can expire.
func (r *Replica) leadClock(ctx context.Context, term uint64) {
	const every = time.Second
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if r.stamps.idle(term, r.cfg.Now()) < every/2 || !r.cfg.CanExpire(r.fsm.View()) {
			continue
		}
		bounded, cancel := context.WithTimeout(ctx, r.cfg.rpcTimeout())
		if _, err := r.ProposeAsLeader(bounded, term, tickCommand()); err != nil && ctx.Err() == nil {
			r.log.Debug("tick", "error", err)
		}
		cancel()
	}
}

// pause waits for d or ctx.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
