//go:build e2e

package e2e

import (
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"rollcall/node/api"
)

// badVersion is a version of the demo plugin that some node cannot take.
type badVersion struct {
	name, version, command string
	args                   []string
	sha                    string   // "" for the command's own
	nodes                  []string // that refuse it; nil for all
	words                  []string // that the cause must hold, each
}

// TestARefusedReloadSaysWhereAndWhyAndTheOldVersionServesOn tries versions that cannot run: the answer names node, phase
// and cause, and no request of anybody fails. With all-or-nothing nothing changes anywhere; with best-effort the
// nodes that refuse keep the old version.
func TestARefusedReloadSaysWhereAndWhyAndTheOldVersionServesOn(t *testing.T) {
	config := map[string]any{"plugins.start_timeout": "3s"}
	maps.Copy(config, patient)
	c := newCluster(t, options{config: config, plugins: []string{demoName}})
	demo := sum(t, filepath.Join(c.nodes[0].plugins, demoName))
	c.register("demo", "v1.0.0", demoName, demo, "demo-plugin", "-version", "v1.0.0")
	c.mount("demo", "demo", "v1.0.0")

	none := strings.Repeat("ab", 32)
	bad := []badVersion{
		{
			name: "exits at once", version: "v1.1.0", args: []string{"-fail", "exit", "-fail-on", "node-2"}, nodes: []string{"node-2"},
			words: []string{"exited with status 3", "told to fail at its start"},
		},
		{
			name: "hangs before the handshake", version: "v1.2.0", args: []string{"-fail", "hang", "-fail-on", "node-2"},
			nodes: []string{"node-2"}, words: []string{"3s"},
		},
		{
			name: "fails in Setup", version: "v1.3.0", args: []string{"-fail", "setup", "-fail-on", "node-2"}, nodes: []string{"node-2"},
			words: []string{"told to fail in Setup"},
		},
		{name: "is for another CPU", version: "v1.4.0", command: foreignName, words: []string{"built for another machine", foreignMachine}},
		// The file is not there yet when the version is entered: there is nothing to hold its sha256 against.
		{name: "has another sha256", version: "v1.5.0", command: "late", sha: none, words: []string{none, demo}},
		{name: "is not there", version: "v1.6.0", command: "missing", sha: strings.Repeat("cd", 32), words: []string{"missing"}},
	}
	for _, b := range bad {
		c.enter(b, demo)
	}
	c.put(filepath.Join(c.nodes[0].plugins, demoName), "late")

	l := startCounting(c, "demo", 6, 10*time.Millisecond)
	for _, b := range bad {
		for _, strategy := range []string{"all-or-nothing", "best-effort"} {
			t.Run(b.name+", "+strategy, func(t *testing.T) { refuses(t, c, b, strategy) })
		}
	}
	l.stop(t, 200)
}

// enter registers a bad version.
func (c *cluster) enter(b badVersion, demo string) {
	c.t.Helper()
	command, sha := b.command, b.sha
	if command == "" {
		command, sha = demoName, demo
	}
	if sha == "" {
		sha = c.install(command)
	}
	c.register("demo", b.version, command, sha, append([]string{"demo-plugin", "-version", b.version}, b.args...)...)
}

func (c *cluster) register(name, version, command, sha string, args ...string) {
	c.t.Helper()
	if _, err := c.any().RegisterPlugin(timeout(c.t, long), "secret", name, api.RegisterRequest{
		SHA256: sha, Version: version, Command: command, Args: args,
	}); err != nil {
		c.t.Fatalf("register %s %s: %v", name, version, err)
	}
}

// mount mounts a plugin at a path and waits until every live node serves it.
func (c *cluster) mount(path, plugin, version string) {
	c.t.Helper()
	if err := c.any().Enable(timeout(c.t, long), "secret", path, api.MountInput{
		Type: plugin, Config: &api.MountConfigInput{PluginVersion: version},
	}); err != nil {
		c.t.Fatalf("mount %s %s at %s: %v", plugin, version, path, err)
	}
	c.serving()
}

