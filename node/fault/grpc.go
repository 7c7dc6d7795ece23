package fault

import (
	"context"
	"errors"
	"strconv"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// domain marks the error details that are ours (google.rpc.ErrorInfo).
const domain = "rollcall"

var grpcCodes = [kindCount]codes.Code{
	Internal: codes.Internal, Invalid: codes.InvalidArgument, NotFound: codes.NotFound, Denied: codes.PermissionDenied,
	Conflict: codes.AlreadyExists, UnsupportedPath: codes.NotFound, UnsupportedOperation: codes.Unimplemented,
	Unavailable: codes.Unavailable, Fenced: codes.Unavailable, NotLeader: codes.FailedPrecondition,
	OutcomeUnknown: codes.Unknown, Deadline: codes.DeadlineExceeded, Canceled: codes.Canceled,
	TooLarge: codes.ResourceExhausted, Exhausted: codes.ResourceExhausted, Stale: codes.Aborted,
	ReadOnly: codes.FailedPrecondition, Refused: codes.FailedPrecondition, Corrupt: codes.DataLoss,
}

// ToGRPC turns err into a gRPC status that FromGRPC restores with kind, operation, subject and text.
func ToGRPC(err error) error {
	if err == nil {
		return nil
	}
	kind := KindOf(err)
	st := status.New(grpcCodes[kind], err.Error())
	info := &errdetails.ErrorInfo{Reason: kind.String(), Domain: domain, Metadata: map[string]string{}}
	if e, ok := errors.AsType[*Error](err); ok {
		info.Metadata["op"], info.Metadata["subject"] = e.Op, e.Subject
		info.Metadata["text"] = e.Text
		if e.Text == "" && e.Err != nil {
			info.Metadata["text"] = e.Err.Error()
		}
		if e.Code != 0 {
			info.Metadata["code"] = strconv.Itoa(e.Code)
		}
	}
	if with, derr := st.WithDetails(info); derr == nil {
		st = with
	}
	return st.Err()
}

// Said reports whether the other side said an error of FromGRPC's, rather than the connection to it: then what it says of the
// call is so. What a connection says leaves open whether the call has run.
func Said(err error) bool {
	e, ok := errors.AsType[*Error](err)
	return ok && e.Err == nil
}

// FromGRPC restores an error that ToGRPC sent. A status that is not ours (the connection broke, a deadline passed) is
// classified by whether the call can have run: only Unavailable before anything was sent is safe, and gRPC does not
// tell, so callers that did not send a body themselves decide with the op's own knowledge.
func FromGRPC(err error) error {
	if err == nil {
		return nil
	}
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	for _, d := range st.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetDomain() == domain {
			m := info.GetMetadata()
			code, _ := strconv.Atoi(m["code"])
			e := &Error{Kind: ParseKind(info.GetReason()), Op: m["op"], Subject: m["subject"], Text: m["text"], Code: code}
			if e.Text == "" {
				e.Text = st.Message()
			}
			return e
		}
	}
	switch st.Code() {
	case codes.DeadlineExceeded:
		return &Error{Kind: Deadline, Text: st.Message(), Err: err}
	case codes.Canceled:
		return &Error{Kind: Canceled, Text: st.Message(), Err: err}
	case codes.Unavailable:
		return &Error{Kind: Unavailable, Text: st.Message(), Err: err}
	case codes.ResourceExhausted:
		return &Error{Kind: TooLarge, Text: st.Message(), Err: err}
	case codes.PermissionDenied, codes.Unauthenticated:
		return &Error{Kind: Denied, Text: st.Message(), Err: err}
	case codes.Unimplemented:
		return &Error{Kind: UnsupportedOperation, Text: st.Message(), Err: err}
	default:
		return &Error{Kind: Internal, Text: st.Message(), Err: err}
	}
}

// UnaryServer converts the errors of every unary handler with ToGRPC.
func UnaryServer(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	resp, err := handler(ctx, req)
	if err != nil {
		return nil, ToGRPC(err)
	}
	return resp, nil
}

// StreamServer converts the errors of every streaming handler with ToGRPC.
func StreamServer(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	return ToGRPC(handler(srv, ss))
}

// UnaryClient restores the errors of every unary call with FromGRPC.
func UnaryClient(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	return FromGRPC(invoker(ctx, method, req, reply, cc, opts...))
}
