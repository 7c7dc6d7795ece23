package httpd

import (
	"context"
	"crypto/rand"
	"slices"
	"strings"
	"time"

	"rollcall/node/api"
	"rollcall/node/fault"
	"rollcall/node/policy"
	commandv1 "rollcall/proto/command/v1"
)

func (s *Server) tokenRoutes() []*route {
	update := func(h handler) map[operation]handler { return map[operation]handler{opUpdate: h} }
	both := func(h handler) map[operation]handler { return map[operation]handler{opRead: h, opUpdate: h} }
	return []*route{
		{pattern: "auth/token/create", ops: update(s.createToken), summary: "Make a child of the caller's token, or an orphan."},
		{
			pattern: "auth/token/create/{role}", ops: update(s.noRole),
			refused: "400 unknown role: token roles are not kept; name policies, ttl and period in the call",
			summary: "Make a token of a role.",
		},
		{pattern: "auth/token/create-orphan", access: withSudo, ops: update(s.createOrphan), summary: "Make a token without a parent."},
		{pattern: "auth/token/lookup-self", ops: both(s.lookupSelf), summary: "What the caller's token is and may do."},
		{pattern: "auth/token/lookup", ops: both(s.lookupToken), summary: "What a token is and may do."},
		{pattern: "auth/token/lookup-accessor", ops: update(s.lookupAccessor), summary: "What the token of an accessor is and may do."},
		{pattern: "auth/token/renew-self", ops: update(s.renewSelf), summary: "Give the caller's token more time."},
		{pattern: "auth/token/renew", ops: update(s.renewByToken), summary: "Give a token more time."},
		{pattern: "auth/token/renew-accessor", ops: update(s.renewByAccessor), summary: "Give the token of an accessor more time."},
		{pattern: "auth/token/revoke-self", ops: update(s.revokeSelf), summary: "End the caller's token and its children."},
		{pattern: "auth/token/revoke", ops: update(s.revokeByToken), summary: "End a token and its children."},
		{pattern: "auth/token/revoke-accessor", ops: update(s.revokeByAccessor), summary: "End the token of an accessor and its children."},
		{
			pattern: "auth/token/revoke-orphan", access: withSudo, ops: update(s.revokeOrphan),
			summary: "End a token, and leave its children as orphans.",
		},
		{
			pattern: "auth/token/accessors", access: withSudo, ops: map[operation]handler{opList: s.listAccessors},
			summary: "The accessors of the namespace's tokens.",
		},
		{
			pattern: "auth/token/roles", ops: map[operation]handler{opList: func(*request) (*reply, error) { return nil, nil }},
			summary: "Token roles: there are none.",
		},
		{pattern: "auth/token/tidy", access: withSudo, ops: update(s.tidyTokens), summary: "Nothing is ever left over, and the answer says so."},
	}
}

func (s *Server) noRole(q *request) (*reply, error) {
	return nil, fault.Text(fault.Invalid, "unknown role %s: token roles are not kept; name policies, ttl and period in the call", q.params["role"])
}

func (s *Server) tidyTokens(*request) (*reply, error) {
	return &reply{warnings: []string{"Tokens, accessors and leases are removed together in one entry of the log: nothing is left over to tidy."}}, nil
}

// reservedPolicy are names that this server gives out itself.
func reservedPolicy(name string) bool { return name == "response-wrapping" || name == "control-group" }

// prefixToken tells a token of ours from other words, for people and for scanners of secrets.
const prefixToken = "rcs."

// enterToken makes the token of a row: its secret, its hash and its accessor.
func (s *Server) enterToken(ctx context.Context, q *request, row *commandv1.Token) (string, error) {
	token := prefixToken + rand.Text()
	return token, s.enterTokenAs(ctx, q, token, row)
}

func (s *Server) enterTokenAs(ctx context.Context, q *request, token string, row *commandv1.Token) error {
	row.Hash, row.Accessor = q.view.HashToken(token), strings.ToLower(rand.Text())
	_, err := s.Replica.Propose(ctx, &commandv1.Command{
		WallMs: wall(), RequestId: q.id, ByToken: q.by(),
		Body: &commandv1.Command_PutToken{PutToken: &commandv1.PutToken{Token: row}},
	})
	return err
}

