package fsm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

const fullLog = `init
hello n1
hello n2
register kv v1.0.0
register kv v2.0.0
register approle v1.0.0 type=auth
pin approle v1.0.0 type=auth
namespace team/
enable kv/ version=v1.0.0
enable kv/ ns=team/
enable auth/approle/ type=approle
takeover kv/ n1 writes=a,b/c
put kv/ d 1
policy p x
token t ttl=1h
token u parent=t
lease l kv/ token=u ttl=1m
reload r1 mounts=kv/ version=v2.0.0
prepared r1 n1,n2
switched r1 n1,n2
reload r2 mounts=kv/ local on=n2
prepared r2 n2
reload r3 mounts=kv/ strategy=canary
reload r4 mounts=kv/ strategy=canary
leave n2
rotate`

func fullWorld(t testing.TB) *world {
	w := newWorld(t)
	w.play(fullLog)
	return w
}

func restore(b []byte) (*FSM, error) {
	f := New()
	return f, f.Restore(readCloser{bytes.NewReader(b)})
}

func TestEveryDamageOfASnapshotIsNoticed(t *testing.T) {
	good := snapshotBytes(t, fullWorld(t).f)
	if _, err := restore(good); err != nil {
		t.Fatal(err)
	}
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 1 << (i % 8)
		f, err := restore(bad)
		if err == nil {
			t.Fatalf("byte %d of %d was changed and nobody noticed", i, len(good))
		}
		if f.Index() != 0 {
			t.Fatal("a refused snapshot left its mark")
		}
	}
	for n := range len(good) {
		if _, err := restore(good[:n]); !fault.Is(err, fault.Corrupt) {
			t.Fatalf("cut at byte %d of %d: %v", n, len(good), err)
		}
	}
	if _, err := restore(append(bytes.Clone(good), 0)); !fault.Is(err, fault.Corrupt) {
		t.Fatalf("with a byte more: %v", err)
	}
}

// reframe writes records as a stream with a right trailer, whatever they are.
func reframe(records []*commandv1.SnapshotRecord) []byte {
	var b []byte
	add := func(r *commandv1.SnapshotRecord) {
		raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(r)
		if err != nil {
			return
		}
		b = append(binary.AppendUvarint(b, uint64(len(raw))), raw...)
	}
	for _, r := range records {
		add(r)
	}
	add(&commandv1.SnapshotRecord{Record: &commandv1.SnapshotRecord_Trailer{Trailer: &commandv1.SnapshotTrailer{
		Records: uint64(len(records)), Crc32C: crc32.Checksum(b, castagnoli),
	}}})
	return b
}

// unframe reads the records of a stream but its trailer, as far as they can be read.
func unframe(b []byte) []*commandv1.SnapshotRecord {
	var out []*commandv1.SnapshotRecord
	for len(b) > 0 {
		n, k := binary.Uvarint(b)
		if k <= 0 || n > uint64(len(b)-k) {
			break
		}
		r := &commandv1.SnapshotRecord{}
		if proto.Unmarshal(b[k:k+int(n)], r) != nil {
			break
		}
		if r.GetTrailer() == nil {
			out = append(out, r)
		}
		b = b[k+int(n):]
	}
	return out
}

