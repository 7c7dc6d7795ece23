package router

import (
	"context"
	"sync"
	"testing"
	"time"

	"rollcall/node/fault"
	"rollcall/node/supervisor"
	commandv1 "rollcall/proto/command/v1"
)

func TestAFenceThatIsGivenUpLetsTheOldInstanceGoOnWhereItIsKept(t *testing.T) {
	c := newCluster(t, 1, nil)
	n := c.nodes[0]
	m := c.mount("kv/", nil)
	a, b := newFake("a"), newFake("b")
	n.up(t, m, a)
	slow := async(func() (*Response, error) { return n.do(opUpdate, "kv/slow", "{}") })
	<-a.enter
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := n.router.Switch(ctx, m, SwitchPlan{
		Wanted: m.GetWanted(), Backend: b, Role: n.Role(), Hold: 5 * time.Millisecond, Force: "fence", KeepOld: true,
	})
	wantKind(t, err, fault.Deadline)
	if _, err := n.do(opUpdate, "kv/x", `{"value":"1"}`); err != nil {
		t.Fatalf("the old instance was kept, and does not answer: %v", err)
	}
	close(a.leave)
	if r := <-slow; r.err != nil {
		t.Fatal(r.err)
	}
}

func TestARelabelIsNotLostToASetupThatIsUnderWay(t *testing.T) {
	c := newCluster(t, 1, nil)
	n := c.nodes[0]
	m := c.mount("kv/", nil)
	a := newFake("a")
	inside, goOn := make(chan struct{}), make(chan struct{})
	var second bool
	a.onInit = func(context.Context, supervisor.Storage) error {
		if second {
			close(inside)
			<-goOn
		}
		return nil
	}
	n.up(t, m, a)
	second = true
	rt := n.router.lookup(m.GetUuid())
	rt.repair(repair{in: rt.run.Load(), what: resetup})
	<-inside
	second = false
	m = c.commit(m)
	n.router.Relabel(m.GetUuid(), m.GetWanted())
	close(goOn)
	want := m.GetWanted().GetGeneration()
	eventually(t, "the generation runs, and the state knows it", func() bool {
		g, ready := n.router.Running(m.GetUuid())
		return g == want && ready && c.get(m.GetUuid()).GetEpochGeneration() == want
	})
	if _, err := n.do(opUpdate, "kv/x", `{"value":"1"}`); err != nil {
		t.Fatal(err)
	}
}

func TestAnErrorOfThePluginIsNotReleasedWithoutALeaseEither(t *testing.T) {
	c, _, fakes := three(t, nil, nil)
	read := async(func() (*Response, error) { return c.nodes[1].do(opRead, "kv/torn", "") })
	<-fakes[1].enter
	c.nodes[1].fenced.Store(true)
	close(fakes[1].leave)
	wantKind(t, (<-read).err, fault.Fenced)
}

func TestAForwardedErrorOfAnOlderGenerationIsAskedAgain(t *testing.T) {
	c, m, _ := three(t, &commandv1.MountConfig{LeaderOnly: true}, nil)
	m = c.commit(m)
	done := make(chan result, 1)
	fake := c.nodes[0].router.lookup(m.GetUuid()).run.Load().backend.(*fake)
	go func() {
		r, err := c.nodes[1].do(opRead, "kv/slow-error", "")
		done <- result{r, err}
	}()
	<-fake.enter
	// The new generation takes over in the log while the old one still answers.
	c.must(&commandv1.Command{Body: &commandv1.Command_TakeOver{TakeOver: &commandv1.TakeOver{
		MountUuid: m.GetUuid(), NodeId: "n1", Generation: m.GetWanted().GetGeneration(), Term: c.nodes[0].Role().Term,
	}}})
	next := newFake("n1 new")
	close(next.leave)
	close(fake.leave)
	c.nodes[0].up(t, m, next)
	if r := <-done; r.resp == nil || r.resp.Generation < m.GetWanted().GetGeneration() {
		t.Fatalf("%+v", r)
	}
}

func TestAWriteThatWasGivenUpIsDecidedBeforeTheNextInstanceReads(t *testing.T) {
	c := newCluster(t, 1, nil)
	n := c.nodes[0]
	m := c.mount("kv/", nil)
	a, b := newFake("a"), newFake("b")
	n.up(t, m, a)
	var mu sync.Mutex
	var late *commandv1.Command
	c.mu.Lock()
	c.refuse = func(cmd *commandv1.Command) error {
		mu.Lock()
		defer mu.Unlock()
		if ops := cmd.GetWriteStorage().GetOps(); len(ops) == 1 && ops[0].GetKey() == "x" && late == nil {
			late = cmd
			return fault.Text(fault.OutcomeUnknown, "under way")
		}
		if late != nil && len(late.GetWriteStorage().GetOps()) > 0 {
			_, err := c.enter(late) // what was proposed before comes first
			late = &commandv1.Command{}
			if err != nil {
				t.Error(err)
			}
		}
		return nil
	}
	c.mu.Unlock()
	_, err := n.do(opUpdate, "kv/x", `{"value":"1"}`)
	if err == nil {
		t.Fatal("acknowledged")
	}
	b.onInit = func(ctx context.Context, st supervisor.Storage) error {
		if e, err := st.Get(ctx, "x"); err != nil || e == nil {
			t.Errorf("it was set up on a state that was about to change: %v, %v", e, err)
		}
		return nil
	}
	n.up(t, m, b)
}
