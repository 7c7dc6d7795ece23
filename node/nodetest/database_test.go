package nodetest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"rollcall/node/api"
	"rollcall/node/fault"
)

// databaseCluster is a cluster with a database mount, and a directory that the demo plugin takes for a database.
type databaseCluster struct {
	*Cluster
	users string
}

// startDatabase starts n nodes with the demo database plugin in two versions, and a mount with two connections of it: a, which
// runs v1.0.0, and b, in a plugin that holds one connection a process.
func startDatabase(t *testing.T, n int) *databaseCluster {
	t.Helper()
	c := &databaseCluster{Cluster: Start(t, n, nil), users: t.TempDir()}
	if err := os.WriteFile(filepath.Join(c.users, ".password"), []byte("s3cr3t-root"), 0o600); err != nil {
		t.Fatal(err)
	}
	c.register("demo-db", "v1.0.0")
	c.register("single-db", "v1.0.0", "-single")
	if err := c.Client(0).Enable(t.Context(), "secret", "database", api.MountInput{Type: "database"}); err != nil {
		t.Fatalf("enable: %v", err)
	}
	c.Serving()
	c.write("database/config/a", map[string]any{
		"plugin_name": "demo-db", "allowed_roles": "app,broken,crash", "dir": c.users, "username": "root", "password": "s3cr3t-root",
		"connection_url": "demo://root:s3cr3t-root@example/db",
	})
	c.write("database/config/b", map[string]any{
		"plugin_name": "single-db", "allowed_roles": []string{"*"}, "dir": c.users, "password": "s3cr3t-root",
	})
	c.write("database/roles/app", map[string]any{"db_name": "a", "creation_statements": "CREATE", "default_ttl": "1h", "max_ttl": "2h"})
	c.write("database/roles/other", map[string]any{"db_name": "b", "creation_statements": []string{"CREATE"}})
	c.Serving()
	return c
}

func (c *databaseCluster) register(name, version string, args ...string) {
	c.t.Helper()
	c.Cluster.register(0, "database", name, api.RegisterRequest{
		SHA256: c.Sum, Version: version, Command: PluginCommand,
		Args: append([]string{pluginArg, "-database", "-version", version}, args...),
	})
}

// write writes through the last node: most often a follower.
func (c *databaseCluster) write(path string, data map[string]any) *api.Envelope {
	c.t.Helper()
	if data == nil {
		data = map[string]any{}
	}
	ctx, cancel := context.WithTimeout(c.t.Context(), time.Minute)
	defer cancel()
	env, err := c.Client(len(c.Nodes())-1).Write(ctx, path, data)
	if err != nil {
		c.t.Fatalf("write %s: %v", path, err)
	}
	return env
}

func (c *databaseCluster) refused(path string, data map[string]any, words string) {
	c.t.Helper()
	if data == nil {
		data = map[string]any{}
	}
	ctx, cancel := context.WithTimeout(c.t.Context(), time.Minute)
	defer cancel()
	_, err := c.Client(0).Write(ctx, path, data)
	if status := api.StatusOf(fault.KindOf(err)); err == nil || status >= 500 || !strings.Contains(err.Error(), words) {
		c.t.Errorf("write %s: %v; want a 4xx with %q", path, err, words)
	}
}

func decodeData(t testing.TB, env *api.Envelope, out any) {
	t.Helper()
	if err := json.Unmarshal(env.Data, out); err != nil {
		t.Fatalf("%v in %s", err, env.Data)
	}
}

type credentials struct{ Username, Password string }

// creds asks for credentials through node i.
func (c *databaseCluster) creds(ctx context.Context, i int, role string) (credentials, *api.Envelope, error) {
	var out credentials
	env, err := c.Client(i).Read(ctx, "database/creds/"+role, nil)
	if err == nil {
		err = json.Unmarshal(env.Data, &out)
	}
	return out, env, err
}

// userIs reports whether the database knows a user with this password.
func (c *databaseCluster) user(name string) string {
	raw, err := os.ReadFile(filepath.Join(c.users, name))
	if err != nil {
		return ""
	}
	return string(raw)
}

