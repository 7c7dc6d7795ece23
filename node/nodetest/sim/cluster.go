package sim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"rollcall/node/fault"
	"rollcall/node/nodetest/check"
	"rollcall/node/replica"
	"rollcall/transport/pki"
)

// Options say what is simulated.
type Options struct {
	// Seed decides everything that is drawn.
	Seed uint64
	// For is how long the load and the faults last, in virtual time.
	For time.Duration
	// Nodes is how many the cluster has: 1 to 7.
	Nodes int
	// Clients is how many call at the same time; default 12.
	Clients int
}

// cluster is the simulated cluster.
type cluster struct {
	opt    Options
	log    slog.Handler
	dir    string
	ca     *pki.CA
	token  string
	wires  *wires
	gossip *gossip
	rec    *check.Recorder
	alive  *pulse

	founders []*member
	spares   []*member // places for nodes that join while it runs
	gate     *gate
	load     sync.WaitGroup // clients
	ghosts   sync.WaitGroup // what is left of nodes that were killed
	ended    chan struct{}  // closed when the load ends

	mu      sync.Mutex
	pid     int
	callers []*caller
	extra   map[*member]bool // spares that belong to the cluster
	newDisk time.Time        // of the last replaced disk
	wrong   []string
	voids   int // nodes that held a restore which the cluster did not take
}

// newCluster makes the places; start boots the nodes. dir takes small files.
func newCluster(opt Options, dir string, log slog.Handler) (*cluster, error) {
	ca, err := pki.NewCA("simulation", 365*24*time.Hour)
	if err != nil {
		return nil, err
	}
	c := &cluster{
		log: log, opt: opt, dir: dir, ca: ca, token: "rc.simulation-root-token", wires: newWires(opt.Seed), pid: 100,
		rec: check.NewRecorder(), ended: make(chan struct{}), gate: &gate{}, extra: map[*member]bool{},
	}
	c.gossip = newGossip(c)
	rng := rngOf(opt.Seed, "clocks")
	for i := range min(opt.Nodes+mostExtra, max(opt.Nodes, mostNodes)) {
		// Within the drift of 5 % that leases allow for between any two.
		m := newMember(c, fmt.Sprintf("n%d", i+1), (rng.Float64()-0.5)*0.045)
		if m.joins = i >= opt.Nodes; m.joins {
			c.spares = append(c.spares, m)
		} else {
			c.founders = append(c.founders, m)
		}
	}
	return c, nil
}

func (c *cluster) member(name string) *member {
	for _, m := range c.everywhere() {
		if m.name == name {
			return m
		}
	}
	return nil
}

func (c *cluster) nextPID() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pid++
	return c.pid
}

func (c *cluster) logger(name string) *slog.Logger { return slog.New(c.log).With("node", name) }

// gaveUp is told of a node that cannot go on, and was not asked to leave.
func (c *cluster) gaveUp(m *member, err error) {
	if m.leaving.Load() {
		c.note("%s gave up while it was taken out: %v", m.name, err)
		return
	}
	c.bad("%s gave up: %v", m.name, err)
}

// handled is told that plugin code on a node begins with a write.
func (c *cluster) handled(node, mount, key, input string) {
	if strings.HasPrefix(key, scratch) {
		return // in no history
	}
	c.member(node).events.Event(check.Event{Kind: check.Handled, Mount: mount, Key: key, Input: input})
}

// void reports whether a node ended because it holds a restore that the cluster did not take, or was removed after all. It
// asks for a new disk then.
func (c *cluster) void(m *member, err error) bool {
	if fault.Is(err, fault.Denied) && m.asked.Load() {
		return true
	}
	if !errors.Is(err, replica.ErrRestoreLost) || m.leaving.Load() {
		return false
	}
	c.note("%s gets a new disk, as it asks for: %v", m.name, err)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.newDisk, c.voids = time.Now(), c.voids+1
	return true
}

// replaced reports whether a disk was replaced not long ago, or some node is down: a second loss would be one too many.
func (c *cluster) replaced() bool {
	for _, m := range c.members() {
		if !m.up() {
			return true
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.newDisk) < 90*time.Second {
		return true
	}
	c.newDisk = time.Now()
	return false
}

func (c *cluster) bad(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wrong = append(c.wrong, fmt.Sprintf(format, args...))
}

func (c *cluster) note(format string, args ...any) { c.logger("-").Info(fmt.Sprintf(format, args...)) }

func (c *cluster) start() error {
	for _, m := range c.founders {
		if err := m.start(); err != nil {
			return fmt.Errorf("start %s: %w", m.name, err)
		}
	}
	return nil
}

// leader is the member that leads, nil when none says so.
func (c *cluster) leader() *member {
	for _, m := range c.members() {
		if n := m.running(); n != nil && n.Replica().Role().Leader {
			return m
		}
	}
	return nil
}

// settled waits until every node that is up serves, and one leads.
func (c *cluster) settled(within time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	var errs []error
	for _, m := range c.members() {
		errs = append(errs, m.serves(ctx))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if c.leader() == nil {
		return errors.New("no node leads")
	}
	return nil
}

// serves waits until the node that runs here serves. It may become another one meanwhile, on a new disk.
func (m *member) serves(ctx context.Context) error {
	for {
		n := m.running()
		if n == nil {
			return nil
		}
		one, cancel := context.WithTimeout(ctx, time.Second)
		err := n.Wait(one)
		cancel()
		if err == nil || ctx.Err() != nil {
			return err
		}
	}
}

// stop ends every node, and waits for those that were killed.
func (c *cluster) stop() {
	var all sync.WaitGroup
	for _, m := range c.everywhere() {
		all.Go(func() { m.stop(m.running()) })
	}
	all.Wait()
	c.ghosts.Wait()
}