// authOf is a new token as its maker learns it: the only time that the token itself is told.
func authOf(token string, row *commandv1.Token, ttl time.Duration) *api.Auth {
	return &api.Auth{
		ClientToken: token, Accessor: row.GetAccessor(), Policies: row.GetPolicies(), TokenPolicies: row.GetPolicies(),
		Metadata: row.GetMeta(), LeaseDuration: int64(ttl.Round(time.Second) / time.Second), Renewable: row.GetRenewable(),
		EntityID: row.GetEntityId(), TokenType: "service", Orphan: len(row.GetParent()) == 0, NumUses: row.GetNumUses(),
	}
}

func (s *Server) createToken(q *request) (*reply, error) { return s.newToken(q, false) }

func (s *Server) createOrphan(q *request) (*reply, error) { return s.newToken(q, true) }

// newToken validates in Vault's order and with its texts.
func (s *Server) newToken(q *request, orphan bool) (*reply, error) {
	b, parent := q.body, q.who.Token
	sudo := s.Policies.Sudo(q.view, q.who, q.ns, q.path)
	id, kind := b.str("id"), b.str("type")
	row := &commandv1.Token{
		Namespace: q.ns, Path: q.path, Type: "service", Meta: b.strMap("meta"), NumUses: b.number("num_uses"),
		Renewable: !b.has("renewable") || b.boolean("renewable"), DisplayName: "token",
	}
	if d := b.str("display_name"); d != "" {
		row.DisplayName = "token-" + plainName(d)
	}
	noParent := b.boolean("no_parent")
	if alias := b.str("entity_alias"); alias != "" {
		return nil, fault.Text(fault.Invalid, "'entity_alias' is only allowed in combination with token role")
	}
	if b.err != nil {
		return nil, b.err
	}
	switch {
	case parent.GetNumUses() > 0:
		return nil, fault.Text(fault.Invalid, "restricted use token cannot generate child tokens")
	case kind != "" && kind != "service" && kind != "default" && kind != "default-service":
		return nil, fault.Text(fault.Invalid, "token type %q is not supported: every token is a service token", kind)
	case id != "" && !sudo:
		return nil, fault.Text(fault.Invalid, "root or sudo privileges required to specify token id")
	case strings.ContainsAny(id, ". \t\r\n/"):
		return nil, fault.Text(fault.Invalid, "custom token ID cannot have the '.', '/' or white space characters")
	case row.GetNumUses() < 0:
		return nil, fault.Text(fault.Invalid, "number of uses cannot be negative")
	case noParent && !sudo:
		return nil, fault.Text(fault.Invalid, "root or sudo privileges required to create orphan token")
	}
	var err error
	if row.Policies, err = s.childPolicies(q, sudo); err != nil {
		return nil, err
	}
	if !orphan && !noParent {
		row.Parent = q.who.Hash
	}
	warnings, err := s.childTTL(q, row, sudo)
	if err != nil {
		return nil, err
	}
	var token string
	if id == "" {
		token, err = s.enterToken(q.ctx, q, row)
	} else {
		token = id
		if q.view.TokenByHash(q.view.HashToken(id)) != nil {
			return nil, fault.Text(fault.Invalid, "cannot create a token with a duplicate ID")
		}
		err = s.enterTokenAs(q.ctx, q, id, row)
	}
	if err != nil {
		return nil, err
	}
	return &reply{auth: authOf(token, row, time.Duration(row.GetTtlNs())), warnings: warnings}, nil
}

// plainName keeps what a name may hold.
func plainName(s string) string {
	return strings.Trim(strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return '-'
		}
		return r
	}, s), "-")
}

