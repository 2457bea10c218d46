package hook

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// cloudEvent holds the attributes of a CloudEvent that matter here
// (CloudEvents 1.0, spec.md; JSON format, json-format.md).
type cloudEvent struct {
	SpecVersion string          `json:"specversion"`
	ID          string          `json:"id"`
	Source      string          `json:"source"`
	Type        string          `json:"type"`
	Subject     string          `json:"subject"`
	Time        string          `json:"time"`
	Data        json.RawMessage `json:"data"`
	DataBase64  string          `json:"data_base64"`
}

// cloudEventReader says what a CloudEvent means; its errors are ErrUnreadable.
type cloudEventReader func(*cloudEvent) (Event, error)

// decodeCloudEvents takes whatever names an image under the usual field names.
func decodeCloudEvents(req Request) ([]Event, error) {
	return readCloudEvents(req, func(in *cloudEvent) (Event, error) { return in.event(req.Registry) })
}

// readCloudEvents reads the three content modes of the HTTP binding
// (http-protocol-binding.md); event says what a CloudEvent of the kind means.
// Senders that send structured events as plain JSON are understood too.
func readCloudEvents(req Request, event cloudEventReader) ([]Event, error) {
	mediaType, _, _ := mime.ParseMediaType(req.Header.Get("Content-Type"))
	body := strings.TrimLeft(string(req.Body), " \t\r\n")
	switch {
	case strings.HasPrefix(mediaType, "application/cloudevents-batch"):
		return cloudEventsBatch(req, event)
	case strings.HasPrefix(mediaType, "application/cloudevents"):
		return cloudEventStructured(req, req.Body, event)
	case req.Header.Get("Ce-Specversion") != "":
		return cloudEventBinary(req, event)
	case strings.HasPrefix(body, "["):
		return cloudEventsBatch(req, event)
	case strings.HasPrefix(body, "{"):
		return cloudEventStructured(req, req.Body, event)
	default:
		return nil, fmt.Errorf("no CloudEvent in any of the three modes: %w", ErrUnreadable)
	}
}

func cloudEventsBatch(req Request, event cloudEventReader) ([]Event, error) {
	var batch []json.RawMessage
	if err := decodeJSON(req.Body, &batch); err != nil {
		return nil, err
	}
	if len(batch) > MaxEvents {
		return nil, fmt.Errorf("%d events, more than %d: %w", len(batch), MaxEvents, ErrUnreadable)
	}
	events := make([]Event, 0, len(batch))
	for _, raw := range batch {
		one, err := cloudEventStructured(req, raw, event)
		if err != nil {
			one = []Event{bad(err.Error()).finish(req, raw)}
		}
		events = append(events, one...)
	}
	return events, nil
}

func cloudEventStructured(req Request, raw []byte, event cloudEventReader) ([]Event, error) {
	var in cloudEvent
	if err := decodeJSON(raw, &in); err != nil {
		return nil, err
	}
	if in.DataBase64 != "" {
		data, err := base64.StdEncoding.DecodeString(in.DataBase64)
		if err != nil {
			return nil, fmt.Errorf("data_base64 is not base64: %w", ErrUnreadable)
		}
		in.Data = data
	}
	return in.check(req, raw, event)
}

func cloudEventBinary(req Request, event cloudEventReader) ([]Event, error) {
	attribute := func(name string) string {
		v := req.Header.Get("Ce-" + name)
		if decoded, err := url.PathUnescape(v); err == nil { // http-protocol-binding.md, 3.1.3.2
			return decoded
		}
		return v
	}
	in := cloudEvent{
		SpecVersion: attribute("Specversion"),
		ID:          attribute("Id"),
		Source:      attribute("Source"),
		Type:        attribute("Type"),
		Subject:     attribute("Subject"),
		Time:        attribute("Time"),
		Data:        req.Body,
	}
	raw := slices.Concat([]byte(in.Source+"\n"+in.ID+"\n"+in.Type+"\n"+in.Subject+"\n"+in.Time+"\n"), req.Body)
	return in.check(req, raw, event)
}

func (in *cloudEvent) check(req Request, raw []byte, event cloudEventReader) ([]Event, error) {
	if !strings.HasPrefix(in.SpecVersion, "1.") && in.SpecVersion != "0.3" {
		return nil, fmt.Errorf("specversion %q is not 1.0: %w", clean(in.SpecVersion, 16), ErrUnreadable)
	}
	if in.Type == "" {
		return nil, fmt.Errorf("no attribute \"type\": %w", ErrUnreadable)
	}
	e, err := event(in)
	if err != nil {
		return nil, err
	}
	return []Event{e.finish(req, raw)}, nil
}

// readData reads the event's data, which may be absent, into a struct or a map.
func (in *cloudEvent) readData(into any) error {
	if len(in.Data) == 0 || string(in.Data) == "null" {
		return nil
	}
	if err := decodeJSON(in.Data, into); err != nil {
		return fmt.Errorf("data: %w", err)
	}
	return nil
}

