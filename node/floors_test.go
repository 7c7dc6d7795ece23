package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

const modulePath = "rollcall"

// floors is where each room stands. A package belongs to the room with the longest name that it begins with
// ("node/replica/internal/disk" to "node/replica").
var floors = map[string]int{
	"proto/command": 1, "proto/peer": 1, "proto/plugin": 1,
	"node/fault": 1, "node/api": 1, "node/telemetry": 1, "node/seal": 1, "node/failpoint": 1,

	"fsm": 2, "transport": 2, "node/supervisor": 2, "node/policy": 2,

	"node/httpd": 3, "node/reload": 3, "node/router": 3, "node/lease": 3, "node/replica": 3, "node/gossip": 3,
	"node/audit": 3,

	"node": 4,

	"cmd/rollcall": 5, "cmd/rollcall/client": 5, "node/nodetest": 5, "deploy/e2e": 5,
}

// sideways are the arrows on one floor that are meant, each with its reason.
var sideways = map[[2]string]string{
	{"proto/peer", "proto/command"}:         "peers carry commands and records as they stand in the log",
	{"node/policy", "fsm"}:                  "policies are evaluated on a view of the state",
	{"cmd/rollcall", "cmd/rollcall/client"}: "the binary holds the client's verbs",
	{"node/api", "node/fault"}:              "the table of kinds and statuses; fault is a leaf that everyone may use",
	{"node/telemetry", "node/fault"}:        "fault is a leaf that everyone may use",
	{"node/seal", "node/fault"}:             "fault is a leaf that everyone may use",
	{"node/failpoint", "node/fault"}:        "fault is a leaf that everyone may use",
	{"proto/plugin", "node/fault"}:          "fault is a leaf that everyone may use",
	{"deploy/e2e", "node/nodetest"}:         "the same checkers judge processes and in-process clusters",
}

// only narrows a room to a few others, whatever the floors would allow.
var only = map[string][]string{
	"node/fault":          {},
	"node/seal":           {"node/fault"},
	"node/failpoint":      {"node/fault"},
	"fsm":                 {"node/fault", "proto/command"},
	"cmd/rollcall/client": {"node/api", "node/fault"},
}

// room is the room that a package of this module belongs to, "" if none.
func room(pkg string) string {
	best := ""
	for name := range floors {
		if (pkg == name || strings.HasPrefix(pkg, name+"/")) && len(name) > len(best) {
			best = name
		}
	}
	if best == "node" && pkg != "node" && !strings.HasPrefix(pkg, "node/internal/") {
		return "" // a new package below node is a room of its own, and needs a place
	}
	return best
}

// arrow says what is wrong with one import between packages of this module, "" if nothing.
func arrow(from, to string) string {
	a, b := room(from), room(to)
	switch {
	case a == "":
		return fmt.Sprintf("%s has no place: give it a floor here and in DESIGN.md section 4", from)
	case b == "":
		return fmt.Sprintf("%s has no place: give it a floor here and in DESIGN.md section 4", to)
	case a == b:
		return ""
	}
	if allowed, narrow := only[a]; narrow {
		if slices.Contains(allowed, b) {
			return ""
		}
		return fmt.Sprintf("%s imports %s: %s may know %s and nothing else", from, to, a, strings.Join(allowed, " and "))
	}
	switch {
	case floors[a] > floors[b], sideways[[2]string{a, b}] != "":
		return ""
	case floors[a] == floors[b]:
		return fmt.Sprintf("%s imports %s: both are on floor %d, and rooms of one floor do not know each other. "+
			"Declare the small interface that %s needs in %s; package node wires it", from, to, floors[a], a, a)
	}
	return fmt.Sprintf("%s (floor %d) imports %s (floor %d): imports go down. Move what is shared to a lower floor, "+
		"or let %s call %s through an interface of its own", from, floors[a], to, floors[b], b, a)
}

func TestImportsGoDownTheFloors(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", "list", "-e", "-tags=e2e", "-json=ImportPath,Imports", "./...")
	cmd.Dir = ".."
	cmd.WaitDelay = 10 * time.Second
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	packages, arrows := 0, 0
	for decoder := json.NewDecoder(bytes.NewReader(out)); ; {
		var pkg struct {
			ImportPath string
			Imports    []string
		}
		if err := decoder.Decode(&pkg); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		packages++
		from := strings.TrimPrefix(pkg.ImportPath, modulePath+"/")
		if room(from) == "" {
			t.Error(arrow(from, from))
			continue
		}
		for _, imported := range pkg.Imports {
			to, ours := strings.CutPrefix(imported, modulePath+"/")
			if !ours {
				continue
			}
			arrows++
			if wrong := arrow(from, to); wrong != "" {
				t.Error(wrong)
			}
		}
	}
	if packages < 8 || arrows < 8 {
		t.Errorf("only %d packages and %d arrows were looked at", packages, arrows)
	}
}

func TestArrowsThatBreakTheFloorsAreFound(t *testing.T) {
	for _, c := range []struct{ from, to, want string }{
		{"node", "node/reload", ""},
		{"node/reload", "node/fault", ""},
		{"node/replica", "node/replica/internal/disk", ""},
		{"transport", "transport/pki", ""},
		{"proto/peer/v1", "proto/command/v1", ""},
		{"cmd/rollcall", "cmd/rollcall/client", ""},
		{"proto/command/v1", "proto/peer/v1", "both are on floor 1"},
		{"fsm", "node/api", "fsm may know node/fault and proto/command and nothing else"},
		{"node/fault", "node/telemetry", "node/fault may know"},
		{"cmd/rollcall/client", "node", "cmd/rollcall/client may know"},
		{"node/reload", "node/router", "both are on floor 3"},
		{"transport", "node", "imports go down"},
		{"fsm/tables", "node", "fsm may know"},
		{"node/newcomer", "node/fault", "node/newcomer has no place"},
		{"node/reload", "util", "util has no place"},
	} {
		got := arrow(c.from, c.to)
		if c.want == "" && got != "" || !strings.Contains(got, c.want) {
			t.Errorf("%s -> %s: %q, want %q", c.from, c.to, got, c.want)
		}
	}
}
