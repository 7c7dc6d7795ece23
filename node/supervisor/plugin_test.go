package supervisor

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/structpb"

	"rollcall/node/fault"
	pluginpb "rollcall/proto/plugin"
	"rollcall/proto/plugin/pluginserver"
)

// The test binary is its own plugin: started with the first argument "plugin" it does what the second says.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "plugin" {
		pluginMain(os.Args[2])
		os.Exit(0)
	}
	if len(os.Args) > 2 && os.Args[1] == "host" {
		hostMain(os.Args[2:])
		os.Exit(0)
	}
	code := m.Run()
	if err := goleak.Find(); code == 0 && err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func pluginMain(mode string) {
	switch mode {
	case "exit":
		fmt.Fprintln(os.Stderr, "the license file is missing")
		os.Exit(3)
	case "hang":
		time.Sleep(time.Hour)
	case "chatter":
		fmt.Println("hello, I am a plugin")
		time.Sleep(time.Hour)
	case "endless":
		for {
			_, _ = os.Stdout.WriteString(strings.Repeat("x", 1000))
		}
	case "tcp":
		l, _ := net.Listen("tcp", "127.0.0.1:0")
		fmt.Printf("1|5|tcp|%s|grpc\n", l.Addr())
		time.Sleep(time.Hour)
	case "elsewhere":
		fmt.Printf("1|5|unix|/tmp/not-mine.sock|grpc\n")
		time.Sleep(time.Hour)
	case "old":
		fmt.Printf("1|4|unix|%s/x|grpc\n", os.Getenv("PLUGIN_UNIX_SOCKET_DIR"))
		time.Sleep(time.Hour)
	case "netrpc":
		fmt.Printf("1|5|unix|%s/x|netrpc\n", os.Getenv("PLUGIN_UNIX_SOCKET_DIR"))
		time.Sleep(time.Hour)
	case "deaf":
		fmt.Printf("1|5|unix|%s/x|grpc\n", os.Getenv("PLUGIN_UNIX_SOCKET_DIR"))
		time.Sleep(time.Hour)
	case "mute": // listens, accepts, says nothing
		l, err := net.Listen("unix", os.Getenv("PLUGIN_UNIX_SOCKET_DIR")+"/x")
		if err != nil {
			os.Exit(1)
		}
		fmt.Printf("1|5|unix|%s|grpc\n", l.Addr())
		for {
			c, err := l.Accept()
			if err != nil {
				os.Exit(1)
			}
			go func() { _, _ = io.Copy(io.Discard, c) }()
		}
	case "database":
		pluginserver.ServeDatabase(&testDB{users: map[string]string{}}, true)
	case "stubborn":
		signal.Ignore(syscall.SIGTERM)
		fallthrough
	default:
		if mode == "daemon" {
			spawnDaemon()
		}
		pluginserver.Serve(pluginserver.Config{
			Auth: mode == "auth", Version: "v1.2.3", Multiplex: mode != "single",
			Paths: &pluginpb.Paths{Unauthenticated: []string{"login/*"}},
			New: func(ctx context.Context, s pluginserver.Setup) (pluginserver.Backend, error) {
				switch mode {
				case "setup-fails":
					return nil, errors.New("no database to talk to")
				case "setup-hangs":
					time.Sleep(time.Hour)
				case "setup-writes":
					if err := s.Storage.Put(ctx, "k", nil); err != nil {
						return nil, err
					}
				}
				return &testBackend{mode: mode, setup: s}, nil
			},
		})
	}
}

// spawnDaemon leaves a process in a session of its own that holds our stdout and stderr.
func spawnDaemon() {
	cmd := exec.Command("/bin/sleep", "300")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		os.Exit(1)
	}
	if err := os.WriteFile(os.Getenv("DAEMON_PID_FILE"), []byte(strconv.Itoa(cmd.Process.Pid)), 0o600); err != nil {
		os.Exit(1)
	}
}

type testBackend struct {
	mode  string
	setup pluginserver.Setup
	mu    sync.Mutex
	keys  []string
}

func (b *testBackend) Initialize(context.Context) error {
	switch b.mode {
	case "init-fails":
		return errors.New("no salt")
	case "init-hangs":
		time.Sleep(time.Hour)
	case "init-dies":
		panic("no salt, no life")
	}
	return nil
}

