package embedded

import (
	"context"
	"log/slog"
	"testing"

	"github.com/segmentio/kafka-go"
	"github.com/segmentio/kafka-go/sasl/scram"
)

// BenchmarkProduce is one message of 1 KiB acknowledged at a time.
func BenchmarkProduce(b *testing.B) {
	b.Run("sync=false", func(b *testing.B) { benchmarkProduce(b, false) })
	b.Run("sync=true", func(b *testing.B) { benchmarkProduce(b, true) })
}

func benchmarkProduce(b *testing.B, sync bool) {
	ctx, cancel := context.WithCancel(b.Context())
	s, err := Start(ctx, Options{Dir: b.TempDir(), Sync: sync}, slog.New(slog.DiscardHandler))
	if err != nil {
		b.Fatal(err)
	}
	defer func() {
		cancel()
		_ = s.Wait()
	}()
	mechanism, err := scram.Mechanism(scram.SHA512, s.KafkaUsername, s.KafkaPassword)
	if err != nil {
		b.Fatal(err)
	}
	transport := &kafka.Transport{SASL: mechanism}
	defer transport.CloseIdleConnections()
	c := &kafka.Client{Addr: kafka.TCP(s.KafkaAddress), Transport: transport}
	if _, err := c.CreateTopics(b.Context(), &kafka.CreateTopicsRequest{
		Topics: []kafka.TopicConfig{{Topic: "bench", NumPartitions: 1, ReplicationFactor: 1}},
	}); err != nil {
		b.Fatal(err)
	}
	value := make([]byte, 1024)
	for b.Loop() {
		resp, err := c.Produce(b.Context(), &kafka.ProduceRequest{
			Topic: "bench", RequiredAcks: kafka.RequireAll,
			Records: kafka.NewRecordReader(kafka.Record{Value: kafka.NewBytes(value)}),
		})
		if err == nil {
			err = resp.Error
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}
