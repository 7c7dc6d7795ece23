package api

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"rollcall/node/fault"
)

// Reload starts a reload. kind "" asks sys/plugins/reload/backend, which stays within the client's namespace; a plugin
// type or "unknown" asks sys/plugins/reload/:type/:name, which acts on all namespaces and wants the root namespace.
// With a ReloadID and scope global it is repeatable: a lost answer is asked for at another node.
func (c *Client) Reload(ctx context.Context, kind string, req ReloadRequest) (*ReloadResponse, Warnings, error) {
	path := "sys/plugins/reload/backend"
	if kind != "" {
		path, req.Plugin = "sys/plugins/reload/"+kind+"/"+req.Plugin, ""
	}
	return c.startReload(ctx, path, req)
}

// Rollback brings the mounts of a plugin back to what they ran before their last switch, on every node.
func (c *Client) Rollback(ctx context.Context, kind, name string, req ReloadRequest) (*ReloadResponse, Warnings, error) {
	req.Plugin, req.Scope = "", ""
	k := call{method: http.MethodPut, path: "sys/plugins/rollback/" + kind + "/" + name, body: req, repeatable: req.ReloadID != ""}
	out := &ReloadResponse{}
	warnings, err := c.data(ctx, k, out)
	return out, warnings, err
}

func (c *Client) startReload(ctx context.Context, path string, req ReloadRequest) (*ReloadResponse, Warnings, error) {
	out := &ReloadResponse{}
	warnings, err := c.data(ctx, call{
		method: http.MethodPut, path: path, body: req,
		repeatable: req.ReloadID != "" && req.Scope == "global",
	}, out)
	if err == nil && out.ReloadID == "" {
		out.ReloadID = req.ReloadID
	}
	return out, warnings, err
}

// ReloadStatus tells which nodes have finished, in the contract's shape.
func (c *Client) ReloadStatus(ctx context.Context, id string) (*ReloadStatus, error) {
	out := &ReloadStatus{}
	_, err := c.data(ctx, call{path: "sys/plugins/reload/backend/status", query: url.Values{"reload_id": {id}}}, out)
	return out, err
}

// ReloadRecord reads one reload. With an index it answers when the record has changed since, when the reload has ended,
// or after wait.
func (c *Client) ReloadRecord(ctx context.Context, id string, index uint64, wait time.Duration) (*Reload, error) {
	k := call{path: "sys/reloads/" + id}
	if index > 0 {
		k.query = url.Values{"index": {strconv.FormatUint(index, 10)}, "wait": {wait.String()}}
		k.attempt = wait + 5*time.Second
	}
	out := &Reload{}
	if _, err := c.data(ctx, k, out); err != nil {
		return nil, err
	}
	return out, nil
}

// Reloads lists the reloads, newest first.
func (c *Client) Reloads(ctx context.Context) (*ReloadList, error) {
	out := &ReloadList{}
	_, err := c.data(ctx, call{path: "sys/reloads"}, out)
	return out, err
}

// ControlReload aborts, pauses, resumes or promotes a reload, and returns it as it is then.
func (c *Client) ControlReload(ctx context.Context, id, action, why string) (*Reload, error) {
	out := &Reload{}
	_, err := c.data(ctx, call{method: http.MethodPut, path: "sys/reloads/" + id + "/" + action, body: ControlRequest{Why: why}}, out)
	return out, err
}

// pollWait is how long one blocking query of WaitReload asks for: short, so that a node that hangs is noticed.
const pollWait = 5 * time.Second

// Watcher is told how a wait goes. Both may be nil. They are called from WaitReload's goroutine.
type Watcher struct {
	// Changed is called with the record at first and after every change.
	Changed func(*Reload)
	// Trouble is called when no node answers; the wait goes on.
	Trouble func(error)
}

