package reload

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"rollcall/fsm"
	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

func TestAllOrNothingMovesEveryNodeAndEveryNodeAnswersForItself(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := cluster(t, 3)
		defer s.stop()
		from := time.Now()
		s.start(startReload("r1", &commandv1.Options{}))
		rl := s.ended("r1")
		s.phase(rl, commandv1.Phase_PHASE_DONE)
		// 30 ms of start, 5 of trial, 5 of set-up here and then there, 5 for the old process to end: the rest is ours.
		if took := time.Since(from); took > 80*time.Millisecond {
			t.Errorf("a reload took %v", took)
		}
		if rl.GetOutcome() != "succeeded" || len(rl.GetParticipants()) != 3 {
			t.Fatalf("outcome %q of %d participants", rl.GetOutcome(), len(rl.GetParticipants()))
		}
		for _, p := range rl.GetParticipants() {
			o := outcome(p, kv)
			rep := o.GetReport()
			if o.GetVerdict() != commandv1.Verdict_VERDICT_SWITCHED || rep.GetFrom().GetSha256() != sha("1") ||
				rep.GetTo().GetSha256() != sha("2") || rep.GetTo().GetGeneration() != rl.GetGeneration() ||
				rep.GetFrom().GetPid() == 0 || rep.GetTo().GetPid() == rep.GetFrom().GetPid() {
				t.Errorf("%s: %v %v", p.GetNodeId(), o.GetVerdict(), rep)
			}
			names := ""
			for _, st := range append(o.GetPrepareSteps(), rep.GetSteps()...) {
				names += st.GetName() + " "
			}
			for _, want := range []string{"verify", "start", "handshake", "trial", "ready", "hold", "switch", "drain"} {
				if !strings.Contains(names, want) {
					t.Errorf("%s: no step %q in %q", p.GetNodeId(), want, names)
				}
			}
		}
		s.allRun(kv, "2")
		if _, batches := s.entries(); batches > 3 {
			t.Errorf("%d batches for one reload of three nodes", batches)
		}
		s.set(func() {
			if s.nudges == 0 {
				t.Error("nobody was nudged")
			}
		})
	})
}

func TestARefusalOnOneNodeAbortsAndLeavesEveryNodeOnTheOldGeneration(t *testing.T) {
	for name, b := range map[string]behaviour{
		"verify": {ensure: errors.New("sha256 differs")},
		"start":  {start: errors.New("exec format error")},
		"setup":  {setup: errors.New("bad configuration"), multiplexes: true},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				s := cluster(t, 3)
				defer s.stop()
				s.nodes[2].plugins.act(sha("2"), b)
				before := s.view().Mount(kv).GetWanted().GetGeneration()
				s.start(startReload("r1", &commandv1.Options{}))
				rl := s.ended("r1")
				s.phase(rl, commandv1.Phase_PHASE_ABORTED)
				rep := outcome(participant(rl, "n3"), kv).GetReport()
				if rep.GetStage() != commandv1.MountReport_STAGE_REFUSED || rep.GetFailedPhase() != name || rep.GetCause() == "" {
					t.Errorf("n3 said %v", rep)
				}
				time.Sleep(10 * time.Second)
				s.allRun(kv, "1")
				for _, n := range s.nodes {
					if generation, ready := n.routes.Running(kv); generation != before || !ready {
						t.Errorf("%s serves %d (%v), want %d", n.id, generation, ready, before)
					}
					if n.plugins.living(kv) != 1 {
						t.Errorf("%s: %d processes after the abort, want 1", n.id, n.plugins.living(kv))
					}
				}
			})
		})
	}
}

