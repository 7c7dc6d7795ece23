package sim

import (
	"fmt"
	"os"
	"runtime/pprof"
	"sync/atomic"
	"time"
)

// stallLimit is how long, on the wall, virtual time may stand still. A loaded machine takes a second for a virtual second.
const stallLimit = time.Minute

// pulse is beaten from within the bubble. It must be watched from outside, where time goes on.
type pulse struct{ beats atomic.Int64 }

// watch ends the process, with what every goroutine does, when the pulse stops: in a bubble of virtual time a goroutine
// that waits for a mutex, or one that spins, stops the clock, and the test would hang until its limit.
func (p *pulse) watch(command string) (stop func()) {
	end := make(chan struct{})
	go func() {
		last, since := p.beats.Load(), time.Now()
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-end:
				return
			case <-tick.C:
			}
			if now := p.beats.Load(); now != last {
				last, since = now, time.Now()
			}
			if time.Since(since) > stallLimit {
				_ = pprof.Lookup("goroutine").WriteTo(os.Stderr, 2)
				panic(fmt.Sprintf("virtual time has stood still for %v after %d s; a mutex is held over a wait, or something spins. Again: %s",
					stallLimit, last, command))
			}
		}
	}()
	return func() { close(end) }
}
