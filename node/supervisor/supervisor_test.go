package supervisor

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/structpb"

	"rollcall/node/fault"
	pluginpb "rollcall/proto/plugin"
)

func TestPluginAnswersAndReachesItsStorage(t *testing.T) {
	s := newSupervisor(t, func(c *Config) { c.Registerer = prometheus.NewRegistry() })
	p := start(t, s, specFor("ok"))
	store := newMemory()
	b := ready(t, p, Setup{Storage: store, BackendUUID: "u"})

	ask(t, b, "put/b", `{"x":1}`)
	ask(t, b, "put/a", `{"x":2}`)
	if got := ask(t, b, "get/b", ""); got != `{"x":1}` {
		t.Errorf("read back %q", got)
	}
	if got := ask(t, b, "list/", ""); got != "a b" {
		t.Errorf("list is %q: it must be sorted", got)
	}
	ask(t, b, "delete/b", "")
	if _, ok := store.m["b"]; ok {
		t.Error("delete did not reach the storage")
	}
	found, check, err := b.HandleExistenceCheck(t.Context(), &pluginpb.Request{Path: "a"})
	if !found || !check || err != nil {
		t.Errorf("existence: %v %v %v", found, check, err)
	}
	if typ, err := b.Type(t.Context()); typ != TypeSecret || err != nil {
		t.Errorf("type %q, %v", typ, err)
	}
	if v := b.Version(t.Context()); v != "v1.2.3" {
		t.Errorf("version %q", v)
	}
	paths, err := b.SpecialPaths(t.Context())
	if err != nil || !slices.Equal(paths.GetUnauthenticated(), []string{"login/*"}) {
		t.Errorf("special paths %v, %v", paths, err)
	}
	if err := b.InvalidateKey(t.Context(), "some/key"); err != nil {
		t.Error(err)
	}
	if got := ask(t, b, "invalidated", ""); got != "some/key" {
		t.Errorf("invalidated %q", got)
	}
	if p.RSS() == 0 || p.Timings().Handshake <= 0 || p.Exit() != "" || p.Err() != nil {
		t.Errorf("rss %d, timings %v, exit %q", p.RSS(), p.Timings(), p.Exit())
	}
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if alive(p.Pid()) {
		t.Error("the process is still there after Close")
	}
	if _, err := b.HandleRequest(t.Context(), &pluginpb.Request{}); !fault.Is(err, fault.Unavailable) {
		t.Errorf("after Close: %v", err)
	}
}

func TestPlainAndUnsealedStartsWork(t *testing.T) {
	s := newSupervisor(t, func(c *Config) { c.PlainRPC, c.NoMemfd = true, true })
	b := ready(t, start(t, s, specFor("single")), Setup{Storage: newMemory()})
	if _, sum := self(); ask(t, b, "self", "") != sum {
		t.Error("other bytes run")
	}
}

