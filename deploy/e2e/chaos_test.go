//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"syscall"
	"testing"
	"time"

	"rollcall/node/api"
)

// chaos is one run: faults one after the other, and reloads whenever, all from one seed.
type chaos struct {
	*cluster
	rng     *rand.Rand
	reloads []string // ids that were accepted
	done    map[string]int
}

// TestChaosLosesNothingAndEveryReloadEnds kills, pauses, stops and empties nodes at random, while reloads run and clients
// write. ROLLCALL_CHAOS says for how long, ROLLCALL_SEED repeats a run's choices.
func TestChaosLosesNothingAndEveryReloadEnds(t *testing.T) {
	length := 20 * time.Second
	if v := os.Getenv("ROLLCALL_CHAOS"); v != "" {
		var err error
		if length, err = time.ParseDuration(v); err != nil {
			t.Fatal(err)
		}
	}
	seed := rand.Uint64()
	if v := os.Getenv("ROLLCALL_SEED"); v != "" {
		var err error
		if seed, err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("ROLLCALL_SEED=%d", seed)
	c := newCluster(t, options{config: quick})
	c.mountKV(kvOld)
	x := &chaos{cluster: c, rng: rand.New(rand.NewPCG(seed, 0)), done: map[string]int{}} //nolint:gosec // not for secrets
	l := startLoad(c, loadOptions{
		mount: "kv", writers: 4, hot: 2, readers: 3, pace: 20 * time.Millisecond,
		readPace: 50 * time.Millisecond, excused: func(*server) bool { return true },
	})
	for end := time.Now().Add(length); time.Now().Before(end) && !t.Failed(); {
		x.step()
	}
	// Everything is healed: within half a minute every node runs what is wanted, and every reload has ended.
	for _, s := range c.nodes {
		if !s.alive() {
			s.start()
		}
	}
	began := time.Now()
	if err := within(recovery, func() error {
		if err := c.settled(c.nodes...); err != nil {
			return err
		}
		for _, id := range x.reloads {
			rec, err := c.any().ReloadRecord(timeout(t, short), id, 0, 0)
			if err != nil {
				return fmt.Errorf("reload %s: %w", id, err)
			}
			if !api.Ended(rec.Phase) || len(rec.Pending) > 0 {
				return fmt.Errorf("not over:\n%s", tell(rec))
			}
		}
		return nil
	}); err != nil {
		t.Errorf("%s after everything was healed: %v", recovery, err)
	}
	t.Logf("all settled %s after everything was healed; done: %v; %d reloads", time.Since(began).Round(time.Millisecond), x.done, len(x.reloads))
	l.atLeast(20)
	s := l.stop()
	t.Log(s)
	if s.lost+s.backwards+s.staleReads > 0 {
		t.Errorf("%s\n%q", s, s.trouble)
	}
	for _, id := range x.reloads {
		c.sameEverywhere(id)
	}
}

// step does one thing. At most one node is away at a time: two of three must go on.
func (x *chaos) step() {
	victim := x.nodes[x.rng.IntN(len(x.nodes))]
	x.reload()
	x.sleep(1500)
	switch what := x.rng.IntN(6); what {
	case 0, 1:
		x.done["kill"]++
		victim.kill()
		x.reload()
		x.sleep(4000)
		victim.start()
	case 2:
		x.done["pause"]++
		victim.signal(syscall.SIGSTOP)
		x.reload()
		x.sleep(8000)
		victim.signal(syscall.SIGCONT)
	case 3:
		x.done["stop"]++
		victim.stop()
		x.reload()
		x.sleep(3000)
		victim.start()
	case 4:
		x.done["empty"]++
		victim.kill()
		victim.replace()
		victim.start()
	case 5:
		x.done["step down"]++
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		_ = victim.client().StepDown(ctx) // refused where there is no leader at the moment
		cancel()
	}
	// The next fault waits until there is no other: otherwise a majority may be away.
	until(x.t, long, "every node serves again", func() error { return x.settled(x.nodes...) })
}

func (x *chaos) sleep(milliseconds int) {
	time.Sleep(time.Duration(x.rng.IntN(milliseconds)) * time.Millisecond)
}

// reload starts a reload through some node, or does not get it through; its id decides whether it was accepted.
func (x *chaos) reload() {
	req := api.ReloadRequest{Plugin: "kv", ReloadID: fmt.Sprintf("chaos-%d", x.done["reload"]), Scope: "global"}
	switch x.rng.IntN(4) {
	case 0:
		req.Version = kvOld
	case 1:
		req.Version = kvNew
	case 2:
		req.Strategy = "best-effort"
	case 3:
		req.Scope = ""
		req.Wait = "0s"
	}
	x.done["reload"]++
	asked := x.nodes[x.rng.IntN(len(x.nodes))]
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if _, _, err := asked.client().Reload(ctx, "", req); err == nil {
		x.reloads = append(x.reloads, req.ReloadID)
	}
}
