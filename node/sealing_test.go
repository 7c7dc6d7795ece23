package node

import (
	"context"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"rollcall/node/fault"
	"rollcall/node/seal"
)

// sealedNode is a cluster of one node, stopped, whose directory is sealed with the key in the file that is returned.
func sealedNode(t *testing.T) (l *Local, keyFile string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "rc") // short: sockets live below it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	keyFile = newKeyFile(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	l, err = StartLocal(ctx, LocalOptions{
		Nodes: 1, Dir: dir, PluginDir: t.TempDir(), Logger: slog.New(slog.DiscardHandler),
		Change: func(_ int, cfg *Config, _ *Options) { cfg.Seal.KeyFile = keyFile },
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.StopNode(ctx, 0); err != nil {
		t.Fatal(err)
	}
	return l, keyFile
}

func newKeyFile(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "seal.key")
	if err := os.WriteFile(path, []byte(seal.NewKeyText()), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestASealedNodeStartsWithItsKeyAloneAndSaysWhatItWants(t *testing.T) {
	l, keyFile := sealedNode(t)
	other := newKeyFile(t)
	key, err := seal.Source{File: keyFile}.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	start := func(s SealConfig) error {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		l.cfg[0].Seal = s
		err := l.StartNode(ctx, 0)
		if err == nil {
			err = l.Wait(ctx)
			if serr := l.StopNode(ctx, 0); err == nil {
				err = serr
			}
		}
		return err
	}
	for name, c := range map[string]struct {
		seal SealConfig
		kind fault.Kind
		says string
	}{
		"no seal block":      {SealConfig{}, fault.Invalid, "seal.key_file or seal.command"},
		"another key":        {SealConfig{KeyFile: other}, fault.Denied, "locked with the key " + key.ID()},
		"no such file":       {SealConfig{KeyFile: other + ".none"}, fault.Invalid, "no such file"},
		"a command fails":    {SealConfig{Command: []string{"/bin/sh", "-c", "echo no >&2; exit 1"}}, fault.Invalid, `it said: "no"`},
		"no previous key":    {SealConfig{KeyFile: other, PreviousKeyFile: other + ".none"}, fault.Invalid, "previous key"},
		"previous is newer":  {SealConfig{KeyFile: other, PreviousKeyFile: newKeyFile(t)}, fault.Denied, key.ID()},
		"a key that is none": {SealConfig{Command: []string{"/bin/sh", "-c", "echo hunter2"}}, fault.Invalid, "32 bytes in base64"},
	} {
		if err := start(c.seal); !fault.Is(err, c.kind) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", name, err)
		} else if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: the text shows what the command printed: %v", name, err)
		}
	}
	for _, c := range []struct {
		name string
		seal SealConfig
	}{
		{"its key", SealConfig{KeyFile: keyFile}},
		{"from a command", SealConfig{Command: []string{"/bin/cat", keyFile}}},
		{"a new key and the old one", SealConfig{KeyFile: other, PreviousKeyFile: keyFile}},
		{"the same once more", SealConfig{KeyFile: other, PreviousCommand: []string{"/bin/cat", keyFile}}},
		{"the new key alone", SealConfig{KeyFile: other}},
	} {
		if err := start(c.seal); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if err := start(SealConfig{KeyFile: keyFile}); !fault.Is(err, fault.Denied) {
		t.Errorf("the old key, after the new one has come: %v", err)
	}
}

// What a node writes belongs to its owner alone: directories 0700, files 0600, whatever the umask.
func TestTheDataDirectoryIsForItsOwnerOnly(t *testing.T) {
	l, _ := sealedNode(t)
	seen := 0
	err := filepath.WalkDir(l.cfg[0].DataDir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err == nil && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		seen++
		return err
	})
	if err != nil || seen < 6 {
		t.Errorf("%d files, %v", seen, err)
	}
}
