package database

import (
	"context"
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/structpb"

	"rollcall/node/fault"
	"rollcall/node/supervisor"
	commandv1 "rollcall/proto/command/v1"
	pluginpb "rollcall/proto/plugin"
)

// Host is what the engine of one mount needs of its node. It is used on the leader.
type Host interface {
	// Connection finds a connection by its name, nil when there is none; Connections are all, in order of their names.
	Connection(name string) *commandv1.Mount
	Connections() []*commandv1.Mount
	// Stored is a connection's config as the state has it.
	Stored(connection *commandv1.Mount) []byte
	// Moving is the id of the reload that moves a connection now, "" for none.
	Moving(connection *commandv1.Mount) string
	// Resolve answers what a new connection of a plugin would run, Resolved what a reload of an existing one would.
	Resolve(plugin, version string) (*commandv1.Spec, error)
	Resolved(connection *commandv1.Mount) error
	// Try starts a process of spec for a moment and opens a connection in it; with verify the plugin asks the database. It
	// returns the details to store.
	Try(ctx context.Context, spec *commandv1.Spec, details *structpb.Struct, verify bool) (*structpb.Struct, error)
	// Put enters a connection and returns when it is open here. Its error then is fault.Deadline: it is stored all the same.
	Put(ctx context.Context, c *commandv1.PutConnection) error
	Delete(ctx context.Context, name string) error
	// Reload enters a best-effort reload of connections on every node, and returns its record when it has ended.
	Reload(ctx context.Context, connections []*commandv1.Mount, by string) (*commandv1.Reload, error)
	// Call runs one call on a connection, through its gate. The errors are those of any request: with a safe kind nothing
	// ran, with fault.OutcomeUnknown it may have.
	Call(ctx context.Context, connection *commandv1.Mount, path string, data []byte) ([]byte, error)
	// NodeID is this node's.
	NodeID() string
}

// Engine is the backend of a database mount. It runs inside the node and keeps nothing in memory: roles are in the mount's
// storage, connections in the mount table.
type Engine struct {
	host Host

	mu    sync.Mutex
	setup supervisor.Setup
	// changing is held while a connection is changed: from what is read to what is entered.
	changing sync.Mutex
}

// NewEngine makes the backend of a mount.
func NewEngine(h Host) *Engine { return &Engine{host: h} }

// InProcess says that no process stands behind this backend: what its errors say of processes is about others.
func (e *Engine) InProcess() {}

// Setup takes the mount's storage.
func (e *Engine) Setup(_ context.Context, s supervisor.Setup) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.setup = s
	return nil
}

// Initialize has nothing to do.
func (e *Engine) Initialize(context.Context) error { return nil }

// Type is a secrets engine's.
func (e *Engine) Type(context.Context) (string, error) { return supervisor.TypeSecret, nil }

// SpecialPaths are none.
func (e *Engine) SpecialPaths(context.Context) (*pluginpb.Paths, error) {
	return &pluginpb.Paths{}, nil
}

// InvalidateKey has nothing to forget.
func (e *Engine) InvalidateKey(context.Context, string) error { return nil }

// Cleanup has nothing to end.
func (e *Engine) Cleanup(context.Context) error { return nil }

// HandleExistenceCheck has no answer: create and update are the same here.
func (e *Engine) HandleExistenceCheck(context.Context, *pluginpb.Request) (found, checkFound bool, err error) {
	return false, false, nil
}

func (e *Engine) storage() supervisor.Storage {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.setup.Storage
}

func (e *Engine) leaseTTLs() (def, longest time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.setup.System.LeaseTTLs()
}

// call is one request: its operation, the name behind the path's first word, and its body.
type call struct {
	*pluginpb.Request
	op, name string
	body     fields
}

var (
	errUnsupportedPath      = fault.Text(fault.UnsupportedPath, "unsupported path")
	errUnsupportedOperation = fault.Text(fault.UnsupportedOperation, "unsupported operation")
)

// validName is how connections and roles may be called.
var validName = regexp.MustCompile(`^\w(([\w.-]+)?\w)?$`)

// leftOut are paths of other servers that this mount does not have, and why.
var leftOut = map[string]string{
	"rotate-root":  "root credentials are not rotated by this mount: change them in the database, then write them to config/%s",
	"rotate-role":  "this mount has no static roles: there is nothing to rotate for %q",
	"static-roles": "this mount has no static roles: use roles/%s",
	"static-creds": "this mount has no static roles: use creds/%s",
}

