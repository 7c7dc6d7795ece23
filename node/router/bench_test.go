package router

import (
	"context"
	"testing"
	"time"

	pluginpb "rollcall/proto/plugin"
)

// PLUGINHOST section 3 sets the goal: 16 to 30 ns for the way through an open gate.
func BenchmarkGate(b *testing.B) {
	g := newGate(1)
	in := newInstance(nil, nil, Role{}, nil, newLife())
	g.set(open, nil, in, in)
	w := wish{lane: readLane, limit: time.Second}
	ctx := context.Background()
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			in, _, err := g.enter(ctx, w)
			if err != nil {
				b.Error(err)
				return
			}
			in.release()
		}
	})
}

// nop is a plugin that costs nothing.
type nop struct{ *fake }

func (nop) HandleRequest(context.Context, *pluginpb.Request) (*pluginpb.Response, error) {
	return nil, nil
}

func BenchmarkDirect(b *testing.B) {
	n := nop{newFake("a")}
	ctx, req := context.Background(), &pluginpb.Request{}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Backend(n).HandleRequest(ctx, req); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRouted(b *testing.B) {
	for _, op := range []string{opRead, opUpdate} {
		b.Run(op, func(b *testing.B) {
			c := newCluster(b, 1, nil)
			m := c.mount("kv/", nil)
			c.nodes[0].up(b, m, nop{newFake("a")})
			req := &Request{ID: "r", Path: "kv/ping", Operation: op, Data: []byte(`{}`), RemoteAddr: "10.0.0.1:1"}
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			b.ReportAllocs()
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if _, err := c.nodes[0].router.Handle(ctx, req); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
}

func BenchmarkForwarded(b *testing.B) {
	c := newCluster(b, 2, nil)
	m := c.mount("kv/", nil)
	for _, n := range c.nodes {
		n.up(b, c.get(m.GetUuid()), nop{newFake(n.id)})
	}
	req := &Request{ID: "r", Path: "kv/ping", Operation: opUpdate, Data: []byte(`{}`)}
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := c.nodes[1].router.Handle(context.Background(), req); err != nil {
				b.Error(err)
				return
			}
		}
	})
}
