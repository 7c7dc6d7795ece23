package client

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"rollcall/node/api"
)

// PrintVerdicts prints what every node answered to a reload: a row for each node (and mount, where there are several)
// with verdict, what runs now and what ran before, how long it took and what became of the requests, then the causes of
// what did not work, and a summary. In color when w is a terminal that takes it.
func PrintVerdicts(w io.Writer, r *api.Reload) {
	color := colored(w, os.Getenv)
	var names []string
	var verdicts []string
	mounts := map[string]bool{}
	for _, t := range r.Targets {
		mounts[t.Namespace+t.Mount] = true
	}
	t := table{upper: true, head: []string{"node", "verdict", "now", "was", "ready", "switch", "drain", "requests", "failed"}}
	many := len(mounts) > 1
	if many {
		t.head = slices.Insert(t.head, 1, "mount")
	}
	for i := range r.Nodes {
		n := &r.Nodes[i]
		for j := range n.Mounts {
			m := &n.Mounts[j]
			now, was := nowAndWas(r, n, m)
			served, lost := "-", "-"
			if m.From != nil || m.To != nil {
				served, lost = fmt.Sprint(m.Requests.Served), fmt.Sprint(m.Requests.Failed)
			}
			row := []string{
				n.Node, verdictOf(r, n, m), now, was,
				millis(m.Timings.Ready), millis(switchTime(m)), millis(m.Timings.Drain), served, lost,
			}
			if many {
				row = slices.Insert(row, 1, m.Namespace+m.Mount)
			}
			t.add(row...)
			names, verdicts = append(names, n.Node), append(verdicts, row[slices.Index(t.head, "verdict")])
		}
		if len(n.Mounts) == 0 {
			row := []string{n.Node, n.State}
			if many {
				row = slices.Insert(row, 1, "-")
			}
			for len(row) < len(t.head) {
				row = append(row, "-")
			}
			t.add(row...)
			names, verdicts = append(names, n.Node), append(verdicts, n.State)
		}
	}
	if color {
		at := slices.Index(t.head, "verdict")
		t.paint = func(row, col int, cell string) string {
			if col != at {
				return cell
			}
			return paint(verdicts[row], cell)
		}
	}
	if len(names) > 0 {
		t.print(w)
		_, _ = fmt.Fprintln(w)
	}
	for _, c := range causes(r) {
		_, _ = fmt.Fprintln(w, c)
	}
	for _, l := range summary(r) {
		_, _ = fmt.Fprintln(w, l)
	}
}

// switchTime is what requests felt: how long the gate was closed, or the switch as a whole where that is not told.
func switchTime(m *api.ReloadMount) float64 {
	for _, ms := range []float64{m.HoldMS, m.Timings.Hold, m.Timings.Switch} {
		if ms > 0 {
			return ms
		}
	}
	return 0
}

// verdictOf is a mount's verdict, or the node's state while there is none.
func verdictOf(r *api.Reload, n *api.ReloadNode, m *api.ReloadMount) string {
	switch {
	case m.Verdict != "":
		return m.Verdict
	case api.Ended(r.Phase) && r.Outcome == api.OutcomeAborted:
		return "not asked to switch"
	case m.Prepared && n.State == api.NodePending:
		return api.NodePrepared
	case n.Wave > r.Wave && n.State == api.NodePending && !api.Ended(r.Phase):
		return fmt.Sprintf("waits, wave %d", n.Wave+1)
	default:
		return n.State
	}
}

// nowAndWas is what the node runs and what it ran, as "v1.2.0 1a2b3c4d pid 4711".
func nowAndWas(r *api.Reload, n *api.ReloadNode, m *api.ReloadMount) (now, was string) {
	from, to := m.From, m.To
	if from == nil { // what the reload set out from; the node itself has said nothing
		for i := range r.Targets {
			if t := &r.Targets[i]; t.Mount == m.Mount && t.Namespace == m.Namespace && n.State != api.NodeDown && t.From.SHA256 != "" {
				from = &api.Process{Version: t.From.Version, SHA256: t.From.SHA256}
			}
		}
	}
	was = build(from)
	switch m.Verdict {
	case api.VerdictSwitched, api.VerdictConvergedLate:
		return build(to), was
	case api.VerdictUnchanged:
		if to != nil {
			return build(to), was
		}
		return was, was
	case api.VerdictPendingDown, api.VerdictUnconfirmed:
		return "?", was
	case api.VerdictUnmounted:
		return "-", was
	case api.VerdictFailedSwitch:
		return "none (retrying)", was
	default:
		return was, was
	}
}

func build(p *api.Process) string {
	if p == nil {
		return "-"
	}
	text := strings.TrimSpace(p.Version + " " + short(p.SHA256))
	if p.PID != 0 {
		text += fmt.Sprintf(" pid %d", p.PID)
	}
	return orDash(text)
}

