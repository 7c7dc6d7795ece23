package sim

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"rollcall/node/replica"
)

// disk is what a node's data survives on: log, votes and snapshots, as they would stand on the platter. It outlives the
// boots of its node, each of which works on it through a session of its own.
type disk struct {
	mu sync.Mutex
	// now is what a process reads back; durable is what a loss of power leaves of it. They are one unless lazy.
	now, durable *image
	at           *session
	// write draws how long a write takes, usual how long it takes on a disk that is well.
	write, usual func() time.Duration
	// hung is not nil while nothing is written.
	hung *hanging
	// lazy acknowledges what is not durable yet: a node with Options.NoSync, and what a broken disk does.
	lazy bool
	// inFlight are writes that have been asked for and not acknowledged.
	inFlight map[*func(*image)]struct{}
	// torn says whether a write in flight reaches the platter when the power fails.
	torn func() bool
}

// hanging is a time in which nothing is written: over is closed when the last of those who made it hang lets go.
type hanging struct {
	over  chan struct{}
	holds int
}

func newDisk(write func() time.Duration, torn func() bool) *disk {
	im := newImage()
	return &disk{now: im, durable: im, write: write, usual: write, torn: torn, inFlight: map[*func(*image)]struct{}{}}
}

// open is a boot: the earlier session, if any, is cut off.
func (d *disk) open() *session {
	d.cutOff()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.at = &session{d: d, img: d.now, off: make(chan struct{})}
	return d.at
}

// cutOff takes the disk away from the process that runs, which goes on with a copy that nobody will read. Writes in
// flight are there or not, each as a whole: a transaction of bbolt is one. What was not synced is lost.
func (d *disk) cutOff() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.at == nil {
		return
	}
	private := d.now.clone()
	if d.lazy {
		d.now = d.durable.clone()
		d.durable = d.now.clone()
	}
	for w := range d.inFlight {
		if d.torn() {
			(*w)(d.now)
		}
	}
	clear(d.inFlight)
	d.at.img = private
	close(d.at.off)
	d.at = nil
}

// sync makes everything durable: what a lazy disk does now and then.
func (d *disk) sync() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.lazy {
		d.durable = d.now.clone()
	}
}

// setLazy makes the disk acknowledge before it writes.
func (d *disk) setLazy() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lazy, d.durable = true, d.now.clone()
}

// hang stops every write until the answer is called.
func (d *disk) hang() (release func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.hung == nil {
		d.hung = &hanging{over: make(chan struct{})}
	}
	h := d.hung
	h.holds++
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if h.holds--; h.holds == 0 && d.hung == h {
			d.hung = nil
			close(h.over)
		}
	}
}

// ease ends whatever is wrong with the disk.
func (d *disk) ease() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.write = d.usual
	if d.hung != nil {
		close(d.hung.over)
		d.hung = nil
	}
}

// slow makes writes take as long as draw says, until the answer is called.
func (d *disk) slow(draw func() time.Duration) (heal func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.write = draw
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.write = d.usual
	}
}

// session is one boot's use of a disk.
type session struct {
	d   *disk
	img *image
	off chan struct{} // closed when the disk is taken away
}

var _ replica.Disk = (*session)(nil)

// change is one write: it waits for a hung disk and for the time that a write takes, and then it is there. A session
// that was cut off writes at once, where nobody reads.
func (s *session) change(f func(*image)) {
	s.d.mu.Lock()
	s.d.inFlight[&f] = struct{}{}
	took, hung := s.d.write(), s.d.hung
	s.d.mu.Unlock()
	if hung != nil {
		select {
		case <-hung.over:
		case <-s.off:
		}
	}
	t := time.NewTimer(took)
	defer t.Stop()
	select {
	case <-t.C:
	case <-s.off:
	}
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	delete(s.d.inFlight, &f)
	f(s.img)
}

func (s *session) read(f func(*image)) {
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	f(s.img)
}

// image is the content of a disk. Entries and snapshots are never changed in place.
type image struct {
	logs        map[uint64]*raft.Log
	first, last uint64
	stable      map[string][]byte
	snaps       []*snapshot // newest first
}

func newImage() *image { return &image{logs: map[uint64]*raft.Log{}, stable: map[string][]byte{}} }

func (im *image) clone() *image {
	return &image{
		logs: maps.Clone(im.logs), first: im.first, last: im.last, stable: maps.Clone(im.stable), snaps: slices.Clone(im.snaps),
	}
}

// bounds looks for the first and the last entry again.
func (im *image) bounds() {
	im.first, im.last = 0, 0
	for i := range im.logs {
		if im.first == 0 || i < im.first {
			im.first = i
		}
		im.last = max(im.last, i)
	}
}

func (s *session) FirstIndex() (i uint64, err error) {
	s.read(func(im *image) { i = im.first })
	return i, nil
}

