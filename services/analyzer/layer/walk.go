package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/analyzer/classify"
)

const (
	// maxPath bounds a path (Linux, PATH_MAX).
	maxPath = 4096
	// maxText bounds the small files that are parsed as a whole.
	maxText = 64 << 20
)

// facts are what one file of the layer gave.
type facts struct {
	kind     kind
	packages []contracts.LayerPackage
	database *contracts.PackageDatabase
	release  *contracts.OSRelease
	servers  []classify.Server
	gaps     []contracts.Gap
}

// analysis is the state of one Analyze.
type analysis struct {
	o          Options
	ctx        context.Context //nolint:containedctx // of this one analysis, which ends before Analyze returns
	report     *contracts.LayerReport
	deadline   time.Time
	stream     *stream
	body       *body
	extractors *extractors
	nested     []*body // by depth of archives within archives
	scratch    []byte

	files    map[string]*facts // by clean path
	replaced map[string]struct{}
	evidence map[string]struct{} // paths that a classify.Server may need
	symlinks map[string]string   // of os-release files and databases
	white    map[string]struct{}
	opaque   map[string]struct{}
	gaps     []contracts.Gap
	dropped  int // gaps beyond maxGaps
}

// gap records something that was not looked at.
func (a *analysis) gap(name, reason string) {
	if len(a.gaps) >= maxGaps {
		a.dropped++
		return
	}
	a.gaps = append(a.gaps, contracts.Gap{Path: clip(name), Reason: reason})
}

// walk reads the archive to its end. An error is the layer's, the source's or
// errTemp.
func (a *analysis) walk(tr *tar.Reader) error {
	for {
		h, err := tr.Next()
		if err == io.EOF { // archive/tar returns it bare
			return nil
		}
		if err != nil {
			return fmt.Errorf("tar: %w", err)
		}
		a.report.Entries++
		if a.report.Entries > a.o.MaxEntries {
			a.report.Entries = a.o.MaxEntries
			return limit("more than %d entries", a.o.MaxEntries)
		}
		if err := a.entry(tr, h); err != nil {
			return err
		}
	}
}

// clean returns the path of an entry relative to the root, or why it has none.
func clean(name string) (string, error) {
	if len(name) > maxPath {
		return "", limit("path longer than %d bytes", maxPath)
	}
	if strings.IndexByte(name, 0) >= 0 {
		return "", errors.New("path holds NUL")
	}
	for rest := name; rest != ""; {
		var part string
		part, rest, _ = strings.Cut(rest, "/")
		if part == ".." {
			return "", errors.New("path leaves the layer")
		}
	}
	return strings.TrimPrefix(path.Clean("/"+name), "/"), nil
}

func (a *analysis) entry(tr *tar.Reader, h *tar.Header) error {
	name, err := clean(h.Name)
	if err != nil {
		a.gap(h.Name, reasonOf(err))
		return nil
	}
	if name == "" {
		return nil // the root itself
	}
	dir, base := path.Split(name)
	if strings.HasPrefix(base, ".wh.") {
		a.whiteout(strings.TrimSuffix(dir, "/"), base)
		return nil
	}
	// The last entry of a name is the one that counts.
	delete(a.files, name)
	delete(a.symlinks, name)

	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont:
		return a.regular(tr, h, name, base)
	case tar.TypeLink:
		a.hardlink(h, name)
	case tar.TypeSymlink:
		if couldHold(name, base) {
			a.replaced[name] = struct{}{}
		}
		if isRelease(name) || databaseKind(name) != "" {
			a.symlinks[name] = h.Linkname
		}
		a.note(name)
	case tar.TypeDir:
	default:
		if couldHold(name, base) {
			a.replaced[name] = struct{}{}
		}
	}
	return nil
}

// note remembers a path that proves what another file is.
func (a *analysis) note(name string) {
	for _, suffix := range []string{"bin/elasticsearch", "config/elasticsearch.yml", "bin/catalina.sh", "bin/bootstrap.jar", "lib/catalina.jar"} {
		if strings.HasSuffix(name, suffix) {
			a.evidence[name] = struct{}{}
		}
	}
	// Elasticsearch's modules folder.
	if i := strings.Index(name, "modules/"); i >= 0 && (i == 0 || name[i-1] == '/') {
		a.evidence[name[:i+len("modules/")]] = struct{}{}
	}
}

