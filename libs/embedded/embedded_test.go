package embedded

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"github.com/regclient/regclient"
	"github.com/regclient/regclient/config"
	"github.com/regclient/regclient/scheme/reg"
	"github.com/regclient/regclient/types/descriptor"
	regmanifest "github.com/regclient/regclient/types/manifest"
	v1 "github.com/regclient/regclient/types/oci/v1"
	"github.com/regclient/regclient/types/ref"
	"github.com/segmentio/kafka-go"
	"github.com/segmentio/kafka-go/sasl/scram"
	"go.uber.org/goleak"
)

// childDir names the variable that makes this test binary a process that runs
// the servers and is killed.
const childDir = "TIDEWAITER_EMBEDDED_TEST_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childDir); dir != "" {
		runChild(dir)
		return
	}
	goleak.VerifyTestMain(m)
}

func runChild(dir string) {
	s, err := Start(context.Background(), Options{Dir: dir}, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if err := json.NewEncoder(os.Stdout).Encode(s); err != nil {
		os.Exit(1)
	}
	_ = s.Wait()
}

func testLog(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
}

// run starts servers that stop, without an error, at the end of the test or
// when stop is called.
func run(t *testing.T, o Options) (s *Servers, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	s, err := Start(ctx, o, testLog(t))
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	stop = sync.OnceFunc(func() {
		cancel()
		if err := s.Wait(); err != nil {
			t.Errorf("stop: %v", err)
		}
	})
	t.Cleanup(stop)
	return s, stop
}

// eventually polls until condition holds.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("never happened: %s", what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// kafkaClient is a client of s whose connections end with the test.
func kafkaClient(t *testing.T, s *Servers, password string) *kafka.Client {
	t.Helper()
	mechanism, err := scram.Mechanism(scram.SHA512, s.KafkaUsername, password)
	if err != nil {
		t.Fatal(err)
	}
	transport := &kafka.Transport{SASL: mechanism}
	t.Cleanup(transport.CloseIdleConnections)
	return &kafka.Client{Addr: kafka.TCP(s.KafkaAddress), Transport: transport, Timeout: 10 * time.Second}
}

func produce(t *testing.T, c *kafka.Client, topic, value string) {
	t.Helper()
	resp, err := c.Produce(t.Context(), &kafka.ProduceRequest{
		Topic: topic, RequiredAcks: kafka.RequireAll,
		Records: kafka.NewRecordReader(kafka.Record{Value: kafka.NewBytes([]byte(value))}),
	})
	if err == nil {
		err = resp.Error
	}
	if err != nil {
		t.Fatal(err)
	}
}

func createTopic(t *testing.T, c *kafka.Client, topic string, partitions int) {
	t.Helper()
	resp, err := c.CreateTopics(t.Context(), &kafka.CreateTopicsRequest{
		Topics: []kafka.TopicConfig{{Topic: topic, NumPartitions: partitions, ReplicationFactor: 1}},
	})
	if err == nil {
		err = resp.Errors[topic]
	}
	if err != nil {
		t.Fatal(err)
	}
}

// commit joins the group on topic, commits offset for partition 0 and leaves.
func commit(t *testing.T, s *Servers, topic, group string, offset int64) {
	t.Helper()
	mechanism, err := scram.Mechanism(scram.SHA512, s.KafkaUsername, s.KafkaPassword)
	if err != nil {
		t.Fatal(err)
	}
	g, err := kafka.NewConsumerGroup(kafka.ConsumerGroupConfig{
		ID: group, Brokers: []string{s.KafkaAddress}, Topics: []string{topic},
		Dialer: &kafka.Dialer{SASLMechanism: mechanism, Timeout: 10 * time.Second},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = g.Close() }()
	generation, err := g.Next(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := generation.CommitOffsets(map[string]map[int]int64{topic: {0: offset}}); err != nil {
		t.Fatal(err)
	}
}

func committed(t *testing.T, c *kafka.Client, topic, group string) int64 {
	t.Helper()
	resp, err := c.OffsetFetch(t.Context(), &kafka.OffsetFetchRequest{GroupID: group, Topics: map[string][]int{topic: {0}}})
	if err == nil {
		err = resp.Error
	}
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.Topics[topic]) != 1 {
		return -1
	}
	return resp.Topics[topic][0].CommittedOffset
}

func end(t *testing.T, c *kafka.Client, topic string) int64 {
	t.Helper()
	resp, err := c.ListOffsets(t.Context(), &kafka.ListOffsetsRequest{
		Topics: map[string][]kafka.OffsetRequest{topic: {kafka.LastOffsetOf(0)}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return resp.Topics[topic][0].LastOffset
}

// call makes a request to the registry and returns status, header and body.
func call(t *testing.T, s *Servers, method, path, contentType string, body []byte) (int, http.Header, []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://"+s.RegistryAddress+path, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.SetBasicAuth(s.RegistryUsername, s.RegistryPassword)
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, resp.Header, b
}

func digestOf(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

const (
	manifestType = "application/vnd.oci.image.manifest.v1+json"
	emptyType    = "application/vnd.oci.empty.v1+json"
)

func pushBlob(t *testing.T, s *Servers, repository string, content []byte) {
	t.Helper()
	status, _, body := call(t, s, http.MethodPost, "/v2/"+repository+"/blobs/uploads/?digest="+digestOf(content), "application/octet-stream", content)
	if status != http.StatusCreated {
		t.Fatalf("push blob: %d %s", status, body)
	}
}

// pushManifest pushes an artifact without layers; subject may be empty.
func pushManifest(t *testing.T, s *Servers, repository, reference, note, subject string) (digest string, size int) {
	t.Helper()
	empty := map[string]any{"mediaType": emptyType, "digest": digestOf([]byte("{}")), "size": 2}
	manifest := map[string]any{
		"schemaVersion": 2, "mediaType": manifestType, "artifactType": "application/vnd.example",
		"config": empty, "layers": []any{empty}, "annotations": map[string]string{"note": note},
	}
	if subject != "" {
		manifest["subject"] = map[string]any{"mediaType": manifestType, "digest": subject, "size": 1}
	}
	b, err := json.Marshal(manifest)
	if err != nil {
		t.Fatal(err)
	}
	digest = digestOf(b)
	if reference == "" {
		reference = digest
	}
	status, _, body := call(t, s, http.MethodPut, "/v2/"+repository+"/manifests/"+reference, manifestType, b)
	if status != http.StatusCreated {
		t.Fatalf("push manifest: %d %s", status, body)
	}
	return digest, len(b)
}

// receiver collects notifications; fail says how many requests it refuses.
type receiver struct {
	*httptest.Server
	mu     sync.Mutex
	fail   []int
	auth   []string
	events []notificationEvent
}

func newReceiver(t *testing.T, fail ...int) *receiver {
	r := &receiver{fail: fail}
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.auth = append(r.auth, req.Header.Get("Authorization"))
		if len(r.fail) > 0 {
			w.WriteHeader(r.fail[0])
			r.fail = r.fail[1:]
			return
		}
		var n notification
		if err := json.NewDecoder(req.Body).Decode(&n); err != nil || req.Header.Get("Content-Type") != notificationType {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		r.events = append(r.events, n.Events...)
		w.WriteHeader(http.StatusAccepted)
	}))
	t.Cleanup(r.Close)
	return r
}

func (r *receiver) received() []notificationEvent {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.events)
}

func TestKafkaKeepsWhatItAcknowledged(t *testing.T) {
	for _, sync := range []bool{false, true} {
		t.Run(fmt.Sprintf("sync=%v", sync), func(t *testing.T) { keepsWhatItAcknowledged(t, sync) })
	}
}

func keepsWhatItAcknowledged(t *testing.T, sync bool) {
	dir := t.TempDir()
	s, stop := run(t, Options{Dir: dir, Partitions: 3, Sync: sync})
	if full := strings.HasSuffix(s.DatabaseURL, "?sync=full"); full != sync {
		t.Errorf("database %s", s.DatabaseURL)
	}
	c := kafkaClient(t, s, s.KafkaPassword)
	createTopic(t, c, "image.pushed.v1", 1)
	produce(t, c, "image.pushed.v1", "one")
	produce(t, c, "image.pushed.v1", "two")
	commit(t, s, "image.pushed.v1", "planner", 1)

	wrong := kafkaClient(t, s, "wrong")
	if _, err := wrong.Metadata(t.Context(), &kafka.MetadataRequest{}); err == nil {
		t.Error("a wrong password was accepted")
	}
	stop()

	again, _ := run(t, Options{Dir: dir})
	if again.KafkaAddress != s.KafkaAddress || again.KafkaPassword != s.KafkaPassword {
		t.Errorf("Kafka moved from %s to %s", s.KafkaAddress, again.KafkaAddress)
	}
	c = kafkaClient(t, again, again.KafkaPassword)
	if n := end(t, c, "image.pushed.v1"); n != 2 {
		t.Errorf("%d messages after a restart, want 2", n)
	}
	if n := committed(t, c, "image.pushed.v1", "planner"); n != 1 {
		t.Errorf("committed offset %d after a restart, want 1", n)
	}
}

// A process that is killed with -9 loses nothing that it acknowledged:
// messages, committed offsets, images, notifications not delivered yet.
func TestKilledProcessLosesNothing(t *testing.T) {
	dir := t.TempDir()
	for round := range 3 {
		child := exec.CommandContext(t.Context(), os.Args[0])
		child.Env = append(os.Environ(), childDir+"="+dir)
		child.Stderr = t.Output()
		out, err := child.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		line, err := bufio.NewReader(out).ReadBytes('\n')
		if err != nil {
			t.Fatalf("the child did not start: %v", err)
		}
		s := &Servers{}
		if err := json.Unmarshal(line, s); err != nil {
			t.Fatal(err)
		}
		if _, err := Start(t.Context(), Options{Dir: dir}, testLog(t)); !errors.Is(err, ErrInUse) {
			t.Errorf("start beside a running process: %v, want ErrInUse", err)
		}
		c := kafkaClient(t, s, s.KafkaPassword)
		if round == 0 {
			createTopic(t, c, "image.pushed.v1", 1)
			pushBlob(t, s, "team/app", []byte("{}"))
		}
		before := end(t, c, "image.pushed.v1")
		if before != int64(round*20) {
			t.Errorf("round %d: %d messages at the start, want %d", round, before, round*20)
		}
		if round > 0 {
			if n := committed(t, c, "image.pushed.v1", "planner"); n != before-5 {
				t.Errorf("round %d: committed offset %d, want %d", round, n, before-5)
			}
		}
		for i := range 20 {
			produce(t, c, "image.pushed.v1", fmt.Sprint(i))
		}
		commit(t, s, "image.pushed.v1", "planner", before+15)
		pushManifest(t, s, "team/app", fmt.Sprintf("v%d", round), "", "")
		if err := child.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = child.Wait() // killed
	}

	r := newReceiver(t)
	s, _ := run(t, Options{Dir: dir, HookURL: r.URL, HookAuth: "Bearer s3cret"})
	c := kafkaClient(t, s, s.KafkaPassword)
	if n := end(t, c, "image.pushed.v1"); n != 60 {
		t.Errorf("%d messages after the kills, want 60", n)
	}
	if n := committed(t, c, "image.pushed.v1", "planner"); n != 55 {
		t.Errorf("committed offset %d after the kills, want 55", n)
	}
	eventually(t, "three notifications", func() bool { return len(r.received()) == 3 })
	for i, e := range r.received() {
		if want := fmt.Sprintf("v%d", i); e.Target.Tag != want || e.Action != "push" {
			t.Errorf("notification %d is %s of %s, want push of %s", i, e.Action, e.Target.Tag, want)
		}
		status, _, body := call(t, s, http.MethodGet, "/v2/team/app/manifests/"+e.Target.Digest, "", nil)
		if status != http.StatusOK || digestOf(body) != e.Target.Digest {
			t.Errorf("manifest %s after the kills: %d", e.Target.Digest, status)
		}
	}
}

func TestRedis(t *testing.T) {
	s, _ := run(t, Options{Dir: t.TempDir()})
	options, err := goredis.ParseURL(s.RedisURL)
	if err != nil {
		t.Fatal(err)
	}
	anonymous := goredis.NewClient(options)
	defer func() { _ = anonymous.Close() }()
	if err := anonymous.Ping(t.Context()).Err(); err == nil {
		t.Error("Redis answers without a password")
	}
	options.Password = s.RedisPassword
	c := goredis.NewClient(options)
	defer func() { _ = c.Close() }()
	if err := c.Set(t.Context(), "lease", "x", 20*time.Millisecond).Err(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the key expires by the clock", func() bool {
		return errors.Is(c.Get(t.Context(), "lease").Err(), goredis.Nil)
	})
	if err := c.Set(t.Context(), "kept", "x", 0).Err(); err != nil {
		t.Fatal(err)
	}
	s.FlushRedis()
	if err := c.Get(t.Context(), "kept").Err(); !errors.Is(err, goredis.Nil) {
		t.Errorf("after a flush: %v", err)
	}
}

func TestNotificationsArriveInOrderUntilAccepted(t *testing.T) {
	r := newReceiver(t, 500, 404, 429)
	s, _ := run(t, Options{Dir: t.TempDir()})
	pushBlob(t, s, "team/app", []byte("{}"))
	digest, size := pushManifest(t, s, "team/app", "v1", "first", "")
	untagged, _ := pushManifest(t, s, "team/app", "", "second", digest)
	for _, reference := range []string{"v1", untagged} {
		if status, _, _ := call(t, s, http.MethodDelete, "/v2/team/app/manifests/"+reference, "", nil); status != http.StatusAccepted {
			t.Fatalf("delete %s: %d", reference, status)
		}
	}
	// What is refused causes no notification.
	if status, _, _ := call(t, s, http.MethodPut, "/v2/team/app/manifests/bad", manifestType, []byte("no manifest")); status != http.StatusBadRequest {
		t.Fatalf("bad manifest: %d", status)
	}
	if status, _, _ := call(t, s, http.MethodDelete, "/v2/team/app/manifests/none", "", nil); status != http.StatusNotFound {
		t.Fatalf("delete of nothing: %d", status)
	}
	s.SetHook(r.URL, "Bearer s3cret")
	eventually(t, "four notifications", func() bool { return len(r.received()) == 4 })

	got := r.received()
	push := notificationTarget{
		MediaType: manifestType, Digest: digest, Size: size, Length: size, Repository: "team/app", Tag: "v1",
		URL: "http://" + s.RegistryAddress + "/v2/team/app/manifests/" + digest,
	}
	if got[0].Action != "push" || got[0].Target != push {
		t.Errorf("push: %+v\nwant %+v", got[0].Target, push)
	}
	if got[0].Request.Host != s.RegistryAddress || got[0].Request.Method != http.MethodPut || got[0].Actor.Name != Username {
		t.Errorf("push: request %+v, actor %+v", got[0].Request, got[0].Actor)
	}
	if got[1].Target.Digest != untagged || got[1].Target.Tag != "" {
		t.Errorf("push by digest: %+v", got[1].Target)
	}
	if want := (notificationTarget{Repository: "team/app", Tag: "v1"}); got[2].Action != "delete" || got[2].Target != want {
		t.Errorf("delete by tag: %s %+v", got[2].Action, got[2].Target)
	}
	if want := (notificationTarget{Repository: "team/app", Digest: untagged}); got[3].Action != "delete" || got[3].Target != want {
		t.Errorf("delete by digest: %s %+v", got[3].Action, got[3].Target)
	}
	ids := map[string]bool{}
	for _, e := range got {
		ids[e.ID] = true
	}
	if len(ids) != 4 || ids[""] {
		t.Errorf("ids are not distinct: %v", ids)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, a := range r.auth {
		if a != "Bearer s3cret" {
			t.Errorf("Authorization %q", a)
		}
	}
	if left, err := os.ReadDir(filepath.Join(filepath.Dir(strings.TrimPrefix(s.DatabaseURL, "sqlite://")), "notifications")); err != nil || len(left) > 4 {
		t.Errorf("stored notifications: %d, %v", len(left), err)
	}
}

func TestRegistryRefusesStrangers(t *testing.T) {
	s, _ := run(t, Options{Dir: t.TempDir()})
	good := s.RegistryPassword
	for name, credentials := range map[string][2]string{
		"none": {"", ""}, "wrong password": {Username, "wrong"}, "wrong user": {"admin", good}, "empty password": {Username, ""},
	} {
		s.RegistryUsername, s.RegistryPassword = credentials[0], credentials[1]
		status, header, _ := call(t, s, http.MethodGet, "/v2/", "", nil)
		if status != http.StatusUnauthorized || !strings.HasPrefix(header.Get("WWW-Authenticate"), "Basic ") {
			t.Errorf("%s: %d %q", name, status, header.Get("WWW-Authenticate"))
		}
	}
	s.RegistryUsername, s.RegistryPassword = Username, good
	if status, _, _ := call(t, s, http.MethodGet, "/v2/", "", nil); status != http.StatusOK {
		t.Errorf("right credentials: %d", status)
	}
}

// olareg alone loses referrers that are pushed at once.
func TestReferrersPushedAtOnceAreAllKept(t *testing.T) {
	s, _ := run(t, Options{Dir: t.TempDir()})
	pushBlob(t, s, "team/app", []byte("{}"))
	subject, _ := pushManifest(t, s, "team/app", "v1", "subject", "")
	const writers = 16
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() { pushManifest(t, s, "team/app", "", fmt.Sprint(i), subject) })
	}
	wg.Wait()
	status, _, body := call(t, s, http.MethodGet, "/v2/team/app/referrers/"+subject, "", nil)
	var index struct {
		Manifests []json.RawMessage `json:"manifests"`
	}
	if err := json.Unmarshal(body, &index); err != nil || status != http.StatusOK {
		t.Fatalf("referrers: %d, %v", status, err)
	}
	if len(index.Manifests) != writers {
		t.Errorf("%d referrers, want %d", len(index.Manifests), writers)
	}
}

// Images with blobs of their own and shared ones, pushed at once into one new
// repository and several, are all there, and each is announced once.
func TestImagesPushedAtOnce(t *testing.T) {
	r := newReceiver(t)
	s, _ := run(t, Options{Dir: t.TempDir(), HookURL: r.URL})
	host := config.HostNewName(s.RegistryAddress)
	host.TLS, host.User, host.Pass, host.ReqConcurrent = config.TLSDisabled, s.RegistryUsername, s.RegistryPassword, 100
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	client := regclient.New(regclient.WithConfigHost(*host), regclient.WithRegOpts(reg.WithTransport(transport)))

	const images = 24
	want := map[string]bool{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i := range images {
		wg.Go(func() {
			target, err := ref.New(fmt.Sprintf("%s/team/app%d:v%d", s.RegistryAddress, i%3, i))
			if err != nil {
				t.Error(err)
				return
			}
			manifest := v1.Manifest{Versioned: v1.ManifestSchemaVersion, MediaType: manifestType}
			for n, content := range []string{"{}", "a layer that all share", fmt.Sprintf("layer of image %d", i)} {
				d, err := client.BlobPut(t.Context(), target, descriptor.Descriptor{}, strings.NewReader(content))
				if err != nil {
					t.Errorf("image %d: %v", i, err)
					return
				}
				d.MediaType = "application/vnd.oci.image.layer.v1.tar"
				if n == 0 {
					d.MediaType = "application/vnd.oci.image.config.v1+json"
					manifest.Config = d
					continue
				}
				manifest.Layers = append(manifest.Layers, d)
			}
			m, err := regmanifest.New(regmanifest.WithOrig(manifest))
			if err == nil {
				err = client.ManifestPut(t.Context(), target, m)
			}
			if err != nil {
				t.Errorf("image %d: %v", i, err)
				return
			}
			if got, err := client.ManifestGet(t.Context(), target); err != nil || got.GetDescriptor().Digest != m.GetDescriptor().Digest {
				t.Errorf("image %d is not there: %v", i, err)
			}
			mu.Lock()
			defer mu.Unlock()
			want[target.Repository+":"+target.Tag+"@"+m.GetDescriptor().Digest.String()] = true
		})
	}
	wg.Wait()
	eventually(t, "all notifications", func() bool { return len(r.received()) >= images })
	for _, e := range r.received() {
		name := e.Target.Repository + ":" + e.Target.Tag + "@" + e.Target.Digest
		if !want[name] {
			t.Errorf("unexpected or second notification of %s", name)
		}
		delete(want, name)
	}
	if len(want) > 0 {
		t.Errorf("not announced: %v", want)
	}
}

func FuzzParseTarget(f *testing.F) {
	for _, seed := range []string{
		"/v2/a/manifests/v1", "/v2/a/b/c/manifests/sha256:00", "/v2/manifests/x", "/v2//a/../b/manifests/v1/",
		"/v2/a/blobs/uploads/1", "", "/", "v2/manifests/manifests/manifests",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, p string) {
		got, ok := parseTarget(p)
		if !ok {
			return
		}
		if got.repository == "" || got.reference == "" || strings.Contains(got.reference, "/") {
			t.Fatalf("%q: %+v", p, got)
		}
		// What is locked is what olareg changes: the cleaned path says the same.
		if got.kind != manifests {
			return
		}
		again, ok := parseTarget("/v2/" + got.repository + "/manifests/" + got.reference)
		if !ok || again != got {
			t.Fatalf("%q: %+v, then %+v", p, got, again)
		}
	})
}

func TestRegistryStaysWhereItWas(t *testing.T) {
	dir := t.TempDir()
	s, stop := run(t, Options{Dir: dir})
	stop()
	again, _ := run(t, Options{Dir: dir})
	if again.RegistryAddress != s.RegistryAddress || again.RegistryPassword != s.RegistryPassword || again.RedisPassword != s.RedisPassword {
		t.Errorf("registry was at %s, is at %s; passwords kept: %v", s.RegistryAddress, again.RegistryAddress,
			again.RegistryPassword == s.RegistryPassword)
	}
	info, err := os.Stat(filepath.Join(dir, stateFile))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("passwords are kept in a file with mode %v, %v", info.Mode(), err)
	}
}

