package nodetest

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"rollcall/node/api"
)

// wavesReload is a reload in waves whose gate sees enough of the load within its bake.
func wavesReload(strategy, version string) api.ReloadRequest {
	return api.ReloadRequest{
		Plugin: "demo", Scope: "global", Version: version, Strategy: strategy, Bake: "2s", MinSamples: 20, MaxErrorRate: 0.02,
	}
}

// verdicts are those of the first mount of each node, by the node's name.
func verdicts(rec *api.Reload) map[string]string {
	out := map[string]string{}
	for _, n := range rec.Nodes {
		out[n.Node] = n.Mounts[0].Verdict
	}
	return out
}

// leaderName waits for a leader and returns its name.
func (c *Cluster) leaderName() string {
	c.t.Helper()
	name := ""
	c.Eventually(20*time.Second, "a leader", func() error {
		if n := c.Leader(); n != nil {
			name = n.Name()
			return nil
		}
		return fmt.Errorf("no node leads")
	})
	return name
}

// index is the number of the node with this name.
func (c *Cluster) index(name string) int {
	c.t.Helper()
	for i := range 16 {
		if n := c.Node(i); n != nil && n.Name() == name {
			return i
		}
	}
	c.t.Fatalf("no node %s runs", name)
	return 0
}

func TestACanaryStopsWhereABadVersionCanFirstBeSeenAndPutsItsNodesBack(t *testing.T) {
	c, l := upgrade(t)
	for i, k := range []struct {
		on    string
		rate  string
		waves int // that were reached
	}{{"read", "0.3", 1}, {"all", "0.3", 1}, {"write", "0.3", 3}} {
		version := "v2.0.0-" + k.on
		c.Register("demo", version, "-error-rate", k.rate, "-error-on", k.on)
		req := wavesReload("canary", version)
		req.Waves = []string{"1", "100%"}
		leader := c.leaderName()
		rec := c.Reload(i, req)
		if rec.Outcome != api.OutcomeRolledBack || rec.RolledBackBy == "" {
			t.Fatalf("%s: outcome %s (%s), rolled back by %q: %+v", k.on, rec.Outcome, rec.Why, rec.RolledBackBy, rec.Waves)
		}
		if len(rec.Waves) != 3 || !slices.Equal(rec.Waves[2].Nodes, []string{leader}) {
			t.Fatalf("%s: the leader %s does not come last and alone: %+v", k.on, leader, rec.Waves)
		}
		for n, w := range rec.Waves {
			switch {
			case n < k.waves-1 && (!w.Passed || w.Gate == nil || w.Gate.Verdict != "passed"):
				t.Errorf("%s: wave %d saw nothing wrong and did not pass: %+v", k.on, n, w.Gate)
			case n == k.waves-1 && (w.Passed || w.Gate == nil || w.Gate.Verdict != "failed"):
				t.Errorf("%s: wave %d was not stopped: %+v", k.on, n, w.Gate)
			case n >= k.waves && w.CommittedIndex != 0:
				t.Errorf("%s: wave %d was reached: %+v", k.on, n, w)
			}
			for _, node := range w.Nodes {
				want := api.VerdictPutBack
				if n >= k.waves {
					want = api.VerdictUnchanged
				}
				if got := verdicts(rec)[node]; got != want {
					t.Errorf("%s: %s of wave %d: verdict %q, want %q", k.on, node, n, got, want)
				}
			}
		}
		c.everyNodeSays(t, "v1.0.0")
	}
	told := l.Told.Load()
	if problems := l.Stop(t.Context()); len(problems) > 0 {
		t.Error(problems)
	}
	if told == 0 {
		t.Error("the bad versions failed no request: nothing was tried")
	}
}

func TestARollingReloadReachesTheNodesOneByOneAndTheLeaderLast(t *testing.T) {
	c, l := upgrade(t)
	leader := c.leaderName()
	req := wavesReload("rolling", "v1.1.0")
	req.Batch, req.MinSamples = 1, 5 // on a machine that others use a node may see no more in one bake
	rec := c.Reload(0, req)
	if rec.Outcome != api.OutcomeSucceeded || len(rec.Waves) != 3 {
		t.Fatalf("%s (%s), %d waves: %+v", rec.Outcome, rec.Why, len(rec.Waves), rec.Nodes)
	}
	at := uint64(0)
	for i, w := range rec.Waves {
		if len(w.Nodes) != 1 || !w.Passed || w.CommittedIndex <= at {
			t.Errorf("wave %d: %+v after index %d", i, w, at)
		}
		at = w.CommittedIndex
	}
	if got := rec.Waves[2].Nodes; !slices.Equal(got, []string{leader}) {
		t.Errorf("the last wave is %v, not the leader %s", got, leader)
	}
	c.everyNodeSays(t, "v1.1.0")
	if problems := l.Stop(t.Context()); len(problems) > 0 {
		t.Error(problems)
	}
}

func TestAGateThatSawTooLittlePausesUntilAnOperatorDecides(t *testing.T) {
	c := Start(t, 3, nil)
	c.Register("demo", "v1.0.0")
	c.Register("demo", "v1.1.0")
	c.Enable("demo", "demo", "v1.0.0")
	start := func(bake string) string {
		req := wavesReload("canary", "v1.1.0")
		req.Bake = bake
		resp, _, err := c.Client(0).Reload(t.Context(), "", req)
		if err != nil {
			t.Fatal(err)
		}
		return resp.ReloadID
	}
	control := func(id, action string) {
		if _, err := c.Client(1).ControlReload(t.Context(), id, action, "the test says so"); err != nil {
			t.Fatalf("%s: %v", action, err)
		}
	}
	paused := func(id string, wave int) {
		c.Eventually(30*time.Second, "the pause", func() error {
			rec, err := c.Client(2).ReloadRecord(t.Context(), id, 0, 0)
			switch {
			case err != nil:
				return err
			case !rec.Paused || rec.Wave != wave || rec.Waves[wave].Gate == nil:
				return fmt.Errorf("paused %v in wave %d: %+v", rec.Paused, rec.Wave, rec.Waves)
			case rec.Waves[wave].Gate.Verdict != "inconclusive" || rec.Waves[wave].Passed:
				t.Fatalf("the gate of a wave without a request: %+v", rec.Waves[wave])
			}
			return nil
		})
	}
	ended := func(id, outcome string) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		rec, err := c.Client(0).WaitReload(ctx, id, api.Watcher{})
		if err != nil || rec.Outcome != outcome {
			t.Fatalf("%v: %+v, want %s", err, rec, outcome)
		}
	}

	id := start("200ms")
	paused(id, 0)
	control(id, "resume") // bakes again, and sees as little
	paused(id, 0)
	control(id, "abort")
	ended(id, api.OutcomeRolledBack)
	c.everyNodeSays(t, "v1.0.0")

	id = start("200ms")
	for wave := range 3 {
		rec, err := c.Client(0).ReloadRecord(t.Context(), id, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		if wave == len(rec.Waves) && wave > 0 {
			break
		}
		paused(id, wave)
		control(id, "promote")
	}
	ended(id, api.OutcomeSucceeded)
	c.everyNodeSays(t, "v1.1.0")
}
