package api

import (
	"crypto/tls"
	"crypto/x509"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"rollcall/node/fault"
)

// DefaultAddress is where a client looks when it was told nothing.
const DefaultAddress = "http://127.0.0.1:8200"

// DefaultTimeout of one call, the same as the Vault and OpenBao clients' own.
const DefaultTimeout = 60 * time.Second

// Config is what a Client needs. The zero value talks to DefaultAddress without a token.
type Config struct {
	// Addresses of nodes, as URLs; any one answers for all. The first that answers is kept until it fails. Empty means
	// DefaultAddress.
	Addresses []string
	// Token is sent with every call; without one, only health, seal-status and leader are answered.
	Token string
	// Namespace is sent with every call; "" and "root" are the root namespace.
	Namespace string
	// CACert is a file of PEM certificates that sign the nodes' certificates; empty means the system's.
	CACert string
	// ClientCert and ClientKey are files for nodes that want to know their clients; both or none.
	ClientCert, ClientKey string
	// ServerName is the name to expect in the certificate, where it is not the address's.
	ServerName string
	// SkipVerify accepts any certificate. Whoever sits in between reads the token.
	SkipVerify bool
	// Timeout of one call over all addresses; 0 means DefaultTimeout. Waiting for a reload is not under it.
	Timeout time.Duration
	// Transport replaces the whole HTTP transport, TLS included: for tests.
	Transport http.RoundTripper
}

// prefixes of the environment's variables, the first that is set wins.
var prefixes = []string{"ROLLCALL_", "BAO_", "VAULT_"}

// Getenv returns the first non-empty of ROLLCALL_name, BAO_name and VAULT_name, and which one it was.
func Getenv(getenv func(string) string, name string) (value, variable string) {
	for _, p := range prefixes {
		if v := getenv(p + name); v != "" {
			return v, p + name
		}
	}
	return "", ""
}

// FromEnv makes a Config of the environment: ADDR (several with commas), TOKEN, NAMESPACE, CACERT, CLIENT_CERT,
// CLIENT_KEY, TLS_SERVER_NAME, SKIP_VERIFY and CLIENT_TIMEOUT with the prefixes ROLLCALL_, BAO_, VAULT_ in that order.
// Without a token there, the file .vault-token in home, where `vault login` and `bao login` leave one, is read.
func FromEnv(getenv func(string) string, home string) (Config, error) {
	get := func(name string) string { v, _ := Getenv(getenv, name); return v }
	c := Config{
		Addresses: SplitAddresses(get("ADDR")), Token: strings.TrimSpace(get("TOKEN")),
		Namespace: get("NAMESPACE"), CACert: get("CACERT"),
		ClientCert: get("CLIENT_CERT"), ClientKey: get("CLIENT_KEY"), ServerName: get("TLS_SERVER_NAME"),
	}
	if v, name := Getenv(getenv, "SKIP_VERIFY"); v != "" {
		b, err := strconv.ParseBool(v)
		if err != nil {
			return c, fault.New(fault.Invalid, "read", name, "%q is not true or false", v)
		}
		c.SkipVerify = b
	}
	if v, name := Getenv(getenv, "CLIENT_TIMEOUT"); v != "" {
		d, err := ParseTimeout(v)
		if err != nil {
			return c, fault.New(fault.Invalid, "read", name, "%q is not a duration such as 30s", v)
		}
		c.Timeout = d
	}
	if c.Token == "" && home != "" {
		if raw, err := os.ReadFile(filepath.Join(home, ".vault-token")); err == nil {
			c.Token = strings.TrimSpace(string(raw))
		}
	}
	return c, nil
}

// ParseTimeout reads "30s" or whole seconds, as the Vault and OpenBao clients do.
func ParseTimeout(v string) (time.Duration, error) {
	if n, err := strconv.ParseInt(v, 10, 32); err == nil && n >= 0 {
		return time.Duration(n) * time.Second, nil
	}
	d, err := time.ParseDuration(v)
	if err == nil && d < 0 {
		err = fault.Text(fault.Invalid, "%q is negative", v)
	}
	return d, err
}

// SplitAddresses reads a comma list of addresses.
func SplitAddresses(list string) []string {
	var out []string
	for a := range strings.SplitSeq(list, ",") {
		if a = strings.TrimSpace(a); a != "" {
			out = append(out, a)
		}
	}
	return out
}

// Validate checks what can be checked without a network.
func (c *Config) Validate() error {
	for _, a := range c.Addresses {
		if _, err := parseAddress(a); err != nil {
			return err
		}
	}
	if (c.ClientCert == "") != (c.ClientKey == "") {
		return fault.New(fault.Invalid, "configure", "client", "client certificate and key go together: set both or none")
	}
	if strings.ContainsAny(c.Token, " \t\r\n") {
		return fault.New(fault.Invalid, "configure", "client", "the token holds white space: it was not copied whole")
	}
	if c.Timeout < 0 {
		return fault.New(fault.Invalid, "configure", "client", "the timeout is negative")
	}
	return nil
}

func parseAddress(a string) (*url.URL, error) {
	u, err := url.Parse(a)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, fault.New(fault.Invalid, "read address", a, "expected a URL such as https://node1:8200")
	}
	u.Path = strings.TrimSuffix(strings.TrimSuffix(u.Path, "/"), "/v1")
	u.RawQuery, u.Fragment, u.User = "", "", nil
	return u, nil
}

func (c *Config) tls() (*tls.Config, error) {
	t := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: c.ServerName, InsecureSkipVerify: c.SkipVerify}
	if c.CACert != "" {
		pem, err := os.ReadFile(c.CACert)
		if err != nil {
			return nil, fault.As(fault.Invalid, err, "read CA certificates", "")
		}
		t.RootCAs = x509.NewCertPool()
		if !t.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fault.New(fault.Invalid, "read CA certificates", c.CACert, "no PEM certificate in it")
		}
	}
	if c.ClientCert != "" {
		pair, err := tls.LoadX509KeyPair(c.ClientCert, c.ClientKey)
		if err != nil {
			return nil, fault.As(fault.Invalid, err, "read client certificate", c.ClientCert)
		}
		t.Certificates = []tls.Certificate{pair}
	}
	return t, nil
}
