package router

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"rollcall/node/fault"
	"rollcall/node/supervisor"
	commandv1 "rollcall/proto/command/v1"
	pluginpb "rollcall/proto/plugin"
)

// maxTries bounds how often one request changes its way: to another instance after a crash, to the leader, back.
const maxTries = 8

// passage is one request on its way through this node.
type passage struct {
	r    *Router
	rt   *route
	req  *Request
	v    View
	m    *commandv1.Mount
	rest string
	// lane says where it may run; it changes from readLane to writeLane when only the leader's instance can answer.
	lane int

	from       time.Time
	waited     time.Duration
	around     *around
	generation uint64
	forwarded  bool
	// retried counts how often the plugin has been asked again.
	retried int
}

// after says how a passage goes on.
type after uint8

const (
	answered after = iota
	// other: on another instance than this one, for this one has died.
	other
	// again: on whatever instance is behind the gate next.
	again
	// leader: on the leader's instance.
	leader
)

func (r *Router) handle(ctx context.Context, req *Request) (*Response, error) {
	from := time.Now()
	v, m, rest, err := r.find(req.Namespace, req.Path)
	if fault.Is(err, fault.UnsupportedPath) {
		// A node without a lease may be behind, or have no state at all yet: that it knows no mount means nothing.
		if lost := r.cfg.Replica.Serving(); lost != nil {
			return nil, lost
		}
	}
	if err != nil {
		return nil, err
	}
	if until, ok := ctx.Deadline(); !ok || time.Until(until) > r.cfg.RequestTimeout {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, r.cfg.RequestTimeout)
		defer cancel()
	}
	rt := r.route(m.GetUuid())
	return (&passage{r: r, rt: rt, req: req, v: v, m: m, rest: rest, from: from, lane: laneOf(req.Operation, m, rt)}).run(ctx)
}

// run takes the passage to its answer, and measures it.
func (p *passage) run(ctx context.Context) (*Response, error) {
	r, rt, m := p.r, p.rt, p.m
	p.around = rt.meter.arrive()
	resp, err := p.travel(ctx)
	took := time.Since(p.from)
	if !p.forwarded {
		lane := readLane
		if p.writes() {
			lane = writeLane
		}
		rt.meter.done(lane, p.generation, took, damage(err))
		r.metrics.answered(lane, took, p.waited, err)
	}
	rt.meter.leave(p.around, took, p.waited > 0, damage(err))
	if resp != nil {
		resp.Mount = m
	}
	return resp, err
}

// travel finds the way: here, or to the leader, until the request is answered.
func (p *passage) travel(ctx context.Context) (*Response, error) {
	var not *instance
	for try := 0; ; try++ {
		if err := p.lease(); err != nil {
			return nil, err
		}
		role := p.r.cfg.Replica.Role()
		if !role.Leader && p.lane == writeLane {
			resp, err := p.away(ctx)
			if !errors.Is(err, errHere) || try >= maxTries {
				return resp, err
			}
			continue
		}
		in, waited, err := p.rt.gate.enter(ctx, wish{
			lane: p.lane, limit: p.r.cfg.GateWait - p.waited, not: not, elsewhere: p.elsewhere,
			roles: p.r.cfg.Replica.RoleChanged,
		})
		p.waited += waited
		switch {
		case errors.Is(err, errElsewhere) && try < maxTries:
			if p.lane == readLane {
				resp, err := p.away(ctx)
				if !errors.Is(err, errHere) {
					return resp, err
				}
			}
			continue
		case err != nil:
			return nil, err
		}
		if p.lane == writeLane && in.term.Load() != role.Term {
			in.release()
			if err := p.stale(ctx); err != nil {
				return nil, err
			}
			continue
		}
		if p.lane == readLane && !p.mayRead(in) {
			in.release()
			if in.leader || try >= maxTries || !p.rt.awaitOwed(ctx) {
				p.lane = writeLane
			}
			continue
		}
		resp, then, err := p.inside(ctx, in)
		switch {
		case then == answered || try >= maxTries:
			return resp, err
		case then == other:
			not = in
		case then == leader:
			p.lane, not = writeLane, nil
		}
	}
}

