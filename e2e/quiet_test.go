package e2e

import (
	"slices"
	"strings"
	"testing"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/tidewaiter/allinone"
)

// What the other tests wait for: it is not quiet while the very first event of a
// service is left, and the test itself has read everything when it is.
func TestQuiet(t *testing.T) {
	t.Parallel()
	s := start(t, allinone.Options{})
	if err := s.StopService("planner"); err != nil {
		t.Fatal(err)
	}
	p := s.push("team/app", "1", distinctFleet(t, 80, 1)...)
	s.log.wait(t, func(l *events) string {
		if !mentioned(l, contracts.ImagePushedV1, p.Ref.Digest) {
			return "nothing was pushed"
		}
		return ""
	})
	client := s.kafkaClient()
	_, left, err := s.left(client, "")
	if err != nil || !slices.ContainsFunc(left, func(what string) bool { return strings.HasPrefix(what, "planner has") }) {
		t.Errorf("planner has its first event to handle, left is %q, %v", left, err)
	}
	if err := s.StartService("planner"); err != nil {
		t.Fatal(err)
	}
	s.quiet()
	if n := len(s.log.about(contracts.ImageAttestedV1, p.String())); n == 0 {
		t.Error("it was quiet before the image was attested")
	}
	behind := &events{next: map[string]map[int]int64{contracts.ImageAttestedV1: {}}}
	ends, _, err := s.left(client, "")
	if err != nil || len(behind.unread(ends)) == 0 {
		t.Errorf("a reader that has read nothing has nothing left, %v", err)
	}
}
