package gossip

import (
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"

	"github.com/google/uuid"
	"github.com/hashicorp/memberlist"

	"rollcall/node/fault"
)

// metaVersion is the first byte of every announcement. A reader takes what it knows and ignores what follows, so a newer
// node may append fields; another first byte is refused.
const metaVersion = 1

// Limits of the texts in an announcement. With them it always fits into memberlist's 512 bytes, beyond which it panics.
const (
	maxName    = 128
	maxAddress = 160
	maxBuild   = 48
)

const (
	flagState = 1 << iota
	flagNonVoter
	flagLeaving
)

// fact is what one node announces of itself: where to find it, and what a founder must know. It is gossip: known to be
// true only as far as the shared key is, and always a little late. It never holds health or generations.
type fact struct {
	NodeID          string
	Incarnation     uint64
	Name            string
	Address         string // of the cluster port
	ClusterID       string // a UUID, or empty
	HasState        bool
	NonVoter        bool
	Leaving         bool // said before goodbye: memberlist does not tell its delegates the left from the dead
	BootstrapExpect uint8
	Build           string
}

// encode writes the fact: version, flags, expect, node id, cluster id, incarnation, and the texts with a length each.
func (f *fact) encode() ([]byte, error) {
	id, err := uuid.Parse(f.NodeID)
	if err != nil {
		return nil, fault.New(fault.Invalid, "announce", "node id", "%q is no UUID", f.NodeID)
	}
	var cluster uuid.UUID
	if f.ClusterID != "" {
		if cluster, err = uuid.Parse(f.ClusterID); err != nil {
			return nil, fault.New(fault.Invalid, "announce", "cluster id", "%q is no UUID", f.ClusterID)
		}
	}
	var flags byte
	if f.HasState {
		flags |= flagState
	}
	if f.NonVoter {
		flags |= flagNonVoter
	}
	if f.Leaving {
		flags |= flagLeaving
	}
	b := append(make([]byte, 0, 128), metaVersion, flags, f.BootstrapExpect)
	b = append(b, id[:]...)
	b = append(b, cluster[:]...)
	b = binary.BigEndian.AppendUint64(b, f.Incarnation)
	for _, text := range []struct {
		what, value string
		most        int
	}{{"name", f.Name, maxName}, {"cluster address", f.Address, maxAddress}, {"build", f.Build, maxBuild}} {
		if len(text.value) > text.most {
			return nil, fault.New(fault.Invalid, "announce", text.what, "has %d bytes, at most %d fit", len(text.value), text.most)
		}
		b = append(append(b, byte(len(text.value))), text.value...)
	}
	if len(b) > memberlist.MetaMaxSize {
		return nil, fault.New(fault.Invalid, "announce", f.Name, "%d bytes do not fit into %d", len(b), memberlist.MetaMaxSize)
	}
	return b, nil
}

const metaFixed = 3 + 16 + 16 + 8

// decode reads what a peer announced, as the member that memberlist calls member.
func decode(b []byte, member string) (*fact, error) {
	bad := func(format string, args ...any) (*fact, error) {
		return nil, fault.New(fault.Invalid, "read announcement", "", format, args...)
	}
	if len(b) < metaFixed || len(b) > memberlist.MetaMaxSize {
		return bad("%d bytes", len(b))
	}
	if b[0] != metaVersion {
		return bad("version %d", b[0])
	}
	f := &fact{HasState: b[1]&flagState != 0, NonVoter: b[1]&flagNonVoter != 0, Leaving: b[1]&flagLeaving != 0, BootstrapExpect: b[2]}
	id, cluster := uuid.UUID(b[3:19]), uuid.UUID(b[19:35])
	if id == uuid.Nil {
		return bad("no node id")
	}
	f.NodeID = id.String()
	if cluster != uuid.Nil {
		f.ClusterID = cluster.String()
	}
	f.Incarnation = binary.BigEndian.Uint64(b[35:])
	rest := b[metaFixed:]
	for _, text := range []struct {
		what string
		into *string
		most int
	}{{"name", &f.Name, maxName}, {"cluster address", &f.Address, maxAddress}, {"build", &f.Build, maxBuild}} {
		if len(rest) == 0 || int(rest[0]) > text.most || len(rest) < 1+int(rest[0]) {
			return bad("its %s is cut short or too long", text.what)
		}
		*text.into, rest = string(rest[1:1+rest[0]]), rest[1+rest[0]:]
		if strings.ContainsFunc(*text.into, func(r rune) bool { return r < ' ' || r == 0x7f || r == 0xfffd }) {
			return bad("its %s holds control characters", text.what)
		}
	}
	if f.Name == "" || f.Address == "" {
		return bad("no name or no address")
	}
	if want := f.member(); member != want {
		return bad("member %s announces itself as %s", strconv.Quote(member), want)
	}
	return f, nil
}

// member is the node's name in memberlist. Every boot is a member of its own: a node that comes back at another address
// need not wait until its last life is declared dead.
func (f *fact) member() string { return fmt.Sprintf("%s/%d", f.NodeID, f.Incarnation) }
