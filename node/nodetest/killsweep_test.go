//go:build failpoints

package nodetest

import (
	"flag"
	"fmt"
	"math/rand"
	randv2 "math/rand/v2"
	"strings"
	"testing"
	"testing/cryptotest"
	"time"

	"rollcall/node/nodetest/sim"
)

// The flags of the kill sweeps:
//
//	go test -tags failpoints ./node/nodetest -run KillAt                                  a slice of each
//	go test -tags failpoints ./node/nodetest -run KillAt -sweep all                       every case
//	go test -tags failpoints ./node/nodetest -run KillAt -sweep 'leader at draining'      the cases with these words
//	go test -tags failpoints ./node/nodetest -run KillAt -sweep-seed 7                    a slice again
var (
	flagSweep     = flag.String("sweep", "slice", `which cases of a kill sweep: "all", "slice" (a part drawn from -sweep-seed), or words in their names`)
	flagSweepSeed = flag.Uint64("sweep-seed", 0, "what a slice is drawn from; 0 takes a new one, which is printed")
)

// sweepSeed is what this run's slices are drawn from.
func sweepSeed() uint64 {
	if *flagSweepSeed == 0 {
		*flagSweepSeed = randv2.Uint64N(1<<32) + 1
	}
	return *flagSweepSeed
}

// cases are those of the sweep that the flags choose; slice is how many a slice has.
func cases(t *testing.T, nodes, slice int, real bool) []sim.Case {
	t.Helper()
	var all []sim.Case
	for _, k := range sim.Cases(nodes) {
		if real || !k.Processes {
			all = append(all, k)
		}
	}
	total, some := len(all), all
	switch *flagSweep {
	case "all":
	case "slice":
		r := randv2.New(randv2.NewPCG(sweepSeed(), 0))
		r.Shuffle(total, func(i, j int) { all[i], all[j] = all[j], all[i] })
		some = all[:min(slice, total)]
	default:
		some = nil
		for _, k := range all {
			if strings.Contains(k.String(), *flagSweep) {
				some = append(some, k)
			}
		}
	}
	if len(some) == 0 {
		t.Fatalf("no case of the sweep has %q in its name", *flagSweep)
	}
	t.Logf("%d of %d cases; the same with -sweep-seed %d, every one with -sweep all", len(some), total, sweepSeed())
	return some
}

// TestAKillAtAnyStepInVirtualTime has every case in a cluster of its own, from the real Raft to the HTTP door.
func TestAKillAtAnyStepInVirtualTime(t *testing.T) {
	const nodes, slice = 5, 16
	var times []string
	for i, k := range cases(t, nodes, slice, false) {
		t.Run(k.String(), func(t *testing.T) {
			seed := sweepSeed() + uint64(i)
			rand.Seed(int64(seed)) //nolint:staticcheck // raft draws its time-outs from there
			cryptotest.SetGlobalRandom(t, seed)
			from := time.Now()
			r := sim.Kill(t, k, sim.Options{Seed: seed, Nodes: nodes}, t.TempDir())
			report := r.Judge()
			times = append(times, fmt.Sprintf("%-45s %5.1fs of %3.0fs  %s  %v", k, time.Since(from).Seconds(), r.Virtual.Seconds(),
				strings.Join(sim.Outcomes(r.Reloads), ", "), report.Good() && len(r.Wrong) == 0))
			if report.Good() && len(r.Wrong) == 0 {
				return
			}
			dir, err := r.Save(*simOut, report)
			t.Errorf("%s\n%v\nhistory, events, faults and log: %s %v", strings.Join(r.Wrong, "\n"), report.Err(), dir, err)
		})
	}
	t.Logf("\n%s", strings.Join(times, "\n"))
}
