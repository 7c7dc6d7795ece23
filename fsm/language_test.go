package fsm

import (
	"crypto/sha256"
	"strings"

	commandv1 "rollcall/proto/command/v1"
)

// parse reads one line of a transcript.
func (w *world) parse(line string) *commandv1.Command {
	a := parseArgs(w.t, line)
	c := &commandv1.Command{WallMs: int64(w.index+1) * 1000, ElapsedNs: uint64(a.dur("after"))}
	verb := a.at(0)
	a.pos = a.pos[1:]
	switch verb {
	case "init":
		c.Body = &commandv1.Command_InitCluster{InitCluster: NewCluster(a.str("cluster", "c1"), "test", "root-token")}
	case "tick":
		c.Body = &commandv1.Command_Tick{Tick: &commandv1.Tick{}}
	case "hello":
		c.Body = &commandv1.Command_Hello{Hello: &commandv1.Hello{
			NodeId: a.at(0), Name: a.str("name", a.at(0)), Incarnation: a.num("inc", 1),
		}}
	case "leave":
		c.Body = &commandv1.Command_Leave{Leave: &commandv1.Leave{NodeId: a.at(0), Incarnation: a.num("inc", w.incarnation(a.at(0)))}}
	case "remove":
		c.Body = &commandv1.Command_RemoveNode{RemoveNode: &commandv1.RemoveNode{NodeId: a.at(0), Why: a.str("why", "")}}
	case "restored":
		c.Body = &commandv1.Command_Restored{Restored: &commandv1.Restored{}}
	case "audit-salt":
		c.Body = &commandv1.Command_SetAuditSalt{SetAuditSalt: &commandv1.SetAuditSalt{Salt: []byte(a.at(0))}}
	case "rotate":
		c.Body = &commandv1.Command_RotateKeys{RotateKeys: &commandv1.RotateKeys{}}
	case "register", "deregister", "pin", "unpin":
		w.parseCatalog(c, verb, a)
	case "enable", "disable", "tune", "move":
		w.parseMount(c, verb, a)
	case "connect", "disconnect", "leader-only":
		w.parseConnection(c, verb, a)
	case "takeover", "put", "delete":
		w.parseStorage(c, verb, a)
	case "token", "revoke", "policy", "unpolicy", "namespace", "unnamespace", "lease", "unlease":
		w.parseAccess(c, verb, a)
	default:
		w.parseReload(c, verb, a)
	}
	return c
}

func (w *world) incarnation(node string) uint64 { return w.f.View().Node(node).GetIncarnation() }

func (w *world) parseCatalog(c *commandv1.Command, verb string, a args) {
	kind, name, version := a.str("type", "secret"), a.at(0), a.at(1)
	switch verb {
	case "register":
		c.Body = &commandv1.Command_RegisterPlugin{RegisterPlugin: &commandv1.RegisterPlugin{Spec: &commandv1.Spec{
			Type: kind, Name: name, Version: version, Command: a.str("command", name),
			Sha256: a.str("sha", sum(name+version+a.str("salt", ""))), Env: a.list("env"),
		}}}
	case "deregister":
		c.Body = &commandv1.Command_DeregisterPlugin{DeregisterPlugin: &commandv1.DeregisterPlugin{Type: kind, Name: name, Version: version}}
	case "pin":
		c.Body = &commandv1.Command_SetPin{SetPin: &commandv1.SetPin{Type: kind, Name: name, Version: version}}
	case "unpin":
		c.Body = &commandv1.Command_DeletePin{DeletePin: &commandv1.DeletePin{Type: kind, Name: name}}
	}
}