func TestWritesAreRefusedBeforeInitialize(t *testing.T) {
	s := newSupervisor(t, nil)
	b, err := start(t, s, specFor("setup-writes")).Backend(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	err = b.Setup(t.Context(), Setup{Storage: newMemory()})
	if !fault.Is(err, fault.Refused) || !strings.Contains(err.Error(), "cannot write to storage during setup") {
		t.Errorf("got %v", err)
	}
}

func TestReadOnlyStorageIsKnownByItsText(t *testing.T) {
	s := newSupervisor(t, nil)
	store := newMemory()
	store.readOnly = true
	b := ready(t, start(t, s, specFor("ok")), Setup{Storage: store, System: System{ReplicationState: ReplicationStandby}})
	_, err := b.HandleRequest(t.Context(), &pluginpb.Request{Path: "put/x"})
	if !fault.Is(err, fault.ReadOnly) || !IsReadOnlyText(err.Error()) {
		t.Errorf("got %v of kind %s", err, fault.KindOf(err))
	}
	if got := ask(t, b, "state", ""); got != strconv.Itoa(1<<12|1<<13|1<<14) {
		t.Errorf("replication state %s", got)
	}
}

func TestEveryStartFailureIsExplained(t *testing.T) {
	dir := pluginDir(t)
	write := func(name string, content []byte) string {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o755); err != nil { //nolint:gosec // it is to be executed
			t.Fatal(err)
		}
		return name
	}
	exe, _ := self()
	raw, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	foreign := bytes.Clone(raw)
	foreign[18], foreign[19] = 0xF3, 0 // RISC-V
	s := newSupervisor(t, func(c *Config) { c.PluginDir, c.StartTimeout = dir, 2*time.Second })
	of := func(command string) Spec {
		spec := specFor("ok")
		sum, err := s.Hash(t.Context(), command)
		if err != nil {
			t.Fatal(err)
		}
		spec.Command, spec.SHA256 = command, sum
		return spec
	}
	asDatabase := specFor("ok")
	asDatabase.Type = TypeDatabase
	missing := specFor("ok")
	missing.Command, missing.SHA256 = "nowhere", strings.Repeat("0", 64)
	wrong := specFor("ok")
	wrong.SHA256 = strings.Repeat("ab", 32)
	escape := specFor("ok")
	escape.Command = "../p"

	for name, c := range map[string]struct {
		spec  Spec
		phase string
		says  string
	}{
		"exits":               {specFor("exit"), "handshake", "exited with status 3 after"},
		"last words":          {specFor("exit"), "handshake", "the license file is missing"},
		"hangs":               {specFor("hang"), "handshake", "did not answer within 2s"},
		"talks":               {specFor("chatter"), "handshake", `"hello, I am a plugin"`},
		"endless line":        {specFor("endless"), "handshake", "where the handshake belongs"},
		"tcp":                 {specFor("tcp"), "handshake", "only unix sockets in its own directory"},
		"elsewhere":           {specFor("elsewhere"), "handshake", "/tmp/not-mine.sock"},
		"old protocol":        {specFor("old"), "handshake", "speaks protocol 4"},
		"net/rpc":             {specFor("netrpc"), "handshake", `speaks "netrpc"`},
		"no socket":           {specFor("deaf"), "handshake", "does not talk on its socket"},
		"mute":                {specFor("mute"), "handshake", "nothing after it within 2s"},
		"missing":             {missing, "verify", "there is no such file in the plugin directory"},
		"wrong sha256":        {wrong, "verify", "the file in the plugin directory has sha256"},
		"escape":              {escape, "verify", "leaves the plugin directory"},
		"script":              {of(write("script", []byte("#!/bin/sh\nexit 0\n"))), "start", "it is a script"},
		"text":                {of(write("text", []byte("hello"))), "start", "not an ELF program"},
		"empty":               {of(write("empty", nil)), "start", "the file is empty"},
		"another machine":     {of(write("riscv", foreign)), "start", "built for another machine: EM_RISCV"},
		"truncated":           {of(write("half", raw[:len(raw)/2])), "start", "truncated"},
		"truncated header":    {of(write("head", raw[:40])), "start", "truncated"},
		"database or backend": {asDatabase, "handshake", "not a plugin of type database"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := s.Start(t.Context(), c.spec)
			serr, ok := errors.AsType[*StartError](err)
			if !ok || !fault.Is(err, fault.Refused) && !fault.Is(err, fault.Invalid) {
				t.Fatalf("got %v", err)
			}
			if serr.Phase != c.phase || !strings.Contains(serr.Cause, c.says) {
				t.Errorf("phase %q (want %q): %s (want %q)", serr.Phase, c.phase, serr.Cause, c.says)
			}
		})
	}
	t.Cleanup(func() {
		if left := s.Processes(); len(left) != 0 {
			t.Errorf("%d processes are left of failed starts", len(left))
		}
	})
}

