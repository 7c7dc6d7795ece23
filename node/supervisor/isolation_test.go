package supervisor

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"rollcall/node/fault"
)

// cgroup2 makes a cgroup v2 directory for a test, where this host allows it.
func cgroup2(t *testing.T) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if len(f) < 3 || f[2] != "cgroup2" {
			continue
		}
		dir, err := os.MkdirTemp(f[1], "supervisor-test-")
		if err != nil {
			t.Skipf("no cgroup v2 that this user may write: %v", err)
		}
		t.Cleanup(func() { _ = os.Remove(dir) })
		return dir
	}
	t.Skip("no cgroup v2 is mounted")
	return ""
}

func TestACgroupHoldsAProcessAndAllItsDescendants(t *testing.T) {
	dir := cgroup2(t)
	s := newSupervisor(t, func(c *Config) { c.Cgroup = dir })
	file := filepath.Join(t.TempDir(), "pid")
	spec := specFor("daemon")
	spec.Env = []string{"DAEMON_PID_FILE=" + file}
	p := start(t, s, spec)
	ready(t, p, Setup{Storage: newMemory()})
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	groups, err := filepath.Glob(filepath.Join(dir, "rollcall-*"))
	if err != nil || len(groups) != 1 {
		t.Fatalf("cgroups: %v, %v", groups, err)
	}
	members, err := os.ReadFile(filepath.Join(groups[0], "cgroup.procs"))
	if err != nil {
		t.Fatal(err)
	}
	for _, pid := range []string{strconv.Itoa(p.Pid()), string(raw)} {
		if !strings.Contains("\n"+string(members), "\n"+pid+"\n") {
			t.Errorf("%s is not among %q", pid, members)
		}
	}
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	daemon, err := strconv.Atoi(string(raw))
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the daemon ends", 2*time.Second, func() bool { return !alive(daemon) })
	if left, _ := filepath.Glob(filepath.Join(dir, "rollcall-*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if _, err := New(Config{DataDir: t.TempDir(), Cgroup: t.TempDir(), Logger: s.log}); !fault.Is(err, fault.Invalid) {
		t.Errorf("a directory that is no cgroup: %v", err)
	}
}

func TestPluginsRunAsAnotherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root may start processes as another user")
	}
	sockets, err := os.MkdirTemp("/tmp", "rc-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(sockets) })
	if err := os.Chmod(sockets, 0o755); err != nil { //nolint:gosec // what is tested
		t.Fatal(err)
	}
	s := newSupervisor(t, func(c *Config) { c.UID, c.GID, c.SocketDir = 65534, 65534, sockets })
	store := newMemory()
	b := ready(t, start(t, s, specFor("ok")), Setup{Storage: store})
	if status := ask(t, b, "status", ""); !strings.Contains(status, "Uid:\t65534\t65534") || !strings.Contains(status, "Gid:\t65534\t65534") {
		t.Errorf("it runs as somebody else:\n%s", status)
	}
	ask(t, b, "put/k", "v")
	if string(store.m["k"]) != "v" {
		t.Error("it does not reach its storage")
	}
	if err := os.Chmod(sockets, 0o700); err != nil { //nolint:gosec // what is tested
		t.Fatal(err)
	}
	if _, err := New(Config{DataDir: t.TempDir(), SocketDir: sockets, UID: 65534, Logger: s.log}); !fault.Is(err, fault.Invalid) {
		t.Errorf("sockets out of reach: %v", err)
	}
}
