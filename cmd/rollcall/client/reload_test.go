package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"rollcall/node/api"
)

const (
	shaOld = "77aa01bc00000000000000000000000000000000000000000000000000000000"
	shaNew = "3f2a91cc00000000000000000000000000000000000000000000000000000000"
)

// reloadOf is a global reload of kv on three nodes, as it stands right after its entry.
func reloadOf() *api.Reload {
	r := &api.Reload{
		ID: "r1", Selector: api.Selector{Type: "unknown", Plugin: "kv"}, Scope: "global", Strategy: "all-or-nothing", RequestedBy: "token",
		Phase: api.PhasePreparing, EntryIndex: 40, Index: 40, Started: "2026-03-01T12:00:00.100Z", Prepared: "2026-03-01T12:00:00.100Z",
		Expected: []string{"n1", "n2", "n3"}, Answered: []string{}, Pending: []string{"n1", "n2", "n3"},
		Targets: []api.ReloadTarget{{Mount: "kv/", From: api.Spec{Name: "kv", Version: "v1.0.0", SHA256: shaOld}, To: api.Spec{Name: "kv", Version: "v2.0.0", SHA256: shaNew}}},
	}
	for _, n := range r.Expected {
		r.Nodes = append(r.Nodes, api.ReloadNode{Node: n, NodeID: "id-" + n, State: api.NodePending, Mounts: []api.ReloadMount{{Mount: "kv/"}}})
	}
	return r
}

func prepared(r *api.Reload, nodes ...int) {
	for _, i := range nodes {
		r.Nodes[i].State = api.NodePrepared
		r.Nodes[i].Mounts[0].Prepared = true
		r.Nodes[i].Mounts[0].Timings = api.Timings{Verify: 1, Start: 30.4, Handshake: 5, Trial: 12, Ready: 48.4}
	}
}

func commit(r *api.Reload) {
	r.Phase, r.DecidedIndex, r.Committed = api.PhaseCommitted, 42, "2026-03-01T12:00:00.200Z"
	for i := range r.Nodes {
		r.Nodes[i].State = api.NodeSwitching
	}
}

func switched(r *api.Reload, i int) {
	m := &r.Nodes[i].Mounts[0]
	m.Verdict, m.At = api.VerdictSwitched, fmt.Sprintf("2026-03-01T12:00:00.2%d0Z", i+1)
	m.From, m.To = &api.Process{Version: "v1.0.0", SHA256: shaOld, PID: 1}, &api.Process{Version: "v2.0.0", SHA256: shaNew, PID: 2}
	m.HoldMS, m.Timings.Drain = 3.14, 0.42
	m.Requests = api.Requests{Served: 1200 + uint64(i), Held: 4}
	r.Nodes[i].State = api.NodeDone
	r.Answered = append(r.Answered, r.Nodes[i].Node)
	r.Pending = r.Pending[1:]
}

func end(r *api.Reload, phase, outcome string) {
	r.Phase, r.Outcome, r.Ended = phase, outcome, "2026-03-01T12:00:01.300Z"
}

func succeeded() *api.Reload {
	r := reloadOf()
	prepared(r, 0, 1, 2)
	commit(r)
	for i := range r.Nodes {
		switched(r, i)
	}
	end(r, api.PhaseDone, api.OutcomeSucceeded)
	r.P99 = api.P99{Before: 1.2, During: 4.3, After: 1.1}
	return r
}

func aborted() *api.Reload {
	r := reloadOf()
	prepared(r, 0, 2)
	r.Nodes[1].State = api.NodeRefused
	r.Nodes[1].Mounts[0] = api.ReloadMount{
		Mount: "kv/", Verdict: api.VerdictRefused, Phase: "initialize", At: "2026-03-01T12:00:00.190Z",
		Cause: "exec | format error:\nwrong ELF machine", From: &api.Process{Version: "v1.0.0", SHA256: shaOld},
	}
	r.Answered, r.Pending = []string{"n2"}, []string{"n1", "n3"}
	end(r, api.PhaseAborted, api.OutcomeAborted)
	r.Why = "n2 refused"
	return r
}

