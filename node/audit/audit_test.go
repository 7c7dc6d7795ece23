package audit

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"pgregory.net/rapid"

	"rollcall/node/api"
)

func open(t testing.TB, change func(*Config)) *Device {
	t.Helper()
	cfg := Config{
		File: filepath.Join(t.TempDir(), "audit.log"), Salt: func() string { return "the salt of this cluster" },
		Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	}
	if change != nil {
		change(&cfg)
	}
	d, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

func lines(t testing.TB, path string) []api.AuditEntry {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var out []api.AuditEntry
	for line := range strings.Lines(string(raw)) {
		var e api.AuditEntry
		if err := json.Unmarshal([]byte(line), &e); err != nil || !strings.HasSuffix(line, "\n") {
			t.Fatalf("no record: %v: %q", err, line)
		}
		out = append(out, e)
	}
	return out
}

// full is an entry with a canary wherever a secret may stand.
func full(canary func(where string) string) *api.AuditEntry {
	quote := func(where string) string { raw, _ := json.Marshal(canary(where)); return string(raw) }
	return &api.AuditEntry{
		Time: "2026-01-02T03:04:05Z", Type: api.AuditTypeResponse, Error: `no such user "` + canary("request.data.top") + `"`,
		Auth: &api.AuditAuth{ClientToken: canary("auth.token"), Accessor: canary("auth.accessor"), Policies: []string{"p"}},
		Request: api.AuditRequest{
			ID: "r1", Operation: "update", Path: "kv/x", ClientToken: canary("token"), ClientTokenAccessor: canary("accessor"),
			Data: json.RawMessage(`{"top":` + quote("request.data.top") + `,"list":[` + quote("list") + `,{"deep":[[` + quote("deep") +
				`]]}],"bytes":"` + base64.StdEncoding.EncodeToString([]byte(canary("bytes"))) + `","n":17,"yes":true,"none":null,"shown":"in clear"}`),
			AuditMount: api.AuditMount{RequestClear: []string{"shown"}, ResponseClear: []string{"also"}},
		},
		Response: &api.AuditResponse{
			Auth:     &api.AuditAuth{ClientToken: canary("response.token"), Accessor: canary("response.accessor")},
			Data:     json.RawMessage(`{"http_raw_body":` + quote("raw") + `,"keys":[` + quote("key") + `],"also":"in clear too","in":{"also":` + quote("below") + `}}`),
			Warnings: []string{"you sent " + canary("request.data.top")}, AuditMount: api.AuditMount{ResponseClear: []string{"also"}},
			WrapInfo: &api.WrapInfo{Token: canary("wrap.token"), Accessor: canary("wrap.accessor"), WrappedAccessor: canary("wrapped"), CreationPath: "kv/x"},
		},
	}
}

// hidden fails when a canary stands in a text: as it is, in base64, in hex, or escaped.
func hidden(t testing.TB, text string, canaries map[string]string) {
	t.Helper()
	for where, c := range canaries {
		escaped, _ := json.Marshal(c)
		for _, form := range []string{
			c, string(escaped[1 : len(escaped)-1]), base64.StdEncoding.EncodeToString([]byte(c)), base64.RawURLEncoding.EncodeToString([]byte(c)),
			hex.EncodeToString([]byte(c)),
		} {
			if strings.Contains(text, form) {
				t.Errorf("the secret of %s stands in the file as %q", where, form)
			}
		}
	}
}

func TestNoSecretStandsInTheFile(t *testing.T) {
	d := open(t, nil)
	canaries := map[string]string{}
	e := full(func(where string) string {
		canaries[where] = `canary "of" ` + where + "\n<ä>"
		return canaries[where]
	})
	before, _ := json.Marshal(e)
	if err := d.Record(e); err != nil {
		t.Fatal(err)
	}
	if after, _ := json.Marshal(e); !bytes.Equal(before, after) {
		t.Error("the entry was changed")
	}
	raw, err := os.ReadFile(d.cfg.File)
	if err != nil {
		t.Fatal(err)
	}
	hidden(t, string(raw), canaries)
	got := lines(t, d.cfg.File)[0]
	var data map[string]any
	if err := json.Unmarshal(got.Request.Data, &data); err != nil {
		t.Fatal(err)
	}
	want, err := d.Hash(canaries["request.data.top"])
	if err != nil || data["top"] != want || !strings.HasPrefix(want, "hmac-sha256:") || len(want) != len("hmac-sha256:")+64 {
		t.Errorf("%v is not the hash %v (%v)", data["top"], want, err)
	}
	if data["n"] != 17.0 || data["yes"] != true || data["none"] != nil || data["shown"] != "in clear" {
		t.Errorf("what is no text, or shown by wish: %v", data)
	}
	if got.Error != `no such user "`+want+`"` || got.Response.Warnings[0] != "you sent "+want {
		t.Errorf("%q, %q", got.Error, got.Response.Warnings)
	}
	if !strings.Contains(string(got.Response.Data), `"also":"in clear too"`) || strings.Count(string(raw), "in clear too") != 1 {
		t.Errorf("response: %s", got.Response.Data)
	}
	if info, err := os.Stat(d.cfg.File); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", info.Mode(), err)
	}
}

