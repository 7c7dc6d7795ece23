package sim

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
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

// Table sums runs up.
type Table struct {
	Seeds             []uint64
	Virtual, Wall     time.Duration
	Faults, Reloads   map[string]int
	Ops, OK, Unknown  int
	Checked, Events   int
	Violations, Wrong int
}

// Add takes a run and what the checker says of it.
func (t *Table) Add(r *Result, report *check.Report) {
	if t.Faults == nil {
		t.Faults, t.Reloads = map[string]int{}, map[string]int{}
	}
	t.Seeds = append(t.Seeds, r.Options.Seed)
	t.Virtual += r.Virtual
	t.Wall += r.Wall
	for k, n := range r.Faults {
		t.Faults[k] += n
	}
	for k, n := range r.Reloads {
		t.Reloads[k] += n
	}
	t.Ops, t.OK, t.Unknown = t.Ops+report.Ops, t.OK+report.OK, t.Unknown+report.Unknown
	for _, n := range report.Looked {
		t.Checked += n
	}
	t.Events += report.Events
	t.Violations += len(report.Violations)
	t.Wrong += len(r.Wrong)
}

// String is the table as it stands in the documents. cpu is what the process has used, 0 when that is not known.
func (t *Table) String() string { return t.render(0) }

// WithCPU is String with the processor's time beside the wall's: what other work on the machine does not change.
func (t *Table) WithCPU(cpu time.Duration) string { return t.render(cpu) }

func (t *Table) render(cpu time.Duration) string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 1, ' ', 0)
	row := func(name, format string, args ...any) { _, _ = fmt.Fprintf(w, "| %s\t| "+format+"\t|\n", append([]any{name}, args...)...) }
	total := func(m map[string]int) (n int) {
		for _, k := range m {
			n += k
		}
		return n
	}
	row("seeds", "%d (%d to %d)", len(t.Seeds), t.Seeds[0], t.Seeds[len(t.Seeds)-1])
	row("simulated", "%.2f cluster-hours", t.Virtual.Hours())
	row("cluster-hours per minute of wall time", "%.2f", t.Virtual.Hours()/t.Wall.Minutes())
	if cpu > 0 {
		row("cluster-hours per minute of one processor", "%.2f", t.Virtual.Hours()/cpu.Minutes())
	}
	row("faults injected", "%d of %d kinds: %s", total(t.Faults), len(t.Faults), strings.Join(Outcomes(t.Faults), ", "))
	row("operations", "%d, %d answered well, %d with an unknown outcome", t.Ops, t.OK, t.Unknown)
	row("things checked", "%d, of %d events of nodes", t.Checked, t.Events)
	row("reloads run", "%d: %s", total(t.Reloads), strings.Join(Outcomes(t.Reloads), ", "))
	row("violations", "%d", t.Violations+t.Wrong)
	_ = w.Flush()
	return b.String()
}
