package httpd

import (
	"context"
	"encoding/json"
	"flag"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"rollcall/node/api"
	commandv1 "rollcall/proto/command/v1"
)

// openRoutes are the only ones that answer somebody without a token. The list is written out, so that a new open route is
// a decision and not an accident.
var openRoutes = []string{
	"sys/health", "sys/init", "sys/internal/ui/mounts", "sys/leader", "sys/seal-status", "sys/storage/raft/join", "sys/unseal",
	"sys/wrapping/lookup", "sys/wrapping/rewrap", "sys/wrapping/unwrap",
}

// sudoRoutes need the sudo capability (CONTRACT 1.4), besides the operation's own.
var sudoRoutes = []string{
	"auth/token/accessors", "auth/token/create-orphan", "auth/token/revoke-orphan", "auth/token/tidy",
	"sys/audit", "sys/audit-hash/{path...}", "sys/audit/{path...}", "sys/auth/{path...}", "sys/auth/{path...}/tune", "sys/leases/lookup/{prefix...}",
	"sys/leases/revoke-force/{prefix...}", "sys/leases/revoke-prefix/{prefix...}", "sys/leases/tidy", "sys/leave",
	"sys/namespaces/{path...}", "sys/plugins/catalog/{type}", "sys/plugins/catalog/{type}/{name}", "sys/plugins/runtimes/catalog",
	"sys/plugins/runtimes/catalog/{type}/{name}", "sys/remount", "sys/revoke-force/{prefix...}", "sys/revoke-prefix/{prefix...}",
	"sys/rotate", "sys/rotate/keyring", "sys/seal", "sys/step-down", "sys/storage/raft/remove-peer", "sys/storage/raft/snapshot", "sys/storage/raft/snapshot-force",
}

// sample is a path that a pattern matches.
func sample(pattern string) string {
	for name, v := range map[string]string{
		"{path...}": "kv", "{type}": "secret", "{name}": "kv", "{id}": "some-id", "{action}": "pause", "{lease_id...}": "kv/creds/1",
		"{prefix...}": "kv/creds", "{role}": "r",
	} {
		pattern = strings.ReplaceAll(pattern, name, v)
	}
	return pattern
}

var methodFor = map[operation]string{
	opRead: "GET", opList: "LIST", opUpdate: "PUT", opDelete: "DELETE", opPatch: "PATCH", opHead: "HEAD",
}

func (w *world) try(token string, op operation, path string) *answer {
	w.t.Helper()
	ct := ""
	if op == opPatch {
		ct = "application/merge-patch+json"
	}
	body := "{}"
	if op == opRead || op == opList || op == opDelete || op == opHead {
		body = ""
	}
	if strings.Contains(path, "plugins/reload/") && body != "" {
		body = `{"scope":"global"}` // a local one is waited for, and nobody runs it here
	}
	return w.as(token, methodFor[op], path, body, "Content-Type", ct)
}

// identities are tokens of each kind. "" means no token.
func (w *world) identities(path string) map[string]string {
	all := `capabilities = ["create", "read", "update", "delete", "list", "patch"`
	w.policy("", "narrow", `path "kv/only/this" { capabilities = ["read"] }`)
	w.policy("", "nosudo", `path "*" { `+all+`] }`)
	w.policy("", "deny", `path "*" { `+all+`, "sudo"] }
path "`+path+`" { capabilities = ["deny"] }`)
	w.policy("", "able", `path "*" { `+all+`, "sudo"] }`)
	ids := map[string]string{"none": "", "unknown": "never-made"}
	for _, name := range []string{"narrow", "nosudo", "deny", "able"} {
		ids[name] = w.token("tok-"+name, &commandv1.Token{Policies: []string{name}})
	}
	ids["revoked"] = w.token("tok-revoked", &commandv1.Token{Policies: []string{"root"}})
	w.must(&commandv1.Command{Body: &commandv1.Command_RevokeToken{RevokeToken: &commandv1.RevokeToken{Hash: w.fsm.View().HashToken("tok-revoked")}}})
	ids["expired"] = w.token("tok-expired", &commandv1.Token{Policies: []string{"root"}, TtlNs: uint64(time.Second)})
	ids["used up"] = w.token("tok-used", &commandv1.Token{Policies: []string{"root"}, NumUses: 1})
	w.must(&commandv1.Command{Body: &commandv1.Command_UseToken{UseToken: &commandv1.UseToken{Hash: w.fsm.View().HashToken("tok-used")}}})
	ids["bound elsewhere"] = w.token("tok-bound", &commandv1.Token{Policies: []string{"root"}, BoundCidrs: []string{"203.0.113.0/24"}})
	ids["wrapping"] = w.token("tok-wrapping", &commandv1.Token{Policies: []string{"response-wrapping"}, Wrapped: []byte("sealed")})
	w.namespace("team/")
	ids["of another namespace"] = w.token("tok-team", &commandv1.Token{Policies: []string{"root"}, Namespace: "team/"})
	w.pass(2 * time.Second)
	return ids
}

