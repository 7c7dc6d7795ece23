package supervisor

import (
	"context"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"rollcall/node/fault"
	pluginpb "rollcall/proto/plugin"
)

// requestIDKey is the metadata in which the id of a request travels to the plugin and comes back with its storage
// calls.
const requestIDKey = "index_state_cluster_id"

// maxStorageMessage bounds one message from a plugin to its storage: a value of 1 MiB with room to be refused in words.
const maxStorageMessage = 8 << 20

// Entry is one key of a mount's storage.
type Entry struct {
	Key   string
	Value []byte
	// SealWrap is carried and otherwise ignored.
	SealWrap bool
}

// Storage is what an instance sees as its storage. Calls come from many goroutines at once; ctx ends when the
// plugin gives up, or when the instance is cleaned up. The text of an error is all that a plugin gets of it.
type Storage interface {
	// List returns the direct children of prefix; a folder ends in "/". The order does not matter.
	List(ctx context.Context, prefix string) ([]string, error)
	// Get returns nil without an error when there is no such key.
	Get(ctx context.Context, key string) (*Entry, error)
	Put(ctx context.Context, e *Entry) error
	Delete(ctx context.Context, key string) error
}

// RequestID is the id of the request on whose behalf a plugin calls its storage: "" for plugins with an SDK before
// Vault's 0.22, with OpenBao's, and for what a plugin does on its own.
func RequestID(ctx context.Context) string {
	if v := metadata.ValueFromIncomingContext(ctx, requestIDKey); len(v) > 0 {
		return v[0]
	}
	return ""
}

// ReplicationState is what plugins read to know whether they may write: bits, as both SDKs number them.
type ReplicationState int32

// The two states that a node tells its plugins.
const (
	// ReplicationActive is the leader's: no replication between clusters, so plugins write.
	ReplicationActive ReplicationState = 1<<12 | 1<<13
	// ReplicationStandby is a follower's: plugins only read, and answer what would write with the read-only error.
	ReplicationStandby ReplicationState = 1<<12 | 1<<13 | 1<<14
)

// System is what an instance may know about its surroundings. The zero value is a leader with Vault's default lease
// times.
type System struct {
	// ReplicationState is ReplicationActive (the default, also for 0) or ReplicationStandby. An instance that is to
	// learn another one is set up again: plugins remember it.
	ReplicationState ReplicationState
	// DefaultLeaseTTL and MaxLeaseTTL default to 768 h.
	DefaultLeaseTTL, MaxLeaseTTL time.Duration
	// LeaseTTLs, when set, is asked instead each time: a mount can be tuned while it runs.
	LeaseTTLs func() (def, longest time.Duration)
	// LocalMount tells that nothing of the mount is replicated to other clusters.
	LocalMount bool
	// Tainted, when set, tells that the mount is being disabled.
	Tainted                func() bool
	ClusterID, ClusterName string
	// GeneratePassword answers a plugin that asks for a password by policy. Nil: refused.
	GeneratePassword func(ctx context.Context, policy string) (string, error)
	// Entity and Groups answer questions about identities. Nil: there are none.
	Entity func(ctx context.Context, id string) (*pluginpb.Entity, error)
	Groups func(ctx context.Context, entityID string) ([]*pluginpb.Group, error)
}

const defaultTTL = 768 * time.Hour

// handshakeLimit bounds how long a plugin may take to connect to its storage once it has begun to.
const handshakeLimit = 10 * time.Second

// hostServer serves one instance what it asks of the host, from Setup to Cleanup.
type hostServer struct {
	storage storageServer
	system  systemServer
	cut     context.CancelFunc

	mu      sync.Mutex
	server  *grpc.Server
	stopped bool
}

func newHostServer(s Setup, version string) *hostServer {
	over, cut := context.WithCancel(context.Background())
	h := &hostServer{system: systemServer{sys: s.System, version: version}, cut: cut}
	h.storage.storage, h.storage.over = s.Storage, over
	return h
}

// serve is called by go-plugin's broker when it listens.
func (h *hostServer) serve(opts []grpc.ServerOption) *grpc.Server {
	server := grpc.NewServer(append(opts, grpc.MaxRecvMsgSize(maxStorageMessage), grpc.ConnectionTimeout(handshakeLimit))...)
	pluginpb.RegisterStorageServer(server, &h.storage)
	pluginpb.RegisterSystemViewServer(server, &h.system)
	pluginpb.RegisterEventsServer(server, eventsServer{})
	pluginpb.RegisterObservationsServer(server, observationsServer{})
	h.mu.Lock()
	defer h.mu.Unlock()
	h.server = server
	if h.stopped {
		server.Stop()
	}
	return server
}

