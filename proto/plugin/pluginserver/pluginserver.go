// Package pluginserver is the plugin's side of the protocol, as small as can be: for the demo plugin and for tests, which
// start themselves as plugins. Real plugins use an SDK.
package pluginserver

import (
	"context"
	"errors"
	"fmt"
	"sync"

	goplugin "github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	pluginpb "rollcall/proto/plugin"
)

// Config is what Serve needs.
type Config struct {
	// Auth makes it an auth method; otherwise it is a secrets engine.
	Auth bool
	// Version is what the plugin says about itself; may be empty.
	Version string
	// Multiplex lets one process hold many instances.
	Multiplex bool
	// Paths are its special paths; may be nil.
	Paths *pluginpb.Paths
	// New makes an instance. Storage may be read in it, and is writable from Initialize on.
	New func(ctx context.Context, s Setup) (Backend, error)
}

// Setup is what an instance is made with.
type Setup struct {
	Storage     Storage
	System      pluginpb.SystemViewClient
	Config      map[string]string
	BackendUUID string
}

// Backend is one instance. Its methods are called from many goroutines.
type Backend interface {
	Initialize(ctx context.Context) error
	// Handle answers a request. An *Error decides how the host answers its client.
	Handle(ctx context.Context, req *pluginpb.Request) (*pluginpb.Response, error)
	// Exists tells create from update; check is false when the path has no check.
	Exists(ctx context.Context, req *pluginpb.Request) (exists, check bool, err error)
	// Invalidate says that the key was changed by another node.
	Invalidate(key string)
	Cleanup(ctx context.Context)
}

// Error is an error that the host knows by its type: see pluginpb.ProtoError.
type Error struct {
	Type uint32
	Code int64
	Text string
}

// Error returns the text.
func (e *Error) Error() string { return e.Text }

// The errors that every plugin needs.
var (
	ErrUnsupportedOperation = &Error{Type: 5, Text: "unsupported operation"}
	ErrUnsupportedPath      = &Error{Type: 6, Text: "unsupported path"}
	ErrInvalidRequest       = &Error{Type: 7, Text: "invalid request"}
)

var handshake = goplugin.HandshakeConfig{
	MagicCookieKey: "VAULT_BACKEND_PLUGIN", MagicCookieValue: "6669da05-b1c8-4f49-97d9-c8e5bed98e20",
}

var databaseHandshake = goplugin.HandshakeConfig{
	MagicCookieKey: "VAULT_DATABASE_PLUGIN", MagicCookieValue: "926a0820-aea2-be28-51d6-83cdf00e8edb",
}

// Serve makes this process a backend plugin. It returns when the host has asked it to end.
func Serve(cfg Config) {
	serve(handshake, map[int]goplugin.PluginSet{5: {"backend": &backendPlugin{cfg: cfg}}})
}

// ServeDatabase makes this process a database plugin; with multiplex, db is to tell its connections apart by InstanceID.
func ServeDatabase(db pluginpb.DatabaseServer, multiplex bool) {
	version := 5
	if multiplex {
		version = 6
	}
	serve(databaseHandshake, map[int]goplugin.PluginSet{version: {"database": &databasePlugin{db: db, multiplex: multiplex}}})
}

// InstanceID is the name of the instance that a call is for; "" where the host names none.
func InstanceID(ctx context.Context) string {
	if v := metadata.ValueFromIncomingContext(ctx, "multiplex_id"); len(v) == 1 {
		return v[0]
	}
	return ""
}

type multiplexing struct {
	pluginpb.UnimplementedPluginMultiplexingServer
	supported bool
}

func (m multiplexing) MultiplexingSupport(context.Context, *emptypb.Empty) (*pluginpb.MultiplexingSupportResponse, error) {
	return &pluginpb.MultiplexingSupportResponse{Supported: m.supported}, nil
}

var errHostSide = errors.New("this is the plugin's side")

type databasePlugin struct {
	goplugin.NetRPCUnsupportedPlugin
	db        pluginpb.DatabaseServer
	multiplex bool
}

func (p *databasePlugin) GRPCServer(_ *goplugin.GRPCBroker, s *grpc.Server) error {
	pluginpb.RegisterDatabaseServer(s, p.db)
	pluginpb.RegisterPluginMultiplexingServer(s, multiplexing{supported: p.multiplex})
	return nil
}

func (*databasePlugin) GRPCClient(context.Context, *goplugin.GRPCBroker, *grpc.ClientConn) (any, error) {
	return nil, errHostSide
}

type backendPlugin struct {
	goplugin.NetRPCUnsupportedPlugin
	cfg Config
}

func (p *backendPlugin) GRPCServer(b *goplugin.GRPCBroker, s *grpc.Server) error {
	srv := &server{cfg: p.cfg, broker: b, instances: map[string]*inst{}}
	pluginpb.RegisterBackendServer(s, srv)
	pluginpb.RegisterPluginVersionServer(s, versionServer{version: p.cfg.Version})
	pluginpb.RegisterPluginMultiplexingServer(s, multiplexing{supported: p.cfg.Multiplex})
	return nil
}

func (*backendPlugin) GRPCClient(context.Context, *goplugin.GRPCBroker, *grpc.ClientConn) (any, error) {
	return nil, errHostSide
}

type versionServer struct {
	pluginpb.UnimplementedPluginVersionServer
	version string
}

func (v versionServer) Version(context.Context, *emptypb.Empty) (*pluginpb.VersionReply, error) {
	return &pluginpb.VersionReply{PluginVersion: v.version}, nil
}

type inst struct {
	backend Backend
	conn    *grpc.ClientConn
}

