package statement_test

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/tidewaiter/tidewaiter/"

// mayLink are the programs that may link sigstore's code, and what they are made of.
var mayLink = []string{
	module + "services/attestor", module + "services/gatekeeper", module + "services/tidewaiter",
}

// Only attestor, gatekeeper and the command line link cosign, and only this
// package names it, so that another version of it is a small step.
func TestWhoLinksCosign(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "go", "list", "-e",
		"-f", `{{.ImportPath}} {{join .Imports ","}} {{join .Deps ","}}`,
		module+"services/...", module+"libs/...", module+"contracts/...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	sigstore := func(packages string) bool {
		return slices.ContainsFunc(strings.Split(packages, ","), func(p string) bool {
			return strings.HasPrefix(p, "github.com/sigstore/")
		})
	}
	linking := 0
	for line := range strings.Lines(string(out)) {
		fields := strings.Split(strings.TrimSuffix(line, "\n"), " ")
		if len(fields) != 3 {
			t.Fatalf("go list says %q", line)
		}
		path, imports, deps := fields[0], fields[1], fields[2]
		if sigstore(imports) && path != module+"services/attestor/statement" {
			t.Errorf("%s imports sigstore's code", path)
		}
		if !sigstore(deps) {
			continue
		}
		linking++
		if !slices.ContainsFunc(mayLink, func(may string) bool { return path == may || strings.HasPrefix(path, may+"/") }) {
			t.Errorf("%s links sigstore's code", path)
		}
	}
	if linking == 0 {
		t.Error("nothing links sigstore's code, this test looks in the wrong place")
	}
}
