package reload

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
	peerv1 "rollcall/proto/peer/v1"
)

// behaviour is what a plugin's bytes do on one node.
type behaviour struct {
	ensure, start, setup, switchErr error
	// multiplexes: the process can hold more than one backend.
	multiplexes bool
	startTook   time.Duration
	closeTook   time.Duration
	// diesAfter ends each process so long after its start.
	diesAfter time.Duration
	// assume is what a change of role answers.
	assume error
}

// fakePlugins starts fake processes and counts those that live, per mount.
type fakePlugins struct {
	n    *simNode
	acts map[string]behaviour
	// live and most are guarded by the sim's mutex.
	live   map[string]map[int]bool
	most   map[string]int
	starts map[string]int
	// tries counts calls of Start by sha, those that failed too.
	tries map[string]int
	// starting is how many starts are under way, startingMost the most at once.
	starting, startingMost int

	kept  []string
	procs []*fakeProcess
}

func newFakePlugins(n *simNode, old *fakePlugins) *fakePlugins {
	p := &fakePlugins{
		n: n, acts: map[string]behaviour{}, live: map[string]map[int]bool{}, most: map[string]int{}, starts: map[string]int{},
		tries: map[string]int{},
	}
	if old != nil {
		p.acts = old.acts
	}
	return p
}

// act sets what sha does on this node from now on.
func (p *fakePlugins) act(sha string, b behaviour) {
	p.n.sim.mu.Lock()
	defer p.n.sim.mu.Unlock()
	p.acts[sha] = b
}

func (p *fakePlugins) of(sha string) behaviour {
	p.n.sim.mu.Lock()
	defer p.n.sim.mu.Unlock()
	if b, ok := p.acts[sha]; ok {
		return b
	}
	return behaviour{multiplexes: true, startTook: 30 * time.Millisecond, closeTook: 5 * time.Millisecond}
}

func (p *fakePlugins) Ensure(_ context.Context, spec *commandv1.Spec) error {
	return p.of(spec.GetSha256()).ensure
}

func (p *fakePlugins) Start(ctx context.Context, mountUUID string, spec *commandv1.Spec) (Process, error) {
	b := p.of(spec.GetSha256())
	p.n.sim.set(func() {
		p.tries[spec.GetSha256()]++
		p.starting++
		p.startingMost = max(p.startingMost, p.starting)
	})
	slept := sleep(ctx, b.startTook)
	p.n.sim.set(func() { p.starting-- })
	if !slept {
		return nil, context.Cause(ctx)
	}
	if b.start != nil {
		return nil, b.start
	}
	s := p.n.sim
	s.mu.Lock()
	s.pids++
	proc := &fakeProcess{p: p, pid: s.pids, mount: mountUUID, spec: spec, act: b, done: make(chan struct{})}
	if p.live[mountUUID] == nil {
		p.live[mountUUID] = map[int]bool{}
	}
	p.live[mountUUID][proc.pid] = true
	p.most[mountUUID] = max(p.most[mountUUID], len(p.live[mountUUID]))
	p.starts[mountUUID]++
	if len(p.live[mountUUID]) > 2 {
		s.wrong("%s: %d processes of mount %s at once", p.n.id, len(p.live[mountUUID]), mountUUID)
	}
	p.procs = append(p.procs, proc)
	s.mu.Unlock()
	if b.diesAfter > 0 {
		time.AfterFunc(b.diesAfter, func() { proc.die(errors.New("exit status 2: out of luck")) })
	}
	return proc, nil
}

func (p *fakePlugins) Keep(shas []string) {
	p.n.sim.mu.Lock()
	defer p.n.sim.mu.Unlock()
	p.kept = shas
}

// find returns the newest living process of a mount for which ok holds.
func (p *fakePlugins) newest(mountUUID string) *fakeProcess {
	p.n.sim.mu.Lock()
	defer p.n.sim.mu.Unlock()
	for _, proc := range slices.Backward(p.procs) {
		if proc.mount == mountUUID && p.live[mountUUID][proc.pid] {
			return proc
		}
	}
	return nil
}

func (p *fakePlugins) tried(sha string) (n int) {
	p.n.sim.set(func() { n = p.tries[sha] })
	return n
}

