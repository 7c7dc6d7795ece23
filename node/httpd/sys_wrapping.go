package httpd

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"time"

	"rollcall/node/api"
	"rollcall/node/fault"
	"rollcall/node/policy"
	commandv1 "rollcall/proto/command/v1"
)

func (s *Server) wrappingRoutes() []*route {
	update := func(h handler) map[operation]handler { return map[operation]handler{opUpdate: h} }
	return []*route{
		{pattern: "sys/wrapping/wrap", doubled: true, ops: update(s.wrapData), summary: "Wrap the body; X-Vault-Wrap-TTL says for how long."},
		// The wrapping token itself is what authorises the rest: it is in the body, or the caller's own.
		{
			pattern: "sys/wrapping/lookup", access: open, ops: map[operation]handler{opUpdate: s.lookupWrapping, opRead: s.lookupWrapping},
			summary: "When and for which path something was wrapped.",
		},
		{pattern: "sys/wrapping/unwrap", access: open, ops: update(s.unwrap), summary: "What was wrapped, once."},
		{pattern: "sys/wrapping/rewrap", access: open, ops: update(s.rewrap), summary: "The same answer under a new token."},
	}
}

// sealKey makes the key of a wrapped answer from its token: the state holds the token's hash, which does not give it.
func sealKey(token string) (cipher.AEAD, error) {
	key, err := hkdf.Key(sha256.New, []byte(token), nil, "rollcall wrapped answer v1", 32)
	if err != nil {
		return nil, fault.As(fault.Internal, err, "derive", "key of a wrapped answer")
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fault.As(fault.Internal, err, "make", "cipher")
	}
	return cipher.NewGCMWithRandomNonce(block)
}

// maxWrapped bounds an answer that can be wrapped: it travels through the log.
const maxWrapped = 1<<20 - 1024

// wrapped puts a reply into a token of its own when the caller asked for that; else it is the reply.
func (s *Server) wrapped(q *request, rep *reply) (*reply, error) {
	if q.wrapTTL <= 0 || rep.bare != nil || rep.raw != nil || rep.stream != nil || rep.wrap != nil ||
		rep.data == nil && rep.auth == nil && rep.lease == nil {
		return rep, nil
	}
	inside, err := json.Marshal(envelope(q.id, false, rep))
	if err != nil {
		return nil, fault.As(fault.Internal, err, "encode", "a wrapped answer")
	}
	accessor := ""
	if a, ok := rep.auth.(*api.Auth); ok {
		accessor = a.Accessor
	}
	info, err := s.wrap(q, inside, q.ns+q.path, accessor, q.wrapTTL)
	if err != nil {
		return nil, err
	}
	return &reply{status: rep.status, wrap: info, warnings: rep.warnings}, nil
}

// wrap keeps an answer under a new token that lives for ttl and opens nothing else.
func (s *Server) wrap(q *request, inside []byte, path, accessor string, ttl time.Duration) (*api.WrapInfo, error) {
	if len(inside) > maxWrapped {
		return nil, fault.Text(fault.TooLarge, "the answer has %d bytes, and %d can be wrapped", len(inside), maxWrapped)
	}
	token := prefixToken + rand.Text()
	aead, err := sealKey(token)
	if err != nil {
		return nil, err
	}
	row := &commandv1.Token{
		Policies: []string{"response-wrapping"}, DisplayName: "wrapping", Path: path, Namespace: q.ns,
		TtlNs: uint64(ttl), ExplicitMaxTtlNs: uint64(ttl), NumUses: 1, Type: "service", Wrapped: aead.Seal(nil, nil, inside, nil),
	}
	if accessor != "" {
		row.Meta = map[string]string{"wrapped_accessor": accessor}
	}
	if err := s.enterTokenAs(q.ctx, q, token, row); err != nil {
		return nil, err
	}
	return &api.WrapInfo{
		Token: token, Accessor: row.GetAccessor(), TTL: int64(ttl / time.Second),
		CreationTime: time.Now().UTC().Format(time.RFC3339Nano), CreationPath: path, WrappedAccessor: accessor,
	}, nil
}

