package reload

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"rollcall/fsm"
	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
	peerv1 "rollcall/proto/peer/v1"
)

// sim is a cluster in one bubble of virtual time: one log, one real state machine a node, fake processes and routes.
type sim struct {
	t *testing.T

	mu     sync.Mutex
	log    [][]byte
	stamp  time.Time
	term   uint64
	leader *simNode
	nodes  []*simNode
	pids   int
	bad    []string
	// done holds, for each mount, the highest generation of a reload that is done.
	done map[string]uint64

	// before sees each command at the leader, before it is appended; an error keeps it out. after sees it applied.
	before func(c *commandv1.Command) error
	after  func(c *commandv1.Command)
	// wire sees each peer call; drop loses the request, lose the reply, twice delivers it twice.
	wire func(to *simNode, method string) (drop, lose, twice bool)
	// lossy: processes are killed, so requests may be lost with them.
	lossy bool
	// nudges counts, batches counts ReportBatch entries.
	nudges, batches int
	// served counts the requests that were answered.
	served int
}

type simNode struct {
	sim         *sim
	id          string
	incarnation uint64
	fsm         *fsm.FSM
	applied     int
	// cut: neither entries nor calls come through. up: its Reloads runs.
	cut, up   bool
	leaseOver bool
	// slowly: its next boot replays the log entry by entry, with time between them.
	slowly bool
	// fenced: it was cut off, and has no lease until it has converged.
	fenced  bool
	roles   chan struct{}
	plugins *fakePlugins
	routes  *fakeRoutes
	reloads *Reloads
	endLead func()
}

func newSim(t *testing.T, nodes int) *sim {
	s := &sim{t: t, stamp: time.Now(), done: map[string]uint64{}}
	for i := range nodes {
		s.nodes = append(s.nodes, &simNode{sim: s, id: fmt.Sprintf("n%d", i+1), fsm: fsm.New(), roles: make(chan struct{})})
	}
	s.elect(s.nodes[0])
	s.must(&commandv1.Command{Body: &commandv1.Command_InitCluster{InitCluster: &commandv1.InitCluster{
		ClusterId: "c1", ClusterName: "test", RootTokenHash: make([]byte, 32), RootTokenAccessor: "a",
	}}})
	for _, n := range s.nodes {
		n.start()
	}
	return s
}

// stop ends every node and reports what was seen to be wrong.
func (s *sim) stop() {
	for _, n := range s.nodes {
		n.stop()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.nodes {
		if n.plugins == nil {
			continue
		}
		for key, live := range n.plugins.live {
			if len(live) != 0 {
				s.bad = append(s.bad, fmt.Sprintf("%s: %d processes of %s are left after the stop", n.id, len(live), key))
			}
		}
	}
	for _, b := range s.bad {
		s.t.Error(b)
	}
}

func (s *sim) wrong(format string, args ...any) {
	s.bad = append(s.bad, fmt.Sprintf(format, args...))
}

// start boots a node: a new incarnation that says Hello and runs.
func (n *simNode) start() {
	n.sim.mu.Lock()
	n.incarnation++
	n.up, n.cut, n.leaseOver = true, false, false
	n.plugins = newFakePlugins(n, n.plugins)
	n.routes = newFakeRoutes(n)
	if !n.slowly {
		n.sim.catchUp(n)
	}
	n.sim.mu.Unlock()
	logger := slog.New(slog.DiscardHandler)
	if os.Getenv("SIM_LOG") != "" {
		logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})).With("at", n.id)
	}
	r, err := New(Config{
		State: StateOf(n.fsm.View, n.fsm.Changed), Plugins: n.plugins, Routes: n.routes, Replica: simReplica{n},
		Peers: simPeers{n}, Logger: logger, Metrics: prometheus.NewRegistry(),
	})
	if err != nil {
		n.sim.t.Fatal(err)
	}
	n.sim.mu.Lock()
	n.reloads = r
	n.sim.mu.Unlock()
	if err := r.Start(context.Background()); err != nil {
		n.sim.t.Fatal(err)
	}
	for n.slowly {
		time.Sleep(100 * time.Millisecond)
		n.sim.set(func() { n.slowly = n.applyOne() })
	}
	n.sim.must(&commandv1.Command{Body: &commandv1.Command_Hello{Hello: &commandv1.Hello{
		NodeId: n.id, Incarnation: n.incarnation, Name: "name-" + n.id, ApiAddress: n.id + ":8200",
		ClusterAddress: n.id + ":8201", BuildVersion: "v1", OsArch: "linux/amd64",
	}}})
	if n.sim.leader == n {
		n.lead()
	}
}

