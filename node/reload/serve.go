package reload

import (
	"context"

	"rollcall/node/fault"
	peerv1 "rollcall/proto/peer/v1"
)

// maxReports bounds one ReportRequest, and maxTargets one PlanRequest or TrafficRequest.
const (
	maxReports = 10_000
	maxTargets = 10_000
)

// Server answers other nodes: register it as peerv1.ReloadServer on the cluster port.
func (r *Reloads) Server() peerv1.ReloadServer { return server{r: r} }

type server struct {
	peerv1.UnimplementedReloadServer
	r *Reloads
}

var _ peerv1.ReloadServer = server{}

// Report takes reports in where this node leads; elsewhere it is fault.NotLeader.
func (s server) Report(_ context.Context, req *peerv1.ReportRequest) (*peerv1.ReportResponse, error) {
	if len(req.GetReports()) > maxReports {
		return nil, fault.ToGRPC(fault.New(fault.TooLarge, "report", "", "more than %d reports", maxReports))
	}
	if err := s.r.accept(req.GetReports()); err != nil {
		return nil, fault.ToGRPC(err)
	}
	return &peerv1.ReportResponse{}, nil
}

// Traffic answers what this node measured.
func (s server) Traffic(_ context.Context, req *peerv1.TrafficRequest) (*peerv1.TrafficResponse, error) {
	if len(req.GetMountUuids()) > maxTargets {
		return nil, fault.ToGRPC(fault.New(fault.TooLarge, "traffic", "", "more than %d mounts", maxTargets))
	}
	return &peerv1.TrafficResponse{Mounts: s.r.traffic(req)}, nil
}

// Plan tries specs on this node.
func (s server) Plan(ctx context.Context, req *peerv1.PlanRequest) (*peerv1.PlanResponse, error) {
	if len(req.GetTargets()) > maxTargets {
		return nil, fault.ToGRPC(fault.New(fault.TooLarge, "plan", "", "more than %d targets", maxTargets))
	}
	reports, rss, err := s.r.Plan(ctx, req.GetTargets(), req.GetTrial())
	if err != nil {
		return nil, fault.ToGRPC(err)
	}
	return &peerv1.PlanResponse{Mounts: reports, RssBytes: rss}, nil
}

// Running answers what this node runs.
func (s server) Running(context.Context, *peerv1.RunningRequest) (*peerv1.RunningResponse, error) {
	res := &peerv1.RunningResponse{}
	for _, st := range s.r.Running() {
		m := &peerv1.RunningMount{
			MountUuid: st.MountUUID, Generation: st.Generation, Version: st.Spec.GetVersion(), Sha256: st.Spec.GetSha256(),
			Pid: int64(st.PID), State: string(st.State), Error: st.LastError, Ready: st.State == StateReady,
			Restarts: st.Restarts,
		}
		if !st.Started.IsZero() {
			m.StartedWallMs = st.Started.UnixMilli()
		}
		res.Mounts = append(res.Mounts, m)
	}
	return res, nil
}
