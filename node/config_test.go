package node

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"rollcall/node/fault"
)

// writeConfig puts text into a file of that name and returns its path.
func writeConfig(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// valid is a configuration that Validate has nothing against.
func valid() Config {
	cfg := DefaultConfig()
	cfg.Name = "node-1"
	cfg.DataDir, cfg.PluginDir = "/data", "/plugins"
	cfg.BootstrapExpect, cfg.BootstrapTokenFile = 1, "/etc/token"
	cfg.Cluster.CAFile, cfg.Cluster.CertFile, cfg.Cluster.KeyFile = "ca.pem", "node.pem", "node-key.pem"
	cfg.Gossip.KeyFile = "gossip.key"
	return cfg
}

func TestTheSampleConfigurationsSayTheSameAndHoldEveryKey(t *testing.T) {
	fromHCL, _, err := LoadConfig("../deploy/config/node.hcl", nil)
	if err != nil {
		t.Fatal(err)
	}
	fromJSON, _, err := LoadConfig("../deploy/config/node.json", nil)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(fromHCL, fromJSON) {
		t.Errorf("node.hcl and node.json differ:\n%+v\n%+v", fromHCL, fromJSON)
	}
	src, err := os.ReadFile("../deploy/config/node.hcl")
	if err != nil {
		t.Fatal(err)
	}
	defaults := map[string]string{}
	for _, k := range ConfigKeys() {
		defaults[k.Path] = k.Default
	}
	cfg, block := fromHCL, ""
	values := map[string]string{}
	for _, k := range keysOf(&cfg) {
		values[k.path] = k.text()
	}
	assign := regexp.MustCompile(`^\s*([a-z_]+)\s*=`)
	for line := range strings.Lines(string(src)) {
		if name, ok := strings.CutSuffix(strings.TrimSpace(line), " {"); ok {
			block = name + "."
		}
		if strings.TrimSpace(line) == "}" {
			block = ""
		}
		m := assign.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		path := block + m[1]
		if !strings.Contains(line, "# example") && !isFounding(path) && values[path] != defaults[path] {
			t.Errorf("node.hcl says %s = %s without \"example\", and the default is %s", path, values[path], defaults[path])
		}
		delete(defaults, path)
	}
	for path := range defaults {
		t.Errorf("node.hcl does not show %s", path)
	}
}

func isFounding(path string) bool { return path == "bootstrap_expect" || path == "retry_join" }

func TestEveryFieldIsDocumentedWithItsDefault(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "config.go", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	fields := 0
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.TypeSpec)
		if !ok {
			return true
		}
		st, ok := spec.Type.(*ast.StructType)
		if !ok {
			return true
		}
		for _, f := range st.Fields.List {
			name, doc := f.Names[0].Name, f.Doc.Text()
			fields++
			if !strings.HasPrefix(doc, name+" ") {
				t.Errorf("%s.%s: the comment does not begin with the field's name: %q", spec.Name.Name, name, doc)
			}
			if typ, ok := f.Type.(*ast.Ident); ok && strings.HasSuffix(typ.Name, "Config") {
				continue // a block
			}
			if !strings.Contains(doc, "efault") && !strings.Contains(doc, "equired") &&
				!strings.Contains(doc, "as in ClusterConfig") && !isOptionalFile(name) {
				t.Errorf("%s.%s: the comment names no default and does not say that it is required", spec.Name.Name, name)
			}
		}
		return true
	})
	if fields < 50 {
		t.Errorf("only %d fields were looked at", fields)
	}
}

func isOptionalFile(field string) bool {
	return field == "TLSCertFile" || field == "TLSKeyFile" || field == "RetryJoin" || field == "BootstrapExpect"
}

