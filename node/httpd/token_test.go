package httpd

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"rollcall/node/api"
	"rollcall/node/fault"
	commandv1 "rollcall/proto/command/v1"
	pluginpb "rollcall/proto/plugin"
)

// created is the token that an answer gives out.
func (a *answer) created(t *testing.T) string {
	t.Helper()
	tok, _ := a.auth()["client_token"].(string)
	if a.status != 200 || tok == "" {
		t.Fatalf("%d %s", a.status, a.text)
	}
	return tok
}

const parentPolicy = `
path "auth/token/create" { capabilities = ["update"] }
path "auth/token/lookup" { capabilities = ["update"] }
path "auth/token/revoke" { capabilities = ["update"] }
path "kv/*" { capabilities = ["read"] }`

func TestAChildTokenIsNoMoreThanItsParent(t *testing.T) {
	w := newWorld(t)
	w.mount("", "kv/")
	w.namespace("team/")
	w.policy("", "p", parentPolicy)
	w.policy("", "other", `path "kv/*" { capabilities = ["update"] }`)
	w.policy("team/", "p", `path "auth/token/*" { capabilities = ["update"] }`)
	parent := w.token("parent", &commandv1.Token{Policies: []string{"default", "p"}})

	for body, text := range map[string]string{
		`{"policies":["root"]}`:          "root tokens may not be created without parent token being root",
		`{"policies":[" ROOT "]}`:        "root tokens may not be created without parent token being root",
		`{"policies":["Root\n"]}`:        "root tokens may not be created without parent token being root",
		`{"policies":["other"]}`:         "child policies must be subset of parent",
		`{"policies":["p","Other"]}`:     "child policies must be subset of parent",
		`{"no_parent":true}`:             "root or sudo privileges required to create orphan token",
		`{"period":"1h"}`:                "root or sudo privileges required to create periodic token",
		`{"id":"chosen"}`:                "root or sudo privileges required to specify token id",
		`{"policies":"root,p"}`:          "root tokens may not be created",
		`{"entity_alias":"somebody"}`:    "entity_alias",
		`{"policies":["control-group"]}`: "cannot assign policy",
	} {
		w.as(parent, "POST", "auth/token/create", body).want(t, 400, text)
	}
	w.as(parent, "POST", "auth/token/create-orphan", `{}`).want(t, 403)
	child := w.as(parent, "POST", "auth/token/create", `{"policies":[" P "],"ttl":"1h","meta":{"a":"b"},"display_name":"ci"}`).
		want(t, 200, `"policies":["default","p"]`, `"orphan":false`, `"renewable":true`, `"lease_duration":3600`, `"data":null`).created(t)
	w.as(child, "GET", "auth/token/lookup-self", "").want(t, 200, `"id":"`+child+`"`, `"display_name":"token-ci"`, `"meta":{"a":"b"}`,
		`"creation_ttl":3600`, `"path":"auth/token/create"`, `"type":"service"`, `"ttl":3600`)
	w.as(child, "GET", "kv/x", "").want(t, 200)
	w.as(child, "PUT", "kv/x", "{}").want(t, 403)
	inherited := w.as(parent, "POST", "auth/token/create", `{}`).want(t, 200, `"policies":["default","p"]`).created(t)
	bare := w.as(parent, "POST", "auth/token/create", `{"no_default_policy":true}`).want(t, 200, `"policies":["p"]`).created(t)
	w.as(bare, "GET", "auth/token/lookup-self", "").want(t, 403)

	// A policy's name means nothing in another namespace: the parent's "p" is not the one there.
	w.policy("", "cross", `path "team/auth/token/create" { capabilities = ["update"] }`)
	cross := w.token("cross", &commandv1.Token{Policies: []string{"cross", "p"}})
	w.as(cross, "POST", "team/auth/token/create", `{"policies":["p"]}`).want(t, 400, "child policies must be subset of parent")

	// The tree goes with its root.
	w.call("POST", "auth/token/revoke", fmt.Sprintf(`{"token":%q}`, parent)).want(t, 204)
	for _, tok := range []string{parent, child, inherited, bare} {
		w.as(tok, "GET", "auth/token/lookup-self", "").want(t, 403, `"permission denied"`)
	}
	if len(w.cluster.settled) == 0 {
		t.Error("the revocation was answered without waiting for the other nodes")
	}
}

