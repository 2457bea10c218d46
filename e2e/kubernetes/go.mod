module github.com/tidewaiter/tidewaiter/e2e/kubernetes

go 1.26.3

require (
	github.com/tidewaiter/tidewaiter/contracts v0.0.0
	github.com/tidewaiter/tidewaiter/libs v0.0.0
	github.com/tidewaiter/tidewaiter/services v0.0.0
)

replace github.com/tidewaiter/tidewaiter/contracts => ../../contracts

replace github.com/tidewaiter/tidewaiter/libs => ../../libs

replace github.com/tidewaiter/tidewaiter/services => ../../services
