package httpd

import (
	"strings"
	"time"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// miscRoutes answer for what the two servers have and rollcall has not, or has elsewhere: in words, instead of a 404 that
// leaves people looking for a mistake of theirs.
func (s *Server) miscRoutes() []*route {
	refuse := func(text string) handler {
		return func(q *request) (*reply, error) {
			for k := range q.body.raw {
				q.body.has(k)
			}
			return nil, fault.Text(fault.Invalid, "%s", text)
		}
	}
	const (
		noRuntimes = "container plugins are not supported, so there are no runtimes: register a binary with command and sha256"
		auditFile  = "audit devices are enabled in each node's configuration file only: a path that the API could set would be a way to write files"
		initDone   = "Vault is already initialized"
		noSeal     = "a node cannot be sealed by a call: there are no unseal keys that could open it again. Stop it; without its seal key it does not start"
	)
	runtimes := map[operation]handler{
		opUpdate: refuse(noRuntimes), opDelete: refuse(noRuntimes),
		opRead: func(*request) (*reply, error) { return nil, nil },
	}
	return []*route{
		{
			pattern: "sys/plugins/runtimes/catalog", access: withSudo, ops: map[operation]handler{opRead: s.listRuntimes, opList: s.listRuntimes},
			summary: "The runtimes of container plugins: none.",
		},
		{
			pattern: "sys/plugins/runtimes/catalog/{type}/{name}", access: withSudo, ops: runtimes, refused: "400 " + noRuntimes,
			summary: "One runtime: there is none.",
		},
		{
			pattern: "sys/version-history", rootOnly: true, anyNode: true, ops: map[operation]handler{opList: s.versionHistory},
			summary: "The version that this node runs, and since when.",
		},
		{
			pattern: "sys/internal/specs/openapi", anyNode: true, ops: map[operation]handler{opRead: s.openAPI, opUpdate: s.openAPI},
			summary: "This table, as an OpenAPI document.",
		},
		{
			pattern: "sys/audit", access: withSudo, doubled: true, rootOnly: true, ops: map[operation]handler{opRead: s.listAudit},
			summary: "The audit device that this node's configuration enables.",
		},
		{
			pattern: "sys/audit/{path...}", access: withSudo, rootOnly: true, ops: map[operation]handler{opUpdate: refuse(auditFile), opDelete: refuse(auditFile)},
			refused: "400 " + auditFile, summary: "Enable or disable an audit device.",
		},
		{
			pattern: "sys/audit-hash/{path...}", access: withSudo, rootOnly: true, ops: map[operation]handler{opUpdate: s.auditHash},
			summary: "A text as it stands in audit records.",
		},
		{
			pattern: "sys/init", quiet: true, access: open, anyNode: true, ops: map[operation]handler{opRead: s.initStatus, opUpdate: refuse(initDone)},
			summary: "Whether the cluster is initialised. It initialises itself: the first token is in bootstrap_token_file.",
		},
		{
			pattern: "sys/seal", access: withSudo, anyNode: true, rootOnly: true, ops: map[operation]handler{opUpdate: refuse(noSeal)},
			refused: "400 " + noSeal, summary: "Seal this node.",
		},
		{
			pattern: "sys/unseal", access: open, anyNode: true, ops: map[operation]handler{opUpdate: s.unseal},
			summary: "Unseal this node: it never is sealed while it answers, and says so.",
		},
		{
			pattern: "sys/rotate", access: withSudo, rootOnly: true, ops: map[operation]handler{opUpdate: s.rotate},
			summary: "Have every node seal what it writes from now on with a new data key.",
		},
		{
			pattern: "sys/rotate/keyring", access: withSudo, rootOnly: true, ops: map[operation]handler{opUpdate: s.rotate},
			summary: "As rotate, in OpenBao's newer spelling.",
		},
		{
			pattern: "sys/key-status", rootOnly: true, anyNode: true, doubled: true, ops: map[operation]handler{opRead: s.keyStatus},
			summary: "The term of data keys, and how the asked node follows.",
		},
	}
}

// errPlain answers what only a sealed node can do.
func (s *Server) errPlain() error {
	return fault.Text(fault.Invalid, "node %s seals nothing: there is no seal block in its configuration", s.NodeName)
}

// rotate enters a new term; each node makes its own key for it.
func (s *Server) rotate(q *request) (*reply, error) {
	if s.Cluster.Seal() == nil {
		return nil, s.errPlain()
	}
	_, err := s.propose(q, &commandv1.Command{Body: &commandv1.Command_RotateKeys{RotateKeys: &commandv1.RotateKeys{}}})
	return nil, err
}

func (s *Server) keyStatus(*request) (*reply, error) {
	st := s.Cluster.Seal()
	if st == nil {
		return nil, s.errPlain()
	}
	return &reply{data: st}, nil
}

func (s *Server) listRuntimes(*request) (*reply, error) {
	return &reply{data: map[string]any{"runtimes": []any{}}}, nil
}

func (s *Server) unseal(q *request) (*reply, error) {
	for k := range q.body.raw { // a key that somebody sends by habit is not looked at
		q.body.has(k)
	}
	return s.sealStatus(q)
}

// versionHistory tells of this process only: rollcall keeps no history of its own versions.
func (s *Server) versionHistory(*request) (*reply, error) {
	return &reply{data: map[string]any{"keys": []string{s.Version}, "key_info": map[string]any{s.Version: map[string]any{
		"build_date": "", "previous_version": nil, "timestamp_installed": s.Started.UTC().Format(time.RFC3339),
	}}}}, nil
}

// helpOf answers ?help=1 on a route.
func helpOf(rt *route) map[string]any {
	return map[string]any{"help": "## " + rt.pattern + "\n\n" + rt.summary, "see_also": nil, "openapi": document([]*route{rt}, "")}
}

// methodOf is how a client asks for an operation.
var methodOf = map[operation]string{opRead: "get", opList: "get", opUpdate: "post", opDelete: "delete", opPatch: "patch", opHead: "head"}

// document makes an OpenAPI 3 document of routes.
func document(routes []*route, version string) map[string]any {
	paths := map[string]any{}
	for _, r := range routes {
		item := map[string]any{"description": r.summary}
		if r.access == withSudo {
			item["x-vault-sudo"] = true
		}
		if r.access == open {
			item["x-vault-unauthenticated"] = true
		}
		var params []any
		for seg := range strings.SplitSeq(r.pattern, "/") {
			if name, ok := strings.CutPrefix(seg, "{"); ok {
				name = strings.TrimSuffix(strings.TrimSuffix(name, "}"), "...")
				params = append(params, map[string]any{"name": name, "in": "path", "required": true, "schema": map[string]any{"type": "string"}})
			}
		}
		if params != nil {
			item["parameters"] = params
		}
		for op := range r.ops {
			method := methodOf[op]
			entry, _ := item[method].(map[string]any)
			if entry == nil {
				entry = map[string]any{
					"summary": r.summary, "tags": []string{"system"}, "operationId": operationID(method, r.pattern),
					"responses": map[string]any{"200": map[string]any{"description": "OK"}},
				}
			}
			switch op {
			case opList:
				list := map[string]any{"name": "list", "in": "query", "schema": map[string]any{"type": "string"}, "description": "Must be set to true to list."}
				if r.ops[opRead] == nil {
					list["required"] = true
				}
				entry["parameters"] = []any{list}
			case opUpdate, opPatch:
				kind := map[operation]string{opUpdate: "application/json", opPatch: "application/merge-patch+json"}[op]
				if r.rawBody > 0 {
					kind = "application/octet-stream"
				}
				entry["requestBody"] = map[string]any{"content": map[string]any{kind: map[string]any{"schema": map[string]any{"type": "object"}}}}
			default: // no parameters, no body
			}
			item[method] = entry
		}
		paths["/"+strings.ReplaceAll(r.pattern, "...}", "}")] = item
	}
	return map[string]any{"openapi": "3.0.2", "info": map[string]any{
		"title":       "rollcall API",
		"description": "HTTP API of a rollcall node. All paths begin with /v1/.", "version": version,
	}, "paths": paths}
}

// operationID names an operation as generators of clients want it: words joined by dashes, each id once.
func operationID(method, pattern string) string {
	return method + "-" + strings.NewReplacer("/", "-", "{", "", "}", "", "...", "", "_", "-").Replace(pattern)
}

func (s *Server) openAPI(*request) (*reply, error) {
	return &reply{bare: document(s.routes.routes, s.Version)}, nil
}
