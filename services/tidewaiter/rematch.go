package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/tidewaiter/tidewaiter/contracts"
)

// rematchCmd has images matched again, which sends nothing over the network but
// their new statements.
type rematchCmd struct {
	serverFlags
	Ref    string `arg:"" optional:"" help:"registry/repository, with :tag or @digest or all of it, or a digest."`
	All    bool   `help:"The whole fleet."`
	Output string `help:"table or json." enum:"table,json" default:"table" short:"o"`
}

func (*rematchCmd) Help() string {
	return "After a change of the policy: stored inventories are matched with the newest advisories, judged by matcher's policy and\n" +
		"signed anew. Nothing is pulled. What runs comes first.\n\n" +
		"Examples:\n  tidewaiter rematch --all\n  tidewaiter rematch registry.example.com/team/app"
}

func (c *rematchCmd) Run(ctx context.Context, s *streams) error {
	if c.All == (c.Ref != "") {
		return usage(errors.New("name what is to be matched again, or give --all"))
	}
	a, err := c.api(s)
	if err != nil {
		return err
	}
	request := map[string]any{"ref": c.Ref}
	if c.All {
		request = map[string]any{"all": true}
	}
	body, err := a.post(ctx, a.catalog, "/v1/rematch", request)
	if err != nil {
		return err
	}
	var answer contracts.Rematch
	if err := decode(body, &answer); err != nil {
		return err
	}
	if answer.Images == 0 && !c.All {
		return usage(fmt.Errorf("no image with a verdict is known as %s; tidewaiter submit asks for a first one", c.Ref))
	}
	if c.Output == "json" {
		return printJSON(s.out, answer)
	}
	fmt.Fprintf(s.err, "%d images are matched again; tidewaiter where REF tells of each\n", answer.Images)
	return nil
}
