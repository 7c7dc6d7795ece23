package fsm

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// HashToken is how a token stands in the state: HMAC-SHA-256 under the cluster's id, so that equal tokens of two clusters
// differ and nothing in a snapshot opens a door. Tokens are random and long; no slower hash is needed.
func HashToken(clusterID, token string) []byte {
	h := hmac.New(sha256.New, []byte(clusterID))
	h.Write([]byte(token))
	return h.Sum(nil)
}

func (e *entry) dispatchAccess(cmd *commandv1.Command) error {
	switch b := cmd.GetBody().(type) {
	case *commandv1.Command_PutToken:
		return e.enterToken(b.PutToken)
	case *commandv1.Command_UseToken:
		return e.useToken(b.UseToken.GetHash())
	case *commandv1.Command_RevokeToken:
		return e.revokeToken(b.RevokeToken)
	case *commandv1.Command_PutPolicy:
		return e.putPolicy(b.PutPolicy.GetPolicy())
	case *commandv1.Command_DeletePolicy:
		return e.deletePolicy(b.DeletePolicy)
	case *commandv1.Command_PutNamespace:
		return e.putNamespace(b.PutNamespace.GetNamespace())
	case *commandv1.Command_DeleteNamespace:
		return e.deleteNamespace(b.DeleteNamespace.GetPath())
	case *commandv1.Command_PutLease:
		return e.enterLease(b.PutLease)
	case *commandv1.Command_RevokeLeases:
		return e.revokeLeases(b.RevokeLeases)
	case *commandv1.Command_RemoveLease:
		return e.removeLease(b.RemoveLease.GetId())
	default:
		return invalid("unknown command: this version does not know what the entry asks for")
	}
}

// auditSaltSize is that of the hash it goes into.
const auditSaltSize = sha256.Size

// setAuditSalt enters the salt of audit records, once.
func (e *entry) setAuditSalt(c *commandv1.SetAuditSalt) error {
	switch {
	case len(c.GetSalt()) < auditSaltSize || len(c.GetSalt()) > maxName:
		return invalid("the salt of audit records has at least %d bytes", auditSaltSize)
	case e.auditSalt != "":
		e.res.Repeated = true
		return nil
	}
	e.auditSalt = string(c.GetSalt())
	return nil
}

func checkToken(t *commandv1.Token) error {
	switch {
	case len(t.GetHash()) != sha256.Size:
		return invalid("a token's hash has %d bytes", sha256.Size)
	case len(t.GetParent()) != 0 && len(t.GetParent()) != sha256.Size:
		return invalid("a parent token's hash has %d bytes", sha256.Size)
	case t.GetAccessor() == "" || !plain(t.GetAccessor(), maxName):
		return invalid("a token needs an accessor")
	case len(t.GetPolicies()) > maxList || len(t.GetMeta()) > maxList:
		return invalid("a token has at most %d policies and metadata values", maxList)
	case len(t.GetWrapped()) > maxSecret || len(t.GetAuth()) > maxSecret || len(t.GetBoundCidrs()) > maxList:
		return fault.Text(fault.TooLarge, "what a token carries has at most %d bytes", maxSecret)
	case !plain(t.GetDisplayName(), maxText) || !plain(t.GetPath(), maxText) || !plain(t.GetEntityId(), maxName):
		return invalid("a token's names hold control characters or are too long")
	}
	return nil
}

// expiresAt is the end of a time to live that begins now, held under a total cap from the beginning. 0 is never.
func expiresAt(now, ttl, from, cap uint64) uint64 {
	at := uint64(0)
	if ttl > 0 {
		at = now + ttl
		if at < now {
			at = 0
		}
	}
	if cap > 0 {
		end := from + cap
		if end >= from && (at == 0 || end < at) {
			at = end
		}
	}
	return at
}

