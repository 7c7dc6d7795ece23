// Package transport is one node's door to its peers: one mutually authenticated listener on which Raft and gRPC meet,
// and a pool of client connections. Who may speak is decided in the TLS handshake, before a byte of either protocol is
// read. See DESIGN.md beside this file.
package transport

import (
	"log/slog"
	"net"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"

	"rollcall/node/fault"
)

// The protocols on the cluster port, as ALPN names them (RFC 7301).
const (
	alpnRaft = "rollcall-raft/1"
	alpnGRPC = "h2"
)

// MaxMessage is the largest gRPC message, 4 MiB; what is larger is streamed in chunks below it.
const MaxMessage = 4 << 20

// Config is what New needs. The zero value of every optional field means the default that its comment states.
type Config struct {
	// Listen is the address to bind, "host:port". Required. Port 0 picks a free one (tests).
	Listen string
	// Advertise is the address that peers dial, "host:port". Default: the bound address, which is wrong when Listen is a
	// wildcard; Validate refuses that.
	Advertise string
	// Network is where bytes come from. Default TCP().
	Network Network
	// Credentials are this node's certificate and whom it trusts. Required; of role "node".
	Credentials *Credentials
	// Authorize decides about a peer whose certificate is good, from many goroutines at once, within the handshake and
	// again at every recheck; an error refuses it. It must be quick and must not call the network. Default: any node
	// of the authority. SetAuthorize replaces it later.
	Authorize func(Identity) error
	// NameOf returns the node name that must answer at a Raft address, "" when it is not known (yet). It must be quick.
	// Default: unknown. SetNameOf replaces it later.
	NameOf func(raft.ServerAddress) string
	// ClientMethods are the gRPC methods ("/package.Service/Method") that role "client" may call. Nodes may call all.
	// Default none: then a client certificate is refused in the handshake.
	ClientMethods []string

	// HandshakeTimeout ends a connection that has not finished its TLS handshake (or its HTTP/2 preface). Default 5 s.
	HandshakeTimeout time.Duration
	// MaxConns bounds established incoming connections. Beyond it new ones are closed unanswered. Default 1024.
	MaxConns int
	// MaxHandshakes bounds incoming connections that are still strangers. Default 256.
	MaxHandshakes int
	// MaxHandshakesPerHost bounds them per remote host, so that one host cannot keep the others out. Default 64.
	MaxHandshakesPerHost int
	// MaxStreams bounds the concurrent calls of one gRPC connection. Default 1024: forwarded requests hold a stream
	// each, and a low bound would make reports and leases wait behind them.
	MaxStreams uint32
	// MaxConnAge ends gRPC connections gracefully, so that a rotated certificate takes effect on them. Default 30 min.
	MaxConnAge time.Duration
	// Recheck is how often the certificates behind established connections are verified again (expiry, Authorize). A
	// change of the credentials does so at once. Default 1 min.
	Recheck time.Duration
	// MaxPeers bounds the pool of client connections. Default 512.
	MaxPeers int

	// Logger takes what is worth telling. Required.
	Logger *slog.Logger
	// Registerer takes the metrics. Required; prometheus.NewRegistry() where nobody looks.
	Registerer prometheus.Registerer
}

// Validate says what is missing or impossible. New calls it after it has filled in the defaults.
func (c *Config) Validate() error {
	bad := func(field, format string, args ...any) error {
		return fault.New(fault.Invalid, "validate transport config", field, format, args...)
	}
	switch {
	case c.Listen == "":
		return bad("Listen", "an address to bind is required, for instance 0.0.0.0:7001")
	case c.Credentials == nil:
		return bad("Credentials", "a certificate is required; make one with: rollcall tls cert")
	case c.Credentials.Identity().Role != RoleNode:
		return bad("Credentials", "the certificate names %s; a node needs one of role %q", c.Credentials.Identity(), RoleNode)
	case c.Logger == nil:
		return bad("Logger", "it is required")
	case c.Registerer == nil:
		return bad("Registerer", "it is required")
	case c.HandshakeTimeout < 0 || c.MaxConnAge < 0 || c.Recheck < 0:
		return bad("HandshakeTimeout, MaxConnAge, Recheck", "durations must not be negative")
	case c.MaxConns < 0 || c.MaxHandshakes < 0 || c.MaxHandshakesPerHost < 0 || c.MaxPeers < 0:
		return bad("MaxConns, MaxHandshakes, MaxHandshakesPerHost, MaxPeers", "limits must not be negative")
	}
	if _, _, err := net.SplitHostPort(c.Listen); err != nil {
		return bad("Listen", "%q is not host:port: %w", c.Listen, err)
	}
	addr := c.Advertise
	if addr == "" {
		addr = c.Listen
	}
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return bad("Advertise", "%q is not host:port: %w", addr, err)
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		return bad("Advertise", "%q is no address that a peer can dial; say which one is", addr)
	}
	return nil
}

func (c *Config) defaults() {
	if c.Network == nil {
		c.Network = TCP()
	}
	if c.Authorize == nil {
		c.Authorize = func(Identity) error { return nil }
	}
	if c.NameOf == nil {
		c.NameOf = func(raft.ServerAddress) string { return "" }
	}
	setDefault(&c.HandshakeTimeout, 5*time.Second)
	setDefault(&c.MaxConns, 1024)
	setDefault(&c.MaxHandshakes, 256)
	setDefault(&c.MaxHandshakesPerHost, 64)
	setDefault(&c.MaxStreams, 1024)
	setDefault(&c.MaxConnAge, 30*time.Minute)
	setDefault(&c.Recheck, time.Minute)
	setDefault(&c.MaxPeers, 512)
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}