func TestAccessorsAreShownByWishAlone(t *testing.T) {
	d := open(t, func(c *Config) { c.ClearAccessors = true })
	if err := d.Record(full(func(where string) string { return "canary of " + where })); err != nil {
		t.Fatal(err)
	}
	raw, _ := os.ReadFile(d.cfg.File)
	for _, where := range []string{"accessor", "auth.accessor", "response.accessor", "wrap.accessor", "wrapped"} {
		if !strings.Contains(string(raw), "canary of "+where) {
			t.Errorf("%s is hashed", where)
		}
	}
	if strings.Contains(string(raw), "canary of token") {
		t.Error("a token is shown")
	}
}

func TestWithoutASaltNothingIsShown(t *testing.T) {
	salt := ""
	d := open(t, func(c *Config) { c.Salt = func() string { return salt } })
	canaries := map[string]string{}
	e := full(func(where string) string { canaries[where] = "canary of " + where; return canaries[where] })
	if err := d.Record(e); err != nil {
		t.Fatal(err)
	}
	raw, _ := os.ReadFile(d.cfg.File)
	hidden(t, string(raw), canaries)
	if h, err := d.Hash("x"); err == nil {
		t.Errorf("hashed to %s", h)
	}
	salt = "there it is"
	first, err := d.Hash("x")
	if err != nil {
		t.Fatal(err)
	}
	salt = "another cluster's"
	if second, err := d.Hash("x"); err != nil || second == first {
		t.Errorf("%v: the salt does not matter", err)
	}
}

func TestALargeBodyIsToldByItsLengthAndHash(t *testing.T) {
	d := open(t, nil)
	many := `["` + strings.Repeat(`a","`, maxValues) + `"]`
	for name, data := range map[string]string{
		"long":         `{"a":"` + strings.Repeat("canary", maxData/6) + `"}`,
		"many values":  `{"a":` + many + `}`,
		"no JSON":      `{"canary`,
		"many numbers": `[` + strings.Repeat("17,", maxData/3) + `1]`,
	} {
		t.Run(name, func(t *testing.T) {
			e := &api.AuditEntry{Type: api.AuditTypeRequest, Error: "canary is wrong", Request: api.AuditRequest{ID: name, Data: json.RawMessage(data)}}
			line, err := d.encode(d.current(), e)
			if err != nil {
				t.Fatal(err)
			}
			var got api.AuditEntry
			if err := json.Unmarshal(line, &got); err != nil {
				t.Fatal(err)
			}
			whole, _ := d.Hash(data)
			if got.Request.Data != nil || got.Request.DataOmitted == nil || got.Request.DataOmitted.Bytes != len(data) || got.Request.DataOmitted.HMAC != whole {
				t.Errorf("%+v", got.Request)
			}
			if len(line) > 4096 || strings.Contains(string(line), "canary") {
				t.Errorf("%d bytes: %.200s", len(line), line)
			}
		})
	}
}