func TestStartRefuses(t *testing.T) {
	busy := httptest.NewServer(http.NotFoundHandler())
	defer busy.Close()
	taken := busy.Listener.Addr().String()
	for name, o := range map[string]Options{
		"all interfaces for the registry": {RegistryAddress: "0.0.0.0:0"},
		"all interfaces for Kafka":        {KafkaAddress: ":0"},
		"a taken registry address":        {RegistryAddress: taken},
		"a taken Kafka address":           {KafkaAddress: taken},
	} {
		o.Dir = t.TempDir()
		if _, err := Start(t.Context(), o, testLog(t)); err == nil {
			t.Errorf("%s: started", name)
		}
		// All is undone: the directory is free.
		s, stop := run(t, Options{Dir: o.Dir})
		if s.RegistryAddress == taken {
			t.Errorf("%s: remembered", name)
		}
		stop()
	}
}

func TestAnonymousPull(t *testing.T) {
	s, _ := run(t, Options{Dir: t.TempDir(), AnonymousPull: true})
	base := "http://" + s.RegistryAddress
	for _, test := range []struct {
		method, path string
		auth         bool
		want         int
	}{
		{http.MethodGet, "/v2/", false, http.StatusOK},
		{http.MethodHead, "/v2/", false, http.StatusOK},
		{http.MethodPost, "/v2/team/app/blobs/uploads/", false, http.StatusUnauthorized},
		{http.MethodDelete, "/v2/team/app/manifests/latest", false, http.StatusUnauthorized},
		{http.MethodGet, "/v2/", true, http.StatusUnauthorized}, // a wrong password stays wrong
	} {
		req, err := http.NewRequestWithContext(t.Context(), test.method, base+test.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if test.auth {
			req.SetBasicAuth(Username, "wrong")
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != test.want {
			t.Errorf("%s %s: %d, want %d", test.method, test.path, resp.StatusCode, test.want)
		}
	}
	http.DefaultClient.CloseIdleConnections()
}
