//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"rollcall/node/api"
	"rollcall/node/nodetest/check"
)

// loadOptions say what a load sends to a KV v2 mount.
type loadOptions struct {
	mount string // without slashes
	// writers own keys of their own; hot writers all count up one key by compare and set; readers read both.
	writers, hot, readers int
	// keys is how many keys a writer owns; default 8.
	keys int
	// pace is a writer's pause between requests, readPace a reader's; 0 sends the next one at once.
	pace, readPace time.Duration
	// patience is how long a client waits for an answer; default a minute.
	patience time.Duration
	// rec keeps the history for the checker; nil for none.
	rec *check.Recorder
	// excused says which failures are not the cluster's: what was sent to a node that the test killed.
	excused func(*server) bool
}

// load is clients that write and read through every node, and hold what is answered against what was acknowledged.
//
// Nothing acknowledged may be lost: every write is a compare-and-set on the version that the write before it was
// acknowledged with, so each acknowledgement is checked by the next one, and the last by a read. On the hot key, the
// value counts the acknowledgements.
type load struct {
	c      *cluster
	opt    loadOptions
	cancel context.CancelFunc
	wg     sync.WaitGroup
	newest generations

	clients atomic.Int64

	mu  sync.Mutex
	sum loadSum
	own []*ownKey
	// writePace and readPace are pauses between requests, which a test may change.
	writePace, readPace time.Duration
	latency             []time.Duration // of every answer since the last call of latencies
	// acknowledged is what any client was told of a key: a reader of the same node may see no less, and no more than
	// what was tried.
	hotAcked, hotUnknown int
}

// loadSum counts what happened.
type loadSum struct {
	acked, reads, conflicts     int // compare-and-set that others won is no failure
	failed, excused             int
	lost, backwards, staleReads int
	trouble                     []string // the first few of what must not be
}

func (s loadSum) String() string {
	return fmt.Sprintf("%d acknowledged writes, %d reads, %d lost races on the hot key; %d failed, %d excused, %d lost, "+
		"%d answered by an older generation, %d reads behind the client's own writes",
		s.acked, s.reads, s.conflicts, s.failed, s.excused, s.lost, s.backwards, s.staleReads)
}

// ownKey is a key that one writer alone writes; it belongs to that writer's goroutine until the load has stopped.
type ownKey struct {
	name string
	// acked is the last acknowledged version, unknown how many writes after it had no definite answer.
	acked, tried int
	unknown      bool
	value        string // of the acknowledged version
}

// startLoad starts the clients and returns when every one of them has had an answer.
func startLoad(c *cluster, opt loadOptions) *load {
	c.t.Helper()
	if opt.keys == 0 {
		opt.keys = 8
	}
	if opt.patience == 0 {
		opt.patience = time.Minute
	}
	ctx, cancel := context.WithCancel(context.Background())
	l := &load{c: c, opt: opt, cancel: cancel, writePace: opt.pace, readPace: opt.readPace}
	c.t.Cleanup(func() { cancel(); l.wg.Wait() })
	n := 0
	l.clients.Store(1) // 0 is the test itself
	spawn := func(count int, pace *time.Duration, run func(*loader, context.Context, int)) {
		for i := range count {
			s := c.nodes[n%len(c.nodes)]
			n++
			cl := newLoader(l, s, pace)
			l.wg.Go(func() {
				defer cl.http.CloseIdleConnections()
				run(cl, ctx, i)
			})
		}
	}
	spawn(opt.writers, &l.writePace, (*loader).write)
	spawn(opt.hot, &l.writePace, (*loader).count)
	spawn(opt.readers, &l.readPace, (*loader).read)
	l.atLeast(2 * (opt.writers + opt.hot))
	return l
}

// paced changes the pauses of all clients.
func (l *load) paced(write, read time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.writePace, l.readPace = write, read
}

// latencies are the times that the answers took since the last call, sorted.
func (l *load) latencies() []time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := l.latency
	l.latency = nil
	slices.Sort(out)
	return out
}

