package httpd

import (
	"bytes"
	"context"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"

	"rollcall/node/api"
	"rollcall/node/fault"
)

func (s *Server) clusterRoutes() []*route {
	read := func(h handler) map[operation]handler { return map[operation]handler{opRead: h} }
	return []*route{
		{
			pattern: "sys/health", quiet: true, access: open, anyNode: true, ops: map[operation]handler{opRead: s.health, opHead: s.health},
			summary: "Whether this node serves, as load balancers ask.",
		},
		{pattern: "sys/seal-status", quiet: true, access: open, anyNode: true, ops: read(s.sealStatus), summary: "Seal state and version."},
		{pattern: "sys/leader", quiet: true, access: open, anyNode: true, ops: read(s.leader), summary: "Who leads, as this node knows it."},
		{pattern: "sys/ha-status", rootOnly: true, anyNode: true, doubled: true, ops: read(s.haStatus), summary: "The nodes."},
		{
			pattern: "sys/step-down", rootOnly: true, access: withSudo, anyNode: true, ops: map[operation]handler{opUpdate: s.stepDown},
			summary: "Hand leadership to another node.",
		},
		{
			pattern: "sys/leave", rootOnly: true, access: withSudo, ours: true, anyNode: true, ops: map[operation]handler{opUpdate: s.leave},
			summary: "Take this node out of the cluster and stop it.",
		},
		{pattern: "sys/metrics", rootOnly: true, anyNode: true, ops: read(s.metrics), summary: "Metrics in the Prometheus text format."},
		{pattern: "sys/members", rootOnly: true, ours: true, anyNode: true, ops: read(s.members), summary: "The nodes, as Raft and gossip see them."},
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
	for _, param := range []string{
		"activecode", "standbycode", "drsecondarycode", "performancestandbycode", "haunhealthycode", "uninitcode", "sealedcode", "removedcode",
	} {
		if _, err := code(param, 0); err != nil { // a probe that is wrong shall not be found out by a failure
			return nil, err
		}
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
	body := map[string]any{
		"initialized": st.Initialized, "sealed": false, "standby": !st.IsLeader,
		"performance_standby": !st.IsLeader && serving == nil, "replication_performance_mode": "disabled",
		"replication_dr_mode": "disabled", "server_time_utc": time.Now().Unix(), "version": s.Version,
		"enterprise": false, "cluster_name": st.ClusterName, "cluster_id": st.ClusterID,
		"fenced": serving != nil, "node": s.NodeName,
	}
	if serving != nil {
		body["fenced_because"] = serving.Error()
	}
	if q.op == opHead {
		return &reply{status: status, raw: []byte{}, contentType: "application/json"}, nil
	}
	return &reply{status: status, bare: body}, nil
}

func (s *Server) sealStatus(*request) (*reply, error) {
	st, kind := s.Cluster.Status(), "none"
	if sealed := s.Cluster.Seal(); sealed != nil {
		kind = sealed.SealType
	}
	return &reply{bare: map[string]any{
		"type": kind, "initialized": st.Initialized, "sealed": false, "t": 0, "n": 0,
		"progress": 0, "nonce": "", "version": s.Version, "build_date": "", "migration": false,
		"cluster_name": st.ClusterName, "cluster_id": st.ClusterID, "recovery_seal": false, "storage_type": "raft",
	}}, nil
}

func (s *Server) leader(*request) (*reply, error) {
	st := s.Cluster.Status()
	return &reply{bare: map[string]any{
		"ha_enabled": true, "is_self": st.IsLeader, "active_time": st.LeaderSince.UTC(), "leader_address": st.LeaderAPIAddress,
		"leader_cluster_address": st.LeaderClusterAddress, "performance_standby": !st.IsLeader,
		"performance_standby_last_remote_wal": 0, "raft_committed_index": st.CommitIndex,
		"raft_applied_index": st.AppliedIndex,
	}}, nil
}

func (s *Server) initStatus(*request) (*reply, error) {
	return &reply{bare: map[string]any{"initialized": s.Cluster.Status().Initialized}}, nil
}

// membersByName are the members in the order that people look for them in.
func (s *Server) membersByName(ctx context.Context) ([]api.Member, error) {
	list, err := s.Cluster.Members(ctx)
	list = slices.Clone(list)
	slices.SortStableFunc(list, func(a, b api.Member) int { return strings.Compare(a.Name, b.Name) })
	return list, err
}

func (s *Server) haStatus(q *request) (*reply, error) {
	list, err := s.membersByName(q.ctx)
	if err != nil {
		return nil, err
	}
	nodes := []map[string]any{}
	for _, m := range list {
		nodes = append(nodes, map[string]any{
			"hostname": m.Name, "api_address": m.APIAddress,
			"cluster_address": m.ClusterAddress, "active_node": m.Leader, "last_echo": nil,
			"version": m.Version, "upgrade_version": "",
		})
	}
	return &reply{data: map[string]any{"nodes": nodes}}, nil
}

func (s *Server) members(q *request) (*reply, error) {
	list, err := s.membersByName(q.ctx)
	if err != nil {
		return nil, err
	}
	return &reply{data: map[string]any{"members": list}}, nil
}

func (s *Server) raftConfiguration(q *request) (*reply, error) {
	list, err := s.membersByName(q.ctx)
	if err != nil {
		return nil, err
	}
	servers := []map[string]any{}
	for _, m := range list {
		if m.Suffrage == "" {
			continue
		}
		servers = append(servers, map[string]any{
			"node_id": m.ID, "name": m.Name, "address": m.ClusterAddress,
			"leader": m.Leader, "protocol_version": "3", "voter": m.Suffrage == "voter",
		})
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

// metrics answers in Prometheus' text, or, asked for neither that nor text, as JSON gauges.
func (s *Server) metrics(q *request) (*reply, error) {
	if s.Gatherer == nil {
		return nil, fault.Text(fault.Invalid, "prometheus is not enabled")
	}
	families, err := s.Gatherer.Gather()
	if err != nil {
		return nil, fault.Wrap(err, "gather", "metrics")
	}
	format := q.body.str("format")
	if format == "json" || format == "" && q.http.Header.Get("X-Vault-Request") == "true" { // the stock clients read JSON only
		return &reply{bare: gauges(families)}, nil
	}
	var b bytes.Buffer
	text := expfmt.NewFormat(expfmt.TypeTextPlain)
	enc := expfmt.NewEncoder(&b, text)
	for _, f := range families {
		if err := enc.Encode(f); err != nil {
			return nil, fault.Wrap(err, "encode", "metrics")
		}
	}
	return &reply{raw: b.Bytes(), contentType: string(text)}, nil
}

// gauges are the simple metrics in the contract's JSON.
func gauges(families []*dto.MetricFamily) map[string]any {
	g, c := []any{}, []any{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			labels := map[string]string{}
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = l.GetValue()
			}
			switch f.GetType() {
			case dto.MetricType_GAUGE:
				g = append(g, map[string]any{"Name": f.GetName(), "Value": finite(m.GetGauge().GetValue()), "Labels": labels})
			case dto.MetricType_COUNTER:
				v := finite(m.GetCounter().GetValue())
				c = append(c, map[string]any{
					"Name": f.GetName(), "Count": 1, "Sum": v, "Min": v, "Max": v, "Mean": v, "Stddev": 0,
					"Rate": 0, "Labels": labels,
				})
			default: // histograms and summaries are in the text form
			}
		}
	}
	return map[string]any{
		"Timestamp": time.Now().UTC().Format("2006-01-02 15:04:05 +0000 UTC"), "Gauges": g, "Counters": c,
		"Points": []any{}, "Samples": []any{},
	}
}

// finite makes a number that JSON has.
func finite(v float64) float64 {
	if math.IsNaN(v) || math.IsInf(v, 0) {
		return 0
	}
	return v
}
