package nodetest

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"rollcall/node/nodetest/sim"
)

// The flags of the simulation:
//
//	go test ./node/nodetest -run Simulation                                    the committed seeds, briefly
//	go test ./node/nodetest -run Simulation -seed 7 -for 10m -nodes 5          one run again
//	go test ./node/nodetest -run Simulation -long 3m                           fresh seeds for three minutes
var (
	simSeed  = flag.Uint64("seed", 0, "simulate this seed alone")
	simFor   = flag.Duration("for", 5*time.Minute, "virtual time of load and faults in one run")
	simNodes = flag.Int("nodes", 5, "nodes of the simulated cluster, 3 to 7")
	simLong  = flag.Duration("long", 0, "simulate fresh seeds for this long; default ROLLCALL_SIMULATE")
	simOut   = flag.String("out", os.TempDir(), "where the folder of a run that is not good goes")
)

// regressions are seeds that once showed a defect, each with its run's length and size.
var regressions = []sim.Options{
	{Seed: 2, For: time.Minute, Nodes: 5},
}

func TestSimulation(t *testing.T) {
	table, cpu := &sim.Table{}, used()
	defer func() { t.Logf("what was simulated:\n%s", table.WithCPU(used()-cpu)) }()
	if *simSeed != 0 {
		simulate(t, table, sim.Options{Seed: *simSeed, For: *simFor, Nodes: *simNodes})
		return
	}
	for _, opt := range regressions {
		simulate(t, table, opt)
	}
	length := *simLong
	if v := os.Getenv("ROLLCALL_SIMULATE"); length == 0 && v != "" {
		var err error
		if length, err = time.ParseDuration(v); err != nil {
			t.Fatalf("ROLLCALL_SIMULATE: %v", err)
		}
	}
	fresh := rand.Uint64N(1 << 40)
	if length > 0 {
		t.Logf("fresh seeds from %d", fresh)
	}
	for end := time.Now().Add(length); time.Now().Before(end) && !t.Failed(); fresh++ {
		simulate(t, table, sim.Options{Seed: fresh, For: *simFor, Nodes: 3 + int(fresh%3)*2})
	}
}

// simulate runs one seed, and keeps what is needed to understand it when it is not good.
func simulate(t *testing.T, table *sim.Table, opt sim.Options) {
	t.Helper()
	t.Run(fmt.Sprintf("seed %d", opt.Seed), func(t *testing.T) {
		r := sim.Simulate(t, opt, t.TempDir())
		report := r.Judge()
		table.Add(r, report)
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

// used is the processor's time that this process has taken.
func used() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
