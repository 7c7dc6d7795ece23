// Package httpd is the HTTP door of a node: it decodes, authorises, proposes or reads, and encodes. It decides nothing.
package httpd

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"path"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"

	"rollcall/fsm"
	"rollcall/node/api"
	"rollcall/node/fault"
)

// Limits on what a client may send (DESIGN section 8).
const (
	MaxPluginBody = 32 << 20
	MaxSysBody    = 1 << 20
	// requestTimeout is the contract's default deadline of one request.
	requestTimeout = 90 * time.Second
)

// Server answers the HTTP API of one node.
type Server struct {
	Config
	log      *slog.Logger
	routes   *table
	clock    clock
	inFlight prometheus.Gauge
	answers  *prometheus.HistogramVec
	streams  streams
	now      atomic.Int64 // requests that are being answered
	origins  *http.CrossOriginProtection
}

// New makes the door. It starts nothing; the caller serves Handler.
func New(cfg Config) (*Server, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	s := &Server{Config: cfg, log: cfg.Logger, origins: http.NewCrossOriginProtection()}
	s.routes = newTable(s.table())
	s.inFlight = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "rollcall_http_requests_in_flight", Help: "Requests that this node is answering.",
	})
	s.answers = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "rollcall_http_request_seconds", Help: "Time to answer, by door (sys or plugin) and status class.",
		Buckets: prometheus.ExponentialBuckets(0.0005, 2, 16),
	}, []string{"door", "class"})
	for _, c := range []prometheus.Collector{s.inFlight, s.answers} {
		if err := cfg.Registerer.Register(c); err != nil {
			return nil, fault.Wrap(err, "register metrics of", "node/httpd")
		}
	}
	return s, nil
}

// Handler is the whole API.
func (s *Server) Handler() http.Handler { return http.HandlerFunc(s.serve) }

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	began := time.Now()
	rec := &recorder{ResponseWriter: w}
	s.inFlight.Inc()
	door := "plugin"
	defer func() {
		s.inFlight.Dec()
		class := "2xx"
		if rec.status != 0 {
			class = string(rune('0'+rec.status/100)) + "xx"
		}
		s.answers.WithLabelValues(door, class).Observe(time.Since(began).Seconds())
	}()
	h := rec.Header()
	h.Set("Cache-Control", "no-store")
	h.Set("Strict-Transport-Security", "max-age=31536000; includeSubDomains")
	h.Set(api.HeaderNode, s.NodeName)
	id := requestID()
	rec.x = s.exchange(r, id)
	door = s.answer(rec, r, id)
	if rec.status == 0 { // nothing was said: that is an answer, too
		rec.WriteHeader(http.StatusOK)
	}
}

// answer answers a request and says at which door.
func (s *Server) answer(rec *recorder, r *http.Request, id string) (door string) {
	door = "plugin"
	h := rec.Header()
	if r.URL.Path != "/v1" && !strings.HasPrefix(r.URL.Path, "/v1/") {
		s.fail(rec, r, id, &fault.Error{Kind: fault.UnsupportedPath, Text: "paths of the API begin with /v1/"})
		return door
	}
	if clean := cleanPath(r.URL.Path); clean != r.URL.Path {
		u := *r.URL
		u.Path, u.RawPath, u.Scheme, u.Host = clean, "", "", ""
		h.Set("Location", u.RequestURI())
		rec.WriteHeader(http.StatusTemporaryRedirect)
		return door
	}
	if err := checkPath(r.URL.Path); err != nil {
		s.fail(rec, r, id, err)
		return door
	}
	if isSys(r) {
		door = "sys"
	}
	if err := s.fromHere(r); err != nil {
		s.fail(rec, r, id, err)
		return door
	}
	if !s.enter() {
		s.fail(rec, r, id, errBusy)
		return door
	}
	defer s.now.Add(-1)
	s.dispatch(rec, r, id)
	return door
}

// maxPath bounds a path, as node/router does.
const maxPath = 4096

// checkPath refuses what no path holds, before anything looks at it.
func checkPath(p string) error {
	if len(p) > maxPath {
		return fault.Text(fault.Invalid, "a path of %d bytes is longer than %d", len(p), maxPath)
	}
	for i := range len(p) {
		if c := p[i]; c < ' ' || c == 0x7f {
			return fault.Text(fault.Invalid, "the path holds a control character")
		}
	}
	if !utf8.ValidString(p) {
		return fault.Text(fault.Invalid, "the path is not UTF-8")
	}
	return nil
}

// requestID is a time-ordered UUID: reload ids made of it sort by time.
func requestID() string {
	id, err := uuid.NewV7()
	if err != nil {
		return uuid.NewString()
	}
	return id.String()
}

