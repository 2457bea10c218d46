// Package accesstest does on a real Kafka of a test what `tidewaiter privileges
// kafka` prints: Kafka's own tools would start a JVM for each line of it.
package accesstest

import (
	"context"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha512"
	"crypto/tls"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
	"github.com/twmb/franz-go/pkg/kversion"
	"github.com/twmb/franz-go/pkg/sasl/scram"
)

// Client connects to Kafka as a user with SCRAM-SHA-512, over TLS unless it is nil.
func Client(brokers []string, config *tls.Config, user, password string) (*kgo.Client, error) {
	options := []kgo.Opt{
		kgo.SeedBrokers(brokers...), kgo.SASL(scram.Auth{User: user, Pass: password}.AsSha512Mechanism()),
		kgo.MaxVersions(kversion.V3_0_0()), // later ones call topics by ids, which who may not see them does not learn
	}
	if config != nil {
		options = append(options, kgo.DialTLSConfig(config))
	}
	c, err := kgo.NewClient(options...)
	if err != nil {
		return nil, fmt.Errorf("kafka as %s: %w", user, err)
	}
	return c, nil
}

// Users makes users with a password, or gives them another one (KIP-554).
func Users(ctx context.Context, admin *kgo.Client, password string, users ...string) error {
	const (
		scramSHA512 = 2
		iterations  = 4096
	)
	request := kmsg.NewAlterUserSCRAMCredentialsRequest()
	for _, user := range users {
		upsert := kmsg.NewAlterUserSCRAMCredentialsRequestUpsertion()
		upsert.Name, upsert.Mechanism, upsert.Iterations, upsert.Salt = user, scramSHA512, iterations, []byte(rand.Text())
		var err error
		if upsert.SaltedPassword, err = pbkdf2.Key(sha512.New, password, upsert.Salt, iterations, sha512.Size); err != nil {
			return fmt.Errorf("salt a password: %w", err)
		}
		request.Upsertions = append(request.Upsertions, upsert)
	}
	answer, err := request.RequestWith(ctx, admin)
	if err != nil {
		return fmt.Errorf("make users: %w", err)
	}
	for _, r := range answer.Results {
		if err := kerr.ErrorForCode(r.ErrorCode); err != nil {
			return fmt.Errorf("make user %s: %w", r.User, err)
		}
	}
	return nil
}

// Run does what the script's lines topic and allow ask for, and returns when
// every broker knows it. It may be run again.
func Run(ctx context.Context, admin *kgo.Client, script string) error {
	topics, acls := kmsg.NewCreateTopicsRequest(), kmsg.NewCreateACLsRequest()
	topics.TimeoutMillis = 60_000
	for line := range strings.Lines(script) {
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		switch words[0] {
		case "topic":
			topic, err := topicOf(words[1:])
			if err != nil {
				return fmt.Errorf("%s: %w", line, err)
			}
			topics.Topics = append(topics.Topics, topic)
		case "allow":
			allowed, err := aclsOf(words[1:])
			if err != nil {
				return fmt.Errorf("%s: %w", line, err)
			}
			acls.Creations = append(acls.Creations, allowed...)
		}
	}
	if len(topics.Topics) == 0 || len(acls.Creations) == 0 {
		return fmt.Errorf("the script makes %d topics and %d permissions", len(topics.Topics), len(acls.Creations))
	}
	made, err := topics.RequestWith(ctx, admin)
	if err != nil {
		return fmt.Errorf("make topics: %w", err)
	}
	for _, t := range made.Topics {
		if err := kerr.ErrorForCode(t.ErrorCode); err != nil && !errors.Is(err, kerr.TopicAlreadyExists) {
			return fmt.Errorf("make topic %s: %w", t.Topic, err)
		}
	}
	allowed, err := acls.RequestWith(ctx, admin)
	if err != nil {
		return fmt.Errorf("make permissions: %w", err)
	}
	for i, r := range allowed.Results {
		if err := kerr.ErrorForCode(r.ErrorCode); err != nil {
			return fmt.Errorf("allow %s %s: %w", acls.Creations[i].Principal, acls.Creations[i].ResourceName, err)
		}
	}
	return known(ctx, admin, acls.Creations[len(acls.Creations)-1])
}

