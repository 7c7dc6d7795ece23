package check

import (
	"slices"
)

// reloads is I5: on every node a reload's phases go forward, the last one is final and the same everywhere, and so is what
// it commits to.
func (j *judge) reloads() {
	type key struct {
		incarnation
		reload string
	}
	type end struct {
		phase, node string
		generation  uint64
	}
	at := map[key]*Event{}
	ends := map[string]end{}
	j.each(func(e *Event) {
		j.looked("I5", 1)
		k := key{e.life(), e.Reload}
		if before := at[k]; before != nil && !j.follows(before, e) {
			j.bad("I5", nil, "reload %s went from %s (wave %d) to %s (wave %d) on %s at index %d",
				e.Reload, before.Phase, before.N, e.Phase, e.N, e.Node, e.Index)
		}
		at[k] = e
		if !terminal(e.Phase) {
			return
		}
		first, known := ends[e.Reload]
		if !known {
			ends[e.Reload] = end{e.Phase, e.Node, e.Generation}
			return
		}
		if first.phase != e.Phase || first.generation != e.Generation {
			j.bad("I5", nil, "reload %s is %s (generation %d) on %s and %s (generation %d) on %s",
				e.Reload, first.phase, first.generation, first.node, e.Phase, e.Generation, e.Node)
		}
	}, Applied)
	// A client cannot be told of a phase before any node has come to it.
	began := map[[2]string]int64{}
	j.each(func(e *Event) {
		k := [2]string{e.Reload, e.Phase}
		if _, known := began[k]; !known {
			began[k] = e.At
		}
	}, Applied)
	if len(began) == 0 {
		return
	}
	for i := range j.run.Ops {
		op := &j.run.Ops[i]
		if op.Kind != Status || op.Outcome != OK || op.Output == "" {
			continue
		}
		t, known := began[[2]string{op.Key, op.Output}]
		if !known && j.alias(op.Key) {
			continue // it was joined to another one
		}
		if !known || t > op.Return {
			j.bad("I5", []uint64{op.ID}, "reload %s was said to be %s, which no node had come to", op.Key, op.Output)
		}
	}
}

// alias reports whether a start of this id was answered with another one.
func (j *judge) alias(id string) bool {
	return slices.ContainsFunc(j.run.Ops, func(op Op) bool {
		return op.Kind == Start && op.Key == id && op.Outcome == OK && op.Output != id
	})
}

// follows reports whether a reload may go from one event to the next on one node. A snapshot may have left steps out.
func (j *judge) follows(a, b *Event) bool {
	if a.Phase == b.Phase {
		return b.N > a.N && !terminal(a.Phase)
	}
	if a.Phase == "committed" && b.Phase == "preparing" && b.N <= a.N {
		return false
	}
	return slices.Contains(next[a.Phase], b.Phase)
}

// swaps is I6 and the nodes' half of I7: a node moves a mount for a reload once a life, never to something that its state
// does not want, and where the record says "switched" it has moved.
func (j *judge) swaps() {
	type swap struct {
		incarnation
		mount  string
		reload string
		gen    uint64
	}
	count := map[swap]int{}
	type wanted struct {
		incarnation
		mount string
		gen   uint64
	}
	wants := map[wanted]bool{}
	told := false
	moved := map[[3]string]bool{}     // reload, node, mount
	highest := map[[2]string]uint64{} // node, mount: the generation
	j.each(func(e *Event) {
		switch e.Kind {
		case Wanted:
			told = true
			wants[wanted{e.life(), e.MountID, e.Generation}] = true
			return
		case Relabel:
		default:
			if !e.Again && e.Reload != "" {
				k := swap{e.life(), e.MountID, e.Reload, e.Generation}
				count[k]++
				j.looked("I6", 1)
				if count[k] == 2 {
					j.bad("I6", nil, "%s (incarnation %d) moved %s to generation %d for reload %s twice", e.Node, e.Boot, e.Mount, e.Generation, e.Reload)
				}
			}
		}
		if e.Reload != "" {
			moved[[3]string{e.Reload, e.Node, e.MountID}] = true
		}
		place := [2]string{e.Node, e.MountID}
		highest[place] = max(highest[place], e.Generation)
		if told {
			j.looked("I7", 1)
			if !wants[wanted{e.life(), e.MountID, e.Generation}] {
				j.bad("I7", nil, "%s moved %s to generation %d, which its state did not want yet", e.Node, e.Mount, e.Generation)
			}
		}
	}, Wanted, Swap, Relabel)
	generation := map[string]uint64{}
	j.each(func(e *Event) { generation[e.Reload] = max(generation[e.Reload], e.Generation) }, Applied)
	// A node of a run that was not watched to its end may have moved after the last line of its log.
	j.each(func(e *Event) {
		if e.Phase != "switched" && e.Phase != "converged late" {
			return
		}
		node := j.nodeName[e.Of]
		if node == "" {
			return
		}
		j.looked("I6", 1)
		// A node that was away goes to what is wanted when it is back, which may be a later reload's.
		if e.Phase == "converged late" && generation[e.Reload] > 0 && highest[[2]string{node, e.MountID}] >= generation[e.Reload] {
			return
		}
		if !moved[[3]string{e.Reload, node, e.MountID}] {
			j.bad("I6", nil, "reload %s says that %s has %s mount %s, and it has not: the reload is lost there", e.Reload, node, e.Phase, e.MountID)
		}
	}, Verdict)
}

