package main

import (
	"errors"

	"github.com/spf13/cobra"

	"rollcall/cmd/rollcall/client"
	"rollcall/cmd/rollcall/tlscmd"
)

func newTLS(e *client.Env) *cobra.Command {
	cmd := &cobra.Command{Use: "tls", Short: "Make the certificates and keys of a cluster"}
	cmd.AddCommand(newTLSCA(e), newTLSCert(e), newTLSAll(e), newTLSSealKey(e))
	return cmd
}

func newTLSCA(e *client.Env) *cobra.Command {
	var o tlscmd.CAOptions
	cmd := &cobra.Command{
		Use: "ca", Short: "Make the cluster's certificate authority and gossip key", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return tlscmd.CA(e.Stdout, o) },
	}
	f := cmd.Flags()
	f.StringVar(&o.Dir, "dir", ".", "directory to write to")
	f.DurationVar(&o.TTL, "ttl", 0, "lifetime (default ten years)")
	f.BoolVar(&o.Force, "force", false, "replace what is there: every certificate of the old authority is refused from then on")
	f.BoolVar(&o.Rotate, "rotate", false, "first step of a rotation: a new authority, with the old one still trusted")
	f.BoolVar(&o.Retire, "retire", false, "last step of a rotation: trust the current authority alone")
	return cmd
}

func newTLSCert(e *client.Env) *cobra.Command {
	var o tlscmd.CertOptions
	cmd := &cobra.Command{
		Use: "cert -name NODE", Short: "Make a node's certificate", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return tlscmd.Cert(e.Stdout, o) },
	}
	certFlags(cmd, &o)
	return cmd
}

func certFlags(cmd *cobra.Command, o *tlscmd.CertOptions) {
	f := cmd.Flags()
	f.StringVar(&o.Dir, "dir", ".", "directory with ca.pem and ca-key.pem; the certificate goes there too")
	f.StringVar(&o.Name, "name", "", "name of the node, as in its configuration")
	f.StringSliceVar(&o.Hosts, "host", nil, "host names and addresses under which clients reach the node's API (repeat, or separate by commas)")
	f.DurationVar(&o.TTL, "ttl", 0, "lifetime (default one year)")
	f.StringVar(&o.Role, "role", "node", "node, or client for a program that is no member")
	f.BoolVar(&o.Force, "force", false, "replace what is there")
}

func newTLSSealKey(e *client.Env) *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use: "seal-key", Short: "Make the key that nodes seal their disks with", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return tlscmd.SealKey(e.Stdout, dir) },
	}
	cmd.Flags().StringVar(&dir, "dir", ".", "directory to write to")
	return cmd
}

// newTLSAll makes everything a cluster needs in one go, and nothing that is there already: what compose runs at every
// start.
func newTLSAll(e *client.Env) *cobra.Command {
	var o tlscmd.AllOptions
	cmd := &cobra.Command{
		Use: "all -nodes node-1,node-2,node-3", Args: cobra.NoArgs,
		Short: "Make authority, gossip key, seal key, first token and every node's certificate, where they are missing",
		RunE: func(*cobra.Command, []string) error {
			if len(o.Nodes) == 0 {
				return client.Exit(client.ExitUsage, errors.New("-nodes names no node"))
			}
			return tlscmd.All(e.Stdout, o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Dir, "dir", ".", "directory to write to")
	f.StringSliceVar(&o.Nodes, "nodes", nil, "names of the nodes")
	f.StringSliceVar(&o.Hosts, "host", nil, "further host names and addresses for every certificate")
	f.StringVar(&o.Token, "token", "", "the first token (default: a random one)")
	f.BoolVar(&o.ShowToken, "show-token", false, "print the first token")
	return cmd
}
