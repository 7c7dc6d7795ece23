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
	"rollcall/node/nodetest/check"
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
	acked                         []atomic.Int64
	cluster                       *Cluster

	mu         sync.Mutex
	FirstError string
	problems   []string
	record     *check.Recorder
	mount      string
	path       string
	token      string
	addresses  []string
	names      []string
}

// StartLoad starts writers that each count a key of their own up, hot writers that all add to one key, and readers. think is the
// pause of each between requests.
func (c *Cluster) StartLoad(mount string, writers, hot, readers int, think time.Duration) *Load {
	ctx, cancel := context.WithCancel(c.t.Context())
	l := &Load{
		cancel: cancel, record: c.Record, mount: strings.Trim(mount, "/") + "/", token: c.Token, addresses: c.Addresses(),
		http: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: writers + hot + readers}, Timeout: 40 * time.Second},
	}
	l.path, l.acked, l.cluster = "/v1/"+l.mount+"data/", make([]atomic.Int64, writers), c
	for _, n := range c.Nodes() {
		l.names = append(l.names, n.Name())
	}
	tried := make([]atomic.Int64, max(writers, 1))
	clients := 0
	run := func(i int, f func(ctx context.Context, u *user)) {
		clients++
		u := l.user(clients, i%len(l.addresses))
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
		run(i, func(ctx context.Context, u *user) {
			// A number is never written twice, not even where nobody knows what became of it.
			if n := tried[i].Add(1); u.write(ctx, own(i), n) {
				l.acked[i].Store(n)
			}
		})
	}
	for i := range hot {
		run(i, func(ctx context.Context, u *user) {
			if u.add(ctx, "hot") {
				l.hotAcked.Add(1)
			}
		})
	}
	for i := range readers {
		run(i, func(ctx context.Context, u *user) {
			k := i % max(writers, 1)
			// A reader on another node may be a little behind; what it reads must never be ahead.
			if value, ok := u.read(ctx, check.Read, own(k)); ok && value > tried[k].Load() {
				l.problem("read %d of own-%d, but only %d were written", value, k, tried[k].Load())
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
	l.final(ctx)
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

// own is the key of writer i.
func own(i int) string { return "own-" + strconv.Itoa(i) }

// final reads every key on every node when nothing writes any more, and records what it reads for the checker.
func (l *Load) final(ctx context.Context) {
	want := map[string]int64{"hot": l.hotAcked.Load()}
	for i := range l.acked {
		want[own(i)] = l.acked[i].Load()
	}
	for i, name := range l.names {
		if l.cluster.Node(l.cluster.number(name)) == nil {
			continue
		}
		u := l.user(i, i)
		for key, acked := range want {
			// A follower may be behind what another node has acknowledged, for a moment.
			value := int64(0)
			for end := time.Now().Add(5 * time.Second); time.Now().Before(end) && value < acked; time.Sleep(5 * time.Millisecond) {
				value, _ = u.read(ctx, check.Read, key)
			}
			if value < acked {
				l.problem("%s holds %d on %s, but %d was acknowledged", key, value, name, acked)
			}
			u.read(ctx, check.Final, key)
		}
	}
	l.cluster.recordRunning()
}

type user struct {
	l      *Load
	client int
	base   string
	node   string
	seen   map[string]uint64
}

// user is client number client, which asks the i-th node.
func (l *Load) user(client, i int) *user {
	return &user{l: l, client: client, base: l.addresses[i], node: l.names[i], seen: map[string]uint64{}}
}

func (u *user) invoke(kind check.Kind, key, input string) check.Op {
	return u.l.record.Invoke(check.Op{Client: u.client, Kind: kind, Node: u.node, Mount: u.l.mount, Key: key, Input: input})
}

func (u *user) write(ctx context.Context, key string, value int64) bool {
	op := u.invoke(check.Write, key, strconv.FormatInt(value, 10))
	ok := u.call(ctx, http.MethodPut, key, fmt.Sprintf(`{"value":"%d"}`, value), &op)
	u.l.record.Complete(op)
	return ok
}

func (u *user) add(ctx context.Context, key string) bool {
	op := u.invoke(check.Add, key, "1")
	ok := u.call(ctx, http.MethodPut, key, `{"add":1}`, &op)
	u.l.record.Complete(op)
	return ok
}

func (u *user) read(ctx context.Context, kind check.Kind, key string) (value int64, ok bool) {
	op := u.invoke(kind, key, "")
	ok = u.call(ctx, http.MethodGet, key, "", &op)
	u.l.record.Complete(op)
	if op.Output != "" {
		value, _ = strconv.ParseInt(op.Output, 10, 64)
	}
	return value, ok
}

// call sends one request and reports whether it was answered well; op tells the checker what came of it. A request that
// the end of the load cut off counts as nothing, but what it wrote may be there: the checks allow for that.
func (u *user) call(ctx context.Context, method, key, body string, op *check.Op) bool {
	op.Outcome = check.Unknown
	req, err := http.NewRequestWithContext(ctx, method, u.base+u.l.path+key, strings.NewReader(body))
	if err != nil {
		return u.fail(ctx, op, err)
	}
	req.Header.Set(api.HeaderToken, u.l.token)
	resp, err := u.l.http.Do(req)
	if err != nil {
		return u.fail(ctx, op, err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return u.fail(ctx, op, err)
	}
	op.Status = resp.StatusCode
	switch {
	case resp.StatusCode == http.StatusNotFound && method == http.MethodGet: // not written yet
	case resp.StatusCode >= http.StatusMultipleChoices && strings.Contains(string(raw), "of its requests"):
		u.l.Sent.Add(1)
		u.l.Told.Add(1)
		op.Told = true
		return false
	case resp.StatusCode >= http.StatusMultipleChoices:
		if resp.StatusCode == http.StatusServiceUnavailable {
			op.Outcome = check.Failed // nothing ran
		}
		return u.fail(ctx, op, fmt.Errorf("%s %s at %s: %s %s", method, key, u.base, resp.Status, strings.TrimSpace(string(raw))))
	}
	u.l.Sent.Add(1)
	op.Outcome = check.OK
	u.answered(op, resp.Header)
	var env struct {
		Data struct {
			Value string `json:"value"`
		} `json:"data"`
	}
	if method == http.MethodGet && json.Unmarshal(raw, &env) == nil {
		op.Output = env.Data.Value
	}
	return true
}

func (u *user) fail(ctx context.Context, op *check.Op, err error) bool {
	if ctx.Err() != nil {
		op.Told = true // the load was ended: nothing is wrong with that
		return false
	}
	op.Cause = err.Error()
	u.l.Sent.Add(1)
	u.l.Failed.Add(1)
	u.l.mu.Lock()
	defer u.l.mu.Unlock()
	if u.l.FirstError == "" {
		u.l.FirstError = err.Error()
	}
	return false
}

// answered takes over what an answer says of itself.
func (u *user) answered(op *check.Op, h http.Header) {
	g, err := strconv.ParseUint(h.Get(api.HeaderGeneration), 10, 64)
	if err != nil {
		return
	}
	op.By, op.Generation = h.Get(api.HeaderNode), g
	op.Index, _ = strconv.ParseUint(h.Get(api.HeaderIndex), 10, 64)
	if g < u.seen[op.By] {
		u.l.Backwards.Add(1)
	}
	u.seen[op.By] = max(u.seen[op.By], g)
}
