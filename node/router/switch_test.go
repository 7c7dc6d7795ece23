package router

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"rollcall/node/fault"
	"rollcall/node/supervisor"
	commandv1 "rollcall/proto/command/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// hammer adds to a counter from several goroutines while swap runs back to back, and answers what was acknowledged, what
// failed, and what the counter says in the end.
func hammer(t *testing.T, noGate bool, writers, swaps int) (acked, failed int64, have int) {
	c := newCluster(t, 1, func(cfg *Config) { cfg.noGate = noGate })
	n := c.nodes[0]
	m := c.mount("kv/", nil)
	n.up(t, m, newFake("0"))
	var ok, bad atomic.Int64
	var first atomic.Pointer[error]
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := n.do(opUpdate, "kv/count/hot", "{}"); err != nil {
					bad.Add(1)
					first.CompareAndSwap(nil, &err)
					continue
				}
				ok.Add(1)
				// Writers that never pause would keep the swap from its processor, and measure the scheduler.
				time.Sleep(20 * time.Microsecond)
			}
		})
	}
	for i := range swaps {
		was := ok.Load()
		eventually(t, "a request between two swaps", func() bool { return ok.Load()+bad.Load() > was })
		n.up(t, m, newFake(fmt.Sprint(i+1)))
	}
	close(stop)
	wg.Wait()
	if e := first.Load(); e != nil {
		t.Logf("first error: %v", *e)
	}
	e := n.fsm.View().StorageGet(m.GetUuid(), "count/hot")
	_, err := fmt.Sscan(string(e.GetValue()), &have)
	if err != nil {
		t.Fatal(err)
	}
	return ok.Load(), bad.Load(), have
}

func TestNoUpdateIsLostAndNoRequestFailsAcrossAThousandSwaps(t *testing.T) {
	acked, failed, have := hammer(t, false, 8, 1000)
	if failed != 0 || int64(have) != acked || acked < 1000 {
		t.Fatalf("%d acknowledged, %d failed, the counter says %d", acked, failed, have)
	}
	t.Logf("%d acknowledged", acked)
}

// Without the gate the same run must lose updates: that is what shows that the test above can fail.
func TestTheMutantWithoutAGateLosesUpdates(t *testing.T) {
	for range 20 {
		acked, failed, have := hammer(t, true, 8, 100)
		if int64(have) < acked || failed > 0 {
			t.Logf("%d acknowledged, %d failed, the counter says %d", acked, failed, have)
			return
		}
	}
	t.Fatal("a swap without a gate lost nothing and failed nothing in 20 runs")
}

func TestASwitchTellsWhatItHeldAndDrained(t *testing.T) {
	c := newCluster(t, 1, nil)
	n := c.nodes[0]
	m := c.mount("kv/", nil)
	a, b := newFake("a"), newFake("b")
	n.up(t, m, a)
	slow := async(func() (*Response, error) { return n.do(opRead, "kv/slow", "") })
	<-a.enter
	m = c.commit(m)
	done := make(chan *Switched, 1)
	go func() { done <- n.up(t, m, b) }()
	rt := n.router.lookup(m.GetUuid())
	eventually(t, "the gate is closed", func() bool { s, _, _ := rt.gate.state(); return s == held })
	waiting := async(func() (*Response, error) { return n.do(opRead, "kv/whoami", "") })
	eventually(t, "a request is held", func() bool { rt.gate.mu.Lock(); defer rt.gate.mu.Unlock(); return rt.gate.waiting == 1 })
	close(a.leave)
	s := <-done
	if r := <-slow; r.err != nil || field(r.resp, "name") != "a" {
		t.Fatalf("the request in flight: %v, %v", r.resp, r.err)
	}
	r := <-waiting
	if r.err != nil || field(r.resp, "name") != "b" || r.resp.Generation != m.GetWanted().GetGeneration() {
		t.Fatalf("the held request: %+v, %v", r.resp, r.err)
	}
	tr := s.Traffic
	if s.Old != Backend(a) || s.HoldFor <= 0 || tr.GetHeld() != 1 || tr.GetDrained() != 1 || tr.GetFailed() != 0 || tr.GetServed() != 2 {
		t.Fatalf("switched: %+v", s)
	}
	if g, ready := n.router.Running(m.GetUuid()); g != m.GetWanted().GetGeneration() || !ready {
		t.Fatalf("running %d, ready %v", g, ready)
	}
	if got := c.get(m.GetUuid()); got.GetEpochGeneration() != m.GetWanted().GetGeneration() {
		t.Fatalf("epoch of generation %d", got.GetEpochGeneration())
	}
}

