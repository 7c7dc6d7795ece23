package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"rollcall/node/api"
)

// think is the pause of a load client between requests, so that the load leaves the machine room to work.
const think = 4 * time.Millisecond

// load is a set of clients that read and write keys of the demo plugin through every node.
type load struct {
	cancel context.CancelFunc
	wg     sync.WaitGroup
	mu     sync.Mutex
	sum    loadSum
}

type loadSum struct {
	sent, failed, backwards, lost int64
	firstError                    string
}

// startLoad starts clients; each owns a key that it counts up, and checks what it reads against what was acknowledged.
func startLoad(ctx context.Context, addresses []string, token string, clients int) *load {
	ctx, cancel := context.WithCancel(ctx)
	l := &load{cancel: cancel}
	hc := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: clients}, Timeout: 30 * time.Second}
	for i := range clients {
		c := &loadClient{
			l: l, http: hc, base: addresses[i%len(addresses)], token: token, key: "counter-" + strconv.Itoa(i),
			seen: map[string]uint64{},
		}
		l.wg.Go(func() { c.run(ctx) })
	}
	return l
}

// stop ends the load and tells what it saw. Further calls tell the same.
func (l *load) stop() loadSum {
	l.cancel()
	l.wg.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.sum
}

type loadClient struct {
	l           *load
	http        *http.Client
	base, token string
	key         string
	written     int64
	seen        map[string]uint64 // by answering node: the newest generation
}

// run writes the next number, then reads it back three times, until ctx ends. A request that was under way when the
// load ended is not counted.
func (c *loadClient) run(ctx context.Context) {
	for ctx.Err() == nil {
		_, err := c.call(ctx, http.MethodPut, fmt.Sprintf(`{"value":"%d"}`, c.written+1))
		if ctx.Err() != nil {
			return
		}
		c.note(err)
		if err == nil {
			c.written++
		}
		for range 3 {
			if pause(ctx, think) != nil {
				return
			}
			value, err := c.call(ctx, http.MethodGet, "")
			if ctx.Err() != nil {
				return
			}
			c.note(err)
			if err == nil && c.written > 0 && value < c.written {
				c.l.count(func(s *loadSum) { s.lost++ })
			}
		}
	}
}

func (l *load) count(f func(*loadSum)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f(&l.sum)
}

func (c *loadClient) note(err error) {
	c.l.count(func(s *loadSum) {
		s.sent++
		if err == nil {
			return
		}
		s.failed++
		if s.firstError == "" {
			s.firstError = err.Error()
		}
	})
}

// call sends one request and returns the number that it read. It also watches that generations never go back.
func (c *loadClient) call(ctx context.Context, method, body string) (int64, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.base+"/v1/demo/data/"+c.key, strings.NewReader(body))
	if err != nil {
		return 0, err
	}
	req.Header.Set(api.HeaderToken, c.token)
	resp, err := c.http.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return 0, err
	}
	if resp.StatusCode >= http.StatusMultipleChoices && !(resp.StatusCode == http.StatusNotFound && c.written == 0) {
		return 0, fmt.Errorf("%s %s: %s %s", method, req.URL.Path, resp.Status, strings.TrimSpace(string(raw)))
	}
	c.generation(resp.Header)
	if method != http.MethodGet {
		return 0, nil
	}
	var env struct {
		Data struct {
			Value string `json:"value"`
		} `json:"data"`
	}
	if err := json.Unmarshal(raw, &env); err != nil || env.Data.Value == "" {
		return 0, nil
	}
	return strconv.ParseInt(env.Data.Value, 10, 64)
}

// generation counts an answer that is of an older generation than one that the same node gave before. Nodes switch
// within milliseconds of each other, so it is each node that must never go back.
func (c *loadClient) generation(h http.Header) {
	g, err := strconv.ParseUint(h.Get(api.HeaderGeneration), 10, 64)
	if err != nil {
		return
	}
	node := h.Get(api.HeaderNode)
	if g < c.seen[node] {
		c.l.count(func(s *loadSum) { s.backwards++ })
	}
	c.seen[node] = max(c.seen[node], g)
}
