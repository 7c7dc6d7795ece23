package gossip

import (
	"log/slog"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/memberlist"
	"github.com/prometheus/client_golang/prometheus"
)

// FuzzDelegate: whatever a holder of the gossip key announces, nobody of another cluster is let in, nobody takes this node's
// place, and what is remembered stays within its bounds.
func FuzzDelegate(f *testing.F) {
	const ours = "4be5bbd2-0000-4000-8000-0123456789ab"
	self := fact{NodeID: uuid.NewString(), Incarnation: 3, Name: "self", Address: "h:1", ClusterID: ours}
	for _, x := range []fact{
		{NodeID: "6b0e6a10-0000-4000-8000-000000000001", Incarnation: 1, Name: "peer", Address: "h:2", ClusterID: ours, HasState: true},
		{NodeID: "6b0e6a10-0000-4000-8000-000000000001", Incarnation: 2, Name: "peer", Address: "h:3", Leaving: true},
		{NodeID: "6b0e6a10-0000-4000-8000-000000000002", Incarnation: 1, Name: "stranger", Address: "h:4", ClusterID: "6b0e6a10-0000-4000-8000-0000000000ff"},
		self,
	} {
		b, err := x.encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, x.member(), uint8(0))
		f.Add(b, "somebody else", uint8(2))
	}
	f.Fuzz(func(t *testing.T, meta []byte, member string, how uint8) {
		g := &Gossip{cfg: Config{NodeID: self.NodeID}, log: slog.New(slog.DiscardHandler), self: self, peers: map[string]*Peer{}, changed: make(chan struct{})}
		var err error
		if g.m, err = newMetrics(prometheus.NewRegistry(), g); err != nil {
			t.Fatal(err)
		}
		g.peers["old"] = &Peer{NodeID: "6b0e6a10-0000-4000-8000-000000000001", Incarnation: 5, Name: "peer", Address: "h:9", Since: time.Now()}
		d := &delegate{g}
		n := &memberlist.Node{Name: member, Meta: meta, State: memberlist.NodeStateType(how % 4)}
		d.NotifyMsg(meta)
		d.MergeRemoteState(meta, how%2 == 0)
		_ = d.NotifyMerge([]*memberlist.Node{n, n})
		if d.NotifyAlive(n) != nil {
			return // memberlist tells nothing more of it
		}
		d.NotifyJoin(n)
		d.NotifyUpdate(n)
		d.NotifyLeave(n)
		d.NotifyConflict(n, n)
		if len(g.peers) > 2 {
			t.Fatalf("one announcement made %d peers", len(g.peers))
		}
		for _, p := range g.Peers() {
			if p.NodeID == self.NodeID {
				t.Fatalf("somebody announced this node: %+v", p)
			}
			if p.ClusterID != "" && p.ClusterID != ours {
				t.Fatalf("somebody of another cluster was let in: %+v", p)
			}
			if p.NodeID == "6b0e6a10-0000-4000-8000-000000000001" && p.Incarnation < 5 {
				t.Fatalf("an older boot took a newer one's place: %+v", p)
			}
			if len(p.Name) > maxName || len(p.Address) > maxAddress || len(p.Build) > maxBuild {
				t.Fatalf("too long: %+v", p)
			}
		}
	})
}
