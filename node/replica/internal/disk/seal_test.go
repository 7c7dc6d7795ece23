package disk

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"

	"rollcall/node/fault"
	"rollcall/node/seal"
)

const canary = "canary-7d1f0c"

func keysOf(current *seal.Key, previous ...*seal.Key) *seal.Keys {
	return &seal.Keys{Current: current, Previous: previous}
}

func openSealed(path string, keys *seal.Keys) (*Stores, func() error, error) {
	d, err := OpenDir(path)
	if err != nil {
		return nil, nil, err
	}
	s, err := d.Open(Options{NoSync: true, Limit: time.Second, Keys: keys})
	if err != nil {
		return nil, nil, errors.Join(err, d.Close())
	}
	return s, func() error { return errors.Join(s.Close(), d.Close()) }, nil
}

func mustOpenSealed(t testing.TB, path string, keys *seal.Keys) (*Stores, func()) {
	t.Helper()
	s, done, err := openSealed(path, keys)
	if err != nil {
		t.Fatal(err)
	}
	return s, func() {
		t.Helper()
		if err := done(); err != nil {
			t.Error(err)
		}
	}
}

// secrets are entries that each hold the canary, some with extensions.
func secrets(from, to uint64) []*raft.Log {
	out := entries(from, to)
	for _, l := range out {
		l.Data = append([]byte(canary+" "), l.Data...)
		if l.Index%7 == 0 {
			l.Extensions = []byte("ext " + canary)
		}
	}
	return out
}

func snapshotOf(t testing.TB, s *Stores, index uint64, text string) string {
	t.Helper()
	_, trans := raft.NewInmemTransport("")
	defer trans.Close()
	sink, err := s.Snapshots.Create(1, index, 1, members("a", "b"), 1, trans)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(sink, text); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(sink.Close(), sink.Close()); err != nil {
		t.Fatal(err)
	}
	return sink.ID()
}

func members(ids ...string) (c raft.Configuration) {
	for _, id := range ids {
		c.Servers = append(c.Servers, raft.Server{ID: raft.ServerID(id), Address: raft.ServerAddress(id + ":8201")})
	}
	return c
}

func holds(t testing.TB, s *Stores, want []*raft.Log) {
	t.Helper()
	for _, w := range want {
		var got raft.Log
		if err := s.Log.GetLog(w.Index, &got); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got.Data, w.Data) || !bytes.Equal(got.Extensions, w.Extensions) || got.Term != w.Term || got.Type != w.Type {
			t.Fatalf("entry %d came back as %+v", w.Index, got)
		}
	}
}

func holdsSnapshot(t testing.TB, s *Stores, id, want string) {
	t.Helper()
	meta, body, err := s.Snapshots.Open(id)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	got, err := io.ReadAll(body)
	if err != nil || string(got) != want || meta.Size != int64(len(want)) {
		t.Fatalf("snapshot %s: %d bytes of %d, told %d, %v", id, len(got), len(want), meta.Size, err)
	}
}

