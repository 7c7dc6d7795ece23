// rollcall is one binary: the server of a cluster node, and every command that talks to one.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"rollcall/cmd/rollcall/client"
)

// version of this build, a semantic version without "v"; release builds set it with -ldflags "-X main.version=...".
var version = "0.1.0-dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	env := client.OSEnv(version)
	code := client.Execute(ctx, newRoot(env), env, os.Args[1:])
	stop()
	os.Exit(code)
}

// newRoot is the whole command line. Each verb is a constructor that takes what it needs of the process.
func newRoot(env *client.Env) *cobra.Command {
	root := client.NewRoot(env)
	root.AddCommand(client.Commands(env)...)
	return root
}