func TestEveryKeyCanBeSetByFileAndByEnvironment(t *testing.T) {
	env := []string{"PATH=/bin", "ROLLCALL_TOKEN=client"}
	set := map[string]string{}
	for _, k := range ConfigKeys() {
		text := map[string]string{
			"string": "text-" + k.Path, "bool": fmt.Sprint(k.Default != "true"), "number": "4242",
			"duration": "4242ms", "size": "4242KiB", "list": "one, two",
		}[k.Type]
		if text == "" {
			t.Fatalf("%s is of type %q", k.Path, k.Type)
		}
		set[k.Path] = text
		env = append(env, k.Env+"="+text)
	}
	cfg := DefaultConfig()
	warnings, err := loadEnv(env, &cfg)
	if err != nil || len(warnings) > 0 {
		t.Fatalf("loadEnv: %v, warnings %q", err, warnings)
	}
	for _, k := range keysOf(&cfg) {
		want := map[string]string{"list": "[one two]", "duration": "4.242s"}[typeName(k.value.Type())]
		if want == "" {
			want = set[k.path]
		}
		if got := fmt.Sprint(k.value.Interface()); got != want {
			t.Errorf("%s = %q, want %q", k.env, got, want)
		}
	}
}

func TestEnvironmentBeatsFileBeatsDefault(t *testing.T) {
	path := writeConfig(t, "node.hcl", `
		name = "from-file"
		data_dir = "/from/file"
		lease { ttl = "7s" }
		http { listen = "127.0.0.1:1" }
	`)
	cfg, _, _ := LoadConfig(path, []string{
		"ROLLCALL_NAME=from-env", "ROLLCALL_HTTP_LISTEN=127.0.0.1:2", "ROLLCALL_LEASE_TTL=", "ROLLCALL_RETRY_JOIN=a:1,b:2",
	})
	if cfg.Name != "from-env" || cfg.DataDir != "/from/file" || cfg.HTTP.Listen != "127.0.0.1:2" ||
		cfg.Lease.TTL != 7*time.Second || cfg.Raft.Voters != 5 || len(cfg.RetryJoin) != 2 {
		t.Errorf("cfg = %+v", cfg)
	}
}

func TestWhatTheFileDoesNotKnowIsAnErrorAtItsLine(t *testing.T) {
	for name, c := range map[string]struct{ file, text, want string }{
		"unknown key":        {"n.hcl", "name = \"a\"\nnaem = \"b\"\n", "n.hcl:2: unsupported argument"},
		"unknown in a block": {"n.hcl", "http {\n  lissten = \"x\"\n}\n", `Did you mean "listen"`},
		"unknown block":      {"n.hcl", "\n\nhtpp {}\n", "n.hcl:3: unsupported block"},
		"unknown in JSON":    {"n.json", "{\n \"http\": {\n  \"lissten\": 1}}", "n.json:3: "},
		"block twice":        {"n.hcl", "http {}\nraft {}\nhttp {}\n", "n.hcl:3: block given twice"},
		"key twice":          {"n.hcl", "name = \"a\"\nname = \"b\"\n", "n.hcl:2: attribute redefined"},
		"number for text":    {"n.hcl", "name = 5\n", "n.hcl:1: wrong value for name: a string is needed"},
		"text for number":    {"n.hcl", "raft {\n voters = \"5\"\n}\n", "n.hcl:2: wrong value for voters: a number is needed"},
		"half a voter":       {"n.hcl", "raft {\n voters = 2.5\n}\n", "n.hcl:2: wrong value for voters"},
		"bare duration":      {"n.hcl", "lease {\n ttl = 5\n}\n", `as text with its unit: "300ms"`},
		"duration of air":    {"n.json", `{"lease": {"ttl": "soon"}}`, `"soon" is not a duration`},
		"size of air":        {"n.hcl", `http { max_body = "32MB" }`, `"32MB" is not a size`},
		"list of numbers":    {"n.json", `{"retry_join": [null]}`, "one of these is null"},
		"text for list":      {"n.json", `{"retry_join": "a:1"}`, "a list is needed"},
		"text for bool":      {"n.json", `{"telemetry": {"prometheus": "yes"}}`, "a bool is needed"},
		"a variable":         {"n.hcl", "name = \"${host}\"\n", "n.hcl:1: variables not allowed"},
		"broken HCL":         {"n.hcl", "http {\n", "n.hcl:"},
		"broken JSON":        {"n.json", "{\"name\": ", "n.json:1: "},
		"not an object":      {"n.json", "[]x", "n.json:1: "},
		"other format":       {"n.yaml", "name: a", "must end in .hcl or .json"},
		"too large":          {"n.hcl", strings.Repeat("# x\n", maxConfigFile/4+1), "larger than 1MiB"},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := LoadConfig(writeConfig(t, c.file, c.text), nil)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("err = %v, want %q in it", err, c.want)
			}
			if fault.KindOf(err) != fault.Invalid {
				t.Errorf("kind = %v", fault.KindOf(err))
			}
		})
	}
}

