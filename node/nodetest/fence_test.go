package nodetest

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"rollcall/node"
	"rollcall/node/api"
	"rollcall/transport"
)

// startOn starts a cluster whose cluster ports are hosts of a network that tests can cut. The API stays on loopback, so
// that clients reach a node that no other node reaches.
func startOn(t *testing.T, nodes int) (*Cluster, *transport.MemNetwork) {
	t.Helper()
	mem := transport.NewMemNetwork()
	c := Start(t, nodes, func(_ int, cfg *node.Config, opt *node.Options) {
		opt.Network = apiOnLoopback{mem.Host(cfg.Name)}
		cfg.Cluster.Listen = cfg.Name + ":7001"
		cfg.Lease.TTL = 3 * time.Second
	})
	return c, mem
}

// apiOnLoopback is a host of a network in memory whose API port is the operating system's.
type apiOnLoopback struct{ transport.Network }

// Listen binds what is on loopback on the real one.
func (n apiOnLoopback) Listen(addr string) (net.Listener, error) {
	if strings.HasPrefix(addr, "127.0.0.1:") {
		return transport.TCP().Listen(addr)
	}
	return n.Network.Listen(addr)
}

// answer is what one GET of a plugin path gave.
type answer struct {
	sent, got  time.Time
	status     int
	generation uint64
	body       string
}

// get asks a node without any of the client's retries.
func (c *Cluster) get(i int, path string) (answer, error) {
	ctx, cancel := context.WithTimeout(c.t.Context(), 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.Node(i).APIAddress()+"/v1/"+path, http.NoBody)
	if err != nil {
		return answer{}, err
	}
	req.Header.Set(api.HeaderToken, c.Token)
	a := answer{sent: time.Now()}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return a, err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, 1<<16))
	a.got, a.status, a.body = time.Now(), resp.StatusCode, string(raw)
	a.generation, _ = strconv.ParseUint(resp.Header.Get(api.HeaderGeneration), 10, 64)
	return a, err
}

func TestANodeThatIsCutOffStopsAnsweringAndReturnsWithTheNewGeneration(t *testing.T) {
	c, mem := startOn(t, 3)
	c.Register("demo", "v1.0.0")
	c.Register("demo", "v1.1.0")
	c.Enable("demo", "demo", "v1.0.0")
	off := (c.index(c.leaderName()) + 1) % 3
	up := (off + 1) % 3
	if first, err := c.get(off, "demo/info"); err != nil || first.status != http.StatusOK || first.generation == 0 {
		t.Fatalf("before the cut: %v %+v", err, first)
	}

	mem.Isolate(c.Node(off).Name())
	cut := time.Now()
	c.Eventually(15*time.Second, "503 from the node that is cut off", func() error {
		a, err := c.get(off, "demo/info")
		if err != nil || a.status != http.StatusServiceUnavailable {
			return fmt.Errorf("%w, %d %s", err, a.status, a.body)
		}
		return nil
	})
	if d := time.Since(cut); d > 5*time.Second {
		t.Errorf("it answered for %v with a lease of 3 s", d)
	}

	// From here on every answer of that node is looked at, through the reload and the heal.
	watching, stop := context.WithCancel(t.Context())
	answers := make(chan answer, 100_000)
	go func() {
		defer close(answers)
		for watching.Err() == nil {
			if a, err := c.get(off, "demo/info"); err == nil && a.status == http.StatusOK {
				answers <- a
			}
			time.Sleep(2 * time.Millisecond)
		}
	}()
	rec := c.Reload(up, api.ReloadRequest{Plugin: "demo", Scope: "global", Version: "v1.1.0"})
	if rec.Outcome != api.OutcomePartial || verdicts(rec)[c.Node(off).Name()] != api.VerdictPendingDown {
		t.Errorf("%s (%s): %v, want the cut node pending (down)", rec.Outcome, rec.Why, verdicts(rec))
	}
	for node, v := range verdicts(rec) {
		if node != c.Node(off).Name() && v != api.VerdictSwitched {
			t.Errorf("%s: %q", node, v)
		}
	}
	healed := time.Now()
	mem.Rejoin(c.Node(off).Name())
	c.everyNodeSays(t, "v1.1.0")
	time.Sleep(100 * time.Millisecond)
	stop()
	seen := 0
	for a := range answers {
		seen++
		if a.got.Before(healed) || a.generation < rec.DecidedIndex || !strings.Contains(a.body, "v1.1.0") {
			t.Fatalf("an answer of generation %d (the new one is %d) %v after the heal: %s", a.generation, rec.DecidedIndex,
				a.got.Sub(healed), a.body)
		}
	}
	if seen == 0 {
		t.Error("it never answered again")
	}
	c.Eventually(20*time.Second, "the late verdict", func() error {
		rec, err := c.Client(up).ReloadRecord(t.Context(), rec.ID, 0, 0)
		if err != nil || verdicts(rec)[c.Node(off).Name()] != api.VerdictConvergedLate || rec.Outcome != api.OutcomeSucceeded {
			return fmt.Errorf("%w %+v", err, rec)
		}
		return nil
	})
}

