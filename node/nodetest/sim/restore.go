package sim

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"rollcall/node/api"
	"rollcall/node/nodetest/check"
)

// A restore takes away what was acknowledged after the save, as it should. So that the history can be judged across it, the
// operator holds the clients before the save and lets them go on when it is known what became of the restore. Only a scratch
// value, which is in no history, is written in between, and tells. Faults go on meanwhile.

// scratch begins the keys of the main mount that tell whether a restore has happened.
const scratch = "scratch"

// restoreFault is the kind under which a restore stands in the journal of faults.
const restoreFault = "operator restore"

// gate is what clients pass before each call. It is no lock: nobody holds one over a wait here.
type gate struct {
	mu     sync.Mutex
	shut   chan struct{} // nil while it is open; closed when it opens again
	inside int
	idle   chan struct{} // closed when the last one inside leaves
}

// enter waits until the gate is open; false when the load ended first.
func (g *gate) enter(ended <-chan struct{}) bool {
	for {
		g.mu.Lock()
		shut := g.shut
		if shut == nil {
			g.inside++
			g.mu.Unlock()
			return true
		}
		g.mu.Unlock()
		select {
		case <-shut:
		case <-ended:
			return false
		}
	}
}

func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.inside--; g.inside == 0 && g.idle != nil {
		close(g.idle)
		g.idle = nil
	}
}

// hold shuts the gate and waits until nobody is inside. It opens it again when that takes too long.
func (g *gate) hold(within time.Duration) bool {
	g.mu.Lock()
	g.shut = make(chan struct{})
	if g.inside == 0 {
		g.mu.Unlock()
		return true
	}
	idle := make(chan struct{})
	g.idle = idle
	g.mu.Unlock()
	t := time.NewTimer(within)
	defer t.Stop()
	select {
	case <-idle:
		return true
	case <-t.C:
		g.open()
		return false
	}
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	close(g.shut)
	g.shut, g.idle = nil, nil
}

// restore is one that was asked for.
type restore struct {
	key string
	// generation is that of the mount before.
	generation uint64
	sent       time.Time
	at         int64 // the same on the record's clock
	outcome    check.Outcome
	// over says that nobody works on it any more, whatever has become of it.
	over bool
}

// restoreLimit is how long a node may work on a restore after the client has gone.
const restoreLimit = 5*time.Minute + 10*time.Second

// saveAndRestore saves the cluster's state and puts it back, when no reload runs.
func (o *operator) saveAndRestore() {
	if !o.quiet(0) {
		return
	}
	o.outside()
	if !o.c.gate.hold(2 * patience) {
		return
	}
	defer o.c.gate.open()
	before, ok := o.phases()
	if !ok || !o.quiet(20*time.Second) {
		return
	}
	saved, err := o.ask(o.any(), http.MethodGet, "sys/storage/raft/snapshot", o.c.token, nil)
	if told(saved, err) != nil {
		return
	}
	o.tries++ // one that came to nothing leaves its key behind
	r := &restore{key: fmt.Sprintf("%s-%d", scratch, o.tries)}
	a, err := o.ask(o.any(), http.MethodPut, mainMount+r.key, o.c.token, map[string]string{"value": "after the save"})
	if told(a, err) != nil {
		return
	}
	r.generation, _ = strconv.ParseUint(a.header.Get(api.HeaderGeneration), 10, 64)
	if now, ok := o.phases(); !ok || !slices.Equal(before, now) || !o.c.loading() {
		return // a start whose outcome nobody knew
	}
	o.saved = append(o.saved, r)
	o.restore(r, saved.body)
	if !r.over {
		o.wait(r, o.c.ended)
	}
}

// loading reports whether the load goes on.
func (c *cluster) loading() bool {
	select {
	case <-c.ended:
		return false
	default:
		return true
	}
}

