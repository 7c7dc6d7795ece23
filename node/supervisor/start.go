package supervisor

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"github.com/hashicorp/go-plugin/runner"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"rollcall/node/failpoint"
	"rollcall/node/fault"
	"rollcall/node/supervisor/internal/content"
	"rollcall/node/supervisor/internal/proc"
	pluginpb "rollcall/proto/plugin"
)

// The phases of a start, as StartError and Timings name them.
const (
	phaseVerify    = "verify"
	phaseStart     = "start"
	phaseHandshake = "handshake"
)

// Both SDKs' cookies: they keep a plugin from being run by hand, and tell the two protocols apart.
var (
	backendHandshake = goplugin.HandshakeConfig{
		MagicCookieKey: "VAULT_BACKEND_PLUGIN", MagicCookieValue: "6669da05-b1c8-4f49-97d9-c8e5bed98e20",
	}
	databaseHandshake = goplugin.HandshakeConfig{
		MagicCookieKey: "VAULT_DATABASE_PLUGIN", MagicCookieValue: "926a0820-aea2-be28-51d6-83cdf00e8edb",
	}
)

const (
	backendService  = "backend"
	databaseService = "database"
)

// Start starts a process of the spec and returns after its handshake. The process outlives ctx, which bounds the start
// together with StartTimeout. Every error is a *StartError.
func (s *Supervisor) Start(ctx context.Context, spec Spec) (*Process, error) {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil, startError(spec, phaseStart, fault.Unavailable, "this node is stopping", nil)
	}
	s.starting.Add(1)
	s.mu.Unlock()
	defer s.starting.Done()

	p, timings, serr := s.start(ctx, spec)
	if serr != nil {
		s.metrics.started(spec, serr.Phase, timings)
		s.log.Warn("plugin did not start", "plugin", spec.String(), "phase", serr.Phase, "cause", serr.Cause)
		return nil, serr
	}
	s.metrics.started(spec, "ok", timings)
	s.log.Info("plugin started", "plugin", spec.String(), "pid", p.pid, "sha256", spec.SHA256, "multiplexed", p.multiplexed,
		"verify", timings.Verify, "start", timings.Start, "handshake", timings.Handshake)
	return p, nil
}

func (s *Supervisor) start(ctx context.Context, spec Spec) (*Process, Timings, *StartError) {
	var t Timings
	begin := time.Now()
	img, release, serr := s.prepare(ctx, spec)
	t.Verify = time.Since(begin)
	if serr != nil {
		return nil, t, serr
	}
	defer release()
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	case <-ctx.Done():
		return nil, t, giveUp(spec, phaseStart, ctx)
	}

	l := &launch{s: s, spec: spec, img: img, begin: time.Now()}
	p, serr := l.do(ctx)
	if !l.spawned.IsZero() {
		t.Start = l.spawned.Sub(l.begin)
		t.Handshake = time.Since(l.spawned)
	}
	if serr != nil {
		return nil, t, serr
	}
	p.timings = t
	return p, t, nil
}

// prepare has the bytes ready to execute.
func (s *Supervisor) prepare(ctx context.Context, spec Spec) (*content.Image, func(), *StartError) {
	refuse := func(err error) *StartError {
		kind, text := fault.Refused, err.Error()
		if ctx.Err() != nil {
			kind = fault.KindOf(ctx.Err())
		}
		return startError(spec, phaseVerify, kind, text, err)
	}
	if err := spec.validate(); err != nil {
		return nil, nil, refuse(err)
	}
	if err := s.store.Ensure(ctx, spec.Command, spec.SHA256); err != nil {
		return nil, nil, refuse(err)
	}
	img, release, err := s.store.Image(ctx, spec.SHA256)
	if err != nil {
		return nil, nil, refuse(err)
	}
	if err := failpoint.Hit(failpoint.ContentSealed, s.cfg.NodeName); err != nil {
		release()
		return nil, nil, refuse(err)
	}
	if why := img.Executable(); why != "" {
		release()
		return nil, nil, startError(spec, phaseStart, fault.Refused, spec.Command+" cannot be executed here: "+why, nil)
	}
	return img, release, nil
}

func giveUp(spec Spec, phase string, ctx context.Context) *StartError { //nolint:revive // ctx is what is told about
	return startError(spec, phase, fault.KindOf(ctx.Err()), "the caller gave up: "+context.Cause(ctx).Error(), ctx.Err())
}

