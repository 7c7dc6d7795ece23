package fsm

import (
	"slices"

	commandv1 "rollcall/proto/command/v1"
)

// Everything here takes a record that the caller has cloned (or just made), changes it and stores it. A record is stored
// by storeReload alone, so that modify_index tells of every change.

func (e *entry) storeReload(r *commandv1.Reload) {
	r.ModifyIndex = e.index
	e.putReload(r)
}

func bestEffort(r *commandv1.Reload) bool {
	return r.GetOptions().GetStrategy() == commandv1.Strategy_STRATEGY_BEST_EFFORT
}

func (e *entry) enterPhase(r *commandv1.Reload, p commandv1.Phase) {
	r.Phase, r.PhaseClockNs = p, e.clock
}

// activate starts a reload that nothing stands in the way of. What it fixed at its entry is looked at again: mounts may
// be gone, pins and catalog may say otherwise.
func (e *entry) activate(r *commandv1.Reload) {
	for i, t := range r.GetTargets() {
		m := get(&e.mounts, t.GetMountUuid())
		if m == nil {
			r.Targets[i] = clone(t)
			r.Targets[i].Unmounted = true
			continue
		}
		fresh, err := e.targetOf(r, m)
		if err != nil {
			e.finish(r, commandv1.Phase_PHASE_ABORTED, err.Error())
			return
		}
		r.Targets[i] = fresh
	}
	r.PrepareIndex, r.PrepareWallMs = e.index, e.wallMS
	for _, n := range e.liveNodes() {
		if r.GetScope() == commandv1.Scope_SCOPE_GLOBAL || n.GetId() == r.GetServingNode() {
			r.Participants = append(r.Participants, participantOf(r, n))
		}
	}
	if len(r.GetParticipants()) == 0 {
		e.finish(r, commandv1.Phase_PHASE_ABORTED, "no participant is left: the nodes that were asked have left the cluster")
		return
	}
	if !slices.ContainsFunc(r.GetTargets(), func(t *commandv1.Target) bool { return !t.GetUnmounted() }) {
		e.finish(r, commandv1.Phase_PHASE_DONE, "every mount was disabled before its turn came")
		return
	}
	planWaves(r)
	e.enterPhase(r, commandv1.Phase_PHASE_PREPARING)
	if bestEffort(r) {
		e.commit(r)
	}
	e.decide(r)
}

func participantOf(r *commandv1.Reload, n *commandv1.Node) *commandv1.Participant {
	p := &commandv1.Participant{NodeId: n.GetId(), Name: n.GetName(), Incarnation: n.GetIncarnation()}
	for _, t := range r.GetTargets() {
		o := &commandv1.MountOutcome{MountUuid: t.GetMountUuid()}
		if t.GetUnmounted() {
			o.Verdict = commandv1.Verdict_VERDICT_UNMOUNTED
		}
		p.Mounts = append(p.Mounts, o)
	}
	return p
}

// out reports whether a participant is asked for nothing any more.
func out(p *commandv1.Participant) bool {
	return p.GetSafe() == commandv1.Safe_SAFE_LEFT
}

// decide looks at a reload after anything that may have settled it, takes every step that is due, and stores it.
func (e *entry) decide(r *commandv1.Reload) {
	switch r.GetPhase() {
	case commandv1.Phase_PHASE_PREPARING:
		e.decidePreparing(r)
	case commandv1.Phase_PHASE_COMMITTED:
		e.decideCommitted(r)
	default:
		e.storeReload(r)
	}
}

func (e *entry) decidePreparing(r *commandv1.Reload) {
	asked, prepared, excluded, left := 0, 0, 0, 0
	for _, p := range r.GetParticipants() {
		switch {
		case out(p):
			left++
		case p.GetWave() != r.GetWave():
		case p.GetSafe() == commandv1.Safe_SAFE_EXCLUDED:
			excluded++
		default:
			asked++
			if refused(p) {
				e.giveUp(r, refusal(r, p))
				return
			}
			if preparedAll(p) {
				prepared++
			}
		}
	}
	switch {
	case left == len(r.GetParticipants()):
		e.giveUp(r, "no participant is left: the nodes that were asked have left the cluster")
	case r.GetPaused(), prepared < asked, excluded > 0 && !quorum(r):
		e.storeReload(r)
	case asked == 0 && excluded > 0 && r.GetGeneration() == 0:
		e.storeReload(r) // nobody has said yet that it works
	default:
		e.commit(r)
		e.decideCommitted(r)
	}
}

