package httpd

import (
	"encoding/json"
	"errors"
	"maps"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	pluginpb "rollcall/proto/plugin"

	"rollcall/fsm"
	"rollcall/node/api"
	"rollcall/node/fault"
	"rollcall/node/policy"
)

// Auditor writes audit records (node/audit). Its methods may be called from any goroutine.
type Auditor interface {
	// Record writes one entry, and hashes what is secret in it. Where it fails, the request is neither run nor answered.
	Record(e *api.AuditEntry) error
	// Hash is a text as records show it.
	Hash(text string) (string, error)
	// Describe is the device as sys/audit lists it.
	Describe() api.AuditDevice
	// Headers are the request headers that records hold, in lower case.
	Headers() []string
}

// exchange is a request and its answer as the audit file shall have them: one record of each, the first before anything is
// done, the second before anything is said. Whoever learns something about the request puts it here; ask and answer write it
// down. A nil exchange is one that is not audited, and all of its methods do nothing. It belongs to its request's goroutine.
type exchange struct {
	out   Auditor
	entry api.AuditEntry
	back  api.AuditResponse
	// asked: the request's record was written, or could not be.
	asked, failed bool
}

// exchange begins to watch a request; nil where nothing is audited.
func (s *Server) exchange(r *http.Request, id string) *exchange {
	if s.Audit == nil {
		return nil
	}
	x := &exchange{out: s.Audit, entry: api.AuditEntry{Node: s.NodeName}}
	q := &x.entry.Request
	q.ID, q.Path = id, strings.TrimPrefix(r.URL.Path, "/v1/")
	q.ClientToken = tokenOf(r)
	q.RemoteAddress = r.RemoteAddr
	if host, port, err := net.SplitHostPort(r.RemoteAddr); err == nil {
		q.RemoteAddress = host
		q.RemotePort, _ = strconv.Atoi(port)
	}
	for _, name := range s.Audit.Headers() {
		if v := r.Header.Values(name); len(v) > 0 {
			if q.Headers == nil {
				q.Headers = map[string][]string{}
			}
			q.Headers[name] = v
		}
	}
	return x
}

// place says what is asked of which path.
func (x *exchange) place(view *fsm.View, op operation, ns, path string, wrapTTL time.Duration) {
	if x == nil {
		return
	}
	q := &x.entry.Request
	q.Operation, q.Path, q.WrapTTL = string(op), path, int64(wrapTTL/time.Second)
	q.Namespace = &api.AuditNamespace{ID: "root"}
	if row := view.Namespace(ns); row != nil {
		q.Namespace = &api.AuditNamespace{ID: row.GetId(), Path: ns}
	}
}

// of says which mount a call is of. Paths of this server have no row of their own.
func (x *exchange) of(m api.AuditMount) {
	if x != nil {
		x.entry.Request.AuditMount, x.back.AuditMount = m, m
	}
}

// ownMount is the mount that clients take a path of this server for.
func ownMount(path string) api.AuditMount {
	if strings.HasPrefix(path, "auth/token/") {
		return api.AuditMount{MountPoint: "auth/token/", MountType: "token", MountClass: "auth"}
	}
	return api.AuditMount{MountPoint: "sys/", MountType: "system", MountClass: "secret"}
}

func pluginMount(m Match) api.AuditMount {
	row := m.Mount
	return api.AuditMount{
		MountPoint: row.GetNamespace() + displayPath(row), MountType: row.GetType(), MountAccessor: row.GetAccessor(),
		MountClass: row.GetTable(), External: true, RequestClear: row.GetConfig().GetAuditNonHmacRequestKeys(),
		ResponseClear: row.GetConfig().GetAuditNonHmacResponseKeys(),
	}
}

