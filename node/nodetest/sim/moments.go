//go:build failpoints

package sim

import (
	"fmt"
	"sync"

	"rollcall/node/failpoint"
)

// Moment is a step of a reload at which a node may be killed.
type Moment struct {
	Name string
	At   failpoint.Site
	// By is whose hit counts: ByVictim, ByLeader, or "": the K-th node that comes by.
	By string
	K  int
	// After is a place that must have been passed before the hit counts.
	After failpoint.Site
	// Only restricts the victims: some steps are the leader's alone, and no other node passes them.
	Only string
	// Processes says that only real plugin processes pass there.
	Processes bool
}

// Whose hit counts, and who may be the victim.
const (
	ByVictim = "victim"
	ByLeader = "leader"
	Follower = "follower"
)

// Moments are the steps of a reload on a cluster of so many nodes, in their order.
func Moments(nodes int) []Moment {
	out := []Moment{
		{Name: "received", At: failpoint.ReloadReceived, By: ByVictim},
		{Name: "proposed", At: failpoint.ReloadProposed, By: ByLeader},
		{Name: "proposed, on the leader's disk", At: failpoint.DiskFsync, By: ByLeader, After: failpoint.ReloadProposed},
		{Name: "preparing applied", At: failpoint.ReloadPreparingApplied, By: ByVictim},
		{
			Name: "process started", At: failpoint.ProcessStarted, By: ByVictim, After: failpoint.ReloadPreparingApplied,
			Processes: true,
		},
		{Name: "trial", At: failpoint.ReloadTrial, By: ByVictim},
	}
	for k := range nodes {
		out = append(out, Moment{Name: fmt.Sprintf("prepared report %d", k+1), At: failpoint.ReloadPreparedReport, K: k + 1})
	}
	for k := range nodes - 1 { // the last one may have been counted when it is heard again
		out = append(out, Moment{Name: fmt.Sprintf("prepared report heard, %d", k+1), At: failpoint.ReloadPreparedHeard, By: ByLeader, K: k + 1})
	}
	out = append(out,
		Moment{Name: "switch proposed", At: failpoint.ReloadSwitchProposed, By: ByLeader},
		Moment{Name: "switch about to be written", At: failpoint.DiskAppend, By: ByLeader, After: failpoint.ReloadSwitchProposed},
		Moment{Name: "switch on the leader's disk", At: failpoint.DiskFsync, By: ByLeader, After: failpoint.ReloadSwitchProposed},
		Moment{Name: "switch applied", At: failpoint.ReloadSwitchApplied, By: ByVictim},
		Moment{Name: "gate closed", At: failpoint.ReloadGateClosed, By: ByVictim},
		Moment{Name: "take-over proposed", At: failpoint.TakeOverProposed, By: ByLeader, After: failpoint.ReloadSwitchApplied},
		Moment{Name: "take-over on the leader's disk", At: failpoint.DiskFsync, By: ByLeader, After: failpoint.TakeOverProposed},
		Moment{Name: "take-over applied", At: failpoint.TakeOverApplied, By: ByLeader, After: failpoint.ReloadSwitchApplied},
		Moment{Name: "take-over seen", At: failpoint.TakeOverSeen, By: ByVictim, After: failpoint.ReloadSwitchApplied, Only: Follower},
	)
	for k := range nodes {
		out = append(out, Moment{Name: fmt.Sprintf("switched report %d", k+1), At: failpoint.ReloadSwitchedReport, K: k + 1})
	}
	return append(out,
		Moment{Name: "draining", At: failpoint.ReloadDraining, By: ByVictim},
		Moment{Name: "done", At: failpoint.ReloadDone, By: ByVictim},
	)
}

// Case is a moment and whom it hits.
type Case struct {
	Moment
	Victim string // ByLeader or Follower
}

func (k Case) String() string { return k.Victim + " at " + k.Name }

// Cases are the moments with each victim that they can have.
func Cases(nodes int) []Case {
	var all []Case
	for _, m := range Moments(nodes) {
		for _, victim := range []string{ByLeader, Follower} {
			if m.Only == "" || m.Only == victim {
				all = append(all, Case{m, victim})
			}
		}
	}
	return all
}

// Trigger arms the failpoint of the moment: kill is called once, at the hit that counts, on the goroutine that hits; dead is
// what the victim's own hits return from then on.
func (k Case) Trigger(victim, leader string, kill func(), dead error) (disarm func()) {
	came := newCount()
	rule := failpoint.Rule{Site: k.At, After: k.After, Do: func(e failpoint.Event) error {
		if !came.reached(e.Node, k.K, k.By == ByLeader) {
			return nil
		}
		came.once.Do(kill)
		if e.Node == victim {
			return dead
		}
		return nil
	}}
	switch k.By {
	case ByVictim:
		rule.Node = victim
	case ByLeader:
		rule.Node = leader
	}
	return failpoint.Arm(rule)
}

// count counts who came by a place: nodes, each once, or hits.
type count struct {
	once sync.Once
	mu   sync.Mutex
	hits int
	who  map[string]bool
}

func newCount() *count { return &count{who: map[string]bool{}} }

// reached notes a hit, and reports whether it is the k-th or a later one: of all hits, or of the nodes.
func (c *count) reached(node string, k int, hits bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hits++
	c.who[node] = true
	if hits {
		return c.hits >= k
	}
	return len(c.who) >= k
}
