package database

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"rollcall/node/fault"
	"rollcall/node/supervisor"
	commandv1 "rollcall/proto/command/v1"
	pluginpb "rollcall/proto/plugin"
)

// memory is a mount's storage.
type memory map[string][]byte

func (m memory) List(_ context.Context, prefix string) (out []string, _ error) {
	for _, k := range slices.Sorted(maps.Keys(m)) {
		if rest, ok := strings.CutPrefix(k, prefix); ok {
			out = append(out, rest)
		}
	}
	return out, nil
}

func (m memory) Get(_ context.Context, key string) (*supervisor.Entry, error) {
	if v, ok := m[key]; ok {
		return &supervisor.Entry{Key: key, Value: v}, nil
	}
	return nil, nil
}

func (m memory) Put(_ context.Context, e *supervisor.Entry) error {
	m[e.Key] = e.Value
	return nil
}

func (m memory) Delete(_ context.Context, key string) error {
	delete(m, key)
	return nil
}

// node is a Host whose connections are what was put, and whose databases answer what the test says.
type node struct {
	t       *testing.T
	mounts  map[string]*commandv1.Mount
	configs map[string][]byte
	moving  string
	// tried are the details of each trial; tryErr refuses it.
	tried  []map[string]any
	tryErr error
	putErr error
	calls  []string
	last   []byte
	call   func(path string) ([]byte, error)
	record func(which []*commandv1.Mount) *commandv1.Reload
}

func (n *node) NodeID() string                          { return "n1" }
func (n *node) Connection(name string) *commandv1.Mount { return n.mounts[name] }
func (n *node) Moving(*commandv1.Mount) string          { return n.moving }
func (n *node) Stored(connection *commandv1.Mount) []byte {
	return n.configs[connection.GetConnection()]
}

func (n *node) Delete(_ context.Context, name string) error {
	delete(n.mounts, name)
	return nil
}

func (n *node) Connections() (out []*commandv1.Mount) {
	for _, k := range slices.Sorted(maps.Keys(n.mounts)) {
		out = append(out, n.mounts[k])
	}
	return out
}

func (n *node) Resolve(plugin, version string) (*commandv1.Spec, error) {
	if plugin == "nah" {
		return nil, fault.Text(fault.Invalid, "plugin not found in the catalog: nah")
	}
	return &commandv1.Spec{Type: "database", Name: plugin, Version: version, Sha256: "sum of " + plugin + version}, nil
}

func (n *node) Resolved(m *commandv1.Mount) error {
	if m.GetConfiguredVersion() == "v9.0.0" {
		return errors.New("plugin not found in the catalog: version=v9.0.0")
	}
	return nil
}

func (n *node) Try(_ context.Context, _ *commandv1.Spec, details *structpb.Struct, _ bool) (*structpb.Struct, error) {
	n.tried = append(n.tried, details.AsMap())
	return details, n.tryErr
}

func (n *node) Put(_ context.Context, c *commandv1.PutConnection) error {
	if n.putErr != nil && !fault.Is(n.putErr, fault.Deadline) {
		return n.putErr
	}
	n.configs[c.GetName()] = c.GetConfig()
	n.mounts[c.GetName()] = &commandv1.Mount{
		Uuid: "uuid-" + c.GetName(), Connection: c.GetName(), Type: c.GetPluginName(), ConfiguredVersion: c.GetPluginVersion(),
		Wanted: &commandv1.Wanted{Spec: &commandv1.Spec{Name: c.GetPluginName(), Version: c.GetPluginVersion()}},
	}
	return n.putErr
}

func (n *node) Reload(_ context.Context, which []*commandv1.Mount, _ string) (*commandv1.Reload, error) {
	return n.record(which), nil
}

func (n *node) Call(_ context.Context, m *commandv1.Mount, path string, data []byte) ([]byte, error) {
	n.calls, n.last = append(n.calls, m.GetConnection()+" "+path), data
	return n.call(path)
}

func newNode(t *testing.T) (*Engine, *node) {
	n := &node{t: t, mounts: map[string]*commandv1.Mount{}, configs: map[string][]byte{}}
	n.call = func(string) ([]byte, error) { return []byte(`{"username":"v_1"}`), nil }
	e := NewEngine(n)
	err := e.Setup(t.Context(), supervisor.Setup{Storage: memory{}, System: supervisor.System{
		LeaseTTLs: func() (time.Duration, time.Duration) { return 2 * time.Hour, 10 * time.Hour },
	}})
	if err != nil {
		t.Fatal(err)
	}
	return e, n
}

