package lease

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"rollcall/fsm"
	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
	pluginpb "rollcall/proto/plugin"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is a log without consensus, a keeper, and a plugin that remembers what it has lent out.
type world struct {
	t     testing.TB
	fsm   *fsm.FSM
	k     *Keeper
	reg   *prometheus.Registry
	mount *commandv1.Mount

	mu    sync.Mutex
	index uint64
	term  uint64
	// refuse, when set, refuses a proposal.
	refuse func(*commandv1.Command) error

	plugin plugin
}

// plugin is the outside: which secrets are open, and what it was asked.
type plugin struct {
	mu      sync.Mutex
	revoked map[string]int
	renewed map[string]time.Duration
	fail    func(id string) error
	hang    map[string]chan struct{}
	running int
	most    int
}

func newWorld(t testing.TB, change func(*Config)) *world {
	w := &world{t: t, fsm: fsm.New(), term: 1, reg: prometheus.NewRegistry()}
	w.plugin.revoked, w.plugin.renewed, w.plugin.hang = map[string]int{}, map[string]time.Duration{}, map[string]chan struct{}{}
	w.must(&commandv1.Command{Body: &commandv1.Command_InitCluster{InitCluster: fsm.NewCluster("c", "test", "root")}})
	w.must(&commandv1.Command{Body: &commandv1.Command_RegisterPlugin{RegisterPlugin: &commandv1.RegisterPlugin{
		Spec: &commandv1.Spec{Type: "secret", Name: "db", Sha256: strings.Repeat("ab", 32), Command: "db"},
	}}})
	w.pass(time.Second)
	w.mount = w.enable("db/")
	cfg := Config{
		State: w.fsm, Replica: w, Plugins: w, Logger: slog.New(slog.DiscardHandler), Registerer: w.reg,
		TTLs:  func(*commandv1.Mount) (time.Duration, time.Duration) { return time.Hour, 10 * time.Hour },
		Retry: 5 * time.Millisecond, RetryMax: 20 * time.Millisecond,
	}
	if change != nil {
		change(&cfg)
	}
	k, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	w.k = k
	return w
}

func (w *world) enable(path string) *commandv1.Mount {
	res := w.must(&commandv1.Command{Body: &commandv1.Command_EnableMount{EnableMount: &commandv1.EnableMount{
		Uuid: "uuid-" + path, Accessor: "acc-" + path, Table: "secret", Path: path, Type: "db", PluginType: "secret",
	}}})
	return w.fsm.View().Mount(res.GetId())
}

func (w *world) must(cmd *commandv1.Command) *commandv1.Result {
	w.t.Helper()
	res, err := w.Propose(w.t.Context(), cmd)
	if err != nil {
		w.t.Fatal(err)
	}
	return res
}

func (w *world) Propose(_ context.Context, cmd *commandv1.Command) (*commandv1.Result, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.refuse != nil {
		if err := w.refuse(cmd); err != nil {
			return nil, err
		}
	}
	data, err := proto.Marshal(cmd)
	if err != nil {
		return nil, err
	}
	w.index++
	res, ok := w.fsm.Apply(&raft.Log{Index: w.index, Term: w.term, Type: raft.LogCommand, Data: data}).(*commandv1.Result)
	if !ok {
		return nil, errors.New("no result")
	}
	return res, fsm.Err(res)
}

func (w *world) ProposeAsLeader(ctx context.Context, term uint64, cmd *commandv1.Command) (*commandv1.Result, error) {
	w.mu.Lock()
	now := w.term
	w.mu.Unlock()
	if term != now {
		return nil, fault.Text(fault.NotLeader, "the term is over")
	}
	return w.Propose(ctx, cmd)
}

