package check

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"testing"
	"time"
)

// maker makes histories of a cluster that does everything right: three nodes, the followers a little behind, a mount that
// is reloaded, a leader that is killed once, and clients of every kind.
type maker struct {
	*rand.Rand
	rec    *Recorder
	t      int64 // the time of the next thing that happens
	index  uint64
	term   uint64
	leader int
	boot   [3]uint64
	run    *Run
	lag    [3]int64 // how far behind a node applies
	swaps  [3][]timed
	pid    int
	pids   [3]int
	ids    uint64
}

const (
	ms      = int64(time.Millisecond)
	mount   = "kv/"
	mountID = "uuid-kv"
)

func nodeName(i int) string { return "node-" + strconv.Itoa(i+1) }

func (m *maker) step() int64 {
	m.t += ms/10 + m.Int64N(2*ms)
	return m.t
}

func (m *maker) event(node int, at int64, e Event) {
	e.Node, e.Boot, e.At = nodeName(node), m.boot[node], at
	m.run.Events = append(m.run.Events, e)
}

// op adds a call that takes effect at the time at, and returns at least as late as until.
func (m *maker) op(node int, at, until int64, op Op) {
	m.ids++
	op.ID, op.Client, op.Node = m.ids, int(m.ids%8), nodeName(node)
	op.Call, op.Return = at-1-m.Int64N(3*ms), max(at, until)+1+m.Int64N(3*ms)
	op.Outcome = cmp.Or(op.Outcome, OK)
	op.Call = max(op.Call, 1)
	m.run.Ops = append(m.run.Ops, op)
}

// applied is when node applies what is committed at the time at.
func (m *maker) applied(node int, at int64) int64 {
	if node == m.leader {
		return at
	}
	return at + m.lag[node]
}

// sum is what a digest of the state at index is.
func sum(index uint64) string { return fmt.Sprintf("%064x", index*0x9e3779b97f4a7c15) }

func (m *maker) entry(at int64) uint64 {
	m.index++
	if m.index%DigestEvery == 0 {
		for n := range 3 {
			m.event(n, m.applied(n, at), Event{Kind: Digest, Index: m.index, Term: m.term, Hash: sum(m.index)})
		}
	}
	return m.index
}

func (m *maker) everyNode(at int64, e Event) {
	for n := range 3 {
		m.event(n, m.applied(n, at), e)
	}
}

func (m *maker) start(node int, sha string, at int64) {
	m.pid++
	m.pids[node] = m.pid
	m.event(node, at, Event{Kind: Exec, PID: m.pid, SHA256: sha, Key: "secret/kv"})
}

// generation is what node serves at the time at.
func (m *maker) generation(node int, at int64) uint64 {
	return uint64(lastBefore(m.swaps[node], at, 0))
}

func (m *maker) swap(node int, at int64, reload string, generation uint64, sha string) {
	old, before := m.generation(node, at), m.pids[node]
	m.start(node, sha, at-ms)
	m.event(node, at, Event{Kind: Swap, Reload: reload, Mount: mount, MountID: mountID, Generation: generation, Old: old, PID: m.pids[node]})
	m.swaps[node] = append(m.swaps[node], timed{at, int64(generation)})
	if before != 0 {
		m.event(node, at+ms, Event{Kind: Exit, PID: before, Cause: "asked"})
	}
}

