package replica

import (
	"fmt"
	"testing"
	"time"

	"rollcall/node/fault"
)

// A node that leaves has given its lease up before anybody is told, for good; it stays a member, and comes back by its
// Hello.
func TestANodeThatLeavesServesNothingAndComesBack(t *testing.T) {
	c := newCluster(t)
	all := c.founders(3)
	for _, m := range all {
		m.start()
	}
	ready(t, all...)
	gone := all[0]
	eventually(t, 10*time.Second, gone.Serving)
	if err := gone.Leave(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := gone.Serving(); !fault.Is(err, fault.Fenced) {
		t.Errorf("it still serves: %v", err)
	}
	has := func(left bool) func() error {
		return func() error {
			for _, m := range all {
				if n := m.fsm.View().Node(gone.NodeID()); n == nil || n.GetLeft() != left {
					return fmt.Errorf("%s sees %v", m.name, n)
				}
			}
			return nil
		}
	}
	eventually(t, 10*time.Second, has(true))
	gone.stop()
	gone.start()
	ready(t, gone)
	eventually(t, 10*time.Second, has(false))
	eventually(t, 10*time.Second, gone.Serving)
}
