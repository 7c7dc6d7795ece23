package httpd

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"rollcall/node/api"
	pluginpb "rollcall/proto/plugin"
)

// TestABodyThatTwoReadersReadDifferentlyIsRefused: on a path of ours and on a plugin's, and nothing of it reaches either.
func TestABodyThatTwoReadersReadDifferentlyIsRefused(t *testing.T) {
	w := newWorld(t)
	w.mount("", "kv/")
	deep := func(open, shut string, n int) string {
		return `{"a":` + strings.Repeat(open, n) + "1" + strings.Repeat(shut, n) + "}"
	}
	many := func(n int) string { return `{"a":[` + strings.Repeat("1,", n-1) + "1]}" }
	var keys strings.Builder
	for i := range maxElements + 1 {
		fmt.Fprintf(&keys, `"k%d":1,`, i)
	}
	for name, c := range map[string]struct {
		body string
		says string
	}{
		"a key twice":                      {`{"a":1,"a":2}`, "twice"},
		"a key twice, spelt otherwise":     {`{"a":1,"\u0061":2}`, "twice"},
		"a key twice behind a value":       {`{"a":{"b":[1,{}]},"c":"}","a":2}`, "twice"},
		"a long key twice":                 {`{"` + strings.Repeat("k", 5000) + `":1,"` + strings.Repeat("k", 5000) + `":1}`, "twice"},
		"bytes that are not UTF-8":         {"{\"a\":\"\xff\"}", "UTF-8"},
		"half a letter":                    {"{\"a\":\"\xe2\x82\"}", "UTF-8"},
		"a surrogate in UTF-8":             {"{\"a\":\"\xed\xa0\x80\"}", "UTF-8"},
		"objects in objects":               {deep(`{"a":`, "}", 100_000), "nested"},
		"arrays in arrays":                 {deep("[", "]", 100_000), "nested"},
		"arrays that do not end":           {`{"a":` + strings.Repeat("[", 100_000), "nested"},
		"one level more than there may be": {deep("[", "]", maxDepth), "nested"},
		"an array with too many elements":  {many(maxElements + 1), "elements"},
		"an object with too many keys":     {"{" + keys.String() + `"last":1}`, "elements"},
		"something behind it":              {`{} x`, "JSON"},
		"another object behind it":         {`{}{}`, "JSON"},
		"a byte order mark":                {"\xef\xbb\xbf{}", "object"},
		"NaN":                              {`{"a":NaN}`, "JSON"},
		"a number that is none":            {`{"a":01}`, "JSON"},
		"a control character":              {"{\"a\":\"\x01\"}", "JSON"},
		"an end too early":                 {`{"a":"`, "JSON"},
		"a bracket too many":               {`{"a":1}]`, "JSON"},
		"brackets that cross":              {`{"a":[1}]`, "JSON"},
		"nothing but closing brackets":     {`{` + strings.Repeat("}", 1000), "JSON"},
		"a list":                           {`[{"a":1}]`, "object"},
		"zeroes":                           {"\x00\x00", "object"},
	} {
		for _, path := range []string{"kv/a", "sys/policies/acl/p"} {
			before := w.fsm.View().Index()
			w.router.reset()
			began := time.Now()
			a := w.call("PUT", path, c.body)
			if a.status != http.StatusBadRequest || !strings.Contains(a.text, c.says) || len(a.text) > 1024 {
				t.Errorf("%s to %s: %d %.300s, want 400 with %q", name, path, a.status, a.text, c.says)
			}
			if took := time.Since(began); took > 5*time.Second { // it takes milliseconds; this machine has other work
				t.Errorf("%s: %v", name, took)
			}
			if w.router.last() != nil || w.fsm.View().Index() != before {
				t.Errorf("%s had an effect", name)
			}
		}
	}
	for name, body := range map[string]string{
		"as deep as there may be": deep("[", "]", maxDepth-1), "as many as there may be": many(maxElements),
		"a key in two objects": `{"a":{"x":1},"b":{"x":2,"a":3},"c":[{"a":1},{"a":2}]}`, "a value like a key": `{"a":"b","b":"a","c":["a","a"]}`,
		"brackets in a text": `{"a":"{{{[[[\"}"}`, "white space": " \n\t{ } \n",
	} {
		w.router.reset()
		if a := w.call("PUT", "kv/a", body); a.status != http.StatusOK || w.router.last() == nil {
			t.Errorf("%s is refused: %d %s", name, a.status, a.text)
		}
	}
}

