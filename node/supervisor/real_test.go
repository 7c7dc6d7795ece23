//go:build realplugins

package supervisor

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"rollcall/node/fault"
	pluginpb "rollcall/proto/plugin"
)

// These tests run unmodified plugins that deploy/plugins/build has built:
//
//	deploy/plugins/build /some/dir && ROLLCALL_TEST_PLUGINS=/some/dir go test -tags realplugins -run Real ./node/supervisor

func realSpec(t *testing.T, s *Supervisor, typ, command string, args ...string) Spec {
	t.Helper()
	sum, err := s.Hash(t.Context(), command)
	if err != nil {
		t.Fatal(err)
	}
	return Spec{Type: typ, Name: command, Command: command, Args: args, SHA256: sum}
}

func realSupervisor(t *testing.T, change func(*Config)) *Supervisor {
	t.Helper()
	dir := os.Getenv("ROLLCALL_TEST_PLUGINS")
	if dir == "" {
		t.Fatal("ROLLCALL_TEST_PLUGINS must name a directory that deploy/plugins/build has filled")
	}
	return newSupervisor(t, func(c *Config) {
		c.PluginDir = dir
		if change != nil {
			change(c)
		}
	})
}

func call(t *testing.T, b *Backend, op, path, data string) (map[string]any, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	resp, err := b.HandleRequest(ctx, &pluginpb.Request{
		Id: "r", Operation: op, Path: path, Data: data, MountPoint: "m/", ClientToken: "hashed", Connection: &pluginpb.Connection{RemoteAddr: "127.0.0.1"},
	})
	out := map[string]any{}
	if raw := resp.GetData(); raw != "" {
		if jerr := json.Unmarshal([]byte(raw), &out); jerr != nil {
			t.Fatal(jerr)
		}
	}
	if resp.GetAuth() != nil {
		out["auth"] = resp.GetAuth().GetDisplayName()
	}
	return out, err
}

func must(t *testing.T, b *Backend, op, path, data string) map[string]any {
	t.Helper()
	out, err := call(t, b, op, path, data)
	if err != nil {
		t.Fatalf("%s %s: %v %v", op, path, err, out)
	}
	return out
}

// settled waits until KV version 2 has done its upgrade of an empty mount.
func settled(t *testing.T, b *Backend) {
	t.Helper()
	eventually(t, "KV is ready", 15*time.Second, func() bool {
		_, err := call(t, b, "list", "metadata/", "{}")
		return err == nil
	})
}