// findIn lists the files that hold the text or its hexadecimal form.
func findIn(t testing.TB, dir, text string) (found []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		raw, err := os.ReadFile(path)
		if bytes.Contains(raw, []byte(text)) || bytes.Contains(raw, []byte(hex.EncodeToString([]byte(text)))) {
			found = append(found, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestASealedDirectoryShowsNothingAndComesBackWithItsKey(t *testing.T) {
	path, key := t.TempDir(), seal.Ephemeral()
	s, done := mustOpenSealed(t, path, keysOf(key))
	in := secrets(1, 300)
	if err := s.Log.StoreLogs(in); err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(in[8].Data, []byte(canary)) || !bytes.Contains(in[6].Extensions, []byte(canary)) {
		t.Error("storing changed the caller's entries")
	}
	text := strings.Repeat(canary+" ", 20_000)
	id := snapshotOf(t, s, 300, text)
	holds(t, s, in)
	done()
	if found := findIn(t, path, canary); len(found) > 0 {
		t.Errorf("readable in %v", found)
	}
	s, done = mustOpenSealed(t, path, keysOf(key))
	holds(t, s, in)
	holdsSnapshot(t, s, id, text)
	done()

	other := seal.Ephemeral()
	for name, c := range map[string]struct {
		keys *seal.Keys
		kind fault.Kind
		says string
	}{
		"with another key": {keysOf(other), fault.Denied, key.ID()},
		"without a key":    {nil, fault.Invalid, "no seal block"},
	} {
		if _, _, err := openSealed(path, c.keys); !fault.Is(err, c.kind) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
	s, done = mustOpenSealed(t, path, keysOf(other, key)) // the key is replaced
	holds(t, s, in)
	done()
	s, done = mustOpenSealed(t, path, keysOf(other))
	holdsSnapshot(t, s, id, text)
	done()

	ring := filepath.Join(path, ringFile)
	good, err := os.ReadFile(ring)
	if err != nil {
		t.Fatal(err)
	}
	bad := bytes.Clone(good)
	bad[len(bad)/2] ^= 1
	if err := os.WriteFile(ring, bad, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := openSealed(path, keysOf(other)); !fault.Is(err, fault.Corrupt) || !strings.Contains(err.Error(), "keyring is damaged") {
		t.Errorf("a damaged keyring: %v", err)
	}
	if err := os.Remove(ring); err != nil {
		t.Fatal(err)
	}
	if _, _, err := openSealed(path, keysOf(other)); !fault.Is(err, fault.Corrupt) || !strings.Contains(err.Error(), "it is missing") {
		t.Errorf("no keyring: %v", err)
	}
	if _, _, err := openSealed(path, nil); !fault.Is(err, fault.Invalid) {
		t.Errorf("neither keyring nor key: %v", err)
	}
}

func TestEverythingInTheDirectoryIsForItsOwnerOnly(t *testing.T) {
	for _, keys := range []*seal.Keys{nil, keysOf(seal.Ephemeral())} {
		path := filepath.Join(t.TempDir(), "data")
		s, done := mustOpenSealed(t, path, keys)
		if err := s.Log.StoreLogs(entries(1, 3)); err != nil {
			t.Fatal(err)
		}
		snapshotOf(t, s, 3, "state")
		_, trans := raft.NewInmemTransport("")
		sink, err := s.Snapshots.Create(1, 3, 1, members("a"), 1, trans) // and while one is written
		if err != nil {
			t.Fatal(err)
		}
		seen := 0
		err = filepath.WalkDir(path, func(p string, e fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			info, err := e.Info()
			if err == nil && info.Mode().Perm()&0o077 != 0 {
				t.Errorf("%s has mode %v", p, info.Mode())
			}
			seen++
			return err
		})
		if err != nil || seen < 10 {
			t.Errorf("%d files, %v", seen, err)
		}
		if err := errors.Join(sink.Cancel(), sink.Cancel(), trans.Close()); err != nil {
			t.Error(err)
		}
		done()
	}
}

// What was put into the file by somebody without the key is refused, however well the checksums fit.
func TestAnEntryThatTheKeyDidNotSealIsRefused(t *testing.T) {
	f := ringPlace{filepath.Join(t.TempDir(), ringFile)}
	ring, err := seal.NewRing(f, "node", *keysOf(seal.Ephemeral()), false)
	if err != nil {
		t.Fatal(err)
	}
	inner := raft.NewInmemStore()
	l := &Log{inner: inner, watch: newWatch(time.Second), vault: &vault{ring: ring, last: map[uint32]uint64{}}}
	if err := l.StoreLogs(secrets(1, 20)); err != nil {
		t.Fatal(err)
	}
	raw := func(i uint64) *raft.Log {
		var log raft.Log
		if err := inner.GetLog(i, &log); err != nil {
			t.Fatal(err)
		}
		if err := verify(&log); err != nil {
			t.Fatal(err)
		}
		return &log
	}
	good := raw(7)
	forge := map[string]func() *raft.Log{
		"plain":            func() *raft.Log { return &raft.Log{Index: 7, Term: 1, Data: []byte("mine")} },
		"of another place": func() *raft.Log { c := *raw(8); c.Index = 7; return &c },
		"of another term":  func() *raft.Log { c := *good; c.Term++; return &c },
		"of another type":  func() *raft.Log { c := *good; c.Type = raft.LogConfiguration; return &c },
		"cut":              func() *raft.Log { c := *good; c.Data = c.Data[:len(c.Data)-1]; return &c },
		"empty":            func() *raft.Log { c := *good; c.Data = nil; return &c },
	}
	for name, make := range forge {
		if err := inner.StoreLog(stamp(make())); err != nil {
			t.Fatal(err)
		}
		if err := l.GetLog(7, &raft.Log{}); !fault.Is(err, fault.Corrupt) {
			t.Errorf("an entry that is %s: %v", name, err)
		}
	}
	if err := inner.StoreLog(stamp(good)); err != nil {
		t.Fatal(err)
	}
	if err := l.GetLog(7, &raft.Log{}); err != nil {
		t.Errorf("the right one again: %v", err)
	}
}

func TestAPlainEntryInASealedLogStopsTheStart(t *testing.T) {
	path, keys := t.TempDir(), keysOf(seal.Ephemeral())
	s, done := mustOpenSealed(t, path, keys)
	if err := s.Log.StoreLogs(entries(1, 9)); err != nil {
		t.Fatal(err)
	}
	if err := s.backing.StoreLog(stamp(entries(10, 10)[0])); err != nil {
		t.Fatal(err)
	}
	done()
	if _, _, err := openSealed(path, keys); !fault.Is(err, fault.Corrupt) || !strings.Contains(err.Error(), "1 entries are not sealed") {
		t.Errorf("%v", err)
	}
}

func TestASnapshotAndWhatItSaysOfItselfBelongTogether(t *testing.T) {
	path, keys := t.TempDir(), keysOf(seal.Ephemeral())
	s, done := mustOpenSealed(t, path, keys)
	if err := s.Log.StoreLogs(entries(1, 90)); err != nil {
		t.Fatal(err)
	}
	a, b := snapshotOf(t, s, 50, "state at 50"), snapshotOf(t, s, 80, "state at 80")
	done()
	file := func(id, name string) string { return filepath.Join(path, snapshotDir, id, name) }
	read := func(name string) []byte {
		raw, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	write := func(name string, raw []byte) {
		if err := os.WriteFile(name, raw, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	meta, body := read(file(b, snapshotMeta)), read(file(b, snapshotBody))
	edit := func(change func(m map[string]any)) []byte {
		var m map[string]any
		d := json.NewDecoder(bytes.NewReader(meta))
		d.UseNumber()
		if err := d.Decode(&m); err != nil {
			t.Fatal(err)
		}
		change(m)
		raw, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	var older map[string]any
	if err := json.Unmarshal(read(file(a, snapshotMeta)), &older); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ meta, body []byte }{
		"another index":   {edit(func(m map[string]any) { m["Index"] = 81 }), body},
		"another term":    {edit(func(m map[string]any) { m["Term"] = 2 }), body},
		"another member":  {bytes.ReplaceAll(meta, []byte("a:8201"), []byte("e:8201")), body},
		"an older state":  {edit(func(m map[string]any) { m["CRC"] = older["CRC"] }), read(file(a, snapshotBody))},
		"a shorter state": {meta, body[:len(body)-1]},
	} {
		write(file(b, snapshotMeta), c.meta)
		write(file(b, snapshotBody), c.body)
		s, done := mustOpenSealed(t, path, keys) // the older one still reaches the log
		if _, in, err := s.Snapshots.Open(b); err == nil {
			if _, err = io.ReadAll(in); err == nil {
				t.Errorf("%s: nobody noticed", name)
			}
			_ = in.Close()
		}
		if err := s.Snapshots.(*snapshots).check(b); err == nil {
			t.Errorf("%s: not noticed at the start", name)
		}
		done()
	}
	write(file(b, snapshotMeta), meta)
	write(file(b, snapshotBody), body)
	s, done = mustOpenSealed(t, path, keys)
	defer done()
	holdsSnapshot(t, s, b, "state at 80")
}

func TestARotatedKeyStaysAsLongAsAnythingNeedsIt(t *testing.T) {
	path, keys := t.TempDir(), keysOf(seal.Ephemeral())
	s, done := mustOpenSealed(t, path, keys)
	all := secrets(1, 100)
	must := func(errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(n int, when string) {
		t.Helper()
		if got := s.Ring.Keys(); got != n {
			t.Errorf("%s: %d data keys, want %d", when, got, n)
		}
	}
	must(s.Log.StoreLogs(all[:50]))
	old := snapshotOf(t, s, 40, "under the first key")
	if rotated, err := s.Ring.Rotate(2); !rotated || err != nil {
		t.Fatal(rotated, err)
	}
	must(s.Log.StoreLogs(all[50:]))
	holds(t, s, all)
	done()
	s, done = mustOpenSealed(t, path, keys)
	holds(t, s, all)
	holdsSnapshot(t, s, old, "under the first key")
	expect(2, "after a restart")

	snapshotOf(t, s, 70, "under the second key")
	must(s.Log.DeleteRange(1, 60))
	expect(2, "while a snapshot needs it")
	_, trans := raft.NewInmemTransport("")
	defer trans.Close()
	newest := snapshotOf(t, s, 90, "under the second key too") // the oldest is dropped
	must(s.Log.DeleteRange(61, 65))
	expect(1, "when nothing needs it")
	holds(t, s, all[65:])

	if _, err := s.Ring.Rotate(3); err != nil {
		t.Fatal(err)
	}
	sink, err := s.Snapshots.Create(1, 95, 1, members("a"), 1, trans)
	must(err)
	if _, err := s.Ring.Rotate(4); err != nil {
		t.Fatal(err)
	}
	must(s.Log.DeleteRange(66, 68))
	expect(3, "while a snapshot is written with it")
	must(sink.Cancel())
	must(s.Log.DeleteRange(69, 70))
	expect(2, "when that was given up")
	done()
	s, done = mustOpenSealed(t, path, keys)
	defer done()
	holds(t, s, all[70:])
	holdsSnapshot(t, s, newest, "under the second key too")
}

// plainDirectory is a directory as a node without a key leaves it, with deleted entries in bbolt's free pages and a
// snapshot that a crash left half written. It returns what must come back.
func plainDirectory(t *testing.T, path string) []*raft.Log {
	t.Helper()
	s, done := mustOpenSealed(t, path, nil)
	all := secrets(1, 400)
	for i := 0; i < 400; i += 50 {
		if err := s.Log.StoreLogs(all[i : i+50]); err != nil {
			t.Fatal(err)
		}
	}
	snapshotOf(t, s, 150, "old "+canary)
	snapshotOf(t, s, 200, strings.Repeat(canary, 10_000))
	if err := errors.Join(s.Log.DeleteRange(1, 120), s.Stable.SetUint64([]byte("CurrentTerm"), 9), s.Stable.Set([]byte("LastVoteCand"), []byte("a"))); err != nil {
		t.Fatal(err)
	}
	_, trans := raft.NewInmemTransport("")
	defer trans.Close()
	sink, err := s.Snapshots.Create(1, 300, 1, members("a"), 1, trans)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(sink, strings.Repeat(canary, 10_000)); err != nil {
		t.Fatal(err)
	}
	done()
	if found := findIn(t, path, canary); len(found) < 4 {
		t.Fatalf("the canary is only in %v: this test does not test", found)
	}
	return all[120:]
}

func checkMoved(t *testing.T, path string, keys *seal.Keys, want []*raft.Log) {
	t.Helper()
	s, done := mustOpenSealed(t, path, keys)
	defer done()
	if found := findIn(t, path, canary); len(found) > 0 {
		t.Errorf("readable in %v", found)
	}
	holds(t, s, want)
	if first, err := s.Log.FirstIndex(); err != nil || first != want[0].Index {
		t.Errorf("first index %d, %v", first, err)
	}
	if v, err := s.Stable.GetUint64([]byte("CurrentTerm")); err != nil || v != 9 {
		t.Errorf("term %d, %v", v, err)
	}
	metas, err := s.Snapshots.List()
	if err != nil || len(metas) != 2 || metas[0].Index != 200 || metas[1].Index != 150 {
		t.Fatalf("snapshots %+v, %v", metas, err)
	}
	holdsSnapshot(t, s, metas[0].ID, strings.Repeat(canary, 10_000))
	holdsSnapshot(t, s, metas[1].ID, "old "+canary)
	if s.Ring.Opening() {
		t.Error("unsealed things are still believed")
	}
}

func TestAPlainDirectoryIsSealedWhenItIsGivenAKey(t *testing.T) {
	path, keys := t.TempDir(), keysOf(seal.Ephemeral())
	want := plainDirectory(t, path)
	checkMoved(t, path, keys, want)
	checkMoved(t, path, keys, want)
}

func TestSealingAPlainDirectoryGoesOnAfterACrash(t *testing.T) {
	for name, crash := range map[string]func(d *Dir, s *snapshots) error{
		"before anything": func(*Dir, *snapshots) error { return nil },
		"after one snapshot": func(d *Dir, s *snapshots) error {
			metas, err := s.List()
			if err != nil {
				return err
			}
			_, trans := raft.NewInmemTransport("")
			defer trans.Close()
			return s.sealOne(metas[1], trans) // the plain one is still there
		},
		"after the snapshots": func(d *Dir, s *snapshots) error {
			return d.sealSnapshots(Options{Logger: hclog.NewNullLogger()}, s)
		},
		"in the middle of the log": func(d *Dir, s *snapshots) error {
			return os.WriteFile(filepath.Join(d.Path, logFile+".sealing"), []byte("half"), 0o600)
		},
		"after the log": func(d *Dir, s *snapshots) error {
			return sealLog(filepath.Join(d.Path, logFile), s.vault)
		},
	} {
		t.Run(name, func(t *testing.T) {
			path, keys := t.TempDir(), keysOf(seal.Ephemeral())
			want := plainDirectory(t, path)
			d, err := OpenDir(path)
			if err != nil {
				t.Fatal(err)
			}
			opts := Options{Keys: keys, Logger: hclog.NewNullLogger()}
			held, err := verifyFile(filepath.Join(path, logFile))
			if err != nil {
				t.Fatal(err)
			}
			raw, err := d.openSnapshots(Options{Logger: hclog.NewNullLogger(), Retain: 10})
			if err != nil {
				t.Fatal(err)
			}
			v, err := d.openVault(opts, raw, held)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(crash(d, &snapshots{inner: raw, dir: filepath.Join(path, snapshotDir), vault: v}), d.Close()); err != nil {
				t.Fatal(err)
			}
			checkMoved(t, path, keys, want)
		})
	}
}

// The checks that need no key find every flipped bit of a sealed log as well.
func TestNoFlippedBitOfASealedLogIsSilent(t *testing.T) {
	path, keys := t.TempDir(), keysOf(seal.Ephemeral())
	s, done := mustOpenSealed(t, path, keys)
	want := secrets(1, 120)
	if err := s.Log.StoreLogs(want); err != nil {
		t.Fatal(err)
	}
	done()
	file := filepath.Join(path, logFile)
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	told := 0
	for bit := 3; bit < len(good)*8; bit += len(good)*8/160 + 1 {
		bad := bytes.Clone(good)
		bad[bit/8] ^= 1 << (bit % 8)
		if err := os.WriteFile(file, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		s, done, err := openSealed(path, keys)
		if err != nil {
			told++
			continue
		}
		holds(t, s, want)
		if err := done(); err != nil {
			t.Fatal(err)
		}
	}
	if told < 10 {
		t.Errorf("%d told: the test does not test", told)
	}
}

// BenchmarkStoreLogs compares sealed with plain: batches of 64 entries, as raft appends them at most, without fsync,
// which would hide everything else.
func BenchmarkStoreLogs(b *testing.B) {
	for _, size := range []int{200, 4 << 10, 64 << 10} {
		for _, c := range []struct {
			name string
			keys *seal.Keys
		}{{"plain", nil}, {"sealed", keysOf(seal.Ephemeral())}} {
			b.Run(fmt.Sprintf("%d/%s", size, c.name), func(b *testing.B) {
				s, done := mustOpenSealed(b, b.TempDir(), c.keys)
				defer done()
				batch := make([]*raft.Log, 64)
				b.SetBytes(int64(64 * size))
				next := uint64(1)
				for b.Loop() {
					for i := range batch {
						batch[i] = &raft.Log{Index: next, Term: 1, Data: make([]byte, size)}
						next++
					}
					if err := s.Log.StoreLogs(batch); err != nil {
						b.Fatal(err)
					}
					if next > 4096 { // the file stays small
						if err := s.Log.DeleteRange(1, next-1); err != nil {
							b.Fatal(err)
						}
						next = 1
					}
				}
			})
		}
	}
}
