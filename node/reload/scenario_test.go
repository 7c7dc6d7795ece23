package reload

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"rollcall/fsm"
	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// sha makes a sha256 that can be told apart by eye.
func sha(c string) string { return strings.Repeat(c, 64) }

const (
	kv    = "00000000-0000-4000-8000-000000000001"
	other = "00000000-0000-4000-8000-000000000002"
)

// register enters version of plugin kv with the bytes of sha c.
func (s *sim) register(version, c string) {
	s.must(&commandv1.Command{Body: &commandv1.Command_RegisterPlugin{RegisterPlugin: &commandv1.RegisterPlugin{
		Spec: &commandv1.Spec{Type: "secret", Name: "kv", Version: version, Command: "kv", Sha256: sha(c)},
	}}})
}

func (s *sim) enable(uuid, path string) {
	s.must(&commandv1.Command{Body: &commandv1.Command_EnableMount{EnableMount: &commandv1.EnableMount{
		Uuid: uuid, Accessor: "acc_" + uuid[30:], Table: "secret", Path: path, Type: "kv", PluginType: "secret",
	}}})
}

func (s *sim) disable(path string) {
	s.must(&commandv1.Command{Body: &commandv1.Command_DisableMount{DisableMount: &commandv1.DisableMount{
		Table: "secret", Path: path,
	}}})
}

// startReload makes a global reload of the plugin, asked of n1.
func startReload(id string, o *commandv1.Options) *commandv1.StartReload {
	st := &commandv1.StartReload{
		Id: id, Selector: &commandv1.Selector{PluginType: "secret", Plugin: "kv"}, Scope: commandv1.Scope_SCOPE_GLOBAL,
		ServingNode: "n1", Options: o, RequestedBy: "test", LeaderId: "n1",
	}
	st.RequestHash = fsm.RequestHash(st)
	return st
}

func (s *sim) start(st *commandv1.StartReload) {
	s.t.Helper()
	s.must(&commandv1.Command{Body: &commandv1.Command_StartReload{StartReload: st}})
}

// cluster is a sim of nodes that run mount kv/ at version 1, with version 2 in the catalog.
func cluster(t *testing.T, nodes int) *sim {
	t.Helper()
	s := newSim(t, nodes)
	s.register("v1.0.0", "1")
	s.enable(kv, "kv/")
	s.settle(kv)
	s.register("v2.0.0", "2")
	return s
}

// settle waits until every running node serves what is wanted of it.
func (s *sim) settle(uuid string) {
	s.t.Helper()
	s.until("settle", time.Minute, func() bool {
		for _, n := range s.nodes {
			if n.up && !n.cut && !s.serves(n, uuid) {
				return false
			}
		}
		return true
	})
}

func (s *sim) serves(n *simNode, uuid string) bool {
	v := n.fsm.View()
	m := v.Mount(uuid)
	generation, ready := n.routes.Running(uuid)
	return m != nil && ready && generation == v.Wanted(m, n.id).GetGeneration()
}

// ended waits until the reload is over and nothing of it is left to do, and returns its record.
func (s *sim) ended(id string) *commandv1.Reload {
	s.t.Helper()
	s.until("end of "+id, 10*time.Minute, func() bool {
		rl := s.reload(id)
		return rl != nil && terminal(rl.GetPhase())
	})
	return s.reload(id)
}

func (s *sim) phase(rl *commandv1.Reload, want commandv1.Phase) {
	s.t.Helper()
	if rl.GetPhase() != want {
		s.t.Fatalf("%s is %v, want %v: %s", rl.GetId(), rl.GetPhase(), want, s.describe())
	}
}

// runs answers the first letter of the sha that the node's instance of the mount was started from; "" for none.
func (s *sim) runs(n *simNode, uuid string) string {
	if spec := n.routes.serving(uuid); spec != nil {
		return spec.GetSha256()[:1]
	}
	return ""
}

func (s *sim) allRun(uuid, want string) {
	s.t.Helper()
	for _, n := range s.nodes {
		if got := s.runs(n, uuid); n.up && got != want {
			s.t.Errorf("%s runs %q, want %q", n.id, got, want)
		}
	}
}

