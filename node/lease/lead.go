package lease

import (
	"context"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"rollcall/fsm"
	"rollcall/node/failpoint"
	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
	pluginpb "rollcall/proto/plugin"
)

const (
	// lookEvery is how often the leader looks for what is due; the log's clock moves once a second when nothing else does.
	lookEvery = 200 * time.Millisecond
	// batch bounds what is looked at in one pass, besides what waits for its next try.
	batch = 1000
)

// leading is one leadership's memory: it dies with it, and the next leader begins afresh.
type leading struct {
	*Keeper
	ctx  context.Context
	term uint64
	wg   sync.WaitGroup
	free chan struct{} // workers

	mu sync.Mutex
	// tries are the leases that are under way or failed before, by id.
	tries map[string]*try
	// busy counts the revocations under way, by mount.
	busy map[string]int
}

type try struct {
	running bool
	failed  int
	next    time.Time
}

// Lead is the leader's standing work; node/replica runs it while this node leads, and it returns with ctx, after its
// revocations have.
func (k *Keeper) Lead(ctx context.Context, term uint64) {
	l := &leading{Keeper: k, ctx: ctx, term: term, free: make(chan struct{}, k.cfg.Workers), tries: map[string]*try{}, busy: map[string]int{}}
	defer func() {
		l.wg.Wait()
		k.mu.Lock()
		clear(k.failed)
		k.mu.Unlock()
	}()
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		changed := k.cfg.State.Changed()
		l.look(k.cfg.State.View())
		select {
		case <-ctx.Done():
			return
		case <-changed:
			select { // at most one pass every lookEvery, however many entries come
			case <-tick.C:
			case <-ctx.Done():
				return
			}
		case <-tick.C:
		}
	}
}

func (l *leading) look(v *fsm.View) {
	l.mu.Lock()
	waiting := len(l.tries)
	l.mu.Unlock()
	tokens, leases := v.Expired(max(v.ClockNS(), 1), batch+waiting)
	for _, t := range tokens {
		if l.ctx.Err() != nil {
			return
		}
		l.endToken(t)
	}
	due := make(map[string]bool, len(leases))
	for _, row := range leases {
		due[row.GetId()] = true
		l.start(v, row)
	}
	l.forget(v, due)
}

// forget drops what is known of leases that are gone.
func (l *leading) forget(v *fsm.View, due map[string]bool) {
	l.mu.Lock()
	var gone []string
	for id, t := range l.tries {
		if !t.running && !due[id] && v.Lease(id) == nil {
			delete(l.tries, id)
			gone = append(gone, id)
		}
	}
	l.mu.Unlock()
	l.Keeper.mu.Lock()
	defer l.Keeper.mu.Unlock()
	for _, id := range gone {
		delete(l.failed, id)
	}
}

func (l *leading) propose(cmd *commandv1.Command) error {
	ctx, cancel := context.WithTimeout(l.ctx, 10*time.Second)
	defer cancel()
	cmd.WallMs = time.Now().UnixMilli()
	_, err := l.cfg.Replica.ProposeAsLeader(ctx, l.term, cmd)
	return err
}

// endToken ends a token whose time is over, with its children; a renewal that came first wins.
func (l *leading) endToken(t *commandv1.Token) {
	if failpoint.Hit(failpoint.TokenExpire, l.cfg.NodeName) != nil {
		return // looked at again soon
	}
	err := l.propose(&commandv1.Command{Body: &commandv1.Command_RevokeToken{
		RevokeToken: &commandv1.RevokeToken{Hash: t.GetHash(), OnlyExpired: true},
	}})
	if err != nil {
		if l.ctx.Err() == nil {
			l.log.Warn("end an expired token: it opens nothing any more, and is tried again", "accessor", t.GetAccessor(), "error", err)
		}
		return
	}
	l.metrics.tokensExpired.Inc()
}

// start begins a revocation, unless it is under way, waits for its next try, or there are enough.
func (l *leading) start(v *fsm.View, row *commandv1.Lease) {
	m := v.Mount(row.GetMountUuid())
	if m == nil {
		return // its mount's end took it along: the next view lacks it
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	t := l.tries[row.GetId()]
	if t == nil {
		t = &try{}
	}
	if t.running || time.Now().Before(t.next) || l.busy[m.GetUuid()] >= l.cfg.PerMount {
		return
	}
	select {
	case l.free <- struct{}{}:
	default:
		return
	}
	t.running = true
	l.tries[row.GetId()] = t
	l.busy[m.GetUuid()]++
	l.wg.Go(func() {
		err := l.revoke(m, row)
		l.mu.Lock()
		defer l.mu.Unlock()
		<-l.free
		if l.busy[m.GetUuid()]--; l.busy[m.GetUuid()] == 0 {
			delete(l.busy, m.GetUuid())
		}
		t.running = false
		if err == nil || l.ctx.Err() != nil {
			return
		}
		t.failed++
		pause := min(l.cfg.Retry<<min(t.failed-1, 20), l.cfg.RetryMax)
		t.next = time.Now().Add(pause)
		l.metrics.events.WithLabelValues("revoke_failed").Inc()
		l.Keeper.mu.Lock()
		l.failed[row.GetId()] = err.Error()
		l.Keeper.mu.Unlock()
		l.log.Warn("revoke a lease through its plugin", "lease", row.GetId(), "tries", t.failed, "next_in", pause, "error", err)
	})
}

// revoke asks the plugin to take a secret back, and removes the lease. A plugin is asked again when the removal failed:
// revoking is repeatable by its contract.
func (l *leading) revoke(m *commandv1.Mount, row *commandv1.Lease) error {
	ctx, cancel := context.WithTimeout(l.ctx, l.cfg.Timeout)
	defer cancel()
	secret := &pluginpb.Secret{}
	if err := proto.Unmarshal(row.GetSecret(), secret); err != nil {
		return fault.As(fault.Corrupt, err, "read lease", row.GetId())
	}
	if err := failpoint.Hit(failpoint.SecretGiveBack, l.cfg.NodeName); err != nil {
		return err
	}
	if _, err := l.cfg.Plugins.Call(ctx, m, "revoke", row.GetPath(), row.GetData(), secret); err != nil {
		return err
	}
	if err := l.propose(&commandv1.Command{Body: &commandv1.Command_RemoveLease{
		RemoveLease: &commandv1.RemoveLease{Id: row.GetId()},
	}}); err != nil {
		return fault.Wrap(err, "remove lease", row.GetId())
	}
	l.metrics.events.WithLabelValues("revoked").Inc()
	return nil
}
