package seal

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"rollcall/node/fault"
)

// memory is a File in memory; fail makes the next writes fail.
type memory struct {
	mu      sync.Mutex
	content []byte
	fail    error
}

func (m *memory) Read() ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return bytes.Clone(m.content), nil
}

func (m *memory) Write(b []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail == nil {
		m.content = bytes.Clone(b)
	}
	return m.fail
}

func newRing(t testing.TB, keys Keys) (*Ring, *memory) {
	t.Helper()
	f := &memory{}
	r, err := NewRing(f, "node", keys, false)
	if err != nil {
		t.Fatal(err)
	}
	return r, f
}

func reopen(t testing.TB, f File, keys Keys) *Ring {
	t.Helper()
	r, err := OpenRing(f, "node", keys)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func seal(r *Ring, text string) (sealed, mark []byte) { return r.Seal([]byte(text), []byte("here")) }

func opens(t testing.TB, r *Ring, sealed, mark []byte, want string) {
	t.Helper()
	if got, err := r.Open(sealed, mark, []byte("here")); err != nil || string(got) != want {
		t.Errorf("opened %q, %v; want %q", got, err, want)
	}
}

func TestARecordOpensOnlyAsItWasSealedAndWhereItBelongs(t *testing.T) {
	r, f := newRing(t, Keys{Current: Ephemeral()})
	text := "a value that nobody else may read"
	sealed, mark := seal(r, text)
	if bytes.Contains(append(sealed, f.content...), []byte(text[:8])) || len(sealed) != len(text)+Overhead || len(mark) != MarkSize {
		t.Fatalf("sealed %q, mark %q", sealed, mark)
	}
	opens(t, r, sealed, mark, text)
	if _, err := r.Open(sealed, mark, []byte("elsewhere")); !fault.Is(err, fault.Corrupt) {
		t.Errorf("in another place: %v", err)
	}
	for i := range 8 * (len(sealed) + len(mark)) {
		s, m := bytes.Clone(sealed), bytes.Clone(mark)
		if b := i / 8; b < len(s) {
			s[b] ^= 1 << (i % 8)
		} else {
			m[b-len(s)] ^= 1 << (i % 8)
		}
		if got, err := r.Open(s, m, []byte("here")); !fault.Is(err, fault.Corrupt) {
			t.Fatalf("bit %d was changed and it opened as %q, %v", i, got, err)
		}
	}
	other, _ := newRing(t, Keys{Current: Ephemeral()})
	if _, err := other.Open(sealed, mark, []byte("here")); !fault.Is(err, fault.Corrupt) {
		t.Errorf("with another node's ring: %v", err)
	}
}

func TestNoNumberComesTwiceUnderOneKey(t *testing.T) {
	keys := Keys{Current: Ephemeral()}
	r, f := newRing(t, keys)
	old := bytes.Clone(f.content)
	seen, mu := map[string]bool{}, sync.Mutex{}
	take := func(r *Ring, n int) {
		for range n {
			_, mark := seal(r, "x")
			mu.Lock()
			if seen[string(mark)] {
				t.Errorf("mark %x came twice", mark)
			}
			seen[string(mark)] = true
			mu.Unlock()
		}
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() { take(r, 500) })
	}
	wg.Wait()
	take(reopen(t, f, keys), 500)                     // after a restart
	take(reopen(t, &memory{content: old}, keys), 500) // and from an old copy of the directory
	r.sealer.Load().next.Store(maxRecords - 3)
	take(r, 10) // and when a key has done enough
	if got := len(seen); got != 3010 {
		t.Errorf("%d marks", got)
	}
	sealed, mark := seal(r, "after the renewal")
	opens(t, reopen(t, f, keys), sealed, mark, "after the renewal")
}

