package httpd

import (
	"time"

	commandv1 "rollcall/proto/command/v1"
)

func (s *Server) tokenRoutes() []*route {
	return []*route{
		{pattern: "auth/token/lookup-self", ops: map[operation]handler{opRead: s.lookupSelf, opUpdate: s.lookupSelf},
			summary: "What the caller's token is and may do."},
	}
}

func (s *Server) lookupSelf(q *request) (*reply, error) {
	return &reply{data: tokenObject(q.who.Token, q.view.ClockNS())}, nil
}

// tokenObject is a token as lookups show it; the token itself is not known to anyone any more.
func tokenObject(t *commandv1.Token, clock uint64) map[string]any {
	created := time.UnixMilli(t.GetCreatedWallMs()).UTC()
	var ttl int64
	var expires any
	if t.GetExpiresClockNs() > clock {
		left := time.Duration(t.GetExpiresClockNs() - clock)
		ttl, expires = int64(left/time.Second), time.Now().Add(left).UTC().Format(time.RFC3339)
	}
	var meta any
	if len(t.GetMeta()) > 0 {
		meta = t.GetMeta()
	}
	kind := t.GetType()
	if kind == "" {
		kind = "service"
	}
	return map[string]any{"accessor": t.GetAccessor(), "creation_time": created.Unix(),
		"creation_ttl": int64(time.Duration(t.GetTtlNs()) / time.Second), "display_name": t.GetDisplayName(),
		"entity_id": t.GetEntityId(), "expire_time": expires, "explicit_max_ttl": int64(time.Duration(t.GetExplicitMaxTtlNs()) / time.Second),
		"id": "", "meta": meta, "num_uses": t.GetNumUses(), "orphan": len(t.GetParent()) == 0, "path": t.GetPath(),
		"policies": t.GetPolicies(), "ttl": ttl, "type": kind, "renewable": t.GetRenewable(),
		"issue_time": created.Format(time.RFC3339)}
}
