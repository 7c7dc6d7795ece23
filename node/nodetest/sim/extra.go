package sim

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"
)

// mostExtra is how many nodes may join a cluster beside those that found it, as long as there are no more than mostNodes.
const (
	mostExtra = 2
	mostNodes = 7
)

// everywhere are all places, whether a node belongs to the cluster there or not.
func (c *cluster) everywhere() []*member { return slices.Concat(c.founders, c.spares) }

// members are the places whose nodes belong to the cluster, or are on their way into it or out of it.
func (c *cluster) members() []*member {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := slices.Clone(c.founders)
	for _, m := range c.spares {
		if c.extra[m] {
			out = append(out, m)
		}
	}
	return out
}

func (c *cluster) names() (out []string) {
	for _, m := range c.members() {
		out = append(out, m.name)
	}
	return out
}

func (c *cluster) belongs(m *member) bool { return slices.Contains(c.members(), m) }

// setExtra makes a spare place one of the cluster's, or not.
func (c *cluster) setExtra(m *member, in bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.extra[m] = in
}

// staying are the members that nobody has told to go.
func (n *nemesis) staying() []*member {
	return slices.DeleteFunc(n.c.members(), func(m *member) bool { return m.leaving.Load() })
}

// join starts a node that the cluster has never seen, on an empty disk. It knows the founders' addresses and finds its way in
// by itself, whatever else is broken; it stays.
func (n *nemesis) join() *broken {
	for _, m := range n.c.spares {
		if !n.c.belongs(m) {
			n.c.setExtra(m, true)
			n.boot(m)
			return &broken{target: m.name}
		}
	}
	return nil
}

// leaveForGood takes a node that has joined out of the cluster: it is told to leave, or dies, or runs on while it is removed.
// The operator asks for its removal until that is acknowledged, and only then its disk is thrown away.
func (n *nemesis) leaveForGood() *broken {
	extra := slices.DeleteFunc(n.staying(), func(m *member) bool { return !m.joins || !m.up() })
	if len(extra) == 0 || !n.mayEnd() {
		return nil
	}
	m, way := extra[n.rng.IntN(len(extra))], n.rng.IntN(3)
	node := m.running()
	if node == nil {
		return nil
	}
	m.leaving.Store(true)
	how := "it runs on"
	switch way {
	case 0:
		if how = "it is told to"; !n.op.leave(m) {
			m.leaving.Store(false)
			return nil
		}
	case 1:
		how = "it is dead"
		m.kill(n.rng.IntN(2) == 0)
	}
	return &broken{m.name, how, func() {
		if way == 0 {
			m.gone(time.Minute)
		}
		if err := n.op.remove(m, node.ID(), 3*time.Minute); err != nil {
			n.c.bad("%s cannot be taken out: %v", m.name, err)
		}
		if way == 2 {
			time.Sleep(3 * time.Second) // removed, and nobody has stopped it yet
		}
		m.kill(false)
		n.c.setExtra(m, false)
		m.replace()
		m.leaving.Store(false)
	}, time.Second, 15 * time.Second}
}

// remove takes a node out of the cluster through any other one.
func (o *operator) remove(m *member, id string, within time.Duration) error {
	var last error
	for end := time.Now().Add(within); time.Now().Before(end); time.Sleep(time.Second) {
		for _, at := range o.c.members() {
			if at == m {
				continue
			}
			a, err := o.ask(at.name, http.MethodPost, "sys/storage/raft/remove-peer", o.c.token, map[string]string{"server_id": id})
			if last = told(a, err); last == nil {
				return nil
			}
			if a != nil && a.status == http.StatusBadRequest { // it leads
				o.stepDown()
			}
		}
	}
	return last
}

// membership waits until the configuration holds the nodes that belong to the cluster and no others, as many of them with a
// vote as the rule asks for: all up to three, then odd numbers up to five. Nobody's vote is taken away, so there may be one more.
func (c *cluster) membership(within time.Duration) error {
	for end := time.Now().Add(within); ; time.Sleep(500 * time.Millisecond) {
		err := c.memberships()
		if err == nil || time.Now().After(end) {
			return err
		}
	}
}

func (c *cluster) memberships() error {
	var want, have, table []string
	for _, m := range c.members() {
		n := m.running()
		if n == nil {
			return fmt.Errorf("%s does not run", m.name)
		}
		if m.leaving.Load() {
			return fmt.Errorf("%s is leaving", m.name)
		}
		want = append(want, m.name+" "+n.ID())
	}
	l := c.leader()
	if l == nil {
		return fmt.Errorf("no node leads")
	}
	n := l.running()
	voters := 0
	for _, s := range n.Replica().Members() {
		have = append(have, s.Name+" "+s.ID)
		if s.Voter {
			voters++
		}
	}
	for _, row := range n.State().View().Nodes() {
		if !row.GetLeft() {
			table = append(table, row.GetName()+" "+row.GetId())
		}
	}
	slices.Sort(want)
	slices.Sort(have)
	slices.Sort(table)
	least := min(len(want), 5)
	if least > 3 && least%2 == 0 {
		least--
	}
	switch {
	case !slices.Equal(want, have):
		return fmt.Errorf("the Raft configuration of %s is %s; it should be %s", l.name, strings.Join(have, ", "), strings.Join(want, ", "))
	case !slices.Equal(want, table):
		return fmt.Errorf("the node table of %s is %s; it should be %s", l.name, strings.Join(table, ", "), strings.Join(want, ", "))
	case voters < least:
		return fmt.Errorf("%d of %d nodes have a vote; %d should", voters, len(want), least)
	}
	return nil
}

// tally puts what the operator did to the whole cluster beside the faults.
func (c *cluster) tally(res *Result) {
	for _, f := range c.rec.Run().Faults {
		if f.Kind == restoreFault {
			res.Faults[f.Kind+" "+f.Detail]++
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.voids > 0 {
		res.Faults["restore that the cluster did not take"] += c.voids
	}
}
