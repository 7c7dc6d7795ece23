package node

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"rollcall/fsm"
	"rollcall/node/api"
	"rollcall/node/httpd"
	"rollcall/node/supervisor"
	commandv1 "rollcall/proto/command/v1"
	"rollcall/proto/plugin/demoplugin"

	pluginpb "rollcall/proto/plugin"
)

// benchPlugin makes the test binary a plugin.
const benchPlugin = "bench-plugin"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == benchPlugin {
		os.Exit(demoplugin.Main(os.Args[2:], os.Stderr))
	}
	os.Exit(m.Run())
}

// benched is a plugin that a benchmark runs. Its versions are one binary.
type benched struct {
	name, command string
	args          func(version string) []string
	versions      []string
	options       map[string]string
}

var demoBench = benched{
	name: "demo", command: "plugin", versions: []string{"v1.0.0", "v1.1.0"},
	args: func(version string) []string { return []string{benchPlugin, "-version", version} },
}

var kvBench = benched{
	name: "kv", command: "kv-v0.25.0", versions: []string{"v0.25.0"}, options: map[string]string{"version": "2"},
	args: func(string) []string { return nil },
}

// bench is a cluster with a plugin mounted under its own name, and the same plugin once more, called directly.
type bench struct {
	b      *testing.B
	local  *Local
	node   *Node
	client *api.Client
	plugin benched
	sum    string
	// supervisor is the one of the node that leads.
	supervisor *supervisor.Supervisor
}

func startBench(b *testing.B, nodes int, plugin benched) *bench {
	b.Helper()
	dir, err := os.MkdirTemp("", "rcb")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = os.RemoveAll(dir) })
	x := &bench{b: b, plugin: plugin}
	if plugin.command == demoBench.command {
		x.sum = copySelf(b, filepath.Join(dir, "plugins"))
	} else {
		x.sum = buildPlugin(b, filepath.Join(dir, "plugins"), plugin.command)
	}
	x.local, err = StartLocal(b.Context(), LocalOptions{
		Nodes: nodes, Dir: dir, PluginDir: filepath.Join(dir, "plugins"), Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := x.local.Stop(ctx); err != nil {
			b.Error(err)
		}
	})
	x.node = x.local.Leader()
	x.supervisor = x.node.launcher.(plugins).Supervisor
	if x.client, err = api.New(api.Config{Addresses: []string{x.node.APIAddress()}, Token: x.local.Token}); err != nil {
		b.Fatal(err)
	}
	for _, version := range plugin.versions {
		_, err := x.client.RegisterPlugin(b.Context(), "secret", plugin.name, api.RegisterRequest{
			SHA256: x.sum, Version: version, Command: plugin.command, Args: plugin.args(version),
		})
		if err != nil {
			b.Fatal(err)
		}
	}
	err = x.client.Enable(b.Context(), "secret", plugin.name, api.MountInput{
		Type: plugin.name, Config: &api.MountConfigInput{PluginVersion: plugin.versions[0]}, Options: plugin.options,
	})
	if err != nil {
		b.Fatal(err)
	}
	if err := x.local.Wait(b.Context()); err != nil {
		b.Fatal(err)
	}
	return x
}

// buildPlugin builds a sample plugin and returns its sha256.
func buildPlugin(b *testing.B, dir, name string) string {
	b.Helper()
	out, err := exec.CommandContext(b.Context(), "../deploy/plugins/build", dir, name).Output() // ends with "sha256  name"
	if err != nil {
		b.Fatalf("build %s: %v", name, err)
	}
	return strings.Fields(string(out))[0]
}

func copySelf(b *testing.B, dir string) string {
	b.Helper()
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	raw, err := os.ReadFile(self)
	if err != nil {
		b.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "plugin"), raw, 0o755); err != nil {
		b.Fatal(err)
	}
	sum := sha256.Sum256(raw)
	return hex.EncodeToString(sum[:])
}

// direct starts the plugin of the mount once more and sets it up with a storage in this process.
func (x *bench) direct() *supervisor.Backend {
	x.b.Helper()
	p, err := x.supervisor.Start(x.b.Context(), supervisor.Spec{
		Type: "secret", Name: x.plugin.name, Version: x.plugin.versions[0],
		Command: x.plugin.command, Args: x.plugin.args(x.plugin.versions[0]), SHA256: x.sum,
	})
	if err != nil {
		x.b.Fatal(err)
	}
	x.b.Cleanup(func() { _ = p.Close(context.Background()) })
	backend, err := p.Backend(x.b.Context())
	if err != nil {
		x.b.Fatal(err)
	}
	setup := supervisor.Setup{Storage: &mapStorage{entries: map[string][]byte{}}, BackendUUID: "bench", Config: x.plugin.options}
	if err := backend.Setup(x.b.Context(), setup); err != nil {
		x.b.Fatal(err)
	}
	if err := backend.Initialize(x.b.Context()); err != nil {
		x.b.Fatal(err)
	}
	return backend
}