func (w *world) parseMount(c *commandv1.Command, verb string, a args) {
	path, tableName, ns := a.at(0), "secret", a.str("ns", "")
	if rest, ok := strings.CutPrefix(path, "auth/"); ok && !a.has("literal") {
		path, tableName = rest, "auth"
	}
	config := &commandv1.MountConfig{
		Fencing: a.str("fencing", ""), Trial: a.str("trial", ""),
		DefaultLeaseTtlS: int64(a.num("ttl", 0)), MaxLeaseTtlS: int64(a.num("max-ttl", 0)),
	}
	switch verb {
	case "enable":
		id := a.str("uuid", "uuid-of-"+ns+a.at(0))
		c.Body = &commandv1.Command_EnableMount{EnableMount: &commandv1.EnableMount{
			Uuid: id, Accessor: "acc-" + id, Namespace: ns, Table: tableName, Path: path,
			Type: a.str("type", "kv"), PluginType: a.str("plugin-type", ""), Config: config,
			PluginVersion: a.str("version", ""), ExpectSha256: a.str("expect", ""),
		}}
	case "disable":
		c.Body = &commandv1.Command_DisableMount{DisableMount: &commandv1.DisableMount{Namespace: ns, Table: tableName, Path: path}}
	case "tune":
		t := &commandv1.TuneMount{Namespace: ns, Table: tableName, Path: path}
		t.SetConfig, t.Config = a.has("config"), config
		if v, ok := a.opts["version"]; ok {
			t.SetPluginVersion, t.PluginVersion = true, v
		}
		if v, ok := a.opts["description"]; ok {
			t.SetDescription, t.Description = true, v
		}
		c.Body = &commandv1.Command_TuneMount{TuneMount: t}
	case "move":
		c.Body = &commandv1.Command_MoveMount{MoveMount: &commandv1.MoveMount{
			Namespace: ns, Table: tableName, Path: path,
			ToNamespace: a.str("to-ns", ns), ToTable: a.str("to-table", tableName), ToPath: a.at(1),
		}}
	}
}

func (w *world) parseConnection(c *commandv1.Command, verb string, a args) {
	uuid := w.mountUUID(a.at(0))
	m := w.f.View().Mount(uuid)
	epoch, term := a.num("epoch", m.GetEpoch()), a.num("term", w.term)
	switch verb {
	case "connect":
		c.Body = &commandv1.Command_PutConnection{PutConnection: &commandv1.PutConnection{
			MountUuid: uuid, Epoch: epoch, Term: term, Name: a.at(1), Uuid: a.str("uuid", "uuid-of-"+a.at(1)),
			PluginName: a.str("plugin", "mysql"), PluginVersion: a.str("version", ""), Config: []byte(a.str("config", "{}")),
			ExpectSha256: a.str("expect", ""),
		}}
	case "disconnect":
		c.Body = &commandv1.Command_DeleteConnection{DeleteConnection: &commandv1.DeleteConnection{
			MountUuid: uuid, Epoch: epoch, Term: term, Name: a.at(1),
		}}
	case "leader-only":
		c.Body = &commandv1.Command_MarkLeaderOnly{MarkLeaderOnly: &commandv1.MarkLeaderOnly{MountUuid: uuid}}
	}
}

func (w *world) parseStorage(c *commandv1.Command, verb string, a args) {
	m := w.f.View().Mount(w.mountUUID(a.at(0)))
	switch verb {
	case "takeover":
		t := &commandv1.TakeOver{
			MountUuid: w.mountUUID(a.at(0)), NodeId: a.at(1), Term: a.num("term", w.term),
			Generation: a.num("generation", wantedOf(m, a.at(1)).GetGeneration()),
		}
		for _, k := range a.list("writes") {
			t.Writes = append(t.Writes, &commandv1.StorageOp{Key: k, Value: []byte("of " + a.at(1))})
		}
		c.Body = &commandv1.Command_TakeOver{TakeOver: t}
	case "put", "delete":
		op := &commandv1.StorageOp{Key: a.at(1), Value: []byte(a.at(2)), Delete: verb == "delete"}
		if n := a.num("size", 0); n > 0 {
			op.Value = make([]byte, n)
		}
		ops := make([]*commandv1.StorageOp, a.num("times", 1))
		for i := range ops {
			ops[i] = op
		}
		c.Body = &commandv1.Command_WriteStorage{WriteStorage: &commandv1.WriteStorage{
			MountUuid: w.mountUUID(a.at(0)), Epoch: a.num("epoch", m.GetEpoch()), Term: a.num("term", w.term), Ops: ops,
		}}
	}
}

func hashOf(token string) []byte {
	if token == "" {
		return nil
	}
	h := sha256.Sum256([]byte(token))
	return h[:]
}