// childPolicies are the policies of a new token: a part of the parent's, unless the parent has sudo here.
func (s *Server) childPolicies(q *request, sudo bool) ([]string, error) {
	parent := q.who.Token
	names := policy.CanonicalList(q.body.strs("policies"))
	noDefault := q.body.boolean("no_default_policy")
	if q.body.err != nil {
		return nil, q.body.err
	}
	same := parent.GetNamespace() == q.ns // a policy's name means nothing in another namespace
	inherits := len(names) == 0
	if inherits && (same || q.who.IsRoot()) {
		names = slices.Clone(parent.GetPolicies())
	}
	if i := slices.IndexFunc(names, reservedPolicy); i >= 0 {
		return nil, fault.Text(fault.Invalid, "cannot assign policy %q", names[i])
	}
	if slices.Contains(names, policy.Root) && !q.who.IsRoot() {
		return nil, fault.Text(fault.Invalid, "root tokens may not be created without parent token being root")
	}
	if !sudo {
		for _, n := range names {
			if n != policy.Default && (!same || !slices.Contains(parent.GetPolicies(), n)) {
				return nil, fault.Text(fault.Invalid, "child policies must be subset of parent")
			}
		}
	}
	if noDefault {
		names = slices.DeleteFunc(names, func(n string) bool { return n == policy.Default })
	} else if !slices.Contains(names, policy.Root) {
		mayDefault := sudo || !same || slices.Contains(parent.GetPolicies(), policy.Default) || q.who.IsRoot()
		if mayDefault {
			names = append(names, policy.Default)
		}
	}
	return policy.CanonicalList(names), nil
}

// childTTL fills in how long a new token lives.
func (s *Server) childTTL(q *request, row *commandv1.Token, sudo bool) (warnings []string, err error) {
	b := q.body
	ttl, period, explicit := b.duration("ttl"), b.duration("period"), b.duration("explicit_max_ttl")
	if old := b.duration("lease"); ttl == 0 {
		ttl = old
	}
	if b.err != nil {
		return nil, b.err
	}
	root := slices.Contains(row.GetPolicies(), policy.Root)
	switch {
	case period > 0 && !sudo:
		return nil, fault.Text(fault.Invalid, "root or sudo privileges required to create periodic token")
	case period > 0:
		ttl = min(period, systemTTL)
		row.PeriodNs = uint64(ttl)
	case root && ttl == 0 && explicit == 0:
		if q.who.Token.GetExpiresClockNs() != 0 {
			return nil, fault.Text(fault.Invalid, "expiring root tokens cannot create non-expiring root tokens")
		}
		row.Renewable = false
		return nil, nil
	case ttl == 0:
		ttl = systemTTL
	}
	if explicit > systemTTL && period == 0 {
		warnings = append(warnings, "Explicit max TTL of \""+explicit.String()+"\" is greater than system/mount allowed value; value is being capped to \""+systemTTL.String()+"\"")
		explicit = systemTTL
	}
	if ttl > systemTTL {
		warnings = append(warnings, "TTL of \""+ttl.String()+"\" exceeded the effective max_ttl of \""+systemTTL.String()+"\"; TTL value is capped accordingly")
		ttl = systemTTL
	}
	if explicit > 0 && ttl > explicit {
		warnings = append(warnings, "Requested TTL of \""+ttl.String()+"\" higher than explicit max TTL; value being capped to \""+explicit.String()+"\"")
		ttl = explicit
	}
	row.TtlNs, row.ExplicitMaxTtlNs = uint64(ttl), uint64(explicit)
	return warnings, nil
}

// within reports whether a call in the request's namespace may see a token: one of it, or of those inside.
func within(q *request, row *commandv1.Token) bool {
	return row != nil && strings.HasPrefix(row.GetNamespace(), q.ns)
}

// named finds the token that a body names by itself. It says nothing about why there is none.
func (s *Server) named(q *request) (row *commandv1.Token, token string, err error) {
	token = q.body.str("token")
	if q.body.err != nil {
		return nil, "", q.body.err
	}
	if token == "" {
		return nil, "", nil
	}
	row = q.view.TokenByHash(q.view.HashToken(token))
	if !within(q, row) || policy.Expired(row, s.clock.now(q.view)) {
		return nil, token, nil
	}
	return row, token, nil
}

