package httpd

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"rollcall/fsm"
	"rollcall/node/api"
	"rollcall/node/fault"
	"rollcall/node/policy"
	commandv1 "rollcall/proto/command/v1"
	pluginpb "rollcall/proto/plugin"
)

const rootToken = "root-token"

// world is a node whose door is real, and whose log has no consensus: a proposal is applied at once.
type world struct {
	t   testing.TB
	fsm *fsm.FSM
	s   *Server

	mu    sync.Mutex
	index uint64
	// ahead are entries that other nodes have applied and this one has not: Consistent applies them.
	ahead []*commandv1.Command

	router  *fakeRouter
	cluster *fakeCluster
	leases  *fakeLeases
	serving error
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t: t, fsm: fsm.New()}
	w.router, w.cluster, w.leases = &fakeRouter{w: w}, &fakeCluster{w: w, leader: true}, &fakeLeases{w: w}
	w.must(&commandv1.Command{Body: &commandv1.Command_InitCluster{InitCluster: fsm.NewCluster("c1", "test", rootToken)}})
	w.must(&commandv1.Command{Body: &commandv1.Command_Hello{Hello: &commandv1.Hello{
		NodeId: "n1", Name: "node-1", Incarnation: 1, ApiAddress: "http://node-1:8200",
	}}})
	reg := prometheus.NewRegistry()
	s, err := New(Config{
		NodeID: "n1", NodeName: "node-1", Version: "1.21.0", Started: time.Unix(1_700_000_000, 0), State: w.fsm, Replica: w,
		Router: w.router, Plugins: &fakePlugins{w: w}, Cluster: w.cluster, Leases: w.leases, Policies: policy.NewEngine(),
		Gatherer: reg, Registerer: reg, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	w.s = s
	return w
}

// enter applies a command. A mount is taken over at once, so that it serves.
func (w *world) enter(cmd *commandv1.Command) (*commandv1.Result, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	res, err := w.apply(cmd)
	if _, ok := cmd.GetBody().(*commandv1.Command_EnableMount); ok && err == nil {
		_, terr := w.apply(&commandv1.Command{Body: &commandv1.Command_TakeOver{TakeOver: &commandv1.TakeOver{
			MountUuid: res.GetId(), NodeId: "n1", Term: 1, Generation: res.GetIndex(),
		}}})
		if terr != nil {
			return res, terr
		}
	}
	return res, err
}

func (w *world) apply(cmd *commandv1.Command) (*commandv1.Result, error) {
	data, err := proto.Marshal(cmd)
	if err != nil {
		return nil, err
	}
	w.index++
	res, ok := w.fsm.Apply(&raft.Log{Index: w.index, Term: 1, Type: raft.LogCommand, Data: data}).(*commandv1.Result)
	if !ok {
		return nil, fault.Text(fault.Internal, "no result")
	}
	return res, fsm.Err(res)
}

func (w *world) must(cmd *commandv1.Command) *commandv1.Result {
	w.t.Helper()
	res, err := w.enter(cmd)
	if err != nil {
		w.t.Fatal(err)
	}
	return res
}

func (w *world) Propose(_ context.Context, cmd *commandv1.Command) (*commandv1.Result, error) {
	return w.enter(cmd)
}

func (w *world) Consistent(context.Context) (*fsm.View, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, cmd := range w.ahead {
		if _, err := w.apply(cmd); err != nil {
			return nil, err
		}
	}
	w.ahead = nil
	return w.fsm.View(), nil
}

func (w *world) Serving() error { return w.serving }

// pass lets the log's clock go on.
func (w *world) pass(d time.Duration) {
	w.t.Helper()
	for ; d > 0; d -= time.Minute {
		w.must(&commandv1.Command{ElapsedNs: uint64(min(d, time.Minute)), Body: &commandv1.Command_Tick{Tick: &commandv1.Tick{}}})
	}
}

func (w *world) policy(ns, name, text string) {
	w.t.Helper()
	if _, err := policy.Parse(text); err != nil {
		w.t.Fatal(err)
	}
	w.must(&commandv1.Command{Body: &commandv1.Command_PutPolicy{PutPolicy: &commandv1.PutPolicy{
		Policy: &commandv1.Policy{Namespace: ns, Name: name, Text: text},
	}}})
}

func (w *world) namespace(path string) {
	w.t.Helper()
	w.must(&commandv1.Command{Body: &commandv1.Command_PutNamespace{PutNamespace: &commandv1.PutNamespace{
		Namespace: &commandv1.Namespace{Path: path, Uuid: "uuid-" + path, Id: "id"},
	}}})
}

// token enters a token by its text.
func (w *world) token(text string, row *commandv1.Token) string {
	w.t.Helper()
	row.Hash, row.Accessor = w.fsm.View().HashToken(text), "accessor-of-"+text
	w.must(&commandv1.Command{Body: &commandv1.Command_PutToken{PutToken: &commandv1.PutToken{Token: row}}})
	return text
}

// mount registers a plugin and mounts it; path as clients say it ("kv/", "auth/jwt/").
func (w *world) mount(ns, path string) *commandv1.Mount {
	w.t.Helper()
	table, rest := mountOf(path)
	kind := "kv"
	if table == "auth" {
		kind = "jwt"
	}
	w.must(&commandv1.Command{Body: &commandv1.Command_RegisterPlugin{RegisterPlugin: &commandv1.RegisterPlugin{
		Spec: &commandv1.Spec{Type: table, Name: kind, Sha256: strings.Repeat("ab", 32), Command: kind},
	}}})
	res := w.must(&commandv1.Command{Body: &commandv1.Command_EnableMount{EnableMount: &commandv1.EnableMount{
		Uuid: "uuid-" + ns + path, Accessor: "acc-" + ns + path, Namespace: ns, Table: table, Path: rest, Type: kind, PluginType: table,
	}}})
	return w.fsm.View().Mount(res.GetId())
}

// answer is what a client saw.
type answer struct {
	status int
	header http.Header
	text   string
	json   map[string]any
}

func (a *answer) data() map[string]any { d, _ := a.json["data"].(map[string]any); return d }
func (a *answer) auth() map[string]any { d, _ := a.json["auth"].(map[string]any); return d }
func (a *answer) wrap() map[string]any { d, _ := a.json["wrap_info"].(map[string]any); return d }

// call sends one request. Headers are pairs; a token is the root token unless a header says otherwise.
func (w *world) call(method, path, body string, headers ...string) *answer {
	w.t.Helper()
	var in io.Reader = strings.NewReader(body)
	r := httptest.NewRequest(method, "/v1/"+path, in)
	r.Header.Set(api.HeaderToken, rootToken)
	r.Header.Set(api.HeaderRequest, "true")
	for i := 0; i+1 < len(headers); i += 2 {
		if headers[i+1] == "" {
			r.Header.Del(headers[i])
			continue
		}
		r.Header.Set(headers[i], headers[i+1])
	}
	limit := 20 * time.Second
	if strings.HasPrefix(path, "sys/events") {
		limit = 20 * time.Millisecond // a stream ends with its client alone
	}
	ctx, cancel := context.WithTimeout(w.t.Context(), limit)
	defer cancel()
	rec := httptest.NewRecorder()
	w.s.Handler().ServeHTTP(rec, r.WithContext(ctx))
	a := &answer{status: rec.Code, header: rec.Header(), text: rec.Body.String()}
	d := json.NewDecoder(bytes.NewReader(rec.Body.Bytes()))
	d.UseNumber()
	_ = d.Decode(&a.json)
	return a
}

// shortly is a context for what ends with its client alone.
func (w *world) shortly() context.Context {
	ctx, cancel := context.WithTimeout(w.t.Context(), 100*time.Millisecond)
	w.t.Cleanup(cancel)
	return ctx
}

// as is call with another token.
func (w *world) as(token, method, path, body string, headers ...string) *answer {
	w.t.Helper()
	return w.call(method, path, body, append([]string{api.HeaderToken, token}, headers...)...)
}

// want fails unless the status is as given and the body holds every part.
func (a *answer) want(t testing.TB, status int, parts ...string) *answer {
	t.Helper()
	if a.status != status {
		t.Fatalf("status %d, want %d: %s", a.status, status, a.text)
	}
	for _, p := range parts {
		if !strings.Contains(a.text, p) {
			t.Fatalf("%s lacks %s", a.text, p)
		}
	}
	return a
}

// fakeRouter answers with what it was asked, and records it. handle replaces that.
type fakeRouter struct {
	w      *world
	mu     sync.Mutex
	calls  []*PluginRequest
	handle func(*PluginRequest) (*PluginResponse, error)
	exists func(*PluginRequest) (found, hasCheck bool)
	open   map[string]bool // paths within a mount that need no token
	root   map[string]bool
}

func (f *fakeRouter) Handle(_ context.Context, q *PluginRequest) (*PluginResponse, error) {
	f.mu.Lock()
	f.calls = append(f.calls, q)
	f.mu.Unlock()
	m, _ := f.w.fsm.View().MountFor(q.Namespace, q.Path)
	resp := &PluginResponse{Generation: 7, Node: "node-1", Index: 9, Mount: m}
	if f.handle != nil {
		got, err := f.handle(q)
		if got != nil {
			got.Mount, got.Generation, got.Node = m, 7, "node-1"
			return got, err
		}
		return resp, err
	}
	raw, err := json.Marshal(map[string]any{"op": q.Operation, "path": q.Path, "ns": q.Namespace, "body": q.Data, "keys": []string{"a"}})
	resp.Plugin = &pluginpb.Response{Data: string(raw)}
	return resp, err
}

func (f *fakeRouter) Lookup(_ context.Context, ns, path string) (Match, error) {
	m, rest := f.w.fsm.View().MountFor(ns, path)
	if m == nil {
		return Match{}, fault.Text(fault.UnsupportedPath, "no handler for route %q. route entry not found.", path)
	}
	return Match{Mount: m, Rest: rest, Unauthenticated: f.open[rest], Root: f.root[rest]}, nil
}

func (f *fakeRouter) Exists(_ context.Context, q *PluginRequest) (found, hasCheck bool, err error) {
	if f.exists != nil {
		found, hasCheck = f.exists(q)
	}
	return found, hasCheck, nil
}

func (f *fakeRouter) last() *PluginRequest {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.calls) == 0 {
		return nil
	}
	return f.calls[len(f.calls)-1]
}

