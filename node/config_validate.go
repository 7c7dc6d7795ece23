package node

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"rollcall/node/fault"
	"rollcall/node/telemetry"
)

// maxSocketDir leaves room, in the 107 bytes of a unix socket's path, for a private directory and the name that
// go-plugin gives a socket. node/supervisor has the same limit.
const maxSocketDir = 40

var (
	namePattern   = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)
	headerPattern = regexp.MustCompile(`^[A-Za-z0-9-]{1,64}$`)
	envPattern    = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
)

// problems collects what is wrong, each with its key.
type problems struct{ list []error }

func (p *problems) add(key, format string, args ...any) {
	p.list = append(p.list, fmt.Errorf("%s: %s", key, fmt.Sprintf(format, args...)))
}

func (p *problems) unless(ok bool, key, format string, args ...any) {
	if !ok {
		p.add(key, format, args...)
	}
}

// Validate reports every problem of the configuration at once, each with the key and what to do. It looks at nothing
// outside the struct: Preflight does.
func (c *Config) Validate() error {
	p := &problems{}
	c.validateNode(p)
	c.validateFounding(p)
	c.validateAddresses(p)
	c.validateHTTP(p)
	c.validateSeal(p)
	c.validateRaft(p)
	c.validatePlugins(p)
	c.validateReload(p)
	c.validateAudit(p)
	if _, err := telemetry.ParseLevel(c.Log.Level); err != nil {
		p.add("log.level", "%v", err)
	}
	p.unless(c.Log.Format == "" || slices.Contains(telemetry.Formats, c.Log.Format), "log.format",
		"%q is not one of %s", c.Log.Format, strings.Join(telemetry.Formats, ", "))
	return fault.As(fault.Invalid, errors.Join(p.list...), "check", "configuration")
}

func (c *Config) validateNode(p *problems) {
	const names = "%q must begin with a letter or digit and hold only those, '.', '_' and '-', at most 64"
	p.unless(namePattern.MatchString(c.Name), "name", names, c.Name)
	p.unless(namePattern.MatchString(c.ClusterName), "cluster_name", names, c.ClusterName)
	p.unless(c.DataDir != "", "data_dir", "is missing; name a directory that this user alone may write")
	p.unless(c.PluginDir != "", "plugin_dir", "is missing; name the directory that holds the plugin binaries")
	if c.DataDir != "" && c.PluginDir != "" {
		p.unless(!within(c.DataDir, c.PluginDir), "plugin_dir",
			"%s is data_dir or lies inside it; plugins are registered from a directory that the node does not write",
			c.PluginDir)
	}
	p.unless(len(c.Sockets()) <= maxSocketDir, "socket_dir",
		"%s is %d bytes long; at most %d leave room for a unix socket's name. Name a shorter one, such as /run/rollcall",
		c.Sockets(), len(c.Sockets()), maxSocketDir)
}

// within reports whether path is dir or lies below it, by name alone.
func within(dir, path string) bool {
	rel, err := filepath.Rel(filepath.Clean(dir), filepath.Clean(path))
	return err == nil && rel != ".." && !strings.HasPrefix(rel, ".."+string(filepath.Separator))
}

func (c *Config) validateFounding(p *problems) {
	n := c.BootstrapExpect
	switch {
	case n < 0:
		p.add("bootstrap_expect", "%d is negative; say how many nodes found the cluster, or 0 to only join", n)
	case n > 0 && n > c.Raft.Voters:
		p.add("bootstrap_expect", "%d founding nodes are more than raft.voters (%d); let the rest join", n, c.Raft.Voters)
	}
	p.unless(n <= 0 || c.BootstrapTokenFile != "", "bootstrap_token_file",
		"is missing; a cluster that is founded without a first token cannot be used. put a long random text into a file, or let `rollcall tls all` make one")
	p.unless(n <= 1 || len(c.RetryJoin) > 0, "retry_join",
		"is empty; with bootstrap_expect = %d the founding nodes must find each other", n)
	p.unless(n != 0 || len(c.RetryJoin) > 0, "retry_join",
		"is empty and bootstrap_expect is 0: this node would neither found a cluster nor find one. Set one of them")
	for _, addr := range c.RetryJoin {
		if err := checkPeer(addr); err != nil {
			p.add("retry_join", "%v", err)
		}
	}
	p.duration("join.interval", c.Join.Interval, 100*time.Millisecond, 10*time.Minute)
	p.duration("join.max_interval", c.Join.MaxInterval, c.Join.Interval, time.Hour)
}

