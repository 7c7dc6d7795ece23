package reload

import (
	"context"
	"sync"
	"time"

	"rollcall/node/failpoint"
	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// leader is the soft half of every reload: a batch of reports, timers, exclusions, fences and gates. It ends with the
// leadership, and the next leader's begins from the state alone.
type leader struct {
	r    *Reloads
	term uint64

	wakes chan struct{}
	gates chan gateResult

	mu     sync.Mutex
	queued []*commandv1.Report
	size   int

	// Below: the loop's own.
	batch  batch
	timers map[string]*phaseTimer
	bakes  map[string]*bake
	ending context.Context
	group  sync.WaitGroup

	retainAt time.Time
	tries    map[string]time.Time
}

// Lead does a leader's work until ctx, which is the leadership, ends. node registers it with the replica's
// LeaderContext; at most one runs at a time.
func (r *Reloads) Lead(ctx context.Context, term uint64) {
	ld := &leader{
		r: r, term: term, wakes: make(chan struct{}, 1), gates: make(chan gateResult),
		timers: map[string]*phaseTimer{}, bakes: map[string]*bake{}, batch: batch{},
		tries: map[string]time.Time{},
	}
	ctx, cancel := context.WithCancel(ctx)
	ld.ending = ctx
	r.mu.Lock()
	r.lead = ld
	r.mu.Unlock()
	r.outbox.wakeUp()
	r.log.Info("leading reloads", "term", term)
	ld.loop(ctx)
	r.mu.Lock()
	if r.lead == ld {
		r.lead = nil
	}
	r.mu.Unlock()
	cancel()
	ld.group.Wait()
	r.log.Info("no longer leading reloads", "term", term)
}

// accept queues reports for the next batch. A full queue is fault.Exhausted: the sender comes back.
func (ld *leader) accept(reports []*commandv1.Report) error {
	n := 0
	for _, rep := range reports {
		n += len(rep.GetMounts())
	}
	ld.mu.Lock()
	if ld.size+n > ld.r.cfg.QueueLimit {
		ld.mu.Unlock()
		return fault.New(fault.Exhausted, "accept reports", "", "%d reports wait already", ld.r.cfg.QueueLimit)
	}
	ld.queued = append(ld.queued, reports...)
	ld.size += n
	ld.mu.Unlock()
	ld.wakeUp()
	return nil
}

func (ld *leader) wakeUp() {
	select {
	case ld.wakes <- struct{}{}:
	default:
	}
}

// loop does what is due, then waits for the earliest thing that will be.
func (ld *leader) loop(ctx context.Context) {
	for ctx.Err() == nil {
		changed := ld.r.cfg.State.Changed()
		v := ld.r.cfg.State.View()
		ld.gather()
		wait, did := ld.pass(ctx, v, time.Now())
		if did {
			continue
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-changed:
			sleep(ctx, quantum)
		case <-ld.wakes:
		case g := <-ld.gates:
			ld.gated(ctx, g)
		case <-timer.C:
		}
		timer.Stop()
	}
}

// pass does at most one thing that changes the state, and answers when the next is due.
func (ld *leader) pass(ctx context.Context, v View, now time.Time) (wait time.Duration, did bool) {
	running := v.RunningReloads()
	ld.batch.trim(v)
	wait = time.Second
	if due := ld.batch.due(v, now, ld.r.cfg.Flush); due <= 0 {
		return 0, ld.flush(ctx, v)
	} else if due < wait {
		wait = due
	}
	alive := map[string]bool{}
	for _, rl := range running {
		alive[rl.GetId()] = true
		d, did := ld.advance(ctx, v, rl, now)
		if did {
			return 0, true
		}
		if d > 0 && d < wait {
			wait = d
		}
	}
	for id := range ld.timers {
		if !alive[id] {
			delete(ld.timers, id)
			ld.endBake(id)
		}
	}
	if len(running) == 0 {
		clear(ld.tries)
	}
	return wait, ld.retain(ctx, v, now)
}

// advance does what is due for one running reload.
func (ld *leader) advance(ctx context.Context, v View, rl *commandv1.Reload, now time.Time) (time.Duration, bool) {
	if ld.expire(ctx, v, rl, now) || ld.introduce(ctx, rl) {
		return 0, true
	}
	wait := ld.timers[rl.GetId()].left(now)
	switch rl.GetPhase() {
	case commandv1.Phase_PHASE_PREPARING:
		if ld.exclude(ctx, rl) {
			return 0, true
		}
	case commandv1.Phase_PHASE_COMMITTED, commandv1.Phase_PHASE_ROLLING_BACK:
		if ld.fence(ctx, rl) {
			return 0, true
		}
	default:
	}
	if d := ld.bakeOf(v, rl, now); d > 0 {
		wait = min(wait, d)
	}
	return min(wait, leasePoll), false
}

// leasePoll is how often leases are looked at while somebody's answer is missing: no entry tells of their end.
const leasePoll = 200 * time.Millisecond

// propose enters c. A term that is over ends the loop; anything else is tried again from the state, a little later.
func (ld *leader) propose(ctx context.Context, what string, c *commandv1.Command) bool {
	c.WallMs = time.Now().UnixMilli()
	res, err := ld.r.cfg.Replica.ProposeAsLeader(ctx, ld.term, c)
	if err == nil && res.GetFaultKind() != "" {
		err = fault.New(fault.ParseKind(res.GetFaultKind()), what, "", "%s", res.GetFaultText())
	}
	if err == nil {
		return true
	}
	if ctx.Err() == nil {
		ld.r.log.Info("proposal not taken", "what", what, "cause", err)
		sleep(ctx, leasePoll)
	}
	return false
}

// gather moves what was accepted into the batch.
func (ld *leader) gather() {
	ld.mu.Lock()
	queued := ld.queued
	ld.queued, ld.size = nil, 0
	ld.mu.Unlock()
	now := time.Now()
	for _, rep := range queued {
		ld.batch.add(rep, now)
	}
}

// flush enters the batch. What it held is out of the batch either way: senders repeat what the state does not show.
func (ld *leader) flush(ctx context.Context, v View) bool {
	if failpoint.Enabled && ld.decides(v) {
		_ = failpoint.Hit(failpoint.ReloadSwitchProposed, ld.r.self)
	}
	reports := ld.batch.take()
	if len(reports) == 0 {
		return false
	}
	ld.propose(ctx, "report batch", &commandv1.Command{
		Body: &commandv1.Command_ReportBatch{ReportBatch: &commandv1.ReportBatch{Reports: reports}},
	})
	return true
}

// decides reports whether the batch holds the last vote of some reload.
func (ld *leader) decides(v View) bool {
	for key := range ld.batch {
		if rl := v.Reload(key.reload); rl.GetPhase() == commandv1.Phase_PHASE_PREPARING && ld.batch.completes(rl) {
			return true
		}
	}
	return false
}

// batchKey is what reports are merged by.
type batchKey struct {
	reload, node string
	incarnation  uint64
	mount        string
}

type batchItem struct {
	rep *commandv1.MountReport
	at  time.Time
}

// batch holds the latest report of each key until it is entered.
type batch map[batchKey]batchItem

func (b batch) add(rep *commandv1.Report, now time.Time) {
	for _, m := range rep.GetMounts() {
		key := batchKey{rep.GetReloadId(), rep.GetNodeId(), rep.GetIncarnation(), m.GetMountUuid()}
		if old, ok := b[key]; ok {
			if rank(m.GetStage()) >= rank(old.rep.GetStage()) {
				b[key] = batchItem{m, old.at}
			}
			continue
		}
		b[key] = batchItem{m, now}
	}
}

// trim drops what the state shows already and what it has no use for.
func (b batch) trim(v View) {
	for key, it := range b {
		rl := v.Reload(key.reload)
		p := participant(rl, key.node)
		o := outcome(p, key.mount)
		if o == nil || p.GetIncarnation() != key.incarnation || shown(rl, p, o, it.rep) {
			delete(b, key)
		}
	}
}

// take empties the batch into reports, in an order of its own that does not depend on the map's.
func (b batch) take() []*commandv1.Report {
	out := reportsOf(b)
	clear(b)
	return out
}

// flushMeasured is how long the leader gathers measurements for records that are done: nobody waits for them, and each
// node has its own a few seconds after it switched.
const flushMeasured = 2 * time.Second

// measurement reports whether an item only adds to the record of a reload that has ended.
func (it batchItem) measurement(v View, key batchKey) bool {
	rl := v.Reload(key.reload)
	o := outcome(participant(rl, key.node), key.mount)
	return terminal(rl.GetPhase()) && o.GetReport().GetStage() == commandv1.MountReport_STAGE_SWITCHED
}

// due answers how long the batch may still wait: not at all when it is complete for some reload's phase or holds a
// failure, else until it is flush old. Mere measurements wait longer.
func (b batch) due(v View, now time.Time, flush time.Duration) time.Duration {
	if len(b) == 0 {
		return time.Hour
	}
	oldest, measured := now.Add(time.Hour), now
	reloads := map[string]bool{}
	for key, it := range b {
		if it.measurement(v, key) {
			if it.at.Before(measured) {
				measured = it.at
			}
			continue
		}
		switch it.rep.GetStage() {
		case commandv1.MountReport_STAGE_REFUSED, commandv1.MountReport_STAGE_FAILED_SWITCH:
			return 0
		default:
		}
		if it.at.Before(oldest) {
			oldest = it.at
		}
		reloads[key.reload] = true
	}
	for id := range reloads {
		if b.completes(v.Reload(id)) {
			return 0
		}
	}
	return min(flush-now.Sub(oldest), flushMeasured-now.Sub(measured))
}

// completes reports whether the state and the batch together hold every answer that rl's phase waits for.
func (b batch) completes(rl *commandv1.Reload) bool {
	if terminal(rl.GetPhase()) {
		return true
	}
	for _, p := range rl.GetParticipants() {
		if p.GetWave() > rl.GetWave() || rl.GetPhase() == commandv1.Phase_PHASE_PREPARING && p.GetWave() < rl.GetWave() {
			continue
		}
		for _, o := range p.GetMounts() {
			if answered(rl, p, o) {
				continue
			}
			it, ok := b[batchKey{rl.GetId(), p.GetNodeId(), p.GetIncarnation(), o.GetMountUuid()}]
			if !ok || rl.GetPhase() != commandv1.Phase_PHASE_PREPARING &&
				it.rep.GetStage() != commandv1.MountReport_STAGE_SWITCHED {
				return false
			}
		}
	}
	return true
}

// answered reports whether the phase waits for nothing more from o.
func answered(rl *commandv1.Reload, p *commandv1.Participant, o *commandv1.MountOutcome) bool {
	if p.GetSafe() == commandv1.Safe_SAFE_EXCLUDED || p.GetSafe() == commandv1.Safe_SAFE_LEFT {
		return true
	}
	switch o.GetVerdict() {
	case commandv1.Verdict_VERDICT_UNSPECIFIED, commandv1.Verdict_VERDICT_FAILED_SWITCH:
	default:
		return rl.GetPhase() != commandv1.Phase_PHASE_ROLLING_BACK
	}
	if rl.GetPhase() == commandv1.Phase_PHASE_PREPARING {
		return o.GetPrepared()
	}
	return p.GetSafe() == commandv1.Safe_SAFE_FENCED
}