type result struct {
	resp *Response
	err  error
}

func async(f func() (*Response, error)) <-chan result {
	out := make(chan result, 1)
	go func() {
		resp, err := f()
		out <- result{resp, err}
	}()
	return out
}

func TestAHoldThatIsTooShortLeavesTheOldOneServing(t *testing.T) {
	c := newCluster(t, 1, nil)
	n := c.nodes[0]
	m := c.mount("kv/", nil)
	a, b := newFake("a"), newFake("b")
	n.up(t, m, a)
	slow := async(func() (*Response, error) { return n.do(opRead, "kv/slow", "") })
	<-a.enter
	m = c.commit(m)
	plan := SwitchPlan{Wanted: m.GetWanted(), Backend: b, Role: n.Role(), Hold: 20 * time.Millisecond}
	_, err := n.router.Switch(t.Context(), m, plan)
	wantKind(t, err, fault.Deadline)
	if b.setups() != 0 {
		t.Fatal("the new backend was touched")
	}
	if r, err := n.do(opRead, "kv/whoami", ""); err != nil || field(r, "name") != "a" {
		t.Fatalf("after the reopened gate: %v, %v", r, err)
	}
	if _, err := n.do(opUpdate, "kv/x", `{"value":"1"}`); err != nil {
		t.Fatalf("write after the reopened gate: %v", err)
	}
	close(a.leave)
	if r := <-slow; r.err != nil {
		t.Fatal(r.err)
	}
	if _, err := n.router.Switch(t.Context(), m, plan); err != nil {
		t.Fatalf("the second try: %v", err)
	}
}

func TestForceCancelsReadsIntoAnotherTryAndWritesIntoUnknownOutcomes(t *testing.T) {
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
	m = c.commit(m)
	s, err := n.router.Switch(t.Context(), m, SwitchPlan{
		Wanted: m.GetWanted(), Backend: b, Role: n.Role(), Hold: 10 * time.Millisecond, Force: "cancel",
	})
	if err != nil {
		t.Fatal(err)
	}
	if r := <-read; r.err != nil || field(r.resp, "name") != "b" {
		t.Fatalf("the read: %v, %v", r.resp, r.err)
	}
	wantKind(t, (<-write).err, fault.OutcomeUnknown)
	if s.Traffic.GetCanceled() != 2 || s.Traffic.GetFailed() != 1 {
		t.Fatalf("traffic: %v", s.Traffic)
	}
}

