package reload

import (
	"context"
	"errors"
	"slices"
	"time"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// quantum is how long a look at the state waits for more entries when they come by the thousand.
const quantum = 2 * time.Millisecond

// drainTries counts how often the gate was closed and opened again for one generation.
type drainTries struct {
	generation uint64
	n          int
	since      time.Time
}

// role is this node's role now. A follower's does not change with the term: its instances only read.
func (r *Reloads) role() Role {
	if ls := r.cfg.Replica.Leadership(); ls.Leader {
		return Role{Leader: true, Term: ls.Term}
	}
	return Role{}
}

// guard returns a context that ends when obsolete names a reason, looked at after every entry and role change. stop
// must be called, and waits for the watcher.
func (l *mountLoop) guard(obsolete func(View) error) (ctx context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(l.r.ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			changed, roles := l.r.cfg.State.Changed(), l.r.cfg.Replica.LeadershipChanged()
			if err := obsolete(l.r.cfg.State.View()); err != nil {
				cancel(err)
				return
			}
			select {
			case <-ctx.Done():
				return
			case <-roles:
			case <-changed:
				if !sleep(ctx, quantum) {
					return
				}
			}
		}
	}()
	return ctx, func() { cancel(nil); <-done }
}

// obsolete reports whether err came because the action was no longer wanted.
func obsolete(ctx context.Context) bool {
	cause := context.Cause(ctx)
	return slices.ContainsFunc([]error{errStopping, errSuperseded, errRole, errUnmounted}, func(why error) bool {
		return errors.Is(cause, why)
	})
}

// awaits reports whether a follower's switch to want must wait for the leader's TakeOver: only when the leader is meant
// to come to the same generation.
func (r *Reloads) awaits(v View, m *commandv1.Mount, want *commandv1.Wanted) bool {
	ls := r.cfg.Replica.Leadership()
	if ls.Leader {
		return false
	}
	if ls.LeaderID == "" || v.Node(ls.LeaderID) == nil {
		return m.GetWanted().GetGeneration() == want.GetGeneration()
	}
	return v.Wanted(m, ls.LeaderID).GetGeneration() == want.GetGeneration()
}

// bring switches the mount to want: with the spare when it fits, else with a process started now.
func (l *mountLoop) bring(v View, m *commandv1.Mount, want *commandv1.Wanted, role Role, restored uint64) time.Duration {
	stated, await := v.Wanted(m, l.r.self).GetGeneration(), l.r.awaits(v, m, want)
	ctx, stop := l.guard(func(v View) error {
		m := v.Mount(l.uuid)
		switch {
		case m == nil:
			return errUnmounted
		case v.Wanted(m, l.r.self).GetGeneration() != stated:
			return errSuperseded
		case l.r.role() != role, l.r.awaits(v, m, want) != await:
			return errRole
		}
		return nil
	})
	defer stop()

	rl := v.Reload(want.GetReloadId())
	keepOld := l.mayRefuse(rl) && l.run != nil && !l.down && !l.doubtful && l.run.wanted.GetGeneration() < want.GetGeneration()
	var steps []*commandv1.Step
	if !l.fits(want) {
		l.endSpare()
		depth := ""
		if keepOld {
			depth = l.depth(m, rl)
		}
		sp, started, err := l.launch(ctx, m, want.GetSpec(), depth)
		if err != nil {
			return l.failed(ctx, rl, want, inPhase(err, "start"), started, keepOld)
		}
		sp.reloadID, steps = want.GetReloadId(), started
		l.spare = sp
	}
	if l.spare.backend == nil {
		b, err := l.spare.proc.Backend(ctx)
		if err != nil {
			l.endSpare()
			return l.failed(ctx, rl, want, inPhase(err, "handshake"), steps, keepOld)
		}
		l.spare.backend = b
	}
	return l.swap(ctx, m, rl, SwitchPlan{
		Wanted: want, Backend: l.spare.backend, Role: role, Hold: l.hold(m), Force: l.force(rl, want),
		KeepOld: keepOld, AwaitTakeOver: await,
	}, steps, restored)
}

// fits reports whether the spare is the wanted process: prepared for the reload that committed it, and still alive.
func (l *mountLoop) fits(want *commandv1.Wanted) bool {
	return l.spare != nil && l.spare.reloadID == want.GetReloadId() && !ended(l.spare.proc) &&
		sameSpec(l.spare.spec, want.GetSpec())
}

func (l *mountLoop) hold(m *commandv1.Mount) time.Duration {
	if ms := m.GetConfig().GetHoldMs(); ms > 0 {
		return time.Duration(ms) * time.Millisecond
	}
	return l.r.cfg.Hold
}