// identity returns what no other event has: source and id together (spec.md,
// "REQUIRED Attributes"), or a hash of both if that is too long; "" without an id.
func (in *cloudEvent) identity() string {
	if in.ID == "" || in.Source == "" {
		return in.ID
	}
	both := in.Source + " " + in.ID // a source, which is a URI reference, holds no space
	if both != clean(both, maxDeliveryID) {
		return hashOf([]byte(both))
	}
	return both
}

// event reads an event with the usual field names. bound is the source's registry.
func (in *cloudEvent) event(bound string) (Event, error) {
	var data map[string]any
	if err := in.readData(&data); err != nil {
		return Event{}, err
	}
	e := Event{Time: parseTime(in.Time), DeliveryID: in.identity()}
	named := fieldsOf(data)
	e.Registry = named.registry
	e.Repository, e.Tag, e.Digest = named.repository, named.tag, named.digest
	if host, path, ok := strings.Cut(e.Repository, "/"); ok && e.Registry == "" && (strings.ContainsAny(host, ".:") || host == bound) {
		e.Registry, e.Repository = host, path
	}
	e.MediaType, e.Actor = named.mediaType, named.actor
	for _, text := range []string{named.image, in.Subject} {
		if ref, err := ParseReference(text); err == nil {
			e = e.fillFrom(ref)
		}
	}
	e.Repository = strings.TrimPrefix(e.Repository, hostOf(e.Registry)+"/")
	return in.classify(e), nil
}

// fillFrom takes from ref what e does not say yet, if ref is about the same
// repository or e names none.
func (e Event) fillFrom(ref Reference) Event {
	if e.Repository != "" && e.Repository != ref.Repository && e.Repository != ref.Registry+"/"+ref.Repository {
		return e
	}
	e.Repository = ref.Repository
	if e.Registry == "" {
		e.Registry = ref.Registry
	}
	// A tag and a digest belong together: a second source of one must not be
	// joined to the first source of the other unless they agree.
	switch {
	case e.Tag == "" && e.Digest == "":
		e.Tag, e.Digest = ref.Tag, ref.Digest
	case e.Tag == "" && (ref.Digest == "" || ref.Digest == e.Digest):
		e.Tag = ref.Tag
	case e.Digest == "" && (ref.Tag == "" || ref.Tag == e.Tag):
		e.Digest = ref.Digest
	}
	return e
}

// verb is what a word in an event's type says.
func verb(word string) (Action, bool) {
	switch word {
	case "push", "pushed", "publish", "published", "create", "created", "update", "updated", "upload", "uploaded",
		"tag", "tagged", "insert", "inserted", "add", "added", "promote", "promoted", "stored", "released":
		return Push, true
	case "delete", "deleted", "deletion", "remove", "removed", "untag", "untagged", "purged", "unpublished":
		return Delete, true
	case "pull", "pulled", "download", "downloaded", "scan", "scanned", "quota", "test", "ping", "lint", "lintfailed",
		"failed", "failure", "started", "stopped", "replication", "retention", "mount", "mounted":
		return Ignore, true
	}
	return "", false
}

// places are what images stand in: events about one may well name no image.
var places = map[string]bool{"repository": true, "repo": true, "namespace": true, "project": true}

// classify tells the action from the event's type, which is free text: the last
// of its words that says one decides, since host names come first.
func (in *cloudEvent) classify(e Event) Event {
	typ := words(in.Type)
	shown := clean(in.Type, 128)
	action, at := Action(""), -1
	for i, w := range slices.Backward(typ) {
		if a, ok := verb(w); ok {
			action, at = a, i
			break
		}
	}
	about := ""
	if at > 0 {
		about = typ[at-1]
	}
	switch action {
	case Push:
		e.Action, e.Reason = Push, fmt.Sprintf("type %s says that something was pushed", shown)
		switch {
		case about == "blob" || about == "layer":
			return e.ignored(fmt.Sprintf("type %s: a blob, no manifest", shown))
		case places[about] && (e.Repository == "" || (e.Tag == "" && e.Digest == "")):
			return e.ignored(fmt.Sprintf("type %s: no image is named", shown))
		case about == "chart":
			return e.notAnImage(fmt.Sprintf("type %s: a chart", shown))
		case e.MediaType != "" && manifestKind(e.MediaType) == "":
			return e.notAnImage("the media type is not one of an image manifest or index")
		}
		return e
	case Delete:
		if places[about] && e.Repository == "" {
			return e.ignored(fmt.Sprintf("type %s: a deletion that names no repository", shown))
		}
		e.Action, e.Reason = Delete, fmt.Sprintf("type %s says that something was deleted", shown)
		return e
	case Ignore:
		return e.ignored(fmt.Sprintf("type %s: nothing was pushed or deleted", shown))
	default:
		return e.ignored(fmt.Sprintf("type %s says neither that something was pushed nor that it was deleted", shown))
	}
}

// words splits a type such as "org.example.ImagePushed" or
// "cr:Artifact:PushCompleted" into lower-case words.
func words(s string) []string {
	var out []string
	start := -1
	flush := func(end int) {
		if start >= 0 {
			out = append(out, strings.ToLower(s[start:end]))
		}
		start = -1
	}
	for i := 0; i < len(s); i++ {
		c := s[i]
		upper, lower, digit := c >= 'A' && c <= 'Z', c >= 'a' && c <= 'z', c >= '0' && c <= '9'
		switch {
		case !upper && !lower && !digit:
			flush(i)
		case upper && i > 0 && s[i-1] >= 'a' && s[i-1] <= 'z':
			flush(i)
			start = i
		case start < 0:
			start = i
		}
	}
	flush(len(s))
	return out
}