func refused(p *commandv1.Participant) bool {
	return slices.ContainsFunc(p.GetMounts(), func(o *commandv1.MountOutcome) bool {
		return o.GetVerdict() == commandv1.Verdict_VERDICT_REFUSED
	})
}

func refusal(r *commandv1.Reload, p *commandv1.Participant) string {
	for _, o := range p.GetMounts() {
		if o.GetVerdict() == commandv1.Verdict_VERDICT_REFUSED {
			return "node " + p.GetName() + " refused " + targetPath(r, o.GetMountUuid()) + ": " +
				o.GetReport().GetFailedPhase() + ": " + o.GetReport().GetCause()
		}
	}
	return ""
}

func targetPath(r *commandv1.Reload, uuid string) string {
	t := findTarget(r, uuid)
	if t.GetTable() == typeAuth {
		return "auth/" + t.GetPath()
	}
	return t.GetPath()
}

func findTarget(r *commandv1.Reload, uuid string) *commandv1.Target {
	for _, t := range r.GetTargets() {
		if t.GetMountUuid() == uuid {
			return t
		}
	}
	return nil
}

func findParticipant(r *commandv1.Reload, node string) *commandv1.Participant {
	for _, p := range r.GetParticipants() {
		if p.GetNodeId() == node {
			return p
		}
	}
	return nil
}

func findOutcome(p *commandv1.Participant, uuid string) *commandv1.MountOutcome {
	for _, o := range p.GetMounts() {
		if o.GetMountUuid() == uuid {
			return o
		}
	}
	return nil
}

func preparedAll(p *commandv1.Participant) bool {
	for _, o := range p.GetMounts() {
		if !o.GetPrepared() && o.GetVerdict() != commandv1.Verdict_VERDICT_UNMOUNTED {
			return false
		}
	}
	return true
}

// quorum reports whether a majority of the voters has prepared, or is not asked yet: nodes of later waves keep what they
// have until their own vote. The voters are those that the leader named when it excluded somebody; without names, every
// participant counts as one.
func quorum(r *commandv1.Reload) bool {
	have, all := 0, len(r.GetVoters())
	if all == 0 {
		all = len(r.GetParticipants())
	}
	for _, p := range r.GetParticipants() {
		if out(p) || p.GetSafe() == commandv1.Safe_SAFE_EXCLUDED || p.GetWave() <= r.GetWave() && !preparedAll(p) {
			continue
		}
		if len(r.GetVoters()) == 0 || slices.Contains(r.GetVoters(), p.GetNodeId()) {
			have++
		}
	}
	return have > all/2
}

// commit decides for the switch of the current wave (of everybody, where there are no waves). The first commit's index is
// the generation of the whole reload.
func (e *entry) commit(r *commandv1.Reload) {
	if r.GetGeneration() == 0 {
		r.Generation, r.CommitWallMs = e.index, e.wallMS
	}
	last := true
	if w := currentWave(r); w != nil {
		w.CommittedIndex = e.index
		last = int(r.GetWave()) == len(r.GetWaves())-1
	}
	wide := e.wide(r)
	for _, t := range r.GetTargets() {
		if m := get(&e.mounts, t.GetMountUuid()); m != nil && !t.GetUnmounted() {
			m = clone(m)
			e.commitMount(r, t, m, last, wide)
			e.putMount(m)
		}
	}
	for _, p := range r.GetParticipants() {
		if p.GetSafe() == commandv1.Safe_SAFE_EXCLUDED && p.GetWave() <= r.GetWave() {
			// Left out of the vote is not safe: its lease may be renewed until it has applied this entry. FenceNode says
			// that it was not, or the node itself that it has switched.
			p.Safe = commandv1.Safe_SAFE_UNSPECIFIED
		}
	}
	if orig := get(&e.reloads, r.GetRollsBack()); orig != nil && orig.GetRolledBackBy() == "" {
		orig = clone(orig)
		orig.RolledBackBy = r.GetId()
		e.storeReload(orig)
	}
	e.enterPhase(r, commandv1.Phase_PHASE_COMMITTED)
}

