package database

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"slices"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
	pluginpb "rollcall/proto/plugin"
)

func (e *Engine) config(ctx context.Context, c *call) (*pluginpb.Response, error) {
	switch c.op {
	case "list":
		var names []string
		for _, m := range e.host.Connections() {
			names = append(names, m.GetConnection())
		}
		return keys(names)
	case "read":
		return e.readConfig(c.name)
	case "update":
		return e.writeConfig(ctx, c)
	case "delete":
		return nil, e.host.Delete(ctx, c.name)
	default:
		return nil, errUnsupportedOperation
	}
}

// readConfig shows a connection without its secrets.
func (e *Engine) readConfig(name string) (*pluginpb.Response, error) {
	m := e.host.Connection(name)
	if m == nil {
		return nil, nil
	}
	config, err := parseConfig(e.host.Stored(m))
	if err != nil {
		return nil, err
	}
	return reply(map[string]any{
		"plugin_name": m.GetType(), "plugin_version": m.GetConfiguredVersion(),
		"running_plugin_version": m.GetWanted().GetSpec().GetVersion(), "connection_details": config.shown(),
		"allowed_roles": config.AllowedRoles, "root_credentials_rotate_statements": config.RootStatements,
		"verify_connection": config.Verify, "password_policy": "", "generation": m.GetWanted().GetGeneration(),
	})
}

// own are the fields of a config that are the mount's; all others are the plugin's.
var own = []string{
	"plugin_name", "plugin_version", "verify_connection", "allowed_roles", "root_rotation_statements", "password_policy", "name",
}

// writeConfig tries what the connection would be in a process of its own, which is ended again, and enters it. What runs
// goes on until then.
func (e *Engine) writeConfig(ctx context.Context, c *call) (*pluginpb.Response, error) {
	e.changing.Lock()
	defer e.changing.Unlock()
	old := e.host.Connection(c.name)
	put, config, err := e.wantedConfig(old, c)
	if err != nil {
		return nil, err
	}
	if old != nil && old.GetType() == put.GetPluginName() {
		if id := e.host.Moving(old); id != "" {
			return nil, fault.Text(fault.Unavailable, "connection %q is being reloaded: try again when reload %s has ended", c.name, id)
		}
	}
	spec := old.GetWanted().GetSpec()
	if old == nil || old.GetType() != put.GetPluginName() || put.GetPluginVersion() != "" {
		if spec, err = e.host.Resolve(put.GetPluginName(), put.GetPluginVersion()); err != nil {
			return nil, err
		}
	}
	details, err := config.details()
	if err != nil {
		return nil, err
	}
	stored, err := e.host.Try(ctx, spec, details, config.Verify)
	if err != nil {
		return nil, triedError(err)
	}
	if stored != nil && len(stored.GetFields()) > 0 {
		config.Details = stored.AsMap()
	}
	if put.Config, err = json.Marshal(config); err != nil {
		return nil, fault.As(fault.Internal, err, "write", "a connection's config")
	}
	put.ExpectSha256 = spec.GetSha256()
	if err := e.host.Put(ctx, put); err != nil {
		if fault.Is(err, fault.Deadline) {
			return &pluginpb.Response{Warnings: []string{"the connection is stored, but not open yet: " + err.Error()}}, nil
		}
		return nil, err
	}
	return nil, nil
}

// triedError is a failed trial in words that say what to do. The database is not ours, so it is the client's to fix.
func triedError(err error) error {
	if kind := fault.KindOf(err); kind == fault.Unavailable || kind == fault.Canceled || kind == fault.Exhausted {
		return err
	}
	text := "error creating database object: "
	var inner *fault.Error
	if errors.As(err, &inner) && inner.Kind == fault.Refused {
		text = "the plugin could not be started: "
	}
	return fault.Text(fault.Invalid, "%s%w", text, err)
}

