package fsm

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/proto"

	commandv1 "rollcall/proto/command/v1"
)

// TestTranscripts plays the scenarios of testdata. Each line under "log" is one entry of the log; what it answered and
// what it changed is recorded below it. Rewrite with -rewrite, and review the difference.
func TestTranscripts(t *testing.T) {
	datadriven.Walk(t, "testdata/transcripts", func(t *testing.T, path string) {
		w := newWorld(t)
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			w.t = t
			switch d.Cmd {
			case "log":
				return w.play(d.Input)
			case "show":
				return w.show(d.Input)
			default:
				t.Fatalf("%s: unknown directive %q", d.Pos, d.Cmd)
				return ""
			}
		})
	})
}

// world is one state machine with a log that people can write.
type world struct {
	t     testing.TB
	f     *FSM
	index uint64
	term  uint64
	last  map[string]string
	log   [][]byte
}

func newWorld(t testing.TB) *world {
	return &world{t: t, f: New(), term: 1, last: map[string]string{}}
}

func (w *world) apply(c *commandv1.Command) *commandv1.Result {
	b, err := proto.Marshal(c)
	if err != nil {
		w.t.Fatal(err)
	}
	w.index++
	w.log = append(w.log, b)
	return w.f.Apply(&raft.Log{Index: w.index, Term: w.term, Type: raft.LogCommand, Data: b}).(*commandv1.Result)
}

// play applies each line and tells what came of it; in the end the state must survive a snapshot.
func (w *world) play(input string) string {
	var out strings.Builder
	for line := range strings.Lines(input) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		if rest, ok := strings.CutPrefix(line, "term "); ok {
			n, err := strconv.ParseUint(rest, 10, 64)
			if err != nil {
				w.t.Fatal(err)
			}
			w.term = n
			continue
		}
		res := w.apply(w.parse(line))
		fmt.Fprintf(&out, "%d %s: %s\n", res.GetIndex(), line, resultLine(res))
		for _, c := range w.changes() {
			fmt.Fprintf(&out, "    %s\n", c)
		}
	}
	checkRestores(w.t, w.f)
	return out.String()
}

func resultLine(r *commandv1.Result) string {
	s := "ok"
	if r.GetFaultKind() != "" {
		s = r.GetFaultKind() + ": " + r.GetFaultText()
	}
	if r.GetRepeated() {
		s += " (repeated)"
	}
	if r.GetId() != "" {
		s += " id=" + r.GetId()
	}
	for _, x := range r.GetWarnings() {
		s += " warning=" + strconv.Quote(x)
	}
	return s
}