// partly ended with a node that is down.
func partly() *api.Reload {
	r := succeeded()
	r.Outcome = api.OutcomePartial
	r.Nodes[2].State, r.Nodes[2].Why = api.NodeDown, "its lease is over"
	r.Nodes[2].Mounts[0] = api.ReloadMount{Mount: "kv/", Verdict: api.VerdictPendingDown}
	r.Answered, r.Pending = []string{"n1", "n2"}, []string{"n3"}
	return r
}

func bestEffort() *api.Reload {
	r := partly()
	r.Strategy = "best-effort"
	r.Targets = append(r.Targets, api.ReloadTarget{Mount: "auth/long-name/", Namespace: "team/", From: r.Targets[0].From, To: r.Targets[0].To})
	r.Nodes[1].State = api.NodeRefused
	r.Nodes[1].Mounts = append(r.Nodes[1].Mounts, api.ReloadMount{
		Mount: "auth/long-name/", Namespace: "team/", Verdict: api.VerdictRefused,
		Phase: "start", Cause: "no such file",
	})
	return r
}

func nothing() *api.Reload {
	r := reloadOf()
	r.Targets, r.Nodes, r.Expected, r.Pending = nil, nil, nil, nil
	end(r, api.PhaseDone, api.OutcomeNothing)
	return r
}

func canary() *api.Reload {
	r := reloadOf()
	r.Strategy, r.Paused, r.Why = "canary", true, "too few writes to judge"
	prepared(r, 0)
	commit(r)
	switched(r, 0)
	r.Nodes[1].State, r.Nodes[2].State, r.Nodes[2].Wave, r.Nodes[1].Wave = api.NodePending, api.NodePending, 1, 1
	r.Waves = []api.ReloadWave{
		{Number: 0, Nodes: []string{"n1"}, CommittedIndex: 42, Baking: true, Gate: &api.Gate{Verdict: "inconclusive", Why: "3 writes of 20"}},
		{Number: 1, Nodes: []string{"n2", "n3"}},
	}
	return r
}

func TestTheTableOfVerdictsSaysWhatEveryNodeAnswered(t *testing.T) {
	for name, r := range map[string]*api.Reload{
		"succeeded": succeeded(), "aborted": aborted(), "partly": partly(), "best-effort": bestEffort(), "nothing": nothing(), "canary": canary(),
	} {
		var b bytes.Buffer
		PrintVerdicts(&b, r)
		golden(t, "verdicts-"+name, b.String())
	}
}

func TestTheExitCodeSaysHowAReloadEnded(t *testing.T) {
	failed, rolledBack, wounded := succeeded(), succeeded(), succeeded()
	end(failed, api.PhaseDone, api.OutcomeFailed)
	end(rolledBack, api.PhaseRolledBack, api.OutcomeRolledBack)
	wounded.Unconfirmed = []string{"n2"}
	for _, c := range []struct {
		name string
		r    *api.Reload
		want int
	}{
		{"succeeded", succeeded(), 0},
		{"aborted", aborted(), 3},
		{"failed", failed, 3},
		{"rolled back", rolledBack, 3},
		{"nothing matched", nothing(), 3},
		{"one node down", partly(), 4},
		{"one node down and one refused", bestEffort(), 3},
		{"succeeded, but nobody can say", wounded, 4},
		{"still running", reloadOf(), 4},
		{"paused", canary(), 4},
	} {
		if got := ExitOf(c.r); got != c.want {
			t.Errorf("%s: exit %d, want %d", c.name, got, c.want)
		}
	}
}

// cluster answers for one reload from any number of addresses.
type cluster struct {
	mu      sync.Mutex
	steps   []*api.Reload // what is answered, one step per blocking query
	at      int
	started []string
	onStep  func(step int)
	lost    bool // the answer to the start is lost
}