// restore asks for it, of the leader or of any other node.
func (o *operator) restore(r *restore, backup []byte) {
	node, path := o.any(), "sys/storage/raft/snapshot"
	if l := o.c.leader(); l != nil && o.rng.IntN(3) > 0 {
		node = l.name
	}
	if o.rng.IntN(3) == 0 {
		path += "-force"
	}
	ctx, cancel := context.WithTimeout(context.Background(), restoreLimit)
	defer cancel()
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-o.c.ended:
			cancel()
		case <-stop:
		}
	}()
	if o.rng.IntN(3) == 0 { // in the middle of it
		after, rng := between(o.rng, 0, 40*time.Millisecond), rngOf(o.c.opt.Seed, r.key)
		var struck sync.WaitGroup
		defer struck.Wait()
		struck.Go(func() {
			time.Sleep(after)
			o.strike("leader lost at a restore", rng)
		})
	}
	r.sent, r.at = time.Now(), o.c.rec.Now()
	a, err := o.send(ctx, node, http.MethodPost, path, o.c.token, backup)
	cause := ""
	r.outcome, cause = outcome(a, err)
	r.over = err == nil || r.outcome == check.Failed
	o.c.rec.Fault(restoreFault, node, string(r.outcome))()
	o.c.note("restore %s through %s: %s %s", r.key, node, r.outcome, cause)
}

// wait waits until nobody can be at work on a restore any more: a node shows its state, or its time is over.
func (o *operator) wait(r *restore, ended <-chan struct{}) {
	for time.Since(r.sent) < restoreLimit {
		if _, gone := o.shows(r, o.c.members()); gone > 0 {
			r.over = true
			return
		}
		select {
		case <-time.After(time.Second):
		case <-ended:
			return
		}
	}
	r.over = true
}

// shows counts the nodes that still have a restore's scratch value, and those that have not.
func (o *operator) shows(r *restore, at []*member) (there, gone int) {
	for _, m := range at {
		a, err := o.ask(m.name, http.MethodGet, mainMount+r.key, o.c.token, nil)
		switch {
		case err != nil:
		case a.status == http.StatusNotFound && a.header.Get(api.HeaderNode) != "":
			gone++
		case a.status < 300:
			there++
		}
	}
	return there, gone
}

// restoreEnds waits for a restore that was under way when the load ended.
func (o *operator) restoreEnds() {
	for _, r := range o.saved {
		if !r.over {
			o.wait(r, nil)
		}
	}
}

// scratches looks at the end what became of each restore: on all nodes the same, and what was answered.
func (o *operator) scratches() {
	for _, r := range o.saved {
		all := o.c.members()
		var there, gone int
		for range 3 { // an answer may be "not now" while leadership settles
			if there, gone = o.shows(r, all); there+gone == len(all) {
				break
			}
			time.Sleep(time.Second)
		}
		o.c.note("restore %s: %s, there on %d, gone on %d", r.key, r.outcome, there, gone)
		switch {
		case there+gone < len(all):
			o.c.bad("%s is read on %d of %d nodes at the end", r.key, there+gone, len(all))
		case there > 0 && gone > 0:
			o.c.bad("after a restore (%s) %s is there on %d nodes and not on %d", r.outcome, r.key, there, gone)
		case there > 0 && r.outcome == check.OK:
			o.c.bad("a restore was acknowledged, and %s is still there", r.key)
		case gone > 0 && r.outcome == check.Failed:
			o.c.bad("a restore was said not to have happened, and %s is gone", r.key)
		case gone > 0 && !o.movedFor(r):
			o.c.bad("after the restore that took %s away nobody has set the plugins up again: the mount kept generation %d", r.key, r.generation)
		}
	}
}

// movedFor reports whether the mount got a new generation for a restore.
func (o *operator) movedFor(r *restore) bool {
	return slices.ContainsFunc(o.c.rec.Run().Events, func(e check.Event) bool {
		return e.Kind == check.Wanted && e.Mount == mainMount && e.Reload == "" && e.Of == "" && e.At > r.at && e.Generation > r.generation
	})
}

// quiet waits until no reload is on its way.
func (o *operator) quiet(within time.Duration) bool {
	for end := time.Now().Add(within); ; time.Sleep(500 * time.Millisecond) {
		ids, _, ok := o.running()
		if ok && len(ids) == 0 {
			return true
		}
		if !time.Now().Before(end) || !o.c.loading() {
			return false
		}
	}
}

// phases are the reloads and how far they are, as a node tells.
func (o *operator) phases() ([]string, bool) {
	all, ok := o.reloads()
	var out []string
	for _, r := range all {
		out = append(out, r.ID+" "+r.Phase)
	}
	return out, ok
}
