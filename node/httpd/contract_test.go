package httpd

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"rollcall/node/api"
	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
	pluginpb "rollcall/proto/plugin"
)

// row is one request and what the contract says of its answer.
type row struct {
	method, path, body string
	status             int
	holds              string
}

func (w *world) rows(t *testing.T, rows []row) {
	t.Helper()
	for _, r := range rows {
		a := w.call(r.method, r.path, r.body)
		if a.status != r.status || !strings.Contains(a.text, r.holds) {
			t.Errorf("%s %s %.60s: %d %s, want %d %s", r.method, r.path, r.body, a.status, a.text, r.status, r.holds)
		}
	}
}

// reg is a registration's body.
func reg(version string) string {
	return fmt.Sprintf(`{"sha256":"%s","command":"kv","version":%q}`, strings.Repeat("ab", 32), version)
}

func TestTheCatalogAnswersAsTheContractSays(t *testing.T) {
	w := newWorld(t)
	w.rows(t, []row{
		{"GET", "sys/plugins/catalog", "", 200, `"auth":[],"database":[],"detailed":[],"kms":[],"secret":[]`},
		{"PUT", "sys/plugins/catalog/secret/kv", reg(""), 204, ""},
		{"POST", "sys/plugins/catalog/secret/kv", reg("1.0.0"), 204, ""},
		{"PUT", "sys/plugins/catalog/secret/kv2", `{"type":3,"sha256":"` + strings.Repeat("ab", 32) + `","command":"kv"}`, 204, ""},
		{"GET", "sys/plugins/catalog", "", 200, `"secret":["kv","kv2"]`},
		{"GET", "sys/plugins/catalog/secret/kv", "", 200, `"args":[],"builtin":false,"command":"kv","name":"kv"`},
		{"GET", "sys/plugins/catalog/secret/kv?version=v1.0.0", "", 200, `"version":"v1.0.0"`},
		{"GET", "sys/plugins/catalog/secret/kv?version=v9.0.0", "", 404, `{"errors":[]}`},
		{"GET", "sys/plugins/catalog/secret/nope", "", 404, `{"errors":[]}`},
		{"LIST", "sys/plugins/catalog/secret", "", 200, `"keys":["kv","kv2"]`},
		{"GET", "sys/plugins/catalog/secret?list=true", "", 200, `"keys":["kv","kv2"]`},
		{"GET", "sys/plugins/catalog/secret/?list=true", "", 200, `"keys":["kv","kv2"]`},
		{"GET", "sys/plugins/catalog/secret", "", 405, `unsupported operation`},
		{"LIST", "sys/plugins/catalog", "", 405, `unsupported operation`},
		{"PUT", "sys/plugins/catalog/secret/kv", `{"version":"abc","sha256":"x","command":"c"}`, 400, `version \"abc\" is not a valid semantic version: malformed version: abc`},
		{"PUT", "sys/plugins/catalog/secret/kv", `{"version":"v1.0.0+builtin","sha256":"x","command":"c"}`, 400, `'builtin' is a reserved metadata identifier`},
		{"PUT", "sys/plugins/catalog/secret/kv", `{"sha256":"zz","command":"c"}`, 400, `Could not decode SHA-256 value from Hex`},
		{"PUT", "sys/plugins/catalog/secret/kv", `{"command":"c"}`, 400, `must provide at least one of sha256 or version`},
		{"PUT", "sys/plugins/catalog/secret/kv", `{"sha256":"` + strings.Repeat("ab", 32) + `"}`, 400, `must provide at least one of command or oci_image`},
		{"PUT", "sys/plugins/catalog/secret/kv", `{"sha256":"` + strings.Repeat("ab", 32) + `","command":"a b","args":["c"]}`, 400, `must not specify args in command and args field`},
		{"PUT", "sys/plugins/catalog/secret/kv", `{"sha256":"` + strings.Repeat("ab", 32) + `","command":"../evil"}`, 400, `parent references`},
		{"PUT", "sys/plugins/catalog/secret/kv", `{"download":true,"sha256":"` + strings.Repeat("ab", 32) + `","command":"a"}`, 400, `download is not supported`},
		{"PUT", "sys/plugins/catalog/fruit/kv", reg(""), 400, `as a plugin type`},
		{"GET", "sys/plugins/catalog/legacy", "", 200, `Deprecated API endpoint, cannot read plugin information from catalog for \"legacy\"`},
		{"DELETE", "sys/plugins/catalog/legacy", "", 200, `cannot deregister plugin`},
		{"PUT", "sys/plugins/catalog/legacy", `{"type":"secret","sha256":"` + strings.Repeat("ab", 32) + `","command":"a"}`, 204, ""},
		{"DELETE", "sys/plugins/catalog/secret/nope?version=", "", 204, ""},
		{"GET", "sys/plugins/pins", "", 200, `"pinned_versions":[]`},
		{"PUT", "sys/plugins/pins/secret/kv", `{}`, 400, "missing plugin version"},
		{"PUT", "sys/plugins/pins/secret/kv", `{"version":"v9.9.9"}`, 400, "plugin not found in the catalog"},
		{"PUT", "sys/plugins/pins/secret/kv", `{"version":"v1.0.0"}`, 200, `"data":null`},
		{"GET", "sys/plugins/pins/secret/kv", "", 200, `"version":"v1.0.0"`},
		{"DELETE", "sys/plugins/pins/secret/kv", "", 200, ""},
		{"GET", "sys/plugins/pins/secret/kv", "", 404, `1 error occurred:\n\t* no pinned version for this plugin\n\n`},
		{"GET", "sys/plugins/runtimes/catalog", "", 200, `"runtimes":[]`},
		{"LIST", "sys/plugins/runtimes/catalog", "", 200, `"runtimes":[]`},
		{"GET", "sys/plugins/runtimes/catalog/container/x", "", 404, `{"errors":[]}`},
		{"PUT", "sys/plugins/runtimes/catalog/container/x", `{"cpu_nanos":1}`, 400, "container plugins are not supported"},
	})
}

