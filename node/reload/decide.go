package reload

import (
	commandv1 "rollcall/proto/command/v1"
)

// situation is what a reconciler knows when it decides what to do next. It holds no live thing, so decide is a pure
// function that a table can test.
type situation struct {
	wanted *commandv1.Wanted
	role   Role

	// What runs: its generation's Wanted (nil when nothing was ever started), its role, whether its process lives, and
	// whether the last switch left the route in doubt, so that only another switch may touch it.
	running     *commandv1.Wanted
	runningRole Role
	alive       bool
	doubtful    bool

	// restored: the state was replaced by a snapshot since the last switch, so generations may go down.
	restored bool
	// refused is the generation that this node has refused (best effort) and waits to be excused from.
	refused uint64
	// retiring: the process before the running one has not ended yet.
	retiring bool
	// spare: a second process stands ready.
	spare bool
	// asked: a reload asks for this node's vote, and this incarnation has not tried yet.
	asked bool
}

// action is the one thing to do next.
type action int

const (
	nothing action = iota
	// relabel: the same process serves the wanted generation.
	relabel
	// bring: start what is wanted (or use the spare), and switch to it.
	bring
	// revive: start again what ran and died.
	revive
	// assume: tell the running process its new role.
	assume
	// prepare: start and try a process beside the running one, and vote.
	prepare
	// await: something must be done, but a process that is still ending holds its place.
	await
)

// decide compares what is wanted with what runs. At most two processes of a mount exist: nothing that needs another one
// is chosen while the one before the running one still ends.
func decide(s situation) action {
	switch {
	case s.wanted == nil:
		return nothing
	case s.running == nil:
		return bring
	case s.moves():
		if s.alive && !s.doubtful && sameSpec(s.running.GetSpec(), s.wanted.GetSpec()) &&
			s.running.GetGeneration() >= s.wanted.GetFreshSince() {
			return relabel
		}
		return s.room(bring)
	case !s.alive || s.doubtful:
		return s.room(revive)
	case s.role != s.runningRole:
		return assume
	case s.asked && !s.spare:
		return s.room(prepare)
	default:
		return nothing
	}
}

// moves reports whether the wanted generation is one to go to: never a lower one, except after a restored snapshot.
func (s situation) moves() bool {
	want, have := s.wanted.GetGeneration(), s.running.GetGeneration()
	if want == s.refused {
		return false
	}
	return want > have || s.restored && want != have
}

// room answers a, or await when the running process lives and another is still ending.
func (s situation) room(a action) action {
	if s.retiring && (s.alive || s.spare) {
		return await
	}
	return a
}
