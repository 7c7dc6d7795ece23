// Package gossip finds the other nodes and hints at their failure, over hashicorp/memberlist. It decides nothing: who is
// a member is Raft's configuration, who takes part in a reload is the state's node table. What it knows may be late,
// and whoever holds the shared key can say anything.
package gossip

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/memberlist"
	"github.com/prometheus/client_golang/prometheus"

	"rollcall/node/fault"
	"rollcall/node/telemetry"
)

// Status is what gossip believes of a peer.
type Status uint8

// The states of a peer.
const (
	Alive Status = iota
	Dead
	// Left said goodbye: it was stopped in good order.
	Left
)

// Peer is another node as gossip knows it: its newest boot.
type Peer struct {
	NodeID          string
	Incarnation     uint64
	Name            string
	Address         string // of its cluster port
	ClusterID       string // empty while it belongs to none
	HasState        bool
	NonVoter        bool
	BootstrapExpect uint32
	Build           string
	Status          Status
	Since           time.Time // of the status
}

// Announcement is the part of what a node says of itself that changes while it runs.
type Announcement struct {
	// ClusterID is the UUID of the cluster this node belongs to; empty before it does.
	ClusterID string
	// HasState: the data directory holds Raft state.
	HasState bool
}

// Config of Gossip.
type Config struct {
	// NodeID (UUID), Incarnation and Name are this node's. Required.
	NodeID      string
	Incarnation uint64
	Name        string
	// ClusterAddress is where peers reach this node's cluster port; announced. Required.
	ClusterAddress string
	// Listen is the address to bind, "host:port", TCP and UDP. Port 0 picks a free one. Required without Transport.
	Listen string
	// Advertise is what peers are told ("host:port" or "host"; a name is looked up). Default: Listen, where that is no
	// wildcard, else a private address of this machine.
	Advertise string
	// Label separates clusters on one network, beside the key: packets with another label are dropped unread. May be
	// empty; at most 200 bytes. Every node must have the same.
	Label string
	// SecretKey of 16, 24 or 32 bytes encrypts and authenticates every packet (AES-GCM). Required.
	SecretKey []byte
	// RetryJoin lists "host:port" of others. They are looked up and tried again for ever, also when all is well: that
	// heals what a long partition has made forget.
	RetryJoin []string
	// NonVoter, BootstrapExpect and Build are announced.
	NonVoter        bool
	BootstrapExpect uint32
	Build           string
	// Initial is announced first.
	Initial Announcement

	// Transport replaces the network: tests and simulations. Gossip shuts it down.
	Transport memberlist.Transport
	// Resolve looks a host up; default net.DefaultResolver. For tests.
	Resolve func(ctx context.Context, host string) ([]string, error)
	// Logger and Metrics are required.
	Logger  *slog.Logger
	Metrics prometheus.Registerer
}

// Validate says what is wrong. New calls it.
func (c *Config) Validate() error {
	bad := func(field, format string, args ...any) error {
		return fault.New(fault.Invalid, "configure gossip", field, format, args...)
	}
	switch {
	case uuid.Validate(c.NodeID) != nil || c.Name == "" || c.ClusterAddress == "":
		return bad("NodeID, Name, ClusterAddress", "are required")
	case len(c.SecretKey) != 16 && len(c.SecretKey) != 24 && len(c.SecretKey) != 32:
		return bad("SecretKey", "must have 16, 24 or 32 bytes, not %d", len(c.SecretKey))
	case c.Listen == "" && c.Transport == nil:
		return bad("Listen", "is required")
	case c.BootstrapExpect > 255:
		return bad("BootstrapExpect", "must be at most 255")
	case len(c.Label) > 200:
		return bad("Label", "must have at most 200 bytes")
	case c.Logger == nil || c.Metrics == nil:
		return bad("Logger, Metrics", "are required")
	}
	return nil
}

// maxPeers bounds what strangers with the key can make us remember.
const maxPeers = 4096

// Gossip is this node's part. New binds, Start joins, Stop says goodbye.
type Gossip struct {
	cfg   Config
	log   *slog.Logger
	trans memberlist.Transport
	bound string
	list  *memberlist.Memberlist // nil before Start
	m     *metrics

	ctx     context.Context
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	wake    chan struct{} // an announcement waits
	stop    sync.Once
	stopErr error
	stopped chan struct{}

	meta atomic.Pointer[[]byte]

	mu      sync.Mutex
	self    fact
	peers   map[string]*Peer // by memberlist's name
	changed chan struct{}
}

