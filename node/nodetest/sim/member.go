package sim

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"rollcall/fsm"
	"rollcall/node"
	"rollcall/node/nodetest/check"
	"rollcall/transport"
	"rollcall/transport/pki"
)

// member is one place in the cluster: a name, a host, a disk, and while it is up the real node on it.
type member struct {
	c      *cluster
	name   string
	disk   *disk
	temper *temper
	// drift is how much faster its clock runs than true time.
	drift float64
	// joins is a place for a node that joins while the cluster runs, and may be taken out of it again.
	joins  bool
	events *check.Node

	stops sync.WaitGroup // graceful stops under way
	boots int
	path  string // of the small files: node id, incarnation, cluster

	leaving atomic.Bool // it is about to go, to come back as another node or never; it is left alone meanwhile
	asked   atomic.Bool // its removal was asked for, and may have happened

	mu       sync.Mutex // never held over a wait
	node     *node.Node
	launcher *launcher
	over     chan struct{} // closed when this boot has ended
	disks    int           // how often its disk was replaced
}

func newMember(c *cluster, name string, drift float64) *member {
	rng, torn := rngOf(c.opt.Seed, "disk "+name), rngOf(c.opt.Seed, "torn "+name)
	m := &member{c: c, name: name, temper: newTemper(c.opt.Seed, name), drift: drift, events: c.rec.Node(name)}
	m.disk = newDisk(
		func() time.Duration { return between(rng, 200*time.Microsecond, 2*time.Millisecond) },
		func() bool { return torn.IntN(2) == 0 },
	)
	return m
}

// The ports of every host.
const (
	apiPort     = "8200"
	clusterPort = "8201"
)

func (m *member) api() string { return "http://" + m.name + ":" + apiPort }

// identity tells the nodes apart that have lived here: a new disk makes another one.
func (m *member) identity() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return fmt.Sprintf("%s (%d)", m.name, m.disks)
}

// up is true while a node runs here, paused or not.
func (m *member) up() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.node != nil
}

// running is the node, nil while there is none.
func (m *member) running() *node.Node {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.node
}

// start boots the member from what its disk holds. It is called by one at a time.
func (m *member) start() error {
	m.stops.Wait() // what stops in good order uses network and disk until the end
	if m.up() {
		return nil
	}
	m.boots++
	path := filepath.Join(m.c.dir, m.name, fmt.Sprint(m.boots))
	if err := carryOver(m.path, path); err != nil {
		return err
	}
	m.path = path
	creds, err := transport.Issue(m.c.ca, pki.Request{
		Role: pki.RoleNode, Name: m.name, DNSNames: []string{m.name}, TTL: 100 * 24 * time.Hour,
	})
	if err != nil {
		return err
	}
	cfg, opt := m.configure(creds)
	n, err := node.New(cfg, opt)
	if err != nil {
		return err
	}
	over := make(chan struct{})
	m.mu.Lock()
	m.node, m.over = n, over
	m.mu.Unlock()
	m.c.gossip.alive(m.name, n.ID(), m.name+":"+clusterPort)
	if err := n.Start(context.Background()); err != nil {
		return err
	}
	go m.watch(n, over)
	return nil
}

// configure says how the node runs: small snapshots and short waits, so that a minute holds more of them than an hour of
// a real cluster does.
func (m *member) configure(creds *transport.Credentials) (node.Config, node.Options) {
	cfg := node.DefaultConfig()
	cfg.Name, cfg.DataDir, cfg.PluginDir = m.name, m.path, m.path
	cfg.BootstrapExpect = min(m.c.opt.Nodes, 3)
	if m.joins {
		cfg.BootstrapExpect = 0
		for _, f := range m.c.founders {
			cfg.RetryJoin = append(cfg.RetryJoin, f.name+":"+clusterPort)
		}
	}
	cfg.HTTP.Listen, cfg.Cluster.Listen = m.name+":"+apiPort, m.name+":"+clusterPort
	cfg.Raft.SnapshotThreshold, cfg.Raft.SnapshotInterval, cfg.Raft.TrailingLogs = 400, 20*time.Second, 200
	cfg.Autopilot.Stabilization = 3 * time.Second
	cfg.Reload.PrepareDeadline, cfg.Reload.RunDeadline, cfg.Reload.QueueDeadline = 20*time.Second, 90*time.Second, 90*time.Second
	from := time.Now().Add(-time.Hour)
	log := slog.New(m.events.Handler(m.c.logger(m.name).Handler()))
	opt := node.Options{
		Logger: log, Network: m.c.wires.net.Host(m.name), Credentials: creds, BootstrapToken: m.c.token,
		Discovery: seenBy{m.c.gossip, m.name}, Disk: m.disk.open(),
		Witness: func(id string, _ uint64) fsm.Witness { return m.events.Witness(id, uint64(m.boots)) },
		Clock:   func() time.Duration { return time.Duration(float64(time.Since(from)) * (1 + m.drift)) },
		Launcher: func(at node.Surroundings) (node.Launcher, error) {
			l := &launcher{
				log: at.Logger, node: m.name, temper: m.temper, pid: m.c.nextPID, procs: map[int]*process{},
				handled: func(mount, key, input string) { m.c.handled(m.name, mount, key, input) },
			}
			m.mu.Lock()
			defer m.mu.Unlock()
			m.launcher = l
			return l, nil
		},
	}
	return cfg, opt
}

