// Command ticketer runs the ticketer service.
package main

import (
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/ticketer"
)

func main() { run.Main(ticketer.Name, ticketer.Run) }
