package httpd

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"rollcall/node/api"
	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
	pluginpb "rollcall/proto/plugin"
)

// memAudit keeps records in memory, encoded at once: what they hold later is nobody's business. It may refuse.
type memAudit struct {
	mu      sync.Mutex
	entries []api.AuditEntry
	refuse  string // the type that is not taken; "" for none
}

var errDiskFull = errors.New("no space left on device")

func (m *memAudit) Record(e *api.AuditEntry) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.refuse == e.Type {
		return errDiskFull
	}
	raw, err := json.Marshal(e)
	if err != nil {
		return err
	}
	var kept api.AuditEntry
	if err := json.Unmarshal(raw, &kept); err != nil {
		return err
	}
	m.entries = append(m.entries, kept)
	return nil
}

func (m *memAudit) Hash(text string) (string, error) { return "hmac-sha256:of-" + text, nil }
func (m *memAudit) Headers() []string                { return []string{"user-agent", "x-correlation-id"} }

func (m *memAudit) Describe() api.AuditDevice {
	return api.AuditDevice{Type: "file", Path: "file/", Options: map[string]string{"file_path": "/var/log/audit.log"}}
}

func (m *memAudit) take() []api.AuditEntry {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := m.entries
	m.entries = nil
	return out
}

func audited(t testing.TB) (*world, *memAudit) {
	w := newWorld(t)
	m := &memAudit{}
	w.s.Audit = m
	return w, m
}

// watched is a response writer that looks into the audit device at the moment that something is let out.
type watched struct {
	*httptest.ResponseRecorder
	m    *memAudit
	then []api.AuditEntry
	out  bool
}

func (w *watched) WriteHeader(status int) { w.look(); w.ResponseRecorder.WriteHeader(status) }

func (w *watched) Write(p []byte) (int, error) { w.look(); return w.ResponseRecorder.Write(p) }

func (w *watched) look() {
	if !w.out {
		w.out = true
		w.m.mu.Lock()
		w.then = slices.Clone(w.m.entries)
		w.m.mu.Unlock()
	}
}

// ask sends a request and returns the answer and the records that stood there when its first byte was let out.
func (w *world) ask(m *memAudit, method, target, token, body string, header ...string) (*watched, []api.AuditEntry) {
	w.t.Helper()
	m.take()
	r := httptest.NewRequest(method, target, strings.NewReader(body))
	r.Header.Set(api.HeaderToken, token)
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	rec := &watched{ResponseRecorder: httptest.NewRecorder(), m: m}
	w.s.Handler().ServeHTTP(rec, r.WithContext(w.shortly()))
	return rec, rec.then
}

// pairOf fails unless the records are a request and its answer, in this order.
func pairOf(t testing.TB, what string, got []api.AuditEntry) (asked, answered api.AuditEntry) {
	t.Helper()
	if len(got) != 2 || got[0].Type != api.AuditTypeRequest || got[1].Type != api.AuditTypeResponse ||
		got[0].Request.ID == "" || got[0].Request.ID != got[1].Request.ID {
		t.Fatalf("%s: not one record of the request and one of the answer before the answer: %d %+v", what, len(got), got)
	}
	return got[0], got[1]
}

// quietRoutes are the reads that leave no record. The list is written out, so that one more is a decision.
var quietRoutes = []string{"sys/health", "sys/init", "sys/leader", "sys/seal-status"}

