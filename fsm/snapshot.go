package fsm

import (
	"bufio"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"

	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/proto"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

const (
	// SnapshotFormat is the version of the stream that Persist writes. Restore reads this one and older ones.
	SnapshotFormat = 1
	// maxRecord bounds one record: more than any that the limits of the state allow.
	maxRecord = 64 << 20
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Snapshot captures the state in microseconds: the trees are copied on write. raft calls it on Apply's goroutine, and
// Persist from another one.
func (f *FSM) Snapshot() (raft.FSMSnapshot, error) { return &snapshot{f.View()}, nil }

type snapshot struct{ v *View }

// Persist writes the stream to sink, and cancels it when that fails.
func (s *snapshot) Persist(sink raft.SnapshotSink) error {
	if err := s.v.WriteSnapshot(sink); err != nil {
		return errors.Join(fault.Wrap(err, "write snapshot", sink.ID()), sink.Cancel())
	}
	return sink.Close()
}

// Release has nothing to let go.
func (s *snapshot) Release() {}

// WriteSnapshot writes the state as a stream of length-delimited SnapshotRecord: a header, the rows of each table in key
// order, and a trailer. Equal states give equal bytes.
func (v *View) WriteSnapshot(w io.Writer) error { return v.write(w, false) }

func (v *View) write(w io.Writer, operatorRestore bool) error {
	s := v.s
	buf := bufio.NewWriterSize(w, 1<<16)
	rw := &recordWriter{w: buf}
	rw.put(&commandv1.SnapshotRecord{Record: &commandv1.SnapshotRecord_Header{Header: &commandv1.SnapshotHeader{
		Format: SnapshotFormat, Index: s.index, Term: s.term, ClusterId: s.clusterID, ClusterName: s.clusterName,
		ClockNs: s.clock, OperatorRestore: operatorRestore || s.restoring, AuditSalt: []byte(s.auditSalt),
		KeyTerm: s.keyTerm, KeyTermWallMs: s.keyTermMS,
	}}})
	writeTable(rw, &s.nodes, func(r *commandv1.Node) *commandv1.SnapshotRecord {
		return &commandv1.SnapshotRecord{Record: &commandv1.SnapshotRecord_Node{Node: r}}
	})
	writeTable(rw, &s.plugins, func(r *commandv1.Plugin) *commandv1.SnapshotRecord {
		return &commandv1.SnapshotRecord{Record: &commandv1.SnapshotRecord_Plugin{Plugin: r}}
	})
	writeTable(rw, &s.pins, func(r *commandv1.Pin) *commandv1.SnapshotRecord {
		return &commandv1.SnapshotRecord{Record: &commandv1.SnapshotRecord_Pin{Pin: r}}
	})
	writeTable(rw, &s.namespaces, func(r *commandv1.Namespace) *commandv1.SnapshotRecord {
		return &commandv1.SnapshotRecord{Record: &commandv1.SnapshotRecord_Namespace{Namespace: r}}
	})
	writeTable(rw, &s.mounts, func(r *commandv1.Mount) *commandv1.SnapshotRecord {
		return &commandv1.SnapshotRecord{Record: &commandv1.SnapshotRecord_Mount{Mount: r}}
	})
	writeTable(rw, &s.storage, func(r *commandv1.StorageEntry) *commandv1.SnapshotRecord {
		return &commandv1.SnapshotRecord{Record: &commandv1.SnapshotRecord_Storage{Storage: r}}
	})
	writeTable(rw, &s.reloads, func(r *commandv1.Reload) *commandv1.SnapshotRecord {
		return &commandv1.SnapshotRecord{Record: &commandv1.SnapshotRecord_Reload{Reload: r}}
	})
	writeTable(rw, &s.reloadIDs, func(r *commandv1.ReloadID) *commandv1.SnapshotRecord {
		return &commandv1.SnapshotRecord{Record: &commandv1.SnapshotRecord_ReloadId{ReloadId: r}}
	})
	writeTable(rw, &s.tokens, func(r *commandv1.Token) *commandv1.SnapshotRecord {
		return &commandv1.SnapshotRecord{Record: &commandv1.SnapshotRecord_Token{Token: r}}
	})
	writeTable(rw, &s.policies, func(r *commandv1.Policy) *commandv1.SnapshotRecord {
		return &commandv1.SnapshotRecord{Record: &commandv1.SnapshotRecord_Policy{Policy: r}}
	})
	writeTable(rw, &s.leases, func(r *commandv1.Lease) *commandv1.SnapshotRecord {
		return &commandv1.SnapshotRecord{Record: &commandv1.SnapshotRecord_Lease{Lease: r}}
	})
	rw.put(&commandv1.SnapshotRecord{Record: &commandv1.SnapshotRecord_Trailer{Trailer: &commandv1.SnapshotTrailer{
		Records: rw.records, Crc32C: rw.crc,
	}}})
	if rw.err != nil {
		return rw.err
	}
	return buf.Flush()
}

func writeTable[V any](w *recordWriter, t *table[V], wrap func(V) *commandv1.SnapshotRecord) {
	t.Scan(func(_ string, v V) bool {
		w.put(wrap(v))
		return w.err == nil
	})
}

// recordWriter frames records and keeps the checksum of all before the current one.
type recordWriter struct {
	w       io.Writer
	buf     []byte
	crc     uint32
	records uint64
	err     error
}

func (w *recordWriter) put(r *commandv1.SnapshotRecord) {
	if w.err != nil {
		return
	}
	// Deterministic orders the entries of maps; fields are in the order of their numbers.
	opts := proto.MarshalOptions{Deterministic: true}
	w.buf = binary.AppendUvarint(w.buf[:0], uint64(opts.Size(r)))
	if w.buf, w.err = opts.MarshalAppend(w.buf, r); w.err != nil {
		return
	}
	w.crc = crc32.Update(w.crc, castagnoli, w.buf)
	w.records++
	_, w.err = w.w.Write(w.buf)
}

// Restore replaces the state by a snapshot's. A snapshot that is damaged, newer than this program, or older than the
// state is refused, and the state stays as it was; only one that an operator's restore made (Rebase) may be older.
// raft calls it, never beside Apply.
func (f *FSM) Restore(in io.ReadCloser) error {
	s, h, err := readSnapshot(in)
	err = errors.Join(err, in.Close())
	if err != nil {
		return err
	}
	f.mu.Lock()
	if s.index < f.s.index && !h.GetOperatorRestore() {
		defer f.mu.Unlock()
		return fault.New(fault.Stale, "restore snapshot", "", "it is at index %d, and the state at %d already: "+
			"going back would undo what was acknowledged", s.index, f.s.index)
	}
	f.s = s
	for _, w := range f.witnesses {
		w.Replaced(&View{s: s.copy()})
	}
	f.publish()
	for _, o := range f.observers {
		o.Restored(s.index)
	}
	f.mu.Unlock()
	return nil
}

func corrupt(format string, args ...any) error {
	return fault.New(fault.Corrupt, "read snapshot", "", format, args...)
}

// readSnapshot reads and checks a whole stream.
func readSnapshot(in io.Reader) (*state, *commandv1.SnapshotHeader, error) {
	r := &recordReader{r: bufio.NewReaderSize(in, 1<<16)}
	rec, _, err := r.next()
	if err != nil {
		return nil, nil, err
	}
	h := rec.GetHeader()
	switch {
	case h == nil:
		return nil, nil, corrupt("it does not begin with a header")
	case h.GetFormat() > SnapshotFormat:
		return nil, nil, fault.New(fault.Invalid, "read snapshot", "",
			"its format is %d and this program reads up to %d: upgrade rollcall first", h.GetFormat(), SnapshotFormat)
	case h.GetFormat() == 0:
		return nil, nil, corrupt("its header names no format")
	}
	l := &loader{s: newState()}
	l.s.index, l.s.term, l.s.clock = h.GetIndex(), h.GetTerm(), h.GetClockNs()
	l.s.clusterID, l.s.clusterName, l.s.auditSalt = h.GetClusterId(), h.GetClusterName(), string(h.GetAuditSalt())
	l.s.keyTerm, l.s.keyTermMS = h.GetKeyTerm(), h.GetKeyTermWallMs()
	l.s.restoring = h.GetOperatorRestore()
	for {
		rec, before, err := r.next()
		if err != nil {
			return nil, nil, err
		}
		if t := rec.GetTrailer(); t != nil {
			if t.GetRecords() != r.records-1 || t.GetCrc32C() != before {
				return nil, nil, corrupt("the checksum or the number of records is wrong")
			}
			if _, err := r.r.ReadByte(); !errors.Is(err, io.EOF) {
				return nil, nil, corrupt("there is more after its trailer")
			}
			return l.s, h, nil
		}
		if err := l.add(rec); err != nil {
			return nil, nil, err
		}
	}
}

type recordReader struct {
	r       *bufio.Reader
	crc     uint32
	records uint64
	buf     []byte
}

// next reads a record, and answers the checksum of everything before it.
func (r *recordReader) next() (*commandv1.SnapshotRecord, uint32, error) {
	n, err := binary.ReadUvarint(r.r)
	if err != nil {
		return nil, 0, corrupt("it ends before its trailer: %w", err)
	}
	if n > maxRecord {
		return nil, 0, corrupt("a record of %d bytes is longer than any can be", n)
	}
	// Grows with what is really there, so that a wrong length costs no memory.
	r.buf = r.buf[:0]
	for uint64(len(r.buf)) < n {
		have := len(r.buf)
		r.buf = append(r.buf, make([]byte, min(n-uint64(have), 1<<16))...)
		if _, err := io.ReadFull(r.r, r.buf[have:]); err != nil {
			return nil, 0, corrupt("it ends inside a record: %w", err)
		}
	}
	rec := &commandv1.SnapshotRecord{}
	if err := proto.Unmarshal(r.buf, rec); err != nil {
		return nil, 0, corrupt("a record is no record: %w", err)
	}
	before := r.crc
	r.crc = crc32.Update(r.crc, castagnoli, binary.AppendUvarint(nil, n))
	r.crc = crc32.Update(r.crc, castagnoli, r.buf)
	r.records++
	return rec, before, nil
}

// loader fills a state, and insists on the order that Persist writes in: what is out of order was not written by it.
type loader struct {
	s     *state
	table int
	key   string
}

func (l *loader) order(table int, k string) error {
	if table < l.table || table == l.table && k <= l.key {
		return corrupt("record %q of table %d is out of order", trim(k, maxName), table)
	}
	l.table, l.key = table, k
	return nil
}

func (l *loader) add(rec *commandv1.SnapshotRecord) error {
	s := l.s
	switch r := rec.GetRecord().(type) {
	case *commandv1.SnapshotRecord_Node:
		s.putNode(r.Node)
		return l.order(1, r.Node.GetId())
	case *commandv1.SnapshotRecord_Plugin:
		k := pluginKey(r.Plugin.GetSpec().GetType(), r.Plugin.GetSpec().GetName(), r.Plugin.GetSpec().GetVersion())
		s.plugins.Set(k, r.Plugin)
		return l.order(2, k)
	case *commandv1.SnapshotRecord_Pin:
		k := key(r.Pin.GetType(), r.Pin.GetName())
		s.pins.Set(k, r.Pin)
		return l.order(3, k)
	case *commandv1.SnapshotRecord_Namespace:
		s.namespaces.Set(r.Namespace.GetPath(), r.Namespace)
		return l.order(4, r.Namespace.GetPath())
	case *commandv1.SnapshotRecord_Mount:
		s.putMount(r.Mount)
		return l.order(5, r.Mount.GetUuid())
	case *commandv1.SnapshotRecord_Storage:
		k := key(r.Storage.GetMountUuid(), r.Storage.GetKey())
		s.storage.Set(k, r.Storage)
		return l.order(6, k)
	case *commandv1.SnapshotRecord_Reload:
		s.putReload(r.Reload)
		return l.order(7, r.Reload.GetId())
	case *commandv1.SnapshotRecord_ReloadId:
		s.putReloadID(r.ReloadId)
		return l.order(8, r.ReloadId.GetId())
	case *commandv1.SnapshotRecord_Token:
		s.putToken(r.Token)
		return l.order(9, string(r.Token.GetHash()))
	case *commandv1.SnapshotRecord_Policy:
		k := key(r.Policy.GetNamespace(), r.Policy.GetName())
		s.policies.Set(k, r.Policy)
		return l.order(10, k)
	case *commandv1.SnapshotRecord_Lease:
		s.putLease(r.Lease)
		return l.order(11, r.Lease.GetId())
	default:
		return corrupt("a record of a kind that this program does not know")
	}
}
