// Command assembler runs the service that joins layer reports into inventories.
package main

import (
	"github.com/tidewaiter/tidewaiter/libs/run"
	"github.com/tidewaiter/tidewaiter/services/assembler"
)

func main() { run.Main(assembler.Name, assembler.Run) }
