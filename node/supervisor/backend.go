package supervisor

import (
	"context"
	"errors"
	"maps"
	"strings"
	"sync"

	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"rollcall/node/fault"
	pluginpb "rollcall/proto/plugin"
)

// multiplexKey is the metadata by which a plugin that multiplexes knows its instances.
const multiplexKey = "multiplex_id"

// instanceID is a name for an instance; "" where the plugin has only one.
func (p *Process) instanceID() string {
	if !p.multiplexed {
		return ""
	}
	return uuid.NewString()
}

// to puts the instance's name into a call.
func to(ctx context.Context, id string) context.Context {
	if id == "" {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, multiplexKey, id)
}

// Setup is what an instance is made with.
type Setup struct {
	// Storage is the mount's own keys; required. Writes are refused until Initialize is called, as in Vault.
	Storage Storage
	// System is what the plugin may know about its surroundings.
	System System
	// Config carries the mount's options and plugin_name, plugin_type, plugin_version.
	Config map[string]string
	// BackendUUID is the mount's, the same on every node and for ever: plugins prefix keys with it.
	BackendUUID string
}

// Backend is one mount's instance inside a process. Setup comes first, Cleanup last; in between everything may be
// called from any goroutine. Errors of the plugin's own code are faults without an operation, their text as the
// plugin gave it; errors of the process are fault.Unavailable (certainly nothing ran) or fault.OutcomeUnknown.
type Backend struct {
	process *Process
	id      string
	client  pluginpb.BackendClient
	version pluginpb.PluginVersionClient

	life  sync.Mutex // one Setup or Cleanup at a time
	mu    sync.Mutex
	host  *hostServer
	setUp bool
	over  bool
}

// Process is where it runs.
func (b *Backend) Process() *Process { return b.process }

// Setup makes the instance in the plugin. When there is one already (the node's role has changed), that one is
// cleaned up first, so that it writes no more; the caller sees to it that no request is in flight. After an error
// the instance is not set up, and Setup may be called again. Errors are of kind fault.Refused with the plugin's
// text, or fault.Canceled.
func (b *Backend) Setup(ctx context.Context, s Setup) error {
	const op = "setup"
	b.life.Lock()
	defer b.life.Unlock()
	b.mu.Lock()
	over, again := b.over, b.setUp
	b.mu.Unlock()
	if over {
		return fault.New(fault.Unavailable, op, b.process.spec.String(), "the instance has been cleaned up")
	}
	if again {
		if err := b.retire(ctx); err != nil {
			b.process.log.Warn("plugin did not clean up before it was set up again", "error", err)
		}
	}
	host := newHostServer(s, b.process.s.cfg.HostVersion)
	brokerID := b.process.broker.NextId()
	if !b.process.track(func() { b.process.broker.AcceptAndServe(brokerID, host.serve) }) {
		return fault.New(fault.Refused, op, b.process.spec.String(), "the plugin process %s", b.process.Exit())
	}

	b.mu.Lock()
	b.host = host
	b.mu.Unlock()
	reply, err := b.client.Setup(to(ctx, b.id), &pluginpb.SetupArgs{
		BrokerId: brokerID, Config: maps.Clone(s.Config), BackendUUID: s.BackendUUID,
	})
	if err != nil {
		b.dropHost()
		return b.process.refusal(ctx, op, err)
	}
	if reply.GetErr() != "" {
		b.dropHost()
		return fault.New(fault.Refused, op, b.process.spec.String(), "%s", trimmed(reply.GetErr()))
	}
	b.mu.Lock()
	b.setUp = true
	b.mu.Unlock()
	return nil
}

