package httpd

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	pluginpb "rollcall/proto/plugin"

	"rollcall/node/api"
	"rollcall/node/fault"
	"rollcall/node/policy"
)

// plugin runs a request on a mount's plugin. The body goes through as it came.
func (s *Server) plugin(ctx context.Context, w *recorder, q *request, to target) error {
	resp, rep, err := s.callPlugin(ctx, w, q, to)
	if errors.Is(err, errUnknown) {
		return err
	}
	if resp != nil {
		h := w.Header()
		h.Set(api.HeaderGeneration, strconv.FormatUint(resp.Generation, 10))
		h.Set(api.HeaderNode, resp.Node)
		h.Set(api.HeaderIndex, strconv.FormatUint(resp.Index, 10))
		w.x.ran(resp.Node, resp.Generation)
	}
	switch {
	case fault.Is(err, fault.NotLeader) && noForward(q.http) && s.Cluster.Status().LeaderAPIAddress != "":
		w.Header().Set("Location", s.Cluster.Status().LeaderAPIAddress+q.http.URL.RequestURI())
		w.WriteHeader(http.StatusTemporaryRedirect)
	case err != nil:
		s.fail(w, q.http, q.id, err)
	case rep != nil:
		s.write(w, q.http, q.id, false, rep)
	default:
		s.answerPlugin(w, q, resp)
	}
	return nil
}

func noForward(r *http.Request) bool { return r.Header.Get(api.HeaderNoForward) == "true" }

// callPlugin is everything of a plugin request but the encoding. A reply stands for the plugin's own answer.
func (s *Server) callPlugin(ctx context.Context, w *recorder, q *request, to target) (*PluginResponse, *reply, error) {
	if q.op == opHead {
		return nil, nil, &fault.Error{Kind: fault.Invalid, Code: http.StatusMethodNotAllowed}
	}
	match, err := s.Router.Lookup(ctx, to.ns, to.path)
	if err != nil {
		return nil, nil, unknown{s.hidden(q, to, err)}
	}
	w.x.of(pluginMount(match))
	req := &PluginRequest{
		ID: q.id, Namespace: to.ns, Path: to.path, Operation: string(q.op), Headers: q.http.Header,
		RemoteAddr: q.http.RemoteAddr, Unauthenticated: match.Unauthenticated, NoForward: noForward(q.http),
	}
	if err := s.identify(q, match, req); err != nil {
		return nil, nil, unknown{err}
	}
	w.x.by(q.who, s.clock.now(q.view))
	if req.Data, err = readBody(w, q.http, q.op, MaxPluginBody); err != nil {
		return nil, nil, err
	}
	w.x.with(req.Data)
	q.path = displayPath(match.Mount) + match.Rest // what is decided about is what was routed by
	err = s.allowPlugin(ctx, q, match, req)
	w.x.place(q.view, operation(req.Operation), q.ns, q.path, q.wrapTTL)
	if err != nil {
		return nil, nil, err
	}
	if err := w.x.ask(); err != nil {
		return nil, nil, err
	}
	over, err := s.spend(ctx, q.who)
	if err != nil {
		return nil, nil, err
	}
	defer over()
	resp, err := s.Router.Handle(ctx, req)
	if err != nil || resp == nil || resp.Plugin == nil {
		return resp, nil, err
	}
	rep, err := s.afterPlugin(ctx, q, match, req, resp)
	return resp, rep, err
}

// hidden is the answer where nothing is mounted: who may not look may not learn that either.
func (s *Server) hidden(q *request, to target, err error) error {
	who, aerr := s.authenticate(q.view, q.http)
	if aerr != nil {
		return aerr
	}
	if aerr := s.Policies.Allow(q.view, who, policy.Query{Namespace: to.ns, Path: to.path, Need: capabilityOf(q.op)}); aerr != nil {
		return aerr
	}
	return err
}

// identify authenticates the caller of a plugin path and puts into the request what a plugin may know of the token.
func (s *Server) identify(q *request, match Match, req *PluginRequest) error {
	if match.Unauthenticated {
		return nil
	}
	who, err := s.authenticate(q.view, q.http)
	if err != nil {
		return err
	}
	q.who = who
	t := who.Token
	req.ClientToken, req.TokenAccessor, req.DisplayName = hex.EncodeToString(who.Hash), t.GetAccessor(), t.GetDisplayName()
	req.EntityID, req.Policies, req.TokenRemainingUses = t.GetEntityId(), t.GetPolicies(), t.GetNumUses()
	if at, now := t.GetExpiresClockNs(), s.clock.now(q.view); at > now {
		req.TokenTTL = time.Duration(at - now)
	}
	return nil
}

