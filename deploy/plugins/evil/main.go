// evil is a secrets engine that misbehaves to order, built with Vault's SDK like any real plugin: one mode for each
// fault that a host has to survive. Its arguments are the mode and its parameters:
//
//	evil -mode crash-after-write
//	evil -mode error-rate -rate 0.05 -on write
//
// Without a mode it behaves: data/ keeps values, count/ counts, creds/ lends with a lease, and modes that act on requests act on every
// request, or, with -path, on those whose path begins so.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/plugin"
)

type options struct {
	mode    string
	version string
	path    string
	on      string
	node    string
	rate    float64
	size    int
	delay   time.Duration
	single  bool
}

const modes = `Before the handshake: exit1, segfault, hang, garbage, endless-line, stderr-flood, tcp-handshake, close-socket
Setup and after: setup-fails, setup-hangs, setup-panics, initialize-fails, initialize-hangs, initialize-panics, cleanup-hangs
Requests: panic, exit, crash-after-write, slow, never, huge-reply, error-rate, leak, goroutines, fds
The process: ignore-sigterm, daemon, hold-stdout, fork-bomb, lie-about-type, auth`

func main() {
	var o options
	flag.StringVar(&o.mode, "mode", "", modes)
	flag.StringVar(&o.version, "version", "v0.0.1", "what info answers")
	flag.StringVar(&o.path, "path", "", "misbehave only on requests whose path begins so")
	flag.StringVar(&o.on, "on", "all", "misbehave only on read, write or all requests")
	flag.StringVar(&o.node, "node", "", "misbehave only on the node of this name (ROLLCALL_NODE)")
	flag.Float64Var(&o.rate, "rate", 0.05, "error-rate: the share of requests that fail")
	flag.IntVar(&o.size, "size", 100<<20, "huge-reply, stderr-flood, leak: bytes")
	flag.DurationVar(&o.delay, "delay", time.Second, "slow: how long a request takes")
	flag.BoolVar(&o.single, "single", false, "do not multiplex")
	flag.Parse()
	if o.node != "" && o.node != os.Getenv("ROLLCALL_NODE") {
		o.mode = ""
	}
	o.beforeHandshake()
	logger := hclog.New(&hclog.LoggerOptions{Level: hclog.Warn, Output: os.Stderr, JSONFormat: true})
	opts := &plugin.ServeOpts{BackendFactoryFunc: o.factory, Logger: logger}
	serve := plugin.ServeMultiplex
	if o.single {
		serve = plugin.Serve
	}
	if err := serve(opts); err != nil {
		logger.Error("evil plugin ended", "error", err)
		os.Exit(1)
	}
}

// beforeHandshake is where most plugins fail that fail at all.
func (o options) beforeHandshake() {
	switch o.mode {
	case "exit1":
		fmt.Fprintln(os.Stderr, "evil: told to exit with status 1")
		os.Exit(1)
	case "segfault":
		_ = syscall.Kill(os.Getpid(), syscall.SIGSEGV)
		time.Sleep(time.Hour)
	case "hang":
		time.Sleep(time.Hour)
	case "garbage":
		_, _ = os.Stdout.WriteString("\x00\x1b[31mnot a handshake\x07\r\xff\n")
		time.Sleep(time.Hour)
	case "endless-line":
		for {
			_, _ = os.Stdout.WriteString(strings.Repeat("x", 4096))
		}
	case "stderr-flood":
		flood(os.Stderr, o.size)
	case "tcp-handshake":
		fmt.Println("1|5|tcp|127.0.0.1:9|grpc")
		time.Sleep(time.Hour)
	case "close-socket":
		fmt.Printf("1|5|unix|%s/gone|grpc\n", os.Getenv("PLUGIN_UNIX_SOCKET_DIR"))
		time.Sleep(time.Hour)
	case "ignore-sigterm":
		signal.Ignore(syscall.SIGTERM, syscall.SIGINT)
	case "daemon":
		child(true)
	case "hold-stdout":
		child(false)
	case "fork-bomb":
		go func() {
			for {
				child(true)
			}
		}()
	}
}

// child starts a process that holds our output; in a session of its own it survives the death of our process group.
func child(session bool) {
	cmd := exec.Command("/bin/sleep", "600")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: session}
	if err := cmd.Start(); err != nil {
		time.Sleep(10 * time.Millisecond)
		return
	}
	go func() { _ = cmd.Wait() }()
}

func flood(w io.Writer, size int) {
	line := []byte("evil: " + strings.Repeat("noise ", 40) + "\n")
	for n := 0; n < size; n += len(line) {
		if _, err := w.Write(line); err != nil {
			return
		}
	}
}

