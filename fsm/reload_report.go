package fsm

import (
	"google.golang.org/protobuf/proto"

	commandv1 "rollcall/proto/command/v1"
)

// reportBatch merges what nodes say, reload by reload, and decides each once. A report that means nothing (any more) is
// left out without a word: its sender looks at the state, not at an answer.
func (e *entry) reportBatch(c *commandv1.ReportBatch) error {
	touched := map[string]*commandv1.Reload{}
	var order []string
	for _, rep := range c.GetReports() {
		stored := e.findReload(rep.GetReloadId())
		if stored == nil {
			continue
		}
		r := touched[stored.GetId()]
		if r == nil {
			r = clone(stored)
			touched[stored.GetId()] = r
		}
		if e.merge(r, rep) {
			order = append(order, stored.GetId())
			order = append(order, e.mergeOlder(r, rep, touched)...)
		}
	}
	done := map[string]bool{}
	for _, id := range order {
		if done[id] {
			continue
		}
		done[id] = true
		if terminal(touched[id].GetPhase()) {
			e.conclude(touched[id])
			e.storeReload(touched[id])
			continue
		}
		e.decide(touched[id])
	}
	e.res.Repeated = len(order) == 0
	return nil
}

// merge takes one node's report into a record that the caller has cloned, and says whether it changed anything.
func (e *entry) merge(r *commandv1.Reload, rep *commandv1.Report) bool {
	p := findParticipant(r, rep.GetNodeId())
	n := get(&e.nodes, rep.GetNodeId())
	if p == nil || n == nil || out(p) {
		return false
	}
	if n.GetIncarnation() != rep.GetIncarnation() || p.GetIncarnation() != rep.GetIncarnation() {
		return false // of a process that is gone: it prepared nothing that is still there
	}
	changed := false
	for _, m := range rep.GetMounts() {
		o, t := findOutcome(p, m.GetMountUuid()), findTarget(r, m.GetMountUuid())
		if o == nil || t.GetUnmounted() || !bounded(m) {
			continue
		}
		switch r.GetPhase() {
		case commandv1.Phase_PHASE_PREPARING:
			changed = mergePreparing(r, p, o, m) || changed
		case commandv1.Phase_PHASE_COMMITTED:
			changed = e.mergeCommitted(r, p, o, m) || changed
		case commandv1.Phase_PHASE_DONE:
			changed = e.mergeLate(r, p, o, m) || changed
		default:
		}
	}
	if changed {
		p.LastReportIndex = e.index
	}
	return changed
}

// bounded shortens what a plugin's last words may have made long, and refuses what no node of ours sends.
func bounded(m *commandv1.MountReport) bool {
	if len(m.GetSteps()) > maxSteps {
		return false
	}
	m.FailedPhase, m.Cause = trim(m.GetFailedPhase(), maxHashes), trim(m.GetCause(), maxText)
	for _, f := range []*commandv1.ProcessFacts{m.GetFrom(), m.GetTo()} {
		if len(f.GetVersion()) > maxName || len(f.GetSha256()) > maxName {
			return false
		}
	}
	for _, s := range m.GetSteps() {
		if len(s.GetName()) > maxHashes {
			return false
		}
	}
	return true
}

func mergePreparing(
	r *commandv1.Reload, p *commandv1.Participant, o *commandv1.MountOutcome, m *commandv1.MountReport,
) bool {
	if p.GetWave() < r.GetWave() {
		// An earlier wave: it has switched, and may have more to say of it.
		return mergeSwitched(r, p, o, m)
	}
	if p.GetWave() > r.GetWave() || o.GetVerdict() != commandv1.Verdict_VERDICT_UNSPECIFIED {
		return false
	}
	switch m.GetStage() {
	case commandv1.MountReport_STAGE_PREPARED:
		if o.GetPrepared() {
			return false
		}
		o.Prepared, o.PrepareSteps, o.Report = true, m.GetSteps(), m
	case commandv1.MountReport_STAGE_REFUSED:
		o.Prepared, o.Verdict, o.Report = false, commandv1.Verdict_VERDICT_REFUSED, m
	default:
		return false
	}
	if p.GetSafe() == commandv1.Safe_SAFE_EXCLUDED && m.GetStage() == commandv1.MountReport_STAGE_PREPARED {
		p.Safe, p.Why = commandv1.Safe_SAFE_UNSPECIFIED, "" // it is back, and has a vote again
	}
	return true
}

