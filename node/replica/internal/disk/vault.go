package disk

import (
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"

	"rollcall/node/fault"
	"rollcall/node/seal"
)

// vault seals what goes to the disk, opens what comes from it, and knows which data keys are still needed. A nil vault
// lets everything through as it is, and refuses what is sealed.
type vault struct {
	ring   *seal.Ring
	logger hclog.Logger
	snaps  *snapshots

	mu    sync.Mutex        // from the sealing of something until it is known to need its key
	last  map[uint32]uint64 // data key -> the last entry that it has sealed
	sinks map[uint32]int    // data key -> snapshots being written with it
}

// ringPlace lends a ring its file in the data directory.
type ringPlace struct{ path string }

var _ seal.File = ringPlace{}

// Read is seal.File's.
func (p ringPlace) Read() ([]byte, error) {
	raw, err := os.ReadFile(p.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err == nil && raw == nil {
		raw = []byte{}
	}
	return raw, fault.As(fault.Internal, err, "read keyring", p.path)
}

// Write is seal.File's.
func (p ringPlace) Write(content []byte) error { return writeDurably(p.path, content) }

// openVault opens the keyring, or makes one for a directory that has none and holds nothing sealed. It refuses what
// does not go together, and says what to do: a node never starts with less than it had.
func (d *Dir) openVault(opts Options, raw *raft.FileSnapshotStore, held extent) (*vault, error) {
	place := ringPlace{filepath.Join(d.Path, ringFile)}
	found, err := place.Read()
	if err != nil {
		return nil, err
	}
	sealed, err := sealedSnapshots(raw, filepath.Join(d.Path, snapshotDir))
	if err != nil {
		return nil, err
	}
	isSealed := len(held.Sealed) > 0 || sealed.any
	switch {
	case opts.Keys == nil && (found != nil || isSealed):
		return nil, fault.New(fault.Invalid, "open data directory", d.Path,
			"it is sealed and the configuration has no seal block: give seal.key_file or seal.command the key that it was sealed with. "+
				"There is no way back to a plain directory but a new one: move this one away and start the node again under the same name")
	case opts.Keys == nil:
		return nil, nil
	case found == nil && isSealed:
		return nil, fault.New(fault.Corrupt, "open keyring", place.path,
			"it is missing, and what it opens is here. Put it back from a copy; or, where other members live, move this node's data "+
				"directory away and start it again under the same name, and it rejoins as a replaced disk")
	}
	v := &vault{last: map[uint32]uint64{}, sinks: map[uint32]int{}}
	if found == nil {
		v.ring, err = seal.NewRing(place, d.NodeID, *opts.Keys, held.Last > 0 || sealed.plain)
	} else {
		v.ring, err = seal.OpenRing(place, d.NodeID, *opts.Keys)
	}
	if err != nil {
		return nil, fault.Wrap(err, "open data directory", d.Path)
	}
	if v.ring.Rewrapped() {
		opts.Logger.Info("the keyring is locked with the new seal key; the previous one is not needed here any more", "key", v.ring.Status().KeyID)
	}
	if held.Plain > 0 && !v.ring.Opening() {
		return nil, damaged(filepath.Join(d.Path, logFile), fault.New(fault.Corrupt, "", "", "%d entries are not sealed, and everything in this directory is", held.Plain))
	}
	return v, nil
}

// watchOver tells the vault what the disk holds; before that it retires nothing.
func (v *vault) watchOver(held extent, snaps *snapshots, logger hclog.Logger) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.snaps, v.logger = snaps, logger
	for id, index := range held.Sealed {
		v.last[id] = max(v.last[id], index)
	}
}

// lock returns copies of the entries that are sealed: the data hold both data and extensions, the extensions the mark.
func (v *vault) lock(logs []*raft.Log) []*raft.Log {
	if v == nil {
		return logs
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	out := make([]*raft.Log, len(logs))
	for i, log := range logs {
		c := *log
		plain := make([]byte, 0, binary.MaxVarintLen64+len(log.Extensions)+len(log.Data)+seal.Overhead)
		plain = binary.AppendUvarint(plain, uint64(len(log.Extensions)))
		plain = append(append(plain, log.Extensions...), log.Data...)
		c.Data, c.Extensions = v.ring.Seal(plain, placeOf(log))
		id, _ := seal.IsMark(c.Extensions)
		v.last[id] = max(v.last[id], log.Index)
		out[i] = &c
	}
	return out
}

// unlock opens an entry in place.
func (v *vault) unlock(log *raft.Log) error {
	_, sealed := seal.IsMark(log.Extensions)
	switch {
	case v == nil && !sealed:
		return nil
	case v == nil:
		return fault.New(fault.Corrupt, "read raft log", "", "entry %d is sealed, and there is no key", log.Index)
	case !sealed:
		return fault.New(fault.Corrupt, "read raft log", "", "entry %d is not sealed, and every entry here is", log.Index)
	}
	plain, err := v.ring.Open(log.Data, log.Extensions, placeOf(log))
	if err != nil {
		return fault.New(fault.Corrupt, "read raft log", "", "entry %d: %w", log.Index, err)
	}
	n, size := binary.Uvarint(plain)
	if size <= 0 || n > uint64(len(plain)-size) {
		return fault.New(fault.Corrupt, "read raft log", "", "entry %d: its content has another form", log.Index)
	}
	at := size + int(n)
	log.Extensions, log.Data = plain[size:at:at], plain[at:]
	if n == 0 {
		log.Extensions = nil
	}
	return nil
}

// placeOf is what an entry is bound to: it opens nowhere else.
func placeOf(log *raft.Log) []byte {
	b := append(make([]byte, 0, 22), "entry"...)
	b = binary.BigEndian.AppendUint64(b, log.Index)
	b = binary.BigEndian.AppendUint64(b, log.Term)
	return append(b, byte(log.Type))
}

// retire lets go of the data keys that no entry from firstIndex on, no snapshot and no sink needs. It is best effort:
// what fails now is tried again at the next compaction, and a key too many does no harm.
func (v *vault) retire(firstIndex func() (uint64, error)) {
	if v == nil || v.ring.Keys() < 2 {
		return
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.snaps == nil {
		return
	}
	first, err := firstIndex()
	if err != nil {
		return // reported by the log itself
	}
	inSnapshots, err := sealedSnapshots(v.snaps.inner, v.snaps.dir)
	if err != nil {
		v.logger.Warn("look for data keys that nothing needs any more", "error", err)
		return
	}
	n, err := v.ring.Retire(func(id uint32) bool {
		return first > 0 && v.last[id] >= first || v.sinks[id] > 0 || inSnapshots.keys[id]
	})
	switch {
	case err != nil:
		v.logger.Warn("retire data keys", "error", err)
	case n > 0:
		v.logger.Info("data keys that nothing on this disk needs any more are gone", "keys", n)
	}
}