// enterToken makes or replaces a token. The log's clock is known here alone, so created and expires are filled in here:
// a new token expires its ttl from now; one that exists is renewed when it comes with expires 0, and else keeps the
// expiry it had (num_uses counted down, say).
func (e *entry) enterToken(c *commandv1.PutToken) error {
	t := c.GetToken()
	if c.GetMustExist() {
		return e.renewToken(c)
	}
	if err := checkToken(t); err != nil {
		return err
	}
	if !e.hasNamespace(t.GetNamespace()) {
		return fault.Text(fault.NotFound, "namespace not found")
	}
	h := string(t.GetHash())
	old := get(&e.tokens, h)
	if owner := get(&e.accessors, t.GetAccessor()); owner != "" && owner != h {
		return fault.Text(fault.Conflict, "a token with this accessor exists")
	}
	if old == nil && len(t.GetParent()) > 0 && get(&e.tokens, string(t.GetParent())) == nil {
		return fault.Text(fault.Denied, "the parent token is gone")
	}
	t = clone(t)
	if old == nil {
		t.CreatedClockNs, t.CreatedWallMs = e.clock, e.wallMS
		t.ExpiresClockNs = expiresAt(e.clock, t.GetTtlNs(), e.clock, t.GetExplicitMaxTtlNs())
	} else {
		t.CreatedClockNs, t.CreatedWallMs, t.Parent = old.GetCreatedClockNs(), old.GetCreatedWallMs(), old.GetParent()
		if t.GetExpiresClockNs() == 0 {
			t.ExpiresClockNs = expiresAt(e.clock, t.GetTtlNs(), t.GetCreatedClockNs(), t.GetExplicitMaxTtlNs())
		} else {
			t.ExpiresClockNs = old.GetExpiresClockNs()
		}
	}
	e.putToken(t)
	e.res.Id = t.GetAccessor()
	return nil
}

// renewToken moves a token's expiry under its cap.
func (e *entry) renewToken(c *commandv1.PutToken) error {
	h := string(c.GetToken().GetHash())
	if !e.tokenLives(h) || len(c.GetToken().GetAuth()) > maxSecret {
		return fault.Text(fault.Denied, "the token is gone")
	}
	t := clone(get(&e.tokens, h))
	t.ExpiresClockNs = expiresAt(e.clock, c.GetTtlNs(), t.GetCreatedClockNs(), t.GetExplicitMaxTtlNs())
	if len(c.GetToken().GetAuth()) > 0 {
		t.Auth = c.GetToken().GetAuth()
	}
	e.putToken(t)
	e.res.Id = t.GetAccessor()
	return nil
}

// tokenLives reports whether a token exists and has not expired on the log's clock.
func (e *entry) tokenLives(h string) bool {
	t := get(&e.tokens, h)
	return t != nil && (t.GetExpiresClockNs() == 0 || t.GetExpiresClockNs() > e.clock)
}

// useToken counts a use. The last one leaves the token there, used up, for the caller to revoke once it is done.
func (e *entry) useToken(hash []byte) error {
	h := string(hash)
	t := get(&e.tokens, h)
	switch {
	case !e.tokenLives(h) || t.GetNumUses() < 0:
		return fault.Text(fault.Denied, "permission denied")
	case t.GetNumUses() == 0:
		return nil
	}
	t = clone(t)
	if t.NumUses--; t.NumUses == 0 {
		t.NumUses = -1
	}
	e.putToken(t)
	e.res.Id = t.GetAccessor()
	return nil
}

// revokeToken removes a token with everything that descends from it, or leaves its children as orphans. What they leased
// is due at once: the plugin must be told, so the leases go with a RemoveLease each.
func (e *entry) revokeToken(c *commandv1.RevokeToken) error {
	h := string(c.GetHash())
	if h == "" {
		h = get(&e.accessors, c.GetAccessor())
	}
	if get(&e.tokens, h) == nil || c.GetOnlyExpired() && e.tokenLives(h) {
		e.res.Repeated = true
		return nil
	}
	if c.GetOrphanChildren() {
		for _, k := range e.childrenOf(h) {
			t := clone(get(&e.tokens, k))
			t.Parent = nil
			e.putToken(t)
		}
	}
	todo := []string{h}
	for len(todo) > 0 {
		h, todo = todo[len(todo)-1], todo[:len(todo)-1]
		todo = append(todo, e.childrenOf(h)...)
		e.deleteToken(get(&e.tokens, h))
		e.endLeases(h)
	}
	return nil
}

func (e *entry) childrenOf(h string) []string {
	var out []string
	scanPrefix(&e.children, h, func(_, child string) bool {
		out = append(out, child)
		return true
	})
	return slices.DeleteFunc(out, func(c string) bool { return get(&e.tokens, c) == nil })
}

func (e *entry) putPolicy(p *commandv1.Policy) error {
	switch {
	case p.GetName() == "" || !plain(p.GetName(), maxName):
		return invalid("a policy needs a name")
	case p.GetName() == "root":
		return invalid("cannot update %q policy", p.GetName())
	case len(p.GetText()) > maxPolicy:
		return fault.Text(fault.TooLarge, "a policy has at most %d bytes", maxPolicy)
	case !e.hasNamespace(p.GetNamespace()):
		return fault.Text(fault.NotFound, "namespace not found")
	}
	p = clone(p)
	p.Index = e.index
	e.policies.Set(key(p.GetNamespace(), p.GetName()), p)
	return nil
}

