package router

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"rollcall/fsm"
	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
	peerv1 "rollcall/proto/peer/v1"
)

// cluster is a log that every node's real state machine applies, without consensus: tests say who leads.
type cluster struct {
	t  testing.TB
	mu sync.Mutex
	// index and term are the log's; leader is "" during an election.
	index, term uint64
	leader      string
	nodes       []*testNode
	roles       chan struct{}
	// refuse, when set, may refuse a proposal before it is entered; after runs once it is applied on the leader.
	refuse func(*commandv1.Command) error
	logs   []*raft.Log
}

// testNode is one node: a real state machine and a real router, reached by gRPC over memory.
type testNode struct {
	c      *cluster
	id     string
	fsm    *fsm.FSM
	router *Router
	lis    *bufconn.Listener
	server *grpc.Server
	conn   *grpc.ClientConn
	// behind makes the node not apply what is entered, until caught up.
	behind  bool
	applied int
	fenced  atomic.Bool
	// cut makes the leader unreachable from here.
	cut atomic.Bool
}

func newCluster(t testing.TB, n int, change func(*Config)) *cluster {
	t.Helper()
	c := &cluster{t: t, term: 1, roles: make(chan struct{})}
	for i := range n {
		nd := &testNode{c: c, id: fmt.Sprintf("n%d", i+1), fsm: fsm.New(), lis: bufconn.Listen(1 << 20)}
		cfg := Config{
			NodeID: nd.id, NodeName: nd.id, State: StateOf(nd.fsm.View, nd.fsm.Changed), Replica: nd, Peers: nd,
			Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
			GateWait: 5 * time.Second, ForwardWait: 5 * time.Second,
		}
		if testing.Verbose() {
			cfg.Logger = slog.New(slog.NewTextHandler(t.Output(), nil)).With("on", nd.id)
		}
		if change != nil {
			change(&cfg)
		}
		r, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		nd.router = r
		nd.fsm.Observe(r)
		nd.server = grpc.NewServer(grpc.StreamInterceptor(fault.StreamServer))
		peerv1.RegisterForwardServer(nd.server, r.ForwardServer())
		done := make(chan struct{})
		go func() { defer close(done); _ = nd.server.Serve(nd.lis) }()
		nd.conn, err = grpc.NewClient("passthrough:///"+nd.id, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return nd.lis.DialContext(ctx) }))
		if err != nil {
			t.Fatal(err)
		}
		c.nodes = append(c.nodes, nd)
		t.Cleanup(func() {
			_ = nd.conn.Close()
			nd.server.Stop()
			<-done
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			if err := nd.router.Close(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	c.leader = "n1"
	c.must(&commandv1.Command{Body: &commandv1.Command_InitCluster{InitCluster: &commandv1.InitCluster{
		ClusterId: "c", ClusterName: "test",
	}}})
	for _, nd := range c.nodes {
		c.must(&commandv1.Command{Body: &commandv1.Command_Hello{Hello: &commandv1.Hello{
			NodeId: nd.id, Name: nd.id, Incarnation: 1,
		}}})
	}
	return c
}

// enter applies a command everywhere but on nodes that are behind.
func (c *cluster) enter(cmd *commandv1.Command) (*commandv1.Result, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	data, err := proto.Marshal(cmd)
	if err != nil {
		return nil, err
	}
	c.index++
	c.logs = append(c.logs, &raft.Log{Index: c.index, Term: c.term, Type: raft.LogCommand, Data: data})
	var res *commandv1.Result
	for _, nd := range c.nodes {
		if nd.behind {
			continue
		}
		if r := nd.catchUp(); nd.id == c.leader || res == nil {
			res = r
		}
	}
	return res, fsm.Err(res)
}

// catchUp applies what the node has not; called with c.mu held.
func (n *testNode) catchUp() (last *commandv1.Result) {
	for ; n.applied < len(n.c.logs); n.applied++ {
		last = n.fsm.Apply(n.c.logs[n.applied]).(*commandv1.Result)
	}
	return last
}

func (n *testNode) setBehind(b bool) {
	n.c.mu.Lock()
	defer n.c.mu.Unlock()
	n.behind = b
	if !b {
		n.catchUp()
	}
}

func (c *cluster) must(cmd *commandv1.Command) *commandv1.Result {
	c.t.Helper()
	res, err := c.enter(cmd)
	if err != nil {
		c.t.Fatalf("%T: %v", cmd.GetBody(), err)
	}
	return res
}

// elect makes a node lead a new term; "" for none.
func (c *cluster) elect(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.leader = id
	c.term++
	close(c.roles)
	c.roles = make(chan struct{})
}

func (n *testNode) Role() Role {
	n.c.mu.Lock()
	defer n.c.mu.Unlock()
	if n.c.leader == n.id {
		return Role{Leader: true, Term: n.c.term}
	}
	return Role{}
}

func (n *testNode) RoleChanged() <-chan struct{} {
	n.c.mu.Lock()
	defer n.c.mu.Unlock()
	return n.c.roles
}

func (n *testNode) Serving() error {
	if n.fenced.Load() {
		return fault.Text(fault.Fenced, "no serving lease")
	}
	return nil
}

func (n *testNode) ProposeAsLeader(ctx context.Context, term uint64, cmd *commandv1.Command) (*commandv1.Result, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if role := n.Role(); !role.Leader || role.Term != term {
		return nil, fault.Text(fault.NotLeader, "%s does not lead term %d", n.id, term)
	}
	n.c.mu.Lock()
	refuse := n.c.refuse
	n.c.mu.Unlock()
	if refuse != nil {
		if err := refuse(cmd); err != nil {
			return nil, err
		}
	}
	return n.c.enter(cmd)
}

func (n *testNode) Leader(context.Context) (grpc.ClientConnInterface, string, error) {
	n.c.mu.Lock()
	defer n.c.mu.Unlock()
	for _, o := range n.c.nodes {
		if o.id == n.c.leader && o != n && !n.cut.Load() {
			return o.conn, o.id, nil
		}
	}
	return nil, "", fault.Text(fault.Unavailable, "no leader is known")
}

// mount enters a plugin and a mount of it.
func (c *cluster) mount(path string, config *commandv1.MountConfig) *commandv1.Mount {
	c.t.Helper()
	c.register("v1.0.0")
	table, rest := "secret", path
	if r, ok := strings.CutPrefix(path, "auth/"); ok {
		table, rest = "auth", r
		c.must(&commandv1.Command{Body: &commandv1.Command_RegisterPlugin{RegisterPlugin: &commandv1.RegisterPlugin{
			Spec: &commandv1.Spec{Type: "auth", Name: "fake", Version: "v1.0.0", Command: "fake", Sha256: strings.Repeat("ab", 32)},
		}}})
	}
	c.must(&commandv1.Command{Body: &commandv1.Command_EnableMount{EnableMount: &commandv1.EnableMount{
		Uuid: "uuid-" + path, Accessor: "acc-" + path, Table: table, Path: rest, Type: "fake", PluginType: table,
		PluginVersion: "v1.0.0", Config: config, Options: map[string]string{"o": "1"},
	}}})
	return c.get("uuid-" + path)
}

func (c *cluster) register(version string) {
	c.t.Helper()
	c.must(&commandv1.Command{Body: &commandv1.Command_RegisterPlugin{RegisterPlugin: &commandv1.RegisterPlugin{
		Spec: &commandv1.Spec{Type: "secret", Name: "fake", Version: version, Command: "fake", Sha256: strings.Repeat("ab", 32)},
	}}})
}

// get answers a mount as the leader's state has it.
func (c *cluster) get(uuid string) *commandv1.Mount { return c.nodes[0].fsm.View().Mount(uuid) }

// commit reloads a mount on every node, up to the commit: its wanted generation is higher afterwards.
func (c *cluster) commit(m *commandv1.Mount) *commandv1.Mount {
	c.t.Helper()
	id := fmt.Sprintf("reload-%d", c.nodes[0].fsm.Index())
	c.must(&commandv1.Command{Body: &commandv1.Command_StartReload{StartReload: &commandv1.StartReload{
		Id: id, Selector: &commandv1.Selector{Mounts: []string{m.GetPath()}}, Scope: commandv1.Scope_SCOPE_GLOBAL, ServingNode: "n1",
	}}})
	c.report(id, m, commandv1.MountReport_STAGE_PREPARED)
	now := c.get(m.GetUuid())
	if now.GetWanted().GetGeneration() <= m.GetWanted().GetGeneration() {
		c.t.Fatalf("the reload did not commit: %v", c.nodes[0].fsm.View().Reload(id))
	}
	return now
}

func (c *cluster) report(id string, m *commandv1.Mount, stage commandv1.MountReport_Stage) {
	c.t.Helper()
	var reports []*commandv1.Report
	for _, nd := range c.nodes {
		reports = append(reports, &commandv1.Report{ReloadId: id, NodeId: nd.id, Incarnation: 1, Mounts: []*commandv1.MountReport{
			{MountUuid: m.GetUuid(), Stage: stage},
		}})
	}
	c.must(&commandv1.Command{Body: &commandv1.Command_ReportBatch{ReportBatch: &commandv1.ReportBatch{Reports: reports}}})
}

// finish ends the running reload of a mount.
func (c *cluster) finish(m *commandv1.Mount) {
	c.t.Helper()
	if rl := c.nodes[0].fsm.View().ActiveReload(m.GetUuid()); rl != nil {
		c.report(rl.GetId(), m, commandv1.MountReport_STAGE_SWITCHED)
	}
	if rl := c.nodes[0].fsm.View().ActiveReload(m.GetUuid()); rl != nil {
		c.t.Fatalf("the reload did not end: %v", rl)
	}
}

// up switches a backend in on a node, and comes back after a hold that was too short, as the reconciler does.
func (n *testNode) up(t testing.TB, m *commandv1.Mount, b Backend) *Switched {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	role := n.Role()
	for {
		s, err := n.router.Switch(ctx, m, SwitchPlan{Wanted: m.GetWanted(), Backend: b, Role: role, AwaitTakeOver: !role.Leader})
		if fault.Is(err, fault.Deadline) && ctx.Err() == nil {
			continue
		}
		if err != nil {
			t.Fatalf("switch on %s: %v", n.id, err)
		}
		return s
	}
}

// do runs a request on a node.
func (n *testNode) do(op, path, data string) (*Response, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return n.router.Handle(ctx, &Request{ID: "r", Path: path, Operation: op, Data: []byte(data)})
}

// eventually waits for an observation.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); {
		if time.Now().After(end) {
			t.Fatalf("not within 10 s: %s", what)
		}
		time.Sleep(100 * time.Microsecond)
	}
}

func wantKind(t testing.TB, err error, kind fault.Kind) {
	t.Helper()
	if err == nil || fault.KindOf(err) != kind {
		t.Fatalf("error is %v (%v), want kind %v", err, fault.KindOf(err), kind)
	}
}
