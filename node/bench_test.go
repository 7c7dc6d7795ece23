package node

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"rollcall/node/api"
	"rollcall/node/httpd"
	"rollcall/node/supervisor"
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

// bench is a cluster of one with the demo plugin mounted, and the same plugin once more, called directly.
type bench struct {
	b      *testing.B
	local  *Local
	node   *Node
	client *api.Client
	sum    string
}

func startBench(b *testing.B, nodes int) *bench {
	b.Helper()
	dir, err := os.MkdirTemp("", "rcb")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = os.RemoveAll(dir) })
	x := &bench{b: b, sum: copySelf(b, filepath.Join(dir, "plugins"))}
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
	if x.client, err = api.New(api.Config{Addresses: []string{x.node.APIAddress()}, Token: x.local.Token}); err != nil {
		b.Fatal(err)
	}
	for _, version := range []string{"v1.0.0", "v1.1.0"} {
		_, err := x.client.RegisterPlugin(b.Context(), "secret", "demo", api.RegisterRequest{
			SHA256: x.sum, Version: version, Command: "plugin", Args: []string{benchPlugin, "-version", version},
		})
		if err != nil {
			b.Fatal(err)
		}
	}
	err = x.client.Enable(b.Context(), "secret", "demo", api.MountInput{
		Type: "demo", Config: &api.MountConfigInput{PluginVersion: "v1.0.0"},
	})
	if err != nil {
		b.Fatal(err)
	}
	if err := x.local.Wait(b.Context()); err != nil {
		b.Fatal(err)
	}
	return x
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

// direct starts the plugin of the mount once more and sets it up with the storage of nobody.
func (x *bench) direct() *supervisor.Backend {
	x.b.Helper()
	p, err := x.node.launcher.(plugins).Supervisor.Start(x.b.Context(), supervisor.Spec{
		Type: "secret", Name: "demo", Version: "v1.0.0",
		Command: "plugin", Args: []string{benchPlugin, "-version", "v1.0.0"}, SHA256: x.sum,
	})
	if err != nil {
		x.b.Fatal(err)
	}
	x.b.Cleanup(func() { _ = p.Close(context.Background()) })
	backend, err := p.Backend(x.b.Context())
	if err != nil {
		x.b.Fatal(err)
	}
	if err := backend.Setup(x.b.Context(), supervisor.Setup{Storage: nobody{}, BackendUUID: "bench"}); err != nil {
		x.b.Fatal(err)
	}
	if err := backend.Initialize(x.b.Context()); err != nil {
		x.b.Fatal(err)
	}
	return backend
}

// nobody is a storage with nothing in it.
type nobody struct{}

func (nobody) List(context.Context, string) ([]string, error)         { return nil, nil }
func (nobody) Get(context.Context, string) (*supervisor.Entry, error) { return nil, nil }
func (nobody) Put(context.Context, *supervisor.Entry) error           { return nil }
func (nobody) Delete(context.Context, string) error                   { return nil }

// BenchmarkRoutedRequest compares an empty operation through the router with the same plugin called directly over gRPC,
// paced at about half of the CPU: CPU of this process per request, and latencies.
func BenchmarkRoutedRequest(b *testing.B) {
	x := startBench(b, 1)
	direct := x.direct()
	routes := pluginRoutes{x.node.router}
	req := &httpd.PluginRequest{ID: "bench", Path: "demo/ping", Operation: "read", Data: json.RawMessage("{}"), ClientToken: "x"}
	plain := &pluginpb.Request{Id: "bench", Operation: "read", Path: "ping", Data: "{}", MountPoint: "demo/"}
	for name, call := range map[string]func(context.Context) error{
		"direct": func(ctx context.Context) error { _, err := direct.HandleRequest(ctx, plain); return err },
		"routed": func(ctx context.Context) error { _, err := routes.Handle(ctx, req); return err },
	} {
		b.Run(name, func(b *testing.B) { paced(b, call) })
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
					break
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

// BenchmarkReload measures whole reloads of an idle mount: local on one node, and global on three, with what the slowest
// node spent on its own work (verify, start, handshake, trial, switch, drain), and the hold.
func BenchmarkReload(b *testing.B) {
	for _, c := range []struct {
		name  string
		nodes int
		scope string
	}{{"local/nodes=3", 3, ""}, {"global/nodes=1", 1, "global"}, {"global/nodes=3", 3, "global"}} {
		b.Run(c.name, func(b *testing.B) {
			x := startBench(b, c.nodes)
			var whole, own, hold []float64
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
				whole = append(whole, float64(time.Since(began).Microseconds())/1000)
				if rec.Outcome != api.OutcomeSucceeded {
					b.Fatalf("%s: %s", rec.Outcome, rec.Why)
				}
				slowest := 0.0
				for _, n := range rec.Nodes {
					m := n.Mounts[0]
					slowest = max(slowest, m.Timings.Ready+max(m.HoldMS, m.Timings.Switch)+m.Timings.Drain)
					if m.HoldMS > 0 {
						hold = append(hold, m.HoldMS)
					}
				}
				own = append(own, slowest)
			}
			b.ReportMetric(median(whole), "ms/reload")
			b.ReportMetric(median(own), "ms-slowest-node")
			b.ReportMetric(median(hold), "ms-hold")
			b.ReportMetric(0, "ns/op")
		})
	}
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	slices.Sort(v)
	return v[len(v)/2]
}
