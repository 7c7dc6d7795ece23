package nodetest

import (
	"context"
	"fmt"
	"testing"
	"time"

	"rollcall/node/api"
)

func TestOneBadNodeOfThreeOrFiveIsNamedAndNobodySwitches(t *testing.T) {
	for _, nodes := range []int{3, 5} {
		t.Run(fmt.Sprint(nodes), func(t *testing.T) {
			c := Start(t, nodes, nil)
			c.Register("demo", "v1.0.0")
			c.Enable("demo", "demo", "v1.0.0")
			l := c.StartLoad("demo", 2, 2, nodes, 2*think)
			t.Cleanup(l.cancel)
			bad := fmt.Sprintf("node-%d", nodes)
			for i, badness := range []string{"exit", "hang", "setup", "initialize"} {
				version := fmt.Sprintf("v2.%d.0", i)
				c.Register("demo", version, "-fail-on", bad, "-fail", badness)
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				from, named := time.Now(), time.Duration(0)
				resp, _, err := c.Client(i%nodes).Reload(ctx, "", api.ReloadRequest{
					Plugin: "demo", Scope: "global", Version: version,
					Prepare: "4s",
				})
				if err != nil {
					t.Fatal(err)
				}
				rec, err := c.Client(i%nodes).WaitReload(ctx, resp.ReloadID, api.Watcher{Changed: func(r *api.Reload) {
					if verdicts(r)[bad] == api.VerdictRefused && named == 0 {
						named = time.Since(from)
					}
				}})
				if err != nil || rec.Outcome != api.OutcomeAborted || rec.DecidedIndex != 0 {
					t.Fatalf("%s: %v %+v", badness, err, rec)
				}
				for _, n := range rec.Nodes {
					m := n.Mounts[0]
					if n.Node != bad && m.Verdict != api.VerdictUnchanged {
						t.Errorf("%s: %s has the verdict %q", badness, n.Node, m.Verdict)
					}
					if n.Node == bad && badness != "hang" && (m.Verdict != api.VerdictRefused || m.Cause == "" || m.Phase == "") {
						t.Errorf("%s: %s has the verdict %q in %q: %s", badness, n.Node, m.Verdict, m.Phase, m.Cause)
					}
				}
				// A process that hangs is known at the deadline only; anything else as soon as it happens.
				if badness != "hang" && (named == 0 || named > 5*time.Second) {
					t.Errorf("%s: named after %v", badness, named)
				}
			}
			c.everyNodeSays(t, "v1.0.0")
			if problems := l.Stop(t.Context()); len(problems) > 0 {
				t.Error(problems)
			}
			c.Eventually(15*time.Second, "one process a node", func() error {
				if got := c.PluginProcesses(); len(got) != nodes {
					return fmt.Errorf("%q", got)
				}
				return nil
			})
		})
	}
}
