package disk

import (
	"context"
	"sync"
	"time"
)

// Watch notices a disk that does not answer: a write that has been under way for longer than the limit, or one that
// failed and has not been followed by one that worked. Raft itself does not notice the first (its leader loop waits
// inside StoreLogs while heartbeats go on, hashicorp/raft #503), and would be elected again and again with the second.
type Watch struct {
	limit time.Duration

	mu      sync.Mutex
	next    uint64
	since   map[uint64]time.Time
	failed  bool
	changed chan struct{} // closed and replaced whenever a write ends
}

func newWatch(limit time.Duration) *Watch {
	return &Watch{limit: limit, since: map[uint64]time.Time{}, changed: make(chan struct{})}
}

// write runs one write under the clock.
func (w *Watch) write(f func() error) error {
	w.mu.Lock()
	w.next++
	id := w.next
	w.since[id] = time.Now()
	w.mu.Unlock()
	err := f()
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.since, id)
	if w.failed || err != nil || w.next == id {
		close(w.changed)
		w.changed = make(chan struct{})
	}
	w.failed = err != nil
	return err
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

// sick says whether the disk fails now, and returns a channel that is closed when that may change.
func (w *Watch) sick() (bool, <-chan struct{}) {
	oldest := w.Oldest()
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.failed || oldest > w.limit, w.changed
}

// Run calls slow when the disk fails, with the age of the oldest write, and well when it answers again, alternately,
// until ctx ends. Both are called on Run's goroutine and should be quick.
func (w *Watch) Run(ctx context.Context, slow func(time.Duration), well func()) {
	if w.limit <= 0 {
		<-ctx.Done()
		return
	}
	tick := time.NewTicker(max(w.limit/4, time.Millisecond))
	defer tick.Stop()
	was := false
	for {
		now, changed := w.sick()
		if now != was {
			if was = now; now {
				slow(w.Oldest())
			} else {
				well()
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-tick.C:
		}
	}
}
