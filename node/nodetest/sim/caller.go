package sim

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"rollcall/node/api"
	"rollcall/node/nodetest/check"
)

// caller is one client: a host of its own on the simulated network, plain HTTP to any node, and an entry in the history
// for everything it asks. It calls one thing at a time.
type caller struct {
	c    *cluster
	id   int
	host string
	rng  *rand.Rand
	http *http.Client
	// in is set between two pauses: it may be calling.
	in bool
}

// patience is how long a client waits for an answer.
const patience = 15 * time.Second

func (c *cluster) newCaller(what string) *caller {
	c.mu.Lock()
	defer c.mu.Unlock()
	id := len(c.callers) + 1
	k := &caller{c: c, id: id, host: "client-" + strconv.Itoa(id), rng: rngOf(c.opt.Seed, what)}
	view := c.wires.net.Host(k.host)
	k.http = &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
			defer cancel()
			return view.Dial(ctx, address)
		},
		MaxIdleConnsPerHost: 1, IdleConnTimeout: 30 * time.Second, DisableCompression: true,
	}}
	c.callers = append(c.callers, k)
	return k
}

// hosts are the clients' hosts.
func (c *cluster) hosts() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []string
	for _, k := range c.callers {
		out = append(out, k.host)
	}
	return out
}

// any is a node to ask: each is asked in turn, by chance, whether it runs or not.
func (k *caller) any() string {
	all := k.c.members()
	return all[k.rng.IntN(len(all))].name
}

// answer is what came back.
type answer struct {
	status int
	header http.Header
	body   []byte
}

// data is one field of the answer's data, as a text.
func (a *answer) data(field string) string {
	var env struct {
		Data map[string]any `json:"data"`
		Auth map[string]any `json:"auth"`
	}
	if a == nil || json.Unmarshal(a.body, &env) != nil {
		return ""
	}
	if s, ok := env.Data[field].(string); ok {
		return s
	}
	s, _ := env.Auth[field].(string)
	return s
}

// ask sends one request to a node, without a record of it.
func (k *caller) ask(node, method, path, token string, body any) (*answer, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var raw []byte
	if body != nil {
		var err error
		if raw, err = json.Marshal(body); err != nil {
			return nil, err
		}
	}
	return k.send(ctx, node, method, path, token, raw)
}

// send is ask with a body as it is, for as long as ctx says.
func (k *caller) send(ctx context.Context, node, method, path, token string, body []byte) (*answer, error) {
	var in io.Reader = http.NoBody
	if body != nil {
		in = bytes.NewReader(body)
	}
	req, err := http.NewRequestWithContext(ctx, method, k.c.member(node).api()+"/v1/"+path, in)
	if err != nil {
		return nil, err
	}
	req.Header.Set(api.HeaderToken, token)
	resp, err := k.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, 8<<20))
	if err != nil {
		return nil, err
	}
	return &answer{resp.StatusCode, resp.Header, raw}, nil
}

// call is ask with a record: op says what it is, and comes back with the outcome. read makes 404 an answer.
func (k *caller) call(op check.Op, node, method, path, token string, body any) (check.Op, *answer) {
	op.Client, op.Node = k.id, node
	op = k.c.rec.Invoke(op)
	a, err := k.ask(node, method, path, token, body)
	op.Outcome, op.Cause = outcome(a, err)
	if a != nil {
		op.Status, op.By = a.status, a.header.Get(api.HeaderNode)
		op.Generation, _ = strconv.ParseUint(a.header.Get(api.HeaderGeneration), 10, 64)
		op.Index, _ = strconv.ParseUint(a.header.Get(api.HeaderIndex), 10, 64)
	}
	return op, a
}

// finish puts the operation into the history.
func (k *caller) finish(op check.Op) { k.c.rec.Complete(op) }

// outcome is what a client may conclude from an answer, by the API's table of kinds and statuses.
func outcome(a *answer, err error) (check.Outcome, string) {
	var op *net.OpError
	var dns *net.DNSError
	switch {
	case errors.As(err, &op) && op.Op == "dial", errors.As(err, &dns):
		return check.Failed, err.Error()
	case err != nil:
		return check.Unknown, err.Error()
	case a.status < 300:
		return check.OK, ""
	}
	kind := api.KindOf(a.status)
	cause := strings.TrimSpace(string(a.body[:min(len(a.body), 300)]))
	if kind.Safe() || a.status >= 400 && a.status < 500 && a.status != api.StatusOutcomeUnknown && a.status != 499 && a.status != 408 {
		return check.Failed, cause
	}
	return check.Unknown, cause
}

// pause waits about d, or less when the load ends, and for as long as the gate is shut; it reports whether it goes on.
func (k *caller) pause(d time.Duration) bool {
	k.outside()
	t := time.NewTimer(between(k.rng, d/2, 3*d/2))
	defer t.Stop()
	select {
	case <-t.C:
	case <-k.c.ended:
	}
	select {
	case <-k.c.ended:
		return false
	default:
		k.in = k.c.gate.enter(k.c.ended)
		return k.in
	}
}

// outside says that the caller calls nothing until its next pause.
func (k *caller) outside() {
	if k.in {
		k.c.gate.leave()
	}
	k.in = false
}
