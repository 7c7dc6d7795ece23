package disk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/raft"

	"rollcall/node/fault"
)

func openStores(t testing.TB, path string) (*Dir, *Stores, error) {
	t.Helper()
	return openStoresWith(t, path, Options{NoSync: true, Limit: time.Second})
}

func openStoresWith(t testing.TB, path string, opts Options) (*Dir, *Stores, error) {
	t.Helper()
	d, err := OpenDir(path)
	if err != nil {
		return nil, nil, err
	}
	s, err := d.Open(opts)
	if err != nil {
		if cerr := d.Close(); cerr != nil {
			t.Fatal(cerr)
		}
		return nil, nil, err
	}
	return d, s, nil
}

func mustOpen(t testing.TB, path string) (*Stores, func()) {
	t.Helper()
	return mustOpenWith(t, path, Options{NoSync: true, Limit: time.Second})
}

func mustOpenWith(t testing.TB, path string, opts Options) (*Stores, func()) {
	t.Helper()
	d, s, err := openStoresWith(t, path, opts)
	if err != nil {
		t.Fatal(err)
	}
	return s, func() {
		if err := errors.Join(s.Close(), d.Close()); err != nil {
			t.Error(err)
		}
	}
}

func entries(from, to uint64) []*raft.Log {
	var out []*raft.Log
	for i := from; i <= to; i++ {
		out = append(out, &raft.Log{
			Index: i, Term: 1 + i/50, Type: raft.LogCommand, Data: fmt.Appendf(nil, "entry %d %s", i, strings.Repeat("x", int(i%97))),
		})
	}
	return out
}

func TestEntriesComeBackAsTheyWereStored(t *testing.T) {
	path := t.TempDir()
	s, done := mustOpen(t, path)
	in := entries(1, 300)
	in[7].Extensions = []byte("ours")
	if err := s.Log.StoreLogs(in); err != nil {
		t.Fatal(err)
	}
	if string(in[7].Extensions) != "ours" || in[8].Extensions != nil {
		t.Error("storing changed the caller's entries")
	}
	if err := s.Stable.SetUint64([]byte("CurrentTerm"), 7); err != nil {
		t.Fatal(err)
	}
	done()
	s, done = mustOpen(t, path)
	defer done()
	if !s.HasState {
		t.Error("HasState is false")
	}
	for _, want := range in {
		var got raft.Log
		if err := s.Log.GetLog(want.Index, &got); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got.Data, want.Data) || !bytes.Equal(got.Extensions, want.Extensions) || got.Term != want.Term {
			t.Fatalf("entry %d came back as %+v", want.Index, got)
		}
	}
	if err := s.Log.GetLog(301, &raft.Log{}); !errors.Is(err, raft.ErrLogNotFound) {
		t.Errorf("a missing entry: %v", err)
	}
	if v, err := s.Stable.GetUint64([]byte("CurrentTerm")); err != nil || v != 7 {
		t.Errorf("term %d, %v", v, err)
	}
	if _, err := s.Stable.GetUint64([]byte("LastVoteTerm")); err == nil || err.Error() != "not found" {
		t.Errorf("a missing vote: %v; Raft compares the text", err)
	}
}

func TestFilesAreForTheirOwnerOnly(t *testing.T) {
	path := filepath.Join(t.TempDir(), "raft")
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
	s, done := mustOpen(t, path)
	if err := s.Log.StoreLogs(entries(1, 3)); err != nil {
		t.Fatal(err)
	}
	done()
	err := filepath.Walk(path, func(p string, info os.FileInfo, err error) error {
		if err == nil && !info.IsDir() && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", p, info.Mode())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the directory has mode %v, %v", info.Mode(), err)
	}
}

