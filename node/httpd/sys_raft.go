package httpd

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"

	"rollcall/node/fault"
)

func (s *Server) raftRoutes() []*route {
	read := func(h handler) map[operation]handler { return map[operation]handler{opRead: h} }
	return []*route{
		{pattern: "sys/storage/raft/configuration", anyNode: true, rootOnly: true, ops: read(s.raftConfiguration), summary: "The Raft configuration."},
		{
			pattern: "sys/storage/raft/remove-peer", access: withSudo, rootOnly: true, ops: map[operation]handler{opUpdate: s.removePeer},
			summary: "Take a node out of the cluster for good.",
		},
		{
			pattern: "sys/storage/raft/join", access: open, anyNode: true, ops: map[operation]handler{opUpdate: s.join},
			refused: "400: nodes join by themselves, from retry_join of their configuration",
			summary: "Joining a cluster: says how it is done here.",
		},
		{
			pattern: "sys/storage/raft/bootstrap", anyNode: true, rootOnly: true, ops: map[operation]handler{opUpdate: s.join},
			refused: "400: nodes join by themselves, from retry_join of their configuration", summary: "As join.",
		},
		{pattern: "sys/storage/raft/autopilot/state", anyNode: true, rootOnly: true, ops: read(s.autopilotState), summary: "How the servers are."},
		{
			pattern: "sys/storage/raft/autopilot/configuration", anyNode: true, rootOnly: true,
			ops:     map[operation]handler{opRead: s.autopilotConfig, opUpdate: s.setAutopilot},
			summary: "What the leader does about servers; set in the nodes' configuration files.",
		},
		{
			pattern: "sys/storage/raft/snapshot", access: withSudo, rootOnly: true, rawBody: maxBackup,
			ops:     map[operation]handler{opRead: s.saveSnapshot, opUpdate: s.restoreSnapshot},
			summary: "Save the state of the cluster, or replace it by a saved one.",
		},
		{
			pattern: "sys/storage/raft/snapshot-force", access: withSudo, rootOnly: true, rawBody: maxBackup,
			ops: map[operation]handler{opUpdate: s.restoreSnapshot}, summary: "As snapshot: the backup of another cluster is refused all the same.",
		},
	}
}

func (s *Server) autopilotState(q *request) (*reply, error) {
	st, err := s.Cluster.Autopilot(q.ctx)
	if err != nil {
		return nil, err
	}
	return &reply{data: st}, nil
}

func (s *Server) autopilotConfig(*request) (*reply, error) {
	return &reply{data: s.Cluster.AutopilotConfig()}, nil
}

// setAutopilot takes what is there already, so that a tool which writes what it has read does not fail.
func (s *Server) setAutopilot(q *request) (*reply, error) {
	raw, err := json.Marshal(s.Cluster.AutopilotConfig())
	if err != nil {
		return nil, fault.As(fault.Internal, err, "encode", "autopilot configuration")
	}
	have, err := newFields(raw)
	if err != nil {
		return nil, err
	}
	for k, v := range q.body.raw {
		q.body.has(k)
		if old, ok := have.raw[k]; !ok || !bytes.Equal(bytes.TrimSpace(v), old) {
			return nil, fault.Text(fault.Invalid, "%s is set in each node's configuration file (block autopilot) and read at its start, not here", k)
		}
	}
	return nil, nil
}

// join says how joining works: a node is told whom to look for when it is configured, and proves who it is by its
// certificate. Nothing in this call could stand for that.
func (s *Server) join(q *request) (*reply, error) {
	for k := range q.body.raw {
		q.body.has(k)
	}
	st := s.Cluster.Status()
	how := "nodes join by themselves: start a node with retry_join naming any member and a certificate of the cluster's CA"
	if st.Initialized {
		return nil, fault.Text(fault.Invalid, "node %s is a member of cluster %s already; %s", s.NodeName, st.ClusterName, how)
	}
	return nil, fault.Text(fault.Invalid, "node %s is looking for its cluster already; %s", s.NodeName, how)
}

// maxBackup bounds a backup that is sent to be restored.
const maxBackup = 4 << 30

// A backup is a gzip'd tar of these files, which is what the stock command line expects. "sealed" is the checksum file
// again: the clients take an archive without it for incomplete.
const (
	backupMeta   = "meta.json"
	backupState  = "state.bin"
	backupSums   = "SHA256SUMS"
	backupSealed = "SHA256SUMS.sealed"
)

