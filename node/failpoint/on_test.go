//go:build failpoints

package failpoint

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"rollcall/node/fault"
)

// TestMain turns the process into one that hits places, for the tests of what the environment says.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "hit" {
		for _, site := range os.Args[2:] {
			if file, there := strings.CutPrefix(os.Getenv(EnvRules), "@"); there && site == "rewrite" {
				_ = os.WriteFile(file, []byte("reload/done=kill"), 0o600)
				continue
			}
			if err := Hit(Site(site), "node-1"); err != nil {
				os.Exit(7)
			}
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestARuleActsOnItsNodeAtItsHitOnly(t *testing.T) {
	Called("id-2", "node-2")
	own := errors.New("own")
	var got []Event
	disarm := Arm(Rule{Site: ReloadDone, Node: "node-2", Nth: 2, Do: func(e Event) error {
		got = append(got, e)
		return own
	}})
	for i, key := range []string{"node-1", "node-1", "id-2", "id-2", "node-2"} {
		err := Hit(ReloadDone, key)
		if want := i == 3; (err == own) != want { //nolint:errorlint // the very same
			t.Errorf("hit %d by %s: %v", i, key, err)
		}
	}
	if len(got) != 1 || got[0] != (Event{Site: ReloadDone, Node: "node-2", N: 2}) {
		t.Errorf("%+v", got)
	}
	disarm()
	if Hit(ReloadDone, "node-2") != nil || len(got) != 1 {
		t.Error("a rule that was taken away still acts")
	}
}

func TestHitsBeforeTheOtherPlaceDoNotCount(t *testing.T) {
	n := 0
	defer Arm(Rule{Site: DiskAppend, Node: "a", After: ReloadSwitchProposed, Nth: 1, Do: func(Event) error { n++; return nil }})()
	_ = Hit(DiskAppend, "a")
	_ = Hit(ReloadSwitchProposed, "b")
	_ = Hit(DiskAppend, "a")
	if n != 0 {
		t.Fatal("it acted before the place that it waits for, or for another node's")
	}
	_ = Hit(ReloadSwitchProposed, "a")
	_, _ = Hit(DiskAppend, "a"), Hit(DiskAppend, "a")
	if n != 1 {
		t.Errorf("it acted %d times", n)
	}
}

func TestAPauseHoldsUntilItIsReleased(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		defer Arm(Rule{Site: ReloadTrial, Do: Pause(release)}, Rule{Site: ReloadTrial, Do: Sleep(time.Minute)})()
		from, done := time.Now(), make(chan error, 1)
		go func() { done <- Hit(ReloadTrial, "a") }()
		time.Sleep(time.Hour)
		close(release)
		if err := <-done; err != nil || time.Since(from) != time.Hour+time.Minute {
			t.Errorf("%v after %v", err, time.Since(from))
		}
	})
}

func TestRulesAreReadAndBadOnesNamed(t *testing.T) {
	rules, err := Parse(" reload/draining@node-2=kill; disk/fsync=error(no space),nth=3,after=reload/switch-proposed ;")
	if err != nil || len(rules) != 2 {
		t.Fatalf("%v %v", rules, err)
	}
	if r := rules[0]; r.Site != ReloadDraining || r.Node != "node-2" || r.Nth != 0 || r.Do == nil {
		t.Errorf("%+v", r)
	}
	r := rules[1]
	if r.Site != DiskFsync || r.Node != "" || r.Nth != 3 || r.After != ReloadSwitchProposed {
		t.Errorf("%+v", r)
	}
	if err := r.Do(Event{Site: r.Site, Node: "n"}); !fault.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "no space") {
		t.Errorf("%v", err)
	}
	for _, bad := range []string{
		"reload/draining", "nowhere=kill", "reload/done=", "reload/done=die", "reload/done=sleep(soon)",
		"reload/done=kill,nth=0", "reload/done=kill,nth=x", "reload/done=kill,after=nowhere", "reload/done=kill,when=now",
	} {
		if _, err := Parse(bad); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), bad) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

// hitting runs this binary as a process that hits places one after the other.
func hitting(t *testing.T, rules, report string, sites ...Site) error {
	t.Helper()
	args := []string{"hit"}
	for _, s := range sites {
		args = append(args, string(s))
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), EnvRules+"="+rules, EnvReport+"="+report)
	return cmd.Run()
}

func TestAProcessIsEndedByItsEnvironmentAndHasToldWhereItWas(t *testing.T) {
	dir := t.TempDir()
	err := hitting(t, "reload/draining@node-1=kill,nth=2", dir, ReloadTrial, ReloadDraining, ReloadDraining, ReloadDone)
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("it ended with %v, not by SIGKILL", err)
	}
	files, _ := filepath.Glob(filepath.Join(dir, "*"))
	if len(files) != 1 {
		t.Fatalf("%v", files)
	}
	raw, err := os.ReadFile(files[0])
	if want := "reload/trial\nreload/draining\n"; err != nil || string(raw) != want {
		t.Errorf("it told %q, not %q: %v", raw, want, err)
	}
	if err := hitting(t, "reload/done=error", dir, ReloadDone); err == nil {
		t.Error("an error was not returned")
	}
	if err := hitting(t, "reload/undone=error", dir); err == nil {
		t.Error("a process runs with rules that cannot be read")
	}
}

func TestRulesInAFileAreReadAgainWhenItChanges(t *testing.T) {
	file := filepath.Join(t.TempDir(), "rules")
	err := hitting(t, "@"+file, t.TempDir(), ReloadDone, "rewrite", ReloadTrial, ReloadDone)
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("it ended with %v, not by SIGKILL", err)
	}
}
