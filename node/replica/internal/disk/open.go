package disk

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"go.etcd.io/bbolt"

	"rollcall/node/failpoint"
	"rollcall/node/fault"
	"rollcall/node/seal"
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
	// Keys are what the keyring is locked with. Nil: nothing is sealed, and a directory that is sealed is refused.
	Keys *seal.Keys
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
	// Ring seals what is in them; nil where nothing is sealed.
	Ring *seal.Ring
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
// snapshots meet without a gap. Damage is fault.Corrupt and says what to do. Nothing that is sound is ever deleted. With
// opts.Keys it opens the keyring too, and seals first what a directory holds unsealed; fault.Denied without the right
// key, fault.Invalid when the directory is sealed and there are no keys at all.
func (d *Dir) Open(opts Options) (*Stores, error) {
	if opts.Logger == nil {
		opts.Logger = hclog.NewNullLogger()
	}
	if opts.Backing != nil {
		if opts.Keys != nil {
			return nil, fault.New(fault.Invalid, "open data directory", d.Path, "what is no file cannot be sealed")
		}
		return d.stores(opts, opts.Backing, nil, nil)
	}
	backing, err := d.openFiles(opts)
	if err != nil {
		return nil, err
	}
	s, err := d.stores(opts, backing, backing.snapshots.vault, backing.mark)
	if err == nil && s.Ring != nil {
		backing.snapshots.vault.retire(s.Log.FirstIndex)
	}
	return s, err
}

// stores puts the checks and the watch on top of what keeps the bytes.
func (d *Dir) stores(opts Options, backing Backing, v *vault, m *mark) (*Stores, error) {
	var store raft.LogStore = backing
	if opts.Wrap != nil {
		store = opts.Wrap(store)
	}
	watch, stop := newWatch(opts.Limit), make(chan struct{})
	s := &Stores{
		Log:       &Log{inner: store, watch: watch, vault: v, mark: m, path: d.Path},
		Stable:    &Stable{inner: backing, watch: watch, path: d.Path, stop: stop, mark: m},
		Snapshots: backing.Snapshots(), backing: backing, stop: stop,
	}
	if failpoint.Enabled {
		s.Snapshots = brittle{s.Snapshots, d.Path}
	}
	if v != nil {
		s.Ring = v.ring
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
	snapshots *snapshots
	mark      *mark
}

// Close is Backing's.
func (f *files) Close() error { return errors.Join(f.BoltStore.Close(), f.mark.close()) }

// Snapshots is Backing's.
func (f *files) Snapshots() raft.SnapshotStore { return f.snapshots }

// openFiles opens and verifies what the directory holds.
func (d *Dir) openFiles(opts Options) (*files, error) {
	path := filepath.Join(d.Path, logFile)
	held, err := verifyFile(path)
	if err != nil {
		return nil, err
	}
	raw, err := d.openSnapshots(opts)
	if err != nil {
		return nil, err
	}
	v, err := d.openVault(opts, raw, held)
	if err != nil {
		return nil, err
	}
	snaps := &snapshots{inner: raw, dir: filepath.Join(d.Path, snapshotDir), vault: v}
	newest, err := checkSnapshots(d.Path, snaps, held)
	if err != nil {
		return nil, err
	}
	if v != nil && v.ring.Opening() {
		if held, err = d.sealAll(opts, snaps); err != nil {
			return nil, fault.Wrap(err, "seal data directory", d.Path)
		}
	}
	if v != nil {
		v.watchOver(held, snaps, opts.Logger)
	}
	var m *mark
	if !opts.NoSync { // else the log may be behind its mark after a power loss, and is meant to be
		if m, err = openMark(d.Path, held, newest); err != nil {
			return nil, err
		}
	}
	bolt, err := openBolt(path, opts.NoSync)
	if err != nil {
		return nil, errors.Join(err, m.close())
	}
	return &files{bolt, snaps, m}, nil
}

func openBolt(path string, noSync bool) (bolt *raftboltdb.BoltStore, err error) {
	err = Guarded("open raft log", path, func() (err error) {
		bolt, err = raftboltdb.New(raftboltdb.Options{
			Path:   path,
			NoSync: noSync,
			BoltOptions: &bbolt.Options{
				Timeout: lockWait, NoFreelistSync: true, FreelistType: bbolt.FreelistMapType,
			},
			MsgpackUseNewTimeFormat: true,
		})
		return err
	})
	return bolt, fault.Wrap(err, "open raft log", path)
}

// brittle is a snapshot store with failpoints.
type brittle struct {
	raft.SnapshotStore
	path string // of the directory
}

// Create is raft.SnapshotStore's.
func (b brittle) Create(
	version raft.SnapshotVersion, index, term uint64, c raft.Configuration, configIndex uint64, trans raft.Transport,
) (raft.SnapshotSink, error) {
	if err := failpoint.Hit(failpoint.DiskSnapshotCreate, b.path); err != nil {
		return nil, err
	}
	return b.SnapshotStore.Create(version, index, term, c, configIndex, trans)
}

// Open is raft.SnapshotStore's.
func (b brittle) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	if err := failpoint.Hit(failpoint.DiskSnapshotOpen, b.path); err != nil {
		return nil, nil, err
	}
	return b.SnapshotStore.Open(id)
}

func damaged(path string, cause error) error {
	return fault.New(fault.Corrupt, "verify raft log", path,
		"the file is damaged (%w). The other members hold the same entries: move this node's data directory away "+
			"and start it again under the same name, and it rejoins as a replaced disk", cause)
}

// openSnapshots opens raft's own store of snapshots.
func (d *Dir) openSnapshots(opts Options) (*raft.FileSnapshotStore, error) {
	store, err := raft.NewFileSnapshotStoreWithLogger(d.Path, max(opts.Retain, 2), opts.Logger)
	if err != nil {
		return nil, fault.As(fault.Invalid, err, "open snapshots", d.Path)
	}
	if err := os.Chmod(filepath.Join(d.Path, snapshotDir), 0o700); err != nil {
		return nil, fault.As(fault.Invalid, err, "open snapshots", d.Path)
	}
	return store, nil
}

// checkSnapshots proves that some readable snapshot reaches the log's first entry, and returns the newest readable one.
func checkSnapshots(path string, store *snapshots, held extent) (newest uint64, err error) {
	metas, err := store.List()
	if err != nil {
		return 0, fault.As(fault.Corrupt, err, "list snapshots", path)
	}
	var broken []error
	for _, m := range metas {
		if err := store.check(m.ID); err != nil {
			broken = append(broken, fmt.Errorf("snapshot %s: %w", m.ID, err))
			continue
		}
		newest = max(newest, m.Index)
	}
	if len(metas) > 0 && len(broken) == len(metas) || held.First > newest+1 {
		return 0, fault.New(fault.Corrupt, "open snapshots", path,
			"no readable snapshot reaches the log's first entry %d (last entry %d, best snapshot %d): %w. "+
				"Move this node's data directory away and start it again under the same name", held.First, held.Last, newest,
			errors.Join(append(broken, errors.New("the state between them is not on this disk"))...))
	}
	return newest, nil
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
