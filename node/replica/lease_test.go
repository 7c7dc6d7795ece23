package replica

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"rollcall/fsm"
	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// A cut-off node stops serving by itself, and the leader calls its lease over only after that.
func TestACutOffNodeStopsServingBeforeItsLeaseIsCalledOver(t *testing.T) {
	c := newCluster(t)
	all := c.founders(3)
	for _, m := range all {
		m.start()
	}
	ready(t, all...)
	for _, m := range all {
		eventually(t, 5*time.Second, m.Serving)
	}
	lead := c.leader()
	cut := others(all, lead)[0]
	id, inc := cut.NodeID(), cut.Incarnation()
	if lead.LeaseOver(id, inc) {
		t.Fatal("the lease of a serving node is called over")
	}
	c.net.Isolate(cut.host)
	began := time.Now()
	end := lead.BeginFence(id)
	defer end()
	for !lead.LeaseOver(id, inc) {
		if time.Since(began) > 10*time.Second {
			t.Fatal("never called over")
		}
		time.Sleep(time.Millisecond)
	}
	if err := cut.Serving(); err == nil {
		t.Errorf("called over after %v while the node still serves", time.Since(began))
	}
	if !fault.Is(cut.Serving(), fault.Fenced) {
		t.Errorf("kind of the refusal: %v", cut.Serving())
	}
	t.Logf("over after %v", time.Since(began))
	for _, m := range others(all, cut) {
		if err := m.Serving(); err != nil {
			t.Errorf("%s, which is connected, does not serve: %v", m.name, err)
		}
	}
	end()
	c.net.Rejoin(cut.host)
	eventually(t, 10*time.Second, cut.Serving)
}

func TestANodeWithoutALeaseGetsOneOnlyWhenItHasConverged(t *testing.T) {
	var converged atomic.Bool
	c := newCluster(t)
	m := c.node("n1", func(cfg *Config) { cfg.BootstrapExpect, cfg.Converged = 1, converged.Load })
	m.start()
	ready(t, m)
	time.Sleep(2 * m.cfg.Lease / 3) // nothing must happen in it
	if m.Serving() == nil {
		t.Error("a node that has not converged serves")
	}
	converged.Store(true)
	eventually(t, 5*time.Second, m.Serving)
	converged.Store(false) // only a node that was without a lease must have converged
	for range 20 {
		time.Sleep(m.cfg.Lease / 10)
		if err := m.Serving(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestNoLeaseIsGrantedWhileAFenceIsUnderWay(t *testing.T) {
	c := newCluster(t)
	all := c.founders(3)
	for _, m := range all {
		m.start()
	}
	ready(t, all...)
	lead := c.leader()
	m := others(all, lead)[0]
	eventually(t, 5*time.Second, m.Serving)
	end := lead.BeginFence(m.NodeID())
	eventually(t, 5*time.Second, func() error {
		if m.Serving() == nil {
			return fmt.Errorf("%s still serves", m.name)
		}
		return nil
	})
	end()
	end() // harmless
	eventually(t, 5*time.Second, m.Serving)
}

func TestANewLeaderWaitsAWholeLeaseBeforeItCallsAnyOver(t *testing.T) {
	const span = 105 * time.Millisecond
	l := newLed(7, 1000*time.Millisecond)
	g := grantee{"n", 1}
	for _, c := range []struct {
		at   time.Duration
		over bool
	}{{1000, false}, {1104, false}, {1105, true}} {
		if got := l.over(g, c.at*time.Millisecond, span); got != c.over {
			t.Errorf("at %d ms: %v, want %v", c.at, got, c.over)
		}
	}
}

// grantView is a state in which node "n" has said Hello as incarnation 2.
func grantView(t *testing.T) func() *fsm.View {
	t.Helper()
	f := fsm.New()
	apply(t, f, 1, &commandv1.Command{Body: &commandv1.Command_InitCluster{InitCluster: &commandv1.InitCluster{ClusterId: "c"}}})
	apply(t, f, 2, &commandv1.Command{Body: &commandv1.Command_Hello{Hello: &commandv1.Hello{NodeId: "n", Name: "n", Incarnation: 2}}})
	return f.View
}

func TestAGrantIsBoundToTheIncarnationAndOutlivesItsSpanOnTheLeadersClock(t *testing.T) {
	const span = 105 * time.Millisecond
	now := time.Duration(0)
	clock := func() time.Duration { return now }
	l := newLed(7, 0)
	view := grantView(t)
	if _, err := l.grant(grantee{"n", 1}, clock, view, span); !fault.Is(err, fault.Stale) {
		t.Errorf("a past incarnation: %v", err)
	}
	if _, err := l.grant(grantee{"n", 3}, clock, view, span); !fault.Is(err, fault.Unavailable) {
		t.Errorf("an incarnation without Hello: %v", err)
	}
	now = time.Second
	index, err := l.grant(grantee{"n", 2}, clock, view, span)
	if err != nil || index != 2 {
		t.Fatalf("grant: %d, %v", index, err)
	}
	now += span - 1
	if l.over(grantee{"n", 2}, now, span) {
		t.Error("over before its span")
	}
	now++
	if !l.over(grantee{"n", 2}, now, span) {
		t.Error("not over after its span")
	}
	l.fencing["n"] = 1
	if _, err := l.grant(grantee{"n", 2}, clock, view, span); !fault.Is(err, fault.Unavailable) {
		t.Errorf("granted during a fence: %v", err)
	}
}

func TestTheLogsClockSumsWhatHasPassedAndForgetsNothing(t *testing.T) {
	var s stamper
	if got := s.take(1, 100); got != 0 {
		t.Errorf("first entry of a term: %d", got)
	}
	if got := s.take(1, 130); got != 30 {
		t.Errorf("second entry: %d", got)
	}
	s.giveBack(1, 30)
	if got := s.take(1, 150); got != 50 {
		t.Errorf("after an entry that was not appended: %d", got)
	}
	if got := s.take(1, 140); got != 0 {
		t.Errorf("a clock that went back: %d", got)
	}
	if got := s.take(2, 500); got != 0 {
		t.Errorf("first entry of the next term: %d", got)
	}
}
