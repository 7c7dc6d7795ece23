//go:build compose

package compose

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"rollcall/node/api"
	"rollcall/node/fault"
	"rollcall/node/nodetest/check"
)

// chaos is one run over the composed cluster, its faults chosen from one seed.
type chaos struct {
	*cluster
	rng       *rand.Rand
	rec       *check.Recorder
	began     time.Time
	done      map[string]int
	asked     int
	slowest   time.Duration
	moved     [3]bool // nodes that are at their other address
	overrides string  // a compose file that says where they are
}

// trouble is one kind of fault: it happens to a node, lasts a while, and is undone.
type trouble struct {
	kind string
	hold time.Duration // at most
	do   func(x *chaos, node int) (undo func())
}

var troubles = []trouble{
	{"kill", 2 * time.Second, func(x *chaos, n int) func() {
		x.docker("kill", x.container(service(n)))
		return func() { x.docker("start", x.container(service(n))) }
	}},
	{"pause", 2 * time.Second, pause},
	{"pause past the lease", 8 * time.Second, pause},
	{"network disconnected", 4 * time.Second, func(x *chaos, n int) func() {
		id := x.container(service(n))
		x.docker("network", "disconnect", project+"_cluster", id)
		return func() {
			x.docker("network", "connect", "--ip", x.address(n), "--alias", service(n), project+"_cluster", id)
		}
	}},
	{"memory limit, OOM kills", 4 * time.Second, func(x *chaos, n int) func() {
		x.memory(n, "64m")
		return func() { x.memory(n, "2g") }
	}},
	{"CPU limit", 3 * time.Second, func(x *chaos, n int) func() {
		id := x.container(service(n))
		x.docker("update", "--cpus", "0.05", id)
		return func() { x.docker("update", "--cpus", "2", id) }
	}},
	{"volume replaced", time.Second, func(x *chaos, n int) func() {
		x.docker("rm", "-f", x.container(service(n)))
		x.docker("volume", "rm", fmt.Sprintf("%s_%s", project, service(n)))
		return x.up
	}},
	{"restart with another address", time.Second, func(x *chaos, n int) func() {
		x.moved[n-1] = !x.moved[n-1]
		return x.up // which makes the container anew, because its address is another one
	}},
	{"container made anew", time.Second, func(x *chaos, n int) func() {
		x.docker("rm", "-f", x.container(service(n)))
		return x.up
	}},
}

func pause(x *chaos, n int) func() {
	id := x.container(service(n))
	x.docker("pause", id)
	return func() { x.docker("unpause", id) }
}

// memory starts a node again with another limit: one that is below what is in use already cannot be set.
func (x *chaos) memory(n int, limit string) {
	id := x.container(service(n))
	x.docker("stop", "-t", "10", id)
	x.docker("update", "--memory", limit, "--memory-swap", limit, id)
	x.docker("start", id)
}

func service(n int) string { return fmt.Sprintf("node-%d", n) }

// address is that of a node, which chaos moves.
func (x *chaos) address(n int) string {
	host := 10 + n
	if x.moved[n-1] {
		host += 10
	}
	return fmt.Sprintf("%s.%d", network, host)
}

// override writes a compose file that gives every node the address that it is to have now.
func (x *chaos) override() {
	var b strings.Builder
	b.WriteString("services:\n")
	for n := 1; n <= 3; n++ {
		fmt.Fprintf(&b, "  %s:\n    environment:\n      ROLLCALL_CLUSTER_ADVERTISE: %s:8201\n      ROLLCALL_GOSSIP_ADVERTISE: %s:8202\n"+
			"    networks:\n      cluster: {ipv4_address: %q}\n", service(n), x.address(n), x.address(n), x.address(n))
	}
	if err := os.WriteFile(x.overrides, []byte(b.String()), 0o600); err != nil {
		x.t.Fatal(err)
	}
}

