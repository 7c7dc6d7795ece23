package check

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"testing"
)

// mutation makes a good history wrong in one way, and names what is violated. It reports whether the history had a place
// for it.
type mutation struct {
	invariant, name string
	do              func(run *Run, rng *rand.Rand) bool
}

// op finds a random operation that fits.
func op(run *Run, rng *rand.Rand, fits func(op *Op) bool) *Op {
	var all []*Op
	for i := range run.Ops {
		if fits(&run.Ops[i]) {
			all = append(all, &run.Ops[i])
		}
	}
	if len(all) == 0 {
		return nil
	}
	return all[rng.IntN(len(all))]
}

func event(run *Run, rng *rand.Rand, fits func(e *Event) bool) *Event {
	var all []*Event
	for i := range run.Events {
		if fits(&run.Events[i]) {
			all = append(all, &run.Events[i])
		}
	}
	if len(all) == 0 {
		return nil
	}
	return all[rng.IntN(len(all))]
}

// change changes a random event of a kind.
func changeEvent(k EventKind, fits func(e *Event) bool, do func(run *Run, e *Event)) func(*Run, *rand.Rand) bool {
	return func(run *Run, rng *rand.Rand) bool {
		e := event(run, rng, func(e *Event) bool { return e.Kind == k && (fits == nil || fits(e)) })
		if e != nil {
			do(run, e)
		}
		return e != nil
	}
}

func changeOp(k Kind, fits func(op *Op) bool, do func(run *Run, op *Op)) func(*Run, *rand.Rand) bool {
	return func(run *Run, rng *rand.Rand) bool {
		o := op(run, rng, func(o *Op) bool { return o.Kind == k && o.Outcome == OK && (fits == nil || fits(o)) })
		if o != nil {
			do(run, o)
		}
		return o != nil
	}
}

// changeAlone is changeOp where nothing else happens to the same key meanwhile.
func changeAlone(k Kind, fits func(op *Op) bool, do func(run *Run, op *Op)) func(*Run, *rand.Rand) bool {
	return func(run *Run, rng *rand.Rand) bool {
		return changeOp(k, func(o *Op) bool { return fits(o) && alone(run, o) }, do)(run, rng)
	}
}

func add(run *Run, e Event) { run.Events = append(run.Events, e) }

func addOp(run *Run, o Op) {
	o.ID = uint64(len(run.Ops)) + 1_000_000
	run.Ops = append(run.Ops, o)
}

// without takes the events that fit away.
func without(run *Run, fits func(e *Event) bool) bool {
	n := len(run.Events)
	run.Events = slices.DeleteFunc(run.Events, func(e Event) bool { return fits(&e) })
	return len(run.Events) < n
}

// written is whether the value of a read was written.
func filled(o *Op) bool { return o.Output != "" }

