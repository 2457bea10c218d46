// Package plan says what an image consists of. Whether something is an image
// is decided from its manifest alone: any layer of an image-layer media type
// means scan, whatever tag, subject or platform say.
package plan

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/registry"
)

// Limits of what is planned.
const (
	MaxLayers      = 256     // of one image; runtimes stop at 127
	MaxChildren    = 128     // of one index
	MaxConfigBytes = 4 << 20 // of a config blob
	maxDepth       = registry.MaxNesting
	lookups        = 8                              // of layers at once
	maxEventData   = contracts.MaxEventBytes - 4096 // leaves room for the event's own attributes
)

// ErrMissingLayer is returned when a manifest names a layer that its own
// repository does not have: it cannot be run from there.
var ErrMissingLayer = errors.New("layer is not in the image's repository")

// Source is what planning needs of a registry.Client.
type Source interface {
	Manifest(ctx context.Context, ref registry.Ref) (registry.Manifest, error)
	HasBlob(ctx context.Context, registry, repository, digest string) (bool, error)
	ReadBlob(ctx context.Context, registry, repository string, d ocispec.Descriptor, limit int64) ([]byte, error)
}

// Result is what became of an image: exactly one of Planned, Unsupported and Gone.
type Result struct {
	// Image is what the reference named; without digest only if Gone.
	Image contracts.Image
	// Planned holds the image, or an index and then every part that is scanned.
	// Source and Tag are left to the caller.
	Planned []contracts.ImagePlanned
	// Layers are the distinct layers to analyse. Each was found in its repository.
	Layers []contracts.LayerRequested
	// Unsupported says why there is nothing to scan.
	Unsupported *contracts.ImageUnsupported
	// Gone says that the manifest is not there.
	Gone string
}

// Option changes how an image is planned.
type Option func(*planner)

// WithPlatforms plans only the parts of an index for these platforms, written
// os/architecture[/variant]; other parts are gaps. None: all.
func WithPlatforms(platforms ...string) Option {
	return func(p *planner) { p.platforms = platforms }
}

// Image plans the image that ref names. Errors are those of the source, and
// ErrMissingLayer.
func Image(ctx context.Context, src Source, ref registry.Ref, options ...Option) (Result, error) {
	p := &planner{src: src, ref: ref, done: map[string]bool{}, have: map[string]bool{}}
	for _, o := range options {
		o(p)
	}
	res := Result{Image: contracts.Image{Registry: ref.Registry, Repository: ref.Repository, Digest: ref.Digest}}
	m, err := src.Manifest(ctx, ref)
	switch {
	case errors.Is(err, registry.ErrNotFound):
		res.Gone = "the registry has no manifest " + ref.String()
		return res, nil
	case errors.Is(err, registry.ErrUnknownManifest) && ref.Digest != "":
		return p.unsupported(res, unknownManifest()), nil
	case errors.Is(err, registry.ErrTooLarge) && ref.Digest != "":
		return p.unsupported(res, no{code: "manifest-too-large", why: "The manifest is larger than 4 MiB.", gap: true}), nil
	case err != nil:
		return res, err
	}
	res.Image.Digest = m.Descriptor.Digest.String()
	why, err := p.add(ctx, m, nil, 0)
	if err != nil {
		return res, err
	}
	if why != nil {
		return p.unsupported(res, *why), nil
	}
	res.Planned, res.Layers = p.planned, p.layers
	return res, nil
}

// Filtered is the Result for an image that its source leaves out, and why.
func Filtered(ref registry.Ref, why string) Result {
	image := contracts.Image{Registry: ref.Registry, Repository: ref.Repository, Digest: ref.Digest}
	return Result{Image: image, Unsupported: &contracts.ImageUnsupported{Image: image, Reason: "filtered", Message: why}}
}

// no says why a manifest is not scanned.
type no struct {
	code string
	why  string // a sentence
	gap  bool   // something that may run goes unseen
}