func checkPeer(addr string) error {
	if _, _, err := net.SplitHostPort(JoinAddress(addr)); err != nil || addr == "" || strings.ContainsAny(addr, " /") {
		return fmt.Errorf("%q is not host or host:port", addr)
	}
	return nil
}

// JoinAddress puts the default gossip port behind an address of RetryJoin that has none.
func JoinAddress(addr string) string {
	if _, _, err := net.SplitHostPort(addr); err == nil {
		return addr
	}
	return net.JoinHostPort(strings.Trim(addr, "[]"), strconv.Itoa(DefaultGossipPort))
}

func (c *Config) validateAddresses(p *problems) {
	p.address("cluster", c.Cluster.Listen, c.Cluster.Advertise)
	p.address("gossip", c.Gossip.Listen, c.Gossip.Advertise)
	const howTo = "is missing; `rollcall tls ca` and `rollcall tls cert` make what nodes need to trust each other"
	p.unless(c.Cluster.CAFile != "", "cluster.ca_file", howTo)
	p.unless(c.Cluster.CertFile != "", "cluster.cert_file", howTo)
	p.unless(c.Cluster.KeyFile != "", "cluster.key_file", howTo)
	p.unless(c.Gossip.KeyFile != "", "gossip.key_file", "is missing; `rollcall tls ca` makes one for all nodes")

	listeners := []struct{ key, addr string }{
		{"http.listen", c.HTTP.Listen}, {"cluster.listen", c.Cluster.Listen}, {"gossip.listen", c.Gossip.Listen},
	}
	for i, a := range listeners {
		for _, b := range listeners[:i] {
			p.unless(!collide(a.addr, b.addr), a.key, "%s is the port of %s already (%s)", a.addr, b.key, b.addr)
		}
	}
}

// address checks a pair of listen and advertise.
func (p *problems) address(block, listen, advertise string) {
	host, _, err := splitAddress(listen)
	if err != nil {
		p.add(block+".listen", "%v", err)
		return
	}
	if advertise == "" {
		p.unless(!unspecified(host), block+".advertise",
			"is missing; %s.listen = %q names no single address. Say the host:port at which the others reach this node",
			block, listen)
		return
	}
	host, port, err := splitAddress(advertise)
	switch {
	case err != nil:
		p.add(block+".advertise", "%v", err)
	case unspecified(host) || port == 0:
		p.add(block+".advertise", "%q cannot be reached; say a host and a port that the other nodes can dial", advertise)
	}
}

func splitAddress(addr string) (host string, port uint16, err error) {
	host, text, err := net.SplitHostPort(addr)
	if err != nil || strings.ContainsAny(host, " /") {
		return "", 0, fmt.Errorf(`%q is not host:port, as in "10.0.0.1:8201"`, addr)
	}
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return "", 0, fmt.Errorf("%q has no port number (0 to 65535) behind the colon", addr)
	}
	return host, uint16(n), nil
}

func unspecified(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "" || err == nil && ip.Unmap().IsUnspecified()
}

func loopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.Unmap().IsLoopback()
}

// collide reports whether two listeners cannot both be had.
func collide(a, b string) bool {
	hostA, portA, errA := splitAddress(a)
	hostB, portB, errB := splitAddress(b)
	if errA != nil || errB != nil || portA != portB || portA == 0 {
		return false
	}
	return hostA == hostB || unspecified(hostA) || unspecified(hostB)
}

