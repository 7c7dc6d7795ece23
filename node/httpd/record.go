package httpd

import (
	"fmt"
	"slices"
	"strings"
	"time"

	commandv1 "rollcall/proto/command/v1"

	"rollcall/fsm"
	"rollcall/node/api"
)

var phaseNames = map[commandv1.Phase]string{
	commandv1.Phase_PHASE_QUEUED: api.PhaseQueued, commandv1.Phase_PHASE_PREPARING: api.PhasePreparing,
	commandv1.Phase_PHASE_COMMITTED: api.PhaseCommitted, commandv1.Phase_PHASE_DONE: api.PhaseDone,
	commandv1.Phase_PHASE_ABORTED: api.PhaseAborted, commandv1.Phase_PHASE_ROLLING_BACK: api.PhaseRollingBack,
	commandv1.Phase_PHASE_ROLLED_BACK: api.PhaseRolledBack,
}

var verdictNames = map[commandv1.Verdict]string{
	commandv1.Verdict_VERDICT_SWITCHED: api.VerdictSwitched, commandv1.Verdict_VERDICT_UNCHANGED: api.VerdictUnchanged,
	commandv1.Verdict_VERDICT_REFUSED: api.VerdictRefused, commandv1.Verdict_VERDICT_FAILED_SWITCH: api.VerdictFailedSwitch,
	commandv1.Verdict_VERDICT_PUT_BACK: api.VerdictPutBack, commandv1.Verdict_VERDICT_UNMOUNTED: api.VerdictUnmounted,
	commandv1.Verdict_VERDICT_PENDING_DOWN:   api.VerdictPendingDown,
	commandv1.Verdict_VERDICT_UNCONFIRMED:    api.VerdictUnconfirmed,
	commandv1.Verdict_VERDICT_CONVERGED_LATE: api.VerdictConvergedLate,
}

var safeNames = map[commandv1.Safe]string{
	commandv1.Safe_SAFE_SWITCHED: "switched", commandv1.Safe_SAFE_RESTARTED: "restarted", commandv1.Safe_SAFE_FENCED: "fenced",
	commandv1.Safe_SAFE_EXCLUDED: "excluded", commandv1.Safe_SAFE_LEFT: "left", commandv1.Safe_SAFE_REFUSED: "refused",
}

func strategyName(st commandv1.Strategy) string {
	for name, v := range strategies {
		if v == st {
			return name
		}
	}
	return "all-or-nothing"
}

func scopeName(sc commandv1.Scope) string {
	if sc == commandv1.Scope_SCOPE_GLOBAL {
		return "global"
	}
	return "local"
}

func wallTime(ms int64) string {
	if ms == 0 {
		return ""
	}
	return time.UnixMilli(ms).UTC().Format("2006-01-02T15:04:05.000Z")
}

