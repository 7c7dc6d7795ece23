package fsm

import (
	"cmp"
	"strings"

	commandv1 "rollcall/proto/command/v1"
)

// View is the state after one entry. It is immutable and may be used from any goroutine, for as long as anybody likes.
// Its records are shared: they must never be mutated. What is not there is nil.
type View struct{ s *state }

// Index is the index of the last command applied.
func (v *View) Index() uint64 { return v.s.index }

// Term is the term of the last command applied.
func (v *View) Term() uint64 { return v.s.term }

// ClusterID is the cluster's UUID; empty before InitCluster.
func (v *View) ClusterID() string { return v.s.clusterID }

// ClusterName is the cluster's name for people.
func (v *View) ClusterName() string { return v.s.clusterName }

// AuditSalt is what audit records are hashed with; empty until a leader has entered one. It is a secret.
func (v *View) AuditSalt() string { return v.s.auditSalt }

// ClockNS is the log's clock in nanoseconds: the sum of what entries said has elapsed. Only it decides expiry.
func (v *View) ClockNS() uint64 { return v.s.clock }

// KeyTerm is the term of data keys that every node is to seal its disk with, from 1, and when it began, in Unix
// milliseconds of the proposer's clock; 0 for the first.
func (v *View) KeyTerm() (term uint64, wallMS int64) { return max(v.s.keyTerm, 1), v.s.keyTermMS }

// Restoring reports whether an operator's backup has replaced the state and the command Restored is still to come: until then
// mounts have the generations of the backup, and what runs was set up on other storage.
func (v *View) Restoring() bool { return v.s.restoring }

// Initialized reports whether InitCluster has been applied.
func (v *View) Initialized() bool { return v.s.clusterID != "" }

// HashToken hashes a token as the token table's keys are.
func (v *View) HashToken(token string) []byte { return HashToken(v.s.clusterID, token) }

// Node finds a node by id, also one that has left.
func (v *View) Node(id string) *commandv1.Node { return get(&v.s.nodes, id) }

// NodeByName finds a node by its name.
func (v *View) NodeByName(name string) *commandv1.Node {
	return get(&v.s.nodes, get(&v.s.nodeNames, name))
}

// Nodes are all nodes in order of id, those that have left among them.
func (v *View) Nodes() []*commandv1.Node { return values(&v.s.nodes) }

// Plugin finds a catalog entry; version "" is the unversioned one.
func (v *View) Plugin(kind, name, version string) *commandv1.Plugin {
	return get(&v.s.plugins, pluginKey(kind, name, version))
}

// Plugins is the catalog in order of type, name and version as text.
func (v *View) Plugins() []*commandv1.Plugin { return values(&v.s.plugins) }

// Pin finds the pin of a plugin.
func (v *View) Pin(kind, name string) *commandv1.Pin { return get(&v.s.pins, key(kind, name)) }

// Pins are all pins in order of type and name.
func (v *View) Pins() []*commandv1.Pin { return values(&v.s.pins) }

// ResolveSpec answers what would run for a plugin: the version asked for ("" for none; refused where a pin says
// otherwise), else the pin, else the unversioned entry, else the highest version. Errors are fault.Invalid.
func (v *View) ResolveSpec(kind, name, version string) (*commandv1.Spec, error) {
	return v.s.resolve(resolution{kind: kind, name: name, asked: version})
}

// ResolveMount is ResolveSpec in the words of enabling a mount.
func (v *View) ResolveMount(pluginType, name, version string) (*commandv1.Spec, error) {
	return v.s.resolveMount(pluginType, name, version)
}

// ResolveReload answers what a reload of an existing mount would run; version as in ResolveSpec, and after the pin
// comes the mount's configured version.
func (v *View) ResolveReload(m *commandv1.Mount, version string) (*commandv1.Spec, error) {
	return v.s.resolve(resolution{
		kind: m.GetPluginType(), name: m.GetType(), asked: version, configured: m.GetConfiguredVersion(),
	})
}

// CheckMount says why a mount could not be made, leaving its plugin aside: path, uuid, config. nil when it could.
func (v *View) CheckMount(m *commandv1.Mount) error { return v.s.checkMount(m) }

// Mount finds a mount by uuid.
func (v *View) Mount(uuid string) *commandv1.Mount { return get(&v.s.mounts, uuid) }

// MountAt finds the mount at exactly this path (with its trailing slash) of a table ("secret", "auth") and namespace.
func (v *View) MountAt(namespace, table, path string) *commandv1.Mount {
	return get(&v.s.mounts, get(&v.s.paths, key(namespace, table, path)))
}

