package transport

import (
	"context"
	"fmt"
	"net"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// MemNetwork is a network in one process, between named hosts ("node-1:7001"). It behaves like TCP where that matters
// to what is built on it: bytes arrive in order or not at all; a cut makes established connections stall and dials
// wait, without a reset, and what was sent meanwhile arrives after the cut is healed; a dial to a port where nobody
// listens is refused. No goroutine of it runs, and none waits while it holds a mutex, so it can be used under
// testing/synctest (create it inside the bubble). Safe for concurrent use.
type MemNetwork struct {
	mu       sync.RWMutex
	hosts    map[string]*memHost
	links    map[link]linkState
	isolated map[string]bool
	pipes    map[*memPipe]struct{}
	changed  chan struct{} // closed and replaced when the topology changes
}

// link is one direction between two hosts.
type link struct{ from, to string }

type linkState struct {
	cut     bool
	delay   time.Duration
	disturb func() time.Duration
}

// wait is how long what is sent now takes. The mutex of the network is held.
func (s linkState) wait() time.Duration {
	if s.disturb == nil {
		return s.delay
	}
	return s.delay + s.disturb()
}

type memHost struct {
	listeners map[int]*memListener
	nextPort  int
	boot      int // counts Kill: views of an earlier boot are dead
}

// synTimeout ends a dial whose context has no deadline, as a kernel would.
const synTimeout = 2 * time.Minute

// NewMemNetwork returns a network without hosts and without faults.
func NewMemNetwork() *MemNetwork {
	return &MemNetwork{
		hosts: make(map[string]*memHost), links: make(map[link]linkState), isolated: make(map[string]bool),
		pipes: make(map[*memPipe]struct{}), changed: make(chan struct{}),
	}
}

// Host returns the network as the named host sees it, and makes the name resolvable. Calling it again returns the
// same host's view.
func (n *MemNetwork) Host(name string) Network {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.hosts[name] == nil {
		n.hosts[name] = &memHost{listeners: make(map[int]*memListener), nextPort: 40000}
	}
	return &hostView{net: n, name: name, boot: n.hosts[name].boot}
}

// Kill ends what runs on host, as the kernel of a killed process does: its ports are free, every connection is reset,
// and what Host has handed out before can neither listen nor dial any more.
func (n *MemNetwork) Kill(host string) {
	n.CloseConns(host)
	var old []*memListener
	n.change(func() {
		if h := n.hosts[host]; h != nil {
			h.boot++
			for _, l := range h.listeners {
				old = append(old, l)
			}
		}
	})
	for _, l := range old {
		_ = l.Close()
	}
}

// Cut stops all traffic between a and b, both ways, until Heal.
func (n *MemNetwork) Cut(a, b string) {
	n.change(func() { n.setCut(a, b, true); n.setCut(b, a, true) })
}

// CutOneWay stops what a sends to b; b can still send to a.
func (n *MemNetwork) CutOneWay(a, b string) { n.change(func() { n.setCut(a, b, true) }) }

// Heal ends the cuts between a and b, both ways. It does not end the isolation of either.
func (n *MemNetwork) Heal(a, b string) {
	n.change(func() { n.setCut(a, b, false); n.setCut(b, a, false) })
}

// HealOneWay ends a cut of what a sends to b.
func (n *MemNetwork) HealOneWay(a, b string) { n.change(func() { n.setCut(a, b, false) }) }

// Isolate cuts host off from every other host, those that are added later too, until Rejoin or HealAll. It still
// reaches itself.
func (n *MemNetwork) Isolate(host string) { n.change(func() { n.isolated[host] = true }) }

// Rejoin ends the isolation of host. Cuts between pairs stay.
func (n *MemNetwork) Rejoin(host string) { n.change(func() { delete(n.isolated, host) }) }

// HealAll ends every cut and every isolation. Delays stay.
func (n *MemNetwork) HealAll() {
	n.change(func() {
		clear(n.isolated)
		for l, s := range n.links {
			s.cut = false
			n.links[l] = s
		}
	})
}

// Delay makes every byte between a and b take d, each way. Bytes under way keep their time of arrival.
func (n *MemNetwork) Delay(a, b string, d time.Duration) {
	n.DelayOneWay(a, b, d)
	n.DelayOneWay(b, a, d)
}

// DelayOneWay makes every byte from a to b take d.
func (n *MemNetwork) DelayOneWay(a, b string, d time.Duration) {
	n.change(func() {
		s := n.links[link{a, b}]
		s.delay = d
		n.links[link{a, b}] = s
	})
}

// Disturb makes every write from a to b take as long as f says, besides the delay: jitter, or the time that a lost packet
// takes to be sent again. f is called from many goroutines, one at a time, and must be quick; nil ends it. What is sent
// on one connection stays in order.
func (n *MemNetwork) Disturb(a, b string, f func() time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	s := n.links[link{a, b}]
	s.disturb = nil
	if f != nil {
		var one sync.Mutex
		s.disturb = func() time.Duration { one.Lock(); defer one.Unlock(); return f() }
	}
	n.links[link{a, b}] = s
}

// CloseConns resets every connection of host, as the kernel of a killed process does. What is in flight is lost.
func (n *MemNetwork) CloseConns(host string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for p := range n.pipes {
		if p.from == host || p.to == host {
			p.abort()
		}
	}
}

// Conns returns how many connections host has open, either end.
func (n *MemNetwork) Conns(host string) int {
	n.mu.RLock()
	defer n.mu.RUnlock()
	count := 0
	for p := range n.pipes {
		if p.to == host {
			count++
		}
	}
	return count
}

func (n *MemNetwork) setCut(from, to string, cut bool) {
	s := n.links[link{from, to}]
	s.cut = cut
	n.links[link{from, to}] = s
}

// change applies f to the topology and tells every pipe and every waiting dial.
func (n *MemNetwork) change(f func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f()
	now := time.Now()
	for p := range n.pipes {
		p.topology(n.up(p.from, p.to), n.links[link{p.from, p.to}].delay, now)
	}
	close(n.changed)
	n.changed = make(chan struct{})
}

// up says whether bytes get from one host to another. n.mu is held.
func (n *MemNetwork) up(from, to string) bool {
	if from == to {
		return true
	}
	return !n.links[link{from, to}].cut && !n.isolated[from] && !n.isolated[to]
}

type hostView struct {
	net  *MemNetwork
	name string
	boot int
}

// dead is true once the host was killed. n.mu is held.
func (h *hostView) dead() bool { return h.net.hosts[h.name].boot != h.boot }

var _ Network = (*hostView)(nil)

// memAddr is "host:port".
type memAddr string

func (memAddr) Network() string  { return "mem" }
func (a memAddr) String() string { return string(a) }

// Listen binds a port of the host. The host part of addr may be empty, a wildcard or the host's own name.
func (h *hostView) Listen(addr string) (net.Listener, error) {
	name, portText, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	port, err := strconv.Atoi(portText)
	if err != nil || port < 0 || port > 65535 {
		return nil, &net.AddrError{Err: "invalid port", Addr: addr}
	}
	if name != "" && name != "0.0.0.0" && name != "::" && name != h.name {
		return nil, h.opError("listen", addr, syscall.EADDRNOTAVAIL)
	}
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	host := h.net.hosts[h.name]
	if h.dead() {
		return nil, h.opError("listen", addr, syscall.ENETDOWN)
	}
	if port == 0 {
		port = host.ephemeral()
	}
	if host.listeners[port] != nil {
		return nil, h.opError("listen", addr, syscall.EADDRINUSE)
	}
	l := &memListener{
		host: h, port: port, addr: memAddr(net.JoinHostPort(h.name, strconv.Itoa(port))),
		backlog: make(chan *memConn, 512), done: make(chan struct{}),
	}
	host.listeners[port] = l
	return l, nil
}

// ephemeral returns a port that nobody listens on. n.mu is held.
func (m *memHost) ephemeral() int {
	for {
		m.nextPort++
		if m.nextPort > 65535 {
			m.nextPort = 40000
		}
		if m.listeners[m.nextPort] == nil {
			return m.nextPort
		}
	}
}

// Dial connects to addr. It waits while the way there or back is cut.
func (h *hostView) Dial(ctx context.Context, addr string) (net.Conn, error) {
	name, portText, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	port, err := strconv.Atoi(portText)
	if err != nil {
		return nil, &net.AddrError{Err: "invalid port", Addr: addr}
	}
	ctx, cancel := context.WithTimeout(ctx, synTimeout)
	defer cancel()
	if err := h.reach(ctx, name, addr); err != nil {
		return nil, err
	}
	l, conn, err := h.open(name, port, addr)
	if err != nil {
		return nil, err
	}
	select {
	case l.backlog <- conn.peer:
		select {
		case <-l.done: // closed meanwhile: nobody will accept it
			conn.abort()
			return nil, h.opError("dial", addr, syscall.ECONNREFUSED)
		default:
			return conn, nil
		}
	case <-l.done:
		conn.abort()
		return nil, h.opError("dial", addr, syscall.ECONNREFUSED)
	case <-ctx.Done():
		conn.abort()
		return nil, h.opError("dial", addr, os.ErrDeadlineExceeded)
	}
}

// reach waits for one round trip to the host with both ways open.
func (h *hostView) reach(ctx context.Context, name, addr string) error {
	for {
		h.net.mu.RLock()
		known := h.net.hosts[name] != nil
		up := h.net.up(h.name, name) && h.net.up(name, h.name)
		rtt := h.net.links[link{h.name, name}].wait() + h.net.links[link{name, h.name}].wait()
		changed, dead := h.net.changed, h.dead()
		h.net.mu.RUnlock()
		if dead {
			return h.opError("dial", addr, syscall.ENETDOWN)
		}
		if !known {
			return &net.DNSError{Err: "no such host", Name: name, IsNotFound: true}
		}
		if up && rtt == 0 {
			return nil
		}
		var arrived <-chan time.Time
		if up {
			arrived = time.After(rtt)
		}
		select {
		case <-arrived:
			return nil
		case <-changed:
		case <-ctx.Done():
			return h.opError("dial", addr, os.ErrDeadlineExceeded)
		}
	}
}

func (h *hostView) open(name string, port int, addr string) (*memListener, *memConn, error) {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	l := h.net.hosts[name].listeners[port]
	if l == nil || h.dead() {
		return nil, nil, h.opError("dial", addr, syscall.ECONNREFUSED)
	}
	there, back := newMemPipe(h.net, h.name, name), newMemPipe(h.net, name, h.name)
	h.net.pipes[there], h.net.pipes[back] = struct{}{}, struct{}{}
	src := memAddr(net.JoinHostPort(h.name, strconv.Itoa(h.net.hosts[h.name].ephemeral())))
	conn := &memConn{in: back, out: there, local: src, remote: l.addr}
	conn.peer = &memConn{in: there, out: back, local: l.addr, remote: src}
	conn.peer.peer = conn
	conn.init()
	conn.peer.init()
	return l, conn, nil
}

func (h *hostView) opError(op, addr string, err error) error {
	return &net.OpError{Op: op, Net: "mem", Source: memAddr(h.name), Addr: memAddr(addr), Err: err}
}

type memListener struct {
	host    *hostView
	port    int
	addr    memAddr
	backlog chan *memConn
	done    chan struct{}
	once    sync.Once
}

var _ net.Listener = (*memListener)(nil)

func (l *memListener) Accept() (net.Conn, error) {
	select {
	case <-l.done:
	default:
		select {
		case c := <-l.backlog:
			return c, nil
		case <-l.done:
		}
	}
	return nil, fmt.Errorf("accept on %s: %w", l.addr, net.ErrClosed)
}

// Close frees the port and resets what nobody accepted.
func (l *memListener) Close() error {
	l.once.Do(func() {
		n := l.host.net
		n.mu.Lock()
		if at := n.hosts[l.host.name].listeners; at[l.port] == l {
			delete(at, l.port)
		}
		n.mu.Unlock()
		close(l.done)
		for {
			select {
			case c := <-l.backlog:
				c.abort()
			default:
				return
			}
		}
	})
	return nil
}

func (l *memListener) Addr() net.Addr { return l.addr }
