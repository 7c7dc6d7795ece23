package reload

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestAMountThatComesBackWhileItsReconcilerEndsIsServedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSim(t, 1)
		defer s.stop()
		s.register("v1.0.0", "1")
		s.nodes[0].plugins.act(sha("1"), behaviour{multiplexes: true, startTook: 30 * time.Millisecond, closeTook: 5 * time.Second})
		s.enable(kv, "kv/")
		s.settle(kv)
		s.disable("kv/")
		time.Sleep(time.Second) // its process is still ending
		s.enable(kv, "kv/")     // under the same uuid, as a restored snapshot does
		s.until("served again", time.Minute, func() bool {
			g, ready := s.nodes[0].routes.Running(kv)
			return ready && g == s.nodes[0].fsm.View().Mount(kv).GetWanted().GetGeneration()
		})
	})
}
