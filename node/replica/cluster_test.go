package replica

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
	peerv1 "rollcall/proto/peer/v1"
)

func TestThreeNodesFoundOneClusterInAnyOrder(t *testing.T) {
	c := newCluster(t)
	all := c.founders(3)
	for _, i := range []int{2, 0, 1} {
		all[i].start()
		time.Sleep(30 * time.Millisecond) // the order matters here, not the length
	}
	ready(t, all...)
	c.leader()
	ids := map[string]bool{}
	for _, m := range all {
		ids[m.fsm.View().ClusterID()] = true
		if n := len(m.Members()); n != 3 {
			t.Errorf("%s sees %d members, want 3", m.name, n)
		}
	}
	if len(ids) != 1 || ids[""] {
		t.Errorf("cluster ids: %v, want one", ids)
	}
}

func TestOneNodeFoundsAClusterAloneAndOthersJoinIt(t *testing.T) {
	c := newCluster(t)
	first := c.node("n1", func(cfg *Config) { cfg.BootstrapExpect = 1 })
	first.start()
	ready(t, first)
	second, third := c.node("n2"), c.node("n3")
	reader := c.node("n4", func(cfg *Config) { cfg.NonVoter = true })
	second.start()
	third.start()
	reader.start()
	ready(t, second, third, reader)
	eventually(t, 20*time.Second, func() error {
		voters := 0
		for _, m := range first.Members() {
			if m.Voter {
				voters++
			}
			if m.Voter && m.Name == "n4" {
				return errors.New("the non-voter votes")
			}
		}
		if voters != 3 {
			return fmt.Errorf("%d voters of %d members", voters, len(first.Members()))
		}
		return nil
	})
}

func TestFewerNodesThanExpectedFoundNothing(t *testing.T) {
	c := newCluster(t)
	all := c.founders(3)
	all[0].start()
	all[1].start()
	time.Sleep(time.Second) // nothing must happen in it
	for _, m := range all[:2] {
		if m.hasState() {
			t.Errorf("%s founded a cluster with two of three nodes", m.name)
		}
	}
}

func TestNodesThatExpectDifferentNumbersFoundNothing(t *testing.T) {
	c := newCluster(t)
	a := c.node("a", func(cfg *Config) { cfg.BootstrapExpect = 2 })
	b := c.node("b", func(cfg *Config) { cfg.BootstrapExpect = 2 })
	odd := c.node("c", func(cfg *Config) { cfg.BootstrapExpect = 3 })
	odd.start()
	a.start()
	b.start()
	time.Sleep(time.Second) // nothing must happen in it
	for _, m := range []*member{a, b, odd} {
		if m.hasState() {
			t.Errorf("%s founded a cluster although the nodes expect different numbers", m.name)
		}
	}
}

// Two empty nodes beside one with state must not found a second cluster, and must not outvote what the old one knows.
func TestTwoFreshNodesAndOneOldOneFoundNoSecondCluster(t *testing.T) {
	c := newCluster(t)
	all := c.founders(3)
	for _, m := range all {
		m.start()
	}
	ready(t, all...)
	id := all[0].fsm.View().ClusterID()
	all[0].mustWrite("before")
	for _, m := range all {
		m.stop()
	}
	for _, m := range all[1:] {
		if err := os.RemoveAll(m.path); err != nil {
			t.Fatal(err)
		}
	}
	for _, m := range all {
		m.start()
	}
	time.Sleep(1500 * time.Millisecond) // nothing must happen in it
	for _, m := range all[1:] {
		if m.hasState() {
			t.Errorf("%s, an empty disk, has state of cluster %q; the old one is %q", m.name, m.fsm.View().ClusterID(), id)
		}
	}
	if all[0].Role().Leader {
		t.Error("the old node leads without a majority of those it knows")
	}
}

