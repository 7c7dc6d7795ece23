package clients

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"slices"
	"testing"
	"time"

	vault "github.com/hashicorp/vault/api"
)

// TestLoginThroughAnAuthPlugin logs in through a released auth plugin with both libraries: the token has the policies that the
// plugin names, is renewed through the plugin, and ends with the auth method.
func TestLoginThroughAnAuthPlugin(t *testing.T) {
	through(t, func(t *testing.T, n at) {
		root := vaultClient(t, n.addr, rootToken)
		name := "login-" + n.N
		registerVault(t, n, vault.PluginTypeCredential, name, "auth-jwt", "v0.26.1")
		must(t, root.Sys().EnableAuthWithOptions(name, &vault.EnableAuthOptions{
			Type: name, Description: "d", Config: vault.AuthConfigInput{DefaultLeaseTTL: "10m", ListingVisibility: "unauth"},
		}))
		m := got(root.Sys().GetAuth(name))(t)
		list := got(root.Sys().ListAuth())(t)
		if asJSON(list[name+"/"]) != asJSON(m) || m.RunningVersion != "v0.26.1" || m.Config.DefaultLeaseTTL != 600 {
			t.Errorf("%+v", m)
		}
		n.note("auth %s", asJSON(m))
		open := got(vaultClient(t, n.addr, "").Logical().Read("sys/internal/ui/mounts"))(t)
		if seen, _ := open.Data["auth"].(map[string]any); seen[name+"/"] == nil {
			t.Errorf("what shall be seen without a token is not: %v", open.Data)
		}
		must(t, root.Sys().PutPolicy(name, `path "sys/mounts" { capabilities = ["read"] }`))
		key, public := signingKey(t)
		for path, body := range map[string]map[string]any{
			"config":   {"jwt_validation_pubkeys": []string{public}, "bound_issuer": "clients"},
			"role/dev": {"role_type": "jwt", "user_claim": "sub", "bound_audiences": []string{"rollcall"}, "token_policies": []string{name}, "token_ttl": "5m"},
		} {
			got(root.Logical().Write("auth/"+name+"/"+path, body))(t)
		}
		jwt := signed(t, key, "somebody")
		s := got(vaultClient(t, n.addr, "").Logical().Write("auth/"+name+"/login", map[string]any{"role": "dev", "jwt": jwt}))(t)
		if s.Auth == nil || s.Auth.LeaseDuration != 300 || !s.Auth.Renewable || !slices.Equal(s.Auth.Policies, []string{"default", name}) || s.Auth.Metadata["role"] != "dev" {
			t.Fatalf("%+v", s.Auth)
		}
		n.note("login %s", asJSON(s.Auth))
		user := vaultClient(t, n.addr, s.Auth.ClientToken)
		got(user.Sys().ListMounts())(t)
		_, err := user.Sys().ListAuth()
		refused(t, err, 403, "permission denied")
		self := got(user.Auth().Token().LookupSelf())(t)
		n.note("display name %v, path %v, orphan %v", self.Data["display_name"], self.Data["path"], self.Data["orphan"])
		n.note("renewed to %d", got(user.Auth().Token().RenewSelf(120))(t).Auth.LeaseDuration)
		b := got(baoClient(t, n.addr, "").Logical().Write("auth/"+name+"/login", map[string]any{"role": "dev", "jwt": jwt}))(t)
		got(baoClient(t, n.addr, b.Auth.ClientToken).Sys().ListMounts())(t)

		_, err = vaultClient(t, n.addr, "").Logical().Write("auth/"+name+"/login", map[string]any{"role": "dev", "jwt": jwt + "x"})
		refused(t, err, 400, "error validating token")
		_, err = baoClient(t, n.addr, "").Logical().Write("auth/"+name+"/login", map[string]any{"role": "nope", "jwt": jwt})
		baoRefused(t, err, 400, "nope")
		must(t, root.Sys().DisableAuth(name))
		for _, other := range shared.nodes {
			_, err = vaultClient(t, other.addr, s.Auth.ClientToken).Sys().ListMounts()
			refused(t, err, 403, "permission denied")
			_, err = baoClient(t, other.addr, b.Auth.ClientToken).Sys().ListMounts()
			baoRefused(t, err, 403, "permission denied")
		}
	})
}

func signingKey(t *testing.T) (*ecdsa.PrivateKey, string) {
	t.Helper()
	key := got(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	der := got(x509.MarshalPKIXPublicKey(&key.PublicKey))(t)
	return key, string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
}

// signed is a JSON web token as an identity provider makes it.
func signed(t *testing.T, key *ecdsa.PrivateKey, subject string) string {
	t.Helper()
	part := func(v any) string { return base64.RawURLEncoding.EncodeToString(got(json.Marshal(v))(t)) }
	now := time.Now()
	text := part(map[string]string{"alg": "ES256", "typ": "JWT"}) + "." + part(map[string]any{
		"iss": "clients", "sub": subject, "aud": "rollcall", "iat": now.Unix(), "nbf": now.Add(-time.Minute).Unix(), "exp": now.Add(time.Hour).Unix(),
	})
	digest := sha256.Sum256([]byte(text))
	r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
	must(t, err)
	sig := make([]byte, 64)
	r.FillBytes(sig[:32])
	s.FillBytes(sig[32:])
	return text + "." + base64.RawURLEncoding.EncodeToString(sig)
}
