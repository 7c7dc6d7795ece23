package router

import (
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
	pluginpb "rollcall/proto/plugin"
)

func TestCloseAnswersThoseWhoWait(t *testing.T) {
	c := newCluster(t, 1, nil)
	n := c.nodes[0]
	m := c.mount("kv/", nil)
	waiting := async(func() (*Response, error) { return n.do(opRead, "kv/whoami", "") })
	rt := n.router.route(m.GetUuid())
	eventually(t, "it waits", func() bool { rt.gate.mu.Lock(); defer rt.gate.mu.Unlock(); return rt.gate.waiting == 1 })
	if err := n.router.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantKind(t, (<-waiting).err, fault.Unavailable)
	_, err := n.do(opRead, "kv/whoami", "")
	wantKind(t, err, fault.Unavailable)
	_, err = n.router.Switch(t.Context(), m, SwitchPlan{Wanted: m.GetWanted(), Backend: newFake("a"), Role: n.Role()})
	wantKind(t, err, fault.Unavailable)
}

func TestAFencedNodeAdmitsNothingAndReleasesNothing(t *testing.T) {
	c, _, fakes := three(t, nil, nil)
	slow := async(func() (*Response, error) { return c.nodes[1].do(opRead, "kv/slow", "") })
	write := async(func() (*Response, error) { return c.nodes[1].do(opUpdate, "kv/slow", "{}") })
	<-fakes[1].enter
	<-fakes[0].enter
	c.nodes[1].fenced.Store(true)
	before := fakes[1].calls.Load()
	for _, op := range []string{opRead, opUpdate} {
		_, err := c.nodes[1].do(op, "kv/whoami", "{}")
		wantKind(t, err, fault.Fenced)
	}
	if fakes[1].calls.Load() != before || fakes[0].calls.Load() != 1 {
		t.Fatal("a fenced node asked a plugin")
	}
	close(fakes[1].leave)
	close(fakes[0].leave)
	r := <-slow
	wantKind(t, r.err, fault.Fenced)
	if r.resp.Plugin != nil {
		t.Fatal("released")
	}
	r = <-write
	wantKind(t, r.err, fault.OutcomeUnknown)
	if r.resp.Plugin != nil {
		t.Fatal("released")
	}
}

func TestAMountWithoutFencingAnswersWithoutALease(t *testing.T) {
	c, _, _ := three(t, &commandv1.MountConfig{Fencing: "none"}, nil)
	c.nodes[1].fenced.Store(true)
	if r, err := c.nodes[1].do(opRead, "kv/whoami", ""); err != nil || r.Node != "n2" {
		t.Fatalf("%+v, %v", r, err)
	}
}

func TestACrashRetriesReadsOnTheNextInstanceAndLeavesWritesUnknown(t *testing.T) {
	c := newCluster(t, 1, nil)
	n := c.nodes[0]
	m := c.mount("kv/", nil)
	a, b := newFake("a"), newFake("b")
	close(b.leave)
	n.up(t, m, a)
	read := async(func() (*Response, error) { return n.do(opRead, "kv/slow", "") })
	write := async(func() (*Response, error) { return n.do(opUpdate, "kv/slow", "{}") })
	<-a.enter
	<-a.enter
	a.die()
	n.router.Suspend(m.GetUuid(), fault.Text(fault.Unavailable, "the process was killed"))
	wantKind(t, (<-write).err, fault.OutcomeUnknown)
	newcomer := async(func() (*Response, error) { return n.do(opUpdate, "kv/whoami", "{}") })
	select {
	case r := <-read:
		t.Fatalf("the read did not wait: %+v", r)
	case r := <-newcomer:
		t.Fatalf("the new request did not wait: %+v", r)
	case <-time.After(20 * time.Millisecond):
	}
	n.up(t, m, b)
	for _, ch := range []<-chan result{read, newcomer} {
		if r := <-ch; r.err != nil || field(r.resp, "name") != "b" {
			t.Fatalf("%+v", r)
		}
	}
	if tr := n.router.Traffic(m.GetUuid()); tr.GetCrashes() != 1 || tr.GetWrites().GetFailed() != 1 {
		t.Fatalf("%v", tr)
	}
}