func TestMountsAnswerAsTheContractSays(t *testing.T) {
	w := newWorld(t)
	w.call("PUT", "sys/plugins/catalog/secret/kv", reg("")).want(t, 204)
	w.call("PUT", "sys/plugins/catalog/auth/jwt", reg("")).want(t, 204)
	w.rows(t, []row{
		{"GET", "sys/mounts", "", 200, `"data":{}`},
		{"POST", "sys/mounts/kv", `{}`, 400, "backend type must be specified as a string"},
		{"POST", "sys/mounts/kv", `{"type":"nope"}`, 400, "plugin not found in the catalog: nope"},
		{"POST", "sys/mounts/kv", `{"type":"kv","config":{"plugin_version":"v7.7.7"}}`, 400, "plugin not found in the catalog: kv, version=v7.7.7"},
		{"POST", "sys/mounts/sys/x", `{"type":"kv"}`, 400, `cannot mount \"sys/x/\"`},
		{"POST", "sys/mounts/kv", `{"type":"jwt"}`, 400, `unknown backend type: \"jwt\"`},
		{"POST", "sys/mounts/kv", `{"type":"kv","config":{"default_lease_ttl":"2h","max_lease_ttl":"1h"}}`, 400, "given default lease TTL greater than given max lease TTL"},
		{"POST", "sys/mounts/kv", `{"type":"kv","description":"d","options":{"version":2},"config":{"default_lease_ttl":"30m"}}`, 204, ""},
		{"POST", "sys/mounts/kv", `{"type":"kv"}`, 400, "path is already in use at kv/"},
		{"POST", "sys/mounts/kv/below", `{"type":"kv"}`, 400, "path is already in use at kv/"},
		{"GET", "sys/mounts/kv", "", 200, `"options":{"version":"2"}`},
		{"GET", "sys/mounts/kv", "", 200, `"default_lease_ttl":1800`},
		{"GET", "sys/mounts/nah", "", 400, "No secret engine mount at nah/"},
		{"GET", "sys/auth/nah", "", 400, "No auth engine at nah/"},
		{"POST", "sys/auth/jwt", `{"type":"plugin","plugin_name":"jwt"}`, 204, ""},
		{"GET", "sys/auth/jwt", "", 200, `"type":"jwt"`},
		{"GET", "sys/mounts/auth/jwt", "", 200, `"type":"jwt"`},
		{"POST", "sys/mounts/auth/jwt2", `{"type":"kv"}`, 400, `cannot mount \"auth/jwt2/\"`},
		{"DELETE", "sys/mounts/auth/jwt", "", 204, ""},
		{"GET", "sys/auth/jwt", "", 200, `"type":"jwt"`},
		{"POST", "sys/mounts/auth/jwt/tune", `{"description":"f"}`, 204, ""},
		{"GET", "sys/mounts/kv/deep/er", "", 200, `"type":"kv"`},
		{"GET", "sys/mounts/kv/tune", "", 200, `"max_lease_ttl":2764800`},
		{"GET", "sys/mounts/nah/tune", "", 400, `cannot fetch sysview for path \"nah/\"`},
		{"POST", "sys/mounts/kv/tune", `{"description":"e","max_lease_ttl":"1h"}`, 204, ""},
		{"GET", "sys/mounts/kv/tune", "", 200, `"max_lease_ttl":3600`},
		{"POST", "sys/mounts/kv/tune", `{"plugin_version":""}`, 400, "not a valid semantic version"},
		{"POST", "sys/mounts/kv/tune", `{"plugin_version":"v5.0.0"}`, 400, "plugin not found in the catalog"},
		{"GET", "sys/internal/ui/mounts/kv/some/path", "", 200, `"path":"kv/"`},
		{"GET", "sys/internal/ui/mounts/zzz", "", 403, `preflight capability check returned 403, please ensure client's policies grant access to path \"zzz/\"`},
		{"POST", "sys/remount", `{"from":"kv"}`, 400, "both 'from' and 'to' path must be specified as a string"},
		{"POST", "sys/remount", `{"from":"nah","to":"x"}`, 400, `no matching mount at \"nah/\"`},
		{"POST", "sys/remount", `{"from":"kv","to":"kv"}`, 400, `path already in use at \"kv/\"`},
		{"DELETE", "sys/mounts/nah", "", 204, ""},
		{"PATCH", "sys/mounts/kv", `{}`, 415, "merge-patch"},
	})
	moved := w.call("POST", "sys/remount", `{"from":"kv","to":"kv2"}`).want(t, 200, "migration_id", "queued")
	id, _ := moved.data()["migration_id"].(string)
	w.call("GET", "sys/remount/status/"+id, "").want(t, 200, `"source_mount":"kv/"`, `"target_mount":"kv2/"`, `"status":"success"`)
	w.call("GET", "sys/remount/status/unknown", "").want(t, 404, `{"errors":[]}`)
	w.call("DELETE", "sys/mounts/kv2", "").want(t, 204)
	w.call("GET", "sys/mounts/kv2", "").want(t, 400, "No secret engine mount at kv2/")
}

// TestOldClientsFindDataAtTheTopLevelToo is the contract's list of doubled paths.
func TestOldClientsFindDataAtTheTopLevelToo(t *testing.T) {
	w := newWorld(t)
	w.mount("", "kv/")
	w.mount("", "auth/jwt/")
	for path, key := range map[string]string{
		"sys/mounts": "kv/", "sys/mounts/kv": "uuid", "sys/mounts/kv/tune": "max_lease_ttl", "sys/auth": "jwt/", "sys/auth/jwt": "uuid",
		"sys/policy": "policies", "sys/policy/default": "rules", "sys/ha-status": "nodes",
	} {
		a := w.call("GET", path, "").want(t, 200)
		if a.json[key] == nil || a.data()[key] == nil {
			t.Errorf("%s: %q is not in both places: %s", path, key, a.text)
		}
		if a.json["request_id"] == "" {
			t.Errorf("%s: the envelope's own keys are gone: %s", path, a.text)
		}
	}
	a := w.call("POST", "sys/capabilities-self", `{"path":"kv/x"}`).want(t, 200)
	if a.json["kv/x"] == nil || a.json["capabilities"] == nil {
		t.Error(a.text)
	}
	for _, path := range []string{"sys/plugins/catalog", "sys/policies/acl?list=true"} {
		if a := w.call("GET", path, ""); len(a.json) != 8 {
			t.Errorf("%s: %d keys at the top level: %s", path, len(a.json), a.text)
		}
	}
}

