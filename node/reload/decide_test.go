package reload

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
	peerv1 "rollcall/proto/peer/v1"
)

func TestDecideChoosesOneActionFromWhatIsWantedAndWhatRuns(t *testing.T) {
	v1, v2 := &commandv1.Spec{Name: "kv", Sha256: "aa"}, &commandv1.Spec{Name: "kv", Sha256: "bb"}
	at := func(gen, fresh uint64, s *commandv1.Spec) *commandv1.Wanted {
		return &commandv1.Wanted{Generation: gen, FreshSince: fresh, Spec: s}
	}
	leads := Role{Leader: true, Term: 3}
	for _, c := range []struct {
		name string
		s    situation
		want action
	}{
		{"nothing wanted", situation{running: at(5, 5, v1), alive: true}, nothing},
		{"first start", situation{wanted: at(5, 5, v1)}, bring},
		{"all as wanted", situation{wanted: at(5, 5, v1), running: at(5, 5, v1), alive: true}, nothing},
		{"new spec", situation{wanted: at(9, 9, v2), running: at(5, 5, v1), alive: true}, bring},
		{"same spec afresh", situation{wanted: at(9, 9, v1), running: at(5, 5, v1), alive: true}, bring},
		{"same spec, fresh enough", situation{wanted: at(9, 5, v1), running: at(5, 5, v1), alive: true}, relabel},
		{"fresh enough but another spec", situation{wanted: at(9, 5, v2), running: at(5, 5, v1), alive: true}, bring},
		{"fresh enough but dead", situation{wanted: at(9, 5, v1), running: at(5, 5, v1)}, bring},
		{"fresh enough but in doubt", situation{wanted: at(9, 5, v1), running: at(5, 5, v1), alive: true, doubtful: true}, bring},
		{"never lower", situation{wanted: at(4, 4, v2), running: at(5, 5, v1), alive: true}, nothing},
		{"lower after a restored snapshot", situation{wanted: at(4, 4, v2), running: at(5, 5, v1), alive: true, restored: true}, bring},
		{"refused here", situation{wanted: at(9, 9, v2), running: at(5, 5, v1), alive: true, refused: 9}, nothing},
		{"crashed", situation{wanted: at(5, 5, v1), running: at(5, 5, v1)}, revive},
		{"crashed where the wanted one was refused", situation{wanted: at(9, 9, v2), running: at(5, 5, v1), refused: 9}, revive},
		{"new role", situation{wanted: at(5, 5, v1), running: at(5, 5, v1), alive: true, role: leads}, assume},
		{"new generation before new role", situation{wanted: at(9, 9, v2), running: at(5, 5, v1), alive: true, role: leads}, bring},
		{"asked to prepare", situation{wanted: at(5, 5, v1), running: at(5, 5, v1), alive: true, asked: true}, prepare},
		{"new role before a vote", situation{
			wanted: at(5, 5, v1), running: at(5, 5, v1), alive: true, asked: true, role: leads,
		}, assume},
		{"asked, and it stands ready", situation{
			wanted: at(5, 5, v1), running: at(5, 5, v1), alive: true, asked: true, spare: true,
		}, nothing},
		{"no third process for a vote", situation{
			wanted: at(5, 5, v1), running: at(5, 5, v1), alive: true, asked: true, retiring: true,
		}, await},
		{"no third process for a switch", situation{
			wanted: at(9, 9, v2), running: at(5, 5, v1), alive: true, retiring: true,
		}, await},
		{"a dead one leaves its place", situation{wanted: at(5, 5, v1), running: at(5, 5, v1), retiring: true}, revive},
	} {
		if got := decide(c.s); got != c.want {
			t.Errorf("%s: action %d, want %d", c.name, got, c.want)
		}
	}
}

