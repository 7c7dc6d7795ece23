package policy

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"rollcall/fsm"
	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

// log is a state machine that a test enters commands into.
type log struct {
	t     testing.TB
	fsm   *fsm.FSM
	index uint64
}

func newLog(t testing.TB) *log {
	l := &log{t: t, fsm: fsm.New()}
	l.enter(&commandv1.Command{Body: &commandv1.Command_InitCluster{InitCluster: fsm.NewCluster("c", "test", "root")}})
	return l
}

func (l *log) enter(c *commandv1.Command) {
	l.t.Helper()
	data, err := proto.Marshal(c)
	if err != nil {
		l.t.Fatal(err)
	}
	l.index++
	res, ok := l.fsm.Apply(&raft.Log{Index: l.index, Term: 1, Type: raft.LogCommand, Data: data}).(*commandv1.Result)
	if !ok || fsm.Err(res) != nil {
		l.t.Fatal(fsm.Err(res))
	}
}

func (l *log) policy(ns, name, text string) {
	l.t.Helper()
	if _, err := Parse(text); err != nil {
		l.t.Fatal(err)
	}
	l.enter(&commandv1.Command{Body: &commandv1.Command_PutPolicy{PutPolicy: &commandv1.PutPolicy{
		Policy: &commandv1.Policy{Namespace: ns, Name: name, Text: text},
	}}})
}

func (l *log) namespace(path string) {
	l.enter(&commandv1.Command{Body: &commandv1.Command_PutNamespace{PutNamespace: &commandv1.PutNamespace{
		Namespace: &commandv1.Namespace{Path: path, Uuid: "uuid-" + path},
	}}})
}

// who is an identity with policies in a namespace.
func who(ns string, policies ...string) *Identity {
	return &Identity{Token: &commandv1.Token{Namespace: ns, Policies: policies}}
}

// TestThePatternThatDecides is Vault's list of priorities, case by case.
func TestThePatternThatDecides(t *testing.T) {
	const text = `
path "secret/*"              { capabilities = ["read"] }
path "secret/exact"          { capabilities = ["update"] }
path "secret/deep/*"         { capabilities = ["create", "list"] }
path "secret/deep/denied"    { capabilities = ["deny"] }
path "secret/+/teamb"        { capabilities = ["read"] }
path "secret/team*"          { capabilities = ["list"] }
path "+/x/y"                 { capabilities = ["delete"] }
path "a/+/c/*"               { capabilities = ["read"] }
path "a/b/+/d"               { capabilities = ["update"] }
path "one/+/two"             { capabilities = ["read"] }
path "/slash"                { capabilities = ["read"] }
path "old"                   { policy = "write" }
path "p/+/+"                 { capabilities = ["read"] }
path "p/+/x"                 { capabilities = ["update"] }
`
	l := newLog(t)
	l.policy("", "p", text)
	e := NewEngine()
	for _, c := range []struct{ path, want string }{
		{"secret/x", "read"},
		{"secret/", "read"},
		{"secret", "deny"},
		{"secretx", "deny"},
		{"secret/exact", "update"},
		{"secret/exact/below", "read"},
		{"secret/deep/a", "create list"},
		{"secret/deep/denied", "deny"},
		{"secret/deep/denied/below", "create list"},
		{"secret/teama", "list"},
		{"secret/team/teamb", "list"},  // the first wildcard of "secret/team*" comes later
		{"secret/other/teamb", "read"}, // of "secret/+/teamb" and "secret/*" the one without a glob
		{"m/x/y", "delete"},
		{"secret/x/y", "read"}, // the first wildcard of "secret/*" comes later
		{"a/b/c/d", "update"},
		{"a/z/c/d", "read"},
		{"a/b/c", "deny"},
		{"one/a/two", "read"},
		{"one//two", "deny"},
		{"one/a/b/two", "deny"},
		{"slash", "read"},
		{"old", "create delete list read update"},
		{"p/a/x", "update"}, // fewer "+"
		{"p/a/b", "read"},
	} {
		if got := strings.Join(e.Capabilities(l.fsm.View(), "", []string{"p"}, "", c.path), " "); got != c.want {
			t.Errorf("%s: %s, want %s", c.path, got, c.want)
		}
	}
}

