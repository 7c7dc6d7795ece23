package check

// incarnation is one life of one node.
type incarnation struct {
	node string
	boot uint64
}

func (e *Event) life() incarnation { return incarnation{e.Node, e.Boot} }

// leaders is I1: at most one leader a term, and no node's terms go back, restarts included. A leader whose disk hung gives
// the office up without an election, and may take it up again in the same term.
func (j *judge) leaders() {
	who := map[uint64]string{}
	last, life := map[string]uint64{}, map[string]incarnation{}
	j.each(func(e *Event) {
		j.looked("I1", 1)
		if other, taken := who[e.Term]; taken && other != e.Node {
			j.bad("I1", nil, "%s and %s both led term %d", other, e.Node, e.Term)
		}
		who[e.Term] = e.Node
		if e.Term < last[e.Node] || e.Term == last[e.Node] && e.life() != life[e.Node] {
			j.bad("I1", nil, "%s led term %d after term %d", e.Node, e.Term, last[e.Node])
		}
		last[e.Node], life[e.Node] = max(last[e.Node], e.Term), e.life()
	}, Leader)
}

// digests is I2: states at one index are the same everywhere, whichever way they came about, and no node goes back while
// it lives, but for an operator's restore.
func (j *judge) digests() {
	type sum struct {
		hash string
		term uint64
		node string
	}
	at := map[uint64]sum{}
	index := map[incarnation]uint64{}
	j.each(func(e *Event) {
		if e.Kind == Restored && e.Cause == OperatorRestore {
			index[e.life()] = e.Index
			return
		}
		if before := index[e.life()]; e.Index < before || e.Kind == Digest && e.Index == before {
			j.bad("I2", nil, "the state of %s (incarnation %d) went from index %d to %d", e.Node, e.Boot, before, e.Index)
		}
		index[e.life()] = max(index[e.life()], e.Index)
		if e.Kind != Digest {
			return
		}
		j.looked("I2", 1)
		if e.Hash == "" {
			j.bad("I2", nil, "%s has no digest at index %d: %s", e.Node, e.Index, e.Cause)
			return
		}
		first, known := at[e.Index]
		if !known {
			at[e.Index] = sum{e.Hash, e.Term, e.Node}
			return
		}
		if first.hash != e.Hash || first.term != e.Term {
			j.bad("I2", nil, "at index %d the state of %s is %.12s (term %d), that of %s %.12s (term %d)",
				e.Index, first.node, first.hash, first.term, e.Node, e.Hash, e.Term)
		}
	}, Digest, Restored)
}
