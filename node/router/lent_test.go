package router

import (
	"testing"

	commandv1 "rollcall/proto/command/v1"
	pluginpb "rollcall/proto/plugin"
)

// TestReadingKVMakesNoLease: a lease for every read of KV without versions would be an entry of the log for every read, and
// would send the mount's reads to the leader.
func TestReadingKVMakesNoLease(t *testing.T) {
	for _, c := range []struct {
		kind, internal, option string
		lent                   bool
	}{
		{"kv", `{"secret_type":"kv"}`, "", false},
		{"generic", "", "", false},
		{"my-kv", `{"secret_type":"kv"}`, "", false},
		{"my-kv", `{"secret_type":"kv"}`, "true", true},
		{"kv", "", "true", true},
		{"aws", `{"secret_type":"access_keys"}`, "", true},
		{"aws", "", "", true},
		{"aws", "not JSON", "", true},
	} {
		m := &commandv1.Mount{Type: c.kind, Options: map[string]string{"leased_passthrough": c.option}}
		if got := lent(m, &pluginpb.Secret{InternalData: c.internal}); got != c.lent {
			t.Errorf("%+v: %v", c, got)
		}
	}
}
