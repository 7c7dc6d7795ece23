// Package router moves requests to plugin instances: path to namespace to mount to instance, through a gate that lets an
// instance be swapped without a failed request or a lost update. See DESIGN.md beside this file.
package router

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
	pluginpb "rollcall/proto/plugin"
)

// Operations as plugins know them. opExists goes between nodes only.
const (
	opCreate = "create"
	opUpdate = "update"
	opRead   = "read"
	opList   = "list"
	opDelete = "delete"
	opPatch  = "patch"
	opHelp   = "help"
	opRevoke = "revoke"
	opRenew  = "renew"
	opExists = "exists"
)

// Request is a plugin request that its sender has authorised: node/httpd, node/lease, or a peer that forwarded it.
type Request struct {
	// ID is the request's id, for logs and for the plugin.
	ID string
	// Namespace is "" for root, else with a trailing slash. Path is the full path within it, without a leading slash.
	Namespace, Path string
	// Operation is "create", "update", "read", "list", "delete", "patch", "help", "revoke" or "renew".
	Operation string
	// Data is the JSON object that the client sent; it reaches the plugin byte for byte. Empty means {}.
	Data json.RawMessage
	// Headers are all of the client's; the plugin gets those that its mount lets through.
	Headers http.Header
	// RemoteAddr is "host:port" of the client.
	RemoteAddr string
	// ClientToken is the salted hash that plugins see instead of the token.
	ClientToken   string
	TokenAccessor string
	DisplayName   string
	EntityID      string
	Policies      []string
	TokenTTL      time.Duration
	// TokenRemainingUses is what the token may still be used for; 0 for no limit.
	TokenRemainingUses int64
	Unauthenticated    bool
	// NoForward keeps the request on this node: where it would have to go to the leader, it fails with fault.NotLeader.
	NoForward bool
	// Secret and Auth are what a renew or revoke is about.
	Secret *pluginpb.Secret
	Auth   *pluginpb.Auth

	// fromPeer says that another node's router has filtered the headers.
	fromPeer bool
}

// Response is what a plugin answered, and who did.
type Response struct {
	// Plugin is nil when the plugin answered nothing, or when there is an error. Its data is as the plugin sent it.
	Plugin *pluginpb.Response
	// Generation is that of the instance that ran the request; 0 when none did.
	Generation uint64
	// Node is the name of the node that ran it.
	Node string
	// Index: the instance that ran it knew at least everything of its mount's storage up to this index; after a write,
	// that write too.
	Index uint64
	// Mount is the mount as this node's state has it.
	Mount *commandv1.Mount

	// wrote is the index that a forwarder must not go back behind: of a write, that of the newest entry that the instance itself
	// has written, for which the forwarder waits; of a peer's read, that of the state which it could see.
	wrote uint64
	// hasCheck and found answer an existence check.
	hasCheck, found bool
}

// Match is where a path leads.
type Match struct {
	Mount *commandv1.Mount
	// Rest is the path relative to the mount.
	Rest string
	// Unauthenticated paths are open to everyone; Root paths need sudo.
	Unauthenticated, Root bool
}

// Router holds a route for every mount that this node serves. Handle, Lookup and Exists may be called from any
// goroutine; what changes a mount's instance is called by node/reload's reconciler of that mount alone.
type Router struct {
	cfg     Config
	log     *slog.Logger
	metrics *metrics
	// routes is keyed by mount uuid; its values are *route.
	routes sync.Map

	ctx    context.Context
	cancel context.CancelCauseFunc
	group  sync.WaitGroup
}

// New makes a router. It serves as soon as mounts are switched in; Close ends it.
func New(cfg Config) (*Router, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	mt, err := newMetrics(cfg.Registerer)
	if err != nil {
		return nil, fault.Wrap(err, "register metrics of", "node/router")
	}
	r := &Router{cfg: cfg, log: cfg.Logger, metrics: mt}
	r.ctx, r.cancel = context.WithCancelCause(context.Background())
	return r, nil
}

// role is this node's role, as instances have it: a follower's does not change with the term.
func (r *Router) role() Role {
	if role := r.cfg.Replica.Role(); role.Leader {
		return role
	}
	return Role{}
}

// Close ends the router's own goroutines and waits for them. Requests that wait at a gate fail; backends are left to who
// owns them. ctx bounds the wait.
func (r *Router) Close(ctx context.Context) error {
	r.cancel(errClosing)
	r.routes.Range(func(_, v any) bool {
		v.(*route).gate.set(gone, nil, nil, nil)
		return true
	})
	done := make(chan struct{})
	go func() {
		r.group.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fault.Wrap(ctx.Err(), "close", "node/router")
	}
}

