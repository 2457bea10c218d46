//go:build real

package access_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"

	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/credential"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/access"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/access/accesstest"
)

// On a real Kafka with AUTH=1 (see e2e/servers), where the printed script was
// done: each service finds its topics, joins its group and sends its events; and
// of all topics and groups of all services, the broker refuses each but its own.
func TestPrincipalsInKafka(t *testing.T) {
	brokers, file := os.Getenv("SERVERS_KAFKA"), os.Getenv("SERVERS_KAFKA_ADMIN_PASSWORD_FILE")
	if brokers == "" || file == "" {
		t.Fatal("SERVERS_KAFKA… are not set; run: SERVERS=kafka AUTH=1 e2e/servers/servers.sh with go test -tags real …")
	}
	secret, err := credential.Secret{File: file}.Read(nil)
	if err != nil {
		t.Fatal(err)
	}
	var authority *tls.Config
	if ca := os.Getenv("SERVERS_CA_FILE"); ca != "" {
		if authority, err = (credential.TLS{CAFile: ca}).Load(); err != nil {
			t.Fatal(err)
		}
	}
	const password = "of a principal"
	prefix := fmt.Sprintf("access%d", time.Now().UnixNano())
	names := access.Names{Prefix: prefix + ".", User: prefix + "-{service}"}
	user := func(service string) string { return prefix + "-" + service }
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	connect := func(user, password string) *kgo.Client {
		c, err := accesstest.Client(strings.Split(brokers, ","), authority, user, password)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.Close)
		return c
	}
	admin := connect("admin", secret)
	for _, s := range access.Services() {
		if err := accesstest.Users(ctx, admin, password, user(s.Name)); err != nil {
			t.Fatal(err)
		}
	}
	script := access.Kafka(access.Services(), names, 1, len(strings.Split(brokers, ",")))
	for range 2 { // it may be run again
		if err := accesstest.Run(ctx, admin, script); err != nil {
			t.Fatal(err)
		}
	}

	topics, groups := map[string]bool{}, map[string]bool{}
	for _, s := range access.Services() {
		for _, g := range s.Kafka(names.Prefix) {
			if g.Kind == access.Topic {
				topics[g.Name] = true
			} else {
				groups[g.Name] = true
			}
		}
	}
	leaders := leadersOf(ctx, t, admin, topics)
	for _, s := range access.Services() {
		t.Run(s.Name, func(t *testing.T) {
			b, err := bus.New(bus.Config{
				Brokers: strings.Split(brokers, ","), Prefix: names.Prefix, Username: user(s.Name), Password: password, TLS: authority, Partitions: 1,
			}, s.Name, slog.New(slog.DiscardHandler), nil)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = b.Close() })
			if err := b.EnsureTopics(ctx, slices.Concat(s.Reads, s.Writes, s.Tails)...); err != nil {
				t.Fatalf("its topics: %v", err)
			}
			if len(s.Reads) > 0 {
				join(ctx, t, b, s)
			}
			for _, e := range s.Writes {
				if err := b.Publish(ctx, newEvent(t, e)); err != nil {
					t.Errorf("may not send %s: %v", e, err)
				}
			}
			dead(ctx, t, b, s)

			as := connect(user(s.Name), password)
			may := map[string][]string{}
			for _, g := range s.Kafka(names.Prefix) {
				may[g.Kind+" "+g.Name] = g.Operations
			}
			for topic := range topics {
				for operation, err := range map[string]error{
					"Write": produce(ctx, as, leaders[topic], topic),
					"Read":  fetch(ctx, as, leaders[topic], topic),
				} {
					judge(t, operation+" "+topic, slices.Contains(may[access.Topic+" "+topic], operation), err, kerr.TopicAuthorizationFailed)
				}
			}
			for group := range groups {
				judge(t, "join "+group, len(may[access.Group+" "+group]) > 0, joinGroup(ctx, as, leaders[names.Prefix+"image.pushed.v1"], group), kerr.GroupAuthorizationFailed)
			}
		})
	}
	operate(ctx, t, admin, bus.Config{
		Brokers: strings.Split(brokers, ","), Prefix: names.Prefix, Username: user("cli"), Password: password, TLS: authority,
	}, "intake")
	// what the table must never allow, whatever it says
	if err := produce(ctx, connect(user("planner"), password), leaders[names.Prefix+"image.attested.v1"], names.Prefix+"image.attested.v1"); !errors.Is(err, kerr.TopicAuthorizationFailed) {
		t.Errorf("planner says that an image is attested: %v", err)
	}
	if err := fetch(ctx, connect(user("analyzer"), password), leaders[names.Prefix+"finding.v1"], names.Prefix+"finding.v1"); !errors.Is(err, kerr.TopicAuthorizationFailed) {
		t.Errorf("analyzer reads findings: %v", err)
	}
	if err := produce(ctx, connect(user("matcher"), "another"), 1, names.Prefix+"image.matched.v1"); err == nil || !strings.Contains(err.Error(), "SASL_AUTHENTICATION_FAILED") {
		t.Errorf("matcher with another password: %v", err)
	}
}

