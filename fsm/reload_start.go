package fsm

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// RequestHash is over everything that makes a reload request what it is: not its id, requester or leader, and not the
// node that serves it unless the reload is that node's alone. httpd computes it before it proposes; the state machine
// does when it is missing. Fields unknown to this version are left out.
func RequestHash(c *commandv1.StartReload) []byte {
	c = clone(c)
	c.Id, c.RequestHash, c.RequestedBy, c.LeaderId = "", nil, "", ""
	if c.GetScope() == commandv1.Scope_SCOPE_GLOBAL {
		c.ServingNode = ""
	}
	c.ProtoReflect().SetUnknown(nil)
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(c)
	if err != nil {
		return nil // a string that is no UTF-8: the entry will be refused for it
	}
	sum := sha256.Sum256(b)
	return sum[:]
}

// The texts of CONTRACT 2.1.
const (
	warnNothingLocal  = "no plugins were reloaded"
	warnNothingGlobal = "no plugins were reloaded locally (but they may be reloaded on other nodes)"
)

// Outcomes of a reload.
const (
	OutcomeSucceeded  = "succeeded"
	OutcomePartial    = "partial"
	OutcomeFailed     = "failed"
	OutcomeAborted    = "aborted"
	OutcomeRolledBack = "rolled back"
	OutcomeNothing    = "nothing to do"
)

// startReload enters a reload: it runs at once, waits for one whose targets overlap, is joined to an equal one that
// waits, or is known already.
func (e *entry) startReload(c *commandv1.StartReload) error {
	if c.GetId() == "" || !plain(c.GetId(), maxName) {
		return invalid("a reload needs an id of at most %d bytes without control characters", maxName)
	}
	if len(c.GetRequestHash()) == 0 {
		c.RequestHash = RequestHash(c)
	}
	if row := get(&e.reloadIDs, c.GetId()); row != nil {
		return e.repeatedReload(c, row)
	}
	if err := e.checkStart(c); err != nil {
		return err
	}
	mounts, err := e.selectMounts(c)
	if err != nil {
		return err
	}
	r := &commandv1.Reload{
		Id: c.GetId(), RequestHash: c.GetRequestHash(), Selector: c.GetSelector(), Namespace: c.GetNamespace(),
		Scope: c.GetScope(), ServingNode: c.GetServingNode(), Options: c.GetOptions(),
		RequestedBy: trim(c.GetRequestedBy(), maxName),
		ToPrevious:  c.GetToPrevious(), RollsBack: c.GetRollsBack(), LeaderId: c.GetLeaderId(),
		StartIndex: e.index, StartClockNs: e.clock, PhaseClockNs: e.clock, StartWallMs: e.wallMS,
	}
	if r.Options == nil {
		r.Options = &commandv1.Options{}
	}
	if r.Options.Version, err = canonicalVersion(r.GetOptions().GetVersion()); err != nil {
		return err
	}
	if r.GetOptions().GetStrategy() == commandv1.Strategy_STRATEGY_UNSPECIFIED {
		r.Options.Strategy = commandv1.Strategy_STRATEGY_ALL_OR_NOTHING
	}
	for _, m := range mounts {
		t, err := e.targetOf(r, m)
		if err != nil {
			return err
		}
		r.Targets = append(r.Targets, t)
	}
	if len(r.GetTargets()) > 0 {
		if first := e.joinable(r); first != nil {
			return e.join(c, first)
		}
	}
	return e.enterReload(r)
}

