// Package clients drives a cluster of the real binary with what its users already have: both Go client libraries, the
// calls that the stock commands send, and those of Terraform's provider. It is a module of its own, so that the
// product's stays small, and it knows nothing of what is inside.
//
//	cd deploy/e2e/clients && go vet ./... && go test ./...
//	E2E_BIN=/tmp/e2e-bin go test ./...    # keeps what was built for the next run
//	CLIENTS_DEV=/tmp/dev go test ./...    # uses the cluster of `rollcall dev -token=root -dir=/tmp/dev | tee /tmp/dev/welcome`
//
// Every scenario runs through every node, leader and followers alike, and what it saw must be the same through each.
package clients

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// repository is the root of the checkout, seen from this package.
const repository = "../../.."

// rootToken is the first token of the cluster.
const rootToken = "root"

// limit bounds one call of a client on a machine that has other things to do.
const limit = 60 * time.Second

// kvOld and kvNew are the two releases of Vault's KV engine that deploy/plugins builds.
const kvOld, kvNew = "v0.24.1", "v0.25.0"

// pluginFiles are what the tests register, as deploy/plugins/build calls them.
var pluginFiles = []string{"kv-" + kvOld, "kv-" + kvNew, "auth-jwt", "evil"}

// cluster is `rollcall dev`: three nodes in one process, over real listeners. All tests share one.
type cluster struct {
	nodes   []node
	plugins string // the directory that all nodes take plugins from
	sums    map[string]string

	cmd  *exec.Cmd
	done chan struct{} // closed when the process has ended
	out  *output
}

type node struct{ name, addr string }

