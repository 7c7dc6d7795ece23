package client

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unicode/utf8"

	"rollcall/node/api"
)

// Progress shows a reload while it runs: repainted in place on a terminal, one line per event in a pipe. It is used by
// one goroutine.
type Progress struct {
	w      io.Writer
	size   func() (width, height int, ok bool)
	color  bool
	lines  int               // painted last, to be painted over
	seen   map[string]string // what was said of a subject, in a pipe
	outage bool
}

// NewProgress shows on w. Repainting and color are for terminals only, and color not with NO_COLOR.
func NewProgress(w io.Writer) *Progress {
	size := func() (int, int, bool) { return terminal(w, os.Getenv) }
	return &Progress{w: w, size: size, color: colored(w, os.Getenv), seen: map[string]string{}}
}

// Update shows the record as it is now.
func (p *Progress) Update(r *api.Reload) {
	p.outage = false
	if width, height, ok := p.size(); ok {
		p.repaint(p.block(r, width, height))
		return
	}
	p.events(r)
}

// Trouble says once per outage that no node answers.
func (p *Progress) Trouble(err error) {
	if p.outage {
		return
	}
	p.outage = true
	p.Clear()
	_, _ = fmt.Fprintf(p.w, "no node answers, asking on: %s\n", api.Cell(err.Error()))
}

// Clear takes the painted block away, before something lasting is printed.
func (p *Progress) Clear() { p.repaint(nil) }

func (p *Progress) repaint(block []string) {
	var b strings.Builder
	if p.lines > 0 {
		fmt.Fprintf(&b, "\x1b[%dA\r\x1b[J", p.lines)
	}
	for _, l := range block {
		b.WriteString(l)
		b.WriteByte('\n')
	}
	p.lines = len(block)
	_, _ = io.WriteString(p.w, b.String())
}

// block is the whole picture, no wider than width and no higher than height allows.
func (p *Progress) block(r *api.Reload, width, height int) []string {
	lines := []string{clip(title(r), width), clip(phaseHead(r), width)}
	if r.Why != "" { // a line of its own: on a narrow terminal it is what must not be cut off
		lines = append(lines, clip("  "+api.Cell(r.Why), width))
	}
	if r.Paused {
		lines = append(lines, clip("  "+goesOn(r), width))
	}
	room := max(height-4, 1)
	longest := 0
	for i := range r.Nodes {
		longest = max(longest, utf8.RuneCountInString(r.Nodes[i].Node))
	}
	hidden := map[string]int{}
	for i := range r.Nodes {
		n := &r.Nodes[i]
		if len(r.Nodes) > room && (n.State == api.NodeDone || n.State == api.NodePrepared || len(lines) >= room) {
			hidden[n.State]++ // too many for the screen: those that are well, or too far down, are counted
			continue
		}
		state, detail := nodeLine(r, n)
		cell := fmt.Sprintf("%-16s", state)
		plain := fmt.Sprintf("  %-*s  %s  %s", longest, n.Node, cell, detail)
		line := clip(plain, width)
		if p.color {
			line = strings.Replace(line, cell, paint(state, cell), 1)
		}
		lines = append(lines, line)
	}
	if len(hidden) > 0 {
		var parts []string
		for _, s := range nodeStates {
			if hidden[s] > 0 {
				parts = append(parts, fmt.Sprintf("%d %s", hidden[s], s))
			}
		}
		lines = append(lines, clip("  and "+strings.Join(parts, ", "), width))
	}
	return lines
}

// nodeStates in the order in which they are counted.
var nodeStates = []string{
	api.NodeDone, api.NodePrepared, api.NodeSwitching, api.NodePending, api.NodeRefused, api.NodeExcluded, api.NodeDown, api.NodeLeft,
}

// clip cuts a line before the terminal would wrap it.
func clip(s string, width int) string {
	if utf8.RuneCountInString(s) < width {
		return s
	}
	return string([]rune(s)[:max(width-2, 0)]) + "…"
}

