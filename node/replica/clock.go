package replica

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Boottime reads CLOCK_BOOTTIME: monotonic time that goes on while the machine sleeps. Go's own monotonic clock stops
// then, and a node that wakes up must not believe in the lease it fell asleep with. It is a system call (0.3 us): the
// vDSO path is not open to Go programs.
func Boottime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		// Cannot happen on a kernel that Go supports (2.6.39 added the clock). The monotonic clock only lacks sleep.
		return time.Since(processStart)
	}
	return time.Duration(ts.Nano())
}

var processStart = time.Now()

// stamper measures what the log's clock advances by: the time since this leadership's previous entry.
type stamper struct {
	mu   sync.Mutex
	term uint64
	last time.Duration
	// owed is time that was stamped on entries which certainly were not appended.
	owed time.Duration
}

// take returns the nanoseconds for the next entry of term: 0 for its first.
func (s *stamper) take(term uint64, now time.Duration) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if term != s.term {
		s.term, s.last, s.owed = term, now, 0
		return 0
	}
	elapsed := max(now-s.last, 0) + s.owed
	s.last, s.owed = max(now, s.last), 0
	return uint64(elapsed)
}

// giveBack returns what take gave to an entry that was not appended.
func (s *stamper) giveBack(term, elapsed uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if term == s.term {
		s.owed += time.Duration(elapsed)
	}
}

// idle returns how long ago the last entry of term was stamped.
func (s *stamper) idle(term uint64, now time.Duration) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if term != s.term {
		return now
	}
	return now - s.last
}