// enterReload puts a checked reload into the tables, waiting or running.
func (e *entry) enterReload(r *commandv1.Reload) error {
	if err := e.roomForID(); err != nil {
		return err
	}
	waits, queued := e.mustWait(r)
	if waits && queued >= MaxQueued {
		return fault.Text(fault.Exhausted, "%d reloads are waiting already: try again later", queued)
	}
	if ids := e.repeats(r); ids != "" {
		return invalid("%s", ids)
	}
	e.res.Id = r.GetId()
	e.putReloadID(&commandv1.ReloadID{Id: r.GetId(), RequestHash: r.GetRequestHash(), ClockNs: e.clock, Index: e.index})
	switch {
	case len(r.GetTargets()) == 0:
		e.warnNothing(r.GetScope())
		e.finish(r, commandv1.Phase_PHASE_DONE, "no mount matched")
	case waits:
		r.Phase = commandv1.Phase_PHASE_QUEUED
		e.storeReload(r)
	default:
		e.activate(r)
	}
	return nil
}

// repeats says why a rollback cannot be: the reload that it names is not one that could be rolled back.
func (e *entry) repeats(r *commandv1.Reload) string {
	if r.GetRollsBack() == "" {
		return ""
	}
	orig := e.findReload(r.GetRollsBack())
	switch {
	case !r.GetToPrevious():
		return "rolls_back goes with to_previous"
	case orig == nil:
		return fmt.Sprintf("no reload with id %q to roll back", trim(r.GetRollsBack(), maxName))
	case orig.GetPhase() != commandv1.Phase_PHASE_DONE:
		return fmt.Sprintf("reload %s is not done: abort it instead of rolling it back", orig.GetId())
	default:
		return ""
	}
}

func (e *entry) warnNothing(s commandv1.Scope) {
	if s == commandv1.Scope_SCOPE_GLOBAL {
		e.res.Warnings = append(e.res.Warnings, warnNothingGlobal)
	} else {
		e.res.Warnings = append(e.res.Warnings, warnNothingLocal)
	}
}

// repeatedReload answers a request whose id is known: the same answer to the same request, a conflict to another.
func (e *entry) repeatedReload(c *commandv1.StartReload, row *commandv1.ReloadID) error {
	if !bytes.Equal(row.GetRequestHash(), c.GetRequestHash()) {
		return fault.Text(fault.Conflict, "reload_id %q was used for another request: choose a new one", c.GetId())
	}
	e.res.Id, e.res.Repeated = cmp.Or(row.GetFirstId(), row.GetId()), true
	if row.GetOutcome() == OutcomeNothing && len(c.GetSelector().GetMounts()) == 0 {
		e.warnNothing(c.GetScope())
	}
	return nil
}