func TestPoliciesOfOnePatternAreUnitedAndDenyWins(t *testing.T) {
	l := newLog(t)
	l.policy("", "r", `path "s/*" { capabilities = ["read"] }`)
	l.policy("", "w", `path "s/*" { capabilities = ["update"] }`)
	l.policy("", "d", `path "s/*" { capabilities = ["deny", "read", "sudo"] }`)
	e, v := NewEngine(), l.fsm.View()
	if got := e.Capabilities(v, "", []string{"r", "w"}, "", "s/x"); !slices.Equal(got, []string{"read", "update"}) {
		t.Errorf("united: %v", got)
	}
	if got := e.Capabilities(v, "", []string{"r", "w", "d"}, "", "s/x"); !slices.Equal(got, []string{"deny"}) {
		t.Errorf("with deny: %v", got)
	}
}

// TestNoSpellingOfADeniedPathIsAllowed holds every operation against a path that is denied, with and without its slash.
func TestNoSpellingOfADeniedPathIsAllowed(t *testing.T) {
	l := newLog(t)
	l.policy("", "p", `
path "s/*" { capabilities = ["create", "read", "update", "delete", "list", "patch", "sudo"] }
path "s/no" { capabilities = ["deny"] }
path "s/dir/" { capabilities = ["deny"] }`)
	e, v := NewEngine(), l.fsm.View()
	for _, need := range []Capability{Create, Read, Update, Delete, List, Patch, Sudo} {
		for _, path := range []string{"s/no", "s/no/", "s/dir", "s/dir/"} {
			if err := e.Allow(v, who("", "p"), Query{Path: path, Need: need}); !fault.Is(err, fault.Denied) {
				t.Errorf("%s %s: %v", need, path, err)
			}
		}
		if err := e.Allow(v, who("", "p"), Query{Path: "s/yes", Need: need}); err != nil {
			t.Errorf("%s s/yes: %v", need, err)
		}
	}
}

func TestAListIsMeantWithAndWithoutItsSlash(t *testing.T) {
	l := newLog(t)
	l.policy("", "p", `
path "s/dir" { capabilities = ["list"] }
path "s/dir2/" { capabilities = ["list"] }`)
	e, v := NewEngine(), l.fsm.View()
	for _, path := range []string{"s/dir/", "s/dir2/"} {
		if err := e.Allow(v, who("", "p"), Query{Path: path, Need: List}); err != nil {
			t.Errorf("%s: %v", path, err)
		}
	}
	if err := e.Allow(v, who("", "p"), Query{Path: "s/dir/", Need: Read}); err == nil {
		t.Error("a read of the other spelling is allowed")
	}
}

func TestATokenActsInItsNamespaceAndThoseInside(t *testing.T) {
	l := newLog(t)
	l.namespace("team/")
	l.namespace("team/sub/")
	l.namespace("teamb/")
	l.policy("team/", "p", `path "s/*" { capabilities = ["read"] }
path "sub/s/x" { capabilities = ["update"] }`)
	l.policy("", "p", `path "team/s/root" { capabilities = ["list"] }`)
	e, v := NewEngine(), l.fsm.View()
	for _, c := range []struct {
		who      *Identity
		ns, path string
		need     Capability
		want     bool
	}{
		{who("team/", "p"), "team/", "s/a", Read, true},
		{who("team/", "p"), "team/sub/", "s/x", Update, true},
		{who("team/", "p"), "team/sub/", "s/a", Read, false},
		{who("team/", "p"), "", "s/a", Read, false},
		{who("team/", "p"), "teamb/", "s/a", Read, false},
		{who("", "p"), "team/", "s/root", List, true},
		{who("", "p"), "team/", "s/a", Read, false},
		{who("team/", "root"), "team/sub/", "sys/mounts", Sudo, true},
		{who("team/", "root"), "", "sys/mounts", Read, false},
		{who("team/", "root"), "teamb/", "sys/mounts", Read, false},
		{who("", "root"), "team/sub/", "anything", Delete, true},
	} {
		err := e.Allow(v, c.who, Query{Namespace: c.ns, Path: c.path, Need: c.need})
		if (err == nil) != c.want {
			t.Errorf("%v of %q: %s %s in %q: %v", c.who.Names(), c.who.Token.GetNamespace(), c.need, c.path, c.ns, err)
		}
	}
}

