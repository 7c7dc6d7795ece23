// rollcall is one binary: the server of a cluster node, and every command that talks to one.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"rollcall/cmd/rollcall/client"
	"rollcall/node"
	"rollcall/proto/plugin/demoplugin"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == demoArg { // started by a node, as the demo's plugin
		os.Exit(demoplugin.Main(os.Args[2:], os.Stderr))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	env := client.OSEnv(node.Version)
	code := client.Execute(ctx, newRoot(env), env, os.Args[1:])
	stop()
	os.Exit(code)
}

// newRoot is the whole command line. Each verb is a constructor that takes what it needs of the process.
func newRoot(env *client.Env) *cobra.Command {
	root := client.NewRoot(env)
	root.AddCommand(newServer(env), newDev(env), newDemo(env), newTLS(env))
	root.AddCommand(client.Commands(env)...)
	return root
}
