package router

import (
	"context"

	"rollcall/node/failpoint"
	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// Assume tells the instance behind the gate its new role: it is set up again in the same process, and takes the mount
// over where this node leads now. Requests wait meanwhile, or go to the leader.
func (r *Router) Assume(ctx context.Context, mountUUID string, role Role) error {
	rt := r.lookup(mountUUID)
	m := r.cfg.State.View().Mount(mountUUID)
	if rt == nil || m == nil {
		return fault.New(fault.NotFound, "assume role", mountUUID, "no such mount runs here")
	}
	if err := rt.lock(ctx); err != nil {
		return err
	}
	defer rt.unlock()
	in := rt.run.Load()
	switch {
	case in == nil:
		return fault.New(fault.NotFound, "assume role", m.GetPath(), "nothing runs there yet")
	case in.life.dead():
		return fault.New(fault.Unavailable, "assume role", m.GetPath(), "the process has ended: %w", in.life.why)
	case role.Leader && in.leader && rt.unbroken(m, in):
		return rt.restamp(ctx, m, in, role)
	}
	return rt.renew(ctx, m, in, role)
}

// unbroken reports whether nobody else has written since the instance took the mount over, so that what it remembers
// still holds.
func (rt *route) unbroken(m *commandv1.Mount, in *instance) bool {
	in.store.mu.Lock()
	defer in.store.mu.Unlock()
	return in.store.phase == live && in.store.epoch == m.GetEpoch()
}

// restamp enters a TakeOver for an instance that goes on as it is: under a new term, or a new generation.
func (rt *route) restamp(ctx context.Context, m *commandv1.Mount, in *instance, role Role) error {
	ctx, cancel := context.WithTimeout(ctx, rt.r.cfg.Inside)
	defer cancel()
	if err := in.store.pause(ctx); err != nil {
		return err
	}
	if err := rt.takeOver(ctx, m, in, role, nil); err != nil {
		in.store.resume()
		return err
	}
	if in.term.Swap(role.Term) != role.Term {
		rt.put(in)
	}
	return nil
}

// again is the same backend behind the gate for another role.
func (in *instance) again(role Role, st *store) *instance {
	next := newInstance(in.backend, in.wanted.Load(), role, st, in.life)
	next.paths, next.base, next.wanted = in.paths, in.base, in.wanted
	return next
}

// renew sets the same backend up again for a role. Called with the route locked.
func (rt *route) renew(ctx context.Context, m *commandv1.Mount, in *instance, role Role) error {
	r := rt.r
	if role.Leader {
		rt.gate.set(held, nil, nil, nil)
	} else {
		rt.gate.set(away, nil, nil, nil)
	}
	if !in.refs.drain(ctx, r.hold(m)) {
		in.cancelAll(errRoleChange)
		in.refs.drain(ctx, cancelGrace)
	}
	in.store.retire()
	next := in.again(role, r.storeFor(rt, role))
	inside, cancel := context.WithTimeout(ctx, r.cfg.Inside)
	defer cancel()
	if err := rt.establish(inside, m, next); err != nil {
		next.store.retire()
		if ctx.Err() != nil || transient(err) {
			rt.gate.set(away, err, nil, nil)
		} else {
			rt.gate.set(failing, fault.As(fault.Unavailable, err, "set up plugin again", m.GetPath()), nil, nil)
		}
		// The old set-up is void: whoever tries again starts from this one.
		rt.run.Store(next)
		return err
	}
	rt.put(next)
	return nil
}

// establish sets an instance up on the state as it is, and takes the mount over or catches up with what changed.
func (rt *route) establish(ctx context.Context, m *commandv1.Mount, in *instance) error {
	rt.inval.follow(!in.leader)
	if in.leader {
		if err := rt.settleWrites(ctx, in.role().Term); err != nil {
			return err
		}
	}
	in.base = rt.r.cfg.State.View().Index()
	if err := rt.r.setUp(ctx, m, in, true); err != nil {
		return err
	}
	if in.leader {
		return rt.takeOver(ctx, m, in, in.role(), in.store.seal())
	}
	return rt.catchUp(ctx, in)
}

// settleWrites makes sure that no write of the instance before is still on its way: given up by its request, it would be
// applied after the next instance has read the key, and before that one's TakeOver refuses it.
func (rt *route) settleWrites(ctx context.Context, term uint64) error {
	before := rt.run.Load()
	if before == nil || !before.store.unsure.Load() {
		return nil
	}
	// An entry that writes nothing stands behind all that were proposed before it. That its epoch may be over is all right.
	_, err := rt.r.cfg.Replica.ProposeAsLeader(ctx, term, &commandv1.Command{Body: &commandv1.Command_WriteStorage{
		WriteStorage: &commandv1.WriteStorage{MountUuid: rt.uuid},
	}})
	if err != nil && !fault.Is(err, fault.Stale) {
		return fault.Wrap(err, "wait for the writes of the instance before on", rt.uuid)
	}
	return nil
}

// takeOver enters what the instance wrote while it was set up, and makes its store live.
func (rt *route) takeOver(ctx context.Context, m *commandv1.Mount, in *instance, role Role, writes []*commandv1.StorageOp,
) error {
	res, err := rt.r.cfg.Replica.ProposeAsLeader(ctx, role.Term, &commandv1.Command{
		Body: &commandv1.Command_TakeOver{TakeOver: &commandv1.TakeOver{
			MountUuid: rt.uuid, NodeId: rt.r.cfg.NodeID, Generation: in.generation(), Term: role.Term, Writes: writes,
		}},
	})
	if err != nil {
		return fault.Wrap(err, "take over", m.GetPath())
	}
	_ = failpoint.Hit(failpoint.TakeOverApplied, rt.r.cfg.NodeID)
	in.store.enliven(res.GetIndex(), role.Term, len(writes) > 0)
	return nil
}