func TestParametersAreHeldAgainstTheRules(t *testing.T) {
	l := newLog(t)
	l.policy("", "p", `
path "a" {
  capabilities = ["update"]
  allowed_parameters = { "color" = ["red", "gr*"], "n" = [1, true], "any" = [] }
  required_parameters = ["color"]
}
path "d" {
  capabilities = ["create", "update"]
  denied_parameters = { "evil" = [], "color" = ["black"] }
}
path "w" {
  capabilities = ["update"]
  min_wrapping_ttl = "1m"
  max_wrapping_ttl = 3600
}
path "all" {
  capabilities = ["update"]
  allowed_parameters = { "*" = [], "mode" = ["safe"] }
}`)
	e, v := NewEngine(), l.fsm.View()
	for _, c := range []struct {
		path, data string
		wrap       time.Duration
		want       bool
	}{
		{"a", `{"color":"red"}`, 0, true},
		{"a", `{"color":"green","n":1,"any":{"x":[1]}}`, 0, true},
		{"a", `{"COLOR":"red"}`, 0, true},
		{"a", `{"color":"blue"}`, 0, false},
		{"a", `{"color":"red","other":1}`, 0, false},
		{"a", `{"color":"red","n":2}`, 0, false},
		{"a", `{"n":1}`, 0, false},
		{"a", `{}`, 0, false},
		{"d", `{"x":1}`, 0, true},
		{"d", `{"evil":null}`, 0, false},
		{"d", `{"Evil":1}`, 0, false},
		{"d", `{"color":"black"}`, 0, false},
		{"d", `{"color":"white"}`, 0, true},
		{"w", `{}`, 0, false},
		{"w", `{}`, time.Second, false},
		{"w", `{}`, time.Minute, true},
		{"w", `{}`, 2 * time.Hour, false},
		{"all", `{"x":1,"mode":"safe"}`, 0, true},
		{"all", `{"mode":"fast"}`, 0, false},
	} {
		var data map[string]json.RawMessage
		if err := json.Unmarshal([]byte(c.data), &data); err != nil {
			t.Fatal(err)
		}
		err := e.Allow(v, who("", "p"), Query{Path: c.path, Need: Update, Data: func() map[string]json.RawMessage { return data }, WrapTTL: c.wrap})
		if (err == nil) != c.want {
			t.Errorf("%s %s wrapped for %s: %v", c.path, c.data, c.wrap, err)
		}
	}
}

func TestATextThatSaysMoreThanIsUnderstoodIsRefused(t *testing.T) {
	for text, want := range map[string]string{
		`path "a" {`:                                                          "line 1",
		`path "a" { capabilities = ["fly"] }`:                                 `invalid capability "fly"`,
		`path "a" { capability = ["read"] }`:                                  `invalid key "capability"`,
		`path "a" { capabilities = "read" }`:                                  "list of strings",
		`path "a" { policy = "all" }`:                                         `invalid policy "all"`,
		`path "+*" { capabilities = ["read"] }`:                               "forbidden",
		`path "a*b" { capabilities = ["read"] }`:                              "only at the end",
		`path "a/../b" { capabilities = ["read"] }`:                           "never match",
		`path "a/{{identity.entity.id}}" { capabilities = ["read"] }`:         "identities",
		`path "a" { control_group = {} }`:                                     "not supported",
		"path \"a\" {\n  capabilities = [\"read\"]\n  control_group {\n }\n}": "control_group",
		`path "a" { capabilities = ["${1}"] }`:                                "template",
		`path "a" { capabilities = !!true }`:                                  "literals",
		`paths "a" {}`:                                                        "line 1",
		`x = 1`:                                                               "line 1",
		`path "a" { min_wrapping_ttl = "2h"
 max_wrapping_ttl = "1h" }`: "",
		`{"path": {"a": {"capabilities": ["fly"]}}}`:                "fly",
		strings.Repeat("[", 100_000):                                "deeper",
		`{"path":` + strings.Repeat("[", 100_000):                   "deeper",
		`path "a" { capabilities = ` + strings.Repeat("!", 100_000): "literals",
	} {
		_, err := Parse(text)
		if !fault.Is(err, fault.Invalid) || !strings.HasPrefix(err.Error(), "failed to parse policy: ") ||
			!strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: %v, want %q", text, err, want)
		}
	}
}