// mayRead says whether an instance knows what a read here must show. The leader's is told of no changes, for it makes them: it
// may outlive its office, while its mount is held up in something else, and then the next leader's makes them.
func (p *passage) mayRead(in *instance) bool {
	if in.leader {
		role := p.r.cfg.Replica.Role()
		return role.Leader && in.term.Load() == role.Term
	}
	return p.rt.current()
}

// elsewhere says whether a request that waits at the gate has a better place to go.
func (p *passage) elsewhere(m mode) bool {
	leads := p.r.cfg.Replica.Role().Leader
	if p.lane == writeLane {
		return !leads
	}
	return !leads && p.mayLeave() && (m == away || m == failing)
}

// mayLeave says whether a request may be forwarded at all.
func (p *passage) mayLeave() bool {
	return !p.req.NoForward
}

// stale waits a moment for the instance to be entered under the term that this node leads now.
func (p *passage) stale(ctx context.Context) error {
	from := time.Now()
	_, changed, _ := p.rt.gate.state()
	roles := p.r.cfg.Replica.RoleChanged()
	timer := time.NewTimer(min(p.r.cfg.GateWait, 50*time.Millisecond))
	defer timer.Stop()
	select {
	case <-changed:
	case <-roles:
	case <-timer.C:
	case <-ctx.Done():
		return fault.New(fault.Unavailable, "wait for", p.m.GetPath(), "the leader's instance is not ready: %w", ctx.Err())
	}
	if p.waited += time.Since(from); p.waited > p.r.cfg.GateWait {
		return fault.Text(fault.Unavailable, "the mount's plugin has not taken over on the new leader yet; try again")
	}
	return nil
}

// lease is nil while this node may answer for the mount.
func (p *passage) lease() error {
	if p.m.GetConfig().GetFencing() == "none" {
		return nil
	}
	return p.r.cfg.Replica.Serving()
}

// released makes sure that an answer may still be released: a read's is lost without harm, a write has happened.
func (p *passage) released() error {
	err := p.lease()
	if err == nil || !p.writes() {
		return err
	}
	return fault.New(fault.OutcomeUnknown, "", "",
		"the node lost its serving lease while the request ran: it may have taken effect (%w)", err)
}

// inside runs the request on an instance that it holds a reference to, and gives that back.
func (p *passage) inside(ctx context.Context, in *instance) (*Response, after, error) {
	defer in.release()
	if err := p.lease(); err != nil {
		return nil, answered, err
	}
	if f := p.r.cfg.Admit; f != nil {
		if err := f(p.req); err != nil {
			return nil, answered, err
		}
	}
	p.generation = in.generation()
	resp := &Response{Generation: p.generation, Node: p.r.cfg.NodeName, Index: p.v.Index()}
	if !in.leader {
		resp.Index = max(p.rt.inval.told.Load(), in.base)
	}
	calling, c := in.admit(ctx)
	defer in.leave(c)
	shaken, seen := in.store.shaken.Load(), p.rt.inval.seen.Load()
	err := p.call(calling, in, resp)
	switch {
	case err == nil && errorText(resp.Plugin) == "":
	case err != nil && calling.Err() != nil:
		return p.cut(ctx, calling, resp, err)
	default:
		moved := in.store.shaken.Load() != shaken
		if !in.leader {
			moved = p.rt.inval.seen.Load() != seen
		}
		then, err := p.judge(in, resp, err, moved)
		resp.Plugin = nil
		if lost := p.released(); lost != nil && then == answered && !unrun(err) {
			return resp, then, lost // an error is an answer too
		}
		return resp, then, err
	}
	switch {
	case p.writes():
		resp.wrote = in.store.last.Load()
		resp.Index = max(resp.Index, resp.wrote)
	case p.req.fromPeer:
		resp.wrote = p.r.cfg.State.View().Index() // it can have seen nothing newer
	}
	if err := p.finish(ctx, in, resp); err != nil {
		resp.Plugin = nil
		return resp, answered, err
	}
	return resp, answered, nil
}