// causes are the lines that say what did not work, where and why.
func causes(r *api.Reload) []string {
	var out []string
	for i := range r.Nodes {
		n := &r.Nodes[i]
		if n.Why != "" {
			out = append(out, fmt.Sprintf("%s: %s", n.Node, api.Cell(n.Why)))
		}
		for j := range n.Mounts {
			m := &n.Mounts[j]
			if m.Cause == "" {
				continue
			}
			where := n.Node + " " + m.Namespace + m.Mount
			if m.Phase != "" {
				where += " in " + m.Phase
			}
			out = append(out, fmt.Sprintf("%s: %s", where, api.Cell(m.Cause)))
		}
	}
	return out
}

// summary are the closing lines.
func summary(r *api.Reload) []string {
	state := r.Outcome
	if state == "" {
		state = r.Phase
		if r.Paused {
			state += ", paused"
		}
	}
	head := fmt.Sprintf("%s: %d of %d nodes answered", state, len(r.Answered), len(r.Expected))
	if r.DecidedIndex > 0 {
		head += fmt.Sprintf(", generation %d", r.DecidedIndex)
	}
	if d, ok := took(r); ok {
		head += ", " + millis(float64(d)/float64(time.Millisecond))
	}
	if r.Outcome == api.OutcomeNothing {
		head = "nothing to do: no mount matches " + selected(r)
	}
	out := []string{head}
	if r.Why != "" {
		out[0] += " (" + api.Cell(r.Why) + ")"
	}
	var served, held, lost uint64
	var longest float64
	for i := range r.Nodes {
		for j := range r.Nodes[i].Mounts {
			m := &r.Nodes[i].Mounts[j]
			served, held, lost = served+m.Requests.Served, held+m.Requests.Held, lost+m.Requests.Failed
			longest = max(longest, m.HoldMS)
		}
	}
	if r.DecidedIndex > 0 {
		line := fmt.Sprintf("requests: %d served, %d held (longest hold %s), %d failed", served, held, millis(longest), lost)
		if r.P99.Before > 0 || r.P99.During > 0 || r.P99.After > 0 {
			line += fmt.Sprintf("; p99 %s before, %s during, %s after",
				millis(r.P99.Before), millis(r.P99.During), millis(r.P99.After))
		}
		out = append(out, line)
	}
	if len(r.Pending) > 0 && r.Outcome != api.OutcomeAborted { // after an abort nobody owes anything
		out = append(out, "pending: "+strings.Join(r.Pending, ", "))
	}
	if len(r.Unconfirmed) > 0 {
		out = append(out, "unconfirmed: "+strings.Join(r.Unconfirmed, ", "))
	}
	if r.RolledBackBy != "" {
		out = append(out, "rolled back by reload "+r.RolledBackBy)
	}
	return out
}

// took is how long the reload ran, from the start of its preparing.
func took(r *api.Reload) (time.Duration, bool) {
	from, err := time.Parse(time.RFC3339Nano, r.Prepared)
	if err != nil {
		if from, err = time.Parse(time.RFC3339Nano, r.Started); err != nil {
			return 0, false
		}
	}
	to, err := time.Parse(time.RFC3339Nano, r.Ended)
	return to.Sub(from), err == nil && to.After(from)
}

// selected is what a reload was asked to reload.
func selected(r *api.Reload) string {
	if len(r.Selector.Mounts) > 0 {
		return "mounts " + strings.Join(r.Selector.Mounts, ", ")
	}
	if t := r.Selector.Type; t != "" && t != "unknown" {
		return t + " plugin " + r.Selector.Plugin
	}
	return "plugin " + r.Selector.Plugin
}

// ExitOf is the exit code of a reload that was waited for: see the constants. A node that refused counts before one
// that is only pending.
func ExitOf(r *api.Reload) int {
	pending := len(r.Pending) > 0 || len(r.Unconfirmed) > 0
	for i := range r.Nodes {
		for j := range r.Nodes[i].Mounts {
			switch r.Nodes[i].Mounts[j].Verdict {
			case api.VerdictRefused, api.VerdictFailedSwitch, api.VerdictPutBack:
				return ExitReload
			case api.VerdictPendingDown, api.VerdictUnconfirmed:
				pending = true
			}
		}
	}
	switch {
	case !api.Ended(r.Phase):
		return ExitPending
	case r.Outcome == api.OutcomePartial || r.Outcome == api.OutcomeSucceeded:
		if pending {
			return ExitPending
		}
		if r.Outcome == api.OutcomeSucceeded {
			return ExitOK
		}
	}
	return ExitReload
}

// Colors of verdicts and states.
const (
	green  = "\x1b[32m"
	yellow = "\x1b[33m"
	red    = "\x1b[31m"
	reset  = "\x1b[0m"
)

func paint(verdict, cell string) string {
	color := yellow
	switch verdict {
	case api.VerdictSwitched, api.VerdictUnchanged, api.VerdictConvergedLate, api.NodeDone, api.NodePrepared, api.OutcomeSucceeded:
		color = green
	case api.VerdictRefused, api.VerdictFailedSwitch, api.VerdictPutBack, api.OutcomeFailed, api.OutcomeAborted:
		color = red
	}
	return color + cell + reset
}
