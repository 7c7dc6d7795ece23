package router

import (
	"context"
	"time"

	"rollcall/node/failpoint"
	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
	peerv1 "rollcall/proto/peer/v1"
)

const (
	// cancelGrace is how long canceled requests may take to leave the instance.
	cancelGrace = time.Second
	// heldGrace is how long a switch waits, after it has opened the gate, for the requests that it held, so that its
	// record tells of them.
	heldGrace = 250 * time.Millisecond
)

var (
	errForced = fault.Text(fault.OutcomeUnknown,
		"the request outlived the time that a reload gives to requests in flight, and was canceled: it may or may not have taken effect")
	errRoleChange = fault.Text(fault.OutcomeUnknown,
		"the leader changed while the request was in flight: it may or may not have taken effect")
)

// SwitchPlan is what Switch is to do.
type SwitchPlan struct {
	// Wanted is the generation and spec that Backend serves.
	Wanted *commandv1.Wanted
	// Backend has not been set up, or only for a trial.
	Backend Backend
	Role    Role
	// Hold bounds how long requests wait while those in flight finish; 0 takes the mount's, or Config.Hold.
	Hold time.Duration
	// Force is what becomes of requests that outlive Hold: "" opens the gate again and answers fault.Deadline; "cancel"
	// cancels them; "fence" answers 503 to new ones until they have ended.
	Force string
	// KeepOld lets the old instance go on when the new one fails inside the gate; otherwise requests fail fast until a
	// later switch works.
	KeepOld bool
	// AwaitTakeOver makes a follower forward reads until the leader's TakeOver of Wanted.generation is applied here.
	AwaitTakeOver bool
}

// Switched is what a switch did.
type Switched struct {
	// Old is the backend that was behind the gate; nobody uses it any more. Nil when there was none, or when it is the
	// new one.
	Old Backend
	// HoldFor is how long the gate was closed; 0 on a follower that forwarded meanwhile.
	HoldFor time.Duration
	Steps   []*commandv1.Step
	Traffic *commandv1.Traffic
}

// Trial sets b up on a discarded overlay of the mount's storage, as deep as depth says ("handshake", "setup" or
// "initialize", the default), and checks its type. The op of a refusal names the phase: "setup", "type", "initialize".
// The mount need not be in the state yet. The caller cleans b up.
func (r *Router) Trial(ctx context.Context, m *commandv1.Mount, spec *commandv1.Spec, b Backend, depth string,
) ([]*commandv1.Step, error) {
	from := time.Now()
	if depth == "handshake" {
		return []*commandv1.Step{step("trial", from)}, nil
	}
	frozen := r.cfg.State.View()
	st := newStore(m.GetUuid(), trying, func() View { return frozen })
	defer st.retire()
	in := newInstance(b, &commandv1.Wanted{Spec: spec}, Role{Leader: true}, st, newLife())
	err := r.setUp(ctx, m, in, depth != "setup")
	return []*commandv1.Step{step("trial", from)}, err
}

// Switch puts a backend behind the mount's gate: DESIGN section 6, steps 2 to 5. It returns when the old one has no
// references left. fault.Deadline without an ended ctx means that requests in flight outlived the hold: nothing has
// changed, and the new backend has not been touched. After any other error the new backend is spent.
func (r *Router) Switch(ctx context.Context, m *commandv1.Mount, plan SwitchPlan) (*Switched, error) {
	rt := r.route(m.GetUuid())
	if err := rt.lock(ctx); err != nil {
		return nil, err
	}
	defer rt.unlock()
	rt.work()
	if plan.Hold <= 0 {
		plan.Hold = r.hold(m)
	}
	s := &switching{rt: rt, m: m, plan: plan, old: rt.run.Load(), around: rt.meter.begin()}
	s.next = newInstance(plan.Backend, plan.Wanted, plan.Role, r.storeFor(rt, plan.Role), newLife())
	err := s.do(ctx)
	if err != nil {
		s.next.life.end(err)
		s.next.store.retire()
		rt.meter.end(s.around, 0)
		return nil, err
	}
	out := &Switched{HoldFor: s.held, Steps: s.steps}
	if s.old != nil {
		out.Old = s.old.backend
	}
	s.around.settle(ctx, heldGrace)
	out.Traffic = s.around.record()
	return out, nil
}

