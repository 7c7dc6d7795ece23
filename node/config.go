package node

import "time"

// Config is everything a node is told from outside. It is plain data: LoadConfig fills it from a file and the
// environment, Validate judges it, and New reads it once. Nothing in it changes while the node runs; a change takes a
// restart, except for the contents of the certificate files, which are read again when they change.
//
// Every field is a key of the configuration file (HCL or JSON, the same names) and an environment variable: ROLLCALL_
// and the path of the key in capitals, joined by "_" (cluster.listen is ROLLCALL_CLUSTER_LISTEN). Environment beats
// file beats default. A variable that is set to nothing counts as not set. Lists are comma-separated there.
//
// Durations are written with their unit ("300ms", "5s", "24h"), sizes with theirs ("32MiB", "1GiB", or plain bytes).
type Config struct {
	// Name is what people and the CLI call this node, and what its certificate is issued for. Letters, digits, ".",
	// "_" and "-", at most 64. Default: the host's name. Two nodes of one name: the second is refused at the door.
	// The identity of a node is not its name but the id in its data directory.
	Name string `key:"name"`
	// ClusterName keeps clusters that can reach each other apart before they know each other's id. Default
	// "rollcall". Nodes with another name do not find this one.
	ClusterName string `key:"cluster_name"`
	// DataDir holds the Raft log, snapshots, the node's id and the content store (0700, of this user alone).
	// Required. On a disk that lies about fsync, acknowledged writes are lost when the power goes. A node whose
	// directory was emptied is a new node: remove the old one with `rollcall operator remove`.
	DataDir string `key:"data_dir"`
	// PluginDir is the only directory that plugins are registered from. Required; outside DataDir; not writable by
	// the plugins' user. Whoever can write here can run programs as this node.
	PluginDir string `key:"plugin_dir"`
	// SocketDir is where each plugin gets a private directory for its unix socket. Default: "sockets" in DataDir, or the
	// system's temporary directory where that is too long. At most 40 bytes long, because a socket's path may have 107;
	// a tmpfs is best.
	SocketDir string `key:"socket_dir"`
	// BootstrapExpect is how many nodes found the cluster, the same number on each: when that many see each other
	// and none has any state, they begin together. 0 means: never found, only join. Leave it as it is afterwards: a
	// node that has state ignores it. Other numbers on the founding nodes: they refuse to begin, and say so.
	BootstrapExpect int `key:"bootstrap_expect"`
	// BootstrapTokenFile holds the first token (root). It is read when the cluster is founded, by whichever node
	// enters it; the cluster keeps its hash alone. Required with BootstrapExpect. Give every founding node the same
	// one, readable by this user alone.
	BootstrapTokenFile string `key:"bootstrap_token_file"`
	// RetryJoin lists gossip addresses of other nodes, "host:port" or "host" with port 8202. Names are looked up at
	// each attempt. A node's own address among them does no harm, so the same list fits all. Needed to find anyone.
	RetryJoin []string `key:"retry_join"`
	// Join says how often RetryJoin is tried.
	Join JoinConfig `key:"join"`
	// Cluster is the port that nodes talk to each other on (Raft and gRPC, TLS 1.3 both ways).
	Cluster ClusterConfig `key:"cluster"`
	// Gossip is how nodes find each other.
	Gossip GossipConfig `key:"gossip"`
	// HTTP is the API.
	HTTP HTTPConfig `key:"http"`
	// Seal is the key that keeps what this node writes to its disk unreadable to others.
	Seal SealConfig `key:"seal"`
	// Raft tunes consensus.
	Raft RaftConfig `key:"raft"`
	// Lease is the right to serve plugin requests.
	Lease LeaseConfig `key:"lease"`
	// Autopilot looks after members.
	Autopilot AutopilotConfig `key:"autopilot"`
	// Plugins is about plugin processes.
	Plugins PluginsConfig `key:"plugins"`
	// Reload bounds reloads and what is remembered of them.
	Reload ReloadConfig `key:"reload"`
	// Audit is where this node writes down who asked what.
	Audit AuditConfig `key:"audit"`
	// Log is where this node speaks.
	Log LogConfig `key:"log"`
	// Telemetry is what this node counts.
	Telemetry TelemetryConfig `key:"telemetry"`
}