func TestFenceAnswersUnavailableUntilRequestsInFlightHaveEnded(t *testing.T) {
	c := newCluster(t, 1, nil)
	n := c.nodes[0]
	m := c.mount("kv/", nil)
	a, b := newFake("a"), newFake("b")
	n.up(t, m, a)
	slow := async(func() (*Response, error) { return n.do(opUpdate, "kv/slow", "{}") })
	<-a.enter
	m = c.commit(m)
	done := make(chan error, 1)
	go func() {
		_, err := n.router.Switch(context.Background(), m, SwitchPlan{
			Wanted: m.GetWanted(), Backend: b, Role: n.Role(), Hold: 10 * time.Millisecond, Force: "fence",
		})
		done <- err
	}()
	eventually(t, "the mount answers 503", func() bool {
		_, err := n.do(opRead, "kv/whoami", "")
		return fault.Is(err, fault.Unavailable)
	})
	close(a.leave)
	if r := <-slow; r.err != nil {
		t.Fatal(r.err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if r, err := n.do(opRead, "kv/whoami", ""); err != nil || field(r, "name") != "b" {
		t.Fatalf("%v, %v", r, err)
	}
}

func TestACommittedSwitchThatFailsLetsRequestsFailFastUntilOneWorks(t *testing.T) {
	c := newCluster(t, 1, nil)
	n := c.nodes[0]
	m := c.mount("kv/", nil)
	a, bad := newFake("a"), newFake("bad")
	n.up(t, m, a)
	m = c.commit(m)
	bad.onInit = func(context.Context, supervisor.Storage) error { return fault.Text(fault.Refused, "cannot start") }
	plan := SwitchPlan{Wanted: m.GetWanted(), Backend: bad, Role: n.Role()}
	_, err := n.router.Switch(t.Context(), m, plan)
	wantKind(t, err, fault.Refused)
	from := time.Now()
	_, err = n.do(opRead, "kv/whoami", "")
	wantKind(t, err, fault.Unavailable)
	if took := time.Since(from); took > time.Second {
		t.Fatalf("it took %v to fail", took)
	}
	if _, ready := n.router.Running(m.GetUuid()); ready {
		t.Fatal("ready")
	}
	err = a.storage().Put(t.Context(), &supervisor.Entry{Key: "k", Value: []byte("old")})
	wantKind(t, err, fault.Stale)
	n.up(t, m, newFake("good"))
	if r, err := n.do(opRead, "kv/whoami", ""); err != nil || field(r, "name") != "good" {
		t.Fatalf("%v, %v", r, err)
	}
}

func TestKeepOldGoesOnWithTheOldOneAndItsWrites(t *testing.T) {
	c := newCluster(t, 1, nil)
	n := c.nodes[0]
	m := c.mount("kv/", nil)
	a, bad := newFake("a"), newFake("bad")
	n.up(t, m, a)
	bad.onInit = func(ctx context.Context, st supervisor.Storage) error {
		if err := st.Put(ctx, &supervisor.Entry{Key: "half", Value: []byte("done")}); err != nil {
			t.Error(err)
		}
		return fault.Text(fault.Refused, "cannot start")
	}
	_, err := n.router.Switch(t.Context(), m, SwitchPlan{Wanted: m.GetWanted(), Backend: bad, Role: n.Role(), KeepOld: true})
	wantKind(t, err, fault.Refused)
	if _, err := n.do(opUpdate, "kv/x", `{"value":"1"}`); err != nil {
		t.Fatal(err)
	}
	if e := n.fsm.View().StorageGet(m.GetUuid(), "half"); e != nil {
		t.Fatal("what the refused instance wrote was committed")
	}
}

func TestATrialLeavesNoTraceAndNamesThePhaseThatRefused(t *testing.T) {
	c := newCluster(t, 1, nil)
	n := c.nodes[0]
	m := c.mount("kv/", nil)
	n.up(t, m, newFake("a"))
	if _, err := n.do(opUpdate, "kv/there", `{"value":"1"}`); err != nil {
		t.Fatal(err)
	}
	before := n.fsm.Index()
	b := newFake("b")
	b.onInit = func(ctx context.Context, st supervisor.Storage) error {
		if e, err := st.Get(ctx, "there"); err != nil || e == nil {
			t.Errorf("the trial does not see the storage: %v, %v", e, err)
		}
		if err := st.Put(ctx, &supervisor.Entry{Key: "new/k", Value: []byte("v")}); err != nil {
			t.Error(err)
		}
		if err := st.Delete(ctx, "there"); err != nil {
			t.Error(err)
		}
		keys, err := st.List(ctx, "")
		if err != nil || len(keys) != 1 || keys[0] != "new/" {
			t.Errorf("the trial lists %v, %v", keys, err)
		}
		return nil
	}
	steps, err := n.router.Trial(t.Context(), m, m.GetWanted().GetSpec(), b, "")
	if err != nil || len(steps) != 1 || steps[0].GetName() != "trial" {
		t.Fatalf("%v, %v", steps, err)
	}
	if n.fsm.Index() != before || n.fsm.View().StorageGet(m.GetUuid(), "there") == nil {
		t.Fatal("the trial left a trace")
	}
	if err := b.storage().Put(t.Context(), &supervisor.Entry{Key: "late", Value: nil}); !fault.Is(err, fault.Stale) {
		t.Fatalf("a write after the trial: %v", err)
	}

	refused := fault.Text(fault.Refused, "no")
	for phase, breaks := range map[string]func(*fake){
		"setup":      func(f *fake) { e := error(refused); f.setupErr.Store(&e) },
		"type":       func(f *fake) { f.kind = "auth" },
		"initialize": func(f *fake) { f.onInit = func(context.Context, supervisor.Storage) error { return refused } },
	} {
		f := newFake("bad")
		breaks(f)
		_, err := n.router.Trial(t.Context(), m, m.GetWanted().GetSpec(), f, "initialize")
		fe := &fault.Error{}
		ok := errors.As(err, &fe)
		if !ok || fe.Kind != fault.Refused || fe.Op != phase {
			t.Errorf("%s: %v", phase, err)
		}
	}
	f := newFake("lazy")
	f.onInit = func(context.Context, supervisor.Storage) error { t.Error("initialized"); return nil }
	if _, err := n.router.Trial(t.Context(), m, m.GetWanted().GetSpec(), f, "setup"); err != nil {
		t.Error(err)
	}
	if _, err := n.router.Trial(t.Context(), m, m.GetWanted().GetSpec(), f, "handshake"); err != nil || f.setups() != 1 {
		t.Errorf("handshake: %v, %d setups", err, f.setups())
	}
}

func TestWhatTheLeadersInstanceWritesWhileItIsSetUpIsOneEntryWithTheTakeOver(t *testing.T) {
	c := newCluster(t, 2, nil)
	m := c.mount("kv/", nil)
	b := newFake("b")
	b.onInit = func(ctx context.Context, st supervisor.Storage) error {
		for i := range 3 {
			if err := st.Put(ctx, &supervisor.Entry{Key: fmt.Sprint("k", i), Value: []byte("v")}); err != nil {
				return err
			}
		}
		return st.Delete(ctx, "k1")
	}
	before := c.index
	c.nodes[0].up(t, m, b)
	if c.index != before+1 {
		t.Fatalf("%d entries", c.index-before)
	}
	got := c.nodes[1].fsm.View()
	if keys := got.StorageList(m.GetUuid(), ""); fmt.Sprint(keys) != "[k0 k2]" || got.Mount(m.GetUuid()).GetEpoch() != c.index {
		t.Fatalf("keys %v, epoch %d, index %d", keys, got.Mount(m.GetUuid()).GetEpoch(), c.index)
	}
}

func TestOverlayCapsRefuseWithAText(t *testing.T) {
	st := newStore("u", collecting, func() View { return emptyView{} })
	big := make([]byte, maxValue)
	err := st.Put(t.Context(), &supervisor.Entry{Key: "k", Value: append(big, 0)})
	wantKind(t, err, fault.TooLarge)
	for i := range 7 {
		if err := st.Put(t.Context(), &supervisor.Entry{Key: fmt.Sprint(i), Value: big}); err != nil {
			t.Fatal(err)
		}
	}
	if err := st.Put(t.Context(), &supervisor.Entry{Key: "6", Value: big}); err != nil {
		t.Fatalf("replacing a value: %v", err)
	}
	wantKind(t, st.Put(t.Context(), &supervisor.Entry{Key: "7", Value: big}), fault.Exhausted)

	st = newStore("u", collecting, func() View { return emptyView{} })
	for i := range maxOverlayKeys {
		if err := st.Put(t.Context(), &supervisor.Entry{Key: fmt.Sprint(i)}); err != nil {
			t.Fatal(err)
		}
	}
	wantKind(t, st.Put(t.Context(), &supervisor.Entry{Key: "more"}), fault.Exhausted)
	if err := st.Put(t.Context(), &supervisor.Entry{Key: "5", Value: []byte("again")}); err != nil {
		t.Fatal(err)
	}
	for key, kind := range map[string]fault.Kind{"": fault.Invalid, "a/../b": fault.Invalid, strings.Repeat("k", 4097): fault.TooLarge} {
		wantKind(t, st.Put(t.Context(), &supervisor.Entry{Key: key}), kind)
	}
}

// emptyView is a state without anything.
type emptyView struct{ View }

func (emptyView) StorageGet(string, string) *commandv1.StorageEntry { return nil }
func (emptyView) StorageList(string, string) []string               { return nil }

func TestARetiredInstanceCannotWrite(t *testing.T) {
	c := newCluster(t, 1, nil)
	n := c.nodes[0]
	m := c.mount("kv/", nil)
	a := newFake("a")
	n.up(t, m, a)
	st := a.storage()
	n.up(t, m, newFake("b"))
	wantKind(t, st.Put(t.Context(), &supervisor.Entry{Key: "k", Value: []byte("late")}), fault.Stale)
	if n.fsm.View().StorageGet(m.GetUuid(), "k") != nil {
		t.Fatal("written")
	}
}

// The state machine refuses what a store that does not know of its retirement proposes: the old leader's process.
func TestAWriteUnderAnOldEpochIsRefusedAndTheInstanceIsSetUpAgain(t *testing.T) {
	c := newCluster(t, 1, nil)
	n := c.nodes[0]
	m := c.mount("kv/", nil)
	a := newFake("a")
	n.up(t, m, a)
	// Somebody else takes the mount over in the same term: a TakeOver of ours that came late.
	c.must(&commandv1.Command{Body: &commandv1.Command_TakeOver{TakeOver: &commandv1.TakeOver{
		MountUuid: m.GetUuid(), NodeId: "n1", Generation: m.GetWanted().GetGeneration(), Term: c.term,
	}}})
	_, err := n.do(opUpdate, "kv/x", `{"value":"1"}`)
	wantKind(t, err, fault.OutcomeUnknown)
	eventually(t, "the instance is set up again", func() bool { return a.setups() == 2 })
	eventually(t, "it writes", func() bool { _, err := n.do(opUpdate, "kv/x", `{"value":"1"}`); return err == nil })
}

func TestWhatTheOldInstanceWritesDuringASwitchWaitsForIt(t *testing.T) {
	c := newCluster(t, 1, nil)
	n := c.nodes[0]
	m := c.mount("kv/", nil)
	a, b := newFake("a"), newFake("b")
	n.up(t, m, a)
	inside, goOn := make(chan struct{}), make(chan struct{})
	b.onInit = func(context.Context, supervisor.Storage) error {
		close(inside)
		<-goOn
		return fault.Text(fault.Refused, "no")
	}
	done := make(chan error, 1)
	go func() {
		_, err := n.router.Switch(context.Background(), m, SwitchPlan{Wanted: m.GetWanted(), Backend: b, Role: n.Role(), KeepOld: true})
		done <- err
	}()
	<-inside
	wrote := make(chan error, 1)
	go func() {
		wrote <- a.storage().Put(context.Background(), &supervisor.Entry{Key: "bg", Value: []byte("1")})
	}()
	select {
	case err := <-wrote:
		t.Fatalf("it did not wait: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	close(goOn)
	wantKind(t, <-done, fault.Refused)
	if err := <-wrote; err != nil {
		t.Fatalf("after the old one was kept: %v", err)
	}
}

func TestRelabelEntersTheNewGenerationWithoutASecondSetup(t *testing.T) {
	c := newCluster(t, 1, nil)
	n := c.nodes[0]
	m := c.mount("kv/", nil)
	a := newFake("a")
	n.up(t, m, a)
	m = c.commit(m)
	n.router.Relabel(m.GetUuid(), m.GetWanted())
	eventually(t, "the state knows that the leader serves the generation", func() bool {
		return c.get(m.GetUuid()).GetEpochGeneration() == m.GetWanted().GetGeneration()
	})
	eventually(t, "writes go on", func() bool { _, err := n.do(opUpdate, "kv/x", `{"value":"1"}`); return err == nil })
	if g, ready := n.router.Running(m.GetUuid()); a.setups() != 1 || g != m.GetWanted().GetGeneration() || !ready {
		t.Fatalf("%d setups, generation %d, ready %v", a.setups(), g, ready)
	}
}

func TestDropWaitsForRequestsInFlightAndThenCancelsThem(t *testing.T) {
	c := newCluster(t, 1, nil)
	n := c.nodes[0]
	m := c.mount("kv/", nil)
	a := newFake("a")
	n.up(t, m, a)
	slow := async(func() (*Response, error) { return n.do(opUpdate, "kv/slow", "{}") })
	<-a.enter
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	b, err := n.router.Drop(ctx, m.GetUuid())
	if err != nil || b != Backend(a) {
		t.Fatalf("%v, %v", b, err)
	}
	wantKind(t, (<-slow).err, fault.OutcomeUnknown)
	if g, ready := n.router.Running(m.GetUuid()); g != 0 || ready {
		t.Fatalf("running %d, %v", g, ready)
	}
}

func TestAMountThatReturnsWhileItsRouteIsStillBeingDroppedIsServed(t *testing.T) {
	c := newCluster(t, 1, nil)
	n := c.nodes[0]
	m := c.mount("kv/", nil)
	a, b := newFake("a"), newFake("b")
	n.up(t, m, a)
	rt := n.router.lookup(m.GetUuid())
	rt.busy <- struct{}{} // a change of the route that does not come to an end
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := n.router.Drop(ctx, m.GetUuid()); err == nil {
		t.Fatal("the route was dropped while it was being changed")
	}
	n.up(t, m, b)
	if _, err := n.do(opUpdate, "kv/x", `{"value":"1"}`); err != nil {
		t.Fatalf("the mount that came back: %v", err)
	}
	rt.unlock()
	eventually(t, "the old route's instance is ended", func() bool { return rt.run.Load() == nil })
	if _, err := n.do(opUpdate, "kv/x", `{"value":"2"}`); err != nil || n.router.lookup(m.GetUuid()) == rt {
		t.Fatalf("after the old route has ended: %v", err)
	}
}