func TestADatabaseMountHoldsConnectionsAndLendsCredentials(t *testing.T) {
	c := startDatabase(t, 3)
	ctx := t.Context()

	mounts, err := c.Client(1).Mounts(ctx, "secret")
	if err != nil || len(mounts) != 1 || mounts["database/"].Type != "database" || mounts["database/"].PluginVersion != "" {
		t.Errorf("mounts: %v %+v", err, mounts)
	}
	for i := range c.Nodes() {
		list, err := c.Client(i).List(ctx, "database/config")
		if err != nil || string(list.Data) != `{"keys":["a","b"]}` {
			t.Errorf("list through node %d: %v %+v", i, err, list)
		}
		env, err := c.Client(i).Read(ctx, "database/config/a", nil)
		if err != nil || strings.Contains(string(env.Data), "s3cr3t-root") {
			t.Fatalf("config through node %d: %v %s", i, err, env.Data)
		}
		var got struct {
			Plugin  string         `json:"plugin_name"`
			Running string         `json:"running_plugin_version"`
			Roles   []string       `json:"allowed_roles"`
			Details map[string]any `json:"connection_details"`
		}
		decodeData(t, env, &got)
		if got.Plugin != "demo-db" || got.Running != "v1.0.0" || got.Details["username"] != "root" || len(got.Roles) != 3 ||
			got.Details["password"] != nil || got.Details["connection_url"] != "demo://root:*****@example/db" {
			t.Errorf("config through node %d: %s", i, env.Data)
		}
	}

	for i, role := range []string{"app", "other", "app"} {
		got, env, err := c.creds(ctx, i, role)
		if err != nil || env.LeaseID == "" || !env.Renewable {
			t.Fatalf("creds through node %d: %v %+v", i, err, env)
		}
		if !strings.HasPrefix(c.user(got.Username), got.Password+"\n") {
			t.Errorf("the database knows %q as %q", got.Username, c.user(got.Username))
		}
		before := c.user(got.Username)
		time.Sleep(1100 * time.Millisecond) // the database keeps whole seconds
		if _, err := c.Client(i).Write(ctx, "sys/leases/renew", map[string]any{"lease_id": env.LeaseID, "increment": "90m"}); err != nil {
			t.Errorf("renew: %v", err)
		}
		if role == "app" && c.user(got.Username) == before {
			t.Error("renewing a lease did not move the user's expiration")
		}
		if _, err := c.Client(i).Write(ctx, "sys/leases/revoke", map[string]any{"lease_id": env.LeaseID, "sync": true}); err != nil {
			t.Errorf("revoke: %v", err)
		}
		c.Eventually(10*time.Second, "the user to be gone", func() error {
			if c.user(got.Username) != "" {
				return errors.New("it is still there")
			}
			return nil
		})
	}

	c.refused("database/config/x", map[string]any{"plugin_name": "nah"}, "plugin not found in the catalog: nah")
	c.refused("database/config/x", map[string]any{"dir": c.users}, "empty plugin name")
	c.refused("database/config/x", map[string]any{"plugin_name": "demo-db"}, "dir cannot be empty")
	c.refused("database/config/x", map[string]any{"plugin_name": "demo-db", "dir": c.users, "password": "wrong"}, "access denied")
	c.refused("database/config/x", map[string]any{"plugin_name": "demo-db", "plugin_version": "v7.0.0", "dir": c.users}, "plugin not found in the catalog")
	c.refused("database/config/a", map[string]any{"password": "wrong"}, "access denied")
	c.refused("database/reset/nah", nil, `failed to find entry for connection with name: "nah"`)
	c.refused("database/rotate-root/a", nil, "root credentials are not rotated")
	c.refused("database/static-roles/x", map[string]any{"db_name": "a"}, "no static roles")
	c.write("database/config/x", map[string]any{"plugin_name": "demo-db", "dir": "/nowhere", "verify_connection": false})
	c.write("database/roles/broken", map[string]any{"db_name": "a", "creation_statements": "FAIL"})
	c.write("database/roles/denied", map[string]any{"db_name": "a", "creation_statements": "CREATE"})
	for role, words := range map[string]string{
		"nah": "unknown role", "denied": `"denied" is not an allowed role`, "broken": "syntax error in FAIL",
	} {
		if _, _, err := c.creds(ctx, 0, role); err == nil || !strings.Contains(err.Error(), words) {
			t.Errorf("creds/%s: %v", role, err)
		}
	}
	if _, err := c.Client(0).Delete(ctx, "database/config/x", nil); err != nil {
		t.Errorf("delete: %v", err)
	}
	if _, err := c.Client(2).Delete(ctx, "sys/mounts/database", nil); err != nil {
		t.Errorf("disable: %v", err)
	}
	c.Eventually(20*time.Second, "no process of the mount's connections", func() error {
		if got := c.PluginProcesses(); len(got) > 0 {
			return fmt.Errorf("%q", got)
		}
		return nil
	})
}

