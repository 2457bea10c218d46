package hook

import "net/http"

// Says tells which fields the payload of a push by tag gives. What one does not
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
	// Bare: the prefix may be missing.
	Bare bool
}

// Kind is one kind of sender.
type Kind struct {
	Name string
	Says Says
	// Signatures are those that the kind's senders make by themselves, the one
	// that every version makes first; a kind without any sends whatever its
	// operator configures, usually Authorization.
	Signatures []Signature
	// AgreedHeader is the header into which senders of the kind can be told to
	// put the agreed secret as it stands, in the place of a signature.
	AgreedHeader string
	// PathMappings are the values that Request.PathMapping may have; none for a
	// kind whose registries have no repositories of their own.
	PathMappings []string

	// foreign says whether a host that a payload names is another registry of the
	// vendor than the one that a source is bound to. nil: a payload's host proves
	// nothing, since it is what the sender was called by.
	foreign func(said, bound string) bool
	// blank takes out of a body what nobody but the sender is to have; nil: there is nothing.
	blank func([]byte) []byte

	decode    func(Request) ([]Event, error)
	signed    func(Request) []byte             // nil: the body
	preflight func(http.Header) (Answer, bool) // nil: the kind has none
	handshake func(Request) (Answer, bool)     // nil: the kind has none
}

// Answer is the reply to a handshake.
type Answer struct {
	Status int
	Header http.Header
	Body   []byte
	// Left is what is left to be done by a person who has the body. Empty: nothing.
	Left string
}

