package disk

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/hashicorp/raft"
	"go.etcd.io/bbolt"

	"rollcall/node/fault"
	"rollcall/node/seal"
)

// sealBatch is how many entries go into the new log at once: as many as raft appends at most.
const sealBatch = 64

// sealAll seals a directory that was used without a key: every snapshot, and the log by writing a new file, because
// bbolt leaves what it has deleted in its free pages. A crash at any point is gone on from at the next start: the keyring
// says that this is under way until everything is sealed. What the file system keeps of removed files is beyond us.
func (d *Dir) sealAll(opts Options, snaps *snapshots) (extent, error) {
	opts.Logger.Info("sealing what this data directory holds unsealed", "path", d.Path)
	if err := removeUnfinished(snaps.dir); err != nil {
		return extent{}, err
	}
	if err := d.sealSnapshots(opts, snaps); err != nil {
		return extent{}, err
	}
	path := filepath.Join(d.Path, logFile)
	if _, err := os.Stat(path); err == nil {
		if err := sealLog(path, snaps.vault); err != nil {
			return extent{}, err
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return extent{}, err
	}
	held, err := verifyFile(path)
	if err != nil {
		return extent{}, err
	}
	if held.Plain > 0 {
		return extent{}, fault.New(fault.Internal, "seal raft log", path, "%d entries are still plain", held.Plain)
	}
	if err := snaps.vault.ring.Opened(); err != nil {
		return extent{}, err
	}
	opts.Logger.Info("this data directory is sealed", "path", d.Path, "entries", held.Last-held.First+1)
	return held, nil
}

// sealSnapshots writes every plain snapshot again, sealed, and removes the plain one. One that is damaged is removed too:
// that others suffice has been proved before.
func (d *Dir) sealSnapshots(opts Options, snaps *snapshots) error {
	// A store of its own that drops nothing by itself while both forms are there.
	all, err := raft.NewFileSnapshotStoreWithLogger(d.Path, 1<<20, opts.Logger)
	if err != nil {
		return err
	}
	metas, err := all.List()
	if err != nil {
		return err
	}
	_, trans := raft.NewInmemTransport("")
	defer func() { _ = trans.Close() }()
	to := &snapshots{inner: all, dir: snaps.dir, vault: snaps.vault}
	for _, m := range metas {
		head, err := snapshotHead(snaps.dir, m.ID)
		if err == nil && seal.IsStream(head) {
			continue
		}
		if err := to.sealOne(m, trans); err != nil {
			return fault.Wrap(err, "seal snapshot", m.ID)
		}
		if err := os.RemoveAll(filepath.Join(snaps.dir, m.ID)); err != nil {
			return err
		}
	}
	return syncDir(snaps.dir)
}

func (s *snapshots) sealOne(m *raft.SnapshotMeta, trans raft.Transport) error {
	_, body, err := s.inner.Open(m.ID)
	if err != nil {
		return nil // damaged
	}
	defer func() { _ = body.Close() }()
	sink, err := s.Create(m.Version, m.Index, m.Term, m.Configuration, m.ConfigurationIndex, trans)
	if err != nil {
		return err
	}
	if _, err := io.Copy(sink, body); err != nil {
		return errors.Join(err, sink.Cancel())
	}
	return sink.Close()
}

// sealLog replaces the log by one with the same entries and votes, sealed.
func sealLog(path string, v *vault) error {
	next := path + ".sealing"
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := copySealed(path, next, v); err != nil {
		return err
	}
	if err := os.Rename(next, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func copySealed(from, to string, v *vault) (err error) {
	old, err := bbolt.Open(from, 0o600, &bbolt.Options{Timeout: lockWait, ReadOnly: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, old.Close()) }()
	bolt, err := openBolt(to, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, bolt.Close()) }()
	err = old.View(func(tx *bbolt.Tx) error {
		if votes := tx.Bucket([]byte("conf")); votes != nil {
			if err := votes.ForEach(bolt.Set); err != nil { // with their checksums, as they stand
				return err
			}
		}
		logs := tx.Bucket([]byte("logs"))
		if logs == nil {
			return nil
		}
		var batch []*raft.Log
		flush := func() error {
			err := bolt.StoreLogs(batch)
			batch = batch[:0]
			return err
		}
		err := logs.ForEach(func(key, value []byte) error {
			log, err := checkRecord(key, value)
			if err != nil {
				return err
			}
			if _, sealed := seal.IsMark(log.Extensions); !sealed {
				log = v.lock([]*raft.Log{log})[0]
			}
			if batch = append(batch, stamp(log)); len(batch) < sealBatch {
				return nil
			}
			return flush()
		})
		return errors.Join(err, flush())
	})
	return errors.Join(err, bolt.Sync())
}
