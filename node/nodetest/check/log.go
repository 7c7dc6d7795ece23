package check

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strconv"
	"time"
)

// said maps what a node says in its log to what it did: component and message are the stable keys. A run in which one of
// these lines was renamed has no such events, and Check calls that a violation ("recording").
var said = map[[2]string]func(a attributes) Event{
	{"replica", "leading"}: func(a attributes) Event { return Event{Kind: Leader, Term: a.number("term")} },
	{"replica", "fenced: plugin requests are refused until the leader is heard again"}: func(attributes) Event {
		return Event{Kind: Fence}
	},
	{"replica", "serving again"}: func(attributes) Event { return Event{Kind: Serve} },
	{"supervisor", "plugin started"}: func(a attributes) Event {
		return Event{Kind: Exec, PID: int(a.number("pid")), SHA256: a.text("sha256"), Key: a.text("plugin")}
	},
	{"supervisor", "plugin process ended"}: func(a attributes) Event {
		return Event{Kind: Exit, PID: int(a.number("pid")), Cause: a.text("how")}
	},
	{"supervisor", "plugin process ended by itself"}: func(a attributes) Event {
		return Event{Kind: Exit, PID: int(a.number("pid")), Cause: "crash: " + a.text("exit")}
	},
	{"reload", "switched"}: func(a attributes) Event {
		return Event{
			Kind: Swap, Reload: a.text("reload_id"), Mount: a.text("mount"), MountID: a.text("mount_uuid"), Generation: a.number("generation"),
			Old: a.number("old_generation"), Again: a.text("again") == "true", PID: int(a.number("pid")),
		}
	},
	{"reload", "plugin process relabelled"}: func(a attributes) Event {
		return Event{
			Kind: Relabel, Reload: a.text("reload_id"), Mount: a.text("mount"), MountID: a.text("mount_uuid"), Generation: a.number("generation"),
		}
	},
}

// attributes are those of one record, as texts.
type attributes map[string]string

func (a attributes) text(key string) string { return a[key] }

func (a attributes) number(key string) uint64 {
	n, _ := strconv.ParseUint(a[key], 10, 64)
	return n
}

// Handler turns what the node says into events, and hands everything on to next, which may be nil.
func (n *Node) Handler(next slog.Handler) slog.Handler {
	if next == nil {
		next = slog.DiscardHandler
	}
	return &handler{node: n, next: next}
}

// handler is a slog.Handler. Groups are not looked into: nodes use none.
type handler struct {
	node *Node
	next slog.Handler
	with []slog.Attr
}

func (h *handler) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= slog.LevelInfo || h.next.Enabled(ctx, level)
}

func (h *handler) Handle(ctx context.Context, r slog.Record) error {
	if r.Level >= slog.LevelInfo {
		h.look(r)
	}
	if !h.next.Enabled(ctx, r.Level) {
		return nil
	}
	return h.next.Handle(ctx, r)
}

func (h *handler) look(r slog.Record) {
	component := ""
	for _, a := range h.with {
		if a.Key == "component" {
			component = a.Value.String()
		}
	}
	event := said[[2]string{component, r.Message}]
	if event == nil {
		return
	}
	all := attributes{}
	for _, a := range h.with {
		all[a.Key] = a.Value.Resolve().String()
	}
	r.Attrs(func(a slog.Attr) bool {
		all[a.Key] = a.Value.Resolve().String()
		return true
	})
	h.node.Event(event(all))
}

func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &handler{node: h.node, next: h.next.WithAttrs(attrs), with: append(slices.Clip(h.with), attrs...)}
}

func (h *handler) WithGroup(name string) slog.Handler {
	return &handler{node: h.node, next: h.next.WithGroup(name), with: h.with}
}

// ReadLog turns the log of a node in another process, with log.format "json", into events. Their times are those of the
// lines, so the clocks of both must be the same. boot is the incarnation that wrote it, 0 where nobody knows. Lines that
// are no JSON objects are passed over: a panic's, for one.
func (n *Node) ReadLog(r io.Reader, boot uint64) error {
	in := bufio.NewReaderSize(r, 1<<16)
	for {
		line, err := in.ReadBytes('\n')
		if len(line) > 0 && line[0] == '{' {
			n.readLine(line, boot)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read the log of %s: %w", n.name, err)
		}
	}
}

func (n *Node) readLine(line []byte, boot uint64) {
	var raw map[string]any
	if json.Unmarshal(line, &raw) != nil {
		return
	}
	all := attributes{}
	for k, v := range raw {
		switch v := v.(type) {
		case string:
			all[k] = v
		case float64:
			all[k] = strconv.FormatFloat(v, 'f', -1, 64)
		case bool:
			all[k] = strconv.FormatBool(v)
		}
	}
	event := said[[2]string{all["component"], all["msg"]}]
	at, err := time.Parse(time.RFC3339Nano, all["time"])
	if event == nil || err != nil {
		return
	}
	e := event(all)
	e.At, e.Boot = n.rec.At(at), boot
	n.Event(e)
}
