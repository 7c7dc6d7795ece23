package httpd

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"

	commandv1 "rollcall/proto/command/v1"

	"rollcall/fsm"
	"rollcall/node/api"
	"rollcall/node/fault"
	"rollcall/node/policy"
)

// enableTimeout bounds how long an enable waits for the mount to serve on the leader before it answers.
const enableTimeout = 30 * time.Second

// systemTTL is what a mount without TTLs of its own gets, 32 days, as the contract's servers have it.
const systemTTL = 32 * 24 * time.Hour

// mountTable binds the handlers of sys/mounts and sys/auth, which differ in the table and in some texts.
type mountTable struct {
	*Server
	table string
}

func (s *Server) mountRoutes() []*route {
	var routes []*route
	for _, t := range []mountTable{{s, "secret"}, {s, "auth"}} {
		base, acc := "sys/mounts", withToken
		if t.table == "auth" {
			base, acc = "sys/auth", withSudo
		}
		routes = append(routes,
			&route{pattern: base, doubled: true, ops: map[operation]handler{opRead: t.list}, summary: "Every mount of the table."},
			&route{
				pattern: base + "/{path...}", doubled: true, access: acc,
				ops:     map[operation]handler{opRead: t.read, opUpdate: t.enable, opDelete: t.disable},
				summary: "Enable, read or disable one mount.",
			},
			&route{
				pattern: base + "/{path...}/tune", doubled: true, access: acc,
				ops:     map[operation]handler{opRead: t.readTune, opUpdate: t.tune},
				summary: "A mount's configuration. Tuning never restarts anything.",
			})
	}
	return append(routes,
		&route{pattern: "sys/remount", access: withSudo, ops: map[operation]handler{opUpdate: s.remount}, summary: "Move a mount."},
		&route{pattern: "sys/remount/status/{id}", ops: map[operation]handler{opRead: s.remountStatus}, summary: "How a move went."},
		&route{pattern: "sys/internal/ui/mounts", access: open, ops: map[operation]handler{opRead: s.uiMounts}, summary: "The mounts that the caller may see."},
		&route{pattern: "sys/internal/ui/mounts/{path...}", ops: map[operation]handler{opRead: s.uiMount}, summary: "One mount, for clients that adapt to it."})
}

// at finds the table and path that a client means: sys/mounts/auth/x speaks of the auth table too.
func (t mountTable) at(q *request) (table, path string) {
	path = strings.Trim(q.params["path"], "/") + "/"
	if t.table == "secret" {
		if rest, ok := strings.CutPrefix(path, "auth/"); ok && rest != "" {
			return "auth", rest
		}
	}
	return t.table, path
}

// find returns the mount that a call means: in the table of secrets also the one that the path lies below. Where that has
// another name than the call gave it, a rule that denies the other name holds, too.
func (t mountTable) find(q *request) (*commandv1.Mount, error) {
	table, path := t.at(q)
	m := q.view.MountAt(q.ns, table, path)
	if m == nil && table != "auth" {
		if m, _ = q.view.MountFor(q.ns, path); m != nil && m.GetTable() != table {
			m = nil
		}
	}
	if m == nil {
		return nil, nil
	}
	name := "sys/mounts/" + strings.TrimSuffix(m.GetPath(), "/")
	if m.GetTable() == "auth" {
		name = "sys/auth/" + strings.TrimSuffix(m.GetPath(), "/")
	}
	if strings.HasSuffix(q.path, "/tune") {
		name += "/tune"
	}
	if name != q.path && t.Policies.Denied(q.view, q.who, q.ns, name) {
		return nil, policy.ErrRefused
	}
	return m, nil
}

func (t mountTable) missing(q *request) error {
	table, path := t.at(q)
	if table == "auth" {
		return fault.Text(fault.Invalid, "No auth engine at %s", path)
	}
	return fault.Text(fault.Invalid, "No secret engine mount at %s", path)
}