// by says who calls.
func (x *exchange) by(who *policy.Identity, now uint64) {
	if x == nil || who == nil {
		return
	}
	t := who.Token
	a := &api.AuditAuth{
		ClientToken: x.entry.Request.ClientToken, Accessor: t.GetAccessor(), DisplayName: t.GetDisplayName(),
		Policies: t.GetPolicies(), TokenPolicies: t.GetPolicies(), PolicyResults: &api.AuditPolicyResults{}, Metadata: t.GetMeta(),
		EntityID: t.GetEntityId(), TokenType: t.GetType(), RemainingUses: t.GetNumUses(),
	}
	if at := t.GetExpiresClockNs(); at > now {
		a.TokenTTL = int64(time.Duration(at-now) / time.Second)
	}
	if ms := t.GetCreatedWallMs(); ms > 0 {
		a.TokenIssueTime = time.UnixMilli(ms).UTC().Format(time.RFC3339)
	}
	x.entry.Auth, x.entry.Request.ClientTokenAccessor = a, t.GetAccessor()
}

// with says what was sent.
func (x *exchange) with(data json.RawMessage) {
	if x != nil {
		x.entry.Request.Data = data
	}
}

// errUnrecorded refuses a request that would leave no trace.
var errUnrecorded = fault.New(fault.Internal, "record", "request", "the audit device of this node does not take it, so nothing was done")

// ask writes the record of a request that is about to be carried out. On an error nothing may be done.
func (x *exchange) ask() error {
	if x == nil || x.asked {
		return nil
	}
	if x.entry.Auth != nil {
		x.entry.Auth.PolicyResults.Allowed = true
	}
	return x.record("")
}

func (x *exchange) record(why string) error {
	x.asked = true
	e := x.entry
	e.Type, e.Error, e.Time = api.AuditTypeRequest, why, auditTime()
	if err := x.out.Record(&e); err != nil {
		x.failed = true
		return errUnrecorded
	}
	return nil
}

func auditTime() string { return time.Now().UTC().Format(time.RFC3339Nano) }

// refuse says what error the answer tells.
func (x *exchange) refuse(texts []string) {
	if x == nil {
		return
	}
	x.entry.Error = strings.TrimSpace(strings.Join(texts, "; "))
	if x.entry.Error == "" {
		x.entry.Error = "refused without a text"
	}
}

// reply says what a handler answers; data is encoded already.
func (x *exchange) reply(rep *reply, data json.RawMessage) {
	if x == nil {
		return
	}
	b := &x.back
	b.Data, b.Warnings, b.Redirect = data, rep.warnings, rep.headers["Location"]
	if rep.lease != nil {
		b.Secret = &api.AuditSecret{LeaseID: rep.lease.id}
	}
	if a, ok := rep.auth.(*api.Auth); ok {
		b.Auth = letIn(a)
	}
	if info, ok := rep.wrap.(*api.WrapInfo); ok {
		b.WrapInfo = info
	}
	if len(rep.raw) > 0 && rep.contentType == "application/json" { // what was wrapped
		var inside api.Envelope
		if json.Unmarshal(rep.raw, &inside) == nil {
			var auth api.Auth
			if b.Data = inside.Data; len(inside.Auth) > 0 && json.Unmarshal(inside.Auth, &auth) == nil && auth.ClientToken != "" {
				b.Auth = letIn(&auth)
			}
		}
	}
}

func letIn(a *api.Auth) *api.AuditAuth {
	return &api.AuditAuth{
		ClientToken: a.ClientToken, Accessor: a.Accessor, Policies: a.Policies, TokenPolicies: a.TokenPolicies, Metadata: a.Metadata,
		EntityID: a.EntityID, TokenType: a.TokenType, TokenTTL: a.LeaseDuration, RemainingUses: a.NumUses,
	}
}

// plugin says what a plugin answers.
func (x *exchange) plugin(p *pluginpb.Response) {
	if x == nil || p == nil {
		return
	}
	b := &x.back
	b.Warnings, b.Redirect = p.GetWarnings(), p.GetRedirect()
	if d := p.GetData(); d != "" {
		b.Data = json.RawMessage(d)
	}
	if id := p.GetSecret().GetLeaseId(); id != "" {
		b.Secret = &api.AuditSecret{LeaseID: id}
	}
}