// Kinds lists every kind of sender that can be decoded. deploy/registries.md
// has a section a kind, in this order.
func Kinds() []Kind {
	all := Says{Registry: true, Tag: true, Digest: true, MediaType: true, Actor: true, Time: true, DeliveryID: true}
	hub256 := Signature{Header: "X-Hub-Signature-256", Algorithm: "sha256", Prefix: "sha256="}
	return []Kind{
		// CNCF Distribution v2 and v3, and all that embed it.
		{Name: "distribution", Says: all, decode: decodeDistribution, blank: blankUsers},
		// GitLab's registry is a fork of Distribution; its envelope is the same
		// and there is one action more.
		{Name: "gitlab", Says: all, decode: decodeDistribution, blank: blankUsers},
		// Harbor 1.x and 2.x, both payload formats.
		{
			Name: "harbor", Says: Says{Registry: true, Tag: true, Digest: true, Actor: true, Time: true},
			decode: decodeHarbor,
		},
		{
			Name: "dockerhub", Says: Says{Registry: true, Tag: true, Actor: true, Time: true},
			decode: decodeDockerHub,
		},
		// GitHub Packages; its containers are ghcr.io.
		{
			Name: "ghcr", Says: all, Signatures: []Signature{hub256},
			decode: decodeGitHub, handshake: gitHubPing,
		},
		// Gitea and Forgejo.
		{
			Name: "gitea", Says: Says{Registry: true, Tag: true, Actor: true, Time: true, DeliveryID: true},
			Signatures: []Signature{
				{Header: "X-Gitea-Signature", Algorithm: "sha256"},
				{Header: "X-Forgejo-Signature", Algorithm: "sha256"},
				hub256,
			},
			decode: decodeGitea, signed: Request.payload, // the JSON within a form, not the form
		},
		{Name: "quay", Says: Says{Registry: true, Tag: true}, decode: decodeQuay},
		// Azure Container Registry's own webhooks.
		{
			Name: "acr", Says: Says{Registry: true, Tag: true, Digest: true, MediaType: true, Time: true, DeliveryID: true},
			decode: decodeACR, handshake: acrPing,
		},
		// Azure Container Registry by way of Event Grid.
		{
			Name: "azure-eventgrid", Says: Says{Registry: true, Tag: true, Digest: true, MediaType: true, Time: true, DeliveryID: true},
			decode: decodeEventGrid, preflight: cloudEventsPreflight, handshake: eventGridValidation,
		},
		{
			Name: "artifactory", Says: Says{Registry: true, Tag: true, Digest: true, Actor: true},
			Signatures:   []Signature{{Header: "X-Jfrog-Event-Auth", Algorithm: "sha256"}},
			AgreedHeader: "X-Jfrog-Event-Auth",
			PathMappings: []string{MappingPath, MappingSubdomain, MappingPort},
			decode:       decodeArtifactory,
		},
		// Sonatype Nexus Repository 3.
		{
			Name: "nexus", Says: Says{Tag: true, Actor: true, Time: true, DeliveryID: true},
			Signatures:   []Signature{{Header: "X-Nexus-Webhook-Signature", Algorithm: "sha1"}},
			PathMappings: []string{MappingPort, MappingSubdomain, MappingPath},
			decode:       decodeNexus,
		},
		{
			Name: "cloudsmith", Says: Says{Registry: true, Tag: true, Digest: true, Actor: true, Time: true, DeliveryID: true},
			// its documentation shows the digits alone, those who receive it see the prefix
			Signatures: []Signature{{Header: "X-Cloudsmith-Signature", Algorithm: "sha1", Prefix: "sha1=", Bare: true}},
			decode:     decodeCloudsmith, handshake: cloudsmithPing,
		},
		// zot, in CloudEvents' binary mode as it sends them.
		{Name: "zot", Says: Says{Tag: true, Digest: true, MediaType: true, Actor: true, Time: true, DeliveryID: true}, decode: decodeZot},
		// Amazon ECR by EventBridge: API destination, SNS, SQS, an input transformer.
		{
			Name:   "ecr",
			Says:   Says{Registry: true, Tag: true, Digest: true, MediaType: true, Time: true, DeliveryID: true},
			decode: decodeECR, handshake: ecrHandshake, foreign: foreignECR,
		},
		// Google Artifact Registry and Container Registry by Pub/Sub.
		{Name: "gar", Says: Says{Registry: true, Tag: true, Digest: true, Time: true, DeliveryID: true}, decode: decodeGAR, foreign: foreignGAR},
		// Oracle Cloud Infrastructure Registry by OCI Events and Notifications.
		{Name: "ocir", Says: Says{Tag: true, Digest: true, Time: true, DeliveryID: true}, decode: decodeOCIR},
		// Alibaba Cloud Container Registry: triggers (which have no ids) and EventBridge.
		{Name: "alibaba-acr", Says: Says{Registry: true, Tag: true, Digest: true, Time: true}, decode: decodeAlibaba},
		// IBM Cloud Container Registry by its audit events.
		{Name: "ibm-icr", Says: Says{Registry: true, Tag: true, Actor: true, Time: true}, decode: decodeICR},
		// Docker Trusted Registry, Mirantis Secure Registry 2 and 3.
		{Name: "mirantis-dtr", Says: Says{Tag: true, Digest: true, Actor: true, Time: true}, decode: decodeDTR},
		// Anything else, by the mapping of its source.
		{Name: "generic", Says: Says{Registry: true, Tag: true, Digest: true, Time: true, DeliveryID: true}, decode: decodeGeneric},
		// Whatever sends CloudEvents 1.0 with the usual field names.
		{Name: "cloudevents", Says: all, decode: decodeCloudEvents, preflight: cloudEventsPreflight},
	}
}

// KindNames returns the names of all kinds.
func KindNames() []string {
	var names []string
	for _, k := range Kinds() {
		names = append(names, k.Name)
	}
	return names
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

// Signed returns the bytes that a signature of this kind covers.
func (k Kind) Signed(req Request) []byte {
	if k.signed == nil {
		return req.Body
	}
	return k.signed(req)
}

// Blank returns a body, or the beginning of one, as it may be kept: without the
// secrets that the kind's senders put into it. It is not longer than before.
func (k Kind) Blank(body []byte) []byte {
	if k.blank == nil {
		return body
	}
	return k.blank(body)
}

// Preflight answers an OPTIONS call by which a sender asks whether it may send.
// ok is false for calls that are none.
func (k Kind) Preflight(method string, h http.Header) (answer Answer, ok bool) {
	if k.preflight == nil || method != http.MethodOptions {
		return Answer{}, false
	}
	return k.preflight(h)
}

// Handshake answers an authenticated call that asks for an answer of its own
// and tells of no image: a validation of the URL, a ping. ok is false for calls
// that are none.
func (k Kind) Handshake(req Request) (answer Answer, ok bool) {
	if k.handshake == nil {
		return Answer{}, false
	}
	return k.handshake(req)
}
