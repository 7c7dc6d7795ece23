package httpd

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"google.golang.org/protobuf/proto"

	"rollcall/fsm"
	"rollcall/node/api"
	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

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
