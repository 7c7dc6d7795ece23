package transport

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/grpc"

	"rollcall/node/failpoint"
	"rollcall/node/fault"
	"rollcall/transport/pki"
)

// Transport is one node's door to its peers. New binds it, Start opens it, Close shuts it; the methods between may be
// called from any goroutine.
type Transport struct {
	cfg       Config
	log       *slog.Logger
	met       *metrics
	quiet     quietLog
	distrust  quietLog // of peers that were called
	ln        net.Listener
	advertise string

	authorize atomic.Pointer[func(Identity) error]
	nameOf    atomic.Pointer[func(raft.ServerAddress) string]
	clientMay map[string]bool

	raft    *raftLayer
	rpc     *queue
	server  *grpc.Server
	peers   *peerPool
	refused atomic.Bool

	ctx       context.Context // ends when Close gives up waiting; cuts handshakes and dials
	cancel    context.CancelFunc
	stopWatch func()
	recheckCh chan struct{}
	wg        sync.WaitGroup

	mu       sync.Mutex
	conns    map[*secureConn]struct{}
	incoming int            // established connections that peers opened
	pending  int            // incoming connections in their handshake
	perHost  map[string]int // pending, by remote host
	started  bool
	closed   bool
}

// New checks the configuration and binds the port, so that a wrong address or certificate is told at once. Nothing is
// accepted before Start; until then rooms register their services on Server.
func New(cfg Config) (*Transport, error) {
	cfg.defaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	met, err := newMetrics(cfg.Registerer, cfg.Credentials)
	if err != nil {
		return nil, fault.Wrap(err, "register metrics", "transport")
	}
	ln, err := cfg.Network.Listen(cfg.Listen)
	if err != nil {
		return nil, fault.As(fault.Unavailable, err, "bind cluster port", cfg.Listen)
	}
	t := &Transport{
		cfg: cfg, log: cfg.Logger, met: met, ln: ln, advertise: cfg.Advertise,
		clientMay: make(map[string]bool), rpc: newQueue(), recheckCh: make(chan struct{}, 1),
		conns: make(map[*secureConn]struct{}), perHost: make(map[string]int),
	}
	if t.advertise == "" {
		t.advertise = ln.Addr().String()
	}
	for _, m := range cfg.ClientMethods {
		t.clientMay[m] = true
	}
	t.SetAuthorize(cfg.Authorize)
	t.SetNameOf(cfg.NameOf)
	t.ctx, t.cancel = context.WithCancel(context.Background())
	t.raft = &raftLayer{t: t, queue: newQueue()}
	t.server = t.newServer()
	t.peers = newPeerPool(t)
	t.stopWatch = cfg.Credentials.onChange(t.rotated)
	return t, nil
}

// Addr returns the address that peers dial: Config.Advertise, or the bound address.
func (t *Transport) Addr() string { return t.advertise }

// Identity returns who this node is to its peers.
func (t *Transport) Identity() Identity { return t.cfg.Credentials.Identity() }

// Raft returns the stream layer for a raft.NetworkTransport. It is always the same one. Closing it closes every Raft
// stream and leaves gRPC alone.
func (t *Transport) Raft() raft.StreamLayer { return t.raft }

// Server returns the gRPC server of the cluster port. Rooms register their services on it before Start.
func (t *Transport) Server() *grpc.Server { return t.server }

// SetAuthorize replaces Config.Authorize; nil lets any node of the authority in. It acts on new connections at once
// and on established ones at the next Recheck.
func (t *Transport) SetAuthorize(fn func(Identity) error) {
	if fn == nil {
		fn = func(Identity) error { return nil }
	}
	t.authorize.Store(&fn)
}

// SetNameOf replaces Config.NameOf; nil expects no name.
func (t *Transport) SetNameOf(fn func(raft.ServerAddress) string) {
	if fn == nil {
		fn = func(raft.ServerAddress) string { return "" }
	}
	t.nameOf.Store(&fn)
}

