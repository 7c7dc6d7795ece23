package reload

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
	peerv1 "rollcall/proto/peer/v1"
)

// bake is the watch over one wave between its last switch and the gate.
type bake struct {
	reload string
	wave   uint32
	until  time.Time
	// asking: a round of questions is under way. next is when the following one is due.
	asking bool
	next   time.Time
	// before is what the wave's nodes measured at the old generation, taken while the wave prepared.
	before map[string][]*peerv1.MountTraffic
}

// gateResult is the answer of one round.
type gateResult struct {
	reload  string
	wave    uint32
	final   bool
	prelude bool
	samples map[string][]*peerv1.MountTraffic
}

// Bounds of the questions during a bake.
const (
	gateRound    = time.Second
	gateTimeout  = 2 * time.Second
	crashLoop    = 2
	gateParallel = 8
)

// baking reports whether a reload stands between the last switch of a wave and its gate.
func baking(rl *commandv1.Reload) bool {
	w := waveOf(rl)
	return rl.GetPhase() == commandv1.Phase_PHASE_COMMITTED && w.GetBakeFromNs() != 0 && !w.GetPassed()
}

// inWaves reports whether a reload goes in waves.
func inWaves(rl *commandv1.Reload) bool {
	s := rl.GetOptions().GetStrategy()
	return s == commandv1.Strategy_STRATEGY_ROLLING || s == commandv1.Strategy_STRATEGY_CANARY
}

func waveOf(rl *commandv1.Reload) *commandv1.WaveState {
	for _, w := range rl.GetWaves() {
		if w.GetNumber() == rl.GetWave() {
			return w
		}
	}
	return nil
}

// bakeOf keeps the watch over a reload's wave: it asks for a baseline while the wave prepares, looks for failures while
// it bakes, and closes the bake when its time is over. It answers when to look again, 0 when there is nothing to watch.
func (ld *leader) bakeOf(v View, rl *commandv1.Reload, now time.Time) time.Duration {
	if !inWaves(rl) || rl.GetPaused() {
		ld.endBake(rl.GetId())
		return 0
	}
	b := ld.bakes[rl.GetId()]
	if b == nil || b.wave != rl.GetWave() {
		b = &bake{reload: rl.GetId(), wave: rl.GetWave()}
		ld.bakes[rl.GetId()] = b
	}
	if rl.GetPhase() == commandv1.Phase_PHASE_PREPARING && b.before == nil && !b.asking {
		ld.ask(v, rl, b, gateResult{prelude: true})
		return 0
	}
	if !baking(rl) {
		return 0
	}
	if b.until.IsZero() {
		// A new leader starts the bake again: its nodes may have changed sides, and a longer bake harms nobody.
		b.until = now.Add(time.Duration(rl.GetOptions().GetBakeMs()) * time.Millisecond)
		b.next = now.Add(gateRound)
	}
	if b.asking {
		return 0
	}
	if now.Before(b.until) && now.Before(b.next) {
		return min(b.until.Sub(now), b.next.Sub(now))
	}
	ld.ask(v, rl, b, gateResult{final: !now.Before(b.until)})
	return 0
}

func (ld *leader) endBake(id string) { delete(ld.bakes, id) }

// ask gathers the traffic of all participants beside the loop, each within a limit, and hands it to the loop.
func (ld *leader) ask(v View, rl *commandv1.Reload, b *bake, res gateResult) {
	b.asking = true
	res.reload, res.wave, res.samples = rl.GetId(), rl.GetWave(), map[string][]*peerv1.MountTraffic{}
	req := &peerv1.TrafficRequest{}
	for _, t := range rl.GetTargets() {
		if !t.GetUnmounted() {
			req.MountUuids = append(req.MountUuids, t.GetMountUuid())
		}
	}
	var nodes []*commandv1.Node
	for _, p := range rl.GetParticipants() {
		if n := v.Node(p.GetNodeId()); n != nil {
			nodes = append(nodes, n)
		}
	}
	ctx := ld.ending
	ld.group.Go(func() {
		type answer struct {
			node   string
			mounts []*peerv1.MountTraffic
		}
		answers := make(chan answer, len(nodes))
		places := make(semaphore, gateParallel)
		for _, n := range nodes {
			ld.group.Go(func() {
				if !places.acquire(ctx) {
					answers <- answer{node: n.GetId()}
					return
				}
				defer places.release()
				answers <- answer{n.GetId(), ld.r.trafficOf(ctx, n, req)}
			})
		}
		for range nodes {
			if a := <-answers; a.mounts != nil {
				res.samples[a.node] = a.mounts
			}
		}
		select {
		case ld.gates <- res:
		case <-ctx.Done():
		}
	})
}

