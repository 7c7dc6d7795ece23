package node

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"sync"
	"time"

	"google.golang.org/grpc"

	"rollcall/node/api"
	"rollcall/node/fault"
	"rollcall/node/httpd"
	"rollcall/node/lease"
	"rollcall/node/policy"
	"rollcall/node/router"
	commandv1 "rollcall/proto/command/v1"
	peerv1 "rollcall/proto/peer/v1"
	pluginpb "rollcall/proto/plugin"
)

// openLeases makes what looks after leases and tokens. It comes before the router, which hands it every secret.
func (n *Node) openLeases() error {
	var err error
	n.leases, err = lease.New(lease.Config{
		NodeName: n.cfg.Name,
		State:    n.state, Replica: leaseReplica{n}, Plugins: leasePlugins{n}, TTLs: httpd.TTLs,
		Logger: n.component("lease"), Registerer: n.reg,
	})
	return err
}

// leaseReplica lends the replica to node/lease. It looks it up at each call: the keeper is made first.
type leaseReplica struct{ n *Node }

func (r leaseReplica) Propose(ctx context.Context, c *commandv1.Command) (*commandv1.Result, error) {
	return r.n.replica.Propose(ctx, c)
}

func (r leaseReplica) ProposeAsLeader(ctx context.Context, term uint64, c *commandv1.Command) (*commandv1.Result, error) {
	return r.n.replica.ProposeAsLeader(ctx, term, c)
}

// leasePlugins lends the router to node/lease.
type leasePlugins struct{ n *Node }

func (p leasePlugins) Call(ctx context.Context, m *commandv1.Mount, op, path string, data json.RawMessage, secret *pluginpb.Secret) (*pluginpb.Response, error) {
	full := m.GetPath() + path
	if m.GetTable() == "auth" {
		full = "auth/" + full
	}
	resp, err := p.n.router.Handle(ctx, &router.Request{
		ID: secret.GetLeaseId(), Namespace: m.GetNamespace(), Path: full, Operation: op, Data: data, Secret: secret,
	})
	if err != nil || resp == nil {
		return nil, err
	}
	return resp.Plugin, nil
}

// grants lends the keeper of leases to node/router.
type grants struct{ *lease.Keeper }

func (g grants) Grant(ctx context.Context, m *commandv1.Mount, req *router.Request, resp *router.Response) error {
	path := req.Path
	if m.GetTable() == "auth" {
		path = path[min(len("auth/"), len(path)):]
	}
	path = path[min(len(m.GetPath()), len(path)):]
	token, err := hex.DecodeString(req.ClientToken)
	if err != nil {
		return fault.As(fault.Internal, err, "read", "token hash")
	}
	return g.Keeper.Grant(ctx, m, path, token, resp.Plugin.GetSecret(), resp.Plugin.GetData())
}

// leases lends the keeper of leases to node/httpd.
type leases struct{ *lease.Keeper }

func (l leases) Renew(ctx context.Context, id string, increment time.Duration, by []byte) (*httpd.Renewed, error) {
	r, err := l.Keeper.Renew(ctx, id, increment, by)
	if err != nil {
		return nil, err
	}
	return (*httpd.Renewed)(r), nil
}

// admit is asked by the router at the moment that a request starts: a token that was revoked while the request waited, or
// was on its way here, starts nothing.
func (n *Node) admit(req *router.Request) error {
	if req.Unauthenticated || req.ClientToken == "" {
		return nil // open to everyone, or this cluster's own
	}
	hash, err := hex.DecodeString(req.ClientToken)
	if err != nil {
		return policy.ErrDenied
	}
	view := n.state.View()
	if t := view.TokenByHash(hash); t == nil || policy.Expired(t, view.ClockNS()) {
		return policy.ErrDenied
	}
	return nil
}

// settleTimeout bounds a wait for every node to know of a change: longer than a lease, after which a node that does not
// know of it answers nothing.
func (n *Node) settleTimeout() time.Duration { return n.cfg.Lease.TTL + 3*time.Second }