func TestAProcessThatDoesNotMultiplexIsReplacedAfterItsTrialBeforeTheVote(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := cluster(t, 1)
		defer s.stop()
		s.nodes[0].plugins.act(sha("2"), behaviour{startTook: 30 * time.Millisecond})
		var voted atomic.Int64
		s.hook(nil, func(c *commandv1.Command) {
			for _, rep := range c.GetReportBatch().GetReports() {
				if m := rep.GetMounts()[0]; m.GetStage() == commandv1.MountReport_STAGE_PREPARED {
					voted.Store(m.GetTo().GetPid())
				}
			}
		})
		s.start(startReload("r1", &commandv1.Options{}))
		rl := s.ended("r1")
		s.phase(rl, commandv1.Phase_PHASE_DONE)
		if serves := outcome(participant(rl, "n1"), kv).GetReport().GetTo().GetPid(); serves != voted.Load() {
			t.Errorf("process %d serves, and the vote was for %d", serves, voted.Load())
		}
		n := s.nodes[0]
		if got := n.plugins.started(kv); got != 3 {
			t.Errorf("%d starts, want 3: the first version, the trial, and the one that serves", got)
		}
		if n.plugins.peak(kv) != 2 {
			t.Errorf("at most %d processes at once, want 2", n.plugins.peak(kv))
		}
	})
}

func TestBestEffortKeepsARefusalWithItsNode(t *testing.T) {
	for name, b := range map[string]behaviour{
		"in the trial":    {setup: errors.New("bad configuration"), multiplexes: true},
		"inside the gate": {switchErr: errors.New("the socket is gone"), multiplexes: true},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				s := cluster(t, 3)
				defer s.stop()
				s.nodes[1].plugins.act(sha("2"), b)
				s.start(startReload("r1", &commandv1.Options{Strategy: commandv1.Strategy_STRATEGY_BEST_EFFORT}))
				rl := s.ended("r1")
				s.phase(rl, commandv1.Phase_PHASE_DONE)
				if v := outcome(participant(rl, "n2"), kv).GetVerdict(); v != commandv1.Verdict_VERDICT_REFUSED {
					t.Errorf("n2's verdict is %v", v)
				}
				s.settle(kv)
				for i, want := range []string{"2", "1", "2"} {
					if got := s.runs(s.nodes[i], kv); got != want {
						t.Errorf("n%d runs %s, want %s", i+1, got, want)
					}
				}
				time.Sleep(time.Minute)
				if got := s.nodes[1].plugins.started(kv); got > 2 {
					t.Errorf("%d starts on the node that refused: a refusal is not tried again", got)
				}
				if !s.nodes[1].reloads.Converged() {
					t.Error("the node that refused has not converged, though it runs what is wanted of it")
				}
			})
		})
	}
}

func TestBestEffortTriesAgainWhatWasNotThePluginsFault(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := cluster(t, 3)
		defer s.stop()
		n := s.nodes[1]
		n.plugins.act(sha("2"), behaviour{switchErr: fault.Text(fault.Exhausted, "too many keys changed"), multiplexes: true})
		s.start(startReload("r1", &commandv1.Options{Strategy: commandv1.Strategy_STRATEGY_BEST_EFFORT}))
		s.until("two tries", time.Minute, func() bool { return n.plugins.tried(sha("2")) > 1 })
		if _, ready := n.routes.Running(kv); !ready {
			t.Error("the old instance does not go on between the tries")
		}
		n.plugins.act(sha("2"), behaviour{multiplexes: true})
		s.phase(s.ended("r1"), commandv1.Phase_PHASE_DONE)
		s.allRun(kv, "2")
	})
}

// A node that hears of a best-effort reload when it is over may still keep what it has; nobody waits for it then.
func TestBestEffortIsRefusedInItsRecordByANodeThatComesLate(t *testing.T) {
	for name, lost := range map[string]int64{"at once": 0, "when the leader hears it": 20} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				s := cluster(t, 3)
				defer s.stop()
				n := s.nodes[2]
				n.plugins.act(sha("2"), behaviour{switchErr: errors.New("the socket is gone"), multiplexes: true})
				s.set(func() { n.cut, n.leaseOver = true, true })
				s.start(startReload("r1", &commandv1.Options{Strategy: commandv1.Strategy_STRATEGY_BEST_EFFORT}))
				s.phase(s.ended("r1"), commandv1.Phase_PHASE_DONE)
				var said atomic.Int64
				s.set(func() {
					s.wire = func(*simNode, string) (drop, lose, twice bool) { return said.Add(1) <= lost, false, false }
					n.cut, n.leaseOver = false, false
					s.catchUp(n)
				})
				s.until("refused", 2*time.Minute, func() bool {
					return outcome(participant(s.reload("r1"), "n3"), kv).GetVerdict() == commandv1.Verdict_VERDICT_REFUSED
				})
				s.settle(kv)
				if got := s.runs(n, kv); got != "1" {
					t.Errorf("n3 runs %s, want 1", got)
				}
				if !n.reloads.Converged() {
					t.Error("the node that refused has not converged, though it runs what is wanted of it")
				}
			})
		})
	}
}