func TestNoEntryMakesALongLine(t *testing.T) {
	d := open(t, nil)
	at := `{"a":["` + strings.Repeat(`a","`, maxValues-2) + `"]}`
	e := &api.AuditEntry{Type: api.AuditTypeResponse, Request: api.AuditRequest{
		Data: json.RawMessage(at), Headers: map[string][]string{"x": {strings.Repeat("h", 2<<20)}},
	}, Response: &api.AuditResponse{Data: json.RawMessage(at), Warnings: make([]string, 1000)}}
	line, err := d.encode(d.current(), e)
	if err != nil || len(line) > maxLine {
		t.Errorf("%d bytes (%v)", len(line), err)
	}
	e.Request.Headers = nil
	if line, err = d.encode(d.current(), e); err != nil || len(line) > maxLine || !bytes.Contains(line, []byte(`"data":{"a":["hmac`)) {
		t.Errorf("%d bytes (%v)", len(line), err)
	}
}

// TestNoTextOfADataIsEverShown draws data of any shape.
func TestNoTextOfADataIsEverShown(t *testing.T) {
	h := newHasher("salt")
	var value *rapid.Generator[any]
	n := 0
	text := rapid.Custom(func(t *rapid.T) string {
		n++
		return fmt.Sprintf("canary-%d-%s", n, rapid.String().Draw(t, "text"))
	})
	value = rapid.OneOf(
		rapid.Map(text, func(s string) any { return s }), rapid.Just[any](true), rapid.Just[any](nil), rapid.Just[any](3.5),
		rapid.Map(rapid.SliceOfN(rapid.Deferred(func() *rapid.Generator[any] { return value }), 0, 3), func(s []any) any { return s }),
		rapid.Map(rapid.MapOfN(rapid.SampledFrom([]string{"a", "b", "c"}), rapid.Deferred(func() *rapid.Generator[any] { return value }), 0, 3),
			func(m map[string]any) any { return m }),
	)
	rapid.Check(t, func(t *rapid.T) {
		raw, err := json.Marshal(map[string]any{"data": value.Draw(t, "value")})
		if err != nil {
			t.Fatal(err)
		}
		w := &walk{hasher: h}
		out, omitted := w.data(raw)
		if omitted != nil || !json.Valid(out) || bytes.Contains(out, []byte("canary")) || bytes.ContainsAny(out, "\n") {
			t.Fatalf("%s became %s (%v)", raw, out, omitted)
		}
	})
}

// broken takes what fits, and then nothing.
type broken struct {
	bytes.Buffer
	room int
}

func (b *broken) Write(p []byte) (int, error) {
	n := min(len(p), b.room-b.Len())
	_, _ = b.Buffer.Write(p[:n])
	if n < len(p) {
		return n, syscall.ENOSPC
	}
	return n, nil
}

func (b *broken) Close() error { return nil }

func TestADiskThatWasFullLeavesOneBrokenLineAndNoMore(t *testing.T) {
	d := open(t, nil)
	disk := &broken{room: 1000}
	d.out = disk
	e := &api.AuditEntry{Type: api.AuditTypeRequest, Request: api.AuditRequest{ID: "r", Path: strings.Repeat("p", 300)}}
	written := 0
	var err error
	for err == nil {
		if err = d.Record(e); err == nil {
			written++
		}
	}
	if !errors.Is(err, syscall.ENOSPC) || written == 0 {
		t.Fatalf("%d written, then %v", written, err)
	}
	for range 3 {
		if err := d.Record(e); !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("a full disk takes a record: %v", err)
		}
	}
	disk.room = 1 << 20
	for range 2 {
		if err := d.Record(e); err != nil {
			t.Fatal(err)
		}
		written++
	}
	whole, broken := 0, 0
	for line := range strings.Lines(disk.String()) {
		if json.Valid([]byte(line)) {
			whole++
		} else {
			broken++
		}
	}
	if whole != written || broken != 1 {
		t.Errorf("%d whole lines of %d, and %d broken ones", whole, written, broken)
	}
}