// watch stops a node that cannot go on, as node.Run does.
func (m *member) watch(n *node.Node, over chan struct{}) {
	select {
	case err := <-n.Failed():
		if m.running() != n {
			return // what is left of a node that was killed finds its network gone: nobody gave up
		}
		void := m.c.void(m, err)
		switch {
		case node.Left(err):
			m.c.gossip.leave(m.name)
		case !void:
			m.c.gaveUp(m, err)
		}
		if m.stop(n) && void {
			m.replace()
			if err := m.restart(); err != nil {
				m.c.bad("%s does not start again: %v", m.name, err)
			}
		}
	case <-over:
	}
}

// stop ends a node in good order, on a disk that works: Raft never answers what is in its queues when it is shut down on one
// that hangs, and the goroutines that wait for that would be left in the bubble, as they are in a process that ends.
// It reports whether n ran here.
func (m *member) stop(n *node.Node) bool {
	m.stops.Add(1)
	defer m.stops.Done()
	if l := m.detach(n); l == nil {
		return false
	}
	m.disk.ease()
	ctx, cancel := context.WithTimeout(context.Background(), 45*time.Second)
	defer cancel()
	if err := n.Stop(ctx); err != nil {
		m.c.note("stop %s: %v", m.name, err)
	}
	m.events.Event(check.Event{Kind: check.Died})
	m.c.wires.net.Kill(m.name)
	m.disk.cutOff()
	return true
}

// gone waits until the node has ended, and kills it when it does not.
func (m *member) gone(within time.Duration) {
	for end := time.Now().Add(within); m.up() && time.Now().Before(end); {
		time.Sleep(100 * time.Millisecond)
	}
	m.kill(false)
}

// plugins is the launcher of the node that runs here; nil when none does.
func (m *member) plugins() *launcher {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.node == nil {
		return nil
	}
	return m.launcher
}

// detach makes the member count as down, and returns its launcher; nil when n does not run here any more.
func (m *member) detach(n *node.Node) *launcher {
	m.mu.Lock()
	defer m.mu.Unlock()
	if n == nil || m.node != n {
		return nil
	}
	m.node = nil
	close(m.over)
	return m.launcher
}

// kill ends the node as SIGKILL or a loss of power does: its connections break or, with silent, are never heard of again;
// its plugins end with it; its disk keeps what was synced. What is left of it in this process goes on with a network
// that is dead and a disk that nobody reads, until it has ended too.
func (m *member) kill(silent bool) bool {
	n := m.running()
	l := m.detach(n)
	if l == nil {
		return false
	}
	if silent {
		m.c.wires.net.Isolate(m.name)
	} else {
		m.c.wires.net.Kill(m.name)
	}
	m.disk.cutOff()
	l.killAll("killed with its node")
	m.events.Event(check.Event{Kind: check.Died})
	m.c.ghosts.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		_ = n.Stop(ctx) // nobody is there to hear
	})
	return true
}

// restart boots a node that was killed.
func (m *member) restart() error {
	m.stops.Wait()
	m.c.wires.net.Kill(m.name) // the machine knows nothing of connections from before
	m.c.wires.net.Rejoin(m.name)
	return m.start()
}

// replace gives the member a new disk: it comes back under its name, as another node.
func (m *member) replace() {
	m.mu.Lock()
	m.disks++
	m.asked.Store(false)
	m.mu.Unlock()
	m.disk, m.path = newMember(m.c, m.name, m.drift).disk, ""
}

// carryOver copies the small files of the data directory, which node/replica writes durably.
func carryOver(from, to string) error {
	if err := os.MkdirAll(to, 0o700); err != nil || from == "" {
		return err
	}
	all, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, f := range all {
		if f.IsDir() || f.Name() == "LOCK" || strings.HasSuffix(f.Name(), ".new") || strings.HasSuffix(f.Name(), ".tmp") {
			continue
		}
		raw, err := os.ReadFile(filepath.Join(from, f.Name()))
		if err == nil {
			err = os.WriteFile(filepath.Join(to, f.Name()), raw, 0o600)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