// reloadRecord is a reload as sys/reloads tells it. It is computed from the state alone, so every node tells the same.
func (s *Server) reloadRecord(view *fsm.View, r *commandv1.Reload) *api.Reload {
	rec := &api.Reload{
		ID: r.GetId(), Aliases: r.GetAliases(), Namespace: r.GetNamespace(), Scope: scopeName(r.GetScope()),
		Selector: api.Selector{
			Type: r.GetSelector().GetPluginType(), Plugin: r.GetSelector().GetPlugin(),
			Mounts: r.GetSelector().GetMounts(), AllNamespaces: r.GetSelector().GetAllNamespaces(),
		},
		Strategy: strategyName(r.GetOptions().GetStrategy()), Options: optionsOf(r.GetOptions()),
		RequestedBy: r.GetRequestedBy(), RollsBack: r.GetRollsBack(), RolledBackBy: r.GetRolledBackBy(),
		Phase: phaseNames[r.GetPhase()], Outcome: r.GetOutcome(), Why: r.GetWhy(), Paused: r.GetPaused(),
		EntryIndex: r.GetStartIndex(), PrepareIndex: r.GetPrepareIndex(), DecidedIndex: r.GetGeneration(),
		DoneIndex: r.GetEndIndex(), Index: r.GetModifyIndex(), Started: wallTime(r.GetStartWallMs()),
		Prepared: wallTime(r.GetPrepareWallMs()), Committed: wallTime(r.GetCommitWallMs()), Ended: wallTime(r.GetEndWallMs()),
		Wave: int(r.GetWave()), Expected: []string{}, Answered: []string{}, Pending: []string{},
		Targets: []api.ReloadTarget{}, Nodes: []api.ReloadNode{},
	}
	if n := view.Node(r.GetServingNode()); n != nil {
		rec.ServingNode = n.GetName()
	}
	for _, id := range r.GetUnconfirmed() {
		rec.Unconfirmed = append(rec.Unconfirmed, nodeName(view, id))
	}
	for _, t := range r.GetTargets() {
		rec.Targets = append(rec.Targets, targetOf(t, pathOfTarget(r, t.GetMountUuid())))
	}
	for _, p := range r.GetParticipants() {
		n := participantOf(r, p)
		rec.Nodes = append(rec.Nodes, n)
		rec.Expected = append(rec.Expected, n.Node)
		switch {
		case owes(r, n.State):
			rec.Pending = append(rec.Pending, n.Node)
		case n.State != api.NodeReleased:
			rec.Answered = append(rec.Answered, n.Node)
		}
		for _, m := range n.Mounts {
			rec.P99.Before = max(rec.P99.Before, m.P99.Before)
			rec.P99.During = max(rec.P99.During, m.P99.During)
			rec.P99.After = max(rec.P99.After, m.P99.After)
		}
	}
	slices.SortFunc(rec.Nodes, func(a, b api.ReloadNode) int { return strings.Compare(a.Node, b.Node) })
	slices.Sort(rec.Expected)
	slices.Sort(rec.Answered)
	slices.Sort(rec.Pending)
	rec.Waves = wavesRecord(r)
	return rec
}

// owes reports whether a node still owes the reload something. Nobody owes an aborted one anything: what had prepared has
// given that up and runs what it ran.
func owes(r *commandv1.Reload, state string) bool {
	if r.GetPhase() == commandv1.Phase_PHASE_ABORTED {
		return false
	}
	return state == api.NodePending || state == api.NodePrepared || state == api.NodeSwitching || state == api.NodeDown
}

func nodeName(view *fsm.View, id string) string {
	if n := view.Node(id); n != nil {
		return n.GetName()
	}
	return id
}

func optionsOf(o *commandv1.Options) api.ReloadOptions {
	out := api.ReloadOptions{
		Version: o.GetVersion(), Trial: o.GetTrial(), PrepareMS: o.GetPrepareMs(), RunMS: o.GetRunMs(),
		QueueMS: o.GetQueueMs(), MaxUnavailable: int(o.GetMaxUnavailable()), BakeMS: o.GetBakeMs(),
		MaxErrorRate: o.GetMaxErrorRate(), MaxP99Increase: o.GetMaxP99Increase(), MinSamples: int(o.GetMinSamples()),
		OnDrainTimeout: o.GetOnDrainTimeout(), ExcludeFenced: !o.GetKeepFenced(), OnSwitchFailure: "retry",
	}
	if o.GetRollbackOnSwitchFailure() {
		out.OnSwitchFailure = "rollback"
	}
	for _, w := range o.GetWaves() {
		unit := ""
		if w.GetPercent() {
			unit = "%"
		}
		out.Waves = append(out.Waves, fmt.Sprintf("%d%s", w.GetSize(), unit))
	}
	return out
}

func specOf(sp *commandv1.Spec) api.Spec {
	return api.Spec{Type: sp.GetType(), Name: sp.GetName(), Version: sp.GetVersion(), SHA256: sp.GetSha256(), Command: sp.GetCommand()}
}

func targetOf(t *commandv1.Target, mount string) api.ReloadTarget {
	return api.ReloadTarget{
		Mount: mount, Namespace: t.GetNamespace(), Accessor: t.GetAccessor(), From: specOf(t.GetFrom()),
		To: specOf(t.GetTo()), Generation: t.GetFromGeneration(), Unmounted: t.GetUnmounted(), Trial: t.GetTrial(), Fencing: t.GetFencing(),
	}
}

