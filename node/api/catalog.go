package api

import "encoding/json"

// Catalog is the data of sys/plugins/catalog. The three lists are always there, as arrays: clients fail on null.
type Catalog struct {
	Auth     []string        `json:"auth"`
	Database []string        `json:"database"`
	Secret   []string        `json:"secret"`
	Detailed []CatalogDetail `json:"detailed"`
}

// CatalogDetail is one catalog entry in a list; the stock commands' tables are made of these alone.
type CatalogDetail struct {
	Type              string `json:"type"`
	Name              string `json:"name"`
	Version           string `json:"version"`
	Builtin           bool   `json:"builtin"`
	SHA256            string `json:"sha256,omitempty"`
	DeprecationStatus string `json:"deprecation_status,omitempty"`
}

// RegisterRequest is the body of a registration. Env is stored and never shown.
type RegisterRequest struct {
	SHA256  string   `json:"sha256"`
	Version string   `json:"version,omitempty"`
	Command string   `json:"command,omitempty"`
	Args    []string `json:"args,omitempty"`
	Env     []string `json:"env,omitempty"`
	Type    string   `json:"type,omitempty"`
}

// Plugin is one catalog entry, read: what was registered, but for the environment.
type Plugin struct {
	Name    string   `json:"name"`
	Type    string   `json:"type,omitempty"`
	Version string   `json:"version"`
	Command string   `json:"command"`
	Args    []string `json:"args"`
	SHA256  string   `json:"sha256"`
	Builtin bool     `json:"builtin"`
}

// Pin is one version pin.
type Pin struct {
	Type    string `json:"type"`
	Name    string `json:"name"`
	Version string `json:"version"`
}

// Pins is the data of sys/plugins/pins.
type Pins struct {
	PinnedVersions []Pin `json:"pinned_versions"`
}

// MountInput is the body of an enable.
type MountInput struct {
	Type        string            `json:"type"`
	Description string            `json:"description,omitempty"`
	Config      *MountConfigInput `json:"config,omitempty"`
	Options     map[string]string `json:"options,omitempty"`
	Local       bool              `json:"local,omitempty"`
	SealWrap    bool              `json:"seal_wrap,omitempty"`
}

// MountConfigInput is the tunable part. TTLs are texts such as "30m". nil leaves a field as it is.
type MountConfigInput struct {
	DefaultLeaseTTL           string   `json:"default_lease_ttl,omitempty"`
	MaxLeaseTTL               string   `json:"max_lease_ttl,omitempty"`
	ForceNoCache              *bool    `json:"force_no_cache,omitempty"`
	ListingVisibility         string   `json:"listing_visibility,omitempty"`
	PassthroughRequestHeaders []string `json:"passthrough_request_headers,omitempty"`
	AllowedResponseHeaders    []string `json:"allowed_response_headers,omitempty"`
	AuditNonHMACRequestKeys   []string `json:"audit_non_hmac_request_keys,omitempty"`
	AuditNonHMACResponseKeys  []string `json:"audit_non_hmac_response_keys,omitempty"`
	TokenType                 string   `json:"token_type,omitempty"`
	PluginVersion             string   `json:"plugin_version,omitempty"`
	// Ours: how deep a reload tries (handshake, setup, initialize), whether a fenced node answers (lease, none),
	// whether reads run on the leader too, and how long the gate may hold requests.
	Trial      string `json:"trial,omitempty"`
	Fencing    string `json:"fencing,omitempty"`
	LeaderOnly *bool  `json:"leader_only,omitempty"`
	Hold       string `json:"hold,omitempty"`
}

// TuneInput is the body of a tune: the config's fields beside description and options.
type TuneInput struct {
	MountConfigInput
	Description *string           `json:"description,omitempty"`
	Options     map[string]string `json:"options,omitempty"`
}

// Mount is one mount as lists and reads show it. TTLs are seconds, 0 for the system's default.
type Mount struct {
	Type                  string            `json:"type"`
	Description           string            `json:"description"`
	Accessor              string            `json:"accessor"`
	UUID                  string            `json:"uuid"`
	Local                 bool              `json:"local"`
	SealWrap              bool              `json:"seal_wrap"`
	ExternalEntropyAccess bool              `json:"external_entropy_access"`
	Options               map[string]string `json:"options"`
	PluginVersion         string            `json:"plugin_version"`
	RunningPluginVersion  string            `json:"running_plugin_version"`
	RunningSHA256         string            `json:"running_sha256"`
	DeprecationStatus     string            `json:"deprecation_status,omitempty"`
	Config                MountConfig       `json:"config"`
	// Generation is the one that the state wants.
	Generation uint64 `json:"generation,omitempty"`
}

// MountConfig is the config of a mount as it is shown.
type MountConfig struct {
	DefaultLeaseTTL           int64    `json:"default_lease_ttl"`
	MaxLeaseTTL               int64    `json:"max_lease_ttl"`
	ForceNoCache              bool     `json:"force_no_cache"`
	ListingVisibility         string   `json:"listing_visibility,omitempty"`
	PassthroughRequestHeaders []string `json:"passthrough_request_headers,omitempty"`
	AllowedResponseHeaders    []string `json:"allowed_response_headers,omitempty"`
	AuditNonHMACRequestKeys   []string `json:"audit_non_hmac_request_keys,omitempty"`
	AuditNonHMACResponseKeys  []string `json:"audit_non_hmac_response_keys,omitempty"`
	TokenType                 string   `json:"token_type,omitempty"`
	IdentityTokenKey          string   `json:"identity_token_key,omitempty"`
	Trial                     string   `json:"trial,omitempty"`
	Fencing                   string   `json:"fencing,omitempty"`
	LeaderOnly                bool     `json:"leader_only,omitempty"`
	Hold                      string   `json:"hold,omitempty"`
}

// RemountRequest is the body of sys/remount.
type RemountRequest struct {
	From string `json:"from"`
	To   string `json:"to"`
}

// Remount is its data.
type Remount struct {
	MigrationID string `json:"migration_id"`
}

// RemountStatus is the data of sys/remount/status/:id.
type RemountStatus struct {
	MigrationID string        `json:"migration_id"`
	Info        MigrationInfo `json:"migration_info"`
}

// MigrationInfo is how a move went: in-progress, success or failure.
type MigrationInfo struct {
	SourceMount string `json:"source_mount"`
	TargetMount string `json:"target_mount"`
	Status      string `json:"status"`
}

// Keys is the data of every list.
type Keys struct {
	Keys []string `json:"keys"`
}

// Event is one server-sent event of sys/events: `id:` is ID, `event:` is Type, `data:` is the whole object. A reader
// that lost the connection sends the last ID back as Last-Event-ID.
type Event struct {
	ID   string `json:"id"`
	Type string `json:"type"` // "reload", "mount", "node", "leader", ...
	Time string `json:"time"` // RFC 3339
	Node string `json:"node,omitempty"`
	// ReloadID is set for events of a reload; Text says it in words.
	ReloadID string          `json:"reload_id,omitempty"`
	Mount    string          `json:"mount,omitempty"`
	Text     string          `json:"text,omitempty"`
	Index    uint64          `json:"index,omitempty"`
	Data     json.RawMessage `json:"data,omitempty"`
}
