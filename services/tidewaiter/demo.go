package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/registry"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/attestor/statement"
	"github.com/tidewaiter/tidewaiter/services/matcher/policy"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/allinone"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/sample"
)

// demoCmd shows the whole pipeline on a real image.
type demoCmd struct {
	Keep       bool          `help:"Leave everything running when the story is told, until interrupted."`
	Image      string        `help:"Copy this image from a real registry instead of building one." placeholder:"REF"`
	Advisories string        `help:"Use real advisories: a snapshot file, or a directory to build one from." type:"path" placeholder:"DIR|FILE"`
	Data       string        `help:"Keep the data here; default a temporary directory that is removed." type:"path" placeholder:"DIR"`
	Output     string        `help:"text or json (one line an event)." enum:"text,json" default:"text" short:"o"`
	Timeout    time.Duration `help:"Give up after this long." default:"5m"`
}

func (*demoCmd) Help() string {
	return "Needs nothing but this program. Exit code 0 only if everything it shows has happened.\n\n" +
		"Examples:\n  tidewaiter demo\n  tidewaiter demo --keep\n  tidewaiter demo --advisories ./advisories --output json\n  tidewaiter demo --image docker.io/library/redis:6"
}

func (c *demoCmd) Run(ctx context.Context, s *streams) (err error) {
	dir := c.Data
	if dir == "" {
		dir, err = os.MkdirTemp("", "tidewaiter-demo-")
		if err != nil {
			return fmt.Errorf("make a directory for the demo: %w", err)
		}
		defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	}
	d := &demo{demoCmd: *c, streams: s}
	stop, err := d.start(ctx, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()

	told, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	n := newNarrator(s.out, s.err, c.Output == "json")
	defer n.close()
	d.n = n
	storyErr := d.tell(told)
	if storyErr != nil {
		storyErr = fmt.Errorf("the demo did not go as it should: %w", storyErr)
	}
	n.done(d.first.String(), d.all, storyErr)
	if storyErr != nil || !c.Keep {
		return storyErr
	}
	n.addresses(dir, d.all)
	<-ctx.Done()
	return nil
}

// start starts everything: the pipeline, a gatekeeper, an advisor that watches
// the advisories, and a stub that stands for the user's tracker.
func (d *demo) start(ctx context.Context, dir string) (stop func() error, err error) {
	o := allinone.Options{Dir: dir, AnonymousPull: true, Log: d.streams.log}
	info, err := os.Stat(d.Advisories)
	switch {
	case d.Advisories != "" && err != nil:
		return nil, usage(fmt.Errorf("advisories: %w", err))
	case d.Advisories != "" && !info.IsDir():
		o.Advisories = d.Advisories // a snapshot does not change, so there will be no news
	default:
		if o.Follow, d.news, err = d.sources(dir); err != nil {
			return nil, err
		}
	}
	if d.gatekeeper, err = allinone.FreeAddress(ctx); err != nil {
		return nil, err
	}
	o.GatekeeperListen = d.gatekeeper
	token := rand.Text()
	if d.tracker, err = startStub(ctx, token); err != nil {
		return nil, err
	}
	secretFile := filepath.Join(dir, "tracker.secret")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make a directory for the demo: %w", err)
	}
	if err := os.WriteFile(secretFile, []byte(token), 0o600); err != nil {
		return nil, fmt.Errorf("write the stub's secret: %w", err)
	}
	empty, err := run.Parse("", nil, func(string) (string, bool) { return "", false })
	if err != nil {
		return nil, err
	}
	o.Config, err = empty.With(map[string]any{
		"advisor":    map[string]any{"poll": "250ms"},
		"matcher":    map[string]any{"poll": "250ms"},
		"gatekeeper": map[string]any{"policyDigest": policy.Default().Digest()},
		"ticketer": map[string]any{
			"trackers": []any{map[string]any{"name": "stub", "kind": "github", "url": d.tracker.url, "secretFile": secretFile, "createPerMinute": 1000}},
			"rules":    []any{map[string]any{"tracker": "stub", "project": "demo/security"}},
		},
	})
	if err != nil {
		return nil, err
	}
	if o.Advisories != "" {
		if o.Config, err = o.Config.Without("advisor"); err != nil {
			return nil, err
		}
	}
	if d.all, err = allinone.Start(ctx, o); err != nil {
		return nil, errors.Join(err, d.tracker.close())
	}
	return func() error { return errors.Join(d.all.Stop(), d.tracker.close()) }, nil
}

