package fsm

import (
	"google.golang.org/protobuf/proto"

	"rollcall/node/fault"
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
	if p == nil || n == nil || out(p) || n.GetIncarnation() != rep.GetIncarnation() || p.GetIncarnation() != rep.GetIncarnation() {
		return false
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

func mergePreparing(r *commandv1.Reload, p *commandv1.Participant, o *commandv1.MountOutcome, m *commandv1.MountReport) bool {
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

func (e *entry) mergeCommitted(r *commandv1.Reload, p *commandv1.Participant, o *commandv1.MountOutcome, m *commandv1.MountReport) bool {
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

// mergeRefusal lets a best-effort participant keep what it had.
func (e *entry) mergeRefusal(r *commandv1.Reload, p *commandv1.Participant, o *commandv1.MountOutcome, m *commandv1.MountReport) bool {
	if o.GetVerdict() == commandv1.Verdict_VERDICT_REFUSED || rank(o.GetReport().GetStage()) >= rank(commandv1.MountReport_STAGE_SAFE) {
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
func mergeSwitched(r *commandv1.Reload, p *commandv1.Participant, o *commandv1.MountOutcome, m *commandv1.MountReport) bool {
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

// mergeLate takes a node that was down, or slow, into a record that has ended without it.
func (e *entry) mergeLate(r *commandv1.Reload, p *commandv1.Participant, o *commandv1.MountOutcome, m *commandv1.MountReport) bool {
	switch o.GetVerdict() {
	case commandv1.Verdict_VERDICT_PENDING_DOWN, commandv1.Verdict_VERDICT_UNCONFIRMED, commandv1.Verdict_VERDICT_FAILED_SWITCH:
	default:
		return false
	}
	if m.GetStage() == commandv1.MountReport_STAGE_REFUSED && bestEffort(r) {
		return e.mergeRefusal(r, p, o, m)
	}
	if m.GetStage() != commandv1.MountReport_STAGE_SWITCHED || m.GetTo().GetGeneration() < r.GetGeneration() {
		return false
	}
	o.Verdict, o.Report, o.Safe, p.Why = commandv1.Verdict_VERDICT_CONVERGED_LATE, m, true, ""
	markSafe(r, p)
	return true
}

// nodeSaidHello tells reloads of a node that has booted. While one prepares, the node (new, or known) must prepare in
// this incarnation; where its switch is committed, it boots with the new generation, which makes it safe.
func (e *entry) nodeSaidHello(n *commandv1.Node) {
	for _, id := range e.openIDs() {
		stored := get(&e.reloads, id)
		if !holds(stored.GetPhase()) {
			continue
		}
		r := clone(stored)
		p := findParticipant(r, n.GetId())
		switch {
		case p == nil && !joins(r):
			continue
		case p == nil:
			p = participantOf(r, n)
			p.JoinedDuring, p.Wave = true, joiningWave(r)
			insertParticipant(r, p)
		case out(p) && joins(r):
			// It left, and its override with it: it boots with what it had before the reload, and votes again.
			p.Wave = max(p.GetWave(), joiningWave(r))
			ask(p, n)
		default:
			restart(r, p, n)
		}
		e.decide(r)
	}
	e.expectLate(n)
}

// joins reports whether a node that was not there at the beginning still becomes a participant: not where everybody's
// switch is committed, because it boots with the new generation.
func joins(r *commandv1.Reload) bool {
	if r.GetScope() != commandv1.Scope_SCOPE_GLOBAL {
		return false
	}
	return r.GetPhase() == commandv1.Phase_PHASE_PREPARING || int(r.GetWave()) < len(r.GetWaves())-1
}

// ask begins a participant's part (again), in its node's present incarnation.
func ask(p *commandv1.Participant, n *commandv1.Node) {
	p.Incarnation, p.Name, p.Safe, p.Why = n.GetIncarnation(), n.GetName(), commandv1.Safe_SAFE_UNSPECIFIED, ""
	for _, o := range p.GetMounts() {
		if o.GetVerdict() != commandv1.Verdict_VERDICT_UNMOUNTED {
			o.Prepared, o.Safe, o.Verdict, o.Report = false, false, commandv1.Verdict_VERDICT_UNSPECIFIED, nil
		}
	}
}

// restart takes note of a participant's new incarnation.
func restart(r *commandv1.Reload, p *commandv1.Participant, n *commandv1.Node) {
	committed := p.GetWave() < r.GetWave() || p.GetWave() == r.GetWave() && r.GetPhase() == commandv1.Phase_PHASE_COMMITTED
	if !committed {
		ask(p, n)
		return
	}
	p.Incarnation, p.Name = n.GetIncarnation(), n.GetName()
	if out(p) {
		return // it owes nothing any more, and boots with what is wanted
	}
	p.Why = ""
	if p.GetSafe() != commandv1.Safe_SAFE_SWITCHED && p.GetSafe() != commandv1.Safe_SAFE_REFUSED {
		p.Safe = commandv1.Safe_SAFE_RESTARTED
	}
	for _, o := range p.GetMounts() {
		switch o.GetVerdict() {
		case commandv1.Verdict_VERDICT_PENDING_DOWN, commandv1.Verdict_VERDICT_UNCONFIRMED, commandv1.Verdict_VERDICT_FAILED_SWITCH:
			o.Verdict = commandv1.Verdict_VERDICT_UNSPECIFIED
		default:
		}
		if o.GetVerdict() == commandv1.Verdict_VERDICT_UNSPECIFIED {
			o.Report = nil // said by a process that is gone
		}
		if o.GetVerdict() != commandv1.Verdict_VERDICT_UNMOUNTED && o.GetVerdict() != commandv1.Verdict_VERDICT_REFUSED {
			o.Safe = true
		}
	}
}

// expectLate lets a node that has booted again say that it has converged, in the records that ended without it.
func (e *entry) expectLate(n *commandv1.Node) {
	var late []*commandv1.Reload
	e.reloads.Scan(func(_ string, r *commandv1.Reload) bool {
		p := findParticipant(r, n.GetId())
		if r.GetPhase() == commandv1.Phase_PHASE_DONE && p != nil && !out(p) && p.GetIncarnation() != n.GetIncarnation() &&
			openVerdict(p) && e.stillWanted(r, n.GetId()) {
			late = append(late, r)
		}
		return true
	})
	for _, r := range late {
		r = clone(r)
		findParticipant(r, n.GetId()).Incarnation = n.GetIncarnation()
		e.storeReload(r)
	}
}

// stillWanted reports whether a node is to run what this reload committed, for any of its mounts: else something newer
// has taken its place, and nobody will hear of this one again.
func (s *state) stillWanted(r *commandv1.Reload, node string) bool {
	for _, t := range r.GetTargets() {
		if wantedOf(get(&s.mounts, t.GetMountUuid()), node).GetReloadId() == r.GetId() {
			return true
		}
	}
	return false
}

// openVerdict reports whether a participant may still converge late.
func openVerdict(p *commandv1.Participant) bool {
	for _, o := range p.GetMounts() {
		switch o.GetVerdict() {
		case commandv1.Verdict_VERDICT_PENDING_DOWN, commandv1.Verdict_VERDICT_UNCONFIRMED, commandv1.Verdict_VERDICT_FAILED_SWITCH:
			return true
		default:
		}
	}
	return false
}

// nodeGone tells reloads of a node that has left or was removed: it owes nothing any more.
func (e *entry) nodeGone(id, why string) {
	for _, rid := range e.openIDs() {
		stored := get(&e.reloads, rid)
		if !holds(stored.GetPhase()) || findParticipant(stored, id) == nil {
			continue
		}
		r := clone(stored)
		p := findParticipant(r, id)
		p.Safe, p.Why = commandv1.Safe_SAFE_LEFT, why
		e.decide(r)
	}
}

// running finds a reload and a participant for what a leader says of a node.
func (e *entry) running(id, node string, incarnation uint64) (*commandv1.Reload, *commandv1.Participant, error) {
	r := e.findReload(id)
	if r == nil {
		return nil, nil, fault.Text(fault.NotFound, "no reload with id %q", trim(id, maxName))
	}
	r = clone(r)
	p := findParticipant(r, node)
	if p == nil || out(p) {
		return nil, nil, fault.Text(fault.NotFound, "node %s takes no part in reload %s", trim(node, maxName), r.GetId())
	}
	if n := get(&e.nodes, node); n.GetIncarnation() != incarnation || p.GetIncarnation() != incarnation {
		return nil, nil, fault.Text(fault.Stale, "incarnation %d of node %s is over", incarnation, p.GetName())
	}
	return r, p, nil
}

// barLease keeps a node from a serving lease until it has applied this entry.
func (e *entry) barLease(node string) {
	n := clone(get(&e.nodes, node))
	n.FenceIndex = e.index
	e.putNode(n)
}

// excludeNode leaves a participant out of the vote: the leader proved that its serving lease is over. It is not safe by
// that: the commit looks at it again.
func (e *entry) excludeNode(c *commandv1.ExcludeNode) error {
	r, p, err := e.running(c.GetReloadId(), c.GetNodeId(), c.GetIncarnation())
	switch {
	case err != nil:
		return err
	case r.GetPhase() != commandv1.Phase_PHASE_PREPARING || p.GetWave() != r.GetWave():
		return fault.Text(fault.Stale, "reload %s does not ask node %s now", r.GetId(), p.GetName())
	case r.GetOptions().GetKeepFenced():
		return fault.Text(fault.Conflict, "reload %s waits for every node", r.GetId())
	case len(c.GetVoters()) > maxList:
		return invalid("at most %d voters", maxList)
	case p.GetSafe() == commandv1.Safe_SAFE_EXCLUDED:
		e.res.Repeated = true
		return nil
	}
	for _, t := range r.GetTargets() {
		if t.GetFencing() == "none" && !t.GetUnmounted() {
			return fault.Text(fault.Conflict, "%s has fencing = none: nobody can say that node %s does not answer for it",
				targetPath(r, t.GetMountUuid()), p.GetName())
		}
	}
	r.Voters = c.GetVoters()
	p.Safe, p.Why = commandv1.Safe_SAFE_EXCLUDED, "left out: its serving lease was over while the others prepared"
	e.barLease(p.GetNodeId())
	e.decide(r)
	return nil
}

// fenceNode notes that a participant of a committed reload can no longer answer: its lease is over. Of mounts without
// fencing nobody can say so.
func (e *entry) fenceNode(c *commandv1.FenceNode) error {
	r, p, err := e.running(c.GetReloadId(), c.GetNodeId(), c.GetIncarnation())
	switch {
	case err != nil:
		return err
	case r.GetGeneration() == 0 || !holds(r.GetPhase()) ||
		p.GetWave() > r.GetWave() || p.GetWave() == r.GetWave() && r.GetPhase() != commandv1.Phase_PHASE_COMMITTED:
		return fault.Text(fault.Stale, "reload %s has not committed node %s's switch", r.GetId(), p.GetName())
	case settled(p):
		e.res.Repeated = true
		return nil
	}
	open := false
	for _, o := range p.GetMounts() {
		if v := o.GetVerdict(); v != commandv1.Verdict_VERDICT_UNSPECIFIED && v != commandv1.Verdict_VERDICT_FAILED_SWITCH {
			continue
		}
		if t := findTarget(r, o.GetMountUuid()); t.GetFencing() == "none" && !o.GetSafe() {
			o.Verdict, open = commandv1.Verdict_VERDICT_UNCONFIRMED, true
			continue
		}
		o.Verdict, o.Safe = commandv1.Verdict_VERDICT_PENDING_DOWN, true
	}
	p.Why = "its serving lease is over"
	if p.GetSafe() == commandv1.Safe_SAFE_UNSPECIFIED && !open {
		p.Safe = commandv1.Safe_SAFE_FENCED
	}
	noteUnconfirmed(r)
	e.barLease(p.GetNodeId())
	e.decide(r)
	return nil
}
