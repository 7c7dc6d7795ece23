package nodetest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"rollcall/node"
	"rollcall/node/api"
	commandv1 "rollcall/proto/command/v1"
)

var flagBadness = flag.String("badness", "slice", `how many nodes have a bad one among them: "slice" (3 and 5), or "all" (also 7)`)

// badness is a way in which a version cannot run, on one node of a cluster or on every one.
type badness struct {
	name string
	args []string
	// prepare puts the version's file in place and returns its command and sha256; bad is the bad node's number. Nil: the
	// test plugin's own.
	prepare func(b *badCluster, bad int) (command, sum string)
	// arm breaks the bad node for the time of the reload.
	arm func(b *badCluster, bad int) (disarm func())
	// everywhere says that no node can run it.
	everywhere bool
	words      string // of the cause
}

// badKinds are those that need no failpoints.
var badKinds = []badness{
	{name: "exit", args: []string{"-fail", "exit"}, words: "told to fail at its start"},
	{name: "hang", args: []string{"-fail", "hang"}, words: "2s"},
	{name: "setup", args: []string{"-fail", "setup"}, words: "told to fail in Setup"},
	{name: "initialize", args: []string{"-fail", "initialize"}, words: "told to fail in Initialize"},
	{name: "wrong sha256", prepare: (*badCluster).late, arm: (*badCluster).wrong, everywhere: true, words: "registered is"},
	{name: "missing everywhere", prepare: (*badCluster).missing, everywhere: true, words: "no peer gave it"},
	{name: "other CPU", prepare: (*badCluster).foreign, everywhere: true, words: "built for another machine"},
}

// badCluster is a cluster whose nodes have a plugin directory each.
type badCluster struct {
	*Cluster
	nodes int
	self  []byte
}

func startBad(t *testing.T, nodes int) *badCluster {
	t.Helper()
	b := &badCluster{nodes: nodes}
	b.Cluster = Start(t, nodes, func(i int, cfg *node.Config, _ *node.Options) {
		dir := filepath.Join(filepath.Dir(cfg.PluginDir), fmt.Sprintf("plugins-%d", i+1))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Link(filepath.Join(cfg.PluginDir, PluginCommand), filepath.Join(dir, PluginCommand)); err != nil {
			t.Fatal(err)
		}
		cfg.PluginDir, cfg.Plugins.StartTimeout = dir, 2*time.Second
	})
	var err error
	if b.self, err = os.ReadFile(filepath.Join(b.Plugins, PluginCommand)); err != nil {
		t.Fatal(err)
	}
	return b
}

// put writes a file into the plugin directory of node i.
func (b *badCluster) put(i int, name string, raw []byte) {
	b.t.Helper()
	file := filepath.Join(filepath.Dir(b.Plugins), fmt.Sprintf("plugins-%d", i+1), name)
	if err := os.WriteFile(file, raw, 0o755); err != nil {
		b.t.Fatal(err)
	}
}

func sumOf(raw []byte) string {
	sum := sha256.Sum256(raw)
	return hex.EncodeToString(sum[:])
}

// late: the file comes after it was registered, and is another one.
func (b *badCluster) late(int) (string, string) {
	return "late", sumOf([]byte("nothing has these bytes either"))
}

func (b *badCluster) wrong(int) func() {
	for i := range b.nodes {
		b.put(i, "late", b.self)
	}
	return func() {}
}

// replaced: the file of one node is another one than was registered.
func (b *badCluster) replaced(bad int) (string, string) {
	raw := append(append([]byte(nil), b.self...), "replaced"...)
	for i := range b.nodes {
		if i != bad {
			b.put(i, "replaced", raw)
		}
	}
	b.put(bad, "replaced", b.self)
	return "replaced", sumOf(raw)
}

// TestANodeWhoseFileWasReplacedGetsTheRegisteredBytesFromAPeer: what is in its plugin directory is not run, and does not
// keep it from following.
func TestANodeWhoseFileWasReplacedGetsTheRegisteredBytesFromAPeer(t *testing.T) {
	b := startBad(t, 3)
	b.Register("demo", "v1.0.0")
	b.Enable("demo", "demo", "v1.0.0")
	command, sum := b.replaced(2)
	b.register(0, "secret", "demo", api.RegisterRequest{
		SHA256: sum, Version: "v1.1.0", Command: command, Args: []string{pluginArg, "-version", "v1.1.0"},
	})
	if rec := b.Reload(2, api.ReloadRequest{Plugin: "demo", Scope: "global", Version: "v1.1.0"}); rec.Outcome != api.OutcomeSucceeded {
		t.Fatalf("%s (%s): %+v", rec.Outcome, rec.Why, rec.Nodes)
	}
	b.everyNodeSays(t, "v1.1.0")
}

// missing: it was registered, and is nowhere.
func (b *badCluster) missing(int) (string, string) {
	return "missing", sumOf([]byte("nothing has these bytes"))
}

