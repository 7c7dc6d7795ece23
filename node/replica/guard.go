package replica

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/raft"

	"rollcall/node/fault"
)

// maxTermJump is how far ahead of ours a peer's term may be. An honest cluster needs one term per election; a peer that
// sends a giant term would exhaust the terms of everybody who believes it.
const maxTermJump = 1 << 20

// maxSnapshotBytes bounds what a leader may stream to us.
const maxSnapshotBytes = 8 << 30

// guard stands between the transport and Raft. It mends defects of hashicorp/raft v1.8.0 (two are open upstream as #697
// and #704), and keeps those out who have no business here yet:
//
//   - A snapshot that is not newer than what is applied is answered without installing it. Raft would install it, and
//     its state machine would go backwards.
//   - AppendEntries whose previous entry is applied but compacted away loses its applied entries and its check. Raft
//     would look for that entry in the log, not find it, and reject for ever; the leader would send the snapshot again.
//   - A node that is no member yet votes only for whom it has promised to found with, and without any state it listens
//     only to them and to the leader that it has asked: an empty disk under an old address must not vote for somebody who
//     lacks what that address had acknowledged. While it is let in, the leader may still feed it under its old id, so
//     having entries is not enough to vote.
//   - A leader whose log has another entry where our newest snapshot ends: see void.
//   - A heartbeat that is under way when Raft ends, or comes after: see SetHeartbeatHandler.
//
// Dropping the check of the previous entry is sound: every entry up to the applied index is committed, so every later
// leader has the same ones. The one exception is an operator's restore, and that is what void looks for.
type guard struct {
	network
	out  chan raft.RPC
	done chan struct{}
	once sync.Once
	wg   sync.WaitGroup // the pump

	beats calls // heartbeats under way; shut by Close

	raft  atomic.Pointer[raft.Raft] // nil until NewRaft has returned
	logs  raft.LogStore
	snaps raft.SnapshotStore
	entry entryRule
	// void is told, once, that this node's newest snapshot is one that the cluster does not have.
	void func(error)

	skippedSnapshots atomic.Uint64
	trimmedAppends   atomic.Uint64
	refused          atomic.Uint64
}

// network is what raft.NetworkTransport offers and Raft uses.
type network interface {
	raft.Transport
	raft.WithPreVote
	raft.WithClose
}

// entryRule says whom a node that is new listens to.
type entryRule interface {
	// inside: is this node a member under its own id?
	inside() bool
	// mayFeed: may this peer send us entries and snapshots?
	mayFeed(id raft.ServerID) bool
	// mayWin: may this peer have our vote?
	mayWin(id raft.ServerID) bool
}

var _ network = (*guard)(nil)

func newGuard(inner network, logs raft.LogStore, snaps raft.SnapshotStore, entry entryRule, void func(error)) *guard {
	return &guard{
		network: inner, logs: logs, snaps: snaps, entry: entry, void: void,
		out: make(chan raft.RPC), done: make(chan struct{}),
	}
}

// Consumer is raft.Transport's: what Raft sees is what has passed.
func (g *guard) Consumer() <-chan raft.RPC { return g.out }

// SetHeartbeatHandler is raft.Transport's. Heartbeats take a path of their own through the transport, in goroutines that Raft
// does not wait for when it ends: one may write a term, so Close waits for them, before the stores are closed.
func (g *guard) SetHeartbeatHandler(cb func(raft.RPC)) {
	if cb == nil {
		g.network.SetHeartbeatHandler(nil)
		return
	}
	g.network.SetHeartbeatHandler(func(rpc raft.RPC) {
		if !g.beats.begin() {
			g.refuse(&rpc, errors.New("this node is stopping"))
			return
		}
		defer g.beats.done()
		if g.admit(&rpc) {
			cb(rpc)
		}
	})
}

// Close is raft.WithClose's; it waits for the pump, and for heartbeats under way.
func (g *guard) Close() error {
	g.beats.shut()
	g.once.Do(func() { close(g.done) })
	err := g.network.Close()
	g.wg.Wait()
	g.beats.wait()
	return err
}

// start begins to pass RPCs on. r is what NewRaft returned.
func (g *guard) start(r *raft.Raft) {
	g.raft.Store(r)
	g.wg.Go(func() {
		in := g.network.Consumer()
		for {
			select {
			case rpc := <-in:
				if !g.admit(&rpc) || g.settle(&rpc) {
					continue
				}
				select {
				case g.out <- rpc:
				case <-g.done:
					return
				}
			case <-g.done:
				return
			}
		}
	})
}

// admit refuses what must not reach Raft; it has then answered.
func (g *guard) admit(rpc *raft.RPC) bool {
	r := g.raft.Load()
	if r == nil {
		return g.refuse(rpc, errors.New("this node is starting"))
	}
	var term uint64
	var rule func(raft.ServerID) bool
	var from raft.ServerID
	known := r.LastIndex() > 0
	switch c := rpc.Command.(type) {
	case *raft.AppendEntriesRequest:
		term, from, rule = c.Term, raft.ServerID(c.ID), g.entry.mayFeed
	case *raft.InstallSnapshotRequest:
		term, from, rule = c.Term, raft.ServerID(c.ID), g.entry.mayFeed
		if c.Size < 0 || c.Size > maxSnapshotBytes {
			return g.refuse(rpc, fmt.Errorf("a snapshot of %d bytes is refused", c.Size))
		}
	case *raft.RequestVoteRequest:
		term, from, rule, known = c.Term, raft.ServerID(c.ID), g.entry.mayWin, known && g.entry.inside()
	case *raft.RequestPreVoteRequest:
		term, from, rule, known = c.Term, raft.ServerID(c.ID), g.entry.mayWin, known && g.entry.inside()
	case *raft.TimeoutNowRequest:
		from, rule = raft.ServerID(c.ID), g.entry.mayFeed
	default:
		return true
	}
	if current := r.CurrentTerm(); current > 0 && term > current+maxTermJump {
		return g.refuse(rpc, fmt.Errorf("term %d is too far ahead of %d", term, current))
	}
	if !known && !rule(from) {
		return g.refuse(rpc, fmt.Errorf("this node is no member yet, and has neither asked %q to let it in nor promised to found with it", from))
	}
	return true
}

