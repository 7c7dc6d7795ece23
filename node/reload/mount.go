package reload

import (
	"errors"
	"log/slog"
	"sync"
	"time"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// safeAfter is how long an old process may take to end before the node reports, in an entry of its own, that it can no
// longer answer. Most end sooner, and then one report says it all.
const safeAfter = 150 * time.Millisecond

// instance is a process behind the mount's route.
type instance struct {
	wanted  *commandv1.Wanted
	role    Role
	proc    Process
	backend Backend
	started time.Time
	// served is when it came behind the gate.
	served time.Time
}

// spare is a process that stands ready to be switched to.
type spare struct {
	// reloadID is the reload that it was prepared for; empty when it was started for what is wanted already.
	reloadID string
	spec     *commandv1.Spec
	proc     Process
	// backend is set when one was made and has not been set up: after a hold that was too short.
	backend Backend
	started time.Time
}

// story is what the node tells of the running generation's switch.
type story struct {
	generation uint64
	from, to   *commandv1.ProcessFacts
	steps      []*commandv1.Step
	hold       time.Duration
	traffic    *commandv1.Traffic
}

// mountLoop is the reconciler of one mount: one goroutine, and the only one that touches the mount's processes and its
// route. Fields below the line belong to that goroutine.
type mountLoop struct {
	r     *Reloads
	uuid  string
	log   *slog.Logger
	wakes chan struct{}
	jobs  chan *trialJob

	mu  sync.Mutex
	pub MountStatus
	// ----
	mount    *commandv1.Mount
	run      *instance
	down     bool
	doubtful bool
	spare    *spare
	// retired is closed when the process before the running one has ended; nil when none is ending.
	retired     chan struct{}
	retireSteps []*commandv1.Step
	retireFrom  time.Time

	tried string
	// refused is the generation that this node has refused, and refusal what it says of that until it is excused.
	refused   uint64
	refusal   *commandv1.MountReport
	story     *story
	restored  uint64
	back      backoff
	notBefore time.Time
	// failing is the wanted generation of the failures that back counts, and since is when the first of them was.
	failing uint64
	since   time.Time
	drain   drainTries
}

func newMountLoop(r *Reloads, m *commandv1.Mount) *mountLoop {
	return &mountLoop{
		r: r, uuid: m.GetUuid(), log: r.log.With("mount", m.GetPath(), "mount_uuid", m.GetUuid(), "node", r.self),
		wakes: make(chan struct{}, 1), jobs: make(chan *trialJob),
		pub:      MountStatus{MountUUID: m.GetUuid(), State: StateStarting},
		back:     backoff{min: r.cfg.BackoffMin, max: r.cfg.BackoffMax},
		restored: r.restored.Load(),
	}
}

// wakeUp makes the loop look again. It never blocks.
func (l *mountLoop) wakeUp() {
	select {
	case l.wakes <- struct{}{}:
	default:
	}
}

// loop runs until the mount is gone or the node stops.
func (l *mountLoop) loop() {
	defer l.end()
	for {
		again, gone := l.step()
		if gone || l.r.ctx.Err() != nil {
			return
		}
		timer := time.NewTimer(again)
		select {
		case <-l.r.ctx.Done():
		case <-l.wakes:
		case <-timer.C:
		case <-l.runDone():
		case <-l.spareDone():
		case <-l.retired:
			l.hasRetired()
		case j := <-l.jobs:
			j.answer(l.try(j))
		}
		timer.Stop()
	}
}

func (l *mountLoop) runDone() <-chan struct{} {
	if l.run == nil || l.down {
		return nil
	}
	return l.run.proc.Done()
}

func (l *mountLoop) spareDone() <-chan struct{} {
	if l.spare == nil {
		return nil
	}
	return l.spare.proc.Done()
}

// step looks at the state and does at most one thing. It answers when to look again, and whether the mount is gone.
func (l *mountLoop) step() (again time.Duration, gone bool) {
	v := l.r.cfg.State.View()
	m := v.Mount(l.uuid)
	if m == nil {
		return 0, true
	}
	l.mount = m
	restored := l.r.restored.Load()
	want := v.Wanted(m, l.r.self)
	active := v.ActiveReload(l.uuid)
	role := l.r.role()
	l.noticeDeaths(active)
	l.dropStaleSpare(active, want)
	if l.failing != 0 && want.GetGeneration() != l.failing {
		l.failing, l.notBefore = 0, time.Time{}
		l.back.reset()
	}

	a := decide(l.situation(want, role, active, restored))
	if wait := time.Until(l.notBefore); wait > 0 && (a == bring || a == revive || a == assume) {
		a, again = nothing, wait
	}
	switch a {
	case relabel:
		l.relabel(want)
	case bring, revive:
		target := want
		if a == revive {
			target = l.revived(want)
		}
		again = l.bring(v, m, target, role, restored)
	case assume:
		again = l.assume(role)
	case prepare:
		l.prepare(m, active)
	case await, nothing:
		if again == 0 {
			again = l.r.cfg.Resync
		}
	}
	if wait := l.tell(l.r.cfg.State.View()); wait > 0 && wait < again {
		again = wait
	}
	l.publish(want)
	return again, false
}

// revived is what a dead process is started as: what is wanted, unless this node refused that or runs a higher one.
func (l *mountLoop) revived(want *commandv1.Wanted) *commandv1.Wanted {
	if want.GetGeneration() == l.refused || want.GetGeneration() < l.run.wanted.GetGeneration() {
		return l.run.wanted
	}
	return want
}

func (l *mountLoop) situation(want *commandv1.Wanted, role Role, active *commandv1.Reload, restored uint64) situation {
	s := situation{
		wanted: want, role: role, doubtful: l.doubtful, restored: restored != l.restored, refused: l.refused,
		retiring: l.retired != nil, spare: l.spare != nil, asked: l.asked(active),
	}
	if l.run != nil {
		s.running, s.runningRole, s.alive = l.run.wanted, l.run.role, !l.down
	}
	return s
}

// asked reports whether a reload asks for this node's vote on this mount and has not had it.
func (l *mountLoop) asked(active *commandv1.Reload) bool {
	if active == nil || active.GetPhase() != commandv1.Phase_PHASE_PREPARING || l.tried == active.GetId() {
		return false
	}
	p := participant(active, l.r.self)
	if p == nil || p.GetIncarnation() != l.r.cfg.Replica.Incarnation() || p.GetWave() != active.GetWave() || !votes(p) {
		return false
	}
	t, o := targetOf(active, l.uuid), outcome(p, l.uuid)
	return t != nil && !t.GetUnmounted() && o.GetVerdict() == commandv1.Verdict_VERDICT_UNSPECIFIED && !o.GetPrepared()
}

// noticeDeaths takes note of processes that have ended by themselves.
func (l *mountLoop) noticeDeaths(active *commandv1.Reload) {
	if l.run != nil && !l.down && ended(l.run.proc) {
		why := deathOf(l.run.proc)
		l.down = true
		l.r.cfg.Routes.Suspend(l.uuid, why)
		if time.Since(l.run.served) >= l.r.cfg.BackoffReset {
			l.back.reset()
		}
		pause := l.back.pause()
		l.notBefore = time.Now().Add(pause)
		l.failing = l.run.wanted.GetGeneration()
		l.r.metrics.crashes.Inc()
		l.mu.Lock()
		l.pub.Restarts++
		l.pub.LastError = why.Error()
		l.mu.Unlock()
		l.log.Warn("plugin process ended, will be started again", "generation", l.run.wanted.GetGeneration(),
			"pid", l.run.proc.PID(), "cause", why, "after", pause)
	}
	if l.spare != nil && ended(l.spare.proc) {
		why := deathOf(l.spare.proc)
		l.log.Warn("prepared plugin process ended", "reload_id", l.spare.reloadID, "pid", l.spare.proc.PID(),
			"cause", why)
		if id := l.spare.reloadID; id != "" && active.GetId() == id &&
			active.GetPhase() == commandv1.Phase_PHASE_PREPARING {
			// The vote was for a process that is no more. If the commit is already on its way this comes too late,
			// and the way is forward.
			l.refuse(active, "ready", why, nil)
		}
		l.endSpare()
	}
}

// votes reports whether a participant may still vote: one that was left out for its lease has its vote again when it
// speaks.
func votes(p *commandv1.Participant) bool {
	return p.GetSafe() == commandv1.Safe_SAFE_UNSPECIFIED || p.GetSafe() == commandv1.Safe_SAFE_EXCLUDED
}

func ended(p Process) bool {
	select {
	case <-p.Done():
		return true
	default:
		return false
	}
}

// deathOf is never of kind fault.Unavailable, which would tell the route that nothing better is coming soon.
func deathOf(p Process) error {
	err := p.Err()
	if err == nil {
		err = errors.New("it did not say why")
	}
	return fault.As(fault.OutcomeUnknown, err, "the plugin process ended", "")
}

// dropStaleSpare ends a prepared process that nothing will switch to any more: its reload aborted, ended or excluded
// this node.
func (l *mountLoop) dropStaleSpare(active *commandv1.Reload, want *commandv1.Wanted) {
	if l.spare == nil {
		return
	}
	id := l.spare.reloadID
	moving := l.run == nil || l.down || l.doubtful || want.GetGeneration() > l.run.wanted.GetGeneration()
	if id == want.GetReloadId() && moving && want.GetGeneration() != l.refused {
		return
	}
	if id != "" && active.GetId() == id {
		p := participant(active, l.r.self)
		switch active.GetPhase() {
		case commandv1.Phase_PHASE_PREPARING, commandv1.Phase_PHASE_COMMITTED:
			if p != nil && votes(p) {
				return
			}
		default:
		}
	}
	l.log.Info("prepared plugin process is no longer needed", "reload_id", id, "pid", l.spare.proc.PID())
	l.endSpare()
}

// relabel makes the running process serve the wanted generation: its spec is the same, and it is fresh enough.
func (l *mountLoop) relabel(want *commandv1.Wanted) {
	from := facts(l.run.wanted.GetSpec(), l.run.wanted.GetGeneration(), l.run.proc.PID())
	l.r.cfg.Routes.Relabel(l.uuid, want)
	l.run.wanted = want
	l.story = &story{
		generation: want.GetGeneration(), from: from,
		to: facts(want.GetSpec(), want.GetGeneration(), l.run.proc.PID()),
	}
	l.log.Info("plugin process relabelled", "reload_id", want.GetReloadId(), "generation", want.GetGeneration())
}

// publish makes what the loop knows visible to Running.
func (l *mountLoop) publish(want *commandv1.Wanted) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := &l.pub
	p.Prepared = ""
	if l.spare != nil {
		p.Prepared = l.spare.reloadID
	}
	if l.run == nil {
		p.State = StateStarting
		if p.LastError != "" {
			p.State = StateBackingOff
		}
		return
	}
	p.Generation, p.Spec, p.PID = l.run.wanted.GetGeneration(), l.run.wanted.GetSpec(), l.run.proc.PID()
	p.Started, p.Role = l.run.started, l.run.role
	switch {
	case l.down:
		p.State, p.PID = StateBackingOff, 0
	case l.doubtful || l.failing != 0 && p.LastError != "":
		p.State = StateBackingOff
	case want.GetGeneration() > p.Generation && want.GetGeneration() != l.refused:
		p.State = StateSwitching
	case l.spare != nil:
		p.State, p.LastError = StatePreparing, ""
	default:
		p.State, p.LastError = StateReady, ""
	}
}

func (l *mountLoop) status() MountStatus {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.pub
}

// converged asks the route itself, so that nothing that this loop has not come to yet can make it true.
func (l *mountLoop) converged(want *commandv1.Wanted) bool {
	generation, ready := l.r.cfg.Routes.Running(l.uuid)
	return !ready || generation >= want.GetGeneration()
}
