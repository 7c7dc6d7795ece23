package client

import (
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"rollcall/node/api"
)

func TestEveryVerbSendsExactlyItsRequests(t *testing.T) {
	file := filepath.Join(t.TempDir(), "v.txt")
	object := filepath.Join(t.TempDir(), "v.json")
	snapshot := filepath.Join(t.TempDir(), "s.snap")
	for name, text := range map[string]string{file: "from file", object: `{"n":1.50,"l":["x"]}`, snapshot: "SNAP"} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	moved := map[string]string{
		"GET sys/key-status":                               data(api.KeyStatus{Term: 3, InstallTime: "2026-01-02T03:04:05Z", Node: "n1", NodeTerm: 3, NodeKeys: 2, SealType: "file"}),
		"POST sys/remount":                                 data(api.Remount{MigrationID: "m1"}),
		"GET sys/remount/status/m1":                        data(api.RemountStatus{MigrationID: "m1", Info: api.MigrationInfo{Status: "success"}}),
		"GET sys/plugins/catalog":                          data(api.Catalog{Detailed: []api.CatalogDetail{{Type: "secret", Name: "kv", Version: "v1.0.0"}}}),
		"GET kv/x?version=2":                               data(map[string]string{"a": "b"}),
		"GET kv?list=true":                                 data(api.Keys{Keys: []string{"x", "y/"}}),
		"PUT sys/plugins/plan":                             data(api.Plan{OK: true, Targets: []api.ReloadTarget{{}}}),
		"POST sys/storage/raft/join":                       `200 {"joined":true}`,
		"PUT sys/reloads/r1/pause":                         data(api.Reload{ID: "r1", Phase: api.PhaseCommitted, Paused: true}),
		"PUT sys/reloads/r1/resume":                        data(api.Reload{ID: "r1", Phase: api.PhaseCommitted}),
		"PUT sys/reloads/r1/promote":                       data(api.Reload{ID: "r1", Phase: api.PhaseCommitted}),
		"PUT sys/reloads/r1/abort":                         data(api.Reload{ID: "r1", Phase: api.PhaseAborted, Outcome: api.OutcomeAborted}),
		"GET sys/plugins/pins":                             data(api.Pins{}),
		"GET sys/plugins/versions":                         data(api.Versions{}),
		"GET sys/storage/raft/snapshot":                    "200 SNAP",
		"GET sys/mounts":                                   data(map[string]api.Mount{"kv/": {Type: "kv"}}),
		"GET sys/auth":                                     data(map[string]api.Mount{"jwt/": {Type: "jwt"}}),
		"GET sys/plugins/catalog/secret/kv?version=v1.0.0": data(api.Plugin{Name: "kv", SHA256: "ab"}),
		"GET sys/plugins/catalog/secret/kv":                data(api.Plugin{Name: "kv", SHA256: "cd"}),
	}
	reloading := "202 " + strings.TrimPrefix(data(api.ReloadResponse{ReloadID: "r1"}), "200 ")
	for _, path := range []string{"reload/unknown/kv", "reload/secret/kv", "reload/backend", "rollback/unknown/kv", "rollback/secret/kv"} {
		moved["PUT sys/plugins/"+path] = reloading
	}
	for _, c := range []struct {
		line  string
		stdin string
		want  string // requests, one per line
		out   string // what standard output holds
	}{
		{
			"plugin register -sha256=ab -command=kv-v2 -version=v2.0.0 -args=--a -args=-b=1,2 -env=K=V,W secret kv", "",
			`PUT sys/plugins/catalog/secret/kv {"sha256":"ab","version":"v2.0.0","command":"kv-v2","args":["--a","-b=1,2"],"env":["K=V,W"]}`, "Success! Registered plugin: kv\n",
		},
		{"plugin register -sha256 ab auth jwt", "", `PUT sys/plugins/catalog/auth/jwt {"sha256":"ab","command":"jwt"}`, "Success! Registered plugin: jwt\n"},
		{"plugin list", "", `GET sys/plugins/catalog`, "kv"},
		{"plugin list secret", "", `GET sys/plugins/catalog`, "v1.0.0"},
		{"plugin info -version=v1.0.0 -field=sha256 secret kv", "", `GET sys/plugins/catalog/secret/kv?version=v1.0.0`, "ab\n"},
		{"plugin info secret kv", "", `GET sys/plugins/catalog/secret/kv`, "cd"},
		{"plugin deregister secret kv", "", `DELETE sys/plugins/catalog/secret/kv?version=`, "Success! Deregistered plugin (if it was registered): kv\n"},
		{"plugin deregister -version v1.0.0 secret kv", "", `DELETE sys/plugins/catalog/secret/kv?version=v1.0.0`, "Success!"},
		{
			"plugin reload -plugin=kv -scope=global -wait=0 -reload-id=r1", "",
			`PUT sys/plugins/reload/unknown/kv {"scope":"global","reload_id":"r1","wait":"0"}`, "Success! Reloading plugin: kv, reload_id: r1\n",
		},
		{"plugin reload -plugin=kv -type=secret -wait=0 -reload_id=r1", "", `PUT sys/plugins/reload/secret/kv {"reload_id":"r1","wait":"0"}`, "Success!"},
		{"plugin reload -namespace=team -plugin=kv -wait=0 -reload-id=r1", "", `PUT sys/plugins/reload/backend {"plugin":"kv","reload_id":"r1","wait":"0"}`, "Success!"},
		{
			"plugin reload -mounts=a/,b/ -mounts=auth/c -wait=0 -reload-id=r1", "",
			`PUT sys/plugins/reload/backend {"mounts":["a/","b/","auth/c"],"reload_id":"r1","wait":"0"}`, "Success! Reloading mounts: [a/ b/ auth/c], reload_id: r1\n",
		},
		{
			"plugin reload -mounts=a -scope=global -strategy=canary -waves=1,50%,100% -bake=1m -max-error-rate=1% -max-p99-increase=1.5 -min-samples=20 " +
				"-version=v2.0.0 -trial=setup -prepare=10s -deadline=5m -queue=1m -on-switch-failure=rollback -on-drain-timeout=fence -exclude-fenced=false -wait=0 -reload-id=r1", "",
			`PUT sys/plugins/reload/backend {"mounts":["a"],"scope":"global","reload_id":"r1","strategy":"canary","version":"v2.0.0","trial":"setup",` +
				`"prepare":"10s","deadline":"5m","queue":"1m","waves":["1","50%","100%"],"bake":"1m","max_error_rate":0.01,"max_p99_increase":1.5,"min_samples":20,` +
				`"on_switch_failure":"rollback","on_drain_timeout":"fence","exclude_fenced":false,"wait":"0"}`, "Success!",
		},
		{
			"plugin reload -mounts=a -scope=global -strategy=rolling -batch=2 -max-unavailable=1 -wait=0 -reload-id=r1", "",
			`PUT sys/plugins/reload/backend {"mounts":["a"],"scope":"global","reload_id":"r1","strategy":"rolling","batch":2,"max_unavailable":1,"wait":"0"}`, "Success!",
		},
		{"plugin rollback -plugin=kv -wait=0 -reload-id=r2", "", `PUT sys/plugins/rollback/unknown/kv {"reload_id":"r2","wait":"0"}`, "Success!"},
		{"plugin rollback -wait=0 -reload-id=r2 secret kv", "", `PUT sys/plugins/rollback/secret/kv {"reload_id":"r2","wait":"0"}`, "Success!"},
		{"plugin plan -plugin=kv -version=v2.0.0 -trial=handshake", "", `PUT sys/plugins/plan {"plugin":"kv","version":"v2.0.0","trial":"handshake"}`, "could follow"},
		{"plugin plan kv v2.0.0", "", `PUT sys/plugins/plan {"plugin":"kv","version":"v2.0.0"}`, "could follow"},
		{"plugin rollback -wait=0 -reload-id=r2 kv", "", `PUT sys/plugins/rollback/unknown/kv {"reload_id":"r2","wait":"0"}`, "Success!"},
		{"plugin versions -check", "", `GET sys/plugins/versions`, "No plugin is mounted"},
		{"plugin versions", "", `GET sys/plugins/versions`, "No plugin is mounted"},
		{"plugin pins list", "", `GET sys/plugins/pins`, "Name"},
		{"plugin pins set secret kv v1.0.0", "", `PUT sys/plugins/pins/secret/kv {"version":"v1.0.0"}`, "Success!"},
		{"plugin pins delete secret kv", "", `DELETE sys/plugins/pins/secret/kv`, "Success!"},
		{"reloads pause -why=lunch r1", "", `PUT sys/reloads/r1/pause {"why":"lunch"}`, "Success! Reload r1 paused"},
		{"reloads resume r1", "", `PUT sys/reloads/r1/resume {}`, "resumed"},
		{"reload promote r1", "", `PUT sys/reloads/r1/promote {}`, "promoted"},
		{"reloads abort r1 -why nope", "", `PUT sys/reloads/r1/abort {"why":"nope"}`, "aborted"},
		{
			"secrets enable -path=team/kv -version=2 -plugin-version=v1.0.0 -description=d -hold=1s -leader-only kv", "",
			`POST sys/mounts/team/kv {"type":"kv","description":"d","config":{"plugin_version":"v1.0.0","leader_only":true,"hold":"1s"},"options":{"version":"2"}}`,
			"Success! Enabled the kv secrets engine at: team/kv/\n",
		},
		{"auth enable jwt", "", `POST sys/auth/jwt {"type":"jwt","config":{}}`, "Success! Enabled jwt auth method at: jwt/\n"},
		{"secrets disable kv/", "", `DELETE sys/mounts/kv`, "Success! Disabled the secrets engine (if it existed) at: kv/\n"},
		{"auth disable auth/jwt/", "", `DELETE sys/auth/jwt`, "Success! Disabled the auth method (if it existed) at: jwt/\n"},
		{"secrets list", "", `GET sys/mounts`, "kv/"},
		{"auth list -detailed", "", `GET sys/auth`, "jwt/"},
		{"secrets tune -plugin-version=v2.0.0 p/", "", `POST sys/mounts/p/tune {"plugin_version":"v2.0.0"}`, "Success! Tuned the secrets engine at: p/\n"},
		{
			"auth tune -description= -default-lease-ttl=30m -passthrough-request-headers=A,B jwt", "",
			`POST sys/auth/jwt/tune {"default_lease_ttl":"30m","passthrough_request_headers":["A","B"],"description":""}`, "Success!",
		},
		{"secrets move a/ b", "", "POST sys/remount {\"from\":\"a\",\"to\":\"b\"}\nGET sys/remount/status/m1", "Success! Finished moving secrets engine a/ to b/, with migration ID m1\n"},
		{"auth move a auth/b", "", "POST sys/remount {\"from\":\"auth/a\",\"to\":\"auth/b\"}\nGET sys/remount/status/m1", "Success!"},
		{"read kv/x version=2", "", `GET kv/x?version=2`, "a      b"},
		{"read -field=a kv/x version=2", "", `GET kv/x?version=2`, "b"},
		{"list kv/", "", `GET kv?list=true`, "y/"},
		{
			"write kv/x a=1 b=@" + file + " c=- d=\\@lit e=x=y l=1 l=2", "piped",
			`PUT kv/x {"a":"1","b":"from file","c":"piped","d":"@lit","e":"x=y","l":["1","2"]}`, "Success! Data written to: kv/x\n",
		},
		{"write kv/x @" + object + " m=1", "", `PUT kv/x {"l":["x"],"m":"1","n":1.50}`, "Success!"},
		{"write kv/x -", `{"a":{"b":null}}`, `PUT kv/x {"a":{"b":null}}`, "Success!"},
		{"write -f kv/x", "", `PUT kv/x {}`, "Success!"},
		{"delete kv/x", "", `DELETE kv/x`, "Success! Data deleted (if it existed) at: kv/x\n"},
		{"delete kv/x versions=1", "", `DELETE kv/x?versions=1`, "Success!"},
		{"operator raft remove-peer n3", "", `PUT sys/storage/raft/remove-peer {"server_id":"n3"}`, "Success!"},
		{
			"operator raft join -retry -leader-ca-cert=@" + file + " https://n1:8200", "",
			`POST sys/storage/raft/join {"leader_api_addr":"https://n1:8200","leader_ca_cert":"from file","retry":true}`, "true",
		},
		{"operator raft snapshot save " + snapshot + ".new", "", `GET sys/storage/raft/snapshot`, "4 bytes"},
		{"operator raft snapshot restore -force " + snapshot, "", `POST sys/storage/raft/snapshot SNAP`, "Success!"},
		{"operator step-down", "", `PUT sys/step-down`, "Success!"},
		{"operator rotate", "", `PUT sys/rotate`, "Success!"},
		{"operator key-status", "", `GET sys/key-status`, "Key Term            3"},
		{"operator leave", "", `PUT sys/leave`, "Success!"},
	} {
		f := newFake(t, moved)
		got := run(t, map[string]string{"ROLLCALL_ADDR": f.URL}, c.stdin, strings.Fields(c.line)...)
		if want := strings.Split(c.want, "\n"); got.code != 0 || !reflect.DeepEqual(f.asked, want) {
			t.Errorf("%s: exit %d, %s\n asked %q\n  want %q", c.line, got.code, got.stderr, f.asked, want)
		}
		if !strings.Contains(got.out, c.out) {
			t.Errorf("%s: printed %q, want %q in it", c.line, got.out, c.out)
		}
	}
	if raw, err := os.ReadFile(snapshot + ".new"); err != nil || string(raw) != "SNAP" {
		t.Errorf("snapshot: %q, %v", raw, err)
	}
}