func TestAllMistakesOfAFileAreReportedAtOnceAndInOrder(t *testing.T) {
	path := writeConfig(t, "n.hcl", "name = 1\nbad = 2\nlease {\n ttl = 3\n}\n")
	_, _, err := LoadConfig(path, []string{"ROLLCALL_RAFT_VOTERS=many", "ROLLCALL_HTTP_ALLOW_PLAIN=perhaps"})
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{"n.hcl:1:", "n.hcl:2:", "n.hcl:4:", "ROLLCALL_RAFT_VOTERS", "neither true nor false"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("err = %v\nwant %q in it", err, want)
		}
	}
	if a, b := strings.Index(err.Error(), "n.hcl:1:"), strings.Index(err.Error(), "n.hcl:4:"); a > b {
		t.Errorf("not in the order of the file: %v", err)
	}
}

func TestAMissingFileIsAnError(t *testing.T) {
	_, _, err := LoadConfig(filepath.Join(t.TempDir(), "none.hcl"), nil)
	if err == nil || !strings.Contains(err.Error(), "none.hcl") {
		t.Errorf("err = %v", err)
	}
}

func TestDeploymentFilesSetNothingThatDoesNotExist(t *testing.T) {
	known := map[string]bool{}
	for _, k := range ConfigKeys() {
		known[k.Env] = true
	}
	for _, name := range clientEnv {
		known[EnvPrefix+name] = true
	}
	setting := regexp.MustCompile(`(ROLLCALL_[A-Z0-9_]+)(?::|=|, value:)`)
	for _, path := range []string{
		"../docker-compose.yml", "../deploy/Dockerfile", "../deploy/kubernetes/rollcall.yaml",
	} {
		src, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		found := setting.FindAllStringSubmatch(string(src), -1)
		if len(found) < 3 {
			t.Errorf("%s: only %d settings were found", path, len(found))
		}
		for _, m := range found {
			if !known[m[1]] && !strings.Contains(string(src), "${"+m[1]+":-") { // a variable of the file's own
				t.Errorf("%s sets %s, which is no key", path, m[1])
			}
		}
	}
}

func TestAnUnknownVariableIsAWarningThatNamesTheLikelyKey(t *testing.T) {
	cfg := DefaultConfig()
	warnings, err := loadEnv([]string{
		"ROLLCALL_CLUSTER_LISEN=x", "ROLLCALL_WHATEVER_THIS_IS=y", "ROLLCALL_ADDR=http://x", "ROLLCALL_PORT=tcp://1.2.3.4:1",
		"ROLLCALL_SERVICE_HOST=1.2.3.4", "ROLLCALL_PORT_8200_TCP_ADDR=1.2.3.4", "ROLLCALL_HTTP_SERVICE_PORT_API=8200",
	}, &cfg)
	if err != nil || len(warnings) != 2 {
		t.Fatalf("err %v, warnings %q", err, warnings)
	}
	if !strings.Contains(warnings[0], "did you mean ROLLCALL_CLUSTER_LISTEN?") || strings.Contains(warnings[1], "did you") {
		t.Errorf("warnings = %q", warnings)
	}
}

func TestSizesAreReadExactlyAndWrittenAsTheyAreRead(t *testing.T) {
	for text, want := range map[string]Size{
		"0": 0, "1024": 1 << 10, "100B": 100, "32MiB": 32 << 20, "1 gib": 1 << 30, "3KIB": 3 << 10,
	} {
		got, err := ParseSize(text)
		if err != nil || got != want {
			t.Errorf("ParseSize(%q) = %v, %v", text, got, err)
		}
		if again, err := ParseSize(got.String()); err != nil || again != got {
			t.Errorf("ParseSize(%q) = %v, %v, want %v", got.String(), again, err, got)
		}
	}
	for _, text := range []string{"", "B", "MiB", "-1", "1.5GiB", "32MB", "9223372036854775807GiB", "99999999999999999999"} {
		if got, err := ParseSize(text); err == nil {
			t.Errorf("ParseSize(%q) = %v", text, got)
		}
	}
}