func (e *entry) mergeCommitted(
	r *commandv1.Reload, p *commandv1.Participant, o *commandv1.MountOutcome, m *commandv1.MountReport,
) bool {
	if p.GetWave() > r.GetWave() {
		return false
	}
	if bestEffort(r) {
		switch m.GetStage() {
		case commandv1.MountReport_STAGE_REFUSED:
			return e.mergeRefusal(r, p, o, m)
		case commandv1.MountReport_STAGE_PREPARED:
			if o.GetPrepared() || o.GetReport() != nil {
				return false
			}
			o.Prepared, o.PrepareSteps = true, m.GetSteps()
			return true
		default:
		}
	} else if m.GetStage() == commandv1.MountReport_STAGE_REFUSED {
		// Committed is committed: a node that cannot follow keeps trying.
		m.Stage = commandv1.MountReport_STAGE_FAILED_SWITCH
	}
	return mergeSwitched(r, p, o, m)
}

// TakesRefusal reports whether a reload lets a participant keep what it had on a mount in place of what is committed: a
// best-effort one, while it runs, and when it is done for a participant that still owes it an answer. The node asks before it
// refuses, and the record when it hears of it.
func TakesRefusal(r *commandv1.Reload, p *commandv1.Participant, o *commandv1.MountOutcome) bool {
	if !bestEffort(r) || p == nil || o == nil || out(p) || o.GetVerdict() == commandv1.Verdict_VERDICT_REFUSED ||
		rank(o.GetReport().GetStage()) >= rank(commandv1.MountReport_STAGE_SAFE) {
		return false
	}
	switch r.GetPhase() {
	case commandv1.Phase_PHASE_COMMITTED:
		return p.GetWave() <= r.GetWave()
	case commandv1.Phase_PHASE_DONE:
		return mayConverge(o)
	default:
		return false
	}
}

