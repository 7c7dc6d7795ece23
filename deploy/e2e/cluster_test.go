//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"rollcall/node/api"
)

// options say what a cluster looks like; the zero value is three nodes that found one together.
type options struct {
	nodes int // default 3
	// founders are the nodes with bootstrap_expect, from the first; default all, at most 3.
	founders int
	// plugins are files to put into the plugin directory, as deploy/plugins/build calls them.
	plugins []string
	// ownPlugins gives every node a plugin directory of its own.
	ownPlugins bool
	// config changes a node's configuration, by dotted key.
	config map[string]any
	// idle leaves starting the nodes to the test.
	idle bool
	// apart puts every node into a network namespace of its own, where faults of the network can be made. Needs root.
	apart bool
	// disk is the size of the file system that each node's data directory is, as mount takes it; "" for the machine's
	// own. Needs apart.
	disk string
}

// patient is a configuration for tests that promise no failed request and kill nobody: on a machine that is busy with
// other things, a leader must not lose its office because it was not given the CPU for half a second.
var patient = map[string]any{"raft.performance_multiplier": 5, "lease.ttl": "15s"}

// cluster is a set of server processes with a directory of its own. Its methods belong to the test's goroutine, but
// for those that only look.
type cluster struct {
	t     testing.TB
	root  string
	bin   string
	token string
	opt   options
	nodes []*server
	net   *network // nil when all nodes are on loopback

	// foretold are texts that a log may hold although they look like a defect.
	foretold []string

	mu      sync.Mutex
	clients map[string]*api.Client // by their addresses
}

// server is one node: the same configuration and data directory over all its processes.
type server struct {
	lives atomic.Int32 // nodes that had this name before

	c                           *cluster
	name                        string
	dir, data, plugins, config  string
	http, peer, gossip, logFile string
	sockets                     string // below root, short
	index                       int    // among the cluster's nodes
	bin                         string // other than the cluster's, when not empty
	group                       *group // that its next process starts in
	env                         []string

	mu   sync.Mutex
	cmd  *exec.Cmd
	done chan struct{} // closed when the process has ended
	err  error         // how it ended; read after done
}

// newCluster makes the files of a cluster and, unless told otherwise, starts it and waits until it serves. At the end of
// the test everything is stopped, and no process may be left.
func newCluster(t testing.TB, opt options) *cluster {
	t.Helper()
	if opt.nodes == 0 {
		opt.nodes = 3
	}
	if opt.founders == 0 {
		opt.founders = min(opt.nodes, 3)
	}
	bin, err := rollcall()
	if err != nil {
		t.Fatal(err)
	}
	root, err := os.MkdirTemp("/tmp", "e2e-") // short: sockets live below it
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{t: t, root: root, bin: bin, opt: opt}
	t.Cleanup(c.end)
	if opt.apart {
		c.net = newNetwork(t, opt.nodes)
	}
	var names []string
	for i := range opt.nodes {
		names = append(names, fmt.Sprintf("node-%d", i+1))
	}
	c.run("tls", "all", "-dir", c.path("tls"), "-nodes", strings.Join(names, ","))
	token, err := os.ReadFile(c.path("tls", "token"))
	if err != nil {
		t.Fatal(err)
	}
	c.token = strings.TrimSpace(string(token))
	var ports []int
	if c.net == nil {
		ports = freePorts(t, 3*opt.nodes)
	}
	for i, name := range names {
		s := &server{
			c: c, name: name, dir: c.path(name), data: c.path(name, "data"), plugins: c.path("plugins"),
			config: c.path(name, "config.json"), logFile: c.path(name, "log"), sockets: fmt.Sprintf("s%d", i+1), index: i,
		}
		if c.net == nil {
			s.http, s.peer, s.gossip = addr(ports[3*i]), addr(ports[3*i+1]), addr(ports[3*i+2])
		} else {
			at := func(port int) string { return fmt.Sprintf("%s:%d", c.net.address(i), port) }
			s.http, s.peer, s.gossip = at(portHTTP), at(portPeer), at(portGossip)
		}
		if opt.ownPlugins {
			s.plugins = c.path(name, "plugins")
		}
		c.nodes = append(c.nodes, s)
	}
	for i, s := range c.nodes {
		for _, dir := range []string{s.dir, s.data, s.plugins} {
			if err := os.MkdirAll(dir, 0o700); err != nil {
				t.Fatal(err)
			}
		}
		if opt.disk != "" {
			c.net.disk(s.data, opt.disk)
		}
		s.configure(i < opt.founders)
	}
	for _, name := range opt.plugins {
		c.install(name)
	}
	if !opt.idle {
		for _, s := range c.nodes {
			s.start()
		}
		c.serving()
	}
	return c
}

