// Package database is the built-in mount that holds connections to databases: an Engine answers the mount's paths, and a
// Connection is one database plugin's instance. Both are backends as node/router knows them, so gates, leases, switches
// and take-overs are the same as for every other mount.
package database

import (
	"context"
	"sync"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"rollcall/node/fault"
	"rollcall/node/supervisor"
	pluginpb "rollcall/proto/plugin"
)

// Plugin is one instance inside a process of a database plugin. *supervisor.Database is one.
type Plugin interface {
	Type(ctx context.Context) (string, error)
	Initialize(ctx context.Context, config *structpb.Struct, verify bool) (*structpb.Struct, error)
	NewUser(ctx context.Context, req *pluginpb.NewUserRequest) (string, error)
	UpdateUser(ctx context.Context, req *pluginpb.UpdateUserRequest) error
	DeleteUser(ctx context.Context, req *pluginpb.DeleteUserRequest) error
	// Disconnect closes the connection; Initialize may open it again.
	Disconnect(ctx context.Context) error
	Close(ctx context.Context) error
}

// Connection is the backend of a connection: a database plugin behind the gate of a mount that no path leads to.
//
// Only the leader's is open. A follower's process runs, has made its handshake and answers; it is given the config when its
// node becomes the leader. A trial is set up as a leader's would be, on every node, so that a follower too proves that the
// plugin takes the config that is stored.
type Connection struct {
	plugin Plugin

	mu    sync.Mutex
	setup supervisor.Setup
	open  bool
}

// NewConnection makes the backend of an instance that nobody has used yet.
func NewConnection(p Plugin) *Connection { return &Connection{plugin: p} }

// Setup begins a life in one role; the one before ends, with its connection.
func (c *Connection) Setup(ctx context.Context, s supervisor.Setup) error {
	c.mu.Lock()
	was := c.open
	c.setup, c.open = s, false
	c.mu.Unlock()
	if !was {
		return nil
	}
	return c.plugin.Disconnect(ctx)
}

// Initialize opens the connection with the stored config, on a leader and in a trial. The database itself is not asked
// for: whether it can be reached says nothing about the plugin, and must stop neither a reload nor a change of leader.
func (c *Connection) Initialize(ctx context.Context) error {
	c.mu.Lock()
	s := c.setup
	c.mu.Unlock()
	if s.System.ReplicationState == supervisor.ReplicationStandby {
		return nil
	}
	config, err := loadConfig(ctx, s.Storage)
	if err != nil {
		return err
	}
	details, err := config.details()
	if err != nil {
		return err
	}
	if _, err := c.plugin.Initialize(ctx, details, false); err != nil {
		return err
	}
	c.mu.Lock()
	c.open = true
	c.mu.Unlock()
	return nil
}

// Open opens a connection that is about to be stored; with verify the plugin asks the database. It returns the details to
// store.
func (c *Connection) Open(ctx context.Context, details *structpb.Struct, verify bool) (*structpb.Struct, error) {
	return c.plugin.Initialize(ctx, details, verify)
}

// Type answers what node/router expects of a mount in the table of secrets, once the plugin has answered what it is.
func (c *Connection) Type(ctx context.Context) (string, error) {
	if _, err := c.plugin.Type(ctx); err != nil {
		return "", err
	}
	return supervisor.TypeSecret, nil
}

// SpecialPaths are none: no client's path leads here.
func (c *Connection) SpecialPaths(context.Context) (*pluginpb.Paths, error) {
	return &pluginpb.Paths{}, nil
}

// The paths of a connection, as its engine calls them. Data and answers are the messages of the protocol in JSON.
const (
	pathNewUser    = "new-user"
	pathUpdateUser = "update-user"
	pathDeleteUser = "delete-user"
)

// HandleRequest runs one of the engine's calls.
func (c *Connection) HandleRequest(ctx context.Context, req *pluginpb.Request) (*pluginpb.Response, error) {
	switch req.GetPath() {
	case pathNewUser:
		in := &pluginpb.NewUserRequest{}
		if err := decode(req.GetData(), in); err != nil {
			return nil, err
		}
		name, err := c.plugin.NewUser(ctx, in)
		if err != nil {
			return nil, err
		}
		data, err := protojson.Marshal(&pluginpb.NewUserResponse{Username: name})
		return &pluginpb.Response{Data: string(data)}, err
	case pathUpdateUser:
		in := &pluginpb.UpdateUserRequest{}
		if err := decode(req.GetData(), in); err != nil {
			return nil, err
		}
		return nil, c.plugin.UpdateUser(ctx, in)
	case pathDeleteUser:
		in := &pluginpb.DeleteUserRequest{}
		if err := decode(req.GetData(), in); err != nil {
			return nil, err
		}
		return nil, c.plugin.DeleteUser(ctx, in)
	default:
		return nil, fault.Text(fault.UnsupportedPath, "unsupported path")
	}
}

func decode(data string, m proto.Message) error {
	return fault.As(fault.Internal, protojson.Unmarshal([]byte(data), m), "read", "a call of the database mount")
}

// HandleExistenceCheck has nothing to check.
func (c *Connection) HandleExistenceCheck(context.Context, *pluginpb.Request) (found, checkFound bool, err error) {
	return false, false, nil
}

// InvalidateKey has nothing to forget: a follower reads the config when it becomes the leader.
func (c *Connection) InvalidateKey(context.Context, string) error { return nil }

// Cleanup closes the connection for good.
func (c *Connection) Cleanup(ctx context.Context) error { return c.plugin.Close(ctx) }
