package api

import "time"

// Health is the body of sys/health, without an envelope. The fields after ClusterID are ours.
type Health struct {
	Initialized                bool   `json:"initialized"`
	Sealed                     bool   `json:"sealed"`
	Standby                    bool   `json:"standby"`
	PerformanceStandby         bool   `json:"performance_standby"`
	ReplicationPerformanceMode string `json:"replication_performance_mode"`
	ReplicationDRMode          string `json:"replication_dr_mode"`
	ServerTimeUTC              int64  `json:"server_time_utc"` // Unix seconds
	Version                    string `json:"version"`
	Enterprise                 bool   `json:"enterprise"`
	ClusterName                string `json:"cluster_name,omitempty"`
	ClusterID                  string `json:"cluster_id,omitempty"`
	// Node is the answering node's name. Fenced: it has no serving lease and refuses plugin requests, and why.
	Node          string `json:"node,omitempty"`
	Fenced        bool   `json:"fenced"`
	FencedBecause string `json:"fenced_because,omitempty"`
}

// SealStatus is the body of sys/seal-status, without an envelope. Version is a strict semantic version: Terraform's
// provider depends on it.
type SealStatus struct {
	Type         string `json:"type"`
	Initialized  bool   `json:"initialized"`
	Sealed       bool   `json:"sealed"`
	T            int    `json:"t"`
	N            int    `json:"n"`
	Progress     int    `json:"progress"`
	Nonce        string `json:"nonce"`
	Version      string `json:"version"`
	BuildDate    string `json:"build_date"`
	Migration    bool   `json:"migration"`
	ClusterName  string `json:"cluster_name,omitempty"`
	ClusterID    string `json:"cluster_id,omitempty"`
	RecoverySeal bool   `json:"recovery_seal"`
	StorageType  string `json:"storage_type,omitempty"`
}

// KeyStatus is the data, and the top level, of sys/key-status: the term of data keys that the cluster is to have, and how
// the asked node follows.
type KeyStatus struct {
	Term        uint64 `json:"term"`
	InstallTime string `json:"install_time"` // RFC 3339
	// Encryptions counts what the asked node has sealed since it started.
	Encryptions uint64 `json:"encryptions"`
	Node        string `json:"node"` // name
	// NodeTerm is behind Term for the moment that the node takes to make its new key. NodeKeys is how many data keys its
	// disk still needs.
	NodeTerm uint64 `json:"node_term"`
	NodeKeys int    `json:"node_keys"`
	// SealType is file or command; SealKey names the key without giving it away.
	SealType string `json:"seal_type"`
	SealKey  string `json:"seal_key"`
}

// Leader is the body of sys/leader, without an envelope.
type Leader struct {
	HAEnabled                       bool   `json:"ha_enabled"`
	IsSelf                          bool   `json:"is_self"`
	ActiveTime                      string `json:"active_time,omitempty"` // RFC 3339
	LeaderAddress                   string `json:"leader_address"`
	LeaderClusterAddress            string `json:"leader_cluster_address"`
	PerformanceStandby              bool   `json:"performance_standby"`
	PerformanceStandbyLastRemoteWAL uint64 `json:"performance_standby_last_remote_wal"`
	RaftCommittedIndex              uint64 `json:"raft_committed_index,omitempty"`
	RaftAppliedIndex                uint64 `json:"raft_applied_index,omitempty"`
}

// HAStatus is the data, and the top level, of sys/ha-status.
type HAStatus struct {
	Nodes []HANode `json:"nodes"`
}

// HANode is one node of HAStatus.
type HANode struct {
	Hostname       string  `json:"hostname"`
	APIAddress     string  `json:"api_address"`
	ClusterAddress string  `json:"cluster_address"`
	ActiveNode     bool    `json:"active_node"`
	LastEcho       *string `json:"last_echo"` // RFC 3339
	Version        string  `json:"version"`
	UpgradeVersion string  `json:"upgrade_version"`
	RedundancyZone string  `json:"redundancy_zone,omitempty"`
}

// RaftConfiguration is the data of sys/storage/raft/configuration.
type RaftConfiguration struct {
	Config RaftConfig `json:"config"`
}

// RaftConfig is the body of RaftConfiguration.
type RaftConfig struct {
	Servers []RaftServer `json:"servers"`
	Index   uint64       `json:"index"`
}

// RaftServer is one member as Raft has it.
type RaftServer struct {
	NodeID          string `json:"node_id"`
	Name            string `json:"name,omitempty"`
	Address         string `json:"address"`
	Leader          bool   `json:"leader"`
	ProtocolVersion string `json:"protocol_version"` // "3"
	Voter           bool   `json:"voter"`
}

