package httpd

import (
	"bytes"
	"cmp"
	"flag"
	"fmt"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write ENDPOINTS.md anew instead of comparing it")

// endpoint is one line of the contract: what clients of the two servers call.
type endpoint struct {
	// calls are operations and the path below /v1/, as the contract writes it.
	ops  []operation
	path string
	// says is the text of the refusal, where an endpoint exists to refuse in words.
	says string
	// why is the reason where there is no such endpoint.
	why string
	// note is what a reader of the table should know besides.
	note string
}

var (
	reads  = []operation{opRead}
	writes = []operation{opUpdate}
	lists  = []operation{opList}
)

// contract is every endpoint of the contract, in its order.
var contract = []struct {
	section   string
	endpoints []endpoint
}{
	{"Reload (2)", []endpoint{
		{ops: writes, path: "sys/plugins/reload/backend"},
		{ops: writes, path: "sys/plugins/reload/:type/:name"},
		{ops: writes, path: "sys/plugins/reload/unknown", says: "no plugin named in the path", note: "what `vault plugin reload -mounts` sends without a namespace"},
		{ops: reads, path: "sys/plugins/reload/backend/status"},
	}},
	{"Catalog (3)", []endpoint{
		{ops: reads, path: "sys/plugins/catalog"},
		{ops: lists, path: "sys/plugins/catalog/:type"},
		{ops: []operation{opUpdate, opRead, opDelete}, path: "sys/plugins/catalog/:type/:name"},
		{ops: []operation{opUpdate, opRead, opDelete}, path: "sys/plugins/catalog/:name", note: "the legacy form without a type"},
		{ops: reads, path: "sys/plugins/pins"},
		{ops: []operation{opUpdate, opRead, opDelete}, path: "sys/plugins/pins/:type/:name"},
		{ops: []operation{opRead, opList}, path: "sys/plugins/runtimes/catalog"},
		{ops: []operation{opUpdate, opDelete}, path: "sys/plugins/runtimes/catalog/container/:name"},
		{ops: reads, path: "sys/plugins/runtimes/catalog/container/:name", note: "404: there is none"},
	}},
	{"Mounts and auth methods (4)", []endpoint{
		{ops: reads, path: "sys/mounts"},
		{ops: []operation{opUpdate, opRead, opDelete}, path: "sys/mounts/:path"},
		{ops: []operation{opRead, opUpdate}, path: "sys/mounts/:path/tune"},
		{ops: reads, path: "sys/auth"},
		{ops: []operation{opUpdate, opRead, opDelete}, path: "sys/auth/:path"},
		{ops: []operation{opRead, opUpdate}, path: "sys/auth/:path/tune"},
		{ops: writes, path: "sys/remount"},
		{ops: reads, path: "sys/remount/status/:id"},
		{ops: reads, path: "sys/internal/ui/mounts"},
		{ops: reads, path: "sys/internal/ui/mounts/:path"},
	}},
	{"Server, cluster, health (5.1, 5.2)", []endpoint{
		{ops: []operation{opRead, opHead}, path: "sys/health"},
		{ops: reads, path: "sys/seal-status"},
		{ops: reads, path: "sys/leader"},
		{ops: reads, path: "sys/ha-status"},
		{ops: reads, path: "sys/storage/raft/configuration"},
		{ops: writes, path: "sys/storage/raft/join"},
		{ops: writes, path: "sys/storage/raft/bootstrap"},
		{ops: writes, path: "sys/storage/raft/remove-peer"},
		{ops: reads, path: "sys/storage/raft/autopilot/state"},
		{ops: []operation{opRead, opUpdate}, path: "sys/storage/raft/autopilot/configuration", note: "another value than the configured one is refused in words"},
		{ops: []operation{opRead, opUpdate}, path: "sys/storage/raft/snapshot"},
		{ops: writes, path: "sys/storage/raft/snapshot-force"},
		{ops: reads, path: "sys/init"},
		{ops: writes, path: "sys/init", says: "already initialized", note: "the cluster initialises itself"},
		{ops: writes, path: "sys/unseal"},
		{ops: writes, path: "sys/seal"},
		{ops: writes, path: "sys/step-down"},
		{ops: reads, path: "sys/metrics"},
		{ops: lists, path: "sys/version-history"},
		{ops: reads, path: "sys/internal/specs/openapi", note: "generated from the route table"},
		{ops: reads, path: "sys/key-status"},
		{ops: writes, path: "sys/rotate"},
		{ops: writes, path: "sys/rotate/keyring", note: "as rotate, in the newer spelling of one of the two"},
	}},
	{"Namespaces (5.3)", []endpoint{
		{ops: lists, path: "sys/namespaces"},
		{ops: []operation{opUpdate, opRead, opPatch, opDelete}, path: "sys/namespaces/:path"},
	}},
	{"Tokens, policies, leases, wrapping (5.4)", []endpoint{
		{ops: writes, path: "auth/token/create"},
		{ops: writes, path: "auth/token/create-orphan"},
		{ops: writes, path: "auth/token/create/:role"},
		{ops: lists, path: "auth/token/roles", note: "404: there are none"},
		{ops: reads, path: "auth/token/lookup-self"},
		{ops: writes, path: "auth/token/lookup"},
		{ops: writes, path: "auth/token/lookup-accessor"},
		{ops: writes, path: "auth/token/renew-self"},
		{ops: writes, path: "auth/token/renew"},
		{ops: writes, path: "auth/token/renew-accessor"},
		{ops: writes, path: "auth/token/revoke-self"},
		{ops: writes, path: "auth/token/revoke"},
		{ops: writes, path: "auth/token/revoke-accessor"},
		{ops: writes, path: "auth/token/revoke-orphan"},
		{ops: lists, path: "auth/token/accessors"},
		{ops: writes, path: "auth/token/tidy"},
		{ops: writes, path: "sys/capabilities"},
		{ops: writes, path: "sys/capabilities-self"},
		{ops: writes, path: "sys/capabilities-accessor"},
		{ops: lists, path: "sys/policies/acl"},
		{ops: []operation{opUpdate, opRead, opDelete}, path: "sys/policies/acl/:name"},
		{ops: []operation{opRead, opList}, path: "sys/policy"},
		{ops: []operation{opUpdate, opRead, opDelete}, path: "sys/policy/:name"},
		{ops: []operation{opUpdate, opRead}, path: "sys/wrapping/lookup"},
		{ops: writes, path: "sys/wrapping/unwrap"},
		{ops: writes, path: "sys/wrapping/wrap"},
		{ops: writes, path: "sys/wrapping/rewrap"},
		{ops: writes, path: "sys/leases/renew"},
		{ops: writes, path: "sys/leases/revoke"},
		{ops: writes, path: "sys/leases/lookup"},
		{ops: lists, path: "sys/leases/lookup/:prefix"},
		{ops: writes, path: "sys/leases/revoke-prefix/:prefix"},
		{ops: writes, path: "sys/leases/revoke-force/:prefix"},
		{ops: writes, path: "sys/leases/tidy"},
		{ops: reads, path: "sys/leases/count"},
		{ops: writes, path: "sys/renew"},
		{ops: writes, path: "sys/revoke"},
		{ops: writes, path: "sys/revoke-prefix/:prefix"},
		{ops: writes, path: "sys/revoke-force/:prefix"},
	}},
	{"Audit and configuration (1.2, 1.4)", []endpoint{
		{ops: reads, path: "sys/audit"},
		{ops: []operation{opUpdate, opDelete}, path: "sys/audit/:path"},
		{ops: writes, path: "sys/audit-hash/:path"},
		{ops: reads, path: "sys/config/auditing/request-headers", why: "audit.headers of each node's configuration names them"},
		{ops: reads, path: "sys/config/cors", why: "no origin is allowed, so no browser of another site is answered"},
		{ops: reads, path: "sys/raw/:path", why: "nothing reads or writes below the tables of the state"},
	}},
	{"Known to clients and not in the contract", []endpoint{
		{ops: writes, path: "sys/rekey/init", why: "there are no shares of a key to make anew"},
		{ops: writes, path: "sys/generate-root/attempt", why: "there are no shares of a key to prove; the first token is in bootstrap_token_file"},
		{ops: reads, path: "sys/replication/status", why: "one cluster is all there is"},
		{ops: reads, path: "sys/license/status", why: "there is none"},
		{ops: reads, path: "sys/host-info", why: "sys/metrics tells of the process, and the host is somebody else's to watch"},
		{ops: reads, path: "sys/monitor", why: "the log goes to standard error"},
		{ops: reads, path: "sys/pprof/heap", why: "profiles hold secrets"},
		{ops: lists, path: "sys/quotas/rate-limit", why: "limits are fixed; what is in front may have more"},
		{ops: lists, path: "sys/policies/password", why: "passwords are made by plugins, which get them from the library that they are built with"},
		{ops: lists, path: "identity/entity", why: "tokens carry the entity that their auth method names, and there is no store of entities"},
		{ops: reads, path: "cubbyhole/x", why: "mount a kv plugin; wrapped answers are kept with their token"},
		{ops: writes, path: "sys/tools/random", why: "a node is not a source of randomness for others"},
	}},
}

// sampleOf is a path of the contract with something in its captures.
func sampleOf(path string) string {
	if path == "sys/plugins/catalog/:name" {
		return "sys/plugins/catalog/kv"
	}
	return strings.NewReplacer(":type", "secret", ":name", "kv", ":path", "kv", ":id", "some-id", ":prefix", "kv/creds", ":role", "r").Replace(path)
}

func verbs(ops []operation) string {
	var out []string
	for _, op := range ops {
		v := map[operation]string{opRead: "GET", opList: "LIST", opUpdate: "POST, PUT", opDelete: "DELETE", opPatch: "PATCH", opHead: "HEAD"}[op]
		out = append(out, v)
	}
	return strings.Join(out, ", ")
}

// judge says what becomes of an endpoint, and holds it against the answer that a client gets.
func judge(t *testing.T, e endpoint) string {
	t.Helper()
	path := sampleOf(e.path)
	verdict := ""
	for _, op := range e.ops {
		w := newWorld(t)
		w.mount("", "kv/")
		what := string(op) + " " + path
		rt, _ := w.s.routes.find(path)
		a := w.try(rootToken, op, path)
		now := "served"
		switch {
		case rt == nil:
			now = "left out: " + e.why
			if e.why == "" {
				t.Errorf("%s: no route serves it, and nothing says why", what)
			}
			if a.status != http.StatusNotFound || !strings.Contains(a.text, "unsupported path") {
				t.Errorf("%s: %d %s", what, a.status, a.text)
			}
		case rt.refused != "" && op != opRead || e.says != "": // what is refused is read as nothing there
			now = "refused: " + cmp.Or(rt.refused, "400, with the words \""+e.says+"\"")
			text := strings.TrimPrefix(strings.TrimPrefix(rt.refused, "400 "), "400: ")
			if says := cmp.Or(e.says, text[:min(len(text), 12)]); a.status != http.StatusBadRequest || !strings.Contains(a.text, says) {
				t.Errorf("%s: %d %s, want 400 with %q", what, a.status, a.text, says)
			}
		case rt.ops[op] == nil:
			t.Errorf("%s: its route does not know the operation", what)
		case a.status == http.StatusMethodNotAllowed || strings.Contains(a.text, "unsupported path"):
			t.Errorf("%s: %d %s", what, a.status, a.text)
		}
		if verdict != "" && verdict != now {
			t.Errorf("%s: %s, and another operation: %s; give them lines of their own", what, now, verdict)
		}
		verdict = now
	}
	return verdict
}

// TestTheTableOfEndpointsIsWhatIsServed calls every endpoint of the contract, and keeps ENDPOINTS.md equal to what came of it and to
// the route table.
func TestTheTableOfEndpointsIsWhatIsServed(t *testing.T) {
	var b bytes.Buffer
	b.WriteString(`# Endpoints

Generated by ` + "`go test ./node/httpd -run TestTheTableOfEndpoints -update`" + `, which calls each of them. Paths are below ` + "`/v1/`" + `; ` + "`?help=1`" + ` works on
every path of ours and is handed to the plugin on paths of mounts. What is left out answers 404 ` + "`unsupported path`" + `.

## The contract of Vault and OpenBao

`)
	named := map[string]bool{}
	for _, s := range contract {
		fmt.Fprintf(&b, "### %s\n\n| methods | path | | note |\n|---|---|---|---|\n", s.section)
		for _, e := range s.endpoints {
			fmt.Fprintf(&b, "| %s | `%s` | %s | %s |\n", verbs(e.ops), e.path, judge(t, e), e.note)
			if rt, _ := newWorld(t).s.routes.find(sampleOf(e.path)); rt != nil {
				for _, op := range e.ops {
					named[rt.pattern+" "+string(op)] = true
				}
			}
		}
		b.WriteByte('\n')
	}
	b.WriteString("## Every route\n\n| path | methods | needs | | |\n|---|---|---|---|---|\n")
	routes := slices.Clone(newWorld(t).s.routes.routes)
	slices.SortFunc(routes, func(x, y *route) int { return cmp.Compare(x.pattern, y.pattern) })
	for _, r := range routes {
		needs := map[access]string{open: "nothing", withToken: "a token", withSudo: "sudo"}[r.access]
		var marks []string
		for mark, is := range map[string]bool{
			"root namespace only": r.rootOnly, "answers without a leader": r.anyNode, "ours alone": r.ours, "reads are not audited": r.quiet,
		} {
			if is {
				marks = append(marks, mark)
			}
		}
		slices.Sort(marks)
		if r.refused != "" {
			marks = append(marks, "refused: "+r.refused)
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s |\n", r.pattern, verbs(slices.Sorted(maps.Keys(r.ops))), needs, r.summary, strings.Join(marks, "; "))
		if r.summary == "" {
			t.Errorf("%s has no summary", r.pattern)
		}
		for op := range r.ops { // a route that is ours alone needs no line in the contract; any other does
			if !r.ours && !named[r.pattern+" "+string(op)] && !slices.Contains(beside, r.pattern+" "+string(op)) {
				t.Errorf("%s %s is served, is not marked as ours alone, and stands in no line of the contract", op, r.pattern)
			}
		}
	}
	const file = "ENDPOINTS.md"
	if *update {
		if err := os.WriteFile(file, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(want, b.Bytes()) {
		t.Errorf("%s is not what is served; write it anew with -update, and look at the difference", file)
	}
}

// beside are operations that routes of the contract serve besides, for the clients that use the other verb or the other name.
var beside = []string{
	"auth/token/lookup read", "auth/token/lookup-self update", "sys/internal/specs/openapi update", "sys/leases/lookup list",
	"sys/leases/renew/{lease_id...} update", "sys/leases/revoke/{lease_id...} update", "sys/renew/{lease_id...} update",
	"sys/revoke/{lease_id...} update",
}
