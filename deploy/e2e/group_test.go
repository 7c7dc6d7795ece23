//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// group is a control group that limits what the processes in it get. Both versions of the kernel's interface are
// served: whichever holds the controller.
type group struct {
	t    testing.TB
	dir  string
	root string // where processes go when the group ends
	v2   bool
}

func newGroup(t testing.TB, j *janitor, controller, name string) *group {
	t.Helper()
	g := &group{t: t, root: filepath.Join("/sys/fs/cgroup", controller)}
	if _, err := os.Stat(filepath.Join(g.root, "cgroup.procs")); err != nil {
		g.root, g.v2 = "/sys/fs/cgroup", true
		raw, err := os.ReadFile(filepath.Join(g.root, "cgroup.controllers"))
		if err != nil || !strings.Contains(string(raw), controller) {
			t.Fatalf("no control group controller %q is mounted below /sys/fs/cgroup (%q, %v): mount it, or run where it is", controller, raw, err)
		}
		_ = os.WriteFile(filepath.Join(g.root, "cgroup.subtree_control"), []byte("+"+controller), 0) // told below when it was refused
	}
	g.dir = filepath.Join(g.root, name+"-"+controller)
	j.undo("rmdir " + g.dir)
	if err := os.MkdirAll(g.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return g
}

func (g *group) set(file, value string) {
	g.t.Helper()
	if err := os.WriteFile(filepath.Join(g.dir, file), []byte(value), 0); err != nil {
		g.t.Fatal(err)
	}
}

func (g *group) limitMemory(bytes int64) {
	g.t.Helper()
	file := "memory.limit_in_bytes"
	if g.v2 {
		file = "memory.max"
	}
	g.set(file, strconv.FormatInt(bytes, 10))
}

func (g *group) limitCPU(percent int) {
	g.t.Helper()
	if g.v2 {
		g.set("cpu.max", fmt.Sprintf("%d 100000", percent*1000))
		return
	}
	g.set("cpu.cfs_period_us", "100000")
	g.set("cpu.cfs_quota_us", strconv.Itoa(percent*1000))
}

// oomKills is how many processes of the group the kernel has killed.
func (g *group) oomKills() int {
	file := "memory.oom_control"
	if g.v2 {
		file = "memory.events"
	}
	raw, _ := os.ReadFile(filepath.Join(g.dir, file))
	for line := range strings.Lines(string(raw)) {
		if n, ok := strings.CutPrefix(line, "oom_kill "); ok {
			count, _ := strconv.Atoi(strings.TrimSpace(n))
			return count
		}
	}
	return 0
}

// take moves processes into the group; what they start is in it as well.
func (g *group) take(pids ...int) {
	for _, pid := range pids {
		_ = os.WriteFile(filepath.Join(g.dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0) // it may have ended
	}
}

// remove lets every process go and ends the group.
func (g *group) remove() {
	g.t.Helper()
	if err := within(10*time.Second, func() error {
		raw, err := os.ReadFile(filepath.Join(g.dir, "cgroup.procs"))
		if err != nil {
			return err
		}
		for pid := range strings.FieldsSeq(string(raw)) {
			_ = os.WriteFile(filepath.Join(g.root, "cgroup.procs"), []byte(pid), 0)
		}
		return os.Remove(g.dir)
	}); err != nil {
		g.t.Errorf("end the control group: %v", err)
	}
}
