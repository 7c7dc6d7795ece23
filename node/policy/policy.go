// Package policy decides who a token is and what it may do: a pure function of a state view and a request.
package policy

import (
	"encoding/json"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"rollcall/fsm"
	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// The policies that are always there. Root allows everything and cannot be changed; Default is given to every token
// unless it is left out, and may be replaced by an own text.
const (
	Root    = "root"
	Default = "default"
)

// Capability is what a policy grants on a path.
type Capability string

// The capabilities of Vault's policy language.
const (
	Create Capability = "create"
	Read   Capability = "read"
	Update Capability = "update"
	Delete Capability = "delete"
	List   Capability = "list"
	Patch  Capability = "patch"
	Sudo   Capability = "sudo"
	Deny   Capability = "deny"
	// Help is no capability of the language: everybody with a token may ask for help.
	Help Capability = "help"
)

// Identity is an authenticated caller.
type Identity struct {
	Token *commandv1.Token
	// Hash is the token's hash: what plugins see in its place, and what the state knows it by.
	Hash []byte
}

// IsRoot reports whether the root policy is among the token's.
func (i *Identity) IsRoot() bool { return slices.Contains(i.Token.GetPolicies(), Root) }

// Names are the policies that hold for the identity, as they stand in the token's namespace.
func (i *Identity) Names() []string { return i.Token.GetPolicies() }

// ErrDenied is the one answer to a missing, unknown, expired or revoked token: none of them may be told apart.
var ErrDenied = fault.Text(fault.Denied, "permission denied")

// ErrRefused is the answer to a known token whose policies do not allow the call.
var ErrRefused = &fault.Error{Kind: fault.Denied, Text: "1 error occurred:\n\t* permission denied\n\n"}

// Authenticate finds the token's identity in a view. now is the log's clock as the caller reckons it, never less than the
// view's; remote is the client's "host:port". Any goroutine. The error is ErrDenied.
func Authenticate(view *fsm.View, token string, now uint64, remote string) (*Identity, error) {
	if token == "" {
		return nil, ErrDenied
	}
	hash := view.HashToken(token)
	row := view.TokenByHash(hash)
	if row == nil || Expired(row, max(now, view.ClockNS())) || row.GetNumUses() < 0 || len(row.GetWrapped()) > 0 {
		return nil, ErrDenied
	}
	if !bound(row.GetBoundCidrs(), remote) {
		return nil, ErrDenied
	}
	return &Identity{Token: row, Hash: hash}, nil
}

// Expired reports whether a token's time is over at a clock value.
func Expired(t *commandv1.Token, now uint64) bool {
	return t.GetExpiresClockNs() != 0 && now >= t.GetExpiresClockNs()
}

// bound reports whether a client's address is one that the token is good from.
func bound(cidrs []string, remote string) bool {
	if len(cidrs) == 0 {
		return true
	}
	host, _, err := net.SplitHostPort(remote)
	if err != nil {
		host = remote
	}
	addr, err := netip.ParseAddr(host)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(cidrs, func(c string) bool {
		p, err := ParseCIDR(c)
		return err == nil && p.Contains(addr.Unmap().WithZone(""))
	})
}

// ParseCIDR reads a network, or a single address as a network of one.
func ParseCIDR(s string) (netip.Prefix, error) {
	if p, err := netip.ParsePrefix(s); err == nil {
		return p.Masked(), nil
	}
	a, err := netip.ParseAddr(s)
	if err != nil {
		return netip.Prefix{}, fault.Text(fault.Invalid, "%q is neither an address nor a network such as 10.0.0.0/8", s)
	}
	return netip.PrefixFrom(a, a.BitLen()), nil
}

// Canonical is the one spelling of a policy's name: without white space around it, in lower case. Every name is brought
// to it where it enters, so that nothing but "root" is ever Root.
func Canonical(name string) string { return strings.ToLower(strings.TrimSpace(name)) }

// CanonicalList brings names to their one spelling, sorted, each once, without empty ones.
func CanonicalList(names []string) []string {
	out := []string{}
	for _, n := range names {
		if n = Canonical(n); n != "" {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// Query is one call to decide about.
type Query struct {
	// Namespace is "" for root, else with a trailing slash. Path is canonical, and the same one that is routed by.
	Namespace, Path string
	Need            Capability
	// Data gives the call's parameters, for policies that name some: it is called only then. nil for none.
	Data func() map[string]json.RawMessage
	// WrapTTL is how long the caller asked its answer to be wrapped for; 0 for not at all.
	WrapTTL time.Duration
}

// reaches reports whether a token of one namespace may act in another: in its own, and in those inside it.
func reaches(token *commandv1.Token, namespace string) bool {
	return strings.HasPrefix(namespace, token.GetNamespace())
}

// Allow reports whether the identity may do what the query asks: nil, or ErrRefused (ErrDenied where its token has no place
// in the namespace). Any goroutine.
func (e *Engine) Allow(view *fsm.View, who *Identity, q Query) error {
	switch {
	case !reaches(who.Token, q.Namespace):
		return ErrDenied
	case who.IsRoot(), q.Need == Help:
		return nil
	}
	rules := e.rules(view, who.Token.GetNamespace(), who.Names())
	if !decide(rules, q) {
		return ErrRefused
	}
	return nil
}

// Sudo reports whether the identity has the sudo capability on a path.
func (e *Engine) Sudo(view *fsm.View, who *Identity, namespace, path string) bool {
	return e.Allow(view, who, Query{Namespace: namespace, Path: path, Need: Sudo}) == nil
}

// Capabilities lists what the named policies of a namespace grant on a path of a namespace, in the contract's order:
// ["root"], ["deny"], or what there is.
func (e *Engine) Capabilities(view *fsm.View, tokenNamespace string, names []string, namespace, path string) []string {
	if !strings.HasPrefix(namespace, tokenNamespace) {
		return []string{string(Deny)}
	}
	if slices.Contains(names, Root) {
		return []string{Root}
	}
	p := best(e.rules(view, tokenNamespace, names), namespace+path, strings.HasSuffix(path, "/"))
	if p == nil || p.caps[Deny] || len(p.caps) == 0 {
		return []string{string(Deny)}
	}
	var out []string
	for c := range p.caps {
		out = append(out, string(c))
	}
	slices.Sort(out)
	return out
}

// Denied reports whether a rule denies a path in so many words. It is for paths that are another name of the one that was
// decided about: what is not granted there may be granted here, but what is denied there is denied.
func (e *Engine) Denied(view *fsm.View, who *Identity, namespace, path string) bool {
	if who.IsRoot() {
		return false
	}
	p := best(e.rules(view, who.Token.GetNamespace(), who.Names()), namespace+path, false)
	return p != nil && p.caps[Deny]
}

// Sees reports whether the identity has any business with a mount: some rule that does not deny reaches its path or below.
// It decides what is listed, never what may be done.
func (e *Engine) Sees(view *fsm.View, who *Identity, namespace, mount string) bool {
	if !reaches(who.Token, namespace) {
		return false
	}
	if who.IsRoot() {
		return true
	}
	full := namespace + mount
	return slices.ContainsFunc(e.rules(view, who.Token.GetNamespace(), who.Names()), func(r scoped) bool {
		if len(r.Capabilities) == 0 || slices.Contains(r.Capabilities, Deny) {
			return false
		}
		literal := r.namespace + r.pattern.text[:r.pattern.first]
		return strings.HasPrefix(literal, full) || r.pattern.first < len(r.pattern.text) && strings.HasPrefix(full, literal)
	})
}
