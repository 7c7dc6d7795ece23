package fsm

import (
	"fmt"
	"slices"

	commandv1 "rollcall/proto/command/v1"
)

// finish ends a reload in a terminal phase: open verdicts are filled in with what is known, the outcome is computed from
// the verdicts, and what waited for its targets begins.
func (e *entry) finish(r *commandv1.Reload, p commandv1.Phase, why string) {
	e.enterPhase(r, p)
	if why != "" {
		r.Why = trim(why, maxText)
	}
	r.EndIndex, r.EndClockNs, r.EndWallMs = e.index, e.clock, e.wallMS
	closeVerdicts(r)
	e.conclude(r)
	e.storeReload(r)
	e.settleRolledBack(r)
	e.promote()
}

// closeVerdicts gives every open mount of every participant its last word. After an abort nothing has changed. After a
// commit, a node that is known to be unable to answer with the old generation is pending; of any other nobody can say.
func closeVerdicts(r *commandv1.Reload) {
	for _, p := range r.GetParticipants() {
		if out(p) {
			continue
		}
		for _, o := range p.GetMounts() {
			switch {
			case o.GetVerdict() != commandv1.Verdict_VERDICT_UNSPECIFIED:
			case r.GetPhase() != commandv1.Phase_PHASE_DONE:
				o.Verdict = commandv1.Verdict_VERDICT_UNCHANGED
			case p.GetSafe() != commandv1.Safe_SAFE_UNSPECIFIED || o.GetSafe():
				o.Verdict = commandv1.Verdict_VERDICT_PENDING_DOWN
			default:
				o.Verdict = commandv1.Verdict_VERDICT_UNCONFIRMED
			}
		}
	}
}

// noteUnconfirmed lists the participants of which nobody can say whether the old generation still answers there.
func noteUnconfirmed(r *commandv1.Reload) {
	r.Unconfirmed = nil
	for _, p := range r.GetParticipants() {
		if slices.ContainsFunc(p.GetMounts(), func(o *commandv1.MountOutcome) bool {
			return o.GetVerdict() == commandv1.Verdict_VERDICT_UNCONFIRMED
		}) {
			r.Unconfirmed = append(r.Unconfirmed, p.GetNodeId())
		}
	}
}

// conclude computes what is said of the whole from the verdicts, and nothing else.
func (e *entry) conclude(r *commandv1.Reload) {
	noteUnconfirmed(r)
	r.Outcome = outcomeOf(r)
	for _, id := range append([]string{r.GetId()}, r.GetAliases()...) {
		if row := get(&e.reloadIDs, id); row != nil && row.GetOutcome() != r.GetOutcome() {
			row = clone(row)
			row.Outcome = r.GetOutcome()
			e.putReloadID(row)
		}
	}
}

func outcomeOf(r *commandv1.Reload) string {
	switch r.GetPhase() {
	case commandv1.Phase_PHASE_ABORTED:
		return OutcomeAborted
	case commandv1.Phase_PHASE_ROLLED_BACK:
		return OutcomeRolledBack
	default:
	}
	good, bad := 0, 0
	for _, p := range r.GetParticipants() {
		if out(p) {
			continue
		}
		for _, o := range p.GetMounts() {
			switch o.GetVerdict() {
			case commandv1.Verdict_VERDICT_SWITCHED, commandv1.Verdict_VERDICT_UNCHANGED,
				commandv1.Verdict_VERDICT_PUT_BACK, commandv1.Verdict_VERDICT_CONVERGED_LATE:
				good++
			case commandv1.Verdict_VERDICT_UNMOUNTED:
			default:
				bad++
			}
		}
	}
	switch {
	case good > 0 && bad == 0:
		return OutcomeSucceeded
	case good > 0:
		return OutcomePartial
	case bad > 0:
		return OutcomeFailed
	default:
		return OutcomeNothing
	}
}

