// Package demoplugin is a secrets engine inside the rollcall binary, for `demo`, `dev` and the tests: it keeps texts
// under data/, tells about itself under info, and fails where its arguments say so. It runs as a plugin process of its
// own, over the same protocol as every other plugin.
package demoplugin

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	pluginpb "rollcall/proto/plugin"
	"rollcall/proto/plugin/pluginserver"
)

// options are what the arguments of a catalog entry say.
type options struct {
	version   string
	fail      string
	failOn    string
	errorRate float64
	errorOn   string
	delay     time.Duration
	single    bool
	database  bool
	require   string
}

// Main is the plugin's process. It returns the exit code; args come without the program and the word that made it a
// plugin.
func Main(args []string, stderr io.Writer) int {
	var o options
	f := flag.NewFlagSet("demo-plugin", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&o.version, "version", "", "what info says")
	f.StringVar(&o.fail, "fail", "", "exit, start, hang, setup, initialize, second-setup, verify: where to fail")
	f.StringVar(&o.failOn, "fail-on", "", "fail on the node of this name alone")
	f.Float64Var(&o.errorRate, "error-rate", 0, "share of requests that fail, 0 to 1")
	f.StringVar(&o.errorOn, "error-on", "all", "read, write or all: which requests fail")
	f.DurationVar(&o.delay, "delay", 0, "how long each request takes")
	f.BoolVar(&o.single, "single", false, "one instance a process: do not multiplex")
	f.BoolVar(&o.database, "database", false, "be a database plugin, of protocol 6, or with -single of 5")
	f.StringVar(&o.require, "require", "", "a field that the database's config must have")
	if f.Parse(args) != nil {
		return 2
	}
	if o.failOn != "" && o.failOn != os.Getenv("ROLLCALL_NODE") {
		o.fail = ""
	}
	switch o.fail {
	case "exit", "start":
		_, _ = fmt.Fprintln(stderr, "demo plugin: told to fail at its start")
		return 3
	case "hang":
		for { // a wait without a timer is a deadlock to the runtime, which would end the process
			time.Sleep(time.Hour)
		}
	}
	if o.database {
		pluginserver.ServeDatabase(&database{options: o, connections: map[string]*connection{}}, !o.single)
		return 0
	}
	var setups atomic.Int64
	pluginserver.Serve(pluginserver.Config{
		Multiplex: !o.single,
		New: func(_ context.Context, s pluginserver.Setup) (pluginserver.Backend, error) {
			// The first Setup of a process is a trial's, the next one is for real.
			again := setups.Add(1) > 1
			if o.fail == "setup" || o.fail == "second-setup" && again {
				return nil, errors.New("demo plugin: told to fail in Setup")
			}
			return &backend{options: o, storage: s.Storage, cache: map[string]string{}}, nil
		},
	})
	return 0
}

// backend is one mount. Like real engines it reads through a cache, and holds a lock from reading to writing: two
// writers of one mount in two processes would lose updates.
type backend struct {
	options
	storage pluginserver.Storage

	mu    sync.Mutex
	cache map[string]string
}

// prefix is where the values live in storage.
const prefix = "data/"

func (b *backend) Initialize(context.Context) error {
	if b.fail == "initialize" {
		return errors.New("demo plugin: told to fail in Initialize")
	}
	return nil
}

func (b *backend) Invalidate(key string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.cache, key)
}

func (b *backend) Cleanup(context.Context) {}

func (b *backend) Exists(ctx context.Context, req *pluginpb.Request) (exists, check bool, err error) {
	if !strings.HasPrefix(req.GetPath(), prefix) {
		return false, false, nil
	}
	_, found, err := b.get(ctx, req.GetPath())
	return found, true, err
}

func (b *backend) Handle(ctx context.Context, req *pluginpb.Request) (*pluginpb.Response, error) {
	if b.delay > 0 {
		t := time.NewTimer(b.delay)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	op := req.GetOperation()
	if b.unlucky(op) {
		return nil, fmt.Errorf("demo plugin %s: told to fail %g of its requests", b.version, b.errorRate)
	}
	switch path := req.GetPath(); {
	case path == "info" && op == "read":
		return reply(map[string]any{"version": b.version, "pid": os.Getpid()})
	case path == "ping" && op == "read":
		return reply(map[string]any{"pong": true})
	case strings.HasPrefix(path, prefix) || path == strings.TrimSuffix(prefix, "/"):
		return b.data(ctx, req)
	default:
		return nil, pluginserver.ErrUnsupportedPath
	}
}

func (o options) unlucky(op string) bool {
	read := op == "read" || op == "list"
	if o.errorRate <= 0 || o.errorOn == "read" && !read || o.errorOn == "write" && read {
		return false
	}
	return rand.Float64() < o.errorRate
}

func (b *backend) data(ctx context.Context, req *pluginpb.Request) (*pluginpb.Response, error) {
	key := req.GetPath()
	switch req.GetOperation() {
	case "read":
		value, found, err := b.get(ctx, key)
		if err != nil || !found {
			return nil, err
		}
		return reply(map[string]any{"value": value, "version": b.version})
	case "list":
		keys, err := b.storage.List(ctx, strings.TrimSuffix(key, "/")+"/")
		if err != nil {
			return nil, err
		}
		return reply(map[string]any{"keys": keys})
	case "create", "update":
		return nil, b.put(ctx, key, req.GetData())
	case "delete":
		b.mu.Lock()
		defer b.mu.Unlock()
		if err := b.storage.Delete(ctx, key); err != nil {
			return nil, err
		}
		delete(b.cache, key)
		return nil, nil
	default:
		return nil, pluginserver.ErrUnsupportedOperation
	}
}

// put stores value, or with add counts the number up that is there: the read, the sum and the write under one lock.
func (b *backend) put(ctx context.Context, key, body string) error {
	var in struct {
		Value string `json:"value"`
		Add   int64  `json:"add"`
	}
	if err := json.Unmarshal([]byte(body), &in); err != nil || in.Value == "" && in.Add == 0 {
		return &pluginserver.Error{Type: pluginserver.ErrInvalidRequest.Type, Text: "a write needs value (a text) or add (a number)"}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	value := in.Value
	if in.Add != 0 {
		old, _, err := b.getLocked(ctx, key)
		if err != nil {
			return err
		}
		var n int64
		if old != "" {
			if _, err := fmt.Sscan(old, &n); err != nil {
				return fmt.Errorf("add to %s: it holds no number", key)
			}
		}
		value = fmt.Sprint(n + in.Add)
	}
	if err := b.storage.Put(ctx, key, []byte(value)); err != nil {
		delete(b.cache, key)
		return err
	}
	b.cache[key] = value
	return nil
}

func (b *backend) get(ctx context.Context, key string) (string, bool, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.getLocked(ctx, key)
}

func (b *backend) getLocked(ctx context.Context, key string) (string, bool, error) {
	if v, ok := b.cache[key]; ok {
		return v, true, nil
	}
	raw, found, err := b.storage.Get(ctx, key)
	if err != nil || !found {
		return "", false, err
	}
	if len(b.cache) < 10_000 {
		b.cache[key] = string(raw)
	}
	return string(raw), true, nil
}

func reply(data map[string]any) (*pluginpb.Response, error) {
	raw, err := json.Marshal(data)
	if err != nil {
		return nil, err
	}
	return &pluginpb.Response{Data: string(raw)}, nil
}