// hold is how long the mount's gate may be closed for requests in flight.
func (r *Router) hold(m *commandv1.Mount) time.Duration {
	if ms := m.GetConfig().GetHoldMs(); ms > 0 {
		return time.Duration(ms) * time.Millisecond
	}
	return r.cfg.Hold
}

// switching is one switch under way.
type switching struct {
	rt     *route
	m      *commandv1.Mount
	plan   SwitchPlan
	old    *instance
	next   *instance
	around *around

	closed time.Time
	held   time.Duration
	steps  []*commandv1.Step
}

func (s *switching) do(ctx context.Context) error {
	rt, r := s.rt, s.rt.r
	if s.plan.AwaitTakeOver && !s.plan.Role.Leader {
		rt.gate.set(away, nil, nil, nil)
		from := time.Now()
		if err := r.awaitTakeOver(ctx, rt.uuid, s.plan.Wanted.GetGeneration()); err != nil {
			if s.plan.KeepOld {
				rt.reopen(s.old)
			}
			return err
		}
		s.steps = append(s.steps, step("await take-over", from))
	} else if !r.cfg.noGate {
		rt.gate.set(held, nil, nil, nil)
		s.closed = time.Now()
	}
	if err := failpoint.Hit(failpoint.ReloadGateClosed, r.cfg.NodeID); err != nil {
		s.back(ctx, err)
		return err
	}
	if err := s.drain(ctx); err != nil {
		return err
	}
	inside, cancel := context.WithTimeout(ctx, r.cfg.Inside)
	defer cancel()
	if err := s.quiet(inside); err != nil {
		return err
	}
	from := time.Now()
	if err := rt.establish(inside, s.m, s.next); err != nil {
		s.back(ctx, err)
		return err
	}
	s.steps = append(s.steps, step("switch", from))
	s.open()
	s.settleForwards(ctx)
	return nil
}

// drain waits for the requests in flight on the old instance.
func (s *switching) drain(ctx context.Context) error {
	if s.old == nil || s.rt.r.cfg.noGate {
		return nil
	}
	n, limit := s.old.inFlight(), s.plan.Hold
	if s.closed.IsZero() {
		// Requests go to the leader meanwhile: nobody is held.
		limit = max(limit, s.rt.r.cfg.Inside)
	}
	if s.old.refs.drain(ctx, limit) {
		s.around.drained.Add(uint64(n))
		return nil
	}
	if ctx.Err() != nil {
		s.undo()
		return fault.Wrap(context.Cause(ctx), "drain", s.m.GetPath())
	}
	switch s.plan.Force {
	case "cancel":
		s.around.canceled.Add(uint64(s.old.cancelAll(errForced)))
		if s.old.refs.drain(ctx, cancelGrace) {
			s.around.drained.Add(uint64(n))
			return nil
		}
		fallthrough
	case "fence":
		s.rt.gate.set(failing, fault.Text(fault.Unavailable,
			"the mount waits for requests in flight to end before it can go on; try again"), nil, nil)
		if s.old.refs.drain(ctx, time.Hour) {
			s.around.drained.Add(uint64(n))
			return nil
		}
		if s.plan.KeepOld {
			// Nobody comes back to this switch: the old instance goes on, and must not stay behind a closed gate.
			s.undo()
		}
		if err := context.Cause(ctx); err != nil {
			return fault.Wrap(err, "drain", s.m.GetPath())
		}
		return fault.New(fault.Internal, "drain", s.m.GetPath(), "requests in flight did not end")
	}
	s.undo()
	return fault.New(fault.Deadline, "drain", s.m.GetPath(),
		"of %d requests in flight, some outlived the hold of %v; the old instance goes on", n, limit)
}

// undo lets the old instance go on, untouched. Where reads were forwarded they still are: the leader has moved on.
func (s *switching) undo() {
	if s.plan.AwaitTakeOver && !s.plan.Role.Leader && !s.plan.KeepOld {
		return
	}
	s.rt.reopen(s.old)
}

// quiet makes what the old one's own goroutines write from here on wait for what becomes of this.
func (s *switching) quiet(ctx context.Context) error {
	if s.old == nil || s.rt.r.cfg.noGate {
		return nil
	}
	err := s.old.store.pause(ctx)
	if err != nil {
		s.undo()
	}
	return err
}

