package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/segmentio/kafka-go"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/allinone"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/sample"
)

// poison is a message that a service cannot handle.
type poison struct {
	name string
	dies bool // every consumer puts it into the dead letters
	make func(kind contracts.EventKind) kafka.Message
}

// poisons are what may come to stand on a topic. Nothing of it may stop what
// stands behind it.
func poisons() []poison {
	structured := func(value string) kafka.Message {
		return kafka.Message{Value: []byte(value), Headers: []kafka.Header{{Key: "content-type", Value: []byte("application/cloudevents+json; charset=UTF-8")}}}
	}
	envelope := func(version, eventType, subject, data string) kafka.Message {
		return structured(fmt.Sprintf(`{"specversion":%q,"id":"poison-%d","source":"/poison","type":%q,"subject":%q,"datacontenttype":"application/json","data":%s}`,
			version, time.Now().UnixNano(), eventType, subject, data))
	}
	return []poison{
		{"garbage", true, func(contracts.EventKind) kafka.Message {
			return kafka.Message{Value: []byte("\x00\xff\xfe no event at all")}
		}},
		{"an empty value", true, func(contracts.EventKind) kafka.Message { return kafka.Message{Key: []byte("k")} }},
		{"broken JSON", true, func(contracts.EventKind) kafka.Message { return structured(`{"specversion":"1.0","id":`) }},
		{"no CloudEvent", true, func(contracts.EventKind) kafka.Message { return structured(`{"hello":["world"]}`) }},
		{"the wrong spec version", true, func(k contracts.EventKind) kafka.Message { return envelope("7.0", k.Type(), "x", `{}`) }},
		{"data of another shape", true, func(k contracts.EventKind) kafka.Message { return envelope("1.0", k.Type(), "x", `"just a text"`) }},
		{"nearly a megabyte", true, func(contracts.EventKind) kafka.Message {
			return kafka.Message{Value: bytes.Repeat([]byte("x"), 900<<10)}
		}},
		// another event of the same topic, that a later version may bring
		{"an unknown type", false, func(contracts.EventKind) kafka.Message {
			return envelope("1.0", "dev.tidewaiter.image.launched.v9", "x", `{}`)
		}},
		{"hostile names", false, func(k contracts.EventKind) kafka.Message {
			image := `{"registry":"127.0.0.1:1/../../etc","repository":"a\n\u001b[31mb/../..","digest":"sha256:zz"}`
			return envelope("1.0", k.Type(), strings.Repeat("../", 300)+"<script>", `{"registry":"127.0.0.1:1/../../etc","repository":"a\n\u001b[31mb","tag":"$(reboot)",
				"digest":"sha256:../../../etc/passwd","source":"'; drop table catalog_images; --","image":`+image+`,"key":"\u0000","revision":-1,"state":"odd"}`)
		}},
	}
}

// Poison on every topic: it goes to the dead letters of every service that
// reads the topic, with a reason, and what stands behind it is handled.
func TestPoisonOnEveryTopic(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := start(t, allinone.Options{Dir: dir, Partitions: 1}) // everything stands behind the poison
	s.log.tolerate()
	client := s.kafkaClient()
	w := &kafka.Writer{Addr: client.Addr, Transport: client.Transport, RequiredAcks: kafka.RequireAll, BatchTimeout: 5 * time.Millisecond}
	t.Cleanup(func() { _ = w.Close() }) // what was written was acknowledged
	var topics []string
	for _, k := range contracts.Events() {
		var messages []kafka.Message
		for _, p := range poisons() {
			m := p.make(k)
			m.Topic = k.Topic
			messages = append(messages, m)
		}
		topics = append(topics, k.Topic)
		if err := w.WriteMessages(t.Context(), messages...); err != nil {
			t.Fatalf("%s: %v", k.Topic, err)
		}
	}
	p := s.push("team/app", "1", distinctFleet(t, 50, 1)...)
	s.attested(p)
	s.quiet()
	if n := len(s.referrers(p.String())); n != 4 {
		t.Errorf("%d referrers", n)
	}

	// per topic and service that reads it
	died := map[string]int{}
	for _, l := range s.deadLetters() {
		origin, _, _ := strings.Cut(l.Origin, "/")
		died[origin+" "+l.Service]++
		if l.Reason == "" || strings.ContainsAny(l.Reason, "\n\x1b\x00") {
			t.Errorf("dead letter %s: reason %q", l.ID, l.Reason)
		}
	}
	want := 0
	for _, p := range poisons() {
		if p.dies {
			want++
		}
	}
	readers := s.readers(client)
	if len(readers) < len(allinone.Services()) {
		t.Errorf("only %d pairs of topic and reader: %v", len(readers), readers)
	}
	for _, r := range readers {
		topic, _, _ := strings.Cut(r, " ")
		if slices.Contains(topics, topic) && died[r] < want {
			t.Errorf("%s: %d dead letters, want at least %d", r, died[r], want)
		}
	}
	// and the command says so
	out, err := exec.CommandContext(t.Context(), program(t), "dlq", "list", "--data", dir, "--output", "json").Output()
	if err != nil {
		t.Fatalf("dlq list: %v", err)
	}
	if n := len(lines(out)); n != len(s.deadLetters()) {
		t.Errorf("dlq list prints %d letters, there are %d", n, len(s.deadLetters()))
	}
	for _, line := range lines(out) {
		var l contracts.DeadLetter
		if err := json.Unmarshal(line, &l); err != nil || l.Reason == "" || l.Service == "" {
			t.Errorf("%s: %v", line, err)
		}
	}
}