// backend keeps its counters under one lock from reading to writing, as real engines do: two processes that write
// one mount at the same time lose updates.
type backend struct {
	*framework.Backend
	o    options
	uuid string

	mu    sync.Mutex
	cache map[string]int64
	leaks [][]byte
}

func (o options) factory(ctx context.Context, conf *logical.BackendConfig) (logical.Backend, error) {
	switch o.mode {
	case "setup-fails":
		return nil, errors.New("evil: told to fail in Setup")
	case "setup-hangs":
		time.Sleep(time.Hour)
	case "setup-panics":
		panic("evil: told to panic in Setup")
	}
	b := &backend{o: o, uuid: conf.BackendUUID, cache: map[string]int64{}}
	kind := logical.TypeLogical
	if o.mode == "lie-about-type" || o.mode == "auth" {
		kind = logical.TypeCredential
	}
	b.Backend = &framework.Backend{
		Help: "A secrets engine that misbehaves to order.", BackendType: kind, RunningVersion: o.version,
		PathsSpecial:   &logical.Paths{Unauthenticated: []string{"open/*"}, Root: []string{"root/*"}},
		InitializeFunc: b.initialize, Clean: b.clean, Invalidate: b.invalidate,
		Paths: []*framework.Path{
			b.readOnly("info", b.info), b.readOnly("ping", b.ping), b.readOnly("open/ping", b.ping), b.readOnly("root/ping", b.ping),
			{
				Pattern: "echo", Fields: map[string]*framework.FieldSchema{"value": {Type: framework.TypeString}},
				Operations: map[logical.Operation]framework.OperationHandler{
					logical.ReadOperation:   &framework.PathOperation{Callback: b.guard(b.echo)},
					logical.UpdateOperation: &framework.PathOperation{Callback: b.guard(b.echo)},
				},
			},
			{
				Pattern: "data/" + framework.MatchAllRegex("key"),
				Fields: map[string]*framework.FieldSchema{
					"key": {Type: framework.TypeString}, "value": {Type: framework.TypeString},
				},
				ExistenceCheck: b.exists,
				Operations: map[logical.Operation]framework.OperationHandler{
					logical.ReadOperation:   &framework.PathOperation{Callback: b.guard(b.read)},
					logical.CreateOperation: &framework.PathOperation{Callback: b.guard(b.write)},
					logical.UpdateOperation: &framework.PathOperation{Callback: b.guard(b.write)},
					logical.DeleteOperation: &framework.PathOperation{Callback: b.guard(b.remove)},
					logical.ListOperation:   &framework.PathOperation{Callback: b.guard(b.list)},
				},
			},
			{
				Pattern: "count/" + framework.GenericNameRegex("key"),
				Fields:  map[string]*framework.FieldSchema{"key": {Type: framework.TypeString}},
				Operations: map[logical.Operation]framework.OperationHandler{
					logical.ReadOperation:   &framework.PathOperation{Callback: b.guard(b.counter)},
					logical.UpdateOperation: &framework.PathOperation{Callback: b.guard(b.count)},
				},
			},
		},
	}
	secret, paths := b.creds()
	b.Secrets, b.Paths = []*framework.Secret{secret}, append(b.Paths, paths...)
	return b, b.Setup(ctx, conf)
}

func (b *backend) readOnly(pattern string, f framework.OperationFunc) *framework.Path {
	return &framework.Path{Pattern: pattern + "$", Operations: map[logical.Operation]framework.OperationHandler{
		logical.ReadOperation: &framework.PathOperation{Callback: b.guard(f)},
	}}
}

func (b *backend) initialize(ctx context.Context, _ *logical.InitializationRequest) error {
	switch b.o.mode {
	case "initialize-fails":
		return errors.New("evil: told to fail in Initialize")
	case "initialize-hangs":
		time.Sleep(time.Hour)
	case "initialize-panics":
		panic("evil: told to panic in Initialize")
	}
	return nil
}

func (b *backend) clean(context.Context) {
	if b.o.mode == "cleanup-hangs" {
		time.Sleep(time.Hour)
	}
}

func (b *backend) invalidate(_ context.Context, key string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.cache, strings.TrimPrefix(key, "count/"))
}

