package demoplugin

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	pluginpb "rollcall/proto/plugin"
	"rollcall/proto/plugin/pluginserver"
)

// database is a plugin whose database is a directory: a user is a file in it that holds the password. Several processes,
// on several nodes, may have the same one open, as with a real database.
type database struct {
	pluginpb.UnimplementedDatabaseServer
	options

	mu          sync.Mutex
	initialized int
	connections map[string]*connection
}

// connection is one that Initialize has opened.
type connection struct {
	dir string
}

func (d *database) id(ctx context.Context) string {
	if d.single {
		return ""
	}
	return pluginserver.InstanceID(ctx)
}

func (d *database) find(ctx context.Context) (*connection, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if c := d.connections[d.id(ctx)]; c != nil {
		return c, nil
	}
	return nil, status.Error(codes.FailedPrecondition, "the connection is not open: Initialize comes first")
}

// Initialize opens a connection: config holds dir, the database's directory, and password, which opens it. With verify the
// directory must be there, and its file ".password", where there is one, must hold the password.
func (d *database) Initialize(ctx context.Context, in *pluginpb.InitializeRequest) (*pluginpb.InitializeResponse, error) {
	config := in.GetConfigData().AsMap()
	dir, _ := config["dir"].(string)
	d.mu.Lock()
	d.initialized++
	first := d.initialized == 1
	d.mu.Unlock()
	switch {
	case d.fail == "initialize", d.fail == "second-setup" && !first && !in.GetVerifyConnection():
		return nil, errors.New("demo database: told to fail in Initialize")
	case dir == "":
		return nil, errors.New("demo database: dir cannot be empty")
	case d.require != "" && config[d.require] == nil:
		return nil, fmt.Errorf("demo database %s: %s cannot be empty", d.version, d.require)
	}
	if in.GetVerifyConnection() {
		if d.fail == "verify" {
			return nil, errors.New("demo database: told to fail when asked for the database")
		}
		if _, err := os.Stat(dir); err != nil {
			return nil, fmt.Errorf("demo database: reach %s: %w", dir, err)
		}
		want, err := os.ReadFile(filepath.Join(dir, ".password"))
		if err == nil && string(want) != config["password"] {
			return nil, errors.New("demo database: access denied")
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.connections[d.id(ctx)] = &connection{dir: dir}
	return &pluginpb.InitializeResponse{ConfigData: in.GetConfigData()}, nil
}

// NewUser makes a user whose name tells the plugin's version.
func (d *database) NewUser(ctx context.Context, in *pluginpb.NewUserRequest) (*pluginpb.NewUserResponse, error) {
	c, err := d.find(ctx)
	if err != nil {
		return nil, err
	}
	if d.delay > 0 {
		select {
		case <-time.After(d.delay):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if d.unlucky("update") {
		return nil, fmt.Errorf("demo plugin %s: told to fail %g of its requests", d.version, d.errorRate)
	}
	for _, statement := range in.GetStatements().GetCommands() {
		switch statement {
		case "CRASH":
			panic("demo database: told to crash") // in a handler of gRPC that ends the process
		case "FAIL":
			return nil, errors.New("demo database: syntax error in FAIL")
		}
	}
	name := strings.Join([]string{"v", in.GetUsernameConfig().GetRoleName(), d.version, strings.ToLower(rand.Text()[:12])}, "_")
	return &pluginpb.NewUserResponse{Username: name}, c.write(name, in.GetPassword()+"\n"+expiration(in.GetExpiration().AsTime()))
}

func expiration(t time.Time) string { return "until " + t.UTC().Format(time.RFC3339) + "\n" }

func (c *connection) write(user, text string) error {
	return os.WriteFile(filepath.Join(c.dir, user), []byte(text), 0o600)
}

// UpdateUser changes a user's password or expiration.
func (d *database) UpdateUser(ctx context.Context, in *pluginpb.UpdateUserRequest) (*pluginpb.UpdateUserResponse, error) {
	c, err := d.find(ctx)
	if err != nil {
		return nil, err
	}
	raw, err := os.ReadFile(filepath.Join(c.dir, filepath.Base(in.GetUsername())))
	if err != nil {
		return nil, fmt.Errorf("demo database: no user %q", in.GetUsername())
	}
	pass, until, _ := strings.Cut(string(raw), "\n")
	if p := in.GetPassword(); p != nil {
		pass = p.GetNewPassword()
	}
	if e := in.GetExpiration(); e != nil {
		until = expiration(e.GetNewExpiration().AsTime())
	}
	return &pluginpb.UpdateUserResponse{}, c.write(in.GetUsername(), pass+"\n"+until)
}

// DeleteUser removes a user; one that is gone already is no error.
func (d *database) DeleteUser(ctx context.Context, in *pluginpb.DeleteUserRequest) (*pluginpb.DeleteUserResponse, error) {
	c, err := d.find(ctx)
	if err != nil {
		return nil, err
	}
	err = os.Remove(filepath.Join(c.dir, filepath.Base(in.GetUsername())))
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	return &pluginpb.DeleteUserResponse{}, err
}

// Type is the kind of database.
func (d *database) Type(context.Context, *emptypb.Empty) (*pluginpb.TypeResponse, error) {
	if d.fail == "setup" {
		return nil, errors.New("demo database: told to fail when asked what it is")
	}
	return &pluginpb.TypeResponse{Type: "demo"}, nil
}

// Close closes a connection.
func (d *database) Close(ctx context.Context, _ *emptypb.Empty) (*emptypb.Empty, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.connections, d.id(ctx))
	return &emptypb.Empty{}, nil
}
