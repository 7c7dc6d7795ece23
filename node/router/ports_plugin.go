package router

import (
	"context"

	"rollcall/node/supervisor"
	pluginpb "rollcall/proto/plugin"
)

// Backend is one plugin backend inside a process, as requests and switches use it. *supervisor.Backend is one. Errors of
// the plugin's own code are faults with its text; fault.Unavailable says that the process cannot be reached and nothing
// ran, fault.OutcomeUnknown that it ended under the call.
type Backend interface {
	// Setup may be called again when the node's role has changed; then no request is in flight.
	Setup(ctx context.Context, s supervisor.Setup) error
	Initialize(ctx context.Context) error
	// Type is "secret" or "auth".
	Type(ctx context.Context) (string, error)
	SpecialPaths(ctx context.Context) (*pluginpb.Paths, error)
	HandleRequest(ctx context.Context, req *pluginpb.Request) (*pluginpb.Response, error)
	HandleExistenceCheck(ctx context.Context, req *pluginpb.Request) (found, checkFound bool, err error)
	InvalidateKey(ctx context.Context, key string) error
	Cleanup(ctx context.Context) error
}

var _ Backend = (*supervisor.Backend)(nil)