func (w *world) parseAccess(c *commandv1.Command, verb string, a args) {
	switch verb {
	case "token":
		t := &commandv1.Token{
			Hash: hashOf(a.at(0)), Accessor: a.str("accessor", "acc-"+a.at(0)), Parent: hashOf(a.str("parent", "")),
			Namespace: a.str("ns", ""), Policies: a.list("policies"), TtlNs: uint64(a.dur("ttl")), ExplicitMaxTtlNs: uint64(a.dur("max")),
		}
		if a.has("keep") {
			t.ExpiresClockNs = 1
		}
		c.Body = &commandv1.Command_PutToken{PutToken: &commandv1.PutToken{Token: t}}
	case "revoke":
		c.Body = &commandv1.Command_RevokeToken{RevokeToken: &commandv1.RevokeToken{
			Hash: hashOf(a.at(0)), Accessor: a.str("accessor", ""), OrphanChildren: a.has("orphan"),
		}}
	case "policy":
		c.Body = &commandv1.Command_PutPolicy{PutPolicy: &commandv1.PutPolicy{Policy: &commandv1.Policy{
			Name: a.at(0), Namespace: a.str("ns", ""), Text: a.at(1),
		}}}
	case "unpolicy":
		c.Body = &commandv1.Command_DeletePolicy{DeletePolicy: &commandv1.DeletePolicy{Name: a.at(0), Namespace: a.str("ns", "")}}
	case "namespace":
		c.Body = &commandv1.Command_PutNamespace{PutNamespace: &commandv1.PutNamespace{Namespace: &commandv1.Namespace{
			Path: a.at(0), Uuid: a.str("uuid", "ns-"+a.at(0)),
		}}}
	case "unnamespace":
		c.Body = &commandv1.Command_DeleteNamespace{DeleteNamespace: &commandv1.DeleteNamespace{Path: a.at(0)}}
	case "lease":
		l := &commandv1.Lease{
			Id: a.at(0), MountUuid: w.mountUUID(a.at(1)), TokenHash: hashOf(a.str("token", "")),
			TtlNs: uint64(a.dur("ttl")), MaxTtlNs: uint64(a.dur("max")),
		}
		c.Body = &commandv1.Command_PutLease{PutLease: &commandv1.PutLease{Lease: l}}
	case "unlease":
		c.Body = &commandv1.Command_RemoveLease{RemoveLease: &commandv1.RemoveLease{Id: a.at(0)}}
	}
}

var strategyNames = map[string]commandv1.Strategy{
	"": 0, "all-or-nothing": 1, "best-effort": 2, "rolling": 3, "canary": 4, "nonsense": 99,
}

func (w *world) parseReload(c *commandv1.Command, verb string, a args) {
	v := w.f.View()
	r := v.Reload(a.at(0))
	switch verb {
	case "reload":
		c.Body = &commandv1.Command_StartReload{StartReload: w.parseStart(a)}
	case "prepared", "refused", "failed", "safe", "switched":
		batch := &commandv1.ReportBatch{}
		for node := range strings.SplitSeq(a.at(1), ",") {
			batch.Reports = append(batch.Reports, w.report(r, verb, node, a))
		}
		c.Body = &commandv1.Command_ReportBatch{ReportBatch: batch}
	case "expire":
		phase := r.GetPhase()
		if p := a.str("phase", ""); p != "" {
			phase = commandv1.Phase(commandv1.Phase_value["PHASE_"+strings.ToUpper(p)])
		}
		c.Body = &commandv1.Command_ExpireReload{ExpireReload: &commandv1.ExpireReload{
			Id: a.at(0), Phase: phase, Wave: uint32(a.num("wave", uint64(r.GetWave()))),
		}}
	case "abort", "pause", "resume", "promote":
		c.Body = &commandv1.Command_ControlReload{ControlReload: &commandv1.ControlReload{
			Id: a.at(0), Why: a.str("why", ""), RequestedBy: a.str("by", ""),
			Action: commandv1.ControlReload_Action(commandv1.ControlReload_Action_value["ACTION_"+strings.ToUpper(verb)]),
		}}
	case "exclude":
		c.Body = &commandv1.Command_ExcludeNode{ExcludeNode: &commandv1.ExcludeNode{
			ReloadId: a.at(0), NodeId: a.at(1), Incarnation: a.num("inc", w.incarnation(a.at(1))), Voters: a.list("voters"),
		}}
	case "fence":
		c.Body = &commandv1.Command_FenceNode{FenceNode: &commandv1.FenceNode{
			ReloadId: a.at(0), NodeId: a.at(1), Incarnation: a.num("inc", w.incarnation(a.at(1))),
		}}
	case "gate":
		c.Body = &commandv1.Command_AdvanceWave{AdvanceWave: &commandv1.AdvanceWave{
			ReloadId: a.at(0), Wave: uint32(a.num("wave", uint64(r.GetWave()))), LeaderId: a.str("leader", ""),
			Gate: &commandv1.Gate{
				Verdict: commandv1.Gate_Verdict(commandv1.Gate_Verdict_value["VERDICT_"+strings.ToUpper(a.at(1))]),
				Why:     a.str("why", ""),
			},
		}}
	case "drop":
		before := v.ClockNS() + c.GetElapsedNs() - uint64(a.dur("older"))
		c.Body = &commandv1.Command_DropReloads{DropReloads: &commandv1.DropReloads{BeforeClockNs: before}}
	default:
		w.t.Fatalf("what is %q?", verb)
	}
}

