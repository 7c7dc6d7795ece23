package node

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	"rollcall/fsm"
	"rollcall/node/failpoint"
	"rollcall/node/fault"
	"rollcall/node/gossip"
	"rollcall/node/httpd"
	"rollcall/node/policy"
	"rollcall/node/reload"
	"rollcall/node/replica"
	"rollcall/node/router"
	"rollcall/node/supervisor"
	"rollcall/node/telemetry"
	commandv1 "rollcall/proto/command/v1"
	peerv1 "rollcall/proto/peer/v1"
	"rollcall/transport"
)

// openReplicaDir takes the data directory's lock before anything else touches it.
func (n *Node) openReplicaDir() error {
	dir, err := replica.OpenDir(n.cfg.DataDir)
	if err != nil {
		return err
	}
	n.dir = dir
	failpoint.Called(dir.NodeID, n.cfg.Name)
	failpoint.Called(dir.Path, n.cfg.Name)
	n.life.did("data directory", func(context.Context) error { return dir.Close() })
	n.state = fsm.New()
	if n.opt.Witness != nil {
		if w := n.opt.Witness(dir.NodeID, dir.Incarnation); w != nil {
			n.state.Observe(w)
		}
	}
	return nil
}

func (n *Node) openLauncher() error {
	var err error
	n.launcher, err = n.opt.Launcher(Surroundings{
		NodeName: n.cfg.Name, Fetch: &contentClient{node: n}, Logger: n.component("supervisor"), Registerer: n.reg,
	})
	if err != nil {
		return err
	}
	n.life.did("supervisor", n.launcher.Close)
	return nil
}

// newSupervisor is the Launcher of every node but simulated ones.
func (n *Node) newSupervisor(at Surroundings) (Launcher, error) {
	sockets := n.cfg.SocketDir
	if own := filepath.Join(n.cfg.DataDir, "sockets"); sockets == "" && len(own) <= maxSocketDir && n.cfg.Plugins.UID == 0 {
		// Else the system's temporary directory: a socket's path has a limit, and another user's plugins cannot enter here.
		sockets = own
	}
	s, err := supervisor.New(supervisor.Config{
		PluginDir: n.cfg.PluginDir, DataDir: n.cfg.DataDir, SocketDir: sockets, StartTimeout: n.cfg.Plugins.StartTimeout,
		NodeName: at.NodeName, HostVersion: APIVersion, GoMemLimit: int64(n.cfg.Plugins.MemoryLimit), UID: uint32(n.cfg.Plugins.UID), GID: uint32(n.cfg.Plugins.GID),
		PassEnv: n.cfg.Plugins.EnvAllow, Cgroup: n.cfg.Plugins.Cgroup, Fetch: at.Fetch,
		Logger: at.Logger, Registerer: at.Registerer,
	})
	if err != nil {
		return nil, err
	}
	return plugins{s}, nil
}

func (n *Node) openRouter() error {
	var err error
	n.router, err = router.New(router.Config{
		NodeID: n.dir.NodeID, NodeName: n.cfg.Name, State: router.StateOf(n.state.View, n.state.Changed),
		Replica: routerReplica{n}, Peers: leaderConn{n}, MaxBody: int(n.cfg.HTTP.MaxBody),
		LeaderOnly: n.markLeaderOnly, Databases: databases{n}, Broken: n.endBroken, Leases: grants{n.leases}, Admit: n.admit,
		Logger: n.component("router"), Registerer: n.reg,
	})
	if err != nil {
		return err
	}
	n.life.did("router", n.router.Close)
	n.state.Observe(n.router)
	return nil
}

func (n *Node) openTransport() error {
	creds := n.opt.Credentials
	if creds == nil {
		var err error
		if creds, err = transport.LoadFiles(n.cfg.Cluster.CAFile, n.cfg.Cluster.CertFile, n.cfg.Cluster.KeyFile); err != nil {
			return err
		}
	}
	if got := creds.Identity().Name; got != n.cfg.Name {
		return fault.New(fault.Invalid, "check", "the cluster certificate",
			"it names node %q, but this node is called %q; make one with: rollcall tls cert -name %s", got, n.cfg.Name, n.cfg.Name)
	}
	var err error
	n.transport, err = transport.New(transport.Config{
		Listen: n.cfg.Cluster.Listen, Advertise: n.cfg.Cluster.Advertise, Network: n.opt.Network, Credentials: creds,
		NameOf: n.nameOfAddress, Logger: n.component("transport"), Registerer: n.reg,
	})
	if err != nil {
		return err
	}
	failpoint.Called(n.transport.Addr(), n.cfg.Name)
	n.creds = creds
	n.life.did("cluster port", n.transport.Close)
	return nil
}

