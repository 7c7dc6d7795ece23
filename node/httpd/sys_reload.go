package httpd

import (
	"context"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	commandv1 "rollcall/proto/command/v1"

	"rollcall/fsm"
	"rollcall/node/api"
	"rollcall/node/failpoint"
	"rollcall/node/fault"
)

func (s *Server) reloadRoutes() []*route {
	return []*route{
		{
			pattern: "sys/plugins/reload/backend", ops: map[operation]handler{opUpdate: s.reloadBackend},
			summary: "Reload a plugin or mounts of this namespace, on this node or with scope=global on all.",
		},
		{
			pattern: "sys/plugins/reload/backend/status", anyNode: true, ops: map[operation]handler{opRead: s.reloadStatus},
			summary: "Who has finished a reload.",
		},
		{
			pattern: "sys/plugins/reload/{type}", ops: map[operation]handler{opUpdate: s.reloadNameless},
			summary: "What the stock command sends for -mounts without a namespace.",
		},
		{
			pattern: "sys/plugins/reload/{type}/{name}", rootOnly: true, ops: map[operation]handler{opUpdate: s.reloadNamed},
			summary: "Reload a plugin in every namespace.",
		},
		{
			pattern: "sys/plugins/rollback/{type}/{name}", rootOnly: true, ours: true, ops: map[operation]handler{opUpdate: s.rollback},
			summary: "Reload a plugin's mounts to what they ran before their last switch.",
		},
		{
			pattern: "sys/reloads", ours: true, anyNode: true, ops: map[operation]handler{opRead: s.listReloads, opList: s.listReloads},
			summary: "The reloads, newest first.",
		},
		{
			pattern: "sys/reloads/{id}", ours: true, anyNode: true, ops: map[operation]handler{opRead: s.readReload},
			summary: "One reload: who did what. index and wait make it a blocking query.",
		},
		{
			pattern: "sys/reloads/{id}/{action}", ours: true, ops: map[operation]handler{opUpdate: s.controlReload},
			summary: "abort, pause, resume or promote a reload.",
		},
		{
			pattern: "sys/plugins/versions", ours: true, anyNode: true, ops: map[operation]handler{opRead: s.versions},
			summary: "What every node runs against what the state wants.",
		},
		{
			pattern: "sys/plugins/plan", ours: true, ops: map[operation]handler{opUpdate: s.plan},
			summary: "Try a reload on every node without a switch.",
		},
	}
}

// pluginName is the shape of a plugin's name in a path (CONTRACT 2.2).
var pluginName = regexp.MustCompile(`^\w(([\w-.]+)?\w)?$`)

// reloadBackend validates in the contract's order, with its texts.
func (s *Server) reloadBackend(q *request) (*reply, error) {
	scope := q.body.str("scope")
	sel := &commandv1.Selector{PluginType: "unknown", Plugin: q.body.str("plugin")}
	mounts := q.body.strs("mounts")
	if q.body.err != nil {
		return nil, q.body.err
	}
	sc, err := scopeOf(scope)
	switch {
	case err != nil:
		return nil, err
	case sel.Plugin != "" && len(mounts) > 0:
		return nil, fault.Text(fault.Invalid, "plugin and mounts cannot be set at the same time")
	case sel.Plugin == "" && len(mounts) == 0:
		return nil, fault.Text(fault.Invalid, "plugin or mounts must be provided")
	}
	if len(mounts) > 0 {
		sel = &commandv1.Selector{Mounts: mounts}
	}
	return s.startReload(q, &commandv1.StartReload{Selector: sel, Scope: sc})
}

func scopeOf(scope string) (commandv1.Scope, error) {
	switch scope {
	case "":
		return commandv1.Scope_SCOPE_LOCAL, nil
	case "global":
		return commandv1.Scope_SCOPE_GLOBAL, nil
	default:
		return 0, fault.Text(fault.Invalid, "reload scope must be omitted or 'global'")
	}
}

