package client

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"rollcall/node/api"
	"rollcall/node/fault"
)

var pluginTypes = []string{"auth", "database", "secret"}

func newPlugin(e *Env) *cobra.Command {
	c := group(&cobra.Command{Use: "plugin", Short: "The catalog, reloads, and which node runs what"})
	c.AddCommand(newPluginRegister(e), newPluginList(e), newPluginInfo(e), newPluginDeregister(e), newPluginReload(e),
		newPluginReloadStatus(e), newPluginRollback(e), newPluginVersions(e), newPluginPlan(e), newPluginPins(e))
	return c
}

// typeAndName reads the arguments TYPE NAME.
func typeAndName(cmd *cobra.Command, args []string) (kind, name string, err error) {
	if len(args) != 2 {
		return "", "", usagef("expected TYPE and NAME (such as `%s secret kv`), got %d arguments", cmd.CommandPath(), len(args))
	}
	kind, name = strings.TrimSpace(args[0]), strings.TrimSpace(args[1])
	if !slices.Contains(pluginTypes, kind) {
		return "", "", usagef("%q is not a plugin type: use auth, database or secret", kind)
	}
	if name == "" || strings.ContainsAny(name, "/ ") {
		return "", "", usagef("%q is not a plugin name", name)
	}
	return kind, name, nil
}

func completeType(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) == 0 {
		return pluginTypes, cobra.ShellCompDirectiveNoFileComp
	}
	return nil, cobra.ShellCompDirectiveNoFileComp
}

func newPluginRegister(e *Env) *cobra.Command {
	var in api.RegisterRequest
	c := &cobra.Command{
		Use: "register [flags] TYPE NAME", Short: "Enter a plugin into the catalog", ValidArgsFunction: completeType,
		Long: `Enter a plugin binary into the catalog. Running mounts stay as they are until a reload.

  $ rollcall plugin register -sha256=$(sha256sum plugins/kv-v2 | cut -d' ' -f1) -command=kv-v2 -version=v2.0.0 secret kv`,
		RunE: func(cmd *cobra.Command, args []string) error {
			kind, name, err := typeAndName(cmd, args)
			if err != nil {
				return err
			}
			if in.SHA256 == "" {
				return usagef("SHA256 is required for all plugins, please provide -sha256 (sha256sum FILE prints it)")
			}
			if in.Command == "" {
				in.Command = name
			}
			cl, err := e.client()
			if err != nil {
				return err
			}
			warnings, err := cl.RegisterPlugin(cmd.Context(), kind, name, in)
			if err != nil {
				return failed("registering plugin "+name, err)
			}
			e.warn(warnings)
			e.say("Success! Registered plugin: %s", name)
			return nil
		},
	}
	f := c.Flags()
	f.StringVar(&in.SHA256, "sha256", "", "SHA-256 of the binary, in hexadecimal (required)")
	f.StringVar(&in.Command, "command", "", "the binary's file, relative to the plugin directory (default: NAME)")
	f.StringArrayVar(&in.Args, "args", nil, "argument for the binary; repeat for more")
	f.StringArrayVar(&in.Env, "env", nil, "KEY=VALUE for the binary's environment; repeat for more")
	f.StringVar(&in.Version, "version", "", "semantic version, such as v1.2.0")
	return c
}

func newPluginList(e *Env) *cobra.Command {
	var detailed bool
	c := &cobra.Command{
		Use: "list [flags] [TYPE]", Short: "List the catalog", Args: cobra.MaximumNArgs(1), ValidArgsFunction: completeType,
		RunE: func(cmd *cobra.Command, args []string) error {
			kind := ""
			if len(args) == 1 {
				if kind = args[0]; !slices.Contains(pluginTypes, kind) {
					return usagef("%q is not a plugin type: use auth, database or secret", kind)
				}
			}
			cl, err := e.client()
			if err != nil {
				return err
			}
			cat, err := cl.Catalog(cmd.Context())
			if err != nil {
				return failed("listing plugins", err)
			}
			if kind != "" {
				cat.Detailed = slices.DeleteFunc(cat.Detailed, func(d api.CatalogDetail) bool { return d.Type != kind })
			}
			if e.json() {
				return e.printJSON(cat)
			}
			return e.printCatalog(cat.Detailed, kind == "", detailed)
		},
	}
	c.Flags().BoolVar(&detailed, "detailed", false, "show the sha256 too")
	return c
}

func (e *Env) printCatalog(list []api.CatalogDetail, withType, detailed bool) error {
	if len(list) == 0 {
		e.say("No plugins in the catalog. Enter one with `rollcall plugin register`.")
		return nil
	}
	t := table{head: []string{"Name", "Version"}}
	if withType {
		t.head = []string{"Name", "Type", "Version"}
	}
	if detailed {
		t.head = append(t.head, "SHA256")
	}
	for _, d := range list {
		row := []string{d.Name}
		if withType {
			row = append(row, d.Type)
		}
		row = append(row, orDash(d.Version))
		if detailed {
			row = append(row, orDash(d.SHA256))
		}
		t.add(row...)
	}
	t.print(e.Stdout)
	return nil
}

