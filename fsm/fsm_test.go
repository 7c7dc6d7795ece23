package fsm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"google.golang.org/protobuf/proto"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
)

func TestAWaiterWakesWhenItsCommandIsApplied(t *testing.T) {
	w := newWorld(t)
	w.play("init")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var wg sync.WaitGroup
	errs := make(chan error, 50)
	for i := range 50 {
		wg.Go(func() { errs <- w.f.WaitIndex(ctx, uint64(i%10)+1) })
	}
	for range 9 {
		w.apply(w.parse("tick"))
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
	past, end := context.WithCancel(ctx)
	end()
	err := w.f.WaitIndex(past, 999)
	if !fault.Is(err, fault.Canceled) || !errors.Is(err, context.Canceled) {
		t.Fatalf("waiting with a context that has ended answered %v", err)
	}
}

func TestChangedIsClosedByTheNextEntryAndTheViewShowsIt(t *testing.T) {
	w := newWorld(t)
	ch := w.f.Changed()
	before := w.f.View()
	w.play("init")
	select {
	case <-ch:
	default:
		t.Fatal("the channel is open after an entry")
	}
	if before.Initialized() || !w.f.View().Initialized() || w.f.View().ClusterID() != "c1" {
		t.Fatal("a view changed, or the new one shows nothing new")
	}
	if a, b := w.f.View(), w.f.View(); a != b {
		t.Fatal("two views of one state")
	}
}

// witness records what observers are told.
type witness struct {
	keys     []string
	restored []uint64
	told     atomic.Int64 // how many keys
}

func (w *witness) StorageChanged(_ string, keys []string, _ uint64) {
	w.keys = append(w.keys, keys...)
	w.told.Add(int64(len(keys)))
}

func (w *witness) Restored(index uint64) { w.restored = append(w.restored, index) }

func TestObserversHearOfStorageBeforeAnybodySeesIt(t *testing.T) {
	w := newWorld(t)
	o := &witness{}
	w.f.Observe(o)
	w.play("init\nhello n1\nregister kv v1.0.0\nenable kv/\ntakeover kv/ n1 writes=x\nput kv/ a 1\nput kv/ a 2 epoch=1\ndelete kv/ a")
	if !slices.Equal(o.keys, []string{"x", "a", "a"}) {
		t.Fatalf("told of %q", o.keys)
	}
	mount := w.f.View().Mounts()[0].GetUuid()
	before, ended, read := o.told.Load(), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(read)
		for {
			n, _ := strconv.ParseInt(string(w.f.View().StorageGet(mount, "n").GetValue()), 10, 64)
			if told := o.told.Load() - before; told < n {
				t.Errorf("write %d is visible, and observers were told of %d", n, told)
				return
			}
			select {
			case <-ended:
				return
			default:
			}
		}
	}()
	for i := range 300 {
		w.play(fmt.Sprintf("put kv/ n %d", i+1))
	}
	close(ended)
	<-read
	if err := w.f.Restore(readCloser{bytes.NewReader(snapshotBytes(t, w.f))}); err != nil {
		t.Fatal(err)
	}
	if len(o.restored) != 1 || o.restored[0] != w.index {
		t.Fatalf("told of restores %v", o.restored)
	}
}

func TestABatchAnswersEveryCommandAndNothingElse(t *testing.T) {
	cmd, err := proto.Marshal(&commandv1.Command{Body: &commandv1.Command_InitCluster{InitCluster: NewCluster("c", "", "t")}})
	if err != nil {
		t.Fatal(err)
	}
	f := New()
	out := f.ApplyBatch([]*raft.Log{
		{Index: 1, Term: 1, Type: raft.LogCommand, Data: cmd},
		{Index: 2, Term: 1, Type: raft.LogConfiguration, Data: []byte("x")},
		{Index: 3, Term: 1, Type: raft.LogCommand, Data: []byte("\xff\xff")},
		{Index: 4, Term: 1, Type: raft.LogCommand},
	})
	if len(out) != 4 || out[1] != nil {
		t.Fatalf("answers: %v", out)
	}
	if err := Err(out[0].(*commandv1.Result)); err != nil {
		t.Fatal(err)
	}
	for _, i := range []int{2, 3} {
		if err := Err(out[i].(*commandv1.Result)); !fault.Is(err, fault.Invalid) {
			t.Errorf("entry %d, which is no command, answered %v", i+1, err)
		}
	}
	if f.Index() != 4 {
		t.Errorf("the index is %d: a rejected command must count", f.Index())
	}
	again := f.Apply(&raft.Log{Index: 3, Term: 1, Type: raft.LogCommand, Data: cmd}).(*commandv1.Result)
	if !fault.Is(Err(again), fault.Stale) || f.Index() != 4 {
		t.Errorf("an entry from the past answered %v, index %d", again, f.Index())
	}
}