// launch is one attempt at starting a process.
type launch struct {
	s       *Supervisor
	spec    Spec
	img     *content.Image
	begin   time.Time
	spawned time.Time
	client  *goplugin.Client

	mu      sync.Mutex
	run     *run // made by go-plugin's call of newRun
	aborted bool
}

func (l *launch) do(ctx context.Context) (*Process, *StartError) {
	// One watchdog for everything up to the end of the handshake: go-plugin's own covers the first line only.
	limit, cancel := context.WithTimeout(ctx, l.s.cfg.StartTimeout)
	defer cancel()
	l.client = goplugin.NewClient(l.config())
	stop := context.AfterFunc(limit, l.abort)

	p, err := l.handshake(limit)
	if !stop() && err == nil {
		err = limit.Err()
	}
	if err == nil {
		l.s.mu.Lock()
		l.s.processes[p] = struct{}{}
		l.s.mu.Unlock()
		l.s.work.Go(p.watch)
		return p, nil
	}
	serr := l.explain(ctx, limit, err)
	l.abort()
	l.client.Kill()
	if r := l.runner(); r != nil {
		if r.ID() != "" {
			<-r.reaped
			serr.Stderr = r.stderr.last()
		}
		_ = os.RemoveAll(r.tmpDir)
	}
	return nil, serr
}

// abort kills the process now, or as soon as there is one.
func (l *launch) abort() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.aborted = true
	if l.run != nil {
		l.run.abort()
	}
}

func (l *launch) runner() *run {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.run
}

func (l *launch) config() *goplugin.ClientConfig {
	cfg := &goplugin.ClientConfig{
		AllowedProtocols: []goplugin.Protocol{goplugin.ProtocolGRPC},
		AutoMTLS:         !l.s.cfg.PlainRPC,
		SkipHostEnv:      true,
		StartTimeout:     l.s.cfg.StartTimeout,
		// What go-plugin has to say, run and explain say better.
		Logger:           hclog.NewNullLogger(),
		RunnerFunc:       l.newRun,
		GRPCDialOptions:  []grpc.DialOption{grpc.WithStatsHandler(sentHandler{})},
		UnixSocketConfig: &goplugin.UnixSocketConfig{TempDir: l.s.sockets.path},
	}
	if l.s.cfg.UID != 0 {
		cfg.UnixSocketConfig.Group = strconv.FormatUint(uint64(l.s.cfg.GID), 10)
	}
	// A plugin's own stdout and stderr come through gRPC after the handshake; the pipes get what was opened before.
	log := l.logger()
	cfg.SyncStdout = newOutput(log, "stdout", l.s.cfg.LogBytesPerSecond, l.s.dropped)
	cfg.SyncStderr = newOutput(log, "stderr", l.s.cfg.LogBytesPerSecond, l.s.dropped)
	if l.spec.Type == TypeDatabase {
		cfg.HandshakeConfig = databaseHandshake
		cfg.VersionedPlugins = map[int]goplugin.PluginSet{
			5: {databaseService: &dispenser{}}, 6: {databaseService: &dispenser{}},
		}
	} else {
		cfg.HandshakeConfig = backendHandshake
		cfg.VersionedPlugins = map[int]goplugin.PluginSet{5: {backendService: &dispenser{}}}
	}
	return cfg
}

func (s *Supervisor) dropped(n int) { s.metrics.dropped.Add(float64(n)) }

// newRun is called by go-plugin with a command that carries its variables.
func (l *launch) newRun(_ hclog.Logger, template *exec.Cmd, tmpDir string) (runner.Runner, error) {
	if err := os.Chmod(tmpDir, l.dirMode()); err != nil {
		return nil, err
	}
	var id [6]byte
	_, _ = rand.Read(id[:])
	owner := l.s.owner + hex.EncodeToString(id[:])
	cmd := &exec.Cmd{
		Path: l.img.Path(),
		Args: append([]string{filepath.Base(l.spec.Command)}, l.spec.Args...),
		Env:  l.env(template.Env, tmpDir, ownerVariable+owner),
		Dir:  "/",
	}
	var group *proc.Cgroup
	if l.s.cfg.Cgroup != "" {
		var err error
		if group, err = proc.NewCgroup(l.s.cfg.Cgroup, cgroupPrefix+owner, l.s.cfg.MemoryMax, l.s.cfg.PidsMax); err != nil {
			return nil, fmt.Errorf("make a cgroup in %s: %w", l.s.cfg.Cgroup, err)
		}
	}
	if l.s.cfg.UID != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: l.s.cfg.UID, Gid: l.s.cfg.GID}}
	}
	log := l.logger()
	rate := l.s.cfg.LogBytesPerSecond
	r := &run{
		s: l.s, cmd: cmd, tmpDir: tmpDir, owner: ownerVariable + owner, cgroup: group, first: newFirstLine(),
		stdout: newOutput(log, "stdout", rate, l.s.dropped), stderr: newOutput(log, "stderr", rate, l.s.dropped),
		exited: make(chan struct{}), reaped: make(chan struct{}),
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.run = r
	if l.aborted {
		r.abort()
	}
	return r, nil
}

