package httpd

import (
	"context"
	"encoding/json"
	"time"

	commandv1 "rollcall/proto/command/v1"
)

// Router runs plugin requests (node/router). Its methods may be called from any goroutine.
type Router interface {
	// Handle runs a call on the mount's instance, here or on the leader. The answer is not nil whenever it is known who
	// answered, also beside an error.
	Handle(ctx context.Context, req *PluginRequest) (*PluginResponse, error)
	// Lookup answers where a path leads.
	Lookup(ctx context.Context, ns, path string) (Match, error)
	// Exists asks the plugin's existence check; hasCheck is false where it has none.
	Exists(ctx context.Context, req *PluginRequest) (found, hasCheck bool, err error)
}

// Leases looks after what plugins lend out (node/lease). Its methods may be called from any goroutine of any node.
type Leases interface {
	// Renew asks the lease's plugin for more time. by is the hash of the token that asks.
	Renew(ctx context.Context, id string, increment time.Duration, by []byte) (*Renewed, error)
	// Revoke makes leases due, and returns once they are gone, or after wait with how many are left.
	Revoke(ctx context.Context, which *commandv1.RevokeLeases, by []byte, wait time.Duration) (left int, err error)
}

// Renewed is a lease after its renewal.
type Renewed struct {
	ID        string
	TTL       time.Duration
	Renewable bool
	// Data is what the plugin answered besides; nil for nothing.
	Data     json.RawMessage
	Warnings []string
}
