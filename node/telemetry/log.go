// Package telemetry is how a node speaks about itself: the structured logger, the metrics registry, and the bridges
// that carry what libraries say (hclog, the standard log package, go-metrics) into the two.
//
// Nothing here is global. cmd makes one logger and one registry and hands them down; every room gets a logger that
// already carries its component, and a prometheus.Registerer.
package telemetry

import (
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
)

// LevelTrace is below slog.LevelDebug: what hclog calls trace. Raft and go-plugin say a line per message there.
const LevelTrace = slog.Level(-8)

// Levels are the names that ParseLevel takes, from the most to the least talkative.
var Levels = []string{"trace", "debug", "info", "warn", "error"}

// Formats are the names that NewLogger takes.
var Formats = []string{"text", "json"}

// redactedKeys are attribute keys whose values never reach a log, whatever the caller passes. The rule of the project
// is not to pass them; this is the net below it.
var redactedKeys = []string{
	"token", "client_token", "authorization", "password", "secret", "secret_id", "private_key", "gossip_key",
}

// Redacted stands where a secret attribute's value would have been.
const Redacted = "[redacted]"

// ParseLevel turns a name of Levels into a level. Case does not matter; "" is info.
func ParseLevel(name string) (slog.Level, error) {
	switch strings.ToLower(name) {
	case "trace":
		return LevelTrace, nil
	case "debug":
		return slog.LevelDebug, nil
	case "", "info":
		return slog.LevelInfo, nil
	case "warn", "warning":
		return slog.LevelWarn, nil
	case "error":
		return slog.LevelError, nil
	}
	return 0, fmt.Errorf("log level %q is not one of %s", name, strings.Join(Levels, ", "))
}

// NewLogger makes the logger of a process. Format is a name of Formats ("" is text). The level may be changed while
// the logger is in use when it is a *slog.LevelVar. Lines are written whole, one Write each, so w may be shared with
// another process's output (a container's stderr). Control characters in messages and values arrive escaped, so that
// text from outside cannot forge a line.
func NewLogger(w io.Writer, format string, level slog.Leveler) (*slog.Logger, error) {
	opts := &slog.HandlerOptions{Level: level, ReplaceAttr: replaceAttr}
	switch strings.ToLower(format) {
	case "", "text":
		return slog.New(slog.NewTextHandler(w, opts)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, opts)), nil
	}
	return nil, fmt.Errorf("log format %q is not one of %s", format, strings.Join(Formats, ", "))
}

// Component returns a logger for one room. The wiring calls it once per room, so that rooms need not know their name.
func Component(l *slog.Logger, name string) *slog.Logger {
	return l.With(slog.String("component", name))
}

// replaceAttr names the trace level, which slog would print as DEBUG-4, and hides secrets.
func replaceAttr(groups []string, a slog.Attr) slog.Attr {
	if len(groups) == 0 && a.Key == slog.LevelKey {
		if level, ok := a.Value.Any().(slog.Level); ok && level < slog.LevelDebug {
			a.Value = slog.StringValue("TRACE")
		}
		return a
	}
	if slices.Contains(redactedKeys, strings.ToLower(a.Key)) {
		a.Value = slog.StringValue(Redacted)
	}
	return a
}