func TestBothSyntaxesSayTheSame(t *testing.T) {
	for _, text := range []string{
		"name = \"x\"\npath \"a/*\" {\n  capabilities = [\"read\", \"LIST\"] # comment\n}\n",
		`{"name":"x","path":{"a/*":{"capabilities":["read","list"]}}}`,
		`path "a/*" { policy = "read" }`,
		"/* c */ path \"/a/*\" {\n  // c\n  capabilities = [\n    \"read\",\n    \"list\",\n  ]\n  comment = \"why\"\n}",
	} {
		p, err := Parse(text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if len(p.Rules) != 1 || p.Rules[0].Path() != "a/*" || !slices.Equal(p.Rules[0].Capabilities, []Capability{Read, List}) {
			t.Errorf("%s: %+v", text, p.Rules)
		}
	}
	if p, err := Parse(""); err != nil || len(p.Rules) != 0 {
		t.Errorf("the empty policy: %v", err)
	}
}

// TestNoSpellingIsAnAliasOfRoot: whatever is given, a canonical list holds "root" only where CanonicalList says so, and
// everything that compares names sees the same spelling.
func TestNoSpellingIsAnAliasOfRoot(t *testing.T) {
	for _, s := range []string{"ROOT", " root", "root\n", "\troot\u00a0", "Root", "rOOt ", "\u2003root"} {
		if Canonical(s) != Root {
			t.Errorf("%q is %q", s, Canonical(s))
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		s := rapid.StringMatching(`[ \t\n\x{a0}\x{2003}\x{feff}\x{200b}]{0,2}[rRoOtTſøо0]{3,6}[ \t\x{a0}]{0,2}`).Draw(t, "name")
		c := Canonical(s)
		if Canonical(c) != c {
			t.Fatalf("%q -> %q -> %q", s, c, Canonical(c))
		}
		if who("", c).IsRoot() != (c == Root) {
			t.Fatalf("%q is root only in one place", s)
		}
	})
	if got := CanonicalList([]string{"b", " A", "", "a", "B "}); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("%v", got)
	}
}

func TestATokenIsKnownUntilItsTimeIsOver(t *testing.T) {
	l := newLog(t)
	hash := l.fsm.View().HashToken("tok")
	l.enter(&commandv1.Command{Body: &commandv1.Command_PutToken{PutToken: &commandv1.PutToken{Token: &commandv1.Token{
		Hash: hash, Accessor: "acc", Policies: []string{"p"}, TtlNs: uint64(10 * time.Second), BoundCidrs: []string{"10.0.0.0/8", "::1"},
	}}}})
	v := l.fsm.View()
	for _, c := range []struct {
		token, remote string
		now           time.Duration
		want          bool
	}{
		{"tok", "10.1.2.3:99", 0, true},
		{"tok", "[::1]:99", 9 * time.Second, true},
		{"tok", "[::ffff:10.1.2.3]:99", 0, true},
		{"tok", "11.1.2.3:99", 0, false},
		{"tok", "nonsense", 0, false},
		{"tok", "10.1.2.3:99", 10 * time.Second, false},
		{"TOK", "10.1.2.3:99", 0, false},
		{"tok ", "10.1.2.3:99", 0, false},
		{"", "10.1.2.3:99", 0, false},
		{"root", "anywhere", time.Hour, true},
	} {
		_, err := Authenticate(v, c.token, uint64(c.now), c.remote)
		if (err == nil) != c.want {
			t.Errorf("%+v: %v", c, err)
		}
		if err != nil && !errors.Is(err, error(ErrDenied)) {
			t.Errorf("%+v: an error of its own tells more than it should: %v", c, err)
		}
	}
}

