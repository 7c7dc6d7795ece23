//go:build e2e

// Package e2e tests the real binary as its users run it: server processes on loopback, real plugins, the HTTP API and
// the command line. It knows nothing of what is inside.
//
//	go test -tags=e2e ./deploy/e2e/                       # a few minutes on two cores
//	go test -tags=e2e ./deploy/e2e/ -e2e.writes=100000    # the same, with a longer load
//	go test -tags=e2e ./deploy/e2e/ -e2e.race             # the server is built with the race detector
//	E2E_BIN=/tmp/e2e-bin go test -tags=e2e ./deploy/e2e/  # keeps what was built for the next run
package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

var (
	flagWrites = flag.Int("e2e.writes", 5000, "acknowledged writes that an upgrade must outlive")
	flagRace   = flag.Bool("e2e.race", false, "build the server with the race detector")
	flagKeep   = flag.Bool("e2e.keep", false, "keep every cluster's directory, not only those of failed tests")
)

// repository is the root of the checkout, seen from this package.
const repository = "../.."

// binDir is where everything that is built goes: made and removed by TestMain, or kept where E2E_BIN says.
var binDir string

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(runTests(m))
}

func runTests(m *testing.M) int {
	binDir = os.Getenv("E2E_BIN")
	if binDir == "" {
		dir, err := os.MkdirTemp("", "e2e-bin-")
		if err != nil {
			fmt.Fprintln(os.Stderr, "make a directory for binaries:", err)
			return 1
		}
		defer func() { _ = os.RemoveAll(dir) }()
		binDir = dir
	}
	dir, err := filepath.Abs(binDir)
	if err == nil {
		err = os.MkdirAll(filepath.Join(dir, "plugins"), 0o755)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "make a directory for binaries:", err)
		return 1
	}
	binDir = dir
	return m.Run()
}

// buildLimit bounds one build; the first on a machine compiles the plugins' several hundred packages.
const buildLimit = 12 * time.Minute

func build(env []string, name string, args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), buildLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = repository
	cmd.Env = append(os.Environ(), env...)
	cmd.WaitDelay = 5 * time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %v: %w\n%s", name, args, err, out)
	}
	return nil
}

// rollcall is the binary under test, built once a run.
var rollcall = sync.OnceValues(func() (string, error) {
	path := filepath.Join(binDir, "rollcall")
	args := []string{"build", "-o", path}
	if *flagRace {
		path += "-race"
		args = []string{"build", "-race", "-o", path}
	}
	return path, build(nil, "go", append(args, "./cmd/rollcall")...)
})

// demoBinary is rollcall as a plugin file: the demo plugin is a copy of the binary itself, never one with -race.
var demoBinary = sync.OnceValues(func() (string, error) {
	path := filepath.Join(binDir, "plugins", "rollcall-demo")
	return path, build([]string{"CGO_ENABLED=0"}, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", path, "./cmd/rollcall")
})

// foreignBinary is a program for a CPU that this machine does not have.
var foreignBinary = sync.OnceValues(func() (string, error) {
	source := filepath.Join(binDir, "foreign", "main.go")
	if err := os.MkdirAll(filepath.Dir(source), 0o755); err != nil {
		return "", err
	}
	if err := os.WriteFile(source, []byte("package main\n\nfunc main() {}\n"), 0o600); err != nil {
		return "", err
	}
	path := filepath.Join(binDir, "plugins", "foreign")
	return path, build([]string{"CGO_ENABLED=0", "GOOS=linux", "GOARCH=" + foreignArch}, "go", "build", "-o", path, source)
})

var pluginOnce sync.Map // name to func() error

// pluginFile is a plugin that deploy/plugins/build makes, built once a run, or once for ever where E2E_BIN keeps it.
func pluginFile(name string) (string, error) {
	switch name {
	case demoName:
		return demoBinary()
	case foreignName:
		return foreignBinary()
	}
	path := filepath.Join(binDir, "plugins", name)
	once, _ := pluginOnce.LoadOrStore(name, sync.OnceValue(func() error {
		if _, err := os.Stat(path); err == nil {
			return nil
		}
		return build(nil, "deploy/plugins/build", filepath.Dir(path), name)
	}))
	return path, once.(func() error)() //nolint:forcetypeassert // stored above
}

// The plugins: two released versions of KV, and the demo plugin, which fails to order.
const (
	kvOld, kvNew = "v0.24.1", "v0.25.0"
	demoName     = "rollcall-demo"
	foreignName  = "foreign"
)

// sum is the sha256 of a file, in hexadecimal.
func sum(t testing.TB, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// copyFile copies an executable; the bytes are new, so that changing one copy changes no other.
func copyFile(t testing.TB, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = in.Close() }()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o755) //nolint:gosec // a program
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
}