// Call is the plugin.
func (w *world) Call(ctx context.Context, m *commandv1.Mount, op, path string, data json.RawMessage, secret *pluginpb.Secret) (*pluginpb.Response, error) {
	p, id := &w.plugin, secret.GetLeaseId()
	p.mu.Lock()
	hang := p.hang[m.GetPath()]
	p.running++
	p.most = max(p.most, p.running)
	p.mu.Unlock()
	defer func() { p.mu.Lock(); p.running--; p.mu.Unlock() }()
	if hang != nil {
		select {
		case <-hang:
		case <-ctx.Done():
			return nil, fault.Wrap(ctx.Err(), "call", "plugin")
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fail != nil {
		if err := p.fail(id); err != nil {
			return nil, err
		}
	}
	if secret.GetInternalData() != `{"user":"u"}` || path != "creds/x" || string(data) != `{"password":"p"}` {
		return nil, fault.Text(fault.Internal, "asked about something else: %s %s %v", path, data, secret)
	}
	if op == "revoke" {
		p.revoked[id]++
		return nil, nil
	}
	p.renewed[id] = time.Duration(secret.GetLeaseOptions().GetIncrement())
	back := proto.CloneOf(secret)
	back.LeaseOptions.TTL = secret.GetLeaseOptions().GetIncrement()
	return &pluginpb.Response{Secret: back, Warnings: []string{"renewed"}}, nil
}

// lend grants a lease of the plugin.
func (w *world) lend(m *commandv1.Mount, token []byte, ttl time.Duration) string {
	w.t.Helper()
	secret := &pluginpb.Secret{InternalData: `{"user":"u"}`, LeaseOptions: &pluginpb.LeaseOptions{TTL: int64(ttl), Renewable: true}}
	if err := w.k.Grant(w.t.Context(), m, "creds/x", token, secret, `{"password":"p"}`); err != nil {
		w.t.Fatal(err)
	}
	return secret.GetLeaseId()
}

func (w *world) pass(d time.Duration) {
	for ; d > 0; d -= time.Minute {
		w.must(&commandv1.Command{ElapsedNs: uint64(min(d, time.Minute)), Body: &commandv1.Command_Tick{Tick: &commandv1.Tick{}}})
	}
}

func (w *world) token(name string, ttl time.Duration) []byte {
	hash := w.fsm.View().HashToken(name)
	w.must(&commandv1.Command{Body: &commandv1.Command_PutToken{PutToken: &commandv1.PutToken{
		Token: &commandv1.Token{Hash: hash, Accessor: "acc-" + name, TtlNs: uint64(ttl)},
	}}})
	return hash
}

// lead runs a leadership until the returned function ends it.
func (w *world) lead() (end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	w.mu.Lock()
	term := w.term
	w.mu.Unlock()
	go func() { defer close(done); w.k.Lead(ctx, term) }()
	var once sync.Once
	end = func() { once.Do(func() { cancel(); <-done }) }
	w.t.Cleanup(end)
	return end
}

func (w *world) until(what string, ok func() bool) {
	w.t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			w.t.Fatal("never: " + what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func (w *world) count(id string) int {
	w.plugin.mu.Lock()
	defer w.plugin.mu.Unlock()
	return w.plugin.revoked[id]
}

func TestALeaseIsNamedAndBoundedBeforeTheSecretIsSeen(t *testing.T) {
	w := newWorld(t, nil)
	id := w.lend(w.mount, nil, 20*time.Hour)
	if !strings.HasPrefix(id, "db/creds/x/") || len(id) != len("db/creds/x/")+24 {
		t.Errorf("id %q", id)
	}
	l := w.fsm.View().Lease(id)
	if got := time.Duration(l.GetTtlNs()); got != 10*time.Hour {
		t.Errorf("the mount's longest lease is 10h, this one has %s", got)
	}
	if id := w.lend(w.mount, nil, 0); time.Duration(w.fsm.View().Lease(id).GetTtlNs()) != time.Hour {
		t.Error("a secret without a TTL does not get the mount's default")
	}
	if got := testutil.ToFloat64(w.k.metrics.events.WithLabelValues("granted")); got != 2 {
		t.Errorf("%v granted", got)
	}
}

func TestWhatIsDueIsGivenBackThroughThePluginOnce(t *testing.T) {
	w := newWorld(t, nil)
	short, long := w.lend(w.mount, nil, time.Minute), w.lend(w.mount, nil, time.Hour)
	w.lead()
	w.pass(2 * time.Minute)
	w.until("the lease is gone", func() bool { return w.fsm.View().Lease(short) == nil })
	if w.count(short) != 1 || w.count(long) != 0 || w.fsm.View().Lease(long) == nil {
		t.Errorf("revoked %d and %d times", w.count(short), w.count(long))
	}
}

func TestARevocationIsTriedUntilThePluginDoesIt(t *testing.T) {
	w := newWorld(t, nil)
	id := w.lend(w.mount, nil, time.Minute)
	fails := 5
	w.plugin.fail = func(string) error {
		if fails--; fails >= 0 {
			return fault.Text(fault.Unavailable, "the database is away")
		}
		return nil
	}
	w.lead()
	w.pass(time.Minute)
	w.until("the lease is gone", func() bool { return w.fsm.View().Lease(id) == nil })
	if got := testutil.ToFloat64(w.k.metrics.events.WithLabelValues("revoke_failed")); got != 5 {
		t.Errorf("%v failures counted", got)
	}
}

// TestAPluginThatHangsHoldsUpNobodyElse: its leases wait, those of others do not, and there are never more at once than said.
func TestAPluginThatHangsHoldsUpNobodyElse(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Workers, c.PerMount = 4, 2 })
	other := w.enable("other/")
	w.plugin.hang["db/"] = make(chan struct{})
	for range 20 {
		w.lend(w.mount, nil, time.Minute)
	}
	var ids []string
	for range 20 {
		ids = append(ids, w.lend(other, nil, 2*time.Minute))
	}
	w.lead()
	w.pass(3 * time.Minute)
	w.until("the other mount's leases are gone", func() bool { return len(w.fsm.View().LeasesOfMount(other.GetUuid())) == 0 })
	if n := len(w.fsm.View().LeasesOfMount(w.mount.GetUuid())); n != 20 {
		t.Errorf("%d leases of the plugin that hangs", n)
	}
	close(w.plugin.hang["db/"])
	w.until("all leases are gone", func() bool { return w.fsm.View().LeaseCount() == 0 })
	if w.plugin.most > 4 {
		t.Errorf("%d at once", w.plugin.most)
	}
	for _, id := range ids {
		if w.count(id) != 1 {
			t.Errorf("%s was revoked %d times", id, w.count(id))
		}
	}
}

// TestFailuresDoNotHideWhatComesAfterThem: many leases that cannot be revoked do not keep a later one waiting.
func TestFailuresDoNotHideWhatComesAfterThem(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Retry, c.RetryMax = time.Hour, time.Hour; c.Workers, c.PerMount = 64, 64 })
	for range batch + 50 {
		w.lend(w.mount, nil, time.Minute)
	}
	last := w.lend(w.enable("ok/"), nil, 2*time.Minute)
	w.plugin.fail = func(id string) error {
		if id != last {
			return fault.Text(fault.Invalid, "no")
		}
		return nil
	}
	w.lead()
	w.pass(3 * time.Minute)
	w.until("the last one is gone", func() bool { return w.fsm.View().Lease(last) == nil })
}

