package access_test

import (
	"context"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
	"github.com/twmb/franz-go/pkg/sasl/scram"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/services/assembler"
	"github.com/tidewaiter/tidewaiter/services/catalog"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/access"
)

// The table names the events that each service's source names, and no others.
func TestTheTableIsWhatServicesUse(t *testing.T) {
	used := regexp.MustCompile(`\bcontracts\.([A-Z][A-Za-z]*V1)\b`)
	byIdentifier := map[string]string{} // ImagePushedV1: image.pushed.v1
	for _, k := range contracts.Events() {
		var identifier string
		for part := range strings.SplitSeq(k.Name, ".") {
			identifier += strings.ToUpper(part[:1]) + part[1:]
		}
		byIdentifier[identifier] = k.Name
	}
	for _, s := range access.Services() {
		files, err := filepath.Glob(filepath.Join("..", "..", s.Name, "*.go"))
		if err != nil || len(files) == 0 {
			t.Fatalf("%s has no source: %v", s.Name, err)
		}
		found := map[string]bool{}
		for _, name := range files {
			if strings.HasSuffix(name, "_test.go") {
				continue
			}
			source, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range used.FindAllStringSubmatch(string(source), -1) {
				if event, ok := byIdentifier[m[1]]; ok {
					found[event] = true
				}
			}
		}
		table := map[string]bool{}
		for _, e := range slices.Concat(s.Reads, s.Writes, s.Tails, s.DeadLetters) {
			table[e] = true
		}
		if !maps.Equal(found, table) {
			t.Errorf("%s uses %v, the table says %v", s.Name, slices.Sorted(maps.Keys(found)), slices.Sorted(maps.Keys(table)))
		}
	}
	for name, consumed := range map[string][]string{"catalog": catalog.Consumes(), "assembler": assembler.Consumes()} {
		s, _ := access.Find(name)
		if got, want := sorted(s.Reads), sorted(consumed); !slices.Equal(got, want) {
			t.Errorf("%s reads %v, the table says %v", name, want, got)
		}
	}
}

func sorted(list []string) []string { return slices.Sorted(slices.Values(list)) }

// In a Kafka where each service may do what the table says, and topics are
// there already, each finds its topics, joins its group and sends its events;
// and is refused what is another's.
func TestEachServiceMayDoItsWorkInKafkaAndNothingElse(t *testing.T) {
	const password = "a password"
	options := []kfake.Opt{
		kfake.NumBrokers(1), kfake.EnableSASL(), kfake.EnableACLs(), kfake.Superuser(bus.ScramSHA512, "admin", password),
	}
	names := access.Names{Prefix: "tw."}
	for _, s := range access.Services() {
		var acls []kfake.ACL
		for _, g := range s.Kafka(names.Prefix) {
			for _, o := range g.Operations {
				acl := kfake.ACL{Resource: kmsg.ACLResourceTypeTopic, Name: g.Name, Pattern: kmsg.ACLResourcePatternTypeLiteral, Operation: kmsg.ACLOperationRead, Allow: true}
				if g.Kind == access.Group {
					acl.Resource = kmsg.ACLResourceTypeGroup
				}
				if o == "Write" {
					acl.Operation = kmsg.ACLOperationWrite
				}
				acls = append(acls, acl)
			}
		}
		options = append(options, kfake.User(bus.ScramSHA512, "tidewaiter-"+s.Name, password, acls...))
	}
	cluster, err := kfake.NewCluster(options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cluster.Close)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	open := func(user, service string) *bus.Bus {
		b, err := bus.New(bus.Config{Brokers: cluster.ListenAddrs(), Prefix: names.Prefix, Username: user, Password: password, Partitions: 1}, service, slog.New(slog.DiscardHandler), nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = b.Close() })
		return b
	}

	early := open("tidewaiter-planner", "planner")
	if err := early.EnsureTopics(ctx, contracts.ImagePushedV1); err == nil || !strings.Contains(err.Error(), "tidewaiter privileges kafka") {
		t.Errorf("before there are topics: %v", err)
	}

	for _, s := range access.Services() { // as an administrator would: each service's own, with its retries and dead letters
		admin := open("admin", s.Name)
		if err := admin.EnsureTopics(ctx, slices.Concat(s.Reads, s.Writes, s.Tails)...); err != nil {
			t.Fatal(err)
		}
		if len(s.Reads) > 0 {
			join(ctx, t, admin, s)
		}
		dead(ctx, t, admin, s)
	}
	for _, s := range access.Services() {
		b := open("tidewaiter-"+s.Name, s.Name)
		if err := b.EnsureTopics(ctx, slices.Concat(s.Reads, s.Writes, s.Tails)...); err != nil {
			t.Errorf("%s: its topics: %v", s.Name, err)
		}
		if len(s.Reads) > 0 {
			join(ctx, t, b, s)
		}
		dead(ctx, t, b, s)
		var own []string
		for _, g := range s.Topics(names.Prefix) {
			own = append(own, g.Name)
		}
		if seen := visible(ctx, t, cluster.ListenAddrs(), "tidewaiter-"+s.Name, password); !slices.Equal(seen, own) {
			t.Errorf("%s sees %v, its own are %v", s.Name, seen, own)
		}
		for _, k := range contracts.Events() {
			mine := slices.ContainsFunc(s.Writes, func(e string) bool { return topicOf(e) == k.Topic })
			if !mine && !slices.Contains(own, names.Prefix+k.Topic) {
				continue // it does not even see it
			}
			err := b.Publish(ctx, newEvent(t, k.Name))
			switch {
			case mine && err != nil:
				t.Errorf("%s may not send %s: %v", s.Name, k.Name, err)
			case !mine && (err == nil || !strings.Contains(err.Error(), "Topic Authorization Failed")):
				t.Errorf("%s sends %s, which it only reads: %v", s.Name, k.Name, err)
			}
		}
	}
	short, stop := context.WithTimeout(ctx, time.Second)
	defer stop()
	if err := open("tidewaiter-planner", "planner").Publish(short, newEvent(t, contracts.ImageAttestedV1)); err == nil {
		t.Error("planner said that an image is attested")
	}
}

