//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"rollcall/node/api"
)

// Limits of waits. They are for a machine with other work to do; what a promise says about time is checked apart.
const (
	long  = 60 * time.Second
	short = 20 * time.Second
)

// until asks again until f says nil, and fails the test with what it said last.
func until(t testing.TB, limit time.Duration, what string, f func() error) {
	t.Helper()
	if err := within(limit, f); err != nil {
		t.Fatalf("%s: not within %s: %v", what, limit, err)
	}
}

func within(limit time.Duration, f func() error) error {
	deadline := time.Now().Add(limit)
	for {
		err := f()
		if err == nil || time.Now().After(deadline) {
			return err
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func timeout(t testing.TB, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// serving waits until every live node serves: it has a lease, and every mount of it runs what is wanted.
func (c *cluster) serving() {
	c.t.Helper()
	until(c.t, long, "every live node serves", func() error { return c.settled(c.live()...) })
}

// settled says what is missing until these nodes serve the wanted generation of every mount.
func (c *cluster) settled(nodes ...*server) error {
	if len(nodes) == 0 {
		return errors.New("no node runs")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	var names []string
	for _, s := range nodes {
		h, err := s.client().Health(ctx)
		switch {
		case err != nil:
			return fmt.Errorf("%s: %w", s.name, err)
		case !h.Initialized:
			return fmt.Errorf("%s has not found its cluster", s.name)
		case h.Fenced:
			return fmt.Errorf("%s is fenced: %s", s.name, h.FencedBecause)
		}
		names = append(names, s.name)
	}
	v, err := nodes[0].client().Versions(ctx)
	if err != nil {
		return fmt.Errorf("versions: %w", err)
	}
	for _, name := range names {
		if !slices.Contains(v.Nodes, name) {
			return fmt.Errorf("%s is not among the nodes of the state: %v", name, v.Nodes)
		}
	}
	for _, m := range v.Mounts {
		for _, n := range m.Nodes {
			if slices.Contains(names, n.Node) && !n.Same {
				return fmt.Errorf("%s on %s: %s, running %+v, wanted %+v: %s", m.Mount, n.Node, n.State, n.Running, n.Wanted, n.Why)
			}
		}
	}
	return nil
}

// leader waits until the live nodes agree on who leads, and returns it.
func (c *cluster) leader() *server {
	c.t.Helper()
	var found *server
	until(c.t, long, "a leader that every live node knows", func() error {
		found = nil
		known := map[string]bool{}
		for _, s := range c.live() {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			l, err := s.client().Leader(ctx)
			cancel()
			if err != nil {
				return err
			}
			known[l.LeaderAddress] = true
			if l.IsSelf {
				if found != nil {
					return fmt.Errorf("%s and %s both lead", found.name, s.name)
				}
				found = s
			}
		}
		if found == nil || len(known) != 1 || !known[found.url()] {
			return fmt.Errorf("leaders known: %v", known)
		}
		return nil
	})
	return found
}

// followers are the live nodes that do not lead.
func (c *cluster) followers() []*server {
	c.t.Helper()
	leader := c.leader()
	return slices.DeleteFunc(c.live(), func(s *server) bool { return s == leader })
}

// others are the live nodes but for one.
func (c *cluster) others(not *server) []*server {
	return slices.DeleteFunc(c.live(), func(s *server) bool { return s == not })
}

// ended waits for the end of a reload and returns its record.
func (c *cluster) ended(client *api.Client, id string) *api.Reload {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	rec, err := client.WaitReload(ctx, id, api.Watcher{})
	if err != nil {
		c.t.Fatalf("wait for reload %s: %v (%+v)", id, err, rec)
	}
	return rec
}

// reload starts a global reload through one node and returns its record when it has ended.
func (c *cluster) reload(s *server, req api.ReloadRequest) *api.Reload {
	c.t.Helper()
	req.Scope = "global"
	out, warnings, err := s.client().Reload(timeout(c.t, long), "", req)
	if err != nil {
		c.t.Fatalf("reload %s through %s: %v", req.Plugin, s.name, err)
	}
	if len(warnings) > 0 {
		c.t.Errorf("reload %s through %s: warnings %q", req.Plugin, s.name, warnings)
	}
	return c.ended(s.client(), out.ReloadID)
}

// part is one node's part of a reload of one mount.
func part(rec *api.Reload, node string) api.ReloadMount {
	for _, n := range rec.Nodes {
		if n.Node == node && len(n.Mounts) > 0 {
			return n.Mounts[0]
		}
	}
	return api.ReloadMount{}
}

// tell is a record in a few lines, for failures.
func tell(rec *api.Reload) string {
	if rec == nil {
		return "no record"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "reload %s: %s, outcome %q, why %q, expected %v, answered %v, pending %v, unconfirmed %v\n",
		rec.ID, rec.Phase, rec.Outcome, rec.Why, rec.Expected, rec.Answered, rec.Pending, rec.Unconfirmed)
	for _, n := range rec.Nodes {
		fmt.Fprintf(&b, "  %s: %s (%s) safe %q\n", n.Node, n.State, n.Why, n.Safe)
		for _, m := range n.Mounts {
			fmt.Fprintf(&b, "    %s: verdict %q phase %q cause %q from %+v to %+v requests %+v hold %.1f ms\n",
				m.Mount, m.Verdict, m.Phase, m.Cause, m.From, m.To, m.Requests, m.HoldMS)
		}
	}
	return b.String()
}

// allSwitched fails the test unless every named node switched to a version, with another process.
func allSwitched(t testing.TB, rec *api.Reload, version string, nodes ...*server) {
	t.Helper()
	if rec.Outcome != api.OutcomeSucceeded || len(rec.Pending) > 0 || len(rec.Answered) != len(nodes) {
		t.Fatalf("not every node followed:\n%s", tell(rec))
	}
	for _, s := range nodes {
		m := part(rec, s.name)
		switch {
		case m.Verdict != api.VerdictSwitched || m.From == nil || m.To == nil:
			t.Errorf("%s: verdict %q:\n%s", s.name, m.Verdict, tell(rec))
		case m.To.Version != version || m.From.Version == version:
			t.Errorf("%s: from %s to %s, wanted to %s", s.name, m.From.Version, m.To.Version, version)
		case m.To.PID == 0 || m.From.PID == 0 || m.To.PID == m.From.PID || m.To.SHA256 == m.From.SHA256 && kvVersions[version]:
			t.Errorf("%s: from %+v to %+v: the same process or binary", s.name, m.From, m.To)
		case m.Requests.Failed != 0 || m.Requests.Canceled != 0:
			t.Errorf("%s: %d requests failed, %d were cancelled during the switch", s.name, m.Requests.Failed, m.Requests.Canceled)
		}
	}
}

// kvVersions have binaries of their own.
var kvVersions = map[string]bool{kvOld: true, kvNew: true}
