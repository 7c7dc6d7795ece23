package fsm

import (
	"slices"
	"strings"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// reservedPaths are served by the node itself.
var reservedPaths = []string{"audit/", "auth/", "cubbyhole/", "identity/", "sys/"}

// unmountable are types of what the node serves itself.
var unmountable = []string{
	"cubbyhole", "identity", "ns_cubbyhole", "ns_identity", "ns_system", "ns_token", "system", "token",
}

// checkMount says why a mount could not be made here, in the contract's words. It looks at everything but the plugin.
func (s *state) checkMount(m *commandv1.Mount) error {
	if !plain(m.GetUuid(), maxName) || m.GetUuid() == "" || !plain(m.GetAccessor(), maxName) {
		return invalid("a mount needs a uuid and an accessor")
	}
	if get(&s.mounts, m.GetUuid()) != nil {
		return invalid("a mount with uuid %s exists", m.GetUuid())
	}
	if slices.Contains(unmountable, m.GetType()) {
		return invalid("mount type of %q is not mountable", m.GetType())
	}
	if err := checkConfig(m.GetConfig()); err != nil {
		return err
	}
	if len(m.GetDescription()) > maxText || len(m.GetOptions()) > maxList {
		return invalid("the description or the options are too long")
	}
	return s.checkPath(m.GetNamespace(), m.GetTable(), m.GetPath(), "")
}

// checkPath says why a path cannot be taken; the mount with uuid self is not in its own way.
func (s *state) checkPath(namespace, table, path, self string) error {
	if table != typeSecret && table != typeAuth {
		return invalid("a mount is in the table %q or %q, not %q", typeSecret, typeAuth, trim(table, maxName))
	}
	if !s.hasNamespace(namespace) {
		return fault.Text(fault.NotFound, "namespace not found")
	}
	if !strings.HasSuffix(path, "/") || path == "/" || !plain(path, maxName) || dotted(path) || strings.HasPrefix(path, "/") {
		return invalid("cannot mount %q", trim(path, maxName))
	}
	if table == typeSecret {
		for _, r := range reservedPaths {
			if strings.HasPrefix(path, r) {
				return invalid("cannot mount %q", path)
			}
		}
	} else if strings.HasPrefix(path, "token/") {
		return invalid("path is already in use at token/")
	}
	prefix := key(namespace, table, "")
	var err error
	// Over an existing one: some prefix of path, cut at its slashes, is a mount.
	for i, c := range path {
		if c != '/' {
			continue
		}
		if id := get(&s.paths, prefix+path[:i+1]); id != "" && id != self {
			return invalid("path is already in use at %s", path[:i+1])
		}
		if table == typeSecret && s.hasNamespace(namespace+path[:i+1]) {
			return invalid("path is already in use at %s", path[:i+1])
		}
	}
	// Under it: a mount's path begins with path.
	scanPrefix(&s.paths, prefix+path, func(k, id string) bool {
		if id == self {
			return true
		}
		err = invalid("existing mount at %s", strings.TrimPrefix(k, prefix))
		return false
	})
	if err == nil && table == typeSecret {
		scanPrefix(&s.namespaces, namespace+path, func(k string, _ *commandv1.Namespace) bool {
			err = invalid("existing namespace at %s", strings.TrimPrefix(k, namespace))
			return false
		})
	}
	return err
}

func checkConfig(c *commandv1.MountConfig) error {
	switch {
	case c.GetDefaultLeaseTtlS() < 0 || c.GetMaxLeaseTtlS() < 0:
		return invalid("lease TTLs cannot be negative")
	case c.GetMaxLeaseTtlS() > 0 && c.GetDefaultLeaseTtlS() > c.GetMaxLeaseTtlS():
		return invalid("given default lease TTL greater than given max lease TTL")
	case c.GetHoldMs() < 0 || c.GetHoldMs() > 60_000:
		return invalid("hold_ms must be between 0 and 60000")
	case !slices.Contains([]string{"", "unauth", "hidden"}, c.GetListingVisibility()):
		return invalid("invalid listing_visibility %q", trim(c.GetListingVisibility(), maxName))
	case !slices.Contains([]string{"", "lease", "none"}, c.GetFencing()):
		return invalid(`fencing must be "lease" or "none", not %q`, trim(c.GetFencing(), maxName))
	case !slices.Contains(depths, c.GetTrial()):
		return invalid(`trial must be "handshake", "setup" or "initialize", not %q`, trim(c.GetTrial(), maxName))
	}
	for _, l := range [][]string{
		c.GetPassthroughRequestHeaders(), c.GetAllowedResponseHeaders(),
		c.GetAuditNonHmacRequestKeys(), c.GetAuditNonHmacResponseKeys(),
	} {
		if len(l) > maxList {
			return invalid("a list of the mount's config has more than %d elements", maxList)
		}
	}
	return nil
}

var depths = []string{"", "handshake", "setup", "initialize"}

// tableOf is the table that a plugin type is mounted in.
func tableOf(pluginType string) string {
	if pluginType == typeAuth {
		return typeAuth
	}
	return typeSecret
}

// resolveMount answers what a new mount of a plugin would run, in the words of enabling one.
func (s *state) resolveMount(pluginType, name, version string) (*commandv1.Spec, error) {
	v, err := canonicalVersion(version)
	if err != nil {
		return nil, err
	}
	if pin := get(&s.pins, key(pluginType, name)); pin != nil && v != "" {
		return nil, invalid("cannot specify plugin_version for %s plugin %q, as it is pinned to version %s",
			pluginType, name, pin.GetVersion())
	}
	spec, err := s.resolve(resolution{kind: pluginType, name: name, asked: v})
	if err != nil && v == "" && !s.knownPlugin(pluginType, name) && s.knownPlugin(typeUnknown, name) {
		return nil, invalid("unknown backend type: %q", name)
	}
	return spec, err
}

func (e *entry) enableMount(c *commandv1.EnableMount) error {
	m := &commandv1.Mount{
		Uuid: c.GetUuid(), Accessor: c.GetAccessor(), Namespace: c.GetNamespace(), Table: c.GetTable(), Path: c.GetPath(),
		Type: c.GetType(), PluginType: c.GetPluginType(), Description: c.GetDescription(), Config: c.GetConfig(),
		Options: c.GetOptions(), Local: c.GetLocal(), SealWrap: c.GetSealWrap(),
		ExternalEntropyAccess: c.GetExternalEntropyAccess(), CreatedIndex: e.index, CreatedWallMs: e.wallMS,
	}
	if m.PluginType == "" {
		m.PluginType = m.Table
	}
	if err := e.checkMount(m); err != nil {
		return err
	}
	if err := checkPlugin(m.GetPluginType(), m.GetType()); err != nil {
		return err
	}
	if tableOf(m.GetPluginType()) != m.GetTable() || m.GetPluginType() == typeDatabase && m.GetType() != typeDatabase {
		return invalid("unknown backend type: %q", m.GetType())
	}
	spec, err := e.resolveMount(m.GetPluginType(), m.GetType(), c.GetPluginVersion())
	if err != nil {
		return err
	}
	if want := c.GetExpectSha256(); want != "" && want != spec.GetSha256() {
		return fault.Text(fault.Conflict, "the catalog's entry of %q changed while the mount was made: try again", m.GetType())
	}
	if m.ConfiguredVersion, err = canonicalVersion(c.GetPluginVersion()); err != nil {
		return err
	}
	if m.Config == nil {
		m.Config = &commandv1.MountConfig{}
	}
	m.Wanted = &commandv1.Wanted{Generation: e.index, Spec: spec, FreshSince: e.index}
	e.putMount(m)
	e.res.Id = m.GetUuid()
	return nil
}

func (e *entry) mountAt(namespace, table, path string) *commandv1.Mount {
	return get(&e.mounts, get(&e.paths, key(namespace, table, path)))
}

func (e *entry) disableMount(c *commandv1.DisableMount) error {
	m := e.mountAt(c.GetNamespace(), c.GetTable(), c.GetPath())
	if m == nil {
		e.res.Repeated = true
		return nil
	}
	e.dropMount(m)
	e.res.Id = m.GetUuid()
	return nil
}

// dropMount removes a mount with its storage and leases, and tells the reloads that it is gone.
func (e *entry) dropMount(m *commandv1.Mount) {
	if isDatabase(m) {
		for _, c := range e.connectionsOf(m.GetUuid()) {
			e.dropMount(c)
		}
	}
	e.deleteMount(m)
	e.wipeStorage(m.GetUuid())
	var gone []*commandv1.Lease
	scanPrefix(&e.leaseMounts, key(m.GetUuid(), ""), func(_, id string) bool {
		gone = append(gone, get(&e.leases, id))
		return true
	})
	for _, l := range gone {
		e.deleteLease(l)
	}
	if m.GetTable() == typeAuth { // what it let in goes with it
		var tokens [][]byte
		e.tokens.Scan(func(_ string, t *commandv1.Token) bool {
			if t.GetMountUuid() == m.GetUuid() {
				tokens = append(tokens, t.GetHash())
			}
			return true
		})
		for _, h := range tokens {
			_ = e.revokeToken(&commandv1.RevokeToken{Hash: h}) // a token that exists is always revoked
		}
	}
	e.mountGone(m.GetUuid())
}

func (e *entry) tuneMount(c *commandv1.TuneMount) error {
	old := e.mountAt(c.GetNamespace(), c.GetTable(), c.GetPath())
	if old == nil {
		return invalid("cannot fetch sysview for path %q", trim(c.GetPath(), maxName))
	}
	m := clone(old)
	if c.GetSetConfig() {
		if err := checkConfig(c.GetConfig()); err != nil {
			return err
		}
		m.Config = c.GetConfig()
		if m.Config == nil {
			m.Config = &commandv1.MountConfig{}
		}
	}
	if c.GetSetDescription() {
		if len(c.GetDescription()) > maxText {
			return invalid("the description is longer than %d bytes", maxText)
		}
		m.Description = c.GetDescription()
	}
	if c.GetSetOptions() {
		if len(c.GetOptions()) > maxList {
			return invalid("more than %d options", maxList)
		}
		m.Options = c.GetOptions()
	}
	if c.GetSetPluginVersion() {
		v, err := e.tunedVersion(m, c.GetPluginVersion())
		if err != nil {
			return err
		}
		m.ConfiguredVersion = v
	}
	e.putMount(m)
	e.follow(m)
	e.res.Id = m.GetUuid()
	return nil
}

func (e *entry) tunedVersion(m *commandv1.Mount, asked string) (string, error) {
	if asked == "" {
		return "", invalid(`version "" is not a valid semantic version: malformed version: `)
	}
	if pin := get(&e.pins, key(m.GetPluginType(), m.GetType())); pin != nil {
		return "", invalid("plugin_version cannot be set for %s plugin %q as a pinned version %s is in effect",
			m.GetPluginType(), m.GetType(), pin.GetVersion())
	}
	spec, err := e.resolve(resolution{kind: m.GetPluginType(), name: m.GetType(), asked: asked})
	return spec.GetVersion(), err
}

// shown is a mount's path as clients say it.
func shown(table, path string) string {
	if table == typeAuth {
		return "auth/" + path
	}
	return path
}

func (e *entry) moveMount(c *commandv1.MoveMount) error {
	m := e.mountAt(c.GetNamespace(), c.GetTable(), c.GetPath())
	if m == nil {
		return invalid("no matching mount at %q", trim(shown(c.GetTable(), c.GetPath()), maxName))
	}
	to := c.GetToTable()
	if to == "" {
		to = c.GetTable()
	}
	if to != m.GetTable() {
		return invalid("cannot move a mount between secret engines and auth methods")
	}
	if id := get(&e.paths, key(c.GetToNamespace(), to, c.GetToPath())); id != "" {
		return invalid("path already in use at %q", shown(to, c.GetToPath()))
	}
	if err := e.checkPath(c.GetToNamespace(), to, c.GetToPath(), m.GetUuid()); err != nil {
		return err
	}
	m = clone(m)
	m.Namespace, m.Table, m.Path = c.GetToNamespace(), to, c.GetToPath()
	e.putMount(m)
	e.follow(m)
	e.res.Id = m.GetUuid()
	return nil
}

// wantedOf is what the state wants a node to run for a mount: the node's override, else the mount's.
func wantedOf(m *commandv1.Mount, nodeID string) *commandv1.Wanted {
	if o := overrideOf(m, nodeID); o != nil {
		return o.GetWanted()
	}
	return m.GetWanted()
}

func overrideOf(m *commandv1.Mount, nodeID string) *commandv1.Override {
	i, ok := slices.BinarySearchFunc(m.GetOverrides(), nodeID, func(o *commandv1.Override, id string) int {
		return strings.Compare(o.GetNodeId(), id)
	})
	if !ok {
		return nil
	}
	return m.GetOverrides()[i]
}

// setOverride changes a mount that the caller has cloned.
func setOverride(m *commandv1.Mount, o *commandv1.Override) {
	i, ok := slices.BinarySearchFunc(m.GetOverrides(), o.GetNodeId(), func(o *commandv1.Override, id string) int {
		return strings.Compare(o.GetNodeId(), id)
	})
	if ok {
		m.Overrides[i] = o
		return
	}
	m.Overrides = slices.Insert(m.Overrides, i, o)
}

// dropOverrides ends every override of a node that will not come back as it was.
func (e *entry) dropOverrides(nodeID string) {
	var changed []*commandv1.Mount
	e.mounts.Scan(func(_ string, m *commandv1.Mount) bool {
		if overrideOf(m, nodeID) != nil {
			changed = append(changed, m)
		}
		return true
	})
	for _, old := range changed {
		m := clone(old)
		m.Overrides = slices.DeleteFunc(m.Overrides, func(o *commandv1.Override) bool { return o.GetNodeId() == nodeID })
		e.putMount(m)
	}
}
