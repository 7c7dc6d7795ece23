//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"rollcall/node/api"
)

// counting is a small load on a mount of the demo plugin: clients of every node count one key up, which the plugin
// does with its own lock, and read it. Two writers of the mount at once would lose counts.
type counting struct {
	c      *cluster
	mount  string
	cancel context.CancelFunc
	wg     sync.WaitGroup
	newest generations

	mu             sync.Mutex
	acked, unknown int
	failed         []string
	backwards      []string // answers of an older generation after a newer one
	sent           int
}

func startCounting(c *cluster, mount string, clients int, pace time.Duration) *counting {
	ctx, cancel := context.WithCancel(context.Background())
	k := &counting{c: c, mount: mount, cancel: cancel}
	c.t.Cleanup(func() { cancel(); k.wg.Wait() })
	for i := range clients {
		s := c.nodes[i%len(c.nodes)]
		k.wg.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				k.once(ctx, s, n%3 == 0)
				select {
				case <-time.After(pace):
				case <-ctx.Done():
				}
			}
		})
	}
	return k
}

func (k *counting) once(ctx context.Context, s *server, write bool) {
	method, body := http.MethodGet, ""
	if write {
		method, body = http.MethodPut, `{"add":1}`
	}
	known := k.newest.known()
	status, answer, header, err := k.c.sendHeader(ctx, s, method, k.mount+"/data/count", body)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.sent++
	if old := k.newest.answered(known, k.c.who(header), header); old != nil {
		k.backwards = append(k.backwards, old.Error())
	}
	switch {
	case ctx.Err() != nil:
		if write {
			k.unknown++
		}
	case err == nil && write && status == http.StatusNoContent:
		k.acked++
	case err == nil && !write && (status == http.StatusOK || status == http.StatusNotFound):
	default:
		if write {
			k.unknown++
		}
		k.failed = append(k.failed, fmt.Sprintf("%s %s through %s: %d %s %v", time.Now().UTC().Format("15:04:05.000"), method,
			s.name, status, answer, err))
	}
}

// stop ends the load, and fails the test if a request failed, a count is lost, or too few were made.
func (k *counting) stop(t testing.TB, atLeast int) {
	t.Helper()
	k.cancel()
	k.wg.Wait()
	t.Logf("%d requests, %d counted up, %d failed", k.sent, k.acked, len(k.failed))
	if len(k.failed) > 0 {
		t.Errorf("%d requests failed:\n%s", len(k.failed), strings.Join(k.failed[:min(len(k.failed), 12)], "\n"))
	}
	if len(k.backwards) > 0 {
		t.Errorf("%d answers went back:\n%s", len(k.backwards), strings.Join(k.backwards[:min(len(k.backwards), 12)], "\n"))
	}
	if k.acked < atLeast {
		t.Errorf("%d counts are too few to mean anything; wanted %d", k.acked, atLeast)
	}
	for _, s := range k.c.live() {
		// A follower may be a moment behind what another node has acknowledged.
		if err := within(short, func() error { return k.holds(s) }); err != nil {
			t.Error(err)
		}
	}
}

// holds says what is wrong with the count that a node answers, after the load has stopped.
func (k *counting) holds(s *server) error {
	_, answer := k.c.request(s, http.MethodGet, k.mount+"/data/count", "")
	var env struct {
		Data struct {
			Value json.Number `json:"value"`
		} `json:"data"`
	}
	err := json.Unmarshal([]byte(answer), &env)
	n, _ := env.Data.Value.Int64()
	if err != nil || int(n) < k.acked || int(n) > k.acked+k.unknown {
		return fmt.Errorf("%s counts %s (%s); acknowledged were %d, unknown %d", s.name, env.Data.Value, answer, k.acked, k.unknown)
	}
	return nil
}

// direct is what send uses: as many connections to a node as there are clients.
var direct = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 128, IdleConnTimeout: 30 * time.Second}}

// request sends one request with the root token and returns status and body.
func (c *cluster) request(s *server, method, path, body string) (int, string) {
	c.t.Helper()
	status, answer, err := c.send(timeout(c.t, 90*time.Second), s, method, path, body)
	if err != nil {
		c.t.Fatalf("%s %s through %s: %v", method, path, s.name, err)
	}
	return status, answer
}

func (c *cluster) send(ctx context.Context, s *server, method, path, body string) (int, string, error) {
	status, answer, _, err := c.sendHeader(ctx, s, method, path, body)
	return status, answer, err
}

func (c *cluster) sendHeader(ctx context.Context, s *server, method, path, body string) (int, string, http.Header, error) {
	var reader io.Reader
	if body != "" {
		reader = strings.NewReader(body)
	}
	req, err := http.NewRequestWithContext(ctx, method, s.url()+"/v1/"+path, reader)
	if err != nil {
		return 0, "", nil, err
	}
	req.Header.Set(api.HeaderToken, c.token)
	resp, err := direct.Do(req)
	if err != nil {
		return 0, "", nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return resp.StatusCode, strings.TrimSpace(string(raw)), resp.Header, err
}
