//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"rollcall/node/api"
)

// exits runs the command line against nodes and fails the test unless it ends with a code and says every word, in
// either of its outputs.
func (c *cluster) exits(code int, nodes []*server, args []string, words ...string) command {
	c.t.Helper()
	r := c.cli(nodes, args...)
	if r.code != code {
		c.t.Errorf("rollcall %s: exit code %d, wanted %d\n%s%s", strings.Join(args, " "), r.code, code, r.out, r.errOut)
	}
	for _, w := range words {
		if !strings.Contains(r.out+r.errOut, w) {
			c.t.Errorf("rollcall %s does not say %q:\n%s%s", strings.Join(args, " "), w, r.out, r.errOut)
		}
	}
	return r
}

func words(line string) []string { return strings.Fields(line) }

// TestTheCommandLineTakesAPluginFromItsFileToEveryNode types what the README types, with one dash as users of vault and
// bao do.
func TestTheCommandLineTakesAPluginFromItsFileToEveryNode(t *testing.T) {
	c := newCluster(t, options{config: patient})
	any, one := c.nodes, c.nodes[1:2]
	shaOld, shaNew := c.install("kv-"+kvOld), c.install("kv-"+kvNew)
	c.exits(0, one, words("plugin register -sha256="+shaOld+" -command=kv-"+kvOld+" -version="+kvOld+" secret kv"), "Success")
	c.exits(0, any, words("plugin register -sha256="+shaNew+" -command=kv-"+kvNew+" -version="+kvNew+" secret kv"), "Success")
	c.exits(0, one, words("plugin list secret"), "kv", kvOld, kvNew)
	c.exits(0, one, words("plugin info -version="+kvNew+" secret kv"), shaNew)
	c.exits(0, one, words("secrets enable -path=kv -version=2 -plugin-version="+kvOld+" kv"), "Success")
	c.serving()
	c.exits(0, one, words("secrets list"), "kv/", kvOld)
	c.exits(0, any, words("auth list"))
	secret := c.path("secret.json")
	if err := os.WriteFile(secret, []byte(`{"data":{"color":"blue"}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	until(t, short, "KV has prepared its storage", func() error {
		if r := c.cli(one, "write", "kv/data/app", "@"+secret); r.code != 0 {
			return errors.New(r.errOut)
		}
		return nil
	})
	c.exits(0, one, words("read kv/data/app"), "blue") // the node that took a write shows it at once
	c.exits(0, one, words("list kv/metadata"), "app")
	until(t, short, "every node shows it", func() error { // a moment later
		for _, s := range c.nodes {
			if r := c.cli([]*server{s}, "read", "kv/data/app"); r.code != 0 {
				return errors.New(s.name + ": " + r.errOut)
			}
		}
		return nil
	})

	// The reload: a line per event in a pipe, then the table, and exit code 0.
	r := c.exits(0, one, words("plugin reload -plugin=kv -scope=global -version="+kvNew),
		"node-1", "node-2", "node-3", "switched", kvOld, kvNew, "succeeded", "3 of 3")
	if strings.Contains(r.out, "\x1b") || strings.Contains(r.out, "\r") {
		t.Errorf("a pipe was painted: %q", r.out)
	}
	c.exits(0, any, words("plugin versions"), "kv/", kvNew)
	c.exits(0, any, words("read -field=data kv/data/app"), "blue")

	// In JSON, the record; with -wait=0 the id at once; the contract's status after that.
	var rec api.Reload
	r = c.exits(0, one, words("plugin reload -format=json -plugin=kv -scope=global -reload-id=mine -version="+kvOld))
	if err := json.Unmarshal([]byte(r.out), &rec); err != nil || rec.ID != "mine" || rec.Outcome != api.OutcomeSucceeded {
		t.Errorf("%v: %s", err, r.out)
	}
	c.exits(0, any, words("plugin reload -plugin=kv -scope=global -reload-id=mine -version="+kvOld), "succeeded") // the same again
	c.exits(2, any, words("plugin reload -plugin=kv -scope=global -reload-id=mine -version="+kvNew), "mine")      // another one under its id
	c.exits(0, any, words("plugin reload-status mine"), "node-1", "node-2", "node-3", "true")
	c.exits(0, any, words("reloads list"), "mine")
	c.exits(0, any, words("reloads show mine"), "switched")
	c.exits(0, any, words("plugin reload -mounts=kv/ -scope=global -wait=0 -reload-id=later"), "later")
	c.exits(0, any, words("reloads show -wait=1m later"), "succeeded")
	c.exits(0, one, words("plugin reload -plugin=kv"), "succeeded") // this node alone
	c.exits(0, any, words("plugin rollback -plugin=kv"), "succeeded")

	// What goes wrong has an exit code of its own.
	c.exits(1, any, words("plugin reload -scope=galaxy -plugin=kv"), "galaxy")
	c.exits(1, any, words("plugin reload"), "must specify exactly one of")
	c.exits(1, any, words("plugin reload -plugin=kv -no-such-flag"), "no-such-flag")
	c.exits(1, any, words("plugin frobnicate"), "frobnicate")
	c.exits(2, any, words("plugin reload -plugin=nope -scope=global"), `plugin not found in the catalog: "nope"`)
	c.exits(2, any, words("plugin register -sha256="+shaOld+" -command=../kv -version=v3.0.0 secret kv"), "..")
	c.exits(2, any, words("plugin reload-status nope"), "nope")
	c.exits(2, nil, words("status -address=http://127.0.0.1:1"), "127.0.0.1:1")
	c.exits(3, any, words("plugin reload -plugin=kv -scope=global -version="+c.broken(shaNew)), "refused", "aborted", "node-")
	c.exits(3, any, words("plugin plan -plugin=kv -version=v9.9.1"), "refused")

	down := c.followers()[0]
	down.stop()
	c.exits(4, c.live(), words("plugin reload -plugin=kv -scope=global -version="+kvNew), down.name, "pending (down)")
	c.exits(1, []*server{down}, words("healthcheck"), "unhealthy")
	c.exits(2, []*server{down}, words("plugin list"), "no node answers")
	down.start()
	c.serving()
	c.exits(0, []*server{down}, words("healthcheck"), "healthy", down.name)
	c.exits(0, any, words("plugin versions"), kvNew)

	c.exits(0, any, words("operator members"), "node-1", "node-2", "node-3", "leader")
	c.exits(0, any, words("operator raft list-peers"), "leader", "follower")
	c.exits(0, any, words("status"))
	c.exits(0, any, words("operator step-down"))
	c.serving()
	c.exits(0, any, words("delete kv/metadata/app"))
	c.exits(0, any, words("secrets tune -description=mine kv"))
	c.exits(0, any, words("secrets disable kv"), "Success")
	c.exits(0, any, words("plugin deregister -version="+kvOld+" secret kv"), "Success")
	c.exits(0, nil, words("version"), "rollcall")
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		c.exits(0, nil, []string{"completion", shell}, "rollcall")
	}
	c.environment()
}

// broken registers a version that does not start, and returns it.
func (c *cluster) broken(sha string) string {
	c.t.Helper()
	c.register("kv", "v9.9.1", "kv-"+kvNew, sha, "-no-such-flag")
	return "v9.9.1"
}

// environment checks which variables name the cluster: rollcall's own first, then OpenBao's, then Vault's.
func (c *cluster) environment() {
	c.t.Helper()
	for _, tc := range []struct {
		env  []string
		code int
	}{
		{[]string{"VAULT_ADDR=" + c.nodes[0].url(), "VAULT_TOKEN=" + c.token}, 0},
		{[]string{"BAO_ADDR=" + c.nodes[0].url(), "BAO_TOKEN=" + c.token, "VAULT_ADDR=http://127.0.0.1:1"}, 0},
		{[]string{"ROLLCALL_ADDR=" + c.nodes[0].url(), "ROLLCALL_TOKEN=" + c.token, "BAO_ADDR=http://127.0.0.1:1", "BAO_TOKEN=no"}, 0},
		{[]string{"ROLLCALL_ADDR=" + c.nodes[0].url(), "ROLLCALL_TOKEN=no", "VAULT_TOKEN=" + c.token}, 2},
		{[]string{"ROLLCALL_ADDR=" + c.nodes[0].url()}, 2},
	} {
		cmd := exec.Command(c.bin, "secrets", "list")
		cmd.Env = append([]string{"HOME=" + c.root, "PATH=" + os.Getenv("PATH")}, tc.env...)
		out, err := cmd.CombinedOutput()
		if code := cmd.ProcessState.ExitCode(); code != tc.code {
			c.t.Errorf("%v: exit code %d, wanted %d: %v\n%s", tc.env, code, tc.code, err, out)
		}
	}
}

// alone runs the binary without a cluster, below a directory of its own, and fails the test if a plugin is left.
func alone(t *testing.T, code int, args ...string) string {
	t.Helper()
	bin, err := rollcall()
	if err != nil {
		t.Fatal(err)
	}
	dir := shortDir(t)
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, bin, args...)
	cmd.Env = append(os.Environ(), "TMPDIR="+dir, "HOME="+dir)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err = cmd.Run()
	if got := cmd.ProcessState.ExitCode(); got != code {
		t.Errorf("rollcall %v: exit code %d, wanted %d (%v)\n%s", args, got, code, err, out.String())
	}
	noPlugins(t, dir, 2*time.Second, func(process) bool { return true })
	left, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(left) > 0 {
		t.Errorf("rollcall %v left %v, %v", args, left, err)
	}
	return out.String()
}

func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "e2e-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// TestTheDemoUpgradesThreeNodesAndLeavesNothing is the newcomer's first command.
func TestTheDemoUpgradesThreeNodesAndLeavesNothing(t *testing.T) {
	out := alone(t, 0, "demo")
	for _, want := range []string{"3 of 3 nodes", "switched", "v1.0.0", "v1.1.0", "failed: 0"} {
		if !strings.Contains(out, want) {
			t.Errorf("it does not say %q:\n%s", want, out)
		}
	}
	if rows := regexp.MustCompile(`(?m)^node-\d +switched `).FindAllString(out, -1); len(rows) != 3 {
		t.Errorf("%d rows say switched:\n%s", len(rows), out)
	}
	out = alone(t, 0, "demo", "-fail=node-2:start")
	for _, want := range []string{"refused", "node-2", "told to fail", "failed: 0"} {
		if !strings.Contains(out, want) {
			t.Errorf("-fail=node-2:start does not say %q:\n%s", want, out)
		}
	}
	alone(t, 1, "demo", "-fail=nonsense")
}

// TestDevStaysUntilItIsInterrupted takes address and token from what `rollcall dev` prints, as a user does.
func TestDevStaysUntilItIsInterrupted(t *testing.T) {
	bin, err := rollcall()
	if err != nil {
		t.Fatal(err)
	}
	dir := shortDir(t)
	cmd := exec.Command(bin, "dev", "-port=0")
	cmd.Env = append(os.Environ(), "TMPDIR="+dir, "HOME="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	file, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	cmd.Stdout, cmd.Stderr = file, file
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill() }()
	said := func() string {
		raw, err := os.ReadFile(file.Name())
		if err != nil {
			t.Fatal(err)
		}
		return string(raw)
	}
	exports := regexp.MustCompile(`(ROLLCALL_(?:ADDR|TOKEN))=(\S+)`)
	until(t, long, "it prints address and token", func() error {
		if len(exports.FindAllString(said(), -1)) < 2 {
			return errors.New(said())
		}
		return nil
	})
	env := append(os.Environ(), "HOME="+dir)
	for _, m := range exports.FindAllStringSubmatch(said(), -1) {
		env = append(env, m[1]+"="+m[2])
	}
	for _, line := range []string{"status", "operator members", "plugin versions", "plugin reload -plugin=demo -scope=global -version=v1.1.0"} {
		try := exec.Command(bin, strings.Fields(line)...)
		try.Env = env
		if out, err := try.CombinedOutput(); err != nil {
			t.Errorf("rollcall %s: %v\n%s", line, err, out)
		}
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("it ended with %v\n%s", err, said())
	}
	noPlugins(t, dir, 2*time.Second, func(process) bool { return true })
	if left, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(left) > 0 {
		t.Errorf("it left %v, %v", left, err)
	}
}