func TestAChangedPolicyHoldsAtOnce(t *testing.T) {
	l, e := newLog(t), NewEngine()
	l.policy("", "p", `path "a" { capabilities = ["read"] }`)
	q := Query{Path: "a", Need: Read}
	if err := e.Allow(l.fsm.View(), who("", "p"), q); err != nil {
		t.Fatal(err)
	}
	l.policy("", "p", `path "a" { capabilities = ["deny"] }`)
	if err := e.Allow(l.fsm.View(), who("", "p"), q); err == nil {
		t.Fatal("the old text still decides")
	}
	if err := e.Allow(l.fsm.View(), who("", "p", "nosuch"), Query{Path: "b", Need: Read}); err == nil {
		t.Fatal("a policy that is not there grants")
	}
}

// reference is Vault's decision spelled out without any index: every pattern is tried, and compared by the five rules.
func reference(rules map[string][]Capability, path string, need Capability) bool {
	type cand struct {
		text        string
		first, plus int
		glob        bool
	}
	var all []cand
	for text := range rules {
		c := cand{text: text, first: len(text), glob: strings.HasSuffix(text, "*")}
		segs, parts := strings.Split(strings.TrimSuffix(text, "*"), "/"), strings.Split(path, "/")
		pos, ok := 0, len(parts) >= len(segs) && (c.glob || len(parts) == len(segs))
		if c.glob {
			c.first = len(text) - 1
		}
		for i, s := range segs {
			if s == "+" {
				c.plus++
				c.first = min(c.first, pos)
			}
			if ok {
				last := c.glob && i == len(segs)-1
				ok = s == "+" && parts[i] != "" || s == parts[i] || last && strings.HasPrefix(parts[i], s)
			}
			pos += len(s) + 1
		}
		if ok {
			all = append(all, c)
		}
	}
	if len(all) == 0 {
		return false
	}
	slices.SortFunc(all, func(a, b cand) int {
		exact := func(c cand) bool { return !c.glob && c.plus == 0 }
		switch {
		case exact(a) != exact(b):
			if exact(a) {
				return -1
			}
			return 1
		case a.first != b.first:
			return b.first - a.first
		case a.glob != b.glob:
			if a.glob {
				return 1
			}
			return -1
		case a.plus != b.plus:
			return a.plus - b.plus
		case len(a.text) != len(b.text):
			return len(b.text) - len(a.text)
		}
		return strings.Compare(b.text, a.text)
	})
	caps := rules[all[0].text]
	return slices.Contains(caps, need) && !slices.Contains(caps, Deny)
}