func TestRealKVKeepsItsDataOverVersions(t *testing.T) {
	s := realSupervisor(t, nil)
	store := &tree{memory: newMemory()}
	set := Setup{Storage: store, BackendUUID: "2d2f2a5e-6c86-4a0a-9a3e-0d4f3e1c7a55", Config: map[string]string{"version": "2"}}
	var old *Process
	for i, command := range []string{"kv-v0.24.1", "kv-v0.25.0", "kv-v0.24.1"} {
		p := start(t, s, realSpec(t, s, TypeSecret, command))
		t.Logf("%s: %v, RSS %d MiB, multiplexed %v", command, p.Timings(), p.RSS()>>20, p.Multiplexed())
		if old != nil {
			if err := old.Close(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		old = p
		b := ready(t, p, set)
		if typ, err := b.Type(t.Context()); typ != TypeSecret || err != nil {
			t.Fatalf("type %q, %v", typ, err)
		}
		settled(t, b)
		if i > 0 {
			got := must(t, b, "read", "data/a/key", "{}")
			if n := got["data"].(map[string]any)["n"]; n != float64(i-1) {
				t.Errorf("%s reads %v", command, got)
			}
		}
		must(t, b, "create", "data/a/key", `{"data":{"n":`+string(rune('0'+i))+`}}`)
		if keys := must(t, b, "list", "metadata/a/", "{}")["keys"].([]any); len(keys) != 1 || keys[0] != "key" {
			t.Errorf("list %v", keys)
		}
		must(t, b, "update", "config", `{"max_versions":5}`)
		if _, err := call(t, b, "read", "data/missing", "{}"); err != nil && !fault.Is(err, fault.NotFound) {
			t.Errorf("missing key: %v", err)
		}
	}
	b, err := old.Backend(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// A follower reads, is told by its storage that it may not write, and forgets what it is told to.
	store.readOnly = true
	set.System = System{ReplicationState: ReplicationStandby}
	if err := b.Setup(t.Context(), set); err != nil {
		t.Fatal(err)
	}
	if err := b.Initialize(t.Context()); err != nil {
		t.Fatal(err)
	}
	settled(t, b)
	must(t, b, "read", "data/a/key", "{}")
	if _, err := call(t, b, "update", "data/a/key", `{"data":{"n":9}}`); !fault.Is(err, fault.ReadOnly) {
		t.Errorf("a follower's write: %v", err)
	}
	if err := b.InvalidateKey(t.Context(), "config"); err != nil {
		t.Error(err)
	}
}

// tree is a storage that lists folders, as KV needs it.
type tree struct{ *memory }

func (s *tree) List(ctx context.Context, prefix string) ([]string, error) {
	all, err := s.memory.List(ctx, prefix)
	seen := map[string]bool{}
	var keys []string
	for _, k := range all {
		if dir, _, deep := strings.Cut(k, "/"); deep {
			k = dir + "/"
		}
		if !seen[k] {
			seen[k] = true
			keys = append(keys, k)
		}
	}
	return keys, err
}

func TestRealJWTAuthAnswers(t *testing.T) {
	s := realSupervisor(t, nil)
	b := ready(t, start(t, s, realSpec(t, s, TypeAuth, "auth-jwt")), Setup{Storage: &tree{newMemory()}, BackendUUID: "u"})
	if typ, err := b.Type(t.Context()); typ != TypeAuth || err != nil {
		t.Fatalf("type %q, %v", typ, err)
	}
	paths, err := b.SpecialPaths(t.Context())
	if err != nil || !strings.Contains(strings.Join(paths.GetUnauthenticated(), " "), "login") {
		t.Errorf("special paths %v, %v", paths, err)
	}
	// A key of this test's own, from RFC 7515's examples of P-256.
	const key = `-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEVs/o5+uQbTjL3chynL4wXgUg2R9\nq9UU8I5mEovUf86QZ7kOBIjJwqnzD1omageEHWwHdBO6B+dFabmdT9POxg==\n-----END PUBLIC KEY-----`
	if out, err := call(t, b, "update", "config", `{"jwt_validation_pubkeys":["`+key+`"]}`); err != nil {
		t.Logf("config: %v %v", out, err)
	}
	must(t, b, "create", "role/r", `{"role_type":"jwt","user_claim":"sub","bound_audiences":["x"]}`)
	if got := must(t, b, "read", "role/r", "{}"); got["user_claim"] != "sub" {
		t.Errorf("role %v", got)
	}
	out, err := call(t, b, "update", "login", `{"role":"r","jwt":"not.a.jwt"}`)
	if err == nil && out["error"] == nil {
		t.Errorf("a login without a token worked: %v", out)
	}
}

func TestRealPluginsOfTheWrongKindAreExplained(t *testing.T) {
	s := realSupervisor(t, nil)
	_, err := s.Start(t.Context(), realSpec(t, s, TypeDatabase, "kv-v0.25.0"))
	serr, ok := errors.AsType[*StartError](err)
	if !ok {
		t.Fatalf("got %v", err)
	}
	t.Log(serr.Cause)
	if !strings.Contains(serr.Cause, "this is a secrets or auth plugin, registered as database") {
		t.Errorf("cause: %s", serr.Cause)
	}
}

func TestRealEvilPluginIsSurvived(t *testing.T) {
	s := realSupervisor(t, func(c *Config) { c.StartTimeout, c.LogBytesPerSecond, c.MaxReply = 2*time.Second, 64<<10, 1<<20 })
	for mode, want := range map[string]string{
		"exit1": "exited with status 1", "segfault": "SIGSEGV", "hang": "did not answer within 2s", "garbage": "where the handshake belongs",
		"endless-line": "where the handshake belongs", "tcp-handshake": "only unix sockets", "close-socket": "does not talk on its socket",
	} {
		_, err := s.Start(t.Context(), realSpec(t, s, TypeSecret, "evil", "-mode", mode))
		if serr, ok := errors.AsType[*StartError](err); !ok || !strings.Contains(serr.Cause, want) {
			t.Errorf("%s: %v", mode, err)
		}
	}
	for mode, phase := range map[string]string{
		"setup-fails": "setup", "setup-hangs": "setup", "setup-panics": "setup",
		"initialize-fails": "initialize", "initialize-hangs": "initialize", "initialize-panics": "initialize",
	} {
		p := start(t, s, realSpec(t, s, TypeSecret, "evil", "-mode", mode))
		b, err := p.Backend(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		err = b.Setup(ctx, Setup{Storage: newMemory()})
		if err == nil {
			err = b.Initialize(ctx)
		}
		cancel()
		f, ok := errors.AsType[*fault.Error](err)
		if !ok || f.Kind != fault.Refused || f.Op != phase {
			t.Errorf("%s: %v", mode, err)
		}
		if err := p.Close(t.Context()); err != nil {
			t.Error(err)
		}
	}
	for mode, kind := range map[string]fault.Kind{
		"panic": fault.OutcomeUnknown, "exit": fault.OutcomeUnknown, "crash-after-write": fault.OutcomeUnknown, "never": fault.Deadline,
		"huge-reply": fault.TooLarge,
	} {
		p := start(t, s, realSpec(t, s, TypeSecret, "evil", "-mode", mode, "-size", "8000000"))
		b := ready(t, p, Setup{Storage: newMemory()})
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		_, err := b.HandleRequest(ctx, &pluginpb.Request{Operation: "update", Path: "data/x", Data: `{"value":"1"}`})
		cancel()
		if !fault.Is(err, kind) {
			t.Errorf("%s: %v of kind %s", mode, err, fault.KindOf(err))
		}
		if err := p.Close(t.Context()); err != nil {
			t.Errorf("%s: %v", mode, err)
		}
	}
	for _, mode := range []string{"", "ignore-sigterm", "daemon", "hold-stdout", "stderr-flood", "cleanup-hangs"} {
		p := start(t, s, realSpec(t, s, TypeSecret, "evil", "-mode", mode, "-size", "20000000"))
		b := ready(t, p, Setup{Storage: &tree{newMemory()}})
		for range 3 {
			must(t, b, "update", "count/a", "{}")
		}
		if got := must(t, b, "read", "count/a", "{}"); got["n"] != float64(3) {
			t.Errorf("%s: counted %v", mode, got)
		}
		if mode == "ignore-sigterm" {
			_ = syscall.Kill(p.Pid(), syscall.SIGSTOP)
		}
		begin := time.Now()
		if err := p.Close(t.Context()); err != nil {
			t.Errorf("%s: %v", mode, err)
		}
		t.Logf("%q ended in %s: %s", mode, time.Since(begin).Round(time.Millisecond), p.Exit())
		if alive(p.Pid()) {
			t.Errorf("%s is alive", mode)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(s.sockets.path, "plugin-dir*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
