package supervisor

import (
	"math/rand/v2"
	"time"
)

// Backoff says how long to wait before a plugin that ended is started again: 100 ms, doubled up to 30 s, with
// jitter, and from the beginning again after it was up for 60 s. The zero value is ready; one goroutine uses it.
type Backoff struct {
	failures int
}

const (
	backoffFirst = 100 * time.Millisecond
	backoffMax   = 30 * time.Second
	backoffReset = 60 * time.Second
)

// Next returns the pause before the next start. up is how long the process ran; 0 when it did not start.
func (b *Backoff) Next(up time.Duration) time.Duration {
	if up >= backoffReset {
		b.failures = 0
	}
	d := backoffMax
	if b.failures < 9 { // 100 ms << 9 is more than 30 s
		d = min(backoffMax, backoffFirst<<b.failures)
	}
	b.failures++
	// Between 80 and 120 %, so that plugins which fell together do not get up together.
	return time.Duration(float64(d) * (0.8 + 0.4*rand.Float64())) //nolint:gosec // no secret depends on it
}

// Reset forgets all failures.
func (b *Backoff) Reset() { b.failures = 0 }

// Failures is how many starts Next has been asked for since the last reset.
func (b *Backoff) Failures() int { return b.failures }
