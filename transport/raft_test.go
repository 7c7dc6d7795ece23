package transport

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"

	"rollcall/node/fault"
)

// counter is a raft.FSM that remembers what was applied.
type counter struct {
	mu  sync.Mutex
	log []string
}

func (c *counter) Apply(l *raft.Log) any {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.log = append(c.log, string(l.Data))
	return nil
}

func (c *counter) applied() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]string(nil), c.log...)
}

func (c *counter) Snapshot() (raft.FSMSnapshot, error) {
	return nil, errors.New("no snapshots in this test")
}
func (c *counter) Restore(io.ReadCloser) error { return errors.New("no snapshots in this test") }

// member is one real Raft replica on a Transport.
type member struct {
	*node
	raft  *raft.Raft
	net   *raft.NetworkTransport
	fsm   *counter
	close func()
}

// startRaft makes a replica called name over the stream layer.
func startRaft(t testing.TB, name string, layer raft.StreamLayer, servers []raft.Server) *member {
	t.Helper()
	m := &member{fsm: &counter{}}
	m.net = raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
		Stream: layer, MaxPool: 3, MaxRPCsInFlight: 1, Timeout: 2 * time.Second, Logger: hclog.NewNullLogger(),
	})
	cfg := raft.DefaultConfig()
	cfg.LocalID = raft.ServerID(name)
	cfg.HeartbeatTimeout, cfg.ElectionTimeout = 500*time.Millisecond, 500*time.Millisecond
	cfg.LeaderLeaseTimeout = 250 * time.Millisecond
	cfg.Logger = hclog.NewNullLogger()
	store := raft.NewInmemStore()
	snaps := raft.NewInmemSnapshotStore()
	if err := raft.BootstrapCluster(cfg, store, store, snaps, m.net, raft.Configuration{Servers: servers}); err != nil {
		t.Fatal(err)
	}
	r, err := raft.NewRaft(cfg, m.fsm, store, store, snaps, m.net)
	if err != nil {
		t.Fatal(err)
	}
	m.raft = r
	m.close = sync.OnceFunc(func() {
		if err := r.Shutdown().Error(); err != nil {
			t.Error(err)
		}
		_ = m.net.Close()
	})
	return m
}

// cluster starts count replicas called node-1.. on the network that net returns for each.
func cluster(t testing.TB, count int, network func(name string) (Network, string)) []*member {
	t.Helper()
	ca := newCA(t)
	nodes := make([]*node, count)
	var servers []raft.Server
	names := make(map[raft.ServerAddress]string)
	for i := range nodes {
		name := fmt.Sprintf("node-%d", i+1)
		nw, listen := network(name)
		nodes[i] = newNode(t, nw, ca, name, listen)
		addr := raft.ServerAddress(nodes[i].Addr())
		servers = append(servers, raft.Server{ID: raft.ServerID(name), Address: addr})
		names[addr] = name
	}
	members := make([]*member, count)
	for i, n := range nodes {
		n.SetNameOf(func(a raft.ServerAddress) string { return names[a] })
		m := startRaft(t, n.Identity().Name, n.Raft(), servers)
		m.node = n
		members[i] = m
		t.Cleanup(m.close)
	}
	return members
}

// leader waits for a leader among members whose term all of them know.
func leader(t testing.TB, members []*member) *member {
	t.Helper()
	var found *member
	eventually(t, 30*time.Second, func() error {
		for _, m := range members {
			if m.raft.State() == raft.Leader && m.raft.VerifyLeader().Error() == nil {
				found = m
				return nil
			}
		}
		states := "no leader:"
		for _, m := range members {
			states += fmt.Sprintf(" %s %s, term %d;", m.net.LocalAddr(), m.raft.State(), m.raft.CurrentTerm())
		}
		return errors.New(states)
	})
	return found
}

// commit proposes through whoever leads until it is committed.
func commit(t testing.TB, members []*member, text string) {
	t.Helper()
	eventually(t, 60*time.Second, func() error {
		return leader(t, members).raft.Apply([]byte(text), 5*time.Second).Error()
	})
}

func wantApplied(t testing.TB, members []*member, last string) {
	t.Helper()
	for _, m := range members {
		eventually(t, 30*time.Second, func() error {
			if log := m.fsm.applied(); len(log) == 0 || log[len(log)-1] != last {
				return fmt.Errorf("%s has applied %v, want %s at the end", m.Identity().Name, log, last)
			}
			return nil
		})
	}
}

func memCluster(t testing.TB, n *MemNetwork, count int) []*member {
	return cluster(t, count, func(name string) (Network, string) { return n.Host(name), name + ":7001" })
}

func others(members []*member, but *member) []*member {
	var out []*member
	for _, m := range members {
		if m != but {
			out = append(out, m)
		}
	}
	return out
}

