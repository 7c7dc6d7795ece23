package node

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"rollcall/node/fault"
)

// FuzzConfig: no file and no variable makes the program panic; what is refused is refused as invalid and names the file or
// the variable, and what is taken is valid.
func FuzzConfig(f *testing.F) {
	for _, path := range []string{"../deploy/config/node.hcl", "../deploy/config/node.json"} {
		raw, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(raw), strings.HasSuffix(path, ".json"), "ROLLCALL_CLUSTER_LISTEN=127.0.0.1:1")
	}
	f.Add("lease { ttl = \"300h\" }\n", false, "ROLLCALL_RAFT_VOTERS=99999999999999999999")
	f.Add("{\"http\": {\"max_body\": \"1EiB\"}}", true, "ROLLCALL_RETRY_JOIN=,,,")
	f.Fuzz(func(t *testing.T, text string, json bool, variable string) {
		if strings.ContainsAny(variable, "\x00") {
			return
		}
		name := "node.hcl"
		if json {
			name = "node.json"
		}
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		cfg, _, err := LoadConfig(path, []string{variable})
		switch {
		case err == nil:
			if err := cfg.Validate(); err != nil {
				t.Fatalf("taken, and not valid: %v", err)
			}
		case !fault.Is(err, fault.Invalid):
			t.Fatalf("refused as %q: %v", fault.KindOf(err), err)
		case err.Error() == "":
			t.Fatal("refused without a word")
		}
	})
}
