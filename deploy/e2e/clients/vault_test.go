package clients

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	vault "github.com/hashicorp/vault/api"
)

// vaultClient is Vault's Go library as its users configure it: an address and a token.
func vaultClient(t *testing.T, addr, token string) *vault.Client {
	t.Helper()
	cfg := vault.DefaultConfig()
	if cfg.Error != nil {
		t.Fatal(cfg.Error)
	}
	cfg.Address = addr
	c, err := vault.NewClient(cfg)
	if err != nil {
		t.Fatal(err)
	}
	c.SetToken(token)
	return c
}

// must ends the test on an error.
func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func got[T any](v T, err error) func(t *testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		must(t, err)
		return v
	}
}

// refused wants an API error of a status whose only text holds a text; an empty text wants no text at all.
func refused(t *testing.T, err error, status int, text string) {
	t.Helper()
	var e *vault.ResponseError
	if !errors.As(err, &e) {
		t.Fatalf("want status %d, got %v", status, err)
	}
	want := 1
	if text == "" {
		want = 0
	}
	if e.StatusCode != status || len(e.Errors) != want || !strings.Contains(strings.Join(e.Errors, ""), text) {
		t.Fatalf("%s: %d %q, want %d %q", e.URL, e.StatusCode, e.Errors, status, text)
	}
}

func asJSON(v any) string {
	raw, err := json.Marshal(v)
	if err != nil {
		return err.Error()
	}
	return string(raw)
}

func TestVaultLibraryCatalog(t *testing.T) {
	through(t, func(t *testing.T, n at) {
		sys, name := vaultClient(t, n.addr, rootToken).Sys(), "kv-"+n.N
		in := &vault.RegisterPluginInput{
			Name: name, Type: vault.PluginTypeSecrets, Command: "kv-" + kvOld, SHA256: shared.sums["kv-"+kvOld], Version: kvOld,
			Args: []string{"--flag"}, Env: []string{"A=b"},
		}
		resp := got(sys.RegisterPluginDetailed(in))(t)
		n.note("registered %s", asJSON(resp))
		p := got(sys.GetPlugin(&vault.GetPluginInput{Name: name, Type: vault.PluginTypeSecrets, Version: kvOld}))(t)
		if p.SHA256 != in.SHA256 || p.Command != in.Command || !slices.Equal(p.Args, in.Args) || p.Version != kvOld || p.Builtin {
			t.Errorf("%+v", p)
		}
		n.note("plugin %s", asJSON(p))
		for _, kind := range []vault.PluginType{vault.PluginTypeUnknown, vault.PluginTypeSecrets, vault.PluginTypeCredential, vault.PluginTypeDatabase} {
			list := got(sys.ListPlugins(&vault.ListPluginsInput{Type: kind}))(t)
			seen := slices.Contains(list.PluginsByType[vault.PluginTypeSecrets], name)
			if want := kind == vault.PluginTypeUnknown || kind == vault.PluginTypeSecrets; seen != want {
				t.Errorf("list %s: %v, want %v: %v", kind, seen, want, list.PluginsByType)
			}
			i := slices.IndexFunc(list.Details, func(d vault.PluginDetails) bool { return d.Name == name })
			if seen {
				n.note("detail %s", asJSON(list.Details[i]))
			}
		}
		for _, c := range []struct {
			change func(*vault.RegisterPluginInput)
			text   string
		}{
			{func(i *vault.RegisterPluginInput) { i.SHA256 = "zz" }, "Could not decode SHA-256 value from Hex"},
			{func(i *vault.RegisterPluginInput) { i.Version = "abc" }, `version "abc" is not a valid semantic version`},
			{func(i *vault.RegisterPluginInput) { i.Command = "kv-" + kvNew }, "sha256 does not match the file"},
			{func(i *vault.RegisterPluginInput) { i.Command = "../kv" }, "parent references"},
			{func(i *vault.RegisterPluginInput) { i.OCIImage, i.Command = "image", "" }, "container plugins are not supported"},
			{func(i *vault.RegisterPluginInput) { i.Download = true }, "download is not supported"},
		} {
			bad := *in
			c.change(&bad)
			refused(t, sys.RegisterPlugin(&bad), 400, c.text)
		}
		_, err := sys.GetPlugin(&vault.GetPluginInput{Name: name, Type: vault.PluginTypeSecrets})
		refused(t, err, 404, "")
		_, err = sys.GetPlugin(&vault.GetPluginInput{Name: name, Type: vault.PluginTypeCredential, Version: kvOld})
		refused(t, err, 404, "")
		del := &vault.DeregisterPluginInput{Name: name, Type: vault.PluginTypeSecrets, Version: kvOld}
		must(t, sys.DeregisterPlugin(del))
		must(t, sys.DeregisterPlugin(del)) // an absent one is no error
		_, err = sys.GetPlugin(&vault.GetPluginInput{Name: name, Type: vault.PluginTypeSecrets, Version: kvOld})
		refused(t, err, 404, "")

		ctx := context.Background()
		runtimes := got(sys.ListPluginRuntimes(ctx, nil))(t)
		n.note("runtimes %s", asJSON(runtimes))
		_, err = sys.GetPluginRuntime(ctx, &vault.GetPluginRuntimeInput{Name: "x", Type: vault.PluginRuntimeTypeContainer})
		refused(t, err, 404, "")
		refused(t, sys.RegisterPluginRuntime(ctx, &vault.RegisterPluginRuntimeInput{Name: "x", Type: vault.PluginRuntimeTypeContainer}),
			400, "container plugins are not supported")
		refused(t, sys.DeregisterPluginRuntime(ctx, &vault.DeregisterPluginRuntimeInput{Name: "x", Type: vault.PluginRuntimeTypeContainer}),
			400, "container plugins are not supported")
	})
}

