package router

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"rollcall/node/fault"
	"rollcall/node/supervisor"
	commandv1 "rollcall/proto/command/v1"
	pluginpb "rollcall/proto/plugin"
)

func TestThePluginReceivesWhatTheContractSays(t *testing.T) {
	c := newCluster(t, 2, nil)
	c.must(&commandv1.Command{Body: &commandv1.Command_PutNamespace{PutNamespace: &commandv1.PutNamespace{
		Namespace: &commandv1.Namespace{Uuid: "u", Id: "team", Path: "team/"},
	}}})
	c.register("v1.0.0")
	c.must(&commandv1.Command{Body: &commandv1.Command_EnableMount{EnableMount: &commandv1.EnableMount{
		Uuid: "u1", Accessor: "acc", Namespace: "team/", Table: "secret", Path: "kv/", Type: "fake", PluginType: "secret",
		Config:  &commandv1.MountConfig{PassthroughRequestHeaders: []string{"x-custom", "authorization", "X-Vault-Token"}, AllowedResponseHeaders: []string{"x-yes"}},
		Options: map[string]string{"version": "2"},
	}}})
	m := c.get("u1")
	var fakes []*fake
	for _, n := range c.nodes {
		f := newFake(n.id)
		fakes = append(fakes, f)
		n.up(t, c.get("u1"), f)
	}
	cfg := fakes[0].setup
	if cfg.BackendUUID != "u1" || fmt.Sprint(cfg.Config) !=
		"map[plugin_name:fake plugin_type:secret plugin_version:v1.0.0 version:2]" || cfg.System.ClusterID != "c" {
		t.Fatalf("setup: %+v", cfg)
	}
	body := `{ "a" : 1e2, "z":"<&>" }`
	for _, n := range c.nodes {
		for _, withToken := range []bool{true, false} {
			h := http.Header{"X-Custom": {"1", "2"}, "Authorization": {"Bearer b"}, "X-Other": {"no"}}
			if withToken {
				h.Set("X-Vault-Token", "t")
			}
			r, err := n.router.Handle(t.Context(), &Request{
				ID: "id-1", Namespace: "team/", Path: "kv/echo", Operation: opUpdate, Data: []byte(body), Headers: h,
				RemoteAddr: "10.0.0.1:555", ClientToken: "hashed", TokenAccessor: "ta", DisplayName: "dn", EntityID: "e",
			})
			if err != nil || r.Plugin.GetData() != body || len(r.Plugin.GetHeaders()) != 1 || r.Plugin.GetHeaders()["X-Yes"] == nil {
				t.Fatalf("%+v, %v", r, err)
			}
			got := fakes[0].last
			if got.GetData() != body || got.GetPath() != "echo" || got.GetMountPoint() != "team/kv/" || got.GetMountType() != "fake" ||
				got.GetMountAccessor() != "acc" || got.GetId() != "id-1" || got.GetClientToken() != "hashed" ||
				got.GetClientTokenAccessor() != "ta" || got.GetDisplayName() != "dn" || got.GetEntityId() != "e" ||
				got.GetConnection().GetRemoteAddr() != "10.0.0.1" || got.GetConnection().GetRemotePort() != 555 {
				t.Fatalf("through %s: %v", n.id, got)
			}
			want := 1
			if withToken { // then Authorization is not what the client authenticated with
				want = 2
			}
			if len(got.GetHeaders()) != want || fmt.Sprint(got.GetHeaders()["X-Custom"].GetHeader()) != "[1 2]" {
				t.Fatalf("through %s, headers: %v", n.id, got.GetHeaders())
			}
		}
	}
	if _, err := c.nodes[0].do(opRead, "kv/x", ""); !fault.Is(err, fault.UnsupportedPath) {
		t.Fatalf("the root namespace has no such mount: %v", err)
	}
	if r, err := c.nodes[0].router.Handle(t.Context(), &Request{Namespace: "team/", Path: "kv/echo", Operation: opRead, ClientToken: "x", Unauthenticated: true}); err != nil ||
		r.Plugin.GetData() != "{}" || fakes[0].last.GetClientToken() != "" {
		t.Fatalf("%+v, %v", r, err)
	}
	if m.GetWanted() == nil {
		t.Fatal("no wanted")
	}
}

