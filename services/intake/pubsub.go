package intake

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"regexp"
	"sync"
	"time"

	"cloud.google.com/go/pubsub/v2"
	"cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"google.golang.org/api/option"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/tidewaiter/tidewaiter/services/intake/hook"
)

// PubSubPull is a subscription to the topic "gcr" of Google Artifact Registry.
// Credentials are Google's application default ones: the file that
// GOOGLE_APPLICATION_CREDENTIALS names, workload identity, the instance's account.
type PubSubPull struct {
	Subscription string `yaml:"subscription"` // projects/<project>/subscriptions/<name>
	Endpoint     string `yaml:"endpoint"`     // host:port of a private endpoint; default: Google's own
	// Plaintext is for emulators on this machine: neither TLS nor credentials.
	Plaintext bool `yaml:"plaintext"`
	// Concurrency is how many messages are in work at once; default 10.
	Concurrency int `yaml:"concurrency"`
}

const (
	pubsubConcurrency = 10
	pubsubProbeEvery  = 30 * time.Second
	pubsubProbeWithin = 10 * time.Second
	pubsubBytes       = 64 << 20         // of messages in work
	pubsubExtension   = 10 * time.Minute // for which a message in work is kept from others
)

var (
	pubsubName  = regexp.MustCompile(`^projects/([a-z0-9][a-z0-9.:-]*)/subscriptions/[A-Za-z][A-Za-z0-9._~+%-]{2,254}$`)
	pubsubLocal = regexp.MustCompile(`^(?:127\.0\.0\.1|localhost|\[::1\]):[0-9]{1,5}$`)
	pubsubHost  = regexp.MustCompile(`^[A-Za-z0-9.-]+:[0-9]{1,5}$|^\[[0-9a-fA-F:]+\]:[0-9]{1,5}$`)
)

func (c PubSubPull) validate() error {
	switch {
	case !pubsubName.MatchString(c.Subscription):
		return fmt.Errorf("pull.pubsub.subscription %q is not projects/<project>/subscriptions/<name>", c.Subscription)
	case c.Endpoint != "" && !pubsubHost.MatchString(c.Endpoint):
		return fmt.Errorf("pull.pubsub.endpoint %q is not host:port", c.Endpoint)
	case c.Plaintext && !pubsubLocal.MatchString(c.Endpoint):
		return errors.New("pull.pubsub.plaintext is for an endpoint on this machine")
	case c.Concurrency < 0 || c.Concurrency > 1000:
		return fmt.Errorf("pull.pubsub.concurrency %d is not 1 to 1000", c.Concurrency)
	}
	return nil
}

type pubsubPoller struct {
	PubSubPull
	client *pubsub.Client
	log    *slog.Logger
}

func newPubSub(ctx context.Context, c PubSubPull, log *slog.Logger) (*pubsubPoller, error) {
	var options []option.ClientOption
	if c.Endpoint != "" {
		options = append(options, option.WithEndpoint(c.Endpoint))
	}
	if c.Plaintext {
		options = append(options, option.WithoutAuthentication(), option.WithTelemetryDisabled(),
			option.WithGRPCDialOption(grpc.WithTransportCredentials(insecure.NewCredentials())))
	}
	client, err := pubsub.NewClient(ctx, pubsubName.FindStringSubmatch(c.Subscription)[1], options...)
	if err != nil {
		return nil, fmt.Errorf("set up Pub/Sub: %w", err)
	}
	return &pubsubPoller{PubSubPull: c, client: client, log: log}, nil
}

func (p *pubsubPoller) poll(ctx context.Context, take func(context.Context, http.Header, []byte) bool, working func()) error {
	defer func() {
		if err := p.client.Close(); err != nil {
			p.log.WarnContext(ctx, "connection to Pub/Sub was not closed", "error", err)
		}
	}()
	if err := p.probe(ctx); err != nil {
		return err
	}
	working()
	receiving, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var probing sync.WaitGroup
	probing.Go(func() { stop(p.keepProbing(receiving)) })
	defer probing.Wait()
	defer stop(nil)
	s := p.client.Subscriber(p.Subscription)
	s.ReceiveSettings.MaxOutstandingMessages = p.Concurrency
	if p.Concurrency == 0 {
		s.ReceiveSettings.MaxOutstandingMessages = pubsubConcurrency
	}
	s.ReceiveSettings.MaxOutstandingBytes = pubsubBytes
	s.ReceiveSettings.MaxExtension = pubsubExtension
	err := s.Receive(receiving, func(ctx context.Context, m *pubsub.Message) {
		h := http.Header{}
		h.Set(hook.PubSubMessageID, m.ID)
		h.Set(hook.PubSubPublishTime, m.PublishTime.UTC().Format(time.RFC3339Nano))
		if take(ctx, h, m.Data) {
			m.Ack()
			return
		}
		sleep(ctx, pullPauseMin) // Pub/Sub sends it again at once
		m.Nack()
	})
	if err != nil {
		return fmt.Errorf("receive from Pub/Sub: %w", err)
	}
	return context.Cause(receiving)
}

// probe asks for the subscription. Whether it may be looked at does not matter,
// only that it can be: who pulls need not have that right.
func (p *pubsubPoller) probe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, pubsubProbeWithin)
	defer cancel()
	_, err := p.client.SubscriptionAdminClient.GetSubscription(ctx, &pubsubpb.GetSubscriptionRequest{Subscription: p.Subscription})
	if err != nil && status.Code(err) != codes.PermissionDenied {
		return fmt.Errorf("look at the subscription: %w", err)
	}
	return nil
}

// keepProbing returns why Pub/Sub cannot be reached any more, which its client
// does not tell: it tries for ever.
func (p *pubsubPoller) keepProbing(ctx context.Context) error {
	ticker := time.NewTicker(pubsubProbeEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
		if err := p.probe(ctx); err != nil {
			return err
		}
	}
}
