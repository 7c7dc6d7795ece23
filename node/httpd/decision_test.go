package httpd

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"rollcall/node/api"
	"rollcall/node/policy"
	commandv1 "rollcall/proto/command/v1"
	pluginpb "rollcall/proto/plugin"
)

// arrival is where a request came to: what a handler or a plugin was given, which is what it would act upon.
type arrival struct{ ns, path string }

func (a arrival) full() string { return a.ns + a.path }

// arrivals replaces every handler of a world by one that says where it is and does nothing. The path is put together from the
// pattern and what it captured, for that is what handlers work with; the path that was decided about plays no part in it.
func (w *world) arrivals() *[]arrival {
	var seen []arrival
	for _, r := range w.s.routes.routes {
		for op := range r.ops {
			r.ops[op] = func(q *request) (*reply, error) {
				parts := strings.Split(r.pattern, "/")
				for i, p := range parts {
					if strings.HasPrefix(p, "{") {
						parts[i] = q.params[strings.TrimSuffix(strings.Trim(p, "{}"), "...")]
					}
				}
				seen = append(seen, arrival{q.ns, strings.Join(parts, "/")})
				return nil, nil
			}
		}
	}
	return &seen
}

// came is where a request came to, and whether somebody without a token would have come there, too.
func (w *world) came(seen *[]arrival, token, method, target, ns string) (at []arrival, status int) {
	*seen = nil
	w.router.reset()
	for range 4 {
		u, err := url.Parse("http://x/v1/" + target)
		if err != nil {
			return nil, 0
		}
		r := httptest.NewRequest(http.MethodGet, "http://x/", http.NoBody)
		r.Method, r.URL = method, u
		if method == http.MethodPatch {
			r.Header.Set("Content-Type", "application/merge-patch+json")
		}
		r.Header.Set(api.HeaderToken, token)
		if ns != "" {
			r.Header.Set(api.HeaderNamespace, ns)
		}
		rec := httptest.NewRecorder()
		w.s.Handler().ServeHTTP(rec, r)
		if status = rec.Code; status != http.StatusTemporaryRedirect {
			break
		}
		target = strings.TrimPrefix(rec.Header().Get("Location"), "/v1/")
	}
	at = append(at, *seen...)
	for _, q := range w.router.calls {
		at = append(at, arrival{q.Namespace, q.Path})
	}
	return at, status
}

// readable reports whether a path can be written as the exact path of a policy: in the language of policies some letters mean
// something else.
func readable(path string) bool { return !strings.ContainsAny(path, `*+"\$%{}`) }

// FuzzDecisionAgainstRoute holds the path that is decided about against the path that is routed by. Whatever a request is spelt
// like, and wherever it comes to with every right: with everything but a denial of exactly that place it does not come anywhere; and with
// nothing but a grant of exactly that place it comes there and to no other.
func FuzzDecisionAgainstRoute(f *testing.F) {
	for _, seed := range decisionSeeds() {
		f.Add(seed[0], seed[1], seed[2])
	}
	f.Fuzz(func(t *testing.T, method, target, ns string) {
		if u, err := url.Parse("http://x/v1/" + target); err != nil || u.Host != "x" || method == "" || strings.ContainsAny(method, " \r\n\t") || strings.ContainsAny(ns, "\r\n") {
			return
		} else if u.Query().Has("help") {
			return // everybody with a token may ask for help, wherever
		}
		w := newWorld(t)
		for _, n := range []string{"team/", "team/sub/"} {
			w.namespace(n)
		}
		for _, n := range []string{"", "team/", "team/sub/"} {
			w.mount(n, "kv/")
			w.mount(n, "kv2/deep/")
			w.mount(n, "auth/jwt/")
		}
		seen := w.arrivals()
		reached, _ := w.came(seen, rootToken, method, target, ns)
		if len(reached) == 0 {
			return
		}
		if len(reached) != 1 {
			t.Fatalf("%s %q (%q) came to %d places: %v", method, target, ns, len(reached), reached)
		}
		if none, _ := w.came(seen, "", method, target, ns); len(none) != 0 {
			if rt, _ := w.s.routes.find(none[0].path); rt == nil || rt.access != open {
				t.Fatalf("%s %q (%q) came to %v without a token", method, target, ns, none)
			}
			return // open to everybody
		}
		at := reached[0]
		if !readable(at.full()) {
			return
		}
		const all = `capabilities = ["create", "read", "update", "delete", "list", "patch", "sudo"] }`
		w.policy("", "but-this", `path "*" { `+all+"\npath \""+at.full()+`" { capabilities = ["deny"] }`)
		w.policy("", "only-this", `path "`+at.full()+`" { `+all)
		w.token("but-this", &commandv1.Token{Policies: []string{"but-this"}})
		w.token("only-this", &commandv1.Token{Policies: []string{"only-this"}})
		if came, status := w.came(seen, "but-this", method, target, ns); len(came) != 0 {
			t.Fatalf("%s %q (%q) comes to %v (%d), which is denied", method, target, ns, came, status)
		}
		came, status := w.came(seen, "only-this", method, target, ns)
		if len(came) != 1 || came[0] != at {
			t.Fatalf("%s %q (%q) comes to %v (%d) with a grant of %v alone", method, target, ns, came, status, at)
		}
	})
}