func (f *fakeRouter) reset() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = nil
}

// fakePlugins runs everything.
type fakePlugins struct{ w *world }

func (p *fakePlugins) TryMount(context.Context, *commandv1.Mount, *commandv1.Spec) error { return nil }

func (p *fakePlugins) Plan(_ context.Context, targets []*commandv1.Target, _ string) ([]api.PlanNode, error) {
	n := api.PlanNode{Node: "node-1", NodeID: "n1", Mounts: []api.PlanMount{}}
	for _, t := range targets {
		n.Mounts = append(n.Mounts, api.PlanMount{Mount: t.GetPath(), OK: true})
	}
	return []api.PlanNode{n}, nil
}

func (p *fakePlugins) Running() map[string]api.RunningMount {
	out := map[string]api.RunningMount{}
	for _, m := range p.w.fsm.View().Mounts() {
		out[m.GetUuid()] = api.RunningMount{
			MountUUID: m.GetUuid(), Generation: m.GetWanted().GetGeneration(), Ready: true, PID: 1, State: "ready",
			Version: m.GetWanted().GetSpec().GetVersion(), SHA256: m.GetWanted().GetSpec().GetSha256(),
		}
	}
	return out
}

func (p *fakePlugins) RunningEverywhere(context.Context) []api.NodeRunning {
	n := api.NodeRunning{Node: "node-1", NodeID: "n1"}
	for _, r := range p.Running() {
		n.Mounts = append(n.Mounts, r)
	}
	return []api.NodeRunning{n}
}