func TestValidateNamesEachProblemByItsKey(t *testing.T) {
	cfg := valid()
	if err := cfg.Validate(); err != nil {
		t.Fatalf("the base of this test is refused: %v", err)
	}
	for name, c := range map[string]struct {
		change func(*Config)
		want   string // "" for nothing wrong
	}{
		"name":                   {func(c *Config) { c.Name = "../x" }, "name: "},
		"cluster name":           {func(c *Config) { c.ClusterName = "" }, "cluster_name: "},
		"no data":                {func(c *Config) { c.DataDir = "" }, "data_dir: is missing"},
		"no plugins":             {func(c *Config) { c.PluginDir = "" }, "plugin_dir: is missing"},
		"plugins in data":        {func(c *Config) { c.PluginDir = "/data/plugins" }, "plugin_dir: "},
		"plugins are data":       {func(c *Config) { c.PluginDir = "/data/" }, "plugin_dir: "},
		"plugins beside data":    {func(c *Config) { c.PluginDir = "/data-plugins" }, ""},
		"long socket dir":        {func(c *Config) { c.SocketDir = "/" + strings.Repeat("x", maxSocketDir) }, "socket_dir: "},
		"long data dir":          {func(c *Config) { c.DataDir = "/" + strings.Repeat("x", maxSocketDir) }, "socket_dir: "},
		"short socket dir":       {func(c *Config) { c.SocketDir, c.DataDir = "/run/r", "/"+strings.Repeat("x", 99) }, ""},
		"negative expect":        {func(c *Config) { c.BootstrapExpect = -1 }, "bootstrap_expect: "},
		"expect beyond voters":   {func(c *Config) { c.BootstrapExpect, c.RetryJoin = 7, []string{"a"} }, "bootstrap_expect: "},
		"expect without join":    {func(c *Config) { c.BootstrapExpect = 3 }, "retry_join: "},
		"expect without token":   {func(c *Config) { c.BootstrapTokenFile = "" }, "bootstrap_token_file: "},
		"neither found nor join": {func(c *Config) { c.BootstrapExpect = 0 }, "retry_join: "},
		"join alone": {func(c *Config) {
			c.BootstrapExpect, c.BootstrapTokenFile, c.RetryJoin = 0, "", []string{"a", "b:1", "::1", "[::1]:5"}
		}, ""},
		"two seal keys": {func(c *Config) { c.Seal.KeyFile, c.Seal.Command = "/k", []string{"/bin/k"} }, "seal.command: and seal.key_file"},
		"two previous keys": {func(c *Config) {
			c.Seal = SealConfig{KeyFile: "/k", PreviousKeyFile: "/p", PreviousCommand: []string{"/p"}}
		}, "seal.previous_command: "},
		"previous key alone": {func(c *Config) { c.Seal.PreviousKeyFile = "/p" }, "seal.key_file: is missing"},
		"key beside data":    {func(c *Config) { c.Seal.KeyFile = "/data/seal.key" }, "seal.key_file: /data/seal.key lies in data_dir"},
		"command by name":    {func(c *Config) { c.Seal.Command = []string{"get-key", "x"} }, "seal.command: "},
		"seal variable":      {func(c *Config) { c.Seal = SealConfig{KeyFile: "/k", EnvAllow: []string{"A=B"}} }, "seal.env_allow: "},
		"sealed": {func(c *Config) {
			c.Seal = SealConfig{Command: []string{"/bin/k", "x"}, PreviousKeyFile: "/etc/old.key", EnvAllow: []string{"KMS"}}
		}, ""},
		"bad join":         {func(c *Config) { c.RetryJoin = []string{"http://a:1/x"} }, "retry_join: "},
		"empty join":       {func(c *Config) { c.RetryJoin = []string{""} }, "retry_join: "},
		"join backwards":   {func(c *Config) { c.Join.MaxInterval = time.Millisecond }, "join.max_interval: "},
		"listen":           {func(c *Config) { c.Cluster.Listen = "8201" }, "cluster.listen: "},
		"port":             {func(c *Config) { c.Cluster.Listen = "1.2.3.4:x" }, "cluster.listen: "},
		"wildcard":         {func(c *Config) { c.Cluster.Listen = ":8201" }, "cluster.advertise: is missing"},
		"IPv6 wildcard":    {func(c *Config) { c.Gossip.Listen = "[::]:8202" }, "gossip.advertise: is missing"},
		"advertise":        {func(c *Config) { c.Gossip.Advertise = "0.0.0.0:1" }, "gossip.advertise: "},
		"advertise port":   {func(c *Config) { c.Cluster.Advertise = "node-1:0" }, "cluster.advertise: "},
		"free ports":       {func(c *Config) { c.Cluster.Listen, c.Gossip.Listen = "127.0.0.1:0", "127.0.0.1:0" }, ""},
		"same port":        {func(c *Config) { c.Gossip.Listen = "127.0.0.1:8201" }, "gossip.listen: "},
		"same port, other": {func(c *Config) { c.Gossip.Listen = "127.0.0.2:8201" }, ""},
		"no CA":            {func(c *Config) { c.Cluster.CAFile = "" }, "cluster.ca_file: "},
		"no certificate":   {func(c *Config) { c.Cluster.CertFile = "" }, "cluster.cert_file: "},
		"no key":           {func(c *Config) { c.Cluster.KeyFile = "" }, "cluster.key_file: "},
		"no gossip key":    {func(c *Config) { c.Gossip.KeyFile = "" }, "gossip.key_file: "},
		"plain beyond loopback": {func(c *Config) {
			c.HTTP.Listen = "10.0.0.1:8200"
		}, "http.listen: 10.0.0.1:8200 is reachable from outside and has no TLS"},
		"plain by decision":  {func(c *Config) { c.HTTP.Listen, c.HTTP.AllowPlain = "10.0.0.1:8200", true }, ""},
		"plain on IPv6":      {func(c *Config) { c.HTTP.Listen = "[::1]:8200" }, ""},
		"plain on localhost": {func(c *Config) { c.HTTP.Listen = "localhost:8200" }, ""},
		"plain everywhere": {func(c *Config) {
			c.HTTP.Listen, c.HTTP.Advertise = ":8200", "http://a:1"
		}, "http.listen: "},
		"half of TLS":       {func(c *Config) { c.HTTP.TLSCertFile = "x" }, "http.tls_cert_file: "},
		"API URL":           {func(c *Config) { c.HTTP.Advertise = "node-1:8200" }, "http.advertise: "},
		"API URL with path": {func(c *Config) { c.HTTP.Advertise = "https://a/v1" }, "http.advertise: "},
		"body":              {func(c *Config) { c.HTTP.MaxBody = 2 << 30 }, "http.max_body: "},
		"timeout":           {func(c *Config) { c.HTTP.ReadTimeout = 0 }, "http.read_timeout: "},
		"multiplier":        {func(c *Config) { c.Raft.PerformanceMultiplier = 0 }, "raft.performance_multiplier: "},
		"voters":            {func(c *Config) { c.Raft.Voters = 4 }, "raft.voters: "},
		"short lease":       {func(c *Config) { c.Lease.TTL = time.Second }, "lease.ttl: "},
		"lease by timers":   {func(c *Config) { c.Raft.PerformanceMultiplier = 4 }, "lease.ttl: 5s is not between 12s"},
		"cleanup at once":   {func(c *Config) { c.Autopilot.DeadServerThreshold = 0 }, "autopilot.dead_server_threshold: "},
		"start timeout":     {func(c *Config) { c.Plugins.StartTimeout = 0 }, "plugins.start_timeout: "},
		"memory":            {func(c *Config) { c.Plugins.MemoryLimit = 1 }, "plugins.memory_limit: "},
		"group alone":       {func(c *Config) { c.Plugins.GID = 5 }, "plugins.gid: "},
		"our own variables": {func(c *Config) { c.Plugins.EnvAllow = []string{"ROLLCALL_X"} }, "plugins.env_allow: "},
		"no variable":       {func(c *Config) { c.Plugins.EnvAllow = []string{"A=B"} }, "plugins.env_allow: "},
		"cgroup":            {func(c *Config) { c.Plugins.Cgroup = "x" }, "plugins.cgroup: "},
		"history":           {func(c *Config) { c.Reload.History = 0 }, "reload.history: "},
		"prepare":           {func(c *Config) { c.Reload.PrepareDeadline = time.Second }, "reload.prepare_deadline: "},
		"run":               {func(c *Config) { c.Reload.RunDeadline = time.Minute }, "reload.run_deadline: "},
		"level":             {func(c *Config) { c.Log.Level = "loud" }, "log.level: "},
		"format":            {func(c *Config) { c.Log.Format = "xml" }, "log.format: "},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := valid()
			c.change(&cfg)
			err := cfg.Validate()
			switch {
			case c.want == "" && err != nil:
				t.Errorf("refused: %v", err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("err = %v, want %q in it", err, c.want)
			case c.want != "" && strings.Contains(err.Error(), "\n"):
				t.Errorf("one mistake is reported as several: %v", err)
			case c.want != "" && fault.KindOf(err) != fault.Invalid:
				t.Errorf("kind = %v", fault.KindOf(err))
			}
		})
	}
}

