//go:build failpoints

package nodetest

import "rollcall/node/failpoint"

// What one node of a cluster on one machine cannot really be: without the bytes where others have them, and of another
// architecture. Its failpoints make it so.
func init() {
	badKinds = append(badKinds,
		badness{
			name: "missing on one, and no peer gives it", prepare: (*badCluster).missingOnOne, words: "no peer gave it",
			arm: at(failpoint.ContentFetch, "the peer's disk is gone"),
		},
		badness{
			name: "wrong sha256 on one, and no peer gives the right one", prepare: (*badCluster).replaced, words: "registered is",
			arm: at(failpoint.ContentFetch, "the peer's disk is gone"),
		},
		badness{name: "cannot be executed on one", arm: at(failpoint.ProcessExec, "exec format error"), words: "exec format error"},
		badness{name: "dies after its handshake on one", arm: at(failpoint.ProcessHandshake, "connection reset"), words: "connection reset"},
		badness{name: "fails in its trial on one", arm: at(failpoint.ReloadTrial, "no room to try it"), words: "no room to try it"},
	)
}

func at(site failpoint.Site, text string) func(b *badCluster, bad int) func() {
	return func(b *badCluster, bad int) func() {
		return failpoint.Arm(failpoint.Rule{Site: site, Node: b.Node(bad).Name(), Do: failpoint.Error(text)})
	}
}

// missingOnOne: the bad node alone has no such file.
func (b *badCluster) missingOnOne(bad int) (string, string) {
	raw := append(append([]byte(nil), b.self...), "scarce"...)
	for i := range b.nodes {
		if i != bad {
			b.put(i, "scarce", raw)
		}
	}
	return "scarce", sumOf(raw)
}