// trafficOf asks one node; nil when it does not answer.
func (r *Reloads) trafficOf(ctx context.Context, n *commandv1.Node, req *peerv1.TrafficRequest) []*peerv1.MountTraffic {
	if n.GetId() == r.self {
		return r.traffic(req)
	}
	ctx, cancel := context.WithTimeout(ctx, gateTimeout)
	defer cancel()
	conn, err := r.cfg.Peers.Dial(ctx, n)
	if err == nil {
		var res *peerv1.TrafficResponse
		if res, err = peerv1.NewReloadClient(conn).Traffic(ctx, req); err == nil {
			return res.GetMounts()
		}
	}
	r.log.Info("ask for traffic", "of", n.GetName(), "cause", fault.FromGRPC(err))
	return nil
}

// traffic is this node's part of a round.
func (r *Reloads) traffic(req *peerv1.TrafficRequest) []*peerv1.MountTraffic {
	out := []*peerv1.MountTraffic{}
	for _, uuid := range req.GetMountUuids() {
		t := r.cfg.Routes.Traffic(uuid)
		if t == nil {
			continue
		}
		if g := req.GetGeneration(); g != 0 && t.GetGeneration() != g {
			continue
		}
		t.MountUuid = uuid
		r.mu.Lock()
		l := r.loops[uuid]
		r.mu.Unlock()
		if l != nil {
			t.Crashes = max(t.GetCrashes(), l.status().Restarts)
		}
		out = append(out, t)
	}
	return out
}

// gated judges a round, and closes the bake when its time is over or the wave is seen to fail.
func (ld *leader) gated(ctx context.Context, res gateResult) {
	b := ld.bakes[res.reload]
	rl := ld.r.cfg.State.View().Reload(res.reload)
	if b == nil || b.wave != res.wave {
		return
	}
	b.asking, b.next = false, time.Now().Add(gateRound)
	if res.prelude {
		b.before = res.samples
		return
	}
	if rl.GetWave() != res.wave || !baking(rl) || rl.GetPaused() {
		return
	}
	gate := judge(rl, ld.r.self, res.samples, b.before)
	if !res.final && gate.GetVerdict() != commandv1.Gate_VERDICT_FAILED {
		return
	}
	ld.r.log.Info("gate", "reload_id", rl.GetId(), "wave", res.wave, "verdict", gate.GetVerdict().String(),
		"why", gate.GetWhy())
	ld.propose(ctx, "advance wave", &commandv1.Command{Body: &commandv1.Command_AdvanceWave{
		AdvanceWave: &commandv1.AdvanceWave{ReloadId: rl.GetId(), Wave: res.wave, Gate: gate, LeaderId: ld.r.self},
	}})
}

// introduce tells a reload in waves that another node leads than it knows: if that one runs the other generation, the
// state starts the wave's bake again.
func (ld *leader) introduce(ctx context.Context, rl *commandv1.Reload) bool {
	if !inWaves(rl) || rl.GetPhase() != commandv1.Phase_PHASE_COMMITTED || rl.GetLeaderId() == ld.r.self ||
		!ld.once("leader/"+rl.GetId()) {
		return false
	}
	return ld.propose(ctx, "name the leader", &commandv1.Command{Body: &commandv1.Command_AdvanceWave{
		AdvanceWave: &commandv1.AdvanceWave{ReloadId: rl.GetId(), Wave: rl.GetWave(), LeaderId: ld.r.self},
	}})
}

