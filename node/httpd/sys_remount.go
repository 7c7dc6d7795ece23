package httpd

import (
	"encoding/base64"
	"encoding/json"
	"strings"

	"github.com/google/uuid"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// mountOf splits a client's "auth/x" or "x" into table and path.
func mountOf(p string) (table, path string) {
	p = strings.Trim(p, "/") + "/"
	if rest, ok := strings.CutPrefix(p, "auth/"); ok && rest != "" {
		return "auth", rest
	}
	return "secret", p
}

// oneReading refuses a path for a mount that something in front of this server, or behind it, takes for another one: a backslash
// is a slash to some. (The state, which must read old logs as ever, has no such rule.)
func oneReading(path string) error {
	if strings.Contains(path, `\`) {
		return fault.Text(fault.Invalid, "cannot mount %q: a backslash is a slash to some, so it stands in no path", path)
	}
	return nil
}

func (s *Server) remount(q *request) (*reply, error) {
	from, to := q.body.str("from"), q.body.str("to")
	if q.body.err != nil || from == "" || to == "" {
		return nil, fault.Text(fault.Invalid, "both 'from' and 'to' path must be specified as a string")
	}
	cmd := &commandv1.MoveMount{Namespace: q.ns, ToNamespace: q.ns}
	cmd.Table, cmd.Path = mountOf(from)
	cmd.ToTable, cmd.ToPath = mountOf(to)
	if err := oneReading(to); err != nil {
		return nil, err
	}
	_, err := s.propose(q, &commandv1.Command{Body: &commandv1.Command_MoveMount{MoveMount: cmd}})
	if err != nil {
		return nil, err
	}
	return &reply{data: map[string]any{"migration_id": moveID(q.id, from, to)}, warnings: []string{
		"Mount move has been queued. Progress will be reported in rollcall's log, tagged with the returned migration_id",
	}}, nil
}

// A move is one entry of the log: when it is answered it is done, and one that failed was answered with its error. So the
// id that the answer gives out holds what a status has to tell, on every node and for ever, and nothing is kept.
type move struct{ From, To string }

func moveID(request, from, to string) string {
	raw, err := json.Marshal(move{strings.Trim(from, "/") + "/", strings.Trim(to, "/") + "/"})
	if err != nil { // two strings always encode
		return request
	}
	return request + "." + base64.RawURLEncoding.EncodeToString(raw)
}

func (s *Server) remountStatus(q *request) (*reply, error) {
	id, text, _ := strings.Cut(q.params["id"], ".")
	raw, err := base64.RawURLEncoding.DecodeString(text)
	var m move
	if err != nil || uuid.Validate(id) != nil || json.Unmarshal(raw, &m) != nil || m.From == "" {
		return nil, nil
	}
	return &reply{data: map[string]any{
		"migration_id":   q.params["id"],
		"migration_info": map[string]any{"source_mount": m.From, "target_mount": m.To, "status": "success"},
	}}, nil
}
