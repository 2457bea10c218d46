package catalog_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/embedded"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/libs/store"
	"github.com/tidewaiter/tidewaiter/services/assembler"
	"github.com/tidewaiter/tidewaiter/services/catalog"
)

// TestRunOnKafka runs assembler and catalog on the embedded servers: a plan
// and a layer report become an inventory, which the API then tells of.
func TestRunOnKafka(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	log := slog.New(slog.DiscardHandler)
	servers, err := embedded.Start(ctx, embedded.Options{Dir: t.TempDir()}, log)
	if err != nil {
		t.Fatal(err)
	}
	address := freeAddress(t)
	t.Setenv("CATALOG_TOKEN", "s3cret")
	t.Setenv("KAFKA_PASSWORD", servers.KafkaPassword)
	cfg, err := run.Parse("", fmt.Appendf(nil, `
kafka: {brokers: ["%s"], username: "%s", passwordEnv: KAFKA_PASSWORD, partitions: 2}
database: {url: "%s"}
assembler: {maxAttempts: 2}
catalog: {listen: "%s", tokenEnv: CATALOG_TOKEN, deadlines: [15m, 1h], tick: 1s}
`, servers.KafkaAddress, servers.KafkaUsername, servers.DatabaseURL, address), os.LookupEnv)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 2)
	for name, service := range map[string]run.Service{assembler.Name: assembler.Run, catalog.Name: catalog.Run} {
		env := cfg.Env(name, log, prometheus.NewRegistry(), run.NewHealth())
		go func() {
			err := service(ctx, env)
			if closed := env.Close(); err == nil {
				err = closed
			}
			ended <- err
		}()
	}
	t.Cleanup(func() {
		cancel()
		for range 2 {
			if err := <-ended; err != nil {
				t.Errorf("service: %v", err)
			}
		}
		if err := servers.Wait(); err != nil {
			t.Errorf("servers: %v", err)
		}
	})

	image := publish(ctx, t, cfg, log, servers.DatabaseURL)
	for {
		var body struct{ Images []catalog.ImageEntry }
		if err := get(ctx, "http://"+address+"/v1/images", &body); err == nil && len(body.Images) == 1 && body.Images[0].State == catalog.StateAssembled {
			if body.Images[0].Image != image.String() {
				t.Errorf("got %+v", body.Images[0])
			}
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("the image is not assembled: %+v", body)
		case err := <-ended:
			t.Fatalf("a service ended: %v", err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// publish stores a layer report and sends the plan of an image with that layer.
func publish(ctx context.Context, t *testing.T, cfg *run.Config, log *slog.Logger, url string) contracts.Image {
	t.Helper()
	db, err := store.Open(ctx, url)
	if err != nil {
		t.Fatal(err)
	}
	defer closed(t, db)
	layer := contracts.DigestOf([]byte("layer"))
	content, err := json.Marshal(contracts.LayerReport{Analyzer: "1", Digest: layer})
	if err != nil {
		t.Fatal(err)
	}
	report, err := db.PutBlob(ctx, content)
	if err != nil {
		t.Fatal(err)
	}
	kafka := cfg.Kafka.Config
	kafka.Password = os.Getenv("KAFKA_PASSWORD") // services read it at every connection
	b, err := bus.New(kafka, "tester", log, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer closed(t, b)
	if err := b.EnsureTopics(ctx, contracts.ImagePlannedV1, contracts.LayerAnalyzedV1); err != nil {
		t.Fatal(err)
	}
	im := contracts.Image{Registry: "r.example", Repository: "a", Digest: contracts.DigestOf([]byte("image"))}
	var events []event.Event
	for name, data := range map[string]any{
		contracts.ImagePlannedV1:  contracts.ImagePlanned{Image: im, Source: "hub", Kind: contracts.KindImage, Layers: []contracts.PlannedLayer{{Digest: layer}}},
		contracts.LayerAnalyzedV1: contracts.LayerAnalyzed{Digest: layer, Report: contracts.Blob{Digest: report}, Analyzer: "1"},
	} {
		ev, err := bus.NewEvent(name, "x", data)
		if err != nil {
			t.Fatal(err)
		}
		events = append(events, ev)
	}
	if err := b.Publish(ctx, events...); err != nil {
		t.Fatal(err)
	}
	return im
}

func get(ctx context.Context, url string, into any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer s3cret")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	return json.Unmarshal(body, into)
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer closed(t, l)
	return l.Addr().String()
}

func closed(t *testing.T, c io.Closer) {
	t.Helper()
	if err := c.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
}