func ms(d time.Duration) int64 { return d.Milliseconds() }

// bubble runs f in virtual time.
func bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}

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

func TestAPreparedProcessThatDiesBeforeTheCommitRefuses(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := cluster(t, 3)
		defer s.stop()
		// n3 takes long, so that n2 is prepared for a while before the commit.
		s.nodes[2].plugins.act(sha("2"), behaviour{startTook: 5 * time.Second, multiplexes: true})
		s.start(startReload("r1", &commandv1.Options{}))
		s.until("n2 prepared", time.Minute, func() bool {
			return outcome(participant(s.reload("r1"), "n2"), kv).GetPrepared()
		})
		s.nodes[1].plugins.newest(kv).die(errors.New("signal: killed"))
		rl := s.ended("r1")
		s.phase(rl, commandv1.Phase_PHASE_ABORTED)
		s.settle(kv)
		s.allRun(kv, "1")
	})
}

func TestAPreparedProcessThatDiesAfterTheCommitIsStartedAgain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := cluster(t, 3)
		defer s.stop()
		var killed atomic.Bool
		s.hook(nil, func(*commandv1.Command) {
			if rl := s.reload("r1"); rl.GetPhase() == commandv1.Phase_PHASE_COMMITTED && !killed.Swap(true) {
				s.nodes[1].plugins.newest(kv).die(errors.New("signal: killed"))
			}
		})
		s.start(startReload("r1", &commandv1.Options{}))
		rl := s.ended("r1")
		s.phase(rl, commandv1.Phase_PHASE_DONE)
		if !killed.Load() || rl.GetOutcome() != "succeeded" {
			t.Fatalf("killed %v, outcome %q", killed.Load(), rl.GetOutcome())
		}
		s.allRun(kv, "2")
	})
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

// TestLeaderLossAtEveryStepLeavesOneOutcome loses the leader at the k-th command of a reload, before or after it is
// applied, for every k until a run is over before it comes to that.
func TestLeaderLossAtEveryStepLeavesOneOutcome(t *testing.T) {
	for _, when := range []string{"before", "after"} {
		for k := range 8 {
			t.Run(fmt.Sprintf("%s command %d", when, k), func(t *testing.T) {
				bubble(t, func(t *testing.T) {
					s := cluster(t, 3)
					defer s.stop()
					var count atomic.Int64
					lost := make(chan struct{}, 1)
					hit := func(c *commandv1.Command) bool {
						if c.GetReportBatch() == nil && c.GetTakeOver() == nil && c.GetStartReload() == nil {
							return false
						}
						return count.Add(1) == int64(k+1)
					}
					lose := func() {
						s.mu.Lock()
						s.nodes[0].cut = true
						s.mu.Unlock()
						select {
						case lost <- struct{}{}:
						default:
						}
					}
					if when == "before" {
						s.hook(func(c *commandv1.Command) error {
							if hit(c) {
								lose()
								return fault.New(fault.OutcomeUnknown, "propose", "", "leadership was lost")
							}
							return nil
						}, nil)
					} else {
						s.hook(nil, func(c *commandv1.Command) {
							if hit(c) {
								lose()
							}
						})
					}
					st := startReload("r1", &commandv1.Options{})
					_, err := s.propose(&commandv1.Command{Body: &commandv1.Command_StartReload{StartReload: st}})
					select {
					case <-lost:
						s.elect(nil)
						time.Sleep(time.Second)
						s.elect(s.nodes[1])
						time.Sleep(3 * time.Second)
						s.nodes[0].stop()
						s.nodes[0].start()
					case <-time.After(20 * time.Second):
					}
					if err != nil {
						// The client repeats what it does not know the outcome of.
						s.start(st)
					}
					rl := s.ended("r1")
					s.settle(kv)
					time.Sleep(10 * time.Second)
					want := map[commandv1.Phase]string{commandv1.Phase_PHASE_DONE: "2", commandv1.Phase_PHASE_ABORTED: "1"}[rl.GetPhase()]
					s.allRun(kv, want)
					for _, n := range s.nodes {
						if got := n.fsm.View().Reload("r1"); !proto.Equal(got, s.reload("r1")) {
							t.Errorf("%s has another record of it: %v", n.id, got)
						}
					}
				})
			})
		}
	}
}