func TestARestartedClusterKeepsStateAndCountsIncarnations(t *testing.T) {
	c := newCluster(t)
	all := c.founders(3)
	for _, m := range all {
		m.start()
	}
	ready(t, all...)
	id, nodeID := all[0].fsm.View().ClusterID(), all[0].NodeID()
	for _, m := range all {
		m.stop()
	}
	for _, m := range all {
		m.start()
	}
	ready(t, all...)
	if got := all[0].fsm.View().ClusterID(); got != id {
		t.Errorf("cluster id %s became %s", id, got)
	}
	if all[0].NodeID() != nodeID || all[0].Incarnation() != 2 {
		t.Errorf("node %s incarnation %d, want %s and 2", all[0].NodeID(), all[0].Incarnation(), nodeID)
	}
	// The others may be ready before the Hello of this one has reached them.
	eventually(t, 10*time.Second, func() error {
		if n := all[1].fsm.View().Node(nodeID); n.GetIncarnation() != 2 {
			return fmt.Errorf("another node sees incarnation %d, want 2", n.GetIncarnation())
		}
		return nil
	})
}

func TestTheSameDirectoryServesOneProcessOnly(t *testing.T) {
	path := t.TempDir()
	dir, err := OpenDir(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OpenDir(path); !fault.Is(err, fault.Conflict) {
		t.Errorf("opened twice: %v", err)
	}
	if err := dir.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := OpenDir(path)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if again.Incarnation != dir.Incarnation+1 {
		t.Errorf("incarnation %d, want one more than %d", again.Incarnation, dir.Incarnation)
	}
}

func TestAFollowerCatchesUpByLogAndBySnapshot(t *testing.T) {
	c := newCluster(t)
	all := c.founders(3, func(cfg *Config) {
		cfg.SnapshotThreshold, cfg.SnapshotInterval, cfg.TrailingLogs = 40, 50*time.Millisecond, 10
	})
	for _, m := range all {
		m.start()
	}
	ready(t, all...)
	lead := c.leader()
	behind := others(all, lead)[0]
	catchUp := func(n int) {
		t.Helper()
		had := behind.raft.Load().LastIndex()
		behind.stop()
		var last *commandv1.Result
		for i := range n {
			last = lead.mustWrite(fmt.Sprintf("key-%d", i))
		}
		if n > 100 {
			eventually(t, 10*time.Second, func() error {
				if first, _ := lead.stores.Log.FirstIndex(); first <= had+1 {
					return fmt.Errorf("the leader's log begins at %d, the follower has %d", first, had)
				}
				return nil
			})
		}
		behind.start()
		ready(t, behind)
		if err := behind.fsm.WaitIndex(timeout(t, 10*time.Second), last.GetIndex()); err != nil {
			t.Fatalf("%s is at %d, not at %d: %v", behind.name, behind.fsm.Index(), last.GetIndex(), err)
		}
	}
	catchUp(5)
	catchUp(200)
}

func TestANewLeaderFollowsAKilledOne(t *testing.T) {
	c := newCluster(t)
	all := c.founders(3)
	for _, m := range all {
		m.start()
	}
	ready(t, all...)
	lead := c.leader()
	rest := others(all, lead)
	began := time.Now()
	lead.crash()
	rest[0].mustWrite("after")
	t.Logf("written %v after the kill", time.Since(began))
	next := c.leader(rest...)
	if next == lead {
		t.Fatal("the killed node leads")
	}
	lead.start()
	ready(t, lead)
	c.leader()
}

func TestAGracefulStopHandsOverFast(t *testing.T) {
	c := newCluster(t)
	all := c.founders(3, func(cfg *Config) { cfg.Heartbeat, cfg.Lease = 2*time.Second, 5*time.Second })
	for _, m := range all {
		m.start()
	}
	ready(t, all...)
	lead := c.leader()
	rest := others(all, lead)
	began := time.Now()
	go lead.stop()
	eventually(t, 2*time.Second, func() error { // an election would take more than one heartbeat timeout
		if !rest[0].Role().Leader && !rest[1].Role().Leader {
			return errors.New("nobody leads")
		}
		return nil
	})
	t.Logf("handed over in %v", time.Since(began))
	lead.stop()
}

func TestAProposalThroughAFollowerIsAppliedThereWhenItReturns(t *testing.T) {
	c := newCluster(t)
	all := c.founders(3)
	for _, m := range all {
		m.start()
	}
	ready(t, all...)
	lead := c.leader()
	for _, m := range others(all, lead) {
		began := time.Now()
		res := m.mustWrite("through-" + m.name)
		if m.fsm.Index() < res.GetIndex() {
			t.Errorf("%s has applied %d, the result is of %d", m.name, m.fsm.Index(), res.GetIndex())
		}
		t.Logf("through %s: %v", m.name, time.Since(began))
	}
}

func TestAConsistentReadSeesWhatWasWrittenThroughAnotherNode(t *testing.T) {
	c := newCluster(t)
	all := c.founders(3)
	for _, m := range all {
		m.start()
	}
	ready(t, all...)
	for i := range 30 {
		writer, reader := all[i%3], all[(i+1)%3]
		res := writer.mustWrite(fmt.Sprintf("key-%d", i))
		v, err := reader.Consistent(timeout(t, 10*time.Second))
		if err != nil {
			t.Fatal(err)
		}
		if v.Index() < res.GetIndex() {
			t.Fatalf("read at %d through %s after %d was written through %s", v.Index(), reader.name, res.GetIndex(), writer.name)
		}
	}
}

func TestACutOffLeaderAnswersNoConsistentReadAndNoProposal(t *testing.T) {
	c := newCluster(t)
	all := c.founders(3)
	for _, m := range all {
		m.start()
	}
	ready(t, all...)
	lead := c.leader()
	c.net.Isolate(lead.host)
	// Both at once, and at once: after half a heartbeat Raft itself knows that it no longer leads.
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := lead.ReadIndex(timeout(t, time.Second)); err == nil {
			t.Error("a cut-off leader answered a consistent read")
		}
	})
	wg.Go(func() {
		_, err := lead.write(timeout(t, time.Second), "lost")
		if k := fault.KindOf(err); err == nil || k != fault.Unavailable && k != fault.OutcomeUnknown {
			t.Errorf("a cut-off leader answered a proposal with %v", err)
		}
	})
	wg.Wait()
	c.net.Rejoin(lead.host)
	c.leader()
}

