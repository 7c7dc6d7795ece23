package fsm

import (
	"bytes"
	"cmp"
	"slices"
	"strings"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// joinable finds a reload that waits and was asked for in the same words.
func (e *entry) joinable(r *commandv1.Reload) *commandv1.Reload {
	var first *commandv1.Reload
	e.open.Scan(func(_, id string) bool {
		w := get(&e.reloads, id)
		if w.GetPhase() == commandv1.Phase_PHASE_QUEUED && bytes.Equal(w.GetRequestHash(), r.GetRequestHash()) {
			first = w
		}
		return first == nil
	})
	return first
}

func (e *entry) join(c *commandv1.StartReload, first *commandv1.Reload) error {
	if len(first.GetAliases()) >= MaxAliases {
		return fault.Text(fault.Exhausted, "%d requests are joined to reload %s already", MaxAliases, first.GetId())
	}
	if err := e.roomForID(); err != nil {
		return err
	}
	r := clone(first)
	r.Aliases = append(r.Aliases, c.GetId())
	e.storeReload(r)
	e.putReloadID(&commandv1.ReloadID{
		Id: c.GetId(), RequestHash: c.GetRequestHash(), FirstId: r.GetId(), ClockNs: e.clock, Index: e.index,
	})
	e.res.Id = r.GetId()
	return nil
}

// roomForID drops ids that may be forgotten, and refuses when the table is full of those that may not.
func (e *entry) roomForID() error {
	for e.reloadIDs.Len() >= KeepReloadIDs {
		k, id, ok := e.idSeq.Min()
		row := get(&e.reloadIDs, id)
		if !ok || row.GetClockNs()+KeepReloadIDsFor > e.clock || e.stillOpen(row) {
			break
		}
		e.idSeq.Delete(k)
		if row != nil {
			e.deleteReloadID(row)
		}
	}
	if e.reloadIDs.Len() >= MaxReloadIDs {
		return fault.Text(fault.Exhausted, "the state knows %d reload ids, none older than 24 hours: try again later", MaxReloadIDs)
	}
	return nil
}

func (e *entry) stillOpen(row *commandv1.ReloadID) bool {
	r := get(&e.reloads, cmp.Or(row.GetFirstId(), row.GetId()))
	return r != nil && !terminal(r.GetPhase())
}

// mustWait reports whether a reload's targets overlap those of one that runs or waits, and how many wait.
func (e *entry) mustWait(r *commandv1.Reload) (waits bool, queued int) {
	e.open.Scan(func(_, id string) bool {
		o := get(&e.reloads, id)
		if o.GetPhase() == commandv1.Phase_PHASE_QUEUED {
			queued++
		}
		waits = waits || overlap(o, r)
		return true
	})
	return waits, queued
}

// overlap reports whether two reloads share a mount that is still there. Targets are sorted by uuid.
func overlap(a, b *commandv1.Reload) bool {
	x, y := a.GetTargets(), b.GetTargets()
	for len(x) > 0 && len(y) > 0 {
		switch c := strings.Compare(x[0].GetMountUuid(), y[0].GetMountUuid()); {
		case c < 0:
			x = x[1:]
		case c > 0:
			y = y[1:]
		case x[0].GetUnmounted() || y[0].GetUnmounted():
			x, y = x[1:], y[1:]
		default:
			return true
		}
	}
	return false
}

// promote starts the reloads whose way is free, first come first served: one that waits holds its targets against those
// behind it.
func (e *entry) promote() {
	for {
		next := e.nextQueued()
		if next == nil {
			return
		}
		e.activate(clone(next))
	}
}

func (e *entry) nextQueued() *commandv1.Reload {
	var next *commandv1.Reload
	taken := map[string]bool{}
	e.active.Scan(func(uuid, _ string) bool {
		taken[uuid] = true
		return true
	})
	e.open.Scan(func(_, id string) bool {
		r := get(&e.reloads, id)
		if r.GetPhase() != commandv1.Phase_PHASE_QUEUED {
			return true
		}
		// A mount that is gone is nothing to wait for.
		free := !slices.ContainsFunc(r.GetTargets(), func(t *commandv1.Target) bool {
			return taken[t.GetMountUuid()] && get(&e.mounts, t.GetMountUuid()) != nil
		})
		if free {
			next = r
			return false
		}
		for _, t := range r.GetTargets() {
			taken[t.GetMountUuid()] = true
		}
		return true
	})
	return next
}
