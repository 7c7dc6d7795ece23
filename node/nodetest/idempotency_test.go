package nodetest

import (
	"context"
	"flag"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"rollcall/node/api"
	"rollcall/node/fault"
)

func TestOneReloadIDHasOneEffectThroughEveryNodeAndAcrossAChangeOfLeader(t *testing.T) {
	c := Start(t, 3, nil)
	c.Register("demo", "v1.0.0")
	c.Register("demo", "v1.1.0")
	c.Enable("demo", "demo", "v1.0.0")
	req := api.ReloadRequest{Plugin: "demo", Scope: "global", Version: "v1.1.0", ReloadID: "once"}
	var wg sync.WaitGroup
	for i := range 9 {
		client := c.Client(i % 3)
		wg.Go(func() {
			resp, _, err := client.Reload(t.Context(), "", req)
			if err != nil || resp.ReloadID != "once" {
				t.Errorf("through node %d: %+v, %v", i%3, resp, err)
			}
		})
	}
	wg.Wait()
	rec := c.Reload(1, req)
	if rec.Outcome != api.OutcomeSucceeded {
		t.Fatalf("%s (%s)", rec.Outcome, rec.Why)
	}
	decided := rec.DecidedIndex
	if err := c.StopNode(t.Context(), c.index(c.leaderName())); err != nil {
		t.Fatal(err)
	}
	c.leaderName()
	other := req
	other.Version = "v1.0.0"
	for i := range 3 {
		if c.Node(i) == nil {
			continue
		}
		client := c.Client(i)
		c.Eventually(20*time.Second, "the same answer after the change of leader", func() error {
			resp, _, err := client.Reload(t.Context(), "", req)
			if err == nil && resp.ReloadID != "once" {
				t.Fatalf("another id: %+v", resp)
			}
			return err
		})
		if _, _, err := client.Reload(t.Context(), "", other); !fault.Is(err, fault.Conflict) {
			t.Errorf("the same id for another request: %v", err)
		}
		rec, err := client.ReloadRecord(t.Context(), "once", 0, 0)
		if err != nil || rec.DecidedIndex != decided {
			t.Errorf("the record: %v, decided at %d, before at %d", err, rec.DecidedIndex, decided)
		}
		list, err := client.Reloads(t.Context())
		if err != nil || len(list.Reloads) != 1 {
			t.Errorf("%v: %d reloads, want the one", err, len(list.Reloads))
		}
	}
}

// watchProcesses counts the plugin processes until ctx ends and returns the most that it saw at one time.
func (c *Cluster) watchProcesses(ctx context.Context) (most func() int) {
	seen, done := 0, make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			seen = max(seen, len(c.PluginProcesses()))
			select {
			case <-ctx.Done():
			case <-time.After(20 * time.Millisecond):
			}
		}
	}()
	return func() int { <-done; return seen }
}

var apartFlag = flag.Int("apart", 25, "of the thousand reloads that are asked for at once, one in so many is like no other and runs by itself")

