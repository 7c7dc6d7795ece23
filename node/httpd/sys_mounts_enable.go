package httpd

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

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
