//go:build e2e

package e2e

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"rollcall/node/api"
)

// TestWhatAStoppedLeaderFindsInItsSocketsAfterARevocationIsNotDone: the leader's process is stopped, requests of a token arrive in its sockets'
// buffers, the token is revoked through the others, and the process goes on. It then reads requests that were sent while the token was
// good, and does none of them: its lease is over by its own clock, and its state is older than the others'.
func TestWhatAStoppedLeaderFindsInItsSocketsAfterARevocationIsNotDone(t *testing.T) {
	c := newCluster(t, options{})
	c.mountDemo()
	c.serving()
	leader := c.leader()
	status, answer := c.request(leader, http.MethodPost, "auth/token/create", `{"policies":["root"],"ttl":"1h"}`)
	_, rest, _ := strings.Cut(answer, `"client_token":"`)
	token, _, _ := strings.Cut(rest, `"`)
	if status != http.StatusOK || token == "" {
		t.Fatalf("token: %d %s", status, answer)
	}
	send := func(conn net.Conn, key string) {
		body := `{"value":"x"}`
		_, err := fmt.Fprintf(conn, "PUT /v1/demo/data/%s HTTP/1.1\r\nHost: %s\r\n%s: %s\r\nContent-Length: %d\r\n\r\n%s",
			key, leader.http, api.HeaderToken, token, len(body), body)
		if err != nil {
			t.Fatal(err)
		}
	}
	var conns []net.Conn
	for i := range 8 {
		conn, err := net.Dial("tcp", leader.http)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		conns = append(conns, conn)
		if i == 0 { // the token is good
			send(conn, "before")
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			_ = resp.Body.Close()
			if resp.StatusCode != http.StatusNoContent {
				t.Fatalf("before: %d", resp.StatusCode)
			}
		}
	}
	leader.signal(syscall.SIGSTOP)
	defer leader.signal(syscall.SIGCONT)
	for i, conn := range conns {
		send(conn, fmt.Sprintf("stopped-%d", i))
	}
	others := c.others(leader)
	until(t, long, "a revocation without the old leader", func() error {
		status, answer, err := c.send(timeout(t, short), others[0], http.MethodPut, "auth/token/revoke", fmt.Sprintf(`{"token":%q}`, token))
		if err == nil && status != http.StatusNoContent {
			err = fmt.Errorf("%d %s", status, answer)
		}
		return err
	})
	leader.signal(syscall.SIGCONT)
	for i, conn := range conns {
		_ = conn.SetReadDeadline(time.Now().Add(long))
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			continue // it was cut off: nobody was told that anything was done
		}
		_ = resp.Body.Close()
		if resp.StatusCode < 400 {
			t.Errorf("request %d was answered %d", i, resp.StatusCode)
		}
	}
	c.serving()
	for _, s := range c.nodes {
		until(t, long, "what is stored, on "+s.name, func() error {
			status, answer, err := c.send(timeout(t, short), s, "LIST", "demo/data", "")
			if err != nil || status != http.StatusOK || !strings.Contains(answer, `"before"`) {
				return fmt.Errorf("%w, %d %s", err, status, answer)
			}
			if strings.Contains(answer, "stopped-") {
				t.Errorf("%s has what the revoked token wrote: %s", s.name, answer)
			}
			return nil
		})
	}
}
