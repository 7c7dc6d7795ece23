package router

import (
	"time"

	"rollcall/node/supervisor"
	commandv1 "rollcall/proto/command/v1"
)

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
