//go:build failpoints

package sim

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"rollcall/node/fault"
	"rollcall/node/nodetest/check"
	"rollcall/node/reload"
	commandv1 "rollcall/proto/command/v1"
)

// converge is how long the living, and later everybody, may take to come to one outcome.
const converge = 30 * time.Second

var errDead = fault.Text(fault.Unavailable, "this node was killed")

// Kill runs a cluster in virtual time under a light load, kills the case's victim at its moment of a reload, and starts it
// again: one outcome, the same on every node, and everybody on what was committed, both before and after the return. The
// client that asked gets one answer for its id, through whichever node. Result.Wrong says what was not so.
func Kill(t *testing.T, k Case, opt Options, dir string) *Result {
	t.Helper()
	opt.Clients, opt.For = 5, time.Minute
	res := &Result{Options: opt, Reloads: map[string]int{}, Faults: map[string]int{"kill": 1}}
	began := time.Now()
	log, alive := &journal{}, &pulse{}
	defer alive.watch(0, k.String())()
	synctest.Test(t, func(t *testing.T) {
		from := time.Now()
		c, err := newCluster(opt, dir, log.handler(from))
		if err != nil {
			t.Fatal(err)
		}
		c.alive = alive
		defer c.beat()()
		s := &sweep{cluster: c, at: k, op: c.newOperator(), id: "swept", old: versions[0], new: versions[1], patient: opt.Seed%3 == 0}
		if err := s.run(res); err != nil {
			c.bad("%v", err)
		}
		c.stop()
		res.Virtual = time.Since(from)
		c.leave()
		res.Wrong, res.Run = c.wrong, c.rec.Run()
	})
	res.Wall, res.Log = time.Since(began), log.bytes()
	return res
}

// sweep is one case on its cluster.
type sweep struct {
	*cluster
	at       Case
	op       *operator
	id       string
	old, new string
	// patient is a reload that does not leave a dead node out: it waits for it until its deadline, and is aborted then.
	patient bool
}

func (s *sweep) run(res *Result) error {
	s.rec.Describe(func(m *check.Meta) {
		m.Suite, m.Seed = "kill sweep", s.opt.Seed
		for _, k := range s.members() {
			m.Nodes = append(m.Nodes, k.name)
		}
	})
	if err := s.up(); err != nil {
		return err
	}
	defer s.probes()()
	s.startClients()
	stop := func() {
		close(s.ended)
		s.load.Wait()
	}
	outcome, err := s.killed()
	stop()
	if err != nil {
		return err
	}
	res.Reloads[outcome]++
	s.finals(s.op)
	s.whatRuns()
	return nil
}

// up boots the cluster and makes the mounts.
func (s *sweep) up() error {
	if err := s.start(); err != nil {
		return err
	}
	if err := s.settled(time.Minute); err != nil {
		return fmt.Errorf("the cluster does not come up: %w", err)
	}
	if err := s.op.prepare(); err != nil {
		return err
	}
	// Once more, into the history: where the reload is aborted, nothing else tells that these bytes may run.
	op, _ := s.op.call(check.Op{Kind: check.Register, Key: "secret/" + plugin + "/" + s.new, Input: hashOf(commandOf(s.new))},
		s.founders[0].name, http.MethodPut, "sys/plugins/catalog/secret/"+plugin, s.token, map[string]any{
			"version": s.new, "command": commandOf(s.new), "sha256": hashOf(commandOf(s.new)),
		})
	s.op.finish(op)
	return s.settled(time.Minute)
}

// killed is the case itself; it answers how the reload ended.
func (s *sweep) killed() (string, error) {
	leader := s.leader()
	victim := leader
	if s.at.Victim == Follower {
		for victim == leader {
			victim = s.members()[s.op.rng.IntN(len(s.members()))]
		}
	}
	died := make(chan func(), 1)
	disarm := s.at.Trigger(victim.name, leader.name, func() {
		healed := s.rec.Fault("kill", victim.name, s.at.String())
		victim.kill(false)
		died <- healed
	}, errDead)
	defer disarm()
	answered := make(chan error, 1)
	go func() { answered <- s.insist(victim) }()
	var healed func()
	select {
	case healed = <-died:
	case <-time.After(converge):
		return "", errors.Join(fmt.Errorf("%v was not reached", s.at), <-answered)
	}
	if err := <-answered; err != nil {
		return "", err
	}
	before, err := s.oneOutcome()
	if err != nil {
		return "", fmt.Errorf("without %s: %w", victim.name, err)
	}
	disarm() // it lives again
	if err := victim.restart(); err != nil {
		return "", fmt.Errorf("start %s again: %w", victim.name, err)
	}
	after, err := s.oneOutcome()
	if err != nil {
		return "", fmt.Errorf("after the return of %s: %w", victim.name, err)
	}
	healed()
	if before.GetPhase() != after.GetPhase() || before.GetGeneration() != after.GetGeneration() {
		return "", fmt.Errorf("%v (generation %d) became %v (%d) when %s returned", before.GetPhase(), before.GetGeneration(),
			after.GetPhase(), after.GetGeneration(), victim.name)
	}
	for _, m := range s.members() {
		if err := s.insist(m); err != nil {
			return "", fmt.Errorf("the same id through %s: %w", m.name, err)
		}
	}
	return after.GetOutcome(), nil
}