// registerVault enters a plugin under a name of the run's own.
func registerVault(t *testing.T, n at, kind vault.PluginType, name, file, version string) {
	t.Helper()
	must(t, vaultClient(t, n.addr, rootToken).Sys().RegisterPlugin(&vault.RegisterPluginInput{
		Name: name, Type: kind, Command: file, SHA256: shared.sums[file], Version: version,
	}))
}

func TestVaultLibraryMounts(t *testing.T) {
	through(t, func(t *testing.T, n at) {
		sys, name, path := vaultClient(t, n.addr, rootToken).Sys(), "kvm-"+n.N, "mounts/"+n.N
		registerVault(t, n, vault.PluginTypeSecrets, name, "kv-"+kvOld, kvOld)
		must(t, sys.Mount(path, &vault.MountInput{
			Type: name, Description: "d", Options: map[string]string{"version": "1"},
			Config: vault.MountConfigInput{DefaultLeaseTTL: "30m", MaxLeaseTTL: "3600", ListingVisibility: "hidden", PluginVersion: "0.24.1"},
		}))
		seen := func() *vault.MountOutput {
			t.Helper()
			m := got(sys.GetMount(path))(t)
			all := got(sys.ListMounts())(t)
			if asJSON(all[path+"/"]) != asJSON(m) {
				t.Errorf("the list says %s, the mount %s", asJSON(all[path+"/"]), asJSON(m))
			}
			return m
		}
		m := seen()
		if m.Config.DefaultLeaseTTL != 1800 || m.Config.MaxLeaseTTL != 3600 || m.PluginVersion != kvOld || m.RunningVersion != kvOld ||
			m.RunningSha256 != shared.sums["kv-"+kvOld] || m.UUID == "" || m.Accessor == "" {
			t.Errorf("%+v", m)
		}
		n.note("mounted %s", asJSON(m))

		// TuneMount sends every field of its input: what is empty there must stay what it was.
		desc := "e"
		must(t, sys.TuneMount(path, vault.MountConfigInput{Description: &desc}))
		conf := got(sys.MountConfig(path))(t)
		if conf.DefaultLeaseTTL != 1800 || conf.MaxLeaseTTL != 3600 || conf.ListingVisibility != "hidden" {
			t.Errorf("a tune of the description changed the rest: %+v", conf)
		}
		if m = seen(); m.Description != "e" || m.Options["version"] != "1" {
			t.Errorf("%+v", m)
		}
		must(t, sys.TuneMount(path, vault.MountConfigInput{DefaultLeaseTTL: "system", Options: map[string]string{"x": "y"}}))
		if m = seen(); m.Config.DefaultLeaseTTL != 0 || m.Config.MaxLeaseTTL != 3600 || m.Options["version"] != "1" || m.Options["x"] != "y" {
			t.Errorf("%+v", m)
		}
		empty := ""
		must(t, sys.TuneMountAllowNil(path, vault.TuneMountConfigInput{Description: &empty, Options: &map[string]string{"x": ""}}))
		if m = seen(); m.Description != "" || len(m.Options) != 1 {
			t.Errorf("%+v", m)
		}
		n.note("tuned %s %s", asJSON(m), asJSON(got(sys.MountConfig(path))(t)))

		refused(t, sys.TuneMount(path, vault.MountConfigInput{PluginVersion: "v9.9.9"}), 400, "plugin not found in the catalog")
		refused(t, sys.TuneMount(path, vault.MountConfigInput{DefaultLeaseTTL: "2h", MaxLeaseTTL: "1h"}), 400, "given default lease TTL greater than given max lease TTL")
		refused(t, sys.TuneMount(path, vault.MountConfigInput{DefaultLeaseTTL: "soon"}), 400, "default_lease_ttl")
		refused(t, sys.TuneMount("nah", vault.MountConfigInput{}), 400, "nah/")
		refused(t, sys.Mount(path, &vault.MountInput{Type: name}), 400, "path is already in use at "+path+"/")
		refused(t, sys.Mount("nah", &vault.MountInput{Type: "nope-" + n.N}), 400, "plugin not found in the catalog: nope")
		refused(t, sys.Mount("nah", &vault.MountInput{}), 400, "backend type must be specified as a string")
		refused(t, sys.Mount("sys/x", &vault.MountInput{Type: name}), 400, `cannot mount "sys/x/"`)
		_, err := sys.GetMount("nah")
		refused(t, err, 400, "No secret engine mount at nah/")
		_, err = sys.MountConfig("nah")
		refused(t, err, 400, `cannot fetch sysview for path "nah/"`)

		to := "moved/" + n.N
		move := got(sys.StartRemount(path, to))(t)
		status := got(sys.RemountStatus(move.MigrationID))(t)
		if i := status.MigrationInfo; i.SourceMount != path+"/" || i.TargetMount != to+"/" || i.MigrationStatus != "success" {
			t.Errorf("%+v", status)
		}
		_, err = sys.RemountStatus("unknown")
		refused(t, err, 404, "")
		_, err = sys.StartRemount("nah", to)
		refused(t, err, 400, `no matching mount at "nah/"`)
		must(t, sys.Remount(to, path))
		if again := seen(); again.UUID != m.UUID || again.Accessor != m.Accessor {
			t.Errorf("%+v", again)
		}
		must(t, sys.Unmount(path))
		must(t, sys.Unmount(path))
		_, err = sys.GetMount(path)
		refused(t, err, 400, "No secret engine mount at "+path+"/")
	})
}