func (s *Server) accessorOf(q *request) (*commandv1.Token, error) {
	accessor := q.body.str("accessor")
	if err := q.body.err; err != nil {
		return nil, err
	}
	if accessor == "" {
		return nil, fault.Text(fault.Invalid, "missing accessor")
	}
	row := q.view.TokenByAccessor(accessor)
	if !within(q, row) || policy.Expired(row, s.clock.now(q.view)) {
		return nil, fault.Text(fault.Denied, "invalid accessor")
	}
	return row, nil
}

func (s *Server) lookupSelf(q *request) (*reply, error) {
	row := q.view.TokenByHash(q.who.Hash) // as it is after this use was counted, where the view is that young
	if now := s.State.View().TokenByHash(q.who.Hash); now != nil {
		row = now
	}
	if row == nil {
		return nil, policy.ErrDenied
	}
	return &reply{data: s.tokenObject(q, row, tokenOf(q.http))}, nil
}

func (s *Server) lookupToken(q *request) (*reply, error) {
	row, token, err := s.named(q)
	switch {
	case err != nil:
		return nil, err
	case token == "":
		return s.lookupSelf(q)
	case row == nil:
		return nil, fault.Text(fault.Denied, "bad token")
	}
	return &reply{data: s.tokenObject(q, row, token)}, nil
}

func (s *Server) lookupAccessor(q *request) (*reply, error) {
	row, err := s.accessorOf(q)
	if err != nil {
		return nil, err
	}
	return &reply{data: s.tokenObject(q, row, "")}, nil
}

// tokenObject is a token as lookups show it; the token itself is known only to who named it.
func (s *Server) tokenObject(q *request, t *commandv1.Token, id string) map[string]any {
	created := time.UnixMilli(t.GetCreatedWallMs()).UTC()
	var ttl int64
	var expires, meta any
	if clock := s.clock.now(q.view); t.GetExpiresClockNs() > clock {
		left := time.Duration(t.GetExpiresClockNs() - clock)
		ttl, expires = int64((left+time.Second-1)/time.Second), time.Now().Add(left).UTC().Format(time.RFC3339)
	}
	if len(t.GetMeta()) > 0 {
		meta = t.GetMeta()
	}
	kind := t.GetType()
	if kind == "" {
		kind = "service"
	}
	seconds := func(ns uint64) int64 { return int64(time.Duration(ns) / time.Second) }
	out := map[string]any{
		"accessor": t.GetAccessor(), "creation_time": created.Unix(), "creation_ttl": seconds(t.GetTtlNs()),
		"display_name": t.GetDisplayName(), "entity_id": t.GetEntityId(), "expire_time": expires,
		"explicit_max_ttl": seconds(t.GetExplicitMaxTtlNs()), "id": id, "meta": meta, "num_uses": t.GetNumUses(),
		"orphan": len(t.GetParent()) == 0, "path": t.GetPath(), "policies": t.GetPolicies(), "ttl": ttl, "type": kind,
	}
	if t.GetNamespace() != "" {
		out["namespace_path"] = t.GetNamespace()
	}
	if t.GetPeriodNs() > 0 {
		out["period"] = seconds(t.GetPeriodNs())
	}
	if len(t.GetBoundCidrs()) > 0 {
		out["bound_cidrs"] = t.GetBoundCidrs()
	}
	if t.GetExpiresClockNs() != 0 {
		out["renewable"], out["issue_time"] = t.GetRenewable(), created.Format(time.RFC3339)
	}
	return out
}

func (s *Server) renewSelf(q *request) (*reply, error) {
	return s.renewToken(q, q.who.Token, tokenOf(q.http))
}

func (s *Server) renewByToken(q *request) (*reply, error) {
	row, token, err := s.named(q)
	switch {
	case err != nil:
		return nil, err
	case token == "":
		return nil, fault.Text(fault.Invalid, "missing token ID")
	case row == nil:
		return nil, fault.Text(fault.Invalid, "token not found")
	}
	return s.renewToken(q, row, token)
}

func (s *Server) renewByAccessor(q *request) (*reply, error) {
	row, err := s.accessorOf(q)
	if err != nil {
		return nil, err
	}
	return s.renewToken(q, row, "")
}

