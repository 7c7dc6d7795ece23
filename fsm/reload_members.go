package fsm

import (
	"slices"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

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
		if mayConverge(o) {
			o.Verdict = commandv1.Verdict_VERDICT_UNSPECIFIED
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
// has taken its place, and the report to that one settles this one as well (mergeOlder).
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
	return slices.ContainsFunc(p.GetMounts(), mayConverge)
}

func mayConverge(o *commandv1.MountOutcome) bool {
	switch o.GetVerdict() {
	case commandv1.Verdict_VERDICT_PENDING_DOWN, commandv1.Verdict_VERDICT_UNCONFIRMED,
		commandv1.Verdict_VERDICT_FAILED_SWITCH:
		return true
	default:
		return false
	}
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
	var ended []*commandv1.Reload // without it
	e.reloads.Scan(func(_ string, r *commandv1.Reload) bool {
		if p := findParticipant(r, id); r.GetPhase() == commandv1.Phase_PHASE_DONE && p != nil && !out(p) && down(p) {
			ended = append(ended, r)
		}
		return true
	})
	for _, r := range ended {
		r = clone(r)
		p := findParticipant(r, id)
		p.Safe, p.Why = commandv1.Safe_SAFE_LEFT, why
		for _, o := range p.GetMounts() {
			if o.GetVerdict() == commandv1.Verdict_VERDICT_PENDING_DOWN {
				o.Verdict = commandv1.Verdict_VERDICT_UNSPECIFIED
			}
		}
		e.conclude(r)
		e.storeReload(r)
	}
}

// down reports whether a reload has ended with a verdict owed by this participant, which cannot answer the old generation any more.
// An unconfirmed one may still: that it was removed does not make that untrue.
func down(p *commandv1.Participant) bool {
	owes := false
	for _, o := range p.GetMounts() {
		switch o.GetVerdict() {
		case commandv1.Verdict_VERDICT_PENDING_DOWN:
			owes = true
		case commandv1.Verdict_VERDICT_UNCONFIRMED, commandv1.Verdict_VERDICT_FAILED_SWITCH:
			return false
		default: // it has answered for this mount, or owes nothing there
		}
	}
	return owes
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
		if !openOutcome(o) {
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