func TestVaultLibraryKV(t *testing.T) {
	through(t, func(t *testing.T, n at) {
		c, ctx := vaultClient(t, n.addr, rootToken), context.Background()
		name := "kvd-" + n.N
		registerVault(t, n, vault.PluginTypeSecrets, name, "kv-"+kvNew, "")
		must(t, c.Sys().Mount("one-"+n.N, &vault.MountInput{Type: name}))
		must(t, c.Sys().Mount("two-"+n.N, &vault.MountInput{Type: name, Options: map[string]string{"version": "2"}}))
		one, two := c.KVv1("one-"+n.N), c.KVv2("two-"+n.N)

		must(t, one.Put(ctx, "a", map[string]any{"k": "v", "n": 7}))
		s := got(one.Get(ctx, "a"))(t)
		if s.Data["k"] != "v" || fmt.Sprint(s.Data["n"]) != "7" {
			t.Errorf("%v", s.Data)
		}
		n.note("v1 %s", asJSON(s.Data))
		must(t, one.Delete(ctx, "a"))
		if _, err := one.Get(ctx, "a"); !errors.Is(err, vault.ErrSecretNotFound) {
			t.Error(err)
		}

		// The engine upgrades its storage for a moment after it was mounted, and says so.
		until(t, "the first write", func() error {
			_, err := two.Put(ctx, "a/b", map[string]any{"k": "v1"})
			return err
		})
		v := got(two.Put(ctx, "a/b", map[string]any{"k": "v2"}, vault.WithCheckAndSet(1)))(t)
		if v.VersionMetadata.Version != 2 {
			t.Errorf("%+v", v.VersionMetadata)
		}
		_, err := two.Put(ctx, "a/b", map[string]any{"k": "v3"}, vault.WithCheckAndSet(1))
		refused(t, err, 400, "check-and-set parameter did not match the current version")
		v = got(two.Patch(ctx, "a/b", map[string]any{"l": "w"}))(t)
		v = got(two.Patch(ctx, "a/b", map[string]any{"m": "x"}, vault.WithMergeMethod("rw")))(t)
		v = got(two.Get(ctx, "a/b"))(t)
		if asJSON(v.Data) != `{"k":"v2","l":"w","m":"x"}` {
			t.Errorf("%v", v.Data)
		}
		v = got(two.GetVersion(ctx, "a/b", 1))(t)
		n.note("v2 %s %s", asJSON(v.Data), asJSON(got(two.GetVersionsAsList(ctx, "a/b"))(t)))
		must(t, two.DeleteVersions(ctx, "a/b", []int{1}))
		must(t, two.Undelete(ctx, "a/b", []int{1}))
		must(t, two.Destroy(ctx, "a/b", []int{1}))
		v = got(two.Rollback(ctx, "a/b", 2))(t)
		must(t, two.PutMetadata(ctx, "a/b", vault.KVMetadataPutInput{MaxVersions: 9, CustomMetadata: map[string]any{"c": "d"}}))
		more := map[string]any{"e": "f"}
		must(t, two.PatchMetadata(ctx, "a/b", vault.KVMetadataPatchInput{CustomMetadata: more}))
		md := got(two.GetMetadata(ctx, "a/b"))(t)
		if md.MaxVersions != 9 || md.CurrentVersion != 5 || asJSON(md.CustomMetadata) != `{"c":"d","e":"f"}` || !md.Versions["1"].Destroyed {
			t.Errorf("%+v", md)
		}
		n.note("metadata %s", asJSON(md))
		list := got(c.Logical().List("two-" + n.N + "/metadata"))(t)
		n.note("list %s", asJSON(list.Data))
		must(t, two.Delete(ctx, "a/b"))
		must(t, two.DeleteMetadata(ctx, "a/b"))
		if _, err := two.Get(ctx, "a/b"); !errors.Is(err, vault.ErrSecretNotFound) {
			t.Error(err)
		}
		if s, err := c.Logical().List("two-" + n.N + "/metadata"); s != nil || err != nil {
			t.Errorf("an empty list: %v %v", s, err)
		}

		// v1 becomes v2 by a tune, as `kv enable-versioning` asks for, and never back.
		must(t, one.Put(ctx, "kept", map[string]any{"k": "v"}))
		must(t, c.Sys().TuneMount("one-"+n.N, vault.MountConfigInput{Options: map[string]string{"version": "2"}}))
		until(t, "KV to become versioned", func() error {
			v, err := c.KVv2("one-"+n.N).Get(ctx, "kept")
			if err == nil && v.Data["k"] != "v" {
				err = fmt.Errorf("%v", v.Data)
			}
			return err
		})
		refused(t, c.Sys().TuneMount("one-"+n.N, vault.MountConfigInput{Options: map[string]string{"version": "1"}}), 400, "cannot downgrade mount from version 2")
	})
}