// Start begins to accept. Calling it twice, or after Close, does nothing.
func (t *Transport) Start() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.started || t.closed {
		return
	}
	t.started = true
	t.wg.Go(t.accept)
	t.wg.Go(t.watch)
	t.wg.Go(func() {
		if err := t.server.Serve(t.rpc); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.log.Error("serving gRPC ended", "error", err)
		}
	})
}

// Close stops accepting, lets running calls finish until ctx ends, then cuts what is left and waits for every
// goroutine. It returns ctx's error when calls had to be cut. A second Close returns nil at once.
func (t *Transport) Close(ctx context.Context) error {
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		return nil
	}
	t.closed = true
	t.mu.Unlock()

	t.stopWatch()
	_ = t.ln.Close()
	graceful := make(chan struct{})
	t.wg.Go(func() {
		t.server.GracefulStop()
		close(graceful)
	})
	var err error
	select {
	case <-graceful:
	case <-ctx.Done():
		err = fault.Wrap(ctx.Err(), "finish the calls of peers", t.advertise)
		t.server.Stop()
	}
	_ = t.raft.Close()
	t.rpc.close()
	t.peers.close()
	t.cancel()
	t.closeConns(func(*secureConn) bool { return true })
	t.wg.Wait()
	return err
}

// accept takes connections until the listener closes.
func (t *Transport) accept() {
	const first, most = 5 * time.Millisecond, time.Second
	delay := first
	for {
		raw, err := t.ln.Accept()
		if err == nil {
			delay = first
			if failpoint.Hit(failpoint.TransportAccept, t.advertise) != nil {
				_ = raw.Close()
				continue
			}
			t.greet(raw)
			continue
		}
		if errors.Is(err, net.ErrClosed) {
			return
		}
		// Out of descriptors, most likely: waiting lets others finish.
		t.quiet.warn(t.log, "accept on the cluster port", "error", err)
		select {
		case <-time.After(delay):
			delay = min(2*delay, most)
		case <-t.ctx.Done():
			return
		}
	}
}

// greet starts the handshake of an accepted connection, or closes it where the limits are reached.
func (t *Transport) greet(raw net.Conn) {
	host, _, err := net.SplitHostPort(raw.RemoteAddr().String())
	if err != nil {
		host = raw.RemoteAddr().String()
	}
	t.mu.Lock()
	full := t.closed || t.incoming+t.pending >= t.cfg.MaxConns || t.pending >= t.cfg.MaxHandshakes ||
		t.perHost[host] >= t.cfg.MaxHandshakesPerHost
	if !full {
		t.pending++
		t.perHost[host]++
	}
	t.mu.Unlock()
	if full {
		_ = raw.Close()
		t.met.handshakes.WithLabelValues("full").Inc()
		t.quiet.warn(t.log, "connection closed: limit of the cluster port reached", "remote", raw.RemoteAddr())
		return
	}
	t.wg.Go(func() {
		conn, err := t.handshake(raw)
		t.mu.Lock()
		t.pending--
		if t.perHost[host]--; t.perHost[host] == 0 {
			delete(t.perHost, host)
		}
		t.mu.Unlock()
		if err != nil {
			_ = raw.Close()
			result := "refused"
			if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) {
				result = "silent"
			}
			t.met.handshakes.WithLabelValues(result).Inc()
			t.quiet.warn(t.log, "connection refused", "remote", raw.RemoteAddr(), "result", result, "error", err)
			return
		}
		t.met.handshakes.WithLabelValues("accepted").Inc()
		t.hand(conn)
	})
}

// handshake proves who is there. Nothing of Raft or gRPC has been read when it returns an error.
func (t *Transport) handshake(raw net.Conn) (*secureConn, error) {
	ctx, cancel := context.WithTimeout(t.ctx, t.cfg.HandshakeTimeout)
	defer cancel()
	if err := raw.SetDeadline(time.Now().Add(t.cfg.HandshakeTimeout)); err != nil {
		return nil, err
	}
	var id Identity
	conn := tls.Server(raw, t.cfg.Credentials.server(func(cs tls.ConnectionState) (err error) {
		id, err = t.admit(cs)
		return err
	}))
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	if err := raw.SetDeadline(time.Time{}); err != nil {
		return nil, err
	}
	return t.track(&secureConn{Conn: conn, t: t, id: id, in: true, alpn: conn.ConnectionState().NegotiatedProtocol})
}