func do(t *testing.T, e *Engine, op, path, body string) (map[string]any, *pluginpb.Response, error) {
	t.Helper()
	if body == "" {
		body = "{}"
	}
	resp, err := e.HandleRequest(t.Context(), &pluginpb.Request{Operation: op, Path: path, Data: body, DisplayName: "token"})
	out := map[string]any{}
	if d := resp.GetData(); d != "" {
		if err := json.Unmarshal([]byte(d), &out); err != nil {
			t.Fatalf("%s %s: %v", op, path, err)
		}
	}
	return out, resp, err
}

func must(t *testing.T, e *Engine, op, path, body string) (map[string]any, *pluginpb.Response) {
	t.Helper()
	out, resp, err := do(t, e, op, path, body)
	if err != nil {
		t.Fatalf("%s %s: %v", op, path, err)
	}
	return out, resp
}

func TestAConnectionIsReadWithoutItsSecrets(t *testing.T) {
	e, _ := newNode(t)
	must(t, e, "update", "config/a", `{"plugin_name":"redis","allowed_roles":"x, y","password":"hunter22","private_key":"k",
		"username":"root","connection_url":"redis://root:hunter22@host/0","other_url":"pg://u:p%40ss@host","nested":{"api_token":"t","note":"hunter22"},
		"templated":"pg://{{username}}:{{password}}@host","port":6379}`)
	out, resp := must(t, e, "read", "config/a", "")
	for _, secret := range []string{"hunter22", "p%40ss", "p@ss", `"k"`, `"t"`} {
		if strings.Contains(resp.GetData(), secret) {
			t.Errorf("%s is shown: %s", secret, resp.GetData())
		}
	}
	details := out["connection_details"].(map[string]any)
	if details["username"] != "root" || details["port"] != 6379.0 || details["connection_url"] != "redis://root:*****@host/0" ||
		details["templated"] != "pg://{{username}}:{{password}}@host" || fmt.Sprint(out["allowed_roles"]) != "[x y]" {
		t.Errorf("%v", out)
	}
}

func TestWhatIsNotNamedInAConfigStaysAndAnotherPluginBeginsAnew(t *testing.T) {
	e, n := newNode(t)
	must(t, e, "create", "config/a", `{"plugin_name":"redis","plugin_version":"v1.0.0","password":"p","host":"h","allowed_roles":["r"]}`)
	must(t, e, "update", "config/a", `{"host":"h2"}`)
	if got := n.tried[1]; got["password"] != "p" || got["host"] != "h2" {
		t.Errorf("tried with %v", got)
	}
	if out, _ := must(t, e, "read", "config/a", ""); fmt.Sprint(out["allowed_roles"]) != "[r]" || out["plugin_name"] != "redis" {
		t.Errorf("%v", out)
	}
	must(t, e, "update", "config/a", `{"plugin_name":"elastic","url":"u"}`)
	if got := n.tried[2]; len(got) != 1 || got["url"] != "u" {
		t.Errorf("another plugin was tried with %v", got)
	}
	n.moving = "r1"
	if _, _, err := do(t, e, "update", "config/a", `{"url":"u2"}`); !fault.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "r1") {
		t.Errorf("a config while the connection is reloaded: %v", err)
	}
	if len(n.tried) != 3 {
		t.Error("a process was started beside a reload's")
	}
}

func TestAConfigThatIsRefusedIsNotStored(t *testing.T) {
	e, n := newNode(t)
	n.tryErr = fault.Text(fault.Internal, "access denied")
	for body, words := range map[string]string{
		`{"plugin_name":"redis"}`: "error creating database object: access denied",
		`{"plugin_name":"nah"}`:   "plugin not found in the catalog: nah",
		`{}`:                      "empty plugin name",
		`{"plugin_name":7}`:       `"plugin_name": it must be a text`,
		`{"plugin_name":"redis","verify_connection":"x"}`: "true or false",
		`{"plugin_name":"redis","allowed_roles":{}}`:      "a list of texts",
		`{"plugin_name":"redis","password_policy":"p"}`:   "no password policies",
	} {
		if _, _, err := do(t, e, "update", "config/a", body); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: %v", body, err)
		}
	}
	n.tryErr = fault.Text(fault.Refused, "no such file")
	if _, _, err := do(t, e, "update", "config/a", `{"plugin_name":"redis"}`); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "could not be started") {
		t.Errorf("a plugin that does not start: %v", err)
	}
	if len(n.mounts) != 0 {
		t.Errorf("stored: %v", n.mounts)
	}
	n.tryErr, n.putErr = nil, fault.Text(fault.Deadline, "still starting")
	if _, resp, err := do(t, e, "update", "config/a", `{"plugin_name":"redis"}`); err != nil || len(resp.GetWarnings()) != 1 {
		t.Errorf("stored and not open yet: %v %v", resp, err)
	}
}

