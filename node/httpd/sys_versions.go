package httpd

import (
	"slices"
	"strings"

	commandv1 "rollcall/proto/command/v1"

	"rollcall/fsm"
	"rollcall/node/api"
	"rollcall/node/fault"
)

// versions asks every node what it runs and holds it against the state.
func (s *Server) versions(q *request) (*reply, error) {
	view, err := s.look(q)
	if err != nil {
		return nil, err
	}
	nodes := s.Plugins.RunningEverywhere(q.ctx)
	slices.SortFunc(nodes, func(a, b api.NodeRunning) int { return strings.Compare(a.Node, b.Node) })
	out := &api.Versions{Nodes: []string{}, Mounts: []api.MountVersions{}, Index: view.Index()}
	for _, n := range nodes {
		out.Nodes = append(out.Nodes, n.Node)
	}
	for _, m := range view.Mounts() {
		if q.ns != "" && m.GetNamespace() != q.ns {
			continue
		}
		out.Mounts = append(out.Mounts, versionsOf(view, m, nodes))
	}
	return &reply{data: out}, nil
}

func wantedProcess(w *commandv1.Wanted) api.Process {
	return api.Process{Version: w.GetSpec().GetVersion(), SHA256: w.GetSpec().GetSha256(), Generation: w.GetGeneration()}
}

func versionsOf(view *fsm.View, m *commandv1.Mount, nodes []api.NodeRunning) api.MountVersions {
	row := api.MountVersions{
		Mount: displayPath(m), Namespace: m.GetNamespace(), Accessor: m.GetAccessor(), Type: m.GetPluginType(),
		Plugin: m.GetType(), Configured: m.GetConfiguredVersion(), Wanted: wantedProcess(m.GetWanted()), Nodes: []api.NodeVersion{},
	}
	if p := view.Pin(m.GetPluginType(), m.GetType()); p != nil {
		row.Pinned = p.GetVersion()
	}
	for _, n := range nodes {
		cell := api.NodeVersion{Node: n.Node, NodeID: n.NodeID, Wanted: wantedProcess(view.Wanted(m, n.NodeID)), State: "unknown"}
		for _, o := range m.GetOverrides() {
			if o.GetNodeId() == n.NodeID {
				cell.Override, cell.Why = overrideWhy(o)
			}
		}
		i := slices.IndexFunc(n.Mounts, func(r api.RunningMount) bool { return r.MountUUID == m.GetUuid() })
		switch {
		case n.Error != "":
			cell.Why = "does not answer: " + n.Error
		case i < 0:
			cell.State, cell.Why = "stopped", "runs nothing for this mount yet"
		default:
			fillCell(&cell, n.Mounts[i])
		}
		row.Nodes = append(row.Nodes, cell)
	}
	return row
}

func fillCell(cell *api.NodeVersion, r api.RunningMount) {
	cell.State, cell.Restarts, cell.Started = r.State, r.Restarts, r.Started
	if r.PID != 0 {
		cell.Running = &api.Process{Version: r.Version, SHA256: r.SHA256, PID: r.PID, Generation: r.Generation}
	}
	cell.Same = r.Ready && r.Generation == cell.Wanted.Generation
	if r.Error != "" {
		cell.Why = r.Error
	}
}

func overrideWhy(o *commandv1.Override) (word, why string) {
	id := o.GetWanted().GetReloadId()
	switch o.GetWhy() {
	case commandv1.Override_WHY_LOCAL:
		return "local", "reloaded on this node alone (" + id + "); a global reload ends it"
	case commandv1.Override_WHY_REFUSED:
		return "refused", "refused a best-effort reload and kept what it had; the next global reload tries again"
	case commandv1.Override_WHY_WAVE:
		return "wave", "a wave of reload " + id + " has reached this node"
	default:
		return "", ""
	}
}

// plan resolves what a global reload would touch, and tries it on every node.
func (s *Server) plan(q *request) (*reply, error) {
	b := q.body
	start := &commandv1.StartReload{
		Id: q.id, Namespace: q.ns, ServingNode: s.NodeID, Scope: commandv1.Scope_SCOPE_GLOBAL,
		Selector: &commandv1.Selector{PluginType: cmpText(b.str("type"), "unknown"), Plugin: b.str("plugin"), AllNamespaces: q.ns == ""},
		Options:  &commandv1.Options{Version: b.str("version"), Trial: b.str("trial"), Strategy: commandv1.Strategy_STRATEGY_ALL_OR_NOTHING},
	}
	if mounts := b.strs("mounts"); len(mounts) > 0 {
		if start.GetSelector().GetPlugin() != "" {
			return nil, fault.Text(fault.Invalid, "plugin and mounts cannot be set at the same time")
		}
		start.Selector = &commandv1.Selector{Mounts: mounts}
	} else if start.GetSelector().GetPlugin() == "" {
		return nil, fault.Text(fault.Invalid, "plugin or mounts must be provided")
	}
	if err := q.checked(true); err != nil {
		return nil, err
	}
	v, err := canonicalVersion(start.GetOptions().GetVersion())
	if err != nil {
		return nil, err
	}
	start.Options.Version = v
	view, err := s.Replica.Consistent(q.ctx)
	if err != nil {
		return nil, err
	}
	targets, err := view.PlanReload(start)
	if err != nil {
		return nil, err
	}
	nodes, err := s.Plugins.Plan(q.ctx, targets, start.GetOptions().GetTrial())
	if err != nil {
		return nil, err
	}
	out := &api.Plan{OK: len(targets) > 0, Targets: []api.ReloadTarget{}, Nodes: nodes}
	for _, t := range targets {
		path := t.GetPath()
		if t.GetTable() == "auth" {
			path = "auth/" + path
		}
		out.Targets = append(out.Targets, targetOf(t, path))
	}
	out.Untouched = untouched(view, start, targets)
	for _, n := range nodes {
		out.OK = out.OK && n.Error == "" && !slices.ContainsFunc(n.Mounts, func(m api.PlanMount) bool { return !m.OK })
	}
	return &reply{data: out}, nil
}

// untouched lists the mounts that the reload of a plan would leave alone, and why.
func untouched(view *fsm.View, start *commandv1.StartReload, targets []*commandv1.Target) []api.PlanUntouched {
	sel, ns := start.GetSelector(), start.GetNamespace()
	out := []api.PlanUntouched{}
	for _, m := range view.Mounts() {
		if ns != "" && m.GetNamespace() != ns ||
			slices.ContainsFunc(targets, func(t *commandv1.Target) bool { return t.GetMountUuid() == m.GetUuid() }) {
			continue
		}
		u := api.PlanUntouched{Mount: displayPath(m), Namespace: m.GetNamespace(), Plugin: m.GetType()}
		switch {
		case len(sel.GetMounts()) > 0:
			u.Why = "it is not among the mounts named"
		case m.GetType() != sel.GetPlugin():
			u.Why = "it runs the plugin " + m.GetType()
		default:
			u.Why = "its plugin is of type " + m.GetPluginType()
		}
		out = append(out, u)
	}
	slices.SortFunc(out, func(a, b api.PlanUntouched) int { return strings.Compare(a.Namespace+a.Mount, b.Namespace+b.Mount) })
	return out
}
