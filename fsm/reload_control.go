package fsm

import (
	"strings"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// expireReload ends the phase that the leader's timer was for, when the reload is still in it.
func (e *entry) expireReload(c *commandv1.ExpireReload) error {
	stored := e.findReload(c.GetId())
	if stored == nil {
		return fault.Text(fault.NotFound, "no reload with id %q", trim(c.GetId(), maxName))
	}
	if stored.GetPhase() != c.GetPhase() || stored.GetWave() != c.GetWave() {
		return fault.Text(fault.Stale, "reload %s is not in that phase any more", stored.GetId())
	}
	r := clone(stored)
	switch r.GetPhase() {
	case commandv1.Phase_PHASE_QUEUED:
		e.finish(r, commandv1.Phase_PHASE_ABORTED, "waited too long for the reloads before it")
	case commandv1.Phase_PHASE_PREPARING:
		e.giveUp(r, "not every node prepared in time: "+missing(r))
	case commandv1.Phase_PHASE_COMMITTED:
		if len(r.GetWaves()) > 0 && !finalWave(r) {
			// Ended between waves, the cluster would run two versions with nobody in charge.
			e.rollBack(r, "ran out of time in wave "+ordinal(r)+": "+missing(r))
			return nil
		}
		e.finish(r, commandv1.Phase_PHASE_DONE, "ran out of time: "+missing(r))
	default:
		return fault.Text(fault.Stale, "reload %s has ended", r.GetId())
	}
	return nil
}

// finalWave reports whether the last wave is committed: the mounts themselves want the new generation then.
func finalWave(r *commandv1.Reload) bool {
	w := currentWave(r)
	return w != nil && int(r.GetWave()) == len(r.GetWaves())-1 && w.GetCommittedIndex() > 0
}

// missing names who is waited for.
func missing(r *commandv1.Reload) string {
	var names []string
	for _, p := range r.GetParticipants() {
		waits := p.GetWave() <= r.GetWave() && !settled(p)
		if r.GetPhase() == commandv1.Phase_PHASE_PREPARING {
			waits = p.GetWave() == r.GetWave() && !out(p) && !preparedAll(p)
		}
		if waits {
			names = append(names, p.GetName())
		}
	}
	if len(names) == 0 {
		return "nobody is waited for"
	}
	return "waited for " + trim(strings.Join(names, ", "), maxName)
}

// controlReload is what an operator may do to a reload under way.
func (e *entry) controlReload(c *commandv1.ControlReload) error {
	stored := e.findReload(c.GetId())
	if stored == nil {
		return fault.Text(fault.NotFound, "no reload with id %q", trim(c.GetId(), maxName))
	}
	e.res.Id = stored.GetId()
	if !holds(stored.GetPhase()) && stored.GetPhase() != commandv1.Phase_PHASE_QUEUED {
		return invalid("reload %s has ended or is rolling back", stored.GetId())
	}
	r := clone(stored)
	switch c.GetAction() {
	case commandv1.ControlReload_ACTION_ABORT:
		return e.abortReload(r, c)
	case commandv1.ControlReload_ACTION_PAUSE:
		if len(r.GetWaves()) == 0 && !waving(r) {
			return invalid("reload %s has no waves: there is nothing to pause between", r.GetId())
		}
		r.Paused, r.Why = true, said("paused", c)
		e.storeReload(r)
	case commandv1.ControlReload_ACTION_RESUME:
		e.resumeReload(r)
	case commandv1.ControlReload_ACTION_PROMOTE:
		w := currentWave(r)
		if w == nil || r.GetPhase() != commandv1.Phase_PHASE_COMMITTED || w.GetBakeFromNs() == 0 {
			return invalid("reload %s has no wave that is up and could be promoted", r.GetId())
		}
		w.Why = said("promoted", c)
		r.Paused, r.Why = false, ""
		e.nextWave(r)
	default:
		return invalid("unknown action %d", int32(c.GetAction()))
	}
	return nil
}

func waving(r *commandv1.Reload) bool {
	s := r.GetOptions().GetStrategy()
	return s == commandv1.Strategy_STRATEGY_ROLLING || s == commandv1.Strategy_STRATEGY_CANARY
}

func said(what string, c *commandv1.ControlReload) string {
	if c.GetRequestedBy() != "" {
		what += " by " + trim(c.GetRequestedBy(), maxName)
	}
	if c.GetWhy() != "" {
		what += ": " + trim(c.GetWhy(), maxText)
	}
	return what
}

func (e *entry) abortReload(r *commandv1.Reload, c *commandv1.ControlReload) error {
	switch {
	case r.GetGeneration() == 0:
		e.finish(r, commandv1.Phase_PHASE_ABORTED, said("aborted", c))
	case len(r.GetWaves()) > 0:
		e.rollBack(r, said("aborted", c))
	default:
		return invalid("reload %s is committed: every node goes forward now. Roll it back when it is done", r.GetId())
	}
	return nil
}

func (e *entry) resumeReload(r *commandv1.Reload) {
	if !r.GetPaused() {
		e.res.Repeated = true
		return
	}
	r.Paused, r.Why = false, ""
	if w := currentWave(r); w.GetBakeFromNs() > 0 {
		w.BakeFromNs, w.Gate = max(e.clock, 1), nil // what was measured before the pause says little now
	}
	e.enterPhase(r, r.GetPhase())
	if r.GetPhase() == commandv1.Phase_PHASE_QUEUED {
		e.storeReload(r)
		return
	}
	e.decide(r)
}
