package replica

import (
	"errors"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

var errDiskHangs = errors.New("this node's disk does not answer: it stays out of the cluster until it does")

// gatedStream is the stream layer with a gate. While the disk hangs, no connection is made and none lives on: then this
// node can neither keep its followers quiet nor stand for election, and the others go on without it. Closing
// raft.NetworkTransport is not enough for that: it would still dial.
type gatedStream struct {
	raft.StreamLayer

	mu     sync.Mutex
	shut   bool
	closed bool
	conns  map[*trackedConn]struct{}
}

var _ raft.StreamLayer = (*gatedStream)(nil)

func newGatedStream(inner raft.StreamLayer) *gatedStream {
	return &gatedStream{StreamLayer: inner, conns: map[*trackedConn]struct{}{}}
}

// Dial is raft.StreamLayer's.
func (s *gatedStream) Dial(address raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	if s.isShut() {
		return nil, errDiskHangs
	}
	conn, err := s.StreamLayer.Dial(address, timeout)
	if err != nil {
		return nil, err
	}
	return s.track(conn, true)
}

// Accept is net.Listener's. While the gate is shut, connections are still accepted: the transport's loop must go on.
func (s *gatedStream) Accept() (net.Conn, error) {
	conn, err := s.StreamLayer.Accept()
	if err != nil {
		return nil, err
	}
	return s.track(conn, false)
}

// Close closes the listener and every connection, so that no handler outlives the replica.
func (s *gatedStream) Close() error {
	err := s.StreamLayer.Close()
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cut()
	return err
}

// setShut shuts or opens the gate; shutting cuts every connection.
func (s *gatedStream) setShut(shut bool) {
	s.mu.Lock()
	s.shut = shut
	s.mu.Unlock()
	if shut {
		s.cut()
	}
}

func (s *gatedStream) isShut() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.shut
}

func (s *gatedStream) cut() {
	s.mu.Lock()
	conns := make([]*trackedConn, 0, len(s.conns))
	for c := range s.conns {
		conns = append(conns, c)
	}
	s.mu.Unlock()
	for _, c := range conns {
		_ = c.Close()
	}
}

func (s *gatedStream) track(conn net.Conn, dialed bool) (net.Conn, error) {
	c := &trackedConn{Conn: conn, owner: s}
	s.mu.Lock()
	refuse := s.closed || dialed && s.shut
	if !refuse {
		s.conns[c] = struct{}{}
	}
	s.mu.Unlock()
	if refuse {
		_ = conn.Close()
		return nil, net.ErrClosed
	}
	return c, nil
}

type trackedConn struct {
	net.Conn
	owner *gatedStream
}

// Close is net.Conn's.
func (c *trackedConn) Close() error {
	c.owner.mu.Lock()
	delete(c.owner.conns, c)
	c.owner.mu.Unlock()
	return c.Conn.Close()
}
