package transport

import (
	"context"
	"errors"
	"net"
	"runtime/debug"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	"rollcall/node/fault"
)

// Keepalive of gRPC: a peer that is gone is noticed within clientPing + clientPong by whoever has a call running.
const (
	clientPing = 10 * time.Second // gRPC allows no less
	clientPong = 5 * time.Second
	serverPing = 20 * time.Second
	serverPong = 10 * time.Second
	minPing    = 5 * time.Second // peers that ping more often are cut off
	ageGrace   = 5 * time.Minute // how long calls may go on after a connection's maximum age
	maxHeader  = 64 << 10
)

// newServer makes the gRPC server: authenticated connections come out of the queue, the role table is asked before a
// message is decoded, errors keep their kind.
func (t *Transport) newServer() *grpc.Server {
	return grpc.NewServer(
		grpc.Creds(serverCreds{}),
		grpc.InTapHandle(t.allow),
		grpc.ChainUnaryInterceptor(t.observeUnary, fault.UnaryServer),
		grpc.ChainStreamInterceptor(t.observeStream, fault.StreamServer),
		grpc.MaxRecvMsgSize(MaxMessage),
		grpc.MaxSendMsgSize(MaxMessage),
		grpc.MaxHeaderListSize(maxHeader),
		grpc.MaxConcurrentStreams(t.cfg.MaxStreams),
		grpc.ConnectionTimeout(t.cfg.HandshakeTimeout),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time: serverPing, Timeout: serverPong, MaxConnectionAge: t.cfg.MaxConnAge, MaxConnectionAgeGrace: ageGrace,
		}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minPing, PermitWithoutStream: true}),
	)
}

// authInfo is what a handler (or a caller) can learn about the other end.
type authInfo struct {
	credentials.TLSInfo
	id Identity
}

func newAuthInfo(c *secureConn) authInfo {
	return authInfo{
		TLSInfo: credentials.TLSInfo{
			State:          c.ConnectionState(),
			CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		},
		id: c.id,
	}
}

// PeerIdentity returns who sent the call that a gRPC handler is serving. It is false outside of a handler.
func PeerIdentity(ctx context.Context) (Identity, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return Identity{}, false
	}
	info, ok := p.AuthInfo.(authInfo)
	return info.id, ok
}

// allow is the default-deny table, asked for every call before its message is read.
func (t *Transport) allow(ctx context.Context, info *tap.Info) (context.Context, error) {
	id, ok := PeerIdentity(ctx)
	switch {
	case !ok:
		return nil, fault.ToGRPC(fault.New(fault.Denied, "call", info.FullMethodName, "the caller is not known"))
	case id.Role == RoleNode, id.Role == RoleClient && t.clientMay[info.FullMethodName]:
		return ctx, nil
	default:
		return nil, fault.ToGRPC(fault.New(fault.Denied, "call", info.FullMethodName, "%s may not", id))
	}
}

func (t *Transport) observeUnary(
	ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler,
) (resp any, err error) {
	start := time.Now()
	defer func() { t.observe(info.FullMethod, start, recover(), &err) }()
	return handler(ctx, req)
}

func (t *Transport) observeStream(
	srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler,
) (err error) {
	start := time.Now()
	defer func() { t.observe(info.FullMethod, start, recover(), &err) }()
	return handler(srv, ss)
}

// observe counts a call that has ended. A panic becomes an error of that call: what one peer sends must not stop a node
// that others depend on.
func (t *Transport) observe(method string, start time.Time, panicked any, err *error) {
	if panicked != nil {
		t.met.panics.Inc()
		t.log.Error("handler panicked", "method", method, "panic", panicked, "stack", string(debug.Stack()))
		*err = fault.ToGRPC(fault.New(fault.Internal, "serve", method, "the handler panicked; its node's log has the details"))
	}
	t.met.calls.WithLabelValues(method, status.Code(*err).String()).Inc()
	t.met.seconds.WithLabelValues(method).Observe(time.Since(start).Seconds())
}

// serverCreds tells gRPC about connections whose handshake is done already.
type serverCreds struct{}

var (
	_ credentials.TransportCredentials = serverCreds{}
	_ credentials.TransportCredentials = (*clientCreds)(nil)
)

var errWrongEnd = errors.New("transport: these credentials serve the other end")

func (serverCreds) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, ok := raw.(*secureConn)
	if !ok {
		return nil, nil, errors.New("transport: a connection came past the cluster port")
	}
	return conn, newAuthInfo(conn), nil
}

func (serverCreds) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errWrongEnd
}

func (serverCreds) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

func (c serverCreds) Clone() credentials.TransportCredentials { return c }
func (serverCreds) OverrideServerName(string) error           { return nil }

// clientCreds does the calling half of the handshake for one peer.
type clientCreds struct {
	t          *Transport
	addr, name string
}

func (c *clientCreds) ClientHandshake(ctx context.Context, _ string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, err := c.t.secure(ctx, raw, c.addr, c.name, alpnGRPC)
	if err != nil {
		return nil, nil, err
	}
	return conn, newAuthInfo(conn), nil
}

func (c *clientCreds) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errWrongEnd
}

func (c *clientCreds) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

func (c *clientCreds) Clone() credentials.TransportCredentials { return c }
func (c *clientCreds) OverrideServerName(string) error         { return nil }
