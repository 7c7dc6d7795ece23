//go:build compose

package compose

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestTheReadmesCommandsWork runs what the README says about three containers, line by line, in a clone: what a newcomer
// types must work, and must show what it promises. Only the ports, the network and the project's name are the test's own.
func TestTheReadmesCommandsWork(t *testing.T) {
	readme, err := os.ReadFile("../../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(readme), "\n## Three containers\n")
	section, _, _ = strings.Cut(section, "\n## ")
	var script []string
	for line := range strings.Lines(section) {
		command, ok := strings.CutPrefix(line, "$ ")
		switch {
		case !ok:
		case strings.HasPrefix(command, "deploy/image"): // the stage that runs this test has built it
		default:
			script = append(script, strings.TrimSpace(command))
		}
	}
	if len(script) < 10 {
		t.Fatalf("the README says only %q", script)
	}
	const serves = "for i in $(seq 120); do rollcall healthcheck 2>/dev/null && break; sleep 0.5; done"
	text := strings.NewReplacer("http://127.0.0.1:820", "http://127.0.0.1:1840", "rollcall operator members", serves+"\nrollcall operator members",
		"docker-compose", strings.Join(composer(), " ")).Replace(strings.Join(script, "\n"))
	dir := filepath.Join(t.TempDir(), "rollcall")
	if out, err := exec.Command("git", "clone", "-q", "../../..", dir).CombinedOutput(); err != nil {
		t.Fatalf("git clone: %v\n%s", err, out)
	}
	// What is not committed yet is tried, too.
	if err := os.WriteFile(filepath.Join(dir, "README.md"), readme, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	env := append(os.Environ(), "ROLLCALL_PORTS=1840", "ROLLCALL_NET=10.83.84", "COMPOSE_PROJECT_NAME=rollcall-readme")
	t.Cleanup(func() {
		down := exec.Command("bash", "-c", strings.Join(composer(), " ")+" down -v")
		down.Dir, down.Env = dir, env
		if out, err := down.CombinedOutput(); err != nil {
			t.Errorf("down: %v\n%s", err, out)
		}
	})
	run := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", text)
	run.Dir, run.Env, run.WaitDelay = dir, env, 5*time.Second
	out, err := run.CombinedOutput()
	if err != nil {
		t.Fatalf("%v, at the end of:\n%s\nof the script:\n%s", err, out, text)
	}
	for _, want := range []string{"node-3", "succeeded: 3 of 3 nodes answered", "map[text:hello]", "v0.25.0    v0.25.0    v0.25.0"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("the commands did not show %q:\n%s", want, out)
		}
	}
}
