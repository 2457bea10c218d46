// Package hook decodes what registries send when something was pushed or
// deleted. It is pure: no connection is made and nothing of a payload is
// followed. There is one file a kind of sender and one row a kind in kinds.go.
package hook

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// ErrUnreadable is returned for a body that is not what its kind sends.
var ErrUnreadable = errors.New("body is not readable")

// ErrUnknownKind is returned for a kind that has no decoder.
var ErrUnknownKind = errors.New("unknown kind of source")

// MaxEvents bounds the events of one body; a body with more is unreadable.
const MaxEvents = 1000

// Bounds of what is copied out of a payload as it stands.
const (
	maxActor      = 256
	maxDeliveryID = 128
	maxMediaType  = 255
	maxUnix       = 253402300799 // the last second of the year 9999, behind which JSON has no times
)

// Action says what an event means for us.
type Action string

// The three actions.
const (
	Push   Action = "push"
	Delete Action = "delete"
	Ignore Action = "ignore"
)

// Request is one authenticated call of a sender.
type Request struct {
	Header http.Header
	Body   []byte
	// Registry is the host (and port) that the source is bound to. It goes
	// before whatever host the payload names, unless that is another registry of a
	// vendor who names them surely; empty: the payload's host counts.
	Registry string
	// Mapper reads bodies of the kind "generic"; other kinds do without.
	Mapper *Mapper
	// PathMapping says how a registry that has repositories of its own shows them
	// to container clients: one of the Mapping constants; empty: the kind's own.
	PathMapping string
	// RepositoryKey is the one of those repositories that the source is about;
	// empty: all of them.
	RepositoryKey string

	// foreign is that of the kind.
	foreign func(said, bound string) bool
}

// The ways in which Artifactory and Nexus show the repositories that they have
// to container clients, by the names that Artifactory has for them.
const (
	MappingPath      = "repo-path" // host/key/image
	MappingSubdomain = "subdomain" // key.host/image
	MappingPort      = "port"      // host:port/image, a port for each
)

// place fills in registry and repository of an image that stands in the
// repository key of the registry at host, which may be empty. It returns false
// for an event about another repository than the source is.
func (req Request) place(e Event, mapping, host, key, image string) (Event, bool) {
	if req.PathMapping != "" {
		mapping = req.PathMapping
	}
	e.Registry, e.Repository = hostOf(host), image
	switch {
	case mapping == MappingPath:
		e.Repository = key + "/" + image
	case mapping == MappingSubdomain && e.Registry != "":
		e.Registry = key + "." + e.Registry
	default:
		e.Registry = "" // its port is not said
	}
	if req.RepositoryKey != "" && key != req.RepositoryKey {
		return e.ignored(fmt.Sprintf("it is about the repository %q, the source about %q", clean(key, 64), req.RepositoryKey)), false
	}
	return e, true
}

// Event is one event of a body. A field that the payload does not say, or says
// in a form that cannot be right, is empty.
type Event struct {
	Action     Action
	Registry   string // host[:port]
	Repository string
	Tag        string
	Digest     string // sha256 only; another one is left out, so that the tag is resolved (but see saidDigest)
	MediaType  string // of the manifest
	Actor      string
	Time       time.Time // by the sender's clock
	DeliveryID string    // the sender's id of the event, or a hash of it
	// Unnamed: DeliveryID is a hash of bytes that hold neither an id nor a time,
	// so that a later push may well have the same.
	Unnamed bool
	Reason  string // why this action, in words
	// Hint says of an ignored push why it looks like no image. Such a push still
	// goes to planner, which reads the manifest and decides. Empty: an ignored
	// event ends here.
	Hint string
	// Bad says why this one event of the body cannot be read. Empty: it can.
	Bad string
}

// Publishable says whether the event goes on to planner, and if it should but
// lacks what planner needs, what that is.
func (e Event) Publishable() (ok bool, missing string) {
	if e.Bad != "" || (e.Action == Ignore && e.Hint == "") {
		return false, ""
	}
	switch {
	case e.Registry == "":
		return false, "no registry is named"
	case e.Repository == "":
		return false, "no repository is named"
	case e.Action != Delete && e.Tag == "" && e.Digest == "":
		return false, "neither a tag nor a digest is named"
	}
	return true, ""
}