// demo is one telling of the story.
type demo struct {
	demoCmd
	streams *streams
	all     *allinone.AllInOne
	n       *narrator
	client  *registry.Client
	keys    []statement.Verifier
	first   sample.Pushed // the vulnerable image

	gatekeeper string // address
	news       string // folder in which an advisory may arrive; empty: none can
	tracker    *trackerStub
	cluster    *cluster
}

// tell shows each chapter, and fails at the first thing that is not as it should be.
func (d *demo) tell(ctx context.Context) (err error) {
	host := d.all.RegistryHost()
	client, err := registry.New([]registry.Host{host}, d.streams.log)
	if err != nil {
		return err
	}
	d.client = client
	if d.keys, err = statement.LoadVerifiers([]byte(d.all.PublicKey)); err != nil {
		return err
	}
	f, err := follow(ctx, d.all.BusConfig(), d.streams.log, d.n)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.stop()) }()

	if d.Image != "" {
		return d.tellOwn(ctx, f)
	}
	executable, err := ownExecutable()
	if err != nil {
		return err
	}
	story, err := sample.NewStory(executable)
	if err != nil {
		return err
	}

	d.n.chapter("An image is pushed: two platforms, a Debian base, libraries of four languages, servers that no package manager installed")
	d.first, err = d.push(ctx, f, "demo/shop", "1.0", story.Vulnerable...)
	if err != nil {
		return err
	}
	if err := d.findings(ctx, d.first.Ref, mustFind); err != nil {
		return err
	}

	d.n.chapter("A second image on the same base: only its new layer is analysed")
	second, err := d.push(ctx, f, "demo/reports", "1.0", story.Sharing...)
	if err != nil {
		return err
	}
	fresh := story.Sharing[0].Layers[len(story.Sharing[0].Layers)-1].Descriptor.Digest.String()
	if got := f.analyzedBy(second); len(got) != 1 || got[0] != fresh {
		return fmt.Errorf("of the second image %d layers were analysed, want only its new one", len(got))
	}

	d.n.chapter("A mended image passes the default policy")
	clean, err := d.push(ctx, f, "demo/mended", "1.0", story.Clean...)
	if err != nil {
		return err
	}
	// Of real advisories, some have nothing about this base: a gap, which warns.
	if verdict := f.verdict(clean); verdict != contracts.VerdictPass && (d.Advisories == "" || verdict != contracts.VerdictWarn) {
		return fmt.Errorf("the verdict on the mended image is %q, want %q", verdict, contracts.VerdictPass)
	}
	if err := f.oncePerLayer(); err != nil {
		return err
	}

	d.n.chapter("What would be let in at deploy")
	if err := d.verify(ctx, clean.Ref, nil); err != nil {
		return err
	}
	if err := d.verify(ctx, d.first.Ref, statement.ErrVerdict); err != nil {
		return err
	}
	stranger, err := d.stranger(ctx, story.Unattested)
	if err != nil {
		return err
	}
	if err := d.deploy(ctx, f, clean, stranger); err != nil {
		return err
	}
	if err := d.tellNews(ctx, f, clean); err != nil {
		return err
	}

	d.n.chapter("The fleet so far")
	if err := d.fleet(ctx, 4); err != nil {
		return err
	}
	return d.all.StartService("intake")
}