// TestComposeChaosLosesNothing makes faults on containers while clients read and write and reloads run. ROLLCALL_CHAOS
// says for how long, ROLLCALL_SEED repeats a run's choices.
func TestComposeChaosLosesNothing(t *testing.T) {
	length, seed := 45*time.Second, rand.Uint64()
	var err error
	if v := os.Getenv("ROLLCALL_CHAOS"); v != "" {
		if length, err = time.ParseDuration(v); err != nil {
			t.Fatal(err)
		}
	}
	if v := os.Getenv("ROLLCALL_SEED"); v != "" {
		if seed, err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("repeat the choices of this run: ROLLCALL_SEED=%d ROLLCALL_CHAOS=%s", seed, length)
	dir := t.TempDir() // before start, whose end still reads what is in it
	c := start(t)
	x := &chaos{
		cluster: c, rng: rand.New(rand.NewPCG(seed, 0)), rec: check.NewRecorder(), done: map[string]int{}, //nolint:gosec // not for secrets
		overrides: filepath.Join(dir, "addresses.yml"),
	}
	root, err := filepath.Abs("../../../docker-compose.yml")
	if err != nil {
		t.Fatal(err)
	}
	x.override()
	c.compose = append(c.compose, "-f", root, "-f", x.overrides)
	c.register(1, oldVersion)
	c.register(1, newVersion)
	if err := c.client(2).Enable(t.Context(), "secret", "kv", api.MountInput{
		Type: "kv", Options: map[string]string{"version": "2"}, Config: &api.MountConfigInput{PluginVersion: oldVersion},
	}); err != nil {
		t.Fatal(err)
	}
	c.want1("ready")
	l := x.load(24)
	x.began = time.Now()
	deck := x.rng.Perm(len(troubles))
	for n := 0; time.Since(x.began) < length && !t.Failed(); n++ {
		x.step(troubles[deck[n%len(deck)]])
	}
	took := time.Since(x.began)
	l.stop()
	x.final(l)
	run := x.rec.Run()
	report := check.Check(run)
	t.Log(report)
	if err := report.Err(); err != nil {
		t.Error(err)
	}
	total := 0
	for _, k := range x.done {
		total += k
	}
	t.Logf("\n| | |\n|---|---|\n| faults | %d of %d kinds: %v |\n| operations answered and checked | %d (%.0f a second) |\n| reloads | %d |\n"+
		"| violations | %d |\n| slowest return | %s |\n| seed | %d |", total, len(x.done), x.done, report.OK, float64(report.OK)/took.Seconds(),
		x.asked, len(report.Violations), x.slowest.Round(time.Millisecond), seed)
}

// want1 waits until every node answers a first write.
func (c *cluster) want1(key string) {
	c.t.Helper()
	c.put(1, key, "one")
	c.want(key, "one", 1, 2, 3)
}

// step makes one fault, asks for a reload meanwhile, undoes it, and waits until every node serves and the reload is over.
func (x *chaos) step(k trouble) {
	n := 1 + x.rng.IntN(3)
	x.t.Logf("%6.1fs %s: %s", time.Since(x.began).Seconds(), k.kind, service(n))
	healed := x.rec.Fault(k.kind, service(n), "")
	undo := k.do(x, n)
	x.done[k.kind]++
	asked := 1 + n%3
	id := x.reload(asked)
	time.Sleep(k.hold/2 + rand.N(k.hold/2))
	x.override()
	undo()
	healed()
	began := time.Now()
	until(x.t, 60*time.Second, "every node serves again", func() error { return x.settled(id) })
	x.slowest = max(x.slowest, time.Since(began))
}

// reload asks one node for a global reload, which it may not take now.
func (x *chaos) reload(n int) string {
	x.asked++
	id := fmt.Sprintf("compose-%d", x.asked)
	version := []string{oldVersion, newVersion}[x.rng.IntN(2)]
	ctx, cancel := context.WithTimeout(x.t.Context(), 2*time.Second)
	defer cancel()
	_, _, err := x.client(n).Reload(ctx, "", api.ReloadRequest{Plugin: "kv", Scope: "global", Version: version, ReloadID: id})
	if err != nil {
		x.t.Logf("reload %s: %v", id, err)
	}
	return id
}

// settled says what is missing until every node serves what is wanted, and a reload is over, if it was ever taken.
func (x *chaos) settled(id string) error {
	ctx, cancel := context.WithTimeout(x.t.Context(), 5*time.Second)
	defer cancel()
	for n := 1; n <= 3; n++ {
		h, err := x.client(n).Health(ctx)
		if err != nil {
			return fmt.Errorf("%s: %w", service(n), err)
		}
		if !h.Initialized || h.Fenced {
			return fmt.Errorf("%s: fenced: %s", service(n), h.FencedBecause)
		}
	}
	v, err := x.client(1).Versions(ctx)
	if err != nil {
		return err
	}
	for _, m := range v.Mounts {
		for _, n := range m.Nodes {
			if !n.Same {
				return fmt.Errorf("%s on %s: %s: %s", m.Mount, n.Node, n.State, n.Why)
			}
		}
	}
	rec, err := x.client(1).ReloadRecord(ctx, id, 0, 0)
	if fault.Is(err, fault.NotFound) {
		return nil
	}
	if err == nil && (!api.Ended(rec.Phase) || len(rec.Pending) > 0 && rec.Outcome != api.OutcomeRolledBack) {
		return fmt.Errorf("reload %s is %s, pending %v", id, rec.Phase, rec.Pending)
	}
	return err
}

// load is clients that write and read keys of their own through all nodes.
type load struct {
	x      *chaos
	cancel context.CancelFunc
	wg     sync.WaitGroup
	keys   int
}

func (x *chaos) load(clients int) *load {
	ctx, cancel := context.WithCancel(x.t.Context())
	l := &load{x: x, cancel: cancel, keys: clients}
	x.t.Cleanup(l.stop)
	for i := range clients {
		l.wg.Go(func() {
			direct := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 2}}
			defer direct.CloseIdleConnections()
			for n := 0; ctx.Err() == nil; n++ {
				op := check.Op{Client: i + 1, Kind: check.Read, Key: fmt.Sprintf("k/%d", (i+n)%clients)}
				if n%3 == 0 {
					op.Kind, op.Key, op.Input = check.Write, fmt.Sprintf("k/%d", i), fmt.Sprintf("%d.%d", i, n)
				}
				x.call(ctx, direct, 1+i%3, op)
				time.Sleep(10 * time.Millisecond)
			}
		})
	}
	return l
}

