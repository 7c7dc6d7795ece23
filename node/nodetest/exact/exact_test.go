package exact

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"rollcall/node/nodetest/overlay"
)

// known skips a test on a Go of another release, where seeds are only hints and everything else is as it was. On a release that the
// changes were written for they must fit: compare the sources, and change the replacements.
func known(t *testing.T, err error) {
	t.Helper()
	switch {
	case errors.Is(err, ErrUnknown) && !strings.HasPrefix(runtime.Version(), Known):
		t.Skipf("%s: %v", runtime.Version(), err)
	case err != nil:
		t.Fatal(err)
	}
}

func TestTheChangesFitTheGoThatRuns(t *testing.T) {
	std, err := overlay.Std(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	files, err := Overlay(std)
	known(t, err)
	for path, text := range files {
		raw, err := os.ReadFile(path)
		if err == nil && string(raw) == text {
			t.Errorf("nothing is changed in %s", path)
		}
	}
}

func TestAnotherGoIsRefusedInWords(t *testing.T) {
	root := t.TempDir()
	path := filepath.Join(root, "runtime")
	if err := os.MkdirAll(path, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(path, "rand.go"), []byte("package runtime\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Overlay(root)
	if !errors.Is(err, ErrUnknown) || !strings.Contains(err.Error(), "runtime/rand.go holds") {
		t.Errorf("%v", err)
	}
}

// TestASeedDecidesEveryOrder runs the scene below in processes of its own: what a seed decides in one, it decides in all,
// however long the environment is that they were started with.
func TestASeedDecidesEveryOrder(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	binary, err := Build(ctx, ".", t.TempDir())
	known(t, err)
	run := func(seed uint64, more string) string {
		cmd := exec.CommandContext(ctx, binary, "-test.run=^TestScene$", "-test.v")
		cmd.Env = append(append(os.Environ(), Env(seed)...), "MORE="+more)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("seed %d: %v\n%s", seed, err, out)
		}
		for line := range strings.Lines(string(out)) {
			if _, scene, ok := strings.Cut(line, "scene: "); ok {
				return scene
			}
		}
		t.Fatalf("seed %d tells nothing:\n%s", seed, out)
		return ""
	}
	one := run(1, "")
	for i := range 3 {
		if again := run(1, strings.Repeat("x", 1000*i)); again != one {
			t.Errorf("seed 1 gives\n%s\nand\n%s", one, again)
		}
	}
	if two := run(2, ""); two == one {
		t.Errorf("seeds 1 and 2 give the same: %s", one)
	}
}

// TestScene is what the processes of TestASeedDecidesEveryOrder run.
func TestScene(t *testing.T) {
	if !On() {
		return
	}
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var said []string
		say := func(what string, n int) {
			mu.Lock()
			defer mu.Unlock()
			said = append(said, fmt.Sprint(what, n))
		}
		var all sync.WaitGroup
		for i := range 8 { // timers at one instant, and goroutines that can all run
			all.Go(func() { time.Sleep(time.Second); say("timer", i) })
			all.Go(func() { say("go", i) })
		}
		a, b := make(chan int, 20), make(chan int, 20)
		for i := range 20 {
			a <- i
			b <- i
		}
		for range 20 {
			select {
			case n := <-a:
				say("a", n)
			case n := <-b:
				say("b", n)
			}
		}
		numbers, pointers := map[int]bool{}, map[*int]int{}
		for i := range 20 {
			numbers[i], pointers[new(int)] = true, i
		}
		for n := range numbers {
			say("map", n)
		}
		for _, n := range pointers {
			say("pointer", n)
		}
		say("rand", rand.IntN(1000))
		all.Wait()
		t.Log("scene: " + strings.Join(said, " "))
	})
}
