package httpd

import (
	"encoding/base64"
	"slices"
	"strings"

	"rollcall/node/fault"
	"rollcall/node/policy"
	commandv1 "rollcall/proto/command/v1"
)

func (s *Server) policyRoutes() []*route {
	update := func(h handler) map[operation]handler { return map[operation]handler{opUpdate: h} }
	acl := policyWords{s, "policy"}
	legacy := policyWords{s, "rules"}
	canon := map[string]func(string) string{"name": policy.Canonical}
	return []*route{
		{pattern: "sys/policies/acl", ops: map[operation]handler{opList: acl.list}, summary: "The names of the namespace's policies."},
		{
			pattern: "sys/policies/acl/{name}", canon: canon, ops: map[operation]handler{opRead: acl.read, opUpdate: acl.write, opDelete: acl.remove},
			summary: "Write, read or delete a policy.",
		},
		{
			pattern: "sys/policy", doubled: true, ops: map[operation]handler{opRead: legacy.list, opList: legacy.list},
			summary: "The names of the namespace's policies, as older clients ask.",
		},
		{
			pattern: "sys/policy/{name}", doubled: true, canon: canon,
			ops:     map[operation]handler{opRead: legacy.read, opUpdate: legacy.write, opDelete: legacy.remove},
			summary: "Write, read or delete a policy, as older clients do.",
		},
		{pattern: "sys/capabilities-self", doubled: true, ops: update(s.capabilitiesSelf), summary: "What the caller's token may do on paths."},
		{pattern: "sys/capabilities", doubled: true, ops: update(s.capabilities), summary: "What a token may do on paths."},
		{
			pattern: "sys/capabilities-accessor", doubled: true, ops: update(s.capabilitiesAccessor),
			summary: "What the token of an accessor may do on paths.",
		},
	}
}

// policyWords binds the handlers of both spellings of the API: text is the key that a policy's text has in an answer.
type policyWords struct {
	*Server
	text string
}

func (p policyWords) list(q *request) (*reply, error) {
	names := []string{policy.Default}
	for _, row := range q.view.Policies(q.ns) {
		names = append(names, row.GetName())
	}
	if q.ns == "" {
		names = append(names, policy.Root)
	}
	names = policy.CanonicalList(names)
	data := map[string]any{"keys": names}
	if p.text == "rules" {
		data["policies"] = names
	}
	return &reply{data: data}, nil
}

func (p policyWords) read(q *request) (*reply, error) {
	name := policy.Canonical(q.params["name"])
	text := ""
	switch row := q.view.Policy(q.ns, name); {
	case row != nil:
		text = row.GetText()
	case name == policy.Default:
		text = policy.DefaultText
	case name == policy.Root && q.ns == "":
	default:
		return nil, nil
	}
	return &reply{data: map[string]any{"name": name, p.text: text}}, nil
}

func (p policyWords) write(q *request) (*reply, error) {
	name := policy.Canonical(q.params["name"])
	text := q.body.str("policy")
	if text == "" {
		text = q.body.str("rules")
	}
	q.body.has("rules")
	if q.body.err != nil {
		return nil, q.body.err
	}
	switch {
	case name == policy.Root || reservedPolicy(name):
		return nil, fault.Text(fault.Invalid, "cannot update %q policy", name)
	case strings.TrimSpace(text) == "":
		return nil, fault.Text(fault.Invalid, "'policy' parameter not supplied or empty")
	}
	if raw, err := base64.StdEncoding.DecodeString(text); err == nil {
		text = string(raw)
	}
	if _, err := policy.Parse(text); err != nil {
		return nil, err
	}
	res, err := p.propose(q, &commandv1.Command{Body: &commandv1.Command_PutPolicy{PutPolicy: &commandv1.PutPolicy{
		Policy: &commandv1.Policy{Name: name, Namespace: q.ns, Text: text},
	}}})
	if err != nil {
		return nil, err
	}
	p.settle(q.ctx, res, "a policy was changed")
	return nil, nil
}

func (p policyWords) remove(q *request) (*reply, error) {
	name := policy.Canonical(q.params["name"])
	if reservedPolicy(name) {
		return nil, fault.Text(fault.Invalid, "cannot delete %q policy", name)
	}
	res, err := p.propose(q, &commandv1.Command{Body: &commandv1.Command_DeletePolicy{
		DeletePolicy: &commandv1.DeletePolicy{Name: name, Namespace: q.ns},
	}})
	if err != nil {
		return nil, err
	}
	p.settle(q.ctx, res, "a policy was deleted")
	return nil, nil
}

func (s *Server) capabilitiesSelf(q *request) (*reply, error) {
	q.body.has("token") // the stock command sends it too, and the caller is who calls
	return s.capabilitiesOf(q, q.who.Token)
}

func (s *Server) capabilities(q *request) (*reply, error) {
	row, token, err := s.named(q)
	switch {
	case err != nil:
		return nil, err
	case token == "":
		return nil, fault.Text(fault.Invalid, "no token found")
	case row == nil:
		return nil, fault.Text(fault.Invalid, "invalid token")
	}
	return s.capabilitiesOf(q, row)
}

func (s *Server) capabilitiesAccessor(q *request) (*reply, error) {
	row, err := s.accessorOf(q)
	if err != nil {
		return nil, err
	}
	return s.capabilitiesOf(q, row)
}

func (s *Server) capabilitiesOf(q *request, row *commandv1.Token) (*reply, error) {
	paths := q.body.strs("paths")
	if len(paths) == 0 {
		paths = q.body.strs("path")
	}
	if q.body.err != nil {
		return nil, q.body.err
	}
	if len(paths) == 0 {
		return nil, fault.Text(fault.Invalid, "paths must be supplied")
	}
	data := map[string]any{}
	for _, p := range paths {
		caps := s.Policies.Capabilities(q.view, row.GetNamespace(), row.GetPolicies(), q.ns, strings.TrimPrefix(p, "/"))
		data[p] = slices.Clone(caps)
		if len(paths) == 1 {
			data["capabilities"] = caps
		}
	}
	return &reply{data: data}, nil
}
