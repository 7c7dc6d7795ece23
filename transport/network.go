package transport

import (
	"context"
	"net"
	"time"
)

// Network is where bytes come from: TCP() in production, a host of a MemNetwork in tests. Everything above it (TLS,
// ALPN, Raft, gRPC) is the same code on both. Safe for concurrent use.
type Network interface {
	// Listen binds addr ("host:port"; port 0 picks a free one).
	Listen(addr string) (net.Listener, error)
	// Dial connects to addr and gives up when ctx ends.
	Dial(ctx context.Context, addr string) (net.Conn, error)
}

// Dead peers are noticed by the kernel after about 30 s on an idle connection (keepalive) and after userTimeout when
// there is something unacknowledged. Raft and gRPC have shorter deadlines of their own; this is for what nobody waits on.
const (
	keepaliveIdle     = 15 * time.Second
	keepaliveInterval = 5 * time.Second
	keepaliveCount    = 3
	userTimeout       = 15 * time.Second
)

type tcpNetwork struct{}

// TCP returns the network of the operating system.
func TCP() Network { return tcpNetwork{} }

func tcpKeepalive() net.KeepAliveConfig {
	return net.KeepAliveConfig{Enable: true, Idle: keepaliveIdle, Interval: keepaliveInterval, Count: keepaliveCount}
}

func (tcpNetwork) Listen(addr string) (net.Listener, error) {
	lc := net.ListenConfig{KeepAliveConfig: tcpKeepalive(), Control: setUserTimeout}
	return lc.Listen(context.Background(), "tcp", addr)
}

func (tcpNetwork) Dial(ctx context.Context, addr string) (net.Conn, error) {
	d := net.Dialer{KeepAliveConfig: tcpKeepalive(), Control: setUserTimeout}
	return d.DialContext(ctx, "tcp", addr)
}
