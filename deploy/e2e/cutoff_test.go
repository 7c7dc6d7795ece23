//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"rollcall/node/api"
)

// lease is how long a node may answer plugin requests after the leader last confirmed it: lease.ttl of this file's clusters.
const lease = 5 * time.Second

// watched is one answer of the node that is cut off.
type watched struct {
	sent, got  time.Time
	status     int
	generation uint64
	version    string
}

// watch asks a node for the demo plugin from several clients, without a pause worth the name, until stop, which
// returns every answer that a plugin gave in the order in which the requests were sent.
func (s *server) watch(clients int) (count func() int, stop func() []watched) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	var mu sync.Mutex
	var seen []watched
	for range clients {
		wg.Go(func() {
			for ctx.Err() == nil {
				w := watched{sent: time.Now()}
				once, done := context.WithTimeout(ctx, 5*time.Second)
				status, answer, header, err := s.c.sendHeader(once, s, http.MethodGet, "demo/info", "")
				done()
				w.got, w.status = time.Now(), status
				var a demoAnswer
				if err == nil && status == http.StatusOK && json.Unmarshal([]byte(answer), &a) == nil {
					w.version = a.Data.Version
					w.generation, _ = strconv.ParseUint(header.Get(api.HeaderGeneration), 10, 64)
					mu.Lock()
					seen = append(seen, w)
					mu.Unlock()
				}
				time.Sleep(2 * time.Millisecond)
			}
		})
	}
	count = func() int { mu.Lock(); defer mu.Unlock(); return len(seen) }
	return count, func() []watched {
		cancel()
		wg.Wait()
		slices.SortFunc(seen, func(a, b watched) int { return a.sent.Compare(b.sent) })
		return seen
	}
}

// TestAFollowerThatIsCutOffFallsSilentAndReturnsWithTheNewGeneration cuts a follower off from the others, wholly and in
// each direction alone, while clients still reach it. After the lease it answers no plugin request; a reload goes through
// without it; and the first answer after the heal, like every later one, is of the new generation.
func TestAFollowerThatIsCutOffFallsSilentAndReturnsWithTheNewGeneration(t *testing.T) {
	c := newCluster(t, options{apart: true, config: map[string]any{"lease.ttl": lease.String()}})
	c.mountDemo()
	l := startCounting(c, "demo", 12, 10*time.Millisecond)
	version := "v1.0.0"
	for _, how := range []struct {
		name  string
		rules []string
	}{
		{"wholly", c.net.isolated()},
		{"it hears nothing", c.net.isolated()[:1]},
		{"it is not heard", c.net.isolated()[1:]},
	} {
		t.Run(how.name, func(t *testing.T) {
			version = map[string]string{"v1.0.0": "v1.1.0", "v1.1.0": "v1.0.0"}[version]
			off := c.followers()[0]
			count, stop := off.watch(4)
			until(t, short, "it answers", func() error {
				if n := count(); n < 20 {
					return fmt.Errorf("%d times", n)
				}
				return nil
			})
			for _, r := range how.rules {
				c.net.rule(off.index, r)
			}
			cut := time.Now()
			until(t, long, "it is fenced", func() error {
				h, err := off.client().Health(timeout(t, short))
				if err == nil && !h.Fenced {
					err = errors.New("it is not")
				}
				return err
			})
			time.Sleep(time.Until(cut.Add(lease + time.Second)))
			others := c.others(off)
			rec := c.reload(others[0], api.ReloadRequest{Plugin: "demo", Version: version})
			if m := part(rec, off.name); rec.Outcome != api.OutcomePartial || m.Verdict != api.VerdictPendingDown {
				t.Errorf("%s is cut off:\n%s", off.name, tell(rec))
			}
			healed := time.Now()
			c.net.heal(off.index)
			until(t, recovery, off.name+" serves again", func() error { return c.settled(c.nodes...) })
			time.Sleep(200 * time.Millisecond)
			seen := stop()

			before, after := 0, 0
			for _, w := range seen {
				switch {
				case w.got.Before(cut):
					before++
				case w.sent.After(cut.Add(lease)) && w.got.Before(healed):
					t.Errorf("%s after the cut it answered with %s, generation %d; the lease is %s", w.sent.Sub(cut), w.version,
						w.generation, lease)
				case w.sent.After(cut.Add(lease)):
					after++
					if w.generation < rec.DecidedIndex || w.version != version {
						t.Errorf("%s after the heal it answered with %s, generation %d; the new one is %s, %d",
							w.got.Sub(healed), w.version, w.generation, version, rec.DecidedIndex)
					}
				}
			}
			if before == 0 || after == 0 {
				t.Errorf("%d answers before the cut and %d after the heal are too few to mean anything", before, after)
			}
			until(t, short, "the record says that it converged late", func() error {
				rec, err := c.any().ReloadRecord(timeout(t, short), rec.ID, 0, 0)
				if err == nil && part(rec, off.name).Verdict != api.VerdictConvergedLate {
					err = errors.New(tell(rec))
				}
				return err
			})
			t.Logf("%s: %d answers before the cut, %d after the heal, 0 between the end of the lease and the heal", off.name, before, after)
		})
	}
	l.cancel()
	l.wg.Wait()
	if len(l.backwards) > 0 {
		t.Errorf("answers went back: %q", l.backwards[:min(len(l.backwards), 12)])
	}
	for _, s := range c.live() {
		if err := l.holds(s); err != nil {
			t.Error(err)
		}
	}
}