func TestValidateReportsEverythingAtOnce(t *testing.T) {
	err := new(Config).Validate()
	if err == nil {
		t.Fatal("an empty configuration is valid")
	}
	for _, key := range []string{
		"name", "cluster_name", "data_dir", "plugin_dir", "retry_join", "cluster.listen", "cluster.ca_file", "gossip.listen",
		"gossip.key_file", "http.listen", "raft.voters", "lease.ttl", "plugins.start_timeout", "reload.queue",
	} {
		if !strings.Contains(err.Error(), key+": ") {
			t.Errorf("%s is not reported: %v", key, err)
		}
	}
}

func TestWarningsTellWhatWorksAndIsUnwise(t *testing.T) {
	cfg := valid()
	cfg.BootstrapExpect, cfg.RetryJoin = 2, []string{"node-2"}
	cfg.HTTP.Listen, cfg.HTTP.AllowPlain = "10.0.0.1:8200", true
	got := strings.Join(cfg.Warnings(), "\n")
	for _, want := range []string{"in the clear", "even number", "cluster: the others are told 127.0.0.1", "gossip: "} {
		if !strings.Contains(got, want) {
			t.Errorf("no warning with %q in %q", want, got)
		}
	}
	cfg = valid()
	cfg.HTTP.TLSCertFile, cfg.HTTP.TLSKeyFile = "c", "k"
	cfg.Seal.KeyFile = "s"
	if got := cfg.Warnings(); len(got) != 0 {
		t.Errorf("warnings about a sound configuration: %q", got)
	}
}

