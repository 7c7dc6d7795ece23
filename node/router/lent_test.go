package router

import (
	"testing"
	"time"

	commandv1 "rollcall/proto/command/v1"
	pluginpb "rollcall/proto/plugin"
)

// TestReadingKVMakesNoLease: a lease for every read of KV without versions would be an entry of the log for every read, and
// would send the mount's reads to the leader.
func TestReadingKVMakesNoLease(t *testing.T) {
	hint, renewable := &pluginpb.LeaseOptions{TTL: int64(time.Hour)}, &pluginpb.LeaseOptions{TTL: int64(time.Hour), Renewable: true}
	for _, c := range []struct {
		kind, option, internal string
		lease                  *pluginpb.LeaseOptions
		lent                   bool
	}{
		{"kv", "", "", hint, false},
		{"kv", "", `{"secret_type":"kv"}`, renewable, false},
		{"generic", "", "", hint, false},
		{"my-kv", "", "", hint, false},
		{"my-kv", "", "null", hint, false},
		{"kv", "true", `{"secret_type":"kv"}`, renewable, true},
		{"my-kv", "true", "", hint, true},
		{"aws", "", `{"secret_type":"access_keys"}`, hint, true},
		{"aws", "", "", renewable, true},
		{"aws", "", "", nil, true},
	} {
		m := &commandv1.Mount{Type: c.kind, Options: map[string]string{"leased_passthrough": c.option}}
		if got := lent(m, &pluginpb.Secret{InternalData: c.internal, LeaseOptions: c.lease}); got != c.lent {
			t.Errorf("%+v: %v", c, got)
		}
	}
}
