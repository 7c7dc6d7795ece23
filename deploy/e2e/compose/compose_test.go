//go:build compose

// Package compose tests docker-compose.yml as a newcomer uses it: up, the API of any node, a node that dies, a global
// reload without it, its return, and the same `up` again. It needs a Docker engine, docker-compose (or the compose
// plugin), and the image rollcall:dev that deploy/image builds.
package compose

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"rollcall/node/api"
)

// Ports and addresses of the test's own, beside a cluster that somebody has up: see docker-compose.yml.
const (
	project   = "rollcall-e2e"
	portsFrom = "1820"
	network   = "10.83.83"
)

// The plugin and its two versions, as deploy/plugins/build names the files.
const (
	oldVersion, newVersion = "v0.24.1", "v0.25.0"
	commandPrefix          = "kv-"
)

// cluster is the composed one.
type cluster struct {
	t       *testing.T
	compose []string
	token   string
}

// run runs a command in the repository's root and returns what it wrote to standard output.
func (c *cluster) run(limit time.Duration, name string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit) //nolint:usetesting // also used in a Cleanup
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = "../../.."
	cmd.Env = append(os.Environ(), "ROLLCALL_PORTS="+portsFrom, "ROLLCALL_NET="+network, "COMPOSE_PROJECT_NAME="+project)
	cmd.WaitDelay = 5 * time.Second
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.Bytes(), fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, stderr.String())
	}
	return stdout.Bytes(), nil
}

func (c *cluster) docker(args ...string) []byte {
	c.t.Helper()
	out, err := c.run(time.Minute, "docker", args...)
	if err != nil {
		c.t.Fatal(err)
	}
	return out
}

func (c *cluster) up() {
	c.t.Helper()
	if _, err := c.composed("up", "-d"); err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) composed(args ...string) ([]byte, error) {
	return c.run(2*time.Minute, c.compose[0], append(slices.Clone(c.compose[1:]), args...)...)
}

// container is the id of a service's container.
func (c *cluster) container(service string) string {
	c.t.Helper()
	// Not docker-compose ps: it takes a second.
	out, err := c.run(30*time.Second, "docker", "ps", "-aq", "--filter", "label=com.docker.compose.project="+project,
		"--filter", "label=com.docker.compose.service="+service)
	id := strings.TrimSpace(string(out))
	if err != nil || id == "" {
		c.t.Fatalf("container of %s: %q, %v", service, id, err)
	}
	return id
}

// file is one file out of a container. The image has no shell and no cat.
func (c *cluster) file(service, path string) []byte {
	c.t.Helper()
	archive := tar.NewReader(bytes.NewReader(c.docker("cp", c.container(service)+":"+path, "-")))
	if _, err := archive.Next(); err != nil {
		c.t.Fatalf("%s in %s: %v", path, service, err)
	}
	data, err := io.ReadAll(archive)
	if err != nil {
		c.t.Fatalf("%s in %s: %v", path, service, err)
	}
	return data
}

// until asks again until f says nil, and keeps the last error.
func until(t *testing.T, limit time.Duration, what string, f func() error) {
	t.Helper()
	began := time.Now()
	deadline := began.Add(limit)
	for {
		err := f()
		if err == nil {
			t.Logf("%s: after %s", what, time.Since(began).Round(10*time.Millisecond))
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s: %v", what, limit, err)
		}
		time.Sleep(250 * time.Millisecond)
	}
}

func (c *cluster) healthy(nodes ...int) {
	c.t.Helper()
	for _, n := range nodes {
		service := fmt.Sprintf("node-%d", n)
		until(c.t, 90*time.Second, service+" is healthy", func() error {
			out, err := c.run(10*time.Second, "docker", "inspect", "-f", "{{.State.Health.Status}}", c.container(service))
			if got := strings.TrimSpace(string(out)); err == nil && got != "healthy" {
				err = errors.New(got)
			}
			return err
		})
	}
}

// client talks to one node and to no other.
func (c *cluster) client(n int) *api.Client {
	c.t.Helper()
	client, err := api.New(api.Config{
		Addresses: []string{fmt.Sprintf("http://127.0.0.1:%s%d", portsFrom, n)}, Token: c.token, Timeout: 30 * time.Second,
	})
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(client.Close)
	return client
}

// composer is docker-compose, or the plugin where there is no such program.
func composer() []string {
	if _, err := exec.LookPath("docker-compose"); err != nil {
		return []string{"docker", "compose"}
	}
	return []string{"docker-compose"}
}

func start(t *testing.T) *cluster {
	c := &cluster{t: t, compose: composer()}
	down := func() error {
		_, err := c.composed("down", "-v", "--remove-orphans", "-t", "20")
		return err
	}
	if err := down(); err != nil { // of a run that was cut off
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			logs, _ := c.composed("logs", "--no-color", "--tail", "100")
			t.Logf("logs:\n%s", logs)
		}
		if err := down(); err != nil {
			t.Error(err)
		}
	})
	c.up()
	c.healthy(1, 2, 3)
	c.token = strings.TrimSpace(string(c.file("node-1", "/tls/token")))
	return c
}

// register puts one version of the plugin into the catalog, through the node given.
func (c *cluster) register(n int, version string) {
	c.t.Helper()
	command := commandPrefix + version
	sum := sha256.Sum256(c.file(fmt.Sprintf("node-%d", n), "/plugins/"+command))
	if _, err := c.client(n).RegisterPlugin(c.t.Context(), "secret", "kv", api.RegisterRequest{
		SHA256: hex.EncodeToString(sum[:]), Version: version, Command: command,
	}); err != nil {
		c.t.Fatal(err)
	}
}