func TestProposalsAreRefusedInKindsThatSayWhatRan(t *testing.T) {
	c := newCluster(t)
	m := c.node("n1", func(cfg *Config) {
		cfg.BootstrapExpect, cfg.MaxCommandBytes, cfg.MaxInFlightBytes = 1, 4<<10, 8<<10
	})
	m.start()
	ready(t, m)
	if _, err := m.write(timeout(t, time.Second), string(make([]byte, 5<<10))); !fault.Is(err, fault.TooLarge) {
		t.Errorf("an oversized command: %v", err)
	}
	if _, err := m.ProposeAsLeader(timeout(t, time.Second), m.Role().Term+1, tickCommand()); !fault.Is(err, fault.NotLeader) {
		t.Errorf("a term that this node does not lead: %v", err)
	}
	if _, err := m.ProposeAsLeader(timeout(t, time.Second), m.Role().Term, tickCommand()); err != nil {
		t.Errorf("its own term: %v", err)
	}
	r := m.Replica
	m.stop()
	if _, err := r.Propose(timeout(t, time.Second), tickCommand()); !fault.Is(err, fault.Unavailable) {
		t.Errorf("after Stop: %v", err)
	}
	if err := r.Serving(); !fault.Is(err, fault.Fenced) {
		t.Errorf("after Stop it serves: %v", err)
	}
}

func TestLeaderWorkRunsOnceAtATimeAndEndsWithTheLeadership(t *testing.T) {
	var working, started atomic.Int32
	c := newCluster(t)
	all := c.founders(3)
	for _, m := range all {
		var running atomic.Int32 // on this node; another leader may notice its end a little later than its successor its beginning
		m.before = func(r *Replica) {
			r.LeaderContext(func(ctx context.Context, term uint64) {
				started.Add(1)
				working.Add(1)
				if n := running.Add(1); n != 1 {
					t.Errorf("the work runs %d times at once", n)
				}
				if term != r.Role().Term || !r.Role().Leader {
					t.Errorf("started for term %d as %+v", term, r.Role())
				}
				<-ctx.Done()
				if !fault.Is(context.Cause(ctx), fault.NotLeader) && !fault.Is(context.Cause(ctx), fault.Unavailable) {
					t.Errorf("ended with %v", context.Cause(ctx))
				}
				running.Add(-1)
				working.Add(-1)
			})
		}
		m.start()
	}
	ready(t, all...)
	for range 3 {
		lead := c.leader()
		before := started.Load()
		if err := others(all, lead)[0].TransferLeadership(timeout(t, 5*time.Second)); err != nil {
			t.Fatal(err)
		}
		eventually(t, 5*time.Second, func() error {
			if started.Load() == before {
				return errors.New("the next leader's work has not begun")
			}
			return nil
		})
	}
	for _, m := range all {
		m.stop()
	}
	if n := working.Load(); n != 0 {
		t.Errorf("%d leaders still work after Stop", n)
	}
}

