package layer

import (
	"archive/zip"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/google/osv-scalibr/extractor/filesystem"
	"github.com/google/osv-scalibr/extractor/filesystem/language/java/archive"

	"github.com/tidewaiter/tidewaiter/contracts"
)

const (
	// maxMembers bounds the members of one archive: archive/zip holds a few
	// hundred bytes of each.
	maxMembers = 200_000
	// nestedMemory bounds what one level of nesting holds in memory, above which
	// it goes to a temporary file of its own.
	nestedMemory = 8 << 20
	// minArchive is a little more than an archive of nothing.
	minArchive = 30
)

// memberHead begins each member's entry in the directory of a zip file
// (APPNOTE.TXT, 4.3.12).
var memberHead = []byte("PK\x01\x02")

// tooManyMembers counts them without believing what the archive says of itself.
func tooManyMembers(b *body) (bool, error) {
	if !b.spilled {
		return bytes.Count(b.mem, memberHead) > maxMembers, nil
	}
	buf := make([]byte, chunk)
	n, keep := 0, 0
	r := b.reader()
	for {
		m, err := r.Read(buf[keep:])
		n += bytes.Count(buf[:keep+m], memberHead)
		if err == io.EOF {
			return n > maxMembers, nil
		}
		if err != nil {
			return false, fmt.Errorf("%w: %w", errTemp, err)
		}
		tail := min(len(memberHead)-1, keep+m)
		keep = copy(buf, buf[keep+m-tail:keep+m])
	}
}

// java looks at an archive and those within it. The extractor looks at one
// level at a time: left alone it holds all nested archives in memory.
func (a *analysis) java(name string, b *body, depth int, left *int64, f *facts) error {
	gap := func(at, reason string) {
		if len(f.gaps) < maxGaps {
			f.gaps = append(f.gaps, contracts.Gap{Path: at, Reason: reason})
		}
	}
	if b.size < minArchive {
		return nil
	}
	many, err := tooManyMembers(b)
	if err != nil {
		return err
	}
	if many {
		gap(name, limit("more than %d members in an archive", maxMembers).Error())
		return nil
	}
	found, err := guarded(a.ctx, a.extractors.byKind[kindJava], &filesystem.ScanInput{
		FS: nothing{}, Path: name, Info: info{name: name, size: b.size, mode: 0o644}, Reader: b.reader(),
	})
	packages, _ := a.convert(kindJava, name, found)
	f.packages = append(f.packages, packages...)
	if err = withoutDepth(err); err != nil {
		gap(name, extractReason(err))
	}
	z, err := zip.NewReader(b, b.size)
	if err != nil {
		return nil //nolint:nilerr // the extractor said so already
	}
	for _, member := range z.File {
		if !archive.IsArchive(member.Name) || strings.HasSuffix(member.Name, ".jmod") {
			continue
		}
		at := name + "!/" + strings.TrimPrefix(member.Name, "/")
		switch {
		case a.ctx.Err() != nil:
			gap(name, "limit: time")
			return nil
		case len(at) > maxPath:
			gap(name, limit("path longer than %d bytes", maxPath).Error())
			continue
		case depth >= a.o.MaxDepth:
			gap(at, limit("archives nested deeper than %d", a.o.MaxDepth).Error())
			continue
		case member.UncompressedSize64 > uint64(max(*left, 0)):
			gap(at, limit("archives within one unpack to more than %d bytes", a.o.MaxNested).Error())
			continue
		}
		inner, err := a.unpack(member, depth)
		if errors.Is(err, errTemp) {
			return err
		}
		if err != nil {
			gap(at, reasonOf(err))
			continue
		}
		*left -= inner.size
		if err := a.java(at, inner, depth+1, left, f); err != nil {
			return err
		}
	}
	return nil
}

// unpack writes a member into the body of its level. archive/zip ends a member
// that is larger than it says.
func (a *analysis) unpack(member *zip.File, depth int) (*body, error) {
	for len(a.nested) < depth {
		a.nested = append(a.nested, &body{maxMemory: min(nestedMemory, a.o.MaxMemory), dir: a.o.TempDir})
	}
	b := a.nested[depth-1]
	r, err := member.Open()
	if err != nil {
		return nil, fmt.Errorf("open member: %w", err)
	}
	defer func() { _ = r.Close() }() // only read
	if err := b.reset(int64(min(member.UncompressedSize64, 1<<62))); err != nil {
		return nil, err
	}
	// archive/zip ends it at the size that was checked against what is left.
	if _, err := io.Copy(struct{ io.Writer }{b}, r); err != nil { // #nosec G110 -- bounded, see above
		return nil, fmt.Errorf("unpack member: %w", err)
	}
	return b, nil
}

// withoutDepth drops from the extractor's errors those that say that it was
// not allowed to go deeper, which is our own part.
func withoutDepth(err error) error {
	if err == nil {
		return nil
	}
	inner := errors.Unwrap(err)
	if list, ok := inner.(interface{ Errors() []error }); ok {
		var rest []error
		for _, e := range list.Errors() {
			if !depthError(e) {
				rest = append(rest, e)
			}
		}
		return errors.Join(rest...)
	}
	if depthError(err) {
		return nil
	}
	return err
}

// depthError recognises the extractor's error by its text: it has no sentinel.
func depthError(err error) bool { return strings.Contains(err.Error(), "reached max zip depth") }
