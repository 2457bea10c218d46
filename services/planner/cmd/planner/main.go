// Command planner runs the planner.
package main

import (
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/planner"
)

func main() { run.Main("planner", planner.Run) }