// title is "reload ID: kv v1.0.0 -> v2.0.0 on 3 nodes (global, all-or-nothing)".
func title(r *api.Reload) string {
	what := selected(r)
	if len(r.Targets) > 0 {
		t := &r.Targets[0]
		what = fmt.Sprintf("%s %s -> %s on %s", t.To.Name, specOf(&t.From), specOf(&t.To), t.Namespace+t.Mount)
		if more := len(r.Targets) - 1; more > 0 {
			what += fmt.Sprintf(" and %d more", more)
		}
	}
	how := r.Scope
	if r.Strategy != "" && r.Scope != "local" {
		how += ", " + r.Strategy
	}
	return fmt.Sprintf("reload %s: %s (%s, %d nodes)", r.ID, what, how, len(r.Expected))
}

func specOf(s *api.Spec) string {
	return versionCell(&api.Process{Version: s.Version, SHA256: s.SHA256})
}

// phaseLine is the phase, with what it waits for.
func phaseLine(r *api.Reload) string {
	line := phaseHead(r)
	if r.Paused {
		line += ": " + goesOn(r)
	}
	if r.Why != "" {
		line += " (" + api.Cell(r.Why) + ")"
	}
	return line
}

// goesOn is what an operator can do about a pause.
func goesOn(r *api.Reload) string {
	return fmt.Sprintf("`rollcall reloads resume %s` or `promote` goes on, `abort` goes back", r.ID)
}

// phaseHead is how far the reload has come.
func phaseHead(r *api.Reload) string {
	line := r.Phase
	if r.Outcome != "" && r.Outcome != r.Phase {
		line += ": " + r.Outcome
	}
	if r.DecidedIndex > 0 {
		line += fmt.Sprintf(", generation %d", r.DecidedIndex)
	}
	if len(r.Waves) > 1 {
		line += fmt.Sprintf(", wave %d of %d", r.Wave+1, len(r.Waves))
		if r.Wave < len(r.Waves) && r.Waves[r.Wave].Baking {
			line += " baking"
		}
	}
	if r.Paused {
		line += ", paused"
	}
	return line
}

// nodeLine is a node's state, or the verdict of its mounts when they have the same one, and the mounts' details.
func nodeLine(r *api.Reload, n *api.ReloadNode) (state, detail string) {
	state = n.State
	var parts []string
	for i := range n.Mounts {
		m := &n.Mounts[i]
		v := verdictOf(r, n, m)
		if i == 0 {
			state = v
		} else if v != state {
			state = n.State
		}
		part := m.Namespace + m.Mount
		if m.Timings.Ready > 0 {
			part += " ready in " + millis(m.Timings.Ready)
		}
		if h := switchTime(m); h > 0 {
			part += ", held " + millis(h)
		}
		if m.Cause != "" {
			part += ": " + api.Cell(strings.TrimPrefix(m.Phase+": "+m.Cause, ": "))
		}
		parts = append(parts, part)
	}
	if n.Why != "" {
		parts = append(parts, api.Cell(n.Why))
	}
	if n.JoinedDuring {
		parts = append(parts, "joined during the reload")
	}
	return state, strings.Join(parts, "; ")
}