func TestRootMayDoAllOfIt(t *testing.T) {
	w := newWorld(t)
	forever := w.call("POST", "auth/token/create", `{"policies":["root"]}`).want(t, 200, `"lease_duration":0`, `"renewable":false`).created(t)
	w.as(forever, "GET", "auth/token/lookup-self", "").want(t, 200, `"expire_time":null`, `"ttl":0`)
	brief := w.call("POST", "auth/token/create", `{"policies":["root"],"ttl":"10m"}`).want(t, 200, `"lease_duration":600`).created(t)
	w.as(brief, "POST", "auth/token/create", `{"policies":["root"]}`).want(t, 400, "expiring root tokens cannot create non-expiring root tokens")
	w.call("POST", "auth/token/create", `{"id":"chosen","policies":["x"]}`).want(t, 200, `"client_token":"chosen"`)
	w.call("POST", "auth/token/create", `{"id":"chosen"}`).want(t, 400, "duplicate ID")
	w.call("POST", "auth/token/create", `{"no_parent":true,"policies":["x"]}`).want(t, 200, `"orphan":true`)
	w.call("POST", "auth/token/create-orphan", `{"policies":["x"]}`).want(t, 200, `"orphan":true`)
	w.call("POST", "auth/token/create", `{"period":"1h","policies":["x"]}`).want(t, 200, `"lease_duration":3600`)
	w.call("POST", "auth/token/create", `{"ttl":"9999h","policies":["x"]}`).want(t, 200, "exceeded the effective max_ttl", `"lease_duration":2764800`)
	w.call("POST", "auth/token/create", `{"ttl":"2h","explicit_max_ttl":"1h","policies":["x"]}`).want(t, 200, `"lease_duration":3600`, "capped")
	w.call("LIST", "auth/token/accessors", "").want(t, 200, `"keys":[`)
	w.call("LIST", "auth/token/roles", "").want(t, 404)
	w.call("POST", "auth/token/tidy", "").want(t, 200, "nothing is left over")
}

func TestATokenLivesAsLongAsItsTTLSays(t *testing.T) {
	w := newWorld(t)
	tok := w.call("POST", "auth/token/create", `{"policies":["default"],"ttl":"10m"}`).created(t)
	w.pass(9 * time.Minute)
	w.as(tok, "GET", "auth/token/lookup-self", "").want(t, 200, `"ttl":60`)
	w.as(tok, "POST", "auth/token/renew-self", `{"increment":"20m"}`).want(t, 200, `"lease_duration":1200`, `"client_token":"`+tok+`"`)
	w.pass(19 * time.Minute)
	w.as(tok, "GET", "auth/token/lookup-self", "").want(t, 200, `"creation_ttl":600`)
	w.pass(2 * time.Minute)
	w.as(tok, "GET", "auth/token/lookup-self", "").want(t, 403, `"permission denied"`)
	w.as(tok, "POST", "auth/token/renew-self", `{}`).want(t, 403)
	w.call("POST", "auth/token/renew", fmt.Sprintf(`{"token":%q}`, tok)).want(t, 400, "token not found")

	capped := w.call("POST", "auth/token/create", `{"policies":["default"],"ttl":"10m","explicit_max_ttl":"15m"}`).created(t)
	w.pass(8 * time.Minute)
	w.as(capped, "POST", "auth/token/renew-self", `{"increment":"1h"}`).want(t, 200, `"lease_duration":420`)
	w.pass(8 * time.Minute)
	w.as(capped, "GET", "auth/token/lookup-self", "").want(t, 403)

	periodic := w.call("POST", "auth/token/create", `{"policies":["default"],"period":"5m"}`).created(t)
	for range 5 {
		w.pass(4 * time.Minute)
		w.as(periodic, "POST", "auth/token/renew-self", `{"increment":"1h"}`).want(t, 200, `"lease_duration":300`)
	}
	w.as(periodic, "GET", "auth/token/lookup-self", "").want(t, 200, `"period":300`)
	fixed := w.call("POST", "auth/token/create", `{"policies":["default"],"ttl":"5m","renewable":false}`).created(t)
	w.as(fixed, "POST", "auth/token/renew-self", `{}`).want(t, 400, "not renewable")
	w.call("POST", "auth/token/renew-accessor", `{"accessor":"accessor-of-nobody"}`).want(t, 403, "invalid accessor")
}

func TestARenewalDoesNotBringARevokedTokenBack(t *testing.T) {
	w := newWorld(t)
	tok := w.call("POST", "auth/token/create", `{"policies":["default"],"ttl":"10m"}`).created(t)
	hash := w.fsm.View().HashToken(tok)
	w.call("POST", "auth/token/revoke", fmt.Sprintf(`{"token":%q}`, tok)).want(t, 204)
	_, err := w.enter(&commandv1.Command{Body: &commandv1.Command_PutToken{PutToken: &commandv1.PutToken{
		MustExist: true, TtlNs: uint64(time.Hour), Token: &commandv1.Token{Hash: hash},
	}}})
	if !fault.Is(err, fault.Denied) || w.fsm.View().TokenByHash(hash) != nil {
		t.Fatalf("%v", err)
	}
}

