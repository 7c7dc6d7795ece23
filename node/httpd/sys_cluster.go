package httpd

import (
	"bytes"
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/common/expfmt"

	"rollcall/node/fault"
)

func (s *Server) clusterRoutes() []*route {
	read := func(h handler) map[operation]handler { return map[operation]handler{opRead: h} }
	return []*route{
		{pattern: "sys/health", access: open, anyNode: true, ops: map[operation]handler{opRead: s.health, opHead: s.health},
			summary: "Whether this node serves, as load balancers ask."},
		{pattern: "sys/seal-status", access: open, anyNode: true, ops: read(s.sealStatus), summary: "Seal state and version."},
		{pattern: "sys/leader", access: open, anyNode: true, ops: read(s.leader), summary: "Who leads, as this node knows it."},
		{pattern: "sys/init", access: open, anyNode: true, ops: read(s.initStatus), summary: "Whether the cluster is initialised."},
		{pattern: "sys/ha-status", anyNode: true, doubled: true, ops: read(s.haStatus), summary: "The nodes."},
		{pattern: "sys/storage/raft/configuration", anyNode: true, ops: read(s.raftConfiguration), summary: "The Raft configuration."},
		{pattern: "sys/storage/raft/remove-peer", access: withSudo, ops: map[operation]handler{opUpdate: s.removePeer},
			summary: "Take a node out of the cluster for good."},
		{pattern: "sys/step-down", access: withSudo, anyNode: true, ops: map[operation]handler{opUpdate: s.stepDown},
			summary: "Hand leadership to another node."},
		{pattern: "sys/leave", access: withSudo, ours: true, anyNode: true, ops: map[operation]handler{opUpdate: s.leave},
			summary: "Take this node out of the cluster and stop it."},
		{pattern: "sys/metrics", anyNode: true, ops: read(s.metrics), summary: "Metrics in the Prometheus text format."},
		{pattern: "sys/members", ours: true, anyNode: true, ops: read(s.members), summary: "The nodes, as Raft and gossip see them."},
	}
}

// health answers as the contract's table has it. A node without a serving lease is not healthy: it refuses plugin
// requests, and a load balancer must not send it any.
func (s *Server) health(q *request) (*reply, error) {
	query := q.http.URL.Query()
	code := func(param string, def int) (int, error) {
		v := query.Get(param)
		if v == "" {
			return def, nil
		}
		n, err := strconv.Atoi(v)
		if err != nil || n < 100 || n > 599 {
			return 0, fault.Text(fault.Invalid, "%s must be an HTTP status code", param)
		}
		return n, nil
	}
	flag := func(param string) (bool, error) {
		if !query.Has(param) {
			return false, nil
		}
		if query.Get(param) == "" {
			return true, nil
		}
		b, err := strconv.ParseBool(query.Get(param))
		if err != nil {
			return false, fault.Text(fault.Invalid, "%s must be a boolean", param)
		}
		return b, nil
	}
	st := s.Cluster.Status()
	serving := s.Replica.Serving()
	standbyOK, err := flag("standbyok")
	if err != nil {
		return nil, err
	}
	perfOK, err := flag("perfstandbyok")
	if err != nil {
		return nil, err
	}
	param, def := "activecode", http.StatusOK
	switch {
	case !st.Initialized:
		param, def = "uninitcode", http.StatusNotImplemented
	case serving != nil:
		param, def = "sealedcode", http.StatusServiceUnavailable
	case !st.IsLeader && perfOK:
		param, def = "", http.StatusOK
	case !st.IsLeader && standbyOK:
		param, def = "", http.StatusOK
	case !st.IsLeader:
		param, def = "performancestandbycode", 473
		if query.Get("performancestandbycode") == "" {
			param, def = "standbycode", http.StatusTooManyRequests
		}
	}
	status, err := code(param, def)
	if err != nil {
		return nil, err
	}
	body := map[string]any{"initialized": st.Initialized, "sealed": false, "standby": !st.IsLeader,
		"performance_standby": !st.IsLeader && serving == nil, "replication_performance_mode": "disabled",
		"replication_dr_mode": "disabled", "server_time_utc": time.Now().Unix(), "version": s.Version,
		"enterprise": false, "cluster_name": st.ClusterName, "cluster_id": st.ClusterID,
		"fenced": serving != nil, "node": s.NodeName}
	if serving != nil {
		body["fenced_because"] = serving.Error()
	}
	if q.op == opHead {
		return &reply{status: status, raw: []byte{}, contentType: "application/json"}, nil
	}
	return &reply{status: status, bare: body}, nil
}

