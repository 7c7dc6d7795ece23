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

// overLimit is how much longer than its load a run may last, in virtual time.
const overLimit = time.Hour

// pulse is beaten from within the bubble. It must be watched from outside, where time goes on.
type pulse struct{ beats atomic.Int64 }

// watch ends the process, with what every goroutine does, when the pulse stops: in a bubble of virtual time a goroutine
// that waits for a mutex, or one that spins, stops the clock, and the test would hang until its limit. So it does when
// the run should long be over: something in it waits for what never comes, while the nodes' clocks go on.
func (p *pulse) watch(load time.Duration, command string) (stop func()) {
	end, ready := make(chan struct{}), make(chan struct{})
	go func() {
		last, since := p.beats.Load(), time.Now()
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		deep()
		close(ready)
		for {
			select {
			case <-end:
				return
			case <-tick.C:
			}
			if now := p.beats.Load(); now != last {
				last, since = now, time.Now()
			}
			var why string
			if time.Since(since) > stallLimit {
				why = fmt.Sprintf("virtual time has stood still for %v after %d s; a mutex is held over a wait, or something spins", stallLimit, last)
			}
			if at := time.Duration(last) * time.Second; at > load+overLimit {
				why = fmt.Sprintf("after %v of virtual time the run is not over; something waits for ever", at)
			}
			if why != "" {
				_ = pprof.Lookup("goroutine").WriteTo(os.Stderr, 2)
				panic(why + ". Again: " + command)
			}
		}
	}()
	<-ready
	return func() { close(end) }
}

// deep makes the stack of its goroutine as large as it will ever need to be. The watcher ticks by the clock on the wall: if it took
// memory when it does, what the bubble takes later would lie elsewhere, and a seed would not repeat (see package exact).
//
//go:noinline
func deep() (sum byte) {
	var room [16 << 10]byte
	for i := range room {
		room[i] = byte(i)
		sum += room[(i*7)%len(room)]
	}
	return sum
}
