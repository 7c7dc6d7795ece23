package replica

import (
	"context"
	"io"

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
	plain, err := r.openBackup(backup)
	if err != nil {
		return nil, err
	}
	file, err := newScratch(r.cfg.Dir.Path)
	if err != nil {
		return nil, err
	}
	defer file.close()
	v, err := r.Consistent(ctx)
	if err != nil {
		return nil, err
	}
	if err := fsm.Rebase(v, plain, file); err != nil {
		return nil, err
	}
	state, err := file.rewind()
	if err != nil {
		return nil, err
	}
	if now, leading := r.leads(); !leading || now != l.term {
		return nil, fault.New(fault.NotLeader, "restore backup", "", "the leadership of term %d is over", l.term)
	}
	meta := &raft.SnapshotMeta{Version: raft.SnapshotVersionMax, Index: v.Index(), Term: v.Term(), Size: file.size}
	if err := r.await(ctx, waitFuture(func() error { return r.raft.Load().Restore(meta, state, r.cfg.LeaderWait) })); err != nil {
		return nil, fault.As(fault.OutcomeUnknown, err, "restore backup", "")
	}
	r.log.Warn("the state was restored from a backup", "why", why)
	res, err := r.ProposeAsLeader(ctx, l.term, &commandv1.Command{Body: &commandv1.Command_Restored{
		Restored: &commandv1.Restored{Why: why},
	}})
	r.Nudge()
	return res, fault.Wrap(err, "enter the restore", "")
}

// waitFuture makes a blocking call awaitable.
type waitFuture func() error

// Error is raft.Future's.
func (f waitFuture) Error() error { return f() }