func TestVaultLibraryReload(t *testing.T) {
	through(t, func(t *testing.T, n at) {
		c, ctx := vaultClient(t, n.addr, rootToken), context.Background()
		sys, name, path := c.Sys(), "kvr-"+n.N, "reload-"+n.N
		registerVault(t, n, vault.PluginTypeSecrets, name, "kv-"+kvOld, kvOld)
		registerVault(t, n, vault.PluginTypeSecrets, "idle-"+n.N, "kv-"+kvOld, kvOld)
		must(t, sys.Mount(path, &vault.MountInput{Type: name}))
		ended := func(id string) *vault.ReloadStatusResponse {
			t.Helper()
			var s *vault.ReloadStatusResponse
			until(t, "reload "+id, func() (err error) {
				s, err = sys.ReloadPluginStatus(&vault.ReloadPluginStatusInput{ReloadID: id})
				if err == nil && len(s.Results) != len(shared.nodes) {
					err = fmt.Errorf("%d nodes have finished", len(s.Results))
				}
				return err
			})
			for who, r := range s.Results {
				if r.Error != "" || time.Since(r.Timestamp).Abs() > time.Hour {
					t.Errorf("%s: %+v", who, r)
				}
			}
			return s
		}
		id := got(sys.ReloadPlugin(&vault.ReloadPluginInput{Plugin: name, Scope: "global"}))(t)
		n.note("reloaded, %d results", len(ended(id).Results))
		id = got(sys.ReloadPlugin(&vault.ReloadPluginInput{Mounts: []string{path + "/"}, Scope: "global"}))(t)
		ended(id)
		id = got(sys.RootReloadPlugin(ctx, &vault.RootReloadPluginInput{Plugin: name, Type: vault.PluginTypeSecrets, Scope: "global"}))(t)
		ended(id)
		for _, scope := range []string{"", "global"} {
			id = got(sys.RootReloadPlugin(ctx, &vault.RootReloadPluginInput{Plugin: "idle-" + n.N, Type: vault.PluginTypeUnknown, Scope: scope}))(t)
			n.note("nothing to reload with scope %q: id %v", scope, id != "")
		}
		if id = got(sys.ReloadPlugin(&vault.ReloadPluginInput{Plugin: name}))(t); id != "" {
			n.note("a local reload told its id")
		}
		got(sys.ReloadPlugin(&vault.ReloadPluginInput{Mounts: []string{path}}))(t)

		for _, r := range []struct {
			in   vault.ReloadPluginInput
			text string
		}{
			{vault.ReloadPluginInput{Plugin: name, Scope: "all"}, "reload scope must be omitted or 'global'"},
			{vault.ReloadPluginInput{Plugin: name, Mounts: []string{path}}, "plugin and mounts cannot be set at the same time"},
			{vault.ReloadPluginInput{Scope: "global"}, "plugin or mounts must be provided"},
			{vault.ReloadPluginInput{Plugin: "nope"}, `plugin not found in the catalog: "nope"`},
			{vault.ReloadPluginInput{Plugin: "nope", Scope: "global"}, `plugin not found in the catalog: "nope"`},
			{vault.ReloadPluginInput{Mounts: []string{"nah"}}, `cannot fetch mount entry on "nah/"`},
		} {
			_, err := sys.ReloadPlugin(&r.in)
			refused(t, err, 400, r.text)
		}
		_, err := sys.RootReloadPlugin(ctx, &vault.RootReloadPluginInput{Plugin: name, Type: vault.PluginTypeSecrets, Scope: "some"})
		refused(t, err, 400, "reload scope must be omitted or 'global'")
		_, err = sys.ReloadPluginStatus(&vault.ReloadPluginStatusInput{ReloadID: "nope"})
		refused(t, err, 404, `no reload with id "nope"`)
		_, err = sys.ReloadPluginStatus(&vault.ReloadPluginStatusInput{})
		refused(t, err, 400, "reload_id must be provided")

		// A version that cannot start: the reload fails on every node, and says so where the library looks.
		must(t, sys.RegisterPlugin(&vault.RegisterPluginInput{
			Name: name, Type: vault.PluginTypeSecrets, Command: "evil", SHA256: shared.sums["evil"], Version: "v0.99.0", Args: []string{"-mode", "exit1"},
		}))
		must(t, sys.TuneMount(path, vault.MountConfigInput{PluginVersion: "v0.99.0"}))
		id = got(sys.ReloadPlugin(&vault.ReloadPluginInput{Plugin: name, Scope: "global"}))(t)
		until(t, "the failure of "+id, func() error {
			s, err := sys.ReloadPluginStatus(&vault.ReloadPluginStatusInput{ReloadID: id})
			if err != nil {
				return err
			}
			for _, r := range s.Results {
				if r.Error != "" {
					if strings.ContainsAny(r.Error, "|\n") {
						t.Errorf("the command line's table breaks at %q", r.Error)
					}
					return nil
				}
			}
			return errors.New("no result tells of a failure")
		})
		_, err = sys.ReloadPlugin(&vault.ReloadPluginInput{Plugin: name})
		refused(t, err, 400, "told to exit with status 1")
		m := got(sys.GetMount(path))(t)
		n.note("after a failed reload: configured %s, running %s", m.PluginVersion, m.RunningVersion)
		must(t, c.KVv1(path).Put(ctx, "still", map[string]any{"k": "v"}))
	})
}

