// Package compile makes an advisory snapshot from OSV archives, CISA's catalog
// of known exploited vulnerabilities, FIRST's EPSS scores and endoflife.date's
// release lines, as their publishers export them.
//
// OSV records are read into a lean struct of our own, not into the schema's
// protobuf binding: protojson refuses a whole record for one unknown enum
// value or a number where it wants a string, is several times slower, and keeps
// texts and references that a snapshot does not need.
package compile

import (
	"archive/zip"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/advisor/snapshot"
)

// Limits of what is read. Archives are trusted little more than layers.
const (
	// MaxEntries bounds the files in one archive.
	MaxEntries = 2_000_000
	// MaxEntryBytes bounds one file in an archive, uncompressed.
	MaxEntryBytes = 16 << 20
	// MaxArchiveBytes bounds all files of an archive, uncompressed.
	MaxArchiveBytes = 16 << 30
	// MaxFileBytes bounds a catalog, a table of scores or an end-of-life file, uncompressed.
	MaxFileBytes = 256 << 20
)

// ErrNoInput is returned when a source holds nothing that can be read.
var ErrNoInput = errors.New("no advisories found")

// Options says what to compile.
type Options struct {
	// From are the sources, each overlaid on those before: a folder, or one zip archive of OSV records.
	From []string
	// Out is the file to write; it is replaced as a whole.
	Out string
	// Sequence is the snapshot's sequence; nil: the newest `modified` of the
	// input in Unix seconds.
	Sequence *int64
}

// Build compiles a snapshot. Of each folder DIR it reads the archives DIR/*.zip,
// DIR/osv/*.zip and DIR/<Ecosystem>/all.zip, the newest catalog of DIR/kev, the
// newest day of DIR/epss and the release lines of DIR/eol. A *.changes.json
// beside an archive names the records that its publisher removed. A record
// that cannot be read is listed as rejected and left out. The same input gives
// a byte-identical file.
func Build(ctx context.Context, o Options) (contracts.AdvisoriesBuild, error) {
	b := builder{
		records:  map[string]*record{},
		content:  snapshot.Content{EPSS: map[string]float64{}, Products: map[string][]snapshot.Cycle{}},
		interned: map[string]string{},
	}
	if len(o.From) == 0 {
		return contracts.AdvisoriesBuild{}, fmt.Errorf("compile advisories: no source given: %w", ErrNoInput)
	}
	for layer, from := range o.From {
		b.layer = layer
		if err := b.source(ctx, from); err != nil {
			return contracts.AdvisoriesBuild{}, fmt.Errorf("compile advisories from %s: %w", from, err)
		}
	}
	return b.write(o)
}

type builder struct {
	layer    int // number of the source
	records  map[string]*record
	content  snapshot.Content
	interned map[string]string
	rejected []contracts.Rejected
}

// record is an advisory as it was read, and where from.
type record struct {
	layer     int
	file      string
	withdrawn bool
	plausible int64 // `modified`, if its archive is not older than it
	snapshot.Advisory
}

func (b *builder) reject(file, reason string) {
	b.rejected = append(b.rejected, contracts.Rejected{File: file, Reason: reason})
}

func (b *builder) source(ctx context.Context, from string) error {
	info, err := os.Stat(from)
	if err != nil {
		return fmt.Errorf("look at the source: %w", err)
	}
	if !info.IsDir() {
		return b.archive(ctx, from, filepath.Base(from))
	}
	archives, err := findArchives(from)
	if err != nil {
		return err
	}
	for _, path := range archives {
		if err := b.changes(path); err != nil {
			return err
		}
	}
	for _, path := range archives {
		if err := b.archive(ctx, path, relative(from, path)); err != nil {
			return err
		}
	}
	found := len(archives) > 0
	for _, part := range []struct {
		folder string
		read   func(folder string) (bool, error)
	}{{"kev", b.kev}, {"epss", b.epss}, {"eol", b.eol}} {
		ok, err := part.read(filepath.Join(from, part.folder))
		if err != nil {
			return err
		}
		found = found || ok
	}
	if !found {
		return ErrNoInput
	}
	return nil
}

func relative(from, path string) string {
	if rel, err := filepath.Rel(from, path); err == nil {
		return filepath.ToSlash(rel)
	}
	return path
}

// findArchives lists the OSV archives of a folder, sorted.
func findArchives(dir string) ([]string, error) {
	var found []string
	for _, pattern := range []string{"*.zip", "osv/*.zip", "*/all.zip", "osv/*/all.zip"} {
		paths, err := filepath.Glob(filepath.Join(escapeGlob(dir), filepath.FromSlash(pattern)))
		if err != nil {
			return nil, fmt.Errorf("list archives: %w", err)
		}
		for _, p := range paths {
			parent := filepath.Base(filepath.Dir(p))
			if filepath.Base(p) == "all.zip" && (parent == "eol" || parent == "updates") {
				continue
			}
			found = append(found, p)
		}
	}
	slices.Sort(found)
	return slices.Compact(found), nil
}

func escapeGlob(dir string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(dir)
}