func (t mountTable) list(q *request) (*reply, error) {
	running := t.Plugins.Running()
	data := map[string]any{}
	for _, m := range q.view.Mounts() {
		if m.GetNamespace() == q.ns && m.GetTable() == t.table && m.GetParentUuid() == "" {
			data[m.GetPath()] = mountObject(m, running[m.GetUuid()])
		}
	}
	return &reply{data: data}, nil
}

func (t mountTable) read(q *request) (*reply, error) {
	m, err := t.find(q)
	if m == nil {
		return nil, cmpErr(err, t.missing(q))
	}
	run := t.Plugins.Running()[m.GetUuid()]
	rep := &reply{data: mountObject(m, run)}
	if want := m.GetWanted().GetSpec().GetVersion(); m.GetConfiguredVersion() != "" && m.GetConfiguredVersion() != want {
		rep.warnings = append(rep.warnings, fmt.Sprintf(
			"plugin version %q is configured but version %q is running; reload to switch: plugin reload -scope=global -mounts=%s",
			m.GetConfiguredVersion(), want, displayPath(m)))
	}
	return rep, nil
}

func displayPath(m *commandv1.Mount) string {
	if m.GetTable() == "auth" {
		return "auth/" + m.GetPath()
	}
	return m.GetPath()
}

// mountObject is a mount as lists and reads show it.
func mountObject(m *commandv1.Mount, run api.RunningMount) map[string]any {
	c := m.GetConfig()
	config := map[string]any{
		"default_lease_ttl": c.GetDefaultLeaseTtlS(), "max_lease_ttl": c.GetMaxLeaseTtlS(),
		"force_no_cache": c.GetForceNoCache(),
	}
	for k, v := range map[string][]string{
		"passthrough_request_headers": c.GetPassthroughRequestHeaders(),
		"allowed_response_headers":    c.GetAllowedResponseHeaders(), "audit_non_hmac_request_keys": c.GetAuditNonHmacRequestKeys(),
		"audit_non_hmac_response_keys": c.GetAuditNonHmacResponseKeys(),
	} {
		if len(v) > 0 {
			config[k] = v
		}
	}
	for k, v := range map[string]string{
		"listing_visibility": c.GetListingVisibility(), "token_type": c.GetTokenType(),
		"identity_token_key": c.GetIdentityTokenKey(), "trial": c.GetTrial(), "fencing": c.GetFencing(),
	} {
		if v != "" {
			config[k] = v
		}
	}
	if m.GetTable() == "auth" && c.GetTokenType() == "" {
		config["token_type"] = "default-service"
	}
	if c.GetLeaderOnly() {
		config["leader_only"] = true
	}
	if c.GetHoldMs() != 0 {
		config["hold"] = (time.Duration(c.GetHoldMs()) * time.Millisecond).String()
	}
	var options any
	if len(m.GetOptions()) > 0 {
		options = m.GetOptions()
	}
	return map[string]any{
		"type": m.GetType(), "description": m.GetDescription(), "accessor": m.GetAccessor(),
		"uuid": m.GetUuid(), "local": m.GetLocal(), "seal_wrap": m.GetSealWrap(),
		"external_entropy_access": m.GetExternalEntropyAccess(), "options": options,
		"plugin_version": m.GetConfiguredVersion(), "running_plugin_version": run.Version,
		"running_sha256": run.SHA256, "config": config, "generation": m.GetWanted().GetGeneration(),
	}
}

