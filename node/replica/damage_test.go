package replica

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"rollcall/node/fault"
)

// hurt damages one file of a stopped node's directory and says what it did. before is an older copy of its log.
func hurt(rng *rand.Rand, path string, before []byte) string {
	files, _ := filepath.Glob(filepath.Join(path, "snapshots", "*", "*"))
	file := filepath.Join(path, "raft.db")
	if len(files) > 0 && rng.IntN(3) == 0 {
		file = files[rng.IntN(len(files))]
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		panic(err)
	}
	what := ""
	switch at := rng.IntN(len(raw)); rng.IntN(5) {
	case 0:
		for range 40 {
			raw[rng.IntN(len(raw))] ^= 1 << rng.IntN(8)
		}
		what = "40 bits flipped"
	case 1:
		at -= at % 4096
		clear(raw[at:min(at+4096, len(raw))])
		what = fmt.Sprintf("the page at %d zeroed", at)
	case 2:
		raw = raw[:at]
		what = fmt.Sprintf("cut off at %d", at)
	case 3:
		file, raw = filepath.Join(path, "raft.db"), before
		what = "what it was some writes ago"
	default:
		at -= at % 512
		for i := at; i < min(at+512, len(raw)); i++ {
			raw[i] = byte(rng.Uint32())
		}
		what = fmt.Sprintf("the sector at %d overwritten", at)
	}
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		panic(err)
	}
	return filepath.Base(file) + ": " + what
}

// TestDamageToAMinorityLosesNothing hurts one member of three while it is down, again and again. It refuses to start with a
// reason, and is put back with an empty disk, or it starts and heals; what was acknowledged is on every member afterwards.
func TestDamageToAMinorityLosesNothing(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 9))
	c := newCluster(t)
	all := c.founders(3, func(cfg *Config) { cfg.NoSync, cfg.SnapshotThreshold, cfg.TrailingLogs = false, 40, 20 })
	for _, m := range all {
		m.start()
	}
	ready(t, all...)
	var acked []string
	write := func(m *member, n int) {
		for range n {
			key := fmt.Sprintf("p%d", len(acked))
			m.mustWrite(key)
			acked = append(acked, key)
		}
	}
	refused, healed := 0, 0
	for round := range 8 {
		victim := all[rng.IntN(3)]
		eventually(t, 30*time.Second, func() error {
			voters := 0
			for _, m := range c.leader().Members() {
				if m.Voter {
					voters++
				}
			}
			if voters != 3 {
				return fmt.Errorf("%d members vote", voters)
			}
			return nil
		})
		before, err := os.ReadFile(filepath.Join(victim.path, "raft.db"))
		if err != nil {
			t.Fatal(err)
		}
		write(c.leader(), 12)
		victim.stop()
		rest := others(all, victim)
		write(c.leader(rest...), 4)
		what := hurt(rng, victim.path, before)
		switch err := victim.tryStart(); {
		case err == nil:
			healed++
		case fault.Is(err, fault.Corrupt):
			refused++
			if err := os.RemoveAll(victim.path); err != nil {
				t.Fatal(err)
			}
			victim.start()
		default:
			t.Fatalf("round %d, %s: told as %q: %v", round, what, fault.KindOf(err), err)
		}
		ready(t, victim)
		for _, m := range all {
			eventually(t, 20*time.Second, func() error {
				for _, key := range acked {
					if m.fsm.View().Policy("", key) == nil {
						return fmt.Errorf("round %d, %s of %s: %s has no %s", round, what, victim.name, m.name, key)
					}
				}
				return nil
			})
		}
	}
	t.Logf("refused %d, healed %d, %d writes acknowledged and none lost", refused, healed, len(acked))
}
