package check

import (
	"slices"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"
)

// searchTime bounds the search for an order of one key's operations.
const searchTime = 20 * time.Second

// linearizable asks whether there is an order of ops that model allows. Failed operations are not in it; those that
// nobody knows of may be anywhere after their call, and are left out where nobody can have seen them.
func (j *judge) linearizable(invariant, what string, model porcupine.Model, ops []*Op, seen func(op *Op) bool) {
	history := make([]porcupine.Operation, 0, len(ops))
	for _, op := range ops {
		p := porcupine.Operation{ClientId: op.Client, Input: op, Output: op, Call: op.Call, Return: op.Return}
		switch {
		case op.Outcome == Failed && !op.Refused:
			continue
		case op.Outcome == Unknown:
			if !seen(op) {
				continue
			}
			p.Return = never
		}
		history = append(history, p)
	}
	j.looked(invariant, len(history))
	switch porcupine.CheckOperationsTimeout(model, history, searchTime) {
	case porcupine.Illegal:
		var ids []uint64
		for _, op := range ops {
			if len(ids) < 40 {
				ids = append(ids, op.ID)
			}
		}
		j.bad(invariant, ids, "no order of the %d operations on %s explains what they answered", len(history), what)
	case porcupine.Unknown:
		j.Undecided = append(j.Undecided, invariant+": "+what)
	case porcupine.Ok:
	}
}

// byKey groups the operations of some kinds.
func (j *judge) byKey(kinds ...Kind) map[string][]*Op {
	out := map[string][]*Op{}
	for i := range j.run.Ops {
		if op := &j.run.Ops[i]; slices.Contains(kinds, op.Kind) {
			out[op.Key] = append(out[op.Key], op)
		}
	}
	return out
}

// catalogModel is one row of the catalog: its sha256, "" while it is not there.
var catalogModel = porcupine.Model{
	Init: func() any { return "" },
	Step: func(state, input, _ any) (bool, any) {
		op := input.(*Op)
		switch op.Kind {
		case Register:
			if op.Refused {
				return state != "" && state != op.Input, state // a version has one sha256
			}
			// Without a version the row may be replaced; with one it keeps its sha256 until it is removed.
			return state == "" || state == op.Input || strings.HasSuffix(op.Key, "/"), op.Input
		case Deregister:
			return true, ""
		default:
			return state == op.Output, state
		}
	},
}

// catalog is I4: the catalog is linearizable, key by key.
func (j *judge) catalog() {
	for key, ops := range j.byKey(Register, Deregister, Catalog) {
		j.linearizable("I4", key, catalogModel, ops, func(op *Op) bool {
			value := op.Input
			if op.Kind == Deregister {
				value = ""
			}
			return op.Kind != Catalog && slices.ContainsFunc(ops, func(r *Op) bool {
				return r.Outcome == OK && r.Kind == Catalog && r.Output == value && r.Return >= op.Call
			})
		})
	}
}

// life is the state of one reload id: the body that made it, the id that it was answered with, and how far it is known to
// have come.
type life struct{ body, answer, phase string }

// next are the phases that a reload may be in after one, waves included.
var next = map[string][]string{
	"":             {"queued", "preparing", "committed", "done", "aborted", "rolling back", "rolled back"},
	"queued":       {"preparing", "committed", "done", "aborted", "rolling back", "rolled back"},
	"preparing":    {"committed", "done", "aborted", "rolling back", "rolled back"},
	"committed":    {"preparing", "done", "aborted", "rolling back", "rolled back"},
	"rolling back": {"rolled back"},
	"done":         {},
	"aborted":      {},
	"rolled back":  {},
}

func terminal(phase string) bool {
	after, known := next[phase]
	return known && len(after) == 0
}

// reloadModel is one reload id as clients see it.
var reloadModel = porcupine.Model{
	Init: func() any { return life{} },
	Step: func(state, input, _ any) (bool, any) {
		s, op := state.(life), input.(*Op)
		switch {
		case op.Kind == Start && op.Refused:
			return s.body != "" && s.body != op.Input, s
		case op.Kind == Start && op.Outcome == Unknown && s.body != "" && s.body != op.Input:
			return true, s // it was refused, and nobody heard
		case op.Kind == Start && s.body == "":
			return true, life{body: op.Input, answer: op.Output}
		case op.Kind == Start:
			if s.answer == "" { // the one that made it was never answered
				s.answer = op.Output
			}
			return s.body == op.Input && (op.Outcome == Unknown || s.answer == op.Output), s
		case op.Output == "":
			return s.body == "", s
		case s.body == "":
			return false, s
		case op.Output == s.phase:
			return true, s
		case slices.Contains(next[s.phase], op.Output):
			s.phase = op.Output
			return true, s
		default:
			return false, s
		}
	},
}

// reloadAnswers is the clients' half of I5 and I6: an id has one effect and one answer, its phases go forward, and the
// last one is final.
func (j *judge) reloadAnswers() {
	for key, ops := range j.byKey(Start, Status) {
		shown := slices.ContainsFunc(ops, func(op *Op) bool { return op.Outcome == OK || op.Refused })
		j.linearizable("I5", "reload "+key, reloadModel, ops, func(op *Op) bool { return op.Kind == Start && shown })
	}
}

// tokenModel is one token.
var tokenModel = porcupine.Model{
	Init: func() any { return "none" },
	Step: func(state, input, _ any) (bool, any) {
		op := input.(*Op)
		switch op.Kind {
		case TokenCreate:
			return state == "none", "active"
		case TokenRevoke:
			return true, "dead"
		default:
			return (op.Output == Allowed) == (state == "active"), state
		}
	},
}

// tokens is I21: nothing is allowed without a token that is active at some moment of the call.
func (j *judge) tokens() {
	for key, ops := range j.byKey(TokenCreate, TokenRevoke, TokenUse) {
		j.linearizable("I21", "token "+key, tokenModel, ops, func(op *Op) bool { return op.Kind != TokenUse })
	}
}
