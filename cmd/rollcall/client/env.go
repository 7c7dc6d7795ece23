// Package client is rollcall's command line for clients: every verb that talks to a cluster, through node/api only.
// Flags are accepted as users of vault and bao type them, with one dash.
package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"rollcall/node/api"
	"rollcall/node/fault"
)

// Exit codes of every verb.
const (
	ExitOK = 0
	// ExitUsage: the command line or something on this machine is wrong. Nothing was asked of the cluster.
	ExitUsage = 1
	// ExitAPI: a node refused the request, or none answered.
	ExitAPI = 2
	// ExitReload: the reload failed, was aborted or rolled back, matched nothing, or a node refused to follow.
	ExitReload = 3
	// ExitPending: the reload ended and a node is still down or unconfirmed, or it has not ended within -wait.
	ExitPending = 4
)

// Env is what a command may use of the process that it runs in. One Env serves one run.
type Env struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// Getenv reads the environment; Home is the user's home directory, "" for none.
	Getenv func(string) string
	Home   string
	// Version of this build, for `version`.
	Version string

	conn conn
}

// OSEnv is the Env of the process.
func OSEnv(version string) *Env {
	home, _ := os.UserHomeDir() // without one there is no token file
	return &Env{Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Getenv: os.Getenv, Home: home, Version: version}
}

// conn holds the flags that every client verb has.
type conn struct {
	address, namespace, caCert, clientCert, clientKey, serverName, timeout, format string
	skipVerify                                                                     bool
}

// connFlags are the names of the flags of conn.
func (e *Env) connFlags(f *pflag.FlagSet) {
	c := &e.conn
	f.StringVar(&c.address, "address", "",
		"URL of a node, or several with commas (ROLLCALL_ADDR, BAO_ADDR, VAULT_ADDR; default "+api.DefaultAddress+")")
	f.StringVar(&c.namespace, "namespace", "", "namespace to work in (ROLLCALL_NAMESPACE, ...)")
	f.StringVar(&c.caCert, "ca-cert", "", "file of PEM certificates that sign the nodes' (ROLLCALL_CACERT, ...)")
	f.StringVar(&c.clientCert, "client-cert", "", "file of this client's certificate (ROLLCALL_CLIENT_CERT, ...)")
	f.StringVar(&c.clientKey, "client-key", "", "file of its key (ROLLCALL_CLIENT_KEY, ...)")
	f.StringVar(&c.serverName, "tls-server-name", "", "name to expect in the node's certificate (ROLLCALL_TLS_SERVER_NAME, ...)")
	f.BoolVar(&c.skipVerify, "tls-skip-verify", false, "accept any certificate (ROLLCALL_SKIP_VERIFY, ...)")
	f.StringVar(&c.timeout, "client-timeout", "", "limit of one call (ROLLCALL_CLIENT_TIMEOUT, ...; default 60s)")
	f.StringVar(&c.format, "format", "", "table or json (ROLLCALL_FORMAT, ...)")
}

// config is what flags and environment say together.
func (e *Env) config() (api.Config, error) {
	cfg, err := api.FromEnv(e.Getenv, e.Home)
	if err != nil {
		return cfg, usageErr(err)
	}
	c := &e.conn
	if c.address != "" {
		cfg.Addresses = api.SplitAddresses(c.address)
	}
	for _, o := range []struct {
		flag string
		to   *string
	}{
		{c.namespace, &cfg.Namespace},
		{c.caCert, &cfg.CACert},
		{c.clientCert, &cfg.ClientCert},
		{c.clientKey, &cfg.ClientKey},
		{c.serverName, &cfg.ServerName},
	} {
		if o.flag != "" {
			*o.to = o.flag
		}
	}
	cfg.SkipVerify = cfg.SkipVerify || c.skipVerify
	if c.timeout != "" {
		if cfg.Timeout, err = api.ParseTimeout(c.timeout); err != nil {
			return cfg, usagef("-client-timeout: %q is not a duration such as 30s", c.timeout)
		}
	}
	return cfg, nil
}

// client makes the API client and checks -format.
func (e *Env) client() (*api.Client, error) {
	if _, err := e.format(); err != nil {
		return nil, err
	}
	cfg, err := e.config()
	if err != nil {
		return nil, err
	}
	c, err := api.New(cfg)
	if err != nil {
		return nil, usageErr(err)
	}
	return c, nil
}

func (e *Env) format() (string, error) {
	f := e.conn.format
	if f == "" {
		f, _ = api.Getenv(e.Getenv, "FORMAT")
	}
	switch f {
	case "", "table":
		return "table", nil
	case "json":
		return f, nil
	default:
		return "", usagef("-format: %q is not known; use table or json", f)
	}
}

// json reports whether the answer is wanted as JSON. Call it after client, which checks the flag.
func (e *Env) json() bool {
	f, err := e.format()
	return err == nil && f == "json"
}