// Settle returns when every member has applied the index, or provably answers nothing before it has.
func (c *cluster) Settle(ctx context.Context, index uint64) error {
	ctx, cancel := context.WithTimeout(ctx, c.n.settleTimeout())
	defer cancel()
	for {
		changed := c.n.replica.RoleChanged()
		err := c.settleOnce(ctx, index)
		if err == nil || ctx.Err() != nil {
			return err
		}
		select { // an election: its winner answers
		case <-changed:
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}

func (c *cluster) settleOnce(ctx context.Context, index uint64) error {
	role := c.n.replica.Role()
	if role.Leader {
		return c.n.settleHere(ctx, index)
	}
	conn, err := c.n.leaderClient()
	if err != nil {
		return err
	}
	_, err = peerv1.NewAccessClient(conn).Settle(ctx, &peerv1.SettleRequest{Index: index})
	return fault.FromGRPC(err)
}

// leaderClient is a connection to the node that leads.
func (n *Node) leaderClient() (*grpc.ClientConn, error) {
	role := n.replica.Role()
	if role.LeaderAddress == "" || role.LeaderID == n.ID() {
		return nil, fault.New(fault.Unavailable, "reach", "the leader", "no other node is known to lead")
	}
	return n.transport.Client(role.LeaderAddress, n.state.View().Node(role.LeaderID).GetName())
}

// settleHere is the leader's part: it asks every member how far it is. One that does not say so is waited for until its
// serving lease is over; the next one is granted only once it has caught up.
func (n *Node) settleHere(ctx context.Context, index uint64) error {
	var wg sync.WaitGroup
	var mu sync.Mutex
	var errs []error
	for _, row := range n.state.View().Nodes() {
		if row.GetId() == n.ID() || row.GetLeft() {
			continue
		}
		wg.Go(func() {
			if err := n.settleNode(ctx, row, index); err != nil {
				mu.Lock()
				errs = append(errs, err)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (n *Node) settleNode(ctx context.Context, row *commandv1.Node, index uint64) error {
	for pause := 2 * time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		if f, err := n.factsOf(ctx, row); err == nil && f.GetAppliedIndex() >= index {
			return nil
		}
		if n.replica.LeaseOver(row.GetId(), row.GetIncarnation()) {
			return nil
		}
		if !n.replica.Role().Leader {
			return fault.Text(fault.NotLeader, "node %s does not lead any more", n.cfg.Name)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return fault.New(fault.Deadline, "wait for node", row.GetName(), "it has not applied entry %d, and may still hold a lease", index)
		}
	}
}

func (n *Node) factsOf(ctx context.Context, row *commandv1.Node) (*peerv1.FactsResponse, error) {
	conn, err := n.dialNode(row)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	return peerv1.NewReplicaClient(conn).Facts(ctx, &peerv1.FactsRequest{})
}

// accessServer answers other nodes' doors.
type accessServer struct {
	peerv1.UnimplementedAccessServer
	n *Node
}

// Settle is the leader's.
func (s accessServer) Settle(ctx context.Context, req *peerv1.SettleRequest) (*peerv1.SettleResponse, error) {
	if !s.n.replica.Role().Leader {
		return nil, fault.Text(fault.NotLeader, "node %s does not lead", s.n.cfg.Name)
	}
	if err := s.n.settleHere(ctx, req.GetIndex()); err != nil {
		return nil, err
	}
	return &peerv1.SettleResponse{}, nil
}

// Restore is the leader's.
func (s accessServer) Restore(stream grpc.ClientStreamingServer[peerv1.RestoreRequest, peerv1.RestoreResponse]) error {
	if !s.n.replica.Role().Leader {
		return fault.Text(fault.NotLeader, "node %s does not lead", s.n.cfg.Name)
	}
	first, err := stream.Recv()
	if err != nil {
		return fault.As(fault.Unavailable, err, "receive", "backup")
	}
	res, err := s.n.replica.RestoreBackup(stream.Context(), &chunks{stream: stream, rest: first.GetChunk()}, first.GetWhy())
	if err != nil {
		return err
	}
	return stream.SendAndClose(&peerv1.RestoreResponse{Index: res.GetIndex()})
}

// chunks reads a backup from its stream.
type chunks struct {
	stream grpc.ClientStreamingServer[peerv1.RestoreRequest, peerv1.RestoreResponse]
	rest   []byte
}

func (c *chunks) Read(p []byte) (int, error) {
	for len(c.rest) == 0 {
		m, err := c.stream.Recv()
		if err != nil {
			return 0, err
		}
		c.rest = m.GetChunk()
	}
	k := copy(p, c.rest)
	c.rest = c.rest[k:]
	return k, nil
}

// Backup writes the whole state, consistently.
func (c *cluster) Backup(ctx context.Context, w io.Writer) error { return c.n.replica.Backup(ctx, w) }

// Restore replaces the state of the cluster by a backup, on whichever node leads.
func (c *cluster) Restore(ctx context.Context, backup io.Reader, why string) (uint64, error) {
	if c.n.replica.Role().Leader {
		res, err := c.n.replica.RestoreBackup(ctx, backup, why)
		return res.GetIndex(), err
	}
	conn, err := c.n.leaderClient()
	if err != nil {
		return 0, err
	}
	stream, err := peerv1.NewAccessClient(conn).Restore(ctx)
	if err != nil {
		return 0, fault.FromGRPC(err)
	}
	buf := make([]byte, contentChunk)
	for first := true; ; first = false {
		k, rerr := io.ReadFull(backup, buf)
		if k > 0 || first {
			m := &peerv1.RestoreRequest{Chunk: buf[:k]}
			if first {
				m.Why = why
			}
			if err := stream.Send(m); err != nil {
				break // the status says why
			}
		}
		if rerr != nil {
			if !errors.Is(rerr, io.EOF) && !errors.Is(rerr, io.ErrUnexpectedEOF) {
				return 0, fault.As(fault.Internal, rerr, "read", "backup")
			}
			break
		}
	}
	resp, err := stream.CloseAndRecv()
	if err != nil {
		return 0, restoreAnswer(err)
	}
	return resp.GetIndex(), nil
}

// restoreAnswer is the error of a restore that was sent to the leader. What the leader says of it is so; when the connection
// ended instead, it may have restored, or may yet do so.
func restoreAnswer(err error) error {
	if said := fault.FromGRPC(err); fault.Said(said) {
		return said
	}
	return fault.New(fault.OutcomeUnknown, "restore backup", "through the leader", "no answer: %w", err)
}

// What autopilot judges by, as node/replica has it.
const (
	autopilotContact  = 10 * time.Second
	autopilotTrailing = 1000
)

// AutopilotConfig is what this node's configuration says.
func (c *cluster) AutopilotConfig() api.AutopilotConfig {
	a := c.n.cfg.Autopilot
	return api.AutopilotConfig{
		CleanupDeadServers: a.DeadServerCleanup, LastContactThreshold: autopilotContact.String(),
		DeadServerLastContactThreshold: a.DeadServerThreshold.String(), MaxTrailingLogs: autopilotTrailing, MinQuorum: 3,
		ServerStabilizationTime: a.Stabilization.String(),
	}
}

// Autopilot asks every server of the configuration how it is, so that each node tells the same.
func (c *cluster) Autopilot(ctx context.Context) (*api.AutopilotState, error) {
	view, members := c.n.state.View(), c.n.replica.Members()
	facts := make([]*peerv1.FactsResponse, len(members))
	var wg sync.WaitGroup
	for i, m := range members {
		wg.Go(func() {
			row := view.Node(m.ID)
			if row == nil {
				row = &commandv1.Node{ClusterAddress: m.Address, Name: m.Name}
			}
			if f, err := c.n.factsOf(ctx, row); err == nil && f.GetNodeId() == m.ID {
				facts[i] = f
			}
		})
	}
	wg.Wait()
	var last uint64
	for _, f := range facts {
		last = max(last, f.GetLastLogIndex())
	}
	st := &api.AutopilotState{Healthy: true, Voters: []string{}, Servers: map[string]api.AutopilotServer{}}
	voters, healthy := 0, 0
	for i, m := range members {
		s := autopilotServer(m.ID, m.Name, m.Address, facts[i], last)
		s.Version, s.StableSince = APIVersion, time.UnixMilli(view.Node(m.ID).GetHelloWallMs()).UTC().Format(time.RFC3339)
		s.Status, s.NodeType = "non-voter", "non-voter"
		if m.Voter {
			s.Status, s.NodeType = "voter", "voter"
			st.Voters = append(st.Voters, m.ID)
			voters++
			if s.Healthy {
				healthy++
			}
		} else {
			st.NonVoters = append(st.NonVoters, m.ID)
		}
		if m.Leader {
			s.Status, st.Leader = "leader", m.ID
		}
		st.Healthy = st.Healthy && s.Healthy
		st.Servers[m.ID] = s
	}
	st.FailureTolerance = max(0, healthy-(voters/2+1))
	st.Healthy = st.Healthy && st.Leader != ""
	return st, nil
}

func autopilotServer(id, name, address string, f *peerv1.FactsResponse, last uint64) api.AutopilotServer {
	s := api.AutopilotServer{ID: id, Name: name, Address: address, NodeStatus: "failed", LastContact: "0s"}
	if f == nil {
		return s
	}
	contact := time.Duration(f.GetLastContactNs())
	s.NodeStatus, s.LastTerm, s.LastIndex = "alive", f.GetLastLogTerm(), f.GetLastLogIndex()
	s.LastContact = max(contact, 0).String()
	s.Healthy = contact >= 0 && contact <= autopilotContact && s.LastIndex+autopilotTrailing >= last
	return s
}
