package api

import "encoding/json"

// AuditEntry is one record of an audit file, in the shape that Vault's file device writes. The door fills it with what it
// knows; node/audit hashes what is secret on the way to the file, so an entry that is still in memory holds tokens in clear.
type AuditEntry struct {
	Time     string         `json:"time"` // RFC 3339 with nanoseconds, UTC
	Type     string         `json:"type"` // AuditTypeRequest or AuditTypeResponse
	Auth     *AuditAuth     `json:"auth,omitempty"`
	Request  AuditRequest   `json:"request"`
	Response *AuditResponse `json:"response,omitempty"`
	Error    string         `json:"error,omitempty"`
	// Node wrote the record: the one that the client asked.
	Node string `json:"node,omitempty"`
}

// The types of a record. Each answered request has one of both.
const (
	AuditTypeRequest  = "request"
	AuditTypeResponse = "response"
)

// AuditAuth is who called, or whom an answer let in.
type AuditAuth struct {
	ClientToken   string              `json:"client_token,omitempty"` // hashed
	Accessor      string              `json:"accessor,omitempty"`     // hashed, unless the device says otherwise
	DisplayName   string              `json:"display_name,omitempty"`
	Policies      []string            `json:"policies,omitempty"`
	TokenPolicies []string            `json:"token_policies,omitempty"`
	PolicyResults *AuditPolicyResults `json:"policy_results,omitempty"`
	Metadata      map[string]string   `json:"metadata,omitempty"`
	EntityID      string              `json:"entity_id,omitempty"`
	TokenType     string              `json:"token_type,omitempty"`
	TokenTTL      int64               `json:"token_ttl,omitempty"` // seconds
	// TokenIssueTime is RFC 3339.
	TokenIssueTime string `json:"token_issue_time,omitempty"`
	RemainingUses  int64  `json:"num_uses,omitempty"`
}

// AuditPolicyResults says whether the policies allowed the call.
type AuditPolicyResults struct {
	Allowed bool `json:"allowed"`
}

// AuditNamespace is where a call took place.
type AuditNamespace struct {
	ID   string `json:"id"`
	Path string `json:"path,omitempty"`
}

// AuditMount is the mount that a call is of.
type AuditMount struct {
	MountPoint    string `json:"mount_point,omitempty"`
	MountType     string `json:"mount_type,omitempty"`
	MountAccessor string `json:"mount_accessor,omitempty"`
	MountClass    string `json:"mount_class,omitempty"`
	External      bool   `json:"mount_is_external_plugin,omitempty"`
	// RequestClear and ResponseClear are the keys of data whose values the mount's owner wants to read in the file.
	RequestClear  []string `json:"-"`
	ResponseClear []string `json:"-"`
}

// AuditRequest is what was asked.
type AuditRequest struct {
	ID        string `json:"id"`
	Operation string `json:"operation,omitempty"`
	AuditMount
	ClientToken         string          `json:"client_token,omitempty"`          // hashed
	ClientTokenAccessor string          `json:"client_token_accessor,omitempty"` // hashed, unless the device says otherwise
	Namespace           *AuditNamespace `json:"namespace,omitempty"`
	Path                string          `json:"path"`
	// Data is the body or the query: its strings are hashed, wherever they stand.
	Data json.RawMessage `json:"data,omitempty"`
	// DataOmitted stands in place of Data that is too large to be written value by value.
	DataOmitted   *AuditOmitted       `json:"data_omitted,omitempty"`
	RemoteAddress string              `json:"remote_address,omitempty"`
	RemotePort    int                 `json:"remote_port,omitempty"`
	WrapTTL       int64               `json:"wrap_ttl,omitempty"` // seconds
	Headers       map[string][]string `json:"headers,omitempty"`
}

// AuditResponse is what was answered.
type AuditResponse struct {
	// Status is the HTTP status.
	Status int        `json:"status,omitempty"`
	Auth   *AuditAuth `json:"auth,omitempty"`
	AuditMount
	Secret      *AuditSecret    `json:"secret,omitempty"`
	Data        json.RawMessage `json:"data,omitempty"`
	DataOmitted *AuditOmitted   `json:"data_omitted,omitempty"`
	Warnings    []string        `json:"warnings,omitempty"`
	Redirect    string          `json:"redirect,omitempty"`
	WrapInfo    *WrapInfo       `json:"wrap_info,omitempty"` // token and accessors hashed
	// RanOn and Generation say which instance answered, for plugin paths.
	RanOn      string `json:"ran_on,omitempty"`
	Generation uint64 `json:"generation,omitempty"`
}

// AuditSecret is what an answer lent out.
type AuditSecret struct {
	LeaseID string `json:"lease_id"`
}

// AuditOmitted identifies data that a record does not hold: whoever has it can hash it and compare.
type AuditOmitted struct {
	Bytes int    `json:"bytes"`
	HMAC  string `json:"hmac"`
}

// AuditDevice is one device as sys/audit tells it.
type AuditDevice struct {
	Type        string            `json:"type"`
	Description string            `json:"description"`
	Path        string            `json:"path"`
	Local       bool              `json:"local"`
	Options     map[string]string `json:"options"`
}
