package telemetry

import (
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"
	"runtime"
	"slices"
	"time"

	"github.com/hashicorp/go-hclog"
)

// loggerKey is the attribute that carries hclog's dotted name ("raft.net", "plugin.kv").
const loggerKey = "logger"

// hcLogger is an hclog.Logger that writes to a slog.Handler. It is immutable, hence safe for concurrent use.
type hcLogger struct {
	handler slog.Handler
	name    string
	implied []any
}

var _ hclog.Logger = (*hcLogger)(nil)

// HCLog lets a library that logs through hclog (raft, raft-autopilot, go-plugin) write to l. Its level is that of l's
// handler: SetLevel does nothing, because a library must not decide how talkative the process is.
func HCLog(l *slog.Logger) hclog.Logger {
	return &hcLogger{handler: l.Handler()}
}

func slogLevel(level hclog.Level) (slog.Level, bool) {
	switch level {
	case hclog.Trace:
		return LevelTrace, true
	case hclog.Debug:
		return slog.LevelDebug, true
	case hclog.Info, hclog.NoLevel:
		return slog.LevelInfo, true
	case hclog.Warn:
		return slog.LevelWarn, true
	case hclog.Error:
		return slog.LevelError, true
	case hclog.Off:
		return 0, false
	}
	return slog.LevelInfo, true
}

func (l *hcLogger) enabled(level slog.Level) bool {
	return l.handler.Enabled(context.Background(), level)
}

func (l *hcLogger) emit(level hclog.Level, msg string, args []any) {
	sl, ok := slogLevel(level)
	if !ok || !l.enabled(sl) {
		return
	}
	var pcs [1]uintptr
	runtime.Callers(3, pcs[:])
	record := slog.NewRecord(time.Now(), sl, msg, pcs[0])
	if l.name != "" {
		record.AddAttrs(slog.String(loggerKey, l.name))
	}
	record.Add(plain(l.implied)...)
	record.Add(plain(args)...)
	// A log line that cannot be written has nowhere else to go.
	_ = l.handler.Handle(context.Background(), record)
}

// plain turns hclog's own value types into what a slog handler prints as hclog would. The input is not changed: it
// belongs to the caller.
func plain(args []any) []any {
	for i := 1; i < len(args); i += 2 {
		switch args[i].(type) {
		case hclog.Format, hclog.CapturedStacktrace, hclog.Hex, hclog.Octal, hclog.Binary, hclog.Quote:
			args = slices.Clone(args)
			for j := i; j < len(args); j += 2 {
				args[j] = plainValue(args[j])
			}
			return args
		}
	}
	return args
}

func plainValue(v any) any {
	switch v := v.(type) {
	case hclog.Format:
		if len(v) == 0 {
			return ""
		}
		format, ok := v[0].(string)
		if !ok {
			return fmt.Sprint(v...)
		}
		return fmt.Sprintf(format, v[1:]...)
	case hclog.CapturedStacktrace:
		return string(v)
	case hclog.Hex:
		return fmt.Sprintf("%#x", int(v))
	case hclog.Octal:
		return fmt.Sprintf("%#o", int(v))
	case hclog.Binary:
		return fmt.Sprintf("%#b", int(v))
	case hclog.Quote:
		return string(v) // the handler quotes what needs it
	}
	return v
}

func (l *hcLogger) Log(level hclog.Level, msg string, args ...any) { l.emit(level, msg, args) }
func (l *hcLogger) Trace(msg string, args ...any)                  { l.emit(hclog.Trace, msg, args) }

func (l *hcLogger) Debug(msg string, args ...any) { l.emit(hclog.Debug, msg, args) }
func (l *hcLogger) Info(msg string, args ...any)  { l.emit(hclog.Info, msg, args) }
func (l *hcLogger) Warn(msg string, args ...any)  { l.emit(hclog.Warn, msg, args) }
func (l *hcLogger) Error(msg string, args ...any) { l.emit(hclog.Error, msg, args) }

func (l *hcLogger) IsTrace() bool { return l.enabled(LevelTrace) }
func (l *hcLogger) IsDebug() bool { return l.enabled(slog.LevelDebug) }
func (l *hcLogger) IsInfo() bool  { return l.enabled(slog.LevelInfo) }
func (l *hcLogger) IsWarn() bool  { return l.enabled(slog.LevelWarn) }
func (l *hcLogger) IsError() bool { return l.enabled(slog.LevelError) }

func (l *hcLogger) ImpliedArgs() []any { return slices.Clone(l.implied) }
func (l *hcLogger) Name() string       { return l.name }

func (l *hcLogger) With(args ...any) hclog.Logger {
	c := *l
	c.implied = slices.Concat(l.implied, args)
	return &c
}

func (l *hcLogger) Named(name string) hclog.Logger {
	if l.name != "" {
		name = l.name + "." + name
	}
	return l.ResetNamed(name)
}

func (l *hcLogger) ResetNamed(name string) hclog.Logger {
	c := *l
	c.name = name
	return &c
}

// SetLevel does nothing: see HCLog.
func (l *hcLogger) SetLevel(hclog.Level) {}

func (l *hcLogger) GetLevel() hclog.Level {
	switch {
	case l.IsTrace():
		return hclog.Trace
	case l.IsDebug():
		return hclog.Debug
	case l.IsInfo():
		return hclog.Info
	case l.IsWarn():
		return hclog.Warn
	case l.IsError():
		return hclog.Error
	}
	return hclog.Off
}

func (l *hcLogger) StandardLogger(opts *hclog.StandardLoggerOptions) *log.Logger {
	return log.New(l.StandardWriter(opts), "", 0)
}

func (l *hcLogger) StandardWriter(opts *hclog.StandardLoggerOptions) io.Writer {
	w := &lineWriter{handler: l.handler, level: slog.LevelInfo, infer: true}
	if l.name != "" {
		w.handler = w.handler.WithAttrs([]slog.Attr{slog.String(loggerKey, l.name)})
	}
	if opts == nil {
		return w
	}
	w.infer = opts.InferLevels
	if opts.ForceLevel != hclog.NoLevel {
		if level, ok := slogLevel(opts.ForceLevel); ok {
			w.level, w.infer, w.strip = level, false, true
		}
	}
	return w
}