func TestTheEnvelopeIsAsClientsParseIt(t *testing.T) {
	w := newWorld(t)
	w.mount("", "kv/")
	a := w.call("GET", "kv/x", "").want(t, 200, `"lease_id":""`, `"renewable":false`, `"lease_duration":0`, `"wrap_info":null`, `"warnings":null`, `"auth":null`)
	if id, _ := a.json["request_id"].(string); len(id) != 36 {
		t.Error(a.text)
	}
	h := a.header
	for k, v := range map[string]string{
		"Cache-Control": "no-store", "Content-Type": "application/json", api.HeaderNode: "node-1", api.HeaderGeneration: "7",
		"Strict-Transport-Security": "max-age=31536000; includeSubDomains",
	} {
		if h.Get(k) != v {
			t.Errorf("%s is %q, want %q", k, h.Get(k), v)
		}
	}
	// Without a Content-Type, with another, and as a form.
	w.call("PUT", "kv/x", `{"a":1}`, "Content-Type", "").want(t, 200, `"body":{"a":1}`)
	w.call("POST", "kv/x", `{"a":1}`, "Content-Type", "application/x-www-form-urlencoded").want(t, 200, `"body":{"a":1}`)
	w.call("POST", "kv/x", `a=1&b=2&b=3`, "Content-Type", "application/x-www-form-urlencoded").want(t, 200, `"body":{"a":"1","b":["2","3"]}`)
	w.call("PUT", "kv/x", "").want(t, 200, `"body":{}`)
	w.call("GET", "kv/x?b=1&b=2&a=3", "").want(t, 200, `"body":{"a":"3","b":["1","2"]}`)
	w.call("DELETE", "kv/x?version=2", "").want(t, 200, `"op":"delete"`, `"body":{"version":"2"}`)
	w.call("PATCH", "kv/x", `{"a":null}`, "Content-Type", "application/merge-patch+json").want(t, 200, `"op":"patch"`)
	w.call("PATCH", "kv/x", `{}`, "Content-Type", "application/json").want(t, 415)
	w.call("LIST", "kv/dir", "").want(t, 200, `"op":"list"`, `"path":"kv/dir/"`)
	w.call("GET", "kv/dir?list=true", "").want(t, 200, `"op":"list"`, `"path":"kv/dir/"`)
	w.call("GET", "kv/dir?list=false", "").want(t, 200, `"op":"read"`)
	w.call("GET", "kv/dir?list=foo", "").want(t, 400, `{"errors":[]}`)
	w.call("PUT", "kv/dir/", `{}`).want(t, 400, "cannot write to a path ending in '/'")
	w.call("HEAD", "kv/x", "").want(t, 405)
	w.call("OPTIONS", "kv/x", "").want(t, 400, `{"errors":[]}`)
	w.call("BREW", "kv/x", "").want(t, 405, `{"errors":[]}`)
	w.call("GET", "nomount/x", "").want(t, 404, `no handler for route \"nomount/x\". route entry not found.`)
	w.call("GET", "sys/nope", "").want(t, 404, `1 error occurred:\n\t* unsupported path\n\n`)
	w.call("GET", "sys/mounts", "", "Authorization", "Bearer "+rootToken, api.HeaderToken, "").want(t, 200)
	w.call("GET", "sys/mounts", "", "Authorization", "bearer "+rootToken, api.HeaderToken, "").want(t, 200)
	w.call("GET", "sys/mounts", "", "Authorization", "Basic "+rootToken, api.HeaderToken, "").want(t, 403, `"permission denied"`)
	for _, h := range []string{"X-Vault-Policy-Override", "X-Vault-MFA", "X-Vault-Inconsistent", "X-Vault-Index", "X-Vault-Forward", "X-Vault-Options"} {
		w.call("GET", "kv/x", "", h, "whatever").want(t, 200)
	}
}

func TestPathsThatAreNotCleanAreRedirected(t *testing.T) {
	w := newWorld(t)
	w.mount("", "kv/")
	for path, want := range map[string]string{
		"kv//x": "/v1/kv/x", "kv/./x": "/v1/kv/x", "kv/a/../x": "/v1/kv/x", "kv/%2e%2e/sys/mounts": "/v1/sys/mounts", "/kv/x": "/v1/kv/x",
		"kv//x?version=1": "/v1/kv/x?version=1", "kv/a%2f%2fb": "/v1/kv/a/b", "kv//dir/": "/v1/kv/dir/",
	} {
		a := w.call("GET", path, "")
		if a.status != http.StatusTemporaryRedirect || a.header.Get("Location") != want {
			t.Errorf("%s: %d to %q, want %q", path, a.status, a.header.Get("Location"), want)
		}
	}
	if w.router.last() != nil {
		t.Error("a path that is not clean was routed")
	}
	w.call("GET", "kv/a%00b", "").want(t, 400, "control character")
	w.call("GET", "kv/a%0ab", "").want(t, 400, "control character")
	w.call("GET", "kv/%ff", "").want(t, 400, "not UTF-8")
	w.call("GET", "kv/"+strings.Repeat("x", 5000), "").want(t, 400, "longer than")
	w.call("GET", "kv/a%2fb", "").want(t, 200, `"path":"kv/a/b"`)
}