// call asks the plugin.
func (p *passage) call(ctx context.Context, in *instance, resp *Response) (err error) {
	req := p.pluginRequest()
	if p.req.Operation == opExists {
		req.Operation = opUpdate
		resp.found, resp.hasCheck, err = in.backend.HandleExistenceCheck(ctx, req)
		return err
	}
	resp.Plugin, err = in.backend.HandleRequest(ctx, req)
	return err
}

// cut tells what has become of a call whose context ended: its own deadline, its client, or the gate.
func (p *passage) cut(ctx, calling context.Context, resp *Response, err error) (*Response, after, error) {
	resp.Plugin = nil
	write := p.writes()
	switch {
	case ctx.Err() == nil && !write && p.retried == 0:
		p.retried++
		return resp, again, context.Cause(calling)
	case ctx.Err() == nil:
		return resp, answered, fault.As(fault.OutcomeUnknown, context.Cause(calling), "", "")
	case errors.Is(ctx.Err(), context.Canceled):
		return resp, answered, fault.New(fault.Canceled, "", "", "the client gave up: %w", ctx.Err())
	case write:
		return resp, answered, fault.New(fault.OutcomeUnknown, "", "",
			"the plugin did not answer in time: the request may or may not have taken effect (%w)", ctx.Err())
	default:
		return resp, answered, fault.New(fault.Deadline, "", "", "the plugin did not answer in time: %w", err)
	}
}

// judge decides what an error of the plugin, or of its process, means for the request. moved says that storage moved while
// it ran: on the leader, that a write was lost to a change of leader; on a follower, that entries were applied.
func (p *passage) judge(in *instance, resp *Response, err error, moved bool) (after, error) {
	write := p.writes()
	if p.lane == readLane && !in.leader && p.retried < 2 {
		// A follower's plugin holds no lock against the entries that the leader's writes are: it may have found one key
		// without the other that was written before it (KV, "could not find version data").
		torn := moved && fault.Is(err, fault.Internal)
		if torn {
			// The client will not see this failure, but the gate of a canary must: what the leader answers, on the old
			// generation, does not excuse the new one.
			p.rt.meter.done(readLane, p.generation, time.Since(p.from), true)
		}
		if torn || needsLeader(resp.Plugin, err) {
			p.retried++
			return leader, fault.Text(fault.ReadOnly, "this read needs the leader's instance")
		}
	}
	ran, died := fate(err)
	if _, builtIn := in.backend.(inProcess); builtIn {
		ran, died = false, false // it speaks of other mounts' processes
		if (fault.Is(err, fault.NotLeader) || fault.Is(err, fault.Stale)) && p.retried < 2 {
			p.retried++
			return again, err // nothing took effect: where the leader is now, it will
		}
	}
	switch {
	case died && (!ran || !write) && p.retried < 2:
		p.retried++
		in.lingers(p.r.cfg.GateWait)
		return other, fault.As(fault.Unavailable, err, "", "")
	case died && write && ran:
		return answered, fault.New(fault.OutcomeUnknown, "", "",
			"the plugin's process ended while the request ran: it may or may not have taken effect (%w)", err)
	case died:
		return answered, fault.As(fault.Unavailable, err, "", "")
	}
	err = translate(resp.Plugin, err)
	if write && fault.Is(err, fault.Deadline) {
		return answered, fault.New(fault.OutcomeUnknown, "", "", "the request may or may not have taken effect: %w", err)
	}
	if moved && in.leader && damage(err) {
		if write {
			return answered, fault.New(fault.OutcomeUnknown, "", "",
				"the leader changed while the plugin wrote: the request may or may not have taken effect (%w)", err)
		}
		return answered, fault.As(fault.Unavailable, err, "", "")
	}
	return answered, err
}

// waitingForLeader is what the KV plugins of both SDKs answer on a follower until the leader's upgrade marker is there
// (PLUGINHOST section 2).
const waitingForLeader = "Waiting for the primary to upgrade"

