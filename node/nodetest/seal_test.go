package nodetest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"rollcall/node"
	"rollcall/node/seal"
	commandv1 "rollcall/proto/command/v1"
)

// canaries are secrets by the way that they went into the cluster.
type canaries struct {
	text map[string]string
	// hidden are those that are hashed or sealed before they reach the log, whoever reads the disk.
	hidden []string
}

func (c *canaries) make(way string) string {
	c.text[way] = "canary" + rand.Text()
	return c.text[way]
}

// raw sends one request as an unmodified client would, and returns the body of the answer.
func (c *Cluster) raw(i int, method, path string, body any, headers ...string) (map[string]any, error) {
	payload, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(c.t.Context(), method, c.Node(i).APIAddress()+"/v1/"+path, bytes.NewReader(payload))
	if err != nil {
		return nil, err
	}
	req.Header.Set("X-Vault-Token", c.Token)
	for h := range slices.Chunk(headers, 2) {
		req.Header.Set(h[0], h[1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode >= 300 {
		return nil, fmt.Errorf("%s %s: %d %s, %w", method, path, resp.StatusCode, raw, err)
	}
	out := map[string]any{}
	if len(raw) > 0 {
		err = json.Unmarshal(raw, &out)
	}
	return out, err
}

func (c *Cluster) must(i int, method, path string, body any, headers ...string) map[string]any {
	c.t.Helper()
	out, err := c.raw(i, method, path, body, headers...)
	if err != nil {
		c.t.Fatal(err)
	}
	return out
}

// fillWithCanaries puts a secret into the cluster in every way that there is.
func (c *Cluster) fillWithCanaries() *canaries {
	c.t.Helper()
	k := &canaries{text: map[string]string{"first token": c.Token}}
	c.Register("demo", "v1.0.0")
	c.must(0, "PUT", "sys/mounts/demo", map[string]any{
		"type": "demo", "description": k.make("mount description"), "options": map[string]string{"secret": k.make("mount option")},
	})
	c.Serving()
	c.must(0, "PUT", "sys/plugins/catalog/secret/unused", map[string]any{
		"sha256": c.Sum, "command": PluginCommand, "args": []string{pluginArg, k.make("catalog argument")}, "env": []string{"TOKEN=" + k.make("catalog env")},
	})
	c.must(0, "PUT", "demo/data/small", map[string]any{"value": k.make("storage value")})
	c.must(0, "PUT", "demo/data/large", map[string]any{"value": strings.Repeat("x", 70_001) + k.make("large storage value") + strings.Repeat("y", 70_001)})
	c.must(0, "PUT", "demo/data/"+k.make("storage key"), map[string]any{"value": "x"})
	c.must(0, "PUT", "demo/data/deleted", map[string]any{"value": k.make("deleted value")})
	c.must(0, "DELETE", "demo/data/deleted", nil)
	c.must(0, "PUT", "sys/policies/acl/p", map[string]any{"policy": `path "` + k.make("policy text") + `" { capabilities = ["read"] }`})
	token := c.must(0, "PUT", "auth/token/create", map[string]any{
		"policies": []string{"p"}, "meta": map[string]string{"m": k.make("token meta")}, "display_name": k.make("token display name"),
	})
	auth, _ := token["auth"].(map[string]any)
	k.text["token"], _ = auth["client_token"].(string)
	wrapped := c.must(0, "PUT", "sys/wrapping/wrap", map[string]any{"secret": k.make("wrapped data")}, "X-Vault-Wrap-TTL", "1h")
	info, _ := wrapped["wrap_info"].(map[string]any)
	k.text["wrapping token"], _ = info["token"].(string)
	c.must(0, "PUT", "sys/namespaces/ns", map[string]any{"custom_metadata": map[string]string{"m": k.make("namespace metadata")}})
	var mount string
	for _, m := range c.Node(0).State().View().Mounts() {
		mount = m.GetUuid()
	}
	c.propose(&commandv1.Command{Body: &commandv1.Command_PutLease{PutLease: &commandv1.PutLease{Lease: &commandv1.Lease{
		Id: "demo/creds/1", MountUuid: mount, Path: "creds/1", Secret: []byte(k.make("lease secret")), Data: []byte(k.make("lease data")),
		TtlNs: uint64(time.Hour), Renewable: true,
	}}}})
	k.hidden = []string{"first token", "token", "wrapping token", "wrapped data"}
	for way, text := range k.text {
		if len(text) < 20 {
			c.t.Fatalf("canary %s is %q", way, text)
		}
	}
	return k
}

func (c *Cluster) propose(cmd *commandv1.Command) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), 20*time.Second)
	defer cancel()
	if _, err := c.Node(0).Replica().Propose(ctx, cmd); err != nil {
		c.t.Fatal(err)
	}
}

