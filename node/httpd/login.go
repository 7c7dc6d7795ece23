package httpd

import (
	"context"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"rollcall/node/api"
	"rollcall/node/fault"
	"rollcall/node/policy"
	commandv1 "rollcall/proto/command/v1"
	pluginpb "rollcall/proto/plugin"
)

// login makes the token that an auth plugin's answer asks for: with the policies that the plugin names, and default.
func (s *Server) login(ctx context.Context, q *request, match Match, req *PluginRequest, auth *pluginpb.Auth) (*api.Auth, []string, error) {
	m := match.Mount
	names := policy.CanonicalList(append(slices.Clone(auth.GetPolicies()), auth.GetTokenPolicies()...))
	if slices.Contains(names, policy.Root) {
		return nil, nil, fault.Text(fault.Invalid, "auth methods cannot create root tokens")
	}
	names = slices.DeleteFunc(names, func(n string) bool { return reservedPolicy(n) })
	if !auth.GetNoDefaultPolicy() {
		names = policy.CanonicalList(append(names, policy.Default))
	}
	ttl, warnings := loginTTL(m, auth, 0)
	kept, err := proto.Marshal(auth)
	if err != nil {
		return nil, nil, fault.As(fault.Internal, err, "keep", "a login")
	}
	cidrs, err := boundOf(auth.GetBoundCidrs())
	if err != nil {
		return nil, nil, err
	}
	display := strings.ReplaceAll(strings.TrimSuffix(m.GetPath(), "/"), "/", "-")
	if auth.GetDisplayName() != "" {
		display += "-" + auth.GetDisplayName()
	}
	row := &commandv1.Token{
		Policies: names, DisplayName: display, Path: "auth/" + m.GetPath() + match.Rest, Meta: auth.GetMetadata(),
		Namespace: q.ns, Renewable: auth.GetLeaseOptions().GetRenewable(), NumUses: auth.GetNumUses(), TtlNs: uint64(ttl),
		ExplicitMaxTtlNs: uint64(max(0, auth.GetExplicitMaxTtl())), Type: "service", EntityId: auth.GetEntityId(),
		Auth: kept, MountUuid: m.GetUuid(), PeriodNs: uint64(max(0, auth.GetPeriod())), BoundCidrs: cidrs,
	}
	token, err := s.enterToken(ctx, q, row)
	if err != nil {
		return nil, nil, err
	}
	_ = req
	return authOf(token, row, ttl), warnings, nil
}

func boundOf(cidrs []string) ([]string, error) {
	var out []string
	for _, c := range cidrs {
		p, err := policy.ParseCIDR(c)
		if err != nil {
			return nil, err
		}
		out = append(out, p.String())
	}
	return out, nil
}

// loginTTL is how long a login's token lives from now, when it has lived for age: what the plugin asks for, under the
// mount's longest and the token's own.
func loginTTL(m *commandv1.Mount, auth *pluginpb.Auth, age time.Duration) (time.Duration, []string) {
	def, most := TTLs(m)
	if p := time.Duration(auth.GetPeriod()); p > 0 { // periodic: renewed without an end, each time no longer than the mount has
		return min(p, most), nil
	}
	ttl := time.Duration(auth.GetLeaseOptions().GetTTL())
	if ttl <= 0 {
		ttl = def
	}
	if own := time.Duration(auth.GetLeaseOptions().GetMaxTTL()); own > 0 {
		most = min(most, own)
	}
	left := max(most-age, 0)
	if ttl <= left {
		return ttl, nil
	}
	if age > 0 {
		return left, nil
	}
	return left, []string{"TTL of \"" + ttl.String() + "\" exceeded the effective max_ttl of \"" + most.String() +
		"\"; TTL value is capped accordingly"}
}

// renewLogin asks the plugin that let a token in for more time.
func (s *Server) renewLogin(q *request, row *commandv1.Token, increment, age time.Duration) (time.Duration, []byte, error) {
	auth := &pluginpb.Auth{}
	if err := proto.Unmarshal(row.GetAuth(), auth); err != nil {
		return 0, nil, fault.As(fault.Internal, err, "read", "a login")
	}
	m := q.view.Mount(row.GetMountUuid())
	if m == nil {
		return 0, nil, fault.Text(fault.Denied, "the auth method that made this token is gone")
	}
	if auth.GetLeaseOptions() == nil {
		auth.LeaseOptions = &pluginpb.LeaseOptions{}
	}
	auth.LeaseOptions.Increment = int64(increment)
	auth.Accessor, auth.DisplayName = row.GetAccessor(), row.GetDisplayName()
	path := strings.TrimPrefix(row.GetPath(), "auth/"+m.GetPath())
	resp, err := s.Router.Handle(q.ctx, &PluginRequest{
		ID: q.id, Namespace: m.GetNamespace(), Path: displayPath(m) + path,
		Operation: "renew", Headers: q.http.Header, RemoteAddr: q.http.RemoteAddr, TokenAccessor: row.GetAccessor(),
		DisplayName: row.GetDisplayName(), EntityID: row.GetEntityId(), Policies: row.GetPolicies(), Auth: auth,
	})
	if err != nil {
		return 0, nil, err
	}
	back := auth
	if resp != nil && resp.Plugin.GetAuth() != nil {
		back = resp.Plugin.GetAuth()
	}
	ttl, _ := loginTTL(m, back, age)
	kept, err := proto.Marshal(back)
	if err != nil {
		return 0, nil, fault.As(fault.Internal, err, "keep", "a login")
	}
	return ttl, kept, nil
}
