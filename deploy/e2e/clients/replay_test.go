package clients

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// The files in testdata hold what the stock commands and Terraform's provider send, call by call, and every field of what
// must come back. One block is one call:
//
//	# vault kv get kv/a                    the command, for whom reads it
//	@ X-Vault-Namespace: team              headers
//	PUT sys/mounts/kv {"type":"kv"}        method, path below /v1/, body
//	200 data {"k":"<string>"}              status, form of the answer, its content
//	warnings ["<string>"]                  where there are any
//	again                                  the answer may need a while: ask again until it is this one
//
// Forms: data is the whole envelope around that data; doubled is the same with the data's keys beside it as well; bare
// has no envelope; auth is an envelope with auth, wrap one with wrap_info; error is one text, and nothing is {"errors":[]}.
// In the content, every key must be there and no other, but where an object has the key "...". <uuid>, <time>, <hex>, <int>,
// <bool>, <string>, <token> and <any> stand for values of that kind; <kind=name> remembers one, which $name then is. $N is the run's
// own suffix, $KVOLD, $KVNEW, $JWT and $EVIL are the plugins' checksums.
type call struct {
	line    int
	title   string
	header  map[string]string
	method  string
	path    string
	body    string
	status  string
	form    string
	content string
	warn    string
	again   bool
}

func parseCalls(t *testing.T, text string) []call {
	t.Helper()
	var calls []call
	c := call{header: map[string]string{}}
	title := ""
	flush := func() {
		if c.method != "" {
			calls = append(calls, c)
		}
		c = call{header: map[string]string{}}
	}
	for i, line := range append(strings.Split(text, "\n"), "") {
		word, rest, _ := strings.Cut(line, " ")
		switch {
		case line == "":
			flush()
		case word == "#":
			flush()
			title = rest
		case word == "@":
			k, v, _ := strings.Cut(rest, ":")
			c.header[k] = strings.TrimSpace(v)
		case word == "warnings":
			c.warn = rest
		case word == "again":
			c.again = true
		case word[0] >= 'A' && word[0] <= 'Z':
			c.line, c.title, c.method = i+1, title, word
			c.path, c.body, _ = strings.Cut(rest, " ")
		case word[0] >= '1' && word[0] <= '5':
			c.status = word
			c.form, c.content, _ = strings.Cut(rest, " ")
		default:
			t.Fatalf("line %d: what is %q?", i+1, line)
		}
	}
	return calls
}

func TestStockCommandsAndTerraform(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	must(t, err)
	if len(files) < 4 {
		t.Fatalf("only %v", files)
	}
	for _, file := range files {
		raw, err := os.ReadFile(file)
		must(t, err)
		calls := parseCalls(t, string(raw))
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			through(t, func(t *testing.T, n at) {
				r := &replay{at: n, t: t, vars: map[string]string{
					"N": n.N, "KVOLD": shared.sums["kv-"+kvOld], "KVNEW": shared.sums["kv-"+kvNew], "JWT": shared.sums["auth-jwt"],
					"EVIL": shared.sums["evil"], "addr": n.addr,
				}}
				for _, c := range calls {
					if !r.run(c) {
						t.Fatalf("%s:%d: %s", file, c.line, c.title)
					}
				}
			})
		})
	}
}

// replay is one run of a file.
type replay struct {
	at
	t    *testing.T
	vars map[string]string
}

var variable = regexp.MustCompile(`\$[A-Za-z]+`)

func (r *replay) fill(text string) string {
	return variable.ReplaceAllStringFunc(text, func(v string) string {
		if s, ok := r.vars[v[1:]]; ok {
			return s
		}
		return v
	})
}

