package advisor

import (
	"archive/zip"
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/services/advisor/compile"
	"github.com/tidewaiter/tidewaiter/services/advisor/snapshot"
)

const (
	// MaxDownload bounds one downloaded file, bytes.
	MaxDownload = 4 << 30
	// downloadTimeout bounds one download.
	downloadTimeout = 30 * time.Minute
	// maxRedirects bounds the redirects of one download.
	maxRedirects = 3
)

var (
	// ErrDownload is returned for an answer that cannot be used.
	ErrDownload = errors.New("download failed")
	// ErrRedirect is returned for a redirect to a host that is not configured.
	ErrRedirect = errors.New("redirect to a host that is not configured")
)

// sources are what snapshots are compiled from.
type sources struct {
	cfg    Config
	db     *store.DB
	log    *slog.Logger
	client *http.Client
	limit  int64
}

func newSources(cfg Config, db *store.DB, log *slog.Logger) *sources {
	hosts := map[string]bool{}
	for _, s := range append([]string{cfg.KEV, cfg.EPSS, cfg.EOL}, cfg.From...) {
		if u, err := url.Parse(s); err == nil && isURL(s) {
			hosts[u.Scheme+"://"+u.Host] = true
		}
	}
	return &sources{cfg: cfg, db: db, log: log, limit: MaxDownload, client: &http.Client{
		Timeout: downloadTimeout,
		Transport: &http.Transport{
			Proxy: http.ProxyFromEnvironment, ResponseHeaderTimeout: time.Minute, TLSHandshakeTimeout: 15 * time.Second,
			MaxResponseHeaderBytes: 64 << 10, IdleConnTimeout: time.Minute,
			DisableCompression: true, // sizes are those of the files
		},
		CheckRedirect: func(req *http.Request, via []*http.Request) error {
			if len(via) > maxRedirects || !hosts[req.URL.Scheme+"://"+req.URL.Host] {
				return ErrRedirect
			}
			return nil
		},
	}}
}

// remote is one file that is downloaded.
type remote struct {
	url, file string
	optional  bool // whether it need not exist
}

func (s *sources) folder(source string) string {
	sum := sha256.Sum256([]byte(source))
	return filepath.Join(s.cfg.Work, "sources", hex.EncodeToString(sum[:8]))
}

// tables is the folder of KEV, EPSS and end-of-life data with URLs of their own.
func (s *sources) tables() string { return filepath.Join(s.cfg.Work, "sources", "tables") }

func (s *sources) remotes() []remote {
	var all []remote
	for _, from := range s.cfg.From {
		if !isURL(from) {
			continue
		}
		for _, ecosystem := range s.cfg.Ecosystems {
			all = append(all, remote{
				url:      strings.TrimSuffix(from, "/") + "/" + url.PathEscape(ecosystem) + "/all.zip",
				file:     filepath.Join(s.folder(from), "osv", ecosystem, "all.zip"),
				optional: true,
			})
		}
	}
	for _, t := range []struct{ url, file string }{
		{s.cfg.KEV, "kev/catalog.json"}, {s.cfg.EPSS, "epss/scores.csv.gz"}, {s.cfg.EOL, "eol/products.zip"},
	} {
		if t.url != "" {
			all = append(all, remote{url: t.url, file: filepath.Join(s.tables(), filepath.FromSlash(t.file))})
		}
	}
	return all
}