func (e *entry) commitMount(r *commandv1.Reload, t *commandv1.Target, m *commandv1.Mount, last, wide bool) {
	want := &commandv1.Wanted{
		Generation: r.GetGeneration(), Spec: t.GetTo(), FreshSince: r.GetGeneration(), ReloadId: r.GetId(),
	}
	if r.GetToPrevious() {
		want.FreshSince = m.GetPrevious().GetFreshSince()
	}
	for _, p := range r.GetParticipants() {
		if p.GetWave() != r.GetWave() {
			continue
		}
		own := overrideOf(m, p.GetNodeId()).GetWanted()
		if o := findOutcome(p, t.GetMountUuid()); o != nil && own != nil && own.GetReloadId() != r.GetId() {
			o.Was = own
		}
		if out(p) || wide && last {
			continue
		}
		why := commandv1.Override_WHY_WAVE
		if !wide {
			why = commandv1.Override_WHY_LOCAL
		}
		setOverride(m, &commandv1.Override{NodeId: p.GetNodeId(), Wanted: want, Why: why})
	}
	if !wide || !last {
		return
	}
	m.Previous, m.Wanted, m.Overrides = m.GetWanted(), want, nil
	switch {
	case r.GetToPrevious() && m.GetConfiguredVersion() != "":
		m.ConfiguredVersion = t.GetTo().GetVersion()
	case r.GetOptions().GetVersion() != "":
		m.ConfiguredVersion = r.GetOptions().GetVersion()
	}
}

// settled reports whether the committed reload waits for nothing more from a participant.
func settled(p *commandv1.Participant) bool {
	if out(p) {
		return true
	}
	return p.GetSafe() != commandv1.Safe_SAFE_UNSPECIFIED && judged(p)
}

// judged reports whether every mount of a participant has a verdict that stands.
func judged(p *commandv1.Participant) bool {
	return !slices.ContainsFunc(p.GetMounts(), openOutcome)
}

// openOutcome reports whether a mount has no verdict that stands: a switch that failed is tried again.
func openOutcome(o *commandv1.MountOutcome) bool {
	return o.GetVerdict() == commandv1.Verdict_VERDICT_UNSPECIFIED || o.GetVerdict() == commandv1.Verdict_VERDICT_FAILED_SWITCH
}

func (e *entry) decideCommitted(r *commandv1.Reload) {
	if why := failedSwitch(r); why != "" {
		e.rollBack(r, why)
		return
	}
	for _, p := range r.GetParticipants() {
		if p.GetWave() <= r.GetWave() && !settled(p) {
			e.storeReload(r)
			return
		}
	}
	w := currentWave(r)
	if w == nil {
		e.finish(r, commandv1.Phase_PHASE_DONE, "")
		return
	}
	if w.GetBakeFromNs() == 0 {
		w.BakeFromNs = max(e.clock, 1)
	}
	e.storeReload(r)
}

// failedSwitch says why a committed reload must be rolled back, where it is one that rolls back by itself.
func failedSwitch(r *commandv1.Reload) string {
	o := r.GetOptions()
	if r.GetRollsBack() != "" || bestEffort(r) ||
		!o.GetRollbackOnSwitchFailure() && o.GetStrategy() != commandv1.Strategy_STRATEGY_CANARY {
		return ""
	}
	for _, p := range r.GetParticipants() {
		for _, m := range p.GetMounts() {
			if !out(p) && m.GetVerdict() == commandv1.Verdict_VERDICT_FAILED_SWITCH {
				return "node " + p.GetName() + " could not switch " + targetPath(r, m.GetMountUuid()) + ": " +
					m.GetReport().GetCause()
			}
		}
	}
	return ""
}

// giveUp ends a reload that could not be prepared: nothing has changed yet, or the waves that have are rolled back.
func (e *entry) giveUp(r *commandv1.Reload, why string) {
	if r.GetGeneration() != 0 {
		e.rollBack(r, why)
		return
	}
	e.finish(r, commandv1.Phase_PHASE_ABORTED, why)
}
