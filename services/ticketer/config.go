package ticketer

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/ticketer/tracker"
)

// Defaults of the configuration.
const (
	// DefaultCreatePerMinute is how many tickets a tracker gets in a minute;
	// GitHub allows 80 contents a minute and 500 an hour to everything of one user.
	DefaultCreatePerMinute = 20
	// DefaultTimeout bounds one request to a tracker.
	DefaultTimeout = 20 * time.Second
	// DefaultSettle is how long a creation whose outcome is unknown is left
	// alone before the tracker is asked whether it happened.
	DefaultSettle = 30 * time.Second
	// DefaultLabel marks all our tickets.
	DefaultLabel = "tidewaiter"
)

// Kinds of trackers.
const (
	KindGitHub  = "github"
	KindGitLab  = "gitlab"
	KindWebhook = "webhook"
)

// NoTracker is the tracker of a rule that says: no ticket.
const NoTracker = "none"

// Config is the section "ticketer" of the configuration. Without rules there
// are no tickets.
type Config struct {
	Trackers []Tracker     `yaml:"trackers"`
	Rules    []Rule        `yaml:"rules"`   // the first that fits decides; none: no ticket
	Label    string        `yaml:"label"`   // on every ticket
	Timeout  time.Duration `yaml:"timeout"` // of one request
	Settle   time.Duration `yaml:"settle"`  // before an unknown outcome is looked into
}

// Tracker is one tracker, or one webhook.
type Tracker struct {
	Name            string `yaml:"name"`       // rules name it; must not change while it has tickets
	Kind            string `yaml:"kind"`       // github, gitlab, webhook
	URL             string `yaml:"url"`        // of the API (https://api.github.com/, https://gitlab.com), or of the webhook
	SecretFile      string `yaml:"secretFile"` // token, or the webhook's secrets, one a line; read anew for each request
	SecretEnv       string `yaml:"secretEnv"`  // environment variable that holds it instead
	CAFile          string `yaml:"caFile"`     // PEM, beside the system's
	PlainHTTP       bool   `yaml:"plainHTTP"`  // allows an http URL; loopback needs no permission
	CreatePerMinute int    `yaml:"createPerMinute"`
}

// Rule says which problems get a ticket, and where. All of its conditions must hold.
type Rule struct {
	Repositories []string `yaml:"repositories"` // registry/repository, or a prefix that ends at a "/"; none: all
	MinSeverity  string   `yaml:"minSeverity"`  // critical, high, medium, low; known exploited problems count as critical
	OnlyFixable  bool     `yaml:"onlyFixable"`

	Tracker      string   `yaml:"tracker"` // a tracker's name, or "none"
	Project      string   `yaml:"project"` // owner/repository, or a GitLab path; not of a webhook
	Labels       []string `yaml:"labels"`
	Assignees    []string `yaml:"assignees"`    // user names
	Confidential bool     `yaml:"confidential"` // GitLab
}

// DefaultConfig returns the configuration before anything is set.
func DefaultConfig() Config {
	return Config{Label: DefaultLabel, Timeout: DefaultTimeout, Settle: DefaultSettle}
}

// Validate says what is wrong with the configuration.
func (c Config) Validate() error {
	var problems []error
	say := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	kinds := map[string]string{NoTracker: NoTracker}
	for i, t := range c.Trackers {
		where := fmt.Sprintf("trackers[%d] %q", i, t.Name)
		if t.Name == "" || kinds[t.Name] != "" {
			say("%s: the name is empty, reserved or taken", where)
		}
		switch t.Kind {
		case KindGitHub, KindGitLab, KindWebhook:
			kinds[t.Name] = t.Kind
		default:
			say("%s: kind is %q, known are %s, %s, %s", where, t.Kind, KindGitHub, KindGitLab, KindWebhook)
			kinds[t.Name] = "unknown"
		}
		if why := badURL(t); why != "" {
			say("%s: url %s", where, why)
		}
		if (t.SecretFile == "") == (t.SecretEnv == "") {
			say("%s: name the secret by secretFile or by secretEnv, one of them", where)
		}
		if t.CreatePerMinute < 0 || t.CreatePerMinute > 1000 {
			say("%s: createPerMinute is %d, 1 to 1000 are possible (0: %d)", where, t.CreatePerMinute, DefaultCreatePerMinute)
		}
	}
	for i, r := range c.Rules {
		where := fmt.Sprintf("rules[%d]", i)
		switch kinds[r.Tracker] {
		case "":
			say("%s: there is no tracker %q", where, r.Tracker)
		case KindGitHub:
			if owner, name, _ := strings.Cut(r.Project, "/"); owner == "" || name == "" || strings.Contains(name, "/") {
				say("%s: project is %q, owner/repository is expected", where, r.Project)
			}
		case KindGitLab:
			if !strings.Contains(strings.Trim(r.Project, "/"), "/") {
				say("%s: project is %q, the project's whole path is expected", where, r.Project)
			}
		}
		if r.MinSeverity != "" && contracts.SeverityRank(r.MinSeverity) == 0 {
			say("%s: minSeverity is %q, known are critical, high, medium, low", where, r.MinSeverity)
		}
		for _, l := range r.Labels {
			if l == "" || strings.Contains(l, ",") {
				say("%s: label %q is empty or has a comma", where, l)
			}
		}
	}
	if c.Label == "" || strings.Contains(c.Label, ",") {
		say("label is empty or has a comma")
	}
	if c.Timeout < time.Second || c.Settle < c.Timeout {
		say("timeout is %s, settle %s; a timeout of at least 1s is needed, and to settle takes no less", c.Timeout, c.Settle)
	}
	return errors.Join(problems...)
}