func TestAReplacedDiskUnderTheSameNameTakesTheOldNodesPlace(t *testing.T) {
	c := newCluster(t)
	all := c.founders(3)
	for _, m := range all {
		m.start()
	}
	ready(t, all...)
	lead := c.leader()
	lost := others(all, lead)[0]
	old := lost.NodeID()
	lost.crash()
	if err := os.RemoveAll(lost.path); err != nil {
		t.Fatal(err)
	}
	lost.start()
	ready(t, lost)
	if lost.NodeID() == old {
		t.Fatal("a new disk has the old id")
	}
	eventually(t, 15*time.Second, func() error {
		for _, m := range lead.Members() {
			if m.ID == old {
				return errors.New("the old id is still a member")
			}
			if m.ID == lost.NodeID() && !m.Voter {
				return errors.New("the new one does not vote yet")
			}
		}
		if n := lead.fsm.View().NodeByName(lost.name); n.GetId() != lost.NodeID() {
			return fmt.Errorf("the node table says %v", n)
		}
		return nil
	})
}

func TestALivingNodesNameIsNotTaken(t *testing.T) {
	c := newCluster(t)
	all := c.founders(3)
	for _, m := range all {
		m.start()
	}
	ready(t, all...)
	thief := c.node("thief")
	thief.name = "n1" // the certificate says so too
	thief.start()
	time.Sleep(time.Second) // nothing must happen in it
	select {
	case <-thief.Ready():
		t.Error("a second node entered under a living node's name")
	default:
	}
	if n := len(all[0].Members()); n != 3 {
		t.Errorf("%d members, want 3", n)
	}
}

func TestANodeThatMovedIsReachedAtItsNewAddress(t *testing.T) {
	c := newCluster(t)
	all := c.founders(3)
	for _, m := range all {
		m.start()
	}
	ready(t, all...)
	lead := c.leader()
	moved := others(all, lead)[0]
	moved.stop()
	moved.host = "elsewhere"
	c.mu.Lock()
	c.seed = append(c.seed, "elsewhere:7000")
	c.mu.Unlock()
	moved.start()
	ready(t, moved)
	eventually(t, 10*time.Second, func() error {
		for _, m := range lead.Members() {
			if m.ID == moved.NodeID() && m.Address == "elsewhere:7000" && m.Voter {
				return nil
			}
		}
		return fmt.Errorf("members: %+v", lead.Members())
	})
}

func TestARemovedNodeIsNotLetInAgain(t *testing.T) {
	c := newCluster(t)
	all := c.founders(3)
	for _, m := range all {
		m.start()
	}
	ready(t, all...)
	lead := c.leader()
	gone := others(all, lead)[0]
	asker := others(all, lead)[1]
	id := gone.NodeID()
	if err := asker.RemoveMember(timeout(t, 10*time.Second), id); err != nil {
		t.Fatal(err)
	}
	if n := lead.fsm.View().Node(id); n != nil {
		t.Errorf("still in the node table: %v", n)
	}
	if err := gone.Serving(); err == nil {
		t.Error("removed while it could still serve")
	}
	told := func() {
		t.Helper()
		gone.start()
		defer gone.stop()
		select {
		case err := <-gone.fatal:
			if !fault.Is(err, fault.Denied) {
				t.Errorf("refused with %v", err)
			}
		case <-gone.Ready():
			t.Error("a removed node entered again")
		case <-time.After(15 * time.Second):
			t.Error("a removed node is not told")
		}
	}
	gone.stop()
	told()
	// Now and then the entry that removes it has reached it before its leader stopped to send.
	gone.append(&raft.Log{
		Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(lead.raft.Load().GetConfiguration().Configuration()),
	})
	told()
	if n := len(lead.Members()); n != 2 {
		t.Errorf("%d members, want 2", n)
	}
}