func TestAfterARotationTheOldStaysReadableUntilNothingNeedsIt(t *testing.T) {
	keys := Keys{Current: Ephemeral()}
	r, f := newRing(t, keys)
	first, firstMark := seal(r, "one")
	if rotated, err := r.Rotate(1); rotated || err != nil {
		t.Fatalf("to the term it has: %v, %v", rotated, err)
	}
	if rotated, err := r.Rotate(7); !rotated || err != nil || r.Term() != 7 {
		t.Fatalf("to term 7: %v, %v, %d", rotated, err, r.Term())
	}
	second, secondMark := seal(r, "two")
	a, _ := IsMark(firstMark)
	b, _ := IsMark(secondMark)
	if a == b {
		t.Error("the new record is sealed with the old key")
	}
	for _, ring := range []*Ring{r, reopen(t, f, keys)} {
		opens(t, ring, first, firstMark, "one")
		opens(t, ring, second, secondMark, "two")
	}
	if n, err := r.Retire(func(k uint32) bool { return k == a }); n != 0 || err != nil {
		t.Errorf("retired %d, %v while it is needed", n, err)
	}
	if n, err := r.Retire(func(uint32) bool { return false }); n != 1 || err != nil || r.Keys() != 1 {
		t.Errorf("retired %d, %v; %d keys", n, err, r.Keys())
	}
	for _, ring := range []*Ring{r, reopen(t, f, keys)} {
		opens(t, ring, second, secondMark, "two")
		if _, err := ring.Open(first, firstMark, []byte("here")); !fault.Is(err, fault.Corrupt) || !strings.Contains(err.Error(), "data key 1") {
			t.Errorf("what a retired key has sealed: %v", err)
		}
	}
}

func TestARotationThatIsNotDurableSealsNothing(t *testing.T) {
	keys := Keys{Current: Ephemeral()}
	r, f := newRing(t, keys)
	f.fail = errors.New("no space left on device")
	if rotated, err := r.Rotate(2); rotated || !errors.Is(err, f.fail) {
		t.Fatalf("%v, %v", rotated, err)
	}
	f.fail = nil
	sealed, mark := seal(r, "still under the old key")
	opens(t, reopen(t, f, keys), sealed, mark, "still under the old key")
	if r.Term() != 1 {
		t.Errorf("term %d", r.Term())
	}
}

func TestAFullRingRefusesToRotateInWords(t *testing.T) {
	r, _ := newRing(t, Keys{Current: Ephemeral()})
	for term := uint64(2); term <= maxDataKeys; term++ {
		if _, err := r.Rotate(term); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.Rotate(maxDataKeys + 1); !fault.Is(err, fault.Exhausted) {
		t.Errorf("one more: %v", err)
	}
}

func TestANewSealKeyLocksTheRingAgainAndTheOldOneIsOfNoUseThen(t *testing.T) {
	before, after := Ephemeral(), Ephemeral()
	r, f := newRing(t, Keys{Current: before})
	sealed, mark := seal(r, "kept")
	if _, err := OpenRing(f, "node", Keys{Current: after}); !fault.Is(err, fault.Denied) ||
		!strings.Contains(err.Error(), before.ID()) || !strings.Contains(err.Error(), after.ID()) || !strings.Contains(err.Error(), "previous_key_file") {
		t.Fatalf("with the new key alone: %v", err)
	}
	both := Keys{Current: after, Previous: []*Key{before}}
	if r = reopen(t, f, both); !r.Rewrapped() {
		t.Error("it was not locked again")
	}
	opens(t, r, sealed, mark, "kept")
	if r = reopen(t, f, both); r.Rewrapped() {
		t.Error("it was locked again twice")
	}
	opens(t, reopen(t, f, Keys{Current: after}), sealed, mark, "kept")
	if _, err := OpenRing(f, "node", Keys{Current: before}); !fault.Is(err, fault.Denied) {
		t.Errorf("with the old key: %v", err)
	}
}

func TestEveryDamageOfARingIsTold(t *testing.T) {
	keys := Keys{Current: Ephemeral()}
	_, f := newRing(t, keys)
	good := bytes.Clone(f.content)
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 1 << (i % 7)
		if _, err := OpenRing(&memory{content: bad}, "node", keys); !fault.Is(err, fault.Corrupt) {
			t.Fatalf("byte %d was changed: %v", i, err)
		}
	}
	for n := range good {
		if _, err := OpenRing(&memory{content: append([]byte{}, good[:n]...)}, "node", keys); !fault.Is(err, fault.Corrupt) {
			t.Fatalf("cut at %d: %v", n, err)
		}
	}
	if _, err := OpenRing(f, "another", keys); !fault.Is(err, fault.Corrupt) || !strings.Contains(err.Error(), "belongs to node") {
		t.Errorf("another node's: %v", err)
	}
	if _, err := OpenRing(&memory{}, "node", keys); !fault.Is(err, fault.NotFound) {
		t.Errorf("no ring: %v", err)
	}
}

