// Command advisor runs the service that publishes advisory snapshots.
package main

import (
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/advisor"
)

func main() { run.Main(advisor.Name, advisor.Run) }