// decisionSeeds are spellings that one part of a server could read otherwise than another: method, target, namespace header.
func decisionSeeds() [][3]string {
	var out [][3]string
	for _, path := range []string{
		"kv/data/a", "kv2/deep/a", "auth/jwt/config", "sys/mounts/kv", "sys/mounts/kv/tune", "sys/policies/acl/p", "sys/auth/jwt/tune",
		"sys/namespaces/team", "sys/plugins/catalog/secret/kv", "auth/token/lookup-self", "sys/leases/lookup/kv/creds",
	} {
		for _, spelt := range []string{
			path, path + "/", "/" + path, strings.Replace(path, "/", "//", 1), strings.Replace(path, "/", "/./", 1),
			strings.Replace(path, "/", "/x/../", 1), strings.Replace(path, "/", "%2F", 1), strings.Replace(path, "/", "%2f%2e%2e%2f", 1),
			path + "/..", path + "/.", path + "/%2e", path + "%2F", path + "%00", path + "%20", path + ";x", path + "?list=true", path + "?help=1",
			strings.ToUpper(path), strings.ToUpper(path[:1]) + path[1:], path + "#x", strings.Replace(path, "/", `\`, 1), path + "%C0%AF", path + "\u2215x",
		} {
			out = append(out, [3]string{"GET", spelt, ""}, [3]string{"GET", "team/" + spelt, ""}, [3]string{"PUT", spelt, "team"})
		}
		for _, method := range []string{"PUT", "POST", "DELETE", "LIST", "PATCH", "HEAD", "OPTIONS", "SCAN"} {
			out = append(out, [3]string{method, path, ""}, [3]string{method, path + "/", "team/"})
		}
		for _, ns := range []string{"team", "team/", "/team/", "team/sub", "team//sub", "TEAM", "root", "/", "team/..", "team/./sub", "team%2Fsub", " team", "team/sub/kv"} {
			out = append(out, [3]string{"GET", path, ns}, [3]string{"GET", "sub/" + path, ns})
		}
		out = append(out, [3]string{"GET", "team/sub/" + path, ""}, [3]string{"GET", "team%2Fsub/" + path, ""}, [3]string{"GET", "root/" + path, ""})
	}
	return out
}

// identity is somebody who calls a plugin path, and what they may do there.
type identity struct {
	name, token string
	// may says whether an operation on a path of a namespace is allowed: of the request, and not of its spelling.
	may func(ns, path string, op operation) bool
}

// TestEveryPluginPathAgainstEveryIdentity is the matrix of the routes for what is mounted: two tables, three namespaces, every
// operation, paths that need nothing, a token, or sudo.
func TestEveryPluginPathAgainstEveryIdentity(t *testing.T) {
	w := newWorld(t)
	for _, n := range []string{"team/", "team/sub/"} {
		w.namespace(n)
	}
	for _, n := range []string{"", "team/", "team/sub/"} {
		w.mount(n, "kv/")
		w.mount(n, "auth/jwt/")
	}
	w.router.open = map[string]bool{"login": true}
	w.router.root = map[string]bool{"config": true, "config/": true}
	caps := func(list string) string { return `{ capabilities = [` + list + `] }` }
	all := `"create", "read", "update", "delete", "list", "patch"`
	w.policy("", "able", `path "*" `+caps(all+`, "sudo"`))
	w.policy("", "nosudo", `path "*" `+caps(all))
	w.policy("", "reader", `path "kv/*" `+caps(`"read"`))
	w.policy("", "lister", `path "kv/*" `+caps(`"list"`))
	w.policy("", "deny", `path "*" `+caps(all+`, "sudo"`)+"\npath \"kv/*\" "+caps(`"deny"`))
	w.policy("", "one", `path "kv/data" `+caps(all))
	w.policy("", "other", `path "team/kv/*" `+caps(all))
	w.policy("team/", "inside", `path "kv/*" `+caps(all))
	is := func(p string, of ...string) bool {
		return slices.Contains(of, p)
	}
	never := func(string, string, operation) bool { return false }
	ids := []identity{
		{"none", "", never},
		{"unknown", "never-made", never},
		{"root", rootToken, func(string, string, operation) bool { return true }},
		{"able", w.token("able", &commandv1.Token{Policies: []string{"able"}}), func(string, string, operation) bool { return true }},
		{"nosudo", w.token("nosudo", &commandv1.Token{Policies: []string{"nosudo"}}), func(_, p string, _ operation) bool { return !strings.HasSuffix(p, "config") }},
		{"reader", w.token("reader", &commandv1.Token{Policies: []string{"reader"}}), func(ns, p string, op operation) bool {
			return ns == "" && p == "kv/data" && op == opRead
		}},
		{"lister", w.token("lister", &commandv1.Token{Policies: []string{"lister"}}), func(ns, p string, op operation) bool {
			return ns == "" && p == "kv/data" && op == opList
		}},
		{"deny", w.token("deny", &commandv1.Token{Policies: []string{"deny"}}), func(ns, p string, _ operation) bool {
			return ns != "" || !strings.HasPrefix(p, "kv/")
		}},
		{"one", w.token("one", &commandv1.Token{Policies: []string{"one"}}), func(ns, p string, _ operation) bool { return ns == "" && p == "kv/data" }},
		{"other", w.token("other", &commandv1.Token{Policies: []string{"other"}}), func(ns, p string, _ operation) bool { return ns == "team/" && p == "kv/data" }},
		{"inside", w.token("inside", &commandv1.Token{Policies: []string{"inside"}, Namespace: "team/"}), func(ns, p string, _ operation) bool {
			return ns == "team/" && p == "kv/data"
		}},
		{"root of team", w.token("team-root", &commandv1.Token{Policies: []string{"root"}, Namespace: "team/"}), func(ns, _ string, _ operation) bool { return ns != "" }},
		{"wrapping", w.token("wrapping", &commandv1.Token{Policies: []string{"root"}, Wrapped: []byte("sealed")}), never},
		{"expired", w.token("expired", &commandv1.Token{Policies: []string{"root"}, TtlNs: uint64(time.Second)}), never},
		{"revoked", w.token("revoked", &commandv1.Token{Policies: []string{"root"}}), never},
		{"used up", w.token("used", &commandv1.Token{Policies: []string{"root"}, NumUses: 1}), never},
		{"bound elsewhere", w.token("bound", &commandv1.Token{Policies: []string{"root"}, BoundCidrs: []string{"203.0.113.0/24"}}), never},
		{"no policies", w.token("nothing", &commandv1.Token{}), never},
		{"a policy that is gone", w.token("gone", &commandv1.Token{Policies: []string{"gone"}}), never},
	}
	w.must(&commandv1.Command{Body: &commandv1.Command_RevokeToken{RevokeToken: &commandv1.RevokeToken{Hash: w.fsm.View().HashToken("revoked")}}})
	w.must(&commandv1.Command{Body: &commandv1.Command_UseToken{UseToken: &commandv1.UseToken{Hash: w.fsm.View().HashToken("used")}}})
	w.pass(2 * time.Second)
	calls := 0
	for _, id := range ids {
		for _, ns := range []string{"", "team/", "team/sub/"} {
			for _, path := range []string{"kv/data", "kv/config", "auth/jwt/data", "auth/jwt/config", "auth/jwt/login"} {
				for _, op := range []operation{opRead, opList, opUpdate, opDelete, opPatch} {
					for _, exists := range []bool{false, true} { // an update of what is not there is a create
						if op != opUpdate && exists {
							continue
						}
						w.router.exists = func(*PluginRequest) (found, hasCheck bool) { return exists, true }
						w.router.reset()
						a := w.try(id.token, op, ns+path)
						calls++
						what := fmt.Sprintf("%s of %s%s (exists: %v) by %s", op, ns, path, exists, id.name)
						open := path == "auth/jwt/login" && op != opList // the list of it is another path
						may := open || id.may(ns, path, op)
						q := w.router.last()
						if may != (a.status < 300) || may != (q != nil) || !may && a.status != http.StatusForbidden {
							t.Errorf("%s: %d %s, called: %v; allowed: %v", what, a.status, a.text, q != nil, may)
						}
						if q == nil {
							continue
						}
						if q.Namespace != ns || strings.TrimSuffix(q.Path, "/") != path || is(q.Operation, "create") != (op == opUpdate && !exists) {
							t.Errorf("%s: came to %q %q %q", what, q.Operation, q.Namespace, q.Path)
						}
						if open && (q.ClientToken != "" || len(q.Policies) != 0) {
							t.Errorf("%s: an open path is told of a token", what)
						}
					}
				}
			}
		}
	}
	t.Logf("%d calls by %d identities", calls, len(ids))
}

// TestNobodyWithoutRootGrantsRoot asks for root in every spelling and by every call that gives policies to a token, with every right but
// root itself.
func TestNobodyWithoutRootGrantsRoot(t *testing.T) {
	w := newWorld(t)
	w.namespace("team/")
	w.mount("", "auth/jwt/")
	w.router.open = map[string]bool{"login": true}
	w.policy("", "able", `path "*" { capabilities = ["create", "read", "update", "delete", "list", "patch", "sudo"] }`)
	w.token("able", &commandv1.Token{Policies: []string{"able"}})
	made := 0
	rapid.Check(t, func(rt *rapid.T) {
		name := rapid.OneOf(
			rapid.StringMatching(`[ \t\n\x{a0}\x{2003}\x{200b}]{0,2}[rR][oO0][oOο][tT]/?[ \t\n\x{a0}\x{0}]{0,2}`),
			rapid.SampledFrom([]string{"root", "ROOT", "root,", ",root", "able,root", "root,able", " root ", "root\x00", "r\u006fot", "ｒｏｏｔ", "../root", "root/", "*"}),
		).Draw(rt, "name")
		raw, err := json.Marshal(map[string]any{"policies": []string{name}, "ttl": "1h"})
		if err != nil {
			rt.Fatal(err)
		}
		asText, err := json.Marshal(map[string]any{"policies": name, "ttl": "1h"})
		if err != nil {
			rt.Fatal(err)
		}
		w.router.handle = func(*PluginRequest) (*PluginResponse, error) {
			return &PluginResponse{Plugin: &pluginpb.Response{Auth: &pluginpb.Auth{Policies: []string{name}, TokenPolicies: []string{name}}}}, nil
		}
		var all []*answer
		for _, ns := range []string{"", "team/"} {
			for _, body := range []string{string(raw), string(asText)} {
				all = append(all, w.as("able", "POST", ns+"auth/token/create", body), w.as("able", "POST", ns+"auth/token/create-orphan", body))
			}
		}
		all = append(all, w.as("", "PUT", "auth/jwt/login", "{}"))
		for _, a := range all {
			token, _ := a.auth()["client_token"].(string)
			if token == "" {
				continue
			}
			made++
			who, err := policy.Authenticate(w.fsm.View(), token, 0, "")
			if err != nil {
				rt.Fatal(err)
			}
			if who.IsRoot() {
				rt.Fatalf("%q gave root: %v", name, who.Names())
			}
		}
		// A policy that is called root cannot be written either.
		if a := w.as("able", "PUT", "sys/policies/acl/"+url.PathEscape(name), `{"policy":"path \"*\" { capabilities = [\"sudo\"] }"}`); a.status < 300 {
			if w.fsm.View().Policy("", policy.Root) != nil {
				rt.Fatalf("%q wrote the policy root", name)
			}
		}
	})
	if made == 0 {
		t.Error("no token was ever made: nothing was tried")
	}
}