// insist asks for the reload through one node and then through the others, until it has an answer: this reload.
func (s *sweep) insist(first *member) error {
	body := map[string]any{"reload_id": s.id, "plugin": plugin, "scope": "global", "version": s.new, "exclude_fenced": !s.patient}
	raw, err := json.Marshal(body)
	if err != nil {
		return err
	}
	at, last := first, "nothing"
	for end := time.Now().Add(2 * converge); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		op, a := s.op.call(check.Op{Kind: check.Start, Key: s.id, Input: string(raw)}, at.name,
			http.MethodPut, "sys/plugins/reload/backend", s.token, body)
		op.Refused, op.Output = op.Status == http.StatusConflict, a.data("reload_id")
		s.op.finish(op)
		switch {
		case op.Outcome == check.OK && op.Output != s.id:
			return fmt.Errorf("asked for reload %s, answered with %s", s.id, op.Output)
		case op.Outcome == check.OK:
			return nil
		case op.Status == http.StatusConflict, op.Status == http.StatusBadRequest:
			return fmt.Errorf("asked for reload %s, refused: %s", s.id, op.Cause)
		}
		last = op.Cause
		at = s.member(s.op.any())
	}
	return fmt.Errorf("no answer for reload %s within %v; the last: %s", s.id, 2*converge, last)
}

// oneOutcome waits until every node that is up says the same of the reload, and runs what that means.
func (s *sweep) oneOutcome() (*commandv1.Reload, error) {
	from := time.Now()
	for {
		rl, err := s.look()
		if err == nil {
			return rl, nil
		}
		if time.Since(from) > converge {
			return nil, fmt.Errorf("%v later: %w", converge, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (s *sweep) look() (*commandv1.Reload, error) {
	var first *commandv1.Reload
	all := true
	for _, m := range s.members() {
		n := m.running()
		if n == nil {
			all = false
			continue
		}
		rl := n.State().View().Reload(s.id)
		switch {
		case rl == nil:
			return nil, fmt.Errorf("%s knows no reload %s", m.name, s.id)
		case rl.GetPhase() != commandv1.Phase_PHASE_DONE && rl.GetPhase() != commandv1.Phase_PHASE_ABORTED:
			return nil, fmt.Errorf("on %s the reload is %v", m.name, rl.GetPhase())
		case first == nil:
			first = rl
		case !proto.Equal(first, rl):
			return nil, fmt.Errorf("%s says otherwise than the others:\n%v\n%v", m.name, rl, first)
		}
	}
	committed := first.GetGeneration() > 0
	if committed != (first.GetPhase() == commandv1.Phase_PHASE_DONE) {
		return nil, fmt.Errorf("generation %d and phase %v", first.GetGeneration(), first.GetPhase())
	}
	version := s.old
	if committed {
		version = s.new
	}
	for _, m := range s.members() {
		if err := s.runs(m, version); err != nil {
			return nil, err
		}
	}
	if committed && all {
		return first, verdictsIn(first)
	}
	return first, nil
}

// verdictsIn is an error while somebody's verdict is missing.
func verdictsIn(rl *commandv1.Reload) error {
	for _, p := range rl.GetParticipants() {
		for _, o := range p.GetMounts() {
			if v := o.GetVerdict(); v != commandv1.Verdict_VERDICT_SWITCHED && v != commandv1.Verdict_VERDICT_CONVERGED_LATE {
				return fmt.Errorf("the verdict of %s is %v", p.GetName(), v)
			}
		}
	}
	return nil
}

// runs holds what a node runs against the state and the version: every mount, and not a process more.
func (s *sweep) runs(m *member, version string) error {
	n := m.running()
	if n == nil {
		return nil
	}
	if err := n.Replica().Serving(); err != nil {
		return fmt.Errorf("%s does not serve: %w", m.name, err)
	}
	v, running := n.State().View(), n.Reloads().Running()
	for _, r := range running {
		mount := v.Mount(r.MountUUID)
		if want := v.Wanted(mount, n.ID()); r.State != reload.StateReady || r.Generation != want.GetGeneration() || r.Spec.GetVersion() != version {
			return fmt.Errorf("%s runs %s of %s as generation %d (%s), wanted is generation %d of %s",
				m.name, r.Spec.GetVersion(), mount.GetPath(), r.Generation, r.State, want.GetGeneration(), version)
		}
		if len(mount.GetOverrides()) > 0 {
			return fmt.Errorf("%s: %s has overrides: %v", m.name, mount.GetPath(), mount.GetOverrides())
		}
	}
	l := m.plugins()
	l.mu.Lock()
	procs := len(l.procs)
	l.mu.Unlock()
	if procs != len(v.Mounts()) || len(running) != len(v.Mounts()) {
		return fmt.Errorf("%s has %d processes for %d mounts", m.name, procs, len(v.Mounts()))
	}
	return nil
}
