package reload

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	commandv1 "rollcall/proto/command/v1"
)

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