// TestBadInputIsRefusedInWords: always a 4xx in the contract's shape, and nothing runs.
func TestBadInputIsRefusedInWords(t *testing.T) {
	w := newWorld(t)
	w.mount("", "kv/")
	w.call("PUT", "sys/plugins/catalog/secret/kv", reg("v1.0.0")).want(t, 204)
	before := w.fsm.View().Index()
	huge := `{"a":"` + strings.Repeat("x", MaxSysBody) + `"}`
	for _, c := range []struct {
		method, path, body string
		status             int
		holds              string
	}{
		{"PUT", "kv/x", `{`, 400, "failed to parse JSON input"},
		{"PUT", "kv/x", `{"a":1}x`, 400, "failed to parse JSON input"},
		{"PUT", "kv/x", `[1]`, 400, "must be a JSON object"},
		{"PUT", "kv/x", `"a"`, 400, "must be a JSON object"},
		{"PUT", "kv/x", `{"a":NaN}`, 400, "failed to parse JSON input"},
		{"PUT", "kv/x", "\ufeff{}", 400, "must be a JSON object"},
		{"PUT", "kv/x", strings.Repeat(`{"a":`, 100_000), 400, "nested deeper"},
		{"PUT", "kv/x", `{"a":` + strings.Repeat("[", 70) + strings.Repeat("]", 70) + `}`, 400, "nested deeper"},
		{"PUT", "sys/policies/acl/p", huge, 413, "http: request body too large"},
		{"PUT", "sys/policies/acl/p", `{"policy":{"a":1}}`, 400, "Field validation failed: error converting input for field"},
		{"PUT", "sys/policies/acl/p", `{"policy":"path \"a\" {"}`, 400, "failed to parse policy: "},
		{"PUT", "sys/policies/acl/p", `{}`, 400, "'policy' parameter not supplied or empty"},
		{"PUT", "sys/policies/acl/ROOT", `{"policy":"path \"a\" {}"}`, 400, `cannot update \"root\" policy`},
		{"PUT", "sys/policies/acl/%20root", `{"policy":"path \"a\" {}"}`, 400, `cannot update \"root\" policy`},
		{"DELETE", "sys/policies/acl/Root", "", 400, `cannot delete \"root\" policy`},
		{"DELETE", "sys/policies/acl/default", "", 400, `cannot delete \"default\" policy`},
		{"POST", "sys/mounts/a/..b/../c", `{"type":"kv"}`, 307, ""},
		{"POST", "sys/mounts/..", `{"type":"kv"}`, 307, ""},
		{"POST", "sys/mounts/kv3", `{"type":7,"config":[]}`, 400, "Field validation failed"},
		{"POST", "sys/mounts/kv3", `{"type":"kv","options":[1]}`, 400, "Field validation failed"},
		{"POST", "sys/mounts/kv3", `{"type":"kv","local":"maybe"}`, 400, "Field validation failed"},
		{"POST", "sys/mounts/kv3", `{"type":"kv","config":{"default_lease_ttl":"soon"}}`, 400, "Field validation failed"},
		{"POST", "sys/mounts/kv3", `{"type":"kv","config":{"default_lease_ttl":-1}}`, 400, "Field validation failed"},
		{"POST", "sys/mounts/kv3", `{"type":"kv","config":{"listing_visibility":"all"}}`, 400, "listing_visibility"},
		{"PUT", "sys/plugins/catalog/secret/a%2fb", reg(""), 404, "unsupported path"},
		{"PUT", "sys/plugins/catalog/secret/a%20b", reg(""), 400, ""},
		{"PUT", "sys/plugins/reload/backend", `{"plugin":"kv","scope":"galaxy"}`, 400, "reload scope must be omitted or 'global'"},
		{"PUT", "sys/plugins/reload/backend", `{"plugin":"kv","mounts":["kv"]}`, 400, "plugin and mounts cannot be set at the same time"},
		{"PUT", "sys/plugins/reload/backend", `{}`, 400, "plugin or mounts must be provided"},
		{"PUT", "sys/plugins/reload/backend", `{"plugin":"nope"}`, 400, `plugin not found in the catalog: \"nope\"`},
		{"PUT", "sys/plugins/reload/backend", `{"mounts":["nah"]}`, 400, "cannot fetch mount entry on"},
		{"PUT", "sys/plugins/reload/backend", `{"mounts":[1]}`, 400, "Field validation failed"},
		{"PUT", "sys/plugins/reload/fruit/kv", `{}`, 404, `1 error occurred:\n\t* unsupported path\n\n`},
		{"PUT", "sys/plugins/reload/secret/-x", `{}`, 404, "unsupported path"},
		{"PUT", "sys/plugins/reload/unknown", `{}`, 400, "set one (-namespace=root) to reload by mount"},
		{"PUT", "sys/plugins/reload/unknown/kv", `{"strategy":"hope"}`, 400, "strategy must be"},
		{"PUT", "sys/plugins/reload/unknown/kv", `{"reload_id":"a|b"}`, 400, "reload_id must be"},
		{"PUT", "sys/plugins/plan", `{"plugin":"kv","typo":1}`, 400, `unknown field \"typo\"`},
		{"GET", "sys/plugins/reload/backend", "", 405, "unsupported operation"},
		{"LIST", "sys/plugins/reload/backend", "", 405, "unsupported operation"},
		{"GET", "sys/plugins/reload/backend/status", "", 400, "reload_id must be provided"},
		{"GET", "sys/plugins/reload/backend/status?reload_id=x", "", 404, `no reload with id \"x\"`},
		{"GET", "sys/health?standbyok=perhaps", "", 400, "boolean"},
		{"GET", "sys/health?activecode=ok", "", 400, "status code"},
		{"POST", "auth/token/create", `{"ttl":"long"}`, 400, "Field validation failed"},
		{"POST", "auth/token/create", `{"num_uses":-1}`, 400, "number of uses cannot be negative"},
		{"POST", "auth/token/create", `{"type":"batch"}`, 400, "service token"},
		{"POST", "auth/token/create", `{"id":"a.b"}`, 400, "custom token ID"},
		{"POST", "auth/token/create", `{"policies":["response-wrapping"]}`, 400, "cannot assign policy"},
		{"POST", "auth/token/create/role", `{}`, 400, "unknown role role"},
		{"POST", "auth/token/lookup-accessor", `{"accessor":"nope"}`, 403, "invalid accessor"},
		{"POST", "auth/token/lookup", `{"token":"nope"}`, 403, "bad token"},
		{"POST", "auth/token/renew", `{"token":"nope"}`, 400, "token not found"},
		{"POST", "auth/token/renew-self", `{}`, 400, "not renewable"},
		{"PUT", "sys/leases/renew", `{"lease_id":"nope"}`, 400, "lease not found"},
		{"PUT", "sys/leases/renew", `{}`, 400, "lease_id must be specified"},
		{"PUT", "sys/leases/lookup", `{"lease_id":"nope"}`, 400, "invalid lease"},
		{"POST", "sys/namespaces/sys", `{}`, 400, "reserved"},
		{"POST", "sys/namespaces/kv", `{}`, 400, "path is already in use"},
		{"POST", "sys/namespaces/a/b", `{}`, 400, "parent namespace"},
		{"POST", "sys/namespaces/team", `{"custom_metadata":[1]}`, 400, "Field validation failed"},
		{"POST", "sys/wrapping/wrap", `{"a":1}`, 400, "requires response wrapping"},
		{"POST", "sys/wrapping/unwrap", `{"token":"nope"}`, 400, "wrapping token is not valid or does not exist"},
		{"POST", "sys/storage/raft/join", `{"leader_api_addr":"http://x"}`, 400, "nodes join by themselves"},
		{"POST", "sys/storage/raft/remove-peer", `{}`, 400, "no server id provided"},
		{"POST", "sys/storage/raft/snapshot", "not a backup", 400, "not a backup"},
		{"POST", "sys/storage/raft/autopilot/configuration", `{"min_quorum":5}`, 400, "configuration file"},
		{"PUT", "sys/audit/file", `{"type":"file","options":{"file_path":"/etc/passwd"}}`, 400, "configuration file only"},
		{"PUT", "sys/init", `{"secret_shares":1}`, 400, "Vault is already initialized"},
		{"PUT", "sys/seal", "", 400, "cannot be sealed"},
	} {
		a := w.call(c.method, c.path, c.body)
		if a.status != c.status || !strings.Contains(a.text, c.holds) {
			t.Errorf("%s %s %.50s: %d %.300s, want %d %s", c.method, c.path, c.body, a.status, a.text, c.status, c.holds)
		}
		var body api.ErrorBody
		if c.status != 307 && (json.Unmarshal([]byte(a.text), &body) != nil || body.Errors == nil || len(body.Errors) > 1) {
			t.Errorf("%s %s: not the contract's error shape: %s", c.method, c.path, a.text)
		}
	}
	if now := w.fsm.View(); len(now.Mounts()) != 1 || len(now.Namespaces()) != 0 || len(now.Policies("")) != 0 || now.TokenCount() != 1 {
		t.Errorf("something was changed between %d and %d", before, now.Index())
	}
}