var errClosing = fault.Text(fault.Unavailable, "the node is stopping")

// Canonical answers nil for a path that has exactly one spelling: no leading slash, no empty, "." or ".." segment, no
// control character. What authorises and what routes both see only such paths, so they cannot disagree.
func Canonical(path string) error {
	if len(path) > maxKey {
		return fault.Text(fault.Invalid, "a path of %d bytes is longer than %d", len(path), maxKey)
	}
	for i := range len(path) {
		if c := path[i]; c < ' ' || c == 0x7f {
			return fault.Text(fault.Invalid, "the path holds a control character")
		}
	}
	segments := strings.Split(path, "/")
	for i, s := range segments {
		if s == "." || s == ".." || s == "" && (i == 0 || i < len(segments)-1) {
			return fault.Text(fault.Invalid, "the path %q is not canonical: it has an empty, \".\" or \"..\" segment", path)
		}
	}
	return nil
}

// find answers the mount of a path, and the path relative to it.
func (r *Router) find(ns, path string) (View, *commandv1.Mount, string, error) {
	if err := Canonical(path); err != nil {
		return nil, nil, "", err
	}
	v := r.cfg.State.View()
	m, rest := v.MountFor(ns, path)
	if m == nil && !strings.HasSuffix(path, "/") {
		m, rest = v.MountFor(ns, path+"/")
	}
	if m == nil {
		return nil, nil, "", fault.Text(fault.UnsupportedPath, "no handler for route %q. route entry not found.", path)
	}
	return v, m, rest, nil
}

// Lookup answers where a path leads, and whether it is open or for sudo. It waits, bounded, for an instance that this
// node has not set up yet.
func (r *Router) Lookup(ctx context.Context, ns, path string) (Match, error) {
	_, m, rest, err := r.find(ns, path)
	if err != nil {
		return Match{}, err
	}
	p, err := r.route(m.GetUuid()).specials(ctx)
	if err != nil {
		return Match{}, err
	}
	return Match{Mount: m, Rest: rest, Unauthenticated: p.open.match(rest), Root: p.root.match(rest)}, nil
}

// Exists runs the plugin's existence check for a request that would create or update. hasCheck is false where the plugin
// has none.
func (r *Router) Exists(ctx context.Context, req *Request) (found, hasCheck bool, err error) {
	q := *req
	q.Operation = opExists
	resp, err := r.handle(ctx, &q)
	if err != nil {
		return false, false, err
	}
	return resp.found, resp.hasCheck, nil
}

// Handle runs a request on the mount's instance here, or on the leader's. The response is not nil whenever it is known who
// answered, also beside an error. The error's kind says what the caller may do: with fault.Unavailable, Fenced and
// NotLeader nothing ran; with OutcomeUnknown it may have, and must not be repeated silently.
func (r *Router) Handle(ctx context.Context, req *Request) (*Response, error) {
	if req.Operation == opExists || !known(req.Operation) {
		return nil, fault.Text(fault.UnsupportedOperation, "unsupported operation %q", req.Operation)
	}
	return r.handle(ctx, req)
}

func known(op string) bool {
	switch op {
	case opCreate, opUpdate, opRead, opList, opDelete, opPatch, opHelp, opRevoke, opRenew, opExists:
		return true
	default:
		return false
	}
}

// laneOf answers where an operation may run: reads wherever they arrive, everything else on the leader.
func laneOf(op string, m *commandv1.Mount, rt *route) int {
	switch op {
	case opRead, opList, opHelp, opExists:
		if leaderOnly(m) || rt.leaderOnly.Load() {
			return writeLane
		}
		return readLane
	default:
		return writeLane
	}
}

// leaderOnly reports whether reads, too, run on the leader: reads of databases make credentials.
func leaderOnly(m *commandv1.Mount) bool {
	return m.GetConfig().GetLeaderOnly() || m.GetPluginType() == "database"
}

// writes reports whether the request may change something: also a read that makes credentials, as database mounts have it.
func (p *passage) writes() bool {
	return writes(p.req.Operation) || p.m.GetPluginType() == "database" && strings.HasPrefix(p.rest, "creds/")
}

// writes reports whether an operation may change something, so that it must never run twice by accident.
func writes(op string) bool {
	switch op {
	case opRead, opList, opHelp, opExists:
		return false
	default:
		return true
	}
}