func TestVaultLibraryCluster(t *testing.T) {
	through(t, func(t *testing.T, n at) {
		c := vaultClient(t, n.addr, rootToken)
		sys := c.Sys()
		h := got(sys.Health())(t)
		if !h.Initialized || h.Sealed || h.Standby == n.leads || h.Version == "" || h.ClusterID == "" {
			t.Errorf("%+v", h)
		}
		s := got(sys.SealStatus())(t)
		if !s.Initialized || s.Sealed || s.Version != h.Version || s.ClusterID != h.ClusterID {
			t.Errorf("%+v", s)
		}
		n.note("health %s %s", h.Version, h.ClusterID)
		if ok := got(sys.InitStatus())(t); !ok {
			t.Error("not initialised")
		}
		_, err := sys.Init(&vault.InitRequest{SecretShares: 1, SecretThreshold: 1})
		refused(t, err, 400, "already initialized")
		l := got(sys.Leader())(t)
		if !l.HAEnabled || l.IsSelf != n.leads || l.LeaderAddress == "" || l.RaftAppliedIndex == 0 {
			t.Errorf("%+v", l)
		}
		n.note("leader %s", l.LeaderAddress)
		ha := got(sys.HAStatus())(t)
		active := 0
		for _, h := range ha.Nodes {
			if h.ActiveNode {
				active++
			}
			if h.Hostname == "" || h.APIAddress == "" || h.ClusterAddress == "" || h.Version == "" {
				t.Errorf("%+v", h)
			}
		}
		if len(ha.Nodes) != len(shared.nodes) || active != 1 {
			t.Errorf("%+v", ha)
		}
		raft := got(c.Logical().Read("sys/storage/raft/configuration"))(t)
		n.note("raft %s", asJSON(raft.Data["config"].(map[string]any)["servers"]))
		state := got(sys.RaftAutopilotState())(t)
		if len(state.Servers) != len(shared.nodes) || state.Leader == "" || len(state.Voters) != len(shared.nodes) {
			t.Errorf("%+v", state)
		}
		conf := got(sys.RaftAutopilotConfiguration())(t)
		n.note("autopilot %s", asJSON(conf))
		must(t, sys.PutRaftAutopilotConfiguration(conf))
		if again := got(sys.RaftAutopilotConfiguration())(t); asJSON(again) != asJSON(conf) {
			t.Errorf("writing what was read changed %s to %s", asJSON(conf), asJSON(again))
		}
		_, err = c.Logical().Write("sys/storage/raft/remove-peer", map[string]any{})
		refused(t, err, 400, "no server id provided")
		var snap bytes.Buffer
		must(t, sys.RaftSnapshot(&snap))
		if snap.Len() == 0 {
			t.Error("an empty snapshot")
		}
		err = sys.RaftSnapshotRestore(bytes.NewReader(snap.Bytes()[:snap.Len()/2]), false)
		refused(t, err, 400, "read backup")
		help := got(c.Help("sys/mounts"))(t)
		n.note("help %q", lines(help.Help)[0])
		metrics := got(c.Logical().ReadRawWithData("sys/metrics", map[string][]string{"format": {"prometheus"}}))(t)
		_ = metrics.Body.Close()
		n.note("metrics %d %s", metrics.StatusCode, metrics.Header.Get("Content-Type"))
	})
}

