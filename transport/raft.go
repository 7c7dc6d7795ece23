package transport

import (
	"context"
	"net"
	"time"

	"github.com/hashicorp/raft"

	"rollcall/node/fault"
)

// raftLayer is the raft.StreamLayer of the cluster port.
type raftLayer struct {
	t     *Transport
	queue *queue
}

var _ raft.StreamLayer = (*raftLayer)(nil)

// Accept returns the next Raft stream of an admitted node.
func (r *raftLayer) Accept() (net.Conn, error) { return r.queue.accept() }

// Close ends every Raft stream, and refuses those that come and those that are dialled from now on.
func (r *raftLayer) Close() error {
	r.queue.close()
	r.t.CloseStreams()
	return nil
}

// Addr is the address that goes into Raft's messages: the advertised one.
func (r *raftLayer) Addr() net.Addr { return advertised(r.t.advertise) }

type advertised string

func (advertised) Network() string  { return "tcp" }
func (a advertised) String() string { return string(a) }

// Dial opens a Raft stream to the node at address, whose certificate must carry the name that NameOf knows for it.
// Raft calls it from its replication goroutines.
func (r *raftLayer) Dial(address raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	if err := r.open(string(address)); err != nil {
		return nil, err
	}
	if timeout <= 0 {
		timeout = r.t.cfg.HandshakeTimeout
	}
	ctx, cancel := context.WithTimeout(r.t.ctx, timeout)
	defer cancel()
	conn, err := r.t.dial(ctx, string(address), (*r.t.nameOf.Load())(address), alpnRaft)
	if err != nil {
		return nil, err
	}
	// Asked again: Refuse and Close close the streams that they see, and this one may have been too young.
	if err := r.open(string(address)); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return conn, nil
}

func (r *raftLayer) open(addr string) error {
	select {
	case <-r.queue.done:
		return fault.New(fault.Unavailable, "dial raft peer", addr, "the raft transport is closed")
	default:
	}
	if r.t.refused.Load() {
		return fault.New(fault.Unavailable, "dial raft peer", addr,
			"this node's raft streams are held back: its disk does not answer")
	}
	return nil
}

// Refuse holds back new Raft dials of this node (true) or lets them go again. With CloseStreams it is how a leader
// whose disk hangs stops looking alive: its heartbeats would go on for ever otherwise (hashicorp/raft #503). What
// peers dial is still accepted, so that the node learns of the next leader.
func (t *Transport) Refuse(on bool) { t.refused.Store(on) }

// CloseStreams closes every Raft stream, both directions, at once. Peers, and this node unless Refuse holds it back,
// open new ones when they next have something to say.
func (t *Transport) CloseStreams() {
	t.closeConns(func(c *secureConn) bool { return c.alpn == alpnRaft })
}
