// Package kubernetes holds the tests of Tidewaiter beside a real Kubernetes API
// server:
//
//	cd e2e/kubernetes && go test -tags kubernetes ./...
//
// servers/ holds the modules of etcd and kube-apiserver and the script that
// builds them once into the user's cache; the tests start and stop them on
// loopback, and fail where they cannot be built.
package kubernetes
