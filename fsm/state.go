package fsm

import (
	"encoding/binary"
	"strings"

	"github.com/tidwall/btree"
	"google.golang.org/protobuf/proto"

	commandv1 "rollcall/proto/command/v1"
)

// table is a copy-on-write B-tree. Its values are immutable: replaced, never mutated, once they are in.
type table[V any] = btree.Map[string, V]

// state is all there is. The first block goes into snapshots; the second is derived from it.
type state struct {
	index       uint64
	term        uint64
	clock       uint64
	clusterID   string
	clusterName string
	auditSalt   string
	keyTerm     uint64 // of data keys; 0 stands for the first
	keyTermMS   int64  // when it began, by the proposer's clock
	restoring   bool   // an operator's backup has replaced the state, and Restored is not entered yet

	nodes      table[*commandv1.Node]         // id
	plugins    table[*commandv1.Plugin]       // type, name, version
	pins       table[*commandv1.Pin]          // type, name
	mounts     table[*commandv1.Mount]        // uuid
	storage    table[*commandv1.StorageEntry] // mount, key
	reloads    table[*commandv1.Reload]       // id
	reloadIDs  table[*commandv1.ReloadID]     // id
	tokens     table[*commandv1.Token]        // hash
	policies   table[*commandv1.Policy]       // namespace, name
	namespaces table[*commandv1.Namespace]    // path
	leases     table[*commandv1.Lease]        // id

	nodeNames   table[string] // name -> id
	paths       table[string] // namespace, table, path -> mount uuid; not of connections
	connections table[string] // mount uuid, name -> uuid of the connection
	reloadSeq   table[string] // start index, id -> id
	open        table[string] // start index, id -> id of reloads that have not ended
	active      table[string] // mount uuid -> id of the reload that moves it
	idSeq       table[string] // index, id -> reload id
	accessors   table[string] // token accessor -> hash
	children    table[string] // parent hash, hash -> hash
	leaseMounts table[string] // mount uuid, id -> lease id
	leaseTokens table[string] // token hash, id -> lease id
	expiry      table[string] // clock, kind, id -> id; kinds are "l" (lease) and "t" (token)
}

func newState() *state { return &state{} }

// copy is O(1): the trees are shared until either side writes.
func (s *state) copy() *state {
	c := *s
	c.nodes = *s.nodes.Copy()
	c.plugins = *s.plugins.Copy()
	c.pins = *s.pins.Copy()
	c.mounts = *s.mounts.Copy()
	c.storage = *s.storage.Copy()
	c.reloads = *s.reloads.Copy()
	c.reloadIDs = *s.reloadIDs.Copy()
	c.tokens = *s.tokens.Copy()
	c.policies = *s.policies.Copy()
	c.namespaces = *s.namespaces.Copy()
	c.leases = *s.leases.Copy()
	c.nodeNames = *s.nodeNames.Copy()
	c.paths = *s.paths.Copy()
	c.connections = *s.connections.Copy()
	c.reloadSeq = *s.reloadSeq.Copy()
	c.open = *s.open.Copy()
	c.active = *s.active.Copy()
	c.idSeq = *s.idSeq.Copy()
	c.accessors = *s.accessors.Copy()
	c.children = *s.children.Copy()
	c.leaseMounts = *s.leaseMounts.Copy()
	c.leaseTokens = *s.leaseTokens.Copy()
	c.expiry = *s.expiry.Copy()
	return &c
}

// key joins parts that cannot hold a zero byte (validated where they enter); the last may hold anything.
func key(parts ...string) string { return strings.Join(parts, "\x00") }

// seqKey orders by number first.
func seqKey(n uint64, id string) string {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], n)
	return string(b[:]) + id
}

// scanPrefix calls fn for every row whose key begins with prefix, in key order, until fn returns false. fn must not
// change the table.
func scanPrefix[V any](t *table[V], prefix string, fn func(key string, value V) bool) {
	t.Ascend(prefix, func(k string, v V) bool {
		return strings.HasPrefix(k, prefix) && fn(k, v)
	})
}

func get[V any](t *table[V], k string) V {
	v, _ := t.Get(k)
	return v
}

func (s *state) putNode(n *commandv1.Node) {
	if old := get(&s.nodes, n.GetId()); old != nil && get(&s.nodeNames, old.GetName()) == n.GetId() {
		s.nodeNames.Delete(old.GetName())
	}
	s.nodes.Set(n.GetId(), n)
	s.nodeNames.Set(n.GetName(), n.GetId())
}

func (s *state) deleteNode(n *commandv1.Node) {
	s.nodes.Delete(n.GetId())
	if get(&s.nodeNames, n.GetName()) == n.GetId() {
		s.nodeNames.Delete(n.GetName())
	}
}

func pluginKey(kind, name, version string) string { return key(kind, name, version) }

func pathKey(m *commandv1.Mount) string { return key(m.GetNamespace(), m.GetTable(), m.GetPath()) }

func (s *state) putMount(m *commandv1.Mount) {
	if old := get(&s.mounts, m.GetUuid()); old != nil && get(&s.paths, pathKey(old)) == m.GetUuid() {
		s.paths.Delete(pathKey(old))
	}
	s.mounts.Set(m.GetUuid(), m)
	if m.GetParentUuid() != "" {
		s.connections.Set(key(m.GetParentUuid(), m.GetConnection()), m.GetUuid())
		return
	}
	s.paths.Set(pathKey(m), m.GetUuid())
}

