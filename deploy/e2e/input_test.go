//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"reflect"
	"strings"
	"testing"
	"time"

	"rollcall/node/api"
)

// badInput is a request that must be refused: with a status of want, in the contract's shape, and without any effect.
type badInput struct {
	name, method, path, body string
	want                     int
	header                   map[string]string
	noToken                  bool
	says                     string // what the text must hold, where that matters
	empty                    bool   // the contract has no text for this
}

// ok is a sha256 that is none of any file.
var ok = strings.Repeat("0a", 32)

func badInputs() []badInput {
	put, post := http.MethodPut, http.MethodPost
	reg := func(fields string) string { return `{"sha256":"` + ok + `",` + fields + `}` }
	cat := "sys/plugins/catalog/secret/bad"
	reload := "sys/plugins/reload/backend"
	return []badInput{
		{name: "JSON that ends early", method: put, path: cat, body: `{"sha256":`, want: 400, says: "JSON"},
		{name: "JSON with something after it", method: put, path: cat, body: `{} {}`, want: 400, says: "JSON"},
		{name: "no JSON", method: put, path: cat, body: `sha256=x`, want: 400},
		{name: "an array", method: put, path: reload, body: `[1]`, want: 400, says: "object"},
		{name: "a number", method: put, path: reload, body: `7`, want: 400, says: "object"},
		{name: "null bytes", method: put, path: reload, body: "\x00\x00", want: 400},
		{name: "bad UTF-8 around braces", method: put, path: reload, body: "\xff{\xfe}", want: 400},
		{name: "a thousand levels", method: put, path: reload, body: strings.Repeat(`{"a":`, 1000) + "1" + strings.Repeat("}", 1000), want: 400, says: "nested"},
		{name: "a million brackets", method: put, path: reload, body: `{"a":` + strings.Repeat("[", 1_000_000-10), want: 400},
		{name: "more than 1 MiB for sys", method: put, path: reload, body: `{"plugin":"` + strings.Repeat("x", 1<<20) + `"}`, want: 413},
		{name: "more than 32 MiB for a plugin", method: put, path: "demo/data/x", body: `{"value":"` + strings.Repeat("x", 32<<20) + `"}`, want: 413},
		{name: "a storage value of more than 1 MiB", method: put, path: "demo/data/x", body: `{"value":"` + strings.Repeat("x", 2<<20) + `"}`, want: 413},

		{name: "no sha256", method: put, path: cat, body: `{"command":"x"}`, want: 400, says: "sha256"},
		{name: "sha256 that is none", method: put, path: cat, body: `{"sha256":"xyz","command":"x"}`, want: 400},
		{name: "half a sha256", method: put, path: cat, body: `{"sha256":"0a0a","command":"x"}`, want: 400},
		{name: "sha256 of another file", method: put, path: cat, body: reg(`"command":"rollcall-demo"`), want: 400, says: "sha256"},
		{name: "sha256 as an object", method: put, path: cat, body: `{"sha256":{},"command":"x"}`, want: 400, says: "sha256"},
		{name: "no command", method: put, path: cat, body: `{"sha256":"` + ok + `"}`, want: 400},
		{name: "args as an object", method: put, path: cat, body: reg(`"command":"x","args":{"a":1}`), want: 400, says: "args"},
		{name: "env that is no assignment", method: put, path: cat, body: reg(`"command":"x","env":["novalue"]`), want: 400, says: "env"},
		{name: "command that leaves the directory", method: put, path: cat, body: reg(`"command":"../../bin/sh"`), want: 400},
		{name: "command that leaves it in the middle", method: put, path: cat, body: reg(`"command":"a/../../../bin/sh"`), want: 400},
		{name: "absolute command", method: put, path: cat, body: reg(`"command":"/bin/sh"`), want: 400},
		{name: "command with a null byte", method: put, path: cat, body: reg(`"command":"a\u0000b"`), want: 400},
		{name: "command of dots", method: put, path: cat, body: reg(`"command":".."`), want: 400},
		{name: "version that is none", method: put, path: cat, body: reg(`"command":"x","version":"new"`), want: 400, says: "version"},
		{name: "name that leaves", method: put, path: "sys/plugins/catalog/secret/..%2f..%2fetc", body: reg(`"command":"x"`), want: 404},
		{name: "name with a space", method: put, path: "sys/plugins/catalog/secret/a%20b", body: reg(`"command":"x"`), want: 400},
		{name: "name with a null byte", method: put, path: "sys/plugins/catalog/secret/a%00b", body: reg(`"command":"x"`), want: 400},
		{name: "name of 10,000 letters", method: put, path: "sys/plugins/catalog/secret/" + strings.Repeat("n", 10_000), body: reg(`"command":"x"`), want: 400},
		{name: "type that there is not", method: put, path: "sys/plugins/catalog/nope/x", body: reg(`"command":"x"`), want: 400},

		{name: "mount at ../", method: post, path: "sys/mounts/../", body: `{"type":"demo"}`, want: 400},
		{name: "mount at an encoded ../", method: post, path: "sys/mounts/%2e%2e%2f%2e%2e%2fx", body: `{"type":"demo"}`, want: 404},
		{name: "mount with ../ inside", method: post, path: "sys/mounts/a/%2e%2e/%2e%2e/%2e%2e/b", body: `{"type":"demo"}`, want: 404},
		{name: "mount with a null byte", method: post, path: "sys/mounts/a%00b", body: `{"type":"demo"}`, want: 400},
		{name: "mount with a line break", method: post, path: "sys/mounts/a%0ab", body: `{"type":"demo"}`, want: 400},
		{name: "mount over sys", method: post, path: "sys/mounts/sys/x", body: `{"type":"demo"}`, want: 400},
		{name: "mount over auth", method: post, path: "sys/mounts/auth/x", body: `{"type":"demo"}`, want: 400},
		{name: "mount over a mount", method: post, path: "sys/mounts/demo", body: `{"type":"demo"}`, want: 400, says: "demo/"},
		{name: "mount inside a mount", method: post, path: "sys/mounts/demo/inner", body: `{"type":"demo"}`, want: 400, says: "demo/"},
		{name: "mount of no plugin", method: post, path: "sys/mounts/x", body: `{"type":"nope"}`, want: 400},
		{name: "mount of no type", method: post, path: "sys/mounts/x", body: `{}`, want: 400},
		{name: "mount of a version that there is not", method: post, path: "sys/mounts/x", body: `{"type":"demo","config":{"plugin_version":"v9.9.9"}}`, want: 400},
		{name: "mount with a negative TTL", method: post, path: "sys/mounts/x", body: `{"type":"demo","config":{"max_lease_ttl":"-1s"}}`, want: 400},
		{name: "mount with options as a list", method: post, path: "sys/mounts/x", body: `{"type":"demo","options":["a"]}`, want: 400},
		{name: "tune of no mount", method: post, path: "sys/mounts/nope/tune", body: `{"description":"x"}`, want: 400},
		{name: "tune to a version that there is not", method: post, path: "sys/mounts/demo/tune", body: `{"plugin_version":"v9.9.9"}`, want: 400},
		{name: "move to ../", method: post, path: "sys/remount", body: `{"from":"demo","to":"../x"}`, want: 400},
		{name: "move to a mount", method: post, path: "sys/remount", body: `{"from":"demo","to":"demo"}`, want: 400},
		{name: "move of nothing", method: post, path: "sys/remount", body: `{"to":"x"}`, want: 400},

		{name: "reload of nothing", method: put, path: reload, body: `{}`, want: 400, says: "plugin or mounts must be provided"},
		{name: "reload of both", method: put, path: reload, body: `{"plugin":"demo","mounts":["demo"]}`, want: 400, says: "plugin and mounts cannot be set at the same time"},
		{name: "reload with another scope", method: put, path: reload, body: `{"plugin":"demo","scope":"galaxy"}`, want: 400, says: "reload scope must be omitted or 'global'"},
		{name: "reload of an unknown plugin", method: put, path: reload, body: `{"plugin":"nope","scope":"global"}`, want: 400, says: `plugin not found in the catalog: "nope"`},
		{name: "reload of an unknown mount", method: put, path: reload, body: `{"mounts":["nope"],"scope":"global"}`, want: 400, says: "nope"},
		{name: "reload of a mount and an unknown one", method: put, path: reload, body: `{"mounts":["demo","nope"],"scope":"global"}`, want: 400, says: "nope"},
		{name: "reload of ../", method: put, path: reload, body: `{"mounts":["../demo"],"scope":"global"}`, want: 400},
		{name: "reload with a plugin that is an object", method: put, path: reload, body: `{"plugin":{"a":1}}`, want: 400, says: "plugin"},
		{name: "reload with mounts that are numbers", method: put, path: reload, body: `{"mounts":[1,2]}`, want: 400, says: "mounts"},
		{name: "reload with another strategy", method: put, path: reload, body: `{"plugin":"demo","scope":"global","strategy":"luck"}`, want: 400, says: "strategy"},
		{name: "reload with a version that is none", method: put, path: reload, body: `{"plugin":"demo","scope":"global","version":"x"}`, want: 400, says: "version"},
		{name: "reload to a version that there is not", method: put, path: reload, body: `{"plugin":"demo","scope":"global","version":"v9.9.9"}`, want: 400, says: "v9.9.9"},
		{name: "local reload to another version", method: put, path: reload, body: `{"plugin":"demo","version":"v1.1.0"}`, want: 400},
		{name: "reload with a negative deadline", method: put, path: reload, body: `{"plugin":"demo","scope":"global","deadline":"-1s"}`, want: 400, says: "deadline"},
		{name: "reload with waves that are words", method: put, path: reload, body: `{"plugin":"demo","scope":"global","strategy":"canary","waves":"some,all"}`, want: 400},
		{name: "reload with a share above one", method: put, path: reload, body: `{"plugin":"demo","scope":"global","max_error_rate":2}`, want: 400},
		{name: "reload with a wait that is none", method: put, path: reload, body: `{"plugin":"demo","scope":"global","wait":"soon"}`, want: 400, says: "wait"},
		{name: "reload with an id that is a path", method: put, path: reload, body: `{"plugin":"demo","scope":"global","reload_id":"../../x"}`, want: 400, says: "id"},
		{name: "reload with an id of 10,000 letters", method: put, path: reload, body: `{"plugin":"demo","scope":"global","reload_id":"` + strings.Repeat("i", 10_000) + `"}`, want: 400, says: "id"},
		{name: "named reload of another type", method: put, path: "sys/plugins/reload/nope/demo", body: `{}`, want: 404},
		{name: "named reload without a name", method: put, path: "sys/plugins/reload/unknown", body: `{}`, want: 400, says: "namespace"},
		{name: "status without an id", method: http.MethodGet, path: "sys/plugins/reload/backend/status", want: 400, says: "reload_id"},
		{name: "status of an unknown id", method: http.MethodGet, path: "sys/plugins/reload/backend/status?reload_id=nope", want: 404, says: "nope"},
		{name: "record of an unknown id", method: http.MethodGet, path: "sys/reloads/nope", want: 404, says: "nope"},
		{name: "abort of an unknown id", method: put, path: "sys/reloads/nope/abort", body: `{}`, want: 404, says: "nope"},
		{name: "an action that there is not", method: put, path: "sys/reloads/nope/explode", body: `{}`, want: 404},
		{name: "an index that is none", method: http.MethodGet, path: "sys/reloads/nope?index=x", want: 404},

		{name: "a method that there is not", method: "BREW", path: "sys/mounts", want: 405, empty: true},
		{name: "a method that there is not, at a plugin", method: "BREW", path: "demo/info", want: 405, empty: true},
		{name: "TRACE", method: http.MethodTrace, path: "sys/mounts", want: 405, empty: true},
		{name: "DELETE of a reload", method: http.MethodDelete, path: reload, want: 405},
		{name: "GET of a reload", method: http.MethodGet, path: reload, want: 405},
		{name: "GET of a catalog type", method: http.MethodGet, path: "sys/plugins/catalog/secret", want: 405},
		{name: "PATCH of the wrong type", method: http.MethodPatch, path: reload, body: `{}`, want: 415},
		{name: "a list that is no boolean", method: http.MethodGet, path: "demo/data?list=perhaps", want: 400, empty: true},
		{name: "a path of sys that there is not", method: http.MethodGet, path: "sys/nope", want: 404},
		{name: "a path without a mount", method: http.MethodGet, path: "nowhere/at/all", want: 404},
		{name: "a path that ends in a slash", method: put, path: "demo/data/", body: `{"value":"x"}`, want: 400},
		{name: "a body that the plugin does not take", method: put, path: "demo/data/x", body: `{"unknown":1}`, want: 400},
		{name: "a path that the plugin does not have", method: http.MethodGet, path: "demo/nope", want: 404},
		{name: "a namespace that there is not", method: http.MethodGet, path: "demo/info", want: 404, header: map[string]string{api.HeaderNamespace: "nope"}},

		{name: "no token", method: http.MethodGet, path: "sys/mounts", noToken: true, want: 403, says: "permission denied"},
		{name: "no token, a reload", method: put, path: reload, body: `{"plugin":"demo","scope":"global"}`, noToken: true, want: 403, says: "permission denied"},
		{name: "no token, a plugin", method: http.MethodGet, path: "demo/info", noToken: true, want: 403, says: "permission denied"},
		{name: "no token, a path without a mount", method: http.MethodGet, path: "nowhere", noToken: true, want: 403, says: "permission denied"},
		{name: "another token", method: http.MethodGet, path: "sys/mounts", noToken: true, header: map[string]string{api.HeaderToken: "rc.wrong"}, want: 403, says: "permission denied"},
		{name: "a token of 8 KiB", method: http.MethodGet, path: "sys/mounts", noToken: true, header: map[string]string{api.HeaderToken: strings.Repeat("t", 8<<10)}, want: 403, says: "permission denied"},
	}
}