func TestARenewalMovesTheEndUnderItsCap(t *testing.T) {
	w := newWorld(t, nil)
	id := w.lend(w.mount, nil, time.Hour)
	w.pass(30 * time.Minute)
	r, err := w.k.Renew(t.Context(), id, 2*time.Hour, nil)
	if err != nil || r.TTL != 2*time.Hour || !r.Renewable || len(r.Warnings) != 1 {
		t.Fatalf("%+v, %v", r, err)
	}
	if got := time.Duration(w.fsm.View().Lease(id).GetExpiresClockNs() - w.fsm.View().ClockNS()); got != 2*time.Hour {
		t.Errorf("it ends in %s", got)
	}
	if r, err = w.k.Renew(t.Context(), id, 100*time.Hour, nil); err != nil || r.TTL != 9*time.Hour+30*time.Minute {
		t.Errorf("%+v, %v: not capped at ten hours from its beginning", r, err)
	}
	for name, c := range map[string]func() error{
		"unknown": func() error { _, err := w.k.Renew(t.Context(), "nope", 0, nil); return err },
		"by a token that is gone": func() error {
			_, err := w.k.Renew(t.Context(), id, time.Hour, w.fsm.View().HashToken("gone"))
			return err
		},
		"refused by the plugin": func() error {
			w.plugin.fail = func(string) error { return fault.Text(fault.Invalid, "no") }
			defer func() { w.plugin.fail = nil }()
			_, err := w.k.Renew(t.Context(), id, time.Hour, nil)
			return err
		},
		"expired": func() error {
			w.pass(10 * time.Hour)
			_, err := w.k.Renew(t.Context(), id, time.Hour, nil)
			return err
		},
	} {
		if name != "expired" && c() == nil {
			t.Errorf("%s: renewed", name)
		}
	}
	w.pass(10 * time.Hour)
	if _, err := w.k.Renew(t.Context(), id, time.Hour, nil); !fault.Is(err, fault.Invalid) {
		t.Errorf("expired: %v", err)
	}
}

// TestARenewalThatLosesToARevocationBringsNothingBack: the entry decides, not who looked first.
func TestARenewalThatLosesToARevocationBringsNothingBack(t *testing.T) {
	w := newWorld(t, nil)
	id := w.lend(w.mount, nil, time.Hour)
	w.plugin.fail = func(string) error { // the plugin renews, and meanwhile the lease is revoked
		w.plugin.fail = nil
		w.must(&commandv1.Command{Body: &commandv1.Command_RevokeLeases{RevokeLeases: &commandv1.RevokeLeases{Id: id}}})
		return nil
	}
	if _, err := w.k.Renew(t.Context(), id, time.Hour, nil); !fault.Is(err, fault.Invalid) {
		t.Fatalf("%v", err)
	}
	if l := w.fsm.View().Lease(id); l.GetExpiresClockNs() > w.fsm.View().ClockNS() {
		t.Error("the lease lives again")
	}
}

