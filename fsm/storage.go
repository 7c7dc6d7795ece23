package fsm

import (
	"strings"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// takeOver makes one instance the mount's only writer: its index is the epoch that every write must name.
func (e *entry) takeOver(c *commandv1.TakeOver) error {
	old := get(&e.mounts, c.GetMountUuid())
	switch {
	case old == nil:
		return fault.Text(fault.NotFound, "take over: no mount %s", trim(c.GetMountUuid(), maxName))
	case c.GetTerm() != e.term:
		return fault.Text(fault.Stale, "take over %s: term %d is over, the entry's is %d", old.GetPath(), c.GetTerm(), e.term)
	case c.GetTerm() < old.GetEpochTerm():
		return fault.Text(fault.Stale, "take over %s: term %d is over", old.GetPath(), c.GetTerm())
	}
	node := get(&e.nodes, c.GetNodeId())
	if node == nil || node.GetLeft() {
		return fault.Text(fault.Stale, "take over %s: node %s is no member", old.GetPath(), trim(c.GetNodeId(), maxName))
	}
	if want := wantedOf(old, c.GetNodeId()).GetGeneration(); want != c.GetGeneration() {
		return fault.Text(fault.Stale, "take over %s: generation %d is wanted of node %s, not %d",
			old.GetPath(), want, node.GetName(), c.GetGeneration())
	}
	if err := checkOps(c.GetWrites()); err != nil {
		return err
	}
	m := clone(old)
	m.Epoch, m.EpochTerm, m.EpochGeneration = e.index, e.term, c.GetGeneration()
	e.putMount(m)
	e.applyOps(m.GetUuid(), c.GetWrites())
	return nil
}

func (e *entry) writeStorage(c *commandv1.WriteStorage) error {
	m := get(&e.mounts, c.GetMountUuid())
	switch {
	case m == nil:
		return fault.Text(fault.NotFound, "write storage: no mount %s", trim(c.GetMountUuid(), maxName))
	case c.GetEpoch() == 0 || c.GetEpoch() != m.GetEpoch():
		return fault.Text(fault.Stale, "write storage of %s: epoch %d is not current, %d is",
			m.GetPath(), c.GetEpoch(), m.GetEpoch())
	case c.GetTerm() != m.GetEpochTerm() || c.GetTerm() != e.term:
		return fault.Text(fault.Stale, "write storage of %s: term %d is not current, the epoch's is %d and the entry's %d",
			m.GetPath(), c.GetTerm(), m.GetEpochTerm(), e.term)
	}
	if err := checkOps(c.GetOps()); err != nil {
		return err
	}
	e.applyOps(m.GetUuid(), c.GetOps())
	return nil
}

func checkOps(ops []*commandv1.StorageOp) error {
	if len(ops) > MaxOps {
		return fault.Text(fault.TooLarge, "%d storage operations in one entry: at most %d", len(ops), MaxOps)
	}
	size := 0
	for _, op := range ops {
		k := op.GetKey()
		switch {
		case k == "" || len(k) > MaxKey:
			return invalid("a storage key has 1 to %d bytes, not %d", MaxKey, len(k))
		case strings.Contains(k, ".."):
			return invalid("storage key %q cannot contain parent references", trim(k, maxName))
		case len(op.GetValue()) > MaxValue:
			return fault.Text(fault.TooLarge, "the value of %q has %d bytes: a storage value has at most %d",
				trim(k, maxName), len(op.GetValue()), MaxValue)
		}
		if size += len(k) + len(op.GetValue()); size > MaxOpsBytes {
			return fault.Text(fault.TooLarge, "storage operations of one entry hold more than %d bytes", MaxOpsBytes)
		}
	}
	return nil
}

func (e *entry) applyOps(mount string, ops []*commandv1.StorageOp) {
	if len(ops) == 0 {
		return
	}
	keys := make([]string, 0, len(ops))
	for _, op := range ops {
		k := key(mount, op.GetKey())
		keys = append(keys, op.GetKey())
		if op.GetDelete() {
			e.storage.Delete(k)
			continue
		}
		e.storage.Set(k, &commandv1.StorageEntry{
			MountUuid: mount, Key: op.GetKey(), Value: op.GetValue(), SealWrap: op.GetSealWrap(), Index: e.index,
		})
	}
	e.notes = append(e.notes, note{mount: mount, keys: keys, index: e.index})
}

func (e *entry) wipeStorage(mount string) {
	var keys []string
	scanPrefix(&e.storage, key(mount, ""), func(k string, _ *commandv1.StorageEntry) bool {
		keys = append(keys, k)
		return true
	})
	for _, k := range keys {
		e.storage.Delete(k)
	}
}