// admit decides, inside the handshake, about a peer that has proved to own its certificate's key.
func (t *Transport) admit(cs tls.ConnectionState) (Identity, error) {
	if err := t.trust().verify(cs.PeerCertificates, x509.ExtKeyUsageClientAuth); err != nil {
		return Identity{}, err
	}
	id, err := pki.IdentityOf(cs.PeerCertificates[0])
	if err != nil {
		return id, err
	}
	return id, t.permit(id, cs.NegotiatedProtocol)
}

// trust returns the current credentials.
func (t *Transport) trust() *material { return t.cfg.Credentials.cur.Load() }

// permit says whether an incoming peer may use a protocol.
func (t *Transport) permit(id Identity, alpn string) error {
	switch {
	case alpn != alpnRaft && alpn != alpnGRPC:
		return fault.New(fault.Denied, "admit", id.String(), "it offers none of the protocols %s, %s", alpnRaft, alpnGRPC)
	case id.Role == RoleNode:
		return (*t.authorize.Load())(id)
	case id.Role == RoleClient && alpn == alpnGRPC && len(t.clientMay) > 0:
		return (*t.authorize.Load())(id)
	default:
		return fault.New(fault.Denied, "admit", id.String(), "role %q may not use %s", id.Role, alpn)
	}
}

// hand gives an authenticated connection to the protocol that it asked for.
func (t *Transport) hand(conn *secureConn) {
	to := t.rpc
	if conn.alpn == alpnRaft {
		to = t.raft.queue
	}
	timer := time.NewTimer(t.cfg.HandshakeTimeout)
	defer timer.Stop()
	if !to.put(conn, timer.C) {
		_ = conn.Close()
	}
}

// dial opens a connection to addr, where name ("" for any node) must answer.
func (t *Transport) dial(ctx context.Context, addr, name, alpn string) (*secureConn, error) {
	if err := failpoint.Hit(failpoint.TransportDial, t.advertise); err != nil {
		return nil, err
	}
	raw, err := t.cfg.Network.Dial(ctx, addr)
	if err != nil {
		return nil, fault.As(fault.Unavailable, err, "dial peer", addr)
	}
	conn, err := t.secure(ctx, raw, addr, name, alpn)
	if err != nil {
		_ = raw.Close()
		return nil, err
	}
	return conn, nil
}

// secure does the calling half of the handshake. The caller closes raw on an error.
func (t *Transport) secure(ctx context.Context, raw net.Conn, addr, name, alpn string) (*secureConn, error) {
	ctx, cancel := context.WithTimeout(ctx, t.cfg.HandshakeTimeout)
	defer cancel()
	var id Identity
	conn := tls.Client(raw, t.cfg.Credentials.client(alpn, func(cs tls.ConnectionState) (err error) {
		id, err = t.trust().recognise(cs, name)
		return err
	}))
	if err := conn.HandshakeContext(ctx); err != nil {
		kind := fault.Unavailable
		if fault.Is(err, fault.Denied) {
			kind = fault.Denied
			// gRPC tells its callers only that the peer does not answer.
			t.distrust.warn(t.log, "a peer is not trusted", "peer", name, "address", addr, "error", err)
		}
		return nil, fault.As(kind, err, "greet peer", strings.TrimSpace(name+" "+addr))
	}
	if got := conn.ConnectionState().NegotiatedProtocol; got != alpn {
		return nil, fault.New(fault.Unavailable, "greet peer", addr, "it does not speak %s", alpn)
	}
	return t.track(&secureConn{Conn: conn, t: t, id: id, name: name, alpn: alpn})
}