func TestASnapshotThatPersistCannotHaveWrittenIsRefused(t *testing.T) {
	good := snapshotBytes(t, fullWorld(t).f)
	if !bytes.Equal(reframe(unframe(good)), good) {
		t.Fatal("the test does not frame as the state machine does")
	}
	swapped := unframe(good)
	swapped[1], swapped[2] = swapped[2], swapped[1]
	twice := unframe(good)
	twice = append(twice[:2], twice[1:]...)
	newer := unframe(good)
	newer[0].GetHeader().Format = SnapshotFormat + 1
	none := unframe(good)
	none[0].GetHeader().Format = 0
	for name, c := range map[string]struct {
		records []*commandv1.SnapshotRecord
		kind    fault.Kind
	}{
		"out of order":   {swapped, fault.Corrupt},
		"a row twice":    {twice, fault.Corrupt},
		"no header":      {unframe(good)[1:], fault.Corrupt},
		"newer":          {newer, fault.Invalid},
		"no format":      {none, fault.Corrupt},
		"a kind unknown": {append(unframe(good), &commandv1.SnapshotRecord{}), fault.Corrupt},
	} {
		if _, err := restore(reframe(c.records)); !fault.Is(err, c.kind) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestTheStateNeverGoesBack(t *testing.T) {
	w := fullWorld(t)
	old := snapshotBytes(t, w.f)
	w.play("tick\nput kv/ later 1")
	before := snapshotBytes(t, w.f)
	if err := w.f.Restore(readCloser{bytes.NewReader(old)}); !fault.Is(err, fault.Stale) {
		t.Fatalf("an older snapshot answered %v", err)
	}
	if !bytes.Equal(snapshotBytes(t, w.f), before) {
		t.Fatal("a refused snapshot changed the state")
	}
	if err := w.f.Restore(readCloser{bytes.NewReader(before)}); err != nil {
		t.Fatalf("the same state again: %v", err)
	}
}

func TestABackupComesBackWithTheClusterAsItIsNow(t *testing.T) {
	w := fullWorld(t)
	backup := snapshotBytes(t, w.f)
	w.play("rotate\nput kv/ later 1 epoch=12\nhello n2 inc=5\nhello n9\ntick after=1m\nreload new plugin=approle\nabort new")
	now := w.f.View()
	var rebased bytes.Buffer
	if err := Rebase(now, bytes.NewReader(backup), &rebased); err != nil {
		t.Fatal(err)
	}
	if err := w.f.Restore(readCloser{bytes.NewReader(rebased.Bytes())}); err != nil {
		t.Fatal(err)
	}
	w.index++ // raft's own entry
	v := w.f.View()
	if v.StorageGet("uuid-of-kv/", "later") != nil || v.StorageGet("uuid-of-kv/", "a") == nil {
		t.Error("the data are not the backup's")
	}
	if v.Node("n2").GetIncarnation() != 5 || v.Node("n9") == nil || v.ClockNS() < now.ClockNS() || v.ReloadID("new") == nil || v.ReloadID("r1") == nil {
		t.Error("members, clock or reload ids went back")
	}
	if term, _ := v.KeyTerm(); term != 3 {
		t.Errorf("the term of data keys is %d", term)
	}
	if m := v.Mount("uuid-of-kv/"); m.GetEpoch() != 0 {
		t.Error("an instance of before may still write")
	}
	old := v.Mount("uuid-of-kv/").GetWanted().GetGeneration()
	w.play("restored")
	v = w.f.View()
	if g := v.Mount("uuid-of-kv/").GetWanted(); g.GetGeneration() != w.index || g.GetFreshSince() != w.index || g.GetGeneration() <= old {
		t.Errorf("wanted is %v after the restore", g)
	}
	if n := len(v.RunningReloads()); n != 0 {
		t.Errorf("%d reloads are under way after the restore", n)
	}

	other := newWorld(t)
	other.play("init cluster=c2")
	if err := Rebase(other.f.View(), bytes.NewReader(backup), io.Discard); !fault.Is(err, fault.Conflict) {
		t.Errorf("the backup of another cluster answered %v", err)
	}
	if err := Rebase(now, bytes.NewReader(backup[:50]), io.Discard); !fault.Is(err, fault.Corrupt) {
		t.Errorf("half a backup answered %v", err)
	}
}

type sink struct {
	bytes.Buffer
	fail             bool
	closed, canceled bool
}

func (s *sink) ID() string { return "snap-1" }

func (s *sink) Close() error {
	s.closed = true
	return nil
}

func (s *sink) Cancel() error {
	s.canceled = true
	return nil
}

func (s *sink) Write(b []byte) (int, error) {
	if s.fail {
		return 0, errors.New("no space left on device")
	}
	return s.Buffer.Write(b)
}

func TestPersistClosesItsSinkOrCancelsIt(t *testing.T) {
	w := fullWorld(t)
	snap, err := w.f.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	want := snapshotBytes(t, w.f)
	w.play("put kv/ later 1 epoch=12") // what comes after is not in it
	good := &sink{}
	if err := snap.Persist(good); err != nil || !good.closed || good.canceled || !bytes.Equal(good.Bytes(), want) {
		t.Fatalf("a good sink: %v, closed %v, canceled %v", err, good.closed, good.canceled)
	}
	bad := &sink{fail: true}
	if err := snap.Persist(bad); err == nil || bad.closed || !bad.canceled {
		t.Fatalf("a full disk: %v, closed %v, canceled %v", err, bad.closed, bad.canceled)
	}
	snap.Release()
}

func TestTheFirstSaltOfAuditRecordsStands(t *testing.T) {
	w := newWorld(t)
	first, second := strings.Repeat("1", 32), strings.Repeat("2", 32)
	w.play("init")
	old := snapshotBytes(t, w.f) // of before there were salts
	for line, want := range map[string]string{
		"audit-salt short":                       "invalid: ",
		"audit-salt " + strings.Repeat("x", 600): "invalid: ",
	} {
		if got := w.play(line); !strings.Contains(got, want) || w.f.View().AuditSalt() != "" {
			t.Errorf("%s", got)
		}
	}
	w.play("audit-salt " + first) // play restores a snapshot of it, too
	if got := w.play("audit-salt " + second); !strings.Contains(got, "(repeated)") {
		t.Errorf("%s", got)
	}
	if got := w.f.View().AuditSalt(); got != first {
		t.Errorf("the salt is %q", got)
	}
	var rebased bytes.Buffer
	if err := Rebase(w.f.View(), bytes.NewReader(old), &rebased); err != nil {
		t.Fatal(err)
	}
	if err := w.f.Restore(readCloser{bytes.NewReader(rebased.Bytes())}); err != nil {
		t.Fatal(err)
	}
	if got := w.f.View().AuditSalt(); got != first {
		t.Errorf("after an operator's restore the salt is %q: nothing that was hashed is found any more", got)
	}
}
