package database

import (
	"context"
	"encoding/json"
	"time"

	"rollcall/node/fault"
	"rollcall/node/supervisor"
	pluginpb "rollcall/proto/plugin"
)

// rolePrefix is where the mount's storage holds its roles.
const rolePrefix = "role/"

// role says how credentials are made: on which connection, by which statements, for how long.
type role struct {
	Connection string   `json:"db_name"`
	Creation   []string `json:"creation_statements"`
	Revocation []string `json:"revocation_statements"`
	Rollback   []string `json:"rollback_statements"`
	Renew      []string `json:"renew_statements"`
	// Nanoseconds; 0 takes the mount's.
	Default time.Duration `json:"default_ttl"`
	Max     time.Duration `json:"max_ttl"`
}

func (e *Engine) roles(ctx context.Context, c *call) (*pluginpb.Response, error) {
	switch c.op {
	case "list":
		names, err := e.storage().List(ctx, rolePrefix)
		if err != nil {
			return nil, err
		}
		return keys(names)
	case "read":
		r, err := e.role(ctx, c.name)
		if r == nil || err != nil {
			return nil, err
		}
		return reply(map[string]any{
			"db_name": r.Connection, "creation_statements": r.Creation, "revocation_statements": r.Revocation,
			"rollback_statements": r.Rollback, "renew_statements": r.Renew, "default_ttl": int64(r.Default / time.Second),
			"max_ttl": int64(r.Max / time.Second), "credential_type": "password", "credential_config": map[string]any{},
		})
	case "update":
		return nil, e.writeRole(ctx, c)
	case "delete":
		return nil, e.storage().Delete(ctx, rolePrefix+c.name)
	default:
		return nil, errUnsupportedOperation
	}
}

func (e *Engine) role(ctx context.Context, name string) (*role, error) {
	entry, err := e.storage().Get(ctx, rolePrefix+name)
	if entry == nil || err != nil {
		return nil, err
	}
	r := &role{}
	return r, fault.As(fault.Corrupt, json.Unmarshal(entry.Value, r), "read", "role "+name)
}

func (e *Engine) writeRole(ctx context.Context, c *call) error {
	e.changing.Lock()
	defer e.changing.Unlock()
	r, err := e.role(ctx, c.name)
	if err != nil {
		return err
	}
	if r == nil {
		r = &role{Creation: []string{}, Revocation: []string{}, Rollback: []string{}, Renew: []string{}}
	}
	var errs [7]error
	r.Connection, errs[0] = c.body.text("db_name", r.Connection)
	for i, l := range []struct {
		key string
		to  *[]string
	}{
		{"creation_statements", &r.Creation},
		{"revocation_statements", &r.Revocation},
		{"rollback_statements", &r.Rollback},
		{"renew_statements", &r.Renew},
	} {
		*l.to, errs[1+i] = c.body.texts(l.key, *l.to, false)
	}
	r.Default, errs[5] = c.body.seconds("default_ttl", r.Default)
	r.Max, errs[6] = c.body.seconds("max_ttl", r.Max)
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	kind, err := c.body.text("credential_type", "password")
	switch {
	case err != nil:
		return err
	case kind != "password":
		return fault.Text(fault.Invalid, "credential_type %q is not supported: credentials here are passwords", kind)
	case r.Connection == "":
		return fault.Text(fault.Invalid, "empty database name attribute")
	case r.Max > 0 && r.Default > r.Max:
		return fault.Text(fault.Invalid, "default_ttl cannot be greater than max_ttl")
	}
	raw, err := json.Marshal(r)
	if err != nil {
		return fault.As(fault.Internal, err, "write", "role "+c.name)
	}
	return e.storage().Put(ctx, &supervisor.Entry{Key: rolePrefix + c.name, Value: raw})
}
