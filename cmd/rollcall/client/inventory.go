package client

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"rollcall/node/api"
)

func newPluginVersions(e *Env) *cobra.Command {
	var check bool
	c := &cobra.Command{
		Use: "versions", Short: "Show what every node runs against what is wanted of it", Args: cobra.NoArgs,
		Long: `Show, for every mount and node, the version that runs. "!" marks a node that does not run what is wanted of it, and
the lines below say why. With -check the exit code is 3 when any node does not, or keeps a version of its
own after a local reload or a refusal: for scripts and alarms.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := e.client()
			if err != nil {
				return err
			}
			v, err := cl.Versions(cmd.Context())
			if err != nil {
				return failed("reading versions", err)
			}
			if e.json() {
				err = e.printJSON(v)
			} else {
				e.printVersions(v)
			}
			if err == nil && check && differs(v) {
				return quit(ExitReload)
			}
			return err
		},
	}
	c.Flags().BoolVar(&check, "check", false, "exit with 3 when a node does not run what is wanted of it")
	return c
}

// differs reports whether any node does not run what is wanted of it, or keeps a version of its own.
func differs(v *api.Versions) bool {
	for _, m := range v.Mounts {
		for _, n := range m.Nodes {
			if !n.Same || n.Override != "" {
				return true
			}
		}
	}
	return false
}

func (e *Env) printVersions(v *api.Versions) {
	if len(v.Mounts) == 0 {
		e.say("No plugin is mounted. Mount one with `rollcall secrets enable`.")
		return
	}
	t := table{head: append([]string{"Mount", "Plugin", "Configured", "Wanted"}, v.Nodes...)}
	var notes []string
	for _, m := range v.Mounts {
		configured := orDash(m.Configured)
		if m.Pinned != "" {
			configured = m.Pinned + " (pin)"
		}
		row := []string{m.Namespace + m.Mount, m.Plugin, configured, versionCell(&m.Wanted)}
		cells := map[string]string{}
		for _, n := range m.Nodes {
			cell := "-"
			if n.Running != nil {
				cell = versionCell(n.Running)
			}
			if n.Override != "" {
				cell += " (" + n.Override + ")"
			}
			if !n.Same {
				cell = "! " + cell
			}
			if n.Why != "" {
				notes = append(notes, fmt.Sprintf("%s on %s: %s", m.Namespace+m.Mount, n.Node, api.Cell(n.Why)))
			}
			cells[n.Node] = cell
		}
		for _, name := range v.Nodes {
			row = append(row, orDash(cells[name]))
		}
		t.add(row...)
	}
	t.print(e.Stdout)
	if len(notes) > 0 {
		e.say("\n%s", strings.Join(notes, "\n"))
	}
}

// versionCell is what tells two builds apart: the version, and the sha256 where there is none.
func versionCell(p *api.Process) string {
	if p.Version != "" {
		return p.Version
	}
	return orDash(short(p.SHA256))
}

func newPluginPlan(e *Env) *cobra.Command {
	var in api.PlanRequest
	c := &cobra.Command{
		Use: "plan [flags] [NAME [VERSION]]", Short: "Try a reload on every node without switching anything",
		Args: cobra.MaximumNArgs(2),
		Long: `Try on every node what a global reload would do, without switching anything: the bytes, their sha256 and CPU, a real
start, the handshake, the type, and the set-up on discarded storage. Every mount that it would touch is listed, and every one
that it would not, with why. The exit code is 0 only if every node would follow, else 3.

  $ rollcall plugin plan kv v2.0.0
  $ rollcall plugin plan -mounts=kv/,team/`,
		RunE: func(cmd *cobra.Command, args []string) error {
			in.Mounts = splitAll(in.Mounts)
			if err := positional(args, &in.Plugin, &in.Version); err != nil {
				return err
			}
			if (in.Plugin == "") == (len(in.Mounts) == 0) {
				return usagef("name what to try: NAME (or -plugin=NAME) or -mounts=PATH, not both")
			}
			cl, err := e.client()
			if err != nil {
				return err
			}
			p, err := cl.Plan(cmd.Context(), in)
			if err != nil {
				return failed("planning", err)
			}
			if e.json() {
				err = e.printJSON(p)
			} else {
				e.printPlan(p)
			}
			if err == nil && !p.OK {
				return quit(ExitReload)
			}
			return err
		},
	}
	f := c.Flags()
	f.StringVar(&in.Plugin, "plugin", "", "name of the plugin")
	f.StringVar(&in.Type, "type", "", "its type: auth, database, secret or unknown")
	f.StringArrayVar(&in.Mounts, "mounts", nil, "mount path; repeat or use commas for more")
	f.StringVar(&in.Version, "version", "", "version to try (default: what a reload would take)")
	f.StringVar(&in.Trial, "trial", "", "how deep to try: handshake, setup or initialize")
	return c
}

// positional fills what the flags -plugin and -version say from the arguments NAME and VERSION.
func positional(args []string, into ...*string) error {
	for i, a := range args {
		if *into[i] != "" && *into[i] != a {
			return usagef("%q is said as an argument and %q as a flag: leave one of them out", a, *into[i])
		}
		*into[i] = a
	}
	return nil
}

// printReach lists what a plan would touch, and what not.
func (e *Env) printReach(p *api.Plan) {
	t := table{head: []string{"Mount", "Reload", "From", "To", "Why"}}
	for _, g := range p.Targets {
		from := versionCell(&api.Process{Version: g.From.Version, SHA256: g.From.SHA256})
		to := versionCell(&api.Process{Version: g.To.Version, SHA256: g.To.SHA256})
		why := "-"
		if g.From.SHA256 == g.To.SHA256 && g.From.Version == g.To.Version {
			why = "the same version, started afresh"
		}
		t.add(g.Namespace+g.Mount, "yes", from, to, why)
	}
	for _, u := range p.Untouched {
		t.add(u.Namespace+u.Mount, "no", "-", "-", api.Cell(u.Why))
	}
	if len(p.Targets)+len(p.Untouched) > 0 {
		t.print(e.Stdout)
		e.say("")
	}
}

func (e *Env) printPlan(p *api.Plan) {
	e.printReach(p)
	if len(p.Targets) == 0 {
		e.say("Nothing to reload: no mount matches.")
		return
	}
	t := table{head: []string{"Node", "Mount", "Trial", "Version", "Ready", "Memory"}}
	var causes []string
	for _, n := range p.Nodes {
		if n.Error != "" {
			t.add(n.Node, "-", "not asked", "-", "-", "-")
			causes = append(causes, fmt.Sprintf("%s: %s", n.Node, api.Cell(n.Error)))
		}
		for _, m := range n.Mounts {
			verdict, memory := "ok", "-"
			if !m.OK {
				verdict = "refused"
				causes = append(causes, fmt.Sprintf("%s %s: %s: %s", n.Node, m.Mount, m.Phase, api.Cell(m.Cause)))
			}
			if m.RSSBytes > 0 {
				memory = fmt.Sprintf("%.1f MiB", float64(m.RSSBytes)/(1<<20))
			}
			version := versionCell(&api.Process{Version: m.Version, SHA256: m.SHA256})
			t.add(n.Node, m.Mount, verdict, version, millis(m.Timings.Ready), memory)
		}
	}
	t.print(e.Stdout)
	if len(causes) > 0 {
		e.say("\n%s", strings.Join(causes, "\n"))
	}
	if p.OK {
		e.say("\nEvery node could follow this reload.")
	} else {
		e.say("\nThis reload would be refused. Nothing was changed.")
	}
}