// TestNothingOfARevokedTokenIsEntered: a command that was authorised before the revocation and comes after it is refused.
func TestNothingOfARevokedTokenIsEntered(t *testing.T) {
	w := newWorld(t)
	tok := w.token("tok", &commandv1.Token{Policies: []string{"root"}, TtlNs: uint64(time.Minute)})
	hash := w.fsm.View().HashToken(tok)
	late := &commandv1.Command{ByToken: hash, Body: &commandv1.Command_PutPolicy{PutPolicy: &commandv1.PutPolicy{
		Policy: &commandv1.Policy{Name: "late", Text: "x"},
	}}}
	if _, err := w.enter(proto.CloneOf(late)); err != nil {
		t.Fatal(err)
	}
	w.pass(time.Minute)
	if _, err := w.enter(proto.CloneOf(late)); !fault.Is(err, fault.Denied) {
		t.Errorf("after its time: %v", err)
	}
	w.must(&commandv1.Command{Body: &commandv1.Command_RevokeToken{RevokeToken: &commandv1.RevokeToken{Hash: hash}}})
	if _, err := w.enter(proto.CloneOf(late)); !fault.Is(err, fault.Denied) {
		t.Errorf("after its revocation: %v", err)
	}
}

func TestATokenWithANumberOfUsesHasNoMore(t *testing.T) {
	w := newWorld(t)
	w.mount("", "kv/")
	w.policy("", "p", parentPolicy)
	tok := w.call("POST", "auth/token/create", `{"policies":["p"],"num_uses":3}`).want(t, 200, `"num_uses":3`).created(t)
	w.as(tok, "POST", "auth/token/create", `{}`).want(t, 400, "restricted use token cannot generate child tokens")
	w.as(tok, "PUT", "kv/x", `{}`).want(t, 403) // refused: no use
	w.as(tok, "GET", "auth/token/lookup-self", "").want(t, 200, `"num_uses":1`)
	var ok, denied int
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			a := w.as(tok, "GET", "kv/x", "")
			mu.Lock()
			defer mu.Unlock()
			switch a.status {
			case 200:
				ok++
			case 403:
				denied++
			}
		})
	}
	wg.Wait()
	if ok != 1 || denied != 7 {
		t.Errorf("%d uses and %d refusals of the one use that was left", ok, denied)
	}
	if w.fsm.View().TokenByHash(w.fsm.View().HashToken(tok)) != nil {
		t.Error("the token is used up and still there")
	}
}

func TestTokensAreRevokedByEveryName(t *testing.T) {
	w := newWorld(t)
	w.policy("", "p", parentPolicy)
	make1 := func() (string, string) {
		a := w.call("POST", "auth/token/create", `{"policies":["p"],"no_parent":true}`)
		acc, _ := a.auth()["accessor"].(string)
		return a.created(t), acc
	}
	gone := func(tok string) {
		t.Helper()
		w.as(tok, "POST", "auth/token/lookup", "{}").want(t, 403)
	}
	a, acc := make1()
	w.call("POST", "auth/token/lookup-accessor", fmt.Sprintf(`{"accessor":%q}`, acc)).want(t, 200, `"id":""`, acc)
	w.call("POST", "auth/token/revoke-accessor", fmt.Sprintf(`{"accessor":%q}`, acc)).want(t, 204)
	gone(a)
	b, _ := make1()
	w.as(b, "POST", "auth/token/revoke-self", "").want(t, 204)
	gone(b)
	c, _ := make1()
	child := w.as(c, "POST", "auth/token/create", `{}`).created(t)
	w.call("POST", "auth/token/revoke-orphan", fmt.Sprintf(`{"token":%q}`, c)).want(t, 204)
	gone(c)
	w.as(child, "POST", "auth/token/lookup", "{}").want(t, 200, `"orphan":true`)
	w.call("POST", "auth/token/revoke", `{"token":"never"}`).want(t, 204)
}

