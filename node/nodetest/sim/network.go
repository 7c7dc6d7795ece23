package sim

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"rollcall/transport"
)

// wires is the simulated network: hosts for nodes and clients, and faults that may overlap. A link is down while any fault
// holds it down. Beneath it bytes arrive in order or not at all, as TCP has it: a packet that is lost arrives late, and
// what overtakes is one connection's bytes another's.
type wires struct {
	net  *transport.MemNetwork
	seed uint64

	mu   sync.Mutex
	cuts map[way]int
	bad  map[way]int // disturbances on a link, to tell the last one
}

// way is one direction between two hosts.
type way struct{ from, to string }

func newWires(seed uint64) *wires {
	return &wires{net: transport.NewMemNetwork(), seed: seed, cuts: map[way]int{}, bad: map[way]int{}}
}

// cut takes links down until the answer is called.
func (w *wires) cut(ways ...way) (heal func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, l := range ways {
		if w.cuts[l]++; w.cuts[l] == 1 {
			w.net.CutOneWay(l.from, l.to)
		}
	}
	return sync.OnceFunc(func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		for _, l := range ways {
			if w.cuts[l]--; w.cuts[l] == 0 {
				w.net.HealOneWay(l.from, l.to)
			}
		}
	})
}

// disturb makes links slow and lossy until the answer is called: each write takes up to jitter, and with probability loss
// it must be sent again, after a time-out of 200 ms that doubles.
func (w *wires) disturb(jitter time.Duration, loss float64, ways ...way) (heal func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, l := range ways {
		w.bad[l]++
		rng := rngOf(w.seed, fmt.Sprintf("link %s %s %d", l.from, l.to, w.bad[l]))
		w.net.Disturb(l.from, l.to, func() time.Duration { return late(rng, jitter, loss) })
	}
	at := make([]int, len(ways))
	for i, l := range ways {
		at[i] = w.bad[l]
	}
	return sync.OnceFunc(func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		for i, l := range ways {
			if w.bad[l] == at[i] { // not if somebody else has disturbed it since
				w.net.Disturb(l.from, l.to, nil)
			}
		}
	})
}

func late(rng *rand.Rand, jitter time.Duration, loss float64) time.Duration {
	d := time.Duration(rng.Int64N(int64(jitter) + 1))
	for again := 200 * time.Millisecond; rng.Float64() < loss && again < 3*time.Second; again *= 2 {
		d += again
	}
	return d
}

// links are those from each of a to each of b.
func links(a, b []string) (ways []way) {
	for _, from := range a {
		for _, to := range b {
			if from != to {
				ways = append(ways, way{from, to})
			}
		}
	}
	return ways
}

// both are the links between a and b, both ways.
func both(a, b []string) []way { return append(links(a, b), links(b, a)...) }

// open says whether a link is up.
func (w *wires) open(from, to string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.cuts[way{from, to}] == 0
}
