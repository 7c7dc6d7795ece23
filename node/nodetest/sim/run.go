// Package sim runs whole clusters in virtual time: the real nodes, with raft, fsm, replica, reload, router, transport and
// HTTP door, over a network in memory, on simulated disks, with plugins that are values in memory and gossip that is
// simulated. Clients work on them, operators reload, and a nemesis breaks whatever can break, all drawn from one seed. At
// the end everything is healed, the cluster must come to rest, and package check judges the record. See DESIGN.md beside
// node/nodetest.
package sim

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"rollcall/node/api"
	"rollcall/node/nodetest/check"
)

// Result is what one run gives.
type Result struct {
	Options Options
	Run     *check.Run
	// Virtual and Wall are how long it took.
	Virtual, Wall time.Duration
	// Reloads counts them by outcome, Faults by kind.
	Reloads, Faults map[string]int
	// Log is what the nodes said, the newest.
	Log []byte
	// Wrong is what was seen to be wrong while it ran; the checker's violations come on top.
	Wrong []string
}

// Simulate runs one cluster in a bubble of virtual time. dir takes small files.
func Simulate(t *testing.T, opt Options, dir string) *Result {
	t.Helper()
	if opt.Clients == 0 {
		opt.Clients = 12
	}
	res := &Result{Options: opt, Reloads: map[string]int{}}
	began := time.Now()
	log, alive := &journal{}, &pulse{}
	defer alive.watch(opt.For, res.Command())()
	synctest.Test(t, func(t *testing.T) {
		from := time.Now()
		c, err := newCluster(opt, dir, log.handler(from))
		if err != nil {
			t.Fatal(err)
		}
		c.alive = alive
		defer c.beat()()
		if err := c.simulate(res); err != nil {
			c.bad("%v", err)
		}
		c.stop()
		res.Virtual = time.Since(from)
		c.leave()
		res.Wrong, res.Run = c.wrong, c.rec.Run()
	})
	res.Wall, res.Log = time.Since(began), log.bytes()
	return res
}

// simulate is the whole of a run, up to where everything has come to rest.
func (c *cluster) simulate(res *Result) error {
	c.rec.Describe(func(m *check.Meta) {
		m.Suite, m.Seed = "simulation", c.opt.Seed
		// rest waits for the nodes itself, and asks them what they run after one more reload, which may have waited.
		m.Settle = int64(10 * time.Minute)
		m.Nodes = c.names()
	})
	if err := c.start(); err != nil {
		return err
	}
	if err := c.settled(time.Minute); err != nil {
		return fmt.Errorf("the cluster does not come up: %w", err)
	}
	op := c.newOperator()
	if err := op.prepare(); err != nil {
		return err
	}
	if err := c.settled(time.Minute); err != nil {
		return fmt.Errorf("the mounts do not come up: %w", err)
	}
	nem := newNemesis(c, op)
	res.Faults = nem.count
	begun := c.rec.Fault("load", "", "faults are drawn")
	stop := c.probes()
	c.startClients()
	c.load.Go(op.work)
	c.load.Go(nem.work)
	time.Sleep(c.opt.For)
	close(c.ended)
	c.load.Wait()
	nem.healAll()
	begun()
	c.tally(res)
	c.rec.Describe(func(m *check.Meta) { m.Nodes = c.names() })
	defer stop()
	return errors.Join(c.rest(op, res))
}

// probes keeps the simulated gossip going, and a lazy disk.
func (c *cluster) probes() (stop func()) {
	return every(time.Second, func() {
		c.gossip.probe()
		for _, m := range c.members() {
			m.disk.sync()
		}
	})
}

// beat tells the outside that virtual time goes on.
func (c *cluster) beat() (stop func()) {
	return every(time.Second, func() { c.alive.beats.Add(1) })
}

// every calls f each d until the answer is called.
func every(d time.Duration, f func()) (stop func()) {
	end, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-end:
				return
			case <-time.After(d):
				f()
			}
		}
	}()
	return func() { close(end); <-done }
}

// The bounds of the end: every node serves soon after the last heal; a reload ends when its own deadlines say so.
const (
	restWithin   = 45 * time.Second // 30 s, and an election after everything was killed
	reloadsEnded = 5 * time.Minute
)

