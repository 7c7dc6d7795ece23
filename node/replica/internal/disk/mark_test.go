package disk

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"rollcall/node/fault"
)

// marked opens a directory as a node does that waits for its disk.
func marked(t *testing.T, path string) (*Stores, func()) {
	t.Helper()
	return mustOpenWith(t, path, Options{Limit: time.Minute})
}

func TestALogWhoseEndWasCutOffInGoodOrderIsAccepted(t *testing.T) {
	path := t.TempDir()
	s, done := marked(t, path)
	if err := s.Log.StoreLogs(entries(1, 100)); err != nil {
		t.Fatal(err)
	}
	if err := s.Log.DeleteRange(51, 100); err != nil { // another leader's entries take their place
		t.Fatal(err)
	}
	done()
	s, done = marked(t, path)
	if err := s.Log.StoreLogs(entries(51, 60)); err != nil {
		t.Fatal(err)
	}
	done()
	_, done = marked(t, path)
	done()
}

func TestALogThatIsShorterThanItWasIsRefused(t *testing.T) {
	dir := t.TempDir()
	s, done := marked(t, dir)
	if err := s.Stable.SetUint64(keyTerm, 3); err != nil {
		t.Fatal(err)
	}
	if err := s.Log.StoreLogs(entries(1, 50)); err != nil {
		t.Fatal(err)
	}
	file, mark := filepath.Join(dir, logFile), filepath.Join(dir, markFile)
	read := func(path string) []byte {
		t.Helper()
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	oldLog, oldMark := read(file), read(mark)
	if err := s.Log.StoreLogs(entries(51, 60)); err != nil {
		t.Fatal(err)
	}
	if err := s.Stable.SetUint64(keyVote, 4); err != nil {
		t.Fatal(err)
	}
	done()
	newLog, newMark := read(file), read(mark)
	for _, c := range []struct {
		name      string
		log, mark []byte
		refused   bool
	}{
		{"an old log", oldLog, newMark, true},
		{"no log", nil, newMark, true},
		{"an old mark, as after a power loss", newLog, oldMark, false},
		{"a torn mark", newLog, append(append([]byte(nil), newMark[:9]...), oldMark[9:]...), false},
		{"no mark, as in a directory of before there were any", newLog, nil, false},
	} {
		for path, raw := range map[string][]byte{file: c.log, mark: c.mark} {
			err := os.WriteFile(path, raw, 0o600)
			if raw == nil {
				err = os.Remove(path)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		d, s, err := openStoresWith(t, dir, Options{Limit: time.Minute})
		if fault.Is(err, fault.Corrupt) != c.refused || err != nil && !c.refused {
			t.Errorf("%s: %v", c.name, err)
		}
		if err == nil {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}
