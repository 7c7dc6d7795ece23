package tlscmd

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"rollcall/node/fault"
	"rollcall/node/seal"
)

func TestASealKeyIsMadeOnceAndForItsOwnerAlone(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	var out bytes.Buffer
	mustRun(t, SealKey(&out, dir))
	path := filepath.Join(dir, sealFile)
	first := read(t, path)
	key, err := seal.Source{File: path}.Load(t.Context())
	mustRun(t, err)
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if bytes.Contains(out.Bytes(), bytes.TrimSpace(first)) {
		t.Error("the key was printed")
	}
	if err := SealKey(&out, dir); !fault.Is(err, fault.Conflict) {
		t.Errorf("a second time: %v", err)
	}
	if again, err := (seal.Source{File: path}).Load(t.Context()); err != nil || again.ID() != key.ID() {
		t.Errorf("the key is another one: %v", err)
	}
}
