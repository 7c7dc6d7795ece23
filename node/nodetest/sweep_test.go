//go:build failpoints

package nodetest

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"rollcall/node"
	"rollcall/node/api"
	"rollcall/node/fault"
	"rollcall/node/nodetest/sim"
	commandv1 "rollcall/proto/command/v1"
)

func TestAKillAtAnyStepOfAReloadLeavesOneOutcomeOnEveryNode(t *testing.T) {
	const nodes = 5
	left := cases(t, nodes, 6, true)
	var times []string
	for len(left) > 0 { // a case that fails leaves a cluster that is of no use for the next
		t.Run("cluster", func(t *testing.T) {
			s := startSweep(t, nodes)
			for len(left) > 0 {
				k, from := left[0], time.Now()
				left = left[1:]
				ok := t.Run(k.String(), func(t *testing.T) { s.run(t, k) })
				times = append(times, fmt.Sprintf("%-45s %6.1fs  %s", k, time.Since(from).Seconds(), s.told))
				if !ok {
					return
				}
			}
		})
	}
	t.Logf("\n%s", strings.Join(times, "\n"))
}

func startSweep(t *testing.T, nodes int) *sweep {
	c := Start(t, nodes, func(_ int, cfg *node.Config, _ *node.Options) { cfg.Lease.TTL = 3 * time.Second })
	s := &sweep{c: c, nodes: nodes, version: "v1.0.0"}
	c.Register("demo", "v1.0.0")
	c.Register("demo", "v1.1.0")
	c.Enable("demo", "demo", s.version)
	return s
}

// sweep is one cluster that goes through the cases, one after the other.
type sweep struct {
	c       *Cluster
	nodes   int
	version string
	told    string
	ran     int
}

// converge is how long everything may take, from the kill and from the return of the victim.
const converge = 30 * time.Second

func (s *sweep) run(t *testing.T, k sim.Case) {
	c, i := s.c, s.ran
	s.ran, s.told = i+1, "FAILED"
	leader := c.index(c.leaderName())
	victim := leader
	if k.Victim != sim.ByLeader {
		victim = (leader + 1 + i%(s.nodes-1)) % s.nodes
	}
	other := map[string]string{"v1.0.0": "v1.1.0", "v1.1.0": "v1.0.0"}[s.version]
	killed := make(chan (<-chan struct{}), 1)
	disarm := k.Trigger(c.Node(victim).Name(), c.Node(leader).Name(), func() { killed <- c.KillNode(victim, k.String()) }, errDead)
	defer disarm()
	id := fmt.Sprintf("sweep-%d-%s", i, c.Node(victim).Name())
	req := api.ReloadRequest{Plugin: "demo", Scope: "global", Version: other, ReloadID: id}

	answers := make(chan error, 1)
	asked := s.client(t, victim)
	ctx, cancel := context.WithTimeout(t.Context(), 2*converge)
	defer cancel()
	go func() { answers <- s.ask(ctx, asked, req) }()
	var gone <-chan struct{}
	select {
	case gone = <-killed:
	case <-time.After(converge):
		t.Fatalf("%v was not reached", k)
	}
	from := time.Now()
	if err := <-answers; err != nil {
		t.Fatalf("the client that asked for the reload: %v", err)
	}
	before := s.settle(ctx, t, id, other, from)
	<-gone
	disarm() // it lives again
	if err := c.StartNode(ctx, victim); err != nil {
		t.Fatal(err)
	}
	from = time.Now()
	after := s.settle(ctx, t, id, other, from)
	if before.GetPhase() != after.GetPhase() || before.GetGeneration() != after.GetGeneration() {
		t.Errorf("%v (%d) became %v (%d) when the victim returned", before.GetPhase(), before.GetGeneration(), after.GetPhase(), after.GetGeneration())
	}
	for n := range s.nodes { // again, through each node by itself: one answer
		if err := s.ask(ctx, c.Client(n), req); err != nil {
			t.Errorf("the same reload id through %s: %v", c.Node(n).Name(), err)
		}
	}
	s.told = fmt.Sprintf("%s, %s after the return", after.GetOutcome(), time.Since(from).Round(100*time.Millisecond))
}

