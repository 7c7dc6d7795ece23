package client

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"rollcall/node/api"
)

func newOperator(e *Env) *cobra.Command {
	c := group(&cobra.Command{Use: "operator", Short: "The cluster: members, leadership, snapshots"})
	c.AddCommand(newMembers(e), newRaft(e),
		e.simple("step-down", "Hand leadership to another node", "stepping down",
			"Success! Stepped down: another node leads now, or will shortly.",
			func(cmd *cobra.Command, cl *api.Client) error { return cl.StepDown(cmd.Context()) }),
		e.simple("leave", "Take the asked node out of the cluster and stop it", "leaving",
			"Success! The node leaves the cluster and stops.",
			func(cmd *cobra.Command, cl *api.Client) error { return cl.Leave(cmd.Context()) }),
		e.simple("rotate", "Have every node seal its disk with a new data key", "rotating the data keys",
			"Success! A new term of data keys has begun; rollcall operator key-status tells how a node follows.",
			func(cmd *cobra.Command, cl *api.Client) error { return cl.RotateKeys(cmd.Context()) }),
		newKeyStatus(e))
	return c
}

// simple is a command without arguments that asks one thing of one node.
func (e *Env) simple(use, short, doing, done string, call func(*cobra.Command, *api.Client) error) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := e.client()
			if err != nil {
				return err
			}
			if err := call(cmd, cl); err != nil {
				return failed(doing, err)
			}
			e.say("%s", done)
			return nil
		},
	}
}

func newKeyStatus(e *Env) *cobra.Command {
	return &cobra.Command{
		Use: "key-status", Short: "Show the term of data keys, and how the asked node follows", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := e.client()
			if err != nil {
				return err
			}
			st, err := cl.KeyStatus(cmd.Context())
			if err != nil {
				return failed("asking for the data keys", err)
			}
			if e.json() {
				return e.printJSON(st)
			}
			e.keyValue([][2]string{
				{"Key Term", fmt.Sprint(st.Term)},
				{"Install Time", st.InstallTime},
				{"Encryption Count", fmt.Sprint(st.Encryptions)},
				{"Node", st.Node},
				{"Node Key Term", fmt.Sprint(st.NodeTerm)},
				{"Node Data Keys", fmt.Sprint(st.NodeKeys)},
				{"Seal Type", st.SealType},
				{"Seal Key", st.SealKey},
			}...)
			return nil
		},
	}
}

func newMembers(e *Env) *cobra.Command {
	return &cobra.Command{
		Use: "members", Short: "List the nodes as the state, Raft and gossip see them", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := e.client()
			if err != nil {
				return err
			}
			members, err := cl.Members(cmd.Context())
			if err != nil {
				return failed("listing members", err)
			}
			if e.json() {
				return e.printJSON(api.Members{Members: members})
			}
			t := table{head: []string{"Name", "ID", "API Address", "Cluster Address", "Role", "Gossip", "Version", "Notes"}}
			for i := range members {
				m := &members[i]
				role := orDash(m.Suffrage)
				if m.Leader {
					role = "leader"
				}
				var notes []string
				if m.Self {
					notes = append(notes, "answered this")
				}
				if m.Fenced {
					notes = append(notes, "fenced")
				}
				if m.Left {
					notes = append(notes, "left")
				}
				t.add(m.Name, m.ID, orDash(m.APIAddress), orDash(m.ClusterAddress), role,
					orDash(m.Gossip), orDash(m.Version), strings.Join(notes, ", "))
			}
			t.print(e.Stdout)
			return nil
		},
	}
}

func newRaft(e *Env) *cobra.Command {
	c := group(&cobra.Command{Use: "raft", Short: "Raft's members and snapshots"})
	snapshot := group(&cobra.Command{Use: "snapshot", Short: "Save and restore the cluster's state"})
	snapshot.AddCommand(newSnapshotSave(e), newSnapshotRestore(e))
	autopilot := group(&cobra.Command{Use: "autopilot", Short: "What autopilot thinks of the servers"})
	autopilot.AddCommand(newAutopilotState(e))
	c.AddCommand(newListPeers(e), newRemovePeer(e), newJoin(e), snapshot, autopilot)
	return c
}

func newListPeers(e *Env) *cobra.Command {
	return &cobra.Command{
		Use: "list-peers", Short: "List the members as Raft has them", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := e.client()
			if err != nil {
				return err
			}
			cfg, err := cl.RaftConfiguration(cmd.Context())
			if err != nil {
				return failed("reading the raft configuration", err)
			}
			if e.json() {
				return e.printJSON(api.RaftConfiguration{Config: *cfg})
			}
			t := table{head: []string{"Node", "Address", "State", "Voter", "Name"}}
			for _, s := range cfg.Servers {
				state := "follower"
				if s.Leader {
					state = "leader"
				}
				t.add(s.NodeID, s.Address, state, strconv.FormatBool(s.Voter), s.Name)
			}
			t.print(e.Stdout)
			return nil
		},
	}
}