func refuses(t *testing.T, c *cluster, b badVersion, strategy string) {
	before := c.running("demo/")
	// Asked to wait, the server answers with the cause, and with a status that clients do not repeat.
	body := fmt.Sprintf(`{"plugin":"demo","scope":"global","strategy":%q,"version":%q,"wait":"60s","reload_id":"refuse-%s-%s"}`,
		strategy, b.version, b.version, strategy)
	status, answer := c.request(c.nodes[0], http.MethodPut, "sys/plugins/reload/backend", body)
	rec, err := c.any().ReloadRecord(timeout(t, short), "refuse-"+b.version+"-"+strategy, 0, 0)
	if err != nil {
		t.Fatalf("%v (%d %s)", err, status, answer)
	}
	// All-or-nothing is over at the first refusal: which of several nodes it was is then open.
	mixed, first := strategy == "best-effort" && b.nodes != nil, strategy == "all-or-nothing" && b.nodes == nil
	if first && !slices.ContainsFunc(c.nodes, func(s *server) bool { return part(rec, s.name).Verdict == api.VerdictRefused }) {
		t.Error("no node has refused")
	}
	if !mixed && status != http.StatusBadRequest {
		t.Errorf("the answer is %d %s", status, answer)
	}
	after := c.running("demo/")
	for _, s := range c.nodes {
		m := part(rec, s.name)
		refuses := b.nodes == nil && !(first && m.Verdict == api.VerdictUnchanged) || slices.Contains(b.nodes, s.name)
		switch {
		case refuses && m.Verdict != api.VerdictRefused:
			t.Errorf("%s: verdict %q, wanted refused", s.name, m.Verdict)
		case refuses && m.Phase == "":
			t.Errorf("%s: no phase is named", s.name)
		case refuses && after[s.name] != before[s.name], !refuses && !mixed && after[s.name] != before[s.name]:
			t.Errorf("%s ran %s and runs %s now", s.name, before[s.name], after[s.name])
		case !refuses && mixed && after[s.name] != b.version:
			t.Errorf("%s runs %s, wanted %s", s.name, after[s.name], b.version)
		}
		for _, w := range b.words {
			if refuses && !strings.Contains(m.Cause, w) {
				t.Errorf("%s: the cause does not say %q: %q", s.name, w, m.Cause)
			}
		}
		if refuses && !mixed && (!strings.Contains(answer, "node "+s.name) || !strings.Contains(answer, b.words[0])) {
			t.Errorf("the answer does not name %s and %q: %s", s.name, b.words[0], answer)
		}
	}
	switch {
	case strategy == "all-or-nothing" && (rec.Outcome != api.OutcomeAborted || rec.DecidedIndex != 0):
		t.Errorf("outcome %q", rec.Outcome)
	case strategy == "best-effort" && (rec.Outcome == api.OutcomeSucceeded || rec.Outcome == ""):
		t.Errorf("outcome %q although %v refused", rec.Outcome, b.nodes)
	}
	if t.Failed() {
		t.Logf("%d %s\n%s", status, answer, tell(rec))
	}
	if mixed { // back to where the next case begins
		if rec := c.reload(c.nodes[0], api.ReloadRequest{Plugin: "demo", Version: "v1.0.0"}); rec.Outcome != api.OutcomeSucceeded {
			t.Fatal(tell(rec))
		}
		until(t, short, "every node runs v1.0.0 again", func() error { return c.settled(c.nodes...) })
	}
}

// TestANodeWithoutTheFileGetsItFromAPeerAndNeverRunsAnotherOne: bytes that one node alone was given reach the others, the
// one that has no file, and the one where another file stands under its name.
func TestANodeWithoutTheFileGetsItFromAPeerAndNeverRunsAnotherOne(t *testing.T) {
	c := newCluster(t, options{ownPlugins: true, config: patient})
	c.register("demo", "v1.0.0", demoName, c.install(demoName), "demo-plugin", "-version", "v1.0.0")
	c.mount("demo", "demo", "v1.0.0")
	fresh := c.install("kv-"+kvNew, c.nodes[0])
	c.register("demo", "v2.0.0", "kv-"+kvNew, fresh)

	c.put(c.path(c.nodes[1].name, "plugins", demoName), "kv-"+kvNew, c.nodes[1])
	rec := c.reload(c.nodes[2], api.ReloadRequest{Plugin: "demo", Version: "v2.0.0"})
	allSwitched(t, rec, "v2.0.0", c.nodes...)
	for _, s := range c.nodes {
		if got := part(rec, s.name).To; got == nil || got.SHA256 != fresh {
			t.Errorf("%s runs %+v, registered is sha256 %s", s.name, got, fresh)
		}
	}
	c.nodes[1].kill() // what it was given is its own now, also when nobody has the file any more
	for _, s := range []*server{c.nodes[0], c.nodes[2]} {
		_ = os.Remove(filepath.Join(s.plugins, "kv-"+kvNew))
	}
	c.nodes[1].start()
	c.serving()
}
