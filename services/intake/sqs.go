package intake

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"regexp"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/sqs"
	"github.com/aws/aws-sdk-go-v2/service/sqs/types"
)

// SQSPull is a queue of Amazon SQS into which EventBridge, or SNS, puts ECR's
// events. Credentials are found as AWS' own programs find them: environment,
// files, web identity, the instance's role.
type SQSPull struct {
	QueueURL string `yaml:"queueURL"`
	Region   string `yaml:"region"`   // default: the one in the queue's URL
	Endpoint string `yaml:"endpoint"` // URL of a private endpoint; default: AWS' own
	// Concurrency is how many messages are in work at once; default 10.
	Concurrency int `yaml:"concurrency"`
	// Visibility is for how long a message is hidden from others; it is extended
	// while the message is in work. Default 30s.
	Visibility time.Duration `yaml:"visibility"`
}

const (
	sqsConcurrency = 10
	sqsVisibility  = 30 * time.Second
	sqsWait        = 20 * time.Second // of long polling, the most there is
	sqsBatch       = 10               // messages a call, the most there is
	sqsCall        = 10 * time.Second // for any other call
)

var sqsHost = regexp.MustCompile(`^sqs\.([a-z0-9-]+)\.`)

func (c SQSPull) validate() error {
	u, err := url.Parse(c.QueueURL)
	switch {
	case err != nil || u.Host == "" || u.User != nil || u.Scheme != "https" && u.Scheme != "http":
		return errors.New("pull.sqs.queueURL is not the URL of a queue")
	case c.region() == "":
		return errors.New("pull.sqs.region is missing: the queue's URL does not name it")
	case c.Concurrency < 0 || c.Concurrency > 1000:
		return fmt.Errorf("pull.sqs.concurrency %d is not 1 to 1000", c.Concurrency)
	case c.Visibility != 0 && (c.Visibility < 5*time.Second || c.Visibility > 12*time.Hour):
		return fmt.Errorf("pull.sqs.visibility %s is not 5s to 12h", c.Visibility)
	}
	if c.Endpoint != "" {
		if err := secureURL(c.Endpoint); err != nil {
			return fmt.Errorf("pull.sqs.endpoint: %w", err)
		}
	} else if err := secureURL(c.QueueURL); err != nil {
		return fmt.Errorf("pull.sqs.queueURL: %w", err)
	}
	return nil
}

func (c SQSPull) region() string {
	if c.Region != "" {
		return c.Region
	}
	if u, err := url.Parse(c.QueueURL); err == nil {
		if m := sqsHost.FindStringSubmatch(u.Hostname()); m != nil {
			return m[1]
		}
	}
	return ""
}

type sqsPoller struct {
	client     *sqs.Client
	queue      string
	slots      chan struct{} // one for each message in work
	visibility time.Duration
	log        *slog.Logger
}

func newSQS(ctx context.Context, c SQSPull, log *slog.Logger) (*sqsPoller, error) {
	// AWS' own client, because it also honours what AWS' environment variables say of certificates.
	client := awshttp.NewBuildableClient().WithTransportOptions(func(t *http.Transport) {
		t.ResponseHeaderTimeout = sqsWait + sqsCall
		t.IdleConnTimeout = 30 * time.Second
	})
	loaded, err := config.LoadDefaultConfig(ctx, config.WithRegion(c.region()), config.WithHTTPClient(client))
	if err != nil {
		return nil, fmt.Errorf("set up AWS: %w", err)
	}
	p := &sqsPoller{
		client: sqs.NewFromConfig(loaded, func(o *sqs.Options) {
			if c.Endpoint != "" {
				o.BaseEndpoint = aws.String(c.Endpoint)
			}
		}),
		queue: c.QueueURL, visibility: c.Visibility, log: log,
		slots: make(chan struct{}, max(c.Concurrency, 0)),
	}
	if c.Concurrency == 0 {
		p.slots = make(chan struct{}, sqsConcurrency)
	}
	if p.visibility == 0 {
		p.visibility = sqsVisibility
	}
	return p, nil
}

