package nodetest

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"rollcall/node/api"
)

// Load is a set of clients that count numbers up through every node and read them back. It knows what was acknowledged,
// so it can tell a lost write from a late one.
type Load struct {
	cancel context.CancelFunc
	wg     sync.WaitGroup
	http   *http.Client

	// Told counts the requests that the plugin failed because its arguments say so. They are not among Failed.
	Sent, Failed, Told, Backwards atomic.Int64
	hotAcked                      atomic.Int64

	mu         sync.Mutex
	FirstError string
	problems   []string
	path       string
	token      string
	addresses  []string
}

// StartLoad starts writers that each count a key of their own up, hot writers that all add to one key, and readers. think is the
// pause of each between requests.
func (c *Cluster) StartLoad(mount string, writers, hot, readers int, think time.Duration) *Load {
	ctx, cancel := context.WithCancel(c.t.Context())
	l := &Load{
		cancel: cancel, path: "/v1/" + strings.Trim(mount, "/") + "/data/", token: c.Token, addresses: c.Addresses(),
		http: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: writers + hot + readers}, Timeout: 40 * time.Second},
	}
	acked := make([]atomic.Int64, max(writers, 1))
	run := func(i int, f func(ctx context.Context, u *user)) {
		u := &user{l: l, base: l.addresses[i%len(l.addresses)], seen: map[string]uint64{}}
		l.wg.Go(func() {
			for ctx.Err() == nil {
				f(ctx, u)
				select {
				case <-ctx.Done():
				case <-time.After(think):
				}
			}
		})
	}
	for i := range writers {
		n := int64(0)
		run(i, func(ctx context.Context, u *user) {
			if u.call(ctx, http.MethodPut, "own-"+strconv.Itoa(i), fmt.Sprintf(`{"value":"%d"}`, n+1), nil) {
				n++
				acked[i].Store(n)
			}
		})
	}
	for i := range hot {
		run(i, func(ctx context.Context, u *user) {
			if u.call(ctx, http.MethodPut, "hot", `{"add":1}`, nil) {
				l.hotAcked.Add(1)
			}
		})
	}
	for i := range readers {
		run(i, func(ctx context.Context, u *user) {
			k := i % max(writers, 1)
			var value int64
			// A reader on another node may be a little behind; what it reads must never be ahead.
			if u.call(ctx, http.MethodGet, "own-"+strconv.Itoa(k), "", &value) && value > acked[k].Load()+1 {
				l.problem("read %d of own-%d, but only %d were acknowledged", value, k, acked[k].Load())
			}
		})
	}
	return l
}

func (l *Load) problem(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.problems) < 20 {
		l.problems = append(l.problems, fmt.Sprintf(format, args...))
	}
}

// Stop ends the load and returns everything that was wrong: failed requests, answers of older generations, lost writes.
func (l *Load) Stop(ctx context.Context) []string {
	l.cancel()
	l.wg.Wait()
	var value int64
	u := &user{l: l, base: l.addresses[0], seen: map[string]uint64{}}
	if acked := l.hotAcked.Load(); acked > 0 {
		// A follower may be behind what another node has acknowledged, for a moment.
		for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
			if u.call(ctx, http.MethodGet, "hot", "", &value) && value >= acked {
				break
			}
		}
		if value < acked {
			l.problem("hot holds %d, but %d additions were acknowledged", value, acked)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	out := l.problems
	if n := l.Failed.Load(); n > 0 {
		out = append(out, fmt.Sprintf("%d of %d requests failed, the first with: %s", n, l.Sent.Load(), l.FirstError))
	}
	if n := l.Backwards.Load(); n > 0 {
		out = append(out, fmt.Sprintf("%d answers were of an older generation than one before from the same node", n))
	}
	return out
}

type user struct {
	l    *Load
	base string
	seen map[string]uint64
}

// call sends one request and reports whether it was answered well. A request that the end of the load cut off counts as
// nothing, but what it wrote may be there: the checks allow for that.
func (u *user) call(ctx context.Context, method, key, body string, value *int64) bool {
	req, err := http.NewRequestWithContext(ctx, method, u.base+u.l.path+key, strings.NewReader(body))
	if err != nil {
		return u.fail(ctx, err)
	}
	req.Header.Set(api.HeaderToken, u.l.token)
	resp, err := u.l.http.Do(req)
	if err != nil {
		return u.fail(ctx, err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return u.fail(ctx, err)
	}
	if resp.StatusCode == http.StatusNotFound && method == http.MethodGet {
		u.l.Sent.Add(1)
		return true // not written yet
	}
	if resp.StatusCode >= http.StatusMultipleChoices && strings.Contains(string(raw), "of its requests") {
		u.l.Sent.Add(1)
		u.l.Told.Add(1)
		return false
	}
	if resp.StatusCode >= http.StatusMultipleChoices {
		return u.fail(ctx, fmt.Errorf("%s %s at %s: %s %s", method, key, u.base, resp.Status, strings.TrimSpace(string(raw))))
	}
	u.l.Sent.Add(1)
	u.generation(resp.Header)
	if value == nil {
		return true
	}
	var env struct {
		Data struct {
			Value string `json:"value"`
		} `json:"data"`
	}
	if json.Unmarshal(raw, &env) == nil && env.Data.Value != "" {
		*value, _ = strconv.ParseInt(env.Data.Value, 10, 64)
	}
	return true
}

func (u *user) fail(ctx context.Context, err error) bool {
	if ctx.Err() != nil {
		return false
	}
	u.l.Sent.Add(1)
	u.l.Failed.Add(1)
	u.l.mu.Lock()
	defer u.l.mu.Unlock()
	if u.l.FirstError == "" {
		u.l.FirstError = err.Error()
	}
	return false
}

func (u *user) generation(h http.Header) {
	g, err := strconv.ParseUint(h.Get(api.HeaderGeneration), 10, 64)
	if err != nil {
		return
	}
	name := h.Get(api.HeaderNode)
	if g < u.seen[name] {
		u.l.Backwards.Add(1)
	}
	u.seen[name] = max(u.seen[name], g)
}