// Subject returns registry/repository[:tag][@digest] as far as it is known.
func (e Event) Subject() string {
	s := e.Registry + "/" + e.Repository
	if e.Tag != "" {
		s += ":" + e.Tag
	}
	if e.Digest != "" {
		s += "@" + e.Digest
	}
	return s
}

// Contract returns the event as `tidewaiter webhook decode` prints it.
func (e Event) Contract() contracts.WebhookEvent {
	return contracts.WebhookEvent{
		Action:     string(e.Action),
		Registry:   pointer(e.Registry),
		Repository: pointer(e.Repository),
		Tag:        pointer(e.Tag),
		Digest:     pointer(e.Digest),
		Reason:     e.Reason,
	}
}

func pointer(s string) *string {
	if s == "" {
		return nil
	}
	return &s
}

// Decode reads a body as the named kind sends it and returns one Event for
// each event in it, in its order; none for handshakes and test calls without
// content. Errors: ErrUnknownKind, and ErrUnreadable when no event can be told
// from another. An unreadable event among readable ones is returned with Bad set.
func Decode(kind string, req Request) ([]Event, error) {
	k, ok := Find(kind)
	if !ok {
		return nil, fmt.Errorf("%q: %w: it is none of %s", clean(kind, 64), ErrUnknownKind, strings.Join(KindNames(), ", "))
	}
	req.foreign = k.foreign
	events, err := k.decode(req)
	if err != nil {
		return nil, fmt.Errorf("decode %s: %w", kind, err)
	}
	if len(events) > MaxEvents {
		return nil, fmt.Errorf("decode %s: %d events, more than %d: %w", kind, len(events), MaxEvents, ErrUnreadable)
	}
	return events, nil
}

// signatureTag are the tags under which signatures, attestations and SBOMs
// stand (cosign), and the bare one of the referrers fallback index
// (distribution-spec, "Referrers Tag Schema").
var signatureTag = regexp.MustCompile(`^sha256-[0-9a-f]{64}(?:\.(?:sig|att|sbom))?$`)

// TagHint says why a tag looks like one of no image, "" where it does not. It is
// a hint: planner reads the manifest and decides.
func TagHint(tag string) string {
	if signatureTag.MatchString(tag) {
		return "the tag is one that signatures and attestations use"
	}
	return ""
}

// saidDigest is a digest as senders may write it, whole or not. Of an event that
// ends here, which nobody resolves, it is shown as it was said.
var saidDigest = regexp.MustCompile(`^sha256:[0-9a-f]{1,128}$`)

// finish brings an event into shape after a decoder has filled in what the
// payload says: it binds the source's registry, drops what cannot be right and
// recognises tags that signatures use. raw is what the event was read from.
func (e Event) finish(req Request, raw []byte) Event {
	e.Registry = hostOf(e.Registry)
	if req.Registry != "" && (req.foreign == nil || !req.foreign(e.Registry, req.Registry)) {
		e.Registry = req.Registry
	}
	if y := e.Time.UTC().Year(); y < 1 || y > 9999 { // such times have no JSON
		e.Time = time.Time{}
	}
	named := e.Tag != "" || e.Digest != ""
	if !contracts.ValidRepository(e.Repository) {
		e.Repository = ""
	}
	if contracts.ValidDigest(e.Tag) { // some senders repeat the digest where there is no tag
		if e.Digest == "" {
			e.Digest = e.Tag
		}
		e.Tag = ""
	}
	if !contracts.ValidTag(e.Tag) {
		e.Tag = ""
	}
	kept := contracts.ValidDigest
	if e.Action == Ignore && e.Hint == "" {
		kept = saidDigest.MatchString
	}
	if !kept(e.Digest) {
		e.Digest = ""
	}
	if e.Action == Delete && named && e.Tag == "" && e.Digest == "" { // else it would tell of the whole repository
		e.Bad = "what was deleted is named by neither a tag nor a sha256 digest that can be right"
	}
	e.MediaType = clean(e.MediaType, maxMediaType)
	e.Actor = clean(e.Actor, maxActor)
	if e.DeliveryID == "" || e.DeliveryID != clean(e.DeliveryID, maxDeliveryID) {
		e.DeliveryID, e.Unnamed = hashOf(raw), e.Time.IsZero()
	}
	if hint := TagHint(e.Tag); hint != "" && e.Action == Push {
		return e.notAnImage(hint)
	}
	return e
}