func unknownManifest() no {
	return no{code: "unknown-manifest", why: "The manifest is of a kind that is not known.", gap: true}
}

type planner struct {
	src       Source
	ref       registry.Ref
	platforms []string

	planned []contracts.ImagePlanned
	layers  []contracts.LayerRequested
	done    map[string]bool // manifests that are planned
	have    map[string]bool // layers that are in the repository
}

func (p *planner) unsupported(res Result, why no) Result {
	res.Unsupported = &contracts.ImageUnsupported{Image: res.Image, Reason: why.code, Message: why.why}
	return res
}

// add plans one manifest, and those below it, unless there is a reason not to.
func (p *planner) add(ctx context.Context, m registry.Manifest, platform *contracts.Platform, depth int) (*no, error) {
	doc, why := parse(m)
	if why != nil {
		return why, nil
	}
	if doc.index {
		return p.addIndex(ctx, m, doc, platform, depth)
	}
	return p.addImage(ctx, m, doc, platform)
}

func (p *planner) addImage(ctx context.Context, m registry.Manifest, doc *document, platform *contracts.Platform) (*no, error) {
	if why := classify(doc); why != nil {
		return why, nil
	}
	img := contracts.ImagePlanned{
		Image:     p.image(m.Descriptor.Digest.String()),
		Kind:      contracts.KindImage,
		MediaType: m.Descriptor.MediaType,
		Platform:  platform,
	}
	for _, l := range doc.Layers {
		img.Layers = append(img.Layers, contracts.PlannedLayer{
			Digest: l.Digest.String(), MediaType: l.MediaType, Size: l.Size, Missing: unreadable(l),
		})
	}
	if err := p.findLayers(ctx, doc, &img); err != nil {
		return nil, err
	}
	if err := p.describe(ctx, doc, &img); err != nil {
		return nil, err
	}
	if !fit(&img) {
		return &no{code: "too-many-layers", why: "The description of the layers is too large for an event.", gap: true}, nil
	}
	p.planned = append(p.planned, img)
	p.done[img.Image.Digest] = true
	p.request(&img)
	return nil, nil
}