// open puts the new instance behind the gate. From here on the old one answers nothing, and writes nothing.
func (s *switching) open() {
	rt := s.rt
	if s.old != nil {
		s.old.store.retire()
	}
	rt.meter.end(s.around, s.next.generation())
	rt.put(s.next)
	if !s.closed.IsZero() {
		s.held = time.Since(s.closed)
		s.steps = append(s.steps, step("hold", s.closed))
		rt.r.metrics.hold.Observe(s.held.Seconds())
	}
	rt.r.metrics.switches.Inc()
}

// put makes an instance the route's, and opens the gate to it.
func (rt *route) put(in *instance) {
	rt.paths.Store(in.paths)
	rt.run.Store(in)
	rt.reopen(in)
	if in.life.dead() {
		rt.reopen(in)
	}
}

// settleForwards waits, bounded, for the answers that were asked of the leader before this switch, and promises that
// nothing older than what the leader took over with is released here from now on.
func (s *switching) settleForwards(ctx context.Context) {
	before := s.rt.forwards.Swap(new(newRefs()))
	before.drain(ctx, s.plan.Hold)
	if !s.plan.Role.Leader && s.plan.AwaitTakeOver {
		m := s.rt.r.cfg.State.View().Mount(s.rt.uuid)
		s.rt.floor.Store(m.GetEpochGeneration())
	}
}

// back decides what the gate does after the new instance has failed inside it.
func (s *switching) back(ctx context.Context, err error) {
	rt := s.rt
	switch {
	case s.plan.KeepOld && s.old != nil && !s.old.life.dead():
		s.old.store.resume()
		rt.inval.follow(!s.old.leader)
		rt.reopen(s.old)
		rt.distrust(s.old)
	case ctx.Err() != nil || transient(err):
		s.end(err)
		rt.gate.set(away, err, nil, nil)
	default:
		s.end(err)
		rt.gate.set(failing, fault.New(fault.Unavailable, "", "", "the plugin could not be switched, and is tried again: %w", err),
			nil, nil)
	}
}

// end makes sure that nothing brings the old instance back: what is committed goes forward only.
func (s *switching) end(why error) {
	if s.old != nil {
		s.old.store.retire()
		s.old.life.end(why)
	}
}

// distrust has the old instance set up again after a failed switch where it may have missed something: a follower what
// changed meanwhile, a leader its epoch.
func (rt *route) distrust(in *instance) {
	m := rt.r.cfg.State.View().Mount(rt.uuid)
	in.store.mu.Lock()
	epoch := in.store.epoch
	in.store.mu.Unlock()
	if !in.leader || m.GetEpoch() != epoch {
		rt.repair(repair{in: in, what: resetup})
	}
}

// transient reports whether an error says nothing about the plugin: the role or the state has moved on, or the log was
// slow. What the plugin gets wrong is fault.Refused.
func transient(err error) bool {
	switch fault.KindOf(err) {
	case fault.NotLeader, fault.Stale, fault.Fenced, fault.Canceled, fault.Exhausted, fault.Unavailable, fault.Deadline,
		fault.OutcomeUnknown:
		return true
	default:
		return false
	}
}

// awaitTakeOver waits until the leader's instance writes the mount under generation, or a later one.
func (r *Router) awaitTakeOver(ctx context.Context, uuid string, generation uint64) error {
	for {
		changed := r.cfg.State.Changed()
		m := r.cfg.State.View().Mount(uuid)
		switch {
		case m == nil:
			return fault.Text(fault.NotFound, "the mount is gone")
		case m.GetEpochGeneration() >= generation:
			return failpoint.Hit(failpoint.TakeOverSeen, r.cfg.NodeID)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fault.Wrap(context.Cause(ctx), "wait for the leader to take over", m.GetPath())
		}
	}
}

func step(name string, from time.Time) *commandv1.Step {
	return &commandv1.Step{Name: name, AtUs: from.UnixMicro(), TookUs: time.Since(from).Microseconds()}
}

// Traffic is what this node measured of the mount since its running generation was ready; nil when nothing ever ran.
// Any goroutine.
func (r *Router) Traffic(mountUUID string) *peerv1.MountTraffic {
	rt := r.lookup(mountUUID)
	if rt == nil || rt.run.Load() == nil {
		return nil
	}
	return rt.meter.sample(mountUUID)
}

// LastSwitch is what was measured around the mount's last switch here, with what came after it until now; nil when there
// was none. Any goroutine.
func (r *Router) LastSwitch(mountUUID string) *commandv1.Traffic {
	rt := r.lookup(mountUUID)
	if rt == nil {
		return nil
	}
	return rt.meter.lastSwitch()
}
