//go:build e2e

package e2e

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// tally is what a campaign counts over all its clusters.
type tally struct {
	began    time.Time
	seed     uint64
	kinds    map[string]*kindTally
	asked    int // reloads that were asked for
	ended    int // of those, ended with an outcome
	outcomes map[string]int
	load     loadSum
	loaded   time.Duration
	slowest  time.Duration // until every node served again
	clusters []string
	// checked is how many answered operations the checker has looked at, and what it found.
	checked, violations int
}

type kindTally struct {
	done, leader int // how often; on the leader
	slowest      time.Duration
}

func (t *tally) kind(name string) *kindTally {
	if t.kinds[name] == nil {
		t.kinds[name] = &kindTally{}
	}
	return t.kinds[name]
}

// add sums up the loads of several clusters.
func (s *loadSum) add(o loadSum) {
	s.acked += o.acked
	s.reads += o.reads
	s.conflicts += o.conflicts
	s.failed += o.failed
	s.excused += o.excused
	s.lost += o.lost
	s.backwards += o.backwards
	s.staleReads += o.staleReads
}

// String is the table of a campaign, as the documents show it.
func (t *tally) String() string {
	var b strings.Builder
	faults := 0
	fmt.Fprintf(&b, "| fault | times | on the leader | slowest return |\n|---|---|---|---|\n")
	for _, name := range slices.Sorted(maps.Keys(t.kinds)) {
		k := t.kinds[name]
		faults += k.done
		fmt.Fprintf(&b, "| %s | %d | %d | %.1f s |\n", name, k.done, k.leader, k.slowest.Seconds())
	}
	ops := t.load.answers()
	fmt.Fprintf(&b, "\n| | |\n|---|---|\n")
	row := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "| %s | %s |\n", name, fmt.Sprintf(format, args...))
	}
	row("clusters", "%s nodes", strings.Join(t.clusters, " and "))
	row("time under faults", "%s", t.loaded.Round(time.Second))
	row("faults", "%d of %d kinds", faults, len(t.kinds))
	row("operations answered", "%d (%.0f a second)", ops, float64(ops)/max(1, t.loaded.Seconds()))
	row("operations of the histories that were judged", "%d", t.checked)
	row("violations of an invariant", "%d", t.violations)
	row("acknowledged writes", "%d", t.load.acked)
	row("requests without an answer during faults", "%d", t.load.excused)
	row("reloads asked for, accepted and ended", "%d, %d", t.asked, t.ended)
	for _, o := range slices.Sorted(maps.Keys(t.outcomes)) {
		row("reloads "+o, "%d", t.outcomes[o])
	}
	row("acknowledged writes lost", "%d", t.load.lost)
	row("answers of an older generation after a newer one", "%d", t.load.backwards)
	row("reads behind what the client had seen", "%d", t.load.staleReads)
	row("slowest return after the last fault was healed", "%.1f s", t.slowest.Seconds())
	row("seed", "%d", t.seed)
	return b.String()
}