func (c *cluster) path(parts ...string) string {
	return filepath.Join(append([]string{c.root}, parts...)...)
}

func addr(port int) string { return fmt.Sprintf("127.0.0.1:%d", port) }

// freePorts finds ports that are free for TCP and UDP, below those that the kernel gives to outgoing connections: a
// node that is down for a while must find its ports free again.
func freePorts(t testing.TB, n int) []int {
	t.Helper()
	var out []int
	for range 10_000 {
		if len(out) == n {
			return out
		}
		port := 10_000 + rand.IntN(20_000)
		if slices.Contains(out, port) {
			continue
		}
		tcp, err := net.Listen("tcp", addr(port))
		if err != nil {
			continue
		}
		udp, err := net.ListenPacket("udp", addr(port))
		_ = tcp.Close()
		if err != nil {
			continue
		}
		_ = udp.Close()
		out = append(out, port)
	}
	t.Fatal("no free ports between 10000 and 30000")
	return nil
}

// configure writes the node's configuration file.
func (s *server) configure(founder bool) {
	c := s.c
	var join []string
	for _, o := range c.nodes {
		join = append(join, o.gossip)
	}
	cfg := map[string]any{
		"name": s.name, "data_dir": s.data, "plugin_dir": s.plugins, "socket_dir": c.path(s.sockets),
		"retry_join": join,
		"join":       map[string]any{"interval": "200ms", "max_interval": "1s"},
		"cluster": map[string]any{
			"listen": s.peer, "ca_file": c.path("tls", "ca.pem"),
			"cert_file": c.path("tls", s.name+".pem"), "key_file": c.path("tls", s.name+"-key.pem"),
		},
		"gossip": map[string]any{"listen": s.gossip, "key_file": c.path("tls", "gossip.key")},
		"seal":   map[string]any{"key_file": c.path("tls", "seal.key")},
		"http":   map[string]any{"listen": s.http},
	}
	if c.net != nil {
		cfg["http"] = map[string]any{"listen": s.http, "allow_plain": true} // no other machine is on this network
	}
	if founder {
		cfg["bootstrap_expect"], cfg["bootstrap_token_file"] = c.opt.founders, c.path("tls", "token")
	}
	for key, v := range c.opt.config {
		section, name, ok := strings.Cut(key, ".")
		if !ok {
			cfg[key] = v
			continue
		}
		sub, _ := cfg[section].(map[string]any)
		sub = maps.Clone(sub)
		if sub == nil {
			sub = map[string]any{}
		}
		sub[name] = v
		cfg[section] = sub
	}
	raw, err := json.MarshalIndent(cfg, "", "  ")
	if err == nil {
		err = os.WriteFile(s.config, raw, 0o600)
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

// start starts the node's process: the same command the first time and every later time.
func (s *server) start() {
	s.c.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd != nil {
		s.c.t.Fatalf("%s runs already", s.name)
	}
	log, err := os.OpenFile(s.logFile, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		s.c.t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	argv := []string{s.c.bin, "server", "-config", s.config}
	if s.bin != "" {
		argv[0] = s.bin
	}
	if s.c.net != nil { // which replaces itself by the command: the process keeps its pid
		argv = append([]string{"ip", "netns", "exec", s.c.net.namespace(s.index)}, argv...)
	}
	if s.group != nil {
		argv = append([]string{"sh", "-c", `echo $$ >"$0/cgroup.procs" && exec "$@"`, s.group.dir}, argv...)
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(append(os.Environ(), "GORACE=halt_on_error=1 exitcode=66"), s.env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		s.c.t.Fatal(err)
	}
	done := make(chan struct{})
	s.cmd, s.done = cmd, done
	go func() {
		s.err = cmd.Wait()
		close(done)
	}()
}

// pid of the running process, 0 when there is none.
func (s *server) pid() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd == nil {
		return 0
	}
	return s.cmd.Process.Pid
}

func (s *server) alive() bool { return s.pid() != 0 }

// ended says whether the process has ended by itself; start needs gone before it.
func (s *server) ended() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd == nil {
		return false
	}
	select {
	case <-s.done:
		return true
	default:
		return false
	}
}

// signal sends a signal to the process; none is running is the test's mistake.
func (s *server) signal(sig syscall.Signal) {
	s.c.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd == nil {
		s.c.t.Fatalf("%s does not run", s.name)
	}
	if err := s.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		s.c.t.Fatal(err)
	}
}

// gone waits for the process to end and returns how it did.
func (s *server) gone(limit time.Duration) error {
	s.c.t.Helper()
	s.mu.Lock()
	done := s.done
	s.mu.Unlock()
	select {
	case <-done:
	case <-time.After(limit):
		s.c.t.Fatalf("%s has not ended within %s", s.name, limit)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cmd = nil
	return s.err
}

// kill ends the process with SIGKILL, and fails the test if one of its plugins survives it by more than two seconds.
func (s *server) kill() {
	s.c.t.Helper()
	pid := s.pid()
	s.signal(syscall.SIGKILL)
	_ = s.gone(10 * time.Second)
	noPlugins(s.c.t, s.c.root, 2*time.Second, func(p process) bool { return p.host == pid })
}

// stop ends the process as a service manager does.
func (s *server) stop() {
	s.c.t.Helper()
	pid := s.pid()
	s.signal(syscall.SIGTERM)
	if err := s.gone(60 * time.Second); err != nil {
		s.c.t.Errorf("%s ended with %v", s.name, err)
	}
	noPlugins(s.c.t, s.c.root, 2*time.Second, func(p process) bool { return p.host == pid })
}

// replace makes an empty node of the same name out of a stopped one.
func (s *server) replace() {
	s.c.t.Helper()
	entries, err := os.ReadDir(s.data) // not the directory itself: it may be a mount
	if err != nil {
		s.c.t.Fatal(err)
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(s.data, e.Name())); err != nil {
			s.c.t.Fatal(err)
		}
	}
}

// born tells clients that from now on another node answers under this name: one with an empty disk.
func (s *server) born() { s.lives.Add(1) }

// who is the node that gave an answer: its name, and which of the nodes that had this name. What holds for the answers of one
// node does not hold for those of two: the first may have run a reload of its own alone.
func (c *cluster) who(h http.Header) string {
	name := h.Get(api.HeaderNode)
	for _, s := range c.nodes {
		if n := s.lives.Load(); s.name == name && n > 0 {
			return fmt.Sprintf("%s, disk %d", name, n+1)
		}
	}
	return name
}

// log is what the node has written so far.
func (s *server) log() string {
	raw, err := os.ReadFile(s.logFile)
	if err != nil {
		s.c.t.Fatal(err)
	}
	return string(raw)
}

// end stops every process, and says where the logs are when the test has failed.
func (c *cluster) end() {
	var stopping sync.WaitGroup
	for _, s := range c.nodes {
		if !s.alive() {
			continue
		}
		s.signal(syscall.SIGCONT)
		s.signal(syscall.SIGTERM)
		stopping.Go(func() {
			select {
			case <-s.done:
				if s.err != nil {
					c.t.Errorf("%s ended with %v", s.name, s.err)
				}
			case <-time.After(60 * time.Second):
				c.t.Errorf("%s did not stop within 60 s of SIGTERM; it is killed", s.name)
				_ = s.cmd.Process.Kill()
				<-s.done
			}
		})
	}
	stopping.Wait()
	noPlugins(c.t, c.root, 3*time.Second, func(process) bool { return true })
	if c.net != nil {
		c.net.end()
	}
	for _, s := range c.nodes {
		c.suspicious(s)
	}
	if !c.t.Failed() && !*flagKeep {
		if err := os.RemoveAll(c.root); err != nil {
			c.t.Error(err)
		}
		return
	}
	for _, s := range c.nodes {
		c.t.Logf("%s: %s\n%s", s.name, s.logFile, tail(s.logFile, 25))
	}
	c.t.Logf("everything of this cluster is kept in %s", c.root)
}

// suspicious fails the test when a log tells of a defect that no request showed.
func (c *cluster) suspicious(s *server) {
	raw, err := os.ReadFile(s.logFile)
	if err != nil {
		return // it was never started
	}
	for line := range strings.SplitSeq(string(raw), "\n") {
		for _, word := range []string{"DATA RACE", "panic:", "fatal error:", "goroutine 1 ["} {
			if strings.Contains(line, word) && !slices.ContainsFunc(c.foretold, func(text string) bool { return strings.Contains(line, text) }) {
				c.t.Errorf("%s logged: %s", s.name, line)
			}
		}
		if strings.Contains(line, c.token) && c.token != "" {
			c.t.Errorf("%s logged the root token: %s", s.name, line)
		}
	}
}

func tail(file string, lines int) string {
	raw, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimRight(string(raw), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// command is one run of the command line.
type command struct {
	out, errOut string
	code        int
}

// cli runs the binary as a user does, against the given nodes.
func (c *cluster) cli(nodes []*server, args ...string) command {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.bin, args...)
	cmd.Env = append(os.Environ(), "ROLLCALL_TOKEN="+c.token, "HOME="+c.root)
	if len(nodes) > 0 {
		var urls []string
		for _, s := range nodes {
			urls = append(urls, s.url())
		}
		cmd.Env = append(cmd.Env, "ROLLCALL_ADDR="+strings.Join(urls, ","))
	}
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	r := command{out: out.String(), errOut: errOut.String()}
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		r.code = exit.ExitCode()
	} else if err != nil {
		c.t.Fatalf("rollcall %v: %v", args, err)
	}
	return r
}

// run runs a command that must succeed.
func (c *cluster) run(args ...string) string {
	c.t.Helper()
	r := c.cli(c.live(), args...)
	if r.code != 0 {
		c.t.Fatalf("rollcall %v: exit code %d\n%s%s", args, r.code, r.out, r.errOut)
	}
	return r.out
}

func (s *server) url() string { return "http://" + s.http }

// client talks to this node and to no other.
func (s *server) client() *api.Client { return s.c.clientOf(s) }

// clientOf talks to the given nodes, to whichever answers.
func (c *cluster) clientOf(nodes ...*server) *api.Client {
	c.t.Helper()
	var urls []string
	for _, s := range nodes {
		urls = append(urls, s.url())
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	key := strings.Join(urls, ",")
	if client := c.clients[key]; client != nil { // waits ask often, and for hours
		return client
	}
	client, err := api.New(api.Config{Addresses: urls, Token: c.token, Timeout: 30 * time.Second})
	if err != nil {
		c.t.Fatal(err)
	}
	if c.clients == nil {
		c.clients = map[string]*api.Client{}
	}
	c.clients[key] = client
	c.t.Cleanup(client.Close)
	return client
}

// hangUp closes the connections of the test's own clients.
func (c *cluster) hangUp() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, client := range c.clients {
		client.Close()
	}
	c.clients = nil
	direct.CloseIdleConnections()
}

// live are the nodes whose process runs.
func (c *cluster) live() []*server {
	var out []*server
	for _, s := range c.nodes {
		if s.alive() {
			out = append(out, s)
		}
	}
	return out
}

// any talks to whichever live node answers.
func (c *cluster) any() *api.Client { return c.clientOf(c.live()...) }

// install puts a plugin file into the plugin directories of the nodes, all when none is named, and returns its sha256.
func (c *cluster) install(name string, nodes ...*server) string {
	c.t.Helper()
	from, err := pluginFile(name)
	if err != nil {
		c.t.Fatal(err)
	}
	c.put(from, name, nodes...)
	return sum(c.t, from)
}

// put copies a file into the plugin directories of the nodes under a name.
func (c *cluster) put(from, name string, nodes ...*server) {
	c.t.Helper()
	if len(nodes) == 0 {
		nodes = c.nodes
	}
	done := map[string]bool{}
	for _, s := range nodes {
		if !done[s.plugins] {
			copyFile(c.t, from, filepath.Join(s.plugins, name))
		}
		done[s.plugins] = true
	}
}
