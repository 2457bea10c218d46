package compile

import (
	"archive/zip"
	"bytes"
	"compress/gzip"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/tidewaiter/tidewaiter/services/advisor/snapshot"
)

// errTooBig is returned for a file over MaxFileBytes.
var errTooBig = fmt.Errorf("more than %d bytes", MaxFileBytes)

// input is one file of a folder, unpacked.
type input struct {
	name    string
	content []byte
}

// readFolder returns the files of a folder, sorted by name, gzip and zip
// unpacked; nothing where the folder is not there. What cannot be read is rejected.
func (b *builder) readFolder(folder string) ([]input, error) {
	entries, err := os.ReadDir(folder)
	if isAbsent(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", filepath.Base(folder), err)
	}
	var files []input
	for _, e := range entries {
		if !e.Type().IsRegular() {
			continue
		}
		name := filepath.Base(folder) + "/" + e.Name()
		unpacked, err := readFile(filepath.Join(folder, e.Name()), name)
		if err != nil {
			b.reject(name, err.Error())
			continue
		}
		files = append(files, unpacked...)
	}
	return files, nil
}

func readFile(file, name string) ([]input, error) {
	if strings.HasSuffix(file, ".zip") {
		return readZip(file, name)
	}
	f, err := os.Open(file) //nolint:gosec // the folder is what the user asked to compile
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	defer func() { _ = f.Close() }()
	var r io.Reader = f
	if strings.HasSuffix(file, ".gz") {
		z, err := gzip.NewReader(f)
		if err != nil {
			return nil, fmt.Errorf("gunzip: %w", err)
		}
		r = z
	}
	content, err := readLimited(r)
	if err != nil {
		return nil, err
	}
	return []input{{strings.TrimSuffix(name, ".gz"), content}}, nil
}

func readLimited(r io.Reader) ([]byte, error) {
	content, err := io.ReadAll(io.LimitReader(r, MaxFileBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read: %w", err)
	}
	if len(content) > MaxFileBytes {
		return nil, errTooBig
	}
	return content, nil
}

func readZip(file, name string) ([]input, error) {
	z, err := zip.OpenReader(file)
	if err != nil {
		return nil, fmt.Errorf("open archive: %w", err)
	}
	defer func() { _ = z.Close() }()
	var files []input
	total := 0
	for _, f := range z.File {
		if f.FileInfo().IsDir() {
			continue
		}
		content, err := readEntry(f)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.Name, err)
		}
		if total += len(content); total > MaxFileBytes {
			return nil, errTooBig
		}
		files = append(files, input{name + "/" + f.Name, content})
	}
	slices.SortFunc(files, func(a, b input) int { return strings.Compare(a.name, b.name) })
	return files, nil
}

// kev reads the newest catalog of CISA's known exploited vulnerabilities.
func (b *builder) kev(folder string) (bool, error) {
	files, err := b.readFolder(folder)
	if err != nil {
		return false, err
	}
	type catalog struct {
		CatalogVersion  string `json:"catalogVersion"`
		DateReleased    string `json:"dateReleased"`
		Vulnerabilities []struct {
			CVE string `json:"cveID"`
		} `json:"vulnerabilities"`
	}
	var newest *catalog
	for _, f := range files {
		if !strings.HasSuffix(f.name, ".json") {
			continue
		}
		var c catalog
		if err := json.Unmarshal(f.content, &c); err != nil {
			b.reject(f.name, "not a KEV catalog: "+err.Error())
			continue
		}
		if len(c.Vulnerabilities) == 0 {
			b.reject(f.name, "not a KEV catalog: it lists nothing")
			continue
		}
		if newest == nil || c.DateReleased > newest.DateReleased {
			newest = &c
		}
	}
	if newest == nil {
		return false, nil
	}
	b.content.KEV = nil
	for _, v := range newest.Vulnerabilities {
		if v.CVE != "" {
			b.content.KEV = append(b.content.KEV, v.CVE)
		}
	}
	return true, nil
}

var scoreDate = regexp.MustCompile(`score_date:(\d{4}-\d{2}-\d{2}[^,\s]*)`)