// checkStart refuses what could never be run, whatever the catalog and the mounts are.
func (e *entry) checkStart(c *commandv1.StartReload) error {
	sel, o := c.GetSelector(), c.GetOptions()
	wave := o.GetStrategy() == commandv1.Strategy_STRATEGY_ROLLING || o.GetStrategy() == commandv1.Strategy_STRATEGY_CANARY
	switch {
	case c.GetScope() != commandv1.Scope_SCOPE_LOCAL && c.GetScope() != commandv1.Scope_SCOPE_GLOBAL:
		return invalid("reload scope must be omitted or 'global'")
	case sel.GetPlugin() != "" && len(sel.GetMounts()) > 0:
		return invalid("plugin and mounts cannot be set at the same time")
	case sel.GetPlugin() == "" && len(sel.GetMounts()) == 0:
		return invalid("plugin or mounts must be provided")
	case len(sel.GetMounts()) > maxList:
		return invalid("at most %d mounts in one reload", maxList)
	case len(sel.GetPlugin()) > maxName || slices.ContainsFunc(sel.GetMounts(), func(p string) bool { return len(p) > maxText }):
		return invalid("a plugin's name has at most %d bytes, and a mount's path %d", maxName, maxText)
	case !e.hasNamespace(c.GetNamespace()):
		return fault.Text(fault.NotFound, "namespace not found")
	case sel.GetAllNamespaces() && c.GetNamespace() != "":
		return invalid("all namespaces can be reloaded from the root namespace only")
	case commandv1.Strategy_name[int32(o.GetStrategy())] == "":
		return invalid("unknown strategy %d", int32(o.GetStrategy()))
	case o.GetPrepareMs() < 0 || o.GetRunMs() < 0 || o.GetQueueMs() < 0 || o.GetBakeMs() < 0:
		return invalid("durations cannot be negative")
	case !slices.Contains(depths, o.GetTrial()):
		return invalid(`trial must be "handshake", "setup" or "initialize", not %q`, trim(o.GetTrial(), maxName))
	case !slices.Contains([]string{"", "cancel", "fence"}, o.GetOnDrainTimeout()):
		return invalid(`on_drain_timeout must be "cancel" or "fence", not %q`, trim(o.GetOnDrainTimeout(), maxName))
	case len(o.GetWaves()) > MaxWaves:
		return invalid("at most %d waves", MaxWaves)
	case !(o.GetMaxErrorRate() >= 0 && o.GetMaxErrorRate() <= 1): // also refuses what is no number
		return invalid("max_error_rate must be between 0 and 1")
	case o.GetMaxP99Increase() != 0 && !(o.GetMaxP99Increase() >= 1 && o.GetMaxP99Increase() < 1e9):
		return invalid("max_p99_increase must be a factor above 1")
	case c.GetToPrevious() && o.GetVersion() != "":
		return invalid("a rollback goes to the previous spec: no version can be asked for")
	}
	for _, w := range o.GetWaves() {
		if w.GetSize() == 0 || w.GetPercent() && w.GetSize() > 100 {
			return invalid("a wave is a count of nodes from 1, or a percentage from 1 to 100")
		}
	}
	node := get(&e.nodes, c.GetServingNode())
	if c.GetScope() == commandv1.Scope_SCOPE_GLOBAL {
		if len(e.liveNodes()) == 0 {
			return fault.Text(fault.Unavailable, "no node has said hello yet")
		}
		return nil
	}
	switch {
	case node == nil || node.GetLeft():
		return fault.Text(fault.Unavailable, "the serving node %q is no member", trim(c.GetServingNode(), maxName))
	case e.alone(node):
		return nil
	case o.GetVersion() != "":
		return invalid("another version can be reloaded with scope=global only: " +
			"a reload of one node never changes the configured version")
	case wave:
		return invalid("strategies rolling and canary need scope=global")
	default:
		return nil
	}
}

// alone reports whether the node is the whole cluster: local and global are then the same.
func (s *state) alone(n *commandv1.Node) bool {
	live := s.liveNodes()
	return len(live) == 1 && live[0].GetId() == n.GetId()
}

// wide reports whether a reload moves the mounts themselves, and not one node's override.
func (s *state) wide(r *commandv1.Reload) bool {
	if r.GetScope() == commandv1.Scope_SCOPE_GLOBAL {
		return true
	}
	n := get(&s.nodes, r.GetServingNode())
	return n != nil && !n.GetLeft() && s.alone(n)
}

// selectMounts resolves the selector, in order of uuid.
func (e *entry) selectMounts(c *commandv1.StartReload) ([]*commandv1.Mount, error) {
	sel := c.GetSelector()
	var out []*commandv1.Mount
	if len(sel.GetMounts()) > 0 {
		var missing []string
		for _, path := range sel.GetMounts() {
			switch m := e.mountNamed(c.GetNamespace(), path); {
			case m == nil:
				missing = append(missing, fmt.Sprintf("cannot fetch mount entry on %q", trim(strings.TrimSuffix(path, "/")+"/", maxName)))
			case isDatabase(m): // what runs there are its connections
				out = append(out, e.connectionsOf(m.GetUuid())...)
			default:
				out = append(out, m)
			}
		}
		if len(missing) > 0 {
			return nil, invalid("%s", trim(strings.Join(missing, "; "), maxText))
		}
	} else {
		kind := cmp.Or(sel.GetPluginType(), typeUnknown)
		if kind != typeUnknown {
			if err := checkType(kind); err != nil {
				return nil, invalid(`error parsing %q as a plugin type, must be one of "auth", "secret", "database", or "unknown"`,
					trim(kind, maxName))
			}
		}
		if !e.knownPlugin(kind, sel.GetPlugin()) {
			return nil, invalid("plugin not found in the catalog: %q", trim(sel.GetPlugin(), maxName))
		}
		e.mounts.Scan(func(_ string, m *commandv1.Mount) bool {
			// Connections are among them: their type is the database plugin.
			named := m.GetType() == sel.GetPlugin() && (kind == typeUnknown || kind == m.GetPluginType()) && !isDatabase(m)
			if named && (sel.GetAllNamespaces() || m.GetNamespace() == c.GetNamespace()) {
				out = append(out, m)
			}
			return true
		})
	}
	slices.SortFunc(out, func(a, b *commandv1.Mount) int { return strings.Compare(a.GetUuid(), b.GetUuid()) })
	return slices.Compact(out), nil
}

