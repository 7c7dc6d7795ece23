package node

import (
	"context"
	"sync"
	"time"

	commandv1 "rollcall/proto/command/v1"
	peerv1 "rollcall/proto/peer/v1"

	"rollcall/node/api"
	"rollcall/node/fault"
	"rollcall/node/reload"
)

// askTimeout bounds a question to another node: what people wait for, they wait for briefly.
const askTimeout = 3 * time.Second

// planTimeout bounds a trial on another node: several plugins may start there.
const planTimeout = 60 * time.Second

// inventory answers node/httpd what runs here and elsewhere.
type inventory struct{ n *Node }

func (i *inventory) TryMount(ctx context.Context, m *commandv1.Mount, spec *commandv1.Spec) error {
	return i.n.reloads.TryMount(ctx, m, spec)
}

func (i *inventory) Hash(ctx context.Context, command string) (string, error) {
	return i.n.launcher.Hash(ctx, command)
}

// Running tells what this node runs, by mount uuid.
func (i *inventory) Running() map[string]api.RunningMount {
	out := map[string]api.RunningMount{}
	for _, s := range i.n.reloads.Running() {
		out[s.MountUUID] = runningOf(s)
	}
	return out
}

func runningOf(s reload.MountStatus) api.RunningMount {
	r := api.RunningMount{
		MountUUID: s.MountUUID, Generation: s.Generation, Version: s.Spec.GetVersion(), SHA256: s.Spec.GetSha256(),
		PID: int64(s.PID), State: string(s.State), Error: s.LastError, Restarts: s.Restarts,
		Ready: s.PID != 0 && (s.State == reload.StateReady || s.State == reload.StatePreparing),
	}
	if !s.Started.IsZero() {
		r.Started = s.Started.UTC().Format(time.RFC3339)
	}
	return r
}

// each asks every node of the table at the same time; this node answers itself through self.
func (i *inventory) each(timeout time.Duration, ctx context.Context, ask func(context.Context, int, *commandv1.Node, peerv1.ReloadClient) error,
	self func(int), failed func(int, *commandv1.Node, error),
) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var wg sync.WaitGroup
	for k, row := range i.n.state.View().Nodes() {
		if row.GetId() == i.n.ID() {
			self(k)
			continue
		}
		wg.Go(func() {
			if row.GetLeft() {
				failed(k, row, fault.Text(fault.Unavailable, "it has left"))
				return
			}
			conn, err := i.n.dialNode(row)
			if err == nil {
				err = ask(ctx, k, row, peerv1.NewReloadClient(conn))
			}
			if err != nil {
				failed(k, row, err)
			}
		})
	}
	wg.Wait()
}

// RunningEverywhere asks every node what it runs.
func (i *inventory) RunningEverywhere(ctx context.Context) []api.NodeRunning {
	rows := i.n.state.View().Nodes()
	out := make([]api.NodeRunning, len(rows))
	for k, row := range rows {
		out[k] = api.NodeRunning{Node: row.GetName(), NodeID: row.GetId(), Mounts: []api.RunningMount{}}
	}
	i.each(askTimeout, ctx, func(ctx context.Context, k int, _ *commandv1.Node, c peerv1.ReloadClient) error {
		resp, err := c.Running(ctx, &peerv1.RunningRequest{})
		for _, m := range resp.GetMounts() {
			out[k].Mounts = append(out[k].Mounts, api.RunningMount{
				MountUUID: m.GetMountUuid(), Generation: m.GetGeneration(),
				Version: m.GetVersion(), SHA256: m.GetSha256(), PID: m.GetPid(), State: m.GetState(), Error: m.GetError(),
				Ready: m.GetReady(), Restarts: m.GetRestarts(), Started: time.UnixMilli(m.GetStartedWallMs()).UTC().Format(time.RFC3339),
			})
		}
		return err
	}, func(k int) {
		for _, r := range i.Running() {
			out[k].Mounts = append(out[k].Mounts, r)
		}
	}, func(k int, _ *commandv1.Node, err error) { out[k].Error = err.Error() })
	return out
}

