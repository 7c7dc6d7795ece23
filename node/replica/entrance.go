package replica

import (
	"context"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"rollcall/node/failpoint"
	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
	peerv1 "rollcall/proto/peer/v1"
)

// entrance is what a node knows of its way into a cluster, and the rule for whom a node without state listens to.
type entrance struct {
	mu      sync.Mutex
	dir     *Dir
	member  bool            // has said Hello once, founded, or was let in
	leader  raft.ServerID   // whom we have asked to let us in
	promise map[string]bool // node ids that we found the cluster with
	cluster string          // id of our cluster, from the directory until the state says it
}

var _ entryRule = (*entrance)(nil)

func (e *entrance) load(dir *Dir, hasState bool) error {
	ids, err := dir.Candidates()
	if err != nil {
		return err
	}
	cluster, err := dir.ClusterID()
	if err != nil {
		return err
	}
	if cluster != "" && !hasState {
		return fault.New(fault.Corrupt, "open data directory", dir.Path,
			"this node is a member of cluster %s, but its Raft log is gone. An empty log must not vote in its name: "+
				"move the whole directory away and start again under the same name, as a replaced disk", cluster)
	}
	// Entries without a cluster's id: the node ended before its Hello. enter finds out whether it is configured.
	e.dir, e.member, e.cluster = dir, hasState && cluster != "", cluster
	e.setPromise(ids)
	return nil
}

func (e *entrance) setPromise(ids []string) {
	e.promise = map[string]bool{}
	for _, id := range ids {
		e.promise[id] = true
	}
}

// promised returns the sorted ids of the promise.
func (e *entrance) promised() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	ids := make([]string, 0, len(e.promise))
	for id := range e.promise {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

// make promises the ids durably, unless something else is promised already; it returns what is.
func (e *entrance) makePromise(ids []string) ([]string, error) {
	if old := e.promised(); len(old) > 0 {
		return old, nil
	}
	ids = slices.Sorted(slices.Values(ids))
	if err := e.dir.PromiseCandidates(ids); err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.setPromise(ids)
	return ids, nil
}

func (e *entrance) clusterID() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.cluster
}

// remember keeps the cluster's id in the directory.
func (e *entrance) remember(id string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if id == "" || id == e.cluster {
		return nil
	}
	e.cluster = id
	return e.dir.SetClusterID(id)
}

func (e *entrance) asked(leader string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.leader = raft.ServerID(leader)
}

func (e *entrance) entered() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.member = true
}

func (e *entrance) inside() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.member
}

func (e *entrance) mayFeed(id raft.ServerID) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.member || id == e.leader || e.promise[string(id)]
}

func (e *entrance) mayWin(id raft.ServerID) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.promise[string(id)]
}

// enter brings this node into its cluster: founding or joining when it is new, a new address when it has moved, and its
// Hello at every boot.
func (r *Replica) enter() {
	if !r.becomeMember() {
		return
	}
	r.entrance.entered()
	if !r.sayHello() {
		return
	}
	if err := r.entrance.remember(r.fsm.View().ClusterID()); err != nil {
		r.fail(err)
		return
	}
	r.cfg.Announce(SelfFacts{ClusterID: r.clusterID(), HasState: true})
	close(r.ready)
}

// becomeMember returns true once the Raft configuration here names this node, or the leader has let it in. A node that has
// belonged to the cluster and is not let in again was removed: nothing that it could wait for changes that, and it fails. A new
// one waits, until its certificate or its name is put right.
func (r *Replica) becomeMember() bool {
	var waiting, refused string // what was said of it last
	for attempt := 0; r.ctx.Err() == nil; attempt++ {
		news := func(said *string, now string) bool {
			fresh := now != *said || attempt%20 == 0
			*said = now
			return fresh
		}
		changed, role := r.cfg.Discovery.Changed(), r.RoleChanged()
		if r.configured() != nil {
			return true
		}
		facts, unheard := r.askFacts(r.ctx)
		let, err := r.join(facts)
		if let {
			return true
		}
		switch {
		case fault.Is(err, fault.Denied) && r.entrance.clusterID() != "":
			r.fail(fault.Wrap(err, "enter the cluster", r.cfg.Name))
			return false
		case fault.Is(err, fault.Denied), fault.Is(err, fault.Conflict):
			if news(&refused, err.Error()) {
				r.log.Error("the cluster does not let this node in", "error", err)
			}
		case err != nil:
			r.log.Info("not let in yet", "error", err)
		}
		if founded, why := r.found(facts); founded {
			return true
		} else if why != "" && news(&waiting, why+unheard) {
			r.log.Info("waiting for a cluster", "why", why, "unheard", unheard)
		}
		t := time.NewTimer(min(50*time.Millisecond<<min(attempt, 5), time.Second))
		select {
		case <-changed:
		case <-role:
		case <-t.C:
		case <-r.ctx.Done():
		}
		t.Stop()
	}
	return false
}

