package sim

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"
)

// nemesis breaks things, by a schedule that is drawn from the seed alone: what is broken when does not depend on what the
// cluster makes of it, but for who leads.
type nemesis struct {
	c   *cluster
	op  *operator
	rng *rand.Rand
	// under are the faults that last, each with what ends it.
	mu    sync.Mutex
	under map[int]func()
	next  int
	count map[string]int
	wg    sync.WaitGroup
}

// faultEvery is the pause between two faults, on average.
const faultEvery = 5 * time.Second

// broken is a fault that was begun.
type broken struct {
	target, detail string
	// heal ends it; nil when there is nothing to end.
	heal func()
	// least and most bound how long it lasts.
	least, most time.Duration
}

// kinds are the faults, with how often each is drawn. begin returns nil where it does not apply now.
var kinds = []struct {
	name   string
	weight int
	begin  func(n *nemesis) *broken
}{
	{"kill", 4, func(n *nemesis) *broken { return n.kill(n.some(), false) }},
	{"power loss", 3, func(n *nemesis) *broken { return n.kill(n.some(), true) }},
	{"kill all", 1, (*nemesis).killAll},
	{"pause", 3, (*nemesis).pause},
	{"isolate", 3, (*nemesis).isolate},
	{"partition", 2, (*nemesis).partition},
	{"one-way cut", 3, (*nemesis).oneWay},
	{"flapping link", 1, (*nemesis).flap},
	{"loss", 2, (*nemesis).loss},
	{"delay", 2, (*nemesis).delay},
	{"reset", 3, (*nemesis).reset},
	{"slow disk", 2, (*nemesis).slowDisk},
	{"hung disk", 2, (*nemesis).hungDisk},
	{"plugin fails", 8, (*nemesis).pluginFails},
	{"plugin crash", 4, (*nemesis).pluginCrash},
	{"crash loop", 1, (*nemesis).crashLoop},
	{"step down", 2, (*nemesis).stepDown},
	{"leave", 1, (*nemesis).leave},
	{"new disk", 1, (*nemesis).newDisk},
	{"join", 2, (*nemesis).join},
	{"leave for good", 1, (*nemesis).leaveForGood},
	{"snapshot", 2, (*nemesis).snapshot},
}

func newNemesis(c *cluster, op *operator) *nemesis {
	n := &nemesis{c: c, op: op, rng: rngOf(c.opt.Seed, "nemesis"), under: map[int]func(){}, count: map[string]int{}}
	op.strike = n.strike
	return n
}

// work breaks something now and then until the load ends.
func (n *nemesis) work() {
	total := 0
	for _, k := range kinds {
		total += k.weight
	}
	for n.wait(between(n.rng, faultEvery/5, 9*faultEvery/5)) {
		draw := n.rng.IntN(total)
		for _, k := range kinds {
			if draw -= k.weight; draw >= 0 {
				continue
			}
			if b := k.begin(n); b != nil {
				n.begun(k.name, b)
			}
			break
		}
	}
}

// wait reports whether the load goes on after d.
func (n *nemesis) wait(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-n.c.ended:
		return false
	}
}

// begun keeps a fault in the journal and ends it when its time is over.
func (n *nemesis) begun(kind string, b *broken) { n.lasts(kind, b, n.rng) }

// lasts is begun with another source for how long.
func (n *nemesis) lasts(kind string, b *broken, rng *rand.Rand) {
	healed := n.c.rec.Fault(kind, b.target, b.detail)
	n.c.note("fault: %s %s %s", kind, b.target, b.detail)
	n.mu.Lock()
	n.count[kind]++
	id := n.next
	n.next++
	n.mu.Unlock()
	if b.heal == nil {
		healed()
		return
	}
	over, begun := make(chan struct{}), false
	end := func() { // once; no sync.OnceFunc, which makes the second one wait at a mutex
		n.mu.Lock()
		second := begun
		begun = true
		n.mu.Unlock()
		if second {
			<-over
			return
		}
		defer close(over)
		b.heal()
		healed()
		n.c.note("healed: %s %s", kind, b.target)
		n.mu.Lock()
		defer n.mu.Unlock()
		delete(n.under, id)
	}
	n.mu.Lock()
	n.under[id] = end
	n.mu.Unlock()
	d := between(rng, b.least, b.most)
	n.wg.Go(func() {
		if n.wait(d) {
			end()
		}
	})
}

// healAll ends every fault, all at once: a node boots only when the disk below it hangs no longer, which is another's end.
func (n *nemesis) healAll() {
	n.mu.Lock()
	ids := slices.Sorted(maps.Keys(n.under))
	ends := make([]func(), len(ids))
	for i, id := range ids {
		ends[i] = n.under[id]
	}
	n.mu.Unlock()
	for _, end := range ends { // one that is ending already is waited for, with what it may need from the others
		n.wg.Go(end)
	}
	n.wg.Wait()
}

// some is a member by chance; the leader is meant more often than the others.
func (n *nemesis) some() *member {
	staying := n.staying()
	i, leader := n.rng.IntN(len(staying)), n.rng.IntN(10) < 3
	if l := n.c.leader(); leader && l != nil && slices.Contains(staying, l) {
		return l
	}
	return staying[i]
}

