// Package nodetest runs whole clusters in one process for tests: the real nodes over loopback, with real plugin
// processes.
package nodetest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"rollcall/node"
	"rollcall/node/api"
	"rollcall/node/nodetest/check"
	"rollcall/node/telemetry"
)

// pluginArg is the first argument of every plugin process of a test.
const pluginArg = "nodetest-plugin"

// PluginCommand is the file name of the test plugin in a cluster's plugin directory.
const PluginCommand = "test-plugin"

// pluginProgram is the built test plugin.
var pluginProgram string

// Main is what TestMain calls: it builds the plugin that the clusters run.
func Main(m *testing.M) int {
	dir, err := os.MkdirTemp("", "rollcall-testplugin-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	pluginProgram = filepath.Join(dir, PluginCommand)
	// Without the race detector, whose processes start slowly, and once for all clusters.
	build := exec.Command("go", "build", "-ldflags=-s -w", "-o", pluginProgram, "rollcall/node/nodetest/testplugin")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build the test plugin: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// heartbeat is longer than a node's default: under the race detector, with two cores for all nodes and their plugins, half
// a second passes unheard, and a change of leader in the middle of a write is an outcome that nobody knows.
const heartbeat = 1500 * time.Millisecond

// Cluster is a local cluster under test, with a client for each node.
type Cluster struct {
	*node.Local
	t       testing.TB
	Plugins string
	Sum     string
	// Record is everything that happens; it is judged when the test ends.
	Record *check.Recorder
	dir    string
	log    *logs
	wires  map[string]*wire // by node name

	mu     sync.Mutex
	faults map[int]func()
}

// logs keeps the nodes' log and shows it when the test has failed.
type logs struct {
	mu  sync.Mutex
	buf []byte
}

// maxLog bounds what is kept of the log: the newest.
const maxLog = 4 << 20

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.buf = append(l.buf, p...)
	if len(l.buf) > maxLog {
		l.buf = slices.Clone(l.buf[len(l.buf)-maxLog/2:])
	}
	return len(p), nil
}

// Start starts a cluster of n nodes and stops it at the end of the test. change may adapt a node; it may be nil.
func Start(t testing.TB, n int, change func(i int, cfg *node.Config, opt *node.Options)) *Cluster {
	t.Helper()
	// A unix socket's path has 107 bytes, and a test's own directory is too deep for that.
	dir, err := os.MkdirTemp("", "rc")
	if err != nil {
		t.Fatal(err)
	}
	c := &Cluster{
		t: t, dir: dir, Plugins: filepath.Join(dir, "plugins"), log: &logs{}, Record: check.NewRecorder(), faults: map[int]func(){}, wires: map[string]*wire{},
	}
	c.Record.Describe(func(m *check.Meta) { m.Suite, m.Command = t.Name(), "go test ./node/nodetest -run '^"+t.Name()+"$'" })
	t.Cleanup(func() {
		_ = os.RemoveAll(dir)
		if t.Failed() {
			t.Logf("the nodes' log:\n%s", c.log.buf)
		}
	})
	c.Sum = installPlugin(t, c.Plugins)
	logger, err := telemetry.NewLogger(c.log, "text", slog.LevelDebug)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c.Local, err = node.StartLocal(ctx, node.LocalOptions{
		Nodes: n, Dir: dir, PluginDir: c.Plugins, Logger: logger,
		Change: func(i int, cfg *node.Config, opt *node.Options) {
			opt.Heartbeat = heartbeat
			c.wires[cfg.Name] = newWire()
			opt.Network = c.wires[cfg.Name]
			c.watch(cfg.Name, opt)
			if change != nil {
				change(i, cfg, opt)
			}
			if opt.Network != c.wires[cfg.Name] {
				delete(c.wires, cfg.Name)
			}
		},
	})
	if err != nil {
		t.Fatalf("start %d nodes: %v\n%s", n, err, c.log.buf)
	}
	t.Cleanup(func() {
		stop, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 30*time.Second)
		defer cancel()
		if err := c.Stop(stop); err != nil {
			t.Errorf("stop the cluster: %v", err)
		}
		c.judge()
	})
	return c
}

func installPlugin(t testing.TB, dir string) string {
	t.Helper()
	raw, err := os.ReadFile(pluginProgram)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, PluginCommand), raw, 0o755); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(raw)
	return hex.EncodeToString(sum[:])
}