func TestUnknownFieldsAreWarnedAboutOnContractPaths(t *testing.T) {
	w := newWorld(t)
	w.mount("", "kv/")
	w.call("POST", "sys/capabilities-self", `{"path":"a","zeal":1,"apple":2}`).
		want(t, 200, `Endpoint ignored these unrecognized parameters: [apple zeal]`)
	w.call("POST", "sys/namespaces/team", `{"name":"x"}`).want(t, 200, `[name]`)
	a := w.call("POST", "auth/token/create", `{"policies":["p"],"ttl":"1h"}`).want(t, 200)
	if a.json["warnings"] != nil {
		t.Error(a.text)
	}
}

func TestHealthAnswersWithTheCodesThatAreAskedFor(t *testing.T) {
	w := newWorld(t)
	check := func(path string, status int) {
		t.Helper()
		for _, m := range []string{"GET", "HEAD"} {
			a := w.call(m, path, "", api.HeaderToken, "")
			if a.status != status || m == "HEAD" && a.text != "" || m == "GET" && !strings.Contains(a.text, `"version":"1.21.0"`) {
				t.Errorf("%s %s: %d %s, want %d", m, path, a.status, a.text, status)
			}
		}
	}
	check("sys/health", 200)
	check("sys/health?activecode=299", 299)
	w.cluster.leader = false
	check("sys/health", 429)
	check("sys/health?standbycode=299", 299)
	check("sys/health?standbyok=true", 200)
	check("sys/health?perfstandbyok", 200)
	check("sys/health?performancestandbycode=298", 298)
	w.serving = fault.Text(fault.Fenced, "cut off")
	check("sys/health", 503)
	check("sys/health?sealedcode=299", 299)
	w.call("GET", "sys/health?sealedcode=299", "").want(t, 299, `"fenced":true`, "cut off")
	w.call("PUT", "sys/health", "").want(t, 405)
}

