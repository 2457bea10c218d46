package compile

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/services/advisor/snapshot"
)

// shared returns the folder with real advisories beside the repository.
func shared(tb testing.TB) string {
	tb.Helper()
	dir, err := filepath.Abs("../../../../shared/advisories")
	if err != nil {
		tb.Fatal(err)
	}
	if _, err := os.Stat(dir); err != nil {
		tb.Skip("no real advisories beside the repository: ", dir)
	}
	return dir
}

func TestRealAdvisories(t *testing.T) {
	dir := shared(t)
	out := filepath.Join(t.TempDir(), "advisories.db")
	start := time.Now()
	got, err := Build(t.Context(), Options{From: []string{dir}, Out: out})
	if err != nil {
		t.Fatal(err)
	}
	t.Log("built in", time.Since(start), got)
	start = time.Now()
	s, err := snapshot.Open(out)
	if err != nil {
		t.Fatal(err)
	}
	t.Log("opened in", time.Since(start), s.Stats(), s.Newest())
}
