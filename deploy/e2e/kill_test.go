//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"rollcall/node/api"
)

// recovery is how long the nodes that live may take, after a kill in the middle of a reload, until they run what is
// wanted and the record says what happened.
const recovery = 30 * time.Second

// TestKillMidReloadLeavesTheLivingOnTheWantedGeneration kills the leader, and a follower, at several moments of a
// reload under load: as soon as it is accepted, while nodes prepare, when the switch is decided, and after the first switch.
func TestKillMidReloadLeavesTheLivingOnTheWantedGeneration(t *testing.T) {
	c := newCluster(t, options{})
	c.mountKV(kvOld)
	// Requests fail while there is no leader, and those in flight on the dead node: what counts is what is lost.
	l := startLoad(c, loadOptions{
		mount: "kv", writers: 4, hot: 2, readers: 3, pace: 20 * time.Millisecond,
		readPace: 50 * time.Millisecond, excused: func(*server) bool { return true },
	})
	version := kvOld
	for _, victim := range []string{"leader", "follower"} {
		for _, moment := range moments {
			t.Run(victim+", "+moment.name, func(t *testing.T) {
				version = map[string]string{kvOld: kvNew, kvNew: kvOld}[version]
				killMidReload(t, c, victim, moment, version)
			})
			if t.Failed() {
				return
			}
		}
	}
	s := l.stop()
	t.Log(s)
	if s.lost+s.backwards+s.staleReads > 0 {
		t.Errorf("%s\n%q", s, s.trouble)
	}
}

// moment is a point of a reload, seen in its record.
type moment struct {
	name string
	come func(*api.Reload) bool
}

var moments = []moment{
	{"accepted", func(*api.Reload) bool { return true }},
	{"a node has prepared", func(r *api.Reload) bool { return some(r, func(m api.ReloadMount) bool { return m.Prepared }) }},
	{"decided", func(r *api.Reload) bool { return r.DecidedIndex > 0 }},
	{"a node has switched", func(r *api.Reload) bool {
		return some(r, func(m api.ReloadMount) bool { return m.Verdict == api.VerdictSwitched })
	}},
}

func some(r *api.Reload, f func(api.ReloadMount) bool) bool {
	return slices.ContainsFunc(r.Nodes, func(n api.ReloadNode) bool { return slices.ContainsFunc(n.Mounts, f) })
}

func killMidReload(t *testing.T, c *cluster, victim string, m moment, version string) {
	leader := c.leader()
	dead := leader
	if victim == "follower" {
		dead = c.followers()[0]
	}
	witness := c.others(dead)[0]
	client := witness.client()
	out, _, err := client.Reload(timeout(t, long), "", api.ReloadRequest{Plugin: "kv", Version: version, Scope: "global"})
	if err != nil {
		t.Fatal(err)
	}
	until(t, long, m.name, func() error {
		rec, err := client.ReloadRecord(timeout(t, short), out.ReloadID, 0, 0)
		if err == nil && !m.come(rec) && !api.Ended(rec.Phase) {
			err = errors.New(rec.Phase)
		}
		return err
	})
	began := time.Now()
	dead.kill()

	var rec *api.Reload
	if err := within(recovery, func() (err error) {
		if rec, err = client.ReloadRecord(timeout(t, short), out.ReloadID, 0, 0); err != nil {
			return err
		}
		if !api.Ended(rec.Phase) {
			return fmt.Errorf("the reload is %s", rec.Phase)
		}
		return c.settled(c.live()...)
	}); err != nil {
		t.Fatalf("%s was killed; %s later: %v\n%s", dead.name, recovery, err, tell(rec))
	}
	took := time.Since(began)
	tellsTheTruth(t, c, rec, version)
	t.Logf("%s, the %s, was killed; %s later: %s (%s)", dead.name, victim, took.Round(time.Millisecond), rec.Outcome,
		part(rec, dead.name).Verdict)

	dead.start()
	c.serving()
	if rec.DecidedIndex > 0 {
		until(t, short, "the record says that "+dead.name+" follows", func() error {
			rec, err := client.ReloadRecord(timeout(t, short), out.ReloadID, 0, 0)
			if err != nil {
				return err
			}
			if v := part(rec, dead.name).Verdict; v != api.VerdictSwitched && v != api.VerdictConvergedLate {
				return fmt.Errorf("verdict %q\n%s", v, tell(rec))
			}
			if len(rec.Pending) > 0 {
				return fmt.Errorf("pending %v", rec.Pending)
			}
			return nil
		})
	}
	c.sameEverywhere(out.ReloadID)
}

// tellsTheTruth holds a record against what the live nodes run.
func tellsTheTruth(t *testing.T, c *cluster, rec *api.Reload, version string) {
	t.Helper()
	running := c.running("kv/")
	if rec.DecidedIndex == 0 {
		if rec.Outcome != api.OutcomeAborted || rec.Why == "" {
			t.Errorf("it was not decided for, and the record does not say why:\n%s", tell(rec))
		}
		for node, v := range running {
			if v == version {
				t.Errorf("%s runs %s although the reload was aborted", node, v)
			}
		}
		return
	}
	if rec.Outcome == api.OutcomeAborted || rec.Outcome == "" {
		t.Errorf("it was decided for, but the outcome is %q:\n%s", rec.Outcome, tell(rec))
	}
	for _, s := range c.live() {
		m := part(rec, s.name)
		if m.Verdict != api.VerdictSwitched && m.Verdict != api.VerdictConvergedLate || running[s.name] != version {
			t.Errorf("%s: verdict %q, and it runs %s; wanted %s:\n%s", s.name, m.Verdict, running[s.name], version, tell(rec))
		}
	}
	for _, s := range c.nodes {
		if m := part(rec, s.name); !s.alive() && m.Verdict != api.VerdictSwitched && rec.Outcome == api.OutcomeSucceeded {
			t.Errorf("%s is dead with verdict %q, and the outcome is %s:\n%s", s.name, m.Verdict, rec.Outcome, tell(rec))
		}
	}
}
