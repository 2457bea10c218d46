// Command attestor runs the attestor service.
package main

import (
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/attestor"
)

func main() { run.Main(attestor.Name, attestor.Run) }
