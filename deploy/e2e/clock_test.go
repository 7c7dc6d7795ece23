//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"rollcall/node/nodetest/overlay"
)

// A static Go program takes the time from the kernel itself, so its wall clock is moved inside it: `go build -overlay`
// puts an offset into time.Now and a reader of that offset into the program. Monotonic time is left alone, as it is when
// somebody sets a machine's clock. The same overlay gives a second build another version.

// skewed is rollcall of a version ("" for its own) with a wall clock that clockFile moves.
func skewed(version string) (string, error) {
	once, _ := skewedOnce.LoadOrStore(version, sync.OnceValues(func() (string, error) { return buildSkewed(version) }))
	return once.(func() (string, error))() //nolint:forcetypeassert // stored above
}

var skewedOnce sync.Map // version to func() (string, error)

// clockVariable names the file whose number of seconds is added to the wall clock.
const clockVariable = "E2E_CLOCK"

func buildSkewed(version string) (string, error) {
	dir := filepath.Join(binDir, "overlay"+version)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	std, err := overlay.Std(context.Background())
	if err != nil {
		return "", err
	}
	top, err := filepath.Abs(repository)
	if err != nil {
		return "", err
	}
	files := overlay.Files{
		filepath.Join(std, "time", "e2e_offset.go"): "package time\n\nimport \"sync/atomic\"\n\nvar e2eOffset atomic.Int64\n\n" +
			"func E2EOffset(seconds int64) { e2eOffset.Store(seconds) }\n",
		filepath.Join(top, "cmd", "rollcall", "e2e_clock.go"): clockReader,
	}
	err = files.Replace(filepath.Join(std, "time", "time.go"), "sec, nsec, mono := runtimeNow()\n", "sec, nsec, mono := runtimeNow()\n\tsec += e2eOffset.Load()\n")
	if err == nil && version != "" {
		err = files.Replace(filepath.Join(top, "node", "version.go"), `const Version = "`, `const Version = "`+version+`" + "" // `)
	}
	if err != nil {
		return "", fmt.Errorf("say here how its clock is moved now: %w", err)
	}
	flag, err := files.Flag(dir)
	if err != nil {
		return "", err
	}
	bin := filepath.Join(binDir, "rollcall-clock"+version)
	return bin, build(nil, "go", "build", flag, "-o", bin, "./cmd/rollcall")
}

const clockReader = `package main

import (
	"os"
	"strconv"
	"strings"
	"time"
)

func init() {
	path := os.Getenv("` + clockVariable + `")
	if path == "" {
		return
	}
	go func() {
		for ; ; time.Sleep(20 * time.Millisecond) {
			if raw, err := os.ReadFile(path); err == nil {
				if n, err := strconv.ParseInt(strings.TrimSpace(string(raw)), 10, 64); err == nil {
					time.E2EOffset(n)
				}
			}
		}
	}()
}
`

// clock sets a node's wall clock off by so much.
func (s *server) clock(offset time.Duration) {
	s.c.t.Helper()
	file := filepath.Join(s.dir, "clock")
	text := strconv.FormatInt(int64(offset/time.Second), 10)
	if err := os.WriteFile(file+".new", []byte(text), 0o600); err != nil {
		s.c.t.Fatal(err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		s.c.t.Fatal(err)
	}
}

// TestTheClockOfANodeIsMovedByItsFile holds the injector to what it promises: the log's times jump by the offset.
func TestTheClockOfANodeIsMovedByItsFile(t *testing.T) {
	bin, err := skewed("")
	if err != nil {
		t.Fatal(err)
	}
	c := newCluster(t, options{nodes: 1, idle: true})
	s := c.nodes[0]
	s.bin, s.env = bin, []string{clockVariable + "=" + filepath.Join(s.dir, "clock")}
	s.clock(240 * time.Hour)
	s.start()
	c.serving()
	until(t, short, "a line of the log from ten days ahead", func() error {
		ahead := time.Now().UTC().Add(239 * time.Hour).Format("2006-01-02")
		if !strings.Contains(s.log(), ahead) {
			return errors.New(tail(s.logFile, 3))
		}
		return nil
	})
}
