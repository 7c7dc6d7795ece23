package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"reflect"
	"strings"
	"testing"

	"rollcall/node/fault"
)

func TestEveryKindHasOneStatusAndItsStatusReadsBackAsAKindOfThatStatus(t *testing.T) {
	rows := map[fault.Kind]int{}
	for _, r := range statuses {
		rows[r.kind]++
	}
	for k := fault.Kind(0); !strings.HasPrefix(k.String(), "kind "); k++ {
		if rows[k] != 1 {
			t.Errorf("kind %v stands in the table %d times", k, rows[k])
		}
		if back := KindOf(StatusOf(k)); StatusOf(back) != StatusOf(k) {
			t.Errorf("kind %v: status %d reads back as %v, which has status %d", k, StatusOf(k), back, StatusOf(back))
		}
	}
	homes := map[int]fault.Kind{}
	for _, r := range statuses {
		if r.home {
			if had, ok := homes[r.status]; ok {
				t.Errorf("status %d reads back as %v and as %v", r.status, had, r.kind)
			}
			homes[r.status] = r.kind
		}
	}
	for _, r := range statuses {
		if _, ok := homes[r.status]; !ok {
			t.Errorf("status %d of %v reads back as nothing", r.status, r.kind)
		}
	}
}

// What ran, or may have run, must never be sent with a status that the client libraries repeat.
func TestNothingThatMayHaveRunIsAnsweredWithAStatusThatClientsRepeat(t *testing.T) {
	repeated := func(status int) bool {
		return status >= 500 && status != 501 || status == 408 || status == 412 || status == 429
	}
	for _, k := range []fault.Kind{fault.OutcomeUnknown, fault.Deadline, fault.Refused, fault.Stale, fault.ReadOnly, fault.Conflict} {
		if s := StatusOf(k); repeated(s) || s < 400 {
			t.Errorf("kind %v has status %d, which clients repeat", k, s)
		}
	}
	for _, k := range []fault.Kind{fault.Unavailable, fault.Fenced, fault.NotLeader, fault.Exhausted} {
		if !k.Safe() || !repeated(StatusOf(k)) {
			t.Errorf("kind %v: nothing ran, and yet clients do not repeat %d", k, StatusOf(k))
		}
	}
}

func TestStatusesOfProxiesAreReadByWhatTheyProve(t *testing.T) {
	for status, want := range map[int]fault.Kind{
		401: fault.Denied, 408: fault.OutcomeUnknown, 415: fault.Invalid, 418: fault.Invalid, 501: fault.Internal,
		502: fault.OutcomeUnknown, 503: fault.Unavailable, 504: fault.OutcomeUnknown, 404: fault.NotFound, 400: fault.Invalid,
	} {
		if got := KindOf(status); got != want {
			t.Errorf("status %d reads as %v, want %v", status, got, want)
		}
	}
}