func TestTheMarkOfOpeningIsDurable(t *testing.T) {
	keys, f := Keys{Current: Ephemeral()}, &memory{}
	r, err := NewRing(f, "node", keys, true)
	if err != nil || !r.Opening() || !reopen(t, f, keys).Opening() {
		t.Fatalf("%v", err)
	}
	if err := r.Opened(); err != nil || r.Opening() || reopen(t, f, keys).Opening() {
		t.Errorf("%v", err)
	}
}

// stream seals text as a stream of the writer that make gives.
func stream(t testing.TB, text []byte, start func(io.Writer) (*Writer, error)) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := start(&b)
	if err != nil {
		t.Fatal(err)
	}
	for rest := text; len(rest) > 0; {
		n := min(len(rest), 1+rand.IntN(100_000))
		if _, err := w.Write(rest[:n]); err != nil {
			t.Fatal(err)
		}
		rest = rest[n:]
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("more")); err == nil {
		t.Error("a stream that has ended takes more")
	}
	return b.Bytes()
}

func TestStreamsComeBackAtEverySizeAroundAChunk(t *testing.T) {
	keys := Keys{Current: Ephemeral()}
	r, _ := newRing(t, keys)
	for _, size := range []int{0, 1, 100, chunkSize - 1, chunkSize, chunkSize + 1, 3*chunkSize - 1, 3 * chunkSize, 3*chunkSize + 77} {
		text := bytes.Repeat([]byte("state "), size/6+1)[:size]
		sealed := stream(t, text, func(w io.Writer) (*Writer, error) { out, _, err := r.NewWriter(w, []byte("here")); return out, err })
		if got := PlainSize(int64(len(sealed))); got != int64(size) {
			t.Errorf("PlainSize of %d is %d", size, got)
		}
		if id, ok := RingKey(sealed); !ok || id != 1 {
			t.Errorf("RingKey: %d, %v", id, ok)
		}
		in, err := r.NewReader(bytes.NewReader(sealed), []byte("here"))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(in); err != nil || !bytes.Equal(got, text) {
			t.Errorf("size %d: %d bytes, %v", size, len(got), err)
		}
		backup := stream(t, text, func(w io.Writer) (*Writer, error) { return keys.Current.NewWriter(w, nil) })
		if kin, err := keys.NewReader(bytes.NewReader(backup), nil); err != nil {
			t.Error(err)
		} else if got, err := io.ReadAll(kin); err != nil || !bytes.Equal(got, text) {
			t.Errorf("backup of size %d: %d bytes, %v", size, len(got), err)
		}
		if bytes.Contains(sealed, []byte("state state")) || bytes.Contains(backup, []byte("state state")) {
			t.Error("the plain text is there")
		}
	}
}

