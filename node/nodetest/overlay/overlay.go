// Package overlay has the go command compile changed copies of source files in the place of the originals, the standard
// library's too: `go build -overlay`. A change replaces a text that must be there exactly once, so that it is noticed when
// the original has moved on.
package overlay

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Files are what source files are to hold, by their absolute paths. A path where no file is adds one.
type Files map[string]string

// Std is where the sources of the standard library are.
func Std(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	if err != nil {
		return "", fmt.Errorf("ask the go command where it lives: %w", err)
	}
	return filepath.Join(strings.TrimSpace(string(out)), "src"), nil
}

// Replace changes a file once more.
func (f Files) Replace(path, from, to string) error {
	text, ok := f[path]
	if !ok {
		raw, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		text = string(raw)
	}
	if n := strings.Count(text, from); n != 1 {
		return fmt.Errorf("%s holds %q %d times, not once", path, from, n)
	}
	f[path] = strings.Replace(text, from, to, 1)
	return nil
}

// Flag writes the files into dir, which must stay while the go command builds, and returns the flag to build with.
func (f Files) Flag(dir string) (string, error) {
	replace := map[string]string{}
	for path, text := range f {
		file := filepath.Join(dir, filepath.Base(filepath.Dir(path))+"-"+filepath.Base(path))
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			return "", err
		}
		replace[path] = file
	}
	raw, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", err
	}
	list := filepath.Join(dir, "overlay.json")
	return "-overlay=" + list, os.WriteFile(list, raw, 0o600)
}