// strike breaks the leader in the middle of something, by one of three ways.
func (n *nemesis) strike(kind string, rng *rand.Rand) {
	l := n.c.leader()
	if l == nil || l.leaving.Load() {
		return
	}
	var b *broken
	switch way := rng.IntN(3); way {
	case 0, 1:
		if b = n.kill(l, way == 1); b == nil {
			return
		}
		b.detail = []string{"killed", "power loss"}[way]
	default:
		heal := n.c.wires.cut(both([]string{l.name}, n.others(l, false))...)
		b = &broken{l.name, "isolated", heal, time.Second, 15 * time.Second}
	}
	n.lasts(kind, b, rng)
}

// others are the hosts of all nodes besides m, those that join later too, and of all clients where clients are meant too.
func (n *nemesis) others(m *member, clients bool) []string {
	var out []string
	for _, o := range n.c.everywhere() {
		if o != m {
			out = append(out, o.name)
		}
	}
	if clients {
		out = append(out, n.c.hosts()...)
	}
	return out
}

// mayEnd says whether one more node may be down: the others must be a majority.
func (n *nemesis) mayEnd() bool {
	up := 0
	for _, m := range n.c.members() {
		if m.up() {
			up++
		}
	}
	return (up-1)*2 > len(n.c.members())
}

func (n *nemesis) kill(m *member, silent bool) *broken {
	if !n.mayEnd() || !m.kill(silent) {
		return nil
	}
	return &broken{m.name, "", func() { n.boot(m) }, 300 * time.Millisecond, 20 * time.Second}
}

func (n *nemesis) boot(m *member) {
	if !n.c.belongs(m) {
		return // it was taken out meanwhile
	}
	if err := m.restart(); err != nil {
		n.c.bad("%s does not start again: %v", m.name, err)
	}
}

func (n *nemesis) killAll() *broken {
	silent := n.rng.IntN(2) == 0
	var dead []*member
	var names []string
	for _, m := range n.staying() {
		if m.kill(silent) {
			dead, names = append(dead, m), append(names, m.name)
		}
	}
	return &broken{strings.Join(names, " "), fmt.Sprintf("silent: %v", silent), func() {
		for _, m := range dead {
			n.boot(m)
		}
	}, time.Second, 5 * time.Second}
}

// pause holds whatever goes in or out of a node, its disk included, and lets it go on where it was.
func (n *nemesis) pause() *broken {
	m := n.some()
	if !m.up() {
		return nil
	}
	heal := n.c.wires.cut(both([]string{m.name}, n.others(m, true))...)
	release := m.disk.hang()
	return &broken{m.name, "", func() { release(); heal() }, 300 * time.Millisecond, 9 * time.Second}
}

func (n *nemesis) isolate() *broken {
	m, clients := n.some(), n.rng.IntN(2) == 0
	heal := n.c.wires.cut(both([]string{m.name}, n.others(m, clients))...)
	return &broken{m.name, fmt.Sprintf("from clients too: %v", clients), heal, time.Second, 15 * time.Second}
}

func (n *nemesis) partition() *broken {
	var a, b []string
	all := n.c.members()
	for i, k := range n.rng.Perm(len(all)) {
		if name := all[k].name; i <= (len(all)-1)/2 {
			a = append(a, name)
		} else {
			b = append(b, name)
		}
	}
	return &broken{strings.Join(b, " "), "", n.c.wires.cut(both(a, b)...), time.Second, 15 * time.Second}
}

func (n *nemesis) oneWay() *broken {
	m := n.some()
	one, rest := []string{m.name}, n.others(m, false)
	switch n.rng.IntN(3) {
	case 0:
		return &broken{m.name, "it is not heard", n.c.wires.cut(links(one, rest)...), time.Second, 12 * time.Second}
	case 1:
		return &broken{m.name, "it does not hear", n.c.wires.cut(links(rest, one)...), time.Second, 12 * time.Second}
	default:
		o := rest[n.rng.IntN(len(rest))]
		return &broken{m.name, "not heard by " + o, n.c.wires.cut(way{m.name, o}), time.Second, 20 * time.Second}
	}
}

// flap takes a node's links down and up again every half second.
func (n *nemesis) flap() *broken {
	m := n.some()
	ways := both([]string{m.name}, n.others(m, false))
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			heal := n.c.wires.cut(ways...)
			over := !n.sleep(stop, 500*time.Millisecond)
			heal()
			if over || !n.sleep(stop, 500*time.Millisecond) {
				return
			}
		}
	})
	return &broken{m.name, "", func() { close(stop); wg.Wait() }, 3 * time.Second, 20 * time.Second}
}

func (n *nemesis) sleep(stop <-chan struct{}, d time.Duration) bool {
	select {
	case <-stop:
		return false
	case <-time.After(d):
		return true
	}
}