func TestWhatIsWronglyTypedIsNeverSentAndExitsOne(t *testing.T) {
	f := newFake(t, nil)
	for _, c := range []struct{ line, says string }{
		{"plugin register secret kv", "-sha256"},
		{"plugin register -sha256=ab kv", "TYPE and NAME"},
		{"plugin register -sha256=ab secrets kv", "auth, database or secret"},
		{"plugin reload", "exactly one of -plugin or -mounts"},
		{"plugin reload -plugin=a -mounts=b", "exactly one of -plugin or -mounts"},
		{"plugin reload -plugin=a -scope=globe", "-scope=global"},
		{"plugin reload -plugin=a -type=secrets", "-type"},
		{"plugin reload -plugin=a -wait=soon", "-wait"},
		{"plugin reload -plugin=a -max-error-rate=200%", "-max-error-rate"},
		{"plugin reload -namespace=n -type=secret -plugin=a", "-namespace"},
		{"plugin reload a", "unknown command"},
		{"plugin rollback", "plugin rollback NAME"},
		{"plugin rollback -plugin=a b", "said as an argument and"},
		{"plugin plan", "-plugin"},
		{"plugin plan -plugin=a b", "said as an argument and"},
		{"plugin plan a v1 v2", "at most 2"},
		{"plugin relod", `did you mean "reload"`},
		{"plugin", ""},
		{"nonsense", "unknown command"},
		{"read", "at least 1 arg"},
		{"read x y", "KEY=VALUE"},
		{"write x", "-force"},
		{"write x a=- b=-", "once"},
		{"write x @/does/not/exist", "no such file"},
		{"write x -wibble", "unknown flag: -wibble"},
		{"secrets enable", "accepts 1 arg"},
		{"secrets tune -options=x p", "KEY=VALUE"},
		{"operator raft snapshot restore x", "-force"},
		{"reloads pause", "accepts 1 arg"},
		{"status -format=xml", "table or json"},
		{"status -address=node1:8200", "URL"},
		{"status -client-timeout=x", "-client-timeout"},
	} {
		got := run(t, map[string]string{"ROLLCALL_ADDR": f.URL}, "", strings.Fields(c.line)...)
		if got.code != ExitUsage || !strings.Contains(got.stderr, c.says) {
			t.Errorf("%s: exit %d, says %q, want %q in it", c.line, got.code, got.stderr, c.says)
		}
	}
	if len(f.asked) > 0 {
		t.Errorf("asked %q", f.asked)
	}
}