// A node that is told that it was removed ends. A leader that cannot commit the removal must not say so: the next one may not know
// of it.
func TestARemovalThatIsNotCommittedIsNotTold(t *testing.T) {
	c := newCluster(t)
	all := c.founders(3)
	for _, m := range all {
		m.start()
	}
	ready(t, all...)
	lead := c.leader()
	other := others(all, lead)[0]
	c.net.Isolate(lead.host)
	lead.raft.Load().RemoveServer(raft.ServerID(other.NodeID()), 0, 0)
	eventually(t, 5*time.Second, func() error {
		if len(lead.Members()) != 2 {
			return errors.New("the removal is not in the leader's log yet")
		}
		return nil
	})
	refuse := func(kind fault.Kind, format string, args ...any) error {
		return fault.New(kind, "let in", other.name, format, args...)
	}
	err := lead.letInLocked(t.Context(), &peerv1.JoinRequest{
		NodeId: other.NodeID(), Name: other.name, ClusterAddress: other.host + ":7000", ClusterId: lead.fsm.View().ClusterID(),
	}, refuse)
	if !fault.Is(err, fault.Unavailable) {
		t.Errorf("a removal that is not committed: %v", err)
	}
}

func TestACorruptLogIsRefusedInWords(t *testing.T) {
	c := newCluster(t)
	m := c.node("n1", func(cfg *Config) { cfg.BootstrapExpect = 1 })
	m.start()
	ready(t, m)
	for i := range 50 {
		m.mustWrite(fmt.Sprintf("canary-%d", i))
	}
	m.stop()
	path := filepath.Join(m.path, "raft.db")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	flip := append([]byte(nil), good...)
	at := indexOf(flip, []byte("canary-25"))
	if at < 0 {
		t.Fatal("the entry is not in the file")
	}
	flip[at+8] ^= 1
	for name, content := range map[string][]byte{
		"one flipped bit": flip, "truncated": good[:len(good)/2], "short": good[:100], "zero page": zeroPage(good, at/4096), "zeroes": make([]byte, len(good)),
	} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := m.tryStart(); !fault.Is(err, fault.Corrupt) {
			t.Errorf("%s: %v, want corrupt", name, err)
		} else {
			t.Logf("%s: %v", name, err)
		}
	}
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	m.start()
	ready(t, m)
}

func zeroPage(b []byte, page int) []byte {
	out := append([]byte(nil), b...)
	clear(out[page*4096 : (page+1)*4096])
	return out
}

func indexOf(b, sub []byte) int {
	for i := range len(b) - len(sub) {
		if string(b[i:i+len(sub)]) == string(sub) {
			return i
		}
	}
	return -1
}

func TestALeaderWithAHungDiskIsReplacedAndComesBack(t *testing.T) {
	c := newCluster(t)
	disks := map[string]*hangingLog{}
	var all []*member
	for _, m := range c.founders(3) {
		h := &hangingLog{}
		disks[m.name] = h
		inner := m.edit
		m.edit = func(cfg *Config) {
			inner(cfg)
			cfg.DiskLimit = 400 * time.Millisecond
			cfg.wrapLog = func(s raft.LogStore) raft.LogStore { h.LogStore = s; return h }
		}
		all = append(all, m)
		m.start()
	}
	ready(t, all...)
	lead := c.leader()
	rest := others(all, lead)
	disks[lead.name].hang()
	defer disks[lead.name].answer()
	go func() { _, _ = lead.write(context.Background(), "stuck") }()
	began := time.Now()
	next := c.leader(rest...)
	rest[0].mustWrite("meanwhile")
	took := time.Since(began)
	if t.Logf("another leader %v after the disk hung", took); took > 15*time.Second {
		t.Errorf("another leader only %v after the disk hung", took)
	}
	if lead.Role().Leader {
		t.Error("the node with the hung disk still calls itself leader")
	}
	if lead.DiskStalled() == 0 {
		t.Error("the stall is not reported")
	}
	disks[lead.name].answer()
	c.leader()
	res := next.mustWrite("healed")
	if err := lead.fsm.WaitIndex(timeout(t, 10*time.Second), res.GetIndex()); err != nil {
		t.Errorf("the node does not catch up after its disk answers again: %v", err)
	}
}
