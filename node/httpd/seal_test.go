package httpd

import (
	"testing"

	"rollcall/node/api"
)

func TestSealPathsSayWhatIsSealedHere(t *testing.T) {
	w := newWorld(t)
	w.rows(t, []row{
		{"GET", "sys/seal-status", "", 200, `"type":"none"`},
		{"PUT", "sys/rotate", "", 400, "seals nothing"},
		{"GET", "sys/key-status", "", 400, "seals nothing"},
		{"PUT", "sys/seal", "", 400, "cannot be sealed by a call"},
		{"PUT", "sys/init", `{"secret_shares":5}`, 400, "Vault is already initialized"},
	})
	if term, _ := w.fsm.View().KeyTerm(); term != 1 {
		t.Errorf("a node that seals nothing has rotated to term %d", term)
	}
	w.cluster.seal = &api.KeyStatus{
		Term: 1, InstallTime: "2026-01-02T03:04:05Z", Encryptions: 7, Node: "node-1", NodeTerm: 1, NodeKeys: 1, SealType: "file", SealKey: "0011223344556677",
	}
	w.rows(t, []row{
		{"GET", "sys/seal-status", "", 200, `"type":"file"`},
		{"PUT", "sys/unseal", `{"reset":true}`, 200, `"sealed":false`},
		{"PUT", "sys/rotate", "", 204, ""},
		{"POST", "sys/rotate/keyring", "", 204, ""},
		{"PUT", "sys/seal", "", 400, "cannot be sealed by a call"},
	})
	if term, _ := w.fsm.View().KeyTerm(); term != 3 {
		t.Errorf("after two rotations the term is %d", term)
	}
	// Doubled at the top level, as clients of both servers read it.
	for _, holds := range []string{`"data":{"term":1,"install_time":"2026-01-02T03:04:05Z","encryptions":7`, `"node_keys":1`, `"seal_key":"0011223344556677"`} {
		w.call("GET", "sys/key-status", "").want(t, 200, holds)
	}
	a := w.call("GET", "sys/key-status", "")
	if a.json["term"] == nil || a.json["install_time"] == nil {
		t.Errorf("not doubled: %s", a.text)
	}
}
