package router

import (
	"encoding/json"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
	pluginpb "rollcall/proto/plugin"
)

// mountPoint is the mount's path as plugins and clients know it, the namespace included: "team/auth/jwt/".
func mountPoint(m *commandv1.Mount) string {
	if m.GetTable() == "auth" {
		return m.GetNamespace() + "auth/" + m.GetPath()
	}
	return m.GetNamespace() + m.GetPath()
}

// pluginRequest is what the plugin receives (CONTRACT 6.2).
func (p *passage) pluginRequest() *pluginpb.Request {
	q, m := p.req, p.m
	data := string(q.Data)
	if data == "" {
		data = "{}"
	}
	out := &pluginpb.Request{
		Id: q.ID, Operation: q.Operation, Path: p.rest, Data: data, Secret: q.Secret, Auth: q.Auth,
		ClientToken: q.ClientToken, ClientTokenAccessor: q.TokenAccessor, DisplayName: q.DisplayName, EntityId: q.EntityID,
		MountPoint: mountPoint(m), MountType: m.GetType(), MountAccessor: m.GetAccessor(), Unauthenticated: q.Unauthenticated,
		ClientTokenRemainingUses: q.TokenRemainingUses,
	}
	if q.Unauthenticated {
		out.ClientToken = ""
	}
	if h := p.headers(); len(h) > 0 {
		out.Headers = make(map[string]*pluginpb.Header, len(h))
		for k, v := range h {
			out.Headers[k] = &pluginpb.Header{Header: v}
		}
	}
	if q.RemoteAddr != "" {
		host, port, err := net.SplitHostPort(q.RemoteAddr)
		if err != nil {
			host = q.RemoteAddr
		}
		n, _ := strconv.ParseInt(port, 10, 32)
		out.Connection = &pluginpb.Connection{RemoteAddr: host, RemotePort: int32(n)}
	}
	return out
}

// headers are those of the client's that the mount lets through. The token never is among them: not in its own header,
// and not as Authorization where that is what the client authenticated with.
func (p *passage) headers() map[string][]string {
	pass := p.m.GetConfig().GetPassthroughRequestHeaders()
	if len(pass) == 0 || len(p.req.Headers) == 0 {
		return nil
	}
	out := map[string][]string{}
	for name, values := range p.req.Headers {
		if !listed(pass, name) || strings.EqualFold(name, "X-Vault-Token") {
			continue
		}
		if strings.EqualFold(name, "Authorization") && !p.req.fromPeer && !p.req.Unauthenticated &&
			p.req.Headers.Get("X-Vault-Token") == "" {
			continue
		}
		out[http.CanonicalHeaderKey(name)] = values
	}
	return out
}

func listed(names []string, name string) bool {
	return slices.ContainsFunc(names, func(n string) bool { return strings.EqualFold(n, name) })
}

// allowed keeps the response headers that the mount's config lists.
func allowed(h map[string]*pluginpb.Header, list []string) map[string]*pluginpb.Header {
	for name := range h {
		if !listed(list, name) {
			delete(h, name)
		}
	}
	return h
}

// errorText is the text of an error response: one whose data is {"error": "..."} and nothing else. The data is looked at
// only when it can be one.
func errorText(resp *pluginpb.Response) string {
	data := resp.GetData()
	if !strings.HasPrefix(data, `{"error":`) {
		return ""
	}
	var fields map[string]json.RawMessage
	if json.Unmarshal([]byte(data), &fields) != nil || len(fields) != 1 {
		return ""
	}
	var text string
	if json.Unmarshal(fields["error"], &text) != nil || text == "" {
		return string(fields["error"])
	}
	return text
}

// translate turns what a plugin said went wrong into our kinds (CONTRACT 6.4): an error response alone, or with the
// invalid-request error, is the client's fault in the plugin's words.
func translate(resp *pluginpb.Response, err error) error {
	text := errorText(resp)
	if text == "" {
		return err
	}
	if err == nil || fault.Is(err, fault.Invalid) {
		return fault.Text(fault.Invalid, "%s", text)
	}
	e := &fault.Error{Kind: fault.KindOf(err), Text: text, Err: err}
	if c, ok := coded(err); ok {
		e.Code = c
	}
	return e
}
