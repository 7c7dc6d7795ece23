package telemetry

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"github.com/hashicorp/go-hclog"
)

// records decodes what a JSON logger wrote.
func records(t *testing.T, buf *bytes.Buffer) []map[string]any {
	t.Helper()
	var out []map[string]any
	for line := range strings.Lines(buf.String()) {
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Fatalf("log line %q: %v", line, err)
		}
		out = append(out, m)
	}
	return out
}

func newLogger(t *testing.T, level slog.Leveler) (*slog.Logger, *bytes.Buffer) {
	t.Helper()
	buf := new(bytes.Buffer)
	l, err := NewLogger(buf, "json", level)
	if err != nil {
		t.Fatal(err)
	}
	return l, buf
}

func TestLevelAndFormatNamesAreChecked(t *testing.T) {
	for _, name := range append([]string{"", "WARNING"}, Levels...) {
		if _, err := ParseLevel(name); err != nil {
			t.Errorf("ParseLevel(%q): %v", name, err)
		}
	}
	if _, err := ParseLevel("loud"); err == nil || !strings.Contains(err.Error(), "trace, debug, info") {
		t.Errorf("ParseLevel(loud) = %v, want the list of levels", err)
	}
	if _, err := NewLogger(new(bytes.Buffer), "xml", slog.LevelInfo); err == nil {
		t.Error("NewLogger takes xml")
	}
}

func TestLevelCanBeChangedWhileInUse(t *testing.T) {
	level := new(slog.LevelVar)
	l, buf := newLogger(t, level)
	l.Debug("quiet")
	level.Set(slog.LevelDebug)
	l.Debug("heard")
	got := records(t, buf)
	if len(got) != 1 || got[0]["msg"] != "heard" {
		t.Fatalf("records = %v", got)
	}
}

func TestTextFromOutsideCannotForgeALine(t *testing.T) {
	for _, format := range Formats {
		buf := new(bytes.Buffer)
		l, err := NewLogger(buf, format, slog.LevelInfo)
		if err != nil {
			t.Fatal(err)
		}
		l.Info("plugin said", "line", "x\nlevel=ERROR msg=forged", "esc", "\x1b[2J")
		if n := strings.Count(buf.String(), "\n"); n != 1 {
			t.Errorf("%s: %d lines for one record: %q", format, n, buf)
		}
		if strings.Contains(buf.String(), "\x1b") {
			t.Errorf("%s: an escape sequence came through: %q", format, buf)
		}
	}
}

func TestSecretsAreRedactedByKey(t *testing.T) {
	l, buf := newLogger(t, slog.LevelInfo)
	l.With("token", "s.one").WithGroup("request").Info("login", "password", "two", "path", "auth/x")
	HCLog(l).Info("from a library", "secret_id", "three")
	for _, secret := range []string{"s.one", "two", "three"} {
		if strings.Contains(buf.String(), secret) {
			t.Errorf("log holds %q: %s", secret, buf)
		}
	}
	if !strings.Contains(buf.String(), "auth/x") {
		t.Errorf("too much was redacted: %s", buf)
	}
}

func TestHCLogKeepsLevelNameAndFields(t *testing.T) {
	l, buf := newLogger(t, LevelTrace)
	h := HCLog(Component(l, "raft")).Named("net").Named("tcp").With("peer", "node-2")
	h.Trace("t")
	h.Debug("d")
	h.Info("i")
	h.Warn("w", "error", errors.New("broken pipe"), "took", hclog.Fmt("%d ms", 3), "mode", hclog.Octal(0o600))
	h.Error("e")
	h.Log(hclog.Off, "never")
	got := records(t, buf)
	want := []string{"TRACE", "DEBUG", "INFO", "WARN", "ERROR"}
	if len(got) != len(want) {
		t.Fatalf("%d records, want %d: %v", len(got), len(want), got)
	}
	for i, m := range got {
		if m["level"] != want[i] || m["component"] != "raft" || m["logger"] != "net.tcp" || m["peer"] != "node-2" {
			t.Errorf("record %d = %v", i, m)
		}
	}
	if w := got[3]; w["error"] != "broken pipe" || w["took"] != "3 ms" || w["mode"] != "0600" {
		t.Errorf("fields = %v", w)
	}
}