func TestVaultLibraryPoliciesAndTokens(t *testing.T) {
	through(t, func(t *testing.T, n at) {
		root := vaultClient(t, n.addr, rootToken)
		sys, name := root.Sys(), "pol-"+n.N
		must(t, sys.PutPolicy(name, `path "secret-`+n.N+`/*" { capabilities = ["read", "list"] }`))
		text := got(sys.GetPolicy(name))(t)
		n.note("policy %s", text)
		if all := got(sys.ListPolicies())(t); !slices.Contains(all, name) || !slices.Contains(all, "default") || !slices.Contains(all, "root") {
			t.Errorf("%v", all)
		}
		refused(t, sys.PutPolicy(name, `path "a" { capabilities = ["fly"] }`), 400, "failed to parse policy")
		refused(t, sys.PutPolicy("root", `path "a" {}`), 400, "root")
		refused(t, sys.DeletePolicy("root"), 400, "root")
		if p, err := sys.GetPolicy("nope"); p != "" || err != nil {
			t.Errorf("a policy that is not there: %q %v", p, err)
		}

		renewable := true
		made := got(root.Auth().Token().Create(&vault.TokenCreateRequest{
			Policies: []string{name}, TTL: "30m", DisplayName: "d", Metadata: map[string]string{"k": "v"}, Renewable: &renewable, NumUses: 0,
		}))(t)
		a := made.Auth
		if a.LeaseDuration != 1800 || !a.Renewable || a.Metadata["k"] != "v" || !slices.Equal(a.Policies, []string{"default", name}) || a.Orphan {
			t.Errorf("%+v", a)
		}
		n.note("token %s", asJSON(a))
		child := vaultClient(t, n.addr, a.ClientToken)
		self := got(child.Auth().Token().LookupSelf())(t)
		ttl := got(self.TokenTTL())(t)
		policies := got(self.TokenPolicies())(t)
		acc := got(self.TokenAccessor())(t)
		if ttl <= 0 || ttl > 30*time.Minute || !slices.Equal(policies, []string{"default", name}) || acc != a.Accessor {
			t.Errorf("%v %v %v", ttl, policies, acc)
		}
		if ok := got(self.TokenIsRenewable())(t); !ok {
			t.Error("not renewable")
		}
		if m := got(self.TokenMetadata())(t); m["k"] != "v" {
			t.Errorf("%v", m)
		}
		for key := range self.Data {
			n.note("lookup has %s", key)
		}
		slices.Sort(n.notes.lines) // a map's order
		got(root.Auth().Token().Lookup(a.ClientToken))(t)
		byAccessor := got(root.Auth().Token().LookupAccessor(a.Accessor))(t)
		if byAccessor.Data["id"] != "" {
			t.Error("an accessor gives the token away")
		}
		renewed := got(child.Auth().Token().RenewSelf(3600))(t)
		n.note("renewed to %d", renewed.Auth.LeaseDuration)
		got(root.Auth().Token().Renew(a.ClientToken, 600))(t)
		got(root.Auth().Token().RenewAccessor(a.Accessor, 600))(t)
		got(root.Auth().Token().RenewTokenAsSelf(a.ClientToken, 600))(t)
		n.note("capabilities %v", got(child.Sys().CapabilitiesSelf("secret-"+n.N+"/x"))(t))
		n.note("capabilities %v", got(sys.Capabilities(a.ClientToken, "sys/mounts"))(t))
		n.note("capabilities %v", got(sys.CapabilitiesAccessor(a.Accessor, "secret-"+n.N+"/x"))(t))
		_, err := child.Sys().ListMounts()
		refused(t, err, 403, "permission denied")
		refused(t, child.Sys().PutPolicy("x", ""), 403, "permission denied")
		_, err = child.Auth().Token().Create(&vault.TokenCreateRequest{Policies: []string{"root"}})
		refused(t, err, 403, "permission denied")
		_, err = root.Auth().Token().CreateWithRole(&vault.TokenCreateRequest{}, "nope")
		refused(t, err, 400, "nope")
		_, err = root.Auth().Token().Create(&vault.TokenCreateRequest{Type: "batch"})
		refused(t, err, 400, "batch")

		orphan := got(root.Auth().Token().CreateOrphan(&vault.TokenCreateRequest{Policies: []string{"default"}, TTL: "1h"}))(t)
		if !orphan.Auth.Orphan {
			t.Errorf("%+v", orphan.Auth)
		}
		must(t, root.Auth().Token().RevokeAccessor(orphan.Auth.Accessor))
		_, err = root.Auth().Token().LookupAccessor(orphan.Auth.Accessor)
		refused(t, err, 403, "invalid accessor")
		parent := got(root.Auth().Token().Create(&vault.TokenCreateRequest{Policies: []string{"root"}, TTL: "1h"}))(t)
		grown := got(vaultClient(t, n.addr, parent.Auth.ClientToken).Auth().Token().Create(&vault.TokenCreateRequest{Policies: []string{"default"}}))(t)
		must(t, root.Auth().Token().RevokeOrphan(parent.Auth.ClientToken))
		got(root.Auth().Token().Lookup(grown.Auth.ClientToken))(t)
		must(t, root.Auth().Token().RevokeTree(grown.Auth.ClientToken))
		must(t, child.Auth().Token().RevokeSelf(""))
		for _, other := range shared.nodes { // revoked through one node, revoked through all
			_, err = vaultClient(t, other.addr, a.ClientToken).Auth().Token().LookupSelf()
			refused(t, err, 403, "permission denied")
		}
		_, err = vaultClient(t, n.addr, "nonsense").Auth().Token().LookupSelf()
		refused(t, err, 403, "permission denied")
		_, err = vaultClient(t, n.addr, "").Sys().ListMounts()
		refused(t, err, 403, "permission denied")
		must(t, sys.DeletePolicy(name))
		must(t, sys.DeletePolicy(name))
	})
}

