//go:build real

package e2e

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/embedded"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/ticketer/stub"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/allinone"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/sample"
)

// cluster is the pipeline as users run it: a process for each service, on the
// servers that servers/servers.sh has started.
type cluster struct {
	*system
	dir     string
	servers map[string]string // the environment of servers.sh, SERVERS_…
	store   *embedded.Servers // its registry tells nobody of pushes
	proxy   *troubled         // before that
	tracker string            // URL of tickets
	tickets *stub.Tracker
	running map[string]*exec.Cmd
	logs    map[string]*bytes.Buffer // what each said, over all its processes
	mu      sync.Mutex               // of logs
}

// fault is something that happens to a running cluster. It returns when the
// fault is over; recovery is measured from then on.
type fault struct {
	name    string
	short   bool                                // part of the short form
	brokers string                              // BROKERS that it needs; empty: any
	before  func(c *cluster)                    // before images are pushed
	pushing func(c *cluster, n int)             // after the nth push
	during  func(c *cluster, p []sample.Pushed) // in the middle of the work
	proxied bool                                // images are in the registry behind the proxy
	redone  bool                                // it destroys what says that a layer is being analysed
}

// findings are what is found in images, by digest.
type findings struct {
	reports  map[string]string // digests
	problems map[string][]string
}

// outcomeRow is a row of the table that task chaos prints.
type outcomeRow struct {
	fault                                       string
	images, ended, attested, analysed, distinct int
	letters                                     int
	recovery                                    time.Duration
}

// TestChaos does to a cluster what happens to clusters, one fault after the
// other. After each, every pushed image is attested with the findings of an
// undisturbed run, each problem has one ticket, no layer was analysed twice (and
// none more than twice where the fault destroyed the lease on it), and nothing is
// among the dead letters.
func TestChaos(t *testing.T) {
	ctl := os.Getenv("SERVERS_CTL")
	if ctl == "" {
		t.Skip("SERVERS_CTL is not set: task chaos starts the servers and runs this")
	}
	perFault := 4
	if *chaos {
		perFault = 8
	}
	var faults []fault
	for _, f := range allFaults() {
		if (*chaos || f.short) && (f.brokers == "" || f.brokers == brokers(t)) {
			faults = append(faults, f)
		}
	}
	fleets, everything := map[string][]sample.Image{}, []sample.Image{}
	salt := int(time.Now().Unix()) * 100 // the servers may have seen an earlier run
	for i, f := range faults {
		fleets[f.name] = distinctFleet(t, salt+i, perFault)
		everything = append(everything, fleets[f.name]...)
	}
	alone, pushed := scanned(t, everything)
	alone.quiet()
	want := findings{alone.reportDigests(pushed), alone.problemsOf(pushed)}
	c := startCluster(t)
	var rows []outcomeRow
	for _, f := range faults {
		if !t.Run(f.name, func(t *testing.T) {
			c.t = t
			rows = append(rows, c.undergo(f, fleets[f.name], want))
		}) {
			break // what comes after would only wait for the same
		}
	}
	c.t = t
	var table bytes.Buffer
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "FAULT\tIMAGES\tENDED\tATTESTED\tANALYSED÷LAYERS\tDEAD LETTERS\tRECOVERY")
	for _, r := range rows {
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d÷%d = %.2f\t%d\t%.1f s\n", r.fault, r.images, r.ended, r.attested,
			r.analysed, r.distinct, float64(r.analysed)/float64(r.distinct), r.letters, r.recovery.Seconds())
	}
	_ = w.Flush() // into memory
	fmt.Printf("\n%s\n", table.String())
}

// services of a cluster, in the order of the pipeline.
func clusterServices() []string {
	var names []string
	for _, s := range allinone.Services() {
		names = append(names, s.Name)
	}
	return append(names, "ticketer")
}

