package telemetry

import (
	"context"
	"io"
	"log"
	"log/slog"
	"strings"
	"time"
	"unicode/utf8"
)

// maxLine bounds one bridged line, in bytes. The standard logger writes one line per Write; what is longer is a dump
// that would only push other lines out of the log.
const maxLine = 8 << 10

// lineWriter turns each Write into one record. It keeps no state between writes, hence is safe for concurrent use.
type lineWriter struct {
	handler slog.Handler
	level   slog.Level
	infer   bool // take the level from a "[WARN]" prefix
	strip   bool // remove such a prefix without believing it
}

// Lines returns a writer for libraries that want an io.Writer to log to (memberlist's LogOutput). A prefix such as
// "[WARN]" becomes the level; a line without one gets the level given.
func Lines(l *slog.Logger, level slog.Level) io.Writer {
	return &lineWriter{handler: l.Handler(), level: level, infer: true}
}

// StdLog returns a standard logger that writes to l, for libraries that take a *log.Logger (http.Server.ErrorLog,
// memberlist). See Lines for levels.
func StdLog(l *slog.Logger, level slog.Level) *log.Logger {
	return log.New(Lines(l, level), "", 0)
}

var prefixes = []struct {
	text  string
	level slog.Level
}{
	{"[TRACE]", LevelTrace},
	{"[DEBUG]", slog.LevelDebug},
	{"[INFO]", slog.LevelInfo},
	{"[WARN]", slog.LevelWarn},
	{"[WARNING]", slog.LevelWarn},
	{"[ERROR]", slog.LevelError},
	{"[ERR]", slog.LevelError},
}

// Write never fails: a library cannot do anything about a log that is broken.
func (w *lineWriter) Write(p []byte) (int, error) {
	line := strings.TrimRight(string(p[:min(len(p), maxLine)]), " \t\r\n")
	if len(p) > maxLine {
		for len(line) > 0 && !utf8.ValidString(line[max(0, len(line)-utf8.UTFMax):]) {
			line = line[:len(line)-1]
		}
		line += " [cut]"
	}
	level := w.level
	if w.infer || w.strip {
		for _, p := range prefixes {
			if rest, ok := strings.CutPrefix(line, p.text); ok {
				line = strings.TrimSpace(rest)
				if w.infer {
					level = p.level
				}
				break
			}
		}
	}
	if line != "" && w.handler.Enabled(context.Background(), level) {
		_ = w.handler.Handle(context.Background(), slog.NewRecord(time.Now(), level, line, 0))
	}
	return len(p), nil
}
