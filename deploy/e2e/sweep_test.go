//go:build e2e && failpoints

package e2e

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"rollcall/node/api"
	"rollcall/node/fault"
)

var (
	flagSweep = flag.String("e2e.sweep", "slice", `which cases of the kill sweep: "all", "slice" (a part drawn from -e2e.sweep.seed), or a word in their names`)
	flagSeed  = flag.Uint64("e2e.sweep.seed", 0, "what the slice of the sweep is drawn from; 0 takes a new one, which is printed")
)

// sweepSlice is how many cases a slice has: what fits into a minute.
const sweepSlice = 6

// brittle is rollcall with failpoints, built once a run.
var brittle = sync.OnceValues(func() (string, error) {
	path := filepath.Join(binDir, "rollcall-failpoints")
	return path, build(nil, "go", "build", "-tags=failpoints", "-o", path, "./cmd/rollcall")
})

// killAt is a step of the protocol at which a process kills itself with SIGKILL: a rule of its failpoints.
type killAt struct {
	name   string
	rule   string
	victim string // leader or follower; "" for both, one after the other
}

func (k killAt) String() string { return k.victim + " at " + k.name }

func killsAt(nodes int) []killAt {
	steps := []killAt{
		{name: "received", rule: "reload/received=kill"},
		{name: "proposed", rule: "reload/proposed=kill", victim: "leader"},
		{name: "preparing applied", rule: "reload/preparing-applied=kill"},
		{name: "process started", rule: "process/started=kill,after=reload/preparing-applied"},
		{name: "trial", rule: "reload/trial=kill"},
		{name: "its own prepared report", rule: "reload/prepared-report=kill"},
		{name: "switch proposed", rule: "reload/switch-proposed=kill", victim: "leader"},
		{name: "switch on its disk", rule: "disk/fsync=kill,nth=1,after=reload/switch-proposed", victim: "leader"},
		{name: "switch applied", rule: "reload/switch-applied=kill"},
		{name: "gate closed", rule: "reload/gate-closed=kill"},
		{name: "take-over proposed", rule: "takeover/proposed=kill,after=reload/switch-applied", victim: "leader"},
		{name: "take-over applied", rule: "takeover/applied=kill,after=reload/switch-applied", victim: "leader"},
		{name: "take-over seen", rule: "takeover/seen=kill,after=reload/switch-applied", victim: "follower"},
		{name: "its own switched report", rule: "reload/switched-report=kill"},
		{name: "draining", rule: "reload/draining=kill"},
		{name: "done", rule: "reload/done=kill"},
	}
	for k := range nodes {
		steps = append(steps,
			killAt{name: fmt.Sprintf("prepared report %d", k+1), rule: fmt.Sprintf("reload/prepared-heard=kill,nth=%d", k+1), victim: "leader"},
			killAt{name: fmt.Sprintf("switched report %d", k+1), rule: fmt.Sprintf("reload/switched-heard=kill,nth=%d", k+1), victim: "leader"},
		)
	}
	var out []killAt
	for _, s := range steps {
		for _, victim := range []string{"leader", "follower"} {
			if s.victim == "" || s.victim == victim {
				out = append(out, killAt{s.name, s.rule, victim})
			}
		}
	}
	return out
}

// chosenKills are the cases that the flags choose.
func chosenKills(t *testing.T, nodes int) []killAt {
	t.Helper()
	all := killsAt(nodes)
	switch *flagSweep {
	case "all":
		return all
	case "slice":
		seed, total := *flagSeed, len(all)
		if seed == 0 {
			seed = rand.Uint64N(1 << 32)
		}
		r := rand.New(rand.NewPCG(seed, seed)) //nolint:gosec // a test's choice
		r.Shuffle(total, func(i, j int) { all[i], all[j] = all[j], all[i] })
		t.Logf("%d of %d cases; the same with -e2e.sweep.seed %d, every one with -e2e.sweep all", sweepSlice, total, seed)
		return all[:sweepSlice]
	}
	var some []killAt
	for _, k := range all {
		if strings.Contains(k.String(), *flagSweep) {
			some = append(some, k)
		}
	}
	if len(some) == 0 {
		t.Fatalf("no case of the sweep has %q in its name", *flagSweep)
	}
	return some
}

// TestAProcessThatIsKilledAtAnyStepOfAReloadLeavesOneOutcome has the leader and a follower of five processes kill
// themselves at each step, starts them again, and holds every node against the record.
func TestAProcessThatIsKilledAtAnyStepOfAReloadLeavesOneOutcome(t *testing.T) {
	const nodes = 5
	bin, err := brittle()
	if err != nil {
		t.Fatal(err)
	}
	c := newCluster(t, options{nodes: nodes, config: map[string]any{"lease.ttl": "3s"}, idle: true})
	for _, s := range c.nodes {
		s.bin, s.env = bin, append(s.env, "ROLLCALL_FAILPOINTS=@"+s.rules())
		s.start()
	}
	c.serving()
	c.mountKV(kvOld)
	version := kvOld
	for i, k := range chosenKills(t, nodes) {
		began, told := time.Now(), ""
		t.Run(k.String(), func(t *testing.T) { version, told = c.killedAt(t, i, k, version) })
		if t.Failed() {
			return
		}
		t.Logf("%-40s %6.1fs  %s", k, time.Since(began).Seconds(), told)
	}
}