// TestEachAnsweredRequestHasOneRecordOfItAndOneOfTheAnswer goes through the whole table, for everybody who could call.
func TestEachAnsweredRequestHasOneRecordOfItAndOneOfTheAnswer(t *testing.T) {
	routes := newWorld(t).s.routes.routes
	calls := 0
	for _, r := range routes {
		path := sample(r.pattern)
		for op := range r.ops {
			w, m := audited(t)
			w.mount("", "kv/")
			for name, token := range w.identities(path) {
				m.take()
				before := w.fsm.View().Index()
				a := w.try(token, op, path)
				got := m.take()
				calls++
				what := fmt.Sprintf("%s %s for %s", op, path, name)
				if r.quiet && (op == opRead || op == opHead) {
					if len(got) != 0 || !slices.Contains(quietRoutes, r.pattern) || w.fsm.View().Index() != before {
						t.Errorf("%s: a quiet route left %d records and changed the state: %v", what, len(got), w.fsm.View().Index() != before)
					}
					continue
				}
				asked, answered := pairOf(t, what, got)
				if answered.Response.Status != a.status || asked.Request.Operation != string(op) || asked.Request.RemoteAddress == "" {
					t.Errorf("%s: %d, and the record says %+v %+v", what, a.status, asked.Request, answered.Response)
				}
				if refused := a.status >= 400; refused != (answered.Error != "") && a.status != http.StatusNotFound {
					t.Errorf("%s: %d, and the error is %q", what, a.status, answered.Error)
				}
				if known := slices.Contains([]string{"narrow", "nosudo", "deny", "able", "of another namespace"}, name); r.access != open && known != (asked.Auth != nil) {
					t.Errorf("%s: auth is %+v", what, asked.Auth)
				}
				if a.status == http.StatusForbidden && asked.Auth != nil && asked.Auth.PolicyResults.Allowed && !accessorPath(r.pattern) && !strings.Contains(r.pattern, "lookup-accessor") {
					t.Errorf("%s: refused, and recorded as allowed", what)
				}
			}
		}
	}
	t.Logf("%d calls over %d routes", calls, len(routes))
}

func TestWhatReachesNoRouteIsRecordedToo(t *testing.T) {
	w, m := audited(t)
	w.namespace("team/")
	w.mount("", "kv/")
	w.mount("team/", "kv/")
	w.mount("", "auth/jwt/")
	w.router.open = map[string]bool{"login": true}
	w.policy("", "kv", `path "kv/*" { capabilities = ["create", "update", "read", "list", "delete", "patch"] }`)
	w.token("tok-kv", &commandv1.Token{Policies: []string{"kv"}})
	for _, c := range []struct {
		method, target, token, body string
		header                      []string
		status                      int
		path, op, mount             string
	}{
		{"GET", "/v1/kv/a", "tok-kv", "", nil, 200, "kv/a", "read", "kv/"},
		{"PUT", "/v1/kv/a", "tok-kv", `{"a":"b"}`, nil, 200, "kv/a", "update", "kv/"},
		{"LIST", "/v1/kv/a", "tok-kv", "", nil, 200, "kv/a/", "list", "kv/"},
		{"DELETE", "/v1/kv/a", "tok-kv", "", nil, 200, "kv/a", "delete", "kv/"},
		{"PATCH", "/v1/kv/a", "tok-kv", "{}", []string{"Content-Type", "application/merge-patch+json"}, 200, "kv/a", "patch", "kv/"},
		{"GET", "/v1/kv/a", "nobody", "", nil, 403, "kv/a", "read", "kv/"},
		{"GET", "/v1/team/kv/a", rootToken, "", nil, 200, "kv/a", "read", "team/kv/"},
		{"GET", "/v1/team/kv/a", "tok-kv", "", nil, 403, "kv/a", "read", "team/kv/"},
		{"GET", "/v1/kv/a", rootToken, "", []string{api.HeaderNamespace, "nowhere"}, 404, "kv/a", "", ""},
		{"PUT", "/v1/auth/jwt/login", "", `{"jwt":"x"}`, nil, 200, "auth/jwt/login", "update", "auth/jwt/"},
		{"GET", "/v1/nothing/here", rootToken, "", nil, 404, "nothing/here", "read", ""},
		{"GET", "/v1/nothing/here", "nobody", "", nil, 403, "nothing/here", "read", ""},
		{"GET", "/v1/sys/none", rootToken, "", nil, 404, "sys/none", "read", "sys/"},
		{"PUT", "/v1/kv/a", "tok-kv", `{"a":`, nil, 400, "kv/a", "update", "kv/"},
		{"PUT", "/v1/sys/policies/acl/p", rootToken, `[1]`, nil, 400, "sys/policies/acl/p", "update", "sys/"},
		{"PUT", "/v1/kv/", "tok-kv", `{}`, nil, 400, "kv/", "", ""},
		{"GET", "/v1/kv//a", "tok-kv", "", nil, 307, "kv//a", "", ""},
		{"GET", "/v1/kv/../sys/mounts", "tok-kv", "", nil, 307, "kv/../sys/mounts", "", ""},
		{"GET", "/other", rootToken, "", nil, 404, "/other", "", ""},
		{"GET", "/v1/kv/%00", "tok-kv", "", nil, 400, "kv/\x00", "", ""},
		{"BREW", "/v1/kv/a", "tok-kv", "", nil, 405, "kv/a", "", ""},
		{"PATCH", "/v1/kv/a", "tok-kv", "{}", nil, 415, "kv/a", "", ""},
		{"HEAD", "/v1/kv/a", "tok-kv", "", nil, 405, "kv/a", "head", ""},
		{"OPTIONS", "/v1/kv/a", "tok-kv", "", nil, 400, "kv/a", "", ""},
		{"GET", "/v1/sys/mounts?help=1", rootToken, "", nil, 200, "sys/mounts", "help", "sys/"},
		{"PUT", "/v1/auth/token/create", rootToken, "{}", nil, 200, "auth/token/create", "update", "auth/token/"},
	} {
		what := c.method + " " + c.target + " as " + c.token
		rec, then := w.ask(m, c.method, c.target, c.token, c.body, append([]string{"X-Correlation-Id", "c-1", "X-Other", "o"}, c.header...)...)
		if rec.Code != c.status {
			t.Errorf("%s: %d %s", what, rec.Code, rec.Body)
			continue
		}
		asked, answered := pairOf(t, what, then)
		if n := len(m.take()); n != 2 {
			t.Errorf("%s: %d records when all was over", what, n)
		}
		q := asked.Request
		if q.Path != c.path || q.Operation != c.op || q.MountPoint != c.mount || answered.Response.Status != c.status {
			t.Errorf("%s: path %q, operation %q, mount %q, status %d", what, q.Path, q.Operation, q.MountPoint, answered.Response.Status)
		}
		if len(q.Headers) != 1 || q.Headers["x-correlation-id"][0] != "c-1" {
			t.Errorf("%s: headers %v", what, q.Headers)
		}
		if strings.HasPrefix(c.mount, "team/") && (q.Namespace == nil || q.Namespace.Path != "team/" || q.Namespace.ID != "id") {
			t.Errorf("%s: namespace %+v", what, q.Namespace)
		}
	}
}

