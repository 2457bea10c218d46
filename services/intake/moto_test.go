package intake

import (
	"context"
	"encoding/xml"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/sqs"
	"github.com/aws/aws-sdk-go-v2/service/sqs/types"
)

// moto is a server that behaves like SQS and SNS.
type moto struct {
	url    string
	client *sqs.Client
	queue  string
}

// newMoto starts the server that MOTO_SERVER or the path names
// (e2e/servers/moto.sh installs it), with one queue.
func newMoto(t *testing.T) *moto {
	t.Helper()
	program := os.Getenv("MOTO_SERVER")
	if program == "" {
		found, err := exec.LookPath("moto_server")
		if err != nil {
			t.Skip("moto_server is not installed: MOTO_SERVER=$(e2e/servers/moto.sh) makes and names it")
		}
		program = found
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := listener.Addr().String()
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(addr)
	var output strings.Builder
	cmd := exec.Command(program, "-H", "127.0.0.1", "-p", port)
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // it was killed
		http.DefaultClient.CloseIdleConnections()
	})
	t.Setenv("AWS_ACCESS_KEY_ID", "AKIDTEST")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	m := &moto{url: "http://" + addr}
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(50 * time.Millisecond) { // between two looks
		if conn, err := net.Dial("tcp", addr); err == nil {
			_ = conn.Close() // only looked
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("moto does not start: %s", output.String())
		}
	}
	p, err := newSQS(t.Context(), SQSPull{QueueURL: m.url + "/123456789012/ecr", Region: "eu-central-1", Endpoint: m.url}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	m.client = p.client
	made, err := m.client.CreateQueue(t.Context(), &sqs.CreateQueueInput{QueueName: aws.String("ecr")})
	if err != nil {
		t.Fatal(err)
	}
	m.queue = aws.ToString(made.QueueUrl)
	return m
}

func (m *moto) send(t *testing.T, body string) {
	t.Helper()
	if _, err := m.client.SendMessage(t.Context(), &sqs.SendMessageInput{QueueUrl: &m.queue, MessageBody: &body}); err != nil {
		t.Fatal(err)
	}
}

// left is how many messages the queue holds, seen and hidden.
func (m *moto) left(t *testing.T) (seen, hidden string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	out, err := m.client.GetQueueAttributes(ctx, &sqs.GetQueueAttributesInput{
		QueueUrl: &m.queue, AttributeNames: []types.QueueAttributeName{types.QueueAttributeNameAll},
	})
	if err != nil {
		t.Fatal(err)
	}
	return out.Attributes["ApproximateNumberOfMessages"], out.Attributes["ApproximateNumberOfMessagesNotVisible"]
}

// sns makes a call of SNS's query protocol.
func (m *moto) sns(t *testing.T, form url.Values) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, m.url+"/", strings.NewReader(form.Encode()))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential=AKIDTEST/20260101/eu-central-1/sns/aws4_request, SignedHeaders=host, Signature=0")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("SNS answers %d, %s, %v", resp.StatusCode, body, err)
	}
	return string(body)
}

// TestMoto: what EventBridge and SNS put into a queue is stored and then gone
// from it; while Kafka is away it stays, and nothing is lost.
func TestMoto(t *testing.T) {
	m := newMoto(t)
	p := pulling(t, Source{Kind: "ecr", AnyRegistry: true, Pull: &Pull{SQS: &SQSPull{
		QueueURL: m.queue, Region: "eu-central-1", Endpoint: m.url, Visibility: 5 * time.Second,
	}}})
	empty := func() bool {
		seen, hidden := m.left(t)
		return seen == "0" && hidden == "0"
	}

	m.send(t, ecrPush("1"))
	var topic struct {
		ARN string `xml:"CreateTopicResult>TopicArn"`
	}
	if err := xml.Unmarshal([]byte(m.sns(t, url.Values{"Action": {"CreateTopic"}, "Name": {"ecr-events"}})), &topic); err != nil {
		t.Fatal(err)
	}
	m.sns(t, url.Values{
		"Action": {"Subscribe"}, "TopicArn": {topic.ARN}, "Protocol": {"sqs"}, "Endpoint": {"arn:aws:sqs:eu-central-1:123456789012:ecr"},
	})
	m.sns(t, url.Values{"Action": {"Publish"}, "TopicArn": {topic.ARN}, "Message": {ecrPush("2")}})
	m.send(t, "poison")
	eventually(t, "all are stored", func() bool {
		events, letters := p.stored()
		return events == 2 && letters == 1
	})
	eventually(t, "the queue is empty", empty)
	tags := map[string]bool{}
	for _, push := range p.out.pushes(t) {
		tags[push.Registry+"/"+push.Repository+":"+push.Tag] = true
	}
	const image = "210987654321.dkr.ecr.eu-central-1.amazonaws.com/team/app:"
	if !tags[image+"1"] || !tags[image+"2"] {
		t.Errorf("published %v", tags)
	}

	p.down.Store(true)
	for i := range 5 {
		m.send(t, ecrPush(fmt.Sprint("later-", i)))
	}
	eventually(t, "all are tried", func() bool { return p.remembered(reasonNotStored) >= 5 })
	if seen, hidden := m.left(t); seen != "0" || hidden != "5" {
		t.Errorf("%s messages are seen and %s hidden, want 0 and 5", seen, hidden)
	}
	p.down.Store(false)
	eventually(t, "the queue is empty again", empty)
	if events, letters := p.stored(); events != 7 || letters != 1 {
		t.Errorf("%d events and %d letters, want 7 and 1", events, letters)
	}
}