func TestRollingGoesFollowersFirstAndTheLeaderLast(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := cluster(t, 3)
		defer s.stop()
		var order []string
		s.hook(nil, func(*commandv1.Command) {
			for _, n := range s.nodes {
				v := n.fsm.View()
				if m := v.Mount(kv); m != nil && v.Wanted(m, n.id).GetSpec().GetSha256() == sha("2") {
					if !strings.Contains(strings.Join(order, " "), n.id) {
						order = append(order, n.id)
					}
				}
			}
		})
		s.start(startReload("r1", &commandv1.Options{
			Strategy: commandv1.Strategy_STRATEGY_ROLLING, MaxUnavailable: 1, BakeMs: ms(10 * time.Second),
		}))
		s.set(func() {
			for _, n := range s.nodes {
				n.routes.mu.Lock()
				n.routes.after = 70
				n.routes.mu.Unlock()
			}
		})
		rl := s.ended("r1")
		s.phase(rl, commandv1.Phase_PHASE_DONE)
		for _, p := range rl.GetParticipants() {
			if got := outcome(p, kv).GetReport().GetTraffic().GetP99AfterUs(); got != 70 {
				t.Errorf("%s: the p99 after the switch is %d in the record", p.GetNodeId(), got)
			}
		}
		if got := strings.Join(order, " "); got != "n2 n3 n1" {
			t.Errorf("order %q, want n2 n3 n1", got)
		}
		s.allRun(kv, "2")
	})
}

func TestACanaryThatCrashesInItsBakeIsRolledBack(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := cluster(t, 3)
		defer s.stop()
		s.nodes[1].plugins.act(sha("2"), behaviour{multiplexes: true, diesAfter: time.Second})
		s.start(startReload("r1", &commandv1.Options{
			Strategy: commandv1.Strategy_STRATEGY_CANARY, Waves: []*commandv1.Options_Wave{{Size: 1}},
			BakeMs: ms(time.Minute),
		}))
		from := time.Now()
		rl := s.ended("r1")
		s.phase(rl, commandv1.Phase_PHASE_ROLLED_BACK)
		if took := time.Since(from); took > 30*time.Second {
			t.Errorf("the crash loop was seen after %v", took)
		}
		s.settle(kv)
		s.allRun(kv, "1")
		for _, n := range []*simNode{s.nodes[0], s.nodes[2]} {
			if n.plugins.started(kv) != 1 {
				t.Errorf("%s started %d processes though it was never its turn", n.id, n.plugins.started(kv))
			}
		}
	})
}

func TestACanaryWithTooFewSamplesPausesAndGoesOnWhenPromoted(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := cluster(t, 3)
		defer s.stop()
		s.start(startReload("r1", &commandv1.Options{
			Strategy: commandv1.Strategy_STRATEGY_CANARY, Waves: []*commandv1.Options_Wave{{Size: 1}},
			BakeMs: ms(2 * time.Second), MinSamples: 10, MaxErrorRate: 0.01,
		}))
		s.until("paused", time.Minute, func() bool { return s.reload("r1").GetPaused() })
		time.Sleep(5 * time.Minute)
		if rl := s.reload("r1"); rl.GetPhase() != commandv1.Phase_PHASE_COMMITTED || !rl.GetPaused() {
			t.Fatalf("a paused canary went on by itself: %s", s.describe())
		}
		for i := 0; i < 3 && !terminal(s.reload("r1").GetPhase()); i++ {
			s.must(&commandv1.Command{Body: &commandv1.Command_ControlReload{ControlReload: &commandv1.ControlReload{
				Id: "r1", Action: commandv1.ControlReload_ACTION_PROMOTE,
			}}})
			time.Sleep(30 * time.Second)
		}
		s.phase(s.ended("r1"), commandv1.Phase_PHASE_DONE)
		s.allRun(kv, "2")
	})
}