func TestVaultLibraryLeasesAndWrapping(t *testing.T) {
	through(t, func(t *testing.T, n at) {
		c := vaultClient(t, n.addr, rootToken)
		sys, path := c.Sys(), "lend-"+n.N
		registerVault(t, n, vault.PluginTypeSecrets, path, "evil", "v0.0.1")
		must(t, sys.Mount(path, &vault.MountInput{Type: path}))
		lend := func(who string) *vault.Secret {
			t.Helper()
			s := got(c.Logical().Read(path + "/creds/" + who))(t)
			if s.LeaseID == "" || s.LeaseDuration != 3600 || !s.Renewable || s.Data["user"] != who {
				t.Fatalf("%+v", s)
			}
			return s
		}
		lent := func() string {
			t.Helper()
			return asJSON(got(c.Logical().Read(path + "/lent"))(t).Data["names"])
		}
		a := lend("a")
		look := got(sys.Lookup(a.LeaseID))(t)
		if look.Data["id"] != a.LeaseID || look.Data["renewable"] != true || look.Data["expire_time"] == nil || look.Data["issue_time"] == nil {
			t.Errorf("%v", look.Data)
		}
		renewed := got(sys.Renew(a.LeaseID, 600))(t)
		if renewed.LeaseID != a.LeaseID || renewed.LeaseDuration != 600 || !renewed.Renewable {
			t.Errorf("%+v", renewed)
		}
		n.note("lent %s", lent())
		list := got(c.Logical().List("sys/leases/lookup/" + path + "/creds/a"))(t)
		if fmt.Sprint(list.Data["keys"]) != "["+strings.TrimPrefix(a.LeaseID, path+"/creds/a/")+"]" {
			t.Errorf("%v for %s", list.Data, a.LeaseID)
		}
		must(t, sys.Revoke(a.LeaseID))
		until(t, "the revocation", func() error {
			if l := lent(); l != "null" && l != "[]" {
				return errors.New(l)
			}
			return nil
		})
		_, err := sys.Renew(a.LeaseID, 60)
		refused(t, err, 400, "lease not found")
		_, err = sys.Lookup(a.LeaseID)
		refused(t, err, 400, "invalid lease")
		must(t, sys.Revoke("no/such/lease"))
		lend("b")
		lend("c")
		must(t, sys.RevokeWithOptions(&vault.RevokeOptions{LeaseID: path + "/creds/b", Prefix: true, Sync: true}))
		n.note("lent after a prefix was revoked: %s", lent())
		must(t, sys.RevokePrefix(path+"/creds"))
		until(t, "the revocation", func() error {
			if l := lent(); l != "null" && l != "[]" {
				return errors.New(l)
			}
			return nil
		})
		lend("d")
		must(t, sys.RevokeForce(path))
		// What a library's renewer does with a secret, all the way.
		s := lend("e")
		w, err := c.NewLifetimeWatcher(&vault.LifetimeWatcherInput{Secret: s, Increment: 900})
		must(t, err)
		go w.Start()
		select {
		case r := <-w.RenewCh():
			n.note("the watcher renewed to %d", r.Secret.LeaseDuration)
		case err := <-w.DoneCh():
			t.Errorf("the watcher gave up: %v", err)
		case <-time.After(limit):
			t.Error("the watcher did nothing")
		}
		w.Stop()

		wrapping := vaultClient(t, n.addr, rootToken)
		wrapping.SetWrappingLookupFunc(func(operation, path string) string { return "5m" })
		wrapped := got(wrapping.Logical().Read(path + "/info"))(t)
		wi := wrapped.WrapInfo
		if wi == nil || wi.Token == "" || wi.TTL != 300 || wi.CreationPath != path+"/info" || wrapped.Data != nil {
			t.Fatalf("%+v", wrapped)
		}
		found := got(c.Logical().Write("sys/wrapping/lookup", map[string]any{"token": wi.Token}))(t)
		n.note("wrapping lookup %s", asJSON(found.Data["creation_ttl"]))
		rewrapped := got(c.Logical().Write("sys/wrapping/rewrap", map[string]any{"token": wi.Token}))(t)
		open := got(c.Logical().Unwrap(rewrapped.WrapInfo.Token))(t)
		if open.Data["version"] != "v0.0.1" {
			t.Errorf("%+v", open)
		}
		_, err = c.Logical().Unwrap(rewrapped.WrapInfo.Token)
		refused(t, err, 400, "wrapping token is not valid or does not exist")
		mine := got(wrapping.Logical().Write("sys/wrapping/wrap", map[string]any{"a": "b"}))(t)
		open = got(vaultClient(t, n.addr, mine.WrapInfo.Token).Logical().Unwrap(""))(t) // the token of the client is the one to open
		n.note("unwrapped %s", asJSON(open.Data))
		token := got(wrapping.Auth().Token().Create(&vault.TokenCreateRequest{Policies: []string{"default"}, TTL: "5m"}))(t)
		if token.WrapInfo.WrappedAccessor == "" {
			t.Errorf("%+v", token.WrapInfo)
		}
		open = got(c.Logical().Unwrap(token.WrapInfo.Token))(t)
		if open.Auth == nil || open.Auth.ClientToken == "" || open.Auth.Accessor != token.WrapInfo.WrappedAccessor {
			t.Errorf("%+v", open)
		}
		// A secret that is read wrapped has its lease inside.
		wrapped = got(wrapping.Logical().Read(path + "/creds/f"))(t)
		open = got(c.Logical().Unwrap(wrapped.WrapInfo.Token))(t)
		if open.LeaseID == "" || open.LeaseDuration != 3600 {
			t.Errorf("%+v", open)
		}
	})
}