// HandleRequest answers the mount's paths. Errors are in the contract's words.
func (e *Engine) HandleRequest(ctx context.Context, req *pluginpb.Request) (*pluginpb.Response, error) {
	word, name, _ := strings.Cut(strings.TrimSuffix(req.GetPath(), "/"), "/")
	c := &call{Request: req, op: req.GetOperation(), name: name}
	if c.op == "create" {
		c.op = "update"
	}
	if c.op == "help" {
		return reply(map[string]any{"help": help})
	}
	if c.op == "revoke" || c.op == "renew" {
		return e.lease(ctx, c)
	}
	if err := json.Unmarshal([]byte(req.GetData()), &c.body); err != nil {
		return nil, fault.Text(fault.Invalid, "the body is no JSON object: %v", err)
	}
	list := name == "" && c.op == "list"
	if why, ok := leftOut[word]; ok {
		return nil, fault.Text(fault.Invalid, why, name)
	}
	handle := map[string]func(context.Context, *call) (*pluginpb.Response, error){
		"config": e.config, "reset": e.reset, "reload": e.reload, "roles": e.roles, "creds": e.creds,
	}[word]
	switch {
	case handle == nil, strings.Contains(name, "/"), name == "" && !list:
		return nil, errUnsupportedPath
	case !list && !validName.MatchString(name):
		return nil, fault.Text(fault.Invalid, "%q is no name: use letters, digits, underscores, and dots and hyphens between them", name)
	}
	return handle(ctx, c)
}

const help = "Holds connections to databases (config/), each served by a database plugin, and makes credentials (creds/) by roles (roles/)."

func reply(data map[string]any) (*pluginpb.Response, error) {
	raw, err := json.Marshal(data)
	if err != nil {
		return nil, fault.As(fault.Internal, err, "write", "answer")
	}
	return &pluginpb.Response{Data: string(raw)}, nil
}

// keys answers a list; an empty one is nothing, which clients get as 404.
func keys(names []string) (*pluginpb.Response, error) {
	if len(names) == 0 {
		return nil, nil
	}
	return reply(map[string]any{"keys": names})
}

// fields is a body as the client sent it.
type fields map[string]any

func (f fields) text(key, def string) (string, error) {
	switch v := f[key].(type) {
	case nil:
		return def, nil
	case string:
		return v, nil
	default:
		return "", fault.Text(fault.Invalid, "field validation failed: error converting input for field %q: it must be a text", key)
	}
}

func (f fields) flag(key string, def bool) (bool, error) {
	switch v := f[key].(type) {
	case nil:
		return def, nil
	case bool:
		return v, nil
	case string:
		switch strings.ToLower(v) {
		case "true", "1":
			return true, nil
		case "false", "0", "":
			return false, nil
		}
	}
	return false, fault.Text(fault.Invalid, "field validation failed: error converting input for field %q: it must be true or false", key)
}

// texts reads a list of texts, or one text; with commas, that is split at them.
func (f fields) texts(key string, def []string, commas bool) ([]string, error) {
	switch v := f[key].(type) {
	case nil:
		return def, nil
	case string:
		if !commas {
			return nonEmpty([]string{v}), nil
		}
		return nonEmpty(strings.Split(v, ",")), nil
	case []any:
		out := []string{}
		for _, x := range v {
			s, ok := x.(string)
			if !ok {
				return nil, fault.Text(fault.Invalid, "field validation failed: error converting input for field %q: it must be a list of texts", key)
			}
			out = append(out, s)
		}
		return nonEmpty(out), nil
	default:
		return nil, fault.Text(fault.Invalid, "field validation failed: error converting input for field %q: it must be a list of texts", key)
	}
}

func nonEmpty(in []string) []string {
	out := []string{}
	for _, s := range in {
		if s = strings.TrimSpace(s); s != "" {
			out = append(out, s)
		}
	}
	return out
}

// seconds reads a duration: a number of seconds, or a text with a unit.
func (f fields) seconds(key string, def time.Duration) (time.Duration, error) {
	bad := func() error {
		return fault.Text(fault.Invalid, "field validation failed: error converting input for field %q: it must be seconds or a duration, not negative", key)
	}
	var d time.Duration
	switch v := f[key].(type) {
	case nil:
		return def, nil
	case float64:
		if !(v >= 0 && v < 1e9) {
			return 0, bad()
		}
		d = time.Duration(v) * time.Second
	case string:
		var err error
		if d, err = time.ParseDuration(v); err != nil {
			var n int64
			if _, serr := fmt.Sscanf(v+";", "%d;", &n); serr != nil || n > 1e9 {
				return 0, bad()
			}
			d = time.Duration(n) * time.Second
		}
	default:
		return 0, bad()
	}
	if d < 0 {
		return 0, bad()
	}
	return d, nil
}