// WaitReload follows a reload until it has ended, through whichever node answers. When ctx ends first, it returns the
// last record that it saw (nil when none) with an error of kind Deadline or Canceled.
func (c *Client) WaitReload(ctx context.Context, id string, w Watcher) (*Reload, error) {
	var seen *Reload
	pause := 100 * time.Millisecond
	for {
		index := uint64(0)
		if seen != nil {
			index = seen.Index
		}
		asked := time.Now()
		r, err := c.ReloadRecord(ctx, id, index, pollWait)
		switch {
		case ctx.Err() != nil:
			return seen, fault.Wrap(ctx.Err(), "wait for", "reload "+id)
		case err == nil:
			fresh := seen == nil || r.Index > seen.Index
			// A node that is behind may tell less than is known already.
			if fresh || Ended(r.Phase) {
				seen = r
				if w.Changed != nil {
					w.Changed(r)
				}
			}
			if Ended(r.Phase) {
				return r, nil
			}
			if fresh || time.Since(asked) > time.Second { // the query did block: ask on at once
				pause = 100 * time.Millisecond
				continue
			}
		case !passing(err):
			return seen, err
		case w.Trouble != nil:
			w.Trouble(err)
		}
		if err := sleep(ctx, pause); err != nil {
			return seen, fault.Wrap(err, "wait for", "reload "+id)
		}
		pause = min(2*pause, 2*time.Second)
	}
}

// passing reports whether asking again may help.
func passing(err error) bool {
	switch fault.KindOf(err) {
	case fault.Invalid, fault.NotFound, fault.Denied, fault.UnsupportedPath, fault.UnsupportedOperation, fault.TooLarge:
		return false
	default:
		return true
	}
}

// sleep waits d, spread by a quarter, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d + rand.N(d/4+1))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// idleEvents is how long an event stream may be silent before it is taken for dead; the server sends a comment more
// often than that.
const idleEvents = 60 * time.Second

// Events calls f for every event after the one with the id since ("" for the next one), reconnecting through whichever
// node answers, until ctx ends or f returns an error, which it returns. filter are query values of sys/events.
func (c *Client) Events(ctx context.Context, since string, filter url.Values, f func(Event) error) error {
	pause := 100 * time.Millisecond
	for {
		got, err := c.events(ctx, &since, filter, f)
		if stop, ok := errors.AsType[errStop](err); ok {
			return stop.error
		}
		if ctx.Err() != nil {
			return fault.Wrap(ctx.Err(), "follow", "events")
		}
		if err != nil && !passing(err) {
			return err
		}
		if got {
			pause = 100 * time.Millisecond
		}
		if err := sleep(ctx, pause); err != nil {
			return fault.Wrap(err, "follow", "events")
		}
		pause = min(2*pause, 5*time.Second)
	}
}

// errStop is the caller's own error on its way out.
type errStop struct{ error }

// events follows one connection; got reports whether an event came.
func (c *Client) events(ctx context.Context, since *string, filter url.Values, f func(Event) error) (got bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	header := http.Header{"Accept": {"text/event-stream"}}
	if *since != "" {
		header.Set("Last-Event-ID", *since)
	}
	idle := time.AfterFunc(idleEvents, cancel)
	defer idle.Stop()
	a, err := c.do(ctx, call{path: "sys/events", query: filter, header: header, stream: true})
	if err != nil {
		return false, err
	}
	defer func() { _ = a.stream.Close() }()
	err = readEvents(a.stream, func() { idle.Reset(idleEvents) }, func(e Event) error {
		got = true
		if err := f(e); err != nil {
			return errStop{err}
		}
		if e.ID != "" {
			*since = e.ID
		}
		return nil
	})
	if _, ok := errors.AsType[errStop](err); !ok { // the next connection begins elsewhere
		if addrs := c.addresses(); len(addrs) > 1 {
			c.demote(addrs[0])
		}
	}
	return got, err
}

// readEvents parses text/event-stream.
func readEvents(r io.Reader, alive func(), f func(Event) error) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 0, 16<<10), 1<<20)
	var id, kind string
	var data bytes.Buffer
	for lines.Scan() {
		alive()
		field, value, _ := strings.Cut(lines.Text(), ":")
		value = strings.TrimPrefix(value, " ")
		switch field {
		case "id":
			id = value
		case "event":
			kind = value
		case "data":
			if data.Len() > 0 {
				data.WriteByte('\n')
			}
			data.WriteString(value)
		case "":
			if len(lines.Text()) > 0 || data.Len() == 0 {
				continue // a comment, or the end of nothing
			}
			e := Event{}
			if json.Unmarshal(data.Bytes(), &e) != nil {
				e.Text = data.String()
			}
			if id != "" {
				e.ID = id
			}
			if kind != "" {
				e.Type = kind
			}
			kind = ""
			data.Reset()
			if err := f(e); err != nil {
				return err
			}
		}
	}
	return lines.Err()
}