// New checks the configuration and binds the port. Nothing is sent or answered before Start.
func New(cfg Config) (*Gossip, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Resolve == nil {
		cfg.Resolve = net.DefaultResolver.LookupHost
	}
	g := &Gossip{
		cfg: cfg, log: cfg.Logger, wake: make(chan struct{}, 1), stopped: make(chan struct{}),
		peers: map[string]*Peer{}, changed: make(chan struct{}),
		self: fact{
			NodeID: cfg.NodeID, Incarnation: cfg.Incarnation, Name: cfg.Name, Address: cfg.ClusterAddress,
			ClusterID: cfg.Initial.ClusterID, HasState: cfg.Initial.HasState, NonVoter: cfg.NonVoter,
			BootstrapExpect: uint8(cfg.BootstrapExpect), Build: cfg.Build,
		},
	}
	g.ctx, g.cancel = context.WithCancel(context.Background())
	meta, err := g.self.encode()
	if err != nil {
		return nil, err
	}
	g.meta.Store(&meta)
	if g.m, err = newMetrics(cfg.Metrics, g); err != nil {
		return nil, err
	}
	if err := g.bind(); err != nil {
		g.m.unregister()
		return nil, err
	}
	return g, nil
}

func (g *Gossip) bind() error {
	if g.cfg.Transport != nil {
		g.trans, g.bound = g.cfg.Transport, g.cfg.Listen
		return nil
	}
	host, portText, err := net.SplitHostPort(g.cfg.Listen)
	port, perr := strconv.Atoi(portText)
	if err != nil || perr != nil {
		return fault.New(fault.Invalid, "bind gossip port", g.cfg.Listen, "is not host:port: %w", errors.Join(err, perr))
	}
	ip, err := g.resolveOne(g.ctx, host)
	if err != nil {
		return fault.As(fault.Invalid, err, "bind gossip port", g.cfg.Listen)
	}
	inner, err := memberlist.NewNetTransport(&memberlist.NetTransportConfig{
		BindAddrs: []string{ip}, BindPort: port, Logger: telemetry.StdLog(g.log, slog.LevelDebug),
	})
	if err != nil {
		return fault.As(fault.Unavailable, err, "bind gossip port", g.cfg.Listen)
	}
	g.bound = net.JoinHostPort(ip, strconv.Itoa(inner.GetAutoBindPort()))
	g.trans = &advertisedTransport{NetTransport: inner, g: g}
	return nil
}

// resolveOne returns an IP of the host; "" and wildcards stay wildcards.
func (g *Gossip) resolveOne(ctx context.Context, host string) (string, error) {
	if host == "" {
		return "0.0.0.0", nil
	}
	if net.ParseIP(host) != nil {
		return host, nil
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	all, err := g.cfg.Resolve(ctx, host)
	if err != nil {
		return "", err
	}
	for _, a := range all {
		if ip := net.ParseIP(a); ip != nil && ip.To4() != nil {
			return a, nil
		}
	}
	if len(all) == 0 {
		return "", errors.New("the name has no address")
	}
	return all[0], nil
}

// advertisedTransport tells peers Config.Advertise, looked up afresh whenever memberlist asks.
type advertisedTransport struct {
	*memberlist.NetTransport
	g *Gossip
}

var _ memberlist.NodeAwareTransport = (*advertisedTransport)(nil)

// FinalAdvertiseAddr is memberlist.Transport's.
func (t *advertisedTransport) FinalAdvertiseAddr(ip string, _ int) (net.IP, int, error) {
	port := t.GetAutoBindPort()
	if a := t.g.cfg.Advertise; a != "" {
		host, portText, err := net.SplitHostPort(a)
		if err != nil {
			host, portText = a, ""
		}
		if portText != "" {
			if port, err = strconv.Atoi(portText); err != nil {
				return nil, 0, fault.As(fault.Invalid, err, "advertise", a)
			}
		}
		if ip, err = t.g.resolveOne(t.g.ctx, host); err != nil {
			return nil, 0, fault.As(fault.Invalid, err, "advertise", a)
		}
	}
	return t.NetTransport.FinalAdvertiseAddr(ip, port)
}

// Start begins to gossip and to join. ctx bounds the start only.
func (g *Gossip) Start(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return fault.Wrap(err, "start gossip", g.cfg.Name)
	}
	conf := memberlist.DefaultLANConfig()
	conf.Name = g.self.member()
	conf.Transport = g.trans
	conf.Label = strings.TrimSuffix("rollcall/"+g.cfg.Label, "/")
	conf.SecretKey = g.cfg.SecretKey
	conf.PushPullInterval = 15 * time.Second // for fewer than 100 nodes: a lost announcement waits no longer
	conf.DeadNodeReclaimTime = time.Second
	conf.EnableCompression = false
	conf.DNSConfigPath = ""
	d := &delegate{g}
	conf.Delegate, conf.Events, conf.Conflict, conf.Merge, conf.Alive = d, d, d, d, d
	conf.Logger = telemetry.StdLog(g.log, slog.LevelDebug)
	conf.MsgpackUseNewTimeFormat = true
	list, err := memberlist.Create(conf)
	if err != nil {
		return fault.As(fault.Invalid, err, "start gossip", g.cfg.Name)
	}
	g.list = list
	g.wg.Go(g.joinLoop)
	g.wg.Go(g.announceLoop)
	return nil
}

