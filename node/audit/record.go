package audit

import (
	"cmp"
	"encoding/json"
	"slices"
	"strconv"

	"rollcall/node/api"
)

// maxLine bounds a record in bytes: twice data that is written value by value, and everything else at its own bound.
const maxLine = 1 << 20

// encode makes the line of an entry, with every secret hashed. The entry is not changed.
func (d *Device) encode(h *hasher, e *api.AuditEntry) ([]byte, error) {
	out := *e
	w := &walk{hasher: h, clear: e.Request.RequestClear}
	for _, secret := range []string{e.Request.ClientToken, e.Request.ClientTokenAccessor} {
		if secret != "" {
			w.remember(secret, h.of(secret))
		}
	}
	out.Request.Data, out.Request.DataOmitted = w.data(e.Request.Data)
	out.Request.ClientToken = h.set(e.Request.ClientToken)
	out.Request.ClientTokenAccessor = d.accessor(h, e.Request.ClientTokenAccessor)
	out.Auth = d.auth(h, e.Auth)
	if e.Response != nil {
		out.Response = d.response(h, e.Response, w)
	}
	if out.Request.DataOmitted != nil {
		out.Error = h.set(e.Error) // it may repeat what nobody has looked for
	} else {
		out.Error = w.scrub(e.Error)
	}
	line, err := json.Marshal(&out)
	if err == nil && len(line) >= maxLine {
		out.Request.Data, out.Request.Headers = nil, nil
		if out.Auth != nil {
			out.Auth.Metadata = nil
		}
		if out.Response != nil {
			out.Response.Data, out.Response.Warnings = nil, nil
		}
		line, err = json.Marshal(&out)
	}
	return append(line, '\n'), err
}

func (d *Device) response(h *hasher, r *api.AuditResponse, asked *walk) *api.AuditResponse {
	out := *r
	w := &walk{hasher: h, clear: r.ResponseClear}
	out.Data, out.DataOmitted = w.data(r.Data)
	out.Auth = d.auth(h, r.Auth)
	if r.WrapInfo != nil {
		info := *r.WrapInfo
		info.Token, info.Accessor = h.set(info.Token), d.accessor(h, info.Accessor)
		info.WrappedAccessor = d.accessor(h, info.WrappedAccessor)
		out.WrapInfo = &info
	}
	out.Warnings = nil
	for _, text := range r.Warnings[:min(len(r.Warnings), 16)] {
		out.Warnings = append(out.Warnings, asked.scrub(text))
	}
	return &out
}

func (d *Device) auth(h *hasher, a *api.AuditAuth) *api.AuditAuth {
	if a == nil {
		return nil
	}
	out := *a
	out.ClientToken, out.Accessor = h.set(a.ClientToken), d.accessor(h, a.Accessor)
	return &out
}

func (d *Device) accessor(h *hasher, text string) string {
	if d.cfg.ClearAccessors {
		return text
	}
	return h.set(text)
}

func longestFirst(secrets map[string]string) []string {
	out := make([]string, 0, len(secrets))
	for s := range secrets {
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b string) int { return cmp.Or(cmp.Compare(len(b), len(a)), cmp.Compare(a, b)) })
	return out
}

// quotedInside is a text as %q and JSON show it, without the quotes.
func quotedInside(s string) string {
	q := strconv.Quote(s)
	return q[1 : len(q)-1]
}