func TestClusterPathsAnswerAsTheContractSays(t *testing.T) {
	w := newWorld(t)
	w.rows(t, []row{
		{"GET", "sys/seal-status", "", 200, `"sealed":false`},
		{"PUT", "sys/unseal", `{"key":"x"}`, 200, `"sealed":false`},
		{"GET", "sys/init", "", 200, `"initialized":true`},
		{"GET", "sys/leader", "", 200, `"leader_address":"http://node-2:8200"`},
		{"GET", "sys/leader", "", 200, `"active_time":"0001-01-01T00:00:00Z"`},
		{"SCAN", "kv/x", "", 405, `1 error occurred:\n\t* unsupported operation\n\n`},
		{"GET", "kv/x?scan=true", "", 405, `1 error occurred:\n\t* unsupported operation\n\n`},
		{"GET", "sys/storage/raft/configuration", "", 200, `"protocol_version":"3"`},
		{"GET", "sys/storage/raft/autopilot/state", "", 200, `"last_contact":"0s"`},
		{"GET", "sys/storage/raft/autopilot/configuration", "", 200, `"last_contact_threshold":"10s"`},
		{"POST", "sys/storage/raft/autopilot/configuration", `{"last_contact_threshold":"10s","max_trailing_logs":1000}`, 204, ""},
		{"POST", "sys/storage/raft/remove-peer", `{"server_id":"node-1"}`, 204, ""},
		{"PUT", "sys/step-down", "", 204, ""},
		{"GET", "sys/members", "", 200, `"name":"gone"`},
		{"GET", "sys/version-history?list=true", "", 200, `"keys":["1.21.0"]`},
		{"LIST", "sys/version-history", "", 200, `"previous_version":null`},
		{"GET", "sys/audit", "", 200, `"data":{}`},
		{"GET", "sys/metrics", "", 200, "rollcall_http_requests_in_flight"},
		{"GET", "sys/metrics?format=prometheus", "", 200, "# HELP"},
		{"GET", "sys/metrics?format=json", "", 200, `"Gauges":[`},
		{"GET", "sys/leases/count", "", 200, `"lease_count":0`},
	})
	w.s.Gatherer = nil
	w.call("GET", "sys/metrics", "").want(t, 400, "prometheus is not enabled")
	if w.cluster.steps != 1 {
		t.Error("step-down did not reach the cluster")
	}
}

func TestEveryPathHasHelpAndADescription(t *testing.T) {
	w := newWorld(t)
	w.mount("", "kv/")
	w.call("GET", "sys/mounts?help=1", "").want(t, 200, `"help":"## sys/mounts`, `"see_also":null`)
	a := w.call("GET", "sys/internal/specs/openapi", "").want(t, 200, `"openapi":"3.0.2"`)
	paths, _ := a.json["paths"].(map[string]any)
	seen := map[string]bool{}
	for _, r := range w.s.routes.routes {
		item, _ := paths["/"+strings.ReplaceAll(r.pattern, "...}", "}")].(map[string]any)
		if item == nil || r.summary == "" {
			t.Errorf("%s is not described", r.pattern)
		}
		for method, v := range item {
			e, ok := v.(map[string]any)
			if !ok || e["operationId"] == nil {
				continue
			}
			id, _ := e["operationId"].(string)
			if seen[id] {
				t.Errorf("%s %s: operation id %s twice", method, r.pattern, id)
			}
			seen[id] = true
		}
		for op := range r.ops {
			if op != opHead && item[methodOf[op]] == nil {
				t.Errorf("%s: %s is not described", r.pattern, op)
			}
		}
	}
}

func TestASnapshotIsAnArchiveThatComesBackWhole(t *testing.T) {
	w := newWorld(t)
	w.mount("", "kv/")
	a := w.call("GET", "sys/storage/raft/snapshot", "").want(t, 200)
	zip, err := gzip.NewReader(strings.NewReader(a.text))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	files := map[string][]byte{}
	for r := tar.NewReader(zip); ; {
		h, err := r.Next()
		if err != nil {
			break
		}
		names = append(names, h.Name)
		files[h.Name], _ = io.ReadAll(r)
	}
	// The stock clients look for the last name, not empty, as the sign that all of it came.
	if strings.Join(names, " ") != "meta.json state.bin SHA256SUMS SHA256SUMS.sealed" || len(files["SHA256SUMS.sealed"]) == 0 {
		t.Fatal(names)
	}
	w.call("POST", "sys/storage/raft/snapshot", a.text).want(t, 204)
	var want bytes.Buffer
	if err := w.fsm.View().WriteSnapshot(&want); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(w.cluster.restored, files["state.bin"]) || !bytes.Equal(w.cluster.restored, want.Bytes()) {
		t.Error("what was restored is not what was saved")
	}
	w.cluster.restored = nil
	for _, cut := range []int{10, len(a.text) / 2, len(a.text) - 12} {
		w.call("POST", "sys/storage/raft/snapshot", a.text[:cut]).want(t, 400)
	}
	damaged := []byte(a.text)
	damaged[len(damaged)/2] ^= 1
	w.call("POST", "sys/storage/raft/snapshot", string(damaged)).want(t, 400)
	if w.cluster.restored != nil {
		t.Error("a damaged backup was restored")
	}
}

func TestWhoWantsNoForwardingIsSentToTheLeader(t *testing.T) {
	w := newWorld(t)
	w.mount("", "kv/")
	w.cluster.leader = false
	w.router.handle = func(q *PluginRequest) (*PluginResponse, error) {
		if q.Operation == "update" && q.NoForward {
			return nil, fault.Text(fault.NotLeader, "this node does not lead")
		}
		return &PluginResponse{Plugin: &pluginpb.Response{Data: `{"a":1}`}}, nil
	}
	for _, path := range []string{"kv/x", "sys/policies/acl/p"} {
		a := w.call("PUT", path, `{"policy":"path \"a\" {}"}`, api.HeaderNoForward, "true").want(t, 307)
		if a.header.Get("Location") != "http://node-2:8200/v1/"+path {
			t.Errorf("%s: to %q", path, a.header.Get("Location"))
		}
	}
	w.call("GET", "kv/x", "", api.HeaderNoForward, "true").want(t, 200)
	w.call("PUT", "kv/x", "").want(t, 200)
}

func TestWhatOtherNodesKnowIsLookedForBeforeItIsRefused(t *testing.T) {
	w := newWorld(t)
	hash := w.fsm.View().HashToken("fresh")
	w.ahead = []*commandv1.Command{
		{Body: &commandv1.Command_PutNamespace{PutNamespace: &commandv1.PutNamespace{Namespace: &commandv1.Namespace{Path: "team/", Uuid: "u"}}}},
		{Body: &commandv1.Command_PutToken{PutToken: &commandv1.PutToken{Token: &commandv1.Token{Hash: hash, Accessor: "a", Policies: []string{"root"}}}}},
	}
	w.as("fresh", "GET", "sys/mounts", "", api.HeaderNamespace, "team").want(t, 200)

	w.mount("", "kv/")
	hash = w.fsm.View().HashToken("newer")
	w.ahead = []*commandv1.Command{{Body: &commandv1.Command_PutToken{PutToken: &commandv1.PutToken{
		Token: &commandv1.Token{Hash: hash, Accessor: "b", Policies: []string{"root"}},
	}}}}
	w.as("newer", "GET", "kv/x", "").want(t, 200)
	w.as("never", "GET", "kv/x", "").want(t, 403, `{"errors":["permission denied"]}`)
}

