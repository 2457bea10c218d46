package e2e

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/segmentio/kafka-go"
	"github.com/segmentio/kafka-go/sasl/scram"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/services/analyzer/worker"
	"github.com/tidewaiter/tidewaiter/services/attestor/statement"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/allinone"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/sample"
)

// measure asks for the measurements that `task bench` prints.
var count = flag.Int("count", 50, "images in the measured fleet")

var shared = flag.Int("shared", 180, "MB in the three layers that the measured fleet shares")

var measure = flag.Bool("measure", false, "print the measured figures beside the design's")

var chaos = flag.Bool("chaos", false, "run also the fault tests that take minutes (task chaos)")

// programs is where the tests build what they run as processes.
var programs string

func TestMain(m *testing.M) {
	worker.Main()
	os.Exit(runTests(m))
}

func runTests(m *testing.M) (code int) {
	var err error
	if programs, err = os.MkdirTemp("", "tidewaiter-e2e-"); err != nil {
		fmt.Fprintln(os.Stderr, "a folder for the programs:", err)
		return 1
	}
	defer func() {
		if err := os.RemoveAll(programs); err != nil {
			fmt.Fprintln(os.Stderr, "remove the programs:", err)
			code = 1
		}
	}()
	return m.Run()
}

// patience is how long a test waits for something to happen. It is no limit of
// the product: it only ends a test that would never end.
const patience = 3 * time.Minute

// system is a running pipeline and everything it has published.
type system struct {
	*allinone.AllInOne
	t      *testing.T
	client *registry.Client
	log    *events
}

// start runs the all-in-one on dir until the test ends.
func start(t *testing.T, o allinone.Options) *system {
	t.Helper()
	if o.Dir == "" {
		o.Dir = t.TempDir()
	}
	if o.Log == nil {
		o.Log = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	}
	all, err := allinone.Start(context.WithoutCancel(t.Context()), o)
	if err != nil {
		t.Fatal(err)
	}
	s := &system{AllInOne: all, t: t}
	t.Cleanup(func() {
		if err := all.Stop(); err != nil {
			t.Errorf("stop: %v", err)
		}
	})
	s.client = s.registryClient(all.RegistryHost())
	s.log = listen(t, all.BusConfig())
	return s
}

func (s *system) registryClient(hosts ...registry.Host) *registry.Client {
	s.t.Helper()
	c, err := registry.New(hosts, slog.New(slog.DiscardHandler))
	if err != nil {
		s.t.Fatal(err)
	}
	return c
}

// push uploads an image into the embedded registry.
func (s *system) push(repository, tag string, images ...sample.Image) sample.Pushed {
	s.t.Helper()
	p, err := sample.Push(s.t.Context(), s.client, registry.Ref{Registry: s.Registry.Host, Repository: repository, Tag: tag}, images...)
	if err != nil {
		s.t.Fatal(err)
	}
	return p
}

// images returns the subjects of a push: the image and its platforms.
func images(p sample.Pushed) []string {
	subjects := []string{p.String()}
	for _, d := range p.Platforms {
		subjects = append(subjects, p.Ref.Registry+"/"+p.Ref.Repository+"@"+d.Digest.String())
	}
	slices.Sort(subjects)
	return slices.Compact(subjects)
}

// attested waits until everything that was pushed carries a statement.
func (s *system) attested(pushed ...sample.Pushed) {
	s.t.Helper()
	s.log.wait(s.t, func(l *events) string {
		for _, p := range pushed {
			for _, image := range images(p) {
				if len(l.about(contracts.ImageAttestedV1, image)) == 0 {
					return image + " is not attested"
				}
			}
		}
		return ""
	})
}

// ends are the events of which each image comes to one.
func ends() []string {
	return []string{contracts.ImageAttestedV1, contracts.ImageUnsupportedV1, contracts.ImageFailedV1, contracts.ImageGoneV1}
}

// ended waits until an image has reached an end and returns which.
func (s *system) ended(image string) string {
	s.t.Helper()
	var end string
	s.log.wait(s.t, func(l *events) string {
		for _, name := range ends() {
			if len(l.about(name, image)) > 0 {
				end = name
				return ""
			}
		}
		return image + " has reached no end"
	})
	return end
}

