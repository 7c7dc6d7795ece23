package nodetest

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"rollcall/node/api"
)

// try is one request by somebody: when it was sent, what came back.
type try struct {
	node, status int
	sent         time.Time
	method, path string
}

// as sends one request with a token, without any client's retries. Status 0 is an answer that did not come.
func (c *Cluster) as(ctx context.Context, token string, i int, method, path, body string) (int, string) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, c.Node(i).APIAddress()+"/v1/"+path, strings.NewReader(body))
	if err != nil {
		return 0, err.Error()
	}
	req.Header.Set(api.HeaderToken, token)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, 1<<16))
	if err != nil {
		return 0, err.Error()
	}
	return resp.StatusCode, string(raw)
}

// newToken makes a token that may do everything at demo/, and a child of it.
func (c *Cluster) newToken(t testing.TB, name string) (parent, child string) {
	t.Helper()
	ctx := t.Context()
	text := `path "demo/*" { capabilities = ["create", "read", "update", "delete", "list"] }
path "auth/token/create" { capabilities = ["update"] }`
	raw, err := json.Marshal(map[string]string{"policy": text})
	if err != nil {
		t.Fatal(err)
	}
	if status, answer := c.as(ctx, c.Token, 0, http.MethodPut, "sys/policies/acl/"+name, string(raw)); status != http.StatusNoContent {
		t.Fatalf("policy: %d %s", status, answer)
	}
	mint := func(by string) string {
		status, answer := c.as(ctx, by, 0, http.MethodPost, "auth/token/create", fmt.Sprintf(`{"policies":[%q],"ttl":"1h"}`, name))
		var env api.Envelope
		var auth api.Auth
		if err := json.Unmarshal([]byte(answer), &env); err != nil || status != http.StatusOK {
			t.Fatalf("token: %d %s", status, answer)
		}
		if err := json.Unmarshal(env.Auth, &auth); err != nil {
			t.Fatal(err)
		}
		return auth.ClientToken
	}
	parent = mint(c.Token)
	return parent, mint(parent)
}

// pester sends reads and writes with a token to every node until ctx ends. Every write has a key of its own, which says when it was
// sent.
func (c *Cluster) pester(ctx context.Context, token string) (stop func() []try) {
	ctx, cancel := context.WithCancel(ctx)
	var mu sync.Mutex
	var all []try
	var wg sync.WaitGroup
	for i := range 3 {
		for _, method := range []string{http.MethodGet, http.MethodPut} {
			wg.Go(func() {
				for n := 0; ctx.Err() == nil; n++ {
					path := "demo/info"
					if method == http.MethodPut {
						path = fmt.Sprintf("demo/data/w%d-%d", i, n)
					}
					k := try{node: i, sent: time.Now(), method: method, path: path}
					k.status, _ = c.as(context.WithoutCancel(ctx), token, i, method, path, `{"value":"x"}`)
					mu.Lock()
					all = append(all, k)
					mu.Unlock()
					time.Sleep(2 * time.Millisecond)
				}
			})
		}
	}
	return func() []try {
		cancel()
		wg.Wait()
		return all
	}
}

// keysAt lists what is stored under demo/data.
func (c *Cluster) keysAt(t testing.TB, i int) []string {
	t.Helper()
	status, answer := c.as(t.Context(), c.Token, i, "LIST", "demo/data", "")
	if status == http.StatusNotFound {
		return nil
	}
	var env struct {
		Data struct{ Keys []string } `json:"data"`
	}
	if err := json.Unmarshal([]byte(answer), &env); err != nil || status != http.StatusOK {
		t.Fatalf("list: %d %s", status, answer)
	}
	return env.Data.Keys
}

// judgeRevocation fails when anything that was sent after the revocation was answered took effect, and returns how long after its being asked
// for the last request that succeeded was sent.
func (c *Cluster) judgeRevocation(t *testing.T, all []try, asked, answered time.Time) time.Duration {
	t.Helper()
	stored := map[string]bool{}
	for _, k := range c.keysAt(t, 0) {
		stored[k] = true
	}
	var last time.Duration
	refused := make([]int, 3)
	for _, k := range all {
		done := k.status >= 200 && k.status < 300 || k.method == http.MethodPut && stored[strings.TrimPrefix(k.path, "demo/data/")]
		switch {
		case done && k.sent.After(answered):
			t.Errorf("%s %s on node %d took effect (%d) though it was sent %v after the revocation was answered", k.method, k.path, k.node, k.status, k.sent.Sub(answered))
		case done:
			last = max(last, k.sent.Sub(asked))
		case k.status == http.StatusForbidden:
			refused[k.node]++
		}
	}
	if slices.Contains(refused, 0) {
		t.Errorf("refusals by node: %v: some node never said so", refused)
	}
	return last
}

