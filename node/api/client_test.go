package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"rollcall/node/fault"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve starts a server and a client of it (and of further addresses).
func serve(t *testing.T, h http.HandlerFunc, more ...string) *Client {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return client(t, append([]string{s.URL}, more...)...)
}

func client(t *testing.T, addrs ...string) *Client {
	t.Helper()
	c, err := New(Config{Addresses: addrs, Token: "tok", Timeout: 10 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// deadAddress is an address on which nobody listens.
func deadAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return "http://" + l.Addr().String()
}

// breaking takes a request and breaks the connection: whether it ran is not known.
func breaking(t *testing.T, calls *atomic.Int32) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		calls.Add(1)
		_, _ = io.Copy(io.Discard, r.Body)
		conn, _, err := http.NewResponseController(w).Hijack()
		if err == nil {
			_ = conn.Close()
		}
	}))
	t.Cleanup(s.Close)
	return s.URL
}

func answerData(w http.ResponseWriter, data any) {
	raw, _ := json.Marshal(data)
	_ = json.NewEncoder(w).Encode(Envelope{RequestID: "r", Data: raw})
}

func TestTheEnvironmentIsReadInTheOrderRollcallBaoVault(t *testing.T) {
	home := t.TempDir()
	if err := os.WriteFile(filepath.Join(home, ".vault-token"), []byte("file-token\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	env := map[string]string{
		"VAULT_ADDR": "http://v:1", "BAO_ADDR": "http://b:1", "ROLLCALL_ADDR": "http://r1:1, http://r2:2,",
		"VAULT_NAMESPACE": "v", "BAO_NAMESPACE": "b", "VAULT_CACERT": "/ca", "VAULT_SKIP_VERIFY": "true", "BAO_CLIENT_TIMEOUT": "7",
	}
	get := func(k string) string { return env[k] }
	got, err := FromEnv(get, home)
	want := Config{Addresses: []string{"http://r1:1", "http://r2:2"}, Token: "file-token", Namespace: "b", CACert: "/ca", SkipVerify: true, Timeout: 7 * time.Second}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v\n got %+v\nwant %+v", err, got, want)
	}
	env["VAULT_TOKEN"] = "v-token"
	if got, _ := FromEnv(get, home); got.Token != "v-token" {
		t.Errorf("token %q, want the environment's before the file's", got.Token)
	}
	env["ROLLCALL_SKIP_VERIFY"] = "perhaps"
	if _, err := FromEnv(get, home); !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "ROLLCALL_SKIP_VERIFY") {
		t.Errorf("a wrong boolean: %v", err)
	}
}

