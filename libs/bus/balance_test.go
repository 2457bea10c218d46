package bus_test

import (
	"context"
	"log/slog"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kmsg"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
)

// The coordinator of a group learns of a new topic only after the group has
// asked for its partitions: the group asks again, and gets them.
func TestCoordinatorThatLearnsOfTopicsLate(t *testing.T) {
	c, err := kfake.NewCluster(kfake.NumBrokers(1))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	// kafka-go's group asks by version 6 at most, our own client by a later one.
	var late atomic.Int64
	c.ControlKey(int16(kmsg.Metadata), func(r kmsg.Request) (kmsg.Response, error, bool) {
		c.KeepControl()
		ask := r.(*kmsg.MetadataRequest)
		if ask.Version > 6 || late.Add(1) > 1 {
			return nil, nil, false
		}
		answer := ask.ResponseKind().(*kmsg.MetadataResponse)
		for _, topic := range ask.Topics {
			answer.Topics = append(answer.Topics, kmsg.MetadataResponseTopic{Topic: topic.Topic, ErrorCode: kerr.UnknownTopicOrPartition.Code})
		}
		return answer, nil, true
	})
	b, err := bus.New(bus.Config{Brokers: c.ListenAddrs()}, "matcher", slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	handled := make(chan struct{}, 1)
	ended := make(chan error, 1)
	go func() {
		ended <- b.Consume(ctx, bus.Subscription{Events: []string{contracts.ImageAssembledV1}, Handler: func(context.Context, event.Event) ([]event.Event, error) {
			handled <- struct{}{}
			return nil, nil
		}})
	}()
	if err := b.EnsureTopics(ctx, contracts.ImageAssembledV1); err != nil {
		t.Fatal(err)
	}
	ev, err := bus.NewEvent(contracts.ImageAssembledV1, "r.example/a@"+contracts.DigestOf([]byte("a")), map[string]any{})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Publish(ctx, ev); err != nil {
		t.Fatal(err)
	}
	select {
	case <-handled:
	case <-ctx.Done():
		t.Error("the event was not handled: the group did not ask again")
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if late.Load() < 2 {
		t.Errorf("the group asked %d times for its topics, so nothing was shown", late.Load())
	}
}
