//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"rollcall/node/api"
)

// quick makes members vote soon after they have joined.
var quick = map[string]any{"autopilot.stabilization": "1s"}

// mountDemo registers two versions of the demo plugin and mounts the first at demo/.
func (c *cluster) mountDemo() {
	c.t.Helper()
	demo := c.install(demoName)
	for _, v := range []string{"v1.0.0", "v1.1.0"} {
		c.register("demo", v, demoName, demo, "demo-plugin", "-version", v)
	}
	c.mount("demo", "demo", "v1.0.0")
}

// put writes a key of the demo plugin through a node, and does not give up while it certainly did not run.
func (s *server) put(key, value string) {
	s.c.t.Helper()
	until(s.c.t, short, "write "+key+" through "+s.name, func() error {
		status, answer, err := s.c.send(timeout(s.c.t, short), s, http.MethodPut, "demo/data/"+key, fmt.Sprintf(`{"value":%q}`, value))
		if err == nil && status != http.StatusNoContent {
			err = fmt.Errorf("%d %s", status, answer)
		}
		return err
	})
}

// demoAnswer is what the demo plugin says of itself or of a key.
type demoAnswer struct {
	Data struct {
		Version string `json:"version"`
		Value   string `json:"value"`
		PID     int    `json:"pid"`
	} `json:"data"`
}

func (s *server) ask(ctx context.Context, path string) (demoAnswer, error) {
	var out demoAnswer
	status, answer, err := s.c.send(ctx, s, http.MethodGet, "demo/"+path, "")
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("%d %s", status, answer)
	}
	if err == nil {
		err = json.Unmarshal([]byte(answer), &out)
	}
	return out, err
}

// holds waits until a node answers a key with a value.
func (s *server) holds(key, value string) {
	s.c.t.Helper()
	until(s.c.t, short, s.name+" answers "+key, func() error {
		got, err := s.ask(timeout(s.c.t, short), "data/"+key)
		if err == nil && got.Data.Value != value {
			err = fmt.Errorf("value %q, wanted %q", got.Data.Value, value)
		}
		return err
	})
}

// never fails the test if, until the returned stop, a node answers with a version of the demo plugin.
func (s *server) never(version string) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			if got, err := s.ask(ctx, "info"); err == nil && got.Data.Version == version {
				s.c.t.Errorf("%s answered with %s (pid %d)", s.name, version, got.Data.PID)
				return
			}
			time.Sleep(time.Millisecond)
		}
	})
	return func() { cancel(); wg.Wait() }
}

// TestANodeThatWasDownConvergesLateAndSaysSo: killed or stopped, the node is named as pending, and when it returns it runs
// the new version before it answers anybody.
func TestANodeThatWasDownConvergesLateAndSaysSo(t *testing.T) {
	c := newCluster(t, options{})
	c.mountDemo()
	for i, how := range []struct {
		name    string
		end     func(*server)
		version string
	}{{"killed", (*server).kill, "v1.1.0"}, {"stopped", (*server).stop, "v1.0.0"}} {
		t.Run(how.name, func(t *testing.T) {
			was := map[string]string{"v1.1.0": "v1.0.0", "v1.0.0": "v1.1.0"}[how.version]
			down := c.followers()[i%2]
			how.end(down)
			rec := c.reload(c.live()[0], api.ReloadRequest{Plugin: "demo", Version: how.version})
			m := part(rec, down.name)
			if !slices.Contains(rec.Expected, down.name) || !slices.Contains(rec.Pending, down.name) ||
				m.Verdict != api.VerdictPendingDown || rec.Outcome != api.OutcomePartial {
				t.Errorf("%s is down, and the record does not say so:\n%s", down.name, tell(rec))
			}
			for _, s := range c.live() {
				if m := part(rec, s.name); m.Verdict != api.VerdictSwitched {
					t.Errorf("%s lives: verdict %q", s.name, m.Verdict)
				}
			}
			stop := down.never(was)
			down.start()
			c.serving()
			stop()
			if v := c.running("demo/")[down.name]; v != how.version {
				t.Errorf("%s runs %s after its return, wanted %s", down.name, v, how.version)
			}
			until(t, short, "the record says that "+down.name+" converged late", func() error {
				rec, err := c.any().ReloadRecord(timeout(t, short), rec.ID, 0, 0)
				if err == nil && (part(rec, down.name).Verdict != api.VerdictConvergedLate || len(rec.Pending) > 0) {
					err = errors.New(tell(rec))
				}
				return err
			})
			c.sameEverywhere(rec.ID)
		})
	}
}