// readConfig reads the tunable fields of a body on top of base; set tells whether any was there.
func readConfig(b *fields, base *commandv1.MountConfig) (c *commandv1.MountConfig, set bool) {
	c = &commandv1.MountConfig{}
	if base != nil {
		c = proto.CloneOf(base)
	}
	seconds := func(key string, to *int64) {
		if b.has(key) {
			*to, set = int64(b.duration(key)/time.Second), true
		}
	}
	text := func(key string, to *string) {
		if b.has(key) {
			*to, set = b.str(key), true
		}
	}
	list := func(key string, to *[]string) {
		if b.has(key) {
			*to, set = b.strs(key), true
		}
	}
	flag := func(key string, to *bool) {
		if b.has(key) {
			*to, set = b.boolean(key), true
		}
	}
	seconds("default_lease_ttl", &c.DefaultLeaseTtlS)
	seconds("max_lease_ttl", &c.MaxLeaseTtlS)
	flag("force_no_cache", &c.ForceNoCache)
	text("listing_visibility", &c.ListingVisibility)
	list("passthrough_request_headers", &c.PassthroughRequestHeaders)
	list("allowed_response_headers", &c.AllowedResponseHeaders)
	list("audit_non_hmac_request_keys", &c.AuditNonHmacRequestKeys)
	list("audit_non_hmac_response_keys", &c.AuditNonHmacResponseKeys)
	text("token_type", &c.TokenType)
	text("identity_token_key", &c.IdentityTokenKey)
	text("trial", &c.Trial)
	text("fencing", &c.Fencing)
	flag("leader_only", &c.LeaderOnly)
	if b.has("hold") {
		c.HoldMs, set = b.duration("hold").Milliseconds(), true
	}
	b.has("user_lockout_config")
	return c, set
}

func checkConfig(c *commandv1.MountConfig) error {
	switch {
	case c.GetMaxLeaseTtlS() > 0 && c.GetDefaultLeaseTtlS() > c.GetMaxLeaseTtlS():
		return fault.Text(fault.Invalid, "given default lease TTL greater than given max lease TTL")
	case !slices.Contains([]string{"", "handshake", "setup", "initialize"}, c.GetTrial()):
		return fault.Text(fault.Invalid, "trial must be handshake, setup or initialize, not %q", c.GetTrial())
	case !slices.Contains([]string{"", "lease", "none"}, c.GetFencing()):
		return fault.Text(fault.Invalid, "fencing must be lease or none, not %q", c.GetFencing())
	case !slices.Contains([]string{"", "hidden", "unauth"}, c.GetListingVisibility()):
		return fault.Text(fault.Invalid, "invalid listing_visibility value %q: use unauth or hidden", c.GetListingVisibility())
	case c.GetHoldMs() > 10_000:
		return fault.Text(fault.Invalid, "hold is at most 10s")
	}
	return nil
}

// enable tries the plugin on this node, enters the mount, and waits until it serves on the leader and here.
func (t mountTable) enable(q *request) (*reply, error) {
	m, version, err := t.readEnable(q)
	if err != nil {
		return nil, err
	}
	view, err := t.Replica.Consistent(q.ctx)
	if err != nil {
		return nil, err
	}
	spec, err := view.ResolveMount(m.GetPluginType(), m.GetType(), version)
	if err != nil {
		return nil, err
	}
	if err := view.CheckMount(m); err != nil {
		return nil, err
	}
	if err := t.Plugins.TryMount(q.ctx, m, spec); err != nil {
		return nil, fault.As(fault.Invalid, err, "", "")
	}
	_, err = t.propose(q, &commandv1.Command{Body: &commandv1.Command_EnableMount{EnableMount: &commandv1.EnableMount{
		Uuid: m.GetUuid(), Accessor: m.GetAccessor(), Namespace: m.GetNamespace(), Table: m.GetTable(), Path: m.GetPath(),
		Type: m.GetType(), PluginType: m.GetPluginType(), Description: m.GetDescription(), Config: m.GetConfig(),
		Options: m.GetOptions(), PluginVersion: version, Local: m.GetLocal(), SealWrap: m.GetSealWrap(),
		ExternalEntropyAccess: m.GetExternalEntropyAccess(), ExpectSha256: spec.GetSha256(),
	}}})
	if err != nil {
		return nil, err
	}
	return nil, t.awaitReady(q.ctx, m.GetUuid())
}