// TestWhatCannotBeRecordedIsNotDone asks for everything while the device takes no request.
func TestWhatCannotBeRecordedIsNotDone(t *testing.T) {
	routes := newWorld(t).s.routes.routes
	for _, r := range routes {
		for op := range r.ops {
			if r.quiet && op != opUpdate {
				continue
			}
			w, m := audited(t)
			w.mount("", "kv/")
			m.refuse = api.AuditTypeRequest
			before := w.fsm.View().Index()
			a := w.try(rootToken, op, sample(r.pattern))
			if a.status != http.StatusInternalServerError || op != opHead && !strings.Contains(a.text, "audit device") {
				t.Errorf("%s %s: %d %s", op, r.pattern, a.status, a.text)
			}
			if now := w.fsm.View().Index(); now != before {
				t.Errorf("%s %s: the state changed", op, r.pattern)
			}
			if w.cluster.steps != 0 || w.cluster.restored != nil {
				t.Errorf("%s %s: it was done", op, r.pattern)
			}
			if got := m.take(); len(got) != 0 {
				t.Errorf("%s %s: %d records", op, r.pattern, len(got))
			}
		}
	}
	w, m := audited(t)
	w.mount("", "kv/")
	limited := w.token("limited", &commandv1.Token{Policies: []string{"root"}, NumUses: 1})
	m.refuse = api.AuditTypeRequest
	for _, token := range []string{rootToken, limited, "nobody"} {
		if rec, _ := w.ask(m, "PUT", "/v1/kv/a", token, `{"a":"b"}`); rec.Code != http.StatusInternalServerError {
			t.Errorf("%d %s", rec.Code, rec.Body)
		}
	}
	if w.router.last() != nil {
		t.Error("a plugin was called")
	}
	m.refuse = ""
	if rec, _ := w.ask(m, "PUT", "/v1/kv/a", limited, `{}`); rec.Code != http.StatusOK {
		t.Errorf("a request that was not carried out used its token up: %d", rec.Code)
	}
}