func (e *entry) deletePolicy(c *commandv1.DeletePolicy) error {
	if c.GetName() == "root" || c.GetName() == "default" {
		return invalid("cannot delete %q policy", c.GetName())
	}
	if _, ok := e.policies.Delete(key(c.GetNamespace(), c.GetName())); !ok {
		e.res.Repeated = true
	}
	return nil
}

func (s *state) hasNamespace(path string) bool {
	return path == "" || get(&s.namespaces, path) != nil
}

var reservedNamespaces = []string{"root/", "audit/", "auth/", "cubbyhole/", "identity/", "sys/"}

// putNamespace makes a namespace inside one that exists, or replaces its metadata.
func (e *entry) putNamespace(n *commandv1.Namespace) error {
	p := n.GetPath()
	if len(n.GetCustomMetadata()) > maxList {
		return invalid("a namespace has at most %d metadata values", maxList)
	}
	if old := get(&e.namespaces, p); old != nil {
		c := clone(old)
		c.CustomMetadata, c.Index = n.GetCustomMetadata(), e.index
		e.namespaces.Set(p, c)
		e.res.Id, e.res.Repeated = c.GetUuid(), true
		return nil
	}
	if !strings.HasSuffix(p, "/") || !plain(p, maxName) || dotted(p) || n.GetUuid() == "" || !plain(n.GetUuid(), maxName) {
		return invalid("a namespace needs a uuid and a path that ends in a slash, not %q", trim(p, maxName))
	}
	cut := strings.LastIndexByte(p[:len(p)-1], '/') + 1
	parent, name := p[:cut], p[cut:]
	if !e.hasNamespace(parent) {
		return invalid("parent namespace %q does not exist", parent)
	}
	if slices.Contains(reservedNamespaces, name) {
		return invalid("%q is a reserved path and cannot be used as a namespace name", name)
	}
	var err error
	scanPrefix(&e.paths, key(parent, typeSecret, name), func(k, _ string) bool {
		err = invalid("path is already in use at %s", strings.TrimPrefix(k, key(parent, typeSecret, "")))
		return false
	})
	if err != nil {
		return err
	}
	n = clone(n)
	n.Index = e.index
	e.namespaces.Set(p, n)
	e.res.Id = n.GetUuid()
	return nil
}

// deleteNamespace refuses while namespaces or mounts are inside, and takes its policies and tokens with it.
func (e *entry) deleteNamespace(p string) error {
	n := get(&e.namespaces, p)
	if n == nil {
		e.res.Repeated = true
		return nil
	}
	var err error
	scanPrefix(&e.namespaces, p, func(k string, _ *commandv1.Namespace) bool {
		if k != p {
			err = invalid("cannot delete namespace %q: namespace %q is inside it", p, k)
		}
		return err == nil
	})
	scanPrefix(&e.paths, key(p, ""), func(k, _ string) bool {
		err = invalid("cannot delete namespace %q: it has mounts (%s)", p,
			strings.ReplaceAll(strings.TrimPrefix(k, key(p, "")), "\x00", " "))
		return false
	})
	if err != nil {
		return err
	}
	var policies []string
	scanPrefix(&e.policies, key(p, ""), func(k string, _ *commandv1.Policy) bool {
		policies = append(policies, k)
		return true
	})
	for _, k := range policies {
		e.policies.Delete(k)
	}
	var tokens [][]byte
	e.tokens.Scan(func(_ string, t *commandv1.Token) bool {
		if t.GetNamespace() == p {
			tokens = append(tokens, t.GetHash())
		}
		return true
	})
	for _, h := range tokens {
		if err := e.revokeToken(&commandv1.RevokeToken{Hash: h}); err != nil {
			return err
		}
	}
	e.namespaces.Delete(p)
	e.res.Id, e.res.Repeated = n.GetUuid(), false
	return nil
}

// NewCluster makes a cluster's first command, for a node that founds one: with the hash of the root token, and an accessor
// made of it, which tells nothing of the token.
func NewCluster(clusterID, name, rootToken string) *commandv1.InitCluster {
	h := HashToken(clusterID, rootToken)
	a := sha256.Sum256(append([]byte("accessor"), h...))
	return &commandv1.InitCluster{
		ClusterId: clusterID, ClusterName: name, RootTokenHash: h, RootTokenAccessor: hex.EncodeToString(a[:12]),
	}
}
