package replica

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"rollcall/node/fault"
)

// virtual makes the node's lease clock the bubble's, running fast or slow by drift.
func virtual(drift float64) func(*Config) {
	return func(cfg *Config) {
		base := time.Now()
		cfg.Now = func() time.Duration { return time.Duration(float64(time.Since(base)) * (1 + drift)) }
		cfg.Heartbeat, cfg.Lease = 500*time.Millisecond, 5*time.Second
	}
}

// chaos runs three voters and a non-voter in virtual time, cutting hosts off at random, while work goes on through
// check, which gets the cluster and its nodes and returns when ctx ends.
func chaos(t *testing.T, seed uint64, length time.Duration, work func(ctx context.Context, c *cluster, all []*member, rng *rand.Rand)) {
	c := newCluster(t)
	rng := rand.New(rand.NewPCG(seed, 7))
	var all []*member
	for i, drift := range []float64{0.0225, -0.0225, 0, 0.0225} {
		var edit func(*Config)
		if i < 3 {
			edit = func(cfg *Config) { cfg.BootstrapExpect = 3 }
		} else {
			edit = func(cfg *Config) { cfg.NonVoter = true }
		}
		all = append(all, c.node(fmt.Sprintf("n%d", i+1), edit, virtual(drift)).start())
	}
	ready(t, all...)
	ctx, cancel := context.WithTimeout(t.Context(), length)
	defer cancel()
	var wg sync.WaitGroup
	workRng := rand.New(rand.NewPCG(seed, 8))
	wg.Go(func() { work(ctx, c, all, workRng) })
	for ctx.Err() == nil {
		m := all[rng.IntN(len(all))]
		switch rng.IntN(4) {
		case 0:
			c.net.Isolate(m.host)
			pause(ctx, time.Duration(rng.IntN(9000))*time.Millisecond)
			c.net.Rejoin(m.host)
		case 1:
			o := all[rng.IntN(len(all))]
			c.net.CutOneWay(m.host, o.host)
			pause(ctx, time.Duration(rng.IntN(4000))*time.Millisecond)
			c.net.Heal(m.host, o.host)
		case 2:
			c.net.CloseConns(m.host)
		case 3:
			// Slow answers and then none: what a lease counted from the answer would not survive.
			o := all[rng.IntN(len(all))]
			c.net.DelayOneWay(m.host, o.host, time.Duration(rng.IntN(1800))*time.Millisecond)
			pause(ctx, time.Duration(rng.IntN(6000))*time.Millisecond)
			if rng.IntN(2) == 0 {
				c.net.Isolate(o.host)
				pause(ctx, 8*time.Second)
				c.net.Rejoin(o.host)
			}
			c.net.DelayOneWay(m.host, o.host, 0)
		}
		pause(ctx, time.Duration(rng.IntN(4000))*time.Millisecond)
	}
	wg.Wait()
	c.net.HealAll()
	c.stopAll()
	time.Sleep(time.Minute) // what the transport still waits for
}

// I5 rests on this: what a leader calls over is over, whatever the network and the clocks do.
func TestNoNodeServesOnALeaseThatALeaderCallsOver(t *testing.T) {
	for seed := range uint64(3) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var over, held int
				chaos(t, seed, 4*time.Minute, func(ctx context.Context, _ *cluster, all []*member, rng *rand.Rand) {
					for ctx.Err() == nil {
						lead, m := all[rng.IntN(len(all))], all[rng.IntN(len(all))]
						end := lead.BeginFence(m.NodeID())
						until := time.Now().Add(time.Duration(rng.IntN(8000)) * time.Millisecond)
						var proven uint64 // the term in which it was, once, over
						for time.Now().Before(until) && ctx.Err() == nil {
							term, leading := lead.leads()
							if leading && lead.LeaseOver(m.NodeID(), m.Incarnation()) {
								proven = term
							}
							if proven == 0 {
								held++
								pause(ctx, 20*time.Millisecond)
								continue
							}
							over++ // proven on the leader: from now on the node must refuse while the fence lasts
							serving := m.Serving()
							if now, still := lead.leads(); serving == nil && still && now == proven && isLatest(all, proven) {
								t.Errorf("%s serves although %s, leader of term %d, calls its lease over", m.name, lead.name, proven)
								return
							}
							pause(ctx, 20*time.Millisecond)
						}
						end()
						pause(ctx, time.Duration(rng.IntN(3000))*time.Millisecond)
					}
				})
				if over < 5 || held < 50 {
					t.Errorf("%d times over, %d times not: the test does not test", over, held)
				}
				t.Logf("%d times over, %d times not", over, held)
			})
		})
	}
}