func TestAuthMountsAreFoundUnderAuthAndOnlyTheyLogIn(t *testing.T) {
	c := newCluster(t, 1, nil)
	n := c.nodes[0]
	kv, auth := c.mount("kv/", nil), c.mount("auth/jwt/", nil)
	n.up(t, kv, newFake("kv"))
	f := newFake("jwt")
	f.kind = "auth"
	n.up(t, auth, f)
	match, err := n.router.Lookup(t.Context(), "", "auth/jwt/login/role")
	if err != nil || match.Mount.GetUuid() != auth.GetUuid() || match.Rest != "login/role" || !match.Unauthenticated || match.Root {
		t.Fatalf("%+v, %v", match, err)
	}
	if r, err := n.do(opUpdate, "auth/jwt/auth", "{}"); err != nil || r.Plugin.GetAuth() == nil || f.last.GetMountPoint() != "auth/jwt/" {
		t.Fatalf("%+v, %v", r, err)
	}
	r, err := n.do(opUpdate, "kv/auth", "{}")
	wantKind(t, err, fault.Internal)
	if r.Plugin != nil || err.Error() != "internal error" {
		t.Fatalf("%+v, %v", r, err)
	}
	if match, err = n.router.Lookup(t.Context(), "", "kv"); err != nil || match.Rest != "" || match.Mount.GetUuid() != kv.GetUuid() {
		t.Fatalf("%+v, %v", match, err)
	}
	_, err = n.router.Lookup(t.Context(), "", "nomount/x")
	if !fault.Is(err, fault.UnsupportedPath) || err.Error() != `no handler for route "nomount/x". route entry not found.` {
		t.Fatal(err)
	}
}

func TestSpecialPathsMatchExactlyByPrefixAndBySegment(t *testing.T) {
	s := newPathSet([]string{"open", "login/*", "a/+/c", "b/+/d*", "+/x", "star*"})
	for path, want := range map[string]bool{
		"open": true, "open/": false, "open/y": false, "login/": true, "login/a/b": true, "login": false,
		"a/1/c": true, "a/1/2/c": false, "a//c": false, "a/1/c/d": false, "a/1": false,
		"b/1/d": true, "b/1/de/f": true, "b/1/e": false, "q/x": true, "/x": false, "q/x/y": false, "star": true, "stars/x": true,
	} {
		if s.match(path) != want {
			t.Errorf("%q: %v", path, !want)
		}
	}
}

