package router

import (
	"context"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"rollcall/node/fault"
	"rollcall/node/supervisor"
	commandv1 "rollcall/proto/command/v1"
)

// Limits of what one entry may carry; the state machine refuses more.
const (
	maxValue        = 1 << 20
	maxKey          = 4096
	maxOverlayKeys  = 1000
	maxOverlayBytes = 8 << 20
)

// readOnlyText must stand in the error word for word: plugins of both SDKs look for it (PLUGINHOST section 2).
const readOnlyText = "cannot write to readonly storage"

// phase says what becomes of a plugin's writes.
type phase uint8

const (
	// trying: into an overlay that nobody will ever commit.
	trying phase = iota
	// collecting: into an overlay that the TakeOver entry will commit.
	collecting
	// waiting: they wait for what becomes of a switch.
	waiting
	// live: each is an entry of its own under the mount's epoch.
	live
	// following: refused, for the leader's instance is the one that writes.
	following
	// retired: refused, for another instance has taken over.
	retired
)

// store is a plugin's view of its mount's storage. One object serves an instance from its Setup on: a trial's, a
// follower's, or a leader's, which collects first and becomes live when its TakeOver is applied. Keys are confined to
// the mount by its uuid. All methods may be called from any goroutine.
type store struct {
	uuid string
	view func() View
	// write proposes one storage entry as leader of term.
	write func(ctx context.Context, term uint64, w *commandv1.WriteStorage) (*commandv1.Result, error)
	// lost is told, at most once an epoch, that a live store's epoch is no longer the mount's. It must not block.
	lost func(*store)

	mu      sync.Mutex
	phase   phase
	changed chan struct{}
	// over is the overlay: what was written since Setup; an op with delete hides the key below.
	over  map[string]*commandv1.StorageOp
	bytes int
	epoch uint64
	term  uint64
	// writing counts entries on their way; still is closed when it comes to zero while somebody waits for that.
	writing int
	still   chan struct{}
	told    bool

	// last is the index of the newest entry that this store wrote.
	last atomic.Uint64
	// refused counts writes that a follower's plugin tried, shaken those that were lost to a change of leader or epoch.
	refused, shaken atomic.Uint64
	// unsure is set once a write was given up while it was on its way: it may be applied at any moment.
	unsure atomic.Bool
}

var _ supervisor.Storage = (*store)(nil)

func newStore(uuid string, p phase, view func() View) *store {
	s := &store{uuid: uuid, view: view, phase: p, changed: make(chan struct{})}
	if p == trying || p == collecting {
		s.over = map[string]*commandv1.StorageOp{}
	}
	return s
}

// become moves the store to another phase and wakes the writes that wait. Called with mu held.
func (s *store) become(p phase) {
	s.phase = p
	close(s.changed)
	s.changed = make(chan struct{})
}

func checkKey(key string) error {
	switch {
	case len(key) > maxKey:
		return fault.Text(fault.TooLarge, "a storage key of %d bytes is longer than %d", len(key), maxKey)
	case strings.Contains(key, ".."):
		return fault.Text(fault.Invalid, "relative paths not supported")
	case strings.IndexByte(key, 0) >= 0:
		return fault.Text(fault.Invalid, "a storage key cannot hold a zero byte")
	}
	return nil
}

// Get returns the entry, or nil when there is none.
func (s *store) Get(_ context.Context, key string) (*supervisor.Entry, error) {
	if err := checkKey(key); err != nil {
		return nil, err
	}
	s.mu.Lock()
	op, ok := s.over[key]
	s.mu.Unlock()
	if ok {
		if op.GetDelete() {
			return nil, nil
		}
		return &supervisor.Entry{Key: key, Value: op.GetValue(), SealWrap: op.GetSealWrap()}, nil
	}
	e := s.view().StorageGet(s.uuid, key)
	if e == nil {
		return nil, nil
	}
	return &supervisor.Entry{Key: key, Value: e.GetValue(), SealWrap: e.GetSealWrap()}, nil
}

