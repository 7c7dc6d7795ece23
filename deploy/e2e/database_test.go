//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"rollcall/node/api"
)

// TestReleasedDatabasePluginsAreReloadedEverywhere runs two released database plugins, of protocol 5 with one connection a
// process and of protocol 6 with many, without a database behind them: what needs one says so, and the reload does not
// need one.
func TestReleasedDatabasePluginsAreReloadedEverywhere(t *testing.T) {
	c := newCluster(t, options{config: patient})
	client := c.any()
	closed := freePorts(t, 1)[0]
	plugins := []struct {
		name, file, from, to string
		config               map[string]any
		secret               string
	}{
		{"redis", "database-redis", "v0.7.0", "v0.7.1", map[string]any{
			"host": "127.0.0.1", "port": closed, "username": "default", "password": "tops3cret", "allowed_roles": "*",
		}, "tops3cret"},
		{"elastic", "database-elasticsearch", "v0.19.0", "v0.19.1", map[string]any{
			"url": fmt.Sprintf("http://127.0.0.1:%d", closed), "username": "vault", "password": "el4stic", "allowed_roles": "*",
		}, "el4stic"},
	}
	if err := client.Enable(timeout(t, long), "secret", "database", api.MountInput{Type: "database"}); err != nil {
		t.Fatal(err)
	}
	c.serving()
	for _, p := range plugins {
		sha := c.install(p.file)
		for _, v := range []string{p.from, p.to} { // the same bytes under two versions
			if _, err := client.RegisterPlugin(timeout(t, long), "database", p.name, api.RegisterRequest{SHA256: sha, Version: v, Command: p.file}); err != nil {
				t.Fatal(err)
			}
		}
		p.config["plugin_name"], p.config["plugin_version"] = p.name, p.from
		body, err := json.Marshal(p.config)
		if err != nil {
			t.Fatal(err)
		}
		// The database does not answer: that is a refusal in words, and nothing is stored.
		if p.name == "redis" {
			status, answer, err := c.send(timeout(t, long), c.nodes[1], http.MethodPost, "database/config/"+p.name, string(body))
			if err != nil || status != http.StatusBadRequest || !strings.Contains(answer, "connection refused") {
				t.Errorf("a config that was to be verified: %d %s %v", status, answer, err)
			}
			if status, answer, err = c.send(timeout(t, short), c.nodes[0], http.MethodGet, "database/config/"+p.name, ""); err != nil || status != http.StatusNotFound {
				t.Errorf("the config that was refused: %d %s %v", status, answer, err)
			}
		}
		p.config["verify_connection"] = false
		if _, err := client.Write(timeout(t, long), "database/config/"+p.name, p.config); err != nil {
			t.Fatal(err)
		}
		if _, err := client.Write(timeout(t, long), "database/roles/"+p.name, map[string]any{
			"db_name": p.name, "creation_statements": `["+@read"]`, "default_ttl": "5m",
		}); err != nil {
			t.Fatal(err)
		}
	}
	c.serving()
	for i, p := range plugins {
		status, answer, err := c.send(timeout(t, long), c.nodes[i], http.MethodGet, "database/config/"+p.name, "")
		if err != nil || status != http.StatusOK || strings.Contains(answer, p.secret) || !strings.Contains(answer, p.from) {
			t.Errorf("config/%s: %d %s %v", p.name, status, answer, err)
		}
		status, answer, err = c.send(timeout(t, long), c.nodes[i], http.MethodGet, "database/creds/"+p.name, "")
		if err != nil || status != http.StatusBadRequest || strings.Contains(answer, p.secret) {
			t.Errorf("creds/%s without a database: %d %s %v", p.name, status, answer, err)
		}
		out := c.run("plugin", "reload", "-type=database", "-plugin="+p.name, "-scope=global", "-version="+p.to)
		if !strings.Contains(out, api.VerdictSwitched) {
			t.Errorf("reload of %s:\n%s", p.name, out)
		}
	}
	list, err := client.Reloads(timeout(t, short))
	if err != nil || len(list.Reloads) != len(plugins) {
		t.Fatalf("reloads: %v %+v", err, list)
	}
	for _, r := range list.Reloads {
		rec, err := client.ReloadRecord(timeout(t, short), r.ID, 0, 0)
		if err != nil || rec.Outcome != api.OutcomeSucceeded || len(rec.Nodes) != len(c.nodes) {
			t.Errorf("reload %s: %v %+v", r.ID, err, rec)
			continue
		}
		for _, n := range rec.Nodes {
			for _, m := range n.Mounts {
				if m.Verdict != api.VerdictSwitched || m.From.PID == m.To.PID || m.From.Version == m.To.Version || m.Requests.Failed > 0 {
					t.Errorf("%s %s: %+v", n.Node, m.Mount, m)
				}
			}
		}
	}
	out := c.run("plugin", "versions")
	for _, want := range []string{"database/config/redis/", "database/config/elastic/", "v0.7.1", "v0.19.1"} {
		if !strings.Contains(out, want) {
			t.Errorf("plugin versions does not show %q:\n%s", want, out)
		}
	}
	c.run("plugin", "rollback", "database", "redis")
	status, answer, err := c.send(timeout(t, long), c.nodes[2], http.MethodPost, "database/reload/redis", "{}")
	if err != nil || status != http.StatusOK || !strings.Contains(answer, `"count":1`) {
		t.Errorf("reload of the mount's own path: %d %s %v", status, answer, err)
	}
}
