// Package e2e tests the whole pipeline: in one process on the embedded
// servers, reached over their real protocols; and, with the tag real, as
// processes of their own on the servers that servers/servers.sh starts.
package e2e