// peak is the highest number of processes of a mount at once.
func (p *fakePlugins) peak(mountUUID string) int {
	p.n.sim.mu.Lock()
	defer p.n.sim.mu.Unlock()
	return p.most[mountUUID]
}

func (p *fakePlugins) started(mountUUID string) int {
	p.n.sim.mu.Lock()
	defer p.n.sim.mu.Unlock()
	return p.starts[mountUUID]
}

func (p *fakePlugins) living(mountUUID string) int {
	p.n.sim.mu.Lock()
	defer p.n.sim.mu.Unlock()
	return len(p.live[mountUUID])
}

type fakeProcess struct {
	p        *fakePlugins
	pid      int
	mount    string
	spec     *commandv1.Spec
	act      behaviour
	done     chan struct{}
	once     sync.Once
	mu       sync.Mutex
	err      error
	backends int
}

func (f *fakeProcess) Backend(context.Context) (Backend, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.backends++
	if f.backends > 1 && !f.act.multiplexes {
		return nil, errors.New("this process does not multiplex")
	}
	return &fakeBackend{proc: f}, nil
}

func (f *fakeProcess) Multiplexes() bool { return f.act.multiplexes }
func (f *fakeProcess) PID() int          { return f.pid }
func (f *fakeProcess) Steps() []*commandv1.Step {
	return []*commandv1.Step{{Name: "start"}, {Name: "handshake"}}
}
func (f *fakeProcess) RSS() uint64           { return 20 << 20 }
func (f *fakeProcess) Done() <-chan struct{} { return f.done }

func (f *fakeProcess) Err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

func (f *fakeProcess) Close(ctx context.Context) error {
	select {
	case <-f.done:
		return nil
	default:
	}
	sleep(ctx, f.act.closeTook)
	f.die(nil)
	return nil
}

// die ends the process. Requests that it still serves are lost, and that is what the tests look for.
func (f *fakeProcess) die(err error) {
	f.once.Do(func() {
		f.mu.Lock()
		f.err = err
		f.mu.Unlock()
		f.p.n.sim.mu.Lock()
		delete(f.p.live[f.mount], f.pid)
		f.p.n.sim.mu.Unlock()
		close(f.done)
	})
}

type fakeBackend struct {
	proc  *fakeProcess
	setUp bool
	clean bool
}

func (b *fakeBackend) Cleanup(context.Context) error { b.clean = true; return nil }

// fakeRoute is one mount's gate and instance.
type fakeRoute struct {
	backend    *fakeBackend
	generation uint64
	role       Role
	open       bool
	inflight   int
	changed    chan struct{}
	dead       error
	dropped    bool
}

// fakeRoutes is the router's half: a gate that drains, a TakeOver on the leader, and a wait for it elsewhere.
type fakeRoutes struct {
	n       *simNode
	mu      sync.Mutex
	routes  map[string]*fakeRoute
	samples map[string]*peerv1.MountTraffic
	trials  int
	// after is the latency that LastSwitch tells of.
	after int64
}

func newFakeRoutes(n *simNode) *fakeRoutes {
	return &fakeRoutes{n: n, routes: map[string]*fakeRoute{}, samples: map[string]*peerv1.MountTraffic{}}
}

func (r *fakeRoutes) route(uuid string) *fakeRoute {
	rt := r.routes[uuid]
	if rt == nil {
		rt = &fakeRoute{changed: make(chan struct{})}
		r.routes[uuid] = rt
	}
	return rt
}

// wake tells everybody who waits at the route. The caller holds mu.
func (rt *fakeRoute) wake() { close(rt.changed); rt.changed = make(chan struct{}) }

// wait waits until ok holds; the caller holds mu, and holds it again afterwards.
func (r *fakeRoutes) wait(ctx context.Context, rt *fakeRoute, ok func() bool) bool {
	for !ok() {
		ch := rt.changed
		r.mu.Unlock()
		select {
		case <-ch:
		case <-ctx.Done():
			r.mu.Lock()
			return false
		}
		r.mu.Lock()
	}
	return true
}