// TestEveryRouteAgainstEveryIdentity holds the whole table against everybody who could call it.
func TestEveryRouteAgainstEveryIdentity(t *testing.T) {
	routes := newWorld(t).s.routes.routes
	calls := 0
	for _, r := range routes {
		path := sample(r.pattern)
		for op := range r.ops {
			w := newWorld(t) // a call may change what the next one finds
			w.mount("", "kv/")
			for name, token := range w.identities(path) {
				a := w.try(token, op, path)
				calls++
				denied := a.status == http.StatusForbidden
				var want bool
				switch {
				case slices.Contains(openRoutes, r.pattern):
					// Those of wrapping answer a token that is none, or none at all, in their own words.
					want = strings.HasPrefix(r.pattern, "sys/wrapping/") && name == "none"
				case name == "able":
					want = denied && r.pattern == "auth/token/lookup-accessor" // "invalid accessor" is a 403, too
					want = want || denied && slices.Contains([]string{
						"auth/token/revoke-accessor", "auth/token/renew-accessor",
						"sys/capabilities-accessor",
					}, r.pattern)
				case name == "nosudo":
					want = slices.Contains(sudoRoutes, r.pattern) || r.pattern == "sys/leases/lookup" && op == opList || denied && accessorPath(r.pattern)
				default:
					want = true
				}
				if denied != want {
					t.Errorf("%s %s for %s: %d %s", op, path, name, a.status, a.text)
				}
				if denied && !slices.Contains([]string{"narrow", "nosudo", "deny", "able"}, name) && strings.TrimSpace(a.text) != `{"errors":["permission denied"]}` &&
					op != opHead {
					t.Errorf("%s %s for %s tells more than it should: %s", op, path, name, a.text)
				}
			}
		}
	}
	t.Logf("%d calls over %d routes", calls, len(routes))
}

func accessorPath(pattern string) bool { return strings.HasSuffix(pattern, "-accessor") }

func TestOpenAndSudoRoutesAreThoseWrittenHere(t *testing.T) {
	var isOpen, isSudo []string
	for _, r := range newWorld(t).s.routes.routes {
		switch r.access {
		case open:
			isOpen = append(isOpen, r.pattern)
		case withSudo:
			isSudo = append(isSudo, r.pattern)
		case withToken:
		}
	}
	slices.Sort(isOpen)
	slices.Sort(isSudo)
	want := slices.Sorted(slices.Values(sudoRoutes))
	if !slices.Equal(isOpen, openRoutes) {
		t.Errorf("open: %q", isOpen)
	}
	if !slices.Equal(isSudo, want) {
		t.Errorf("sudo: %q\nwant %q", isSudo, want)
	}
}

// TestARefusedCallChangesNothing sends every writing call as somebody who may not.
func TestARefusedCallChangesNothing(t *testing.T) {
	w := newWorld(t)
	w.mount("", "kv/")
	ids := w.identities("*")
	for _, r := range w.s.routes.routes {
		if r.access == open {
			continue
		}
		for op := range r.ops {
			for _, name := range slices.Sorted(maps.Keys(ids)) {
				if name == "able" || name == "nosudo" || name == "deny" {
					continue
				}
				before := w.fsm.View().Index()
				w.try(ids[name], op, sample(r.pattern))
				if now := w.fsm.View().Index(); now != before {
					t.Errorf("%s %s for %s entered %d entries", op, r.pattern, name, now-before)
				}
			}
		}
	}
	if w.router.last() != nil {
		t.Error("a plugin was called")
	}
}

// spellings are ways to write a path that could mean the same to one part of a server and something else to another.
func spelling(t *rapid.T, path string) string {
	segments := strings.Split(path, "/")
	var b strings.Builder
	for i, s := range segments {
		if i > 0 {
			b.WriteString(rapid.SampledFrom([]string{"/", "/", "/", "/", "/", "/", "/", "/", "/", "/", "/", "/", "//", "/./", "%2F", "%2f", "/x/../", "/%2e/", "/.%2e/x/", "\\", ";/"}).Draw(t, "sep"))
		}
		switch rapid.IntRange(0, 30).Draw(t, "seg") {
		case 0:
			s = strings.ToUpper(s)
		case 1:
			var e strings.Builder
			for _, c := range []byte(s) {
				e.WriteString("%" + hexOf(c))
			}
			s = e.String()
		case 2:
			s += "%20"
		case 3:
			s += "."
		}
		b.WriteString(s)
	}
	return b.String() + rapid.SampledFrom([]string{"", "", "/", "//", "/.", "%2f", "?x=1", "%00", "/..", "#f"}).Draw(t, "tail")
}