// rest waits until the healed cluster has come to rest, and asks what it holds.
func (c *cluster) rest(op *operator, res *Result) error {
	healed := time.Now()
	if err := c.settled(restWithin); err != nil {
		return fmt.Errorf("%v after the last heal: %w", time.Since(healed), err)
	}
	if err := c.membership(restWithin); err != nil {
		return fmt.Errorf("%v after the last heal: %w", time.Since(healed), err)
	}
	op.restoreEnds()
	if err := c.reloadsEnd(op); err != nil {
		return err
	}
	if err := c.settled(restWithin); err != nil {
		return fmt.Errorf("after the last reload: %w", err)
	}
	if err := c.lastReload(op); err != nil {
		return err
	}
	if err := c.settled(restWithin); err != nil {
		return err
	}
	c.finals(op)
	op.scratches()
	c.whatRuns()
	c.countReloads(res)
	return nil
}

// reloadsEnd waits for every reload to end; one that is paused is an operator's to end.
func (c *cluster) reloadsEnd(op *operator) error {
	var ids []string
	for end := time.Now().Add(reloadsEnded); time.Now().Before(end); time.Sleep(time.Second) {
		running, paused, ok := op.running()
		if ok && len(running) == 0 {
			return nil
		}
		for _, id := range paused {
			op.plain("PUT", "sys/reloads/"+id+"/abort", map[string]string{"why": "the run is over"})
		}
		ids = running
	}
	return fmt.Errorf("reloads %v have not ended %v after the last heal", ids, reloadsEnded)
}

// lastReload brings everything to one version: in a whole cluster a reload succeeds on every node.
func (c *cluster) lastReload(op *operator) error {
	op.plain("DELETE", "sys/plugins/pins/secret/"+plugin, nil)
	op.start(map[string]any{"reload_id": "last", "plugin": plugin, "scope": "global", "version": versions[1]})
	if err := c.reloadsEnd(op); err != nil {
		return err
	}
	a, err := op.ask(op.any(), "GET", "sys/reloads/last", c.token, nil)
	if err := told(a, err); err != nil {
		return fmt.Errorf("read the last reload: %w", err)
	}
	if got := a.data("outcome"); got != api.OutcomeSucceeded {
		return fmt.Errorf("the last reload in a healed cluster: outcome %q: %s", got, a.body)
	}
	return nil
}

// finals reads every key once more.
func (c *cluster) finals(op *operator) {
	for _, key := range append(c.keys(), "hot") {
		for range 3 { // an answer may be "not now" while leadership settles
			if op.get(check.Final, key).Outcome == check.OK {
				break
			}
			time.Sleep(time.Second)
		}
	}
}

// whatRuns tells the record what every node runs, and what it should.
func (c *cluster) whatRuns() {
	for _, m := range c.members() {
		n := m.running()
		if n == nil {
			c.bad("%s does not run at the end", m.name)
			continue
		}
		view := n.State().View()
		running := n.Reloads().Running()
		for _, s := range running {
			mount := view.Mount(s.MountUUID)
			if mount == nil {
				continue
			}
			want := view.Wanted(mount, n.ID())
			m.events.Event(check.Event{
				Kind: check.Running, Mount: mount.GetPath(), MountID: s.MountUUID, Generation: s.Generation, SHA256: s.Spec.GetSha256(),
				PID: s.PID, Want: want.GetGeneration(),
			})
		}
		l := m.plugins()
		l.mu.Lock()
		now, most := len(l.procs), l.most
		l.mu.Unlock()
		m.events.Event(check.Event{Kind: check.Processes, N: now, Limit: len(view.Mounts()), Cause: "a mount at rest"})
		m.events.Event(check.Event{Kind: check.Processes, N: most, Limit: 2 * mostMounts, Cause: "a mount while it is reloaded"})
	}
}

// mostMounts is how many mounts there ever are: two, and two that come and go.
const mostMounts = 4

// countReloads counts the reloads by how they ended.
func (c *cluster) countReloads(res *Result) {
	last := map[string]string{}
	for _, e := range c.rec.Run().Events {
		if e.Kind == check.Applied {
			last[e.Reload] = e.Phase
		}
	}
	for _, phase := range last {
		res.Reloads[phase]++
	}
}

// leave ends what is not a node.
func (c *cluster) leave() {
	for _, k := range c.callers {
		k.http.CloseIdleConnections()
	}
	time.Sleep(3 * time.Minute) // what still waits for its time-out
}

// Outcomes are the counts of a map in a fixed order, for tables.
func Outcomes(m map[string]int) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	out := make([]string, len(keys))
	for i, k := range keys {
		out[i] = fmt.Sprintf("%d %s", m[k], k)
	}
	return out
}