// allowPlugin decides about a request. An update becomes a create when the plugin's
// existence check says that nothing is there, and is decided about as one. Root paths of a plugin need sudo besides.
func (s *Server) allowPlugin(ctx context.Context, q *request, match Match, req *PluginRequest) error {
	if q.who == nil {
		if q.op == opUpdate {
			return s.checkExists(ctx, req)
		}
		return nil
	}
	query := policy.Query{
		Namespace: q.ns, Path: q.path, Need: capabilityOf(q.op), WrapTTL: q.wrapTTL,
		Data: func() map[string]json.RawMessage {
			f, err := newFields(req.Data)
			if err != nil {
				return nil
			}
			return f.raw
		},
	}
	first := s.Policies.Allow(q.view, q.who, query)
	if q.op == opUpdate {
		create := query
		create.Need = policy.Create
		second := s.Policies.Allow(q.view, q.who, create)
		if first != nil && second != nil {
			return first // either way: the plugin is not even asked
		}
		if err := s.checkExists(ctx, req); err != nil {
			return err
		}
		if req.Operation == "create" {
			first, query = second, create
		}
	}
	if first != nil {
		return first
	}
	if match.Root && query.Need != policy.Help {
		query.Need = policy.Sudo
		if err := s.Policies.Allow(q.view, q.who, query); err != nil {
			return err
		}
	}
	return nil
}

// checkExists turns an update of what is not there into a create.
func (s *Server) checkExists(ctx context.Context, req *PluginRequest) error {
	found, hasCheck, err := s.Router.Exists(ctx, req)
	if hasCheck && !found {
		req.Operation = "create"
	}
	return err
}

// afterPlugin makes of an answer what only this server can: a login's token, and a wrapped answer.
func (s *Server) afterPlugin(ctx context.Context, q *request, match Match, req *PluginRequest, resp *PluginResponse) (*reply, error) {
	p := resp.Plugin
	ttl := q.wrapTTL
	if w := p.GetWrapInfo(); w.GetTTL() > 0 && (ttl == 0 || time.Duration(w.GetTTL()) < ttl) {
		ttl = time.Duration(w.GetTTL())
	}
	if p.GetAuth() == nil && (ttl == 0 || mayBeRaw(p) || p.GetRedirect() != "" || q.op == opHelp) {
		return nil, nil
	}
	rep := &reply{warnings: p.GetWarnings(), mountType: resp.Mount.GetType()}
	if d := p.GetData(); d != "" && d != "null" {
		rep.data = json.RawMessage(d)
	}
	if sec := p.GetSecret(); sec != nil {
		rep.lease = &lease{
			id: sec.GetLeaseId(), renewable: sec.GetLeaseOptions().GetRenewable(),
			seconds: sec.GetLeaseOptions().GetTTL() / 1e9,
		}
	}
	if p.GetAuth() != nil {
		if !match.Unauthenticated || match.Mount.GetTable() != "auth" {
			return nil, fault.Text(fault.Internal, "internal error")
		}
		auth, warnings, err := s.login(ctx, q, match, req, p.GetAuth())
		if err != nil {
			return nil, err
		}
		rep.auth, rep.warnings = auth, append(rep.warnings, warnings...)
	}
	q.wrapTTL = ttl
	return s.wrapped(q, rep)
}

// answerPlugin encodes a plugin's response: its data goes into the envelope as it came.
func (s *Server) answerPlugin(w *recorder, q *request, resp *PluginResponse) {
	if resp == nil || resp.Plugin == nil {
		s.nothing(w, q.http, q.id, q.op)
		return
	}
	w.x.plugin(resp.Plugin)
	s.sendHeaders(w, resp.Plugin)
	if s.answerSpecial(w, q.http, q.id, resp) {
		return
	}
	env := api.Envelope{RequestID: q.id, Warnings: resp.Plugin.GetWarnings()}
	if d := resp.Plugin.GetData(); d != "" && d != "null" {
		env.Data = json.RawMessage(d)
	}
	if resp.Mount != nil {
		env.MountType = resp.Mount.GetType()
	}
	if sec := resp.Plugin.GetSecret(); sec != nil {
		env.LeaseID = sec.GetLeaseId()
		if lo := sec.GetLeaseOptions(); lo != nil {
			env.LeaseDuration = lo.GetTTL() / 1e9
			env.Renewable = lo.GetRenewable()
		}
	}
	status := http.StatusOK
	if q.op == opList && !hasKeys(env.Data) {
		if len(env.Warnings) == 0 {
			s.nothing(w, q.http, q.id, q.op)
			return
		}
		status = http.StatusNotFound
	}
	s.writeJSON(w, status, env)
}

