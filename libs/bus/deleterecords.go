package bus

import (
	"context"
	"fmt"

	"github.com/segmentio/kafka-go"
	"github.com/segmentio/kafka-go/protocol"
)

// kafka-go speaks every request but this one: DeleteRecords (KIP-107; API key
// 21, versions 0 and 1, which differ in nothing).
func init() {
	protocol.Register(&deleteRecordsRequest{}, &deleteRecordsResponse{})
}

type deleteRecordsRequest struct {
	Topics    []deleteRecordsTopic `kafka:"min=v0,max=v1"`
	TimeoutMs int32                `kafka:"min=v0,max=v1"`
}

type deleteRecordsTopic struct {
	Name       string                   `kafka:"min=v0,max=v1"`
	Partitions []deleteRecordsPartition `kafka:"min=v0,max=v1"`
}

type deleteRecordsPartition struct {
	Partition int32 `kafka:"min=v0,max=v1"`
	Offset    int64 `kafka:"min=v0,max=v1"` // the first that stays
}

type deleteRecordsResponse struct {
	ThrottleTimeMs int32                 `kafka:"min=v0,max=v1"`
	Topics         []deletedRecordsTopic `kafka:"min=v0,max=v1"`
}

type deletedRecordsTopic struct {
	Name       string                    `kafka:"min=v0,max=v1"`
	Partitions []deletedRecordsPartition `kafka:"min=v0,max=v1"`
}

type deletedRecordsPartition struct {
	Partition    int32 `kafka:"min=v0,max=v1"`
	LowWatermark int64 `kafka:"min=v0,max=v1"`
	ErrorCode    int16 `kafka:"min=v0,max=v1"`
}

// ApiKey makes it a message of the protocol.
func (*deleteRecordsRequest) ApiKey() protocol.ApiKey { return protocol.DeleteRecords }

// ApiKey makes it a message of the protocol.
func (*deleteRecordsResponse) ApiKey() protocol.ApiKey { return protocol.DeleteRecords }

// Broker sends the request to the leader of its one partition.
func (r *deleteRecordsRequest) Broker(cluster protocol.Cluster) (protocol.Broker, error) {
	t := &r.Topics[0]
	topic, ok := cluster.Topics[t.Name]
	if !ok {
		return protocol.Broker{ID: -1}, protocol.NewErrNoTopic(t.Name)
	}
	p := t.Partitions[0].Partition
	leader, ok := cluster.Brokers[topic.Partitions[p].Leader]
	if !ok {
		return protocol.Broker{ID: -1}, protocol.NewErrNoLeader(t.Name, p)
	}
	return leader, nil
}

// deleteRecords deletes what stands in a partition before an offset.
func (b *Bus) deleteRecords(ctx context.Context, p position, before int64) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	m, err := b.transport.RoundTrip(ctx, b.client.Addr, &deleteRecordsRequest{
		TimeoutMs: int32(requestTimeout.Milliseconds()), //nolint:gosec // ten seconds
		Topics: []deleteRecordsTopic{{Name: p.topic, Partitions: []deleteRecordsPartition{{
			Partition: int32(p.partition), Offset: before, //nolint:gosec // Kafka's partitions are int32
		}}}},
	})
	if err != nil {
		return fmt.Errorf("delete records of %s/%d: %w", p.topic, p.partition, err)
	}
	res, ok := m.(*deleteRecordsResponse)
	if !ok || len(res.Topics) != 1 || len(res.Topics[0].Partitions) != 1 {
		return fmt.Errorf("delete records of %s/%d: unexpected answer %T", p.topic, p.partition, m)
	}
	if code := kafka.Error(res.Topics[0].Partitions[0].ErrorCode); code != 0 {
		return fmt.Errorf("delete records of %s/%d: %w", p.topic, p.partition, errDeleteRecords(code))
	}
	return nil
}