// exitError is an error with its exit code.
type exitError struct {
	code int
	err  error
	// quiet: everything was said already.
	quiet bool
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error {
	return &exitError{code: ExitUsage, err: fmt.Errorf(format, args...)}
}

func usageErr(err error) error { return &exitError{code: ExitUsage, err: err} }

// failed is an error of a call: doing says what was under way ("registering plugin kv").
func failed(doing string, err error) error {
	return &exitError{code: ExitAPI, err: fmt.Errorf("%s: %w", doing, err)}
}

// quit ends a command that has said everything.
func quit(code int) error {
	return &exitError{code: code, err: fmt.Errorf("exit %d", code), quiet: true}
}

// NewRoot makes the root command without any verb.
func NewRoot(e *Env) *cobra.Command {
	root := &cobra.Command{
		Use:   "rollcall",
		Short: "Upgrade plugins on every node of a cluster, and have every node answer for itself",
		Long: `A cluster of nodes that run the plugins of Vault and OpenBao, and one call that upgrades a plugin on all of them.

Flags may be typed with one dash or two, before or after arguments: -scope=global, --scope global.`,
		SilenceUsage: true, SilenceErrors: true,
	}
	root.SetIn(e.Stdin)
	root.SetOut(e.Stdout)
	root.SetErr(e.Stderr)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usagef("%s (see `%s -help`)", oneDash(err.Error()), cmd.CommandPath())
	})
	root.SetGlobalNormalizationFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		return pflag.NormalizedName(strings.ReplaceAll(name, "_", "-"))
	})
	group(root)
	return root
}

// Commands makes every client verb.
func Commands(e *Env) []*cobra.Command {
	cmds := []*cobra.Command{
		newPlugin(e), newReloads(e), newMounts(e, "secret"), newMounts(e, "auth"), newRead(e), newWrite(e), newList(e),
		newDelete(e), newOperator(e), newStatus(e), newHealthcheck(e), newEvents(e),
	}
	formats := cobra.FixedCompletions([]string{"table", "json"}, cobra.ShellCompDirectiveNoFileComp)
	for _, c := range cmds {
		e.connFlags(c.PersistentFlags())
		_ = c.RegisterFlagCompletionFunc("format", formats)
	}
	return append(cmds, newVersion(e))
}

// group makes a command that only holds others: without one of them it shows its help and exits 1.
func group(c *cobra.Command) *cobra.Command {
	c.Args = cobra.ArbitraryArgs
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			_ = cmd.Help()
			return quit(ExitUsage)
		}
		text := fmt.Sprintf("unknown command %q for %q", args[0], cmd.CommandPath())
		if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
			text += fmt.Sprintf(": did you mean %q?", near[0])
		} else {
			text += fmt.Sprintf(" (see `%s -help`)", cmd.CommandPath())
		}
		return usagef("%s", text)
	}
	c.SuggestionsMinimumDistance = 2
	return c
}

// Execute runs the command line (without the program's name) and returns the exit code. Errors are printed with what
// to do next.
func Execute(ctx context.Context, root *cobra.Command, e *Env, args []string) int {
	root.SetArgs(Normalize(root, args))
	err := root.ExecuteContext(ctx)
	if err == nil {
		return ExitOK
	}
	var exit *exitError
	if !errors.As(err, &exit) { // cobra's own: arguments
		exit = &exitError{code: ExitUsage, err: err}
	}
	if !exit.quiet {
		_, _ = fmt.Fprintf(e.Stderr, "Error: %s\n", oneDash(err.Error()))
		if hint := e.hint(exit); hint != "" {
			_, _ = fmt.Fprintf(e.Stderr, "\n%s\n", hint)
		}
	}
	return exit.code
}

// hint says what to do about an error, where its text does not.
func (e *Env) hint(exit *exitError) string {
	if exit.code != ExitAPI {
		return ""
	}
	token := ""
	if cfg, err := e.config(); err == nil {
		token = cfg.Token
	}
	switch fault.KindOf(exit.err) {
	case fault.Denied:
		if token == "" {
			return "No token was sent: set ROLLCALL_TOKEN (or BAO_TOKEN, VAULT_TOKEN), or log in so that ~/.vault-token exists."
		}
		return "The token is not valid here or its policies do not allow this; " +
			"`rollcall read auth/token/lookup-self` shows what it may do."
	case fault.OutcomeUnknown, fault.Deadline, fault.Canceled:
		return "It is not known whether this took effect: look before you repeat it."
	case fault.Unavailable:
		fe, ok := errors.AsType[*fault.Error](exit.err)
		if !ok || fe.Code == 0 {
			return ""
		}
		return "Nothing was changed: try again, or ask another node with -address. `rollcall status` shows whether there is a leader."
	case fault.Exhausted:
		return "Nothing was changed: the node is at a limit; try again later."
	case fault.Internal:
		return "That is a fault of the node: its log says more."
	default:
		return ""
	}
}

// terminal reports whether w is one that can repaint, and its size.
func terminal(w io.Writer, getenv func(string) string) (width, height int, ok bool) {
	f, isFile := w.(*os.File)
	if !isFile || !term.IsTerminal(int(f.Fd())) || getenv("TERM") == "dumb" {
		return 0, 0, false
	}
	width, height, err := term.GetSize(int(f.Fd()))
	return width, height, err == nil && width > 20 && height > 4
}

// colored reports whether w may be written to in color.
func colored(w io.Writer, getenv func(string) string) bool {
	_, _, ok := terminal(w, getenv)
	return ok && getenv("NO_COLOR") == ""
}
