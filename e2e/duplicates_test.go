package e2e

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/intake"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/allinone"
)

// The sender repeats a delivery: to the same intake, to one that was started
// again and has forgotten it, to a second replica, and under another id. There
// is one scan: one inventory, one analysis a layer, one set of statements.
func TestRepeatedDeliveriesAreOneScan(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := start(t, allinone.Options{Dir: dir})
	p := s.push("team/tool", "1.0", story(t).Clean...)
	s.attested(p)
	image := p.String()

	token, err := os.ReadFile(filepath.Join(dir, "secrets", "hook.secret"))
	if err != nil {
		t.Fatal(err)
	}
	headers := map[string]string{"Authorization": "Bearer " + strings.TrimSpace(string(token))}
	deliver := func(url, id string) {
		t.Helper()
		body := fmt.Appendf(nil, `{"events":[{"id":%q,"timestamp":"2026-05-04T03:02:01Z","action":"push","target":{
			"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":%q,"repository":"team/tool","tag":"1.0"}}]}`, id, p.Ref.Digest)
		if status, answer := s.deliver(url+"/hooks/"+allinone.Source, headers, body); status != http.StatusAccepted {
			t.Fatalf("%d %s", status, answer)
		}
	}
	deliver(s.Intake, "one")
	deliver(s.Intake, "one")
	if err := s.StopService(intake.Name); err != nil {
		t.Fatal(err)
	}
	if err := s.StartService(intake.Name); err != nil {
		t.Fatal(err)
	}
	s.log.wait(t, func(*events) string {
		resp, err := http.Get(s.Intake + "/")
		if err != nil {
			return "intake is not back"
		}
		_ = resp.Body.Close()
		return ""
	})
	deliver(s.Intake, "one")
	replica := s.replica()
	deliver(replica, "one")
	deliver(replica, "two")

	// of the delivery that came four times there is one event, though more than one message
	s.log.wait(t, func(l *events) string {
		messages, ids := 0, map[string]map[string]bool{"one": {}, "two": {}}
		for _, m := range l.about(contracts.ImagePushedV1, s.Registry.Host+"/team/tool:1.0@"+p.Ref.Digest) {
			for id, events := range ids {
				if strings.Contains(string(m.Value), fmt.Sprintf(`"deliveryId":%q`, id)) {
					messages++
					events[m.Event.ID()] = true
				}
			}
		}
		if messages < 4 || len(ids["two"]) == 0 {
			return fmt.Sprintf("%d messages of repeated deliveries", messages)
		}
		if len(ids["one"]) != 1 {
			t.Errorf("one delivery became %d events", len(ids["one"]))
		}
		return ""
	})
	s.quiet()

	inventories := map[string]bool{}
	for _, m := range s.log.about(contracts.ImageAssembledV1, image) {
		inventories[m.Event.ID()] = true
	}
	if len(inventories) != 1 {
		t.Errorf("%s was assembled %d times", image, len(inventories))
	}
	for layer, n := range s.log.analyses(t) {
		if n != 1 {
			t.Errorf("layer %s was analysed %d times", layer, n)
		}
	}
	if got := s.referrers(image); len(got) != 4 {
		t.Errorf("%s carries %d referrers, want 4: %v", image, len(got), got)
	}
}

// replica runs a second intake beside the one of the all-in-one until the test
// ends, and returns its URL.
func (s *system) replica() string {
	s.t.Helper()
	cfg, err := s.Config.With(map[string]any{"intake": map[string]any{"listen": "127.0.0.1:0"}})
	if err != nil {
		s.t.Fatal(err)
	}
	log := (&system{}).logger()
	env := cfg.Env(intake.Name, log, prometheus.NewRegistry(), run.NewHealth())
	ctx, stop := context.WithCancel(context.WithoutCancel(s.t.Context()))
	address, ended := make(chan string, 1), make(chan error, 1)
	go func() { ended <- intake.Listening(func(a string) { address <- a })(ctx, env) }()
	s.t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			s.t.Errorf("the second intake: %v", err)
		}
		if err := env.Close(); err != nil {
			s.t.Errorf("the second intake: %v", err)
		}
	})
	select {
	case a := <-address:
		return "http://" + a
	case err := <-ended:
		ended <- nil
		s.t.Fatalf("the second intake did not start: %v", err)
	}
	return ""
}
