package replica

import "sync"

// calls counts what is under way, and lets nothing more begin once it is shut: so what must not outlive Raft or its stores can be
// waited for.
type calls struct {
	mu   sync.Mutex // guards over and additions to wg
	over bool
	wg   sync.WaitGroup
}

// begin admits a call, which says done when it has ended; false once shut.
func (c *calls) begin() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.over {
		return false
	}
	c.wg.Add(1)
	return true
}

func (c *calls) done() { c.wg.Done() }

// shut admits nothing from now on. What is under way goes on.
func (c *calls) shut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.over = true
}

// wait waits for what was admitted; call it after shut.
func (c *calls) wait() { c.wg.Wait() }