// referrers returns the digests of what is attached to an image, sorted.
func (s *system) referrers(image string) []string {
	s.t.Helper()
	i, err := contracts.ParseImage(image)
	if err != nil {
		s.t.Fatal(err)
	}
	list, err := s.client.Referrers(s.t.Context(), registry.Ref{Registry: i.Registry, Repository: i.Repository, Digest: i.Digest}, "")
	if err != nil {
		s.t.Fatal(err)
	}
	var digests []string
	for _, d := range list {
		digests = append(digests, d.ArtifactType+" "+d.Digest.String())
	}
	slices.Sort(digests)
	return digests
}

// report returns the findings attached to an image.
func (s *system) report(image string) *contracts.Report {
	s.t.Helper()
	i, err := contracts.ParseImage(image)
	if err != nil {
		s.t.Fatal(err)
	}
	list, err := s.client.Referrers(s.t.Context(), registry.Ref{Registry: i.Registry, Repository: i.Repository, Digest: i.Digest}, contracts.MediaTypeReport)
	if err != nil || len(list) != 1 {
		s.t.Fatalf("%d reports of %s, %v; want 1", len(list), image, err)
	}
	a, err := s.client.ArtifactContent(s.t.Context(), i.Registry, i.Repository, list[0].Digest.String(), 64<<20)
	if err != nil {
		s.t.Fatal(err)
	}
	var r contracts.Report
	if err := json.Unmarshal(a.Content, &r); err != nil {
		s.t.Fatal(err)
	}
	return &r
}

// verify returns what a gatekeeper would be told.
func (s *system) verify(image string) (contracts.Verification, error) {
	s.t.Helper()
	keys, err := statement.LoadVerifiers([]byte(s.PublicKey))
	if err != nil {
		s.t.Fatal(err)
	}
	i, err := contracts.ParseImage(image)
	if err != nil {
		s.t.Fatal(err)
	}
	return statement.VerifyImage(s.t.Context(), s.client,
		registry.Ref{Registry: i.Registry, Repository: i.Repository, Digest: i.Digest}, statement.Options{Keys: keys, Accept: contracts.VerdictFail})
}

// catalog asks catalog's API.
func (s *system) catalog(path string, into any) {
	s.t.Helper()
	status, body := s.call(http.MethodGet, s.Catalog+path, map[string]string{"Authorization": "Bearer " + s.Token}, nil)
	if status != http.StatusOK {
		s.t.Fatalf("%s: %d %s", path, status, body)
	}
	if err := json.Unmarshal(body, into); err != nil {
		s.t.Fatalf("%s: %v", path, err)
	}
}

// problems returns all open problems.
func (s *system) problems() []contracts.Problem {
	s.t.Helper()
	var all []contracts.Problem
	for after := ""; ; {
		var answer struct {
			Problems []contracts.Problem `json:"problems"`
			Next     *string             `json:"next"`
		}
		s.catalog("/v1/problems?state=open&limit=1000&after="+escape(after), &answer)
		all = append(all, answer.Problems...)
		if answer.Next == nil {
			return all
		}
		after = *answer.Next
	}
}

// problemsOf returns what is open about each image, by its digest, without what
// differs from one run to the next: the registry, revisions and times.
func (s *system) problemsOf(pushed []sample.Pushed) map[string][]string {
	s.t.Helper()
	out := map[string][]string{}
	for _, p := range s.problems() {
		for _, image := range p.Images {
			_, digest, _ := strings.Cut(image, "@")
			out[digest] = append(out[digest], fmt.Sprintf("%s %s %s %s, %s, KEV %t: %s, fixed in %s",
				p.Ecosystem, p.Package, p.Versions, p.Group, p.Severity, p.KEV, p.Vulnerabilities, p.FixedIn))
		}
	}
	wanted := map[string][]string{}
	for _, p := range pushed {
		slices.Sort(out[p.Ref.Digest])
		wanted[p.Ref.Digest] = out[p.Ref.Digest]
	}
	return wanted
}