// stop ends a node's processes and goroutines, as a kill does for the cluster: it says nothing.
func (n *simNode) stop() {
	n.sim.mu.Lock()
	if !n.up {
		n.sim.mu.Unlock()
		return
	}
	n.up = false
	end := n.endLead
	n.endLead = nil
	n.sim.mu.Unlock()
	if end != nil {
		end()
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := n.reloads.Stop(ctx); err != nil {
		n.sim.t.Errorf("stop %s: %v", n.id, err)
	}
}

// lead runs the leader's half until endLead.
func (n *simNode) lead() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	n.sim.mu.Lock()
	term, r := n.sim.term, n.reloads
	n.endLead = func() { cancel(); <-done }
	n.sim.tellRoles()
	n.sim.mu.Unlock()
	go func() { defer close(done); r.Lead(ctx, term) }()
}

// tellRoles wakes whoever waits for a change of leadership. The caller holds mu.
func (s *sim) tellRoles() {
	for _, m := range s.nodes {
		close(m.roles)
		m.roles = make(chan struct{})
	}
}

// elect makes n the leader of a new term. nil leaves the cluster without one.
func (s *sim) elect(n *simNode) {
	s.mu.Lock()
	old := s.leader
	s.term++
	s.leader = n
	s.stamp = time.Now()
	var end func()
	if old != nil {
		end, old.endLead = old.endLead, nil
	}
	s.tellRoles()
	s.mu.Unlock()
	if end != nil {
		end()
	}
	if n != nil && n.up {
		n.lead()
	}
}

// propose appends at the leader and applies everywhere that is not cut.
func (s *sim) propose(c *commandv1.Command) (*commandv1.Result, error) {
	c = proto.CloneOf(c)
	s.mu.Lock()
	before := s.before
	s.mu.Unlock()
	if before != nil {
		if err := before(c); err != nil {
			return nil, err
		}
	}
	s.mu.Lock()
	if s.leader == nil {
		s.mu.Unlock()
		return nil, fault.New(fault.Unavailable, "propose", "", "no leader")
	}
	if c.ElapsedNs == 0 {
		c.ElapsedNs = uint64(time.Since(s.stamp))
	}
	s.stamp = time.Now()
	s.inspect(c)
	data, err := proto.Marshal(c)
	if err != nil {
		s.t.Fatal(err)
	}
	s.log = append(s.log, data)
	var res *commandv1.Result
	for _, n := range s.nodes {
		if r := s.catchUp(n); n == s.leader {
			res = r
		}
	}
	s.watchDone()
	after := s.after
	s.mu.Unlock()
	if after != nil {
		after(c)
	}
	return res, nil
}

// catchUp applies what a node has not applied; the answer is the last entry's. The caller holds mu.
func (s *sim) catchUp(n *simNode) (last *commandv1.Result) {
	if n.cut || !n.up && n != s.leader {
		return nil
	}
	for n.applied < len(s.log) {
		last = n.apply()
	}
	return last
}

func (n *simNode) apply() *commandv1.Result {
	n.applied++
	res, _ := n.fsm.Apply(&raft.Log{
		Index: uint64(n.applied), Term: n.sim.term, Type: raft.LogCommand, Data: n.sim.log[n.applied-1],
	}).(*commandv1.Result)
	return res
}

// applyOne applies one entry of history, and reports whether there is more.
func (n *simNode) applyOne() bool {
	if n.applied < len(n.sim.log) {
		n.apply()
	}
	return n.applied < len(n.sim.log)
}

