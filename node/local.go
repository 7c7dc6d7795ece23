package node

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"rollcall/node/fault"
	"rollcall/node/replica"
	"rollcall/transport"
	"rollcall/transport/pki"
)

// LocalOptions say what a cluster in one process looks like.
type LocalOptions struct {
	// Nodes is how many, called node-1, node-2, …; default 3.
	Nodes int
	// Dir holds the nodes' data. Required; the caller removes it.
	Dir string
	// PluginDir is every node's plugin directory. Required.
	PluginDir string
	// Token is the first token; one is made when it is empty.
	Token string
	// HTTPListen gives the API's address of node i, from 0; default a free port of loopback.
	HTTPListen func(i int) string
	// Logger takes everything, with the node's name added.
	Logger *slog.Logger
	// Change is called for each node before it is made; may be nil.
	Change func(i int, cfg *Config, opt *Options)
}

// Local is a cluster of real nodes in one process, over loopback, with a certificate authority that lives in memory.
// dev, demo and the tests start the same one.
type Local struct {
	Token string
	// CA signs the nodes' certificates; tests use it to make strangers and friends.
	CA *pki.CA

	opt     LocalOptions
	mu      sync.Mutex
	node    []*Node // nil where a node is stopped
	cfg     []Config
	opts    []Options
	changed chan struct{} // closed when node changes
}

// StartLocal starts the nodes and returns when every one of them serves, or with the error of what is missing.
func StartLocal(ctx context.Context, opt LocalOptions) (*Local, error) {
	if opt.Nodes == 0 {
		opt.Nodes = 3
	}
	l := &Local{Token: opt.Token, opt: opt, node: make([]*Node, opt.Nodes), changed: make(chan struct{})}
	if l.Token == "" {
		l.Token = "rc." + rand.Text()
	}
	var err error
	if l.CA, err = pki.NewCA("rollcall local", 365*24*time.Hour); err != nil {
		return nil, err
	}
	for i := range opt.Nodes {
		if err = l.configure(i); err == nil {
			err = l.StartNode(ctx, i)
		}
		if err != nil {
			return nil, errors.Join(err, l.Stop(ctx))
		}
	}
	if err := l.Wait(ctx); err != nil {
		return nil, errors.Join(err, l.Stop(ctx))
	}
	return l, nil
}

// configure makes node i's configuration: kept, so that a restart is the same node.
func (l *Local) configure(i int) error {
	name := fmt.Sprintf("node-%d", i+1)
	creds, err := transport.Issue(l.CA, pki.Request{
		Role: pki.RoleNode, Name: name, DNSNames: []string{"localhost"},
		TTL: 365 * 24 * time.Hour,
	})
	if err != nil {
		return err
	}
	cfg := DefaultConfig()
	cfg.Name, cfg.DataDir, cfg.PluginDir = name, filepath.Join(l.opt.Dir, name), l.opt.PluginDir
	cfg.BootstrapExpect = min(l.opt.Nodes, 3)
	cfg.HTTP.Listen, cfg.Cluster.Listen = "127.0.0.1:0", "127.0.0.1:0"
	if l.opt.HTTPListen != nil {
		cfg.HTTP.Listen = l.opt.HTTPListen(i)
	}
	cfg.Join.Interval = 100 * time.Millisecond
	opt := Options{Logger: l.opt.Logger.With("node", name), Credentials: creds, Discovery: localPeers{l, i}, BootstrapToken: l.Token, NoSync: true}
	if l.opt.Change != nil {
		l.opt.Change(i, &cfg, &opt)
	}
	l.cfg, l.opts = append(l.cfg, cfg), append(l.opts, opt)
	return os.MkdirAll(cfg.DataDir, 0o700)
}

// StartNode starts node i, for the first time or again, and returns before it serves.
func (l *Local) StartNode(ctx context.Context, i int) error {
	l.mu.Lock()
	cfg, opt := l.cfg[i], l.opts[i]
	l.mu.Unlock()
	n, err := New(cfg, opt)
	if err != nil {
		return err
	}
	if err := n.Start(ctx); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.set(i, n)
	// The same ports for ever: clients and members find the node again.
	l.cfg[i].Cluster.Listen, l.cfg[i].HTTP.Listen = n.transport.Addr(), n.listener.Addr().String()
	return nil
}

// set changes who runs and tells those who look for peers. It is called with mu held.
func (l *Local) set(i int, n *Node) {
	l.node[i] = n
	close(l.changed)
	l.changed = make(chan struct{})
}

// localPeers is the discovery of node self in a local cluster: it simply knows who runs, where gossip would be told.
type localPeers struct {
	*Local
	self int
}

// Peers lists the other nodes that run.
func (p localPeers) Peers() []replica.Peer {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []replica.Peer
	for i, n := range p.node {
		if n != nil && i != p.self {
			out = append(out, replica.Peer{NodeID: n.ID(), Name: n.Name(), Address: n.transport.Addr()})
		}
	}
	return out
}

// Changed is closed when a node starts or stops.
func (p localPeers) Changed() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.changed
}

// StopNode stops node i gracefully.
func (l *Local) StopNode(ctx context.Context, i int) error {
	l.mu.Lock()
	n := l.node[i]
	if n != nil {
		l.set(i, nil)
	}
	l.mu.Unlock()
	if n == nil {
		return nil
	}
	return n.Stop(ctx)
}

// Node returns node i, nil while it is stopped.
func (l *Local) Node(i int) *Node {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.node[i]
}

// Nodes returns those that run.
func (l *Local) Nodes() []*Node {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []*Node
	for _, n := range l.node {
		if n != nil {
			out = append(out, n)
		}
	}
	return out
}

// Leader returns the node that leads, nil when none does at the moment.
func (l *Local) Leader() *Node {
	for _, n := range l.Nodes() {
		if n.replica.Role().Leader {
			return n
		}
	}
	return nil
}

// Addresses are the API's URLs of the running nodes.
func (l *Local) Addresses() []string {
	var out []string
	for _, n := range l.Nodes() {
		out = append(out, n.APIAddress())
	}
	return out
}

// Wait returns when every running node serves.
func (l *Local) Wait(ctx context.Context) error {
	for _, n := range l.Nodes() {
		if err := n.Wait(ctx); err != nil {
			return err
		}
	}
	if l.Leader() == nil {
		return fault.Text(fault.Unavailable, "no node leads")
	}
	return nil
}

// Stop stops every node, followers first, so that leadership moves at most once.
func (l *Local) Stop(ctx context.Context) error {
	leader := l.Leader()
	var errs []error
	for i := range l.opt.Nodes {
		if n := l.Node(i); n != nil && n != leader {
			errs = append(errs, l.StopNode(ctx, i))
		}
	}
	for i := range l.opt.Nodes {
		errs = append(errs, l.StopNode(ctx, i))
	}
	return errors.Join(errs...)
}