// RaftJoin is the body of sys/storage/raft/join.
type RaftJoin struct {
	LeaderAPIAddr    string `json:"leader_api_addr"`
	LeaderCACert     string `json:"leader_ca_cert,omitempty"`
	LeaderClientCert string `json:"leader_client_cert,omitempty"`
	LeaderClientKey  string `json:"leader_client_key,omitempty"`
	Retry            bool   `json:"retry,omitempty"`
	NonVoter         bool   `json:"non_voter,omitempty"`
}

// RaftJoined is its answer, without an envelope.
type RaftJoined struct {
	Joined bool `json:"joined"`
}

// RemovePeer is the body of sys/storage/raft/remove-peer. ServerID is the node's id or name.
type RemovePeer struct {
	ServerID string `json:"server_id"`
}

// AutopilotState is the data of sys/storage/raft/autopilot/state.
type AutopilotState struct {
	Healthy          bool                       `json:"healthy"`
	FailureTolerance int                        `json:"failure_tolerance"`
	Leader           string                     `json:"leader"`
	Voters           []string                   `json:"voters"`
	NonVoters        []string                   `json:"non_voters,omitempty"`
	Servers          map[string]AutopilotServer `json:"servers"`
}

// AutopilotServer is one server of AutopilotState.
type AutopilotServer struct {
	ID          string `json:"id"`
	Name        string `json:"name"`
	Address     string `json:"address"`
	NodeStatus  string `json:"node_status"`
	LastContact string `json:"last_contact"` // "2.9s"
	LastTerm    uint64 `json:"last_term"`
	LastIndex   uint64 `json:"last_index"`
	Healthy     bool   `json:"healthy"`
	StableSince string `json:"stable_since"` // RFC 3339
	Status      string `json:"status"`       // leader, voter, non-voter
	Version     string `json:"version"`
	NodeType    string `json:"node_type"`
}

// AutopilotConfig is the data of sys/storage/raft/autopilot/configuration. Durations are texts ("10s").
type AutopilotConfig struct {
	CleanupDeadServers             bool   `json:"cleanup_dead_servers"`
	LastContactThreshold           string `json:"last_contact_threshold"`
	DeadServerLastContactThreshold string `json:"dead_server_last_contact_threshold"`
	MaxTrailingLogs                uint64 `json:"max_trailing_logs"`
	MinQuorum                      int    `json:"min_quorum"`
	ServerStabilizationTime        string `json:"server_stabilization_time"`
	DisableUpgradeMigration        bool   `json:"disable_upgrade_migration"`
}

// Member is one node as Raft, the state and gossip see it together: sys/members.
type Member struct {
	ID             string `json:"id"`
	Name           string `json:"name"`
	APIAddress     string `json:"api_address"`
	ClusterAddress string `json:"cluster_address"`
	Version        string `json:"version"` // of the build
	OSArch         string `json:"os_arch,omitempty"`
	Incarnation    uint64 `json:"incarnation,omitempty"`
	Leader         bool   `json:"leader"`
	Self           bool   `json:"self,omitempty"`
	// Suffrage is voter, nonvoter, or empty for a node that Raft does not know.
	Suffrage string `json:"suffrage"`
	// Gossip is alive, suspect, failed, left or empty: a hint, never a decision.
	Gossip string `json:"gossip,omitempty"`
	// Left: it said good-bye and keeps its name.
	Left bool `json:"left,omitempty"`
	// Fenced is set where it is known that the node has no serving lease.
	Fenced bool `json:"fenced,omitempty"`
}

// Members is the data of sys/members.
type Members struct {
	Members []Member `json:"members"`
}

// ClusterStatus is what a node knows of the cluster without asking anyone. It is no answer by itself: node gives it to
// node/httpd, which makes health, seal-status and leader of it.
type ClusterStatus struct {
	Initialized bool   `json:"initialized"`
	ClusterName string `json:"cluster_name"`
	ClusterID   string `json:"cluster_id"`
	IsLeader    bool   `json:"is_leader"`
	// LeaderSince is when this node began to lead; the zero time on others.
	LeaderSince          time.Time `json:"leader_since"`
	LeaderID             string    `json:"leader_id"`
	LeaderName           string    `json:"leader_name"`
	LeaderAPIAddress     string    `json:"leader_api_address"`
	LeaderClusterAddress string    `json:"leader_cluster_address"`
	Term                 uint64    `json:"term"`
	CommitIndex          uint64    `json:"commit_index"`
	AppliedIndex         uint64    `json:"applied_index"`
}