func TestBackoffDoublesToItsMaximumWithJitterAndStartsAgain(t *testing.T) {
	b := backoff{min: 100 * time.Millisecond, max: 30 * time.Second}
	for i, full := 0, 100*time.Millisecond; i < 20; i, full = i+1, min(2*full, 30*time.Second) {
		if d := b.pause(); d > full || d < full/2 {
			t.Fatalf("pause %d is %v, want between %v and %v", i, d, full/2, full)
		}
	}
	b.reset()
	if d := b.pause(); d > 100*time.Millisecond {
		t.Fatalf("after a reset the pause is %v", d)
	}
}

func TestPhaseOfFindsTheInnermostNamedPhase(t *testing.T) {
	err := fmt.Errorf("outer: %w", fault.Wrap(fault.New(fault.Refused, "initialize", "kv/", "no upgrade marker"), "trial", "kv/"))
	if got := phaseOf(err, "start"); got != "initialize" {
		t.Errorf("phase %q, want initialize", got)
	}
	if got := phaseOf(inPhase(errors.New("x"), "verify"), "start"); got != "verify" {
		t.Errorf("phase %q, want verify", got)
	}
	if got := phaseOf(inPhase(err, "start"), ""); got != "initialize" {
		t.Errorf("phase %q: inPhase hid the one that the error names", got)
	}
}

func TestBatchIsFlushedWhenCompleteOrAtTheFirstFailureOrWhenOld(t *testing.T) {
	const stagePrepared, stageRefused = commandv1.MountReport_STAGE_PREPARED, commandv1.MountReport_STAGE_REFUSED
	rl := &commandv1.Reload{Id: "r", Phase: commandv1.Phase_PHASE_PREPARING}
	for _, n := range []string{"n1", "n2"} {
		rl.Participants = append(rl.Participants, &commandv1.Participant{
			NodeId: n, Incarnation: 1, Mounts: []*commandv1.MountOutcome{{MountUuid: "m"}},
		})
	}
	v := viewOf{rl}
	say := func(n string, st commandv1.MountReport_Stage) *commandv1.Report {
		return &commandv1.Report{ReloadId: "r", NodeId: n, Incarnation: 1, Mounts: []*commandv1.MountReport{{MountUuid: "m", Stage: st}}}
	}
	now := time.Now()
	b := batch{}
	b.add(say("n1", stagePrepared), now)
	b.add(say("n1", stagePrepared), now.Add(time.Second))
	if len(b) != 1 || b.due(v, now, 100*time.Millisecond) != 100*time.Millisecond {
		t.Fatalf("one of two votes, twice said: %d in the batch, due in %v", len(b), b.due(v, now, 100*time.Millisecond))
	}
	if d := b.due(v, now.Add(150*time.Millisecond), 100*time.Millisecond); d > 0 {
		t.Errorf("an old batch waits %v more", d)
	}
	b.add(say("n2", stagePrepared), now)
	if d := b.due(v, now, 100*time.Millisecond); d != 0 {
		t.Errorf("a complete batch waits %v", d)
	}
	b = batch{}
	b.add(say("n2", stageRefused), now)
	if d := b.due(v, now, 100*time.Millisecond); d != 0 {
		t.Errorf("a refusal waits %v", d)
	}
	b.add(say("n3", stagePrepared), now)
	b.trim(v)
	if reports := b.take(); len(reports) != 1 || reports[0].GetNodeId() != "n2" {
		t.Errorf("taken: %v; a stranger's report belongs out", reports)
	}
}

// viewOf is a view of one reload.
type viewOf struct{ rl *commandv1.Reload }

func (viewOf) Index() uint64                                     { return 0 }
func (viewOf) ClockNS() uint64                                   { return 0 }
func (viewOf) Node(string) *commandv1.Node                       { return nil }
func (viewOf) Plugins() []*commandv1.Plugin                      { return nil }
func (viewOf) Mount(string) *commandv1.Mount                     { return nil }
func (viewOf) Mounts() []*commandv1.Mount                        { return nil }
func (viewOf) Wanted(*commandv1.Mount, string) *commandv1.Wanted { return nil }
func (v viewOf) Reload(string) *commandv1.Reload                 { return v.rl }
func (v viewOf) Reloads() []*commandv1.Reload                    { return []*commandv1.Reload{v.rl} }
func (viewOf) ActiveReload(string) *commandv1.Reload             { return nil }
func (v viewOf) RunningReloads() []*commandv1.Reload             { return []*commandv1.Reload{v.rl} }

