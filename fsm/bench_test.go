package fsm

import (
	"bytes"
	"fmt"
	"io"
	"testing"

	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/proto"

	commandv1 "rollcall/proto/command/v1"
)

// bigWorld has n storage values in one mount.
func bigWorld(b *testing.B, n int) *world {
	w := newWorld(b)
	w.play("init\nhello n1\nregister kv v1.0.0\nenable kv/\ntakeover kv/ n1")
	for i := 0; i < n; i += MaxOps {
		ops := make([]*commandv1.StorageOp, min(MaxOps, n-i))
		for j := range ops {
			ops[j] = &commandv1.StorageOp{Key: fmt.Sprintf("data/%08d", i+j), Value: bytes.Repeat([]byte{7}, 100)}
		}
		if res := w.apply(write(ops...)); res.GetFaultKind() != "" {
			b.Fatal(res)
		}
	}
	return w
}

func write(ops ...*commandv1.StorageOp) *commandv1.Command {
	return &commandv1.Command{Body: &commandv1.Command_WriteStorage{WriteStorage: &commandv1.WriteStorage{
		MountUuid: "uuid-of-kv/", Epoch: 5, Term: 1, Ops: ops,
	}}}
}

// BenchmarkApply applies storage writes in batches of 64 onto 300,000 values, beside a reader that takes a view of each
// batch, which makes every batch pay for its copies.
func BenchmarkApply(b *testing.B) {
	w := bigWorld(b, 300_000)
	const batch = 64
	logs := make([]*raft.Log, batch)
	next := w.index
	b.ReportAllocs()
	for n := 0; b.Loop(); n++ {
		b.StopTimer()
		for i := range logs {
			k := (n*batch + i) * 7919 % 300_000
			data, err := proto.Marshal(write(&commandv1.StorageOp{Key: fmt.Sprintf("data/%08d", k), Value: []byte("value")}))
			if err != nil {
				b.Fatal(err)
			}
			next++
			logs[i] = &raft.Log{Index: next, Term: 1, Type: raft.LogCommand, Data: data}
		}
		b.StartTimer()
		w.f.ApplyBatch(logs)
		w.f.View()
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*batch), "ns/entry")
}

// BenchmarkSnapshotBlocks measures what raft's Apply waits for.
func BenchmarkSnapshotBlocks(b *testing.B) {
	w := bigWorld(b, 300_000)
	for b.Loop() {
		w.apply(write(&commandv1.StorageOp{Key: "x", Value: []byte("y")}))
		if _, err := w.f.Snapshot(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkPersist(b *testing.B) {
	w := bigWorld(b, 300_000)
	v := w.f.View()
	b.SetBytes(int64(len(snapshotBytes(b, w.f))))
	for b.Loop() {
		if err := v.WriteSnapshot(io.Discard); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRestore(b *testing.B) {
	raw := snapshotBytes(b, bigWorld(b, 300_000).f)
	b.SetBytes(int64(len(raw)))
	for b.Loop() {
		if _, err := restore(raw); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkReloadOf200 is a whole reload of one mount on 200 nodes: the entry, and a batch of votes and one of verdicts.
func BenchmarkReloadOf200(b *testing.B) {
	w := newWorld(b)
	w.play("init\nregister kv v1.0.0\nenable kv/")
	nodes := ""
	for i := range 200 {
		n := fmt.Sprintf("n%03d", i)
		w.apply(w.parse("hello " + n))
		if i > 0 {
			nodes += ","
		}
		nodes += n
	}
	for n := 0; b.Loop(); n++ {
		id := fmt.Sprintf("r%d", n)
		w.apply(w.parse("reload " + id + " plugin=kv on=n000"))
		w.apply(w.parse("prepared " + id + " " + nodes))
		w.apply(w.parse("switched " + id + " " + nodes))
		if r := w.f.View().Reload(id); r.GetPhase() != commandv1.Phase_PHASE_DONE {
			b.Fatal(r.GetPhase())
		}
		if n%50 == 0 {
			w.apply(w.parse("drop"))
		}
	}
}