func newPluginInfo(e *Env) *cobra.Command {
	var version, field string
	c := &cobra.Command{
		Use: "info [flags] TYPE NAME", Short: "Show one plugin of the catalog", ValidArgsFunction: completeType,
		RunE: func(cmd *cobra.Command, args []string) error {
			kind, name, err := typeAndName(cmd, args)
			if err != nil {
				return err
			}
			cl, err := e.client()
			if err != nil {
				return err
			}
			p, err := cl.Plugin(cmd.Context(), kind, name, version)
			if fault.Is(err, fault.NotFound) {
				what := "without a version"
				if version != "" {
					what = "with version " + version
				}
				return failed("reading plugin named "+name, fault.Text(fault.NotFound,
					"no %s plugin %q %s in the catalog; `rollcall plugin list %s` shows what there is", kind, name, what, kind))
			}
			if err != nil {
				return failed("reading plugin named "+name, err)
			}
			pairs := [][2]string{
				{"args", fmt.Sprint(p.Args)},
				{"builtin", fmt.Sprint(p.Builtin)},
				{"command", p.Command},
				{"name", p.Name},
				{"sha256", p.SHA256},
				{"type", p.Type},
				{"version", p.Version},
			}
			if field != "" {
				for _, kv := range pairs {
					if kv[0] == field {
						_, _ = io.WriteString(e.Stdout, kv[1]+"\n")
						return nil
					}
				}
				return usagef("field %q is not there; use args, builtin, command, name, sha256, type or version", field)
			}
			if e.json() {
				return e.printJSON(p)
			}
			e.keyValue(pairs...)
			return nil
		},
	}
	c.Flags().StringVar(&version, "version", "", "the version to show (default: the unversioned entry)")
	c.Flags().StringVar(&field, "field", "", "print this field only")
	return c
}

func newPluginDeregister(e *Env) *cobra.Command {
	var version string
	c := &cobra.Command{
		Use: "deregister [flags] TYPE NAME", Short: "Remove a plugin from the catalog", ValidArgsFunction: completeType,
		Long: "Remove a plugin from the catalog. Mounts that run it keep running it, also after a restart.",
		RunE: func(cmd *cobra.Command, args []string) error {
			kind, name, err := typeAndName(cmd, args)
			if err != nil {
				return err
			}
			cl, err := e.client()
			if err != nil {
				return err
			}
			if err := cl.DeregisterPlugin(cmd.Context(), kind, name, version); err != nil {
				return failed("deregistering plugin named "+name, err)
			}
			e.say("Success! Deregistered plugin (if it was registered): %s", name)
			return nil
		},
	}
	c.Flags().StringVar(&version, "version", "", "the version to remove (default: the unversioned entry)")
	return c
}

func newPluginPins(e *Env) *cobra.Command {
	c := group(&cobra.Command{Use: "pins", Short: "Versions that every mount of a plugin runs from its next reload"})
	c.AddCommand(&cobra.Command{
		Use: "list", Short: "List the pins", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := e.client()
			if err != nil {
				return err
			}
			pins, err := cl.Pins(cmd.Context())
			if err != nil {
				return failed("listing pins", err)
			}
			if e.json() {
				return e.printJSON(api.Pins{PinnedVersions: pins})
			}
			t := table{head: []string{"Name", "Type", "Version"}}
			for _, p := range pins {
				t.add(p.Name, p.Type, p.Version)
			}
			t.print(e.Stdout)
			return nil
		},
	}, &cobra.Command{
		Use: "set TYPE NAME VERSION", Short: "Pin a plugin to a version", Args: cobra.ExactArgs(3), ValidArgsFunction: completeType,
		RunE: func(cmd *cobra.Command, args []string) error {
			kind, name, err := typeAndName(cmd, args[:2])
			if err != nil {
				return err
			}
			cl, err := e.client()
			if err != nil {
				return err
			}
			if err := cl.SetPin(cmd.Context(), kind, name, args[2]); err != nil {
				return failed("pinning "+name, err)
			}
			e.say("Success! Pinned %s to %s. It runs from the next reload: rollcall plugin reload -scope=global -plugin=%s",
				name, args[2], name)
			return nil
		},
	}, &cobra.Command{
		Use: "delete TYPE NAME", Short: "Remove a pin", ValidArgsFunction: completeType,
		RunE: func(cmd *cobra.Command, args []string) error {
			kind, name, err := typeAndName(cmd, args)
			if err != nil {
				return err
			}
			cl, err := e.client()
			if err != nil {
				return err
			}
			if err := cl.DeletePin(cmd.Context(), kind, name); err != nil {
				return failed("removing the pin of "+name, err)
			}
			e.say("Success! Removed the pin of %s (if there was one).", name)
			return nil
		},
	})
	return c
}

// splitAll splits the values of a repeated flag on commas.
func splitAll(values []string) []string {
	var out []string
	for _, v := range values {
		for p := range strings.SplitSeq(v, ",") {
			if p = strings.TrimSpace(p); p != "" {
				out = append(out, p)
			}
		}
	}
	return out
}

// readFile reads a file of the command line; "-" is standard input. At most 32 MiB, what a node takes.
func (e *Env) readFile(name string) ([]byte, error) {
	in := e.Stdin
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, usageErr(err)
		}
		defer func() { _ = f.Close() }()
		in = f
	}
	raw, err := io.ReadAll(io.LimitReader(in, 32<<20+1))
	if err != nil {
		return nil, usagef("reading %s: %w", name, err)
	}
	if len(raw) > 32<<20 {
		return nil, usagef("%s is larger than 32 MiB, the most that a node takes", name)
	}
	return raw, nil
}
