package transport

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// memWindow is how many bytes one direction holds before a writer waits: socket buffers of both ends together.
const memWindow = 4 << 20

// chunk is what one Write sent. held means that a cut stopped it; at is when it arrives.
type chunk struct {
	data []byte
	at   time.Time
	held bool
	fin  bool
}

// memPipe is one direction of a connection. Lock order: MemNetwork.mu, then memPipe.mu. Nobody waits under either.
type memPipe struct {
	net      *MemNetwork
	from, to string

	mu      sync.Mutex
	queue   []chunk
	size    int           // bytes in queue
	last    time.Time     // arrival of the newest chunk
	fin     bool          // the writer has closed
	gone    bool          // the reader has closed
	reset   bool          // aborted: both ends fail at once
	changed chan struct{} // closed on any change; nil while nobody waits
}

func newMemPipe(n *MemNetwork, from, to string) *memPipe { return &memPipe{net: n, from: from, to: to} }

// wait returns a channel that is closed at the next change. p.mu is held.
func (p *memPipe) wait() <-chan struct{} {
	if p.changed == nil {
		p.changed = make(chan struct{})
	}
	return p.changed
}

// wake tells everybody who waits. p.mu is held.
func (p *memPipe) wake() {
	if p.changed != nil {
		close(p.changed)
		p.changed = nil
	}
}

// topology applies a change of the link: a cut holds what has not arrived, a healed link delivers what was held.
func (p *memPipe) topology(up bool, delay time.Duration, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range p.queue {
		c := &p.queue[i]
		if !up && c.at.After(now) {
			c.held = true
		}
		if up && c.held { // all that precedes a held chunk has arrived, all that follows it is held: order is kept
			c.held, c.at = false, now.Add(delay)
			p.last = c.at
		}
	}
	p.wake()
}

// push queues data or a fin and returns how many bytes fitted. The link's state is read under the same lock under
// which Heal walks the pipes, so nothing can be held after the heal that should have freed it.
func (p *memPipe) push(b []byte, fin bool) (int, error) {
	p.net.mu.RLock()
	defer p.net.mu.RUnlock()
	up, delay := p.net.up(p.from, p.to), p.net.links[link{p.from, p.to}].wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.reset:
		return 0, syscall.ECONNRESET
	case p.fin:
		return 0, net.ErrClosed
	case p.gone && up:
		return 0, syscall.EPIPE
	case p.gone: // the news that the reader has closed has not come through
		p.fin = fin
		return len(b), nil
	}
	n := min(len(b), memWindow-p.size)
	if n == 0 && !fin {
		return 0, nil
	}
	c := chunk{at: time.Now().Add(delay), fin: fin, held: !up, data: append([]byte(nil), b[:n]...)}
	if c.at.Before(p.last) {
		c.at = p.last
	}
	p.last, p.fin = c.at, fin
	p.queue, p.size = append(p.queue, c), p.size+n
	p.wake()
	return n, nil
}

// pull copies what has arrived. With nothing there it returns the channel to wait on, and how long until the first
// chunk arrives if that is known.
func (p *memPipe) pull(b []byte) (n int, changed <-chan struct{}, in time.Duration, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.gone:
		return 0, nil, 0, net.ErrClosed
	case p.reset:
		return 0, nil, 0, syscall.ECONNRESET
	}
	for len(p.queue) > 0 && n < len(b) {
		c := &p.queue[0]
		if c.held {
			break
		}
		if in = time.Until(c.at); in > 0 {
			break
		}
		if c.fin {
			if n > 0 {
				break
			}
			return 0, nil, 0, io.EOF
		}
		k := copy(b[n:], c.data)
		n, c.data, p.size = n+k, c.data[k:], p.size-k
		if len(c.data) == 0 {
			p.queue = p.queue[1:]
		}
	}
	if n > 0 {
		p.wake()
		return n, nil, 0, nil
	}
	return 0, p.wait(), max(in, 0), nil
}