func TestAFullDeviceRefuses(t *testing.T) {
	d := open(t, nil)
	dev, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	old := d.out
	d.out = dev
	if err := d.Record(&api.AuditEntry{Type: api.AuditTypeRequest}); !errors.Is(err, syscall.ENOSPC) {
		t.Error(err)
	}
	_ = dev.Close()
	d.out = old
	if err := d.Record(&api.AuditEntry{Type: api.AuditTypeRequest}); err != nil {
		t.Error(err)
	}
}

func TestAFileIsOpenedOnlyWhereItIsOurOwn(t *testing.T) {
	dir := t.TempDir()
	plugins, data, logs := filepath.Join(dir, "plugins"), filepath.Join(dir, "data"), filepath.Join(dir, "logs")
	for _, d := range []string{plugins, data, logs, filepath.Join(data, "raft")} {
		must(t, os.Mkdir(d, 0o755))
	}
	write := func(path, text string) string { must(t, os.WriteFile(path, []byte(text), 0o644)); return path }
	at := func(name string) string { return filepath.Join(logs, name) }
	must(t, os.Symlink(plugins, filepath.Join(dir, "innocent")))
	must(t, os.Symlink(filepath.Join(data, "raft"), at("deep")))
	must(t, os.Symlink(filepath.Join(plugins, "kv"), at("link")))
	must(t, os.Symlink(at("elsewhere"), at("dangling")))
	must(t, os.Link(write(filepath.Join(plugins, "kv"), "{"), at("second-name")))
	must(t, syscall.Mkfifo(at("pipe"), 0o600))
	must(t, os.Mkdir(at("directory"), 0o755))
	open := filepath.Join(dir, "open")
	must(t, os.Mkdir(open, 0o755))
	must(t, os.Chmod(open, 0o777))
	write(at("key.pem"), "-----BEGIN PRIVATE KEY-----\n")
	for name, c := range map[string]struct{ path, want string }{
		"relative":                      {"audit.log", "absolute"},
		"no directory":                  {at("none/audit.log"), "no such file"},
		"plugin directory":              {filepath.Join(plugins, "audit.log"), "programs are started from"},
		"plugin directory with detours": {logs + "/../plugins/audit.log", "programs are started from"},
		"link to the plugin directory":  {filepath.Join(dir, "innocent", "audit.log"), "programs are started from"},
		"data directory":                {filepath.Join(data, "audit.log"), "keeps its state in"},
		"below the data directory":      {filepath.Join(data, "raft", "audit.log"), "keeps its state in"},
		"link below the data directory": {at("deep/audit.log"), "keeps its state in"},
		"a plugin by a link":            {at("link"), "symbolic link"},
		"a link to nothing":             {at("dangling"), "symbolic link"},
		"a plugin by a second name":     {at("second-name"), "hard link"},
		"a pipe":                        {at("pipe"), "pipe"},
		"a device":                      {"/dev/full", "device"},
		"a directory":                   {at("directory"), "directory"},
		"a directory open to everyone":  {filepath.Join(open, "audit.log"), "everyone may write"},
		"a file that is something else": {at("key.pem"), "something else"},
	} {
		t.Run(name, func(t *testing.T) {
			f, _, err := openFile(c.path, []string{plugins, data, filepath.Join(dir, "not-there")})
			if err == nil {
				_ = f.Close()
				t.Fatal("opened")
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
	if _, err := os.Stat(at("elsewhere")); err == nil {
		t.Error("a link was followed")
	}
	f, torn, err := openFile(write(at("audit.log"), `{"half":`), []string{plugins, data})
	if err != nil || !torn {
		t.Fatalf("an audit file of before: torn %v, %v", torn, err)
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("it stays readable: %v %v", info.Mode(), err)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestReopeningLosesNoRecordAndMixesNone(t *testing.T) {
	d := open(t, nil)
	const writers, each = 8, 200
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			for j := range each {
				if err := d.Record(&api.AuditEntry{Type: api.AuditTypeRequest, Request: api.AuditRequest{
					ID: fmt.Sprintf("%d-%d", i, j), Data: json.RawMessage(`{"a":"b"}`),
				}}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	var rotated []string
	for i := range 20 {
		old := fmt.Sprintf("%s.%d", d.cfg.File, i)
		must(t, os.Rename(d.cfg.File, old))
		rotated = append(rotated, old)
		must(t, d.Reopen())
	}
	wg.Wait()
	seen := map[string]int{}
	for _, path := range append(rotated, d.cfg.File) {
		for _, e := range lines(t, path) {
			seen[e.Request.ID]++
		}
	}
	if len(seen) != writers*each {
		t.Errorf("%d records of %d", len(seen), writers*each)
	}
	for id, n := range seen {
		if n != 1 {
			t.Errorf("%s stands there %d times", id, n)
		}
	}
	if err := d.Record(&api.AuditEntry{Type: api.AuditTypeRequest, Request: api.AuditRequest{ID: "last"}}); err != nil {
		t.Error(err)
	}
	if got := lines(t, d.cfg.File); len(got) == 0 || got[len(got)-1].Request.ID != "last" {
		t.Error("the newest file does not have the newest record")
	}
}

func TestAReopenThatFailsGoesOnWithTheOldFile(t *testing.T) {
	d := open(t, nil)
	old := d.cfg.File + ".old"
	must(t, os.Rename(d.cfg.File, old))
	must(t, os.Symlink("/etc/passwd", d.cfg.File))
	if err := d.Reopen(); err == nil {
		t.Fatal("opened what somebody had put there")
	}
	must(t, d.Record(&api.AuditEntry{Type: api.AuditTypeRequest, Request: api.AuditRequest{ID: "kept"}}))
	if got := lines(t, old); len(got) != 1 || got[0].Request.ID != "kept" {
		t.Errorf("%+v", got)
	}
	must(t, d.Close())
	if err := d.Record(&api.AuditEntry{}); err == nil {
		t.Error("a closed device takes records")
	}
}

// BenchmarkRecord writes the two records of a plain request: a token, a body and an answer of one value each. Its own metric is
// the processor time of this process, which other work on the machine does not change.
func BenchmarkRecord(b *testing.B) {
	d := open(b, nil)
	auth := &api.AuditAuth{ClientToken: "a token", Accessor: "an accessor", DisplayName: "token", Policies: []string{"default", "kv"}}
	asked := &api.AuditEntry{
		Time: "2026-01-02T03:04:05.123456Z", Type: api.AuditTypeRequest, Auth: auth, Node: "node-1", Request: api.AuditRequest{
			ID: "0199-0000", Operation: "update", Path: "kv/data/a", ClientToken: "a token", ClientTokenAccessor: "an accessor",
			Data: json.RawMessage(`{"a":"b"}`), RemoteAddress: "127.0.0.1", RemotePort: 1, Namespace: &api.AuditNamespace{ID: "root"},
		},
	}
	answered := *asked
	answered.Type, answered.Response = api.AuditTypeResponse, &api.AuditResponse{Status: 200, Data: json.RawMessage(`{"a":"b"}`)}
	b.ReportAllocs()
	before := cpu()
	for b.Loop() {
		if err := errors.Join(d.Record(asked), d.Record(&answered)); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(cpu()-before)/float64(b.N)/1e3, "cpu-us/op")
}

// cpu is the processor time of this process so far, in nanoseconds.
func cpu() int64 {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return u.Utime.Nano() + u.Stime.Nano()
}