// TestNoSpellingLeadsOutOfADirectoryOrATable puts names that lead elsewhere into every path and every field that names something.
func TestNoSpellingLeadsOutOfADirectoryOrATable(t *testing.T) {
	w := newWorld(t)
	w.mount("", "kv/")
	bad := []string{
		"..", "../x", "../../etc/passwd", "a/../../x", "/etc/passwd", `..\x`, `a\..\..\x`, "a\x00b", "a\nb", "\u202ea", "a\u0000", strings.Repeat("a", 5000),
		"%2e%2e/x", ".", "a/./b", "a//b", "~root", "a\x7fb",
	}
	calls := 0
	for _, name := range bad {
		for _, r := range w.s.routes.routes {
			if !strings.Contains(r.pattern, "{") {
				continue
			}
			pattern := r.pattern
			for _, capture := range []string{"{path...}", "{prefix...}", "{lease_id...}", "{name}", "{type}", "{id}", "{action}", "{role}"} {
				pattern = strings.ReplaceAll(pattern, capture, url.PathEscape(name))
			}
			for op := range r.ops {
				before := w.fsm.View().Index()
				a := w.try(rootToken, op, pattern)
				calls++
				if a.status >= 500 {
					t.Errorf("%s %.80q: %d %s", op, pattern, a.status, a.text)
				}
				if now := w.fsm.View().Index(); now != before && strings.ContainsAny(name, "\x00\n\x7f") {
					t.Errorf("%s %.80q changed the state: %d", op, pattern, a.status)
				}
			}
		}
		for path, body := range map[string]string{
			"sys/plugins/catalog/secret/x": `{"sha256":"` + strings.Repeat("ab", 32) + `","command":%s}`,
			"sys/mounts/y":                 `{"type":%s}`,
			"sys/remount":                  `{"from":"kv","to":%s}`,
		} {
			if slices.Contains(map[string][]string{ // a file may be called so, or a mount
				"sys/plugins/catalog/secret/x": {"~root", ".", "%2e%2e/x", "a/./b", "a//b", "\u202ea"},
				"sys/remount":                  {"~root", "%2e%2e/x", "/etc/passwd", "\u202ea"},
			}[path], name) {
				continue
			}
			quoted, err := json.Marshal(name)
			if err != nil {
				t.Fatal(err)
			}
			a := w.call("PUT", path, fmt.Sprintf(body, quoted))
			calls++
			if path == "sys/remount" && strings.Contains(a.text, "no matching mount") {
				t.Errorf("%.60q: something moved kv/ away, so nothing is tried", name)
			}
			if a.status != http.StatusBadRequest {
				t.Errorf("PUT %s with %.60q: %d %s", path, name, a.status, a.text)
			}
		}
	}
	for _, p := range w.fsm.View().Plugins() {
		if cmd := p.GetSpec().GetCommand(); strings.Contains(cmd, "..") || strings.HasPrefix(cmd, "/") {
			t.Errorf("the catalog holds %q", cmd)
		}
	}
	for _, m := range w.fsm.View().Mounts() {
		if strings.Contains(m.GetPath(), "..") || strings.ContainsAny(m.GetPath(), "\x00\n\\") {
			t.Errorf("something is mounted at %q", m.GetPath())
		}
	}
	t.Logf("%d calls", calls)
}

// TestWhatABrowserSendsForAnotherSiteIsRefused: with a token or without, whatever the route.
func TestWhatABrowserSendsForAnotherSiteIsRefused(t *testing.T) {
	w := newWorld(t)
	w.mount("", "kv/")
	w.s.Names = []string{"localhost", "node-1"}
	for _, c := range []struct {
		name, method, host string
		header             map[string]string
		want               int
	}{
		{"a command line", "PUT", "127.0.0.1:8200", nil, 200},
		{"a command line by any name", "PUT", "vault.example.com", nil, 200},
		{"a page of this node", "PUT", "localhost:8200", map[string]string{"Origin": "http://localhost:8200", "Sec-Fetch-Site": "same-origin"}, 200},
		{"a page of this node by address", "PUT", "[::1]:8200", map[string]string{"Origin": "http://[::1]:8200"}, 200},
		{"a form of another site", "POST", "127.0.0.1:8200", map[string]string{"Origin": "https://evil.example", "Content-Type": "text/plain"}, 403},
		{"a form of another port", "POST", "127.0.0.1:8200", map[string]string{"Origin": "http://127.0.0.1:9999"}, 403},
		{"a form without an origin", "POST", "127.0.0.1:8200", map[string]string{"Origin": "null"}, 403},
		{"a fetch of another site", "PUT", "127.0.0.1:8200", map[string]string{"Sec-Fetch-Site": "cross-site"}, 403},
		{"a delete of another site", "DELETE", "127.0.0.1:8200", map[string]string{"Sec-Fetch-Site": "same-site"}, 403},
		{"a name that was made to lead here", "PUT", "evil.example:8200", map[string]string{"Origin": "http://evil.example:8200", "Sec-Fetch-Site": "same-origin"}, 403},
		{"a look by a name that was made to lead here", "GET", "evil.example:8200", map[string]string{"Sec-Fetch-Site": "same-origin"}, 403},
	} {
		for _, path := range []string{"kv/a", "sys/unseal", "sys/health"} {
			want := c.want
			if path != "kv/a" && want == 200 || path == "sys/unseal" && c.method == "GET" || path == "sys/health" && c.method == "GET" && want == 200 {
				continue
			}
			r := httptest.NewRequest(c.method, "http://"+c.host+"/v1/"+path, strings.NewReader("{}"))
			r.Header.Set(api.HeaderToken, rootToken)
			for k, v := range c.header {
				r.Header.Set(k, v)
			}
			w.router.reset()
			rec := httptest.NewRecorder()
			w.s.Handler().ServeHTTP(rec, r)
			if rec.Code != want || want == 403 && w.router.last() != nil {
				t.Errorf("%s to %s: %d %s, want %d", c.name, path, rec.Code, rec.Body, want)
			}
			for name := range rec.Header() {
				if strings.HasPrefix(name, "Access-Control-") {
					t.Errorf("%s: %s is sent", c.name, name)
				}
			}
		}
	}
}

