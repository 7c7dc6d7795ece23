package reload

import (
	"context"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"rollcall/fsm"
	"rollcall/node/failpoint"
	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
	peerv1 "rollcall/proto/peer/v1"
)

// tell makes sure that the reload which committed the running generation hears of it: from the state, not from having
// been there, so that a restarted node and a lost report are no cases of their own. It answers when to look again.
func (l *mountLoop) tell(v View) time.Duration {
	if l.refused != 0 {
		l.tellRefusal(v)
	}
	if l.run != nil && l.doubtful {
		l.tellSafe(v)
	}
	if l.run == nil || l.down || l.doubtful {
		return 0
	}
	want := l.run.wanted
	rl := v.Reload(want.GetReloadId())
	p := participant(rl, l.r.self)
	o := outcome(p, l.uuid)
	if o == nil || p.GetIncarnation() != l.r.cfg.Replica.Incarnation() {
		return 0
	}
	rep := l.report(rl, commandv1.MountReport_STAGE_SWITCHED)
	if l.retired != nil {
		// The old process is still ending. Nothing reaches it any more, but the node's part is done only when it is gone.
		if wait := safeAfter - time.Since(l.retireFrom); wait > 0 {
			return wait
		}
		rep.Stage = commandv1.MountReport_STAGE_SAFE
	}
	if !shown(rl, p, o, rep) {
		l.put(rl, rep)
		return 0
	}
	return l.tellAfter(rl, p, o, rep)
}

// afterSwitch is how long a node measures what came after a switch before it says so.
const afterSwitch = 5 * time.Second

// tellAfterUntil is how long after a switch that is worth an entry. The state machine has a limit of its own.
const tellAfterUntil = time.Minute

// tellAfter says once more what there was to say, with the latency after the switch: to a reload that still runs by then
// (its wave bakes, others are not there yet), or to the record of one that is done. A mount that nobody asked anything of
// has nothing to add.
func (l *mountLoop) tellAfter(
	rl *commandv1.Reload, p *commandv1.Participant, o *commandv1.MountOutcome, rep *commandv1.MountReport,
) time.Duration {
	if !measures(rl) || rep.GetTraffic() == nil || o.GetReport().GetTraffic().GetP99AfterUs() > 0 {
		return 0
	}
	served := time.Since(l.run.served)
	switch {
	case served < afterSwitch:
		return afterSwitch - served
	case served > tellAfterUntil:
		return 0
	}
	rep.Traffic = l.r.cfg.Routes.LastSwitch(l.uuid)
	if !shown(rl, p, o, rep) {
		l.story.traffic = rep.GetTraffic()
		l.put(rl, rep)
	}
	return 0
}

// tellSafe says of a committed switch that has failed that the old generation answers no more either. The failure goes
// first: its verdict is the one that counts.
func (l *mountLoop) tellSafe(v View) {
	want := v.Wanted(v.Mount(l.uuid), l.r.self)
	if want.GetGeneration() <= l.run.wanted.GetGeneration() {
		return
	}
	rl := v.Reload(want.GetReloadId())
	p := participant(rl, l.r.self)
	o := outcome(p, l.uuid)
	if o.GetVerdict() != commandv1.Verdict_VERDICT_FAILED_SWITCH || o.GetSafe() || terminal(rl.GetPhase()) ||
		p.GetIncarnation() != l.r.cfg.Replica.Incarnation() {
		return
	}
	if _, ready := l.r.cfg.Routes.Running(l.uuid); ready {
		return
	}
	rep := proto.CloneOf(o.GetReport())
	rep.Stage = commandv1.MountReport_STAGE_SAFE
	l.put(rl, rep)
}

// report tells of the running generation's switch.
func (l *mountLoop) report(rl *commandv1.Reload, stage commandv1.MountReport_Stage) *commandv1.MountReport {
	want := l.run.wanted
	rep := &commandv1.MountReport{
		Stage: stage, From: l.fromFacts(rl), To: facts(want.GetSpec(), want.GetGeneration(), l.run.proc.PID()),
	}
	if s := l.story; s != nil && s.generation == want.GetGeneration() {
		rep.From, rep.To = s.from, s.to
		rep.Steps = append(rep.Steps, s.steps...)
		rep.HoldUs = s.hold.Microseconds()
		rep.Traffic = s.traffic
	}
	return rep
}

