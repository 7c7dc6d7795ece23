package client

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"rollcall/node/api"
)

// mountVerbs are the verbs of one mount table, which differ in words only.
type mountVerbs struct {
	*Env
	table string // "secret" or "auth"
	noun  string // "secrets engine"
}

// newMounts makes `secrets` or `auth`.
func newMounts(e *Env, table string) *cobra.Command {
	v := mountVerbs{Env: e, table: table, noun: "secrets engine"}
	c := &cobra.Command{Use: "secrets", Short: "Mounts of secrets engines"}
	if table == "auth" {
		v.noun = "auth method"
		c = &cobra.Command{Use: "auth", Short: "Mounts of auth methods"}
	}
	group(c)
	c.AddCommand(v.enable(), v.disable(), v.list(), v.tune(), v.move())
	return c
}

// mountFlags are the tunable fields that enable and tune share.
type mountFlags struct {
	config        api.MountConfigInput
	description   string
	options       []string
	kvVersion     string
	forceNoCache  bool
	leaderOnly    bool
	setOptions    map[string]string
	passthrough   []string
	allowed       []string
	auditRequest  []string
	auditResponse []string
}

func (m *mountFlags) add(f *pflag.FlagSet) {
	f.StringVar(&m.description, "description", "", "text for people")
	f.StringVar(&m.config.DefaultLeaseTTL, "default-lease-ttl", "", "TTL of leases and tokens where the plugin names none")
	f.StringVar(&m.config.MaxLeaseTTL, "max-lease-ttl", "", "the longest TTL")
	f.StringVar(&m.config.PluginVersion, "plugin-version", "",
		"version of the plugin; on a running mount it takes effect with the next reload")
	f.StringVar(&m.config.ListingVisibility, "listing-visibility", "", "unauth or hidden")
	f.StringVar(&m.config.TokenType, "token-type", "", "auth methods: type of the tokens they issue")
	f.StringArrayVar(&m.passthrough, "passthrough-request-headers", nil,
		"request header that reaches the plugin; repeat or use commas")
	f.StringArrayVar(&m.allowed, "allowed-response-headers", nil,
		"response header that the plugin may set; repeat or use commas")
	f.StringArrayVar(&m.auditRequest, "audit-non-hmac-request-keys", nil,
		"request key that the audit log shows as it is; repeat or use commas")
	f.StringArrayVar(&m.auditResponse, "audit-non-hmac-response-keys", nil,
		"response key that the audit log shows as it is; repeat or use commas")
	f.StringArrayVar(&m.options, "options", nil, "KEY=VALUE for the plugin; repeat for more")
	f.StringVar(&m.kvVersion, "version", "", "short for -options=version=N, which kv understands")
	f.BoolVar(&m.forceNoCache, "force-no-cache", false, "cache nothing")
	f.StringVar(&m.config.Trial, "trial", "", "how deep a reload tries a new process: handshake, setup or initialize")
	f.StringVar(&m.config.Fencing, "fencing", "", "lease, or none: a node that lost the leader still answers")
	f.BoolVar(&m.leaderOnly, "leader-only", false, "reads run on the leader too")
	f.StringVar(&m.config.Hold, "hold", "", "how long a switch may hold requests while those in flight finish (300ms)")
}

func (m *mountFlags) finish(f *pflag.FlagSet) error {
	c := &m.config
	c.PassthroughRequestHeaders, c.AllowedResponseHeaders = splitAll(m.passthrough), splitAll(m.allowed)
	c.AuditNonHMACRequestKeys, c.AuditNonHMACResponseKeys = splitAll(m.auditRequest), splitAll(m.auditResponse)
	if f.Changed("force-no-cache") {
		c.ForceNoCache = &m.forceNoCache
	}
	if f.Changed("leader-only") {
		c.LeaderOnly = &m.leaderOnly
	}
	for _, o := range m.options {
		k, v, ok := strings.Cut(o, "=")
		if !ok || k == "" {
			return usagef("-options: %q is not KEY=VALUE", o)
		}
		if m.setOptions == nil {
			m.setOptions = map[string]string{}
		}
		m.setOptions[k] = v
	}
	if m.kvVersion != "" {
		if m.setOptions == nil {
			m.setOptions = map[string]string{}
		}
		m.setOptions["version"] = m.kvVersion
	}
	return nil
}

func (v mountVerbs) enable() *cobra.Command {
	var m mountFlags
	var path, pluginName string
	var local, sealWrap bool
	c := &cobra.Command{
		Use: "enable [flags] TYPE", Short: "Mount a plugin", Args: cobra.ExactArgs(1),
		Long: "Mount a plugin of the catalog. TYPE is the plugin's name. The answer comes when it serves.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := m.finish(cmd.Flags()); err != nil {
				return err
			}
			kind := args[0]
			if kind == "plugin" && pluginName != "" {
				kind = pluginName
			}
			at := strings.Trim(cmp.Or(path, kind), "/")
			cl, err := v.client()
			if err != nil {
				return err
			}
			in := api.MountInput{
				Type: kind, Description: m.description, Config: &m.config, Options: m.setOptions,
				Local: local, SealWrap: sealWrap,
			}
			if err := cl.Enable(cmd.Context(), v.table, at, in); err != nil {
				return failed("enabling "+v.noun, err)
			}
			if v.table == "auth" {
				v.say("Success! Enabled %s auth method at: %s/", kind, at)
			} else {
				v.say("Success! Enabled the %s secrets engine at: %s/", kind, at)
			}
			return nil
		},
	}
	f := c.Flags()
	m.add(f)
	f.StringVar(&path, "path", "", "where to mount it (default: TYPE)")
	f.StringVar(&pluginName, "plugin-name", "", "name of the plugin, where TYPE is \"plugin\"")
	f.BoolVar(&local, "local", false, "mark it as local")
	f.BoolVar(&sealWrap, "seal-wrap", false, "accepted, and kept with the mount")
	return c
}