// readEnable makes the mount that a body asks for.
func (t mountTable) readEnable(q *request) (m *commandv1.Mount, version string, err error) {
	b := q.body
	table, path := t.table, strings.Trim(q.params["path"], "/")+"/" // enabling an auth method through sys/mounts would need no sudo
	conf := b.object("config")
	config, _ := readConfig(conf, nil)
	m = &commandv1.Mount{
		Namespace: q.ns, Table: table, Path: path, Type: b.str("type"), PluginType: table,
		Description: b.str("description"), Config: config, Options: b.strMap("options"), Local: b.boolean("local"),
		SealWrap: b.boolean("seal_wrap"), ExternalEntropyAccess: b.boolean("external_entropy_access"),
	}
	name := b.str("plugin_name")
	if name == "" {
		name = conf.str("plugin_name")
	}
	version = conf.str("plugin_version")
	b.has("plugin_version") // accepted at the top level and dropped, as the contract's server does
	if err := cmpErr(b.err, conf.err); err != nil {
		return nil, "", err
	}
	switch {
	case m.Type == "" && name == "":
		return nil, "", fault.Text(fault.Invalid, "backend type must be specified as a string")
	case m.Type == "plugin" && name == "":
		return nil, "", fault.Text(fault.Invalid, "plugin_name must be provided for plugin backend")
	case m.Type == "plugin" || m.Type == "":
		m.Type = name
	}
	if m.Type == "database" && table == "secret" {
		m.PluginType = "database"
	}
	if version, err = canonicalVersion(version); err != nil {
		return nil, "", err
	}
	if err := checkConfig(config); err != nil {
		return nil, "", err
	}
	if err := oneReading(q.params["path"]); err != nil {
		return nil, "", err
	}
	m.Uuid = uuid.NewString()
	m.Accessor = accessor(table, m.Type)
	return m, version, nil
}

