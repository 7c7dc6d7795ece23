package replica

import (
	"context"
	"io"
	"time"

	"github.com/hashicorp/raft"

	"rollcall/fsm"
	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// Backup writes the whole state as it is now, consistently, from any node, sealed where this node's disk is. The stream
// is what RestoreBackup reads.
func (r *Replica) Backup(ctx context.Context, w io.Writer) error {
	v, err := r.Consistent(ctx)
	if err != nil {
		return err
	}
	out, err := r.sealedBackup(w)
	if err == nil {
		if err = v.WriteSnapshot(out); err == nil {
			err = out.Close()
		}
	}
	return fault.Wrap(err, "write backup", r.cfg.Name)
}

// Snapshot compacts this node's log now, as SnapshotThreshold does by itself. It is for tests.
func (r *Replica) Snapshot() error {
	node, err := r.node()
	if err != nil {
		return err
	}
	return r.await(r.ctx, node.Snapshot())
}

// RestoreBackup replaces the state of the whole cluster by a backup of this cluster, as the leader, and enters Restored:
// every mount gets a new generation. The members stay as they are. Commands that are under way are aborted
// (fault.OutcomeUnknown at their callers), and what was applied after the backup was taken is gone: this is for
// disasters. fault.NotLeader on any other node, fault.Conflict for another cluster's backup, fault.Corrupt for a damaged
// one, fault.Invalid for one that no key of this node opens; then nothing has changed. After fault.OutcomeUnknown, look at the state.
func (r *Replica) RestoreBackup(ctx context.Context, backup io.Reader, why string) (*commandv1.Result, error) {
	l := r.led.Load()
	if l == nil {
		return nil, fault.New(fault.NotLeader, "restore backup", "", "node %s does not lead", r.cfg.Name)
	}
	release, err := r.change(ctx) // Raft refuses while the configuration changes
	if err != nil {
		return nil, err
	}
	defer release()
	v, err := r.Consistent(ctx)
	if err != nil {
		return nil, err
	}
	if err := r.replaceState(ctx, l, v, backup); err != nil {
		return nil, err
	}
	r.log.Warn("the state was restored from a backup", "why", why)
	res, err := r.enterRestored(ctx, l.term, why)
	if err != nil { // the state is replaced, and this or the next leader will enter it
		return nil, fault.As(fault.OutcomeUnknown, err, "enter the restore", "")
	}
	return res, nil
}

// replaceState puts a backup, rebased on v, in the place of the state through Raft.
func (r *Replica) replaceState(ctx context.Context, l *led, v *fsm.View, backup io.Reader) error {
	plain, err := r.openBackup(backup)
	if err != nil {
		return err
	}
	file, err := newScratch(r.cfg.Dir.Path)
	if err != nil {
		return err
	}
	defer file.close()
	if err := fsm.Rebase(v, plain, file); err != nil {
		return err
	}
	state, err := file.rewind()
	if err != nil {
		return err
	}
	if now, leading := r.leads(); !leading || now != l.term {
		return fault.New(fault.NotLeader, "restore backup", "", "the leadership of term %d is over", l.term)
	}
	meta := &raft.SnapshotMeta{Version: raft.SnapshotVersionMax, Index: v.Index(), Term: v.Term(), Size: file.size}
	err = r.await(ctx, waitFuture(func() error { return r.raft.Load().Restore(meta, state, r.cfg.LeaderWait) }))
	return fault.As(fault.OutcomeUnknown, err, "restore backup", "")
}

func (r *Replica) enterRestored(ctx context.Context, term uint64, why string) (*commandv1.Result, error) {
	res, err := r.ProposeAsLeader(ctx, term, &commandv1.Command{Body: &commandv1.Command_Restored{
		Restored: &commandv1.Restored{Why: why},
	}})
	r.Nudge()
	return res, err
}

// leadRestored enters Restored where a backup has replaced the state and whoever restored it did not come so far: its
// leadership ended in between, or its time. Without it plugins would go on with what they remember of the state before.
func (r *Replica) leadRestored(ctx context.Context, term uint64) {
	for ; ctx.Err() == nil; pause(ctx, time.Second) {
		if !r.fsm.View().Restoring() {
			continue
		}
		release, err := r.change(ctx) // a restore under way here enters it itself
		if err != nil {
			return
		}
		if r.fsm.View().Restoring() {
			bounded, cancel := context.WithTimeout(ctx, r.cfg.LeaderWait)
			_, err = r.enterRestored(bounded, term, "entered by a later leader")
			cancel()
		}
		release()
		if err != nil {
			r.log.Info("a restore is not entered yet", "error", err)
		}
	}
}

// waitFuture makes a blocking call awaitable.
type waitFuture func() error

// Error is raft.Future's.
func (f waitFuture) Error() error { return f() }