// forms are a text as it may stand somewhere: itself, in hexadecimal, and in base64 at each of the three places in a
// group that it may begin at.
func forms(text string) [][]byte {
	out := [][]byte{[]byte(text), []byte(hex.EncodeToString([]byte(text))), []byte(strings.ToUpper(hex.EncodeToString([]byte(text))))}
	for shift := range 3 {
		padded := append(make([]byte, shift), text...)
		from, to := (shift*8+5)/6, len(padded)*8/6 // what depends on the neighbours is left out
		for _, enc := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
			out = append(out, []byte(enc.EncodeToString(padded)[from:to]))
		}
	}
	return out
}

// places are everything that a cluster has written, by name.
func (c *Cluster) places(saved []byte) map[string][]byte {
	c.t.Helper()
	out := map[string][]byte{"the saved snapshot": saved}
	c.log.mu.Lock()
	out["the log"] = slices.Clone(c.log.buf)
	c.log.mu.Unlock()
	zip, err := gzip.NewReader(bytes.NewReader(saved))
	if err != nil {
		c.t.Fatal(err)
	}
	for files := tar.NewReader(zip); ; {
		h, err := files.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			out["the saved snapshot's "+h.Name], err = io.ReadAll(files)
		}
		if err != nil {
			c.t.Fatal(err)
		}
	}
	err = filepath.WalkDir(c.dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() && path == c.Plugins || !e.Type().IsRegular() || strings.HasPrefix(path, c.Plugins) || strings.Contains(path, "/plugins/") {
			return err // plugin binaries
		}
		if out[path], err = os.ReadFile(path); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
	if err != nil {
		c.t.Fatal(err)
	}
	return out
}

// search tells for each canary where it stands.
func (c *canaries) search(places map[string][]byte) map[string][]string {
	found := map[string][]string{}
	for way, text := range c.text {
		for _, form := range forms(text) {
			for place, raw := range places {
				if bytes.Contains(raw, form) && !slices.Contains(found[way], place) {
					found[way] = append(found[way], place)
				}
			}
		}
	}
	return found
}

func (c *Cluster) save(i int) []byte {
	c.t.Helper()
	var out bytes.Buffer
	if _, err := c.Client(i).SnapshotSave(c.t.Context(), &out); err != nil {
		c.t.Fatal(err)
	}
	return out.Bytes()
}

// snapshots waits until every node has a snapshot of its own that is newer than the index.
func (c *Cluster) snapshots(index uint64) {
	c.t.Helper()
	for i, n := range c.Nodes() {
		c.Eventually(30*time.Second, "a snapshot on node "+n.Name(), func() error {
			metas, err := filepath.Glob(filepath.Join(c.dir, n.Name(), "snapshots", "*[0-9]", "meta.json"))
			if err != nil {
				return err
			}
			for _, m := range metas {
				var meta struct{ Index uint64 }
				if raw, err := os.ReadFile(m); err == nil && json.Unmarshal(raw, &meta) == nil && meta.Index > index {
					return nil
				}
			}
			_, err = c.raw(i, "PUT", "demo/data/tick", map[string]any{"value": "entries make snapshots"})
			return errors.Join(errors.New("none yet"), err)
		})
	}
}

func smallSnapshots(cfg *node.Config, opt *node.Options) {
	cfg.Raft.SnapshotThreshold, cfg.Raft.TrailingLogs, opt.SnapshotInterval = 16, 16, 100*time.Millisecond
}