// valid makes a history of a good run with about n operations.
func valid(seed uint64, n int) *Run {
	m := &maker{Rand: rand.New(rand.NewPCG(seed, 5)), rec: NewRecorder(), t: 100 * ms, run: &Run{}, boot: [3]uint64{1, 1, 1}}
	m.run.Meta = Meta{Suite: "valid", Seed: seed, Nodes: []string{nodeName(0), nodeName(1), nodeName(2)}}
	m.lag = [3]int64{0, m.Int64N(5 * ms), m.Int64N(20 * ms)}
	for i := range 3 {
		m.event(i, m.step(), Event{Kind: Boot, NodeID: "id-" + nodeName(i)})
	}
	m.term = 2
	m.event(0, m.step(), Event{Kind: Leader, Term: m.term})
	m.catalogRow("secret/kv/v1", "sha-0")
	at := m.step()
	generation := m.entry(at)
	m.everyNode(at, Event{Kind: Wanted, Index: generation, MountID: mountID, Mount: mount, Generation: generation, SHA256: "sha-0"})
	for i := range 3 {
		m.swap(i, m.applied(i, at)+5*ms, "", generation, "sha-0")
	}
	m.t += 50 * ms
	data := &stored{m: m, values: map[string][]change{}}
	const parts = 4
	for part := range parts {
		for range n / parts {
			data.step()
		}
		m.reload(part, data)
		m.rows(part)
		if part == 1 {
			m.kill()
		}
	}
	m.run.Faults = append(m.run.Faults, Fault{Kind: "pause", Target: nodeName(0), From: m.t, To: m.t + 1})
	m.t += 200 * ms
	data.finals()
	for i := range 3 {
		at := m.step()
		g := m.generation(i, at)
		m.event(i, at, Event{Kind: Running, Mount: mount, Generation: g, Want: g, SHA256: "sha-" + strconv.FormatUint(g, 10), PID: m.pids[i]})
		m.event(i, at, Event{Kind: Processes, N: 1, Limit: 2, Cause: "one mount"})
	}
	m.run.Meta.Ended = m.step()
	sortRun(m.run)
	return m.run
}

// change is one change of a key: when each node has applied it.
type change struct {
	value string
	seen  [3]int64
}

// stored is what the plugin holds.
type stored struct {
	m      *maker
	values map[string][]change
	tries  int
	adds   []change
}

func (s *stored) put(key, value string, at int64) change {
	c := change{value: value}
	for n := range 3 {
		c.seen[n] = s.m.applied(n, at)
	}
	s.values[key] = append(s.values[key], c)
	return c
}

// at is the value that node shows at a time.
func (s *stored) at(key string, node int, at int64) string {
	for _, c := range slices.Backward(s.values[key]) {
		if c.seen[node] <= at {
			return c.value
		}
	}
	return ""
}

func (s *stored) count(node int, at int64) string {
	n := len(s.adds)
	for n > 0 && s.adds[n-1].seen[node] > at {
		n--
	}
	if n == 0 {
		return ""
	}
	return strconv.Itoa(n)
}

func (s *stored) step() {
	m := s.m
	at, asked, key := m.step(), m.IntN(3), "k"+strconv.Itoa(m.IntN(4))
	by := m.leader
	outcome := OK
	switch k := m.IntN(20); {
	case k < 8:
		s.tries++
		value := strconv.Itoa(s.tries)
		m.entry(at)
		c := s.put(key, value, at)
		m.event(by, at, Event{Kind: Handled, Mount: mount, Key: key, Input: value})
		m.op(asked, at, c.seen[asked], Op{Kind: Write, Mount: mount, Key: key, Input: value, By: nodeName(by), Generation: m.generation(by, at), Index: m.index, Outcome: outcome})
	case k < 11:
		m.entry(at)
		c := change{}
		for n := range 3 {
			c.seen[n] = m.applied(n, at)
		}
		s.adds = append(s.adds, c)
		m.op(asked, at, c.seen[asked], Op{Kind: Add, Mount: mount, Key: "hot", Input: "1", By: nodeName(by), Generation: m.generation(by, at), Index: m.index})
	case k < 12:
		m.entry(at)
		c := s.put(key, "", at)
		m.op(asked, at, c.seen[asked], Op{Kind: Delete, Mount: mount, Key: key, By: nodeName(by), Generation: m.generation(by, at), Index: m.index})
	case k < 14:
		m.op(asked, at, at, Op{Kind: Read, Mount: mount, Key: "hot", Output: s.count(asked, at), By: nodeName(asked), Generation: m.generation(asked, at), Index: m.index})
	default:
		m.op(asked, at, at, Op{Kind: Read, Mount: mount, Key: key, Output: s.at(key, asked, at), By: nodeName(asked), Generation: m.generation(asked, at), Index: m.index})
	}
}

func (s *stored) finals() {
	for n := range 3 {
		for i := range 4 {
			key, at := "k"+strconv.Itoa(i), s.m.step()
			s.m.op(n, at, at, Op{Kind: Final, Mount: mount, Key: key, Output: s.at(key, n, at), By: nodeName(n), Generation: s.m.generation(n, at)})
		}
		at := s.m.step()
		s.m.op(n, at, at, Op{Kind: Final, Mount: mount, Key: "hot", Output: s.count(n, at), By: nodeName(n), Generation: s.m.generation(n, at)})
	}
}