// fromFacts is what runs now; where nothing does, what the reload says that ran before it.
func (l *mountLoop) fromFacts(rl *commandv1.Reload) *commandv1.ProcessFacts {
	t := targetOf(rl, l.uuid)
	if l.run != nil && l.run.wanted.GetReloadId() != rl.GetId() {
		pid := l.run.proc.PID()
		if l.down {
			pid = 0
		}
		return facts(l.run.wanted.GetSpec(), l.run.wanted.GetGeneration(), pid)
	}
	return facts(t.GetFrom(), t.GetFromGeneration(), 0)
}

func (l *mountLoop) refuse(rl *commandv1.Reload, phase string, err error, steps []*commandv1.Step) *commandv1.MountReport {
	rep := &commandv1.MountReport{
		Stage: commandv1.MountReport_STAGE_REFUSED, FailedPhase: phase, Cause: cause(err), Steps: steps,
		From: l.fromFacts(rl), To: facts(targetOf(rl, l.uuid).GetTo(), 0, 0),
	}
	l.put(rl, proto.CloneOf(rep)) // which the outbox has from then on
	return rep
}

// mayRefuse reports whether this node may keep what it runs in place of what a reload wants.
func (l *mountLoop) mayRefuse(rl *commandv1.Reload) bool {
	p := participant(rl, l.r.self)
	return p.GetIncarnation() == l.r.cfg.Replica.Incarnation() && fsm.TakesRefusal(rl, p, outcome(p, l.uuid))
}

// tellRefusal says that this node has refused what is wanted, until it is wanted no more. When the record has no place for
// that any more, the node has no excuse either, and goes forward.
func (l *mountLoop) tellRefusal(v View) {
	want := v.Wanted(v.Mount(l.uuid), l.r.self)
	if want.GetGeneration() != l.refused {
		return
	}
	rl := v.Reload(want.GetReloadId())
	if l.mayRefuse(rl) {
		l.put(rl, proto.CloneOf(l.refusal))
		return
	}
	l.log.Warn("a refusal came too late", "reload_id", want.GetReloadId(), "generation", l.refused)
	l.refused, l.refusal = 0, nil
	l.wakeUp()
}

// putFailed reports the first failure of a committed switch; the tries after it are the node's own affair.
func (l *mountLoop) putFailed(
	rl *commandv1.Reload, want *commandv1.Wanted, phase string, err error, steps []*commandv1.Step,
) {
	o := outcome(participant(rl, l.r.self), l.uuid)
	if o == nil || l.run != nil && l.run.wanted.GetGeneration() >= want.GetGeneration() {
		return
	}
	rep := &commandv1.MountReport{
		Stage: commandv1.MountReport_STAGE_FAILED_SWITCH, FailedPhase: phase, Cause: cause(err), Steps: steps,
		From: l.fromFacts(rl), To: facts(want.GetSpec(), want.GetGeneration(), 0),
	}
	if !shown(rl, participant(rl, l.r.self), o, rep) {
		l.put(rl, rep)
	}
}

// maxCause bounds the text of a cause in the log: a plugin's last words may be long.
const maxCause = 2048

func cause(err error) string {
	text := err.Error()
	if len(text) > maxCause {
		text = text[:maxCause]
	}
	return text
}

func (l *mountLoop) put(rl *commandv1.Reload, rep *commandv1.MountReport) {
	rep.MountUuid = l.uuid
	l.r.outbox.put(rl.GetId(), rep)
}

// rank orders stages: a later one says all that an earlier one said.
func rank(s commandv1.MountReport_Stage) int {
	switch s {
	case commandv1.MountReport_STAGE_PREPARED:
		return 1
	case commandv1.MountReport_STAGE_REFUSED:
		return 2
	case commandv1.MountReport_STAGE_FAILED_SWITCH:
		return 3
	case commandv1.MountReport_STAGE_SAFE:
		return 4
	case commandv1.MountReport_STAGE_SWITCHED:
		return 5
	default:
		return 0
	}
}

