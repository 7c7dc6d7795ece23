package check

import (
	"slices"
	"time"
)

// grace is how long after a fault its consequences are forgiven.
func (j *judge) grace() int64 {
	if j.run.Meta.Grace > 0 {
		return j.run.Meta.Grace
	}
	return int64(30 * time.Second)
}

// faulty reports whether a fault lay over [from, to], its grace included.
func (j *judge) faulty(from, to int64) bool {
	return slices.ContainsFunc(j.run.Faults, func(f Fault) bool {
		end := int64(never)
		if f.To > 0 {
			end = f.To + j.grace()
		}
		return f.From <= to && end >= from
	})
}

// lastHeal is when everything was whole again; 0 when nothing was ever broken, and never when something still is.
func (j *judge) lastHeal() int64 {
	last := int64(0)
	for _, f := range j.run.Faults {
		if f.To == 0 {
			return never
		}
		last = max(last, f.To)
	}
	return last
}

// failures is I10: no request fails without a fault, and every failure is a definite answer or a broken connection.
func (j *judge) failures() {
	for i := range j.run.Ops {
		op := &j.run.Ops[i]
		j.looked("I10", 1)
		if op.Outcome == OK || op.Refused || op.Told {
			continue
		}
		if op.Outcome == Failed && op.Status == 0 && op.Cause == "" {
			j.bad("I10", []uint64{op.ID}, "%s %s%s failed without an error", op.Kind, op.Mount, op.Key)
		}
		if op.Return >= j.run.Meta.Ended && op.Cause == "" {
			continue // the end of the run cut it off
		}
		if !j.faulty(op.Call, op.Return) {
			j.bad("I10", []uint64{op.ID}, "%s %s%s through %s: outcome %s (%d %s), and nothing was broken",
				op.Kind, op.Mount, op.Key, op.Node, op.Outcome, op.Status, op.Cause)
		}
	}
}

// whoIs tells which node had a name at a time: a disk that was replaced makes another node of the same name, to which
// nothing is left of what was meant for the first alone.
func (j *judge) whoIs() func(name string, at int64) string {
	type birth struct {
		at int64
		id string
	}
	births := map[string][]birth{}
	j.each(func(e *Event) { births[e.Node] = append(births[e.Node], birth{e.At, e.NodeID}) }, Boot)
	return func(name string, at int64) string {
		id := ""
		for _, b := range births[name] {
			if b.at > at {
				break
			}
			id = b.id
		}
		return name + " " + id
	}
}

// order is I11: the answers of one node for one mount never go back to an older generation.
func (j *judge) order() {
	type place struct{ node, mount string }
	seen, who := map[place][]timed{}, j.whoIs()
	// An answer that another node has passed on, or that was long on its way, may come when its node has lost its disk: where
	// the name was another one's when it was asked, nobody knows whose it is.
	by := func(op *Op) (place, bool) {
		then, now := who(op.By, op.Call), who(op.By, op.Return)
		return place{now, op.Mount}, op.Generation > 0 && op.By != "" && then == now
	}
	for i := range j.run.Ops {
		op := &j.run.Ops[i]
		if k, known := by(op); known {
			seen[k] = append(seen[k], timed{op.Return, int64(op.Generation)})
		}
	}
	for k := range seen {
		seen[k] = highest(seen[k])
	}
	for i := range j.run.Ops {
		op := &j.run.Ops[i]
		k, known := by(op)
		if !known {
			continue
		}
		j.looked("I11", 1)
		if before := lastBefore(seen[k], op.Call, 0); int64(op.Generation) < before {
			j.bad("I11", []uint64{op.ID}, "%s answered for %s with generation %d after it had answered with %d", op.By, op.Mount, op.Generation, before)
		}
	}
}

// once is I12: what a client called for once reaches plugin code at most once.
func (j *judge) once() {
	type call struct{ mount, key, input string }
	calls, handled := map[call]int{}, map[call]int{}
	for i := range j.run.Ops {
		if op := &j.run.Ops[i]; op.Kind == Write {
			calls[call{op.Mount, op.Key, op.Input}]++
		}
	}
	j.each(func(e *Event) {
		j.looked("I12", 1)
		k := call{e.Mount, e.Key, e.Input}
		handled[k]++
		if handled[k] == calls[k]+1 {
			j.bad("I12", nil, "the write of %q to %s%s reached the plugin %d times and was called for %d times", e.Input, e.Mount, e.Key, handled[k], calls[k])
		}
	}, Handled)
}
