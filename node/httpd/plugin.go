package httpd

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"net/http"
	"strconv"
	"strings"

	pluginpb "rollcall/proto/plugin"

	"rollcall/node/api"
	"rollcall/node/fault"
	"rollcall/node/policy"
)

// plugin runs a request on a mount's plugin. The body goes through as it came.
func (s *Server) plugin(ctx context.Context, w http.ResponseWriter, r *http.Request, id string, to target, op operation) {
	if op == opHead {
		s.fail(w, r, id, &fault.Error{Kind: fault.UnsupportedOperation})
		return
	}
	match, err := s.Router.Lookup(ctx, to.ns, to.path)
	if err != nil {
		// Who may not look may not learn what is mounted either.
		if _, aerr := policy.Authenticate(s.State.View(), tokenOf(r)); aerr != nil {
			err = aerr
		}
		s.fail(w, r, id, err)
		return
	}
	req := &PluginRequest{ID: id, Namespace: to.ns, Path: to.path, Operation: string(op),
		Headers: r.Header, RemoteAddr: r.RemoteAddr, Unauthenticated: match.Unauthenticated,
		NoForward: r.Header.Get(api.HeaderNoForward) == "true"}
	who, err := s.identify(r, match, req)
	if err != nil {
		s.fail(w, r, id, err)
		return
	}
	if req.Data, err = readBody(w, r, op, MaxPluginBody); err != nil {
		s.fail(w, r, id, err)
		return
	}
	if err := s.allowPlugin(ctx, who, to, match, req, op); err != nil {
		s.fail(w, r, id, err)
		return
	}
	resp, err := s.Router.Handle(ctx, req)
	s.answerPlugin(w, r, id, op, resp, err)
}

// identify authenticates the caller of a plugin path and puts into the request what a plugin may know of the token.
func (s *Server) identify(r *http.Request, match Match, req *PluginRequest) (*policy.Identity, error) {
	if match.Unauthenticated {
		return nil, nil
	}
	who, err := policy.Authenticate(s.State.View(), tokenOf(r))
	if err != nil {
		return nil, err
	}
	req.ClientToken = hex.EncodeToString(who.Hash)
	req.TokenAccessor = who.Token.GetAccessor()
	req.DisplayName = who.Token.GetDisplayName()
	req.EntityID = who.Token.GetEntityId()
	req.Policies = who.Token.GetPolicies()
	return who, nil
}

// allowPlugin turns an update into a create when the plugin's existence check says that nothing is there, and decides
// with that operation. Root paths of a plugin need sudo besides.
func (s *Server) allowPlugin(ctx context.Context, who *policy.Identity, to target, match Match,
	req *PluginRequest, op operation,
) error {
	if op == opUpdate {
		found, hasCheck, err := s.Router.Exists(ctx, req)
		if err != nil {
			return err
		}
		if hasCheck && !found {
			req.Operation = "create"
		}
	}
	if who == nil {
		return nil
	}
	view := s.State.View()
	need := capabilityOf(op)
	if req.Operation == "create" {
		need = policy.Create
	}
	if err := policy.Allow(view, who, to.ns, to.path, need); err != nil {
		return err
	}
	if match.Root {
		return policy.Allow(view, who, to.ns, to.path, policy.Sudo)
	}
	return nil
}

// answerPlugin encodes a plugin's response: its data goes into the envelope as it came.
func (s *Server) answerPlugin(w http.ResponseWriter, r *http.Request, id string, op operation, resp *PluginResponse, err error) {
	if resp != nil {
		h := w.Header()
		h.Set(api.HeaderGeneration, strconv.FormatUint(resp.Generation, 10))
		h.Set(api.HeaderNode, resp.Node)
		h.Set(api.HeaderIndex, strconv.FormatUint(resp.Index, 10))
	}
	if err != nil {
		s.fail(w, r, id, err)
		return
	}
	if resp.Plugin == nil {
		s.nothing(w, r, id, op)
		return
	}
	if s.answerSpecial(w, r, id, resp) {
		return
	}
	env := api.Envelope{RequestID: id, Warnings: resp.Plugin.GetWarnings()}
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
	if op == opList && !hasKeys(env.Data) {
		if len(env.Warnings) == 0 {
			s.nothing(w, r, id, op)
			return
		}
		status = http.StatusNotFound
	}
	s.writeJSON(w, status, env)
}

// nothing answers a nil response: 404 for what reads, 204 for what writes.
func (s *Server) nothing(w http.ResponseWriter, r *http.Request, id string, op operation) {
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
func (s *Server) answerSpecial(w http.ResponseWriter, r *http.Request, id string, resp *PluginResponse) bool {
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

func (s *Server) sendRaw(w http.ResponseWriter, r *http.Request, id string, raw specialData) {
	status := http.StatusOK
	if n, err := raw.Status.Int64(); err == nil && n >= 200 && n <= 599 {
		status = int(n)
	}
	h := w.Header()
	for k, v := range map[string]string{"Content-Type": raw.ContentType, "Cache-Control": raw.CacheControl,
		"Pragma": raw.Pragma, "WWW-Authenticate": raw.Challenge} {
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