func TestErrorsOfTheClusterExitTwoAndSayWhatToDoNext(t *testing.T) {
	f := newFake(t, map[string]string{
		"GET sys/plugins/catalog":           refuse("403", "permission denied"),
		"PUT kv/x":                          refuse("424", "the plugin died"),
		"PUT kv/full":                       refuse("503", "no leader"),
		"PUT sys/plugins/reload/unknown/kv": refuse("400", `plugin not found in the catalog: "kv"`),
	})
	for _, c := range []struct {
		line string
		env  map[string]string
		says []string
	}{
		{"plugin list", nil, []string{"permission denied", "ROLLCALL_TOKEN"}},
		{"plugin list", map[string]string{"VAULT_TOKEN": "t"}, []string{"permission denied", "lookup-self"}},
		{"write kv/x a=1", nil, []string{"the plugin died", "look before you repeat"}},
		{"write kv/full a=1", nil, []string{"no leader", "Nothing was changed"}},
		{"read kv/none", nil, []string{"No value found at kv/none"}},
		{"list kv/none", nil, []string{"No value found at kv/none/"}},
		{"plugin reload -plugin=kv", nil, []string{`Error: reloading plugin: PUT `, `plugin not found in the catalog: "kv"`}},
		{"plugin info secret nope", nil, []string{`rollcall plugin list secret`}},
	} {
		env := map[string]string{"ROLLCALL_ADDR": f.URL}
		maps.Copy(env, c.env)
		got := run(t, env, "", strings.Fields(c.line)...)
		for _, says := range c.says {
			if got.code != ExitAPI || !strings.Contains(got.stderr, says) || got.out != "" {
				t.Errorf("%s: exit %d, prints %q, says %q, want %q in it", c.line, got.code, got.out, got.stderr, says)
			}
		}
	}
}