func TestNoSecretStandsReadableInDataDirectoriesSnapshotsOrLogs(t *testing.T) {
	keys := t.TempDir()
	file := filepath.Join(keys, "seal.key")
	if err := os.WriteFile(file, []byte(seal.NewKeyText()), 0o600); err != nil {
		t.Fatal(err)
	}
	cat, err := exec.LookPath("cat")
	if err != nil {
		t.Fatal(err)
	}
	c := Start(t, 3, func(i int, cfg *node.Config, opt *node.Options) {
		smallSnapshots(cfg, opt)
		if cfg.Seal.KeyFile = file; i == 2 { // one of them asks a command
			cfg.Seal = node.SealConfig{Command: []string{cat, file}}
		}
	})
	k := c.fillWithCanaries()
	for i, want := range []string{"file", "file", "command"} {
		if st, err := c.Client(i).SealStatus(t.Context()); err != nil || st.Type != want || st.Sealed || !st.Initialized {
			t.Errorf("seal-status of node %d: %+v, %v", i, st, err)
		}
	}

	// Rotations under writes: all of them are acknowledged, and are there afterwards.
	var writers sync.WaitGroup
	written := make([]int, 3)
	stop := make(chan struct{})
	for w := range written {
		writers.Go(func() {
			for ; ; written[w]++ {
				select {
				case <-stop:
					return
				case <-time.After(10 * time.Millisecond):
				}
				if _, err := c.raw(w, "PUT", fmt.Sprintf("demo/data/w%d-%d", w, written[w]), map[string]any{"value": k.text["storage value"]}); err != nil {
					t.Errorf("write %d of writer %d: %v", written[w], w, err)
					return
				}
			}
		})
	}
	for term := uint64(2); term <= 4; term++ {
		if err := c.Client(int(term) % 3).RotateKeys(t.Context()); err != nil {
			t.Fatal(err)
		}
		for i := range 3 {
			c.Eventually(20*time.Second, "the new data key", func() error {
				st, err := c.Client(i).KeyStatus(t.Context())
				if err == nil && (st.Term != term || st.NodeTerm != term) {
					err = fmt.Errorf("%+v", st)
				}
				return err
			})
		}
	}
	close(stop)
	writers.Wait()
	c.snapshots(c.Node(0).State().Index())
	saved := c.save(1)

	readable := func(when string) {
		t.Helper()
		for w, n := range written {
			for i := range n {
				env, err := c.Client((w+1)%3).Read(t.Context(), fmt.Sprintf("demo/data/w%d-%d", w, i), nil)
				if err != nil || !strings.Contains(string(env.Data), k.text["storage value"]) {
					t.Fatalf("%s: write %d of writer %d: %v", when, i, w, err)
				}
			}
		}
	}
	readable("after the rotations")
	for i := range 3 { // a restart of each, then of all at once
		if err := errors.Join(c.StopNode(t.Context(), i), c.StartNode(t.Context(), i)); err != nil {
			t.Fatal(err)
		}
		c.Serving()
	}
	if err := c.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	for way, places := range k.search(c.places(saved)) {
		t.Errorf("the secret in %s is readable in %v", way, places)
	}
	for i := range 3 {
		if err := c.StartNode(t.Context(), i); err != nil {
			t.Fatal(err)
		}
	}
	c.Serving()
	readable("after a restart")

	// The saved snapshot comes back, with its key.
	c.must(0, "PUT", "demo/data/small", map[string]any{"value": "later"})
	if err := c.Client(0).SnapshotRestore(t.Context(), bytes.NewReader(saved)); err != nil {
		t.Fatal(err)
	}
	c.Eventually(30*time.Second, "the restored value", func() error {
		env, err := c.Client(2).Read(t.Context(), "demo/data/small", nil)
		if err == nil && !strings.Contains(string(env.Data), k.text["storage value"]) {
			err = fmt.Errorf("%s", env.Data)
		}
		return err
	})
}

// The same search on a cluster without a seal finds what there is to find: it is no search that finds nothing anyhow.
// And a sealed snapshot is of no use there.
func TestTheSearchForSecretsFindsThemWhereNothingIsSealed(t *testing.T) {
	c := Start(t, 1, func(_ int, cfg *node.Config, opt *node.Options) { smallSnapshots(cfg, opt) })
	k := c.fillWithCanaries()
	c.snapshots(0)
	found := k.search(c.places(c.save(0)))
	for way := range k.text {
		hidden, places := slices.Contains(k.hidden, way), found[way]
		if hidden && len(places) > 0 {
			t.Errorf("the secret in %s is in %v, and should be nowhere", way, places)
		}
		if !hidden && len(places) == 0 {
			t.Errorf("the secret in %s was not found", way)
		}
	}
	if got := len(k.text) - len(k.hidden); got < 12 {
		t.Errorf("only %d secrets", got)
	}
	if st, err := c.Client(0).SealStatus(t.Context()); err != nil || st.Type != "none" {
		t.Errorf("%+v, %v", st, err)
	}
	if err := c.Client(0).RotateKeys(t.Context()); err == nil || !strings.Contains(err.Error(), "seals nothing") {
		t.Errorf("rotate: %v", err)
	}
	sealed := Start(t, 1, func(_ int, _ *node.Config, opt *node.Options) { opt.SealKeys = &seal.Keys{Current: seal.Ephemeral()} })
	err := c.Client(0).SnapshotRestore(t.Context(), bytes.NewReader(sealed.save(0)))
	if err == nil || !strings.Contains(err.Error(), "no seal block") {
		t.Errorf("a sealed snapshot: %v", err)
	}
}