// judge compares what the broker said with what the table says.
func judge(t *testing.T, what string, may bool, got, refusal error) {
	t.Helper()
	switch {
	case may && errors.Is(got, refusal):
		t.Errorf("%s: refused, and the table allows it", what)
	case !may && !errors.Is(got, refusal):
		t.Errorf("%s: got %v, want %v", what, got, refusal)
	}
}

func leadersOf(ctx context.Context, t *testing.T, admin *kgo.Client, topics map[string]bool) map[string]int32 {
	t.Helper()
	request := kmsg.NewMetadataRequest()
	for topic := range topics {
		one := kmsg.NewMetadataRequestTopic()
		one.Topic = &topic
		request.Topics = append(request.Topics, one)
	}
	out := map[string]int32{}
	for len(out) < len(topics) { // a topic that was just made has no leader for a moment
		answer, err := request.RequestWith(ctx, admin)
		if err != nil {
			t.Fatal(err)
		}
		for _, topic := range answer.Topics {
			if len(topic.Partitions) > 0 && topic.Partitions[0].Leader >= 0 {
				out[*topic.Topic] = topic.Partitions[0].Leader
			}
		}
	}
	return out
}

// produce sends an empty batch: who may not write is refused before it is looked at.
func produce(ctx context.Context, as *kgo.Client, leader int32, topic string) error {
	request := kmsg.NewProduceRequest()
	request.Acks, request.TimeoutMillis = -1, 10_000
	one, partition := kmsg.NewProduceRequestTopic(), kmsg.NewProduceRequestTopicPartition()
	one.Topic, partition.Records = topic, []byte{}
	one.Partitions = append(one.Partitions, partition)
	request.Topics = append(request.Topics, one)
	answer, err := as.Broker(int(leader)).Request(ctx, &request)
	if err != nil {
		return fmt.Errorf("produce: %w", err)
	}
	return kerr.ErrorForCode(answer.(*kmsg.ProduceResponse).Topics[0].Partitions[0].ErrorCode)
}

func fetch(ctx context.Context, as *kgo.Client, leader int32, topic string) error {
	request := kmsg.NewFetchRequest()
	request.MaxBytes, request.MaxWaitMillis = 1<<20, 1
	one, partition := kmsg.NewFetchRequestTopic(), kmsg.NewFetchRequestTopicPartition()
	one.Topic, partition.PartitionMaxBytes = topic, 1<<20
	one.Partitions = append(one.Partitions, partition)
	request.Topics = append(request.Topics, one)
	answer, err := as.Broker(int(leader)).Request(ctx, &request)
	if err != nil {
		return fmt.Errorf("fetch: %w", err)
	}
	return kerr.ErrorForCode(answer.(*kmsg.FetchResponse).Topics[0].Partitions[0].ErrorCode)
}

// joinGroup asks any broker to join a group, without an id of a member: who may is
// given an id (KIP-394), or told that another broker has the group.
func joinGroup(ctx context.Context, as *kgo.Client, broker int32, group string) error {
	request := kmsg.NewJoinGroupRequest()
	request.Group, request.ProtocolType, request.SessionTimeoutMillis, request.RebalanceTimeoutMillis = group, "consumer", 10_000, 10_000
	protocol := kmsg.NewJoinGroupRequestProtocol()
	protocol.Name = "range"
	request.Protocols = append(request.Protocols, protocol)
	answer, err := as.Broker(int(broker)).Request(ctx, &request)
	if err != nil {
		return fmt.Errorf("join: %w", err)
	}
	return kerr.ErrorForCode(answer.(*kmsg.JoinGroupResponse).ErrorCode)
}