// TestAnAnswerThatCannotBeRecordedIsNotShown: the device fails between the request and its answer.
func TestAnAnswerThatCannotBeRecordedIsNotShown(t *testing.T) {
	w, m := audited(t)
	w.mount("", "kv/")
	w.policy("", "canary-policy", `path "canary" { capabilities = ["read"] }`)
	m.refuse = api.AuditTypeResponse
	secret := &pluginpb.Response{Data: `{"password":"canary","keys":["canary"]}`}
	raw := &pluginpb.Response{Data: `{"http_content_type":"text/canary","http_raw_body":"Y2FuYXJ5","http_status_code":201}`}
	for target, resp := range map[string]*pluginpb.Response{"kv/a": secret, "kv/raw": raw, "kv/none": nil, "sys/policies/acl/canary-policy": nil, "sys/events": nil} {
		w.router.handle = func(*PluginRequest) (*PluginResponse, error) { return &PluginResponse{Plugin: resp}, nil }
		for _, method := range []string{"GET", "LIST"} {
			rec, then := w.ask(m, method, "/v1/"+target, rootToken, "")
			if rec.Code != http.StatusInternalServerError || strings.Contains(rec.Body.String(), "canary") || len(then) != 1 {
				t.Errorf("%s %s: %d %s, %d records", method, target, rec.Code, rec.Body, len(then))
			}
			if ct := rec.Header().Get("Content-Type"); ct != "application/json" || !json.Valid(rec.Body.Bytes()) {
				t.Errorf("%s %s: %s %s", method, target, ct, rec.Body)
			}
			for name := range rec.Header() {
				if !slices.Contains([]string{"Content-Type", "Cache-Control", "Strict-Transport-Security", api.HeaderNode}, name) {
					t.Errorf("%s %s: header %s is let out", method, target, name)
				}
			}
		}
	}
	rec, _ := w.ask(m, "PUT", "/v1/auth/token/create", rootToken, "{}")
	if rec.Code != http.StatusInternalServerError || strings.Contains(rec.Body.String(), "client_token") {
		t.Errorf("a token is let out: %d %s", rec.Code, rec.Body)
	}
}

func TestTheRecordHoldsWhatWasAnswered(t *testing.T) {
	w, m := audited(t)
	w.mount("", "kv/")
	mount := w.mount("", "auth/jwt/")
	w.router.open = map[string]bool{"login": true}
	w.router.handle = func(q *PluginRequest) (*PluginResponse, error) {
		switch {
		case q.Path == "auth/jwt/login":
			return &PluginResponse{Plugin: &pluginpb.Response{Auth: &pluginpb.Auth{Policies: []string{"p"}, DisplayName: "joe"}}}, nil
		case strings.HasSuffix(q.Path, "creds"):
			return &PluginResponse{Plugin: &pluginpb.Response{
				Data: `{"password":"pw"}`, Secret: &pluginpb.Secret{LeaseId: "kv/creds/1"}, Warnings: []string{"careful"},
			}}, nil
		default:
			return nil, fault.Text(fault.Invalid, "no such key")
		}
	}
	_, then := w.ask(m, "PUT", "/v1/auth/jwt/login", "", `{"jwt":"secret"}`)
	asked, answered := pairOf(t, "login", then)
	if string(asked.Request.Data) != `{"jwt":"secret"}` || asked.Auth != nil || asked.Request.MountAccessor != mount.GetAccessor() {
		t.Errorf("login: %+v", asked)
	}
	if a := answered.Response.Auth; a == nil || a.ClientToken == "" || a.Accessor == "" || !slices.Contains(a.Policies, "p") || a.TokenType != "service" {
		t.Errorf("login: %+v", a)
	}
	_, then = w.ask(m, "GET", "/v1/kv/creds", rootToken, "")
	_, answered = pairOf(t, "lease", then)
	if b := answered.Response; string(b.Data) != `{"password":"pw"}` || b.Secret.LeaseID != "kv/creds/1" || b.Warnings[0] != "careful" ||
		b.RanOn != "node-1" || b.Generation != 7 || answered.Auth.DisplayName != "root" {
		t.Errorf("lease: %+v", b)
	}
	_, then = w.ask(m, "GET", "/v1/kv/none", rootToken, "")
	asked, answered = pairOf(t, "error", then)
	if answered.Error != "no such key" || asked.Error != "" || !asked.Auth.PolicyResults.Allowed {
		t.Errorf("error: %+v", answered)
	}
	rec, then := w.ask(m, "GET", "/v1/kv/creds", rootToken, "", api.HeaderWrapTTL, "60")
	asked, answered = pairOf(t, "wrap", then)
	info := answered.Response.WrapInfo
	if info == nil || info.Token == "" || answered.Response.Data != nil || asked.Request.WrapTTL != 60 {
		t.Fatalf("wrap: %+v %s", answered.Response, rec.Body)
	}
	_, then = w.ask(m, "PUT", "/v1/sys/wrapping/unwrap", info.Token, "")
	_, answered = pairOf(t, "unwrap", then)
	if string(answered.Response.Data) != `{"password":"pw"}` {
		t.Errorf("unwrap: %+v", answered.Response)
	}
	rec, then = w.ask(m, "GET", "/v1/sys/events", rootToken, "")
	pairOf(t, "events", then)
	if rec.Code != http.StatusOK {
		t.Errorf("events: %d", rec.Code)
	}
}