func (n *Node) openReplica() error {
	var err error
	n.replica, err = replica.New(replica.Config{
		Dir: n.dir, Name: n.cfg.Name, ClusterAddress: n.transport.Addr(), APIAddress: n.APIAddress(), BuildVersion: Version,
		ClusterName: n.cfg.ClusterName, Voters: n.cfg.Raft.Voters, BootstrapExpect: uint32(n.cfg.BootstrapExpect),
		FSM: n.state, Stream: n.transport.Raft(), Dial: n.transport.Client, PeerName: peerName,
		Discovery: n.discovery, Announce: n.announce, NewCluster: n.newCluster,
		Converged: func() bool { return n.reloads.Converged() }, CanExpire: canExpire, OnFatal: n.fail,
		Lease: n.cfg.Lease.TTL, Heartbeat: n.opt.Heartbeat, Multiplier: n.cfg.Raft.PerformanceMultiplier,
		SnapshotThreshold: uint64(n.cfg.Raft.SnapshotThreshold), SnapshotInterval: cmp.Or(n.opt.SnapshotInterval, n.cfg.Raft.SnapshotInterval),
		TrailingLogs: uint64(n.cfg.Raft.TrailingLogs), PromoteAfter: n.cfg.Autopilot.Stabilization,
		RemoveDeadAfter: n.cfg.Autopilot.DeadServerThreshold, NoSync: n.opt.NoSync, Keys: n.keys, Disk: n.opt.Disk, Now: n.opt.Clock,
		Logger: n.component("replica"), Metrics: n.reg,
	})
	if err != nil {
		return err
	}
	n.life.did("replica's stores", n.replica.Stop)
	n.replica.Register(n.transport.Server())
	return nil
}

func (n *Node) openReloads() error {
	var err error
	n.reloads, err = reload.New(reload.Config{
		State: reload.StateOf(n.state.View, n.state.Changed), Plugins: withBuiltIn{n.launcher, n.router}, Routes: routes{n.router},
		Replica: reloadReplica{n.replica}, Peers: peers{n}, StartParallelism: n.cfg.Reload.StartParallelism,
		QueueDeadline: n.cfg.Reload.QueueDeadline, PrepareDeadline: n.cfg.Reload.PrepareDeadline,
		RunDeadline: n.cfg.Reload.RunDeadline, RetainFor: n.cfg.Reload.HistoryAge, Logger: n.component("reload"), Metrics: n.reg,
	})
	if err != nil {
		return err
	}
	n.state.Observe(restoredOnly{n.reloads})
	n.replica.LeaderContext(n.reloads.Lead)
	n.replica.LeaderContext(n.leases.Lead)
	n.replica.LeaderContext(n.saltAudit)
	server := n.transport.Server()
	peerv1.RegisterReloadServer(server, n.reloads.Server())
	peerv1.RegisterForwardServer(server, n.router.ForwardServer())
	peerv1.RegisterAccessServer(server, accessServer{n: n})
	peerv1.RegisterContentServer(server, &contentServer{
		store: n.launcher,
		specs: func(sha256 string) []*commandv1.Spec { return specsWith(n.state.View(), sha256) },
	})
	return nil
}

// openHTTP binds the API's port before the replica is made: its address goes into the node table.
func (n *Node) openHTTP() error {
	var gatherer prometheus.Gatherer
	if n.cfg.Telemetry.Prometheus {
		gatherer = n.reg
	}
	var err error
	var auditor httpd.Auditor
	if n.audit != nil {
		auditor = n.audit
	}
	n.door, err = httpd.New(httpd.Config{
		NodeID: n.dir.NodeID, NodeName: n.cfg.Name, Version: APIVersion, Started: n.since, State: n.state, Replica: n.replica,
		Router: pluginRoutes{n.router}, Plugins: &inventory{n}, Cluster: &cluster{n}, Leases: leases{n.leases},
		Policies: policy.NewEngine(), Audit: auditor, Names: n.names(), Gatherer: gatherer, Registerer: n.reg, Logger: n.component("http"),
	})
	if err != nil {
		return err
	}
	n.http = &http.Server{
		Handler: n.door.Handler(), ReadHeaderTimeout: 5 * time.Second, ReadTimeout: n.cfg.HTTP.ReadTimeout,
		IdleTimeout: n.cfg.HTTP.IdleTimeout, MaxHeaderBytes: 16 << 10,
		ErrorLog: telemetry.StdLog(n.component("http"), slog.LevelDebug),
	}
	n.http.RegisterOnShutdown(n.door.EndStreams)
	return nil
}

