package httpd

import (
	"fmt"
	"strings"

	"rollcall/node/fault"
)

// uiMounts shows what the caller has business with; without a token, what is meant to be seen by everyone.
func (s *Server) uiMounts(q *request) (*reply, error) {
	if tokenOf(q.http) != "" {
		if who, err := s.authenticate(q.view, q.http); err == nil {
			q.who = who
		}
	}
	secret, auth := map[string]any{}, map[string]any{}
	for _, m := range q.view.Mounts() {
		if m.GetNamespace() != q.ns || m.GetParentUuid() != "" {
			continue
		}
		if m.GetConfig().GetListingVisibility() != "unauth" &&
			(q.who == nil || !s.Policies.Sees(q.view, q.who, q.ns, displayPath(m))) {
			continue
		}
		o := map[string]any{"type": m.GetType(), "description": m.GetDescription(), "options": m.GetOptions()}
		if m.GetTable() == "auth" {
			auth[m.GetPath()] = o
		} else {
			secret[m.GetPath()] = o
		}
	}
	return &reply{data: map[string]any{"auth": auth, "secret": secret}}, nil
}

// uiMount answers 403 for what is not there as for what may not be seen: the text is what clients print.
func (s *Server) uiMount(q *request) (*reply, error) {
	path := strings.Trim(q.params["path"], "/") + "/"
	m, _ := q.view.MountFor(q.ns, path)
	if m == nil || !s.Policies.Sees(q.view, q.who, q.ns, displayPath(m)) {
		return nil, &fault.Error{Kind: fault.Denied, Text: fmt.Sprintf("preflight capability check returned 403, "+
			"please ensure client's policies grant access to path %q", path)}
	}
	o := mountObject(m, s.Plugins.Running()[m.GetUuid()])
	o["path"] = m.GetNamespace() + displayPath(m)
	return &reply{data: o}, nil
}
