package nodetest

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"rollcall/node/api"
)

func TestMain(m *testing.M) {
	if os.Getenv(apartVariable) != "" {
		os.Exit(m.Run())
	}
	os.Exit(Main(m))
}

// think paces the load of these tests to well below what two cores can do.
const think = 5 * time.Millisecond

func upgrade(t *testing.T) (*Cluster, *Load) {
	t.Helper()
	c := Start(t, 3, nil)
	c.Register("demo", "v1.0.0")
	c.Register("demo", "v1.1.0")
	c.Enable("demo", "demo", "v1.0.0")
	l := c.StartLoad("demo", 4, 4, 4, think)
	t.Cleanup(l.cancel)
	return c, l
}

func TestAGlobalReloadUnderLoadFailsNoRequestAndLosesNoWrite(t *testing.T) {
	for _, strategy := range []string{"all-or-nothing", "best-effort"} {
		t.Run(strategy, func(t *testing.T) {
			c, l := upgrade(t)
			for i, version := range []string{"v1.1.0", "v1.0.0", "v1.1.0"} {
				rec := c.Reload(i, api.ReloadRequest{Plugin: "demo", Scope: "global", Version: version, Strategy: strategy})
				if rec.Outcome != api.OutcomeSucceeded {
					t.Fatalf("reload %d: %s %s: %+v", i, rec.Outcome, rec.Why, rec.Nodes)
				}
				for _, n := range rec.Nodes {
					m := n.Mounts[0]
					if m.Verdict != api.VerdictSwitched || m.To == nil || m.To.Version != version || m.From == nil || m.From.PID == m.To.PID {
						t.Errorf("%s: verdict %q, from %+v to %+v", n.Node, m.Verdict, m.From, m.To)
					}
				}
			}
			if problems := l.Stop(t.Context()); len(problems) > 0 {
				t.Error(problems)
			}
			if l.Sent.Load() < 100 {
				t.Errorf("only %d requests: the load did not run", l.Sent.Load())
			}
		})
	}
}

func TestOneRefusalLeavesEveryNodeOnTheOldGeneration(t *testing.T) {
	c, l := upgrade(t)
	for _, phase := range []string{"exit", "setup", "initialize"} {
		c.Register("demo", "v2.0.0-"+phase, "-fail-on", "node-2", "-fail", phase)
		rec := c.Reload(0, api.ReloadRequest{Plugin: "demo", Scope: "global", Version: "v2.0.0-" + phase})
		if rec.Outcome != api.OutcomeAborted || rec.DecidedIndex != 0 {
			t.Fatalf("%s: outcome %s, decided %d", phase, rec.Outcome, rec.DecidedIndex)
		}
		for _, n := range rec.Nodes {
			want := api.VerdictUnchanged
			if n.Node == "node-2" {
				want = api.VerdictRefused
			}
			if m := n.Mounts[0]; m.Verdict != want || want == api.VerdictRefused && m.Cause == "" {
				t.Errorf("%s: %s: verdict %q (%s), want %q", phase, n.Node, m.Verdict, m.Cause, want)
			}
		}
	}
	c.everyNodeSays(t, "v1.0.0")
	if problems := l.Stop(t.Context()); len(problems) > 0 {
		t.Error(problems)
	}
}

// everyNodeSays asks the plugin on each node for its version.
func (c *Cluster) everyNodeSays(t *testing.T, version string) {
	t.Helper()
	for i := range c.Nodes() {
		c.Eventually(10*time.Second, "the version on every node", func() error {
			env, err := c.Client(i).Read(t.Context(), "demo/info", nil)
			if err != nil {
				return err
			}
			if got := string(env.Data); !strings.Contains(got, version) {
				return fmt.Errorf("node %d answers %s", i, got)
			}
			return nil
		})
	}
}

func TestANodeThatWasDownConvergesLateAndSaysSo(t *testing.T) {
	c := Start(t, 3, nil)
	c.Register("demo", "v1.0.0")
	c.Register("demo", "v1.1.0")
	c.Enable("demo", "demo", "v1.0.0")
	down := 0
	for i, n := range c.Nodes() {
		if n != c.Leader() {
			down = i
		}
	}
	up := (down + 1) % 3
	if err := c.StopNode(t.Context(), down); err != nil {
		t.Fatal(err)
	}
	rec := c.Reload(up, api.ReloadRequest{Plugin: "demo", Scope: "global", Version: "v1.1.0"})
	if rec.Outcome != api.OutcomePartial {
		t.Fatalf("outcome %s (%s) with a node down", rec.Outcome, rec.Why)
	}
	if err := c.StartNode(t.Context(), down); err != nil {
		t.Fatal(err)
	}
	c.Serving()
	c.everyNodeSays(t, "v1.1.0")
	c.Eventually(20*time.Second, "the late verdict", func() error {
		rec, err := c.Client(up).ReloadRecord(t.Context(), rec.ID, 0, 0)
		if err != nil {
			return err
		}
		for _, n := range rec.Nodes {
			for _, m := range n.Mounts {
				if n.Node == c.Node(down).Name() && m.Verdict == api.VerdictConvergedLate {
					return nil
				}
			}
		}
		return fmt.Errorf("%+v", rec.Nodes)
	})
}

func TestNothingIsLeftBehindWhenAClusterStops(t *testing.T) {
	c := Start(t, 3, nil)
	c.Register("demo", "v1.0.0")
	c.Enable("demo", "demo", "v1.0.0")
	c.Eventually(10*time.Second, "a plugin process a node", func() error {
		if got := c.PluginProcesses(); len(got) != 3 {
			return fmt.Errorf("%d plugin processes run, want 3: %q", len(got), got)
		}
		return nil
	})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := c.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	c.Eventually(2*time.Second, "every plugin process gone", func() error {
		if got := c.PluginProcesses(); len(got) > 0 {
			return fmt.Errorf("%q", got)
		}
		return nil
	})
}