// badURL says what is wrong with a tracker's address, "" for nothing. The
// address itself is not repeated: a webhook's may hold a secret.
func badURL(t Tracker) string {
	u, err := url.Parse(t.URL)
	switch {
	case err != nil || u.Host == "":
		return "is no URL"
	case u.User != nil:
		return "holds credentials; they belong in the secret"
	case u.Scheme == "https":
		return ""
	case u.Scheme != "http":
		return "must begin with https://"
	}
	ip := net.ParseIP(u.Hostname())
	if t.PlainHTTP || u.Hostname() == "localhost" || ip != nil && ip.IsLoopback() {
		return ""
	}
	return "is not encrypted; set plainHTTP if that is right"
}

// fits says whether the rule is for a problem.
func (r Rule) fits(p contracts.Problem) bool {
	rank := contracts.SeverityRank(p.Severity)
	if p.KEV {
		rank = contracts.SeverityRank(contracts.SeverityCritical)
	}
	if rank < contracts.SeverityRank(r.MinSeverity) || r.OnlyFixable && len(p.FixedIn) == 0 {
		return false
	}
	if len(r.Repositories) == 0 {
		return true
	}
	for _, prefix := range r.Repositories {
		if p.Owner == prefix || strings.HasPrefix(p.Owner, strings.TrimSuffix(prefix, "/")+"/") {
			return true
		}
	}
	return false
}

// route returns the first rule that fits; false: no ticket.
func (c Config) route(p contracts.Problem) (Rule, bool) {
	for _, r := range c.Rules {
		if r.fits(p) {
			return r, r.Tracker != NoTracker
		}
	}
	return Rule{}, false
}

// perMinute returns how many tickets a tracker gets in a minute.
func (c Config) perMinute(name string) int {
	for _, t := range c.Trackers {
		if t.Name == name && t.CreatePerMinute > 0 {
			return t.CreatePerMinute
		}
	}
	return DefaultCreatePerMinute
}

// Connect returns clients of all configured trackers and webhooks, by name.
// Nothing is asked yet; secrets are read to see that they are there. now may be
// nil, for the present.
func (c Config) Connect(lookupEnv func(string) (string, bool), now func() time.Time) (map[string]tracker.Tracker, map[string]Deliverer, error) {
	trackers, webhooks := map[string]tracker.Tracker{}, map[string]Deliverer{}
	var problems []error
	for _, t := range c.Trackers {
		secret := func() (string, error) {
			s, err := run.Secret("ticketer.trackers "+t.Name, t.SecretFile, t.SecretEnv, lookupEnv)
			if err == nil && strings.TrimSpace(s) == "" {
				return "", fmt.Errorf("ticketer.trackers %s: the secret is empty: %w", t.Name, run.ErrConfig)
			}
			return strings.TrimSpace(s), err
		}
		if _, err := secret(); err != nil {
			problems = append(problems, err)
			continue
		}
		o := tracker.Options{URL: t.URL, Secret: secret, Timeout: c.Timeout, CAFile: t.CAFile, Now: now}
		var err error
		switch t.Kind {
		case KindGitHub:
			trackers[t.Name], err = tracker.NewGitHub(o)
		case KindGitLab:
			trackers[t.Name], err = tracker.NewGitLab(o)
		default:
			webhooks[t.Name], err = tracker.NewWebhook(o)
		}
		if err != nil {
			problems = append(problems, fmt.Errorf("ticketer.trackers %s: %w: %w", t.Name, err, run.ErrConfig))
		}
	}
	return trackers, webhooks, errors.Join(problems...)
}
