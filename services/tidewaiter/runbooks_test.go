package main

import (
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Whoever types a command of a runbook in the middle of the night is not told
// that a flag is missing.
func TestCommandsOfTheRunbooksParse(t *testing.T) {
	pages, err := filepath.Glob("../../deploy/runbooks/*.md")
	if err != nil || len(pages) < 9 {
		t.Fatalf("%d pages, %v", len(pages), err)
	}
	var (
		command = regexp.MustCompile("`tidewaiter ([^`]+)`")
		word    = regexp.MustCompile(`'[^']*'|\S+`)
	)
	seen := 0
	for _, page := range pages {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range command.FindAllStringSubmatch(string(text), -1) {
			line, _, _ := strings.Cut(m[1], " <") // where it reads from
			var args []string
			for _, w := range word.FindAllString(line, -1) {
				args = append(args, strings.Trim(w, "'"))
			}
			parser, err := newParser(&root{}, io.Discard, io.Discard)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := parser.Parse(args); err != nil {
				t.Errorf("%s: tidewaiter %s: %v", filepath.Base(page), m[1], err)
			}
			seen++
		}
	}
	if seen < 18 {
		t.Errorf("only %d commands were parsed", seen)
	}
}