// RunningMount is one mount as one node runs it.
type RunningMount struct {
	Mount      string `json:"mount"` // display path; empty where keyed by uuid
	MountUUID  string `json:"mount_uuid"`
	Generation uint64 `json:"generation"`
	Version    string `json:"version"`
	SHA256     string `json:"sha256"`
	PID        int64  `json:"pid"`
	// State is ready, starting, preparing, switching, backing off or stopped; Error says why it is not ready.
	State    string `json:"state"`
	Error    string `json:"error,omitempty"`
	Ready    bool   `json:"ready"`
	Started  string `json:"started,omitempty"` // RFC 3339
	Restarts uint32 `json:"restarts"`
}

// NodeRunning is what one node said that it runs, or why it did not say.
type NodeRunning struct {
	Node   string         `json:"node"` // name
	NodeID string         `json:"node_id"`
	Error  string         `json:"error,omitempty"`
	Mounts []RunningMount `json:"mounts"`
}

// Versions is the data of sys/plugins/versions: mounts by nodes, wanted against running.
type Versions struct {
	Nodes  []string        `json:"nodes"` // names, sorted; one column each
	Mounts []MountVersions `json:"mounts"`
	Index  uint64          `json:"index"`
}

// MountVersions is one row: what the state wants of a mount, and what each node runs.
type MountVersions struct {
	Mount     string `json:"mount"`
	Namespace string `json:"namespace"`
	Accessor  string `json:"accessor"`
	Type      string `json:"type"` // auth, secret, database
	Plugin    string `json:"plugin"`
	// Configured is what the user asked for (or ""), Pinned what a pin says (or ""); neither runs before a reload.
	Configured string        `json:"configured"`
	Pinned     string        `json:"pinned,omitempty"`
	Wanted     Process       `json:"wanted"`
	Nodes      []NodeVersion `json:"nodes"`
}

// NodeVersion is one cell of Versions.
type NodeVersion struct {
	Node    string   `json:"node"`
	NodeID  string   `json:"node_id"`
	Wanted  Process  `json:"wanted"` // of this node: its override, else the mount's
	Running *Process `json:"running,omitempty"`
	State   string   `json:"state"`
	// Same: the node runs the generation that is wanted of it. Why says what else is up: the override's reason, the
	// process's failure, or that the node does not answer.
	Same     bool   `json:"same"`
	Override string `json:"override,omitempty"` // "", local, refused, wave
	Why      string `json:"why,omitempty"`
	Restarts uint32 `json:"restarts,omitempty"`
	Started  string `json:"started,omitempty"`
}

// PlanRequest is the body of sys/plugins/plan: a reload's selector, tried on every node without a switch.
type PlanRequest struct {
	Type    string   `json:"type,omitempty"`
	Plugin  string   `json:"plugin,omitempty"`
	Mounts  []string `json:"mounts,omitempty"`
	Version string   `json:"version,omitempty"`
	Trial   string   `json:"trial,omitempty"`
}

// Plan is its data. OK: a reload started now would be prepared by every node.
type Plan struct {
	OK      bool           `json:"ok"`
	Targets []ReloadTarget `json:"targets"`
	Nodes   []PlanNode     `json:"nodes"`
	// Untouched are the other mounts that the caller's namespace reaches, each with why the reload would leave it alone.
	Untouched []PlanUntouched `json:"untouched"`
}

// PlanUntouched is a mount that a reload would leave alone.
type PlanUntouched struct {
	Mount     string `json:"mount"`
	Namespace string `json:"namespace"`
	Plugin    string `json:"plugin"`
	Why       string `json:"why"`
}

// PlanNode is one node's part of a Plan. Error is set where the node could not be asked.
type PlanNode struct {
	Node   string      `json:"node"`
	NodeID string      `json:"node_id"`
	Error  string      `json:"error,omitempty"`
	Mounts []PlanMount `json:"mounts"`
}

// PlanMount is one trial.
type PlanMount struct {
	Mount     string `json:"mount"`
	MountUUID string `json:"mount_uuid,omitempty"`
	OK        bool   `json:"ok"`
	Phase     string `json:"phase,omitempty"`
	Cause     string `json:"cause,omitempty"`
	Version   string `json:"version,omitempty"`
	SHA256    string `json:"sha256,omitempty"`
	// RSSBytes is the resident memory of the tried process.
	RSSBytes uint64  `json:"rss_bytes,omitempty"`
	Timings  Timings `json:"timings"`
	Steps    []Step  `json:"steps,omitempty"`
}
