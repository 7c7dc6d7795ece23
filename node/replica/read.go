package replica

import (
	"context"
	"sync"

	"rollcall/fsm"
	"rollcall/node/fault"
	peerv1 "rollcall/proto/peer/v1"
)

// readers gathers everybody who waits for a read index: one round of verification answers all who asked before it began.
type readers struct {
	mu      sync.Mutex
	next    *readBatch
	running bool
}

type readBatch struct {
	done  chan struct{}
	index uint64
	term  uint64
	err   error
}

// ReadIndex returns an index that holds everything acknowledged anywhere before the call: a read of a state that has
// applied it is linearizable. It works on any node and waits for a leader at most Config.LeaderWait. Errors:
// fault.Unavailable, or ctx's.
func (r *Replica) ReadIndex(ctx context.Context) (uint64, error) {
	waiting, cancel := context.WithTimeout(ctx, r.cfg.LeaderWait)
	defer cancel()
	for attempt := 0; ; attempt++ {
		changed := r.RoleChanged()
		b, err := r.joinRead(waiting)
		if err == nil && b.err == nil {
			return b.index, nil
		}
		if err == nil {
			err = b.err
		}
		if waitErr := r.backOff(waiting, changed, attempt); waitErr != nil {
			return 0, fault.As(fault.Unavailable, err, "read index", "")
		}
	}
}

// Consistent returns a view that holds everything acknowledged anywhere before the call. Errors as ReadIndex.
func (r *Replica) Consistent(ctx context.Context) (*fsm.View, error) {
	index, err := r.ReadIndex(ctx)
	if err != nil {
		return nil, err
	}
	if err := r.fsm.WaitIndex(ctx, index); err != nil {
		return nil, fault.As(fault.Unavailable, err, "wait for the read index", "")
	}
	return r.fsm.View(), nil
}

// joinRead waits for the next round. Its error is ctx's; the round's own error is in the batch.
func (r *Replica) joinRead(ctx context.Context) (*readBatch, error) {
	r.reads.mu.Lock()
	if r.reads.next == nil {
		r.reads.next = &readBatch{done: make(chan struct{})}
	}
	b := r.reads.next
	if !r.reads.running {
		if !r.inflight.begin() {
			r.reads.next = nil
			r.reads.mu.Unlock()
			return nil, fault.New(fault.Unavailable, "", "", "node %s is stopping", r.cfg.Name)
		}
		r.reads.running = true
		go func() { defer r.inflight.done(); r.readRounds() }()
	}
	r.reads.mu.Unlock()
	select {
	case <-b.done:
		return b, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// readRounds runs rounds until nobody waits.
func (r *Replica) readRounds() {
	for {
		r.reads.mu.Lock()
		b := r.reads.next
		r.reads.next = nil
		if b == nil {
			r.reads.running = false
			r.reads.mu.Unlock()
			return
		}
		r.reads.mu.Unlock()
		b.index, b.term, b.err = r.readRound()
		close(b.done)
	}
}

func (r *Replica) readRound() (index, term uint64, err error) {
	ctx, cancel := context.WithTimeout(r.ctx, r.cfg.rpcTimeout())
	defer cancel()
	if led := r.led.Load(); led != nil {
		return r.verified(ctx, led)
	}
	client, role, err := r.leader(ctx)
	if err != nil {
		return 0, 0, err
	}
	resp, err := client.ReadIndex(ctx, &peerv1.ReadIndexRequest{})
	if err != nil {
		return 0, 0, fault.As(fault.Unavailable, err, "ask leader for the read index", role.LeaderID)
	}
	return resp.GetIndex(), resp.GetTerm(), nil
}

// verified is the leader's read index: what its state has applied, provided that it still leads the term whose barrier
// it applied. raft.AppliedIndex would not do: it counts entries that the state machine has not seen yet, or never sees.
func (r *Replica) verified(ctx context.Context, led *led) (index, term uint64, err error) {
	node, err := r.node()
	if err != nil {
		return 0, 0, err
	}
	index = r.fsm.Index()
	if err := r.await(ctx, node.VerifyLeader()); err != nil {
		return 0, 0, fault.As(fault.NotLeader, err, "verify leadership", "")
	}
	if now, leading := r.leads(); !leading || now != led.term {
		return 0, 0, fault.New(fault.NotLeader, "verify leadership", "", "the leadership of term %d is over", led.term)
	}
	return index, led.term, nil
}