func TestHealthcheckFailsWhileFencedAndSaysWhy(t *testing.T) {
	const ask = "GET sys/health?perfstandbyok=true&standbyok=true"
	for _, c := range []struct {
		answer string
		code   int
		says   string
	}{
		{`200 {"initialized":true,"standby":true,"node":"n2"}`, 0, "healthy: n2 (standby)\n"},
		{`200 {"initialized":true,"node":"n1"}`, 0, "healthy: n1 (leader)\n"},
		{`503 {"initialized":true,"fenced":true,"fenced_because":"no leader for 6s","node":"n1"}`, 1, "n1 is fenced (no leader for 6s)"},
		{`503 {"initialized":true,"sealed":true,"node":"n1"}`, 1, "sealed"},
		{`503 {"initialized":false,"node":"n1"}`, 1, "not joined"},
		{`503 <html>`, 1, "unhealthy"},
	} {
		f := newFake(t, map[string]string{ask: c.answer})
		other := newFake(t, map[string]string{ask: `200 {"initialized":true,"node":"other"}`})
		got := run(t, map[string]string{"ROLLCALL_ADDR": f.URL + "," + other.URL}, "", "healthcheck")
		if got.code != c.code || !strings.Contains(got.out+got.stderr, c.says) || len(other.asked) > 0 {
			t.Errorf("%s: exit %d, %q %q; the other node was asked %q", c.answer, got.code, got.out, got.stderr, other.asked)
		}
	}
}