// saveSnapshot streams the archive. The state is written to a file first: a tar tells sizes before contents.
func (s *Server) saveSnapshot(q *request) (*reply, error) {
	file, err := os.CreateTemp("", "rollcall-backup-*")
	if err != nil {
		return nil, fault.As(fault.Internal, err, "write", "backup")
	}
	// It has no name from here on: what a crash leaves of it, nobody finds.
	if err := os.Remove(file.Name()); err != nil {
		_ = file.Close()
		return nil, fault.As(fault.Internal, err, "write", "backup")
	}
	remove := func() { _ = file.Close() }
	sum := sha256.New()
	if err := s.Cluster.Backup(q.ctx, io.MultiWriter(file, sum)); err != nil {
		remove()
		return nil, err
	}
	size, err := file.Seek(0, io.SeekCurrent)
	if err == nil {
		_, err = file.Seek(0, io.SeekStart)
	}
	if err != nil {
		remove()
		return nil, fault.As(fault.Internal, err, "write", "backup")
	}
	st := s.Cluster.Status()
	sealedWith := "" // nothing
	if sealed := s.Cluster.Seal(); sealed != nil {
		sealedWith = sealed.SealKey
	}
	meta, err := json.Marshal(map[string]any{
		"seal_key": sealedWith, "cluster_id": st.ClusterID, "cluster_name": st.ClusterName, "index": st.AppliedIndex,
		"term": st.Term, "size": size, "format": "rollcall", "saved": time.Now().UTC().Format(time.RFC3339), "node": s.NodeName,
	})
	if err != nil {
		remove()
		return nil, fault.As(fault.Internal, err, "write", "backup")
	}
	return &reply{headers: map[string]string{
		"Content-Type":        "application/gzip",
		"Content-Disposition": `attachment; filename="rollcall.snap"`,
	}, stream: func(w http.ResponseWriter, _ *http.Request) error {
		defer remove()
		return writeArchive(w, file, size, meta, hex.EncodeToString(sum.Sum(nil)))
	}}, nil
}

func writeArchive(w io.Writer, state io.Reader, size int64, meta []byte, stateSum string) error {
	metaSum := sha256.Sum256(meta)
	sums := fmt.Appendf(nil, "%x  %s\n%s  %s\n", metaSum, backupMeta, stateSum, backupState)
	zip := gzip.NewWriter(w)
	out := tar.NewWriter(zip)
	for _, f := range []struct {
		name string
		size int64
		body io.Reader
	}{
		{backupMeta, int64(len(meta)), bytes.NewReader(meta)},
		{backupState, size, state},
		{backupSums, int64(len(sums)), bytes.NewReader(sums)},
		{backupSealed, int64(len(sums)), bytes.NewReader(sums)},
	} {
		if err := out.WriteHeader(&tar.Header{Name: f.name, Size: f.size, Mode: 0o600, ModTime: time.Now()}); err != nil {
			return err
		}
		if _, err := io.Copy(out, f.body); err != nil {
			return err
		}
	}
	return errors.Join(out.Close(), zip.Close())
}

// restoreSnapshot takes an archive, holds it against its checksums, and replaces the cluster's state by it.
func (s *Server) restoreSnapshot(q *request) (*reply, error) {
	file, err := os.CreateTemp("", "rollcall-restore-*")
	if err != nil {
		return nil, fault.As(fault.Internal, err, "read", "backup")
	}
	defer func() { _ = file.Close() }()
	if err := os.Remove(file.Name()); err != nil {
		return nil, fault.As(fault.Internal, err, "read", "backup")
	}
	if err := readArchive(io.LimitReader(q.http.Body, maxBackup), file); err != nil {
		return nil, err
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return nil, fault.As(fault.Internal, err, "read", "backup")
	}
	// It is not given up with the client: half a restore is the one thing that nobody wants.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(q.ctx), 5*time.Minute)
	defer cancel()
	index, err := s.Cluster.Restore(ctx, bufio.NewReader(file), "by "+q.who.Token.GetDisplayName())
	if err != nil {
		return nil, err
	}
	s.log.Warn("the cluster's state was restored from a backup", "index", index, "by", q.who.Token.GetDisplayName())
	return nil, nil
}

// readArchive copies the state out of an archive, and refuses one that is not whole.
func readArchive(in io.Reader, state io.Writer) error {
	broken := func(err error) error { return fault.As(fault.Invalid, err, "read backup", "") }
	zip, err := gzip.NewReader(in)
	if err != nil {
		return fault.Text(fault.Invalid, "the body is not a backup: it does not begin as a gzip file does")
	}
	archive := tar.NewReader(zip)
	got, sums := map[string]string{}, ""
	for {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return broken(err)
		}
		sum := sha256.New()
		switch h.Name {
		case backupState:
			if h.Size > maxBackup {
				return fault.Text(fault.TooLarge, "the backup is larger than %d bytes", int64(maxBackup))
			}
			if _, err := io.Copy(io.MultiWriter(state, sum), archive); err != nil {
				return broken(err)
			}
		case backupMeta, backupSums:
			raw, err := io.ReadAll(io.LimitReader(archive, 1<<20))
			if err != nil {
				return broken(err)
			}
			_, _ = sum.Write(raw)
			if h.Name == backupSums {
				sums = string(raw)
			}
		default:
			continue
		}
		got[h.Name] = hex.EncodeToString(sum.Sum(nil))
	}
	if _, err := io.Copy(io.Discard, io.LimitReader(zip, 1<<20)); err != nil { // gzip's own checksum is behind everything
		return broken(err)
	}
	if want := fmt.Sprintf("%s  %s\n%s  %s\n", got[backupMeta], backupMeta, got[backupState], backupState); got[backupState] == "" || sums != want {
		return fault.Text(fault.Invalid, "the backup is incomplete or damaged: its checksums do not hold; nothing was changed")
	}
	return nil
}
