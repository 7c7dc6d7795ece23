package fsm

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	commandv1 "rollcall/proto/command/v1"
)

// TestRandomLogsKeepThePromises plays random logs, plausible ones more often than wild ones, and checks after every entry
// what must hold in any state; in the end, that the log alone decides.
func TestRandomLogsKeepThePromises(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var log []*raft.Log
		f := New()
		prev := f.View()
		var kept *View
		var keptBytes []byte
		term := uint64(1)
		n := rapid.IntRange(20, 150).Draw(t, "entries")
		keep := rapid.IntRange(0, n-1).Draw(t, "kept at")
		for i := range n {
			if rapid.IntRange(0, 40).Draw(t, "new term") == 0 {
				term++
			}
			b, err := proto.Marshal(drawCommand(t, prev, i, term))
			if err != nil {
				t.Fatal(err)
			}
			l := &raft.Log{Index: uint64(i) + 1, Term: term, Type: raft.LogCommand, Data: b}
			log = append(log, l)
			res := f.Apply(l).(*commandv1.Result)
			if res.GetFaultKind() == "internal" {
				t.Fatalf("entry %d: %s", i, res.GetFaultText())
			}
			v := f.View()
			checkStep(t, prev, v)
			prev = v
			if i == keep {
				kept, keptBytes = v, viewBytes(t, v)
			}
		}
		if !bytes.Equal(viewBytes(t, kept), keptBytes) {
			t.Fatal("an old view changed: a record was mutated in place")
		}
		want := viewBytes(t, f.View())
		again := New()
		again.ApplyBatch(log)
		if !bytes.Equal(viewBytes(t, again.View()), want) {
			t.Fatal("the same log made another state")
		}
		half := New()
		if err := half.Restore(readCloser{bytes.NewReader(keptBytes)}); err != nil {
			t.Fatal(err)
		}
		half.ApplyBatch(log[keep+1:])
		if !bytes.Equal(viewBytes(t, half.View()), want) {
			t.Fatal("a snapshot and the rest of the log made another state")
		}
		if a, b := derived(f.View().s), derived(half.View().s); a != b {
			t.Fatalf("what is derived differs:\n%s\nand\n%s", a, b)
		}
	})
}

type fataler interface {
	Fatal(...any)
	Fatalf(string, ...any)
}

