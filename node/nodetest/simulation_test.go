//go:debug randseednop=0

package nodetest

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand"
	randv2 "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/cryptotest"
	"time"

	"rollcall/node/nodetest/exact"
	"rollcall/node/nodetest/sim"
)

// The flags of the simulation:
//
//	go test ./node/nodetest -run Simulation                                the committed seeds
//	go test ./node/nodetest -run Simulation -seed 7 -for 10m -nodes 5      one run, again
//	go test ./node/nodetest -run Simulation -long 3m -v                    fresh seeds for three minutes, and the table
//	go test ./node/nodetest -run Simulation -again 20 -for 1m -v           twenty fresh seeds twice: how many repeat
//
// All but the first run each seed in a process whose runtime is changed so that a seed repeats to the last step (package
// exact). With -exact=false they run in this one, as the first does: under -race, for instance.
var (
	simSeed    = flag.Uint64("seed", 0, "simulate this seed alone")
	simFor     = flag.Duration("for", 5*time.Minute, "virtual time of load and faults in one run")
	simNodes   = flag.Int("nodes", 5, "nodes of the simulated cluster, 1 to 7")
	simLong    = flag.Duration("long", 0, "simulate fresh seeds for this long; default $ROLLCALL_SIMULATE")
	simAgain   = flag.Int("again", 0, "simulate so many fresh seeds twice, and tell how many repeat")
	simOut     = flag.String("out", os.TempDir(), "where the folder of a run that is not good goes")
	simExact   = flag.Bool("exact", true, "run seeds that are asked for in a process that repeats exactly")
	simKeep    = flag.Bool("keep", false, "keep the record of a good run too")
	simSummary = flag.String("summary", "", "write the table of the runs to this file, as JSON")
)

// regressions are seeds that once showed a defect, or what nearly was one, each as it was found.
var regressions = []sim.Options{
	{Seed: 2, For: time.Minute, Nodes: 5},  // an incarnation that began anew with a new disk
	{Seed: 68, For: time.Minute, Nodes: 3}, // a node that was started again while it still stopped
}

func TestSimulation(t *testing.T) {
	table := &sim.Table{}
	began, cpu := time.Now(), used()
	switch {
	case *simAgain > 0:
		again(t)
		return
	case *simSeed != 0:
		opt := sim.Options{Seed: *simSeed, For: *simFor, Nodes: *simNodes}
		if os.Getenv(apartVariable) != "" || !*simExact {
			simulate(t, table, opt)
			break
		}
		one, out, err := exactly(t).apart(t, opt)
		t.Logf("in a process of its own:\n%s", out)
		if err != nil {
			t.Error(err)
		}
		table.Merge(one)
	case length(t) > 0:
		campaign(t, table, length(t))
	default:
		for _, opt := range regressions {
			simulate(t, table, opt)
		}
	}
	if table.CPU == 0 {
		table.CPU = used() - cpu
	}
	table.Wall = time.Since(began)
	t.Logf("what was simulated:\n%s", table)
	if *simSummary != "" {
		raw, err := json.Marshal(table)
		if err == nil {
			err = os.WriteFile(*simSummary, raw, 0o600)
		}
		if err != nil {
			t.Error(err)
		}
	}
}

func length(t *testing.T) time.Duration {
	t.Helper()
	v := os.Getenv("ROLLCALL_SIMULATE")
	if *simLong > 0 || v == "" {
		return *simLong
	}
	d, err := time.ParseDuration(v)
	if err != nil {
		t.Fatalf("ROLLCALL_SIMULATE: %v", err)
	}
	return d
}

// simulate runs one seed, and keeps what is needed to understand it when it is not good.
func simulate(t *testing.T, table *sim.Table, opt sim.Options) {
	t.Helper()
	t.Run(fmt.Sprintf("seed %d", opt.Seed), func(t *testing.T) {
		// One processor, and whatever randomness can be seeded: so a seed repeats as far as it can without package exact.
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
		rand.Seed(int64(opt.Seed)) //nolint:staticcheck // raft draws its time-outs from there
		cryptotest.SetGlobalRandom(t, opt.Seed)
		dir := "/proc/self/cwd/nodes" // in this process's own folder, by the name that it has in every process
		if os.Getenv(apartVariable) == "" {
			dir = t.TempDir()
		}
		r := sim.Simulate(t, opt, dir)
		report := r.Judge()
		table.Add(r, report)
		t.Logf("traces: %v", r.Traces())
		good := report.Good() && len(r.Wrong) == 0
		if good && !*simKeep {
			return
		}
		dir, err := r.Save(*simOut, report)
		if err != nil {
			t.Errorf("keep the run: %v", err)
		}
		if good {
			t.Logf("history, events, faults and log: %s", dir)
			return
		}
		t.Errorf("%s\n%v\nagain: %s\nhistory, events, faults and log: %s", strings.Join(r.Wrong, "\n"), report.Err(), r.Command(), dir)
	})
}

// sizes of clusters, by seed.
var sizes = []int{3, 5, 3, 5, 7}

// apartVariable is set in the environment of a process that simulates one seed and does nothing else.
const apartVariable = "ROLLCALL_APART"

// runner starts simulations, each in a process of its own.
type runner struct {
	binary string
	exact  bool
}

// buildLimit is what building the exact binary may take: two minutes of one processor when nothing is cached, seconds after.
const buildLimit = 10 * time.Minute

