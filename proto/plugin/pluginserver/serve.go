package pluginserver

import (
	"cmp"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	goplugin "github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"
)

// serve speaks go-plugin's protocol on this process's stdout and on a unix socket until the host asks it to end.
//
// go-plugin has a function for this, which also knows the protocol's predecessor on net/rpc. That one finds its methods by
// reflection, so the linker must keep every exported method of the whole program: 3.7 MB of a binary of 25 MB.
// GRPCServer, which serves the broker, the health and the shutdown, is go-plugin's own here too.
func serve(h goplugin.HandshakeConfig, sets map[int]goplugin.PluginSet) {
	if err := serveUntilAsked(h, sets); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func serveUntilAsked(h goplugin.HandshakeConfig, sets map[int]goplugin.PluginSet) error {
	if os.Getenv(h.MagicCookieKey) != h.MagicCookieValue {
		// The words by which every go-plugin host knows that it took one kind of plugin for another.
		return errors.New("This binary is a plugin. These are not meant to be executed directly.") //nolint:staticcheck // see above
	}
	version, err := agreed(os.Getenv("PLUGIN_PROTOCOL_VERSIONS"), sets)
	if err != nil {
		return err
	}
	conf, cert, err := mutualTLS(os.Getenv("PLUGIN_CLIENT_CERT"))
	if err != nil {
		return fmt.Errorf("make the certificate for the host: %w", err)
	}
	listener, err := listen(os.Getenv(goplugin.EnvUnixSocketDir), os.Getenv(goplugin.EnvUnixSocketGroup))
	if err != nil {
		return fmt.Errorf("listen for the host: %w", err)
	}
	defer func() { _ = listener.Close() }() // which removes the socket
	// What is printed from here on goes to the host through the connection. Nothing may end these streams: the server would
	// want to log that, and its logger is not ours to set.
	stdout, toStdout, err := os.Pipe()
	if err != nil {
		return err
	}
	stderr, toStderr, err := os.Pipe()
	if err != nil {
		return err
	}
	server := &goplugin.GRPCServer{
		Plugins: sets[version], TLS: conf, Stdout: stdout, Stderr: stderr, DoneCh: make(chan struct{}),
		Server: func(opts []grpc.ServerOption) *grpc.Server {
			return grpc.NewServer(append(opts, grpc.MaxRecvMsgSize(64<<20))...) // a body of 32 MiB, escaped
		},
	}
	if err := server.Init(); err != nil {
		return fmt.Errorf("set the server up: %w", err)
	}
	signal.Ignore(os.Interrupt) // meant for the host, which ends its plugins itself
	fmt.Printf("%d|%d|unix|%s|grpc|%s\n", goplugin.CoreProtocolVersion, version, listener.Addr(), cert)
	os.Stdout, os.Stderr = toStdout, toStderr
	server.Serve(listener)
	return nil
}

// agreed is the highest version that both sides know. The host's list is separated by commas; a host that names none
// speaks whatever it is told.
func agreed(offered string, sets map[int]goplugin.PluginSet) (int, error) {
	best := 0
	for version := range sets {
		if offered == "" || slices.Contains(strings.Split(offered, ","), strconv.Itoa(version)) {
			best = max(best, version)
		}
	}
	if best == 0 {
		return 0, fmt.Errorf("the host offers protocol %s, which this plugin does not speak", offered)
	}
	return best, nil
}

// listen opens a unix socket right in dir, which belongs to this start alone; group, a number, may then connect to it too.
func listen(dir, group string) (net.Listener, error) {
	path := filepath.Join(cmp.Or(dir, os.TempDir()), "plugin-"+rand.Text()[:8])
	listener, err := net.Listen("unix", path)
	if err != nil || group == "" {
		return listener, err
	}
	gid, err := strconv.Atoi(group)
	return listener, errors.Join(err, os.Chown(path, -1, gid), os.Chmod(path, 0o660))
}

// mutualTLS takes the certificate that the host will show and makes the one that it will expect, which goes into the
// handshake line. A host without a certificate wants no TLS.
func mutualTLS(clientPEM string) (conf *tls.Config, leaf string, err error) {
	if clientPEM == "" {
		return nil, "", nil
	}
	host := x509.NewCertPool()
	if !host.AppendCertsFromPEM([]byte(clientPEM)) {
		return nil, "", errors.New("the host's certificate cannot be read")
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, "", err
	}
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"}, SerialNumber: big.NewInt(1),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true,
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().AddDate(30, 0, 0),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, "", err
	}
	return &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
		ClientAuth:   tls.RequireAndVerifyClientCert, ClientCAs: host, RootCAs: host, ServerName: "localhost",
		MinVersion: tls.VersionTLS12,
	}, base64.RawStdEncoding.EncodeToString(der), nil
}
