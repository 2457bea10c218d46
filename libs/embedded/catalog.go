package embedded

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
)

// Bounds of a page of the registry's catalog.
const (
	catalogPage    = 100
	maxCatalogPage = 1000
)

// catalog answers GET /v2/_catalog as Distribution does ("Listing
// Repositories" of its HTTP API): names in lexical order, n of them after last.
func (r *registry) catalog(w http.ResponseWriter, req *http.Request) {
	limit, err := strconv.Atoi(req.URL.Query().Get("n"))
	if err != nil || limit < 1 || limit > maxCatalogPage {
		limit = catalogPage
	}
	names, err := repositories(r.dir)
	if err != nil {
		r.log.ErrorContext(req.Context(), "repositories cannot be listed", slog.Any("error", err))
		http.Error(w, "the repositories cannot be listed", http.StatusInternalServerError)
		return
	}
	last := req.URL.Query().Get("last")
	names = slices.DeleteFunc(names, func(name string) bool { return name <= last })
	if len(names) > limit {
		names = names[:limit]
		query := url.Values{"n": {strconv.Itoa(limit)}, "last": {names[limit-1]}}
		w.Header().Set("Link", fmt.Sprintf(`</v2/_catalog?%s>; rel="next"`, query.Encode()))
	}
	w.Header().Set("Content-Type", "application/json")
	// The client is gone if this fails.
	_ = json.NewEncoder(w).Encode(map[string][]string{"repositories": names})
}

// repositories returns the names of the folders with an OCI layout, sorted.
func repositories(dir string) ([]string, error) {
	names := []string{}
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil // deleted meanwhile, or nothing was pushed yet
		case err != nil:
			return err
		case entry.IsDir() && entry.Name() == "blobs" && isLayout(filepath.Dir(path)):
			return fs.SkipDir
		case entry.IsDir() || entry.Name() != "index.json" || !isLayout(filepath.Dir(path)):
			return nil
		}
		name, err := filepath.Rel(dir, filepath.Dir(path))
		if err != nil {
			return err
		}
		names = append(names, filepath.ToSlash(name))
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("look for repositories: %w", err)
	}
	slices.Sort(names)
	return names, nil
}

func isLayout(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, "oci-layout"))
	return err == nil
}