// archive reads every record of one zip file.
func (b *builder) archive(ctx context.Context, path, name string) error {
	z, err := zip.OpenReader(path)
	if errors.Is(err, zip.ErrFormat) || errors.Is(err, io.ErrUnexpectedEOF) {
		b.reject(name, "not a zip archive: "+err.Error())
		return nil
	}
	if err != nil {
		return fmt.Errorf("open archive: %w", err)
	}
	defer func() { _ = z.Close() }()
	if len(z.File) > MaxEntries {
		b.reject(name, fmt.Sprintf("more than %d files in the archive", MaxEntries))
		return nil
	}
	var total int64
	for _, f := range z.File {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("read archive %s: %w", name, err)
		}
		if f.FileInfo().IsDir() || !strings.HasSuffix(f.Name, ".json") {
			continue
		}
		file := name + "/" + f.Name
		content, err := readEntry(f)
		if err != nil {
			b.reject(file, err.Error())
			continue
		}
		if total += int64(len(content)); total > MaxArchiveBytes {
			b.reject(name, fmt.Sprintf("more than %d bytes in the archive; the rest is left out", int64(MaxArchiveBytes)))
			return nil
		}
		b.record(file, content, f.Modified)
	}
	return nil
}

func readEntry(f *zip.File) ([]byte, error) {
	if f.UncompressedSize64 > MaxEntryBytes {
		return nil, fmt.Errorf("more than %d bytes", MaxEntryBytes)
	}
	r, err := f.Open()
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	defer func() { _ = r.Close() }()
	content := make([]byte, 0, f.UncompressedSize64+1)
	for {
		n, err := r.Read(content[len(content):cap(content)])
		content = content[:len(content)+n]
		switch {
		case errors.Is(err, io.EOF):
			return content, nil
		case err != nil:
			return nil, fmt.Errorf("read: %w", err)
		case len(content) == cap(content):
			return nil, errors.New("longer than the archive says")
		}
	}
}

// record adds one OSV record. entryTime is when its archive says it was written.
func (b *builder) record(file string, content []byte, entryTime time.Time) {
	r, err := b.parse(content)
	if err != nil {
		b.reject(file, err.Error())
		return
	}
	r.file, r.layer = file, b.layer
	// A date in the future of the archive it came in is a slip of the pen; it must not age the whole snapshot.
	r.plausible = r.Modified
	if entryTime.Year() > 1980 && r.Modified > entryTime.Add(24*time.Hour).Unix() {
		r.plausible = 0
	}
	old := b.records[r.ID]
	if old != nil && old.layer == r.layer && old.Modified >= r.Modified {
		return // the same record in two archives of one source: the newer one counts
	}
	b.records[r.ID] = r
}

// write makes the file out of everything that was read.
func (b *builder) write(o Options) (contracts.AdvisoriesBuild, error) {
	result := contracts.AdvisoriesBuild{Ecosystems: map[string]int{}}
	c := &b.content
	files := make(map[string]string, len(b.records))
	c.Sequence = -1 << 63
	for _, r := range b.records {
		c.Sequence = max(c.Sequence, r.Modified)
		c.Newest = max(c.Newest, r.plausible)
		if r.withdrawn {
			c.Withdrawn++
			continue
		}
		files[r.ID] = r.file
		c.Advisories = append(c.Advisories, r.Advisory)
		for eco := range ecosystemsOf(r) {
			result.Ecosystems[eco]++
		}
	}
	if len(b.records) == 0 || c.Sequence < 0 {
		c.Sequence = 0
	}
	if o.Sequence != nil {
		c.Sequence = *o.Sequence
	}
	if err := writeFile(o.Out, c, func(id, reason string) { b.reject(files[id], reason) }); err != nil {
		return contracts.AdvisoriesBuild{}, err
	}
	s, err := snapshot.Open(o.Out)
	if err != nil {
		return contracts.AdvisoriesBuild{}, fmt.Errorf("read back what was written: %w", err)
	}
	defer func() { _ = s.Close() }()
	slices.SortFunc(b.rejected, func(x, y contracts.Rejected) int {
		return cmp.Or(cmp.Compare(x.File, y.File), cmp.Compare(x.Reason, y.Reason))
	})
	stats := s.Stats()
	result.Snapshot, result.Sequence = s.Digest(), s.Sequence()
	result.Records, result.Withdrawn = stats.Records, stats.Withdrawn
	result.KEV, result.EPSS, result.Products = stats.KEV, stats.EPSS, stats.Products
	result.Rejected = append([]contracts.Rejected{}, slices.Compact(b.rejected)...)
	return result, nil
}

// ecosystemsOf returns the base ecosystems that a record is about.
func ecosystemsOf(r *record) map[string]bool {
	found := map[string]bool{}
	for _, a := range r.Affected {
		base, _ := snapshot.Split(a.Ecosystem)
		found[base] = true
	}
	return found
}

// writeFile writes the snapshot beside its place and renames it over, so that
// who has the old one mapped keeps it.
func writeFile(path string, c *snapshot.Content, reject func(id, reason string)) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("create snapshot: %w", err)
	}
	defer func() { _ = os.Remove(f.Name()) }() // gone already when all went well
	if err := snapshot.Encode(f, c, reject); err != nil {
		_ = f.Close()
		return fmt.Errorf("write snapshot: %w", err)
	}
	if err := errors.Join(f.Chmod(0o644), f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("write snapshot: %w", err)
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return fmt.Errorf("put snapshot in its place: %w", err)
	}
	return nil
}

// isAbsent says whether err means that a file or folder is not there.
func isAbsent(err error) bool { return errors.Is(err, fs.ErrNotExist) }