var mutations = []mutation{
	{"I1", "two leaders of one term", changeEvent(Leader, nil, func(run *Run, e *Event) {
		other := *e
		other.Node, other.At = nodeName(2), e.At+ms
		add(run, other)
	})},
	{"I1", "a term that goes back", changeEvent(Leader, nil, func(run *Run, e *Event) {
		other := *e
		other.Term, other.At = e.Term-1, e.At+ms
		add(run, other)
	})},
	{"I1", "the same term again", changeEvent(Leader, nil, func(run *Run, e *Event) {
		other := *e
		other.At, other.Boot = e.At+ms, e.Boot+1
		add(run, other)
	})},

	{"I2", "another state", changeEvent(Digest, nil, func(_ *Run, e *Event) { e.Hash = "f" + e.Hash[1:] })},
	{"I2", "another term", changeEvent(Digest, nil, func(_ *Run, e *Event) { e.Term++ })},
	{"I2", "no digest", changeEvent(Digest, nil, func(_ *Run, e *Event) { e.Hash = "" })},
	{"I2", "a state that goes back", changeEvent(Digest, func(e *Event) bool { return e.Index > DigestEvery }, func(run *Run, e *Event) {
		add(run, Event{Node: e.Node, Boot: e.Boot, At: e.At + 1, Kind: Restored, Index: e.Index - 1})
	})},
	{"I2", "an entry twice", changeEvent(Digest, nil, func(run *Run, e *Event) {
		other := *e
		other.At++
		add(run, other)
	})},

	{"I3", "an acknowledged write is lost at the end", func(run *Run, rng *rand.Rand) bool {
		f := op(run, rng, func(o *Op) bool { return o.Kind == Final && o.Key != "hot" && o.Output != "" })
		if f == nil {
			return false
		}
		var before *Op
		for i := range run.Ops {
			w := &run.Ops[i]
			if w.Kind == Write && w.Key == f.Key && w.Outcome == OK && w.Input != f.Output && (before == nil || w.Call > before.Call) {
				before = w
			}
		}
		if before == nil {
			return false
		}
		f.Output = before.Input
		return true
	}},
	{"I3", "everything is lost at the end", changeOp(Final, func(o *Op) bool { return o.Key != "hot" && o.Output != "" }, func(_ *Run, o *Op) { o.Output = "" })},
	{"I3", "a deleted value is back", func(run *Run, rng *rand.Rand) bool {
		f := op(run, rng, func(o *Op) bool { return o.Kind == Final && o.Key != "hot" && o.Output == "" })
		if f == nil {
			return false
		}
		w := op(run, rng, func(o *Op) bool { return o.Kind == Write && o.Key == f.Key && o.Outcome == OK })
		if w != nil {
			f.Output = w.Input
		}
		return w != nil
	}},
	{"I3", "a value from nowhere", changeOp(Read, func(o *Op) bool { return o.Key != "hot" }, func(_ *Run, o *Op) { o.Output = "never written" })},
	{"I3", "a value from the future", func(run *Run, rng *rand.Rand) bool {
		r := op(run, rng, func(o *Op) bool { return o.Kind == Read && o.Key != "hot" })
		w := op(run, rng, func(o *Op) bool { return o.Kind == Write && o.Key == r.Key && o.Call > r.Return })
		if w != nil {
			r.Output = w.Input
		}
		return w != nil
	}},
	{"I3", "an addition is lost", changeOp(Final, func(o *Op) bool { return o.Key == "hot" }, func(_ *Run, o *Op) { o.Output = plus(o.Output, -1) })},
	{"I3", "an addition counts twice", changeOp(Final, func(o *Op) bool { return o.Key == "hot" }, func(_ *Run, o *Op) { o.Output = plus(o.Output, 1) })},
	{"I3", "a read counts what was not added yet", changeOp(Read, func(o *Op) bool { return o.Key == "hot" }, func(_ *Run, o *Op) { o.Output = plus(o.Output, 5) })},
	{"I3", "an acknowledged write that nobody called for is gone", func(run *Run, rng *rand.Rand) bool {
		f := op(run, rng, func(o *Op) bool { return o.Kind == Final && o.Key != "hot" })
		addOp(run, Op{Kind: Write, Node: f.Node, Mount: f.Mount, Key: f.Key, Input: "acknowledged", Call: f.Call - 10*ms, Return: f.Call - 9*ms, Outcome: OK})
		return true
	}},

	{"I17", "a node forgets what it has acknowledged", func(run *Run, rng *rand.Rand) bool {
		w := op(run, rng, func(o *Op) bool { return o.Kind == Write && o.Outcome == OK })
		addOp(run, Op{Kind: Read, Node: w.Node, By: w.Node, Mount: w.Mount, Key: w.Key, Output: "", Call: w.Return + 1, Return: w.Return + 2, Outcome: OK})
		return !slices.ContainsFunc(run.Ops, func(o Op) bool { return o.Kind == Delete && o.Key == w.Key && o.Call < w.Return && o.Return > w.Call })
	}},
	{"I17", "a node's reads go back", func(run *Run, rng *rand.Rand) bool {
		r := op(run, rng, func(o *Op) bool { return o.Kind == Read && o.Key != "hot" && filled(o) })
		w := op(run, rng, func(o *Op) bool {
			if o.Kind != Write || o.Key != r.Key || o.Outcome != OK {
				return false
			}
			seen := op(run, rng, func(x *Op) bool { return x.Kind == Write && x.Key == r.Key && x.Input == r.Output })
			return o.Return < seen.Call
		})
		if w != nil {
			addOp(run, Op{Kind: Read, Node: nodeName(2), By: r.By, Mount: r.Mount, Key: r.Key, Output: w.Input, Call: r.Return + 1, Return: r.Return + 2, Outcome: OK})
		}
		return w != nil
	}},
	{"I17", "a counter goes back on a node", func(run *Run, rng *rand.Rand) bool {
		r := op(run, rng, func(o *Op) bool { return o.Kind == Read && o.Key == "hot" && filled(o) })
		addOp(run, Op{Kind: Read, Node: r.Node, By: r.By, Mount: r.Mount, Key: r.Key, Output: plus(r.Output, -1), Call: r.Return + 1, Return: r.Return + 2, Outcome: OK})
		return true
	}},

	{"I4", "a stale read", func(run *Run, rng *rand.Rand) bool {
		r := op(run, rng, func(o *Op) bool { return o.Kind == Catalog && filled(o) && alone(run, o) })
		if r != nil {
			addOp(run, Op{Kind: Catalog, Key: r.Key, Output: "", Call: r.Call, Return: r.Return, Outcome: OK})
		}
		return r != nil
	}},
	{"I4", "a lost registration", changeAlone(Catalog, filled, func(_ *Run, o *Op) { o.Output = "" })},
	{"I4", "a row from nowhere", changeOp(Catalog, nil, func(_ *Run, o *Op) { o.Output = "sha-nobody" })},
	{"I4", "a row that was removed is back", changeAlone(Catalog, func(o *Op) bool { return o.Output == "" }, func(_ *Run, o *Op) { o.Output = "sha-row-0" })},
	{"I4", "a version that changes its bytes", func(run *Run, rng *rand.Rand) bool {
		o := op(run, rng, func(o *Op) bool { return o.Kind == Register && o.Refused && alone(run, o) })
		if o != nil {
			o.Outcome, o.Refused = OK, false
		}
		return o != nil
	}},
	{"I4", "a refusal without a reason", changeOp(Register, func(o *Op) bool { return o.Key != "secret/kv/v1" }, func(_ *Run, o *Op) { o.Outcome, o.Refused = Failed, true })},
	{"I4", "a read before the registration", func(run *Run, rng *rand.Rand) bool {
		w := op(run, rng, func(o *Op) bool { return o.Kind == Register && o.Outcome == OK && o.Input == "sha-row-2" })
		addOp(run, Op{Kind: Catalog, Key: w.Key, Output: w.Input, Call: w.Call - 3, Return: w.Call - 2, Outcome: OK})
		return true
	}},

	{"I5", "a phase that goes back", changeEvent(Applied, func(e *Event) bool { return e.Phase == "committed" }, func(run *Run, e *Event) {
		other := *e
		other.Phase, other.At, other.Index = "preparing", e.At+1, e.Index+1
		add(run, other)
	})},
	{"I5", "an end that is none", changeEvent(Applied, func(e *Event) bool { return terminal(e.Phase) }, func(run *Run, e *Event) {
		other := *e
		other.Phase, other.At, other.Index = "committed", e.At+1, e.Index+1
		add(run, other)
	})},
	{"I5", "two ends", changeEvent(Applied, func(e *Event) bool { return e.Phase == "done" }, func(_ *Run, e *Event) { e.Phase = "aborted" })},
	{"I5", "two generations", changeEvent(Applied, func(e *Event) bool { return e.Phase == "done" }, func(_ *Run, e *Event) { e.Generation++ })},
	{"I5", "a status that no node has come to", changeOp(Status, func(o *Op) bool { return o.Output == "preparing" }, func(_ *Run, o *Op) { o.Output = "done" })},
	{"I5", "a status that goes back", changeOp(Status, func(o *Op) bool { return terminal(o.Output) }, func(run *Run, o *Op) {
		addOp(run, Op{Kind: Status, Key: o.Key, Output: "preparing", Call: o.Return + 1, Return: o.Return + 2, Outcome: OK})
	})},
	{"I5", "a reload that is forgotten", changeOp(Status, func(o *Op) bool { return terminal(o.Output) }, func(_ *Run, o *Op) { o.Output = "" })},
	{"I5", "an id with two answers", changeOp(Start, nil, func(_ *Run, o *Op) { o.Output = "another" })},
	{"I5", "an id with two bodies", changeOp(Start, nil, func(_ *Run, o *Op) { o.Input = "something else" })},
	{"I5", "a refusal of the same body", changeOp(Start, nil, func(run *Run, o *Op) {
		addOp(run, Op{Kind: Start, Key: o.Key, Input: o.Input, Call: o.Return + 1, Return: o.Return + 2, Outcome: Failed, Refused: true, Status: 409})
	})},

	{"I6", "a swap twice", changeEvent(Swap, func(e *Event) bool { return e.Reload != "" }, func(run *Run, e *Event) {
		other := *e
		other.At += ms
		add(run, other)
	})},
	{"I6", "a swap that did not happen", func(run *Run, rng *rand.Rand) bool {
		e := event(run, rng, func(e *Event) bool { return e.Kind == Swap && e.Reload != "" })
		if e == nil {
			return false
		}
		gone := *e
		return without(run, func(e *Event) bool { return *e == gone })
	}},
	{"I6", "a verdict of the wrong node", func(run *Run, rng *rand.Rand) bool {
		e := event(run, rng, func(e *Event) bool { return e.Kind == Swap && e.Reload != "" })
		if e == nil {
			return false
		}
		node, reload := e.Node, e.Reload
		return without(run, func(e *Event) bool { return e.Kind == Swap && e.Node == node && e.Reload == reload })
	}},

	{"I7", "a swap before the commit", changeEvent(Swap, func(e *Event) bool { return e.Reload != "" }, func(_ *Run, e *Event) { e.At -= 40 * ms })},
	{"I7", "a swap to what was aborted", changeEvent(Swap, func(e *Event) bool { return e.Reload != "" }, func(_ *Run, e *Event) { e.Generation += 1000 })},
	{"I7", "an answer by what was aborted", changeOp(Read, func(o *Op) bool { return o.Generation > 0 }, func(_ *Run, o *Op) { o.Generation += 1000 })},
	{"I7", "an answer before the commit", func(run *Run, rng *rand.Rand) bool {
		w := event(run, rng, func(e *Event) bool { return e.Kind == Wanted && e.Reload != "" })
		addOp(run, Op{
			Kind: Read, Node: w.Node, By: w.Node, Mount: w.Mount, Key: "another", Generation: w.Generation, Call: w.At - 5*ms, Return: w.At - 4*ms, Outcome: OK,
		})
		return true
	}},
	{"I7", "a commit that nobody applied", changeEvent(Wanted, func(e *Event) bool { return e.Reload != "" }, func(_ *Run, e *Event) { e.Generation++ })},

	{"I8", "an old generation at the end", changeEvent(Running, nil, func(_ *Run, e *Event) { e.Generation-- })},
	{"I8", "other bytes at the end", changeEvent(Running, nil, func(_ *Run, e *Event) { e.SHA256 = "sha-other" })},
	{"I8", "too late", changeEvent(Running, nil, func(_ *Run, e *Event) { e.At += 2 * settleTime })},

	{"I9", "bytes that nobody registered", changeEvent(Exec, nil, func(_ *Run, e *Event) { e.SHA256 = "sha-evil" })},

	{"I10", "a failure without a fault", changeOp(Read, early, func(_ *Run, o *Op) { o.Outcome, o.Status, o.Cause = Failed, 500, "internal error" })},
	{"I10", "an unknown outcome without a fault", changeOp(Write, early, func(_ *Run, o *Op) { o.Outcome, o.Cause = Unknown, "EOF" })},
	{"I10", "a failure without an error", func(run *Run, rng *rand.Rand) bool {
		o := op(run, rng, func(o *Op) bool { return o.Kind == Read && o.Outcome == Failed })
		o.Cause = ""
		return true
	}},
	{"I10", "a failure long after the fault", changeOp(Final, nil, func(run *Run, o *Op) {
		run.Meta.Grace = 1
		o.Outcome, o.Status = Failed, 503
	})},

	{"I11", "an answer of an older generation after a newer one", changeOp(Read, func(o *Op) bool { return o.Generation > 100 }, func(run *Run, o *Op) {
		addOp(run, Op{Kind: Read, Node: o.Node, By: o.By, Mount: o.Mount, Key: "another", Generation: o.Generation - 1, Call: o.Return + 1, Return: o.Return + 2, Outcome: OK})
	})},
	{"I11", "an older generation on another node after the reload was done", changeEvent(Applied, func(e *Event) bool { return e.Phase == "done" }, func(run *Run, e *Event) {
		addOp(run, Op{Kind: Read, Node: nodeName(0), By: "node-9", Mount: mount, Key: "another", Generation: e.Generation - 1, Call: e.At + 30*ms, Return: e.At + 31*ms, Outcome: OK})
	})},

	{"I12", "a write that reaches the plugin twice", changeEvent(Handled, nil, func(run *Run, e *Event) {
		other := *e
		other.At += ms
		add(run, other)
	})},
	{"I12", "a write that nobody called for", changeEvent(Handled, nil, func(run *Run, e *Event) {
		other := *e
		other.Input = "from nowhere"
		add(run, other)
	})},
	{"I12", "a write to another key", changeEvent(Handled, nil, func(_ *Run, e *Event) { e.Key = "elsewhere" })},

	{"I13", "a process too many", changeEvent(Processes, nil, func(_ *Run, e *Event) { e.N = e.Limit + 1 })},
	{"I13", "an end without a beginning", changeEvent(Exit, nil, func(_ *Run, e *Event) { e.PID += 5000 })},
	{"I13", "an end twice", changeEvent(Exit, nil, func(run *Run, e *Event) {
		other := *e
		other.At++
		add(run, other)
	})},

	{"I16", "a reload without an end", func(run *Run, rng *rand.Rand) bool {
		e := event(run, rng, func(e *Event) bool { return e.Kind == Applied && terminal(e.Phase) })
		id := e.Reload
		return without(run, func(e *Event) bool { return e.Kind == Applied && e.Reload == id && terminal(e.Phase) })
	}},
	{"I16", "nothing is served after the heal", func(run *Run, _ *rand.Rand) bool {
		for i := range run.Ops {
			if run.Ops[i].Kind == Final {
				run.Ops[i].Outcome, run.Ops[i].Cause = Failed, "sealed"
			}
		}
		return true
	}},

	{"I21", "used after it was revoked", changeAlone(TokenUse, func(o *Op) bool { return o.Output == Denied }, func(_ *Run, o *Op) { o.Output = Allowed })},
	{"I21", "refused while it is good", changeAlone(TokenUse, func(o *Op) bool { return o.Output == Allowed }, func(_ *Run, o *Op) { o.Output = Denied })},
	{"I21", "created twice", changeOp(TokenCreate, nil, func(run *Run, o *Op) {
		addOp(run, Op{Kind: TokenCreate, Key: o.Key, Call: o.Return + 1, Return: o.Return + 2, Outcome: OK})
	})},
	{"I21", "alive again", changeOp(TokenRevoke, nil, func(run *Run, o *Op) {
		addOp(run, Op{Kind: TokenUse, Key: o.Key, Output: Allowed, Call: o.Return + 1, Return: o.Return + 2, Outcome: OK})
	})},
	{"I21", "used before it was made", changeOp(TokenCreate, nil, func(run *Run, o *Op) {
		addOp(run, Op{Kind: TokenUse, Key: o.Key, Output: Allowed, Call: o.Call - 3, Return: o.Call - 2, Outcome: OK})
	})},
}

