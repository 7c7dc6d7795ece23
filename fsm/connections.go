package fsm

import (
	"strings"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// A connection of a database mount is a mount of its own that no path leads to. So everything that is said of a mount holds
// for it: what it is to run, by node and generation, what it ran before, who may write its storage, and what a reload does
// to it. See DESIGN section 5.

// ConnectionConfig is the key in a connection's storage that holds its config.
const ConnectionConfig = "config"

// connectionPath is a connection's path, for showing and for naming it in a reload.
func connectionPath(parent *commandv1.Mount, name string) string {
	return parent.GetPath() + "config/" + name + "/"
}

// isDatabase reports whether a mount is one that holds connections.
func isDatabase(m *commandv1.Mount) bool {
	return m.GetPluginType() == typeDatabase && m.GetParentUuid() == ""
}

// connection finds a connection of a database mount by its name.
func (s *state) connection(parent, name string) *commandv1.Mount {
	return get(&s.mounts, get(&s.connections, key(parent, name)))
}

// connectionsOf are the connections of a mount, in order of their names.
func (s *state) connectionsOf(parent string) []*commandv1.Mount {
	var out []*commandv1.Mount
	scanPrefix(&s.connections, key(parent, ""), func(_, id string) bool {
		out = append(out, get(&s.mounts, id))
		return true
	})
	return out
}

// connectionAt finds the connection that a path below a database mount means: "config/NAME/". ok is false for any other.
func (s *state) connectionAt(m *commandv1.Mount, rest string) (c *commandv1.Mount, ok bool) {
	name, is := strings.CutPrefix(rest, "config/")
	name = strings.TrimSuffix(name, "/")
	if !is || !isDatabase(m) || name == "" || strings.Contains(name, "/") {
		return nil, false
	}
	return s.connection(m.GetUuid(), name), true
}

// mayWrite says why the proposer is not the one that writes a database mount now.
func (e *entry) mayWrite(uuid string, epoch, term uint64) (*commandv1.Mount, error) {
	m := get(&e.mounts, uuid)
	switch {
	case m == nil || !isDatabase(m):
		return nil, fault.Text(fault.NotFound, "no database mount %s", trim(uuid, maxName))
	case epoch == 0 || epoch != m.GetEpoch() || term != m.GetEpochTerm() || term != e.term:
		return nil, fault.Text(fault.Stale, "connections of %s: epoch %d of term %d is not current, %d of term %d is",
			m.GetPath(), epoch, term, m.GetEpoch(), m.GetEpochTerm())
	default:
		return m, nil
	}
}

func (e *entry) putConnection(c *commandv1.PutConnection) error {
	parent, err := e.mayWrite(c.GetMountUuid(), c.GetEpoch(), c.GetTerm())
	if err != nil {
		return err
	}
	if err := checkPlugin(typeDatabase, c.GetPluginName()); err != nil {
		return err
	}
	old := e.connection(parent.GetUuid(), c.GetName())
	switch {
	case len(c.GetName()) > maxHashes*2 || !pluginName.MatchString(c.GetName()):
		return invalid("a connection's name has 1 to %d bytes and must begin and end with a letter, digit or underscore, "+
			"with only those, dots and hyphens between", maxHashes*2)
	case len(c.GetConfig()) == 0 || len(c.GetConfig()) > MaxValue:
		return fault.Text(fault.TooLarge, "the config of a connection has 1 to %d bytes, not %d", MaxValue, len(c.GetConfig()))
	case old == nil && len(e.connectionsOf(parent.GetUuid())) >= MaxConnections:
		return invalid("the mount has %d connections already: each is a process on every node", MaxConnections)
	}
	m, err := e.changedConnection(parent, old, c)
	if err != nil {
		return err
	}
	if want := c.GetExpectSha256(); want != "" && want != m.GetWanted().GetSpec().GetSha256() {
		return fault.Text(fault.Conflict, "the catalog's entry of %q changed while the connection was tried: try again",
			c.GetPluginName())
	}
	if old != nil && old.GetUuid() != m.GetUuid() {
		e.dropMount(old)
	}
	e.putMount(m)
	e.applyOps(m.GetUuid(), []*commandv1.StorageOp{{Key: ConnectionConfig, Value: c.GetConfig()}})
	e.res.Id = m.GetUuid()
	return nil
}

// changedConnection is the connection as it will be. One that changes its plugin is another one: what a reload or a
// rollback knows of it is about the plugin before.
func (e *entry) changedConnection(parent, old *commandv1.Mount, c *commandv1.PutConnection) (*commandv1.Mount, error) {
	fresh := old == nil || old.GetType() != c.GetPluginName()
	if !fresh && get(&e.active, old.GetUuid()) != "" {
		return nil, fault.Text(fault.Unavailable, "connection %q is being reloaded: try again when reload %s has ended",
			c.GetName(), get(&e.active, old.GetUuid()))
	}
	spec, configured, err := e.connectionSpec(old, fresh, c)
	if err != nil {
		return nil, err
	}
	want := &commandv1.Wanted{Generation: e.index, Spec: spec, FreshSince: e.index}
	if !fresh {
		m := clone(old)
		if m.GetWanted().GetSpec().GetSha256() != spec.GetSha256() || m.GetWanted().GetSpec().GetVersion() != spec.GetVersion() {
			m.Previous = m.GetWanted()
		}
		m.Wanted, m.Overrides, m.ConfiguredVersion = want, nil, configured
		return m, nil
	}
	if c.GetUuid() == "" || !plain(c.GetUuid(), maxName) || get(&e.mounts, c.GetUuid()) != nil {
		return nil, invalid("a new connection needs a uuid of its own")
	}
	return &commandv1.Mount{
		Uuid: c.GetUuid(), Accessor: parent.GetAccessor(), ParentUuid: parent.GetUuid(), Connection: c.GetName(),
		Namespace: parent.GetNamespace(), Table: parent.GetTable(), Path: connectionPath(parent, c.GetName()),
		Type: c.GetPluginName(), PluginType: typeDatabase, Config: connectionSettings(parent), Local: parent.GetLocal(),
		ConfiguredVersion: configured, Wanted: want, CreatedIndex: e.index, CreatedWallMs: e.wallMS,
	}, nil
}

// connectionSpec is what a connection is to run. Only a version that is named moves one that runs: everything else is for
// reloads to do, which try it on every node first.
func (e *entry) connectionSpec(old *commandv1.Mount, fresh bool, c *commandv1.PutConnection,
) (spec *commandv1.Spec, configured string, err error) {
	if !fresh && c.GetPluginVersion() == "" {
		return old.GetWanted().GetSpec(), old.GetConfiguredVersion(), nil
	}
	if configured, err = canonicalVersion(c.GetPluginVersion()); err != nil {
		return nil, "", err
	}
	spec, err = e.resolveConnection(c.GetPluginName(), configured)
	return spec, configured, err
}

// resolveConnection answers what a new connection of a plugin would run.
func (s *state) resolveConnection(name, version string) (*commandv1.Spec, error) {
	if !s.knownPlugin(typeDatabase, name) && s.knownPlugin(typeUnknown, name) {
		return nil, invalid("plugin %q is in the catalog, but it is not a database plugin", name)
	}
	return s.resolveMount(typeDatabase, name, version)
}

// connectionSettings are what a connection has of its mount's config: how it is switched, and how long credentials last.
func connectionSettings(parent *commandv1.Mount) *commandv1.MountConfig {
	c := parent.GetConfig()
	return &commandv1.MountConfig{
		DefaultLeaseTtlS: c.GetDefaultLeaseTtlS(), MaxLeaseTtlS: c.GetMaxLeaseTtlS(),
		Trial: c.GetTrial(), Fencing: c.GetFencing(), HoldMs: c.GetHoldMs(), LeaderOnly: true,
	}
}

func (e *entry) deleteConnection(c *commandv1.DeleteConnection) error {
	parent, err := e.mayWrite(c.GetMountUuid(), c.GetEpoch(), c.GetTerm())
	if err != nil {
		return err
	}
	m := e.connection(parent.GetUuid(), c.GetName())
	if m == nil {
		e.res.Repeated = true
		return nil
	}
	e.dropMount(m)
	e.res.Id = m.GetUuid()
	return nil
}

// follow carries what a database mount has become to its connections.
func (e *entry) follow(parent *commandv1.Mount) {
	if !isDatabase(parent) {
		return
	}
	for _, old := range e.connectionsOf(parent.GetUuid()) {
		m := clone(old)
		m.Namespace, m.Table, m.Path = parent.GetNamespace(), parent.GetTable(), connectionPath(parent, old.GetConnection())
		m.Config, m.Local = connectionSettings(parent), parent.GetLocal()
		e.putMount(m)
	}
}

// markLeaderOnly changes one flag of a mount's config, whatever else of it is tuned at the same time.
func (e *entry) markLeaderOnly(c *commandv1.MarkLeaderOnly) error {
	old := get(&e.mounts, c.GetMountUuid())
	switch {
	case old == nil:
		return fault.Text(fault.NotFound, "mark leader_only: no mount %s", trim(c.GetMountUuid(), maxName))
	case old.GetConfig().GetLeaderOnly():
		e.res.Repeated = true
		return nil
	}
	m := clone(old)
	if m.Config == nil {
		m.Config = &commandv1.MountConfig{}
	}
	m.Config.LeaderOnly = true
	e.putMount(m)
	e.res.Id = m.GetUuid()
	return nil
}