func TestANodeThatRestartsWhilePreparingMustPrepareAgain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := cluster(t, 3)
		defer s.stop()
		s.nodes[2].plugins.act(sha("2"), behaviour{startTook: 5 * time.Second, multiplexes: true})
		s.start(startReload("r1", &commandv1.Options{}))
		s.until("n2 prepared", time.Minute, func() bool {
			return outcome(participant(s.reload("r1"), "n2"), kv).GetPrepared()
		})
		s.nodes[1].stop()
		s.nodes[1].start()
		if outcome(participant(s.reload("r1"), "n2"), kv).GetPrepared() {
			t.Fatal("the vote outlived the process that it was for")
		}
		s.phase(s.ended("r1"), commandv1.Phase_PHASE_DONE)
		s.allRun(kv, "2")
	})
}

func TestANodeThatWasDownStartsOnceAtTheNewestGeneration(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := cluster(t, 3)
		defer s.stop()
		s.nodes[2].stop()
		s.set(func() { s.nodes[2].leaseOver = true })
		for i := range 3 {
			id := fmt.Sprintf("r%d", i)
			s.start(startReload(id, &commandv1.Options{}))
			s.phase(s.ended(id), commandv1.Phase_PHASE_DONE)
		}
		s.nodes[2].start()
		s.settle(kv)
		if got := s.nodes[2].plugins.started(kv); got != 1 {
			t.Errorf("%d processes were started on the node that was down, want 1", got)
		}
		s.allRun(kv, "2")
	})
}

func TestACrashedPluginComesBackAndACrashLoopIsSlowedDown(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := cluster(t, 1)
		defer s.stop()
		n := s.nodes[0]
		n.plugins.newest(kv).die(errors.New("exit status 1"))
		from := time.Now()
		s.until("started again", time.Minute, func() bool { return n.plugins.started(kv) == 2 })
		s.settle(kv)
		if took := time.Since(from); took > 500*time.Millisecond {
			t.Errorf("served again after %v", took)
		}
		before := n.plugins.started(kv)
		log, _ := s.entries()
		n.plugins.act(sha("1"), behaviour{diesAfter: 50 * time.Millisecond, multiplexes: true})
		n.plugins.newest(kv).die(errors.New("exit status 1"))
		time.Sleep(10 * time.Minute)
		// 100 ms doubled to 30 s: nine starts come to 30 s, then two to four a minute with jitter.
		if got := n.plugins.started(kv) - before; got < 15 || got > 60 {
			t.Errorf("%d starts in ten minutes of a crash loop", got)
		}
		if now, _ := s.entries(); now-log > 80 {
			t.Errorf("%d entries for a crash loop", now-log)
		}
	})
}

func TestARoleChangeDuringAReloadEndsWithTheNewLeaderAsTheOnlyWriter(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := cluster(t, 3)
		defer s.stop()
		for _, at := range []commandv1.Phase{commandv1.Phase_PHASE_PREPARING, commandv1.Phase_PHASE_COMMITTED} {
			id := at.String()
			moved := make(chan struct{}, 1)
			s.hook(nil, func(*commandv1.Command) {
				if s.reload(id).GetPhase() == at {
					select {
					case moved <- struct{}{}:
					default:
					}
				}
			})
			s.start(startReload(id, &commandv1.Options{}))
			<-moved
			s.hook(nil, nil)
			time.Sleep(4 * time.Millisecond) // everybody is in the middle of it
			next := s.nodes[2]
			s.set(func() {
				if s.leader == next {
					next = s.nodes[0]
				}
			})
			s.elect(next)
			from := time.Now()
			s.phase(s.ended(id), commandv1.Phase_PHASE_DONE)
			if took := time.Since(from); took > 5*time.Second {
				t.Errorf("it took %v after the election: somebody waited for a role that was over", took)
			}
			s.settle(kv)
			s.until("the new leader took over", time.Minute, func() bool {
				m := s.view().Mount(kv)
				return m.GetEpochTerm() == s.view().Term() && m.GetEpochGeneration() == m.GetWanted().GetGeneration()
			})
		}
	})
}