func TestRefusalsAfterTheHandshakeNameTheirPhase(t *testing.T) {
	s := newSupervisor(t, nil)
	for mode, c := range map[string]struct{ phase, says string }{
		"setup-fails": {"setup", "no database to talk to"},
		"setup-hangs": {"setup", "did not return in the time it has"},
		"init-fails":  {"initialize", "no salt"},
		"init-hangs":  {"initialize", "did not return in the time it has"},
		"init-dies":   {"initialize", "panic: no salt, no life"},
	} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			b, err := start(t, s, specFor(mode)).Backend(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			defer cancel()
			err = b.Setup(ctx, Setup{Storage: newMemory()})
			if err == nil {
				err = b.Initialize(ctx)
			}
			f, ok := errors.AsType[*fault.Error](err)
			if !ok || f.Kind != fault.Refused || f.Op != c.phase || !strings.Contains(f.Text, c.says) {
				t.Errorf("got %v", err)
			}
		})
	}
	b, err := start(t, s, specFor("auth")).Backend(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Setup(t.Context(), Setup{Storage: newMemory()}); err != nil {
		t.Fatal(err)
	}
	if typ, err := b.Type(t.Context()); typ != TypeAuth || err != nil {
		t.Errorf("type %q, %v", typ, err)
	}
}

func TestACanceledStartLeavesNothing(t *testing.T) {
	s := newSupervisor(t, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 400*time.Millisecond)
	defer cancel()
	begin := time.Now()
	_, err := s.Start(ctx, specFor("hang"))
	if !fault.Is(err, fault.Deadline) || time.Since(begin) > 5*time.Second {
		t.Errorf("got %v after %s", err, time.Since(begin))
	}
	if left, _ := filepath.Glob(filepath.Join(s.sockets.path, "plugin-dir*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// The attack that beats "hash the file, then execute the file": swap it in between.
func TestTheBytesThatWereHashedAreTheBytesThatRun(t *testing.T) {
	dir := pluginDir(t)
	exe, sum := self()
	good, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	evil := append(bytes.Clone(good), "EVIL"...)
	path := filepath.Join(dir, "p")
	stop := make(chan struct{})
	var attackers sync.WaitGroup
	attackers.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			content := evil
			if i%2 == 1 {
				content = good
			}
			if i%6 < 4 { // rename
				_ = os.WriteFile(path+".new", content, 0o755) //nolint:gosec // it is to be executed
				_ = os.Rename(path+".new", path)
			} else { // in place
				f, err := os.OpenFile(path, os.O_WRONLY, 0)
				if err == nil {
					_, _ = f.WriteAt(content, 0)
					_ = f.Truncate(int64(len(content)))
					_ = f.Close()
				}
			}
		}
	})
	defer attackers.Wait()
	defer close(stop)
	ran := 0
	for range 6 {
		s := newSupervisor(t, func(c *Config) { c.PluginDir = dir })
		p, err := s.Start(t.Context(), specFor("single"))
		if err != nil {
			if !fault.Is(err, fault.Refused) && !fault.Is(err, fault.NotFound) {
				t.Errorf("refused with %v", err)
			}
			continue
		}
		ran++
		if got := ask(t, ready(t, p, Setup{Storage: newMemory()}), "self", ""); got != sum {
			t.Fatalf("bytes with sha256 %s ran", got)
		}
		_ = p.Close(t.Context())
	}
	t.Logf("%d of 6 starts were let through, all with the right bytes", ran)
}

func TestACrashIsSeenExplainedAndItsRequestsAreUnknown(t *testing.T) {
	s := newSupervisor(t, nil)
	p := start(t, s, specFor("ok"))
	store := newMemory()
	b := ready(t, p, Setup{Storage: store})
	_, err := b.HandleRequest(t.Context(), &pluginpb.Request{Path: "panic"})
	if !fault.Is(err, fault.OutcomeUnknown) || !strings.Contains(err.Error(), "panic: told to") {
		t.Errorf("in flight: %v", err)
	}
	select {
	case <-p.Done():
	case <-time.After(2 * time.Second):
		t.Fatal("Done is not closed")
	}
	if !strings.Contains(p.Exit(), "exited with status 2") || !fault.Is(p.Err(), fault.Unavailable) {
		t.Errorf("exit %q, error %v", p.Exit(), p.Err())
	}
	_, err = b.HandleRequest(t.Context(), &pluginpb.Request{Path: "get/x"})
	if !fault.Is(err, fault.Unavailable) {
		t.Errorf("after the crash: %v", err)
	}
	if _, err := p.Backend(t.Context()); !fault.Is(err, fault.Unavailable) {
		t.Errorf("a new instance in a dead process: %v", err)
	}

	b = ready(t, start(t, s, specFor("ok")), Setup{Storage: store})
	_, err = b.HandleRequest(t.Context(), &pluginpb.Request{Path: "crash-after-write"})
	if !fault.Is(err, fault.OutcomeUnknown) || string(store.m["written"]) != "yes" {
		t.Errorf("crash after the side effect: %v", err)
	}
}