func (c *Config) validateHTTP(p *problems) {
	h := &c.HTTP
	host, _, err := splitAddress(h.Listen)
	switch {
	case err != nil:
		p.add("http.listen", "%v", err)
	case (h.TLSCertFile == "") != (h.TLSKeyFile == ""):
		p.add("http.tls_cert_file", "and http.tls_key_file go together; set both or neither")
	case h.TLSCertFile == "" && !loopback(host) && !h.AllowPlain:
		p.add("http.listen", "%s is reachable from outside and has no TLS: set http.tls_cert_file and "+
			"http.tls_key_file, listen on 127.0.0.1, or say http.allow_plain = true if something in front adds TLS",
			h.Listen)
	}
	if h.Advertise == "" {
		p.unless(err != nil || !unspecified(host), "http.advertise",
			"is missing; http.listen = %q names no single address. Say the URL of this node's API", h.Listen)
	} else if u, err := url.Parse(h.Advertise); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" ||
		strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.User != nil {
		p.add("http.advertise", `%q is not a URL such as "https://node-1.example:8200"`, h.Advertise)
	}
	p.unless(h.MaxBody >= 1<<10 && h.MaxBody <= 1<<30, "http.max_body", "%s is not between 1KiB and 1GiB", h.MaxBody)
	p.duration("http.read_timeout", h.ReadTimeout, time.Second, time.Hour)
	p.duration("http.idle_timeout", h.IdleTimeout, time.Second, time.Hour)
}

func (c *Config) validateSeal(p *problems) {
	s := &c.Seal
	given := s.KeyFile != "" || len(s.Command) > 0
	p.unless(s.KeyFile == "" || len(s.Command) == 0, "seal.command", "and seal.key_file both give the key; set one of them")
	p.unless(s.PreviousKeyFile == "" || len(s.PreviousCommand) == 0, "seal.previous_command",
		"and seal.previous_key_file both give the previous key; set one of them")
	if s.PreviousKeyFile != "" || len(s.PreviousCommand) > 0 {
		p.unless(given, "seal.key_file", "is missing; a previous key is given and none that comes after it")
	}
	for _, f := range []struct{ key, path string }{{"seal.key_file", s.KeyFile}, {"seal.previous_key_file", s.PreviousKeyFile}} {
		p.unless(f.path == "" || c.DataDir == "" || !within(c.DataDir, f.path), f.key,
			"%s lies in data_dir, beside what it locks; keep it elsewhere", f.path)
	}
	for _, f := range []struct {
		key     string
		command []string
	}{{"seal.command", s.Command}, {"seal.previous_command", s.PreviousCommand}} {
		p.unless(len(f.command) == 0 || filepath.IsAbs(f.command[0]), f.key,
			"%q must begin with the absolute path of a program; it runs without a shell", strings.Join(f.command, " "))
	}
	for _, name := range s.EnvAllow {
		p.unless(envPattern.MatchString(name), "seal.env_allow", "%q is not the name of a variable", name)
	}
}

func (c *Config) validateRaft(p *problems) {
	r := &c.Raft
	p.number("raft.performance_multiplier", r.PerformanceMultiplier, 1, 10)
	p.number("raft.snapshot_threshold", r.SnapshotThreshold, 16, 1<<24)
	p.duration("raft.snapshot_interval", r.SnapshotInterval, 100*time.Millisecond, 24*time.Hour)
	p.number("raft.trailing_logs", r.TrailingLogs, 16, 1<<24)
	p.unless(slices.Contains([]int{3, 5}, r.Voters), "raft.voters",
		"%d is not 3 or 5; an even number survives no more losses than the odd one below it", r.Voters)
	least := 3 * time.Second * time.Duration(max(1, r.PerformanceMultiplier))
	p.duration("lease.ttl", c.Lease.TTL, least, time.Minute)
	p.duration("autopilot.dead_server_threshold", c.Autopilot.DeadServerThreshold, time.Minute, 365*24*time.Hour)
	p.duration("autopilot.stabilization", c.Autopilot.Stabilization, 0, time.Hour)
}