func (l *launch) dirMode() os.FileMode {
	if l.s.cfg.UID != 0 {
		return 0o770 // go-plugin has given it to the plugin's group
	}
	return 0o700
}

// env is everything that the plugin gets to see: the spec's own variables, then ours, which therefore win. Both
// SDKs' names are set; Vault's SDK knows VAULT_ only, OpenBao's looks for BAO_ first. Metadata mode is never set: a
// plugin in it refuses to work.
func (l *launch) env(fromGoPlugin []string, tmpDir, owner string) []string {
	cfg := l.s.cfg
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	for _, name := range cfg.PassEnv {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	if cfg.GoMemLimit > 0 {
		env = append(env, "GOMEMLIMIT="+strconv.FormatInt(cfg.GoMemLimit, 10))
	}
	env = append(env, l.spec.Env...)
	env = append(env,
		"TMPDIR="+tmpDir, // where plugins with an older go-plugin put their sockets
		"VAULT_VERSION="+cfg.HostVersion, "BAO_VERSION="+cfg.HostVersion,
		// True even without TLS: otherwise the SDKs ask for a wrapped token that nobody gives them.
		"VAULT_PLUGIN_AUTOMTLS_ENABLED=true", "BAO_PLUGIN_AUTOMTLS_ENABLED=true",
		"VAULT_PLUGIN_METADATA_MODE=false", "BAO_PLUGIN_METADATA_MODE=false",
		"ROLLCALL_NODE="+cfg.NodeName, owner,
	)
	return append(env, fromGoPlugin...)
}

// handshake takes the process to where instances can be made in it.
func (l *launch) handshake(limit context.Context) (*Process, error) {
	_, err := l.client.Start()
	r := l.runner()
	if r != nil && r.ID() != "" {
		l.spawned = r.started
	}
	if err != nil {
		return nil, err
	}
	rpc, err := l.client.Client()
	if err != nil {
		return nil, err
	}
	service := backendService
	if l.spec.Type == TypeDatabase {
		service = databaseService
	}
	raw, err := rpc.Dispense(service)
	if err != nil {
		return nil, err
	}
	d, ok := raw.(*door)
	if !ok {
		return nil, errors.New("the plugin library dispensed something else")
	}
	// The first call on the connection: it also proves that there is one.
	reply, err := pluginpb.NewPluginMultiplexingClient(d.conn).MultiplexingSupport(limit, &emptypb.Empty{})
	if err != nil && status.Code(err) != codes.Unimplemented {
		return nil, err
	}
	if err := failpoint.Hit(failpoint.ProcessHandshake, l.s.cfg.NodeName); err != nil {
		return nil, err
	}
	return &Process{
		s: l.s, spec: l.spec, run: r, client: l.client, conn: d.conn, broker: d.broker, log: l.logger().With("pid", r.pid),
		pid: r.pid, started: r.started, multiplexed: reply.GetSupported(),
		instances: map[instance]struct{}{}, released: make(chan struct{}),
	}, nil
}

// dispenser makes go-plugin hand out the connection itself.
type dispenser struct {
	goplugin.NetRPCUnsupportedPlugin
}

type door struct {
	conn   *grpc.ClientConn
	broker *goplugin.GRPCBroker
}

var _ goplugin.GRPCPlugin = (*dispenser)(nil)

// GRPCServer is the plugin's side.
func (*dispenser) GRPCServer(*goplugin.GRPCBroker, *grpc.Server) error {
	return errors.New("this is the host")
}

// GRPCClient returns a *door.
func (*dispenser) GRPCClient(_ context.Context, b *goplugin.GRPCBroker, c *grpc.ClientConn) (any, error) {
	return &door{c, b}, nil
}