// firstWork names for each service the first event that says that it is at work,
// or has work waiting: planner's own, and else that of the service before.
func firstWork() map[string]string {
	return map[string]string{
		"planner": contracts.ImagePlannedV1, "analyzer": contracts.LayerRequestedV1, "assembler": contracts.ImagePlannedV1,
		"matcher": contracts.ImageAssembledV1, "attestor": contracts.ImageMatchedV1, "catalog": contracts.ImageAttestedV1,
		"ticketer": contracts.FindingOpenedV1,
	}
}

func allFaults() []fault {
	wait := func(d time.Duration) func(c *cluster) { return func(c *cluster) { pause(c.t, d) } }
	faults := []fault{
		{name: "nothing happens", short: true, during: func(*cluster, []sample.Pushed) {}},
	}
	for _, name := range clusterServices() {
		f := fault{name: name + " killed", short: name == "analyzer"}
		if name == "intake" {
			f.pushing = func(c *cluster, n int) {
				switch n {
				case 2:
					c.killService(name)
				case 3: // of this one the registry could not tell it
					c.runService(name)
				}
			}
			f.during = func(*cluster, []sample.Pushed) {}
		} else {
			f.during = func(c *cluster, p []sample.Pushed) {
				c.working(name, p)
				c.killService(name)
				c.runService(name)
			}
		}
		faults = append(faults, f)
	}
	server := func(what, how, undo string, during time.Duration) func(c *cluster, _ []sample.Pushed) {
		return func(c *cluster, _ []sample.Pushed) {
			c.control(append([]string{how}, strings.Fields(what)...)...)
			wait(during)(c)
			c.control(append([]string{undo}, strings.Fields(what)...)...)
		}
	}
	return append(faults,
		fault{name: "Kafka killed, the only broker", short: true, brokers: "1", during: server("kafka", "kill", "start", 2*time.Second)},
		fault{name: "Kafka killed, one of three", brokers: "3", during: func(c *cluster, p []sample.Pushed) {
			c.control("kill", "kafka", "2")
			c.attested(p...) // nothing stops
			c.control("start", "kafka", "2")
		}},
		fault{name: "Kafka hangs", brokers: "1", during: server("kafka", "pause", "resume", 15*time.Second)},
		fault{name: "Redis flushed and killed", short: true, redone: true, during: func(c *cluster, _ []sample.Pushed) {
			for range 5 {
				c.control("redis-cli", "flushall")
				wait(200 * time.Millisecond)(c)
			}
			server("redis", "kill", "start", 3*time.Second)(c, nil)
		}},
		fault{name: "Redis full", redone: true, before: func(c *cluster) {
			c.control("redis-cli", "config", "set", "maxmemory-policy", "noeviction")
			c.control("redis-cli", "config", "set", "maxmemory", "1")
		}, during: func(c *cluster, p []sample.Pushed) {
			c.log.wait(c.t, func(l *events) string { // only attestor needs it, for a registry without referrers API
				for _, image := range p {
					if len(l.about(contracts.ImageMatchedV1, image.String())) == 0 {
						return image.String() + " is not matched"
					}
				}
				return ""
			})
			c.control("redis-cli", "config", "set", "maxmemory", "0")
		}},
		fault{name: "Redis slow", redone: true, during: func(c *cluster, _ []sample.Pushed) {
			for range 5 {
				c.control("redis-cli", "client", "pause", "1500", "all")
				wait(2 * time.Second)(c)
			}
		}},
		fault{name: "Redis hangs", redone: true, during: server("redis", "pause", "resume", 10*time.Second)},
		fault{name: "PostgreSQL killed", short: true, during: server("postgres", "kill", "start", 2*time.Second)},
		fault{name: "PostgreSQL cuts connections", during: func(c *cluster, _ []sample.Pushed) {
			for range 10 {
				c.control("psql", "-q", "-o", "/dev/null", "-c", "select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid() and backend_type = 'client backend'")
				wait(300 * time.Millisecond)(c)
			}
		}},
		fault{name: "PostgreSQL takes no new connections", during: server("postgres", "pause", "resume", 10*time.Second)},
		fault{name: "registry killed", during: server("distribution", "kill", "start", 5*time.Second)},
		fault{
			name: "registry gives 429, then resets", short: true, proxied: true,
			before: func(c *cluster) { c.proxy.do(throttlesFor, every) },
			during: func(c *cluster, _ []sample.Pushed) {
				c.log.wait(c.t, func(*events) string {
					if n := c.proxy.hits.Load(); n < 4 {
						return fmt.Sprintf("%d requests were throttled", n)
					}
					return ""
				})
				c.proxy.do(resets, passing)
			},
		},
	)
}