// named is what the data of a CloudEvent says under the usual field names.
type named struct {
	registry, repository, tag, digest, image, mediaType, actor string
}

// fieldsOf looks for the usual field names, whatever their case and
// separators, at the top of data and one level down in the objects that
// registries wrap things in. Names are tried in the order written; the top goes
// before what is nested.
func fieldsOf(data map[string]any) named {
	levels := []map[string]string{flat(data)}
	for _, wrapper := range []string{"target", "image", "artifact", "detail", "resource", "request"} {
		for _, key := range sortedKeys(data) {
			inner, ok := data[key].(map[string]any)
			if ok && plain(key) == wrapper {
				levels = append(levels, flat(inner))
			}
		}
	}
	find := func(names ...string) string {
		for _, level := range levels {
			for _, name := range names {
				if v := level[name]; v != "" {
					return v
				}
			}
		}
		return ""
	}
	return named{
		registry:   find("registry", "registryurl", "registryhost", "registryname", "loginserver", "host"),
		repository: find("repository", "repositoryname", "repo", "reponame", "repofullname", "imagerepository", "imagename"),
		tag:        find("tag", "imagetag", "tagname"),
		digest:     find("digest", "imagedigest", "manifestdigest"),
		image:      find("image", "imageref", "imagereference", "imageuri", "imageurl", "ref", "reference", "uri", "resourceurl"),
		mediaType:  find("mediatype", "manifestmediatype"),
		actor:      find("actor", "operator", "pusher", "username"),
	}
}

// flat returns the texts at one level of an object by plain name.
func flat(object map[string]any) map[string]string {
	out := map[string]string{}
	for _, key := range sortedKeys(object) {
		text, ok := object[key].(string)
		if name := plain(key); ok && out[name] == "" {
			out[name] = strings.TrimSpace(text)
		}
	}
	return out
}

func sortedKeys(object map[string]any) []string {
	keys := make([]string, 0, len(object))
	for k := range object {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// plain reduces a field name to its lower-case letters and digits.
func plain(name string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r >= 'A' && r <= 'Z':
			return r + ('a' - 'A')
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9':
			return r
		}
		return -1
	}, name)
}

// Reference is an image reference of which any part but the repository may be
// missing.
type Reference struct {
	Registry, Repository, Tag, Digest string
}

// ErrReference is returned for a text that is no image reference.
var ErrReference = errors.New("not an image reference ([registry/]repository[:tag][@digest])")

// ParseReference reads [registry/]repository[:tag][@digest]. The first part is
// a registry if it holds a dot or a colon or is "localhost", as Docker has it.
// It must name a tag or a digest: a bare word may be anything.
func ParseReference(s string) (Reference, error) {
	_, rest, isURL := strings.Cut(s, "://")
	if !isURL {
		rest = s
	}
	var ref Reference
	rest, ref.Digest, _ = strings.Cut(rest, "@")
	first, path, ok := strings.Cut(rest, "/")
	if ok && (strings.ContainsAny(first, ".:") || first == "localhost" || isURL) {
		ref.Registry, rest = first, path
	}
	if i := strings.LastIndexByte(rest, ':'); i >= 0 && !strings.Contains(rest[i:], "/") {
		rest, ref.Tag = rest[:i], rest[i+1:]
		if !contracts.ValidTag(ref.Tag) {
			return Reference{}, fmt.Errorf("tag: %w", ErrReference)
		}
	}
	ref.Repository = rest
	switch {
	case !contracts.ValidRepository(ref.Repository):
		return Reference{}, fmt.Errorf("repository: %w", ErrReference)
	case ref.Registry != "" && !contracts.ValidRegistry(ref.Registry):
		return Reference{}, fmt.Errorf("registry: %w", ErrReference)
	case ref.Digest != "" && !contracts.ValidDigest(ref.Digest):
		return Reference{}, fmt.Errorf("digest: %w", ErrReference)
	case ref.Tag == "" && ref.Digest == "":
		return Reference{}, fmt.Errorf("neither tag nor digest: %w", ErrReference)
	}
	return ref, nil
}

// cloudEventsPreflight grants the abuse protection request of a sender
// (CloudEvents, http-webhook.md, 4): the origin and the rate it asks for. Its
// callback URL is never called.
func cloudEventsPreflight(h http.Header) (Answer, bool) {
	origin := h.Get("WebHook-Request-Origin")
	if origin == "" {
		return Answer{}, false
	}
	out := http.Header{}
	out.Set("WebHook-Allowed-Origin", clean(origin, 255))
	if rate := h.Get("WebHook-Request-Rate"); rate != "" {
		out.Set("WebHook-Allowed-Rate", clean(rate, 16))
	}
	return Answer{Status: http.StatusOK, Header: out}, true
}
