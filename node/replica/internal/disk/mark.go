package disk

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"rollcall/node/fault"
)

// mark remembers, beside the log, how far the log has come: its last entry, and the last term and vote. The log cannot say
// that itself: when a page of its file is what it was some transactions ago, because a disk has lost a write that it had
// acknowledged, or somebody has put an old copy back, what is left may be whole, and shorter. A node that votes with a log
// like that gives away what the cluster has acknowledged.
//
// It is written after the log, without waiting for the disk, so it costs a microsecond: a crash of this process leaves it
// exact, and a power loss at worst older than the log, which is no harm. Before the end of the log is cut off it is lowered,
// and that is waited for.
type mark struct {
	mu   sync.Mutex
	file *os.File
	at   reached
}

// reached is what a mark says.
type reached struct{ last, term, vote uint64 }

const markSize = 3*8 + 4

var (
	keyTerm = []byte("CurrentTerm")
	keyVote = []byte("LastVoteTerm")
)

// openMark opens the mark of a directory and compares it with what the log and the snapshots hold. A mark that is missing
// or cannot be read says nothing.
func openMark(dir string, held extent, snapshot uint64) (*mark, error) {
	path := filepath.Join(dir, markFile)
	raw, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fault.As(fault.Internal, err, "read log mark", path)
	}
	now := reached{max(held.Last, snapshot), held.Term, held.Vote}
	if was, ok := readMark(raw); ok && (now.last < was.last || now.term < was.term || now.vote < was.vote) {
		return nil, damaged(filepath.Join(dir, logFile), fault.Text(fault.Corrupt,
			"it ends at entry %d in term %d, vote %d, and had come to entry %d in term %d, vote %d: the disk has lost what it had acknowledged, "+
				"or an old copy was put back", now.last, now.term, now.vote, was.last, was.term, was.vote))
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fault.As(fault.Internal, err, "open log mark", path)
	}
	m := &mark{file: f}
	if err := m.write(now, false); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return m, nil
}

func readMark(raw []byte) (reached, bool) {
	if len(raw) != markSize || crc32.Checksum(raw[:24], castagnoli) != binary.BigEndian.Uint32(raw[24:]) {
		return reached{}, false
	}
	return reached{binary.BigEndian.Uint64(raw), binary.BigEndian.Uint64(raw[8:]), binary.BigEndian.Uint64(raw[16:])}, true
}

// write replaces the mark in place: it lies within one sector.
func (m *mark) write(to reached, wait bool) error {
	var raw [markSize]byte
	binary.BigEndian.PutUint64(raw[:], to.last)
	binary.BigEndian.PutUint64(raw[8:], to.term)
	binary.BigEndian.PutUint64(raw[16:], to.vote)
	binary.BigEndian.PutUint32(raw[24:], crc32.Checksum(raw[:24], castagnoli))
	_, err := m.file.WriteAt(raw[:], 0)
	if err == nil && wait {
		err = m.file.Sync()
	}
	if err != nil {
		return fault.As(fault.Internal, err, "write log mark", m.file.Name())
	}
	m.at = to
	return nil
}

// stored notes that the log ends at last. A mark that cannot be written stays behind, which is no harm.
func (m *mark) stored(last uint64) {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if to := m.at; last > to.last {
		to.last = last
		_ = m.write(to, false)
	}
}

// cut notes, durably, that the log may end at last from now on.
func (m *mark) cut(last uint64) error {
	if m == nil {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	to := m.at
	if to.last <= last {
		return nil
	}
	to.last = last
	return m.write(to, true)
}

// voted notes a term or a vote.
func (m *mark) voted(key []byte, n uint64) {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	to := m.at
	switch string(key) {
	case string(keyTerm):
		to.term = max(to.term, n)
	case string(keyVote):
		to.vote = max(to.vote, n)
	}
	if to != m.at {
		_ = m.write(to, false)
	}
}

func (m *mark) close() error {
	if m == nil {
		return nil
	}
	return m.file.Close()
}
