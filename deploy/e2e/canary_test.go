//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"rollcall/node/api"
)

// demoPlugin is the plugin that the rollcall binary carries, as a file of a plugin directory.
const demoPlugin = "rollcall-demo"

// TestACanaryStopsAtTheFirstWaveThatCouldSeeABadVersion brings in versions that answer one request in twenty with an
// error: of reads, of writes, of both. Reads run everywhere, so the first wave shows them; writes run on the leader alone,
// whose wave is the last.
func TestACanaryStopsAtTheFirstWaveThatCouldSeeABadVersion(t *testing.T) {
	c := newCluster(t, options{config: patient})
	c.put(c.bin, demoPlugin)
	sha := sum(t, filepath.Join(c.nodes[0].plugins, demoPlugin))
	demo := func(version string, args ...string) {
		c.register("demo", version, demoPlugin, sha, append([]string{"demo-plugin", "-version", version}, args...)...)
	}
	demo("v1.0.0")
	for _, on := range []string{"read", "write", "all"} {
		demo("v2.0.0-"+on, "-error-rate", "0.05", "-error-on", on)
	}
	c.run("secrets", "enable", "-path=demo", "-plugin-version=v1.0.0", "demo")
	c.serving()
	l := startDemoLoad(c)
	for _, tc := range []struct {
		on    string
		waves int // that are reached
	}{{"read", 1}, {"all", 1}, {"write", 3}} {
		id := "canary-" + tc.on
		r := c.exits(3, c.nodes[:1], words("plugin reload -plugin=demo -scope=global -strategy=canary -waves=1,100% -bake=6s "+
			"-min-samples=250 -max-error-rate=1.5% -reload-id="+id+" -version=v2.0.0-"+tc.on), "rolled back", "put back")
		kind := map[string]string{"read": "reads failed", "all": "reads failed", "write": "writes failed"}[tc.on]
		if !strings.Contains(r.out, kind+", more than the share of 0.015") {
			t.Errorf("%s: the numbers of the gate are not printed:\n%s", tc.on, r.out)
		}
		rec, err := c.any().ReloadRecord(timeout(t, short), id, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		reached := 0
		for _, w := range rec.Waves {
			if w.CommittedIndex != 0 {
				reached++
			}
		}
		if reached != tc.waves || rec.Outcome != api.OutcomeRolledBack {
			t.Errorf("%s: %d waves were reached, wanted %d; %s:\n%s", tc.on, reached, tc.waves, rec.Outcome, tell(rec))
		}
		c.exits(0, c.nodes, words("plugin versions"), "v1.0.0")
		until(t, short, "every node runs the old version", func() error { return c.runsEverywhere("demo/", "v1.0.0") })
	}
	l.stop()
	if n := l.failed.Load(); n > 0 {
		t.Errorf("%d of %d requests failed for another reason than that the version is bad: %s", n, l.sent.Load(), *l.first.Load())
	}
	if l.told.Load() == 0 {
		t.Error("the bad versions failed no request: nothing was tried")
	}
	t.Logf("%d requests, %d of them failed by the bad versions", l.sent.Load(), l.told.Load())
}

// runsEverywhere says which node runs another version of a mount.
func (c *cluster) runsEverywhere(mount, version string) error {
	for node, got := range c.running(mount) {
		if !strings.Contains(got, version) {
			return fmt.Errorf("%s runs %s, wanted %s", node, got, version)
		}
	}
	return nil
}

// demoLoad reads and writes the demo plugin through every node, and tells failures that the plugin was told to make from
// others.
type demoLoad struct {
	cancel             context.CancelFunc
	wg                 sync.WaitGroup
	sent, told, failed atomic.Int64
	first              atomic.Pointer[string]
}

func startDemoLoad(c *cluster) *demoLoad {
	ctx, cancel := context.WithCancel(context.Background())
	l := &demoLoad{cancel: cancel}
	c.t.Cleanup(l.stop)
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 8}, Timeout: 40 * time.Second}
	for i := range 12 {
		s := c.nodes[i%len(c.nodes)]
		method := []string{http.MethodGet, http.MethodPut}[i/len(c.nodes)%2]
		l.wg.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				l.call(ctx, client, c.token, method, fmt.Sprintf("%s/v1/demo/data/key-%d", s.url(), i%len(c.nodes)), n)
				select {
				case <-ctx.Done():
				case <-time.After(8 * time.Millisecond):
				}
			}
		})
	}
	return l
}

func (l *demoLoad) stop() {
	l.cancel()
	l.wg.Wait()
}

func (l *demoLoad) call(ctx context.Context, client *http.Client, token, method, url string, n int) {
	req, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(fmt.Sprintf(`{"value":"%d"}`, n)))
	if err != nil {
		l.trouble(err.Error())
		return
	}
	req.Header.Set(api.HeaderToken, token)
	resp, err := client.Do(req)
	if ctx.Err() != nil {
		return
	}
	l.sent.Add(1)
	if err != nil {
		l.trouble(err.Error())
		return
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	switch {
	case resp.StatusCode < 300, resp.StatusCode == http.StatusNotFound && method == http.MethodGet: // or not written yet
	case strings.Contains(string(body), "of its requests"):
		l.told.Add(1)
	default:
		l.trouble(fmt.Sprintf("%s %s: %s %s", method, url, resp.Status, body))
	}
}

func (l *demoLoad) trouble(text string) {
	l.failed.Add(1)
	l.first.CompareAndSwap(nil, &text)
}