// MountFor finds the mount that serves a path within a namespace, by longest prefix, and the rest of the path below it.
// "auth/..." is looked up in the table auth.
func (v *View) MountFor(namespace, path string) (*commandv1.Mount, string) {
	return v.s.mountFor(namespace, path)
}

// MountNamed finds a mount by the forms that a reload's mounts accept ("foo", "auth/foo", "sys/auth/foo/", ...).
func (v *View) MountNamed(namespace, path string) *commandv1.Mount {
	return v.s.mountNamed(namespace, path)
}

// Mounts are all mounts in order of uuid, the connections of database mounts among them: those have a parent_uuid.
func (v *View) Mounts() []*commandv1.Mount { return values(&v.s.mounts) }

// Connection finds a connection of a database mount by its name.
func (v *View) Connection(mountUUID, name string) *commandv1.Mount {
	return v.s.connection(mountUUID, name)
}

// Connections are the connections of a database mount in order of their names.
func (v *View) Connections(mountUUID string) []*commandv1.Mount { return v.s.connectionsOf(mountUUID) }

// ResolveConnection answers what a new connection of a database plugin would run; version "" takes what the catalog
// resolves to. Errors are fault.Invalid in the contract's words.
func (v *View) ResolveConnection(plugin, version string) (*commandv1.Spec, error) {
	canonical, err := canonicalVersion(version)
	if err != nil {
		return nil, err
	}
	return v.s.resolveConnection(plugin, canonical)
}

// Wanted is what the state wants a node to run for a mount: its override, else the mount's. nil for a nil mount.
func (v *View) Wanted(m *commandv1.Mount, nodeID string) *commandv1.Wanted {
	return wantedOf(m, nodeID)
}

// Override is what a node runs instead of the mount's Wanted, and why; nil when it does not.
func (v *View) Override(m *commandv1.Mount, nodeID string) *commandv1.Override {
	return overrideOf(m, nodeID)
}

// StorageGet finds one value of a mount's storage.
func (v *View) StorageGet(mountUUID, storageKey string) *commandv1.StorageEntry {
	return get(&v.s.storage, key(mountUUID, storageKey))
}

// StorageList lists what is directly below prefix, sorted, without the prefix; folders end in a slash.
func (v *View) StorageList(mountUUID, prefix string) []string {
	base := key(mountUUID, prefix)
	var out []string
	it := v.s.storage.Iter()
	for ok := it.Seek(base); ok; {
		rest, in := strings.CutPrefix(it.Key(), base)
		if !in {
			break
		}
		if i := strings.IndexByte(rest, '/'); i >= 0 {
			out = append(out, rest[:i+1])
			ok = it.Seek(base + rest[:i] + "0") // '0' follows '/': past the whole folder
			continue
		}
		if rest != "" {
			out = append(out, rest)
		}
		ok = it.Next()
	}
	return out
}

// StorageScan calls fn for every value whose key begins with prefix, in key order, until fn returns false.
func (v *View) StorageScan(mountUUID, prefix string, fn func(*commandv1.StorageEntry) bool) {
	scanPrefix(&v.s.storage, key(mountUUID, prefix), func(_ string, e *commandv1.StorageEntry) bool { return fn(e) })
}

// Reload finds a reload's detailed record by its id or an alias.
func (v *View) Reload(id string) *commandv1.Reload { return v.s.findReload(id) }

// Reloads are the detailed records, newest first.
func (v *View) Reloads() []*commandv1.Reload {
	out := make([]*commandv1.Reload, 0, v.s.reloads.Len())
	v.s.reloadSeq.Reverse(func(_, id string) bool {
		out = append(out, get(&v.s.reloads, id))
		return true
	})
	return out
}

// ReloadID finds the compact row of an id, which outlives the detailed record. Under an alias, with what the first one
// has come to.
func (v *View) ReloadID(id string) *commandv1.ReloadID { return get(&v.s.reloadIDs, id) }

// ActiveReload is the reload that moves a mount now (preparing or committed); nil when none does.
func (v *View) ActiveReload(mountUUID string) *commandv1.Reload {
	return get(&v.s.reloads, get(&v.s.active, mountUUID))
}

// RunningReloads are the reloads that somebody must act on, oldest first: queued, preparing, committed. One that is
// rolling back is not among them, its rollback is.
func (v *View) RunningReloads() []*commandv1.Reload {
	out := make([]*commandv1.Reload, 0, v.s.open.Len())
	v.s.open.Scan(func(_, id string) bool {
		out = append(out, get(&v.s.reloads, id))
		return true
	})
	return out
}

// TokenByHash finds a token by HashToken of it.
func (v *View) TokenByHash(hash []byte) *commandv1.Token { return get(&v.s.tokens, string(hash)) }