// whiteout records what the layer hides of lower ones (image-spec, layer.md,
// "Whiteouts"). Other names with the prefix ".wh..wh." are aufs' own.
func (a *analysis) whiteout(dir, base string) {
	switch {
	case base == ".wh..wh..opq":
		a.opaque[dir] = struct{}{}
	case strings.HasPrefix(base, ".wh..wh."):
	default:
		hidden := strings.TrimPrefix(base, ".wh.")
		if hidden == "" || hidden == "." || hidden == ".." {
			a.gap(path.Join(dir, base), "corrupt: whiteout of nothing")
			return
		}
		a.white[path.Join(dir, hidden)] = struct{}{}
	}
}

// regular looks at a file if some extractor or the classifier wants it.
func (a *analysis) regular(tr *tar.Reader, h *tar.Header, name, base string) error {
	a.note(name)
	k := kindOf(name, base)
	class := classify.Wants(name)
	executable := k == kindNone && (class == classify.None || class == classify.Binary)
	if executable {
		if class == classify.None && !couldBeExecutable(base, h.Mode) {
			return nil
		}
	}
	if k != kindNone || class != classify.None || h.Mode&0o111 != 0 {
		a.replaced[name] = struct{}{}
	}
	f := &facts{kind: k}
	if executable {
		f.kind = kindExecutable
		return a.executable(tr, h, name, f, class)
	}
	if k == kindNone && class == classify.Text {
		f.kind = kindServer
		if h.Size > classify.MaxText {
			return nil
		}
	}
	if k == kindNone && class == classify.Archive {
		f.kind = kindServer
	}
	ok, err := a.load(tr, h, name, nil)
	if err != nil || !ok {
		return err
	}
	a.files[name] = f
	if err := a.extract(name, f); err != nil {
		return err
	}
	return a.classify(name, class, f)
}

// load reads the present file into the body; false means it is too large,
// which is a gap. head is what was read of it already.
func (a *analysis) load(tr *tar.Reader, h *tar.Header, name string, head []byte, see ...io.Writer) (bool, error) {
	if h.Size > a.o.MaxFile {
		a.gap(name, limit("file larger than %d bytes", a.o.MaxFile).Error())
		return false, nil
	}
	if err := a.body.reset(h.Size); err != nil {
		return false, err
	}
	for _, w := range see {
		_, _ = w.Write(head) // scanners never fail
	}
	if _, err := a.body.Write(head); err != nil {
		return false, err
	}
	if a.scratch == nil {
		a.scratch = make([]byte, chunk)
	}
	for {
		n, err := tr.Read(a.scratch)
		for _, w := range see {
			_, _ = w.Write(a.scratch[:n])
		}
		if _, werr := a.body.Write(a.scratch[:n]); werr != nil {
			return false, werr
		}
		if err == io.EOF { // archive/tar returns it bare
			return true, nil
		}
		if err != nil {
			a.gap(name, reasonOf(err))
			return false, fmt.Errorf("tar: %w", err)
		}
	}
}

// goMark begins the build information in executables of Go (debug/buildinfo).
var goMark = []byte("\xff Go buildinf:")

// goFinder looks for goMark in a stream.
type goFinder struct {
	tail  []byte
	found bool
}

func (g *goFinder) Write(p []byte) (int, error) {
	if g.found {
		return len(p), nil
	}
	keep := len(goMark) - 1
	border := append(g.tail, p[:min(keep, len(p))]...)
	g.found = bytes.Contains(border, goMark) || bytes.Contains(p, goMark)
	if len(p) >= keep {
		g.tail = append(g.tail[:0], p[len(p)-keep:]...)
	} else {
		g.tail = append(g.tail[:0], border[max(0, len(border)-keep):]...)
	}
	return len(p), nil
}

// executable looks for the build information of Go and for server software.
func (a *analysis) executable(tr *tar.Reader, h *tar.Header, name string, f *facts, class classify.Kind) error {
	var head [4]byte
	n, err := io.ReadFull(tr, head[:])
	if err == io.EOF || errors.Is(err, io.ErrUnexpectedEOF) && int64(n) == h.Size { //nolint:errorlint // archive/tar returns it bare
		return nil // too short to be one
	}
	if err != nil {
		a.gap(name, reasonOf(err))
		return fmt.Errorf("tar: %w", err)
	}
	if !classify.Executable(head[:]) && !bytes.Equal(head[:], []byte{0xcf, 0xfa, 0xed, 0xfe}) {
		return nil
	}
	a.replaced[name] = struct{}{}
	mark := &goFinder{}
	see := []io.Writer{mark}
	var scanner *classify.Scanner
	if class == classify.Binary {
		if scanner = classify.NewScanner(name); scanner != nil {
			see = append(see, scanner)
		}
	}
	ok, err := a.load(tr, h, name, head[:], see...)
	if err != nil || !ok {
		return err
	}
	a.files[name] = f
	if mark.found {
		if err := a.extract(name, f); err != nil {
			return err
		}
	}
	if scanner != nil {
		if s, ok := scanner.Server(); ok {
			f.servers = append(f.servers, s)
		}
	}
	if len(f.packages) == 0 && len(f.servers) == 0 && len(f.gaps) == 0 {
		// Nothing in it; that it was looked at is all a hard link must know.
		a.files[name] = looked
	}
	return nil
}

