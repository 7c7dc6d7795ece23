package supervisor

import (
	"context"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"

	"rollcall/node/fault"
	pluginpb "rollcall/proto/plugin"
)

// readOnlyText is how both SDKs say that storage may not be written. Types do not survive gRPC, and plugins compare
// the text.
const readOnlyText = "cannot write to readonly storage"

// tooLargeText is how Vault's and OpenBao's storage refuses a value, and what both servers answer with 413 when a plugin
// hands it on. As any other error of a plugin it would be a 500, which clients send again.
const tooLargeText = "put failed due to value being too large"

// The error types of pluginpb.ProtoError, as both SDKs number them.
const (
	errUser = iota + 1
	errInternal
	errCoded
	errBadRequest
	errUnsupportedOperation
	errUnsupportedPath
	errInvalidRequest
	errPermissionDenied
	errApprovalPending
	errUnrecoverable
)

// pluginError turns an error of the plugin's own code into a fault. The plugin ran: none of the kinds says "safe to
// repeat".
func pluginError(e *pluginpb.ProtoError) error {
	if e == nil {
		return nil
	}
	text := e.GetErrMsg()
	if text == "" {
		text = "the plugin gave an error without a text"
	}
	f := &fault.Error{Kind: fault.Internal, Text: text}
	switch e.GetErrType() {
	case errUser, errBadRequest, errInvalidRequest:
		f.Kind = fault.Invalid
	case errUnsupportedOperation:
		f.Kind = fault.UnsupportedOperation
	case errUnsupportedPath:
		f.Kind = fault.UnsupportedPath
	case errPermissionDenied, errApprovalPending:
		f.Kind = fault.Denied
	case errCoded:
		f.Code = int(e.GetErrCode())
		f.Kind = codedKind(f.Code)
	default:
		switch {
		case strings.Contains(text, readOnlyText):
			f.Kind = fault.ReadOnly
		case strings.Contains(text, tooLargeText):
			f.Kind = fault.TooLarge
		}
	}
	return f
}

func codedKind(code int) fault.Kind {
	switch code {
	case http.StatusBadRequest, http.StatusUnprocessableEntity:
		return fault.Invalid
	case http.StatusUnauthorized, http.StatusForbidden:
		return fault.Denied
	case http.StatusNotFound:
		return fault.NotFound
	case http.StatusMethodNotAllowed:
		return fault.UnsupportedOperation
	case http.StatusConflict:
		return fault.Conflict
	case http.StatusRequestEntityTooLarge:
		return fault.TooLarge
	default:
		return fault.Internal
	}
}

// sent tells whether a call's request went out to the plugin. Until it did, nothing can have run.
type sent struct{ atomic.Bool }

type sentKey struct{}

func watchSent(ctx context.Context) (context.Context, *sent) {
	m := &sent{}
	return context.WithValue(ctx, sentKey{}, m), m
}

// sentHandler marks calls whose request was handed to the transport.
type sentHandler struct{}

var _ stats.Handler = sentHandler{}

func (sentHandler) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (sentHandler) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (sentHandler) HandleConn(context.Context, stats.ConnStats)                       {}

// HandleRPC is called by gRPC on the goroutine of the call.
func (sentHandler) HandleRPC(ctx context.Context, s stats.RPCStats) {
	if _, ok := s.(*stats.OutPayload); !ok {
		return
	}
	if m, ok := ctx.Value(sentKey{}).(*sent); ok {
		m.Store(true)
	}
}

// ended is ctx.Err, and already so when the deadline is about to pass: the plugin's side of gRPC counts it too, and
// may be first.
func ended(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if at, ok := ctx.Deadline(); ok && time.Until(at) < 20*time.Millisecond {
		return context.DeadlineExceeded
	}
	return nil
}

// callError classifies an error of the call itself: the plugin's code said nothing.
func (p *Process) callError(ctx context.Context, op string, err error, went bool) error {
	if cerr := ended(ctx); cerr != nil {
		return &fault.Error{Kind: fault.KindOf(cerr), Op: op, Subject: p.spec.String(), Text: "given up while the plugin worked on it: " +
			cerr.Error(), Err: cerr}
	}
	text := trimmed(status.Convert(err).Message())
	f := &fault.Error{Kind: fault.Internal, Op: op, Subject: p.spec.String(), Text: text, Err: err}
	switch status.Code(err) {
	case codes.Unavailable, codes.Canceled:
		f.Kind, f.Text = fault.Unavailable, "the plugin process cannot be reached: "+text
		waitAWhile(p.run.exited)
		if words := p.Exit(); words != "" {
			f.Text = "the plugin process " + words
		}
		if went {
			f.Kind = fault.OutcomeUnknown
			f.Text += "; it was working on the request, which may or may not have taken effect"
		}
	case codes.ResourceExhausted:
		f.Kind = fault.TooLarge
	case codes.Unimplemented:
		f.Kind = fault.UnsupportedOperation
	case codes.DeadlineExceeded:
		f.Kind = fault.Deadline
	case codes.InvalidArgument:
		f.Kind = fault.Invalid
	default:
		if strings.Contains(text, readOnlyText) {
			f.Kind = fault.ReadOnly
		}
	}
	return f
}