// measures reports whether a record takes in what was measured after the switch: while it runs, and once it is done.
func measures(rl *commandv1.Reload) bool {
	return !terminal(rl.GetPhase()) || rl.GetPhase() == commandv1.Phase_PHASE_DONE
}

// shown reports whether the state shows rep, something later, or a phase in which it no longer means anything. Both
// ends use it: the node to stop sending, and the leader to leave out what the log has already.
func shown(
	rl *commandv1.Reload, p *commandv1.Participant, o *commandv1.MountOutcome, rep *commandv1.MountReport,
) bool {
	have := o.GetReport()
	switch rep.GetStage() {
	case commandv1.MountReport_STAGE_PREPARED:
		return rl.GetPhase() != commandv1.Phase_PHASE_PREPARING || o.GetPrepared() || !votes(p) ||
			o.GetVerdict() != commandv1.Verdict_VERDICT_UNSPECIFIED
	case commandv1.MountReport_STAGE_REFUSED:
		if rl.GetPhase() == commandv1.Phase_PHASE_PREPARING {
			return o.GetVerdict() == commandv1.Verdict_VERDICT_REFUSED
		}
		return !fsm.TakesRefusal(rl, p, o)
	case commandv1.MountReport_STAGE_FAILED_SWITCH, commandv1.MountReport_STAGE_SAFE:
		return terminal(rl.GetPhase()) ||
			rank(have.GetStage()) >= rank(rep.GetStage()) && have.GetTo().GetGeneration() >= rep.GetTo().GetGeneration()
	case commandv1.MountReport_STAGE_SWITCHED:
		more := rep.GetTraffic().GetP99AfterUs() > 0 && have.GetTraffic().GetP99AfterUs() == 0 && measures(rl)
		return have.GetStage() == commandv1.MountReport_STAGE_SWITCHED && !more &&
			have.GetTo().GetGeneration() >= rep.GetTo().GetGeneration()
	default:
		return true
	}
}

// Limits of the outbox.
const (
	resendMin = 100 * time.Millisecond
	resendMax = 2 * time.Second
	sendLimit = 5 * time.Second
	// lateSends bounds how often a report of a reload that has ended is sent: the state may have no use for it.
	lateSends = 5
)

type outKey struct{ reload, mount string }

type outItem struct {
	rep   *commandv1.MountReport
	at    time.Time
	pause time.Duration
	late  int
}

// outbox holds what this node has to say until its own state shows it: at least once, merged by the state machine.
// Its size is bounded by the node's mounts: one entry for each running reload and mount.
type outbox struct {
	r     *Reloads
	wakes chan struct{}

	mu    sync.Mutex
	items map[outKey]*outItem
}

func newOutbox(r *Reloads) *outbox {
	return &outbox{r: r, wakes: make(chan struct{}, 1), items: map[outKey]*outItem{}}
}

func (b *outbox) wakeUp() {
	select {
	case b.wakes <- struct{}{}:
	default:
	}
}

// put replaces what is waiting to be said of the same reload and mount, unless it says the same.
func (b *outbox) put(reloadID string, rep *commandv1.MountReport) {
	rep.WallMs = time.Now().UnixMilli()
	b.mu.Lock()
	key := outKey{reloadID, rep.GetMountUuid()}
	old := b.items[key]
	fresh := old == nil || old.rep.GetStage() != rep.GetStage() ||
		old.rep.GetTo().GetGeneration() != rep.GetTo().GetGeneration()
	if fresh {
		b.items[key] = &outItem{rep: rep, at: time.Now()}
	}
	b.mu.Unlock()
	if fresh {
		b.wakeUp()
	}
}

