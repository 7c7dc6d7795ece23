package httpd

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// How long a revocation is waited for: a moment where the caller did not ask for its end, else almost as long as a request
// may take.
const (
	revokeGlance = 5 * time.Second
	revokeWait   = requestTimeout - 10*time.Second
)

func (s *Server) leaseRoutes() []*route {
	update := func(h handler) map[operation]handler { return map[operation]handler{opUpdate: h} }
	var routes []*route
	for _, base := range []string{"sys/leases/", "sys/"} {
		routes = append(routes,
			&route{pattern: base + "renew", ops: update(s.renewLease), summary: "Give a lease more time."},
			&route{pattern: base + "renew/{lease_id...}", ops: update(s.renewLease), summary: "Give a lease more time."},
			&route{pattern: base + "revoke", ops: update(s.revokeLease), summary: "End a lease."},
			&route{pattern: base + "revoke/{lease_id...}", ops: update(s.revokeLease), summary: "End a lease."},
			&route{
				pattern: base + "revoke-prefix/{prefix...}", access: withSudo, ops: update(s.revokePrefix),
				summary: "End every lease below a path.",
			},
			&route{
				pattern: base + "revoke-force/{prefix...}", access: withSudo, ops: update(s.revokeForce),
				summary: "Forget every lease below a path, whatever their plugins say.",
			})
	}
	return append(routes,
		&route{
			pattern: "sys/leases/lookup", ops: map[operation]handler{opUpdate: s.lookupLease, opList: s.listLeases},
			sudoOps: map[operation]bool{opList: true}, summary: "What a lease is; as a list, the first folders of leases.",
		},
		&route{
			pattern: "sys/leases/lookup/{prefix...}", access: withSudo, ops: map[operation]handler{opList: s.listLeases},
			summary: "The leases and folders below a path.",
		},
		&route{pattern: "sys/leases/count", ops: map[operation]handler{opRead: s.countLeases}, summary: "How many leases each mount has."},
		&route{pattern: "sys/leases/tidy", access: withSudo, ops: update(s.tidyTokens), summary: "Nothing is ever left over, and the answer says so."})
}

// leaseID is the lease that a call means. Ids begin with their namespace's path, which a call from inside it may leave out.
func (s *Server) leaseID(q *request) (string, error) {
	id := q.params["lease_id"]
	if id == "" {
		id = q.body.str("lease_id")
	}
	q.body.has("lease_id")
	if q.body.err != nil {
		return "", q.body.err
	}
	if id == "" {
		return "", fault.Text(fault.Invalid, "lease_id must be specified")
	}
	if !strings.HasPrefix(id, q.ns) {
		id = q.ns + id
	}
	return id, nil
}

func (s *Server) renewLease(q *request) (*reply, error) {
	id, err := s.leaseID(q)
	if err != nil {
		return nil, err
	}
	increment := q.body.duration("increment")
	q.body.has("url_increment")
	if q.body.err != nil {
		return nil, q.body.err
	}
	r, err := s.Leases.Renew(q.ctx, id, increment, q.by())
	if err != nil {
		return nil, err
	}
	rep := &reply{lease: &lease{id: r.ID, renewable: r.Renewable, seconds: int64(r.TTL / time.Second)}, warnings: r.Warnings}
	if len(r.Data) > 0 {
		rep.data = r.Data
	}
	return rep, nil
}

func (s *Server) revokeLease(q *request) (*reply, error) {
	id, err := s.leaseID(q)
	if err != nil {
		return nil, err
	}
	return s.revokeLeases(q, &commandv1.RevokeLeases{Id: id})
}

func (s *Server) revokePrefix(q *request) (*reply, error) {
	return s.revokeLeases(q, &commandv1.RevokeLeases{Prefix: q.ns + strings.TrimSuffix(q.params["prefix"], "/") + "/"})
}

func (s *Server) revokeForce(q *request) (*reply, error) {
	return s.revokeLeases(q, &commandv1.RevokeLeases{Prefix: q.ns + strings.TrimSuffix(q.params["prefix"], "/") + "/", Force: true})
}

// revokeLeases answers once the leases are gone; when that takes long, 204 where the caller does not wait for the end (they
// are due, and the leader goes on), and an error where it does.
func (s *Server) revokeLeases(q *request, which *commandv1.RevokeLeases) (*reply, error) {
	wait := revokeGlance
	sync := q.body.boolean("sync")
	if sync {
		wait = revokeWait
	}
	if q.body.err != nil {
		return nil, q.body.err
	}
	left, err := s.Leases.Revoke(q.ctx, which, q.by(), wait)
	switch {
	case err != nil && (sync || left == 0):
		return nil, err
	case left > 0 && sync:
		return nil, fault.Text(fault.Invalid, "%d leases are due and not revoked yet: their plugins refuse; see the leader's log, or use revoke-force", left)
	case left > 0:
		return &reply{status: 202, warnings: []string{fmt.Sprintf("%d leases are due and will be revoked by the leader", left)}}, nil
	}
	return nil, nil
}

func (s *Server) lookupLease(q *request) (*reply, error) {
	id, err := s.leaseID(q)
	if err != nil {
		return nil, err
	}
	l := q.view.Lease(id)
	if l == nil {
		return nil, fault.Text(fault.Invalid, "invalid lease")
	}
	issued := time.UnixMilli(l.GetIssuedWallMs()).UTC()
	var ttl int64
	var expires any
	if now := s.clock.now(q.view); l.GetExpiresClockNs() > now {
		left := time.Duration(l.GetExpiresClockNs() - now)
		ttl, expires = int64((left+time.Second-1)/time.Second), time.Now().Add(left).UTC().Format(time.RFC3339Nano)
	}
	return &reply{data: map[string]any{
		"id": l.GetId(), "issue_time": issued.Format(time.RFC3339Nano), "expire_time": expires,
		"last_renewal": nil, "renewable": l.GetRenewable(), "ttl": ttl,
	}}, nil
}

// listLeases lists one level below a path.
func (s *Server) listLeases(q *request) (*reply, error) {
	prefix := q.ns
	if p := strings.Trim(q.params["prefix"], "/"); p != "" {
		prefix += p + "/"
	}
	keys := []string{}
	for _, l := range q.view.Leases(prefix) {
		rest := strings.TrimPrefix(l.GetId(), prefix)
		if i := strings.IndexByte(rest, '/'); i >= 0 {
			rest = rest[:i+1]
		}
		if len(keys) == 0 || keys[len(keys)-1] != rest { // they come in order
			keys = append(keys, rest)
		}
	}
	if len(keys) == 0 {
		return nil, nil
	}
	slices.Sort(keys)
	return &reply{data: map[string]any{"keys": slices.Compact(keys)}}, nil
}

func (s *Server) countLeases(q *request) (*reply, error) {
	counts, total := map[string]int{}, 0
	for _, m := range q.view.Mounts() {
		if !strings.HasPrefix(m.GetNamespace(), q.ns) {
			continue
		}
		if n := len(q.view.LeasesOfMount(m.GetUuid())); n > 0 {
			counts[m.GetNamespace()+displayPath(m)] = n
			total += n
		}
	}
	return &reply{data: map[string]any{"lease_count": total, "counts": counts}}, nil
}