func TestPathsThatAreNotThereSayWhy(t *testing.T) {
	e, _ := newNode(t)
	for _, c := range []struct {
		op, path string
		kind     fault.Kind
	}{
		{"read", "nah", fault.UnsupportedPath},
		{"read", "config", fault.UnsupportedPath},
		{"read", "config/a/b", fault.UnsupportedPath},
		{"read", "config/-a", fault.Invalid},
		{"patch", "config/a", fault.UnsupportedOperation},
		{"read", "reset/a", fault.UnsupportedOperation},
		{"read", "reload/a", fault.UnsupportedOperation},
		{"update", "creds/a", fault.UnsupportedOperation},
		{"update", "reset/a", fault.Invalid},
		{"update", "rotate-root/a", fault.Invalid},
		{"update", "rotate-role/a", fault.Invalid},
		{"list", "static-roles", fault.Invalid},
		{"read", "static-creds/a", fault.Invalid},
		{"read", "creds/nah", fault.Invalid},
	} {
		if _, _, err := do(t, e, c.op, c.path, ""); !fault.Is(err, c.kind) {
			t.Errorf("%s %s: %v, want %v", c.op, c.path, err, c.kind)
		}
	}
	for _, path := range []string{"config", "roles"} {
		if _, resp := must(t, e, "list", path, ""); resp != nil {
			t.Errorf("an empty list of %s: %v", path, resp)
		}
	}
	if out, _ := must(t, e, "help", "config/a", ""); out["help"] == "" {
		t.Error("no help")
	}
}

func TestRolesAreCheckedAndKept(t *testing.T) {
	e, _ := newNode(t)
	must(t, e, "update", "roles/r", `{"db_name":"a","creation_statements":"one, with a comma","default_ttl":"1h","max_ttl":7200}`)
	must(t, e, "update", "roles/r", `{"revocation_statements":["two","three"]}`)
	out, _ := must(t, e, "read", "roles/r", "")
	if fmt.Sprint(out["creation_statements"], out["revocation_statements"], out["default_ttl"], out["max_ttl"]) !=
		"[one, with a comma] [two three] 3600 7200" || out["credential_type"] != "password" {
		t.Errorf("%v", out)
	}
	for body, words := range map[string]string{
		`{}`:                                   "empty database name",
		`{"db_name":"a","default_ttl":-1}`:     "not negative",
		`{"db_name":"a","default_ttl":"soon"}`: "not negative",
		`{"db_name":"a","default_ttl":20,"max_ttl":10}`:       "cannot be greater",
		`{"db_name":"a","credential_type":"rsa_private_key"}`: "passwords",
	} {
		if _, _, err := do(t, e, "update", "roles/bad", body); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), words) {
			t.Errorf("%s: %v", body, err)
		}
	}
	if out, _ := must(t, e, "list", "roles", ""); fmt.Sprint(out["keys"]) != "[r]" {
		t.Errorf("%v", out)
	}
	must(t, e, "delete", "roles/r", "")
	if _, resp := must(t, e, "read", "roles/r", ""); resp != nil {
		t.Errorf("deleted, and read: %v", resp)
	}
}

