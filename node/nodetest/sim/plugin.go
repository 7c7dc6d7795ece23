package sim

import (
	"context"
	"encoding/json"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"rollcall/node/fault"
	"rollcall/node/router"
	"rollcall/node/supervisor"
	pluginpb "rollcall/proto/plugin"
)

// backend is one instance of a small key-value engine, with the habit that makes swaps dangerous: it answers from a cache
// and reads, adds and writes under a lock of its own, which a second instance would know nothing of.
type backend struct {
	p    *process
	life lock // one Setup or Cleanup at a time

	mu     sync.Mutex
	inst   *instance
	setups int
	over   bool
}

// instance is what one Setup made.
type instance struct {
	storage  supervisor.Storage
	ended    context.Context // its storage ends with it
	end      context.CancelFunc
	writable atomic.Bool
	lock     lock
	cache    map[string]string
}

var _ router.Backend = (*backend)(nil)

func newBackend(p *process) *backend { return &backend{p: p, life: newLock()} }

// lock is a mutex that may be held over waits: in virtual time, a goroutine that waits for a sync.Mutex stops the clock.
type lock chan struct{}

func newLock() lock { return make(lock, 1) }

// take returns false when done is closed first.
func (l lock) take(done <-chan struct{}) bool {
	select {
	case l <- struct{}{}:
		return true
	case <-done:
		return false
	}
}

func (l lock) leave() { <-l }

// call runs f as a call into the process: it takes a moment, and it ends when the process does.
func (b *backend) call(ctx context.Context, op string, f func(ctx context.Context) error) error {
	select {
	case <-b.p.done:
		return fault.New(fault.Unavailable, op, b.p.spec.GetName(), "the plugin process has ended")
	default:
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-b.p.done:
			cancel(errDied)
		case <-stop:
		}
	}()
	err := f(ctx)
	select {
	case <-b.p.done:
		return fault.New(fault.OutcomeUnknown, op, b.p.spec.GetName(), "the plugin process ended under the call")
	default:
		return err
	}
}

var errDied = fault.Text(fault.OutcomeUnknown, "the plugin process ended under the call")

// phase is a call that must succeed before the plugin is used: whatever goes wrong in it is a refusal.
func (b *backend) phase(ctx context.Context, op string) error {
	return b.call(ctx, op, func(ctx context.Context) error {
		if err := wait(ctx, b.p.l.temper.between(time.Millisecond, 15*time.Millisecond)); err != nil {
			return fault.As(fault.Refused, err, op, b.p.spec.GetName())
		}
		switch b.p.l.temper.strikes(op) {
		case refuse:
			return fault.New(fault.Refused, op, b.p.spec.GetName(), "told to fail in %s", op)
		case hang:
			<-ctx.Done()
			return fault.New(fault.Refused, op, b.p.spec.GetName(), "the plugin did not return in the time it has")
		case fine:
		}
		return nil
	})
}

func (b *backend) Setup(ctx context.Context, s supervisor.Setup) error {
	if !b.life.take(ctx.Done()) {
		return fault.New(fault.Canceled, "setup", b.p.spec.GetName(), "the caller gave up")
	}
	defer b.life.leave()
	b.retire()
	b.mu.Lock()
	b.setups++
	op := "setup"
	if b.setups > 1 {
		op = "setup again"
	}
	over := b.over
	b.mu.Unlock()
	if over {
		return fault.New(fault.Unavailable, "setup", b.p.spec.GetName(), "the instance has been cleaned up")
	}
	if err := b.phase(ctx, op); err != nil {
		return fault.As(fault.Refused, err, "setup", b.p.spec.GetName())
	}
	in := &instance{storage: s.Storage, lock: newLock(), cache: map[string]string{}}
	in.ended, in.end = context.WithCancel(context.Background())
	b.mu.Lock()
	defer b.mu.Unlock()
	b.inst = in
	return nil
}

// Initialize counts its calls in storage, where it may write: so a takeover has something to commit.
func (b *backend) Initialize(ctx context.Context) error {
	in := b.instance()
	if in == nil {
		return fault.New(fault.Refused, "initialize", b.p.spec.GetName(), "it is not set up")
	}
	in.writable.Store(true)
	if err := b.phase(ctx, "initialize"); err != nil {
		return fault.As(fault.Refused, err, "initialize", b.p.spec.GetName())
	}
	return b.call(ctx, "initialize", func(ctx context.Context) error {
		err := in.add(ctx, "initialized", 1)
		if err != nil && !supervisor.IsReadOnlyText(err.Error()) {
			return fault.As(fault.Refused, err, "initialize", b.p.spec.GetName())
		}
		return nil
	})
}

func (b *backend) Type(context.Context) (string, error) { return "secret", nil }

func (b *backend) SpecialPaths(context.Context) (*pluginpb.Paths, error) {
	return &pluginpb.Paths{}, nil
}

func (b *backend) InvalidateKey(ctx context.Context, key string) error {
	in := b.instance()
	if in == nil {
		return fault.New(fault.Unavailable, "invalidate key", b.p.spec.GetName(), "it is not set up")
	}
	return b.call(ctx, "invalidate key", func(ctx context.Context) error {
		if !in.lock.take(ctx.Done()) {
			return context.Cause(ctx)
		}
		defer in.lock.leave()
		delete(in.cache, key)
		return nil
	})
}

func (b *backend) Cleanup(ctx context.Context) error {
	if !b.life.take(ctx.Done()) {
		return fault.New(fault.Canceled, "clean up", b.p.spec.GetName(), "the caller gave up")
	}
	defer b.life.leave()
	b.mu.Lock()
	b.over = true
	b.mu.Unlock()
	if b.p.l.temper.strikes("cleanup") != fine {
		_ = wait(ctx, b.p.l.temper.between(time.Second, 5*time.Second))
	}
	b.retire()
	return nil
}