func TestAPluginThatCannotAssumeARoleIsReplaced(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newSim(t, 2)
		defer s.stop()
		s.nodes[1].plugins.act(sha("1"), behaviour{multiplexes: true, assume: errors.New("reads its role once")})
		s.register("v1.0.0", "1")
		s.enable(kv, "kv/")
		s.settle(kv)
		s.elect(s.nodes[1])
		s.until("taken over", time.Minute, func() bool { return s.view().Mount(kv).GetEpochTerm() == 2 })
		if got := s.nodes[1].plugins.started(kv); got != 2 {
			t.Errorf("%d starts, want 2", got)
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

func TestLostAndRepeatedReportsChangeNothing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := cluster(t, 5)
		defer s.stop()
		calls := 0
		s.wire = func(*simNode, string) (drop, lose, twice bool) {
			s.mu.Lock()
			defer s.mu.Unlock()
			calls++
			return calls%3 == 0, calls%3 == 1, calls%2 == 0
		}
		s.start(startReload("r1", &commandv1.Options{}))
		rl := s.ended("r1")
		s.phase(rl, commandv1.Phase_PHASE_DONE)
		if rl.GetOutcome() != "succeeded" {
			t.Errorf("outcome %q", rl.GetOutcome())
		}
		log, _ := s.entries()
		time.Sleep(time.Minute)
		if now, _ := s.entries(); now > log {
			t.Errorf("%d entries after the end: somebody still repeats itself", now-log)
		}
	})
}

func TestASilentNodeIsExcludedWhenItsLeaseIsOverAndBlocksOtherwise(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := cluster(t, 3)
		defer s.stop()
		s.set(func() { s.nodes[2].cut = true })
		s.start(startReload("r1", &commandv1.Options{PrepareMs: ms(20 * time.Second)}))
		s.phase(s.ended("r1"), commandv1.Phase_PHASE_ABORTED)
		s.start(startReload("r2", &commandv1.Options{PrepareMs: ms(60 * time.Second)}))
		time.Sleep(6 * time.Second)
		if rl := s.reload("r2"); rl.GetPhase() != commandv1.Phase_PHASE_PREPARING {
			t.Fatalf("it went on without n3, which may still answer: %v", rl.GetPhase())
		}
		var excluded, fenced atomic.Int64
		s.hook(nil, func(c *commandv1.Command) {
			if c.GetExcludeNode() != nil {
				excluded.Add(1)
			}
			if c.GetFenceNode() != nil {
				fenced.Add(1)
			}
		})
		s.set(func() { s.nodes[2].leaseOver = true })
		rl := s.ended("r2")
		s.phase(rl, commandv1.Phase_PHASE_DONE)
		p := participant(rl, "n3")
		if excluded.Load() != 1 || fenced.Load() != 1 || p.GetSafe() != commandv1.Safe_SAFE_FENCED ||
			outcome(p, kv).GetVerdict() != commandv1.Verdict_VERDICT_PENDING_DOWN {
			t.Errorf("n3 was excluded %d times and fenced %d times; %v", excluded.Load(), fenced.Load(), p)
		}
	})
}

func TestANodeThatIsCutOffAfterTheCommitIsFencedAndConvergesLate(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := cluster(t, 3)
		defer s.stop()
		// The commit itself does not reach n3.
		s.hook(func(c *commandv1.Command) error {
			if s.batchCompletes(c) {
				s.set(func() { s.nodes[2].cut = true })
			}
			return nil
		}, nil)
		s.start(startReload("r1", &commandv1.Options{}))
		s.until("committed", time.Minute, func() bool { return s.reload("r1").GetPhase() == commandv1.Phase_PHASE_COMMITTED })
		s.hook(nil, nil)
		time.Sleep(6 * time.Second)
		if rl := s.reload("r1"); terminal(rl.GetPhase()) {
			t.Fatalf("it ended while n3 may still answer: %s", s.describe())
		}
		s.set(func() { s.nodes[2].leaseOver = true })
		rl := s.ended("r1")
		s.phase(rl, commandv1.Phase_PHASE_DONE)
		if v := outcome(participant(rl, "n3"), kv).GetVerdict(); v != commandv1.Verdict_VERDICT_PENDING_DOWN {
			t.Errorf("n3's verdict is %v", v)
		}
		s.mu.Lock()
		s.nodes[2].cut, s.nodes[2].leaseOver = false, false
		s.catchUp(s.nodes[2])
		s.mu.Unlock()
		s.settle(kv)
		s.until("converged late", time.Minute, func() bool {
			return outcome(participant(s.reload("r1"), "n3"), kv).GetVerdict() == commandv1.Verdict_VERDICT_CONVERGED_LATE
		})
		s.allRun(kv, "2")
	})
}

