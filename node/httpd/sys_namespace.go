package httpd

import (
	"crypto/rand"
	"encoding/json"
	"maps"
	"strings"
	"time"

	"github.com/google/uuid"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

func (s *Server) namespaceRoutes() []*route {
	return []*route{
		{pattern: "sys/namespaces", ops: map[operation]handler{opList: s.listNamespaces}, summary: "The namespaces inside this one."},
		{
			pattern: "sys/namespaces/{path...}", access: withSudo, ops: map[operation]handler{
				opRead:   s.readNamespace,
				opUpdate: s.createNamespace, opPatch: s.patchNamespace, opDelete: s.deleteNamespace,
			},
			summary: "Make, read, change or delete a namespace.",
		},
	}
}

// namespaceAt is the full path of the namespace that a call names, relative to its own.
func namespaceAt(q *request) string { return q.ns + strings.Trim(q.params["path"], "/") + "/" }

func namespaceObject(q *request, n *commandv1.Namespace) map[string]any {
	meta := n.GetCustomMetadata()
	if meta == nil {
		meta = map[string]string{}
	}
	return map[string]any{
		"uuid": n.GetUuid(), "id": n.GetId(), "path": strings.TrimPrefix(n.GetPath(), q.ns), "tainted": false,
		"locked": false, "custom_metadata": meta,
	}
}

func (s *Server) listNamespaces(q *request) (*reply, error) {
	keys, info := []string{}, map[string]any{}
	for _, n := range q.view.Namespaces() {
		name, ok := strings.CutPrefix(n.GetPath(), q.ns)
		if !ok || strings.Count(name, "/") != 1 {
			continue
		}
		keys = append(keys, name)
		info[name] = namespaceObject(q, n)
	}
	if len(keys) == 0 {
		return nil, nil
	}
	return &reply{data: map[string]any{"keys": keys, "key_info": info}}, nil
}

func (s *Server) readNamespace(q *request) (*reply, error) {
	n := q.view.Namespace(namespaceAt(q))
	if n == nil {
		return nil, nil
	}
	return &reply{data: namespaceObject(q, n)}, nil
}

// putNamespace enters a namespace's record and answers with it.
func (s *Server) putNamespace(q *request, meta map[string]string) (*reply, error) {
	path := namespaceAt(q)
	if q.body.err != nil {
		return nil, q.body.err
	}
	_, err := s.propose(q, &commandv1.Command{Body: &commandv1.Command_PutNamespace{PutNamespace: &commandv1.PutNamespace{
		Namespace: &commandv1.Namespace{Uuid: uuid.NewString(), Id: rand.Text()[:6], Path: path, CustomMetadata: meta},
	}}})
	if err != nil {
		return nil, err
	}
	if n := s.State.View().Namespace(path); n != nil {
		return &reply{data: namespaceObject(q, n)}, nil
	}
	return &reply{}, nil // deleted again already
}

func (s *Server) createNamespace(q *request) (*reply, error) {
	meta := q.body.strMap("custom_metadata")
	if old := q.view.Namespace(namespaceAt(q)); old != nil && !q.body.has("custom_metadata") {
		meta = old.GetCustomMetadata() // made before: nothing of it is lost by making it again
	}
	return s.putNamespace(q, meta)
}

// patchNamespace merges custom_metadata as RFC 7396 says: null removes a key.
func (s *Server) patchNamespace(q *request) (*reply, error) {
	old := q.view.Namespace(namespaceAt(q))
	if old == nil {
		return nil, &fault.Error{Kind: fault.NotFound}
	}
	meta := map[string]string{}
	maps.Copy(meta, old.GetCustomMetadata())
	patch := q.body.object("custom_metadata")
	for k, raw := range patch.raw {
		if string(raw) == "null" {
			delete(meta, k)
			continue
		}
		var text string
		if json.Unmarshal(raw, &text) != nil {
			return nil, fault.Text(fault.Invalid, "custom_metadata values must be strings: %q is %s", k, kindOfJSON(raw))
		}
		meta[k] = text
	}
	return s.putNamespace(q, meta)
}

// deleteNamespace ends what is mounted inside, and then the namespace with its policies and tokens. Namespaces inside it are
// the caller's to delete first.
func (s *Server) deleteNamespace(q *request) (*reply, error) {
	path := namespaceAt(q)
	if q.view.Namespace(path) == nil {
		return &reply{warnings: []string{"requested namespace does not exist"}}, nil
	}
	for _, n := range q.view.Namespaces() {
		if n.GetPath() != path && strings.HasPrefix(n.GetPath(), path) {
			return nil, fault.Text(fault.Invalid, "cannot delete namespace %q: namespace %q is inside it", path, n.GetPath())
		}
	}
	var warnings []string
	for _, m := range q.view.Mounts() {
		if m.GetNamespace() != path || m.GetParentUuid() != "" { // a connection ends with its mount
			continue
		}
		w, err := s.endMount(q, m, 5*time.Second)
		if err != nil {
			return nil, err
		}
		warnings = append(warnings, w...)
	}
	res, err := s.propose(q, &commandv1.Command{Body: &commandv1.Command_DeleteNamespace{
		DeleteNamespace: &commandv1.DeleteNamespace{Path: path},
	}})
	if err != nil {
		return nil, err
	}
	s.settle(q.ctx, res, "a namespace was deleted")
	return &reply{data: map[string]any{"status": "deleted"}, warnings: warnings}, nil
}