// Initialize lets the plugin do what it does once before traffic. From here on it may write. Errors as Setup's.
func (b *Backend) Initialize(ctx context.Context) error {
	const op = "initialize"
	b.mu.Lock()
	host := b.host
	b.mu.Unlock()
	if host != nil {
		host.storage.writable.Store(true)
	}
	reply, err := b.client.Initialize(to(ctx, b.id), &pluginpb.InitializeArgs{})
	if status.Code(err) == codes.Unimplemented {
		return nil // SDKs before 1.2: there is nothing to initialize
	}
	if err != nil {
		return b.process.refusal(ctx, op, err)
	}
	if e := reply.GetErr(); e != nil {
		return fault.New(fault.Refused, op, b.process.spec.String(), "%s", trimmed(e.GetErrMsg()))
	}
	return nil
}

// refusal is callError for what the plugin must get right before it is used: whatever went wrong is a refusal, but
// for the caller's own change of mind.
func (p *Process) refusal(ctx context.Context, op string, err error) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return fault.New(fault.Canceled, op, p.spec.String(), "the caller gave up")
	}
	if ended(ctx) != nil {
		return fault.New(fault.Refused, op, p.spec.String(), "the plugin did not return in the time it has%s", lastLine(p.run.stderr.last()))
	}
	cause := p.callError(ctx, op, err, false)
	text := err.Error()
	if f, ok := errors.AsType[*fault.Error](cause); ok {
		text = f.Text
	}
	return &fault.Error{Kind: fault.Refused, Op: op, Subject: p.spec.String(), Text: text, Err: err}
}

// Type is what the plugin says it is: "secret" or "auth". fault.Refused: something else.
func (b *Backend) Type(ctx context.Context) (string, error) {
	reply, err := b.client.Type(to(ctx, b.id), &pluginpb.Empty{})
	if err != nil {
		return "", b.process.refusal(ctx, "type", err)
	}
	switch reply.GetType() {
	case 1:
		return TypeSecret, nil
	case 2:
		return TypeAuth, nil
	default:
		return "", fault.New(fault.Refused, "type", b.process.spec.String(), "the plugin says it is of type %d, neither secrets engine nor auth method",
			reply.GetType())
	}
}

// Version is what the plugin says about itself; most say nothing.
func (b *Backend) Version(ctx context.Context) string {
	reply, err := b.version.Version(to(ctx, b.id), &emptypb.Empty{})
	if err != nil {
		return ""
	}
	return trimmed(reply.GetPluginVersion())
}

// SpecialPaths are the plugin's special paths, never nil.
func (b *Backend) SpecialPaths(ctx context.Context) (*pluginpb.Paths, error) {
	ctx, went := watchSent(ctx)
	reply, err := b.client.SpecialPaths(to(ctx, b.id), &pluginpb.Empty{})
	if err != nil {
		return nil, b.process.callError(ctx, "ask for special paths", err, went.Load())
	}
	if reply.GetPaths() == nil {
		return &pluginpb.Paths{}, nil
	}
	return reply.GetPaths(), nil
}

// HandleRequest passes a request on and returns what the plugin answers, data untouched. Response and error may both be
// set: that is how plugins say "400" with a body. The response may be nil without an error.
func (b *Backend) HandleRequest(ctx context.Context, req *pluginpb.Request) (*pluginpb.Response, error) {
	const op = "handle request"
	if err := b.ready(op); err != nil {
		return nil, err
	}
	ctx, went := watchSent(ctx)
	out := to(ctx, b.id)
	if req.GetId() != "" {
		// SDKs since Vault's 0.22 send it back with every storage call that the request makes.
		out = metadata.AppendToOutgoingContext(out, requestIDKey, req.GetId(), "index_state_local", "0", "index_state_replicated", "0")
	}
	reply, err := b.client.HandleRequest(out, &pluginpb.HandleRequestArgs{Request: req},
		grpc.MaxCallRecvMsgSize(b.process.s.cfg.MaxReply))
	if err != nil {
		return nil, b.process.callError(ctx, op, err, went.Load())
	}
	if e := reply.GetErr(); e != nil && ended(ctx) != nil && strings.HasPrefix(e.GetErrMsg(), "context ") {
		// The plugin noticed first that the time was up.
		return nil, b.process.callError(ctx, op, errors.New(e.GetErrMsg()), true)
	}
	return reply.GetResponse(), pluginError(reply.GetErr())
}

