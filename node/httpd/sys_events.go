package httpd

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	commandv1 "rollcall/proto/command/v1"

	"rollcall/fsm"
	"rollcall/node/api"
	"rollcall/node/fault"
	"rollcall/node/policy"
)

// Bounds of the event streams.
const (
	// maxStreams is how many streams a node serves at a time.
	maxStreams = 256
	// eventComment is the longest silence of a stream, and how often its token is looked at again. Clients take a stream
	// that is silent for a minute for dead.
	eventComment = 15 * time.Second
	// eventPause is the shortest time between two looks at the state: what changes faster is told together.
	eventPause = 50 * time.Millisecond
	// eventWrite is how long a client may take to accept what it is sent before it is cut off.
	eventWrite = 30 * time.Second
)

// streams are the event streams that this node serves.
type streams struct {
	mu    sync.Mutex
	n     int
	over  bool
	ended chan struct{}
}

func (st *streams) enter() (ended <-chan struct{}, err error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	switch {
	case st.over:
		return nil, fault.Text(fault.Unavailable, "this node is stopping: follow the events of another one")
	case st.n >= maxStreams:
		return nil, fault.Text(fault.Exhausted, "this node serves %d event streams already: follow another node's", maxStreams)
	}
	if st.ended == nil {
		st.ended = make(chan struct{})
	}
	st.n++
	return st.ended, nil
}

func (st *streams) leave() {
	st.mu.Lock()
	st.n--
	st.mu.Unlock()
}

// EndStreams ends every event stream and lets no new one begin. The HTTP server calls it when it shuts down, for it waits
// for its requests and a stream ends by nothing else.
func (s *Server) EndStreams() {
	st := &s.streams
	st.mu.Lock()
	defer st.mu.Unlock()
	if !st.over && st.ended != nil {
		close(st.ended)
	}
	st.over = true
}

func (s *Server) eventRoutes() []*route {
	return []*route{{
		pattern: "sys/events", ours: true, anyNode: true, ops: map[operation]handler{opRead: s.events},
		summary: "What changes, as server-sent events: reloads, mounts, nodes, the leader. reload_id follows one reload. " +
			"Last-Event-ID resumes, through any node.",
	}}
}

// events answers with a stream. Nothing is buffered: each look at the state is held against the one before, so a slow
// reader is told less often and never less than how things are. The id of an event is the index of the entry that made the
// change. It means the same on every node, which is why a stream can be resumed anywhere: what changed after the id is told
// as it stands now.
func (s *Server) events(q *request) (*reply, error) {
	f := &follower{s: s, ns: q.ns, reload: q.body.str("reload_id")}
	if q.body.err != nil {
		return nil, q.body.err
	}
	resumed := cmpText(q.http.Header.Get("Last-Event-ID"), q.body.str("last_event_id"))
	view := s.State.View()
	if resumed != "" {
		var err error
		if f.last, err = strconv.ParseUint(resumed, 10, 64); err != nil {
			return nil, fault.Text(fault.Invalid, "Last-Event-ID must be the id of an event, not %q", resumed)
		}
		if f.last > view.Index() { // another node was ahead of this one
			if view, err = s.Replica.Consistent(q.ctx); err != nil {
				return nil, err
			}
		}
		if f.last > view.Index() {
			return nil, fault.Text(fault.Invalid, "no event has the id %d yet: leave Last-Event-ID out to begin now", f.last)
		}
	} else {
		f.last, f.seen, f.leader = view.Index(), view, s.Cluster.Status().LeaderName
	}
	if f.reload != "" && view.Reload(f.reload) == nil && view.ReloadID(f.reload) == nil {
		return nil, unknownReload(view, f.reload)
	}
	ended, err := s.streams.enter()
	if err != nil {
		return nil, err
	}
	return &reply{stream: func(w http.ResponseWriter, r *http.Request) error {
		defer s.streams.leave()
		return f.follow(w, r, ended)
	}}, nil
}

// follower is one stream. It belongs to its request's goroutine.
type follower struct {
	s          *Server
	ns, reload string
	// last is the index up to which everything has been told.
	last   uint64
	seen   *fsm.View
	leader string
}

func (f *follower) follow(w http.ResponseWriter, r *http.Request, ended <-chan struct{}) error {
	out := &eventWriter{w: w, rc: http.NewResponseController(w)}
	_ = out.rc.SetReadDeadline(time.Time{}) // nothing more is read; the server's own deadline would end the stream
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("X-Accel-Buffering", "no")
	w.WriteHeader(http.StatusOK)
	if err := out.comment("from index " + strconv.FormatUint(f.last, 10)); err != nil {
		return nil //nolint:nilerr // the client has gone
	}
	quiet := time.NewTicker(eventComment)
	defer quiet.Stop()
	for {
		changed := f.s.State.Changed()
		if err := out.send(f.news()); err != nil {
			return nil //nolint:nilerr // the client has gone, or reads nothing
		}
		if !pause(r.Context(), ended, eventPause) {
			return nil
		}
		select {
		case <-changed:
			if !f.allowed(r) { // a revocation is an entry, too: the stream ends with its token
				return nil
			}
		case <-quiet.C:
			if !f.allowed(r) {
				return nil
			}
			if err := out.comment("quiet"); err != nil {
				return nil //nolint:nilerr // the client has gone
			}
		case <-r.Context().Done():
			return nil
		case <-ended:
			return nil
		}
	}
}

