package certauth

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestPlaces(t *testing.T) {
	p := newPlaces(10, 3)
	taken := 0
	var releases []func()
	try := func(certificate, device, address string) bool {
		release, ok := p.take(certificate, device, address)
		if ok {
			taken++
			releases = append(releases, release)
		}
		return ok
	}
	require.True(t, try("c1", "d1", "192.0.2.1"))
	require.False(t, try("c1", "d2", "192.0.2.2"), "one for each certificate")
	require.False(t, try("c2", "d1", "192.0.2.2"), "one for each device")
	for i := range 4 {
		require.Equal(t, i < 2, try(fmt.Sprint("x", i), fmt.Sprint("x", i), "192.0.2.1"), "three for each address")
		require.Equal(t, i < 3, try(fmt.Sprint("y", i), fmt.Sprint("y", i), fmt.Sprintf("2001:db8::%x", i)), "three for each IPv6 network")
	}
	for i := 0; taken < 10; i++ {
		require.True(t, try(fmt.Sprint("z", i), fmt.Sprint("z", i), ""), "a peer without an address has no limit of its own")
	}
	require.False(t, try("last", "last", ""), "ten in all")
	for _, release := range releases {
		release()
	}
	require.Empty(t, p.holders)
	require.Zero(t, p.open)
	require.True(t, try("c1", "d1", "192.0.2.1"))
}
