package router

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	commandv1 "rollcall/proto/command/v1"
	peerv1 "rollcall/proto/peer/v1"
)

// turn is how long a slice of the rolling latency window lasts: "before" is the last one to two of them.
const turn = 10 * time.Second

// side counts the requests of one kind, reads or writes, that one generation served.
type side struct {
	requests, failed atomic.Uint64
	took             hist
}

// tally is what one generation of one mount did on this node since it was ready here.
type tally struct {
	generation uint64
	sides      [lanes]side
	crashes    atomic.Uint32
}

// meter measures one mount on this node across generations. Its memory is bounded: two tallies, one rolling window, and
// the record of the last switch.
type meter struct {
	now  func() time.Time
	cur  atomic.Pointer[tally]
	hand atomic.Pointer[window]
	// open is the record of the switch under way, or an idle one; never nil.
	open atomic.Pointer[around]

	mu   sync.Mutex
	last *around
}

// window is the rolling latency: hists of this turn and of the one before.
type window struct {
	from      time.Time
	cur, prev *hist
}

// around is what happened to requests around one switch.
type around struct {
	served, held, failed, drained, canceled atomic.Uint64
	took                                    hist
	// pending are the requests that came while this was the meter's record and are not answered yet.
	pending refs
	before  time.Duration
	// idle is a record between switches: it counts only who is in flight. next is the switch that ended it, to which they count.
	idle bool
	next atomic.Pointer[around]
	// prev is the record that a switch has ended; the switch's own.
	prev *around
	// after is the tally of the generation that came to serve; nil until then.
	after atomic.Pointer[tally]
}

func newMeter(now func() time.Time) *meter {
	m := &meter{now: now}
	m.cur.Store(&tally{})
	m.hand.Store(&window{from: now(), cur: &hist{}})
	m.open.Store(&around{idle: true, pending: newRefs()})
	return m
}

// arrive takes note of a request that begins; leave must follow.
func (m *meter) arrive() *around {
	a := m.open.Load()
	a.pending.Add(1)
	return a
}

// leave takes note of its end. Those that were in flight when the switch began count too, also where the switch is over before
// they get here: an instance is drained when they have left it, which is a moment earlier.
func (m *meter) leave(arrived *around, took time.Duration, held, failed bool) {
	defer arrived.pending.Add(-1)
	a := arrived
	if a.idle {
		if a = a.next.Load(); a == nil {
			return
		}
	}
	a.served.Add(1)
	if held {
		a.held.Add(1)
	}
	if failed {
		a.failed.Add(1)
	}
	a.took.record(took)
}

// done takes note of a request that was answered here. generation is whose instance ran it, 0 when none did.
func (m *meter) done(lane int, generation uint64, took time.Duration, failed bool) {
	if t := m.cur.Load(); t.generation == generation || generation == 0 {
		s := &t.sides[lane]
		s.requests.Add(1)
		if failed {
			s.failed.Add(1)
		}
		s.took.record(took)
	}
	m.roll().record(took)
}

func (m *meter) roll() *hist {
	w := m.hand.Load()
	now := m.now()
	since := now.Sub(w.from)
	if since < turn {
		return w.cur
	}
	next := &window{from: now, cur: &hist{}}
	if since < 2*turn {
		next.prev = w.cur
	}
	if m.hand.CompareAndSwap(w, next) {
		return next.cur
	}
	return m.hand.Load().cur
}

// begin opens the record of a switch; the one before it is closed.
func (m *meter) begin() *around {
	m.roll()
	w := m.hand.Load()
	a := &around{before: quantile(.99, w.cur, w.prev), pending: newRefs(), prev: m.open.Load()}
	a.prev.next.Store(a)
	m.open.Store(a)
	return a
}

// end closes the record. With a generation, that one serves from now on, and is counted from nothing unless it did before.
func (m *meter) end(a *around, generation uint64) {
	m.open.CompareAndSwap(a, &around{idle: true, pending: newRefs()})
	if generation != 0 {
		t := m.cur.Load()
		if t.generation != generation {
			t = &tally{generation: generation}
			m.cur.Store(t)
		}
		a.after.Store(t)
	}
	m.mu.Lock()
	m.last = a
	m.mu.Unlock()
}

// relabel lets the same instance go on counting under another generation, from nothing.
func (m *meter) relabel(generation uint64) { m.cur.Store(&tally{generation: generation}) }

// settle waits, bounded, for the requests that the switch held, and for those that were in flight when it began.
func (a *around) settle(ctx context.Context, limit time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	a.prev.pending.drain(ctx, limit)
	a.pending.drain(ctx, limit)
	a.prev = nil
}

func (a *around) record() *commandv1.Traffic {
	t := &commandv1.Traffic{
		Served: a.served.Load(), Held: a.held.Load(), Failed: a.failed.Load(), Drained: a.drained.Load(),
		Canceled: a.canceled.Load(), P99BeforeUs: a.before.Microseconds(),
		P99DuringUs: quantile(.99, &a.took).Microseconds(),
	}
	if n := a.after.Load(); n != nil {
		t.P99AfterUs = quantile(.99, &n.sides[readLane].took, &n.sides[writeLane].took).Microseconds()
	}
	return t
}

func (m *meter) lastSwitch() *commandv1.Traffic {
	m.mu.Lock()
	a := m.last
	m.mu.Unlock()
	if a == nil {
		return nil
	}
	return a.record()
}

func (m *meter) sample(uuid string) *peerv1.MountTraffic {
	t := m.cur.Load()
	return &peerv1.MountTraffic{
		MountUuid: uuid, Generation: t.generation, Crashes: t.crashes.Load(),
		Reads: t.sides[readLane].sample(), Writes: t.sides[writeLane].sample(),
	}
}

func (s *side) sample() *commandv1.GateSample {
	return &commandv1.GateSample{
		Requests: s.requests.Load(), Failed: s.failed.Load(), P99Us: quantile(.99, &s.took).Microseconds(),
	}
}
