package router

// replicationStandby and replicationNone are bits of the SDKs' consts.ReplicationState: a performance standby, whose
// storage is read-only, and a node without any replication.
const (
	replicationStandby = 1 << 14
	replicationNone    = 1<<12 | 1<<13
)

// system answers what a plugin asks of its host, for one mount and one role.
type system struct {
	r      *Router
	uuid   string
	leader bool
}
