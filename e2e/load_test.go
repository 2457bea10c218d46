package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/bus"
	"github.com/tidewaiter/tidewaiter/libs/embedded"
	"github.com/tidewaiter/tidewaiter/services/intake"
)

var load = flag.Bool("load", false, "send intake 1,000 events a second for a minute and kill it twice, in place of 300 for 6 s and once")

// Intake is killed with -9 while registries send, and started again: whatever
// it acknowledged is in Kafka, and what was sent twice has one id. The rate and
// the times are printed, and decide nothing.
func TestIntakeLosesNothingItAcknowledged(t *testing.T) {
	t.Parallel()
	rate, seconds, kills := 300, 6, 1
	if *load {
		rate, seconds, kills = 1000, 60, 2
	}
	in := newIntakeProcess(t)
	in.start()

	senders := make([]*sender, 50) // as many registries
	each := rate * seconds / len(senders)
	every := time.Second * time.Duration(len(senders)) / time.Duration(rate)
	ctx, cancel := context.WithTimeout(t.Context(), time.Duration(seconds)*time.Second+patience)
	defer cancel()
	begin := time.Now()
	var sending sync.WaitGroup
	for i := range senders {
		senders[i] = newSender(in.url+"/hooks/main", in.token, i)
		sending.Go(func() { senders[i].send(ctx, begin, each, every) })
	}
	for n := range kills {
		at := begin.Add(time.Duration(seconds) * time.Second * time.Duration(n+1) / time.Duration(kills+1))
		pause(t, time.Until(at))
		in.kill()
		in.start()
	}
	sending.Wait()
	took := time.Since(begin)
	cancel()

	acknowledged, refused := map[string]bool{}, 0
	var times []time.Duration
	for _, s := range senders {
		for _, id := range s.acknowledged {
			acknowledged[id] = true
		}
		times = append(times, s.times...)
		refused += s.failures
	}
	if len(acknowledged) != each*len(senders) {
		t.Errorf("%d of %d events were acknowledged in the end: %s", len(acknowledged), each*len(senders), in.out)
	}
	if refused == 0 {
		t.Error("no call failed: intake was not killed while it was sent to")
	}
	stored, messages := in.stored(acknowledged)
	for id, ids := range stored {
		if len(ids) != 1 {
			t.Errorf("delivery %s became %d events: %v", id, len(ids), ids)
		}
	}
	slices.Sort(times)
	at := func(share float64) time.Duration { return times[int(float64(len(times)-1)*share)] }
	t.Logf("%d events in %.1f s: %.0f events/s acknowledged (asked for: %d), with %d kills; %d calls failed and were repeated, %d messages in Kafka",
		len(acknowledged), took.Seconds(), float64(len(acknowledged))/took.Seconds(), rate, kills, refused, messages)
	t.Logf("time to the acknowledgement: p50 %s, p99 %s, longest %s", at(0.5), at(0.99), at(1))

	// the log knows of it, but for what was not written yet when it was killed
	var status intake.SourceStatuses
	in.ask("/v1/sources?source=main", &status)
	if st := status.Sources[0]; st.Reasons["stored"] == 0 || st.LastStored == nil || st.Reasons["stored"] > messages {
		t.Errorf("the delivery log says %+v of %d messages", st, messages)
	}
}

// intakeProcess is intake as a process of its own; the servers that it needs
// are in this one, and stay.
type intakeProcess struct {
	t          *testing.T
	servers    *embedded.Servers
	config     string
	url, token string
	cmd        *exec.Cmd
	out        *bytes.Buffer
}

