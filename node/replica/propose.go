package replica

import (
	"context"
	"errors"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/protobuf/proto"

	"rollcall/fsm"
	"rollcall/node/failpoint"
	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
	peerv1 "rollcall/proto/peer/v1"
)

// proposed is the place that a command passes once Raft has it, "" for most.
func proposed(cmd *commandv1.Command) failpoint.Site {
	switch cmd.GetBody().(type) {
	case *commandv1.Command_StartReload:
		return failpoint.ReloadProposed
	case *commandv1.Command_TakeOver:
		return failpoint.TakeOverProposed
	default:
		return ""
	}
}

func tickCommand() *commandv1.Command {
	return &commandv1.Command{Body: &commandv1.Command_Tick{Tick: &commandv1.Tick{}}}
}

// Propose enters a command into the log through whoever leads, and returns its result once this node's own state has
// applied it. A rejection by the state machine is returned as the result and as an error of its kind. Without a leader it
// waits, at most Config.LeaderWait; it tries again only what certainly did not run.
//
// Errors besides rejections: fault.Unavailable (nothing ran), fault.Exhausted (too much is under way; nothing ran),
// fault.TooLarge, and fault.OutcomeUnknown: the command may be, or may yet be, applied.
func (r *Replica) Propose(ctx context.Context, cmd *commandv1.Command) (*commandv1.Result, error) {
	waiting, cancel := context.WithTimeout(ctx, r.cfg.LeaderWait)
	defer cancel()
	for attempt := 0; ; attempt++ {
		changed := r.RoleChanged()
		res, err := r.proposeOnce(ctx, cmd)
		if res != nil {
			return r.applied(ctx, res)
		}
		if !fault.KindOf(err).Safe() || fault.Is(err, fault.Exhausted) {
			return nil, err
		}
		if waitErr := r.backOff(waiting, changed, attempt); waitErr != nil {
			return nil, fault.As(fault.Unavailable, err, "propose", "")
		}
	}
}

// ProposeAsLeader enters a command as the leader of the term, here and nowhere else. fault.NotLeader when this node does
// not lead that term (any more); then nothing ran. When it returns, the command stands in Raft's queue or has been
// decided, so a BeginFence that is ended afterwards covers it.
func (r *Replica) ProposeAsLeader(ctx context.Context, term uint64, cmd *commandv1.Command) (*commandv1.Result, error) {
	res, err := r.applyHere(ctx, term, cmd)
	if err != nil {
		return nil, err
	}
	return res, fsm.Err(res)
}

// applied waits until this node has applied the result's entry.
func (r *Replica) applied(ctx context.Context, res *commandv1.Result) (*commandv1.Result, error) {
	if err := r.fsm.WaitIndex(ctx, res.GetIndex()); err != nil {
		return res, fault.New(fault.OutcomeUnknown, "propose", "",
			"entry %d is decided, but this node has not applied it in time; ask again to see its effect: %w", res.GetIndex(), err)
	}
	return res, fsm.Err(res)
}

// backOff waits for a change of role, or a little; it returns an error when there is no time left.
func (r *Replica) backOff(ctx context.Context, changed <-chan struct{}, attempt int) error {
	d := min(r.cfg.heartbeat()/16<<min(attempt, 4), 250*time.Millisecond)
	t := time.NewTimer(max(d, 5*time.Millisecond))
	defer t.Stop()
	select {
	case <-changed:
		return ctx.Err()
	case <-t.C:
		return ctx.Err()
	case <-ctx.Done():
		return ctx.Err()
	case <-r.ctx.Done():
		return context.Cause(r.ctx)
	}
}

// proposeOnce returns a result when the command is decided, or an error whose kind says whether it may have run.
func (r *Replica) proposeOnce(ctx context.Context, cmd *commandv1.Command) (*commandv1.Result, error) {
	if term, leading := r.leads(); leading {
		return r.applyHere(ctx, term, cmd)
	}
	client, role, err := r.leader(ctx)
	if err != nil {
		return nil, err
	}
	resp, err := client.Propose(ctx, &peerv1.ProposeRequest{Command: cmd})
	if err != nil {
		return nil, unanswered(err, "propose to leader", role.LeaderID)
	}
	if resp.GetResult() == nil {
		return nil, fault.New(fault.OutcomeUnknown, "propose to leader", role.LeaderID, "answered without a result")
	}
	return resp.GetResult(), nil
}