func TestALoginMintsATokenWithThePoliciesOfThePlugin(t *testing.T) {
	w := newWorld(t)
	m := w.mount("", "auth/jwt/")
	w.router.open = map[string]bool{"login": true}
	w.policy("", "dev", `path "kv/*" { capabilities = ["read"] }`)
	auth := &pluginpb.Auth{
		Policies: []string{" Dev ", "response-wrapping"}, DisplayName: "bob", Metadata: map[string]string{"role": "r"},
		LeaseOptions: &pluginpb.LeaseOptions{TTL: int64(time.Hour), Renewable: true}, InternalData: `{"secret":"canary"}`,
	}
	w.router.handle = func(q *PluginRequest) (*PluginResponse, error) {
		if q.Operation == "renew" {
			if q.Path != "auth/jwt/login" || q.Auth.GetInternalData() != auth.GetInternalData() {
				return nil, fault.Text(fault.Internal, "%s %v", q.Path, q.Auth)
			}
			back := proto.CloneOf(q.Auth)
			back.LeaseOptions.TTL = q.Auth.GetLeaseOptions().GetIncrement()
			return &PluginResponse{Plugin: &pluginpb.Response{Auth: back}}, nil
		}
		return &PluginResponse{Plugin: &pluginpb.Response{Auth: auth, Data: `{"hello":"there"}`, Warnings: []string{"careful"}}}, nil
	}
	a := w.call("PUT", "auth/jwt/login", `{"jwt":"x"}`, api.HeaderToken, "").want(t, 200, `"policies":["default","dev"]`, `"metadata":{"role":"r"}`,
		`"orphan":true`, `"lease_duration":3600`, `"hello":"there"`, `"warnings":["careful"]`, `"mfa_requirement":null`)
	tok := a.created(t)
	if strings.Contains(a.text, "canary") {
		t.Error("the plugin's internal data was shown")
	}
	w.as(tok, "GET", "auth/token/lookup-self", "").want(t, 200, `"display_name":"jwt-bob"`, `"path":"auth/jwt/login"`, `"orphan":true`)
	w.as(tok, "POST", "auth/token/renew-self", `{"increment":"30m"}`).want(t, 200, `"lease_duration":1800`)

	auth.Policies = []string{"ROOT"}
	w.call("PUT", "auth/jwt/login", `{}`, api.HeaderToken, "").want(t, 400, "auth methods cannot create root tokens")
	auth.Policies, auth.NoDefaultPolicy = nil, true
	w.call("PUT", "auth/jwt/login", `{}`, api.HeaderToken, "").want(t, 200, `"policies":[]`)
	// Wrapped: the token is inside, and nowhere else.
	wrapped := w.call("PUT", "auth/jwt/login", `{}`, api.HeaderToken, "", api.HeaderWrapTTL, "60").want(t, 200, `"auth":null`, `"wrapped_accessor":"`)
	if strings.Contains(wrapped.text, "client_token") {
		t.Error(wrapped.text)
	}
	// A path that needs a token logs nobody in.
	w.call("PUT", "auth/jwt/config", `{}`).want(t, 500, "internal error")
	// An error beside an Auth mints nothing.
	before := w.fsm.View().TokenCount()
	w.router.handle = func(*PluginRequest) (*PluginResponse, error) {
		return &PluginResponse{}, fault.Text(fault.Invalid, "wrong password")
	}
	w.call("PUT", "auth/jwt/login", `{}`, api.HeaderToken, "").want(t, 400, "wrong password")
	if w.fsm.View().TokenCount() != before {
		t.Error("a failed login left a token")
	}
	w.call("DELETE", "sys/auth/jwt", "").want(t, 204)
	w.as(tok, "GET", "auth/token/lookup-self", "").want(t, 403)
	_ = m
}

func TestWhatAPluginLearnsOfATokenIsNotTheToken(t *testing.T) {
	w := newWorld(t)
	w.mount("", "kv/")
	tok := w.token("secret-token-text", &commandv1.Token{Policies: []string{"root"}, DisplayName: "me", TtlNs: uint64(time.Hour)})
	w.as(tok, "GET", "kv/x", "").want(t, 200)
	q := w.router.last()
	if strings.Contains(q.ClientToken, "secret") || len(q.ClientToken) != 64 || q.DisplayName != "me" || q.TokenAccessor == "" ||
		q.TokenTTL <= 59*time.Minute || q.TokenTTL > time.Hour {
		t.Errorf("%+v", q)
	}
	w.router.open = map[string]bool{"pub": true}
	w.call("GET", "kv/pub", "", api.HeaderToken, "").want(t, 200)
	if q := w.router.last(); q.ClientToken != "" || !q.Unauthenticated {
		t.Errorf("%+v", q)
	}
}

