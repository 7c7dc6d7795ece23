package supervisor

import (
	"testing"

	"rollcall/node/fault"
	pluginpb "rollcall/proto/plugin"
)

func TestStorageRefusalsKeepTheirKindThroughAPlugin(t *testing.T) {
	for text, want := range map[string]fault.Kind{
		"write secret: cannot write to readonly storage":                                  fault.ReadOnly,
		`1 error occurred: put failed due to value being too large: "data/x" has 2097152`: fault.TooLarge,
		"something else": fault.Internal,
	} {
		if err := pluginError(&pluginpb.ProtoError{ErrMsg: text}); !fault.Is(err, want) {
			t.Errorf("%q is %s, wanted %s", text, fault.KindOf(err), want)
		}
	}
}
