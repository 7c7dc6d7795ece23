package replica

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	autopilot "github.com/hashicorp/raft-autopilot"
)

// deadContact is the silence after which autopilot calls a server unhealthy; maxTrailing the entries it may lack.
// OpenBao's values.
const (
	deadContact = 10 * time.Second
	maxTrailing = 1000
)

// pilotApp tells autopilot what this leader knows of the servers.
type pilotApp struct {
	r     *Replica
	ctx   context.Context
	since time.Time
}

var _ autopilot.ApplicationIntegration = (*pilotApp)(nil)

// AutopilotConfig is autopilot's.
func (a *pilotApp) AutopilotConfig() *autopilot.Config {
	return &autopilot.Config{
		CleanupDeadServers: true, MinQuorum: 3, LastContactThreshold: deadContact, MaxTrailingLogs: maxTrailing,
		ServerStabilizationTime: a.r.cfg.PromoteAfter,
	}
}

// NotifyState is autopilot's; it is called with autopilot's lock held.
func (a *pilotApp) NotifyState(s *autopilot.State) {
	a.r.health.mu.Lock()
	defer a.r.health.mu.Unlock()
	if a.ctx.Err() == nil {
		a.r.health.state = s
	}
}

// KnownServers names every server of the configuration: one that is missing here would be removed as stale. A server
// is failed, hence removed for good, only when gossip calls it dead and nobody has heard it for RemoveDeadAfter.
func (a *pilotApp) KnownServers() map[raft.ServerID]*autopilot.Server {
	r, view := a.r, a.r.fsm.View()
	gone := map[string]bool{}
	for _, p := range r.cfg.Discovery.Peers() {
		gone[p.NodeID] = p.Status == PeerDead || p.Status == PeerLeft
	}
	out := map[raft.ServerID]*autopilot.Server{}
	for _, s := range r.servers() {
		status := autopilot.NodeAlive
		dead, known := gone[string(s.ID)]
		if s.ID != raft.ServerID(r.NodeID()) && (dead || !known) && time.Since(a.heard(s.ID)) > r.cfg.RemoveDeadAfter {
			status = autopilot.NodeFailed
		}
		out[s.ID] = &autopilot.Server{
			ID: s.ID, Name: view.Node(string(s.ID)).GetName(), Address: s.Address, NodeStatus: status, RaftVersion: 3,
			IsLeader: s.ID == raft.ServerID(r.NodeID()), NodeType: autopilot.NodeVoter,
		}
	}
	return out
}

// heard returns when this leadership last heard the server; its beginning, when never.
func (a *pilotApp) heard(id raft.ServerID) time.Time {
	a.r.health.mu.Lock()
	defer a.r.health.mu.Unlock()
	if t, ok := a.r.health.heard[id]; ok {
		return t
	}
	return a.since
}

// FetchServerStats asks every server how far it is.
func (a *pilotApp) FetchServerStats(ctx context.Context, servers map[raft.ServerID]*autopilot.Server) map[raft.ServerID]*autopilot.ServerStats {
	r := a.r
	var mu sync.Mutex
	var wg sync.WaitGroup
	out := map[raft.ServerID]*autopilot.ServerStats{}
	limit := make(chan struct{}, 16)
	for id, s := range servers {
		if string(id) == r.NodeID() {
			f := r.facts()
			mu.Lock()
			out[id] = &autopilot.ServerStats{LastTerm: f.GetLastLogTerm(), LastIndex: f.GetLastLogIndex()}
			mu.Unlock()
			continue
		}
		address := string(s.Address)
		if now, err := (addresses{r}).ServerAddr(id); err == nil {
			address = string(now)
		}
		limit <- struct{}{}
		wg.Go(func() {
			defer func() { <-limit }()
			f, err := r.factsOf(ctx, address, s.Name)
			if err != nil || f.GetNodeId() != string(id) {
				return
			}
			mu.Lock()
			out[id] = &autopilot.ServerStats{
				LastContact: time.Duration(f.GetLastContactNs()), LastTerm: f.GetLastLogTerm(), LastIndex: f.GetLastLogIndex(),
			}
			mu.Unlock()
			r.health.mu.Lock()
			r.health.heard[id] = time.Now()
			r.health.nonVoters[id] = f.GetNonVoter()
			r.health.mu.Unlock()
		})
	}
	wg.Wait()
	return out
}

// RemoveFailedServer is autopilot's: a dead server goes for good. It must return at once.
func (a *pilotApp) RemoveFailedServer(s *autopilot.Server) {
	if !a.r.inflight.begin() {
		return
	}
	go func() {
		defer a.r.inflight.done()
		if err := a.r.removeHere(a.ctx, string(s.ID), "dead for longer than "+a.r.cfg.RemoveDeadAfter.String()); err != nil {
			a.r.log.Warn("a dead server is not removed yet", "node", s.ID, "error", err)
		}
	}()
}

// promoter decides who votes: every healthy server until there are three, then up to the target in odd numbers, after
// it has been stable for a while. It never demotes.
type promoter struct {
	autopilot.StablePromoter
	voters int
	after  time.Duration
	// reader says who never wants to be a voter.
	reader func(raft.ServerID) bool
}

var _ autopilot.Promoter = (*promoter)(nil)

// CalculatePromotionsAndDemotions is autopilot.Promoter's.
func (p *promoter) CalculatePromotionsAndDemotions(_ *autopilot.Config, s *autopilot.State) autopilot.RaftChanges {
	voters, healthyVoters := 0, 0
	var ready, stable []raft.ServerID
	for id, srv := range s.Servers {
		switch {
		case srv.HasVotingRights():
			voters++
			if srv.Health.Healthy {
				healthyVoters++
			}
		case !srv.Health.Healthy || p.reader(id):
		default:
			ready = append(ready, id)
			if srv.Health.IsStable(time.Now(), p.after) {
				stable = append(stable, id)
			}
		}
	}
	slices.Sort(ready)
	slices.Sort(stable)
	return autopilot.RaftChanges{Promotions: promotions(voters, p.voters, ready, stable)}
}

// promotions picks who becomes a voter. Beyond three, an even number of voters tolerates no more failures than one
// fewer, and costs a wider quorum: so two are promoted together or none.
func promotions(voters, target int, ready, stable []raft.ServerID) []raft.ServerID {
	if room := min(3, target) - voters; room > 0 {
		return ready[:min(room, len(ready))]
	}
	room := min(target-voters, len(stable))
	if (voters+room)%2 == 0 {
		room--
	}
	if room <= 0 {
		return nil
	}
	return stable[:room]
}