// cleanPath removes "//", "." and ".." and keeps a trailing slash. The one canonical form is what is authorised and
// what is routed.
func cleanPath(p string) string {
	clean := path.Clean(p)
	if strings.HasSuffix(p, "/") && clean != "/" {
		clean += "/"
	}
	return clean
}

func isSys(r *http.Request) bool {
	p := strings.TrimPrefix(r.URL.Path, "/v1/")
	return p == "sys" || strings.HasPrefix(p, "sys/")
}

// target is where a request goes once its namespace is taken off.
type target struct{ ns, path string }

// locate joins the namespace header with the path and splits off the namespace. Any spelling of root is "".
func (s *Server) locate(r *http.Request, view *fsm.View) (target, error) {
	p := strings.TrimPrefix(strings.TrimPrefix(r.URL.Path, "/v1"), "/")
	ns := strings.Trim(r.Header.Get(api.HeaderNamespace), "/")
	if ns == "root" {
		ns = ""
	}
	if ns != "" {
		ns += "/"
		if !view.HasNamespace(ns) {
			return target{}, fault.Text(fault.NotFound, "namespace not found")
		}
	}
	for { // the path may begin with further namespaces
		head, rest, ok := strings.Cut(p, "/")
		if !ok || !view.HasNamespace(ns+head+"/") {
			return target{ns: ns, path: p}, nil
		}
		ns, p = ns+head+"/", rest
	}
}

// dispatch decides which door a request takes. What this node does not know (a namespace, a mount, a token) may have been
// made through another node a moment ago: then it looks again on a state that holds everything acknowledged so far.
func (s *Server) dispatch(w *recorder, r *http.Request, id string) {
	ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
	defer cancel()
	req := &request{ctx: ctx, http: r, id: id, view: s.State.View()}
	var err error
	if req.op, err = operationOf(r); err == nil {
		req.wrapTTL, err = wrapTTLOf(r)
	}
	if err != nil {
		s.fail(w, r, id, err)
		return
	}
	err = s.route(ctx, w, req)
	if errors.Is(err, errUnknown) {
		cause := errors.Unwrap(err)
		if newer, cerr := s.newer(ctx); cerr == nil && newer.Index() > req.view.Index() {
			cause = s.route(ctx, w, &request{ctx: ctx, http: r, id: id, op: req.op, wrapTTL: req.wrapTTL, view: newer})
			if errors.Is(cause, errUnknown) {
				cause = errors.Unwrap(cause)
			}
		}
		err = cause
	}
	if err != nil {
		s.fail(w, r, id, err)
	}
}

// newer is a state that holds everything acknowledged so far, if it is to be had soon.
func (s *Server) newer(ctx context.Context) (*fsm.View, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	return s.Replica.Consistent(ctx)
}

// errUnknown marks an error that says that this node does not know something. Nothing was read or written by then.
var errUnknown = errors.New("unknown here")

type unknown struct{ error }

func (u unknown) Is(target error) bool { return target == errUnknown }
func (u unknown) Unwrap() error        { return u.error }

// route answers a request, or returns an error that is still to be answered.
func (s *Server) route(ctx context.Context, w *recorder, req *request) error {
	to, err := s.locate(req.http, req.view)
	if err != nil {
		return unknown{err}
	}
	if req.http.Header.Get(api.HeaderNamespace) != "" {
		w.Header().Set(api.HeaderNamespace, to.ns)
	}
	if req.op == opUpdate && strings.HasSuffix(to.path, "/") {
		return fault.Text(fault.Invalid, "cannot write to a path ending in '/'")
	}
	req.ns, req.path = to.ns, strings.TrimSuffix(to.path, "/")
	w.x.place(req.view, req.op, req.ns, req.path, req.wrapTTL)
	rt, params := s.routes.find(to.path)
	if rt == nil && ownPath(to.path) {
		rt = noRoute
	}
	if rt != nil {
		req.params = params
		req.path = rt.canonical(req.path, params)
		if rt.quiet && (req.op == opRead || req.op == opHead) {
			w.x = nil
		}
		w.x.place(req.view, req.op, req.ns, req.path, req.wrapTTL)
		w.x.of(ownMount(req.path))
		s.system(ctx, w, req, rt)
		return nil
	}
	if req.op == opList && !strings.HasSuffix(to.path, "/") {
		to.path += "/" // a list is of what is below
	}
	return s.plugin(ctx, w, req, to)
}

