package database

import (
	"context"
	"encoding/json"
	"maps"
	"net/url"
	"slices"
	"strings"

	"google.golang.org/protobuf/types/known/structpb"

	"rollcall/node/fault"
	"rollcall/node/supervisor"
)

// ConfigKey is where a connection's storage holds its config; the state machine writes it.
const ConfigKey = "config"

// Config is what a connection is told and stores. Plugin and version stand in the mount table.
type Config struct {
	AllowedRoles []string `json:"allowed_roles"`
	// Details are the plugin's own fields, secrets among them, as the plugin asked to have them stored.
	Details        map[string]any `json:"connection_details"`
	RootStatements []string       `json:"root_credentials_rotate_statements"`
	Verify         bool           `json:"verify_connection"`
}

func loadConfig(ctx context.Context, s supervisor.Storage) (*Config, error) {
	e, err := s.Get(ctx, ConfigKey)
	if err != nil {
		return nil, err
	}
	if e == nil {
		return nil, fault.Text(fault.Internal, "the connection has no config in its storage")
	}
	return parseConfig(e.Value)
}

func parseConfig(raw []byte) (*Config, error) {
	c := &Config{}
	if err := json.Unmarshal(raw, c); err != nil {
		return nil, fault.As(fault.Corrupt, err, "read", "a connection's config")
	}
	return c, nil
}

func (c *Config) details() (*structpb.Struct, error) {
	s, err := structpb.NewStruct(c.Details)
	return s, fault.As(fault.Invalid, err, "read", "connection details")
}

func (c *Config) allows(role string) bool {
	return slices.ContainsFunc(c.AllowedRoles, func(pattern string) bool {
		if before, after, ok := strings.Cut(pattern, "*"); ok {
			return len(role) >= len(before)+len(after) && strings.HasPrefix(role, before) && strings.HasSuffix(role, after)
		}
		return pattern == role
	})
}

// secretFields never leave the node, in whatever spelling: they hold what opens the database.
var secretFields = []string{"password", "private_key", "secret", "token", "credential", "service_account", "passphrase", "api_key"}

func isSecret(name string) bool {
	name = strings.ToLower(name)
	return slices.ContainsFunc(secretFields, func(s string) bool { return strings.Contains(name, s) })
}

// shown are the details without anything secret: secret fields are left out, and a secret that stands inside another
// text (a connection URL) is masked there.
func (c *Config) shown() map[string]any {
	var secrets []string
	for k, v := range c.Details {
		if text, ok := v.(string); ok && isSecret(k) && len(text) > 0 {
			secrets = append(secrets, text)
		}
	}
	out := maps.Clone(c.Details)
	maps.DeleteFunc(out, func(k string, _ any) bool { return isSecret(k) })
	for k, v := range out {
		out[k] = masked(v, secrets)
	}
	return out
}

const mask = "*****"

func masked(v any, secrets []string) any {
	switch v := v.(type) {
	case string:
		if u, err := url.Parse(v); err == nil && u.User != nil {
			if pass, has := u.User.Password(); has && !strings.Contains(pass, "{{") {
				secrets = append(slices.Clone(secrets), pass, url.QueryEscape(pass))
			}
		}
		for _, s := range secrets {
			if len(s) >= 3 || v == s {
				v = strings.ReplaceAll(v, s, mask)
			}
		}
		return v
	case []any:
		out := make([]any, len(v))
		for i := range v {
			out[i] = masked(v[i], secrets)
		}
		return out
	case map[string]any:
		out := map[string]any{}
		for k, x := range v {
			if !isSecret(k) {
				out[k] = masked(x, secrets)
			}
		}
		return out
	default:
		return v
	}
}