// client asks the victim first, and then the others, as a client with a list of addresses does.
func (s *sweep) client(t *testing.T, first int) *api.Client {
	t.Helper()
	addresses := []string{s.c.Node(first).APIAddress()}
	for i := range s.nodes {
		if i != first {
			addresses = append(addresses, s.c.Node(i).APIAddress())
		}
	}
	client, err := api.New(api.Config{Addresses: addresses, Token: s.c.Token})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	return client
}

// ask asks until it is answered, and the answer must be this reload.
func (s *sweep) ask(ctx context.Context, client *api.Client, req api.ReloadRequest) error {
	for {
		resp, _, err := client.Reload(ctx, "", req)
		switch {
		case err == nil && resp.ReloadID != req.ReloadID:
			return fmt.Errorf("asked for %s, answered with %s", req.ReloadID, resp.ReloadID)
		case err == nil:
			return nil
		case fault.Is(err, fault.Conflict), fault.Is(err, fault.Invalid):
			return err // an answer, and not the one
		case ctx.Err() != nil:
			return fmt.Errorf("%w, last: %w", ctx.Err(), err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// settle waits until every running node says the same of the reload, runs what it says, and nothing else runs.
func (s *sweep) settle(ctx context.Context, t *testing.T, id, other string, from time.Time) *commandv1.Reload {
	t.Helper()
	var last error
	for ctx.Err() == nil && time.Since(from) < converge {
		var rl *commandv1.Reload
		if rl, last = s.look(ctx, id, other); last == nil {
			return rl
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatalf("not settled after %v: %v", time.Since(from).Round(time.Millisecond), last)
	return nil
}

func (s *sweep) look(ctx context.Context, id, other string) (*commandv1.Reload, error) {
	var first *commandv1.Reload
	nodes := s.c.Nodes()
	for _, n := range nodes {
		rl := n.State().View().Reload(id)
		switch {
		case rl == nil:
			return nil, fmt.Errorf("%s knows no reload %s", n.Name(), id)
		case rl.GetPhase() != commandv1.Phase_PHASE_DONE && rl.GetPhase() != commandv1.Phase_PHASE_ABORTED:
			return nil, fmt.Errorf("on %s the reload is %v", n.Name(), rl.GetPhase())
		case first == nil:
			first = rl
		case !proto.Equal(first, rl):
			return nil, fmt.Errorf("%s and %s differ:\n%v\n%v", nodes[0].Name(), n.Name(), first, rl)
		}
	}
	committed := first.GetGeneration() > 0
	if committed != (first.GetPhase() == commandv1.Phase_PHASE_DONE) {
		return nil, fmt.Errorf("generation %d and phase %v", first.GetGeneration(), first.GetPhase())
	}
	version := s.version
	if committed {
		version = other
	}
	for i := range s.nodes {
		if s.c.Node(i) == nil {
			continue
		}
		if err := s.says(ctx, i, version); err != nil {
			return nil, err
		}
	}
	if got := s.c.PluginProcesses(); len(got) != len(nodes) {
		return nil, fmt.Errorf("%d plugin processes on %d nodes: %q", len(got), len(nodes), got)
	}
	if committed && len(nodes) == s.nodes {
		for _, p := range first.GetParticipants() {
			if v := p.GetMounts()[0].GetVerdict(); v != commandv1.Verdict_VERDICT_SWITCHED && v != commandv1.Verdict_VERDICT_CONVERGED_LATE {
				return nil, fmt.Errorf("the verdict of %s is %v", p.GetName(), v)
			}
		}
	}
	if len(nodes) == s.nodes {
		s.version = version
	}
	return first, nil
}

// says asks a node for the version and the generation that answer there.
func (s *sweep) says(ctx context.Context, i int, version string) error {
	n := s.c.Node(i)
	env, err := s.c.Client(i).Read(ctx, "demo/info", nil)
	if err != nil {
		return fmt.Errorf("%s: %w", n.Name(), err)
	}
	if !strings.Contains(string(env.Data), version) {
		return fmt.Errorf("%s answers %s, wanted %s", n.Name(), env.Data, version)
	}
	for _, m := range n.State().View().Mounts() {
		if len(m.GetOverrides()) > 0 {
			return fmt.Errorf("on %s the mount has overrides %v", n.Name(), m.GetOverrides())
		}
	}
	return nil
}
