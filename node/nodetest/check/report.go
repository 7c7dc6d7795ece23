package check

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// maxViolations bounds how many of one invariant are told.
const maxViolations = 20

// Report is what Check found.
type Report struct {
	// Looked counts what each invariant was checked on. An invariant that is not among them had nothing to look at.
	Looked map[string]int `json:"looked"`
	// Violations are what must not be; at most twenty of each invariant.
	Violations []Violation `json:"violations"`
	// Undecided are the parts that the search gave up on: neither good nor bad.
	Undecided []string `json:"undecided,omitempty"`
	// Ops, OK, Failed, Unknown, Events and Faults count what was in the run.
	Ops, OK, Failed, Unknown, Events, Faults int
}

// Violation is one thing that must not be.
type Violation struct {
	// Invariant is its name, "I1" to "I24".
	Invariant string `json:"invariant"`
	What      string `json:"what"`
	// Ops are the numbers of the operations that show it.
	Ops []uint64 `json:"ops,omitempty"`
}

func (v Violation) String() string { return v.Invariant + ": " + v.What }

// Good reports whether nothing was violated and everything was decided.
func (r *Report) Good() bool { return len(r.Violations) == 0 && len(r.Undecided) == 0 }

// Err is nil for a good run, else all that is wrong in one text.
func (r *Report) Err() error {
	if r.Good() {
		return nil
	}
	var b strings.Builder
	for _, v := range r.Violations {
		fmt.Fprintf(&b, "\n%s", v)
	}
	for _, u := range r.Undecided {
		fmt.Fprintf(&b, "\nundecided: %s", u)
	}
	return fmt.Errorf("the run is not what it should be:%s", b.String())
}

// String is the report in a few lines.
func (r *Report) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d operations (%d ok, %d failed, %d unknown), %d events, %d faults; looked at:", r.Ops, r.OK, r.Failed, r.Unknown, r.Events, r.Faults)
	for _, name := range slices.Sorted(maps.Keys(r.Looked)) {
		fmt.Fprintf(&b, " %s %d", name, r.Looked[name])
	}
	fmt.Fprintf(&b, "; violations: %d", len(r.Violations))
	for _, v := range r.Violations {
		fmt.Fprintf(&b, "\n%s", v)
	}
	return b.String()
}

// of returns the violations of one invariant.
func (r *Report) of(invariant string) []Violation {
	var out []Violation
	for _, v := range r.Violations {
		if v.Invariant == invariant {
			out = append(out, v)
		}
	}
	return out
}

func (r *Report) looked(invariant string, n int) { r.Looked[invariant] += n }

func (r *Report) bad(invariant string, ops []uint64, format string, args ...any) {
	if len(r.of(invariant)) < maxViolations {
		r.Violations = append(r.Violations, Violation{Invariant: invariant, What: fmt.Sprintf(format, args...), Ops: ops})
	}
}