func TestLeasesGoWithTheirToken(t *testing.T) {
	w := newWorld(t, nil)
	hash := w.token("tok", time.Minute)
	id, free := w.lend(w.mount, hash, time.Hour), w.lend(w.mount, nil, time.Hour)
	w.lead()
	w.pass(time.Minute)
	w.until("token and lease are gone", func() bool {
		return w.fsm.View().TokenByHash(hash) == nil && w.fsm.View().Lease(id) == nil
	})
	if w.count(id) != 1 || w.fsm.View().Lease(free) == nil {
		t.Error("the wrong lease was ended")
	}
	if got := testutil.ToFloat64(w.k.metrics.tokensExpired); got != 1 {
		t.Errorf("%v tokens expired", got)
	}
}

func TestASecretForATokenThatIsGoneIsTakenBack(t *testing.T) {
	w := newWorld(t, nil)
	secret := &pluginpb.Secret{InternalData: `{"user":"u"}`}
	err := w.k.Grant(t.Context(), w.mount, "creds/x", w.fsm.View().HashToken("gone"), secret, `{"password":"p"}`)
	if !fault.Is(err, fault.Denied) {
		t.Fatal(err)
	}
	w.lead()
	w.pass(time.Second)
	w.until("the plugin has it back", func() bool { return w.count(secret.GetLeaseId()) == 1 })
	w.until("nothing is left", func() bool { return w.fsm.View().LeaseCount() == 0 })
}

func TestARevocationIsWaitedForOnAnyNode(t *testing.T) {
	w := newWorld(t, nil)
	var ids []string
	for range 5 {
		ids = append(ids, w.lend(w.mount, nil, time.Hour))
	}
	w.lead()
	if left, err := w.k.Revoke(t.Context(), &commandv1.RevokeLeases{Id: ids[0]}, nil, 5*time.Second); left != 0 || err != nil {
		t.Fatalf("%d left, %v", left, err)
	}
	if left, err := w.k.Revoke(t.Context(), &commandv1.RevokeLeases{Prefix: "db/creds/"}, nil, 5*time.Second); left != 0 || err != nil {
		t.Fatalf("%d left, %v", left, err)
	}
	for _, id := range ids {
		if w.count(id) != 1 {
			t.Errorf("%s revoked %d times", id, w.count(id))
		}
	}
	stuck := w.lend(w.mount, nil, time.Hour)
	w.plugin.fail = func(string) error { return fault.Text(fault.Invalid, "the user is logged in") }
	left, err := w.k.Revoke(t.Context(), &commandv1.RevokeLeases{Id: stuck}, nil, 300*time.Millisecond)
	if left != 1 || err == nil || !strings.Contains(err.Error(), "the user is logged in") {
		t.Fatalf("%d left, %v", left, err)
	}
	if left, err := w.k.Revoke(t.Context(), &commandv1.RevokeLeases{Prefix: "db/", Force: true}, nil, time.Second); left != 0 || err != nil {
		t.Fatalf("by force: %d left, %v", left, err)
	}
	if _, err := w.k.Revoke(t.Context(), &commandv1.RevokeLeases{Id: stuck}, w.fsm.View().HashToken("gone"), time.Second); !fault.Is(err, fault.Denied) {
		t.Errorf("by a token that is gone: %v", err)
	}
}

// TestAChangeOfLeaderLosesNoRevocation: what one leader has begun the next one finishes, and the old one enters nothing.
func TestAChangeOfLeaderLosesNoRevocation(t *testing.T) {
	w := newWorld(t, nil)
	for range 30 {
		w.lend(w.mount, nil, time.Minute)
	}
	hang := make(chan struct{})
	w.plugin.hang["db/"] = hang
	end := w.lead()
	w.pass(time.Minute)
	w.until("the old leader is at it", func() bool { w.plugin.mu.Lock(); defer w.plugin.mu.Unlock(); return w.plugin.running > 0 })
	w.mu.Lock()
	w.term++
	w.mu.Unlock()
	w.plugin.mu.Lock()
	delete(w.plugin.hang, "db/")
	w.plugin.mu.Unlock()
	w.lead()
	w.until("all leases are gone", func() bool { return w.fsm.View().LeaseCount() == 0 })
	close(hang)
	end()
	w.plugin.mu.Lock()
	defer w.plugin.mu.Unlock()
	if len(w.plugin.revoked) != 30 {
		t.Errorf("%d of 30 were given back", len(w.plugin.revoked))
	}
}

func TestAConfigWithoutItsPartsIsRefused(t *testing.T) {
	if _, err := New(Config{}); !fault.Is(err, fault.Invalid) {
		t.Error(err)
	}
}
