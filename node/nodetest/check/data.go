package check

import (
	"cmp"
	"slices"
	"strconv"
)

// data is I3 and the plugin half of I17: what was acknowledged is there at the end, once; a read shows something that was
// written and not surely overwritten by what the node that was asked has acknowledged, and the reads that one node runs do
// not go back. Reads of plugins run where they arrive, so one on another node may be older than what a client was told; and
// one that was forwarded while the mount moved may be newer than the next one that is not.
func (j *judge) data() {
	type place struct{ mount, key string }
	keys := map[place][]*Op{}
	for i := range j.run.Ops {
		op := &j.run.Ops[i]
		switch op.Kind {
		case Write, Add, Read, Delete, Final:
			p := place{op.Mount, op.Key}
			keys[p] = append(keys[p], op)
		default:
		}
	}
	for p, ops := range keys {
		name := p.mount + p.key
		if slices.ContainsFunc(ops, func(op *Op) bool { return op.Kind == Add }) {
			j.counter(name, ops)
		} else {
			j.register(name, ops)
		}
	}
}

// counter checks a key that is counted up. Increments must be positive.
func (j *judge) counter(name string, ops []*Op) {
	var called []timed          // every addition that may have happened, by its call
	own := map[string][]timed{} // the acknowledged through each node, by their return
	acked, possible := int64(0), int64(0)
	for _, op := range ops {
		if op.Kind != Add || op.Outcome == Failed {
			continue
		}
		n, err := strconv.ParseInt(op.Input, 10, 64)
		if err != nil || n <= 0 {
			j.bad("recording", []uint64{op.ID}, "%s is added %q to, which is no positive number", name, op.Input)
			return
		}
		possible += n
		called = append(called, timed{op.Call, n})
		if op.Outcome == OK {
			acked += n
			own[op.Node] = append(own[op.Node], timed{op.Return, n})
		}
	}
	total := sums(called)
	for node := range own {
		own[node] = sums(own[node])
	}
	seen := map[string][]timed{} // what was read on each node, by the read's return
	reads := ofKinds(ops, Read, Final)
	for _, op := range reads {
		v := int64(0)
		if op.Output != "" {
			var err error
			if v, err = strconv.ParseInt(op.Output, 10, 64); err != nil {
				j.bad("I3", []uint64{op.ID}, "%s was counted, and read as %q", name, op.Output)
				continue
			}
		}
		j.looked("I3", 1)
		if most := lastBefore(total, op.Return+1, 0); v > most {
			j.bad("I3", []uint64{op.ID}, "%s was read as %d when no more than %d had been added: something was applied twice", name, v, most)
		}
		if op.Kind == Final && (v < acked || v > possible) {
			j.bad("I3", []uint64{op.ID}, "%s holds %d at the end on %s; %d were acknowledged and %d more are possible", name, v, op.Node, acked, possible-acked)
		}
		j.looked("I17", 1)
		if least := lastBefore(own[op.Node], op.Call, 0); v < least {
			j.bad("I17", []uint64{op.ID}, "%s was read as %d through %s, which had acknowledged %d before", name, v, op.Node, least)
		}
		seen[op.By] = append(seen[op.By], timed{op.Return, v})
	}
	for node, t := range seen {
		seen[node] = highest(t)
	}
	for _, op := range reads {
		v, _ := strconv.ParseInt(op.Output, 10, 64)
		if before := lastBefore(seen[op.By], op.Call, 0); v < before {
			j.bad("I17", []uint64{op.ID}, "%s was read as %d on %s after %d", name, v, op.By, before)
		}
	}
}

// timed is a number that belongs to a time.
type timed struct{ at, n int64 }

func byTime(t []timed) {
	slices.SortFunc(t, func(a, b timed) int { return cmp.Compare(a.at, b.at) })
}

// sums sorts t and makes each number the sum up to it.
func sums(t []timed) []timed {
	byTime(t)
	for i := 1; i < len(t); i++ {
		t[i].n += t[i-1].n
	}
	return t
}

