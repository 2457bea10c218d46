package e2e

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/allinone"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/sample"
)

// TestMeasureFleet prints the design's figures for a fleet of 50 images that
// share three layers (180 MB) and have one small layer of their own. It is a
// measurement, run by `task bench` (-measure), and asserts nothing about time.
func TestMeasureFleet(t *testing.T) {
	measuring(t)
	s := start(t, allinone.Options{})
	n := *count
	all := fleet(t, 2*n, *shared<<20, 50<<10)
	cold := s.measure("cold", all[:n])
	warm := s.measure("warm", all[n:])
	total, distinct := 0, 0
	for _, c := range s.log.analyses(t) {
		total += c
		distinct++
	}
	fmt.Printf("layers analysed ÷ distinct layers: %d ÷ %d = %.2f (design: 1.00)\n", total, distinct, float64(total)/float64(distinct))
	fmt.Printf("fleet of %d, cold: %5.1f images/s assembled (design: 15), %5.1f attested (design: 10)\n", n, cold.assembled, cold.attested)
	fmt.Printf("fleet of %d, warm: %5.1f images/s matched   (design: 60), %5.1f attested (design: 30)\n", n, warm.matched, warm.attested)
}

// TestMeasureLatency prints push → attested on a warm base with 1 MB of new layer.
func TestMeasureLatency(t *testing.T) {
	measuring(t)
	s := start(t, allinone.Options{})
	const n = 60
	all := fleet(t, n+1, 30<<20, 1<<20)
	s.attested(s.push("latency/base", "1", all[0]))
	var took []time.Duration
	for i, image := range all[1:] {
		p := s.push(fmt.Sprintf("latency/app-%d", i), "1", image)
		began := time.Now()
		s.attested(p)
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	fmt.Printf("push → attested, warm base, 1 MB new layer: p50 %v, p95 %v (design: p95 < 2 s in one process)\n",
		took[n/2].Round(time.Millisecond), took[n*95/100].Round(time.Millisecond))
}

func measuring(t *testing.T) {
	t.Helper()
	if !*measure {
		t.Skip("a measurement, which `task bench` asks for with -measure")
	}
}

type rates struct{ assembled, matched, attested float64 }

// measure pushes images into one repository each, blobs first and the
// manifests at once, and returns images a second until the last one had passed.
func (s *system) measure(name string, fleet []sample.Image) rates {
	s.t.Helper()
	// the client's upload of blobs is not what is measured
	if err := s.StopService("planner"); err != nil {
		s.t.Fatal(err)
	}
	pushed := make([]sample.Pushed, len(fleet))
	var group errgroup.Group
	group.SetLimit(4)
	for i, image := range fleet {
		group.Go(func() (err error) {
			ref := registry.Ref{Registry: s.Registry.Host, Repository: fmt.Sprintf("%s/app-%d", name, i), Tag: "1"}
			pushed[i], err = sample.Push(s.t.Context(), s.client, ref, image)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		s.t.Fatal(err)
	}
	began := time.Now()
	if err := s.StartService("planner"); err != nil {
		s.t.Fatal(err)
	}
	s.attested(pushed...)
	rate := func(event string) float64 {
		var last time.Time
		for _, m := range s.log.named(event) {
			for _, p := range pushed {
				if m.Event.Subject() == p.String() && m.Time.After(last) {
					last = m.Time
				}
			}
		}
		return float64(len(pushed)) / last.Sub(began).Seconds()
	}
	return rates{rate(contracts.ImageAssembledV1), rate(contracts.ImageMatchedV1), rate(contracts.ImageAttestedV1)}
}