func (c *cluster) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	answer := func(v any) {
		raw, _ := json.Marshal(v)
		_ = json.NewEncoder(w).Encode(api.Envelope{RequestID: "req", Data: raw, Warnings: nil})
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case r.Method == http.MethodPut:
		var body api.ReloadRequest
		_ = json.NewDecoder(r.Body).Decode(&body)
		c.started = append(c.started, body.ReloadID)
		if c.lost {
			c.lost = false
			conn, _, err := http.NewResponseController(w).Hijack()
			if err == nil {
				_ = conn.Close()
			}
			return
		}
		w.WriteHeader(http.StatusAccepted)
		answer(api.ReloadResponse{ReloadID: body.ReloadID})
	case strings.HasPrefix(r.URL.Path, "/v1/sys/reloads/"):
		if r.URL.Query().Has("index") && c.at < len(c.steps)-1 {
			c.at++
		} else if r.URL.Query().Has("index") { // nothing moves any more
			c.mu.Unlock()
			select {
			case <-r.Context().Done():
			case <-time.After(100 * time.Millisecond):
			}
			c.mu.Lock()
		}
		rec := *c.steps[c.at]
		rec.Index = 40 + uint64(c.at)
		if c.onStep != nil {
			c.onStep(c.at)
		}
		answer(&rec)
	default:
		w.WriteHeader(http.StatusNotFound)
		_, _ = w.Write([]byte(`{"errors":[]}`))
	}
}

// story is a reload from its entry to its end, a picture per event.
func story() []*api.Reload {
	var out []*api.Reload
	for stage := range 4 {
		r := reloadOf()
		if stage > 0 {
			prepared(r, 0, 1, 2)
		}
		if stage > 1 {
			commit(r)
			switched(r, 0)
		}
		if stage > 2 {
			switched(r, 1)
			switched(r, 2)
			end(r, api.PhaseDone, api.OutcomeSucceeded)
		}
		out = append(out, r)
	}
	return out
}

func TestAReloadIsFollowedLineByLineInAPipeAndEndsWithTheTable(t *testing.T) {
	c := &cluster{steps: story()}
	s := httptest.NewServer(c)
	defer s.Close()
	got := run(t, map[string]string{"ROLLCALL_ADDR": s.URL}, "", "plugin", "reload", "-scope=global", "-plugin=kv", "-reload-id=r1")
	if got.code != 0 || got.stderr != "" {
		t.Errorf("exit %d, says %q", got.code, got.stderr)
	}
	golden(t, "follow", got.out)
}

func TestFollowingAsJSONKeepsStandardOutputParsable(t *testing.T) {
	c := &cluster{steps: story()}
	s := httptest.NewServer(c)
	defer s.Close()
	got := run(t, map[string]string{"ROLLCALL_ADDR": s.URL, "ROLLCALL_FORMAT": "json"}, "", "plugin", "reload", "-scope=global", "-plugin=kv")
	var r api.Reload
	if err := json.Unmarshal([]byte(got.out), &r); err != nil || r.Outcome != api.OutcomeSucceeded || got.code != 0 {
		t.Errorf("%v, %+v", err, got)
	}
	if !strings.Contains(got.stderr, "committed, generation 42") {
		t.Errorf("progress: %q", got.stderr)
	}
	if len(c.started) != 1 || len(c.started[0]) != 36 {
		t.Errorf("the reload was given the ids %q", c.started)
	}
}

func TestTheCommandSurvivesTheDeathOfTheNodeItWatches(t *testing.T) {
	c := &cluster{steps: story()}
	first, second := httptest.NewServer(c), httptest.NewServer(c)
	defer second.Close()
	c.onStep = func(step int) {
		if step == 1 {
			go first.CloseClientConnections()
			_ = first.Listener.Close()
		}
	}
	got := run(t, map[string]string{"ROLLCALL_ADDR": first.URL + "," + second.URL}, "", "plugin", "reload", "-scope=global", "-plugin=kv", "-reload-id=r1")
	first.Close()
	if got.code != 0 || !strings.Contains(got.out, "succeeded: 3 of 3 nodes answered") {
		t.Errorf("%+v", got)
	}
}