// guard misbehaves where it is told to.
func (b *backend) guard(next framework.OperationFunc) framework.OperationFunc {
	return func(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
		kind := "write"
		if req.Operation == logical.ReadOperation || req.Operation == logical.ListOperation {
			kind = "read"
		}
		if !strings.HasPrefix(req.Path, b.o.path) || (b.o.on != "all" && b.o.on != kind) {
			return next(ctx, req, d)
		}
		switch b.o.mode {
		case "panic":
			go panic("evil: told to panic in a request") // in a handler gRPC would not catch it either
			select {}
		case "exit":
			os.Exit(7)
		case "crash-after-write":
			resp, err := next(ctx, req, d)
			if kind == "write" && err == nil {
				os.Exit(9)
			}
			return resp, err
		case "slow":
			select {
			case <-time.After(b.o.delay):
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		case "never":
			<-ctx.Done()
			return nil, ctx.Err()
		case "huge-reply":
			return &logical.Response{Data: map[string]any{"x": strings.Repeat("x", b.o.size)}}, nil
		case "error-rate":
			if rand.Float64() < b.o.rate {
				return nil, errors.New("evil: told to fail some requests")
			}
		case "leak":
			b.mu.Lock()
			b.leaks = append(b.leaks, make([]byte, b.o.size))
			last := b.leaks[len(b.leaks)-1]
			b.mu.Unlock()
			for i := 0; i < len(last); i += 4096 {
				last[i] = 1
			}
		case "goroutines":
			for range 10_000 {
				go func() { select {} }()
			}
		case "fds":
			for range 1000 {
				if _, err := syscall.Open("/dev/null", syscall.O_RDONLY, 0); err != nil {
					break
				}
			}
		}
		return next(ctx, req, d)
	}
}

func (b *backend) info(context.Context, *logical.Request, *framework.FieldData) (*logical.Response, error) {
	return &logical.Response{Data: map[string]any{
		"version": b.o.version, "pid": os.Getpid(), "mode": b.o.mode, "node": os.Getenv("ROLLCALL_NODE"), "uuid": b.uuid,
		"goroutines": runtime.NumGoroutine(), "state": int(b.System().ReplicationState()),
	}}, nil
}

func (b *backend) ping(context.Context, *logical.Request, *framework.FieldData) (*logical.Response, error) {
	return &logical.Response{Data: map[string]any{"pong": true}}, nil
}

func (b *backend) echo(_ context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	headers := map[string]any{}
	for k, v := range req.Headers {
		headers[k] = strings.Join(v, ",")
	}
	return &logical.Response{Data: map[string]any{
		"value": d.Get("value"), "path": req.Path, "operation": string(req.Operation), "mount_point": req.MountPoint,
		"client_token": req.ClientToken, "display_name": req.DisplayName, "entity_id": req.EntityID, "headers": headers,
	}}, nil
}

func (b *backend) exists(ctx context.Context, req *logical.Request, d *framework.FieldData) (bool, error) {
	e, err := req.Storage.Get(ctx, "data/"+d.Get("key").(string))
	return e != nil, err
}

func (b *backend) read(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	e, err := req.Storage.Get(ctx, "data/"+d.Get("key").(string))
	if err != nil || e == nil {
		return nil, err
	}
	return &logical.Response{Data: map[string]any{"value": string(e.Value), "version": b.o.version}}, nil
}

func (b *backend) write(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	return nil, req.Storage.Put(ctx, &logical.StorageEntry{
		Key: "data/" + d.Get("key").(string), Value: []byte(d.Get("value").(string)),
	})
}

func (b *backend) remove(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	return nil, req.Storage.Delete(ctx, "data/"+d.Get("key").(string))
}

func (b *backend) list(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	prefix := "data/"
	if key := strings.TrimSuffix(d.Get("key").(string), "/"); key != "" {
		prefix += key + "/"
	}
	keys, err := req.Storage.List(ctx, prefix)
	if err != nil {
		return nil, err
	}
	return logical.ListResponse(keys), nil
}

// load returns a counter; the caller holds the lock.
func (b *backend) load(ctx context.Context, s logical.Storage, key string) (int64, error) {
	if n, ok := b.cache[key]; ok {
		return n, nil
	}
	e, err := s.Get(ctx, "count/"+key)
	if err != nil || e == nil {
		return 0, err
	}
	return strconv.ParseInt(string(e.Value), 10, 64)
}

func (b *backend) counter(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	n, err := b.load(ctx, req.Storage, d.Get("key").(string))
	if err != nil {
		return nil, err
	}
	return &logical.Response{Data: map[string]any{"n": n, "version": b.o.version}}, nil
}

func (b *backend) count(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	key := d.Get("key").(string)
	n, err := b.load(ctx, req.Storage, key)
	if err != nil {
		return nil, err
	}
	n++
	if err := req.Storage.Put(ctx, &logical.StorageEntry{Key: "count/" + key, Value: []byte(strconv.FormatInt(n, 10))}); err != nil {
		delete(b.cache, key)
		return nil, err
	}
	b.cache[key] = n
	return &logical.Response{Data: map[string]any{"n": n, "version": b.o.version}}, nil
}