func newRemovePeer(e *Env) *cobra.Command {
	return &cobra.Command{
		Use: "remove-peer SERVER_ID", Short: "Take a node, by id or name, out of the cluster for good", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := e.client()
			if err != nil {
				return err
			}
			if err := cl.RemovePeer(cmd.Context(), args[0]); err != nil {
				return failed("removing "+args[0], err)
			}
			e.say("Success! Removed %s from the cluster. To return, it needs an empty data directory.", args[0])
			return nil
		},
	}
}

func newJoin(e *Env) *cobra.Command {
	var in api.RaftJoin
	var ca, cert, key string
	c := &cobra.Command{
		Use: "join [flags] LEADER_API_ADDRESS", Short: "Have the asked node join a cluster", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			in.LeaderAPIAddr = args[0]
			for _, f := range []struct {
				from string
				to   *string
			}{{ca, &in.LeaderCACert}, {cert, &in.LeaderClientCert}, {key, &in.LeaderClientKey}} {
				name, isFile := strings.CutPrefix(f.from, "@")
				if !isFile {
					*f.to = f.from
					continue
				}
				raw, err := e.readFile(name)
				if err != nil {
					return err
				}
				*f.to = string(raw)
			}
			cl, err := e.client()
			if err != nil {
				return err
			}
			joined, err := cl.Join(cmd.Context(), in)
			if err != nil {
				return failed("joining the cluster of "+args[0], err)
			}
			if e.json() {
				return e.printJSON(api.RaftJoined{Joined: joined})
			}
			e.keyValue([2]string{"Joined", strconv.FormatBool(joined)})
			if !joined {
				return quit(ExitAPI)
			}
			return nil
		},
	}
	f := c.Flags()
	f.StringVar(&ca, "leader-ca-cert", "", "PEM, or @FILE: who signs the leader's certificate")
	f.StringVar(&cert, "leader-client-cert", "", "PEM, or @FILE: certificate to show to the leader")
	f.StringVar(&key, "leader-client-key", "", "PEM, or @FILE: its key")
	f.BoolVar(&in.Retry, "retry", false, "keep trying")
	f.BoolVar(&in.NonVoter, "non-voter", false, "join without a vote")
	return c
}

func newSnapshotSave(e *Env) *cobra.Command {
	return &cobra.Command{
		Use: "save FILE", Short: "Write the cluster's state to a file", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := e.client()
			if err != nil {
				return err
			}
			// Beside the file and renamed at the end: a snapshot that is there is whole. It holds secrets: 0600.
			tmp, err := os.CreateTemp(filepath.Dir(args[0]), ".rollcall-snapshot-*")
			if err != nil {
				return usageErr(err)
			}
			defer func() { _ = os.Remove(tmp.Name()) }() // gone already when all went well
			n, err := cl.SnapshotSave(cmd.Context(), tmp)
			if err != nil {
				_ = tmp.Close()
				return failed("saving a snapshot", err)
			}
			for _, step := range []func() error{tmp.Sync, tmp.Close, func() error { return os.Rename(tmp.Name(), args[0]) }} {
				if err := step(); err != nil {
					return usagef("writing %s: %w", args[0], err)
				}
			}
			e.say("Success! Saved a snapshot of %d bytes to: %s", n, args[0])
			return nil
		},
	}
}

func newSnapshotRestore(e *Env) *cobra.Command {
	var force bool
	c := &cobra.Command{
		Use: "restore [flags] FILE", Short: "Replace the cluster's state with a snapshot", Args: cobra.ExactArgs(1),
		Long: "Replace the whole state of the cluster with a snapshot: what was written since is gone. It wants -force.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if !force {
				return usagef("this replaces everything in the cluster with what is in %s: say -force if that is wanted", args[0])
			}
			f, err := os.Open(args[0])
			if err != nil {
				return usageErr(err)
			}
			defer func() { _ = f.Close() }()
			cl, err := e.client()
			if err != nil {
				return err
			}
			if err := cl.SnapshotRestore(cmd.Context(), f); err != nil {
				return failed("restoring "+args[0], err)
			}
			e.say("Success! Restored the snapshot from: %s", args[0])
			return nil
		},
	}
	c.Flags().BoolVarP(&force, "force", "f", false, "yes, replace everything")
	return c
}

func newAutopilotState(e *Env) *cobra.Command {
	return &cobra.Command{
		Use: "state", Short: "Show autopilot's view of the cluster's health", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := e.client()
			if err != nil {
				return err
			}
			s, err := cl.AutopilotState(cmd.Context())
			if err != nil {
				return failed("reading autopilot's state", err)
			}
			if e.json() {
				return e.printJSON(s)
			}
			e.keyValue([2]string{"Healthy", strconv.FormatBool(s.Healthy)},
				[2]string{"Failure Tolerance", strconv.Itoa(s.FailureTolerance)}, [2]string{"Leader", s.Leader},
				[2]string{"Voters", strings.Join(s.Voters, ", ")})
			t := table{head: []string{"Server", "Name", "Address", "Status", "Healthy", "Last Contact", "Last Index"}}
			for _, id := range sortedKeys(s.Servers) {
				v := s.Servers[id]
				t.add(id, v.Name, v.Address, v.Status, strconv.FormatBool(v.Healthy), orDash(v.LastContact), fmt.Sprint(v.LastIndex))
			}
			e.say("")
			t.print(e.Stdout)
			return nil
		},
	}
}