// early is before anything was broken.
func early(o *Op) bool { return o.Return < 250*ms && o.Mount == mount }

// alone reports whether nothing else happens to the row while o runs.
func alone(run *Run, o *Op) bool {
	return !slices.ContainsFunc(run.Ops, func(x Op) bool {
		changes := x.Kind == Register && !x.Refused || x.Kind == Deregister || x.Kind == TokenCreate || x.Kind == TokenRevoke
		return x.ID != o.ID && x.Key == o.Key && changes && x.Call <= o.Return && x.Return >= o.Call
	})
}

func plus(n string, by int) string {
	v, _ := strconv.Atoi(n)
	return strconv.Itoa(v + by)
}

// TestEveryMutatedHistoryIsRejected makes each mutation at twelve different places, and wants at least ten rejections, by the
// right invariant, of each.
func TestEveryMutatedHistoryIsRejected(t *testing.T) {
	const places, enough = 16, 10
	total := map[string]int{}
	for _, m := range mutations {
		t.Run(fmt.Sprint(m.invariant, " ", m.name), func(t *testing.T) {
			made, missed := 0, 0
			for seed := uint64(0); seed < 4*places && made < places; seed++ {
				run := valid(seed, 160)
				if !m.do(run, rand.New(rand.NewPCG(seed, 77))) {
					continue
				}
				made++
				sortRun(run)
				if report := Check(run); len(report.of(m.invariant)) == 0 {
					missed++
					t.Logf("seed %d: accepted: %v", seed, report.Err())
				}
			}
			total[m.invariant] += made - missed
			if made-missed < enough || missed > made/4 {
				t.Errorf("%d of %d mutated histories were accepted", missed, made)
			}
		})
	}
	t.Log("rejected by invariant:", total)
}