func TestTheAPITellsOfTheDeviceAndChangesNothingAboutIt(t *testing.T) {
	w, _ := audited(t)
	w.call("GET", "sys/audit", "").want(t, 200, `"file/":{`, `"file_path":"/var/log/audit.log"`)
	w.call("PUT", "sys/audit-hash/file", `{"input":"x"}`).want(t, 200, `"hash":"hmac-sha256:of-x"`)
	w.call("PUT", "sys/audit-hash/file/", `{"input":"x"}`).want(t, 400, "cannot write to a path ending in '/'")
	w.call("PUT", "sys/audit-hash/other", `{"input":"x"}`).want(t, 400, "unknown audit backend")
	w.call("PUT", "sys/audit-hash/file", `{}`).want(t, 400, "input")
	for _, path := range []string{"sys/audit/file", "sys/audit/x/y"} {
		w.call("PUT", path, `{"type":"file","options":{"file_path":"/plugins/kv"}}`).want(t, 400, "configuration file only")
		w.call("DELETE", path, "").want(t, 400, "configuration file only")
	}
	w.s.Audit = nil
	w.call("GET", "sys/audit", "").want(t, 200, `"data":{}`)
	w.call("PUT", "sys/audit-hash/file", `{"input":"x"}`).want(t, 400, "unknown audit backend")
}

// BenchmarkRequest is one request through the door, answered at once, with and without a device that costs nothing. What a
// real device costs stands in node/audit.
func BenchmarkRequest(b *testing.B) {
	for _, with := range []bool{false, true} {
		b.Run(fmt.Sprintf("audit=%v", with), func(b *testing.B) {
			w := newWorld(b)
			w.mount("", "kv/")
			if with {
				w.s.Audit = discard{&memAudit{}}
			}
			w.router.handle = func(*PluginRequest) (*PluginResponse, error) {
				return &PluginResponse{Plugin: &pluginpb.Response{Data: `{"a":"b"}`}}, nil
			}
			h := w.s.Handler()
			b.ReportAllocs()
			var before, after syscall.Rusage
			_ = syscall.Getrusage(syscall.RUSAGE_SELF, &before)
			for b.Loop() {
				r := httptest.NewRequest("PUT", "/v1/kv/a", strings.NewReader(`{"a":"b"}`))
				r.Header.Set(api.HeaderToken, rootToken)
				h.ServeHTTP(httptest.NewRecorder(), r)
				w.router.reset()
			}
			_ = syscall.Getrusage(syscall.RUSAGE_SELF, &after)
			used := after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano()
			b.ReportMetric(float64(used)/float64(b.N)/1e3, "cpu-us/op")
		})
	}
}

type discard struct{ *memAudit }

func (discard) Record(*api.AuditEntry) error { return nil }