// tellOwn is the story of an image of the user's.
func (d *demo) tellOwn(ctx context.Context, f *follower) error {
	from, err := parseRef(d.Image)
	if err != nil {
		return err
	}
	cfg, err := run.Load(d.streams.config, os.LookupEnv)
	if err != nil {
		return err
	}
	hosts := append(cfg.Hosts(cliName), d.all.RegistryHost())
	if !slices.ContainsFunc(hosts, func(h registry.Host) bool { return h.Name == from.Registry }) {
		hosts = append(hosts, registryFlags{}.host(from.Registry))
	}
	both, err := registry.New(hosts, d.streams.log)
	if err != nil {
		return usage(err)
	}
	d.n.chapter("An image is copied from " + from.Registry)
	to := registry.Ref{Registry: d.all.Registry.Host, Repository: from.Repository, Tag: tagOf(from)}
	copied, err := both.Copy(ctx, from, to)
	if err != nil {
		return registryError(fmt.Errorf("copy %s: %w", d.Image, err))
	}
	to.Digest = copied.Digest.String()
	d.first = sample.Pushed{Ref: to}
	d.n.pushed(d.first)
	if err := f.awaitAttested(ctx, d.first); err != nil {
		return err
	}
	if err := d.findings(ctx, to, nil); err != nil {
		return err
	}
	if err := f.oncePerLayer(); err != nil {
		return err
	}
	v, err := statement.VerifyImage(ctx, d.client, to, statement.Options{Keys: d.keys})
	if err != nil && !errors.Is(err, statement.ErrVerdict) {
		return err
	}
	d.n.verified(to, v)
	d.n.chapter("The fleet so far")
	return d.fleet(ctx, 1)
}

func tagOf(ref registry.Ref) string {
	if ref.Tag != "" {
		return ref.Tag
	}
	return "copied"
}

// push uploads an image as a client would and waits for its statements.
func (d *demo) push(ctx context.Context, f *follower, repository, tag string, images ...sample.Image) (sample.Pushed, error) {
	p, err := sample.Push(ctx, d.client, registry.Ref{Registry: d.all.Registry.Host, Repository: repository, Tag: tag}, images...)
	if err != nil {
		return p, err
	}
	d.n.pushed(p)
	return p, f.awaitAttested(ctx, p)
}

// mustFind are findings of the demo's image that a scan is expected to make,
// by the package that carries them. They hold for the built-in advisories and
// for any real ones.
var mustFind = []string{"lodash", "Django", "org.apache.logging.log4j:log4j-core", "stdlib", "redis", "tomcat"}

// findings reads the report that is attached to an image and prints it.
func (d *demo) findings(ctx context.Context, ref registry.Ref, expected []string) error {
	report, err := readReport(ctx, d.client, ref)
	if err != nil {
		return err
	}
	d.n.findings(report)
	for _, name := range expected {
		found := slices.ContainsFunc(report.Findings, func(f contracts.Finding) bool {
			return strings.EqualFold(f.Package.Name, name)
		})
		if !found {
			return fmt.Errorf("nothing was found in %s, which is known to be vulnerable", name)
		}
	}
	for _, f := range report.Findings {
		if strings.EqualFold(f.Package.Name, "minimist") {
			return errors.New("a finding in minimist, which a later layer deleted")
		}
	}
	return nil
}

// verify asks for the verdict as a gatekeeper would; want is the refusal that is expected.
func (d *demo) verify(ctx context.Context, ref registry.Ref, want error) error {
	v, err := statement.VerifyImage(ctx, d.client, ref, statement.Options{Keys: d.keys, Policy: policy.Default().Digest()})
	if want == nil && err != nil {
		return fmt.Errorf("verify %s: %w", ref.Repository, err)
	}
	if want != nil && !errors.Is(err, want) {
		return fmt.Errorf("verify %s gave %w, want: %w", ref.Repository, err, want)
	}
	d.n.verified(ref, v)
	return nil
}

// stranger pushes an image while intake is down, so that it is not attested,
// and shows that it is refused.
func (d *demo) stranger(ctx context.Context, images []sample.Image) (sample.Pushed, error) {
	if err := d.all.StopService("intake"); err != nil {
		return sample.Pushed{}, err
	}
	p, err := sample.Push(ctx, d.client, registry.Ref{Registry: d.all.Registry.Host, Repository: "demo/stranger", Tag: "1.0"}, images...)
	if err != nil {
		return p, err
	}
	return p, d.verify(ctx, p.Ref, statement.ErrNoStatement)
}

