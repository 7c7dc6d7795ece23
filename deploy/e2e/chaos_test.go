//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"rollcall/node/api"
	"rollcall/node/fault"
	"rollcall/node/nodetest/check"
)

// chaos is one run on one cluster: faults one after the other, and reloads whenever, all chosen from one seed.
type chaos struct {
	*cluster
	rng      *rand.Rand
	builds   map[bool]string // the binary, before and after an upgrade
	upgraded bool

	broken   int      // how often it did not return in time
	asked    []string // reloads since the last fault
	accepted map[string]bool
	// decided are the pauses of reloads that the test has answered as their operator.
	decided map[string]bool
	tally   *tally
	before  map[string]holdings // what every node held before the first fault
	rec     *check.Recorder
}

// campaign is the length and the seed that the environment gives.
func campaign(t *testing.T, standard time.Duration) (time.Duration, uint64) {
	t.Helper()
	length, seed := standard, rand.Uint64()
	var err error
	if v := os.Getenv("ROLLCALL_CHAOS"); v != "" {
		if length, err = time.ParseDuration(v); err != nil {
			t.Fatal(err)
		}
	}
	if v := os.Getenv("ROLLCALL_SEED"); v != "" {
		if seed, err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("repeat the choices of this run: ROLLCALL_SEED=%d ROLLCALL_CHAOS=%s", seed, length)
	return length, seed
}

// TestChaosLosesNothingAndEveryReloadEnds makes every kind of fault, on three nodes and then on five, while clients read
// and write and reloads run. ROLLCALL_CHAOS says for how long in all, ROLLCALL_NODES on one size alone, ROLLCALL_SEED repeats
// a run's choices.
func TestChaosLosesNothingAndEveryReloadEnds(t *testing.T) {
	length, seed := campaign(t, 2*time.Minute)
	sum := &tally{began: time.Now(), seed: seed, kinds: map[string]*kindTally{}, outcomes: map[string]int{}}
	deck := newDeck(rand.New(rand.NewPCG(seed, 0)), faults()) //nolint:gosec // not for secrets
	sizes := []int{3, 5}
	if os.Getenv("ROLLCALL_NODES") != "" {
		sizes = []int{amount(t, "ROLLCALL_NODES", 3)}
	}
	for _, nodes := range sizes {
		t.Run(fmt.Sprintf("%d nodes", nodes), func(t *testing.T) {
			runChaos(t, nodes, length/time.Duration(len(sizes)), deck, sum)
		})
		if t.Failed() {
			break
		}
	}
	t.Log("\n" + sum.String())
}

func runChaos(t *testing.T, nodes int, length time.Duration, deck *deck, sum *tally) {
	x := newChaos(t, nodes, deck.rng, sum)
	l := startLoad(x.cluster, loadOptions{
		mount: "kv", writers: 12, hot: 3, readers: 24, pace: 15 * time.Millisecond, readPace: 10 * time.Millisecond,
		patience: 5 * time.Second, rec: x.rec, excused: func(*server) bool { return true },
	})
	began := time.Now()
	for time.Since(began) < length && x.broken < 3 {
		x.step(deck)
	}
	sum.loaded += time.Since(began)
	l.atLeast(20)
	s := l.stop()
	t.Logf("%d nodes: %s", nodes, s)
	sum.load.add(s)
	sum.clusters = append(sum.clusters, fmt.Sprint(nodes))
	if s.lost+s.backwards+s.staleReads > 0 {
		t.Errorf("%s\n%s", s, strings.Join(s.trouble, "\n"))
	}
	if rate := float64(s.answers()) / time.Since(began).Seconds(); rate < 200 {
		t.Errorf("%.0f operations a second are not the load that was meant: at least 200", rate)
	}
	x.judge()
	x.sameAs(x.before)
}

// newChaos starts a cluster whose nodes have networks, disks and clocks of their own. Small logs make snapshots travel.
func newChaos(t *testing.T, nodes int, rng *rand.Rand, sum *tally) *chaos {
	t.Helper()
	x := &chaos{rng: rng, builds: map[bool]string{}, accepted: map[string]bool{}, decided: map[string]bool{}, tally: sum, rec: check.NewRecorder()}
	x.rec.Describe(func(m *check.Meta) {
		m.Suite, m.Seed = "chaos on processes", sum.seed
		m.Command = fmt.Sprintf("ROLLCALL_SEED=%d go test -tags=e2e -run TestChaosLoses ./deploy/e2e/", sum.seed)
	})
	for upgraded, version := range map[bool]string{false: "", true: "0.1.1-next"} {
		bin, err := skewed(version)
		if err != nil {
			t.Fatal(err)
		}
		x.builds[upgraded] = bin
	}
	x.cluster = newCluster(t, options{nodes: nodes, founders: nodes, apart: true, disk: "128m", idle: true, config: map[string]any{
		"autopilot.stabilization": "1s", "http.idle_timeout": "20s", "raft.snapshot_threshold": 256, "raft.snapshot_interval": "2s", "raft.trailing_logs": 256,
	}})
	// A vote or a term that could not be made durable ends the process, and Raft's way to do that is a panic.
	x.foretold = []string{"panic: failed to save current term: input/output error"}
	for _, s := range x.nodes {
		s.bin, s.env = x.builds[false], []string{clockVariable + "=" + filepath.Join(s.dir, "clock")}
		s.start()
	}
	x.serving()
	x.mountKV(kvOld)
	x.reload(x.nodes[0], api.ReloadRequest{Plugin: "kv", Version: kvNew}) // connections that a reload makes are no leak
	x.before = x.rest()
	return x
}

// judge has the checker look at the whole history.
func (x *chaos) judge() {
	x.t.Helper()
	run := x.rec.Run()
	report := check.Check(run)
	x.t.Log(report)
	x.tally.checked += report.OK
	x.tally.violations += len(report.Violations)
	if err := report.Err(); err != nil {
		x.t.Error(err)
		if err := run.Save(x.path("history")); err != nil {
			x.t.Error(err)
		}
	}
}

// deck deals faults: every kind comes before any comes again.
type deck struct {
	rng  *rand.Rand
	all  []trouble
	left []trouble
}

func newDeck(rng *rand.Rand, all []trouble) *deck { return &deck{rng: rng, all: all} }

func (d *deck) deal() trouble {
	if len(d.left) == 0 {
		d.left = slices.Clone(d.all)
		d.rng.Shuffle(len(d.left), func(i, j int) { d.left[i], d.left[j] = d.left[j], d.left[i] })
	}
	f := d.left[0]
	d.left = d.left[1:]
	return f
}

// step makes as many faults at once as a cluster of this size outlives, takes them back, and waits until every node
// serves the wanted generation and every reload has ended.
func (x *chaos) step(deck *deck) {
	victims := x.rng.Perm(len(x.nodes))
	if x.rng.IntN(5) < 2 { // more often than by chance, the leader
		leader := x.leader().index
		at := slices.Index(victims, leader)
		victims[0], victims[at] = victims[at], victims[0]
	}
	x.ask()
	x.sleep(500)
	var undo, healed []func()
	var made []*kindTally
	hold := time.Duration(0)
	dies := map[*server]bool{}
	for n := range (len(x.nodes) - 1) / 2 {
		f := deck.deal()
		if f.all && n > 0 {
			deck.left = append([]trouble{f}, deck.left...) // it comes first at the next step
			break
		}
		v := x.nodes[victims[n]]
		k := x.tally.kind(f.kind)
		leads := x.leads(v)
		healed = append(healed, x.rec.Fault(f.kind, v.name, ""))
		x.note("%s: %s (leads: %t)", f.kind, v.name, leads)
		if back := f.do(x, v); back != nil {
			undo = append(undo, back)
		}
		k.done++
		if leads {
			k.leader++
		}
		made = append(made, k)
		dies[v] = f.dies
		hold = max(hold, pick(x.rng, f.hold))
		if f.all {
			break
		}
	}
	x.ask()
	time.Sleep(hold)
	for _, back := range slices.Backward(undo) {
		back()
	}
	x.revive(dies)
	for _, mark := range healed {
		mark()
	}
	x.converge(made)
}

// leads tells whether a node says that it leads.
func (x *chaos) leads(v *server) bool {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	l, err := v.client().Leader(ctx)
	return err == nil && l.IsSelf
}

// revive starts nodes that have ended by themselves, which only those may whose fault allows it.
func (x *chaos) revive(dies map[*server]bool) {
	for _, s := range x.nodes {
		if !s.ended() {
			continue
		}
		err := s.gone(time.Second)
		if !dies[s] {
			x.t.Errorf("%s has ended by itself: %v\n%s", s.name, err, tail(s.logFile, 15))
		}
		x.note("%s has ended: %v; it is started again", s.name, err)
		s.start()
	}
}

// converge waits until everything is as it should be without faults.
func (x *chaos) converge(made []*kindTally) {
	healed := time.Now()
	whole := func() error {
		if err := x.settled(x.nodes...); err != nil {
			return err
		}
		return x.over()
	}
	if err := within(recovery, whole); err != nil {
		x.broken++ // one run may tell of more than one thing
		x.t.Errorf("%s after everything was healed: %v", recovery, err)
		until(x.t, long, "every node serves after all", func() error { return x.settled(x.nodes...) })
	}
	took := time.Since(healed)
	x.note("healed; every node serves and every reload has ended %s later", took.Round(time.Millisecond))
	x.tally.slowest = max(x.tally.slowest, took)
	for _, k := range made {
		k.slowest = max(k.slowest, took)
	}
	for _, id := range x.asked {
		op := x.rec.Invoke(check.Op{Kind: check.Status, Key: id})
		if rec, err := x.any().ReloadRecord(timeout(x.t, short), id, 0, 0); err == nil {
			op.Outcome, op.Output = check.OK, rec.Phase
			x.rec.Complete(op)
			x.tally.ended++
			x.tally.outcomes[rec.Outcome]++
			x.sameEverywhere(id)
		}
	}
	x.asked = nil
}

// over says which reload has not ended. One that nobody acknowledged may not exist.
func (x *chaos) over() error {
	for _, id := range x.asked {
		rec, err := x.any().ReloadRecord(timeout(x.t, short), id, 0, 0)
		if fault.Is(err, fault.NotFound) && !x.accepted[id] {
			continue
		}
		if err != nil {
			return fmt.Errorf("reload %s (acknowledged: %t): %w", id, x.accepted[id], err)
		}
		if rec.Paused {
			x.decide(rec)
		}
		// One that was rolled back is owed nothing any more: the rollback has a record of its own.
		if !api.Ended(rec.Phase) || len(rec.Pending) > 0 && rec.Outcome != api.OutcomeRolledBack {
			return fmt.Errorf("not over:\n%s", tell(rec))
		}
	}
	return nil
}

// decide is the operator of a reload that waits for one: a gate that could not hear every node of its wave pauses.
func (x *chaos) decide(rec *api.Reload) {
	if x.decided[rec.ID+rec.Why] {
		return
	}
	x.decided[rec.ID+rec.Why] = true
	action := []string{"promote", "abort"}[rec.ID[len(rec.ID)-1]%2] // for half of the ids, always the same
	_, err := x.any().ControlReload(timeout(x.t, short), rec.ID, action, "nobody waits in this test")
	x.note("%s %s, which was paused: %s (%v)", action, rec.ID, rec.Why, err)
}

func (x *chaos) sleep(milliseconds int) {
	time.Sleep(time.Duration(x.rng.IntN(milliseconds)) * time.Millisecond)
}

// note writes into the test's log, which is the journal of the run.
func (x *chaos) note(format string, args ...any) {
	x.t.Logf("%7.1fs  %s", time.Since(x.tally.began).Seconds(), fmt.Sprintf(format, args...))
}

// ask starts a reload through some node, or does not get it through; its id decides whether it was accepted.
func (x *chaos) ask() {
	req := api.ReloadRequest{Plugin: "kv", ReloadID: fmt.Sprintf("chaos-%d", x.tally.asked), Scope: "global"}
	switch x.rng.IntN(5) {
	case 0:
		req.Version = kvOld
	case 1:
		req.Version = kvNew
	case 2:
		req.Strategy = "best-effort"
	case 3:
		req.Strategy = "rolling"
	case 4:
		req.Scope = ""
		req.Wait = "0s"
	}
	x.tally.asked++
	asked := x.nodes[x.rng.IntN(len(x.nodes))]
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	body, err := json.Marshal(req)
	if err != nil {
		x.t.Fatal(err)
	}
	op := x.rec.Invoke(check.Op{Kind: check.Start, Node: asked.name, Key: req.ReloadID, Input: string(body)})
	out, _, err := asked.client().Reload(ctx, "", req)
	op.Outcome = check.Unknown
	if err == nil {
		op.Outcome, op.Output = check.OK, out.ReloadID
	} else {
		op.Cause = err.Error()
	}
	x.rec.Complete(op)
	x.asked = append(x.asked, req.ReloadID)
	x.accepted[req.ReloadID] = err == nil
}