// TestRaftElectsCommitsAndHealsInVirtualTime runs the production stack (TLS, ALPN, raft.NetworkTransport, gRPC) on the
// in-memory network in a synctest bubble: a quarter of an hour of it in a second.
func TestRaftElectsCommitsAndHealsInVirtualTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start, real := time.Now(), realClock()
		mem := NewMemNetwork()
		members := memCluster(t, mem, 3)
		commit(t, members, "first")
		wantApplied(t, members, "first")

		for round := range 5 {
			old := leader(t, members)
			rest := others(members, old)
			name := old.Identity().Name
			switch round % 3 {
			case 0:
				mem.Isolate(name)
			case 1: // the leader hears and is not heard
				for _, m := range rest {
					mem.CutOneWay(name, m.Identity().Name)
				}
			case 2:
				for _, m := range rest {
					mem.Cut(name, m.Identity().Name)
				}
			}
			text := fmt.Sprintf("round %d", round)
			commit(t, rest, text)
			if log := old.fsm.applied(); log[len(log)-1] == text && round%3 == 0 {
				t.Errorf("%s has applied %q across the cut", name, text)
			}
			time.Sleep(20 * time.Second)
			mem.HealAll()
			wantApplied(t, members, text)
		}

		// gRPC on the same port, through the same partitions.
		a, b := members[0], members[1]
		mem.Cut(a.Identity().Name, b.Identity().Name)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		_, err := a.say(ctx, b.Addr(), b.Identity().Name, "x")
		cancel()
		if !fault.Is(err, fault.Deadline) && !fault.Is(err, fault.Unavailable) {
			t.Errorf("across a cut: %v", err)
		}
		mem.HealAll()
		eventually(t, 30*time.Second, func() error {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			_, err := a.say(ctx, b.Addr(), b.Identity().Name, "x")
			return err
		})
		time.Sleep(12 * time.Minute) // keepalives, idle timeouts
		commit(t, members, "last")
		wantApplied(t, members, "last")
		t.Logf("%s of virtual time in %s", time.Since(start).Round(time.Second), real())
	})
}

// TestADiskWatchdogMovesTheLeader is finding B5: with its dials refused and streams closed, a leader stops looking alive.
func TestADiskWatchdogMovesTheLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		members := memCluster(t, NewMemNetwork(), 3)
		commit(t, members, "a")
		old := leader(t, members)
		old.Refuse(true)
		old.CloseStreams()
		begin := time.Now()
		commit(t, others(members, old), "b")
		if d := time.Since(begin); d > 10*time.Second {
			t.Errorf("fail-over took %s", d)
		}
		old.Refuse(false)
		wantApplied(t, members, "b")
	})
}

// TestRaftKeepsItsLeaderWhileCertificatesRotate is finding F90 for Raft, on TCP.
func TestRaftKeepsItsLeaderWhileCertificatesRotate(t *testing.T) {
	members := cluster(t, 3, func(string) (Network, string) { return TCP(), "127.0.0.1:0" })
	commit(t, members, "a")
	old := leader(t, members)
	term := old.raft.CurrentTerm()

	stop, done := make(chan struct{}), make(chan int)
	go func() {
		applied := 0
		defer func() { done <- applied }()
		for {
			select {
			case <-stop:
				return
			default:
			}
			if err := old.raft.Apply([]byte("x"), 5*time.Second).Error(); err != nil {
				t.Errorf("apply %d: %v", applied, err)
				return
			}
			applied++
			time.Sleep(time.Millisecond)
		}
	}()
	trust := members[0].creds.TrustedPEM()
	next := newCA(t)
	for _, m := range members {
		both := append(append([]byte(nil), trust...), next.CertPEM()...)
		pair := certPEMOf(m.creds)
		if err := m.creds.Replace(both, pair[0], pair[1]); err != nil {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	for _, m := range members {
		replace(t, m.node, append(append([]byte(nil), trust...), next.CertPEM()...), next)
		time.Sleep(50 * time.Millisecond)
	}
	for _, m := range members {
		replace(t, m.node, next.CertPEM(), next)
		time.Sleep(50 * time.Millisecond)
	}
	close(stop)
	applied := <-done
	if now := old.raft.CurrentTerm(); old.raft.State() != raft.Leader || now != term {
		t.Errorf("leadership has changed: term %d, then %d, %s", term, now, old.raft.State())
	}
	if applied < 10 { // the pace is the machine's; that commits went on is the promise
		t.Errorf("only %d entries during the rotation", applied)
	}
	t.Logf("%d entries during a rotation of three nodes, same leader, same term", applied)
}

func certPEMOf(c *Credentials) [2][]byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return [2][]byte{c.certPEM, c.keyPEM}
}
