package sim

import (
	"crypto/sha256"
	"fmt"
	"hash"
	"slices"

	"rollcall/node/nodetest/check"
)

// Trace is the hash of one part of what happened in a run: two runs of one seed with the same hash did the same.
type Trace struct {
	Of   string
	Hash string
}

func (t Trace) String() string { return t.Of + " " + t.Hash }

// Traces are the hashes of a run, the coarse ones first: the faults as they were drawn; the log's decisions about reloads;
// everything that the nodes did, with its times; and the whole history of the clients with its times.
func (r *Result) Traces() []Trace {
	faults, decisions, events, history := sha256.New(), sha256.New(), sha256.New(), sha256.New()
	for _, f := range r.Run.Faults {
		put(faults, f.Kind, f.Target, f.Detail)
	}
	type step struct {
		index     uint64
		id, phase string
	}
	var steps []step
	for _, e := range r.Run.Events {
		put(events, e.At, e.Node, e.Kind, e.Index, e.Term, e.Reload, e.Phase, e.Mount, e.Generation, e.PID, e.Hash)
		if e.Kind == check.Applied {
			steps = append(steps, step{e.Index, e.Reload, e.Phase})
		}
	}
	slices.SortFunc(steps, func(a, b step) int {
		return slices.Compare([]string{fmt.Sprintf("%020d", a.index), a.id, a.phase}, []string{fmt.Sprintf("%020d", b.index), b.id, b.phase})
	})
	for _, s := range slices.Compact(steps) {
		put(decisions, s.id, s.phase)
	}
	for _, o := range r.Run.Ops {
		put(history, o.Call, o.Return, o.Client, o.Kind, o.Node, o.Key, o.Input, o.Output, o.Outcome, o.Generation, o.Index)
	}
	return []Trace{{"faults", sum(faults)}, {"decisions about reloads", sum(decisions)}, {"events of nodes", sum(events)}, {"history of clients", sum(history)}}
}

func put(h hash.Hash, fields ...any) { _, _ = fmt.Fprintln(h, fields...) }

func sum(h hash.Hash) string { return fmt.Sprintf("%x", h.Sum(nil)[:6]) }
