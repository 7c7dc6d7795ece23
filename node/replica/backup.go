package replica

import (
	"context"
	"io"
	"os"

	"github.com/hashicorp/raft"

	"rollcall/fsm"
	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// Backup writes the whole state as it is now, consistently, from any node. The stream is what RestoreBackup reads.
func (r *Replica) Backup(ctx context.Context, w io.Writer) error {
	v, err := r.Consistent(ctx)
	if err != nil {
		return err
	}
	return fault.Wrap(v.WriteSnapshot(w), "write backup", r.cfg.Name)
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
// one; then nothing has changed. After fault.OutcomeUnknown, look at the state.
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
	file, err := os.CreateTemp(r.cfg.Dir.Path, "restore-*.tmp")
	if err != nil {
		return nil, fault.As(fault.Internal, err, "restore backup", "")
	}
	defer func() { _, _ = file.Close(), os.Remove(file.Name()) }()
	v, err := r.Consistent(ctx)
	if err != nil {
		return nil, err
	}
	if err := fsm.Rebase(v, backup, file); err != nil {
		return nil, err
	}
	size, err := file.Seek(0, io.SeekCurrent)
	if err == nil {
		_, err = file.Seek(0, io.SeekStart)
	}
	if err != nil {
		return nil, fault.As(fault.Internal, err, "restore backup", "")
	}
	if now, leading := r.leads(); !leading || now != l.term {
		return nil, fault.New(fault.NotLeader, "restore backup", "", "the leadership of term %d is over", l.term)
	}
	meta := &raft.SnapshotMeta{Version: raft.SnapshotVersionMax, Index: v.Index(), Term: v.Term(), Size: size}
	if err := r.await(ctx, waitFuture(func() error { return r.raft.Load().Restore(meta, file, r.cfg.LeaderWait) })); err != nil {
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