// names are those that a browser may call this node by, where only this machine can reach it: any other name that leads here was
// made to.
func (n *Node) names() []string {
	host, _, err := net.SplitHostPort(n.listener.Addr().String())
	if err != nil || !loopback(host) {
		return nil
	}
	names := []string{"localhost", n.cfg.Name}
	if u, err := url.Parse(n.APIAddress()); err == nil {
		names = append(names, u.Hostname())
	}
	return names
}

// bindHTTP opens the API's port. It comes early in New, so that a taken port is an error and not a surprise.
func (n *Node) bindHTTP() error {
	listener, err := n.opt.Network.Listen(n.cfg.HTTP.Listen)
	if err != nil {
		return fault.As(fault.Invalid, err, "listen on", "http.listen")
	}
	if cert := n.cfg.HTTP.TLSCertFile; cert != "" {
		conf, err := apiTLS(cert, n.cfg.HTTP.TLSKeyFile)
		if err != nil {
			return errors.Join(err, listener.Close())
		}
		listener = tls.NewListener(listener, conf)
	}
	n.listener = listener
	n.life.did("http port", func(context.Context) error {
		if err := listener.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			return err
		}
		return nil
	})
	return nil
}

// apiTLS reads the certificate again whenever its file changes, so that it rotates without a restart.
func apiTLS(certFile, keyFile string) (*tls.Config, error) {
	if _, err := tls.LoadX509KeyPair(certFile, keyFile); err != nil {
		return nil, fault.As(fault.Invalid, err, "load", "http.tls_cert_file and http.tls_key_file")
	}
	cached := &fileCertificate{cert: certFile, key: keyFile}
	return &tls.Config{
		MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cached.get() },
	}, nil
}

func (n *Node) startHTTP() error {
	go func() {
		if err := n.http.Serve(n.listener); err != nil && !errors.Is(err, http.ErrServerClosed) {
			n.fail(fault.Wrap(err, "serve", "http"))
		}
	}()
	return nil
}

// stopHTTP lets requests in flight finish; those that do not within the deadline are cut.
func (n *Node) stopHTTP(ctx context.Context) error {
	drain, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := n.http.Shutdown(drain); err != nil {
		return errors.Join(fault.Wrap(err, "drain", "http requests"), n.http.Close())
	}
	return nil
}

// openGossip makes discovery ready: memberlist, or what Options give in its place.
func (n *Node) openGossip() error {
	if n.opt.Discovery != nil {
		n.discovery = n.opt.Discovery
		return nil
	}
	key := n.opt.GossipKey
	if key == nil {
		text, err := readSecret(n.cfg.Gossip.KeyFile)
		if err != nil {
			return err
		}
		if key, err = base64.StdEncoding.DecodeString(text); err != nil || len(key) != 32 {
			return fault.New(fault.Invalid, "read", n.cfg.Gossip.KeyFile,
				"it must hold 32 bytes in base64; rollcall tls ca makes one")
		}
	}
	var err error
	n.gossip, err = gossip.New(gossip.Config{
		NodeID: n.dir.NodeID, Incarnation: n.dir.Incarnation, Name: n.cfg.Name, ClusterAddress: n.transport.Addr(),
		Listen: n.cfg.Gossip.Listen, Advertise: n.cfg.Gossip.Advertise, Label: n.cfg.ClusterName, SecretKey: key,
		RetryJoin: n.cfg.RetryJoin, BootstrapExpect: uint32(n.cfg.BootstrapExpect), Build: Version,
		Logger: n.component("gossip"), Metrics: n.reg,
	})
	if err != nil {
		return err
	}
	n.life.did("gossip port", n.gossip.Stop)
	n.discovery = gossipPeers{n.gossip}
	return nil
}

// newCluster makes the first entry when this node founds the cluster: with the hash of the first token.
func (n *Node) newCluster(id string) (*commandv1.InitCluster, error) {
	token := n.opt.BootstrapToken
	if token == "" && n.cfg.BootstrapTokenFile != "" {
		var err error
		if token, err = readSecret(n.cfg.BootstrapTokenFile); err != nil {
			return nil, err
		}
	}
	if token == "" {
		return nil, fault.New(fault.Invalid, "found cluster", n.cfg.ClusterName,
			"there is no first token: set bootstrap_token_file on every founding node")
	}
	return fsm.NewCluster(id, n.cfg.ClusterName, token), nil
}

