package replica

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"rollcall/fsm"
	"rollcall/node/replica/internal/disk"
	commandv1 "rollcall/proto/command/v1"
	"rollcall/transport"
	"rollcall/transport/pki"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// cluster is several replicas in this process, over the real transport on a network in memory.
type cluster struct {
	t     testing.TB
	dir   string // of every node's directory
	net   *transport.MemNetwork
	ca    *pki.CA
	mu    sync.Mutex
	nodes map[string]*member
	seed  []string // addresses that everybody knows
}

// member is one node of a cluster: its directory and, while it is up, its parts.
type member struct {
	c    *cluster
	name string
	host string
	path string
	edit func(*Config)
	// before is called with the replica before it starts.
	before func(*Replica)

	*Replica
	fsm   *fsm.FSM
	port  *transport.Transport
	fatal chan error
}

func newCluster(t testing.TB) *cluster {
	t.Helper()
	ca, err := pki.NewCA("test", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	// The directory is asked for before the nodes' end is, and is therefore removed after it.
	c := &cluster{t: t, dir: t.TempDir(), net: transport.NewMemNetwork(), ca: ca, nodes: map[string]*member{}}
	t.Cleanup(c.stopAll)
	return c
}

// node declares a node; start brings it up.
func (c *cluster) node(name string, edit ...func(*Config)) *member {
	m := &member{c: c, name: name, host: name, path: filepath.Join(c.dir, name)}
	m.edit = func(cfg *Config) {
		for _, f := range edit {
			f(cfg)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.nodes[name] = m
	c.seed = append(c.seed, name+":7000")
	return m
}

// founders declares n nodes that expect each other.
func (c *cluster) founders(n int, edit ...func(*Config)) []*member {
	var all []*member
	for i := range n {
		all = append(all, c.node(fmt.Sprintf("n%d", i+1), append([]func(*Config){func(cfg *Config) { cfg.BootstrapExpect = uint32(n) }}, edit...)...))
	}
	return all
}

// peers is a Discovery that knows addresses, as retry_join does, and ids of what runs.
type peers struct {
	c    *cluster
	self string
}

func (p peers) Changed() <-chan struct{} { return nil }

func (p peers) Peers() []Peer {
	p.c.mu.Lock()
	defer p.c.mu.Unlock()
	var out []Peer
	for _, address := range p.c.seed {
		if address != p.self {
			out = append(out, Peer{Address: address})
		}
	}
	return out
}

func (m *member) start() *member {
	m.c.t.Helper()
	if err := m.tryStart(); err != nil {
		m.c.t.Fatalf("start %s: %v", m.name, err)
	}
	return m
}

func (m *member) tryStart() (err error) {
	var undo []func()
	defer func() {
		for i := len(undo) - 1; err != nil && i >= 0; i-- {
			undo[i]()
		}
	}()
	logger := slog.New(slog.DiscardHandler)
	if os.Getenv("REPLICA_LOG") != "" {
		logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})).With("on", m.name)
	}
	creds, err := transport.Issue(m.c.ca, pki.Request{Role: pki.RoleNode, Name: m.name, TTL: time.Hour})
	if err != nil {
		return err
	}
	address := m.host + ":7000"
	port, err := transport.New(transport.Config{
		Listen: address, Network: m.c.net.Host(m.host), Credentials: creds, Logger: logger, Registerer: prometheus.NewRegistry(),
	})
	if err != nil {
		return err
	}
	undo = append(undo, func() { m.closePort(port) })
	dir, err := OpenDir(m.path)
	if err != nil {
		return err
	}
	undo = append(undo, func() { _ = dir.Close() })
	state := fsm.New()
	fatal := make(chan error, 1)
	cfg := Config{
		Dir: dir, Name: m.name, ClusterAddress: address, APIAddress: m.host + ":8200", FSM: state,
		Stream: port.Raft(), Dial: port.Client, Discovery: peers{m.c, address},
		PeerName: func(ctx context.Context) (string, error) {
			id, ok := transport.PeerIdentity(ctx)
			if !ok {
				return "", errors.New("no certificate")
			}
			return id.Name, nil
		},
		Heartbeat: 250 * time.Millisecond, Lease: 1200 * time.Millisecond, LeaderWait: 10 * time.Second, PromoteAfter: 300 * time.Millisecond,
		NoSync: true, Logger: logger, Metrics: prometheus.NewRegistry(), OnFatal: func(err error) { fatal <- err },
	}
	m.edit(&cfg)
	r, err := New(cfg)
	if err != nil {
		return err
	}
	if m.before != nil {
		m.before(r)
	}
	r.Register(port.Server())
	port.Start()
	m.c.mu.Lock()
	m.Replica, m.fsm, m.port, m.fatal = r, state, port, fatal
	m.c.mu.Unlock()
	return r.Start(m.c.t.Context())
}

func (m *member) closePort(port *transport.Transport) {
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	_ = port.Close(ctx)
}

// stop stops the node in good order.
func (m *member) stop() {
	m.c.mu.Lock()
	r, port := m.Replica, m.port
	m.Replica = nil
	m.c.mu.Unlock()
	if r == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := r.Stop(ctx); err != nil {
		m.c.t.Errorf("stop %s: %v", m.name, err)
	}
	m.closePort(port)
}