// epss reads the newest day of FIRST's exploit prediction scores.
func (b *builder) epss(folder string) (bool, error) {
	files, err := b.readFolder(folder)
	if err != nil {
		return false, err
	}
	var scores map[string]float64
	newest := ""
	for _, f := range files {
		if !strings.HasSuffix(f.name, ".csv") {
			continue
		}
		day, table, err := readScores(f.content)
		if err != nil {
			b.reject(f.name, "not a table of EPSS scores: "+err.Error())
			continue
		}
		if scores == nil || day > newest {
			scores, newest = table, day
		}
	}
	if scores == nil {
		return false, nil
	}
	b.content.EPSS = scores
	return true, nil
}

// readScores reads FIRST's daily file: a comment with the day, then cve,epss,percentile.
func readScores(content []byte) (day string, scores map[string]float64, err error) {
	if first, _, ok := bytes.Cut(content, []byte("\n")); ok && bytes.HasPrefix(first, []byte("#")) {
		if m := scoreDate.FindSubmatch(first); m != nil {
			day = string(m[1])
		}
	}
	r := csv.NewReader(bytes.NewReader(content))
	r.Comment, r.FieldsPerRecord, r.ReuseRecord = '#', -1, true
	scores = map[string]float64{}
	for {
		row, err := r.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return "", nil, fmt.Errorf("read row: %w", err)
		}
		if len(row) < 2 || !strings.HasPrefix(row[0], "CVE-") {
			continue
		}
		score, err := strconv.ParseFloat(row[1], 64)
		if err != nil || !(score >= 0 && score <= 1) {
			return "", nil, fmt.Errorf("score of %s: %q is not between 0 and 1", row[0], row[1])
		}
		scores[strings.Clone(row[0])] = score
	}
	if len(scores) == 0 {
		return "", nil, errors.New("no scores")
	}
	return day, scores, nil
}

// eol reads release lines: files named <product>.json, each an array of cycles
// (endoflife.date, API v0).
func (b *builder) eol(folder string) (bool, error) {
	files, err := b.readFolder(folder)
	if err != nil {
		return false, err
	}
	found := false
	for _, f := range files {
		product, isJSON := strings.CutSuffix(path.Base(f.name), ".json")
		if !isJSON || product == "all" || product == "identifiers" {
			continue
		}
		cycles, err := readCycles(f.content)
		if err != nil {
			b.reject(f.name, "not release lines: "+err.Error())
			continue
		}
		b.content.Products[product] = cycles
		found = true
	}
	return found, nil
}

func readCycles(content []byte) ([]snapshot.Cycle, error) {
	var list []struct {
		Cycle         any    `json:"cycle"`
		Codename      string `json:"codename"`
		ReleaseDate   string `json:"releaseDate"`
		EOL           any    `json:"eol"`
		Latest        any    `json:"latest"`
		LatestRelease string `json:"latestReleaseDate"`
		LTS           any    `json:"lts"`
		Support       any    `json:"support"`
	}
	if err := json.Unmarshal(content, &list); err != nil {
		return nil, fmt.Errorf("decode: %w", err)
	}
	cycles := make([]snapshot.Cycle, 0, len(list))
	for _, c := range list {
		name := text(c.Cycle)
		if name == "" {
			return nil, errors.New("a line without a name")
		}
		cycles = append(cycles, snapshot.Cycle{
			Name: name, Released: c.ReleaseDate, EOL: text(c.EOL), Latest: text(c.Latest), LatestRelease: c.LatestRelease,
			LTS: text(c.LTS), Support: text(c.Support), Codename: c.Codename,
		})
	}
	if len(cycles) == 0 {
		return nil, errors.New("no lines")
	}
	return cycles, nil
}

// text writes the dates, booleans and numbers that the API mixes as text.
func text(v any) string {
	switch v := v.(type) {
	case string:
		return v
	case bool:
		return strconv.FormatBool(v)
	case float64:
		return strconv.FormatFloat(v, 'f', -1, 64)
	default:
		return ""
	}
}

// changes drops what the publisher of an archive removed since the source
// before: the ids in <archive>.changes.json.
func (b *builder) changes(archive string) error {
	file := strings.TrimSuffix(archive, ".zip") + ".changes.json"
	content, err := os.ReadFile(file) //nolint:gosec // beside an archive of the folder that the user named
	if isAbsent(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read changes: %w", err)
	}
	var c struct {
		Removed []string `json:"removed"`
	}
	if err := json.Unmarshal(content, &c); err != nil {
		b.reject(filepath.Base(file), "not a list of changes: "+err.Error())
		return nil
	}
	for _, id := range c.Removed {
		delete(b.records, id)
	}
	return nil
}