func TestTheClockNeverJumps(t *testing.T) {
	w := newWorld(t)
	w.play("init")
	for range 3 {
		w.apply(&commandv1.Command{ElapsedNs: 1 << 62, Body: &commandv1.Command_Tick{Tick: &commandv1.Tick{}}})
	}
	if got := w.f.View().ClockNS(); got != 3*MaxElapsed {
		t.Fatalf("three lies moved the clock by %v", time.Duration(got))
	}
}

func TestTheRequestHashTakesInWhatTheRequestIs(t *testing.T) {
	base := &commandv1.StartReload{
		Id: "a", Selector: &commandv1.Selector{Plugin: "kv"}, Scope: commandv1.Scope_SCOPE_GLOBAL, ServingNode: "n1",
		RequestedBy: "me", LeaderId: "n1", Options: &commandv1.Options{PrepareMs: 5},
	}
	change := func(f func(*commandv1.StartReload)) []byte {
		c := clone(base)
		f(c)
		return RequestHash(c)
	}
	same := change(func(*commandv1.StartReload) {})
	for name, f := range map[string]func(*commandv1.StartReload){
		"id":             func(c *commandv1.StartReload) { c.Id = "b" },
		"requester":      func(c *commandv1.StartReload) { c.RequestedBy = "you" },
		"leader":         func(c *commandv1.StartReload) { c.LeaderId = "n2" },
		"node, globally": func(c *commandv1.StartReload) { c.ServingNode = "n2" },
		"hash":           func(c *commandv1.StartReload) { c.RequestHash = []byte{1} },
	} {
		if !bytes.Equal(change(f), same) {
			t.Errorf("another %s makes another request", name)
		}
	}
	local := change(func(c *commandv1.StartReload) { c.Scope = commandv1.Scope_SCOPE_LOCAL })
	for name, f := range map[string]func(*commandv1.StartReload){
		"plugin":   func(c *commandv1.StartReload) { c.Selector.Plugin = "x" },
		"option":   func(c *commandv1.StartReload) { c.Options.PrepareMs = 6 },
		"scope":    func(c *commandv1.StartReload) { c.Scope = commandv1.Scope_SCOPE_LOCAL },
		"rollback": func(c *commandv1.StartReload) { c.ToPrevious = true },
	} {
		if bytes.Equal(change(f), same) {
			t.Errorf("another %s makes no other request", name)
		}
	}
	other := change(func(c *commandv1.StartReload) { c.Scope, c.ServingNode = commandv1.Scope_SCOPE_LOCAL, "n2" })
	if bytes.Equal(local, other) {
		t.Error("a local reload of another node is the same request")
	}
}

func TestViewsAreReadWhileEntriesAreApplied(t *testing.T) {
	w := newWorld(t)
	w.play("init\nhello n1\nregister kv v1.0.0\nenable kv/\ntakeover kv/ n1")
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				v := w.f.View()
				n := len(v.StorageList("uuid-of-kv/", ""))
				if want := int(v.Index()) - 5; n != want {
					t.Errorf("a view of index %d shows %d keys, not %d", v.Index(), n, want)
					return
				}
				if s, err := w.f.Snapshot(); err != nil || s == nil {
					t.Error("no snapshot")
					return
				}
			}
		})
	}
	for i := range 500 {
		op := &commandv1.StorageOp{Key: string(rune('a'+i%26)) + string(rune('a'+i/26)), Value: []byte{1}}
		w.apply(&commandv1.Command{Body: &commandv1.Command_WriteStorage{WriteStorage: &commandv1.WriteStorage{
			MountUuid: "uuid-of-kv/", Epoch: 5, Term: 1, Ops: []*commandv1.StorageOp{op},
		}}})
	}
	close(stop)
	wg.Wait()
}