// stop ends the storage of the instance at once: what it still tries to write fails, and what is under way is
// cancelled. The connection ends when release has returned, which may wait for a plugin that stopped in the middle
// of connecting.
func (h *hostServer) stop() (release func()) {
	h.cut()
	h.mu.Lock()
	h.stopped = true
	server := h.server
	h.mu.Unlock()
	return func() {
		if server != nil {
			server.Stop()
		}
	}
}

type storageServer struct {
	pluginpb.UnimplementedStorageServer
	storage  Storage
	writable atomic.Bool
	over     context.Context // ends with the instance
}

// bound makes ctx end with the instance.
func (s *storageServer) bound(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(s.over, cancel)
	return ctx, func() { stop(); cancel() }
}

// storageText is an error as a plugin gets it. The read-only error must be found in the text: plugins look for it.
func storageText(err error) string {
	if err == nil {
		return ""
	}
	text := err.Error()
	if fault.Is(err, fault.ReadOnly) && !strings.Contains(text, readOnlyText) {
		text = readOnlyText + ": " + text
	}
	return text
}

// List is sorted whatever the storage says: OpenBao's SDK pages through it.
func (s *storageServer) List(ctx context.Context, in *pluginpb.StorageListArgs) (*pluginpb.StorageListReply, error) {
	if s.over.Err() != nil {
		return &pluginpb.StorageListReply{Err: overText}, nil
	}
	ctx, done := s.bound(ctx)
	defer done()
	keys, err := s.storage.List(ctx, in.GetPrefix())
	if err != nil {
		return &pluginpb.StorageListReply{Err: storageText(err)}, nil
	}
	if !slices.IsSorted(keys) {
		keys = slices.Sorted(slices.Values(keys))
	}
	return &pluginpb.StorageListReply{Keys: keys}, nil
}

// Get answers no entry for no key.
func (s *storageServer) Get(ctx context.Context, in *pluginpb.StorageGetArgs) (*pluginpb.StorageGetReply, error) {
	if s.over.Err() != nil {
		return &pluginpb.StorageGetReply{Err: overText}, nil
	}
	ctx, done := s.bound(ctx)
	defer done()
	e, err := s.storage.Get(ctx, in.GetKey())
	if err != nil || e == nil {
		return &pluginpb.StorageGetReply{Err: storageText(err)}, nil
	}
	return &pluginpb.StorageGetReply{Entry: &pluginpb.StorageEntry{Key: e.Key, Value: e.Value, SealWrap: e.SealWrap}}, nil
}

// Put writes one key.
func (s *storageServer) Put(ctx context.Context, in *pluginpb.StoragePutArgs) (*pluginpb.StoragePutReply, error) {
	if in.GetEntry() == nil {
		return nil, status.Error(codes.InvalidArgument, "no entry")
	}
	if text := s.refusesWrites(); text != "" {
		return &pluginpb.StoragePutReply{Err: text}, nil
	}
	ctx, done := s.bound(ctx)
	defer done()
	e := in.GetEntry()
	err := s.storage.Put(ctx, &Entry{Key: e.GetKey(), Value: e.GetValue(), SealWrap: e.GetSealWrap()})
	return &pluginpb.StoragePutReply{Err: storageText(err)}, nil
}

// Delete removes one key.
func (s *storageServer) Delete(ctx context.Context, in *pluginpb.StorageDeleteArgs) (*pluginpb.StorageDeleteReply, error) {
	if text := s.refusesWrites(); text != "" {
		return &pluginpb.StorageDeleteReply{Err: text}, nil
	}
	ctx, done := s.bound(ctx)
	defer done()
	return &pluginpb.StorageDeleteReply{Err: storageText(s.storage.Delete(ctx, in.GetKey()))}, nil
}

func (s *storageServer) refusesWrites() string {
	switch {
	case s.over.Err() != nil:
		return overText
	case !s.writable.Load():
		return setupText
	default:
		return ""
	}
}

const (
	setupText = "cannot write to storage during setup"
	overText  = "the instance has been replaced: its storage is closed"
)

type systemServer struct {
	pluginpb.UnimplementedSystemViewServer
	sys     System
	version string
}

func (s *systemServer) ttls() (def, longest time.Duration) {
	def, longest = s.sys.DefaultLeaseTTL, s.sys.MaxLeaseTTL
	if s.sys.LeaseTTLs != nil {
		def, longest = s.sys.LeaseTTLs()
	}
	if def <= 0 {
		def = defaultTTL
	}
	if longest <= 0 {
		longest = defaultTTL
	}
	return min(def, longest), longest
}

// The methods are the wire's; each answers one question.