// deploy asks gatekeeper for a Pod with each of the three images. It has the one
// that nobody told of scanned, and then lets it in.
func (d *demo) deploy(ctx context.Context, f *follower, clean, stranger sample.Pushed) error {
	d.n.chapter("Three Pods are created; the cluster asks gatekeeper")
	c, err := newCluster(d.all.GatekeeperDir(), d.gatekeeper, d.all.Token)
	if err != nil {
		return err
	}
	d.cluster = c
	if err := d.pod(ctx, c, clean.Ref, true); err != nil {
		return err
	}
	if err := d.pod(ctx, c, d.first.Ref, false); err != nil {
		return err
	}
	if err := d.pod(ctx, c, stranger.Ref, false); err != nil {
		return err
	}
	d.n.chapter("Gatekeeper has asked for a scan of what nobody had told of")
	if err := f.awaitAttested(ctx, stranger); err != nil {
		return err
	}
	return d.awaitPod(ctx, stranger, true)
}

// tellNews has an advisory arrive and waits for what follows from it: a new
// verdict on the image that was clean, a ticket, and the end of its admission.
func (d *demo) tellNews(ctx context.Context, f *follower, clean sample.Pushed) error {
	if d.news == "" {
		return nil
	}
	d.n.chapter("An advisory arrives (made up for this demo) about " + newsPackage + ", which the mended image holds")
	read := f.layerRequests()
	began := time.Now()
	if err := publish(d.news, news); err != nil {
		return err
	}
	if err := f.awaitVerdict(ctx, clean, contracts.VerdictFail); err != nil {
		return err
	}
	ticket, err := d.tracker.wait(ctx, clean.Ref.Registry+"/"+clean.Ref.Repository, newsPackage)
	if err != nil {
		return err
	}
	d.n.ticket(ticket)
	if err := d.verify(ctx, clean.Ref, statement.ErrVerdict); err != nil {
		return err
	}
	if err := d.awaitPod(ctx, clean, false); err != nil {
		return err
	}
	if n := f.layerRequests() - read; n != 0 {
		return fmt.Errorf("%d layers were asked for again, want none", n)
	}
	d.n.followed(time.Since(began))
	return nil
}

// awaitPod waits until gatekeeper, which is told by an event, answers so about a Pod.
func (d *demo) awaitPod(ctx context.Context, p sample.Pushed, allowed bool) error {
	for {
		a, err := d.cluster.create(ctx, p.Ref)
		if err != nil {
			return err
		}
		if a.Allowed == allowed {
			d.n.admitted(p.Ref, a)
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("a Pod with %s: admitted %t, want %t: %w", p.Ref.Repository, a.Allowed, allowed, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// fleet waits until catalog has seen all images and prints its report.
func (d *demo) fleet(ctx context.Context, images int) error {
	a := &api{
		catalog: endpoint{service: "catalog", url: d.all.Catalog, token: func() (string, error) { return d.all.Token, nil }}, http: httpClient(),
	}
	for {
		var r contracts.FleetReport
		if err := a.ask(ctx, a.catalog, "/v1/report", &r); err != nil {
			return err
		}
		if r.Images >= images {
			return d.n.fleet(r)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("catalog knows %d images, want %d: %w", r.Images, images, ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// readReport returns the report attached to an image.
func readReport(ctx context.Context, client *registry.Client, ref registry.Ref) (*contracts.Report, error) {
	list, err := client.Referrers(ctx, ref, contracts.MediaTypeReport)
	if err != nil {
		return nil, fmt.Errorf("look for the report: %w", err)
	}
	if len(list) != 1 {
		return nil, fmt.Errorf("%d reports are attached to %s, want 1", len(list), ref.Repository)
	}
	const limit = 64 << 20
	a, err := client.ArtifactContent(ctx, ref.Registry, ref.Repository, list[0].Digest.String(), limit)
	if err != nil {
		return nil, fmt.Errorf("read the report: %w", err)
	}
	return decodeReport(a.Content)
}

// ownExecutable returns this program, to put into an image.
func ownExecutable() ([]byte, error) {
	name, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find own executable: %w", err)
	}
	b, err := os.ReadFile(name) //nolint:gosec // this program itself
	if err != nil {
		return nil, fmt.Errorf("read own executable: %w", err)
	}
	return b, nil
}
