package httpd

import (
	"slices"
	"sort"
	"strings"
)

// operation is what a request asks of a path, as the contract of Vault and OpenBao maps it from the HTTP method.
type operation string

const (
	opRead   operation = "read"
	opList   operation = "list"
	opUpdate operation = "update"
	opDelete operation = "delete"
	opPatch  operation = "patch"
	opHelp   operation = "help"
	opHead   operation = "head"
)

// access says what a route asks of the caller before its handler runs.
type access uint8

const (
	// withToken needs a token whose policies allow the operation on the path.
	withToken access = iota
	// withSudo needs the sudo capability besides.
	withSudo
	// open needs nothing: the routes that clients call before they have a token.
	open
)

// handler serves one route. A nil reply is "nothing to say": 404 for read and list, 204 for the rest.
type handler func(*request) (*reply, error)

// route is one row of the table: the pattern below /v1/, with {name} for one segment and {name...} for the rest.
type route struct {
	pattern string
	ops     map[operation]handler
	access  access
	// sudoOps need the sudo capability where the others of the route do not.
	sudoOps map[operation]bool
	// ours marks paths that no other server has: unknown body fields are refused there, not warned about.
	ours bool
	// doubled repeats the keys of data at the top level of the envelope, for old clients.
	doubled bool
	// anyNode answers without a consistent read: what must work while there is no leader.
	anyNode bool
	// rootOnly is refused in a child namespace.
	rootOnly bool
	summary  string
	// canon brings what the pattern captured to its one spelling, by name, before anything is decided about the path.
	canon map[string]func(string) string
	// rawBody is the limit of a body that the handler reads itself; 0: the body is a JSON object.
	rawBody int64
	// quiet reads are not audited: what probes ask many times a minute, and what tells nothing but how this node is.
	quiet bool
	// refused says why the route answers with an error always; empty for routes that do something.
	refused string

	segments []string
}

// canonical is the one spelling of a request's path on this route: with its captures brought to theirs.
func (r *route) canonical(path string, params map[string]string) string {
	if len(r.canon) == 0 {
		return path
	}
	parts := slices.Clone(r.segments)
	for i, p := range parts {
		name := strings.Trim(p, "{}")
		if f := r.canon[name]; f != nil && strings.HasPrefix(p, "{") {
			params[name] = f(params[name])
		}
		if strings.HasPrefix(p, "{") {
			parts[i] = params[strings.TrimSuffix(name, "...")]
		}
	}
	return strings.Join(parts, "/")
}

// table finds the route of a path. Literal segments win over {name}, which wins over {name...}; among equals the
// longer pattern wins, so that "sys/mounts/{path...}/tune" is found before "sys/mounts/{path...}".
type table struct{ routes []*route }

func newTable(routes []*route) *table {
	t := &table{routes: routes}
	for _, r := range routes {
		r.segments = strings.Split(r.pattern, "/")
	}
	sort.SliceStable(t.routes, func(i, j int) bool { return specific(t.routes[i]) > specific(t.routes[j]) })
	return t
}

// specific orders patterns: the first segment that differs in kind decides.
func specific(r *route) string {
	var b strings.Builder
	for _, s := range r.segments {
		switch {
		case strings.HasSuffix(s, "...}"):
			b.WriteByte('b')
		case strings.HasPrefix(s, "{"):
			b.WriteByte('c')
		default:
			b.WriteByte('d')
		}
	}
	return b.String()
}

// find returns the route of a path and what its pattern captured; nil when none matches.
func (t *table) find(path string) (*route, map[string]string) {
	parts := strings.Split(strings.TrimSuffix(path, "/"), "/")
	for _, r := range t.routes {
		if params, ok := match(r.segments, parts); ok {
			return r, params
		}
	}
	return nil, nil
}

func match(pattern, parts []string) (map[string]string, bool) {
	var params map[string]string
	set := func(k, v string) {
		if params == nil {
			params = make(map[string]string, 2)
		}
		params[k] = v
	}
	for i, p := range pattern {
		if name, ok := strings.CutSuffix(p, "...}"); ok {
			tail := pattern[i+1:]
			n := len(parts) - i - len(tail)
			if n < 1 {
				return nil, false
			}
			for k, t := range tail {
				if parts[i+n+k] != t {
					return nil, false
				}
			}
			set(strings.TrimPrefix(name, "{"), strings.Join(parts[i:i+n], "/"))
			return params, true
		}
		if i >= len(parts) {
			return nil, false
		}
		if strings.HasPrefix(p, "{") {
			if parts[i] == "" {
				return nil, false
			}
			set(strings.Trim(p, "{}"), parts[i])
			continue
		}
		if p != parts[i] {
			return nil, false
		}
	}
	return params, len(pattern) == len(parts)
}
