package httpd

import (
	"context"
	"net/http"
	"strings"
	"sync"
	"time"

	commandv1 "rollcall/proto/command/v1"

	"rollcall/fsm"
	"rollcall/node/api"
	"rollcall/node/fault"
	"rollcall/node/policy"
)

// clock reckons the log's clock between two entries: what a view has, and what has passed here since that value was first
// seen. It is for ending tokens in time, never for deciding what stands in the log.
type clock struct {
	mu sync.Mutex
	ns uint64
	at time.Time
}

// maxReckoned bounds what is added. While tokens can expire, an entry comes every second; a node that hears none is fenced
// after a lease, and should then not let every token end.
const maxReckoned = 5 * time.Second

func (c *clock) now(view *fsm.View) uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	if ns := view.ClockNS(); ns > c.ns || c.at.IsZero() {
		c.ns, c.at = ns, time.Now()
	}
	return c.ns + uint64(min(time.Since(c.at), maxReckoned))
}

// authenticate finds out who calls. It proves nothing about what they may do.
func (s *Server) authenticate(view *fsm.View, r *http.Request) (*policy.Identity, error) {
	return policy.Authenticate(view, tokenOf(r), s.clock.now(view), r.RemoteAddr)
}

// spend counts a use of a token that has a number of them. The returned function, never nil, is called when the request is
// over: it revokes a token that is used up.
func (s *Server) spend(ctx context.Context, who *policy.Identity) (over func(), err error) {
	if who == nil || who.Token.GetNumUses() == 0 {
		return func() {}, nil
	}
	if _, err := s.Replica.Propose(ctx, &commandv1.Command{WallMs: wall(), Body: &commandv1.Command_UseToken{
		UseToken: &commandv1.UseToken{Hash: who.Hash},
	}}); err != nil {
		if fault.Is(err, fault.Denied) {
			err = policy.ErrDenied
		}
		return func() {}, err
	}
	return func() {
		if row := s.State.View().TokenByHash(who.Hash); row == nil || row.GetNumUses() >= 0 {
			return
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		if _, err := s.Replica.Propose(ctx, &commandv1.Command{WallMs: wall(), Body: &commandv1.Command_RevokeToken{
			RevokeToken: &commandv1.RevokeToken{Hash: who.Hash},
		}}); err != nil {
			s.log.Warn("revoke a token that is used up: it opens nothing any more", "accessor", who.Token.GetAccessor(), "error", err)
		}
	}, nil
}

// admit authenticates the caller of a system route.
func (s *Server) admit(req *request, rt *route) error {
	if rt.access == open {
		return nil
	}
	who, err := s.authenticate(req.view, req.http)
	if err != nil {
		return err
	}
	req.who = who
	return nil
}

// authorise decides whether the caller may do this. The path is the canonical one: without a trailing slash but for lists,
// so that what is decided about and what is routed by are the same.
func (s *Server) authorise(req *request, rt *route) error {
	if rt.access == open {
		return nil
	}
	if rt.rootOnly && req.ns != "" {
		return fault.Text(fault.Invalid, "operation unavailable in namespaces")
	}
	need := capabilityOf(req.op)
	q := policy.Query{Namespace: req.ns, Path: req.path, Need: need, WrapTTL: req.wrapTTL, Data: req.parameters}
	if err := s.Policies.Allow(req.view, req.who, q); err != nil {
		return err
	}
	if (rt.access == withSudo || rt.sudoOps[req.op]) && need != policy.Help {
		q.Need = policy.Sudo
		return s.Policies.Allow(req.view, req.who, q)
	}
	return nil
}

func capabilityOf(op operation) policy.Capability {
	switch op {
	case opUpdate:
		return policy.Update
	case opDelete:
		return policy.Delete
	case opList:
		return policy.List
	case opPatch:
		return policy.Patch
	case opHelp:
		return policy.Help
	default:
		return policy.Read
	}
}

// tokenOf takes the caller's token: the contract's header first, then a bearer token.
func tokenOf(r *http.Request) string {
	if t := r.Header.Get(api.HeaderToken); t != "" {
		return t
	}
	if scheme, t, ok := strings.Cut(r.Header.Get("Authorization"), " "); ok && strings.EqualFold(scheme, "Bearer") {
		return strings.TrimSpace(t)
	}
	return ""
}

// wrapTTLOf is how long the caller wants the answer to be wrapped for; 0 for not at all.
func wrapTTLOf(r *http.Request) (time.Duration, error) {
	text := r.Header.Get(api.HeaderWrapTTL)
	if text == "" {
		return 0, nil
	}
	d, err := ParseDuration(text)
	if err != nil || d < 0 {
		return 0, fault.Text(fault.Invalid, "%s must be a duration such as 30s or 5m, not %q", api.HeaderWrapTTL, text)
	}
	return d, nil
}

// settle waits until a change to what tokens may do holds on every node. The change is made by then, so the wait's failure
// is not the caller's: it is logged, and a node that has not heard of the change is fenced within its lease.
func (s *Server) settle(ctx context.Context, res *commandv1.Result, what string) {
	if res.GetIndex() == 0 || res.GetRepeated() {
		return
	}
	if err := s.Cluster.Settle(ctx, res.GetIndex()); err != nil {
		s.log.Warn(what+": some node may not have heard of it yet", "index", res.GetIndex(), "error", err)
	}
}