// rollBack turns a committed reload round: a new reload with a generation of its own takes the targets back to the spec
// that they had, committed at once, because every node ran it a moment ago. What never moved is only relabelled.
func (e *entry) rollBack(r *commandv1.Reload, why string) {
	id := r.GetId() + ".rollback"
	for n := 2; get(&e.reloads, id) != nil || get(&e.reloadIDs, id) != nil; n++ {
		id = fmt.Sprintf("%s.rollback-%d", r.GetId(), n)
	}
	// What r has moved decides, not what the cluster has become since: a node may have joined a cluster of one.
	wide := e.wide(r) || slices.ContainsFunc(r.GetTargets(), func(t *commandv1.Target) bool {
		return get(&e.mounts, t.GetMountUuid()).GetWanted().GetReloadId() == r.GetId()
	})
	back := &commandv1.Reload{
		Id: id, Selector: r.GetSelector(), Namespace: r.GetNamespace(), Scope: r.GetScope(), ServingNode: r.GetServingNode(),
		Options: clone(r.GetOptions()), RequestedBy: r.GetRequestedBy(), ToPrevious: true, RollsBack: r.GetId(),
		LeaderId: r.GetLeaderId(), StartIndex: e.index, PrepareIndex: e.index, Generation: e.index,
		StartClockNs: e.clock, StartWallMs: e.wallMS, PrepareWallMs: e.wallMS, CommitWallMs: e.wallMS, Why: trim(why, maxText),
	}
	back.Options.Version, back.Options.Waves = "", nil
	back.Options.Strategy = commandv1.Strategy_STRATEGY_ALL_OR_NOTHING
	back.RequestHash = RequestHash(&commandv1.StartReload{Id: id, RollsBack: id, ToPrevious: true, Scope: r.GetScope()})

	e.enterPhase(r, commandv1.Phase_PHASE_ROLLING_BACK)
	r.Why, r.RolledBackBy = trim(why, maxText), id
	e.storeReload(r) // lets its targets go

	for _, t := range r.GetTargets() {
		t = clone(t)
		t.From, t.To, t.FromGeneration = t.GetTo(), t.GetFrom(), r.GetGeneration()
		back.Targets = append(back.Targets, t)
		if m := get(&e.mounts, t.GetMountUuid()); m != nil && !t.GetUnmounted() {
			m = clone(m)
			takeBack(r, back, t, m, wide)
			e.putMount(m)
		}
	}
	for _, n := range e.liveNodes() {
		if wide || n.GetId() == r.GetServingNode() {
			back.Participants = append(back.Participants, participantOf(back, n))
		}
	}
	e.putReloadID(&commandv1.ReloadID{Id: id, RequestHash: back.GetRequestHash(), ClockNs: e.clock, Index: e.index})
	e.enterPhase(back, commandv1.Phase_PHASE_COMMITTED)
	e.decide(back)
}

// takeBack makes a mount want what it wanted before r, under the rollback's generation. t is the rollback's target.
func takeBack(r, back *commandv1.Reload, t *commandv1.Target, m *commandv1.Mount, wide bool) {
	relabel := func(old *commandv1.Wanted) *commandv1.Wanted {
		if old == nil {
			old = &commandv1.Wanted{Spec: t.GetTo(), FreshSince: back.GetGeneration()}
		}
		return &commandv1.Wanted{
			Generation: back.GetGeneration(), Spec: old.GetSpec(), FreshSince: old.GetFreshSince(), ReloadId: back.GetId(),
		}
	}
	if !wide {
		old := m.GetWanted()
		if o := findOutcome(findParticipant(r, r.GetServingNode()), m.GetUuid()); o.GetWas() != nil {
			old = o.GetWas()
		}
		setOverride(m, &commandv1.Override{
			NodeId: r.GetServingNode(), Wanted: relabel(old), Why: commandv1.Override_WHY_LOCAL,
		})
		t.To = old.GetSpec()
		return
	}
	if m.GetWanted().GetReloadId() == r.GetId() {
		m.Wanted, m.Previous = relabel(m.GetPrevious()), m.GetWanted()
		m.ConfiguredVersion = t.GetFromConfigured()
	} else {
		m.Wanted = relabel(m.GetWanted())
	}
	m.Overrides = nil
	t.To = m.GetWanted().GetSpec()
}