func (s *session) LastIndex() (i uint64, err error) {
	s.read(func(im *image) { i = im.last })
	return i, nil
}

func (s *session) GetLog(index uint64, out *raft.Log) error {
	err := raft.ErrLogNotFound
	s.read(func(im *image) {
		if l := im.logs[index]; l != nil {
			*out, err = *l, nil
		}
	})
	return err
}

func (s *session) StoreLog(log *raft.Log) error { return s.StoreLogs([]*raft.Log{log}) }

func (s *session) StoreLogs(logs []*raft.Log) error {
	kept := make([]*raft.Log, len(logs))
	for i, l := range logs {
		c := *l
		kept[i] = &c
	}
	s.change(func(im *image) {
		for _, l := range kept {
			im.logs[l.Index] = l
			if im.first == 0 || l.Index < im.first {
				im.first = l.Index
			}
			im.last = max(im.last, l.Index)
		}
	})
	return nil
}

func (s *session) DeleteRange(first, last uint64) error {
	s.change(func(im *image) {
		maps.DeleteFunc(im.logs, func(i uint64, _ *raft.Log) bool { return i >= first && i <= last })
		im.bounds()
	})
	return nil
}

// errNotFound has the text that Raft compares.
var errNotFound = errors.New("not found")

func (s *session) Set(key, val []byte) error {
	k, v := string(key), bytes.Clone(val)
	s.change(func(im *image) { im.stable[k] = v })
	return nil
}

func (s *session) Get(key []byte) (val []byte, err error) {
	s.read(func(im *image) {
		v, ok := im.stable[string(key)]
		if val = bytes.Clone(v); !ok {
			err = errNotFound
		}
	})
	return val, err
}

// SetUint64 and GetUint64 are part of the interface; node/replica keeps its numbers through Set and Get.
func (s *session) SetUint64(key []byte, val uint64) error { return s.Set(key, fmt.Append(nil, val)) }

func (s *session) GetUint64(key []byte) (n uint64, err error) {
	v, err := s.Get(key)
	if err == nil {
		_, err = fmt.Sscan(string(v), &n)
	}
	return n, err
}

func (s *session) Snapshots() raft.SnapshotStore { return snapshots{s} }

// Close leaves the disk to whoever opens it next.
func (s *session) Close() error { return nil }

// retained is how many snapshots are kept, as node/replica asks of its own store.
const retained = 2

type snapshot struct {
	meta raft.SnapshotMeta
	body []byte
}

// snapshots is the raft.SnapshotStore of a session.
type snapshots struct{ s *session }

var _ raft.SnapshotStore = snapshots{}

func (n snapshots) Create(version raft.SnapshotVersion, index, term uint64, configuration raft.Configuration,
	configurationIndex uint64, _ raft.Transport,
) (raft.SnapshotSink, error) {
	return &sink{s: n.s, snap: &snapshot{meta: raft.SnapshotMeta{
		ID: fmt.Sprintf("%d-%d-%d", term, index, time.Now().UnixNano()), Version: version, Index: index, Term: term,
		Configuration: configuration, ConfigurationIndex: configurationIndex,
	}}}, nil
}

func (n snapshots) List() (out []*raft.SnapshotMeta, err error) {
	n.s.read(func(im *image) {
		for _, sn := range im.snaps {
			m := sn.meta
			out = append(out, &m)
		}
	})
	return out, nil
}

func (n snapshots) Open(id string) (meta *raft.SnapshotMeta, body io.ReadCloser, err error) {
	err = fmt.Errorf("no snapshot %s", id)
	n.s.read(func(im *image) {
		for _, sn := range im.snaps {
			if sn.meta.ID == id {
				m := sn.meta
				meta, body, err = &m, io.NopCloser(bytes.NewReader(sn.body)), nil
			}
		}
	})
	return meta, body, err
}

// sink takes one snapshot. It is there once Close has returned.
type sink struct {
	s    *session
	snap *snapshot
	buf  bytes.Buffer
	done bool
}

func (k *sink) ID() string                  { return k.snap.meta.ID }
func (k *sink) Write(p []byte) (int, error) { return k.buf.Write(p) }
func (k *sink) Cancel() error               { k.done = true; return nil }

func (k *sink) Close() error {
	if k.done {
		return nil
	}
	k.done = true
	k.snap.body, k.snap.meta.Size = k.buf.Bytes(), int64(k.buf.Len())
	k.s.change(func(im *image) {
		im.snaps = append([]*snapshot{k.snap}, im.snaps...)
		slices.SortStableFunc(im.snaps, func(a, b *snapshot) int {
			if a.meta.Term != b.meta.Term {
				return int(b.meta.Term) - int(a.meta.Term)
			}
			return int(b.meta.Index) - int(a.meta.Index)
		})
		im.snaps = im.snaps[:min(len(im.snaps), retained)]
	})
	return nil
}
