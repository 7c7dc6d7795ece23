// Package api is the JSON of rollcall's HTTP API: the envelope, the words of every path, the error body and the table
// between error kinds and HTTP statuses, and the Go client that speaks them. node/httpd encodes exactly these types;
// cmd/rollcall/client reads them. The shapes that Vault and OpenBao share are theirs; what is ours stands beside them
// in keys that their clients ignore.
package api

import "encoding/json"

// Headers of requests and answers. The X-Vault-* names are those that unmodified clients send.
const (
	// HeaderToken carries the caller's token.
	HeaderToken = "X-Vault-Token"
	// HeaderNamespace selects the namespace; it is joined with the path.
	HeaderNamespace = "X-Vault-Namespace"
	// HeaderRequest is "true" on every request of a client library: no browser sends it across sites unasked.
	HeaderRequest = "X-Vault-Request"
	// HeaderNoForward is "true" where the caller wants a redirect to the leader instead of forwarding.
	HeaderNoForward = "X-Vault-No-Request-Forwarding"
	// HeaderWrapTTL asks for response wrapping.
	HeaderWrapTTL = "X-Vault-Wrap-TTL"
	// HeaderGeneration is the generation of the mount that answered: which reload the answer is from.
	HeaderGeneration = "X-Rollcall-Generation"
	// HeaderNode is the name of the node that ran the request.
	HeaderNode = "X-Rollcall-Node"
	// HeaderIndex is the log index that the answer reflects. A blocking query hands it back as index.
	HeaderIndex = "X-Rollcall-Index"
)

// Warnings is null in JSON when there are none: clients break on an empty array.
type Warnings []string

// MarshalJSON writes null for no warnings.
func (w Warnings) MarshalJSON() ([]byte, error) {
	if len(w) == 0 {
		return []byte("null"), nil
	}
	return json.Marshal([]string(w))
}

// Envelope is around every answer with data (CONTRACT 1.2). Data, WrapInfo and Auth are null when empty; Data passes
// through as it came from the plugin.
type Envelope struct {
	RequestID     string          `json:"request_id"`
	LeaseID       string          `json:"lease_id"`
	Renewable     bool            `json:"renewable"`
	LeaseDuration int64           `json:"lease_duration"` // seconds
	Data          json.RawMessage `json:"data"`
	WrapInfo      json.RawMessage `json:"wrap_info"`
	Warnings      Warnings        `json:"warnings"`
	Auth          json.RawMessage `json:"auth"`
	MountType     string          `json:"mount_type,omitempty"`
}

// ErrorBody is the body of every status from 400 on. One text: clients print the array without a separator.
type ErrorBody struct {
	Errors []string `json:"errors"`
}

// WrapInfo is Envelope.WrapInfo of a wrapped answer.
type WrapInfo struct {
	Token           string `json:"token"`
	Accessor        string `json:"accessor"`
	TTL             int64  `json:"ttl"` // seconds
	CreationTime    string `json:"creation_time"`
	CreationPath    string `json:"creation_path"`
	WrappedAccessor string `json:"wrapped_accessor,omitempty"`
}

// Auth is Envelope.Auth of a login or a token creation.
type Auth struct {
	ClientToken    string            `json:"client_token"`
	Accessor       string            `json:"accessor"`
	Policies       []string          `json:"policies"`
	TokenPolicies  []string          `json:"token_policies"`
	Metadata       map[string]string `json:"metadata"`
	LeaseDuration  int64             `json:"lease_duration"` // seconds
	Renewable      bool              `json:"renewable"`
	EntityID       string            `json:"entity_id"`
	TokenType      string            `json:"token_type"`
	Orphan         bool              `json:"orphan"`
	MFARequirement json.RawMessage   `json:"mfa_requirement"`
	NumUses        int64             `json:"num_uses"`
}

// Token is what auth/token/lookup-self and its sisters tell.
type Token struct {
	Accessor       string            `json:"accessor"`
	CreationTime   int64             `json:"creation_time"` // Unix seconds
	CreationTTL    int64             `json:"creation_ttl"`  // seconds
	DisplayName    string            `json:"display_name"`
	EntityID       string            `json:"entity_id"`
	ExpireTime     *string           `json:"expire_time"` // RFC 3339, null for never
	ExplicitMaxTTL int64             `json:"explicit_max_ttl"`
	ID             string            `json:"id"`
	Meta           map[string]string `json:"meta"`
	NumUses        int64             `json:"num_uses"`
	Orphan         bool              `json:"orphan"`
	Path           string            `json:"path"`
	Policies       []string          `json:"policies"`
	TTL            int64             `json:"ttl"`
	Type           string            `json:"type"`
	Renewable      bool              `json:"renewable"`
	IssueTime      string            `json:"issue_time,omitempty"` // RFC 3339
	NamespacePath  string            `json:"namespace_path,omitempty"`
}