func TestAKilledPluginIsNoticedAtOnce(t *testing.T) {
	s := newSupervisor(t, nil)
	p := start(t, s, specFor("ok"))
	store := newMemory()
	b := ready(t, p, Setup{Storage: store})
	got := make(chan error, 1)
	go func() {
		_, err := b.HandleRequest(t.Context(), &pluginpb.Request{Path: "sleep"})
		got <- err
	}()
	eventually(t, "the request is under way", 5*time.Second, func() bool {
		e, _ := store.Get(t.Context(), "asleep")
		return e != nil
	})
	begin := time.Now()
	if err := syscall.Kill(p.Pid(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	if err := <-got; !fault.Is(err, fault.OutcomeUnknown) {
		t.Errorf("in flight: %v", err)
	}
	if d := time.Since(begin); d > time.Second {
		t.Errorf("noticed after %s", d)
	}
	if !strings.Contains(p.Exit(), "killed by signal 9") {
		t.Errorf("exit %q", p.Exit())
	}
}

func TestTwoInstancesInOneProcessKeepApart(t *testing.T) {
	s := newSupervisor(t, nil)
	p := start(t, s, specFor("ok"))
	one, two := newMemory(), newMemory()
	a, b := ready(t, p, Setup{Storage: one}), ready(t, p, Setup{Storage: two})
	ask(t, a, "put/k", "first")
	ask(t, b, "put/k", "second")
	if string(one.m["k"]) != "first" || string(two.m["k"]) != "second" || ask(t, a, "get/k", "") != "first" {
		t.Errorf("one has %q, two has %q", one.m["k"], two.m["k"])
	}
	if err := a.Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := a.HandleRequest(t.Context(), &pluginpb.Request{Path: "get/k"}); !fault.Is(err, fault.Unavailable) {
		t.Errorf("after Cleanup: %v", err)
	}
	if got := ask(t, b, "get/k", ""); got != "second" {
		t.Errorf("the sibling reads %q", got)
	}

	single := start(t, s, specFor("single"))
	ready(t, single, Setup{Storage: newMemory()})
	if _, err := single.Backend(t.Context()); !fault.Is(err, fault.Conflict) || single.Multiplexed() {
		t.Errorf("a second instance: %v", err)
	}
}

func TestSetupAgainGivesANewRoleAndANewStorage(t *testing.T) {
	s := newSupervisor(t, nil)
	for _, mode := range []string{"ok", "single"} {
		mark := filepath.Join(t.TempDir(), "cleaned")
		b, err := start(t, s, specFor(mode)).Backend(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		follower, leader := newMemory(), newMemory()
		for i, set := range []Setup{
			{Storage: follower, System: System{ReplicationState: ReplicationStandby}, Config: map[string]string{"cleanup_file": mark}},
			{Storage: leader},
		} {
			if err := b.Setup(t.Context(), set); err != nil {
				t.Fatal(err)
			}
			if err := b.Initialize(t.Context()); err != nil {
				t.Fatal(err)
			}
			want := []string{strconv.Itoa(int(ReplicationStandby)), strconv.Itoa(int(ReplicationActive))}[i]
			if got := ask(t, b, "state", ""); got != want {
				t.Errorf("%s: state %s, want %s", mode, got, want)
			}
		}
		ask(t, b, "put/k", "v")
		if len(follower.m) != 0 || string(leader.m["k"]) != "v" {
			t.Errorf("%s: written to the wrong storage", mode)
		}
		if _, err := os.Stat(mark); err != nil {
			t.Errorf("%s: the first role was not cleaned up: %v", mode, err)
		}
	}
}

func TestPluginSeesOnlyWhatItIsAllowedTo(t *testing.T) {
	t.Setenv("SECRET_OF_THE_HOST", "canary")
	t.Setenv("PASSED_ON", "yes")
	s := newSupervisor(t, func(c *Config) { c.PassEnv, c.GoMemLimit, c.NodeName = []string{"PASSED_ON"}, 512<<20, "node-7" })
	spec := specFor("ok")
	spec.Env = []string{"OWN=1", "VAULT_BACKEND_PLUGIN=forged", "VAULT_VERSION=forged"}
	b := ready(t, start(t, s, spec), Setup{Storage: newMemory()})
	env := map[string]string{}
	for kv := range strings.SplitSeq(ask(t, b, "env", ""), "\x00") {
		k, v, _ := strings.Cut(kv, "=")
		env[k] = v
	}
	for k, want := range map[string]string{
		"OWN": "1", "PASSED_ON": "yes", "GOMEMLIMIT": strconv.Itoa(512 << 20), "ROLLCALL_NODE": "node-7",
		"VAULT_BACKEND_PLUGIN": backendHandshake.MagicCookieValue, "VAULT_VERSION": s.cfg.HostVersion, "BAO_VERSION": s.cfg.HostVersion,
		"VAULT_PLUGIN_AUTOMTLS_ENABLED": "true", "BAO_PLUGIN_AUTOMTLS_ENABLED": "true", "PLUGIN_PROTOCOL_VERSIONS": "5",
	} {
		if env[k] != want {
			t.Errorf("%s is %q, want %q", k, env[k], want)
		}
	}
	known := []string{
		"PATH", "TMPDIR", "VAULT_PLUGIN_METADATA_MODE", "BAO_PLUGIN_METADATA_MODE", "ROLLCALL_PLUGIN_OWNER",
		"PLUGIN_MIN_PORT", "PLUGIN_MAX_PORT", "PLUGIN_CLIENT_CERT", "PLUGIN_UNIX_SOCKET_DIR", "PLUGIN_UNIX_SOCKET_GROUP",
		"OWN", "PASSED_ON", "GOMEMLIMIT", "ROLLCALL_NODE", "VAULT_BACKEND_PLUGIN", "VAULT_VERSION", "BAO_VERSION",
		"VAULT_PLUGIN_AUTOMTLS_ENABLED", "BAO_PLUGIN_AUTOMTLS_ENABLED", "PLUGIN_PROTOCOL_VERSIONS",
	}
	for k := range env {
		if !slices.Contains(known, k) {
			t.Errorf("%s=%s got through", k, env[k])
		}
	}
	for link := range strings.SplitSeq(ask(t, b, "fds", ""), "\x00") {
		if strings.Contains(link, "memfd") || strings.HasPrefix(link, s.cfg.DataDir) {
			t.Errorf("the plugin holds %s", link)
		}
	}
	status := ask(t, b, "status", "")
	if !strings.Contains(status, "NoNewPrivs:\t1") {
		t.Error("set-uid programs would give the plugin more rights")
	}
	info, err := os.Stat(s.sockets.path)
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("socket directory: %v, %v", info.Mode(), err)
	}
}

// stopped says whether every thread of a process is stopped by a signal.
func stopped(t *testing.T, pid int) bool {
	t.Helper()
	stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil || len(stats) == 0 {
		t.Fatalf("threads of %d: %v, %v", pid, stats, err)
	}
	for _, stat := range stats {
		raw, err := os.ReadFile(stat)
		if _, after, ok := strings.Cut(string(raw), ") "); err != nil || !ok || !strings.HasPrefix(after, "T") {
			return false
		}
	}
	return true
}

func TestAStoppedPluginIsKilledWithinItsLimits(t *testing.T) {
	s := newSupervisor(t, nil)
	p := start(t, s, specFor("ok"))
	ready(t, p, Setup{Storage: newMemory()})
	if err := syscall.Kill(p.Pid(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	// The signal has been sent; the process stops a moment later.
	for end := time.Now().Add(10 * time.Second); !stopped(t, p.Pid()); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the process does not stop")
		}
	}
	begin := time.Now()
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	// Cleanup 300 ms, shutdown 1 s, SIGTERM 200 ms.
	if d := time.Since(begin); d > 4*time.Second || alive(p.Pid()) {
		t.Errorf("ended after %s, alive %v", d, alive(p.Pid()))
	}
	if !strings.Contains(p.Exit(), "SIGKILL") {
		t.Errorf("exit %q", p.Exit())
	}

	p = start(t, s, specFor("cleanup-hangs"))
	ready(t, p, Setup{Storage: newMemory()})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	begin = time.Now()
	if err := p.Close(ctx); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(begin); d > 2*time.Second {
		t.Errorf("an ended context let Close take %s", d)
	}
}

func TestWhatAPluginLeavesBehindIsKilled(t *testing.T) {
	if _, err := os.Stat("/bin/sleep"); err != nil {
		t.Fatal("this test needs /bin/sleep")
	}
	s := newSupervisor(t, nil)
	for _, crash := range []bool{false, true} {
		file := filepath.Join(t.TempDir(), "pid")
		spec := specFor("daemon")
		spec.Env = []string{"DAEMON_PID_FILE=" + file}
		p := start(t, s, spec)
		ready(t, p, Setup{Storage: newMemory()})
		raw, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		daemon, err := strconv.Atoi(string(raw))
		if err != nil || !alive(daemon) {
			t.Fatalf("no daemon: %v", err)
		}
		begin := time.Now()
		if crash {
			_ = syscall.Kill(p.Pid(), syscall.SIGKILL)
			<-p.Done()
		}
		if err := p.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(begin); d > 5*time.Second {
			t.Errorf("the open pipe held Close up for %s", d)
		}
		eventually(t, "the daemon ends", 2*time.Second, func() bool { return !alive(daemon) })
	}
}

// hostMain is a host of its own, for the test that kills it. It prints the pids of its plugins.
func hostMain(args []string) {
	s, err := New(Config{PluginDir: args[0], DataDir: args[1], Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		panic(err)
	}
	for _, mode := range []string{"ok", "daemon"} {
		spec := specFor(mode)
		spec.Env = []string{"DAEMON_PID_FILE=" + filepath.Join(args[1], "daemon")}
		p, err := s.Start(context.Background(), spec)
		if err != nil {
			panic(err)
		}
		_, _ = io.WriteString(os.Stdout, strconv.Itoa(p.Pid())+"\n")
	}
	raw, err := os.ReadFile(filepath.Join(args[1], "daemon"))
	if err != nil {
		panic(err)
	}
	_, _ = os.Stdout.Write(append(raw, '\n'))
	time.Sleep(time.Hour)
}

func TestNoPluginOutlivesAKilledHost(t *testing.T) {
	dir, data := pluginDir(t), t.TempDir()
	exe, _ := self()
	host := exec.CommandContext(t.Context(), exe, "host", dir, data)
	host.Stderr = os.Stderr
	out, err := host.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := host.Start(); err != nil {
		t.Fatal(err)
	}
	var pids []int
	for lines := bufio.NewScanner(out); len(pids) < 3 && lines.Scan(); {
		pid, err := strconv.Atoi(lines.Text())
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	if len(pids) != 3 {
		t.Fatalf("the host started %v", pids)
	}
	if err := host.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = host.Wait()
	for _, pid := range pids[:2] {
		eventually(t, "the kernel kills the plugin", 2*time.Second, func() bool { return !alive(pid) })
	}
	// The daemon of one of them is in a session of its own: the next host on the same data directory finds it.
	daemon := pids[2]
	if !alive(daemon) {
		t.Fatal("the daemon was to be left")
	}
	newSupervisor(t, func(c *Config) { c.DataDir = data })
	eventually(t, "the next host kills what is left", 2*time.Second, func() bool { return !alive(daemon) })
}

func TestNothingIsLeftAfterManyStarts(t *testing.T) {
	s := newSupervisor(t, nil)
	cycle := func() {
		p := start(t, s, specFor("ok"))
		b := ready(t, p, Setup{Storage: newMemory()})
		ready(t, p, Setup{Storage: newMemory()})
		ask(t, b, "put/k", "v")
		if err := b.Cleanup(t.Context()); err != nil {
			t.Error(err)
		}
		if err := p.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Start(t.Context(), specFor("exit")); err == nil {
			t.Fatal("started")
		}
	}
	fds := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	cycle()
	before := fds()
	for range 3 {
		cycle()
	}
	eventually(t, "open files are as before", 6*time.Second, func() bool { return fds() <= before })
	left, err := os.ReadDir(s.sockets.path)
	if err != nil || len(left) != 1 { // the lock
		t.Errorf("socket directory holds %v, %v", left, err)
	}
}

func TestPluginErrorsKeepTheirKinds(t *testing.T) {
	s := newSupervisor(t, func(c *Config) { c.MaxReply = 1 << 20 })
	b := ready(t, start(t, s, specFor("ok")), Setup{Storage: newMemory()})
	for typ, kind := range map[int]fault.Kind{
		0: fault.Internal, errUser: fault.Invalid, errInternal: fault.Internal, errCoded: fault.Internal, errBadRequest: fault.Invalid,
		errUnsupportedOperation: fault.UnsupportedOperation, errUnsupportedPath: fault.UnsupportedPath, errInvalidRequest: fault.Invalid,
		errPermissionDenied: fault.Denied, errApprovalPending: fault.Denied, errUnrecoverable: fault.Internal, 99: fault.Internal,
	} {
		_, err := b.HandleRequest(t.Context(), &pluginpb.Request{Path: "error/" + strconv.Itoa(typ)})
		f, ok := errors.AsType[*fault.Error](err)
		if !ok || f.Kind != kind || f.Error() != "as told" || (typ == errCoded) != (f.Code == 418) {
			t.Errorf("type %d: %v of kind %s, code %d", typ, err, f.Kind, f.Code)
		}
	}
	if _, err := b.HandleRequest(t.Context(), &pluginpb.Request{Path: "big"}); !fault.Is(err, fault.TooLarge) {
		t.Errorf("a reply beyond the limit: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := b.HandleRequest(ctx, &pluginpb.Request{Path: "sleep"}); !fault.Is(err, fault.Deadline) {
		t.Errorf("beyond the deadline: %v", err)
	}
}

func TestDatabasesShareAProcess(t *testing.T) {
	s := newSupervisor(t, nil)
	spec := specFor("database")
	spec.Type = TypeDatabase
	p := start(t, s, spec)
	if _, err := p.Backend(t.Context()); !fault.Is(err, fault.Invalid) {
		t.Errorf("a backend of a database plugin: %v", err)
	}
	ids := map[string]bool{}
	for range 2 {
		d, err := p.Database(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		conf, err := d.Initialize(t.Context(), &structpb.Struct{}, true)
		if err != nil {
			t.Fatal(err)
		}
		ids[conf.GetFields()["id"].GetStringValue()] = true
		name, err := d.NewUser(t.Context(), &pluginpb.NewUserRequest{UsernameConfig: &pluginpb.UsernameConfig{RoleName: "r"}})
		if name != "u-r" || err != nil {
			t.Errorf("user %q, %v", name, err)
		}
		if typ, err := d.Type(t.Context()); typ != "testdb" || err != nil {
			t.Errorf("type %q, %v", typ, err)
		}
		if err := d.Close(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if len(ids) != 2 || ids[""] {
		t.Errorf("instances %v", ids)
	}
	d, err := p.Database(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	bad, err := structpb.NewStruct(map[string]any{"bad": true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.Initialize(t.Context(), bad, true); err == nil || !strings.Contains(err.Error(), "cannot connect") {
		t.Errorf("a configuration that does not work: %v", err)
	}

	spec.Type = TypeSecret
	_, err = s.Start(t.Context(), spec)
	if serr, ok := errors.AsType[*StartError](err); !ok || serr.Phase != "handshake" {
		t.Errorf("a database plugin registered as secret: %v", err)
	}
}

func TestAfterCloseNothingStartsAndNothingRuns(t *testing.T) {
	s := newSupervisor(t, nil)
	var pids []int
	for range 3 {
		pids = append(pids, start(t, s, specFor("ok")).Pid())
	}
	if err := s.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, pid := range pids {
		if alive(pid) {
			t.Errorf("pid %d is left", pid)
		}
	}
	if _, err := s.Start(t.Context(), specFor("ok")); !fault.Is(err, fault.Unavailable) {
		t.Errorf("a start after Close: %v", err)
	}
	if _, err := os.Stat(s.sockets.path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket directory is left: %v", err)
	}
}

func TestOutputIsBoundedEscapedAndNeverBlocks(t *testing.T) {
	var buf lockedBuffer
	s := newSupervisor(t, func(c *Config) {
		c.Logger = slog.New(slog.NewJSONHandler(&buf, &slog.HandlerOptions{Level: slog.LevelDebug}))
		c.LogBytesPerSecond = 16 << 10
	})
	b := ready(t, start(t, s, specFor("ok")), Setup{Storage: newMemory()})
	if got := ask(t, b, "flood", ""); got != "done" { // 1.8 MB
		t.Fatal(got)
	}
	if n := buf.len(); n > 1<<20 {
		t.Errorf("%d bytes were logged", n)
	}

	buf.reset()
	drops := 0
	o := newOutput(slog.New(slog.NewJSONHandler(&buf, &slog.HandlerOptions{Level: slog.LevelDebug})), "stderr", 10_000, func(n int) { drops += n })
	for _, piece := range []string{
		`{"@level":"warn","@message":"low\u001b[31m disk","free":12}` + "\n", "a\x00b\x1b[2J", "c\n", strings.Repeat("y", 9000) + "\n", strings.Repeat("z", 9000) + "\n",
	} {
		_, _ = o.Write([]byte(piece))
	}
	o.end()
	text := buf.string()
	for _, want := range []string{`"level":"WARN","msg":"low\\u001b[31m disk"`, `"plugin.free":"12"`, `a\\u0000b\\u001b[2Jc`, "(4904 more bytes)", "dropped"} {
		if !strings.Contains(text, want) {
			t.Errorf("%s is missing in %s", want, text)
		}
	}
	if strings.Contains(text, "zzz") || drops != 9000 {
		t.Errorf("dropped %d", drops)
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) len() int       { l.mu.Lock(); defer l.mu.Unlock(); return l.b.Len() }
func (l *lockedBuffer) string() string { l.mu.Lock(); defer l.mu.Unlock(); return l.b.String() }
func (l *lockedBuffer) reset()         { l.mu.Lock(); defer l.mu.Unlock(); l.b.Reset() }

func TestBackoffDoublesToALimitAndForgets(t *testing.T) {
	var b Backoff
	for i, want := range []time.Duration{100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600, 30000, 30000} {
		want *= time.Millisecond
		if got := b.Next(0); got < want*8/10 || got > want*12/10 {
			t.Errorf("pause %d is %s, want about %s", i, got, want)
		}
	}
	if got := b.Next(time.Minute); got > 120*time.Millisecond {
		t.Errorf("after a minute up: %s", got)
	}
}

func TestEqualSpecsHaveOneKey(t *testing.T) {
	a, b := specFor("ok"), specFor("ok")
	if a.Key() != b.Key() {
		t.Error("equal specs differ")
	}
	seen := map[string]bool{a.Key(): true}
	for _, change := range []func(*Spec){
		func(s *Spec) { s.Type = TypeAuth }, func(s *Spec) { s.Name += "x" }, func(s *Spec) { s.Version += "x" },
		func(s *Spec) { s.Command += "x" }, func(s *Spec) { s.Args = []string{"plugin ok"} }, func(s *Spec) { s.Env = []string{"A=1"} },
		func(s *Spec) { s.Args, s.Env = nil, s.Args }, func(s *Spec) { s.SHA256 = strings.Repeat("0", 64) },
	} {
		c := specFor("ok")
		change(&c)
		if seen[c.Key()] {
			t.Errorf("%+v has the key of another spec", c)
		}
		seen[c.Key()] = true
	}
}