// leader returns a client of the leader over a connection that is up: what fails before has not run.
func (r *Replica) leader(ctx context.Context) (peerv1.ReplicaClient, Role, error) {
	role := r.Role()
	if role.LeaderAddress == "" || role.LeaderID == r.NodeID() {
		return nil, role, fault.New(fault.Unavailable, "find leader", "", "no leader is known to %s", r.cfg.Name)
	}
	address := role.LeaderAddress
	if a, err := (addresses{r}).ServerAddr(raft.ServerID(role.LeaderID)); err == nil {
		address = string(a)
	}
	conn, err := r.connect(ctx, address, r.nameOf(role.LeaderID))
	if err != nil {
		return nil, role, err
	}
	return peerv1.NewReplicaClient(conn), role, nil
}

func (r *Replica) nameOf(nodeID string) string {
	if n := r.fsm.View().Node(nodeID); n != nil {
		return n.GetName()
	}
	for _, p := range r.known() {
		if p.NodeID == nodeID {
			return p.Name
		}
	}
	return ""
}

// connect returns a connection to the address that is ready, or fault.Unavailable: then nothing was sent.
func (r *Replica) connect(ctx context.Context, address, name string) (*grpc.ClientConn, error) {
	conn, err := r.cfg.Dial(address, name)
	if err != nil {
		return nil, fault.As(fault.Unavailable, err, "dial", address)
	}
	bounded, cancel := context.WithTimeout(ctx, r.cfg.rpcTimeout())
	defer cancel()
	conn.Connect()
	for failures := 0; ; {
		state := conn.GetState()
		switch state {
		case connectivity.Ready:
			return conn, nil
		case connectivity.Idle:
			conn.Connect()
		case connectivity.TransientFailure:
			if failures++; failures > 1 {
				return nil, fault.New(fault.Unavailable, "connect", address, "the node does not answer")
			}
			conn.ResetConnectBackoff()
		case connectivity.Shutdown:
			return nil, fault.New(fault.Unavailable, "connect", address, "the connection pool is closed")
		case connectivity.Connecting:
		}
		if !conn.WaitForStateChange(bounded, state) {
			return nil, fault.New(fault.Unavailable, "connect", address, "the node does not answer: %w", bounded.Err())
		}
	}
}

// unanswered classifies the error of a call that was sent. The kinds that the peer or the connection pool vouch for are
// believed; after a broken call or a deadline the command may have run.
func unanswered(err error, op, subject string) error {
	e, ok := errors.AsType[*fault.Error](err)
	if ok && e.Kind != fault.Deadline && e.Kind != fault.Canceled && (e.Kind != fault.Internal || e.Err == nil) {
		return err
	}
	return fault.New(fault.OutcomeUnknown, op, subject, "no answer: %w", err)
}

