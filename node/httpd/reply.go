package httpd

import (
	"encoding/json"
	"maps"
	"net/http"

	"rollcall/node/api"
)

// reply is what a handler answers. The zero reply is 200 with "data": null.
type reply struct {
	// status overrides 200.
	status int
	// data is encoded into the envelope's data.
	data any
	// bare is encoded without an envelope, for the few paths that have none.
	bare any
	// raw is sent as it is, with contentType.
	raw         []byte
	contentType string
	warnings    []string
	// id replaces the request id in the envelope: a repeated reload answers with the first id.
	id      string
	headers map[string]string
	auth    any
	wrap    any
	// mountType is shown for plugins' answers.
	mountType string
	lease     *lease
	// stream takes over the response writer (server-sent events, snapshots).
	stream func(http.ResponseWriter, *http.Request) error
}

type lease struct {
	id        string
	renewable bool
	seconds   int64
}

// write sends a reply in the contract's envelope.
func (s *Server) write(w *recorder, r *http.Request, id string, doubled bool, rep *reply) {
	for k, v := range rep.headers {
		w.Header().Set(k, v)
	}
	status := rep.status
	if status == 0 {
		status = http.StatusOK
	}
	if rep.data != nil { // encoded once, for the answer and for its record
		rep.data = marshal(rep.data)
	}
	if w.x != nil {
		data, _ := rep.data.(json.RawMessage)
		if rep.bare != nil {
			data = marshal(rep.bare)
		}
		w.x.reply(rep, data)
	}
	switch {
	case rep.stream != nil:
		if err := rep.stream(w, r); err != nil {
			s.log.Warn("answer stream", "request_id", id, "path", r.URL.Path, "error", err)
		}
	case rep.raw != nil:
		if rep.contentType != "" {
			w.Header().Set("Content-Type", rep.contentType)
		}
		w.WriteHeader(status)
		_, _ = w.Write(rep.raw)
	case rep.bare != nil:
		s.writeJSON(w, status, rep.bare)
	default:
		s.writeJSON(w, status, envelope(id, doubled, rep))
	}
}

// envelope builds the answer's JSON object; with doubled, the keys of data stand beside it too.
func envelope(id string, doubled bool, rep *reply) any {
	if rep.id != "" {
		id = rep.id
	}
	env := api.Envelope{RequestID: id, Warnings: rep.warnings, MountType: rep.mountType}
	if rep.lease != nil {
		env.LeaseID, env.Renewable, env.LeaseDuration = rep.lease.id, rep.lease.renewable, rep.lease.seconds
	}
	if rep.wrap != nil {
		env.RequestID = "" // the id of what is inside stands there
	}
	if rep.data != nil {
		raw, err := json.Marshal(rep.data)
		if err != nil {
			raw = json.RawMessage("null")
		}
		env.Data = raw
	}
	env.Auth, env.WrapInfo = marshal(rep.auth), marshal(rep.wrap)
	if !doubled || rep.data == nil {
		return env
	}
	top := map[string]json.RawMessage{}
	if json.Unmarshal(env.Data, &top) != nil {
		return env
	}
	raw, err := json.Marshal(env)
	if err != nil {
		return env
	}
	outer := map[string]json.RawMessage{}
	if json.Unmarshal(raw, &outer) != nil {
		return env
	}
	// the envelope's own keys win
	maps.Copy(top, outer)
	return top
}

func marshal(v any) json.RawMessage {
	if v == nil {
		return nil
	}
	raw, err := json.Marshal(v)
	if err != nil {
		return nil
	}
	return raw
}

func (s *Server) writeJSON(w http.ResponseWriter, status int, v any) {
	raw, err := json.Marshal(v)
	if err != nil {
		s.log.Error("encode answer", "error", err)
		status, raw = http.StatusInternalServerError, []byte(`{"errors":["encode answer: see the log of this node"]}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(append(raw, '\n'))
}

// fail sends an error in the contract's shape: one text, the status of its kind, and Go's multierror form where the
// contract's servers use it.
func (s *Server) fail(w *recorder, r *http.Request, id string, err error) {
	status, texts := api.ErrorReply(err)
	w.x.refuse(texts)
	if status == http.StatusInternalServerError {
		s.log.Error("request failed", "request_id", id, "method", r.Method, "path", r.URL.Path, "error", err)
	}
	s.writeJSON(w, status, api.ErrorBody{Errors: texts})
}
