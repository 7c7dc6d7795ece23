package transport

import (
	"fmt"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// BenchmarkRaftCommit compares three in-memory replicas over the cluster port (TLS 1.3, ALPN) with the same over
// plain TCP: the price of authentication per commit.
func BenchmarkRaftCommit(b *testing.B) {
	b.Run("tls", func(b *testing.B) {
		members := cluster(b, 3, func(string) (Network, string) { return TCP(), "127.0.0.1:0" })
		benchCommits(b, members)
	})
	b.Run("plain", func(b *testing.B) {
		var layers []plainLayer
		var servers []raft.Server
		for i := range 3 {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			layers = append(layers, plainLayer{ln})
			servers = append(servers, raft.Server{ID: raft.ServerID(fmt.Sprint(i)), Address: raft.ServerAddress(ln.Addr().String())})
		}
		var members []*member
		for i, l := range layers {
			m := startRaft(b, string(servers[i].ID), l, servers)
			members = append(members, m)
			b.Cleanup(m.close)
		}
		benchCommits(b, members)
	})
}

// plainLayer is TCP without anything, with the same settings of raft's transport.
type plainLayer struct{ net.Listener }

func (plainLayer) Dial(addr raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	return net.DialTimeout("tcp", string(addr), timeout)
}

func benchCommits(b *testing.B, members []*member) {
	lead := leader(b, members)
	data := make([]byte, 256)
	for _, writers := range []int{1, 64} {
		b.Run(fmt.Sprintf("writers=%d", writers), func(b *testing.B) {
			var failed atomic.Int64
			b.SetParallelism(writers)
			start := time.Now()
			b.ResetTimer()
			if writers == 1 {
				for range b.N {
					if lead.raft.Apply(data, 5*time.Second).Error() != nil {
						failed.Add(1)
					}
				}
			} else {
				b.RunParallel(func(pb *testing.PB) {
					for pb.Next() {
						if lead.raft.Apply(data, 5*time.Second).Error() != nil {
							failed.Add(1)
						}
					}
				})
			}
			b.ReportMetric(float64(b.N)/time.Since(start).Seconds(), "commits/s")
			if failed.Load() > 0 {
				b.Errorf("%d of %d failed", failed.Load(), b.N)
			}
		})
	}
}

// BenchmarkHandshake is one mutual TLS 1.3 handshake, both ends.
func BenchmarkHandshake(b *testing.B) {
	ca := newCA(b)
	x := newNode(b, TCP(), ca, "a", "127.0.0.1:0")
	y := newNode(b, TCP(), ca, "b", "127.0.0.1:0")
	acceptCounting(b, y, &readCounter{})
	b.ResetTimer()
	for range b.N {
		c, err := x.Raft().Dial(raftAddr(y.Addr()), 5*time.Second)
		if err != nil {
			b.Fatal(err)
		}
		_ = c.Close()
	}
}

// BenchmarkCall is one unary call to a peer.
func BenchmarkCall(b *testing.B) {
	ca := newCA(b)
	x := newNode(b, TCP(), ca, "a", "127.0.0.1:0")
	y := newNode(b, TCP(), ca, "b", "127.0.0.1:0")
	b.ResetTimer()
	for range b.N {
		if _, err := x.say(b.Context(), y.Addr(), "b", "hello"); err != nil {
			b.Fatal(err)
		}
	}
}
