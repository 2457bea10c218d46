package gatekeeper

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// served is a gatekeeper behind HTTPS on loopback, with attested images.
func served(b *testing.B, images int) (w *world, call func(image contracts.Image), all []contracts.Image) {
	b.Helper()
	w = newWorld(b, nil)
	for i := range images {
		image := w.image(fmt.Sprintf("shop/app%d", i))
		w.attest(image, contracts.VerdictPass, 100)
		all = append(all, image)
	}
	server := httptest.NewUnstartedServer(w.g.Handler())
	server.EnableHTTP2 = true
	server.StartTLS()
	b.Cleanup(server.Close)
	client := server.Client()
	return w, func(image contracts.Image) {
		body, err := json.Marshal(pod(image.String()))
		if err != nil {
			b.Fatal(err)
		}
		resp, err := client.Post(server.URL+"/validate", "application/json", bytes.NewReader(body))
		if err != nil {
			b.Error(err)
			return
		}
		defer resp.Body.Close()
		answer, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusOK || !bytes.Contains(answer, []byte(`"allowed":true`)) {
			b.Errorf("%d %s %v", resp.StatusCode, answer, err)
		}
	}, all
}

// report prints percentiles of what was measured.
func report(b *testing.B, took []time.Duration) {
	b.Helper()
	slices.Sort(took)
	at := func(p float64) float64 { return float64(took[int(float64(len(took)-1)*p)].Microseconds()) / 1000 }
	b.ReportMetric(at(0.5), "p50-ms")
	b.ReportMetric(at(0.99), "p99-ms")
	b.ReportMetric(at(1), "max-ms")
}

// BenchmarkHit measures reviews of a remembered image, one after the other:
// p99 below 5 ms is wanted.
func BenchmarkHit(b *testing.B) {
	w, call, images := served(b, 1)
	call(images[0])
	requests := w.reg.Requests.Load()
	var took []time.Duration
	for b.Loop() {
		start := time.Now()
		call(images[0])
		took = append(took, time.Since(start))
		w.events()
	}
	report(b, took)
	if n := w.reg.Requests.Load() - requests; n != 0 {
		b.Errorf("the registry was asked %d times", n)
	}
}

// BenchmarkMiss measures reviews of images that nothing is remembered of: below
// a second is wanted.
func BenchmarkMiss(b *testing.B) {
	w, call, images := served(b, 20)
	var took []time.Duration
	for b.Loop() {
		b.StopTimer()
		w.g.memory = newMemory(w.cfg.CacheEntries, w.cfg.CacheBytes)
		w.mini.FlushAll()
		w.events()
		b.StartTimer()
		start := time.Now()
		call(images[len(took)%len(images)])
		took = append(took, time.Since(start))
	}
	report(b, took)
}

// BenchmarkAtOnce measures 200 reviews at once of 20 remembered images.
func BenchmarkAtOnce(b *testing.B) {
	w, call, images := served(b, 20)
	for _, image := range images {
		call(image)
	}
	var mu sync.Mutex
	var took []time.Duration
	for b.Loop() {
		var group sync.WaitGroup
		for i := range 200 {
			group.Go(func() {
				start := time.Now()
				call(images[i%len(images)])
				elapsed := time.Since(start)
				mu.Lock()
				took = append(took, elapsed)
				mu.Unlock()
			})
		}
		group.Wait()
		w.events()
	}
	report(b, took)
}
