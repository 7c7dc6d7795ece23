package api

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"rollcall/node/fault"
)

// maxAnswer bounds what a client reads of one answer: twice the largest body that a node takes.
const maxAnswer = 64 << 20

// dialTimeout is short so that a dead node costs little where there is another.
const dialTimeout = 3 * time.Second

// Client calls any node of a cluster. Safe for concurrent use. Its errors are *fault.Error: the kind by the answer's
// status, Code the status (0 when there was no answer), the text the server's own.
type Client struct {
	cfg  Config
	http *http.Client

	mu    sync.Mutex
	addrs []*url.URL // the one in use first
}

// New makes a client. It calls nobody.
func New(cfg Config) (*Client, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if len(cfg.Addresses) == 0 {
		cfg.Addresses = []string{DefaultAddress}
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = DefaultTimeout
	}
	c := &Client{cfg: cfg}
	for _, a := range cfg.Addresses {
		u, err := parseAddress(a)
		if err != nil {
			return nil, err
		}
		c.addrs = append(c.addrs, u)
	}
	transport := cfg.Transport
	if transport == nil {
		t, err := cfg.tls()
		if err != nil {
			return nil, err
		}
		transport = &http.Transport{
			Proxy:           http.ProxyFromEnvironment,
			DialContext:     (&net.Dialer{Timeout: dialTimeout, KeepAlive: 15 * time.Second}).DialContext,
			TLSClientConfig: t, TLSHandshakeTimeout: 5 * time.Second, ForceAttemptHTTP2: true,
			MaxIdleConns: 16, IdleConnTimeout: 60 * time.Second,
		}
	}
	c.http = &http.Client{Transport: transport, CheckRedirect: redirect}
	return c, nil
}

// redirect follows one redirect with the same method and body, and never from TLS to plain text, as the Vault and
// OpenBao clients do.
func redirect(req *http.Request, via []*http.Request) error {
	switch {
	case len(via) > 1:
		return fault.New(fault.Unavailable, "follow", req.URL.String(), "redirected more than once: no node knows the leader yet")
	case via[0].URL.Scheme == "https" && req.URL.Scheme != "https":
		return fault.New(fault.Invalid, "follow", req.URL.String(), "redirected from TLS to plain text")
	}
	if req.Method != via[0].Method { // 301 and 302 turn into GET
		return http.ErrUseLastResponse
	}
	// the library drops what it takes for credentials when the host changes
	maps.Copy(req.Header, via[0].Header)
	return nil
}

// Close ends idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Address is the node that calls go to now.
func (c *Client) Address() string { return c.addresses()[0].String() }

// Namespace that calls are made in; "" is root.
func (c *Client) Namespace() string {
	ns := strings.Trim(c.cfg.Namespace, "/")
	if ns == "root" {
		return ""
	}
	return ns
}

func (c *Client) addresses() []*url.URL {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.addrs)
}

// demote puts an address behind all others.
func (c *Client) demote(u *url.URL) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.addrs) > 1 && c.addrs[0] == u {
		c.addrs = append(c.addrs[1:], u)
	}
}

// LearnPeers asks for the other nodes' addresses and keeps them behind those that it was given: a wait then survives
// the death of the node it was started on. An address of plain text is not learned from a node behind TLS. Not being
// told is no error: the client works as before.
func (c *Client) LearnPeers(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	members, err := c.Members(ctx)
	if err != nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, m := range members {
		u, err := parseAddress(m.APIAddress)
		if err != nil || m.Left || u.Scheme != c.addrs[0].Scheme {
			continue
		}
		if !slices.ContainsFunc(c.addrs, func(k *url.URL) bool { return k.Host == u.Host }) {
			c.addrs = append(c.addrs, u)
		}
	}
}

// call is one request. The zero method is GET.
type call struct {
	method string
	path   string // below /v1/
	query  url.Values
	body   any // encoded as JSON; nil for none
	raw    io.Reader
	header http.Header
	// repeatable: asking twice is the same as asking once, so an answer that was lost is asked for elsewhere.
	repeatable bool
	// attempt bounds one try at one address; 0 for the whole call's bound alone.
	attempt time.Duration
	// stream hands out a 2xx answer's body unread; the caller closes it.
	stream bool
	// anyStatus takes every status with a JSON body for an answer.
	anyStatus bool
}

// answer is a reply that is not an error.
type answer struct {
	status int
	header http.Header
	body   []byte
	stream io.ReadCloser
}

// do calls the addresses in turn until one answers. It goes on to the next when nothing ran there, and for repeatable
// calls also when nobody knows.
func (c *Client) do(ctx context.Context, k call) (*answer, error) {
	if k.method == "" {
		k.method, k.repeatable = http.MethodGet, true
	}
	var payload []byte
	if k.body != nil {
		var err error
		if payload, err = json.Marshal(k.body); err != nil {
			return nil, fault.As(fault.Invalid, err, "encode", "request body")
		}
	}
	var last error
	for _, u := range c.addresses() {
		a, err := c.try(ctx, u, k, payload)
		if err == nil {
			return a, nil
		}
		kind := fault.KindOf(err)
		lost := kind == fault.OutcomeUnknown || kind == fault.Deadline
		if ctx.Err() != nil || k.raw != nil || !kind.Safe() && !(lost && k.repeatable) || kind == fault.Exhausted {
			return nil, err
		}
		last = err
		c.demote(u)
	}
	return nil, last
}