func TestALocalReloadMovesTheNodeThatWasAskedAlone(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := cluster(t, 3)
		defer s.stop()
		st := startReload("r1", &commandv1.Options{})
		st.Scope, st.ServingNode = commandv1.Scope_SCOPE_LOCAL, "n2"
		st.RequestHash = fsm.RequestHash(st)
		s.start(st)
		rl := s.ended("r1")
		s.phase(rl, commandv1.Phase_PHASE_DONE)
		s.settle(kv)
		for i, want := range []int{1, 2, 1} {
			if got := s.nodes[i].plugins.started(kv); got != want {
				t.Errorf("n%d started %d processes, want %d", i+1, got, want)
			}
		}
		gen, _ := s.nodes[1].routes.Running(kv)
		s.nodes[1].stop()
		s.nodes[1].start()
		s.settle(kv)
		if again, _ := s.nodes[1].routes.Running(kv); again != gen {
			t.Errorf("after its restart n2 runs %d, want its override %d", again, gen)
		}
		s.start(startReload("r2", &commandv1.Options{}))
		s.phase(s.ended("r2"), commandv1.Phase_PHASE_DONE)
		s.settle(kv)
		if len(s.view().Mount(kv).GetOverrides()) != 0 {
			t.Error("the override outlived a global reload")
		}
	})
}

func TestManyReloadsEndWithAtMostTwoProcessesOfAMount(t *testing.T) {
	bubble(t, func(t *testing.T) {
		const reloads = 1000
		s := cluster(t, 3)
		defer s.stop()
		for i := range reloads {
			o := &commandv1.Options{}
			if i%2 == 1 {
				// Different requests are not joined.
				o.PrepareMs, o.QueueMs = int64(60_000+i), ms(24*time.Hour)
			} else {
				o.PrepareMs, o.QueueMs = int64(90_000+i), ms(24*time.Hour)
			}
			s.start(startReload(fmt.Sprintf("r%04d", i), o))
		}
		s.until("the last of them", 6*time.Hour, func() bool { return len(s.view().RunningReloads()) == 0 })
		for i := range reloads {
			row := s.view().ReloadID(fmt.Sprintf("r%04d", i))
			if row.GetOutcome() != "succeeded" && row.GetFirstId() == "" {
				t.Fatalf("r%04d: outcome %q", i, row.GetOutcome())
			}
		}
		s.settle(kv)
		for _, n := range s.nodes {
			if n.plugins.peak(kv) != 2 || n.plugins.living(kv) != 1 {
				t.Errorf("%s: at most %d processes at once, %d now", n.id, n.plugins.peak(kv), n.plugins.living(kv))
			}
		}
	})
}

func TestADisabledMountLeavesNoProcess(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := cluster(t, 3)
		defer s.stop()
		s.enable(other, "other/")
		s.settle(other)
		s.nodes[1].plugins.act(sha("2"), behaviour{startTook: 3 * time.Second, multiplexes: true})
		s.start(startReload("r1", &commandv1.Options{}))
		time.Sleep(time.Second)
		s.disable("kv/")
		rl := s.ended("r1")
		s.until("no process", time.Minute, func() bool {
			for _, n := range s.nodes {
				if n.plugins.living(kv) != 0 {
					return false
				}
			}
			return true
		})
		s.settle(other)
		s.allRun(other, map[commandv1.Phase]string{
			commandv1.Phase_PHASE_DONE: "2", commandv1.Phase_PHASE_ABORTED: s.runs(s.nodes[0], other),
		}[rl.GetPhase()])
	})
}

func TestReplayedHistoryStartsNoProcess(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := cluster(t, 1)
		defer s.stop()
		for i := range 20 {
			id := fmt.Sprintf("r%d", i)
			s.start(startReload(id, &commandv1.Options{}))
			s.ended(id)
		}
		n := s.nodes[0]
		n.stop()
		s.set(func() { n.fsm, n.applied, n.slowly = fsm.New(), 0, true })
		n.start()
		s.settle(kv)
		if got := n.plugins.started(kv); got != 1 {
			t.Errorf("%d processes were started for one mount's history, want 1", got)
		}
	})
}

