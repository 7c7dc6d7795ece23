package node

import (
	"context"
	"crypto/tls"
	"os"
	"sync"
	"time"

	"google.golang.org/grpc"

	"rollcall/node/fault"
	"rollcall/node/gossip"
	"rollcall/node/httpd"
	"rollcall/node/reload"
	"rollcall/node/replica"
	"rollcall/node/router"
	commandv1 "rollcall/proto/command/v1"
)

// The rooms of floor 3 do not know each other. Each type here lends one room's surface to another in the words that
// the other one declared.

// routes lends the router to node/reload.
type routes struct{ *router.Router }

func (r routes) Trial(ctx context.Context, m *commandv1.Mount, s *commandv1.Spec, b reload.Backend, depth string) ([]*commandv1.Step, error) {
	return r.Router.Trial(ctx, m, s, backendOf(b), depth)
}

// backendOf takes a backend back into the router's words: every one that node/reload hands on came from a process.
func backendOf(b reload.Backend) router.Backend {
	rb, ok := b.(router.Backend)
	if !ok {
		panic("node: a backend that no supervisor made") // a defect of the wiring
	}
	return rb
}

func (r routes) Switch(ctx context.Context, m *commandv1.Mount, p reload.SwitchPlan) (*reload.Switched, error) {
	sw, err := r.Router.Switch(ctx, m, router.SwitchPlan{
		Wanted: p.Wanted, Backend: backendOf(p.Backend), Role: router.Role(p.Role),
		Hold: p.Hold, Force: p.Force, KeepOld: p.KeepOld, AwaitTakeOver: p.AwaitTakeOver,
	})
	if sw == nil {
		return nil, err
	}
	return &reload.Switched{HoldFor: sw.HoldFor, Steps: sw.Steps, Traffic: sw.Traffic}, err
}

func (r routes) Assume(ctx context.Context, mountUUID string, role reload.Role) error {
	return r.Router.Assume(ctx, mountUUID, router.Role(role))
}

func (r routes) Drop(ctx context.Context, mountUUID string) error {
	_, err := r.Router.Drop(ctx, mountUUID)
	return err
}

// reloadReplica lends the replica to node/reload.
type reloadReplica struct{ *replica.Replica }

func (r reloadReplica) Leadership() reload.Leadership {
	role := r.Role()
	return reload.Leadership{Leader: role.Leader, Term: role.Term, LeaderID: role.LeaderID}
}

func (r reloadReplica) LeadershipChanged() <-chan struct{} { return r.RoleChanged() }

func (r reloadReplica) Voters() []string {
	var ids []string
	for _, m := range r.Members() {
		if m.Voter {
			ids = append(ids, m.ID)
		}
	}
	return ids
}

// routerReplica lends the replica to node/router. It looks the replica up at each call: the router is made first.
type routerReplica struct{ n *Node }

func (r routerReplica) Role() router.Role {
	if r.n.replica == nil {
		return router.Role{}
	}
	role := r.n.replica.Role()
	return router.Role{Leader: role.Leader, Term: role.Term}
}

func (r routerReplica) RoleChanged() <-chan struct{} { return r.n.replica.RoleChanged() }
func (r routerReplica) Serving() error               { return r.n.replica.Serving() }

func (r routerReplica) ProposeAsLeader(ctx context.Context, term uint64, c *commandv1.Command) (*commandv1.Result, error) {
	return r.n.replica.ProposeAsLeader(ctx, term, c)
}

// leaderConn reaches the leader for node/router.
type leaderConn struct{ n *Node }

