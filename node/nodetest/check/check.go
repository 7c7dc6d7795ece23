package check

import (
	"math"
	"slices"
)

// never is the time of what has not happened, or may happen at any time.
const never = math.MaxInt64

// Check judges a run. It may take seconds for hundreds of thousands of operations; inside a bubble of virtual time it must
// not be called, because the search's time limit would never come.
func Check(run *Run) *Report {
	r := &Report{Looked: map[string]int{}, Ops: len(run.Ops), Events: len(run.Events), Faults: len(run.Faults)}
	for i := range run.Ops {
		switch run.Ops[i].Outcome {
		case OK:
			r.OK++
		case Unknown:
			r.Unknown++
		default:
			r.Failed++
		}
	}
	j := &judge{run: run, Report: r}
	j.names()
	j.recording()
	j.leaders()
	j.digests()
	j.data()
	j.catalog()
	j.reloads()
	j.reloadAnswers()
	j.swaps()
	j.generations()
	j.converged()
	j.failures()
	j.order()
	j.once()
	j.processes()
	j.progress()
	j.tokens()
	return r
}

// judge is one Check under way.
type judge struct {
	run *Run
	*Report
	// nodeName finds a node's name by its id.
	nodeName map[string]string
}

func (j *judge) names() {
	j.nodeName = map[string]string{}
	for i := range j.run.Events {
		if e := &j.run.Events[i]; e.Kind == Boot && e.NodeID != "" {
			j.nodeName[e.NodeID] = e.Node
		}
	}
}

// each calls fn for the events of the kinds given, in order of time.
func (j *judge) each(fn func(e *Event), kinds ...EventKind) {
	for i := range j.run.Events {
		if slices.Contains(kinds, j.run.Events[i].Kind) {
			fn(&j.run.Events[i])
		}
	}
}

// recording finds a record that cannot be: what it holds shows that something is missing in it.
func (j *judge) recording() {
	kinds := map[EventKind]int{}
	for i := range j.run.Events {
		kinds[j.run.Events[i].Kind]++
	}
	verdicts := 0
	j.each(func(e *Event) {
		if e.Phase == "switched" {
			verdicts++
		}
	}, Verdict)
	if verdicts > 0 && kinds[Swap]+kinds[Relabel] == 0 {
		j.bad("recording", nil, "%d verdicts say switched, and no node has said so in its log: was the line renamed?", verdicts)
	}
	if kinds[Swap] > 0 && kinds[Exec] == 0 {
		j.bad("recording", nil, "%d swaps, and no process was started: was the line renamed?", kinds[Swap])
	}
	if kinds[Applied] > 0 && kinds[Leader] == 0 {
		j.bad("recording", nil, "reloads were applied, and no node has said that it leads: was the line renamed?")
	}
	ids := map[uint64]bool{}
	for i := range j.run.Ops {
		op := &j.run.Ops[i]
		if ids[op.ID] {
			j.bad("recording", []uint64{op.ID}, "operation %d is in the history twice", op.ID)
		}
		ids[op.ID] = true
		if op.Return < op.Call {
			j.bad("recording", []uint64{op.ID}, "operation %d ends before it begins", op.ID)
		}
	}
	j.looked("recording", len(j.run.Events)+len(j.run.Ops))
}