func (r *fakeRoutes) Trial(
	ctx context.Context, _ *commandv1.Mount, _ *commandv1.Spec, b Backend, depth string,
) ([]*commandv1.Step, error) {
	fb := b.(*fakeBackend)
	r.mu.Lock()
	r.trials++
	r.mu.Unlock()
	if depth == "handshake" {
		return nil, nil
	}
	if fb.setUp {
		return nil, errors.New("a backend was set up twice")
	}
	fb.setUp = true
	sleep(ctx, 5*time.Millisecond)
	if fb.proc.act.setup != nil {
		return nil, fault.As(fault.Refused, fb.proc.act.setup, "setup", "")
	}
	return []*commandv1.Step{{Name: "trial"}}, ctx.Err()
}

func (r *fakeRoutes) Switch(ctx context.Context, m *commandv1.Mount, plan SwitchPlan) (*Switched, error) {
	b := plan.Backend.(*fakeBackend)
	r.mu.Lock()
	defer r.mu.Unlock()
	rt := r.route(m.GetUuid())
	from := time.Now()
	reopens := rt.open
	rt.open = false
	hold, cancel := context.WithTimeout(ctx, plan.Hold)
	drained := r.wait(hold, rt, func() bool { return rt.inflight == 0 || rt.dead != nil })
	cancel()
	if !drained && plan.Force == "" {
		rt.open = reopens
		rt.wake()
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, fault.New(fault.Deadline, "hold", m.GetPath(), "requests in flight outlived it")
	}
	if b.setUp {
		r.n.sim.t.Error("a backend that was set up before came to a switch")
	}
	fail := func(err error) (*Switched, error) {
		rt.open = plan.KeepOld && rt.backend != nil
		rt.wake()
		return nil, err
	}
	if plan.AwaitTakeOver {
		r.mu.Unlock()
		err := r.awaitTakeOver(ctx, m.GetUuid(), plan.Wanted.GetGeneration())
		r.mu.Lock()
		if err != nil {
			return fail(err)
		}
	}
	b.setUp = true
	r.mu.Unlock()
	sleep(ctx, 5*time.Millisecond)
	err := b.proc.act.switchErr
	if err == nil && ended(b.proc) {
		err = errors.New("the process has ended")
	}
	if err == nil && plan.Role.Leader {
		err = r.takeOver(ctx, m.GetUuid(), plan.Wanted.GetGeneration(), plan.Role.Term)
	}
	r.mu.Lock()
	if err == nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return fail(err)
	}
	r.checkTakeOver(m.GetUuid(), plan)
	rt.backend, rt.generation, rt.role, rt.open, rt.dead = b, plan.Wanted.GetGeneration(), plan.Role, true, nil
	rt.wake()
	return &Switched{HoldFor: time.Since(from), Traffic: &commandv1.Traffic{Served: 3, P99BeforeUs: 100}, Steps: []*commandv1.Step{{Name: "hold"}, {Name: "switch"}}}, nil
}

// checkTakeOver looks whether a follower opens its gate before the leader, which is to come to the same generation, has
// taken the mount over.
func (r *fakeRoutes) checkTakeOver(uuid string, plan SwitchPlan) {
	s := r.n.sim
	s.mu.Lock()
	defer s.mu.Unlock()
	if plan.Role.Leader || s.leader == nil || s.leader == r.n {
		return
	}
	v := r.n.fsm.View()
	m := v.Mount(uuid)
	if g := plan.Wanted.GetGeneration(); v.Wanted(m, s.leader.id).GetGeneration() == g && m.GetEpochGeneration() < g {
		s.wrong("%s opened generation %d before the leader had taken it over", r.n.id, g)
	}
}