// inspect checks what a node says against what is true at this moment: "switched" means that the old process is gone.
func (s *sim) inspect(c *commandv1.Command) {
	if c.GetReportBatch() != nil {
		s.batches++
	}
	for _, rep := range c.GetReportBatch().GetReports() {
		for _, m := range rep.GetMounts() {
			if m.GetStage() != commandv1.MountReport_STAGE_SWITCHED {
				continue
			}
			for _, n := range s.nodes {
				if n.id != rep.GetNodeId() || n.incarnation != rep.GetIncarnation() || m.GetFrom().GetPid() == m.GetTo().GetPid() {
					continue
				}
				if n.plugins.live[m.GetMountUuid()][int(m.GetFrom().GetPid())] {
					s.wrong("%s reported %s switched while process %d was still there", n.id, rep.GetReloadId(),
						m.GetFrom().GetPid())
				}
			}
		}
	}
}

// watchDone notes generations of reloads that are done.
func (s *sim) watchDone() {
	v := s.leader.fsm.View()
	for _, rl := range v.Reloads() {
		if rl.GetPhase() != commandv1.Phase_PHASE_DONE || rl.GetScope() != commandv1.Scope_SCOPE_GLOBAL ||
			rl.GetOptions().GetStrategy() == commandv1.Strategy_STRATEGY_BEST_EFFORT {
			continue
		}
		for _, t := range rl.GetTargets() {
			s.done[t.GetMountUuid()] = max(s.done[t.GetMountUuid()], rl.GetGeneration())
		}
	}
}

// hook sets before and after.
func (s *sim) hook(before func(*commandv1.Command) error, after func(*commandv1.Command)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.before, s.after = before, after
}

// entries is the length of the log, and how many of its entries are report batches.
func (s *sim) entries() (all, batches int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.log), s.batches
}

// set changes what the sim's mutex guards.
func (s *sim) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

func (s *sim) must(c *commandv1.Command) *commandv1.Result {
	s.t.Helper()
	res, err := s.propose(c)
	if err == nil {
		err = fsm.Err(res)
	}
	if err != nil {
		s.t.Fatalf("%T: %v", c.GetBody(), err)
	}
	return res
}

// view is the leader's state, or any running node's when there is no leader.
func (s *sim) view() *fsm.View {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.leader != nil {
		return s.leader.fsm.View()
	}
	return s.nodes[0].fsm.View()
}

// mayServe is the lease in short: none while cut off, and none afterwards before the node has converged.
func (n *simNode) mayServe() bool {
	n.sim.mu.Lock()
	cut, fenced, r := n.cut || !n.up, n.fenced, n.reloads
	n.sim.mu.Unlock()
	if cut {
		return false
	}
	if fenced && r.Converged() {
		n.sim.set(func() { n.fenced = n.cut })
		return !cut
	}
	return !fenced
}

// isolate cuts a node off, or lets it back. Its lease is over a while after the cut.
func (n *simNode) isolate(cut bool) {
	n.sim.set(func() {
		n.cut, n.leaseOver = cut, false
		n.fenced = n.fenced || cut
		n.sim.catchUp(n)
	})
}

func (s *sim) reload(id string) *commandv1.Reload { return s.view().Reload(id) }

// until waits in virtual time for ok.
func (s *sim) until(what string, limit time.Duration, ok func() bool) {
	s.t.Helper()
	for end := time.Now().Add(limit); ; time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
		if time.Now().After(end) {
			s.t.Fatalf("%s: not within %v; %s", what, limit, s.describe())
		}
	}
}

func (s *sim) describe() string {
	out := ""
	v := s.view()
	for _, rl := range v.Reloads() {
		out += fmt.Sprintf("\n%s %v wave %d paused %v outcome %q why %q", rl.GetId(), rl.GetPhase(), rl.GetWave(),
			rl.GetPaused(), rl.GetOutcome(), rl.GetWhy())
		for _, p := range rl.GetParticipants() {
			out += fmt.Sprintf("\n  %s inc %d wave %d %v", p.GetNodeId(), p.GetIncarnation(), p.GetWave(), p.GetSafe())
			for _, o := range p.GetMounts() {
				out += fmt.Sprintf(" [%v prepared %v report %v %s %s]", o.GetVerdict(), o.GetPrepared(),
					o.GetReport().GetStage(), o.GetReport().GetFailedPhase(), o.GetReport().GetCause())
			}
		}
	}
	for _, n := range s.nodes {
		if n.up {
			for _, st := range n.reloads.Running() {
				out += fmt.Sprintf("\n%s: %+v", n.id, st)
			}
		}
	}
	return out
}