// mountNamed finds a mount by the forms that reloading accepts: "foo", "foo/", "auth/foo", "sys/auth/foo", each with or
// without a slash at its end, and any path below the mount. "foo/config/name" is a connection of a database mount.
func (s *state) mountNamed(namespace, path string) *commandv1.Mount {
	path = strings.TrimSuffix(path, "/") + "/"
	if rest, ok := strings.CutPrefix(path, "sys/auth/"); ok {
		m, _ := s.longest(namespace, typeAuth, rest)
		return m
	}
	m, rest := s.mountFor(namespace, path)
	if c, ok := s.connectionAt(m, rest); ok {
		return c
	}
	return m
}

// mountFor finds the mount of a path within a namespace by longest prefix, and what is left of the path.
func (s *state) mountFor(namespace, path string) (*commandv1.Mount, string) {
	if rest, ok := strings.CutPrefix(path, "auth/"); ok {
		return s.longest(namespace, typeAuth, rest)
	}
	return s.longest(namespace, typeSecret, path)
}

func (s *state) longest(namespace, tableName, path string) (*commandv1.Mount, string) {
	prefix := key(namespace, tableName, "")
	for end := len(path); end > 0; {
		i := strings.LastIndexByte(path[:end], '/')
		if i < 0 {
			break
		}
		if id := get(&s.paths, prefix+path[:i+1]); id != "" {
			return get(&s.mounts, id), path[i+1:]
		}
		end = i
	}
	return nil, path
}

// targetOf fixes what a reload does to a mount: from what it has to what is to run.
func (s *state) targetOf(r *commandv1.Reload, m *commandv1.Mount) (*commandv1.Target, error) {
	from := m.GetWanted()
	if !s.wide(r) {
		from = wantedOf(m, r.GetServingNode())
	}
	t := &commandv1.Target{
		MountUuid: m.GetUuid(), Namespace: m.GetNamespace(), Table: m.GetTable(), Path: m.GetPath(), Accessor: m.GetAccessor(),
		From: from.GetSpec(), FromGeneration: from.GetGeneration(), FromConfigured: m.GetConfiguredVersion(),
		Trial:   cmp.Or(r.GetOptions().GetTrial(), m.GetConfig().GetTrial(), "initialize"),
		Fencing: cmp.Or(m.GetConfig().GetFencing(), "lease"),
	}
	if r.GetToPrevious() {
		if m.GetPrevious().GetSpec() == nil {
			return nil, invalid("the mount %q has never been switched: there is nothing to go back to", displayPath(m))
		}
		t.To = m.GetPrevious().GetSpec()
		return t, nil
	}
	to, err := s.resolve(resolution{
		kind: m.GetPluginType(), name: m.GetType(), asked: r.GetOptions().GetVersion(), configured: m.GetConfiguredVersion(),
	})
	if err != nil {
		return nil, invalid("cannot reload plugin on %q: %s", displayPath(m), err.Error())
	}
	t.To = to
	return t, nil
}

func displayPath(m *commandv1.Mount) string {
	if m.GetTable() == typeAuth {
		return "auth/" + m.GetPath()
	}
	return m.GetPath()
}