// Routing finds the longest mount that is a prefix of a canonical path, and refuses every other spelling of it.
func TestRoutingIsByLongestPrefixOfCanonicalPaths(t *testing.T) {
	segment := rapid.StringMatching(`[a-c]{1,2}`)
	rapid.Check(t, func(t *rapid.T) {
		v := &tableView{}
		for _, p := range rapid.SliceOfN(rapid.SliceOfN(segment, 1, 3), 1, 8).Draw(t, "mounts") {
			v.mounts = append(v.mounts, strings.Join(p, "/")+"/")
		}
		r := &Router{cfg: Config{State: StateOf(func() View { return v }, nil)}}
		path := strings.Join(rapid.SliceOfN(segment, 1, 5).Draw(t, "path"), "/")
		if rapid.Bool().Draw(t, "slash") {
			path += "/"
		}
		// As Vault does: "kv" is "kv/" only where nothing else serves it.
		want := ""
		for _, full := range []string{path, path + "/"} {
			for _, m := range v.mounts {
				if strings.HasPrefix(full, m) && len(m) > len(want) {
					want = m
				}
			}
			if want != "" {
				break
			}
		}
		_, m, rest, err := r.find("", path)
		switch {
		case want == "":
			if !fault.Is(err, fault.UnsupportedPath) {
				t.Fatalf("%q: %v", path, err)
			}
		case err != nil || m.GetPath() != want || want+rest != path && want+rest != path+"/":
			t.Fatalf("%q: mount %q, rest %q, %v; want %q", path, m.GetPath(), rest, err, want)
		}
		i := rapid.IntRange(0, len(path)).Draw(t, "at")
		bad := path[:i] + rapid.SampledFrom([]string{"//", "/../", "/./", "\x00", "\n"}).Draw(t, "bad") + path[i:]
		if _, _, _, err := r.find("", bad); !fault.Is(err, fault.Invalid) {
			t.Fatalf("%q: %v", bad, err)
		}
	})
	for _, bad := range []string{"", "/", "/kv", "..", "kv/..", ".", "kv//", strings.Repeat("x", maxKey+1)} {
		if err := Canonical(bad); !fault.Is(err, fault.Invalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// tableView answers MountFor over any set of mounts, by brute force.
type tableView struct {
	View
	mounts []string
}

func (v *tableView) MountFor(_, path string) (*commandv1.Mount, string) {
	best := ""
	for _, m := range v.mounts {
		if strings.HasPrefix(path, m) && len(m) > len(best) {
			best = m
		}
	}
	if best == "" {
		return nil, path
	}
	return &commandv1.Mount{Path: best}, path[len(best):]
}

// The overlay behaves as the storage that it will become.
func TestTheOverlayReadsAsWhatItWillCommit(t *testing.T) {
	key := rapid.StringMatching(`[ab](/[ab]){0,2}`)
	rapid.Check(t, func(t *rapid.T) {
		below := &mapView{kv: map[string]string{}}
		for _, k := range rapid.SliceOfN(key, 0, 6).Draw(t, "below") {
			below.kv[k] = "old"
		}
		model := &mapView{kv: map[string]string{}}
		maps.Copy(model.kv, below.kv)
		st := newStore("u", collecting, func() View { return below })
		for i := range rapid.IntRange(1, 12).Draw(t, "steps") {
			k := key.Draw(t, "key")
			if rapid.Bool().Draw(t, "delete") {
				delete(model.kv, k)
				if err := st.Delete(context.Background(), k); err != nil {
					t.Fatal(err)
				}
			} else {
				model.kv[k] = fmt.Sprint(i)
				if err := st.Put(context.Background(), &supervisor.Entry{Key: k, Value: []byte(fmt.Sprint(i))}); err != nil {
					t.Fatal(err)
				}
			}
			for _, prefix := range []string{"", "a/", "b/", "a/a/", "a/b/"} {
				got, err := st.List(context.Background(), prefix)
				if err != nil || !slices.Equal(got, model.StorageList("u", prefix)) {
					t.Fatalf("list %q: %v, want %v (%v)", prefix, got, model.StorageList("u", prefix), err)
				}
			}
			e, err := st.Get(context.Background(), k)
			if v, ok := model.kv[k]; err != nil || ok != (e != nil) || ok && string(e.Value) != v {
				t.Fatalf("get %q: %v, want %q (%v)", k, e, v, err)
			}
		}
		for _, op := range st.seal() {
			if op.GetDelete() {
				delete(below.kv, op.GetKey())
			} else {
				below.kv[op.GetKey()] = string(op.GetValue())
			}
		}
		if fmt.Sprint(below.kv) != fmt.Sprint(model.kv) {
			t.Fatalf("committed %v, want %v", below.kv, model.kv)
		}
	})
}

type mapView struct {
	View
	kv map[string]string
}

func (v *mapView) StorageGet(_, k string) *commandv1.StorageEntry {
	if s, ok := v.kv[k]; ok {
		return &commandv1.StorageEntry{Key: k, Value: []byte(s)}
	}
	return nil
}

func (v *mapView) StorageList(_, prefix string) []string {
	set := map[string]bool{}
	for k := range v.kv {
		if rest, ok := strings.CutPrefix(k, prefix); ok {
			if i := strings.IndexByte(rest, '/'); i >= 0 {
				rest = rest[:i+1]
			}
			set[rest] = true
		}
	}
	out := []string{}
	for k := range set {
		out = append(out, k)
	}
	sort.Strings(out)
	return out
}

func TestQuantilesAreWithinASixteenth(t *testing.T) {
	h := &hist{}
	var all []time.Duration
	for range 10_000 {
		d := time.Duration(rand.ExpFloat64() * float64(20*time.Millisecond)).Truncate(time.Microsecond)
		all = append(all, d)
		h.record(d)
	}
	slices.Sort(all)
	for _, q := range []float64{.01, .5, .9, .99, 1} {
		want := all[max(int(q*float64(len(all))+.9999999)-1, 0)]
		got := quantile(q, h)
		if got < want || float64(got) > float64(want)*(1+1.0/16)+1e3 {
			t.Errorf("q%v: %v, want %v", q, got, want)
		}
	}
	if quantile(.99) != 0 || quantile(.99, &hist{}, nil) != 0 {
		t.Error("nothing recorded is not 0")
	}
	h = &hist{}
	h.record(time.Hour)
	h.record(-time.Second)
	if got := quantile(1, h); got < 200*time.Second {
		t.Errorf("an hour counts as %v", got)
	}
	for b := range buckets {
		if bucketOf(upper(b)) != b {
			t.Fatalf("bucket %d has the upper end %v, which is in %d", b, upper(b), bucketOf(upper(b)))
		}
	}
}

func TestLeaseTTLsFollowTheMountsTuning(t *testing.T) {
	c := newCluster(t, 1, nil)
	m := c.mount("kv/", nil)
	f := newFake("a")
	c.nodes[0].up(t, m, f)
	if d, l := f.setup.System.LeaseTTLs(); d != 768*time.Hour || l != 768*time.Hour {
		t.Fatalf("%v, %v", d, l)
	}
	c.must(&commandv1.Command{Body: &commandv1.Command_TuneMount{TuneMount: &commandv1.TuneMount{
		Table: "secret", Path: "kv/", SetConfig: true, Config: &commandv1.MountConfig{MaxLeaseTtlS: 60},
	}}})
	if d, l := f.setup.System.LeaseTTLs(); d != time.Minute || l != time.Minute {
		t.Fatalf("%v, %v", d, l)
	}
}

func TestAForwardedRequestMustBeginWithItsHeadAndNameAKnownOperation(t *testing.T) {
	c := newCluster(t, 2, nil)
	m := c.mount("kv/", nil)
	c.nodes[0].up(t, m, newFake("a"))
	p := &passage{
		r: c.nodes[1].router, rt: c.nodes[1].router.route(m.GetUuid()), m: m, v: c.nodes[1].fsm.View(),
		req: &Request{Operation: "sudo", Path: "kv/x"},
	}
	_, err, more := p.send(t.Context())
	if !fault.Is(err, fault.UnsupportedOperation) || more {
		t.Fatalf("%v, %v", err, more)
	}
	p.req = &Request{Operation: opRead, Path: "kv/../x"}
	if _, err, more = p.send(t.Context()); !fault.Is(err, fault.Invalid) || more {
		t.Fatalf("%v, %v", err, more)
	}
}

func TestOnlyAnErrorAloneIsAnErrorResponse(t *testing.T) {
	for d, want := range map[string]string{
		`{"error":"x"}`: "x", `{"error":"x","b":1}`: "", `{"a":1}`: "", ``: "", `{"error":{"a":1}}`: `{"a":1}`,
	} {
		if got := errorText(&pluginpb.Response{Data: d}); got != want {
			t.Errorf("%s: %q", d, got)
		}
	}
	if errorText(nil) != "" || !bytes.Equal([]byte(readOnlyText), []byte("cannot write to readonly storage")) {
		t.Error("the text that plugins look for")
	}
}
