// Package contracts holds everything that crosses a boundary of Tidewaiter:
// the data of its events, the documents it stores and attaches to images, the
// predicates it signs and the JSON its command line prints.
//
// It imports the standard library only, so that any consumer may import it.
// Each event and document has a JSON Schema (2020-12) in schemas/ and a golden
// example in examples/; contracts_test.go ties them to the Go types.
package contracts
