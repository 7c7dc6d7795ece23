package httpd

import (
	"net"
	"net/http"
	"strings"

	"rollcall/node/fault"
)

// maxInFlight is how many requests a node answers at a time, streams included: far above what its cores can do, and below what its
// memory can hold.
const maxInFlight = 1024

var errBusy = fault.Text(fault.Exhausted, "this node answers %d requests already: ask again in a moment", maxInFlight)

// enter counts a request in, unless there are too many. Whoever entered leaves.
func (s *Server) enter() bool {
	if s.now.Add(1) > maxInFlight {
		s.now.Add(-1)
		return false
	}
	return true
}

// fromHere refuses what a browser sends on behalf of another site. Clients that are no browsers send none of the headers that
// tell; what a page of another origin may send without asking (a form, a plain POST) is told by them, and so is a page that had
// its own name point to this address (DNS rebinding), where this node knows by which names it is called.
func (s *Server) fromHere(r *http.Request) error {
	if err := s.origins.Check(r); err != nil {
		return fault.Text(fault.Denied, "a request from another origin is not answered")
	}
	if len(s.Names) == 0 || r.Header.Get("Sec-Fetch-Site") == "" && r.Header.Get("Origin") == "" {
		return nil
	}
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.ToLower(strings.Trim(host, "[]"))
	if net.ParseIP(host) != nil {
		return nil
	}
	for _, name := range s.Names {
		if host == strings.ToLower(name) {
			return nil
		}
	}
	return fault.Text(fault.Denied, "this node is not called %.64q: a browser that thinks so was led here (http.advertise says its name)", host)
}