func (c *Config) validatePlugins(p *problems) {
	s := &c.Plugins
	p.duration("plugins.start_timeout", s.StartTimeout, time.Second, 5*time.Minute)
	p.unless(s.MemoryLimit == 0 || s.MemoryLimit >= 16<<20, "plugins.memory_limit",
		"%s is less than a Go program needs to start; 16MiB at least, or 0 for none", s.MemoryLimit)
	p.number("plugins.uid", s.UID, 0, 1<<31-1)
	p.number("plugins.gid", s.GID, 0, 1<<31-1)
	p.unless(s.GID == 0 || s.UID != 0, "plugins.gid", "is set without plugins.uid; set both")
	for _, name := range s.EnvAllow {
		p.unless(envPattern.MatchString(name), "plugins.env_allow", "%q is not the name of a variable", name)
		p.unless(!strings.HasPrefix(name, EnvPrefix), "plugins.env_allow",
			"%s is this node's own configuration, which plugins must not see", name)
	}
	p.unless(s.Cgroup == "" || filepath.IsAbs(s.Cgroup), "plugins.cgroup",
		"%q is not an absolute path, such as /sys/fs/cgroup/rollcall", s.Cgroup)
}

func (c *Config) validateReload(p *problems) {
	r := &c.Reload
	p.number("reload.history", r.History, 1, 10_000)
	p.number("reload.queue", r.Queue, 1, 1_000)
	p.number("reload.start_parallelism", r.StartParallelism, 1, 256)
	p.duration("reload.history_age", r.HistoryAge, time.Hour, 365*24*time.Hour)
	p.duration("reload.queue_deadline", r.QueueDeadline, time.Second, 24*time.Hour)
	p.duration("reload.prepare_deadline", r.PrepareDeadline, c.Plugins.StartTimeout, time.Hour)
	p.duration("reload.run_deadline", r.RunDeadline, r.PrepareDeadline, 24*time.Hour)
}

// secretHeaders carry what opens doors, or may.
var secretHeaders = []string{"authorization", "proxy-authorization", "cookie", "set-cookie", "x-vault-token"}

func (c *Config) validateAudit(p *problems) {
	for _, h := range c.Audit.Headers {
		p.unless(headerPattern.MatchString(h), "audit.headers", "%q is not the name of a header", h)
		p.unless(!slices.Contains(secretHeaders, strings.ToLower(h)), "audit.headers",
			"%s carries secrets, which audit records must not hold in clear", h)
	}
	p.unless(len(c.Audit.Headers) <= 32, "audit.headers", "%d headers are more than 32", len(c.Audit.Headers))
	file := c.Audit.File
	if file == "" {
		return
	}
	p.unless(filepath.IsAbs(file) && filepath.Clean(file) == file, "audit.file", "%q is not an absolute path without detours", file)
	for _, dir := range []struct{ key, path string }{
		{"data_dir", c.DataDir}, {"plugin_dir", c.PluginDir}, {"socket_dir", c.SocketDir},
	} {
		p.unless(dir.path == "" || !within(dir.path, file), "audit.file", "%s lies inside %s: a log must not stand where "+
			"programs are started from, nor among what the node keeps", file, dir.key)
	}
}

func (p *problems) number(key string, n, least, most int) {
	p.unless(n >= least && n <= most, key, "%d is not between %d and %d", n, least, most)
}

func (p *problems) duration(key string, d, least, most time.Duration) {
	p.unless(d >= least && d <= most, key, "%s is not between %s and %s", d, least, most)
}

// Sockets is SocketDir or its default.
func (c *Config) Sockets() string {
	if c.SocketDir != "" {
		return c.SocketDir
	}
	return filepath.Join(c.DataDir, "sockets")
}

