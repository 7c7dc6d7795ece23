package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"rollcall/node/api"
	"rollcall/node/fault"
)

// reloadFlags are the flags that reload and rollback share.
type reloadFlags struct {
	req           api.ReloadRequest
	kind, wait    string
	maxErrorRate  string
	excludeFenced bool
}

const defaultWait = "10m"

func (r *reloadFlags) add(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&r.req.Plugin, "plugin", "", "name of the plugin whose mounts to reload")
	f.StringVar(&r.kind, "type", "", "its type: auth, database, secret or unknown (any)")
	f.StringVar(&r.req.ReloadID, "reload-id", "", "id of this reload: repeating the call with it changes nothing")
	f.StringVar(&r.wait, "wait", defaultWait, "how long to wait for the end; 0 returns at once")
	f.StringVar(&r.req.Trial, "trial", "", "how deep a new process is tried before the commit: handshake, setup or initialize")
	f.StringVar(&r.req.Prepare, "prepare", "", "limit of the preparing phase")
	f.StringVar(&r.req.Deadline, "deadline", "", "limit of the whole run")
	f.StringVar(&r.req.Queue, "queue", "", "how long to queue behind a reload of the same mounts")
	f.StringVar(&r.req.OnSwitchFailure, "on-switch-failure", "", "when a committed switch fails on a node: retry or rollback")
	f.StringVar(&r.req.OnDrainTimeout, "on-drain-timeout", "", "when requests in flight outlive the deadline: cancel or fence")
	f.BoolVar(&r.excludeFenced, "exclude-fenced", true, "leave out nodes whose serving lease is provably over; false waits for them")
	complete(c, map[string][]string{
		"type": append([]string{"unknown"}, pluginTypes...), "trial": {"handshake", "setup", "initialize"},
		"on-switch-failure": {"retry", "rollback"}, "on-drain-timeout": {"cancel", "fence"},
	})
}

// waves adds the flags of strategies with waves.
func (r *reloadFlags) waves(f *pflag.FlagSet) {
	f.StringArrayVar(&r.req.Waves, "waves", nil, "canary: nodes per wave as counts or percentages (1,25%,100%)")
	f.IntVar(&r.req.Batch, "batch", 0, "rolling: nodes per wave")
	f.IntVar(&r.req.MaxUnavailable, "max-unavailable", 0, "rolling: nodes that may be down meanwhile")
	f.StringVar(&r.req.Bake, "bake", "", "how long a wave is watched before the next")
	f.StringVar(&r.maxErrorRate, "max-error-rate", "", "gate: share of failed requests that stops it (1% or 0.01)")
	f.Float64Var(&r.req.MaxP99Increase, "max-p99-increase", 0, "gate: p99 of the new against the old generation, a factor above 1")
	f.IntVar(&r.req.MinSamples, "min-samples", 0, "gate: requests of each kind below which it is inconclusive")
}

func complete(c *cobra.Command, values map[string][]string) {
	for flag, list := range values {
		_ = c.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(list, cobra.ShellCompDirectiveNoFileComp))
	}
}

// finish checks what the flags say together and completes the request.
func (r *reloadFlags) finish(f *pflag.FlagSet) (wait time.Duration, err error) {
	if wait, err = api.ParseTimeout(r.wait); err != nil {
		return 0, usagef("-wait: %q is not a duration such as 30s or 0", r.wait)
	}
	if r.maxErrorRate != "" {
		text, percent := strings.CutSuffix(r.maxErrorRate, "%")
		share, err := strconv.ParseFloat(text, 64)
		if percent {
			share /= 100
		}
		if err != nil || share < 0 || share > 1 {
			return 0, usagef("-max-error-rate: %q is not a share such as 1%% or 0.01", r.maxErrorRate)
		}
		r.req.MaxErrorRate = share
	}
	if f.Changed("exclude-fenced") {
		r.req.ExcludeFenced = &r.excludeFenced
	}
	if r.kind != "" && r.kind != "unknown" && !slices.Contains(pluginTypes, r.kind) {
		return 0, usagef("-type: %q is not known; use auth, database, secret or unknown", r.kind)
	}
	r.req.Mounts, r.req.Waves = splitAll(r.req.Mounts), splitAll(r.req.Waves)
	if r.req.ReloadID == "" {
		id, err := uuid.NewV7()
		if err != nil {
			return 0, usageErr(err)
		}
		r.req.ReloadID = id.String()
	}
	r.req.Wait = "0" // the record is followed instead: that survives the death of the node asked
	return wait, nil
}

