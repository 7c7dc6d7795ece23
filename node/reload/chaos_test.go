package reload

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// TestChaosLeavesEveryReloadEndedAndEveryNodeAsWanted runs reloads of every strategy through cuts, kills, elections,
// crashes, lost and repeated reports and plugins that misbehave. While it runs, the fakes watch that no mount has more
// than two processes, that nobody reports before the old process is gone, and that nothing older than what is done is
// answered. Afterwards everything must have come to rest. ROLLCALL_SEEDS runs more seeds, ROLLCALL_SEED one.
func TestChaosLeavesEveryReloadEndedAndEveryNodeAsWanted(t *testing.T) {
	seeds, first := 6, 1
	if n, err := strconv.Atoi(os.Getenv("ROLLCALL_SEEDS")); err == nil {
		seeds = n
	}
	if n, err := strconv.Atoi(os.Getenv("ROLLCALL_SEED")); err == nil {
		seeds, first = 1, n
	}
	for seed := first; seed < first+seeds; seed++ {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			bubble(t, func(t *testing.T) { newChaos(t, uint64(seed)).run() })
		})
	}
}

type chaos struct {
	*sim
	rng     *rand.Rand
	started int
	stopped chan struct{}
	clients sync.WaitGroup
}

func newChaos(t *testing.T, seed uint64) *chaos {
	c := &chaos{sim: cluster(t, 5), rng: rand.New(rand.NewPCG(seed, 7)), stopped: make(chan struct{})}
	c.enable(other, "other/")
	c.settle(other)
	c.set(func() { c.lossy = true })
	return c
}

func (c *chaos) run() {
	defer c.stop()
	var once sync.Once
	end := func() { once.Do(func() { close(c.stopped); c.clients.Wait() }) }
	defer end()
	for _, n := range c.nodes {
		for i := range 2 {
			c.clients.Go(func() { c.client(n, time.Duration(5+40*i)*time.Millisecond) })
		}
	}
	for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); {
		time.Sleep(time.Duration(100+c.rng.IntN(4000)) * time.Millisecond)
		if c.rng.IntN(2) == 0 {
			c.reloadSomething()
		} else {
			c.hurt()
		}
	}
	c.heal()
	c.until("every reload ended", 30*time.Minute, func() bool {
		for _, rl := range c.view().RunningReloads() {
			if rl.GetPaused() {
				_, _ = c.propose(&commandv1.Command{Body: &commandv1.Command_ControlReload{
					ControlReload: &commandv1.ControlReload{Id: rl.GetId(), Action: commandv1.ControlReload_ACTION_ABORT},
				}})
			}
		}
		return len(c.view().RunningReloads()) == 0
	})
	c.settle(kv)
	c.settle(other)
	c.start(startReload("last", &commandv1.Options{Version: "v2.0.0"}))
	rl := c.ended("last")
	c.phase(rl, commandv1.Phase_PHASE_DONE)
	if rl.GetOutcome() != "succeeded" {
		c.t.Errorf("the last reload: %q: %s", rl.GetOutcome(), c.describe())
	}
	c.settle(kv)
	c.settle(other)
	time.Sleep(20 * time.Second)
	end()
	c.check()
}

// check looks at what must hold when everything has come to rest.
func (c *chaos) check() {
	for _, uuid := range []string{kv, other} {
		c.allRun(uuid, "2")
		for _, n := range c.nodes {
			if n.plugins.living(uuid) != 1 {
				c.t.Errorf("%s: %d processes of %s at rest", n.id, n.plugins.living(uuid), uuid)
			}
		}
	}
	outcomes := map[string]int{}
	for _, rl := range c.view().Reloads() {
		outcomes[rl.GetOutcome()]++
		if !terminal(rl.GetPhase()) {
			c.t.Errorf("%s is %v at rest", rl.GetId(), rl.GetPhase())
		}
		for _, n := range c.nodes {
			if !proto.Equal(n.fsm.View().Reload(rl.GetId()), rl) {
				c.t.Errorf("%s has another record of %s", n.id, rl.GetId())
			}
		}
	}
	c.t.Logf("%v, %d requests served", outcomes, c.served)
	log, _ := c.entries()
	time.Sleep(time.Minute)
	if now, _ := c.entries(); now > log {
		c.t.Errorf("%d entries in a minute of rest", now-log)
	}
}

// client asks a node all the time, whatever the node is at.
func (c *chaos) client(n *simNode, took time.Duration) {
	for {
		select {
		case <-c.stopped:
			return
		case <-time.After(20 * time.Millisecond):
		}
		var r *fakeRoutes
		c.set(func() { r = n.routes })
		uuid := kv
		if took > 10*time.Millisecond {
			uuid = other
		}
		_, _ = r.request(context.Background(), uuid, took)
	}
}