func newIntakeProcess(t *testing.T) *intakeProcess {
	t.Helper()
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	servers, err := embedded.Start(ctx, embedded.Options{Dir: t.TempDir()}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stop()
		if err := servers.Wait(); err != nil {
			t.Errorf("stop the servers: %v", err)
		}
	})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	_ = l.Close()
	dir := t.TempDir()
	keep := func(name, content string) string {
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	in := &intakeProcess{t: t, servers: servers, url: "http://" + address, token: "load-test"}
	token := keep("token", in.token)
	content, err := json.Marshal(map[string]any{ // which is YAML too
		"log":  map[string]any{"level": "error", "format": "text"},
		"http": map[string]any{"listen": ""},
		"kafka": map[string]any{
			"brokers": []string{servers.KafkaAddress}, "username": servers.KafkaUsername,
			"passwordFile": keep("kafka", servers.KafkaPassword), "replication": 1,
		},
		"database": map[string]any{"url": servers.DatabaseURL},
		"intake":   map[string]any{"listen": address, "admin": map[string]any{"tokenFile": token}},
		"sources": map[string]any{"main": map[string]any{
			"kind": "distribution", "registry": "registry.example:5000", "auth": map[string]any{"bearer": map[string]any{"tokenFile": token}},
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	in.config = keep("intake.yaml", string(content))
	t.Cleanup(func() {
		if in.cmd != nil {
			in.kill()
		}
	})
	return in
}

var buildIntake = sync.OnceValues(func() (string, error) {
	bin := filepath.Join(programs, "intake")
	out, err := exec.Command("go", "build", "-o", bin, "github.com/tidewaiter/tidewaiter/services/intake/cmd/intake").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build: %w\n%s", err, out)
	}
	return bin, nil
})

// start starts the process and waits until it takes connections.
func (in *intakeProcess) start() {
	in.t.Helper()
	bin, err := buildIntake()
	if err != nil {
		in.t.Fatal(err)
	}
	in.out = &bytes.Buffer{}
	in.cmd = exec.Command(bin, "-config", in.config)
	in.cmd.Stderr = in.out
	if err := in.cmd.Start(); err != nil {
		in.t.Fatal(err)
	}
	deadline := time.Now().Add(patience)
	for {
		c, err := net.Dial("tcp", in.url[len("http://"):])
		if err == nil {
			_ = c.Close()
			return
		}
		if time.Now().After(deadline) {
			in.t.Fatalf("intake did not start: %s", in.out)
		}
		pause(in.t, 10*time.Millisecond)
	}
}

// kill ends the process as a power cut would.
func (in *intakeProcess) kill() {
	in.t.Helper()
	_ = in.cmd.Process.Signal(syscall.SIGKILL)
	_ = in.cmd.Wait() // says only that it was killed
	in.cmd = nil
}

// ask gets a path of intake's API, which opens its database a moment after it serves.
func (in *intakeProcess) ask(path string, into any) {
	in.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		req, err := http.NewRequestWithContext(in.t.Context(), http.MethodGet, in.url+path, nil)
		if err != nil {
			in.t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+in.token)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			in.t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err == nil && resp.StatusCode == http.StatusOK {
			if err := json.Unmarshal(body, into); err != nil {
				in.t.Fatal(err)
			}
			return
		}
		if time.Now().After(deadline) {
			in.t.Fatalf("%s: %s, %v: %s", path, resp.Status, err, body)
		}
		pause(in.t, 20*time.Millisecond)
	}
}

// stored reads from Kafka until all of the deliveries are there. It returns the
// ids of the events by delivery, and the number of messages.
func (in *intakeProcess) stored(deliveries map[string]bool) (ids map[string][]string, messages int) {
	in.t.Helper()
	b, err := bus.New(bus.Config{
		Brokers: []string{in.servers.KafkaAddress}, Username: in.servers.KafkaUsername, Password: in.servers.KafkaPassword,
	}, "e2e", slog.New(slog.DiscardHandler), nil)
	if err != nil {
		in.t.Fatal(err)
	}
	defer func() {
		if err := b.Close(); err != nil {
			in.t.Error(err)
		}
	}()
	ctx, cancel := context.WithTimeout(in.t.Context(), patience)
	defer cancel()
	ids = map[string][]string{}
	missing := len(deliveries)
	err = b.Tail(ctx, []string{contracts.ImagePushedV1, contracts.ImagePushedV1 + ".bulk"}, true, func(m bus.Tailed) error {
		p, err := bus.Decode[contracts.ImagePushed](m.Event)
		if err != nil {
			return err
		}
		messages++
		known := ids[p.DeliveryID]
		if known == nil && deliveries[p.DeliveryID] {
			missing--
		}
		if !slices.Contains(known, m.Event.ID()) {
			ids[p.DeliveryID] = append(known, m.Event.ID())
		}
		if missing == 0 {
			cancel() // all that was promised is there
		}
		return nil
	})
	if err != nil {
		in.t.Fatal(err)
	}
	if missing > 0 {
		in.t.Errorf("%d of %d acknowledged events are not in Kafka", missing, len(deliveries))
	}
	return ids, messages
}

// sender is a registry: it sends one event at a time, waits a second for the
// answer and repeats what was not acknowledged, as Distribution does.
type sender struct {
	url, token string
	number     int
	client     *http.Client

	acknowledged []string        // ids of events
	times        []time.Duration // of the calls that were acknowledged
	failures     int
}

func newSender(url, token string, number int) *sender {
	return &sender{url: url, token: token, number: number, client: &http.Client{
		Timeout: time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 1},
	}}
}

// send sends count events, one each interval; after an outage it catches up.
func (s *sender) send(ctx context.Context, begin time.Time, count int, every time.Duration) {
	defer s.client.CloseIdleConnections()
	for n := range count {
		if !wait(ctx, time.Until(begin.Add(time.Duration(n)*every))) {
			return
		}
		id := fmt.Sprintf("%d-%d", s.number, n)
		body := fmt.Appendf(nil, `{"events":[{"id":%q,"timestamp":%q,"action":"push","target":{"mediaType":"application/vnd.oci.image.manifest.v1+json",
			"digest":%q,"repository":"team/app-%d","tag":"1.%d"},"request":{"host":"registry.example:5000"}}]}`,
			id, time.Now().UTC().Format(time.RFC3339Nano), digest.FromString(id), s.number, n)
		for {
			start := time.Now()
			if s.call(ctx, body) {
				s.acknowledged, s.times = append(s.acknowledged, id), append(s.times, time.Since(start))
				break
			}
			s.failures++
			if !wait(ctx, 100*time.Millisecond) {
				return
			}
		}
	}
}

func wait(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

func (s *sender) call(ctx context.Context, body []byte) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url, bytes.NewReader(body))
	if err != nil {
		return false
	}
	req.Header.Set("Authorization", "Bearer "+s.token)
	req.Header.Set("Content-Type", "application/vnd.docker.distribution.events.v2+json")
	resp, err := s.client.Do(req)
	if err != nil {
		return false
	}
	_, err = io.Copy(io.Discard, resp.Body)
	_ = resp.Body.Close()
	return err == nil && resp.StatusCode/100 == 2
}