// Log is what the nodes have logged so far, the newest of it.
func (c *Cluster) Log() string {
	c.log.mu.Lock()
	defer c.log.mu.Unlock()
	return string(c.log.buf)
}

// Client calls node i.
func (c *Cluster) Client(i int) *api.Client {
	c.t.Helper()
	client, err := api.New(api.Config{Addresses: []string{c.Node(i).APIAddress()}, Token: c.Token})
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(client.Close)
	return client
}

// Register enters a version of the test plugin, with arguments of package demoplugin.
func (c *Cluster) Register(name, version string, args ...string) {
	c.t.Helper()
	c.register(0, "secret", name, api.RegisterRequest{
		SHA256: c.Sum, Version: version, Command: PluginCommand,
		Args: append([]string{pluginArg, "-version", version}, args...),
	})
}

// register enters a version through node i, and records that: processes may be started from its bytes from now on (I9).
func (c *Cluster) register(i int, kind, name string, req api.RegisterRequest) {
	c.t.Helper()
	op := c.Record.Invoke(check.Op{
		Kind: check.Register, Node: c.Node(i).Name(), Key: kind + "/" + name + "/" + req.Version, Input: req.SHA256,
	})
	if _, err := c.Client(i).RegisterPlugin(c.t.Context(), kind, name, req); err != nil {
		c.t.Fatalf("register %s %s: %v", name, req.Version, err)
	}
	op.Outcome = check.OK
	c.Record.Complete(op)
}

// Enable mounts a plugin and waits until every node serves it.
func (c *Cluster) Enable(path, name, version string) {
	c.t.Helper()
	err := c.Client(0).Enable(c.t.Context(), "secret", path, api.MountInput{
		Type: name, Config: &api.MountConfigInput{PluginVersion: version},
	})
	if err != nil {
		c.t.Fatalf("enable %s: %v", path, err)
	}
	c.Serving()
}

// Serving waits until every running node serves.
func (c *Cluster) Serving() {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), 30*time.Second)
	defer cancel()
	if err := c.Wait(ctx); err != nil {
		c.t.Fatalf("wait for the cluster to serve: %v", err)
	}
}

// Reload starts a reload through node i and returns its record when it has ended.
func (c *Cluster) Reload(i int, req api.ReloadRequest) *api.Reload {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), time.Minute)
	defer cancel()
	client := c.Client(i)
	op := c.Record.Invoke(check.Op{Kind: check.Start, Node: c.Node(i).Name(), Input: fmt.Sprintf("%+v", req)})
	resp, _, err := client.Reload(ctx, "", req)
	if err != nil {
		c.t.Fatalf("reload: %v", err)
	}
	op.Key, op.Output, op.Outcome = resp.ReloadID, resp.ReloadID, check.OK
	c.Record.Complete(op)
	op = c.Record.Invoke(check.Op{Kind: check.Status, Node: c.Node(i).Name(), Key: resp.ReloadID})
	rec, err := client.WaitReload(ctx, resp.ReloadID, api.Watcher{})
	if err != nil {
		c.t.Fatalf("wait for reload %s: %v (%+v)", resp.ReloadID, err, rec)
	}
	op.Output, op.Outcome = rec.Phase, check.OK
	c.Record.Complete(op)
	return rec
}

// Eventually tries f until it is nil; it fails the test with the last error.
func (c *Cluster) Eventually(within time.Duration, what string, f func() error) {
	c.t.Helper()
	deadline := time.Now().Add(within)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			c.t.Fatalf("%s: not within %v: %v", what, within, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// PluginProcesses are the processes on this machine that were started as this cluster's plugins.
func (c *Cluster) PluginProcesses() []string {
	var out []string
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		line, err := os.ReadFile(filepath.Join(d, "cmdline"))
		if err != nil || !strings.Contains(string(line), "\x00"+pluginArg+"\x00") {
			continue
		}
		env, err := readSome(filepath.Join(d, "environ"))
		if err == nil && strings.Contains(env, c.dir) {
			out = append(out, filepath.Base(d)+" "+strings.ReplaceAll(string(line), "\x00", " "))
		}
	}
	return out
}

func readSome(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, 64<<10))
	return string(raw), err
}