// mapStorage is the smallest storage that a plugin can work with.
type mapStorage struct {
	mu      sync.Mutex
	entries map[string][]byte
}

func (m *mapStorage) List(_ context.Context, prefix string) ([]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []string
	for key := range m.entries {
		if rest, ok := strings.CutPrefix(key, prefix); ok {
			if dir, _, deep := strings.Cut(rest, "/"); deep {
				rest = dir + "/"
			}
			out = append(out, rest)
		}
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

func (m *mapStorage) Get(_ context.Context, key string) (*supervisor.Entry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if value, ok := m.entries[key]; ok {
		return &supervisor.Entry{Key: key, Value: value}, nil
	}
	return nil, nil //nolint:nilnil // the interface's word for "not there"
}

func (m *mapStorage) Put(_ context.Context, e *supervisor.Entry) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.entries[e.Key] = e.Value
	return nil
}

func (m *mapStorage) Delete(_ context.Context, key string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.entries, key)
	return nil
}

// BenchmarkRoutedRequest compares an operation through the router with the same plugin called directly over gRPC, and with
// a whole request over HTTP whose client is this process too; paced at about half of the CPU: CPU of this process per
// request, and latencies.
func BenchmarkRoutedRequest(b *testing.B) {
	for _, c := range []struct {
		name   string
		plugin benched
		path   string
		prior  string // what is written there before
	}{{"empty", demoBench, "ping", ""}, {"kv-read", kvBench, "data/x", `{"data":{"color":"blue"}}`}} {
		b.Run(c.name, func(b *testing.B) {
			x := startBench(b, 1, c.plugin)
			direct, routes := x.direct(), pluginRoutes{x.node.router}
			// What the door hands on of a token.
			token := hex.EncodeToString(fsm.HashToken(x.node.state.View().ClusterID(), x.local.Token))
			call := map[string]func(ctx context.Context, op, data string) error{
				"direct": func(ctx context.Context, op, data string) error {
					_, err := direct.HandleRequest(ctx, &pluginpb.Request{
						Id: "bench", Operation: op, Path: c.path, Data: data, MountPoint: c.plugin.name + "/",
					})
					return err
				},
				"routed": func(ctx context.Context, op, data string) error {
					_, err := routes.Handle(ctx, &httpd.PluginRequest{
						ID: "bench", Path: c.plugin.name + "/" + c.path, Operation: op, Data: json.RawMessage(data), ClientToken: token,
					})
					return err
				},
				"http": x.overHTTP(c.plugin.name + "/" + c.path),
			}
			for _, way := range []string{"direct", "routed", "http"} {
				for end := time.Now().Add(20 * time.Second); c.prior != ""; time.Sleep(50 * time.Millisecond) {
					err := call[way](b.Context(), "update", c.prior) // KV refuses until it has upgraded an empty storage
					if err == nil {
						break
					} else if time.Now().After(end) {
						b.Fatal(err)
					}
				}
				b.Run(way, func(b *testing.B) {
					paced(b, func(ctx context.Context) error { return call[way](ctx, "read", "{}") })
				})
			}
		})
	}
}

// overHTTP sends requests to the API's port.
func (x *bench) overHTTP(path string) func(ctx context.Context, op, data string) error {
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 8}}
	x.b.Cleanup(client.CloseIdleConnections)
	return func(ctx context.Context, op, data string) error {
		method, body := http.MethodGet, io.Reader(http.NoBody)
		if op == "update" {
			method, body = http.MethodPut, strings.NewReader(data)
		}
		req, err := http.NewRequestWithContext(ctx, method, x.node.APIAddress()+"/v1/"+path, body)
		if err != nil {
			return err
		}
		req.Header.Set(api.HeaderToken, x.local.Token)
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if _, err = io.Copy(io.Discard, resp.Body); err == nil && resp.StatusCode >= http.StatusMultipleChoices {
			err = fmt.Errorf("%s %s: %s", method, path, resp.Status)
		}
		return err
	}
}