func TestAnUpdateOfNothingIsACreate(t *testing.T) {
	w := newWorld(t)
	w.mount("", "kv/")
	w.policy("", "c", `path "kv/*" { capabilities = ["create"] }`)
	w.policy("", "u", `path "kv/*" { capabilities = ["update"] }`)
	c := w.token("c", &commandv1.Token{Policies: []string{"c"}})
	u := w.token("u", &commandv1.Token{Policies: []string{"u"}})
	none := w.token("n", &commandv1.Token{Policies: []string{"none"}})
	asked := 0
	found := false
	w.router.exists = func(*PluginRequest) (bool, bool) { asked++; return found, true }
	w.as(c, "PUT", "kv/x", "{}").want(t, 200, `"op":"create"`)
	w.as(u, "PUT", "kv/x", "{}").want(t, 403)
	found = true
	w.as(c, "PUT", "kv/x", "{}").want(t, 403)
	w.as(u, "PUT", "kv/x", "{}").want(t, 200, `"op":"update"`)
	asked = 0
	w.as(none, "PUT", "kv/x", "{}").want(t, 403)
	if asked != 0 {
		t.Error("the plugin was asked for somebody who may do nothing")
	}
	w.router.root = map[string]bool{"x": true}
	w.as(u, "PUT", "kv/x", "{}").want(t, 403)
	w.policy("", "s", `path "kv/*" { capabilities = ["update", "sudo"] }`)
	w.as(w.token("s", &commandv1.Token{Policies: []string{"s"}}), "PUT", "kv/x", "{}").want(t, 200)
}

