//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"rollcall/node/api"
)

// recorded counts the records of a path in an audit file; half a line counts for nothing.
func recorded(t testing.TB, file, path string) int {
	t.Helper()
	raw, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return 0
	}
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for line := range strings.Lines(string(raw)) {
		var e api.AuditEntry
		if json.Unmarshal([]byte(line), &e) == nil && e.Request.Path == path {
			n++
		}
	}
	return n
}

// TestTheAuditFileRotatesAndAFullDiskRefuses: a process is told by SIGHUP that its audit file was moved away, and writes on into a new
// one; and while the file's disk is full, nothing is done.
func TestTheAuditFileRotatesAndAFullDiskRefuses(t *testing.T) {
	dir, err := os.MkdirTemp("", "audit")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	// A disk that a test can fill; where this user may not mount one, the rest of the test still holds.
	small := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=256k") == nil
	if small {
		t.Cleanup(func() {
			if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
	}
	file := filepath.Join(dir, "audit.log")
	c := newCluster(t, options{nodes: 1, config: map[string]any{"audit.file": file}})
	s := c.nodes[0]
	c.mountDemo()
	ask := func(method, path, body string) (int, string) {
		t.Helper()
		return c.request(s, method, path, body)
	}
	if code, text := ask("PUT", "demo/data/a", `{"value":"first"}`); code >= 300 {
		t.Fatalf("%d %s", code, text)
	}
	if n := recorded(t, file, "demo/data/a"); n != 2 {
		t.Errorf("%d records of one request", n)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", info.Mode(), err)
	}

	old := file + ".1"
	if err := os.Rename(file, old); err != nil {
		t.Fatal(err)
	}
	s.signal(syscall.SIGHUP)
	until(t, short, "a new audit file", func() error { _, err := os.Stat(file); return err })
	if code, text := ask("GET", "demo/data/a", ""); code != 200 {
		t.Fatalf("after SIGHUP: %d %s", code, text)
	}
	if before, after := recorded(t, old, "demo/data/a"), recorded(t, file, "demo/data/a"); before != 2 || after != 2 {
		t.Errorf("%d records in the old file, %d in the new one", before, after)
	}

	if !small {
		t.Log("no disk to fill: this user may not mount one")
		return
	}
	ballast, err := os.Create(filepath.Join(dir, "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	for size := 1 << 12; size > 0; {
		if _, err := ballast.Write(make([]byte, size)); err != nil {
			size /= 2
		}
	}
	// What is left of the file's last page takes a few records more.
	until(t, short, "the full disk refuses", func() error {
		if code, text := ask("PUT", "demo/data/a", `{"value":"second"}`); code != 500 || !strings.Contains(text, "audit") {
			return fmt.Errorf("%d %s", code, text)
		}
		return nil
	})
	for path, method := range map[string]string{"sys/mounts/other": "POST", "demo/data/b": "PUT", "sys/policies/acl/p": "PUT", "sys/mounts": "GET"} {
		if code, text := ask(method, path, `{"type":"demo","value":"x","policy":""}`); code != 500 {
			t.Errorf("%s %s with a full disk: %d %s", method, path, code, text)
		}
	}
	if code, _ := ask("GET", "sys/health", ""); code != 200 {
		t.Errorf("health with a full disk: %d", code)
	}
	if err := errors.Join(ballast.Close(), os.Remove(ballast.Name())); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]int{"demo/data/b": 404, "sys/policies/acl/p": 404, "sys/mounts/other": 400} {
		if code, text := ask("GET", path, ""); code != want {
			t.Errorf("%s was done while it could not be recorded: %d %s", path, code, text)
		}
	}
	if code, text := ask("PUT", "demo/data/a", `{"value":"third"}`); code >= 300 {
		t.Errorf("with room again: %d %s", code, text)
	}
	log := s.log()
	if n := strings.Count(log, "an audit record cannot be written"); n == 0 || n > 4 || !strings.Contains(log, "audit records are written again") {
		t.Errorf("the log tells of it %d times", n)
	}
}
