package disk

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"rollcall/node/fault"
)

// FuzzLogFile: no bytes in the place of the log make the program panic or fault: either they are refused as damaged before
// the library sees them, or every entry that they are said to hold can be read.
func FuzzLogFile(f *testing.F) {
	path := f.TempDir()
	s, done := mustOpen(f, path)
	if err := s.Log.StoreLogs(entries(1, 30)); err != nil {
		f.Fatal(err)
	}
	if err := s.Stable.SetUint64(keyTerm, 3); err != nil {
		f.Fatal(err)
	}
	done()
	good, err := os.ReadFile(filepath.Join(path, logFile))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(uint16(0), []byte{})
	f.Add(uint16(4096), []byte{0xff})
	f.Add(uint16(16), []byte("\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, at uint16, patch []byte) {
		// Whole files of 16 KiB are too much to mutate blindly: the bytes go over a good one.
		raw := append([]byte(nil), good...)
		copy(raw[int(at)%len(raw):], patch)
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, logFile), raw, 0o600); err != nil {
			t.Fatal(err)
		}
		held, err := verifyFile(filepath.Join(dir, logFile))
		if err != nil {
			if !fault.Is(err, fault.Corrupt) && !fault.Is(err, fault.Invalid) {
				t.Fatalf("refused as %q: %v", fault.KindOf(err), err)
			}
			return
		}
		d := &Dir{Path: dir}
		s, err := d.Open(Options{NoSync: true, Limit: time.Minute})
		if err != nil {
			t.Fatalf("verified, and not opened: %v", err)
		}
		defer func() { _ = s.Close() }()
		for i := held.First; i > 0 && i <= held.Last; i++ {
			if err := s.Log.GetLog(i, &raft.Log{}); err != nil {
				t.Fatalf("verified to %d, and entry %d cannot be read: %v", held.Last, i, err)
			}
		}
		if held.Last != 30 || held.Term != 3 {
			t.Fatalf("verified, and it ends at %d in term %d", held.Last, held.Term)
		}
	})
}