func TestAStreamThatWasCutReorderedOrMovedIsRefused(t *testing.T) {
	keys := Keys{Current: Ephemeral()}
	r, _ := newRing(t, keys)
	text := make([]byte, 3*chunkSize+100)
	for i := range text {
		text[i] = byte(i / chunkSize)
	}
	good := stream(t, text, func(w io.Writer) (*Writer, error) { out, _, err := r.NewWriter(w, []byte("here")); return out, err })
	const c = chunkSize + tagSize
	chunk := func(i int) []byte { return good[ringHeader+i*c : min(ringHeader+(i+1)*c, len(good))] }
	join := func(parts ...[]byte) []byte { return bytes.Join(append([][]byte{good[:ringHeader]}, parts...), nil) }
	bad := map[string][]byte{
		"nothing":                  {},
		"the header alone":         good[:ringHeader],
		"without the last chunk":   join(chunk(0), chunk(1), chunk(2)),
		"the first chunk alone":    join(chunk(0)),
		"the last chunk alone":     join(chunk(3)),
		"two chunks exchanged":     join(chunk(1), chunk(0), chunk(2), chunk(3)),
		"a chunk left out":         join(chunk(0), chunk(2), chunk(3)),
		"a chunk twice":            join(chunk(0), chunk(0), chunk(1), chunk(2), chunk(3)),
		"a byte more":              append(bytes.Clone(good), 0),
		"another stream's header":  append(stream(t, text, func(w io.Writer) (*Writer, error) { out, _, err := r.NewWriter(w, []byte("here")); return out, err })[:ringHeader], good[ringHeader:]...),
		"another kind of header":   append([]byte(streamMagic+"\x02"), good[len(streamMagic)+1:]...),
		"an unknown kind":          append([]byte(streamMagic+"\x09"), good[len(streamMagic)+1:]...),
		"the last chunk twice":     join(chunk(0), chunk(1), chunk(2), chunk(3), chunk(3)),
		"the last chunk cut short": good[:len(good)-1],
	}
	for n := 0; n < len(good); n += 4999 {
		bad[fmt.Sprintf("cut at %d", n)] = good[:n]
		flipped := bytes.Clone(good)
		flipped[n] ^= 4
		bad[fmt.Sprintf("byte %d changed", n)] = flipped
	}
	for i := range ringHeader {
		flipped := bytes.Clone(good)
		flipped[i] ^= 1 << (i % 8)
		bad[fmt.Sprintf("byte %d of the header changed", i)] = flipped
	}
	for name, b := range bad {
		in, err := r.NewReader(bytes.NewReader(b), []byte("here"))
		var got []byte
		if err == nil {
			got, err = io.ReadAll(in)
		}
		if !fault.Is(err, fault.Corrupt) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
		if !bytes.HasPrefix(text, got) {
			t.Errorf("%s: gave out what was not in it", name)
		}
	}
	in, err := r.NewReader(bytes.NewReader(good), []byte("elsewhere"))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(in); !fault.Is(err, fault.Corrupt) || len(got) > 0 {
		t.Errorf("in another place: %d bytes, %v", len(got), err)
	}
}

func TestABackupOpensWithItsKeyAndNamesItToOthers(t *testing.T) {
	mine, other := Ephemeral(), Ephemeral()
	backup := stream(t, []byte("state"), func(w io.Writer) (*Writer, error) { return mine.NewWriter(w, nil) })
	for _, keys := range []Keys{{Current: mine}, {Current: other, Previous: []*Key{mine}}} {
		in, err := keys.NewReader(bytes.NewReader(backup), nil)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(in); err != nil || string(got) != "state" {
			t.Errorf("%q, %v", got, err)
		}
	}
	for _, keys := range []Keys{{Current: other}, {}} {
		if _, err := keys.NewReader(bytes.NewReader(backup), nil); !fault.Is(err, fault.Denied) || !strings.Contains(err.Error(), mine.ID()) {
			t.Errorf("without the key: %v", err)
		}
	}
	for i := range backup {
		bad := bytes.Clone(backup)
		bad[i] ^= 1
		in, err := Keys{Current: mine}.NewReader(bytes.NewReader(bad), nil)
		if err == nil {
			_, err = io.ReadAll(in)
		}
		if err == nil {
			t.Fatalf("byte %d was changed and nobody noticed", i)
		}
	}
}

