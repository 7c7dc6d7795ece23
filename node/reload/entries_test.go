package reload

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	commandv1 "rollcall/proto/command/v1"
)

// The leader gathers what nodes say into few entries: their number does not grow with the number of nodes. Ticks, nudges
// and TakeOvers (one a mount) are counted apart. Each node's plugin takes 20 to 60 ms to start, so that reports come one
// after the other. `go test -v -run EntriesOfAReload ./node/reload` prints the table of DESIGN.md.
func TestTheEntriesOfAReloadDoNotGrowWithTheNodes(t *testing.T) {
	for _, c := range []struct{ nodes, most int }{{3, 6}, {10, 8}, {50, 12}, {100, 12}} {
		t.Run(fmt.Sprint(c.nodes), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				s := cluster(t, c.nodes)
				defer s.stop()
				rng := rand.New(rand.NewPCG(uint64(c.nodes), 0))
				var slowest time.Duration
				for _, n := range s.nodes {
					took := 20*time.Millisecond + time.Duration(rng.IntN(40))*time.Millisecond
					n.plugins.act(sha("2"), behaviour{startTook: took, multiplexes: true})
					slowest = max(slowest, took)
				}
				entries, bytes, apart := 0, 0, map[string]int{}
				s.hook(nil, func(c *commandv1.Command) {
					s.set(func() {
						switch c.GetBody().(type) {
						case *commandv1.Command_Tick:
							apart["ticks"]++
						case *commandv1.Command_TakeOver:
							apart["take-overs"]++
						default:
							entries++
							bytes += proto.Size(c)
						}
					})
				})
				from := time.Now()
				s.start(startReload("r1", &commandv1.Options{}))
				rl := s.ended("r1")
				took := time.Since(from)
				s.phase(rl, commandv1.Phase_PHASE_DONE)
				if rl.GetOutcome() != "succeeded" || len(rl.GetParticipants()) != c.nodes {
					t.Fatalf("outcome %q of %d participants", rl.GetOutcome(), len(rl.GetParticipants()))
				}
				s.hook(nil, nil)
				s.set(func() {
					t.Logf("%d nodes: %d entries of %d bytes, apart from that %d take-overs, %d ticks; %v, the slowest start %v",
						c.nodes, entries, bytes, apart["take-overs"], apart["ticks"], took, slowest)
					if entries > c.most {
						t.Errorf("%d entries for %d nodes, at most %d are allowed", entries, c.nodes, c.most)
					}
					if apart["take-overs"] != 1 {
						t.Errorf("%d take-overs of one mount", apart["take-overs"])
					}
				})
			})
		})
	}
}
