package api

import (
	"errors"
	"net/http"
	"strings"

	"rollcall/node/fault"
)

// StatusOutcomeUnknown answers a request of which nobody can say whether it took effect. It must be a 4xx that no
// client library repeats: the Vault and OpenBao libraries repeat every 5xx but 501, and 412 and 429; Go's transport and
// browsers may repeat 408; and 409 already means a contradiction that the caller can resolve. 424, a request whose
// dependency failed, is used by nothing else here, so it also reads back as exactly one kind.
const StatusOutcomeUnknown = http.StatusFailedDependency

// statusClientGone is nginx's status for a caller that went away; nobody reads it.
const statusClientGone = 499

// statuses is the one table between kinds and HTTP statuses. Where several kinds share a status, the row marked home is
// what the status reads back as.
var statuses = []struct {
	kind   fault.Kind
	status int
	home   bool
}{
	{fault.Internal, http.StatusInternalServerError, true},
	{fault.Invalid, http.StatusBadRequest, true},
	{fault.NotFound, http.StatusNotFound, true},
	{fault.Denied, http.StatusForbidden, true},
	{fault.Conflict, http.StatusConflict, true},
	{fault.UnsupportedPath, http.StatusNotFound, false},
	{fault.UnsupportedOperation, http.StatusMethodNotAllowed, true},
	{fault.Unavailable, http.StatusServiceUnavailable, true},
	{fault.Fenced, http.StatusServiceUnavailable, false},
	{fault.NotLeader, http.StatusServiceUnavailable, false},
	{fault.OutcomeUnknown, StatusOutcomeUnknown, true},
	{fault.Deadline, StatusOutcomeUnknown, false},
	{fault.Canceled, statusClientGone, true},
	{fault.TooLarge, http.StatusRequestEntityTooLarge, true},
	{fault.Exhausted, http.StatusTooManyRequests, true},
	// Refused by the log because the writer is no longer current: not a 5xx, since the plugin's own part has run.
	{fault.Stale, http.StatusConflict, false},
	{fault.ReadOnly, http.StatusConflict, false},
	// A plugin that cannot be started stays so when it is asked again: 400, as OpenBao has it, for clients repeat 5xx.
	{fault.Refused, http.StatusBadRequest, false},
	{fault.Corrupt, http.StatusInternalServerError, false},
}

// StatusOf returns the HTTP status of a kind.
func StatusOf(kind fault.Kind) int {
	for _, row := range statuses {
		if row.kind == kind {
			return row.status
		}
	}
	return http.StatusInternalServerError
}

// KindOf returns the kind that a status reads back as. Statuses that only proxies send are read by what they prove:
// after 502 and 504 the request may have run.
func KindOf(status int) fault.Kind {
	for _, row := range statuses {
		if row.status == status && row.home {
			return row.kind
		}
	}
	switch {
	case status == http.StatusUnauthorized:
		return fault.Denied
	case status == http.StatusBadGateway || status == http.StatusGatewayTimeout || status == http.StatusRequestTimeout:
		return fault.OutcomeUnknown
	case status >= 400 && status < 500:
		return fault.Invalid
	default:
		return fault.Internal
	}
}

// ErrorReply turns an error into the status and texts of its answer: never nil texts, at most one. An error that nobody
// classified is shown as "internal error"; the caller logs it in full.
func ErrorReply(err error) (status int, texts []string) {
	kind := fault.KindOf(err)
	status = StatusOf(kind)
	e, ok := errors.AsType[*fault.Error](err)
	if !ok {
		text := "internal error: the log of this node says more"
		switch kind {
		case fault.Deadline:
			text = "given up after the request's deadline: whether it took effect is unknown, so look before trying again"
		case fault.Canceled:
			text = "given up: the caller went away"
		}
		return status, []string{text}
	}
	if e.Code >= 400 && e.Code <= 599 {
		status = e.Code
	}
	if e.Op == "" && e.Subject == "" && e.Text == "" && e.Err == nil {
		return status, sentinel(kind)
	}
	text := err.Error()
	if text == kind.String() && (kind == fault.UnsupportedPath || kind == fault.UnsupportedOperation) {
		return status, sentinel(kind) // as a plugin says it
	}
	if kind == fault.Internal || e.Code != 0 {
		text = multi(text)
	}
	return status, []string{text}
}

// sentinel is the text of an error that is nothing but its kind, as the contract's servers spell it (CONTRACT 1.3).
func sentinel(kind fault.Kind) []string {
	switch kind {
	case fault.NotFound, fault.Invalid:
		return []string{}
	case fault.Denied:
		return []string{"permission denied"}
	case fault.UnsupportedPath, fault.UnsupportedOperation:
		return []string{multi(kind.String())}
	default:
		return []string{kind.String()}
	}
}

// multi gives a text the form in which the contract's servers send errors that are not the user's.
func multi(text string) string {
	if strings.Contains(text, " occurred:\n\t* ") {
		return text
	}
	return "1 error occurred:\n\t* " + text + "\n\n"
}

// plain takes multi's form off again, for people.
func plain(text string) string {
	rest, ok := strings.CutPrefix(text, "1 error occurred:\n\t* ")
	if !ok {
		return text
	}
	return strings.TrimRight(rest, "\n")
}