// Plan tries targets on every node.
func (i *inventory) Plan(ctx context.Context, targets []*commandv1.Target, trial string) ([]api.PlanNode, error) {
	rows := i.n.state.View().Nodes()
	out := make([]api.PlanNode, len(rows))
	for k, row := range rows {
		out[k] = api.PlanNode{Node: row.GetName(), NodeID: row.GetId(), Mounts: []api.PlanMount{}}
	}
	var local error
	i.each(planTimeout, ctx, func(ctx context.Context, k int, _ *commandv1.Node, c peerv1.ReloadClient) error {
		resp, err := c.Plan(ctx, &peerv1.PlanRequest{Targets: targets, Trial: trial})
		if err == nil {
			out[k].Mounts = planMounts(targets, resp.GetMounts(), resp.GetRssBytes())
		}
		return err
	}, func(k int) {
		var reports []*commandv1.MountReport
		var rss []uint64
		if reports, rss, local = i.n.reloads.Plan(ctx, targets, trial); local == nil {
			out[k].Mounts = planMounts(targets, reports, rss)
		}
	}, func(k int, _ *commandv1.Node, err error) { out[k].Error = err.Error() })
	return out, local
}

func planMounts(targets []*commandv1.Target, reports []*commandv1.MountReport, rss []uint64) []api.PlanMount {
	paths := map[string]string{}
	for _, t := range targets {
		paths[t.GetMountUuid()] = t.GetPath()
		if t.GetTable() == "auth" {
			paths[t.GetMountUuid()] = "auth/" + t.GetPath()
		}
	}
	out := []api.PlanMount{}
	for k, r := range reports {
		m := api.PlanMount{
			Mount: paths[r.GetMountUuid()], MountUUID: r.GetMountUuid(), Phase: r.GetFailedPhase(), Cause: r.GetCause(),
			OK: r.GetStage() == commandv1.MountReport_STAGE_PREPARED, Version: r.GetTo().GetVersion(), SHA256: r.GetTo().GetSha256(),
		}
		if k < len(rss) {
			m.RSSBytes = rss[k]
		}
		for _, s := range r.GetSteps() {
			m.Steps = append(m.Steps, api.Step{Name: s.GetName(), At: api.StepTime(s.GetAtUs()), MS: float64(s.GetTookUs()) / 1000})
		}
		m.Timings = api.TimingsOf(m.Steps)
		out = append(out, m)
	}
	return out
}

// cluster answers node/httpd who is a member.
type cluster struct{ n *Node }

func (c *cluster) Status() api.ClusterStatus {
	view, role := c.n.state.View(), c.n.replica.Role()
	st := api.ClusterStatus{
		Initialized: view.ClusterID() != "", ClusterName: view.ClusterName(), ClusterID: view.ClusterID(),
		IsLeader: role.Leader, LeaderSince: role.Since, LeaderID: role.LeaderID, LeaderClusterAddress: role.LeaderAddress, Term: role.Term,
		CommitIndex: view.Index(), AppliedIndex: view.Index(),
	}
	if row := view.Node(role.LeaderID); row != nil {
		st.LeaderName, st.LeaderAPIAddress = row.GetName(), row.GetApiAddress()
	}
	return st
}

func (c *cluster) Members(context.Context) ([]api.Member, error) {
	view := c.n.state.View()
	byID := map[string]*api.Member{}
	var order []string
	add := func(id string) *api.Member {
		if byID[id] == nil {
			byID[id] = &api.Member{ID: id, Self: id == c.n.ID()}
			order = append(order, id)
		}
		return byID[id]
	}
	for _, row := range view.Nodes() {
		m := add(row.GetId())
		m.Name, m.APIAddress, m.ClusterAddress = row.GetName(), row.GetApiAddress(), row.GetClusterAddress()
		m.Version, m.OSArch, m.Incarnation, m.Left = row.GetBuildVersion(), row.GetOsArch(), row.GetIncarnation(), row.GetLeft()
	}
	for _, r := range c.n.replica.Members() {
		m := add(r.ID)
		m.Leader, m.Suffrage, m.Gossip = r.Leader, "nonvoter", r.State
		if r.Voter {
			m.Suffrage = "voter"
		}
		if m.Name == "" {
			m.Name = r.Name
		}
		if m.ClusterAddress == "" {
			m.ClusterAddress = r.Address
		}
	}
	out := make([]api.Member, 0, len(order))
	for _, id := range order {
		out = append(out, *byID[id])
	}
	return out, nil
}

func (c *cluster) RemoveMember(ctx context.Context, id string) error {
	return c.n.replica.RemoveMember(ctx, id)
}

func (c *cluster) StepDown(ctx context.Context) error { return c.n.replica.TransferLeadership(ctx) }

// Leave begins to take this node out of the cluster; the process ends afterwards. A node that leads and cannot hand
// the office over does not begin: the others would be left without a quorum.
func (c *cluster) Leave(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := c.n.handOver(ctx); err != nil {
		return fault.Wrap(err, "leave the cluster", c.n.Name())
	}
	go c.n.leave()
	return nil
}

// errLeft ends Run without being a failure.
var errLeft = fault.Text(fault.Canceled, "this node has left the cluster")
