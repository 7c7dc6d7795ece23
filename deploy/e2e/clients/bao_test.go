package clients

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	bao "github.com/openbao/openbao/api/v2"
)

// baoClient is OpenBao's Go library as its users configure it.
func baoClient(t *testing.T, addr, token string) *bao.Client {
	t.Helper()
	cfg := bao.DefaultConfig()
	if cfg.Error != nil {
		t.Fatal(cfg.Error)
	}
	cfg.Address = addr
	c, err := bao.NewClient(cfg)
	must(t, err)
	c.SetToken(token)
	return c
}

// baoRefused is refused, for the other library's error.
func baoRefused(t *testing.T, err error, status int, text string) {
	t.Helper()
	var e *bao.ResponseError
	if !errors.As(err, &e) {
		t.Fatalf("want status %d, got %v", status, err)
	}
	if e.StatusCode != status || !strings.Contains(strings.Join(e.Errors, ""), text) || (text == "") != (len(e.Errors) == 0) {
		t.Fatalf("%s: %d %q, want %d %q", e.URL, e.StatusCode, e.Errors, status, text)
	}
}

// registerBao enters a plugin; this library sends its type as a number.
func registerBao(t *testing.T, n at, kind bao.PluginType, name, file, version string) {
	t.Helper()
	must(t, baoClient(t, n.addr, rootToken).Sys().RegisterPlugin(&bao.RegisterPluginInput{
		Name: name, Type: kind, Command: file, SHA256: shared.sums[file], Version: version,
	}))
}

func TestBaoLibraryPluginsAndMounts(t *testing.T) {
	through(t, func(t *testing.T, n at) {
		c := baoClient(t, n.addr, rootToken)
		sys, name, path := c.Sys(), "bkv-"+n.N, "bao-"+n.N
		registerBao(t, n, bao.PluginTypeSecrets, name, "kv-"+kvOld, kvOld)
		registerBao(t, n, bao.PluginTypeCredential, "bjwt-"+n.N, "auth-jwt", "")
		baoRefused(t, sys.RegisterPlugin(&bao.RegisterPluginInput{Name: name, Type: bao.PluginTypeSecrets, Command: "x"}), 400, "sha256")
		p := got(sys.GetPlugin(&bao.GetPluginInput{Name: name, Type: bao.PluginTypeSecrets, Version: kvOld}))(t)
		n.note("plugin %s", asJSON(p))
		_, err := sys.GetPlugin(&bao.GetPluginInput{Name: name, Type: bao.PluginTypeSecrets})
		baoRefused(t, err, 404, "")
		for _, kind := range append(slices.Clone(bao.PluginTypes), bao.PluginTypeUnknown) {
			list := got(sys.ListPlugins(&bao.ListPluginsInput{Type: kind}))(t)
			if kind == bao.PluginTypeSecrets && !slices.Contains(list.PluginsByType[kind], name) {
				t.Errorf("%v", list)
			}
		}
		must(t, sys.Mount(path, &bao.MountInput{Type: name, Options: map[string]string{"version": "2"}, Config: bao.MountConfigInput{
			PluginVersion: kvOld, DefaultLeaseTTL: "10m",
		}}))
		m := got(sys.MountInfo(path))(t)
		if m.RunningVersion != kvOld || m.Config.DefaultLeaseTTL != 600 || asJSON(got(sys.ListMounts())(t)[path+"/"]) != asJSON(m) {
			t.Errorf("%+v", m)
		}
		n.note("mounted %s", asJSON(m))
		desc := "d"
		must(t, sys.TuneMount(path, bao.MountConfigInput{Description: &desc, MaxLeaseTTL: "1h"}))
		conf := got(sys.MountConfig(path))(t)
		if conf.DefaultLeaseTTL != 600 || conf.MaxLeaseTTL != 3600 {
			t.Errorf("%+v", conf)
		}
		_, err = sys.MountInfo("nah")
		baoRefused(t, err, 400, "No secret engine mount at nah/")

		// An upgrade: v2 registered, tuned, reloaded everywhere, and asked for.
		registerBao(t, n, bao.PluginTypeSecrets, name, "kv-"+kvNew, kvNew)
		must(t, sys.TuneMount(path, bao.MountConfigInput{PluginVersion: kvNew}))
		if m = got(sys.MountInfo(path))(t); m.PluginVersion != kvNew || m.RunningVersion != kvOld {
			t.Errorf("a tune restarted something: %+v", m)
		}
		id := got(sys.ReloadPlugin(&bao.ReloadPluginInput{Plugin: name, Scope: "global"}))(t)
		until(t, "reload "+id, func() error {
			s, err := sys.ReloadPluginStatus(&bao.ReloadPluginStatusInput{ReloadID: id})
			if err == nil && len(s.Results) != len(shared.nodes) {
				err = fmt.Errorf("%d nodes have finished", len(s.Results))
			}
			return err
		})
		if m = got(sys.MountInfo(path))(t); m.RunningVersion != kvNew || m.RunningSha256 != shared.sums["kv-"+kvNew] {
			t.Errorf("%+v", m)
		}
		n.note("reloaded to %s", m.RunningVersion)
		_, err = sys.ReloadPlugin(&bao.ReloadPluginInput{Plugin: "nope"})
		baoRefused(t, err, 400, `plugin not found in the catalog: "nope"`)

		kv, ctx := c.KVv2(path), context.Background()
		until(t, "the first write", func() error {
			_, err := kv.Put(ctx, "deep/a", map[string]any{"k": "v"})
			return err
		})
		got(kv.Put(ctx, "deep/b", map[string]any{"k": "w"}))(t)
		v := got(kv.Get(ctx, "deep/a"))(t)
		n.note("kv %s", asJSON(v.Data))
		page := got(c.Logical().ListPage(path+"/metadata/deep", "", 10))(t)
		n.note("page %s", asJSON(page.Data["keys"]))
		_, err = c.Logical().Scan(path + "/metadata")
		baoRefused(t, err, 405, "unsupported operation")
		must(t, kv.DeleteMetadata(ctx, "deep/a"))

		must(t, sys.EnableAuthWithOptions("bj-"+n.N, &bao.EnableAuthOptions{Type: "bjwt-" + n.N, Description: "a"}))
		auths := got(sys.ListAuth())(t)
		if a := auths["bj-"+n.N+"/"]; a == nil || a.Type != "bjwt-"+n.N {
			t.Errorf("%v", auths)
		}
		must(t, sys.Remount("auth/bj-"+n.N, "auth/bk-"+n.N))
		must(t, sys.DisableAuth("bk-"+n.N))
		must(t, sys.Unmount(path))
		must(t, sys.DeregisterPlugin(&bao.DeregisterPluginInput{Name: name, Type: bao.PluginTypeSecrets, Version: kvOld}))
	})
}

