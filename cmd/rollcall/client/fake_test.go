package client

import (
	"bytes"
	"encoding/json"
	"flag"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"rollcall/node/api"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fake answers from a table and remembers what it was asked.
type fake struct {
	*httptest.Server
	mu      sync.Mutex
	asked   []string
	answers map[string]string // "METHOD path" -> "STATUS body"; what is missing is 204
}

func newFake(t *testing.T, answers map[string]string) *fake {
	t.Helper()
	f := &fake{answers: answers}
	f.Server = httptest.NewServer(f)
	t.Cleanup(f.Close)
	return f
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	raw, _ := io.ReadAll(r.Body)
	key := r.Method + " " + strings.TrimPrefix(r.URL.RequestURI(), "/v1/")
	line := key
	if len(raw) > 0 {
		line += " " + string(raw)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if key != "GET sys/members" { // asked for further addresses only
		f.asked = append(f.asked, line)
	}
	status, body, _ := strings.Cut(f.answers[key], " ")
	switch status {
	case "":
		if r.Method == http.MethodGet {
			w.WriteHeader(http.StatusNotFound)
			_, _ = io.WriteString(w, `{"errors":[]}`)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	case "200":
		_, _ = io.WriteString(w, body)
	case "202":
		w.WriteHeader(http.StatusAccepted)
		_, _ = io.WriteString(w, body)
	case "400":
		w.WriteHeader(http.StatusBadRequest)
		_, _ = io.WriteString(w, body)
	case "403":
		w.WriteHeader(http.StatusForbidden)
		_, _ = io.WriteString(w, body)
	case "424":
		w.WriteHeader(api.StatusOutcomeUnknown)
		_, _ = io.WriteString(w, body)
	case "503":
		w.WriteHeader(http.StatusServiceUnavailable)
		_, _ = io.WriteString(w, body)
	default:
		panic("the fake does not know status " + status)
	}
}

// data is a 200 answer with v as the envelope's data.
func data(v any) string {
	raw, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	env, _ := json.Marshal(api.Envelope{RequestID: "req", Data: raw})
	return "200 " + string(env)
}

// refuse is an error answer.
func refuse(status, text string) string {
	raw, _ := json.Marshal(api.ErrorBody{Errors: []string{text}})
	return status + " " + string(raw)
}

// ran is what a command line did.
type ran struct {
	code        int
	out, stderr string
}

// run runs a command line against addresses, in a pipe.
func run(t *testing.T, env map[string]string, stdin string, args ...string) ran {
	t.Helper()
	var out, stderr bytes.Buffer
	e := &Env{Stdin: strings.NewReader(stdin), Stdout: &out, Stderr: &stderr, Getenv: func(k string) string { return env[k] }, Version: "1.2.3"}
	code := Execute(t.Context(), newTestRoot(e), e, args)
	return ran{code, out.String(), stderr.String()}
}

// golden compares text with a file in testdata.
func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatalf("%v (run with -update to make it)", err)
	}
	if got != string(want) {
		t.Errorf("%s differs (run with -update and review the diff)\n--- got\n%s--- want\n%s", file, got, want)
	}
	for l := range strings.Lines(got) {
		if strings.TrimRight(l, " \n") != strings.TrimRight(l, "\n") {
			t.Errorf("%s: %q ends with blanks", file, l)
		}
	}
	if strings.Contains(got, "\x1b") {
		t.Errorf("%s: escape codes in a pipe", file)
	}
}