func TestVaultLibraryLogical(t *testing.T) {
	through(t, func(t *testing.T, n at) {
		c := vaultClient(t, n.addr, rootToken)
		path := "logical-" + n.N
		registerVault(t, n, vault.PluginTypeSecrets, path, "evil", "v0.0.1")
		must(t, c.Sys().Mount(path, &vault.MountInput{Type: path, Config: vault.MountConfigInput{PassthroughRequestHeaders: []string{"X-Mine"}}}))
		l := c.Logical()
		if s, err := l.Read(path + "/data/a"); s != nil || err != nil {
			t.Errorf("what is not there: %v %v", s, err)
		}
		s, err := l.Write(path+"/data/a", map[string]any{"value": "v"})
		if s != nil || err != nil {
			t.Errorf("a write without an answer: %v %v", s, err)
		}
		s = got(l.Read(path + "/data/a"))(t)
		n.note("read %s warnings %v", asJSON(s.Data), s.Warnings)
		s = got(l.List(path + "/data"))(t)
		n.note("list %s", asJSON(s.Data))
		s = got(l.ReadWithData(path+"/echo", map[string][]string{"value": {"x"}}))(t)
		n.note("echo %v", s.Data["value"])
		c.AddHeader("X-Mine", "h")
		c.AddHeader("X-Other", "o")
		s = got(l.Write(path+"/echo", map[string]any{"value": "y"}))(t)
		n.note("echo %s", asJSON(s.Data["headers"]))
		s = got(l.WriteBytes(path+"/echo", []byte(`{"value":"z","extra":1}`)))(t)
		n.note("echo %v warnings %q", s.Data["value"], s.Warnings)
		_, err = l.WriteBytes(path+"/echo", []byte(`[1]`))
		refused(t, err, 400, "failed to parse JSON")
		_, err = l.JSONMergePatch(context.Background(), path+"/data/a", map[string]any{"value": "w"})
		refused(t, err, 405, "unsupported operation")
		_, err = l.Read(path + "/nowhere")
		if s, rerr := l.Read(path + "/nowhere"); s != nil || rerr != nil {
			refused(t, err, 404, "unsupported path")
		}
		_, err = l.Write(path+"/info", nil)
		refused(t, err, 405, "unsupported operation")
		_, err = l.Write("nomount-"+n.N+"/x", map[string]any{"a": "b"})
		refused(t, err, 404, `no handler for route "nomount-`+n.N+`/x". route entry not found.`)
		s, err = l.Delete(path + "/data/a")
		if s != nil || err != nil {
			t.Errorf("delete: %v %v", s, err)
		}
		raw := got(l.ReadRaw(path + "/info"))(t)
		_ = raw.Body.Close()
		n.note("raw %d %s", raw.StatusCode, raw.Header.Get("Content-Type"))
		open := vaultClient(t, n.addr, "")
		s = got(open.Logical().Read(path + "/open/ping"))(t)
		n.note("without a token %s", asJSON(s.Data))
		_, err = open.Logical().Read(path + "/ping")
		refused(t, err, 403, "permission denied")
	})
}