// batchCompletes reports whether the command holds the last vote that is missing.
func (s *sim) batchCompletes(c *commandv1.Command) bool {
	have := map[string]bool{}
	for _, p := range s.reload("r1").GetParticipants() {
		if outcome(p, kv).GetPrepared() {
			have[p.GetNodeId()] = true
		}
	}
	votes := 0
	for _, rep := range c.GetReportBatch().GetReports() {
		if rep.GetMounts()[0].GetStage() == commandv1.MountReport_STAGE_PREPARED {
			have[rep.GetNodeId()] = true
			votes++
		}
	}
	return votes > 0 && len(have) == 3
}

func TestRequestsInFlightAreDrainedAndNoneIsLostOrAnsweredByAnOldGeneration(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := cluster(t, 3)
		defer s.stop()
		ctx, cancel := context.WithCancel(context.Background())
		served := make(chan struct{}, 9)
		for _, n := range s.nodes {
			for i := range 3 {
				go func() {
					for ctx.Err() == nil {
						_, _ = n.routes.request(ctx, kv, time.Duration(20+30*i)*time.Millisecond)
						time.Sleep(time.Millisecond)
					}
					served <- struct{}{}
				}()
			}
		}
		for i := range 20 {
			id := fmt.Sprintf("r%d", i)
			s.start(startReload(id, &commandv1.Options{}))
			s.phase(s.ended(id), commandv1.Phase_PHASE_DONE)
		}
		cancel()
		for range 9 {
			<-served
		}
	})
}