func (r *fakeRoutes) awaitTakeOver(ctx context.Context, uuid string, generation uint64) error {
	for {
		ch := r.n.fsm.Changed()
		if r.n.fsm.View().Mount(uuid).GetEpochGeneration() >= generation {
			return nil
		}
		select {
		case <-ch:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (r *fakeRoutes) takeOver(ctx context.Context, uuid string, generation, term uint64) error {
	res, err := simReplica{r.n}.ProposeAsLeader(ctx, term, &commandv1.Command{Body: &commandv1.Command_TakeOver{
		TakeOver: &commandv1.TakeOver{MountUuid: uuid, NodeId: r.n.id, Generation: generation, Term: term},
	}})
	if err == nil && res.GetFaultKind() != "" {
		err = fault.New(fault.ParseKind(res.GetFaultKind()), "take over", uuid, "%s", res.GetFaultText())
	}
	return err
}

func (r *fakeRoutes) Assume(ctx context.Context, uuid string, role Role) error {
	r.mu.Lock()
	rt := r.route(uuid)
	b, generation := rt.backend, rt.generation
	r.mu.Unlock()
	sleep(ctx, 5*time.Millisecond)
	if err := b.proc.p.of(b.proc.spec.GetSha256()).assume; err != nil {
		return err
	}
	if role.Leader {
		if err := r.takeOver(ctx, uuid, generation, role.Term); err != nil {
			return err
		}
	}
	r.mu.Lock()
	rt.role = role
	r.mu.Unlock()
	return nil
}

func (r *fakeRoutes) Fail(uuid string, why error) { r.Suspend(uuid, why) }

func (r *fakeRoutes) Suspend(uuid string, why error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rt := r.route(uuid)
	rt.open, rt.dead = false, why
	rt.wake()
}

func (r *fakeRoutes) Drop(_ context.Context, uuid string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	rt := r.route(uuid)
	rt.open, rt.dropped = false, true
	rt.wake()
	return nil
}

func (r *fakeRoutes) Relabel(uuid string, w *commandv1.Wanted) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rt := r.route(uuid)
	if w.GetGeneration() < rt.generation {
		r.n.sim.t.Errorf("relabelled from %d to %d", rt.generation, w.GetGeneration())
	}
	rt.generation = w.GetGeneration()
	if rt.role.Leader {
		term := rt.role.Term
		go func() { _ = r.takeOver(context.Background(), uuid, w.GetGeneration(), term) }()
	}
}

func (r *fakeRoutes) Running(uuid string) (uint64, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rt := r.route(uuid)
	return rt.generation, rt.open
}

func (r *fakeRoutes) LastSwitch(uuid string) *commandv1.Traffic {
	r.mu.Lock()
	defer r.mu.Unlock()
	return &commandv1.Traffic{Served: 10, P99BeforeUs: 100, P99AfterUs: r.after}
}

func (r *fakeRoutes) Traffic(uuid string) *peerv1.MountTraffic {
	r.mu.Lock()
	defer r.mu.Unlock()
	rt := r.route(uuid)
	t := &peerv1.MountTraffic{
		MountUuid: uuid, Generation: rt.generation, Reads: &commandv1.GateSample{}, Writes: &commandv1.GateSample{},
	}
	if s := r.samples[uuid]; s != nil {
		t.Reads, t.Writes = s.Reads, s.Writes
	}
	return t
}

// serving is the spec of the instance behind the gate.
func (r *fakeRoutes) serving(uuid string) *commandv1.Spec {
	r.mu.Lock()
	defer r.mu.Unlock()
	if b := r.route(uuid).backend; b != nil {
		return b.proc.spec
	}
	return nil
}

// request serves one request for so long, as a client of this node sees it.
func (r *fakeRoutes) request(ctx context.Context, uuid string, took time.Duration) (uint64, error) {
	s := r.n.sim
	if !r.n.mayServe() {
		return 0, fault.New(fault.Fenced, "request", uuid, "no lease")
	}
	s.mu.Lock()
	floor := s.done[uuid]
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second+took)
	defer cancel()
	r.mu.Lock()
	rt := r.route(uuid)
	if !r.wait(ctx, rt, func() bool { return rt.open || rt.dropped }) || rt.dropped {
		r.mu.Unlock()
		return 0, fault.New(fault.Unavailable, "request", uuid, "nothing ran")
	}
	rt.inflight++
	b, generation := rt.backend, rt.generation
	r.mu.Unlock()
	sleep(ctx, took)
	lost := ended(b.proc)
	r.mu.Lock()
	rt.inflight--
	rt.wake()
	r.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if lost {
		if !s.lossy {
			s.wrong("%s: a request of generation %d was lost with its process", r.n.id, generation)
		}
		return 0, fault.New(fault.OutcomeUnknown, "request", uuid, "the plugin ended")
	}
	s.served++
	if generation < floor && !r.n.fenced {
		s.wrong("%s: an answer of generation %d after %d was done", r.n.id, generation, floor)
	}
	return generation, nil
}