// dead sends what cannot be read to the dead letters that a service writes.
func dead(ctx context.Context, t *testing.T, b *bus.Bus, s access.Service) {
	t.Helper()
	for _, e := range s.DeadLetters {
		if err := b.PublishDeadLetter(ctx, e, "not JSON", []byte("x"), nil); err != nil {
			t.Errorf("%s: dead letter of %s: %v", s.Name, e, err)
		}
	}
}

func newEvent(t *testing.T, name string) event.Event {
	t.Helper()
	ev, err := bus.NewEvent(name, "subject", map[string]any{})
	if err != nil {
		t.Fatal(err)
	}
	return ev
}

// visible returns the topics that a user sees.
func visible(ctx context.Context, t *testing.T, brokers []string, user, password string) []string {
	t.Helper()
	client, err := kgo.NewClient(kgo.SeedBrokers(brokers...), kgo.SASL(scram.Auth{User: user, Pass: password}.AsSha512Mechanism()))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	request := kmsg.NewPtrMetadataRequest() // nil topics: all
	answer, err := request.RequestWith(ctx, client)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, topic := range answer.Topics {
		if topic.ErrorCode == 0 {
			out = append(out, *topic.Topic)
		}
	}
	slices.Sort(out)
	return out
}

func topicOf(name string) string {
	for _, k := range contracts.Events() {
		if k.Name == name {
			return k.Topic
		}
	}
	return ""
}

// join consumes until the service has its partitions.
func join(ctx context.Context, t *testing.T, b *bus.Bus, s access.Service) {
	t.Helper()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	done := make(chan error, 1)
	go func() {
		done <- b.Consume(ctx, bus.Subscription{Events: s.Reads, Handler: func(context.Context, event.Event) ([]event.Event, error) { return nil, nil }})
	}()
	for !b.Joined() {
		select {
		case err := <-done:
			t.Errorf("%s cannot consume: %v", s.Name, err)
			return
		case <-ctx.Done():
			t.Errorf("%s did not get its partitions: %v", s.Name, b.Ready())
			return
		case <-time.After(10 * time.Millisecond):
		}
	}
	stop()
	if err := <-done; err != nil {
		t.Errorf("%s: %v", s.Name, err)
	}
}