// TestARestartedNodeCatchesUpByLogOrBySnapshot also kills all nodes at once: what was acknowledged is there afterwards.
func TestARestartedNodeCatchesUpByLogOrBySnapshot(t *testing.T) {
	for _, how := range []struct {
		name   string
		config map[string]any
		// installed: the node's log tells of a snapshot that another node sent.
		installed bool
	}{
		{"log", nil, false},
		{"snapshot", map[string]any{"raft.snapshot_threshold": 32, "raft.snapshot_interval": "300ms", "raft.trailing_logs": 16}, true},
	} {
		t.Run(how.name, func(t *testing.T) {
			c := newCluster(t, options{config: how.config})
			c.mountDemo()
			c.nodes[0].put("first", "one")
			down := c.followers()[0]
			down.kill()
			seen := len(down.log())
			for i := range 120 {
				c.live()[i%2].put(fmt.Sprintf("many/%d", i), fmt.Sprint(i))
			}
			rec := c.reload(c.live()[0], api.ReloadRequest{Plugin: "demo", Version: "v1.1.0"})
			if how.installed { // a snapshot is taken some time after the entries
				leader := c.leader()
				until(t, short, leader.name+" has taken a snapshot", func() error {
					if !strings.Contains(leader.log(), "compacting logs") {
						return errors.New("its log does not tell of any")
					}
					return nil
				})
			}
			down.start()
			c.serving()
			down.holds("first", "one")
			down.holds("many/119", "119")
			if v := c.running("demo/")[down.name]; v != "v1.1.0" {
				t.Errorf("%s runs %s", down.name, v)
			}
			if got := strings.Contains(down.log()[seen:], "nstalled remote snapshot"); got != how.installed {
				t.Errorf("a snapshot was sent to %s: %t, wanted %t", down.name, got, how.installed)
			}
			c.sameEverywhere(rec.ID)

			for _, s := range c.nodes {
				s.signal(syscall.SIGKILL)
			}
			for _, s := range c.nodes {
				_ = s.gone(short)
			}
			noPlugins(t, c.root, 2*time.Second, func(process) bool { return true })
			for _, s := range c.nodes {
				s.start()
			}
			c.serving()
			for _, s := range c.nodes {
				s.holds("first", "one")
				s.holds("many/119", "119")
			}
			c.sameEverywhere(rec.ID)
		})
	}
}

// TestANodeThatLeavesIsNotExpectedAnyMore: its process ends without an error, its plugins with it, and the others go on.
func TestANodeThatLeavesIsNotExpectedAnyMore(t *testing.T) {
	c := newCluster(t, options{nodes: 4, founders: 3, config: quick})
	c.mountDemo()
	for _, who := range []string{"follower", "leader"} {
		left := c.leader()
		if who == "follower" {
			left = c.followers()[0]
		}
		pid := left.pid()
		if r := c.cli([]*server{left}, "operator", "leave"); r.code != 0 {
			t.Fatalf("operator leave: exit code %d\n%s%s", r.code, r.out, r.errOut)
		}
		if err := left.gone(long); err != nil {
			t.Errorf("%s, the %s, ended with %v", left.name, who, err)
		}
		noPlugins(t, c.root, 2*time.Second, func(p process) bool { return p.host == pid })
		c.serving()
		until(t, short, left.name+" is no member of Raft", func() error {
			raft, err := c.any().RaftConfiguration(timeout(t, short))
			if err == nil && slices.ContainsFunc(raft.Servers, func(s api.RaftServer) bool { return s.Address == left.peer }) {
				err = fmt.Errorf("%+v", raft.Servers)
			}
			return err
		})
	}
	rec := c.reload(c.live()[0], api.ReloadRequest{Plugin: "demo", Version: "v1.1.0"})
	allSwitched(t, rec, "v1.1.0", c.live()...)
	if len(rec.Expected) != 2 {
		t.Errorf("expected %v", rec.Expected)
	}
	c.live()[0].put("after", "two")
	c.live()[1].holds("after", "two")
}

