package reload

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"rollcall/fsm"
	commandv1 "rollcall/proto/command/v1"
)

// sha makes a sha256 that can be told apart by eye.
func sha(c string) string { return strings.Repeat(c, 64) }

const (
	kv    = "00000000-0000-4000-8000-000000000001"
	other = "00000000-0000-4000-8000-000000000002"
)

// register enters version of plugin kv with the bytes of sha c.
func (s *sim) register(version, c string) {
	s.must(&commandv1.Command{Body: &commandv1.Command_RegisterPlugin{RegisterPlugin: &commandv1.RegisterPlugin{
		Spec: &commandv1.Spec{Type: "secret", Name: "kv", Version: version, Command: "kv", Sha256: sha(c)},
	}}})
}

func (s *sim) enable(uuid, path string) {
	s.must(&commandv1.Command{Body: &commandv1.Command_EnableMount{EnableMount: &commandv1.EnableMount{
		Uuid: uuid, Accessor: "acc_" + uuid[30:], Table: "secret", Path: path, Type: "kv", PluginType: "secret",
	}}})
}

func (s *sim) disable(path string) {
	s.must(&commandv1.Command{Body: &commandv1.Command_DisableMount{DisableMount: &commandv1.DisableMount{
		Table: "secret", Path: path,
	}}})
}

// startReload makes a global reload of the plugin, asked of n1.
func startReload(id string, o *commandv1.Options) *commandv1.StartReload {
	st := &commandv1.StartReload{
		Id: id, Selector: &commandv1.Selector{PluginType: "secret", Plugin: "kv"}, Scope: commandv1.Scope_SCOPE_GLOBAL,
		ServingNode: "n1", Options: o, RequestedBy: "test", LeaderId: "n1",
	}
	st.RequestHash = fsm.RequestHash(st)
	return st
}

func (s *sim) start(st *commandv1.StartReload) {
	s.t.Helper()
	s.must(&commandv1.Command{Body: &commandv1.Command_StartReload{StartReload: st}})
}

// cluster is a sim of nodes that run mount kv/ at version 1, with version 2 in the catalog.
func cluster(t *testing.T, nodes int) *sim {
	t.Helper()
	s := newSim(t, nodes)
	s.register("v1.0.0", "1")
	s.enable(kv, "kv/")
	s.settle(kv)
	s.register("v2.0.0", "2")
	return s
}

// settle waits until every running node serves what is wanted of it.
func (s *sim) settle(uuid string) {
	s.t.Helper()
	s.until("settle", time.Minute, func() bool {
		for _, n := range s.nodes {
			if n.up && !n.cut && !s.serves(n, uuid) {
				return false
			}
		}
		return true
	})
}

func (s *sim) serves(n *simNode, uuid string) bool {
	v := n.fsm.View()
	m := v.Mount(uuid)
	generation, ready := n.routes.Running(uuid)
	return m != nil && ready && generation == v.Wanted(m, n.id).GetGeneration()
}

// ended waits until the reload is over and nothing of it is left to do, and returns its record.
func (s *sim) ended(id string) *commandv1.Reload {
	s.t.Helper()
	s.until("end of "+id, 10*time.Minute, func() bool {
		rl := s.reload(id)
		return rl != nil && terminal(rl.GetPhase())
	})
	return s.reload(id)
}

func (s *sim) phase(rl *commandv1.Reload, want commandv1.Phase) {
	s.t.Helper()
	if rl.GetPhase() != want {
		s.t.Fatalf("%s is %v, want %v: %s", rl.GetId(), rl.GetPhase(), want, s.describe())
	}
}

// runs answers the first letter of the sha that the node's instance of the mount was started from; "" for none.
func (s *sim) runs(n *simNode, uuid string) string {
	if spec := n.routes.serving(uuid); spec != nil {
		return spec.GetSha256()[:1]
	}
	return ""
}

func (s *sim) allRun(uuid, want string) {
	s.t.Helper()
	for _, n := range s.nodes {
		if got := s.runs(n, uuid); n.up && got != want {
			s.t.Errorf("%s runs %q, want %q", n.id, got, want)
		}
	}
}

func ms(d time.Duration) int64 { return d.Milliseconds() }

// bubble runs f in virtual time.
func bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}
