// Package e2e tests the whole pipeline: in one process on the embedded
// servers, reached over their real protocols.
package e2e