// events prints what the record tells that was not printed yet, oldest first as far as the record has it.
func (p *Progress) events(r *api.Reload) {
	if p.news("title", r.ID) {
		p.line(r.Started, title(r))
	}
	if r.Phase == api.PhaseQueued {
		if p.news("phase", r.Phase) {
			p.line(r.Started, "queued behind a reload of the same mounts")
		}
		return
	}
	if p.news("preparing", "yes") {
		p.line(or(r.Prepared, r.Started), "preparing on "+names(r))
	}
	for i := range r.Nodes {
		n := &r.Nodes[i]
		for j := range n.Mounts {
			if m := &n.Mounts[j]; m.Prepared && p.news("prepared "+n.NodeID+m.Mount, "yes") {
				p.line("", fmt.Sprintf("%s %s prepared%s", n.Node, m.Namespace+m.Mount, inTime(m.Timings.Ready)))
			}
		}
	}
	if r.DecidedIndex > 0 && p.news("decided", fmt.Sprint(r.DecidedIndex)) {
		p.line(r.Committed, fmt.Sprintf("committed, generation %d", r.DecidedIndex))
	}
	for i := range r.Waves {
		w := &r.Waves[i]
		state := "is baking"
		if w.Passed {
			state = "passed"
		}
		if (w.Baking || w.Passed) && p.news(fmt.Sprintf("wave %d", w.Number), state) {
			p.line("", fmt.Sprintf("wave %d (%s) %s", w.Number+1, strings.Join(w.Nodes, ", "), state))
		}
	}
	for i := range r.Nodes {
		p.nodeEvents(r, &r.Nodes[i])
	}
	if r.Paused && p.news("paused", fmt.Sprint(r.Index)) {
		p.line("", fmt.Sprintf("paused%s: %s", paren(r.Why), goesOn(r)))
	}
	if r.Phase == api.PhaseRollingBack && p.news("phase", r.Phase) {
		p.line("", "rolling back"+paren(r.Why))
	}
	if api.Ended(r.Phase) && p.news("ended", r.Outcome) {
		p.line(r.Ended, r.Phase+": "+or(r.Outcome, "no outcome")+paren(r.Why))
	}
}

func (p *Progress) nodeEvents(r *api.Reload, n *api.ReloadNode) {
	if n.JoinedDuring && p.news("joined "+n.NodeID, "yes") {
		p.line("", n.Node+" joined during the reload")
	}
	switch n.State {
	case api.NodeExcluded, api.NodeDown, api.NodeLeft:
		if p.news("state "+n.NodeID, n.State) {
			p.line("", fmt.Sprintf("%s is %s%s", n.Node, n.State, paren(n.Why)))
		}
	}
	for j := range n.Mounts {
		m := &n.Mounts[j]
		if m.Verdict == "" || !p.news("verdict "+n.NodeID+" "+m.Namespace+m.Mount, m.Verdict+m.Cause) {
			continue
		}
		text := fmt.Sprintf("%s %s %s", n.Node, m.Namespace+m.Mount, m.Verdict)
		if now, was := nowAndWas(r, n, m); m.Verdict == api.VerdictSwitched {
			text += fmt.Sprintf(" %s -> %s", was, now)
			if h := switchTime(m); h > 0 {
				text += ", held " + millis(h)
			}
		}
		if m.Cause != "" {
			text += ": " + strings.TrimPrefix(m.Phase+": "+api.Cell(m.Cause), ": ")
		}
		p.line(m.At, text)
	}
}

// news reports whether text is new for the subject, and remembers it.
func (p *Progress) news(subject, text string) bool {
	if p.seen[subject] == text {
		return false
	}
	p.seen[subject] = text
	return true
}

// line prints an event with the cluster's own time of it, blank where the record has none.
func (p *Progress) line(at, text string) {
	stamp := strings.Repeat(" ", 13)
	if t, err := time.Parse(time.RFC3339Nano, at); err == nil {
		stamp = t.UTC().Format("15:04:05.000Z")
	}
	_, _ = fmt.Fprintf(p.w, "%s  %s\n", stamp, text)
}

func names(r *api.Reload) string {
	if len(r.Expected) == 0 {
		return "no node"
	}
	return strings.Join(r.Expected, ", ")
}

func inTime(ms float64) string {
	if ms <= 0 {
		return ""
	}
	return " in " + millis(ms)
}

func paren(why string) string {
	if why == "" {
		return ""
	}
	return " (" + api.Cell(why) + ")"
}

func or(a, b string) string {
	if a != "" {
		return a
	}
	return b
}
