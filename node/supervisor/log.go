package supervisor

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	maxLine   = 4 << 10 // bytes of a line that are kept; the rest is counted
	tailLines = 20      // lines of stderr that explain an end
	tailWidth = 300     // bytes of each
)

// output turns what a plugin writes into log records: bounded in line length and in bytes a second, and escaped,
// because it is whatever the plugin likes. Write never blocks and never fails. Safe for concurrent use.
type output struct {
	log    *slog.Logger
	stream string
	rate   int
	drops  func(bytes int)

	mu      sync.Mutex
	line    []byte
	cut     int // bytes of the current line beyond maxLine
	tail    []string
	panics  bool
	budget  int
	since   time.Time
	dropped int
}

func newOutput(log *slog.Logger, stream string, rate int, drops func(int)) *output {
	return &output{log: log, stream: stream, rate: rate, drops: drops, budget: rate, since: time.Now()}
}

// Write takes any piece of the stream.
func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for rest := p; len(rest) > 0; {
		line, after, whole := bytes.Cut(rest, []byte("\n"))
		room := max(0, maxLine-len(o.line))
		o.line = append(o.line, line[:min(len(line), room)]...)
		o.cut += max(0, len(line)-room)
		if whole {
			o.flush()
		}
		rest = after
	}
	return len(p), nil
}

// end logs a last line without a newline.
func (o *output) end() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.flush()
	o.report()
}

// last returns the last lines, for explaining an end.
func (o *output) last() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Clone(o.tail)
}

func (o *output) flush() {
	line, cut := o.line, o.cut
	o.line, o.cut = o.line[:0], 0
	if len(bytes.TrimSpace(line)) == 0 && cut == 0 {
		return
	}
	now := time.Now()
	if now.Sub(o.since) >= time.Second {
		o.report()
		o.since, o.budget = now, o.rate
	}
	size := len(line) + cut
	o.budget -= size
	if o.budget < 0 {
		o.dropped += size
		o.drops(size)
		return
	}
	if cut > 0 {
		line = fmt.Appendf(bytes.Clone(line), " (%d more bytes)", cut)
	}
	o.emit(line)
}

func (o *output) report() {
	if o.dropped > 0 {
		o.log.Warn("plugin writes more than is logged; the rest was dropped", "stream", o.stream, "bytes", o.dropped)
		o.dropped = 0
	}
}

func (o *output) emit(line []byte) {
	if rec, ok := parseHCLog(line); ok {
		o.remember(rec.message)
		if o.log.Enabled(context.Background(), rec.level) {
			o.log.LogAttrs(context.Background(), rec.level, rec.message, rec.attrs...)
		}
		return
	}
	text := printable(string(line))
	if !o.panics && isPanic(text) {
		o.panics, o.tail = true, nil // these are the last words
	}
	o.remember(text)
	level := slog.LevelDebug
	if o.panics {
		level = slog.LevelError
	}
	o.log.LogAttrs(context.Background(), level, text, slog.String("stream", o.stream))
}

// isPanic reports whether a line begins the last words of a Go program.
func isPanic(line string) bool {
	for _, p := range []string{"panic: ", "fatal error: ", "SIGSEGV: ", "SIGBUS: ", "SIGABRT: ", "SIGILL: ", "SIGFPE: ", "SIGQUIT: "} {
		if strings.HasPrefix(line, p) {
			return true
		}
	}
	return false
}

func (o *output) remember(text string) {
	if len(text) > tailWidth {
		text = text[:tailWidth] + "..."
	}
	if len(o.tail) == tailLines {
		// The first lines of a panic say more than the depth of its stack.
		if o.panics {
			return
		}
		o.tail = o.tail[1:]
	}
	o.tail = append(o.tail, text)
}

type hclogRecord struct {
	level   slog.Level
	message string
	attrs   []slog.Attr
}

var hclogLevels = map[string]slog.Level{
	"trace": slog.LevelDebug, "debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError,
}

// parseHCLog reads a record that plugins write with hclog in JSON, as go-plugin's do.
func parseHCLog(line []byte) (hclogRecord, bool) {
	var rec hclogRecord
	if len(line) == 0 || line[0] != '{' {
		return rec, false
	}
	fields := map[string]any{}
	if json.Unmarshal(line, &fields) != nil {
		return rec, false
	}
	message, ok := fields["@message"].(string)
	if !ok {
		return rec, false
	}
	level, _ := fields["@level"].(string)
	rec.message = printable(message)
	rec.level = hclogLevels[level]
	if module, ok := fields["@module"].(string); ok {
		rec.attrs = append(rec.attrs, slog.String("module", printable(module)))
	}
	for _, k := range slices.Sorted(maps.Keys(fields)) {
		if strings.HasPrefix(k, "@") {
			continue
		}
		if len(rec.attrs) == 16 {
			break
		}
		rec.attrs = append(rec.attrs, slog.String("plugin."+printable(k), printable(fmt.Sprint(fields[k]))))
	}
	return rec, true
}

// printable replaces what could forge a line or move a terminal's cursor.
func printable(s string) string {
	clean := true
	for i := range len(s) {
		if s[i] < ' ' || s[i] >= 0x7f {
			clean = false
			break
		}
	}
	if clean {
		return s
	}
	var b strings.Builder
	for _, r := range strings.ToValidUTF8(s, "\uFFFD") {
		switch {
		case r == '\t':
			b.WriteByte(' ')
		case r == '\n':
			b.WriteString("\\n")
		case r < ' ' || (r >= 0x7f && r < 0xa0) || r == '\u2028' || r == '\u2029' || (r >= '\u202a' && r <= '\u202e'):
			fmt.Fprintf(&b, "\\u%04x", r)
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}