func (v mountVerbs) disable() *cobra.Command {
	return &cobra.Command{
		Use: "disable PATH", Short: "Unmount, revoke its leases and wipe its storage", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := v.client()
			if err != nil {
				return err
			}
			at := v.path(args[0])
			if err := cl.Disable(cmd.Context(), v.table, at); err != nil {
				return failed("disabling "+v.noun+" at "+at+"/", err)
			}
			v.say("Success! Disabled the %s (if it existed) at: %s/", v.noun, at)
			return nil
		},
	}
}

// path is a mount's path as a user gave it, without the table and the slashes.
func (v mountVerbs) path(p string) string {
	p = strings.Trim(p, "/")
	if v.table == "auth" {
		p = strings.TrimPrefix(p, "auth/")
	}
	return p
}

func (v mountVerbs) list() *cobra.Command {
	var detailed bool
	c := &cobra.Command{
		Use: "list", Short: "List the mounts", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := v.client()
			if err != nil {
				return err
			}
			mounts, err := cl.Mounts(cmd.Context(), v.table)
			if err != nil {
				return failed("listing mounts", err)
			}
			if v.json() {
				return v.printJSON(mounts)
			}
			t := table{head: []string{"Path", "Type", "Accessor", "Description", "Version"}}
			if detailed {
				t.head = []string{
					"Path", "Plugin", "Accessor", "Default TTL", "Max TTL", "Options", "Description",
					"UUID", "Version", "Running Version", "Running SHA256", "Generation",
				}
			}
			for _, p := range sortedKeys(mounts) {
				m := mounts[p]
				version := cmp.Or(m.PluginVersion, "n/a")
				if !detailed {
					t.add(p, m.Type, m.Accessor, cmp.Or(m.Description, "n/a"), version)
					continue
				}
				t.add(p, m.Type, m.Accessor, ttl(m.Config.DefaultLeaseTTL), ttl(m.Config.MaxLeaseTTL), fmt.Sprint(m.Options),
					cmp.Or(m.Description, "n/a"), m.UUID, version, cmp.Or(m.RunningPluginVersion, "n/a"),
					cmp.Or(m.RunningSHA256, "n/a"), fmt.Sprint(m.Generation))
			}
			t.print(v.Stdout)
			return nil
		},
	}
	c.Flags().BoolVar(&detailed, "detailed", false, "show everything")
	return c
}

func ttl(s int64) string {
	if s == 0 {
		return "system"
	}
	return seconds(s)
}

func (v mountVerbs) tune() *cobra.Command {
	var m mountFlags
	c := &cobra.Command{
		Use: "tune [flags] PATH", Short: "Change a mount's configuration", Args: cobra.ExactArgs(1),
		Long: "Change a mount's configuration. Nothing is restarted: a new -plugin-version runs from the next reload.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := m.finish(cmd.Flags()); err != nil {
				return err
			}
			in := api.TuneInput{MountConfigInput: m.config, Options: m.setOptions}
			if cmd.Flags().Changed("description") {
				in.Description = &m.description
			}
			cl, err := v.client()
			if err != nil {
				return err
			}
			at := v.path(args[0])
			warnings, err := cl.Tune(cmd.Context(), v.table, at, in)
			if err != nil {
				return failed("tuning "+v.noun+" "+at+"/", err)
			}
			v.warn(warnings)
			v.say("Success! Tuned the %s at: %s/", v.noun, at)
			if m.config.PluginVersion != "" {
				mount := at + "/"
				if v.table == "auth" {
					mount = "auth/" + mount
				}
				v.say("It still runs what it ran: rollcall plugin reload -scope=global -mounts=%s", mount)
			}
			return nil
		},
	}
	m.add(c.Flags())
	return c
}

func (v mountVerbs) move() *cobra.Command {
	return &cobra.Command{
		Use: "move SOURCE DESTINATION", Short: "Move a mount to another path; its plugin keeps running", Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := v.client()
			if err != nil {
				return err
			}
			from, to := v.path(args[0]), v.path(args[1])
			if v.table == "auth" {
				from, to = "auth/"+from, "auth/"+to
			}
			m, err := cl.Remount(cmd.Context(), from, to)
			if err != nil {
				return failed("moving "+from+"/ to "+to+"/", err)
			}
			if err := v.awaitMove(cmd.Context(), cl, m.MigrationID); err != nil {
				return err
			}
			v.say("Success! Finished moving %s %s/ to %s/, with migration ID %s", v.noun, from, to, m.MigrationID)
			return nil
		},
	}
}

// moveWait bounds how long a move is waited for.
const moveWait = 5 * time.Minute

func (v mountVerbs) awaitMove(ctx context.Context, cl *api.Client, id string) error {
	ctx, cancel := context.WithTimeout(ctx, moveWait)
	defer cancel()
	for {
		s, err := cl.RemountStatus(ctx, id)
		if err != nil {
			return failed("reading how the move "+id+" went", err)
		}
		switch s.Info.Status {
		case "success":
			return nil
		case "failure":
			return failed("moving", fmt.Errorf("the move %s failed: the leader's log says why", id))
		}
		select {
		case <-time.After(500 * time.Millisecond):
		case <-ctx.Done():
			return failed("waiting for the move "+id, ctx.Err())
		}
	}
}
