package registry

import (
	"bytes"
	"crypto/sha256"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// BenchmarkBlob compares reading a blob with a bare GET and one sha256.
func BenchmarkBlob(b *testing.B) {
	content := bytes.Repeat([]byte("0123456789abcdef"), 2<<20) // 32 MiB
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
	}))
	defer s.Close()
	d := descriptorOf("", content)
	name := strings.TrimPrefix(s.URL, "http://")
	buf := make([]byte, 64<<10)
	b.Run("Blob", func(b *testing.B) {
		c, err := New([]Host{{Name: name, PlainHTTP: true}}, discard())
		if err != nil {
			b.Fatal(err)
		}
		b.SetBytes(d.Size)
		for b.Loop() {
			rc, err := c.Blob(b.Context(), name, "a", d)
			if err != nil {
				b.Fatal(err)
			}
			if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, rc, buf); err != nil {
				b.Fatal(err)
			}
			if err := rc.Close(); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("GET+sha256", func(b *testing.B) {
		b.SetBytes(d.Size)
		for b.Loop() {
			resp, err := http.Get(s.URL) //nolint:noctx // a bare GET is what is compared with
			if err != nil {
				b.Fatal(err)
			}
			h := sha256.New()
			if _, err := io.CopyBuffer(struct{ io.Writer }{h}, struct{ io.Reader }{resp.Body}, buf); err != nil {
				b.Fatal(err)
			}
			if err := resp.Body.Close(); err != nil {
				b.Fatal(err)
			}
		}
	})
}