func TestAKeyComesFromAFileOrFromACommand(t *testing.T) {
	dir := t.TempDir()
	text := NewKeyText()
	want, err := ParseKey([]byte(text), "test")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "key")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SEAL_TEST_SEEN", "yes")
	t.Setenv("SEAL_TEST_HIDDEN", "secret")
	for name, s := range map[string]Source{
		"file":    {File: file},
		"command": {Command: []string{"cat", file}},
		"environment": {
			Command: []string{"sh", "-c", `test "$SEAL_TEST_SEEN" = yes && test -z "$SEAL_TEST_HIDDEN" && exec cat "$0"`, file},
			Env:     []string{"SEAL_TEST_SEEN", "SEAL_TEST_NOT_SET"},
		},
	} {
		if k, err := s.Load(t.Context()); err != nil || k.ID() != want.ID() {
			t.Errorf("%s: %v", name, err)
		}
	}
	open := filepath.Join(dir, "open")
	if err := os.WriteFile(open, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o604); err != nil {
		t.Fatal(err)
	}
	short := filepath.Join(dir, "short")
	if err := os.WriteFile(short, []byte(text[:30]), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		s    Source
		want string
	}{
		"nothing":        {Source{}, "neither"},
		"no file":        {Source{File: filepath.Join(dir, "none")}, "no such file"},
		"a directory":    {Source{File: dir}, "not a file"},
		"open to all":    {Source{File: open}, "chmod 600"},
		"no key":         {Source{File: short}, "32 bytes in base64"},
		"no program":     {Source{Command: []string{filepath.Join(dir, "none")}}, "no such file"},
		"it fails":       {Source{Command: []string{"sh", "-c", "echo the vault is shut >&2; exit 3"}}, `it said: "the vault is shut"`},
		"it says much":   {Source{Command: []string{"sh", "-c", "yes | head -c 1000000"}}, "32 bytes in base64"},
		"it says little": {Source{Command: []string{"true"}}, "32 bytes in base64"},
	} {
		if _, err := c.s.Load(t.Context()); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		} else if strings.Contains(err.Error(), text[:30]) {
			t.Errorf("%s: the error shows the key: %v", name, err)
		}
	}
	keys, err := LoadKeys(t.Context(), Source{File: file}, Source{Command: []string{"echo", someKey()}})
	if err != nil || len(keys.Previous) != 1 || keys.Current.ID() != want.ID() {
		t.Errorf("%+v, %v", keys, err)
	}
	if _, err := LoadKeys(t.Context(), Source{File: file}, Source{File: short}); !fault.Is(err, fault.Invalid) {
		t.Errorf("a previous key that is none: %v", err)
	}
}

// someKey is the text of some key.
func someKey() string { return strings.TrimSpace(NewKeyText()) }

func TestACommandThatHangsEndsWithWhatItStarted(t *testing.T) {
	mark := fmt.Sprintf("86%d", 1000+os.Getpid()) // seconds; told by its command line
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	began := time.Now()
	_, err := Source{Command: []string{"sh", "-c", "sleep " + mark + " & sleep " + mark}}.Load(ctx)
	if !fault.Is(err, fault.Invalid) || time.Since(began) > 20*time.Second {
		t.Errorf("after %v: %v", time.Since(began), err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		left := running(t, mark)
		if len(left) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("still running: %v", left)
		}
	}
}

func running(t *testing.T, arg string) (pids []string) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		line, err := os.ReadFile(f)
		if err == nil && slices.Contains(strings.Split(string(line), "\x00"), arg) {
			pids = append(pids, filepath.Base(filepath.Dir(f)))
		}
	}
	return pids
}

func TestTheKeysStandInNoFormInTheRing(t *testing.T) {
	r, f := newRing(t, Keys{Current: Ephemeral()})
	for _, secret := range [][]byte{r.body.Keys[0].Secret, r.key.secret[:]} {
		for _, form := range [][]byte{secret, []byte(hex.EncodeToString(secret)), []byte(base64.StdEncoding.EncodeToString(secret))} {
			if bytes.Contains(f.content, form) {
				t.Error("a key stands in the file")
			}
		}
	}
}
