//go:build e2e

package e2e

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// ownerVariable is in the environment of every process that descends from a plugin.
const ownerVariable = "ROLLCALL_PLUGIN_OWNER="

// process is one line of /proc.
type process struct {
	pid     int
	node    string // ROLLCALL_NODE of a plugin
	host    int    // the server that owns a plugin
	command string
}

func (p process) String() string {
	return fmt.Sprintf("pid %d (plugin of %s, server pid %d): %s", p.pid, p.node, p.host, p.command)
}

// plugins lists the plugin processes that belong to servers under root: their owner is in their environment, and their
// sockets are below root. Zombies have no environment; they are not listed.
func plugins(root string) []process {
	var out []process
	entries, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range entries {
		env, err := os.ReadFile(filepath.Join(dir, "environ"))
		if err != nil || !bytes.Contains(env, []byte(ownerVariable)) || !bytes.Contains(env, []byte(root+"/")) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		p := process{pid: pid}
		for v := range strings.SplitSeq(string(env), "\x00") {
			if name, ok := strings.CutPrefix(v, "ROLLCALL_NODE="); ok {
				p.node = name
			}
			if owner, ok := strings.CutPrefix(v, ownerVariable); ok { // home:pid:start:process
				if parts := strings.Split(owner, ":"); len(parts) > 1 {
					p.host, _ = strconv.Atoi(parts[1])
				}
			}
		}
		cmdline, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		p.command = strings.ReplaceAll(strings.TrimRight(string(cmdline), "\x00"), "\x00", " ")
		out = append(out, p)
	}
	return out
}

// noPlugins fails the test unless every plugin process that match picks is gone within limit.
func noPlugins(t testing.TB, root string, limit time.Duration, match func(process) bool) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		var left []string
		for _, p := range plugins(root) {
			if match(p) {
				left = append(left, p.String())
			}
		}
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("%d plugin processes are left over after %s:\n%s", len(left), limit, strings.Join(left, "\n"))
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}
