// Command matcher runs the service that matches inventories with advisories.
package main

import (
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/matcher"
)

func main() { run.Main(matcher.Name, matcher.Run) }
