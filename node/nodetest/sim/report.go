package sim

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"rollcall/node/nodetest/check"
)

// Judge checks a run. It must be called outside of the bubble.
func (r *Result) Judge() *check.Report { return check.Check(r.Run) }

// Command repeats the run.
func (r *Result) Command() string {
	return fmt.Sprintf("go test ./node/nodetest -run Simulation -seed %d -for %v -nodes %d", r.Options.Seed, r.Options.For, r.Options.Nodes)
}

// Save writes history, events, faults, log and what was wrong into a folder below parent, and returns the folder.
func (r *Result) Save(parent string, report *check.Report) (string, error) {
	dir := filepath.Join(parent, fmt.Sprintf("simulation-%d", r.Options.Seed))
	r.Run.Meta.Command = r.Command()
	err := r.Run.Save(dir)
	text := r.Command() + "\n\n" + strings.Join(r.Wrong, "\n") + "\n" + report.String() + "\n"
	return dir, errors.Join(err,
		os.WriteFile(filepath.Join(dir, "log.txt"), r.Log, 0o644),
		os.WriteFile(filepath.Join(dir, "report.txt"), []byte(text), 0o644),
	)
}

// Table sums runs up. It travels between processes as JSON.
type Table struct {
	Seeds             []uint64
	Virtual           time.Duration
	Wall, CPU         time.Duration
	Faults, Reloads   map[string]int
	Ops, OK, Unknown  int
	Checked, Events   int
	Violations, Wrong int
	Traces            [][]Trace
}

// Add takes a run and what the checker says of it.
func (t *Table) Add(r *Result, report *check.Report) {
	checked := 0
	for _, n := range report.Looked {
		checked += n
	}
	t.Merge(&Table{
		Seeds: []uint64{r.Options.Seed}, Virtual: r.Virtual, Faults: r.Faults, Reloads: r.Reloads, Ops: report.Ops, OK: report.OK,
		Unknown: report.Unknown, Checked: checked, Events: report.Events, Violations: len(report.Violations), Wrong: len(r.Wrong),
		Traces: [][]Trace{r.Traces()},
	})
}

// Merge adds the runs of another table, but for the time on the wall: runs may go on at once.
func (t *Table) Merge(o *Table) {
	if t.Faults == nil {
		t.Faults, t.Reloads = map[string]int{}, map[string]int{}
	}
	for k, n := range o.Faults {
		t.Faults[k] += n
	}
	for k, n := range o.Reloads {
		t.Reloads[k] += n
	}
	t.Seeds, t.Traces = append(t.Seeds, o.Seeds...), append(t.Traces, o.Traces...)
	t.Virtual, t.CPU = t.Virtual+o.Virtual, t.CPU+o.CPU
	t.Ops, t.OK, t.Unknown = t.Ops+o.Ops, t.OK+o.OK, t.Unknown+o.Unknown
	t.Checked, t.Events = t.Checked+o.Checked, t.Events+o.Events
	t.Violations, t.Wrong = t.Violations+o.Violations, t.Wrong+o.Wrong
}

// String is the table as it stands in the documents.
func (t *Table) String() string {
	if len(t.Seeds) == 0 {
		return "nothing"
	}
	var b strings.Builder
	row := func(name, format string, args ...any) {
		_, _ = fmt.Fprintf(&b, "| "+name+" | "+format+" |\n", args...)
	}
	row("seeds", "%d, from %d to %d", len(t.Seeds), slices.Min(t.Seeds), slices.Max(t.Seeds))
	row("simulated", "%.2f cluster-hours", t.Virtual.Hours())
	row("cluster-hours per minute of wall time", "%.2f", t.Virtual.Hours()/t.Wall.Minutes())
	row("cluster-hours per minute of one processor", "%.2f", t.Virtual.Hours()/t.CPU.Minutes())
	row("faults injected", "%d of %d kinds: %s", total(t.Faults), len(t.Faults), strings.Join(Outcomes(t.Faults), ", "))
	row("operations", "%d: %d answered well, %d with an outcome that nobody knows", t.Ops, t.OK, t.Unknown)
	row("looked at by the checker", "%d things, and %d events of nodes", t.Checked, t.Events)
	row("reloads run", "%d: %s", total(t.Reloads), strings.Join(Outcomes(t.Reloads), ", "))
	row("violations", "%d", t.Violations+t.Wrong)
	return b.String()
}

func total(m map[string]int) (n int) {
	for _, k := range m {
		n += k
	}
	return n
}