// foreign: the program is for a CPU that this machine does not have.
func (b *badCluster) foreign(int) (string, string) {
	raw := append([]byte(nil), b.self...)
	raw[18], raw[19] = 0xf3, 0 // e_machine: RISC-V
	for i := range b.nodes {
		b.put(i, "foreign", raw)
	}
	return "foreign", sumOf(raw)
}

// TestOneBadNodeIsNamedAndNobodySwitches: whatever a trial can find, on one node of three, five and seven.
func TestOneBadNodeIsNamedAndNobodySwitches(t *testing.T) {
	sizes := []int{3, 5}
	if *flagBadness == "all" {
		sizes = append(sizes, 7)
	}
	for _, nodes := range sizes {
		t.Run(fmt.Sprint(nodes), func(t *testing.T) {
			b := startBad(t, nodes)
			b.Register("demo", "v1.0.0")
			b.Enable("demo", "demo", "v1.0.0")
			l := b.StartLoad("demo", 2, 2, nodes, 2*think)
			t.Cleanup(l.cancel)
			for i, k := range badKinds {
				t.Run(k.name, func(t *testing.T) { b.refuses(t, k, fmt.Sprintf("v2.%d.0", i), i%nodes) })
			}
			b.everyNodeSays(t, "v1.0.0")
			if problems := l.Stop(t.Context()); len(problems) > 0 {
				t.Error(problems)
			}
			b.Eventually(15*time.Second, "one process a node", func() error {
				if got := b.PluginProcesses(); len(got) != nodes {
					return fmt.Errorf("%q", got)
				}
				return nil
			})
		})
	}
}

// refuses reloads to a bad version through node i; the node after it is the bad one.
func (b *badCluster) refuses(t *testing.T, k badness, version string, i int) {
	number := (i + 1) % b.nodes
	bad := b.Node(number).Name()
	command, sum := PluginCommand, b.Sum
	if k.prepare != nil {
		command, sum = k.prepare(b, number)
	}
	args := []string{pluginArg, "-version", version}
	if k.args != nil {
		args = append(append(args, "-fail-on", bad), k.args...)
	}
	b.register(i, "secret", "demo", api.RegisterRequest{SHA256: sum, Version: version, Command: command, Args: args})
	if k.arm != nil {
		defer k.arm(b, number)()
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	resp, _, err := b.Client(i).Reload(ctx, "", api.ReloadRequest{Plugin: "demo", Scope: "global", Version: version})
	if err != nil {
		t.Fatal(err)
	}
	failed, ended := b.watchEnd(ctx, (number+1)%b.nodes, resp.ReloadID)
	rec, err := b.Client(i).WaitReload(ctx, resp.ReloadID, api.Watcher{})
	if err != nil || rec.Outcome != api.OutcomeAborted || rec.DecidedIndex != 0 {
		t.Fatalf("%v %+v", err, rec)
	}
	named := ended.Sub(failed)
	if failed.IsZero() || named > 2*time.Second {
		t.Errorf("named %v after the failure", named)
	}
	refused := 0
	for _, n := range rec.Nodes {
		m := n.Mounts[0]
		switch {
		case m.Verdict == api.VerdictRefused:
			refused++
			if m.Phase == "" || !strings.Contains(m.Cause, k.words) {
				t.Errorf("%s refuses in %q: %s; that does not say %q", n.Node, m.Phase, m.Cause, k.words)
			}
			if n.Node != bad && !k.everywhere {
				t.Errorf("%s refuses too: %s", n.Node, m.Cause)
			}
		case m.Verdict != api.VerdictUnchanged, n.Node == bad && !k.everywhere:
			t.Errorf("%s has the verdict %q", n.Node, m.Verdict)
		}
	}
	if refused == 0 {
		t.Errorf("nobody is named: %+v", rec.Nodes)
	}
	t.Logf("%d nodes, %s: named %v after the failure", b.nodes, k.name, named.Round(time.Millisecond))
}

// watchEnd waits until node i's state shows the end of a reload, and answers when the first refusal happened, by the clock
// of the node that refused, and when the end was there.
func (b *badCluster) watchEnd(ctx context.Context, i int, id string) (failed, ended time.Time) {
	state := b.Node(i).State()
	for {
		changed, rl := state.Changed(), state.View().Reload(id)
		if rl.GetPhase() == commandv1.Phase_PHASE_ABORTED || rl.GetPhase() == commandv1.Phase_PHASE_DONE {
			ended = time.Now()
			for _, p := range rl.GetParticipants() {
				r := p.GetMounts()[0].GetReport()
				if at := time.UnixMilli(r.GetWallMs()); r.GetStage() == commandv1.MountReport_STAGE_REFUSED && (failed.IsZero() || at.Before(failed)) {
					failed = at
				}
			}
			return failed, ended
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return failed, ended
		}
	}
}