// keptHeaders are ours: no plugin sets them, whatever its mount allows.
var keptHeaders = []string{
	api.HeaderNode, api.HeaderGeneration, api.HeaderIndex, api.HeaderNamespace, "Content-Length",
	"Content-Type", "Connection", "Transfer-Encoding", "Trailer", "Upgrade", "Strict-Transport-Security", "Set-Cookie",
}

// sendHeaders passes on what the router has let through.
func (s *Server) sendHeaders(w http.ResponseWriter, p *pluginpb.Response) {
	for name, values := range p.GetHeaders() {
		if name = http.CanonicalHeaderKey(name); !slices.Contains(keptHeaders, name) {
			w.Header()[name] = values.GetHeader()
		}
	}
}

// nothing answers a nil response: 404 for what reads, 204 for what writes.
func (s *Server) nothing(w *recorder, r *http.Request, id string, op operation) {
	if op == opRead || op == opList || op == opHelp {
		s.fail(w, r, id, &fault.Error{Kind: fault.NotFound})
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func hasKeys(data json.RawMessage) bool {
	var d struct {
		Keys []json.RawMessage `json:"keys"`
	}
	return json.Unmarshal(data, &d) == nil && len(d.Keys) > 0
}

// specialData is what a plugin puts into its data to answer with something else than an envelope (CONTRACT 6.3).
type specialData struct {
	ContentType  string          `json:"http_content_type"`
	RawBody      json.RawMessage `json:"http_raw_body"`
	Status       json.Number     `json:"http_status_code"`
	CacheControl string          `json:"http_raw_cache_control"`
	Pragma       string          `json:"http_raw_pragma"`
	Challenge    string          `json:"http_www_authenticate"`
	Help         *string         `json:"help"`
}

// answerSpecial sends redirects and raw bodies; it reports whether it answered.
func (s *Server) answerSpecial(w *recorder, r *http.Request, id string, resp *PluginResponse) bool {
	p := resp.Plugin
	if to := p.GetRedirect(); to != "" {
		http.Redirect(w, r, to, http.StatusFound)
		return true
	}
	if r.URL.Query().Get("help") != "" {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write([]byte(p.GetData()))
		return true
	}
	if !mayBeRaw(p) {
		return false
	}
	var raw specialData
	if json.Unmarshal([]byte(p.GetData()), &raw) != nil || raw.ContentType == "" {
		return false
	}
	if p.GetSecret() != nil || p.GetAuth() != nil {
		s.fail(w, r, id, fault.Text(fault.Internal, "a plugin's raw answer cannot carry a secret or a login"))
		return true
	}
	s.sendRaw(w, r, id, raw)
	return true
}

func (s *Server) sendRaw(w *recorder, r *http.Request, id string, raw specialData) {
	status := http.StatusOK
	if n, err := raw.Status.Int64(); err == nil && n >= 200 && n <= 599 {
		status = int(n)
	}
	h := w.Header()
	for k, v := range map[string]string{
		"Content-Type": raw.ContentType, "Cache-Control": raw.CacheControl,
		"Pragma": raw.Pragma, "WWW-Authenticate": raw.Challenge,
	} {
		if v != "" {
			h.Set(k, v)
		}
	}
	if status == http.StatusNoContent {
		w.WriteHeader(status)
		return
	}
	body, err := rawBody(raw.RawBody)
	if err != nil {
		h.Del("Content-Type")
		s.fail(w, r, id, err)
		return
	}
	w.WriteHeader(status)
	_, _ = w.Write(body)
}

// rawBody decodes http_raw_body: bytes arrive as base64, as encoding/json writes them; anything else as its text.
func rawBody(v json.RawMessage) ([]byte, error) {
	if len(v) == 0 || string(v) == "null" {
		return nil, nil
	}
	var b []byte
	if json.Unmarshal(v, &b) == nil {
		return b, nil
	}
	var s string
	if err := json.Unmarshal(v, &s); err != nil {
		return nil, fault.New(fault.Internal, "read", "http_raw_body", "a plugin's raw body is neither bytes nor text")
	}
	return []byte(s), nil
}

// mayBeRaw is the cheap test before data is decoded: only an answer that names the key can be raw.
func mayBeRaw(p *pluginpb.Response) bool {
	return strings.Contains(p.GetData(), `"http_content_type"`)
}
