package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"rollcall/cmd/rollcall/client"
	"rollcall/node"
	"rollcall/node/api"
)

func newDemo(e *client.Env) *cobra.Command {
	d := &demo{env: e}
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Upgrade a plugin on three nodes in this process, under load, and show who did what",
		Long: `Start three nodes in this process, mount a demo plugin on them as real plugin processes, send it reads and
writes through all three, upgrade it on every node with one call while the load runs, and print each node's verdict.
Nothing is left behind.

-fail=node-2:start makes the new version fail on node-2: nothing is switched anywhere, and the table says why.
-strategy=best-effort lets the other nodes go ahead.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return d.run(cmd.Context()) },
	}
	f := cmd.Flags()
	f.StringVar(&d.fail, "fail", "", "make the new version fail: NODE:PHASE, with PHASE one of exit, start, hang, setup, initialize")
	f.StringVar(&d.strategy, "strategy", "", "all-or-nothing (default) or best-effort")
	f.IntVar(&d.nodes, "nodes", 3, "how many nodes (1 to 7)")
	f.DurationVar(&d.warm, "load", time.Second, "how long the load runs before the upgrade, and again after it")
	f.IntVar(&d.clients, "clients", 6, "how many clients send the load (1 to 64)")
	f.BoolVar(&d.verbose, "verbose", false, "show the nodes' logs")
	return cmd
}

// demo is one run of `rollcall demo`.
type demo struct {
	env            *client.Env
	fail, strategy string
	nodes, clients int
	warm           time.Duration
	verbose        bool
	upgradeArgs    []string
	failures       int64
}

func (d *demo) say(format string, args ...any) {
	_, _ = fmt.Fprintf(d.env.Stdout, format+"\n", args...)
}

func (d *demo) check() error {
	switch {
	case d.nodes < 1 || d.nodes > 7:
		return errors.New("-nodes must be between 1 and 7")
	case d.clients < 1 || d.clients > 64:
		return errors.New("-clients must be between 1 and 64")
	case d.warm < 0 || d.warm > time.Minute:
		return errors.New("-load must be between 0s and 1m")
	}
	if d.fail == "" {
		return nil
	}
	name, phase, ok := strings.Cut(d.fail, ":")
	if !ok || name == "" || phase == "" {
		return fmt.Errorf("-fail must be NODE:PHASE, such as node-2:start, not %q", d.fail)
	}
	d.upgradeArgs = []string{"-fail-on", name, "-fail", phase}
	return nil
}

func (d *demo) run(ctx context.Context) error {
	if err := d.check(); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	logger := quiet(d.verbose, slog.New(slog.NewTextHandler(d.env.Stderr, nil)))
	d.say("starting %d nodes in this process ...", d.nodes)
	s, err := startSandbox(ctx, node.LocalOptions{Nodes: d.nodes, Logger: logger}, d.upgradeArgs)
	if err != nil {
		return err
	}
	rec, err := d.upgrade(ctx, s)
	if err = errors.Join(err, s.close()); err != nil {
		return err
	}
	return d.conclude(rec)
}

// upgrade runs the load and the reload in the middle of it.
func (d *demo) upgrade(ctx context.Context, s *sandbox) (*api.Reload, error) {
	for _, n := range s.Nodes() {
		d.say("  %s  %s", n.Name(), n.APIAddress())
	}
	d.say("mounted demo/ at %s; %d clients read and write through all nodes", demoFrom, d.clients)
	load := startLoad(ctx, s.Addresses(), s.Token, d.clients)
	defer load.stop()
	if err := pause(ctx, d.warm); err != nil {
		return nil, err
	}
	d.say("upgrading demo to %s on every node ...", demoTo)
	resp, _, err := s.client.Reload(ctx, "", api.ReloadRequest{
		Plugin: "demo", Scope: "global", Version: demoTo, Strategy: d.strategy,
	})
	if err != nil {
		return nil, fmt.Errorf("start the reload: %w", err)
	}
	rec, err := s.client.WaitReload(ctx, resp.ReloadID, api.Watcher{})
	if err != nil {
		return nil, fmt.Errorf("wait for the reload: %w", err)
	}
	if err := pause(ctx, d.warm); err != nil {
		return nil, err
	}
	sum := load.stop()
	d.say("")
	client.PrintVerdicts(d.env.Stdout, rec)
	d.say("")
	d.say("requests sent by the clients: %d, failed: %d, answered by an older version after a newer one: %d, lost writes: %d",
		sum.sent, sum.failed, sum.backwards, sum.lost)
	if sum.firstError != "" {
		d.say("first failure: %s", sum.firstError)
	}
	d.failures = sum.failed + sum.backwards + sum.lost
	return rec, nil
}

// conclude turns what happened into an exit code: a failed request is a failed demo, and so is a node that did not
// follow, unless it was told to fail.
func (d *demo) conclude(rec *api.Reload) error {
	if d.failures > 0 {
		return client.Exit(client.ExitReload, errors.New("requests failed during the upgrade; that must not happen"))
	}
	if rec.Outcome != api.OutcomeSucceeded && d.fail == "" {
		return client.Exit(client.ExitReload, fmt.Errorf("the reload ended as %q: %s", rec.Outcome, rec.Why))
	}
	if d.fail != "" && rec.Outcome == api.OutcomeSucceeded {
		return client.Exit(client.ExitReload, fmt.Errorf("-fail=%s named no node or phase that could fail", d.fail))
	}
	return nil
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
