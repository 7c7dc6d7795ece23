package check

import (
	"cmp"
	"slices"
	"time"
)

// settleTime is how long after the last fault every node must run what is wanted, where the run does not say.
const settleTime = int64(30 * time.Second)

// converged is I8: after everything is healed every node runs what it should, soon, and the nodes that should run the same
// run the same bytes.
func (j *judge) converged() {
	healed, settle := j.lastHeal(), cmp.Or(j.run.Meta.Settle, settleTime)
	type wanted struct {
		mount string
		gen   uint64
	}
	type bytes struct{ sha, node string }
	runs := map[wanted]bytes{}
	j.each(func(e *Event) {
		j.looked("I8", 1)
		if e.Generation != e.Want {
			j.bad("I8", nil, "%s runs generation %d of %s at the end and should run %d", e.Node, e.Generation, e.Mount, e.Want)
		}
		if healed != never && healed > 0 && e.At > healed+settle {
			j.bad("I8", nil, "%s took %v from the last heal until it ran what it should of %s", e.Node, time.Duration(e.At-healed), e.Mount)
		}
		k := wanted{e.Mount, e.Generation}
		if first, known := runs[k]; known && first.sha != e.SHA256 {
			j.bad("I8", nil, "generation %d of %s is %.12s on %s and %.12s on %s", e.Generation, e.Mount, first.sha, first.node, e.SHA256, e.Node)
		} else if !known {
			runs[k] = bytes{e.SHA256, e.Node}
		}
	}, Running)
	// Bytes that run were wanted by somebody: every process was started from a sha256 that the catalog held.
	named := map[string]bool{}
	j.each(func(e *Event) { named[e.SHA256] = true }, Wanted)
	for i := range j.run.Ops {
		if op := &j.run.Ops[i]; op.Kind == Register && op.Outcome != Failed {
			named[op.Input] = true
		}
	}
	if len(named) == 0 {
		return
	}
	j.each(func(e *Event) {
		j.looked("I9", 1)
		if !named[e.SHA256] {
			j.bad("I9", nil, "%s started process %d from bytes with sha256 %.12s, which nobody has registered", e.Node, e.PID, e.SHA256)
		}
	}, Exec)
}

// processes is I13: never more processes than there may be.
func (j *judge) processes() {
	j.each(func(e *Event) {
		j.looked("I13", 1)
		if e.N > e.Limit {
			j.bad("I13", nil, "%s has %d plugin processes, %s allows %d", e.Node, e.N, e.Cause, e.Limit)
		}
	}, Processes)
	// An exit must belong to a start, once.
	type process struct {
		incarnation
		pid int
	}
	alive := map[process]bool{}
	j.each(func(e *Event) {
		k := process{e.life(), e.PID}
		switch {
		case e.Kind == Exec:
			alive[k] = true
		case !alive[k]:
			j.bad("I13", nil, "process %d of %s ended, and none of that number was running", e.PID, e.Node)
		default:
			delete(alive, k)
		}
	}, Exec, Exit)
}

// progress is I16: when nothing is broken any more, every reload comes to its end and requests are answered again.
func (j *judge) progress() {
	healed := j.lastHeal()
	if healed == never || j.run.Meta.Ended < healed+j.grace() && !j.settled() {
		return // the run says nothing about the time after
	}
	phase := map[string]*Event{}
	j.each(func(e *Event) {
		if before := phase[e.Reload]; before == nil || !terminal(before.Phase) {
			phase[e.Reload] = e
		}
	}, Applied)
	for id, e := range phase {
		j.looked("I16", 1)
		if !terminal(e.Phase) {
			j.bad("I16", nil, "reload %s is still %s at the end of the run", id, e.Phase)
		}
	}
	if healed == 0 {
		return
	}
	served, asked := 0, 0
	for i := range j.run.Ops {
		if op := &j.run.Ops[i]; op.Call > healed+j.grace() || op.Kind == Final {
			asked++
			if op.Outcome == OK {
				served++
			}
		}
	}
	if asked > 0 {
		j.looked("I16", asked)
		if served == 0 {
			j.bad("I16", nil, "none of %d requests was answered after everything had been healed", asked)
		}
	}
}

// settled reports whether the run waited until everything ran what it should.
func (j *judge) settled() bool {
	return slices.ContainsFunc(j.run.Events, func(e Event) bool { return e.Kind == Running })
}