func TestAStartWhoseAnswerWasLostIsFoundByItsID(t *testing.T) {
	c := &cluster{steps: story(), lost: true}
	s := httptest.NewServer(c)
	defer s.Close()
	got := run(t, map[string]string{"ROLLCALL_ADDR": s.URL}, "", "plugin", "reload", "-plugin=kv")
	if got.code != 0 || len(c.started) != 1 {
		t.Errorf("%+v; started %q", got, c.started)
	}
}

func TestAWaitThatIsTooShortExitsFourAndSaysHowToGoOn(t *testing.T) {
	c := &cluster{steps: story()[:1]}
	s := httptest.NewServer(c)
	defer s.Close()
	got := run(t, map[string]string{"ROLLCALL_ADDR": s.URL}, "", "plugin", "reload", "-scope=global", "-plugin=kv", "-wait=300ms", "-reload-id=r1")
	if got.code != ExitPending || !strings.Contains(got.stderr, "rollcall reloads show -wait=10m r1") {
		t.Errorf("%+v", got)
	}
}

func TestInterruptingTheWaitLeavesTheReloadAloneAndSaysSo(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	queries := 0
	c := &cluster{steps: story()[:1], onStep: func(int) {
		if queries++; queries == 2 { // the first answer has been seen
			cancel()
		}
	}}
	s := httptest.NewServer(c)
	defer s.Close()
	var out, stderr bytes.Buffer
	e := &Env{Stdin: strings.NewReader(""), Stdout: &out, Stderr: &stderr, Getenv: func(k string) string { return map[string]string{"ROLLCALL_ADDR": s.URL}[k] }}
	code := Execute(ctx, newTestRoot(e), e, []string{"reloads", "show", "-wait=1m", "r1"})
	if code != ExitPending || !strings.Contains(out.String(), "preparing: 0 of 3 nodes answered") ||
		!strings.Contains(stderr.String(), "No longer waiting. The reload goes on") {
		t.Errorf("exit %d, %q, %q", code, out.String(), stderr.String())
	}
	if len(c.started) > 0 {
		t.Errorf("started %q", c.started)
	}
}

func TestWhatDidNotGoThroughExitsWithItsCodeAndSaysWhatIsNext(t *testing.T) {
	for _, c := range []struct {
		r    *api.Reload
		code int
		says string
	}{
		{aborted(), 3, "Nothing changed on any node"},
		{partly(), 4, "when they return"},
		{bestEffort(), 3, "rollcall plugin rollback"},
		{nothing(), 3, "rollcall plugin versions"},
	} {
		cl := &cluster{steps: []*api.Reload{c.r}}
		s := httptest.NewServer(cl)
		got := run(t, map[string]string{"ROLLCALL_ADDR": s.URL}, "", "plugin", "reload", "-scope=global", "-plugin=kv", "-reload-id=r1")
		s.Close()
		if got.code != c.code || !strings.Contains(got.stderr, c.says) {
			t.Errorf("%s: %+v", c.r.Outcome, got)
		}
	}
}

func TestCommandsOfOthersChooseTheirExitCode(t *testing.T) {
	var stderr bytes.Buffer
	e := &Env{Stdin: strings.NewReader(""), Stdout: &stderr, Stderr: &stderr, Getenv: func(string) string { return "" }}
	root := newTestRoot(e)
	root.AddCommand(&cobra.Command{Use: "demo", Short: "x", RunE: func(*cobra.Command, []string) error {
		return fmt.Errorf("demo: %w", Exit(ExitReload, errors.New("requests failed")))
	}})
	if code := Execute(t.Context(), root, e, []string{"demo"}); code != ExitReload || !strings.Contains(stderr.String(), "Error: demo: requests failed\n") {
		t.Errorf("exit %d, %q", code, stderr.String())
	}
}