// poll fetches messages as there are free slots, so that none waits hidden in memory.
func (p *sqsPoller) poll(ctx context.Context, take func(context.Context, http.Header, []byte) bool, working func()) error {
	var inWork sync.WaitGroup
	defer inWork.Wait()
	for {
		free := p.acquire(ctx)
		if free == 0 {
			return ctx.Err()
		}
		messages, err := p.receive(ctx, free)
		for range free - len(messages) {
			<-p.slots
		}
		if err != nil {
			return fmt.Errorf("receive from SQS: %w", err)
		}
		working()
		for _, m := range messages {
			inWork.Go(func() {
				defer func() { <-p.slots }()
				p.handle(ctx, m, take)
			})
		}
	}
}

// acquire waits for a free slot and takes what is free, at most a batch; 0 when
// ctx has ended.
func (p *sqsPoller) acquire(ctx context.Context) int {
	select {
	case p.slots <- struct{}{}:
	case <-ctx.Done():
		return 0
	}
	taken := 1
	for taken < sqsBatch {
		select {
		case p.slots <- struct{}{}:
			taken++
			continue
		default:
		}
		break
	}
	if ctx.Err() != nil {
		for range taken {
			<-p.slots
		}
		return 0
	}
	return taken
}

func (p *sqsPoller) receive(ctx context.Context, limit int) ([]types.Message, error) {
	ctx, cancel := context.WithTimeout(ctx, sqsWait+sqsCall)
	defer cancel()
	out, err := p.client.ReceiveMessage(ctx, &sqs.ReceiveMessageInput{
		QueueUrl: &p.queue, MaxNumberOfMessages: int32(limit), //nolint:gosec // at most sqsBatch
		WaitTimeSeconds: int32(sqsWait / time.Second), VisibilityTimeout: p.seconds(),
	})
	if err != nil {
		return nil, err
	}
	return out.Messages, nil
}

func (p *sqsPoller) seconds() int32 { return int32(p.visibility / time.Second) } //nolint:gosec // at most 12 hours

// handle takes one message until it is stored, and only then deletes it. While
// it cannot be stored the message stays hidden and the slot taken: giving it back
// would count against the queue's own dead letter policy. When ctx ends it is
// given back at once.
func (p *sqsPoller) handle(ctx context.Context, m types.Message, take func(context.Context, http.Header, []byte) bool) {
	held, stop := context.WithCancel(ctx)
	extended := make(chan struct{})
	go func() {
		defer close(extended)
		p.extend(held, m)
	}()
	stored := take(ctx, http.Header{}, []byte(aws.ToString(m.Body)))
	for pause := pullPauseMin; !stored && ctx.Err() == nil; pause = min(2*pause, pullPauseMax) {
		sleep(ctx, pause)
		if ctx.Err() == nil {
			stored = take(ctx, http.Header{}, []byte(aws.ToString(m.Body)))
		}
	}
	stop()
	<-extended
	// ctx may have ended; the queue is told all the same.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), sqsCall)
	defer cancel()
	var err error
	if stored {
		_, err = p.client.DeleteMessage(ctx, &sqs.DeleteMessageInput{QueueUrl: &p.queue, ReceiptHandle: m.ReceiptHandle})
	} else {
		_, err = p.client.ChangeMessageVisibility(ctx, &sqs.ChangeMessageVisibilityInput{
			QueueUrl: &p.queue, ReceiptHandle: m.ReceiptHandle, VisibilityTimeout: 0,
		})
	}
	if err != nil { // it will come again, and be known
		p.log.WarnContext(ctx, "message of SQS was not removed", "message", aws.ToString(m.MessageId), "stored", stored, "error", err)
	}
}

// extend keeps a message hidden until ctx ends.
func (p *sqsPoller) extend(ctx context.Context, m types.Message) {
	ticker := time.NewTicker(p.visibility / 3)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		_, err := p.client.ChangeMessageVisibility(ctx, &sqs.ChangeMessageVisibilityInput{
			QueueUrl: &p.queue, ReceiptHandle: m.ReceiptHandle, VisibilityTimeout: p.seconds(),
		})
		if err != nil && ctx.Err() == nil {
			p.log.WarnContext(ctx, "message of SQS was not kept hidden", "message", aws.ToString(m.MessageId), "error", err)
		}
	}
}
