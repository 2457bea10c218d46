package hook

import "net/http"

// Says tells which fields the payloads of a kind can give. What one does not
// say comes from the source's configuration (registry) or from the registry
// itself (digest).
type Says struct {
	Registry, Tag, Digest, MediaType, Actor, Time bool
	// DeliveryID: the sender names its events, and an event that it sends again
	// keeps its name. Without it the hash of the event's bytes serves.
	DeliveryID bool
}

// Signature is an HMAC that senders of a kind put into a header.
type Signature struct {
	Header    string
	Algorithm string // "sha256" or "sha1"
	Prefix    string // before the hex digits
}

// Kind is one kind of sender.
type Kind struct {
	Name string
	Says Says
	// Signatures are those that the kind's senders make by themselves; a kind
	// without any sends whatever its operator configures, usually Authorization.
	Signatures []Signature
	decode     func(Request) ([]Event, error)
	handshake  func(method string, h http.Header) (Answer, bool)
}

// Answer is the reply to a handshake.
type Answer struct {
	Status int
	Header http.Header
}

// Kinds lists every kind of sender that can be decoded. Issue by issue it
// grows by a file and a row.
func Kinds() []Kind {
	all := Says{Registry: true, Tag: true, Digest: true, MediaType: true, Actor: true, Time: true, DeliveryID: true}
	return []Kind{
		// CNCF Distribution v2 and v3, and all that embed it.
		{Name: "distribution", Says: all, decode: decodeDistribution},
		// GitLab's registry is a fork of Distribution; its envelope is the same
		// and there is one action more.
		{Name: "gitlab", Says: all, decode: decodeDistribution},
		// Whatever sends CloudEvents 1.0 with the usual field names.
		{Name: "cloudevents", Says: all, decode: decodeCloudEvents, handshake: cloudEventsHandshake},
	}
}

// Find returns the kind of the given name.
func Find(name string) (Kind, bool) {
	for _, k := range Kinds() {
		if k.Name == name {
			return k, true
		}
	}
	return Kind{}, false
}

// Handshake answers a call by which a sender asks whether it may send. ok is
// false for calls that are none.
func (k Kind) Handshake(method string, h http.Header) (answer Answer, ok bool) {
	if k.handshake == nil {
		return Answer{}, false
	}
	return k.handshake(method, h)
}