// retire ends the instance's storage.
func (b *backend) retire() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.inst != nil {
		b.inst.end()
		b.inst = nil
	}
}

func (b *backend) instance() *instance {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.inst
}

func (b *backend) HandleExistenceCheck(ctx context.Context, req *pluginpb.Request) (found, checkFound bool, err error) {
	in := b.instance()
	if in == nil {
		return false, false, fault.New(fault.Unavailable, "check existence", b.p.spec.GetName(), "the instance is not set up")
	}
	err = b.call(ctx, "check existence", func(ctx context.Context) error {
		if !in.lock.take(ctx.Done()) {
			return context.Cause(ctx)
		}
		defer in.lock.leave()
		var v string
		v, err := in.get(ctx, req.GetPath())
		found = v != ""
		return err
	})
	return found, true, err
}

func (b *backend) HandleRequest(ctx context.Context, req *pluginpb.Request) (resp *pluginpb.Response, err error) {
	in := b.instance()
	if in == nil {
		return nil, fault.New(fault.Unavailable, "handle request", b.p.spec.GetName(), "the instance is not set up")
	}
	err = b.call(ctx, "handle request", func(ctx context.Context) error {
		t := b.p.l.temper
		if err := wait(ctx, t.between(50*time.Microsecond, 2*time.Millisecond)); err != nil {
			return givenUp(err)
		}
		if t.strikes("request") != fine { // slow, so that it is in flight when something happens
			if err := wait(ctx, t.between(50*time.Millisecond, 3*time.Second)); err != nil {
				return givenUp(err)
			}
		}
		var value string
		value, err = b.do(ctx, in, req)
		if err != nil || value == "" {
			return err
		}
		raw, err := json.Marshal(map[string]string{"value": value, "version": b.p.spec.GetVersion()})
		resp = &pluginpb.Response{Data: string(raw)}
		return err
	})
	if err != nil {
		return nil, err
	}
	if b.p.l.temper.strikes("reply") != fine { // the work is done, and nobody hears of it
		b.p.end("crash", "panic: told to, after the work")
		return nil, errDied
	}
	return resp, nil
}

func givenUp(err error) error {
	return &fault.Error{Kind: fault.KindOf(err), Text: "given up", Err: err}
}

// do runs one request under the instance's lock and returns what a read shows.
func (b *backend) do(ctx context.Context, in *instance, req *pluginpb.Request) (string, error) {
	if !in.lock.take(ctx.Done()) {
		return "", givenUp(context.Cause(ctx))
	}
	defer in.lock.leave()
	key := req.GetPath()
	switch req.GetOperation() {
	case "read":
		return in.get(ctx, key)
	case "delete":
		return "", in.set(ctx, key, "")
	case "create", "update":
	default:
		return "", fault.Text(fault.UnsupportedOperation, "unsupported operation")
	}
	var body struct {
		Value string `json:"value"`
		Add   int64  `json:"add"`
	}
	if err := json.Unmarshal([]byte(req.GetData()), &body); err != nil {
		return "", fault.Text(fault.Invalid, "%v", err)
	}
	if body.Add != 0 {
		err := in.add(ctx, key, body.Add)
		return "", err
	}
	b.p.l.handled(req.GetMountPoint(), key, body.Value)
	return "", in.set(ctx, key, body.Value)
}

// bound makes ctx end with the instance.
func (in *instance) bound(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(in.ended, cancel)
	return ctx, func() { stop(); cancel() }
}

// kept strips what the plugin protocol does not carry: only the text of an error comes through.
func kept(err error) error {
	if err == nil {
		return nil
	}
	if fault.Is(err, fault.ReadOnly) && !supervisor.IsReadOnlyText(err.Error()) {
		return fault.Text(fault.Internal, "cannot write to readonly storage: %s", err.Error())
	}
	return fault.Text(fault.Internal, "%s", err.Error())
}

// get reads through the cache. The caller holds lock.
func (in *instance) get(ctx context.Context, key string) (string, error) {
	if v, ok := in.cache[key]; ok {
		return v, nil
	}
	ctx, done := in.bound(ctx)
	defer done()
	e, err := in.storage.Get(ctx, key)
	if err != nil {
		return "", kept(err)
	}
	v := ""
	if e != nil {
		v = string(e.Value)
	}
	in.cache[key] = v
	return v, nil
}

// set writes through the cache; "" deletes. The caller holds lock.
func (in *instance) set(ctx context.Context, key, value string) error {
	if !in.writable.Load() || in.ended.Err() != nil {
		return fault.Text(fault.Internal, "the instance's storage is closed")
	}
	ctx, done := in.bound(ctx)
	defer done()
	var err error
	if value == "" {
		err = in.storage.Delete(ctx, key)
	} else {
		err = in.storage.Put(ctx, &supervisor.Entry{Key: key, Value: []byte(value)})
	}
	if err != nil {
		delete(in.cache, key)
		return kept(err)
	}
	in.cache[key] = value
	return nil
}

// add counts a number up. The caller holds lock, but in Initialize, when nobody else calls.
func (in *instance) add(ctx context.Context, key string, n int64) error {
	old, err := in.get(ctx, key)
	if err != nil {
		return err
	}
	sum, _ := strconv.ParseInt(strings.TrimSpace(old), 10, 64)
	sum += n
	return in.set(ctx, key, strconv.FormatInt(sum, 10))
}
