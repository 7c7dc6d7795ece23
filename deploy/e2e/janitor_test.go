//go:build e2e

package e2e

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// victimVariable turns TestTheJanitorCleansUpAfterATestThatIsKilled into the test that is killed.
const victimVariable = "E2E_JANITOR_VICTIM"

// TestTheJanitorCleansUpAfterATestThatIsKilled: namespaces, mounts and control groups go also when nobody could undo them.
func TestTheJanitorCleansUpAfterATestThatIsKilled(t *testing.T) {
	if dir := os.Getenv(victimVariable); dir != "" {
		n := newNetwork(t, 2)
		n.disk(dir, "1m")
		newGroup(t, n.janitor, "cpu", n.tag)
		fmt.Printf("made %s\n", n.tag)
		select {} // until it is killed
	}
	needInjectors(t)
	cmd := exec.Command(os.Args[0], "-test.run=^TestTheJanitorCleansUpAfterATestThatIsKilled$")
	cmd.Env = append(os.Environ(), victimVariable+"="+t.TempDir())
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	tag := ""
	for lines := bufio.NewScanner(out); tag == "" && lines.Scan(); {
		tag, _ = strings.CutPrefix(lines.Text(), "made ")
	}
	left := func() (what []string) {
		what, _ = filepath.Glob("/run/netns/" + tag + "-*")
		for _, pattern := range []string{"/sys/fs/cgroup/" + tag + "-*", "/sys/fs/cgroup/*/" + tag + "-*"} {
			more, _ := filepath.Glob(pattern)
			what = append(what, more...)
		}
		mounts, _ := os.ReadFile("/proc/mounts")
		if strings.Contains("\n"+string(mounts), "\n"+tag+" ") {
			what = append(what, "a mount")
		}
		return what
	}
	if tag == "" || len(left()) < 5 {
		_ = cmd.Process.Kill()
		t.Fatalf("%q made only %q", tag, left())
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	until(t, short, "nothing is left", func() error {
		if what := left(); len(what) > 0 {
			return fmt.Errorf("%q", what)
		}
		return nil
	})
}