// HandleExistenceCheck asks whether what the path names exists, for telling create from update. checkFound is false
// when the plugin has no check for the path.
func (b *Backend) HandleExistenceCheck(ctx context.Context, req *pluginpb.Request) (found, checkFound bool, err error) {
	const op = "check existence"
	if err := b.ready(op); err != nil {
		return false, false, err
	}
	ctx, went := watchSent(ctx)
	reply, err := b.client.HandleExistenceCheck(to(ctx, b.id), &pluginpb.HandleExistenceCheckArgs{Request: req})
	if err != nil {
		return false, false, b.process.callError(ctx, op, err, went.Load())
	}
	return reply.GetExists(), reply.GetCheckFound(), pluginError(reply.GetErr())
}

// InvalidateKey tells the plugin that a key of its storage was changed by somebody else.
func (b *Backend) InvalidateKey(ctx context.Context, key string) error {
	const op = "invalidate key"
	if err := b.ready(op); err != nil {
		return err
	}
	ctx, went := watchSent(ctx)
	if _, err := b.client.InvalidateKey(to(ctx, b.id), &pluginpb.InvalidateKeyArgs{Key: key}); err != nil {
		return b.process.callError(ctx, op, err, went.Load())
	}
	return nil
}

// Cleanup tells the plugin that the instance is no longer needed, waits for that no longer than ctx and
// CleanupTimeout allow, and closes the instance's storage in any case. The process goes on. Idempotent.
func (b *Backend) Cleanup(ctx context.Context) error {
	b.life.Lock()
	defer b.life.Unlock()
	b.mu.Lock()
	was := b.setUp
	b.over = true
	b.mu.Unlock()
	var err error
	if was {
		err = b.retire(ctx)
	}
	b.process.forget(b)
	return err
}

// retire ends what is set up. The caller holds life.
func (b *Backend) retire(ctx context.Context) error {
	limit, cancel := context.WithTimeout(ctx, b.process.s.cfg.CleanupTimeout)
	defer cancel()
	b.mu.Lock()
	b.setUp = false
	b.mu.Unlock()
	_, err := b.client.Cleanup(to(limit, b.id), &pluginpb.Empty{})
	b.dropHost()
	if err == nil {
		return nil
	}
	if _, gone := b.process.gone(); gone {
		return nil // it is as clean as can be
	}
	return b.process.callError(limit, "clean up", err, false)
}

func (p *Process) gone() (string, bool) {
	select {
	case <-p.run.exited:
		return p.Exit(), true
	default:
		return "", false
	}
}

// ready answers at once for an instance that cannot serve: nothing is sent.
func (b *Backend) ready(op string) error {
	b.mu.Lock()
	setUp := b.setUp
	b.mu.Unlock()
	if words, gone := b.process.gone(); gone {
		return fault.New(fault.Unavailable, op, b.process.spec.String(), "the plugin process %s", words)
	}
	if !setUp {
		return fault.New(fault.Unavailable, op, b.process.spec.String(), "the instance is not set up")
	}
	return nil
}

func (b *Backend) close(ctx context.Context) error { return b.Cleanup(ctx) }

func (b *Backend) drop() {
	b.mu.Lock()
	b.setUp, b.over = false, true
	b.mu.Unlock()
	b.dropHost()
}

func (b *Backend) dropHost() {
	b.mu.Lock()
	host := b.host
	b.host = nil
	b.mu.Unlock()
	if host == nil {
		return
	}
	release := host.stop()
	if !b.process.track(release) {
		release() // the process has ended: there is nobody to wait for
	}
}

// IsReadOnlyText reports whether a text that a plugin gave as an error or in data.error means that it tried to
// write where it may only read.
func IsReadOnlyText(text string) bool { return strings.Contains(text, readOnlyText) }