// applyHere appends the command on this node as the leader of the term.
func (r *Replica) applyHere(ctx context.Context, term uint64, cmd *commandv1.Command) (*commandv1.Result, error) {
	node, err := r.node()
	if err != nil {
		return nil, err
	}
	size := proto.Size(cmd) + 32
	if size > r.cfg.MaxCommandBytes {
		return nil, fault.New(fault.TooLarge, "propose", "", "the command has %d bytes, at most %d are allowed",
			size, r.cfg.MaxCommandBytes)
	}
	if err := r.admitBytes(ctx, int64(size)); err != nil {
		return nil, err
	}
	release := func() { r.bytes.Release(int64(size)) }
	if !r.inflight.begin() {
		release()
		return nil, fault.New(fault.Unavailable, "propose", "", "node %s is stopping", r.cfg.Name)
	}
	if now, leading := r.leads(); !leading || now != term {
		release()
		r.inflight.done()
		return nil, fault.New(fault.NotLeader, "propose", "", "node %s does not lead term %d", r.cfg.Name, term)
	}
	started := time.Now()
	elapsed := r.stamps.take(term, r.cfg.Now())
	stamped := &commandv1.Command{ElapsedNs: elapsed, WallMs: cmd.GetWallMs(), RequestId: cmd.GetRequestId(), Body: cmd.GetBody()}
	if stamped.WallMs == 0 {
		stamped.WallMs = time.Now().UnixMilli()
	}
	data, err := proto.Marshal(stamped)
	if err != nil {
		release()
		r.inflight.done()
		r.stamps.giveBack(term, elapsed)
		return nil, fault.As(fault.Invalid, err, "encode command", "")
	}
	future := node.Apply(data, r.cfg.rpcTimeout())
	if failpoint.Enabled {
		_ = failpoint.Hit(proposed(cmd), r.NodeID())
	}
	type outcome struct {
		res *commandv1.Result
		err error
	}
	done := make(chan outcome, 1)
	go func() { // ends when Raft answers; Stop waits for it through inflight
		defer r.inflight.done()
		defer release()
		res, err := decided(future)
		if fault.KindOf(err).Safe() {
			r.stamps.giveBack(term, elapsed)
		}
		r.m.proposed(started, err)
		done <- outcome{res, err}
	}()
	select {
	case o := <-done:
		return o.res, o.err
	case <-ctx.Done():
		return nil, fault.New(fault.OutcomeUnknown, "propose", "", "the command is under way and may yet be applied: %w", ctx.Err())
	}
}

// admitBytes bounds what is under way; it waits a little for room.
func (r *Replica) admitBytes(ctx context.Context, size int64) error {
	if r.bytes.TryAcquire(size) {
		return nil
	}
	bounded, cancel := context.WithTimeout(ctx, r.cfg.rpcTimeout())
	defer cancel()
	if err := r.bytes.Acquire(bounded, size); err != nil {
		return fault.New(fault.Exhausted, "propose", "", "%d bytes of commands are under way; try again", r.cfg.MaxInFlightBytes)
	}
	return nil
}

// decided waits for Raft's answer. The kind of an error says whether the entry can have been appended.
func decided(f raft.ApplyFuture) (*commandv1.Result, error) {
	if err := f.Error(); err != nil {
		switch {
		case errors.Is(err, raft.ErrNotLeader):
			return nil, fault.As(fault.NotLeader, err, "propose", "")
		case errors.Is(err, raft.ErrEnqueueTimeout), errors.Is(err, raft.ErrLeadershipTransferInProgress):
			return nil, fault.As(fault.Unavailable, err, "propose", "")
		default: // appended, and then leadership, disk or process went away
			return nil, fault.As(fault.OutcomeUnknown, err, "propose", "")
		}
	}
	res, ok := f.Response().(*commandv1.Result)
	if !ok {
		return nil, fault.New(fault.Internal, "propose", "", "the state machine answered %T", f.Response())
	}
	return res, nil
}

// Nudge makes the commit index travel at once: followers apply within milliseconds instead of at the next heartbeat
// (PROTOCOL B6). Call it after an entry that every node must act on. Calls coalesce; on a follower it does nothing.
func (r *Replica) Nudge() {
	if _, leading := r.leads(); !leading {
		return
	}
	select {
	case r.nudge <- struct{}{}:
	default:
	}
}

func (r *Replica) nudgeLoop() {
	for {
		select {
		case <-r.ctx.Done():
			return
		case <-r.nudge:
		}
		if _, leading := r.leads(); !leading {
			continue
		}
		r.nudged.Store(r.fsm.Index())
		bounded, cancel := context.WithTimeout(r.ctx, r.cfg.rpcTimeout())
		if err := r.await(bounded, r.raft.Load().Barrier(r.cfg.rpcTimeout())); err != nil {
			r.log.Debug("nudge", "error", err)
		}
		cancel()
	}
}
