package router

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"rollcall/node/fault"
	"rollcall/node/supervisor"
	pluginpb "rollcall/proto/plugin"
)

// fake is a plugin backend in this process, with the habit that makes swaps dangerous: it keeps its storage in a cache that
// is guarded by nothing but its own lock. One fake is one process; Setup makes its instance anew.
type fake struct {
	name string
	kind string
	// onInit runs in Initialize.
	onInit func(context.Context, supervisor.Storage) error
	// setupErr, when set, refuses Setup.
	setupErr atomic.Pointer[error]
	paths    *pluginpb.Paths

	// enter, when set, is called by "slow" requests before they wait for go_ or their context.
	enter chan struct{}
	leave chan struct{}

	mu      sync.Mutex
	gen     int
	dead    bool
	kill    chan struct{}
	setup   supervisor.Setup
	inst    *fakeInstance
	invalid []string
	gate    func(key string) error
	calls   atomic.Int64
	last    *pluginpb.Request
	cleaned int
}

type fakeInstance struct {
	f    *fake
	st   supervisor.Storage
	sys  supervisor.System
	lock sync.Mutex
	// cache maps a key to what the instance believes it holds.
	cache map[string]string
}

func newFake(name string) *fake {
	return &fake{
		name: name, kind: "secret", enter: make(chan struct{}, 1024), leave: make(chan struct{}), kill: make(chan struct{}),
		paths: &pluginpb.Paths{Unauthenticated: []string{"login/*", "open", "a/+/c"}, Root: []string{"root/*"}},
	}
}

var _ Backend = (*fake)(nil)

func (f *fake) Setup(_ context.Context, s supervisor.Setup) error {
	if e := f.setupErr.Load(); e != nil {
		return *e
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.dead {
		return fault.Text(fault.Refused, "the process has ended")
	}
	f.gen++
	f.setup = s
	f.inst = &fakeInstance{f: f, st: s.Storage, sys: s.System, cache: map[string]string{}}
	return nil
}

func (f *fake) Initialize(ctx context.Context) error {
	f.mu.Lock()
	in := f.inst
	f.mu.Unlock()
	if f.onInit != nil {
		return f.onInit(ctx, in.st)
	}
	return nil
}

func (f *fake) Type(context.Context) (string, error)                  { return f.kind, nil }
func (f *fake) SpecialPaths(context.Context) (*pluginpb.Paths, error) { return f.paths, nil }
func (f *fake) Cleanup(context.Context) error                         { f.mu.Lock(); f.cleaned++; f.mu.Unlock(); return nil }

func (f *fake) storage() supervisor.Storage { f.mu.Lock(); defer f.mu.Unlock(); return f.inst.st }

func (f *fake) setups() int { f.mu.Lock(); defer f.mu.Unlock(); return f.gen }

func (f *fake) invalidated() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]string(nil), f.invalid...)
}

// die ends the process under its calls.
func (f *fake) die() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.dead {
		f.dead = true
		close(f.kill)
	}
}

func (f *fake) InvalidateKey(_ context.Context, key string) error {
	f.mu.Lock()
	in, gate := f.inst, f.gate
	f.invalid = append(f.invalid, key)
	f.mu.Unlock()
	if gate != nil {
		if err := gate(key); err != nil {
			return err
		}
	}
	in.lock.Lock()
	delete(in.cache, key)
	in.lock.Unlock()
	return nil
}

func (f *fake) HandleExistenceCheck(ctx context.Context, req *pluginpb.Request) (found, check bool, err error) {
	f.mu.Lock()
	in := f.inst
	f.mu.Unlock()
	if strings.HasPrefix(req.GetPath(), "nocheck/") {
		return false, false, nil
	}
	e, err := in.st.Get(ctx, req.GetPath())
	return e != nil, true, err
}

func (f *fake) HandleRequest(ctx context.Context, req *pluginpb.Request) (*pluginpb.Response, error) {
	f.mu.Lock()
	in, dead := f.inst, f.dead
	f.last = req
	f.mu.Unlock()
	if dead {
		return nil, fault.Text(fault.Unavailable, "the plugin process was killed")
	}
	f.calls.Add(1)
	return in.handle(ctx, req)
}

