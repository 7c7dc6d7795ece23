package nodetest

import (
	"context"
	"testing"
	"time"

	"rollcall/node/api"
)

// rollback rolls a plugin back by hand and returns the record of that reload.
func (c *Cluster) rollback(i int, name string) *api.Reload {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), time.Minute)
	defer cancel()
	resp, _, err := c.Client(i).Rollback(ctx, "unknown", name, api.ReloadRequest{})
	if err != nil {
		c.t.Fatalf("rollback: %v", err)
	}
	rec, err := c.Client(i).WaitReload(ctx, resp.ReloadID, api.Watcher{})
	if err != nil {
		c.t.Fatalf("wait for rollback %s: %v", resp.ReloadID, err)
	}
	return rec
}

func TestAPluginThatFailsOnlyForRealIsRolledBackWhereAsked(t *testing.T) {
	c, l := upgrade(t)
	c.Register("demo", "v2.0.0", "-fail-on", "node-2", "-fail", "second-setup")
	healed := c.Record.Fault("bad plugin", "node-2", "it fails in the Setup that is for real")
	rec := c.Reload(0, api.ReloadRequest{Plugin: "demo", Scope: "global", Version: "v2.0.0", OnSwitchFailure: "rollback"})
	if rec.Outcome != api.OutcomeRolledBack || rec.RolledBackBy == "" || rec.DecidedIndex == 0 {
		t.Fatalf("%s (%s): %+v", rec.Outcome, rec.Why, rec.Nodes)
	}
	undo, err := c.Client(1).ReloadRecord(t.Context(), rec.RolledBackBy, 0, 0)
	if err != nil || undo.Outcome != api.OutcomeSucceeded || undo.RollsBack != rec.ID {
		t.Fatalf("its rollback: %v %+v", err, undo)
	}
	for node, v := range verdicts(rec) {
		if v != api.VerdictPutBack {
			t.Errorf("%s: verdict %q", node, v)
		}
	}
	c.everyNodeSays(t, "v1.0.0")
	healed()
	l.Stop(t.Context())
	// The node with the bad plugin could answer nothing for a moment; what was acknowledged is there all the same.
	if l.Backwards.Load() > 0 {
		t.Errorf("%d answers of older generations", l.Backwards.Load())
	}
}

func TestAPluginThatFailsOnlyForRealIsNamedAndTriedAgain(t *testing.T) {
	c := Start(t, 3, nil)
	c.Register("demo", "v1.0.0")
	// The process that fails is replaced; the next one's first Setup is the one for real.
	c.Register("demo", "v2.0.0", "-fail-on", "node-2", "-fail", "second-setup")
	c.Enable("demo", "demo", "v1.0.0")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	resp, _, err := c.Client(0).Reload(ctx, "", api.ReloadRequest{Plugin: "demo", Scope: "global", Version: "v2.0.0"})
	if err != nil {
		t.Fatal(err)
	}
	cause := ""
	rec, err := c.Client(0).WaitReload(ctx, resp.ReloadID, api.Watcher{Changed: func(r *api.Reload) {
		for _, n := range r.Nodes {
			for _, m := range n.Mounts {
				if m.Verdict == api.VerdictFailedSwitch && n.Node == "node-2" {
					cause = m.Cause
				}
			}
		}
	}})
	if err != nil || rec.Outcome != api.OutcomeSucceeded {
		t.Fatalf("%v: %+v", err, rec)
	}
	if cause == "" {
		t.Error("the failed switch of node-2 was never told")
	}
	c.everyNodeSays(t, "v2.0.0")
}

func TestARollbackByHandNeedsNoCatalogEntry(t *testing.T) {
	for _, k := range []struct {
		name string
		lose func(c *Cluster)
	}{
		{"as it was", func(*Cluster) {}},
		{"deregistered", func(c *Cluster) {
			if err := c.Client(0).DeregisterPlugin(c.t.Context(), "secret", "demo", "v1.0.0"); err != nil {
				c.t.Fatal(err)
			}
		}},
		{"overwritten", func(c *Cluster) { c.Register("demo", "v1.0.0", "-fail", "exit") }},
	} {
		t.Run(k.name, func(t *testing.T) {
			c, l := upgrade(t)
			if rec := c.Reload(0, api.ReloadRequest{Plugin: "demo", Scope: "global", Version: "v1.1.0"}); rec.Outcome != api.OutcomeSucceeded {
				t.Fatalf("%s (%s)", rec.Outcome, rec.Why)
			}
			k.lose(c)
			rec := c.rollback(1, "demo")
			if rec.Outcome != api.OutcomeSucceeded {
				t.Fatalf("rollback: %s (%s): %+v", rec.Outcome, rec.Why, rec.Nodes)
			}
			c.everyNodeSays(t, "v1.0.0")
			if problems := l.Stop(t.Context()); len(problems) > 0 {
				t.Error(problems)
			}
		})
	}
}