func TestALeaderThatIsCutOffInAnyPhaseLeavesOneOutcomeOnEveryNode(t *testing.T) {
	for _, k := range []struct {
		phase string
		cut   func(*api.Reload) bool
	}{
		{"asked", func(*api.Reload) bool { return true }},
		{"preparing", func(r *api.Reload) bool { return r.Phase == api.PhasePreparing && len(r.Nodes) == 3 }},
		{"committed", func(r *api.Reload) bool { return r.DecidedIndex != 0 }},
	} {
		t.Run(k.phase, func(t *testing.T) {
			c, mem := startOn(t, 3)
			c.Register("demo", "v1.0.0")
			c.Register("demo", "v1.1.0")
			c.Enable("demo", "demo", "v1.0.0")
			leader := c.index(c.leaderName())
			up := (leader + 1) % 3
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			resp, _, err := c.Client(up).Reload(ctx, "", api.ReloadRequest{
				Plugin: "demo", Scope: "global", Version: "v1.1.0",
				ReloadID: "cut", Deadline: "30s",
			})
			if err != nil {
				t.Fatal(err)
			}
			state := c.Node(up).State()
			for {
				changed := state.Changed()
				rec, err := c.Client(up).ReloadRecord(ctx, resp.ReloadID, 0, 0)
				if err != nil {
					t.Fatal(err)
				}
				if k.cut(rec) || api.Ended(rec.Phase) {
					break
				}
				select {
				case <-changed:
				case <-ctx.Done():
					t.Fatal("the phase did not come")
				}
			}
			mem.Isolate(c.Node(leader).Name())
			rec, err := c.Client(up).WaitReload(ctx, resp.ReloadID, api.Watcher{})
			if err != nil {
				t.Fatalf("%v: %+v", err, rec)
			}
			want := "v1.1.0"
			if rec.DecidedIndex == 0 {
				want = "v1.0.0"
			}
			t.Logf("%s (%s): %v", rec.Outcome, rec.Why, verdicts(rec))
			mem.HealAll()
			c.Serving()
			c.everyNodeSays(t, want)
			c.Eventually(20*time.Second, "the same record everywhere", func() error {
				for i := range 3 {
					got, err := c.Client(i).ReloadRecord(ctx, resp.ReloadID, 0, 0)
					if err != nil || !api.Ended(got.Phase) || got.DecidedIndex != rec.DecidedIndex ||
						rec.DecidedIndex != 0 && got.Outcome != api.OutcomeSucceeded {
						return fmt.Errorf("node %d: %w %+v", i, err, got)
					}
				}
				return nil
			})
			c.Eventually(20*time.Second, "one process a node", func() error {
				if got := c.PluginProcesses(); len(got) != 3 {
					return fmt.Errorf("%q", got)
				}
				return nil
			})
		})
	}
}
