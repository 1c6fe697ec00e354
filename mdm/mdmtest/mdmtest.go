// Package mdmtest simulates Apple devices as an MDM server sees them: they
// have keys and certificates of their own, enroll, sign their requests, ask
// for commands, answer them and repeat an answer until the server took it.
// Tests use them one at a time, cmd/mdmsim by the thousand.
//
// The package deliberately imports nothing else of this module. It writes and
// reads the wire format by itself, so that a server that misspells a key meets
// a witness that does not share the mistake.
//
// The behaviour of a simulated device follows Apple's "Device Management"
// documentation (check-in and command protocols) and RFC 5652 (CMS).
package mdmtest