func hexOf(c byte) string {
	const digits = "0123456789abcdef"
	return string([]byte{digits[c>>4], digits[c&15]})
}

// send follows redirects as clients do, and says which path was really answered.
func (w *world) send(token, method, target, ns string) (a *answer, ok bool) {
	for range 4 {
		u, err := url.Parse("http://x/v1/" + target)
		if err != nil {
			return nil, false
		}
		r := &http.Request{Method: method, URL: u, Header: http.Header{}, Body: http.NoBody, RemoteAddr: "10.0.0.1:1", Host: "x", Proto: "HTTP/1.1"}
		r.Header.Set(api.HeaderToken, token)
		if ns != "" {
			r.Header.Set(api.HeaderNamespace, ns)
		}
		rec := httptest.NewRecorder()
		w.s.Handler().ServeHTTP(rec, r)
		a = &answer{status: rec.Code, header: rec.Header(), text: rec.Body.String()}
		_ = json.Unmarshal(rec.Body.Bytes(), &a.json)
		if rec.Code != http.StatusTemporaryRedirect {
			return a, true
		}
		target = strings.TrimPrefix(rec.Header().Get("Location"), "/v1/")
	}
	return a, true
}

// target is something that one path alone leads to, and how its answer is known.
type guarded struct {
	path, ns string
	reached  func(*world, *answer) bool
}

// TestTheDecisionIsAboutThePathThatIsRouted: whatever the spelling, what is denied is not reached, and what only one path
// is granted for is reached by nothing else.
func TestTheDecisionIsAboutThePathThatIsRouted(t *testing.T) {
	w := newWorld(t)
	w.namespace("team/")
	w.namespace("team/sub/")
	for _, ns := range []string{"", "team/", "team/sub/"} {
		w.mount(ns, "kv/")
		w.policy(ns, "target", `path "marker" { capabilities = ["read"] }`)
	}
	plugin := func(ns string) func(*world, *answer) bool {
		return func(w *world, _ *answer) bool {
			q := w.router.last()
			return q != nil && q.Namespace == ns && strings.TrimSuffix(q.Path, "/") == "kv/data/target"
		}
	}
	text := func(part string) func(*world, *answer) bool {
		return func(_ *world, a *answer) bool { return a.status == 200 && strings.Contains(a.text, part) }
	}
	all := `capabilities = ["read", "list", "sudo"] }` // what changes something would change the targets
	targets := []guarded{
		{"kv/data/target", "", plugin("")},
		{"kv/data/target", "team/", plugin("team/")},
		{"kv/data/target", "team/sub/", plugin("team/sub/")},
		{"sys/policies/acl/target", "", text(`\"marker\"`)},
		{"sys/mounts/kv/tune", "", text(`"max_lease_ttl":2764800`)},
		{"auth/token/lookup-self", "", text(`"creation_ttl"`)},
		{"sys/storage/raft/configuration", "", text(`"protocol_version"`)},
	}
	for i, g := range targets {
		full := g.ns + g.path
		name := "t" + string(rune('a'+i))
		w.policy("", name+"-not", `path "*" { `+all+"\npath \""+full+`" { capabilities = ["deny"] }`)
		w.policy("", name+"-only", `path "`+full+`" { capabilities = ["read"] }`)
		w.token(name+"-not", &commandv1.Token{Policies: []string{name + "-not"}})
		w.token(name+"-only", &commandv1.Token{Policies: []string{name + "-only"}})
	}
	checks := flag.Lookup("rapid.checks")
	if before := checks.Value.String(); before == "100" { // the default: this is cheap, and worth more
		if err := checks.Value.Set("5000"); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = checks.Value.Set(before) }()
	}
	reachedOnce := map[int]bool{}
	rapid.Check(t, func(rt *rapid.T) {
		i := rapid.IntRange(0, len(targets)-1).Draw(rt, "target")
		g := targets[i]
		name := "t" + string(rune('a'+i))
		// The namespace stands in the path, in the header, or in both.
		cut := strings.Count(g.ns, "/")
		inHeader := rapid.IntRange(0, cut).Draw(rt, "segments in the header")
		parts := strings.SplitAfter(g.ns, "/")
		ns := strings.Join(parts[:inHeader], "")
		path := strings.Join(parts[inHeader:], "") + g.path
		if ns != "" && rapid.Bool().Draw(rt, "odd header") {
			ns = rapid.SampledFrom([]string{"/" + ns, strings.TrimSuffix(ns, "/"), ns + "/", strings.ToUpper(ns), ns + "../", " " + ns}).Draw(rt, "header")
		}
		target := spelling(rt, path)
		method := rapid.SampledFrom([]string{"GET", "GET", "GET", "LIST", "PUT", "DELETE"}).Draw(rt, "method")

		w.router.reset()
		if a, ok := w.send(name+"-not", method, target, ns); ok && g.reached(w, a) {
			rt.Fatalf("%s %s (namespace %q) reaches %s, which is denied: %d %s", method, target, ns, g.path, a.status, a.text)
		}
		w.router.reset()
		a, ok := w.send(name+"-only", method, target, ns)
		if !ok {
			return
		}
		if g.reached(w, a) {
			reachedOnce[i] = true
			return
		}
		if q := w.router.last(); q != nil {
			rt.Fatalf("%s %s (namespace %q) reaches %s%s with a policy for %s%s alone", method, target, ns, q.Namespace, q.Path, g.ns, g.path)
		}
		if a.status < 300 && method != "OPTIONS" {
			rt.Fatalf("%s %s (namespace %q): %d %s with a policy for %s%s alone", method, target, ns, a.status, a.text, g.ns, g.path)
		}
	})
	for i, g := range targets {
		w.router.reset()
		a, _ := w.send("t"+string(rune('a'+i))+"-only", "GET", g.ns+g.path, "")
		if !g.reached(w, a) {
			t.Errorf("%s%s is not reached by its own name: %d %s", g.ns, g.path, a.status, a.text)
		}
	}
	if len(reachedOnce) != len(targets) {
		t.Errorf("only %d of %d targets were ever reached: the spellings are too wild", len(reachedOnce), len(targets))
	}
}

