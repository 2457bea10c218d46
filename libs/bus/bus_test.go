package bus_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/twmb/franz-go/pkg/kfake"
	"go.uber.org/goleak"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/bus/bustest"
	"github.com/tidewaiter/tidewaiter/libs/credential/credentialtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fake is a kfake that can be stopped and started with its data.
type fake struct {
	dir     string
	port    int
	cluster *kfake.Cluster
}

func (f *fake) start(t *testing.T) {
	t.Helper()
	opts := []kfake.Opt{kfake.NumBrokers(1), kfake.DataDir(f.dir), kfake.SyncWrites()}
	if f.port != 0 {
		opts = append(opts, kfake.Ports(f.port))
	}
	c, err := kfake.NewCluster(opts...)
	if err != nil {
		t.Fatal(err)
	}
	f.cluster = c
	_, port, err := net.SplitHostPort(c.ListenAddrs()[0])
	if err != nil {
		t.Fatal(err)
	}
	if f.port, err = strconv.Atoi(port); err != nil {
		t.Fatal(err)
	}
}

func (f *fake) stop(*testing.T) { f.cluster.Close() }

func TestBusOnFake(t *testing.T) {
	bustest.Run(t, func(t *testing.T) bustest.Broker {
		f := &fake{dir: t.TempDir()}
		f.start(t)
		t.Cleanup(func() { f.cluster.Close() })
		return bustest.Broker{Config: bus.Config{Brokers: f.cluster.ListenAddrs()}, Stop: f.stop, Start: f.start}
	})
}

// Connections of both kinds, the publisher's and the group's, log in and
// encrypt, with a client's certificate where the server asks for one.
func TestBusWithTLSAndSCRAM(t *testing.T) {
	for _, mechanism := range []string{bus.ScramSHA512, bus.ScramSHA256, bus.Plain} {
		t.Run(mechanism, func(t *testing.T) { testLogin(t, mechanism) })
	}
}

