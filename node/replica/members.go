package replica

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/raft"
	autopilot "github.com/hashicorp/raft-autopilot"

	"rollcall/node/failpoint"
	"rollcall/node/fault"
	"rollcall/node/telemetry"
	commandv1 "rollcall/proto/command/v1"
	peerv1 "rollcall/proto/peer/v1"
)

// Member is one server of the Raft configuration, which alone is the truth about membership.
type Member struct {
	ID      string
	Name    string // from the node table; empty before its Hello
	Address string
	Voter   bool
	Leader  bool
	// LastContact is how long ago the member was heard: by the leader, or, asked elsewhere, the leader by this node.
	// Negative when it is not known here.
	LastContact time.Duration
	// State is what gossip believes ("alive", "suspect", "dead", "left"), "self", or "unknown".
	State string
	// Healthy is the leader's judgement (contact, term and log); false where it is not known.
	Healthy bool
}

// healthBox holds what the leader's autopilot last found.
type healthBox struct {
	mu    sync.Mutex
	state *autopilot.State
	heard map[raft.ServerID]time.Time
	// nonVoters are the servers that said they want to stay that.
	nonVoters map[raft.ServerID]bool
}

func (h *healthBox) wantsNoVote(id raft.ServerID) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.nonVoters[id]
}

// Members lists the configuration as this node knows it, in order of id.
func (r *Replica) Members() []Member {
	n := r.raft.Load()
	if n == nil {
		return nil
	}
	role, view := r.Role(), r.fsm.View()
	hints := map[string]PeerStatus{}
	for _, p := range r.cfg.Discovery.Peers() {
		hints[p.NodeID] = p.Status
	}
	r.health.mu.Lock()
	health := r.health.state
	r.health.mu.Unlock()
	var out []Member
	for _, s := range r.servers() {
		id := string(s.ID)
		m := Member{
			ID: id, Name: view.Node(id).GetName(), Address: string(s.Address), Voter: s.Suffrage == raft.Voter,
			Leader: id == role.LeaderID, LastContact: -1, State: "unknown",
		}
		if hint, ok := hints[id]; ok {
			m.State = hint.String()
		}
		if health != nil && health.Servers[s.ID] != nil {
			h := health.Servers[s.ID]
			m.Healthy, m.LastContact = h.Health.Healthy, h.Stats.LastContact
		} else if m.Leader && !n.LastContact().IsZero() {
			m.LastContact = time.Since(n.LastContact())
		}
		if id == r.NodeID() {
			m.State, m.LastContact = "self", 0
		}
		out = append(out, m)
	}
	return out
}

// TransferLeadership hands over to the most up-to-date voter, from any node. Errors: fault.Unavailable.
func (r *Replica) TransferLeadership(ctx context.Context) error {
	if _, leading := r.leads(); leading {
		return r.transferHere(ctx)
	}
	client, _, err := r.leader(ctx)
	if err != nil {
		return err
	}
	_, err = client.TransferLeadership(ctx, &peerv1.TransferLeadershipRequest{})
	return fault.Wrap(err, "transfer leadership", "")
}

func (r *Replica) transferHere(ctx context.Context) error {
	node, err := r.node()
	if err != nil {
		return err
	}
	voters := 0
	for _, s := range r.servers() {
		if s.Suffrage == raft.Voter {
			voters++
		}
	}
	if voters < 2 {
		return fault.New(fault.Unavailable, "transfer leadership", "", "there is no other voter")
	}
	return fault.As(fault.Unavailable, r.await(ctx, node.LeadershipTransfer()), "transfer leadership", "")
}

// Leave enters that this incarnation has stopped serving and will not return, after giving its serving lease up. The
// node stays a member; reloads do not wait for it until it says Hello again. Call it before Stop, and only where the
// node is meant to stay away.
func (r *Replica) Leave(ctx context.Context) error {
	r.dropLease()
	if err := failpoint.Hit(failpoint.NodeLeave, r.NodeID()); err != nil {
		return err
	}
	_, err := r.Propose(ctx, &commandv1.Command{Body: &commandv1.Command_Leave{
		Leave: &commandv1.Leave{NodeId: r.NodeID(), Incarnation: r.Incarnation()},
	}})
	return fault.Wrap(err, "leave", r.cfg.Name)
}

// RemoveMember takes a node out of the Raft configuration and of the node table, from any node. It first waits, at most
// one lease, until the node can no longer serve. A removed node is not let in again with its old data directory.
func (r *Replica) RemoveMember(ctx context.Context, nodeID string) error {
	if _, leading := r.leads(); leading {
		return r.removeHere(ctx, nodeID, "removed by an operator")
	}
	client, _, err := r.leader(ctx)
	if err != nil {
		return err
	}
	_, err = client.RemoveMember(ctx, &peerv1.RemoveMemberRequest{NodeId: nodeID, Why: "removed by an operator"})
	return fault.Wrap(err, "remove member", nodeID)
}

