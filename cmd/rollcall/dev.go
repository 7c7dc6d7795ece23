package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"rollcall/cmd/rollcall/client"
	"rollcall/node"
)

func newDev(e *client.Env) *cobra.Command {
	d := &dev{env: e}
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Run three nodes in this process and stay, for trying things out",
		Long: `Start three nodes in this process, on loopback, with certificates that live in memory and a token of your choice,
and a demo plugin mounted at demo/. Put plugin binaries into the plugin directory that is printed, register them, and
reload. Without -dir nothing is kept. Never use it for anything but trying things out: nothing is synced to disk.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return d.run(cmd.Context()) },
	}
	f := cmd.Flags()
	f.IntVar(&d.nodes, "nodes", 3, "how many nodes (1 to 7)")
	f.IntVar(&d.port, "port", 8200, "port of node-1's API; the others take the next tens (8210, 8220); 0 takes free ones")
	f.StringVar(&d.token, "token", "root", "the token")
	f.StringVar(&d.dir, "dir", "", "keep data and plugins here, and go on from it the next time")
	f.BoolVar(&d.verbose, "verbose", false, "show the nodes' logs")
	return cmd
}

type dev struct {
	env        *client.Env
	nodes      int
	port       int
	token, dir string
	verbose    bool
}

func (d *dev) run(ctx context.Context) error {
	switch {
	case d.nodes < 1 || d.nodes > 7:
		return errors.New("-nodes must be between 1 and 7")
	case d.port < 0 || d.port > 65000:
		return errors.New("-port must be between 0 and 65000")
	case d.token == "":
		return errors.New("-token must not be empty")
	}
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	dir := d.dir
	if dir != "" {
		var err error
		if dir, err = filepath.Abs(dir); err != nil {
			return err
		}
	}
	starting, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	s, err := startSandbox(starting, node.LocalOptions{
		Nodes: d.nodes, Dir: dir, Token: d.token, HTTPListen: d.listen,
		Logger: quiet(d.verbose, slog.New(slog.NewTextHandler(d.env.Stderr, nil))),
	}, nil)
	if err != nil {
		return err
	}
	d.welcome(s)
	<-ctx.Done()
	_, _ = fmt.Fprintln(d.env.Stdout, "\nstopping ...")
	return s.close()
}

func (d *dev) listen(i int) string {
	if d.port == 0 {
		return "127.0.0.1:0"
	}
	return fmt.Sprintf("127.0.0.1:%d", d.port+10*i)
}

func (d *dev) welcome(s *sandbox) {
	var b strings.Builder
	b.WriteString("rollcall dev: ")
	fmt.Fprintf(&b, "%d nodes in this process. Nothing here is safe to keep.\n\n", d.nodes)
	for _, n := range s.Nodes() {
		role := ""
		if n == s.Leader() {
			role = "  (leads)"
		}
		fmt.Fprintf(&b, "  %-8s %s%s\n", n.Name(), n.APIAddress(), role)
	}
	fmt.Fprintf(&b, "\n  token    %s\n  plugins  %s   (put binaries here)\n\n", s.Token, s.plugins)
	fmt.Fprintf(&b, `Try, in another terminal:

  export ROLLCALL_ADDR=%s ROLLCALL_TOKEN=%s
  rollcall write demo/data/greeting value=hello
  rollcall read demo/data/greeting
  rollcall plugin versions
  rollcall plugin reload -plugin=demo -scope=global -version=%s
  rollcall operator members

The vault and bao commands work too, with VAULT_ADDR or BAO_ADDR. Ctrl-C stops everything.
`, strings.Join(s.Addresses(), ","), s.Token, demoTo)
	_, _ = fmt.Fprint(d.env.Stdout, b.String())
}
