package sim

import (
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

// mood is what a plugin does in one phase.
type mood int

const (
	fine mood = iota
	refuse
	hang
)

// phases are where a plugin can misbehave.
var phases = []string{
	"verify", "start", "handshake", "setup", "setup again", "initialize", "request", "reply", "cleanup", "close",
}

// temper says how the plugins of one node behave. It draws from the seed and its own count of calls, so that what one
// node's plugins do does not depend on when another's are asked.
type temper struct {
	mu  sync.Mutex
	rng *rand.Rand
	// bad are the phases that go wrong now, and how likely.
	bad map[string]spell
	// crashing makes new processes die soon.
	crashing bool
}

type spell struct {
	mood   mood
	chance float64
}

func newTemper(seed uint64, name string) *temper {
	return &temper{rng: rngOf(seed, "temper "+name), bad: map[string]spell{}}
}

// rngOf is a generator for one part of a run.
func rngOf(seed uint64, name string) *rand.Rand {
	h := uint64(14695981039346656037)
	for i := range len(name) {
		h = (h ^ uint64(name[i])) * 1099511628211
	}
	return rand.New(rand.NewPCG(seed, h))
}

func (t *temper) strikes(phase string) mood {
	t.mu.Lock()
	defer t.mu.Unlock()
	s, ok := t.bad[phase]
	if !ok || t.rng.Float64() >= s.chance {
		return fine
	}
	return s.mood
}

// cast makes a phase go wrong until the answer is called.
func (t *temper) cast(phase string, m mood, chance float64) (lift func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.bad[phase] = spell{m, chance}
	return func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(t.bad, phase)
	}
}

// crashLoop makes every new process die soon, until the answer is called.
func (t *temper) crashLoop() (lift func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.crashing = true
	return func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.crashing = false
	}
}

// dies says whether and when a new process crashes by itself.
func (t *temper) dies() (time.Duration, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return time.Duration(50+t.rng.IntN(2000)) * time.Millisecond, t.crashing
}

func (t *temper) between(least, most time.Duration) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	return between(t.rng, least, most)
}

func (t *temper) chance(p float64) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.rng.Float64() < p
}

func between(rng *rand.Rand, least, most time.Duration) time.Duration {
	return least + time.Duration(rng.Int64N(int64(most-least)+1))
}

// nth is the n-th smallest, counted round.
func nth(of []int, n int) int {
	slices.Sort(of)
	return of[n%len(of)]
}