// settleRolledBack ends the reload that a rollback was for.
func (e *entry) settleRolledBack(back *commandv1.Reload) {
	orig := get(&e.reloads, back.GetRollsBack())
	if orig.GetPhase() != commandv1.Phase_PHASE_ROLLING_BACK {
		return
	}
	orig = clone(orig)
	for _, p := range orig.GetParticipants() {
		q := findParticipant(back, p.GetNodeId())
		for _, o := range p.GetMounts() {
			n := findOutcome(q, o.GetMountUuid())
			switch o.GetVerdict() {
			case commandv1.Verdict_VERDICT_SWITCHED, commandv1.Verdict_VERDICT_UNSPECIFIED, commandv1.Verdict_VERDICT_FAILED_SWITCH:
				if n.GetVerdict() == commandv1.Verdict_VERDICT_SWITCHED {
					o.Verdict = commandv1.Verdict_VERDICT_PUT_BACK
				} else if n != nil && o.GetVerdict() != commandv1.Verdict_VERDICT_FAILED_SWITCH {
					o.Verdict = n.GetVerdict()
				}
			default:
			}
		}
	}
	e.finish(orig, commandv1.Phase_PHASE_ROLLED_BACK, "")
}

// mountGone tells every reload that waits or runs that a mount was disabled.
func (e *entry) mountGone(uuid string) {
	for _, id := range e.openIDs() {
		r := get(&e.reloads, id)
		t := findTarget(r, uuid)
		if t == nil || t.GetUnmounted() || !holds(r.GetPhase()) {
			continue // one that waits looks for its mounts when its turn comes
		}
		r = clone(r)
		findTarget(r, uuid).Unmounted = true
		for _, p := range r.GetParticipants() {
			o := findOutcome(p, uuid)
			if openOutcome(o) || r.GetPhase() == commandv1.Phase_PHASE_PREPARING {
				o.Verdict = commandv1.Verdict_VERDICT_UNMOUNTED
			}
			markSafe(r, p)
		}
		e.active.Delete(uuid)
		if allUnmounted(r) {
			e.finish(r, commandv1.Phase_PHASE_DONE, "every mount was disabled meanwhile")
			continue
		}
		e.decide(r)
	}
	e.promote()
}

func allUnmounted(r *commandv1.Reload) bool {
	return !slices.ContainsFunc(r.GetTargets(), func(t *commandv1.Target) bool { return !t.GetUnmounted() })
}

// openIDs are the reloads that wait or run, oldest first, as they stand now: a list, because what is done to one of them
// may change the table.
func (s *state) openIDs() []string {
	var ids []string
	s.open.Scan(func(_, id string) bool {
		ids = append(ids, id)
		return true
	})
	return ids
}

// dropReloads forgets detailed records that ended before a clock value, and all but the newest of each namespace. The
// compact table keeps their ids.
func (e *entry) dropReloads(c *commandv1.DropReloads) error {
	if c.GetBeforeClockNs() > e.clock {
		return invalid("reloads can be dropped up to the log's clock, %d, not to %d", e.clock, c.GetBeforeClockNs())
	}
	kept := map[string]int{}
	var drop []*commandv1.Reload
	e.reloadSeq.Reverse(func(_, id string) bool {
		r := get(&e.reloads, id)
		if !terminal(r.GetPhase()) {
			return true
		}
		kept[r.GetNamespace()]++
		if kept[r.GetNamespace()] > KeepReloads || r.GetEndClockNs() < c.GetBeforeClockNs() {
			drop = append(drop, r)
		}
		return true
	})
	for _, r := range drop {
		e.deleteReload(r)
	}
	e.res.Repeated = len(drop) == 0
	return nil
}
