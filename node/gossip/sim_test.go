package gossip

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/memberlist"
	"github.com/prometheus/client_golang/prometheus"
)

// simNet is a packet network in memory: a packet to a full or absent host is lost, as UDP's would be, and no goroutine
// runs, so it lives under testing/synctest. memberlist's own MockNetwork blocks the sender instead.
type simNet struct {
	mu    sync.Mutex
	hosts map[string]*simTransport
	cut   map[string]bool
}

func newSimNet() *simNet { return &simNet{hosts: map[string]*simTransport{}, cut: map[string]bool{}} }

func (n *simNet) host(ip string) *simTransport {
	t := &simTransport{net: n, ip: ip, packets: make(chan *memberlist.Packet, 1024), streams: make(chan net.Conn, 64)}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.hosts[t.addr()] = t
	return t
}

func (n *simNet) setCut(ip string, cut bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cut[ip] = cut
}

// find returns who answers at addr, or nil. n.mu is held.
func (n *simNet) find(from *simTransport, addr string) *simTransport {
	to := n.hosts[addr]
	if to == nil || to.down || n.cut[from.ip] != n.cut[to.ip] && (n.cut[from.ip] || n.cut[to.ip]) {
		return nil
	}
	return to
}

type simTransport struct {
	net     *simNet
	ip      string
	packets chan *memberlist.Packet
	streams chan net.Conn
	down    bool
}

var _ memberlist.Transport = (*simTransport)(nil)

func (t *simTransport) addr() string { return t.ip + ":8202" }

func (t *simTransport) udp() net.Addr { return &net.UDPAddr{IP: net.ParseIP(t.ip), Port: 8202} }

func (t *simTransport) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return net.ParseIP(t.ip), 8202, nil
}

func (t *simTransport) WriteTo(b []byte, addr string) (time.Time, error) {
	now := time.Now()
	t.net.mu.Lock()
	defer t.net.mu.Unlock()
	if to := t.net.find(t, addr); to != nil {
		select {
		case to.packets <- &memberlist.Packet{Buf: append([]byte(nil), b...), From: t.udp(), Timestamp: now}:
		default:
		}
	}
	return now, nil
}

func (t *simTransport) PacketCh() <-chan *memberlist.Packet { return t.packets }

func (t *simTransport) DialTimeout(addr string, _ time.Duration) (net.Conn, error) {
	t.net.mu.Lock()
	defer t.net.mu.Unlock()
	to := t.net.find(t, addr)
	if to == nil {
		return nil, fmt.Errorf("no route to %s", addr)
	}
	a, b := net.Pipe()
	select {
	case to.streams <- &simConn{b, t.udp()}:
		return &simConn{a, to.udp()}, nil
	default:
		return nil, fmt.Errorf("%s is busy", addr)
	}
}

func (t *simTransport) StreamCh() <-chan net.Conn { return t.streams }

func (t *simTransport) Shutdown() error {
	t.net.mu.Lock()
	defer t.net.mu.Unlock()
	t.down = true
	for len(t.streams) > 0 { // nobody accepts them any more
		_ = (<-t.streams).Close()
	}
	if t.net.hosts[t.addr()] == t {
		delete(t.net.hosts, t.addr())
	}
	return nil
}

type simConn struct {
	net.Conn
	remote net.Addr
}

func (c *simConn) RemoteAddr() net.Addr { return c.remote }

var testKey = []byte("0123456789abcdef0123456789abcdef")

func testConfig(i int) Config {
	logger := slog.New(slog.DiscardHandler)
	if os.Getenv("GOSSIP_LOG") != "" {
		logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})).With("on", i)
	}
	return Config{
		NodeID: uuid.NewSHA1(uuid.Nil, []byte(strconv.Itoa(i))).String(), Incarnation: 1, Name: fmt.Sprintf("n%d", i),
		ClusterAddress: fmt.Sprintf("n%d:8201", i), SecretKey: testKey, BootstrapExpect: 3,
		RetryJoin: []string{"10.0.0.1:8202", "10.0.0.2:8202", "10.0.0.3:8202"}, Logger: logger, Metrics: prometheus.NewRegistry(),
	}
}

func (n *simNet) start(t testing.TB, i int, edit ...func(*Config)) *Gossip {
	t.Helper()
	cfg := testConfig(i)
	cfg.Transport = n.host(fmt.Sprintf("10.0.0.%d", i))
	for _, f := range edit {
		f(&cfg)
	}
	g, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return g
}

// stopInBubble stops them and gives memberlist virtual time: its Shutdown does not wait for probes under way.
func stopInBubble(t testing.TB, all ...*Gossip) {
	t.Helper()
	stopAll(t, all...)
	time.Sleep(time.Minute)
}

func stopAll(t testing.TB, all ...*Gossip) {
	t.Helper()
	var wg sync.WaitGroup
	for _, g := range all {
		wg.Go(func() {
			if err := g.Stop(context.Background()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

func alive(g *Gossip) (n int) {
	for _, p := range g.Peers() {
		if p.Status == Alive {
			n++
		}
	}
	return n
}
