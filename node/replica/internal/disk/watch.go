package disk

import (
	"context"
	"sync"
	"time"
)

// Watch notices a disk that does not answer: a write that has been under way for longer than the limit. Raft itself
// does not notice (its leader loop waits inside StoreLogs while heartbeats go on, hashicorp/raft #503), so without this
// a leader with a hung disk stays leader for ever.
type Watch struct {
	limit time.Duration

	mu    sync.Mutex
	next  uint64
	since map[uint64]time.Time
	ended chan struct{} // closed and replaced whenever a write ends
}

func newWatch(limit time.Duration) *Watch {
	return &Watch{limit: limit, since: map[uint64]time.Time{}, ended: make(chan struct{})}
}

// begin starts the clock of one write; the returned function stops it.
func (w *Watch) begin() func() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.next++
	id := w.next
	w.since[id] = time.Now()
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.since, id)
		if len(w.since) == 0 {
			close(w.ended)
			w.ended = make(chan struct{})
		}
	}
}

// Oldest returns how long the oldest write has been under way; 0 when none is.
func (w *Watch) Oldest() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	var oldest time.Duration
	for _, t := range w.since {
		oldest = max(oldest, time.Since(t))
	}
	return oldest
}

// Run calls slow when a write outlives the limit and well when no write is under way any more, alternately, until ctx
// ends. Both are called on Run's goroutine and should be quick.
func (w *Watch) Run(ctx context.Context, slow func(time.Duration), well func()) {
	if w.limit <= 0 {
		<-ctx.Done()
		return
	}
	tick := time.NewTicker(max(w.limit/4, time.Millisecond))
	defer tick.Stop()
	sick := false
	for {
		w.mu.Lock()
		ended := w.ended
		w.mu.Unlock()
		if !sick {
			ended = nil
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if d := w.Oldest(); !sick && d > w.limit {
				sick = true
				slow(d)
			} else if sick && d == 0 {
				sick = false
				well()
			}
		case <-ended:
			sick = false
			well()
		}
	}
}
