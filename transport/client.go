package transport

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/stats"

	"rollcall/node/fault"
)

// How a lost peer is dialled again. gRPC's own maximum of two minutes would keep a healed node away from its peers.
const (
	redialFirst = 100 * time.Millisecond
	redialMost  = 2 * time.Second
	idleAfter   = 10 * time.Minute // an unused connection is closed, and opened again by the next call
)

type peerKey struct {
	addr, name string
	bulk       bool
}

type pooled struct {
	cc   *grpc.ClientConn
	used time.Time
}

// peerPool owns every client connection of the node.
type peerPool struct {
	t      *Transport
	mu     sync.Mutex
	conns  map[peerKey]*pooled
	closed bool
}

func newPeerPool(t *Transport) *peerPool {
	return &peerPool{t: t, conns: make(map[peerKey]*pooled)}
}

// Client returns the pooled connection to the node at addr, for control messages: votes, leases, reports, proposals.
// With a name, only a peer whose certificate names it is talked to. Nothing is dialled before the first call. The
// pool owns the connection: never close it. Errors of its calls have the kinds of node/fault; a connection that broke
// after the message had left is OutcomeUnknown, before that Unavailable.
func (t *Transport) Client(addr, name string) (*grpc.ClientConn, error) {
	return t.peers.get(peerKey{addr: addr, name: name})
}

// BulkClient is Client with a connection of its own for large or long transfers (forwarded requests, plugin bytes),
// so that a control message never waits behind them.
func (t *Transport) BulkClient(addr, name string) (*grpc.ClientConn, error) {
	return t.peers.get(peerKey{addr: addr, name: name, bulk: true})
}

func (p *peerPool) get(key peerKey) (*grpc.ClientConn, error) {
	if _, _, err := net.SplitHostPort(key.addr); err != nil {
		return nil, fault.New(fault.Invalid, "call peer", key.name, "%q is not host:port", key.addr)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, fault.New(fault.Unavailable, "call peer", key.addr, "this node is shutting down")
	}
	if c := p.conns[key]; c != nil {
		c.used = time.Now()
		return c.cc, nil
	}
	if len(p.conns) >= p.t.cfg.MaxPeers && !p.evict() {
		return nil, fault.New(fault.Exhausted, "call peer", key.addr, "all %d peer connections are in use", p.t.cfg.MaxPeers)
	}
	cc, err := p.open(key)
	if err != nil {
		return nil, fault.As(fault.Internal, err, "call peer", key.addr)
	}
	p.conns[key] = &pooled{cc: cc, used: time.Now()}
	return cc, nil
}

// evict closes the connection that has not been asked for longest, among those that have no call running (an idle
// channel has no transport, hence no call). p.mu is held.
func (p *peerPool) evict() bool {
	var oldest peerKey
	var found *pooled
	for key, c := range p.conns {
		if s := c.cc.GetState(); s != connectivity.Idle && s != connectivity.TransientFailure {
			continue
		}
		if found == nil || c.used.Before(found.used) {
			oldest, found = key, c
		}
	}
	if found == nil {
		return false
	}
	delete(p.conns, oldest)
	_ = found.cc.Close() // nothing runs on it
	return true
}

func (p *peerPool) open(key peerKey) (*grpc.ClientConn, error) {
	t := p.t
	bo := backoff.DefaultConfig
	bo.BaseDelay, bo.MaxDelay = redialFirst, redialMost
	return grpc.NewClient("passthrough:///"+key.addr,
		grpc.WithTransportCredentials(&clientCreds{t: t, addr: key.addr, name: key.name}),
		grpc.WithContextDialer(t.cfg.Network.Dial),
		grpc.WithNoProxy(),
		grpc.WithDisableServiceConfig(),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: bo, MinConnectTimeout: t.cfg.HandshakeTimeout}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: clientPing, Timeout: clientPong}),
		grpc.WithIdleTimeout(idleAfter),
		grpc.WithMaxHeaderListSize(maxHeader),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessage), grpc.MaxCallSendMsgSize(MaxMessage)),
		grpc.WithStatsHandler(sentHandler{}),
		grpc.WithChainUnaryInterceptor(unaryClient),
		grpc.WithChainStreamInterceptor(streamClient),
	)
}

func (p *peerPool) close() {
	p.mu.Lock()
	conns := p.conns
	p.conns, p.closed = nil, true
	p.mu.Unlock()
	for _, c := range conns {
		_ = c.cc.Close() // it fails only when it is closed already
	}
}

// sentKey finds, in a call's context, the mark that a message of it has gone out.
type sentKey struct{}

// sentHandler sets that mark. gRPC's statuses do not tell whether a call that ended as Unavailable had left the node;
// its events do.
type sentHandler struct{}

var _ stats.Handler = sentHandler{}

func (sentHandler) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (sentHandler) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (sentHandler) HandleConn(context.Context, stats.ConnStats)                       {}

func (sentHandler) HandleRPC(ctx context.Context, s stats.RPCStats) {
	if _, ok := s.(*stats.OutPayload); !ok {
		return
	}
	if sent, ok := ctx.Value(sentKey{}).(*atomic.Bool); ok {
		sent.Store(true)
	}
}

// outcome restores the error of a call. Unavailable promises that nothing ran; where the promise cannot be kept it
// becomes OutcomeUnknown. An error that the peer itself classified stands as it is.
func outcome(err error, sent *atomic.Bool) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	err = fault.FromGRPC(err)
	e, ok := errors.AsType[*fault.Error](err)
	if ok && e.Kind == fault.Unavailable && e.Err != nil && sent.Load() {
		return &fault.Error{Kind: fault.OutcomeUnknown, Text: "the connection broke before the answer: " + e.Text, Err: e.Err}
	}
	return err
}

func unaryClient(
	ctx context.Context, method string, req, reply any,
	cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption,
) error {
	sent := new(atomic.Bool)
	return outcome(invoker(context.WithValue(ctx, sentKey{}, sent), method, req, reply, cc, opts...), sent)
}

func streamClient(
	ctx context.Context, desc *grpc.StreamDesc,
	cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption,
) (grpc.ClientStream, error) {
	sent := new(atomic.Bool)
	s, err := streamer(context.WithValue(ctx, sentKey{}, sent), desc, cc, method, opts...)
	if err != nil {
		return nil, outcome(err, sent)
	}
	return &clientStream{ClientStream: s, sent: sent}, nil
}

// clientStream restores the kinds of a stream's errors. io.EOF keeps its meaning in both directions.
type clientStream struct {
	grpc.ClientStream
	sent *atomic.Bool
}

func (s *clientStream) Header() (metadata.MD, error) {
	md, err := s.ClientStream.Header()
	return md, outcome(err, s.sent)
}

func (s *clientStream) CloseSend() error { return outcome(s.ClientStream.CloseSend(), s.sent) }

func (s *clientStream) SendMsg(m any) error { return outcome(s.ClientStream.SendMsg(m), s.sent) }

func (s *clientStream) RecvMsg(m any) error { return outcome(s.ClientStream.RecvMsg(m), s.sent) }
