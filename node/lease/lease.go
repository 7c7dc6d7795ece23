// Package lease keeps what plugins lend out: it enters a lease for every secret, renews it through its plugin, and, as the
// leader, gives back through the plugin what is due, and ends tokens whose time is over. See DESIGN.md beside this file.
package lease

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"rollcall/fsm"
	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
	pluginpb "rollcall/proto/plugin"
)

// State is this node's copy of the replicated state. *fsm.FSM is one.
type State interface {
	View() *fsm.View
	// Changed is closed at the next applied entry: take it, then View, then wait.
	Changed() <-chan struct{}
}

// Replica enters commands (node/replica).
type Replica interface {
	Propose(ctx context.Context, cmd *commandv1.Command) (*commandv1.Result, error)
	// ProposeAsLeader enters a command as the leader of the term and nowhere else.
	ProposeAsLeader(ctx context.Context, term uint64, cmd *commandv1.Command) (*commandv1.Result, error)
}

// Plugins asks the plugin of a mount (node/router).
type Plugins interface {
	// Call runs "renew" or "revoke" on the mount's instance, on the leader. path is relative to the mount.
	Call(ctx context.Context, m *commandv1.Mount, op, path string, data json.RawMessage, secret *pluginpb.Secret) (*pluginpb.Response, error)
}

// Config is what a Keeper needs. Everything is required unless its line says otherwise.
type Config struct {
	State   State
	Replica Replica
	Plugins Plugins
	// TTLs resolves a mount's default and longest lease.
	TTLs       func(m *commandv1.Mount) (def, longest time.Duration)
	Logger     *slog.Logger
	Registerer prometheus.Registerer
	// NodeName is this node's name, for failpoints alone; it may be empty.
	NodeName string
	// Timeout bounds one revocation through a plugin. Default 60 s.
	Timeout time.Duration
	// Workers bounds the revocations under way, PerMount those of one mount: a plugin that hangs does not hold up the
	// others. Default 32 and 8.
	Workers, PerMount int
	// Retry is the pause after a first failed revocation; it doubles up to RetryMax. Default 1 s and 5 min.
	Retry, RetryMax time.Duration
}

// Validate fills in the defaults and reports what is missing.
func (c *Config) Validate() error {
	for name, missing := range map[string]bool{
		"State": c.State == nil, "Replica": c.Replica == nil, "Plugins": c.Plugins == nil, "TTLs": c.TTLs == nil,
		"Logger": c.Logger == nil, "Registerer": c.Registerer == nil,
	} {
		if missing {
			return fault.New(fault.Invalid, "configure", "node/lease", "%s is not set", name)
		}
	}
	def := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	def(&c.Timeout, time.Minute)
	def(&c.Retry, time.Second)
	def(&c.RetryMax, 5*time.Minute)
	if c.Workers <= 0 {
		c.Workers = 32
	}
	if c.PerMount <= 0 {
		c.PerMount = 8
	}
	return nil
}

// Keeper keeps leases. Grant, Renew and Revoke may be called from any goroutine of any node; Lead is the leader's work.
type Keeper struct {
	cfg     Config
	log     *slog.Logger
	metrics *metrics

	mu sync.Mutex
	// failed is why leases could not be revoked, for who waits for them on this node; the leader's memory alone.
	failed map[string]string
}

// New makes a keeper. Lead must be registered with the replica.
func New(cfg Config) (*Keeper, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	k := &Keeper{cfg: cfg, log: cfg.Logger, failed: map[string]string{}}
	var err error
	if k.metrics, err = newMetrics(cfg.Registerer, cfg.State); err != nil {
		return nil, fault.Wrap(err, "register metrics of", "node/lease")
	}
	return k, nil
}