func (l leaderConn) Leader(context.Context) (grpc.ClientConnInterface, string, error) {
	role := l.n.replica.Role()
	if role.LeaderID == "" || role.LeaderID == l.n.replica.NodeID() {
		return nil, role.LeaderID, fault.New(fault.Unavailable, "reach", "the leader", "no other node is known to lead")
	}
	name := ""
	if row := l.n.state.View().Node(role.LeaderID); row != nil {
		name = row.GetName()
	}
	conn, err := l.n.transport.BulkClient(role.LeaderAddress, name)
	if err != nil {
		return nil, role.LeaderID, fault.As(fault.Unavailable, err, "reach", "the leader")
	}
	return conn, role.LeaderID, nil
}

// peers reaches members for node/reload.
type peers struct{ n *Node }

func (p peers) Dial(_ context.Context, row *commandv1.Node) (grpc.ClientConnInterface, error) {
	return p.n.dialNode(row)
}

// restoredOnly tells node/reload of snapshots and keeps storage changes from it: those are the router's.
type restoredOnly struct{ *reload.Reloads }

func (restoredOnly) StorageChanged(string, []string, uint64) {}

// gossipPeers lends gossip to the replica.
type gossipPeers struct{ *gossip.Gossip }

func (g gossipPeers) Peers() []replica.Peer {
	var out []replica.Peer
	for _, p := range g.Gossip.Peers() {
		out = append(out, replica.Peer{NodeID: p.NodeID, Name: p.Name, Address: p.Address, Status: peerStatus[p.Status]})
	}
	return out
}

var peerStatus = map[gossip.Status]replica.PeerStatus{
	gossip.Alive: replica.PeerAlive, gossip.Dead: replica.PeerDead, gossip.Left: replica.PeerLeft,
}

// fileCertificate is a key pair that is read again when its certificate file changes.
type fileCertificate struct {
	cert, key string
	mu        sync.Mutex
	read      time.Time
	pair      *tls.Certificate
}

func (f *fileCertificate) get() (*tls.Certificate, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	info, err := os.Stat(f.cert)
	if err == nil && f.pair != nil && info.ModTime().Equal(f.read) {
		return f.pair, nil
	}
	pair, lerr := tls.LoadX509KeyPair(f.cert, f.key)
	if lerr != nil {
		if f.pair != nil {
			return f.pair, nil // a half-written file: the old one is better than none, and the next call looks again
		}
		return nil, fault.As(fault.Invalid, lerr, "load", f.cert)
	}
	f.pair = &pair
	if err == nil {
		f.read = info.ModTime()
	}
	return f.pair, nil
}

// pluginRoutes lends the router to node/httpd.
type pluginRoutes struct{ *router.Router }

func requestOf(q *httpd.PluginRequest) *router.Request {
	return &router.Request{
		ID: q.ID, Namespace: q.Namespace, Path: q.Path, Operation: q.Operation, Data: q.Data,
		Headers: q.Headers, RemoteAddr: q.RemoteAddr, ClientToken: q.ClientToken, TokenAccessor: q.TokenAccessor,
		DisplayName: q.DisplayName, EntityID: q.EntityID, Policies: q.Policies, TokenTTL: q.TokenTTL,
		TokenRemainingUses: q.TokenRemainingUses, Unauthenticated: q.Unauthenticated, NoForward: q.NoForward,
		Secret: q.Secret, Auth: q.Auth,
	}
}

func (p pluginRoutes) Handle(ctx context.Context, q *httpd.PluginRequest) (*httpd.PluginResponse, error) {
	resp, err := p.Router.Handle(ctx, requestOf(q))
	if resp == nil {
		return nil, err
	}
	return &httpd.PluginResponse{Plugin: resp.Plugin, Generation: resp.Generation, Node: resp.Node, Index: resp.Index, Mount: resp.Mount}, err
}

func (p pluginRoutes) Lookup(ctx context.Context, ns, path string) (httpd.Match, error) {
	m, err := p.Router.Lookup(ctx, ns, path)
	return httpd.Match(m), err
}

func (p pluginRoutes) Exists(ctx context.Context, q *httpd.PluginRequest) (found, hasCheck bool, err error) {
	return p.Router.Exists(ctx, requestOf(q))
}