// run sends until ctx ends.
func (b *outbox) run(ctx context.Context) {
	for {
		due, wait := b.due(b.r.cfg.State.View())
		if len(due) > 0 {
			if err := b.send(ctx, due); err != nil && ctx.Err() == nil {
				b.r.log.Debug("hand reports to the leader", "reports", len(due), "cause", err)
			}
			continue
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-b.wakes:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// due drops what the state shows and returns what is to be sent now, else how long there is nothing to do.
func (b *outbox) due(v View) ([]*commandv1.Report, time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	now, wait := time.Now(), time.Minute
	byReload := map[string]*commandv1.Report{}
	var out []*commandv1.Report
	for key, it := range b.items {
		rl := v.Reload(key.reload)
		p := participant(rl, b.r.self)
		o := outcome(p, key.mount)
		if o == nil || p.GetIncarnation() != b.r.cfg.Replica.Incarnation() || shown(rl, p, o, it.rep) {
			delete(b.items, key)
			continue
		}
		if d := it.at.Sub(now); d > 0 {
			wait = min(wait, d)
			continue
		}
		if terminal(rl.GetPhase()) {
			if it.late++; it.late > lateSends {
				delete(b.items, key)
				continue
			}
		}
		it.pause = min(max(it.pause*2, resendMin), resendMax)
		it.at = now.Add(it.pause)
		wait = min(wait, it.pause)
		rep := byReload[key.reload]
		if rep == nil {
			rep = &commandv1.Report{
				ReloadId: key.reload, NodeId: b.r.self, Incarnation: b.r.cfg.Replica.Incarnation(),
			}
			byReload[key.reload] = rep
			out = append(out, rep)
		}
		rep.Mounts = append(rep.Mounts, proto.CloneOf(it.rep))
	}
	return out, wait
}

// send hands reports to the leader, here or elsewhere. That they were accepted says nothing: the state must show them.
func (b *outbox) send(ctx context.Context, reports []*commandv1.Report) error {
	ctx, cancel := context.WithTimeout(ctx, sendLimit)
	defer cancel()
	if err := reporting(reports, b.r.self); err != nil {
		return err
	}
	ls := b.r.cfg.Replica.Leadership()
	if ls.Leader {
		return b.r.accept(reports)
	}
	node := b.r.cfg.State.View().Node(ls.LeaderID)
	if node == nil {
		return fault.New(fault.NotLeader, "report", "", "no leader is known")
	}
	conn, err := b.r.cfg.Peers.Dial(ctx, node)
	if err != nil {
		return fault.Wrap(err, "dial leader", node.GetName())
	}
	_, err = peerv1.NewReloadClient(conn).Report(ctx, &peerv1.ReportRequest{Reports: reports})
	return fault.FromGRPC(err)
}

// reporting passes the places of reports that are about to be sent: an error is a report that is lost.
func reporting(reports []*commandv1.Report, node string) error {
	if !failpoint.Enabled {
		return nil
	}
	return places(reports, node, map[commandv1.MountReport_Stage]failpoint.Site{
		commandv1.MountReport_STAGE_PREPARED: failpoint.ReloadPreparedReport,
		commandv1.MountReport_STAGE_REFUSED:  failpoint.ReloadRefusedReport,
		commandv1.MountReport_STAGE_SWITCHED: failpoint.ReloadSwitchedReport,
	})
}

// heard passes the places of reports that have reached the leader.
func heard(reports []*commandv1.Report, node string) error {
	if !failpoint.Enabled {
		return nil
	}
	return places(reports, node, map[commandv1.MountReport_Stage]failpoint.Site{
		commandv1.MountReport_STAGE_PREPARED: failpoint.ReloadPreparedHeard,
		commandv1.MountReport_STAGE_SWITCHED: failpoint.ReloadSwitchedHeard,
	})
}

func places(reports []*commandv1.Report, node string, of map[commandv1.MountReport_Stage]failpoint.Site) error {
	for _, rep := range reports {
		for _, m := range rep.GetMounts() {
			if site := of[m.GetStage()]; site != "" {
				if err := failpoint.Hit(site, node); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// accept takes reports in where this node leads.
func (r *Reloads) accept(reports []*commandv1.Report) error {
	r.mu.Lock()
	ld := r.lead
	r.mu.Unlock()
	if ld == nil {
		return fault.New(fault.NotLeader, "accept reports", r.self, "this node does not lead")
	}
	if err := heard(reports, r.self); err != nil {
		return err
	}
	return ld.accept(reports)
}
