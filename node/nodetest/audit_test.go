package nodetest

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"rollcall/node"
	"rollcall/node/api"
)

// auditTrail reads the records of one audit file; the end of a file that is being written to may be half a line.
func auditTrail(t testing.TB, path string) []api.AuditEntry {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var out []api.AuditEntry
	for line := range strings.Lines(string(raw)) {
		var e api.AuditEntry
		if !strings.HasSuffix(line, "\n") {
			break
		}
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("%s: %v: %q", path, err, line)
		}
		out = append(out, e)
	}
	return out
}

// TestEachRequestIsRecordedOnceOnTheNodeThatWasAsked sends requests with secrets everywhere through every node of a cluster: each has
// one record of itself and one of its answer, on the node that was asked, however far it was forwarded; and no secret stands in
// any audit file, nor in the log.
func TestEachRequestIsRecordedOnceOnTheNodeThatWasAsked(t *testing.T) {
	dir := t.TempDir()
	file := func(i int) string { return filepath.Join(dir, fmt.Sprintf("audit-%d.log", i)) }
	c := Start(t, 3, func(i int, cfg *node.Config, _ *node.Options) { cfg.Audit.File = file(i) })
	c.Eventually(20*time.Second, "a salt", func() error {
		for i := range 3 {
			if c.Node(i).State().View().AuditSalt() == "" {
				return fmt.Errorf("node %d has none", i)
			}
		}
		return nil
	})
	c.Register("demo", "v1.0.0")
	c.Enable("demo", "demo", "v1.0.0")

	canaries := map[string]string{"root token": c.Token, "salt": c.Node(0).State().View().AuditSalt()}
	secret := func(where string) string {
		canaries[where] = "canary-" + hex.EncodeToString([]byte(where))
		return canaries[where]
	}
	type sent struct {
		node          int
		method, path  string
		status        int
		operation     string
		correlationID string
	}
	var all []sent
	call := func(i int, method, path string, body map[string]any, want int) map[string]any {
		t.Helper()
		raw, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		req, err := http.NewRequestWithContext(t.Context(), method, c.Node(i).APIAddress()+"/v1/"+path, bytes.NewReader(raw))
		if err != nil {
			t.Fatal(err)
		}
		id := fmt.Sprintf("call-%d", len(all))
		req.Header.Set("X-Correlation-Id", id)
		req.Header.Set("X-Secret", secret("a header that nobody asked for"))
		req.Header.Set(api.HeaderToken, c.Token)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		answer, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode != want {
			t.Fatalf("%s %s on node %d: %d %s", method, path, i, resp.StatusCode, answer)
		}
		all = append(all, sent{i, method, path, resp.StatusCode, "", id})
		var out map[string]any
		_ = json.Unmarshal(answer, &out)
		return out
	}
	for i := range 3 { // two of the three forward what writes
		n := fmt.Sprint(i)
		call(i, "PUT", "demo/data/k"+n, map[string]any{"value": secret("value " + n)}, http.StatusNoContent)
		call(i, "GET", "demo/data/k"+n, nil, http.StatusOK)
		call(i, "PUT", "demo/data/k"+n, map[string]any{"value": secret("deep " + n), "in": []any{map[string]any{"d": secret("nested " + n)}}}, http.StatusNoContent)
		call(i, "LIST", "demo/data", nil, http.StatusOK)
		call(i, "DELETE", "demo/data/k"+n, nil, http.StatusNoContent)
		call(i, "PUT", "sys/plugins/catalog/secret/other"+n, map[string]any{
			"sha256": c.Sum, "command": PluginCommand, "version": "v1.0.0", "env": []string{"PASSWORD=" + secret("env "+n)},
		}, http.StatusNoContent)
		call(i, "PUT", "sys/plugins/reload/backend", map[string]any{"plugin": secret("no plugin " + n)}, http.StatusBadRequest)
		made := call(i, "PUT", "auth/token/create", map[string]any{"ttl": "1h", "meta": map[string]string{"who": "x"}}, http.StatusOK)
		auth, _ := made["auth"].(map[string]any)
		token, _ := auth["client_token"].(string)
		accessor, _ := auth["accessor"].(string)
		if token == "" || accessor == "" {
			t.Fatalf("%v", made)
		}
		canaries["token "+n], canaries["accessor "+n] = token, accessor
		call(i, "PUT", "auth/token/revoke", map[string]any{"token": token}, http.StatusNoContent)
		call(i, "PUT", "sys/wrapping/wrap", map[string]any{"a": secret("not wrapped " + n)}, http.StatusBadRequest)
		hash, _ := call(i, "PUT", "sys/audit-hash/file", map[string]any{"input": canaries["value "+n]}, http.StatusOK)["data"].(map[string]any)
		trail, _ := os.ReadFile(file(i))
		if text, _ := hash["hash"].(string); text == "" || strings.Count(string(trail), text) < 2 { // written, and read
			t.Errorf("node %d: %q stands in its file %d times", i, text, strings.Count(string(trail), text))
		}
	}
	trails := make([]map[string][]api.AuditEntry, 3)
	for i := range trails {
		trails[i] = map[string][]api.AuditEntry{}
		for _, e := range auditTrail(t, file(i)) {
			id := strings.Join(e.Request.Headers["x-correlation-id"], "")
			trails[i][id] = append(trails[i][id], e)
		}
	}
	for _, s := range all {
		for i, trail := range trails {
			got := trail[s.correlationID]
			what := fmt.Sprintf("%s %s on node %d, in the file of node %d", s.method, s.path, s.node, i)
			if i != s.node {
				if len(got) != 0 {
					t.Errorf("%s: %d records", what, len(got))
				}
				continue
			}
			if len(got) != 2 || got[0].Type != api.AuditTypeRequest || got[1].Type != api.AuditTypeResponse || got[0].Request.ID != got[1].Request.ID {
				t.Errorf("%s: %+v", what, got)
				continue
			}
			if got[1].Response.Status != s.status || got[0].Request.Path != s.path && got[0].Request.Path != s.path+"/" || got[0].Node != c.Node(i).Name() {
				t.Errorf("%s: %+v %+v", what, got[0], got[1].Response)
			}
		}
	}
	for i := range 3 {
		raw, err := os.ReadFile(file(i))
		if err != nil {
			t.Fatal(err)
		}
		noCanary(t, "the audit file of node "+fmt.Sprint(i), string(raw), canaries)
	}
	noCanary(t, "the log", c.Log(), canaries)
}

// noCanary fails when a secret stands in a text, in clear or encoded.
func noCanary(t testing.TB, where, text string, canaries map[string]string) {
	t.Helper()
	for what, secret := range canaries {
		for _, form := range []string{secret, base64.StdEncoding.EncodeToString([]byte(secret)), hex.EncodeToString([]byte(secret))} {
			if strings.Contains(text, form) {
				t.Errorf("%s holds the %s", where, what)
			}
		}
	}
}