// change serialises membership changes of this node as leader; release with the returned function. Raft's own check, the index of
// the configuration that a change was made for, cannot be used: Raft v1.8.0 does not tell that index.
func (r *Replica) change(ctx context.Context) (func(), error) {
	select {
	case r.changing <- struct{}{}:
		return func() { <-r.changing }, nil
	case <-ctx.Done():
		return nil, fault.As(fault.Unavailable, ctx.Err(), "wait for another membership change", "")
	}
}

func (r *Replica) removeHere(ctx context.Context, nodeID, why string) error {
	release, err := r.change(ctx)
	if err != nil {
		return err
	}
	defer release()
	return r.removeLocked(ctx, nodeID, why)
}

// removeLocked fences the node, removes it from the configuration, then from the node table. Every step may be repeated.
func (r *Replica) removeLocked(ctx context.Context, nodeID, why string) error {
	l := r.led.Load()
	if l == nil {
		return fault.New(fault.NotLeader, "remove member", nodeID, "node %s does not lead", r.cfg.Name)
	}
	if nodeID == r.NodeID() {
		return fault.New(fault.Invalid, "remove member", nodeID, "it leads: transfer the leadership first")
	}
	endFence := r.BeginFence(nodeID)
	defer endFence()
	if n := r.fsm.View().Node(nodeID); n != nil && !n.GetLeft() {
		for !r.LeaseOver(nodeID, n.GetIncarnation()) {
			if pause(ctx, r.cfg.Lease/50); ctx.Err() != nil || r.led.Load() != l {
				return fault.New(fault.Unavailable, "remove member", nodeID, "its serving lease is not provably over yet; try again")
			}
		}
	}
	for _, s := range r.servers() {
		if string(s.ID) != nodeID {
			continue
		}
		if err := r.await(ctx, r.raft.Load().RemoveServer(s.ID, 0, r.cfg.rpcTimeout())); err != nil {
			return fault.As(fault.Unavailable, err, "remove member", nodeID)
		}
		r.log.Info("member removed", "node", nodeID, "why", why)
	}
	if r.fsm.View().Node(nodeID) == nil {
		return nil
	}
	_, err := r.ProposeAsLeader(ctx, l.term, &commandv1.Command{Body: &commandv1.Command_RemoveNode{
		RemoveNode: &commandv1.RemoveNode{NodeId: nodeID, Why: why},
	}})
	return fault.Wrap(err, "remove member", nodeID)
}

