package reload

import (
	"context"
	"sort"
	"time"

	commandv1 "rollcall/proto/command/v1"
)

// capFactor bounds what leader changes can add: a phase that has lasted this many times its duration by the log's clock
// when a new leader meets it is over at once.
const capFactor = 2

// phaseTimer is one phase's deadline. Deadlines are durations: a new leader starts them again, under a total cap.
type phaseTimer struct {
	phase commandv1.Phase
	wave  uint32
	at    time.Time
	// stopped: nothing is waited for (a bake, a pause), so nothing expires.
	stopped bool
}

func (t *phaseTimer) left(now time.Time) time.Duration {
	if t == nil || t.stopped {
		return time.Hour
	}
	return max(t.at.Sub(now), time.Millisecond)
}

// expire ends a phase that has lasted too long.
func (ld *leader) expire(ctx context.Context, v View, rl *commandv1.Reload, now time.Time) bool {
	t := ld.timers[rl.GetId()]
	stopped := rl.GetPaused() || baking(rl)
	if t == nil || t.phase != rl.GetPhase() || t.wave != rl.GetWave() || t.stopped && !stopped {
		t = &phaseTimer{phase: rl.GetPhase(), wave: rl.GetWave()}
		d := ld.r.phaseLength(rl)
		left := d
		if used := time.Duration(v.ClockNS() - rl.GetPhaseClockNs()); v.ClockNS() > rl.GetPhaseClockNs() {
			left = min(d, capFactor*d-used)
		}
		t.at = now.Add(left)
		ld.timers[rl.GetId()] = t
	}
	t.stopped = stopped
	if t.stopped || now.Before(t.at) {
		return false
	}
	t.at = now.Add(time.Second)
	ld.r.log.Info("phase expired", "reload_id", rl.GetId(), "phase", rl.GetPhase().String(), "wave", rl.GetWave())
	ld.propose(ctx, "expire reload", &commandv1.Command{Body: &commandv1.Command_ExpireReload{
		ExpireReload: &commandv1.ExpireReload{Id: rl.GetId(), Phase: rl.GetPhase(), Wave: rl.GetWave()},
	}})
	return true
}

// phaseLength is how long the phase that a reload is in may last.
func (r *Reloads) phaseLength(rl *commandv1.Reload) time.Duration {
	o := rl.GetOptions()
	pick := func(ms int64, d time.Duration) time.Duration {
		if ms > 0 {
			return time.Duration(ms) * time.Millisecond
		}
		return d
	}
	switch rl.GetPhase() {
	case commandv1.Phase_PHASE_QUEUED:
		return pick(o.GetQueueMs(), r.cfg.QueueDeadline)
	case commandv1.Phase_PHASE_PREPARING:
		return pick(o.GetPrepareMs(), r.cfg.PrepareDeadline)
	default:
		return pick(o.GetRunMs(), r.cfg.RunDeadline)
	}
}

// exclude leaves out participants whose serving lease is provably over, once everybody else is prepared and a quorum of
// the voters is among them. Mounts without fencing have no lease that could end.
func (ld *leader) exclude(ctx context.Context, rl *commandv1.Reload) bool {
	if rl.GetOptions().GetKeepFenced() || unfenced(rl) {
		return false
	}
	var over []*commandv1.Participant
	prepared := map[string]bool{}
	for _, p := range rl.GetParticipants() {
		if p.GetSafe() == commandv1.Safe_SAFE_EXCLUDED || p.GetSafe() == commandv1.Safe_SAFE_LEFT {
			continue
		}
		if p.GetWave() != rl.GetWave() {
			// It has voted, or keeps what it has until it does.
			prepared[p.GetNodeId()] = true
			continue
		}
		switch {
		case preparedAll(rl, p):
			prepared[p.GetNodeId()] = true
		case p.GetNodeId() != ld.r.self && ld.r.cfg.Replica.LeaseOver(p.GetNodeId(), p.GetIncarnation()):
			over = append(over, p)
		default:
			return false
		}
	}
	if len(over) == 0 || !ld.quorum(rl, prepared) {
		return false
	}
	p := over[0]
	if !ld.once("exclude/" + rl.GetId() + "/" + p.GetNodeId()) {
		return false
	}
	return ld.fenced(p, func() {
		ld.r.log.Warn("leaving out a node without a lease", "reload_id", rl.GetId(), "excluded", p.GetNodeId())
		ld.propose(ctx, "exclude node", &commandv1.Command{Body: &commandv1.Command_ExcludeNode{
			ExcludeNode: &commandv1.ExcludeNode{
				ReloadId: rl.GetId(), NodeId: p.GetNodeId(), Incarnation: p.GetIncarnation(),
				Voters: ld.r.cfg.Replica.Voters(),
			},
		}})
	})
}