// needsLeader reports whether a follower's plugin failed because only the leader's can do it.
func needsLeader(resp *pluginpb.Response, err error) bool {
	text := errorText(resp)
	if err != nil {
		text += err.Error()
	}
	return fault.Is(err, fault.ReadOnly) || supervisor.IsReadOnlyText(text) || strings.Contains(text, waitingForLeader)
}

// finish is what an answer goes through before it is released.
func (p *passage) finish(ctx context.Context, in *instance, resp *Response) error {
	if a := resp.Plugin; a != nil {
		if a.GetAuth() != nil && p.m.GetTable() != "auth" {
			return fault.Text(fault.Internal, "internal error")
		}
		a.Headers = allowed(a.GetHeaders(), p.m.GetConfig().GetAllowedResponseHeaders())
		if s := a.GetSecret(); s != nil && p.req.Operation != opRenew && p.req.Operation != opRevoke {
			if !lent(p.m, s) {
				s.LeaseId = ""
				if o := s.GetLeaseOptions(); o != nil {
					o.Renewable = false
				}
			} else if err := p.lend(ctx, in, resp); err != nil {
				return err
			}
		}
	}
	return p.released()
}

// lent reports whether a secret has to be given back. One of KV without versions has not: its TTL only tells a reader when
// to look again, and a lease would make an entry of the log of every read. The mount's option leased_passthrough asks for
// leases all the same, as it does of the engine.
func lent(m *commandv1.Mount, s *pluginpb.Secret) bool {
	if m.GetOptions()["leased_passthrough"] == "true" {
		return true
	}
	if t := m.GetType(); t == "kv" || t == "generic" {
		return false
	}
	// The engine under another name: its secret holds a TTL and nothing by which a plugin could take it back.
	o := s.GetLeaseOptions()
	hint := o.GetTTL() > 0 && !o.GetRenewable() && slices.Contains([]string{"", "{}", "null"}, s.GetInternalData())
	return !hint
}

// lend registers a secret. A follower's read that made one shows that the mount's reads belong on the leader.
func (p *passage) lend(ctx context.Context, in *instance, resp *Response) error {
	if p.lane == readLane && !in.leader && p.rt.leaderOnly.CompareAndSwap(false, true) {
		p.r.log.Info("a follower's read made a secret: reads of this mount go to the leader from now on",
			"mount", p.m.GetPath(), "mount_uuid", p.m.GetUuid())
		if f := p.r.cfg.LeaderOnly; f != nil {
			p.r.group.Go(func() { f(p.m) })
		}
	}
	if p.r.cfg.Leases == nil {
		return nil
	}
	if err := p.r.cfg.Leases.Grant(ctx, p.m, p.req, resp); err != nil {
		return fault.New(fault.OutcomeUnknown, "", "", "the plugin made a secret, and its lease could not be kept: %w", err)
	}
	return nil
}

// lingers waits, bounded, until the reconciler knows that the process has ended, so that a request is not tried on it
// again and again.
func (in *instance) lingers(limit time.Duration) {
	timer := time.NewTimer(min(limit, time.Second))
	defer timer.Stop()
	select {
	case <-in.life.over:
	case <-timer.C:
	}
}

// unrun reports whether an error is the host's own word, which says nothing of what an instance holds: nothing ran, or it
// is not known what did.
func unrun(err error) bool { return fault.KindOf(err).Safe() || fault.Is(err, fault.OutcomeUnknown) }

// fate tells from a backend's error whether its process has ended under the call, and whether the call can have run.
func fate(err error) (ran, died bool) {
	switch {
	case fault.Is(err, fault.Unavailable):
		return false, true
	case fault.Is(err, fault.OutcomeUnknown):
		return true, true
	default:
		return false, false
	}
}

// coded is the HTTP status that a plugin asked for with its error.
func coded(err error) (int, bool) {
	e, ok := errors.AsType[*fault.Error](err)
	if !ok || e.Code == 0 {
		return 0, false
	}
	return e.Code, true
}
