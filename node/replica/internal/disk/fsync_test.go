//go:build linux

package disk

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// dirty is how many pages of a file the kernel has not written to the disk.
func dirty(t *testing.T, f *os.File) uint64 {
	t.Helper()
	var at unix.CachestatRange // the whole file
	var stat unix.Cachestat_t
	if err := unix.Cachestat(uint(f.Fd()), &at, &stat, 0); err != nil {
		t.Fatalf("ask the kernel for dirty pages (cachestat, Linux 6.5): %v", err)
	}
	return stat.Dirty + stat.Writeback
}

// TestWhatIsAcknowledgedIsOnTheDisk asks the kernel, after each write, whether anything of the log is still in memory alone.
func TestWhatIsAcknowledgedIsOnTheDisk(t *testing.T) {
	path := onADisk(t)
	s, done := mustOpenWith(t, path, Options{Limit: time.Minute})
	defer done()
	f, err := os.OpenFile(filepath.Join(path, logFile), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	for i := uint64(1); i <= 100; i += 10 {
		if err := s.Log.StoreLogs(entries(i, i+9)); err != nil {
			t.Fatal(err)
		}
		if n := dirty(t, f); n > 0 {
			t.Fatalf("entry %d is acknowledged, and %d pages of the log are in memory alone", i+9, n)
		}
		if err := s.Stable.SetUint64(keyTerm, i); err != nil {
			t.Fatal(err)
		}
		if n := dirty(t, f); n > 0 {
			t.Fatalf("term %d is acknowledged, and %d pages are in memory alone", i, n)
		}
	}
}

// onADisk makes a directory where what the kernel says of dirty pages means something: on a filesystem in memory nothing is
// ever dirty.
func onADisk(t *testing.T) string {
	t.Helper()
	for _, parent := range []string{os.TempDir(), "."} { //nolint:usetesting // whichever of the two is not in memory
		path, err := os.MkdirTemp(parent, "disk")
		if err != nil {
			continue
		}
		t.Cleanup(func() { _ = os.RemoveAll(path) })
		scratch, err := os.Create(filepath.Join(path, "scratch"))
		if err != nil {
			t.Fatal(err)
		}
		_, err = scratch.Write(make([]byte, 1<<16))
		n := dirty(t, scratch)
		if err := errors.Join(err, scratch.Close(), os.Remove(scratch.Name())); err != nil {
			t.Fatal(err)
		}
		if path, err = filepath.Abs(path); err == nil && n > 0 {
			return path
		}
	}
	t.Fatal("neither the temporary directory nor this one is on a filesystem that keeps dirty pages")
	return ""
}
