//go:build e2e

package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"sync"
	"testing"
	"time"

	"rollcall/node/api"
)

// signer signs JSON web tokens as an identity provider does.
type signer struct{ key *ecdsa.PrivateKey }

func newSigner(t *testing.T) (signer, string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return signer{key}, string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
}

func (s signer) token(t *testing.T, subject string) string {
	t.Helper()
	part := func(v any) string {
		raw, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return base64.RawURLEncoding.EncodeToString(raw)
	}
	now := time.Now()
	text := part(map[string]string{"alg": "ES256", "typ": "JWT"}) + "." + part(map[string]any{
		"iss": "e2e", "sub": subject, "aud": "rollcall", "iat": now.Unix(), "nbf": now.Add(-time.Minute).Unix(), "exp": now.Add(time.Hour).Unix(),
	})
	digest := sha256.Sum256([]byte(text))
	r, v, err := ecdsa.Sign(rand.Reader, s.key, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	sig := make([]byte, 64)
	r.FillBytes(sig[:32])
	v.FillBytes(sig[32:])
	return text + "." + base64.RawURLEncoding.EncodeToString(sig)
}

// TestAnAuthMethodAndASecretsEngineAreReloadedTogether mounts a released auth plugin beside KV, logs in all the while, and
// reloads both mounts by one call.
func TestAnAuthMethodAndASecretsEngineAreReloadedTogether(t *testing.T) {
	c := newCluster(t, options{config: patient})
	c.mountKV(kvOld)
	sha := c.install("auth-jwt")
	client := c.any()
	for _, v := range []string{"v0.26.1", "v0.26.2"} { // the same bytes under two versions
		if _, err := client.RegisterPlugin(timeout(t, long), "auth", "jwt", api.RegisterRequest{SHA256: sha, Version: v, Command: "auth-jwt"}); err != nil {
			t.Fatal(err)
		}
	}
	if err := client.Enable(timeout(t, long), "auth", "jwt", api.MountInput{
		Type: "jwt", Config: &api.MountConfigInput{PluginVersion: "v0.26.1"},
	}); err != nil {
		t.Fatal(err)
	}
	c.serving()
	sign, public := newSigner(t)
	for path, body := range map[string]any{
		"auth/jwt/config": map[string]any{"jwt_validation_pubkeys": []string{public}, "bound_issuer": "e2e"},
		"auth/jwt/role/dev": map[string]any{
			"role_type": "jwt", "user_claim": "sub", "bound_audiences": []string{"rollcall"},
			"token_policies": []string{"default"}, "token_ttl": "10m",
		},
	} {
		if _, err := client.Write(timeout(t, long), path, body); err != nil {
			t.Fatalf("%s: %v", path, err)
		}
	}
	login := func(s *server) error {
		body := fmt.Sprintf(`{"role":"dev","jwt":%q}`, sign.token(t, "somebody"))
		status, answer, err := c.send(timeout(t, short), s, http.MethodPost, "auth/jwt/login", body)
		if err != nil {
			return err
		}
		var env struct {
			Auth struct {
				ClientToken string   `json:"client_token"`
				Policies    []string `json:"policies"`
			} `json:"auth"`
		}
		if err := json.Unmarshal([]byte(answer), &env); err != nil || status != http.StatusOK || env.Auth.ClientToken == "" {
			return fmt.Errorf("%d %s", status, answer)
		}
		return nil
	}
	for _, s := range c.nodes {
		until(t, short, "a login through "+s.name, func() error { return login(s) })
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var mu sync.Mutex
	logins := 0
	for _, s := range c.nodes {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(20 * time.Millisecond):
				}
				if err := login(s); err != nil {
					t.Errorf("login through %s: %v", s.name, err)
					return
				}
				mu.Lock()
				logins++
				mu.Unlock()
			}
		})
	}
	if _, err := client.Tune(timeout(t, long), "auth", "jwt", api.TuneInput{MountConfigInput: api.MountConfigInput{PluginVersion: "v0.26.2"}}); err != nil {
		t.Error(err)
	}
	rec := c.reload(c.nodes[1], api.ReloadRequest{Mounts: []string{"kv", "auth/jwt"}})
	close(stop)
	wg.Wait()
	if rec.Outcome != api.OutcomeSucceeded || len(rec.Targets) != 2 {
		t.Fatal(tell(rec))
	}
	for _, n := range rec.Nodes {
		for _, m := range n.Mounts {
			if m.Verdict != api.VerdictSwitched || m.From.PID == m.To.PID || m.Requests.Failed > 0 {
				t.Errorf("%s %s: %+v", n.Node, m.Mount, m)
			}
		}
	}
	for node, v := range c.running("auth/jwt/") {
		if v != "v0.26.2" {
			t.Errorf("%s runs jwt %s", node, v)
		}
	}
	t.Logf("%d logins, none failed", logins)
	if logins < 10 {
		t.Errorf("%d logins are too few to mean anything", logins)
	}
}