func TestViewsAnswerWhatTheTranscriptsDoNotAsk(t *testing.T) {
	w := newWorld(t)
	w.play("init\nhello n1 name=one\nregister kv v1.0.0\nregister kv v2.0.0\npin kv v1.0.0\nnamespace team/\nenable kv/ ns=team/\n" +
		"policy b x\npolicy a x\npolicy c x ns=team/\ntoken t ttl=1h\nlease l1 nowhere/")
	w.apply(&commandv1.Command{Body: &commandv1.Command_PutLease{PutLease: &commandv1.PutLease{Lease: &commandv1.Lease{
		Id: "l2", MountUuid: "uuid-of-team/kv/", TokenHash: hashOf("t"), TtlNs: 5,
	}}}})
	v := w.f.View()
	m := v.MountAt("team/", "secret", "kv/")
	if m == nil || v.Mount(m.GetUuid()) != m || v.MountNamed("", "kv") != nil {
		t.Error("mounts are not found where they are")
	}
	if v.NodeByName("one").GetId() != "n1" || v.NodeByName("two") != nil || v.Node("n1") == nil {
		t.Error("nodes are not found by name")
	}
	if v.Pin("secret", "kv").GetVersion() != "v1.0.0" || len(v.Pins()) != 1 || len(v.Plugins()) != 2 || v.Plugin("secret", "kv", "v2.0.0") == nil {
		t.Error("the catalog is not found")
	}
	if s, err := v.ResolveReload(m, ""); err != nil || s.GetVersion() != "v1.0.0" {
		t.Errorf("a reload would run %v, %v", s, err)
	}
	if !v.HasNamespace("") || !v.HasNamespace("team/") || v.HasNamespace("team") || v.Namespace("team/") == nil {
		t.Error("namespaces are not found")
	}
	if p := v.Policies(""); len(p) != 2 || p[0].GetName() != "a" || v.Policy("team/", "c") == nil || v.Policy("", "c") != nil {
		t.Errorf("policies: %v", p)
	}
	tok := v.TokenByHash(hashOf("t"))
	if tok == nil || v.TokenByAccessor("acc-t") != tok || v.TokenByAccessor("") != nil || v.TokenByHash(v.HashToken("root-token")) == nil {
		t.Error("tokens are not found")
	}
	if len(v.LeasesOfMount(m.GetUuid())) != 1 || len(v.LeasesOfToken(hashOf("t"))) != 1 || v.Lease("l2") == nil || v.Lease("l1") != nil {
		t.Error("leases are not found")
	}
	if !v.CanExpire() || v.NextExpiry() != 5 {
		t.Errorf("expiry: %v, next %d", v.CanExpire(), v.NextExpiry())
	}
	if tokens, leases := v.Expired(5, 10); len(tokens) != 0 || len(leases) != 1 {
		t.Errorf("expired at 5: %d tokens, %d leases", len(tokens), len(leases))
	}
	if !NewerVersion("v10.0.0", "v9.0.0") || NewerVersion("", "v1.0.0") || NewerVersion("v1.0.0-rc1", "v1.0.0") {
		t.Error("versions are out of order")
	}
	if c, err := CanonicalVersion("1.2"); err != nil || c != "v1.2.0" {
		t.Errorf("1.2 is %q, %v", c, err)
	}
	if v.Term() != 1 || v.ClusterName() != "test" {
		t.Error("the cluster's facts are wrong")
	}
}