// reloadNamed serves sys/plugins/reload/:type/:name, and its older cousin with "backend" as the name.
func (s *Server) reloadNamed(q *request) (*reply, error) {
	kind, name := q.params["type"], q.params["name"]
	if kind != "unknown" && !isPluginType(kind) || !pluginName.MatchString(name) {
		return nil, &fault.Error{Kind: fault.UnsupportedPath}
	}
	sc, err := scopeOf(q.body.str("scope"))
	if err := cmpErr(q.body.err, err); err != nil {
		return nil, err
	}
	return s.startReload(q, &commandv1.StartReload{
		Scope:    sc,
		Selector: &commandv1.Selector{PluginType: kind, Plugin: name, AllNamespaces: true},
	})
}

// reloadNameless meets a defect of the stock command: -mounts without a namespace sends neither.
func (s *Server) reloadNameless(q *request) (*reply, error) {
	if q.params["type"] != "unknown" && !isPluginType(q.params["type"]) {
		return nil, &fault.Error{Kind: fault.UnsupportedPath}
	}
	return nil, fault.Text(fault.Invalid, "no plugin named in the path: the vault command does not send -mounts without a "+
		"namespace; set one (-namespace=root) to reload by mount, or name a plugin")
}

func (s *Server) rollback(q *request) (*reply, error) {
	kind, name := q.params["type"], q.params["name"]
	if kind != "unknown" && !isPluginType(kind) || !pluginName.MatchString(name) {
		return nil, &fault.Error{Kind: fault.UnsupportedPath}
	}
	return s.startReload(q, &commandv1.StartReload{
		Scope: commandv1.Scope_SCOPE_GLOBAL, ToPrevious: true,
		Selector: &commandv1.Selector{PluginType: kind, Plugin: name, AllNamespaces: true},
	})
}

// reloadFields are what a reload understands besides the contract's own fields.
func (s *Server) readOptions(b *fields, sc commandv1.Scope) (*commandv1.Options, error) {
	o := &commandv1.Options{
		Version: b.str("version"), PrepareMs: b.duration("prepare").Milliseconds(),
		RunMs: b.duration("deadline").Milliseconds(), QueueMs: b.duration("queue").Milliseconds(), Trial: b.str("trial"),
		OnDrainTimeout: b.str("on_drain_timeout"), MaxUnavailable: uint32(max(0, b.number("max_unavailable"))),
		BakeMs: b.duration("bake").Milliseconds(), MaxErrorRate: b.float("max_error_rate"),
		MaxP99Increase: b.float("max_p99_increase"), MinSamples: uint32(max(0, b.number("min_samples"))),
	}
	if b.has("exclude_fenced") {
		o.KeepFenced = !b.boolean("exclude_fenced")
	}
	switch v := b.str("on_switch_failure"); v {
	case "", "retry":
	case "roll back", "rollback", "roll-back":
		o.RollbackOnSwitchFailure = true
	default:
		return nil, fault.Text(fault.Invalid, "on_switch_failure must be retry or rollback, not %q", v)
	}
	if !slices.Contains([]string{"", "cancel", "fence"}, o.GetOnDrainTimeout()) {
		return nil, fault.Text(fault.Invalid, "on_drain_timeout must be cancel or fence, not %q", o.GetOnDrainTimeout())
	}
	if !slices.Contains([]string{"", "handshake", "setup", "initialize"}, o.GetTrial()) {
		return nil, fault.Text(fault.Invalid, "trial must be handshake, setup or initialize, not %q", o.GetTrial())
	}
	strategy, err := strategyOf(b.str("strategy"), sc)
	if err != nil {
		return nil, err
	}
	o.Strategy = strategy
	if o.Version, err = canonicalVersion(o.GetVersion()); err != nil {
		return nil, err
	}
	o.Waves, err = wavesOf(b.strs("waves"), b.number("batch"))
	if err := cmpErr(b.err, err); err != nil {
		return nil, err
	}
	if o.GetMaxErrorRate() < 0 || o.GetMaxErrorRate() > 1 || o.GetMaxP99Increase() < 0 {
		return nil, fault.Text(fault.Invalid, "max_error_rate is a share between 0 and 1, max_p99_increase a factor")
	}
	return o, nil
}