// TokenByAccessor finds a token by its accessor.
func (v *View) TokenByAccessor(accessor string) *commandv1.Token {
	if h := get(&v.s.accessors, accessor); h != "" {
		return get(&v.s.tokens, h)
	}
	return nil
}

// Tokens are all tokens in order of their hashes.
func (v *View) Tokens() []*commandv1.Token { return values(&v.s.tokens) }

// Policy finds a policy.
func (v *View) Policy(namespace, name string) *commandv1.Policy {
	return get(&v.s.policies, key(namespace, name))
}

// Policies are the policies of a namespace in order of name.
func (v *View) Policies(namespace string) []*commandv1.Policy {
	var out []*commandv1.Policy
	scanPrefix(&v.s.policies, key(namespace, ""), func(_ string, p *commandv1.Policy) bool {
		out = append(out, p)
		return true
	})
	return out
}

// HasNamespace reports whether a namespace exists; "" is root and always does. Others end in a slash.
func (v *View) HasNamespace(path string) bool { return v.s.hasNamespace(path) }

// Namespace finds a namespace by its path. Root has no record.
func (v *View) Namespace(path string) *commandv1.Namespace { return get(&v.s.namespaces, path) }

// Namespaces are all namespaces but root, in order of path.
func (v *View) Namespaces() []*commandv1.Namespace { return values(&v.s.namespaces) }

// Lease finds a plugin's lease by id.
func (v *View) Lease(id string) *commandv1.Lease { return get(&v.s.leases, id) }

// Leases are the leases whose id begins with prefix, in order of id.
func (v *View) Leases(prefix string) []*commandv1.Lease {
	var out []*commandv1.Lease
	scanPrefix(&v.s.leases, prefix, func(_ string, l *commandv1.Lease) bool {
		out = append(out, l)
		return true
	})
	return out
}

// LeasesOfMount are the leases of a mount in order of id.
func (v *View) LeasesOfMount(uuid string) []*commandv1.Lease {
	var out []*commandv1.Lease
	scanPrefix(&v.s.leaseMounts, key(uuid, ""), func(_, id string) bool {
		out = append(out, get(&v.s.leases, id))
		return true
	})
	return out
}

// LeasesOfToken are the leases that a token asked for.
func (v *View) LeasesOfToken(hash []byte) []*commandv1.Lease {
	var out []*commandv1.Lease
	scanPrefix(&v.s.leaseTokens, string(hash), func(_, id string) bool {
		if l := get(&v.s.leases, id); l != nil {
			out = append(out, l)
		}
		return true
	})
	return out
}

// Expired lists at most limit tokens and leases whose time is over at clockNS, the earliest first.
func (v *View) Expired(clockNS uint64, limit int) (tokens []*commandv1.Token, leases []*commandv1.Lease) {
	end := seqKey(clockNS, "\xff")
	v.s.expiry.Scan(func(k, id string) bool {
		if k > end || len(tokens)+len(leases) >= limit {
			return false
		}
		if k[8] == 'l' {
			leases = append(leases, get(&v.s.leases, id))
		} else {
			tokens = append(tokens, get(&v.s.tokens, id))
		}
		return true
	})
	return tokens, leases
}

// TokenCount is how many tokens there are.
func (v *View) TokenCount() int { return v.s.tokens.Len() }

// LeaseCount is how many leases there are.
func (v *View) LeaseCount() int { return v.s.leases.Len() }

// NextExpiry is the clock value at which the next token or lease expires; 0 when nothing ever does, so that no Tick is
// needed for them.
func (v *View) NextExpiry() uint64 {
	k, _, ok := v.s.expiry.Min()
	if !ok {
		return 0
	}
	var n uint64
	for i := range 8 {
		n = n<<8 | uint64(k[i])
	}
	return n
}

// CanExpire reports whether anything in the state waits for the log's clock, so that Tick entries must flow: a reload that
// waits or runs, a token or a lease with a time to live.
func (v *View) CanExpire() bool { return v.s.open.Len() > 0 || v.s.expiry.Len() > 0 }

// NewerVersion reports whether a is the higher of two versions.
func NewerVersion(a, b string) bool { return newer(cmp.Or(a, "v0.0.0-0"), cmp.Or(b, "v0.0.0-0")) }

// CanonicalVersion returns a semantic version as the catalog writes it ("1.2.0" -> "v1.2.0"); "" stays "". Its errors are
// fault.Invalid in the contract's words.
func CanonicalVersion(version string) (string, error) { return canonicalVersion(version) }

func values[V any](t *table[V]) []V {
	out := make([]V, 0, t.Len())
	t.Scan(func(_ string, v V) bool {
		out = append(out, v)
		return true
	})
	return out
}