// exactly is a runner whose seeds repeat.
func exactly(t *testing.T) runner {
	t.Helper()
	run, err := build(t)
	if err != nil {
		t.Fatalf("%v\nwith -exact=false a seed runs with the runtime as it is, and does not repeat exactly", err)
	}
	return run
}

// ifPossible is exactly where that can be had, and else a runner whose seeds are only a hint.
func ifPossible(t *testing.T) runner {
	t.Helper()
	plain := runner{binary: os.Args[0]}
	if !*simExact {
		return plain
	}
	run, err := build(t)
	if err != nil {
		t.Logf("these seeds do not repeat exactly: %v", err)
		return plain
	}
	return run
}

func build(t *testing.T) (runner, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), buildLimit)
	defer cancel()
	dir, err := longAs(t.TempDir())
	if err != nil {
		return runner{}, err
	}
	binary, err := exact.Build(ctx, ".", dir)
	return runner{binary: binary, exact: true}, err
}

// campaign runs the committed seeds and then fresh ones, each in a process of its own, with the command that is printed
// for it, and as many at once as there are processors. It stops at the first that is not good.
func campaign(t *testing.T, table *sim.Table, long time.Duration) {
	t.Helper()
	run := ifPossible(t)
	first := randv2.Uint64N(1 << 40)
	t.Logf("fresh seeds from %d, for %v", first, long)
	todo := append([]sim.Options(nil), regressions...)
	end := time.Now().Add(long)
	var mu sync.Mutex
	next := func() (sim.Options, bool) {
		mu.Lock()
		defer mu.Unlock()
		if len(todo) > 0 {
			opt := todo[0]
			todo = todo[1:]
			return opt, true
		}
		first++
		return sim.Options{Seed: first, For: *simFor, Nodes: sizes[first%uint64(len(sizes))]}, time.Now().Before(end) && !t.Failed()
	}
	var wg sync.WaitGroup
	for range runtime.NumCPU() {
		wg.Go(func() {
			for opt, more := next(); more; opt, more = next() {
				one, _, err := run.apart(t, opt)
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				table.Merge(one)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
}

// apart runs one seed in a process of its own, in a folder of its own, and returns what it said.
func (r runner) apart(t *testing.T, opt sim.Options) (*sim.Table, string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	dir, err := longAs(t.TempDir())
	if err != nil {
		return &sim.Table{}, "", err
	}
	out, err := filepath.Abs(*simOut)
	if err != nil {
		return &sim.Table{}, "", err
	}
	args := []string{
		"-test.run=^TestSimulation$", "-test.timeout=7m", "-test.v", "-seed", fmt.Sprint(opt.Seed), "-for", opt.For.String(),
		"-nodes", fmt.Sprint(opt.Nodes), "-out", out, "-summary", "summary", fmt.Sprintf("-keep=%v", *simKeep),
	}
	cmd := exec.CommandContext(ctx, r.binary, args...)
	cmd.Dir = dir
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGQUIT) } // it tells what every goroutine does
	cmd.WaitDelay = 10 * time.Second
	cmd.Env = append(os.Environ(), "ROLLCALL_SIMULATE=")
	if r.exact { // with nothing but what it needs: what else stands in an environment takes place in memory
		cmd.Env = exact.Env(opt.Seed)
	}
	cmd.Env = append(cmd.Env, apartVariable+"=1")
	said, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("seed %d: %w\n%s", opt.Seed, err, said)
	}
	table := &sim.Table{}
	if raw, rerr := os.ReadFile(filepath.Join(dir, "summary")); rerr == nil {
		if jerr := json.Unmarshal(raw, table); jerr != nil {
			return table, string(said), jerr
		}
	} else if err == nil {
		err = fmt.Errorf("seed %d: nothing came of it:\n%s", opt.Seed, said)
	}
	if cmd.ProcessState != nil {
		table.CPU = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	}
	return table, string(said), err
}

// longAs makes a folder below dir whose path has always so many bytes: how long strings are takes part in where things lie
// in memory.
func longAs(dir string) (string, error) {
	const n = 160
	dir = filepath.Join(dir, strings.Repeat("x", max(1, n-len(dir)-1)))
	return dir, os.MkdirAll(dir, 0o700)
}

// again runs seeds twice and tells which traces are the same: where seeds are exact, all.
func again(t *testing.T) {
	run := runner{binary: os.Args[0]}
	if *simExact {
		run = exactly(t)
	}
	first := *simSeed
	if first == 0 {
		first = randv2.Uint64N(1 << 40)
	}
	same := map[string]int{}
	var names []string
	for seed := first; seed < first+uint64(*simAgain); seed++ {
		opt := sim.Options{Seed: seed, For: *simFor, Nodes: *simNodes}
		var runs [2]*sim.Table
		var wg sync.WaitGroup
		for i := range runs { // at the same time: they must not hang on how fast the machine is
			wg.Go(func() {
				one, _, err := run.apart(t, opt)
				if err != nil {
					t.Error(err)
				}
				runs[i] = one
			})
		}
		wg.Wait()
		if len(runs[0].Traces) == 0 || len(runs[1].Traces) == 0 {
			continue
		}
		a, b := runs[0].Traces[0], runs[1].Traces[0]
		names = names[:0]
		for i, trace := range a {
			names = append(names, trace.Of)
			if i < len(b) && trace.Hash == b[i].Hash {
				same[trace.Of]++
			} else {
				t.Logf("seed %d: %s differ", seed, trace.Of)
			}
		}
	}
	for _, name := range names {
		t.Logf("%s: %d of %d seeds repeat", name, same[name], *simAgain)
	}
}

// used is the processor's time that this process has taken.
func used() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
