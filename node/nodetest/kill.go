package nodetest

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"rollcall/node/fault"
	"rollcall/transport"
)

// KillNode ends node i as SIGKILL ends its process: from its return on, nobody hears anything of the node any more, on
// either port, and its plugins are dead. What is left of it in this process is cleared away beside the caller; gone is
// closed when that is done, and only then may StartNode start it again, from the same directory. Any goroutine may call
// it, also one of the node's own. Only nodes on the network that Start gives them can be killed.
func (c *Cluster) KillNode(i int, why string) (gone <-chan struct{}) {
	c.t.Helper()
	n := c.Node(i)
	w := c.wires[n.Name()]
	if w == nil {
		c.t.Fatalf("%s has a network of its own, and cannot be cut off", n.Name())
	}
	w.cut()
	c.mu.Lock()
	c.faults[i] = c.Record.Fault("kill", n.Name(), why)
	c.mu.Unlock()
	c.killPlugins(n.Name())
	done := make(chan struct{})
	go func() {
		defer close(done)
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := c.Local.StopNode(ctx, i); err != nil {
			c.t.Logf("clear away what is left of %s: %v", n.Name(), err) // it may have been ended in the middle of anything
		}
		c.killPlugins(n.Name())
	}()
	for c.Node(i) == n { // from here on it is not among Nodes, and leads nobody
		time.Sleep(time.Millisecond)
	}
	return done
}

// killPlugins sends SIGKILL to the node's plugin processes: the kernel does so when a node's process dies.
func (c *Cluster) killPlugins(name string) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		env, err := readSome(filepath.Join(d, "environ"))
		if err != nil || !strings.Contains(env, "ROLLCALL_NODE="+name+"\x00") || !strings.Contains(env, c.dir) {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(d)); err == nil && pid != os.Getpid() {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}

// wire is the network of one node, TCP until it is cut.
type wire struct {
	mu    sync.Mutex
	dead  bool
	conns map[net.Conn]struct{}
	ports map[net.Listener]struct{}
}

var _ transport.Network = (*wire)(nil)

func newWire() *wire {
	return &wire{conns: map[net.Conn]struct{}{}, ports: map[net.Listener]struct{}{}}
}

var errDead = fault.Text(fault.Unavailable, "this node was killed")

// cut ends every connection and listener at once, and refuses new ones until mend.
func (w *wire) cut() {
	w.mu.Lock()
	w.dead = true
	conns, ports := w.conns, w.ports
	w.conns, w.ports = map[net.Conn]struct{}{}, map[net.Listener]struct{}{}
	w.mu.Unlock()
	for l := range ports {
		_ = l.Close()
	}
	for c := range conns {
		_ = c.Close()
	}
}

func (w *wire) mend() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.dead = false
}

// Listen is transport.Network's.
func (w *wire) Listen(addr string) (net.Listener, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.dead {
		return nil, errDead
	}
	l, err := transport.TCP().Listen(addr)
	if err != nil {
		return nil, err
	}
	w.ports[l] = struct{}{}
	return &wireListener{Listener: l, w: w}, nil
}

// Dial is transport.Network's.
func (w *wire) Dial(ctx context.Context, addr string) (net.Conn, error) {
	conn, err := transport.TCP().Dial(ctx, addr)
	if err != nil {
		return nil, err
	}
	return w.keep(conn)
}

// keep lets a connection be cut.
func (w *wire) keep(conn net.Conn) (net.Conn, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.dead {
		_ = conn.Close()
		return nil, errDead
	}
	w.conns[conn] = struct{}{}
	return &wireConn{Conn: conn, w: w}, nil
}

type wireListener struct {
	net.Listener
	w *wire
}

// Accept is net.Listener's. A connection that comes while the node is being cut is closed.
func (l *wireListener) Accept() (net.Conn, error) {
	for {
		raw, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if conn, err := l.w.keep(raw); err == nil {
			return conn, nil
		}
	}
}

type wireConn struct {
	net.Conn
	w *wire
}

// Close is net.Conn's.
func (c *wireConn) Close() error {
	c.w.mu.Lock()
	delete(c.w.conns, c.Conn)
	c.w.mu.Unlock()
	return c.Conn.Close()
}