func viewBytes(t fataler, v *View) []byte {
	var b bytes.Buffer
	if err := v.WriteSnapshot(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// checkStep checks what must hold after any entry.
func checkStep(t fataler, a, b *View) {
	for _, m := range b.Mounts() {
		old := a.Mount(m.GetUuid())
		if old == nil {
			continue
		}
		if m.GetWanted().GetGeneration() < old.GetWanted().GetGeneration() {
			t.Fatalf("%s: the generation went from %d to %d", m.GetPath(), old.GetWanted().GetGeneration(), m.GetWanted().GetGeneration())
		}
		if m.GetEpoch() != 0 && m.GetEpoch() < old.GetEpoch() {
			t.Fatalf("%s: the epoch went from %d to %d", m.GetPath(), old.GetEpoch(), m.GetEpoch())
		}
		for _, n := range b.Nodes() {
			was := a.Node(n.GetId())
			if was == nil || was.GetLeft() || n.GetLeft() {
				continue
			}
			x, y := a.Wanted(old, n.GetId()).GetGeneration(), b.Wanted(m, n.GetId()).GetGeneration()
			if y < x && b.Override(m, n.GetId()).GetWhy() != commandv1.Override_WHY_REFUSED {
				t.Fatalf("%s on %s: wanted generation went from %d to %d", m.GetPath(), n.GetId(), x, y)
			}
		}
	}
	owner := map[string]string{}
	for _, r := range b.Reloads() {
		checkReload(t, b, r)
		if old := a.Reload(r.GetId()); old != nil {
			checkTransition(t, old, r)
		}
		if !holds(r.GetPhase()) {
			continue
		}
		for _, x := range r.GetTargets() {
			if x.GetUnmounted() {
				continue
			}
			if o := owner[x.GetMountUuid()]; o != "" {
				t.Fatalf("%s is moved by %s and %s", x.GetPath(), o, r.GetId())
			}
			owner[x.GetMountUuid()] = r.GetId()
			if got := b.ActiveReload(x.GetMountUuid()).GetId(); got != r.GetId() {
				t.Fatalf("%s is moved by %s, but %q is said to", x.GetPath(), r.GetId(), got)
			}
		}
	}
	checkQueue(t, b, owner)
}

// checkQueue: whoever waits has a reason to.
func checkQueue(t fataler, v *View, taken map[string]string) {
	for _, r := range v.RunningReloads() {
		if r.GetPhase() != commandv1.Phase_PHASE_QUEUED {
			continue
		}
		reason := false
		for _, x := range r.GetTargets() {
			reason = reason || taken[x.GetMountUuid()] != "" && v.Mount(x.GetMountUuid()) != nil
		}
		if !reason {
			t.Fatalf("%s waits for nothing", r.GetId())
		}
		for _, x := range r.GetTargets() {
			taken[x.GetMountUuid()] = r.GetId()
		}
	}
}

func checkReload(t fataler, v *View, r *commandv1.Reload) {
	row := v.ReloadID(r.GetId())
	if row == nil || row.GetOutcome() != r.GetOutcome() {
		t.Fatalf("%s: its row says %q, the record %q", r.GetId(), row.GetOutcome(), r.GetOutcome())
	}
	if terminal(r.GetPhase()) != (r.GetOutcome() != "") {
		t.Fatalf("%s is %v with outcome %q", r.GetId(), r.GetPhase(), r.GetOutcome())
	}
	last := ""
	bad := false
	for _, p := range r.GetParticipants() {
		if p.GetNodeId() <= last {
			t.Fatalf("%s: participants are out of order", r.GetId())
		}
		last = p.GetNodeId()
		if len(p.GetMounts()) != len(r.GetTargets()) {
			t.Fatalf("%s: %s has %d outcomes for %d targets", r.GetId(), last, len(p.GetMounts()), len(r.GetTargets()))
		}
		if len(r.GetWaves()) > 0 && int(p.GetWave()) >= len(r.GetWaves()) {
			t.Fatalf("%s: %s is in wave %d of %d", r.GetId(), last, p.GetWave(), len(r.GetWaves()))
		}
		for _, o := range p.GetMounts() {
			if terminal(r.GetPhase()) && !out(p) && o.GetVerdict() == 0 {
				t.Fatalf("%s has ended without a verdict of %s", r.GetId(), last)
			}
			switch o.GetVerdict() {
			case commandv1.Verdict_VERDICT_SWITCHED, commandv1.Verdict_VERDICT_UNCHANGED, commandv1.Verdict_VERDICT_CONVERGED_LATE,
				commandv1.Verdict_VERDICT_PUT_BACK, commandv1.Verdict_VERDICT_UNMOUNTED:
			default:
				bad = bad || !out(p)
			}
		}
		if r.GetPhase() == commandv1.Phase_PHASE_DONE && r.GetWhy() == "" && !settled(p) {
			t.Fatalf("%s is done, but %s is not safe or has no verdict", r.GetId(), last)
		}
	}
	if r.GetOutcome() == OutcomeSucceeded && bad {
		t.Fatalf("%s succeeded with verdicts that say otherwise", r.GetId())
	}
}

// next are the phases that may follow one. Waves go round between preparing and committed.
var next = map[commandv1.Phase][]commandv1.Phase{
	commandv1.Phase_PHASE_QUEUED: {
		commandv1.Phase_PHASE_PREPARING, commandv1.Phase_PHASE_COMMITTED, commandv1.Phase_PHASE_DONE, commandv1.Phase_PHASE_ABORTED,
	},
	commandv1.Phase_PHASE_PREPARING: {
		commandv1.Phase_PHASE_COMMITTED, commandv1.Phase_PHASE_ABORTED, commandv1.Phase_PHASE_DONE,
		commandv1.Phase_PHASE_ROLLING_BACK, commandv1.Phase_PHASE_ROLLED_BACK,
	},
	commandv1.Phase_PHASE_COMMITTED: {
		commandv1.Phase_PHASE_PREPARING, commandv1.Phase_PHASE_DONE, commandv1.Phase_PHASE_ROLLING_BACK,
		commandv1.Phase_PHASE_ROLLED_BACK, commandv1.Phase_PHASE_ABORTED,
	},
	commandv1.Phase_PHASE_ROLLING_BACK: {commandv1.Phase_PHASE_ROLLED_BACK},
}

func checkTransition(t fataler, a, b *commandv1.Reload) {
	if a.GetGeneration() != 0 && a.GetGeneration() != b.GetGeneration() {
		t.Fatalf("%s was decided twice: at %d and %d", a.GetId(), a.GetGeneration(), b.GetGeneration())
	}
	if a.GetPhase() == commandv1.Phase_PHASE_ABORTED && b.GetGeneration() != 0 && a.GetGeneration() == 0 {
		t.Fatalf("%s was aborted and then committed", a.GetId())
	}
	if b.GetWave() < a.GetWave() || b.GetModifyIndex() < a.GetModifyIndex() {
		t.Fatalf("%s went back", a.GetId())
	}
	if !proto.Equal(a, b) && b.GetModifyIndex() == a.GetModifyIndex() {
		t.Fatalf("%s changed without a new modify_index", a.GetId())
	}
	if a.GetPhase() == b.GetPhase() {
		return
	}
	ok := false
	for _, p := range next[a.GetPhase()] {
		ok = ok || p == b.GetPhase()
	}
	if !ok {
		t.Fatalf("%s went from %v to %v", a.GetId(), a.GetPhase(), b.GetPhase())
	}
	committed := b.GetPhase() == commandv1.Phase_PHASE_COMMITTED && a.GetPhase() == commandv1.Phase_PHASE_PREPARING
	if !committed || bestEffort(b) {
		return
	}
	for _, p := range b.GetParticipants() {
		if p.GetWave() == b.GetWave() && !out(p) && !preparedAll(p) && !strings.HasPrefix(p.GetWhy(), "left out") {
			t.Fatalf("%s was committed without the vote of %s", b.GetId(), p.GetNodeId())
		}
	}
}

// Small worlds, so that things meet.
var (
	someNodes    = []string{"n1", "n2", "n3", "n4"}
	somePaths    = []string{"a/", "b/", "c/"}
	someVersions = []string{"", "v1.0.0", "v2.0.0", "v3.0.0"}
	someReloads  = []string{"r1", "r2", "r3", "r4", "r5", "r6", "r7", "r8"}
)

// drawCommand makes the next command: the world first, then whatever may come.
func drawCommand(t *rapid.T, v *View, i int, term uint64) *commandv1.Command {
	c := &commandv1.Command{WallMs: int64(i), ElapsedNs: rapid.Uint64Range(0, 2*MaxElapsed).Draw(t, "elapsed")}
	pick := func(label string, from []string) string { return rapid.SampledFrom(from).Draw(t, label) }
	num := func(label string, lo, hi int) int { return rapid.IntRange(lo, hi).Draw(t, label) }
	if i == 0 {
		c.Body = &commandv1.Command_InitCluster{InitCluster: NewCluster("c1", "x", "t")}
		return c
	}
	if i < 11 {
		setUp(c, i)
		return c
	}
	if num("connections", 0, 7) == 0 {
		drawConnection(t, c, v, term)
		return c
	}
	node := pick("node", someNodes)
	inc := v.Node(node).GetIncarnation()
	if num("other incarnation", 0, 9) == 0 {
		inc = uint64(num("incarnation", 0, 5))
	}
	switch k := num("kind", 0, 59); {
	case k < 24:
		c.Body = &commandv1.Command_ReportBatch{ReportBatch: drawReports(t, v)}
	case k < 32:
		c.Body = &commandv1.Command_StartReload{StartReload: drawStart(t)}
	case k < 37:
		r := drawReload(t, v)
		a := &commandv1.AdvanceWave{
			ReloadId: r.GetId(), Wave: r.GetWave(), Gate: &commandv1.Gate{Verdict: commandv1.Gate_Verdict(num("gate", 0, 3))},
		}
		if num("leader", 0, 3) == 0 {
			a.LeaderId = node
		}
		c.Body = &commandv1.Command_AdvanceWave{AdvanceWave: a}
	case k < 40:
		c.Body = &commandv1.Command_FenceNode{FenceNode: &commandv1.FenceNode{ReloadId: drawReload(t, v).GetId(), NodeId: node, Incarnation: inc}}
	case k < 43:
		x := &commandv1.ExcludeNode{ReloadId: drawReload(t, v).GetId(), NodeId: node, Incarnation: inc}
		if num("voters", 0, 1) == 0 {
			x.Voters = someNodes[:3]
		}
		c.Body = &commandv1.Command_ExcludeNode{ExcludeNode: x}
	case k < 45:
		r := drawReload(t, v)
		c.Body = &commandv1.Command_ExpireReload{ExpireReload: &commandv1.ExpireReload{Id: r.GetId(), Phase: r.GetPhase(), Wave: r.GetWave()}}
	case k < 47:
		c.Body = &commandv1.Command_ControlReload{ControlReload: &commandv1.ControlReload{
			Id: drawReload(t, v).GetId(), Action: commandv1.ControlReload_Action(num("action", 0, 5)),
		}}
	case k < 50:
		c.Body = &commandv1.Command_Hello{Hello: &commandv1.Hello{NodeId: node, Name: node, Incarnation: inc + uint64(num("boots", 0, 1))}}
	default:
		drawRare(t, c, v, k, node, inc, term)
	}
	return c
}

// setUp gives the world its nodes, plugins and mounts.
func setUp(c *commandv1.Command, i int) {
	switch {
	case i < 4:
		n := someNodes[i-1]
		c.Body = &commandv1.Command_Hello{Hello: &commandv1.Hello{NodeId: n, Name: n, Incarnation: 1}}
	case i == 4:
		c.Body = register("v1.0.0")
	case i == 5:
		c.Body = register("v2.0.0")
	case i == 8 || i == 9:
		version := fmt.Sprintf("v%d.0.0", i-7)
		c.Body = &commandv1.Command_RegisterPlugin{RegisterPlugin: &commandv1.RegisterPlugin{Spec: &commandv1.Spec{
			Type: typeDatabase, Name: "kv", Version: version, Command: "db", Sha256: sum("db" + version),
		}}}
	case i == 10:
		c.Body = &commandv1.Command_EnableMount{EnableMount: &commandv1.EnableMount{
			Uuid: "ud/", Accessor: "xd", Table: typeSecret, Path: "d/", Type: typeDatabase, PluginType: typeDatabase,
		}}
	default:
		c.Body = enable(somePaths[i-6])
	}
}

func register(version string) *commandv1.Command_RegisterPlugin {
	return &commandv1.Command_RegisterPlugin{RegisterPlugin: &commandv1.RegisterPlugin{Spec: &commandv1.Spec{
		Type: typeSecret, Name: "kv", Version: version, Command: "kv", Sha256: sum(version),
	}}}
}

func enable(path string) *commandv1.Command_EnableMount {
	return &commandv1.Command_EnableMount{EnableMount: &commandv1.EnableMount{
		Uuid: "u" + path, Accessor: "x" + path, Table: typeSecret, Path: path, Type: "kv",
		Config: &commandv1.MountConfig{Fencing: map[string]string{"b/": "none"}[path]},
	}}
}

func drawRare(t *rapid.T, c *commandv1.Command, v *View, k int, node string, inc, term uint64) {
	path := rapid.SampledFrom(somePaths).Draw(t, "path")
	version := rapid.SampledFrom(someVersions).Draw(t, "version")
	m := v.Mount("u" + path)
	switch k {
	case 50:
		c.Body = &commandv1.Command_Leave{Leave: &commandv1.Leave{NodeId: node, Incarnation: inc}}
	case 51:
		c.Body = &commandv1.Command_RemoveNode{RemoveNode: &commandv1.RemoveNode{NodeId: node}}
	case 52:
		c.Body = enable(path)
	case 53:
		c.Body = &commandv1.Command_DisableMount{DisableMount: &commandv1.DisableMount{Table: typeSecret, Path: path}}
	case 54:
		c.Body = register(version)
	case 55:
		c.Body = &commandv1.Command_SetPin{SetPin: &commandv1.SetPin{Type: typeSecret, Name: "kv", Version: version}}
	case 56:
		c.Body = &commandv1.Command_DeletePin{DeletePin: &commandv1.DeletePin{Type: typeSecret, Name: "kv"}}
	case 57:
		c.Body = &commandv1.Command_TakeOver{TakeOver: &commandv1.TakeOver{
			MountUuid: "u" + path, NodeId: node, Term: term, Generation: v.Wanted(m, node).GetGeneration(),
			Writes: []*commandv1.StorageOp{{Key: "k", Value: []byte(node)}},
		}}
	case 58:
		c.Body = &commandv1.Command_WriteStorage{WriteStorage: &commandv1.WriteStorage{
			MountUuid: "u" + path, Epoch: m.GetEpoch(), Term: term,
			Ops: []*commandv1.StorageOp{{Key: "k/" + node, Value: []byte{1}, Delete: version == ""}},
		}}
	default:
		switch {
		case version == "v3.0.0":
			c.Body = &commandv1.Command_Restored{Restored: &commandv1.Restored{}}
		case v.ClockNS() > 0:
			c.Body = &commandv1.Command_DropReloads{DropReloads: &commandv1.DropReloads{BeforeClockNs: v.ClockNS() / 2}}
		default:
			c.Body = &commandv1.Command_DeregisterPlugin{DeregisterPlugin: &commandv1.DeregisterPlugin{
				Type: typeSecret, Name: "kv", Version: version,
			}}
		}
	}
}

// drawConnection makes, changes, ends or takes over a connection of the database mount.
func drawConnection(t *rapid.T, c *commandv1.Command, v *View, term uint64) {
	m, name := v.Mount("ud/"), rapid.SampledFrom([]string{"x", "y"}).Draw(t, "connection")
	node := rapid.SampledFrom(someNodes).Draw(t, "writer")
	takeOver := func(m *commandv1.Mount) {
		c.Body = &commandv1.Command_TakeOver{TakeOver: &commandv1.TakeOver{
			MountUuid: m.GetUuid(), NodeId: node, Term: term, Generation: v.Wanted(m, node).GetGeneration(),
		}}
	}
	switch k := rapid.IntRange(0, 9).Draw(t, "to it"); {
	case m.GetEpochTerm() != term || k == 0:
		takeOver(m)
	case k < 6:
		c.Body = &commandv1.Command_PutConnection{PutConnection: &commandv1.PutConnection{
			MountUuid: "ud/", Epoch: m.GetEpoch(), Term: term, Name: name, Uuid: fmt.Sprintf("u%s%d", name, v.Index()),
			PluginName: "kv", PluginVersion: rapid.SampledFrom(someVersions).Draw(t, "version"), Config: []byte("{}"),
		}}
	case k < 7:
		c.Body = &commandv1.Command_DeleteConnection{DeleteConnection: &commandv1.DeleteConnection{
			MountUuid: "ud/", Epoch: m.GetEpoch(), Term: term, Name: name,
		}}
	case k < 8:
		c.Body = &commandv1.Command_MarkLeaderOnly{MarkLeaderOnly: &commandv1.MarkLeaderOnly{MountUuid: "ua/"}}
	default:
		takeOver(v.Connection("ud/", name))
	}
}

func drawStart(t *rapid.T) *commandv1.StartReload {
	num := func(label string, lo, hi int) int { return rapid.IntRange(lo, hi).Draw(t, label) }
	s := &commandv1.StartReload{
		Id: rapid.SampledFrom(someReloads).Draw(t, "id"), Scope: commandv1.Scope(num("scope", 1, 2)),
		ServingNode: rapid.SampledFrom(someNodes).Draw(t, "serving"), LeaderId: rapid.SampledFrom(someNodes).Draw(t, "leader"),
		ToPrevious: num("back", 0, 5) == 0, Selector: &commandv1.Selector{},
		Options: &commandv1.Options{
			Strategy: commandv1.Strategy(num("strategy", 0, 4)), RollbackOnSwitchFailure: num("on failure", 0, 2) == 0,
			MaxUnavailable: uint32(num("max unavailable", 0, 2)), KeepFenced: num("keep fenced", 0, 4) == 0,
		},
	}
	if num("by plugin", 0, 1) == 0 {
		s.Selector.Plugin = "kv"
	} else {
		s.Selector.Mounts = rapid.SliceOfN(rapid.SampledFrom(append([]string{"d/", "d/config/x"}, somePaths...)), 1, 3).Draw(t, "mounts")
	}
	if !s.GetToPrevious() && num("with version", 0, 2) == 0 {
		s.Options.Version = rapid.SampledFrom(someVersions).Draw(t, "version")
	}
	for range num("waves", 0, 2) {
		s.Options.Waves = append(s.Options.Waves, &commandv1.Options_Wave{
			Size: uint32(num("size", 1, 60)), Percent: num("percent", 0, 1) == 0,
		})
	}
	return s
}

// drawReload picks one that runs, more often than not.
func drawReload(t *rapid.T, v *View) *commandv1.Reload {
	if run := v.RunningReloads(); len(run) > 0 && rapid.IntRange(0, 9).Draw(t, "any reload") > 0 {
		return run[rapid.IntRange(0, len(run)-1).Draw(t, "reload")]
	}
	all := v.Reloads()
	if len(all) == 0 {
		return &commandv1.Reload{Id: "r1"}
	}
	return all[rapid.IntRange(0, len(all)-1).Draw(t, "reload")]
}

func drawReports(t *rapid.T, v *View) *commandv1.ReportBatch {
	b := &commandv1.ReportBatch{}
	for range rapid.IntRange(1, 4).Draw(t, "reports") {
		r := drawReload(t, v)
		node := rapid.SampledFrom(someNodes).Draw(t, "reporter")
		rep := &commandv1.Report{ReloadId: r.GetId(), NodeId: node, Incarnation: v.Node(node).GetIncarnation()}
		if rapid.IntRange(0, 19).Draw(t, "stale") == 0 {
			rep.Incarnation++
		}
		stage := commandv1.MountReport_STAGE_PREPARED
		if r.GetPhase() == commandv1.Phase_PHASE_COMMITTED {
			stage = commandv1.MountReport_STAGE_SWITCHED
		}
		if rapid.IntRange(0, 4).Draw(t, "other stage") == 0 {
			stage = commandv1.MountReport_Stage(rapid.IntRange(0, 5).Draw(t, "stage"))
		}
		for _, x := range r.GetTargets() {
			if rapid.IntRange(0, 9).Draw(t, "left out") == 0 {
				continue
			}
			rep.Mounts = append(rep.Mounts, &commandv1.MountReport{
				MountUuid: x.GetMountUuid(), Stage: stage, WallMs: int64(rapid.IntRange(0, 3).Draw(t, "wall")),
				From: &commandv1.ProcessFacts{Pid: 1}, To: &commandv1.ProcessFacts{Pid: int64(rapid.IntRange(1, 2).Draw(t, "pid"))},
			})
		}
		b.Reports = append(b.Reports, rep)
	}
	return b
}

// TestTheQueueIsBounded fills it, and sees the refusal and that all of them get their turn.
func TestTheQueueIsBounded(t *testing.T) {
	w := newWorld(t)
	w.play("init\nhello n1\nregister kv v1.0.0\nenable kv/\nreload first mounts=kv/")
	for i := range MaxQueued {
		// Each asks for something else, so that none is joined to another.
		c := w.parse(fmt.Sprintf("reload q%d mounts=kv/", i))
		c.GetStartReload().Options.RunMs = int64(i) + 1
		if res := w.apply(c); res.GetFaultKind() != "" {
			t.Fatalf("%d: %s", i, res.GetFaultText())
		}
	}
	c := w.parse("reload over mounts=kv/")
	c.GetStartReload().Options.RunMs = 1e6
	if res := w.apply(c); res.GetFaultKind() != "exhausted" {
		t.Fatalf("the reload after a full queue answered %v", res)
	}
	for i := range MaxQueued + 1 {
		run := w.f.View().RunningReloads()
		if want := MaxQueued + 1 - i; len(run) != want {
			t.Fatalf("%d reloads are left, not %d", len(run), want)
		}
		for _, line := range []string{"prepared %s n1", "switched %s n1"} {
			w.apply(w.parse(fmt.Sprintf(line, run[0].GetId())))
		}
		if r := w.f.View().Reload(run[0].GetId()); r.GetPhase() != commandv1.Phase_PHASE_DONE {
			t.Fatalf("%s is %v", r.GetId(), r.GetPhase())
		}
	}
}

// TestYoungReloadIDsAreNeverForgotten fills the table of ids: the young stay, and refuse the new; the old go first.
func TestYoungReloadIDsAreNeverForgotten(t *testing.T) {
	w := newWorld(t)
	w.play("init\nhello n1\nregister kv v1.0.0")
	start := func(i int) *commandv1.Result {
		return w.apply(w.parse(fmt.Sprintf("reload r%d plugin=kv", i))) // matches nothing, and ends at once
	}
	for i := range MaxReloadIDs {
		if res := start(i); res.GetFaultKind() != "" {
			t.Fatalf("%d: %s", i, res.GetFaultText())
		}
		if i%100 == 0 {
			w.apply(w.parse("drop"))
		}
	}
	if res := start(MaxReloadIDs); res.GetFaultKind() != "exhausted" {
		t.Fatalf("a reload beside %d young ids answered %v", MaxReloadIDs, res)
	}
	if res := start(0); !res.GetRepeated() {
		t.Fatalf("the oldest id is not known: %v", res)
	}
	for range 24*60 + 1 {
		w.apply(w.parse("tick after=1m"))
	}
	if res := start(MaxReloadIDs); res.GetFaultKind() != "" {
		t.Fatalf("with old ids only, a new one was refused: %v", res)
	}
	if n := w.f.View().s.reloadIDs.Len(); n != KeepReloadIDs {
		t.Fatalf("%d ids are kept, not %d", n, KeepReloadIDs)
	}
}

// TestDetailedRecordsAreBounded keeps the newest of each namespace.
func TestDetailedRecordsAreBounded(t *testing.T) {
	w := newWorld(t)
	w.play("init\nhello n1\nregister kv v1.0.0\nnamespace a/")
	for i := range KeepReloads + 20 {
		w.apply(w.parse(fmt.Sprintf("reload r%d plugin=kv", i)))
		if i < 10 {
			w.apply(w.parse(fmt.Sprintf("reload a%d plugin=kv ns=a/", i)))
		}
	}
	w.apply(&commandv1.Command{Body: &commandv1.Command_DropReloads{DropReloads: &commandv1.DropReloads{}}})
	v := w.f.View()
	if n := len(v.Reloads()); n != KeepReloads+10 {
		t.Fatalf("%d records are left, not %d", n, KeepReloads+10)
	}
	if v.Reload("r19") != nil || v.Reload("r20") == nil || v.Reload("a0") == nil {
		t.Fatal("not the oldest were dropped")
	}
}