func TestRequestsThatFindTheProcessGoneWaitForTheNext(t *testing.T) {
	c := newCluster(t, 1, nil)
	n := c.nodes[0]
	m := c.mount("kv/", nil)
	a := newFake("a")
	n.up(t, m, a)
	a.die() // and nobody has told the router yet
	write := async(func() (*Response, error) { return n.do(opUpdate, "kv/whoami", "{}") })
	select {
	case r := <-write:
		t.Fatalf("%+v", r)
	case <-time.After(20 * time.Millisecond):
	}
	n.router.Suspend(m.GetUuid(), fault.Text(fault.Unavailable, "the process was killed"))
	n.up(t, m, newFake("b"))
	if r := <-write; r.err != nil || field(r.resp, "name") != "b" {
		t.Fatalf("%+v", r)
	}
}

func TestWhileAFollowersProcessIsDownItsReadsGoToTheLeader(t *testing.T) {
	c, m, fakes := three(t, nil, nil)
	fakes[1].die()
	c.nodes[1].router.Suspend(m.GetUuid(), fault.Text(fault.Unavailable, "killed"))
	if r, err := c.nodes[1].do(opRead, "kv/whoami", ""); err != nil || r.Node != "n1" {
		t.Fatalf("%+v, %v", r, err)
	}
}

func TestTheGateBoundsThoseWhoWaitInNumberAndTime(t *testing.T) {
	c := newCluster(t, 1, func(cfg *Config) { cfg.MaxWaiting, cfg.GateWait = 3, 200*time.Millisecond })
	n := c.nodes[0]
	m := c.mount("kv/", nil)
	var waits []<-chan result
	for range 3 {
		waits = append(waits, async(func() (*Response, error) { return n.do(opRead, "kv/whoami", "") }))
	}
	rt := n.router.route(m.GetUuid())
	eventually(t, "three wait", func() bool { rt.gate.mu.Lock(); defer rt.gate.mu.Unlock(); return rt.gate.waiting == 3 })
	from := time.Now()
	_, err := n.do(opRead, "kv/whoami", "")
	wantKind(t, err, fault.Unavailable)
	if took := time.Since(from); took > 100*time.Millisecond {
		t.Fatalf("the fourth waited %v", took)
	}
	for _, w := range waits {
		wantKind(t, (<-w).err, fault.Unavailable)
	}
	rt.gate.mu.Lock()
	defer rt.gate.mu.Unlock()
	if rt.gate.waiting != 0 {
		t.Fatalf("%d still counted", rt.gate.waiting)
	}
}

func TestAnAnswerOvertakenByAReloadIsNotReleased(t *testing.T) {
	c, m, _ := three(t, nil, nil)
	n := c.nodes[1]
	old := m.GetWanted().GetGeneration()
	m = c.commit(m)
	rt := n.router.route(m.GetUuid())
	p := &passage{r: n.router, rt: rt, m: m, req: &Request{Operation: opUpdate}}
	if err, _ := p.fresh(&Response{Generation: old}); err != nil {
		t.Fatalf("before the TakeOver: %v", err)
	}
	c.nodes[0].up(t, m, newFake("n1 new"))
	if err, _ := p.fresh(&Response{Generation: old}); err != nil {
		t.Fatalf("a write, while the reload runs: %v", err)
	}
	p.req = &Request{Operation: opRead}
	if err, more := p.fresh(&Response{Generation: old}); !fault.Is(err, fault.Unavailable) || !more {
		t.Fatalf("a read: %v, %v", err, more)
	}
	p.req = &Request{Operation: opUpdate}
	n.up(t, m, newFake("n2 new"))
	if err, more := p.fresh(&Response{Generation: old}); !fault.Is(err, fault.OutcomeUnknown) || more {
		t.Fatalf("a write, after this node was switched: %v, %v", err, more)
	}
	c.finish(m)
	p.rt = c.nodes[2].router.route(m.GetUuid())
	p.r = c.nodes[2].router
	if err, more := p.fresh(&Response{Generation: old}); !fault.Is(err, fault.OutcomeUnknown) || more {
		t.Fatalf("a write, after the reload was done: %v, %v", err, more)
	}
	if err, _ := p.fresh(&Response{Generation: m.GetWanted().GetGeneration()}); err != nil {
		t.Fatal(err)
	}
}

