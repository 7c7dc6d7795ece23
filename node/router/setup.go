package router

import (
	"context"
	"fmt"
	"maps"
	"time"

	"rollcall/node/fault"
	"rollcall/node/supervisor"
	commandv1 "rollcall/proto/command/v1"
)

// setUp runs Setup, the check of the type, and Initialize. The op of its error names which of them refused.
func (r *Router) setUp(ctx context.Context, m *commandv1.Mount, in *instance, initialize bool) error {
	name := fmt.Sprintf("%s (%s)", m.GetPath(), m.GetType())
	refuse := func(phase string, err error) error {
		kind := fault.Refused
		if ctx.Err() != nil && fault.KindOf(context.Cause(ctx)) == fault.Canceled {
			kind = fault.Canceled
		}
		return fault.As(kind, err, phase, name)
	}
	err := in.backend.Setup(ctx, r.setupOf(m, in))
	if err != nil {
		return refuse("setup", err)
	}
	kind, err := in.backend.Type(ctx)
	if err == nil {
		err = checkType(m, kind)
	}
	if err != nil {
		return refuse("type", err)
	}
	if !initialize {
		return nil
	}
	err = in.backend.Initialize(ctx)
	if err != nil && (in.leader || !supervisor.IsReadOnlyText(err.Error())) {
		return refuse("initialize", err)
	}
	paths, err := in.backend.SpecialPaths(ctx)
	if err != nil {
		return refuse("initialize", err)
	}
	in.paths = newSpecialPaths(paths)
	return nil
}

// setupOf is what a backend is told: the mount's options and what it runs as (CONTRACT 7.3).
func (r *Router) setupOf(m *commandv1.Mount, in *instance) supervisor.Setup {
	spec := in.wanted.Load().GetSpec()
	config := make(map[string]string, len(m.GetOptions())+3)
	maps.Copy(config, m.GetOptions())
	config["plugin_name"], config["plugin_version"] = spec.GetName(), spec.GetVersion()
	config["plugin_type"] = spec.GetType()
	return supervisor.Setup{
		BackendUUID: m.GetUuid(), Config: config, Storage: in.store,
		System: r.system(m, in.leader),
	}
}

// checkType compares what the plugin says it is with the table it is mounted in.
func checkType(m *commandv1.Mount, got string) error {
	if got == m.GetTable() {
		return nil
	}
	words := map[string]string{supervisor.TypeSecret: "a secrets engine", supervisor.TypeAuth: "an auth method"}
	return fault.Text(fault.Refused, "unknown backend type: the plugin %q is %s, and %s is mounted as %s",
		m.GetType(), words[got], m.GetPath(), words[m.GetTable()])
}

// storeFor makes the storage of an instance that is about to be set up for a role.
func (r *Router) storeFor(rt *route, role Role) *store {
	p := following
	if role.Leader {
		p = collecting
	}
	st := newStore(rt.uuid, p, r.cfg.State.View)
	st.write = r.proposeWrite
	st.lost = func(s *store) {
		if in := rt.run.Load(); in != nil && in.store == s {
			rt.repair(repair{in: in, what: resetup})
		}
	}
	return st
}

func (r *Router) proposeWrite(ctx context.Context, term uint64, w *commandv1.WriteStorage) (*commandv1.Result, error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, writeLimit)
		defer cancel()
	}
	return r.cfg.Replica.ProposeAsLeader(ctx, term,
		&commandv1.Command{Body: &commandv1.Command_WriteStorage{WriteStorage: w}})
}

// system is what a plugin may know of its surroundings, for one mount and one role. A follower is always told that it is
// a standby: told otherwise, plugins write, and fail even their reads (PLUGINHOST section 2).
func (r *Router) system(m *commandv1.Mount, leader bool) supervisor.System {
	uuid, v := m.GetUuid(), r.cfg.State.View()
	state := supervisor.ReplicationStandby
	if leader {
		state = supervisor.ReplicationActive
	}
	return supervisor.System{
		ReplicationState: state, LocalMount: m.GetLocal(), ClusterID: v.ClusterID(), ClusterName: v.ClusterName(),
		LeaseTTLs: func() (def, longest time.Duration) {
			if now := r.cfg.State.View().Mount(uuid); now != nil {
				return r.leaseTTLs(now.GetConfig())
			}
			return r.leaseTTLs(m.GetConfig())
		},
		Tainted: func() bool { return r.cfg.State.View().Mount(uuid) == nil },
	}
}

func (r *Router) leaseTTLs(c *commandv1.MountConfig) (def, longest time.Duration) {
	longest = r.cfg.MaxLeaseTTL
	if s := c.GetMaxLeaseTtlS(); s > 0 {
		longest = time.Duration(s) * time.Second
	}
	def = r.cfg.DefaultLeaseTTL
	if s := c.GetDefaultLeaseTtlS(); s > 0 {
		def = time.Duration(s) * time.Second
	}
	return min(def, longest), longest
}