func (p *fakePlugins) Hash(_ context.Context, command string) (string, error) {
	if strings.Contains(command, "..") {
		return "", fault.Text(fault.Invalid, "path cannot contain parent references")
	}
	return "", fault.Text(fault.NotFound, "no file")
}

type fakeCluster struct {
	w        *world
	leader   bool
	settled  []uint64
	restored []byte
	steps    int
	seal     *api.KeyStatus
}

func (c *fakeCluster) Status() api.ClusterStatus {
	return api.ClusterStatus{
		Initialized: true, ClusterName: "test", ClusterID: "c1", IsLeader: c.leader, LeaderID: "n2", LeaderName: "node-2",
		LeaderAPIAddress: "http://node-2:8200", LeaderClusterAddress: "node-2:8201", Term: 1, CommitIndex: 5, AppliedIndex: 5,
	}
}

func (c *fakeCluster) Members(context.Context) ([]api.Member, error) {
	return []api.Member{{
		ID: "n1", Name: "node-1", APIAddress: "http://node-1:8200", ClusterAddress: "node-1:8201", Version: "0.1.0",
		Leader: c.leader, Self: true, Suffrage: "voter",
	}, {ID: "n9", Name: "gone", Left: true}}, nil
}

func (c *fakeCluster) RemoveMember(_ context.Context, id string) error {
	if id != "n1" {
		return fault.Text(fault.NotFound, "no node %s", id)
	}
	return nil
}
func (c *fakeCluster) StepDown(context.Context) error { c.steps++; return nil }
func (c *fakeCluster) Leave(context.Context) error    { return nil }

