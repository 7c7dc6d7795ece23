package fsm

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/raft"

	commandv1 "rollcall/proto/command/v1"
)

// frames cuts fuzzed bytes into entries: a length in two bytes, then as many bytes.
func frames(b []byte) [][]byte {
	var out [][]byte
	for len(b) >= 2 && len(out) < 200 {
		n := int(binary.BigEndian.Uint16(b))
		b = b[2:]
		n = min(n, len(b))
		out = append(out, b[:n])
		b = b[n:]
	}
	return out
}

func framed(log [][]byte) []byte {
	var b []byte
	for _, e := range log {
		if len(e) < 1<<16 {
			b = append(binary.BigEndian.AppendUint16(b, uint16(len(e))), e...)
		}
	}
	return b
}

// transcriptLogs are the entries of every transcript: seeds that reach deep.
func transcriptLogs(t testing.TB) [][][]byte {
	paths, err := filepath.Glob("testdata/transcripts/*.txt")
	if err != nil || len(paths) == 0 {
		t.Fatal("no transcripts", err)
	}
	var out [][][]byte
	for _, p := range paths {
		text, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		w := newWorld(t)
		in := false
		for line := range strings.Lines(string(text)) {
			line = strings.TrimSpace(line)
			switch {
			case line == "log":
				in = true
			case line == "----" || line == "show":
				in = false
			case in && line != "" && !strings.HasPrefix(line, "#"):
				w.play(line)
			}
		}
		out = append(out, w.log)
	}
	return out
}

func mustNotPanic(t *testing.T, f *FSM, index uint64, data []byte) {
	res := f.Apply(&raft.Log{Index: index, Term: 1 + index/50, Type: raft.LogCommand, Data: data}).(*commandv1.Result)
	if res.GetFaultKind() == "internal" {
		t.Fatalf("entry %d panicked: %s", index, res.GetFaultText())
	}
}

// FuzzApply: no entry, whatever its bytes, may panic, make two replicas differ, or leave a state that a snapshot cannot
// carry.
func FuzzApply(f *testing.F) {
	for _, log := range transcriptLogs(f) {
		f.Add(framed(log))
	}
	f.Add([]byte{0, 3, 1, 2, 3})
	f.Fuzz(func(t *testing.T, b []byte) {
		x, y := New(), New()
		var batch []*raft.Log
		for i, e := range frames(b) {
			index := uint64(i) + 1
			prev := x.View()
			mustNotPanic(t, x, index, e)
			checkStep(t, prev, x.View())
			batch = append(batch, &raft.Log{Index: index, Term: 1 + index/50, Type: raft.LogCommand, Data: e})
		}
		y.ApplyBatch(batch)
		want := viewBytes(t, x.View())
		if !bytes.Equal(viewBytes(t, y.View()), want) {
			t.Fatal("two replicas differ")
		}
		z, err := restore(want)
		if err != nil {
			t.Fatalf("a snapshot of our own cannot be read: %v", err)
		}
		if !bytes.Equal(viewBytes(t, z.View()), want) {
			t.Fatal("a restored replica differs")
		}
	})
}

// FuzzRestore: no stream may panic, and what is taken in must carry on without panics.
func FuzzRestore(f *testing.F) {
	f.Add(snapshotBytes(f, fullWorld(f).f))
	f.Add([]byte{})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0x0f})
	var tail [][]byte
	w := newWorld(f)
	w.play(fullLog)
	w.play("hello n1 inc=2\nhello n2 inc=2\nhello n3\nprepared r3 n1\nfence r2 n2\ngate r3 passed\nexpire r2\nabort r3\npromote r4\n" +
		"expire r4\nreload r9 plugin=kv\ndisable kv/\nleave n1\nremove n2\nrevoke t\nunnamespace team/\ndrop\nrestored")
	tail = w.log
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := restore(b); err == nil {
			return // as Persist wrote it
		}
		// The checksum keeps nearly everything out: put a right one under what was read.
		g, err := restore(reframe(unframe(b)))
		if err != nil || g.Index() > 1<<40 {
			return
		}
		from := g.Index()
		for i, e := range tail {
			mustNotPanic(t, g, from+uint64(i)+1, e)
		}
		v := g.View()
		v.Reloads()
		v.RunningReloads()
		v.Expired(v.ClockNS(), 10)
		for _, m := range v.Mounts() {
			v.ActiveReload(m.GetUuid())
			v.StorageList(m.GetUuid(), "")
		}
		viewBytes(t, v)
	})
}