var strategies = map[string]commandv1.Strategy{
	"all-or-nothing": commandv1.Strategy_STRATEGY_ALL_OR_NOTHING, "best-effort": commandv1.Strategy_STRATEGY_BEST_EFFORT,
	"rolling": commandv1.Strategy_STRATEGY_ROLLING, "canary": commandv1.Strategy_STRATEGY_CANARY,
}

func strategyOf(name string, sc commandv1.Scope) (commandv1.Strategy, error) {
	if name == "" {
		return commandv1.Strategy_STRATEGY_ALL_OR_NOTHING, nil
	}
	st, ok := strategies[name]
	if !ok {
		return 0, fault.Text(fault.Invalid, "strategy must be all-or-nothing, best-effort, rolling or canary, not %q", name)
	}
	if sc == commandv1.Scope_SCOPE_LOCAL && st != commandv1.Strategy_STRATEGY_ALL_OR_NOTHING {
		return 0, fault.Text(fault.Invalid, "strategy %s needs scope=global", name)
	}
	return st, nil
}

// wavesOf reads waves ("1", "25%", "100%") or a rolling batch.
func wavesOf(waves []string, batch int64) ([]*commandv1.Options_Wave, error) {
	if batch < 0 || batch > 10_000 {
		return nil, fault.Text(fault.Invalid, "batch must be between 1 and 10000")
	}
	if batch > 0 && len(waves) > 0 {
		return nil, fault.Text(fault.Invalid, "batch and waves cannot be set at the same time")
	}
	if batch > 0 {
		return []*commandv1.Options_Wave{{Size: uint32(batch)}}, nil
	}
	var out []*commandv1.Options_Wave
	for _, w := range waves {
		text, percent := strings.CutSuffix(w, "%")
		n, err := strconv.ParseUint(text, 10, 16)
		if err != nil || n == 0 || percent && n > 100 {
			return nil, fault.Text(fault.Invalid, "a wave is a count of nodes or a percentage (1, 3, 25%%), not %q", w)
		}
		out = append(out, &commandv1.Options_Wave{Size: uint32(n), Percent: percent})
	}
	return out, nil
}

// startReload enters a reload and answers: 202 at once for a global one unless asked to wait, 200 after the end for
// a local one. A reload that failed while the caller waited is a 400: clients retry 5xx and would run it again.
func (s *Server) startReload(q *request, start *commandv1.StartReload) (*reply, error) {
	opts, err := s.readOptions(q.body, start.GetScope())
	if err != nil {
		return nil, err
	}
	id := q.body.str("reload_id")
	if len(id) > 128 || strings.ContainsAny(id, "/?#|\n\r") {
		return nil, fault.Text(fault.Invalid, "reload_id must be at most 128 characters without / ? # | and line breaks")
	}
	wait, err := s.waitOf(q, start.GetScope())
	if err := cmpErr(q.body.err, err); err != nil {
		return nil, err
	}
	if id == "" {
		id = q.id
	}
	start.Id, start.Namespace, start.ServingNode, start.Options = id, q.ns, s.NodeID, opts
	start.RequestedBy = q.who.Token.GetDisplayName()
	start.LeaderId = s.Cluster.Status().LeaderID // waves put the leader last
	start.RequestHash = fsm.RequestHash(start)
	if err := failpoint.Hit(failpoint.ReloadReceived, s.NodeID); err != nil {
		return nil, err
	}
	res, err := s.propose(q, &commandv1.Command{Body: &commandv1.Command_StartReload{StartReload: start}})
	if err != nil {
		return nil, err
	}
	rep := &reply{status: http.StatusOK, warnings: res.GetWarnings(), data: map[string]any{"reload_id": res.GetId()}, id: res.GetId()}
	if start.GetScope() == commandv1.Scope_SCOPE_GLOBAL {
		rep.status = http.StatusAccepted
	}
	if wait <= 0 {
		return rep, nil
	}
	r, err := s.awaitEnd(q.ctx, res.GetId(), wait)
	if err != nil || r == nil || !ended(r.GetPhase()) {
		if start.GetScope() == commandv1.Scope_SCOPE_GLOBAL && r != nil {
			return rep, nil // still running: 202 says so
		}
		return nil, cmpErr(err, fault.Text(fault.Invalid, "the reload %s has not ended yet: ask sys/reloads/%s", res.GetId(), res.GetId()))
	}
	return s.concluded(rep, r)
}