// allowed reports whether the token still lives and its policies still let it read events.
func (f *follower) allowed(r *http.Request) bool {
	view := f.s.State.View()
	who, err := f.s.authenticate(view, r)
	if err != nil {
		return false
	}
	return f.s.Policies.Allow(view, who, policy.Query{Namespace: f.ns, Path: "sys/events", Need: policy.Read}) == nil
}

func pause(ctx context.Context, ended <-chan struct{}, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
	case <-ended:
	}
	return false
}

// news are the events between what was seen and what is, in the order of their indexes.
func (f *follower) news() []api.Event {
	view := f.s.State.View()
	var list []api.Event
	add := func(e api.Event) {
		if e.Index > f.last {
			list = append(list, e)
		}
	}
	for _, r := range view.Reloads() {
		if r.GetModifyIndex() > f.last && f.wantsReload(r) {
			add(f.reloadEvent(view, r))
		}
	}
	if f.reload == "" {
		f.mountEvents(view, add)
		if f.ns == "" {
			f.nodeEvents(view, add)
		}
	}
	slices.SortStableFunc(list, func(a, b api.Event) int { return cmp.Compare(a.Index, b.Index) })
	now := time.Now().UTC().Format("2006-01-02T15:04:05.000Z")
	for i := range list {
		list[i].Time = now
		// Of several events of one entry the last one carries the id: a stream cut off between them tells them all again.
		if i == len(list)-1 || list[i+1].Index > list[i].Index {
			list[i].ID = strconv.FormatUint(list[i].Index, 10)
		}
	}
	f.last, f.seen = max(f.last, view.Index()), view
	return list
}

func (f *follower) wantsReload(r *commandv1.Reload) bool {
	if f.reload != "" && r.GetId() != f.reload && !slices.Contains(r.GetAliases(), f.reload) {
		return false
	}
	return f.ns == "" || r.GetNamespace() == f.ns
}

// reloadNews is the data of an event of a reload: how it stands, and what has changed of the nodes' parts.
type reloadNews struct {
	Phase   string       `json:"phase"`
	Outcome string       `json:"outcome,omitempty"`
	Why     string       `json:"why,omitempty"`
	Paused  bool         `json:"paused,omitempty"`
	Wave    int          `json:"wave,omitempty"`
	Gate    *api.Gate    `json:"gate,omitempty"`
	Pending []string     `json:"pending"`
	Changed []changedFor `json:"changed,omitempty"`
}

type changedFor struct {
	Node    string `json:"node"`
	Mount   string `json:"mount"`
	State   string `json:"state"`
	Verdict string `json:"verdict,omitempty"`
	Cause   string `json:"cause,omitempty"`
}

func (f *follower) reloadEvent(view *fsm.View, r *commandv1.Reload) api.Event {
	rec := f.s.reloadRecord(view, r)
	news := reloadNews{Phase: rec.Phase, Outcome: rec.Outcome, Why: rec.Why, Paused: rec.Paused, Wave: rec.Wave, Pending: rec.Pending}
	before := &api.Reload{}
	if f.seen != nil {
		if old := f.seen.Reload(r.GetId()); old != nil {
			before = f.s.reloadRecord(f.seen, old)
		}
	}
	said := []string{rec.Phase}
	if before.Phase == rec.Phase && before.Outcome == rec.Outcome {
		said = nil
	}
	if rec.Outcome != "" && rec.Outcome != before.Outcome {
		said = append(said, rec.Outcome)
	}
	if rec.Paused && !before.Paused {
		said = append(said, "paused")
	}
	if rec.Why != "" && rec.Why != before.Why {
		said = append(said, rec.Why)
	}
	if rec.Wave < len(rec.Waves) {
		if news.Gate = rec.Waves[rec.Wave].Gate; news.Gate != nil {
			said = append(said, fmt.Sprintf("gate of wave %d %s: %s", rec.Wave+1, news.Gate.Verdict, news.Gate.Why))
		}
	}
	news.Changed = changesOf(before, rec)
	for _, c := range news.Changed {
		said = append(said, strings.TrimSpace(fmt.Sprintf("%s %s %s %s", c.Node, c.Mount, cmpText(c.Verdict, c.State), c.Cause)))
	}
	return api.Event{
		Type: "reload", ReloadID: r.GetId(), Index: r.GetModifyIndex(), Text: api.Cell(strings.Join(said, "; ")),
		Data: marshal(news),
	}
}

