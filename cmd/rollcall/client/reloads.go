package client

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"rollcall/node/api"
)

func newReloads(e *Env) *cobra.Command {
	c := group(&cobra.Command{Use: "reloads", Aliases: []string{"reload"}, Short: "The reloads: list, show, and steer them"})
	c.AddCommand(newReloadsList(e), newReloadsShow(e),
		newReloadsControl(e, "pause", "Hold a reload before its next wave"),
		newReloadsControl(e, "resume", "Let a paused reload go on"),
		newReloadsControl(e, "promote", "Let the next wave go without waiting for the rest of the bake"),
		newReloadsControl(e, "abort", "End a reload: nothing is switched, or what was switched in waves goes back"))
	return c
}

func newReloadsList(e *Env) *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List the reloads, newest first", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := e.client()
			if err != nil {
				return err
			}
			l, err := cl.Reloads(cmd.Context())
			if err != nil {
				return failed("listing reloads", err)
			}
			if e.json() {
				return e.printJSON(l)
			}
			if len(l.Reloads) == 0 {
				e.say("No reloads on record.")
				return nil
			}
			t := table{head: []string{"ID", "Started", "What", "Scope", "Strategy", "State", "Nodes"}}
			for _, r := range l.Reloads {
				state := cmp.Or(r.Outcome, r.Phase)
				if r.Paused {
					state += " (paused)"
				}
				t.add(r.ID, clock(r.Started), brief(r), r.Scope, r.Strategy, state,
					fmt.Sprintf("%d/%d", len(r.Answered), len(r.Expected)))
			}
			t.print(e.Stdout)
			return nil
		},
	}
}

// brief is what a reload switches, in a table's cell.
func brief(r *api.Reload) string {
	if len(r.Targets) == 0 {
		return selected(r)
	}
	t := &r.Targets[0]
	text := fmt.Sprintf("%s %s -> %s", t.To.Name, specOf(&t.From), specOf(&t.To))
	if len(r.Targets) > 1 {
		text += fmt.Sprintf(" (%d mounts)", len(r.Targets))
	}
	return text
}

// clock is a record's time for a table, in UTC.
func clock(at string) string {
	t, err := time.Parse(time.RFC3339Nano, at)
	if err != nil {
		return orDash(at)
	}
	return t.UTC().Format("2006-01-02 15:04:05Z")
}

func newReloadsShow(e *Env) *cobra.Command {
	var wait string
	c := &cobra.Command{
		Use: "show [flags] RELOAD_ID", Short: "Show one reload: what every node answered; with -wait, follow it to its end",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			limit, err := api.ParseTimeout(wait)
			if err != nil {
				return usagef("-wait: %q is not a duration such as 30s or 0", wait)
			}
			cl, err := e.client()
			if err != nil {
				return err
			}
			if limit > 0 {
				cl.LearnPeers(cmd.Context())
				return e.follow(cmd.Context(), cl, args[0], limit)
			}
			r, err := cl.ReloadRecord(cmd.Context(), args[0], 0, 0)
			if err != nil {
				return failed("reading reload "+args[0], err)
			}
			if e.json() {
				return e.printJSON(r)
			}
			e.describe(r)
			return nil
		},
	}
	c.Flags().StringVar(&wait, "wait", "0", "follow it to its end for at most this long, and exit as `plugin reload` does")
	return c
}

// describe prints a record for people.
func (e *Env) describe(r *api.Reload) {
	e.say("%s", title(r))
	e.say("%s", phaseLine(r))
	by := ""
	if r.RequestedBy != "" {
		by = " by " + r.RequestedBy
	}
	e.say("started %s%s, ended %s", clock(r.Started), by, clock(r.Ended))
	if len(r.Aliases) > 0 {
		e.say("also asked for as %s", strings.Join(r.Aliases, ", "))
	}
	if r.RollsBack != "" {
		e.say("rolls back %s", r.RollsBack)
	}
	for _, w := range r.Waves {
		state := "waits"
		switch {
		case w.Passed:
			state = "passed"
		case w.Baking:
			state = "is baking"
		case w.CommittedIndex > 0:
			state = "committed"
		}
		line := fmt.Sprintf("wave %d (%s) %s", w.Number+1, strings.Join(w.Nodes, ", "), state)
		if w.Gate != nil {
			line += fmt.Sprintf(": gate %s%s", w.Gate.Verdict, paren(w.Gate.Why))
		}
		e.say("%s", line)
	}
	e.say("")
	PrintVerdicts(e.Stdout, r)
}

func newReloadsControl(e *Env, action, short string) *cobra.Command {
	var why string
	c := &cobra.Command{
		Use: action + " [flags] RELOAD_ID", Short: short, Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := e.client()
			if err != nil {
				return err
			}
			r, err := cl.ControlReload(cmd.Context(), args[0], action, why)
			if err != nil {
				return failed(action+" reload "+args[0], err)
			}
			if e.json() {
				return e.printJSON(r)
			}
			done := map[string]string{"pause": "paused", "resume": "resumed", "promote": "promoted", "abort": "aborted"}[action]
			e.say("Success! Reload %s %s; it is %s.", args[0], done, phaseLine(r))
			return nil
		},
	}
	c.Flags().StringVar(&why, "why", "", "a reason, for the record")
	return c
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