// ran says which instance answered.
func (x *exchange) ran(node string, generation uint64) {
	if x != nil {
		x.back.RanOn, x.back.Generation = node, generation
	}
}

// answer writes the record of the answer, and before it that of a request that came to its end without being carried out.
// On an error the answer must not be given.
func (x *exchange) answer(status int) error {
	if x == nil || x.failed {
		return nil
	}
	if !x.asked {
		if err := x.record(x.entry.Error); err != nil {
			return err
		}
	}
	e := x.entry
	x.back.Status = status
	e.Type, e.Time, e.Response = api.AuditTypeResponse, auditTime(), &x.back
	if x.out.Record(&e) != nil {
		return errUnanswered
	}
	return nil
}

var errUnanswered = errors.New("the audit device of this node does not take the answer, so it is not shown; the request itself has run")

// recorder stands between an answer and the client: it remembers the status for the metrics, and lets nothing out that is
// not in the audit file.
type recorder struct {
	http.ResponseWriter
	x      *exchange
	status int
	// held: the answer could not be recorded. A 500 was sent in its place, and what else is written goes nowhere.
	held bool
}

func (r *recorder) WriteHeader(status int) {
	if r.held {
		return
	}
	if r.status == 0 {
		if err := r.x.answer(status); err != nil {
			r.hold(err)
			return
		}
		r.status = status
	}
	r.ResponseWriter.WriteHeader(status)
}

func (r *recorder) Write(p []byte) (int, error) {
	if r.status == 0 {
		r.WriteHeader(http.StatusOK)
	}
	if r.held {
		return 0, errUnanswered
	}
	return r.ResponseWriter.Write(p)
}

// FlushError sends what was written so far: the header at least, which is recorded first.
func (r *recorder) FlushError() error {
	if r.status == 0 {
		r.WriteHeader(http.StatusOK)
	}
	if r.held {
		return errUnanswered
	}
	return http.NewResponseController(r.ResponseWriter).Flush()
}

func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

// keptAside are the headers of every answer, which tell nothing about this one.
var keptAside = []string{"Cache-Control", "Strict-Transport-Security", api.HeaderNode}

// hold answers in place of an answer that could not be recorded.
func (r *recorder) hold(err error) {
	r.held, r.status = true, http.StatusInternalServerError
	h := r.Header()
	kept := http.Header{}
	for _, name := range keptAside {
		if v := h.Values(name); len(v) > 0 {
			kept[name] = v
		}
	}
	clear(h)
	maps.Copy(h, kept)
	h.Set("Content-Type", "application/json")
	r.ResponseWriter.WriteHeader(r.status)
	raw, merr := json.Marshal(api.ErrorBody{Errors: []string{err.Error()}})
	if merr == nil {
		_, _ = r.ResponseWriter.Write(append(raw, '\n'))
	}
}

// listAudit tells of the device that this node's configuration enables.
func (s *Server) listAudit(*request) (*reply, error) {
	out := map[string]api.AuditDevice{}
	if s.Audit != nil {
		d := s.Audit.Describe()
		out[d.Path] = d
	}
	return &reply{data: out}, nil
}

// auditHash answers with a text as records show it, for whoever looks for a value in the file.
func (s *Server) auditHash(q *request) (*reply, error) {
	input := q.body.str("input")
	if q.body.err != nil {
		return nil, q.body.err
	}
	if s.Audit == nil || strings.Trim(q.params["path"], "/")+"/" != s.Audit.Describe().Path {
		return nil, fault.Text(fault.Invalid, "unknown audit backend %q: GET sys/audit lists what this node has", q.params["path"])
	}
	if input == "" {
		return nil, fault.Text(fault.Invalid, "the \"input\" parameter is empty")
	}
	hash, err := s.Audit.Hash(input)
	if err != nil {
		return nil, err
	}
	return &reply{data: map[string]any{"hash": hash}}, nil
}