func TestOversizedAndMalformedCommandsAreRefused(t *testing.T) {
	w := newWorld(t)
	w.play("init\nhello n1\nregister kv v1.0.0\nenable kv/\ntakeover kv/ n1\nreload r plugin=kv")
	long := string(bytes.Repeat([]byte("x"), maxPolicy+1))
	many := make([]string, maxList+1)
	put := func(key string) *commandv1.Command {
		return &commandv1.Command{Body: &commandv1.Command_WriteStorage{WriteStorage: &commandv1.WriteStorage{
			MountUuid: "uuid-of-kv/", Epoch: 5, Term: 1, Ops: []*commandv1.StorageOp{{Key: key}},
		}}}
	}
	token := func(f func(*commandv1.Token)) *commandv1.Command {
		tok := &commandv1.Token{Hash: hashOf("a"), Accessor: "a"}
		f(tok)
		return &commandv1.Command{Body: &commandv1.Command_PutToken{PutToken: &commandv1.PutToken{Token: tok}}}
	}
	for name, c := range map[string]*commandv1.Command{
		"empty key":        put(""),
		"long key":         put(long),
		"no spec":          {Body: &commandv1.Command_RegisterPlugin{RegisterPlugin: &commandv1.RegisterPlugin{}}},
		"no token":         {Body: &commandv1.Command_PutToken{PutToken: &commandv1.PutToken{}}},
		"short hash":       token(func(t *commandv1.Token) { t.Hash = t.Hash[1:] }),
		"short parent":     token(func(t *commandv1.Token) { t.Parent = []byte{1} }),
		"no accessor":      token(func(t *commandv1.Token) { t.Accessor = "" }),
		"policies":         token(func(t *commandv1.Token) { t.Policies = many }),
		"control bytes":    token(func(t *commandv1.Token) { t.DisplayName = "a\x00b" }),
		"no policy":        {Body: &commandv1.Command_PutPolicy{PutPolicy: &commandv1.PutPolicy{}}},
		"no namespace":     {Body: &commandv1.Command_PutNamespace{PutNamespace: &commandv1.PutNamespace{}}},
		"no lease":         {Body: &commandv1.Command_PutLease{PutLease: &commandv1.PutLease{}}},
		"no node":          {Body: &commandv1.Command_Hello{Hello: &commandv1.Hello{}}},
		"nothing at all":   {},
		"a long node":      {Body: &commandv1.Command_Hello{Hello: &commandv1.Hello{NodeId: "n", Name: long, Incarnation: 1}}},
		"a future drop":    {Body: &commandv1.Command_DropReloads{DropReloads: &commandv1.DropReloads{BeforeClockNs: 1 << 60}}},
		"no such action":   {Body: &commandv1.Command_ControlReload{ControlReload: &commandv1.ControlReload{Id: "r", Action: 77}}},
		"no such reload":   {Body: &commandv1.Command_AdvanceWave{AdvanceWave: &commandv1.AdvanceWave{ReloadId: "x"}}},
		"no reload at all": {Body: &commandv1.Command_StartReload{StartReload: &commandv1.StartReload{}}},
		"many mounts": {Body: &commandv1.Command_StartReload{StartReload: &commandv1.StartReload{
			Id: "x", Scope: commandv1.Scope_SCOPE_GLOBAL, Selector: &commandv1.Selector{Mounts: many},
		}}},
	} {
		before := viewBytes(t, w.f.View())
		res := w.apply(c)
		if err := Err(res); err == nil || fault.Is(err, fault.Internal) {
			t.Errorf("%s: answered %v", name, res)
		}
		v := *w.f.View()
		s := *v.s
		s.index--
		if !bytes.Equal(viewBytes(t, &View{&s}), before) {
			t.Errorf("%s: a refused command changed the state", name)
		}
	}
}

func TestEveryReportOfABatchCountsWhateverComesBeforeIt(t *testing.T) {
	w := newWorld(t)
	w.play("init\nhello n1\nregister kv v1.0.0\nenable kv/\nreload r1 plugin=kv")
	prepared := func(reload, node string, incarnation uint64) *commandv1.Report {
		return &commandv1.Report{ReloadId: reload, NodeId: node, Incarnation: incarnation, Mounts: []*commandv1.MountReport{{
			MountUuid: "uuid-of-kv/", Stage: commandv1.MountReport_STAGE_PREPARED,
		}}}
	}
	w.apply(&commandv1.Command{Body: &commandv1.Command_ReportBatch{ReportBatch: &commandv1.ReportBatch{Reports: []*commandv1.Report{
		prepared("forgotten", "n1", 1), prepared("r1", "nobody", 1), prepared("r1", "n1", 7), nil, prepared("r1", "n1", 1),
	}}}})
	if r := w.f.View().Reload("r1"); r.GetPhase() != commandv1.Phase_PHASE_COMMITTED {
		t.Fatalf("the last report of the batch was the missing vote, and the reload is %s", r.GetPhase())
	}
}