func (s *systemServer) DefaultLeaseTTL(context.Context, *pluginpb.Empty) (*pluginpb.TTLReply, error) {
	def, _ := s.ttls()
	return &pluginpb.TTLReply{TTL: int64(def)}, nil
}

func (s *systemServer) MaxLeaseTTL(context.Context, *pluginpb.Empty) (*pluginpb.TTLReply, error) {
	_, longest := s.ttls()
	return &pluginpb.TTLReply{TTL: int64(longest)}, nil
}

func (s *systemServer) Tainted(context.Context, *pluginpb.Empty) (*pluginpb.TaintedReply, error) {
	return &pluginpb.TaintedReply{Tainted: s.sys.Tainted != nil && s.sys.Tainted()}, nil
}

func (s *systemServer) CachingDisabled(context.Context, *pluginpb.Empty) (*pluginpb.CachingDisabledReply, error) {
	return &pluginpb.CachingDisabledReply{}, nil
}

func (s *systemServer) ReplicationState(context.Context, *pluginpb.Empty) (*pluginpb.ReplicationStateReply, error) {
	state := s.sys.ReplicationState
	if state == 0 {
		state = ReplicationActive
	}
	return &pluginpb.ReplicationStateReply{State: int32(state)}, nil
}

func (s *systemServer) ResponseWrapData(context.Context, *pluginpb.ResponseWrapDataArgs) (*pluginpb.ResponseWrapDataReply, error) {
	return &pluginpb.ResponseWrapDataReply{Err: "response wrapping is not available to plugins here"}, nil
}

func (s *systemServer) MlockEnabled(context.Context, *pluginpb.Empty) (*pluginpb.MlockEnabledReply, error) {
	return &pluginpb.MlockEnabledReply{}, nil
}

func (s *systemServer) LocalMount(context.Context, *pluginpb.Empty) (*pluginpb.LocalMountReply, error) {
	return &pluginpb.LocalMountReply{Local: s.sys.LocalMount}, nil
}

func (s *systemServer) EntityInfo(ctx context.Context, in *pluginpb.EntityInfoArgs) (*pluginpb.EntityInfoReply, error) {
	if s.sys.Entity == nil {
		return &pluginpb.EntityInfoReply{Err: "no entity " + in.GetEntityId()}, nil
	}
	e, err := s.sys.Entity(ctx, in.GetEntityId())
	return &pluginpb.EntityInfoReply{Entity: e, Err: storageText(err)}, nil
}

func (s *systemServer) GroupsForEntity(ctx context.Context, in *pluginpb.EntityInfoArgs) (*pluginpb.GroupsForEntityReply, error) {
	if s.sys.Groups == nil {
		return &pluginpb.GroupsForEntityReply{}, nil
	}
	groups, err := s.sys.Groups(ctx, in.GetEntityId())
	return &pluginpb.GroupsForEntityReply{Groups: groups, Err: storageText(err)}, nil
}

// PluginEnv never leaves the environment out: Vault's SDK does not look before it reads.
func (s *systemServer) PluginEnv(context.Context, *pluginpb.Empty) (*pluginpb.PluginEnvReply, error) {
	return &pluginpb.PluginEnvReply{PluginEnvironment: &pluginpb.PluginEnvironment{VaultVersion: s.version}}, nil
}

func (s *systemServer) GeneratePasswordFromPolicy(
	ctx context.Context, in *pluginpb.GeneratePasswordFromPolicyRequest,
) (*pluginpb.GeneratePasswordFromPolicyReply, error) {
	if s.sys.GeneratePassword == nil {
		return nil, status.Errorf(codes.NotFound, "there is no password policy %q", in.GetPolicyName())
	}
	password, err := s.sys.GeneratePassword(ctx, in.GetPolicyName())
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &pluginpb.GeneratePasswordFromPolicyReply{Password: password}, nil
}

func (s *systemServer) ClusterInfo(context.Context, *pluginpb.Empty) (*pluginpb.ClusterInfoReply, error) {
	return &pluginpb.ClusterInfoReply{ClusterId: s.sys.ClusterID, ClusterName: s.sys.ClusterName}, nil
}

// eventsServer and observationsServer take what plugins send and drop it: without them KV logs an error at every write.
type eventsServer struct {
	pluginpb.UnimplementedEventsServer
}

func (eventsServer) SendEvent(context.Context, *pluginpb.SendEventRequest) (*pluginpb.Empty, error) {
	return &pluginpb.Empty{}, nil
}

type observationsServer struct {
	pluginpb.UnimplementedObservationsServer
}

func (observationsServer) RecordObservation(context.Context, *pluginpb.RecordObservationRequest) (*pluginpb.Empty, error) {
	return &pluginpb.Empty{}, nil
}
