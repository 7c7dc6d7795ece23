package gossip

import (
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/prometheus/client_golang/prometheus"

	"rollcall/node/fault"
)

// delegate is what memberlist calls. Its event and alive calls come with memberlist's lock held: they copy and return.
type delegate struct{ g *Gossip }

var (
	_ memberlist.Delegate         = (*delegate)(nil)
	_ memberlist.EventDelegate    = (*delegate)(nil)
	_ memberlist.AliveDelegate    = (*delegate)(nil)
	_ memberlist.MergeDelegate    = (*delegate)(nil)
	_ memberlist.ConflictDelegate = (*delegate)(nil)
)

// NodeMeta is memberlist.Delegate's.
func (d *delegate) NodeMeta(limit int) []byte {
	meta := *d.g.meta.Load()
	return meta[:min(len(meta), limit)] // it always fits; memberlist would panic
}

// NotifyMsg is memberlist.Delegate's: nodes send no user messages, so one is ignored.
func (d *delegate) NotifyMsg([]byte) {}

// GetBroadcasts is memberlist.Delegate's.
func (d *delegate) GetBroadcasts(int, int) [][]byte { return nil }

// LocalState is memberlist.Delegate's.
func (d *delegate) LocalState(bool) []byte { return nil }

// MergeRemoteState is memberlist.Delegate's.
func (d *delegate) MergeRemoteState([]byte, bool) {}

// NotifyAlive refuses who cannot be understood or belongs to another cluster.
func (d *delegate) NotifyAlive(peer *memberlist.Node) error {
	if err := d.g.acceptable(peer); err != nil {
		d.g.m.refused.Inc()
		d.g.log.Debug("gossip of a node is refused", "from", peer.Address(), "error", err)
		return err
	}
	return nil
}

// NotifyMerge refuses to mix with another cluster: one foreign node spoils the whole exchange.
func (d *delegate) NotifyMerge(peers []*memberlist.Node) error {
	for _, p := range peers {
		if p.State != memberlist.StateAlive && p.State != memberlist.StateSuspect {
			continue // the dead may have been anybody
		}
		if err := d.g.acceptable(p); err != nil {
			d.g.m.refused.Inc()
			d.g.log.Warn("refusing to gossip with a node of another cluster", "node", p.Name, "at", p.Address(), "error", err)
			return err
		}
	}
	return nil
}

// NotifyConflict is told when one boot of one node shows up at two addresses: a copied data directory. The first stays.
func (d *delegate) NotifyConflict(existing, other *memberlist.Node) {
	d.g.m.conflicts.Inc()
	d.g.log.Error("two processes run as the same node: is its data directory copied?",
		"node", existing.Name, "at", existing.Address(), "and_at", other.Address())
}

// NotifyJoin is memberlist.EventDelegate's.
func (d *delegate) NotifyJoin(n *memberlist.Node) { d.g.learn(n, Alive) }

// NotifyUpdate is memberlist.EventDelegate's.
func (d *delegate) NotifyUpdate(n *memberlist.Node) { d.g.learn(n, Alive) }

// NotifyLeave is memberlist.EventDelegate's.
func (d *delegate) NotifyLeave(n *memberlist.Node) { d.g.learn(n, Dead) }

// acceptable decodes what the node announces and checks that it belongs with us.
func (g *Gossip) acceptable(n *memberlist.Node) error {
	f, err := decode(n.Meta, n.Name)
	if err != nil {
		return err
	}
	g.mu.Lock()
	ours := g.self.ClusterID
	g.mu.Unlock()
	if ours != "" && f.ClusterID != "" && f.ClusterID != ours {
		return fault.New(fault.Conflict, "gossip", f.Name, "belongs to cluster %s, this node to %s", f.ClusterID, ours)
	}
	return nil
}

// learn enters what is known of a member now.
func (g *Gossip) learn(n *memberlist.Node, status Status) {
	f, err := decode(n.Meta, n.Name)
	if err != nil || f.NodeID == g.cfg.NodeID {
		return // ourselves, or somebody whom NotifyAlive has not let through
	}
	if status == Dead && f.Leaving {
		status = Left
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	p := Peer{
		NodeID: f.NodeID, Incarnation: f.Incarnation, Name: f.Name, Address: f.Address, ClusterID: f.ClusterID,
		HasState: f.HasState, NonVoter: f.NonVoter, BootstrapExpect: uint32(f.BootstrapExpect), Build: f.Build,
		Status: status, Since: time.Now(),
	}
	for _, other := range g.peers {
		if other.NodeID == f.NodeID && other.Incarnation > f.Incarnation {
			return // an older boot is history, whatever becomes of it
		}
	}
	old := g.peers[n.Name]
	if old == nil && len(g.peers) >= maxPeers && !g.forget() {
		return
	}
	if old != nil && old.Status == status {
		p.Since = old.Since
		if *old == p {
			return
		}
	}
	g.peers[n.Name] = &p
	for name, other := range g.peers {
		if other.NodeID == p.NodeID && other.Incarnation < p.Incarnation {
			delete(g.peers, name)
		}
	}
	close(g.changed)
	g.changed = make(chan struct{})
}

// forget drops the peer that has been dead for longest. g.mu is held.
func (g *Gossip) forget() bool {
	var name string
	var oldest *Peer
	for k, p := range g.peers {
		if p.Status != Alive && (oldest == nil || p.Since.Before(oldest.Since)) {
			name, oldest = k, p
		}
	}
	delete(g.peers, name)
	return oldest != nil
}

// metrics of gossip.
type metrics struct {
	registry     prometheus.Registerer
	all          []prometheus.Collector
	refused      prometheus.Counter
	conflicts    prometheus.Counter
	joinFailures prometheus.Counter
}

func newMetrics(registry prometheus.Registerer, g *Gossip) (*metrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: "rollcall", Subsystem: "gossip", Name: name, Help: help})
	}
	m := &metrics{
		registry:     registry,
		refused:      counter("refused_total", "Announcements that were malformed or of another cluster."),
		conflicts:    counter("conflicts_total", "Times that two processes claimed to be the same boot of a node."),
		joinFailures: counter("join_failures_total", "Rounds of retry_join in which nobody answered."),
	}
	m.all = []prometheus.Collector{m.refused, m.conflicts, m.joinFailures, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Namespace: "rollcall", Subsystem: "gossip", Name: "alive_peers", Help: "Other nodes that gossip believes alive.",
	}, func() float64 {
		alive := 0
		for _, p := range g.Peers() {
			if p.Status == Alive {
				alive++
			}
		}
		return float64(alive)
	})}
	for i, c := range m.all {
		if err := registry.Register(c); err != nil {
			for _, done := range m.all[:i] {
				registry.Unregister(done)
			}
			return nil, fault.As(fault.Invalid, err, "register metrics", "gossip")
		}
	}
	return m, nil
}

func (m *metrics) unregister() {
	for _, c := range m.all {
		m.registry.Unregister(c)
	}
}