var shared *cluster

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) (code int) {
	dir, err := os.MkdirTemp("", "clients-")
	if err != nil {
		fmt.Fprintln(os.Stderr, "make a directory:", err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	for _, k := range []string{"VAULT", "BAO", "ROLLCALL"} { // the libraries read what their users have set
		for _, v := range []string{"ADDR", "TOKEN", "NAMESPACE", "CACERT", "AGENT_ADDR", "CLIENT_TIMEOUT", "MAX_RETRIES", "WRAP_TTL"} {
			_ = os.Unsetenv(k + "_" + v)
		}
	}
	if shared, err = start(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	code = m.Run()
	if err := shared.stop(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	return code
}

// start builds the binary and the plugins, and runs `rollcall dev` until stop.
func start(dir string) (*cluster, error) {
	bin := os.Getenv("E2E_BIN")
	if bin == "" {
		bin = filepath.Join(dir, "bin")
	}
	bin, err := filepath.Abs(bin)
	if err != nil {
		return nil, err
	}
	dev := cmp.Or(os.Getenv("CLIENTS_DEV"), filepath.Join(dir, "dev"))
	c := &cluster{plugins: filepath.Join(dev, "plugins"), sums: map[string]string{}, done: make(chan struct{}), out: &output{}}
	rollcall, built := filepath.Join(bin, "rollcall"), filepath.Join(bin, "plugins")
	if os.Getenv("CLIENTS_DEV") == "" {
		if err := build("go", "build", "-o", rollcall, "./cmd/rollcall"); err != nil {
			return nil, err
		}
	}
	for _, name := range pluginFiles {
		if _, err := os.Stat(filepath.Join(built, name)); err == nil {
			continue
		}
		if err := build("deploy/plugins/build", built, name); err != nil {
			return nil, err
		}
	}
	if os.Getenv("CLIENTS_DEV") == "" {
		err = c.dev(rollcall, dev)
	} else if text, rerr := os.ReadFile(filepath.Join(dev, "welcome")); rerr == nil {
		_, _ = c.out.Write(text)
	} else {
		err = rerr
	}
	if err == nil {
		err = c.welcome()
	}
	if err != nil {
		return nil, errors.Join(err, c.stop())
	}
	for _, name := range pluginFiles {
		if c.sums[name], err = install(filepath.Join(built, name), filepath.Join(c.plugins, name)); err != nil {
			return nil, errors.Join(err, c.stop())
		}
	}
	return c, nil
}

// dev starts the cluster's process.
func (c *cluster) dev(rollcall, dir string) error {
	c.cmd = exec.Command(rollcall, "dev", "-port", "0", "-token", rootToken, "-dir", dir)
	c.cmd.Stdout, c.cmd.Stderr = c.out, c.out
	c.cmd.WaitDelay = 5 * time.Second
	if err := c.cmd.Start(); err != nil {
		return err
	}
	go func() {
		_ = c.cmd.Wait() // how it ended is seen in ProcessState
		close(c.done)
	}()
	return nil
}

func build(name string, args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 12*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = repository
	cmd.WaitDelay = 5 * time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %v: %w\n%s", name, args, err, out)
	}
	return nil
}

// nodeLine is a node in what `rollcall dev` says when it serves.
var nodeLine = regexp.MustCompile(`(?m)^ +(node-\d+) +(http://\S+)(?: +\(leads\))?$`)

// welcome waits until dev says that its nodes serve, and reads where.
func (c *cluster) welcome() error {
	deadline := time.After(2 * time.Minute)
	for {
		text := c.out.String()
		if strings.Contains(text, "Ctrl-C stops everything") {
			for _, m := range nodeLine.FindAllStringSubmatch(text, -1) {
				c.nodes = append(c.nodes, node{name: m[1], addr: m[2]})
			}
			if len(c.nodes) != 3 {
				return fmt.Errorf("rollcall dev told of %d nodes:\n%s", len(c.nodes), text)
			}
			return nil
		}
		select {
		case <-c.done:
			return fmt.Errorf("rollcall dev ended (%v):\n%s", c.cmd.ProcessState, c.out.String())
		case <-deadline:
			return fmt.Errorf("rollcall dev does not serve:\n%s", text)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// stop ends the process as Ctrl-C does, and says so when that does not work.
func (c *cluster) stop() error {
	if c.cmd == nil || c.cmd.Process == nil {
		return nil
	}
	select {
	case <-c.done:
		return fmt.Errorf("rollcall dev had ended (%v):\n%s", c.cmd.ProcessState, c.out.String())
	default:
	}
	_ = c.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-c.done:
	case <-time.After(time.Minute):
		_ = c.cmd.Process.Kill()
		<-c.done
		return fmt.Errorf("rollcall dev did not stop in a minute:\n%s", c.out.String())
	}
	if !c.cmd.ProcessState.Success() {
		return fmt.Errorf("rollcall dev: %v\n%s", c.cmd.ProcessState, c.out.String())
	}
	return nil
}

// install copies a plugin as an operator does, and returns its sha256.
func install(from, to string) (string, error) {
	in, err := os.Open(from)
	if err != nil {
		return "", err
	}
	defer func() { _ = in.Close() }()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o755)
	if err != nil {
		return "", err
	}
	h := sha256.New()
	if _, err := io.Copy(io.MultiWriter(out, h), in); err != nil {
		_ = out.Close()
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), out.Close()
}

// output keeps what a process says, and may be read while it does.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// leader asks which node leads now.
func (c *cluster) leader(t *testing.T) (addr string) {
	t.Helper()
	until(t, "a leader", func() error {
		l, err := vaultClient(t, c.nodes[0].addr, rootToken).Sys().Leader()
		if err != nil {
			return err
		}
		if addr = l.LeaderAddress; addr == "" {
			return errors.New("none is known")
		}
		return nil
	})
	return addr
}

// through runs a scenario through every node, at the same time, and compares what it noted. In names and paths the
// scenario uses n's suffix, so that the runs do not meet; in what it notes the suffix does not appear.
func through(t *testing.T, scenario func(t *testing.T, n at)) {
	runs := make([]*notes, len(shared.nodes))
	lead := shared.leader(t)
	t.Run("each", func(t *testing.T) {
		for i, nd := range shared.nodes {
			runs[i] = &notes{}
			t.Run(nd.name, func(t *testing.T) {
				t.Parallel()
				scenario(t, at{node: nd, leads: nd.addr == lead, N: fmt.Sprintf("n%d", i+1), notes: runs[i]})
			})
		}
	})
	for i := 1; i < len(runs); i++ {
		compare(t, shared.nodes[0].name, runs[0], shared.nodes[i].name, runs[i])
	}
}

// at is one run of a scenario: the node that it talks to, and where it notes what it sees.
type at struct {
	node
	leads bool
	N     string
	notes *notes
}

type notes struct{ lines []string }

// note keeps what a run has seen, without what may differ between runs.
func (a at) note(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	a.notes.lines = append(a.notes.lines, strings.ReplaceAll(plain(text), a.N, "N"))
}

// What differs between two runs of the same scenario: ids, times, tokens, addresses, indexes.
var varying = []struct {
	re *regexp.Regexp
	to string
}{
	{regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`), "UUID"},
	{regexp.MustCompile(`\d{4}-\d\d-\d\dT[0-9:.]+(Z|[+-]\d\d:\d\d)`), "TIME"},
	{regexp.MustCompile(`rcs\.[A-Z2-7]+`), "TOKEN"},
	{regexp.MustCompile(`_[0-9a-f]{8}\b`), "_ACCESSOR"},
	{regexp.MustCompile(`"accessor":"[a-z2-7]{26}"`), "ACCESSOR"},
	{regexp.MustCompile(`127\.0\.0\.1:\d+`), "ADDR"},
}

func plain(text string) string {
	for _, v := range varying {
		text = v.re.ReplaceAllString(text, v.to)
	}
	return text
}

func compare(t *testing.T, aName string, a *notes, bName string, b *notes) {
	t.Helper()
	for i := range max(len(a.lines), len(b.lines)) {
		x, y := "(nothing)", "(nothing)"
		if i < len(a.lines) {
			x = a.lines[i]
		}
		if i < len(b.lines) {
			y = b.lines[i]
		}
		if x != y {
			t.Errorf("what is seen differs:\n  through %s: %s\n  through %s: %s", aName, x, bName, y)
			return
		}
	}
	if len(a.lines) == 0 {
		t.Error("the scenario noted nothing: what is the same through every node?")
	}
}

// until waits for what a background part of the server does, with a generous limit.
func until(t *testing.T, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func lines(text string) []string {
	var out []string
	for s := bufio.NewScanner(strings.NewReader(text)); s.Scan(); {
		out = append(out, s.Text())
	}
	return out
}