// brokers returns how many there are, as a word.
func brokers(t *testing.T) string {
	t.Helper()
	return fmt.Sprint(len(strings.Split(os.Getenv("SERVERS_KAFKA"), ",")))
}

// undergo pushes images, lets the fault happen in the middle of the work, and
// looks at what is left.
func (c *cluster) undergo(f fault, fleet []sample.Image, want findings) outcomeRow {
	c.t.Helper()
	lettersBefore := len(c.deadLetters())
	host := registry.Host{Name: c.servers["SERVERS_DISTRIBUTION"], PlainHTTP: true}
	if f.proxied {
		host = registry.Host{
			Name: c.proxy.address, Address: c.store.RegistryAddress, PlainHTTP: true,
			Username: c.store.RegistryUsername, Password: c.store.RegistryPassword,
		}
	}
	client := c.registryClient(host)
	c.signal("planner", syscall.SIGSTOP) // so that the fault finds all work still to do
	if f.before != nil {
		f.before(c)
	}
	var pushed []sample.Pushed
	distinct := map[string]bool{}
	for i, image := range fleet {
		repository := fmt.Sprintf("%s/app-%d", strings.Trim(regexp.MustCompile(`[^a-z0-9]+`).ReplaceAllString(strings.ToLower(f.name), "-"), "-"), i)
		p, err := sample.Push(c.t.Context(), client, registry.Ref{Registry: host.Name, Repository: repository, Tag: "1"}, image)
		if err != nil {
			c.t.Fatal(err)
		}
		pushed = append(pushed, p)
		for _, l := range p.Layers {
			distinct[l] = true
		}
		if f.proxied {
			c.announce(p)
		}
		if f.pushing != nil {
			f.pushing(c, i+1)
		}
	}
	c.log.wait(c.t, func(l *events) string {
		for _, p := range pushed {
			if !c.told(l, p) {
				return "intake was not told of " + p.String()
			}
		}
		return ""
	})
	c.signal("planner", syscall.SIGCONT)
	f.during(c, pushed)
	over := time.Now()
	c.attested(pushed...)
	recovery := time.Since(over)
	if f.proxied {
		c.proxy.behave()
	}
	c.quiet()

	s := *c.system
	s.client = client
	sameReportsOf(c.t, s.reportDigests(pushed), want.reports)
	for image, got := range s.problemsOf(pushed) {
		if len(got) == 0 || !slices.Equal(got, want.problems[image]) {
			c.t.Errorf("problems of %s: %q, undisturbed %q", image, got, want.problems[image])
		}
	}
	c.ticketed(pushed)
	for _, p := range pushed {
		if got := s.referrers(p.String()); len(got) != 4 {
			c.t.Errorf("%s carries %d referrers: %v", p, len(got), got)
		}
	}
	row := outcomeRow{fault: f.name, images: len(pushed), distinct: len(distinct), recovery: recovery}
	for layer, n := range c.log.analyses(c.t) {
		if !distinct[layer] {
			continue
		}
		row.analysed += n
		if n > 2 || n > 1 && !f.redone {
			c.t.Errorf("layer %s was analysed %d times", layer, n)
		}
	}
	if row.analysed < row.distinct {
		c.t.Errorf("%d of %d layers were analysed", row.analysed, row.distinct)
	}
	for _, p := range pushed {
		for _, end := range ends() {
			if len(c.log.about(end, p.String())) == 0 {
				continue
			}
			row.ended++
			if end == contracts.ImageAttestedV1 {
				row.attested++
			} else {
				c.t.Errorf("%s ended with %s", p, end)
			}
		}
	}
	letters := c.deadLetters()[lettersBefore:]
	row.letters = len(letters)
	for _, l := range letters {
		c.t.Errorf("dead letter %s, %s of %s: %s", l.ID, l.EventType, l.Subject, l.Reason)
	}
	return row
}

