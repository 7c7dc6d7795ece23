package httpd

import "slices"

// table is every system route, in the groups of the files that serve them.
func (s *Server) table() []*route {
	return slices.Concat(s.catalogRoutes(), s.mountRoutes(), s.reloadRoutes(), s.clusterRoutes(), s.raftRoutes(),
		s.tokenRoutes(), s.policyRoutes(), s.leaseRoutes(), s.namespaceRoutes(), s.wrappingRoutes(), s.miscRoutes(), s.eventRoutes())
}