// paced runs b.N calls from four goroutines with a pause between them, and reports CPU and latencies.
func paced(b *testing.B, call func(context.Context) error) {
	const clients, pause = 4, 800 * time.Microsecond
	var mu sync.Mutex
	var wg sync.WaitGroup
	took := make([]time.Duration, 0, b.N)
	next := make(chan struct{}, clients)
	before := cpu()
	b.ResetTimer()
	for range clients {
		wg.Go(func() {
			var mine []time.Duration
			for range next {
				began := time.Now()
				if err := call(b.Context()); err != nil {
					b.Error(err)
					continue // the others wait for somebody to take the next
				}
				mine = append(mine, time.Since(began))
				time.Sleep(pause)
			}
			mu.Lock()
			took = append(took, mine...)
			mu.Unlock()
		})
	}
	for range b.N {
		next <- struct{}{}
	}
	close(next)
	wg.Wait()
	b.StopTimer()
	used := cpu() - before
	if len(took) == 0 {
		b.FailNow() // what went wrong has been said
	}
	slices.Sort(took)
	b.ReportMetric(float64(used.Microseconds())/float64(b.N), "cpu-us/op")
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-us")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-us")
	b.ReportMetric(0, "ns/op")
}

// cpu is the processor time that this process has used, without its children.
func cpu() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkReload measures whole reloads of an idle mount: local on one node, and global on one and three. Of each, the
// time in which some node was at work (verify, start, handshake, trial, switch, drain), and the rest, which is what
// agreeing costs: to compare with the commit of an entry and with a question to the leader, measured on the same cluster.
func BenchmarkReload(b *testing.B) {
	for _, c := range []struct {
		name  string
		nodes int
		scope string
	}{{"local/nodes=3", 3, ""}, {"global/nodes=1", 1, "global"}, {"global/nodes=3", 3, "global"}} {
		b.Run(c.name, func(b *testing.B) {
			x := startBench(b, c.nodes, demoBench)
			var whole, work, rest, hold []float64
			for i := 0; b.Loop(); i++ {
				id := fmt.Sprintf("bench-%d", i)
				began := time.Now()
				_, _, err := x.client.Reload(b.Context(), "", api.ReloadRequest{Plugin: "demo", Scope: c.scope, ReloadID: id})
				if err != nil {
					b.Fatal(err)
				}
				rec, err := x.client.WaitReload(b.Context(), id, api.Watcher{})
				if err != nil {
					b.Fatal(err)
				}
				took := milliseconds(time.Since(began))
				if rec.Outcome != api.OutcomeSucceeded {
					b.Fatalf("%s: %s", rec.Outcome, rec.Why)
				}
				working := milliseconds(atWork(b, rec))
				whole, work, rest = append(whole, took), append(work, working), append(rest, took-working)
				for _, n := range rec.Nodes {
					if m := n.Mounts[0]; m.HoldMS > 0 {
						hold = append(hold, m.HoldMS)
					}
				}
			}
			b.ReportMetric(median(whole), "ms/reload")
			b.ReportMetric(median(work), "ms-at-work")
			b.ReportMetric(median(rest), "ms-agreeing")
			b.ReportMetric(median(hold), "ms-hold")
			commit, ask := x.agreement()
			b.ReportMetric(commit, "ms-commit")
			b.ReportMetric(ask, "ms-ask")
			b.ReportMetric(0, "ns/op")
		})
	}
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// atWork is for how long at least one node was at one of its steps. All nodes are in this process and share its clock.
func atWork(b *testing.B, rec *api.Reload) time.Duration {
	type stretch struct{ from, to time.Time }
	var all []stretch
	for _, n := range rec.Nodes {
		for _, m := range n.Mounts {
			for _, s := range m.Steps {
				from, err := time.Parse(time.RFC3339Nano, s.At)
				if err != nil {
					b.Fatal(err)
				}
				all = append(all, stretch{from, from.Add(time.Duration(s.MS * float64(time.Millisecond)))})
			}
		}
	}
	slices.SortFunc(all, func(x, y stretch) int { return x.from.Compare(y.from) })
	var sum time.Duration
	var until time.Time
	for _, s := range all {
		if s.to.After(until) {
			sum += s.to.Sub(latest(s.from, until))
			until = s.to
		}
	}
	return sum
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// agreement is the median time of one entry's commit, and of one question to the leader from another node.
func (x *bench) agreement() (commit, ask float64) {
	asker := x.node
	for _, n := range x.local.Nodes() {
		if n != x.node {
			asker = n
		}
	}
	var commits, asks []float64
	for range 100 {
		began := time.Now()
		if _, err := x.node.replica.Propose(x.b.Context(), &commandv1.Command{Body: &commandv1.Command_Tick{Tick: &commandv1.Tick{}}}); err != nil {
			x.b.Fatal(err)
		}
		commits = append(commits, milliseconds(time.Since(began)))
		began = time.Now()
		if _, err := asker.replica.ReadIndex(x.b.Context()); err != nil {
			x.b.Fatal(err)
		}
		asks = append(asks, milliseconds(time.Since(began)))
	}
	return median(commits), median(asks)
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	slices.Sort(v)
	return v[len(v)/2]
}