// credsLoad asks for credentials through every node until stop is called, which answers the failures.
func (c *databaseCluster) credsLoad(users int, role string) (stop func() (served int64, failures []string)) {
	ctx, cancel := context.WithCancel(c.t.Context())
	c.t.Cleanup(cancel)
	var wg sync.WaitGroup
	var mu sync.Mutex
	var failures []string
	var served atomic.Int64
	for i := range users {
		wg.Go(func() {
			for ctx.Err() == nil {
				// The client's own deadline: a request that hangs is a failure too.
				one, end := context.WithTimeout(context.WithoutCancel(ctx), 40*time.Second)
				got, _, err := c.creds(one, i%len(c.Nodes()), role)
				end()
				if err == nil && !strings.HasPrefix(c.user(got.Username), got.Password+"\n") {
					err = fmt.Errorf("the database does not know %q", got.Username)
				}
				if err != nil {
					mu.Lock()
					failures = append(failures, err.Error())
					mu.Unlock()
				}
				served.Add(1)
				time.Sleep(2 * think)
			}
		})
	}
	return func() (int64, []string) {
		cancel()
		wg.Wait()
		return served.Load(), failures
	}
}

func TestADatabasePluginIsReloadedEverywhereUnderLoadWithoutAFailedRequest(t *testing.T) {
	c := startDatabase(t, 3)
	c.register("demo-db", "v1.1.0")
	c.write("database/config/a2", map[string]any{
		"plugin_name": "demo-db", "plugin_version": "v1.0.0", "dir": c.users, "password": "s3cr3t-root",
	})
	stop := c.credsLoad(6, "app")

	plan, err := c.Client(1).Plan(t.Context(), api.PlanRequest{Plugin: "demo-db", Type: "database", Version: "v1.1.0"})
	if err != nil || !plan.OK || len(plan.Targets) != 2 {
		t.Fatalf("plan: %v %+v", err, plan)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	resp, _, err := c.Client(1).Reload(ctx, "database", api.ReloadRequest{Plugin: "demo-db", Scope: "global", Version: "v1.1.0"})
	if err != nil {
		t.Fatal(err)
	}
	rec, err := c.Client(2).WaitReload(ctx, resp.ReloadID, api.Watcher{})
	if err != nil || rec.Outcome != api.OutcomeSucceeded || len(rec.Targets) != 2 || len(rec.Nodes) != 3 {
		t.Fatalf("reload: %v %+v", err, rec)
	}
	var held, failed uint64
	for _, n := range rec.Nodes {
		for _, m := range n.Mounts {
			if m.Verdict != api.VerdictSwitched || m.From.Version != "v1.0.0" || m.To.Version != "v1.1.0" ||
				m.From.PID == 0 || m.To.PID == 0 || m.From.PID == m.To.PID || m.To.SHA256 != c.Sum {
				t.Errorf("%s: %+v", n.Node, m)
			}
			held, failed = held+m.Requests.Held, failed+m.Requests.Failed
		}
	}
	got, _, err := c.creds(t.Context(), 0, "app")
	if err != nil || !strings.Contains(got.Username, "v1.1.0") {
		t.Errorf("after the reload: %v %q", err, got.Username)
	}
	// The single-connection plugin of protocol 5, through /backend as Vault's client has it, and by its connection's path.
	for _, req := range []api.ReloadRequest{{Plugin: "single-db", Scope: "global"}, {Mounts: []string{"database/config/b"}, Scope: "global"}} {
		if rec := c.Reload(0, req); rec.Outcome != api.OutcomeSucceeded || len(rec.Targets) != 1 || len(rec.Nodes) != 3 {
			t.Errorf("reload %+v: %s %s %+v", req, rec.Outcome, rec.Why, rec.Targets)
		}
	}
	if rec := c.rollback(1, "demo-db"); rec.Outcome != api.OutcomeSucceeded {
		t.Errorf("rollback: %+v", rec)
	}
	if got, _, err = c.creds(t.Context(), 2, "app"); err != nil || !strings.Contains(got.Username, "v1.0.0") {
		t.Errorf("after the rollback: %v %q", err, got.Username)
	}
	// Reset and reload of the mount's own paths.
	c.write("database/reset/a", nil)
	var reloaded struct {
		Connections []string
		Count       int
	}
	decodeData(t, c.write("database/reload/demo-db", nil), &reloaded)
	if reloaded.Count != 2 || !slices.Equal(reloaded.Connections, []string{"a", "a2"}) {
		t.Errorf("reload of the mount's connections: %+v", reloaded)
	}
	served, failures := stop()
	if len(failures) > 0 || served < 20 {
		t.Errorf("%d of %d requests failed: %q", len(failures), served, failures)
	}
	t.Logf("%d requests, %d held and %d failed at the gate of the first reload", served, held, failed)
	c.runsWanted(t)
}

// runsWanted waits until every node runs what is wanted, for every mount, by one process each.
func (c *databaseCluster) runsWanted(t *testing.T) {
	t.Helper()
	c.Eventually(30*time.Second, "every node to run what is wanted", func() error {
		v, err := c.Client(0).Versions(t.Context())
		if err != nil {
			return err
		}
		connections := 0
		for _, m := range v.Mounts {
			for _, n := range m.Nodes {
				if !n.Same {
					return fmt.Errorf("%s on %s: %s %s", m.Mount, n.Node, n.State, n.Why)
				}
			}
			if m.Plugin != "database" {
				connections++
			}
		}
		if got := c.PluginProcesses(); len(got) != connections*len(c.Nodes()) {
			return fmt.Errorf("%d processes for %d connections: %q", len(got), connections, got)
		}
		return nil
	})
}

func TestOneNodeThatCannotRunADatabasePluginAbortsTheReloadOfAll(t *testing.T) {
	c := startDatabase(t, 3)
	stop := c.credsLoad(3, "app")
	for i, badness := range [][]string{
		{"-fail-on", "node-2", "-fail", "exit"},
		{"-fail-on", "node-3", "-fail", "setup"},
		{"-fail-on", "node-3", "-fail", "initialize"},
		{"-require", "tenant"},
	} {
		version := fmt.Sprintf("v2.%d.0", i)
		c.register("demo-db", version, badness...)
		rec := c.Reload(i%3, api.ReloadRequest{Plugin: "demo-db", Scope: "global", Version: version})
		if rec.Outcome != api.OutcomeAborted || rec.DecidedIndex != 0 {
			t.Errorf("%v: %s %+v", badness, rec.Outcome, rec.Nodes)
		}
		for _, n := range rec.Nodes {
			bad := len(badness) == 2 || n.Node == badness[1]
			if m := n.Mounts[0]; bad && len(badness) == 4 && (m.Verdict != api.VerdictRefused || m.Cause == "" || m.Phase == "") ||
				!bad && m.Verdict != api.VerdictUnchanged {
				t.Errorf("%v: %s has the verdict %q in %q: %s", badness, n.Node, m.Verdict, m.Phase, m.Cause)
			}
		}
	}
	// One connection whose config the plugin does not take keeps nobody else from being reloaded by the mount's own path.
	c.register("demo-db", "v3.0.0", "-require", "tenant")
	c.write("database/config/c", map[string]any{
		"plugin_name": "demo-db", "plugin_version": "v3.0.0", "dir": c.users, "password": "s3cr3t-root", "tenant": "t1",
	})
	env := c.write("database/reload/demo-db", nil)
	var got struct {
		Connections []string
		Count       int
	}
	decodeData(t, env, &got)
	if !slices.Equal(got.Connections, []string{"c"}) || got.Count != 1 || len(env.Warnings) != 1 || !strings.Contains(env.Warnings[0], "connection a") {
		t.Errorf("reload past a dead connection: %+v %q", got, env.Warnings)
	}
	if served, failures := stop(); len(failures) > 0 {
		t.Errorf("%d of %d requests failed: %q", len(failures), served, failures)
	}
	if got, _, err := c.creds(t.Context(), 0, "app"); err != nil || !strings.Contains(got.Username, "v1.0.0") {
		t.Errorf("what runs after all that: %v %q", err, got.Username)
	}
}

func TestDatabaseConnectionsFollowTheLeaderAndOutliveTheirProcesses(t *testing.T) {
	c := startDatabase(t, 3)
	old, before, err := c.creds(t.Context(), 0, "app")
	if err != nil {
		t.Fatal(err)
	}
	// The leader's process is killed: the next request waits for the one that takes its place.
	leader := c.Leader()
	pid := c.pidOf(t, "database/config/a/", leader.Name())
	if err := syscall.Kill(int(pid), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
	defer cancel()
	c.Eventually(30*time.Second, "credentials from the process after the one that was killed", func() error {
		_, _, err := c.creds(ctx, 1, "app")
		return err
	})
	c.Eventually(30*time.Second, "another process", func() error {
		if now := c.pidOf(t, "database/config/a/", leader.Name()); now == 0 || now == pid {
			return fmt.Errorf("pid %d", now)
		}
		return nil
	})
	// A plugin that dies while it makes a user: nobody knows whether there is one, and nobody makes a second.
	c.write("database/roles/crash", map[string]any{"db_name": "a", "creation_statements": "CRASH"})
	_, _, err = c.creds(ctx, 0, "crash")
	if !fault.Is(err, fault.OutcomeUnknown) || !strings.Contains(err.Error(), "may or may not") {
		t.Errorf("a crash while a user was made: %v", err)
	}
	// Another leader opens the connections; leases of before are revoked through it.
	for i, n := range c.Nodes() {
		if n == leader {
			if err := c.Client(i).StepDown(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	c.Eventually(30*time.Second, "another leader", func() error {
		if l := c.Leader(); l == nil || l == leader {
			return errors.New("not yet")
		}
		return nil
	})
	for i := range c.Nodes() {
		c.Eventually(30*time.Second, "credentials under the new leader", func() error {
			_, _, err := c.creds(ctx, i, "other")
			return err
		})
	}
	if _, err := c.Client(0).Write(t.Context(), "sys/leases/revoke", map[string]any{"lease_id": before.LeaseID, "sync": true}); err != nil {
		t.Errorf("revoke: %v", err)
	}
	c.Eventually(20*time.Second, "the user of before to be gone", func() error {
		if c.user(old.Username) != "" {
			return errors.New("it is still there")
		}
		return nil
	})
	c.runsWanted(t)
}

// pidOf is the process that a node runs for a mount.
func (c *databaseCluster) pidOf(t *testing.T, mount, node string) int64 {
	t.Helper()
	v, err := c.Client(0).Versions(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range v.Mounts {
		for _, n := range m.Nodes {
			if m.Mount == mount && n.Node == node && n.Running != nil {
				return n.Running.PID
			}
		}
	}
	return 0
}