// readers returns "topic service" for each dead letter topic that exists.
func (s *system) readers(client *kafka.Client) []string {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 10*time.Second)
	defer cancel()
	meta, err := client.Metadata(ctx, &kafka.MetadataRequest{})
	if err != nil {
		s.t.Fatal(err)
	}
	var out []string
	for _, topic := range meta.Topics {
		name, ok := strings.CutSuffix(topic.Name, ".dlq")
		if i := strings.LastIndexByte(name, '.'); ok && name[i+1:] != "intake" { // intake reads no topic
			out = append(out, name[:i]+" "+name[i+1:])
		}
	}
	slices.Sort(out)
	return out
}

// Clocks of registries and intakes that are days off: what was pushed is
// planned, matched and attested, and what counts is the digest that the tag has.
func TestClockSkew(t *testing.T) {
	t.Parallel()
	s := start(t, allinone.Options{})
	if err := s.StopService("planner"); err != nil {
		t.Fatal(err)
	}
	fleet := distinctFleet(t, 60, 4)
	want := undisturbed(t, fleet)
	b, err := bus.New(s.BusConfig(), "intake", s.logger(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = b.Close() }() // what was published is acknowledged
	skews := []time.Duration{-10 * time.Minute, 10 * time.Minute, -10 * 24 * time.Hour, 10 * 24 * time.Hour}
	var pushed []sample.Pushed
	for i, image := range fleet {
		pushed = append(pushed, s.push(fmt.Sprintf("skewed/app-%d", i), "1", image))
	}
	for i, p := range pushed {
		at := time.Now().Add(skews[i]).UTC()
		ev, err := bus.NewEvent(contracts.ImagePushedV1, p.Ref.String(), contracts.ImagePushed{
			Source: allinone.Source, Registry: p.Ref.Registry, Repository: p.Ref.Repository, Tag: p.Ref.Tag, Digest: p.Ref.Digest,
			Cause: contracts.CausePush, DeliveryID: fmt.Sprint(i), OccurredAt: &at, ReceivedAt: at,
		})
		if err != nil {
			t.Fatal(err)
		}
		ev.SetID(fmt.Sprintf("skewed-%d", i))
		ev.SetTime(at)
		bus.Key(&ev, p.Ref.Registry+"/"+p.Ref.Repository)
		if err := b.Publish(t.Context(), []event.Event{ev}...); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.StartService("planner"); err != nil {
		t.Fatal(err)
	}
	s.attested(pushed...)
	s.quiet()
	sameReports(t, s.reportDigests(pushed), want)
	for _, p := range pushed {
		status, body := s.call(http.MethodGet, s.Catalog+"/v1/timeline?ref="+escape(p.String()), map[string]string{"Authorization": "Bearer " + s.Token}, nil)
		if status != http.StatusOK || !bytes.Contains(body, []byte(`"`+contracts.StepAttested+`"`)) {
			t.Errorf("catalog says of %s: %d %s", p, status, body)
		}
	}
	for _, l := range s.deadLetters() {
		t.Errorf("dead letter %s: %s", l.ID, l.Reason)
	}
}