// looked stands for every executable that holds nothing of interest.
var looked = &facts{kind: kindExecutable}

// classify looks at a text or an archive for server software.
func (a *analysis) classify(name string, class classify.Kind, f *facts) error {
	switch class {
	case classify.Text:
		content, err := a.body.bytes(classify.MaxText)
		if err != nil {
			return nil //nolint:nilerr // too large to be the file it is named like
		}
		if s, ok := classify.FromText(name, content); ok {
			f.servers = append(f.servers, s)
		}
	case classify.Archive:
		if many, err := tooManyMembers(a.body); err != nil || many {
			return err // the extractor, or nobody, will have said so
		}
		s, ok, err := classify.FromArchive(name, a.body, a.body.size)
		if err != nil {
			if len(f.gaps) == 0 { // else the extractor said so already
				f.gaps = append(f.gaps, contracts.Gap{Path: name, Reason: reasonOf(err)})
			}
			return nil
		}
		if ok {
			f.servers = append(f.servers, s)
		}
	}
	return nil
}

// hardlink gives a path the facts of the file it is linked to, which stands
// before it in the archive.
func (a *analysis) hardlink(h *tar.Header, name string) {
	base := path.Base(name)
	a.note(name)
	k, class := kindOf(name, base), classify.Wants(name)
	if couldHold(name, base) {
		a.replaced[name] = struct{}{}
	}
	target, err := clean(h.Linkname)
	if err != nil {
		if k != kindNone || class != classify.None {
			a.gap(name, "corrupt: hard link out of the layer")
		}
		return
	}
	if target == name {
		return
	}
	f, ok := a.files[target]
	if !ok {
		if k != kindNone || class == classify.Archive {
			a.gap(name, "unresolved: hard link to "+clip(target)+", whose content was not kept")
		}
		return
	}
	if f.kind != k && k != kindNone {
		a.gap(name, "unresolved: hard link to "+clip(target)+", which was looked at as something else")
		return
	}
	if k == kindNone && f.kind != kindExecutable {
		return
	}
	a.files[name] = f.moved(target, name)
}

// moved returns the facts of the same file under another path.
func (f *facts) moved(from, to string) *facts {
	if f == looked {
		return f
	}
	m := &facts{kind: f.kind, servers: slices.Clone(f.servers)}
	for _, p := range f.packages {
		p.Paths = slices.Clone(p.Paths)
		for i := range p.Paths {
			if rest, ok := strings.CutPrefix(p.Paths[i], from); ok {
				p.Paths[i] = to + rest
			}
		}
		m.packages = append(m.packages, p)
	}
	if f.database != nil {
		d := *f.database
		d.Path = to
		m.database = &d
	}
	if f.release != nil {
		r := *f.release
		r.Path = to
		m.release = &r
	}
	for _, g := range f.gaps {
		g.Path = to
		m.gaps = append(m.gaps, g)
	}
	return m
}

// info is the fs.FileInfo of the present file for extractors.
type info struct {
	name string
	size int64
	mode fs.FileMode
}

func (i info) Name() string       { return path.Base(i.name) }
func (i info) Size() int64        { return i.size }
func (i info) Mode() fs.FileMode  { return i.mode }
func (i info) ModTime() time.Time { return time.Time{} }
func (i info) IsDir() bool        { return false }
func (i info) Sys() any           { return nil }

// nothing is a file system without files: extractors that look around for
// os-release find none, as what they would add is decided when layers are merged.
type nothing struct{}

func (nothing) Open(name string) (fs.File, error) {
	return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
}

func (nothing) ReadDir(name string) ([]fs.DirEntry, error) {
	return nil, &fs.PathError{Op: "readdir", Path: name, Err: fs.ErrNotExist}
}

func (nothing) Stat(name string) (fs.FileInfo, error) {
	return nil, &fs.PathError{Op: "stat", Path: name, Err: fs.ErrNotExist}
}