// rules is the file of the rules for the node's failpoints.
func (s *server) rules() string { return filepath.Join(s.dir, "failpoints") }

// rule tells the node's process what to do at its failpoints from now on.
func (s *server) rule(text string) {
	s.c.t.Helper()
	if err := os.WriteFile(s.rules(), []byte(text), 0o600); err != nil {
		s.c.t.Fatal(err)
	}
}

// killedAt runs one case, and returns the version that the nodes run after it.
func (c *cluster) killedAt(t *testing.T, i int, k killAt, version string) (now, told string) {
	dead := c.leader()
	if k.victim == "follower" {
		followers := c.followers()
		dead = followers[i%len(followers)]
	}
	wanted := map[string]string{kvOld: kvNew, kvNew: kvOld}[version]
	req := api.ReloadRequest{Plugin: "kv", Version: wanted, Scope: "global", ReloadID: fmt.Sprintf("sweep-%d", i)}
	others := c.others(dead)
	pid := dead.pid()
	dead.rule(k.rule)

	// The client asks the node that dies, also where that one has no lease for a moment, and then with the same id whichever
	// answers.
	first, client := c.clientOf(dead), c.clientOf(append([]*server{dead}, others...)...)
	answered := make(chan error, 1)
	ctx := timeout(t, 2*recovery)
	go func() {
		for !dead.ended() && ctx.Err() == nil {
			if _, _, err := first.Reload(ctx, "", req); err == nil || !fault.Is(err, fault.Unavailable) {
				break
			}
			time.Sleep(50 * time.Millisecond)
		}
		answered <- askUntil(ctx, client, req)
	}()
	if err := dead.gone(recovery); err == nil {
		t.Fatalf("%s ended by itself", dead.name)
	}
	began := time.Now()
	dead.rule("")
	noPlugins(t, c.root, 2*time.Second, func(p process) bool { return p.host == pid })
	if err := <-answered; err != nil {
		t.Fatalf("the client that asked for the reload: %v", err)
	}
	witness := c.clientOf(others...)
	var rec *api.Reload
	if err := within(recovery, func() (err error) {
		if rec, err = witness.ReloadRecord(timeout(t, short), req.ReloadID, 0, 0); err != nil {
			return err
		}
		if !api.Ended(rec.Phase) {
			return fmt.Errorf("the reload is %s", rec.Phase)
		}
		return c.settled(c.live()...)
	}); err != nil {
		t.Fatalf("%s later: %v\n%s", time.Since(began).Round(time.Millisecond), err, tell(rec))
	}
	tellsTheTruth(t, c, rec, wanted)
	survived := time.Since(began)

	dead.start()
	began = time.Now()
	if err := within(recovery, func() error { return c.settled(c.nodes...) }); err != nil {
		t.Fatalf("%s was started again: %v", dead.name, err)
	}
	after, err := witness.ReloadRecord(timeout(t, short), req.ReloadID, 0, 0)
	if err != nil || after.DecidedIndex != rec.DecidedIndex || (rec.Outcome == api.OutcomeAborted) != (after.Outcome == api.OutcomeAborted) {
		t.Errorf("it was %s (decided at %d) and is, after the return, %v %s", rec.Outcome, rec.DecidedIndex, err, tell(after))
	}
	c.sameEverywhere(req.ReloadID)
	for _, s := range c.nodes {
		if err := askUntil(timeout(t, short), s.client(), req); err != nil {
			t.Errorf("the same id through %s: %v", s.name, err)
		}
	}
	if got := plugins(c.root); len(got) != len(c.nodes) {
		t.Errorf("%d plugin processes on %d nodes: %v", len(got), len(c.nodes), got)
	}
	told = fmt.Sprintf("%s; settled after %s, after the return in %s", after.Outcome,
		survived.Round(100*time.Millisecond), time.Since(began).Round(100*time.Millisecond))
	if rec.DecidedIndex > 0 {
		return wanted, told
	}
	return version, told
}

// askUntil asks for a reload until it is answered; the answer must be this reload.
func askUntil(ctx context.Context, client *api.Client, req api.ReloadRequest) error {
	for {
		resp, _, err := client.Reload(ctx, "", req)
		switch {
		case err == nil && resp.ReloadID != req.ReloadID:
			return fmt.Errorf("asked for %s, answered with %s", req.ReloadID, resp.ReloadID)
		case err == nil:
			return nil
		case fault.Is(err, fault.Conflict), fault.Is(err, fault.Invalid), ctx.Err() != nil:
			return err
		}
		time.Sleep(50 * time.Millisecond)
	}
}