// server is the Backend service over all instances of the process.
type server struct {
	pluginpb.UnimplementedBackendServer
	cfg    Config
	broker *goplugin.GRPCBroker

	mu        sync.RWMutex
	instances map[string]*inst
}

func (s *server) id(ctx context.Context) string {
	if !s.cfg.Multiplex {
		return ""
	}
	return InstanceID(ctx)
}

func (s *server) find(ctx context.Context) (*inst, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	i := s.instances[s.id(ctx)]
	if i == nil {
		return nil, status.Errorf(codes.Internal, "no instance %q is set up", s.id(ctx))
	}
	return i, nil
}

func (s *server) Setup(ctx context.Context, in *pluginpb.SetupArgs) (*pluginpb.SetupReply, error) {
	if s.cfg.Multiplex && InstanceID(ctx) == "" {
		return nil, status.Error(codes.InvalidArgument, "the call names no instance")
	}
	conn, err := s.broker.Dial(in.GetBrokerId())
	if err != nil {
		return nil, fmt.Errorf("reach the host: %w", err)
	}
	b, err := s.cfg.New(ctx, Setup{
		Storage: Storage{pluginpb.NewStorageClient(conn)}, System: pluginpb.NewSystemViewClient(conn),
		Config: in.GetConfig(), BackendUUID: in.GetBackendUUID(),
	})
	if err != nil {
		_ = conn.Close()
		return &pluginpb.SetupReply{Err: err.Error()}, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.instances[s.id(ctx)] = &inst{b, conn}
	return &pluginpb.SetupReply{}, nil
}

func (s *server) Initialize(ctx context.Context, _ *pluginpb.InitializeArgs) (*pluginpb.InitializeReply, error) {
	i, err := s.find(ctx)
	if err != nil {
		return nil, err
	}
	return &pluginpb.InitializeReply{Err: protoError(i.backend.Initialize(ctx))}, nil
}

func (s *server) HandleRequest(ctx context.Context, in *pluginpb.HandleRequestArgs) (*pluginpb.HandleRequestReply, error) {
	i, err := s.find(ctx)
	if err != nil {
		return nil, err
	}
	resp, err := i.backend.Handle(ctx, in.GetRequest())
	return &pluginpb.HandleRequestReply{Response: resp, Err: protoError(err)}, nil
}

func (s *server) HandleExistenceCheck(ctx context.Context, in *pluginpb.HandleExistenceCheckArgs) (*pluginpb.HandleExistenceCheckReply, error) {
	i, err := s.find(ctx)
	if err != nil {
		return nil, err
	}
	exists, check, err := i.backend.Exists(ctx, in.GetRequest())
	return &pluginpb.HandleExistenceCheckReply{CheckFound: check, Exists: exists, Err: protoError(err)}, nil
}

func (s *server) InvalidateKey(ctx context.Context, in *pluginpb.InvalidateKeyArgs) (*pluginpb.Empty, error) {
	i, err := s.find(ctx)
	if err != nil {
		return nil, err
	}
	i.backend.Invalidate(in.GetKey())
	return &pluginpb.Empty{}, nil
}

func (s *server) SpecialPaths(context.Context, *pluginpb.Empty) (*pluginpb.SpecialPathsReply, error) {
	return &pluginpb.SpecialPathsReply{Paths: s.cfg.Paths}, nil
}

func (s *server) Type(context.Context, *pluginpb.Empty) (*pluginpb.TypeReply, error) {
	if s.cfg.Auth {
		return &pluginpb.TypeReply{Type: 2}, nil
	}
	return &pluginpb.TypeReply{Type: 1}, nil
}

func (s *server) Cleanup(ctx context.Context, _ *pluginpb.Empty) (*pluginpb.Empty, error) {
	i, err := s.find(ctx)
	if err != nil {
		return nil, err
	}
	i.backend.Cleanup(ctx)
	s.mu.Lock()
	delete(s.instances, s.id(ctx))
	s.mu.Unlock()
	_ = i.conn.Close()
	return &pluginpb.Empty{}, nil
}

func protoError(err error) *pluginpb.ProtoError {
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return &pluginpb.ProtoError{ErrType: e.Type, ErrMsg: err.Error(), ErrCode: e.Code}
	}
	return &pluginpb.ProtoError{ErrMsg: err.Error()}
}

// Storage is the mount's own keys, on the host.
type Storage struct{ client pluginpb.StorageClient }

// List returns the direct children of a prefix; folders end in "/".
func (s Storage) List(ctx context.Context, prefix string) ([]string, error) {
	reply, err := s.client.List(ctx, &pluginpb.StorageListArgs{Prefix: prefix})
	return reply.GetKeys(), joined(err, reply.GetErr())
}

// Get returns the value of a key, and whether there is one.
func (s Storage) Get(ctx context.Context, key string) ([]byte, bool, error) {
	reply, err := s.client.Get(ctx, &pluginpb.StorageGetArgs{Key: key})
	return reply.GetEntry().GetValue(), reply.GetEntry() != nil, joined(err, reply.GetErr())
}

// Put writes a key.
func (s Storage) Put(ctx context.Context, key string, value []byte) error {
	reply, err := s.client.Put(ctx, &pluginpb.StoragePutArgs{Entry: &pluginpb.StorageEntry{Key: key, Value: value}})
	return joined(err, reply.GetErr())
}

// Delete removes a key.
func (s Storage) Delete(ctx context.Context, key string) error {
	reply, err := s.client.Delete(ctx, &pluginpb.StorageDeleteArgs{Key: key})
	return joined(err, reply.GetErr())
}

func joined(err error, text string) error {
	if err == nil && text != "" {
		err = errors.New(text)
	}
	return err
}