func (c *chaos) reloadSomething() {
	c.started++
	o := &commandv1.Options{
		PrepareMs: ms(20 * time.Second), RunMs: ms(30 * time.Second), QueueMs: ms(5 * time.Minute), BakeMs: ms(2 * time.Second),
		Strategy:                commandv1.Strategy(1 + c.rng.IntN(4)),
		RollbackOnSwitchFailure: c.rng.IntN(2) == 0,
		Version:                 []string{"", "v1.0.0", "v2.0.0"}[c.rng.IntN(3)],
	}
	st := startReload(fmt.Sprintf("r%d", c.started), o)
	if c.rng.IntN(4) == 0 {
		st.Scope, st.ServingNode, o.Version = commandv1.Scope_SCOPE_LOCAL, c.nodes[c.rng.IntN(5)].id, ""
		if o.Strategy > commandv1.Strategy_STRATEGY_BEST_EFFORT {
			o.Strategy = commandv1.Strategy_STRATEGY_ALL_OR_NOTHING
		}
	}
	c.set(func() {
		if c.leader != nil {
			st.LeaderId = c.leader.id
		}
	})
	st.RequestHash = nil
	_, _ = c.propose(&commandv1.Command{Body: &commandv1.Command_StartReload{StartReload: st}})
}

// hurt does one bad thing. What takes time to end, ends in heal at the latest.
func (c *chaos) hurt() {
	n := c.nodes[c.rng.IntN(5)]
	var leads, up, cut bool
	c.set(func() { leads, up, cut = c.leader == n, n.up, n.cut })
	switch c.rng.IntN(8) {
	case 0: // cut a node off, or let it back
		if !up {
			return
		}
		if leads {
			n.isolate(true)
			c.another(n)
		} else {
			n.isolate(!cut)
		}
		c.expireLease(n)
	case 1, 2: // kill a node, or start it again
		if up {
			if leads {
				c.another(n)
			}
			n.stop()
			c.expireLease(n)
		} else if c.led() {
			n.start()
		}
	case 3: // another leader
		c.another(nil)
	case 4: // a plugin crashes
		if up {
			if p := n.plugins.newest([]string{kv, other}[c.rng.IntN(2)]); p != nil {
				p.die(errors.New("signal: segmentation fault"))
			}
		}
	case 5: // the wire loses and repeats
		from := uint64(c.rng.IntN(1000))
		c.set(func() {
			calls := from
			c.wire = func(*simNode, string) (drop, lose, twice bool) {
				var now uint64 // calls are made from many goroutines at once
				c.set(func() {
					calls = calls*6364136223846793005 + 1442695040888963407
					now = calls
				})
				return now>>60 < 5, now>>56&15 < 5, now>>52&15 < 5
			}
		})
	case 6: // bytes that misbehave on one node
		bad := []behaviour{
			{ensure: errors.New("no such file")},
			{start: errors.New("exec format error"), startTook: time.Second},
			{setup: errors.New("bad configuration"), multiplexes: true},
			{switchErr: errors.New("bad state"), multiplexes: true},
			{diesAfter: 300 * time.Millisecond, multiplexes: true},
			{startTook: 8 * time.Second, multiplexes: true},
			{startTook: 30 * time.Millisecond, closeTook: 3 * time.Second},
			{multiplexes: true, assume: fault.New(fault.Refused, "initialize", "", "reads its role once")},
		}
		n.plugins.act(sha([]string{"1", "2"}[c.rng.IntN(2)]), bad[c.rng.IntN(len(bad))])
	case 7: // bytes that behave again
		for _, m := range c.nodes {
			c.good(m)
		}
	}
}

func (c *chaos) good(n *simNode) {
	for _, s := range []string{"1", "2"} {
		n.plugins.act(sha(s), behaviour{
			multiplexes: c.rng.IntN(2) == 0, startTook: 30 * time.Millisecond, closeTook: 5 * time.Millisecond,
		})
	}
}

// expireLease lets a node's lease be over a while from now, if it is still away then.
func (c *chaos) expireLease(n *simNode) {
	incarnation := n.incarnation
	time.AfterFunc(5300*time.Millisecond, func() {
		c.set(func() { n.leaseOver = (n.cut || !n.up) && n.incarnation == incarnation })
	})
}

// another elects a node that is up, not cut off and not this one; without one there is no leader.
func (c *chaos) another(not *simNode) {
	c.elect(nil)
	time.Sleep(time.Duration(500+c.rng.IntN(1500)) * time.Millisecond)
	for _, i := range c.rng.Perm(len(c.nodes)) {
		n := c.nodes[i]
		fit := false
		c.set(func() { fit = n != not && n.up && !n.cut })
		if fit {
			c.elect(n)
			return
		}
	}
}

// led reports whether somebody leads, after an election where nobody did.
func (c *chaos) led() (ok bool) {
	c.set(func() { ok = c.leader != nil })
	if !ok {
		c.another(nil)
		c.set(func() { ok = c.leader != nil })
	}
	return ok
}

func (c *chaos) heal() {
	c.set(func() { c.wire = nil })
	for _, n := range c.nodes {
		c.good(n)
		up := false
		c.set(func() { up = n.up })
		if up {
			n.isolate(false)
		}
	}
	leads := c.led()
	for _, n := range c.nodes {
		up := false
		c.set(func() { up = n.up })
		if up {
			continue
		}
		if !leads {
			// Nobody was up. The first to boot leads.
			c.set(func() { c.term++; c.leader, c.stamp, leads = n, time.Now(), true })
		}
		n.start()
	}
}