func TestPlanTriesEverySpecAndTouchesNothing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := cluster(t, 1)
		defer s.stop()
		n := s.nodes[0]
		before, _ := n.routes.Running(kv)
		target := func(c string) *commandv1.Target {
			return &commandv1.Target{MountUuid: kv, Path: "kv/", To: &commandv1.Spec{Type: "secret", Name: "kv", Sha256: sha(c)}}
		}
		n.plugins.act(sha("3"), behaviour{setup: errors.New("wrong type")})
		reports, rss, err := n.reloads.Plan(context.Background(), []*commandv1.Target{target("2"), target("3")}, "")
		if err != nil || len(reports) != 2 || len(rss) != 2 {
			t.Fatalf("plan: %v, %d reports", err, len(reports))
		}
		if reports[0].GetStage() != commandv1.MountReport_STAGE_PREPARED || rss[0] == 0 {
			t.Errorf("the good one: %v", reports[0])
		}
		if reports[1].GetStage() != commandv1.MountReport_STAGE_REFUSED || reports[1].GetFailedPhase() != "setup" {
			t.Errorf("the bad one: %v", reports[1])
		}
		if after, ready := n.routes.Running(kv); after != before || !ready || n.plugins.living(kv) != 1 {
			t.Errorf("after the plan %d runs (%v), %d processes", after, ready, n.plugins.living(kv))
		}
		m := &commandv1.Mount{Uuid: other, Path: "new/", Type: "kv", PluginType: "secret"}
		if err := n.reloads.TryMount(context.Background(), m, target("3").GetTo()); phaseOf(err, "") != "setup" {
			t.Errorf("try mount: %v", err)
		}
		if err := n.reloads.TryMount(context.Background(), m, target("2").GetTo()); err != nil || n.plugins.living(other) != 0 {
			t.Errorf("try mount: %v, %d processes left", err, n.plugins.living(other))
		}
	})
}

func TestEveryShaThatARestartOrARollbackNeedsIsKept(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := cluster(t, 1)
		defer s.stop()
		s.start(startReload("r1", &commandv1.Options{}))
		s.ended("r1")
		s.must(&commandv1.Command{Body: &commandv1.Command_DeregisterPlugin{DeregisterPlugin: &commandv1.DeregisterPlugin{
			Type: "secret", Name: "kv", Version: "v1.0.0",
		}}})
		s.register("v3.0.0", "3")
		time.Sleep(2 * time.Minute)
		var got string
		s.set(func() { got = strings.Join(s.nodes[0].plugins.kept, " ") })
		if got != sha("1")+" "+sha("2")+" "+sha("3") {
			t.Errorf("kept %q: the previous, the wanted and the registered are needed", got)
		}
	})
}

func TestABootStartsAFewPluginsAtATime(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newSim(t, 1)
		defer s.stop()
		s.register("v1.0.0", "1")
		n := s.nodes[0]
		n.stop()
		for i := range 20 {
			s.enable(fmt.Sprintf("00000000-0000-4000-8000-0000000001%02d", i), fmt.Sprintf("kv%d/", i))
		}
		n.start()
		for i := range 20 {
			s.settle(fmt.Sprintf("00000000-0000-4000-8000-0000000001%02d", i))
		}
		s.set(func() {
			if n.plugins.startingMost != 2 {
				t.Errorf("%d starts at once, want 2", n.plugins.startingMost)
			}
		})
	})
}

func TestTheRecordOfAReloadThatIsDoneStillGetsTheLatencyAfterTheSwitch(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := cluster(t, 3)
		defer s.stop()
		s.start(startReload("r1", &commandv1.Options{}))
		s.phase(s.ended("r1"), commandv1.Phase_PHASE_DONE)
		_, before := s.entries()
		for _, n := range s.nodes {
			n.routes.mu.Lock()
			n.routes.after = 70
			n.routes.mu.Unlock()
		}
		s.until("every node's latency after the switch", 30*time.Second, func() bool {
			for _, p := range s.reload("r1").GetParticipants() {
				if outcome(p, kv).GetReport().GetTraffic().GetP99AfterUs() != 70 {
					return false
				}
			}
			return true
		})
		rl := s.reload("r1")
		s.phase(rl, commandv1.Phase_PHASE_DONE)
		if rl.GetOutcome() != "succeeded" {
			t.Errorf("outcome %q", rl.GetOutcome())
		}
		time.Sleep(5 * time.Minute)
		if _, after := s.entries(); after-before > 2 {
			t.Errorf("%d entries for three nodes' measurements", after-before)
		}
	})
}