func TestErrorsAreSpelledAsClientsExpectThem(t *testing.T) {
	for _, c := range []struct {
		name   string
		err    error
		status int
		texts  []string
	}{
		{"user's error", fault.Text(fault.Invalid, "plugin or mounts must be provided"), 400, []string{"plugin or mounts must be provided"}},
		{"with operation", fault.New(fault.Conflict, "start reload", "r1", "other request"), 409, []string{"start reload r1: other request"}},
		{"nothing there", &fault.Error{Kind: fault.NotFound}, 404, []string{}},
		{"no path", &fault.Error{Kind: fault.UnsupportedPath}, 404, []string{"1 error occurred:\n\t* unsupported path\n\n"}},
		{"no operation", &fault.Error{Kind: fault.UnsupportedOperation}, 405, []string{"1 error occurred:\n\t* unsupported operation\n\n"}},
		{"bare denial", &fault.Error{Kind: fault.Denied}, 403, []string{"permission denied"}},
		{"internal", fault.Text(fault.Internal, "boom"), 500, []string{"1 error occurred:\n\t* boom\n\n"}},
		{"formed already", fault.Text(fault.Internal, "1 error occurred:\n\t* boom\n\n"), 500, []string{"1 error occurred:\n\t* boom\n\n"}},
		{"coded by a plugin", &fault.Error{Kind: fault.Internal, Code: 418, Text: "teapot"}, 418, []string{"1 error occurred:\n\t* teapot\n\n"}},
		{"code out of range", &fault.Error{Kind: fault.Invalid, Code: 200, Text: "x"}, 400, []string{"1 error occurred:\n\t* x\n\n"}},
		{"nobody's", errors.New("secret path /data/x"), 500, []string{"internal error: the log of this node says more"}},
		{"wrapped", fmt.Errorf("outer: %w", fault.Text(fault.Exhausted, "queue is full")), 429, []string{"outer: queue is full"}},
		{"deadline", context.DeadlineExceeded, 424, []string{"given up after the request's deadline: whether it took effect is unknown, so look before trying again"}},
	} {
		status, texts := ErrorReply(c.err)
		if status != c.status || !reflect.DeepEqual(texts, c.texts) {
			t.Errorf("%s: %d %q, want %d %q", c.name, status, texts, c.status, c.texts)
		}
	}
}

func TestAnErrorBodyWithoutTextIsAnEmptyArray(t *testing.T) {
	_, texts := ErrorReply(&fault.Error{Kind: fault.NotFound})
	raw, _ := json.Marshal(ErrorBody{Errors: texts})
	if string(raw) != `{"errors":[]}` {
		t.Errorf("got %s", raw)
	}
}

func TestTheEnvelopeHasEveryKeyAndNullsWhereClientsWantThem(t *testing.T) {
	raw, err := json.Marshal(Envelope{RequestID: "r", Warnings: []string{}, Data: json.RawMessage(`{"n":12345678901234567890}`)})
	want := `{"request_id":"r","lease_id":"","renewable":false,"lease_duration":0,"data":{"n":12345678901234567890},"wrap_info":null,"warnings":null,"auth":null}`
	if err != nil || string(raw) != want {
		t.Errorf("%v\n got %s\nwant %s", err, raw, want)
	}
	raw, _ = json.Marshal(Envelope{Warnings: []string{"w"}})
	if !strings.Contains(string(raw), `"data":null`) || !strings.Contains(string(raw), `"warnings":["w"]`) {
		t.Errorf("got %s", raw)
	}
}

func TestACellHoldsNothingThatBreaksATable(t *testing.T) {
	got := Cell("exec |/x|:\r\n\tno such\x1b[31m file\u2028 end ")
	if strings.ContainsAny(got, "|\r\n\t\x1b\u2028") || got != "exec //x/: no such [31m file end" {
		t.Errorf("got %q", got)
	}
}

func TestTimingsSumStepsAndReadyIsTheWholeWay(t *testing.T) {
	got := TimingsOf([]Step{{Name: "verify", MS: 1}, {Name: "start", MS: 2}, {Name: "start", MS: 3}, {Name: "handshake", MS: 4}, {Name: "trial", MS: 5}, {Name: "hold", MS: 6}, {Name: "drain", MS: 7}})
	want := Timings{Verify: 1, Start: 5, Handshake: 4, Trial: 5, Ready: 15, Hold: 6, Drain: 7}
	if got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if got := StepTime(1_700_000_000_123_456); got != "2023-11-14T22:13:20.123456Z" {
		t.Error(got)
	}
}

func TestHeadersAreInCanonicalForm(t *testing.T) {
	for _, h := range []string{HeaderToken, HeaderNamespace, HeaderRequest, HeaderNoForward, HeaderGeneration, HeaderNode, HeaderIndex} {
		if http.CanonicalHeaderKey(h) != h {
			t.Errorf("%s is not canonical: http.Header would not find it", h)
		}
	}
}