// Every flipped bit is either harmless (all entries and votes read as they were written) or told at opening.
func TestNoFlippedBitIsSilent(t *testing.T) {
	path := t.TempDir()
	s, done := mustOpen(t, path)
	for i := uint64(1); i <= 400; i += 20 {
		if err := s.Log.StoreLogs(entries(i, i+19)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Log.DeleteRange(1, 37); err != nil {
		t.Fatal(err)
	}
	if err := s.Stable.SetUint64([]byte("CurrentTerm"), 9); err != nil {
		t.Fatal(err)
	}
	if err := s.Stable.Set([]byte("LastVoteCand"), []byte("node-a")); err != nil {
		t.Fatal(err)
	}
	done()
	// The log begins at 38: give it the snapshot that reaches there.
	snapshotAt(t, path, 37)
	file := filepath.Join(path, logFile)
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	detected, harmless := 0, 0
	var flips []int
	for range 250 { // anywhere
		flips = append(flips, rng.IntN(len(good)*8))
	}
	for page := 0; page*4096 < len(good); page++ { // and in every page's header and first element, where it hurts most
		for range 3 {
			flips = append(flips, (page*4096+rng.IntN(40))*8+rng.IntN(8))
		}
	}
	for _, bit := range flips {
		bad := bytes.Clone(good)
		bad[bit/8] ^= 1 << (bit % 8)
		if err := os.WriteFile(file, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		d, s, err := openStores(t, path)
		if err != nil {
			if !fault.Is(err, fault.Corrupt) && !fault.Is(err, fault.Invalid) {
				t.Errorf("bit %d: %v", bit, err)
			}
			detected++
			continue
		}
		if err := same(s); err != nil {
			t.Errorf("bit %d of byte %#x is silent: %v", bit%8, bit/8, err)
		}
		harmless++
		if err := errors.Join(s.Close(), d.Close()); err != nil {
			t.Fatal(err)
		}
	}
	if detected == 0 || harmless == 0 {
		t.Errorf("%d detected, %d harmless: the test does not test", detected, harmless)
	}
	t.Logf("%d detected, %d harmless", detected, harmless)
}

func same(s *Stores) error {
	for _, want := range entries(38, 400) {
		if err := sameEntry(s, want.Index, want.Data, want.Term); err != nil {
			return err
		}
	}
	if last, err := s.Log.LastIndex(); err != nil || last != 400 {
		return fmt.Errorf("last index %d, %w", last, err)
	}
	if v, err := s.Stable.GetUint64([]byte("CurrentTerm")); err != nil || v != 9 {
		return fmt.Errorf("term %d, %w", v, err)
	}
	if v, err := s.Stable.Get([]byte("LastVoteCand")); err != nil || string(v) != "node-a" {
		return fmt.Errorf("vote %q, %w", v, err)
	}
	return nil
}

// sameEntry reads one entry and compares it.
func sameEntry(s *Stores, index uint64, data []byte, term uint64) error {
	var got raft.Log
	if err := s.Log.GetLog(index, &got); err != nil {
		return err
	}
	if !bytes.Equal(got.Data, data) || got.Term != term {
		return fmt.Errorf("entry %d is %+v", index, got)
	}
	return nil
}

func snapshotAt(t testing.TB, path string, index uint64) string {
	t.Helper()
	store, err := raft.NewFileSnapshotStore(path, 2, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	_, trans := raft.NewInmemTransport("")
	defer trans.Close()
	sink, err := store.Create(1, index, 1, raft.Configuration{}, 0, trans)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sink.Write([]byte("state")); err != nil {
		t.Fatal(err)
	}
	if err := sink.Close(); err != nil {
		t.Fatal(err)
	}
	return sink.ID()
}

func TestALogThatNoReadableSnapshotReachesIsRefused(t *testing.T) {
	path := t.TempDir()
	s, done := mustOpen(t, path)
	if err := s.Log.StoreLogs(entries(1, 100)); err != nil {
		t.Fatal(err)
	}
	if err := s.Log.DeleteRange(1, 49); err != nil {
		t.Fatal(err)
	}
	done()
	if _, _, err := openStores(t, path); !fault.Is(err, fault.Corrupt) {
		t.Fatalf("a log from 50 without a snapshot: %v", err)
	}
	old := snapshotAt(t, path, 60)
	newer := snapshotAt(t, path, 80)
	_, done = mustOpen(t, path)
	done()
	damage := func(id string) {
		t.Helper()
		file := filepath.Join(path, "snapshots", id, "state.bin")
		if err := os.WriteFile(file, []byte("other"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	damage(newer) // the older one still reaches the log
	_, done = mustOpen(t, path)
	done()
	damage(old)
	if _, _, err := openStores(t, path); !fault.Is(err, fault.Corrupt) {
		t.Fatalf("only damaged snapshots: %v", err)
	}
}

func TestADirectoryThatLostItsPartsIsRefused(t *testing.T) {
	for _, lost := range []string{idFile, incarnationFile} {
		path := t.TempDir()
		_, done := mustOpen(t, path)
		done()
		if err := os.Remove(filepath.Join(path, lost)); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenDir(path); !fault.Is(err, fault.Corrupt) {
			t.Errorf("without %s: %v", lost, err)
		}
		if err := os.WriteFile(filepath.Join(path, lost), []byte("garbage\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenDir(path); !fault.Is(err, fault.Corrupt) {
			t.Errorf("with garbage in %s: %v", lost, err)
		}
	}
}

func TestADamagedEntryIsReportedWhenItIsRead(t *testing.T) {
	inner := raft.NewInmemStore()
	l := &Log{inner: inner, watch: newWatch(time.Second)}
	var reported error
	l.OnCorrupt(func(err error) { reported = err })
	if err := l.StoreLogs(entries(1, 3)); err != nil {
		t.Fatal(err)
	}
	var raw raft.Log
	if err := inner.GetLog(2, &raw); err != nil {
		t.Fatal(err)
	}
	raw.Data = append([]byte("E"), raw.Data[1:]...)
	if err := inner.StoreLog(&raw); err != nil {
		t.Fatal(err)
	}
	if err := l.GetLog(2, &raft.Log{}); !fault.Is(err, fault.Corrupt) || reported == nil {
		t.Errorf("read: %v, reported: %v", err, reported)
	}
}

func TestAPanicInTheStoreIsAnError(t *testing.T) {
	err := Guarded("read", "x", func() error { panic("assertion failed: page 7") })
	if !fault.Is(err, fault.Corrupt) || !strings.Contains(err.Error(), "page 7") {
		t.Errorf("got %v", err)
	}
}

func TestTheWatchTellsOfAStallOnceAndOfItsEndOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWatch(time.Second)
		ctx, cancel := context.WithCancel(t.Context())
		var mu sync.Mutex
		var got []string
		say := func(s string) { mu.Lock(); defer mu.Unlock(); got = append(got, s) }
		var wg sync.WaitGroup
		wg.Go(func() { w.Run(ctx, func(time.Duration) { say("slow") }, func() { say("well") }) })
		takes := func(d time.Duration, err error) {
			_ = w.write(func() error { time.Sleep(d); return err })
		}
		takes(900*time.Millisecond, nil)
		takes(5*time.Second, nil)
		time.Sleep(5 * time.Second)
		takes(0, errors.New("no space left"))
		takes(0, errors.New("no space left"))
		synctest.Wait()
		takes(0, nil)
		synctest.Wait()
		time.Sleep(5 * time.Second)
		cancel()
		wg.Wait()
		if fmt.Sprint(got) != "[slow well slow well]" {
			t.Errorf("told %v", got)
		}
	})
}

// fullDisk has no room for a while.
type fullDisk struct {
	raft.StableStore
	full int
}

func (f *fullDisk) Set(key, val []byte) error {
	if f.full > 0 {
		f.full--
		return &os.PathError{Op: "write", Path: "raft.db", Err: syscall.ENOSPC}
	}
	return f.StableStore.Set(key, val)
}

func TestAVoteWaitsForRoomOnAFullDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stop := make(chan struct{})
		s := &Stable{inner: &fullDisk{raft.NewInmemStore(), 7}, watch: newWatch(time.Second), stop: stop}
		if err := s.SetUint64([]byte("CurrentTerm"), 3); err != nil {
			t.Fatal(err)
		}
		if v, err := s.GetUint64([]byte("CurrentTerm")); err != nil || v != 3 {
			t.Errorf("%d, %v", v, err)
		}
		s.inner = &fullDisk{raft.NewInmemStore(), 1 << 30}
		time.AfterFunc(time.Minute, func() { close(stop) })
		if err := s.SetUint64([]byte("CurrentTerm"), 4); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("after Release: %v", err)
		}
	})
}