// force answers how the switch ends requests in flight that outlive the hold: not at all before three quarters of the
// time that the reload has for it are over, so that what is left suffices to report.
func (l *mountLoop) force(rl *commandv1.Reload, want *commandv1.Wanted) string {
	if l.drain.generation != want.GetGeneration() {
		l.drain = drainTries{generation: want.GetGeneration(), since: time.Now()}
	}
	limit := l.r.cfg.DrainTimeout
	if rl != nil && !terminal(rl.GetPhase()) {
		limit = l.r.phaseLength(rl) * 3 / 4
	}
	if time.Since(l.drain.since) < limit {
		return ""
	}
	if f := rl.GetOptions().GetOnDrainTimeout(); f != "" {
		return f
	}
	return "cancel"
}

// swap runs the gated switch and takes note of what came of it.
func (l *mountLoop) swap(
	guarded context.Context, m *commandv1.Mount, rl *commandv1.Reload, plan SwitchPlan, steps []*commandv1.Step,
	restored uint64,
) time.Duration {
	limit := plan.Hold + l.r.cfg.SwitchTimeout
	if plan.AwaitTakeOver {
		limit += l.r.cfg.DrainTimeout
	}
	ctx, cancel := context.WithTimeout(guarded, limit)
	defer cancel()
	from := time.Now()
	done, err := l.r.cfg.Routes.Switch(ctx, m, plan)
	switch {
	case err == nil:
		l.switched(rl, plan, done, append(steps, done.Steps...), restored)
		return 0
	case tooShort(err) && ctx.Err() == nil:
		// Requests in flight outlived the hold. The gate is open again, the old instance goes on, and the new one has
		// not been set up: come back later, with growing pauses.
		l.drain.n++
		pause := min(100*time.Millisecond<<min(l.drain.n, 6), 5*time.Second)
		l.notBefore = time.Now().Add(pause)
		l.failing = plan.Wanted.GetGeneration()
		l.r.metrics.holds.WithLabelValues("too_short").Observe(time.Since(from).Seconds())
		l.log.Info("requests in flight outlived the hold", "reload_id", plan.Wanted.GetReloadId(), "generation",
			plan.Wanted.GetGeneration(), "hold", plan.Hold, "try", l.drain.n, "again_in", pause)
		return pause
	}
	l.doubtful = l.run != nil && !plan.KeepOld
	l.spent(plan.Backend, obsolete(guarded))
	return l.failed(guarded, rl, plan.Wanted, err, steps, plan.KeepOld)
}

// tooShort reports whether a switch was given up because requests in flight outlived the hold.
func tooShort(err error) bool {
	e, ok := errors.AsType[*fault.Error](err)
	return ok && e.Kind == fault.Deadline && (e.Op == "drain" || e.Op == "hold")
}

// spent takes back a backend that a switch has used up. A process that multiplexes serves the next attempt when the
// attempt ended for a reason that is not its own.
func (l *mountLoop) spent(b Backend, reusable bool) {
	l.cleanup(b)
	l.spare.backend = nil
	if !reusable || !l.spare.proc.Multiplexes() {
		l.endSpare()
	}
}

// switched takes note of a switch that worked, and begins to end the old process.
func (l *mountLoop) switched(rl *commandv1.Reload, plan SwitchPlan, done *Switched, steps []*commandv1.Step, restored uint64) {
	old, alive, sp, want := l.run, l.run != nil && !l.down, l.spare, plan.Wanted
	l.spare, l.down, l.doubtful, l.restored = nil, false, false, restored
	l.run = &instance{
		wanted: want, role: plan.Role, proc: sp.proc, backend: plan.Backend, started: sp.started, served: time.Now(),
	}
	l.failing, l.notBefore, l.since, l.drain = 0, time.Time{}, time.Time{}, drainTries{}
	to := facts(want.GetSpec(), want.GetGeneration(), sp.proc.PID())
	again := l.story != nil && l.story.generation == want.GetGeneration()
	if !again {
		from := &commandv1.ProcessFacts{}
		if old != nil {
			from = facts(old.wanted.GetSpec(), old.wanted.GetGeneration(), old.proc.PID())
		} else if t := targetOf(rl, l.uuid); t != nil {
			from = facts(t.GetFrom(), t.GetFromGeneration(), 0)
		}
		l.story = &story{
			generation: want.GetGeneration(), from: from, to: to, steps: steps, hold: done.HoldFor, traffic: done.Traffic,
		}
		l.back.reset()
		l.mu.Lock()
		l.pub.Restarts = 0
		l.mu.Unlock()
	} else {
		l.story.to = to
	}
	l.mu.Lock()
	l.pub.LastError = ""
	l.mu.Unlock()
	l.r.metrics.holds.WithLabelValues("switched").Observe(done.HoldFor.Seconds())
	l.log.Info("switched", "reload_id", want.GetReloadId(), "generation", want.GetGeneration(), "leader", plan.Role.Leader,
		"version", want.GetSpec().GetVersion(), "pid", sp.proc.PID(), "hold", done.HoldFor,
		"old_generation", l.story.from.GetGeneration(), "again", again)
	if old != nil {
		l.retire(old, alive)
	}
}

