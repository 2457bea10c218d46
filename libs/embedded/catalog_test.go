package embedded

import (
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"testing"
)

// The catalog lists every repository once, however repositories stand below
// another, and nothing of what is in them.
func TestCatalogOfTheRegistry(t *testing.T) {
	dir := t.TempDir()
	want := []string{"a", "a/b", "a/blobs", "team/app", "team/app-2", "z"}
	for _, name := range want {
		for _, file := range []string{"index.json", "oci-layout"} {
			path := filepath.Join(dir, name, file)
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte("{}"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := os.MkdirAll(filepath.Join(dir, "team", "empty"), 0o700); err != nil {
		t.Fatal(err)
	}
	want = slices.DeleteFunc(want, func(s string) bool { return s == "a/blobs" }) // the name of a layout's own folder
	r := &registry{dir: dir, log: slog.New(slog.DiscardHandler), anonymousPull: true}
	link := regexp.MustCompile(`^<(/v2/_catalog\?[^>]+)>; rel="next"$`)
	var got []string
	next := "/v2/_catalog?n=2"
	for pages := 0; next != "" && pages < 10; pages++ {
		w := httptest.NewRecorder()
		r.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, next, nil))
		var page struct {
			Repositories []string `json:"repositories"`
		}
		if err := json.Unmarshal(w.Body.Bytes(), &page); err != nil || w.Code != http.StatusOK {
			t.Fatalf("%d %s", w.Code, w.Body)
		}
		got = append(got, page.Repositories...)
		next = ""
		if m := link.FindStringSubmatch(w.Header().Get("Link")); m != nil {
			next = m[1]
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}