func (s *system) call(method, to string, headers map[string]string, body []byte) (int, []byte) {
	s.t.Helper()
	req, err := http.NewRequestWithContext(s.t.Context(), method, to, bytes.NewReader(body))
	if err != nil {
		s.t.Fatal(err)
	}
	for k, v := range headers {
		req.Header.Set(k, v)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return resp.StatusCode, answer
}

// deliver is call for what intake stores: 503 says that it could not now, and
// that it is to be sent again, as registries do.
func (s *system) deliver(to string, headers map[string]string, body []byte) (status int, answer []byte) {
	s.t.Helper()
	for deadline := time.Now().Add(patience); ; pause(s.t, 100*time.Millisecond) {
		status, answer = s.call(http.MethodPost, to, headers, body)
		if status != http.StatusServiceUnavailable || time.Now().After(deadline) {
			return status, answer
		}
	}
}

// events are all events of a pipeline in the order in which they were read.
type events struct {
	mu      sync.Mutex
	changed chan struct{}
	all     []bus.Tailed
	ids     map[string]int           // how often each (type, id) was seen
	by      map[string][]bus.Tailed  // by type and by type, subject
	next    map[string]map[int]int64 // what is read next, by topic and partition
	poison  bool                     // what is no event is passed over
}

// tolerate lets messages pass that are no events.
func (l *events) tolerate() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.poison = true
}

// listen reads every topic from its beginning until the test ends.
func listen(t *testing.T, cfg bus.Config) *events {
	t.Helper()
	b, err := bus.New(cfg, "e2e", slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	var names, topics []string
	for _, k := range contracts.Events() {
		names = append(names, k.Name)
		topics = append(topics, cfg.Prefix+k.Topic)
		if k.Bulk {
			topics = append(topics, cfg.Prefix+k.Topic+contracts.BulkSuffix)
		}
	}
	if err := b.EnsureTopics(t.Context(), names...); err != nil {
		t.Fatal(err)
	}
	slices.Sort(topics)
	topics = slices.Compact(topics)
	l := &events{changed: make(chan struct{}), ids: map[string]int{}, by: map[string][]bus.Tailed{}, next: map[string]map[int]int64{}}
	for _, topic := range topics {
		l.next[topic] = map[int]int64{}
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1)
	go func() {
		err := b.Tail(ctx, topics, true, l.add)
		ended <- errors.Join(err, b.Close())
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("reading events: %v", err)
		}
	})
	return l
}

func (l *events) add(m bus.Tailed) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.next[m.Topic][m.Partition] = m.Offset + 1
	if m.Err != nil && l.poison {
		return nil
	}
	if m.Err != nil {
		return fmt.Errorf("%s/%d/%d is no event: %w", m.Topic, m.Partition, m.Offset, m.Err)
	}
	l.all = append(l.all, m)
	l.ids[m.Event.Type()+" "+m.Event.ID()]++
	for _, key := range []string{m.Event.Type() + " ", m.Event.Type() + " " + m.Event.Subject()} {
		l.by[key] = append(l.by[key], m)
	}
	close(l.changed)
	l.changed = make(chan struct{})
	return nil
}

// wait waits until missing returns "". It is asked again after each event.
func (l *events) wait(t *testing.T, missing func(l *events) string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		l.mu.Lock()
		changed := l.changed
		l.mu.Unlock()
		what := missing(l)
		if what == "" {
			return
		}
		select {
		case <-changed:
		case <-time.After(time.Second): // missing may look at more than events
		case <-ctx.Done():
			t.Fatalf("waited %s: %s", patience, what)
		}
	}
}

// about returns the events of a name about a subject; "" stands for all subjects.
func (l *events) about(name, subject string) []bus.Tailed {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.by[contracts.TypePrefix+name+" "+subject]
}

// mentioned says whether an event of a name mentions one of some digests.
func mentioned(l *events, name string, digests ...string) bool {
	return slices.ContainsFunc(l.about(name, ""), func(m bus.Tailed) bool {
		return slices.ContainsFunc(digests, func(d string) bool { return bytes.Contains(m.Value, []byte(d)) })
	})
}

// unread names the topics of which there is more than was read, given their ends.
func (l *events) unread(ends map[string]map[int]span) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []string
	for topic, next := range l.next {
		for partition, s := range ends[topic] {
			if n := s.after(next[partition]); n > 0 {
				out = append(out, fmt.Sprintf("the test has %d of %s left", n, topic))
			}
		}
	}
	return out
}