// TestARevocationIsSeenOnEveryNodeWithinASecond revokes tokens and their parents under load, through each node in turn.
func TestARevocationIsSeenOnEveryNodeWithinASecond(t *testing.T) {
	c := Start(t, 3, nil)
	c.Register("demo", "v1.0.0")
	c.Enable("demo", "demo", "v1.0.0")
	var took []time.Duration
	for round := range 6 {
		parent, child := c.newToken(t, fmt.Sprintf("r%d", round))
		stop := c.pester(t.Context(), child)
		victim := child
		if round >= 3 { // the tree goes with its root
			victim = parent
		}
		c.Eventually(20*time.Second, "a write by the token", func() error {
			if len(c.keysAt(t, 0)) == 0 {
				return fmt.Errorf("nothing is stored")
			}
			return nil
		})
		asked := time.Now()
		status, answer := c.as(t.Context(), c.Token, round%3, http.MethodPut, "auth/token/revoke", fmt.Sprintf(`{"token":%q}`, victim))
		answered := time.Now()
		if status != http.StatusNoContent {
			t.Fatalf("revoke: %d %s", status, answer)
		}
		c.Eventually(20*time.Second, "refusals on every node", func() error {
			for i := range 3 {
				if status, answer := c.as(t.Context(), child, i, http.MethodGet, "demo/info", ""); status != http.StatusForbidden {
					return fmt.Errorf("node %d: %d %s", i, status, answer)
				}
			}
			return nil
		})
		time.Sleep(100 * time.Millisecond) // more tries of the revoked token, so that there is something to judge
		took = append(took, c.judgeRevocation(t, stop(), asked, answered))
		for _, k := range c.keysAt(t, 0) {
			if status, answer := c.as(t.Context(), c.Token, 0, http.MethodDelete, "demo/data/"+k, ""); status >= 300 {
				t.Fatalf("delete: %d %s", status, answer)
			}
		}
	}
	slices.Sort(took)
	t.Logf("the last request that a revoked token got through was sent this long after the revocation was asked for: %v", took)
	if middle := took[len(took)/2]; middle > time.Second {
		t.Errorf("half of the revocations took longer than %v to be seen everywhere", middle)
	}
}

// TestNothingOfARevokedTokenStartsOnALeaderThatWasCutOff: the leader is cut off from the others while it serves the token, the token is revoked
// through them, and the leader returns. From the moment that the revocation is answered nothing of the token takes effect anywhere, the
// old leader included, before and after the heal.
func TestNothingOfARevokedTokenStartsOnALeaderThatWasCutOff(t *testing.T) {
	c, mem := startOn(t, 3)
	c.Register("demo", "v1.0.0")
	c.Enable("demo", "demo", "v1.0.0")
	_, child := c.newToken(t, "cut")
	leader := c.index(c.leaderName())
	other := (leader + 1) % 3
	stop := c.pester(t.Context(), child)
	c.Eventually(20*time.Second, "a write by the token", func() error {
		if len(c.keysAt(t, leader)) == 0 {
			return fmt.Errorf("nothing is stored")
		}
		return nil
	})
	mem.Isolate(c.Node(leader).Name())
	asked := time.Now()
	var answered time.Time
	c.Eventually(60*time.Second, "a revocation without the old leader", func() error {
		status, answer := c.as(t.Context(), c.Token, other, http.MethodPut, "auth/token/revoke", fmt.Sprintf(`{"token":%q}`, child))
		if answered = time.Now(); status != http.StatusNoContent {
			return fmt.Errorf("%d %s", status, answer)
		}
		return nil
	})
	t.Logf("the revocation was answered %v after the leader was cut off", answered.Sub(asked))
	if status, answer := c.as(t.Context(), child, leader, http.MethodGet, "demo/info", ""); status < 400 {
		t.Errorf("the old leader still serves: %d %s", status, answer)
	}
	time.Sleep(300 * time.Millisecond) // tries on the old leader while it is alone
	mem.HealAll()
	c.Serving()
	c.Eventually(30*time.Second, "the old leader knows", func() error {
		if status, answer := c.as(t.Context(), child, leader, http.MethodGet, "demo/info", ""); status != http.StatusForbidden {
			return fmt.Errorf("%d %s", status, answer)
		}
		return nil
	})
	time.Sleep(200 * time.Millisecond)
	c.judgeRevocation(t, stop(), asked, answered)
}