// renewToken moves a token's expiry: by what is asked for, under the caps that it has.
func (s *Server) renewToken(q *request, row *commandv1.Token, token string) (*reply, error) {
	increment := q.body.duration("increment")
	if q.body.err != nil {
		return nil, q.body.err
	}
	now := s.clock.now(q.view)
	if !row.GetRenewable() || row.GetExpiresClockNs() == 0 || len(row.GetWrapped()) > 0 {
		return nil, fault.Text(fault.Invalid, "lease is not renewable")
	}
	age := time.Duration(now - min(now, row.GetCreatedClockNs()))
	var kept []byte
	var warnings []string
	ttl := time.Duration(row.GetPeriodNs())
	switch {
	case len(row.GetAuth()) > 0:
		var err error
		if ttl, kept, err = s.renewLogin(q, row, increment, age); err != nil {
			return nil, err
		}
	case ttl == 0:
		if ttl = increment; ttl == 0 {
			ttl = systemTTL
		}
		if left := max(systemTTL-age, 0); ttl > left {
			warnings = append(warnings, "TTL of \""+ttl.String()+"\" exceeded the effective max_ttl of \""+left.Truncate(time.Second).String()+"\"; TTL value is capped accordingly")
			ttl = left
		}
	}
	if most := time.Duration(row.GetExplicitMaxTtlNs()); most > 0 {
		ttl = min(ttl, max(most-age, 0))
	}
	if ttl < time.Second {
		return nil, fault.Text(fault.Invalid, "past max TTL, cannot renew")
	}
	_, err := s.propose(q, &commandv1.Command{Body: &commandv1.Command_PutToken{PutToken: &commandv1.PutToken{
		MustExist: true, TtlNs: uint64(ttl), Token: &commandv1.Token{Hash: row.GetHash(), Auth: kept},
	}}})
	if err != nil {
		return nil, err
	}
	return &reply{auth: authOf(token, row, ttl), warnings: warnings}, nil
}

func (s *Server) revokeSelf(q *request) (*reply, error) {
	return nil, s.revoke(q, &commandv1.RevokeToken{Hash: q.who.Hash})
}

func (s *Server) revokeByToken(q *request) (*reply, error) { return s.revokeNamed(q, false) }
func (s *Server) revokeOrphan(q *request) (*reply, error)  { return s.revokeNamed(q, true) }

func (s *Server) revokeNamed(q *request, orphans bool) (*reply, error) {
	row, token, err := s.named(q)
	switch {
	case err != nil:
		return nil, err
	case token == "":
		return nil, fault.Text(fault.Invalid, "missing token ID")
	case row == nil && orphans:
		return nil, fault.Text(fault.Invalid, "token to revoke not found")
	case row == nil:
		return nil, nil
	}
	return nil, s.revoke(q, &commandv1.RevokeToken{Hash: row.GetHash(), OrphanChildren: orphans})
}

func (s *Server) revokeByAccessor(q *request) (*reply, error) {
	row, err := s.accessorOf(q)
	if err != nil {
		return nil, err
	}
	return nil, s.revoke(q, &commandv1.RevokeToken{Hash: row.GetHash()})
}

// revoke ends a token, and answers when it opens nothing on any node any more.
func (s *Server) revoke(q *request, c *commandv1.RevokeToken) error {
	res, err := s.propose(q, &commandv1.Command{Body: &commandv1.Command_RevokeToken{RevokeToken: c}})
	if err != nil {
		return err
	}
	s.settle(q.ctx, res, "a token was revoked")
	return nil
}

func (s *Server) listAccessors(q *request) (*reply, error) {
	keys := []string{}
	for _, t := range q.view.Tokens() {
		if t.GetNamespace() == q.ns && len(t.GetWrapped()) == 0 {
			keys = append(keys, t.GetAccessor())
		}
	}
	if len(keys) == 0 {
		return nil, nil
	}
	slices.Sort(keys)
	return &reply{data: map[string]any{"keys": keys}}, nil
}