// Warnings are settings that work and that somebody should know about. For the log, at the start.
func (c *Config) Warnings() []string {
	var out []string
	host, _, err := splitAddress(c.HTTP.Listen)
	if err == nil && c.HTTP.TLSCertFile == "" {
		if loopback(host) {
			out = append(out, "http has no TLS; it listens on loopback alone")
		} else if c.HTTP.AllowPlain {
			out = append(out, "http.allow_plain: tokens and secrets cross the network at "+c.HTTP.Listen+" in the clear")
		}
	}
	if c.Seal.KeyFile == "" && len(c.Seal.Command) == 0 {
		out = append(out, "seal: nothing is sealed: whoever can read data_dir or a saved snapshot reads the secrets in it; "+
			"set seal.key_file (`rollcall tls seal-key` makes one) or seal.command")
	}
	if n := c.BootstrapExpect; n > 0 && n%2 == 0 {
		out = append(out, fmt.Sprintf(
			"bootstrap_expect = %d: an even number of voters survives no more losses than %d", n, n-1))
	}
	if c.BootstrapExpect > 1 || len(c.RetryJoin) > 0 {
		for _, a := range []struct{ key, listen, advertise string }{
			{"cluster", c.Cluster.Listen, c.Cluster.Advertise}, {"gossip", c.Gossip.Listen, c.Gossip.Advertise},
		} {
			addr := a.advertise
			if addr == "" {
				addr = a.listen
			}
			if host, _, err := splitAddress(addr); err == nil && loopback(host) {
				out = append(out, fmt.Sprintf(
					"%s: the others are told %s, which only nodes on this machine can reach", a.key, addr))
			}
		}
	}
	return out
}

// Preflight looks at the files that the configuration names: there, of the right sort, and not open to everyone. It
// reports every problem at once and changes nothing. The server calls it once, before New.
func (c *Config) Preflight() error {
	p := &problems{}
	for _, f := range []struct {
		key, path string
		secret    bool
	}{
		{"cluster.ca_file", c.Cluster.CAFile, false},
		{"cluster.cert_file", c.Cluster.CertFile, false},
		{"cluster.key_file", c.Cluster.KeyFile, true},
		{"gossip.key_file", c.Gossip.KeyFile, true},
		{"http.tls_cert_file", c.HTTP.TLSCertFile, false},
		{"http.tls_key_file", c.HTTP.TLSKeyFile, true},
		{"seal.key_file", c.Seal.KeyFile, true},
		{"seal.previous_key_file", c.Seal.PreviousKeyFile, true},
	} {
		if f.path != "" {
			p.file(f.key, f.path, f.secret)
		}
	}
	// The token file may be deleted once the cluster exists; the node that founds one says so if it is missing.
	if _, err := os.Stat(c.BootstrapTokenFile); err == nil {
		p.file("bootstrap_token_file", c.BootstrapTokenFile, true)
	}
	info, err := os.Stat(c.PluginDir)
	switch {
	case err != nil:
		p.add("plugin_dir", "%v; make it, and put the plugin binaries there", err)
	case !info.IsDir():
		p.add("plugin_dir", "%s is not a directory", c.PluginDir)
	case info.Mode().Perm()&0o002 != 0:
		p.add("plugin_dir", "everyone may write %s (mode %#o), and so run programs as this node; chmod o-w %s",
			c.PluginDir, info.Mode().Perm(), c.PluginDir)
	}
	if info, err := os.Stat(c.DataDir); err == nil && !info.IsDir() {
		p.add("data_dir", "%s is not a directory", c.DataDir)
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		p.add("data_dir", "%v", err)
	}
	return fault.As(fault.Invalid, errors.Join(p.list...), "check", "files of the configuration")
}

func (p *problems) file(key, path string, secret bool) {
	f, err := os.Open(path)
	if err != nil {
		p.add(key, "%v; it must exist and be readable by this user", err)
		return
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		p.add(key, "%v", err)
	case !info.Mode().IsRegular():
		p.add(key, "%s is not a file", path)
	case secret && info.Mode().Perm()&0o007 != 0:
		p.add(key, "everyone may read %s (mode %#o); chmod 600 %s", path, info.Mode().Perm(), path)
	}
}