func newPluginReload(e *Env) *cobra.Command {
	var r reloadFlags
	c := &cobra.Command{
		Use: "reload [flags]", Short: "Bring mounts to a plugin's new version, on this node or on all", Args: cobra.NoArgs,
		Long: `Reload the mounts of a plugin, or the named mounts, and wait until every node has answered.

  $ rollcall plugin reload -scope=global -plugin=kv
  $ rollcall plugin reload -scope=global -mounts=kv/,team/ -version=v2.0.0
  $ rollcall plugin reload -scope=global -plugin=kv -strategy=canary -waves=1,50%,100% -bake=1m

Exit codes: 0 every node followed; 1 wrong usage; 2 the request was refused or no node answered; 3 the reload failed, was
aborted or rolled back, matched no mount, or a node refused; 4 a node is pending or unconfirmed, or -wait was too short.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			wait, err := r.finish(cmd.Flags())
			if err != nil {
				return err
			}
			switch {
			case r.req.Scope != "" && r.req.Scope != "global":
				return usagef("invalid reload scope %q: leave -scope out for the node asked, or use -scope=global", r.req.Scope)
			case r.req.Plugin == "" && len(r.req.Mounts) == 0:
				return usagef("no plugins or mounts specified, must specify exactly one of -plugin or -mounts")
			case r.req.Plugin != "" && len(r.req.Mounts) > 0:
				return usagef("must specify exactly one of -plugin or -mounts")
			case r.kind != "" && r.req.Plugin == "":
				return usagef("-type goes with -plugin")
			}
			cl, err := e.client()
			if err != nil {
				return err
			}
			kind := r.kind
			switch {
			case cl.Namespace() != "" && kind != "":
				return usagef("-type reaches over all namespaces and works in the root namespace only; leave it or -namespace out")
			case cl.Namespace() == "" && kind == "" && r.req.Plugin != "":
				kind = "unknown"
			}
			return e.reload(cmd.Context(), cl, wait, &r.req, func(ctx context.Context) (*api.ReloadResponse, api.Warnings, error) {
				return cl.Reload(ctx, kind, r.req)
			})
		},
	}
	r.add(c)
	f := c.Flags()
	f.StringArrayVar(&r.req.Mounts, "mounts", nil, "mount path to reload; repeat or use commas for more")
	f.StringVar(&r.req.Scope, "scope", "", "global for every node; left out, the node asked alone")
	f.StringVar(&r.req.Strategy, "strategy", "", "all-or-nothing (default), best-effort, rolling or canary")
	f.StringVar(&r.req.Version, "version", "", "version to bring the mounts to (default: what is configured)")
	r.waves(f)
	complete(c, map[string][]string{"scope": {"global"}, "strategy": {"all-or-nothing", "best-effort", "rolling", "canary"}})
	return c
}

func newPluginRollback(e *Env) *cobra.Command {
	var r reloadFlags
	c := &cobra.Command{
		Use: "rollback [flags] [[TYPE] NAME]", Short: "Bring a plugin's mounts back to what they ran before their last switch",
		Args: cobra.MaximumNArgs(2),
		Long: `Bring every mount of a plugin back to what it ran before its last switch, on every node. The bytes are kept for that,
also where the catalog's entry was replaced or removed since. It is a reload of its own, with the same exit codes.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			wait, err := r.finish(cmd.Flags())
			if err != nil {
				return err
			}
			into := []*string{&r.kind, &r.req.Plugin}
			if err := positional(args, into[len(into)-len(args):]...); err != nil {
				return err
			}
			if r.req.Plugin == "" {
				return usagef("name the plugin: `%s NAME`", cmd.CommandPath())
			}
			kind := r.kind
			if kind == "" {
				kind = "unknown"
			}
			cl, err := e.client()
			if err != nil {
				return err
			}
			return e.reload(cmd.Context(), cl, wait, &r.req, func(ctx context.Context) (*api.ReloadResponse, api.Warnings, error) {
				return cl.Rollback(ctx, kind, r.req.Plugin, r.req)
			})
		},
	}
	r.add(c)
	return c
}

// reload starts a reload and follows it.
func (e *Env) reload(ctx context.Context, cl *api.Client, wait time.Duration, req *api.ReloadRequest,
	start func(context.Context) (*api.ReloadResponse, api.Warnings, error),
) error {
	if wait > 0 {
		cl.LearnPeers(ctx)
	}
	what, named := "plugin", req.Plugin
	if len(req.Mounts) > 0 {
		what, named = "mounts", "["+strings.Join(req.Mounts, " ")+"]"
	}
	out, warnings, err := start(ctx)
	id := req.ReloadID
	switch {
	case err == nil:
		id = out.ReloadID
	case fault.Is(err, fault.OutcomeUnknown) || fault.Is(err, fault.Deadline):
		// The id is ours: when the entry was made, any node knows it.
		if _, rerr := cl.ReloadRecord(ctx, id, 0, 0); rerr != nil {
			return failed("reloading "+what, err)
		}
	default:
		return failed("reloading "+what, err)
	}
	e.warn(warnings)
	if wait <= 0 {
		if e.json() {
			return e.printJSON(api.ReloadResponse{ReloadID: id})
		}
		e.say("Success! Reloading %s: %s, reload_id: %s", what, named, id)
		return nil
	}
	return e.follow(ctx, cl, id, wait)
}