// canExpire says whether ticks must flow: while a reload runs or waits, and while something has a TTL.
func canExpire(v *fsm.View) bool { return v.CanExpire() }

// peerName is what the certificate of an incoming call proves.
func peerName(ctx context.Context) (string, error) {
	id, ok := transport.PeerIdentity(ctx)
	if !ok {
		return "", fault.New(fault.Denied, "identify", "peer", "the call did not come over the cluster port")
	}
	return id.Name, nil
}

// nameOfAddress tells the transport which node must answer at a Raft address.
func (n *Node) nameOfAddress(address raft.ServerAddress) string {
	for _, row := range n.state.View().Nodes() {
		if row.GetClusterAddress() == string(address) && !row.GetLeft() {
			return row.GetName()
		}
	}
	return ""
}

// dialNode returns the shared connection to a member.
func (n *Node) dialNode(row *commandv1.Node) (grpc.ClientConnInterface, error) {
	return n.transport.Client(row.GetClusterAddress(), row.GetName())
}

func (n *Node) startGossip() error {
	if n.gossip == nil {
		return nil
	}
	return n.gossip.Start(context.Background()) // it ends with stopGossip, not with the start's context
}

func (n *Node) stopGossip(ctx context.Context) error {
	if n.gossip == nil {
		return nil
	}
	return n.gossip.Stop(ctx)
}

// announce puts into gossip what others may know of this node before they have talked to it.
func (n *Node) announce(f replica.SelfFacts) {
	if n.gossip != nil {
		n.gossip.Announce(gossip.Announcement{ClusterID: f.ClusterID, HasState: f.HasState})
	}
}

// markLeaderOnly moves a mount's reads to the leader, because one of them made a secret on a follower.
func (n *Node) markLeaderOnly(m *commandv1.Mount) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	_, err := n.replica.Propose(ctx, &commandv1.Command{WallMs: time.Now().UnixMilli(), Body: &commandv1.Command_MarkLeaderOnly{
		MarkLeaderOnly: &commandv1.MarkLeaderOnly{MountUuid: m.GetUuid()},
	}})
	if err != nil {
		n.log.Warn("mark mount as leader_only: a read on a follower made a secret", "mount", m.GetPath(), "error", err)
		return
	}
	n.log.Info("reads of this mount now run on the leader: one made a secret on a follower", "mount", m.GetPath())
}

// handOver returns when another node is known to lead.
func (n *Node) handOver(ctx context.Context) error {
	for {
		changed, role := n.replica.RoleChanged(), n.replica.Role()
		if !role.Leader && role.LeaderID != "" {
			return nil
		}
		if role.Leader {
			if err := n.replica.TransferLeadership(ctx); err != nil {
				return err
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fault.As(fault.Unavailable, context.Cause(ctx), "wait for", "another leader")
		}
	}
}

// endBroken ends the process of an instance that cannot be set up again after it lost track of its storage: only a new
// one helps, and node/reload starts it as after a crash.
func (n *Node) endBroken(mountUUID string, err error) {
	for _, s := range n.reloads.Running() {
		if s.MountUUID != mountUUID || s.PID == 0 {
			continue
		}
		n.log.Warn("end a plugin that cannot be set up again; a new process takes its place", "mount_uuid", mountUUID,
			"pid", s.PID, "error", err)
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		_ = n.launcher.Kill(ctx, s.PID)
		cancel()
	}
}

// leave takes this node out of the cluster: it stops to answer, ends its plugins, tells the log, gives its place in
// the Raft configuration up, and ends the process.
func (n *Node) leave() {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	_ = n.stopHTTP(ctx) // what does not finish in time is cut
	err := n.reloads.Stop(ctx)
	if err == nil {
		err = n.replica.Leave(ctx)
	}
	if err == nil {
		err = n.giveUpPlace(ctx)
	}
	if err != nil {
		n.log.Error("leave the cluster: it stops anyway; remove it from another node", "error", err)
	}
	n.fail(errLeft)
}

// giveUpPlace has the leader remove this node from the Raft configuration. The office may come back to this node in
// between, and the leader may change: then it asks again.
func (n *Node) giveUpPlace(ctx context.Context) error {
	for {
		err := n.handOver(ctx)
		if err == nil {
			if err = n.replica.RemoveMember(ctx, n.ID()); err == nil {
				return nil
			}
		}
		n.log.Info("not out of the cluster yet", "error", err)
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}