// told says whether intake has heard of a push: from its registry, or, of a tag
// behind the proxy, from the test.
func (c *cluster) told(l *events, p sample.Pushed) bool {
	if p.Ref.Registry == c.proxy.address {
		return len(l.about(contracts.ImagePushedV1, p.Ref.Registry+"/"+p.Ref.Repository+":"+p.Ref.Tag)) > 0
	}
	return mentioned(l, contracts.ImagePushedV1, p.Ref.Digest)
}

// working waits until a service has work to do for what was pushed.
func (c *cluster) working(name string, pushed []sample.Pushed) {
	c.t.Helper()
	var digests []string
	for _, p := range pushed {
		digests = append(append(digests, p.Ref.Digest), p.Layers...)
	}
	c.log.wait(c.t, func(l *events) string {
		if !mentioned(l, firstWork()[name], digests...) {
			return name + " has nothing to do"
		}
		return ""
	})
}

// ticketed waits until each problem of what was pushed has one open ticket.
func (c *cluster) ticketed(pushed []sample.Pushed) {
	c.t.Helper()
	owners := map[string]bool{}
	for _, p := range pushed {
		owners[p.Ref.Registry+"/"+p.Ref.Repository] = true
	}
	c.log.wait(c.t, func(*events) string {
		open := map[string]int{}
		for _, ticket := range c.tickets.Tickets() {
			if _, rest, _ := strings.Cut(ticket.Body, "problem="); ticket.Open {
				key, _, _ := strings.Cut(rest, " ")
				open[key]++
			}
		}
		for _, p := range c.problems() {
			if n := open[p.Key]; owners[p.Owner] && n != 1 {
				return fmt.Sprintf("%d tickets about %s in %s are open", n, p.Package, p.Owner)
			}
		}
		return ""
	})
}

// sameReportsOf is sameReports for some of the images.
func sameReportsOf(t *testing.T, got, want map[string]string) {
	t.Helper()
	some := map[string]string{}
	for image := range got {
		some[image] = want[image]
	}
	sameReports(t, got, some)
}

