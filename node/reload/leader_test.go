package reload

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

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