func (b *testBackend) Invalidate(key string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.keys = append(b.keys, key)
}

func (b *testBackend) Cleanup(context.Context) {
	if b.mode == "cleanup-hangs" {
		time.Sleep(time.Hour)
	}
	if f := b.setup.Config["cleanup_file"]; f != "" {
		_ = os.WriteFile(f, nil, 0o600)
	}
}

func (b *testBackend) Exists(ctx context.Context, req *pluginpb.Request) (exists, check bool, err error) {
	_, exists, err = b.setup.Storage.Get(ctx, req.GetPath())
	return exists, true, err
}

func (b *testBackend) Handle(ctx context.Context, req *pluginpb.Request) (*pluginpb.Response, error) {
	path, arg, _ := strings.Cut(req.GetPath(), "/")
	text := func(s string) (*pluginpb.Response, error) {
		raw, err := json.Marshal(map[string]string{"v": s})
		return &pluginpb.Response{Data: string(raw)}, err
	}
	switch path {
	case "get":
		v, _, err := b.setup.Storage.Get(ctx, arg)
		if err != nil {
			return nil, err
		}
		return text(string(v))
	case "put":
		return nil, b.setup.Storage.Put(ctx, arg, []byte(req.GetData()))
	case "delete":
		return nil, b.setup.Storage.Delete(ctx, arg)
	case "list":
		keys, err := b.setup.Storage.List(ctx, arg)
		if err != nil {
			return nil, err
		}
		return text(strings.Join(keys, " "))
	case "env":
		return text(strings.Join(os.Environ(), "\x00"))
	case "self":
		sum := sha256.New()
		f, err := os.Open("/proc/self/exe")
		if err != nil {
			return nil, err
		}
		defer f.Close()
		_, err = io.Copy(sum, f)
		if err != nil {
			return nil, err
		}
		return text(hex.EncodeToString(sum.Sum(nil)))
	case "state":
		r, err := b.setup.System.ReplicationState(ctx, &pluginpb.Empty{})
		if err != nil {
			return nil, err
		}
		return text(strconv.Itoa(int(r.GetState())))
	case "invalidated":
		b.mu.Lock()
		defer b.mu.Unlock()
		return text(strings.Join(b.keys, " "))
	case "fds":
		entries, err := os.ReadDir("/proc/self/fd")
		var links []string
		for _, e := range entries {
			l, _ := os.Readlink("/proc/self/fd/" + e.Name())
			links = append(links, l)
		}
		if err != nil {
			return nil, err
		}
		return text(strings.Join(links, "\x00"))
	case "status":
		raw, err := os.ReadFile("/proc/self/status")
		if err != nil {
			return nil, err
		}
		return text(string(raw))
	case "panic":
		go func() { panic("told to") }()
		time.Sleep(time.Hour)
	case "crash-after-write":
		if err := b.setup.Storage.Put(ctx, "written", []byte("yes")); err != nil {
			return nil, err
		}
		os.Exit(9)
	case "sleep":
		if err := b.setup.Storage.Put(ctx, "asleep", nil); err != nil {
			return nil, err
		}
		<-ctx.Done()
		return nil, ctx.Err()
	case "big":
		return text(strings.Repeat("x", 4<<20))
	case "flood":
		line := strings.Repeat("noise ", 200) + "\n"
		for range 1500 {
			_, _ = io.WriteString(os.Stderr, line)
		}
		return text("done")
	case "error":
		n, _ := strconv.Atoi(arg)
		return nil, &pluginserver.Error{Type: uint32(n), Code: 418, Text: "as told"}
	}
	return nil, pluginserver.ErrUnsupportedPath
}

type testDB struct {
	pluginpb.UnimplementedDatabaseServer
	mu    sync.Mutex
	users map[string]string
}

func (d *testDB) Initialize(ctx context.Context, in *pluginpb.InitializeRequest) (*pluginpb.InitializeResponse, error) {
	if in.GetConfigData().GetFields()["bad"] != nil {
		return nil, errors.New("cannot connect")
	}
	s, err := structpb.NewStruct(map[string]any{"id": pluginserver.InstanceID(ctx)})
	return &pluginpb.InitializeResponse{ConfigData: s}, err
}