func TestAnAnswerIsUnwrappedOnce(t *testing.T) {
	w := newWorld(t)
	w.mount("", "kv/")
	w.policy("", "p", `path "kv/*" { capabilities = ["read"] }`)
	reader := w.token("reader", &commandv1.Token{Policies: []string{"default", "p"}})
	wrap := func() string {
		t.Helper()
		a := w.as(reader, "GET", "kv/x", "", api.HeaderWrapTTL, "5m").want(t, 200, `"request_id":""`, `"data":null`, `"creation_path":"kv/x"`, `"ttl":300`)
		tok, _ := a.wrap()["token"].(string)
		return tok
	}
	tok := wrap()
	w.as(tok, "POST", "sys/wrapping/lookup", "").want(t, 200, `"creation_ttl":300`, `"creation_path":"kv/x"`)
	for _, path := range []string{"auth/token/lookup-self", "kv/x", "sys/mounts"} {
		w.as(tok, "GET", path, "").want(t, 403, `"permission denied"`)
	}
	w.as(tok, "POST", "sys/wrapping/unwrap", "").want(t, 200, `"path":"kv/x"`, `"wrap_info":null`)
	w.as(tok, "POST", "sys/wrapping/unwrap", "").want(t, 400, "wrapping token is not valid or does not exist")
	// By a token of one's own, with the wrapping token in the body.
	tok = wrap()
	w.as(reader, "PUT", "sys/wrapping/unwrap", fmt.Sprintf(`{"token":%q}`, tok)).want(t, 200, `"path":"kv/x"`)
	w.call("PUT", "sys/wrapping/unwrap", fmt.Sprintf(`{"token":%q}`, wrap()), api.HeaderToken, "").want(t, 403)
	w.call("PUT", "sys/wrapping/unwrap", `{}`, api.HeaderToken, "").want(t, 403)
	// Rewrapped: the old one is over, the answer the same.
	tok = wrap()
	again, _ := w.as(tok, "POST", "sys/wrapping/rewrap", "").want(t, 200, `"creation_path":"kv/x"`).wrap()["token"].(string)
	w.as(tok, "POST", "sys/wrapping/unwrap", "").want(t, 400)
	w.as(again, "POST", "sys/wrapping/unwrap", "").want(t, 200, `"path":"kv/x"`)
	// What is sent in.
	a := w.call("POST", "sys/wrapping/wrap", `{"zip":"zap"}`, api.HeaderWrapTTL, "60").want(t, 200)
	tok, _ = a.wrap()["token"].(string)
	w.as(tok, "POST", "sys/wrapping/unwrap", "").want(t, 200, `"zip":"zap"`)
	// In time only.
	tok = wrap()
	w.pass(5 * time.Minute)
	w.as(tok, "POST", "sys/wrapping/unwrap", "").want(t, 400)
	w.call("GET", "kv/x", "", api.HeaderWrapTTL, "soon").want(t, 400, "duration")
	// The state holds nothing that opens it.
	tok = wrap()
	row := w.fsm.View().TokenByHash(w.fsm.View().HashToken(tok))
	if len(row.GetWrapped()) == 0 || strings.Contains(string(row.GetWrapped()), "kv/x") || strings.Contains(row.String(), tok) {
		t.Errorf("%v", row)
	}
	// Of many at once, one has it.
	var wg sync.WaitGroup
	var mu sync.Mutex
	n := 0
	for range 8 {
		wg.Go(func() {
			if w.as(tok, "POST", "sys/wrapping/unwrap", "").status == 200 {
				mu.Lock()
				n++
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if n != 1 {
		t.Errorf("%d unwrapped it", n)
	}
}

func TestPoliciesAreWrittenAndRead(t *testing.T) {
	w := newWorld(t)
	w.rows(t, []row{
		{"LIST", "sys/policies/acl", "", 200, `"keys":["default","root"]`},
		{"GET", "sys/policy", "", 200, `"policies":["default","root"]`},
		{"PUT", "sys/policies/acl/%20Ops", `{"policy":"path \"a\" { capabilities = [\"read\"] }"}`, 204, ""},
		{"GET", "sys/policies/acl/OPS", "", 200, `"name":"ops"`},
		{"GET", "sys/policy/ops", "", 200, `"rules":"path`},
		{"PUT", "sys/policy/old", `{"rules":"path \"a\" { policy = \"read\" }"}`, 204, ""},
		{"PUT", "sys/policies/acl/b64", `{"policy":"cGF0aCAiYSIgeyBwb2xpY3kgPSAicmVhZCIgfQ=="}`, 204, ""},
		{"GET", "sys/policies/acl/b64", "", 200, `path \"a\"`},
		{"LIST", "sys/policies/acl", "", 200, `"keys":["b64","default","old","ops","root"]`},
		{"GET", "sys/policies/acl/default", "", 200, "lookup-self"},
		{"GET", "sys/policies/acl/root", "", 200, `"policy":""`},
		{"GET", "sys/policies/acl/nope", "", 404, `{"errors":[]}`},
		{"DELETE", "sys/policies/acl/ops", "", 204, ""},
		{"DELETE", "sys/policies/acl/nope", "", 204, ""},
		{"PUT", "sys/policies/acl/default", `{"policy":"path \"mine\" { policy = \"read\" }"}`, 204, ""},
		{"GET", "sys/policies/acl/default", "", 200, "mine"},
		{"POST", "sys/capabilities", `{"token":"` + rootToken + `","paths":["a","b"]}`, 200, `"a":["root"]`},
		{"POST", "sys/capabilities", `{"token":"nope","paths":["a"]}`, 400, "invalid token"},
		{"POST", "sys/capabilities-self", `{}`, 400, "paths must be supplied"},
	})
	w.policy("", "p", `path "a" { capabilities = ["read", "sudo"] }`)
	w.token("x", &commandv1.Token{Policies: []string{"p"}})
	w.call("POST", "sys/capabilities-accessor", `{"accessor":"accessor-of-x","path":"/a"}`).want(t, 200, `"capabilities":["read","sudo"]`)
}

func TestNamespacesNestAndConfine(t *testing.T) {
	w := newWorld(t)
	ns := func(v string) []string { return []string{api.HeaderNamespace, v} }
	w.call("POST", "sys/namespaces/team", `{"custom_metadata":{"a":"1","b":"2"}}`).want(t, 200, `"path":"team/"`, `"tainted":false`, `"uuid":"`)
	w.call("PUT", "sys/namespaces/sub", `{}`, ns("team")...).want(t, 200, `"path":"sub/"`)
	w.call("GET", "sys/namespaces/team/sub", "").want(t, 200, `"path":"team/sub/"`)
	w.call("GET", "team/sys/namespaces/sub", "").want(t, 200, `"path":"sub/"`)
	w.call("LIST", "sys/namespaces", "").want(t, 200, `"keys":["team/"]`, `"key_info":{"team/":{`)
	w.call("LIST", "sys/namespaces", "", ns("/team/")...).want(t, 200, `"keys":["sub/"]`)
	w.call("LIST", "sys/namespaces", "", ns("team/sub")...).want(t, 404)
	w.call("PATCH", "sys/namespaces/team", `{"custom_metadata":{"a":null,"c":"3"}}`, "Content-Type", "application/merge-patch+json").
		want(t, 200, `"custom_metadata":{"b":"2","c":"3"}`)
	w.call("PATCH", "sys/namespaces/nope", `{}`, "Content-Type", "application/merge-patch+json").want(t, 404)
	w.call("POST", "sys/namespaces/team", `{}`).want(t, 200, `"custom_metadata":{"b":"2","c":"3"}`)
	a := w.call("GET", "sys/mounts", "", ns("team")...).want(t, 200, `"data":{}`)
	if a.header.Get(api.HeaderNamespace) != "team/" {
		t.Error(a.header)
	}
	w.call("GET", "sys/mounts", "", ns("root")...).want(t, 200)
	w.call("GET", "sys/mounts", "", ns("/")...).want(t, 200)
	w.call("GET", "sys/mounts", "", ns("nope")...).want(t, 404, "namespace not found")
	w.call("GET", "sys/mounts", "", ns("Team")...).want(t, 404, "namespace not found")

	// The same mount by header, by path, and by both.
	w.mount("team/sub/", "kv/")
	for _, c := range [][2]string{{"team/sub", "kv/x"}, {"team", "sub/kv/x"}, {"", "team/sub/kv/x"}, {"/team/sub/", "kv/x"}} {
		w.call("GET", c[1], "", ns(c[0])...).want(t, 200, `"ns":"team/sub/"`, `"path":"kv/x"`)
	}
	w.call("GET", "kv/x", "", ns("team")...).want(t, 404)
	w.call("GET", "sys/internal/ui/mounts/kv/x", "", ns("team/sub")...).want(t, 200, `"path":"team/sub/kv/"`)
	for _, path := range []string{"sys/storage/raft/configuration", "sys/metrics", "sys/members", "sys/audit"} {
		w.call("GET", path, "", ns("team")...).want(t, 400, "operation unavailable in namespaces")
	}
	w.call("PUT", "sys/plugins/reload/secret/kv", "{}", ns("team")...).want(t, 400, "operation unavailable in namespaces")
	w.call("PUT", "sys/plugins/reload/backend", `{"mounts":["kv"]}`).want(t, 400) // root's /backend does not reach it
	w.call("PUT", "sys/plugins/reload/backend", `{"mounts":["kv"],"scope":"global"}`, ns("team/sub")...).want(t, 202)

	w.call("DELETE", "sys/namespaces/team", "").want(t, 400, "is inside it")
	tok := w.token("t", &commandv1.Token{Policies: []string{"root"}, Namespace: "team/sub/"})
	w.as(tok, "GET", "sys/mounts", "", ns("team/sub")...).want(t, 200)
	w.as(tok, "GET", "sys/mounts", "").want(t, 403)
	w.call("DELETE", "sys/namespaces/sub", "", ns("team")...).want(t, 200, `"status":"deleted"`)
	w.as(tok, "GET", "sys/mounts", "").want(t, 403)
	w.call("DELETE", "sys/namespaces/sub", "", ns("team")...).want(t, 200, "requested namespace does not exist")
	if len(w.fsm.View().Mounts()) != 0 {
		t.Error("its mounts are still there")
	}
}

func TestLeasesAreLookedUpRenewedAndRevoked(t *testing.T) {
	w := newWorld(t)
	m := w.mount("", "kv/")
	lend := func(id string) {
		w.must(&commandv1.Command{Body: &commandv1.Command_PutLease{PutLease: &commandv1.PutLease{Lease: &commandv1.Lease{
			Id: id, MountUuid: m.GetUuid(), Path: "creds/x", TtlNs: uint64(time.Hour), Renewable: true,
		}}}})
	}
	lend("kv/creds/x/1")
	lend("kv/creds/x/2")
	lend("kv/creds/y/1")
	w.rows(t, []row{
		{"PUT", "sys/leases/lookup", `{"lease_id":"kv/creds/x/1"}`, 200, `"renewable":true,"ttl":3600`},
		{"LIST", "sys/leases/lookup", "", 200, `"keys":["kv/"]`},
		{"LIST", "sys/leases/lookup/kv/creds", "", 200, `"keys":["x/","y/"]`},
		{"LIST", "sys/leases/lookup/kv/creds/x", "", 200, `"keys":["1","2"]`},
		{"GET", "sys/leases/count", "", 200, `"lease_count":3`},
		{"PUT", "sys/leases/renew", `{"lease_id":"kv/creds/x/1","increment":60}`, 200, `"lease_duration":60`},
		{"PUT", "sys/renew/kv/creds/x/1", `{"increment":"2m"}`, 200, `"lease_duration":120`},
		{"PUT", "sys/leases/revoke", `{"lease_id":"kv/creds/x/1"}`, 204, ""},
		{"PUT", "sys/leases/lookup", `{"lease_id":"kv/creds/x/1"}`, 400, "invalid lease"},
		{"PUT", "sys/leases/revoke-prefix/kv/creds/x", "", 204, ""},
		{"LIST", "sys/leases/lookup/kv/creds/x", "", 404, ""},
		{"PUT", "sys/revoke-force/kv", "", 204, ""},
		{"GET", "sys/leases/count", "", 200, `"lease_count":0`},
	})
	// A prefix is of whole segments.
	lend("kv/creds/x/3")
	lend("kv/creds/xy/3")
	w.call("PUT", "sys/leases/revoke-prefix/kv/creds/x", "").want(t, 204)
	w.call("LIST", "sys/leases/lookup/kv/creds", "").want(t, 200, `"keys":["xy/"]`)
	w.leases.left = 1
	w.call("PUT", "sys/leases/revoke", `{"lease_id":"kv/creds/xy/3","sync":true}`).want(t, 400, "not revoked yet")
}

func TestADisabledMountWaitsForItsPluginAsLongAsThatTakesLeasesBack(t *testing.T) {
	w := newWorld(t)
	lent := func(path string, n int) {
		m := w.mount("", path)
		for i := range n {
			w.must(&commandv1.Command{Body: &commandv1.Command_PutLease{PutLease: &commandv1.PutLease{Lease: &commandv1.Lease{
				Id: fmt.Sprintf("%screds/%d", path, i), MountUuid: m.GetUuid(), Path: "creds", TtlNs: uint64(time.Hour), Renewable: true,
			}}}})
		}
	}
	lent("kv/", 9)
	w.leases.left, w.leases.takes = 9, 2
	w.call("DELETE", "sys/mounts/kv", "").want(t, 204)
	lent("dead/", 9)
	w.leases.left, w.leases.takes = 9, 0
	w.call("DELETE", "sys/mounts/dead", "").want(t, 200, "9 leases of dead/ could not be revoked")
}

func TestUIMountsShowWhatTheCallerHasBusinessWith(t *testing.T) {
	w := newWorld(t)
	w.mount("", "kv/")
	w.mount("", "other/")
	w.policy("", "p", "path \"kv/data/team/*\" { capabilities = [\"read\"] }\npath \"other/*\" { capabilities = [\"deny\"] }")
	tok := w.token("t", &commandv1.Token{Policies: []string{"p", "default"}})
	a := w.as(tok, "GET", "sys/internal/ui/mounts", "").want(t, 200, `"kv/"`)
	if strings.Contains(a.text, "other/") {
		t.Error(a.text)
	}
	w.as(tok, "GET", "sys/internal/ui/mounts/kv/data/x", "").want(t, 200, `"path":"kv/"`)
	w.as(tok, "GET", "sys/internal/ui/mounts/other/x", "").want(t, 403, "preflight capability check returned 403")
	w.call("GET", "sys/internal/ui/mounts", "", api.HeaderToken, "").want(t, 200, `"secret":{}`)
	w.call("POST", "sys/mounts/kv/tune", `{"listing_visibility":"unauth"}`).want(t, 204)
	w.call("GET", "sys/internal/ui/mounts", "", api.HeaderToken, "").want(t, 200, `"kv/"`)
}

func TestAnotherNameOfADeniedPathIsDenied(t *testing.T) {
	w := newWorld(t)
	w.mount("", "kv/")
	w.mount("", "auth/jwt/")
	w.policy("", "p", `
path "sys/*" { capabilities = ["create", "read", "update", "delete", "list", "sudo"] }
path "sys/mounts/kv" { capabilities = ["deny"] }
path "sys/mounts/kv/tune" { capabilities = ["deny"] }
path "sys/auth/jwt" { capabilities = ["deny"] }
path "sys/auth/jwt/tune" { capabilities = ["deny"] }
path "sys/policies/acl/secret" { capabilities = ["deny"] }`)
	tok := w.token("t", &commandv1.Token{Policies: []string{"p"}})
	for _, path := range []string{
		"sys/mounts/kv", "sys/mounts/kv/", "sys/mounts/kv/x", "sys/mounts/kv/tune", "sys/mounts/kv/x/tune", "sys/auth/jwt", "sys/mounts/auth/jwt",
		"sys/mounts/auth/jwt/tune", "sys/policies/acl/secret", "sys/policies/acl/SECRET", "sys/policies/acl/%20Secret%20",
	} {
		w.as(tok, "GET", path, "").want(t, 403)
	}
	w.as(tok, "POST", "sys/mounts/kv/x/tune", `{"description":"d"}`).want(t, 403)
	w.as(tok, "POST", "sys/mounts/auth/jwt/tune", `{"description":"d"}`).want(t, 403)
}