func TestPluginErrorsKeepTheirStatusAndText(t *testing.T) {
	w := newWorld(t)
	w.mount("", "kv/")
	for _, c := range []struct {
		err    error
		status int
		text   string
	}{
		{fault.Text(fault.Invalid, "bad input"), 400, `{"errors":["bad input"]}`},
		{fault.Text(fault.Internal, "boom"), 500, `1 error occurred:\n\t* boom\n\n`},
		{&fault.Error{Kind: fault.Invalid, Text: "teapot", Code: 418}, 418, `teapot`},
		{fault.Text(fault.UnsupportedPath, "unsupported path"), 404, `1 error occurred:\n\t* unsupported path\n\n`},
		{fault.Text(fault.UnsupportedOperation, "unsupported operation"), 405, `1 error occurred:\n\t* unsupported operation\n\n`},
		{fault.Text(fault.Unavailable, "not ready"), 503, "not ready"},
		{fault.Text(fault.OutcomeUnknown, "died"), 424, "died"},
	} {
		w.router.handle = func(*PluginRequest) (*PluginResponse, error) { return nil, c.err }
		w.call("GET", "kv/x", "").want(t, c.status, c.text)
	}
}

func TestNilResponsesAreAsTheContractSays(t *testing.T) {
	w := newWorld(t)
	w.mount("", "kv/")
	w.router.handle = func(*PluginRequest) (*PluginResponse, error) { return nil, nil }
	w.call("GET", "kv/x", "").want(t, 404, `{"errors":[]}`)
	w.call("LIST", "kv/x", "").want(t, 404, `{"errors":[]}`)
	w.call("PUT", "kv/x", "").want(t, 204)
	w.call("DELETE", "kv/x", "").want(t, 204)
	answer := func(p *pluginpb.Response) {
		w.router.handle = func(*PluginRequest) (*PluginResponse, error) { return &PluginResponse{Plugin: p}, nil }
	}
	answer(&pluginpb.Response{})
	w.call("GET", "kv/x", "").want(t, 200, `"data":null`)
	w.call("LIST", "kv/x", "").want(t, 404, `{"errors":[]}`)
	answer(&pluginpb.Response{Data: `{"keys":[]}`})
	w.call("LIST", "kv/x", "").want(t, 404, `{"errors":[]}`)
	answer(&pluginpb.Response{Data: `{"keys":[]}`, Warnings: []string{"look"}})
	w.call("LIST", "kv/x", "").want(t, 404, `"warnings":["look"]`)
	answer(&pluginpb.Response{Data: `{"http_content_type":"text/plain","http_raw_body":"aGk=","http_status_code":201,"http_raw_cache_control":"max-age=1"}`})
	a := w.call("GET", "kv/x", "").want(t, 201)
	if a.text != "hi" || a.header.Get("Content-Type") != "text/plain" || a.header.Get("Cache-Control") != "max-age=1" {
		t.Errorf("%q %v", a.text, a.header)
	}
	answer(&pluginpb.Response{Data: `{"http_content_type":"text/plain","http_status_code":204}`})
	if a := w.call("GET", "kv/x", "").want(t, 204); a.text != "" {
		t.Error(a.text)
	}
	answer(&pluginpb.Response{Data: `{"http_content_type":"text/plain","http_raw_body":"x"}`, Secret: &pluginpb.Secret{}})
	w.call("GET", "kv/x", "").want(t, 500)
	answer(&pluginpb.Response{Auth: &pluginpb.Auth{}})
	w.call("GET", "kv/x", "").want(t, 500, "internal error")
	answer(&pluginpb.Response{Redirect: "https://elsewhere.example/"})
	if a := w.call("GET", "kv/x", "").want(t, 302); a.header.Get("Location") != "https://elsewhere.example/" {
		t.Error(a.header)
	}
	answer(&pluginpb.Response{Data: `{}`, Headers: map[string]*pluginpb.Header{
		"x-mine": {Header: []string{"1"}}, "x-rollcall-node": {Header: []string{"liar"}}, "content-length": {Header: []string{"5"}},
	}})
	a = w.call("GET", "kv/x", "").want(t, 200)
	if a.header.Get("X-Mine") != "1" || a.header.Get(api.HeaderNode) != "node-1" || a.header.Get("Content-Length") != "" {
		t.Errorf("%v", a.header)
	}
	answer(&pluginpb.Response{Data: `{"k":"v"}`, Secret: &pluginpb.Secret{LeaseId: "kv/x/1", LeaseOptions: &pluginpb.LeaseOptions{
		TTL: int64(time.Minute), Renewable: true,
	}}})
	w.call("GET", "kv/x", "").want(t, 200, `"lease_id":"kv/x/1"`, `"renewable":true`, `"lease_duration":60`)
}

