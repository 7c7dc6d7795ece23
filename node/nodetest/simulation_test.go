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

	"rollcall/node/nodetest/sim"
)

// The flags of the simulation:
//
//	go test ./node/nodetest -run Simulation                                the committed seeds
//	go test ./node/nodetest -run Simulation -seed 7 -for 10m -nodes 5      one run, again
//	go test ./node/nodetest -run Simulation -long 3m -v                    fresh seeds for three minutes, and the table
//	go test ./node/nodetest -run Simulation -again 20 -for 1m -v           twenty fresh seeds twice: how many repeat
var (
	simSeed    = flag.Uint64("seed", 0, "simulate this seed alone")
	simFor     = flag.Duration("for", 5*time.Minute, "virtual time of load and faults in one run")
	simNodes   = flag.Int("nodes", 5, "nodes of the simulated cluster, 1 to 7")
	simLong    = flag.Duration("long", 0, "simulate fresh seeds for this long; default $ROLLCALL_SIMULATE")
	simAgain   = flag.Int("again", 0, "simulate so many fresh seeds twice, and tell how many repeat")
	simOut     = flag.String("out", os.TempDir(), "where the folder of a run that is not good goes")
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
		simulate(t, table, sim.Options{Seed: *simSeed, For: *simFor, Nodes: *simNodes})
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
		// One processor, and whatever randomness can be seeded: so a seed repeats as far as it can.
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
		rand.Seed(int64(opt.Seed)) //nolint:staticcheck // raft draws its time-outs from there
		cryptotest.SetGlobalRandom(t, opt.Seed)
		r := sim.Simulate(t, opt, t.TempDir())
		report := r.Judge()
		table.Add(r, report)
		t.Logf("traces: %v", r.Traces())
		if report.Good() && len(r.Wrong) == 0 {
			return
		}
		dir, err := r.Save(*simOut, report)
		if err != nil {
			t.Errorf("keep the run: %v", err)
		}
		t.Errorf("%s\n%v\nagain: %s\nhistory, events, faults and log: %s", strings.Join(r.Wrong, "\n"), report.Err(), r.Command(), dir)
	})
}

// sizes of clusters, by seed.
var sizes = []int{3, 5, 3, 5, 7}

// campaign runs the committed seeds and then fresh ones, each in a process of its own, with the command that is printed
// for it, and as many at once as there are processors. It stops at the first that is not good.
func campaign(t *testing.T, table *sim.Table, long time.Duration) {
	t.Helper()
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
				one, err := apart(t, opt)
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

// apart runs one seed in a process of its own.
func apart(t *testing.T, opt sim.Options) (*sim.Table, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	summary := filepath.Join(t.TempDir(), fmt.Sprint(opt.Seed))
	cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestSimulation$", "-test.timeout=7m", "-test.v", "-seed", fmt.Sprint(opt.Seed),
		"-for", opt.For.String(), "-nodes", fmt.Sprint(opt.Nodes), "-out", *simOut, "-summary", summary)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGQUIT) } // it tells what every goroutine does
	cmd.WaitDelay = 10 * time.Second
	cmd.Env = append(os.Environ(), "ROLLCALL_SIMULATE=")
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("seed %d: %w\n%s", opt.Seed, err, out)
	}
	table := &sim.Table{}
	if raw, rerr := os.ReadFile(summary); rerr == nil {
		if jerr := json.Unmarshal(raw, table); jerr != nil {
			return table, jerr
		}
	} else if err == nil {
		err = fmt.Errorf("seed %d: nothing came of it:\n%s", opt.Seed, out)
	}
	if cmd.ProcessState != nil {
		table.CPU = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	}
	return table, err
}

// again runs seeds twice and tells which traces are the same.
func again(t *testing.T) {
	first := *simSeed
	if first == 0 {
		first = randv2.Uint64N(1 << 40)
	}
	same := map[string]int{}
	var names []string
	for seed := first; seed < first+uint64(*simAgain); seed++ {
		var runs []*sim.Table
		for range 2 {
			one, err := apart(t, sim.Options{Seed: seed, For: *simFor, Nodes: *simNodes})
			if err != nil {
				t.Error(err)
			}
			runs = append(runs, one)
		}
		if len(runs[0].Traces) == 0 || len(runs[1].Traces) == 0 {
			continue
		}
		a, b := runs[0].Traces[0], runs[1].Traces[0]
		names = names[:0]
		for i, trace := range a {
			names = append(names, trace.Of)
			if i < len(b) && trace.Hash == b[i].Hash {
				same[trace.Of]++
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