func TestPreflightNamesEveryFileThatIsMissingOrOpen(t *testing.T) {
	dir := t.TempDir()
	cfg := valid()
	cfg.DataDir, cfg.PluginDir = filepath.Join(dir, "data"), filepath.Join(dir, "plugins")
	err := cfg.Preflight()
	for _, key := range []string{"cluster.ca_file", "cluster.cert_file", "cluster.key_file", "gossip.key_file", "plugin_dir"} {
		if err == nil || !strings.Contains(err.Error(), key+": ") {
			t.Errorf("%s is not reported: %v", key, err)
		}
	}
	if strings.Contains(err.Error(), "bootstrap_token_file") {
		t.Errorf("a token file that is gone matters only to a founding: %v", err)
	}

	for _, p := range []*string{
		&cfg.Cluster.CAFile, &cfg.Cluster.CertFile, &cfg.Cluster.KeyFile, &cfg.Gossip.KeyFile, &cfg.BootstrapTokenFile,
	} {
		*p = filepath.Join(dir, filepath.Base(*p))
		if err := os.WriteFile(*p, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(cfg.PluginDir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := cfg.Preflight(); err != nil {
		t.Errorf("refused: %v", err)
	}

	for _, path := range []string{cfg.Cluster.KeyFile, cfg.BootstrapTokenFile} {
		if err := os.Chmod(path, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(cfg.PluginDir, 0o777); err != nil {
		t.Fatal(err)
	}
	cfg.Gossip.KeyFile = dir
	err = cfg.Preflight()
	for _, want := range []string{
		"cluster.key_file: everyone may read", "bootstrap_token_file: everyone may read", "plugin_dir: everyone may write",
		"gossip.key_file: " + dir + " is not a file",
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in %v", want, err)
		}
	}
}