// changesOf lists what is not as it was before of the nodes' parts of a reload.
func changesOf(before, now *api.Reload) []changedFor {
	part := func(n api.ReloadNode, m api.ReloadMount) changedFor {
		return changedFor{Node: n.Node, Mount: m.Mount, State: n.State, Verdict: m.Verdict, Cause: m.Cause}
	}
	known := map[changedFor]bool{}
	for _, n := range before.Nodes {
		for _, m := range n.Mounts {
			known[part(n, m)] = true
		}
	}
	var out []changedFor
	for _, n := range now.Nodes {
		for _, m := range n.Mounts {
			if c := part(n, m); !known[c] {
				out = append(out, c)
			}
		}
	}
	return out
}

// mountEvents tell of mounts that are new, that want another generation, and that have gone. What went while nobody was
// connected leaves no trace in the state and is not told.
func (f *follower) mountEvents(view *fsm.View, add func(api.Event)) {
	for _, m := range view.Mounts() {
		if f.ns != "" && m.GetNamespace() != f.ns {
			continue
		}
		var old *commandv1.Mount
		if f.seen != nil {
			old = f.seen.Mount(m.GetUuid())
		}
		w := m.GetWanted()
		switch e := f.mountEvent(m); {
		case old == m: // records are replaced, never changed
		case f.seen != nil && old == nil:
			e.Text, e.Index = "mounted: "+m.GetType()+" "+w.GetSpec().GetVersion(), w.GetGeneration()
			add(e)
		case old == nil || old.GetWanted().GetGeneration() != w.GetGeneration():
			e.Text, e.Index = "wants "+m.GetType()+" "+w.GetSpec().GetVersion(), w.GetGeneration()
			add(e)
		case old.GetPath() != m.GetPath() || old.GetNamespace() != m.GetNamespace():
			e.Text, e.Index = "moved from "+old.GetNamespace()+displayPath(old), view.Index()
			add(e)
		}
	}
	if f.seen == nil {
		return
	}
	for _, m := range f.seen.Mounts() {
		if view.Mount(m.GetUuid()) == nil && (f.ns == "" || m.GetNamespace() == f.ns) {
			e := f.mountEvent(m)
			e.Text, e.Index = "unmounted", view.Index()
			add(e)
		}
	}
}

func (f *follower) mountEvent(m *commandv1.Mount) api.Event {
	return api.Event{Type: "mount", Mount: m.GetNamespace() + displayPath(m), Data: marshal(map[string]any{
		"accessor": m.GetAccessor(), "plugin": m.GetType(), "version": m.GetWanted().GetSpec().GetVersion(),
		"generation": m.GetWanted().GetGeneration(),
	})}
}

// nodeEvents tell of nodes that said hello, were fenced or left, and of another leader as this node sees it.
func (f *follower) nodeEvents(view *fsm.View, add func(api.Event)) {
	for _, n := range view.Nodes() {
		var old *commandv1.Node
		if f.seen != nil {
			if old = f.seen.Node(n.GetId()); old == n {
				continue
			}
		}
		e := api.Event{Type: "node", Node: n.GetName(), Data: marshal(map[string]any{
			"node_id":     n.GetId(),
			"incarnation": n.GetIncarnation(), "left": n.GetLeft(),
		})}
		if n.GetHelloIndex() > old.GetHelloIndex() {
			e.Text, e.Index = fmt.Sprintf("started (incarnation %d)", n.GetIncarnation()), n.GetHelloIndex()
			add(e)
		}
		if n.GetFenceIndex() > old.GetFenceIndex() {
			e.Text, e.Index = "fenced: it was proven not to serve", n.GetFenceIndex()
			add(e)
		}
		if n.GetLeft() && old != nil && !old.GetLeft() {
			e.Text, e.Index = "left", view.Index()
			add(e)
		}
	}
	if name := f.s.Cluster.Status().LeaderName; name != f.leader && name != "" && view.Index() > f.last {
		f.leader = name
		add(api.Event{
			Type: "leader", Node: name, Text: "leads", Index: view.Index(),
			Data: marshal(map[string]any{"term": view.Term()}),
		})
	}
}

// eventWriter writes text/event-stream, each time within eventWrite.
type eventWriter struct {
	w  http.ResponseWriter
	rc *http.ResponseController
}

func (o *eventWriter) comment(text string) error { return o.put(": " + text + "\n\n") }

func (o *eventWriter) send(list []api.Event) error {
	var b strings.Builder
	for _, e := range list {
		raw, err := json.Marshal(e)
		if err != nil {
			return err
		}
		if e.ID != "" {
			b.WriteString("id: " + e.ID + "\n")
		}
		b.WriteString("event: " + e.Type + "\ndata: " + string(raw) + "\n\n")
	}
	if b.Len() == 0 {
		return nil
	}
	return o.put(b.String())
}

func (o *eventWriter) put(text string) error {
	_ = o.rc.SetWriteDeadline(time.Now().Add(eventWrite))
	if _, err := o.w.Write([]byte(text)); err != nil {
		return err
	}
	return o.rc.Flush()
}