// List returns the direct children of prefix, sorted; folders end in "/".
func (s *store) List(_ context.Context, prefix string) ([]string, error) {
	if err := checkKey(prefix); err != nil {
		return nil, err
	}
	if prefix != "" && !strings.HasSuffix(prefix, "/") {
		prefix += "/"
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.view()
	below := v.StorageList(s.uuid, prefix)
	if len(s.over) == 0 {
		return below, nil
	}
	has := make(map[string]bool, len(below))
	for _, k := range below {
		has[k] = true
	}
	for k, op := range s.over {
		rest, ok := strings.CutPrefix(k, prefix)
		if !ok || rest == "" {
			continue
		}
		if i := strings.IndexByte(rest, '/'); i >= 0 {
			rest = rest[:i+1]
		}
		has[rest] = !op.GetDelete() || strings.HasSuffix(rest, "/") && s.holds(v, prefix+rest)
	}
	out := make([]string, 0, len(has))
	for k, there := range has {
		if there {
			out = append(out, k)
		}
	}
	slices.Sort(out)
	return out, nil
}

// holds reports whether the folder holds any key, with the overlay over what is below.
func (s *store) holds(v View, folder string) bool {
	for k, op := range s.over {
		if !op.GetDelete() && strings.HasPrefix(k, folder) {
			return true
		}
	}
	for _, k := range v.StorageList(s.uuid, folder) {
		switch {
		case strings.HasSuffix(k, "/"):
			if s.holds(v, folder+k) {
				return true
			}
		case s.over[folder+k] == nil:
			return true
		}
	}
	return false
}

// Put writes an entry. On the leader it returns when the write is applied here.
func (s *store) Put(ctx context.Context, e *supervisor.Entry) error {
	if e == nil {
		return fault.Text(fault.Invalid, "there is no storage entry to write")
	}
	if len(e.Value) > maxValue {
		// The words are those of Vault's and OpenBao's storage: types do not survive the way through the plugin.
		return fault.Text(fault.TooLarge, "put failed due to value being too large: %q has %d bytes, and %d is the limit for one storage entry",
			e.Key, len(e.Value), maxValue)
	}
	return s.do(ctx, &commandv1.StorageOp{Key: e.Key, Value: e.Value, SealWrap: e.SealWrap})
}

// Delete removes an entry, if it is there.
func (s *store) Delete(ctx context.Context, key string) error {
	return s.do(ctx, &commandv1.StorageOp{Key: key, Delete: true})
}

func (s *store) do(ctx context.Context, op *commandv1.StorageOp) error {
	if op.GetKey() == "" {
		return fault.Text(fault.Invalid, "a storage key cannot be empty")
	}
	if err := checkKey(op.GetKey()); err != nil {
		return err
	}
	s.mu.Lock()
	for s.phase == waiting {
		changed := s.changed
		s.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return fault.As(fault.KindOf(ctx.Err()), ctx.Err(), "wait for a switch to write", op.GetKey())
		}
		s.mu.Lock()
	}
	switch s.phase {
	case trying, collecting:
		defer s.mu.Unlock()
		return s.keep(op)
	case following:
		s.mu.Unlock()
		s.refused.Add(1)
		return fault.Text(fault.ReadOnly, readOnlyText)
	case retired:
		s.mu.Unlock()
		s.shaken.Add(1)
		return fault.Text(fault.Stale, "write %q: another instance of the plugin has taken the mount over", op.GetKey())
	default: // live, or an answer that was waited for: the log decides
	}
	s.writing++
	w := &commandv1.WriteStorage{
		MountUuid: s.uuid, Epoch: s.epoch, Term: s.term, Ops: []*commandv1.StorageOp{op},
	}
	s.mu.Unlock()
	res, err := s.write(ctx, w.GetTerm(), w)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.writing--
	if s.writing == 0 && s.still != nil {
		close(s.still)
		s.still = nil
	}
	if err != nil {
		switch fault.KindOf(err) {
		case fault.Invalid, fault.TooLarge:
			// Nothing moved: the plugin asked for what cannot be.
		default:
			s.shaken.Add(1)
			if !fault.KindOf(err).Safe() && !fault.Is(err, fault.Stale) {
				s.unsure.Store(true)
			}
		}
		if fault.Is(err, fault.Stale) && s.phase == live && !s.told && s.lost != nil {
			s.told = true
			s.lost(s)
		}
		return fault.Wrap(err, "write", op.GetKey())
	}
	raise(&s.last, res.GetIndex())
	return nil
}

// keep puts op into the overlay. Called with mu held.
func (s *store) keep(op *commandv1.StorageOp) error {
	size := len(op.GetKey()) + len(op.GetValue())
	was := 0
	old := s.over[op.GetKey()]
	if old != nil {
		was = len(old.GetKey()) + len(old.GetValue())
	} else if len(s.over) >= maxOverlayKeys {
		return fault.Text(fault.Exhausted, "the plugin wrote more than %d keys while it was set up", maxOverlayKeys)
	}
	if s.bytes-was+size > maxOverlayBytes {
		return fault.Text(fault.Exhausted, "the plugin wrote more than %d bytes while it was set up", maxOverlayBytes)
	}
	s.bytes += size - was
	s.over[op.GetKey()] = op
	return nil
}

// seal ends the collecting: writes wait from now on, and what was collected is returned in key order.
func (s *store) seal() []*commandv1.StorageOp {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.become(waiting)
	ops := make([]*commandv1.StorageOp, 0, len(s.over))
	for _, op := range s.over {
		ops = append(ops, op)
	}
	slices.SortFunc(ops, func(a, b *commandv1.StorageOp) int { return strings.Compare(a.GetKey(), b.GetKey()) })
	return ops
}

// enliven makes the store the mount's writer: its TakeOver is applied at epoch, and the overlay is in the state.
func (s *store) enliven(epoch, term uint64, wrote bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over, s.bytes = nil, 0
	s.epoch, s.term, s.told = epoch, term, false
	if wrote {
		raise(&s.last, epoch)
	}
	s.become(live)
}

// pause makes writes wait, and returns when none is on its way any more. Its error is that of ctx; then it has not
// paused.
func (s *store) pause(ctx context.Context) error {
	s.mu.Lock()
	if s.phase != live {
		s.mu.Unlock()
		return nil
	}
	s.become(waiting)
	var still chan struct{}
	if s.writing > 0 {
		still = make(chan struct{})
		s.still = still
	}
	s.mu.Unlock()
	if still == nil {
		return nil
	}
	select {
	case <-still:
		return nil
	case <-ctx.Done():
		s.resume()
		return fault.As(fault.Deadline, context.Cause(ctx), "wait for writes on their way to", s.uuid)
	}
}

// resume ends a pause under the same epoch.
func (s *store) resume() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.phase == waiting {
		s.become(live)
	}
}

// retire refuses every further write.
func (s *store) retire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over, s.bytes = nil, 0
	s.become(retired)
}

// owns reports whether the store writes under an epoch of its own.
func (s *store) owns() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.phase == live
}

// raise lifts a to at least v.
func raise(a *atomic.Uint64, v uint64) {
	for {
		have := a.Load()
		if have >= v || a.CompareAndSwap(have, v) {
			return
		}
	}
}

// writeLimit bounds one storage entry on its way, for plugins that write without a deadline.
const writeLimit = 30 * time.Second