// JoinConfig is how RetryJoin is tried.
type JoinConfig struct {
	// Interval between attempts while nobody was found. Default 1s.
	Interval time.Duration `key:"interval"`
	// MaxInterval is what the interval grows to. Default 15s. Longer: a node that was cut off while the others were
	// away finds them later.
	MaxInterval time.Duration `key:"max_interval"`
}

// ClusterConfig is the port between nodes.
type ClusterConfig struct {
	// Listen is host:port. Default 127.0.0.1:8201. Port 0 takes a free one.
	Listen string `key:"listen"`
	// Advertise is the host:port at which the other nodes reach this one. Default: Listen; required where that names
	// no single address (0.0.0.0). A wrong one: the node sees the others, and they cannot answer it.
	Advertise string `key:"advertise"`
	// CAFile holds the certificates (PEM) that signed the nodes' certificates. Required. This CA must sign nothing
	// else: whatever it signs for a node may join.
	CAFile string `key:"ca_file"`
	// CertFile is this node's certificate (PEM), made by `rollcall tls cert`. Required. It is read again when it
	// changes; an expired one stops the node from being heard.
	CertFile string `key:"cert_file"`
	// KeyFile is its private key (PEM). Required; not readable by everyone.
	KeyFile string `key:"key_file"`
}

// GossipConfig is how nodes find each other.
type GossipConfig struct {
	// Listen is host:port, TCP and UDP. Default 127.0.0.1:8202.
	Listen string `key:"listen"`
	// Advertise is as in ClusterConfig.
	Advertise string `key:"advertise"`
	// KeyFile holds the key that all nodes share, 32 bytes in base64, made by `rollcall tls ca`. Required;
	// not readable by everyone. With another key a node finds nobody.
	KeyFile string `key:"key_file"`
}

// HTTPConfig is the API.
type HTTPConfig struct {
	// Listen is host:port. Default 127.0.0.1:8200.
	Listen string `key:"listen"`
	// Advertise is the address of this node's API that is told to clients and shown in status, as a URL
	// ("https://node-1.example:8200"). Default: from Listen; required where that names no single address.
	Advertise string `key:"advertise"`
	// TLSCertFile is the API's certificate and chain (PEM). It is read again when it changes.
	TLSCertFile string `key:"tls_cert_file"`
	// TLSKeyFile is its private key (PEM); not readable by everyone.
	TLSKeyFile string `key:"tls_key_file"`
	// AllowPlain lets the API speak HTTP without TLS beyond loopback. Default false. Tokens and secrets then cross
	// the network in the clear; use it only behind something that adds TLS.
	AllowPlain bool `key:"allow_plain"`
	// MaxBody bounds the body of a plugin request. Default 32MiB, at most 1GiB. Requests to sys/ stop at 1MiB.
	MaxBody Size `key:"max_body"`
	// ReadTimeout is how long a client may take to send a request. Default 60s. Too short cuts off slow uploads; too
	// long lets idle connections pile up.
	ReadTimeout time.Duration `key:"read_timeout"`
	// IdleTimeout closes a kept-alive connection that nothing came over. Default 120s.
	IdleTimeout time.Duration `key:"idle_timeout"`
}

// SealConfig is the key that keeps what this node writes to its disk unreadable to others: Raft's log, the snapshots, and
// the snapshots that are saved through the API. The key locks the data keys in the file "keyring" of DataDir. Without the
// block nothing is sealed. A directory that was used without one is sealed at the first start with it; there is no way
// back. Give every node the same key, and a snapshot that is saved through one is restored through any.
type SealConfig struct {
	// KeyFile holds the key, 32 bytes in base64, made by `rollcall tls seal-key`. Default: none. Not readable by everyone,
	// not in DataDir, and on another disk where you can. Whoever loses it has lost the data of every node that has no other.
	KeyFile string `key:"key_file"`
	// Command prints the key, in place of KeyFile: a program by its absolute path, and its arguments. Default: none. It
	// runs once at the start, without a shell, for 30s at most; when it fails the node does not start.
	Command []string `key:"command"`
	// PreviousKeyFile is the key before KeyFile or Command. Default: none. At the start the keyring is locked again with
	// the new one; take this out when every node has started once. Snapshots that were saved with the old key need it.
	PreviousKeyFile string `key:"previous_key_file"`
	// PreviousCommand is as PreviousKeyFile. Default: none.
	PreviousCommand []string `key:"previous_command"`
	// EnvAllow names variables of this node's environment that the commands may see. Default: none but PATH.
	EnvAllow []string `key:"env_allow"`
}