// generations is I7 as clients see it, and D of the models: nobody is answered by a generation before the node that
// answers has applied the entry that wants it, which an aborted reload never has; and what is done has been left behind.
func (j *judge) generations() {
	type place struct {
		node, mount string
		gen         uint64
	}
	since := map[place]int64{}
	j.each(func(e *Event) {
		k := place{e.Node, e.Mount, e.Generation}
		if _, known := since[k]; !known {
			since[k] = e.At
		}
	}, Wanted)
	if len(since) == 0 {
		return
	}
	for i := range j.run.Ops {
		op := &j.run.Ops[i]
		if op.Generation == 0 || op.By == "" {
			continue
		}
		j.looked("I7", 1)
		if t, known := since[place{op.By, op.Mount, op.Generation}]; !known {
			j.bad("I7", []uint64{op.ID}, "%s answered for %s with generation %d, which its state never wanted", op.By, op.Mount, op.Generation)
		} else if t > op.Return {
			j.bad("I7", []uint64{op.ID}, "%s answered for %s with generation %d before its state wanted it", op.By, op.Mount, op.Generation)
		}
	}
	j.leftBehind()
}

// leftBehind: once a reload is done, no request that begins later is answered by a generation below it, on any node.
func (j *judge) leftBehind() {
	type row struct {
		done int64
		bad  bool // somebody kept the old one, and the record says so
		gen  map[string]uint64
	}
	rows := map[string]*row{}
	at := func(id string) *row {
		if rows[id] == nil {
			rows[id] = &row{gen: map[string]uint64{}}
		}
		return rows[id]
	}
	own := map[string]bool{} // mounts that some node runs another generation of
	j.each(func(e *Event) {
		switch e.Kind {
		case Wanted:
			if e.Of != "" {
				own[e.Mount] = true
			} else if e.Reload != "" {
				at(e.Reload).gen[e.Mount] = e.Generation
			}
		case Verdict:
			if e.Phase == "refused" || e.Phase == "unconfirmed" || e.Phase == "failed switch" {
				at(e.Reload).bad = true
			}
		default:
			if e.Phase == "done" && at(e.Reload).done == 0 {
				at(e.Reload).done = e.At
			}
		}
	}, Wanted, Verdict, Applied)
	floors := map[string][]timed{} // by mount: from when on which generation is the least
	for _, r := range rows {
		if r.done == 0 || r.bad {
			continue
		}
		for mount, gen := range r.gen {
			if !own[mount] {
				floors[mount] = append(floors[mount], timed{r.done, int64(gen)})
			}
		}
	}
	for mount := range floors {
		floors[mount] = highest(floors[mount])
	}
	for i := range j.run.Ops {
		op := &j.run.Ops[i]
		if op.Generation == 0 || floors[op.Mount] == nil {
			continue
		}
		j.looked("I11", 1)
		if least := lastBefore(floors[op.Mount], op.Call, 0); int64(op.Generation) < least {
			j.bad("I11", []uint64{op.ID}, "%s answered for %s with generation %d after the reload to %d was done", op.By, op.Mount, op.Generation, least)
		}
	}
}