func (w *world) parseStart(a args) *commandv1.StartReload {
	s := &commandv1.StartReload{
		Id: a.at(0), Scope: commandv1.Scope_SCOPE_GLOBAL, ServingNode: a.str("on", "n1"), Namespace: a.str("ns", ""),
		LeaderId: a.str("leader", "n1"), ToPrevious: a.has("back") || a.opts["rolls-back"] != "", RollsBack: a.str("rolls-back", ""),
		Selector: &commandv1.Selector{
			Plugin: a.str("plugin", ""), PluginType: a.str("type", ""), Mounts: a.list("mounts"), AllNamespaces: a.has("everywhere"),
		},
		Options: &commandv1.Options{
			Strategy: strategyNames[a.str("strategy", "")], Version: a.str("version", ""),
			RollbackOnSwitchFailure: a.has("rollback-on-failure"), KeepFenced: a.has("keep-fenced"),
			MaxUnavailable: uint32(a.num("max-unavailable", 0)),
		},
	}
	if a.has("local") {
		s.Scope = commandv1.Scope_SCOPE_LOCAL
	}
	if a.has("nowhere") {
		s.Scope = commandv1.Scope_SCOPE_UNSPECIFIED
	}
	for _, x := range a.list("waves") {
		text, percent := strings.CutSuffix(x, "%")
		n := parseArgs(w.t, "n="+text).num("n", 0)
		s.Options.Waves = append(s.Options.Waves, &commandv1.Options_Wave{Size: uint32(n), Percent: percent})
	}
	return s
}

// report is what a node says of all targets of a reload, or of one.
func (w *world) report(r *commandv1.Reload, verb, node string, a args) *commandv1.Report {
	stage := map[string]commandv1.MountReport_Stage{
		"prepared": commandv1.MountReport_STAGE_PREPARED, "refused": commandv1.MountReport_STAGE_REFUSED,
		"failed": commandv1.MountReport_STAGE_FAILED_SWITCH, "safe": commandv1.MountReport_STAGE_SAFE,
		"switched": commandv1.MountReport_STAGE_SWITCHED,
	}[verb]
	rep := &commandv1.Report{ReloadId: a.at(0), NodeId: node, Incarnation: a.num("inc", w.incarnation(node))}
	for _, t := range r.GetTargets() {
		if only := a.str("mount", ""); only != "" && w.mountUUID(only) != t.GetMountUuid() {
			continue
		}
		m := &commandv1.MountReport{
			MountUuid: t.GetMountUuid(), Stage: stage, WallMs: int64(w.index),
			From: &commandv1.ProcessFacts{Pid: 10, Generation: t.GetFromGeneration()},
			To:   &commandv1.ProcessFacts{Pid: 20, Generation: a.num("generation", r.GetGeneration())},
		}
		if a.has("same-process") {
			m.To.Pid = 10
		}
		if verb == "refused" || verb == "failed" {
			m.FailedPhase, m.Cause = a.str("phase", "start"), a.str("cause", "exit code 1")
		}
		rep.Mounts = append(rep.Mounts, m)
	}
	return rep
}