func participantOf(r *commandv1.Reload, p *commandv1.Participant) api.ReloadNode {
	n := api.ReloadNode{
		Node: p.GetName(), NodeID: p.GetNodeId(), Incarnation: p.GetIncarnation(),
		JoinedDuring: p.GetJoinedDuring(), Wave: int(p.GetWave()), Why: p.GetWhy(), Safe: safeNames[p.GetSafe()],
		State: stateOf(r, p), Mounts: []api.ReloadMount{},
	}
	for _, o := range p.GetMounts() {
		n.Mounts = append(n.Mounts, mountOutcome(pathOfTarget(r, o.GetMountUuid()), o))
	}
	return n
}

// stateOf derives a node's state from its verdicts and from why it is safe.
func stateOf(r *commandv1.Reload, p *commandv1.Participant) string {
	verdicts, prepared, refused, down := 0, 0, false, false
	for _, o := range p.GetMounts() {
		switch v := o.GetVerdict(); v {
		case commandv1.Verdict_VERDICT_UNSPECIFIED, commandv1.Verdict_VERDICT_FAILED_SWITCH:
		case commandv1.Verdict_VERDICT_PENDING_DOWN, commandv1.Verdict_VERDICT_UNCONFIRMED:
			down = true
		default:
			verdicts++
			refused = refused || v == commandv1.Verdict_VERDICT_REFUSED
		}
		if o.GetPrepared() {
			prepared++
		}
	}
	switch {
	case p.GetSafe() == commandv1.Safe_SAFE_LEFT:
		return api.NodeLeft
	case refused:
		return api.NodeRefused
	case len(p.GetMounts()) > 0 && verdicts == len(p.GetMounts()):
		return api.NodeDone
	case p.GetSafe() == commandv1.Safe_SAFE_EXCLUDED && r.GetPhase() == commandv1.Phase_PHASE_PREPARING:
		return api.NodeExcluded
	case down || p.GetSafe() == commandv1.Safe_SAFE_FENCED || p.GetSafe() == commandv1.Safe_SAFE_EXCLUDED:
		return api.NodeDown
	case r.GetGeneration() != 0 && !ended(r.GetPhase()) && p.GetWave() <= r.GetWave():
		return api.NodeSwitching
	case len(p.GetMounts()) > 0 && prepared == len(p.GetMounts()):
		return api.NodePrepared
	case r.GetPhase() == commandv1.Phase_PHASE_ABORTED:
		return api.NodeReleased // it owes nothing any more
	default:
		return api.NodePending
	}
}

func millis(us int64) float64 { return float64(us) / 1000 }

func mountOutcome(path string, o *commandv1.MountOutcome) api.ReloadMount {
	rep := o.GetReport()
	m := api.ReloadMount{
		Mount: path, Verdict: verdictNames[o.GetVerdict()], Prepared: o.GetPrepared(),
		Phase: rep.GetFailedPhase(), Cause: rep.GetCause(), From: processOf(rep.GetFrom()), To: processOf(rep.GetTo()),
		HoldMS: millis(rep.GetHoldUs()), At: wallTime(rep.GetWallMs()),
	}
	steps := o.GetPrepareSteps()
	if len(rep.GetSteps()) > 0 {
		steps = mergeSteps(steps, rep.GetSteps())
	}
	for _, st := range steps {
		m.Steps = append(m.Steps, api.Step{Name: st.GetName(), At: api.StepTime(st.GetAtUs()), MS: millis(st.GetTookUs())})
	}
	m.Timings = api.TimingsOf(m.Steps)
	tr := rep.GetTraffic()
	m.Requests = api.Requests{Served: tr.GetServed(), Held: tr.GetHeld(), Failed: tr.GetFailed(), Drained: tr.GetDrained(), Canceled: tr.GetCanceled()}
	m.P99 = api.P99{Before: millis(tr.GetP99BeforeUs()), During: millis(tr.GetP99DuringUs()), After: millis(tr.GetP99AfterUs())}
	return m
}