func (s *state) deleteMount(m *commandv1.Mount) {
	s.mounts.Delete(m.GetUuid())
	if k := key(m.GetParentUuid(), m.GetConnection()); m.GetParentUuid() != "" && get(&s.connections, k) == m.GetUuid() {
		s.connections.Delete(k)
	}
	if get(&s.paths, pathKey(m)) == m.GetUuid() {
		s.paths.Delete(pathKey(m))
	}
}

// terminal reports whether nothing but late reports will change a reload any more.
func terminal(p commandv1.Phase) bool {
	switch p {
	case commandv1.Phase_PHASE_DONE, commandv1.Phase_PHASE_ABORTED, commandv1.Phase_PHASE_ROLLED_BACK:
		return true
	default:
		return false
	}
}

// holds reports whether a reload in this phase keeps others from its targets.
func holds(p commandv1.Phase) bool {
	return p == commandv1.Phase_PHASE_PREPARING || p == commandv1.Phase_PHASE_COMMITTED
}

func (s *state) putReload(r *commandv1.Reload) {
	seq := seqKey(r.GetStartIndex(), r.GetId())
	s.reloads.Set(r.GetId(), r)
	s.reloadSeq.Set(seq, r.GetId())
	if holds(r.GetPhase()) || r.GetPhase() == commandv1.Phase_PHASE_QUEUED {
		s.open.Set(seq, r.GetId())
	} else {
		s.open.Delete(seq)
	}
	for _, t := range r.GetTargets() {
		owner := get(&s.active, t.GetMountUuid())
		if holds(r.GetPhase()) && !t.GetUnmounted() {
			s.active.Set(t.GetMountUuid(), r.GetId())
		} else if owner == r.GetId() {
			s.active.Delete(t.GetMountUuid())
		}
	}
}

func (s *state) deleteReload(r *commandv1.Reload) {
	seq := seqKey(r.GetStartIndex(), r.GetId())
	s.reloads.Delete(r.GetId())
	s.reloadSeq.Delete(seq)
	s.open.Delete(seq)
	for _, t := range r.GetTargets() {
		if get(&s.active, t.GetMountUuid()) == r.GetId() {
			s.active.Delete(t.GetMountUuid())
		}
	}
}

func (s *state) putReloadID(row *commandv1.ReloadID) {
	s.reloadIDs.Set(row.GetId(), row)
	s.idSeq.Set(seqKey(row.GetIndex(), row.GetId()), row.GetId())
}

func (s *state) deleteReloadID(row *commandv1.ReloadID) {
	s.reloadIDs.Delete(row.GetId())
	s.idSeq.Delete(seqKey(row.GetIndex(), row.GetId()))
}

// findReload resolves aliases; nil when there is no detailed record.
func (s *state) findReload(id string) *commandv1.Reload {
	if r := get(&s.reloads, id); r != nil {
		return r
	}
	if row := get(&s.reloadIDs, id); row.GetFirstId() != "" {
		return get(&s.reloads, row.GetFirstId())
	}
	return nil
}

func (s *state) putToken(t *commandv1.Token) {
	s.deleteToken(get(&s.tokens, string(t.GetHash())))
	h := string(t.GetHash())
	s.tokens.Set(h, t)
	s.accessors.Set(t.GetAccessor(), h)
	if len(t.GetParent()) > 0 {
		s.children.Set(string(t.GetParent())+h, h)
	}
	if at := t.GetExpiresClockNs(); at > 0 {
		s.expiry.Set(seqKey(at, "t"+h), h)
	}
}

func (s *state) deleteToken(t *commandv1.Token) {
	if t == nil {
		return
	}
	h := string(t.GetHash())
	s.tokens.Delete(h)
	if get(&s.accessors, t.GetAccessor()) == h {
		s.accessors.Delete(t.GetAccessor())
	}
	s.children.Delete(string(t.GetParent()) + h)
	s.expiry.Delete(seqKey(t.GetExpiresClockNs(), "t"+h))
}

func (s *state) putLease(l *commandv1.Lease) {
	s.deleteLease(get(&s.leases, l.GetId()))
	s.leases.Set(l.GetId(), l)
	s.leaseMounts.Set(key(l.GetMountUuid(), l.GetId()), l.GetId())
	if len(l.GetTokenHash()) > 0 {
		s.leaseTokens.Set(string(l.GetTokenHash())+l.GetId(), l.GetId())
	}
	if at := l.GetExpiresClockNs(); at > 0 {
		s.expiry.Set(seqKey(at, "l"+l.GetId()), l.GetId())
	}
}

func (s *state) deleteLease(l *commandv1.Lease) {
	if l == nil {
		return
	}
	s.leases.Delete(l.GetId())
	s.leaseMounts.Delete(key(l.GetMountUuid(), l.GetId()))
	s.leaseTokens.Delete(string(l.GetTokenHash()) + l.GetId())
	s.expiry.Delete(seqKey(l.GetExpiresClockNs(), "l"+l.GetId()))
}

// clone copies a record before it is changed.
func clone[M proto.Message](m M) M { return proto.CloneOf(m) }
