package supervisor

import (
	"context"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/structpb"

	"rollcall/node/fault"
	pluginpb "rollcall/proto/plugin"
)

// Database is one connection inside a process of a database plugin. Initialize comes first, Close last; in between
// everything may be called from any goroutine. Errors are as Backend's; those of the plugin's own code come as
// fault.Internal with its text.
type Database struct {
	process *Process
	id      string
	client  pluginpb.DatabaseClient

	mu   sync.Mutex
	open bool
	over bool
}

// Process is where it runs.
func (d *Database) Process() *Process { return d.process }

// Initialize configures the connection and, with verify, tries it. It returns the configuration to store instead of
// the one that was given. May be called again.
func (d *Database) Initialize(ctx context.Context, config *structpb.Struct, verify bool) (*structpb.Struct, error) {
	var stored *structpb.Struct
	err := d.call(ctx, "initialize database", func(ctx context.Context, opts ...grpc.CallOption) error {
		reply, err := d.client.Initialize(ctx, &pluginpb.InitializeRequest{ConfigData: config, VerifyConnection: verify}, opts...)
		stored = reply.GetConfigData()
		return err
	})
	if err == nil {
		d.mu.Lock()
		d.open = true
		d.mu.Unlock()
	}
	return stored, err
}

// NewUser makes a user and returns its name.
func (d *Database) NewUser(ctx context.Context, req *pluginpb.NewUserRequest) (string, error) {
	var name string
	err := d.call(ctx, "make database user", func(ctx context.Context, opts ...grpc.CallOption) error {
		reply, err := d.client.NewUser(ctx, req, opts...)
		name = reply.GetUsername()
		return err
	})
	return name, err
}

// UpdateUser changes a user's password, key or expiration.
func (d *Database) UpdateUser(ctx context.Context, req *pluginpb.UpdateUserRequest) error {
	return d.call(ctx, "update database user", func(ctx context.Context, opts ...grpc.CallOption) error {
		_, err := d.client.UpdateUser(ctx, req, opts...)
		return err
	})
}

// DeleteUser removes a user.
func (d *Database) DeleteUser(ctx context.Context, req *pluginpb.DeleteUserRequest) error {
	return d.call(ctx, "delete database user", func(ctx context.Context, opts ...grpc.CallOption) error {
		_, err := d.client.DeleteUser(ctx, req, opts...)
		return err
	})
}

// Type is the kind of database, as the plugin says.
func (d *Database) Type(ctx context.Context) (string, error) {
	var name string
	err := d.call(ctx, "ask for database type", func(ctx context.Context, opts ...grpc.CallOption) error {
		reply, err := d.client.Type(ctx, &emptypb.Empty{}, opts...)
		name = reply.GetType()
		return err
	})
	return name, err
}

// Disconnect closes the connection, within CleanupTimeout; Initialize may open it again. Idempotent.
func (d *Database) Disconnect(ctx context.Context) error { return d.shut(ctx, false) }

// Close closes the connection for good, within CleanupTimeout. Idempotent.
func (d *Database) Close(ctx context.Context) error {
	defer d.process.forget(d)
	return d.shut(ctx, true)
}

func (d *Database) shut(ctx context.Context, over bool) error {
	d.mu.Lock()
	was := d.open && !d.over
	d.open, d.over = false, d.over || over
	d.mu.Unlock()
	if _, gone := d.process.gone(); !was || gone {
		return nil
	}
	limit, cancel := context.WithTimeout(ctx, d.process.s.cfg.CleanupTimeout)
	defer cancel()
	if _, err := d.client.Close(to(limit, d.id), &emptypb.Empty{}); err != nil {
		return d.process.callError(limit, "close database", err, false)
	}
	return nil
}

func (d *Database) call(ctx context.Context, op string, do func(context.Context, ...grpc.CallOption) error) error {
	if words, gone := d.process.gone(); gone {
		return fault.New(fault.Unavailable, op, d.process.spec.String(), "the plugin process %s", words)
	}
	ctx, went := watchSent(ctx)
	if err := do(to(ctx, d.id), grpc.MaxCallRecvMsgSize(d.process.s.cfg.MaxReply)); err != nil {
		return d.process.callError(ctx, op, err, went.Load())
	}
	return nil
}

func (d *Database) close(ctx context.Context) error { return d.Close(ctx) }

func (d *Database) drop() {
	d.mu.Lock()
	d.open, d.over = false, true
	d.mu.Unlock()
}