// notAnImage turns a push into one that planner decides about.
func (e Event) notAnImage(why string) Event {
	e.Action, e.Reason, e.Hint = Ignore, why, why
	return e
}

// ignored returns the event as one that ends here.
func (e Event) ignored(why string) Event {
	e.Action, e.Reason, e.Hint = Ignore, why, ""
	return e
}

// bad returns the event of a part of the body that cannot be read.
func bad(why string) Event {
	return Event{Action: Ignore, Reason: why, Bad: why}
}

// clean cuts s to at most limit bytes of valid UTF-8 without control characters.
func clean(s string, limit int) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return -1
		}
		return r
	}, strings.ToValidUTF8(s, ""))
	for len(s) > limit {
		_, size := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-size]
	}
	return s
}

// hostOf returns the host[:port] in a host name or URL, "" where there is none.
func hostOf(s string) string {
	if strings.Contains(s, "://") {
		u, err := url.Parse(s)
		if err != nil {
			return ""
		}
		s = u.Host
	}
	s, _, _ = strings.Cut(s, "/")
	if !contracts.ValidRegistry(s) {
		return ""
	}
	return s
}

func hashOf(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// isForm says whether the body is an HTML form.
func (req Request) isForm() bool {
	mediaType, _, _ := mime.ParseMediaType(req.Header.Get("Content-Type"))
	return mediaType == "application/x-www-form-urlencoded"
}

// payload returns the JSON of a call: the body, or the field "payload" of a
// form. A form that cannot be read has none.
func (req Request) payload() []byte {
	if !req.isForm() {
		return req.Body
	}
	form, err := url.ParseQuery(string(req.Body))
	if err != nil {
		return nil
	}
	return []byte(form.Get("payload"))
}

// listOf reads a JSON array, or a single value as an array of one.
func listOf(b []byte) ([]json.RawMessage, error) {
	if trimmed := bytes.TrimLeft(b, " \t\r\n"); len(trimmed) > 0 && trimmed[0] == '{' {
		var one json.RawMessage
		if err := decodeJSON(b, &one); err != nil {
			return nil, err
		}
		return []json.RawMessage{one}, nil
	}
	var list []json.RawMessage
	if err := decodeJSON(b, &list); err != nil {
		return nil, err
	}
	if len(list) > MaxEvents {
		return nil, fmt.Errorf("%d events, more than %d: %w", len(list), MaxEvents, ErrUnreadable)
	}
	return list, nil
}

// unixTime reads seconds since 1970, whole or not; anything else is "not said".
func unixTime(n json.Number) time.Time {
	seconds, err := n.Float64()
	if err != nil || seconds < 1 || seconds > maxUnix {
		return time.Time{}
	}
	whole := int64(seconds)
	return time.Unix(whole, int64((seconds-float64(whole))*1e9)).UTC()
}

// parseTime reads RFC 3339; anything else is "not said".
func parseTime(s string) time.Time {
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		return time.Time{}
	}
	return t.UTC()
}

// decodeJSON reads one JSON value and nothing behind it. Its errors do not
// quote the input, which may hold a secret.
func decodeJSON(b []byte, into any) error {
	err := json.Unmarshal(b, into)
	if err == nil {
		return nil
	}
	var syntax *json.SyntaxError
	var mismatch *json.UnmarshalTypeError
	switch {
	case errors.As(err, &syntax):
		return fmt.Errorf("not JSON at byte %d: %w", syntax.Offset, ErrUnreadable)
	case errors.As(err, &mismatch):
		return fmt.Errorf("field %q holds a JSON %s: %w", clean(mismatch.Field, 64), jsonKind(mismatch.Value), ErrUnreadable)
	default:
		return fmt.Errorf("not the expected JSON: %w", ErrUnreadable)
	}
}

// jsonKind keeps the kind of a mismatched value and drops the value that
// encoding/json appends to it for numbers.
func jsonKind(v string) string {
	kind, _, _ := strings.Cut(v, " ")
	return kind
}