func TestARequestThatOutlivesTheHoldIsWaitedForThenForced(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := cluster(t, 1)
		defer s.stop()
		n := s.nodes[0]
		slow := make(chan uint64, 1)
		go func() {
			generation, _ := n.routes.request(context.Background(), kv, 4*time.Second)
			slow <- generation
		}()
		time.Sleep(10 * time.Millisecond)
		before, _ := n.routes.Running(kv)
		s.start(startReload("r1", &commandv1.Options{}))
		rl := s.ended("r1")
		s.phase(rl, commandv1.Phase_PHASE_DONE)
		if generation := <-slow; generation != before {
			t.Errorf("the slow request was answered by %d, want %d", generation, before)
		}
		// One that never ends is forced at the phase's deadline, and the reload ends.
		n.routes.mu.Lock()
		n.routes.route(kv).inflight++
		n.routes.mu.Unlock()
		from := time.Now()
		s.start(startReload("r2", &commandv1.Options{RunMs: ms(40 * time.Second)}))
		rl = s.ended("r2")
		s.phase(rl, commandv1.Phase_PHASE_DONE)
		if took := time.Since(from); rl.GetOutcome() != "succeeded" || took < 25*time.Second || took > 40*time.Second {
			t.Errorf("outcome %q after %v", rl.GetOutcome(), took)
		}
		n.routes.mu.Lock()
		n.routes.route(kv).inflight--
		n.routes.mu.Unlock()
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

func TestACommittedSwitchThatFailsIsReportedOnceAndTriedForward(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := cluster(t, 3)
		defer s.stop()
		n := s.nodes[1]
		n.plugins.act(sha("2"), behaviour{switchErr: errors.New("initialize refused"), multiplexes: true})
		s.start(startReload("r1", &commandv1.Options{RunMs: ms(10 * time.Minute)}))
		s.until("failed switch", time.Minute, func() bool {
			return outcome(participant(s.reload("r1"), "n2"), kv).GetReport().GetStage() ==
				commandv1.MountReport_STAGE_FAILED_SWITCH
		})
		time.Sleep(5 * time.Second)
		_, batches := s.entries()
		starts := n.plugins.started(kv)
		var said atomic.Int64
		s.set(func() {
			s.wire = func(_ *simNode, method string) (drop, lose, twice bool) { said.Add(1); return }
		})
		time.Sleep(time.Minute)
		if _, now := s.entries(); now > batches || said.Load() > 0 {
			t.Errorf("%d batches and %d reports in a minute of failing", now-batches, said.Load())
		}
		if got := n.plugins.started(kv) - starts; got < 2 || got > 12 {
			t.Errorf("%d starts in a minute of failing", got)
		}
		if o := outcome(participant(s.reload("r1"), "n2"), kv); !o.GetSafe() ||
			o.GetVerdict() != commandv1.Verdict_VERDICT_FAILED_SWITCH || o.GetReport().GetCause() == "" {
			t.Errorf("the record says %v of it", o)
		}
		if _, ready := n.routes.Running(kv); ready {
			t.Error("a committed generation failed, and the old one still answers")
		}
		if !n.reloads.Converged() {
			t.Error("a node that answers nothing has nothing to converge")
		}
		n.plugins.act(sha("2"), behaviour{multiplexes: true})
		s.settle(kv)
		s.ended("r1")
		s.allRun(kv, "2")
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

func TestAVoteIsTriedOnceHoweverLongItsReportIsLost(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := cluster(t, 3)
		defer s.stop()
		n := s.nodes[2]
		n.plugins.act(sha("2"), behaviour{start: errors.New("exit status 1"), startTook: 10 * time.Millisecond})
		var tries atomic.Int64
		s.set(func() {
			s.wire = func(*simNode, string) (drop, lose, twice bool) { return tries.Add(1) < 10, false, false }
		})
		s.start(startReload("r1", &commandv1.Options{}))
		s.phase(s.ended("r1"), commandv1.Phase_PHASE_ABORTED)
		if got := n.plugins.tried(sha("2")); got != 1 {
			t.Errorf("%d attempts for one vote", got)
		}
	})
}

func TestARoleThatCouldNotBeAssumedYetIsAssumedInTheSameProcess(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newSim(t, 2)
		defer s.stop()
		s.register("v1.0.0", "1")
		s.enable(kv, "kv/")
		s.settle(kv)
		s.nodes[1].plugins.act(sha("1"), behaviour{
			multiplexes: true, assume: fault.New(fault.NotLeader, "propose", "", "not yet"),
		})
		s.elect(s.nodes[1])
		time.Sleep(time.Second)
		s.nodes[1].plugins.act(sha("1"), behaviour{multiplexes: true})
		s.until("taken over", time.Minute, func() bool { return s.view().Mount(kv).GetEpochTerm() == 2 })
		if got := s.nodes[1].plugins.started(kv); got != 1 {
			t.Errorf("%d starts, want 1", got)
		}
	})
}

func TestACommittedMountThatCannotEvenStartAnswersNothingAfterTheGrace(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := cluster(t, 3)
		defer s.stop()
		n := s.nodes[1]
		var killed atomic.Bool
		s.hook(nil, func(*commandv1.Command) {
			if s.reload("r1").GetPhase() == commandv1.Phase_PHASE_COMMITTED && !killed.Swap(true) {
				n.plugins.act(sha("2"), behaviour{start: errors.New("exec format error")})
				n.plugins.newest(kv).die(errors.New("signal: killed"))
			}
		})
		s.start(startReload("r1", &commandv1.Options{RunMs: ms(10 * time.Minute)}))
		time.Sleep(3 * time.Second)
		if _, ready := n.routes.Running(kv); !ready || n.reloads.Converged() {
			t.Error("within the grace the old generation goes on, and the node has not converged")
		}
		s.until("safe", 30*time.Second, func() bool {
			o := outcome(participant(s.reload("r1"), "n2"), kv)
			return o.GetSafe() && o.GetVerdict() == commandv1.Verdict_VERDICT_FAILED_SWITCH
		})
		if _, ready := n.routes.Running(kv); ready || !n.reloads.Converged() {
			t.Error("after the grace nothing answers, and that counts as converged")
		}
		n.plugins.act(sha("2"), behaviour{multiplexes: true})
		rl := s.ended("r1")
		if rl.GetOutcome() != "succeeded" {
			t.Errorf("outcome %q: %s", rl.GetOutcome(), s.describe())
		}
		s.allRun(kv, "2")
	})
}