func TestCredentialsAreLentRenewedAndRevokedOnTheirConnection(t *testing.T) {
	e, n := newNode(t)
	must(t, e, "update", "config/a", `{"plugin_name":"redis","allowed_roles":"app-*"}`)
	must(t, e, "update", "roles/app-1", `{"db_name":"a","creation_statements":"C","revocation_statements":"D","default_ttl":"1h","max_ttl":"3h"}`)
	must(t, e, "update", "roles/other", `{"db_name":"a"}`)
	must(t, e, "update", "roles/lost", `{"db_name":"gone"}`)
	for role, words := range map[string]string{"other": `"other" is not an allowed role`, "lost": `failed to find entry for connection with name: "gone"`} {
		if _, _, err := do(t, e, "read", "creds/"+role, ""); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), words) {
			t.Errorf("creds/%s: %v", role, err)
		}
	}
	out, resp := must(t, e, "read", "creds/app-1", "")
	made := &pluginpb.NewUserRequest{}
	if err := protojson.Unmarshal(n.last, made); err != nil {
		t.Fatal(err)
	}
	until := time.Until(made.GetExpiration().AsTime())
	if out["username"] != "v_1" || out["password"] != made.GetPassword() || len(made.GetPassword()) != passwordLength || !every(made.GetPassword()) ||
		made.GetStatements().GetCommands()[0] != "C" || made.GetUsernameConfig().GetRoleName() != "app-1" || until < time.Hour || until > time.Hour+time.Minute {
		t.Errorf("%v made by %v", out, made)
	}
	secret := resp.GetSecret()
	if o := secret.GetLeaseOptions(); o.GetTTL() != int64(time.Hour) || o.GetMaxTTL() != int64(3*time.Hour) || !o.GetRenewable() {
		t.Errorf("lent for %v", o)
	}
	if strings.Contains(secret.GetInternalData(), made.GetPassword()) {
		t.Error("the lease keeps the password")
	}
	secret.LeaseOptions.IssueTime = timestamppb.New(time.Now().Add(-150 * time.Minute))
	secret.LeaseOptions.Increment = int64(2 * time.Hour)
	renewed, err := e.HandleRequest(t.Context(), &pluginpb.Request{Operation: "renew", Path: "creds/app-1", Data: "{}", Secret: secret})
	if err != nil {
		t.Fatal(err)
	}
	if ttl := time.Duration(renewed.GetSecret().GetLeaseOptions().GetTTL()); ttl > 30*time.Minute || ttl < 29*time.Minute {
		t.Errorf("renewed for %v, half an hour under its max", ttl)
	}
	secret.LeaseOptions.IssueTime = timestamppb.New(time.Now().Add(-4 * time.Hour))
	if _, err := e.HandleRequest(t.Context(), &pluginpb.Request{Operation: "renew", Data: "{}", Secret: secret}); !fault.Is(err, fault.Invalid) {
		t.Errorf("renewed past its max: %v", err)
	}
	// A lease is revoked by what it keeps, also when its role is gone.
	must(t, e, "delete", "roles/app-1", "")
	if _, err := e.HandleRequest(t.Context(), &pluginpb.Request{Operation: "revoke", Data: "{}", Secret: secret}); err != nil {
		t.Fatal(err)
	}
	if want := []string{"a new-user", "a update-user", "a delete-user"}; !slices.Equal(n.calls, want) || !strings.Contains(string(n.last), `"D"`) {
		t.Errorf("%q %s", n.calls, n.last)
	}
	if _, err := e.HandleRequest(t.Context(), &pluginpb.Request{Operation: "revoke", Data: "{}", Secret: &pluginpb.Secret{InternalData: "{}"}}); !fault.Is(err, fault.Invalid) {
		t.Errorf("a lease of something else: %v", err)
	}
}

func TestAFailureOfTheDatabaseIsNothingThatClientsRepeatAndADeadPluginIsSaidAsItIs(t *testing.T) {
	e, n := newNode(t)
	must(t, e, "update", "config/a", `{"plugin_name":"redis","allowed_roles":"*"}`)
	must(t, e, "update", "roles/r", `{"db_name":"a"}`)
	for got, want := range map[fault.Kind]fault.Kind{
		fault.Internal: fault.Invalid, fault.OutcomeUnknown: fault.OutcomeUnknown, fault.Unavailable: fault.Unavailable, fault.NotLeader: fault.NotLeader,
	} {
		n.call = func(string) ([]byte, error) { return nil, fault.Text(got, "it says so") }
		if _, _, err := do(t, e, "read", "creds/r", ""); !fault.Is(err, want) {
			t.Errorf("%v becomes %v, want %v", got, err, want)
		}
	}
}

func TestAReloadOfThePluginsConnectionsNamesThoseThatGoOnAsTheyWere(t *testing.T) {
	e, n := newNode(t)
	for _, name := range []string{"a", "b", "c"} {
		must(t, e, "update", "config/"+name, `{"plugin_name":"redis"}`)
	}
	must(t, e, "update", "config/d", `{"plugin_name":"redis","plugin_version":"v9.0.0"}`)
	must(t, e, "update", "config/e", `{"plugin_name":"elastic"}`)
	verdict := map[string]commandv1.Verdict{
		"uuid-a": commandv1.Verdict_VERDICT_SWITCHED, "uuid-b": commandv1.Verdict_VERDICT_REFUSED, "uuid-c": commandv1.Verdict_VERDICT_SWITCHED,
	}
	n.record = func(which []*commandv1.Mount) *commandv1.Reload {
		rl := &commandv1.Reload{Id: "x", Participants: []*commandv1.Participant{{NodeId: "n2"}, {NodeId: "n1"}}}
		for _, m := range which {
			rl.Participants[1].Mounts = append(rl.Participants[1].Mounts, &commandv1.MountOutcome{
				MountUuid: m.GetUuid(), Verdict: verdict[m.GetUuid()], Report: &commandv1.MountReport{Cause: "no such field"},
			})
		}
		return rl
	}
	out, resp := must(t, e, "update", "reload/redis", "")
	if fmt.Sprint(out["connections"], out["count"]) != "[a c] 2" || len(resp.GetWarnings()) != 2 ||
		!strings.Contains(resp.GetWarnings()[0], "connection b") || !strings.Contains(resp.GetWarnings()[1], "connection d") {
		t.Errorf("%v %q", out, resp.GetWarnings())
	}
	if out, resp := must(t, e, "update", "reload/nah", ""); out["count"] != 0.0 || len(resp.GetWarnings()) != 1 {
		t.Errorf("no connection: %v %q", out, resp.GetWarnings())
	}
	must(t, e, "update", "reset/a", "")
	if _, _, err := do(t, e, "update", "reset/b", ""); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "no such field") {
		t.Errorf("reset of b: %v", err)
	}
	must(t, e, "delete", "config/a", "")
	if out, _ := must(t, e, "list", "config", ""); fmt.Sprint(out["keys"]) != "[b c d e]" {
		t.Errorf("%v", out)
	}
}