// Grant enters the lease of a secret that a plugin made, before anybody sees the secret, and fills in its id and times. path
// is relative to the mount; token is the hash of the token that asked, nil for none. When the lease cannot be kept because
// the token is gone, the secret is given back through its plugin and the error says that nothing was lent.
func (k *Keeper) Grant(ctx context.Context, m *commandv1.Mount, path string, token []byte, secret *pluginpb.Secret, data string) error {
	if secret.GetLeaseOptions() == nil {
		secret.LeaseOptions = &pluginpb.LeaseOptions{}
	}
	ttl, longest := k.ttl(m, secret, 0)
	secret.LeaseOptions.TTL = int64(ttl)
	point := m.GetNamespace() + m.GetPath()
	if m.GetTable() == "auth" {
		point = m.GetNamespace() + "auth/" + m.GetPath()
	}
	secret.LeaseId = point + path + "/" + rand.Text()[:24]
	kept, err := proto.Marshal(secret)
	if err != nil {
		return fault.As(fault.Internal, err, "keep lease", secret.GetLeaseId())
	}
	row := &commandv1.Lease{
		Id: secret.GetLeaseId(), MountUuid: m.GetUuid(), Namespace: m.GetNamespace(), Path: path, Secret: kept, Data: []byte(data),
		TokenHash: token, Renewable: secret.GetLeaseOptions().GetRenewable(), TtlNs: uint64(ttl), MaxTtlNs: uint64(longest),
	}
	_, err = k.cfg.Replica.Propose(ctx, put(row, false))
	if fault.Is(err, fault.Denied) && len(token) > 0 {
		// The token was revoked meanwhile. The secret is there all the same: enter it as due, so that it is taken back.
		row.TokenHash, row.TtlNs, row.MaxTtlNs, row.Renewable = nil, 1, 1, false
		if _, perr := k.cfg.Replica.Propose(context.WithoutCancel(ctx), put(row, false)); perr != nil {
			k.log.Error("a secret was made for a token that is gone, and could not be taken back", "lease", row.GetId(), "error", perr)
		}
		return fault.Text(fault.Denied, "permission denied")
	}
	if err != nil {
		return err
	}
	k.metrics.events.WithLabelValues("granted").Inc()
	return nil
}

func put(row *commandv1.Lease, exists bool) *commandv1.Command {
	return &commandv1.Command{WallMs: time.Now().UnixMilli(), Body: &commandv1.Command_PutLease{
		PutLease: &commandv1.PutLease{Lease: row, MustExist: exists},
	}}
}

// ttl is how long a secret may be lent from now, when it has been for age: what its plugin says, or the mount's default,
// under the longest that either allows.
func (k *Keeper) ttl(m *commandv1.Mount, secret *pluginpb.Secret, age time.Duration) (ttl, longest time.Duration) {
	def, longest := k.cfg.TTLs(m)
	if own := time.Duration(secret.GetLeaseOptions().GetMaxTTL()); own > 0 {
		longest = min(longest, own)
	}
	if ttl = time.Duration(secret.GetLeaseOptions().GetTTL()); ttl <= 0 {
		ttl = def
	}
	return min(ttl, max(longest-age, 0)), longest
}

// Renewed is a lease after its renewal.
type Renewed struct {
	ID        string
	TTL       time.Duration
	Renewable bool
	Data      json.RawMessage
	Warnings  []string
}