func TestReloadsAnswerAsTheContractSays(t *testing.T) {
	w := newWorld(t)
	w.mount("", "kv/")
	w.call("PUT", "sys/plugins/catalog/secret/idle", `{"sha256":"`+strings.Repeat("ab", 32)+`","command":"idle"}`).want(t, 204)
	a := w.call("PUT", "sys/plugins/reload/backend", `{"plugin":"kv","mounts":null,"scope":"global"}`).want(t, 202)
	id, _ := a.data()["reload_id"].(string)
	if id == "" || id != a.json["request_id"] {
		t.Fatal(a.text)
	}
	w.call("GET", "sys/plugins/reload/backend/status?reload_id="+id, "").want(t, 200, `"results":{}`, `"expected":["node-1"]`, `"pending":["node-1"]`)
	w.call("GET", "sys/reloads/"+id, "").want(t, 200, `"phase":"preparing"`)
	w.call("GET", "sys/reloads", "").want(t, 200, `"keys":["`+id+`"]`)
	w.call("PUT", "sys/reloads/"+id+"/abort", `{"why":"enough"}`).want(t, 200, `"phase":"aborted"`, `"pending":[]`)
	w.call("GET", "sys/plugins/reload/backend/status?reload_id="+id, "").want(t, 200, `"pending":[]`, `aborted: `)
	w.call("POST", "sys/plugins/reload/secret/idle", `{"scope":"global"}`).
		want(t, 202, "no plugins were reloaded locally (but they may be reloaded on other nodes)")
	w.call("POST", "sys/plugins/reload/unknown/idle", `{}`).want(t, 200, "no plugins were reloaded")
}

// TestATuneChangesOnlyWhatItNames holds what the libraries send: every field of their input, most of them empty.
func TestATuneChangesOnlyWhatItNames(t *testing.T) {
	w := newWorld(t)
	w.call("PUT", "sys/plugins/catalog/secret/kv", reg("")).want(t, 204)
	w.mount("", "auth/jwt/")
	w.call("POST", "sys/mounts/kv", `{"type":"kv","options":{"a":"b"},"config":{"default_lease_ttl":"30m","max_lease_ttl":"1h"}}`).want(t, 204)
	const empty = `"options":null,"default_lease_ttl":"","max_lease_ttl":"","force_no_cache":false`
	w.rows(t, []row{
		{"POST", "sys/mounts/kv/tune", `{"description":"d",` + empty + `}`, 204, ""},
		{"GET", "sys/mounts/kv/tune", "", 200, `"default_lease_ttl":1800`},
		{"GET", "sys/mounts/kv", "", 200, `"options":{"a":"b"}`},
		{"POST", "sys/mounts/kv/tune", `{"options":{"c":"d","a":""},"default_lease_ttl":"system"}`, 204, ""},
		{"GET", "sys/mounts/kv", "", 200, `"options":{"c":"d"}`},
		{"GET", "sys/mounts/kv", "", 200, `"default_lease_ttl":0,"force_no_cache":false,"max_lease_ttl":3600`},
		{"POST", "sys/mounts/kv/tune", `{"options":{}}`, 204, ""},
		{"GET", "sys/mounts/kv", "", 200, `"options":{"c":"d"}`},
		{"POST", "sys/mounts/kv/tune", `{"options":{"version":"3"}}`, 400, "invalid version provided: 3"},
		{"POST", "sys/mounts/kv/tune", `{"options":{"version":"1"}}`, 204, ""},
		{"POST", "sys/mounts/kv/tune", `{"token_type":"service"}`, 400, "'token_type' can only be modified on auth mounts"},
		{"POST", "sys/auth/jwt/tune", `{"token_type":"service"}`, 204, ""},
	})
}

// TestAnEngineLearnsThatItsDataShallHaveANewerFormat is `kv enable-versioning`: the option alone would be read by the
// next process, whenever that starts.
func TestAnEngineLearnsThatItsDataShallHaveANewerFormat(t *testing.T) {
	w := newWorld(t)
	w.mount("", "kv/")
	done := make(chan *answer)
	go func() { done <- w.call("POST", "sys/mounts/kv/tune", `{"options":{"version":"2"}}`) }()
	var id string
	for id == "" {
		if l := w.fsm.View().Reloads(); len(l) == 1 {
			id = l[0].GetId()
		}
	}
	w.call("PUT", "sys/reloads/"+id+"/abort", `{"why":"enough"}`).want(t, 200)
	(<-done).want(t, 200, "Upgrading the data of kv/", "the option is set, but")
	w.rows(t, []row{
		{"GET", "sys/mounts/kv", "", 200, `"options":{"version":"2"}`},
		{"POST", "sys/mounts/kv/tune", `{"options":{"version":2}}`, 204, ""},
		{"POST", "sys/mounts/kv/tune", `{"options":{"version":"1"}}`, 400, "cannot downgrade mount from version 2"},
	})
}

func TestATextNamesAMountAsItsCallerDoes(t *testing.T) {
	w := newWorld(t)
	w.mount("", "auth/jwt/")
	w.rows(t, []row{
		{"POST", "sys/remount", `{"from":"auth/nah","to":"auth/x"}`, 400, `no matching mount at \"auth/nah/\"`},
		{"POST", "sys/remount", `{"from":"auth/jwt","to":"auth/jwt"}`, 400, `path already in use at \"auth/jwt/\"`},
		{"PUT", "sys/plugins/reload/backend", `{"mounts":["nah"]}`, 400, `cannot fetch mount entry on \"nah/\"`},
	})
}

// TestWhatTheStockCommandSendsIsUnderstood holds bodies and questions that only a real client showed.
func TestWhatTheStockCommandSendsIsUnderstood(t *testing.T) {
	w := newWorld(t)
	w.mount("", "kv/")
	w.rows(t, []row{
		{"PUT", "kv/x", "null", 200, `"body":{}`}, // write -f
		{"PUT", "sys/step-down", " null\n", 204, ""},
		{"PUT", "sys/plugins/catalog/secret/kv", `{"sha256":"` + strings.Repeat("ab", 32) + `","command":"x/../../y"}`, 400, "path cannot contain parent references"},
		{"POST", "sys/capabilities-self", `{"path":"x","token":"root"}`, 200, `"warnings":null`},
		{"GET", "sys/health?removedcode=abc", "", 400, "removedcode must be an HTTP status code"},
		{"GET", "sys/health?activecode=299&standbycode=abc", "", 400, "standbycode must be an HTTP status code"},
	})
	w.call("GET", "sys/metrics", "", "X-Vault-Request", "true").want(t, 200, `"Gauges":[`)
	w.call("GET", "sys/metrics?format=prometheus", "", "X-Vault-Request", "true").want(t, 200, "# HELP")
}