// run makes one call, compares, and says whether all was well.
func (r *replay) run(c call) bool {
	r.t.Helper()
	deadline := time.Now().Add(limit)
	for {
		status, header, body, err := r.send(c)
		if err != nil {
			r.t.Error(err)
			return false
		}
		wrong := r.compare(c, status, header, body)
		if len(wrong) == 0 {
			r.note("%s %s: %d", c.method, c.path, status)
			return true
		}
		if c.again && time.Now().Before(deadline) {
			time.Sleep(50 * time.Millisecond)
			continue
		}
		r.t.Errorf("%s\n%s %s %s\n  answered %d %s\n  %s", c.title, c.method, r.fill(c.path), r.fill(c.body), status, body, strings.Join(wrong, "\n  "))
		return false
	}
}

// send makes the call as the stock clients do: no Content-Type, and the two headers that they always set.
func (r *replay) send(c call) (status int, header http.Header, body []byte, err error) {
	req, err := http.NewRequestWithContext(r.t.Context(), c.method, r.addr+"/v1/"+r.fill(c.path), strings.NewReader(r.fill(c.body)))
	if err != nil {
		return 0, nil, nil, err
	}
	req.Header.Set("X-Vault-Request", "true")
	req.Header.Set("X-Vault-Token", rootToken)
	for k, v := range c.header {
		if v = r.fill(v); v == "" {
			req.Header.Del(k)
		} else {
			req.Header.Set(k, v)
		}
	}
	client := &http.Client{Timeout: limit, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	resp, err := client.Do(req)
	if err != nil {
		return 0, nil, nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err = io.ReadAll(resp.Body)
	return resp.StatusCode, resp.Header, body, err
}

// compare says what of an answer is not as it should be.
func (r *replay) compare(c call, status int, header http.Header, body []byte) []string {
	if fmt.Sprint(status) != c.status {
		return []string{"want status " + c.status}
	}
	if header.Get("Cache-Control") != "no-store" {
		return []string{"Cache-Control is " + header.Get("Cache-Control")}
	}
	if c.form == "" || c.form == "text" {
		if want := unescaped.Replace(r.fill(c.content)); (c.form == "" && len(body) != 0) || !strings.Contains(string(body), want) {
			return []string{fmt.Sprintf("want the text %q", want)}
		}
		return nil
	}
	if c.form == "to" { // a redirect
		if got := header.Get("Location"); got != r.fill(c.content) {
			return []string{"Location is " + got}
		}
		return nil
	}
	if ct := header.Get("Content-Type"); ct != "application/json" {
		return []string{"Content-Type is " + ct}
	}
	var got any
	if err := json.Unmarshal(body, &got); err != nil {
		return []string{err.Error()}
	}
	want, err := r.want(c)
	if err != nil {
		return []string{err.Error()}
	}
	d := &differ{vars: maps.Clone(r.vars)}
	d.compare("", want, got)
	if len(d.wrong) == 0 {
		r.vars = d.vars
	}
	return d.wrong
}

// want is the whole answer that a block speaks of.
func (r *replay) want(c call) (any, error) {
	var content, warnings any
	for text, to := range map[string]*any{c.content: &content, c.warn: &warnings} {
		if text == "" || c.form == "error" {
			continue
		}
		if err := json.Unmarshal([]byte(r.fill(text)), to); err != nil {
			return nil, fmt.Errorf("line %d: %w", c.line, err)
		}
	}
	env := map[string]any{
		"request_id": "<uuid>", "lease_id": "", "renewable": false, "lease_duration": 0.0, "data": nil,
		"wrap_info": nil, "warnings": warnings, "auth": nil, "mount_type": "<optional>",
	}
	switch c.form {
	case "data", "doubled", "lease", "lease-free":
		env["data"] = content
		if c.form == "lease" {
			env["lease_id"], env["renewable"], env["lease_duration"] = "<string=lease>", "<bool>", "<int>"
		}
		if c.form == "lease-free" { // KV without versions says how long its readers may keep what they read
			env["lease_duration"] = "<int>"
		}
		if m, ok := content.(map[string]any); ok && c.form == "doubled" {
			for k, v := range m {
				if _, taken := env[k]; !taken {
					env[k] = v
				}
			}
		}
	case "auth":
		env["auth"] = content
	case "wrap":
		env["wrap_info"], env["request_id"] = content, ""
	case "bare":
		return content, nil
	case "error":
		return map[string]any{"errors": []any{unescaped.Replace(r.fill(c.content))}}, nil
	case "nothing":
		return map[string]any{"errors": []any{}}, nil
	default:
		return nil, fmt.Errorf("line %d: no form %q", c.line, c.form)
	}
	return env, nil
}

// differ compares an answer with a pattern.
type differ struct {
	vars  map[string]string
	wrong []string
}

func (d *differ) fail(at, format string, args ...any) {
	d.wrong = append(d.wrong, strings.TrimPrefix(at, ".")+": "+fmt.Sprintf(format, args...))
}

func (d *differ) compare(at string, want, got any) {
	switch w := want.(type) {
	case map[string]any:
		g, ok := got.(map[string]any)
		if !ok {
			d.fail(at, "want an object, got %s", asJSON(got))
			return
		}
		for _, k := range slices.Sorted(maps.Keys(w)) {
			v, there := g[k]
			switch {
			case k == "..." || w[k] == "<optional>":
			case !there:
				d.fail(at+"."+k, "is missing")
			default:
				d.compare(at+"."+k, w[k], v)
			}
		}
		if _, open := w["..."]; !open {
			for k := range g {
				if _, known := w[k]; !known {
					d.fail(at+"."+k, "is not of the contract: %s", asJSON(g[k]))
				}
			}
		}
	case []any:
		g, ok := got.([]any)
		if !ok || len(g) != len(w) {
			d.fail(at, "want %d elements, got %s", len(w), asJSON(got))
			return
		}
		for i := range w {
			d.compare(fmt.Sprintf("%s[%d]", at, i), w[i], g[i])
		}
	case string:
		d.text(at, w, got)
	default:
		if asJSON(want) != asJSON(got) {
			d.fail(at, "want %s, got %s", asJSON(want), asJSON(got))
		}
	}
}

var placeholder = regexp.MustCompile(`^<([a-z]+)(?:=([a-z]+))?>$`)

var kinds = map[string]func(any) bool{
	"uuid":   matches(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`),
	"time":   func(v any) bool { s, _ := v.(string); _, err := time.Parse(time.RFC3339Nano, s); return err == nil },
	"hex":    matches(`^[0-9a-f]+$`),
	"token":  matches(`^rcs\.[A-Z2-7]{26}$`),
	"string": func(v any) bool { _, ok := v.(string); return ok },
	"int":    func(v any) bool { f, ok := v.(float64); return ok && f == float64(int64(f)) },
	"bool":   func(v any) bool { _, ok := v.(bool); return ok },
	"any":    func(any) bool { return true },
}

func matches(pattern string) func(any) bool {
	re := regexp.MustCompile(pattern)
	return func(v any) bool { s, ok := v.(string); return ok && re.MatchString(s) }
}

func (d *differ) text(at, want string, got any) {
	m := placeholder.FindStringSubmatch(want)
	if m == nil {
		if pre, post, ok := strings.Cut(want, "<...>"); ok { // a text with something in it that differs
			if s, isText := got.(string); isText && strings.HasPrefix(s, pre) && strings.HasSuffix(s, post) {
				return
			}
		}
		if got != want {
			d.fail(at, "want %q, got %s", want, asJSON(got))
		}
		return
	}
	is, ok := kinds[m[1]]
	if !ok {
		d.fail(at, "there is no kind %q", m[1])
		return
	}
	if !is(got) {
		d.fail(at, "want %s, got %s", m[1], asJSON(got))
		return
	}
	if m[2] != "" {
		if s, isText := got.(string); isText {
			d.vars[m[2]] = s
		} else {
			d.vars[m[2]] = asJSON(got)
		}
	}
}

// unescaped reads a text as a line of a file writes it.
var unescaped = strings.NewReplacer(`\n`, "\n", `\t`, "\t")