func topicOf(words []string) (kmsg.CreateTopicsRequestTopic, error) {
	t := kmsg.NewCreateTopicsRequestTopic()
	if len(words)%2 != 1 {
		return t, errors.New("want a name, then pairs")
	}
	t.Topic = words[0]
	for i := 1; i < len(words); i += 2 {
		value := words[i+1]
		switch words[i] {
		case "--partitions", "--replication-factor":
			n, err := strconv.ParseInt(value, 10, 16)
			if err != nil {
				return t, fmt.Errorf("%s: %w", words[i], err)
			}
			if words[i] == "--partitions" {
				t.NumPartitions = int32(n)
			} else {
				t.ReplicationFactor = int16(n)
			}
		case "--config":
			c := kmsg.NewCreateTopicsRequestTopicConfig()
			name, v, _ := strings.Cut(value, "=")
			c.Name, c.Value = name, &v
			t.Configs = append(t.Configs, c)
		default:
			return t, fmt.Errorf("unknown option %s", words[i])
		}
	}
	return t, nil
}

func aclsOf(words []string) ([]kmsg.CreateACLsRequestCreation, error) {
	if len(words)%2 != 0 {
		return nil, errors.New("want pairs")
	}
	one := kmsg.NewCreateACLsRequestCreation()
	one.Host, one.PermissionType, one.ResourcePatternType = "*", kmsg.ACLPermissionTypeAllow, kmsg.ACLResourcePatternTypeLiteral
	var out []kmsg.CreateACLsRequestCreation
	for i := 0; i < len(words); i += 2 {
		value := words[i+1]
		switch words[i] {
		case "--allow-principal":
			one.Principal = value
		case "--topic":
			one.ResourceType, one.ResourceName = kmsg.ACLResourceTypeTopic, value
		case "--group":
			one.ResourceType, one.ResourceName = kmsg.ACLResourceTypeGroup, value
		case "--operation":
			operation, err := kmsg.ParseACLOperation(value)
			if err != nil {
				return nil, fmt.Errorf("operation %s: %w", value, err)
			}
			one.Operation = operation
			out = append(out, one)
		default:
			return nil, fmt.Errorf("unknown option %s", words[i])
		}
	}
	if len(out) == 0 {
		return nil, errors.New("no operation")
	}
	return out, nil
}

// known waits until each broker knows the permission that was made last, and so
// all that was made before.
func known(ctx context.Context, admin *kgo.Client, last kmsg.CreateACLsRequestCreation) error {
	metadata := kmsg.NewMetadataRequest()
	metadata.Topics = []kmsg.MetadataRequestTopic{} // none
	brokers, err := metadata.RequestWith(ctx, admin)
	if err != nil {
		return fmt.Errorf("list brokers: %w", err)
	}
	ask := kmsg.NewDescribeACLsRequest()
	ask.ResourceType, ask.ResourceName, ask.ResourcePatternType = last.ResourceType, &last.ResourceName, last.ResourcePatternType
	ask.Principal, ask.Operation, ask.PermissionType = &last.Principal, last.Operation, last.PermissionType
	for _, b := range brokers.Brokers {
		for {
			answer, err := admin.Broker(int(b.NodeID)).Request(ctx, &ask)
			if err != nil {
				return fmt.Errorf("ask broker %d for permissions: %w", b.NodeID, err)
			}
			if described, ok := answer.(*kmsg.DescribeACLsResponse); ok && len(described.Resources) > 0 {
				break
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("broker %d does not know of %s: %w", b.NodeID, last.ResourceName, ctx.Err())
			case <-time.After(20 * time.Millisecond):
			}
		}
	}
	return nil
}