// crash cuts the node off first, so that nobody hears that it goes.
func (m *member) crash() {
	m.c.net.Isolate(m.host)
	m.c.net.CloseConns(m.host)
	m.stop()
	m.c.net.Rejoin(m.host)
}

// append puts an entry at the end of the log of a node that does not run.
func (m *member) append(entry *raft.Log) {
	m.c.t.Helper()
	dir, err := OpenDir(m.path)
	if err != nil {
		m.c.t.Fatal(err)
	}
	defer func() { _ = dir.Close() }()
	stores, err := dir.Open(disk.Options{NoSync: true, Retain: 2})
	if err != nil {
		m.c.t.Fatal(err)
	}
	defer func() { _ = stores.Close() }()
	var last raft.Log
	index, err := stores.Log.LastIndex()
	if err == nil {
		err = stores.Log.GetLog(index, &last)
	}
	if err == nil {
		entry.Index, entry.Term = index+1, last.Term
		err = stores.Log.StoreLog(entry)
	}
	if err != nil {
		m.c.t.Fatalf("append to the log of %s: %v", m.name, err)
	}
}

func (c *cluster) stopAll() {
	c.mu.Lock()
	var all []*member
	for _, m := range c.nodes {
		all = append(all, m)
	}
	c.mu.Unlock()
	c.net.HealAll()
	var wg sync.WaitGroup
	for _, m := range all {
		wg.Go(m.stop)
	}
	wg.Wait()
}

func (c *cluster) up() []*member {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []*member
	for _, m := range c.nodes {
		if m.Replica != nil {
			out = append(out, m)
		}
	}
	return out
}

// eventually retries f until it returns nil, and fails the test with f's last error.
func eventually(t testing.TB, within time.Duration, f func() error) {
	t.Helper()
	deadline := time.Now().Add(within)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v: %v", within, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// leader waits until exactly one of the running nodes leads and the others follow it.
func (c *cluster) leader(among ...*member) *member {
	c.t.Helper()
	var lead *member
	eventually(c.t, 20*time.Second, func() error {
		lead = nil
		in := among
		if len(in) == 0 {
			in = c.up()
		}
		for _, m := range in {
			if m.Role().Leader {
				if lead != nil {
					return fmt.Errorf("%s and %s lead", lead.name, m.name)
				}
				lead = m
			}
		}
		if lead == nil {
			return errors.New("nobody leads")
		}
		for _, m := range in {
			if m.Role().LeaderID != lead.NodeID() {
				return fmt.Errorf("%s does not follow %s: %+v", m.name, lead.name, m.Role())
			}
		}
		return nil
	})
	return lead
}

// ready waits until every given node has entered.
func ready(t testing.TB, all ...*member) {
	t.Helper()
	for _, m := range all {
		select {
		case <-m.Ready():
		case err := <-m.fatal:
			t.Fatalf("%s: %v", m.name, err)
		case <-time.After(20 * time.Second):
			t.Fatalf("%s has not entered: %+v", m.name, m.Role())
		}
	}
}

func others(all []*member, not *member) []*member {
	var out []*member
	for _, m := range all {
		if m != not {
			out = append(out, m)
		}
	}
	return out
}

// write proposes something harmless through the node.
func (m *member) write(ctx context.Context, key string) (*commandv1.Result, error) {
	return m.Propose(ctx, &commandv1.Command{Body: &commandv1.Command_PutPolicy{PutPolicy: &commandv1.PutPolicy{
		Policy: &commandv1.Policy{Name: key, Text: `path "*" { capabilities = ["read"] }`},
	}}})
}

func (m *member) mustWrite(key string) *commandv1.Result {
	m.c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	res, err := m.write(ctx, key)
	if err != nil {
		m.c.t.Fatalf("write through %s: %v", m.name, err)
	}
	return res
}

func timeout(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// hangingLog is a log store whose writes can be made to wait.
type hangingLog struct {
	raft.LogStore
	mu   sync.Mutex
	gate chan struct{}
}

func (h *hangingLog) hang() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.gate = make(chan struct{})
}

func (h *hangingLog) answer() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.gate != nil {
		close(h.gate)
		h.gate = nil
	}
}

func (h *hangingLog) StoreLogs(logs []*raft.Log) error {
	h.mu.Lock()
	gate := h.gate
	h.mu.Unlock()
	if gate != nil {
		<-gate
	}
	return h.LogStore.StoreLogs(logs)
}

// apply applies a command to a bare state machine.
func apply(t testing.TB, f *fsm.FSM, index uint64, cmd *commandv1.Command) {
	t.Helper()
	data, err := proto.Marshal(cmd)
	if err != nil {
		t.Fatal(err)
	}
	res, ok := f.Apply(&raft.Log{Index: index, Term: 1, Type: raft.LogCommand, Data: data}).(*commandv1.Result)
	if !ok {
		t.Fatal("no result")
	}
	if err := fsm.Err(res); err != nil {
		t.Fatal(err)
	}
}
