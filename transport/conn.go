package transport

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"rollcall/node/fault"
	"rollcall/transport/pki"
)

// secureConn is a connection whose handshake is done, known to its Transport until it is closed.
type secureConn struct {
	*tls.Conn
	t    *Transport
	id   Identity // who is at the other end
	name string   // whom we expected, when we dialled; "" is anybody
	in   bool     // the peer dialled
	alpn string
	once sync.Once
}

var _ net.Conn = (*secureConn)(nil)

// Identity returns who is at the other end.
func (c *secureConn) Identity() Identity { return c.id }

// Close closes the socket without a farewell: tls.Conn.Close would wait up to 5 s to write its alert into a stalled
// connection, and both protocols above frame their messages, so a cut is never taken for an end.
func (c *secureConn) Close() error {
	var err error
	c.once.Do(func() {
		c.t.untrack(c)
		err = c.NetConn().Close()
	})
	return err
}

// Read reports a stream that this node itself has closed as ended: Raft's handler would log it as garbage otherwise.
func (c *secureConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n == 0 && errors.Is(err, net.ErrClosed) {
		err = io.EOF
	}
	return n, err
}

func (c *secureConn) labels() []string {
	direction, protocol := "out", "grpc"
	if c.in {
		direction = "in"
	}
	if c.alpn == alpnRaft {
		protocol = "raft"
	}
	return []string{direction, protocol}
}

// track makes the connection one that Close, CloseStreams and the recheck know of.
func (t *Transport) track(c *secureConn) (*secureConn, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed && !c.in || t.ctx.Err() != nil {
		return nil, fault.New(fault.Unavailable, "open connection", c.id.Name, "this node is shutting down")
	}
	t.conns[c] = struct{}{}
	if c.in {
		t.incoming++
	}
	t.met.conns.WithLabelValues(c.labels()...).Inc()
	return c, nil
}

func (t *Transport) untrack(c *secureConn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.conns[c]; !ok {
		return
	}
	delete(t.conns, c)
	if c.in {
		t.incoming--
	}
	t.met.conns.WithLabelValues(c.labels()...).Dec()
}

func (t *Transport) snapshot(match func(*secureConn) bool) []*secureConn {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []*secureConn
	for c := range t.conns {
		if match(c) {
			out = append(out, c)
		}
	}
	return out
}

func (t *Transport) closeConns(match func(*secureConn) bool) {
	for _, c := range t.snapshot(match) {
		_ = c.Close()
	}
}

// RaftPeers returns who is connected over Raft at this moment, once per connection, either direction. For the guard
// on Raft's consumer and for diagnosis.
func (t *Transport) RaftPeers() []Identity {
	conns := t.snapshot(func(c *secureConn) bool { return c.alpn == alpnRaft })
	out := make([]Identity, 0, len(conns))
	for _, c := range conns {
		out = append(out, c.id)
	}
	return out
}

// Recheck verifies the certificates behind the established connections against what is trusted now, asks Authorize
// again, and closes those that no longer pass. It runs by itself at Config.Recheck and after a change of the
// credentials; call it when a node has been removed.
func (t *Transport) Recheck() {
	m := t.trust()
	for _, c := range t.snapshot(func(*secureConn) bool { return true }) {
		if err := t.still(m, c); err != nil {
			t.met.recheck.Inc()
			t.log.Warn("connection closed: its peer is no longer accepted",
				"peer", c.id.String(), "serial", c.id.Serial, "error", err)
			_ = c.Close()
		}
	}
}

func (t *Transport) still(m *material, c *secureConn) error {
	cs := c.ConnectionState()
	if !c.in {
		_, err := m.recognise(cs, c.name)
		return err
	}
	if err := m.verify(cs.PeerCertificates, x509.ExtKeyUsageClientAuth); err != nil {
		return err
	}
	return t.permit(c.id, c.alpn)
}

// recognise decides about the peer that answered a dial: a node of a trusted authority, and the expected one.
func (m *material) recognise(cs tls.ConnectionState, name string) (Identity, error) {
	if err := m.verify(cs.PeerCertificates, x509.ExtKeyUsageServerAuth); err != nil {
		return Identity{}, err
	}
	id, err := pki.IdentityOf(cs.PeerCertificates[0])
	if err != nil {
		return Identity{}, err
	}
	if id.Role != RoleNode {
		return Identity{}, fault.New(fault.Denied, "recognise peer", id.String(), "role %q does not answer calls", id.Role)
	}
	if name != "" && id.Name != name {
		return Identity{}, fault.New(fault.Denied, "recognise peer", id.String(), "node %s was expected at this address", name)
	}
	return id, nil
}

// rotated is called when the credentials have changed.
func (t *Transport) rotated() {
	select {
	case t.recheckCh <- struct{}{}:
	default:
	}
}

// watch rechecks now and then, and after each change of the credentials. Raft streams are opened anew after a change,
// because nothing else would ever make them use the new certificate; Raft retries what that interrupts. gRPC
// connections reach their maximum age.
func (t *Transport) watch() {
	tick := time.NewTicker(t.cfg.Recheck)
	defer tick.Stop()
	for {
		select {
		case <-t.ctx.Done():
			return
		case <-t.recheckCh:
			t.met.rotations.Inc()
			id := t.Identity()
			t.log.Info("credentials changed", "serial", id.Serial, "not_after", id.NotAfter)
			t.CloseStreams()
			t.Recheck()
		case <-tick.C:
			t.Recheck()
			if left := time.Until(t.Identity().NotAfter); left < 24*time.Hour {
				t.quiet.warn(t.log, "this node's certificate ends soon; issue a new one with: rollcall tls cert",
					"in", left.Round(time.Second))
			}
		}
	}
}

// queue hands connections from the listener to a protocol; it is the protocol's net.Listener.
type queue struct {
	ch   chan net.Conn
	done chan struct{}
	once sync.Once
}

func newQueue() *queue { return &queue{ch: make(chan net.Conn), done: make(chan struct{})} }

// put waits until the protocol takes conn. It returns false when the protocol has closed or expired fires.
func (q *queue) put(conn net.Conn, expired <-chan time.Time) bool {
	select {
	case q.ch <- conn:
		return true
	case <-q.done:
	case <-expired:
	}
	return false
}

func (q *queue) accept() (net.Conn, error) {
	select {
	case <-q.done:
		return nil, net.ErrClosed
	default:
	}
	select {
	case c := <-q.ch:
		return c, nil
	case <-q.done:
		return nil, net.ErrClosed
	}
}

func (q *queue) close() { q.once.Do(func() { close(q.done) }) }

// Accept, Close and Addr make the queue the listener that grpc.Server serves.
func (q *queue) Accept() (net.Conn, error) { return q.accept() }

// Close stops Accept.
func (q *queue) Close() error {
	q.close()
	return nil
}

// Addr names the queue; nobody dials it.
func (q *queue) Addr() net.Addr { return memAddr("cluster port") }