var errNoWrapping = fault.Text(fault.Invalid, "wrapping token is not valid or does not exist")

// wrapping finds the wrapping token that a call means: in its body, or, when that names none, the caller's. A caller that
// names one in the body must have a token of its own.
func (s *Server) wrapping(q *request) (row *commandv1.Token, token string, err error) {
	view, err := s.Replica.Consistent(q.ctx)
	if err != nil {
		return nil, "", err
	}
	q.view = view
	token = q.body.str("token")
	if q.body.err != nil {
		return nil, "", q.body.err
	}
	if own := tokenOf(q.http); token == "" {
		token = own
	} else if token != own {
		if q.who, err = s.authenticate(view, q.http); err != nil {
			return nil, "", err
		}
		if err := s.Policies.Allow(view, q.who, policy.Query{Namespace: q.ns, Path: q.path, Need: policy.Update}); err != nil {
			return nil, "", err
		}
	}
	if token == "" {
		return nil, "", policy.ErrDenied
	}
	row = view.TokenByHash(view.HashToken(token))
	if row == nil || len(row.GetWrapped()) == 0 || policy.Expired(row, s.clock.now(view)) {
		return nil, "", errNoWrapping
	}
	return row, token, nil
}

func (s *Server) lookupWrapping(q *request) (*reply, error) {
	row, _, err := s.wrapping(q)
	if err != nil {
		return nil, err
	}
	return &reply{data: map[string]any{
		"creation_ttl":  int64(time.Duration(row.GetTtlNs()) / time.Second),
		"creation_time": time.UnixMilli(row.GetCreatedWallMs()).UTC().Format(time.RFC3339Nano), "creation_path": row.GetPath(),
	}}, nil
}

// take ends a wrapping token and returns what was under it. Of several that ask at once, the one whose entry comes first
// has it.
func (s *Server) take(q *request) (*commandv1.Token, []byte, error) {
	row, token, err := s.wrapping(q)
	if err != nil {
		return nil, nil, err
	}
	aead, err := sealKey(token)
	if err != nil {
		return nil, nil, err
	}
	inside, err := aead.Open(nil, nil, row.GetWrapped(), nil)
	if err != nil {
		return nil, nil, fault.As(fault.Corrupt, err, "open", "a wrapped answer")
	}
	res, err := s.propose(q, &commandv1.Command{Body: &commandv1.Command_RevokeToken{
		RevokeToken: &commandv1.RevokeToken{Hash: row.GetHash()},
	}})
	if err != nil {
		return nil, nil, err
	}
	if res.GetRepeated() {
		return nil, nil, errNoWrapping
	}
	return row, inside, nil
}

// unwrap answers with what was wrapped, as it was.
func (s *Server) unwrap(q *request) (*reply, error) {
	_, inside, err := s.take(q)
	if err != nil {
		return nil, err
	}
	return &reply{raw: append(inside, '\n'), contentType: "application/json"}, nil
}

func (s *Server) rewrap(q *request) (*reply, error) {
	row, inside, err := s.take(q)
	if err != nil {
		return nil, err
	}
	info, err := s.wrap(q, inside, row.GetPath(), row.GetMeta()["wrapped_accessor"], time.Duration(row.GetTtlNs()))
	if err != nil {
		return nil, err
	}
	return &reply{wrap: info}, nil
}

// wrapData wraps what the caller sends.
func (s *Server) wrapData(q *request) (*reply, error) {
	if q.wrapTTL <= 0 {
		return nil, fault.Text(fault.Invalid, "endpoint requires response wrapping to be used")
	}
	for k := range q.body.raw {
		q.body.has(k)
	}
	return &reply{data: q.body.raw}, nil
}