// try makes one call at one address.
func (c *Client) try(ctx context.Context, u *url.URL, k call, payload []byte) (*answer, error) {
	if k.attempt > 0 && !k.stream {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, k.attempt)
		defer cancel()
	}
	target := *u
	target.Path += "/v1/" + strings.TrimPrefix(k.path, "/")
	target.RawQuery = k.query.Encode()
	body := k.raw
	if payload != nil {
		body = bytes.NewReader(payload)
	}
	req, err := http.NewRequestWithContext(ctx, k.method, target.String(), body)
	if err != nil {
		return nil, fault.As(fault.Invalid, err, k.method, target.String())
	}
	maps.Copy(req.Header, k.header)
	req.Header.Set(HeaderRequest, "true")
	if c.cfg.Token != "" {
		req.Header.Set(HeaderToken, c.cfg.Token)
	}
	if ns := c.Namespace(); ns != "" {
		req.Header.Set(HeaderNamespace, ns)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, transportFault(err, k.method, &target)
	}
	if k.stream && resp.StatusCode < 300 {
		return &answer{status: resp.StatusCode, header: resp.Header, stream: resp.Body}, nil
	}
	defer func() { _ = resp.Body.Close() }()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return nil, transportFault(err, k.method, &target)
	}
	if len(raw) > maxAnswer {
		return nil, fault.New(fault.TooLarge, k.method, target.String(), "the answer is larger than %d MiB", maxAnswer>>20)
	}
	if resp.StatusCode >= 300 && !(k.anyStatus && json.Valid(raw)) {
		return nil, answerFault(resp.StatusCode, raw, k.method, &target)
	}
	return &answer{status: resp.StatusCode, header: resp.Header, body: raw}, nil
}

// transportFault classifies a call that got no answer: Unavailable when it certainly was not sent, OutcomeUnknown
// otherwise.
func transportFault(err error, method string, u *url.URL) error {
	where := u.Scheme + "://" + u.Host
	if e, ok := errors.AsType[*fault.Error](err); ok { // redirect's own
		return e
	}
	if urlErr, ok := errors.AsType[*url.Error](err); ok {
		err = urlErr.Err
	}
	var op *net.OpError
	var cert *tls.CertificateVerificationError
	var dns *net.DNSError
	switch {
	case errors.Is(err, context.Canceled):
		return fault.As(fault.Canceled, err, method, u.String())
	case errors.As(err, &cert):
		return &fault.Error{Kind: fault.Unavailable, Err: err, Text: "the certificate of " + where + " is not trusted (" +
			cert.Err.Error() + "): give its CA with -ca-cert or ROLLCALL_CACERT"}
	case strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		return &fault.Error{
			Kind: fault.Unavailable, Err: err,
			Text: where + " speaks plain HTTP: use http:// in -address or ROLLCALL_ADDR",
		}
	case errors.As(err, &dns), errors.As(err, &op) && op.Op == "dial":
		return &fault.Error{Kind: fault.Unavailable, Err: err, Text: "no node answers at " + where + " (" + err.Error() +
			"): is it running? Say where with -address or ROLLCALL_ADDR"}
	case errors.Is(err, context.DeadlineExceeded):
		return &fault.Error{Kind: fault.Deadline, Op: method, Subject: u.String(), Err: err, Text: "no answer in time"}
	default:
		return &fault.Error{
			Kind: fault.OutcomeUnknown, Op: method, Subject: u.String(), Err: err,
			Text: "the connection broke before the answer (" + err.Error() + "): it is not known whether the request took effect",
		}
	}
}

// answerFault makes an error of an answer that is one.
func answerFault(status int, raw []byte, method string, u *url.URL) error {
	e := &fault.Error{Kind: KindOf(status), Op: method, Subject: u.String(), Code: status}
	var body ErrorBody
	if json.Unmarshal(raw, &body) == nil {
		texts := make([]string, 0, len(body.Errors))
		for _, t := range body.Errors {
			texts = append(texts, plain(t))
		}
		e.Text = strings.Join(texts, "; ")
	} else if len(raw) > 0 { // a proxy's page
		e.Text = Cell(string(raw[:min(len(raw), 200)]))
	}
	if e.Text == "" {
		e.Text = strings.ToLower(http.StatusText(status))
	}
	if e.Text == "" {
		e.Text = e.Kind.String()
	}
	return e
}

// bounded puts the client's timeout around a call.
func (c *Client) bounded(ctx context.Context, k call) (*answer, error) {
	limit := c.cfg.Timeout
	if k.attempt > 0 { // a blocking query has time for every address
		limit = max(limit, k.attempt*time.Duration(len(c.addresses())))
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return c.do(ctx, k)
}

// logical makes a call whose answer is an envelope; nil for an answer without a body.
func (c *Client) logical(ctx context.Context, k call) (*Envelope, error) {
	a, err := c.bounded(ctx, k)
	if err != nil {
		return nil, err
	}
	return decodeEnvelope(a)
}

func decodeEnvelope(a *answer) (*Envelope, error) {
	if len(bytes.TrimSpace(a.body)) == 0 {
		return nil, nil
	}
	env := &Envelope{}
	if err := json.Unmarshal(a.body, env); err != nil {
		return nil, fault.As(fault.Internal, err, "decode", "answer")
	}
	return env, nil
}

// data makes a call and decodes its envelope's data into out; nil out ignores it.
func (c *Client) data(ctx context.Context, k call, out any) (Warnings, error) {
	env, err := c.logical(ctx, k)
	if err != nil || env == nil {
		return nil, err
	}
	if out != nil && len(env.Data) > 0 && string(env.Data) != "null" {
		if err := json.Unmarshal(env.Data, out); err != nil {
			return env.Warnings, fault.As(fault.Internal, err, "decode", "answer of "+k.path)
		}
	}
	return env.Warnings, nil
}

// bare makes a call whose answer has no envelope.
func (c *Client) bare(ctx context.Context, k call, out any) error {
	a, err := c.bounded(ctx, k)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(a.body, out); err != nil {
		return fault.As(fault.Internal, err, "decode", "answer of "+k.path)
	}
	return nil
}