// configured returns this node's entry in the latest Raft configuration, or nil.
func (r *Replica) configured() *raft.Server {
	for _, s := range r.servers() {
		if string(s.ID) == r.NodeID() {
			return &s
		}
	}
	return nil
}

func (r *Replica) servers() []raft.Server {
	n := r.raft.Load()
	if n == nil {
		return nil
	}
	return n.GetConfiguration().Configuration().Servers
}

// askFacts asks every discovered peer, at once, what it is. unheard says of those that gossip found and that gave no
// answer why: a certificate of another authority, a port that is closed.
func (r *Replica) askFacts(ctx context.Context) (facts []*peerv1.FactsResponse, unheard string) {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.rpcTimeout())
	defer cancel()
	var mu sync.Mutex
	var wg sync.WaitGroup
	var all []*peerv1.FactsResponse
	var silent []string
	limit := make(chan struct{}, 16)
	for _, p := range r.cfg.Discovery.Peers() {
		if p.Address == "" || p.NodeID == r.NodeID() {
			continue
		}
		limit <- struct{}{}
		wg.Go(func() {
			defer func() { <-limit }()
			f, err := r.factsOf(ctx, p.Address, p.Name)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err != nil:
				silent = append(silent, p.Name+" at "+p.Address+": "+err.Error())
			case f.GetNodeId() != r.NodeID():
				all = append(all, f)
			}
		})
	}
	wg.Wait()
	slices.SortFunc(all, func(a, b *peerv1.FactsResponse) int { return strings.Compare(a.GetNodeId(), b.GetNodeId()) })
	all = slices.CompactFunc(all, func(a, b *peerv1.FactsResponse) bool { return a.GetNodeId() == b.GetNodeId() })
	slices.Sort(silent)
	return all, strings.Join(silent[:min(len(silent), 5)], "; ")
}

func (r *Replica) factsOf(ctx context.Context, address, name string) (*peerv1.FactsResponse, error) {
	conn, err := r.connect(ctx, address, name)
	if err != nil {
		return nil, err
	}
	return peerv1.NewReplicaClient(conn).Facts(ctx, &peerv1.FactsRequest{})
}

// join asks a leader that the facts name to let this node in, under the address it has now.
func (r *Replica) join(facts []*peerv1.FactsResponse) (bool, error) {
	mine := r.clusterID()
	var last error
	tried := map[string]bool{}
	for _, f := range facts {
		if f.GetLeaderAddress() == "" || f.GetLeaderId() == r.NodeID() || tried[f.GetLeaderId()] {
			continue
		}
		if mine != "" && f.GetClusterId() != "" && f.GetClusterId() != mine {
			last = fault.New(fault.Conflict, "join", f.GetClusterAddress(), "belongs to cluster %s, this node to %s", f.GetClusterId(), mine)
			continue
		}
		tried[f.GetLeaderId()] = true
		r.entrance.asked(f.GetLeaderId())
		ctx, cancel := context.WithTimeout(r.ctx, r.cfg.leaseSpan()+2*r.cfg.rpcTimeout()) // a replaced disk waits for its old lease
		// Only a Hello proves that we were ever a member: what is in our log so far may be a configuration that its
		// leader could not commit.
		err := r.askToJoin(ctx, f, r.entrance.clusterID())
		cancel()
		if err == nil {
			return true, nil
		}
		last = err
	}
	return false, last
}

func (r *Replica) askToJoin(ctx context.Context, f *peerv1.FactsResponse, cluster string) error {
	conn, err := r.connect(ctx, f.GetLeaderAddress(), r.nameOf(f.GetLeaderId()))
	if err != nil {
		return err
	}
	_, err = peerv1.NewReplicaClient(conn).Join(ctx, &peerv1.JoinRequest{
		NodeId: r.NodeID(), Name: r.cfg.Name, ClusterAddress: r.cfg.ClusterAddress, ClusterId: cluster,
		NonVoter: r.cfg.NonVoter, Incarnation: r.Incarnation(),
	})
	return fault.Wrap(err, "join", f.GetLeaderAddress())
}

