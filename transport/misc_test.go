package transport

import (
	"net"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

type raftAddr = raft.ServerAddress

func newRegistry() *prometheus.Registry { return prometheus.NewRegistry() }

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// readCounter counts what reached the reader of Raft streams.
type readCounter struct {
	mu sync.Mutex
	n  int
}

func (r *readCounter) add(n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.n += n
}

func (r *readCounter) bytes() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.n
}

// acceptCounting answers Raft streams with an echo and counts what arrives.
func acceptCounting(t testing.TB, n *node, read *readCounter) {
	t.Helper()
	layer := n.Raft()
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := layer.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { pumpCounting(c, read) })
		}
	})
	t.Cleanup(func() {
		_ = layer.Close()
		wg.Wait()
	})
}

func pumpCounting(c net.Conn, read *readCounter) {
	defer c.Close()
	b := make([]byte, 32<<10)
	for {
		n, err := c.Read(b)
		read.add(n)
		if err != nil {
			return
		}
		if _, err := c.Write(b[:n]); err != nil {
			return
		}
	}
}

// realClock measures real time inside a synctest bubble, where time.Now is virtual.
func realClock() func() time.Duration {
	now := func() time.Duration {
		var ts unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
			return 0
		}
		return time.Duration(ts.Nano())
	}
	start := now()
	return func() time.Duration { return (now() - start).Round(time.Millisecond) }
}