// reload makes one that is done and one that is aborted, with clients that ask for both and look at them.
func (m *maker) reload(part int, data *stored) {
	id, body := "reload-"+strconv.Itoa(part), "all to v"+strconv.Itoa(part)
	status := func(id, phase string) {
		at := m.step()
		m.op(m.IntN(3), at, at, Op{Kind: Status, Key: id, Output: phase})
	}
	phase := func(id, phase string, generation uint64) int64 {
		at := m.step()
		m.everyNode(at, Event{Kind: Applied, Index: m.entry(at), Reload: id, Phase: phase, Generation: generation})
		return at
	}
	begin := func(id, body string) {
		status(id, "")
		at := phase(id, "preparing", 0)
		m.op(m.IntN(3), at, at, Op{Kind: Start, Key: id, Input: body, Output: id, Status: 202})
		at = m.step()
		m.op(m.IntN(3), at, at, Op{Kind: Start, Key: id, Input: body, Output: id, Status: 202})
		status(id, "preparing")
		at = m.step()
		m.op(m.IntN(3), at, at, Op{Kind: Start, Key: id, Input: body + " and more", Outcome: Failed, Refused: true, Status: 409})
		status(id, "preparing")
	}
	bad := id + "-bad"
	begin(bad, body+" badly")
	phase(bad, "aborted", 0)
	status(bad, "aborted")
	status(bad, "aborted")

	begin(id, body)
	data.step()
	at := m.step()
	generation := m.index + 1
	m.entry(at)
	sha := "sha-" + strconv.FormatUint(generation, 10)
	m.everyNode(at, Event{Kind: Applied, Index: generation, Reload: id, Phase: "committed", Generation: generation})
	m.everyNode(at, Event{Kind: Wanted, Index: generation, MountID: mountID, Mount: mount, Generation: generation, SHA256: sha, Reload: id})
	status(id, "committed")
	last := at
	for n := range 3 {
		at := m.applied(n, at) + 3*ms + m.Int64N(5*ms)
		m.swap(n, at, id, generation, sha)
		last = max(last, at)
	}
	for range 5 {
		data.step()
	}
	m.t = max(m.t, last+30*ms)
	at = m.step()
	for n := range 3 {
		m.everyNode(at, Event{Kind: Verdict, Index: m.entry(at), Reload: id, Of: "id-" + nodeName(n), MountID: mountID, Phase: "switched"})
	}
	phase(id, "done", generation)
	status(id, "done")
	status(id, "done")
	m.t += 30 * ms
}

func (m *maker) catalogRow(key, sha string) {
	at := m.step()
	m.entry(at)
	m.op(m.IntN(3), at, at, Op{Kind: Register, Key: key, Input: sha})
}

// rows makes catalog and token operations.
func (m *maker) rows(part int) {
	row, token := fmt.Sprintf("secret/row/v%d", part), fmt.Sprintf("token-%d", part)
	sha := ""
	state := "none"
	// Half of the operations have time for themselves, so that what they must answer is certain.
	gap := func() {
		if m.IntN(2) == 0 {
			m.t += 8 * ms
		}
	}
	use := func() {
		gap()
		at, out := m.step(), Denied
		if state == "active" {
			out = Allowed
		}
		m.op(m.IntN(3), at, at, Op{Kind: TokenUse, Key: token, Output: out})
		gap()
	}
	read := func() {
		gap()
		at := m.step()
		m.op(m.IntN(3), at, at, Op{Kind: Catalog, Key: row, Output: sha})
		gap()
	}
	for round := range 3 {
		read()
		sha = fmt.Sprintf("sha-row-%d", round)
		m.catalogRow(row, sha)
		read()
		at := m.step()
		m.op(m.IntN(3), at, at, Op{Kind: Register, Key: row, Input: "another", Outcome: Failed, Refused: true, Status: 400})
		read()
		at = m.step()
		m.entry(at)
		m.op(m.IntN(3), at, at, Op{Kind: Deregister, Key: row})
		sha = ""
		read()
	}
	use()
	at := m.step()
	m.entry(at)
	m.op(m.IntN(3), at, at, Op{Kind: TokenCreate, Key: token})
	state = "active"
	use()
	use()
	at = m.step()
	m.entry(at)
	m.op(m.IntN(3), at, at, Op{Kind: TokenRevoke, Key: token})
	state = "dead"
	use()
	use()
}

