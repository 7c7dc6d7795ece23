package client

import (
	"io"
	"reflect"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// newTestRoot is the whole client command line of an Env.
func newTestRoot(e *Env) *cobra.Command {
	root := NewRoot(e)
	root.AddCommand(Commands(e)...)
	return root
}

func TestFlagsAreAcceptedAsVaultAndBaoUsersTypeThem(t *testing.T) {
	root := newTestRoot(&Env{Stdin: strings.NewReader(""), Stdout: io.Discard, Stderr: io.Discard, Getenv: func(string) string { return "" }})
	for _, c := range []struct{ in, want string }{
		{"plugin reload -plugin=kv -scope=global -format=json", "plugin reload --plugin=kv --scope=global --format=json"},
		{"plugin reload -plugin kv -scope global", "plugin reload --plugin kv --scope global"},
		{"plugin reload --plugin kv", "plugin reload --plugin kv"},
		{"plugin info secret kv -version=v1 -field=sha256", "plugin info secret kv --version=v1 --field=sha256"},
		{"plugin info -h", "plugin info -h"},
		{"plugin info -help", "plugin info --help"},
		{"write -f auth/token/revoke-self", "write -f auth/token/revoke-self"},
		{"write -force x", "write --force x"},
		{"write kv/x a=-1 b=-", "write kv/x a=-1 b=-"},
		{"write kv/x -", "write kv/x -"},
		{"write kv/x @file.json -format=json", "write kv/x @file.json --format=json"},
		{"secrets tune -description -quiet p/", "secrets tune --description -quiet p/"},
		{"secrets tune -description=-quiet p/", "secrets tune --description=-quiet p/"},
		{"write -- kv/x -force", "write -- kv/x -force"},
		{"read x -5", "read x -5"},
		{"plugin reload -reload_id=a", "plugin reload --reload_id=a"},
		{"plugin reload -reload_id -x", "plugin reload --reload_id -x"},
		{"plugin reload -exclude-fenced=false -mounts a", "plugin reload --exclude-fenced=false --mounts a"},
		{"status -tls-skip-verify -address x", "status --tls-skip-verify --address x"},
		{"-help", "--help"},
		{"__complete plugin reload -scope=global -str", "__complete plugin reload --scope=global -str"},
	} {
		if got := strings.Join(Normalize(root, strings.Fields(c.in)), " "); got != c.want {
			t.Errorf("%q\n got %q\nwant %q", c.in, got, c.want)
		}
	}
	if got := Normalize(root, []string{"write", "x", ""}); !reflect.DeepEqual(got, []string{"write", "x", ""}) {
		t.Errorf("an empty argument: %q", got)
	}
}

func TestErrorsSpellFlagsWithOneDash(t *testing.T) {
	if got := oneDash(`unknown flag: --foo (or "--bar", --c) a--b 1--2`); got != `unknown flag: -foo (or "-bar", -c) a--b 1--2` {
		t.Error(got)
	}
}