// The verbs that the documents of this project name.
func TestEveryDocumentedVerbExists(t *testing.T) {
	root := newTestRoot(&Env{Getenv: func(string) string { return "" }})
	root.InitDefaultCompletionCmd()
	verbs := strings.FieldsSeq(`plugin/register plugin/list plugin/info plugin/deregister plugin/reload plugin/reload-status plugin/versions
		plugin/plan plugin/rollback plugin/pins/list plugin/pins/set plugin/pins/delete reloads/list reloads/show reloads/pause reloads/resume
		reloads/promote reloads/abort secrets/enable secrets/disable secrets/list secrets/tune secrets/move auth/enable auth/disable auth/list
		auth/tune auth/move read write list delete operator/members operator/raft/list-peers operator/raft/remove-peer operator/raft/join
		operator/raft/snapshot/save operator/raft/snapshot/restore operator/raft/autopilot/state operator/step-down operator/leave operator/rotate
		operator/key-status status
		healthcheck version events completion/bash completion/zsh completion/fish completion/powershell`)
	for v := range verbs {
		path := strings.Split(v, "/")
		c, rest, err := root.Find(path)
		if err != nil || len(rest) > 0 || c.Name() != path[len(path)-1] || !c.Runnable() {
			t.Errorf("%s: found %q, %q left, %v", v, c.CommandPath(), rest, err)
		}
	}
	var walk func(*cobra.Command)
	walk = func(c *cobra.Command) {
		if c.Short == "" {
			t.Errorf("%s says nothing of itself", c.CommandPath())
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(root)
}

var example = regexp.MustCompile("(?:^\\s*\\$ |`)rollcall ((?:[a-z][a-z-]*[ `\n])+)")

// What this package itself tells people to type has to exist.
func TestEveryCommandInHelpAndHintsExists(t *testing.T) {
	root := newTestRoot(&Env{Getenv: func(string) string { return "" }})
	root.InitDefaultCompletionCmd()
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		raw, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for l := range strings.Lines(string(raw)) {
			for _, m := range example.FindAllStringSubmatch(l, -1) {
				seen++
				words := strings.Fields(strings.ReplaceAll(m[1], "`", " "))
				c, _, err := root.Find(words)
				if err != nil || c == root || c.HasSubCommands() {
					t.Errorf("%s names `rollcall %s`, which is no command", file, strings.Join(words, " "))
				}
			}
		}
	}
	if seen < 8 {
		t.Errorf("only %d commands were found in texts: the pattern is wrong", seen)
	}
}

// elsewhere are the verbs that other files of cmd/rollcall add to the client's.
var elsewhere = []string{"server", "dev", "demo", "tls"}

var fenced = regexp.MustCompile("(?s)```.*?```")

var typed = regexp.MustCompile(`(?m)(?:^|[ $])rollcall((?: [a-z][a-z-]*)+)`)

// What the documents tell people to type has to exist. Only blocks of code count; prose may say what it likes.
func TestEveryCommandInTheDocumentsExists(t *testing.T) {
	root := newTestRoot(&Env{Getenv: func(string) string { return "" }})
	root.InitDefaultCompletionCmd()
	check := func(file, text string) (seen int, wrong []string) {
		for _, block := range fenced.FindAllString(text, -1) {
			for _, m := range typed.FindAllStringSubmatch(block, -1) {
				words := strings.Fields(m[1])
				seen++
				if slices.Contains(elsewhere, words[0]) {
					continue
				}
				if c, _, err := root.Find(words); err != nil || c == root || c.HasSubCommands() {
					wrong = append(wrong, file+": rollcall "+strings.Join(words, " "))
				}
			}
		}
		return seen, wrong
	}
	seen, wrong := check("probe", "rollcall is fine\n```\n$ rollcall plugin relod -x\nrollcall status\ndocker compose exec n1 rollcall plugin list x\n```")
	if seen != 3 || len(wrong) != 1 {
		t.Fatalf("the check itself saw %d commands and found %q", seen, wrong)
	}
	for _, pattern := range []string{"README.md", "deploy/*.md", "deploy/*/*.md", "cmd/rollcall/*/*.md", "node/*/*.md"} {
		files, err := filepath.Glob(filepath.Join("..", "..", "..", pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			raw, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if _, wrong := check(file, string(raw)); len(wrong) > 0 {
				t.Errorf("no such commands: %q", wrong)
			}
		}
	}
}

func TestCompletionKnowsFourShellsAndTheWordsOfFlags(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if got := run(t, nil, "", "completion", shell); got.code != 0 || !strings.Contains(got.out, "rollcall") {
			t.Errorf("%s: exit %d, %d bytes", shell, got.code, len(got.out))
		}
	}
	got := run(t, nil, "", "__complete", "plugin", "reload", "-scope=global", "--strategy", "")
	if !strings.HasPrefix(got.out, "all-or-nothing\nbest-effort\nrolling\ncanary\n") {
		t.Errorf("strategies: %q", got.out)
	}
	if got := run(t, nil, "", "version"); got.code != 0 || !strings.HasPrefix(got.out, "rollcall 1.2.3 (") {
		t.Errorf("version: %+v", got)
	}
}