// snapshotBytes is the state as Persist writes it.
func snapshotBytes(t testing.TB, f *FSM) []byte {
	var b bytes.Buffer
	if err := f.View().WriteSnapshot(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func checkRestores(t testing.TB, f *FSM) {
	want := snapshotBytes(t, f)
	g := New()
	if err := g.Restore(readCloser{bytes.NewReader(want)}); err != nil {
		t.Fatalf("restore: %v", err)
	}
	if got := snapshotBytes(t, g); !bytes.Equal(got, want) {
		t.Fatal("the snapshot of a restored state differs from the one that it was restored from")
	}
	if a, b := derived(f.View().s), derived(g.View().s); a != b {
		t.Fatalf("what is derived differs after a restore:\n%s\nbefore:\n%s", b, a)
	}
}

type readCloser struct{ *bytes.Reader }

func (readCloser) Close() error { return nil }

// derived prints every table that is not in the snapshot.
func derived(s *state) string {
	var b strings.Builder
	for _, t := range []struct {
		name string
		t    *table[string]
	}{
		{"nodeNames", &s.nodeNames},
		{"paths", &s.paths},
		{"connections", &s.connections},
		{"reloadSeq", &s.reloadSeq},
		{"open", &s.open},
		{"active", &s.active},
		{"idSeq", &s.idSeq},
		{"accessors", &s.accessors},
		{"children", &s.children},
		{"leaseMounts", &s.leaseMounts},
		{"leaseTokens", &s.leaseTokens},
		{"expiry", &s.expiry},
	} {
		t.t.Scan(func(k, v string) bool {
			fmt.Fprintf(&b, "%s %q=%q\n", t.name, k, v)
			return true
		})
	}
	return b.String()
}

// changes are the records that differ from the last time, in a line or a few each.
func (w *world) changes() []string {
	now := map[string]string{}
	v := w.f.View()
	for _, m := range v.Mounts() {
		now["1 "+m.GetUuid()] = mountLine(v, m)
	}
	for _, r := range v.Reloads() {
		now["2 "+r.GetId()] = reloadLines(r)
	}
	for _, n := range v.Nodes() {
		now["0 "+n.GetId()] = nodeLine(n)
	}
	var keys []string
	for k := range now {
		if now[k] != w.last[k] {
			keys = append(keys, k)
		}
	}
	for k := range w.last {
		if _, ok := now[k]; !ok {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	var out []string
	for _, k := range keys {
		text, ok := now[k]
		if !ok {
			text = k[2:] + " is gone"
		}
		out = append(out, strings.Split(text, "\n")...)
	}
	w.last = now
	return out
}

func nodeLine(n *commandv1.Node) string {
	s := fmt.Sprintf("node %s incarnation %d", n.GetName(), n.GetIncarnation())
	if n.GetFenceIndex() > 0 {
		s += fmt.Sprintf(" fenced at %d", n.GetFenceIndex())
	}
	if n.GetLeft() {
		s += " left"
	}
	return s
}

func wantedText(w *commandv1.Wanted) string {
	s := fmt.Sprintf("%s at %d", versionOf(w.GetSpec()), w.GetGeneration())
	if w.GetFreshSince() != w.GetGeneration() {
		s += fmt.Sprintf(" (fresh since %d)", w.GetFreshSince())
	}
	return s
}

func versionOf(s *commandv1.Spec) string {
	if s.GetVersion() == "" {
		return "unversioned"
	}
	return s.GetVersion()
}

func mountLine(v *View, m *commandv1.Mount) string {
	s := fmt.Sprintf("mount %s%s wants %s", m.GetNamespace(), displayPath(m), wantedText(m.GetWanted()))
	if m.GetConfiguredVersion() != "" {
		s += ", configured " + m.GetConfiguredVersion()
	}
	if m.GetPrevious() != nil {
		s += ", before " + wantedText(m.GetPrevious())
	}
	for _, o := range m.GetOverrides() {
		why := strings.ToLower(strings.TrimPrefix(o.GetWhy().String(), "WHY_"))
		s += fmt.Sprintf(", %s %s: %s", o.GetNodeId(), why, wantedText(o.GetWanted()))
	}
	if m.GetEpoch() > 0 {
		s += fmt.Sprintf(", epoch %d of term %d for %d", m.GetEpoch(), m.GetEpochTerm(), m.GetEpochGeneration())
	}
	if n := len(v.StorageList(m.GetUuid(), "")); n > 0 {
		s += fmt.Sprintf(", %d keys", n)
	}
	return s
}

func reloadLines(r *commandv1.Reload) string {
	s := fmt.Sprintf("reload %s %s", r.GetId(), lower(r.GetPhase().String(), "PHASE_"))
	if len(r.GetWaves()) > 0 {
		s += fmt.Sprintf(" wave %d/%d", r.GetWave()+1, len(r.GetWaves()))
		if w := currentWave(r); w.GetBakeFromNs() > 0 {
			s += " baking"
			if w.GetWhy() != "" {
				s += " (" + w.GetWhy() + ")"
			}
		}
	}
	if r.GetPaused() {
		s += " paused"
	}
	if r.GetGeneration() > 0 {
		s += fmt.Sprintf(" generation %d", r.GetGeneration())
	}
	for _, x := range [][2]string{
		{"outcome", r.GetOutcome()},
		{"why", r.GetWhy()},
		{"rolls back", r.GetRollsBack()},
		{"rolled back by", r.GetRolledBackBy()},
		{"aliases", strings.Join(r.GetAliases(), " ")},
		{"unconfirmed", strings.Join(r.GetUnconfirmed(), " ")},
	} {
		if x[1] != "" {
			s += fmt.Sprintf(", %s: %s", x[0], x[1])
		}
	}
	for _, t := range r.GetTargets() {
		s += fmt.Sprintf("\n  %s %s -> %s", targetPath(r, t.GetMountUuid()), versionOf(t.GetFrom()), versionOf(t.GetTo()))
		if t.GetUnmounted() {
			s += " unmounted"
		}
	}
	for _, p := range r.GetParticipants() {
		s += "\n  " + p.GetName()
		if len(r.GetWaves()) > 0 {
			s += fmt.Sprintf(" in wave %d", p.GetWave()+1)
		}
		if p.GetIncarnation() > 1 {
			s += fmt.Sprintf(" incarnation %d", p.GetIncarnation())
		}
		if p.GetJoinedDuring() {
			s += " joined"
		}
		if p.GetSafe() != 0 {
			s += " safe:" + lower(p.GetSafe().String(), "SAFE_")
		}
		for _, o := range p.GetMounts() {
			s += " " + outcomeText(r, o)
		}
		if p.GetWhy() != "" {
			s += " (" + p.GetWhy() + ")"
		}
	}
	return s
}

func outcomeText(r *commandv1.Reload, o *commandv1.MountOutcome) string {
	s := "-"
	switch {
	case o.GetVerdict() != 0:
		s = lower(o.GetVerdict().String(), "VERDICT_")
	case o.GetSafe():
		s = "safe"
	case o.GetPrepared():
		s = "prepared"
	}
	if len(r.GetTargets()) > 1 {
		s = targetPath(r, o.GetMountUuid()) + "=" + s
	}
	return s
}

func lower(s, prefix string) string {
	return strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(s, prefix)), "_", " ")
}

// show answers questions about the state, a line each.
func (w *world) show(input string) string {
	v := w.f.View()
	var out strings.Builder
	for line := range strings.Lines(input) {
		f := strings.Fields(line)
		switch f[0] {
		case "get":
			e := v.StorageGet(w.mountUUID(f[1]), f[2])
			fmt.Fprintf(&out, "%q at %d\n", e.GetValue(), e.GetIndex())
		case "list":
			prefix := ""
			if len(f) > 2 {
				prefix = f[2]
			}
			fmt.Fprintln(&out, v.StorageList(w.mountUUID(f[1]), prefix))
		case "wanted":
			fmt.Fprintln(&out, wantedText(v.Wanted(v.Mount(w.mountUUID(f[1])), f[2])))
		case "resolve":
			version := ""
			if len(f) > 3 {
				version = f[3]
			}
			spec, err := v.ResolveSpec(f[1], f[2], version)
			fmt.Fprintln(&out, versionOf(spec), err)
		case "for":
			m, rest := v.MountFor("", f[1])
			fmt.Fprintf(&out, "%q %q\n", m.GetPath(), rest)
		case "ids":
			for i := 1; i < len(f); i++ {
				row := v.ReloadID(f[i])
				fmt.Fprintf(&out, "%s first=%q outcome=%q detail=%v\n", f[i], row.GetFirstId(), row.GetOutcome(), v.Reload(f[i]) != nil)
			}
		case "reloads":
			for _, r := range v.Reloads() {
				fmt.Fprintf(&out, "%s %s\n", r.GetId(), lower(r.GetPhase().String(), "PHASE_"))
			}
		case "active":
			fmt.Fprintln(&out, v.ActiveReload(w.mountUUID(f[1])).GetId())
		case "tokens":
			for _, t := range v.Tokens() {
				fmt.Fprintf(&out, "%s policies=%v expires=%v\n", t.GetAccessor(), t.GetPolicies(), time.Duration(t.GetExpiresClockNs()))
			}
		case "leases":
			for _, l := range v.Leases("") {
				fmt.Fprintf(&out, "%s expires=%v\n", l.GetId(), time.Duration(l.GetExpiresClockNs()))
			}
		case "expired":
			tokens, leases := v.Expired(v.ClockNS(), 100)
			fmt.Fprintf(&out, "%d tokens, %d leases; next %v\n", len(tokens), len(leases), time.Duration(v.NextExpiry()))
		case "keyterm":
			term, ms := v.KeyTerm()
			fmt.Fprintf(&out, "%d since %v\n", term, time.Duration(ms)*time.Millisecond)
		case "clock":
			fmt.Fprintln(&out, time.Duration(v.ClockNS()))
		case "namespaces":
			for _, n := range v.Namespaces() {
				fmt.Fprintln(&out, n.GetPath())
			}
		default:
			w.t.Fatalf("show %q?", line)
		}
	}
	return out.String()
}

// mountUUID makes up ids that people can read: the mount's path at the time it was made.
func (w *world) mountUUID(path string) string {
	if m := w.f.View().MountNamed("", path); m != nil {
		return m.GetUuid()
	}
	return "uuid-of-" + path
}

// args are the words of a line: positional ones, key=value ones, and flags. A value may be quoted.
type args struct {
	t    testing.TB
	pos  []string
	opts map[string]string
}

func parseArgs(t testing.TB, line string) args {
	a := args{t: t, opts: map[string]string{}}
	var words []string
	word, quoted := "", false
	for _, c := range line {
		switch {
		case c == '"':
			quoted = !quoted
		case c == ' ' && !quoted:
			if word != "" {
				words = append(words, word)
			}
			word = ""
		default:
			word += string(c)
		}
	}
	if word != "" {
		words = append(words, word)
	}
	for _, x := range words {
		if k, v, ok := strings.Cut(x, "="); ok {
			a.opts[k] = v
		} else {
			a.pos = append(a.pos, x)
		}
	}
	return a
}

func (a args) at(i int) string {
	if i < len(a.pos) {
		return a.pos[i]
	}
	return ""
}

func (a args) str(k, def string) string {
	if v, ok := a.opts[k]; ok {
		return v
	}
	return def
}

func (a args) num(k string, def uint64) uint64 {
	v, ok := a.opts[k]
	if !ok {
		return def
	}
	n, err := strconv.ParseUint(v, 10, 64)
	if err != nil {
		a.t.Fatal(err)
	}
	return n
}

func (a args) dur(k string) time.Duration {
	v, ok := a.opts[k]
	if !ok {
		return 0
	}
	d, err := time.ParseDuration(v)
	if err != nil {
		a.t.Fatal(err)
	}
	return d
}

func (a args) has(flag string) bool { return slices.Contains(a.pos, flag) }

func (a args) list(k string) []string {
	if v := a.opts[k]; v != "" {
		return strings.Split(v, ",")
	}
	return nil
}

func sum(s string) string {
	h := sha256.Sum256([]byte(s))
	return hex.EncodeToString(h[:])
}
