package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"rollcall/node"
	"rollcall/node/api"
	"rollcall/node/telemetry"
)

// localStop bounds the end of a local cluster.
const localStop = 20 * time.Second

// sandbox is a cluster in this process with a directory of its own, the demo plugin in two versions, and a client.
type sandbox struct {
	*node.Local
	dir     string
	plugins string
	client  *api.Client
	keep    bool
}

// startSandbox starts the nodes, registers the demo plugin's two versions and mounts the first at demo/.
func startSandbox(ctx context.Context, opt node.LocalOptions, upgradeArgs []string) (*sandbox, error) {
	s := &sandbox{dir: opt.Dir}
	if s.dir == "" {
		dir, err := os.MkdirTemp("", "rollcall-")
		if err != nil {
			return nil, fmt.Errorf("make a directory for the cluster: %w", err)
		}
		s.dir = dir
	} else {
		s.keep = true
	}
	s.plugins = filepath.Join(s.dir, "plugins")
	opt.Dir, opt.PluginDir = s.dir, s.plugins
	sum, err := installDemoPlugin(s.plugins)
	if err != nil {
		return nil, errors.Join(err, s.clean())
	}
	if s.Local, err = node.StartLocal(ctx, opt); err != nil {
		return nil, errors.Join(err, s.clean())
	}
	if s.client, err = api.New(api.Config{Addresses: s.Addresses(), Token: s.Token}); err == nil {
		err = s.prepare(ctx, sum, upgradeArgs)
	}
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// The demo plugin's versions.
const (
	demoFrom = "v1.0.0"
	demoTo   = "v1.1.0"
)

func (s *sandbox) prepare(ctx context.Context, sum string, upgradeArgs []string) error {
	for version, extra := range map[string][]string{demoFrom: nil, demoTo: upgradeArgs} {
		args := append([]string{demoArg, "-version", version}, extra...)
		if _, err := s.client.RegisterPlugin(ctx, "secret", "demo", api.RegisterRequest{
			SHA256: sum, Version: version, Command: demoCommand, Args: args,
		}); err != nil {
			return fmt.Errorf("register the demo plugin %s: %w", version, err)
		}
	}
	mounts, err := s.client.Mounts(ctx, "secret")
	if err != nil {
		return fmt.Errorf("look at the mounts: %w", err)
	}
	if mounts["demo/"] != nil {
		return nil // dev -dir: mounted by an earlier run
	}
	err = s.client.Enable(ctx, "secret", "demo", api.MountInput{
		Type: "demo", Config: &api.MountConfigInput{PluginVersion: demoFrom},
	})
	if err != nil {
		return fmt.Errorf("mount the demo plugin: %w", err)
	}
	return s.Wait(ctx)
}

// close stops the nodes and removes what they left.
func (s *sandbox) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), localStop)
	defer cancel()
	if s.client != nil {
		s.client.Close()
	}
	return errors.Join(s.Stop(ctx), s.clean())
}

func (s *sandbox) clean() error {
	if s.keep {
		return nil
	}
	return os.RemoveAll(s.dir)
}

// quiet drops the nodes' logs unless the user wants them. Libraries that use the global logger are taken along: their
// lines would stand between what the command says.
func quiet(verbose bool, logger *slog.Logger) *slog.Logger {
	if !verbose {
		logger = slog.New(slog.DiscardHandler)
	}
	log.SetFlags(0)
	log.SetOutput(telemetry.Lines(logger, slog.LevelDebug))
	return logger
}
