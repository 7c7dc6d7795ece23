package fsm

import (
	"cmp"
	"slices"
	"strings"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

func currentWave(r *commandv1.Reload) *commandv1.WaveState {
	if i := int(r.GetWave()); i < len(r.GetWaves()) {
		return r.GetWaves()[i]
	}
	return nil
}

// planWaves gives every participant its wave: the followers in order of id, the leader last and alone.
func planWaves(r *commandv1.Reload) {
	if !waving(r) {
		return
	}
	r.Waves = nil
	var todo []*commandv1.Participant
	var leader *commandv1.Participant
	for _, p := range r.GetParticipants() {
		if p.GetNodeId() == r.GetLeaderId() {
			leader = p
		} else {
			todo = append(todo, p)
		}
	}
	n := uint32(0)
	for _, size := range waveSizes(r.GetOptions(), len(todo), len(r.GetParticipants())) {
		for _, p := range todo[:size] {
			p.Wave = n
		}
		todo = todo[size:]
		n++
	}
	if leader != nil {
		leader.Wave = n
		n++
	}
	for i := range n {
		r.Waves = append(r.Waves, &commandv1.WaveState{Number: i})
	}
}

// waveSizes cuts n followers into waves. A count is the size of its wave; a percentage says how many of all participants
// have been reached when its wave is through. What no wave names comes in one more (canary), or in more of the same
// (rolling). No wave is larger than max_unavailable.
func waveSizes(o *commandv1.Options, n, all int) []int {
	limit := int(min(o.GetMaxUnavailable(), 1<<30))
	if limit == 0 {
		limit = n
	}
	var sizes []int
	left := n
	add := func(size int) {
		size = min(size, left)
		left -= size
		for size > 0 {
			cut := min(size, limit)
			sizes = append(sizes, cut)
			size -= cut
		}
	}
	waves := o.GetWaves()
	if o.GetStrategy() == commandv1.Strategy_STRATEGY_ROLLING && len(waves) == 0 {
		waves = []*commandv1.Options_Wave{{Size: cmp.Or(min(o.GetMaxUnavailable(), 1<<30), 1)}}
	}
	if o.GetStrategy() == commandv1.Strategy_STRATEGY_CANARY && len(waves) == 0 {
		waves = []*commandv1.Options_Wave{{Size: 1}}
	}
	for _, w := range waves {
		size := int(min(w.GetSize(), 1<<30))
		if w.GetPercent() {
			size = max((size*all+99)/100-(n-left), 0)
		}
		add(size)
	}
	for left > 0 {
		size := left
		if last := waves[len(waves)-1]; o.GetStrategy() == commandv1.Strategy_STRATEGY_ROLLING && !last.GetPercent() {
			size = int(min(last.GetSize(), 1<<30))
		}
		add(max(size, 1))
	}
	return sizes
}

// joiningWave is where a node that has just joined votes: in the current wave while it prepares, else in the next one.
// Where that is the leader's own, the leader moves one further.
func joiningWave(r *commandv1.Reload) uint32 {
	if len(r.GetWaves()) == 0 {
		return 0
	}
	if r.GetPhase() != commandv1.Phase_PHASE_COMMITTED {
		return r.GetWave()
	}
	w := r.GetWave() + 1
	if leader := findParticipant(r, r.GetLeaderId()); leader != nil && leader.GetWave() == w && int(w) == len(r.GetWaves())-1 {
		leader.Wave++
		r.Waves = append(r.Waves, &commandv1.WaveState{Number: leader.GetWave()})
	}
	return w
}

func insertParticipant(r *commandv1.Reload, p *commandv1.Participant) {
	i, _ := slices.BinarySearchFunc(r.GetParticipants(), p.GetNodeId(), func(q *commandv1.Participant, id string) int {
		return strings.Compare(q.GetNodeId(), id)
	})
	r.Participants = slices.Insert(r.Participants, i, p)
}

func ordinal(r *commandv1.Reload) string {
	const digits = "0123456789"
	n := int(r.GetWave()) + 1
	s := ""
	for n > 0 {
		s, n = string(digits[n%10])+s, n/10
	}
	return s
}

// advanceWave takes the gate's verdict on the wave that bakes.
func (e *entry) advanceWave(c *commandv1.AdvanceWave) error {
	stored := e.findReload(c.GetReloadId())
	if stored == nil {
		return fault.Text(fault.NotFound, "no reload with id %q", trim(c.GetReloadId(), maxName))
	}
	w := currentWave(stored)
	if w == nil || stored.GetPhase() != commandv1.Phase_PHASE_COMMITTED || stored.GetWave() != c.GetWave() {
		return fault.Text(fault.Stale, "reload %s is not in wave %d", stored.GetId(), uint64(c.GetWave())+1)
	}
	r := clone(stored)
	w = currentWave(r)
	e.res.Id = r.GetId()
	if moved := e.noteLeader(r, w, c.GetLeaderId()); moved {
		e.storeReload(r)
		return nil
	}
	g := c.GetGate()
	switch {
	case g.GetVerdict() == commandv1.Gate_VERDICT_UNSPECIFIED:
		e.storeReload(r)
		return nil
	case w.GetBakeFromNs() == 0:
		return fault.Text(fault.Stale, "wave %s of reload %s is not up yet", ordinal(r), r.GetId())
	case r.GetPaused() && g.GetVerdict() != commandv1.Gate_VERDICT_FAILED:
		return fault.Text(fault.Conflict, "reload %s is paused", r.GetId())
	}
	g.Why = trim(g.GetWhy(), maxText)
	w.Gate = g
	switch g.GetVerdict() {
	case commandv1.Gate_VERDICT_PASSED:
		e.nextWave(r)
	case commandv1.Gate_VERDICT_FAILED:
		e.rollBack(r, "the gate of wave "+ordinal(r)+" failed: "+g.GetWhy())
	default:
		r.Paused, r.Why = true, "the gate of wave "+ordinal(r)+" is inconclusive: "+g.GetWhy()
		e.storeReload(r)
	}
	return nil
}

// noteLeader keeps the leader last. When leadership has moved to a node of the other generation, what was measured is of
// two leaders: the bake starts again.
func (e *entry) noteLeader(r *commandv1.Reload, w *commandv1.WaveState, id string) (restarted bool) {
	if id == "" || id == r.GetLeaderId() {
		return false
	}
	was, is := findParticipant(r, r.GetLeaderId()), findParticipant(r, id)
	r.LeaderId = id
	if is == nil {
		return false
	}
	replanWaves(r)
	if w.GetBakeFromNs() > 0 && was != nil && (was.GetWave() <= r.GetWave()) != (is.GetWave() <= r.GetWave()) {
		w.BakeFromNs, w.Gate = max(e.clock, 1), nil
		w.Why = "leadership moved to " + is.GetName() + ", which runs the other generation: the bake started again"
		return true
	}
	return false
}

// replanWaves moves the leader behind the waves that are still to come, and the one that was last among them before it.
func replanWaves(r *commandv1.Reload) {
	p := findParticipant(r, r.GetLeaderId())
	last := uint32(len(r.GetWaves())) - 1
	if p == nil || p.GetWave() <= r.GetWave() || p.GetWave() == last {
		return
	}
	old := p.GetWave()
	for _, q := range r.GetParticipants() {
		if q.GetWave() == last {
			q.Wave = old
		}
	}
	p.Wave = last
}

// nextWave ends the current wave's bake and asks the next one to prepare; after the last one the reload is done.
func (e *entry) nextWave(r *commandv1.Reload) {
	currentWave(r).Passed = true
	if int(r.GetWave()) == len(r.GetWaves())-1 {
		e.finish(r, commandv1.Phase_PHASE_DONE, "")
		return
	}
	if down := downIn(r); r.GetOptions().GetMaxUnavailable() > 0 && down >= int64(r.GetOptions().GetMaxUnavailable()) {
		r.Paused = true
		r.Why = "paused: as many nodes are down as max_unavailable allows"
	}
	r.Wave++
	e.enterPhase(r, commandv1.Phase_PHASE_PREPARING)
	e.decide(r)
}

func downIn(r *commandv1.Reload) (n int64) {
	for _, p := range r.GetParticipants() {
		if !out(p) && p.GetSafe() == commandv1.Safe_SAFE_FENCED && openVerdict(p) {
			n++
		}
	}
	return n
}
