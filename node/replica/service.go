package replica

import (
	"context"
	"strconv"
	"time"

	"github.com/hashicorp/raft"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
	peerv1 "rollcall/proto/peer/v1"
)

// service answers peers. Every caller has a certificate of this cluster; what it may do with it is checked here.
type service struct {
	peerv1.UnimplementedReplicaServer
	r *Replica
}

var _ peerv1.ReplicaServer = (*service)(nil)

// Propose is the leader's half of a forwarded proposal.
func (s *service) Propose(ctx context.Context, req *peerv1.ProposeRequest) (*peerv1.ProposeResponse, error) {
	r := s.r
	term, leading := r.leads()
	if !leading {
		return nil, fault.New(fault.NotLeader, "propose", "", "node %s does not lead", r.cfg.Name)
	}
	if err := s.mayPropose(ctx, req.GetCommand()); err != nil {
		return nil, err
	}
	res, err := r.applyHere(ctx, term, req.GetCommand())
	if err != nil {
		return nil, err
	}
	r.Nudge() // the caller waits until its own state has the entry
	return &peerv1.ProposeResponse{Result: res}, nil
}

// mayPropose lets a node speak for itself only, and only while it is a member.
func (s *service) mayPropose(ctx context.Context, cmd *commandv1.Command) error {
	name, err := s.r.cfg.PeerName(ctx)
	if err != nil {
		return fault.As(fault.Denied, err, "propose", "")
	}
	var speaksFor string
	switch b := cmd.GetBody().(type) {
	case nil:
		return fault.New(fault.Invalid, "propose", "", "the command is empty, or newer than this node understands")
	case *commandv1.Command_Hello:
		speaksFor = b.Hello.GetNodeId()
		if b.Hello.GetName() != name {
			return fault.New(fault.Denied, "propose hello", b.Hello.GetName(), "the certificate names %s", name)
		}
	case *commandv1.Command_Leave:
		speaksFor = b.Leave.GetNodeId()
		if n := s.r.fsm.View().Node(speaksFor); n != nil && n.GetName() != name {
			return fault.New(fault.Denied, "propose leave", n.GetName(), "the certificate names %s", name)
		}
	default:
		return nil
	}
	for _, m := range s.r.servers() {
		if string(m.ID) == speaksFor {
			return nil
		}
	}
	return fault.New(fault.Denied, "propose", name, "node %s is not a member of this cluster (any more)", speaksFor)
}

// ReadIndex is the leader's half of a consistent read.
func (s *service) ReadIndex(ctx context.Context, _ *peerv1.ReadIndexRequest) (*peerv1.ReadIndexResponse, error) {
	r := s.r
	if r.led.Load() == nil {
		return nil, fault.New(fault.NotLeader, "read index", "", "node %s does not lead", r.cfg.Name)
	}
	b, err := r.joinRead(ctx)
	if err == nil {
		err = b.err
	}
	if err != nil {
		return nil, fault.As(fault.Unavailable, err, "read index", "")
	}
	if r.nudged.Load() < b.index {
		r.Nudge() // the caller may not have these entries yet
	}
	return &peerv1.ReadIndexResponse{Index: b.index, Term: b.term}, nil
}

// Lease grants a serving lease. The certificate must name the node that the lease is for.
func (s *service) Lease(ctx context.Context, req *peerv1.LeaseRequest) (*peerv1.LeaseResponse, error) {
	name, err := s.r.cfg.PeerName(ctx)
	if err != nil {
		return nil, fault.As(fault.Denied, err, "grant lease", req.GetNodeId())
	}
	if n := s.r.fsm.View().Node(req.GetNodeId()); n != nil && n.GetName() != name {
		return nil, fault.New(fault.Denied, "grant lease", n.GetName(), "the certificate names %s", name)
	}
	return s.r.grantLease(ctx, req)
}

// Join lets a node in, or moves it.
func (s *service) Join(ctx context.Context, req *peerv1.JoinRequest) (*peerv1.JoinResponse, error) {
	name, err := s.r.cfg.PeerName(ctx)
	if err != nil {
		return nil, fault.As(fault.Denied, err, "let in", req.GetName())
	}
	return s.r.letIn(ctx, req, name)
}

// Facts says what this node is, member or not.
func (s *service) Facts(context.Context, *peerv1.FactsRequest) (*peerv1.FactsResponse, error) {
	return s.r.facts(), nil
}

// RemoveMember is the leader's half.
func (s *service) RemoveMember(ctx context.Context, req *peerv1.RemoveMemberRequest) (*peerv1.RemoveMemberResponse, error) {
	if err := s.r.removeHere(ctx, req.GetNodeId(), req.GetWhy()); err != nil {
		return nil, err
	}
	return &peerv1.RemoveMemberResponse{}, nil
}

// TransferLeadership is the leader's half.
func (s *service) TransferLeadership(ctx context.Context, _ *peerv1.TransferLeadershipRequest) (*peerv1.TransferLeadershipResponse, error) {
	if _, leading := s.r.leads(); !leading {
		return nil, fault.New(fault.NotLeader, "transfer leadership", "", "node %s does not lead", s.r.cfg.Name)
	}
	if err := s.r.transferHere(ctx); err != nil {
		return nil, err
	}
	return &peerv1.TransferLeadershipResponse{}, nil
}

func (r *Replica) facts() *peerv1.FactsResponse {
	f := &peerv1.FactsResponse{
		NodeId: r.NodeID(), Name: r.cfg.Name, ClusterAddress: r.cfg.ClusterAddress, HasState: r.hasState(),
		BootstrapExpect: r.cfg.BootstrapExpect, ClusterId: r.clusterID(), AppliedIndex: r.fsm.Index(),
		BootstrapCandidates: r.entrance.promised(), NonVoter: r.cfg.NonVoter, Incarnation: r.Incarnation(), LastContactNs: -1,
	}
	role := r.Role()
	f.LeaderId, f.LeaderAddress = role.LeaderID, role.LeaderAddress
	n := r.raft.Load()
	if n == nil {
		return f
	}
	f.Term, f.LastLogIndex = n.CurrentTerm(), n.LastIndex()
	f.LastLogTerm, _ = strconv.ParseUint(n.Stats()["last_log_term"], 10, 64)
	if n.State() == raft.Leader {
		f.LastContactNs = 0
	} else if at := n.LastContact(); !at.IsZero() {
		f.LastContactNs = int64(time.Since(at))
	}
	return f
}
