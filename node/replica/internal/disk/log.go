package disk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/go-msgpack/v2/codec"
	"github.com/hashicorp/raft"

	"rollcall/node/failpoint"
	"rollcall/node/fault"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Log is the Raft log with a CRC-32C per entry, and, where there is a keyring, with each entry sealed beneath it. Both
// stand at the end of the entry's Extensions on disk only: they are added when an entry is stored and taken off when it
// is read, so they never travel and callers never see them.
type Log struct {
	inner     raft.LogStore
	watch     *Watch
	vault     *vault // nil where nothing is sealed
	path      string // of the directory
	mark      *mark  // nil where there are no files, or nothing is waited for
	onCorrupt atomic.Pointer[func(error)]
}

var _ raft.LogStore = (*Log)(nil)

// Watch returns the stopwatch over this disk's writes.
func (l *Log) Watch() *Watch { return l.watch }

// OnCorrupt sets what is called at every damaged read before the error is returned. It may park the caller for good:
// Raft panics on an entry that it cannot read. Set it before Raft starts.
func (l *Log) OnCorrupt(f func(error)) { l.onCorrupt.Store(&f) }

// FirstIndex is raft.LogStore's.
func (l *Log) FirstIndex() (uint64, error) {
	var i uint64
	err := Guarded("read raft log", "first index", func() (err error) { i, err = l.inner.FirstIndex(); return err })
	return i, l.report(err)
}

// LastIndex is raft.LogStore's.
func (l *Log) LastIndex() (uint64, error) {
	var i uint64
	err := Guarded("read raft log", "last index", func() (err error) { i, err = l.inner.LastIndex(); return err })
	return i, l.report(err)
}

// GetLog reads and verifies one entry. raft.ErrLogNotFound is passed on as it is: Raft compares it.
func (l *Log) GetLog(index uint64, out *raft.Log) error {
	err := Guarded("read raft log", "entry "+strconv.FormatUint(index, 10), func() error {
		if err := l.inner.GetLog(index, out); err != nil {
			return err
		}
		if err := verify(out); err != nil {
			return err
		}
		if err := l.vault.unlock(out); err != nil {
			return err
		}
		if out.Index != index {
			return fault.New(fault.Corrupt, "read raft log", "", "entry %d stands in the place of %d", out.Index, index)
		}
		return nil
	})
	if err != nil && !errors.Is(err, raft.ErrLogNotFound) {
		return l.report(err)
	}
	return err
}

// StoreLog is raft.LogStore's.
func (l *Log) StoreLog(log *raft.Log) error { return l.StoreLogs([]*raft.Log{log}) }

// StoreLogs seals and stamps copies of the entries and stores them under the watch.
func (l *Log) StoreLogs(logs []*raft.Log) error {
	stamped := make([]*raft.Log, len(logs))
	for i, log := range l.vault.lock(logs) {
		stamped[i] = stamp(log)
	}
	err := l.report(l.watch.write(func() error {
		if err := failpoint.Hit(failpoint.DiskAppend, l.path); err != nil {
			return err
		}
		if err := Guarded("write raft log", "", func() error { return l.inner.StoreLogs(stamped) }); err != nil {
			return err
		}
		return failpoint.Hit(failpoint.DiskFsync, l.path)
	}))
	if err == nil && len(logs) > 0 {
		l.mark.stored(logs[len(logs)-1].Index)
	}
	return err
}

// DeleteRange is raft.LogStore's, under the watch. Data keys that nothing on the disk needs any more go with the entries.
func (l *Log) DeleteRange(first, last uint64) error {
	end, err := l.LastIndex()
	if err != nil {
		return err
	}
	err = l.report(l.watch.write(func() error {
		return Guarded("compact raft log", "", func() error {
			if last >= end && first > 0 {
				if err := l.mark.cut(first - 1); err != nil {
					return err
				}
			}
			return l.inner.DeleteRange(first, last)
		})
	}))
	if err == nil {
		l.vault.retire(l.FirstIndex)
	}
	return err
}

func (l *Log) report(err error) error {
	if fault.Is(err, fault.Corrupt) {
		if f := l.onCorrupt.Load(); f != nil {
			(*f)(err)
		}
	}
	return err
}

// stamp returns a copy whose Extensions end in the checksum; the data is shared.
func stamp(log *raft.Log) *raft.Log {
	c := *log
	c.Extensions = binary.BigEndian.AppendUint32(append(make([]byte, 0, len(log.Extensions)+4), log.Extensions...), sum(log))
	return &c
}

