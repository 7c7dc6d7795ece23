package client

import (
	"fmt"
	"net/url"
	"runtime"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"rollcall/node/api"
	"rollcall/node/fault"
)

func newStatus(e *Env) *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show the asked node: seal, leader, lease", Args: cobra.NoArgs,
		Long: "Show the asked node. Exit codes: 0 it serves; 1 wrong usage; 2 it does not serve, or does not answer.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := e.client()
			if err != nil {
				return err
			}
			s, err := cl.SealStatus(cmd.Context())
			if err != nil {
				return failed("checking the status", err)
			}
			h, err := cl.Health(cmd.Context())
			if err != nil {
				return failed("checking the health", err)
			}
			l, err := cl.Leader(cmd.Context())
			if err != nil {
				return failed("asking who leads", err)
			}
			if e.json() {
				err = e.printJSON(struct {
					*api.SealStatus
					*api.Leader
					Health *api.Health `json:"health"`
				}{s, l, h})
			} else {
				e.printStatusTable(s, h, l)
			}
			if err == nil && (s.Sealed || !s.Initialized || h.Fenced) {
				return quit(ExitAPI)
			}
			return err
		},
	}
}

func (e *Env) printStatusTable(s *api.SealStatus, h *api.Health, l *api.Leader) {
	mode := "standby"
	if l.IsSelf {
		mode = "active"
	}
	leader := l.LeaderAddress
	if leader == "" {
		leader = "<none>"
	}
	lease := "yes"
	if h.Fenced {
		lease = "no: " + api.Cell(h.FencedBecause)
	}
	pairs := [][2]string{
		{"Seal Type", s.Type},
		{"Initialized", strconv.FormatBool(s.Initialized)},
		{"Sealed", strconv.FormatBool(s.Sealed)},
		{"Version", s.Version},
		{"Storage Type", s.StorageType},
		{"Cluster Name", s.ClusterName},
		{"Cluster ID", s.ClusterID},
		{"HA Enabled", strconv.FormatBool(l.HAEnabled)},
		{"HA Mode", mode},
		{"Active Node Address", leader},
		{"Serving", lease},
	}
	if h.Node != "" {
		pairs = append([][2]string{{"Node", h.Node}}, pairs...)
	}
	if l.RaftAppliedIndex > 0 {
		pairs = append(pairs, [2]string{"Raft Committed Index", fmt.Sprint(l.RaftCommittedIndex)},
			[2]string{"Raft Applied Index", fmt.Sprint(l.RaftAppliedIndex)})
	}
	e.keyValue(pairs...)
}

func newHealthcheck(e *Env) *cobra.Command {
	return &cobra.Command{
		Use: "healthcheck", Short: "Exit 0 when the asked node serves, 1 with the reason when not", Args: cobra.NoArgs,
		Long: `Ask one node whether it serves plugin requests: exit 0 when it does, 1 with the reason when not. A node that has lost
the leader for longer than its lease is fenced and not healthy. For container health checks and load balancers.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := e.config()
			if err != nil {
				return err
			}
			if len(cfg.Addresses) > 1 { // the health of one node, not of whichever answers
				cfg.Addresses = cfg.Addresses[:1]
			}
			cl, err := api.New(cfg)
			if err != nil {
				return usageErr(err)
			}
			h, err := cl.Health(cmd.Context())
			if err != nil {
				return usagef("unhealthy: %w", err)
			}
			name := or(h.Node, cl.Address())
			switch {
			case !h.Initialized:
				return usagef("unhealthy: %s has not joined or formed a cluster yet", name)
			case h.Sealed:
				return usagef("unhealthy: %s is sealed", name)
			case h.Fenced:
				return usagef("unhealthy: %s is fenced%s", name, paren(h.FencedBecause))
			}
			role := "leader"
			if h.Standby {
				role = "standby"
			}
			if e.json() {
				return e.printJSON(h)
			}
			e.say("healthy: %s (%s)", name, role)
			return nil
		},
	}
}

func newVersion(e *Env) *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version of this program", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			e.say("rollcall %s (%s, %s/%s)", or(e.Version, "unversioned"), runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return nil
		},
	}
}

func newEvents(e *Env) *cobra.Command {
	var since, reload string
	c := &cobra.Command{
		Use: "events", Short: "Print what happens in the cluster, as it happens", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := e.client()
			if err != nil {
				return err
			}
			cl.LearnPeers(cmd.Context())
			filter := url.Values{}
			if reload != "" {
				filter.Set("reload_id", reload)
			}
			err = cl.Events(cmd.Context(), since, filter, func(ev api.Event) error {
				if e.json() {
					return e.printJSON(ev)
				}
				parts := []string{or(ev.Time, "-"), ev.Type}
				for _, p := range []string{ev.Node, ev.ReloadID, ev.Mount, ev.Text} {
					if p != "" {
						parts = append(parts, api.Cell(p))
					}
				}
				e.say("%s", strings.Join(parts, "  "))
				return nil
			})
			if fault.Is(err, fault.Canceled) { // Ctrl-C is how this ends
				return nil
			}
			return failed("following events", err)
		},
	}
	c.Flags().StringVar(&since, "since", "", "id of the last event that was seen")
	c.Flags().StringVar(&reload, "reload-id", "", "events of this reload only")
	return c
}
