package fsm

import (
	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// initCluster is the first command, and takes effect once. Everything before it, a Hello too, is refused as unavailable:
// a node that says Hello belongs to a cluster, and until this entry there is none.
func (e *entry) initCluster(c *commandv1.InitCluster) error {
	switch {
	case e.clusterID != "" && e.clusterID == c.GetClusterId():
		e.res.Id, e.res.Repeated = e.clusterID, true
		return nil
	case e.clusterID != "":
		return fault.Text(fault.Conflict, "the cluster is initialised already, as %s", e.clusterID)
	case c.GetClusterId() == "" || !plain(c.GetClusterId(), maxName) || !plain(c.GetClusterName(), maxName):
		return invalid("a cluster needs an id")
	}
	if len(c.GetRootTokenHash()) > 0 {
		t := &commandv1.Token{
			Hash: c.GetRootTokenHash(), Accessor: c.GetRootTokenAccessor(), Policies: []string{"root"},
			DisplayName: "root", Path: "auth/token/root", Type: "service", CreatedWallMs: e.wallMS,
		}
		if err := checkToken(t); err != nil {
			return err
		}
		e.putToken(t)
	}
	e.clusterID, e.clusterName = c.GetClusterId(), c.GetClusterName()
	e.res.Id = e.clusterID
	return nil
}

// rotateKeys begins a new term of data keys. Which keys, is each node's own affair.
func (e *entry) rotateKeys() error {
	e.keyTerm, e.keyTermMS = max(e.keyTerm, 1)+1, e.wallMS
	return nil
}

// hello enters a node's incarnation and facts, and what they mean to the reloads under way.
func (e *entry) hello(c *commandv1.Hello) error {
	switch {
	case c.GetNodeId() == "" || !plain(c.GetNodeId(), maxName):
		return invalid("a node needs an id")
	case c.GetName() == "" || !plain(c.GetName(), maxName):
		return invalid("a node needs a name")
	case c.GetIncarnation() == 0:
		return invalid("a node's first incarnation is 1")
	}
	for _, s := range []string{c.GetApiAddress(), c.GetClusterAddress(), c.GetBuildVersion(), c.GetOsArch()} {
		if !plain(s, maxText) {
			return invalid("a node's addresses and versions hold control characters or are too long")
		}
	}
	old := get(&e.nodes, c.GetNodeId())
	switch {
	case c.GetIncarnation() < old.GetIncarnation():
		return fault.Text(fault.Stale, "incarnation %d of node %s is over: %d has said hello. "+
			"Two processes may be running on copies of one data directory", c.GetIncarnation(), c.GetName(), old.GetIncarnation())
	case c.GetIncarnation() == old.GetIncarnation() && old.GetLeft():
		return fault.Text(fault.Stale, "incarnation %d of node %s has left", c.GetIncarnation(), c.GetName())
	}
	if id := get(&e.nodeNames, c.GetName()); id != "" && id != c.GetNodeId() {
		return fault.Text(fault.Conflict, "the node name %q belongs to %s: remove that node first, or choose another name",
			c.GetName(), id)
	}
	n := &commandv1.Node{
		Id: c.GetNodeId(), Incarnation: c.GetIncarnation(), Name: c.GetName(), ApiAddress: c.GetApiAddress(),
		ClusterAddress: c.GetClusterAddress(), BuildVersion: c.GetBuildVersion(), OsArch: c.GetOsArch(),
		HelloIndex: e.index, FenceIndex: old.GetFenceIndex(), HelloWallMs: e.wallMS,
	}
	e.res.Id = n.GetId()
	if old.GetIncarnation() == n.GetIncarnation() {
		n.HelloIndex, n.HelloWallMs = old.GetHelloIndex(), old.GetHelloWallMs()
		e.res.Repeated = true
		e.putNode(n)
		return nil
	}
	e.putNode(n)
	e.nodeSaidHello(n)
	return nil
}

func (e *entry) leave(c *commandv1.Leave) error {
	old := get(&e.nodes, c.GetNodeId())
	switch {
	case old == nil:
		return fault.Text(fault.NotFound, "no node %s", trim(c.GetNodeId(), maxName))
	case c.GetIncarnation() != old.GetIncarnation():
		return fault.Text(fault.Stale, "incarnation %d of node %s is over: %d has said hello",
			c.GetIncarnation(), old.GetName(), old.GetIncarnation())
	case old.GetLeft():
		e.res.Repeated = true
		return nil
	}
	n := clone(old)
	n.Left = true
	e.putNode(n)
	e.dropOverrides(n.GetId())
	e.nodeGone(n.GetId(), "left the cluster")
	return nil
}

func (e *entry) removeNode(c *commandv1.RemoveNode) error {
	old := get(&e.nodes, c.GetNodeId())
	if old == nil {
		e.res.Repeated = true
		return nil
	}
	e.deleteNode(old)
	e.dropOverrides(old.GetId())
	why := "was removed from the cluster"
	if c.GetWhy() != "" {
		why += ": " + trim(c.GetWhy(), maxText)
	}
	e.nodeGone(old.GetId(), why)
	return nil
}

// liveNodes are the members that owe answers: every node that has said Hello and has not left, in order of id. Whether
// one of them is down is nothing that the log knows.
func (s *state) liveNodes() []*commandv1.Node {
	var out []*commandv1.Node
	s.nodes.Scan(func(_ string, n *commandv1.Node) bool {
		if !n.GetLeft() {
			out = append(out, n)
		}
		return true
	})
	return out
}

// restored gives every mount a new generation and no epoch after an operator's snapshot restore, because what runs was set
// up on other storage, and ends the reloads that were under way in the snapshot, because their votes are of processes that
// are gone.
func (e *entry) restored(c *commandv1.Restored) error {
	why := "the state was restored from a snapshot"
	if c.GetWhy() != "" {
		why += ": " + trim(c.GetWhy(), maxText)
	}
	e.restoring = false
	var mounts []*commandv1.Mount
	e.mounts.Scan(func(_ string, m *commandv1.Mount) bool {
		mounts = append(mounts, m)
		return true
	})
	for _, old := range mounts {
		m := clone(old)
		m.Wanted = &commandv1.Wanted{Generation: e.index, Spec: old.GetWanted().GetSpec(), FreshSince: e.index}
		m.Overrides, m.Epoch, m.EpochTerm, m.EpochGeneration = nil, 0, 0, 0
		e.putMount(m)
	}
	// Those that wait first: the end of one that runs would let them begin.
	ids := e.openIDs()
	for _, waiting := range []bool{true, false} {
		for _, id := range ids {
			r := get(&e.reloads, id)
			if (r.GetPhase() == commandv1.Phase_PHASE_QUEUED) == waiting && !terminal(r.GetPhase()) {
				e.finish(clone(r), commandv1.Phase_PHASE_ABORTED, why)
			}
		}
	}
	return nil
}
