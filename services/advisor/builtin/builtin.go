// Package builtin holds facts about some well-known vulnerabilities and about
// the release lines of well-known servers: enough to show what Tidewaiter does
// without any download. It is no advisory database; who wants to rely on the
// result gives a snapshot of real advisories.
//
// The texts are our own; ids, ranges, scores and dates are facts published by
// the projects, CISA, FIRST and endoflife.date.
package builtin

import (
	"archive/zip"
	"bufio"
	"bytes"
	"context"
	"embed"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"time"

	"github.com/tidewaiter/tidewaiter/services/advisor/compile"
)

//go:embed data
var data embed.FS

// Write compiles the built-in advisories into a snapshot file at path. Its
// bytes are the same each time.
func Write(path string) error {
	dir, err := os.MkdirTemp("", "tidewaiter-builtin-")
	if err != nil {
		return fmt.Errorf("write built-in advisories: %w", err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	if err := Unpack(dir); err != nil {
		return fmt.Errorf("write built-in advisories: %w", err)
	}
	result, err := compile.Build(context.Background(), compile.Options{From: []string{dir}, Out: path})
	if err != nil {
		return fmt.Errorf("write built-in advisories: %w", err)
	}
	if len(result.Rejected) > 0 {
		return fmt.Errorf("write built-in advisories: %s: %s", result.Rejected[0].File, result.Rejected[0].Reason)
	}
	return nil
}

// Unpack writes the built-in advisories as their publishers would export them:
// an archive of OSV records, a KEV catalog, EPSS scores, release lines.
func Unpack(dir string) error {
	for _, folder := range []string{"osv", "kev", "epss", "eol"} {
		if err := os.MkdirAll(filepath.Join(dir, folder), 0o755); err != nil { //nolint:gosec // public facts
			return fmt.Errorf("unpack: %w", err)
		}
	}
	if err := writeArchive(filepath.Join(dir, "osv", "builtin.zip")); err != nil {
		return err
	}
	copies := map[string]string{"data/kev.json": "kev/kev.json", "data/epss.csv": "epss/epss.csv"}
	lines, err := fs.Glob(data, "data/eol/*.json")
	if err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	for _, file := range lines {
		copies[file] = "eol/" + path.Base(file)
	}
	for from, to := range copies {
		content, err := data.ReadFile(from)
		if err != nil {
			return fmt.Errorf("unpack: %w", err)
		}
		if err := os.WriteFile(filepath.Join(dir, filepath.FromSlash(to)), content, 0o644); err != nil { //nolint:gosec // public facts
			return fmt.Errorf("unpack: %w", err)
		}
	}
	return nil
}

// writeArchive makes the archive of OSV records, one file each.
func writeArchive(file string) error {
	content, err := data.ReadFile("data/advisories.jsonl")
	if err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	var packed bytes.Buffer
	z := zip.NewWriter(&packed)
	lines := bufio.NewScanner(bytes.NewReader(content))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var record struct {
			ID       string    `json:"id"`
			Modified time.Time `json:"modified"`
		}
		if err := json.Unmarshal(lines.Bytes(), &record); err != nil {
			return fmt.Errorf("unpack advisory: %w", err)
		}
		w, err := z.CreateHeader(&zip.FileHeader{Name: record.ID + ".json", Method: zip.Deflate, Modified: record.Modified})
		if err != nil {
			return fmt.Errorf("unpack advisory: %w", err)
		}
		if _, err := w.Write(lines.Bytes()); err != nil {
			return fmt.Errorf("unpack advisory: %w", err)
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("unpack advisories: %w", err)
	}
	if err := z.Close(); err != nil {
		return fmt.Errorf("unpack advisories: %w", err)
	}
	if err := os.WriteFile(file, packed.Bytes(), 0o644); err != nil { //nolint:gosec // public facts
		return fmt.Errorf("unpack advisories: %w", err)
	}
	return nil
}
