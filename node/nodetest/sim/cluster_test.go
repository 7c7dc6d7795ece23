package sim

import (
	"log/slog"
	"os"
	"testing"
	"testing/synctest"
	"time"
)

func TestWholeNodesRunInVirtualTime(t *testing.T) {
	dir := t.TempDir()
	var h slog.Handler = slog.DiscardHandler
	if os.Getenv("SIM_LOG") != "" {
		h = slog.NewTextHandler(os.Stderr, nil)
	}
	synctest.Test(t, func(t *testing.T) {
		c, err := newCluster(t, Options{Seed: 1, Nodes: 5, Log: h}, dir)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.start(); err != nil {
			t.Fatal(err)
		}
		from := time.Now()
		if err := c.settled(time.Minute); err != nil {
			t.Error(err)
		}
		t.Logf("settled after %v", time.Since(from))
		time.Sleep(10 * time.Minute)
		c.stop()
		time.Sleep(2 * time.Minute)
	})
}
