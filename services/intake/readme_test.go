package intake

import (
	"os"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
)

// TestReadme: the configuration in README.md is one that is accepted, and shows every setting.
func TestReadme(t *testing.T) {
	b, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "```yaml\n")
	text, _, ok := strings.Cut(rest, "```")
	if !ok {
		t.Fatal("no configuration in README.md")
	}
	in := struct {
		Intake  Config  `yaml:"intake"`
		Sources Sources `yaml:"sources"`
	}{Intake: DefaultConfig()}
	if err := yaml.UnmarshalWithOptions([]byte(text), &in, yaml.Strict()); err != nil {
		t.Fatal(err)
	}
	if err := in.Intake.Validate(); err != nil {
		t.Error(err)
	}
	if err := in.Sources.Validate(); err != nil {
		t.Error(err)
	}
	example, err := os.ReadFile("../../deploy/tidewaiter.example.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if in.Intake.Listen != DefaultListen || !strings.Contains(string(example), "\nintake:\n  listen: "+DefaultListen+"\n") {
		t.Errorf("README.md or the example file has another address than the default, %s", DefaultListen)
	}
	for _, setting := range []string{
		"listen", "maxBody", "ackTimeout", "keep", "admin", "kind", "registry", "anyRegistry", "pathMapping", "repositoryKey", "paths", "repositories", "tags", "platforms", "rewrite",
		"auth", "lane", "quota", "origins", "sweep",
		"oidc", "issuer", "audience", "email", "subject", "claims", "keysURL", "sns", "topicARN",
		"pull", "sqs", "queueURL", "region", "endpoint", "concurrency", "visibility", "pubsub", "subscription", "plaintext",
		"mapping", "events", "action", "repository", "tag", "digest", "id", "time",
	} {
		if !strings.Contains(text, " "+setting+":") {
			t.Errorf("%s is not shown", setting)
		}
	}
}