// TestAnEmptiedNodeTakesItsOwnPlaceAgain: the certificate says that it is the same node with a new disk. The old one is
// removed when it can no longer serve, and the new one gets everything.
func TestAnEmptiedNodeTakesItsOwnPlaceAgain(t *testing.T) {
	c := newCluster(t, options{config: quick})
	c.mountDemo()
	c.nodes[0].put("before", "one")
	for _, who := range []string{"follower", "leader"} {
		dead := c.leader()
		if who == "follower" {
			dead = c.followers()[0]
		}
		dead.kill()
		dead.replace()
		dead.start()
		c.serving()
		dead.holds("before", "one")
		until(t, long, dead.name+", which was the "+who+", votes under its new id", func() error {
			members, err := c.any().Members(timeout(t, short))
			voters := 0
			for _, m := range members {
				if m.Suffrage == "voter" {
					voters++
				}
			}
			if err == nil && (voters != 3 || len(members) != 3) {
				err = fmt.Errorf("%+v", members)
			}
			return err
		})
	}
	rec := c.reload(c.nodes[2], api.ReloadRequest{Plugin: "demo", Version: "v1.1.0"})
	allSwitched(t, rec, "v1.1.0", c.nodes...)
}

// TestTheSecondNodeOfANameIsRefusedAtTheDoor: while the first one lives, another data directory with its certificate
// does not get in, and the cluster does not notice.
func TestTheSecondNodeOfANameIsRefusedAtTheDoor(t *testing.T) {
	c := newCluster(t, options{config: quick})
	c.mountDemo()
	first := c.nodes[1]
	ports := freePorts(t, 3)
	twin := &server{
		c: c, name: first.name, dir: c.path("twin"), data: c.path("twin", "data"), plugins: first.plugins,
		config: c.path("twin", "config.json"), logFile: c.path("twin", "log"), sockets: "t",
		http: addr(ports[0]), peer: addr(ports[1]), gossip: addr(ports[2]),
	}
	if err := os.MkdirAll(twin.data, 0o700); err != nil {
		t.Fatal(err)
	}
	twin.configure(true)
	twin.start()
	t.Cleanup(func() {
		if twin.alive() {
			twin.stop()
		}
	})
	until(t, short, "its log says that the name is taken", func() error {
		text := twin.log()
		if !strings.Contains(text, "does not let this node in") || !strings.Contains(text, first.name) {
			return errors.New(tail(twin.logFile, 5))
		}
		return nil
	})
	if h, err := twin.client().Health(timeout(t, short)); err != nil || h.Initialized {
		t.Errorf("the second %s: %+v, %v", first.name, h, err)
	}
	rec := c.reload(c.nodes[0], api.ReloadRequest{Plugin: "demo", Version: "v1.1.0"})
	allSwitched(t, rec, "v1.1.0", c.nodes...)
}

// TestNodesFoundOneClusterInAnyOrder starts the founders one after the other and together, with a fourth node that only
// joins, and again after they were all stopped.
func TestNodesFoundOneClusterInAnyOrder(t *testing.T) {
	for _, order := range [][]int{{3, 2, 0, 1}, {1, 0, 3, 2}} {
		t.Run(fmt.Sprint(order), func(t *testing.T) {
			c := newCluster(t, options{nodes: 4, founders: 3, idle: true, config: quick})
			for i, n := range order {
				c.nodes[n].start()
				founders := 0
				for _, s := range c.live() {
					if s != c.nodes[3] {
						founders++
					}
				}
				if i+1 < len(order) && founders < 3 {
					c.unfounded()
				}
			}
			c.serving()
			id := c.oneCluster()
			for _, n := range order {
				c.nodes[n].stop()
			}
			for i := range order {
				c.nodes[order[len(order)-1-i]].start()
			}
			c.serving()
			if again := c.oneCluster(); again != id {
				t.Errorf("cluster %s is cluster %s after a restart", id, again)
			}
		})
	}
	t.Run("together, and one dies while they found it", func(t *testing.T) {
		c := newCluster(t, options{idle: true})
		for _, s := range c.nodes {
			s.start()
		}
		until(t, short, "somebody listens", func() error {
			_, err := c.nodes[2].client().Health(timeout(t, short))
			return err
		})
		c.nodes[2].kill()
		c.nodes[2].start()
		c.serving()
		c.oneCluster()
	})
}

// unfounded fails the test if, for a second and a half, the nodes that run found a cluster.
func (c *cluster) unfounded() {
	c.t.Helper()
	for end := time.Now().Add(1500 * time.Millisecond); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		for _, s := range c.live() {
			h, err := s.client().Health(timeout(c.t, short))
			if err == nil && h.Initialized {
				c.t.Fatalf("%d of 3 founders run, and %s is in cluster %s", len(c.live()), s.name, h.ClusterID)
			}
		}
	}
}