// isLatest: a deposed leader that does not know it yet may call over what its successor has granted; its proposal will
// not be committed.
func isLatest(all []*member, term uint64) bool {
	for _, m := range all {
		if t, leading := m.leads(); leading && t > term {
			return false
		}
	}
	return true
}

// Linearizability in its simplest form: a read that begins after a write was acknowledged anywhere sees it, and no
// acknowledged write is lost.
func TestConsistentReadsSeeEveryAcknowledgedWriteUnderPartitions(t *testing.T) {
	for seed := range uint64(3) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var acked atomic.Uint64 // highest acknowledged index
				var writes, reads atomic.Int32
				chaos(t, 100+seed, 2*time.Minute, func(ctx context.Context, _ *cluster, all []*member, _ *rand.Rand) {
					var wg sync.WaitGroup
					for i, m := range all {
						wg.Go(func() {
							for n := 0; ctx.Err() == nil; n++ {
								one, cancel := context.WithTimeout(ctx, 3*time.Second)
								res, err := m.write(one, fmt.Sprintf("k%d-%d", i, n%50))
								cancel()
								if err == nil {
									writes.Add(1)
									for old := acked.Load(); old < res.GetIndex() && !acked.CompareAndSwap(old, res.GetIndex()); old = acked.Load() {
									}
								} else if k := fault.KindOf(err); !k.Safe() && k != fault.OutcomeUnknown {
									t.Errorf("write through %s: %v", m.name, err)
								}
								pause(ctx, 150*time.Millisecond)
							}
						})
						wg.Go(func() {
							for ctx.Err() == nil {
								before := acked.Load()
								one, cancel := context.WithTimeout(ctx, 3*time.Second)
								v, err := m.Consistent(one)
								cancel()
								if err == nil {
									reads.Add(1)
									if v.Index() < before {
										t.Errorf("%s read at %d after %d was acknowledged", m.name, v.Index(), before)
									}
								} else if !fault.Is(err, fault.Unavailable) && !errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
									t.Errorf("read through %s: %v", m.name, err)
								}
								pause(ctx, 100*time.Millisecond)
							}
						})
					}
					wg.Wait()
				})
				if writes.Load() < 200 || reads.Load() < 200 {
					t.Errorf("%d writes, %d reads: the test does not test", writes.Load(), reads.Load())
				}
				t.Logf("%d writes, %d reads", writes.Load(), reads.Load())
			})
		})
	}
}

// Answers that take a second must not make a lease a second longer.
func TestALeaseIsCountedFromTheQuestionNotFromTheAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t)
		var all []*member
		for i := range 3 {
			all = append(all, c.node(fmt.Sprintf("n%d", i+1), func(cfg *Config) { cfg.BootstrapExpect = 3 }, virtual(0)).start())
		}
		ready(t, all...)
		for round := range 5 {
			lead := c.leader()
			m := others(all, lead)[round%2]
			c.net.DelayOneWay(lead.host, m.host, time.Second)
			time.Sleep(10*time.Second + time.Duration(round)*300*time.Millisecond)
			if err := m.Serving(); err != nil {
				t.Fatalf("answers that take a second: %v", err)
			}
			c.net.Isolate(m.host)
			if c.leader(others(all, m)...) != lead {
				t.Fatal("the leader has changed: the test does not test")
			}
			end := lead.BeginFence(m.NodeID())
			for !lead.LeaseOver(m.NodeID(), m.Incarnation()) {
				time.Sleep(time.Millisecond)
			}
			if m.Serving() == nil {
				t.Errorf("%s serves although its lease is over", m.name)
			}
			end()
			c.net.DelayOneWay(lead.host, m.host, 0)
			c.net.Rejoin(m.host)
			eventually(t, 20*time.Second, m.Serving)
		}
		c.stopAll()
		time.Sleep(time.Minute)
	})
}