// Renew asks the lease's plugin for more time and enters what it grants. by is the hash of the token that asks. Errors are
// fault.Invalid in the contract's words, or the plugin's.
func (k *Keeper) Renew(ctx context.Context, id string, increment time.Duration, by []byte) (*Renewed, error) {
	v := k.cfg.State.View()
	row := v.Lease(id)
	switch {
	case row == nil || row.GetExpiresClockNs() != 0 && row.GetExpiresClockNs() <= max(v.ClockNS(), 1):
		return nil, fault.Text(fault.Invalid, "lease not found")
	case !row.GetRenewable():
		return nil, fault.Text(fault.Invalid, "lease is not renewable")
	}
	m := v.Mount(row.GetMountUuid())
	if m == nil {
		return nil, fault.Text(fault.Invalid, "lease not found")
	}
	secret := &pluginpb.Secret{}
	if err := proto.Unmarshal(row.GetSecret(), secret); err != nil {
		return nil, fault.As(fault.Corrupt, err, "read lease", id)
	}
	age := time.Duration(v.ClockNS() - min(v.ClockNS(), row.GetIssuedClockNs()))
	if secret.GetLeaseOptions() == nil {
		secret.LeaseOptions = &pluginpb.LeaseOptions{}
	}
	secret.LeaseOptions.Increment = int64(increment)
	secret.LeaseOptions.IssueTime = timestamppb.New(time.UnixMilli(row.GetIssuedWallMs()))
	resp, err := k.cfg.Plugins.Call(ctx, m, "renew", row.GetPath(), row.GetData(), secret)
	if err != nil {
		return nil, err
	}
	out := &Renewed{ID: id, Warnings: resp.GetWarnings()}
	if d := resp.GetData(); d != "" && d != "null" {
		out.Data = json.RawMessage(d)
	}
	back := resp.GetSecret()
	if back == nil {
		return nil, fault.Text(fault.Invalid, "the plugin renewed nothing: the lease stays as it is")
	}
	back.LeaseId = id
	ttl, longest := k.ttl(m, back, age)
	if ttl < time.Second {
		return nil, fault.Text(fault.Invalid, "past max TTL, cannot renew")
	}
	if back.GetLeaseOptions() == nil {
		back.LeaseOptions = &pluginpb.LeaseOptions{Renewable: true}
	}
	back.LeaseOptions.TTL = int64(ttl)
	kept, err := proto.Marshal(back)
	if err != nil {
		return nil, fault.As(fault.Internal, err, "keep lease", id)
	}
	next := proto.CloneOf(row)
	next.Secret, next.TtlNs, next.MaxTtlNs, next.ExpiresClockNs = kept, uint64(ttl), uint64(longest), 0
	next.Renewable = back.GetLeaseOptions().GetRenewable()
	cmd := put(next, true)
	cmd.ByToken = by
	if _, err := k.cfg.Replica.Propose(ctx, cmd); err != nil {
		return nil, err
	}
	k.metrics.events.WithLabelValues("renewed").Inc()
	out.TTL, out.Renewable = ttl, next.GetRenewable()
	return out, nil
}

// Revoke makes leases due and returns once they are gone, or, after wait, how many are left: the leader goes on with those.
// The error then is why the last of them failed, where this node knows. by is the hash of the token that asks.
func (k *Keeper) Revoke(ctx context.Context, which *commandv1.RevokeLeases, by []byte, wait time.Duration) (left int, err error) {
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	for {
		res, err := k.cfg.Replica.Propose(ctx, &commandv1.Command{
			WallMs: time.Now().UnixMilli(), ByToken: by,
			Body: &commandv1.Command_RevokeLeases{RevokeLeases: which},
		})
		if err != nil {
			return 0, err
		}
		if res.GetRepeated() {
			break
		}
	}
	for {
		changed := k.cfg.State.Changed()
		due := k.due(which)
		if len(due) == 0 {
			return 0, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return len(due), k.why(due)
		}
	}
}

// due are the leases that a revocation still waits for. One that was lent after it is not among them.
func (k *Keeper) due(which *commandv1.RevokeLeases) []*commandv1.Lease {
	v := k.cfg.State.View()
	var list []*commandv1.Lease
	switch {
	case which.GetId() != "":
		if l := v.Lease(which.GetId()); l != nil {
			list = append(list, l)
		}
	case which.GetMountUuid() != "":
		list = v.LeasesOfMount(which.GetMountUuid())
	default:
		list = v.Leases(which.GetPrefix())
	}
	out := list[:0:0]
	for _, l := range list {
		if at := l.GetExpiresClockNs(); at != 0 && at <= max(v.ClockNS(), 1) {
			out = append(out, l)
		}
	}
	return out
}

func (k *Keeper) why(due []*commandv1.Lease) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, l := range due {
		if text := k.failed[l.GetId()]; text != "" {
			return fault.New(fault.Invalid, "revoke lease", l.GetId(), "%s", text)
		}
	}
	return nil
}