// leave is the reader's close: what is queued is dropped.
func (p *memPipe) leave() {
	p.net.mu.Lock()
	delete(p.net.pipes, p)
	p.net.mu.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gone, p.queue, p.size = true, nil, 0
	p.wake()
}

// abort makes both ends fail at once.
func (p *memPipe) abort() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reset, p.queue, p.size = true, nil, 0
	p.wake()
}

// memConn is one end of a connection.
type memConn struct {
	in, out       *memPipe
	local, remote memAddr
	peer          *memConn
	rd, wd        deadline
	once          sync.Once
}

var _ net.Conn = (*memConn)(nil)

func (c *memConn) init() {
	c.rd.cancel, c.wd.cancel = make(chan struct{}), make(chan struct{})
}

func (c *memConn) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	for {
		expired := c.rd.wait()
		select {
		case <-expired:
			return 0, c.opError("read", os.ErrDeadlineExceeded)
		default:
		}
		n, changed, in, err := c.in.pull(b)
		if errors.Is(err, io.EOF) {
			return 0, io.EOF
		}
		if err != nil {
			return 0, c.opError("read", err)
		}
		if n > 0 {
			return n, nil
		}
		var arrived <-chan time.Time
		if in > 0 {
			arrived = time.After(in)
		}
		select {
		case <-changed:
		case <-arrived:
		case <-expired:
		}
	}
}

func (c *memConn) Write(b []byte) (int, error) {
	var changed <-chan struct{}
	sent := 0
	for {
		expired := c.wd.wait()
		select {
		case <-expired:
			return sent, c.opError("write", os.ErrDeadlineExceeded)
		default:
		}
		n, err := c.out.push(b[sent:], false)
		sent += n
		if err != nil {
			return sent, c.opError("write", err)
		}
		if sent == len(b) {
			return sent, nil
		}
		if changed == nil { // asked for before the next push: room made in between must not be missed
			c.out.mu.Lock()
			changed = c.out.wait()
			c.out.mu.Unlock()
			continue
		}
		select {
		case <-changed:
		case <-expired:
		}
		changed = nil
	}
}

// Close sends what was written, then a fin, and forgets what was not read.
func (c *memConn) Close() error {
	c.once.Do(func() {
		_, _ = c.out.push(nil, true) // an error says that it is closed already
		c.in.leave()
		c.rd.set(time.Time{}) // no timer outlives the connection
		c.wd.set(time.Time{})
	})
	return nil
}

// abort resets the connection.
func (c *memConn) abort() {
	c.in.abort()
	c.out.abort()
	_ = c.Close()
	_ = c.peer.Close()
}

func (c *memConn) LocalAddr() net.Addr  { return c.local }
func (c *memConn) RemoteAddr() net.Addr { return c.remote }

func (c *memConn) SetDeadline(t time.Time) error {
	c.rd.set(t)
	c.wd.set(t)
	return nil
}

func (c *memConn) SetReadDeadline(t time.Time) error {
	c.rd.set(t)
	return nil
}

func (c *memConn) SetWriteDeadline(t time.Time) error {
	c.wd.set(t)
	return nil
}

func (c *memConn) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: "mem", Source: c.local, Addr: c.remote, Err: err}
}

// deadline is a point in time that can be moved while others wait for it, as in net.Pipe.
type deadline struct {
	mu     sync.Mutex
	timer  *time.Timer
	cancel chan struct{} // closed when the deadline has passed
}

func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil && !d.timer.Stop() {
		<-d.cancel // the timer has fired: its closing of cancel is done or about to be
	}
	d.timer = nil
	passed := false
	select {
	case <-d.cancel:
		passed = true
	default:
	}
	if t.IsZero() {
		if passed {
			d.cancel = make(chan struct{})
		}
		return
	}
	if left := time.Until(t); left > 0 {
		if passed {
			d.cancel = make(chan struct{})
		}
		cancel := d.cancel
		d.timer = time.AfterFunc(left, func() { close(cancel) })
		return
	}
	if !passed {
		close(d.cancel)
	}
}

func (d *deadline) wait() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.cancel
}