func TestEveryPhaseHasADeadlineOfItsOwn(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := cluster(t, 1)
		defer s.stop()
		n := s.nodes[0]
		n.plugins.act(sha("2"), behaviour{multiplexes: true, startTook: 15 * time.Second})
		go func() {
			time.Sleep(14 * time.Second)
			_, _ = n.routes.request(context.Background(), kv, 15*time.Second)
		}()
		s.start(startReload("r1", &commandv1.Options{PrepareMs: ms(20 * time.Second), RunMs: ms(time.Minute)}))
		if rl := s.ended("r1"); rl.GetOutcome() != "succeeded" {
			t.Errorf("outcome %q: %s", rl.GetOutcome(), s.describe())
		}
	})
}

func TestLeaderChangesCannotProlongAPhaseForEver(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := cluster(t, 3)
		defer s.stop()
		s.set(func() { s.nodes[2].cut = true })
		s.start(startReload("r1", &commandv1.Options{PrepareMs: ms(60 * time.Second)}))
		from := time.Now()
		for i := 0; !terminal(s.reload("r1").GetPhase()); i++ {
			if took := time.Since(from); took > 3*time.Minute {
				t.Fatalf("still preparing after %v", took)
			}
			time.Sleep(5 * time.Second)
			s.must(&commandv1.Command{Body: &commandv1.Command_Tick{Tick: &commandv1.Tick{}}})
			if i%8 == 7 {
				s.elect(s.nodes[(i/8+1)%2])
			}
		}
	})
}

func TestReportsBeyondTheQueueAreRefusedUntilThereIsRoom(t *testing.T) {
	ld := &leader{r: &Reloads{cfg: Config{QueueLimit: 2}}, wakes: make(chan struct{}, 1), batch: batch{}}
	rep := &commandv1.Report{ReloadId: "r", Mounts: []*commandv1.MountReport{{MountUuid: "a"}, {MountUuid: "b"}}}
	if err := ld.accept([]*commandv1.Report{rep}); err != nil {
		t.Fatal(err)
	}
	if err := ld.accept([]*commandv1.Report{rep}); !fault.Is(err, fault.Exhausted) {
		t.Errorf("a full queue answered %v", err)
	}
	ld.gather()
	if err := ld.accept([]*commandv1.Report{rep}); err != nil {
		t.Errorf("an emptied queue answered %v", err)
	}
}

func TestAStartThatIsNoLongerWantedIsGivenUp(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := cluster(t, 3)
		defer s.stop()
		// As the last vote comes in, the prepared processes of the leader and of n3 die. The leader's next one takes long, and
		// n3 has none that starts.
		s.hook(func(c *commandv1.Command) error {
			if s.batchCompletes(c) {
				s.nodes[0].plugins.act(sha("2"), behaviour{multiplexes: true, startTook: 20 * time.Second})
				s.nodes[2].plugins.act(sha("2"), behaviour{start: errors.New("exec format error")})
				s.nodes[0].plugins.newest(kv).die(errors.New("signal: killed"))
				s.nodes[2].plugins.newest(kv).die(errors.New("signal: killed"))
			}
			return nil
		}, nil)
		s.start(startReload("r1", &commandv1.Options{RollbackOnSwitchFailure: true}))
		from := time.Now()
		s.phase(s.ended("r1"), commandv1.Phase_PHASE_ROLLED_BACK)
		s.settle(kv)
		if took := time.Since(from); took > 5*time.Second {
			t.Errorf("it took %v: a node waited for a start that nobody wanted any more", took)
		}
		s.allRun(kv, "1")
		if got := s.nodes[0].plugins.started(kv); got != 2 {
			t.Errorf("n1 started %d processes, want 2: the first one serves on", got)
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