func TestDecisionsMatchTheReference(t *testing.T) {
	segment := rapid.SampledFrom([]string{"a", "b", "ab", "+"})
	rapid.Check(t, func(t *rapid.T) {
		rules := map[string][]Capability{}
		var list []scoped
		for range rapid.IntRange(1, 6).Draw(t, "rules") {
			text := strings.Join(rapid.SliceOfN(segment, 1, 4).Draw(t, "segments"), "/")
			if rapid.Bool().Draw(t, "glob") && !strings.HasSuffix(text, "+") {
				text += rapid.SampledFrom([]string{"*", "/*"}).Draw(t, "tail")
			}
			c := rapid.SampledFrom([]Capability{Read, Update, Deny}).Draw(t, "cap")
			rules[text] = append(rules[text], c)
			list = append(list, scoped{"", &Rule{pattern: newPattern(text), Capabilities: []Capability{c}}})
		}
		path := strings.Join(rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b", "ab", "abc"}), 1, 5).Draw(t, "path"), "/")
		got, want := decide(list, Query{Path: path, Need: Read}), reference(rules, path, Read)
		denied := slices.ContainsFunc(list, func(s scoped) bool {
			return s.Capabilities[0] == Deny && s.pattern.exact() && strings.TrimSuffix(s.pattern.text, "/") == path
		})
		if got != (want && !denied) {
			t.Fatalf("%v on %s: %v, the reference says %v", rules, path, got, want)
		}
	})
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{
		DefaultText, `path "a/*" { capabilities = ["read"] }`, `{"path":{"a":{"policy":"read"}}}`,
		"path \"a\" {\n allowed_parameters = { \"x\" = [1, \"y\", [true]] }\n}", "path \"\" {}", "path \"+/+*\" {}", "<<A\nA",
	} {
		f.Add(s, "a/b")
	}
	f.Fuzz(func(t *testing.T, text, path string) {
		p, err := Parse(text)
		if err != nil {
			if !fault.Is(err, fault.Invalid) {
				t.Fatalf("kind of %v", err)
			}
			return
		}
		var rules []scoped
		for i := range p.Rules {
			rules = append(rules, scoped{"", &p.Rules[i]})
		}
		for _, need := range capabilities {
			if need != Deny && decide(rules, Query{Path: path, Need: need}) {
				if b := best(rules, path, need == List); b == nil || b.caps[Deny] || !b.caps[need] {
					t.Fatalf("%q grants %s on %q without a rule", text, need, path)
				}
			}
		}
	})
}

func BenchmarkAllow(b *testing.B) {
	l := newLog(b)
	var text strings.Builder
	for i := range 50 {
		text.WriteString("path \"kv/data/team" + string(rune('a'+i%26)) + "/*\" { capabilities = [\"read\"] }\n")
	}
	l.policy("", "p", text.String())
	e, v := NewEngine(), l.fsm.View()
	id := who("", "default", "p")
	for b.Loop() {
		if err := e.Allow(v, id, Query{Path: "kv/data/teamz/x", Need: Read}); err != nil {
			b.Fatal(err)
		}
	}
}

// TestADenialWinsOverEveryOperationAndNeverGrants: whatever policies a token has, one more that denies a path takes every operation on it
// away, under both of its spellings; and a rule that denies anything else takes away, or changes nothing.
func TestADenialWinsOverEveryOperationAndNeverGrants(t *testing.T) {
	every := []Capability{Create, Read, Update, Delete, List, Patch, Sudo}
	segment := rapid.SampledFrom([]string{"a", "b", "ab", "+"})
	rapid.Check(t, func(t *rapid.T) {
		text := func(label string) string {
			p := strings.Join(rapid.SliceOfN(segment, 1, 4).Draw(t, label), "/")
			if !strings.HasSuffix(p, "+") {
				p += rapid.SampledFrom([]string{"", "", "/", "*", "/*"}).Draw(t, "tail")
			}
			return p
		}
		var rules []scoped
		for range rapid.IntRange(0, 6).Draw(t, "rules") {
			rules = append(rules, scoped{"", &Rule{
				pattern: newPattern(text("pattern")), Capabilities: rapid.SliceOfN(rapid.SampledFrom(append(every, Deny)), 1, 7).Draw(t, "capabilities"),
			}})
		}
		path := strings.Join(rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b", "ab", "abc"}), 1, 5).Draw(t, "path"), "/")
		here := append(slices.Clone(rules), scoped{"", &Rule{
			pattern: newPattern(path + rapid.SampledFrom([]string{"", "/"}).Draw(t, "slash")), Capabilities: []Capability{Deny},
		}})
		elsewhere := append(slices.Clone(rules), scoped{"", &Rule{pattern: newPattern(text("denied")), Capabilities: []Capability{Deny}}})
		for _, need := range every {
			for _, spelling := range []string{path, path + "/"} {
				q := Query{Path: spelling, Need: need}
				if decide(here, q) {
					t.Fatalf("%s %s is denied and allowed: %v", need, spelling, texts(here))
				}
				if decide(elsewhere, q) && !decide(rules, q) {
					t.Fatalf("%s %s is allowed by a denial of something: %v", need, spelling, texts(elsewhere))
				}
			}
		}
	})
}

func texts(rules []scoped) []string {
	var out []string
	for _, r := range rules {
		out = append(out, fmt.Sprintf("%s: %v", r.pattern.text, r.Capabilities))
	}
	return out
}
