package supervisor

import (
	"context"
	"io"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"rollcall/node/fault"
	"rollcall/node/supervisor/internal/proc"
)

// Fetcher gets plugin bytes from another node. Fetch writes the bytes whose hash is sha256 to w; they are verified
// here.
type Fetcher interface {
	Fetch(ctx context.Context, sha256 string, w io.Writer) error
}

// Config is what New needs. The zero value of a duration or a size stands for its default.
type Config struct {
	// PluginDir is where plugin files are put by operators. Nothing is ever executed from it: bytes are copied out
	// of it while they are hashed. It must not be a symbolic link.
	PluginDir string
	// DataDir is the node's data directory; the content store is DataDir/plugins. Required.
	DataDir string
	// SocketDir holds the directory, mode 0700, with this supervisor's sockets. Default: the system's temporary
	// directory. A socket's path has at most 108 bytes, so keep it short: at most 40.
	SocketDir string
	// Fetch gets bytes that are not in PluginDir from a peer. Nil: they are refused.
	Fetch Fetcher

	// StartTimeout bounds the time from the start of a process to the end of its handshake. Default 10 s. Longer: a
	// plugin that hangs delays the refusal of a reload.
	StartTimeout time.Duration
	// CleanupTimeout bounds a plugin's Cleanup. Default 5 s.
	CleanupTimeout time.Duration
	// ShutdownTimeout is how long a process may take to end after it was asked to by RPC. Default 2 s.
	ShutdownTimeout time.Duration
	// TermTimeout is how long it may take after SIGTERM; then its process group gets SIGKILL. Default 1 s.
	TermTimeout time.Duration
	// PipeTimeout is how long output is still read after a process has ended, when a child of it holds the pipe.
	// Default 500 ms.
	PipeTimeout time.Duration
	// ContentGrace is how long bytes that were asked for stay in the store although Keep does not name them.
	// Default 10 min.
	ContentGrace time.Duration

	// NodeName is told to plugins as ROLLCALL_NODE. May be empty.
	NodeName string
	// HostVersion is told to plugins as VAULT_VERSION and BAO_VERSION. Default "1.20.0": plugins compare it with
	// what they need, so it is the version of the API that is offered, not ours.
	HostVersion string
	// GoMemLimit is a plugin's soft memory limit in bytes (GOMEMLIMIT). 0: none.
	GoMemLimit int64
	// MaxReply bounds one message from a plugin, in bytes. Default 64 MiB: the largest body of a request, escaped.
	MaxReply int
	// MaxBinary bounds a plugin file, in bytes. Default 1 GiB.
	MaxBinary int64
	// LogBytesPerSecond bounds what is logged of one plugin's output; the rest is counted and dropped. Default 1 MiB.
	LogBytesPerSecond int
	// PassEnv names variables of the host's environment that plugins get. Default: none.
	PassEnv []string
	// UID and GID are what plugins run as, when UID is not 0. The host must be allowed to change them, and every
	// directory above SocketDir must be passable for them.
	UID, GID uint32
	// Cgroup is a cgroup v2 directory that the host may write; each process gets one below it and is killed with
	// it, with everything that descends from it. Default: none, and what a plugin leaves behind is found by its
	// environment.
	Cgroup string
	// MemoryMax and PidsMax bound each process in its cgroup, in bytes and in threads. 0: MemoryMax none, PidsMax 4096.
	MemoryMax int64
	PidsMax   int
	// PlainRPC turns off mutual TLS between host and plugins. It costs a start 16-35 ms and a request nothing
	// measurable.
	PlainRPC bool
	// NoMemfd executes from the content store even where sealed memory files are to be had.
	NoMemfd bool

	// Logger gets what happens to processes, and their output. Required.
	Logger *slog.Logger
	// Registerer gets the metrics. Nil: none are registered.
	Registerer prometheus.Registerer
}

// Validate checks the configuration. Errors are fault.Invalid.
func (c *Config) Validate() error {
	bad := func(field, why string) error {
		return fault.New(fault.Invalid, "check supervisor configuration", field, "%s", why)
	}
	switch {
	case c.DataDir == "":
		return bad("DataDir", "it is required")
	case c.Logger == nil:
		return bad("Logger", "it is required")
	case len(c.SocketDir) > 40:
		return bad("SocketDir", "it is longer than 40 bytes; the path of a unix socket has at most 108")
	case c.GID != 0 && c.UID == 0:
		return bad("GID", "it needs UID")
	}
	for name, d := range map[string]time.Duration{
		"StartTimeout": c.StartTimeout, "CleanupTimeout": c.CleanupTimeout, "ShutdownTimeout": c.ShutdownTimeout,
		"TermTimeout": c.TermTimeout, "PipeTimeout": c.PipeTimeout, "ContentGrace": c.ContentGrace,
	} {
		if d < 0 {
			return bad(name, "it is negative")
		}
	}
	if c.MemoryMax < 0 || c.PidsMax < 0 {
		return bad("MemoryMax, PidsMax", "one of them is negative")
	}
	if c.Cgroup != "" {
		if err := proc.CheckCgroup(c.Cgroup); err != nil {
			return bad("Cgroup", c.Cgroup+": "+err.Error())
		}
	}
	if c.GoMemLimit < 0 || c.MaxReply < 0 || c.MaxBinary < 0 || c.LogBytesPerSecond < 0 {
		return bad("sizes", "one of GoMemLimit, MaxReply, MaxBinary and LogBytesPerSecond is negative")
	}
	return nil
}

func (c *Config) setDefaults() {
	for _, d := range []struct {
		field *time.Duration
		value time.Duration
	}{
		{&c.StartTimeout, 10 * time.Second},
		{&c.CleanupTimeout, 5 * time.Second},
		{&c.ShutdownTimeout, 2 * time.Second},
		{&c.TermTimeout, time.Second},
		{&c.PipeTimeout, 500 * time.Millisecond},
		{&c.ContentGrace, 10 * time.Minute},
	} {
		if *d.field == 0 {
			*d.field = d.value
		}
	}
	if c.HostVersion == "" {
		c.HostVersion = "1.20.0"
	}
	if c.MaxReply == 0 {
		c.MaxReply = 64 << 20
	}
	if c.PidsMax == 0 {
		c.PidsMax = 4096
	}
	if c.MaxBinary == 0 {
		c.MaxBinary = 1 << 30
	}
	if c.LogBytesPerSecond == 0 {
		c.LogBytesPerSecond = 1 << 20
	}
	if abs, err := filepath.Abs(c.DataDir); err == nil {
		c.DataDir = abs
	}
}
