package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"time"

	"github.com/tidewaiter/tidewaiter/contracts"
	"github.com/tidewaiter/tidewaiter/services/catalog"
	"github.com/tidewaiter/tidewaiter/services/intake"
)

// submitCmd sends a push event by hand.
type submitCmd struct {
	serverFlags
	Ref     string        `arg:"" help:"registry/repository:tag or registry/repository@digest, in a registry that is configured."`
	Wait    bool          `help:"Wait for the verdict; exit 1 when the policy fails the image."`
	Timeout time.Duration `help:"How long to wait." default:"10m"`
	Output  string        `help:"table or json." enum:"table,json" default:"table" short:"o"`
}

func (*submitCmd) Help() string {
	return "Examples:\n  tidewaiter submit registry.example.com/team/app:1.2\n  tidewaiter submit registry.example.com/team/app:1.2 --wait --output json"
}

func (c *submitCmd) Run(ctx context.Context, s *streams) error {
	a, err := c.api(s)
	if err != nil {
		return err
	}
	body, err := a.post(ctx, a.intake, "/v1/submit", map[string]string{"ref": c.Ref})
	if err != nil {
		return err
	}
	var submitted intake.Submitted
	if err := decode(body, &submitted); err != nil {
		return err
	}
	if !c.Wait {
		fmt.Fprintf(s.err, "submitted %s; follow it with: tidewaiter where %s\n", c.Ref, c.Ref)
		return nil
	}
	ended, err := c.wait(ctx, a, submitted)
	if err != nil {
		return err
	}
	state := ended.Image
	if state == nil {
		return policyError(fmt.Errorf("%s ended as %s: %s", c.Ref, ended.State, ended.Message))
	}
	if c.Output == "json" {
		if err := printJSON(s.out, state); err != nil {
			return err
		}
	} else {
		fmt.Fprintf(s.out, "%s\t%s %s\n", state.Image, state.State, state.Verdict)
	}
	switch {
	case state.State != "attested":
		return policyError(fmt.Errorf("%s ended as %s; tidewaiter where %s tells why", c.Ref, state.State, c.Ref))
	case state.Verdict == contracts.VerdictFail:
		return policyError(fmt.Errorf("the policy fails %s; tidewaiter where %s tells what was found", c.Ref, c.Ref))
	}
	return nil
}

// wait returns what became of the push that was submitted, and of no other.
func (c *submitCmd) wait(ctx context.Context, a *api, push intake.Submitted) (catalog.Outcome, error) {
	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	path := "/v1/outcome?push=" + url.QueryEscape(push.ID) + "&subject=" + url.QueryEscape(push.Subject)
	for {
		var now catalog.Outcome
		err := a.ask(ctx, a.catalog, path, &now)
		if err != nil && ctx.Err() == nil {
			return now, err
		}
		if err == nil && now.Ended {
			return now, nil
		}
		select {
		case <-ctx.Done():
			return now, unavailable(errors.New("no verdict in time; tidewaiter where " + c.Ref + " shows how far it came"))
		case <-tick.C:
		}
	}
}
