package nodetest

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"rollcall/node/api"
)

// stream collects the events of one connection's life.
type stream struct {
	mu     sync.Mutex
	events []api.Event
	cancel context.CancelFunc
	done   chan struct{}
}

func (c *Cluster) follow(client *api.Client, since string, filter url.Values) *stream {
	ctx, cancel := context.WithCancel(c.t.Context())
	s := &stream{cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		_ = client.Events(ctx, since, filter, func(e api.Event) error {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.events = append(s.events, e)
			return nil
		})
	}()
	c.t.Cleanup(func() { cancel(); <-s.done })
	return s
}

func (s *stream) all() []api.Event {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.events)
}

// until waits for an event that want accepts.
func (s *stream) until(c *Cluster, what string, want func(api.Event) bool) {
	c.t.Helper()
	c.Eventually(20*time.Second, what, func() error {
		if slices.ContainsFunc(s.all(), want) {
			return nil
		}
		return fmt.Errorf("got %+v", s.all())
	})
}

func ended(id string) func(api.Event) bool {
	return func(e api.Event) bool {
		return e.ReloadID == id && strings.Contains(string(e.Data), `"outcome":"succeeded"`)
	}
}

func TestEventsTellOfAReloadInOrderAndResumeOnAnotherNode(t *testing.T) {
	c := Start(t, 3, nil)
	c.Register("demo", "v1.0.0")
	c.Register("demo", "v1.1.0")
	first := c.follow(c.Client(0), "", nil)
	time.Sleep(200 * time.Millisecond) // a stream begins at "now": let it begin
	c.Enable("demo", "demo", "v1.0.0")
	first.until(c, "the mount", func(e api.Event) bool { return e.Type == "mount" && e.Mount == "demo/" })
	c.Enable("other", "demo", "v1.0.0")
	before := first.all()
	since := before[0].ID
	one := c.Reload(1, api.ReloadRequest{Mounts: []string{"demo"}, Scope: "global", Version: "v1.1.0"})
	two := c.Reload(2, api.ReloadRequest{Mounts: []string{"other"}, Scope: "global", Version: "v1.1.0"})
	first.until(c, "the end of the second reload", ended(two.ID))

	last := uint64(0)
	told := map[string]bool{}
	for _, e := range first.all() {
		id, err := strconv.ParseUint(e.ID, 10, 64)
		if err != nil || id < last || e.Index < last || e.Time == "" {
			t.Errorf("event %+v after id %d", e, last)
		}
		last = id
		told[e.Type+" "+e.ReloadID] = true
	}
	if !told["reload "+one.ID] || !told["mount "] {
		t.Errorf("events tell of %v", told)
	}

	// From the first id on, through another node: what has changed since is told, in order, and nothing before it.
	again := c.follow(c.Client(2), since, nil)
	again.until(c, "the end of the second reload again", ended(two.ID))
	at, _ := strconv.ParseUint(since, 10, 64)
	for _, e := range again.all() {
		if e.Index <= at {
			t.Errorf("event %+v was told again after %s", e, since)
		}
	}
	again.until(c, "the first reload", ended(one.ID))

	// With a filter, one reload and nothing else.
	only := c.follow(c.Client(1), "1", url.Values{"reload_id": {one.ID}})
	only.until(c, "its end", ended(one.ID))
	for _, e := range only.all() {
		if e.ReloadID != one.ID {
			t.Errorf("the filter let %+v through", e)
		}
	}
}

func TestEventsOutliveTheNodeThatToldThemAndDoNotHoldItsEndUp(t *testing.T) {
	c := Start(t, 3, nil)
	c.Register("demo", "v1.0.0")
	c.Enable("demo", "demo", "v1.0.0")
	client, err := api.New(api.Config{Addresses: c.Addresses(), Token: c.Token})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	s := c.follow(client, "1", nil)
	s.until(c, "the mount", func(e api.Event) bool { return e.Type == "mount" })
	// With a stream on every node, one of them watches the node that stops.
	for i := range 3 {
		c.follow(c.Client(i), "", nil)
	}
	from := time.Now()
	if err := c.StopNode(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(from); d > 8*time.Second {
		t.Errorf("the node took %v to stop with a stream open", d)
	}
	c.leaderName()
	rec := c.Reload(1, api.ReloadRequest{Plugin: "demo", Scope: "global"})
	s.until(c, "the reload through another node", func(e api.Event) bool { return e.ReloadID == rec.ID })
	s.until(c, "the node that left or another leader", func(e api.Event) bool { return e.Type == "leader" || e.Type == "node" })
}

func TestEventsRefuseAnIDThatHasNotBeenAndAReloadThatIsNotThere(t *testing.T) {
	c := Start(t, 1, nil)
	for _, k := range []struct {
		path, last string
		status     int
	}{
		{"sys/events", "999999", http.StatusBadRequest},
		{"sys/events", "x", http.StatusBadRequest},
		{"sys/events?reload_id=none", "", http.StatusNotFound},
	} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, c.Node(0).APIAddress()+"/v1/"+k.path, http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set(api.HeaderToken, c.Token)
		req.Header.Set("Last-Event-ID", k.last)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(resp.Body.Close()); err != nil || resp.StatusCode != k.status {
			t.Errorf("%s after %q: %s (%v), want %d", k.path, k.last, resp.Status, err, k.status)
		}
	}
}