// want reads a secret through each of the nodes.
func (c *cluster) want(key, value string, nodes ...int) {
	c.t.Helper()
	for _, n := range nodes {
		until(c.t, 20*time.Second, fmt.Sprintf("node-%d answers %s", n, key), func() error {
			env, err := c.client(n).Read(c.t.Context(), "kv/data/"+key, url.Values{})
			switch {
			case err != nil:
				return err
			case env == nil: // a follower may be an instant behind a write through another node
				return errors.New("nothing is there")
			case !strings.Contains(string(env.Data), value):
				return fmt.Errorf("data %s", env.Data)
			}
			return nil
		})
	}
}

func (c *cluster) put(n int, key, value string) {
	c.t.Helper()
	body := map[string]any{"data": map[string]string{"v": value}}
	until(c.t, 20*time.Second, fmt.Sprintf("node-%d takes %s", n, key), func() error {
		_, err := c.client(n).Write(c.t.Context(), "kv/data/"+key, body)
		return err
	})
}

// verdicts of a reload by node name, of its only mount.
func verdicts(r *api.Reload) map[string]string {
	out := map[string]string{}
	for _, n := range r.Nodes {
		for _, m := range n.Mounts {
			out[n.Node] = m.Verdict
		}
	}
	return out
}

func TestComposeUpgradesWithoutADeadNodeAndTakesItBack(t *testing.T) {
	c := start(t)
	c.register(1, oldVersion)
	if err := c.client(2).Enable(t.Context(), "secret", "kv", api.MountInput{
		Type: "kv", Options: map[string]string{"version": "2"},
		Config: &api.MountConfigInput{PluginVersion: oldVersion},
	}); err != nil {
		t.Fatal(err)
	}
	c.put(3, "before", "one")
	c.want("before", "one", 1, 2, 3)

	// The README's reload, asked of a follower or of the leader: any node will do.
	c.register(2, newVersion)
	began := time.Now()
	r := c.reload(3, oldVersion)
	for node, verdict := range verdicts(r) {
		if verdict != api.VerdictSwitched {
			t.Errorf("restart at the same version: %s: %s", node, verdict)
		}
	}
	t.Logf("a reload on three nodes took %s", time.Since(began).Round(time.Millisecond))

	c.docker("kill", c.container("node-2"))
	r = c.reload(1, newVersion)
	got := verdicts(r)
	if got["node-1"] != api.VerdictSwitched || got["node-3"] != api.VerdictSwitched || got["node-2"] == api.VerdictSwitched {
		t.Errorf("verdicts without node-2: %v (%s, %s)", got, r.Outcome, r.Why)
	}
	if !slices.Contains(r.Expected, "node-2") || r.Outcome == api.OutcomeSucceeded {
		t.Errorf("the dead node is not accounted for: expected %v, outcome %s", r.Expected, r.Outcome)
	}
	c.put(1, "without", "two")
	c.want("without", "two", 1, 3)

	c.up() // the same command as the first time
	c.healthy(1, 2, 3)
	c.want("before", "one", 2)
	c.want("without", "two", 2)
	until(t, 60*time.Second, "node-2 runs the new version, and says so", func() error {
		again, err := c.client(2).ReloadRecord(t.Context(), r.ID, 0, 0)
		if err != nil {
			return err
		}
		if v := verdicts(again)["node-2"]; v != api.VerdictConvergedLate {
			return fmt.Errorf("verdict %q", v)
		}
		return nil
	})
}

// reload starts a global reload through one node and follows it through the same.
func (c *cluster) reload(n int, version string) *api.Reload {
	c.t.Helper()
	client := c.client(n)
	var id string
	until(c.t, 30*time.Second, "the reload is taken", func() error {
		started, _, err := client.Reload(c.t.Context(), "", api.ReloadRequest{Plugin: "kv", Scope: "global", Version: version})
		if err == nil {
			id = started.ReloadID
		}
		return err
	})
	ctx, cancel := context.WithTimeout(c.t.Context(), 2*time.Minute)
	defer cancel()
	r, err := client.WaitReload(ctx, id, api.Watcher{})
	if err != nil {
		c.t.Fatal(err)
	}
	return r
}

func TestComposeStartsAgainWithWhatItHad(t *testing.T) {
	c := start(t)
	c.register(2, newVersion)
	if err := c.client(1).Enable(t.Context(), "secret", "kv", api.MountInput{
		Type: "kv", Options: map[string]string{"version": "2"},
	}); err != nil {
		t.Fatal(err)
	}
	c.put(1, "kept", "three")
	before, err := c.client(1).Health(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.composed("down", "-t", "20"); err != nil { // the volumes stay
		t.Fatal(err)
	}
	c.up()
	c.healthy(1, 2, 3)
	c.want("kept", "three", 1, 2, 3)
	after, err := c.client(3).Health(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if before.ClusterID == "" || before.ClusterID != after.ClusterID {
		t.Errorf("cluster %q is cluster %q now", before.ClusterID, after.ClusterID)
	}
	if token := strings.TrimSpace(string(c.file("node-1", "/tls/token"))); token != c.token {
		t.Error("the token changed")
	}
	for _, service := range []string{"node-1", "node-2", "node-3"} {
		out := string(c.docker("inspect", "-f", "{{.RestartCount}} {{.Config.User}} {{.HostConfig.ReadonlyRootfs}}", c.container(service)))
		if strings.TrimSpace(out) != "0 65532:65532 true" {
			t.Errorf("%s: restarts, user, read-only = %s", service, out)
		}
	}
}
