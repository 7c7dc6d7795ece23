package disk

import (
	"errors"
	"fmt"
	"path/filepath"
	"runtime/debug"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"go.etcd.io/bbolt"

	"rollcall/node/fault"
)

// lockWait bounds how long bbolt waits for its own file lock. Ours on the directory is held already, so a wait means
// that a foreign tool has the file open.
const lockWait = 2 * time.Second

// Options of Open.
type Options struct {
	// Limit is how long one write may take before OnSlow is called; see Log.
	Limit time.Duration
	// NoSync leaves out fdatasync. For tests and `dev` only: a power loss then loses acknowledged entries.
	NoSync bool
	// Retain is how many snapshots are kept; at least 2, so that one damaged file is survivable.
	Retain int
	// Logger is for the snapshot store.
	Logger hclog.Logger
	// Wrap, when set, is put beneath the checks: tests slow or break the store with it.
	Wrap func(raft.LogStore) raft.LogStore
	// Backing keeps log, votes and snapshots in place of files. Close closes it.
	Backing Backing
}

// Backing is what keeps log, votes and snapshots beneath the checks of this package: files of the directory, or what a
// simulation gives in their place.
type Backing interface {
	raft.LogStore
	raft.StableStore
	Snapshots() raft.SnapshotStore
	Close() error
}

// Stores is everything that raft.NewRaft wants of a disk.
type Stores struct {
	Log       *Log
	Stable    *Stable
	Snapshots raft.SnapshotStore
	// HasState is true when the directory has ever taken part in a cluster.
	HasState bool

	backing Backing
	stop    chan struct{}
	once    sync.Once
}

// Release ends waits for a full disk. Call it before Raft is shut down.
func (s *Stores) Release() { s.once.Do(func() { close(s.stop) }) }

// Close closes the log. Raft must be shut down before.
func (s *Stores) Close() error {
	s.Release()
	return s.backing.Close()
}

// Open opens and verifies the stores: the B+tree, the checksum of every entry, the snapshots, and that log and
// snapshots meet without a gap. Damage is fault.Corrupt and says what to do. Nothing is ever deleted.
func (d *Dir) Open(opts Options) (*Stores, error) {
	backing := opts.Backing
	if backing == nil {
		var err error
		if backing, err = d.openFiles(opts); err != nil {
			return nil, err
		}
	}
	var store raft.LogStore = backing
	if opts.Wrap != nil {
		store = opts.Wrap(store)
	}
	watch, stop := newWatch(opts.Limit), make(chan struct{})
	s := &Stores{
		Log: &Log{inner: store, watch: watch}, Stable: &Stable{inner: backing, watch: watch, stop: stop},
		Snapshots: backing.Snapshots(), backing: backing, stop: stop,
	}
	var err error
	if s.HasState, err = raft.HasExistingState(s.Log, s.Stable, s.Snapshots); err != nil {
		return nil, errors.Join(fault.As(fault.Corrupt, err, "look for raft state", d.Path), backing.Close())
	}
	return s, nil
}

// files is the backing in the data directory: log and votes in one bbolt file, a directory a snapshot.
type files struct {
	*raftboltdb.BoltStore
	snapshots raft.SnapshotStore
}

func (f files) Snapshots() raft.SnapshotStore { return f.snapshots }

// openFiles opens and verifies what the directory holds.
func (d *Dir) openFiles(opts Options) (Backing, error) {
	path := filepath.Join(d.Path, logFile)
	held, err := verifyFile(path)
	if err != nil {
		return nil, err
	}
	snaps, err := d.openSnapshots(opts, held)
	if err != nil {
		return nil, err
	}
	var bolt *raftboltdb.BoltStore
	err = Guarded("open raft log", path, func() (err error) {
		bolt, err = raftboltdb.New(raftboltdb.Options{
			Path:   path,
			NoSync: opts.NoSync,
			BoltOptions: &bbolt.Options{
				Timeout: lockWait, NoFreelistSync: true, FreelistType: bbolt.FreelistMapType,
			},
			MsgpackUseNewTimeFormat: true,
		})
		return err
	})
	if err != nil {
		return nil, fault.Wrap(err, "open raft log", path)
	}
	return files{bolt, snaps}, nil
}

func damaged(path string, cause error) error {
	return fault.New(fault.Corrupt, "verify raft log", path,
		"the file is damaged (%w). The other members hold the same entries: move this node's data directory away "+
			"and start it again under the same name, and it rejoins as a replaced disk", cause)
}

// openSnapshots opens the store and proves that some readable snapshot reaches the log's first entry.
func (d *Dir) openSnapshots(opts Options, held extent) (raft.SnapshotStore, error) {
	logger := opts.Logger
	if logger == nil {
		logger = hclog.NewNullLogger()
	}
	store, err := raft.NewFileSnapshotStoreWithLogger(d.Path, max(opts.Retain, 2), logger)
	if err != nil {
		return nil, fault.As(fault.Invalid, err, "open snapshots", d.Path)
	}
	metas, err := store.List()
	if err != nil {
		return nil, fault.As(fault.Corrupt, err, "list snapshots", d.Path)
	}
	var newest uint64
	var broken []error
	for _, m := range metas {
		_, body, err := store.Open(m.ID) // Open reads it all and compares the checksum
		if err != nil {
			broken = append(broken, fmt.Errorf("snapshot %s: %w", m.ID, err))
			continue
		}
		_ = body.Close()
		newest = max(newest, m.Index)
	}
	if len(metas) > 0 && len(broken) == len(metas) || held.First > newest+1 {
		return nil, fault.New(fault.Corrupt, "open snapshots", d.Path,
			"no readable snapshot reaches the log's first entry %d (last entry %d, best snapshot %d): %w. "+
				"Move this node's data directory away and start it again under the same name", held.First, held.Last, newest,
			errors.Join(append(broken, errors.New("the state between them is not on this disk"))...))
	}
	return store, nil
}

// Guarded runs f so that a panic in it, and a fault on memory-mapped bytes that the file no longer has, come back as
// fault.Corrupt. It is for reading files that others may have damaged.
func Guarded(op, subject string, f func() error) (err error) {
	old := debug.SetPanicOnFault(true)
	defer debug.SetPanicOnFault(old)
	defer func() {
		if p := recover(); p != nil {
			err = fault.New(fault.Corrupt, op, subject, "the file is damaged: %v", p)
		}
	}()
	return f()
}
