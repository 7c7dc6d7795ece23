package fsm

import (
	"crypto/sha256"

	"github.com/hashicorp/raft"

	commandv1 "rollcall/proto/command/v1"
)

// Witness is an Observer that also sees every command as it is applied: what the test suites judge a cluster by. A node
// has none unless it is given one.
type Witness interface {
	Observer
	// Applied is called after each command on Apply's goroutine, before anybody else can see what it changed, so whatever
	// happens because of the command happens after the call. view is the state after exactly this command; it may be
	// called during the call only, and what it returns may be kept. It must not block, nor call the FSM.
	Applied(l *raft.Log, res *commandv1.Result, view func() *View)
	// Replaced is called when a snapshot has replaced the state, under the same rules, before Restored.
	Replaced(v *View)
}

// witness tells the witnesses of one command. It is called with mu held.
func (f *FSM) witness(l *raft.Log, res *commandv1.Result) {
	if len(f.witnesses) == 0 {
		return
	}
	var v *View
	view := func() *View {
		if v == nil {
			v = &View{s: f.s.copy()}
		}
		return v
	}
	for _, w := range f.witnesses {
		w.Applied(l, res, view)
	}
}

// Digest is the SHA-256 of the state's snapshot: equal states have equal digests. It reads everything.
func (v *View) Digest() ([sha256.Size]byte, error) {
	h := sha256.New()
	err := v.WriteSnapshot(h)
	return [sha256.Size]byte(h.Sum(nil)), err
}
