// Package httpd is the HTTP door of a node: it decodes, authorises, proposes or reads, and encodes. It decides nothing.
package httpd

import (
	"context"
	"log/slog"
	"net/http"
	"path"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"

	"rollcall/fsm"
	"rollcall/node/api"
	"rollcall/node/fault"
	"rollcall/node/policy"
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
	inFlight prometheus.Gauge
	answers  *prometheus.HistogramVec
}

// New makes the door. It starts nothing; the caller serves Handler.
func New(cfg Config) (*Server, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	s := &Server{Config: cfg, log: cfg.Logger}
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

// recorder remembers the status of an answer for the metrics, and leaves streaming possible.
type recorder struct {
	http.ResponseWriter
	status int
}

func (r *recorder) WriteHeader(status int) {
	if r.status == 0 {
		r.status = status
	}
	r.ResponseWriter.WriteHeader(status)
}

func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

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
	h.Set(api.HeaderNode, s.NodeName)
	id := requestID()
	if r.URL.Path != "/v1" && !strings.HasPrefix(r.URL.Path, "/v1/") {
		s.fail(rec, r, id, &fault.Error{Kind: fault.UnsupportedPath, Text: "paths of the API begin with /v1/"})
		return
	}
	if clean := cleanPath(r.URL.Path); clean != r.URL.Path {
		u := *r.URL
		u.Path, u.RawPath = clean, ""
		h.Set("Location", u.RequestURI())
		rec.WriteHeader(http.StatusTemporaryRedirect)
		return
	}
	if isSys(r) {
		door = "sys"
	}
	s.dispatch(rec, r, id)
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

func (s *Server) dispatch(w http.ResponseWriter, r *http.Request, id string) {
	ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
	defer cancel()
	op, err := operationOf(r)
	if err != nil {
		s.fail(w, r, id, err)
		return
	}
	view := s.State.View()
	to, err := s.locate(r, view)
	if err != nil {
		s.fail(w, r, id, err)
		return
	}
	if op == opUpdate && strings.HasSuffix(to.path, "/") {
		s.fail(w, r, id, fault.Text(fault.Invalid, "cannot write to a path ending in '/'"))
		return
	}
	if rt, params := s.routes.find(to.path); rt != nil {
		s.system(ctx, w, r, &request{http: r, id: id, ns: to.ns, path: to.path, op: op, params: params, view: view}, rt)
		return
	}
	if to.path == "sys" || strings.HasPrefix(to.path, "sys/") {
		if _, err := policy.Authenticate(view, tokenOf(r)); err != nil {
			s.fail(w, r, id, err)
			return
		}
		s.fail(w, r, id, &fault.Error{Kind: fault.UnsupportedPath})
		return
	}
	s.plugin(ctx, w, r, id, to, op)
}

// system runs one row of the table: authenticate, authorise, decode, handle, encode.
func (s *Server) system(ctx context.Context, w http.ResponseWriter, r *http.Request, req *request, rt *route) {
	req.ctx = ctx
	if err := s.admit(req, rt); err != nil {
		s.fail(w, r, req.id, err)
		return
	}
	handle := rt.ops[req.op]
	if handle == nil && req.op == opHelp {
		s.writeJSON(w, http.StatusOK, map[string]any{"help": rt.summary, "see_also": nil})
		return
	}
	if handle == nil {
		s.fail(w, r, req.id, &fault.Error{Kind: fault.UnsupportedOperation})
		return
	}
	raw, err := readBody(w, r, req.op, MaxSysBody)
	if err != nil {
		s.fail(w, r, req.id, err)
		return
	}
	if req.body, err = newFields(raw); err != nil {
		s.fail(w, r, req.id, err)
		return
	}
	if !rt.anyNode && req.op != opUpdate && req.op != opDelete && !stale(r) {
		if req.view, err = s.Replica.Consistent(ctx); err != nil {
			s.fail(w, r, req.id, err)
			return
		}
	}
	rep, err := s.handle(req, rt, handle)
	if err != nil {
		s.fail(w, r, req.id, err)
		return
	}
	if rep == nil {
		if req.op == opRead || req.op == opList {
			s.fail(w, r, req.id, &fault.Error{Kind: fault.NotFound})
			return
		}
		w.WriteHeader(http.StatusNoContent)
		return
	}
	s.write(w, r, req.id, rt.doubled, rep, req.op)
}

// handle runs a handler and holds its answer against the body's unknown fields: refused on paths of our own before
// anything ran is impossible for a handler that reads as it goes, so there the handler calls strict itself.
func (s *Server) handle(req *request, rt *route, h handler) (*reply, error) {
	rep, err := h(req)
	if err != nil {
		return nil, err
	}
	if rep != nil && !rt.ours && rep.bare == nil && rep.raw == nil && rep.stream == nil && req.op == opUpdate {
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

// admit authenticates and authorises a request for a system route.
func (s *Server) admit(req *request, rt *route) error {
	if rt.access == open {
		return nil
	}
	who, err := policy.Authenticate(req.view, tokenOf(req.http))
	if err != nil {
		return err
	}
	req.who = who
	if rt.rootOnly && req.ns != "" {
		return fault.Text(fault.Invalid, "operation unavailable in namespaces")
	}
	if err := policy.Allow(req.view, who, req.ns, req.path, capabilityOf(req.op)); err != nil {
		return err
	}
	if rt.access == withSudo {
		return policy.Allow(req.view, who, req.ns, req.path, policy.Sudo)
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
	default:
		return policy.Read
	}
}

// tokenOf takes the caller's token: the contract's header first, then a bearer token.
func tokenOf(r *http.Request) string {
	if t := r.Header.Get(api.HeaderToken); t != "" {
		return t
	}
	if t, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); ok {
		return strings.TrimSpace(t)
	}
	return ""
}
