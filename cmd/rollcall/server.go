package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"syscall"

	"github.com/spf13/cobra"

	"rollcall/cmd/rollcall/client"
	"rollcall/node"
	"rollcall/node/fault"
	"rollcall/node/supervisor"
	"rollcall/node/telemetry"
)

func newServer(e *client.Env) *cobra.Command {
	var file string
	var check bool
	cmd := &cobra.Command{
		Use:   "server -config FILE",
		Short: "Run one node",
		Long: `Run one node of a cluster. The same command starts it the first time and every later time.

Every key of the file may also be given as a variable: ROLLCALL_ and the key's path in capitals, joined by "_".`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, warnings, err := node.LoadConfig(file, os.Environ())
			if err != nil {
				return err
			}
			if err := cfg.Validate(); err != nil {
				return err
			}
			warnings = append(warnings, cfg.Warnings()...)
			if check {
				for _, w := range warnings {
					_, _ = fmt.Fprintln(e.Stderr, "WARNING:", w)
				}
				_, err := fmt.Fprintln(e.Stdout, "the configuration is valid")
				return err
			}
			return serve(cmd.Context(), e.Stderr, cfg, warnings)
		},
	}
	cmd.Flags().StringVar(&file, "config", "", "configuration file (HCL or JSON); may be left out when variables say everything")
	cmd.Flags().BoolVar(&check, "check", false, "read and judge the configuration, and exit")
	return cmd
}

func serve(ctx context.Context, stderr io.Writer, cfg node.Config, warnings []string) error {
	level, err := telemetry.ParseLevel(cfg.Log.Level)
	if err != nil {
		return err
	}
	logger, err := telemetry.NewLogger(stderr, cfg.Log.Format, level)
	if err != nil {
		return err
	}
	log.SetFlags(0)
	log.SetOutput(telemetry.Lines(logger, slog.LevelDebug)) // go-plugin's broker writes there
	for _, w := range warnings {
		logger.Warn(w)
	}
	if err := cfg.Preflight(); err != nil {
		return err
	}
	registry := telemetry.NewRegistry(node.Version)
	unbridge, err := telemetry.BridgeLibraryMetrics(registry)
	if err != nil {
		return err
	}
	defer unbridge()
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	if os.Getpid() == 1 || runtime.GOOS == "linux" {
		go supervisor.Reap(ctx)
	}
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	err = node.Run(ctx, cfg, node.Options{Logger: logger, Registry: registry, Hangup: hangup})
	if fault.Is(err, fault.Canceled) {
		return nil // it has left the cluster, as it was asked to
	}
	return err
}