func TestHCLogFollowsTheLevelOfTheProcess(t *testing.T) {
	level := new(slog.LevelVar)
	level.Set(slog.LevelWarn)
	l, buf := newLogger(t, level)
	h := HCLog(l)
	h.SetLevel(hclog.Trace) // a library that wants to be louder
	h.Info("quiet")
	if h.IsInfo() || !h.IsWarn() || h.GetLevel() != hclog.Warn {
		t.Errorf("level = %v, IsInfo %v", h.GetLevel(), h.IsInfo())
	}
	level.Set(LevelTrace)
	if h.GetLevel() != hclog.Trace || !h.IsTrace() {
		t.Errorf("level = %v after the process became louder", h.GetLevel())
	}
	if buf.Len() != 0 {
		t.Errorf("log = %s", buf)
	}
}

func TestHCLogNeverChangesItsParentOrItsArguments(t *testing.T) {
	l, buf := newLogger(t, slog.LevelInfo)
	parent := HCLog(l).With("a", 1)
	var wg sync.WaitGroup
	args := []any{"took", hclog.Fmt("%d", 1)}
	for range 8 {
		wg.Go(func() {
			parent.With("b", 2).Named("child").Info("x", args...)
		})
	}
	wg.Wait()
	if _, ok := args[1].(hclog.Format); !ok {
		t.Error("the caller's arguments were changed")
	}
	buf.Reset()
	parent.Info("alone")
	if m := records(t, buf)[0]; m["b"] != nil || m["logger"] != nil || m["a"] != 1.0 {
		t.Errorf("parent = %v", m)
	}
	if got := parent.ImpliedArgs(); len(got) != 2 || parent.Name() != "" {
		t.Errorf("implied args = %v, name %q", got, parent.Name())
	}
	if n := parent.ResetNamed("z").Named("y").Name(); n != "z.y" {
		t.Errorf("name = %q", n)
	}
}

func TestStandardLogLinesTakeTheirLevelFromThePrefix(t *testing.T) {
	l, buf := newLogger(t, slog.LevelDebug)
	std := StdLog(l, slog.LevelWarn)
	std.Print("[DEBUG] memberlist: Stream connection from=1.2.3.4:5")
	std.Print("[ERR] memberlist: push/pull failed")
	std.Print("http: TLS handshake error from 1.2.3.4:5: EOF")
	std.Print("\n")
	std.Print("[TRACE] below the level")
	got := records(t, buf)
	want := [][2]string{
		{"DEBUG", "memberlist: Stream connection from=1.2.3.4:5"},
		{"ERROR", "memberlist: push/pull failed"},
		{"WARN", "http: TLS handshake error from 1.2.3.4:5: EOF"},
	}
	if len(got) != len(want) {
		t.Fatalf("records = %v", got)
	}
	for i, m := range got {
		if m["level"] != want[i][0] || m["msg"] != want[i][1] {
			t.Errorf("record %d = %v, want %v", i, m, want[i])
		}
	}
}

func TestHCLogStandardLoggerOptionsAreKept(t *testing.T) {
	l, buf := newLogger(t, slog.LevelDebug)
	h := HCLog(l).Named("plugin")
	h.StandardLogger(&hclog.StandardLoggerOptions{InferLevels: true}).Print("[WARN] one")
	h.StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Error}).Print("[WARN] two")
	h.StandardLogger(&hclog.StandardLoggerOptions{}).Print("[WARN] three")
	h.StandardLogger(nil).Print("[WARN] four")
	got := records(t, buf)
	want := [][2]string{{"WARN", "one"}, {"ERROR", "two"}, {"INFO", "[WARN] three"}, {"WARN", "four"}}
	if len(got) != len(want) {
		t.Fatalf("records = %v", got)
	}
	for i, m := range got {
		if m["level"] != want[i][0] || m["msg"] != want[i][1] || m["logger"] != "plugin" {
			t.Errorf("record %d = %v, want %v", i, m, want[i])
		}
	}
}

func TestAnEndlessLineIsCutOnARune(t *testing.T) {
	l, buf := newLogger(t, slog.LevelInfo)
	line := []byte(strings.Repeat("é", maxLine))
	if n, err := Lines(l, slog.LevelInfo).Write(append([]byte("x"), line...)); err != nil || n != len(line)+1 {
		t.Fatalf("Write = %d, %v", n, err)
	}
	msg := records(t, buf)[0]["msg"].(string)
	if len(msg) > maxLine+len(" [cut]") || !strings.HasSuffix(msg, "é [cut]") {
		t.Errorf("line of %d bytes ends with %q", len(msg), msg[len(msg)-12:])
	}
}