// fence says of participants of a committed reload that they can no longer answer: their lease is over.
func (ld *leader) fence(ctx context.Context, rl *commandv1.Reload) bool {
	for _, p := range rl.GetParticipants() {
		if p.GetSafe() != commandv1.Safe_SAFE_UNSPECIFIED || p.GetNodeId() == ld.r.self || p.GetWave() > rl.GetWave() ||
			!ld.r.cfg.Replica.LeaseOver(p.GetNodeId(), p.GetIncarnation()) {
			continue
		}
		if unfenceable(rl) || !ld.once("fence/"+rl.GetId()+"/"+p.GetNodeId()) {
			continue
		}
		did := ld.fenced(p, func() {
			ld.r.log.Warn("fencing a node whose lease is over", "reload_id", rl.GetId(), "fenced", p.GetNodeId())
			ld.propose(ctx, "fence node", &commandv1.Command{Body: &commandv1.Command_FenceNode{
				FenceNode: &commandv1.FenceNode{ReloadId: rl.GetId(), NodeId: p.GetNodeId(), Incarnation: p.GetIncarnation()},
			}})
		})
		if did {
			return true
		}
	}
	return false
}

// unfenceable reports whether a lease proves nothing, because every target answers without one.
func unfenceable(rl *commandv1.Reload) bool {
	for _, t := range rl.GetTargets() {
		if !t.GetUnmounted() && t.GetFencing() != "none" {
			return false
		}
	}
	return true
}

// once answers true at most once a second for a key: an entry that the state machine did not act on is not entered
// again and again.
func (ld *leader) once(key string) bool {
	now := time.Now()
	if now.Before(ld.tries[key]) {
		return false
	}
	ld.tries[key] = now.Add(time.Second)
	return true
}

// fenced runs do while the node gets no grants, provided that its lease is still over then.
func (ld *leader) fenced(p *commandv1.Participant, do func()) bool {
	end := ld.r.cfg.Replica.BeginFence(p.GetNodeId())
	defer end()
	if !ld.r.cfg.Replica.LeaseOver(p.GetNodeId(), p.GetIncarnation()) {
		return false
	}
	do()
	return true
}

// unfenced reports whether some target answers without a lease.
func unfenced(rl *commandv1.Reload) bool {
	for _, t := range rl.GetTargets() {
		if !t.GetUnmounted() && t.GetFencing() == "none" {
			return true
		}
	}
	return false
}

func preparedAll(rl *commandv1.Reload, p *commandv1.Participant) bool {
	for _, o := range p.GetMounts() {
		if !answered(rl, p, o) {
			return false
		}
	}
	return true
}

// quorum reports whether a majority of the voters that take part in the reload's cluster is prepared. A reload of one
// node has nobody else to ask.
func (ld *leader) quorum(rl *commandv1.Reload, prepared map[string]bool) bool {
	voters := ld.r.cfg.Replica.Voters()
	if rl.GetScope() == commandv1.Scope_SCOPE_LOCAL || len(voters) == 0 {
		return false
	}
	n := 0
	for _, id := range voters {
		if prepared[id] {
			n++
		}
	}
	return n > len(voters)/2
}

// retain has records dropped that have been over for long enough, at most once a minute.
func (ld *leader) retain(ctx context.Context, v View, now time.Time) bool {
	if now.Before(ld.retainAt) {
		return false
	}
	ld.retainAt = now.Add(time.Minute)
	keep := uint64(ld.r.cfg.RetainFor)
	if v.ClockNS() <= keep {
		return false
	}
	before := v.ClockNS() - keep
	for _, rl := range v.Reloads() {
		if terminal(rl.GetPhase()) && rl.GetEndClockNs() < before {
			return ld.propose(ctx, "drop reloads", &commandv1.Command{Body: &commandv1.Command_DropReloads{
				DropReloads: &commandv1.DropReloads{BeforeClockNs: before},
			}})
		}
	}
	return false
}

// reportsOf turns a batch into reports, sorted by reload, node and mount.
func reportsOf(b batch) []*commandv1.Report {
	keys := make([]batchKey, 0, len(b))
	for k := range b {
		keys = append(keys, k)
	}
	sort.Slice(keys, func(i, j int) bool {
		a, b := keys[i], keys[j]
		switch {
		case a.reload != b.reload:
			return a.reload < b.reload
		case a.node != b.node:
			return a.node < b.node
		case a.incarnation != b.incarnation:
			return a.incarnation < b.incarnation
		}
		return a.mount < b.mount
	})
	var out []*commandv1.Report
	for _, k := range keys {
		n := len(out)
		if n == 0 || out[n-1].GetReloadId() != k.reload || out[n-1].GetNodeId() != k.node ||
			out[n-1].GetIncarnation() != k.incarnation {
			out = append(out, &commandv1.Report{ReloadId: k.reload, NodeId: k.node, Incarnation: k.incarnation})
			n++
		}
		out[n-1].Mounts = append(out[n-1].Mounts, b[k].rep)
	}
	return out
}
