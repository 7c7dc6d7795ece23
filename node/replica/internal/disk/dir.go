// Package disk is what a replica keeps on its own disk: who it is (a UUID), how often it has booted, the Raft log with a
// checksum per entry, the votes, and the snapshots. It opens them guardedly: damage is an error in words of kind
// fault.Corrupt, never a panic, and never a silent start from nothing.
package disk

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"rollcall/node/fault"
)

// Names inside the directory. They are part of the on-disk format: a released version must find them again.
const (
	lockFile        = "LOCK"
	idFile          = "node_id"
	incarnationFile = "incarnation"
	candidatesFile  = "bootstrap_candidates"
	clusterFile     = "cluster_id"
	logFile         = "raft.db"
	ringFile        = "keyring"
	markFile        = "raft.mark"
)

// Dir is the directory of one replica, locked for this process. It is made by OpenDir and released by Close.
type Dir struct {
	// Path is absolute.
	Path string
	// NodeID is the UUID that this directory was born with. It is the Raft ServerID.
	NodeID string
	// Incarnation counts the boots from this directory: 1 for the first. It is durable before OpenDir returns.
	Incarnation uint64

	lock *os.File
}

// OpenDir makes the directory if it is missing (0700), checks that nobody else can read it, takes its lock, and counts
// the boot. Errors: fault.Conflict when another process holds the lock, fault.Denied when the directory belongs to
// somebody else, fault.Corrupt when the files in it cannot be understood.
func OpenDir(path string) (*Dir, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, fault.As(fault.Invalid, err, "open data directory", path)
	}
	if err := os.MkdirAll(abs, 0o700); err != nil {
		return nil, fault.As(fault.Invalid, err, "make data directory", abs)
	}
	if err := private(abs); err != nil {
		return nil, err
	}
	d := &Dir{Path: abs}
	if err := d.takeLock(); err != nil {
		return nil, err
	}
	if err := d.identify(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// Close releases the lock.
func (d *Dir) Close() error {
	if d.lock == nil {
		return nil
	}
	err := d.lock.Close()
	d.lock = nil
	return err
}

// Candidates returns the server list that this directory has promised to bootstrap with, or nil.
func (d *Dir) Candidates() ([]string, error) {
	raw, err := os.ReadFile(filepath.Join(d.Path, candidatesFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault.As(fault.Internal, err, "read bootstrap candidates", d.Path)
	}
	return strings.Fields(string(raw)), nil
}

// PromiseCandidates makes the promise durable: this directory never bootstraps with another list.
func (d *Dir) PromiseCandidates(ids []string) error {
	return writeDurably(filepath.Join(d.Path, candidatesFile), []byte(strings.Join(ids, "\n")+"\n"))
}

// private refuses a directory of another owner and takes away what others may do in ours.
func private(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return fault.As(fault.Invalid, err, "check data directory", path)
	}
	if !info.IsDir() {
		return fault.New(fault.Invalid, "check data directory", path, "is not a directory")
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return fault.New(fault.Denied, "check data directory", path,
			"belongs to uid %d and this process runs as uid %d; run as its owner or chown it", st.Uid, os.Geteuid())
	}
	if info.Mode().Perm()&0o077 == 0 {
		return nil
	}
	if err := os.Chmod(path, 0o700); err != nil {
		return fault.As(fault.Denied, err, "make data directory private", path)
	}
	return nil
}

func (d *Dir) takeLock() error {
	path := filepath.Join(d.Path, lockFile)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return fault.As(fault.Invalid, err, "lock data directory", d.Path)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return fault.New(fault.Conflict, "lock data directory", d.Path,
				"another process uses it; stop that one, or give this one a directory of its own")
		}
		return fault.As(fault.Invalid, err, "lock data directory", d.Path)
	}
	d.lock = f
	return nil
}

func (d *Dir) identify() error {
	path := filepath.Join(d.Path, idFile)
	raw, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if _, err := os.Stat(filepath.Join(d.Path, logFile)); err == nil {
			return fault.New(fault.Corrupt, "read node id", path,
				"is missing beside an existing Raft log: the directory is damaged; restore it, or move it away to start as a new node")
		}
		d.NodeID = uuid.NewString()
		if err := writeDurably(path, wordLine(d.NodeID)); err != nil {
			return err
		}
	case err != nil:
		return fault.As(fault.Internal, err, "read node id", path)
	default:
		word, err := readWord(raw)
		if err != nil {
			return fault.Wrap(err, "read node id", path)
		}
		id, perr := uuid.Parse(word)
		if perr != nil {
			return fault.New(fault.Corrupt, "read node id", path, "holds no UUID: %w", perr)
		}
		d.NodeID = id.String()
	}
	return d.countBoot()
}

func (d *Dir) countBoot() error {
	path := filepath.Join(d.Path, incarnationFile)
	raw, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fault.As(fault.Internal, err, "read boot counter", path)
	}
	if err == nil {
		word, err := readWord(raw)
		if err != nil {
			return fault.Wrap(err, "read boot counter", path)
		}
		if d.Incarnation, err = strconv.ParseUint(word, 10, 64); err != nil {
			return fault.New(fault.Corrupt, "read boot counter", path, "holds no number: %w", err)
		}
	} else if _, serr := os.Stat(filepath.Join(d.Path, logFile)); serr == nil {
		return fault.New(fault.Corrupt, "read boot counter", path,
			"is missing beside an existing Raft log: a node must never reuse an incarnation; restore it, or move the directory away")
	}
	d.Incarnation++
	return writeDurably(path, wordLine(strconv.FormatUint(d.Incarnation, 10)))
}

// wordLine is how a word is kept in a file of its own: with a checksum, in one line.
func wordLine(word string) []byte {
	return fmt.Appendf(nil, "%s %08x\n", word, crc32.Checksum([]byte(word), castagnoli))
}

// readWord reads wordLine. A line without a checksum is one of before there were any.
func readWord(raw []byte) (string, error) {
	line, whole := strings.CutSuffix(string(raw), "\n")
	word, sum, has := strings.Cut(line, " ")
	if !whole || has && sum != fmt.Sprintf("%08x", crc32.Checksum([]byte(word), castagnoli)) {
		return "", fault.Text(fault.Corrupt, "the file is damaged: it is not a whole line with its checksum")
	}
	return word, nil
}

// writeDurably replaces a file so that after a power loss either the old or the new content is there.
func writeDurably(path string, content []byte) error {
	tmp := path + ".new"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return fault.As(fault.Internal, err, "write", path)
	}
	_, err = f.Write(content)
	if serr := f.Sync(); err == nil {
		err = serr
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	return fault.As(fault.Internal, err, "write", path)
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	err = dir.Sync()
	if cerr := dir.Close(); err == nil {
		err = cerr
	}
	return err
}

// ClusterID returns the id of the cluster that this directory belongs to, or "".
func (d *Dir) ClusterID() (string, error) {
	raw, err := os.ReadFile(filepath.Join(d.Path, clusterFile))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fault.As(fault.Internal, err, "read cluster id", d.Path)
	}
	word, err := readWord(raw)
	if err == nil {
		_, err = uuid.Parse(word)
	}
	if err != nil {
		return "", fault.New(fault.Corrupt, "read cluster id", d.Path, "holds no UUID: %w", err)
	}
	return word, nil
}

// SetClusterID makes the membership durable.
func (d *Dir) SetClusterID(id string) error {
	return writeDurably(filepath.Join(d.Path, clusterFile), wordLine(id))
}