// plugin is a database plugin that counts what is asked of it.
type plugin struct {
	initialized, disconnected, closed int
	verified                          bool
	config                            map[string]any
	err                               error
}

func (p *plugin) Type(context.Context) (string, error) { return "redis", p.err }

func (p *plugin) Initialize(_ context.Context, c *structpb.Struct, verify bool) (*structpb.Struct, error) {
	p.initialized, p.config, p.verified = p.initialized+1, c.AsMap(), verify
	return c, p.err
}

func (p *plugin) NewUser(context.Context, *pluginpb.NewUserRequest) (string, error) {
	return "u", p.err
}
func (p *plugin) UpdateUser(context.Context, *pluginpb.UpdateUserRequest) error { return p.err }
func (p *plugin) DeleteUser(context.Context, *pluginpb.DeleteUserRequest) error { return p.err }

func (p *plugin) Disconnect(context.Context) error {
	p.disconnected++
	return nil
}

func (p *plugin) Close(context.Context) error {
	p.closed++
	return nil
}

func TestAConnectionIsOpenOnTheLeaderAlone(t *testing.T) {
	p := &plugin{}
	c := NewConnection(p)
	as := func(state supervisor.ReplicationState) supervisor.Setup {
		return supervisor.Setup{
			Storage: memory{ConfigKey: []byte(`{"connection_details":{"host":"h"}}`)}, System: supervisor.System{ReplicationState: state},
		}
	}
	become := func(state supervisor.ReplicationState) {
		t.Helper()
		if err := errors.Join(c.Setup(t.Context(), as(state)), c.Initialize(t.Context())); err != nil {
			t.Fatal(err)
		}
	}
	become(supervisor.ReplicationStandby)
	if p.initialized != 0 {
		t.Error("a follower opened its connection")
	}
	become(supervisor.ReplicationActive)
	if p.initialized != 1 || p.config["host"] != "h" || p.verified || p.disconnected != 0 {
		t.Errorf("as the leader: %+v", p)
	}
	become(supervisor.ReplicationStandby)
	if p.initialized != 1 || p.disconnected != 1 {
		t.Errorf("as a follower again: %+v", p)
	}
	if kind, err := c.Type(t.Context()); kind != "secret" || err != nil {
		t.Errorf("%q, %v", kind, err)
	}
	if resp, err := c.HandleRequest(t.Context(), &pluginpb.Request{Path: pathNewUser, Data: "{}"}); err != nil || !strings.Contains(resp.GetData(), `"u"`) {
		t.Errorf("%v, %v", resp, err)
	}
	if _, err := c.HandleRequest(t.Context(), &pluginpb.Request{Path: "config", Data: "{}"}); !fault.Is(err, fault.UnsupportedPath) {
		t.Errorf("a path that is not the engine's: %v", err)
	}
	empty := NewConnection(&plugin{})
	if err := errors.Join(empty.Setup(t.Context(), supervisor.Setup{Storage: memory{}}), empty.Initialize(t.Context())); err == nil {
		t.Error("a connection without a config was opened")
	}
	p.err = errors.New("the plugin says no")
	if err := c.Setup(t.Context(), as(supervisor.ReplicationActive)); err != nil {
		t.Fatal(err)
	}
	if err := c.Initialize(t.Context()); err == nil {
		t.Error("a plugin's refusal was lost")
	}
	if _, err := c.Type(t.Context()); err == nil {
		t.Error("a plugin that does not answer what it is was taken")
	}
	if err := c.Cleanup(t.Context()); err != nil || p.closed != 1 {
		t.Errorf("%v %+v", err, p)
	}
}