func (d *testDB) NewUser(ctx context.Context, in *pluginpb.NewUserRequest) (*pluginpb.NewUserResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	name := "u-" + in.GetUsernameConfig().GetRoleName()
	d.users[pluginserver.InstanceID(ctx)+name] = in.GetPassword()
	return &pluginpb.NewUserResponse{Username: name}, nil
}

func (d *testDB) Type(context.Context, *emptypb.Empty) (*pluginpb.TypeResponse, error) {
	return &pluginpb.TypeResponse{Type: "testdb"}, nil
}

func (d *testDB) Close(context.Context, *emptypb.Empty) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

// The host's side of the tests.

// self is the test binary in a plugin directory, and its hash.
var self = sync.OnceValues(func() (string, string) {
	exe, err := os.Executable()
	if err != nil {
		panic(err)
	}
	raw, err := os.ReadFile(exe)
	if err != nil {
		panic(err)
	}
	sum := sha256.Sum256(raw)
	return exe, hex.EncodeToString(sum[:])
})

func pluginDir(t testing.TB) string {
	t.Helper()
	exe, _ := self()
	dir := t.TempDir()
	raw, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "p"), raw, 0o755); err != nil { //nolint:gosec // it is to be executed
		t.Fatal(err)
	}
	return dir
}

func newSupervisor(t testing.TB, change func(*Config)) *Supervisor {
	t.Helper()
	cfg := Config{
		PluginDir: pluginDir(t), DataDir: t.TempDir(), StartTimeout: 10 * time.Second, CleanupTimeout: 300 * time.Millisecond,
		ShutdownTimeout: time.Second, TermTimeout: 200 * time.Millisecond, Logger: slog.New(slog.DiscardHandler),
	}
	if change != nil {
		change(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		if err := s.Close(ctx); err != nil {
			t.Error(err)
		}
	})
	return s
}

func specFor(mode string) Spec {
	_, sum := self()
	return Spec{Type: TypeSecret, Name: "test", Version: "v1", Command: "p", Args: []string{"plugin", mode}, SHA256: sum}
}

func start(t testing.TB, s *Supervisor, spec Spec) *Process {
	t.Helper()
	p, err := s.Start(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func ready(t testing.TB, p *Process, set Setup) *Backend {
	t.Helper()
	b, err := p.Backend(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Setup(t.Context(), set); err != nil {
		t.Fatal(err)
	}
	if err := b.Initialize(t.Context()); err != nil {
		t.Fatal(err)
	}
	return b
}

func ask(t testing.TB, b *Backend, path, data string) string {
	t.Helper()
	resp, err := b.HandleRequest(t.Context(), &pluginpb.Request{Id: "req-1", Operation: "read", Path: path, Data: data})
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	var out struct{ V string }
	if resp.GetData() != "" {
		if err := json.Unmarshal([]byte(resp.GetData()), &out); err != nil {
			t.Fatal(err)
		}
	}
	return out.V
}

// memory is a storage that can be told to refuse writes.
type memory struct {
	mu       sync.Mutex
	m        map[string][]byte
	readOnly bool
}

func newMemory() *memory { return &memory{m: map[string][]byte{}} }

func (s *memory) List(_ context.Context, prefix string) ([]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var keys []string
	for k := range s.m {
		if rest, ok := strings.CutPrefix(k, prefix); ok {
			keys = append(keys, rest)
		}
	}
	return keys, nil
}

func (s *memory) Get(_ context.Context, key string) (*Entry, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, ok := s.m[key]
	if !ok {
		return nil, nil
	}
	return &Entry{Key: key, Value: v}, nil
}

func (s *memory) Put(_ context.Context, e *Entry) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.readOnly {
		return fault.Text(fault.ReadOnly, "this node only reads")
	}
	s.m[e.Key] = bytes.Clone(e.Value)
	return nil
}

func (s *memory) Delete(_ context.Context, key string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.m, key)
	return nil
}

func eventually(t testing.TB, what string, limit time.Duration, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %s", what, limit)
		}
	}
}

// alive tells whether a process exists and is not a zombie.
func alive(pid int) bool {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	i := bytes.LastIndexByte(raw, ')')
	return i > 0 && len(raw) > i+2 && raw[i+2] != 'Z' && raw[i+2] != 'X'
}
