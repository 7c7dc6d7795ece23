package router

import (
	"context"

	pluginpb "rollcall/proto/plugin"
)

// Entry is one value of a plugin's storage.
type Entry struct {
	Key      string
	Value    []byte
	SealWrap bool
}

// Storage is what a plugin sees of its mount's storage.
type Storage interface {
	List(ctx context.Context, prefix string) ([]string, error)
	Get(ctx context.Context, key string) (*Entry, error)
	Put(ctx context.Context, e *Entry) error
	Delete(ctx context.Context, key string) error
}

// Setup is what a backend is told when it is set up.
type Setup struct {
	BackendUUID string
	Config      map[string]string
	Storage     Storage
	System      System
}

// Backend is one plugin backend inside a process.
type Backend interface {
	Setup(ctx context.Context, s Setup) error
	Initialize(ctx context.Context) error
	Type(ctx context.Context) (uint32, error)
	SpecialPaths(ctx context.Context) (*pluginpb.Paths, error)
	HandleRequest(ctx context.Context, req *pluginpb.Request) (*pluginpb.Response, error)
	HandleExistenceCheck(ctx context.Context, req *pluginpb.Request) (checked, exists bool, err error)
	InvalidateKey(ctx context.Context, key string) error
	Cleanup(ctx context.Context) error
}

// System is what a plugin may ask of its host.
type System interface{}