func TestTheOtherTablesAreAligned(t *testing.T) {
	two := []*api.Reload{canary(), succeeded()}
	two[1].ID = "a-longer-id"
	f := newFake(t, map[string]string{
		"GET sys/reloads":    data(api.ReloadList{Keys: []string{"r1", "a-longer-id"}, Reloads: two}),
		"GET sys/reloads/r1": data(canary()),
		"GET sys/plugins/reload/backend/status?reload_id=r1": data(api.ReloadStatus{
			ReloadID: "r1", State: "done", Outcome: "partial",
			Expected: []string{"n1", "n2", "n3"}, Answered: []string{"n1", "n2"}, Pending: []string{"n3"}, Results: map[string]api.NodeResult{
				"n2": {Timestamp: "2026-03-01T12:00:00.2Z", Error: "kv/ refused (start): no such file"}, "n1": {Timestamp: "2026-03-01T12:00:01Z"},
			},
		}),
		"GET sys/plugins/versions": data(api.Versions{Nodes: []string{"n1", "n2", "n3"}, Mounts: []api.MountVersions{
			{Mount: "kv/", Plugin: "kv", Configured: "v2.0.0", Wanted: api.Process{Version: "v2.0.0"}, Nodes: []api.NodeVersion{
				{Node: "n1", Same: true, Running: &api.Process{Version: "v2.0.0"}},
				{Node: "n2", Same: true, Override: "local", Running: &api.Process{Version: "v1.0.0"}, Why: "reloaded on this node alone"},
				{Node: "n3", Why: "does not answer: refused"},
			}},
			{Mount: "auth/jwt/", Namespace: "team/", Plugin: "jwt", Pinned: "v3.0.0", Wanted: api.Process{SHA256: shaOld}, Nodes: []api.NodeVersion{
				{Node: "n1", Running: &api.Process{SHA256: shaNew}},
			}},
		}}),
		"PUT sys/plugins/plan": data(api.Plan{Targets: []api.ReloadTarget{{
			Mount: "kv/", From: api.Spec{Version: "v1.0.0"},
			To: api.Spec{Version: "v2.0.0"},
		}}, Untouched: []api.PlanUntouched{{Mount: "demo/", Why: "it runs the plugin demo"}}, Nodes: []api.PlanNode{
			{Node: "n1", Mounts: []api.PlanMount{{Mount: "kv/", OK: true, Version: "v2.0.0", RSSBytes: 9 << 20, Timings: api.Timings{Ready: 48}}}},
			{Node: "n2", Mounts: []api.PlanMount{{Mount: "kv/", Phase: "verify", Cause: "sha256 differs", SHA256: shaNew}}},
			{Node: "n3", Error: "does not answer"},
		}}),
		"GET sys/plugins/catalog": data(api.Catalog{Detailed: []api.CatalogDetail{
			{Type: "auth", Name: "jwt", SHA256: shaOld},
			{Type: "secret", Name: "kv", Version: "v1.0.0", SHA256: shaNew},
		}}),
		"GET sys/mounts": data(map[string]api.Mount{"kv/": {
			Type: "kv", Accessor: "kv_1234abcd", PluginVersion: "v2.0.0", RunningPluginVersion: "v1.0.0",
			RunningSHA256: shaOld, UUID: "u", Generation: 42, Options: map[string]string{"version": "2"}, Config: api.MountConfig{MaxLeaseTTL: 3600},
		}}),
		"GET sys/seal-status":                              `200 {"type":"none","initialized":true,"version":"1.2.3","storage_type":"raft","cluster_name":"c","cluster_id":"i"}`,
		"GET sys/health?perfstandbyok=true&standbyok=true": `200 {"initialized":true,"node":"n1","standby":true}`,
		"GET sys/leader":                                   `200 {"ha_enabled":true,"leader_address":"http://n2:8200","raft_committed_index":7,"raft_applied_index":6}`,
		"GET sys/storage/raft/configuration": data(api.RaftConfiguration{Config: api.RaftConfig{Servers: []api.RaftServer{
			{NodeID: "id-1", Name: "n1", Address: "n1:8201", Leader: true, Voter: true}, {NodeID: "id-2", Name: "n2", Address: "n2:8201"},
		}}}),
		"GET sys/storage/raft/autopilot/state": data(api.AutopilotState{
			Healthy: true, FailureTolerance: 1, Leader: "id-1", Voters: []string{"id-1", "id-2"},
			Servers: map[string]api.AutopilotServer{"id-1": {Name: "n1", Address: "n1:8201", Status: "leader", Healthy: true, LastContact: "0s", LastIndex: 9}},
		}),
		"GET sys/members": data(api.Members{Members: []api.Member{{
			ID: "id-1", Name: "n1", APIAddress: "http://n1:8200", ClusterAddress: "n1:8201",
			Version: "1.2.3", Leader: true, Self: true, Suffrage: "voter", Gossip: "alive",
		}, {ID: "id-2", Name: "n2", Suffrage: "nonvoter", Gossip: "failed", Fenced: true}}}),
		"GET db/creds/x":   `200 {"request_id":"r","lease_id":"db/creds/x/abc","renewable":true,"lease_duration":3600,"data":{"password":"p","n":12345678901234567890,"l":[1,"a"],"m":{"k":null}},"wrap_info":null,"warnings":["soon gone"],"auth":null}`,
		"PUT auth/x/login": `200 {"request_id":"r","data":null,"warnings":null,"auth":{"client_token":"t","accessor":"a","policies":["default"],"lease_duration":60,"renewable":true}}`,
	})
	for name, c := range map[string]struct {
		line string
		code int
	}{
		"reloads-list": {"reloads list", 0}, "reloads-show": {"reloads show r1", 0}, "reload-status": {"plugin reload-status r1", 0},
		"versions": {"plugin versions -check", 3}, "plan": {"plugin plan -plugin=kv", 3}, "plugin-list": {"plugin list -detailed", 0},
		"secrets-list": {"secrets list -detailed", 0}, "status": {"status", 0}, "list-peers": {"operator raft list-peers", 0},
		"autopilot": {"operator raft autopilot state", 0}, "members": {"operator members", 0}, "read-lease": {"read db/creds/x", 0},
		"read-json": {"read -format=json db/creds/x", 0}, "login": {"write auth/x/login role=r", 0}, "login-field": {"write -field=token auth/x/login role=r", 0},
	} {
		got := run(t, map[string]string{"ROLLCALL_ADDR": f.URL}, "", strings.Fields(c.line)...)
		if got.code != c.code {
			t.Errorf("%s: %+v", c.line, got)
		}
		golden(t, "table-"+name, got.out)
	}
}

