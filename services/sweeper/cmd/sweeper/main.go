// Command sweeper runs the service that finds pushes whose event was lost.
package main

import (
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/sweeper"
)

func main() { run.Main(sweeper.Name, sweeper.Run) }
