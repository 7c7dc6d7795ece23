package router

import (
	"context"
	"strings"
	"sync"
	"sync/atomic"

	commandv1 "rollcall/proto/command/v1"
	pluginpb "rollcall/proto/plugin"
)

// instance is one plugin backend set up for one role behind a mount's gate. A role change in the same process makes
// another instance of the same backend.
type instance struct {
	refs    refs
	backend Backend
	// leader never changes; the leader's term does when the instance goes on under another one.
	leader bool
	term   atomic.Uint64
	store  *store
	paths  *specialPaths
	life   *life
	// base is the index of the state that the instance was set up on.
	base uint64
	// wanted is replaced when the instance is relabelled. The instances of one process share it, so that a relabelling
	// is not lost to a set-up that is under way.
	wanted *atomic.Pointer[commandv1.Wanted]

	mu    sync.Mutex
	calls map[*call]struct{}
}

// life is shared by the instances of one process.
type life struct {
	once sync.Once
	over chan struct{}
	why  error
}

// call is one request inside an instance.
type call struct {
	cancel context.CancelCauseFunc
}

func newInstance(b Backend, w *commandv1.Wanted, role Role, st *store, l *life) *instance {
	in := &instance{
		refs: newRefs(), backend: b, leader: role.Leader, store: st, life: l, calls: map[*call]struct{}{},
		wanted: &atomic.Pointer[commandv1.Wanted]{},
	}
	in.term.Store(role.Term)
	in.wanted.Store(w)
	return in
}

func newLife() *life { return &life{over: make(chan struct{})} }

func (l *life) end(why error) {
	l.once.Do(func() {
		l.why = why
		close(l.over)
	})
}

func (l *life) dead() bool {
	select {
	case <-l.over:
		return true
	default:
		return false
	}
}

func (in *instance) release() { in.refs.Add(-1) }

func (in *instance) role() Role { return Role{Leader: in.leader, Term: in.term.Load()} }

func (in *instance) generation() uint64 { return in.wanted.Load().GetGeneration() }

// admit makes a call cancelable by the gate; leave ends it.
func (in *instance) admit(ctx context.Context) (context.Context, *call) {
	ctx, cancel := context.WithCancelCause(ctx)
	c := &call{cancel: cancel}
	in.mu.Lock()
	in.calls[c] = struct{}{}
	in.mu.Unlock()
	return ctx, c
}

func (in *instance) leave(c *call) {
	in.mu.Lock()
	delete(in.calls, c)
	in.mu.Unlock()
	c.cancel(nil)
}

func (in *instance) inFlight() int {
	in.mu.Lock()
	defer in.mu.Unlock()
	return len(in.calls)
}

// cancelAll ends every call with a cause, and answers how many there were.
func (in *instance) cancelAll(why error) int {
	in.mu.Lock()
	defer in.mu.Unlock()
	for c := range in.calls {
		c.cancel(why)
	}
	return len(in.calls)
}

// specialPaths are the paths that a plugin treats apart (CONTRACT 6.5).
type specialPaths struct {
	root, open pathSet
}

// pathSet matches exact paths, "prefix*", and "+" for one segment.
type pathSet struct {
	exact    map[string]bool
	prefixes []string
	wild     []wildPath
}

type wildPath struct {
	segments []string
	prefix   bool
}

func newSpecialPaths(p *pluginpb.Paths) *specialPaths {
	return &specialPaths{root: newPathSet(p.GetRoot()), open: newPathSet(p.GetUnauthenticated())}
}

func newPathSet(paths []string) pathSet {
	s := pathSet{exact: map[string]bool{}}
	for _, p := range paths {
		body, prefix := strings.CutSuffix(p, "*")
		switch {
		case strings.Contains(p, "+"):
			s.wild = append(s.wild, wildPath{segments: strings.Split(body, "/"), prefix: prefix})
		case prefix:
			s.prefixes = append(s.prefixes, body)
		default:
			s.exact[p] = true
		}
	}
	return s
}

func (s *pathSet) match(path string) bool {
	if s.exact[path] {
		return true
	}
	for _, p := range s.prefixes {
		if strings.HasPrefix(path, p) {
			return true
		}
	}
	if len(s.wild) == 0 {
		return false
	}
	segments := strings.Split(path, "/")
	for _, w := range s.wild {
		if w.match(segments) {
			return true
		}
	}
	return false
}

// match compares segment by segment; the last one of a prefix pattern need only begin the path's.
func (w wildPath) match(path []string) bool {
	if len(path) < len(w.segments) || !w.prefix && len(path) != len(w.segments) {
		return false
	}
	for i, want := range w.segments {
		last := w.prefix && i == len(w.segments)-1
		switch {
		case want == "+" && path[i] != "":
		case last && strings.HasPrefix(path[i], want):
		case want == path[i]:
		default:
			return false
		}
	}
	return true
}