// concluded turns an ended reload into the answer of a caller that waited.
func (s *Server) concluded(rep *reply, r *commandv1.Reload) (*reply, error) {
	rep.status = http.StatusOK
	rec := s.reloadRecord(s.State.View(), r)
	if rec.Outcome == "succeeded" || rec.Outcome == "nothing to do" {
		rep.data = map[string]any{"reload_id": r.GetId(), "state": rec.Phase, "outcome": rec.Outcome}
		return rep, nil
	}
	return nil, fault.Text(fault.Invalid, "%s", failureText(r, rec))
}

func failureText(r *commandv1.Reload, rec *api.Reload) string {
	var causes []string
	for _, p := range r.GetParticipants() {
		for _, o := range p.GetMounts() {
			if c := o.GetReport().GetCause(); c != "" {
				causes = append(causes, fmt.Sprintf("cannot reload plugin on %q: node %s, %s: %s",
					pathOfTarget(r, o.GetMountUuid()), p.GetName(), o.GetReport().GetFailedPhase(), c))
			}
		}
	}
	if len(causes) == 0 {
		causes = append(causes, cmpText(r.GetWhy(), rec.Outcome))
	}
	return fmt.Sprintf("reload %s %s: %s", r.GetId(), rec.Outcome, strings.Join(causes, "; "))
}

func cmpText(texts ...string) string {
	for _, t := range texts {
		if t != "" {
			return t
		}
	}
	return ""
}

func pathOfTarget(r *commandv1.Reload, mountUUID string) string {
	for _, t := range r.GetTargets() {
		if t.GetMountUuid() == mountUUID {
			if t.GetTable() == "auth" {
				return "auth/" + t.GetPath()
			}
			return t.GetPath()
		}
	}
	return mountUUID
}

// maxWait bounds how long one call may wait for a reload: below the request's own deadline.
const maxWait = requestTimeout - 5*time.Second

// waitOf is how long the caller wants to wait. Local reloads are waited for, as clients expect.
func (s *Server) waitOf(q *request, sc commandv1.Scope) (time.Duration, error) {
	text := q.http.URL.Query().Get("wait")
	if q.body.has("wait") {
		text = q.body.str("wait")
	}
	if text == "" {
		if sc == commandv1.Scope_SCOPE_LOCAL {
			return maxWait, nil
		}
		return 0, nil
	}
	d, err := ParseDuration(text)
	if err != nil || d < 0 {
		return 0, fault.Text(fault.Invalid, "wait must be a duration such as 30s, not %q", text)
	}
	return min(d, maxWait), nil
}

func ended(p commandv1.Phase) bool {
	switch p {
	case commandv1.Phase_PHASE_DONE, commandv1.Phase_PHASE_ABORTED, commandv1.Phase_PHASE_ROLLED_BACK:
		return true
	default:
		return false
	}
}

// awaitEnd returns the record when it has ended, or as it stands when the time is up; nil when nobody knows the id.
func (s *Server) awaitEnd(ctx context.Context, id string, wait time.Duration) (*commandv1.Reload, error) {
	return s.awaitReload(ctx, id, wait, func(r *commandv1.Reload) bool { return ended(r.GetPhase()) })
}

func (s *Server) awaitReload(ctx context.Context, id string, wait time.Duration, enough func(*commandv1.Reload) bool) (*commandv1.Reload, error) {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		changed := s.State.Changed()
		r := s.State.View().Reload(id)
		if r == nil || enough(r) {
			return r, nil
		}
		select {
		case <-changed:
		case <-timer.C:
			return r, nil
		case <-ctx.Done():
			return r, fault.Wrap(ctx.Err(), "wait for", "reload "+id)
		}
	}
}

// look returns a consistent view, or this node's own when the caller said stale.
func (s *Server) look(q *request) (*fsm.View, error) {
	if stale(q.http) {
		return s.State.View(), nil
	}
	return s.Replica.Consistent(q.ctx)
}