// findLayers asks the image's own repository for every layer, so that nobody
// is told of the content of a layer that he cannot read.
func (p *planner) findLayers(ctx context.Context, doc *document, img *contracts.ImagePlanned) error {
	wanted := map[string]bool{}
	for _, l := range img.Layers {
		if _, known := p.have[l.Digest]; l.Missing == "" && !known {
			wanted[l.Digest] = false
		}
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(lookups)
	found := make(chan string, len(wanted))
	for d := range wanted {
		g.Go(func() error {
			ok, err := p.src.HasBlob(gctx, img.Image.Registry, img.Image.Repository, d)
			if err == nil && ok {
				found <- d
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	close(found)
	for d := range wanted {
		p.have[d] = false
	}
	for d := range found {
		p.have[d] = true
	}
	for i := range img.Layers {
		l := &img.Layers[i]
		if l.Missing != "" || p.have[l.Digest] {
			continue
		}
		if foreign(doc.Layers[i]) {
			l.Missing = "foreign layer: it is not in the registry, and its URLs are not followed"
			continue
		}
		return fmt.Errorf("layer %s of %s: %w", l.Digest, img.Image, ErrMissingLayer)
	}
	return nil
}

// request asks for the layers that were not asked for yet.
func (p *planner) request(img *contracts.ImagePlanned) {
	for _, l := range img.Layers {
		if l.Missing != "" || p.asked(l.Digest) {
			continue
		}
		p.layers = append(p.layers, contracts.LayerRequested{
			Digest: l.Digest, MediaType: l.MediaType, Size: l.Size, Image: img.Image,
		})
	}
}

func (p *planner) asked(digest string) bool {
	for _, l := range p.layers {
		if l.Digest == digest {
			return true
		}
	}
	return false
}

func (p *planner) image(digest string) contracts.Image {
	return contracts.Image{Registry: p.ref.Registry, Repository: p.ref.Repository, Digest: digest}
}

func (p *planner) addIndex(ctx context.Context, m registry.Manifest, doc *document, platform *contracts.Platform, depth int) (*no, error) {
	if why := classifyIndex(doc); why != nil {
		return why, nil
	}
	index := contracts.ImagePlanned{
		Image:     p.image(m.Descriptor.Digest.String()),
		Kind:      contracts.KindIndex,
		MediaType: m.Descriptor.MediaType,
		Platform:  platform,
	}
	place := len(p.planned)
	layersBefore := len(p.layers)
	p.planned = append(p.planned, index) // stands before its parts
	reasons := map[string]bool{}
	useful := false
	for i, child := range doc.Manifests {
		part := contracts.PlannedPart{
			Digest: child.Digest.String(), MediaType: child.MediaType, Size: child.Size, Platform: platformOf(child.Platform),
		}
		why, err := p.addChild(ctx, child, &part, i, depth)
		if err != nil {
			return nil, err
		}
		if why != nil {
			part.Skipped, part.Gap = why.why, why.gap
			reasons[why.code] = true
		}
		useful = useful || why == nil || why.gap
		index.Parts = append(index.Parts, part)
	}
	var why *no
	switch {
	case !useful:
		why = nothingIn(reasons)
	case !fit(&index):
		why = &no{code: "index-too-large", why: "The description of the index is too large for an event.", gap: true}
	}
	if why != nil {
		for _, dropped := range p.planned[place:] {
			delete(p.done, dropped.Image.Digest)
		}
		p.planned, p.layers = p.planned[:place], p.layers[:layersBefore]
		return why, nil
	}
	p.planned[place] = index
	p.done[index.Image.Digest] = true
	return nil, nil
}

// addChild plans one child of an index. What is wrong with a child is a reason
// to skip it; only errors that may pass are returned.
func (p *planner) addChild(ctx context.Context, child ocispec.Descriptor, part *contracts.PlannedPart, number, depth int) (*no, error) {
	switch {
	case number >= MaxChildren:
		return &no{code: "too-many-parts", why: fmt.Sprintf("limit: more than %d parts", MaxChildren), gap: true}, nil
	case !contracts.ValidDigest(part.Digest):
		return &no{code: "digest", why: "its digest is not sha256", gap: true}, nil
	case child.Annotations["vnd.docker.reference.type"] == "attestation-manifest", unknownPlatform(child.Platform):
		return &no{code: "attestation", why: "attestation"}, nil
	case !isManifest(child.MediaType):
		return &no{code: "no-manifest", why: "not a manifest: " + short(child.MediaType)}, nil
	case part.Platform != nil && !p.selected(*part.Platform):
		return &no{code: "platform", why: "platform is not selected", gap: true}, nil
	case depth >= maxDepth && isIndex(child.MediaType):
		return &no{code: "nesting", why: fmt.Sprintf("limit: indexes nested deeper than %d", maxDepth), gap: true}, nil
	case p.done[part.Digest]:
		return nil, nil
	}
	m, err := p.src.Manifest(ctx, registry.Ref{Registry: p.ref.Registry, Repository: p.ref.Repository, Digest: part.Digest})
	switch {
	case errors.Is(err, registry.ErrNotFound) && namesArtifact(child):
		return &no{code: "referrer", why: "its manifest is gone; it was an artifact of type " + short(child.ArtifactType)}, nil
	case err != nil:
		return childFailed(err)
	}
	if depth >= maxDepth && isIndex(m.Descriptor.MediaType) {
		return &no{code: "nesting", why: fmt.Sprintf("limit: indexes nested deeper than %d", maxDepth), gap: true}, nil
	}
	why, err := p.add(ctx, m, part.Platform, depth+1)
	if err != nil {
		return childFailed(err)
	}
	if why == nil && part.Platform == nil {
		part.Platform = p.platformFound(part.Digest)
	}
	return why, nil
}

// childFailed makes a gap of an error that is a fact about the child.
func childFailed(err error) (*no, error) {
	gap := func(why string) (*no, error) { return &no{code: "failed", why: why, gap: true}, nil }
	switch {
	case errors.Is(err, ErrMissingLayer):
		return gap("one of its layers is not in the repository")
	case errors.Is(err, registry.ErrNotFound):
		return gap("its manifest is not in the repository")
	case errors.Is(err, registry.ErrDigestMismatch):
		return gap("its manifest does not have its digest")
	case errors.Is(err, registry.ErrUnknownManifest):
		return gap("its manifest is of a kind that is not known")
	case errors.Is(err, registry.ErrTooLarge):
		return gap("its manifest is too large")
	case errors.Is(err, registry.ErrInvalidName):
		return gap("it names something that cannot be asked for")
	}
	return nil, err
}

// platformFound returns the platform that a planned part's config names.
func (p *planner) platformFound(digest string) *contracts.Platform {
	for _, img := range p.planned {
		if img.Image.Digest == digest {
			return img.Platform
		}
	}
	return nil
}

// selected says whether a platform is one of those asked for. One without a
// variant selects all variants.
func (p *planner) selected(have contracts.Platform) bool {
	if len(p.platforms) == 0 {
		return true
	}
	bare := have
	bare.Variant = ""
	for _, want := range p.platforms {
		if want == have.String() || want == bare.String() {
			return true
		}
	}
	return false
}

// fit makes the event data small enough, if that can be done: the
// instructions go first, then the diff ids, which layer reports hold too.
func fit(img *contracts.ImagePlanned) bool {
	small := func() bool {
		b, err := json.Marshal(img)
		return err == nil && len(b) <= maxEventData
	}
	if small() {
		return true
	}
	for i := range img.Layers {
		img.Layers[i].Instruction = ""
	}
	if small() {
		return true
	}
	for i := range img.Layers {
		img.Layers[i].DiffID = ""
	}
	return small()
}

// describe fills in what the config says: platform, diff ids, instructions. A
// config that cannot be had or read changes nothing else.
func (p *planner) describe(ctx context.Context, doc *document, img *contracts.ImagePlanned) error {
	c := doc.Config
	if c == nil || !contracts.ValidDigest(c.Digest.String()) || c.Size <= 0 || c.Size > MaxConfigBytes {
		return nil
	}
	b, err := p.src.ReadBlob(ctx, img.Image.Registry, img.Image.Repository, *c, MaxConfigBytes)
	if errors.Is(err, registry.ErrNotFound) || errors.Is(err, registry.ErrDigestMismatch) || errors.Is(err, registry.ErrTooLarge) {
		return nil
	}
	if err != nil {
		return err
	}
	var cfg config
	if json.Unmarshal(b, &cfg) != nil {
		return nil
	}
	if img.Platform == nil && cfg.OS != "" && cfg.Architecture != "" {
		img.Platform = &contracts.Platform{OS: short(cfg.OS), Architecture: short(cfg.Architecture), Variant: short(cfg.Variant)}
	}
	var instructions []string
	for _, h := range cfg.History {
		if !h.EmptyLayer {
			instructions = append(instructions, instruction(h.CreatedBy))
		}
	}
	for i := range img.Layers {
		if len(cfg.RootFS.DiffIDs) == len(img.Layers) && contracts.ValidDigest(cfg.RootFS.DiffIDs[i]) {
			img.Layers[i].DiffID = cfg.RootFS.DiffIDs[i]
		}
		if len(instructions) == len(img.Layers) {
			img.Layers[i].Instruction = instructions[i]
		}
	}
	return nil
}

// config is what is read of an image config (image-spec, config.md).
type config struct {
	OS           string `json:"os"`
	Architecture string `json:"architecture"`
	Variant      string `json:"variant"`
	RootFS       struct {
		DiffIDs []string `json:"diff_ids"`
	} `json:"rootfs"`
	History []struct {
		CreatedBy  string `json:"created_by"`
		EmptyLayer bool   `json:"empty_layer"`
	} `json:"history"`
}

// maxInstruction bounds a Dockerfile instruction, in bytes.
const maxInstruction = 200

// instruction returns the Dockerfile instruction in a history entry: on one
// line, without what the classic builder puts before it, cut between characters.
func instruction(createdBy string) string {
	s := strings.Join(strings.Fields(strings.ToValidUTF8(createdBy, "�")), " ")
	s = strings.TrimPrefix(s, "/bin/sh -c #(nop) ")
	return cut(s, maxInstruction)
}

// cut returns at most n bytes of s, ending between characters.
func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && s[n]&0xC0 == 0x80 { // a continuation byte of UTF-8
		n--
	}
	return s[:n]
}

// short bounds a word of a foreign document.
func short(s string) string { return cut(strings.ToValidUTF8(s, "�"), 100) }

func platformOf(p *ocispec.Platform) *contracts.Platform {
	if p == nil || p.OS == "" || p.Architecture == "" {
		return nil
	}
	return &contracts.Platform{OS: short(p.OS), Architecture: short(p.Architecture), Variant: short(p.Variant)}
}

func unknownPlatform(p *ocispec.Platform) bool {
	return p != nil && p.OS == "unknown" && p.Architecture == "unknown"
}

// document is a manifest or an index as far as it matters here.
type document struct {
	MediaType    string               `json:"mediaType"`
	ArtifactType string               `json:"artifactType"`
	Config       *ocispec.Descriptor  `json:"config"`
	Layers       []ocispec.Descriptor `json:"layers"`
	Manifests    []ocispec.Descriptor `json:"manifests"`
	Subject      *ocispec.Descriptor  `json:"subject"`
	index        bool
}

func parse(m registry.Manifest) (*document, *no) {
	switch m.Descriptor.MediaType {
	case registry.MediaTypeDockerSchema1, registry.MediaTypeDockerSchema1Signed:
		return nil, &no{code: "schema-1", why: "A Docker schema 1 manifest, which current runtimes do not run; push the image again.", gap: true}
	case "application/vnd.oci.artifact.manifest.v1+json":
		return nil, &no{code: "artifact", why: "An OCI artifact, which has no layers of an image."}
	}
	doc := &document{index: isIndex(m.Descriptor.MediaType)}
	if !doc.index && !isManifest(m.Descriptor.MediaType) {
		why := unknownManifest()
		return nil, &why
	}
	if err := json.Unmarshal(m.Body, doc); err != nil {
		return nil, &no{code: "invalid-manifest", why: "The manifest cannot be parsed.", gap: true}
	}
	// Read by one client as an index and by another as an image, it could show
	// each something else (CVE-2021-41190).
	if len(doc.Manifests) > 0 && (len(doc.Layers) > 0 || doc.Config != nil) {
		return nil, &no{code: "ambiguous-manifest", why: "The manifest is an index and an image at once.", gap: true}
	}
	if len(doc.Layers) > MaxLayers {
		return nil, &no{code: "too-many-layers", why: fmt.Sprintf("The image has %d layers; more than %d are not looked at.", len(doc.Layers), MaxLayers), gap: true}
	}
	for _, d := range append(doc.Layers, doc.Manifests...) {
		if d.Size < 0 {
			return nil, &no{code: "invalid-manifest", why: "The manifest names content of a negative size.", gap: true}
		}
	}
	return doc, nil
}

// unreadable says why a layer cannot be analysed, from its descriptor.
func unreadable(l ocispec.Descriptor) string {
	switch {
	case digest.Digest(l.Digest).Validate() != nil || !contracts.ValidDigest(l.Digest.String()):
		return "its digest is not sha256"
	case !imageLayer(l.MediaType):
		return "not a layer of an image: " + short(l.MediaType)
	case !readableLayer(l.MediaType):
		return "layers of media type " + short(l.MediaType) + " cannot be read"
	}
	return ""
}
