//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// holdings are what a node's process holds: open files by their sort, goroutines, processes, files in its directory of
// sockets.
type holdings map[string]int

// holdings counts what a node holds now.
func (s *server) holdings() (holdings, error) {
	h := holdings{}
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.pid()))
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		target, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", s.pid(), f.Name()))
		if err != nil {
			continue // closed meanwhile
		}
		sort := "files"
		switch {
		case strings.HasPrefix(target, "socket:"):
			sort = "sockets"
		case strings.HasPrefix(target, "pipe:"):
			sort = "pipes"
		case strings.HasPrefix(target, "/memfd:"):
			sort = "memfds"
		case strings.HasPrefix(target, "anon_inode:"):
			sort = "anonymous"
		}
		h[sort]++
	}
	ctx, cancel := context.WithTimeout(context.Background(), short)
	defer cancel()
	_, metrics, err := s.c.send(ctx, s, http.MethodGet, "sys/metrics?format=prometheus", "")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(metrics) {
		if n, ok := strings.CutPrefix(line, "go_goroutines "); ok {
			if h["goroutines"], err = strconv.Atoi(strings.TrimSpace(n)); err != nil {
				return nil, err
			}
		}
	}
	if h["goroutines"] == 0 {
		return nil, fmt.Errorf("%s does not tell its goroutines: %.200s", s.name, metrics)
	}
	for _, p := range plugins(s.c.root) {
		if p.host == s.pid() {
			h["processes"]++
		}
	}
	return h, filepath.WalkDir(s.c.path(s.sockets), func(string, os.DirEntry, error) error { h["temporary files"]++; return nil })
}

// slack is how much more of a sort is no leak: what runs once in a while, and connections between peers.
var slack = map[string]int{"goroutines": 15, "sockets": 6, "anonymous": 2, "files": 2, "pipes": 2, "memfds": 0, "processes": 0, "temporary files": 0}

// rest counts what every node holds when nobody asks it for anything, as soon as two looks a second apart are alike.
func (c *cluster) rest() map[string]holdings {
	c.t.Helper()
	out := map[string]holdings{}
	c.hangUp()
	for _, s := range c.nodes {
		var last holdings
		until(c.t, long, s.name+" is at rest", func() error {
			time.Sleep(time.Second)
			h, err := s.holdings()
			if err != nil {
				return err
			}
			calm := last != nil && maps.EqualFunc(h, last, func(a, b int) bool { return a-b <= 2 && b-a <= 2 })
			last = h
			if !calm {
				return fmt.Errorf("%v", h)
			}
			return nil
		})
		out[s.name] = last
	}
	return out
}

// sameAs fails the test unless every node soon holds no more than it held before.
func (c *cluster) sameAs(before map[string]holdings) {
	c.t.Helper()
	c.hangUp()
	most := holdings{} // of any node: another one may lead now, and a leader holds more connections
	for _, h := range before {
		for sort, n := range h {
			most[sort] = max(most[sort], n)
		}
	}
	for _, s := range c.nodes {
		err := within(4*time.Minute, func() error { // connections that were cut are given up after a while
			now, err := s.holdings()
			if err != nil {
				return err
			}
			for _, sort := range slices.Sorted(maps.Keys(now)) {
				if now[sort] > most[sort]+slack[sort] {
					return fmt.Errorf("%d %s, before: %d (now %v, before %v)", now[sort], sort, most[sort], now, before[s.name])
				}
			}
			c.t.Logf("%s holds %v; before: %v", s.name, now, before[s.name])
			return nil
		})
		if err != nil {
			c.t.Errorf("%s has leaked: %v", s.name, err)
		}
	}
}
