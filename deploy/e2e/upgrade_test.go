//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"rollcall/node/api"
)

// registerKV enters KV's two versions and mounts the older one at kv/ as version 2.
func (c *cluster) mountKV(version string) {
	c.t.Helper()
	for _, v := range []string{kvOld, kvNew} {
		if _, err := c.any().RegisterPlugin(timeout(c.t, long), "secret", "kv", api.RegisterRequest{
			SHA256: c.install("kv-" + v), Version: v, Command: "kv-" + v,
		}); err != nil {
			c.t.Fatalf("register kv %s: %v", v, err)
		}
	}
	if err := c.any().Enable(timeout(c.t, long), "secret", "kv", api.MountInput{
		Type: "kv", Options: map[string]string{"version": "2"}, Config: &api.MountConfigInput{PluginVersion: version},
	}); err != nil {
		c.t.Fatalf("mount kv %s: %v", version, err)
	}
	// KV v2 prepares its storage after the mount is there, and refuses requests until then.
	for _, s := range c.live() {
		until(c.t, long, "KV has prepared its storage as "+s.name+" sees it", func() error {
			_, err := s.client().Write(timeout(c.t, short), "kv/data/ready", map[string]any{"data": map[string]string{"v": s.name}})
			if err == nil {
				_, err = s.client().Read(timeout(c.t, short), "kv/data/ready", nil)
			}
			return err
		})
	}
	c.serving()
}

// running is the version of a mount on each node.
func (c *cluster) running(mount string) map[string]string {
	c.t.Helper()
	v, err := c.any().Versions(timeout(c.t, short))
	if err != nil {
		c.t.Fatal(err)
	}
	out := map[string]string{}
	for _, m := range v.Mounts {
		if m.Mount != mount {
			continue
		}
		for _, n := range m.Nodes {
			if n.Running != nil {
				out[n.Node] = n.Running.Version
			}
		}
	}
	return out
}

// TestKVUpgradeLosesNothingWhicheverNodeIsAsked is the main promise: KV v2 goes from one release to the next on three
// nodes, under 16 writers (one group of them on one hot key) and 16 readers through all nodes, and nobody notices.
func TestKVUpgradeLosesNothingWhicheverNodeIsAsked(t *testing.T) {
	c := newCluster(t, options{config: patient})
	c.mountKV(kvOld)
	l := startLoad(c, loadOptions{mount: "kv", writers: 12, hot: 4, readers: 16, readPace: 20 * time.Millisecond})
	share := *flagWrites / 4
	l.atLeast(share)
	for _, step := range []struct {
		asked   string
		node    *server
		version string
	}{
		{"a follower", c.followers()[0], kvNew},
		{"the leader, back", c.leader(), kvOld},
		{"the leader", c.leader(), kvNew},
	} {
		began := time.Now()
		rec := c.reload(step.node, api.ReloadRequest{Plugin: "kv", Version: step.version})
		t.Logf("asked of %s: %s in %s", step.asked, rec.Outcome, time.Since(began).Round(time.Millisecond))
		allSwitched(t, rec, step.version, c.nodes...)
		for node, v := range c.running("kv/") {
			if v != step.version {
				t.Errorf("%s runs %s, wanted %s", node, v, step.version)
			}
		}
		c.sameEverywhere(rec.ID)
		l.atLeast(share)
	}
	l.stop().clean(t, *flagWrites)
}

// sameEverywhere fails the test unless every live node tells the same of a reload, in both forms.
func (c *cluster) sameEverywhere(id string) {
	c.t.Helper()
	until(c.t, short, "every node tells the same of reload "+id, func() error {
		var first string
		for _, s := range c.live() {
			rec, err := s.client().ReloadRecord(timeout(c.t, short), id, 0, 0)
			if err != nil {
				return err
			}
			st, err := s.client().ReloadStatus(timeout(c.t, short), id)
			if err != nil {
				return err
			}
			raw, err := json.Marshal([]any{rec, st})
			if err != nil {
				return err
			}
			if first == "" {
				first = string(raw)
			}
			if string(raw) != first {
				return fmt.Errorf("%s says %s, another node says %s", s.name, raw, first)
			}
		}
		return nil
	})
}