// FuzzServe: any request is answered, in JSON or with nothing, and never by a panic or a 500.
func FuzzServe(f *testing.F) {
	for _, r := range newWorld(f).s.routes.routes {
		for op := range r.ops {
			f.Add(methodFor[op], sample(r.pattern), `{"a":1}`, "", "")
		}
	}
	f.Add("GET", "kv//x/../%2e", "", "", "team/")
	f.Add("PUT", "kv/x", `{"a":[{"b":"\u0000"}]}`, "application/json", "")
	f.Add("PUT", "sys/policies/acl/p", `{"policy":"path \"a\" {"}`, "", "")
	f.Add("POST", "kv/x", "a=1&b=%zz", "application/x-www-form-urlencoded", "root")
	f.Add("PATCH", "sys/namespaces/team", `{"custom_metadata":{"a":null}}`, "application/merge-patch+json", "")
	f.Add("PUT", "sys/plugins/reload/unknown/kv", `{"waves":["1","%"],"bake":"1s","batch":-1}`, "", "")
	f.Add("POST", "auth/token/create", `{"ttl":9223372036854775807,"policies":[null]}`, "", "")
	f.Fuzz(func(t *testing.T, method, path, body, contentType, ns string) {
		u, err := url.Parse("http://x/v1/" + path)
		if err != nil || method == "" || strings.ContainsAny(method, " \r\n\t") {
			return
		}
		w := newWorld(t)
		w.namespace("team/")
		w.mount("", "kv/")
		w.mount("team/", "kv/")
		r := httptest.NewRequest("GET", "http://x/", strings.NewReader(body))
		r.Method, r.URL = method, u
		r.Header = http.Header{api.HeaderToken: {rootToken}, "Content-Type": {contentType}, api.HeaderNamespace: {ns}}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond) // a local reload is waited for, and nobody runs it here
		defer cancel()
		rec := httptest.NewRecorder()
		w.s.Handler().ServeHTTP(rec, r.WithContext(ctx))
		if rec.Code >= 500 && rec.Code != http.StatusServiceUnavailable {
			t.Fatalf("%s %q %q: %d %s", method, path, body, rec.Code, rec.Body)
		}
		if strings.HasPrefix(rec.Header().Get("Content-Type"), "application/json") && rec.Body.Len() > 0 && !json.Valid(rec.Body.Bytes()) {
			t.Fatalf("%s %q: not JSON: %s", method, path, rec.Body)
		}
	})
}