// mergeRefusal lets a best-effort participant keep what it had.
func (e *entry) mergeRefusal(
	r *commandv1.Reload, p *commandv1.Participant, o *commandv1.MountOutcome, m *commandv1.MountReport,
) bool {
	if !TakesRefusal(r, p, o) {
		return false
	}
	mount := get(&e.mounts, o.GetMountUuid())
	if wantedOf(mount, p.GetNodeId()).GetReloadId() != r.GetId() {
		return false // something newer is wanted already
	}
	t := findTarget(r, o.GetMountUuid())
	was := o.GetWas()
	if was == nil && mount.GetWanted().GetReloadId() == r.GetId() {
		was = mount.GetPrevious()
	} else if was == nil {
		was = mount.GetWanted()
	}
	if was == nil {
		was = &commandv1.Wanted{Generation: t.GetFromGeneration(), Spec: t.GetFrom(), FreshSince: t.GetFromGeneration()}
	}
	mount = clone(mount)
	setOverride(mount, &commandv1.Override{NodeId: p.GetNodeId(), Wanted: was, Why: commandv1.Override_WHY_REFUSED})
	e.putMount(mount)
	o.Verdict, o.Report = commandv1.Verdict_VERDICT_REFUSED, m
	markSafe(r, p)
	return true
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

// mergeSwitched takes in what a node says of a switch that is committed for it.
func mergeSwitched(
	r *commandv1.Reload, p *commandv1.Participant, o *commandv1.MountOutcome, m *commandv1.MountReport,
) bool {
	have := o.GetReport()
	if g := m.GetTo().GetGeneration(); g != 0 && g < r.GetGeneration() {
		return false // of the generation before
	}
	if rank(m.GetStage()) < rank(have.GetStage()) || o.GetVerdict() == commandv1.Verdict_VERDICT_REFUSED {
		return false
	}
	if m.GetStage() == have.GetStage() && (proto.Equal(m, have) || m.GetWallMs() < have.GetWallMs()) {
		return false
	}
	switch m.GetStage() {
	case commandv1.MountReport_STAGE_FAILED_SWITCH:
		o.Verdict = commandv1.Verdict_VERDICT_FAILED_SWITCH
	case commandv1.MountReport_STAGE_SAFE:
		o.Safe = true
	case commandv1.MountReport_STAGE_SWITCHED:
		o.Safe, o.Verdict = true, switchedVerdict(m)
		p.Why = ""
	default:
		return false
	}
	o.Report = m
	markSafe(r, p)
	return true
}

// switchedVerdict tells a new process from one that was only relabelled.
func switchedVerdict(m *commandv1.MountReport) commandv1.Verdict {
	if pid := m.GetTo().GetPid(); pid != 0 && pid == m.GetFrom().GetPid() {
		return commandv1.Verdict_VERDICT_UNCHANGED
	}
	return commandv1.Verdict_VERDICT_SWITCHED
}

// markSafe notes that a participant can no longer answer with the old generation for any of the targets.
func markSafe(r *commandv1.Reload, p *commandv1.Participant) {
	if r.GetGeneration() == 0 || p.GetSafe() != commandv1.Safe_SAFE_UNSPECIFIED || p.GetWave() > r.GetWave() {
		return
	}
	safe := commandv1.Safe_SAFE_SWITCHED
	for _, o := range p.GetMounts() {
		switch {
		case o.GetVerdict() == commandv1.Verdict_VERDICT_REFUSED:
			safe = commandv1.Safe_SAFE_REFUSED
		case !o.GetSafe() && o.GetVerdict() != commandv1.Verdict_VERDICT_UNMOUNTED:
			return
		}
	}
	p.Safe = safe
}

// mergeOlder tells the records that ended without a node, and before what it runs now, that it has converged: it missed
// several reloads of a mount, and reports to the last of them alone. It returns the ids of those that it changed, which it
// has put among the touched ones.
func (e *entry) mergeOlder(newer *commandv1.Reload, rep *commandv1.Report, touched map[string]*commandv1.Reload) (ids []string) {
	owing := func(r *commandv1.Reload, m *commandv1.MountReport) bool {
		p := findParticipant(r, rep.GetNodeId())
		return p != nil && !out(p) && mayConverge(findOutcome(p, m.GetMountUuid()))
	}
	for _, m := range rep.GetMounts() {
		if m.GetStage() != commandv1.MountReport_STAGE_SWITCHED {
			continue
		}
		e.reloads.Scan(func(id string, stored *commandv1.Reload) bool {
			r := touched[id]
			if r == nil {
				r = stored
			}
			if r.GetPhase() != commandv1.Phase_PHASE_DONE || r.GetGeneration() >= newer.GetGeneration() || !owing(r, m) ||
				findTarget(r, m.GetMountUuid()).GetUnmounted() {
				return true
			}
			if touched[id] == nil {
				r = clone(r)
				touched[id] = r
			}
			p := findParticipant(r, rep.GetNodeId())
			if e.mergeLate(r, p, findOutcome(p, m.GetMountUuid()), m) {
				p.Incarnation, p.LastReportIndex = rep.GetIncarnation(), e.index
				ids = append(ids, id)
			}
			return true
		})
	}
	return ids
}

// mergeMeasured takes what a node measured after its switch into a record that has ended: once, and nothing else of it.
func (e *entry) mergeMeasured(r *commandv1.Reload, o *commandv1.MountOutcome, m *commandv1.MountReport) bool {
	have := o.GetReport()
	if m.GetStage() != commandv1.MountReport_STAGE_SWITCHED || have.GetStage() != commandv1.MountReport_STAGE_SWITCHED ||
		m.GetTo().GetGeneration() != have.GetTo().GetGeneration() || m.GetTo().GetPid() != have.GetTo().GetPid() ||
		m.GetTraffic().GetP99AfterUs() == 0 || have.GetTraffic().GetP99AfterUs() != 0 ||
		e.clock-r.GetEndClockNs() > MeasuredWithin {
		return false
	}
	o.Report = clone(have)
	o.Report.Traffic = m.GetTraffic()
	return true
}

// mergeLate takes a node that was down, or slow, into a record that has ended without it.
func (e *entry) mergeLate(
	r *commandv1.Reload, p *commandv1.Participant, o *commandv1.MountOutcome, m *commandv1.MountReport,
) bool {
	if !mayConverge(o) {
		return e.mergeMeasured(r, o, m)
	}
	if m.GetStage() == commandv1.MountReport_STAGE_REFUSED {
		return e.mergeRefusal(r, p, o, m)
	}
	if m.GetStage() != commandv1.MountReport_STAGE_SWITCHED || m.GetTo().GetGeneration() < r.GetGeneration() {
		return false
	}
	o.Verdict, o.Report, o.Safe, p.Why = commandv1.Verdict_VERDICT_CONVERGED_LATE, m, true, ""
	markSafe(r, p)
	return true
}