// kill ends node 3 and starts it again, while two requests of its clients fail, and then the next term is led by node 2.
func (m *maker) kill() {
	m.t += 30 * ms
	m.run.Faults = append(m.run.Faults, Fault{Kind: "kill", Target: nodeName(2), From: m.t})
	m.event(2, m.step(), Event{Kind: Died})
	at := m.step()
	m.op(2, at, at, Op{Kind: Read, Mount: mount, Key: "k0", Outcome: Failed, Cause: "connection refused"})
	m.op(2, at, at, Op{Kind: Write, Mount: mount, Key: "k1", Input: "never came", Outcome: Unknown, Cause: "broken pipe"})
	m.boot[2]++
	m.pids[2] = 0
	at = m.step()
	m.event(2, at, Event{Kind: Boot, NodeID: "id-" + nodeName(2)})
	m.event(2, at, Event{Kind: Restored, Index: m.index})
	g := m.generation(2, at)
	sha := "sha-" + strconv.FormatUint(g, 10)
	m.event(2, m.step(), Event{Kind: Wanted, Index: m.index, MountID: mountID, Mount: mount, Generation: g, SHA256: sha})
	m.swap(2, m.t+3*ms, "", g, sha)
	m.t += 30 * ms
	m.run.Faults[0].To = m.t
	m.term++
	m.leader = 1
	m.lag = [3]int64{m.Int64N(5 * ms), 0, m.Int64N(20 * ms)}
	m.event(1, m.step(), Event{Kind: Leader, Term: m.term})
	m.t += 30 * ms
}

func TestAGoodHistoryIsAccepted(t *testing.T) {
	for seed := range uint64(60) {
		run := valid(seed, 200)
		report := Check(run)
		if err := report.Err(); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		for _, name := range []string{"I1", "I2", "I3", "I4", "I5", "I6", "I7", "I8", "I9", "I10", "I11", "I12", "I13", "I16", "I17", "I21"} {
			if report.Looked[name] == 0 {
				t.Errorf("seed %d: nothing was looked at for %s", seed, name)
			}
		}
	}
}

// A node answers through another one, loses its disk, and comes back under its name with less: the answer that is passed on after
// that is not the new one's.
func TestAnAnswerThatCameLateIsNotTheNextNodesOfThatName(t *testing.T) {
	answer := func(id, call, back int64, generation uint64) Op {
		return Op{
			ID: uint64(id), Client: int(id), Kind: Read, Node: "n2", By: "n1", Mount: "kv/", Key: "a", Call: call, Return: back,
			Outcome: OK, Generation: generation,
		}
	}
	run := &Run{Events: []Event{
		{Node: "n1", Boot: 1, Seq: 1, At: 1, Kind: Boot, NodeID: "first"}, {Node: "n1", Boot: 2, Seq: 2, At: 100, Kind: Boot, NodeID: "second"},
	}}
	for _, c := range []struct {
		what       string
		call, back int64
		bad        bool
	}{
		{"an answer of the first node that was passed on when the second was there", 50, 150, false},
		{"an answer of the second node", 110, 150, true},
	} {
		run.Ops = []Op{answer(1, c.call, c.back, 103), answer(2, 200, 210, 20)}
		j := &judge{run: run, Report: &Report{Looked: map[string]int{}}}
		if j.order(); len(j.Violations) > 0 != c.bad {
			t.Errorf("%s: %v", c.what, j.Violations)
		}
	}
}

func TestARunIsTheSameAfterItWasSaved(t *testing.T) {
	run := valid(1, 100)
	dir := t.TempDir()
	if err := run.Save(dir); err != nil {
		t.Fatal(err)
	}
	again, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(run.Ops, again.Ops) || !slices.Equal(run.Events, again.Events) || !slices.Equal(run.Faults, again.Faults) {
		t.Error("the run that was read is not the one that was saved")
	}
}

// TestTwoHundredThousandOperationsTakeSeconds says what one CI run's history costs.
func TestTwoHundredThousandOperationsTakeSeconds(t *testing.T) {
	run := valid(1, 200_000)
	began := time.Now()
	report := Check(run)
	took := time.Since(began)
	if err := report.Err(); err != nil {
		t.Fatal(err)
	}
	if t.Logf("%d operations judged in %v", report.Ops, took); took > 20*time.Second {
		t.Errorf("it took %v", took)
	}
}
