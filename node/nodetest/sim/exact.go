//go:build exact

package sim

import (
	"runtime"
	"runtime/debug"
	"testing/synctest"
	"time"
)

// exactly makes the garbage collector run at fixed points of virtual time, where every other goroutine is at rest, and
// nowhere else.
func exactly() (stop func()) {
	before := debug.SetGCPercent(-1)
	end := every(2*time.Second, func() {
		synctest.Wait()
		runtime.GC()
	})
	return func() { end(); debug.SetGCPercent(before) }
}

// watched is false: a watch with a clock of its own would disturb the order in which goroutines run.
const watched = false
