package intake

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestWhoLinksClouds: the clients of queues, which are big, are linked by intake
// and by sweeper, which reads the same sources, and by no other service.
func TestWhoLinksClouds(t *testing.T) {
	commands, err := filepath.Glob(filepath.Join("..", "*", "cmd", "*"))
	if err != nil {
		t.Fatal(err)
	}
	linked := map[string]bool{}
	for _, dir := range commands {
		out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", "./"+filepath.ToSlash(dir)).Output()
		if err != nil {
			t.Fatalf("%s: %v", dir, err)
		}
		for _, heavy := range []string{"cloud.google.com/go/pubsub/v2\n", "github.com/aws/aws-sdk-go-v2/service/sqs\n"} {
			if strings.Contains(string(out), heavy) {
				linked[filepath.Base(dir)] = true
			}
		}
	}
	if !linked["intake"] {
		t.Error("intake links no client of a queue: this test looks for the wrong names")
	}
	for name := range linked {
		if name != "intake" && name != "sweeper" {
			t.Errorf("%s links the client of a queue", name)
		}
	}
}