// startCluster starts every service and waits until they work.
func startCluster(t *testing.T) *cluster {
	t.Helper()
	c := &cluster{
		system: &system{t: t}, dir: t.TempDir(), servers: map[string]string{},
		running: map[string]*exec.Cmd{}, logs: map[string]*bytes.Buffer{},
	}
	for _, v := range os.Environ() {
		if name, value, _ := strings.Cut(v, "="); strings.HasPrefix(name, "SERVERS_") {
			c.servers[name] = value
		}
	}
	store := startStore(t, c.dir)
	c.store, c.proxy = store, trouble(t, store.RegistryAddress)
	if err := os.WriteFile(filepath.Join(c.dir, "password"), []byte(store.RegistryPassword), 0o600); err != nil {
		t.Fatal(err)
	}
	token, err := os.ReadFile(c.servers["SERVERS_API_TOKEN_FILE"])
	if err != nil {
		t.Fatal(err)
	}
	public, err := os.ReadFile(c.servers["SERVERS_PUBLIC_KEY_FILE"])
	if err != nil {
		t.Fatal(err)
	}
	c.tickets = stub.New(strings.TrimSpace(string(token)), nil)
	tracker := httptest.NewServer(c.tickets)
	t.Cleanup(tracker.Close)
	c.tracker = tracker.URL + "/"
	cfg, err := run.Load(c.servers["SERVERS_CONFIG"], noEnv)
	if err != nil {
		t.Fatal(err)
	}
	c.AllInOne = &allinone.AllInOne{Addresses: allinone.Addresses{
		Intake: c.servers["SERVERS_INTAKE_URL"], Catalog: fmt.Sprintf("http://%v", cfg.Fill("catalog", map[string]any{})["listen"]), Token: strings.TrimSpace(string(token)), PublicKey: string(public),
		Kafka: allinone.Kafka{Broker: strings.Split(c.servers["SERVERS_KAFKA"], ",")[0]},
	}}
	t.Cleanup(func() {
		for name := range maps.Clone(c.running) { // SIGKILL ends what is stopped too
			c.killService(name)
		}
		if t.Failed() {
			c.mu.Lock()
			defer c.mu.Unlock()
			for name, log := range c.logs {
				t.Logf("%s said:\n%s", name, log)
			}
		}
	})
	for _, name := range clusterServices() {
		c.runService(name)
	}
	kafka := c.BusConfig()
	kafka.Replication = len(strings.Split(c.servers["SERVERS_KAFKA"], ","))
	c.log = listen(t, kafka)
	return c
}

// runService starts the process of a service.
func (c *cluster) runService(name string) {
	c.t.Helper()
	base, err := os.ReadFile(c.servers["SERVERS_CONFIG"])
	if err != nil {
		c.t.Fatal(err)
	}
	text := regexp.MustCompile(`(?m)^http:.*\n`).ReplaceAllString(string(base), "") // one address cannot be every process's
	text = strings.Replace(text, "registries:\n", fmt.Sprintf("registries:\n  - {host: %q, plainHTTP: true, username: %q, passwordFile: %q}\n",
		c.proxy.address, c.store.RegistryUsername, filepath.Join(c.dir, "password")), 1)
	text = strings.Replace(text, "kafka:\n", "kafka:\n  partitions: 4\n", 1)
	text += fmt.Sprintf("ticketer:\n  trackers: [{name: stub, kind: github, url: %q, secretFile: %q, createPerMinute: 1000}]\n  rules: [{tracker: stub, project: demo/security}]\n",
		c.tracker, c.servers["SERVERS_API_TOKEN_FILE"])
	config := filepath.Join(c.dir, name+".yaml")
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		c.t.Fatal(err)
	}
	c.mu.Lock()
	if c.logs[name] == nil {
		c.logs[name] = &bytes.Buffer{}
	}
	c.mu.Unlock()
	cmd := exec.Command(program(c.t), "--log-level", "warn", "run", name, "--config", config)
	cmd.Stderr = &sharedWriter{mu: &c.mu, to: c.logs[name]}
	if err := cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	c.running[name] = cmd
}

// killService ends the process of a service as a power cut would.
func (c *cluster) killService(name string) {
	c.t.Helper()
	cmd := c.running[name]
	delete(c.running, name)
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		c.t.Errorf("%s was not running any more: %v", name, err)
	}
	_ = cmd.Wait() // says only that it was killed
}

// signal sends a signal to the process of a service.
func (c *cluster) signal(name string, s syscall.Signal) {
	c.t.Helper()
	if err := c.running[name].Process.Signal(s); err != nil {
		c.t.Fatalf("%s to %s: %v", s, name, err)
	}
}

// control runs servers.sh.
func (c *cluster) control(args ...string) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), patience)
	defer cancel()
	out, err := exec.CommandContext(ctx, c.servers["SERVERS_CTL"], args...).CombinedOutput()
	if err != nil {
		c.t.Fatalf("servers.sh %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// sharedWriter lets the logs of processes be read while they are written.
type sharedWriter struct {
	mu *sync.Mutex
	to *bytes.Buffer
}

func (w *sharedWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.to.Write(p)
}
