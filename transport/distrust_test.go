package transport

import (
	"bytes"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"
)

// lines collects what is logged.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// A node with another authority's certificates finds the others by gossip and can talk to none of them. gRPC tells its
// callers only that nobody answers, so the log must say why.
func TestANodeOfAnotherAuthoritySaysWhomItDoesNotTrust(t *testing.T) {
	log := &lines{}
	peer := newNode(t, TCP(), newCA(t), "node-1", "127.0.0.1:0")
	stranger := newNode(t, TCP(), newCA(t), "node-2", "127.0.0.1:0", func(c *Config) {
		c.Logger = slog.New(slog.NewTextHandler(log, nil))
	})
	conn, err := stranger.Client(peer.Addr(), "node-1")
	if err != nil {
		t.Fatal(err)
	}
	conn.Connect()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		text := log.String()
		if strings.Contains(text, "not trusted") && strings.Contains(text, "authority") && strings.Contains(text, "node-1") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("it logged %q", text)
		}
	}
}
