package fsm

import (
	"io"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// Rebase makes an operator's backup (a stream of WriteSnapshot) into a snapshot that may replace the current state through
// raft's Restore: what belongs to the cluster and not to its data stays as it is now. These are the members and their
// incarnations, the clock and the term of data keys, which never go back, the salt that this cluster's audit
// files are hashed with, and the ids of reloads that clients may still ask for. Nobody may write
// storage before a new TakeOver. The caller enters Restored as the first command after the restore.
//
// A backup of another cluster is refused with fault.Conflict, a damaged one with fault.Corrupt.
func Rebase(current *View, backup io.Reader, w io.Writer) error {
	s, _, err := readSnapshot(backup)
	if err != nil {
		return err
	}
	now := current.s
	if now.clusterID != "" && now.clusterID != s.clusterID {
		return fault.New(fault.Conflict, "restore backup", "", "it is of cluster %s, and this is cluster %s",
			s.clusterID, now.clusterID)
	}
	s.nodes, s.nodeNames = table[*commandv1.Node]{}, table[string]{}
	now.nodes.Scan(func(_ string, n *commandv1.Node) bool {
		s.putNode(n)
		return true
	})
	s.index, s.term, s.clock = max(s.index, now.index), max(s.term, now.term), max(s.clock, now.clock)
	if now.auditSalt != "" {
		s.auditSalt = now.auditSalt
	}
	if now.keyTerm >= s.keyTerm {
		s.keyTerm, s.keyTermMS = now.keyTerm, now.keyTermMS
	}
	now.reloadIDs.Scan(func(_ string, row *commandv1.ReloadID) bool {
		if old := get(&s.reloadIDs, row.GetId()); old != nil {
			s.deleteReloadID(old)
		}
		s.putReloadID(row)
		return true
	})
	var mounts []*commandv1.Mount
	s.mounts.Scan(func(_ string, m *commandv1.Mount) bool {
		mounts = append(mounts, m)
		return true
	})
	for _, m := range mounts {
		m = clone(m)
		m.Epoch, m.EpochTerm, m.EpochGeneration = 0, 0, 0
		s.putMount(m)
	}
	return (&View{s}).write(w, true)
}
