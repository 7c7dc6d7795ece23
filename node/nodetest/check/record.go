package check

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Recorder keeps what happens in a run, in memory: an operation costs an append. All its methods may be called from any
// goroutine.
type Recorder struct {
	start time.Time
	ids   atomic.Uint64

	mu     sync.Mutex
	meta   Meta
	ops    []Op
	open   map[uint64]Op
	events []Event
	seq    map[string]uint64
	faults []Fault
}

// NewRecorder starts the run's clock.
func NewRecorder() *Recorder {
	return &Recorder{start: time.Now(), open: map[uint64]Op{}, seq: map[string]uint64{}}
}

// Now is the time on the run's clock: monotonic, in nanoseconds, from 1.
func (r *Recorder) Now() int64 { return int64(time.Since(r.start)) + 1 }

// At is a point of the wall clock on the run's clock, for events that another process has written down.
func (r *Recorder) At(t time.Time) int64 { return max(int64(t.Sub(r.start))+1, 1) }

// Describe sets what the run says of itself.
func (r *Recorder) Describe(change func(m *Meta)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	change(&r.meta)
}

// Invoke gives op its number and the time of its call. It must come before the request leaves. An operation that is never
// completed is Unknown.
func (r *Recorder) Invoke(op Op) Op {
	op.ID = r.ids.Add(1)
	r.mu.Lock()
	defer r.mu.Unlock()
	op.Call = r.Now()
	r.open[op.ID] = op
	return op
}

// Complete records op with its outcome. It must come after the answer has arrived.
func (r *Recorder) Complete(op Op) {
	now := r.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	if op.Return == 0 {
		op.Return = now
	}
	delete(r.open, op.ID)
	r.ops = append(r.ops, op)
}

// Event records what a node did. Its time is now, unless it has one.
func (r *Recorder) Event(e Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e.At == 0 {
		e.At = r.Now()
	}
	r.seq[e.Node]++
	e.Seq = r.seq[e.Node]
	r.events = append(r.events, e)
}

// Fault records that something is broken on purpose from now on. The caller calls healed when it no longer is; for what is
// over at once, like a kill, that is when what was killed has been started again.
func (r *Recorder) Fault(kind, target, detail string) (healed func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := len(r.faults)
	r.faults = append(r.faults, Fault{Kind: kind, Target: target, Detail: detail, From: r.Now()})
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.faults[i].To == 0 {
			r.faults[i].To = r.Now()
		}
	}
}

// Run is what was recorded until now. Operations that have not ended are in it as Unknown.
func (r *Recorder) Run() *Run {
	r.mu.Lock()
	defer r.mu.Unlock()
	run := &Run{Meta: r.meta, Ops: slices.Clone(r.ops), Events: slices.Clone(r.events), Faults: slices.Clone(r.faults)}
	// One time for both: what is open ends with the run, not a moment before it.
	now := r.Now()
	for _, op := range r.open {
		op.Outcome, op.Return = Unknown, now
		run.Ops = append(run.Ops, op)
	}
	if run.Meta.Ended == 0 {
		run.Meta.Ended = now
	}
	sortRun(run)
	return run
}

func sortRun(run *Run) {
	slices.SortFunc(run.Ops, func(a, b Op) int { return cmp.Or(cmp.Compare(a.Call, b.Call), cmp.Compare(a.ID, b.ID)) })
	slices.SortStableFunc(run.Events, func(a, b Event) int { return cmp.Compare(a.At, b.At) })
}