func TestBaoLibraryNamespaces(t *testing.T) {
	through(t, func(t *testing.T, n at) {
		root := baoClient(t, n.addr, rootToken)
		name, plugin := "team-"+n.N, "ns-"+n.N
		registerBao(t, n, bao.PluginTypeSecrets, plugin, "evil", "v0.0.1")
		made := got(root.Sys().CreateNamespace(name, &bao.CreateNamespaceInput{CustomMetadata: map[string]string{"a": "b"}}))(t)
		if made.Path != name+"/" || made.UUID == "" || made.ID == "" || made.CustomMetadata["a"] != "b" {
			t.Errorf("%+v", made)
		}
		read := got(root.Sys().ReadNamespace(name))(t)
		patched := got(root.Sys().PatchNamespace(name, &bao.PatchNamespaceInput{CustomMetadata: map[string]any{"c": "d", "a": nil}}))(t)
		if read.UUID != made.UUID || patched.UUID != made.UUID || len(patched.CustomMetadata) != 1 || patched.CustomMetadata["c"] != "d" {
			t.Errorf("%+v %+v", read, patched)
		}
		team := baoClient(t, n.addr, rootToken)
		team.SetNamespace(name)
		sub := got(team.Sys().CreateNamespace("sub", &bao.CreateNamespaceInput{}))(t)
		if sub.Path != name+"/sub/" && sub.Path != "sub/" {
			t.Errorf("%+v", sub)
		}
		n.note("nested %s", sub.Path)
		list := got(team.Sys().ListNamespaces())(t)
		if len(list) != 1 || list["sub/"] == nil {
			t.Errorf("%v", list)
		}
		if list = got(root.Sys().ListNamespaces())(t); list[name+"/"] == nil {
			t.Errorf("%v", list)
		}

		// One path by header, by prefix and by both.
		inner := baoClient(t, n.addr, rootToken)
		inner.SetNamespace(name + "/sub/")
		must(t, inner.Sys().Mount("e", &bao.MountInput{Type: plugin}))
		got(inner.Logical().Write("e/data/x", map[string]any{"value": "inner"}))(t)
		for _, way := range []struct {
			c    *bao.Client
			path string
		}{{inner, "e/data/x"}, {team, "sub/e/data/x"}, {root, name + "/sub/e/data/x"}} {
			s := got(way.c.Logical().Read(way.path))(t)
			if s == nil || s.Data["value"] != "inner" {
				t.Errorf("%s: %v", way.path, s)
			}
		}
		if _, err := team.Logical().Write("e/data/x", map[string]any{"value": "y"}); err == nil {
			t.Error("a mount of the child namespace is seen from its parent")
		}
		ui := got(root.Logical().Read(name + "/sub/sys/internal/ui/mounts/e/x"))(t)
		n.note("ui %v", ui.Data["path"])
		echo := got(inner.Logical().Write("e/echo", map[string]any{"value": "v"}))(t)
		n.note("the plugin sees %v %v", echo.Data["mount_point"], echo.Data["path"])
		mounts := got(inner.Sys().ListMounts())(t)
		if len(mounts) != 1 {
			t.Errorf("%v", mounts)
		}
		if mounts = got(team.Sys().ListMounts())(t); len(mounts) != 0 {
			t.Errorf("%v", mounts)
		}

		// A token of the namespace, and what it may not.
		must(t, inner.Sys().PutPolicy("p", `path "e/*" { capabilities = ["read"] }`))
		tok := got(inner.Auth().Token().Create(&bao.TokenCreateRequest{Policies: []string{"p"}, TTL: "10m"}))(t)
		user := baoClient(t, n.addr, tok.Auth.ClientToken)
		user.SetNamespace(name + "/sub")
		if s := got(user.Logical().Read("e/data/x"))(t); s.Data["value"] != "inner" {
			t.Errorf("%v", s)
		}
		self := got(user.Auth().Token().LookupSelf())(t)
		n.note("namespace of the token: %v", self.Data["namespace_path"])
		user.SetNamespace("")
		_, err := user.Logical().Read("e/data/x")
		baoRefused(t, err, 403, "permission denied")
		outside := baoClient(t, n.addr, rootToken)
		outside.SetNamespace("nowhere-" + n.N)
		_, err = outside.Sys().ListMounts()
		baoRefused(t, err, 404, "namespace not found")
		_, err = team.Logical().Read("sys/storage/raft/configuration")
		baoRefused(t, err, 400, "namespace")

		// A reload from a namespace acts on its own mounts.
		id := got(inner.Sys().ReloadPlugin(&bao.ReloadPluginInput{Plugin: plugin, Scope: "global"}))(t)
		until(t, "reload "+id, func() error {
			s, err := inner.Sys().ReloadPluginStatus(&bao.ReloadPluginStatusInput{ReloadID: id})
			if err == nil && len(s.Results) != len(shared.nodes) {
				err = fmt.Errorf("%d nodes have finished", len(s.Results))
			}
			return err
		})
		_, err = root.Sys().ReloadPlugin(&bao.ReloadPluginInput{Mounts: []string{name + "/sub/e"}})
		baoRefused(t, err, 400, "cannot fetch mount entry")

		gone := got(team.Sys().DeleteNamespace("sub"))(t)
		n.note("deleted %+v", *gone)
		got(root.Sys().DeleteNamespace(name))(t)
		if ns, err := root.Sys().ReadNamespace(name); err == nil && ns != nil && ns.UUID != "" {
			t.Errorf("%+v", ns)
		}
	})
}