func (n *nemesis) loss() *broken {
	p := []float64{0.01, 0.1, 0.4}[n.rng.IntN(3)]
	if n.rng.IntN(2) == 0 {
		all := n.others(nil, false)
		return &broken{"all", fmt.Sprintf("%g", p/4), n.c.wires.disturb(5*time.Millisecond, p/4, links(all, all)...), 3 * time.Second, 20 * time.Second}
	}
	m := n.some()
	return &broken{
		m.name, fmt.Sprintf("%g", p), n.c.wires.disturb(5*time.Millisecond, p, both([]string{m.name}, n.others(m, false))...),
		3 * time.Second, 20 * time.Second,
	}
}

func (n *nemesis) delay() *broken {
	m, d := n.some(), between(n.rng, 20*time.Millisecond, 600*time.Millisecond)
	ways := both([]string{m.name}, n.others(m, false))
	if n.rng.IntN(2) == 0 {
		ways = links([]string{m.name}, n.others(m, false)) // slow answers: what a lease must not be counted from
	}
	return &broken{m.name, d.String(), n.c.wires.disturb(d, 0, ways...), 2 * time.Second, 20 * time.Second}
}

// reset breaks every connection of a node: requests and replies under way are lost, and asked for again.
func (n *nemesis) reset() *broken {
	m := n.some()
	n.c.wires.net.CloseConns(m.name)
	return &broken{target: m.name}
}

func (n *nemesis) slowDisk() *broken {
	m := n.some()
	most := between(n.rng, 20*time.Millisecond, 500*time.Millisecond)
	n.mu.Lock()
	rng := rngOf(n.c.opt.Seed, fmt.Sprintf("slow disk %d", n.next))
	n.mu.Unlock()
	heal := m.disk.slow(func() time.Duration { return between(rng, most/4, most) })
	return &broken{m.name, most.String(), heal, 2 * time.Second, 20 * time.Second}
}

func (n *nemesis) hungDisk() *broken {
	m := n.some()
	return &broken{m.name, "", m.disk.hang(), 500 * time.Millisecond, 12 * time.Second}
}

// pluginFails makes the plugins of one node, or of all, fail in one phase.
func (n *nemesis) pluginFails() *broken {
	phase, m := phases[n.rng.IntN(len(phases))], refuse
	if n.rng.IntN(4) == 0 {
		m = hang
	}
	chance := []float64{0.2, 0.5, 1}[n.rng.IntN(3)]
	if phase == "reply" || phase == "request" {
		chance = 0.1
	}
	on := []*member{n.some()}
	if n.rng.IntN(6) == 0 {
		on = n.c.members()
	}
	var lift []func()
	var names []string
	for _, o := range on {
		lift, names = append(lift, o.temper.cast(phase, m, chance)), append(names, o.name)
	}
	return &broken{strings.Join(names, " "), fmt.Sprintf("%s %d %g", phase, m, chance), func() {
		for _, f := range lift {
			f()
		}
	}, 2 * time.Second, 25 * time.Second}
}

func (n *nemesis) pluginCrash() *broken {
	m, k := n.some(), n.rng.IntN(100)
	if l := m.plugins(); l == nil || !l.crash(k) {
		return nil
	}
	return &broken{target: m.name}
}

func (n *nemesis) crashLoop() *broken {
	m := n.some()
	return &broken{m.name, "", m.temper.crashLoop(), 3 * time.Second, 15 * time.Second}
}

func (n *nemesis) stepDown() *broken {
	if !n.op.stepDown() {
		return nil
	}
	return &broken{}
}

// leave lets a node leave the cluster, and come back as a new one.
func (n *nemesis) leave() *broken {
	m := n.some()
	if !n.mayEnd() || !m.up() || n.c.memberships() != nil {
		return nil
	}
	node := m.running()
	if node == nil {
		return nil
	}
	m.leaving.Store(true)
	if !n.op.leave(m) {
		m.leaving.Store(false)
		return nil
	}
	return &broken{m.name, "", func() {
		m.gone(time.Minute)
		// Its disk goes only when it has no vote any more. It could not leave where there was no majority, and that may need it.
		if n.op.remove(m, node.ID(), 10*time.Second) == nil {
			m.replace()
		} else {
			m.asked.Store(true)
		}
		m.leaving.Store(false)
		n.boot(m)
	}, 5 * time.Second, 20 * time.Second}
}

// newDisk kills a node, and gives it an empty disk. As with leave, every node that belongs to the cluster must have its place in
// it: a second disk that is lost while the first has no vote again is one too many.
func (n *nemesis) newDisk() *broken {
	m := n.some()
	if !n.mayEnd() || n.c.memberships() != nil || n.c.replaced() || !m.kill(true) {
		return nil
	}
	return &broken{m.name, "", func() { m.replace(); n.boot(m) }, time.Second, 10 * time.Second}
}

// snapshot makes a node compact its log now.
func (n *nemesis) snapshot() *broken {
	m := n.some()
	node := m.running()
	if node == nil {
		return nil
	}
	go func() { _ = node.Replica().Snapshot() }() // nothing new to snapshot is no failure
	return &broken{target: m.name}
}
