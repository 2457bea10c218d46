package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// deployedCmd holds the commands about what runs.
type deployedCmd struct {
	Import deployedImportCmd `cmd:"" help:"Read a list of images and replace what catalog knew to run of this origin."`
}

type deployedImportCmd struct {
	serverFlags
	File   string `arg:"" help:"One registry/repository@digest a line; empty lines and those that begin with # are skipped; - for standard input." type:"path"`
	Origin string `help:"Name of where they run; an import replaces what the same origin said before." default:"import"`
	Output string `help:"table or json." enum:"table,json" default:"table" short:"o"`
}

func (*deployedImportCmd) Help() string {
	return "Examples:\n  tidewaiter deployed import running.txt --origin production\n" +
		"  kubectl get pods -A -o jsonpath='{range .items[*].status.containerStatuses[*]}{.imageID}{\"\\n\"}{end}' | tidewaiter deployed import -"
}

func (c *deployedImportCmd) Run(ctx context.Context, s *streams) error {
	in := s.in
	if c.File != "-" {
		f, err := os.Open(c.File)
		if err != nil {
			return usage(fmt.Errorf("read list: %w", err))
		}
		defer func() { _ = f.Close() }() // it was only read
		in = f
	}
	images, err := readImages(in)
	if err != nil {
		return usage(fmt.Errorf("%s: %w", c.File, err))
	}
	a, err := c.api(s)
	if err != nil {
		return err
	}
	body, err := a.post(ctx, a.catalog, "/v1/deployed", map[string]any{"origin": c.Origin, "images": images})
	if err != nil {
		return err
	}
	if err := body.Close(); err != nil {
		return unavailable(fmt.Errorf("read answer: %w", err))
	}
	if c.Output == "json" {
		return printJSON(s.out, contracts.DeployedImport{Origin: c.Origin, Images: len(images)})
	}
	fmt.Fprintf(s.err, "%d images run according to %q\n", len(images), c.Origin)
	return nil
}

// readImages reads one image a line, as Kubernetes reports image ids too.
func readImages(r io.Reader) ([]string, error) {
	images := []string{}
	lines := bufio.NewScanner(r)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		line = strings.TrimPrefix(line, "docker-pullable://")
		name, digest, ok := strings.Cut(line, "@")
		if !ok {
			return nil, fmt.Errorf("line %d: %q has no digest", n, line)
		}
		if i := strings.LastIndex(name, ":"); i > strings.LastIndex(name, "/") {
			name = name[:i] // a tag beside the digest says nothing
		}
		image, err := contracts.ParseImage(name + "@" + digest)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		images = append(images, image.String())
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read list: %w", err)
	}
	if len(images) == 0 {
		return nil, errors.New("no image in the list")
	}
	return images, nil
}