// RaftConfig tunes consensus. The same values on every node, please: voters with shorter timers stand first.
type RaftConfig struct {
	// PerformanceMultiplier scales Raft's timers: heartbeat and election 500ms times this. Default 1, 1 to 10. Raise
	// it where leaders change without a reason in the log (slow disks, far-away nodes); failover takes as much longer.
	PerformanceMultiplier int `key:"performance_multiplier"`
	// SnapshotThreshold is how many entries make a snapshot. Default 8192. Lower: more disk work; higher: a longer
	// start.
	SnapshotThreshold int `key:"snapshot_threshold"`
	// SnapshotInterval is how often the log is looked at for a snapshot, spread up to twice that. Default 2m. Longer: the
	// log grows beyond SnapshotThreshold under load.
	SnapshotInterval time.Duration `key:"snapshot_interval"`
	// TrailingLogs is how many entries stay behind a snapshot, for followers that are behind. Default 10240. Lower:
	// a follower that was away for a moment gets a whole snapshot.
	TrailingLogs int `key:"trailing_logs"`
	// Voters is how many members vote; the others follow without a vote. Default 5; 3 or 5. More voters
	// survive more losses and make each write wait for more disks.
	Voters int `key:"voters"`
}

// LeaseConfig is the right to serve plugin requests without asking the leader.
type LeaseConfig struct {
	// TTL is how long a node may serve after it last heard from the leader; the leader's value counts. Default 5s,
	// 3s times PerformanceMultiplier to 60s. Shorter: a failover makes nodes refuse requests. Longer: a reload waits
	// that long for a node that is cut off.
	TTL time.Duration `key:"ttl"`
}

// AutopilotConfig looks after members.
type AutopilotConfig struct {
	// DeadServerCleanup removes members that have been dead for DeadServerThreshold, never below a quorum. Default
	// false: members are removed by `rollcall operator remove` alone.
	DeadServerCleanup bool `key:"dead_server_cleanup"`
	// DeadServerThreshold is how long a member must be unheard of. Default 24h, at least 1m. Shorter than a repair:
	// the node comes back as a stranger.
	DeadServerThreshold time.Duration `key:"dead_server_threshold"`
	// Stabilization is how long a new member must have been healthy before it votes. Default 10s.
	Stabilization time.Duration `key:"stabilization"`
}

// PluginsConfig is about plugin processes.
type PluginsConfig struct {
	// StartTimeout is how long a plugin may take from exec to handshake. Default 10s, 1s to 5m. A plugin that needs
	// longer is refused as "hangs before the handshake".
	StartTimeout time.Duration `key:"start_timeout"`
	// MemoryLimit is given to each process as GOMEMLIMIT: soft, Go plugins collect harder near it. Default 0: none.
	MemoryLimit Size `key:"memory_limit"`
	// UID runs plugins as another user; needs CAP_SETUID. Default 0: as this node. As this node, a plugin can read
	// what the node can.
	UID int `key:"uid"`
	// GID is the group of plugins; with UID. Default 0: as this node.
	GID int `key:"gid"`
	// EnvAllow names variables of this node's environment that plugins may see (PATH_TO_HSM, HTTPS_PROXY). Default:
	// none. A plugin gets its own variables, a fixed set, and these.
	EnvAllow []string `key:"env_allow"`
	// Cgroup is a cgroup v2 directory that this user may write; each plugin gets one below it, and is killed with
	// it. Default: none.
	Cgroup string `key:"cgroup"`
}

