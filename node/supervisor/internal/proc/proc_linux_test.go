package proc

import (
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"
)

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not in time", what)
		}
	}
}

func TestReapTakesOrphansAndNobodyElsesChildren(t *testing.T) {
	if err := Subreaper(); err != nil {
		t.Fatal(err)
	}
	mine := exec.CommandContext(t.Context(), "/bin/true")
	if err := mine.Start(); err != nil {
		t.Fatal(err)
	}
	s := NewSpawner()
	defer s.Close()
	spawned := exec.CommandContext(t.Context(), "/bin/true")
	if err := s.Start(spawned); err != nil {
		t.Fatal(err)
	}
	// A shell that leaves a process in another session behind, and says which.
	out, err := exec.CommandContext(t.Context(), "/bin/sh", "-c", "setsid sh -c 'exit 0' & echo $!").Output()
	if err != nil {
		t.Fatal(err)
	}
	orphan, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatal(err)
	}
	zombie := func(pid int) bool { _, _, state := stat(pid); return state == 'Z' }
	eventually(t, "the children end", func() bool { return zombie(mine.Process.Pid) && zombie(spawned.Process.Pid) })
	eventually(t, "the orphan is collected", func() bool { Reap(); return StartTime(orphan) == 0 })
	if err := mine.Wait(); err != nil {
		t.Errorf("a child of this test was taken: %v", err)
	}
	ended := false
	if err := Wait(spawned, func() { ended = true }); err != nil || !ended {
		t.Errorf("a spawned child was taken: %v", err)
	}
}

func TestProcessesDieWithTheirSpawner(t *testing.T) {
	s := NewSpawner()
	cmd := exec.CommandContext(t.Context(), "/bin/sleep", "10")
	if err := s.Start(cmd); err != nil {
		t.Fatal(err)
	}
	if session, start, _ := stat(cmd.Process.Pid); session != cmd.Process.Pid || start == 0 {
		t.Errorf("session %d of pid %d", session, cmd.Process.Pid)
	}
	s.Close()
	if err := Wait(cmd, func() {}); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("it ended with %v", err)
	}
	if err := s.Start(exec.CommandContext(t.Context(), "/bin/true")); err == nil {
		t.Error("a closed spawner started a process")
	}
}

func TestSweepKillsOnlyWhatIsMarkedAndOwnerless(t *testing.T) {
	mark := "PROC_TEST_OWNER=" + strconv.Itoa(os.Getpid()) + ":"
	started := func(value string) *exec.Cmd {
		cmd := exec.CommandContext(t.Context(), "/bin/sleep", "300")
		cmd.Env = append(os.Environ(), mark+value)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// Between fork and exec the environment is still ours.
		eventually(t, "the process has its environment", func() bool { return variableWith(cmd.Process.Pid, mark) != "" })
		return cmd
	}
	gone, here := started("gone"), started("here")
	if n := Sweep(mark, func(rest string) bool { return rest == "gone" }); n != 1 {
		t.Errorf("killed %d", n)
	}
	if err := gone.Wait(); err == nil {
		t.Error("the ownerless one ended by itself")
	}
	if _, _, state := stat(here.Process.Pid); state == 0 || state == 'Z' {
		t.Error("the other one was killed")
	}
	_ = here.Process.Kill()
	_ = here.Wait()
}
