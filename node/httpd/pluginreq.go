package httpd

import (
	"encoding/json"
	"net/http"
	"time"

	commandv1 "rollcall/proto/command/v1"
	pluginpb "rollcall/proto/plugin"
)

// PluginRequest is an authorised request for a plugin: what the door hands to whatever routes it.
type PluginRequest struct {
	ID string
	// Namespace is "" for root, else with a trailing slash. Path is the full path within it, without a leading slash.
	Namespace, Path string
	// Operation is "create", "update", "read", "list", "delete", "patch" or "help".
	Operation string
	// Data is the JSON object that the client sent; it reaches the plugin byte for byte.
	Data       json.RawMessage
	Headers    http.Header
	RemoteAddr string
	// ClientToken is the salted hash that plugins see instead of the token.
	ClientToken, TokenAccessor, DisplayName, EntityID string
	Policies                                          []string
	TokenTTL                                          time.Duration
	TokenRemainingUses                                int64
	Unauthenticated                                   bool
	// NoForward keeps the request on this node: where it would have to go to the leader, it fails with fault.NotLeader.
	NoForward bool
	// Secret and Auth are what a renew or revoke is about.
	Secret *pluginpb.Secret
	Auth   *pluginpb.Auth
}

// PluginResponse is what a plugin answered, and who did.
type PluginResponse struct {
	// Plugin is nil when the plugin answered nothing.
	Plugin *pluginpb.Response
	// Generation of the instance that ran it, 0 when none did; Node is its node's name; Index is what that instance
	// knew of its storage.
	Generation uint64
	Node       string
	Index      uint64
	Mount      *commandv1.Mount
}

// Match is the mount that serves a path.
type Match struct {
	Mount *commandv1.Mount
	// Rest is the path within the mount.
	Rest string
	// Unauthenticated paths need no token; Root paths need sudo.
	Unauthenticated, Root bool
}
