package replica

import (
	"bufio"
	"io"
	"os"
	"time"

	"rollcall/node/fault"
	"rollcall/node/seal"
)

// rotateRetry is how long a rotation that failed waits: for room on the disk, or for a snapshot that lets old keys go.
const rotateRetry = 5 * time.Second

// KeyStatus tells how this node's disk is sealed; ok is false when it is not.
func (r *Replica) KeyStatus() (st seal.Status, ok bool) {
	if r.stores.Ring == nil {
		return seal.Status{}, false
	}
	return r.stores.Ring.Status(), true
}

// keepKeys gives the keyring a new data key whenever the state's key term is beyond the ring's, until the replica stops.
// It compares and remembers nothing: a node that was away rotates when it has caught up.
func (r *Replica) keepKeys() {
	ring := r.stores.Ring
	if ring == nil {
		return
	}
	for {
		changed := r.fsm.Changed()
		term, _ := r.fsm.View().KeyTerm()
		rotated, err := ring.Rotate(term)
		var again <-chan time.Time
		switch {
		case err != nil:
			r.log.Error("the data key is not rotated; it is tried again", "term", term, "error", err)
			again, changed = time.After(rotateRetry), nil
		case rotated:
			r.log.Info("a new data key seals what this node writes", "term", term, "keys", ring.Keys())
		}
		select {
		case <-r.ctx.Done():
			return
		case <-changed:
		case <-again:
		}
	}
}

// sealedBackup is where a backup is written to: sealed under a key of its own, which the seal key locks in its header,
// where this node has one. The caller closes it.
func (r *Replica) sealedBackup(w io.Writer) (io.WriteCloser, error) {
	if r.cfg.Keys == nil {
		return plainWriter{w}, nil
	}
	return r.cfg.Keys.Current.NewWriter(w, backupContext)
}

// backupContext is what sealed backups are bound to: nothing else opens as one.
var backupContext = []byte("rollcall backup")

type plainWriter struct{ io.Writer }

func (plainWriter) Close() error { return nil }

// openBackup opens a backup, sealed or not. fault.Invalid when it is sealed and none of this node's keys opens it, and the
// text names the key that would.
func (r *Replica) openBackup(backup io.Reader) (io.Reader, error) {
	in := bufio.NewReader(backup)
	head, err := in.Peek(seal.HeaderSize)
	if !seal.IsStream(head) {
		return in, nil // a plain one, or none: the state machine says which; an error comes again when it is read
	}
	if err != nil && len(head) < seal.HeaderSize {
		return nil, fault.As(fault.Corrupt, err, "read backup", "")
	}
	var keys seal.Keys
	if r.cfg.Keys != nil {
		keys = *r.cfg.Keys
	}
	plain, err := keys.NewReader(in, backupContext)
	if fault.Is(err, fault.Denied) {
		return nil, fault.As(fault.Invalid, err, "read backup", "")
	}
	return plain, err
}

// scratch is a file that holds a state for a moment. It has no name, and what stands in it is sealed with a key that only
// this process has: neither a crash nor a look at the disk gives it away.
type scratch struct {
	file *os.File
	key  *seal.Key
	w    *seal.Writer
	size int64
}

func newScratch(dir string) (*scratch, error) {
	file, err := os.CreateTemp(dir, "restore-*.tmp")
	if err != nil {
		return nil, fault.As(fault.Internal, err, "make scratch file", dir)
	}
	s := &scratch{file: file, key: seal.Ephemeral()}
	if err = os.Remove(file.Name()); err == nil {
		s.w, err = s.key.NewWriter(file, nil)
	}
	if err != nil {
		_ = file.Close()
		return nil, fault.As(fault.Internal, err, "make scratch file", dir)
	}
	return s, nil
}

// Write is io.Writer's.
func (s *scratch) Write(p []byte) (int, error) {
	n, err := s.w.Write(p)
	s.size += int64(n)
	return n, err
}

// rewind ends the writing and returns a reader of what was written.
func (s *scratch) rewind() (io.Reader, error) {
	if err := s.w.Close(); err != nil {
		return nil, fault.As(fault.Internal, err, "write scratch file", "")
	}
	if _, err := s.file.Seek(0, io.SeekStart); err != nil {
		return nil, fault.As(fault.Internal, err, "read scratch file", "")
	}
	return seal.Keys{Current: s.key}.NewReader(s.file, nil)
}

func (s *scratch) close() { _ = s.file.Close() }
