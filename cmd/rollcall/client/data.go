package client

import (
	"bytes"
	"encoding/json"
	"net/url"
	"strings"

	"github.com/spf13/cobra"

	"rollcall/node/fault"
)

// noValue is what the stock commands say about a path with nothing in it.
func noValue(path string) error {
	return &exitError{code: ExitAPI, err: fault.Text(fault.NotFound, "No value found at %s", path)}
}

func cleanPath(p string) string { return strings.TrimPrefix(strings.Trim(p, "/"), "v1/") }

// parseData reads the arguments of write and read: k=v, k=@file, k=-, k=\@literal, and @file.json or "-" for a whole JSON
// object. A key that is repeated becomes a list.
func (e *Env) parseData(args []string) (map[string]any, error) {
	out := map[string]any{}
	stdin := false
	read := func(name string) ([]byte, error) {
		if name == "-" {
			if stdin {
				return nil, usagef("standard input can be read once only")
			}
			stdin = true
		}
		return e.readFile(name)
	}
	for _, a := range args {
		if a == "-" || strings.HasPrefix(a, "@") {
			raw, err := read(strings.TrimPrefix(a, "@"))
			if err != nil {
				return nil, err
			}
			d := json.NewDecoder(bytes.NewReader(raw))
			d.UseNumber()
			if err := d.Decode(&out); err != nil {
				return nil, usagef("%s: expected a JSON object: %w", a, err)
			}
			continue
		}
		k, v, ok := strings.Cut(a, "=")
		if !ok || k == "" {
			return nil, usagef("%q is not KEY=VALUE; a file with JSON is @FILE, standard input is \"-\"", a)
		}
		switch {
		case v == "-" || strings.HasPrefix(v, "@"):
			raw, err := read(strings.TrimPrefix(v, "@"))
			if err != nil {
				return nil, err
			}
			v = string(raw)
		case strings.HasPrefix(v, `\@`):
			v = v[1:]
		}
		switch had := out[k].(type) {
		case nil:
			out[k] = v
		case []any:
			out[k] = append(had, v)
		default:
			out[k] = []any{had, v}
		}
	}
	return out, nil
}

func (e *Env) parseQuery(args []string) (url.Values, error) {
	data, err := e.parseData(args)
	if err != nil || len(data) == 0 {
		return nil, err
	}
	q := url.Values{}
	for k, v := range data {
		if list, ok := v.([]any); ok {
			for _, x := range list {
				q.Add(k, text(x))
			}
			continue
		}
		q.Set(k, text(v))
	}
	return q, nil
}

func newRead(e *Env) *cobra.Command {
	var field string
	c := &cobra.Command{
		Use: "read [flags] PATH [K=V...]", Short: "Read a path", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			q, err := e.parseQuery(args[1:])
			if err != nil {
				return err
			}
			cl, err := e.client()
			if err != nil {
				return err
			}
			path := cleanPath(args[0])
			env, err := cl.Read(cmd.Context(), path, q)
			if err != nil {
				return failed("reading "+path, err)
			}
			if env == nil {
				return noValue(path)
			}
			return e.printEnvelope(env, field)
		},
	}
	c.Flags().StringVar(&field, "field", "", "print this field only")
	return c
}

func newWrite(e *Env) *cobra.Command {
	var field string
	var force bool
	c := &cobra.Command{
		Use: "write [flags] PATH [K=V | K=@FILE | K=- | @FILE.json | -]...", Short: "Write to a path", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			data, err := e.parseData(args[1:])
			if err != nil {
				return err
			}
			if len(args) == 1 && !force {
				return usagef("must supply data or use -force")
			}
			cl, err := e.client()
			if err != nil {
				return err
			}
			path := cleanPath(args[0])
			env, err := cl.Write(cmd.Context(), path, data)
			if err != nil {
				return failed("writing data to "+path, err)
			}
			if env == nil {
				if field != "" {
					return usagef("field %q is not in the answer, which is empty", field)
				}
				if !e.json() {
					e.say("Success! Data written to: %s", path)
				}
				return nil
			}
			return e.printEnvelope(env, field)
		},
	}
	c.Flags().StringVar(&field, "field", "", "print this field only")
	c.Flags().BoolVarP(&force, "force", "f", false, "write without data")
	return c
}

func newList(e *Env) *cobra.Command {
	return &cobra.Command{
		Use: "list PATH", Short: "List a path", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := e.client()
			if err != nil {
				return err
			}
			path := cleanPath(args[0])
			env, err := cl.List(cmd.Context(), path)
			if err != nil {
				return failed("listing "+path, err)
			}
			if env == nil {
				return noValue(path + "/")
			}
			e.warn(env.Warnings)
			var data struct {
				Keys []any `json:"keys"`
			}
			if len(env.Data) > 0 && json.Unmarshal(env.Data, &data) != nil {
				return failed("listing "+path, fault.Text(fault.Internal, "the answer has no list of keys"))
			}
			if e.json() {
				if data.Keys == nil {
					data.Keys = []any{}
				}
				return e.printJSON(data.Keys)
			}
			t := table{head: []string{"Keys"}}
			for _, k := range data.Keys {
				t.add(text(k))
			}
			t.print(e.Stdout)
			return nil
		},
	}
}

func newDelete(e *Env) *cobra.Command {
	return &cobra.Command{
		Use: "delete PATH [K=V...]", Short: "Delete a path", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			q, err := e.parseQuery(args[1:])
			if err != nil {
				return err
			}
			cl, err := e.client()
			if err != nil {
				return err
			}
			path := cleanPath(args[0])
			env, err := cl.Delete(cmd.Context(), path, q)
			if err != nil {
				return failed("deleting "+path, err)
			}
			if env != nil && (e.json() || len(env.Data) > 0 && string(env.Data) != "null") {
				return e.printEnvelope(env, "")
			}
			if env != nil {
				e.warn(env.Warnings)
			}
			e.say("Success! Data deleted (if it existed) at: %s", path)
			return nil
		},
	}
}