// A thousand at once. Those that are alike are joined while they wait; with -apart 1 each of them runs, which takes minutes.
func TestManyReloadsAtOnceAllEndWithAnAnswerAndTwoProcessesAMount(t *testing.T) {
	const asked, mounts = 1000, 3
	c := Start(t, 3, nil)
	c.Register("demo", "v1.0.0")
	paths := make([]string, mounts)
	for i := range paths {
		paths[i] = fmt.Sprintf("demo-%d", i)
		c.Enable(paths[i], "demo", "v1.0.0")
	}
	watching, stop := context.WithCancel(t.Context())
	defer stop()
	most := c.watchProcesses(watching)
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	clients := []*api.Client{c.Client(0), c.Client(1), c.Client(2)}
	outcomes := make([]string, asked)
	var wg sync.WaitGroup
	for i := range asked {
		wg.Go(func() {
			client := clients[i%3]
			req := api.ReloadRequest{Scope: "global", ReloadID: fmt.Sprintf("many-%d", i), Queue: "15m"}
			if i%*apartFlag == 0 {
				req.Prepare = (time.Minute + time.Duration(i)*time.Millisecond).String()
			}
			switch i % 4 { // one mount, another, two, all
			case 0:
				req.Mounts = []string{paths[0]}
			case 1:
				req.Mounts = []string{paths[1]}
			case 2:
				req.Mounts = []string{paths[1], paths[2]}
			default:
				req.Plugin = "demo"
			}
			resp, _, err := client.Reload(ctx, "", req)
			for fault.Is(err, fault.OutcomeUnknown) || fault.Is(err, fault.Unavailable) { // the leader changed: the id makes it safe
				time.Sleep(50 * time.Millisecond)
				resp, _, err = client.Reload(ctx, "", req)
			}
			if err != nil {
				outcomes[i] = "refused: " + err.Error()
				if !fault.Is(err, fault.Exhausted) {
					t.Errorf("reload %d: %v", i, err)
				}
				return
			}
			rec, err := client.WaitReload(ctx, resp.ReloadID, api.Watcher{})
			if err != nil {
				t.Errorf("reload %d (%s) has no answer: %v", i, resp.ReloadID, err)
				return
			}
			outcomes[i] = rec.Outcome
			if rec.Outcome != api.OutcomeSucceeded {
				t.Errorf("reload %d (%s): %s (%s)", i, rec.ID, rec.Outcome, rec.Why)
			}
		})
	}
	wg.Wait()
	stop()
	counts := map[string]int{}
	for _, o := range outcomes {
		word, _, _ := strings.Cut(o, ":")
		counts[word]++
	}
	if n := most(); n > 2*3*mounts {
		t.Errorf("%d plugin processes at one time, want at most two a mount and node (%d)", n, 2*3*mounts)
	}
	t.Log(counts, "most processes:", most())
	c.Eventually(20*time.Second, "one process a mount and node", func() error {
		if got := c.PluginProcesses(); len(got) != 3*mounts {
			return fmt.Errorf("%d: %q", len(got), got)
		}
		return nil
	})
}

func TestAPlanTriesEveryNodeAndChangesNothing(t *testing.T) {
	c := Start(t, 3, nil)
	c.Register("demo", "v1.0.0")
	c.Register("demo", "v1.1.0")
	c.Register("demo", "v2.0.0", "-fail-on", "node-3", "-fail", "initialize")
	c.Enable("demo", "demo", "v1.0.0")
	c.Register("other", "v1.0.0")
	c.Enable("else", "other", "v1.0.0")
	before := c.PluginProcesses()
	for _, k := range []struct {
		version, refuses string
	}{{"v1.1.0", ""}, {"v2.0.0", "node-3"}} {
		p, err := c.Client(0).Plan(t.Context(), api.PlanRequest{Plugin: "demo", Version: k.version})
		if err != nil {
			t.Fatal(err)
		}
		if p.OK != (k.refuses == "") || len(p.Targets) != 1 || len(p.Nodes) != 3 {
			t.Fatalf("%s: ok %v, %d targets, %d nodes", k.version, p.OK, len(p.Targets), len(p.Nodes))
		}
		if len(p.Untouched) != 1 || p.Untouched[0].Mount != "else/" || p.Untouched[0].Why == "" {
			t.Errorf("%s: it says that it leaves %+v alone", k.version, p.Untouched)
		}
		for _, n := range p.Nodes {
			if len(n.Mounts) != 1 || n.Mounts[0].OK != (n.Node != k.refuses) {
				t.Errorf("%s on %s: %+v %s", k.version, n.Node, n.Mounts, n.Error)
			} else if m := n.Mounts[0]; m.SHA256 != c.Sum || m.OK && m.RSSBytes == 0 || !m.OK && m.Cause == "" {
				t.Errorf("%s on %s: %+v", k.version, n.Node, m)
			}
		}
	}
	c.everyNodeSays(t, "v1.0.0")
	c.Eventually(10*time.Second, "the tried processes gone", func() error {
		if after := c.PluginProcesses(); len(after) != len(before) {
			return fmt.Errorf("%q", after)
		}
		return nil
	})
	if list, err := c.Client(0).Reloads(t.Context()); err != nil || len(list.Reloads) != 0 {
		t.Errorf("a plan left %d reloads (%v)", len(list.Reloads), err)
	}
}
