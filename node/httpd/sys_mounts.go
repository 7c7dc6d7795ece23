package httpd

import (
	"fmt"
	"strings"
	"time"

	"rollcall/node/api"
	"rollcall/node/fault"
	"rollcall/node/policy"
	commandv1 "rollcall/proto/command/v1"
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