// named returns the distinct events of a name, by id.
func (l *events) named(name string) map[string]bus.Tailed {
	out := map[string]bus.Tailed{}
	for _, m := range l.about(name, "") {
		out[m.Event.ID()] = m
	}
	return out
}

// analyses returns how often each layer was really analysed.
func (l *events) analyses(t *testing.T) map[string]int {
	t.Helper()
	n := map[string]int{}
	for _, m := range l.named(contracts.LayerAnalyzedV1) {
		e, err := bus.Decode[contracts.LayerAnalyzed](m.Event)
		if err != nil {
			t.Fatal(err)
		}
		if !e.Reused {
			n[e.Digest]++
		}
	}
	return n
}

// distinctIDs returns the (type, id) pairs seen so far, sorted.
func (l *events) distinctIDs() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Sorted(maps.Keys(l.ids))
}

func (l *events) snapshot() []bus.Tailed {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.all)
}

// kafkaClient speaks to Kafka without our bus.
func (s *system) kafkaClient() *kafka.Client {
	s.t.Helper()
	transport := &kafka.Transport{}
	if s.Kafka.Username != "" {
		mechanism, err := scram.Mechanism(scram.SHA512, s.Kafka.Username, s.Kafka.Password)
		if err != nil {
			s.t.Fatal(err)
		}
		transport.SASL = mechanism
	}
	s.t.Cleanup(transport.CloseIdleConnections)
	return &kafka.Client{Addr: kafka.TCP(s.Kafka.Broker), Transport: transport, Timeout: 30 * time.Second}
}

// quiet waits until every service has committed everything that it consumes,
// and the test has read it.
func (s *system) quiet() {
	s.t.Helper()
	s.calm(s.kafkaClient(), "")
}

// calmFor is how long nothing is left and nothing new comes before it is called
// quiet: what a service has committed may still be on its way out of its outbox.
const calmFor = 500 * time.Millisecond

// calm is quiet for the topics and groups with a prefix.
func (s *system) calm(client *kafka.Client, prefix string) {
	s.t.Helper()
	var since time.Time // zero: something is left
	var messages int64
	for deadline := time.Now().Add(patience); ; pause(s.t, 50*time.Millisecond) {
		ends, left, err := s.left(client, prefix)
		now := total(ends)
		switch {
		case err != nil || len(left) > 0:
			since = time.Time{}
		case since.IsZero() || now != messages:
			since, messages = time.Now(), now
		case time.Since(since) >= calmFor:
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("waited %s until it is quiet: %v, %s", patience, err, strings.Join(left, ", "))
		}
	}
}

// span is where a partition begins and ends.
type span struct{ first, end int64 }

// after is how much of a partition there is from an offset on.
func (s span) after(next int64) int64 { return max(0, s.end-max(s.first, next)) }

// left says what each service and the test have left of the topics with a
// prefix, and where these end. A service consumes a topic when it has a retry
// topic for it, which is made before the first event is read.
func (s *system) left(client *kafka.Client, prefix string) (ends map[string]map[int]span, left []string, err error) {
	ctx, cancel := context.WithTimeout(s.t.Context(), 30*time.Second)
	defer cancel()
	if ends, err = endsOf(ctx, client, prefix); err != nil {
		return nil, nil, err
	}
	for _, service := range append(allinone.Services(), allinone.Optional()...) {
		asked := map[string][]int{}
		for _, k := range contracts.Events() {
			base := prefix + k.Topic
			retry := base + "." + service.Name + ".retry"
			if ends[retry] == nil {
				continue
			}
			for _, topic := range []string{base, base + contracts.BulkSuffix, retry} {
				if ends[topic] != nil {
					asked[topic] = slices.Collect(maps.Keys(ends[topic]))
				}
			}
		}
		if len(asked) == 0 {
			continue
		}
		committed, err := client.OffsetFetch(ctx, &kafka.OffsetFetchRequest{GroupID: prefix + service.Name, Topics: asked})
		if err == nil {
			err = committed.Error
		}
		if err != nil {
			return nil, nil, fmt.Errorf("offsets of %s: %w", service.Name, err)
		}
		for topic := range asked {
			at := map[int]int64{} // none or -1: nothing yet
			for _, p := range committed.Topics[topic] {
				if p.Error != nil {
					return nil, nil, fmt.Errorf("offset of %s in %s: %w", service.Name, topic, p.Error)
				}
				at[p.Partition] = p.CommittedOffset
			}
			for partition, s := range ends[topic] {
				if n := s.after(at[partition]); n > 0 {
					left = append(left, fmt.Sprintf("%s has %d of %s left", service.Name, n, topic))
				}
			}
		}
	}
	if s.log != nil {
		left = append(left, s.log.unread(ends)...)
	}
	slices.Sort(left)
	return ends, left, nil
}