// verify compares the checksum and takes it off.
func verify(log *raft.Log) error {
	n := len(log.Extensions) - 4
	if n < 0 {
		return fault.New(fault.Corrupt, "read raft log", "", "entry %d carries no checksum", log.Index)
	}
	want := binary.BigEndian.Uint32(log.Extensions[n:])
	log.Extensions = log.Extensions[:n:n]
	if n == 0 {
		log.Extensions = nil
	}
	if got := sum(log); got != want {
		return fault.New(fault.Corrupt, "read raft log", "", "entry %d: checksum %08x, expected %08x", log.Index, got, want)
	}
	return nil
}

func sum(log *raft.Log) uint32 {
	var head [25]byte
	binary.BigEndian.PutUint64(head[0:], log.Index)
	binary.BigEndian.PutUint64(head[8:], log.Term)
	head[16] = byte(log.Type)
	binary.BigEndian.PutUint64(head[17:], uint64(len(log.Data)))
	c := crc32.Update(0, castagnoli, head[:])
	c = crc32.Update(c, castagnoli, log.Data)
	return crc32.Update(c, castagnoli, log.Extensions)
}

// checkRecord verifies one record as it stands in the file, and returns it as it is there: sealed, if it is.
func checkRecord(key, value []byte) (*raft.Log, error) {
	if len(key) != 8 {
		return nil, fault.New(fault.Corrupt, "verify raft log", "", "a key of %d bytes", len(key))
	}
	index := binary.BigEndian.Uint64(key)
	log := &raft.Log{}
	if err := codec.NewDecoderBytes(value, &codec.MsgpackHandle{}).Decode(log); err != nil {
		return nil, fmt.Errorf("entry %d: %w", index, err)
	}
	if err := verify(log); err != nil {
		return nil, err
	}
	if log.Index != index {
		return nil, fault.New(fault.Corrupt, "verify raft log", "", "entry %d stands in the place of %d", log.Index, index)
	}
	return log, nil
}

// Stable is Raft's vote and term, with a CRC-32C each (a flipped bit in a vote could elect two leaders), under the same
// guard and watch.
type Stable struct {
	inner raft.StableStore
	watch *Watch
	path  string          // of the directory
	stop  <-chan struct{} // ends the wait for room
	mark  *mark
}

var _ raft.StableStore = (*Stable)(nil)

// Set is raft.StableStore's. On a full disk it waits for room: Raft would panic, and the watch keeps this node out of
// the cluster meanwhile. Any other error is passed on: after a failed fsync nothing may be tried again.
func (s *Stable) Set(key, val []byte) error {
	return s.watch.write(func() error { return s.set(key, val) })
}

func (s *Stable) set(key, val []byte) error {
	if err := failpoint.Hit(failpoint.DiskStableSet, s.path); err != nil {
		return err
	}
	for {
		err := Guarded("write raft vote", string(key), func() error { return s.inner.Set(key, closed(key, val)) })
		if !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EDQUOT) {
			return err
		}
		select {
		case <-s.stop:
			return err
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// Get is raft.StableStore's. The "not found" error is passed on as it is: Raft compares its text.
func (s *Stable) Get(key []byte) (val []byte, err error) {
	err = Guarded("read raft vote", string(key), func() (err error) {
		if val, err = s.inner.Get(key); err == nil {
			val, err = open(key, val)
		}
		return err
	})
	return val, err
}

// SetUint64 is raft.StableStore's.
func (s *Stable) SetUint64(key []byte, val uint64) error {
	err := s.Set(key, binary.BigEndian.AppendUint64(nil, val))
	if err == nil {
		s.mark.voted(key, val)
	}
	return err
}

// GetUint64 is raft.StableStore's; see Get.
func (s *Stable) GetUint64(key []byte) (uint64, error) {
	val, err := s.Get(key)
	if err != nil {
		return 0, err
	}
	if len(val) != 8 {
		return 0, fault.New(fault.Corrupt, "read raft term", string(key), "has %d bytes, not 8", len(val))
	}
	return binary.BigEndian.Uint64(val), nil
}

// closed appends the checksum of key and value; open verifies it and takes it off.
func closed(key, val []byte) []byte {
	c := crc32.Update(crc32.Checksum(key, castagnoli), castagnoli, val)
	return binary.BigEndian.AppendUint32(append(make([]byte, 0, len(val)+4), val...), c)
}

func open(key, val []byte) ([]byte, error) {
	n := len(val) - 4
	if n < 0 || crc32.Update(crc32.Checksum(key, castagnoli), castagnoli, val[:n]) != binary.BigEndian.Uint32(val[n:]) {
		return nil, fault.New(fault.Corrupt, "read raft vote", string(key), "the checksum does not match")
	}
	return append([]byte(nil), val[:n]...), nil
}