// letIn is the leader's side of Join. name is certified.
func (r *Replica) letIn(ctx context.Context, req *peerv1.JoinRequest, name string) (*peerv1.JoinResponse, error) {
	l, view := r.led.Load(), r.fsm.View()
	refuse := func(kind fault.Kind, format string, args ...any) error {
		return fault.New(kind, "let in", name, format, args...)
	}
	switch {
	case l == nil:
		return nil, refuse(fault.NotLeader, "node %s does not lead", r.cfg.Name)
	case !view.Initialized():
		return nil, refuse(fault.Unavailable, "the cluster has no first entry yet")
	case req.GetName() != name:
		return nil, refuse(fault.Denied, "its certificate does not name %q", req.GetName())
	case req.GetClusterId() != "" && req.GetClusterId() != view.ClusterID():
		return nil, refuse(fault.Conflict, "it belongs to cluster %s, this is %s; it must not join with that data directory",
			req.GetClusterId(), view.ClusterID())
	case uuid.Validate(req.GetNodeId()) != nil || req.GetClusterAddress() == "":
		return nil, refuse(fault.Invalid, "a node id (UUID) and an address are required")
	}
	release, err := r.change(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	if err := r.letInLocked(ctx, req, refuse); err != nil {
		return nil, err
	}
	return &peerv1.JoinResponse{ClusterId: view.ClusterID()}, nil
}

func (r *Replica) letInLocked(ctx context.Context, req *peerv1.JoinRequest, refuse func(fault.Kind, string, ...any) error) error {
	var mine, there *raft.Server
	for _, s := range r.servers() {
		if string(s.ID) == req.GetNodeId() {
			mine = &s
		} else if string(s.Address) == req.GetClusterAddress() {
			there = &s
		}
	}
	if mine == nil && req.GetClusterId() != "" {
		// The refusal is for good: the next leader must know of the removal too.
		if err := r.await(ctx, r.raft.Load().Barrier(r.cfg.rpcTimeout())); err != nil {
			return fault.As(fault.Unavailable, err, "let in", req.GetName())
		}
		return refuse(fault.Denied, "node %s was removed from this cluster; move its data directory away to join as a new node", req.GetNodeId())
	}
	if err := r.replaceDisk(ctx, req, refuse); err != nil {
		return err
	}
	if there != nil && r.stillThere(*there) {
		return refuse(fault.Conflict, "address %s belongs to node %s; that one must move or be removed first", there.Address, there.ID)
	}
	id, address := raft.ServerID(req.GetNodeId()), raft.ServerAddress(req.GetClusterAddress())
	if mine != nil && mine.Address == address {
		return nil
	}
	var f raft.IndexFuture
	if mine != nil && mine.Suffrage == raft.Voter {
		f = r.raft.Load().AddVoter(id, address, 0, r.cfg.rpcTimeout())
	} else {
		f = r.raft.Load().AddNonvoter(id, address, 0, r.cfg.rpcTimeout())
	}
	if err := r.await(ctx, f); err != nil {
		return fault.As(fault.Unavailable, err, "let in", req.GetName())
	}
	r.log.Info("member let in", "name", req.GetName(), "node", req.GetNodeId(), "address", address, "moved", mine != nil)
	return nil
}

// stillThere reports whether the server is in the configuration now.
func (r *Replica) stillThere(s raft.Server) bool {
	for _, now := range r.servers() {
		if now.ID == s.ID {
			return true
		}
	}
	return false
}

// replaceDisk removes the node that had the joiner's name with another id. The certificate proves that the joiner is
// that node; unless the old one still answers, its disk is gone.
func (r *Replica) replaceDisk(ctx context.Context, req *peerv1.JoinRequest, refuse func(fault.Kind, string, ...any) error) error {
	old := r.fsm.View().NodeByName(req.GetName())
	if old == nil || old.GetId() == req.GetNodeId() {
		return nil
	}
	asking, cancel := context.WithTimeout(ctx, r.cfg.rpcTimeout())
	f, err := r.factsOf(asking, old.GetClusterAddress(), old.GetName())
	cancel()
	if old.GetId() == r.NodeID() || err == nil && f.GetNodeId() == old.GetId() {
		return refuse(fault.Conflict, "the name belongs to node %s, which is alive at %s; choose another name", old.GetId(), old.GetClusterAddress())
	}
	r.log.Warn("replaced disk: removing the node that had this name", "name", req.GetName(), "old", old.GetId(), "new", req.GetNodeId())
	return r.removeLocked(ctx, old.GetId(), "replaced by node "+req.GetNodeId()+" of the same name")
}

// moveSelf enters the leader's own new address.
func (r *Replica) moveSelf() error {
	ctx, cancel := context.WithTimeout(r.ctx, r.cfg.LeaderWait)
	defer cancel()
	release, err := r.change(ctx)
	if err != nil {
		return err
	}
	defer release()
	f := r.raft.Load().AddVoter(raft.ServerID(r.NodeID()), raft.ServerAddress(r.cfg.ClusterAddress), 0, r.cfg.rpcTimeout())
	return fault.As(fault.Unavailable, r.await(ctx, f), "enter own address", r.cfg.ClusterAddress)
}

// leadMembers is the leader's standing work on membership: the first entry of a new cluster, and autopilot.
func (r *Replica) leadMembers(ctx context.Context, term uint64) {
	if !r.initCluster(ctx, term) {
		return
	}
	r.health.mu.Lock()
	r.health.heard, r.health.nonVoters = map[raft.ServerID]time.Time{}, map[raft.ServerID]bool{}
	r.health.mu.Unlock()
	every := max(2*r.cfg.heartbeat(), 100*time.Millisecond)
	pilot := autopilot.New(r.raft.Load(), &pilotApp{r: r, ctx: ctx, since: time.Now()},
		autopilot.WithLogger(telemetry.HCLog(r.log)),
		autopilot.WithPromoter(&promoter{voters: r.cfg.Voters, after: r.cfg.PromoteAfter, reader: r.health.wantsNoVote}),
		autopilot.WithUpdateInterval(every), autopilot.WithReconcileInterval(every))
	pilot.Start(ctx)
	<-ctx.Done()
	<-pilot.Stop()
	r.health.mu.Lock()
	r.health.state = nil
	r.health.mu.Unlock()
}

// initCluster enters the first entry, until the state has one.
func (r *Replica) initCluster(ctx context.Context, term uint64) bool {
	for ctx.Err() == nil {
		if r.fsm.View().Initialized() {
			return true
		}
		first, err := r.cfg.NewCluster(uuid.NewString())
		if err == nil {
			bounded, cancel := context.WithTimeout(ctx, r.cfg.LeaderWait)
			_, err = r.ProposeAsLeader(bounded, term, &commandv1.Command{Body: &commandv1.Command_InitCluster{InitCluster: first}})
			cancel()
		}
		if err != nil && ctx.Err() == nil && !errors.Is(err, context.Canceled) {
			r.log.Warn("the cluster's first entry is not applied yet", "error", err)
		}
		r.Nudge()
		if !r.fsm.View().Initialized() {
			pause(ctx, r.cfg.heartbeat()/4)
		}
	}
	return false
}