// wantedConfig lays what a body says over what is stored: fields that are not named stay as they are.
func (e *Engine) wantedConfig(old *commandv1.Mount, c *call) (*commandv1.PutConnection, *Config, error) {
	config := &Config{Details: map[string]any{}, AllowedRoles: []string{}, RootStatements: []string{}}
	if old != nil {
		stored, err := parseConfig(e.host.Stored(old))
		if err != nil {
			return nil, nil, err
		}
		config = stored
	}
	put := &commandv1.PutConnection{Name: c.name}
	name, err1 := c.body.text("plugin_name", old.GetType())
	version, err2 := c.body.text("plugin_version", "")
	verify, err3 := c.body.flag("verify_connection", true)
	roles, err4 := c.body.texts("allowed_roles", config.AllowedRoles, true)
	statements, err5 := c.body.texts("root_rotation_statements", config.RootStatements, false)
	policy, err6 := c.body.text("password_policy", "")
	for _, err := range []error{err1, err2, err3, err4, err5, err6} {
		if err != nil {
			return nil, nil, err
		}
	}
	switch {
	case name == "":
		return nil, nil, fault.Text(fault.Invalid, "empty plugin name")
	case policy != "":
		return nil, nil, fault.Text(fault.Invalid, "password_policy: there are no password policies here; passwords are 26 random characters of every class")
	}
	put.PluginName, put.PluginVersion = name, version
	if old != nil && old.GetType() != name {
		config.Details = map[string]any{} // another plugin knows nothing of the fields of the one before
	}
	config.Verify, config.AllowedRoles, config.RootStatements = verify, roles, statements
	details := maps.Clone(config.Details)
	for k, v := range c.body {
		if !slices.Contains(own, k) {
			details[k] = v
		}
	}
	config.Details = details
	return put, config, nil
}

// reset closes one connection and opens it again, on every node, in a process of its own: a reload of that connection.
func (e *Engine) reset(ctx context.Context, c *call) (*pluginpb.Response, error) {
	if c.op != "update" {
		return nil, errUnsupportedOperation
	}
	m := e.host.Connection(c.name)
	if m == nil {
		return nil, fault.Text(fault.Invalid, "failed to find entry for connection with name: %q", c.name)
	}
	done, failed, err := e.reopen(ctx, []*commandv1.Mount{m}, "reset/"+c.name)
	if err == nil && len(done) == 0 {
		err = fault.Text(fault.Invalid, "failed to reset connection %q: %s", c.name, failed[c.name])
	}
	return nil, err
}

// reload closes and reopens every connection of a plugin. One that cannot be opened again does not keep the others from it:
// it goes on as it was, and is named.
func (e *Engine) reload(ctx context.Context, c *call) (*pluginpb.Response, error) {
	if c.op != "update" {
		return nil, errUnsupportedOperation
	}
	var which []*commandv1.Mount
	failed := map[string]string{}
	for _, m := range e.host.Connections() {
		if m.GetType() != c.name {
			continue
		}
		if err := e.host.Resolved(m); err != nil {
			failed[m.GetConnection()] = err.Error()
			continue
		}
		which = append(which, m)
	}
	done := []string{}
	if len(which) > 0 {
		var more map[string]string
		var err error
		if done, more, err = e.reopen(ctx, which, "reload/"+c.name); err != nil {
			return nil, fault.Wrap(err, "failed to reload", "database plugin "+c.name)
		}
		maps.Copy(failed, more)
	}
	if len(done) == 0 && len(failed) > 0 {
		name := slices.Sorted(maps.Keys(failed))[0]
		return nil, fault.Text(fault.Invalid, "failed to reload %q: no connection could be reopened; %s: %s", c.name, name, failed[name])
	}
	resp, err := reply(map[string]any{"connections": done, "count": len(done)})
	if err != nil {
		return nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(failed)) {
		resp.Warnings = append(resp.Warnings, "connection "+name+" was not reloaded and goes on as it was: "+failed[name])
	}
	if len(done)+len(failed) == 0 {
		resp.Warnings = append(resp.Warnings, "no connections were reloaded: none uses the plugin "+c.name)
	}
	return resp, nil
}

// reopen has connections reloaded, and tells from the verdicts which of them this node, where they are open, runs afresh.
func (e *Engine) reopen(ctx context.Context, which []*commandv1.Mount, by string) (done []string, failed map[string]string, err error) {
	rl, err := e.host.Reload(ctx, which, by)
	if err != nil {
		return nil, nil, err
	}
	done, failed = []string{}, map[string]string{}
	for _, m := range which {
		why := "the reload " + rl.GetId() + " ended without a verdict for it: " + rl.GetWhy()
		for _, p := range rl.GetParticipants() {
			if p.GetNodeId() != e.host.NodeID() {
				continue
			}
			for _, o := range p.GetMounts() {
				if o.GetMountUuid() != m.GetUuid() {
					continue
				}
				switch o.GetVerdict() {
				case commandv1.Verdict_VERDICT_SWITCHED, commandv1.Verdict_VERDICT_UNCHANGED, commandv1.Verdict_VERDICT_CONVERGED_LATE:
					why = ""
				case commandv1.Verdict_VERDICT_UNMOUNTED:
					why = "it was deleted meanwhile"
				default:
					if cause := o.GetReport().GetCause(); cause != "" {
						why = cause
					}
				}
			}
		}
		if why == "" {
			done = append(done, m.GetConnection())
		} else {
			failed[m.GetConnection()] = why
		}
	}
	return done, failed, nil
}
