// Command intake receives registry webhooks.
package main

import (
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/intake"
)

func main() { run.Main(intake.Name, intake.Run) }