func (l *load) stop() { l.cancel(); l.wg.Wait() }

// final reads every key through every node.
func (x *chaos) final(l *load) {
	x.t.Helper()
	direct := &http.Client{Timeout: 10 * time.Second}
	for n := 1; n <= 3; n++ {
		for k := range l.keys {
			var err error
			for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
				if err = x.call(x.t.Context(), direct, n, check.Op{Kind: check.Final, Key: fmt.Sprintf("k/%d", k)}); err == nil {
					break
				}
			}
			if err != nil {
				x.t.Errorf("read k/%d back from %s: %v", k, service(n), err)
			}
		}
	}
}

// call sends one request to a node and records it.
func (x *chaos) call(ctx context.Context, direct *http.Client, n int, op check.Op) error {
	op.Node, op.Mount = service(n), "kv/"
	method, body := http.MethodGet, io.Reader(nil)
	if op.Kind == check.Write {
		method, body = http.MethodPost, strings.NewReader(fmt.Sprintf(`{"data":{"v":%q}}`, op.Input))
	}
	req, err := http.NewRequestWithContext(ctx, method, fmt.Sprintf("http://127.0.0.1:%s%d/v1/kv/data/%s", portsFrom, n, op.Key), body)
	if err != nil {
		return err
	}
	req.Header.Set(api.HeaderToken, x.token)
	op = x.rec.Invoke(op)
	raw, err := exchange(direct, req, &op)
	var env struct {
		Data struct {
			Data map[string]string `json:"data"`
		} `json:"data"`
	}
	switch {
	case err == nil && op.Status == http.StatusOK:
		op.Outcome = check.OK
		if err = json.Unmarshal(raw, &env); err == nil {
			op.Output = env.Data.Data["v"]
		}
	case err == nil && op.Status == http.StatusNotFound && op.Kind != check.Write && strings.Contains(string(raw), `"errors":[]`):
		op.Outcome = check.OK
	case op.Kind == check.Write && op.Status != http.StatusServiceUnavailable && op.Status != http.StatusTooManyRequests:
		op.Outcome = check.Unknown
	default:
		op.Outcome = check.Failed
	}
	if op.Outcome != check.OK && err == nil {
		err = fmt.Errorf("%d %.200s", op.Status, raw)
	}
	if err != nil {
		op.Cause = err.Error()
	}
	x.rec.Complete(op)
	return err
}

func exchange(direct *http.Client, req *http.Request, op *check.Op) ([]byte, error) {
	resp, err := direct.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	op.Status, op.By = resp.StatusCode, resp.Header.Get(api.HeaderNode)
	op.Generation, _ = strconv.ParseUint(resp.Header.Get(api.HeaderGeneration), 10, 64)
	return io.ReadAll(io.LimitReader(resp.Body, 1<<20))
}