// failed takes note of a switch that did not work. A best-effort reload is refused and the old instance goes on, when the
// plugin is to blame; any other is tried again, with back-off, for the way is forward.
func (l *mountLoop) failed(
	ctx context.Context, rl *commandv1.Reload, want *commandv1.Wanted, err error, steps []*commandv1.Step, keepOld bool,
) time.Duration {
	if obsolete(ctx) {
		l.log.Info("switch given up", "reload_id", want.GetReloadId(), "generation", want.GetGeneration(),
			"why", context.Cause(ctx))
		return 0
	}
	phase := phaseOf(err, "switch")
	l.mu.Lock()
	l.pub.LastError = err.Error()
	l.mu.Unlock()
	l.r.metrics.failures.WithLabelValues(phase).Inc()
	if keepOld && (!passing(err) || phaseOf(err, "") != "") {
		l.log.Warn("reload refused, the old generation goes on", "reload_id", want.GetReloadId(),
			"generation", l.run.wanted.GetGeneration(), "phase", phase, "cause", err)
		l.refusal = l.refuse(rl, phase, err, steps)
		l.refused = want.GetGeneration()
		return 0
	}
	if l.since.IsZero() {
		l.since = time.Now()
	}
	pause := l.back.pause()
	l.failing, l.notBefore = want.GetGeneration(), time.Now().Add(pause)
	l.log.Warn("switch did not work, will be tried again", "reload_id", want.GetReloadId(),
		"generation", want.GetGeneration(), "phase", phase, "cause", err, "after", pause)
	if passing(err) {
		return pause
	}
	l.putFailed(rl, want, phase, err, steps)
	if l.run != nil && !l.down && !l.doubtful && time.Since(l.since) >= l.r.cfg.Grace {
		// Committed means that the old generation must not go on for ever. What fails outside the gate may pass, so it
		// went on for a while; now the mount answers 503 until the new one works.
		l.doubtful = true
		l.r.cfg.Routes.Fail(l.uuid, fault.As(fault.Unavailable, err, "switch", l.mount.GetPath()))
	}
	return pause
}

// passing reports whether an error says nothing about the plugin: another leader, another epoch, no lease, no answer in
// time from anybody but the plugin, which names the phase that it was in.
func passing(err error) bool {
	switch fault.KindOf(err) {
	case fault.NotLeader, fault.Stale, fault.Fenced, fault.Canceled, fault.Exhausted:
		return true
	case fault.Deadline, fault.OutcomeUnknown:
		return phaseOf(err, "") == ""
	default:
		return false
	}
}

// assume tells the running process its new role. Where it cannot follow, a new process takes its place.
func (l *mountLoop) assume(role Role) time.Duration {
	stated := l.run.wanted.GetGeneration()
	guarded, stop := l.guard(func(v View) error {
		m := v.Mount(l.uuid)
		switch {
		case m == nil:
			return errUnmounted
		case v.Wanted(m, l.r.self).GetGeneration() > stated && v.Wanted(m, l.r.self).GetGeneration() != l.refused:
			return errSuperseded
		case l.r.role() != role:
			return errRole
		}
		return nil
	})
	defer stop()
	ctx, cancel := context.WithTimeout(guarded, l.r.cfg.SwitchTimeout)
	defer cancel()
	err := l.r.cfg.Routes.Assume(ctx, l.uuid, role)
	if err == nil {
		l.run.role = role
		l.log.Info("role assumed", "generation", stated, "leader", role.Leader, "term", role.Term)
		return 0
	}
	// It may have been told half of it: whatever the role is next, it must be told again.
	l.run.role = Role{Term: ^uint64(0)}
	if obsolete(guarded) {
		return 0
	}
	pause := l.back.pause()
	l.notBefore = time.Now().Add(pause)
	if passing(err) {
		l.log.Info("role not assumed yet", "leader", role.Leader, "term", role.Term, "cause", err, "again_in", pause)
		return pause
	}
	l.doubtful, l.notBefore = true, time.Time{}
	l.log.Warn("plugin process cannot follow the role, a new one takes its place", "leader", role.Leader,
		"term", role.Term, "cause", err)
	return 0
}