func TestARequestTooManyIsToldSoAndTheOthersGoOn(t *testing.T) {
	w := newWorld(t)
	w.mount("", "kv/")
	hold, in := make(chan struct{}), make(chan struct{}, maxInFlight)
	w.router.handle = func(*PluginRequest) (*PluginResponse, error) {
		in <- struct{}{}
		<-hold
		return &PluginResponse{Plugin: &pluginpb.Response{Data: `{"a":1}`}}, nil
	}
	var wg sync.WaitGroup
	ask := func() int {
		r := httptest.NewRequest("GET", "/v1/kv/a", http.NoBody)
		r.Header.Set(api.HeaderToken, rootToken)
		rec := httptest.NewRecorder()
		w.s.Handler().ServeHTTP(rec, r)
		return rec.Code
	}
	for range maxInFlight {
		wg.Go(func() {
			if code := ask(); code != http.StatusOK {
				t.Errorf("one of those that were in: %d", code)
			}
		})
	}
	for range maxInFlight {
		<-in
	}
	if code := ask(); code != http.StatusTooManyRequests {
		t.Errorf("one too many: %d", code)
	}
	close(hold)
	wg.Wait()
	if code := ask(); code != http.StatusOK {
		t.Errorf("afterwards: %d", code)
	}
}

// TestASlowClientIsCutOffAndOthersAreServed: headers and bodies that come drop by drop, connections that say nothing.
func TestASlowClientIsCutOffAndOthersAreServed(t *testing.T) {
	w := newWorld(t)
	w.mount("", "kv/")
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	// As node/wire.go sets it up, with shorter times.
	server := &http.Server{Handler: w.s.Handler(), ReadHeaderTimeout: 300 * time.Millisecond, ReadTimeout: 600 * time.Millisecond, IdleTimeout: 600 * time.Millisecond, MaxHeaderBytes: 16 << 10}
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	t.Cleanup(func() { _ = server.Close(); <-done })
	head := "PUT /v1/kv/a HTTP/1.1\r\nHost: x\r\nX-Vault-Token: " + rootToken + "\r\n"
	var wg sync.WaitGroup
	for name, sent := range map[string]string{
		"nothing": "", "half a header": head + "X-A: ", "a body that never comes": head + "Content-Length: 1000\r\n\r\n{",
		"a chunk that never ends": head + "Transfer-Encoding: chunked\r\n\r\n400\r\n{",
	} {
		wg.Go(func() {
			conn, err := net.Dial("tcp", listener.Addr().String())
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			_, _ = io.WriteString(conn, sent)
			_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
			answer, err := io.ReadAll(conn) // until it is cut off
			if err != nil && strings.Contains(err.Error(), "timeout") {
				t.Errorf("%s: still connected", name)
			}
			if bytes.Contains(answer, []byte("200 OK")) || bytes.Contains(answer, []byte("204 ")) {
				t.Errorf("%s: %s", name, answer)
			}
		})
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for _, c := range []struct {
		header string
		want   int
	}{{"", 200}, {strings.Repeat("h", 64<<10), 431}, {"", 200}} {
		req, err := http.NewRequestWithContext(ctx, http.MethodPut, "http://"+listener.Addr().String()+"/v1/kv/a", strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set(api.HeaderToken, rootToken)
		req.Header.Set("X-Long", c.header)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != c.want {
			t.Errorf("while others are slow: %d, want %d", resp.StatusCode, c.want)
		}
	}
	wg.Wait()
	if q := w.router.last(); q == nil {
		t.Error("nobody was served")
	}
}