func TestAConfigThatCannotWorkIsRefused(t *testing.T) {
	for _, c := range []Config{
		{Addresses: []string{"node1:8200"}},
		{Addresses: []string{"ftp://x"}},
		{ClientCert: "a"},
		{Token: "a b"},
		{Timeout: -1},
		{Addresses: []string{"https://x"}, CACert: "/does/not/exist"},
	} {
		if _, err := New(c); !fault.Is(err, fault.Invalid) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

func TestEveryCallCarriesTokenNamespaceAndTheRequestMark(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answerData(w, map[string]string{"token": r.Header.Get("X-Vault-Token"), "ns": r.Header.Get("X-Vault-Namespace"), "mark": r.Header.Get("X-Vault-Request"), "path": r.URL.EscapedPath()})
	}))
	defer s.Close()
	c, err := New(Config{Addresses: []string{s.URL + "/v1/"}, Token: "tok", Namespace: "/team/a/"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	env, err := c.Read(t.Context(), "kv/a b?c", nil)
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"mark":"true","ns":"team/a","path":"/v1/kv/a%20b%3Fc","token":"tok"}`; string(env.Data) != want {
		t.Errorf("got %s, want %s", env.Data, want)
	}
}

func TestAnErrorComesBackWithKindStatusAndText(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusInternalServerError)
		_, _ = io.WriteString(w, `{"errors":["1 error occurred:\n\t* disk is full\n\n"]}`)
	})
	_, err := c.Write(t.Context(), "kv/x", map[string]string{"a": "b"})
	fe, ok := errors.AsType[*fault.Error](err)
	if !ok || fe.Kind != fault.Internal || fe.Code != 500 || fe.Text != "disk is full" {
		t.Fatalf("got %#v", err)
	}
	proxy := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusBadGateway)
		_, _ = io.WriteString(w, "<html>\nbad gateway</html>")
	})
	if _, err := proxy.Catalog(t.Context()); fault.KindOf(err) != fault.OutcomeUnknown || !strings.Contains(err.Error(), "<html> bad gateway</html>") {
		t.Errorf("a proxy's page: %v", err)
	}
}

func TestAbsenceIsNoErrorAndA404WithWarningsIsAnAnswer(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusNotFound)
		switch r.URL.Path {
		case "/v1/kv/none":
			_, _ = io.WriteString(w, `{"errors":[]}`)
		case "/v1/kv/warned":
			_, _ = io.WriteString(w, `{"request_id":"r","data":null,"warnings":["look"]}`)
		default:
			_, _ = io.WriteString(w, `{"errors":["no handler for route"]}`)
		}
	})
	if env, err := c.Read(t.Context(), "kv/none", nil); env != nil || err != nil {
		t.Errorf("nothing there: %v %v", env, err)
	}
	if env, err := c.List(t.Context(), "kv/warned/"); err != nil || env == nil || len(env.Warnings) != 1 {
		t.Errorf("warned: %v %v", env, err)
	}
	if _, err := c.Read(t.Context(), "nope", nil); !fault.Is(err, fault.NotFound) || !strings.Contains(err.Error(), "no handler for route") {
		t.Errorf("no route: %v", err)
	}
}

func TestACallGoesToTheNextNodeWhenTheFirstIsDownAndStaysThere(t *testing.T) {
	var calls atomic.Int32
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		calls.Add(1)
		w.WriteHeader(http.StatusNoContent)
	}))
	defer s.Close()
	c := client(t, deadAddress(t), s.URL)
	for range 2 {
		if _, err := c.Write(t.Context(), "kv/x", nil); err != nil {
			t.Fatal(err)
		}
	}
	if c.Address() != s.URL || calls.Load() != 2 {
		t.Errorf("address %s, %d calls", c.Address(), calls.Load())
	}
}

func TestAFencedNodeIsLeftForAnotherBecauseNothingRan(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }))
	defer s.Close()
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusServiceUnavailable)
		_, _ = io.WriteString(w, `{"errors":["fenced"]}`)
	}, s.URL)
	if _, err := c.Write(t.Context(), "kv/x", nil); err != nil {
		t.Fatal(err)
	}
}

func TestAWriteWhoseAnswerWasLostIsNeverRepeated(t *testing.T) {
	var first, second atomic.Int32
	s := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { second.Add(1) }))
	defer s.Close()
	c := client(t, breaking(t, &first), s.URL)
	_, err := c.Write(t.Context(), "kv/x", map[string]string{"a": "b"})
	if !fault.Is(err, fault.OutcomeUnknown) || first.Load() != 1 || second.Load() != 0 {
		t.Errorf("%v, calls %d and %d", err, first.Load(), second.Load())
	}
}

func TestAGlobalReloadWithAnIDIsAskedForAgainElsewhereAndALocalOneIsNot(t *testing.T) {
	var first atomic.Int32
	var bodies []string
	var mu sync.Mutex
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		raw, _ := io.ReadAll(r.Body)
		mu.Lock()
		bodies = append(bodies, r.Method+" "+r.URL.Path+" "+string(raw))
		mu.Unlock()
		w.WriteHeader(http.StatusAccepted)
		answerData(w, ReloadResponse{ReloadID: "id-1"})
	}))
	defer s.Close()
	c := client(t, breaking(t, &first), s.URL)
	out, _, err := c.Reload(t.Context(), "", ReloadRequest{Plugin: "kv", Scope: "global", ReloadID: "id-1"})
	want := `PUT /v1/sys/plugins/reload/backend {"plugin":"kv","scope":"global","reload_id":"id-1"}`
	if err != nil || out.ReloadID != "id-1" || len(bodies) != 1 || bodies[0] != want {
		t.Fatalf("%v %v\n got %v\nwant %s", out, err, bodies, want)
	}
	local := client(t, breaking(t, &first), s.URL)
	if _, _, err := local.Reload(t.Context(), "", ReloadRequest{Plugin: "kv", ReloadID: "id-2"}); !fault.Is(err, fault.OutcomeUnknown) {
		t.Errorf("a local reload's lost answer: %v", err)
	}
	if len(bodies) != 1 {
		t.Errorf("the local reload was repeated on another node: %v", bodies)
	}
}

func TestARedirectIsFollowedOnceWithMethodBodyAndToken(t *testing.T) {
	var got string
	leader := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		raw, _ := io.ReadAll(r.Body)
		got = r.Method + " " + r.Header.Get(HeaderToken) + " " + string(raw)
		w.WriteHeader(http.StatusNoContent)
	}))
	defer leader.Close()
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, leader.URL+r.URL.Path, http.StatusTemporaryRedirect)
	})
	if _, err := c.Write(t.Context(), "kv/x", map[string]string{"a": "b"}); err != nil {
		t.Fatal(err)
	}
	if got != `PUT tok {"a":"b"}` {
		t.Errorf("got %q", got)
	}
	around := serve(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, r.URL.Path, http.StatusTemporaryRedirect)
	})
	if _, err := around.Catalog(t.Context()); !fault.Is(err, fault.Unavailable) {
		t.Errorf("redirects without end: %v", err)
	}
}

func TestPeersAreLearnedWithoutLeavingTLSAndWithoutDoubles(t *testing.T) {
	var self string
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		answerData(w, Members{Members: []Member{
			{Name: "n1", APIAddress: self},
			{Name: "n2", APIAddress: "http://n2:8200"},
			{Name: "n3", APIAddress: "https://n3:8200"},
			{Name: "n4", APIAddress: "http://n4:8200", Left: true},
			{Name: "n5"},
		}})
	})
	self = c.Address()
	c.LearnPeers(t.Context())
	var got []string
	for _, u := range c.addresses() {
		got = append(got, u.String())
	}
	if want := []string{self, "http://n2:8200"}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// record answers sys/reloads/:id as a node does: at once, or blocking until the index moves.
type record struct {
	mu      sync.Mutex
	r       Reload
	changed chan struct{}
	queries []string
}

func (rec *record) set(f func(*Reload)) {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	f(&rec.r)
	rec.r.Index++
	if rec.changed != nil {
		close(rec.changed)
	}
	rec.changed = make(chan struct{})
}

func (rec *record) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	index := r.URL.Query().Get("index")
	rec.mu.Lock()
	rec.queries = append(rec.queries, r.URL.RequestURI())
	changed := rec.changed
	same := index == fmt.Sprint(rec.r.Index) && !Ended(rec.r.Phase)
	rec.mu.Unlock()
	if same {
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		case <-time.After(5 * time.Second):
		}
	}
	rec.mu.Lock()
	defer rec.mu.Unlock()
	answerData(w, &rec.r)
}

func TestTheWaitSurvivesTheDeathOfTheWatchedNode(t *testing.T) {
	rec := &record{}
	rec.set(func(r *Reload) { r.ID, r.Phase = "r1", PhasePreparing })
	first, second := httptest.NewServer(rec), httptest.NewServer(rec)
	defer second.Close()
	c := client(t, first.URL, second.URL)
	var phases []string
	got, err := c.WaitReload(t.Context(), "r1", Watcher{Changed: func(r *Reload) {
		phases = append(phases, r.Phase)
		switch r.Phase {
		case PhasePreparing: // the node that is being watched dies
			first.CloseClientConnections()
			go func() {
				first.Close()
				rec.set(func(r *Reload) { r.Phase = PhaseCommitted })
			}()
		case PhaseCommitted:
			go rec.set(func(r *Reload) { r.Phase, r.Outcome = PhaseDone, OutcomeSucceeded })
		}
	}})
	if err != nil || got.Outcome != OutcomeSucceeded {
		t.Fatalf("%+v, %v", got, err)
	}
	if want := []string{PhasePreparing, PhaseCommitted, PhaseDone}; !reflect.DeepEqual(phases, want) {
		t.Errorf("saw %v, want %v", phases, want)
	}
	if c.Address() != second.URL {
		t.Errorf("still asks %s", c.Address())
	}
	if q := rec.queries[0]; q != "/v1/sys/reloads/r1" {
		t.Errorf("first query %s", q)
	}
}

func TestTheWaitGoesOnWhileNoNodeAnswersAndEndsWithItsContext(t *testing.T) {
	c := client(t, deadAddress(t))
	ctx, cancel := context.WithCancel(t.Context())
	troubles := 0
	_, err := c.WaitReload(ctx, "r1", Watcher{Trouble: func(err error) {
		if !fault.Is(err, fault.Unavailable) {
			t.Errorf("trouble %v", err)
		}
		if troubles++; troubles == 2 {
			cancel()
		}
	}})
	if !fault.Is(err, fault.Canceled) || troubles != 2 {
		t.Errorf("%v after %d", err, troubles)
	}
}

func TestTheWaitEndsAtOnceForAnIDThatNobodyKnows(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusNotFound)
		_, _ = io.WriteString(w, `{"errors":["no reload with id \"r1\""]}`)
	})
	if _, err := c.WaitReload(t.Context(), "r1", Watcher{}); !fault.Is(err, fault.NotFound) {
		t.Errorf("got %v", err)
	}
}

func TestEventsAreResumedAfterTheLastOneSeen(t *testing.T) {
	var mu sync.Mutex
	var resumed []string
	next := 1
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		resumed = append(resumed, r.Header.Get("Last-Event-ID")+" "+r.URL.RawQuery)
		w.Header().Set("Content-Type", "text/event-stream")
		_, _ = fmt.Fprintf(w, ": hello\n\nid: %d\nevent: reload\ndata: {\"text\":\ndata: \"number %d\"}\n\n", next, next)
		next++ // the connection ends after every event
	})
	stop := errors.New("enough")
	var got []string
	err := c.Events(t.Context(), "", url.Values{"reload_id": {"r1"}}, func(e Event) error {
		got = append(got, e.ID+" "+e.Type+" "+e.Text)
		if len(got) == 3 {
			return stop
		}
		return nil
	})
	if !errors.Is(err, stop) {
		t.Fatal(err)
	}
	if want := []string{"1 reload number 1", "2 reload number 2", "3 reload number 3"}; !reflect.DeepEqual(got, want) {
		t.Errorf("events %v, want %v", got, want)
	}
	if want := []string{" reload_id=r1", "1 reload_id=r1", "2 reload_id=r1"}; !reflect.DeepEqual(resumed, want) {
		t.Errorf("asked with %q, want %q", resumed, want)
	}
}

func TestHealthIsReadWhateverItsStatus(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.RawQuery != "perfstandbyok=true&standbyok=true" {
			t.Errorf("query %s", r.URL.RawQuery)
		}
		w.WriteHeader(http.StatusServiceUnavailable)
		_, _ = io.WriteString(w, `{"initialized":true,"fenced":true,"fenced_because":"no leader for 6s"}`)
	})
	h, err := c.Health(t.Context())
	if err != nil || !h.Fenced || h.FencedBecause != "no leader for 6s" {
		t.Errorf("%+v, %v", h, err)
	}
}

func TestASnapshotThatBreaksOffIsAnError(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "100")
		_, _ = io.WriteString(w, "half")
	})
	var b bytes.Buffer
	if _, err := c.SnapshotSave(t.Context(), &b); err == nil {
		t.Errorf("%d bytes taken for whole", b.Len())
	}
}

func TestAServerWithoutTLSBehindHTTPSIsExplained(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer s.Close()
	c := client(t, "https"+strings.TrimPrefix(s.URL, "http"))
	if _, err := c.Health(t.Context()); err == nil || !strings.Contains(err.Error(), "use http://") {
		t.Errorf("got %v", err)
	}
	secure := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	secure.Config.ErrorLog = nil
	defer secure.Close()
	c = client(t, secure.URL)
	if _, err := c.Health(t.Context()); err == nil || !strings.Contains(err.Error(), "-ca-cert") {
		t.Errorf("got %v", err)
	}
}
