package intake

import (
	"context"
	"crypto/md5"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cloud.google.com/go/pubsub/v2"
	"cloud.google.com/go/pubsub/v2/apiv1/pubsubpb"
	"cloud.google.com/go/pubsub/v2/pstest"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/api/option"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// tug is intake with sources that are pulled.
type tug struct {
	s    *Intake
	out  *memory
	down atomic.Bool // Kafka
	stop func()      // and wait for the pollers

	mu    sync.Mutex
	notes map[string]error
	calls []delivery
}

func (p *tug) note(what string, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.notes[what] = err
}

func (p *tug) noted(what string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.notes[what]
}

// remembered counts the deliveries with a reason.
func (p *tug) remembered(reason string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for _, d := range p.calls {
		if d.reason == reason {
			n++
		}
	}
	return n
}

// stored returns how many events and dead letters are stored.
func (p *tug) stored() (events, letters int) {
	p.out.mu.Lock()
	defer p.out.mu.Unlock()
	return len(p.out.events), len(p.out.letters)
}

func pulling(t *testing.T, src Source) *tug {
	t.Helper()
	p := &tug{out: &memory{}, notes: map[string]error{}}
	p.out.fail = func(context.Context) error {
		if p.down.Load() {
			return errors.New("Kafka is away")
		}
		return nil
	}
	s, err := New(DefaultConfig(), Sources{"queue": src, "hook": openSource()}, p.out, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	p.s = s
	s.record = func(d delivery) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.calls = append(p.calls, d)
	}
	ctx, cancel := context.WithCancel(context.Background())
	pollers := pulls{s: s, note: p.note}
	pollers.start(ctx)
	p.stop = sync.OnceFunc(func() {
		cancel()
		pollers.done.Wait()
	})
	t.Cleanup(p.stop)
	return p
}

const (
	testSubscription = "projects/p/subscriptions/scanner"
	pulledNote       = Name + " pulls source queue"
)

// google is Pub/Sub in this process.
type google struct {
	server *pstest.Server
	client *pubsub.Client
}

func newGoogle(t *testing.T) *google {
	t.Helper()
	g := &google{server: pstest.NewServer()}
	t.Cleanup(func() {
		if err := g.server.Close(); err != nil {
			t.Error(err)
		}
	})
	client, err := pubsub.NewClient(t.Context(), "p", option.WithEndpoint(g.server.Addr), option.WithoutAuthentication(), option.WithTelemetryDisabled(),
		option.WithGRPCDialOption(grpc.WithTransportCredentials(insecure.NewCredentials())))
	if err != nil {
		t.Fatal(err)
	}
	g.client = client
	t.Cleanup(func() {
		if err := client.Close(); err != nil {
			t.Error(err)
		}
	})
	if _, err := client.TopicAdminClient.CreateTopic(t.Context(), &pubsubpb.Topic{Name: "projects/p/topics/gcr"}); err != nil {
		t.Fatal(err)
	}
	return g
}

func (g *google) subscribe(t *testing.T) {
	t.Helper()
	_, err := g.client.SubscriptionAdminClient.CreateSubscription(t.Context(), &pubsubpb.Subscription{
		Name: testSubscription, Topic: "projects/p/topics/gcr", AckDeadlineSeconds: 10,
	})
	if err != nil {
		t.Fatal(err)
	}
}

func (g *google) source() Source {
	return Source{Kind: "gar", AnyRegistry: true, Pull: &Pull{PubSub: &PubSubPull{
		Subscription: testSubscription, Endpoint: g.server.Addr, Plaintext: true, Concurrency: 3,
	}}}
}

func (g *google) publish(data string) string {
	return g.server.Publish("projects/p/topics/gcr", []byte(data), nil)
}

func (g *google) acked(id string) bool { return g.server.Message(id).Acks > 0 }

func TestPullPubSub(t *testing.T) {
	g := newGoogle(t)
	g.subscribe(t)
	p := pulling(t, g.source())
	id := g.publish(`{"action":"INSERT","digest":"eu.gcr.io/p/app@` + testDigest + `","tag":"eu.gcr.io/p/app:1"}`)
	eventually(t, "stored and acknowledged", func() bool { return g.acked(id) })
	pushes := p.out.pushes(t)
	if len(pushes) != 1 || pushes[0].Registry != "eu.gcr.io" || pushes[0].Repository != "p/app" || pushes[0].Tag != "1" || pushes[0].DeliveryID != id ||
		pushes[0].OccurredAt == nil {
		t.Errorf("got %+v, want the push with its message's id and time", pushes)
	}

	// What nobody can read does not come again.
	poison := g.publish("hello")
	eventually(t, "poison acknowledged", func() bool { return g.acked(poison) })
	if _, letters := p.stored(); letters != 1 {
		t.Errorf("%d dead letters, want 1", letters)
	}
	large := g.publish(`"` + strings.Repeat("x", DefaultMaxBody) + `"`)
	eventually(t, "large message acknowledged", func() bool { return g.acked(large) })
	if _, letters := p.stored(); letters != 2 || len(p.out.letters[1].body) != maxBuried {
		t.Errorf("%d dead letters, the last of %d bytes", letters, len(p.out.letters[1].body))
	}
	if p.remembered(reasonStored) != 1 || p.remembered(reasonUnreadable) != 1 || p.remembered(reasonTooLarge) != 1 {
		t.Errorf("remembered %+v", p.calls)
	}
	if got := testutil.ToFloat64(p.s.metrics.pulled.WithLabelValues("queue", reasonStored)); got != 1 {
		t.Errorf("counted %v stored messages", got)
	}
}

// TestPullPubSubOutage: while Kafka is away nothing is acknowledged, and nothing
// is lost or doubled when it is back.
func TestPullPubSubOutage(t *testing.T) {
	g := newGoogle(t)
	g.subscribe(t)
	p := pulling(t, g.source())
	p.down.Store(true)
	var ids []string
	for i := range 8 { // more than may be in work at once
		ids = append(ids, g.publish(fmt.Sprintf(`{"action":"INSERT","tag":"eu.gcr.io/p/app:%d"}`, i)))
	}
	eventually(t, "tried again", func() bool { return p.remembered(reasonNotStored) > len(ids) })
	for _, id := range ids {
		if g.acked(id) {
			t.Fatal("a message that is not stored was acknowledged")
		}
	}
	p.down.Store(false)
	for _, id := range ids {
		eventually(t, "acknowledged", func() bool { return g.acked(id) })
	}
	if events, letters := p.stored(); events != len(ids) || letters != 0 {
		t.Errorf("%d events and %d letters, want %d and 0", events, letters, len(ids))
	}
}

// TestPullTrouble: a subscription that is not there shows, webhooks go on, and
// when it is there it is pulled.
func TestPullTrouble(t *testing.T) {
	g := newGoogle(t)
	p := pulling(t, g.source())
	up := p.s.metrics.pullUp.WithLabelValues("queue")
	eventually(t, "trouble", func() bool { return p.noted(pulledNote) != nil })
	if err := p.noted(pulledNote); !strings.Contains(err.Error(), "subscription") || testutil.ToFloat64(up) != 0 {
		t.Errorf("noted %v", err)
	}
	if w := call(p.s, http.MethodPost, "/hooks/hook", nil, push("1", "a/b", "1")); w.Code != http.StatusAccepted {
		t.Errorf("a webhook meanwhile: got %d", w.Code)
	}
	if w := call(p.s, http.MethodPost, "/hooks/queue", nil, []byte(garPush)); w.Code != http.StatusNotFound {
		t.Errorf("a webhook of the source that is pulled: got %d, want 404", w.Code)
	}
	g.subscribe(t)
	eventually(t, "pulled", func() bool { return p.noted(pulledNote) == nil && testutil.ToFloat64(up) == 1 })
	id := g.publish(`{"action":"INSERT","tag":"eu.gcr.io/p/app:1"}`)
	eventually(t, "acknowledged", func() bool { return g.acked(id) })
}

// TestPullPubSubRights: who may pull need not be allowed to look.
func TestPullPubSubRights(t *testing.T) {
	server := pstest.NewServer(pstest.WithErrorInjection("GetSubscription", codes.PermissionDenied, "no"))
	t.Cleanup(func() { _ = server.Close() })
	p, err := newPubSub(t.Context(), PubSubPull{Subscription: testSubscription, Endpoint: server.Addr, Plaintext: true}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer p.client.Close() //nolint:errcheck // the test is over
	if err := p.probe(t.Context()); err != nil {
		t.Error(err)
	}
	if err := server.Close(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := p.probe(ctx); err == nil || status.Code(errors.Unwrap(err)) == codes.PermissionDenied {
		t.Errorf("a server that is gone: got %v", err)
	}
}

// queue is SQS as far as a poller sees it (JSON protocol of AWS).
type queue struct {
	url string

	mu       sync.Mutex
	waiting  []string // bodies
	given    int      // in the hands of pollers
	most     int      // of given
	asked    []int    // how many each call asked for
	extended int
	released int
	deleted  int
	refuse   bool
}

func newQueue(t *testing.T, bodies ...string) *queue {
	t.Helper()
	t.Setenv("AWS_ACCESS_KEY_ID", "AKIDTEST")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	q := &queue{waiting: bodies}
	server := httptest.NewServer(http.HandlerFunc(q.answer))
	t.Cleanup(server.Close)
	q.url = server.URL
	return q
}

func (q *queue) answer(w http.ResponseWriter, r *http.Request) {
	var in struct {
		MaxNumberOfMessages, VisibilityTimeout int
	}
	_ = json.NewDecoder(r.Body).Decode(&in)
	q.mu.Lock()
	defer q.mu.Unlock()
	w.Header().Set("Content-Type", "application/x-amz-json-1.0")
	if q.refuse {
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprint(w, `{"__type":"com.amazonaws.sqs#QueueDoesNotExist","message":"none"}`)
		return
	}
	switch strings.TrimPrefix(r.Header.Get("X-Amz-Target"), "AmazonSQS.") {
	case "ReceiveMessage":
		q.receive(w, r, in.MaxNumberOfMessages)
	case "DeleteMessage":
		q.deleted++
		q.given--
		fmt.Fprint(w, `{}`)
	case "ChangeMessageVisibility":
		if in.VisibilityTimeout == 0 {
			q.released++
			q.given--
		} else {
			q.extended++
		}
		fmt.Fprint(w, `{}`)
	}
}

// receive is called with the lock held, and waits without it.
func (q *queue) receive(w http.ResponseWriter, r *http.Request, limit int) {
	q.asked = append(q.asked, limit)
	if len(q.waiting) == 0 {
		q.mu.Unlock()
		sleep(r.Context(), 100*time.Millisecond)
		q.mu.Lock()
		fmt.Fprint(w, `{}`)
		return
	}
	type message struct{ MessageId, ReceiptHandle, Body, MD5OfBody string }
	var out struct{ Messages []message }
	for _, body := range q.waiting[:min(limit, len(q.waiting))] {
		sum := md5.Sum([]byte(body))
		out.Messages = append(out.Messages, message{"m", "r", body, hex.EncodeToString(sum[:])})
	}
	q.waiting = q.waiting[len(out.Messages):]
	q.given += len(out.Messages)
	q.most = max(q.most, q.given)
	_ = json.NewEncoder(w).Encode(out)
}

func (q *queue) see(f func() bool) func() bool {
	return func() bool {
		q.mu.Lock()
		defer q.mu.Unlock()
		return f()
	}
}

func (q *queue) source() Source {
	return Source{Kind: "ecr", AnyRegistry: true, Pull: &Pull{SQS: &SQSPull{
		QueueURL: q.url + "/210987654321/ecr", Region: "eu-central-1", Endpoint: q.url, Concurrency: 4, Visibility: 5 * time.Second,
	}}}
}

// TestPullSQSOutage: a message that cannot be stored is neither deleted nor given
// back: it is kept hidden, and deleted when it is stored.
func TestPullSQSOutage(t *testing.T) {
	q := newQueue(t, ecrPush("1"))
	p := pulling(t, q.source())
	p.down.Store(true)
	eventually(t, "kept hidden", q.see(func() bool { return q.extended > 0 }))
	if q.see(func() bool { return q.deleted+q.released != 0 })() || p.remembered(reasonNotStored) == 0 {
		t.Error("a message that is not stored was let go")
	}
	p.down.Store(false)
	eventually(t, "deleted", q.see(func() bool { return q.deleted == 1 }))
	if events, _ := p.stored(); events != 1 {
		t.Errorf("%d events, want 1", events)
	}
}

// TestPullSQSShutdown: what is not stored when intake ends goes back at once.
func TestPullSQSShutdown(t *testing.T) {
	q := newQueue(t, ecrPush("1"), ecrPush("2"))
	p := pulling(t, q.source())
	p.down.Store(true)
	eventually(t, "tried", func() bool { return p.remembered(reasonNotStored) >= 2 })
	p.stop()
	if !q.see(func() bool { return q.released == 2 && q.deleted == 0 })() {
		t.Errorf("%d given back and %d deleted, want 2 and 0", q.released, q.deleted)
	}
}

// TestPullSQSBound: no more messages are taken than may be in work, and each is
// deleted after it is stored.
func TestPullSQSBound(t *testing.T) {
	var bodies []string
	for i := range 40 {
		bodies = append(bodies, ecrPush(fmt.Sprint(i)))
	}
	bodies[7] = "poison"
	q := newQueue(t, bodies...)
	p := pulling(t, q.source())
	eventually(t, "all deleted", q.see(func() bool { return q.deleted == 40 }))
	p.stop()
	if q.most > 4 {
		t.Errorf("%d messages were in work at once, more than 4", q.most)
	}
	for _, n := range q.asked {
		if n < 1 || n > 4 {
			t.Errorf("a call asked for %d messages", n)
		}
	}
	if events, letters := p.stored(); events != 39 || letters != 1 {
		t.Errorf("%d events and %d letters, want 39 and 1", events, letters)
	}
}

func TestPullSQSTrouble(t *testing.T) {
	q := newQueue(t)
	q.refuse = true
	p := pulling(t, q.source())
	eventually(t, "trouble", func() bool { return p.noted(pulledNote) != nil })
	if err := p.noted(pulledNote); !strings.Contains(err.Error(), "receive from SQS") || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("noted %v", err)
	}
	q.mu.Lock()
	q.refuse, q.waiting = false, []string{ecrPush("1")}
	q.mu.Unlock()
	eventually(t, "pulled", q.see(func() bool { return q.deleted == 1 }))
	if err := p.noted(pulledNote); err != nil {
		t.Errorf("still noted: %v", err)
	}
}

func TestPullMistakes(t *testing.T) {
	sqsOf := func(c SQSPull) *Pull { return &Pull{SQS: &c} }
	pubsubOf := func(c PubSubPull) *Pull { return &Pull{PubSub: &c} }
	const queueURL = "https://sqs.eu-central-1.amazonaws.com/210987654321/ecr"
	for name, c := range map[string]struct {
		pull *Pull
		auth Auth
		want string // empty: it is right
	}{
		"SQS":                    {sqsOf(SQSPull{QueueURL: queueURL}), Auth{}, ""},
		"SQS in private":         {sqsOf(SQSPull{QueueURL: queueURL, Endpoint: "https://vpce-1.sqs.eu-central-1.vpce.amazonaws.com"}), Auth{}, ""},
		"Pub/Sub":                {pubsubOf(PubSubPull{Subscription: testSubscription}), Auth{}, ""},
		"neither":                {&Pull{}, Auth{}, "exactly one"},
		"both":                   {&Pull{SQS: &SQSPull{QueueURL: queueURL}, PubSub: &PubSubPull{Subscription: testSubscription}}, Auth{}, "exactly one"},
		"with auth":              {sqsOf(SQSPull{QueueURL: queueURL}), Auth{None: true}, "exclude each other"},
		"no queue":               {sqsOf(SQSPull{Region: "x"}), Auth{}, "queueURL"},
		"queue with a password":  {sqsOf(SQSPull{QueueURL: "https://a:b@sqs.eu-central-1.amazonaws.com/1/x"}), Auth{}, "queueURL"},
		"queue over HTTP":        {sqsOf(SQSPull{QueueURL: strings.Replace(queueURL, "https", "http", 1)}), Auth{}, "not https"},
		"no region":              {sqsOf(SQSPull{QueueURL: "https://queue.example/1/x"}), Auth{}, "region"},
		"endpoint over HTTP":     {sqsOf(SQSPull{QueueURL: queueURL, Endpoint: "http://queue.example"}), Auth{}, "endpoint"},
		"visibility too short":   {sqsOf(SQSPull{QueueURL: queueURL, Visibility: time.Second}), Auth{}, "visibility"},
		"concurrency below 0":    {sqsOf(SQSPull{QueueURL: queueURL, Concurrency: -1}), Auth{}, "concurrency"},
		"subscription by name":   {pubsubOf(PubSubPull{Subscription: "scanner"}), Auth{}, "subscription"},
		"endpoint without port":  {pubsubOf(PubSubPull{Subscription: testSubscription, Endpoint: "x"}), Auth{}, "endpoint"},
		"plaintext to elsewhere": {pubsubOf(PubSubPull{Subscription: testSubscription, Endpoint: "pubsub.example:443", Plaintext: true}), Auth{}, "this machine"},
		"too many at once":       {pubsubOf(PubSubPull{Subscription: testSubscription, Concurrency: 1001}), Auth{}, "concurrency"},
	} {
		err := Sources{"x": {Kind: "ecr", AnyRegistry: true, Auth: c.auth, Pull: c.pull}}.Validate()
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
	}
}