func TestBaoLibraryTheRest(t *testing.T) {
	through(t, func(t *testing.T, n at) {
		c := baoClient(t, n.addr, rootToken)
		sys := c.Sys()
		h := got(sys.Health())(t)
		if !h.Initialized || h.Sealed || h.Standby == n.leads {
			t.Errorf("%+v", h)
		}
		s := got(sys.SealStatus())(t)
		l := got(sys.Leader())(t)
		if s.Sealed || l.IsSelf != n.leads {
			t.Errorf("%+v %+v", s, l)
		}
		if ha := got(sys.HAStatus())(t); len(ha.Nodes) != len(shared.nodes) {
			t.Errorf("%+v", ha)
		}
		state := got(sys.RaftAutopilotState())(t)
		conf := got(sys.RaftAutopilotConfiguration())(t)
		must(t, sys.PutRaftAutopilotConfiguration(conf))
		n.note("autopilot %d servers %s", len(state.Servers), asJSON(conf))
		var snap bytes.Buffer
		must(t, sys.RaftSnapshot(&snap))
		if !got(sys.InitStatus())(t) {
			t.Error("not initialised")
		}
		must(t, sys.PutPolicy("bp-"+n.N, `path "x" { capabilities = ["read"] }`))
		n.note("policy %s", got(sys.GetPolicy("bp-"+n.N))(t))
		got(sys.ListPolicies())(t)
		must(t, sys.DeletePolicy("bp-"+n.N))
		n.note("capabilities %v", got(sys.CapabilitiesSelf("sys/mounts"))(t))
		tok := got(c.Auth().Token().Create(&bao.TokenCreateRequest{Policies: []string{"default"}, TTL: "20m"}))(t)
		me := baoClient(t, n.addr, tok.Auth.ClientToken)
		n.note("renewed %d", got(me.Auth().Token().RenewSelf(600))(t).Auth.LeaseDuration)
		must(t, me.Auth().Token().RevokeSelf(""))
		_, err := me.Auth().Token().LookupSelf()
		baoRefused(t, err, 403, "permission denied")

		name := "blend-" + n.N
		registerBao(t, n, bao.PluginTypeSecrets, name, "evil", "v0.0.1")
		must(t, sys.Mount(name, &bao.MountInput{Type: name}))
		lent := got(c.Logical().Read(name + "/creds/a"))(t)
		n.note("renewed %d", got(sys.Renew(lent.LeaseID, 300))(t).LeaseDuration)
		got(sys.Lookup(lent.LeaseID))(t)
		must(t, sys.Revoke(lent.LeaseID))
		must(t, sys.RevokePrefix(name))
		c.SetWrappingLookupFunc(func(string, string) string { return "60s" })
		w := got(c.Logical().Read(name + "/info"))(t)
		c.SetWrappingLookupFunc(nil)
		n.note("unwrapped %v", got(c.Logical().Unwrap(w.WrapInfo.Token))(t).Data["version"])
		help := got(c.Help(name + "/data/x"))(t)
		n.note("help %v", help.Help != "")
	})
}