// Stop says goodbye to the others, shuts down, and waits for every goroutine, at most until ctx ends.
func (g *Gossip) Stop(ctx context.Context) error {
	g.stop.Do(func() { go func() { g.stopErr = g.shutdown(); close(g.stopped) }() })
	select {
	case <-g.stopped:
		return g.stopErr
	case <-ctx.Done():
		return fault.Wrap(ctx.Err(), "stop gossip", g.cfg.Name)
	}
}

func (g *Gossip) shutdown() error {
	g.cancel()
	var err error
	if g.list == nil {
		err = g.trans.Shutdown()
	} else {
		g.sayGoodbye()
		err = g.list.Shutdown()
	}
	g.wg.Wait()
	g.m.unregister()
	return fault.Wrap(err, "stop gossip", g.cfg.Name)
}

// sayGoodbye tells the others that this is no failure, as far as they listen.
func (g *Gossip) sayGoodbye() {
	g.mu.Lock()
	last := g.self
	last.Leaving = true
	meta, err := last.encode()
	g.mu.Unlock()
	if err == nil {
		g.meta.Store(&meta)
		err = g.list.UpdateNode(400 * time.Millisecond)
	}
	if lerr := g.list.Leave(time.Second); err != nil || lerr != nil {
		g.log.Debug("goodbye", "error", errors.Join(err, lerr))
	}
}

// Addr returns the bound address.
func (g *Gossip) Addr() string { return g.bound }

// Announce changes what this node says of itself. It returns at once; it may be called before Start and from any
// goroutine.
func (g *Gossip) Announce(a Announcement) {
	g.mu.Lock()
	defer g.mu.Unlock()
	next := g.self
	next.ClusterID, next.HasState = a.ClusterID, a.HasState
	if next == g.self {
		return
	}
	meta, err := next.encode()
	if err != nil { // a cluster id that is no UUID: the others are better off with what they know
		g.log.Error("announce", "error", err)
		return
	}
	g.self = next
	g.meta.Store(&meta)
	select {
	case g.wake <- struct{}{}:
	default:
	}
}

// Peers returns the newest boot of every other node that gossip knows, in order of node id. The slice is the caller's.
func (g *Gossip) Peers() []Peer {
	g.mu.Lock()
	defer g.mu.Unlock()
	newest := map[string]*Peer{}
	for _, p := range g.peers {
		old := newest[p.NodeID]
		if old == nil || p.Incarnation > old.Incarnation {
			newest[p.NodeID] = p
		}
	}
	out := make([]Peer, 0, len(newest))
	for _, p := range newest {
		out = append(out, *p)
	}
	slices.SortFunc(out, func(a, b Peer) int { return strings.Compare(a.NodeID, b.NodeID) })
	return out
}

// Changed returns a channel that is closed at the next change of Peers. Take it before Peers. Changes coalesce.
func (g *Gossip) Changed() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.changed
}

func (g *Gossip) announceLoop() {
	for {
		select {
		case <-g.ctx.Done():
			return
		case <-g.wake:
		}
		if err := g.list.UpdateNode(2 * time.Second); err != nil {
			g.log.Debug("announce", "error", err)
		}
	}
}

// How often the addresses of RetryJoin are tried: alone soon, in company seldom.
const (
	joinFirst = 200 * time.Millisecond
	joinMost  = 5 * time.Second
	joinAgain = 30 * time.Second
)

func (g *Gossip) joinLoop() {
	wait := joinFirst
	for {
		targets := g.targets()
		if len(targets) > 0 {
			n, err := g.list.Join(targets)
			if err != nil {
				g.log.Debug("join", "addresses", targets, "error", err)
			}
			if n == 0 {
				g.m.joinFailures.Inc()
			}
		}
		if g.list.NumMembers() > 1 || len(g.cfg.RetryJoin) == 0 {
			wait = joinAgain
		} else {
			wait = min(max(wait, joinFirst)*3/2, joinMost)
		}
		t := time.NewTimer(wait*3/4 + rand.N(wait/2)) // jitter: nodes that start together need not knock together
		select {
		case <-g.ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
	}
}

// targets looks RetryJoin up, without this node itself.
func (g *Gossip) targets() []string {
	self := ""
	if n := g.list.LocalNode(); n != nil {
		self = n.Address()
	}
	var out []string
	for _, address := range g.cfg.RetryJoin {
		host, port, err := net.SplitHostPort(address)
		if err != nil {
			g.log.Warn("retry_join: not host:port", "address", address)
			continue
		}
		ip, err := g.resolveOne(g.ctx, host)
		if err != nil {
			g.log.Debug("retry_join: look up", "address", address, "error", err)
			continue
		}
		if target := net.JoinHostPort(ip, port); target != self && !slices.Contains(out, target) {
			out = append(out, target)
		}
	}
	return out
}