// judge weighs a wave at the new generation against the nodes at the old one, reads and writes apart. Only the leader's
// instance sees writes, so writes count in the wave that the leader is in, against what it measured before.
func judge(rl *commandv1.Reload, leaderID string, now, before map[string][]*peerv1.MountTraffic) *commandv1.Gate {
	gate := &commandv1.Gate{
		ReadsNew: &commandv1.GateSample{}, ReadsOld: &commandv1.GateSample{},
		WritesNew: &commandv1.GateSample{}, WritesOld: &commandv1.GateSample{},
	}
	var crashes uint32
	silent, leads := "", false
	for _, p := range rl.GetParticipants() {
		in := p.GetWave() == rl.GetWave()
		if in && p.GetSafe() != commandv1.Safe_SAFE_EXCLUDED && p.GetSafe() != commandv1.Safe_SAFE_LEFT {
			leads = leads || p.GetNodeId() == leaderID
			if now[p.GetNodeId()] == nil {
				silent = p.GetName()
			}
			for _, t := range now[p.GetNodeId()] {
				addSample(gate.ReadsNew, t.GetReads())
				addSample(gate.WritesNew, t.GetWrites())
				crashes = max(crashes, t.GetCrashes())
			}
			for _, t := range before[p.GetNodeId()] {
				addSample(gate.ReadsOld, t.GetReads())
				addSample(gate.WritesOld, t.GetWrites())
			}
			continue
		}
		if p.GetWave() > rl.GetWave() {
			for _, t := range now[p.GetNodeId()] {
				addSample(gate.ReadsOld, t.GetReads())
				addSample(gate.WritesOld, t.GetWrites())
			}
		}
	}
	o := rl.GetOptions()
	verdict := func(v commandv1.Gate_Verdict, format string, args ...any) *commandv1.Gate {
		gate.Verdict, gate.Why = v, fmt.Sprintf(format, args...)
		return gate
	}
	if crashes >= crashLoop {
		return verdict(commandv1.Gate_VERDICT_FAILED, "a plugin process of the wave ended %d times while it baked", crashes)
	}
	unclear := ""
	kinds := []kindSample{{"reads", gate.ReadsNew, gate.ReadsOld}}
	if leads {
		kinds = append(kinds, kindSample{"writes", gate.WritesNew, gate.WritesOld})
	}
	for _, k := range kinds {
		enough := k.now.GetRequests() >= uint64(o.GetMinSamples())
		if !enough {
			unclear = fmt.Sprintf("%d %s are fewer than the %d that the gate asks for", k.now.GetRequests(), k.kind,
				o.GetMinSamples())
			continue
		}
		if why := worse(o, k); why != "" {
			return verdict(commandv1.Gate_VERDICT_FAILED, "%s", why)
		}
		if o.GetMaxP99Increase() > 0 && k.now.GetRequests() > 0 && k.old.GetP99Us() == 0 && unclear == "" {
			unclear = fmt.Sprintf("nothing was measured of %s at the old generation to compare with", k.kind)
		}
	}
	switch {
	case silent != "":
		return verdict(commandv1.Gate_VERDICT_INCONCLUSIVE, "node %s did not say what it measured", silent)
	case unclear != "":
		return verdict(commandv1.Gate_VERDICT_INCONCLUSIVE, "%s", unclear)
	}
	return verdict(commandv1.Gate_VERDICT_PASSED, "%d reads and %d writes at the new generation, %d failed",
		gate.ReadsNew.GetRequests(), gate.WritesNew.GetRequests(), gate.ReadsNew.GetFailed()+gate.WritesNew.GetFailed())
}

type kindSample struct {
	kind     string
	now, old *commandv1.GateSample
}

// defaultErrorRate is the share of failed requests that may not be exceeded where the reload does not say.
const defaultErrorRate = 0.01

// worse says in words why a kind of request fails the gate; "" when it does not.
func worse(o *commandv1.Options, k kindSample) string {
	most := cmp.Or(o.GetMaxErrorRate(), defaultErrorRate)
	if n := k.now.GetRequests(); n > 0 {
		if rate := float64(k.now.GetFailed()) / float64(n); rate > most {
			return fmt.Sprintf("%d of %d %s failed, more than the share of %g that may", k.now.GetFailed(), n, k.kind,
				most)
		}
	}
	if limit := o.GetMaxP99Increase(); limit > 0 && k.old.GetP99Us() > 0 &&
		float64(k.now.GetP99Us()) > limit*float64(k.old.GetP99Us()) {
		return fmt.Sprintf("the p99 of %s is %d us against %d us before, more than %g times as long", k.kind,
			k.now.GetP99Us(), k.old.GetP99Us(), limit)
	}
	return ""
}

// addSample adds counts, and keeps the worst p99: that of many nodes together cannot be told from theirs.
func addSample(to, s *commandv1.GateSample) {
	to.Requests += s.GetRequests()
	to.Failed += s.GetFailed()
	to.P99Us = max(to.P99Us, s.GetP99Us())
}