// ownPath reports whether a path belongs to this server and never to a mount.
func ownPath(p string) bool {
	for _, own := range []string{"sys", "auth/token", "cubbyhole", "identity", "audit"} {
		if p == own || strings.HasPrefix(p, own+"/") {
			return true
		}
	}
	return false
}

// noRoute stands for paths of ours that nothing serves: who may not call them learns no more than that.
var noRoute = &route{pattern: "(no such path)", anyNode: true, ops: map[operation]handler{}}

// system runs one row of the table: authenticate, decode, authorise, handle, encode.
func (s *Server) system(ctx context.Context, w *recorder, req *request, rt *route) {
	rep, err := s.run(ctx, w, req, rt)
	switch {
	case err != nil:
		s.fail(w, req.http, req.id, err)
	case rep == nil && (req.op == opRead || req.op == opList):
		s.fail(w, req.http, req.id, &fault.Error{Kind: fault.NotFound})
	case rep == nil:
		w.WriteHeader(http.StatusNoContent)
	default:
		s.write(w, req.http, req.id, rt.doubled, rep)
	}
}

// run is everything of a system route but the encoding.
func (s *Server) run(ctx context.Context, w *recorder, req *request, rt *route) (*reply, error) {
	if leader := s.elsewhere(req, rt); leader != "" {
		return &reply{status: http.StatusTemporaryRedirect, raw: []byte{}, headers: map[string]string{
			"Location": leader + req.http.URL.RequestURI(),
		}}, nil
	}
	if !rt.anyNode && rt.access != open {
		// On a view that holds everything acknowledged before the call: a token that was revoked through another node
		// is refused here, whatever this node has heard.
		view, err := s.Replica.Consistent(ctx)
		if err != nil {
			return nil, err
		}
		req.view = view
	}
	if err := s.admit(req, rt); err != nil {
		return nil, err
	}
	w.x.by(req.who, s.clock.now(req.view))
	var raw json.RawMessage
	var err error
	if rt.rawBody == 0 {
		if raw, err = readBody(w, req.http, req.op, MaxSysBody); err != nil {
			return nil, err
		}
		if req.body, err = newFields(raw); err != nil {
			return nil, err
		}
		w.x.with(raw)
	}
	if err := s.authorise(req, rt); err != nil {
		return nil, err
	}
	if err := w.x.ask(); err != nil {
		return nil, err
	}
	over, err := s.spend(ctx, req.who)
	if err != nil {
		return nil, err
	}
	defer over()
	handle := rt.ops[req.op]
	switch {
	case rt == noRoute:
		return nil, &fault.Error{Kind: fault.UnsupportedPath}
	case req.op == opHelp:
		return &reply{bare: helpOf(rt)}, nil
	case handle == nil:
		return nil, &fault.Error{Kind: fault.UnsupportedOperation}
	}
	rep, err := s.handle(req, rt, handle)
	if err != nil || rep == nil {
		return nil, err
	}
	return s.wrapped(req, rep)
}

// elsewhere is the address of the leader's API where the caller wants a redirect instead of forwarding, for what this node
// would have to hand on; empty otherwise.
func (s *Server) elsewhere(req *request, rt *route) string {
	if rt.anyNode || req.http.Header.Get(api.HeaderNoForward) != "true" {
		return ""
	}
	if req.op != opUpdate && req.op != opDelete && req.op != opPatch {
		return ""
	}
	st := s.Cluster.Status()
	if st.IsLeader {
		return ""
	}
	return st.LeaderAPIAddress
}

// handle runs a handler and holds its answer against the body's unknown fields: refused on paths of our own before
// anything ran is impossible for a handler that reads as it goes, so there the handler calls strict itself.
func (s *Server) handle(req *request, rt *route, h handler) (*reply, error) {
	rep, err := h(req)
	if err != nil {
		return nil, err
	}
	if rep != nil && !rt.ours && rep.bare == nil && rep.raw == nil && rep.stream == nil && req.op == opUpdate && req.body != nil {
		if extra := req.body.ignored(); len(extra) > 0 {
			rep.warnings = append(rep.warnings,
				"Endpoint ignored these unrecognized parameters: ["+strings.Join(extra, " ")+"]")
		}
	}
	return rep, nil
}

// checked returns the first conversion error of the body; on paths of our own also an unknown field.
func (q *request) checked(ours bool) error {
	if q.body.err != nil {
		return q.body.err
	}
	if extra := q.body.ignored(); ours && len(extra) > 0 {
		return fault.Text(fault.Invalid, "unknown field %q: leave it out, or check its spelling", extra[0])
	}
	return nil
}

// stale asks for this node's own state: the way to look around while there is no leader.
func stale(r *http.Request) bool { return r.URL.Query().Has("stale") }