func (g *guard) refuse(rpc *raft.RPC, err error) bool {
	g.refused.Add(1)
	if rpc.Reader != nil {
		// The sender streams the whole body before it reads our answer; an honest one stays below the cap.
		_, _ = io.Copy(io.Discard, io.LimitReader(rpc.Reader, maxSnapshotBytes))
	}
	rpc.Respond(emptyResponse(rpc.Command), err)
	return false
}

func emptyResponse(command any) any {
	switch command.(type) {
	case *raft.AppendEntriesRequest:
		return &raft.AppendEntriesResponse{}
	case *raft.InstallSnapshotRequest:
		return &raft.InstallSnapshotResponse{}
	case *raft.RequestVoteRequest:
		return &raft.RequestVoteResponse{}
	case *raft.RequestPreVoteRequest:
		return &raft.RequestPreVoteResponse{}
	case *raft.TimeoutNowRequest:
		return &raft.TimeoutNowResponse{}
	default:
		return nil
	}
}

// settle answers a snapshot that is not newer than what is applied, and mends an append whose start is compacted away.
// It reports whether the RPC has been answered.
func (g *guard) settle(rpc *raft.RPC) bool {
	r := g.raft.Load()
	switch c := rpc.Command.(type) {
	case *raft.InstallSnapshotRequest:
		if c.LastLogIndex > r.AppliedIndex() {
			return false
		}
		term := r.CurrentTerm()
		if c.Term < term {
			return false // Raft refuses it by its term
		}
		g.skippedSnapshots.Add(1)
		_, err := io.Copy(io.Discard, rpc.Reader)
		if err == nil && c.Term > term {
			// Raft alone may take up a term. The leader's heartbeat brings it, and then the leader tries again.
			err = fmt.Errorf("term %d is not known here yet", c.Term)
		}
		rpc.Respond(&raft.InstallSnapshotResponse{Term: term, Success: err == nil}, err)
		return true
	case *raft.AppendEntriesRequest:
		applied := r.AppliedIndex()
		if err := g.contradicts(c, applied, r.CurrentTerm()); err != nil {
			g.void(err)
			return !g.refuse(rpc, err)
		}
		if c.PrevLogEntry == 0 || c.PrevLogEntry > applied {
			return false
		}
		var prev raft.Log
		if err := g.logs.GetLog(c.PrevLogEntry, &prev); !errors.Is(err, raft.ErrLogNotFound) {
			return false
		}
		g.trimmedAppends.Add(1)
		trimmed := *c
		trimmed.PrevLogEntry, trimmed.PrevLogTerm = 0, 0
		for len(trimmed.Entries) > 0 && trimmed.Entries[0].Index <= applied {
			trimmed.Entries = trimmed.Entries[1:]
		}
		rpc.Command = &trimmed
	}
	return false
}

// ErrRestoreLost ends a node whose state the cluster never had. Nothing but an empty disk makes it a follower again.
var ErrRestoreLost = errors.New("it was cut off in the middle of an operator's restore, and the others went on without it")

// contradicts is an error when the leader's log has another entry at the index of this node's newest snapshot. Raft puts an
// operator's restore into the leader's own state, and onto its disk, before anybody else has it. When that leader ends just
// then, and the others go on without the restore, its snapshot holds a state that the cluster never had, at an index that
// it will have with something else. Raft would not notice: what a snapshot holds counts as committed.
func (g *guard) contradicts(c *raft.AppendEntriesRequest, applied, term uint64) error {
	// Nearly every append begins behind what is applied, and follows an entry behind the snapshot: then nothing is looked up.
	if c.Term < term || c.PrevLogEntry > applied || c.PrevLogEntry == 0 && len(c.Entries) == 0 {
		return nil
	}
	var prev raft.Log
	if (len(c.Entries) == 0 || c.Entries[0].Index > applied) && g.logs.GetLog(c.PrevLogEntry, &prev) == nil {
		return nil
	}
	list, err := g.snaps.List()
	if err != nil || len(list) == 0 {
		return nil // a snapshot that cannot be read is found at the next start
	}
	have, theirs := list[0], uint64(0)
	if c.PrevLogEntry == have.Index {
		theirs = c.PrevLogTerm
	}
	for _, e := range c.Entries {
		if e.Index == have.Index {
			theirs = e.Term
		}
	}
	if theirs == 0 || theirs == have.Term {
		return nil
	}
	return fault.New(fault.Corrupt, "follow the leader", "", "this node holds a restored state, at index %d of term %d, that the cluster "+
		"does not have: %w. Move its data directory away and start it again under the same name, as a replaced disk",
		have.Index, have.Term, ErrRestoreLost)
}
