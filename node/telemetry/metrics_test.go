package telemetry

import (
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-metrics"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func gather(t *testing.T, g prometheus.Gatherer) map[string]float64 {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			switch {
			case m.GetCounter() != nil:
				out[f.GetName()] += m.GetCounter().GetValue()
			case m.GetGauge() != nil:
				out[f.GetName()] += m.GetGauge().GetValue()
			case m.GetSummary() != nil:
				out[f.GetName()] += float64(m.GetSummary().GetSampleCount())
			}
		}
	}
	return out
}

func bridge(t *testing.T) (*prometheus.Registry, func()) {
	t.Helper()
	reg := prometheus.NewRegistry()
	stop, err := BridgeLibraryMetrics(reg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	return reg, stop
}

func TestTwoNodesInOneProcessHaveRegistriesOfTheirOwn(t *testing.T) {
	a, b := NewRegistry("1.2.3"), NewRegistry("1.2.3")
	for _, reg := range []*prometheus.Registry{a, b} {
		got := gather(t, reg)
		for _, name := range []string{"rollcall_build_info", "go_goroutines", "process_open_fds"} {
			if got[name] == 0 {
				t.Errorf("%s is missing or 0", name)
			}
		}
		if problems, err := testutil.GatherAndLint(reg, "rollcall_build_info"); err != nil || len(problems) != 0 {
			t.Errorf("lint: %v %v", problems, err)
		}
	}
}

func TestLibraryMetricsReachEveryAttachedRegistryAndNoOther(t *testing.T) {
	a, stopA := bridge(t)
	metrics.IncrCounter([]string{"raft", "apply"}, 2)
	b, _ := bridge(t)
	metrics.IncrCounter([]string{"raft", "apply"}, 3)
	metrics.SetGauge([]string{"raft", "peers"}, 3)
	metrics.SetPrecisionGauge([]string{"raft", "precise"}, 7)
	metrics.MeasureSince([]string{"raft", "commitTime"}, time.Now())
	labels := []metrics.Label{{Name: "node_state", Value: "alive"}}
	metrics.SetGaugeWithLabels([]string{"memberlist", "node", "instances"}, 5, labels)
	metrics.AddSampleWithLabels([]string{"memberlist", "gossip"}, 1, labels)
	metrics.IncrCounterWithLabels([]string{"memberlist", "tcp", "accept"}, 1, labels)
	metrics.AddSample([]string{"raft", "boltdb", "logSize"}, 1)
	metrics.IncrCounter([]string{"somebody", "else"}, 1)

	for name, want := range map[string]float64{"raft_apply": 5, "raft_peers": 3, "raft_commitTime": 1} {
		if got := gather(t, a)[name]; got != want {
			t.Errorf("a: %s = %v, want %v", name, got, want)
		}
	}
	got := gather(t, b)
	for name, want := range map[string]float64{
		"raft_apply": 3, "raft_peers": 3, "raft_precise": 7, "raft_commitTime": 1, "memberlist_node_instances": 5,
		"memberlist_gossip": 1, "memberlist_tcp_accept": 1, "raft_boltdb_logSize": 1,
	} {
		if got[name] != want {
			t.Errorf("b: %s = %v, want %v", name, got[name], want)
		}
	}
	if _, ok := got["somebody_else"]; ok {
		t.Error("a metric of another library came through")
	}

	stopA()
	stopA() // twice is once
	metrics.IncrCounter([]string{"raft", "apply"}, 1)
	if got := gather(t, a); len(got) != 0 {
		t.Errorf("a still shows %v after its bridge was taken away", got)
	}
	if got := gather(t, b)["raft_apply"]; got != 4 {
		t.Errorf("b: raft_apply = %v, want 4", got)
	}
}

func TestTheLastBridgeLeavesNothingBehind(t *testing.T) {
	reg, stop := bridge(t)
	stop()
	metrics.IncrCounter([]string{"raft", "apply"}, 1)
	again, err := BridgeLibraryMetrics(reg) // the registry is free again
	if err != nil {
		t.Fatal(err)
	}
	defer again()
	if got := gather(t, reg); len(got) != 0 {
		t.Errorf("numbers from before the bridge: %v", got)
	}
}

func TestABridgeIsRefusedTwiceOnOneRegistry(t *testing.T) {
	reg, _ := bridge(t)
	if _, err := BridgeLibraryMetrics(reg); err == nil || !strings.Contains(err.Error(), "register library metrics") {
		t.Errorf("second bridge: %v", err)
	}
	metrics.IncrCounter([]string{"raft", "apply"}, 1)
	if got := gather(t, reg)["raft_apply"]; got != 1 {
		t.Errorf("raft_apply = %v after a refused bridge", got)
	}
}

func TestAttachingWhileLibrariesReportIsSafe(t *testing.T) {
	var wg sync.WaitGroup
	done := make(chan struct{})
	wg.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
				metrics.IncrCounter([]string{"raft", "apply"}, 1)
				metrics.MeasureSince([]string{"raft", "fsm", "apply"}, time.Now())
			}
		}
	})
	for range 20 {
		reg := prometheus.NewRegistry()
		stop, err := BridgeLibraryMetrics(reg)
		if err != nil {
			t.Error(err)
			break
		}
		gather(t, reg)
		stop()
	}
	close(done)
	wg.Wait()
}