// follow shows a reload until it ends or wait is over, prints its verdicts, and returns the exit code.
func (e *Env) follow(ctx context.Context, cl *api.Client, id string, wait time.Duration) error {
	limited, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	to := e.Stdout
	if e.json() {
		to = e.Stderr
	}
	p := NewProgress(to)
	rec, err := cl.WaitReload(limited, id, api.Watcher{Changed: p.Update, Trouble: p.Trouble})
	p.Clear()
	interrupted := errors.Is(ctx.Err(), context.Canceled)
	if err != nil && (limited.Err() == nil || rec == nil && !interrupted) {
		return failed("following reload "+id, err)
	}
	if rec != nil {
		if err := e.showReload(rec); err != nil {
			return err
		}
	}
	if err != nil {
		text := "No longer waiting."
		if !interrupted {
			text = fmt.Sprintf("Still %s after %s.", rec.Phase, wait)
		}
		_, _ = fmt.Fprintf(e.Stderr, "\n%s The reload goes on without this command.\n"+
			"Follow it with `rollcall reloads show -wait=10m %s`, "+
			"end it with `rollcall reloads abort %s`.\n", text, id, id)
		return quit(ExitPending)
	}
	code := ExitOf(rec)
	if code != ExitOK {
		e.nextAfter(rec, code)
		return quit(code)
	}
	return nil
}

// showReload prints a record in the format asked for.
func (e *Env) showReload(r *api.Reload) error {
	if e.json() {
		return e.printJSON(r)
	}
	if _, _, ok := terminal(e.Stdout, e.Getenv); ok {
		e.say("%s", title(r))
	}
	e.say("")
	PrintVerdicts(e.Stdout, r)
	return nil
}

// nextAfter says what to do about a reload that did not go through.
func (e *Env) nextAfter(r *api.Reload, code int) {
	if !api.Ended(r.Phase) {
		return
	}
	var text string
	switch {
	case r.Outcome == api.OutcomeNothing:
		text = "Nothing was reloaded. `rollcall plugin versions` shows which mounts run which plugin."
	case r.Outcome == api.OutcomeAborted:
		text = "Nothing changed on any node. Remove the cause and reload again; `rollcall plugin plan` tries it without a switch."
	case r.Outcome == api.OutcomeRolledBack:
		text = "Every node is back on what it ran before."
	case code == ExitPending:
		text = "Nodes that are down take the new generation when they return; `rollcall plugin versions` shows who runs what."
	default:
		text = "`rollcall plugin versions` shows who runs what; `rollcall plugin rollback` brings the old version back everywhere."
	}
	_, _ = fmt.Fprintf(e.Stderr, "\n%s\n", text)
}

func newPluginReloadStatus(e *Env) *cobra.Command {
	return &cobra.Command{
		Use: "reload-status RELOAD_ID", Short: "Show which nodes have finished a reload", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := e.client()
			if err != nil {
				return err
			}
			s, err := cl.ReloadStatus(cmd.Context(), args[0])
			if err != nil {
				return failed("reading reload status", err)
			}
			if e.json() {
				return e.printJSON(s)
			}
			e.printStatus(e.Stdout, s)
			return nil
		},
	}
}

// printStatus prints the stock commands' table, sorted, and below it what they lack.
func (e *Env) printStatus(w io.Writer, s *api.ReloadStatus) {
	t := table{head: []string{"Time", "Participant", "Success", "Message"}}
	for _, name := range sortedKeys(s.Results) {
		n := s.Results[name]
		at := n.Timestamp
		if ts, err := time.Parse(time.RFC3339Nano, n.Timestamp); err == nil {
			at = ts.UTC().Format("15:04:05")
		}
		t.add(at, name, strconv.FormatBool(n.Error == ""), n.Error)
	}
	t.print(w)
	state := s.State
	if s.Outcome != "" {
		state += ", " + s.Outcome
	}
	e.say("\n%s: %d of %d nodes answered%s", state, len(s.Answered), len(s.Expected), paren(s.Why))
	if len(s.Pending) > 0 {
		e.say("pending: %s", strings.Join(s.Pending, ", "))
	}
}