func (in *fakeInstance) handle(ctx context.Context, req *pluginpb.Request) (*pluginpb.Response, error) {
	path := req.GetPath()
	switch {
	case path == "whoami":
		return data(map[string]any{"name": in.f.name}), nil
	case path == "ping":
		return nil, nil
	case path == "echo":
		return &pluginpb.Response{Data: req.GetData(), Headers: map[string]*pluginpb.Header{
			"X-Yes": {Header: []string{"1"}}, "X-No": {Header: []string{"1"}},
		}}, nil
	case path == "torn" && in.sys.ReplicationState == supervisor.ReplicationStandby:
		if _, err := in.slow(ctx); err != nil {
			return nil, err
		}
		return nil, fault.Text(fault.Internal, "could not find version data")
	case path == "torn":
		return data(map[string]any{"name": in.f.name}), nil
	case path == "slow-error":
		if _, err := in.slow(ctx); err != nil {
			return nil, err
		}
		return nil, fault.Text(fault.Invalid, "what the old generation says")
	case strings.HasPrefix(path, "slow"):
		return in.slow(ctx)
	case path == "error":
		return &pluginpb.Response{Data: `{"error":"no good"}`}, nil
	case path == "invalid":
		return &pluginpb.Response{Data: `{"error":"no good"}`}, fault.Text(fault.Invalid, "invalid request")
	case path == "teapot":
		return nil, &fault.Error{Kind: fault.Internal, Text: "short and stout", Code: 418}
	case path == "broken":
		return nil, fault.Text(fault.Internal, "1 error occurred")
	case path == "wants-write":
		return in.write(ctx, "side", "x")
	case path == "cred":
		return &pluginpb.Response{Data: `{"user":"u"}`, Secret: &pluginpb.Secret{}}, nil
	case path == "auth":
		return &pluginpb.Response{Auth: &pluginpb.Auth{}}, nil
	case strings.HasPrefix(path, "count/"):
		return in.count(ctx, req)
	case req.GetOperation() == opRead:
		v, err := in.read(ctx, path)
		if err != nil || v == "" {
			return nil, err
		}
		return data(map[string]any{"value": v}), nil
	case req.GetOperation() == opList:
		keys, err := in.st.List(ctx, path)
		return data(map[string]any{"keys": keys}), err
	case req.GetOperation() == opDelete:
		return nil, in.st.Delete(ctx, path)
	default:
		var body struct {
			Value string `json:"value"`
		}
		if err := json.Unmarshal([]byte(req.GetData()), &body); err != nil {
			return nil, fault.Text(fault.Invalid, "%v", err)
		}
		in.lock.Lock()
		defer in.lock.Unlock()
		return in.write(ctx, path, body.Value)
	}
}

// slow waits for leave, the end of its context, or the process's.
func (in *fakeInstance) slow(ctx context.Context) (*pluginpb.Response, error) {
	in.f.enter <- struct{}{}
	select {
	case <-in.f.leave:
		return data(map[string]any{"name": in.f.name}), nil
	case <-in.f.kill:
		return nil, fault.Text(fault.OutcomeUnknown, "the plugin process was killed; it was working on the request")
	case <-ctx.Done():
		return nil, &fault.Error{Kind: fault.KindOf(ctx.Err()), Text: "given up", Err: ctx.Err()}
	}
}

// count reads, adds one, and writes, under the instance's lock and through its cache: what one process may do, and two may
// not.
func (in *fakeInstance) count(ctx context.Context, req *pluginpb.Request) (*pluginpb.Response, error) {
	in.lock.Lock()
	defer in.lock.Unlock()
	v, err := in.readLocked(ctx, req.GetPath())
	if err != nil {
		return nil, err
	}
	n, _ := strconv.Atoi(v)
	if req.GetOperation() == opRead {
		return data(map[string]any{"n": n}), nil
	}
	return in.write(ctx, req.GetPath(), strconv.Itoa(n+1))
}

func (in *fakeInstance) read(ctx context.Context, key string) (string, error) {
	in.lock.Lock()
	defer in.lock.Unlock()
	return in.readLocked(ctx, key)
}

func (in *fakeInstance) readLocked(ctx context.Context, key string) (string, error) {
	if v, ok := in.cache[key]; ok {
		return v, nil
	}
	e, err := in.st.Get(ctx, key)
	if err != nil {
		return "", err
	}
	v := ""
	if e != nil {
		v = string(e.Value)
	}
	in.cache[key] = v
	return v, nil
}

func (in *fakeInstance) write(ctx context.Context, key, value string) (*pluginpb.Response, error) {
	if err := in.st.Put(ctx, &supervisor.Entry{Key: key, Value: []byte(value)}); err != nil {
		// What plugins do: the kind is lost, the text stays.
		kind := fault.Internal
		if supervisor.IsReadOnlyText(err.Error()) {
			kind = fault.ReadOnly
		}
		return nil, fault.Text(kind, "1 error occurred: %v", fmt.Sprint(err))
	}
	in.cache[key] = value
	return nil, nil
}

func data(v map[string]any) *pluginpb.Response {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return &pluginpb.Response{Data: string(b)}
}

// field reads one field of a response's data.
func field(r *Response, name string) any {
	var v map[string]any
	if r == nil || json.Unmarshal([]byte(r.Plugin.GetData()), &v) != nil {
		return nil
	}
	return v[name]
}