// oneCluster fails the test unless every node is in the same cluster, and returns its id.
func (c *cluster) oneCluster() string {
	c.t.Helper()
	var id string
	for _, s := range c.nodes {
		h, err := s.client().Health(timeout(c.t, short))
		if err != nil {
			c.t.Fatal(err)
		}
		if id == "" {
			id = h.ClusterID
		}
		if id == "" || h.ClusterID != id {
			c.t.Fatalf("%s is in cluster %q, another node in %q", s.name, h.ClusterID, id)
		}
	}
	return id
}

// TestANodeOfAnotherClusterIsNotTakenIn: a node with another cluster's authority is not let in, and says why it hears nothing.
func TestANodeOfAnotherClusterIsNotTakenIn(t *testing.T) {
	c := newCluster(t, options{config: quick})
	id := c.oneCluster()
	stranger := c.nodes[2]
	stranger.stop()
	other := filepath.Join(c.root, "other")
	c.run("tls", "all", "-dir", other, "-nodes", stranger.name)
	config, err := os.ReadFile(stranger.config)
	if err != nil {
		t.Fatal(err)
	}
	// Same gossip key, so that it finds the others; certificates that they do not know.
	changed := strings.NewReplacer(c.path("tls", "ca.pem"), filepath.Join(other, "ca.pem"),
		c.path("tls", stranger.name), filepath.Join(other, stranger.name)).Replace(string(config))
	if err := os.WriteFile(stranger.config, []byte(changed), 0o600); err != nil {
		t.Fatal(err)
	}
	stranger.replace()
	seen := len(stranger.log())
	stranger.start()
	until(t, short, "it says whom it cannot talk to", func() error {
		if text := stranger.log()[seen:]; !strings.Contains(text, "not trusted") || !strings.Contains(text, "authority") {
			return errors.New(tail(stranger.logFile, 5))
		}
		return nil
	})
	if h, err := stranger.client().Health(timeout(t, short)); err != nil || h.Initialized {
		t.Errorf("the stranger: %+v, %v", h, err)
	}
	if err := c.settled(c.others(stranger)...); err != nil {
		t.Error(err)
	}
	if h, err := c.nodes[0].client().Health(timeout(t, short)); err != nil || h.ClusterID != id {
		t.Errorf("%+v, %v", h, err)
	}
}

// TestANodeThatWasAsleepNeverAnswersForThePast stops a node in its tracks, as a paused machine does, and reloads without it.
// When it wakes, requests that wait for it are not answered by the version that the others have left behind.
func TestANodeThatWasAsleepNeverAnswersForThePast(t *testing.T) {
	c := newCluster(t, options{})
	c.mountDemo()
	version := "v1.0.0"
	for _, who := range []string{"follower", "leader"} {
		t.Run(who, func(t *testing.T) {
			was := version
			version = map[string]string{"v1.0.0": "v1.1.0", "v1.1.0": "v1.0.0"}[was]
			asleep := c.leader()
			if who == "follower" {
				asleep = c.followers()[0]
			}
			awake := c.others(asleep)
			asleep.signal(syscall.SIGSTOP)
			defer asleep.signal(syscall.SIGCONT)
			var out *api.ReloadResponse
			until(t, long, "the others take the reload", func() (err error) {
				out, _, err = c.clientOf(awake...).Reload(timeout(t, 10*time.Second), "", api.ReloadRequest{
					Plugin: "demo", Scope: "global", Version: version, ReloadID: "while-the-" + who + "-sleeps",
				})
				return err
			})
			rec := c.ended(c.clientOf(awake...), out.ReloadID)
			if m := part(rec, asleep.name); rec.Outcome != api.OutcomePartial || m.Verdict != api.VerdictPendingDown {
				t.Errorf("%s sleeps:\n%s", asleep.name, tell(rec))
			}
			for _, s := range awake {
				if got, err := s.ask(timeout(t, short), "info"); err != nil || got.Data.Version != version {
					t.Errorf("%s: %+v, %v", s.name, got, err)
				}
			}
			var stops []func()
			for range 8 { // these requests wait in its socket
				stops = append(stops, asleep.never(was))
			}
			time.Sleep(200 * time.Millisecond) // so that they are there when it wakes
			asleep.signal(syscall.SIGCONT)
			c.serving()
			for _, stop := range stops {
				stop()
			}
			until(t, short, "the record says that "+asleep.name+" converged late", func() error {
				rec, err := c.any().ReloadRecord(timeout(t, short), out.ReloadID, 0, 0)
				if err == nil && part(rec, asleep.name).Verdict != api.VerdictConvergedLate {
					err = errors.New(tell(rec))
				}
				return err
			})
		})
	}
}