// ReloadConfig bounds reloads and what is remembered of them. What the cluster decides by these is decided by the
// leader's values, and travels in the entry; keep them the same on every node.
type ReloadConfig struct {
	// History is how many finished reloads per namespace keep their details. Default 100, 1 to 10000.
	History int `key:"history"`
	// HistoryAge drops details that are older. Default 168h.
	HistoryAge time.Duration `key:"history_age"`
	// Queue is how many reloads may wait. Default 64, 1 to 1000. Beyond it the answer is 429.
	Queue int `key:"queue"`
	// QueueDeadline is how long a reload may wait for its turn, unless it says otherwise. Default 10m.
	QueueDeadline time.Duration `key:"queue_deadline"`
	// PrepareDeadline is how long nodes may take to make the new version ready. Default 2m; at least StartTimeout.
	PrepareDeadline time.Duration `key:"prepare_deadline"`
	// RunDeadline is how long a reload may take as a whole once it runs. Default 10m; at least PrepareDeadline.
	RunDeadline time.Duration `key:"run_deadline"`
	// StartParallelism is how many plugins may start at once on this node for reloads. Default 8, 1 to 256.
	StartParallelism int `key:"start_parallelism"`
}

// AuditConfig is where this node writes down who asked what, and what they were answered. It is set here alone: no call of
// the API can name a file, for that would be a way to write one.
type AuditConfig struct {
	// File takes a line of JSON for each request that this node is asked and one for each answer, before the answer is
	// given; what cannot be recorded is not done. An absolute path, outside DataDir and PluginDir, in a directory that
	// exists; the file is made, with mode 0600. SIGHUP opens it anew, for log rotation. Default: none, nothing is recorded.
	File string `key:"file"`
	// HMACAccessor hashes the accessors of tokens, too. Default true. false: whoever reads the file can name tokens to
	// revoke, and so can who must.
	HMACAccessor bool `key:"hmac_accessor"`
	// Headers are the request headers that records hold, as they came. Default: user-agent and x-correlation-id. Never a
	// header that carries a secret.
	Headers []string `key:"headers"`
}

// LogConfig is where this node speaks: standard error.
type LogConfig struct {
	// Level is trace, debug, info, warn or error. Default info. debug and below say a line per message.
	Level string `key:"level"`
	// Format is text or json. Default text.
	Format string `key:"format"`
}

// TelemetryConfig is what this node counts.
type TelemetryConfig struct {
	// Prometheus serves /v1/sys/metrics in Prometheus' text format, to tokens that may read it. Default true.
	Prometheus bool `key:"prometheus"`
}

// The ports that are meant where none is said.
const (
	DefaultHTTPPort    = 8200
	DefaultClusterPort = 8201
	DefaultGossipPort  = 8202
)

// DefaultConfig is the configuration of a node that was told nothing. It lacks what has no default, so Validate
// refuses it as it is.
func DefaultConfig() Config {
	return Config{
		ClusterName: "rollcall",
		Join:        JoinConfig{Interval: time.Second, MaxInterval: 15 * time.Second},
		Cluster:     ClusterConfig{Listen: "127.0.0.1:8201"},
		Gossip:      GossipConfig{Listen: "127.0.0.1:8202"},
		HTTP: HTTPConfig{
			Listen: "127.0.0.1:8200", MaxBody: 32 << 20, ReadTimeout: time.Minute, IdleTimeout: 2 * time.Minute,
		},
		Raft: RaftConfig{
			PerformanceMultiplier: 1, SnapshotThreshold: 8192, SnapshotInterval: 2 * time.Minute, TrailingLogs: 10240, Voters: 5,
		},
		Lease:     LeaseConfig{TTL: 5 * time.Second},
		Autopilot: AutopilotConfig{DeadServerThreshold: 24 * time.Hour, Stabilization: 10 * time.Second},
		Plugins:   PluginsConfig{StartTimeout: 10 * time.Second},
		Reload: ReloadConfig{
			History: 100, HistoryAge: 7 * 24 * time.Hour, Queue: 64,
			QueueDeadline: 10 * time.Minute, PrepareDeadline: 2 * time.Minute, RunDeadline: 10 * time.Minute,
			StartParallelism: 8,
		},
		Audit:     AuditConfig{HMACAccessor: true, Headers: []string{"user-agent", "x-correlation-id"}},
		Log:       LogConfig{Level: "info", Format: "text"},
		Telemetry: TelemetryConfig{Prometheus: true},
	}
}