// refresh downloads what changed and returns a text that says what is there
// now. A download that fails leaves the file from before in use; without any
// the error is returned, so that no snapshot lacks what it should have.
func (s *sources) refresh(ctx context.Context) (string, error) {
	var problems []error
	for _, r := range s.remotes() {
		err := s.download(ctx, r)
		if err == nil {
			continue
		}
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
		if _, there := os.Stat(r.file); there == nil {
			s.log.WarnContext(ctx, "advisories could not be downloaded, those from before are used", "url", run.RedactURL(r.url), "error", err)
			continue
		}
		problems = append(problems, fmt.Errorf("%s: %w", run.RedactURL(r.url), err))
	}
	if err := errors.Join(problems...); err != nil {
		return "", err
	}
	h := sha256.New()
	for _, from := range s.local() {
		if err := describe(h, from); err != nil {
			return "", err
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// local returns the folders and files to compile.
func (s *sources) local() []string {
	var all []string
	for _, from := range s.cfg.From {
		if isURL(from) {
			from = s.folder(from)
		}
		all = append(all, from)
	}
	if _, err := os.Stat(s.tables()); err == nil {
		all = append(all, s.tables())
	}
	return all
}

// describe writes names, sizes and times of the files that compiling reads.
func describe(w io.Writer, from string) error {
	const depth = 3 // osv/<Ecosystem>/all.zip
	from, err := filepath.EvalSymlinks(from)
	if err != nil {
		return fmt.Errorf("look at advisories: %w", err)
	}
	err = filepath.WalkDir(from, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if rel, _ := filepath.Rel(from, name); strings.Count(rel, string(filepath.Separator)) >= depth {
				return filepath.SkipDir
			}
			return nil
		}
		info, err := os.Stat(name)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(w, name, info.Size(), info.ModTime().UnixNano())
		return err
	})
	if err != nil {
		return fmt.Errorf("look at advisories: %w", err)
	}
	return nil
}

// compile makes a snapshot of what is there.
func (s *sources) compile(ctx context.Context, out string) error {
	from := s.local()
	if len(from) == 1 && isFile(from[0]) && !strings.HasSuffix(from[0], ".zip") {
		return copySnapshot(from[0], out)
	}
	result, err := compile.Build(ctx, compile.Options{From: from, Out: out})
	if err != nil {
		return err
	}
	for _, r := range result.Rejected[:min(20, len(result.Rejected))] {
		s.log.InfoContext(ctx, "advisory was left out", "file", r.File, "reason", r.Reason)
	}
	if n := len(result.Rejected); n > 0 {
		s.log.WarnContext(ctx, "advisories were left out", "count", n)
	}
	return nil
}

func isFile(name string) bool {
	info, err := os.Stat(name)
	return err == nil && info.Mode().IsRegular()
}

// copySnapshot copies a snapshot that somebody else compiled.
func copySnapshot(from, to string) error {
	s, err := snapshot.Open(from)
	if err != nil {
		return err
	}
	defer func() { _ = s.Close() }() // unmapping what was mapped does not fail
	f, err := os.Create(to)          //nolint:gosec // in the work folder
	if err != nil {
		return fmt.Errorf("copy snapshot: %w", err)
	}
	if err := errors.Join(s.Stamp(f, s.Sequence()), f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("copy snapshot: %w", err)
	}
	return nil
}

// download fetches one file unless it is what it was.
func (s *sources) download(ctx context.Context, r remote) error {
	var etag, modified string
	var size int64
	err := s.db.QueryRowContext(ctx, `SELECT etag, last_modified, size FROM advisor_sources WHERE url = $1`, r.url).Scan(&etag, &modified, &size)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return fmt.Errorf("read state of download: %w", err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.url, nil)
	if err != nil {
		return fmt.Errorf("%w: %w", err, ErrDownload)
	}
	req.Header.Set("User-Agent", "tidewaiter-advisor")
	if info, err := os.Stat(r.file); err == nil && info.Size() == size {
		if etag != "" {
			req.Header.Set("If-None-Match", etag)
		} else if modified != "" {
			req.Header.Set("If-Modified-Since", modified)
		}
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return fmt.Errorf("%w: %w", err, ErrDownload)
	}
	defer func() { _ = resp.Body.Close() }()
	switch {
	case resp.StatusCode == http.StatusNotModified:
		return nil
	case resp.StatusCode == http.StatusNotFound && r.optional && size == 0:
		return nil // never there
	case resp.StatusCode != http.StatusOK:
		return fmt.Errorf("status %d: %w", resp.StatusCode, ErrDownload)
	case resp.ContentLength > s.limit:
		return fmt.Errorf("%d bytes, allowed are %d: %w", resp.ContentLength, s.limit, ErrDownload)
	}
	n, err := s.keep(r.file, resp.Body)
	if err != nil {
		return err
	}
	_, err = s.db.ExecContext(ctx, `INSERT INTO advisor_sources (url, etag, last_modified, size) VALUES ($1, $2, $3, $4)
		ON CONFLICT (url) DO UPDATE SET etag = excluded.etag, last_modified = excluded.last_modified, size = excluded.size`,
		r.url, resp.Header.Get("ETag"), resp.Header.Get("Last-Modified"), n)
	if err != nil {
		return fmt.Errorf("store state of download: %w", err)
	}
	return nil
}

// keep puts a download in its place once it is complete and can be read.
func (s *sources) keep(file string, body io.Reader) (int64, error) {
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return 0, fmt.Errorf("keep download: %w", err)
	}
	// Outside of the folders that are compiled, or a half one would be read.
	f, err := os.CreateTemp(s.cfg.Work, ".download-*")
	if err != nil {
		return 0, fmt.Errorf("keep download: %w", err)
	}
	defer func() { _ = os.Remove(f.Name()) }() // gone already when all went well
	n, err := io.Copy(f, io.LimitReader(body, s.limit+1))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return 0, fmt.Errorf("%w: %w", err, ErrDownload)
	}
	if n > s.limit {
		return 0, fmt.Errorf("more than %d bytes: %w", s.limit, ErrDownload)
	}
	if strings.HasSuffix(file, ".zip") {
		z, err := zip.OpenReader(f.Name())
		if err != nil {
			return 0, fmt.Errorf("%w: %w", err, ErrDownload)
		}
		if err := z.Close(); err != nil {
			return 0, fmt.Errorf("%w: %w", err, ErrDownload)
		}
	}
	if err := os.Rename(f.Name(), file); err != nil {
		return 0, fmt.Errorf("keep download: %w", err)
	}
	return n, nil
}