func (s *Server) sealStatus(*request) (*reply, error) {
	st := s.Cluster.Status()
	return &reply{bare: map[string]any{"type": "none", "initialized": st.Initialized, "sealed": false, "t": 0, "n": 0,
		"progress": 0, "nonce": "", "version": s.Version, "build_date": "", "migration": false,
		"cluster_name": st.ClusterName, "cluster_id": st.ClusterID, "recovery_seal": false, "storage_type": "raft"}}, nil
}

func (s *Server) leader(*request) (*reply, error) {
	st := s.Cluster.Status()
	return &reply{bare: map[string]any{"ha_enabled": true, "is_self": st.IsLeader, "leader_address": st.LeaderAPIAddress,
		"leader_cluster_address": st.LeaderClusterAddress, "performance_standby": !st.IsLeader,
		"performance_standby_last_remote_wal": 0, "raft_committed_index": st.CommitIndex,
		"raft_applied_index": st.AppliedIndex}}, nil
}

func (s *Server) initStatus(*request) (*reply, error) {
	return &reply{bare: map[string]any{"initialized": s.Cluster.Status().Initialized}}, nil
}

func (s *Server) haStatus(q *request) (*reply, error) {
	list, err := s.Cluster.Members(q.ctx)
	if err != nil {
		return nil, err
	}
	nodes := []map[string]any{}
	for _, m := range list {
		nodes = append(nodes, map[string]any{"hostname": m.Name, "api_address": m.APIAddress,
			"cluster_address": m.ClusterAddress, "active_node": m.Leader, "last_echo": nil,
			"version": m.Version, "upgrade_version": ""})
	}
	return &reply{data: map[string]any{"nodes": nodes}}, nil
}

func (s *Server) members(q *request) (*reply, error) {
	list, err := s.Cluster.Members(q.ctx)
	if err != nil {
		return nil, err
	}
	return &reply{data: map[string]any{"members": list}}, nil
}

func (s *Server) raftConfiguration(q *request) (*reply, error) {
	list, err := s.Cluster.Members(q.ctx)
	if err != nil {
		return nil, err
	}
	servers := []map[string]any{}
	for _, m := range list {
		if m.Suffrage == "" {
			continue
		}
		servers = append(servers, map[string]any{"node_id": m.ID, "name": m.Name, "address": m.ClusterAddress,
			"leader": m.Leader, "protocol_version": "3", "voter": m.Suffrage == "voter"})
	}
	return &reply{data: map[string]any{"config": map[string]any{"servers": servers, "index": s.Cluster.Status().CommitIndex}}}, nil
}

func (s *Server) removePeer(q *request) (*reply, error) {
	id := q.body.str("server_id")
	if id == "" {
		return nil, fault.Text(fault.Invalid, "no server id provided")
	}
	if n := q.view.NodeByName(id); n != nil {
		id = n.GetId()
	}
	return nil, s.Cluster.RemoveMember(q.ctx, id)
}

func (s *Server) stepDown(q *request) (*reply, error) { return nil, s.Cluster.StepDown(q.ctx) }

func (s *Server) leave(q *request) (*reply, error) { return nil, s.Cluster.Leave(q.ctx) }

func (s *Server) metrics(*request) (*reply, error) {
	families, err := s.Gatherer.Gather()
	if err != nil {
		return nil, fault.Wrap(err, "gather", "metrics")
	}
	var b bytes.Buffer
	format := expfmt.NewFormat(expfmt.TypeTextPlain)
	enc := expfmt.NewEncoder(&b, format)
	for _, f := range families {
		if err := enc.Encode(f); err != nil {
			return nil, fault.Wrap(err, "encode", "metrics")
		}
	}
	return &reply{raw: b.Bytes(), contentType: string(format)}, nil
}