func TestATerminalIsRepaintedInPlaceAndNeverOverflows(t *testing.T) {
	var b bytes.Buffer
	p := NewProgress(&b)
	p.size = func() (int, int, bool) { return 60, 20, true }
	p.Update(reloadOf())
	first := strings.Count(b.String(), "\n")
	b.Reset()
	p.Update(succeeded())
	if want := fmt.Sprintf("\x1b[%dA\r\x1b[J", first); !strings.HasPrefix(b.String(), want) {
		t.Errorf("got %q, want it to begin with %q", b.String(), want)
	}
	b.Reset()
	p.Clear()
	if strings.Contains(b.String(), "\n") || p.lines != 0 {
		t.Errorf("clearing left %q", b.String())
	}
	many := reloadOf()
	for i := range 100 {
		n := many.Nodes[0]
		n.Node, n.NodeID = fmt.Sprintf("n-with-a-rather-long-name-%03d", i), fmt.Sprint(i)
		n.Why = strings.Repeat("because ", 20)
		many.Nodes = append(many.Nodes, n)
	}
	block := p.block(many, 60, 20)
	if len(block) >= 20 {
		t.Errorf("%d lines on 20", len(block))
	}
	for _, l := range block {
		if n := len([]rune(l)); n >= 60 {
			t.Errorf("%d columns on 60: %q", n, l)
		}
	}
	p.color = true
	if block := p.block(succeeded(), 80, 20); !strings.Contains(strings.Join(block, "\n"), green) {
		t.Errorf("no color: %q", block)
	}
}

func TestLengthsOfTimeFitTheirCells(t *testing.T) {
	for ms, want := range map[float64]string{0: "-", 0.05: "<0.1ms", 0.42: "0.4ms", 3.14: "3.1ms", 48.4: "48ms", 1234: "1.2s"} {
		if got := millis(ms); got != want {
			t.Errorf("%v is %q, want %q", ms, got, want)
		}
	}
}