// endsOf returns the topics with a prefix and where they begin and end.
func endsOf(ctx context.Context, client *kafka.Client, prefix string) (map[string]map[int]span, error) {
	meta, err := client.Metadata(ctx, &kafka.MetadataRequest{})
	if err != nil {
		return nil, fmt.Errorf("metadata: %w", err)
	}
	asked := &kafka.ListOffsetsRequest{Topics: map[string][]kafka.OffsetRequest{}}
	for _, topic := range meta.Topics {
		if !strings.HasPrefix(topic.Name, prefix) || topic.Internal {
			continue
		}
		for _, p := range topic.Partitions {
			asked.Topics[topic.Name] = append(asked.Topics[topic.Name], kafka.FirstOffsetOf(p.ID), kafka.LastOffsetOf(p.ID))
		}
	}
	listed, err := client.ListOffsets(ctx, asked)
	if err != nil {
		return nil, fmt.Errorf("list offsets: %w", err)
	}
	ends := map[string]map[int]span{}
	for topic, partitions := range listed.Topics {
		ends[topic] = map[int]span{}
		for _, p := range partitions {
			if p.Error != nil {
				return nil, fmt.Errorf("offsets of %s/%d: %w", topic, p.Partition, p.Error)
			}
			ends[topic][p.Partition] = span{p.FirstOffset, p.LastOffset}
		}
	}
	return ends, nil
}

// total is how many messages there ever were.
func total(ends map[string]map[int]span) (n int64) {
	for _, partitions := range ends {
		for _, s := range partitions {
			n += s.end
		}
	}
	return n
}

// republish sends every message again, as it was, to where it was.
func (s *system) republish(messages []bus.Tailed) {
	s.t.Helper()
	client := s.kafkaClient()
	w := &kafka.Writer{
		Addr: client.Addr, Transport: client.Transport, Balancer: &kafka.Hash{},
		RequiredAcks: kafka.RequireAll, BatchTimeout: 5 * time.Millisecond,
	}
	var out []kafka.Message
	for _, m := range messages {
		k := kafka.Message{Topic: m.Topic, Key: []byte(m.Key), Value: m.Value}
		for _, name := range slices.Sorted(maps.Keys(m.Headers)) {
			k.Headers = append(k.Headers, kafka.Header{Key: name, Value: []byte(m.Headers[name])})
		}
		out = append(out, k)
	}
	if err := errors.Join(w.WriteMessages(s.t.Context(), out...), w.Close()); err != nil {
		s.t.Fatal(err)
	}
}

func escape(s string) string { return url.QueryEscape(s) }

func (s *system) logger() *slog.Logger { return slog.New(slog.DiscardHandler) }

// hookSecret is what the embedded registry presents to intake.
func (s *system) hookSecret() string {
	s.t.Helper()
	b, err := os.ReadFile(s.SecretFile("hook.secret"))
	if err != nil {
		s.t.Fatal(err)
	}
	return string(b)
}

// registryCall calls the embedded registry as its user.
func (s *system) registryCall(method, path string) (int, []byte) {
	s.t.Helper()
	credentials := base64.StdEncoding.EncodeToString([]byte(s.Registry.Username + ":" + s.Registry.Password))
	return s.call(method, "http://"+s.Registry.Host+path, map[string]string{"Authorization": "Basic " + credentials}, nil)
}

func lines(b []byte) [][]byte {
	return slices.DeleteFunc(bytes.Split(b, []byte("\n")), func(l []byte) bool { return len(l) == 0 })
}