// highest sorts t and makes each number the highest up to it.
func highest(t []timed) []timed {
	byTime(t)
	for i := 1; i < len(t); i++ {
		t[i].n = max(t[i].n, t[i-1].n)
	}
	return t
}

// lastBefore is the number of the last of t whose time is below at, none when there is none. t is sorted.
func lastBefore(t []timed, at, none int64) int64 {
	i, _ := slices.BinarySearchFunc(t, at, func(e timed, at int64) int { return cmp.Compare(e.at, at) })
	if i == 0 {
		return none
	}
	return t[i-1].n
}

func ofKinds(ops []*Op, kinds ...Kind) []*Op {
	var out []*Op
	for _, op := range ops {
		if slices.Contains(kinds, op.Kind) && op.Outcome == OK {
			out = append(out, op)
		}
	}
	return out
}

// version is a value that a key may have had: from when it may have begun, and when it was surely written.
type version struct{ call, ret int64 }

// register checks a key that is written with values that are all different.
func (j *judge) register(name string, ops []*Op) {
	versions := map[string]version{}
	gone := []timed{{0, 0}}       // when there may be nothing: before the run, and after each deletion, by its call
	acked := map[string][]timed{} // by node: returns of acknowledged changes, with their calls
	var all []timed
	for _, op := range ops {
		if op.Kind != Write && op.Kind != Delete || op.Outcome == Failed {
			continue
		}
		v := version{op.Call, op.Return}
		if op.Outcome == Unknown {
			v.ret = never
		} else {
			acked[op.Node] = append(acked[op.Node], timed{op.Return, op.Call})
			all = append(all, timed{op.Return, op.Call})
		}
		if op.Kind == Delete {
			gone = append(gone, timed{v.call, v.ret})
			continue
		}
		if _, twice := versions[op.Input]; twice || op.Input == "" {
			j.bad("recording", []uint64{op.ID}, "%s is written %q twice: the values of a key must differ", name, op.Input)
			return
		}
		versions[op.Input] = v
	}
	for node := range acked {
		acked[node] = highest(acked[node])
	}
	all, gone = highest(all), highest(gone)
	// shown is what a read shows; of several deletions the last one that may have been before its end.
	shown := func(op *Op) (version, bool) {
		if op.Output == "" {
			return version{0, lastBefore(gone, op.Return+1, 0)}, true
		}
		v, known := versions[op.Output]
		return v, known && v.call <= op.Return
	}
	reads := ofKinds(ops, Read, Final)
	seen := map[string][]timed{}
	ends := map[string]*Op{}
	for _, op := range reads {
		j.looked("I3", 1)
		j.looked("I17", 1)
		v, known := shown(op)
		if !known {
			j.bad("I3", []uint64{op.ID}, "%s was read as %q, which nobody had written", name, op.Output)
			continue
		}
		// A change is surely over v when it was called after v had been acknowledged.
		if over := lastBefore(acked[op.Node], op.Call, -1); over > v.ret {
			j.bad("I17", []uint64{op.ID}, "%s was read as %q through %s, which had acknowledged a later change before", name, op.Output, op.Node)
		}
		if op.Kind == Final {
			if over := lastBefore(all, op.Call, -1); over > v.ret {
				j.bad("I3", []uint64{op.ID}, "%s is %q at the end on %s: a later change was acknowledged and is lost", name, op.Output, op.Node)
			}
			// A write that nobody knows of may come between two of them.
			if other := ends[name]; other != nil && other.Output != op.Output && v.ret != never && versions[other.Output].ret != never {
				j.bad("I3", []uint64{other.ID, op.ID}, "%s is %q at the end on %s, and %q on %s", name, other.Output, other.Node, op.Output, op.Node)
			}
			ends[name] = op
		}
		seen[op.By] = append(seen[op.By], timed{op.Return, v.call})
	}
	for node := range seen {
		seen[node] = highest(seen[node])
	}
	for _, op := range reads {
		v, known := shown(op)
		if before := lastBefore(seen[op.By], op.Call, -1); known && before > v.ret {
			j.bad("I17", []uint64{op.ID}, "%s was read as %q on %s after something later", name, op.Output, op.By)
		}
	}
}