// reloadStatus answers in Enterprise's shape, with what it lacks beside it: who is expected, and who is pending.
func (s *Server) reloadStatus(q *request) (*reply, error) {
	id := q.body.str("reload_id")
	if id == "" {
		return nil, fault.Text(fault.Invalid, "reload_id must be provided")
	}
	view, err := s.look(q)
	if err != nil {
		return nil, err
	}
	r := view.Reload(id)
	if r == nil {
		return nil, unknownReload(view, id)
	}
	return &reply{data: s.reloadStatusOf(view, r)}, nil
}

func unknownReload(view *fsm.View, id string) error {
	if row := view.ReloadID(id); row != nil {
		return fault.Text(fault.NotFound, "reload %s ended (%s) and its detailed record has been dropped", id, row.GetOutcome())
	}
	return fault.Text(fault.NotFound, "no reload with id %q", id)
}

func (s *Server) listReloads(q *request) (*reply, error) {
	view, err := s.look(q)
	if err != nil {
		return nil, err
	}
	list := []*api.Reload{}
	keys := []string{}
	for _, r := range view.Reloads() {
		if q.ns != "" && r.GetNamespace() != q.ns {
			continue
		}
		keys = append(keys, r.GetId())
		list = append(list, s.reloadRecord(view, r))
	}
	return &reply{data: map[string]any{"keys": keys, "reloads": list, "index": view.Index()}}, nil
}

// readReload answers at once, or, with index, when the record has changed since that index or wait is over.
func (s *Server) readReload(q *request) (*reply, error) {
	query := q.http.URL.Query()
	view, err := s.look(q)
	if err != nil {
		return nil, err
	}
	id := q.params["id"]
	r := view.Reload(id)
	if r == nil {
		return nil, unknownReload(view, id)
	}
	if since := query.Get("index"); since != "" {
		index, err := strconv.ParseUint(since, 10, 64)
		if err != nil {
			return nil, fault.Text(fault.Invalid, "index must be a whole number, not %q", since)
		}
		wait, err := ParseDuration(cmpText(query.Get("wait"), "60s"))
		if err != nil || wait < 0 {
			return nil, fault.Text(fault.Invalid, "wait must be a duration such as 30s, not %q", query.Get("wait"))
		}
		r, err = s.awaitReload(q.ctx, id, min(wait, maxWait), func(r *commandv1.Reload) bool {
			return r.GetModifyIndex() > index || ended(r.GetPhase())
		})
		if err != nil {
			return nil, err
		}
		view = s.State.View()
		if _, err := s.authenticate(view, q.http); err != nil { // it was long ago that the call was authorised
			return nil, err
		}
		if r == nil {
			return nil, unknownReload(view, id)
		}
	}
	return &reply{data: s.reloadRecord(view, r), headers: map[string]string{
		api.HeaderIndex: strconv.FormatUint(r.GetModifyIndex(), 10),
	}}, nil
}

var actions = map[string]commandv1.ControlReload_Action{
	"abort": commandv1.ControlReload_ACTION_ABORT, "pause": commandv1.ControlReload_ACTION_PAUSE,
	"resume": commandv1.ControlReload_ACTION_RESUME, "promote": commandv1.ControlReload_ACTION_PROMOTE,
}

func (s *Server) controlReload(q *request) (*reply, error) {
	action, ok := actions[q.params["action"]]
	if !ok {
		return nil, &fault.Error{Kind: fault.UnsupportedPath}
	}
	why := q.body.str("why")
	if err := q.checked(true); err != nil {
		return nil, err
	}
	_, err := s.propose(q, &commandv1.Command{Body: &commandv1.Command_ControlReload{ControlReload: &commandv1.ControlReload{
		Id: q.params["id"], Action: action, Why: why, RequestedBy: q.who.Token.GetDisplayName(),
	}}})
	if err != nil {
		return nil, err
	}
	view := s.State.View()
	if r := view.Reload(q.params["id"]); r != nil {
		return &reply{data: s.reloadRecord(view, r)}, nil
	}
	return &reply{}, nil
}
