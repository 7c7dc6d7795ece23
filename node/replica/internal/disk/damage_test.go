package disk

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"rollcall/node/fault"
)

var (
	damageCases = flag.Int("damage-cases", 120, "how many damaged directories are opened; the long campaign takes 10000")
	damageSeed  = flag.Uint64("damage-seed", 0, "repeat one case; 0 takes fresh ones")
)

const sector = 512

// world is a directory as a node leaves it, and what the disk held at several moments before.
type world struct {
	files map[string][]byte // by path below the directory
	log   [][]byte          // raft.db after each of the last transactions, the oldest first
}

// makeWorld writes entries 38 to 400, a term, a vote, two snapshots, and keeps the files.
func makeWorld(t *testing.T) *world {
	t.Helper()
	path := t.TempDir()
	s, done := mustOpenWith(t, path, Options{Limit: time.Minute})
	w := &world{files: map[string][]byte{}}
	keep := func() {
		raw, err := os.ReadFile(filepath.Join(path, logFile))
		if err != nil {
			t.Fatal(err)
		}
		w.log = append(w.log, raw)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(s.Stable.SetUint64([]byte("CurrentTerm"), 8))
	for i := uint64(1); i <= 360; i += 20 {
		must(s.Log.StoreLogs(entries(i, i+19)))
	}
	must(s.Log.DeleteRange(1, 37))
	must(s.Stable.SetUint64([]byte("CurrentTerm"), 9))
	must(s.Stable.Set([]byte("LastVoteCand"), []byte("node-a")))
	for i := uint64(361); i <= 400; i += 8 {
		keep()
		must(s.Log.StoreLogs(entries(i, i+7)))
	}
	keep()
	must((&Dir{Path: path}).SetClusterID("4be5bbd2-0000-4000-8000-0123456789ab"))
	done()
	snapshotAt(t, path, 37)
	snapshotAt(t, path, 90)
	err := filepath.Walk(path, func(p string, info os.FileInfo, err error) error {
		if err != nil || info.IsDir() {
			return err
		}
		raw, err := os.ReadFile(p)
		rel, _ := filepath.Rel(path, p)
		w.files[rel] = raw
		return err
	})
	must(err)
	return w
}

// write makes the directory afresh.
func (w *world) write(t *testing.T, path string) {
	t.Helper()
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
	for rel, raw := range w.files {
		p := filepath.Join(path, rel)
		if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o700), os.WriteFile(p, raw, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
}

// held is what opening a directory gives: which entries, votes and snapshot, or why not.
func held(path string) (string, error) {
	d, err := OpenDir(path)
	if err != nil {
		return "", err
	}
	defer func() { _ = d.Close() }()
	id, err := d.ClusterID()
	if err != nil {
		return "", err
	}
	s, err := d.Open(Options{Limit: time.Minute})
	if err != nil {
		return "", err
	}
	defer func() { _ = s.Close() }()
	what := fmt.Sprintf("node %s boot %d cluster %s;", d.NodeID, d.Incarnation, id)
	metas, err := s.Snapshots.List()
	if err != nil {
		return "", err
	}
	state := "none"
	for _, m := range metas { // as raft does: the newest that can be read
		_, body, err := s.Snapshots.Open(m.ID)
		if err != nil {
			continue
		}
		raw, err := io.ReadAll(body)
		if err := errors.Join(err, body.Close()); err != nil {
			continue
		}
		state = fmt.Sprintf("%d %s", m.Index, raw)
		break
	}
	last, err := s.Log.LastIndex()
	if err != nil {
		return "", err
	}
	term, terr := s.Stable.GetUint64([]byte("CurrentTerm"))
	vote, verr := s.Stable.Get([]byte("LastVoteCand"))
	if err := errors.Join(terr, verr); err != nil {
		return "", err
	}
	if err := readAll(s, last); err != nil {
		return "", err
	}
	return what + fmt.Sprintf(" snapshot %s; entries to %d; term %d vote %s", state, last, term, vote), nil
}

func readAll(s *Stores, last uint64) error {
	if last < 38 {
		return fmt.Errorf("the log ends at %d", last)
	}
	for _, want := range entries(38, last) {
		if err := sameEntry(s, want.Index, want.Data, want.Term); err != nil {
			return err
		}
	}
	return nil
}

// damage is one way to hurt a directory. It says what it did, and which other states than the whole one are no loss.
type damage struct {
	name string
	do   func(w *world, rng *rand.Rand, path string) (what string, fine []string)
}

// edit changes one file in place.
func edit(path, rel string, change func(raw []byte) []byte) {
	p := filepath.Join(path, rel)
	raw, err := os.ReadFile(p)
	if err == nil {
		err = os.WriteFile(p, change(raw), 0o600)
	}
	if err != nil {
		panic(err)
	}
}

// pick takes a file of a kind: the log, a snapshot's part, or one of the small files.
func (w *world) pick(rng *rand.Rand) string {
	var names []string
	for rel := range w.files {
		if rel != lockFile {
			names = append(names, rel)
		}
	}
	slices.Sort(names)
	if rng.IntN(2) == 0 {
		return logFile
	}
	return names[rng.IntN(len(names))]
}

func page(raw []byte, rng *rand.Rand) int { return rng.IntN(max(len(raw)/4096, 1)) * 4096 }

var damages = []damage{
	{"flip", func(w *world, rng *rand.Rand, path string) (string, []string) {
		rel := w.pick(rng)
		bits := 1 + rng.IntN(3)
		edit(path, rel, func(raw []byte) []byte {
			for range bits {
				raw[rng.IntN(len(raw))] ^= 1 << rng.IntN(8)
			}
			return raw
		})
		return fmt.Sprintf("%d bits of %s", bits, rel), nil
	}},
	{"zero", func(w *world, rng *rand.Rand, path string) (string, []string) {
		rel := w.pick(rng)
		at := 0
		edit(path, rel, func(raw []byte) []byte {
			at = page(raw, rng)
			clear(raw[at:min(at+4096, len(raw))])
			return raw
		})
		return fmt.Sprintf("page at %d of %s", at, rel), nil
	}},
	{"truncate", func(w *world, rng *rand.Rand, path string) (string, []string) {
		rel := w.pick(rng)
		n := 0
		edit(path, rel, func(raw []byte) []byte {
			n = rng.IntN(len(raw))
			return raw[:n]
		})
		return fmt.Sprintf("%s to %d bytes", rel, n), nil
	}},
	{"garbage", func(w *world, rng *rand.Rand, path string) (string, []string) {
		rel := w.pick(rng)
		at := 0
		edit(path, rel, func(raw []byte) []byte {
			at = page(raw, rng)
			for i := at; i < min(at+4096, len(raw)); i++ {
				raw[i] = byte(rng.Uint32())
			}
			return raw
		})
		return fmt.Sprintf("page at %d of %s", at, rel), nil
	}},
	{"misplaced", func(_ *world, rng *rand.Rand, path string) (string, []string) {
		from, to := 0, 0
		edit(path, logFile, func(raw []byte) []byte {
			from, to = page(raw, rng), page(raw, rng)
			copy(raw[to:to+4096], raw[from:from+4096])
			return raw
		})
		return fmt.Sprintf("page at %d over the one at %d", from, to), nil
	}},
	{"missing", func(w *world, rng *rand.Rand, path string) (string, []string) {
		rel := w.pick(rng)
		if err := os.Remove(filepath.Join(path, rel)); err != nil {
			panic(err)
		}
		if rel == clusterFile { // it is entered again with the next Hello
			return rel, []string{"cluster ; snapshot 90 state; entries to 400; term 9 vote node-a"}
		}
		return rel, nil
	}},
	// Power is lost in the middle of a transaction: of its pages some sectors are there, and its meta page is not.
	{"torn", func(w *world, rng *rand.Rand, path string) (string, []string) {
		i := 1 + rng.IntN(len(w.log)-1)
		before, after := w.log[i-1], w.log[i]
		raw := append([]byte(nil), after...)
		for at := 0; at < len(after); at += sector {
			if at < 2*4096 || rng.IntN(2) == 0 {
				if at < len(before) {
					copy(raw[at:at+sector], before[at:])
				} else {
					clear(raw[at:min(at+sector, len(raw))])
				}
			}
		}
		edit(path, logFile, func([]byte) []byte { return raw })
		return fmt.Sprintf("transaction %d", i), []string{fmt.Sprintf("entries to %d;", 360+8*(i-1))}
	}},
	// The disk has lied: a page of an acknowledged transaction is what it was before.
	{"lost", func(w *world, rng *rand.Rand, path string) (string, []string) {
		newest := w.log[len(w.log)-1]
		before := w.log[rng.IntN(len(w.log)-1)]
		var differ []int
		for at := 0; at+4096 <= len(before); at += 4096 {
			if !bytes.Equal(before[at:at+4096], newest[at:at+4096]) {
				differ = append(differ, at)
			}
		}
		n := 1 + rng.IntN(len(differ))
		rng.Shuffle(len(differ), func(i, j int) { differ[i], differ[j] = differ[j], differ[i] })
		raw := append([]byte(nil), newest...)
		for _, at := range differ[:n] {
			copy(raw[at:at+4096], before[at:])
		}
		edit(path, logFile, func([]byte) []byte { return raw })
		return fmt.Sprintf("%d of %d pages", n, len(differ)), nil
	}},
	// The log is what it was some time ago, as a whole: a copy that was put back.
	{"rolled back", func(w *world, rng *rand.Rand, path string) (string, []string) {
		i := rng.IntN(len(w.log) - 1)
		edit(path, logFile, func([]byte) []byte { return w.log[i] })
		return fmt.Sprintf("to %d entries", 360+8*i), nil
	}},
}

// TestDamageIsToldOrHealed hurts the directory of a node that is down, opens it, and wants one of two things: an error of
// kind corrupt, or everything that was acknowledged.
func TestDamageIsToldOrHealed(t *testing.T) {
	w := makeWorld(t)
	path := filepath.Join(t.TempDir(), "node")
	w.write(t, path)
	whole, err := held(path)
	if err != nil {
		t.Fatal(err)
	}
	base := uint64(time.Now().UnixNano())
	cases := *damageCases
	if *damageSeed != 0 {
		base, cases = *damageSeed, 1
	}
	told, healed := map[string]int{}, map[string]int{}
	for i := range cases {
		seed := base + uint64(i)
		rng := rand.New(rand.NewPCG(seed, 3))
		d := damages[rng.IntN(len(damages))]
		w.write(t, path)
		what, fine := d.do(w, rng, path)
		got, err := held(path)
		again := fmt.Sprintf("%s: %s; again with: go test ./node/replica/internal/disk -run DamageIsTold -damage-seed %d", d.name, what, seed)
		switch {
		case err != nil:
			if !fault.Is(err, fault.Corrupt) && !fault.Is(err, fault.Invalid) {
				t.Errorf("%s: told as %q: %v", again, fault.KindOf(err), err)
			}
			told[d.name]++
		case got == whole || older(whole, got) || slices.ContainsFunc(fine, func(s string) bool { return bytes.Contains([]byte(got), []byte(s)) }):
			healed[d.name]++
		default:
			t.Errorf("%s: silent: %s\nit was %s", again, got, whole)
		}
	}
	t.Logf("%d cases from seed %d: told %v, whole or healed %v", cases, base, told, healed)
}

// older reports whether only the newest snapshot is gone: the older one and the log give the same state.
func older(whole, got string) bool {
	return got == string(bytes.Replace([]byte(whole), []byte("snapshot 90"), []byte("snapshot 37"), 1))
}