func (c *fakeCluster) Autopilot(context.Context) (*api.AutopilotState, error) {
	return &api.AutopilotState{Healthy: true, Leader: "n1", Voters: []string{"n1"}, Servers: map[string]api.AutopilotServer{
		"n1": {ID: "n1", Name: "node-1", LastContact: "0s", Healthy: true, StableSince: "2026-01-01T00:00:00Z"},
	}}, nil
}

func (c *fakeCluster) AutopilotConfig() api.AutopilotConfig {
	return api.AutopilotConfig{LastContactThreshold: "10s", MaxTrailingLogs: 1000}
}

func (c *fakeCluster) Settle(_ context.Context, index uint64) error {
	c.settled = append(c.settled, index)
	return nil
}

func (c *fakeCluster) Seal() *api.KeyStatus { return c.seal }

func (c *fakeCluster) Backup(_ context.Context, out io.Writer) error {
	return c.w.fsm.View().WriteSnapshot(out)
}

func (c *fakeCluster) Restore(_ context.Context, in io.Reader, _ string) (uint64, error) {
	var err error
	c.restored, err = io.ReadAll(in)
	return 99, err
}

// fakeLeases enters what it is asked to, and says that so many are left; takes fewer are left each time.
type fakeLeases struct {
	w           *world
	left, takes int
}

func (l *fakeLeases) Renew(_ context.Context, id string, increment time.Duration, _ []byte) (*Renewed, error) {
	if l.w.fsm.View().Lease(id) == nil {
		return nil, fault.Text(fault.Invalid, "lease not found")
	}
	return &Renewed{ID: id, TTL: increment, Renewable: true}, nil
}

func (l *fakeLeases) Revoke(_ context.Context, which *commandv1.RevokeLeases, by []byte, _ time.Duration) (int, error) {
	which = proto.CloneOf(which)
	which.Force = true
	_, err := l.w.enter(&commandv1.Command{ByToken: by, Body: &commandv1.Command_RevokeLeases{RevokeLeases: which}})
	l.left = max(0, l.left-l.takes)
	return l.left, err
}