// TestBadInputIsRefusedInTheContractsShapeWithoutEffect sends every bad request to the leader and to a follower.
func TestBadInputIsRefusedInTheContractsShapeWithoutEffect(t *testing.T) {
	c := newCluster(t, options{config: patient})
	c.mountDemo()
	leader, follower := c.leader(), c.followers()[0]
	before := c.everything()
	for i, b := range badInputs() {
		s := leader
		if i%2 == 1 {
			s = follower
		}
		t.Run(b.name, func(t *testing.T) { isRefused(t, c, s, b) })
	}
	if after := c.everything(); !reflect.DeepEqual(before, after) {
		t.Errorf("bad input had an effect:\nbefore %s\nafter  %s", before, after)
	}
	if err := c.settled(c.nodes...); err != nil {
		t.Error(err)
	}
}

func isRefused(t *testing.T, c *cluster, s *server, b badInput) {
	req, err := http.NewRequestWithContext(timeout(t, long), b.method, s.url()+"/v1/"+b.path, strings.NewReader(b.body))
	if err != nil {
		t.Fatal(err)
	}
	if !b.noToken {
		req.Header.Set(api.HeaderToken, c.token)
	}
	for k, v := range b.header {
		req.Header.Set(k, v)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		if b.want == http.StatusRequestEntityTooLarge && strings.Contains(err.Error(), "reset by peer") {
			return // refused before it was sent whole
		}
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != b.want {
		t.Errorf("status %d, wanted %d: %.300s", resp.StatusCode, b.want, raw)
	}
	var body struct {
		Errors []string `json:"errors"`
	}
	if err := json.Unmarshal(raw, &body); err != nil || body.Errors == nil {
		t.Fatalf("%d: not the contract's shape: %.300q", resp.StatusCode, raw)
	}
	text := strings.Join(body.Errors, " ")
	if !strings.Contains(text, b.says) || strings.Contains(text, "internal error") || text == "" && !b.empty {
		t.Errorf("%d: the text does not say %q: %.300q", resp.StatusCode, b.says, text)
	}
	if ct := resp.Header.Get("Content-Type"); ct != "application/json" {
		t.Errorf("content type %q", ct)
	}
}

// everything is what a cluster says of itself, but for what changes with time.
func (c *cluster) everything() map[string]string {
	c.t.Helper()
	out := map[string]string{}
	for _, path := range []string{"sys/plugins/catalog", "sys/plugins/pins", "sys/mounts", "sys/auth", "sys/reloads", "demo/data/x"} {
		_, answer := c.request(c.leader(), http.MethodGet, path, "")
		var env struct {
			Data   map[string]json.RawMessage `json:"data"`
			Errors []string                   `json:"errors"`
		}
		if err := json.Unmarshal([]byte(answer), &env); err != nil {
			c.t.Fatalf("%s: %v: %s", path, err, answer)
		}
		delete(env.Data, "index")
		raw, err := json.Marshal(env)
		if err != nil {
			c.t.Fatal(err)
		}
		out[path] = string(raw)
	}
	v, err := c.any().Versions(timeout(c.t, short))
	if err != nil {
		c.t.Fatal(err)
	}
	v.Index = 0
	raw, err := json.Marshal(v)
	if err != nil {
		c.t.Fatal(err)
	}
	out["versions"] = string(raw)
	return out
}

// TestBodiesOfUnknownLengthAreBoundedToo sends bodies that do not say how long they are, and do not end.
func TestBodiesOfUnknownLengthAreBoundedToo(t *testing.T) {
	c := newCluster(t, options{config: patient})
	c.mountDemo()
	for _, path := range []string{"sys/plugins/reload/backend", "demo/data/x"} {
		sent := &endless{limit: 64 << 20}
		req, err := http.NewRequestWithContext(timeout(t, long), http.MethodPut, c.nodes[0].url()+"/v1/"+path, sent)
		if err != nil {
			t.Fatal(err)
		}
		req.ContentLength = -1
		req.Header.Set(api.HeaderToken, c.token)
		resp, err := http.DefaultClient.Do(req)
		if err == nil {
			_ = resp.Body.Close()
			if resp.StatusCode != http.StatusRequestEntityTooLarge {
				t.Errorf("%s: status %d after %d bytes", path, resp.StatusCode, sent.sent)
			}
		} else if urlErr, isURL := err.(*url.Error); !isURL || urlErr.Timeout() { //nolint:errorlint // what http returns
			t.Errorf("%s: %v after %d bytes", path, err, sent.sent)
		}
		if sent.sent >= sent.limit {
			t.Errorf("%s: all of %d bytes were taken", path, sent.sent)
		}
	}
	if got, err := c.nodes[0].ask(timeout(t, short), "info"); err != nil || got.Data.Version != "v1.0.0" {
		t.Errorf("%+v, %v", got, err)
	}
}

// endless is a JSON string that does not end before limit bytes.
type endless struct{ sent, limit int }

func (e *endless) Read(p []byte) (int, error) {
	if e.sent >= e.limit {
		return 0, io.EOF
	}
	n := copy(p, strings.Repeat("x", len(p)))
	if e.sent == 0 {
		n = copy(p, `{"value":"`)
	}
	e.sent += n
	return n, nil
}

// TestALocalReloadIsAnOverrideOfOneNodeThatAllCanSee: it restarts the plugin on the node that was asked, survives that
// node's restart, and ends with the next global reload.
func TestALocalReloadIsAnOverrideOfOneNodeThatAllCanSee(t *testing.T) {
	c := newCluster(t, options{config: patient})
	c.mountDemo()
	asked := c.followers()[0]
	cell := func() api.NodeVersion {
		t.Helper()
		v, err := c.any().Versions(timeout(t, short))
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range v.Mounts[0].Nodes {
			if n.Node != asked.name && n.Override != "" {
				t.Errorf("%s has the override %q", n.Node, n.Override)
			}
		}
		for _, n := range v.Mounts[0].Nodes {
			if n.Node == asked.name {
				return n
			}
		}
		t.Fatalf("%s is not in %+v", asked.name, v)
		return api.NodeVersion{}
	}
	pids := c.pids()
	before := cell()
	l := startCounting(c, "demo", 6, 5*time.Millisecond)
	out, _, err := asked.client().Reload(timeout(t, long), "", api.ReloadRequest{Mounts: []string{"demo/"}})
	if err != nil {
		t.Fatal(err)
	}
	rec := c.ended(c.any(), out.ReloadID)
	if rec.Scope != "local" || rec.Outcome != api.OutcomeSucceeded || len(rec.Expected) != 1 || rec.ServingNode != asked.name {
		t.Error(tell(rec))
	}
	until(t, short, "the override is to be seen", func() error {
		if n := cell(); n.Override != "local" || !n.Same || n.Wanted.Generation <= before.Wanted.Generation {
			return fmt.Errorf("%+v", n)
		}
		return nil
	})
	for name, pid := range c.pids() {
		if (pid != pids[name]) != (name == asked.name) {
			t.Errorf("%s: pid %d was %d; only %s was asked", name, pid, pids[name], asked.name)
		}
	}
	l.stop(t, 5)
	over := cell()
	asked.kill()
	asked.start()
	c.serving()
	if n := cell(); n.Override != "local" || n.Wanted.Generation != over.Wanted.Generation {
		t.Errorf("after a restart: %+v, before %+v", n, over)
	}
	rec = c.reload(c.nodes[0], api.ReloadRequest{Plugin: "demo"})
	if rec.Outcome != api.OutcomeSucceeded {
		t.Error(tell(rec))
	}
	if n := cell(); n.Override != "" || !n.Same {
		t.Errorf("after a global reload: %+v", n)
	}
}

// pids of the demo mount by node.
func (c *cluster) pids() map[string]int64 {
	c.t.Helper()
	v, err := c.any().Versions(timeout(c.t, short))
	if err != nil {
		c.t.Fatal(err)
	}
	out := map[string]int64{}
	for _, n := range v.Mounts[0].Nodes {
		if n.Running != nil {
			out[n.Node] = n.Running.PID
		}
	}
	return out
}