func TestAConnectionThatBreaksUnderAWriteLeavesItsOutcomeUnknownAndAReadIsRetried(t *testing.T) {
	c, _, fakes := three(t, &commandv1.MountConfig{LeaderOnly: true}, nil)
	write := async(func() (*Response, error) { return c.nodes[1].do(opUpdate, "kv/slow", "{}") })
	read := async(func() (*Response, error) { return c.nodes[2].do(opRead, "kv/slow", "{}") })
	<-fakes[0].enter
	<-fakes[0].enter
	// The leader's server goes, and its requests with it.
	c.nodes[0].server.Stop()
	c.elect("n2")
	wantKind(t, (<-write).err, fault.OutcomeUnknown)
	close(fakes[1].leave)
	if err := c.nodes[1].router.Assume(t.Context(), "uuid-kv/", c.nodes[1].Role()); err != nil {
		t.Fatal(err)
	}
	if r := <-read; r.err != nil || r.resp.Node != "n2" {
		t.Fatalf("%+v", r)
	}
}

func TestRenewAndRevokeReachThePluginWithTheirSecret(t *testing.T) {
	c, _, fakes := three(t, nil, nil)
	s := &pluginpb.Secret{InternalData: `{"user":"u"}`}
	a := &pluginpb.Auth{InternalData: `{"role":"r"}`}
	for _, n := range c.nodes {
		for _, op := range []string{opRenew, opRevoke} {
			r, err := n.router.Handle(t.Context(), &Request{Path: "kv/ping", Operation: op, Secret: s, Auth: a})
			if err != nil || r.Node != "n1" {
				t.Fatalf("%+v, %v", r, err)
			}
			got := fakes[0].last
			if !proto.Equal(got.GetSecret(), s) || !proto.Equal(got.GetAuth(), a) || got.GetOperation() != op {
				t.Fatalf("through %s: %v", n.id, got)
			}
		}
	}
}

func TestARequestIsAdmittedWhereAndWhenItStarts(t *testing.T) {
	var asked []string
	var refuse atomic.Bool
	c, m, fakes := three(t, nil, func(cfg *Config) {
		id := cfg.NodeID
		cfg.Admit = func(req *Request) error {
			asked = append(asked, id+" "+req.Operation)
			if refuse.Load() {
				return fault.Text(fault.Denied, "permission denied")
			}
			return nil
		}
	})
	if _, err := c.nodes[1].do(opUpdate, "kv/x", `{"value":"1"}`); err != nil {
		t.Fatal(err)
	}
	if len(asked) != 1 || asked[0] != "n1 update" {
		t.Fatalf("asked %v", asked)
	}
	// The token is revoked while its request waits at the gate.
	rt := c.nodes[0].router.route(m.GetUuid())
	in := rt.run.Load()
	rt.gate.set(held, nil, nil, nil)
	waiting := async(func() (*Response, error) { return c.nodes[0].do(opUpdate, "kv/x", `{"value":"2"}`) })
	eventually(t, "it waits", func() bool { rt.gate.mu.Lock(); defer rt.gate.mu.Unlock(); return rt.gate.waiting == 1 })
	before := fakes[0].calls.Load()
	refuse.Store(true)
	rt.reopen(in)
	wantKind(t, (<-waiting).err, fault.Denied)
	if fakes[0].calls.Load() != before {
		t.Fatal("the plugin was asked")
	}
}