// simReplica is one node's Replica.
type simReplica struct{ n *simNode }

func (r simReplica) NodeID() string      { return r.n.id }
func (r simReplica) Incarnation() uint64 { return r.n.incarnation }

func (r simReplica) Leadership() Leadership {
	s := r.n.sim
	s.mu.Lock()
	defer s.mu.Unlock()
	ls := Leadership{Term: s.term}
	if s.leader != nil {
		ls.LeaderID = s.leader.id
		ls.Leader = s.leader == r.n && r.n.endLead != nil
	}
	return ls
}

func (r simReplica) LeadershipChanged() <-chan struct{} {
	r.n.sim.mu.Lock()
	defer r.n.sim.mu.Unlock()
	return r.n.roles
}

func (r simReplica) ProposeAsLeader(ctx context.Context, term uint64, c *commandv1.Command) (*commandv1.Result, error) {
	s := r.n.sim
	s.mu.Lock()
	leads := s.leader == r.n && s.term == term && r.n.up && !r.n.cut
	s.mu.Unlock()
	if !leads || ctx.Err() != nil {
		return nil, fault.New(fault.NotLeader, "propose", r.n.id, "not the leader of term %d", term)
	}
	return s.propose(c)
}

func (r simReplica) LeaseOver(nodeID string, incarnation uint64) bool {
	s := r.n.sim
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.nodes {
		if n.id == nodeID {
			return n.leaseOver || n.incarnation > incarnation
		}
	}
	return false
}

func (r simReplica) BeginFence(string) func() { return func() {} }

func (r simReplica) Nudge() {
	r.n.sim.mu.Lock()
	defer r.n.sim.mu.Unlock()
	r.n.sim.nudges++
}

func (r simReplica) Voters() []string {
	var ids []string
	for _, n := range r.n.sim.nodes {
		ids = append(ids, n.id)
	}
	return ids
}

// simPeers calls the other node's server directly, through the wire hook.
type simPeers struct{ n *simNode }

func (p simPeers) Dial(_ context.Context, node *commandv1.Node) (grpc.ClientConnInterface, error) {
	for _, n := range p.n.sim.nodes {
		if n.id == node.GetId() {
			return simConn{p.n, n}, nil
		}
	}
	return nil, errors.New("no such node")
}

type simConn struct{ from, to *simNode }

var errWire = status.Error(codes.Unavailable, "the connection broke")

func (c simConn) Invoke(ctx context.Context, method string, args, reply any, _ ...grpc.CallOption) error {
	c.to.sim.mu.Lock()
	reachable, r, hook := c.from.up && !c.from.cut && c.to.up && !c.to.cut, c.to.reloads, c.to.sim.wire
	c.to.sim.mu.Unlock()
	if !reachable || ctx.Err() != nil {
		return errWire
	}
	var drop, lose, twice bool
	if hook != nil {
		drop, lose, twice = hook(c.to, method)
	}
	if drop {
		return errWire
	}
	for range 1 + map[bool]int{true: 1}[twice] {
		var res proto.Message
		var err error
		switch req := args.(type) {
		case *peerv1.ReportRequest:
			res, err = r.Server().Report(ctx, proto.CloneOf(req))
		case *peerv1.TrafficRequest:
			res, err = r.Server().Traffic(ctx, req)
		case *peerv1.PlanRequest:
			res, err = r.Server().Plan(ctx, req)
		default:
			err = status.Error(codes.Unimplemented, method)
		}
		if err != nil {
			return err
		}
		proto.Reset(reply.(proto.Message))
		proto.Merge(reply.(proto.Message), res)
	}
	if lose {
		return errWire
	}
	return nil
}

func (c simConn) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	return nil, errWire
}