func TestGateJudgesReadsAndWritesApartAndNeverPassesOnTooLittle(t *testing.T) {
	traffic := func(reads, readsFailed uint64, readsP99 int64, writes uint64, writesP99 int64, crashes uint32) []*peerv1.MountTraffic {
		return []*peerv1.MountTraffic{{
			Reads:  &commandv1.GateSample{Requests: reads, Failed: readsFailed, P99Us: readsP99},
			Writes: &commandv1.GateSample{Requests: writes, P99Us: writesP99}, Crashes: crashes,
		}}
	}
	type samples = map[string][]*peerv1.MountTraffic
	const passed, failed, unclear = commandv1.Gate_VERDICT_PASSED, commandv1.Gate_VERDICT_FAILED, commandv1.Gate_VERDICT_INCONCLUSIVE
	rl := func(wave uint32) *commandv1.Reload {
		return &commandv1.Reload{
			Wave:    wave,
			Options: &commandv1.Options{MinSamples: 100, MaxErrorRate: 0.01, MaxP99Increase: 2},
			Participants: []*commandv1.Participant{
				{NodeId: "follower", Name: "follower", Wave: 0}, {NodeId: "leader", Name: "leader", Wave: 1},
			},
		}
	}
	old := samples{"follower": traffic(500, 0, 1000, 0, 0, 0), "leader": traffic(500, 0, 1000, 500, 2000, 0)}
	for _, c := range []struct {
		name        string
		wave        uint32
		now, before samples
		want        commandv1.Gate_Verdict
	}{
		{"a follower's reads suffice", 0, samples{
			"follower": traffic(200, 1, 1500, 0, 0, 0), "leader": old["leader"],
		}, nil, passed},
		{"too few reads", 0, samples{"follower": traffic(99, 0, 900, 0, 0, 0), "leader": old["leader"]}, nil, unclear},
		{"too many failed", 0, samples{"follower": traffic(200, 3, 900, 0, 0, 0), "leader": old["leader"]}, nil, failed},
		{"too slow", 0, samples{"follower": traffic(200, 0, 2001, 0, 0, 0), "leader": old["leader"]}, nil, failed},
		{"crash loop", 0, samples{"follower": traffic(200, 0, 900, 0, 0, 2), "leader": old["leader"]}, nil, failed},
		{"one crash", 0, samples{"follower": traffic(200, 0, 900, 0, 0, 1), "leader": old["leader"]}, nil, passed},
		{"a node is silent", 0, samples{"leader": old["leader"]}, nil, unclear},
		{"leader's wave, compared with itself before", 1, samples{
			"follower": traffic(200, 0, 900, 0, 0, 0), "leader": traffic(200, 0, 1100, 200, 2500, 0),
		}, old, passed},
		{"leader's wave without writes", 1, samples{
			"follower": traffic(200, 0, 900, 0, 0, 0), "leader": traffic(200, 0, 1100, 0, 0, 0),
		}, old, unclear},
		{"leader's wave, writes too slow", 1, samples{
			"follower": traffic(200, 0, 900, 0, 0, 0), "leader": traffic(200, 0, 1100, 200, 4100, 0),
		}, old, failed},
		{"leader's wave, nothing to compare with", 1, samples{
			"follower": traffic(200, 0, 900, 0, 0, 0), "leader": traffic(200, 0, 1100, 200, 2500, 0),
		}, nil, unclear},
	} {
		g := judge(rl(c.wave), "leader", c.now, c.before)
		if g.GetVerdict() != c.want {
			t.Errorf("%s: %v (%s), want %v", c.name, g.GetVerdict(), g.GetWhy(), c.want)
		}
	}
}
