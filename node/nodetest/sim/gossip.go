package sim

import (
	"sync"
	"time"

	"rollcall/node/replica"
)

// gossip stands in for memberlist: who has ever been started is known, and who has not been reachable for a while is
// believed to be dead. It is wrong for as long as real gossip is.
type gossip struct {
	c *cluster

	mu      sync.Mutex
	members map[string]*rumour // by name
	changed chan struct{}
}

// rumour is what everybody has heard of one node.
type rumour struct {
	peer replica.Peer
	// seen is when each of the others last reached it.
	seen map[string]time.Time
	left bool
}

// suspicion is how long memberlist takes, with its defaults for a local network, to call a silent node dead.
const suspicion = 6 * time.Second

func newGossip(c *cluster) *gossip {
	return &gossip{c: c, members: map[string]*rumour{}, changed: make(chan struct{})}
}

// alive tells of a node that starts.
func (g *gossip) alive(name, id, address string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.members[name] = &rumour{peer: replica.Peer{NodeID: id, Name: name, Address: address}, seen: map[string]time.Time{}}
	for _, m := range g.c.everywhere() {
		g.members[name].seen[m.name] = time.Now()
	}
	g.tell()
}

// tell wakes whoever waits for news. The caller holds mu.
func (g *gossip) tell() {
	close(g.changed)
	g.changed = make(chan struct{})
}

// probe lets every node look for every other, as far as the network carries.
func (g *gossip) probe() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, m := range g.c.everywhere() {
		for name, r := range g.members {
			if m.up() && g.c.member(name).up() && g.c.wires.open(m.name, name) && g.c.wires.open(name, m.name) {
				r.seen[m.name] = time.Now()
			}
		}
	}
	g.tell()
}

// seenBy is the replica.Discovery of one node.
type seenBy struct {
	g    *gossip
	self string
}

func (s seenBy) Changed() <-chan struct{} {
	s.g.mu.Lock()
	defer s.g.mu.Unlock()
	return s.g.changed
}

func (s seenBy) Peers() []replica.Peer {
	s.g.mu.Lock()
	defer s.g.mu.Unlock()
	var out []replica.Peer
	for _, m := range s.g.c.everywhere() { // in a fixed order
		r := s.g.members[m.name]
		if r == nil || m.name == s.self {
			continue
		}
		p := r.peer
		switch {
		case r.left:
			p.Status = replica.PeerLeft
		case time.Since(r.seen[s.self]) > suspicion:
			p.Status = replica.PeerDead
		}
		out = append(out, p)
	}
	return out
}

// leave tells of a node that has left.
func (g *gossip) leave(name string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if r := g.members[name]; r != nil {
		r.left = true
	}
	g.tell()
}
