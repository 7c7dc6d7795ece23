package disk

import (
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/hashicorp/raft"

	"rollcall/node/fault"
	"rollcall/node/seal"
)

// Names that raft.FileSnapshotStore gives.
const (
	snapshotDir  = "snapshots"
	snapshotBody = "state.bin"
	snapshotMeta = "meta.json"
	snapshotTemp = ".tmp"
)

// snapshots is raft's store of snapshots, readable by their owner alone, and sealed where there is a vault. What a
// snapshot says of itself beside its state (index, term, members) is bound to the state: neither can be exchanged.
type snapshots struct {
	inner *raft.FileSnapshotStore
	dir   string
	vault *vault
}

var _ raft.SnapshotStore = (*snapshots)(nil)

// Create is raft.SnapshotStore's.
func (s *snapshots) Create(version raft.SnapshotVersion, index, term uint64, members raft.Configuration, membersIndex uint64,
	trans raft.Transport,
) (raft.SnapshotSink, error) {
	sink, err := s.inner.Create(version, index, term, members, membersIndex, trans)
	if err != nil {
		return nil, err
	}
	if err := s.private(sink.ID() + snapshotTemp); err != nil {
		return nil, errors.Join(err, sink.Cancel())
	}
	if s.vault == nil {
		return sink, nil
	}
	v := s.vault
	v.mu.Lock()
	defer v.mu.Unlock()
	w, id, err := v.ring.NewWriter(sink, placeOfSnapshot(&raft.SnapshotMeta{
		Version: version, Index: index, Term: term, Configuration: members, ConfigurationIndex: membersIndex,
	}))
	if err != nil {
		return nil, errors.Join(err, sink.Cancel())
	}
	v.sinks[id]++
	return &sealedSink{SnapshotSink: sink, w: w, release: func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		if v.sinks[id]--; v.sinks[id] == 0 {
			delete(v.sinks, id)
		}
	}}, nil
}

// private takes from others what raft gives them by the process's umask.
func (s *snapshots) private(name string) error {
	dir := filepath.Join(s.dir, name)
	return errors.Join(os.Chmod(dir, 0o700), os.Chmod(filepath.Join(dir, snapshotMeta), 0o600), os.Chmod(filepath.Join(dir, snapshotBody), 0o600))
}

// sealedSink seals what is written to it. Close and Cancel may be called more than once, as raft does.
type sealedSink struct {
	raft.SnapshotSink
	w       *seal.Writer
	release func()
	ended   bool
}

// Write is io.Writer's.
func (s *sealedSink) Write(p []byte) (int, error) { return s.w.Write(p) }

// Close ends the stream and keeps the snapshot; what cannot be ended is canceled.
func (s *sealedSink) Close() error {
	if s.ended {
		return s.SnapshotSink.Close()
	}
	if err := s.w.Close(); err != nil {
		return errors.Join(err, s.Cancel())
	}
	s.ended = true
	defer s.release()
	return s.SnapshotSink.Close()
}

// Cancel is raft.SnapshotSink's.
func (s *sealedSink) Cancel() error {
	if !s.ended {
		s.ended = true
		defer s.release()
	}
	return s.SnapshotSink.Cancel()
}

// List is raft.SnapshotStore's. Sizes are of the files; Open tells those of the states.
func (s *snapshots) List() ([]*raft.SnapshotMeta, error) { return s.inner.List() }

// Open is raft.SnapshotStore's. The size that it tells is the state's, which raft counts when it sends it.
func (s *snapshots) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	meta, body, err := s.inner.Open(id)
	if err != nil {
		return nil, nil, err
	}
	head, err := snapshotHead(s.dir, id)
	switch {
	case err != nil:
		return nil, nil, errors.Join(err, body.Close())
	case s.vault == nil && !seal.IsStream(head), s.vault != nil && !seal.IsStream(head) && s.vault.ring.Opening():
		return meta, body, nil
	case s.vault == nil:
		return nil, nil, errors.Join(fault.New(fault.Corrupt, "open snapshot", id, "it is sealed, and there is no key"), body.Close())
	case !seal.IsStream(head):
		return nil, nil, errors.Join(fault.New(fault.Corrupt, "open snapshot", id, "it is not sealed, and everything here is"), body.Close())
	}
	plain, err := s.vault.ring.NewReader(body, placeOfSnapshot(meta))
	if err != nil {
		return nil, nil, errors.Join(fault.Wrap(err, "open snapshot", id), body.Close())
	}
	meta.Size = seal.PlainSize(meta.Size)
	return meta, struct {
		io.Reader
		io.Closer
	}{plain, body}, nil
}

// check reads a whole snapshot: raft's store compares the checksum of what is in the file, and every sealed chunk
// proves itself.
func (s *snapshots) check(id string) error {
	meta, body, err := s.Open(id)
	if err != nil {
		return err
	}
	n, err := io.Copy(io.Discard, body)
	if err == nil && n != meta.Size {
		err = fault.New(fault.Corrupt, "open snapshot", id, "it has %d bytes, expected %d", n, meta.Size)
	}
	return errors.Join(err, body.Close())
}

// placeOfSnapshot is what a sealed state is bound to.
func placeOfSnapshot(m *raft.SnapshotMeta) []byte {
	b := []byte("snapshot")
	for _, n := range []uint64{uint64(m.Version), m.Index, m.Term, m.ConfigurationIndex, uint64(len(m.Configuration.Servers))} {
		b = binary.BigEndian.AppendUint64(b, n)
	}
	for _, server := range m.Configuration.Servers {
		b = append(b, byte(server.Suffrage))
		for _, text := range []string{string(server.ID), string(server.Address)} {
			b = append(binary.AppendUvarint(b, uint64(len(text))), text...)
		}
	}
	return b
}

// snapshotHead reads the beginning of a snapshot's state.
func snapshotHead(dir, id string) ([]byte, error) {
	f, err := os.Open(filepath.Join(dir, id, snapshotBody))
	if err != nil {
		return nil, fault.As(fault.Corrupt, err, "open snapshot", id)
	}
	defer func() { _ = f.Close() }()
	head := make([]byte, seal.HeaderSize)
	n, err := io.ReadFull(f, head)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, fault.As(fault.Corrupt, err, "open snapshot", id)
	}
	return head[:n], nil
}

// sealing says which data keys the snapshots on the disk need, and whether any is sealed and any is not.
type sealing struct {
	keys       map[uint32]bool
	any, plain bool
}

// sealedSnapshots looks at every snapshot that is whole, needing no key.
func sealedSnapshots(store *raft.FileSnapshotStore, dir string) (sealing, error) {
	out := sealing{keys: map[uint32]bool{}}
	metas, err := store.List()
	if err != nil {
		return out, fault.As(fault.Corrupt, err, "list snapshots", dir)
	}
	for _, m := range metas {
		head, err := snapshotHead(dir, m.ID)
		if err != nil {
			continue // told when it is opened
		}
		if id, ok := seal.RingKey(head); ok {
			out.keys[id], out.any = true, true
		} else {
			out.plain = true
		}
	}
	return out, nil
}

// removeUnfinished drops what a crash left of snapshots that were being written: nobody reads it, and it may be plain.
func removeUnfinished(dir string) error {
	names, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var errs []error
	for _, n := range names {
		if strings.HasSuffix(n.Name(), snapshotTemp) {
			errs = append(errs, os.RemoveAll(filepath.Join(dir, n.Name())))
		}
	}
	return errors.Join(errs...)
}