func testLogin(t *testing.T, mechanism string) {
	authority := credentialtest.New(t)
	c, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.EnableSASL(),
		kfake.Superuser(mechanism, "planner", "a password"), kfake.TLS(authority.Server(t)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	cfg := bus.Config{
		Brokers: c.ListenAddrs(), Mechanism: mechanism, Username: "planner", Password: "a password",
		TLSSource: authority.Client(t, "planner").Source(),
	}
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	b, err := bus.New(cfg, "planner", log, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := b.EnsureTopics(ctx, contracts.ImagePushedV1); err != nil {
		t.Fatal(err)
	}
	ev, err := bus.NewEvent(contracts.ImagePushedV1, "r.example/app", contracts.ImagePushed{})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Publish(ctx, ev); err != nil {
		t.Fatal(err)
	}
	got := ""
	err = b.Consume(ctx, bus.Subscription{
		Events: []string{contracts.ImagePushedV1},
		Handler: func(_ context.Context, in event.Event) ([]event.Event, error) {
			got = in.Subject()
			cancel()
			return nil, nil
		},
	})
	if err != nil || got != "r.example/app" {
		t.Errorf("got %q, %v", got, err)
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}

	stranger := cfg
	stranger.TLSSource = nil
	stranger.TLS = &tls.Config{RootCAs: authority.Pool(), MinVersion: tls.VersionTLS12}
	refused(t, stranger, log)
	cfg.Password = "another"
	refused(t, cfg, log)
}

// A password that is replaced is used by the next connection; until then
// publishing waits for it.
func TestThePasswordIsReadAtEveryConnection(t *testing.T) {
	c, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.EnableSASL(), kfake.Superuser(bus.ScramSHA512, "planner", "second"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	asked := atomic.Int32{}
	cfg := bus.Config{Brokers: c.ListenAddrs(), Username: "planner", PasswordSource: func() (string, error) {
		if asked.Add(1) < 4 {
			return "first", nil
		}
		return "second", nil
	}}
	b, err := bus.New(cfg, "planner", slog.New(slog.NewTextHandler(t.Output(), nil)), nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := b.EnsureTopics(ctx, contracts.ImagePushedV1); err != nil {
		t.Errorf("after the password was replaced: %v", err)
	}
	if asked.Load() < 4 {
		t.Errorf("the password was asked for %d times", asked.Load())
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
}

func TestPlainNeedsTLS(t *testing.T) {
	cfg := bus.Config{Brokers: []string{"127.0.0.1:1"}, Mechanism: bus.Plain, Username: "u", Password: "p"}
	if err := cfg.Validate(); err == nil || !strings.Contains(err.Error(), "tls") {
		t.Errorf("PLAIN without TLS: %v", err)
	}
	cfg.Mechanism = "GSSAPI"
	if err := cfg.Validate(); err == nil || !strings.Contains(err.Error(), bus.ScramSHA256) {
		t.Errorf("an unknown mechanism: %v", err)
	}
}

// refused checks that Kafka does not let a configuration in, and that the error
// does not hold the password.
func refused(t *testing.T, cfg bus.Config, log *slog.Logger) {
	t.Helper()
	wrong, err := bus.New(cfg, "planner", log, nil)
	if err != nil {
		t.Fatal(err)
	}
	short, stop := context.WithTimeout(t.Context(), time.Second)
	defer stop()
	err = wrong.EnsureTopics(short, contracts.ImagePushedV1)
	if err == nil || strings.Contains(err.Error(), cfg.Password) {
		t.Errorf("with wrong credentials: %v", err)
	}
	if err := wrong.Close(); err != nil {
		t.Error(err)
	}
}

// BenchmarkPublish stores events from 64 goroutines, as intake does; p99 is the
// time of one Publish.
func BenchmarkPublish(b *testing.B) {
	publisher, _ := benchBus(b, "intake")
	ev, err := bus.NewEvent(contracts.ImagePushedV1, "r.example/app", contracts.ImagePushed{Repository: strings.Repeat("x", 500)})
	if err != nil {
		b.Fatal(err)
	}
	var mu sync.Mutex
	var times []time.Duration
	var n atomic.Int64
	b.SetParallelism(32)
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			ev := ev.Clone()
			ev.SetSubject(fmt.Sprintf("r.example/app%d", n.Add(1)%100))
			started := time.Now()
			if err := publisher.Publish(b.Context(), ev); err != nil {
				b.Error(err)
				return
			}
			mu.Lock()
			times = append(times, time.Since(started))
			mu.Unlock()
		}
	})
	b.StopTimer()
	slices.Sort(times)
	b.ReportMetric(float64(len(times))/b.Elapsed().Seconds(), "events/s")
	b.ReportMetric(float64(times[len(times)*99/100].Microseconds())/1000, "p99-ms")
}

// BenchmarkConsume handles stored events that cause one output each.
func BenchmarkConsume(b *testing.B) {
	producer, ctx := benchBus(b, "planner")
	if err := producer.EnsureTopics(ctx, contracts.TagObservedV1); err != nil {
		b.Fatal(err)
	}
	var evs []event.Event
	for i := range b.N {
		ev, err := bus.NewEvent(contracts.ImagePushedV1, fmt.Sprintf("r.example/app%d", i%100), contracts.ImagePushed{})
		if err != nil {
			b.Fatal(err)
		}
		evs = append(evs, ev)
	}
	if err := producer.Publish(ctx, evs...); err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var n atomic.Int64
	b.ResetTimer()
	err := producer.Consume(ctx, bus.Subscription{
		Events: []string{contracts.ImagePushedV1},
		Handler: func(_ context.Context, in event.Event) ([]event.Event, error) {
			if n.Add(1) >= int64(b.N) {
				cancel()
			}
			out, err := bus.NewEvent(contracts.TagObservedV1, in.Subject(), contracts.TagObserved{})
			return []event.Event{out}, err
		},
	})
	if err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "events/s")
}

// benchBus returns a bus on TIDEWAITER_KAFKA, or on a fake where that is not set.
func benchBus(b *testing.B, service string) (*bus.Bus, context.Context) {
	b.Helper()
	brokers := []string{os.Getenv("TIDEWAITER_KAFKA")}
	if brokers[0] == "" {
		c, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.DataDir(b.TempDir()))
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(c.Close)
		brokers = c.ListenAddrs()
	}
	cfg := bus.Config{Brokers: brokers, Prefix: fmt.Sprintf("bench%d.", time.Now().UnixNano())}
	publisher, err := bus.New(cfg, service, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := publisher.Close(); err != nil {
			b.Error(err)
		}
	})
	if err := publisher.EnsureTopics(b.Context(), contracts.ImagePushedV1); err != nil {
		b.Fatal(err)
	}
	return publisher, b.Context()
}
