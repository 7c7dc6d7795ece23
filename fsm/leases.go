package fsm

import (
	"bytes"
	"crypto/sha256"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// enterLease makes or renews a plugin's lease. As with tokens, the clock is filled in here.
func (e *entry) enterLease(c *commandv1.PutLease) error {
	l := c.GetLease()
	switch {
	case l.GetId() == "" || !plain(l.GetId(), maxText):
		return invalid("a lease needs an id")
	case len(l.GetSecret())+len(l.GetData()) > maxSecret:
		return fault.Text(fault.TooLarge, "a lease's secret has at most %d bytes", maxSecret)
	case get(&e.mounts, l.GetMountUuid()) == nil:
		return fault.Text(fault.NotFound, "enter lease: no mount %s", trim(l.GetMountUuid(), maxName))
	case len(l.GetTokenHash()) != 0 && len(l.GetTokenHash()) != sha256.Size:
		return invalid("a token's hash has %d bytes", sha256.Size)
	}
	old := get(&e.leases, l.GetId())
	if at := old.GetExpiresClockNs(); c.GetMustExist() && (old == nil || at != 0 && at <= max(e.clock, 1)) {
		return invalid("lease not found or lease is not renewable")
	}
	if old == nil && len(l.GetTokenHash()) > 0 && get(&e.tokens, string(l.GetTokenHash())) == nil {
		return fault.Text(fault.Denied, "the token that asked for lease %s is gone", l.GetId())
	}
	l = clone(l)
	if old == nil {
		l.IssuedClockNs, l.IssuedWallMs = e.clock, e.wallMS
		l.ExpiresClockNs = expiresAt(e.clock, l.GetTtlNs(), e.clock, l.GetMaxTtlNs())
	} else {
		if l.GetMountUuid() != old.GetMountUuid() || !bytes.Equal(l.GetTokenHash(), old.GetTokenHash()) {
			return fault.Text(fault.Conflict, "lease %s belongs to another mount or token", l.GetId())
		}
		l.IssuedClockNs, l.IssuedWallMs = old.GetIssuedClockNs(), old.GetIssuedWallMs()
		if len(l.GetTokenHash()) > 0 && get(&e.tokens, string(l.GetTokenHash())) == nil {
			return fault.Text(fault.Denied, "the token of lease %s is gone", l.GetId())
		}
		if l.GetExpiresClockNs() == 0 {
			l.ExpiresClockNs = expiresAt(e.clock, l.GetTtlNs(), l.GetIssuedClockNs(), l.GetMaxTtlNs())
		} else {
			l.ExpiresClockNs = old.GetExpiresClockNs()
		}
	}
	e.putLease(l)
	e.res.Id = l.GetId()
	return nil
}

// maxLeasesAtOnce bounds the work of one entry.
const maxLeasesAtOnce = 10_000

// revokeLeases makes leases due, or removes them where their plugins are not to be asked.
func (e *entry) revokeLeases(c *commandv1.RevokeLeases) error {
	var found []*commandv1.Lease
	take := func(l *commandv1.Lease) bool {
		if l != nil && (c.GetForce() || l.GetExpiresClockNs() == 0 || l.GetExpiresClockNs() > max(e.clock, 1)) {
			found = append(found, l)
		}
		return len(found) < maxLeasesAtOnce
	}
	switch {
	case c.GetId() != "":
		take(get(&e.leases, c.GetId()))
	case c.GetMountUuid() != "":
		scanPrefix(&e.leaseMounts, key(c.GetMountUuid(), ""), func(_, id string) bool { return take(get(&e.leases, id)) })
	case c.GetPrefix() != "":
		scanPrefix(&e.leases, c.GetPrefix(), func(_ string, l *commandv1.Lease) bool { return take(l) })
	default:
		return invalid("revoking leases takes an id, a prefix or a mount")
	}
	for _, l := range found {
		if c.GetForce() {
			e.deleteLease(l)
			continue
		}
		l = clone(l)
		l.ExpiresClockNs = max(e.clock, 1)
		e.putLease(l)
	}
	e.res.Repeated = len(found) == 0
	return nil
}

func (e *entry) removeLease(id string) error {
	l := get(&e.leases, id)
	if l == nil {
		e.res.Repeated = true
		return nil
	}
	e.deleteLease(l)
	return nil
}

// endLeases makes every lease of a token due now.
func (e *entry) endLeases(h string) {
	var due []*commandv1.Lease
	scanPrefix(&e.leaseTokens, h, func(_, id string) bool {
		if l := get(&e.leases, id); l != nil {
			due = append(due, l)
		}
		return true
	})
	for _, l := range due {
		if at := l.GetExpiresClockNs(); at == 0 || at > e.clock {
			l = clone(l)
			l.ExpiresClockNs = max(e.clock, 1)
			e.putLease(l)
		}
	}
}