// answers is how many requests were answered as they should be.
func (s loadSum) answers() int { return s.acked + s.reads + s.conflicts }

// generations is the newest generation of one mount that each node has answered with, as any client knows. A request
// that is sent after such an answer must not be answered by that node with an older one.
type generations struct {
	mu     sync.Mutex
	newest map[string]uint64
}

// known is what is known before a request is sent.
func (g *generations) known() map[string]uint64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return maps.Clone(g.newest)
}

// answered takes an answer's headers in, and says when they are behind what was known before its request was sent.
func (g *generations) answered(known map[string]uint64, node string, h http.Header) error {
	n, err := strconv.ParseUint(h.Get(api.HeaderGeneration), 10, 64)
	if err != nil {
		return nil // no plugin answered
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.newest == nil {
		g.newest = map[string]uint64{}
	}
	g.newest[node] = max(g.newest[node], n)
	if n < known[node] {
		return fmt.Errorf("%s answered with generation %d after %d", node, n, known[node])
	}
	return nil
}

// snapshot is the sum so far.
func (l *load) snapshot() loadSum {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.sum
	s.trouble = append([]string(nil), s.trouble...)
	return s
}

// atLeast waits until so many more writes have been acknowledged.
func (l *load) atLeast(more int) {
	l.c.t.Helper()
	want := l.snapshot().acked + more
	until(l.c.t, 5*time.Minute, fmt.Sprintf("%d more acknowledged writes", more), func() error {
		s := l.snapshot()
		if s.acked < want && len(s.trouble) < troubles {
			return fmt.Errorf("%s; %q", s, s.trouble)
		}
		return nil
	})
}

// stop ends the clients and reads back what they were acknowledged through every live node.
func (l *load) stop() loadSum {
	l.c.t.Helper()
	l.cancel()
	l.wg.Wait()
	for _, s := range l.c.live() {
		l.readBack(s)
	}
	return l.snapshot()
}

// readBack holds what a node answers now against everything that was acknowledged.
func (l *load) readBack(s *server) {
	l.c.t.Helper()
	cl := newLoader(l, s, nil)
	defer cl.http.CloseIdleConnections()
	ctx := timeout(l.c.t, long)
	for _, k := range l.own {
		if k.tried == 0 {
			continue
		}
		var got kvValue
		if err := within(short, func() (err error) { got, _, err = cl.look(ctx, check.Final, k.name); return err }); err != nil {
			l.note(fmt.Sprintf("read back %s from %s: %v", k.name, s.name, err), func(s *loadSum) { s.failed++ })
			continue
		}
		if got.version < k.acked || got.version == k.acked && got.value != k.value || !k.unknown && got.version != k.acked {
			l.note(fmt.Sprintf("%s on %s is %+v, acknowledged was version %d %q", k.name, s.name, got, k.acked, k.value),
				func(s *loadSum) { s.lost++ })
		}
	}
	if l.opt.hot == 0 {
		return
	}
	var hot kvValue
	if err := within(short, func() (err error) { hot, _, err = cl.look(ctx, check.Final, hotKey); return err }); err != nil {
		l.note(fmt.Sprintf("read back the hot key from %s: %v", s.name, err), func(s *loadSum) { s.failed++ })
		return
	}
	n, err := strconv.Atoi(hot.value)
	if err != nil || n < l.hotAcked || n > l.hotAcked+l.hotUnknown || hot.version != n {
		l.note(fmt.Sprintf("the hot key on %s is %+v after %d acknowledged and %d unknown increments",
			s.name, hot, l.hotAcked, l.hotUnknown), func(s *loadSum) { s.lost++ })
	}
}

// troubles is how many texts are kept.
const troubles = 12

func (l *load) note(text string, f func(*loadSum)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f(&l.sum)
	if text != "" && len(l.sum.trouble) < troubles {
		l.sum.trouble = append(l.sum.trouble, time.Now().UTC().Format("15:04:05.000 ")+text)
	}
}

// clean fails the test unless nothing failed, nothing was lost and nothing went back.
func (s loadSum) clean(t testing.TB, atLeast int) {
	t.Helper()
	t.Log(s)
	if s.failed+s.lost+s.backwards+s.staleReads > 0 {
		t.Errorf("%s\n%s", s, strings.Join(s.trouble, "\n"))
	}
	if s.acked < atLeast {
		t.Errorf("%d acknowledged writes are too few to mean anything; wanted %d", s.acked, atLeast)
	}
}

// loader is one client of one node, on one connection.
type loader struct {
	l       *load
	s       *server
	pace    *time.Duration // guarded by l.mu; nil for none
	http    *http.Client
	id      int
	version map[string]int // by key: the newest version that this client knows of
}

func newLoader(l *load, s *server, pace *time.Duration) *loader {
	return &loader{l: l, s: s, pace: pace, id: int(l.clients.Add(1)), version: map[string]int{}, http: &http.Client{
		Transport: &http.Transport{MaxIdleConnsPerHost: 2, IdleConnTimeout: time.Minute}, Timeout: l.opt.patience,
	}}
}

// kvValue is what KV v2 says of a key; version 0 is no key.
type kvValue struct {
	version int
	value   string
}

// maxLatencies bounds what a long load remembers between two calls of latencies.
const maxLatencies = 4 << 20

// hotKey is counted up by every hot writer.
const hotKey = "hot"

func (c *loader) pause(ctx context.Context) bool {
	c.l.mu.Lock()
	pace := *c.pace
	c.l.mu.Unlock()
	if pace <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(pace/2 + rand.N(pace))
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// failed counts a request that should have worked.
func (c *loader) failed(what string, err error) {
	if c.l.opt.excused != nil && c.l.opt.excused(c.s) {
		c.l.note("", func(s *loadSum) { s.excused++ })
		time.Sleep(50 * time.Millisecond)
		return
	}
	c.l.note(fmt.Sprintf("%s through %s: %v", what, c.s.name, err), func(s *loadSum) { s.failed++ })
	time.Sleep(10 * time.Millisecond)
}

// write writes the client's own keys in turn, each on the version before.
func (c *loader) write(ctx context.Context, i int) {
	var keys []*ownKey
	for k := range c.l.opt.keys {
		keys = append(keys, &ownKey{name: fmt.Sprintf("own/%d/%d", i, k)})
	}
	c.l.mu.Lock()
	c.l.own = append(c.l.own, keys...)
	c.l.mu.Unlock()
	for n := 1; c.pause(ctx); n++ {
		k := keys[n%len(keys)]
		if k.unknown && !c.resolve(ctx, k) {
			continue
		}
		value := fmt.Sprintf("%d.%d", i, n)
		k.tried++
		version, outcome, err := c.put(ctx, k.name, value, k.acked)
		switch outcome {
		case acknowledged:
			if version != k.acked+1 {
				c.l.note(fmt.Sprintf("write %s on version %d was acknowledged as version %d", k.name, k.acked, version),
					func(s *loadSum) { s.lost++ })
			}
			k.acked, k.value = version, value
			c.version[k.name] = version
			c.l.note("", func(s *loadSum) { s.acked++ })
		case lostRace: // nobody else writes this key: what was acknowledged is not there
			c.l.note(fmt.Sprintf("write %s through %s on the acknowledged version %d: %v", k.name, c.s.name, k.acked, err),
				func(s *loadSum) { s.lost++ })
			k.unknown = true
		case unknown:
			k.unknown = true
			if ctx.Err() != nil {
				return // it was cut off by the end of the load
			}
			c.failed("write "+k.name, err)
		case refused:
			if ctx.Err() != nil {
				return
			}
			c.failed("write "+k.name, err)
		}
	}
}

// resolve finds out what became of a write without an answer, by a read that may be behind but never ahead: the write
// after it, on the version that was read, decides.
func (c *loader) resolve(ctx context.Context, k *ownKey) bool {
	got, _, err := c.get(ctx, k.name)
	if err != nil {
		if ctx.Err() == nil {
			c.failed("read "+k.name, err)
		}
		return false
	}
	if got.version < k.acked {
		c.l.note(fmt.Sprintf("%s is version %d after version %d was acknowledged", k.name, got.version, k.acked),
			func(s *loadSum) { s.lost++ })
	}
	k.acked, k.value, k.unknown = got.version, got.value, false
	return true
}

// count counts the hot key up: read, add one, write on the version that was read.
func (c *loader) count(ctx context.Context, _ int) {
	for c.pause(ctx) {
		got, _, err := c.get(ctx, hotKey)
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			c.failed("read the hot key", err)
			continue
		}
		n := 0
		if got.version > 0 {
			if n, err = strconv.Atoi(got.value); err != nil || n != got.version {
				c.l.note(fmt.Sprintf("the hot key holds %+v", got), func(s *loadSum) { s.lost++ })
				return
			}
		}
		version, outcome, err := c.put(ctx, hotKey, strconv.Itoa(n+1), got.version)
		switch outcome {
		case acknowledged:
			c.l.note("", func(s *loadSum) { s.acked++; c.l.hotAcked++ })
			c.version[hotKey] = version
		case lostRace:
			c.l.note("", func(s *loadSum) { s.conflicts++ })
		case unknown, refused:
			if outcome == unknown {
				c.l.note("", func(*loadSum) { c.l.hotUnknown++ })
			}
			if ctx.Err() != nil {
				return
			}
			c.failed("write the hot key", err)
		}
	}
}

// read reads the hot key and writers' keys in turn.
func (c *loader) read(ctx context.Context, i int) {
	for n := i; c.pause(ctx); n++ {
		key := hotKey
		if n%3 != 0 && c.l.opt.writers > 0 || c.l.opt.hot == 0 {
			key = fmt.Sprintf("own/%d/%d", n%max(1, c.l.opt.writers), n/7%c.l.opt.keys)
		}
		if _, _, err := c.get(ctx, key); err != nil {
			if ctx.Err() != nil {
				return
			}
			c.failed("read "+key, err)
			continue
		}
	}
}

// outcome of a write.
type outcome int

const (
	acknowledged outcome = iota
	lostRace             // the version was not the one that is there
	refused              // it certainly did not run
	unknown              // nobody knows
)

func (c *loader) put(ctx context.Context, key, value string, on int) (version int, o outcome, err error) {
	body, err := json.Marshal(map[string]any{"data": map[string]string{"v": value}, "options": map[string]int{"cas": on}})
	if err != nil {
		return 0, refused, err
	}
	op := c.invoke(check.Write, key, value)
	if key == hotKey { // the key holds how often it was written
		op.Kind, op.Input = check.Add, "1"
	}
	status, raw, err := c.call(ctx, &op, http.MethodPost, key, string(body))
	version, o, err = written(status, raw, err)
	switch o {
	case acknowledged:
		op.Outcome = check.OK
	case unknown:
		op.Outcome = check.Unknown
	case lostRace, refused:
		op.Outcome, op.Refused = check.Failed, o == lostRace
	}
	c.complete(ctx, op, err)
	return version, o, err
}

// written is what an answer says of a write.
func written(status int, raw []byte, err error) (int, outcome, error) {
	switch {
	case err != nil:
		return 0, unknown, err
	case status == http.StatusBadRequest && strings.Contains(string(raw), "check-and-set"):
		return 0, lostRace, fmt.Errorf("%d %s", status, raw)
	case status == http.StatusServiceUnavailable || status == http.StatusTooManyRequests:
		return 0, refused, fmt.Errorf("%d %s", status, raw)
	case status != http.StatusOK:
		return 0, unknown, fmt.Errorf("%d %s", status, raw)
	}
	var env struct {
		Data struct {
			Version int `json:"version"`
		} `json:"data"`
	}
	if err := json.Unmarshal(raw, &env); err != nil || env.Data.Version == 0 {
		return 0, unknown, fmt.Errorf("acknowledged without a version: %s", raw)
	}
	return env.Data.Version, acknowledged, nil
}

// get reads a key, and holds its version against the newest that this client knows of.
func (c *loader) get(ctx context.Context, key string) (kvValue, bool, error) {
	return c.look(ctx, check.Read, key)
}

func (c *loader) look(ctx context.Context, kind check.Kind, key string) (kvValue, bool, error) {
	op := c.invoke(kind, key, "")
	status, raw, err := c.call(ctx, &op, http.MethodGet, key, "")
	var got kvValue
	if err == nil {
		got, err = value(status, raw)
	}
	op.Outcome, op.Output = check.OK, got.value
	if err != nil {
		op.Outcome = check.Failed
	}
	c.complete(ctx, op, err)
	if err != nil {
		return kvValue{}, false, err
	}
	c.l.note("", func(s *loadSum) { s.reads++ })
	if got.version < c.version[key] {
		c.l.note(fmt.Sprintf("%s answered version %d of %s after version %d", c.s.name, got.version, key, c.version[key]),
			func(s *loadSum) { s.staleReads++ })
	}
	c.version[key] = max(c.version[key], got.version)
	return got, got.version > 0, nil
}

// value is what an answer says of a key.
func value(status int, raw []byte) (kvValue, error) {
	switch status {
	case http.StatusOK:
		var env struct {
			Data struct {
				Data     map[string]string `json:"data"`
				Metadata struct {
					Version int `json:"version"`
				} `json:"metadata"`
			} `json:"data"`
		}
		if err := json.Unmarshal(raw, &env); err != nil {
			return kvValue{}, err
		}
		return kvValue{env.Data.Metadata.Version, env.Data.Data["v"]}, nil
	case http.StatusNotFound:
		if strings.Contains(string(raw), `"errors":[]`) {
			return kvValue{}, nil
		}
	}
	return kvValue{}, fmt.Errorf("%d %s", status, raw)
}

// invoke begins an operation of the history, complete ends it.
func (c *loader) invoke(kind check.Kind, key, input string) check.Op {
	op := check.Op{Client: c.id, Kind: kind, Node: c.s.name, Mount: c.l.opt.mount + "/", Key: key, Input: input}
	if c.l.opt.rec != nil {
		op = c.l.opt.rec.Invoke(op)
	}
	return op
}

func (c *loader) complete(ctx context.Context, op check.Op, err error) {
	if c.l.opt.rec == nil {
		return
	}
	if err != nil && ctx.Err() != nil {
		return // the end of the load cut it off: to the checker it has no answer, and nobody to blame
	}
	if err != nil {
		op.Cause = err.Error()[:min(len(err.Error()), 300)]
	}
	c.l.opt.rec.Complete(op)
}

// call sends one request, and watches that no node answers with an older generation than it did before.
func (c *loader) call(ctx context.Context, op *check.Op, method, key, body string) (int, []byte, error) {
	url := c.s.url() + "/v1/" + c.l.opt.mount + "/data/" + key
	req, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	if body == "" {
		req.Body = nil
		req.ContentLength = 0
	}
	req.Header.Set(api.HeaderToken, c.l.c.token)
	known, began := c.l.newest.known(), time.Now()
	resp, err := c.http.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return 0, nil, err
	}
	op.Status, op.By = resp.StatusCode, c.l.c.who(resp.Header)
	op.Generation, _ = strconv.ParseUint(resp.Header.Get(api.HeaderGeneration), 10, 64)
	if err := c.l.newest.answered(known, op.By, resp.Header); err != nil {
		c.l.note(err.Error(), func(s *loadSum) { s.backwards++ })
	}
	took := time.Since(began)
	c.l.mu.Lock()
	if len(c.l.latency) < maxLatencies {
		c.l.latency = append(c.l.latency, took)
	}
	c.l.mu.Unlock()
	return resp.StatusCode, bytes.TrimSpace(raw), nil
}