func cmpErr(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// accessor makes "<type>_<8 hex>", with "auth_" before it in the auth table.
func accessor(table, kind string) string {
	var b [4]byte
	_, _ = rand.Read(b[:]) // crypto/rand never fails
	a := kind + "_" + hex.EncodeToString(b[:])
	if table == "auth" {
		return "auth_" + a
	}
	return a
}

// awaitReady returns when the mount's writer has taken over and this node's own instance serves.
func (t mountTable) awaitReady(ctx context.Context, mountUUID string) error {
	ctx, cancel := context.WithTimeout(ctx, enableTimeout)
	defer cancel()
	for {
		changed := t.State.Changed()
		m := t.State.View().Mount(mountUUID)
		if m == nil {
			return nil // somebody disabled it already
		}
		run := t.Plugins.Running()[mountUUID]
		if m.GetEpochGeneration() == m.GetWanted().GetGeneration() && run.Ready {
			return nil
		}
		select {
		case <-changed:
		case <-time.After(20 * time.Millisecond): // the instance becomes ready without an entry
		case <-ctx.Done():
			text := run.Error
			if text == "" {
				text = "the leader has not taken it over yet"
			}
			return fault.Text(fault.Invalid, "mounted %s, but its plugin does not serve yet on node %s: %s",
				displayPath(m), t.NodeName, text)
		}
	}
}

func (t mountTable) disable(q *request) (*reply, error) {
	m := q.view.MountAt(q.ns, t.table, strings.Trim(q.params["path"], "/")+"/")
	if m == nil {
		return nil, nil
	}
	warnings, err := t.endMount(q, m, revokeGlance)
	if err != nil || len(warnings) == 0 {
		return nil, err
	}
	return &reply{warnings: warnings}, nil
}

// endMount gives back through the plugin what it has lent out, and then ends the mount with everything of it. A plugin that has
// taken nothing back for wait does not keep its mount alive: what it could not take back is said.
func (s *Server) endMount(q *request, m *commandv1.Mount, wait time.Duration) (warnings []string, err error) {
	if before := len(q.view.LeasesOfMount(m.GetUuid())); before > 0 {
		left, err := s.Leases.Revoke(q.ctx, &commandv1.RevokeLeases{MountUuid: m.GetUuid()}, q.by(), wait)
		// Many leases take their time. Who is given up is a plugin that takes nothing back any more.
		for end := time.Now().Add(revokeWait - wait); left > 0 && left < before && time.Now().Before(end); {
			before = left
			left, err = s.Leases.Revoke(q.ctx, &commandv1.RevokeLeases{MountUuid: m.GetUuid()}, q.by(), wait)
		}
		if left > 0 {
			s.log.Warn("leases are forgotten with their mount: its plugin did not revoke them in time", "mount", displayPath(m),
				"leases", left, "error", err)
			warnings = append(warnings, fmt.Sprintf("%d leases of %s could not be revoked through its plugin and are forgotten: "+
				"what they gave access to may still be open", left, displayPath(m)))
		}
	}
	res, err := s.propose(q, &commandv1.Command{Body: &commandv1.Command_DisableMount{
		DisableMount: &commandv1.DisableMount{Namespace: m.GetNamespace(), Table: m.GetTable(), Path: m.GetPath()},
	}})
	if err == nil && m.GetTable() == "auth" {
		s.settle(q.ctx, res, "an auth method and its tokens are gone")
	}
	return warnings, err
}

func (t mountTable) readTune(q *request) (*reply, error) {
	m, err := t.find(q)
	if m == nil {
		_, path := t.at(q)
		return nil, cmpErr(err, fault.Text(fault.Invalid, "cannot fetch sysview for path %q", path))
	}
	data, _ := mountObject(m, api.RunningMount{})["config"].(map[string]any)
	out := map[string]any{"description": m.GetDescription()}
	maps.Copy(out, data)
	def, most := TTLs(m)
	out["default_lease_ttl"], out["max_lease_ttl"] = int64(def/time.Second), int64(most/time.Second)
	if m.GetConfiguredVersion() != "" {
		out["plugin_version"] = m.GetConfiguredVersion()
	}
	if len(m.GetOptions()) > 0 {
		out["options"] = m.GetOptions()
	}
	return &reply{data: out}, nil
}

// TTLs resolves a mount's lease TTLs against the system's.
func TTLs(m *commandv1.Mount) (def, most time.Duration) {
	def, most = systemTTL, systemTTL
	if n := m.GetConfig().GetMaxLeaseTtlS(); n > 0 {
		most = time.Duration(n) * time.Second
	}
	if n := m.GetConfig().GetDefaultLeaseTtlS(); n > 0 {
		def = time.Duration(n) * time.Second
	}
	return min(def, most), most
}

// tune changes what the body names. The libraries send fields that their caller left empty: an empty TTL, and options
// without a key, change nothing.
func (t mountTable) tune(q *request) (*reply, error) {
	m, err := t.find(q)
	if m == nil {
		return nil, cmpErr(err, t.missing(q))
	}
	b := q.body
	for _, key := range []string{"default_lease_ttl", "max_lease_ttl"} {
		if b.str(key) == "" {
			delete(b.raw, key)
		}
	}
	config, set := readConfig(b, m.GetConfig())
	cmd := &commandv1.TuneMount{
		Namespace: m.GetNamespace(), Table: m.GetTable(), Path: m.GetPath(),
		SetConfig: set, Config: config,
	}
	if b.has("description") {
		cmd.SetDescription, cmd.Description = true, b.str("description")
	}
	raised := false
	if changes := b.strMap("options"); len(changes) > 0 {
		cmd.SetOptions = true
		if cmd.Options, raised, err = tunedOptions(m.GetOptions(), changes); err != nil {
			return nil, err
		}
	}
	if b.has("plugin_version") {
		cmd.SetPluginVersion, cmd.PluginVersion = true, b.str("plugin_version")
		if cmd.PluginVersion == "" {
			return nil, fault.Text(fault.Invalid, "version %q is not a valid semantic version: malformed version: %s", "", "")
		}
		v, err := canonicalVersion(cmd.PluginVersion)
		if err != nil {
			return nil, err
		}
		cmd.PluginVersion = v
	}
	if b.err != nil {
		return nil, b.err
	}
	if set && m.GetTable() != "auth" && b.has("token_type") {
		return nil, fault.Text(fault.Invalid, "'token_type' can only be modified on auth mounts")
	}
	if err := checkConfig(config); err != nil {
		return nil, err
	}
	_, err = t.propose(q, &commandv1.Command{Body: &commandv1.Command_TuneMount{TuneMount: cmd}})
	if err != nil || !raised {
		return nil, err
	}
	return t.upgradeData(q, m)
}

// tunedOptions lays changes over a mount's options: an empty value takes one away. The option "version" is the format of
// the engine's data, which only grows; raised says that it did.
func tunedOptions(have, changes map[string]string) (options map[string]string, raised bool, err error) {
	options = maps.Clone(have)
	if options == nil {
		options = map[string]string{}
	}
	if text, ok := changes["version"]; ok {
		now, want := 1, 0
		if n, err := strconv.Atoi(have["version"]); err == nil {
			now = n
		}
		if want, err = strconv.Atoi(text); err != nil || want < 1 || want > 2 {
			return nil, false, fault.Text(fault.Invalid, "invalid version provided: %s", text)
		}
		if now > want {
			return nil, false, fault.Text(fault.Invalid, "cannot downgrade mount from version %d", now)
		}
		raised = now < want
	}
	for k, v := range changes {
		if v == "" {
			delete(options, k)
		} else {
			options[k] = v
		}
	}
	return options, raised, nil
}

// upgradeData sets the mount up again on every node, so that its engine learns that its data shall have a newer format:
// what `kv enable-versioning` asks for.
func (t mountTable) upgradeData(q *request, m *commandv1.Mount) (*reply, error) {
	rep := &reply{warnings: []string{"Upgrading the data of " + displayPath(m) + ": its plugin is being reloaded on every node, " +
		"and may refuse requests for a moment"}}
	start := &commandv1.StartReload{
		Id: q.id, Namespace: q.ns, Scope: commandv1.Scope_SCOPE_GLOBAL, ServingNode: t.NodeID, LeaderId: t.Cluster.Status().LeaderID,
		Selector: &commandv1.Selector{Mounts: []string{displayPath(m)}}, Options: &commandv1.Options{},
		RequestedBy: q.who.Token.GetDisplayName(),
	}
	start.RequestHash = fsm.RequestHash(start)
	res, err := t.propose(q, &commandv1.Command{Body: &commandv1.Command_StartReload{StartReload: start}})
	var r *commandv1.Reload
	if err == nil {
		r, err = t.awaitEnd(q.ctx, res.GetId(), enableTimeout)
	}
	switch {
	case err != nil:
		rep.warnings = append(rep.warnings, fmt.Sprintf("the option is set, but the reload did not start (%v): reload %s", err, displayPath(m)))
	case r != nil && ended(r.GetPhase()) && r.GetPhase() != commandv1.Phase_PHASE_DONE:
		rep.warnings = append(rep.warnings, "the option is set, but "+failureText(r, t.reloadRecord(t.State.View(), r)))
	}
	return rep, nil
}

// mountOf splits a client's "auth/x" or "x" into table and path.
func mountOf(p string) (table, path string) {
	p = strings.Trim(p, "/") + "/"
	if rest, ok := strings.CutPrefix(p, "auth/"); ok && rest != "" {
		return "auth", rest
	}
	return "secret", p
}

// oneReading refuses a path for a mount that something in front of this server, or behind it, takes for another one: a backslash
// is a slash to some. (The state, which must read old logs as ever, has no such rule.)
func oneReading(path string) error {
	if strings.Contains(path, `\`) {
		return fault.Text(fault.Invalid, "cannot mount %q: a backslash is a slash to some, so it stands in no path", path)
	}
	return nil
}

func (s *Server) remount(q *request) (*reply, error) {
	from, to := q.body.str("from"), q.body.str("to")
	if q.body.err != nil || from == "" || to == "" {
		return nil, fault.Text(fault.Invalid, "both 'from' and 'to' path must be specified as a string")
	}
	cmd := &commandv1.MoveMount{Namespace: q.ns, ToNamespace: q.ns}
	cmd.Table, cmd.Path = mountOf(from)
	cmd.ToTable, cmd.ToPath = mountOf(to)
	if err := oneReading(to); err != nil {
		return nil, err
	}
	_, err := s.propose(q, &commandv1.Command{Body: &commandv1.Command_MoveMount{MoveMount: cmd}})
	if err != nil {
		return nil, err
	}
	return &reply{data: map[string]any{"migration_id": moveID(q.id, from, to)}, warnings: []string{
		"Mount move has been queued. Progress will be reported in rollcall's log, tagged with the returned migration_id",
	}}, nil
}

// A move is one entry of the log: when it is answered it is done, and one that failed was answered with its error. So the
// id that the answer gives out holds what a status has to tell, on every node and for ever, and nothing is kept.
type move struct{ From, To string }

func moveID(request, from, to string) string {
	raw, err := json.Marshal(move{strings.Trim(from, "/") + "/", strings.Trim(to, "/") + "/"})
	if err != nil { // two strings always encode
		return request
	}
	return request + "." + base64.RawURLEncoding.EncodeToString(raw)
}

func (s *Server) remountStatus(q *request) (*reply, error) {
	id, text, _ := strings.Cut(q.params["id"], ".")
	raw, err := base64.RawURLEncoding.DecodeString(text)
	var m move
	if err != nil || uuid.Validate(id) != nil || json.Unmarshal(raw, &m) != nil || m.From == "" {
		return nil, nil
	}
	return &reply{data: map[string]any{
		"migration_id":   q.params["id"],
		"migration_info": map[string]any{"source_mount": m.From, "target_mount": m.To, "status": "success"},
	}}, nil
}

// uiMounts shows what the caller has business with; without a token, what is meant to be seen by everyone.
func (s *Server) uiMounts(q *request) (*reply, error) {
	if tokenOf(q.http) != "" {
		if who, err := s.authenticate(q.view, q.http); err == nil {
			q.who = who
		}
	}
	secret, auth := map[string]any{}, map[string]any{}
	for _, m := range q.view.Mounts() {
		if m.GetNamespace() != q.ns || m.GetParentUuid() != "" {
			continue
		}
		if m.GetConfig().GetListingVisibility() != "unauth" &&
			(q.who == nil || !s.Policies.Sees(q.view, q.who, q.ns, displayPath(m))) {
			continue
		}
		o := map[string]any{"type": m.GetType(), "description": m.GetDescription(), "options": m.GetOptions()}
		if m.GetTable() == "auth" {
			auth[m.GetPath()] = o
		} else {
			secret[m.GetPath()] = o
		}
	}
	return &reply{data: map[string]any{"auth": auth, "secret": secret}}, nil
}

// uiMount answers 403 for what is not there as for what may not be seen: the text is what clients print.
func (s *Server) uiMount(q *request) (*reply, error) {
	path := strings.Trim(q.params["path"], "/") + "/"
	m, _ := q.view.MountFor(q.ns, path)
	if m == nil || !s.Policies.Sees(q.view, q.who, q.ns, displayPath(m)) {
		return nil, &fault.Error{Kind: fault.Denied, Text: fmt.Sprintf("preflight capability check returned 403, "+
			"please ensure client's policies grant access to path %q", path)}
	}
	o := mountObject(m, s.Plugins.Running()[m.GetUuid()])
	o["path"] = m.GetNamespace() + displayPath(m)
	return &reply{data: o}, nil
}