// mergeSteps puts two timelines of one node together, each step once, in the order of their times.
func mergeSteps(a, b []*commandv1.Step) []*commandv1.Step {
	type key struct {
		name string
		at   int64
	}
	seen := map[key]bool{}
	var out []*commandv1.Step
	for _, st := range slices.Concat(a, b) {
		k := key{st.GetName(), st.GetAtUs()}
		if !seen[k] {
			seen[k] = true
			out = append(out, st)
		}
	}
	slices.SortStableFunc(out, func(x, y *commandv1.Step) int { return int(min(1, max(-1, x.GetAtUs()-y.GetAtUs()))) })
	return out
}

func processOf(p *commandv1.ProcessFacts) *api.Process {
	if p == nil {
		return nil
	}
	return &api.Process{Version: p.GetVersion(), SHA256: p.GetSha256(), PID: p.GetPid(), Generation: p.GetGeneration()}
}

func wavesRecord(r *commandv1.Reload) []api.ReloadWave {
	var out []api.ReloadWave
	for _, w := range r.GetWaves() {
		rec := api.ReloadWave{
			Number: int(w.GetNumber()), Nodes: []string{}, CommittedIndex: w.GetCommittedIndex(),
			Baking: w.GetBakeFromNs() != 0 && !w.GetPassed(), Passed: w.GetPassed(), Gate: gateOf(w.GetGate()),
		}
		for _, p := range r.GetParticipants() {
			if p.GetWave() == w.GetNumber() {
				rec.Nodes = append(rec.Nodes, p.GetName())
			}
		}
		slices.Sort(rec.Nodes)
		out = append(out, rec)
	}
	return out
}

func gateOf(g *commandv1.Gate) *api.Gate {
	if g == nil {
		return nil
	}
	sample := func(x *commandv1.GateSample) api.GateSample {
		return api.GateSample{Requests: x.GetRequests(), Failed: x.GetFailed(), P99MS: millis(x.GetP99Us())}
	}
	verdict := map[commandv1.Gate_Verdict]string{
		commandv1.Gate_VERDICT_PASSED: "passed", commandv1.Gate_VERDICT_FAILED: "failed",
		commandv1.Gate_VERDICT_INCONCLUSIVE: "inconclusive",
	}[g.GetVerdict()]
	return &api.Gate{
		Verdict: verdict, Why: g.GetWhy(), ReadsNew: sample(g.GetReadsNew()), ReadsOld: sample(g.GetReadsOld()),
		WritesNew: sample(g.GetWritesNew()), WritesOld: sample(g.GetWritesOld()),
	}
}

// reloadStatusOf is the contract's status: the nodes that finished, with what it lacks beside them.
func (s *Server) reloadStatusOf(view *fsm.View, r *commandv1.Reload) *api.ReloadStatus {
	rec := s.reloadRecord(view, r)
	st := &api.ReloadStatus{
		ReloadID: rec.ID, State: rec.Phase, Outcome: rec.Outcome, Why: rec.Why, Expected: rec.Expected,
		Answered: rec.Answered, Pending: rec.Pending, Index: rec.Index, Results: map[string]api.NodeResult{},
	}
	for _, n := range rec.Nodes {
		if slices.Contains(rec.Pending, n.Node) {
			continue
		}
		res := api.NodeResult{Timestamp: rec.Started, State: n.State, NodeID: n.NodeID, Mounts: []api.MountResult{}}
		var errs []string
		for _, m := range n.Mounts {
			if m.At != "" {
				res.Timestamp = max(res.Timestamp, m.At)
			}
			out := api.MountResult{Mount: m.Mount, Verdict: m.Verdict, Phase: m.Phase, Cause: m.Cause}
			if m.To != nil {
				out.Version, out.SHA256 = m.To.Version, m.To.SHA256
			}
			res.Mounts = append(res.Mounts, out)
			if m.Cause != "" {
				errs = append(errs, fmt.Sprintf("%s %s (%s): %s", m.Mount, m.Verdict, m.Phase, m.Cause))
			}
		}
		if r.GetPhase() == commandv1.Phase_PHASE_ABORTED && len(errs) == 0 {
			errs = append(errs, "aborted: "+rec.Why)
		}
		res.Error = api.Cell(strings.Join(errs, "; "))
		st.Results[n.Node] = res
	}
	return st
}