// found founds a cluster with the peers that expect the same, or says why not yet. Every founder bootstraps with the
// same list, which it has promised durably; whoever comes too late is reached by those who did.
func (r *Replica) found(facts []*peerv1.FactsResponse) (founded bool, why string) {
	expect := r.cfg.BootstrapExpect
	if expect == 0 || r.hasState() {
		return false, "this node only joins, and no leader is known yet"
	}
	addresses := map[string]string{r.NodeID(): r.cfg.ClusterAddress}
	names := map[string]string{r.NodeID(): r.cfg.Name}
	for _, f := range facts {
		switch {
		case f.GetHasState() || f.GetClusterId() != "":
			return false, "node " + f.GetName() + " has a cluster already: this node joins that one as soon as it has a leader"
		case f.GetBootstrapExpect() == 0 || f.GetNonVoter():
			continue
		case f.GetBootstrapExpect() != expect:
			r.log.Error("bootstrap_expect differs: make it the same on every founding node",
				"node", f.GetName(), "theirs", f.GetBootstrapExpect(), "ours", expect)
			return false, "bootstrap_expect differs on node " + f.GetName()
		}
		addresses[f.GetNodeId()], names[f.GetNodeId()] = f.GetClusterAddress(), f.GetName()
	}
	if len(r.entrance.promised()) == 0 && len(addresses) < int(expect) {
		return false, "fewer nodes than bootstrap_expect have found each other"
	}
	promise, err := r.entrance.makePromise(choose(names, int(expect)))
	if err != nil {
		r.fail(err)
		return false, err.Error()
	}
	if !slices.Contains(promise, r.NodeID()) {
		return false, "others found the cluster; this node joins it"
	}
	var servers []raft.Server
	for _, id := range promise {
		if addresses[id] == "" {
			return false, "node " + id + ", with whom this node has promised to found the cluster, does not answer"
		}
		servers = append(servers, raft.Server{Suffrage: raft.Voter, ID: raft.ServerID(id), Address: raft.ServerAddress(addresses[id])})
	}
	for _, f := range facts {
		if slices.Contains(promise, f.GetNodeId()) && !slices.Equal(f.GetBootstrapCandidates(), promise) {
			return false, "node " + f.GetName() + " has not promised the same founders"
		}
	}
	if err := r.raft.Load().BootstrapCluster(raft.Configuration{Servers: servers}).Error(); err != nil {
		return false, "bootstrap: " + err.Error()
	}
	r.log.Info("founding a cluster", "nodes", len(servers))
	return true, ""
}

// choose returns the first n ids by node name.
func choose(names map[string]string, n int) []string {
	ids := make([]string, 0, len(names))
	for id := range names {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, func(a, b string) int {
		if c := strings.Compare(names[a], names[b]); c != 0 {
			return c
		}
		return strings.Compare(a, b)
	})
	return ids[:min(n, len(ids))]
}

// sayHello enters this incarnation into the state. It returns false when the node stops first, or must not go on.
func (r *Replica) sayHello() bool {
	hello := &commandv1.Command{Body: &commandv1.Command_Hello{Hello: &commandv1.Hello{
		NodeId: r.NodeID(), Incarnation: r.Incarnation(), Name: r.cfg.Name, ApiAddress: r.cfg.APIAddress,
		ClusterAddress: r.cfg.ClusterAddress, BuildVersion: r.cfg.BuildVersion, OsArch: runtime.GOOS + "/" + runtime.GOARCH,
	}}}
	introduce := false
	for attempt := 0; r.ctx.Err() == nil; attempt++ {
		err := r.introduceSelf(introduce)
		if fault.Is(err, fault.Denied) {
			r.fail(fault.Wrap(err, "enter the cluster", r.cfg.Name))
			return false
		}
		if err == nil {
			if err = r.tryHello(hello); err == nil {
				return true
			}
			if fault.Is(err, fault.Stale) {
				r.fail(fault.Wrap(err, "enter the cluster", r.cfg.Name))
				return false
			}
		}
		// Denied: the leader does not know us, because we were removed, or because it was another leader that let us
		// in and could not commit it. Without a leader: perhaps it does not reach us where we are now.
		introduce = fault.Is(err, fault.Denied) || r.Role().LeaderAddress == ""
		r.log.Info("not entered yet", "error", err)
		pause(r.ctx, min(r.cfg.heartbeat()/4<<min(attempt, 4), 2*time.Second))
	}
	return false
}

// introduceSelf asks the leader to let us in (again), or to enter our new address, when that is needed.
func (r *Replica) introduceSelf(always bool) error {
	if s := r.configured(); s != nil && string(s.Address) == r.cfg.ClusterAddress && !always {
		return nil
	}
	if _, leading := r.leads(); leading {
		return r.moveSelf()
	}
	facts, _ := r.askFacts(r.ctx)
	let, err := r.join(facts)
	if let || err == nil {
		return nil // without anybody to ask, the Hello may still find a leader
	}
	return err
}

func (r *Replica) tryHello(hello *commandv1.Command) error {
	// Not LeaderWait: without a leader by then, we had better introduce ourselves. A Hello may be repeated.
	ctx, cancel := context.WithTimeout(r.ctx, max(4*r.cfg.heartbeat(), time.Second))
	defer cancel()
	if _, leading := r.leads(); leading && r.led.Load() == nil {
		return fault.New(fault.Unavailable, "say hello", "", "the term's barrier is not applied yet")
	}
	if !r.fsm.View().Initialized() {
		if err := r.initialized(ctx); err != nil {
			return err
		}
	}
	if err := failpoint.Hit(failpoint.NodeHello, r.NodeID()); err != nil {
		return err
	}
	_, err := r.Propose(ctx, hello)
	return err
}

// initialized waits until the cluster's first entry is applied here: a Hello must not come before it.
func (r *Replica) initialized(ctx context.Context) error {
	for {
		changed := r.fsm.Changed()
		if r.fsm.View().Initialized() {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fault.New(fault.Unavailable, "say hello", "", "the cluster's first entry is not applied here yet")
		}
	}
}
