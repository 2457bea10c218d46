// Command gatekeeper runs the gatekeeper service.
package main

import (
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/gatekeeper"
)

func main() { run.Main(gatekeeper.Name, gatekeeper.Run) }
